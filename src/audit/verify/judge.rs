//! Goes along the chain of a trail, and says where it does not hold.
//!
//! A record that is not the next one is kept until the one after it is known, which tells what happened: whether that goes on
//! from the record kept (then records before it are missing, or are told again), from the one before it (then the record kept
//! was put in), or from its place (then its number was altered). So every finding stands at the record that was touched, as far
//! as the chain can tell; where two records next to each other no longer fit, it cannot tell for sure which of them it was.
//!
//! Nothing here reads or waits; memory is bounded by the findings.

use std::collections::VecDeque;

use super::Keys;
use super::absent::{Held, Whose};
use super::anchors::Anchors;
use super::fields::{self, Fields};
use super::lines::Line;
use super::report::{Finding, Kind, Report, Trail, vouch};
use crate::audit::chain::{Link, Linked, TrailId};
use crate::audit::head::{self, Anchor, Countersigned, Head, SealError};
use crate::limits::{VERIFY_FINDINGS_MAX, VERIFY_HEADS, VERIFY_TORN};

/// Where a line stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    file: usize,
    line: u64,
    offset: u64,
}

/// A record, as far as the chain goes.
#[derive(Debug, Clone)]
struct Record {
    seq: u64,
    prev: Link,
    digest: Link,
    place: Place,
    time: Option<[u8; fields::TIME_LEN]>,
    own: Option<Box<Own>>,
}

/// What a record says of the trail itself.
#[derive(Debug, Clone)]
enum Own {
    Started {
        trail: Option<TrailId>,
    },
    Continued {
        trail: Option<TrailId>,
        /// Whose files begin here.
        sinks: String,
    },
    Stopped,
    Recovered {
        torn: Option<Link>,
    },
    Head(Box<Covered>),
    Countersigned {
        anchor: Option<Anchor>,
        covers: Option<u64>,
        signed: Option<u64>,
        key: String,
        signature: String,
    },
    /// A sink that is not required works again.
    Works {
        sink: String,
        lost: u64,
    },
    Other,
}

/// What a head says.
#[derive(Debug, Clone)]
struct Covered {
    trail: Option<TrailId>,
    covers: Option<u64>,
    record: Option<Link>,
    time: Option<u64>,
    key: Option<String>,
    signature: Option<String>,
    /// After how many records and seconds there is another at the latest.
    next: Option<(u64, u64)>,
}

/// Where the way along the chain is.
#[derive(Debug)]
struct Current {
    trail: Option<TrailId>,
    report: Trail,
    /// The last record that was taken in.
    base: Record,
    /// The digest that the record before it has.
    before: Link,
    /// From where on every record names the one before it.
    run: u64,
    broken: Option<Broken>,
    /// A record that is not the next one.
    held: Option<Record>,
    /// A record that was passed over; it may be missing further on.
    displaced: Option<(u64, Link, usize)>,
    /// Lines that are no records, since the last record.
    unreadable: u64,
    heads: VecDeque<(Anchor, u64)>,
    /// What the last head has said of the next one, and the last that a good one covers.
    next: Option<(u64, u64)>,
    promised: Option<(u64, u64)>,
    signed_to: Option<u64>,
    anchored_to: Option<u64>,
    /// The time of the first record after the last good head in this process's writing.
    unsigned_since: Option<[u8; fields::TIME_LEN]>,
    /// The first head after the last good one that is not signed.
    unsigned_head: Option<Place>,
    /// Stops without a signed head of what was before, until one covers them.
    unsigned_stops: Vec<(Place, u64)>,
    /// Gaps of which it is not known yet whether the trail accounts for them: index of the finding, and records.
    gaps: Vec<(usize, u64)>,
    /// Where in the copies of this trail's heads the way is.
    copied: usize,
    /// Those that the trail accounts for: the first and the last record of each.
    accounted: Vec<(u64, u64)>,
    /// Of which sinks this may be the copy, if a rotation has said so.
    sinks: Option<String>,
    /// Of which it is, if it has lost records.
    copy_of: Option<String>,
}

/// Links one after the other that do not hold: the first record is not what the second says, and so on to the last.
#[derive(Debug, Clone, Copy)]
struct Broken {
    first: (u64, Place),
    second: (u64, Place),
    last: (u64, Place),
}

pub(super) struct Judge<'a> {
    keys: &'a Keys,
    anchors: &'a mut Anchors,
    files: Vec<String>,
    report: Report,
    findings: Vec<Option<(Place, Finding)>>,
    current: Option<Current>,
    /// Lines that are no records, and may be what a crash has left: the next start says so.
    torn: Vec<(Link, Place, bool)>,
    /// Missing records that lines between these places stand for, if they are no records: index of the finding, and the records
    /// before and after.
    stood_for: Vec<(usize, Place, Place)>,
    /// The last line, if it is not whole.
    cut: Option<Place>,
    side: Option<String>,
    /// Whose the trail is, if it is an agent's.
    whose: Vec<Whose>,
    /// The trails that are over.
    held: Vec<Held>,
}

impl<'a> Judge<'a> {
    pub(super) fn new(keys: &'a Keys, anchors: &'a mut Anchors) -> Self {
        Self {
            keys,
            anchors,
            files: Vec::new(),
            report: Report::default(),
            findings: Vec::new(),
            current: None,
            torn: Vec::new(),
            stood_for: Vec::new(),
            cut: None,
            side: None,
            whose: Vec::new(),
            held: Vec::new(),
        }
    }

    /// Goes on with another file.
    pub(super) fn file(&mut self, name: &str) {
        self.files.push(name.to_owned());
        self.cut = None;
    }

    pub(super) fn line(&mut self, line: &Line<'_>) {
        self.report.records += 1;
        self.report.bytes += line.bytes.len() as u64;
        let place = Place { file: self.files.len().saturating_sub(1), line: line.number, offset: line.offset };
        self.cut = (!line.whole).then_some(place);
        let linked = Linked::read(line.bytes).filter(|_| line.whole);
        let Some(Linked { seq, prev }) = linked else { return self.unreadable(line, place) };
        let sound = std::str::from_utf8(line.bytes)
            .is_ok_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text.trim_end_matches('\n')).is_ok());
        if !sound {
            self.found(Kind::Unreadable, place, Some(seq), None, "the record is not JSON".to_owned());
        }
        let event = fields::event(line.bytes);
        let own = event.filter(|event| event.starts_with(b"trail.") || matches!(*event, b"sink.works" | b"link.up"));
        let own = own.and_then(|event| self.own(event, line.bytes));
        let record = Record { seq, prev, digest: Link::of(line.bytes), place, time: fields::time(line.bytes), own };
        self.take(record);
    }

    /// Says how it ended.
    pub(super) fn finish(mut self) -> Report {
        self.finish_trail();
        if self.report.trails.is_empty() {
            self.nothing();
        }
        self.judge_absent();
        for (_, place, whole) in std::mem::take(&mut self.torn) {
            if whole || self.cut != Some(place) {
                self.found(Kind::Unreadable, place, None, None, NO_RECORD.to_owned());
            } else {
                let text = "the last line is not whole: it was cut off, or its writer was killed while it wrote (its next \
                            start will say so), or is writing now";
                self.found(Kind::Torn, place, None, None, text.to_owned());
            }
        }
        // What is not a record any more is not missing as well. A line that a crash has left never was one.
        for (finding, after, before) in std::mem::take(&mut self.stood_for) {
            let spoilt = self
                .findings
                .iter()
                .flatten()
                .any(|(place, finding)| finding.kind == Kind::Unreadable && after < *place && *place < before);
            if let Some(missing) = self.findings.get_mut(finding).filter(|_| spoilt) {
                *missing = None;
            }
        }
        let mut findings: Vec<_> = self.findings.into_iter().flatten().collect();
        findings.sort_by_key(|(place, _)| *place);
        self.report.findings = findings.into_iter().map(|(_, finding)| finding).collect();
        self.report.intact = self.report.findings.is_empty() && self.report.more_findings == 0;
        self.report
    }

    /// There is no record at all. Every trail has one before anything is done.
    fn nothing(&mut self) {
        let place = Place { file: 0, line: 0, offset: 0 };
        if self.anchors.is_empty() {
            let text = "there is no record, so no head that is signed with a key that was given";
            if !self.keys.is_empty() {
                self.found(Kind::HeadMissing, place, None, None, text.to_owned());
            }
        } else {
            let text =
                "there is no record, and another place has seen some: if they are of this trail, then all was cut off";
            self.found(Kind::Truncated, place, None, None, text.to_owned());
        }
    }

    fn unreadable(&mut self, line: &Line<'_>, place: Place) {
        if let Some(current) = &mut self.current {
            current.unreadable += 1;
        }
        if line.bytes.is_empty() || self.torn.len() >= VERIFY_TORN {
            return self.found(Kind::Unreadable, place, None, None, NO_RECORD.to_owned());
        }
        let bytes = line.bytes.strip_suffix(b"\n").unwrap_or(line.bytes);
        self.torn.push((Link::of(bytes), place, line.whole));
    }

    fn own(&mut self, event: &[u8], line: &[u8]) -> Option<Box<Own>> {
        let fields = serde_json::from_slice::<Fields<'_>>(line).ok()?;
        let trail = fields.trail.as_deref().and_then(TrailId::parse);
        if let Some(side) = fields.side.as_deref().filter(|side| self.side.as_deref() != Some(*side)) {
            self.side = Some(side.to_owned());
        }
        if fields.side.as_deref() == Some("agent")
            && let Some(whose) = Whose::agent(&fields)
        {
            whose.add_to(&mut self.whose);
        }
        let text = |text: &Option<std::borrow::Cow<'_, str>>| text.as_deref().map(str::to_owned);
        let link =
            |text: &Option<std::borrow::Cow<'_, str>>| text.as_deref().and_then(|text| Link::parse(text.as_bytes()));
        Some(Box::new(match event {
            b"trail.started" => Own::Started { trail },
            b"trail.continued" => Own::Continued { trail, sinks: text(&fields.sink).unwrap_or_default() },
            b"trail.stopped" => Own::Stopped,
            b"trail.recovered" => Own::Recovered { torn: link(&fields.torn) },
            b"trail.head" => Own::Head(Box::new(Covered {
                trail,
                covers: fields.covers,
                record: link(&fields.head),
                time: fields.time.as_deref().and_then(fields::milliseconds),
                key: text(&fields.key),
                signature: text(&fields.signature),
                next: fields.head_records.zip(fields.head_s),
            })),
            b"trail.countersigned" => Own::Countersigned {
                anchor: fields.digest.as_deref().and_then(Anchor::parse),
                covers: fields.covers,
                signed: fields.signed.as_deref().and_then(fields::milliseconds),
                key: text(&fields.key).unwrap_or_default(),
                signature: text(&fields.signature).unwrap_or_default(),
            },
            b"sink.works" => {
                Own::Works { sink: text(&fields.sink).unwrap_or_default(), lost: fields.lost.unwrap_or(0) }
            }
            _ => Own::Other,
        }))
    }

    fn take(&mut self, record: Record) {
        if let Some(Own::Started { trail: Some(trail) }) = record.own.as_deref() {
            let begins = record.seq == 0 && record.prev == Link::origin(trail);
            let here = self.current.as_ref().and_then(|current| current.trail);
            if begins && here != Some(*trail) {
                self.finish_trail();
            }
        }
        // A file that a rotation has begun, of another trail than the files before: these are over.
        if let Some(Own::Continued { trail: Some(trail), .. }) = record.own.as_deref()
            && record.place.line == 1
            && self.current.as_ref().and_then(|current| current.trail).is_some_and(|here| here != *trail)
        {
            self.finish_trail();
        }
        let Some(current) = &mut self.current else { return self.begin(record) };
        let Some(held) = current.held.take() else { return self.step(record) };
        let next = current.base.seq.saturating_add(1);
        if record.prev == held.digest && Some(record.seq) == held.seq.checked_add(1) {
            self.jump(held);
        } else if record.seq == next && record.prev == current.base.digest {
            self.displace(held);
        } else if Some(record.seq) == next.checked_add(1) {
            let text = format!("the record's number was altered: it says {} where {next} belongs", held.seq);
            self.found(Kind::Altered, held.place, Some(next), None, text);
            self.accept(Record { seq: next, ..held }, false);
            // What the next one names is the record as it was.
            return self.accept(record, false);
        } else {
            self.jump(held);
        }
        self.step(record);
    }

    fn begin(&mut self, record: Record) {
        let place = record.place;
        let (trail, opens) = match record.own.as_deref() {
            Some(Own::Started { trail }) => (*trail, true),
            Some(Own::Continued { trail, .. }) => (*trail, true),
            _ => (None, false),
        };
        let started = matches!(record.own.as_deref(), Some(Own::Started { .. }));
        // With another number, it is still the first one by what it names.
        let origin = started && trail.is_some_and(|trail| record.prev == Link::origin(&trail));
        if origin && record.seq != 0 {
            let text = format!("the record's number was altered: it says {} where 0 belongs", record.seq);
            self.found(Kind::Altered, place, Some(0), None, text);
        } else if record.seq == 0 && !origin {
            let text = "the first record does not say what trail it begins, or not what it says it is";
            self.found(Kind::Altered, place, Some(0), None, text.to_owned());
        } else if record.seq > 0 && !opens {
            let text = format!(
                "begins with record {}, which is not one that a file begins with: what was before it was \
                                taken out",
                record.seq
            );
            self.found(Kind::BeginsInside, place, Some(record.seq), None, text);
        } else if record.seq > 0 {
            let text = format!("begins with record {}; the files before this one were not given", record.seq);
            self.note(Kind::BeginsLater, place, Some(record.seq), text);
        }
        let record = if origin { Record { seq: 0, ..record } } else { record };
        let copied = self.anchors.copies(trail).partition_point(|copied| copied.seq < record.seq);
        self.current = Some(Current {
            trail,
            report: Trail { first: record.seq, from: record.time.as_ref().map(said), ..Trail::default() },
            before: record.prev,
            run: record.seq,
            base: record.clone(),
            broken: None,
            held: None,
            displaced: None,
            unreadable: 0,
            heads: VecDeque::new(),
            next: None,
            promised: None,
            signed_to: None,
            anchored_to: None,
            unsigned_since: record.time,
            unsigned_head: None,
            unsigned_stops: Vec::new(),
            gaps: Vec::new(),
            copied,
            accounted: Vec::new(),
            sinks: self.anchors.sink().map(str::to_owned),
            copy_of: None,
        });
        self.says(&record);
    }

    /// Takes in the next record, if it is that, and keeps it otherwise.
    fn step(&mut self, record: Record) {
        let Some(current) = &mut self.current else { return };
        let next = current.base.seq.saturating_add(1);
        if record.seq == next {
            let fits = record.prev == current.base.digest;
            if !fits {
                let (base, here) = ((current.base.seq, current.base.place), (record.seq, record.place));
                let broken = current.broken.unwrap_or(Broken { first: base, second: here, last: here });
                current.broken = Some(Broken { last: here, ..broken });
            }
            return self.accept(record, fits);
        }
        if record.seq == current.base.seq && record.digest == current.base.digest {
            let text = format!("record {} stands there once more", record.seq);
            return self.found(Kind::Repeated, record.place, Some(record.seq), None, text);
        }
        current.held = Some(record);
    }

    /// Goes on with a record that is not the next one, since the one after it does, or there is none.
    fn jump(&mut self, record: Record) {
        let Some(current) = &mut self.current else { return };
        let (place, base, next) = (record.place, current.base.place, current.base.seq.saturating_add(1));
        if record.seq >= next {
            let (gap, last) = (record.seq - next, record.seq.saturating_sub(1));
            let displaced = current.displaced.take_if(|(seq, digest, _)| *seq == last && *digest == record.prev);
            let (unreadable, after) = (current.unreadable, current.base.seq);
            if let Some((seq, _, finding)) = displaced.filter(|_| gap == 1) {
                self.reword(finding, Kind::Moved, format!("record {seq} stands before its place"));
            } else if gap > 0 {
                let text = format!("{} after record {after} are not there: {next} to {last}", some(gap));
                let finding = self.findings.len();
                self.found(Kind::Missing, place, Some(next), Some(last), text);
                if gap <= unreadable && self.stood_for.len() < VERIFY_TORN {
                    self.stood_for.push((finding, base, place));
                }
                if let Some(current) = &mut self.current
                    && current.gaps.len() < VERIFY_TORN
                {
                    current.gaps.push((finding, gap));
                }
            }
        } else if record.seq == current.base.seq && record.prev == current.before {
            // The one that was taken in before has no successor, and this one has.
            if current.broken.is_some_and(|broken| broken.last.1 == base) {
                current.broken = None;
            }
            let text =
                format!("record {} stands there twice; this one is not the one that the next record names", record.seq);
            self.found(Kind::Inserted, base, Some(record.seq), None, text);
        } else {
            let (from, to) = (current.base.seq, record.seq);
            let text = format!("goes back from record {from} to {to}: records were repeated, moved or put in");
            self.found(Kind::Repeated, place, Some(to), Some(from), text);
        }
        self.settle();
        if let Some(current) = &mut self.current {
            current.broken = None;
        }
        self.accept(record, false);
    }

    /// Passes over a record that the chain does not go through.
    fn displace(&mut self, record: Record) {
        let finding = self.findings.len();
        let gap = |at: &Option<(Place, Finding)>| {
            at.as_ref().is_some_and(|(_, finding)| finding.kind == Kind::Missing && finding.seq == Some(record.seq))
        };
        if let Some(at) = self.findings.iter().rposition(gap)
            && self.findings[at].as_ref().is_some_and(|(_, finding)| finding.last_seq == Some(record.seq))
        {
            self.findings[at] = None;
            let text = format!("record {} stands behind its place", record.seq);
            return self.found(Kind::Moved, record.place, Some(record.seq), None, text);
        }
        let text = format!("a record with the number {} that no other names", record.seq);
        self.found(Kind::Inserted, record.place, Some(record.seq), None, text);
        if let Some(current) = &mut self.current {
            current.displaced = Some((record.seq, record.digest, finding));
        }
    }

    /// Says which records were altered, once it is known how far that goes.
    fn settle(&mut self) {
        let Some(current) = &mut self.current else { return };
        let Some(Broken { first, second, last }) = current.broken.take() else { return };
        if second == last {
            let text = format!("record {} is not what record {} says it is: it was altered", first.0, last.0);
            return self.altered(first.1, first.0, first.0, text);
        }
        // What is altered where a record names the one before it breaks both links at once.
        let (from, to) = (second.0, last.0.saturating_sub(1));
        let which = if from == to { format!("record {from} was") } else { format!("records {from} to {to} were") };
        let text = format!(
            "{which} altered (record {} perhaps, too): the links between {} and {} do not hold",
            first.0, first.0, last.0
        );
        self.altered(second.1, from, to, text);
    }

    fn altered(&mut self, place: Place, first: u64, last: u64, text: String) {
        let known = |at: &Option<(Place, Finding)>| {
            at.as_ref().is_some_and(|(there, finding)| {
                *there == place && matches!(finding.kind, Kind::Unreadable | Kind::Altered | Kind::Rewritten)
            })
        };
        // It has been said already what is wrong with that record.
        if !self.findings.iter().rev().take(8).any(known) {
            self.found(Kind::Altered, place, Some(first), (last > first).then_some(last), text);
        }
    }

    /// Takes in a record. `fits` says whether it names the one before it.
    fn accept(&mut self, record: Record, fits: bool) {
        if fits {
            self.settle();
        }
        let Some(current) = &mut self.current else { return };
        if !fits {
            current.run = record.seq;
            current.unsigned_since = None;
        }
        current.unreadable = 0;
        let follows = Some(record.seq) == current.base.seq.checked_add(1);
        current.before = if follows { current.base.digest } else { record.prev };
        if current.unsigned_since.is_none() {
            current.unsigned_since = record.time;
        }
        current.report.stopped = false;
        current.base = record.clone();
        self.compare(&record);
        self.says(&record);
    }

    /// Holds a record against what copies have of it.
    fn compare(&mut self, record: &Record) {
        let Some(current) = &mut self.current else { return };
        let copies = self.anchors.copies(current.trail);
        let behind = copies.get(current.copied).is_none_or(|copied| copied.seq > record.seq)
            && current
                .copied
                .checked_sub(1)
                .and_then(|at| copies.get(at))
                .is_some_and(|copied| copied.seq >= record.seq);
        if behind {
            current.copied = copies.partition_point(|copied| copied.seq < record.seq);
        }
        let mut differs = None;
        while let Some(copied) = copies.get(current.copied).filter(|copied| copied.seq <= record.seq) {
            current.copied += 1;
            if copied.seq < record.seq {
                continue;
            }
            if copied.record == record.digest {
                let by = self.anchors.source(copied.source);
                vouch(&mut current.report.anchored, by, true, current.run, record.seq);
                current.anchored_to = current.anchored_to.max(Some(record.seq));
            } else {
                differs = Some(*copied);
            }
        }
        if let Some(copied) = differs {
            let since =
                current.anchored_to.map_or_else(|| "its beginning".to_owned(), |seq| format!("record {}", seq + 1));
            let by = self.anchors.source(copied.source);
            let text = format!(
                "record {} is another one than line {} of {by} has: the trail was rewritten from {since} on, or after",
                record.seq, copied.line
            );
            self.found(Kind::Rewritten, record.place, Some(record.seq), None, text);
        }
    }

    /// Takes in what a record says of the trail itself.
    fn says(&mut self, record: &Record) {
        let Some(own) = record.own.as_deref() else { return };
        match own {
            Own::Started { trail } | Own::Continued { trail, .. } => {
                if let Some(current) = &mut self.current {
                    current.unsigned_since = record.time;
                    if let Own::Continued { sinks, .. } = own
                        && record.place.line == 1
                        && self.anchors.sink().is_none()
                    {
                        current.sinks = Some(sinks.clone());
                    }
                }
                self.belongs(*trail, record);
            }
            Own::Stopped => self.stopped(record),
            Own::Recovered { torn: Some(torn) } => {
                if let Some(at) = self.torn.iter().position(|(link, ..)| link == torn) {
                    let (_, place, _) = self.torn.remove(at);
                    let text = "a line that a crash has left incomplete; the next start has recorded what it was";
                    self.note(Kind::Recovered, place, None, text.to_owned());
                }
            }
            Own::Head(covered) => self.head(record, covered),
            Own::Countersigned { anchor, covers, signed, key, signature } => {
                let seen = anchor.zip(*signed).map(|(anchor, time_ms)| Countersigned { anchor, time_ms });
                self.countersigned(record, seen, *covers, key, signature);
            }
            Own::Works { sink, lost } => self.works(sink, *lost),
            Own::Recovered { torn: None } | Own::Other => {}
        }
    }

    fn belongs(&mut self, trail: Option<TrailId>, record: &Record) {
        let Some(current) = &mut self.current else { return };
        match (current.trail, trail) {
            (None, Some(trail)) => {
                current.trail = Some(trail);
                current.copied = self.anchors.copies(Some(trail)).partition_point(|copied| copied.seq < record.seq);
                self.compare(record);
            }
            (Some(here), Some(trail)) if here != trail => {
                let text = format!("a record of the trail {trail} in the trail {here}");
                self.found(Kind::Mixed, record.place, Some(record.seq), None, text);
            }
            _ => {}
        }
    }

    fn stopped(&mut self, record: &Record) {
        let Some(current) = &mut self.current else { return };
        current.report.stopped = true;
        let covered = current.signed_to.is_some_and(|seq| seq.saturating_add(2) >= record.seq);
        if !self.keys.is_empty() && !covered && current.unsigned_stops.len() < VERIFY_TORN {
            current.unsigned_stops.push((record.place, record.seq));
        }
    }

    fn head(&mut self, record: &Record, covered: &Covered) {
        self.belongs(covered.trail, record);
        let place = record.place;
        let Some(current) = &mut self.current else { return };
        let seq = record.seq.saturating_sub(1);
        let head = match (covered.trail, covered.time) {
            (Some(trail), Some(time_ms))
                if covered.covers == Some(seq) && covered.record == Some(record.prev) && record.seq > 0 =>
            {
                Head { trail, seq, record: record.prev, time_ms }
            }
            _ => {
                let text = "the head does not say what the record before it is";
                return self.found(Kind::HeadForged, place, Some(record.seq), None, text.to_owned());
            }
        };
        let anchor = head.anchor();
        if current.heads.len() >= VERIFY_HEADS {
            current.heads.pop_front();
        }
        current.heads.push_back((anchor, seq));
        // What the head covers begins where the chain has last been whole.
        let whole = current.run <= seq;
        let mut fault = None;
        match (&covered.key, &covered.signature) {
            (Some(key), Some(signature)) => match head::verify_head(&head, key, signature) {
                Ok(_) if self.keys.is_empty() || self.keys.knows(key) => {
                    if whole {
                        vouch(&mut current.report.signed, key, !self.keys.is_empty(), current.run, seq);
                        current.signed_to = Some(seq);
                        current.promised = current.next.or(covered.next);
                        current.unsigned_since = record.time;
                        current.unsigned_head = None;
                        let run = current.run;
                        current.unsigned_stops.retain(|(_, stop)| *stop < run);
                    }
                }
                Ok(fingerprint) => {
                    fault = Some((
                        Kind::HeadForeign,
                        format!("a head that is signed with a key that was not given: {fingerprint}"),
                    ));
                }
                Err(error) => {
                    let why = match &error {
                        SealError::Signature(source) => format!("it {source}"),
                        error => error.to_string(),
                    };
                    fault = Some((Kind::HeadForged, format!("the head's signature does not hold ({why})")));
                }
            },
            _ => drop(current.unsigned_head.get_or_insert(place)),
        }
        current.next = covered.next.or(current.next);
        if let Some(source) = self.anchors.find(&anchor, seq)
            && whole
        {
            vouch(&mut current.report.anchored, self.anchors.source(source), true, current.run, seq);
            current.anchored_to = current.anchored_to.max(Some(seq));
        }
        if let Some((kind, text)) = fault {
            self.found(kind, place, Some(record.seq), None, text);
        }
    }

    fn countersigned(
        &mut self,
        record: &Record,
        seen: Option<Countersigned>,
        covers: Option<u64>,
        key: &str,
        signature: &str,
    ) {
        let Some(current) = &mut self.current else { return };
        // An answer without a signature is the other side's word, which its own trail has.
        if signature.is_empty() {
            return;
        }
        let Some(seen) = seen else {
            let text = "a countersignature that does not say of what";
            return self.found(Kind::CountersignatureForged, record.place, Some(record.seq), None, text.to_owned());
        };
        // Of a head that was before these files, that is no longer held, or that is missing, nothing can be said.
        let forgotten =
            current.heads.front().filter(|_| current.heads.len() >= VERIFY_HEADS).map(|(_, oldest)| *oldest);
        let missing = |head: u64| {
            let gaps = current.gaps.iter().filter_map(|(finding, _)| self.findings.get(*finding)?.as_ref());
            let gaps = gaps.filter_map(|(_, finding)| finding.seq.zip(finding.last_seq));
            gaps.chain(current.accounted.iter().copied()).any(|(first, last)| (first..=last).contains(&head))
        };
        if covers.is_some_and(|covers| {
            let before = covers < current.report.first || forgotten.is_some_and(|oldest| covers < oldest);
            before || missing(covers.saturating_add(1))
        }) {
            return;
        }
        let head = current.heads.iter().rev().find(|(anchor, _)| *anchor == seen.anchor).map(|(_, seq)| *seq);
        let text = match (head::verify_countersigned(&seen, key, signature), head) {
            (Err(error), _) => format!("a countersignature that does not hold ({error})"),
            (Ok(_), None) => {
                "a countersignature of a head that is not in the trail: it was rewritten before".to_owned()
            }
            (Ok(_), Some(seq)) if covers.is_some_and(|covers| covers != seq) => {
                "a countersignature of another head than the record says".to_owned()
            }
            (Ok(_), Some(seq)) => {
                if current.run <= seq {
                    let known = self.keys.knows(key);
                    vouch(&mut current.report.anchored, key, known, current.run, seq);
                    current.anchored_to = current.anchored_to.max(Some(seq));
                }
                return;
            }
        };
        self.found(Kind::CountersignatureForged, record.place, Some(record.seq), None, text);
    }

    /// A sink has lost records, says the trail: if that is what is missing here, then this is its copy.
    fn works(&mut self, sink: &str, lost: u64) {
        let Some(current) = &mut self.current else { return };
        let may_be = current.sinks.as_ref().is_none_or(|sinks| sinks.split(' ').any(|name| name == sink));
        if !may_be || current.copy_of.as_ref().is_some_and(|name| name != sink) {
            return;
        }
        let all: u64 = current.gaps.iter().map(|(_, gap)| gap).sum();
        let explained: Vec<usize> = match current.gaps.last() {
            Some((last, gap)) if *gap == lost => vec![*last],
            Some(_) if all == lost => current.gaps.iter().map(|(finding, _)| *finding).collect(),
            _ => return,
        };
        current.gaps.clear();
        current.copy_of = Some(sink.to_owned());
        for finding in explained {
            let Some((_, finding)) = self.findings.get_mut(finding).and_then(Option::take) else { continue };
            current.accounted.extend(finding.seq.zip(finding.last_seq));
            if self.report.notes.len() < VERIFY_FINDINGS_MAX {
                let text = format!(
                    "{}; the trail says that the sink {sink} has lost so many: if this is not its copy, they were taken out",
                    finding.text
                );
                self.report.notes.push(Finding { kind: Kind::Lost, text, ..finding });
            }
        }
    }

    fn finish_trail(&mut self) {
        if let Some(held) = self.current.as_mut().and_then(|current| current.held.take()) {
            self.jump(held);
        }
        self.settle();
        let Some(mut current) = self.current.take() else { return };
        let last = current.base.seq;
        current.report.last = last;
        current.report.until = current.base.time.as_ref().map(said);
        current.report.trail = current.trail.map(|trail| trail.to_string());
        let tail = |to: Option<u64>| match to {
            Some(seq) => last.saturating_sub(seq),
            None => last.saturating_sub(current.report.first).saturating_add(1),
        };
        current.report.unsigned_tail = tail(current.signed_to);
        current.report.unanchored_tail = tail(current.anchored_to);
        for (place, seq) in std::mem::take(&mut current.unsigned_stops) {
            let text = "the trail is stopped without a signed head of what was before: records may have been taken out";
            self.found(Kind::HeadMissing, place, Some(seq), None, text.to_owned());
        }
        if !self.keys.is_empty() {
            self.judge_tail(&current);
        }
        self.judge_anchors(&current);
        let (side, whose) = (self.side.clone(), std::mem::take(&mut self.whose));
        let Trail { from, until, .. } = current.report.clone();
        self.held.push(Held { trail: current.trail, side: side.clone(), whose, from, until });
        self.report.trails.push(Trail { side, ..current.report });
    }

    /// What others have seen of whole trails that are not here.
    fn judge_absent(&mut self) {
        let mut absent = self.anchors.absent(&self.held);
        absent.sort_by_key(|(_, absent)| !absent.missed);
        for ((line, offset), absent) in &absent {
            if !absent.missed {
                break;
            }
            let text = format!(
                "{absent}, and it is not in these files: it was deleted or begun anew, or its files were not given \
                 (--elsewhere {} if it is known where it is)",
                absent.trail
            );
            if self.findings.len() >= VERIFY_FINDINGS_MAX {
                self.report.more_findings += 1;
                continue;
            }
            // Behind whatever was found in the files.
            let place = Place { file: usize::MAX, line: *line, offset: *offset };
            let (file, line, offset) = (absent.by.clone(), *line, *offset);
            let finding = Finding { kind: Kind::Absent, file, line, offset, seq: None, last_seq: None, text };
            self.findings.push(Some((place, finding)));
        }
        self.report.more_absent = absent.len().saturating_sub(VERIFY_FINDINGS_MAX) as u64;
        self.report.absent = absent.into_iter().take(VERIFY_FINDINGS_MAX).map(|(_, absent)| absent).collect();
    }

    /// What no signed head covers: there may be a little of that at the end, and no more.
    fn judge_tail(&mut self, current: &Current) {
        let (last, place) = (current.base.seq, current.base.place);
        let Some(signed_to) = current.signed_to else {
            let place = current.unsigned_head.unwrap_or(place);
            let kind = if current.unsigned_head.is_some() { Kind::HeadUnsigned } else { Kind::HeadMissing };
            let text = "no head of the trail is signed with a key that was given";
            return self.found(kind, place, Some(current.report.first), Some(last), text.to_owned());
        };
        let from = Some(signed_to.saturating_add(1));
        if let Some(place) = current.unsigned_head {
            let text = format!("the heads after record {signed_to} are not signed");
            return self.found(Kind::HeadUnsigned, place, from, Some(last), text);
        }
        let Some((records, seconds)) = current.promised else { return };
        let moment = |time: &Option<[u8; fields::TIME_LEN]>| {
            time.as_ref().and_then(|time| fields::milliseconds(std::str::from_utf8(time).ok()?))
        };
        let lasted = moment(&current.base.time).zip(moment(&current.unsigned_since));
        let lasted = lasted.map_or(0, |(until, since)| until.saturating_sub(since) / 1000);
        // The head that says so is a record, too, and a stop another.
        let many = last.saturating_sub(signed_to) > records.saturating_add(2);
        if many || lasted > seconds.saturating_mul(2).saturating_add(HEAD_SLACK_S) {
            let text = format!(
                "no signed head covers what comes after record {signed_to}, and there has to be one after {records} \
                 records or {seconds} s: heads were taken out, or records rewritten"
            );
            self.found(Kind::HeadMissing, place, from, Some(last), text);
        }
    }

    /// What others have seen of the trail, and is not in it.
    fn judge_anchors(&mut self, current: &Current) {
        let (first, last, place) = (current.report.first, current.base.seq, current.base.place);
        let mut found = Vec::new();
        if let Some(copied) = self.anchors.copies(current.trail).last().filter(|copied| copied.seq > last) {
            let by = self.anchors.source(copied.source);
            let text =
                format!("line {} of {by} has record {}: what is after {last} was cut off", copied.line, copied.seq);
            found.push((Kind::Truncated, last.saturating_add(1), Some(copied.seq), text));
        }
        let mut absent: Vec<Absent> = Vec::new();
        let mut before: Vec<(usize, u64)> = Vec::new();
        for (seen, seq) in self.anchors.of(current.trail) {
            let room = absent.len() < VERIFY_TORN;
            let last_there = before.iter().find(|(source, _)| *source == seen.source).map(|(_, seq)| *seq);
            match seq {
                Some(seq) => {
                    before.retain(|(source, _)| *source != seen.source);
                    before.push((seen.source, seq));
                    let open = absent.iter_mut().rfind(|run| run.source == seen.source && run.next.is_none());
                    if let Some(run) = open {
                        run.next = Some(seq);
                    }
                }
                None => match absent.iter_mut().rfind(|run| run.source == seen.source) {
                    Some(run) if run.there == last_there => run.count += 1,
                    _ if room => {
                        let (source, line) = (seen.source, seen.line);
                        absent.push(Absent { source, there: last_there, line, count: 1, next: None });
                    }
                    _ => {}
                },
            }
        }
        for Absent { source, there, line, count, next } in absent {
            let source_name = self.anchors.source(source);
            let goes_on = before.iter().any(|(other, seq)| *other == source && Some(*seq) != there);
            let from = there.map_or(first, |seq| seq.saturating_add(1));
            let lost = |(first, last): &(u64, u64)| *last >= from && next.is_none_or(|next| *first <= next);
            // Of files that were not given there is nothing to be found, nor of what a copy has lost.
            if (there.is_none() && first > 0 && goes_on)
                || (there.is_none() && first > 0 && before.is_empty())
                || current.accounted.iter().any(lost)
            {
                continue;
            }
            let (kind, what) = if goes_on {
                (Kind::Rewritten, "records were rewritten")
            } else {
                (Kind::Truncated, "records were cut off or rewritten")
            };
            let heads = if count == 1 { "a head".to_owned() } else { format!("{count} heads") };
            let text = format!(
                "{source_name} has seen {heads} that the trail does not have (line {line}): {what} from {from} on"
            );
            found.push((kind, from, None, text));
        }
        for (kind, seq, last_seq, text) in found {
            self.found(kind, place, Some(seq), last_seq, text);
        }
    }

    fn reword(&mut self, finding: usize, kind: Kind, text: String) {
        if let Some(Some((_, finding))) = self.findings.get_mut(finding) {
            finding.kind = kind;
            finding.text = text;
        }
    }

    fn found(&mut self, kind: Kind, place: Place, seq: Option<u64>, last_seq: Option<u64>, text: String) {
        if self.findings.len() >= VERIFY_FINDINGS_MAX {
            self.report.more_findings += 1;
            return;
        }
        let finding = self.at(kind, place, seq, last_seq, text);
        self.findings.push(Some((place, finding)));
    }

    fn note(&mut self, kind: Kind, place: Place, seq: Option<u64>, text: String) {
        if self.report.notes.len() < VERIFY_FINDINGS_MAX {
            let note = self.at(kind, place, seq, None, text);
            self.report.notes.push(note);
        }
    }

    fn at(&self, kind: Kind, place: Place, seq: Option<u64>, last_seq: Option<u64>, text: String) -> Finding {
        let file = self.files.get(place.file).cloned().unwrap_or_default();
        Finding { kind, file, line: place.line, offset: place.offset, seq, last_seq, text }
    }
}

/// Heads one after another that somebody has seen and that are not in the trail.
struct Absent {
    source: usize,
    /// The last record before them that a head there covers.
    there: Option<u64>,
    /// Where the first of them stands.
    line: u64,
    count: u64,
    /// What the next head that is there covers.
    next: Option<u64>,
}

fn said(time: &[u8; fields::TIME_LEN]) -> String {
    String::from_utf8_lossy(time).into_owned()
}

fn some(records: u64) -> String {
    if records == 1 { "1 record".to_owned() } else { format!("{records} records") }
}

const NO_RECORD: &str = "the line is not a record";

/// How long a head may be behind what it promises, in seconds beyond twice that.
const HEAD_SLACK_S: u64 = 60;

//! What is known of trails beside their own files: what other places have kept (the other side's trail, or a copy of the heads on
//! another mount), and what the caller knows of the files.
//!
//! Promised: memory bounded by [`crate::limits::VERIFY_ANCHORS_MAX`]; what cannot be read in such a file is passed over, since that
//! file is not what is being verified.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};

use super::absent::{Held, Sightings};
use super::fields::{self, Fields};
use super::lines::Lines;
use super::report::Absent;
use crate::audit::chain::{Link, Linked, TrailId};
use crate::audit::head::Anchor;
use crate::limits::VERIFY_ANCHORS_MAX;

/// What is known beside the files.
#[derive(Debug, Default)]
pub struct Anchors {
    seen: Vec<Seen>,
    by_anchor: HashMap<Anchor, usize>,
    copies: BTreeMap<TrailId, Vec<Copied>>,
    sources: Vec<String>,
    sightings: Sightings,
    sink: Option<String>,
    full: bool,
}

/// An anchor that a place has recorded.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) anchor: Anchor,
    /// Of which trail, if that is known.
    pub(super) trail: Option<TrailId>,
    pub(super) source: usize,
    /// The line in its source.
    pub(super) line: u64,
    /// The record that the head covers, once it was found; noted at the first of those with the same anchor.
    found: Option<u64>,
}

/// The digest of a record, as a copy has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copied {
    pub(super) seq: u64,
    pub(super) record: Link,
    pub(super) source: usize,
    pub(super) line: u64,
}

impl Anchors {
    /// Takes in what a file holds: records of what its writer has seen of others, and heads. Returns how many of both.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(&mut self, name: &str, input: impl Read) -> io::Result<usize> {
        let source = self.sources.len();
        self.sources.push(name.to_owned());
        let mut lines = Lines::new(input);
        let mut count = 0;
        let mut last = None;
        while let Some(line) = lines.next()? {
            let Some(event) = fields::event(line.bytes).filter(|event| event.starts_with(b"trail.")) else { continue };
            if !matches!(event, b"trail.anchored" | b"trail.head" | b"trail.countersigned") {
                continue;
            }
            let Ok(fields) = serde_json::from_slice::<Fields<'_>>(line.bytes) else { continue };
            let at = (source, line.number);
            let held = match event {
                b"trail.anchored" => usize::from(self.anchored(&fields, at)),
                b"trail.head" => {
                    last = fields.trail.as_deref().and_then(TrailId::parse);
                    self.head(&fields, line.bytes, at)
                }
                _ => usize::from(self.copied(last, line.bytes, at)),
            };
            count += held;
            if held > 0 && event != b"trail.countersigned" {
                self.full |= !self.sightings.add(event, &fields, source, (line.number, line.offset));
            }
        }
        for copies in self.copies.values_mut() {
            copies.sort_by_key(|copied| copied.seq);
        }
        Ok(count)
    }

    /// Takes note that a trail is kept elsewhere, or was given up in order: that the files do not hold it is no finding.
    pub fn elsewhere(&mut self, trail: TrailId) {
        self.sightings.elsewhere(trail);
    }

    /// Takes note whose copy the files are: what the trail says of other sinks' losses accounts for nothing.
    pub fn copy_of(&mut self, sink: &str) {
        self.sink = Some(sink.to_owned());
    }

    /// Whose copy the files are, if that is known.
    pub(super) fn sink(&self) -> Option<&str> {
        self.sink.as_deref()
    }

    /// What other places have seen beside the trails that are here, each with the line and the byte where it was seen first.
    pub(super) fn absent(&self, held: &[Held]) -> Vec<((u64, u64), Absent)> {
        self.sightings.absent(held, |source| self.source(source).to_owned())
    }

    /// Whether nothing is known from elsewhere.
    pub(super) fn is_empty(&self) -> bool {
        self.seen.is_empty() && self.copies.is_empty()
    }

    /// Whether there was more than can be held, so that the rest was not looked at.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.full
    }

    pub(super) fn source(&self, source: usize) -> &str {
        self.sources.get(source).map_or("", String::as_str)
    }

    /// The places that have recorded this anchor; notes that it is that of a head which covers the record `seq`.
    pub(super) fn find(&mut self, anchor: &Anchor, seq: u64) -> Option<usize> {
        let seen = self.seen.get_mut(*self.by_anchor.get(anchor)?)?;
        seen.found = Some(seq);
        Some(seen.source)
    }

    /// What was recorded of a trail, in the order in which each source has it, with the record that the head covers, if it was
    /// found.
    pub(super) fn of(&self, trail: Option<TrailId>) -> impl Iterator<Item = (&Seen, Option<u64>)> {
        let found = |seen: &Seen| self.seen[self.by_anchor[&seen.anchor]].found;
        self.seen
            .iter()
            .filter(move |seen| seen.trail.is_some() && seen.trail == trail)
            .map(move |seen| (seen, found(seen)))
    }

    /// What copies hold of a trail, by number.
    pub(super) fn copies(&self, trail: Option<TrailId>) -> &[Copied] {
        trail.and_then(|trail| self.copies.get(&trail)).map_or(&[], Vec::as_slice)
    }

    fn anchored(&mut self, fields: &Fields<'_>, (source, line): (usize, u64)) -> bool {
        let Some(anchor) = fields.peer_digest.as_deref().and_then(Anchor::parse) else { return false };
        if !self.admits() {
            return false;
        }
        let trail = fields.peer_trail.as_deref().and_then(TrailId::parse);
        self.by_anchor.entry(anchor).or_insert(self.seen.len());
        self.seen.push(Seen { anchor, trail, source, line, found: None });
        true
    }

    /// A head says what the record before it is; and the line what the record is that holds it.
    fn head(&mut self, fields: &Fields<'_>, line: &[u8], at: (usize, u64)) -> usize {
        let trail = fields.trail.as_deref().and_then(TrailId::parse);
        let record = fields.head.as_deref().and_then(|head| Link::parse(head.as_bytes()));
        let (Some(trail), Some(record), Some(seq)) = (trail, record, fields.covers) else { return 0 };
        let head = self.copy(trail, seq, record, at);
        usize::from(head) + usize::from(self.copied(Some(trail), line, at))
    }

    fn copied(&mut self, trail: Option<TrailId>, line: &[u8], at: (usize, u64)) -> bool {
        let (Some(trail), Some(linked)) = (trail, Linked::read(line)) else { return false };
        self.copy(trail, linked.seq, Link::of(line), at)
    }

    fn copy(&mut self, trail: TrailId, seq: u64, record: Link, (source, line): (usize, u64)) -> bool {
        if !self.admits() {
            return false;
        }
        self.copies.entry(trail).or_default().push(Copied { seq, record, source, line });
        true
    }

    fn admits(&mut self) -> bool {
        let held: usize = self.copies.values().map(Vec::len).sum();
        let room = self.seen.len() + held < VERIFY_ANCHORS_MAX;
        self.full |= !room;
        room
    }
}

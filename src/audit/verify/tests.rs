//! Trails made by the chain, and what can be done to them.

mod absent;

use proptest::prelude::*;

use super::*;
use crate::audit::chain::{Chain, Link};
use crate::audit::head::{Anchor, Countersigned, Head, Signer};
use crate::identity::{Algorithm, PrivateKey};

/// A trail as a writer makes it, a line each.
#[derive(Clone)]
struct Made {
    trail: TrailId,
    side: &'static str,
    /// When it begins, in milliseconds of Unix time.
    since: i64,
    chain: Chain,
    lines: Vec<Vec<u8>>,
    signer: Option<Signer>,
    anchors: Vec<Anchor>,
}

impl Made {
    fn begin(signer: Option<&Signer>) -> Self {
        Self::begin_as("000102030405060708090a0b0c0d0e0f", "agent", 1_790_000_000_000, signer)
    }

    fn begin_as(trail: &str, side: &'static str, since: i64, signer: Option<&Signer>) -> Self {
        let trail = TrailId::parse(trail).expect("an id");
        let (chain, signer) = (Chain::begin(&trail), signer.cloned());
        let mut made = Self { trail, side, since, chain, lines: Vec::new(), signer, anchors: Vec::new() };
        made.add("trail.started", &format!("\"trail\":\"{trail}\",\"version\":\"0.1.0\",\"pid\":1"));
        made
    }

    fn add(&mut self, event: &str, members: &str) {
        let time = format!("{:.3}", jiff::Timestamp::from_millisecond(self.time()).expect("a time"));
        let more = if members.is_empty() { String::new() } else { format!(",{members}") };
        let side = self.side;
        let line = format!("{{\"v\":1,\"time\":\"{time}\",\"event\":\"{event}\",\"side\":\"{side}\"{more}}}\n");
        let mut line = line.into_bytes();
        self.chain.link(&mut line);
        self.lines.push(line);
    }

    fn time(&self) -> i64 {
        self.since + i64::try_from(self.chain.next()).expect("few") * 10
    }

    fn forwards(mut self, count: usize) -> Self {
        for number in 0..count {
            self.add("forward.open", &format!("\"forward\":\"{number:024x}\",\"target\":\"db:5432\""));
        }
        self
    }

    fn head(mut self) -> Self {
        let (trail, seq, record) = (self.trail, self.chain.next() - 1, self.chain.last());
        let head = Head { trail, seq, record, time_ms: self.time().unsigned_abs() };
        let mut members = format!("\"trail\":\"{trail}\",\"covers\":{seq},\"head\":\"{record}\"");
        members.push_str(",\"head_records\":1000,\"head_s\":60");
        if let Some(signer) = &self.signer {
            let seal = signer.sign(&head).expect("signed");
            members.push_str(&format!(",\"key\":\"{}\",\"signature\":\"{}\"", seal.key, seal.signature));
        }
        self.anchors.push(head.anchor());
        self.add("trail.head", &members);
        self
    }

    fn stop(mut self) -> Self {
        self.add("trail.stopped", "");
        self
    }

    fn bytes(&self) -> Vec<u8> {
        self.lines.concat()
    }

    /// What the other side has on record of the heads, as a file.
    fn seen(&self) -> Vec<u8> {
        let mut seen = Self::begin(None);
        seen.trail = TrailId::parse("ffffffffffffffffffffffffffffffff").expect("an id");
        for anchor in &self.anchors {
            seen.add("trail.anchored", &format!("\"peer_trail\":\"{}\",\"peer_digest\":\"{anchor}\"", self.trail));
        }
        seen.bytes()
    }

    /// Made anew from a record on, as whoever holds the key can, or as well as whoever does not.
    fn remade(&self, from: usize, change: impl Fn(usize, &str) -> Option<String>, signer: Option<&Signer>) -> Self {
        let mut made =
            Self { chain: Chain::begin(&self.trail), lines: Vec::new(), anchors: Vec::new(), ..self.clone() };
        made.signer = signer.cloned();
        for (number, line) in self.lines.iter().enumerate() {
            let text = std::str::from_utf8(line).expect("UTF-8");
            if text.contains("\"event\":\"trail.head\"") && number > from && signer.is_some() {
                made = made.head();
                continue;
            }
            let end = text.rfind(",\"seq\":").expect("a record");
            let body = &text[..end];
            let body = if number == from { change(number, body) } else { Some(body.to_owned()) };
            let Some(mut body) = body else { continue };
            if text.contains("\"event\":\"trail.head\"") && number > from {
                // The number and digest can be put right; the signature cannot.
                let at = body.find("\"covers\"").expect("a head");
                let key = body.find(",\"head_records\"").expect("a head");
                let (seq, record) = (made.chain.next() - 1, made.chain.last());
                body = format!("{}\"covers\":{seq},\"head\":\"{record}\"{}", &body[..at], &body[key..]);
            }
            let mut line = format!("{body}}}\n").into_bytes();
            made.chain.link(&mut line);
            made.lines.push(line);
        }
        made
    }
}

fn signer() -> (Signer, Keys) {
    let signer = Signer::new(PrivateKey::generate(Algorithm::Ed25519)).expect("a signer");
    let mut keys = Keys::default();
    keys.add(signer.fingerprint());
    (signer, keys)
}

fn look(bytes: &[u8], keys: &Keys) -> Report {
    verify_inputs(vec![("trail", bytes)], keys, &mut Anchors::default()).expect("read")
}

fn look_anchored(bytes: &[u8], keys: &Keys, seen: &[u8]) -> Report {
    let mut anchors = Anchors::default();
    anchors.read("other", seen).expect("read");
    verify_inputs(vec![("trail", bytes)], keys, &mut anchors).expect("read")
}

/// What was found: of what kind, in which line.
fn found(report: &Report) -> Vec<(Kind, u64)> {
    report.findings.iter().map(|finding| (finding.kind, finding.line)).collect()
}

fn ten(signer: Option<&Signer>) -> Made {
    Made::begin(signer).forwards(4).head().forwards(4).head().stop()
}

fn offset(lines: &[Vec<u8>], line: usize) -> u64 {
    lines[..line].iter().map(|line| line.len() as u64).sum()
}

#[test]
fn an_untouched_trail_is_intact_and_its_ranges_are_told_apart() {
    let (signer, keys) = signer();
    let made = ten(Some(&signer)).forwards(3);
    let report =
        look_anchored(&made.bytes(), &keys, &Made { anchors: made.anchors[..1].to_vec(), ..made.clone() }.seen());
    assert_eq!(found(&report), [], "{report:?}");
    assert!(report.intact);
    let [trail] = &report.trails[..] else { panic!("{report:?}") };
    assert_eq!((trail.first, trail.last, trail.stopped, trail.side.as_deref()), (0, 14, false, Some("agent")));
    let by = signer.fingerprint().to_string();
    assert_eq!(trail.signed, [Range { first: 0, last: 9, by, known: true }]);
    assert_eq!(trail.anchored, [Range { first: 0, last: 4, by: "other".to_owned(), known: true }]);
    assert_eq!((trail.unsigned_tail, trail.unanchored_tail), (5, 10));
    let stopped = look(&ten(Some(&signer)).bytes(), &keys);
    assert!(stopped.intact && stopped.trails[0].stopped, "{stopped:?}");
    assert!(look(&ten(None).bytes(), &Keys::default()).intact);
    let none = look(b"", &Keys::default());
    assert!(none.intact && none.trails.is_empty());
}

/// Every byte of every record is changed in several ways; the record that was changed is named, wherever anything follows it.
#[test]
fn every_flipped_byte_is_found_at_its_record() {
    let (signer, keys) = signer();
    let made = ten(Some(&signer));
    let lines = &made.lines;
    let bytes = made.bytes();
    for (number, line) in lines.iter().enumerate().take(lines.len() - 1) {
        let start = usize::try_from(offset(lines, number)).expect("small");
        for at in 0..line.len() {
            for change in [|byte: u8| byte ^ 1, |byte: u8| byte ^ 0x80, |_: u8| b'\n', |_: u8| b'"', |_: u8| b'7'] {
                let mut tampered = bytes.clone();
                tampered[start + at] = change(tampered[start + at]);
                if tampered == bytes {
                    continue;
                }
                let report = look(&tampered, &keys);
                let shown = String::from_utf8_lossy(&tampered[start..start + line.len()]).into_owned();
                assert!(!report.intact, "record {number} byte {at}: {shown}");
                let first = report.findings.first().expect("a finding");
                // Where a line is cut in two, or joined with the next, the place is that of the piece.
                assert_eq!(
                    (first.line, first.offset),
                    (number as u64 + 1, start as u64),
                    "byte {at}: {shown} {report:#?}"
                );
            }
        }
    }
}

/// The same of the last record, which nothing names: it shows by what others have kept.
#[test]
fn a_change_of_the_last_record_shows_by_its_form_or_by_what_others_have_kept() {
    let (signer, keys) = signer();
    let made = Made::begin(Some(&signer)).forwards(3).head();
    let last = made.lines.len() - 1;
    let start = usize::try_from(offset(&made.lines, last)).expect("small");
    let copy = made.lines[last].clone();
    for at in 0..copy.len() {
        let mut tampered = made.bytes();
        tampered[start + at] ^= 1;
        let report = look_anchored(&tampered, &keys, &copy);
        assert!(!report.intact, "byte {at}: {report:#?}");
        assert!(report.findings.iter().any(|finding| finding.line == last as u64 + 1), "byte {at}: {report:#?}");
    }
}

#[test]
fn every_record_taken_out_is_found_where_it_was() {
    let (signer, keys) = signer();
    let made = ten(Some(&signer));
    for count in 1..3 {
        for number in 0..made.lines.len() - count - 1 {
            let mut lines = made.lines.clone();
            lines.drain(number..number + count);
            let report = look(&lines.concat(), &keys);
            let first = report.findings.first().unwrap_or_else(|| panic!("{count} at {number}: {report:#?}"));
            assert_eq!(
                (first.line, first.offset),
                (number as u64 + 1, offset(&lines, number)),
                "{count} at {number}: {report:#?}"
            );
            let kind = if number == 0 { Kind::BeginsInside } else { Kind::Missing };
            assert_eq!(first.kind, kind, "{report:#?}");
            if number > 0 {
                assert_eq!((first.seq, first.last_seq), (Some(number as u64), Some((number + count - 1) as u64)));
            }
        }
    }
}

#[test]
fn every_cut_at_the_end_is_found_by_what_others_have_kept_and_inside_a_record_without() {
    let (signer, keys) = signer();
    let made = ten(Some(&signer));
    let (bytes, seen) = (made.bytes(), made.seen());
    let heads: Vec<usize> =
        (0..made.lines.len()).filter(|at| made.lines[*at].windows(10).any(|w| w == b"trail.head")).collect();
    for at in 0..bytes.len() {
        let report = look_anchored(&bytes[..at], &keys, &seen);
        let whole = bytes[..at].iter().filter(|byte| **byte == b'\n').count();
        let kinds: Vec<_> = report.findings.iter().map(|finding| finding.kind).collect();
        if at > 0 && bytes[at - 1] != b'\n' {
            assert!(kinds.contains(&Kind::Torn), "cut at byte {at}: {report:#?}");
            let torn = report.findings.iter().find(|finding| finding.kind == Kind::Torn).expect("torn");
            assert_eq!((torn.line, torn.offset), (whole as u64 + 1, offset(&made.lines, whole)));
        }
        if whole <= heads[1] {
            assert!(kinds.contains(&Kind::Truncated), "cut at byte {at}: {report:#?}");
        }
    }
}

#[test]
fn a_trail_without_a_record_is_held_to_the_keys_and_anchors() {
    let (signer, keys) = signer();
    let seen = ten(Some(&signer)).seen();
    assert!(look(b"", &Keys::default()).intact);
    assert_eq!(found(&look(b"", &keys)), [(Kind::HeadMissing, 0)]);
    assert_eq!(found(&look_anchored(b"", &Keys::default(), &seen)), [(Kind::Truncated, 0)]);
}

#[test]
fn every_swap_every_move_and_every_repetition_is_found() {
    let (signer, keys) = signer();
    let made = ten(Some(&signer));
    let count = made.lines.len();
    for number in 1..count - 1 {
        let mut lines = made.lines.clone();
        lines.swap(number, number + 1);
        let report = look(&lines.concat(), &keys);
        let first = report.findings.first().unwrap_or_else(|| panic!("swap at {number}: {report:#?}"));
        assert!((number..=number + 2).contains(&usize::try_from(first.line).expect("small")), "{number}: {report:#?}");

        let mut lines = made.lines.clone();
        lines.insert(number, lines[number].clone());
        let report = look(&lines.concat(), &keys);
        assert_eq!(found(&report), [(Kind::Repeated, number as u64 + 2)], "{report:#?}");
    }
    for from in 1..count - 1 {
        for to in 1..count - 1 {
            let mut lines = made.lines.clone();
            let line = lines.remove(from);
            lines.insert(to, line);
            if lines == made.lines {
                continue;
            }
            let report = look(&lines.concat(), &keys);
            let first = report.findings.first().unwrap_or_else(|| panic!("{from} to {to}: {report:#?}"));
            let at = usize::try_from(first.line).expect("small");
            assert!((from.min(to)..=from.max(to) + 2).contains(&at), "{from} to {to}: {report:#?}");
        }
    }
    for from in 1..count - 3 {
        let mut lines = made.lines.clone();
        let again = lines[from..from + 3].to_vec();
        lines.splice(from + 3..from + 3, again);
        let report = look(&lines.concat(), &keys);
        assert_eq!(found(&report)[0], (Kind::Repeated, from as u64 + 4), "{report:#?}");
    }
}

#[test]
fn every_record_put_in_is_found_whatever_number_it_has() {
    let (signer, keys) = signer();
    let made = ten(Some(&signer));
    for number in 1..made.lines.len() - 2 {
        for (seq, prev) in [
            (number as u64, Link::of(&made.lines[number - 1])),
            (number as u64, Link::of(b"other")),
            (number as u64 + 1, Link::of(b"other")),
            (number as u64 + 7, Link::of(b"other")),
            (0, Link::of(b"other")),
            (u64::MAX, Link::of(b"other")),
        ] {
            let line =
                format!("{{\"v\":1,\"event\":\"forward.open\",\"seq\":{seq},\"prev\":\"{prev}\"}}\n").into_bytes();
            let mut lines = made.lines.clone();
            lines.insert(number, line);
            let report = look(&lines.concat(), &keys);
            let first = report.findings.first().unwrap_or_else(|| panic!("{seq} at {number}: {report:#?}"));
            assert_eq!(first.line, number as u64 + 1, "{seq} at {number}: {report:#?}");
        }
        for text in ["\n", "{}\n", "garbage\n", "{\"seq\":1}\n"] {
            let mut lines = made.lines.clone();
            lines.insert(number, text.as_bytes().to_vec());
            assert_eq!(found(&look(&lines.concat(), &keys)), [(Kind::Unreadable, number as u64 + 1)], "{text:?}");
        }
    }
}

#[test]
fn a_chain_made_anew_without_the_key_shows_by_the_signatures() {
    let (signer, keys) = signer();
    let made = ten(Some(&signer));
    let altered = |_: usize, body: &str| Some(body.replace("db:5432", "db:9999"));
    let removed = |_: usize, _: &str| None;
    for number in (1..5).chain(6..10) {
        for remade in [made.remade(number, altered, None), made.remade(number, removed, None)] {
            let report = look(&remade.bytes(), &keys);
            let heads: Vec<_> = report.findings.iter().filter(|finding| finding.kind == Kind::HeadForged).collect();
            assert_eq!(heads.len(), if number < 5 { 2 } else { 1 }, "{number}: {report:#?}");
            // Nothing that is altered is told as signed.
            assert!(report.trails[0].signed.iter().all(|range| range.last < number as u64), "{report:#?}");
            assert!(
                remade.lines.len() >= 10
                    && look(&remade.bytes(), &Keys::default())
                        .findings
                        .iter()
                        .all(|finding| finding.kind == Kind::HeadForged),
                "else nothing shows"
            );
        }
    }
    // With a key of somebody else's.
    let (other, _) = self::signer();
    let report = look(&made.remade(2, altered, Some(&other)).bytes(), &keys);
    assert!(report.findings.iter().all(|finding| matches!(finding.kind, Kind::HeadForeign | Kind::HeadMissing)));
    assert_eq!(report.findings.iter().filter(|finding| finding.kind == Kind::HeadForeign).count(), 2, "{report:#?}");
    // Without heads at all.
    let bare = Made::begin(None).forwards(8).stop();
    let report = look(&bare.bytes(), &keys);
    assert!(found(&report).iter().any(|(kind, _)| *kind == Kind::HeadMissing), "{report:#?}");
    // With heads that are not signed.
    let report = look(&ten(None).bytes(), &keys);
    assert!(found(&report).iter().any(|(kind, _)| *kind == Kind::HeadUnsigned), "{report:#?}");
    // Until heads are signed, which vouches for all that was before.
    let mut later = ten(None);
    later.add("trail.started", &format!("\"trail\":\"{}\"", later.trail));
    later.signer = Some(signer.clone());
    let report = look(&later.forwards(3).head().stop().bytes(), &keys);
    assert!(report.intact, "{report:#?}");
    // With heads up to a point, and much after it.
    let long = Made::begin(Some(&signer)).forwards(3).head().forwards(3).head().forwards(1_500);
    let report = look(&long.bytes(), &keys);
    assert_eq!(
        report.findings.iter().map(|finding| finding.kind).collect::<Vec<_>>(),
        [Kind::HeadMissing],
        "{report:#?}"
    );
    assert_eq!(report.findings[0].seq, Some(8));
}

#[test]
fn a_chain_made_anew_with_the_key_shows_by_what_others_have_kept_and_by_nothing_else() {
    let (signer, keys) = signer();
    let made = ten(Some(&signer));
    for number in (1..5).chain(6..10) {
        let remade = made.remade(number, |_, body| Some(body.replace("db:5432", "db:9999")), Some(&signer));
        assert!(look(&remade.bytes(), &keys).intact, "the key makes it whole");
        let report = look_anchored(&remade.bytes(), &keys, &made.seen());
        let kinds: Vec<_> = report.findings.iter().map(|finding| finding.kind).collect();
        assert_eq!(kinds, [Kind::Truncated], "{number}: {report:#?}");
        assert_eq!(report.findings[0].seq, Some(if number < 5 { 0 } else { 5 }), "from the last head that is there");
        // A copy of the heads knows where.
        let copy: Vec<u8> =
            made.lines.iter().filter(|line| line.windows(10).any(|w| w == b"trail.head")).flatten().copied().collect();
        let report = look_anchored(&remade.bytes(), &keys, &copy);
        let first = report.findings.first().expect("a finding");
        assert_eq!((first.kind, first.seq), (Kind::Rewritten, Some(if number < 5 { 4 } else { 9 })), "{report:#?}");
        assert!(first.text.contains(if number < 5 { "from its beginning" } else { "from record 6" }), "{}", first.text);
    }
}

#[test]
fn files_are_one_trail_and_what_is_missing_between_them_or_before_them_is_told_apart() {
    let (signer, keys) = signer();
    let dir = tempfile::tempdir().expect("a directory");
    let mut made = Made::begin(Some(&signer)).forwards(3).head();
    let mut cuts = vec![made.lines.len()];
    for _ in 0..2 {
        made.add("trail.continued", "\"trail\":\"000102030405060708090a0b0c0d0e0f\"");
        made = made.forwards(3).head();
        cuts.push(made.lines.len());
    }
    let made = made.stop();
    let parts = [&made.lines[..cuts[0]], &made.lines[cuts[0]..cuts[1]], &made.lines[cuts[1]..]];
    let paths: Vec<PathBuf> = ["c", "a", "b"].iter().map(|name| dir.path().join(name)).collect();
    for (path, part) in paths.iter().zip(parts) {
        std::fs::write(path, part.concat()).expect("written");
    }
    let look = |order: &[usize]| {
        let paths: Vec<_> = order.iter().map(|at| paths[*at].clone()).collect();
        let mut bytes = 0;
        let report = verify(&paths, &keys, &mut Anchors::default(), |more| bytes += more).expect("read");
        assert_eq!(bytes, paths.iter().map(|path| path.metadata().expect("a file").len()).sum::<u64>());
        report
    };
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let report = look(&order);
        assert!(report.intact && report.notes.is_empty(), "{report:#?}");
        assert_eq!((report.trails.len(), report.trails[0].last), (1, made.lines.len() as u64 - 1));
    }
    // As `trail.jsonl*` names them.
    let index = dir.path().join("a.index");
    std::fs::write(&index, [7; 24]).expect("written");
    let report = verify(&[&paths[..], std::slice::from_ref(&index)].concat(), &keys, &mut Anchors::default(), |_| {});
    assert!(report.expect("read").intact, "an index is no part of the trail");
    assert!(!verify(&[index], &keys, &mut Anchors::default(), |_| {}).expect("read").intact, "named alone, it is one");
    let late = look(&[2, 1]);
    assert!(late.intact, "{late:#?}");
    assert_eq!(late.notes.iter().map(|note| note.kind).collect::<Vec<_>>(), [Kind::BeginsLater]);
    let between = look(&[0, 2]);
    assert_eq!(found(&between), [(Kind::Missing, 1)], "{between:#?}");
    assert_eq!(between.findings[0].file, paths[2].display().to_string());
    // The first record of a later file is taken out.
    std::fs::write(&paths[1], parts[1][1..].concat()).expect("written");
    assert_eq!(found(&look(&[0, 1, 2])), [(Kind::Missing, 1)]);
    assert_eq!(found(&look(&[1, 2])), [(Kind::BeginsInside, 1)]);
    // No file begins with a head, whatever was taken out before it.
    std::fs::write(&paths[1], parts[1][parts[1].len() - 1..].concat()).expect("written");
    assert_eq!(found(&look(&[1, 2])), [(Kind::BeginsInside, 1)]);
}

#[test]
fn what_a_crash_has_torn_is_told_apart_by_what_the_next_start_says_of_it() {
    let (signer, keys) = signer();
    let torn = b"{\"v\":1,\"time\":\"2026-11-21T20:00:00.123Z\",\"event\":\"forw";
    let mut made = Made::begin(Some(&signer)).forwards(3);
    let at = made.lines.len();
    made.add("trail.recovered", &format!("\"forwards\":0,\"torn_at\":7,\"torn\":\"{}\"", Link::of(torn)));
    made.add("trail.started", &format!("\"trail\":\"{}\"", made.trail));
    let mut made = made.head().stop();
    made.lines.insert(at, [&torn[..], b"\n"].concat());
    let report = look(&made.bytes(), &keys);
    assert!(report.intact, "{report:#?}");
    assert_eq!(
        report.notes.iter().map(|note| (note.kind, note.line)).collect::<Vec<_>>(),
        [(Kind::Recovered, at as u64 + 1)]
    );
    made.lines[at] = b"{\"v\":1,\"time\":\"2026-11-21T20:00:00.124Z\",\"event\":\"forw\n".to_vec();
    assert_eq!(found(&look(&made.bytes(), &keys)), [(Kind::Unreadable, at as u64 + 1)]);
}

#[test]
fn a_line_that_a_crash_has_left_stands_for_no_record() {
    let (signer, keys) = signer();
    let torn = b"{\"v\":1,\"time\":\"2026-11-21T20:00:00.123Z\",\"event\":\"forw";
    let mut made = Made::begin(Some(&signer)).forwards(3);
    let at = made.lines.len();
    made.add("trail.started", &format!("\"trail\":\"{}\"", made.trail));
    made.add("trail.recovered", &format!("\"forwards\":0,\"torn_at\":7,\"torn\":\"{}\"", Link::of(torn)));
    let made = made.head().stop();
    // In the place of any record before it is told of, or beside one that was taken out.
    for out in 1..=at {
        for place in [out, at] {
            let mut lines = made.lines.clone();
            lines.remove(out);
            lines.insert(place, [&torn[..], b"\n"].concat());
            let report = look(&lines.concat(), &keys);
            let missing = report.findings.iter().find(|finding| finding.kind == Kind::Missing);
            let missing = missing.unwrap_or_else(|| panic!("{out} at {place}: {report:#?}"));
            assert_eq!((missing.seq, missing.last_seq), (Some(out as u64), Some(out as u64)), "{report:#?}");
        }
    }
}

#[test]
fn what_a_copy_has_lost_is_told_apart_by_what_the_trail_says_of_it() {
    let (signer, keys) = signer();
    for (lost, taken) in [(4, 4), (4, 5), (5, 4)] {
        let mut made = Made::begin(Some(&signer)).forwards(3).head().forwards(6);
        made.add("sink.works", &format!("\"sink\":\"siem\",\"lost\":{lost}"));
        let mut made = made.head().stop();
        made.lines.drain(6..6 + taken);
        let report = look(&made.bytes(), &keys);
        assert_eq!(report.intact, lost == taken, "{report:#?}");
        assert_eq!(report.notes.len(), usize::from(lost == taken), "{report:#?}");
    }
}

/// A file that was begun by a rotation says whose it is.
#[test]
fn what_another_sink_has_lost_accounts_for_nothing() {
    let (signer, keys) = signer();
    for (sink, intact) in [("siem", true), ("file", false)] {
        let mut made = Made::begin(Some(&signer)).head();
        let before = made.lines.len();
        made.add("trail.continued", &format!("\"trail\":\"{}\",\"sink\":\"{sink}\"", made.trail));
        let mut made = made.forwards(9);
        made.add("sink.works", "\"sink\":\"siem\",\"lost\":4");
        let mut made = made.head().stop();
        made.lines.drain(6..10);
        let report = look(&made.lines[before..].concat(), &keys);
        assert_eq!(report.intact, intact, "{sink}: {report:#?}");
    }
}

/// Of a file that no rotation has begun, the caller can say whose it is.
#[test]
fn what_another_sink_has_lost_accounts_for_nothing_where_it_is_said_whose_copy_it_is() {
    let (signer, keys) = signer();
    let mut made = Made::begin(Some(&signer)).forwards(9);
    made.add("sink.works", "\"sink\":\"siem\",\"lost\":4");
    let mut made = made.head().stop();
    made.lines.drain(3..7);
    for (sink, kinds) in [(None, vec![]), (Some("siem"), vec![]), (Some("file"), vec![Kind::Missing])] {
        let mut anchors = Anchors::default();
        if let Some(sink) = sink {
            anchors.copy_of(sink);
        }
        let report = verify_inputs(vec![("trail", &made.bytes()[..])], &keys, &mut anchors).expect("read");
        assert_eq!(
            report.findings.iter().map(|finding| finding.kind).collect::<Vec<_>>(),
            kinds,
            "{sink:?} {report:#?}"
        );
    }
}

/// What a copy has lost does not excuse what is cut off elsewhere.
#[test]
fn anchors_count_where_a_copy_has_lost_nothing() {
    let (signer, keys) = signer();
    let mut made = Made::begin(Some(&signer)).forwards(9);
    made.add("sink.works", "\"sink\":\"siem\",\"lost\":4");
    let mut made = made.head();
    let cut = made.lines.len() - 4;
    made = made.forwards(3).head();
    let seen = made.seen();
    made.lines.drain(3..7);
    assert!(look_anchored(&made.bytes(), &keys, &seen).intact);
    made.lines.truncate(cut);
    let report = look_anchored(&made.bytes(), &keys, &seen);
    assert_eq!(
        report.findings.iter().map(|finding| finding.kind).collect::<Vec<_>>(),
        [Kind::Truncated],
        "{report:#?}"
    );
}

#[test]
fn countersignatures_in_the_trail_itself_are_held_against_its_heads() {
    let ((signer, _), (peer, _)) = (signer(), signer());
    let countersigned = |anchor: Anchor, time: &str, by: &Signer| {
        let seen = Countersigned { anchor, time_ms: fields::milliseconds(time).expect("a time") };
        let seal = by.countersign(&seen).expect("signed");
        format!(
            "\"digest\":\"{anchor}\",\"covers\":4,\"signed\":\"{time}\",\"key\":\"{}\",\"signature\":\"{}\"",
            seal.key, seal.signature
        )
    };
    let time = "2026-11-21T20:00:00.123Z";
    let made = Made::begin(Some(&signer)).forwards(4).head();
    let anchor = made.anchors[0];
    let mut good = made.clone();
    good.add("trail.countersigned", &countersigned(anchor, time, &peer));
    let report = look(&good.bytes(), &Keys::default());
    assert!(report.intact, "{report:#?}");
    let by = peer.fingerprint().to_string();
    assert_eq!(report.trails[0].anchored, [Range { first: 0, last: 4, by, known: false }]);
    for members in [
        countersigned(anchor, time, &peer).replace("20:00:00.123Z", "20:00:00.124Z"),
        countersigned(Anchor::from([7; 32]), time, &peer),
        countersigned(anchor, time, &peer).replace("\"covers\":4", "\"covers\":3"),
        countersigned(anchor, time, &peer).replace(&peer.fingerprint().to_string(), &signer.fingerprint().to_string()),
    ] {
        let mut bad = made.clone();
        bad.add("trail.countersigned", &members);
        assert_eq!(found(&look(&bad.bytes(), &Keys::default())), [(Kind::CountersignatureForged, 7)], "{members}");
    }
    // A copy that has lost the head is not told that it was forged.
    let mut copy = good;
    copy.add("sink.works", "\"sink\":\"siem\",\"lost\":1");
    let mut copy = copy.forwards(2);
    copy.lines.remove(5);
    let report = look(&copy.bytes(), &Keys::default());
    assert!(report.intact, "{report:#?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever is done to the bytes between the first and the last head shows.
    #[test]
    fn no_edit_between_head_and_head_goes_unnoticed(
        at in any::<prop::sample::Index>(),
        taken in 0_usize..400,
        put in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let (signer, keys) = {
            // The same one for all cases: making keys is not what is tried here.
            static SIGNER: std::sync::OnceLock<Signer> = std::sync::OnceLock::new();
            let signer = SIGNER.get_or_init(|| signer().0).clone();
            let mut keys = Keys::default();
            keys.add(signer.fingerprint());
            (signer, keys)
        };
        let made = ten(Some(&signer));
        let bytes = made.bytes();
        let last = usize::try_from(offset(&made.lines, made.lines.len() - 1)).expect("small");
        let from = at.index(last);
        let mut tampered = bytes.clone();
        tampered.splice(from..(from + taken).min(last), put);
        let report = look(&tampered, &keys);
        prop_assert_eq!(report.intact, tampered == bytes, "{:#?}", report);
    }
}

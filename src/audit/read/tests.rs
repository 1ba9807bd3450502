//! Tests of the module above.

use std::fs::{self, OpenOptions};
use std::io::Write as _;

use jiff::Timestamp;
use tempfile::TempDir;

use super::filter::{Outcome, What};
use super::index::Entry;
use super::joined::{Joiner, Row};
use super::*;
use crate::audit::chain::{Chain, TrailId};
use crate::limits::{TRAIL_READ, TRAIL_RECORD_MAX};

/// A trail as it is written, record by record, with its index.
struct Written {
    folder: TempDir,
    chain: Chain,
    entries: Vec<Entry>,
    bounds: Option<(i64, i64)>,
    every: u64,
}

impl Written {
    fn new() -> Self {
        let trail = TrailId::parse("000102030405060708090a0b0c0d0e0f").expect("an id");
        let folder = tempfile::tempdir().expect("a folder");
        Self { folder, chain: Chain::begin(&trail), entries: Vec::new(), bounds: None, every: 400 }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("agent.jsonl")
    }

    fn raw(&self, bytes: &[u8]) {
        let mut file = OpenOptions::new().append(true).create(true).open(self.path()).expect("a file");
        file.write_all(bytes).expect("writes");
    }

    fn length(&self) -> u64 {
        fs::metadata(self.path()).map_or(0, |metadata| metadata.len())
    }

    /// Writes a record of this second with these members, and an entry of the index where one is due.
    fn record(&mut self, second: i64, event: &str, members: &str) {
        let time = at(second);
        let comma = if members.is_empty() { "" } else { "," };
        let mut line =
            format!("{{\"v\":1,\"time\":\"{time:.3}\",\"event\":\"{event}\",\"side\":\"agent\"{comma}{members}}}\n")
                .into_bytes();
        self.chain.link(&mut line);
        self.raw(&line);
        let ms = time.as_millisecond();
        let (earliest, latest) = self.bounds.unwrap_or((ms, ms));
        self.bounds = Some((earliest.min(ms), latest.max(ms)));
        let end = self.length();
        if end - self.entries.last().map_or(0, |entry| entry.end) >= self.every {
            let (earliest, latest) = self.bounds.take().expect("times");
            self.entries.push(Entry { end, earliest, latest });
        }
    }

    fn forward(&mut self, second: i64, event: &str, id: &str, members: &str) {
        let comma = if members.is_empty() { "" } else { "," };
        self.record(second, event, &format!("\"forward\":\"{id}\",\"target\":\"db:5432\"{comma}{members}"));
    }

    fn write_index(&self) {
        self.write_as_index(&self.entries);
    }

    fn write_as_index(&self, entries: &[Entry]) {
        let bytes: Vec<u8> = entries.iter().flat_map(Entry::encode).collect();
        fs::write(files::index_of(&self.path()), bytes).expect("writes");
    }

    /// What it was becomes a rotated file, with its index; a new one is begun by the next record.
    fn rotate(&mut self, stamp: &str) -> PathBuf {
        let to = self.folder.path().join(format!("agent.jsonl.{stamp}-{:012}", self.chain.next()));
        fs::rename(self.path(), &to).expect("renames");
        if files::index_of(&self.path()).exists() {
            fs::rename(files::index_of(&self.path()), files::index_of(&to)).expect("renames");
        }
        self.entries.clear();
        self.bounds = None;
        to
    }

    fn found(&self, filter: &Filter) -> (Vec<String>, Tally) {
        let parts = files::expand(&[self.path()]).expect("files");
        let mut heard = Heard::default();
        let tally = scan(&parts, filter, &mut heard).expect("reads");
        (heard.ids, tally)
    }

    fn ids(&self, filter: &Filter) -> Vec<String> {
        self.found(filter).0
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_795_000_000 + second).expect("a time")
}

fn between(since: i64, until: i64) -> Filter {
    Filter::default().between(Some(at(since)), Some(at(until)))
}

/// Ids of forwards, or events of what is none.
#[derive(Default)]
struct Heard {
    ids: Vec<String>,
    passed: u64,
    stop_after: Option<usize>,
}

impl Hearer for Heard {
    fn found(&mut self, line: &[u8], record: Record) -> ControlFlow<()> {
        assert!(line.ends_with(b"}\n"));
        self.ids.push(record.forward.unwrap_or(record.event));
        if self.stop_after == Some(self.ids.len()) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn passed(&mut self, bytes: u64) {
        self.passed += bytes;
    }
}

#[test]
fn hostile_lines_are_counted_and_passed_over() {
    let deep = format!("{{\"time\":{}1{}}}\n", "[".repeat(10_000), "]".repeat(10_000));
    let time = "\"time\":\"2026-11-21T20:00:00.000Z\",\"event\":\"forward.open\",\"side\":\"agent\"";
    let hostile: Vec<Vec<u8>> = vec![
        b"\n".to_vec(),
        b"no JSON\n".to_vec(),
        b"{}\n".to_vec(),
        b"[1]\n".to_vec(),
        b"{\"v\":1,\"time\":\"2026-11-\n".to_vec(),
        b"\0\0\0\0\n".to_vec(),
        b"{\"time\":\"\xff\xfe\"}\n".to_vec(),
        format!("{{{time},\"forward\":\"f\0\"}}\n").into_bytes(),
        format!("{{{time},\"forward\":7}}\n").into_bytes(),
        format!("{{{time},\"forward\":\"a\",\"forward\":\"b\"}}\n").into_bytes(),
        format!("{{{time},\"to_target\":-1}}\n").into_bytes(),
        format!("{{{time}}}{{{time}}}\n").into_bytes(),
        deep.into_bytes(),
        format!("{{{time},\"x\":\"{}\"}}\n", "x".repeat(TRAIL_RECORD_MAX)).into_bytes(),
        format!("{{{time},\"x\":\"{}\"}}\n", "x".repeat(2 * TRAIL_READ)).into_bytes(),
    ];
    let mut trail = Written::new();
    trail.forward(0, "forward.open", "first", "");
    let bad_from = trail.length();
    for line in &hostile {
        trail.raw(line);
        trail.forward(1, "forward.open", "between", "");
    }
    trail.raw(b"{\"v\":1,\"time\":\"2026-11-");
    let (ids, tally) = trail.found(&Filter::default());
    assert_eq!(ids.len(), 1 + hostile.len());
    assert_eq!(tally.unreadable, hostile.len() as u64);
    assert_eq!(tally.first_unreadable, Some((trail.path(), bad_from)));
    assert!(tally.torn);

    // The same from the end.
    let parts = files::expand(&[trail.path()]).expect("files");
    let (records, tally) = last(&parts, &Filter::default(), 1_000).expect("reads");
    assert_eq!(records.len(), 1 + hostile.len());
    assert_eq!(tally.unreadable, hostile.len() as u64);
    assert_eq!(tally.first_unreadable, Some((trail.path(), bad_from)));
    assert_eq!(records[0].1.forward.as_deref(), Some("first"));
}

#[test]
fn every_demand_chooses() {
    let mut trail = Written::new();
    trail.record(0, "link.up", "\"organisation\":\"acme\",\"agent\":\"prod-eu\",\"client\":\"192.0.2.1:4711\"");
    trail.record(
        10,
        "forward.open",
        "\"forward\":\"f1\",\"peer_forward\":\"g1\",\"organisation\":\"acme\",\"agent\":\"prod-eu\",\"principal\":\"alice\",\
         \"key\":\"SHA256:aaa\",\"client\":\"[2001:db8::1]:99\",\"target\":\"Orders.DB.internal:5432\"",
    );
    trail.record(
        20,
        "forward.denied",
        "\"forward\":\"f2\",\"organisation\":\"acme\",\"agent\":\"prod-us\",\"principal\":\"alice-2\",\
         \"asserted_by\":\"SHA256:aaa\",\"target\":\"[2001:db8::5]:443\",\"reason\":\"no_rule\",\"detail\":\"\\\"alice\\\"\"",
    );
    trail.record(
        30,
        "forward.ended",
        "\"forward\":\"f1\",\"organisation\":\"other\",\"agent\":\"prod-eu\",\"principal\":\"bob\",\"target\":\"db:1\",\
         \"reason\":\"eof\",\"duration_ms\":20000,\"to_target\":1,\"from_target\":2",
    );
    trail.record(40, "auth.refused", "\"reason\":\"unknown_key\",\"client_certificate\":\"missing\"");
    let all: &[&str] = &["link.up", "f1", "f2", "f1", "auth.refused"];
    let demand = |what, pattern: &str| Filter::default().demand(what, pattern);
    for (name, filter, ids) in [
        ("nothing", Filter::default(), all),
        ("a principal", demand(What::Principal, "alice"), &["f1"]),
        ("a pattern", demand(What::Principal, "ali*"), &["f1", "f2"]),
        ("no one", demand(What::Principal, "carol"), &[]),
        ("an organisation", demand(What::Organisation, "other"), &["f1"]),
        ("an agent", demand(What::Agent, "prod-eu"), &["link.up", "f1", "f1"]),
        ("its organisation", demand(What::Agent, "acme/prod-eu"), &["link.up", "f1"]),
        ("both patterns", demand(What::Agent, "*/prod-*"), &["link.up", "f1", "f2", "f1"]),
        ("a host", demand(What::Target, "orders.db.internal"), &["f1"]),
        ("host and port", demand(What::Target, "ORDERS.db.internal:5432"), &["f1"]),
        ("another port", demand(What::Target, "orders.db.internal:5433"), &[]),
        ("hosts", demand(What::Target, "*.internal"), &["f1"]),
        ("a port", demand(What::Target, "*:443"), &["f2"]),
        ("an address", demand(What::Target, "2001:db8::5"), &["f2"]),
        ("a key", demand(What::Key, "SHA256:aaa"), &["f1", "f2"]),
        ("a certificate", demand(What::Key, "missing"), &["auth.refused"]),
        ("a forward", demand(What::Forward, "f2"), &["f2"]),
        ("the other side's id", demand(What::Forward, "g1"), &["f1"]),
        ("an event", demand(What::Event, "auth.refused"), &["auth.refused"]),
        ("events", demand(What::Event, "forward.*"), &["f1", "f2", "f1"]),
        ("a side", demand(What::Side, "agent"), all),
        ("the other side", demand(What::Side, "gateway"), &[]),
        ("a client", demand(What::Client, "192.0.2.1"), &["link.up"]),
        ("its port", demand(What::Client, "192.0.2.1:4711"), &["link.up"]),
        ("over IPv6", demand(What::Client, "2001:db8::1"), &["f1"]),
        ("a reason", demand(What::Reason, "no_rule"), &["f2"]),
        ("two demands", demand(What::Principal, "alice*").demand(What::Reason, "no_rule"), &["f2"]),
        ("allowed", Filter::default().outcomes(vec![Outcome::Allowed]), &["f1", "f1"]),
        ("denied", Filter::default().outcomes(vec![Outcome::Denied]), &["f2"]),
        ("two outcomes", Filter::default().outcomes(vec![Outcome::Ended, Outcome::Refused]), &["f1", "auth.refused"]),
        ("since", Filter::default().between(Some(at(20)), None), &["f2", "f1", "auth.refused"]),
        ("until", Filter::default().between(None, Some(at(20))), &["link.up", "f1"]),
        ("between", between(10, 30), &["f1", "f2"]),
        ("quotes", demand(What::Principal, "a\"b"), &[]),
    ] {
        assert_eq!(trail.ids(&filter), ids, "{name}");
    }
}

#[test]
fn an_index_saves_reading_and_changes_nothing() {
    let mut trail = Written::new();
    for second in 0..200 {
        trail.forward(second, "forward.open", &format!("f{second}"), "");
    }
    let wanted = || between(100, 103);
    let ids = ["f100", "f101", "f102"];
    assert_eq!(trail.ids(&wanted()), ids);
    // Spoilt where nothing is asked for: if it is met, then the index was not used.
    let mut bytes = fs::read(trail.path()).expect("reads");
    let spoilt = bytes.windows(4).position(|part| part == b"\"f7\"").expect("there");
    bytes[spoilt - 20] = b'\n';
    fs::write(trail.path(), bytes).expect("writes");
    assert_eq!(trail.found(&wanted()).1.unreadable, 2);
    trail.write_index();
    assert_eq!(trail.found(&wanted()), (ids.map(str::to_owned).to_vec(), Tally::default()));
    // What came after the index is read, too.
    trail.forward(101, "forward.open", "late", "");
    assert_eq!(trail.ids(&wanted()), ["f100", "f101", "f102", "late"]);

    // Everything is passed, whether read or not.
    let parts = files::expand(&[trail.path()]).expect("files");
    let mut heard = Heard::default();
    scan(&parts, &wanted(), &mut heard).expect("reads");
    assert_eq!(heard.passed, trail.length());
    // Whoever has heard enough hears no more.
    let mut heard = Heard { stop_after: Some(2), ..Heard::default() };
    scan(&parts, &wanted(), &mut heard).expect("reads");
    assert_eq!(heard.ids, ["f100", "f101"]);
}

#[test]
fn a_clock_that_jumps_hides_nothing() {
    let mut trail = Written::new();
    let mut wanted = Vec::new();
    for turn in 0..6 {
        // Back by an hour, every time.
        for second in 0..50 {
            let second = second * 100 - turn * 3_600;
            let id = format!("t{turn}s{second}");
            if (0..1_000).contains(&second) {
                wanted.push(id.clone());
            }
            trail.forward(second, "forward.open", &id, "");
        }
    }
    assert!(wanted.len() >= 20);
    assert_eq!(trail.ids(&between(0, 1_000)), wanted);
    trail.write_index();
    assert_eq!(trail.ids(&between(0, 1_000)), wanted);
    assert_eq!(trail.ids(&between(100_000, 100_001)), Vec::<String>::new());
    // Bounds of all up to each entry are only less sharp.
    let (mut earliest, mut latest) = (i64::MAX, i64::MIN);
    let so_far: Vec<Entry> = trail
        .entries
        .iter()
        .map(|entry| {
            (earliest, latest) = (earliest.min(entry.earliest), latest.max(entry.latest));
            Entry { end: entry.end, earliest, latest }
        })
        .collect();
    trail.write_as_index(&so_far);
    assert_eq!(trail.ids(&between(0, 1_000)), wanted);
}

#[test]
fn an_index_that_does_not_fit_is_not_used() {
    let mut trail = Written::new();
    for second in 0..100 {
        trail.forward(second, "forward.open", &format!("f{second}"), "");
    }
    let ids: Vec<String> = (40..50).map(|second| format!("f{second}")).collect();
    let good = trail.entries.clone();
    let shifted = |by: i64| -> Vec<Entry> {
        good.iter().map(|entry| Entry { earliest: entry.earliest + by, latest: entry.latest + by, ..*entry }).collect()
    };
    let moved = |by: u64| -> Vec<Entry> { good.iter().map(|entry| Entry { end: entry.end + by, ..*entry }).collect() };
    let reversed: Vec<Entry> = good.iter().rev().copied().collect();
    for (name, entries) in [
        ("empty", Vec::new()),
        ("half", good[..good.len() / 2].to_vec()),
        ("of another time", shifted(-3_600_000)),
        ("ends within lines", moved(1)),
        ("longer than the file", moved(trail.length())),
        ("in no order", reversed),
        ("twice", good.iter().flat_map(|entry| [*entry, *entry]).collect()),
        (
            "bounds the wrong way round",
            good.iter().map(|e| Entry { earliest: e.latest, latest: e.earliest - 1, ..*e }).collect(),
        ),
    ] {
        trail.write_as_index(&entries);
        assert_eq!(trail.ids(&between(40, 50)), ids, "{name}");
    }
    // A last entry that is being written.
    trail.write_index();
    let index = files::index_of(&trail.path());
    let bytes = fs::read(&index).expect("reads");
    fs::write(&index, &bytes[..bytes.len() - 5]).expect("writes");
    assert_eq!(trail.ids(&between(40, 50)), ids);
    // The file was cut and begun anew.
    let kept = fs::read(trail.path()).expect("reads");
    fs::write(trail.path(), &kept[kept.len() / 2..]).expect("writes");
    assert!(trail.ids(&between(90, 100)).len() == 10);
}

#[test]
fn rotated_files_are_read_in_the_order_of_their_records() {
    let mut trail = Written::new();
    trail.forward(0, "forward.open", "one", "");
    // The clock was set back between the two.
    let first = trail.rotate("20261121T210000Z");
    trail.forward(1, "forward.open", "two", "");
    trail.write_index();
    let second = trail.rotate("20261121T200000Z");
    trail.forward(2, "forward.open", "three", "");
    for name in
        ["agent.jsonl.old", "agent.jsonl.20261121T200000Z-1", "agent.jsonl.bak-000000000000", "agent.jsonl.index"]
    {
        fs::write(trail.folder.path().join(name), "not a part of it\n").expect("writes");
    }
    assert_eq!(trail.ids(&Filter::default()), ["one", "two", "three"]);
    let paths = |named: &[&PathBuf]| -> Vec<PathBuf> {
        let named: Vec<PathBuf> = named.iter().map(|path| (*path).clone()).collect();
        files::expand(&named).expect("files").into_iter().map(|part| part.path).collect()
    };
    let path = trail.path();
    let index = files::index_of(&path);
    assert_eq!(paths(&[&path]), [first.clone(), second.clone(), path.clone()]);
    assert_eq!(paths(&[&second]), std::slice::from_ref(&second));
    // As a shell's `agent.jsonl*` gives them.
    assert_eq!(paths(&[&path, &second, &first, &index, &path]), [first.clone(), second.clone(), path.clone()]);
    fs::remove_file(&path).expect("removes");
    assert_eq!(paths(&[&path]), [first, second]);

    let parts = files::expand(&[path]).expect("files");
    let (records, _) = last(&parts, &Filter::default(), 5).expect("reads");
    assert_eq!(
        records.iter().map(|(_, record)| record.forward.as_deref().unwrap_or("")).collect::<Vec<_>>(),
        ["one", "two"]
    );
}

#[test]
fn what_is_not_there_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let absent = folder.path().join("agent.jsonl");
    assert!(matches!(files::expand(std::slice::from_ref(&absent)), Err(ReadError::Absent { .. })));
    assert!(matches!(files::expand(&[folder.path().to_owned()]), Err(ReadError::Directory { .. })));
    assert!(matches!(Follow::at_end(&absent), Err(ReadError::Absent { .. })));
    assert!(matches!(Follow::at_end(folder.path()), Err(ReadError::Directory { .. })));
}

#[test]
fn the_last_are_those_that_the_file_ends_with() {
    let mut trail = Written::new();
    for second in 0..3_000 {
        trail.forward(
            second,
            "forward.open",
            &format!("f{second}"),
            if second % 2 == 0 { "\"principal\":\"alice\"" } else { "" },
        );
    }
    let parts = files::expand(&[trail.path()]).expect("files");
    let ids = |filter: &Filter, count| -> Vec<String> {
        let (records, tally) = last(&parts, filter, count).expect("reads");
        assert_eq!(tally, Tally::default());
        records.into_iter().map(|(_, record)| record.forward.unwrap_or_default()).collect()
    };
    assert_eq!(ids(&Filter::default(), 3), ["f2997", "f2998", "f2999"]);
    assert_eq!(ids(&Filter::default().demand(What::Principal, "alice"), 2), ["f2996", "f2998"]);
    assert_eq!(ids(&Filter::default(), 0), Vec::<String>::new());
    assert_eq!(ids(&Filter::default(), 10_000).len(), 3_000);
}

#[test]
fn who_follows_misses_nothing_over_rotations() {
    let mut trail = Written::new();
    trail.forward(0, "forward.open", "before", "");
    trail.raw(b"{\"v\":1,");
    let mut follow = Follow::at_end(&trail.path()).expect("follows");
    let mut heard = Heard::default();
    let mut look = |follow: &mut Follow| {
        assert!(follow.look(&Filter::default(), &mut heard).expect("reads").is_continue());
        std::mem::take(&mut heard.ids)
    };
    assert_eq!(look(&mut follow), Vec::<String>::new());
    // The rest of the line, and more.
    trail.raw(b"\"time\":\"2026-11-21T20:00:00.000Z\",\"event\":\"link.up\",\"side\":\"agent\"}\n");
    trail.forward(1, "forward.open", "one", "");
    assert_eq!(look(&mut follow), ["link.up", "one"]);
    // Two rotations between two looks, and nothing is left out.
    trail.forward(2, "forward.open", "two", "");
    trail.rotate("20261121T200000Z");
    trail.forward(3, "forward.open", "three", "");
    trail.rotate("20261121T200001Z");
    assert_eq!(look(&mut follow), ["two", "three"], "before there is another file");
    trail.forward(4, "forward.open", "four", "");
    assert_eq!(look(&mut follow), ["four"]);
    // Rotated files are thrown away.
    let old = trail.rotate("20261121T200002Z");
    fs::remove_file(old).expect("removes");
    trail.forward(5, "forward.open", "five", "");
    assert_eq!(look(&mut follow), ["five"]);
    assert_eq!(follow.tally(), Tally::default());
    // Copied and cut.
    assert!(!follow.was_cut());
    fs::write(trail.path(), "").expect("cuts");
    trail.record(6, "link.down", "");
    assert_eq!(look(&mut follow), ["link.down"]);
    assert!(follow.was_cut());
    assert!(!follow.was_cut());
    // A line that never got its end before the rotation.
    trail.raw(b"{\"torn");
    assert_eq!(look(&mut follow), Vec::<String>::new());
    trail.rotate("20261121T200003Z");
    trail.forward(7, "forward.open", "seven", "");
    assert_eq!(look(&mut follow), ["seven"]);
    assert_eq!(follow.tally().unreadable, 1);
}

#[test]
fn forwards_are_joined() {
    let record = |second: i64, event: &str, forward: &str, more: &str| -> Record {
        let time = at(second);
        Record::read(
            format!(
                "{{\"time\":\"{time:.3}\",\"event\":\"{event}\",\"side\":\"agent\",\"forward\":\"{forward}\"{more}}}\n"
            )
            .as_bytes(),
        )
        .expect("a record")
    };
    let mut joiner = Joiner::default();
    let took = ",\"duration_ms\":4000";
    assert!(joiner.take(record(0, "forward.open", "a", "")).is_none());
    assert!(joiner.take(record(1, "forward.open", "b", "")).is_none());
    assert!(joiner.take(record(2, "forward.progress", "a", took)).is_none());
    let attempt = joiner.take(record(2, "forward.attempt", "b", "")).expect("by itself");
    assert_eq!(attempt.outcome, None);
    let told = |row: Row| (row.record.forward.unwrap_or_default(), row.outcome, row.began);
    let ended = joiner.take(record(9, "forward.ended", "a", ",\"duration_ms\":8000")).expect("whole");
    assert_eq!(told(ended), ("a".to_owned(), Some(Outcome::Ended), at(0)));
    // Its opening lies before what was read.
    let failed = joiner.take(record(10, "forward.failed", "c", took)).expect("whole");
    assert_eq!(told(failed), ("c".to_owned(), Some(Outcome::Failed), at(6)));
    let alone = joiner.take(record(11, "forward.denied", "d", "")).expect("whole");
    assert_eq!(told(alone), ("d".to_owned(), Some(Outcome::Denied), at(11)));
    // The same id again.
    let again = joiner.take(record(12, "forward.open", "b", "")).expect("the one before");
    assert_eq!(told(again), ("b".to_owned(), Some(Outcome::Open), at(1)));
    assert!(joiner.take(record(20, "forward.progress", "e", took)).is_none());
    let open: Vec<_> = joiner.finish().map(told).collect();
    let expected = [("b", 12), ("e", 16)].map(|(id, second)| (id.to_owned(), Some(Outcome::Open), at(second)));
    assert_eq!(open, expected);
    assert_eq!(joiner.finish().count(), 0);
}

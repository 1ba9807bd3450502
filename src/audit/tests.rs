//! Tests of the module above.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Condvar;

use serde_json::Value;

use super::chain::{Chain, Link, Linked, TrailId};
use super::lane::{Hand, Lane};
use super::record::*;
use super::sink::{NEVER, NoNetwork, Output, stream};
use super::*;
use crate::chain::Chain as Causes;
use crate::limits::{STRANGER_PERIOD, STRANGER_RECORDS, TRAIL_TEXT_MAX};

/// Until what a test waits for has come, also on a machine that does much else.
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(120);

#[tokio::test]
async fn nothing_opens_while_the_sink_fails() {
    let (trail, tape, tasks) = tape_trail().await;
    tape.set(|state| state.room = Some(0));
    let error = trail.open(opening("f1")).await.expect_err("must be refused");
    assert!(matches!(error, TrailError::Write(_)), "{error:?}");
    assert!(Causes(&error).to_string().contains("no room on this tape"), "{}", Causes(&error));
    assert!(matches!(trail.deny(opening("f2"), "no_rule", "").await, Err(TrailError::Write(_))));
    assert!(matches!(trail.note(Event::new(Kind::LinkUp)).await, Err(TrailError::Write(_))));
    assert!(trail.failed().borrow().is_some());
    assert_eq!(trail.live(), 0, "a refused opening must not stay live");

    tape.set(|state| state.room = None);
    trail.open(opening("f1")).await.expect("works again").finish(Counters::default().ended("closed"));
    assert!(trail.failed().borrow().is_none());
    stop(trail, tasks).await.expect("closes");
    let records = tape.records();
    // The first one had its number before anybody knew; the others got none.
    assert_eq!(
        events(&records),
        [
            "trail.started",
            "forward.open",
            "trail.resumed",
            "forward.abandoned",
            "forward.open",
            "forward.ended",
            "trail.stopped"
        ]
    );
    assert_eq!((&records[1]["forward"], &records[3]["forward"]), (&"f1".into(), &"f1".into()));
    assert_eq!(records[3]["reason"], "trail_failed");
    assert_eq!((&records[2]["lost"], &records[2]["sink"]), (&2.into(), &"tape".into()));
    assert_eq!(records.last().expect("a record")["forwards"], 0);
}

#[tokio::test]
async fn a_full_device_refuses() {
    let tasks = Tasks::new();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let error = Trail::begin(Side::Agent, &tasks, how(), || Ok(prepared(Side::Agent, stream(full)))).await;
    assert!(matches!(error, Err(StartError::Write(_))), "{error:?}");
    assert!(tasks.drain(TRAIL_PATIENCE).await);
}

#[tokio::test]
async fn what_was_written_of_a_line_is_completed_first() {
    let (trail, tape, tasks) = tape_trail().await;
    tape.set(|state| state.room = Some(40));
    let error = trail.open(opening("f1")).await;
    assert!(matches!(error, Err(TrailError::Write(_))), "{error:?}");
    // The rest of the line is owed in several steps.
    for room in [1, 2, 3] {
        tape.set(|state| state.room = Some(room));
        assert!(matches!(trail.note(Event::new(Kind::LinkUp)).await, Err(TrailError::Write(_))));
    }
    tape.set(|state| state.room = None);
    trail.note(Event::new(Kind::LinkDown)).await.expect("works again");
    stop(trail, tasks).await.expect("closes");
    let records = tape.records();
    assert_eq!(
        events(&records),
        ["trail.started", "forward.open", "trail.resumed", "forward.abandoned", "link.down", "trail.stopped"]
    );
    assert_eq!(records[3]["forward"], "f1");
    assert_eq!(records[3]["reason"], "trail_failed");
}

/// Wherever a disk is full, and however little of it comes free: the trail is whole in the end.
#[tokio::test]
async fn a_sink_that_fails_at_any_byte_gets_every_numbered_line_once() {
    for room in (0..700).step_by(23) {
        let (trail, tape, tasks) = tape_trail().await;
        let entry = trail.open(opening("f1")).await.expect("opens");
        tape.set(|state| state.room = Some(room));
        let opened = trail.open(opening("f2")).await;
        let noted = trail.note(Event::new(Kind::LinkUp)).await;
        entry.finish(Counters::default().ended("closed"));
        tape.set(|state| state.room = None);
        let written = tape.text().contains("\"forward\":\"f2\"");
        assert!(opened.is_err() || written, "{room}: accepted means written");
        assert!(noted.is_err() || opened.is_ok(), "{room}");
        drop(opened);
        stop(trail, tasks).await.expect("closes");
        // Which also says that the chain holds.
        let records = tape.records();
        let of = |forward: &str| records.iter().filter(|record| record["forward"] == forward).count();
        assert_eq!((of("f1"), of("f2")), (2, 2), "{room}: {records:#?}");
    }
}

#[tokio::test]
async fn endings_wait_for_the_sink_in_their_order() {
    let (trail, tape, tasks) = tape_trail().await;
    let mut entries = Vec::new();
    for number in 0..50 {
        entries.push(trail.open(opening(&format!("f{number}"))).await.expect("opens"));
    }
    tape.set(|state| state.room = Some(0));
    for entry in entries {
        entry.finish(Counters::default().ended("closed"));
    }
    assert!(matches!(trail.open(opening("late")).await, Err(TrailError::Write(_))));
    assert_eq!(tape.text().lines().count(), 51);
    tape.set(|state| state.room = None);
    // Nobody writes: the trail finds out by itself.
    let mut failed = trail.failed();
    within(failed.wait_for(Option::is_none)).await.expect("the trail lives");
    let records = tape.records();
    // Those that had their number when it failed come before the word on that.
    assert!(records[51..].iter().any(|record| record["event"] == "trail.resumed"));
    let ends = records[51..].iter().filter(|record| record["event"] == ENDED);
    let ended: Vec<_> = ends.map(|record| record["forward"].as_str().unwrap_or("")).collect();
    assert_eq!(ended, (0..50).map(|number| format!("f{number}")).collect::<Vec<_>>());
    stop(trail, tasks).await.expect("closes");
}

#[tokio::test]
async fn a_write_that_hangs_is_a_failure() {
    let (trail, tape, tasks) = tape_trail().await;
    tape.set(|state| state.hangs = true);
    let mut failed = trail.failed();
    let (opened, since) =
        tokio::join!(trail.open(opening("f1")), async { *within(failed.wait_for(Option::is_some)).await.unwrap() });
    assert!(matches!(opened, Err(TrailError::Slow)), "{opened:?}");
    assert!(since.is_some());
    tape.set(|state| state.hangs = false);
    within(failed.wait_for(Option::is_none)).await.expect("the trail lives");
    stop(trail, tasks).await.expect("closes");
    assert_eq!(events(&tape.records()), ["trail.started", "forward.open", "forward.abandoned", "trail.stopped"]);
}

#[tokio::test]
async fn a_closed_pipe_is_a_failure() {
    let tasks = Tasks::new();
    let (reader, pipe) = io::pipe().expect("a pipe");
    let file = fs::File::from(OwnedFd::from(pipe));
    let trail =
        Trail::begin(Side::Agent, &tasks, how(), || Ok(prepared(Side::Agent, stream(file)))).await.expect("starts");
    let entry = trail.open(opening("f1")).await.expect("opens");
    let mut line = String::new();
    let mut reader = BufReader::new(reader);
    reader.read_line(&mut line).expect("the first line");
    line.clear();
    reader.read_line(&mut line).expect("a line is there already");
    assert!(line.contains("forward.open"), "{line}");
    drop(reader);
    assert!(matches!(trail.open(opening("f2")).await, Err(TrailError::Write(_))));
    drop(entry);
    assert!(matches!(stop(trail, tasks).await, Err(TrailError::Write(_))));
}

#[tokio::test]
async fn live_duplicates_are_refused() {
    let (trail, tape, tasks) = tape_trail().await;
    let with_peer = |forward: &str, organisation: &str| Opening {
        peer_forward: Some("p".to_owned()),
        organisation: organisation.parse().ok(),
        ..opening(forward)
    };
    let entry = trail.open(with_peer("f1", "acme")).await.expect("opens");
    assert!(matches!(trail.open(opening("f1")).await, Err(TrailError::Duplicate)));
    assert!(matches!(trail.deny(opening("f1"), "no_rule", "").await, Err(TrailError::Duplicate)));
    assert!(matches!(trail.open(with_peer("f2", "acme")).await, Err(TrailError::Duplicate)));
    drop(trail.open(with_peer("f2", "other")).await.expect("another organisation's ids are its own"));
    for id in ["", "x\u{9b}", "y".repeat(FORWARD_ID_MAX + 1).as_str()] {
        assert!(matches!(trail.open(opening(id)).await, Err(TrailError::Id)), "{id:?}");
    }
    drop(entry);
    drop(trail.open(with_peer("f1", "acme")).await.expect("free again"));
    stop(trail, tasks).await.expect("closes");
    assert_eq!(tape.records().len(), 2 + 3 * 2);
}

#[tokio::test]
async fn a_cancelled_opening_leaves_no_open_forward() {
    let (trail, tape, tasks) = tape_trail().await;
    tape.set(|state| state.hangs = true);
    for number in 0..10 {
        let mut open = Box::pin(trail.open(opening(&format!("f{number}"))));
        // Polled once: the record is queued.
        assert!(std::future::poll_fn(|context| std::task::Poll::Ready(open.as_mut().poll(context))).await.is_pending());
    }
    assert_eq!(trail.live(), 0);
    tape.set(|state| state.hangs = false);
    stop(trail, tasks).await.expect("closes");
    let records = tape.records();
    for number in 0..10 {
        let forward = format!("f{number}");
        let own: Vec<_> = records.iter().filter(|record| record["forward"] == forward.as_str()).collect();
        assert_eq!(own.len(), 2, "{forward}");
        assert_eq!((&own[0]["event"], &own[1]["event"]), (&OPEN.into(), &ABANDONED.into()));
        assert_eq!(own[1]["reason"], "cancelled");
    }
    assert_eq!(records.last().expect("a record")["forwards"], 0);
}

#[tokio::test]
async fn a_refused_opening_takes_its_ending_with_it() {
    let (trail, tape, tasks) = tape_trail().await;
    tape.set(|state| state.hangs = true);
    // Two records in two writes: while the first hangs, an opening and its ending get into the second together.
    let first = trail.note(Event::new(Kind::LinkUp));
    let second = async {
        within(async {
            while lock(&trail.shared.writing).is_none() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let mut open = Box::pin(trail.open(opening("f1")));
        assert!(std::future::poll_fn(|context| std::task::Poll::Ready(open.as_mut().poll(context))).await.is_pending());
        drop(open);
        tape.set(|state| {
            state.room = Some(0);
            state.hangs = false;
        });
    };
    let (first, ()) = tokio::join!(first, second);
    assert!(matches!(first, Err(TrailError::Write(_))), "{first:?}");
    assert!(trail.note(Event::new(Kind::LinkDown)).await.is_err());
    tape.set(|state| state.room = None);
    stop(trail, tasks).await.expect("closes");
    let records = tape.records();
    assert_eq!(events(&records), ["trail.started", "link.up", "trail.resumed", "trail.stopped"]);
    assert_eq!(records[2]["lost"], 2, "the opening and the note");
}

#[tokio::test]
async fn endings_are_told_apart() {
    let (trail, tape, tasks) = tape_trail().await;
    trail.deny(opening("f0"), "no_rule", "no rule names it").await.expect("recorded");
    let entry = trail.open(opening("f1")).await.expect("opens");
    entry.finish(Ending::Denied { reason: "agent_denied", detail: String::new() });
    let entry = trail.open(opening("f2")).await.expect("opens");
    entry.finish(Ending::Failed { reason: "connect", detail: "connection refused".to_owned() });
    drop(trail.open(opening("f3")).await.expect("opens"));
    for (forward, drops) in [("f4", true), ("f5", false)] {
        let mut entry = trail.open(opening(forward)).await.expect("opens");
        let [one, other] = [[10, 0, 0, 1], [127, 0, 0, 1]].map(|address| Resolved::Address(address.into()));
        entry.resolved(&[one, other], &[other]);
        entry.served_by("r1".parse().ok(), Some("peer".to_owned()));
        entry.established(Some(([10, 0, 0, 1], 5432).into()));
        let counters = entry.counters();
        counters.add_to_target(3);
        counters.add_from_target(4);
        match drops {
            true => drop(entry),
            false => entry.finish(counters.ended("client_closed")),
        }
    }
    stop(trail, tasks).await.expect("closes");
    let records = tape.records();
    let closing: Vec<_> = records
        .iter()
        .filter(|record| record["event"] != OPEN && !record["forward"].is_null())
        .map(|record| {
            let field = |name: &str| record[name].as_str().unwrap_or("-").to_owned();
            (field("forward"), field("event"), field("reason"), field("detail"), record["to_target"].as_u64())
        })
        .collect();
    let expected = [
        ("f0", "forward.denied", "no_rule", "no rule names it", None),
        ("f1", "forward.denied", "agent_denied", "-", None),
        ("f2", "forward.failed", "connect", "connection refused", None),
        ("f3", "forward.abandoned", "dropped", "-", None),
        ("f4", "forward.abandoned", "dropped", "-", Some(3)),
        ("f5", "forward.ended", "client_closed", "-", Some(3)),
    ]
    .map(|(f, e, r, d, n)| (f.to_owned(), e.to_owned(), r.to_owned(), d.to_owned(), n));
    assert_eq!(closing, expected);
    let last = &records[records.len() - 2];
    assert_eq!(last["dialled"], "10.0.0.1:5432");
    assert_eq!(last["resolved"], serde_json::json!(["10.0.0.1", "127.0.0.1"]));
    assert_eq!(last["refused"], serde_json::json!(["127.0.0.1"]));
    assert_eq!((&last["replica"], &last["peer_forward"]), (&"r1".into(), &"peer".into()));
    assert!(last["duration_ms"].is_u64());
}

#[tokio::test]
async fn a_thousand_openings_at_once_are_all_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trail");
    let tasks = Tasks::new();
    let trail = begun(Sinks::file(path.clone()), Side::Gateway, &tasks).await.expect("starts");
    assert_eq!(fs::metadata(&path).expect("made").permissions().mode() & 0o777, 0o600);
    let opens = Tasks::new();
    let handles: Vec<_> = (0..1000)
        .map(|number| {
            let (trail, path) = (trail.clone(), path.clone());
            opens.spawn(async move {
                let forward = format!("f{number}");
                let entry = trail.open(opening(&forward)).await.expect("opens");
                if number % 100 == 0 {
                    let text = fs::read_to_string(path).expect("readable");
                    assert!(text.contains(&format!("\"forward\":\"{forward}\"")), "accepted means written");
                }
                entry.finish(Counters::default().ended("closed"));
            })
        })
        .collect();
    for handle in handles {
        handle.await.expect("no panic");
    }
    stop(trail, tasks).await.expect("closes");
    let records = read(&path);
    assert_eq!(records.len(), 2_002);
    let count = |event: &str| records.iter().filter(|record| record["event"] == event).count();
    assert_eq!((count(OPEN), count(ENDED)), (1000, 1000));
}

#[tokio::test]
async fn a_flood_of_strangers_is_summed_up() {
    let (trail, tape, tasks) = tape_trail().await;
    for number in 0..10_000 {
        let reason = if number % 4 == 0 { "unknown_key" } else { "identification" };
        trail.stranger(Event::new(Kind::AuthRefused).client("192.0.2.1:1"), reason);
    }
    stop(trail, tasks).await.expect("closes");
    let records = tape.records();
    let single = records.iter().filter(|record| record["event"] == "auth.refused").count() as u64;
    assert!(single <= u64::from(STRANGER_RECORDS), "{single}");
    let sums: Vec<_> = records.iter().filter(|record| record["event"] == STRANGERS).collect();
    assert_eq!(sums.len(), 1);
    let total: u64 = sums[0]["counts"].as_object().expect("counts").values().filter_map(Value::as_u64).sum();
    assert_eq!(single + total, 10_000);
    assert!(sums[0]["counts"]["unknown_key"].is_u64() && sums[0]["counts"]["identification"].is_u64());
}

#[tokio::test]
async fn strangers_that_cannot_be_written_are_counted() {
    let (trail, tape, tasks) = tape_trail().await;
    tape.set(|state| state.room = Some(0));
    for _ in 0..10 {
        trail.stranger(Event::new(Kind::AuthRefused), "unknown_key");
    }
    // In the queue behind them, so that the writer has tried them.
    assert!(trail.note(Event::new(Kind::LinkUp)).await.is_err());
    tape.set(|state| state.room = None);
    stop(trail, tasks).await.expect("closes");
    let records = tape.records();
    // Those that had their number before anybody knew are records of their own.
    let single = records.iter().filter(|record| record["event"] == "auth.refused").count() as u64;
    let sum = records.iter().find(|record| record["event"] == STRANGERS);
    let counted = sum.and_then(|sum| sum["counts"]["unknown_key"].as_u64()).unwrap_or(0);
    assert_eq!(single + counted, 10);
}

#[test]
fn the_strangers_budget_begins_anew_with_each_period() {
    let mut strangers = Strangers::default();
    let begin = Instant::now();
    let admitted = (0..2 * STRANGER_RECORDS).filter(|_| strangers.admit(begin)).count();
    assert_eq!(admitted, STRANGER_RECORDS as usize);
    strangers.count("a", 2);
    assert_eq!(strangers.due(begin, false), None);
    let later = begin + STRANGER_PERIOD;
    assert!(!strangers.admit(later), "the sum comes first");
    assert_eq!(strangers.due(later, false), Some(([("a", 2)].into(), STRANGER_PERIOD)));
    assert!(strangers.admit(later));
    assert!(strangers.admit(later + STRANGER_PERIOD));
}

#[tokio::test]
async fn a_crash_is_made_good_at_the_next_start() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trail");
    let tasks = Tasks::new();
    let trail = begun(Sinks::file(path.clone()), Side::Agent, &tasks).await.expect("starts");
    let mut lost = opening("lost");
    lost.organisation = "acme".parse().ok();
    lost.rule = Some("orders-db".to_owned());
    lost.resolved = vec![Resolved::Address([10, 0, 0, 1].into()), Resolved::Instance(([10, 0, 0, 2], 5432).into())];
    let lost = trail.open(lost).await.expect("opens");
    trail.open(opening("ended")).await.expect("opens").finish(Counters::default().ended("closed"));
    trail.note(Event::new(Kind::LinkUp)).await.expect("recorded");
    // What a crash would have left: a copy, with half a line behind it.
    let crashed = directory.path().join("crashed");
    let mut text = fs::read_to_string(&path).expect("readable");
    text.push_str("not a record\n");
    let unreadable_at = text.len() - 13;
    text.push_str(&format!("{{\"{}\":0}}\n", "x".repeat(crate::limits::TRAIL_RECORD_MAX * 2)));
    let torn_at = text.len();
    text.push_str("{\"time\":\"2026-");
    private(&crashed, &text);
    drop(lost);
    stop(trail, tasks).await.expect("closes");

    let before = text.lines().count();
    for start in 0..2 {
        let tasks = Tasks::new();
        let trail = begun(Sinks::file(crashed.clone()), Side::Agent, &tasks).await.expect("starts");
        stop(trail, tasks).await.expect("closes");
        let after = fs::read_to_string(&crashed).expect("readable");
        assert!(after.starts_with(&format!("{text}\n")), "what was there stays as it was");
        let added = without_heads(after.lines().skip(before).map(parse).collect());
        let once = ["trail.started", "forward.abandoned", "trail.recovered", "trail.stopped"];
        if start == 1 {
            assert_eq!(events(&added), [&once[..], &["trail.started", "trail.stopped"]].concat());
            continue;
        }
        assert_eq!(events(&added), once);
        assert_eq!((&added[1]["forward"], &added[1]["reason"]), (&"lost".into(), &"writer_ended".into()));
        assert_eq!((&added[1]["organisation"], &added[1]["rule"]), (&"acme".into(), &"orders-db".into()));
        assert_eq!(added[1]["resolved"], serde_json::json!(["10.0.0.1", "10.0.0.2:5432"]));
        assert_eq!(added[2]["forwards"], 1);
        assert_eq!(added[2]["torn_at"], torn_at);
        assert_eq!(added[2]["torn"], Link::of(&text.as_bytes()[torn_at..]).to_string());
        assert_eq!((&added[2]["unreadable"], &added[2]["unreadable_at"]), (&2.into(), &unreadable_at.into()));
    }
}

#[tokio::test]
async fn recovery_closes_each_opening_once_in_their_order() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trail");
    let line = |event: &str, forward: &str, target: &str| {
        format!("{{\"time\":\"t\",\"event\":\"{event}\",\"forward\":\"{forward}\",\"target\":\"{target}\"}}\n")
    };
    let text = [
        line(OPEN, "b", "1"),
        line(OPEN, "a", "2"),
        line(OPEN, "c", "3"),
        line(OPEN, "d", "4"),
        line(OPEN, "e", "5"),
        line(OPEN, "f", "6"),
        line(DENIED, "c", "3"),
        line(FAILED, "d", "4"),
        line(ENDED, "e", "5"),
        line(ABANDONED, "f", "6"),
        line("forward.attempt", "a", "2"),
        // Opened again without having been closed.
        line(OPEN, "a", "7"),
    ]
    .concat();
    private(&path, &text);
    let tasks = Tasks::new();
    let trail = begun(Sinks::file(path.clone()), Side::Agent, &tasks).await.expect("starts");
    stop(trail, tasks).await.expect("closes");
    let records = read(&path);
    let closed: Vec<_> = records[13..16].iter().map(|record| record["target"].as_str().unwrap_or("-")).collect();
    assert_eq!(closed, ["1", "2", "7"]);
    assert_eq!(
        events(&records[12..]),
        ["trail.started", ABANDONED, ABANDONED, ABANDONED, "trail.recovered", "trail.stopped"]
    );
    assert!(records[16]["torn_at"].is_null() && records[16]["unreadable"].is_null());
}

/// A crash, or a full disk, can cut a line off anywhere, also before nothing but its newline.
#[tokio::test]
async fn regression_torn_newline_every_opening_has_one_ending_wherever_the_file_was_cut() {
    let directory = tempfile::tempdir().expect("a directory");
    let line = |event: &str, forward: &str| format!("{{\"event\":\"{event}\",\"forward\":\"{forward}\"}}\n");
    let text = [line(OPEN, "a"), line(OPEN, "b"), line(ENDED, "a"), line(DENIED, "c"), line(FAILED, "b")].concat();
    for cut in 0..=text.len() {
        let path = directory.path().join(format!("trail-{cut}"));
        private(&path, &text[..cut]);
        let tasks = Tasks::new();
        let trail = begun(Sinks::file(path.clone()), Side::Agent, &tasks).await.expect("starts");
        stop(trail, tasks).await.expect("closes");
        let after = fs::read_to_string(&path).expect("readable");
        let records: Vec<Value> = after.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        for forward in ["a", "b"] {
            let count = |wanted: &[&str]| {
                let of = records.iter().filter(|record| record["forward"] == forward);
                of.filter(|record| wanted.iter().any(|event| record["event"] == *event)).count()
            };
            assert_eq!(count(&[OPEN]), count(&[ENDED, FAILED, ABANDONED]), "{forward}, cut at {cut}: {after}");
        }
    }
}

#[tokio::test]
async fn files_that_will_not_do_are_refused_untouched() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trail");
    let link = directory.path().join("link");
    symlink(&path, &link).expect("a link");
    let tasks = Tasks::new();
    let start = |path: &Path| {
        let (path, tasks) = (path.to_owned(), tasks.clone());
        async move { begun(Sinks::file(path), Side::Agent, &tasks).await.map(drop).expect_err("must be refused") }
    };

    private(&path, "{\"event\"");
    for mode in [0o640, 0o604, 0o620, 0o644] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
        let error = start(&path).await.to_string();
        assert!(error.contains("chmod 600") && error.contains(&path.display().to_string()), "{error}");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
    assert!(matches!(start(&link).await, StartError::Open { .. }));
    assert!(matches!(start(directory.path()).await, StartError::Open { .. }));
    assert!(matches!(start(Path::new("/dev/null")).await, StartError::NotAFile { .. }));
    assert!(matches!(start(&directory.path().join("no/trail")).await, StartError::Open { .. }));
    assert_eq!(fs::read_to_string(&path).expect("readable"), "{\"event\"");

    let trail = begun(Sinks::file(path.clone()), Side::Agent, &tasks).await.expect("starts");
    let error = start(&path).await;
    assert!(matches!(error, StartError::Locked { .. }), "{error:?}");
    stop(trail, tasks.clone()).await.expect("closes");
    let again = Tasks::new();
    let trail = begun(Sinks::file(path), Side::Agent, &again).await.expect("the lock ends with the trail");
    stop(trail, again).await.expect("closes");
}

#[tokio::test]
async fn a_removed_file_is_a_failure_and_a_truncated_one_is_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trail");
    let tasks = Tasks::new();
    let trail = begun(Sinks::file(path.clone()), Side::Agent, &tasks).await.expect("starts");
    let file = fs::OpenOptions::new().write(true).open(&path).expect("opens");
    file.set_len(0).expect("truncates");
    trail.note(Event::new(Kind::LinkUp)).await.expect("recorded");
    assert_eq!(events(&read(&path)), ["link.up"]);
    fs::remove_file(&path).expect("removes");
    assert!(matches!(trail.open(opening("f1")).await, Err(TrailError::Write(_))));
    assert!(stop(trail, tasks).await.is_err());
}

#[tokio::test]
async fn a_closed_trail_refuses_and_late_endings_do_no_harm() {
    let (trail, tape, tasks) = tape_trail().await;
    let entry = trail.open(opening("f1")).await.expect("opens");
    let other = trail.clone();
    // As if the patience of `close` were over: the forward is still live.
    let (answer, answered) = oneshot::channel();
    trail.queue.send(Message::Stop { answer }).await.expect("the writer runs");
    within(answered).await.expect("answered").expect("written");
    assert!(matches!(other.open(opening("f2")).await, Err(TrailError::Closed)));
    assert!(matches!(other.note(Event::new(Kind::LinkUp)).await, Err(TrailError::Closed)));
    other.stranger(Event::new(Kind::AuthRefused), "unknown_key");
    drop(entry);
    assert!(matches!(other.close().await, Err(TrailError::Closed)));
    assert!(tasks.drain(TRAIL_PATIENCE).await);
    let records = tape.records();
    assert_eq!(events(&records), ["trail.started", "forward.open", "trail.stopped"]);
    assert_eq!(records[2]["forwards"], 1);
}

#[test]
fn a_dropped_runtime_still_writes_what_is_queued() {
    let tape = Tape::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let recorder = tape.clone();
    let tasks = Tasks::new();
    runtime.block_on(async {
        let made = Trail::begin(Side::Agent, &tasks, how(), || Ok(prepared(Side::Agent, Box::new(recorder)))).await;
        let trail = made.expect("starts");
        let entry = trail.open(opening("f1")).await.expect("opens");
        tasks.spawn(async move {
            let _entry = entry;
            std::future::pending::<()>().await;
        });
    });
    drop(runtime);
    assert_eq!(events(&tape.records()), ["trail.started", "forward.open", "forward.abandoned", "trail.stopped"]);
}

#[tokio::test]
async fn records_have_stable_names_in_a_stable_order() {
    let (trail, tape, tasks) = tape_trail().await;
    let full = Opening {
        forward: "f1".to_owned(),
        peer_forward: Some("p1".to_owned()),
        organisation: "acme".parse().ok(),
        agent: "prod-eu".parse().ok(),
        replica: "r1".parse().ok(),
        principal: "ci".parse().ok(),
        asserted_by: Some("local".to_owned()),
        key: None,
        certificate: None,
        token: "t1".parse().ok(),
        client_certificate: None,
        client: Some("192.0.2.1:1".to_owned()),
        door: Some("ssh"),
        target: "db:5432".to_owned(),
        rule: Some("orders".to_owned()),
        resolved: Vec::new(),
        refused: Vec::new(),
        asked: Default::default(),
    };
    trail.deny(full, "no_rule", "why").await.expect("recorded");
    stop(trail, tasks).await.expect("closes");
    let text = tape.text();
    let line = text.lines().nth(1).expect("a line");
    let (time, rest) = line.split_at("{\"v\":1,\"time\":\"2026-01-01T00:00:00.000Z\",".len());
    assert!(time.starts_with("{\"v\":1,") && time.ends_with("Z\",") && time.as_bytes()[34] == b'.', "{line}");
    let (rest, link) = rest.split_at(rest.find(",\"seq\":").expect("a number"));
    assert!(link.starts_with(",\"seq\":1,\"prev\":\""), "{link}");
    assert_eq!(
        rest,
        "\"event\":\"forward.denied\",\"side\":\"gateway\",\"forward\":\"f1\",\"peer_forward\":\"p1\",\
             \"organisation\":\"acme\",\"agent\":\"prod-eu\",\"replica\":\"r1\",\"principal\":\"ci\",\
             \"asserted_by\":\"local\",\"token\":\"t1\",\"client\":\"192.0.2.1:1\",\"door\":\"ssh\",\"target\":\"db:5432\",\
             \"rule\":\"orders\",\"reason\":\"no_rule\",\"detail\":\"why\""
    );
}

#[tokio::test]
async fn texts_are_bounded_and_cannot_act_on_a_terminal() {
    let (trail, tape, tasks) = tape_trail().await;
    let nasty = format!("\u{1b}[31m\n\u{9b}1A\u{7f}\u{61c}\u{202e}{}", "ä".repeat(10_000));
    let event = Event::new(Kind::PeerViolation).organisation(&nasty).target(&nasty).detail(&nasty).key("");
    trail.note(event).await.expect("recorded");
    let all = Opening {
        asserted_by: Some("\0".repeat(1000)),
        client: Some("\0".repeat(1000)),
        target: "\0".repeat(1000),
        rule: Some("\0".repeat(1000)),
        resolved: vec![Resolved::Instance(([0xffff; 8], 65_535).into()); 1000],
        refused: vec![Resolved::Instance(([0xffff; 8], 65_535).into()); 1000],
        ..opening("f1")
    };
    trail.deny(all, &"\0".repeat(1000), &"\0".repeat(1000)).await.expect("recorded");
    stop(trail, tasks).await.expect("closes");
    let text = tape.text();
    assert!(!text.contains(|c: char| c != '\n' && (c.is_control() || unsafe_to_show(c))));
    let records = tape.records();
    for field in ["organisation", "target", "detail"] {
        let length = records[1][field].as_str().expect(field).len();
        assert!((TRAIL_TEXT_MAX - 3..=TRAIL_TEXT_MAX).contains(&length), "{field} {length}");
    }
    assert!(records[1]["key"].is_null());
    assert!(text.lines().all(|line| line.len() < crate::limits::TRAIL_RECORD_MAX));
}

/// Two required sinks: what one has and the other does not yet is in both in the end, with the same bytes.
#[tokio::test]
async fn every_required_sink_gets_the_same_bytes() {
    let ((one, other), tasks) = ((Tape::default(), Tape::default()), Tasks::new());
    let mut prepared = prepared(Side::Agent, Box::new(one.clone()));
    prepared.lanes.push(tape_lane("other", Box::new(other.clone())));
    let trail = Trail::begin(Side::Agent, &tasks, how(), || Ok(prepared)).await.expect("starts");
    let entry = trail.open(opening("f1")).await.expect("opens");
    other.set(|state| state.room = Some(30));
    assert!(matches!(trail.open(opening("f2")).await, Err(TrailError::Write(_))), "one of them is not enough");
    assert!(one.text().contains("\"f2\"") && !other.text().contains("\"f2\""));
    assert!(matches!(trail.open(opening("f3")).await, Err(TrailError::Write(_))));
    assert!(!one.text().contains("\"f3\""), "nothing new has a number meanwhile");
    other.set(|state| state.room = None);
    entry.finish(Counters::default().ended("closed"));
    stop(trail, tasks).await.expect("closes");
    assert_eq!(one.text(), other.text());
    let records = one.records();
    let resumed = records.iter().find(|record| record["event"] == RESUMED).expect("resumed");
    assert_eq!((&resumed["sink"], &resumed["lost"]), (&"other".into(), &1.into()));
}

/// A sink that nobody requires hangs, and nobody notices but the trail.
#[tokio::test]
async fn a_sink_that_is_not_required_stops_nothing_and_is_told_of() {
    let (tape, slow, tasks) = (Tape::default(), Tape::default(), Tasks::new());
    let mut prepared = prepared(Side::Agent, Box::new(tape.clone()));
    let config = SinkConfig { required: false, ..SinkConfig::required("slow", SinkKind::Stdout) };
    let (feed, batches, progress) = sink::pipe();
    let hand = Hand::new(Box::new(slow.clone()), Fsync::Interval(NEVER), false);
    let opener = Box::new(|| Err(io::ErrorKind::Unsupported.into()));
    lane::work_apart(Some(hand), opener, batches, progress).expect("a thread");
    prepared.lanes.push(Lane::apart(&config, feed, None));
    let trail = Trail::begin(Side::Agent, &tasks, how(), || Ok(prepared)).await.expect("starts");
    slow.set(|state| state.hangs = true);
    // More than its queue holds.
    let detail = "x".repeat(TRAIL_TEXT_MAX);
    let mut noted = 0;
    while noted * TRAIL_TEXT_MAX < crate::limits::TRAIL_SINK_BYTES {
        let batch = futures_of(&trail, &detail).await;
        noted += batch;
    }
    let told = |event: &'static str| {
        let tape = tape.clone();
        async move {
            loop {
                let text = tape.text();
                if let Some(line) = text.lines().find(|line| line.contains(event)) {
                    return parse(line);
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    };
    let failed = within(told(SINK_FAILED)).await;
    assert_eq!((&failed["sink"], &failed["reason"]), (&"slow".into(), &"too_slow".into()));
    assert!(trail.failed().borrow().is_none());
    trail.open(opening("f1")).await.expect("opens").finish(Counters::default().ended("closed"));
    slow.set(|state| state.hangs = false);
    let works = within(told(SINK_WORKS)).await;
    let lost = works["lost"].as_u64().expect("a number");
    assert!(lost > 0, "{works}");
    stop(trail, tasks).await.expect("closes");
    within(async {
        while !slow.text().contains(STOPPED) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    // What it has is what the other has, but for what the trail says that it lost.
    let (all, its) = (tape.text(), slow.text());
    let has: HashSet<&str> = its.lines().collect();
    let missing = all.lines().filter(|line| !has.contains(line)).count() as u64;
    assert_eq!(missing, lost);
    let written: HashSet<&str> = all.lines().collect();
    assert!(has.is_subset(&written));
}

/// Notes so many events at once that they go into one batch, and returns how many.
async fn futures_of(trail: &Trail, detail: &str) -> usize {
    const MANY: usize = 512;
    let notes = Tasks::new();
    let handles: Vec<_> = (0..MANY)
        .map(|_| {
            let (trail, event) = (trail.clone(), Event::new(Kind::LinkUp).detail(detail));
            notes.spawn(async move { trail.note(event).await })
        })
        .collect();
    for handle in handles {
        handle.await.expect("no panic").expect("recorded");
    }
    MANY
}

fn file_sinks(path: &Path, rotate: Rotation) -> Sinks {
    let kind = SinkKind::File { path: path.to_owned(), fsync: Fsync::Each, rotate };
    Sinks::new(vec![SinkConfig::required("file", kind)])
}

/// All files of a trail, the oldest first.
fn files(path: &Path) -> Vec<std::path::PathBuf> {
    let mut all: Vec<_> = sink::file::rotated(path).expect("readable").into_iter().map(|(_, path)| path).collect();
    all.push(path.to_owned());
    all
}

#[tokio::test]
async fn a_rotation_goes_on_with_the_chain_and_a_crash_finds_what_is_open_before_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trail");
    let rotate = Rotation { bytes: Some(2_000), ..Rotation::default() };
    let tasks = Tasks::new();
    let trail = begun(file_sinks(&path, rotate), Side::Agent, &tasks).await.expect("starts");
    let old = trail.open(opening("old")).await.expect("opens");
    for number in 0..40 {
        let entry = trail.open(opening(&format!("f{number}"))).await.expect("opens");
        entry.finish(Counters::default().ended("closed"));
    }
    // Nobody waits for an end to be written; what is noted after it is written after it.
    trail.note(Event::new(Kind::LinkUp)).await.expect("written");
    let all = files(&path);
    assert!(all.len() > 4, "{all:?}");
    let mut text = String::new();
    for file in &all {
        assert_eq!(fs::metadata(file).expect("there").permissions().mode() & 0o777, 0o600);
        let part = fs::read_to_string(file).expect("readable");
        if !text.is_empty() {
            let first = parse(part.lines().next().expect("a line"));
            assert_eq!((&first["event"], &first["sink"]), (&CONTINUED.into(), &"file".into()));
            // There may be one besides whose end comes next.
            assert_eq!(first["open_from"], 1, "{first}");
            let last = parse(text.lines().last().expect("a line"));
            assert_eq!(last["event"], HEAD);
        }
        text.push_str(&part);
    }
    linked(&text);
    // A crash: a copy of all the files, with half a line at the end.
    let crashed = directory.path().join("crashed");
    fs::create_dir(&crashed).expect("made");
    for file in &all {
        fs::copy(file, crashed.join(file.file_name().expect("a name"))).expect("copied");
    }
    let copy = crashed.join("trail");
    let mut active = fs::OpenOptions::new().append(true).open(&copy).expect("opens");
    active.write_all(b"{\"v\":1,\"ti").expect("written");
    drop(old);
    stop(trail, tasks).await.expect("closes");

    let again = Tasks::new();
    let trail = begun(file_sinks(&copy, Rotation::default()), Side::Agent, &again).await.expect("starts");
    stop(trail, again).await.expect("closes");
    let text: String = files(&copy).iter().map(|file| fs::read_to_string(file).expect("readable")).collect();
    assert!(text.contains("{\"v\":1,\"ti\n"), "what was torn stays as it was");
    let records = linked(&text.replace("{\"v\":1,\"ti\n", ""));
    let abandoned: Vec<_> = records.iter().filter(|record| record["reason"] == "writer_ended").collect();
    assert_eq!(abandoned.len(), 1);
    assert_eq!(abandoned[0]["forward"], "old");
    let recovered = records.iter().find(|record| record["event"] == RECOVERED).expect("recovered");
    assert_eq!(recovered["torn"], Link::of(b"{\"v\":1,\"ti").to_string());
}

#[tokio::test]
async fn only_as_many_old_files_are_kept_as_are_asked_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trail");
    let rotate = Rotation { bytes: Some(1), keep: Some(2), ..Rotation::default() };
    let tasks = Tasks::new();
    let trail = begun(file_sinks(&path, rotate), Side::Agent, &tasks).await.expect("starts");
    for _ in 0..6 {
        trail.note(Event::new(Kind::LinkUp)).await.expect("recorded");
    }
    stop(trail, tasks).await.expect("closes");
    let all = files(&path);
    assert_eq!(all.len(), 3, "{all:?}");
    linked(&all.iter().map(|file| fs::read_to_string(file).expect("readable")).collect::<String>());
}

/// Wherever a crash cuts the last record off: the chain goes on from the last whole one, and what is torn is named.
#[tokio::test]
async fn a_trail_goes_on_wherever_its_last_record_was_cut() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trail");
    let tasks = Tasks::new();
    let trail = begun(Sinks::file(path.clone()), Side::Agent, &tasks).await.expect("starts");
    let entry = trail.open(opening("f1")).await.expect("opens");
    trail.note(Event::new(Kind::LinkUp)).await.expect("recorded");
    let text = fs::read_to_string(&path).expect("readable");
    drop(entry);
    stop(trail, tasks).await.expect("closes");
    let before = text.trim_end().rfind('\n').expect("a line") + 1;
    for cut in before..=text.len() {
        let copy = directory.path().join(format!("cut-{cut}"));
        private(&copy, &text[..cut]);
        let tasks = Tasks::new();
        let trail = begun(Sinks::file(copy.clone()), Side::Agent, &tasks).await.expect("starts");
        stop(trail, tasks).await.expect("closes");
        let after = fs::read_to_string(&copy).expect("readable");
        let torn = &text[before..cut];
        let whole = torn.is_empty() || cut >= text.len() - 1;
        let rest = if whole { after.clone() } else { after.replacen(&format!("{torn}\n"), "", 1) };
        let records = linked(&rest);
        let recovered = records.iter().find(|record| record["event"] == RECOVERED).expect("f1 was open");
        assert_eq!(recovered["forwards"], 1, "{cut}");
        let named = (!whole).then(|| Link::of(torn.as_bytes()).to_string());
        assert_eq!(recovered["torn"].as_str().map(str::to_owned), named, "{cut}");
        assert_eq!(records.iter().filter(|record| record["forward"] == "f1").count(), 2, "{cut}");
    }
}

/// Two files that are both required, named as they are called.
fn copies(paths: [&Path; 2]) -> Sinks {
    let file =
        |path: &Path| SinkKind::File { path: path.to_owned(), fsync: Fsync::default(), rotate: Rotation::default() };
    let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    Sinks::new(paths.map(|path| SinkConfig::required(&name(path), file(path))).to_vec())
}

/// After a crash one copy is longer than the other: the trail goes on from there, and says what the other one lacks.
#[tokio::test]
async fn of_two_copies_the_longest_counts_and_the_other_ones_gap_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let (one, other) = (directory.path().join("one"), directory.path().join("other"));
    let tasks = Tasks::new();
    let trail = begun(copies([&one, &other]), Side::Agent, &tasks).await.expect("starts");
    for _ in 0..5 {
        trail.note(Event::new(Kind::LinkUp)).await.expect("recorded");
    }
    stop(trail, tasks).await.expect("closes");
    let text = fs::read_to_string(&one).expect("readable");
    assert_eq!(text, fs::read_to_string(&other).expect("readable"));
    let short: String = text.split_inclusive('\n').take(3).collect();
    fs::write(&one, &short).expect("cut");
    let tasks = Tasks::new();
    let trail = begun(copies([&one, &other]), Side::Agent, &tasks).await.expect("starts");
    stop(trail, tasks).await.expect("closes");
    let long = fs::read_to_string(&other).expect("readable");
    let records = linked(&long);
    let works = records.iter().find(|record| record["event"] == SINK_WORKS).expect("named");
    let missing = (text.lines().count() - 3) as u64;
    assert_eq!((&works["sink"], &works["lost"]), (&"one".into(), &missing.into()));
    assert_eq!(fs::read_to_string(&one).expect("readable"), format!("{short}{}", &long[text.len()..]));
}

/// A copy that was behind when a process was killed lacks the end of a forward for good, and is as long as the other one again.
#[tokio::test]
async fn regression_an_end_that_one_copy_lacks_is_not_written_again() {
    for lacking in [0, 1] {
        let directory = tempfile::tempdir().expect("a directory");
        let paths = ["one", "other"].map(|name| directory.path().join(name));
        let tasks = Tasks::new();
        let trail = begun(copies([&paths[0], &paths[1]]), Side::Agent, &tasks).await.expect("starts");
        trail.open(opening("f1")).await.expect("opens").finish(Counters::default().ended("closed"));
        let left = trail.open(opening("f2")).await.expect("opens");
        trail.note(Event::new(Kind::LinkUp)).await.expect("recorded");
        let killed = fs::read_to_string(&paths[0]).expect("readable");
        drop(left);
        stop(trail, tasks).await.expect("closes");
        for (index, path) in paths.iter().enumerate() {
            let is_end = |line: &str| line.contains("\"f1\"") && line.contains(ENDED);
            let kept = |line: &&str| index != lacking || !is_end(line);
            let text: String = killed.split_inclusive('\n').filter(kept).collect();
            assert_eq!(text.len() < killed.len(), index == lacking);
            fs::write(path, text).expect("as it was left");
        }
        let tasks = Tasks::new();
        let trail = begun(copies([&paths[0], &paths[1]]), Side::Agent, &tasks).await.expect("starts");
        stop(trail, tasks).await.expect("closes");
        let whole = fs::read_to_string(&paths[1 - lacking]).expect("readable");
        let closed = |forward: &str| {
            let of = |record: &&Value| record["forward"] == forward && record["event"] != OPEN;
            linked(&whole).iter().filter(of).map(|record| record["event"].clone()).collect::<Vec<_>>()
        };
        assert_eq!((closed("f1"), closed("f2")), (vec![ENDED.into()], vec![ABANDONED.into()]), "{lacking}");
    }
}

#[tokio::test]
async fn a_file_that_was_moved_or_replaced_is_not_written_to() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, away) = (directory.path().join("trail"), directory.path().join("away"));
    let tasks = Tasks::new();
    let trail = begun(Sinks::file(path.clone()), Side::Agent, &tasks).await.expect("starts");
    fs::rename(&path, &away).expect("moved");
    assert!(matches!(trail.open(opening("f1")).await, Err(TrailError::Write(_))));
    private(&path, "");
    assert!(matches!(trail.open(opening("f2")).await, Err(TrailError::Write(_))));
    fs::rename(&away, &path).expect("moved back");
    trail.open(opening("f3")).await.expect("opens").finish(Counters::default().ended("closed"));
    stop(trail, tasks).await.expect("closes");
    whole(&path);
}

#[tokio::test]
async fn forwards_that_last_say_how_far_they_are() {
    let (tape, tasks) = (Tape::default(), Tasks::new());
    let output = Box::new(tape.clone());
    let how = How { progress: std::time::Duration::from_millis(50), ..how() };
    let trail = Trail::begin(Side::Agent, &tasks, how, || Ok(prepared(Side::Agent, output))).await.expect("starts");
    let mut entry = trail.open(opening("f1")).await.expect("opens");
    let waiting = trail.open(opening("f2")).await.expect("opens");
    entry.established(None);
    entry.counters().add_to_target(7);
    within(async {
        while !tape.text().contains(PROGRESS) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    entry.finish(Counters::default().ended("closed"));
    drop(waiting);
    stop(trail, tasks).await.expect("closes");
    let records = tape.records();
    let progress: Vec<_> = records.iter().filter(|record| record["event"] == PROGRESS).collect();
    assert!(progress.iter().all(|record| record["forward"] == "f1" && record["to_target"] == 7), "{progress:?}");
    let at = |event: &str| records.iter().rposition(|record| record["event"] == event && record["forward"] == "f1");
    assert!(at(PROGRESS) < at(ENDED));
}

fn tape_lane(name: &str, output: Box<dyn Output>) -> Lane {
    let hand = Hand::new(output, Fsync::Interval(NEVER), false);
    Lane::inline(&SinkConfig::required(name, SinkKind::Stdout), hand, None)
}

async fn tape_trail() -> (Trail, Tape, Tasks) {
    let (tape, tasks) = (Tape::default(), Tasks::new());
    let output = tape.clone();
    let prepare = || Ok(prepared(Side::Gateway, Box::new(output)));
    let trail = Trail::begin(Side::Gateway, &tasks, how(), prepare).await.expect("starts");
    (trail, tape, tasks)
}

fn how() -> How {
    let Sinks { heads, signing_key, progress, .. } = Sinks::stdout();
    How { heads, signing_key, progress, over: CancellationToken::new() }
}

/// A new trail with one required sink.
fn prepared(side: Side, output: Box<dyn Output>) -> Prepared {
    let trail = TrailId::generate().expect("randomness");
    let lanes = vec![tape_lane("tape", output)];
    let started = Record { trail: text(trail), ..Record::own(side, STARTED) };
    Prepared { trail, chain: Chain::begin(&trail), lanes, first: vec![started] }
}

async fn begun(sinks: Sinks, side: Side, tasks: &Tasks) -> Result<Trail, StartError> {
    Trail::start(sinks, side, Arc::new(NoNetwork), tasks).await
}

fn opening(forward: &str) -> Opening {
    Opening { forward: forward.to_owned(), target: "db:5432".to_owned(), ..Opening::default() }
}

async fn stop(trail: Trail, tasks: Tasks) -> Result<(), TrailError> {
    let result = trail.close().await;
    assert!(tasks.drain(DEADLINE).await, "the writer and its watcher end with the trail");
    result
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|_| panic!("torn: {line:?}"))
}

fn events(records: &[Value]) -> Vec<&str> {
    records.iter().map(|record| record["event"].as_str().unwrap_or("-")).collect()
}

/// But for the heads, which come when it is time for them.
fn without_heads(mut records: Vec<Value>) -> Vec<Value> {
    records.retain(|record| record["event"] != HEAD);
    records
}

/// Holds whole lines to their chain.
fn linked(text: &str) -> Vec<Value> {
    let mut before: Option<(u64, Link)> = None;
    let mut records = Vec::new();
    for line in text.split_inclusive('\n') {
        let record = parse(line);
        let linked = Linked::read(line.as_bytes()).unwrap_or_else(|| panic!("not linked: {line}"));
        match before {
            Some((seq, link)) => assert_eq!((linked.seq, linked.prev), (seq + 1, link), "{text}"),
            None if linked.seq == 0 => {
                let trail = TrailId::parse(record["trail"].as_str().unwrap_or("")).expect("the trail's id");
                assert_eq!(linked.prev, Link::origin(&trail), "{text}");
            }
            None => {}
        }
        before = Some((linked.seq, Link::of(line.as_bytes())));
        records.push(record);
    }
    records
}

fn read(path: &Path) -> Vec<Value> {
    let mut text = String::new();
    fs::File::open(path).expect("opens").read_to_string(&mut text).expect("readable");
    assert!(text.is_empty() || text.ends_with('\n'));
    without_heads(text.lines().map(parse).collect())
}

/// The records of a file whose chain holds.
fn whole(path: &Path) -> Vec<Value> {
    linked(&fs::read_to_string(path).expect("readable"))
}

fn private(path: &Path, text: &str) {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).expect("made");
    file.write_all(text.as_bytes()).expect("written");
}

/// A sink in memory that fails on request.
#[derive(Clone, Default)]
struct Tape(Arc<(Mutex<TapeState>, Condvar)>);

#[derive(Default)]
struct TapeState {
    bytes: Vec<u8>,
    /// How many bytes fit before writes fail.
    room: Option<usize>,
    hangs: bool,
}

impl Tape {
    fn set(&self, change: impl FnOnce(&mut TapeState)) {
        change(&mut lock(&self.0.0));
        self.0.1.notify_all();
    }

    fn text(&self) -> String {
        String::from_utf8(lock(&self.0.0).bytes.clone()).expect("UTF-8")
    }

    fn records(&self) -> Vec<Value> {
        let text = self.text();
        assert!(text.is_empty() || text.ends_with('\n'), "torn: {text}");
        without_heads(linked(&text))
    }
}

impl Output for Tape {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.0.0);
        while state.hangs {
            state = self.0.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // Short writes are the rule here.
        let mut count = bytes.len().min(100);
        if let Some(room) = &mut state.room {
            if *room == 0 {
                return Err(io::Error::other("no room on this tape"));
            }
            count = count.min(*room);
            *room -= count;
        }
        state.bytes.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

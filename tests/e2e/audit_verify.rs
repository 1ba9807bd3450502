//! Trails of a real gateway and agent, verified: as they were written, and as somebody has changed them since.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Said, Side, Site, caponier, connect, echo, echoes, eventually, run};

const FORWARDS: usize = 6;

async fn verify(arguments: &[&str]) -> (i32, Value) {
    let said: Said = run(caponier().args(["audit", "verify", "--json"]).args(arguments)).await;
    let code = said.code();
    let told = serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
    (code, told)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn seq(record: &Value) -> u64 {
    record["seq"].as_u64().expect("a number")
}

#[tokio::test]
async fn trails_of_both_sides_verify_vouch_for_each_other_and_agree_until_somebody_changes_them() {
    let target = echo().await;
    let plan =
        Site::plan().allow(target).door(target).audit_setting("signing_key = \"{}-audit\"").audit_setting("head_s = 3");
    for key in ["gateway-audit", "agent-audit"] {
        plan.key(key);
    }
    let mut site = plan.start().await;
    for _ in 0..FORWARDS {
        echoes(connect(site.doors[0]).await, b"there and back").await;
    }
    for side in [Side::Gateway, Side::Agent] {
        let ended = eventually("the forwards' ends", async || {
            let ended = site.records(side, &json!({"event": "forward.ended"}));
            (ended.len() == FORWARDS).then(|| seq(&ended[0]))
        })
        .await;
        // The other side has signed that it has seen a head which covers some of them.
        eventually("a countersignature", async || {
            let seen = site.records(side, &json!({"event": "trail.countersigned"}));
            seen.iter().any(|record| record["covers"].as_u64().is_some_and(|covers| covers >= ended)).then_some(())
        })
        .await;
    }
    assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));

    let trail = |side: Side| site.path().join(format!("{}.jsonl", side.name()));
    let key = |side: Side| site.path().join(format!("{}-audit.pub", side.name()));
    let keys = [Side::Gateway, Side::Agent].map(|side| {
        fs::write(key(side), site.public(&format!("{}-audit", side.name()))).expect("written");
        key(side)
    });
    for (ours, theirs) in [(Side::Gateway, Side::Agent), (Side::Agent, Side::Gateway)] {
        let (ours, theirs) = (trail(ours), trail(theirs));
        let given = [text(&ours), "--key", text(&keys[0]), "--key", text(&keys[1]), "--anchors", text(&theirs)];
        let (code, told) = verify(&[&given[..], &["--compare", text(&theirs)]].concat()).await;
        assert_eq!(code, 0, "{told:#}");
        let trail = &told["trails"][0];
        assert_eq!((&told["intact"], &trail["stopped"], &trail["first"]), (&json!(true), &json!(true), &json!(0)));
        // All but the last head and the word that it was stopped.
        assert_eq!((&trail["unsigned_tail"], &trail["signed"][0]["known"]), (&json!(2), &json!(true)), "{told:#}");
        let anchored = trail["anchored"].as_array().expect("ranges");
        // Once by the other side's trail, once by its signature in this one.
        assert_eq!(anchored.len(), 2, "{told:#}");
        assert!(anchored.iter().all(|range| range["known"] == json!(true) && range["first"] == json!(0)), "{told:#}");
        assert_eq!((&told["comparison"]["agree"], &told["comparison"]["agreed"]), (&json!(true), &json!(FORWARDS)));
        tampered(&ours, &given).await;
    }

    // The other side's word against a trail that somebody with the key has written.
    let lines =
        |path: &PathBuf| fs::read_to_string(path).expect("a trail").lines().map(str::to_owned).collect::<Vec<_>>();
    let agent = trail(Side::Agent);
    let without: Vec<_> = lines(&agent).into_iter().filter(|line| !line.contains("\"event\":\"forward.")).collect();
    let bare = site.path().join("bare.jsonl");
    fs::write(&bare, without.join("\n") + "\n").expect("written");
    let (code, told) = verify(&[text(&trail(Side::Gateway)), "--compare", text(&bare)]).await;
    assert_eq!(code, 1);
    assert_eq!(told["comparison"]["categories"], json!({"missing_at_agent": FORWARDS}), "{told:#}");
    let said = run(caponier().args(["audit", "verify", "nothing.jsonl"])).await;
    assert_eq!(said.code(), 2, "{said:?}");
}

/// No head falls due by itself here, so that only what is told at the end covers what happened last.
#[tokio::test]
async fn a_stop_in_order_leaves_what_happened_before_it_anchored_at_the_other_side() {
    for (leaves, stays) in [(Side::Agent, Side::Gateway), (Side::Gateway, Side::Agent)] {
        // Nobody waits long for the last anchors: where the machine was held up just then, it is tried again.
        let mut attempts = 0;
        let (mut site, ours, other) = loop {
            attempts += 1;
            let (site, files, last, told) = stopped(leaves, stays).await;
            if last.is_ok() {
                break (site, files.0, files.1);
            }
            assert!(attempts < 10, "{leaves:?} ended at {last:?}: {told:#}");
        };
        if leaves == Side::Agent {
            deleted_and_begun_anew(&mut site, &ours, &other).await;
        }
    }
}

/// A site of which one side was stopped after a forward, that side's trail and what the other's was then, whether the end of
/// the forward was anchored there (or what was), and what `audit verify` says.
async fn stopped(leaves: Side, stays: Side) -> (Site, (PathBuf, PathBuf), Result<(), (u64, Option<u64>)>, Value) {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target).audit_setting("signing_key = \"{}-audit\"");
    let plan = plan.audit_setting("head_s = 3600").audit_setting("head_records = 100000");
    for key in ["gateway-audit", "agent-audit"] {
        plan.key(key);
    }
    let mut site = plan.start().await;
    echoes(connect(site.doors[0]).await, b"there and back").await;
    let end = seq(&site.record(leaves, json!({"event": "forward.ended"})).await);
    site.record(stays, json!({"event": "forward.ended"})).await;
    assert_eq!(site.program(leaves).stop().await, Some(0));
    // The other side's goes on.
    let other = site.path().join("other.jsonl");
    fs::copy(site.path().join(format!("{}.jsonl", stays.name())), &other).expect("copied");
    let ours = site.path().join(format!("{}.jsonl", leaves.name()));
    let (code, told) = verify(&[text(&ours), "--anchors", text(&other), "--compare", text(&other)]).await;
    assert_eq!(code, 0, "{told:#}");
    let by = |range: &&Value| range["by"] == text(&other);
    let anchored = told["trails"][0]["anchored"].as_array().expect("ranges").iter().find(by).cloned();
    let last = anchored.as_ref().and_then(|range| range["last"].as_u64());
    let covered = if last >= Some(end) { Ok(()) } else { Err((end, last)) };
    (site, (ours, other), covered, told)
}

/// The trail of an agent that was stopped is deleted, and the agent begins another.
async fn deleted_and_begun_anew(site: &mut Site, ours: &Path, other: &Path) {
    let old = site.path().join("old.jsonl");
    fs::rename(ours, &old).expect("moved");
    site.restart_agent().await;
    site.record(Side::Agent, json!({"event": "link.up"})).await;
    let given = [text(ours), "--anchors", text(other)];
    let (code, told) = verify(&given).await;
    assert_eq!((code, &told["findings"][0]["kind"]), (1, &json!("absent")), "{told:#}");
    let absent = &told["absent"][0];
    assert_eq!((&absent["missed"], &told["absent"][1]), (&json!(true), &Value::Null), "{told:#}");
    let id = absent["trail"].as_str().expect("an id");
    let (code, told) = verify(&[&given[..], &["--elsewhere", id]].concat()).await;
    assert_eq!((code, &told["absent"][0]["missed"]), (0, &json!(false)), "{told:#}");
    let (code, told) = verify(&[&given[..], &[text(&old)]].concat()).await;
    assert_eq!((code, &told["absent"]), (0, &json!([])), "{told:#}");
}

/// What is done to a trail shows, and where; afterwards it is as it was.
async fn tampered(path: &Path, given: &[&str]) {
    let good = fs::read(path).expect("a trail");
    let lines: Vec<&[u8]> = good.split_inclusive(|byte| *byte == b'\n').collect();
    let at = lines.iter().position(|line| line.windows(14).any(|part| part == b"\"forward.ended")).expect("an end");
    let changed = String::from_utf8_lossy(lines[at]).replace("\"reason\":\"eof\"", "\"reason\":\"eot\"").into_bytes();
    assert_ne!(changed, lines[at]);
    let edited = |line: &[u8]| [&lines[..at], &[line], &lines[at + 1..]].concat().concat();
    let removed = edited(b"");
    let swapped = [&lines[..at], &[lines[at + 1], lines[at]], &lines[at + 2..]].concat().concat();
    for (what, kind, bytes) in [
        ("edited", "altered", edited(&changed)),
        ("removed", "missing", removed),
        ("swapped", "", swapped),
        ("cut off", "truncated", lines[..3].concat()),
        ("cut in a record", "torn", good[..good.len() - 20].to_vec()),
    ] {
        fs::write(path, &bytes).expect("written");
        let (code, told) = verify(given).await;
        assert_eq!(code, 1, "{what}: {told:#}");
        let finding = &told["findings"][0];
        assert_eq!(finding["file"], text(path), "{what}");
        if kind == "altered" || kind == "missing" {
            assert_eq!((&finding["kind"], &finding["line"]), (&json!(kind), &json!(at + 1)), "{what}: {told:#}");
            let offset: usize = lines[..at].iter().map(|line| line.len()).sum();
            assert_eq!(finding["offset"], json!(offset), "{what}: {told:#}");
        } else if !kind.is_empty() {
            let kinds = told["findings"].as_array().expect("findings").iter().map(|finding| &finding["kind"]);
            assert!(kinds.into_iter().any(|found| found == kind), "{what}: {told:#}");
        }
    }
    fs::write(path, &good).expect("written");
}

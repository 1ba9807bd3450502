//! `caponier audit tail`, `query` and `schema`, on trails that the programs write and on files that nobody should have made.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use tokio::process::Command;

use crate::harness::{Program, Side, Site, caponier, connect, echo, echoes, eventually, read_to_end, run};

fn audit(arguments: &[&str]) -> Command {
    let mut command = caponier();
    command.arg("audit").args(arguments);
    command
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// A record of an hour that is long over.
fn line(minute: u32, event: &str, forward: &str) -> String {
    format!(
        "{{\"v\":1,\"time\":\"2026-01-02T03:{minute:02}:00.000Z\",\"event\":\"{event}\",\"side\":\"agent\",\
         \"forward\":\"{forward}\",\"target\":\"db:5432\"}}\n"
    )
}

fn append(path: &Path, text: &str) {
    let mut file = OpenOptions::new().append(true).create(true).open(path).expect("a file");
    file.write_all(text.as_bytes()).expect("written");
}

#[tokio::test]
async fn who_reached_what_is_found_on_both_sides() {
    let (allowed, denied) = (echo().await, echo().await);
    let site = Site::plan().allow(allowed).door(allowed).door(denied).start().await;
    for _ in 0..3 {
        let mut stream = connect(site.doors[0]).await;
        echoes(&mut stream, b"twelve bytes").await;
    }
    for _ in 0..2 {
        assert_eq!(read_to_end(connect(site.doors[1]).await).await, b"");
    }
    let mut running = connect(site.doors[0]).await;
    echoes(&mut running, b"still open").await;
    for side in [Side::Gateway, Side::Agent] {
        eventually("the ends of five forwards", async || {
            let ended = site.records(side, &json!({"event": "forward.ended"})).len();
            let refused = site.records(side, &json!({"event": "forward.denied"})).len();
            (ended == 3 && refused == 2).then_some(())
        })
        .await;
    }

    for side in [Side::Gateway, Side::Agent] {
        let trail = site.path().join(format!("{}.jsonl", side.name()));
        let trail = trail.to_str().expect("UTF-8");
        let found = async |arguments: &[&str]| {
            let said = run(audit(&["query"]).args(arguments).arg(trail)).await;
            assert_eq!(said.stderr, "", "{arguments:?}");
            said.done()
        };
        // JSON is what a program gets, and the records are the trail's own.
        let all = lines(&found(&[]).await);
        let known = site.trail(side);
        assert!(all.len() <= known.len() && known[..all.len()] == all[..], "{all:#?}");
        for (question, count) in [
            (&["--outcome", "ended"][..], 3),
            (&["--outcome", "denied"], 2),
            (&["--target", &allowed.to_string(), "--event", "forward.ended"], 3),
            (&["--target", &denied.to_string(), "--event", "forward.denied"], 2),
            (&["--target", &denied.to_string(), "--event", "forward.ended"], 0),
            (&["--principal", "provisioner", "--event", "forward.ended"], 3),
            (&["--principal", "somebody"], 0),
            (&["--since", "1h", "--outcome", "denied"], 2),
            (&["--until", "1h"], 0),
        ] {
            assert_eq!(lines(&found(question).await).len(), count, "{side:?} {question:?}");
        }
        let denial = site.records(side, &json!({"event": "forward.denied"})).remove(0);
        let id = denial["forward"].as_str().expect("an id");
        let one = lines(&found(&["--forward", id, "--outcome", "denied"]).await);
        assert_eq!(one, std::slice::from_ref(&denial));

        // One line for each forward, and no more.
        let csv = found(&["--event", "forward.*", "--format", "csv"]).await;
        let rows: Vec<&str> = csv.split("\r\n").filter(|row| !row.is_empty()).collect();
        assert!(rows[0].starts_with("began,time,duration_ms,side,event,outcome,"), "{csv}");
        let outcomes = |outcome: &str| rows.iter().filter(|row| row.contains(&format!(",{outcome},"))).count();
        assert_eq!((rows.len(), outcomes("ended"), outcomes("denied"), outcomes("open")), (7, 3, 2, 1), "{csv}");
        let table = found(&["--event", "forward.*", "--format", "table", "--outcome", "allowed"]).await;
        assert_eq!(table.lines().count(), 5, "{table}");
        assert!(table.starts_with("TIME ") && table.lines().all(|line| line.chars().count() <= 80), "{table}");
        assert!(table.contains("provisioner") && table.contains("24B"), "{table}");
        let events = lines(&found(&["--outcome", "denied", "--format", "ocsf"]).await);
        assert_eq!(events.len(), 2);
        assert!(events.iter().all(|event| event["class_uid"] == 4001), "{events:#?}");
    }
    drop(running);

    // One question to both trails, by the id that they share.
    let id = site.records(Side::Gateway, &json!({"event": "forward.ended"})).remove(0)["forward"].clone();
    let both = run(audit(&["query", "--json", "--event", "forward.ended", "--forward", id.as_str().expect("an id")])
        .args(["gateway.jsonl", "agent.jsonl"])
        .current_dir(site.path()))
    .await;
    let both = lines(&both.done());
    assert_eq!(both.iter().map(|record| &record["side"]).collect::<Vec<_>>(), ["gateway", "agent"]);
    assert_eq!(both[1]["peer_forward"], id);
    site.stop().await;
}

#[tokio::test]
async fn tail_goes_on_over_a_rotation() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("agent.jsonl");
    append(
        &path,
        &(line(1, "forward.open", "one") + &line(2, "forward.open", "two") + &line(3, "forward.open", "three")),
    );
    let said = run(audit(&["tail", "-n", "2", "--json"]).arg(&path)).await.done();
    assert_eq!(lines(&said).iter().map(|record| &record["forward"]).collect::<Vec<_>>(), ["two", "three"]);
    let said = run(audit(&["tail", "-n", "2", "--forward", "o*", "--format", "table"]).arg(&path)).await.done();
    assert!(said.lines().count() == 2 && said.contains("01-02 03:01"), "{said}");

    let mut command = audit(&["tail", "-f", "-n", "1", "--json"]);
    command.arg(&path);
    let mut tail = Program::start("tail", command, &folder.path().join("tail.log"));
    tail.says("\"three\"").await;
    append(&path, &line(4, "forward.ended", "three"));
    tail.says("03:04:00").await;
    fs::rename(&path, folder.path().join("agent.jsonl.20260102T030500Z-000000000000")).expect("renamed");
    append(&path, &line(5, "forward.open", "four"));
    tail.says("\"four\"").await;
    fs::write(&path, line(6, "forward.open", "x")).expect("cut");
    tail.says("was cut").await;
    tail.says("03:06:00").await;
    assert_eq!(tail.log().matches("\"forward\"").count(), 4, "{}", tail.log());
    assert_eq!(tail.stop().await, None);

    // It ends with whoever reads it, though nothing comes any more.
    let mut command = Command::new("bash");
    let program = audit(&[]).as_std().get_program().to_owned();
    command
        .args(["-c", "set -o pipefail; \"$0\" audit tail -f -n 1 --json \"$1\" | head -n 1"])
        .arg(program)
        .arg(&path);
    assert!(run(&mut command).await.done().contains("03:06:00"));
}

#[tokio::test]
async fn what_cannot_be_read_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    fs::write(
        path("torn.jsonl"),
        line(1, "forward.open", "f") + "{\"v\":1,\"ti\nno record\n" + &line(2, "forward.open", "g"),
    )
    .expect("written");
    fs::write(path("empty.jsonl"), "").expect("written");
    for (arguments, code, words) in [
        (&["query", "absent.jsonl"][..], 1, "there is no audit trail absent.jsonl"),
        (&["tail", "absent.jsonl"], 1, "there is no audit trail absent.jsonl"),
        (&["tail", "-f", "."], 1, "is a directory"),
        (&["query", "."], 1, "is a directory"),
        (&["query", "torn.jsonl"], 1, "2 lines are no records and had to be passed over, the first at byte"),
        (&["tail", "torn.jsonl"], 1, "2 lines are no records"),
        (&["query", "empty.jsonl"], 0, ""),
        (&["tail", "empty.jsonl"], 0, ""),
        (&["query"], 2, "FILE"),
        (&["query", "--since", "soon", "torn.jsonl"], 2, "a time such as 2h (ago)"),
        (&["query", "--since", "1h", "--until", "2h", "torn.jsonl"], 2, "is not before"),
        (&["query", "--outcome", "won", "torn.jsonl"], 2, "allowed, open, ended"),
        (&["query", "--format", "xml", "torn.jsonl"], 2, "csv"),
    ] {
        let said = run(audit(arguments).current_dir(folder.path())).await;
        assert_eq!(said.code(), code, "{arguments:?}: {said:?}");
        assert!(said.stderr.contains(words), "{arguments:?}: {said:?}");
    }
    // What could be read is told all the same.
    let said = run(audit(&["query", "torn.jsonl"]).current_dir(folder.path())).await;
    assert_eq!(lines(&said.stdout).len(), 2);
    // A file that is not for us: root can read it all the same, unless it lays that down before it
    // starts. (As another user it would be a copy of the program: one that another test's child,
    // forked while the copy was written, still holds open for writing cannot be started.)
    fs::set_permissions(path("torn.jsonl"), std::os::unix::fs::PermissionsExt::from_mode(0o000)).expect("closed");
    let query = audit(&["query", "torn.jsonl"]);
    let mut closed = Command::new("setpriv");
    if rustix::process::geteuid().is_root() {
        closed.args(["--bounding-set", "-dac_override,-dac_read_search"]);
    }
    closed.arg(query.as_std().get_program()).args(query.as_std().get_args()).current_dir(folder.path());
    let said = run(&mut closed).await;
    assert_eq!((said.code(), said.stderr.contains("run this as the user that writes it")), (1, true), "{said:?}");
}

#[tokio::test]
async fn a_reader_that_leaves_is_no_failure_and_a_full_disk_is_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("agent.jsonl");
    append(&path, &line(1, "forward.open", "f").repeat(20_000));
    let program = audit(&[]).as_std().get_program().to_owned();
    for format in ["json", "csv", "table", "ocsf"] {
        let script = format!("set -o pipefail; \"$0\" audit query --each --format {format} \"$1\" | head -n 1");
        let said = run(Command::new("bash").args(["-c", &script]).arg(&program).arg(&path)).await;
        assert_eq!((said.code(), said.stderr.as_str(), said.stdout.lines().count()), (0, "", 1), "{format}");
        let script = format!("\"$0\" audit query --each --format {format} \"$1\" >/dev/full");
        let said = run(Command::new("bash").args(["-c", &script]).arg(&program).arg(&path)).await;
        assert_eq!(said.code(), 1, "{format}: {said:?}");
        assert!(said.stderr.contains("could not write the answer to standard output"), "{format}: {said:?}");
    }
    let script = "\"$0\" audit query --forward f - <\"$1\" | wc -l";
    let said = run(Command::new("bash").args(["-c", script]).arg(&program).arg(&path)).await;
    assert_eq!(said.done().trim(), "20000");
}

#[tokio::test]
async fn the_schema_is_printed_in_two_forms() {
    let schema: Value = serde_json::from_str(&run(&mut audit(&["schema"])).await.done()).expect("JSON");
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    let markdown = run(&mut audit(&["schema", "--markdown"])).await.done();
    assert!(markdown.contains("| `forward.open` |") && markdown.contains("| `prev` |"), "{markdown}");
}

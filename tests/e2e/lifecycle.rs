//! What happens when things stop, fail and change: restarts, kills, a registry under way, a trail that cannot be written.

use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use caponier::limits;
use rustix::fs::OFlags;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::harness::{
    AGENT, Program, Side, Site, assert_balanced, caponier, connect, echo, echoes, eventually, free_port, read_to_end,
    run,
};

/// A new connection to a loopback door carries bytes, now or soon.
async fn serves_again(door: SocketAddr) {
    eventually("the door serves again", async || {
        let mut stream = TcpStream::connect(door).await.ok()?;
        stream.write_all(b"again").await.ok()?;
        let mut back = [0; 5];
        // A refusal is a reset.
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut back).await.ok()?;
        assert_eq!(&back, b"again");
        Some(())
    })
    .await;
}

/// A new connection to a loopback door is closed without a byte.
async fn refuses(door: SocketAddr) {
    assert_eq!(read_to_end(connect(door).await).await, b"", "the door is open");
}

#[tokio::test]
async fn sigterm_ends_both_sides_in_order_with_forwards_open() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"still open").await;
    assert_eq!(site.program(Side::Gateway).stop().await, Some(1));
    assert_eq!(read_to_end(&mut stream).await, b"");
    assert_balanced(Side::Gateway, &site.trail(Side::Gateway));
    site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "drained", "to_target": 10})).await;
    site.record(Side::Agent, json!({"event": "forward.ended"})).await;
    assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    assert_balanced(Side::Agent, &site.trail(Side::Agent));
    for side in [Side::Gateway, Side::Agent] {
        let mode = fs::metadata(site.path().join(format!("{}.jsonl", side.name()))).expect("a trail").permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
    }
    assert!(!site.admin_socket().exists(), "the admin socket is left behind");

    // And in the other order.
    site.restart_gateway().await;
    site.restart_agent().await;
    site.linked().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"still open").await;
    assert_eq!(site.program(Side::Agent).stop().await, Some(1));
    assert_eq!(read_to_end(&mut stream).await, b"");
    site.record(Side::Agent, json!({"event": "forward.ended", "reason": "drained"})).await;
    assert_balanced(Side::Agent, &site.trail(Side::Agent));
    // The agent cuts the forward, then the link: what the gateway sees first is what it says.
    let ended = eventually("the second ending", async || {
        site.records(Side::Gateway, &json!({"event": "forward.ended"})).into_iter().nth(1)
    })
    .await;
    assert!(
        ["agent_drained", "link_lost", "target_broke"].contains(&ended["reason"].as_str().expect("a reason")),
        "{ended}"
    );
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
}

#[tokio::test]
async fn the_agent_links_again_after_the_gateway_was_away() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let first = site.program(Side::Agent).pid();
    for _ in 0..2 {
        assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
        site.restart_gateway().await;
        site.program(Side::Gateway).says(" linked ").await;
        echoes(connect(site.doors[0]).await, b"linked again").await;
    }
    assert_eq!(site.program(Side::Agent).pid(), first);
    // Each link's beginning and end is on record on both sides.
    for (side, downs) in [(Side::Gateway, "drained"), (Side::Agent, "closed")] {
        assert_eq!(site.records(side, &json!({"event": "link.up"})).len(), 3);
        let ended = site.records(side, &json!({"event": "link.down"}));
        assert_eq!(ended.len(), 2);
        assert_eq!(ended[0]["reason"], downs);
    }
    site.stop().await;
}

#[tokio::test]
async fn a_killed_side_closes_its_trail_at_its_next_start() {
    let target = echo().await;
    for (killed, other) in [(Side::Agent, Side::Gateway), (Side::Gateway, Side::Agent)] {
        let mut site = Site::plan().allow(target).door(target).start().await;
        let mut stream = connect(site.doors[0]).await;
        echoes(&mut stream, b"before the kill").await;
        let open = site.records(killed, &json!({"event": "forward.open"})).pop().expect("an opening");
        site.program(killed).kill().await;
        assert_eq!(read_to_end(&mut stream).await, b"");
        // The other side has seen it end, and says why.
        site.record(other, json!({"event": "forward.ended", "reason": "link_lost", "to_target": 15})).await;
        // A line that was torn in the middle is no obstacle.
        let file = site.path().join(format!("{}.jsonl", killed.name()));
        let mut trail = fs::OpenOptions::new().append(true).open(&file).expect("a trail");
        std::io::Write::write_all(&mut trail, b"{\"time\":\"2026-").expect("written");
        drop(trail);
        match killed {
            Side::Agent => site.restart_agent().await,
            Side::Gateway => site.restart_gateway().await,
        }
        let records = records_of_torn_file(&file);
        let at = |like: &str| records.iter().position(|record| record["event"] == like).expect(like);
        let abandoned = &records[at("forward.abandoned")];
        assert_eq!(abandoned["forward"], open["forward"]);
        assert_eq!(abandoned["reason"], "writer_ended");
        assert_eq!(abandoned["target"], open["target"]);
        let recovered = &records[at("trail.recovered")];
        assert_eq!(recovered["forwards"], 1);
        assert!(recovered["torn_at"].is_u64(), "{recovered}");
        assert_eq!(recovered["torn"], "t9NBsENhh5OnAj8xRS_iwK1ev7fpYUml9zLzy87YqKY");
        assert!(at("forward.abandoned") < at("trail.recovered"));
        serves_again(site.doors[0]).await;
        for side in [killed, other] {
            assert_eq!(site.program(side).stop().await, Some(0));
        }
        assert_balanced(killed, &records_of_torn_file(&file));
        assert_balanced(other, &site.trail(other));
    }
}

/// The records of a trail in which one line was torn.
fn records_of_torn_file(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).expect("a trail");
    let lines: Vec<_> = text.lines().collect();
    let records: Vec<Value> = lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(records.len() + 1, lines.len(), "one line is torn, and no more: {text}");
    records
}

#[tokio::test]
async fn a_revoked_key_cuts_its_sessions_and_forwards_and_no_others() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    for name in ["second", "third"] {
        plan.key(name);
    }
    plan.registry().key("acme/principals/provisioner", "second", &plan.public("second"));
    plan.registry().key("acme/principals/other", "one", &plan.public("third"));
    plan.registry().about("acme/principals/other", "agents = [\"prod-eu\"]");
    let site = plan.start().await;
    let mut through = Vec::new();
    for key in ["provisioner", "second", "third"] {
        let port = free_port();
        let ssh = site.ssh_as(key, AGENT, &["-v", "-N", "-L", &format!("127.0.0.1:{port}:{target}")]);
        let mut ssh = site.background(&format!("ssh-{key}"), ssh);
        ssh.says("Entering interactive session").await;
        let mut stream = connect(SocketAddr::from(([127, 0, 0, 1], port))).await;
        echoes(&mut stream, key.as_bytes()).await;
        through.push((ssh, stream));
    }
    let mut door = connect(site.doors[0]).await;
    echoes(&mut door, b"door").await;

    site.registry().about_key("acme/principals/provisioner", "second", "revoked = true");
    let (mut ssh, mut stream) = through.remove(1);
    assert_eq!(ssh.ended().await.code(), Some(255));
    assert_eq!(read_to_end(&mut stream).await, b"");
    let ended = site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "revoked"})).await;
    let fingerprint = run(Command::new("ssh-keygen").arg("-lf").arg(site.path().join("second"))).await.done();
    assert_eq!(ended["key"].as_str(), fingerprint.split(' ').nth(1));
    site.record(Side::Gateway, json!({"event": "registry.reloaded"})).await;
    for (_, stream) in &mut through {
        echoes(stream, b"untouched").await;
    }
    echoes(&mut door, b"untouched").await;

    // A narrower grant cuts what it no longer covers, at every door.
    site.registry().about("acme/principals/provisioner", "agents = [\"prod-*\"]\ntargets = [\"127.0.0.1:1\"]");
    let (mut ssh, mut stream) = through.remove(0);
    assert_eq!(read_to_end(&mut stream).await, b"");
    assert_eq!(read_to_end(&mut door).await, b"");
    assert!(!ssh.has_ended(), "the session itself is still allowed");
    eventually("three revoked forwards", async || {
        (site.records(Side::Gateway, &json!({"event": "forward.ended", "reason": "revoked"})).len() == 3).then_some(())
    })
    .await;
    refuses(site.doors[0]).await;

    // A principal that is gone is cut off altogether.
    fs::remove_file(site.registry().folder("acme/principals/other.toml")).expect("removed");
    fs::remove_dir_all(site.registry().folder("acme/principals/other")).expect("removed");
    let (mut other, mut stream) = through.remove(0);
    assert_eq!(other.ended().await.code(), Some(255));
    assert_eq!(read_to_end(&mut stream).await, b"");
    assert!(!ssh.has_ended());
    drop(ssh);
    site.stop().await;
}

#[tokio::test]
async fn a_removed_agent_key_cuts_the_link_and_a_second_one_does_not() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.key("other");
    plan.registry().key("acme/agents/prod-eu", "other", &plan.public("other"));
    let mut site = plan.start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"linked").await;
    // A key that is not the link's own.
    fs::remove_file(site.registry().folder("acme/agents/prod-eu/other.pub")).expect("removed");
    site.record(Side::Gateway, json!({"event": "registry.reloaded"})).await;
    echoes(&mut stream, b"linked").await;

    let key = site.registry().folder("acme/agents/prod-eu/one.pub");
    fs::remove_file(&key).expect("removed");
    assert_eq!(read_to_end(&mut stream).await, b"");
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "revoked"})).await;
    let line = site.program(Side::Agent).says("not linked").await;
    assert!(line.contains("closed the connection after key exchange, before login"), "{line}");
    assert!(line.contains("is not registered there for acme/prod-eu"), "{line}");
    let refused = site.record(Side::Gateway, json!({"event": "auth.refused", "agent": "prod-eu"})).await;
    assert!(["unknown_key", "unknown_agent"].contains(&refused["reason"].as_str().expect("a reason")), "{refused}");
    refuses(site.doors[0]).await;

    site.registry().key("acme/agents/prod-eu", "one", &site.public("agent"));
    serves_again(site.doors[0]).await;
    site.stop().await;
}

#[tokio::test]
async fn a_broken_registry_leaves_the_last_good_state_in_force() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.key("newcomer");
    let mut site = plan.start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    let registry = site.registry();
    // A newcomer who is in order, and in the same state a file that is not: all or nothing.
    registry.key("acme/principals/provisioner", "broken", "this is no key");
    registry.key("acme/principals/provisioner", "newcomer", &site.public("newcomer"));
    let rejected = site.record(Side::Gateway, json!({"event": "registry.rejected"})).await;
    assert!(rejected["detail"].as_str().expect("a detail").contains("broken.pub"), "{rejected}");
    let line = site.program(Side::Gateway).says("the last good state stays in force").await;
    assert!(line.contains("broken.pub"), "{line}");
    echoes(&mut stream, b"meanwhile").await;
    echoes(connect(site.doors[0]).await, b"anew").await;
    let ask = async |key: &str| run(&mut site.ssh_as(key, AGENT, &["-W", &target.to_string()])).await.code();
    assert_eq!(ask("provisioner").await, 0);
    assert_eq!(ask("newcomer").await, 255);

    fs::remove_file(registry.folder("acme/principals/provisioner/broken.pub")).expect("removed");
    site.record(Side::Gateway, json!({"event": "registry.reloaded"})).await;
    assert_eq!(ask("newcomer").await, 0);
    echoes(&mut stream, b"and after").await;
    drop(stream);
    site.stop().await;
}

/// The reading end of a trail that goes to a named pipe.
struct Pipe(fs::File);

impl Pipe {
    fn open(dir: &Path) -> Self {
        let path = dir.join("trail.pipe");
        if !path.exists() {
            assert!(std::process::Command::new("mkfifo").arg(&path).status().expect("mkfifo runs").success());
        }
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        Self(fs::OpenOptions::new().read(true).custom_flags(flags).open(path).expect("a pipe"))
    }

    /// The records that have come since the last call.
    fn read(&mut self) -> Vec<Value> {
        let mut text = Vec::new();
        // What would block, ends the reading.
        let _ = self.0.read_to_end(&mut text);
        let text = String::from_utf8(text).expect("UTF-8");
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }
}

#[tokio::test]
async fn nothing_opens_while_the_gateway_cannot_record_and_running_forwards_end_after_the_grace() {
    fails_to_record(Side::Gateway).await;
}

#[tokio::test]
async fn nothing_opens_while_the_agent_cannot_record_and_running_forwards_end_after_the_grace() {
    fails_to_record(Side::Agent).await;
}

async fn fails_to_record(side: Side) {
    let (target, quiet) = (echo().await, echo().await);
    let plan = Site::plan().allow(target).allow(quiet).door(target).door(quiet).trail_to_pipe(side);
    let mut pipe = Pipe::open(plan.path());
    let mut site = plan.start().await;
    let mut running = connect(site.doors[0]).await;
    echoes(&mut running, b"recorded").await;
    let opened = pipe.read();
    let opened = opened.iter().find(|record| record["event"] == "forward.open").expect("an opening").clone();

    drop(pipe);
    let failed = std::time::Instant::now();
    refuses(site.doors[1]).await;
    site.program(side).says("the audit trail cannot be written").await;
    let said = run(&mut site.ssh(&["-W", &quiet.to_string()])).await;
    assert_eq!(said.code(), 255, "{said:?}");
    if side == Side::Agent {
        // The gateway's own trail tells what the agent could not.
        site.record(Side::Gateway, json!({"event": "forward.failed", "reason": "agent_unrecorded"})).await;
    }
    echoes(&mut running, b"within the grace").await;
    assert_eq!(read_to_end(&mut running).await, b"");
    assert!(failed.elapsed() >= limits::TRAIL_FAILURE_GRACE, "ended after {:?}", failed.elapsed());

    // When it works again, so do the doors, and the gap is on record.
    let mut pipe = Pipe::open(site.path());
    serves_again(site.doors[1]).await;
    let records = pipe.read();
    // What had its number when the pipe broke comes first: a record that somebody was told will not be accepted.
    let at = records.iter().position(|record| record["event"] == "trail.resumed").expect("the gap");
    let resumed = &records[at];
    assert!(resumed["lost"].as_u64().expect("how many") >= 1, "{resumed}");
    let early = records[..at].iter().filter(|record| record["event"] == "forward.open");
    for open in early {
        let ends = records[at..].iter().filter(|record| record["forward"] == open["forward"]);
        assert_eq!(ends.map(|record| &record["reason"]).collect::<Vec<_>>(), [&json!("trail_failed")], "{records:#?}");
    }
    let ended = records.iter().find(|record| record["forward"] == opened["forward"]).expect("the ending was kept");
    assert_eq!((&ended["event"], &ended["reason"]), (&json!("forward.ended"), &json!("audit_failed")));
    // Of what was refused meanwhile, the target has seen nothing.
    let other = if side == Side::Agent { Side::Gateway } else { Side::Agent };
    let opens = site.records(other, &json!({"event": "forward.open", "target": quiet.to_string()}));
    let reached = opens.iter().filter(|record| record["time"].as_str() < resumed["time"].as_str()).count();
    match side {
        Side::Gateway => assert_eq!(reached, 0, "the agent was not asked: {opens:#?}"),
        Side::Agent => assert!(reached >= 1),
    }
    drop(pipe.read());
    site.stop().await;
}

#[tokio::test]
async fn nothing_opens_after_a_trail_file_was_removed() {
    let target = echo().await;
    for side in [Side::Gateway, Side::Agent] {
        let mut site = Site::plan().allow(target).door(target).start().await;
        serves_again(site.doors[0]).await;
        fs::remove_file(site.path().join(format!("{}.jsonl", side.name()))).expect("removed");
        refuses(site.doors[0]).await;
        let line = site.program(side).says("the audit trail cannot be written").await;
        assert!(line.contains("the file was removed"), "{line}");
        let said = run(&mut site.ssh(&["-W", &target.to_string()])).await;
        assert_eq!(said.code(), 255, "{said:?}");
        refuses(site.doors[0]).await;
    }
}

#[tokio::test]
async fn a_full_device_stops_a_start() {
    let plan = Site::plan();
    let mut site = plan.start_gateway().await;
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    let config = fs::read_to_string(site.config(Side::Gateway)).expect("a configuration");
    fs::write(site.config(Side::Gateway), config.replace("file = \"gateway.jsonl\"", "stdout = true"))
        .expect("written");
    let line = format!("exec '{}' gateway --config gateway.toml >/dev/full", env!("CARGO_BIN_EXE_caponier"));
    let said = run(Command::new("sh").args(["-c", &line]).current_dir(site.path())).await;
    assert_eq!(said.code(), 1, "{said:?}");
    assert!(said.stderr.contains("could not start the audit trail"), "{said:?}");
    assert!(said.stderr.contains("No space left on device"), "{said:?}");
}

#[tokio::test]
async fn a_link_is_replaced_before_it_is_worn_and_no_forward_notices() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    let mut lasting = connect(site.doors[0]).await;
    echoes(&mut lasting, b"on the first link").await;
    let share = usize::try_from(limits::OPENS_PER_LINK).expect("a number") / 4 + 50;
    let total = share * 4;
    let work = async || {
        for number in 0..share {
            let mut stream = connect(site.doors[0]).await;
            echoes(&mut stream, format!("{number}").as_bytes()).await;
            stream.shutdown().await.expect("shut down");
            assert_eq!(read_to_end(&mut stream).await, b"", "a forward failed");
        }
    };
    tokio::join!(work(), work(), work(), work());
    assert_eq!(site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 2);
    echoes(&mut lasting, b"and still there").await;
    let states = |rows: &Value| -> Vec<Value> {
        rows.as_array().expect("an array").iter().map(|row| row["state"].clone()).collect()
    };
    assert_eq!(states(&agents(&site).await), [json!("retired"), json!("active")]);
    drop(lasting);
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "replaced"})).await;
    eventually("one link in the roster", async || (states(&agents(&site).await) == [json!("active")]).then_some(()))
        .await;
    for side in [Side::Gateway, Side::Agent] {
        eventually("all endings", async || {
            (site.records(side, &json!({"event": "forward.ended", "reason": "eof"})).len() == total + 1).then_some(())
        })
        .await;
        assert_eq!(site.records(side, &json!({"event": "forward.failed"})).len(), 0);
    }
    site.stop().await;
}

/// What `caponier agents --json` says.
async fn agents(site: &Site) -> Value {
    let said = run(caponier().arg("agents").arg("--socket").arg(site.admin_socket()).arg("--json")).await;
    serde_json::from_str(&said.done()).expect("JSON")
}

#[tokio::test]
async fn the_admin_socket_tells_its_owner_who_is_linked() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mode = fs::metadata(site.admin_socket()).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"live").await;
    let rows = agents(&site).await;
    let row = &rows[0];
    assert_eq!(rows.as_array().map(Vec::len), Some(1), "{rows}");
    for (field, value) in [
        ("organisation", json!("acme")),
        ("agent", json!("prod-eu")),
        ("replica", json!("one")),
        ("version", json!(env!("CARGO_PKG_VERSION"))),
        ("live", json!(1)),
        ("opened", json!(1)),
        ("state", json!("active")),
    ] {
        assert_eq!(row[field], value, "{field} of {row}");
    }
    let fingerprint = run(Command::new("ssh-keygen").arg("-lf").arg(site.path().join("agent"))).await.done();
    assert_eq!(row["key"].as_str(), fingerprint.split(' ').nth(1));
    let table = run(caponier().arg("agents").arg("--socket").arg(site.admin_socket())).await.done();
    assert!(table.starts_with("AGENT") && table.contains(AGENT), "{table}");
    // The one agent, and it is done.
    let told = run(caponier().args(["agents", "--handshakes", "--socket"]).arg(site.admin_socket())).await.done();
    assert_eq!(serde_json::from_str::<Value>(&told).expect("JSON"), json!({"now": 0, "most": 1, "barred": []}));

    drop(stream);
    site.record(Side::Agent, json!({"event": "forward.ended"})).await;
    assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    eventually("an absent agent", async || (agents(&site).await[0]["state"] == "absent").then_some(())).await;
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    let said = run(caponier().arg("agents").arg("--socket").arg(site.admin_socket())).await;
    assert_eq!(said.code(), 1);
    assert!(said.stderr.contains("could not reach a gateway"), "{said:?}");
}

#[tokio::test]
async fn a_second_process_does_not_take_over_what_the_first_holds() {
    let mut site = Site::plan().start().await;
    // The trail is locked, the admin socket answers, the port is taken: whichever is met first, the first one lives on.
    for side in [Side::Gateway, Side::Agent] {
        let mut command = caponier();
        command.arg(side.name()).arg("--config").arg(site.config(side));
        let mut second = Program::start("second", command, &site.path().join("second.log"));
        assert_eq!(second.ended().await.code(), Some(1), "{}", second.log());
        assert!(!site.program(side).has_ended());
    }
    assert_eq!(agents(&site).await.as_array().map(Vec::len), Some(1));
    site.stop().await;
}

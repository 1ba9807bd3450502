//! Collectors of the trail over a network: a real syslog server, and an HTTPS collector that answers what a test wants.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use caponier::audit::chain::{Link, Linked};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::harness::{Plan, Program, Side, Site, connect, echo, echoes, eventually, free_port};
use crate::pki::{Authority, Leaf};

/// An authority and a collector's certificate for 127.0.0.1, in the site's folder.
fn certificates(dir: &Path) {
    Authority::new(dir, "ca").sign("collector", &Leaf::new("127.0.0.1", 1));
    Authority::new(dir, "other");
}

/// Starts the HTTPS collector.
async fn collector(site_or_plan: &Path, port: u16) -> Program {
    let mut command = Command::new("python3");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/collector.py")).arg(port.to_string());
    command.args(["collector.pem", "collector.key"]).arg(site_or_plan).current_dir(site_or_plan);
    let mut program = Program::start("collector", command, &site_or_plan.join("collector.log"));
    program.says("collecting").await;
    program
}

fn answer(dir: &Path, answer: &str) {
    fs::write(dir.join("answer.new"), answer).expect("written");
    fs::rename(dir.join("answer.new"), dir.join("answer")).expect("in its place");
}

/// A site whose gateway has this sink besides its file.
fn plan(target: SocketAddr, sink: &str) -> Plan {
    let plan =
        Site::plan().allow(target).door(target).gateway_table(&format!("[[audit.sink]]\nname = \"siem\"\n{sink}"));
    certificates(plan.path());
    let token = plan.path().join("token");
    fs::write(&token, "hunter2\n").expect("written");
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(&token, private).expect("a mode");
    answer(plan.path(), "200");
    plan
}

fn https(port: u16, more: &str) -> String {
    format!(
        "kind = \"https\"\nurl = \"https://127.0.0.1:{port}/in\"\nca_file = \"ca.pem\"\ntoken_file = \"token\"\nbatch_ms = 0\n{more}"
    )
}

/// Waits until the collector's copy is what the gateway's file holds, line by line and linked.
async fn same_as_the_file(dir: &Path) {
    eventually("the collector's copy is the file", async || {
        let received = fs::read_to_string(dir.join("received")).unwrap_or_default();
        let file = fs::read_to_string(dir.join("gateway.jsonl")).expect("a trail");
        (received == file && file.contains("trail.stopped")).then_some(())
    })
    .await;
    let received = fs::read(dir.join("received")).expect("what was received");
    let mut before: Option<Link> = None;
    for line in received.split_inclusive(|byte| *byte == b'\n') {
        let linked = Linked::read(line).expect("a record");
        assert!(before.is_none_or(|before| before == linked.prev), "{}", String::from_utf8_lossy(line));
        before = Some(Link::of(line));
    }
}

/// Whether the door opens a forward now.
async fn opens(door: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(door).await else { return false };
    let mut back = [0; 4];
    stream.write_all(b"ping").await.is_ok() && stream.read_exact(&mut back).await.is_ok() && &back == b"ping"
}

#[tokio::test]
async fn a_required_collector_is_waited_for_and_gets_everything_once_it_is_back() {
    let (target, port) = (echo().await, free_port());
    let plan = plan(target, &https(port, "required = true"));
    let dir = plan.path().to_owned();
    let mut program = collector(&dir, port).await;
    let mut site = plan.start().await;
    let door = site.doors[0];
    echoes(TcpStream::connect(door).await.expect("a door"), b"recorded").await;

    // It says no, in every way: nothing opens, and what is asked for is asked for again under the same name.
    for refusal in ["500", "redirect"] {
        answer(&dir, refusal);
        assert!(!opens(door).await, "a forward without its record: {refusal}");
        answer(&dir, "200");
        eventually("forwards open again", async || opens(door).await.then_some(())).await;
    }
    // It is gone.
    program.kill().await;
    assert!(!opens(door).await, "a forward without its record");
    program = collector(&dir, port).await;
    eventually("forwards open again", async || opens(door).await.then_some(())).await;

    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    same_as_the_file(&dir).await;
    let asked = fs::read_to_string(dir.join("asked")).expect("what was asked");
    assert!(!asked.contains("elsewhere"), "a redirect was followed: {asked}");
    let refused: Vec<_> = asked.lines().filter(|line| line.starts_with("500 ")).collect();
    let name = refused.first().and_then(|line| line.split(' ').nth(1)).expect("a refused request");
    assert!(asked.contains(&format!("200 {name} /in")), "it did not come again as it was: {asked}");
    drop(program);
}

#[tokio::test]
async fn a_collector_that_is_not_required_holds_nothing_up_and_its_failure_is_on_record() {
    let (target, port) = (echo().await, free_port());
    let plan = plan(target, &https(port, ""));
    let dir = plan.path().to_owned();
    let mut site = plan.start().await;
    let failed = site.record(Side::Gateway, json!({"event": "sink.failed", "sink": "siem"})).await;
    assert_eq!(failed["reason"], "connect_failed", "{failed}");
    echoes(TcpStream::connect(site.doors[0]).await.expect("a door"), b"all the same").await;
    // A wrong token is told as one, and mended by the collector.
    let mut program = collector(&dir, port).await;
    site.record(Side::Gateway, json!({"event": "sink.works", "sink": "siem", "lost": 0})).await;
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    same_as_the_file(&dir).await;
    assert!(!program.has_ended());
}

#[tokio::test]
async fn a_collector_that_cannot_prove_its_name_gets_nothing() {
    let (target, port) = (echo().await, free_port());
    for (ca, host) in [("other.pem", "127.0.0.1"), ("ca.pem", "localhost")] {
        let sink = format!(
            "kind = \"https\"\nurl = \"https://{host}:{port}/in\"\nca_file = \"{ca}\"\ntoken_file = \"token\"\nbatch_ms = 0"
        );
        let plan = plan(target, &sink);
        let dir = plan.path().to_owned();
        let program = collector(&dir, port).await;
        let site = plan.start().await;
        let failed = site.record(Side::Gateway, json!({"event": "sink.failed", "sink": "siem"})).await;
        assert_eq!(failed["reason"], "tls_failed", "{failed}");
        assert!(!dir.join("asked").exists(), "something was sent");
        site.stop().await;
        drop(program);
    }
}

#[tokio::test]
async fn rsyslog_gets_the_trail_over_tls() {
    let (target, port) = (echo().await, free_port());
    let sink =
        format!("kind = \"syslog\"\nto = \"tls://127.0.0.1:{port}\"\nca_file = \"ca.pem\"\nhostname = \"bastion\"");
    let plan = plan(target, &sink);
    let dir = plan.path().to_owned();
    let config = format!(
        "global(workDirectory=\"{dir}\" maxMessageSize=\"128k\" parser.escapeControlCharactersOnReceive=\"off\"\n\
         DefaultNetstreamDriver=\"gtls\" DefaultNetstreamDriverCAFile=\"{dir}/ca.pem\"\n\
         DefaultNetstreamDriverCertFile=\"{dir}/collector.pem\" DefaultNetstreamDriverKeyFile=\"{dir}/collector.key\")\n\
         module(load=\"imtcp\" StreamDriver.Name=\"gtls\" StreamDriver.Mode=\"1\" StreamDriver.Authmode=\"anon\")\n\
         template(name=\"record\" type=\"string\" string=\"%msg%\\n\")\n\
         template(name=\"header\" type=\"string\" string=\"%pri% %hostname% %app-name% %msgid%\\n\")\n\
         ruleset(name=\"trail\") {{\n\
         action(type=\"omfile\" file=\"{dir}/received\" template=\"record\")\n\
         action(type=\"omfile\" file=\"{dir}/headers\" template=\"header\") }}\n\
         input(type=\"imtcp\" port=\"{port}\" address=\"127.0.0.1\" ruleset=\"trail\")\n",
        dir = dir.display()
    );
    fs::write(dir.join("rsyslog.conf"), config).expect("written");
    let mut command = Command::new("/usr/sbin/rsyslogd");
    command.arg("-n").arg("-f").arg(dir.join("rsyslog.conf")).arg("-i").arg(dir.join("rsyslog.pid"));
    let server = Program::start("rsyslogd", command, &dir.join("rsyslog.log"));
    drop(connect(SocketAddr::from(([127, 0, 0, 1], port))).await);
    let mut site = plan.start().await;
    echoes(TcpStream::connect(site.doors[0]).await.expect("a door"), b"recorded").await;
    eventually("rsyslog has it", async || {
        let received = fs::read_to_string(dir.join("received")).unwrap_or_default();
        received.contains("forward.ended").then_some(())
    })
    .await;
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    same_as_the_file(&dir).await;
    let headers = fs::read_to_string(dir.join("headers")).expect("headers");
    // 13 * 8 + 6.
    assert!(headers.contains("110 bastion caponier forward.open\n"), "{headers}");
    drop(server);
}

#[tokio::test]
async fn a_change_of_the_registry_is_on_record_by_fingerprints() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    site.key("second");
    site.registry().key("acme/principals/provisioner", "two", &site.public("second"));
    let added = site.record(Side::Gateway, json!({"event": "registry.reloaded"})).await;
    let added = added["changes"]["added"][0].as_str().expect("what was added").to_owned();
    assert!(added.starts_with("key SHA256:") && added.ends_with(" of principal acme/provisioner"), "{added}");
    site.registry().about_key("acme/principals/provisioner", "two", "revoked = true");
    let revoked = eventually("the revocation is on record", async || {
        let records = site.records(Side::Gateway, &json!({"event": "registry.reloaded"}));
        records.into_iter().find(|record| record["changes"].get("removed").is_some())
    })
    .await;
    assert_eq!(revoked["changes"], json!({"removed": [added], "added": [format!("revoked {added}")]}));
    site.stop().await;
}

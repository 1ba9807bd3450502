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
use crate::squid::{PASSWORD, Squid, USER};
use crate::{health, watched};

/// An authority and a collector's certificate for 127.0.0.1, in the site's folder.
fn certificates(dir: &Path) {
    Authority::new(dir, "ca").sign("collector", &Leaf::new("127.0.0.1", 1));
    Authority::new(dir, "other");
}

/// Starts the HTTPS collector.
async fn collector(site_or_plan: &Path, port: u16) -> Program {
    collector_that(site_or_plan, port, &[]).await
}

/// Starts one that wants its clients to have a certificate of `clients.pem`.
async fn demanding(site_or_plan: &Path, port: u16) -> Program {
    collector_that(site_or_plan, port, &["clients.pem"]).await
}

async fn collector_that(site_or_plan: &Path, port: u16, more: &[&str]) -> Program {
    let mut command = Command::new("python3");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/collector.py")).arg(port.to_string());
    command.args(["collector.pem", "collector.key"]).arg(site_or_plan).args(more).current_dir(site_or_plan);
    let mut program = Program::start("collector", command, &site_or_plan.join("collector.log"));
    program.says("collecting").await;
    program
}

fn answer(dir: &Path, answer: &str) {
    put(dir, "answer", answer);
}

/// Puts a file that nobody else can read in its place at once.
fn put(dir: &Path, name: &str, text: &str) {
    let fresh = dir.join(format!("{name}.new"));
    fs::write(&fresh, text).expect("written");
    fs::set_permissions(&fresh, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("a mode");
    fs::rename(fresh, dir.join(name)).expect("in its place");
}

/// A site whose gateway has this sink besides its file.
fn plan(target: SocketAddr, sink: &str) -> Plan {
    let plan =
        Site::plan().allow(target).door(target).gateway_table(&format!("[[audit.sink]]\nname = \"siem\"\n{sink}"));
    certificates(plan.path());
    put(plan.path(), "token", "hunter2\n");
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

/// Waits until the collector has a forward to its end, and looks that what it has so far is what the file has.
async fn gets_a_forward(site: &Site, dir: &Path) {
    echoes(TcpStream::connect(site.doors[0]).await.expect("a door"), b"recorded").await;
    let received = eventually("the collector has it", async || {
        fs::read_to_string(dir.join("received")).ok().filter(|received| received.contains("forward.ended"))
    })
    .await;
    let file = fs::read_to_string(dir.join("gateway.jsonl")).expect("a trail");
    assert!(file.starts_with(&received), "{received}\nis not how this begins:\n{file}");
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
async fn a_record_that_a_collector_refuses_is_lost_to_it_alone_where_it_is_not_required() {
    let (target, port) = (echo().await, free_port());
    let plan = plan(target, &https(port, ""));
    let dir = plan.path().to_owned();
    answer(&dir, "422 forward.open");
    let program = collector(&dir, port).await;
    let site = plan.start().await;
    echoes(TcpStream::connect(site.doors[0]).await.expect("a door"), b"all the same").await;
    let failed = site.record(Side::Gateway, json!({"event": "sink.failed", "sink": "siem"})).await;
    assert_eq!(failed["reason"], "refused", "{failed}");
    let detail = failed["detail"].as_str().expect("a detail");
    assert!(detail.starts_with("it answered 422 to record "), "{detail}");
    let works = site.record(Side::Gateway, json!({"event": "sink.works", "sink": "siem"})).await;
    assert_eq!(works["lost"], 1, "{works}");
    let received = eventually("the collector has that", async || {
        fs::read_to_string(dir.join("received")).ok().filter(|received| received.contains("sink.works"))
    })
    .await;
    // All that it would take, in order.
    let file = fs::read_to_string(dir.join("gateway.jsonl")).expect("a trail");
    let taken: String = file.split_inclusive('\n').filter(|line| !line.contains("forward.open")).collect();
    assert!(taken.starts_with(&received), "{received}\nis not how this begins:\n{taken}");
    site.stop().await;
    drop(program);
}

#[tokio::test]
async fn a_record_that_a_required_collector_refuses_stops_everything_and_the_reason_is_told() {
    let (target, port) = (echo().await, free_port());
    let plan = plan(target, &https(port, "required = true")).gateway_table("[metrics]\nlisten = \"127.0.0.1:0\"");
    let dir = plan.path().to_owned();
    answer(&dir, "422 forward.open");
    let program = collector(&dir, port).await;
    let mut site = plan.start().await;
    let watched = watched::metrics_of(site.program(Side::Gateway)).await;
    assert!(!opens(site.doors[0]).await, "a forward without its record");
    // Where all is slow, it may have failed for that first.
    let advice = eventually("health tells why", async || {
        let report = health::becomes(watched, "trail", false).await;
        let trail = health::part(&report, "trail");
        let told = trail["detail"].as_str().is_some_and(|detail| detail.ends_with("sink siem, refused"));
        told.then(|| trail["advice"].as_str().expect("advice").to_owned())
    })
    .await;
    assert!(advice.contains("`required = false`"), "{advice}");
    let page = watched::scrape(watched).await;
    for line in [
        "caponier_audit_failing 1\n",
        "caponier_audit_sink_failing{sink=\"siem\"} 1\n",
        "caponier_audit_sink_failures_total{sink=\"siem\",reason=\"refused\"} ",
    ] {
        assert!(page.contains(line), "{line} is not in\n{page}");
    }
    eventually("the log tells why", async || {
        let log = site.program(Side::Gateway).log();
        (log.contains("it answered 422 to record ") && log.contains("nothing opens before it takes it")).then_some(())
    })
    .await;
    // It is mended where the reason is.
    answer(&dir, "200");
    eventually("forwards open again", async || opens(site.doors[0]).await.then_some(())).await;
    health::becomes(watched, "trail", true).await;
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    same_as_the_file(&dir).await;
    drop(program);
}

#[tokio::test]
async fn what_a_sink_shows_and_trusts_can_be_renewed_while_it_runs() {
    let (target, port) = (echo().await, free_port());
    let plan = plan(target, &https(port, "required = true\ncertificate = \"client.pem\"\nkey = \"client.key\""));
    let dir = plan.path().to_owned();
    Authority::new(&dir, "clients").sign("client", &Leaf::new("sink", 1));
    let mut program = demanding(&dir, port).await;
    let mut site = plan.start().await;
    let door = site.doors[0];
    echoes(TcpStream::connect(door).await.expect("a door"), b"recorded").await;

    // Another token, while the connection stays: the old one is refused, and the new one is there.
    put(&dir, "token", "second\n");
    put(&dir, "wanted", "second");
    eventually("forwards open with the new token", async || opens(door).await.then_some(())).await;

    // Other authorities on both sides, and other certificates: the old ones are worth nothing there.
    program.kill().await;
    certificates(&dir);
    Authority::new(&dir, "clients").sign("client", &Leaf::new("sink", 2));
    program = demanding(&dir, port).await;
    eventually("forwards open with the new certificates", async || opens(door).await.then_some(())).await;

    // What is not in order changes nothing, and is told once.
    put(&dir, "token", "two\nlines\n");
    put(&dir, "client.key", "no key");
    for _ in 0..2 {
        program.kill().await;
        assert!(!opens(door).await, "a forward without its record");
        program = demanding(&dir, port).await;
        eventually("forwards open with what was good", async || opens(door).await.then_some(())).await;
    }
    let log = site.program(Side::Gateway).log();
    for what in ["token", "certificate, key or ca_file"] {
        let told = format!("the {what} of an audit collector stays as it was");
        // A disk that was slow once is another matter.
        let told = log.lines().filter(|line| line.contains(&told) && !line.contains("not read within")).count();
        assert_eq!(told, 1, "{what}: {log}");
    }
    // Nobody asks for a restart.
    assert!(!log.contains("need a restart"), "{log}");
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    same_as_the_file(&dir).await;
    drop(program);
}

#[tokio::test]
async fn a_collector_that_wants_a_certificate_gets_nothing_from_a_sink_without_one() {
    let (target, port) = (echo().await, free_port());
    for (keys, shown) in [("", false), ("certificate = \"client.pem\"\nkey = \"client.key\"", true)] {
        let plan = plan(target, &https(port, keys));
        let dir = plan.path().to_owned();
        Authority::new(&dir, "clients").sign("client", &Leaf::new("sink", 1));
        let program = demanding(&dir, port).await;
        let site = plan.start().await;
        if shown {
            gets_a_forward(&site, &dir).await;
        } else {
            let failed = site.record(Side::Gateway, json!({"event": "sink.failed", "sink": "siem"})).await;
            // In TLS 1.3 the collector says so when the handshake is over for the other end.
            assert!(
                ["tls_failed", "connection_lost"].contains(&failed["reason"].as_str().expect("a word")),
                "{failed}"
            );
            assert!(!dir.join("asked").exists(), "something was sent");
        }
        site.stop().await;
        drop(program);
    }
}

#[tokio::test]
async fn a_collector_is_reached_through_a_proxy_that_wants_a_password() {
    let (target, port, squid) = (echo().await, free_port(), Squid::with_password().await);
    let with = squid.url_with(USER, "pass%3Aword%2Fof%40the%25agent");
    for (proxy, let_through) in [(squid.url(), false), (with, true)] {
        let plan = plan(target, &https(port, &format!("proxy = \"{proxy}\"")));
        let dir = plan.path().to_owned();
        let program = collector(&dir, port).await;
        let mut site = plan.start().await;
        if let_through {
            gets_a_forward(&site, &dir).await;
            let said =
                site.program(Side::Gateway).log() + &fs::read_to_string(dir.join("gateway.jsonl")).expect("a trail");
            assert!(!said.contains(PASSWORD) && !said.contains("pass%3A"), "the password is told");
        } else {
            let failed = site.record(Side::Gateway, json!({"event": "sink.failed", "sink": "siem"})).await;
            assert_eq!(failed["reason"], "connect_failed", "{failed}");
            assert!(failed["detail"].as_str().expect("a detail").contains("407"), "{failed}");
            assert!(!dir.join("asked").exists(), "something was sent");
        }
        site.stop().await;
        drop(program);
    }
    // It tells of a tunnel when that has ended.
    eventually("squid tells of it", async || {
        let access = squid.access();
        let to = format!("CONNECT 127.0.0.1:{port} ");
        access.lines().any(|line| line.contains(&to) && line.contains(&format!(" {USER} "))).then_some(())
    })
    .await;
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

//! The allowlist through the real programs: times that come and go by themselves, denials that beat grants, and the commands
//! that tell what would be allowed.

use std::fs;
use std::net::SocketAddr;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{SOON, Said, Side, Site, caponier, connect, echo, echoes, eventually, read_to_end, run};

/// This many seconds from now on.
fn soon(seconds: i64) -> Timestamp {
    Timestamp::now() + SignedDuration::from_secs(seconds)
}

/// A rule for one address and port, with more to it.
fn rule(name: &str, address: SocketAddr, more: &str) -> String {
    format!("name = \"{name}\"\naddresses = [\"{}/32\"]\nports = [{}]\n{more}", address.ip(), address.port())
}

/// Nothing comes from a door that leads to what is denied.
async fn refuses(door: SocketAddr) {
    assert_eq!(read_to_end(connect(door).await).await, b"", "the door is open");
}

/// A connection to a door that lets bytes through; waits until one does.
async fn opened(door: SocketAddr) -> TcpStream {
    eventually("an open door", async || {
        let mut stream = connect(door).await;
        let open = stream.write_all(b"?").await.is_ok() && stream.read_u8().await.is_ok();
        open.then_some(stream)
    })
    .await
}

/// Has the agent go by this configuration, of which a record that holds `words` tells.
async fn take_over(site: &mut Site, text: &str, words: &str) {
    fs::write(site.config(Side::Agent), text).expect("written");
    site.program(Side::Agent).signal("HUP");
    eventually("the change", async || {
        let reloaded = site.records(Side::Agent, &json!({"event": "config.reloaded"}));
        reloaded
            .iter()
            .any(|record| record["detail"].as_str().is_some_and(|detail| detail.contains(words)))
            .then_some(())
    })
    .await;
}

fn agents_text(site: &Site) -> String {
    fs::read_to_string(site.config(Side::Agent)).expect("a configuration")
}

/// The stream ends, and not before this moment.
async fn ends_at(stream: &mut TcpStream, at: Timestamp) {
    assert_eq!(read_to_end(stream).await, b"");
    let late = Timestamp::now().duration_since(at);
    assert!(late >= SignedDuration::ZERO && late.unsigned_abs() < SOON, "it was cut after {late:?}");
}

#[tokio::test]
async fn a_support_window_opens_and_closes_by_itself() {
    let (support, always) = (echo().await, echo().await);
    let mut site = Site::plan().allow(always).door(support).door(always).start().await;
    let mut beside = connect(site.doors[1]).await;
    echoes(&mut beside, b"before").await;
    let (opens, closes) = (soon(10), soon(24));
    let window = rule("support", support, &format!("not_before = {opens}\nexpires = {closes}"));
    let text = agents_text(&site);
    take_over(&mut site, &format!("{text}\n[[organisation.allow]]\n{window}"), "new: rule acme/support").await;
    refuses(site.doors[0]).await;
    let denied = site.record(Side::Agent, json!({"event": "forward.denied", "reason": "not_yet_valid"})).await;
    assert!(denied["detail"].as_str().is_some_and(|detail| detail.contains("rule support")), "{denied}");

    let mut live = opened(site.doors[0]).await;
    assert!(Timestamp::now() >= opens, "it opened too early");
    echoes(&mut live, b"within").await;
    ends_at(&mut live, closes).await;
    site.record(Side::Agent, json!({"event": "forward.ended", "reason": "expired", "rule": "support"})).await;
    refuses(site.doors[0]).await;
    site.record(Side::Agent, json!({"event": "forward.denied", "reason": "expired"})).await;
    echoes(&mut beside, b"and after").await;
    assert_eq!(site.records(Side::Agent, &json!({"event": "link.up"})).len(), 1, "the link is the same");
    drop(beside);
    site.stop().await;
}

#[tokio::test]
async fn an_orchestrators_time_that_is_over_cuts_its_link() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut live = connect(site.doors[0]).await;
    echoes(&mut live, b"before").await;
    let closes = soon(12);
    let text = agents_text(&site);
    let timed = text.replacen("asserts = [\"*\"]", &format!("asserts = [\"*\"]\nexpires = {closes}"), 1);
    assert_ne!(text, timed);
    take_over(&mut site, &timed, "changed: orchestrator acme").await;
    echoes(&mut live, b"meanwhile").await;
    ends_at(&mut live, closes).await;
    site.record(Side::Agent, json!({"event": "link.down", "reason": "expired"})).await;
    site.record(Side::Agent, json!({"event": "auth.refused", "reason": "expired"})).await;
    site.stop().await;
}

#[tokio::test]
async fn a_principals_registration_begins_and_ends_by_itself() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    let about = "acme/principals/provisioner";
    plan.registry().about(about, "agents = [\"*\"]\nnot_before = 2100-01-01T00:00:00Z");
    let site = plan.start().await;
    refuses(site.doors[0]).await;
    site.record(Side::Gateway, json!({"event": "forward.denied", "reason": "not_yet_valid"})).await;
    let (opens, closes) = (soon(3), soon(20));
    site.registry().about(about, &format!("agents = [\"*\"]\nnot_before = {opens}\nexpires = {closes}"));
    let mut live = opened(site.doors[0]).await;
    assert!(Timestamp::now() >= opens, "it began too early");
    ends_at(&mut live, closes).await;
    site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "revoked"})).await;
    refuses(site.doors[0]).await;
    site.record(Side::Gateway, json!({"event": "forward.denied", "reason": "principal_expired"})).await;
    site.stop().await;
}

#[tokio::test]
async fn a_deny_rule_beats_every_grant() {
    let (denied, free) = (echo().await, echo().await);
    let by_name = format!("localhost:{}", free.port());
    let deny = |name: &str, what: &str| format!("[[organisation.deny]]\nname = \"{name}\"\n{what}\n");
    let localhost = "name = \"names\"\nhosts = [\"localhost\"]\nwithin = [\"127.0.0.0/8\"]\nports = [\"1-65535\"]";
    let mut site = Site::plan()
        .allow(denied)
        .allow(free)
        .rule(localhost)
        .door(denied)
        .door(free)
        .door(format!("localhost:{}", denied.port()))
        .door(&by_name)
        .start()
        .await;
    let mut lost = connect(site.doors[0]).await;
    let mut kept = connect(site.doors[1]).await;
    for stream in [&mut lost, &mut kept] {
        echoes(stream, b"before").await;
    }
    echoes(connect(site.doors[2]).await, b"by name").await;

    // By address: the literal, and the name that leads there, on that port alone. What runs ends.
    let text = agents_text(&site);
    let address = deny("no-port", &format!("addresses = [\"127.0.0.0/8\"]\nports = [{}]", denied.port()));
    take_over(&mut site, &format!("{text}\n{address}"), "new: deny rule acme/no-port").await;
    assert_eq!(read_to_end(&mut lost).await, b"");
    refuses(site.doors[0]).await;
    let like = json!({"event": "forward.denied", "reason": "deny_rule", "rule": "no-port"});
    let record = site.record(Side::Agent, like.clone()).await;
    assert!(record["detail"].as_str().is_some_and(|detail| detail.contains("no-port")), "{record}");
    refuses(site.doors[2]).await;
    eventually("the second denial", async || (site.records(Side::Agent, &like).len() == 2).then_some(())).await;
    echoes(&mut kept, b"and after").await;
    echoes(connect(site.doors[3]).await, b"by name").await;

    // By name: the name as it is asked for, whatever it means; not the address itself.
    let name = deny("no-name", "hosts = [\"localhost\"]\nports = [\"1-65535\"]");
    take_over(&mut site, &format!("{text}\n{name}"), "new: deny rule acme/no-name").await;
    refuses(site.doors[3]).await;
    site.record(Side::Agent, json!({"event": "forward.denied", "reason": "deny_rule", "rule": "no-name"})).await;
    echoes(connect(site.doors[0]).await, b"by address").await;
    echoes(&mut kept, b"still").await;
    drop(kept);
    site.stop().await;
}

async fn policy(site: &Site, side: Side, verb: &str, rest: &str) -> Said {
    run(caponier().args(["policy", verb]).arg(site.config(side)).args(rest.split(' '))).await
}

#[tokio::test]
async fn a_policy_is_tested_and_explained_without_opening_anything() {
    // Nobody listens where the rules lead: a connection would be refused, and say so.
    let site = Site::plan()
        .rule("name = \"db\"\nhosts = [\"*.db.internal\"]\nwithin = [\"10.20.0.0/16\"]\nports = [5432]\nprincipals = [\"provisioner\"]")
        .rule("name = \"support\"\naddresses = [\"10.30.0.0/16\"]\nports = [\"6000-6010\"]\nexpires = 2026-01-01T00:00:00Z")
        .rule("name = \"host\"\nhosts = [\"localhost\"]\nwithin = [\"127.0.0.0/8\"]\nports = [5432]")
        .deny("name = \"no-secrets\"\naddresses = [\"10.20.9.0/24\"]\nports = [\"1-65535\"]")
        .start()
        .await;
    let allowed =
        "--principal provisioner --address 10.20.0.5 --address 10.20.9.5 --address 10.21.0.1 orders.db.internal:5432";
    for (code, line, words) in [
        (0, allowed, "allow orders.db.internal:5432 for provisioner: rule db"),
        (0, allowed, "10.20.0.5:5432: permitted"),
        (0, allowed, "10.20.9.5:5432: refused: deny_rule: "),
        (0, allowed, "10.21.0.1:5432: refused: outside_within: "),
        (0, "--principal provisioner localhost:5432", "127.0.0.1:5432: permitted"),
        (0, "--principal provisioner --at 2025-12-31T00:00:00Z 10.30.0.1:6005", "rule support"),
        (0, "--principal provisioner --agent acme/prod-eu --address 10.20.0.5 a.db.internal:5432", "rule db"),
        (3, "--principal provisioner --address 10.20.9.5 orders.db.internal:5432", "deny_rule: "),
        (3, "--principal provisioner --address 10.20.9.5 orders.db.internal:5432", "no-secrets"),
        (3, "--principal provisioner a.orders.db.internal:5432", "no_rule: "),
        (3, "--principal ci --address 10.20.0.5 orders.db.internal:5432", "principal: "),
        (3, "--principal provisioner orders.db.internal:22", "port: "),
        (3, "--principal provisioner 10.30.0.1:6005", "expired: "),
        (3, "--principal provisioner 169.254.169.254:80", "no_rule: "),
        (
            3,
            "--principal SHA256:nThbg6kXUpJWGl7E1IGOCspRomTxdCARLviKw6E5SY8 localhost:5432",
            "principal_not_asserted: ",
        ),
        (2, "--principal provisioner 0177.0.0.1:80", ""),
        (2, "--principal provisioner --organisation globex x:1", ""),
        (2, "--principal provisioner --agent acme/other x:1", ""),
        (2, "--principal provisioner --address nonsense x:1", ""),
        (2, "--principal provisioner --at yesterday x:1", ""),
        // What is given is not passed over.
        (2, "--principal provisioner --address 10.0.0.1 10.0.0.2:1", ""),
        (2, "--principal provisioner --address 10.0.0.1:2 x:1", ""),
        (2, "--principal provisioner --from 10.0.0.1 x:1", ""),
        (2, "x:1", ""),
    ] {
        let said = policy(&site, Side::Agent, "test", line).await;
        assert_eq!(said.code(), code, "{line}: {said:?}");
        assert!(said.stdout.contains(words), "{line}: {said:?}");
        assert_eq!(said.stdout.is_empty(), code == 2, "{line}: {said:?}");
    }
    let said = policy(&site, Side::Agent, "test", &format!("--json {allowed}")).await.done();
    let told: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((&told["allowed"], &told["rule"], &told["reason"]), (&json!(true), &json!("db"), &Value::Null));
    let reasons: Vec<_> =
        told["addresses"].as_array().expect("addresses").iter().map(|one| one["reason"].clone()).collect();
    assert_eq!(reasons, [Value::Null, json!("deny_rule"), json!("outside_within")]);

    let table = policy(&site, Side::Agent, "explain", "--principal provisioner").await.done();
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].starts_with("RULE") && lines[1].starts_with("deny no-secrets"), "{table}");
    assert!(table.contains("*.db.internal") && table.contains("until 2026-01-01T00:00:00Z (over)"), "{table}");
    let other = policy(&site, Side::Agent, "explain", "--principal ci --json").await.done();
    assert!(!other.contains("*.db.internal") && other.contains("6000-6010"), "{other}");

    for (code, line, words) in [
        (0, "--principal provisioner --agent acme/prod-eu any.internal:1", "allow any.internal:1"),
        (3, "--principal nobody --agent acme/prod-eu any.internal:1", "not_registered"),
        (3, "--principal provisioner --agent acme/other any.internal:1", "not_registered"),
        (2, "--principal provisioner --agent initech/other any.internal:1", ""),
        (2, "--principal provisioner any.internal:1", ""),
        (2, "--principal provisioner --agent acme/prod-eu --address 10.0.0.1 any.internal:1", ""),
    ] {
        let said = policy(&site, Side::Gateway, "test", line).await;
        assert_eq!(said.code(), code, "{line}: {said:?}");
        assert!(said.stdout.contains(words), "{line}: {said:?}");
    }
    let table = policy(&site, Side::Gateway, "explain", "--principal provisioner --organisation acme").await.done();
    assert!(table.contains("acme/prod-eu") && table.contains("whatever the agent allows"), "{table}");
    let opened = site.records(Side::Agent, &json!({"event": "forward.open"}));
    assert!(opened.is_empty(), "{opened:?}");
    site.stop().await;
}

//! Keys in life: what changes in a file holds within five seconds, and a key is replaced under load without a query lost.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use caponier::task::Tasks;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::Instant;
use tokio_postgres::NoTls;

use crate::connect_door::{TOKEN_KEYS, bearing, claims, send, signed};
use crate::harness::{
    PATIENCE, SOON, Side, Site, caponier, connect, echo, echoes, eventually, read_to_end, run, within,
};
use crate::postgres::{Postgres, SUPERUSER_PASSWORD};

fn fingerprint(public: &str) -> String {
    caponier::identity::PublicKey::parse(public).expect("a key").fingerprint().to_string()
}

fn edit(site: &Site, side: Side, old: &str, new: &str) {
    let path = site.config(side);
    let text = fs::read_to_string(&path).expect("a configuration");
    assert!(text.contains(old), "{old:?} is not in {text}");
    // As a careful editor does, and as Kubernetes does with links.
    fs::write(path.with_extension("next"), text.replace(old, new)).expect("written");
    fs::rename(path.with_extension("next"), path).expect("renamed");
}

fn in_seconds(seconds: i64) -> String {
    let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

async fn ends(stream: &mut TcpStream, since: Instant) {
    assert_eq!(read_to_end(stream).await, b"");
    assert!(since.elapsed() < SOON, "it took {:?}", since.elapsed());
}

#[tokio::test]
async fn an_orchestrators_key_that_is_taken_away_or_expires_is_cut_without_being_asked_for() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.key("other");
    let mut site = plan.start().await;
    let (ours, other) = (site.public("login-acme"), site.public("other"));
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    edit(&site, Side::Agent, ours.trim(), other.trim());
    let since = Instant::now();
    ends(&mut stream, since).await;
    site.record(Side::Agent, json!({"event": "link.down", "reason": "revoked", "key": fingerprint(&ours)})).await;

    // Given back with an end: it serves until then.
    let expires = in_seconds(12);
    edit(
        &site,
        Side::Agent,
        &format!("key = \"{}\"", other.trim()),
        &format!("key = \"{}\"\nexpires = {expires}", ours.trim()),
    );
    site.program(Side::Agent).says("an orchestrator's key expires in 0 h").await;
    let mut stream = connect(site.doors[0]).await;
    let end = expires.parse::<jiff::Timestamp>().expect("a time");
    if jiff::Timestamp::now() < end - jiff::SignedDuration::from_secs(5) {
        echoes(&mut stream, b"again").await;
    }
    assert_eq!(read_to_end(&mut stream).await, b"");
    assert!(jiff::Timestamp::now().duration_since(end).unsigned_abs() < SOON);
    site.program(Side::Agent).says("an orchestrator's key has expired").await;
    // Each state was read once.
    assert_eq!(site.records(Side::Agent, &json!({"event": "config.reloaded"})).len(), 2);
    site.stop().await;
}

#[tokio::test]
async fn a_changed_file_is_read_once_asked_for_or_not_and_a_broken_one_told_once() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    for side in [Side::Agent, Side::Gateway] {
        let config = site.config(side);
        let good = fs::read_to_string(&config).expect("a configuration");
        let count = |site: &Site, kind: &str| site.records(side, &json!({"event": kind})).len();
        let limits = |number: u32| {
            good.replace("[audit]", &format!("[{}.limits]\nforwards_per_link = {number}\n[audit]", side.name()))
        };
        fs::write(&config, limits(7)).expect("written");
        site.program(side).signal("HUP");
        site.record(side, json!({"event": "config.reloaded", "detail": "changed: limits"})).await;
        // Half of it, then something else that is broken; then it is mended. Nothing says when the second look that is not to be
        // has not been, so that the order of what comes says it: whatever comes to rest is looked at later.
        fs::write(&config, &good[..good.len() / 2]).expect("written");
        eventually("the fault", async || (count(&site, "config.rejected") == 1).then_some(())).await;
        assert_eq!(count(&site, "config.reloaded"), 1, "{side:?}: a state that was asked for is read again");
        fs::write(&config, format!("{good}\n[nothing.of.this.name]\n")).expect("written");
        let other = json!({"event": "config.rejected"});
        let faults =
            eventually("the other fault", async || Some(site.records(side, &other)).filter(|faults| faults.len() > 1));
        let faults = faults.await;
        assert_ne!(faults[0]["detail"], faults[1]["detail"], "{side:?}: a fault is told more than once");
        assert_eq!(faults.len(), 2, "{side:?}");
        echoes(connect(site.doors[0]).await, b"meanwhile").await;
        fs::write(&config, limits(8)).expect("written");
        eventually("the mended one", async || (count(&site, "config.reloaded") == 2).then_some(())).await;
        // The same again is no change, however it came to be written.
        fs::write(&config, limits(8)).expect("written");
        fs::write(&config, &good).expect("written");
        eventually("the first one", async || (count(&site, "config.reloaded") == 3).then_some(())).await;
        assert_eq!(count(&site, "config.rejected"), 2, "{side:?}: a fault is told more than once");
    }
    site.stop().await;
}

/// As Kubernetes mounts a secret: the files are links into a folder that is itself reached by a link, which is swapped.
#[tokio::test]
async fn a_configuration_behind_swapped_links_is_followed() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.key("agent-next");
    let mut site = plan.start().await;
    let next = site.public("agent-next");
    site.registry().key("acme/agents/prod-eu", "next", &next);
    site.record(Side::Gateway, json!({"event": "registry.reloaded"})).await;
    let dir = site.path().to_owned();
    for (version, key) in [("v1", "agent"), ("v2", "agent-next")] {
        fs::create_dir(dir.join(version)).expect("a folder");
        fs::copy(dir.join(key), dir.join(version).join("key")).expect("copied");
    }
    symlink("v1", dir.join("..data")).expect("linked");
    symlink("..data/key", dir.join("mounted")).expect("linked");
    edit(&site, Side::Agent, "host_key = \"agent\"", "host_key = \"mounted\"");
    let reloaded = site.record(Side::Agent, json!({"event": "config.reloaded"})).await;
    assert_eq!(reloaded["detail"], "nothing changed");
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    symlink("v2", dir.join("..next")).expect("linked");
    fs::rename(dir.join("..next"), dir.join("..data")).expect("swapped");
    let since = Instant::now();
    let detail = format!("changed: host_key {}", fingerprint(&next));
    site.record(Side::Agent, json!({"event": "config.reloaded", "detail": detail})).await;
    assert!(since.elapsed() < SOON);
    site.record(Side::Gateway, json!({"event": "link.up", "key": fingerprint(&next)})).await;
    echoes(&mut stream, b"still").await;
    drop(stream);
    site.program(Side::Agent).says("replacing the link").await;
    site.stop().await;
}

#[tokio::test]
async fn a_key_counts_from_its_date_to_its_date_and_its_end_is_told_ahead() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start_gateway().await;
    let begins = in_seconds(15);
    site.registry().about_key(
        "acme/agents/prod-eu",
        "one",
        &format!("not_before = {begins}\nexpires = {}\n", in_seconds(6 * 24 * 3600)),
    );
    site.record(Side::Gateway, json!({"event": "registry.reloaded"})).await;
    site.restart_agent().await;
    let refused = site.program(Side::Agent).says("not linked").await;
    assert!(refused.contains("is not registered there"), "a stranger learns no more: {refused}");
    site.record(Side::Gateway, json!({"event": "auth.refused", "reason": "not_yet_valid"})).await;
    site.linked().await;
    assert!(jiff::Timestamp::now() >= begins.parse().expect("a time"));
    // All three hear of the end.
    let line = site.program(Side::Gateway).says("a key expires in 5 days").await;
    assert!(line.contains(&fingerprint(&site.public("agent"))) && line.contains("agent prod-eu"), "{line}");
    site.program(Side::Agent).says("this agent's key expires in 5 days").await;
    let said = run(caponier().args(["agents", "--socket"]).arg(site.admin_socket())).await.done();
    assert!(said.contains("KEY") && said.contains(" 5d "), "{said}");

    // The end comes: its link is cut, and its row says so.
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    site.registry().about_key("acme/agents/prod-eu", "one", &format!("expires = {}\n", in_seconds(3)));
    assert_eq!(read_to_end(&mut stream).await, b"");
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "revoked"})).await;
    site.program(Side::Gateway).says("a key has expired").await;
    let told = site.program(Side::Gateway).log();
    assert_eq!(told.matches("a key expires in 5 days").count(), 1, "once a stage: {told}");
    site.stop().await;
}

/// What runs through the tunnel while keys change: a query every 100 ms, each over a connection of its own, and one stream
/// that does not end.
struct Load {
    tasks: Tasks,
    ending: Arc<AtomicBool>,
    queries: Arc<AtomicUsize>,
    failed: Arc<std::sync::Mutex<Vec<String>>>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let this =
            Self { tasks: Tasks::new(), ending: Arc::default(), queries: Arc::default(), failed: Arc::default() };
        let (ending, queries, failed) = (this.ending.clone(), this.queries.clone(), this.failed.clone());
        let tasks = this.tasks.clone();
        this.tasks.spawn(async move {
            let mut pace = tokio::time::interval(Duration::from_millis(100));
            while !ending.load(Ordering::Relaxed) {
                pace.tick().await;
                match query(address, &tasks).await {
                    Ok(()) => _ = queries.fetch_add(1, Ordering::Relaxed),
                    Err(error) => failed.lock().expect("no panic").push(error),
                }
            }
        });
        this
    }

    /// Waits until so many more queries were answered.
    async fn more(&self, number: usize) {
        let wanted = self.queries.load(Ordering::Relaxed) + number;
        eventually("more queries", async || {
            let failed = self.failed.lock().expect("no panic").clone();
            assert!(failed.is_empty(), "{failed:?}");
            (self.queries.load(Ordering::Relaxed) >= wanted).then_some(())
        })
        .await;
    }

    async fn end(self) {
        self.more(5).await;
        self.ending.store(true, Ordering::Relaxed);
        assert!(self.tasks.drain(PATIENCE).await);
        assert_eq!(*self.failed.lock().expect("no panic"), Vec::<String>::new());
    }
}

/// One query over a connection of its own, which goes through the tunnel.
async fn query(address: SocketAddr, tasks: &Tasks) -> Result<(), String> {
    let mut config = tokio_postgres::Config::new();
    config.user("postgres").password(SUPERUSER_PASSWORD).dbname("postgres");
    config.ssl_mode(tokio_postgres::config::SslMode::Disable);
    let asked = async {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(|error| format!("{error:?}"))?;
        tasks.spawn(async move { drop(connection.await) });
        let row = client.query_one("SELECT 6 * 7", &[]).await.map_err(|error| format!("{error:?}"))?;
        if row.get::<_, i32>(0) == 42 { Ok(()) } else { Err("another answer".to_owned()) }
    };
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| Err("no answer".to_owned()))
}

/// A server that takes passwords without TLS too, which is not the subject here.
async fn server() -> Postgres {
    let server = Postgres::start("localhost").await;
    let superuser = server.superuser("postgres").await;
    let rules: String = superuser.query_one("SHOW hba_file", &[]).await.expect("a row").get(0);
    let text = fs::read_to_string(&rules).expect("read");
    fs::write(&rules, format!("{text}host all all 127.0.0.1/32 scram-sha-256\n")).expect("written");
    superuser.query_one("SELECT pg_reload_conf()", &[]).await.expect("a row");
    let tasks = Tasks::new();
    eventually("a query without TLS", async || query(server.address, &tasks).await.ok()).await;
    server
}

async fn registry_takes(site: &Site, before: usize) {
    eventually("the registry is read", async || {
        (site.records(Side::Gateway, &json!({"event": "registry.reloaded"})).len() > before).then_some(())
    })
    .await;
}

fn keys(arguments: &[&str]) -> Command {
    let mut command = caponier();
    command.arg("keys").args(arguments);
    command
}

#[tokio::test]
async fn an_agents_host_key_is_rotated_under_load() {
    let (server, target) = (server().await, echo().await);
    let mut site = Site::plan().allow(server.address).door(server.address).allow(target).door(target).start().await;
    let registry = site.path().join("keys");
    let registry = registry.to_str().expect("text");
    let load = Load::start(site.doors[0]);
    let mut stream = connect(site.doors[1]).await;
    echoes(&mut stream, b"before").await;
    load.more(5).await;

    // The agent's owner makes a key; nothing changes yet.
    let config = site.config(Side::Agent);
    let config = config.to_str().expect("text");
    let made = run(&mut keys(&["rotate", "--config", config])).await.done();
    let new = fs::read_to_string(site.path().join("agent.new.pub")).expect("a public key");
    assert!(made.contains(&fingerprint(&new)), "{made}");
    assert!(run(&mut keys(&["rotate", "--config", config])).await.code() == 1, "a second one overwrites nothing");
    // Too early: in time, no link comes with it, and both keys stay.
    let admin = site.admin_socket();
    let admin = admin.to_str().expect("text");
    let file = site.path().join("agent.new.pub");
    let arguments = ["rotate", "--registry", registry, "acme/prod-eu", file.to_str().expect("text"), "--admin", admin];
    let early = run(keys(&arguments).args(["--within", "1s"])).await;
    assert_eq!(early.code(), 1, "{early:?}");
    assert!(
        early.stderr.contains("no link with the new key yet from one") && early.stderr.contains("--switch"),
        "{early:?}"
    );
    load.more(5).await;

    // The operator's half waits for the owner's, and for what runs on the old link.
    let mut waiting = site.background("rotate", keys(&arguments));
    waiting.says("no link with the new key yet").await;
    run(&mut keys(&["rotate", "--config", config, "--switch"])).await.done();
    site.record(Side::Gateway, json!({"event": "link.up", "key": fingerprint(&new)})).await;
    waiting.says("1 forward(s) still run on links with an old key").await;
    load.more(5).await;
    echoes(&mut stream, b"still on the old link").await;
    assert_eq!(waiting.stop().await, Some(1), "interrupted, it leaves both");

    // Revoked, the old key's link is cut with what runs on it; the new one's is not.
    let old = fingerprint(&site.public("agent.old"));
    let mut other = connect(site.doors[1]).await;
    echoes(&mut other, b"on the new link").await;
    let since = Instant::now();
    run(&mut keys(&["revoke", "--registry", registry, &old])).await.done();
    ends(&mut stream, since).await;
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "revoked", "key": old})).await;
    load.more(5).await;
    echoes(&mut other, b"untouched").await;
    // Again, now there is nothing left to wait for.
    let again = run(&mut keys(&arguments)).await;
    assert_eq!(again.code(), 2, "the file has taken the old one's place: {again:?}");
    let public = site.path().join("agent.pub");
    let arguments =
        ["rotate", "--registry", registry, "acme/prod-eu", public.to_str().expect("text"), "--admin", admin];
    run(&mut keys(&arguments)).await.done();

    // An agent with the old key is refused.
    fs::copy(site.path().join("agent.old"), site.path().join("agent.revoked")).expect("copied");
    edit(&site, Side::Agent, "host_key = \"agent\"", "host_key = \"agent.revoked\"");
    site.record(Side::Gateway, json!({"event": "auth.refused", "reason": "revoked"})).await;
    site.program(Side::Agent).says("the link that there is stays").await;
    load.more(5).await;
    echoes(&mut other, b"untouched").await;
    load.end().await;
    drop(other);
    site.stop().await;
}

#[tokio::test]
async fn a_gateways_login_key_is_rotated_under_load() {
    let (server, target) = (server().await, echo().await);
    let plan = Site::plan().allow(server.address).door(server.address).allow(target).door(target);
    plan.key("login-next");
    let mut site = plan.start().await;
    let load = Load::start(site.doors[0]);
    let mut stream = connect(site.doors[1]).await;
    echoes(&mut stream, b"before").await;
    let (old, next) = (site.public("login-acme"), site.public("login-next"));
    let (first, second) = (
        format!("[[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n", old.trim()),
        format!("[[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n", next.trim()),
    );
    edit(&site, Side::Agent, &first, &format!("{first}{second}"));
    site.record(Side::Agent, json!({"event": "config.reloaded"})).await;
    load.more(5).await;
    edit(&site, Side::Gateway, "\"login-acme\"", "\"login-next\"");
    site.record(Side::Agent, json!({"event": "link.up", "key": fingerprint(&next)})).await;
    load.more(5).await;
    echoes(&mut stream, b"still on the old link").await;
    let mut other = connect(site.doors[1]).await;
    echoes(&mut other, b"on the new link").await;
    edit(&site, Side::Agent, &format!("{first}{second}"), &second);
    let since = Instant::now();
    ends(&mut stream, since).await;
    site.record(Side::Agent, json!({"event": "link.down", "reason": "revoked", "key": fingerprint(&old)})).await;
    load.more(5).await;
    echoes(&mut other, b"untouched").await;

    // A gateway that goes back to the old key is refused, and keeps what it has.
    edit(&site, Side::Gateway, "\"login-next\"", "\"login-acme\"");
    let line = site.program(Side::Agent).says("not linked anew").await;
    assert!(line.contains("not among this agent's orchestrator keys"), "{line}");
    load.more(5).await;
    echoes(&mut other, b"untouched").await;
    load.end().await;
    drop(other);
    site.stop().await;
}

#[tokio::test]
async fn a_principals_key_is_rotated_under_load() {
    let (server, target) = (server().await, echo().await);
    let plan = Site::plan().allow(server.address).door(server.address).allow(target);
    plan.key("provisioner-next");
    let site = plan.start().await;
    let load = Load::start(site.doors[0]);
    let registry = site.path().join("keys");
    let registry = registry.to_str().expect("text");
    let forward = async |key: &str| {
        let port = crate::harness::free_port();
        let ssh = site.ssh_as(key, "acme/prod-eu", &["-N", "-L", &format!("127.0.0.1:{port}:{target}"), "-v"]);
        let mut ssh = site.background(&format!("ssh-{key}"), ssh);
        ssh.says("Entering interactive session").await;
        (ssh, SocketAddr::from(([127, 0, 0, 1], port)))
    };
    let (mut first, by_first) = forward("provisioner").await;
    let mut stream = connect(by_first).await;
    echoes(&mut stream, b"with the old key").await;
    let reloads = site.records(Side::Gateway, &json!({"event": "registry.reloaded"})).len();
    let public = site.path().join("provisioner-next.pub");
    run(&mut keys(&["add", "--registry", registry, "principal", "acme/provisioner", public.to_str().expect("text")]))
        .await
        .done();
    registry_takes(&site, reloads).await;
    let (second, by_second) = forward("provisioner-next").await;
    let mut other = connect(by_second).await;
    echoes(&mut other, b"with the new key").await;
    load.more(5).await;
    let since = Instant::now();
    run(&mut keys(&["revoke", "--registry", registry, &fingerprint(&site.public("provisioner"))])).await.done();
    ends(&mut stream, since).await;
    within("the end of the session", first.ended()).await;
    assert!(since.elapsed() < SOON, "ssh ended {:?} after the revocation", since.elapsed());
    echoes(&mut other, b"untouched").await;
    let refused = run(&mut site.ssh_as("provisioner", "acme/prod-eu", &["-N"])).await;
    assert!(refused.stderr.contains("Permission denied (publickey)"), "{refused:?}");
    load.more(5).await;
    echoes(connect(by_second).await, b"anew").await;
    load.end().await;
    drop((other, second, first));
    site.stop().await;
}

#[tokio::test]
async fn a_key_for_tokens_is_rotated_and_what_the_old_one_signed_counts_until_the_overlap_is_over() {
    let target = echo().await;
    let plan = Site::plan().allow(target);
    let (old, new) = (plan.key("signer"), plan.key("signer-next"));
    let site = plan.start().await;
    let registry = site.path().join("keys").display().to_string();
    let public = |name: &str| site.path().join(format!("{name}.pub")).display().to_string();
    let (first, next) = (public("signer"), public("signer-next"));
    let [by_old, by_new] = [&old, &new].map(|key| signed(&claims(), key));
    let ask = async |token: &str| send(site.address, bearing(token, target).as_bytes()).await;

    // Whom it signs for is never guessed, nor which key is meant.
    let add = ["add", "--registry", &registry, "token-key", "acme/ci", &first];
    let said = run(&mut keys(&add)).await;
    assert!(said.code() == 2 && said.stderr.contains("--principals"), "{said:?}");
    let rotate = ["rotate", "--registry", &registry, "--token-key", "acme/ci", &next];
    let said = run(&mut keys(&rotate)).await;
    assert!(said.code() == 1 && said.stderr.contains("acme has no key ci that signs tokens now"), "{said:?}");
    let said = run(keys(&rotate).args(["--overlap", "31d"])).await;
    assert!(said.code() == 2 && said.stderr.contains("30 days at most"), "{said:?}");
    assert_eq!(ask(&by_old).await.status, 407);

    run(keys(&add).args(["--principals", "prov*"])).await.done();
    eventually("the first key counts", async || (ask(&by_old).await.status == 200).then_some(())).await;
    let said = run(keys(&rotate).args(["--overlap", "1h"])).await.done();
    assert!(said.contains(&fingerprint(&site.public("signer"))) && said.contains("counts until"), "{said}");
    eventually("the new one counts", async || (ask(&by_new).await.status == 200).then_some(())).await;
    let mut live = ask(&by_old).await;
    assert_eq!(live.status, 200, "both count");
    echoes(&mut live.stream, b"by the old key").await;

    // The same again ends the old one sooner.
    let said = run(keys(&rotate).args(["--overlap", "6s"])).await;
    assert!(said.code() == 0 && said.stderr.contains("is registered already"), "{said:?}");
    let about = fs::read_to_string(site.path().join(format!("keys/organisations/{TOKEN_KEYS}/ci.toml"))).expect("read");
    let end = about.lines().find_map(|line| line.strip_prefix("expires = ")).expect("an end");
    let end: jiff::Timestamp = end.parse().expect("a time");
    let refused = eventually("the old one counts no more", async || {
        let answer = ask(&by_old).await;
        // Whoever is let in came before the gateway knew of the end, or before it.
        (answer.status != 200).then_some(answer)
    });
    let refused = refused.await;
    assert!(jiff::Timestamp::now() >= end, "refused before {end}");
    assert_eq!(refused.status, 407);
    site.record(Side::Gateway, json!({"event": "auth.refused", "door": "connect", "reason": "expired"})).await;
    drop(within("what it opened ends too", live.stream.read_to_end(&mut Vec::new())).await);
    assert_eq!(ask(&by_new).await.status, 200);
    site.stop().await;
}

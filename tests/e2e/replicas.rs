//! Several processes of one agent: who gets a forward, what is tried elsewhere, and who holds a name.
//!
//! Real agents run beside each other with replica names and trails of their own. Where an agent has to answer in a way
//! that a real one cannot be made to, there is a [`Fake`].

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use caponier::identity::PrivateKey;
use caponier::limits;
use caponier::task::Tasks;
use caponier::tunnel::wire::RefusalCode;
use russh::server::{Auth, ChannelOpenHandle, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, SshId};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::connect_door::{TOKEN_KEYS, bearing, claims, register, send, signed};
use crate::harness::{
    AGENT, PATIENCE, Program, Side, Site, caponier, connect, echo, echoes, eventually, read_to_end, run, within,
};

/// Starts one more process of the site's agent, which says that it has this replica name; `file` is what its files are
/// called. Waits until it is linked.
async fn replica(site: &Site, file: &str, name: &str, change: impl Fn(String) -> String) -> Program {
    let config = fs::read_to_string(site.config(Side::Agent)).expect("a configuration");
    let config = config
        .replace("replica = \"one\"", &format!("replica = \"{name}\""))
        .replace("agent.jsonl", &format!("{file}.jsonl"));
    fs::write(site.path().join(format!("{file}.toml")), change(config)).expect("written");
    let mut command = caponier();
    command.arg("agent").arg("--config").arg(site.path().join(format!("{file}.toml")));
    command.env("CAPONIER_LOG", "warn,caponier=debug");
    let mut program = site.background(file, command);
    program.says(" linked ").await;
    program
}

fn same(config: String) -> String {
    config
}

/// What `caponier agents --json` says of the site's agent.
async fn rows(site: &Site) -> Vec<Value> {
    let said = run(caponier().arg("agents").arg("--socket").arg(site.admin_socket()).arg("--json")).await;
    let rows: Vec<Value> = serde_json::from_str(&said.done()).expect("JSON");
    rows.into_iter().filter(|row| row["agent"] == "prod-eu").collect()
}

/// Replica names and states, in the order of names and ages.
async fn states(site: &Site) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    rows(site).await.iter().map(|row| (text(&row["replica"]), text(&row["state"]))).collect()
}

/// Waits until the gateway lists exactly this.
async fn listed(site: &Site, expected: &[(&str, &str)]) {
    let what = format!("{expected:?} in the roster");
    let expected: Vec<_> = expected.iter().map(|(name, state)| ((*name).to_owned(), (*state).to_owned())).collect();
    eventually(&what, async || (states(site).await == expected).then_some(())).await;
}

/// Opens a connection at a door and carries bytes over it.
async fn open(door: SocketAddr) -> TcpStream {
    let mut stream = connect(door).await;
    echoes(&mut stream, b"through").await;
    stream
}

fn count(site: &Site, like: Value) -> usize {
    site.records(Side::Gateway, &like).len()
}

/// An open that waits for its answer.
type Asked = (ChannelOpenHandle, Channel<Msg>);

/// An agent's process made of the SSH library alone, which answers opens in its own way.
#[derive(Clone)]
struct Fake {
    /// The code that it refuses all with; without one it answers nothing.
    code: Option<u32>,
    asked: Arc<std::sync::Mutex<Vec<Asked>>>,
}

impl Fake {
    /// Links as a replica of the site's agent.
    async fn link(site: &Site, name: &str, code: Option<u32>) -> CancellationToken {
        let stream = TcpStream::connect(site.address).await.expect("connected");
        let key = PrivateKey::read(&site.path().join("agent")).expect("a key");
        let config = russh::server::Config {
            server_id: SshId::Standard(format!("SSH-2.0-caponier_1 agent={AGENT}/{name}").into()),
            keys: vec![key.as_ssh().as_ref().clone()],
            auth_rejection_time: Duration::ZERO,
            ..russh::server::Config::default()
        };
        let fake = Self { code, asked: Arc::default() };
        let running = russh::server::run_stream(Arc::new(config), stream, fake).await.expect("a session");
        let over = CancellationToken::new();
        Tasks::new().spawn({
            let over = over.clone();
            async move {
                drop(running.await);
                over.cancel();
            }
        });
        site.record(Side::Gateway, json!({"event": "link.up", "replica": name})).await;
        over
    }
}

impl russh::server::Handler for Fake {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, _: &str, _: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        Ok(Auth::Accept)
    }

    async fn auth_publickey(&mut self, _: &str, _: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        _: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        reply.accept().await;
        Ok(())
    }

    async fn subsystem_request(&mut self, id: ChannelId, _: &str, session: &mut Session) -> Result<(), Self::Error> {
        session.channel_success(id)?;
        let body = br#"{"version":"1","features":["credit"],"channels":1}"#;
        let length = u32::try_from(body.len() + 2).expect("short");
        session.data(id, [&length.to_be_bytes()[..], &[0, 1], body].concat())?;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        _: &str,
        _: u32,
        originator: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        match self.code {
            Some(code) => {
                let forward = originator.split(':').nth(1).expect("an id");
                reply.reject(ChannelOpenFailure::Other { code, reason: format!("{forward} because") }).await;
            }
            None => self.asked.lock().expect("not poisoned").push((reply, channel)),
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_denial_is_final_and_recorded_once() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    // A process of the same agent that allows nothing.
    let strict = |config: String| config.split("[[organisation.allow]]").next().expect("a start").to_owned();
    let mut two = replica(&site, "two", "two", strict).await;
    listed(&site, &[("one", "active"), ("two", "active")]).await;
    let (mut served, mut refused) = (0, 0);
    for _ in 0..6 {
        let mut stream = connect(site.doors[0]).await;
        // A refusal is a reset, maybe before this is written.
        drop(stream.write_all(b"?").await);
        let mut back = [0];
        match within("an answer", stream.read_exact(&mut back)).await {
            Ok(_) => served += 1,
            Err(_) => refused += 1,
        }
        drop(stream);
        // A forward that has not quite ended yet would make its replica the more loaded one, and spoil the turns.
        eventually("no forward to be left", async || {
            rows(&site).await.iter().all(|row| row["live"] == 0).then_some(())
        })
        .await;
    }
    assert_eq!((served, refused), (3, 3), "equals take turns, and a denial is not asked again elsewhere");
    let denied = site.records(Side::Gateway, &json!({"event": "forward.denied", "reason": "agent_denied"}));
    assert_eq!(denied.len(), 3, "{denied:#?}");
    assert!(denied.iter().all(|record| record["replica"] == "two"), "{denied:#?}");
    assert_eq!(count(&site, json!({"event": "forward.attempt"})), 0);
    assert_eq!(two.stop().await, Some(0));
    site.stop().await;
}

#[tokio::test]
async fn what_another_replica_may_do_better_is_tried_there_and_recorded() {
    let target = echo().await;
    for (code, reason) in [
        (RefusalCode::ConnectFailed, "connect_failed"),
        (RefusalCode::Unresolved, "unresolved"),
        (RefusalCode::Unrecorded, "agent_unrecorded"),
        (RefusalCode::Limit, "agent_limit"),
        (RefusalCode::Draining, "agent_draining"),
    ] {
        let site = Site::plan().allow(target).door(target).start().await;
        let _over = Fake::link(&site, "far", Some(code as u32)).await;
        for _ in 0..2 {
            drop(open(site.doors[0]).await);
            // One that has not quite ended yet would make its replica the more loaded one, and spoil the turns.
            eventually("no forward to be left", async || {
                rows(&site).await.iter().all(|row| row["live"] == 0).then_some(())
            })
            .await;
        }
        let attempt = site.record(Side::Gateway, json!({"event": "forward.attempt"})).await;
        assert_eq!((&attempt["replica"], &attempt["reason"]), (&json!("far"), &json!(reason)), "{attempt}");
        assert_eq!((&attempt["organisation"], &attempt["agent"]), (&json!("acme"), &json!("prod-eu")), "{attempt}");
        assert_eq!(attempt["detail"], "because", "{attempt}");
        let ended = site.record(Side::Gateway, json!({"event": "forward.ended", "forward": attempt["forward"]})).await;
        assert_eq!(ended["replica"], "one", "the entry names who has served it: {ended}");
        assert_eq!(count(&site, json!({"event": "forward.attempt"})), 1);
        if code == RefusalCode::Draining {
            // Who goes away gets no more.
            site.record(Side::Gateway, json!({"event": "link.down", "replica": "far", "reason": "agent_drained"}))
                .await;
        }
        site.stop().await;
    }
}

#[tokio::test]
async fn what_nobody_can_do_fails_after_so_many_attempts_and_what_is_final_at_once() {
    let target = echo().await;
    for (code, replicas, attempts, ending, reason) in [
        (RefusalCode::ConnectFailed as u32, 2, 2, "forward.failed", "connect_failed"),
        (RefusalCode::ConnectFailed as u32, 6, limits::ATTEMPTS, "forward.failed", "connect_failed"),
        (RefusalCode::Denied as u32, 3, 0, "forward.denied", "agent_denied"),
        (RefusalCode::Malformed as u32, 3, 1, "forward.failed", "agent_malformed"),
        // A reason of RFC 4254, and one of a later version.
        (1, 3, 1, "forward.failed", "agent_refused"),
        (0xFE00_00FF, 3, 1, "forward.failed", "agent_refused"),
    ] {
        let site = Site::plan().door(target).start_gateway().await;
        for number in 0..replicas {
            Fake::link(&site, &format!("r{number}"), Some(code)).await;
        }
        assert_eq!(read_to_end(connect(site.doors[0]).await).await, b"");
        site.record(Side::Gateway, json!({"event": ending, "reason": reason})).await;
        let mut tried: Vec<_> = site
            .records(Side::Gateway, &json!({"event": "forward.attempt"}))
            .iter()
            .map(|record| record["replica"].as_str().expect("a replica").to_owned())
            .collect();
        tried.sort();
        tried.dedup();
        assert_eq!(tried.len(), attempts, "{code:#x}: {tried:?}");
        assert_eq!(count(&site, json!({"event": "forward.attempt"})), attempts);
        site.stop().await;
    }
}

#[tokio::test]
async fn a_replica_that_answers_no_opens_gets_no_more_of_them() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let over = Fake::link(&site, "silent", None).await;
    let mut streams = Vec::new();
    for _ in 0..2 * limits::UNANSWERED_OPENS {
        let mut stream = connect(site.doors[0]).await;
        stream.write_all(b"?").await.expect("written");
        streams.push(stream);
    }
    // All come through in the end: half of them at once, the others after the silent one has been given up.
    for stream in &mut streams {
        assert_eq!(within("an echo", stream.read_u8()).await.expect("carried"), b'?');
    }
    let attempts = json!({"event": "forward.attempt", "replica": "silent", "reason": "timeout"});
    assert_eq!(count(&site, attempts), limits::UNANSWERED_OPENS);
    let begun = Instant::now();
    for _ in 0..4 {
        drop(open(site.doors[0]).await);
    }
    assert!(begun.elapsed() < limits::ANSWER_TIMEOUT, "the silent one is asked again");
    site.record(Side::Gateway, json!({"event": "link.down", "replica": "silent", "reason": "unanswering"})).await;
    within("the silent one is hung up on", over.cancelled()).await;
    let row = rows(&site).await.into_iter().find(|row| row["replica"] == "silent").expect("a row");
    assert_eq!((&row["state"], &row["last_error"]["reason"]), (&json!("absent"), &json!("unanswering")), "{row}");
    site.program(Side::Gateway).says("an agent answers no opens").await;
    drop(streams);
    site.stop().await;
}

#[tokio::test]
async fn at_the_connect_door_an_agent_that_does_not_answer_is_a_504() {
    const { assert!(limits::ANSWER_TIMEOUT.as_secs() < PATIENCE.as_secs()) };
    let target = echo().await;
    let plan = Site::plan();
    let key = register(&plan, TOKEN_KEYS, "signer", "prov*");
    let site = plan.start_gateway().await;
    let _over = Fake::link(&site, "silent", None).await;
    let answer = send(site.address, bearing(&signed(&claims(), &key), target).as_bytes()).await;
    assert_eq!(answer.status, 504, "{}", answer.head);
    assert_eq!(answer.refusal().await["error"], "timed_out");
    let failed = site.record(Side::Gateway, json!({"event": "forward.failed", "door": "connect"})).await;
    assert_eq!(failed["reason"], "timeout", "{failed}");
    site.stop().await;
}

#[tokio::test]
async fn two_replicas_share_the_load_and_a_killed_one_costs_only_what_it_carried() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    let mut two = replica(&site, "two", "two", same).await;
    listed(&site, &[("one", "active"), ("two", "active")]).await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        streams.push(open(site.doors[0]).await);
    }
    let live: Vec<_> = rows(&site).await.iter().map(|row| row["live"].clone()).collect();
    assert_eq!(live, [json!(10), json!(10)]);

    two.kill().await;
    let killed = Instant::now();
    // New ones succeed at once, also those that are opened before the gateway has noticed.
    for _ in 0..20 {
        drop(open(site.doors[0]).await);
    }
    site.record(Side::Gateway, json!({"event": "link.down", "replica": "two", "reason": "lost"})).await;
    let lost = json!({"event": "forward.ended", "replica": "two", "reason": "link_lost"});
    eventually("the endings of what it carried", async || (count(&site, lost.clone()) == 10).then_some(())).await;
    // By what the system tells, not by keepalives.
    assert!(killed.elapsed() < limits::LINK_KEEPALIVE, "noticed after {:?}", killed.elapsed());
    let mut served = 0;
    for mut stream in streams {
        if stream.write_all(b"still there").await.is_ok() {
            let mut back = [0; 11];
            served += usize::from(within("an end", stream.read_exact(&mut back)).await.is_ok());
        }
    }
    assert_eq!(served, 10, "the other one's are untouched");
    listed(&site, &[("one", "active"), ("two", "absent")]).await;
    assert_eq!(count(&site, json!({"event": "forward.failed"})), 0);
    site.stop().await;
}

#[tokio::test]
async fn of_two_processes_with_one_name_the_newest_is_active_and_the_other_takes_over_when_it_is_gone() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut kept = open(site.doors[0]).await;
    // Whoever is started later takes over, again and again.
    let mut newest = None;
    for file in ["second", "third"] {
        drop(newest.take());
        newest = Some(replica(&site, file, "one", same).await);
    }
    let mut newest = newest.expect("a process");
    let line = site.program(Side::Agent).says("another process of this agent, started later").await;
    assert!(line.contains("replica=one") && line.contains("give each process a `replica` of its own"), "{line}");
    site.program(Side::Gateway).says("two processes of an agent have the same replica name").await;
    listed(&site, &[("one", "superseded"), ("one", "active")]).await;
    let active = |rows: Vec<Value>| rows.into_iter().find(|row| row["state"] == "active").expect("an active link");
    let address = active(rows(&site).await)["address"].clone();

    // The older one does not come back by itself in this time; each change of its configuration makes it try.
    let config = site.config(Side::Agent);
    let text = fs::read_to_string(&config).expect("a configuration");
    let ups = count(&site, json!({"event": "link.up"}));
    for cycle in 0..5 {
        let more =
            format!("[[organisation.allow]]\nname = \"more\"\naddresses = [\"10.0.0.{cycle}/32\"]\nports = [1]\n");
        fs::write(&config, format!("{text}{more}")).expect("written");
        site.program(Side::Agent).signal("HUP");
        eventually("another try", async || {
            (count(&site, json!({"event": "link.up"})) == ups + cycle + 1).then_some(())
        })
        .await;
        let down = json!({"event": "link.down", "reason": "superseded"});
        eventually("its end", async || (count(&site, down.clone()) == cycle + 1).then_some(())).await;
        assert_eq!(active(rows(&site).await)["address"], address, "the newest is not thrown out");
    }
    echoes(&mut kept, b"what it carried goes on").await;
    drop(open(site.doors[0]).await);
    assert_eq!(count(&site, json!({"event": "link.up"})), ups + 5, "no flapping");

    newest.kill().await;
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "lost", "replica": "one"})).await;
    let patience = limits::SUPERSEDED_WAIT.mul_f64(1.5) + PATIENCE;
    let taken_over = async { listed(&site, &[("one", "superseded"), ("one", "active")]).await };
    tokio::time::timeout(patience, taken_over).await.expect("the older one takes over");
    echoes(open(site.doors[0]).await, b"served").await;
    echoes(&mut kept, b"and still goes on").await;
    drop(kept);
    site.stop().await;
}

#[tokio::test]
async fn a_forward_waits_for_its_agent_to_link() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start_gateway().await;
    let mut early = connect(site.doors[0]).await;
    early.write_all(b"early").await.expect("written");
    site.record(Side::Gateway, json!({"event": "forward.open"})).await;
    site.restart_agent().await;
    let mut back = [0; 5];
    within("an echo", early.read_exact(&mut back)).await.expect("carried");
    assert_eq!(&back, b"early");
    drop(early);
    site.record(Side::Agent, json!({"event": "forward.ended"})).await;
    assert_eq!(count(&site, json!({"event": "forward.failed"})), 0);

    // Not for ever; and not at all for somebody who is not allowed.
    assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    let begun = Instant::now();
    assert_eq!(read_to_end(connect(site.doors[0]).await).await, b"");
    let waited = begun.elapsed();
    assert!(waited >= limits::LINK_PATIENCE && waited < limits::LINK_PATIENCE * 2, "{waited:?}");
    site.record(Side::Gateway, json!({"event": "forward.failed", "reason": "no_link"})).await;

    // Who waits is cut like who runs, and by a stop.
    let waiting = connect(site.doors[0]).await;
    eventually("the third", async || (count(&site, json!({"event": "forward.open"})) == 3).then_some(())).await;
    site.registry().about("acme/principals/provisioner", "agents = [\"prod-*\"]\ntargets = []");
    assert_eq!(read_to_end(waiting).await, b"");
    site.record(Side::Gateway, json!({"event": "forward.denied", "reason": "revoked"})).await;
    let begun = Instant::now();
    assert_eq!(read_to_end(connect(site.doors[0]).await).await, b"");
    assert!(begun.elapsed() < limits::LINK_PATIENCE, "a denial waits for nothing");
    site.record(Side::Gateway, json!({"event": "forward.denied", "reason": "target_not_granted"})).await;
    site.registry().about("acme/principals/provisioner", "agents = [\"prod-*\"]");
    eventually("two reloads", async || (count(&site, json!({"event": "registry.reloaded"})) == 2).then_some(())).await;
    let waiting = connect(site.doors[0]).await;
    eventually("the fourth", async || (count(&site, json!({"event": "forward.open"})) == 4).then_some(())).await;
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    assert_eq!(read_to_end(waiting).await, b"");
}

#[tokio::test]
async fn who_is_missing_is_listed_with_the_reason() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.registry().key("acme/agents/waiting", "one", &plan.public("gateway"));
    let mut site = plan.start_gateway().await;
    let table = async |site: &Site, arguments: &[&str]| {
        let mut command = caponier();
        command.arg("agents").arg("--socket").arg(site.admin_socket()).args(arguments);
        run(&mut command).await.done()
    };
    listed(&site, &[("-", "never linked")]).await;
    let text = table(&site, &[]).await;
    assert!(text.contains("acme/waiting") && text.contains("never linked"), "{text}");

    // A process with a key that is not the agent's only claims to be it.
    site.key("stranger");
    let mut wrong = stranger(&site).await;
    let row =
        eventually("the refusal", async || rows(&site).await.into_iter().find(|row| row["last_error"].is_object()))
            .await;
    assert_eq!((&row["state"], &row["last_error"]["reason"]), (&json!("never linked"), &json!("unknown_key")), "{row}");
    assert_eq!(row["last_error"]["claimed"], true, "{row}");
    assert!(row["last_error"]["detail"].as_str().expect("a detail").contains("SHA256:"), "{row}");
    assert!(table(&site, &[]).await.contains("unknown_key?"));
    assert_eq!(wrong.stop().await, Some(0));

    site.restart_agent().await;
    site.linked().await;
    let mut stream = open(site.doors[0]).await;
    listed(&site, &[("one", "active")]).await;
    let row = rows(&site).await.remove(0);
    assert!(row["last_error"].is_null() && row["credit"].as_u64() > Some(0), "{row}");
    assert_eq!((&row["held"], &row["unsent"]), (&json!(0), &json!(0)), "{row}");
    let text = table(&site, &[]).await;
    assert!(text.lines().all(|line| line.len() <= 80), "{text}");
    let wide = table(&site, &["--wide"]).await;
    for word in ["ADDRESS", "VERSION", "CREDIT", "HELD", "UNSENT", "SHA256:", env!("CARGO_PKG_VERSION")] {
        assert!(wide.contains(word), "{word}: {wide}");
    }

    site.program(Side::Agent).kill().await;
    assert_eq!(read_to_end(&mut stream).await, b"");
    listed(&site, &[("one", "absent")]).await;
    let row = rows(&site).await.remove(0);
    assert_eq!((&row["last_error"]["reason"], &row["last_error"]["claimed"]), (&json!("lost"), &json!(false)), "{row}");
    assert!(row["address"].is_string() && row["key"].is_string() && row["version"].is_string(), "{row}");
    assert!(table(&site, &[]).await.contains("absent"));

    // What is not registered any more is not missing.
    fs::remove_dir_all(site.registry().folder("acme/agents/waiting")).expect("removed");
    eventually("it is gone", async || (!table(&site, &[]).await.contains("acme/waiting")).then_some(())).await;
}

/// Starts a process that claims to be the site's agent, with another key.
async fn stranger(site: &Site) -> Program {
    let config = format!(
        "[agent]\nid = \"prod-eu\"\nreplica = \"one\"\nhost_key = \"stranger\"\n[audit]\nfile = \"stranger.jsonl\"\n\
         [[organisation]]\nid = \"acme\"\ngateways = [\"ssh://{}\"]\n\
         [[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n",
        site.address,
        site.public("login-acme").trim()
    );
    fs::write(site.path().join("stranger.toml"), config).expect("written");
    let mut command = caponier();
    command.arg("agent").arg("--config").arg(site.path().join("stranger.toml"));
    let mut program = site.background("stranger", command);
    program.says("not linked").await;
    program
}

#[tokio::test]
async fn a_revoked_agent_key_is_the_reason_that_its_forwards_end() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    let mut stream = open(site.doors[0]).await;
    site.registry().about_key("acme/agents/prod-eu", "one", "revoked = true");
    assert_eq!(read_to_end(&mut stream).await, b"");
    let ended = site.record(Side::Gateway, json!({"event": "forward.ended"})).await;
    assert_eq!(ended["reason"], "revoked", "{ended}");
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "revoked"})).await;
    listed(&site, &[("one", "absent")]).await;
    site.stop().await;
}

/// Both names are kept linked, each by itself; with one place for the process, each new link would throw the other out.
#[tokio::test]
async fn regression_two_urls_of_one_gateway_are_two_links_that_stay() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let config = site.config(Side::Agent);
    let text = fs::read_to_string(&config).expect("a configuration");
    let url = format!("\"ssh://{}\"", site.address);
    let other = format!("\"ssh://localhost:{}\"", site.address.port());
    assert!(text.contains(&url), "{text}");
    fs::write(&config, text.replace(&url, &format!("{url}, {other}"))).expect("written");
    let mut first = open(site.doors[0]).await;
    site.program(Side::Agent).signal("HUP");
    listed(&site, &[("one", "active"), ("one", "active")]).await;
    let since = |rows: Vec<Value>| rows.iter().map(|row| row["since"].clone()).collect::<Vec<_>>();
    let before = since(rows(&site).await);
    let mut second = open(site.doors[0]).await;
    let rows_now = rows(&site).await;
    assert!(rows_now.iter().all(|row| row["live"] == 1), "{rows_now:?}");
    // Had one replaced the other, it would have been retired at once, and ended with its last forward.
    assert_eq!(since(rows_now), before);
    for stream in [&mut first, &mut second] {
        echoes(stream, b"both").await;
    }
    drop((first, second));
    site.stop().await;
}

//! Two organisations on one gateway and one agent, each of which tries to reach, name, list, time or exhaust the other.
//!
//! They share all that may be shared: the agent's process, its id and its host key, the names of principals and of rules, and
//! a person whose public key is registered in both. Every test goes both ways.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use caponier::limits;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::harness::{caponier, connect, echoes, eventually, read_to_end, run};
use crate::kinds::string;
use crate::raw::{GATEWAY_LINE, LOGIN_FAILURE, Peer, originator};
use crate::yard::{Counted, Yard};

/// Each with the other.
const PAIRS: [(&str, &str); 2] = [("acme", "globex"), ("globex", "acme")];

/// What only one of them has, and no record or answer of the other may show.
const MARKS: [(&str, [&str; 4]); 2] = [
    ("acme", ["acme", "agent-of-a", "provisioner", "rule-of-a"]),
    ("globex", ["globex", "agent-of-g", "operator", "rule-of-g"]),
];

struct World {
    yard: Yard,
    counted: Counted,
    /// Of the target that each may reach, in the order of [`MARKS`].
    targets: [u16; 2],
    gateway: SocketAddr,
    /// See [`DOORS`].
    doors: Vec<SocketAddr>,
    logins: AtomicUsize,
}

/// The loopback doors: organisation, agent, whose target, principal.
const DOORS: [(&str, &str, &str, &str); 10] = [
    ("acme", "prod-eu", "acme", "ci"),
    ("globex", "prod-eu", "globex", "ci"),
    ("acme", "prod-eu", "acme", "provisioner"),
    ("globex", "prod-eu", "globex", "operator"),
    // Of the other: its target, its principal, its agent.
    ("acme", "prod-eu", "globex", "ci"),
    ("globex", "prod-eu", "acme", "ci"),
    ("acme", "prod-eu", "acme", "operator"),
    ("globex", "prod-eu", "globex", "provisioner"),
    ("acme", "agent-of-g", "acme", "ci"),
    ("globex", "agent-of-a", "globex", "ci"),
];

/// Why each of the doors from the fifth on is refused.
const WHY: [&str; 6] =
    ["agent_denied", "agent_denied", "not_registered", "not_registered", "not_registered", "not_registered"];

fn at(organisation: &str) -> usize {
    usize::from(organisation == "globex")
}

impl World {
    async fn new() -> Self {
        let yard = Yard::new();
        for (whose, key) in [
            ("acme/agents/prod-eu", "agent"),
            ("globex/agents/prod-eu", "agent"),
            ("acme/agents/agent-of-a", "agent-acme"),
            ("globex/agents/agent-of-g", "agent-globex"),
        ] {
            yard.register(whose, key);
        }
        for (whose, key) in [
            ("acme/principals/ci", "ci-acme"),
            ("globex/principals/ci", "ci-globex"),
            ("acme/principals/provisioner", "shared"),
            ("globex/principals/operator", "shared"),
        ] {
            yard.principal(whose, key, "agents = [\"*\"]");
        }
        for key in ["gateway", "login-acme", "login-globex", "stranger"] {
            yard.key(key);
        }
        let counted = Counted::new();
        let targets = [counted.listen("127.0.0.1", 0).await, counted.listen("127.0.0.1", 0).await];
        let gateway = SocketAddr::from(([127, 0, 0, 1], 0));
        Self { yard, counted, targets, gateway, doors: Vec::new(), logins: AtomicUsize::new(0) }
    }

    /// A gateway, with more for its `[gateway.limits]`, and an agent that is linked to it for both.
    async fn linked(limits: &str) -> Self {
        let mut world = Self::new().await;
        let config = world.gateway_config(limits);
        (world.gateway, world.doors) = world.yard.gateway("gateway", &config).await;
        let gateway = format!("ssh://127.0.0.1:{}", world.gateway.port());
        let config = world.agent_config(&gateway, &gateway);
        world.yard.agent("agent", &config).await;
        world.yard.links("gateway", 2).await;
        world
    }

    fn gateway_config(&self, limits: &str) -> String {
        let mut config = format!(
            "[gateway]\nlisten = [\"{}\"]\nhost_key = \"gateway\"\nregistry = \"keys\"\nadmin_socket = \"{}\"\n\
             [gateway.limits]\n{limits}\n[audit]\nfile = \"gateway.jsonl\"\n",
            self.gateway,
            self.yard.path("admin.sock").display()
        );
        for (organisation, _) in PAIRS {
            config.push_str(&format!(
                "[[organisation]]\nid = \"{organisation}\"\nlogin_key = \"login-{organisation}\"\n"
            ));
        }
        for (number, (organisation, agent, whose, principal)) in DOORS.iter().enumerate() {
            let listen = self.doors.get(number).copied().unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
            config.push_str(&format!(
                "[[local]]\nlisten = \"{listen}\"\nagent = \"{organisation}/{agent}\"\ntarget = \"127.0.0.1:{}\"\n\
                 principal = \"{principal}\"\n",
                self.targets[at(whose)]
            ));
        }
        config
    }

    fn agent_config(&self, acme: &str, globex: &str) -> String {
        let mut config =
            "[agent]\nid = \"prod-eu\"\nreplica = \"one\"\nhost_key = \"agent\"\n[audit]\nfile = \"agent.jsonl\"\n"
                .to_owned();
        for (organisation, gateway, own) in [("acme", acme, "rule-of-a"), ("globex", globex, "rule-of-g")] {
            config.push_str(&format!(
                "[[organisation]]\nid = \"{organisation}\"\ngateways = [\"{gateway}\"]\n\
                 [[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n\
                 [[organisation.allow]]\nname = \"db\"\naddresses = [\"127.0.0.1/32\"]\nports = [{}]\n\
                 [[organisation.allow]]\nname = \"{own}\"\naddresses = [\"127.0.0.9/32\"]\nports = [1]\n",
                self.yard.public(&format!("login-{organisation}")),
                self.targets[at(organisation)]
            ));
        }
        config
    }

    /// How a login at the SSH door ends: from where, and what was answered.
    async fn login(&self, peer: &mut Peer, user: &str, key: &str) -> (Value, Value) {
        // From an address of its own, so that it does not wait for what others have tried.
        let number = self.logins.fetch_add(1, Ordering::Relaxed) + 1;
        let connect = json!({"do": "connect", "port": self.gateway.port(), "source": format!("127.0.1.{number}")});
        let from = peer.ask(connect).await["local"].clone();
        peer.ask(json!({"do": "client"})).await;
        let answer = peer.ask(json!({"do": "login", "user": user, "key": self.yard.key(key)})).await;
        if answer["ok"] == false {
            // It is recorded when the session has ended.
            peer.ask(json!({"do": "drop"})).await;
        }
        (from, answer)
    }

    async fn refused(&self, from: &Value) -> Value {
        let refused = |it: &Value| it["event"] == "auth.refused" && it["client"] == *from;
        self.yard.entry("gateway", 0, "a refused login", refused).await
    }

    /// A stream through a door that is held open.
    async fn held(&self, door: usize) -> TcpStream {
        let mut stream = connect(self.doors[door]).await;
        echoes(&mut stream, b"held").await;
        stream
    }

    /// The rows of `caponier agents`.
    async fn rows(&self) -> Vec<Value> {
        let said =
            run(caponier().args(["agents", "--json", "--socket"]).arg(self.yard.path("admin.sock"))).await.done();
        serde_json::from_str(&said).expect("JSON")
    }

    /// No record of what one had, asked for or was refused says anything of the other.
    fn assert_apart(&self) {
        for side in ["gateway", "agent"] {
            for record in self.yard.trail(side) {
                // Who may not log in claims whatever it likes; that record is the operator's.
                if record["event"] == "auth.refused" {
                    continue;
                }
                for (mine, other) in PAIRS {
                    if record["organisation"] != mine {
                        continue;
                    }
                    // As it was asked for: the doors with another's principal or agent are refused as such.
                    let mut record = record.clone();
                    if record["reason"] == "not_registered" {
                        let fields = record.as_object_mut().expect("an object");
                        fields.retain(|field, _| !["principal", "agent", "detail"].contains(&field.as_str()));
                    }
                    let text = record.to_string();
                    let keys = ["login", "ci"].map(|kind| self.yard.fingerprint(&format!("{kind}-{other}")));
                    let theirs = MARKS[at(other)].1.iter().copied().chain(keys.iter().map(String::as_str));
                    for mark in theirs {
                        assert!(!text.contains(mark), "{side}: a record of {mine} says {mark}: {record}");
                    }
                    if side == "agent" && record["event"] == "forward.open" {
                        assert_eq!(record["target"], format!("127.0.0.1:{}", self.targets[at(mine)]), "{record}");
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn neither_reaches_or_names_the_other() {
    let world = World::linked("").await;
    let mut peer = Peer::start();
    let mut answers = Vec::new();
    for (mine, other) in PAIRS {
        let key = format!("ci-{mine}");
        let (theirs, user) = (MARKS[at(other)].1[1], format!("{other}/prod-eu"));
        // What exists at the other looks like what exists nowhere, in bytes, and takes as long at least.
        for (user, reason) in [
            (user.clone(), "other_organisation"),
            (format!("{other}/{theirs}"), "other_organisation"),
            (format!("{other}/nowhere"), "other_organisation"),
            ("initech/prod-eu".to_owned(), "unknown_organisation"),
            (format!("{mine}/{theirs}"), "unknown_agent"),
            (format!("{mine}/nowhere"), "unknown_agent"),
        ] {
            let (from, answer) = world.login(&mut peer, &user, &key).await;
            assert_eq!((&answer["ok"], &answer["answers"]), (&json!(false), &json!([LOGIN_FAILURE])), "{answer}");
            let seconds = answer["seconds"].as_f64().expect("seconds");
            assert!(seconds >= limits::LOGIN_REFUSAL_DELAY.as_secs_f64() - 0.002, "{user}: {answer}");
            answers.push(answer["answers"].clone());
            assert_eq!(world.refused(&from).await["reason"], reason, "{user}");
        }
        // Its own door, and through it only its own rules.
        let own = format!("{mine}/prod-eu");
        let (_, answer) = world.login(&mut peer, &own, &key).await;
        assert_eq!(answer["ok"], true, "{answer}");
        let open = |port: u16| json!({"do": "open", "type": "direct-tcpip", "host": "127.0.0.1", "port": port});
        let count = world.counted.count();
        let refused = peer.ask(open(world.targets[at(other)])).await;
        assert_eq!((&refused["message"], &refused["text"]), (&json!(92), &json!("not allowed")), "{refused}");
        assert_eq!(world.counted.count(), count, "the other's target was dialled");
        let allowed = peer.ask(open(world.targets[at(mine)])).await;
        peer.echoes(&allowed).await;
        // Nothing tells it who else is there.
        for name in ["agents@caponier", "list", "hostkeys-prove-00@openssh.com"] {
            let answer = peer.ask(json!({"do": "global", "name": name, "rest": string(other)})).await;
            assert_eq!(answer["message"], 82, "{answer}");
        }
        peer.ask(json!({"do": "drop"})).await;
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");
    // The other's target, principal and agent, by loopback doors.
    for (number, ((organisation, ..), why)) in DOORS.iter().skip(4).zip(WHY).enumerate() {
        let (from, count) = (world.yard.trail("gateway").len(), world.counted.count());
        assert_eq!(read_to_end(connect(world.doors[4 + number]).await).await, b"", "door {number} is open");
        let denied = |it: &Value| it["event"] == "forward.denied";
        let record = world.yard.entry("gateway", from, "a refused forward", denied).await;
        assert_eq!((&record["reason"], &record["organisation"]), (&json!(why), &json!(organisation)), "{record}");
        assert_eq!(world.counted.count(), count, "somebody was dialled");
    }
    // Only the operator, by the admin socket, sees both.
    let rows = world.rows().await;
    for (mine, _) in PAIRS {
        let linked = rows.iter().filter(|row| row["organisation"] == mine && row["state"] == "active").count();
        assert_eq!(linked, 1, "{rows:?}");
    }
    world.assert_apart();
}

#[tokio::test]
async fn one_key_is_in_each_organisation_who_it_is_there() {
    let world = World::linked("").await;
    let mut peer = Peer::start();
    for (organisation, principal) in [("acme", "provisioner"), ("globex", "operator")] {
        let (_, answer) = world.login(&mut peer, &format!("{organisation}/prod-eu"), "shared").await;
        assert_eq!(answer["ok"], true, "{answer}");
        let port = world.targets[at(organisation)];
        let open = json!({"do": "open", "type": "direct-tcpip", "host": "127.0.0.1", "port": port});
        let opened = peer.ask(open).await;
        peer.echoes(&opened).await;
        for side in ["gateway", "agent"] {
            let opened = |it: &Value| it["event"] == "forward.open" && it["organisation"] == organisation;
            let record = world.yard.entry(side, 0, "the forward", opened).await;
            assert_eq!(record["principal"], principal, "{record}");
        }
    }
    // The same names, too: a principal, an agent and a rule.
    for (door, (organisation, ..)) in DOORS.iter().enumerate().take(2) {
        world.held(door).await;
        let ended = |it: &Value| {
            it["event"] == "forward.open" && it["organisation"] == *organisation && it["principal"] == "ci"
        };
        let record = world.yard.entry("agent", 0, "the forward", ended).await;
        assert_eq!((&record["agent"], &record["rule"]), (&json!("prod-eu"), &json!("db")), "{record}");
        assert_eq!(record["target"], format!("127.0.0.1:{}", world.targets[door]), "{record}");
        assert_eq!(record["asserted_by"], world.yard.fingerprint(&format!("login-{organisation}")), "{record}");
    }
    // Taken from one, it stays in the other.
    world.yard.registry().about_key("acme/principals/provisioner", "shared", "revoked = true");
    let mut reason = Value::Null;
    eventually("the key is revoked in acme", async || {
        let (from, answer) = world.login(&mut peer, "acme/prod-eu", "shared").await;
        if answer["ok"] == true {
            return None;
        }
        reason = world.refused(&from).await["reason"].clone();
        Some(())
    })
    .await;
    assert_eq!(reason, "revoked");
    let (_, answer) = world.login(&mut peer, "globex/prod-eu", "shared").await;
    assert_eq!(answer["ok"], true, "{answer}");
    world.assert_apart();
}

#[tokio::test]
async fn an_agent_cannot_link_as_the_others() {
    let world = World::linked("").await;
    let mut peer = Peer::start();
    let line = |name: &str| format!("SSH-2.0-caponier_1 agent={name}/x");
    for (number, (key, name, reason)) in [
        ("agent-acme", "globex/agent-of-g", "other_organisation"),
        ("agent-acme", "globex/prod-eu", "other_organisation"),
        ("agent-acme", "globex/agent-of-a", "unknown_agent"),
        ("agent-acme", "globex/nowhere", "unknown_agent"),
        ("agent-globex", "acme/agent-of-a", "other_organisation"),
        ("agent-globex", "acme/prod-eu", "other_organisation"),
        ("agent-globex", "acme/agent-of-g", "unknown_agent"),
        ("ci-globex", "acme/prod-eu", "other_organisation"),
        ("login-globex", "acme/prod-eu", "unknown_key"),
    ]
    .into_iter()
    .enumerate()
    {
        let source = format!("127.0.2.{}", number + 1);
        let connect = json!({"do": "connect", "port": world.gateway.port(), "source": source});
        let from = peer.ask(connect).await["local"].clone();
        let server = json!({"do": "server", "identification": line(name), "key": world.yard.key(key)});
        let login = peer.ask(server).await;
        // The gateway has ended it before it showed itself: no login, of neither organisation.
        assert_eq!((&login["logins"], &login["open"]), (&json!([]), &json!(false)), "{key} as {name}: {login}");
        assert_eq!(world.refused(&from).await["reason"], reason, "{key} as {name}");
    }
    // The key that both have registered: the gateway comes to each with the login that is that one's, and no other.
    for (organisation, _) in PAIRS {
        peer.ask(json!({"do": "connect", "port": world.gateway.port()})).await;
        let name = format!("{organisation}/prod-eu");
        let server =
            json!({"do": "server", "identification": line(&name), "key": world.yard.key("agent"), "admit": false});
        let login = peer.ask(server).await;
        let key = world.yard.public(&format!("login-{organisation}"));
        let key = key.splitn(3, ' ').take(2).collect::<Vec<_>>().join(" ");
        assert_eq!(login["logins"], json!([{"user": organisation, "key": key}]), "{login}");
    }
    let rows = world.rows().await;
    assert_eq!(rows.iter().filter(|row| row["state"] == "active").count(), 2, "{rows:?}");
    world.assert_apart();
}

#[tokio::test]
async fn a_gateway_of_one_is_nobody_to_the_other_at_their_agent() {
    let mut world = World::new().await;
    let (mut acme, mut globex) = (Peer::start(), Peer::start());
    let mut urls = Vec::new();
    for peer in [&mut acme, &mut globex] {
        urls.push(format!("ssh://127.0.0.1:{}", peer.ask(json!({"do": "listen"})).await["port"]));
    }
    let config = world.agent_config(&urls[0], &urls[1]);
    world.yard.agent("agent", &config).await;
    for (peer, (mine, other)) in [&mut acme, &mut globex].into_iter().zip(PAIRS) {
        peer.ask(json!({"do": "accept"})).await;
        let exchanged = peer.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
        // It says whose link it is, and nothing of the other.
        assert_eq!(exchanged["line"], format!("SSH-2.0-caponier_1 agent={mine}/prod-eu/one"), "{exchanged}");
        for (user, key) in [(mine, other), (other, mine), (other, other)] {
            let login = json!({"do": "login", "user": user, "key": world.yard.key(&format!("login-{key}"))});
            let answer = peer.ask(login).await;
            assert_eq!((&answer["ok"], &answer["answers"]), (&json!(false), &json!([LOGIN_FAILURE])), "{answer}");
        }
        let login = json!({"do": "login", "user": mine, "key": world.yard.key(&format!("login-{mine}"))});
        let answer = peer.ask(login).await;
        assert_eq!(answer["ok"], true, "{answer}");
        // The rules of the other serve nobody here, and are not told.
        let count = world.counted.count();
        for (host, port) in [("127.0.0.1", world.targets[at(other)]), ("127.0.0.8", 1)] {
            let answer = peer.gateway_forward(&originator("ci"), host, port).await;
            assert_eq!((&answer["message"], &answer["code"]), (&json!(92), &json!(0xFE00_0001_u32)), "{answer}");
            for mark in MARKS[at(other)].1 {
                assert!(!answer["text"].as_str().expect("text").contains(mark), "{answer}");
            }
        }
        assert_eq!(world.counted.count(), count, "the other's target was dialled");
        let allowed = peer.gateway_forward(&originator("ci"), "127.0.0.1", world.targets[at(mine)]).await;
        peer.echoes(&allowed).await;
    }
    // An id that lives at one is free at the other.
    let claim = originator("ci");
    for (peer, port) in [(&mut acme, world.targets[0]), (&mut globex, world.targets[1])] {
        let opened = peer.gateway_forward(&claim, "127.0.0.1", port).await;
        peer.echoes(&opened).await;
    }
    world.assert_apart();
}

#[tokio::test]
async fn a_login_key_serves_one_organisation_at_either_end() {
    let world = World::new().await;
    let refuses = async |name: &str, text: &str| {
        let file = format!("{name}.toml");
        world.yard.write(&file, text);
        let said = run(caponier().arg("check").arg(world.yard.path(&file))).await;
        assert_eq!(said.code(), 2, "{name}: {said:?}\n{text}");
        let both = said.stderr.contains("organisation[1]") && said.stderr.contains("acme");
        assert!(both, "{name}: which two is not said: {said:?}");
    };
    let gateway = world.gateway_config("");
    let agent = world.agent_config("ssh://127.0.0.1:9", "ssh://127.0.0.1:9");
    for (name, text) in [("gateway", &gateway), ("agent", &agent)] {
        world.yard.write(&format!("{name}.toml"), text);
        run(caponier().arg("check").arg(world.yard.path(&format!("{name}.toml")))).await.done();
    }
    refuses("same-file", &gateway.replace("login-globex", "login-acme")).await;
    // The same key is no other for standing in another file, …
    std::fs::copy(world.yard.key("login-acme"), world.yard.path("copied")).expect("a copy");
    refuses("same-key", &gateway.replace("login-globex", "copied")).await;
    // … or with another comment, or as PEM.
    let (acme, globex) = (world.yard.public("login-acme"), world.yard.public("login-globex"));
    refuses("same-public", &agent.replace(&globex, &acme)).await;
    refuses("commented", &agent.replace(&globex, &format!("{acme} another comment"))).await;
    let file = world.yard.path("login-acme.pub");
    let pem = run(tokio::process::Command::new("ssh-keygen").args(["-e", "-m", "PKCS8", "-f"]).arg(&file)).await;
    if pem.status.success() {
        refuses("pem", &agent.replace(&format!("\"{globex}\""), &format!("'''\n{}'''", pem.stdout))).await;
    }
}

#[tokio::test]
async fn neither_exhausts_the_other() {
    let limits = "forwards_per_principal = 2\nforwards_per_organisation = 3\nsessions_per_principal = 2\n\
                  pending_opens_per_principal = 2\nopens_per_second_per_principal = 40\n\
                  opens_per_second_per_organisation = 60";
    let world = World::linked(limits).await;
    // Forwards of one principal, of the other in the same organisation, and then of the organisation, by both doors' names.
    let mut held = vec![world.held(0).await, world.held(0).await];
    let limited = async |door: usize, limit: &str| {
        let from = world.yard.trail("gateway").len();
        assert_eq!(read_to_end(connect(world.doors[door]).await).await, b"", "door {door} is open");
        let denied = |it: &Value| it["event"] == "forward.denied";
        let record = world.yard.entry("gateway", from, "a refused forward", denied).await;
        assert_eq!((&record["reason"], &record["detail"]), (&json!("limit"), &json!(limit)), "{record}");
    };
    limited(0, "forwards_per_principal").await;
    held.push(world.held(2).await);
    limited(2, "forwards_per_organisation").await;
    // A principal of the same name, and the whole organisation, have theirs.
    for door in [1, 1, 3] {
        held.push(world.held(door).await);
    }
    limited(1, "forwards_per_principal").await;
    limited(3, "forwards_per_organisation").await;
    for stream in &mut held {
        echoes(stream, b"still").await;
    }
    held.truncate(0);
    // Sessions: so many of one, and the other's are not counted among them.
    let mut sessions = Vec::new();
    for (organisation, _) in PAIRS {
        for number in 0..3 {
            let mut peer = Peer::start();
            let (_, answer) =
                world.login(&mut peer, &format!("{organisation}/prod-eu"), &format!("ci-{organisation}")).await;
            assert_eq!(answer["ok"], true, "{answer}");
            let closed = peer.ask(json!({"do": "closed", "within": if number < 2 { 0.1 } else { 10.0 }})).await;
            assert_eq!(closed["closed"], number == 2, "session {number} of {organisation}");
            sessions.push(peer);
        }
    }
    // A flood of opens by one, which is refused for the most part, while the other's are served.
    let flood = async {
        for _ in 0..400 {
            if let Ok(stream) = TcpStream::connect(world.doors[0]).await {
                drop(stream);
            }
        }
    };
    let served = async {
        for _ in 0..5 {
            let mut stream = connect(world.doors[1]).await;
            echoes(&mut stream, b"served").await;
            drop(stream);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::join!(flood, served);
    world.assert_apart();
}

#[tokio::test]
async fn what_befalls_one_leaves_the_other_alone() {
    let mut world = World::linked("").await;
    // One of the registry's, one of the gateway's configuration, one of the agent's.
    let mut streams = [world.held(0).await, world.held(1).await];
    let agents = |trail: Vec<Value>, organisation: &str| {
        trail.iter().filter(|it| it["event"] == "link.down" && it["organisation"] == organisation).count()
    };
    // Its folder in the registry goes, and comes back.
    let folder = world.yard.path("keys/organisations/acme");
    std::fs::rename(&folder, world.yard.path("acme-put-away")).expect("put away");
    assert_eq!(read_to_end(&mut streams[0]).await, b"");
    echoes(&mut streams[1], b"untouched by the registry").await;
    eventually("acme's link is cut", async || (agents(world.yard.trail("gateway"), "acme") == 1).then_some(())).await;
    std::fs::rename(world.yard.path("acme-put-away"), &folder).expect("put back");
    world.yard.links("gateway", 3).await;
    streams[0] = world.held(0).await;
    // The gateway serves it no more, and then again.
    let whole = world.gateway_config("");
    let without = whole.replace("[[organisation]]\nid = \"acme\"\nlogin_key = \"login-acme\"\n", "");
    let parts: Vec<&str> = without.split("[[local]]").filter(|part| !part.contains("\"acme/")).collect();
    world.yard.write("gateway.toml", &parts.join("[[local]]"));
    world.yard.program("gateway").signal("HUP");
    assert_eq!(read_to_end(&mut streams[0]).await, b"");
    echoes(&mut streams[1], b"untouched by the gateway").await;
    world.yard.write("gateway.toml", &whole);
    world.yard.program("gateway").signal("HUP");
    world.yard.links("gateway", 4).await;
    streams[0] = world.held(0).await;
    // The agent serves it no more.
    let gateway = format!("ssh://127.0.0.1:{}", world.gateway.port());
    let config = world.agent_config(&gateway, &gateway);
    let (head, rest) = config.split_once("[[organisation]]\nid = \"acme\"").expect("acme");
    let (_, globex) = rest.split_once("[[organisation]]\n").expect("globex");
    world.yard.write("agent.toml", &format!("{head}[[organisation]]\n{globex}"));
    world.yard.program("agent").signal("HUP");
    assert_eq!(read_to_end(&mut streams[0]).await, b"");
    echoes(&mut streams[1], b"untouched by the agent").await;
    let trail = world.yard.trail("gateway");
    assert_eq!(agents(trail.clone(), "globex"), 0, "{trail:?}");
    let downs = |side: &str| {
        let ended = |it: &&Value| it["organisation"] == "globex" && it["event"] != "forward.open";
        world.yard.trail(side).iter().filter(ended).filter(|it| it["event"] != "link.up").count()
    };
    assert_eq!((downs("gateway"), downs("agent")), (0, 0), "something of globex has ended");
    // And it is as it was: new forwards, too.
    world.held(1).await;
    world.assert_apart();
}

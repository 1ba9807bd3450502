//! Peers that have logged in as they should and then keep the other end busy without any use: a gateway at an agent, an
//! agent at a gateway, a client at the door. Each is cut, with a record; what it makes the other end hold is bounded; and
//! meanwhile a forward of another organisation, through the same process, carries every byte as it was sent.
//!
//! How much of its speed such a forward keeps is measured by `scripts/soak hostile`. Peers that break the rules of credit and
//! windows are in `links.rs`; opens that are too many, forged principals and repeated ids in `raw.rs`; peers that stop in the
//! middle of a handshake, too.

use super::*;

use tokio_util::sync::CancellationToken;

/// What one hostile link may make a process hold, in KiB.
const PER_LINK: u64 = 64 * 1024;

/// What a process may have grown by otherwise, in KiB: the honest session, records, and what an allocator keeps.
const NOISE: u64 = 16 * 1024;

/// More than any session is let send.
const MANY: u64 = 400_000;

/// Messages that nobody needs (RFC 4253 §11, RFC 4254 §4): what they are, and how they read.
fn idle() -> Vec<(&'static str, String)> {
    vec![
        ("ignored messages", format!("02{}", string("nothing"))),
        ("global requests", format!("50{}01", string("nothing@example.com"))),
        ("global requests without an answer", format!("50{}00", string("nothing@example.com"))),
        ("closes of no channel", "61000fffff".to_owned()),
    ]
}

/// The same on an open channel, whose number follows the first byte.
fn idle_on_a_channel() -> Vec<(&'static str, String)> {
    vec![
        ("windows that nobody needs", "5d00000001".to_owned()),
        ("requests on a channel", format!("62{}00", string("nothing"))),
        ("data without a byte", "5e00000000".to_owned()),
    ]
}

/// A process's resident memory, in KiB.
fn memory(process: &Process) -> u64 {
    let id = process.child.id().expect("running");
    let status = fs::read_to_string(format!("/proc/{id}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Sends over a forward to the echo and compares what comes back, until `stop` fires; returns how often.
async fn honest(peer: &mut Peer, id: &Value, stop: &CancellationToken) -> u64 {
    let mut rounds = 0_u64;
    while !stop.is_cancelled() || rounds < 3 {
        let sent = hex(&rounds.to_be_bytes().repeat(128));
        peer.ask(json!({"do": "send", "id": id, "hex": sent})).await;
        let got = peer.ask(json!({"do": "receive", "id": id, "bytes_": 1_024, "within": 60})).await;
        assert_eq!(got["data"], sent, "round {rounds}");
        rounds += 1;
    }
    rounds
}

/// Does something beside an honest forward.
async fn beside<T>(peer: &mut Peer, id: &Value, hostile: impl Future<Output = T>) -> T {
    let stop = CancellationToken::new();
    let hostile = async {
        let result = hostile.await;
        stop.cancel();
        result
    };
    tokio::join!(hostile, honest(peer, id, &stop)).0
}

/// Sends a message without an end, and is hung up on.
async fn pours(peer: &mut Peer, what: &str, message: &str, channel: Option<&Value>) {
    let mut command = json!({"do": "pour", "hex": message, "most": MANY});
    if let Some(channel) = channel {
        command["channel"] = channel.clone();
    }
    let poured = peer.ask(command).await;
    // Which it may notice while it is asked.
    let end = peer.try_ask(json!({"do": "closed", "within": 60})).await;
    assert!(end["closed"] == true || end["error"] == "EOFError: ", "{what}: {poured} {end}");
}

impl World {
    fn violations(&self, side: &str, reason: &str) -> usize {
        let wanted = |it: &&Value| it["event"] == "peer.violation" && it["reason"] == reason;
        self.trail(side).iter().filter(wanted).count()
    }

    async fn recorded(&self, side: &str, reason: &str, count: usize, what: &str) {
        until(what, SOON, || (self.violations(side, reason) >= count).then_some(())).await;
    }

    /// A gateway, an agent of ours for globex, and a client's forward through both.
    async fn with_a_neighbour() -> (Self, Peer, Value) {
        let mut world = Self::with_gateway().await;
        let config = world.path("agent.toml");
        let text = format!(
            "[agent]\nid = \"prod-eu\"\nreplica = \"n1\"\nhost_key = \"agent-globex\"\n\
             [audit]\nfile = \"agent.jsonl\"\n[log]\nformat = \"json\"\n\
             [[organisation]]\nid = \"globex\"\ngateways = [\"ssh://127.0.0.1:{}\"]\n\
             [[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"deployer\"]\n\
             [[organisation.allow]]\nname = \"echo\"\naddresses = [\"127.0.0.1/32\"]\nports = [{}]\n",
            world.port,
            world.public("login-globex"),
            world.echo
        );
        fs::write(&config, text).expect("a configuration");
        world.agent = Some(Process::start("agent", &config));
        world.entry("gateway", |it| it["event"] == "link.up" && it["organisation"] == "globex").await;
        let mut client = Peer::start();
        client.ask(json!({"do": "connect", "port": world.port})).await;
        client.ask(json!({"do": "client"})).await;
        let login = json!({"do": "login", "user": "globex/prod-eu", "key": world.path("deployer")});
        assert_eq!(client.ask(login).await["ok"], true);
        let opened = client.forward("127.0.0.1", world.echo.into()).await;
        client.echoes(&opened).await;
        let id = opened["id"].clone();
        (world, client, id)
    }

    /// An agent that two gateways share: the first one's session is acme's, the other's is globex's, with a forward.
    /// `hasty` is a target that closes each connection at once.
    async fn with_two_gateways(hasty: u16) -> (Self, Peer, Peer, Value) {
        let mut world = Self::new().await;
        let (mut hostile, mut neighbour) = (Peer::start(), Peer::start());
        let mut organisations = String::new();
        for (peer, id, asserts) in [(&mut hostile, "acme", "provisioner"), (&mut neighbour, "globex", "deployer")] {
            let listening = peer.ask(json!({"do": "listen"})).await;
            organisations += &format!(
                "[[organisation]]\nid = \"{id}\"\ngateways = [\"ssh://127.0.0.1:{}\"]\n\
                 [[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"{asserts}\"]\n\
                 [[organisation.allow]]\nname = \"echo\"\naddresses = [\"127.0.0.1/32\"]\nports = [{}, {hasty}]\n",
                listening["port"],
                world.public(&format!("login-{id}")),
                world.echo
            );
        }
        let config = world.path("agent.toml");
        let head = "[agent]\nid = \"prod-eu\"\nreplica = \"r1\"\nhost_key = \"agent\"\n\
             [audit]\nfile = \"agent.jsonl\"\n[log]\nformat = \"json\"\n";
        fs::write(&config, format!("{head}{organisations}")).expect("a configuration");
        world.agent = Some(Process::start("agent", &config));
        hostile.ask(json!({"do": "accept"})).await;
        world.log_in_to_agent(&mut hostile).await;
        neighbour.ask(json!({"do": "accept"})).await;
        neighbour.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
        let login = json!({"do": "login", "user": "globex", "key": world.path("login-globex")});
        assert_eq!(neighbour.ask(login).await["ok"], true);
        let opened = neighbour.gateway_forward(&originator("deployer"), "127.0.0.1", world.echo).await;
        neighbour.echoes(&opened).await;
        let id = opened["id"].clone();
        (world, hostile, neighbour, id)
    }

    /// The agent dials again, and lets its hostile gateway in.
    async fn again(&self, peer: &mut Peer) {
        peer.ask(json!({"do": "accept", "within": 60})).await;
        self.log_in_to_agent(peer).await;
    }
}

#[tokio::test]
async fn a_client_that_says_nothing_of_use_is_cut_and_costs_nobody_else() {
    limited(300, async {
        let (mut world, mut neighbour, id) = World::with_a_neighbour().await;
        let before = memory(world.gateway.as_ref().expect("a gateway"));
        let messages = idle();
        beside(&mut neighbour, &id, async {
            for (count, (what, message)) in messages.iter().enumerate() {
                let mut client = world.at_the_door().await;
                pours(&mut client, what, message, None).await;
                world.recorded("gateway", "idle_flood", count + 1, what).await;
            }
        })
        .await;
        let grown = memory(world.gateway.as_ref().expect("a gateway")).saturating_sub(before);
        assert!(grown <= PER_LINK + NOISE, "{grown} KiB more");
        let record = world.entry("gateway", |it| it["reason"] == "idle_flood").await;
        assert_eq!(
            (&record["organisation"], &record["principal"]),
            (&json!("acme"), &json!("provisioner")),
            "{record}"
        );
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_stranger_that_says_nothing_of_use_is_cut() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let before = world.resident();
        let mut stranger = Peer::start();
        stranger.ask(json!({"do": "connect", "port": world.port})).await;
        stranger.ask(json!({"do": "client"})).await;
        let poured = stranger.ask(json!({"do": "pour", "hex": format!("02{}", string("nothing")), "most": MANY})).await;
        let closed = stranger.ask(json!({"do": "closed", "within": 60})).await;
        assert_eq!(closed["closed"], true, "{poured}");
        let grown = world.resident().saturating_sub(before);
        assert!(grown <= NOISE, "{grown} KiB more");
        drop(world.at_the_door().await);
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_says_nothing_of_use_is_cut_and_costs_nobody_else() {
    limited(300, async {
        let (mut world, mut neighbour, id) = World::with_a_neighbour().await;
        let before = memory(world.gateway.as_ref().expect("a gateway"));
        let mut client = world.at_the_door().await;
        beside(&mut neighbour, &id, async {
            let mut count = 0;
            for (what, message) in idle() {
                let mut agent = Peer::start();
                world.link(&mut agent).await;
                pours(&mut agent, what, &message, None).await;
                count += 1;
                world.recorded("gateway", "idle_flood", count, what).await;
            }
            for (what, message) in idle_on_a_channel() {
                let mut agent = Peer::start();
                world.link(&mut agent).await;
                let (_, there) = world.spliced(&mut client, &mut agent).await;
                pours(&mut agent, what, &message, Some(&there)).await;
                count += 1;
                world.recorded("gateway", "idle_flood", count, what).await;
            }
            let mut agent = Peer::start();
            let control = world.link(&mut agent).await;
            // A message of a kind that a later version may have, as often as one packet holds it.
            let unknown = "00000002ffff".repeat(4_000);
            let said = format!("5e{:08x}{unknown}", 6 * 4_000);
            pours(&mut agent, "control messages", &said, Some(&control)).await;
            world.recorded("gateway", "idle_flood", count + 1, "control messages").await;
        })
        .await;
        let grown = memory(world.gateway.as_ref().expect("a gateway")).saturating_sub(before);
        assert!(grown <= PER_LINK + NOISE, "{grown} KiB more");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_says_nothing_of_use_is_cut_and_costs_nobody_else() {
    limited(420, async {
        let (mut world, mut hostile, mut neighbour, id) = World::with_two_gateways(1).await;
        let before = memory(world.agent.as_ref().expect("an agent"));
        beside(&mut neighbour, &id, async {
            let mut count = 0;
            // The agent waits longer each time before it dials such a gateway again.
            for (what, message) in idle().into_iter().take(3) {
                pours(&mut hostile, what, &message, None).await;
                count += 1;
                world.recorded("agent", "idle_flood", count, what).await;
                world.again(&mut hostile).await;
            }
            for (what, message) in idle_on_a_channel().into_iter().take(2) {
                let opened = hostile.gateway_forward(&originator("provisioner"), "127.0.0.1", world.echo).await;
                let channel = opened["id"].clone();
                pours(&mut hostile, what, &message, Some(&channel)).await;
                count += 1;
                world.recorded("agent", "idle_flood", count, what).await;
                world.again(&mut hostile).await;
            }
        })
        .await;
        let grown = memory(world.agent.as_ref().expect("an agent")).saturating_sub(before);
        assert!(grown <= PER_LINK + NOISE, "{grown} KiB more");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn opens_without_end_on_one_link_do_not_fill_an_agent() {
    limited(300, async {
        let (mut world, mut hostile, mut neighbour, id) = World::with_two_gateways(1).await;
        let before = memory(world.agent.as_ref().expect("an agent"));
        let body = format!("{}{:08x}{}{:08x}", string("10.9.9.9"), 1, string("127.0.0.1"), 1);
        let open = format!("5a{}{:08x}{:08x}{:08x}{body}", string("direct-tcpip"), 7, 65_536, 32_768);
        beside(&mut neighbour, &id, async {
            let most = limits::OPENS_PER_LINK_MAX * 2;
            hostile.ask(json!({"do": "pour", "hex": open, "most": most, "within": 60})).await;
        })
        .await;
        let here = memory(world.agent.as_ref().expect("an agent")).saturating_sub(before);
        assert!(here <= PER_LINK + NOISE, "{here} KiB more while it is there");
        drop(hostile);
        // Either more came than it could hear, or it has heard as many as a link may have.
        let worn = |it: &Value| it["event"] == "link.down" && it["reason"] == "worn_out";
        until("a record of the flood", SOON, || {
            let told = world.violations("agent", "opens_flood") > 0 || world.trail("agent").iter().any(worn);
            told.then_some(())
        })
        .await;
        let grown = memory(world.agent.as_ref().expect("an agent")).saturating_sub(before);
        assert!(grown <= PER_LINK + NOISE, "{grown} KiB more");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn channels_that_a_gateway_never_closes_keep_no_connection_and_little_memory() {
    limited(300, async {
        let hasty = TcpListener::bind("127.0.0.1:0").await.expect("a target");
        let port = hasty.local_addr().expect("its address").port();
        let tasks = Tasks::new();
        drop(tasks.spawn(async move { while hasty.accept().await.is_ok() {} }));
        let (mut world, mut hostile, mut neighbour, id) = World::with_two_gateways(port).await;
        let agent = || format!("/proc/{}/fd", world.agent.as_ref().and_then(|it| it.child.id()).expect("running"));
        let descriptors = || fs::read_dir(agent()).expect("its descriptors").count();
        let (before, open) = (memory(world.agent.as_ref().expect("an agent")), descriptors());
        beside(&mut neighbour, &id, async {
            for _ in 0..300 {
                let opened = hostile.gateway_forward(&originator("provisioner"), "127.0.0.1", port).await;
                assert_eq!(opened["message"], 91, "{opened}");
            }
            // The targets are gone and their sockets with them, whatever the gateway says of its channels.
            until("the connections end", SOON, || (descriptors() <= open + 8).then_some(())).await;
        })
        .await;
        let grown = memory(world.agent.as_ref().expect("an agent")).saturating_sub(before);
        assert!(grown <= PER_LINK + NOISE, "{grown} KiB more");
        tasks.stop();
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn channels_that_are_no_forwards_are_recorded_in_one_sum_and_refused_in_our_words() {
    limited(120, async {
        let world = World::linked().await;
        let mut client = world.at_the_door().await;
        for _ in 0..20 {
            for (kind, rest) in [("session", String::new()), ("x11", format!("{}{:08x}", string("127.0.0.1"), 6000))] {
                let refused = client.ask(json!({"do": "open", "type": kind, "rest": rest})).await;
                assert_eq!((&refused["message"], &refused["code"]), (&json!(92), &json!(1)), "{kind}: {refused}");
                assert_eq!(refused["text"], "not allowed", "{kind}");
            }
        }
        drop(client);
        let record = world.entry("gateway", |it| it["event"] == "peer.violation").await;
        assert_eq!((&record["reason"], &record["principal"]), (&json!("opened_channel"), &json!("provisioner")));
        let detail = "40 channels other than forwards were refused, the first of type session";
        assert_eq!(record["detail"], detail, "{record}");
        assert_eq!(world.violations("gateway", "opened_channel"), 1);
    })
    .await;
}

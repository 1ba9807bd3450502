//! Peers that do with credit, windows and closes what an honest one never does: at the end of an agent, of a gateway and
//! of a client. `links.rs` has the table of what stands where.

use super::*;

use caponier::tunnel::wire;

/// What an idle process may have more or less, in KiB: an allocator's pools, and what a login leaves behind.
const MARGIN: u64 = 32 * 1024;

/// What may wait on a link, in KiB: the budget, and what each of so many channels begins with.
fn budget(channels: usize) -> u64 {
    ((limits::CREDIT_PER_SESSION + channels * wire::CREDIT_INITIAL) / 1024) as u64
}

impl World {
    fn process(&self, side: &str) -> u32 {
        let process = if side == "gateway" { &self.gateway } else { &self.agent };
        process.as_ref().and_then(|it| it.child.id()).expect("running")
    }

    /// The most resident memory that a side ever had, in KiB.
    fn peak(&self, side: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process(side))).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its memory");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// The connections and files that a side has open.
    fn descriptors(&self, side: &str) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process(side))).expect("its descriptors").count()
    }

    /// A session at the door as one of our own clients.
    async fn as_our_client(&self) -> Peer {
        let mut peer = Peer::start();
        peer.ask(json!({"do": "connect", "port": self.port})).await;
        let exchanged = peer.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
        assert_eq!(exchanged["key"], self.public("gateway"), "{exchanged}");
        let login = peer.ask(json!({"do": "login", "user": "acme/prod-eu", "key": self.path("provisioner")})).await;
        assert_eq!(login["ok"], true, "{login}");
        peer
    }

    /// A forward of a client that leaves no room for a single byte, to the agent that `peer` plays.
    async fn without_room(&self, client: &mut Peer, peer: &mut Peer) -> (Value, Value) {
        let open = json!({"do": "open", "type": "direct-tcpip", "host": "10.0.0.1", "port": 5432, "answer": false,
            "window": 0});
        let channel = client.ask(open).await["id"].clone();
        let asked = peer.ask(json!({"do": "next", "messages": [90]})).await;
        let there = peer.ask(json!({"do": "accept_channel", "sender": asked["sender"]})).await["id"].clone();
        let opened = client.ask(json!({"do": "opened", "id": channel})).await;
        assert_eq!(opened["message"], 91, "{opened}");
        (channel, there)
    }

    /// An open forward of an agent to the echo, for a `peer` that plays the gateway.
    async fn served_forward(&self, peer: &mut Peer) -> Value {
        let opened = peer.gateway_forward(&originator("provisioner"), "127.0.0.1", self.echo).await;
        assert_eq!(opened["message"], 91, "{opened}");
        opened["id"].clone()
    }

    /// The agent dials again, and serves.
    async fn served_again(&self, peer: &mut Peer) {
        peer.ask(json!({"do": "accept", "within": 60})).await;
        self.log_in_to_agent(peer).await;
        let opened = peer.gateway_forward(&originator("provisioner"), "127.0.0.1", self.echo).await;
        peer.echoes(&opened).await;
    }

    async fn ended(&self, side: &str) -> Value {
        self.entry(side, |it| it["event"] == "forward.ended" || it["event"] == "forward.abandoned").await
    }
}

#[tokio::test]
async fn one_byte_more_than_its_credit_ends_an_agents_link() {
    limited(90, async {
        let mut world = World::with_gateway().await;
        let (mut peer, mut client) = (Peer::start(), world.at_the_door().await);
        world.link(&mut peer).await;
        let (_, there) = world.without_room(&mut client, &mut peer).await;
        // All of it in one message, which nobody takes. Then nothing, and that is fine.
        let all = wire::CREDIT_INITIAL - wire::message_cost(0);
        peer.ask(json!({"do": "send", "id": there, "hex": "00".repeat(all)})).await;
        let end = peer.ask(json!({"do": "closed", "within": 1})).await;
        assert_eq!(end["closed"], false, "{all} bytes were allowed");
        peer.ask(json!({"do": "send", "id": there, "hex": "00"})).await;
        let end = peer.ask(json!({"do": "closed"})).await;
        assert_eq!(end["closed"], true, "{end}");
        let ended = world.ended("gateway").await;
        assert_ne!(ended["reason"], "eof", "{ended}");
        let down = world.entry("gateway", |it| it["event"] == "link.down").await;
        assert!(down["reason"].is_string(), "{down}");
        // The client's session is none of the agent's.
        let mut other = Peer::start();
        world.link(&mut other).await;
        world.link_works(&mut client, &mut other).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_sends_more_than_its_credit_is_hung_up_on() {
    limited(120, async {
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        for size in [wire::CREDIT_INITIAL, 200_000] {
            let id = world.served_forward(&mut peer).await;
            // Larger than all credit there is at first, however quick the target.
            peer.try_ask(json!({"do": "send", "id": id, "hex": "00".repeat(size)})).await;
            let end = peer.ask(json!({"do": "closed"})).await;
            assert_eq!(end["closed"], true, "{size}: {end}");
            world.served_again(&mut peer).await;
        }
        let ends: Vec<_> = world.trail("agent").into_iter().filter(|it| it["event"] == "forward.ended").collect();
        assert!(ends.len() >= 2 && ends.iter().all(|it| it["reason"] != "eof"), "{}", lines(&ends));
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn our_own_client_at_the_door_is_held_to_its_credit() {
    limited(90, async {
        let mut world = World::with_gateway().await;
        let mut agent = Peer::start();
        world.link(&mut agent).await;
        let (mut client, mut bystander) = (world.as_our_client().await, world.at_the_door().await);
        let (here, there) = world.spliced(&mut client, &mut agent).await;
        agent.ask(json!({"do": "keep", "id": there})).await;
        client.try_ask(json!({"do": "send", "id": here, "hex": "00".repeat(wire::CREDIT_INITIAL)})).await;
        let end = client.ask(json!({"do": "closed"})).await;
        assert_eq!(end["closed"], true, "{end}");
        let ended = world.ended("gateway").await;
        assert_ne!(ended["reason"], "eof", "{ended}");
        world.link_works(&mut bystander, &mut agent).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn whatever_credit_it_is_offered_a_sender_keeps_to_its_own_cap() {
    limited(120, async {
        // The gateway as the sender.
        let mut world = World::with_gateway().await;
        let (mut peer, mut client) = (Peer::start(), world.at_the_door().await);
        world.link(&mut peer).await;
        let (here, asked) = world.asked(&mut client, &mut peer).await;
        let accept = json!({"do": "accept_channel", "sender": asked["sender"], "window": u32::MAX});
        let there = peer.ask(accept).await["id"].clone();
        client.ask(json!({"do": "opened", "id": here})).await;
        peer.ask(json!({"do": "keep", "id": there})).await;
        peer.ask(json!({"do": "credit", "id": there, "amount": u32::MAX, "times": 100})).await;
        let flood = json!({"do": "flood", "id": here, "bytes_": 40 << 20, "heed": true, "within": 8});
        client.ask(flood).await;
        peer.ask(json!({"do": "quiet"})).await;
        let books = peer.ask(json!({"do": "books", "id": there})).await;
        let received = books["received"].as_u64().expect("a number");
        // Credit that is taken up while the flood has begun is used and taken up again: of what is asked to be sent a part
        // is left over for that.
        let most = (limits::CREDIT_MAX + wire::CREDIT_INITIAL) as u64 + (8 << 20);
        assert!(most < 40 << 20);
        assert!((wire::CREDIT_INITIAL as u64..=most).contains(&received), "{books}");
        world.assert_well();

        // The agent as the sender.
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        let open = json!({"do": "open", "type": "direct-tcpip", "host": "127.0.0.1", "port": world.echo,
            "originator": originator("provisioner"), "window": u32::MAX, "within": 25});
        let opened = peer.ask(open).await;
        assert_eq!(opened["message"], 91, "{opened}");
        let id = &opened["id"];
        peer.ask(json!({"do": "keep", "id": id})).await;
        peer.ask(json!({"do": "credit", "id": id, "amount": u32::MAX, "times": 100})).await;
        peer.ask(json!({"do": "flood", "id": id, "bytes_": 40 << 20, "heed": true, "within": 8})).await;
        peer.ask(json!({"do": "quiet"})).await;
        let books = peer.ask(json!({"do": "books", "id": id})).await;
        let received = books["received"].as_u64().expect("a number");
        assert!((wire::CREDIT_INITIAL as u64..=most).contains(&received), "{books}");
        assert_eq!(books["open"], true, "{books}");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn credit_that_is_none_does_not_end_the_agent() {
    limited(120, async {
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        for body in ["", "00", "000000", "0000000000", "ffffffffffffffff"] {
            let opened = peer.gateway_forward(&originator("provisioner"), "127.0.0.1", world.echo).await;
            assert_eq!(opened["message"], 91, "{opened}");
            let theirs = opened["sender"].as_u64().expect("a number");
            let message = format!("5f{theirs:08x}fe000001{:08x}{body}", body.len() / 2);
            peer.try_ask(json!({"do": "raw", "hex": message})).await;
            let end = peer.ask(json!({"do": "closed", "within": 1})).await;
            if end["closed"] == true {
                world.served_again(&mut peer).await;
            } else {
                let opened = peer.gateway_forward(&originator("provisioner"), "127.0.0.1", world.echo).await;
                peer.echoes(&opened).await;
            }
        }
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn credit_for_a_channel_that_is_closed_is_nothing() {
    limited(120, async {
        // It may have been on its way when the channel was closed: an honest peer does this.
        let mut world = World::with_gateway().await;
        let (mut peer, mut client) = (Peer::start(), world.at_the_door().await);
        world.link(&mut peer).await;
        let (here, asked) = world.asked(&mut client, &mut peer).await;
        let there = peer.ask(json!({"do": "accept_channel", "sender": asked["sender"]})).await["id"].clone();
        client.ask(json!({"do": "opened", "id": here})).await;
        client.ask(json!({"do": "close", "id": here})).await;
        peer.ask(json!({"do": "receive", "id": there, "bytes_": 1})).await;
        peer.ask(json!({"do": "close", "id": there})).await;
        peer.ask(json!({"do": "credit", "id": there, "amount": 100_000, "times": 20})).await;
        peer.ask(json!({"do": "credit", "id": there, "amount": 0, "times": 20})).await;
        world.link_works(&mut client, &mut peer).await;
        assert!(world.trail("gateway").iter().all(|it| it["event"] != "link.down"), "an honest link is cut");
        world.assert_well();

        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        let id = world.served_forward(&mut peer).await;
        peer.ask(json!({"do": "close", "id": id})).await;
        peer.ask(json!({"do": "credit", "id": id, "amount": 100_000, "times": 20})).await;
        peer.ask(json!({"do": "credit", "id": id, "amount": 0, "times": 20})).await;
        let opened = peer.gateway_forward(&originator("provisioner"), "127.0.0.1", world.echo).await;
        peer.echoes(&opened).await;
        assert!(world.trail("agent").iter().all(|it| it["event"] != "link.down"), "an honest link is cut");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn begging_for_a_sink_that_takes_nothing_gets_nothing() {
    limited(90, async {
        let mut world = World::with_gateway().await;
        let (mut peer, mut client) = (Peer::start(), world.at_the_door().await);
        world.link(&mut peer).await;
        let (_, there) = world.without_room(&mut client, &mut peer).await;
        peer.ask(json!({"do": "send", "id": there, "hex": "00".repeat(1_000)})).await;
        let spent = world.processor();
        peer.ask(json!({"do": "credit", "id": there, "amount": 0, "times": 20_000})).await;
        peer.ask(json!({"do": "quiet"})).await;
        let books = peer.ask(json!({"do": "books", "id": there})).await;
        assert_eq!((&books["credits"], &books["open"]), (&json!(0), &json!(true)), "{books}");
        // What it is answered costs no more than what it was to read: far under a millisecond each, unoptimised.
        let spent = world.processor() - spent;
        assert!(spent < Duration::from_secs(20), "{spent:?}");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_stock_client_cannot_meddle_with_credit() {
    limited(90, async {
        let mut world = World::linked().await;
        let mut client = world.at_the_door().await;
        let opened = client.forward("127.0.0.1", world.echo.into()).await;
        client.echoes(&opened).await;
        let theirs = opened["sender"].as_u64().expect("a number");
        // Credit of all kinds, begging, what is malformed, and as much of any type as would fill something.
        for (kind, body, times) in [
            ("fe000001", "ffffffff".to_owned(), 1_000),
            ("fe000001", "00000000".to_owned(), 1_000),
            ("fe000001", String::new(), 100),
            ("fe000001", "00".repeat(30_000), 100),
            ("fe000002", "00".repeat(4), 100),
            ("00000001", "00".repeat(30_000), 100),
        ] {
            let message = format!("5f{theirs:08x}{kind}{:08x}{body}", body.len() / 2);
            client.ask(json!({"do": "raw", "hex": message, "times": times})).await;
        }
        // Nothing of it is in the stream, and it was told nothing that a stock client does not know.
        client.echoes(&opened).await;
        client.ask(json!({"do": "quiet"})).await;
        let books = client.ask(json!({"do": "books", "id": opened["id"]})).await;
        assert_eq!((&books["received"], &books["credits"]), (&json!(8), &json!(0)), "{books}");
        assert_eq!(books["open"], true, "{books}");
        assert!(world.trail("gateway").iter().all(|it| it["event"] != "link.down"));
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_close_ends_a_forward_whose_sender_waits_for_credit_or_window() {
    limited(150, async {
        // The gateway waits, for the one or the other.
        for window in [0, u32::MAX] {
            let mut world = World::with_gateway().await;
            let (mut peer, mut client) = (Peer::start(), world.at_the_door().await);
            world.link(&mut peer).await;
            let (here, asked) = world.asked(&mut client, &mut peer).await;
            let accept = json!({"do": "accept_channel", "sender": asked["sender"], "window": window});
            let there = peer.ask(accept).await["id"].clone();
            client.ask(json!({"do": "opened", "id": here})).await;
            peer.ask(json!({"do": "keep", "id": there})).await;
            client.ask(json!({"do": "flood", "id": here, "bytes_": 1 << 20, "heed": true, "within": 5})).await;
            peer.ask(json!({"do": "close", "id": there})).await;
            let end = client.ask(json!({"do": "receive", "id": here, "bytes_": 1})).await;
            assert_eq!(end["closed"], true, "window {window}: {end}");
            let ended = world.ended("gateway").await;
            assert_ne!(ended["reason"], "eof", "{ended}");
            world.link_works(&mut client, &mut peer).await;
            world.assert_well();
        }
        // The agent waits; its target is let go.
        for window in [0, u32::MAX] {
            let mut peer = Peer::start();
            let mut world = World::served(&mut peer).await;
            let before = world.descriptors("agent");
            let open = json!({"do": "open", "type": "direct-tcpip", "host": "127.0.0.1", "port": world.echo,
                "originator": originator("provisioner"), "window": window, "within": 25});
            let opened = peer.ask(open).await;
            assert_eq!(opened["message"], 91, "{opened}");
            let id = &opened["id"];
            peer.ask(json!({"do": "keep", "id": id})).await;
            peer.ask(json!({"do": "flood", "id": id, "bytes_": 1 << 20, "heed": true, "within": 5})).await;
            assert!(world.descriptors("agent") > before, "there is a target");
            let closed = peer.ask(json!({"do": "close", "id": id})).await;
            assert_eq!(closed["closed"], true, "window {window}: {closed}");
            let ended = world.ended("agent").await;
            assert_ne!(ended["reason"], "eof", "{ended}");
            until("the target is let go", SOON, || (world.descriptors("agent") <= before).then_some(())).await;
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn clients_that_leave_before_the_answer_leave_nothing_behind() {
    limited(150, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        world.link(&mut peer).await;
        let mut other = world.at_the_door().await;
        world.link_works(&mut other, &mut peer).await;
        let before = world.descriptors("gateway");
        let mut opened = 0;
        for round in 0..4 {
            let mut client = world.at_the_door().await;
            let mut asked = Vec::new();
            for _ in 0..30 {
                asked.push(world.asked(&mut client, &mut peer).await.1["sender"].clone());
            }
            opened += asked.len();
            client.ask(json!({"do": "drop"})).await;
            // Before the gateway has noticed, and after.
            if round % 2 == 1 {
                until("the gateway has noticed", SOON, || (world.descriptors("gateway") <= before).then_some(())).await;
            }
            for sender in asked {
                let there = peer.ask(json!({"do": "accept_channel", "sender": sender})).await["id"].clone();
                let end = peer.ask(json!({"do": "receive", "id": there, "bytes_": 1})).await;
                assert!(end["closed"] == true || end["eof"] == true, "a channel of nobody's stays open: {end}");
                let closed = peer.ask(json!({"do": "close", "id": there})).await;
                assert_eq!(closed["closed"], true, "a channel of nobody's stays open");
            }
        }
        // Each is on record from its beginning to its end, and none as if it had been used.
        until("all have ended", SOON, || {
            let trail = world.trail("gateway");
            let count = |event: &str| trail.iter().filter(|it| it["event"] == event).count();
            let over = count("forward.ended") + count("forward.failed") + count("forward.abandoned");
            (count("forward.open") == opened + 1 && over == opened + 1).then_some(())
        })
        .await;
        until("no descriptor is left", SOON, || (world.descriptors("gateway") <= before).then_some(())).await;
        world.link_works(&mut other, &mut peer).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_sends_all_it_may_to_clients_that_read_nothing_fills_the_budget_and_no_more() {
    limited(180, async {
        for (size, most) in [(32_000, 1_usize << 40), (4, 400_000)] {
            let mut world = World::with_gateway().await;
            let (mut peer, mut client) = (Peer::start(), world.at_the_door().await);
            world.link(&mut peer).await;
            let mut there = Vec::new();
            for _ in 0..128 {
                there.push(world.without_room(&mut client, &mut peer).await.1);
            }
            let before = world.peak("gateway");
            let flood = json!({"do": "flood_many", "ids": there, "size": size, "most": most, "within": 60});
            let flooded = peer.ask(flood).await;
            assert_eq!(flooded["open"], true, "it kept to its credit: {flooded}");
            let sent = flooded["sent"].as_u64().expect("a number") / 1024;
            let cost = sent + flooded["messages"].as_u64().expect("a number") * 64 / 1024;
            assert!(cost <= budget(there.len()), "{flooded}");
            peer.ask(json!({"do": "quiet"})).await;
            let grown = world.peak("gateway") - before;
            assert!(grown <= cost + MARGIN, "{grown} KiB more for {cost} KiB of credit: {flooded}");
            // And all of it is given back with the link.
            peer.ask(json!({"do": "drop"})).await;
            let mut other = Peer::start();
            world.link(&mut other).await;
            let mut bystander = world.at_the_door().await;
            world.link_works(&mut bystander, &mut other).await;
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_of_ours_that_sends_all_it_may_to_an_agent_that_takes_nothing_fills_the_budget_and_no_more() {
    limited(180, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        world.link(&mut peer).await;
        let (mut client, mut bystander) = (world.as_our_client().await, world.at_the_door().await);
        let mut here = Vec::new();
        for _ in 0..128 {
            let (channel, asked) = world.asked(&mut client, &mut peer).await;
            peer.ask(json!({"do": "accept_channel", "sender": asked["sender"], "window": 0})).await;
            let opened = client.ask(json!({"do": "opened", "id": channel})).await;
            assert_eq!(opened["message"], 91, "{opened}");
            here.push(channel);
        }
        let before = world.peak("gateway");
        let flooded = client.ask(json!({"do": "flood_many", "ids": here, "size": 32_000, "within": 60})).await;
        assert_eq!(flooded["open"], true, "it kept to its credit: {flooded}");
        client.ask(json!({"do": "quiet"})).await;
        let grown = world.peak("gateway") - before;
        assert!(grown <= budget(here.len()) + MARGIN, "{grown} KiB more: {flooded}");
        world.link_works(&mut bystander, &mut peer).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_sends_all_it_may_fills_an_agents_budget_and_no_more() {
    limited(180, async {
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        let mut ids = Vec::new();
        for _ in 0..128 {
            let opened = peer.gateway_forward(&originator("provisioner"), "127.0.0.1", world.echo).await;
            assert_eq!(opened["message"], 91, "{opened}");
            // The echo is not taken back: soon the target takes nothing more.
            peer.ask(json!({"do": "keep", "id": opened["id"]})).await;
            ids.push(opened["id"].clone());
        }
        let before = world.peak("agent");
        let flooded =
            peer.ask(json!({"do": "flood_many", "ids": ids, "size": 32_000, "most": 400 << 20, "within": 60})).await;
        assert_eq!(flooded["open"], true, "it kept to its credit: {flooded}");
        peer.ask(json!({"do": "quiet"})).await;
        let grown = world.peak("agent") - before;
        // One session, and both its directions: what waits for targets, and what was read from them and waits for credit.
        let reading = (ids.len() * limits::CHUNK * 2 / 1024) as u64;
        assert!(grown <= budget(ids.len()) + reading + MARGIN, "{grown} KiB more: {flooded}");
        world.assert_well();
    })
    .await;
}

// ---------------------------------------------------------------------------------------------------------------------
// Control messages at their worst.

/// A control message.
fn control(kind: u16, body: &str) -> Vec<u8> {
    let length = u32::try_from(body.len() + 2).expect("short");
    [&length.to_be_bytes()[..], &kind.to_be_bytes(), body.as_bytes()].concat()
}

const DRAIN: u16 = 2;
const MOVE: u16 = 3;
const SUPERSEDED: u16 = 4;

/// The library in the role of a gateway; accepts every host key.
struct Anybody;

impl russh::client::Handler for Anybody {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &russh::keys::PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }
}

/// Logs in to an agent on a connection of its, and says on the control channel what is to be said. Holds the link.
async fn dismissive_gateway(stream: TcpStream, key: PrivateKey, said: Vec<u8>) -> Result<(), russh::Error> {
    let line = russh::SshId::Standard(GATEWAY_LINE.into());
    let config = russh::client::Config { client_id: line, ..russh::client::Config::default() };
    let mut handle = russh::client::connect_stream(std::sync::Arc::new(config), stream, Anybody).await?;
    let key = russh::keys::PrivateKeyWithHashAlg::new(key.as_ssh().clone(), None);
    assert!(handle.authenticate_publickey("acme", key).await?.success(), "the agent lets its gateway in");
    let mut channel = handle.channel_open_session().await?;
    channel.request_subsystem(true, "control@caponier").await?;
    channel.data_bytes(said).await?;
    while channel.wait().await.is_some() {}
    Ok(())
}

#[tokio::test]
async fn a_gateway_that_wants_another_link_without_an_end_gets_few_of_them() {
    limited(120, async {
        let hello = control(1, "{\"version\":\"0.1.0\",\"features\":[\"credit\"],\"channels\":4096}");
        for words in [
            control(MOVE, "{}"),
            control(DRAIN, "{\"deadline_s\":0}"),
            control(DRAIN, "{\"deadline_s\":4294967295}"),
            control(SUPERSEDED, "{}"),
        ] {
            let mut world = World::new().await;
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
            world.port = listener.local_addr().expect("an address").port();
            world.start_agent(&format!("ssh://127.0.0.1:{}", world.port), "", "");
            let said = [&hello[..], &words.repeat(500)].concat();
            let key = world.path("login-acme");
            let (mut links, gateways) = (0, Tasks::new());
            let accepting = async {
                loop {
                    let (stream, _) = listener.accept().await.expect("accepted");
                    links += 1;
                    let key = PrivateKey::read(&key).expect("a key");
                    gateways.spawn(dismissive_gateway(stream, key, said.clone()));
                }
            };
            // Time is what is tested here.
            drop(timeout(Duration::from_secs(12), accepting).await);
            // Half a second, doubled each time, jittered: seven or so, where a loop without waits has thousands.
            assert!((1..=40).contains(&links), "{links} links in 12 s for {:?}", String::from_utf8_lossy(&words));
            let ups = world.trail("agent").iter().filter(|it| it["event"] == "link.up").count();
            assert!(ups <= links, "{ups} of {links}");
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_drains_without_an_end_keeps_what_runs_and_gets_nothing_new() {
    limited(180, async {
        let mut world = World::with_gateway().await;
        let (mut peer, mut client) = (Peer::start(), world.at_the_door().await);
        let channel = world.link(&mut peer).await;
        let (here, there) = world.spliced(&mut client, &mut peer).await;
        let before = world.peak("gateway");
        let words = [control(DRAIN, "{\"deadline_s\":0}"), control(DRAIN, "{\"deadline_s\":4294967295}")].concat();
        for _ in 0..20 {
            peer.ask(json!({"do": "send", "id": channel, "hex": hex(&words.repeat(50))})).await;
        }
        // The forward that runs is the agent's to end, whatever it has said about when.
        client.ask(json!({"do": "send", "id": here, "hex": "c0ffee"})).await;
        let got = peer.ask(json!({"do": "receive", "id": there, "bytes_": 3})).await;
        assert_eq!(got["data"], "c0ffee", "{got}");
        // A new one is not its business any more.
        let asked = json!({"do": "open", "type": "direct-tcpip", "host": "10.0.0.1", "port": 5432, "within": 60});
        let answer = client.ask(asked).await;
        assert_eq!((&answer["message"], &answer["text"]), (&json!(92), &json!("not available")), "{answer}");
        let offered = peer.ask(json!({"do": "next", "messages": [90], "within": 1})).await;
        assert_eq!(offered["nothing"], true, "{offered}");
        let grown = world.peak("gateway") - before;
        assert!(grown < MARGIN, "{grown} KiB more");
        // Another link takes over, beside it.
        let mut other = Peer::start();
        world.link(&mut other).await;
        let mut second = world.at_the_door().await;
        world.link_works(&mut second, &mut other).await;
        peer.ask(json!({"do": "send", "id": there, "hex": "decade"})).await;
        let got = client.ask(json!({"do": "receive", "id": here, "bytes_": 3})).await;
        assert_eq!(got["data"], "decade", "{got}");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn control_messages_that_are_none_of_an_agents_cost_its_link_at_most() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        for words in [
            control(MOVE, "{}"),
            control(SUPERSEDED, "{}"),
            control(1, "{\"version\":\"0.1.0\",\"features\":[\"credit\"],\"channels\":4096,\"replica\":\"other\"}"),
            control(DRAIN, "{}"),
            control(DRAIN, "{\"deadline_s\":-1}"),
            control(DRAIN, "{\"deadline_s\":1e400}"),
            control(DRAIN, ""),
            control(DRAIN, &"[".repeat(60_000)),
            control(77, "{}"),
        ] {
            let (mut peer, mut client) = (Peer::start(), world.at_the_door().await);
            let channel = world.link(&mut peer).await;
            peer.try_ask(
                json!({"do": "send", "id": channel, "hex": hex(&words.repeat(if words.len() < 100 { 50 } else { 1 }))}),
            )
            .await;
            let end = peer.ask(json!({"do": "closed", "within": 1})).await;
            if end["closed"] != true {
                let works = timeout(SOON, world.link_works(&mut client, &mut peer)).await;
                assert!(works.is_ok(), "it lives and gets nothing: {:?}", &words[..words.len().min(80)]);
            }
            peer.ask(json!({"do": "drop"})).await;
            let count = |event: &str| world.trail("gateway").iter().filter(|it| it["event"] == event).count();
            until("the link is down", SOON, || (count("link.down") == count("link.up")).then_some(())).await;
            world.assert_well();
        }
    })
    .await;
}

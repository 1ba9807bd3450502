//! What was recorded on the wire is worth nothing: played again byte for byte, to either end and in the place of either, it is
//! refused in the key exchange. And who stands between and passes everything on sees ciphertext alone; what he alters breaks
//! the exchange.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::harness::{caponier, connect, echoes, eventually, listen, read_to_end, run, within};
use crate::yard::{Counted, Yard};

/// Which way bytes go: from whoever made the connection, or to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    There,
    Back,
}

/// What went over one connection, in the order in which it was seen.
type Record = Vec<(Way, Vec<u8>)>;

/// What is put in the place of what, once, on one way.
#[derive(Debug, Clone, Copy)]
struct Alteration {
    way: Way,
    what: &'static str,
    with: &'static str,
}

/// Stands between two ends, writes down what passes, and alters it where it is told to.
#[derive(Clone)]
struct Relay {
    address: SocketAddr,
    records: Arc<Mutex<Vec<Record>>>,
    /// Whether the alteration has been made on some connection.
    altered: Arc<AtomicBool>,
    /// Whether the next bytes that go there are to be spoilt.
    spoil: Arc<AtomicBool>,
}

impl Relay {
    async fn start(target: watch::Receiver<Option<SocketAddr>>, alteration: Option<Alteration>) -> Self {
        let records: Arc<Mutex<Vec<Record>>> = Arc::default();
        let (altered, spoil) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (writes, alters, spoils) = (records.clone(), altered.clone(), spoil.clone());
        let address = listen(move |near| {
            let (records, altered, spoil, mut target) =
                (writes.clone(), alters.clone(), spoils.clone(), target.clone());
            async move {
                let Ok(target) = target.wait_for(Option::is_some).await.map(|target| target.expect("a target")) else {
                    return;
                };
                let Ok(far) = TcpStream::connect(target).await else { return };
                let number = {
                    let mut records = records.lock().expect("records");
                    records.push(Record::new());
                    records.len() - 1
                };
                let pass = |way: Way, bytes: &mut Vec<u8>| {
                    records.lock().expect("records")[number].push((way, bytes.clone()));
                    if way == Way::There && spoil.swap(false, Ordering::SeqCst) {
                        *bytes.last_mut().expect("a byte") ^= 1;
                    }
                    let Some(Alteration { what, with, .. }) = alteration.filter(|it| it.way == way) else { return };
                    let found = bytes.windows(what.len()).position(|window| window == what.as_bytes());
                    if let Some(at) = found {
                        bytes.splice(at..at + what.len(), with.bytes());
                        altered.store(true, Ordering::SeqCst);
                    }
                };
                let (mut near_read, mut near_write) = near.into_split();
                let (mut far_read, mut far_write) = far.into_split();
                let there = async {
                    let mut buffer = vec![0; 64 * 1024];
                    while let Ok(length @ 1..) = near_read.read(&mut buffer).await {
                        let mut bytes = buffer[..length].to_vec();
                        pass(Way::There, &mut bytes);
                        if far_write.write_all(&bytes).await.is_err() {
                            break;
                        }
                    }
                    drop(far_write.shutdown().await);
                };
                let back = async {
                    let mut buffer = vec![0; 64 * 1024];
                    while let Ok(length @ 1..) = far_read.read(&mut buffer).await {
                        let mut bytes = buffer[..length].to_vec();
                        pass(Way::Back, &mut bytes);
                        if near_write.write_all(&bytes).await.is_err() {
                            break;
                        }
                    }
                    drop(near_write.shutdown().await);
                };
                tokio::join!(there, back);
            }
        })
        .await;
        Self { address, records, altered, spoil }
    }

    /// What went over its first connection so far.
    fn record(&self) -> Record {
        self.records.lock().expect("records").first().cloned().expect("a connection")
    }
}

/// What went one way, in one piece.
fn bytes(record: &Record, way: Way) -> Vec<u8> {
    record.iter().filter(|(other, _)| *other == way).flat_map(|(_, bytes)| bytes.clone()).collect()
}

/// Says what was said `way`, and reads what comes to its end. `turns`: waits for the other side's part where it came between.
async fn replay(mut stream: TcpStream, record: &Record, way: Way, turns: bool) -> Vec<u8> {
    let mut got = Vec::new();
    if turns {
        for (other, bytes) in record {
            if *other == way {
                if stream.write_all(bytes).await.is_err() {
                    break;
                }
                continue;
            }
            let mut part = vec![0; bytes.len()];
            // What comes now is not as long as what came then.
            match timeout(Duration::from_millis(500), stream.read(&mut part)).await {
                Ok(Ok(length @ 1..)) => got.extend_from_slice(&part[..length]),
                Ok(_) => break,
                Err(_) => {}
            }
        }
    } else {
        // The other end may hang up before it has read all of it.
        drop(stream.write_all(&bytes(record, way)).await);
    }
    drop(stream.shutdown().await);
    got.extend(read_to_end(&mut stream).await);
    got
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// What goes through the tunnel, and must not be seen on the way.
const SECRET: &[u8] = b"select secret from vault";

struct World {
    yard: Yard,
    counted: Counted,
    target: u16,
    gateway: SocketAddr,
    door: SocketAddr,
}

impl World {
    /// A gateway with a loopback door, and an agent that reaches it by these ways. The first must come to a link.
    async fn start(ways: &[SocketAddr], tell: &watch::Sender<Option<SocketAddr>>) -> Self {
        let mut yard = Yard::new();
        for (whose, key) in [("acme/agents/prod-eu", "agent"), ("acme/agents/prod-us", "agent-us")] {
            yard.register(whose, key);
        }
        yard.principal("acme/principals/provisioner", "provisioner", "agents = [\"prod-*\"]");
        for key in ["gateway", "login-acme"] {
            yard.key(key);
        }
        let counted = Counted::new();
        let target = counted.listen("127.0.0.1", 0).await;
        let config = format!(
            "[gateway]\nlisten = [\"127.0.0.1:0\"]\nhost_key = \"gateway\"\nregistry = \"keys\"\n\
             [audit]\nfile = \"gateway.jsonl\"\n[[organisation]]\nid = \"acme\"\nlogin_key = \"login-acme\"\n\
             [[local]]\nlisten = \"127.0.0.1:0\"\nagent = \"acme/prod-eu\"\ntarget = \"127.0.0.1:{target}\"\n\
             principal = \"provisioner\"\n"
        );
        let (gateway, doors) = yard.gateway("gateway", &config).await;
        tell.send_replace(Some(gateway));
        let ways: Vec<String> = ways.iter().map(|way| format!("\"ssh://{way}\"")).collect();
        let config = format!(
            "[agent]\nid = \"prod-eu\"\nreplica = \"one\"\nhost_key = \"agent\"\n[audit]\nfile = \"agent.jsonl\"\n\
             [[organisation]]\nid = \"acme\"\ngateways = [{}]\n\
             [[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n\
             [[organisation.allow]]\nname = \"echo\"\naddresses = [\"127.0.0.1/32\"]\nports = [{target}]\n",
            ways.join(", "),
            yard.public("login-acme"),
        );
        yard.agent("agent", &config).await;
        yard.links("gateway", 1).await;
        let world = Self { yard, counted, target, gateway, door: doors[0] };
        echoes(connect(world.door).await, SECRET).await;
        world
    }

    fn count(&self, side: &str, event: &str) -> usize {
        self.yard.trail(side).iter().filter(|it| it["event"] == event).count()
    }

    /// Links, logins, forwards and connections to the target, so far.
    fn opened(&self) -> [usize; 5] {
        [
            self.count("gateway", "link.up"),
            self.count("gateway", "auth.accepted"),
            self.count("gateway", "forward.open"),
            self.count("agent", "forward.open"),
            self.counted.count(),
        ]
    }

    /// The record that the gateway made of a connection that it refused.
    async fn refused(&self, from: SocketAddr) -> Value {
        let refused = |it: &Value| it["event"] == "auth.refused" && it["client"] == from.to_string();
        self.yard.entry("gateway", 0, "a refused connection", refused).await
    }

    /// Stock ssh to the gateway by some way, with a forward to the target.
    fn ssh(&self, by: SocketAddr) -> Command {
        let known = format!("[127.0.0.1]:{} {}\n", by.port(), self.yard.public("gateway"));
        let file = format!("known-{}", by.port());
        self.yard.write(&file, &known);
        let mut command = Command::new("ssh");
        command.env_remove("SSH_AUTH_SOCK").args(["-F", "none", "-o", "BatchMode=yes", "-o"]);
        command.args(["StrictHostKeyChecking=yes", "-o", "GlobalKnownHostsFile=none", "-o"]);
        command.arg(format!("UserKnownHostsFile={}", self.yard.path(&file).display()));
        command.args(["-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-i"]).arg(self.yard.key("provisioner"));
        command.args(["-p", &by.port().to_string(), "-W", &format!("127.0.0.1:{}", self.target)]);
        command.args(["-l", "acme/prod-eu", "127.0.0.1"]);
        command
    }

    /// A forward works, from end to end.
    async fn works(&self) {
        echoes(connect(self.door).await, b"still here").await;
    }
}

/// Plays what a record has `way` to whoever connects, once there is a record.
async fn player(record: watch::Receiver<Option<Record>>, way: Way) -> (SocketAddr, watch::Receiver<usize>) {
    let (ended, count) = watch::channel(0);
    let ended = Arc::new(ended);
    let address = listen(move |stream| {
        let (mut record, ended) = (record.clone(), ended.clone());
        async move {
            let Ok(record) = record.wait_for(Option::is_some).await.map(|it| it.clone().expect("a record")) else {
                return;
            };
            replay(stream, &record, way, true).await;
            ended.send_modify(|count| *count += 1);
        }
    })
    .await;
    (address, count)
}

#[tokio::test]
async fn a_recorded_link_is_refused_at_either_end() {
    let (tell, target) = watch::channel(None);
    let relay = Relay::start(target, None).await;
    let (play, record) = watch::channel(None);
    let (player, mut played) = player(record, Way::Back).await;
    let world = World::start(&[relay.address, player], &tell).await;
    let record = relay.record();
    assert!(contains(&bytes(&record, Way::There), "agent=acme/prod-eu/one"), "it is the agent's");

    // To the gateway as the agent: at once, and in turns.
    let before = world.opened();
    for turns in [false, true] {
        let stream = connect(world.gateway).await;
        let from = stream.local_addr().expect("an address");
        let got = replay(stream, &record, Way::There, turns).await;
        assert!(!contains(&got, "acme"), "the gateway has said something to nobody");
        let refused = world.refused(from).await;
        let whose = (&refused["organisation"], &refused["agent"], &refused["reason"]);
        assert_eq!(whose, (&json!("acme"), &json!("prod-eu"), &json!("handshake")), "{refused}");
    }
    assert_eq!(world.opened(), before, "a record has opened something");

    // To the agent as the gateway.
    play.send_replace(Some(record));
    within("the agent hangs up", played.wait_for(|count| *count > 0)).await.expect("played");
    let refused = |it: &Value| it["event"] == "auth.refused" && it["detail"].to_string().contains(&player.to_string());
    let refused = world.yard.entry("agent", 0, "a gateway that is none", refused).await;
    assert_eq!(refused["organisation"], "acme", "{refused}");
    assert_eq!(world.count("agent", "link.up"), 1, "{:?}", world.yard.trail("agent"));
    assert_eq!(world.opened(), before, "a record has opened something");
    world.works().await;
}

#[tokio::test]
async fn a_recorded_session_at_the_door_is_refused_at_either_end() {
    let (tell, target) = watch::channel(None);
    let direct = Relay::start(target.clone(), None).await;
    let relay = Relay::start(target, None).await;
    let world = World::start(&[direct.address], &tell).await;
    let said = run(&mut world.ssh(relay.address)).await;
    assert_eq!(said.code(), 0, "{said:?}");
    let record = relay.record();
    let before = world.opened();
    assert_eq!((before[1], before[3]), (1, 2), "the recorded session has opened its forward");

    for turns in [false, true] {
        let stream = connect(world.gateway).await;
        let from = stream.local_addr().expect("an address");
        replay(stream, &record, Way::There, turns).await;
        let refused = world.refused(from).await;
        let reason = refused["reason"].as_str().expect("a reason");
        assert!(["handshake", "left_before_login"].contains(&reason), "{refused}");
        assert!(refused.get("principal").is_none() && refused.get("key").is_none(), "{refused}");
    }

    // To the clients as the gateway. They know its key, and do not believe that it is there.
    let (_play, playing) = watch::channel(Some(record));
    let (player, _) = player(playing, Way::Back).await;
    let said = run(&mut world.ssh(player)).await;
    assert_eq!((said.code(), said.stdout.as_str()), (255, ""), "{said:?}");
    let fingerprint = world.yard.fingerprint("gateway");
    let said = run(caponier()
        .args(["forward", "--gateway", &format!("ssh://{player}"), "--agent", "acme/prod-eu", "--host-key"])
        .args([&fingerprint, "-L", "0:127.0.0.1:1", "--identity"])
        .arg(world.yard.key("provisioner")))
    .await;
    assert_eq!(said.code(), 1, "{said:?}");
    assert_eq!(world.opened(), before, "a record has opened something");
    world.works().await;
}

#[tokio::test]
async fn who_stands_between_sees_nothing_and_alters_nothing() {
    use Way::{Back, There};
    let alterations = [
        // Another replica, which anybody may be.
        (There, "prod-eu/one", "prod-eu/two"),
        // Another agent.
        (There, "prod-eu/one", "prod-us/one"),
        // Another role.
        (Back, "SSH-2.0-caponier_1 client\r\n", "SSH-2.0-caponier_1\r\n"),
        // Worse algorithms, and no strict key exchange.
        (There, "mlkem768x25519-sha256", "mlkem768x25519-sha255"),
        (Back, "mlkem768x25519-sha256", "mlkem768x25519-sha255"),
        (There, "aes256-gcm@openssh.com", "aes128-gcm@openssh.com"),
        (There, "kex-strict-s-v00@openssh.com", "kex-strict-s-v99@openssh.com"),
        (Back, "kex-strict-c-v00@openssh.com", "kex-strict-c-v99@openssh.com"),
    ];
    let (tell, target) = watch::channel(None);
    let faithful = Relay::start(target.clone(), None).await;
    let mut relays = Vec::new();
    for (way, what, with) in alterations {
        relays.push(Relay::start(target.clone(), Some(Alteration { way, what, with })).await);
    }
    let ways: Vec<SocketAddr> = [&faithful].into_iter().chain(&relays).map(|relay| relay.address).collect();
    let world = World::start(&ways, &tell).await;
    for (relay, alteration) in relays.iter().zip(&alterations) {
        let what = format!("{alteration:?} is made");
        eventually(&what, async || relay.altered.load(Ordering::SeqCst).then_some(())).await;
        // It comes again, and so the first has ended.
        let again = || relay.records.lock().expect("records").len() > 1;
        eventually(&format!("the agent dials again: {alteration:?}"), async || again().then_some(())).await;
    }
    assert_eq!((world.count("gateway", "link.up"), world.count("agent", "link.up")), (1, 1), "an altered link came up");
    eventually("all altered exchanges are recorded", async || {
        (world.count("gateway", "auth.refused") >= alterations.len()).then_some(())
    })
    .await;

    // Of what went over the faithful one, nothing can be read but the lines and the offers.
    let record = faithful.record();
    for way in [There, Back] {
        let seen = bytes(&record, way);
        for text in ["provisioner", "control@caponier", "direct-tcpip", "caponier1:", "127.0.0.1", "credit"] {
            assert!(!contains(&seen, text), "{text} is on the wire");
        }
        assert!(!contains(&seen, std::str::from_utf8(SECRET).expect("text")), "what went through is on the wire");
    }

    // A single bit in what is under way ends the link, and is not passed on.
    let mut stream = connect(world.door).await;
    echoes(&mut stream, b"before").await;
    faithful.spoil.store(true, Ordering::SeqCst);
    stream.write_all(b"spoilt").await.expect("written");
    let got = read_to_end(&mut stream).await;
    assert!(b"spoilt".starts_with(&got[..]), "{got:?}");
    eventually("the link is down", async || (world.count("gateway", "link.down") == 1).then_some(())).await;
    world.yard.links("gateway", 2).await;
    world.works().await;
}

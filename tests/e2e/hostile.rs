//! Peers that log in as they should and then do not do their part, against a gateway or an agent in this process.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use caponier::agent;
use caponier::audit::Sinks;
use caponier::drain::Stop;
use caponier::gateway::{self, Inherited, Listener};
use caponier::identity::{Algorithm, PrivateKey};
use caponier::limits;
use caponier::policy::rule::Allowlist;
use caponier::policy::window::Window;
use caponier::reload::Reloads;
use caponier::systemd::Supervisor;
use caponier::task::Tasks;
use caponier::tunnel::connect::Egress;
use caponier::tunnel::wire::{Control, Drain};
use russh::client::Handle;
use russh::keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::server::{Auth, ChannelOpenHandle, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, SshId};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::harness::checked_record;

const PATIENCE: Duration = Duration::from_secs(120);

async fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A gateway of the organisation `acme`, with an agent `prod-eu` and a principal `ci` that has a loopback door.
struct Site {
    folder: TempDir,
    address: SocketAddr,
    door: SocketAddr,
    agent_key: PrivateKey,
    principal_key: PrivateKey,
    _stop: Stop,
    tasks: Tasks,
}

impl Site {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let agent_key = PrivateKey::generate(Algorithm::Ed25519);
        let principal_key = PrivateKey::generate(Algorithm::Ed25519);
        let registry = folder.path().join("keys");
        write(&registry.join("organisations/acme/agents/prod-eu/key.pub"), &agent_key.public().to_openssh());
        write(&registry.join("organisations/acme/principals/ci/key.pub"), &principal_key.public().to_openssh());
        write(&registry.join("organisations/acme/principals/ci.toml"), "agents = [\"prod-eu\"]\n");
        let config = gateway::Config {
            health: caponier::health::Config::default(),
            certificates: None,
            listen: vec![Listener::plain("127.0.0.1:0".parse().expect("an address"))],
            host_key: PrivateKey::generate(Algorithm::Ed25519),
            host_certificate: None,
            registry,
            admin_socket: None,
            organisations: vec![gateway::Organisation {
                id: "acme".parse().expect("an id"),
                login_key: PrivateKey::generate(Algorithm::Ed25519),
                login_certificate: None,
            }],
            local: vec![gateway::Local {
                listen: "127.0.0.1:0".parse().expect("an address"),
                agent: "acme/prod-eu".parse().expect("a name"),
                target: "db.internal:5432".parse().expect("a target"),
                principal: "ci".parse().expect("an id"),
            }],
            drain: Duration::ZERO,
            limits: gateway::Limits::default(),
            penalties: caponier::tunnel::admit::penalty::Terms::default(),
            audit: Sinks::file(folder.path().join("trail")),
        };
        let (tasks, stop) = (Tasks::new(), Stop::new());
        let (ready, listening) = oneshot::channel();
        tasks.spawn({
            let stop = stop.clone();
            async move {
                let tell = |main: &[SocketAddr], doors: &[SocketAddr]| {
                    ready.send((main[0], doors[0])).expect("the test waits for it");
                };
                gateway::run(config, Reloads::never(), Inherited::default(), stop, &Supervisor::none(), tell)
                    .await
                    .expect("the gateway runs");
            }
        });
        let (address, door) = listening.await.expect("the gateway listens");
        Self { folder, address, door, agent_key, principal_key, _stop: stop, tasks }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn trail(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("trail")).expect("a trail");
        text.lines().map(checked_record).collect()
    }

    fn events(&self, event: &str) -> Vec<Value> {
        self.trail().into_iter().filter(|record| record["event"] == event).collect()
    }

    /// Links as the agent, behaving as `agent` does. Returns what fires when the gateway has hung up.
    async fn link(&self, agent: Agent) -> CancellationToken {
        let stream = TcpStream::connect(self.address).await.expect("connected");
        let config = russh::server::Config {
            server_id: SshId::Standard("SSH-2.0-caponier_1 agent=acme/prod-eu/r1".into()),
            keys: vec![self.agent_key.as_ssh().as_ref().clone()],
            auth_rejection_time: Duration::ZERO,
            ..russh::server::Config::default()
        };
        let over = CancellationToken::new();
        let running = russh::server::run_stream(Arc::new(config), stream, agent).await.expect("a session");
        self.tasks.spawn({
            let over = over.clone();
            async move {
                drop(running.await);
                over.cancel();
            }
        });
        over
    }
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o644).open(path);
    std::io::Write::write_all(&mut file.expect("opened"), text.as_bytes()).expect("written");
}

/// An open that waits for its answer.
type Asked = (ChannelOpenHandle, Channel<Msg>);

/// An agent made of the SSH library alone.
#[derive(Default, Clone)]
struct Agent {
    /// It never answers the open of the control channel.
    mute: bool,
    /// The forward it was asked for and has not answered.
    asked: Arc<Mutex<Option<Asked>>>,
    /// How many channels it opens toward the gateway once it is linked.
    opens: usize,
    linked: Arc<AtomicBool>,
}

impl russh::server::Handler for Agent {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, _: &str, _: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        Ok(Auth::Accept)
    }

    async fn auth_publickey(&mut self, _: &str, _: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        if self.mute {
            *self.asked.lock().expect("not poisoned") = Some((reply, channel));
        } else {
            reply.accept().await;
        }
        Ok(())
    }

    async fn subsystem_request(&mut self, id: ChannelId, _: &str, session: &mut Session) -> Result<(), Self::Error> {
        session.channel_success(id)?;
        let body = br#"{"version":"1","features":["credit"],"channels":1}"#;
        let length = u32::try_from(body.len() + 2).expect("short");
        session.data(id, [&length.to_be_bytes()[..], &[0, 1], body].concat())?;
        self.linked.store(true, Ordering::Relaxed);
        let handle = session.handle();
        let opens = self.opens;
        Tasks::new().spawn(async move {
            for _ in 0..opens {
                if handle.channel_open_session().await.is_ok() {
                    panic!("the gateway accepted a channel");
                }
            }
        });
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        *self.asked.lock().expect("not poisoned") = Some((reply, channel));
        Ok(())
    }
}

/// Somebody else's end of a session in the client role; accepts every host key.
struct Anybody;

impl russh::client::Handler for Anybody {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }
}

/// Logs in on a connection as a gateway or client that is not ours.
async fn log_in(stream: TcpStream, line: &'static str, user: &str, key: &PrivateKey) -> Handle<Anybody> {
    let config = russh::client::Config { client_id: SshId::Standard(line.into()), ..russh::client::Config::default() };
    let mut handle = russh::client::connect_stream(Arc::new(config), stream, Anybody).await.expect("a handshake");
    let key = PrivateKeyWithHashAlg::new(key.as_ssh().clone(), None);
    assert!(handle.authenticate_publickey(user, key).await.expect("a login").success());
    handle
}

#[tokio::test]
async fn opens_beyond_what_is_passed_on_are_recorded_as_a_sum() {
    let site = Site::start().await;
    let stream = TcpStream::connect(site.address).await.expect("connected");
    let client = Arc::new(log_in(stream, "SSH-2.0-x", "acme/prod-eu", &site.principal_key).await);
    let asked: u64 = 2_000;
    let opens: Vec<_> = (0..asked)
        .map(|_| {
            let client = client.clone();
            site.tasks.spawn(async move { client.channel_open_direct_tcpip("db.internal", 1, "127.0.0.1", 1).await })
        })
        .collect();
    for open in opens {
        assert!(open.await.expect("ran").is_err(), "there is no agent");
    }
    drop(client);
    let flood = eventually("a record of the rest", || site.events("peer.violation").pop()).await;
    assert_eq!((&flood["reason"], &flood["principal"]), (&"opens_flood".into(), &"ci".into()), "{flood}");
    let rest: u64 = flood["detail"].as_str().and_then(|text| text.split(' ').next()?.parse().ok()).expect("a number");
    let one_by_one = site.events("forward.denied").len() + site.events("forward.failed").len();
    assert_eq!(one_by_one as u64 + rest, asked);
}

/// An agent of ours that links to a gateway of the test's.
struct Linked {
    listener: TcpListener,
    login_key: PrivateKey,
    tasks: Tasks,
    stop: Stop,
    _folder: TempDir,
}

impl Linked {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let login_key = PrivateKey::generate(Algorithm::Ed25519);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let gateway = format!("ssh://{}", listener.local_addr().expect("its address"));
        let config = agent::Config {
            health: caponier::health::Config::default(),
            id: "prod-eu".parse().expect("an id"),
            replica: "r1".parse().expect("an id"),
            key: PrivateKey::generate(Algorithm::Ed25519),
            egress: Egress::default(),
            remote_doctor: false,
            penalties: caponier::tunnel::admit::penalty::Terms::default(),
            traces: None,
            listen: None,
            organisations: vec![agent::Organisation {
                id: "acme".parse().expect("an id"),
                gateways: vec![gateway.parse().expect("a url")],
                tls: None,
                orchestrators: vec![agent::Orchestrator {
                    key: login_key.public(),
                    asserts: None,
                    window: Window::default(),
                }],
                authorities: Vec::new(),
                allow: Allowlist::new(Vec::new()).expect("an allowlist"),
            }],
            drain: Duration::ZERO,
            // Most opens are refused without a record, which is quick.
            limits: agent::Limits { opens_per_second_per_organisation: 1, ..agent::Limits::default() },
            resolver: caponier::resolve::Config::default(),
            audit: Sinks::file(folder.path().join("trail")),
        };
        let (tasks, stop) = (Tasks::new(), Stop::new());
        tasks.spawn({
            let stop = stop.clone();
            async move {
                agent::run(config, Reloads::never(), stop, &Supervisor::none()).await.expect("the agent runs");
            }
        });
        Self { listener, login_key, tasks, stop, _folder: folder }
    }

    /// The next link, logged in.
    async fn link(&self) -> Handle<Anybody> {
        let (stream, _) = self.listener.accept().await.expect("the agent dials");
        log_in(stream, "SSH-2.0-caponier_1 client", "acme", &self.login_key).await
    }

    async fn stop(self) {
        assert!(self.stop.advance());
        assert!(self.tasks.settle(PATIENCE).await);
    }
}

#[tokio::test]
async fn regression_a_session_channel_that_nobody_reads_does_not_hang_the_agent() {
    let agent = Linked::start().await;
    let gateway = agent.link().await;
    let channel = gateway.channel_open_session().await.expect("a session channel");
    // More than the library queues for one channel; the agent is to hang up, and to dial again.
    for _ in 0..200 {
        if channel.data_bytes(&b"x"[..]).await.is_err() {
            break;
        }
    }
    tokio::time::timeout(PATIENCE, agent.listener.accept()).await.expect("the agent dials again").expect("accepted");
    agent.stop().await;
}

#[tokio::test]
async fn a_gateway_that_goes_away_on_every_link_does_not_make_the_agent_spin() {
    let agent = Linked::start().await;
    let goodbyes = [Control::Drain(Drain { deadline_s: 3_600 }).encode(), Control::Move.encode()].concat().repeat(50);
    let mut links = Vec::new();
    let flood = async {
        loop {
            let gateway = agent.link().await;
            let channel = gateway.channel_open_session().await.expect("a session channel");
            channel.request_subsystem(true, "control@caponier").await.expect("asked");
            channel.data_bytes(goodbyes.clone()).await.expect("said");
            // All stay, as if each had a forward left.
            links.push((gateway, channel));
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(3), flood).await.is_err());
    // With a wait that doubles each time it takes about 30 s to come to eight; without one, it is dozens in a second.
    assert!((2..=8).contains(&links.len()), "{} links", links.len());
    agent.stop().await;
}

/// The library keeps some kilobytes of each open for as long as its session lives.
#[tokio::test]
async fn a_gateway_that_opens_without_end_on_one_link_is_cut() {
    let agent = Linked::start().await;
    let gateway = Arc::new(agent.link().await);
    let asked = std::sync::atomic::AtomicU64::new(0);
    let ask = async || {
        while gateway.channel_open_direct_tcpip("db.internal", 1, "127.0.0.1", 1).await.is_err() && !gateway.is_closed()
        {
            asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    };
    // It accepts no other link, so that nothing replaces this one.
    let many = async { tokio::join!(ask(), ask(), ask(), ask(), ask(), ask(), ask(), ask()) };
    let hung_up = tokio::time::timeout(PATIENCE * 5, many).await;
    assert!(hung_up.is_ok(), "the agent takes more than {asked:?} opens");
    let asked = asked.into_inner();
    // Some of the last answers are lost with the link.
    assert!(asked.abs_diff(limits::OPENS_PER_LINK_MAX) <= 64, "{asked} opens");
    agent.stop().await;
}

#[tokio::test]
async fn regression_a_revocation_while_a_forward_opens_is_not_missed() {
    let site = Site::start().await;
    let agent = Agent::default();
    let _over = site.link(agent.clone()).await;
    eventually("a link", || site.events("link.up").pop()).await;
    let mut client = TcpStream::connect(site.door).await.expect("connected");
    eventually("a forward", || agent.asked.lock().expect("not poisoned").is_some().then_some(())).await;
    write(&site.path("keys/organisations/acme/principals/ci.toml"), "agents = [\"prod-eu\"]\ntargets = []\n");
    eventually("the new registry", || site.events("registry.reloaded").pop()).await;
    let (reply, _channel) = agent.asked.lock().expect("not poisoned").take().expect("asked");
    reply.accept().await;
    let read = tokio::time::timeout(PATIENCE, client.read(&mut [0])).await.expect("the forward is cut");
    assert!(matches!(read, Err(_) | Ok(0)), "{read:?}");
    let denied = eventually("its ending", || site.events("forward.denied").pop()).await;
    assert_eq!(denied["reason"], "revoked", "{denied}");
}

#[tokio::test]
async fn regression_an_agent_that_does_not_answer_the_control_channel_is_hung_up_on() {
    let site = Site::start().await;
    let over = site.link(Agent { mute: true, ..Agent::default() }).await;
    tokio::time::timeout(PATIENCE, over.cancelled()).await.expect("the gateway hangs up");
    let refused = eventually("a record", || site.events("auth.refused").pop()).await;
    assert_eq!(refused["reason"], "timeout", "{refused}");
}

#[tokio::test]
async fn an_agent_that_goes_on_opening_channels_is_cut() {
    let site = Site::start().await;
    let over = site.link(Agent { opens: 1_000, ..Agent::default() }).await;
    tokio::time::timeout(PATIENCE, over.cancelled()).await.expect("the gateway hangs up");
    let violations = site.events("peer.violation").len();
    assert!((1..=64).contains(&violations), "{violations}");
}

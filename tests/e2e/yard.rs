//! A folder with keys, a registry and programs whose configurations the test writes itself, word for word: for tests that
//! are about what stands there. `harness::Site` is the world for all others.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use caponier::identity::PrivateKey;
use caponier::task::Tasks;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;

use crate::harness::{DOOR, LISTENING, Program, Registry, caponier, checked_record, eventually, make_key, public};
use crate::raw::{GATEWAY_LINE, Peer};

/// A folder and the programs that run in it. Dropped in this order: they end before it goes.
pub(crate) struct Yard {
    programs: Vec<(String, Program)>,
    starts: usize,
    dir: TempDir,
}

impl Yard {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("caponier-e2e-").tempdir().expect("a folder");
        Self { programs: Vec::new(), starts: 0, dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The private key of that name, made when it is first asked for.
    pub(crate) fn key(&self, name: &str) -> PathBuf {
        make_key(self.dir.path(), name)
    }

    /// Its public half, in one line.
    pub(crate) fn public(&self, name: &str) -> String {
        self.key(name);
        public(self.dir.path(), name).trim().to_owned()
    }

    pub(crate) fn fingerprint(&self, name: &str) -> String {
        PrivateKey::read(&self.key(name)).expect("a key").public().fingerprint().to_string()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("written");
    }

    pub(crate) fn registry(&self) -> Registry {
        Registry::at(self.path("keys"))
    }

    /// Registers a key, made if need be, as one of an agent or a principal.
    pub(crate) fn register(&self, whose: &str, key: &str) {
        self.registry().key(whose, key, &self.public(key));
    }

    /// Registers a principal with a key and a file.
    pub(crate) fn principal(&self, whose: &str, key: &str, toml: &str) {
        self.register(whose, key);
        self.registry().about(whose, toml);
    }

    /// Starts a gateway with a configuration; where it listens, and where its loopback doors are.
    pub(crate) async fn gateway(&mut self, name: &str, config: &str) -> (SocketAddr, Vec<SocketAddr>) {
        self.start("gateway", name, config);
        let program = self.program(name);
        let said = |line: &str, words: &str| -> Option<SocketAddr> {
            line.split_once(words).map(|(_, address)| address.trim().parse().expect("an address"))
        };
        let address = said(&program.says(LISTENING).await, LISTENING).expect("an address");
        let expected = config.matches("[[local]]").count();
        let mut doors = Vec::new();
        eventually("the loopback doors", async || {
            doors = program.log().lines().filter_map(|line| said(line, DOOR)).collect();
            (doors.len() == expected).then_some(())
        })
        .await;
        (address, doors)
    }

    /// Starts an agent with a configuration.
    pub(crate) async fn agent(&mut self, name: &str, config: &str) {
        self.start("agent", name, config);
        self.program(name).says("agent started").await;
    }

    fn start(&mut self, kind: &str, name: &str, config: &str) {
        let file = format!("{name}.toml");
        self.write(&file, config);
        let mut command = caponier();
        command.arg(kind).arg("--config").arg(self.path(&file)).env("CAPONIER_LOG", "warn,caponier=debug");
        self.run(name, command);
    }

    /// Starts any program, with its output in a file of its own.
    pub(crate) fn run(&mut self, name: &str, command: tokio::process::Command) {
        self.starts += 1;
        let log = self.path(&format!("{name}.{}.log", self.starts));
        self.programs.push((name.to_owned(), Program::start(name, command, &log)));
    }

    pub(crate) fn program(&mut self, name: &str) -> &mut Program {
        let found = self.programs.iter_mut().rev().find(|(other, _)| other == name);
        &mut found.unwrap_or_else(|| panic!("no program {name}")).1
    }

    /// A program's trail, oldest first. A line that is still being written is not looked at.
    pub(crate) fn trail(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(&format!("{name}.jsonl"))).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(checked_record).collect()
    }

    /// The first record from the `from`th on that `wanted` holds for.
    pub(crate) async fn entry(&self, name: &str, from: usize, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        eventually(&format!("{name} records {what}"), async || self.trail(name).into_iter().skip(from).find(&wanted))
            .await
    }

    /// Waits until somebody has recorded so many links that came up.
    pub(crate) async fn links(&self, name: &str, count: usize) {
        let ups = || self.trail(name).iter().filter(|it| it["event"] == "link.up").count();
        eventually(&format!("{count} links of {name}"), async || (ups() >= count).then_some(())).await;
    }

    /// Logs in to the agent that has connected to `peer`, as the gateway of an organisation.
    pub(crate) async fn log_in_to_agent(&self, peer: &mut Peer, organisation: &str, key: &str) {
        let exchanged = peer.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
        assert_eq!(exchanged["exchanged"], true, "{exchanged}");
        let login = peer.ask(json!({"do": "login", "user": organisation, "key": self.key(key)})).await;
        assert_eq!(login["ok"], true, "{login}");
    }

    /// Logs in at the SSH door of a gateway.
    pub(crate) async fn enter(&self, peer: &mut Peer, door: SocketAddr, user: &str, key: &str) {
        peer.ask(json!({"do": "connect", "port": door.port()})).await;
        let exchanged = peer.ask(json!({"do": "client"})).await;
        assert_eq!(exchanged["exchanged"], true, "{exchanged}");
        let login = peer.ask(json!({"do": "login", "user": user, "key": self.key(key)})).await;
        assert_eq!(login["ok"], true, "{login}");
    }
}

/// Targets that send back what they get, and together count who connects to them.
pub(crate) struct Counted {
    count: Arc<AtomicUsize>,
    tasks: Tasks,
}

impl Counted {
    pub(crate) fn new() -> Self {
        Self { count: Arc::default(), tasks: Tasks::new() }
    }

    /// One more; port 0 for any.
    pub(crate) async fn listen(&self, ip: &str, port: u16) -> u16 {
        let ip: IpAddr = ip.parse().expect("an address");
        let listener = TcpListener::bind((ip, port)).await.unwrap_or_else(|error| panic!("{ip}:{port}: {error}"));
        let port = listener.local_addr().expect("its address").port();
        let (count, tasks) = (self.count.clone(), self.tasks.clone());
        self.tasks.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                tasks.spawn(async move {
                    let (mut read, mut write) = stream.split();
                    drop(tokio::io::copy(&mut read, &mut write).await);
                });
            }
        });
        port
    }

    /// How many have connected.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
}

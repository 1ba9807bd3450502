//! Peers that do not behave: foreign SSH (Debian's paramiko, driven through `raw.py`) against the door and the agent, and
//! in the place of either. All of it is refused on the wire and recorded, and costs nobody else their session.

mod before;
mod floods;
mod links;
mod listener;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use caponier::identity::key::{Algorithm, PrivateKey, PublicKey};
use caponier::limits;
use caponier::task::Tasks;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{sleep, timeout};

use crate::harness::checked_record;
use crate::kinds::{self, hex, string};

// ---------------------------------------------------------------------------------------------------------------------
// Set-up.

/// Debian's own Python, which is the one that python3-paramiko is installed for.
const PYTHON: &str = "/usr/bin/python3";

/// What the gateway says to an agent.
pub(crate) const GATEWAY_LINE: &str = "SSH-2.0-caponier_1 client";

/// An ordinary wait for something that happens at once.
const SOON: Duration = Duration::from_secs(60);

/// Runs a test under a deadline: so long on a machine that does nothing else, and five times as long on a busy one.
async fn limited<T>(seconds: u64, test: impl Future<Output = T>) -> T {
    let all = Duration::from_secs(seconds) * 5;
    timeout(all, test).await.unwrap_or_else(|_| panic!("not done in {all:?}"))
}

/// Waits until `look` finds something.
async fn until<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {within:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// A running `raw.py`: answers one command at a time.
pub(crate) struct Peer {
    _child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Peer {
    pub(crate) fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/raw.py");
        let mut child = Command::new(PYTHON)
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("Debian's python3 runs");
        let input = child.stdin.take().expect("its input");
        let output = BufReader::new(child.stdout.take().expect("its output")).lines();
        Self { _child: child, input, output }
    }

    /// Sends a command and returns its answer, `{"error": …}` included.
    pub(crate) async fn try_ask(&mut self, command: Value) -> Value {
        let line = format!("{command}\n");
        self.input.write_all(line.as_bytes()).await.expect("raw.py reads");
        let answer = timeout(Duration::from_secs(180), self.output.next_line()).await;
        let answer = answer.unwrap_or_else(|_| panic!("raw.py does not answer {command}")).expect("raw.py's output");
        let answer = answer.unwrap_or_else(|| panic!("raw.py ended over {command} (is python3-paramiko installed?)"));
        serde_json::from_str(&answer).expect("an answer in JSON")
    }

    /// Sends a command and returns its answer; it is the test's fault if that is an error.
    pub(crate) async fn ask(&mut self, command: Value) -> Value {
        let answer = self.try_ask(command.clone()).await;
        assert!(answer.get("error").is_none(), "{command}: {answer}");
        answer
    }

    /// Opens a plain forward; the answer is a confirmation (91), a refusal (92), or nothing.
    async fn forward(&mut self, host: &str, port: u64) -> Value {
        self.ask(json!({"do": "open", "type": "direct-tcpip", "host": host, "port": port})).await
    }

    /// Opens a forward in the name of a gateway.
    pub(crate) async fn gateway_forward(&mut self, originator: &str, host: &str, port: u16) -> Value {
        self.ask(json!({"do": "open", "type": "direct-tcpip", "host": host, "port": port, "originator": originator,
            "within": 25}))
            .await
    }

    /// Sends bytes over an open channel to a target that returns them.
    pub(crate) async fn echoes(&mut self, opened: &Value) {
        assert_eq!(opened["message"], 91, "an allowed forward opens: {opened}");
        let id = &opened["id"];
        self.ask(json!({"do": "send", "id": id, "hex": "6361706f"})).await;
        let answer = self.ask(json!({"do": "receive", "id": id, "bytes_": 4})).await;
        assert_eq!(answer["data"], "6361706f", "{answer}");
    }
}

/// A process of ours, its output in a file.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(kind: &str, config: &Path) -> Self {
        let log = config.with_extension("log");
        let file = fs::OpenOptions::new().append(true).create(true).open(&log).expect("a log file");
        let child = Command::new(env!("CARGO_BIN_EXE_caponier"))
            .args([kind, "--config"])
            .arg(config)
            .env_remove("AGENT_PROXY")
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("the log file"))
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .expect("caponier runs");
        Self { child, log }
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).expect("the log")).into_owned()
    }

    /// Still the same process, without a panic behind it and without a child of its own.
    fn assert_well(&mut self) {
        let ended = self.child.try_wait().expect("its state");
        assert!(ended.is_none(), "ended: {ended:?}\n{}", self.log());
        assert!(!self.log().contains("panicked"), "{}", self.log());
        let tasks = format!("/proc/{}/task", self.child.id().expect("running"));
        for task in fs::read_dir(tasks).expect("its threads").flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            assert_eq!(children, "", "a process was started");
        }
    }
}

/// Everything of one test: keys, a registry, and what runs. Removed with it.
struct World {
    dir: TempDir,
    tasks: Tasks,
    /// Returns what it gets.
    echo: u16,
    gateway: Option<Process>,
    agent: Option<Process>,
    /// Where the gateway, or what passes for it, listens.
    port: u16,
}

impl World {
    /// Keys and a registry, nothing running but the target.
    async fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("caponier-raw-").tempdir().expect("a directory");
        let tasks = Tasks::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a target");
        let echo = listener.local_addr().expect("its address").port();
        drop(tasks.spawn(async move {
            let clients = Tasks::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                drop(clients.spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                }));
            }
        }));
        let world = Self { dir, tasks, echo, gateway: None, agent: None, port: 0 };
        for key in ["gateway", "login-acme", "login-globex"] {
            world.key(key);
        }
        for (folder, key) in [
            ("acme/agents/prod-eu", "agent"),
            ("acme/agents/prod-us", "agent-us"),
            ("acme/agents/prod-old", "agent-revoked"),
            ("acme/principals/provisioner", "provisioner"),
            ("acme/principals/bystander", "bystander"),
            ("acme/principals/former", "former"),
            ("acme/principals/withdrawn", "withdrawn"),
            ("acme/principals/elsewhere", "elsewhere"),
            ("globex/agents/prod-eu", "agent-globex"),
            ("globex/principals/deployer", "deployer"),
        ] {
            let key = world.key(key);
            let folder = world.path(&format!("keys/organisations/{folder}"));
            fs::create_dir_all(&folder).expect("a folder");
            fs::write(folder.join("key.pub"), format!("{}\n", key.to_openssh())).expect("a public key");
        }
        world.key("stranger");
        for (file, text) in [
            ("acme/principals/provisioner.toml", "agents = [\"prod-*\"]\n"),
            ("acme/principals/bystander.toml", "agents = [\"stage-*\"]\n"),
            ("acme/principals/former.toml", "agents = [\"prod-*\"]\nexpires = \"2020-01-01T00:00:00Z\"\n"),
            ("acme/principals/withdrawn.toml", "agents = [\"prod-*\"]\n"),
            ("acme/principals/withdrawn/key.toml", "revoked = true\n"),
            ("acme/principals/elsewhere.toml", "agents = [\"prod-*\"]\naccept_from = [\"192.0.2.0/24\"]\n"),
            ("globex/principals/deployer.toml", "agents = [\"*\"]\n"),
            ("acme/agents/prod-old/key.toml", "revoked = true\n"),
        ] {
            fs::write(world.path(&format!("keys/organisations/{file}")), text).expect("a registry file");
        }
        world
    }

    /// A gateway and an agent linked to it.
    async fn linked() -> Self {
        let mut world = Self::new().await;
        world.start_gateway().await;
        world.start_agent(&format!("ssh://127.0.0.1:{}", world.port), "", "");
        let up = |record: &Value| record["event"] == "link.up";
        world.entry("gateway", up).await;
        world
    }

    /// An agent whose gateway is `peer`, before any byte of SSH.
    async fn dialled(peer: &mut Peer) -> Self {
        let mut world = Self::new().await;
        let listening = peer.ask(json!({"do": "listen"})).await;
        world.port = u16::try_from(listening["port"].as_u64().expect("a port")).expect("a port");
        world.start_agent(&format!("ssh://127.0.0.1:{}", world.port), "asserts = [\"provisioner\", \"ci-*\"]\n", "");
        peer.ask(json!({"do": "accept"})).await;
        world
    }

    /// An agent to which `peer` has logged in as the gateway.
    async fn served(peer: &mut Peer) -> Self {
        let world = Self::dialled(peer).await;
        world.log_in_to_agent(peer).await;
        world
    }

    async fn log_in_to_agent(&self, peer: &mut Peer) {
        let exchanged = peer.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
        assert_eq!(exchanged["line"], "SSH-2.0-caponier_1 agent=acme/prod-eu/r1", "{exchanged}");
        assert_eq!(exchanged["key"], self.public("agent"), "{exchanged}");
        let login = peer.ask(json!({"do": "login", "user": "acme", "key": self.path("login-acme")})).await;
        assert_eq!(login["ok"], true, "{login}");
    }

    /// A session at the door as `provisioner`.
    async fn at_the_door(&self) -> Peer {
        let mut peer = Peer::start();
        self.enter(&mut peer).await;
        peer
    }

    async fn enter(&self, peer: &mut Peer) {
        peer.ask(json!({"do": "connect", "port": self.port})).await;
        let exchanged = peer.ask(json!({"do": "client"})).await;
        assert_eq!(exchanged["key"], self.public("gateway"), "{exchanged}");
        let login = peer.ask(json!({"do": "login", "user": "acme/prod-eu", "key": self.path("provisioner")})).await;
        assert_eq!(login["ok"], true, "{login}");
    }

    async fn start_gateway(&mut self) {
        self.start_gateway_at("").await;
    }

    /// A gateway that has this to say of its only listener.
    async fn start_gateway_at(&mut self, listener: &str) {
        let config = self.path("gateway.toml");
        let text = "
            [gateway]
            host_key = \"gateway\"
            registry = \"keys\"
            [audit]
            file = \"gateway.jsonl\"
            [log]
            format = \"json\"
            [[organisation]]
            id = \"acme\"
            login_key = \"login-acme\"
            [[organisation]]
            id = \"globex\"
            login_key = \"login-globex\"
            [[listener]]
            address = \"127.0.0.1:0\"
        ";
        fs::write(&config, format!("{text}{listener}\n")).expect("a configuration");
        let process = Process::start("gateway", &config);
        self.port = until("the gateway listens", SOON, || {
            let log = process.log();
            let (_, rest) = log.split_once("listening on 127.0.0.1:")?;
            rest.split_once('"')?.0.parse().ok()
        })
        .await;
        self.gateway = Some(process);
    }

    /// Starts the agent. Its rules: the target by address; and traps that only the guard closes.
    fn start_agent(&mut self, gateway: &str, orchestrator: &str, agent: &str) {
        let (echo, port) = (self.echo, self.port);
        let (login, globex) = (self.public("login-acme"), self.public("login-globex"));
        let asserts = if orchestrator.is_empty() { "asserts = [\"provisioner\"]\n" } else { orchestrator };
        let text = format!(
            "[agent]\nid = \"prod-eu\"\nreplica = \"r1\"\nhost_key = \"agent\"\n{agent}\n\
             [audit]\nfile = \"agent.jsonl\"\n[log]\nformat = \"json\"\n\
             [[organisation]]\nid = \"acme\"\ngateways = [\"{gateway}\"]\n\
             [[organisation.orchestrator]]\nkey = \"{login}\"\n{asserts}\
             [[organisation.allow]]\nname = \"echo\"\naddresses = [\"127.0.0.1/32\"]\nports = [{echo}, {port}]\n\
             [[organisation.allow]]\nname = \"wide\"\naddresses = [\"0.0.0.0/0\", \"::/0\"]\nports = [80, {echo}]\n\
             [[organisation.allow]]\nname = \"silent\"\naddresses = [\"127.0.0.1/32\"]\nports = [1]\n\
             principals = [\"ci-*\"]\n\
             [[organisation.allow]]\nname = \"named\"\nhosts = [\"nowhere.invalid\"]\nwithin = [\"10.0.0.0/8\"]\n\
             ports = [80]\n\
             [[organisation]]\nid = \"globex\"\ngateways = [\"ssh://127.0.0.1:9\"]\n\
             [[organisation.orchestrator]]\nkey = \"{globex}\"\n",
        );
        let config = self.path("agent.toml");
        fs::write(&config, text).expect("a configuration");
        self.agent = Some(Process::start("agent", &config));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new private key in the file `name`.
    fn key(&self, name: &str) -> PublicKey {
        let key = PrivateKey::generate(Algorithm::Ed25519);
        key.write_new(&self.path(name)).expect("a key file");
        key.public()
    }

    /// The public half of a key, as OpenSSH writes it.
    fn public(&self, name: &str) -> String {
        PrivateKey::read(&self.path(name)).expect("a key file").public().to_openssh()
    }

    fn fingerprint(&self, name: &str) -> String {
        PrivateKey::read(&self.path(name)).expect("a key file").public().fingerprint().to_string()
    }

    /// A side's trail; a line that is still being written is not looked at.
    fn trail(&self, side: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(&format!("{side}.jsonl"))).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(checked_record).collect()
    }

    /// The first record that `wanted` holds for.
    async fn entry(&self, side: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let found = timeout(SOON, async {
            loop {
                if let Some(record) = self.trail(side).into_iter().find(&wanted) {
                    return record;
                }
                sleep(Duration::from_millis(20)).await;
            }
        });
        found.await.unwrap_or_else(|_| panic!("no such record of the {side}:\n{}", lines(&self.trail(side))))
    }

    /// Both processes are as they were, and nothing in trails or logs does something to a terminal.
    fn assert_well(&mut self) {
        for file in ["gateway.jsonl", "gateway.log", "agent.jsonl", "agent.log"] {
            let text = fs::read(self.path(file)).unwrap_or_default();
            let text = String::from_utf8(text).unwrap_or_else(|_| panic!("{file} is not UTF-8"));
            let active = |c: char| (c.is_control() && c != '\n') || ('\u{202a}'..='\u{202e}').contains(&c);
            let line = text.lines().find(|line| line.contains(active));
            assert_eq!(line, None, "{file} holds control characters as they came");
        }
        for process in [&mut self.gateway, &mut self.agent].into_iter().flatten() {
            process.assert_well();
        }
        assert!(!self.path("executed").exists(), "a command of a peer was executed");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

fn lines(records: &[Value]) -> String {
    records.iter().map(|record| format!("{record}\n")).collect()
}

// ---------------------------------------------------------------------------------------------------------------------
// What SSH can ask for, and neither side does.

fn foreign_channels(world: &World) -> Vec<(&'static str, String)> {
    kinds::channels(world.echo, world.dir.path())
}

fn channel_requests(world: &World) -> Vec<(&'static str, String)> {
    kinds::requests(world.dir.path())
}

fn global_requests(world: &World) -> Vec<(&'static str, String)> {
    kinds::globals(world.dir.path())
}

/// How an allowed forward is asked for: plainly at the door, with an originator at the agent.
async fn allowed(world: &World, peer: &mut Peer, door: bool) -> Value {
    let originator = if door { "127.0.0.1".to_owned() } else { originator("provisioner") };
    peer.gateway_forward(&originator, "127.0.0.1", world.echo).await
}

/// A well-formed originator with a fresh forward id.
pub(crate) fn originator(principal: &str) -> String {
    format!("caponier1:{}:{principal}:192.0.2.1:40000", caponier::tunnel::wire::ForwardId::random())
}

/// Everything that was not refused, in words.
async fn not_refused(world: &World, peer: &mut Peer, door: bool) -> Vec<String> {
    let originator = || if door { "127.0.0.1".to_owned() } else { originator("provisioner") };
    kinds::not_refused(peer, world.echo, world.dir.path(), originator).await
}

#[tokio::test]
async fn the_door_does_nothing_but_forward() {
    limited(120, async {
        let mut world = World::linked().await;
        let mut peer = world.at_the_door().await;
        let mut faults = not_refused(&world, &mut peer, true).await;
        assert_eq!(faults, Vec::<String>::new());
        // The control channel is the gateway's to open at an agent, and nobody's at the door.
        for _ in 0..2 {
            let answer = peer.ask(json!({"do": "open", "type": "session"})).await;
            if answer["message"] != 92 {
                faults.push(format!("session at the door: {answer}"));
            }
        }
        let forward = allowed(&world, &mut peer, true).await;
        peer.echoes(&forward).await;
        assert_eq!(faults, Vec::<String>::new());
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn the_door_does_nothing_more_for_who_calls_itself_a_client_of_ours() {
    limited(120, async {
        let mut world = World::linked().await;
        let mut peer = Peer::start();
        peer.ask(json!({"do": "connect", "port": world.port})).await;
        peer.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
        let login = peer.ask(json!({"do": "login", "user": "acme/prod-eu", "key": world.path("provisioner")})).await;
        assert_eq!(login["ok"], true, "{login}");
        let faults = not_refused(&world, &mut peer, true).await;
        assert_eq!(faults, Vec::<String>::new());
        let session = peer.ask(json!({"do": "open", "type": "session"})).await;
        assert_eq!(session["message"], 92, "{session}");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn the_agent_does_nothing_but_forward() {
    limited(120, async {
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        let faults = not_refused(&world, &mut peer, false).await;
        assert_eq!(faults, Vec::<String>::new());
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_session_channel_at_the_agent_is_for_one_control_channel() {
    limited(120, async {
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        let mut faults = Vec::new();
        let control = peer.ask(json!({"do": "open", "type": "session"})).await;
        assert_eq!(control["message"], 91, "{control}");
        for (name, body) in channel_requests(&world) {
            if body == string("control@caponier") {
                continue;
            }
            let request = json!({"do": "request", "id": control["id"], "name": name, "rest": body});
            let answer = peer.ask(request).await;
            if answer["message"] != 100 {
                faults.push(format!("{name:?} on a session channel: {answer}"));
            }
        }
        let body = string("control@caponier");
        let request = json!({"do": "request", "id": control["id"], "name": "subsystem", "rest": body});
        let answer = peer.ask(request.clone()).await;
        assert_eq!(answer["message"], 99, "{answer}");
        for (name, body) in channel_requests(&world) {
            let again = json!({"do": "request", "id": control["id"], "name": name, "rest": body});
            let answer = peer.ask(again).await;
            if answer["message"] != 100 {
                faults.push(format!("{name:?} on the control channel: {answer}"));
            }
        }
        let second = peer.ask(json!({"do": "open", "type": "session"})).await;
        if second["message"] == 91 {
            let request = json!({"do": "request", "id": second["id"], "name": "subsystem", "rest": body});
            let answer = peer.ask(request).await;
            if answer["message"] != 100 && answer["message"] != 97 {
                faults.push(format!("a second control channel: {answer}"));
            }
        } else if second["message"] != 92 {
            faults.push(format!("a second session channel: {second}"));
        }
        let forward = allowed(&world, &mut peer, false).await;
        peer.echoes(&forward).await;
        assert_eq!(faults, Vec::<String>::new());
        world.assert_well();
    })
    .await;
}

// ---------------------------------------------------------------------------------------------------------------------
// Targets that nobody may reach.

/// An HTTP proxy that does CONNECT and nothing else; returns its port.
async fn proxy(tasks: &Tasks) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a proxy");
    let port = listener.local_addr().expect("its address").port();
    drop(tasks.spawn(async move {
        let clients = Tasks::new();
        while let Ok((stream, _)) = listener.accept().await {
            drop(clients.spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut request = String::new();
                while !request.ends_with("\r\n\r\n") && stream.read_line(&mut request).await.unwrap_or(0) > 0 {}
                let to = request.split(' ').nth(1).unwrap_or_default().to_owned();
                let Ok(mut upstream) = TcpStream::connect(to).await else { return };
                let _ = stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await;
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut upstream).await;
            }));
        }
    }));
    port
}

/// How forwards ended that never opened, or opened and were told to the agent in vain.
fn refusals(trail: &[Value]) -> Vec<&Value> {
    trail.iter().filter(|record| record["event"] == "forward.denied" || record["event"] == "forward.failed").collect()
}

#[tokio::test]
async fn forbidden_targets_are_refused_and_recorded_one_by_one() {
    limited(180, async {
        let mut world = World::new().await;
        world.start_gateway().await;
        let proxy = proxy(&world.tasks).await;
        let (echo, own) = (u64::from(world.echo), u64::from(world.port));
        // A rule with the proxy's port too, so that nothing but the guard refuses it.
        let gateway = format!("ssh://127.0.0.1:{own}");
        let rule = format!(
            "asserts = [\"provisioner\"]\n[[organisation.allow]]\nname = \"proxy\"\n\
             addresses = [\"127.0.0.1/32\"]\nports = [{proxy}]\n"
        );
        world.start_agent(&gateway, &rule, &format!("proxy = \"http://127.0.0.1:{proxy}\""));
        world.entry("gateway", |record| record["event"] == "link.up").await;
        let mut peer = world.at_the_door().await;
        let long = "a".repeat(300);
        let label = format!("{}.test", "a".repeat(64));
        let cases: Vec<(&str, &[u8], u64, &str)> = vec![
            ("port 0", b"127.0.0.1", 0, "malformed_target"),
            ("port 65536 and the target's", b"127.0.0.1", 65536 + echo, "malformed_target"),
            ("port 65536", b"127.0.0.1", 65536, "malformed_target"),
            ("port 4294967295", b"127.0.0.1", 4_294_967_295, "malformed_target"),
            ("no host", b"", echo, "malformed_target"),
            ("a blank host", b" ", echo, "malformed_target"),
            ("a long host", long.as_bytes(), echo, "malformed_target"),
            ("a long label", label.as_bytes(), echo, "malformed_target"),
            ("NUL inside", b"127.0.0.1\0.example.com", echo, "malformed_target"),
            ("NUL at the end", b"127.0.0.1\0", echo, "malformed_target"),
            ("a line feed", b"127.0.0.1\n", echo, "malformed_target"),
            ("an escape sequence", b"\x1b[2J127.0.0.1", echo, "malformed_target"),
            ("a blank in front", b" 127.0.0.1", echo, "malformed_target"),
            ("a list", b"127.0.0.1,127.0.0.1", echo, "malformed_target"),
            ("a pattern", b"*", echo, "malformed_target"),
            ("a network", b"127.0.0.1/32", echo, "malformed_target"),
            ("a user", b"user@127.0.0.1", echo, "malformed_target"),
            ("host and port", format!("127.0.0.1:{echo}").into_bytes().leak(), echo, "malformed_target"),
            ("brackets", b"[127.0.0.1]", echo, "malformed_target"),
            ("an octal literal", b"0177.0.0.1", echo, "malformed_target"),
            ("a decimal literal", b"2130706433", echo, "malformed_target"),
            ("a hexadecimal literal", b"0x7f000001", echo, "malformed_target"),
            ("hexadecimal parts", b"0x7f.0.0.1", echo, "malformed_target"),
            ("a short literal", b"127.1", echo, "malformed_target"),
            ("leading zeros", b"127.000.000.001", echo, "malformed_target"),
            ("fullwidth digits", "１２７.0.0.1".as_bytes(), echo, "malformed_target"),
            ("an ideographic full stop", "127。0。0。1".as_bytes(), echo, "malformed_target"),
            ("a mapped literal", b"::ffff:127.0.0.2", echo, "reserved_address"),
            ("a mapped literal in hexadecimal", b"::ffff:7f00:2", echo, "reserved_address"),
            ("a compatible literal", b"::127.0.0.1", echo, "reserved_address"),
            ("a NAT64 literal", b"64:ff9b::127.0.0.1", echo, "reserved_address"),
            ("NAT64 of the metadata service", b"64:ff9b::169.254.169.254", 80, "reserved_address"),
            ("metadata service", b"169.254.169.254", 80, "reserved_address"),
            ("metadata service over IPv6", b"fd00:ec2::254", 80, "reserved_address"),
            ("metadata service of another cloud", b"100.100.100.200", 80, "reserved_address"),
            ("a 6to4 literal", b"2002:7f00:1::1", 80, "reserved_address"),
            ("a local NAT64 literal", b"64:ff9b:1::7f00:1", 80, "reserved_address"),
            ("this network", b"0.1.2.3", 80, "reserved_address"),
            ("class E", b"240.0.0.1", 80, "reserved_address"),
            ("mapped metadata service", b"::ffff:169.254.169.254", 80, "reserved_address"),
            ("decimal metadata service", b"2852039166", 80, "malformed_target"),
            ("unspecified", b"0.0.0.0", echo, "reserved_address"),
            ("short unspecified", b"0", echo, "malformed_target"),
            ("unspecified IPv6", b"::", echo, "reserved_address"),
            ("another loopback address", b"127.0.0.2", echo, "reserved_address"),
            ("loopback over IPv6", b"::1", echo, "reserved_address"),
            ("link-local IPv6", b"fe80::1", echo, "reserved_address"),
            ("a scope", b"fe80::1%lo", echo, "malformed_target"),
            ("broadcast", b"255.255.255.255", echo, "reserved_address"),
            ("multicast", b"224.0.0.1", echo, "reserved_address"),
            ("a name without a rule", b"localhost", echo, "no_rule"),
            ("a name with a dot at its end", b"localhost.", echo, "no_rule"),
            ("a name in capitals", b"LOCALHOST", echo, "no_rule"),
            ("a name below a name", b"app.localhost", echo, "no_rule"),
            ("another port", b"127.0.0.1", 22, "port"),
            ("a rule for others", b"127.0.0.1", 1, "principal"),
            ("the gateway", b"127.0.0.1", own, "own_gateway"),
            ("the proxy", b"127.0.0.1", u64::from(proxy), "own_gateway"),
            ("the mapped gateway", b"::ffff:127.0.0.1", own, "own_gateway"),
            ("a C1 control sequence", "\u{9b}2J127.0.0.1".as_bytes(), echo, "malformed_target"),
            ("text that runs backwards", "\u{202e}1.0.0.721".as_bytes(), echo, "malformed_target"),
            ("a translated literal (RFC 2765)", b"::ffff:0:127.0.0.2", echo, "reserved_address"),
        ];
        let mut faults = Vec::new();
        for (what, host, port, reason) in &cases {
            let before = refusals(&world.trail("gateway")).len();
            let open = json!({"do": "open", "type": "direct-tcpip", "host_hex": hex(host), "port": port});
            let answer = peer.ask(open).await;
            if answer["message"] != 92 {
                faults.push(format!("{what}: {answer}"));
                if answer["open"] == false {
                    world.enter(&mut peer).await;
                    continue;
                }
            } else if answer["text"] != "not allowed" || answer["code"] != 1 {
                faults.push(format!("{what} is told apart: {answer}"));
            }
            let found = timeout(SOON, async {
                while refusals(&world.trail("gateway")).len() <= before {
                    sleep(Duration::from_millis(5)).await;
                }
            });
            if found.await.is_err() {
                faults.push(format!("{what}: no entry"));
                continue;
            }
            let trail = world.trail("gateway");
            let new: Vec<Value> = refusals(&trail)[before..].iter().map(|record| (*record).clone()).collect();
            let own = new[0]["reason"] == *reason;
            let agents = new[0]["reason"] == "agent_denied" && new[0]["detail"] == *reason;
            let who = new[0]["principal"] == "provisioner" && new[0]["client"].is_string();
            if new.len() != 1 || new[0]["event"] != "forward.denied" || !(own || agents) || !who {
                faults.push(format!("{what}: {}", lines(&new)));
            }
            if agents {
                let forward = new[0]["forward"].clone();
                world.entry("agent", |it| it["peer_forward"] == forward && it["reason"] == *reason).await;
            }
        }
        let forward = allowed(&world, &mut peer, true).await;
        peer.echoes(&forward).await;
        assert_eq!(faults, Vec::<String>::new());
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_host_that_is_not_utf8_costs_its_session_at_most() {
    limited(60, async {
        let mut world = World::linked().await;
        let mut bystander = world.at_the_door().await;
        let open = allowed(&world, &mut bystander, true).await;
        for host in [&b"\xff\xfe"[..], b"127.0.0.1\xff", b"\xc0\xae", b"\xed\xa0\x80"] {
            let mut peer = world.at_the_door().await;
            let request = json!({"do": "open", "type": "direct-tcpip", "host_hex": hex(host), "port": world.echo});
            let answer = peer.ask(request).await;
            let refused = answer["message"] == 92 || (answer["nothing"] == true && answer["open"] == false);
            assert!(refused, "{host:?}: {answer}");
            let mut next = world.at_the_door().await;
            let forward = allowed(&world, &mut next, true).await;
            next.echoes(&forward).await;
        }
        bystander.echoes(&open).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_host_that_is_not_utf8_does_not_end_the_agent() {
    limited(60, async {
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        let request = json!({"do": "open", "type": "direct-tcpip", "host_hex": "ff7fc0", "port": world.echo,
            "originator": originator("provisioner")});
        let answer = peer.ask(request).await;
        let refused = answer["message"] == 92 || (answer["nothing"] == true && answer["open"] == false);
        assert!(refused, "{answer}");
        if answer["message"] != 92 {
            peer.ask(json!({"do": "accept", "within": 60})).await;
            world.log_in_to_agent(&mut peer).await;
        }
        let forward = allowed(&world, &mut peer, false).await;
        peer.echoes(&forward).await;
        world.assert_well();
    })
    .await;
}

// ---------------------------------------------------------------------------------------------------------------------
// Logging in to an agent, and speaking for somebody there.

/// The answer to every refused login: failure, public keys may continue, no partial success.
pub(crate) const LOGIN_FAILURE: &str = "33000000097075626c69636b657900";

#[tokio::test]
async fn the_agent_lets_in_its_organisations_login_key_alone() {
    limited(60, async {
        let mut peer = Peer::start();
        let mut world = World::dialled(&mut peer).await;
        peer.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
        let key = |name: &str| world.path(name);
        let hostbased = format!(
            "{}{}{}{}{}",
            string("ssh-ed25519"),
            string("key"),
            string("gateway.example.com"),
            string("root"),
            string("signature")
        );
        let cases = [
            ("another organisation's name", json!({"user": "globex", "key": key("login-acme")})),
            ("another organisation altogether", json!({"user": "globex", "key": key("login-globex")})),
            ("another organisation's key", json!({"user": "acme", "key": key("login-globex")})),
            ("no name", json!({"user": "", "key": key("login-acme")})),
            ("the name in capitals", json!({"user": "ACME", "key": key("login-acme")})),
            ("a door's user", json!({"user": "acme/prod-eu", "key": key("login-acme")})),
            ("root", json!({"user": "root", "key": key("login-acme")})),
            ("a stranger's key", json!({"user": "acme", "key": key("stranger")})),
            ("a principal's key", json!({"user": "acme", "key": key("provisioner")})),
            ("the agent's own key", json!({"user": "acme", "key": key("agent")})),
            ("a forged signature", json!({"user": "acme", "key": key("login-acme"), "forge": true})),
            ("a password", json!({"user": "acme", "method": "password", "password": "acme"})),
            ("answers", json!({"user": "acme", "method": "keyboard-interactive"})),
            ("a host's word", json!({"user": "acme", "method": "hostbased", "body": hostbased})),
            ("nothing", json!({"user": "acme", "method": "none"})),
        ];
        let mut faults = Vec::new();
        for (what, mut login) in cases {
            login["do"] = "login".into();
            let answer = peer.ask(login).await;
            if answer["ok"] != false || answer["answers"] != json!([LOGIN_FAILURE]) {
                faults.push(format!("{what}: {answer}"));
            }
        }
        assert_eq!(faults, Vec::<String>::new());
        let login = peer.ask(json!({"do": "login", "user": "acme", "key": key("login-acme")})).await;
        assert_eq!(login["ok"], true, "{login}");
        let forward = allowed(&world, &mut peer, false).await;
        peer.echoes(&forward).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn nothing_opens_before_the_login() {
    limited(60, async {
        for agent in [true, false] {
            let mut peer = Peer::start();
            let mut world = if agent {
                World::dialled(&mut peer).await
            } else {
                let world = World::linked().await;
                peer.ask(json!({"do": "connect", "port": world.port})).await;
                world
            };
            peer.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
            let originator = originator("provisioner");
            let answer = peer
                .ask(json!({"do": "open", "type": "direct-tcpip", "host": "127.0.0.1", "port": world.echo,
                    "originator": originator, "within": 2}))
                .await;
            assert_ne!(answer["message"], 91, "agent {agent}: {answer}");
            let trails = [world.trail("agent"), world.trail("gateway")].concat();
            assert!(!trails.iter().any(|it| it["event"] == "forward.open"), "{}", lines(&trails));
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn the_agent_ends_a_login_after_so_many_refusals() {
    limited(60, async {
        let mut peer = Peer::start();
        let mut world = World::dialled(&mut peer).await;
        peer.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
        let mut refused = 0;
        for _ in 0..limits::LOGIN_ATTEMPTS + 4 {
            let login = json!({"do": "login", "user": "acme", "key": world.path("stranger"), "within": 5});
            let answer = peer.try_ask(login).await;
            assert_ne!(answer["ok"], true, "{answer}");
            if answer["answers"] != json!([LOGIN_FAILURE]) {
                break;
            }
            refused += 1;
        }
        assert!((limits::LOGIN_ATTEMPTS - 1..=limits::LOGIN_ATTEMPTS).contains(&refused), "{refused} attempts");
        let end = peer.ask(json!({"do": "closed"})).await;
        assert_eq!(end["closed"], true, "{end}");
        // The agent comes back by itself, and the right key still works.
        peer.ask(json!({"do": "accept", "within": 60})).await;
        world.log_in_to_agent(&mut peer).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn the_agent_believes_an_originator_within_what_the_key_asserts() {
    limited(90, async {
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        let key = world.fingerprint("login-acme");
        let id = || caponier::tunnel::wire::ForwardId::random().to_string();
        // What is claimed, host, port, the code, and whether the description begins with the forward's id.
        let (denied, malformed) = (0xFE00_0001_u32, 0xFE00_0007_u32);
        let (connect_failed, unresolved) = (0xFE00_0003_u32, 0xFE00_0002_u32);
        let echo = world.echo;
        let long = "a".repeat(65);
        let ours = |principal: &str| format!("caponier1:ID:{principal}:192.0.2.1:40000");
        let cases = [
            ("a principal outside", ours("deployer"), "127.0.0.1", echo, denied, true),
            ("a pattern for a principal", ours("ci-*"), "127.0.0.1", echo, malformed, false),
            ("part of a pattern", ours("ci"), "127.0.0.1", echo, denied, true),
            ("a longer name", ours("provisioner2"), "127.0.0.1", echo, denied, true),
            ("capitals", ours("Provisioner"), "127.0.0.1", echo, malformed, false),
            ("no principal", ours(""), "127.0.0.1", echo, malformed, false),
            ("the key for a principal", ours(&key), "127.0.0.1", echo, malformed, false),
            ("no claim", "127.0.0.1".into(), "127.0.0.1", echo, denied, false),
            ("an empty originator", String::new(), "127.0.0.1", echo, denied, false),
            ("another version", "caponier2:ID:provisioner:x".into(), "127.0.0.1", echo, malformed, false),
            ("the word alone", "caponier".into(), "127.0.0.1", echo, malformed, false),
            ("a short id", "caponier1:00:provisioner:x".into(), "127.0.0.1", echo, malformed, false),
            ("no client", "caponier1:ID:provisioner".into(), "127.0.0.1", echo, malformed, false),
            ("a client in two words", "caponier1:ID:provisioner:a b".into(), "127.0.0.1", echo, malformed, false),
            ("an active client", "caponier1:ID:provisioner:\u{1b}[2J".into(), "127.0.0.1", echo, malformed, false),
            ("a long client", format!("caponier1:ID:provisioner:{long}"), "127.0.0.1", echo, malformed, false),
            ("a name that does not exist", ours("provisioner"), "nowhere.invalid", 80, unresolved, true),
            ("a target that is not there", ours("ci-build"), "127.0.0.1", 1, connect_failed, true),
            ("a rule for others", ours("provisioner"), "127.0.0.1", 1, denied, true),
            ("another port", ours("provisioner"), "127.0.0.1", 2, denied, true),
            ("the metadata service", ours("provisioner"), "169.254.169.254", 80, denied, true),
        ];
        let mut faults = Vec::new();
        for (what, claim, host, port, code, tells) in cases {
            let before = refusals(&world.trail("agent")).len();
            let id = id();
            let answer = peer.gateway_forward(&claim.replace("ID", &id), host, port).await;
            let text = answer["text"].as_str().unwrap_or_default();
            let words = text.strip_prefix(&format!("{id} ")).unwrap_or(text);
            if answer["message"] != 92 || answer["code"] != code || tells != (words != text) {
                faults.push(format!("{what}: {answer}"));
            }
            let plain = |c: char| (' '..='~').contains(&c);
            if words.is_empty() || words.len() > 256 || !words.chars().all(plain) {
                faults.push(format!("{what}: {words:?}"));
            }
            let found = timeout(SOON, async {
                while refusals(&world.trail("agent")).len() <= before {
                    sleep(Duration::from_millis(5)).await;
                }
            });
            if found.await.is_err() {
                faults.push(format!("{what}: no entry"));
                continue;
            }
            let trail = world.trail("agent");
            let new = &refusals(&trail)[before..];
            let asserted = !tells || new[0]["asserted_by"] == key.as_str();
            if new.len() != 1 || new[0]["key"] != key.as_str() || (tells && new[0]["peer_forward"] != id) || !asserted {
                faults.push(format!("{what}: {}", new[0]));
            }
        }
        let forward = peer.gateway_forward(&originator("ci-build"), "127.0.0.1", world.echo).await;
        peer.echoes(&forward).await;
        assert_eq!(faults, Vec::<String>::new());
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn the_agent_calls_a_malformed_target_malformed() {
    limited(60, async {
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        let mut faults = Vec::new();
        for (host, port) in [("0177.0.0.1", world.echo), ("2130706433", world.echo), ("", world.echo), ("127.0.0.1", 0)]
        {
            let claim = originator("provisioner");
            let answer = peer.gateway_forward(&claim, host, port).await;
            if answer["code"] != 0xFE00_0007_u32 {
                faults.push(format!("{host:?}, port {port}: {answer}"));
            }
            let id = claim.split(':').nth(1).expect("its id");
            world.entry("agent", |it| it["peer_forward"] == id && it["reason"] == "malformed_target").await;
        }
        assert_eq!(faults, Vec::<String>::new());
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_forward_id_lives_once() {
    limited(60, async {
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        let claim = originator("provisioner");
        let id = claim.split(':').nth(1).expect("its id").to_owned();
        let first = peer.gateway_forward(&claim, "127.0.0.1", world.echo).await;
        peer.echoes(&first).await;
        let second = peer.gateway_forward(&claim, "127.0.0.1", world.echo).await;
        assert_eq!((&second["message"], &second["code"]), (&json!(92), &json!(0xFE00_0007_u32)), "{second}");
        assert!(second["text"].as_str().expect("text").starts_with(&format!("{id} ")), "{second}");
        let third = peer.gateway_forward(&claim.replace("provisioner", "ci-x"), "127.0.0.1", world.echo).await;
        assert_eq!(third["code"], 0xFE00_0007_u32, "another principal's claim to it: {third}");
        peer.echoes(&first).await;
        let entries = || refusals(&world.trail("agent")).iter().filter(|it| it["peer_forward"] == id).count();
        until("two refusals in the trail", SOON, || (entries() == 2).then_some(())).await;
        // Ended, its id is nobody's.
        peer.ask(json!({"do": "close", "id": first["id"]})).await;
        world.entry("agent", |it| it["event"] == "forward.ended" && it["peer_forward"] == id).await;
        let again = peer.gateway_forward(&claim, "127.0.0.1", world.echo).await;
        peer.echoes(&again).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_key_that_asserts_nobody_speaks_for_itself() {
    limited(60, async {
        let mut peer = Peer::start();
        let mut world = World::new().await;
        let listening = peer.ask(json!({"do": "listen"})).await;
        world.port = u16::try_from(listening["port"].as_u64().expect("a port")).expect("a port");
        let gateway = format!("ssh://127.0.0.1:{}", world.port);
        world.start_agent(&gateway, "# speaks for itself alone\n", "");
        peer.ask(json!({"do": "accept"})).await;
        world.log_in_to_agent(&mut peer).await;
        let claimed = peer.gateway_forward(&originator("provisioner"), "127.0.0.1", world.echo).await;
        assert_eq!(claimed["code"], 0xFE00_0001_u32, "{claimed}");
        let plain = peer.gateway_forward("127.0.0.1", "127.0.0.1", world.echo).await;
        peer.echoes(&plain).await;
        let key = world.fingerprint("login-acme");
        let open = world.entry("agent", |it| it["event"] == "forward.open").await;
        assert_eq!(open["principal"], key, "{open}");
        assert!(open.get("asserted_by").is_none(), "{open}");
        world.assert_well();
    })
    .await;
}

// ---------------------------------------------------------------------------------------------------------------------
// Logging in at the door.

#[tokio::test]
async fn refused_logins_at_the_door_look_alike_and_are_recorded_as_they_were() {
    limited(180, async {
        let mut world = World::linked().await;
        let long = format!("acme/{}", "a".repeat(10_000));
        // Who, with which key, and the reason that the trail gives; None where the method or the form decides.
        let cases = [
            ("an unknown key", "acme/prod-eu", "stranger", Some("unknown_key")),
            ("another organisation's key", "acme/prod-eu", "deployer", Some("other_organisation")),
            ("a key in another organisation", "globex/prod-eu", "provisioner", Some("other_organisation")),
            ("an unknown agent", "acme/nowhere", "provisioner", Some("unknown_agent")),
            ("an unknown organisation", "initech/prod-eu", "provisioner", Some("unknown_organisation")),
            ("an unknown organisation and key", "initech/prod-eu", "stranger", None),
            ("an agent without a grant", "acme/prod-eu", "bystander", Some("not_granted")),
            ("an expired principal", "acme/prod-eu", "former", Some("expired")),
            ("a revoked key", "acme/prod-eu", "withdrawn", Some("revoked")),
            ("a good key from the wrong network", "acme/prod-eu", "elsewhere", Some("source_network")),
            ("an agent's key", "acme/prod-eu", "agent", Some("other_holder")),
            ("the gateway's login key", "acme/prod-eu", "login-acme", Some("unknown_key")),
            ("the gateway's own key", "acme/prod-eu", "gateway", Some("unknown_key")),
            ("a forged signature", "acme/prod-eu", "forged", None),
            ("no user", "", "provisioner", None),
            ("an organisation alone", "acme", "provisioner", None),
            ("an organisation and a slash", "acme/", "provisioner", None),
            ("a slash", "/", "provisioner", None),
            ("a replica too", "acme/prod-eu/r1", "provisioner", None),
            ("capitals", "ACME/prod-eu", "provisioner", None),
            ("a pattern", "acme/*", "provisioner", None),
            ("a path", "acme/../acme/prod-eu", "provisioner", None),
            ("a blank", "acme/prod-eu ", "provisioner", None),
            ("a line feed", "acme/prod-eu\n", "provisioner", None),
            ("NUL", "acme/prod-eu\0", "provisioner", None),
            ("an escape sequence", "\u{1b}[2Jacme/prod-eu", "provisioner", None),
            ("a C1 control", "\u{9b}2Jacme/prod-eu", "provisioner", None),
            ("a long user", &long, "provisioner", None),
            ("a password", "acme/prod-eu", "password", None),
            ("answers", "acme/prod-eu", "keyboard-interactive", None),
            ("nothing", "acme/prod-eu", "none", None),
            ("a host's word", "acme/prod-eu", "hostbased", None),
            ("an unknown method", "acme/prod-eu", "frobnicate", None),
        ];
        let mut faults = Vec::new();
        let mut fastest = Vec::new();
        let mut peer = Peer::start();
        for (what, user, key, reason) in cases {
            let from = peer.ask(json!({"do": "connect", "port": world.port})).await["local"].clone();
            peer.ask(json!({"do": "client"})).await;
            let mut login = json!({"do": "login", "user": user});
            match key {
                "forged" => {
                    login["key"] = json!(world.path("provisioner"));
                    login["forge"] = json!(true);
                }
                "password" | "keyboard-interactive" | "none" | "hostbased" | "frobnicate" => {
                    login["method"] = key.into();
                }
                key => login["key"] = json!(world.path(key)),
            }
            let mut seconds = f64::MAX;
            for _ in 0..3 {
                let answer = peer.ask(login.clone()).await;
                if answer["ok"] != false || answer["answers"] != json!([LOGIN_FAILURE]) {
                    faults.push(format!("{what}: {answer}"));
                    break;
                }
                seconds = seconds.min(answer["seconds"].as_f64().expect("seconds"));
            }
            // The other methods are refused without a look at anything.
            if world.path(key).exists() {
                fastest.push((seconds, what.to_owned(), login));
            }
            let seen = peer.ask(json!({"do": "seen"})).await;
            if seen["open"] != true {
                faults.push(format!("{what}: {seen}"));
            }
            peer.ask(json!({"do": "drop"})).await;
            let Some(reason) = reason else { continue };
            let refused = |it: &Value| it["event"] == "auth.refused" && it["client"] == from;
            let record = world.entry("gateway", |it| refused(it) && it["reason"] != "left_before_login").await;
            let key = key == "forged" || record["key"] == world.fingerprint(key);
            if record["reason"] != reason || !key {
                faults.push(format!("{what} is recorded as {record}"));
            }
        }
        faults.extend(world.told_apart_by_time(&mut peer, fastest).await);
        assert_eq!(faults, Vec::<String>::new());
        let mut honest = world.at_the_door().await;
        let forward = allowed(&world, &mut honest, true).await;
        honest.echoes(&forward).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_peer_is_told_of_a_bounded_number_of_keys_that_they_might_log_in() {
    limited(60, async {
        let mut world = World::linked().await;
        let mut peer = Peer::start();
        let from = peer.ask(json!({"do": "connect", "port": world.port})).await["local"].clone();
        peer.ask(json!({"do": "client"})).await;
        let login = json!({"do": "login", "user": "acme/prod-eu", "key": world.path("provisioner"), "forge": true});
        let answer = peer.ask(login).await;
        assert_eq!(answer["answers"], json!([LOGIN_FAILURE]), "{answer}");
        let line = world.public("provisioner");
        let blob = line.split(' ').nth(1).expect("a key");
        let fields = ["acme/prod-eu", "ssh-connection", "publickey"].map(string).concat();
        let asked = json!({"do": "probe", "request": format!("32{fields}00"), "kind": "ssh-ed25519", "blob": blob});
        // The first was asked about with the login.
        for number in 1..=limits::LOGIN_PROBES {
            let answer = peer.ask(asked.clone()).await;
            let expected = if number < limits::LOGIN_PROBES { 60 } else { 51 };
            assert_eq!(answer["message"], expected, "{number}: {answer}");
        }
        peer.ask(json!({"do": "drop"})).await;
        let record = world.entry("gateway", |it| it["event"] == "auth.refused" && it["client"] == from).await;
        assert_eq!(record["reason"], "too_many_probes", "{record}");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_is_not_linked_looks_like_a_target_that_is_away() {
    limited(60, async {
        let mut world = World::linked().await;
        let mut peer = Peer::start();
        peer.ask(json!({"do": "connect", "port": world.port})).await;
        peer.ask(json!({"do": "client"})).await;
        let login = peer.ask(json!({"do": "login", "user": "acme/prod-us", "key": world.path("provisioner")})).await;
        assert_eq!(login["ok"], true, "{login}");
        // The gateway waits a while for the agent to come.
        let open = json!({"do": "open", "type": "direct-tcpip", "host": "127.0.0.1", "port": world.echo, "within": 30});
        let answer = peer.ask(open).await;
        assert_eq!((&answer["message"], &answer["text"]), (&json!(92), &json!("not available")), "{answer}");
        let not_there = |it: &Value| it["event"] == "forward.failed" && it["agent"] == "prod-us";
        world.entry("gateway", not_there).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_rsa_key_logs_in_with_sha2_alone() {
    limited(60, async {
        let mut world = World::new().await;
        for (name, bits) in [("rsa", "3072"), ("rsa-weak", "2048")] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "rsa", "-b", bits, "-N", "", "-f"])
                .arg(world.path(name))
                .status();
            assert!(made.await.expect("ssh-keygen runs").success());
        }
        let public = world.path("keys/organisations/acme/principals/provisioner/rsa.pub");
        fs::copy(world.path("rsa.pub"), public).expect("registered");
        world.start_gateway().await;
        let mut peer = Peer::start();
        let mut login = json!({"do": "login", "user": "acme/prod-eu"});
        for (key, algorithm, reason) in [("rsa", "ssh-rsa", "sha1_signature"), ("rsa-weak", "rsa-sha2-512", "weak_key")]
        {
            let from = peer.ask(json!({"do": "connect", "port": world.port})).await["local"].clone();
            peer.ask(json!({"do": "client"})).await;
            (login["key"], login["algorithm"]) = (json!(world.path(key)), algorithm.into());
            let answer = peer.ask(login.clone()).await;
            assert_eq!((&answer["ok"], &answer["answers"]), (&json!(false), &json!([LOGIN_FAILURE])), "{reason}");
            peer.ask(json!({"do": "drop"})).await;
            let record = world.entry("gateway", |it| it["event"] == "auth.refused" && it["client"] == from).await;
            assert_eq!(record["reason"], reason, "{record}");
        }
        login["key"] = json!(world.path("rsa"));
        for algorithm in ["rsa-sha2-256", "rsa-sha2-512"] {
            peer.ask(json!({"do": "connect", "port": world.port})).await;
            peer.ask(json!({"do": "client"})).await;
            login["algorithm"] = algorithm.into();
            let answer = peer.ask(login.clone()).await;
            assert_eq!(answer["ok"], true, "{algorithm}: {answer}");
        }
        world.assert_well();
    })
    .await;
}

// ---------------------------------------------------------------------------------------------------------------------
// In the place of an agent.

/// What an agent calls itself.
const AGENT_LINE: &str = "SSH-2.0-caponier_1 agent=acme/prod-eu/x";

impl World {
    /// A gateway alone.
    async fn with_gateway() -> Self {
        let mut world = Self::new().await;
        world.start_gateway().await;
        world
    }

    /// Plays an agent as far as a link that is up; returns the control channel's number.
    async fn link(&self, peer: &mut Peer) -> Value {
        let ups = || self.trail("gateway").iter().filter(|it| it["event"] == "link.up").count();
        let before = ups();
        peer.ask(json!({"do": "connect", "port": self.port})).await;
        let server = json!({"do": "server", "identification": AGENT_LINE, "key": self.path("agent")});
        let login = peer.ask(server).await;
        let logins = json!([{"user": "acme", "key": self.public("login-acme")}]);
        assert_eq!(login["logins"], logins, "the gateway logs in with its key for this organisation: {login}");
        let session = peer.ask(json!({"do": "next", "messages": [90]})).await;
        assert_eq!(session["type"], "session", "{session}");
        let control = peer.ask(json!({"do": "accept_channel", "sender": session["sender"]})).await["id"].clone();
        let request = peer.ask(json!({"do": "next", "messages": [98]})).await;
        assert_eq!(request["name"], "subsystem", "{request}");
        assert_eq!(request["rest"], string("control@caponier"), "{request}");
        peer.ask(json!({"do": "reply", "id": control})).await;
        let hello = b"{\"version\":\"0.1.0\",\"features\":[\"credit\"],\"channels\":4096,\"replica\":\"x\"}";
        let length = u32::try_from(hello.len() + 2).expect("a length");
        let message = [&length.to_be_bytes()[..], &[0, 1], hello].concat();
        peer.ask(json!({"do": "send", "id": control, "hex": hex(&message)})).await;
        let theirs = peer.ask(json!({"do": "receive", "id": control, "bytes_": 6})).await;
        assert_eq!(theirs["data"].as_str().map(|it| &it[8..]), Some("0001"), "a hello: {theirs}");
        until("the link is up", SOON, || (ups() > before).then_some(())).await;
        control
    }

    /// An honest client's request, as it arrives at the agent that `peer` plays: (the client's channel, what arrived).
    async fn asked(&self, client: &mut Peer, peer: &mut Peer) -> (Value, Value) {
        let open = json!({"do": "open", "type": "direct-tcpip", "host": "10.0.0.1", "port": 5432, "answer": false});
        let channel = client.ask(open).await["id"].clone();
        let asked = peer.ask(json!({"do": "next", "messages": [90]})).await;
        assert_eq!((&asked["type"], &asked["host"]), (&json!("direct-tcpip"), &json!("10.0.0.1")), "{asked}");
        (channel, asked)
    }

    /// The same, and the agent opens it: (the client's channel, the agent's).
    async fn spliced(&self, client: &mut Peer, peer: &mut Peer) -> (Value, Value) {
        let (channel, asked) = self.asked(client, peer).await;
        let there = peer.ask(json!({"do": "accept_channel", "sender": asked["sender"]})).await["id"].clone();
        let opened = client.ask(json!({"do": "opened", "id": channel})).await;
        assert_eq!(opened["message"], 91, "{opened}");
        (channel, there)
    }

    /// A forward works from end to end over the link that `peer` plays.
    async fn link_works(&self, client: &mut Peer, peer: &mut Peer) {
        let (here, there) = self.spliced(client, peer).await;
        for (from, from_id, to, to_id) in [(&mut *client, &here, &mut *peer, &there)] {
            from.ask(json!({"do": "send", "id": from_id, "hex": "c0ffee"})).await;
            let got = to.ask(json!({"do": "receive", "id": to_id, "bytes_": 3})).await;
            assert_eq!(got["data"], "c0ffee", "{got}");
            to.ask(json!({"do": "send", "id": to_id, "hex": "decade"})).await;
            let got = from.ask(json!({"do": "receive", "id": from_id, "bytes_": 3})).await;
            assert_eq!(got["data"], "decade", "{got}");
        }
        client.ask(json!({"do": "close", "id": here})).await;
    }

    /// The gateway's resident memory, in KiB.
    fn resident(&self) -> u64 {
        let id = self.gateway.as_ref().and_then(|it| it.child.id()).expect("running");
        let status = fs::read_to_string(format!("/proc/{id}/status")).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }
}

/// Whether a record of a forward is its end.
fn is_ending(record: &Value) -> bool {
    record["event"] != "forward.open" && record["event"] != "forward.attempt"
}

/// The forward's id in what the gateway asked of an agent.
fn forward_id(asked: &Value) -> String {
    asked["originator"].as_str().and_then(|it| it.split(':').nth(1)).expect("an originator of ours").to_owned()
}

#[tokio::test]
async fn an_agent_opens_nothing_toward_the_gateway() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        world.link(&mut peer).await;
        let mut client = world.at_the_door().await;
        let socket = string("/run/caponier/gateway.sock");
        let pair = format!("{}{:08x}{}{:08x}", string("127.0.0.1"), world.echo, string("127.0.0.1"), 1);
        let mut channels = foreign_channels(&world);
        channels.push(("session", String::new()));
        channels.push(("direct-tcpip", pair));
        channels.push(("direct-streamlocal@openssh.com", format!("{socket}{}{:08x}", string(""), 0)));
        let mut faults = Vec::new();
        for (count, (kind, body)) in channels.iter().enumerate() {
            let answer = peer.ask(json!({"do": "open", "type": kind, "rest": body})).await;
            if answer["message"] != 92 {
                faults.push(format!("channel {kind:?}: {answer}"));
            }
            if answer["open"] == false {
                world.link(&mut peer).await;
            }
            let violations = || world.trail("gateway").iter().filter(|it| it["event"] == "peer.violation").count();
            let recorded = timeout(SOON, async {
                while violations() <= count {
                    sleep(Duration::from_millis(10)).await;
                }
            });
            if recorded.await.is_err() {
                faults.push(format!("channel {kind:?}: no record of it, {} in all", violations()));
            }
        }
        for (name, body) in global_requests(&world) {
            let answer = peer.ask(json!({"do": "global", "name": name, "rest": body})).await;
            if answer["message"] != 82 {
                faults.push(format!("global request {name:?}: {answer}"));
            }
        }
        world.link_works(&mut client, &mut peer).await;
        for record in world.trail("gateway").iter().filter(|it| it["event"] == "peer.violation") {
            let whose = record["organisation"] == "acme" && record["agent"] == "prod-eu";
            if !whose || record["reason"] != "opened_channel" {
                faults.push(format!("not whose it was, or not what it was: {record}"));
            }
        }
        assert_eq!(faults, Vec::<String>::new());
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agents_requests_on_its_channels_do_nothing() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        let control = world.link(&mut peer).await;
        let mut client = world.at_the_door().await;
        let (here, there) = world.spliced(&mut client, &mut peer).await;
        let mut faults = Vec::new();
        for id in [&there, &control] {
            for (name, body) in channel_requests(&world) {
                let request = json!({"do": "request", "id": id, "name": name, "rest": body, "within": 3});
                let answer = peer.ask(request).await;
                // RFC 4254 §6.8: xon-xoff is never answered.
                if answer["message"] != 100 && name != "xon-xoff" {
                    faults.push(format!("{name:?} on channel {id}: {answer}"));
                }
            }
        }
        peer.ask(json!({"do": "send", "id": there, "hex": "beef"})).await;
        let got = client.ask(json!({"do": "receive", "id": here, "bytes_": 2})).await;
        assert_eq!(got["data"], "beef", "{got}");
        assert_eq!(faults, Vec::<String>::new());
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agents_key_counts_for_its_own_name_alone() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let certified = Command::new("ssh-keygen")
            .args(["-q", "-h", "-I", "agent", "-n", "prod-eu", "-s"])
            .arg(world.path("login-acme"))
            .arg(world.path("keys/organisations/acme/agents/prod-eu/key.pub"))
            .status();
        assert!(certified.await.expect("ssh-keygen runs").success());
        let made = world.path("keys/organisations/acme/agents/prod-eu/key-cert.pub");
        let certificate = world.path("certificate");
        fs::rename(made, &certificate).expect("the certificate");
        let line = |name: &str| format!("SSH-2.0-caponier_1 agent={name}");
        let cases = [
            ("an unregistered key", line("acme/prod-eu/x"), "stranger", Some("unknown_key"), false),
            ("another agent's key", line("acme/prod-eu/x"), "agent-us", None, false),
            ("another agent's name", line("acme/prod-us/x"), "agent", None, false),
            ("another organisation's key", line("acme/prod-eu/x"), "agent-globex", Some("other_organisation"), false),
            ("another organisation's name", line("globex/prod-eu/x"), "agent", Some("other_organisation"), false),
            ("a revoked key", line("acme/prod-old/x"), "agent-revoked", Some("revoked"), false),
            ("a principal's key", line("acme/prod-eu/x"), "provisioner", None, false),
            ("the gateway's key", line("acme/prod-eu/x"), "gateway", Some("unknown_key"), false),
            ("an unknown agent", line("acme/nowhere"), "agent", None, false),
            ("an unknown organisation", line("initech/prod-eu"), "agent", None, false),
            ("a certificate", line("acme/prod-eu/x"), "agent", None, true),
            ("a certificate that looks like a key", line("acme/prod-eu/x"), "agent", None, true),
        ];
        let mut faults = Vec::new();
        let mut peer = Peer::start();
        for (what, identification, key, reason, certified) in cases {
            let from = peer.ask(json!({"do": "connect", "port": world.port})).await["local"].clone();
            let mut server = json!({"do": "server", "identification": identification, "key": world.path(key)});
            if certified {
                server["certificate"] = json!(certificate);
                server["disguise"] = what.contains("looks").into();
            }
            let login = peer.ask(server).await;
            if login["logins"] != json!([]) || login["open"] != false {
                faults.push(format!("{what}: {login}"));
            }
            let refused = |it: &Value| it["event"] == "auth.refused" && it["client"] == from;
            let record = world.entry("gateway", refused).await;
            if reason.is_some_and(|reason| record["reason"] != reason) {
                faults.push(format!("{what} is recorded as {record}"));
            }
        }
        assert_eq!(faults, Vec::<String>::new());
        assert!(!world.trail("gateway").iter().any(|it| it["event"] == "link.up"));
        world.link(&mut peer).await;
        world.assert_well();
    })
    .await;
}

/// What is taken out of the first exchange can go unnoticed without it (CVE-2023-48795).
#[tokio::test]
async fn an_agent_without_strict_key_exchange_gets_no_login() {
    limited(60, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        let from = peer.ask(json!({"do": "connect", "port": world.port})).await["local"].clone();
        let server = json!({"do": "server", "identification": AGENT_LINE, "key": world.path("agent"), "strict": false});
        let login = peer.ask(server).await;
        assert_eq!((&login["logins"], &login["open"]), (&json!([]), &json!(false)), "{login}");
        let record = world.entry("gateway", |it| it["event"] == "auth.refused" && it["client"] == from).await;
        let detail = record["detail"].as_str().unwrap_or_default();
        assert!(record["reason"] == "handshake" && detail.contains("strict key exchange"), "{record}");
        // The same with it is a link.
        world.link(&mut peer).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_refuses_the_login_gets_no_other() {
    limited(60, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        peer.ask(json!({"do": "connect", "port": world.port})).await;
        let server = json!({"do": "server", "identification": AGENT_LINE, "key": world.path("agent"), "admit": false});
        let login = peer.ask(server).await;
        assert_eq!(login["logins"].as_array().map(Vec::len), Some(1), "{login}");
        let end = peer.ask(json!({"do": "closed"})).await;
        assert_eq!(end["closed"], true, "{end}");
        let tried = peer.ask(json!({"do": "seen"})).await["seen"].as_array().expect("messages").clone();
        let logins = tried.iter().filter(|it| **it == json!(50)).count();
        assert!(logins <= 2, "{tried:?}");
        assert!(!world.trail("gateway").iter().any(|it| it["event"] == "link.up"));
        world.link(&mut peer).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_floods_a_forward_fills_no_memory() {
    limited(150, async {
        for (heed, extended) in [(false, false), (false, true), (true, false)] {
            let mut world = World::with_gateway().await;
            let mut peer = Peer::start();
            world.link(&mut peer).await;
            // The client of this forward reads nothing.
            let mut idle = world.at_the_door().await;
            let (_, there) = world.spliced(&mut idle, &mut peer).await;
            let before = world.resident();
            let flood = json!({"do": "flood", "id": there, "bytes_": 100 << 20, "heed": heed, "extended": extended,
                "within": 8});
            let flooded = peer.ask(flood).await;
            let grown = world.resident().saturating_sub(before);
            // Whoever does not heed its credit is cut as soon as that is spent.
            let least = if heed || extended { 1 << 20 } else { 16 << 10 };
            assert!(flooded["sent"].as_u64() > Some(least), "{flooded}");
            assert!(grown < 64 * 1024, "{grown} KiB more, heeding window and credit: {heed}: {flooded}");
            if heed {
                assert_eq!(flooded["open"], true, "{flooded}");
            } else if !extended {
                // More than its credit is a breach of protocol, which ends the link and is on record.
                let end = peer.ask(json!({"do": "closed"})).await;
                assert_eq!(end["closed"], true, "{flooded} {end}");
                let down = world.entry("gateway", |it| it["event"] == "link.down").await;
                assert!(down["reason"].is_string(), "{down}");
            }
            // Its other links, and other forwards on them, are not its victims.
            let mut other = Peer::start();
            peer.ask(json!({"do": "drop"})).await;
            until("the link is down", SOON, || {
                world.trail("gateway").iter().any(|it| it["event"] == "link.down").then_some(())
            })
            .await;
            world.link(&mut other).await;
            let mut client = world.at_the_door().await;
            world.link_works(&mut client, &mut other).await;
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn credit_that_makes_no_sense_fills_no_memory() {
    limited(120, async {
        // How much, how often, and the window that goes with it.
        for (amount, times, window) in [(u32::MAX, 100, 0), (u32::MAX, 100, u32::MAX), (0, 10_000, 0), (1, 10_000, 0)] {
            let mut world = World::with_gateway().await;
            let mut peer = Peer::start();
            world.link(&mut peer).await;
            let mut client = world.at_the_door().await;
            let (channel, asked) = world.asked(&mut client, &mut peer).await;
            let accept = json!({"do": "accept_channel", "sender": asked["sender"], "window": window});
            let there = peer.ask(accept).await["id"].clone();
            let opened = client.ask(json!({"do": "opened", "id": channel})).await;
            assert_eq!(opened["message"], 91, "{opened}");
            let before = world.resident();
            peer.try_ask(json!({"do": "credit", "id": there, "amount": amount, "times": times})).await;
            let flood = json!({"do": "flood", "id": channel, "bytes_": 100 << 20, "heed": true, "within": 4});
            let flooded = client.ask(flood).await;
            let grown = world.resident().saturating_sub(before);
            assert!(grown < 80 * 1024, "{grown} KiB more for {times} times {amount}: {flooded}");
            peer.ask(json!({"do": "drop"})).await;
            until("the link is down", SOON, || {
                world.trail("gateway").iter().any(|it| it["event"] == "link.down").then_some(())
            })
            .await;
            let mut other = Peer::start();
            world.link(&mut other).await;
            let mut client = world.at_the_door().await;
            world.link_works(&mut client, &mut other).await;
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn credit_that_is_none_costs_the_link_at_most() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let mut client = world.at_the_door().await;
        for body in ["", "00", "000000", "0000000000", "ffffffffffffffff"] {
            let mut peer = Peer::start();
            world.link(&mut peer).await;
            let (channel, asked) = world.asked(&mut client, &mut peer).await;
            peer.ask(json!({"do": "accept_channel", "sender": asked["sender"]})).await;
            let opened = client.ask(json!({"do": "opened", "id": channel})).await;
            assert_eq!(opened["message"], 91, "{opened}");
            let theirs = asked["sender"].as_u64().expect("a number");
            let message = format!("5f{theirs:08x}fe000001{:08x}{body}", body.len() / 2);
            peer.try_ask(json!({"do": "raw", "hex": message})).await;
            let end = peer.ask(json!({"do": "closed", "within": 1})).await;
            if end["closed"] != true {
                world.link_works(&mut client, &mut peer).await;
            }
            peer.ask(json!({"do": "drop"})).await;
            let ups = |event: &str| world.trail("gateway").iter().filter(|it| it["event"] == event).count();
            until("the link is down", SOON, || (ups("link.down") == ups("link.up")).then_some(())).await;
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn a_stock_client_that_sends_too_much_costs_its_own_session_at_most() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let mut agent = Peer::start();
        world.link(&mut agent).await;
        let mut bystander = world.at_the_door().await;
        let mut peer = world.at_the_door().await;
        // An agent that gives no window: nothing of it can be passed on.
        let (channel, asked) = world.asked(&mut peer, &mut agent).await;
        let accept = json!({"do": "accept_channel", "sender": asked["sender"], "window": 0});
        agent.ask(accept).await;
        let opened = peer.ask(json!({"do": "opened", "id": channel})).await;
        assert_eq!(opened["message"], 91, "{opened}");
        let before = world.resident();
        let flooded = peer.ask(json!({"do": "flood", "id": channel, "bytes_": 200 << 20, "within": 8})).await;
        let grown = world.resident().saturating_sub(before);
        assert!(flooded["sent"].as_u64() > Some(1 << 20), "{flooded}");
        assert!(grown < 96 * 1024, "{grown} KiB more: {flooded}");
        let works = timeout(SOON, world.link_works(&mut bystander, &mut agent)).await;
        assert!(works.is_ok(), "another client on this link is held up: {flooded}");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_holds_up_no_other() {
    limited(60, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        world.link(&mut peer).await;
        let mut idle = world.at_the_door().await;
        let (_, there) = world.spliced(&mut idle, &mut peer).await;
        let flood = json!({"do": "flood", "id": there, "bytes_": 100 << 20, "heed": true, "within": 5});
        let flooded = peer.ask(flood).await;
        assert!(flooded["sent"].as_u64() > Some(1 << 20) && flooded["open"] == true, "{flooded}");
        let mut client = world.at_the_door().await;
        let worked = timeout(SOON, world.link_works(&mut client, &mut peer)).await;
        assert!(worked.is_ok(), "another client's forward on this link is stuck: {flooded}");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_closes_at_once_ends_its_forward() {
    limited(60, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        world.link(&mut peer).await;
        let mut client = world.at_the_door().await;
        for _ in 0..20 {
            let (channel, asked) = world.asked(&mut client, &mut peer).await;
            let there = peer.ask(json!({"do": "accept_channel", "sender": asked["sender"]})).await["id"].clone();
            peer.ask(json!({"do": "close", "id": there, "wait": false})).await;
            let opened = client.ask(json!({"do": "opened", "id": channel})).await;
            if opened["message"] == 91 {
                let end = client.ask(json!({"do": "receive", "id": channel, "bytes_": 1})).await;
                assert!(end["eof"] == true || end["closed"] == true, "{end}");
            } else {
                assert_eq!(opened["message"], 92, "{opened}");
            }
            let id = forward_id(&asked);
            world.entry("gateway", |it| it["forward"] == id && it["event"] != "forward.open").await;
        }
        world.link_works(&mut client, &mut peer).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_does_not_answer_is_not_available() {
    limited(90, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        world.link(&mut peer).await;
        let mut client = world.at_the_door().await;
        let began = Instant::now();
        let (channel, asked) = world.asked(&mut client, &mut peer).await;
        world.link_works(&mut client, &mut peer).await;
        let answer = client.ask(json!({"do": "opened", "id": channel, "within": 80})).await;
        let waited = began.elapsed();
        assert_eq!((&answer["message"], &answer["text"]), (&json!(92), &json!("not available")), "{answer}");
        let limit = limits::ANSWER_TIMEOUT;
        assert!(waited > limit - Duration::from_secs(1) && waited < limit + SOON, "{waited:?}");
        let id = forward_id(&asked);
        let record = world.entry("gateway", |it| it["forward"] == id && it["event"] == "forward.attempt").await;
        assert_eq!(record["reason"], "timeout", "{record}");
        let record = world.entry("gateway", |it| it["forward"] == id && is_ending(it)).await;
        assert_eq!(record["event"], "forward.failed", "{record}");
        // Too late, the agent opens it: nobody gets it.
        let late = peer.ask(json!({"do": "accept_channel", "sender": asked["sender"]})).await["id"].clone();
        let end = peer.ask(json!({"do": "receive", "id": late, "bytes_": 1, "within": 60})).await;
        assert!(end["closed"] == true || end["eof"] == true, "a late channel stays open: {end}");
        world.link_works(&mut client, &mut peer).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn garbage_on_the_control_channel_costs_the_link_at_most() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        for garbage in
            ["ffffffff", "00000000", "0000000100", "0000000400017b7b", "0001000100", "000000020001", "00000002ffff"]
        {
            let control = world.link(&mut peer).await;
            let before = world.trail("gateway").len();
            peer.ask(json!({"do": "send", "id": control, "hex": garbage})).await;
            let ended = peer.ask(json!({"do": "closed", "within": 2})).await;
            if ended["closed"] == true {
                let trail = || world.trail("gateway")[before..].to_vec();
                let down = || trail().iter().any(|it| it["event"] == "link.down").then_some(());
                until("the link's end is recorded", SOON, down).await;
            } else {
                let mut client = world.at_the_door().await;
                world.link_works(&mut client, &mut peer).await;
            }
            peer.ask(json!({"do": "drop"})).await;
        }
        world.link(&mut peer).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_tells_of_its_trail_without_end_is_cut_and_little_of_it_recorded() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        let before = world.trail("gateway").len();
        let control = world.link(&mut peer).await;
        let mut said = Vec::new();
        for number in 0..200_u8 {
            let digest = format!("{}{}{}", "B".repeat(40), char::from(b'A' + number % 26), "wc");
            let body = format!("{{\"trail\":\"{number:032x}\",\"anchor\":\"{digest}\"}}");
            let length = u32::try_from(body.len() + 2).expect("short");
            said.extend_from_slice(&[&length.to_be_bytes()[..], &[0, 6], body.as_bytes()].concat());
        }
        peer.ask(json!({"do": "send", "id": control, "hex": hex(&said)})).await;
        assert_eq!(peer.ask(json!({"do": "closed", "within": 30})).await["closed"], true);
        let down = world.entry("gateway", |it| it["event"] == "link.down").await;
        assert_eq!(down["reason"], "protocol_violation", "{down}");
        let trail = world.trail("gateway");
        let anchored = trail[before..].iter().filter(|it| it["event"] == "trail.anchored").count();
        assert!(anchored <= limits::ANCHORS_BURST as usize, "{anchored}");
        // It may come back.
        world.link(&mut peer).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agent_cannot_refuse_another_forward() {
    limited(60, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        world.link(&mut peer).await;
        let mut client = world.at_the_door().await;
        let (first, first_asked) = world.asked(&mut client, &mut peer).await;
        let (second, second_asked) = world.asked(&mut client, &mut peer).await;
        let lie = format!("{} port", forward_id(&second_asked));
        let refuse =
            json!({"do": "refuse_channel", "sender": first_asked["sender"], "code": 0xFE00_0001_u32, "text": lie});
        peer.ask(refuse).await;
        let answer = client.ask(json!({"do": "opened", "id": first})).await;
        assert_eq!(answer["message"], 92, "{answer}");
        let there = peer.ask(json!({"do": "accept_channel", "sender": second_asked["sender"]})).await["id"].clone();
        let opened = client.ask(json!({"do": "opened", "id": second})).await;
        assert_eq!(opened["message"], 91, "the other forward opens: {opened}");
        peer.ask(json!({"do": "send", "id": there, "hex": "c0ffee"})).await;
        let got = client.ask(json!({"do": "receive", "id": second, "bytes_": 3})).await;
        assert_eq!(got["data"], "c0ffee", "{got}");
        let id = forward_id(&first_asked);
        let record = world.entry("gateway", |it| it["forward"] == id && it["event"] != "forward.open").await;
        assert!(record["event"] == "forward.failed" || record["event"] == "forward.denied", "{record}");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn what_an_agent_says_in_a_refusal_reaches_nobody_raw() {
    limited(90, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        world.link(&mut peer).await;
        let mut client = world.at_the_door().await;
        let mut faults = Vec::new();
        let huge = "x".repeat(30_000);
        let cases: Vec<(&str, u32, Vec<u8>)> = vec![
            ("a huge description", 0xFE00_0001, format!("ID {huge}").into_bytes()),
            ("huge and without an id", 0xFE00_0001, huge.clone().into_bytes()),
            ("control characters", 0xFE00_0001, b"ID \x1b]0;owned\x07\x1b[2Jport\r\n{\"event\":\"forged\"}\n".to_vec()),
            ("C1 and bidirectional controls", 0xFE00_0001, "ID \u{9b}2J\u{202e}trop".as_bytes().to_vec()),
            ("control characters alone", 0xFE00_0003, b"\x1b[2J\x07\0\n".to_vec()),
            ("the id alone", 0xFE00_0001, b"ID".to_vec()),
            ("nothing", 0xFE00_0001, Vec::new()),
            ("an unknown code of ours", 0xFE00_00FF, b"ID port".to_vec()),
            ("a standard code", 1, b"ID port".to_vec()),
            ("code 0", 0, b"ID port".to_vec()),
            ("the largest code", u32::MAX, b"ID port".to_vec()),
        ];
        for (what, code, words) in cases {
            let (channel, asked) = world.asked(&mut client, &mut peer).await;
            let id = forward_id(&asked);
            let said = if let Some(rest) = words.strip_prefix(b"ID") { [id.as_bytes(), rest].concat() } else { words };
            peer.ask(json!({"do": "refuse_channel", "sender": asked["sender"], "code": code, "text_hex": hex(&said)}))
                .await;
            let answer = client.ask(json!({"do": "opened", "id": channel})).await;
            let text = answer["text"].as_str().unwrap_or_default();
            if answer["message"] != 92 || !["not allowed", "not available"].contains(&text) {
                faults.push(format!("{what}: {answer}"));
            }
            let ended = |it: &Value| it["forward"] == id && is_ending(it);
            let record = world.entry("gateway", ended).await;
            if record.to_string().len() > 2_000
                || !["forward.denied", "forward.failed"].contains(&record["event"].as_str().unwrap_or_default())
            {
                faults.push(format!("{what}: {record}"));
            }
        }
        // Not UTF-8: the session may end, and nothing else.
        let (channel, asked) = world.asked(&mut client, &mut peer).await;
        let said = json!({"do": "refuse_channel", "sender": asked["sender"], "code": 1, "text_hex": "fffe80"});
        peer.ask(said).await;
        // If the link is lost, the gateway waits a while for another.
        let answer = client.ask(json!({"do": "opened", "id": channel, "within": 60})).await;
        assert_eq!(answer["message"], 92, "{answer}");
        if peer.ask(json!({"do": "closed", "within": 1})).await["closed"] == true {
            world.link(&mut peer).await;
        }
        world.link_works(&mut client, &mut peer).await;
        assert_eq!(faults, Vec::<String>::new());
        world.assert_well();
    })
    .await;
}

// ---------------------------------------------------------------------------------------------------------------------
// Before the login.

/// Until a connection that does not log in must have ended, on a busy machine.
const GRACE: Duration = Duration::from_secs(limits::LOGIN_GRACE.as_secs() + 20);

/// Until a connection that is not worth waiting for has ended: before its grace is over.
const AT_ONCE: Duration = Duration::from_secs(limits::LOGIN_GRACE.as_secs() - 3);

/// A connection from an address of our choice.
async fn connect(from: &str, port: u16) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::new(from.parse().expect("an address"), 0)).expect("bound");
    let connected = socket.connect(SocketAddr::new("127.0.0.1".parse().expect("an address"), port));
    timeout(SOON, connected).await.expect("connected in time").expect("connected")
}

/// Reads until the other end hangs up; false where it does not in time.
async fn hangs_up(stream: &mut TcpStream, within: Duration) -> bool {
    let mut buffer = vec![0; 65_536];
    let ended = timeout(within, async { while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {} });
    ended.await.is_ok()
}

impl World {
    /// What of these refused logins is told apart by how long the refusal takes, of which each has the least so far.
    ///
    /// A busy machine delays many answers, but none of them always: whoever seems slow is asked again.
    async fn told_apart_by_time(&self, peer: &mut Peer, mut fastest: Vec<(f64, String, Value)>) -> Option<String> {
        for _ in 0..30 {
            fastest.sort_by(|one, other| one.0.total_cmp(&other.0));
            let (first, last) = (fastest[0].0, fastest[fastest.len() - 1].0);
            if first < limits::LOGIN_REFUSAL_DELAY.as_secs_f64() - 0.002 {
                break;
            }
            if last <= first + 0.04 {
                return None;
            }
            for (seconds, _, login) in fastest.iter_mut().filter(|it| it.0 > first + 0.04) {
                peer.ask(json!({"do": "connect", "port": self.port})).await;
                peer.ask(json!({"do": "client"})).await;
                for _ in 0..3 {
                    let answer = peer.ask(login.clone()).await;
                    *seconds = seconds.min(answer["seconds"].as_f64().expect("seconds"));
                }
                peer.ask(json!({"do": "drop"})).await;
            }
        }
        let told: Vec<_> = fastest.iter().map(|(seconds, what, _)| format!("{what}: {seconds} s")).collect();
        Some(format!("told apart by the time: {told:?}"))
    }
}

/// How many of the connections are still held by the other end, all seen at once.
async fn held(streams: &mut [TcpStream]) -> usize {
    let mut held = 0;
    for stream in streams {
        if !hangs_up(stream, Duration::from_millis(1)).await {
            held += 1;
        }
    }
    held
}

#[tokio::test]
async fn idle_connections_take_no_room_from_other_addresses() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let mut streams = Vec::new();
        for _ in 0..300 {
            let mut stream = connect("127.0.0.1", world.port).await;
            let _ = stream.write_all(b"SSH-2.0-idle\r\n").await;
            streams.push(stream);
        }
        let began = Instant::now();
        let per_address = limits::UNAUTHENTICATED_PER_ADDRESS;
        let settled = timeout(SOON, async {
            while held(&mut streams).await > per_address {
                sleep(Duration::from_millis(50)).await;
            }
        });
        assert!(settled.await.is_ok(), "{} connections are held", held(&mut streams).await);
        assert_eq!(held(&mut streams).await, per_address);
        // Someone else gets in while the place is taken.
        let mut peer = Peer::start();
        peer.ask(json!({"do": "connect", "port": world.port, "source": "127.0.0.2"})).await;
        peer.ask(json!({"do": "client"})).await;
        let login = peer.ask(json!({"do": "login", "user": "acme/prod-eu", "key": world.path("provisioner")})).await;
        assert_eq!(login["ok"], true, "{login}");
        assert!(began.elapsed() < limits::LOGIN_GRACE, "too slow to have shown anything");
        // And from here once they are over their grace.
        let ended = timeout(GRACE, async {
            while held(&mut streams).await > 0 {
                sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(ended.await.is_ok(), "{} connections outlived their grace", held(&mut streams).await);
        world.at_the_door().await;
        let records = world.trail("gateway").iter().filter(|it| it["event"] == "auth.refused").count();
        let budget = limits::STRANGER_RECORDS as usize * 4;
        assert!((1..budget).contains(&records), "{records} records of strangers in less than four periods");
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn idle_connections_from_many_addresses_end_at_the_gateways_limit() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let mut linked = Peer::start();
        world.link(&mut linked).await;
        let mut client = world.at_the_door().await;
        let mut streams = Vec::new();
        for host in 1..=6 {
            for _ in 0..limits::UNAUTHENTICATED_PER_ADDRESS {
                streams.push(connect(&format!("127.0.1.{host}"), world.port).await);
            }
        }
        let settled = timeout(SOON, async {
            while held(&mut streams).await > limits::UNAUTHENTICATED_MAX {
                sleep(Duration::from_millis(50)).await;
            }
        });
        assert!(settled.await.is_ok(), "{} connections are held", held(&mut streams).await);
        assert_eq!(held(&mut streams).await, limits::UNAUTHENTICATED_MAX);
        // Whoever is in already notices nothing.
        world.link_works(&mut client, &mut linked).await;
        let ended = timeout(GRACE, async {
            while held(&mut streams).await > 0 {
                sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(ended.await.is_ok(), "{} connections outlived their grace", held(&mut streams).await);
        world.at_the_door().await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_login_that_does_not_come_ends_with_its_grace() {
    limited(90, async {
        let mut world = World::linked().await;
        let mut starts: Vec<(&str, TcpStream)> = Vec::new();
        for (what, bytes) in [
            ("silence", &b""[..]),
            ("half an identification", b"SSH-2.0-ha"),
            ("a stock identification", b"SSH-2.0-OpenSSH_9.9\r\n"),
            ("a client of ours", b"SSH-2.0-caponier_1 client\r\n"),
            ("an agent", b"SSH-2.0-caponier_1 agent=acme/prod-eu/y\r\n"),
            ("half a packet", b"SSH-2.0-x\r\n\x00\x00\x04\x00\x08\x14"),
        ] {
            let mut stream = connect("127.0.0.1", world.port).await;
            stream.write_all(bytes).await.expect("sent");
            starts.push((what, stream));
        }
        let mut exchanged = Peer::start();
        exchanged.ask(json!({"do": "connect", "port": world.port})).await;
        assert_eq!(exchanged.ask(json!({"do": "client"})).await["exchanged"], true);
        let mut refused = Peer::start();
        refused.ask(json!({"do": "connect", "port": world.port})).await;
        refused.ask(json!({"do": "client"})).await;
        refused.ask(json!({"do": "login", "user": "acme/prod-eu", "key": world.path("stranger")})).await;
        let mut asked = Peer::start();
        asked.ask(json!({"do": "connect", "port": world.port})).await;
        asked.ask(json!({"do": "client"})).await;
        asked.ask(json!({"do": "service"})).await;
        // One that goes on and on, a byte a second.
        let mut dribble = connect("127.0.0.1", world.port).await;
        dribble.write_all(b"SSH-2.0-dribble").await.expect("sent");
        let began = Instant::now();
        let mut faults = Vec::new();
        while began.elapsed() < GRACE {
            if dribble.write_all(b"x").await.is_err() || hangs_up(&mut dribble, Duration::from_millis(500)).await {
                break;
            }
        }
        if began.elapsed() >= GRACE {
            faults.push("a byte at a time holds the connection".to_owned());
        }
        for (what, mut stream) in starts {
            let left = GRACE.saturating_sub(began.elapsed()).max(Duration::from_millis(100));
            if !hangs_up(&mut stream, left).await {
                faults.push(format!("{what} holds the connection"));
            }
        }
        for (what, mut peer) in
            [("a key exchange", exchanged), ("a request for the login", asked), ("a refused login", refused)]
        {
            let left = GRACE.saturating_sub(began.elapsed()).max(Duration::from_millis(100));
            let end = peer.ask(json!({"do": "closed", "within": left.as_secs_f64()})).await;
            if end["closed"] != true {
                faults.push(format!("{what} holds the connection: {end}"));
            }
        }
        assert_eq!(faults, Vec::<String>::new());
        let mut peer = world.at_the_door().await;
        let forward = allowed(&world, &mut peer, true).await;
        peer.echoes(&forward).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn an_agent_gives_up_on_a_gateway_that_does_not_log_in() {
    limited(120, async {
        for exchange in [false, true] {
            let mut peer = Peer::start();
            let mut world = World::dialled(&mut peer).await;
            let began = Instant::now();
            if exchange {
                peer.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
                let end = peer.ask(json!({"do": "closed", "within": GRACE.as_secs()})).await;
                assert_eq!(end["closed"], true, "{end}");
            }
            // It dials again, so it has let go of the first.
            peer.ask(json!({"do": "accept", "within": GRACE.as_secs() + 20})).await;
            assert!(began.elapsed() < GRACE + GRACE);
            world.log_in_to_agent(&mut peer).await;
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_no_identification_ends_at_once() {
    limited(90, async {
        let mut world = World::linked().await;
        let endless = vec![b'x'; 1 << 20];
        let long = format!("SSH-2.0-{}\r\n", "x".repeat(300));
        let lines_before = "hello\r\n".repeat(50) + "SSH-2.0-x\r\n";
        let cases: Vec<(&str, &[u8])> = vec![
            ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n"),
            ("an empty line", b"\r\n"),
            ("line feeds", b"\n\n\n\n\n\n\n\n"),
            ("a line before", b"hello\r\nSSH-2.0-x\r\n"),
            ("many lines before", lines_before.as_bytes()),
            ("version 1", b"SSH-1.5-x\r\n"),
            ("version 1.99", b"SSH-1.99-x\r\n"),
            ("version 3", b"SSH-3.0-x\r\n"),
            ("a long line", long.as_bytes()),
            ("no end", &endless),
            ("NUL", b"SSH-2.0-x\0y\r\n"),
            ("an escape sequence", b"SSH-2.0-\x1b[2J\r\n"),
            ("a high byte", b"SSH-2.0-\xff\r\n"),
            ("a carriage return inside", b"SSH-2.0-a\rb\r\n"),
            ("a later version of ours", b"SSH-2.0-caponier_2 client\r\n"),
            ("no version of ours", b"SSH-2.0-caponier_ client\r\n"),
            ("a large version of ours", b"SSH-2.0-caponier_99999999999999999999 client\r\n"),
            ("an unknown kind", b"SSH-2.0-caponier_1 gateway\r\n"),
            ("an agent without a name", b"SSH-2.0-caponier_1 agent=\r\n"),
            ("an agent with a path", b"SSH-2.0-caponier_1 agent=../../etc\r\n"),
            ("an agent with four parts", b"SSH-2.0-caponier_1 agent=a/b/c/d\r\n"),
        ];
        let mut faults = Vec::new();
        for (what, bytes) in cases {
            let mut stream = connect("127.0.0.1", world.port).await;
            let from = stream.local_addr().expect("its address").to_string();
            let sent = timeout(SOON, stream.write_all(bytes)).await;
            assert!(sent.is_ok(), "{what}: the gateway takes nothing and does not hang up");
            if !hangs_up(&mut stream, AT_ONCE).await {
                faults.push(format!("{what} holds the connection"));
            }
            let refused = |it: &Value| it["event"] == "auth.refused" && it["client"] == from;
            let record = world.entry("gateway", refused).await;
            if !record["reason"].is_string() {
                faults.push(format!("{what}: {record}"));
            }
        }
        assert_eq!(faults, Vec::<String>::new());
        let mut peer = world.at_the_door().await;
        let forward = allowed(&world, &mut peer, true).await;
        peer.echoes(&forward).await;
        world.assert_well();
    })
    .await;
}

/// Packets that are none, as they follow an identification.
fn broken_packets() -> Vec<(&'static str, Vec<u8>)> {
    let kexinit = |lists: &[u8]| {
        let mut payload = vec![20];
        payload.extend([7; 16]);
        payload.extend_from_slice(lists);
        let padding = 8 - (payload.len() + 5) % 8 + 8;
        let length = u32::try_from(payload.len() + 1 + padding).expect("a length");
        let mut packet = length.to_be_bytes().to_vec();
        packet.push(u8::try_from(padding).expect("a length"));
        packet.extend(payload);
        packet.extend(vec![0; padding]);
        packet
    };
    vec![
        ("the longest packet", [&[0xff; 4][..], &[0x41; 65_536]].concat()),
        ("2 GiB", [&[0x7f, 0xff, 0xff, 0xf8][..], &[0x41; 65_536]].concat()),
        ("256 MiB", [&[0x10, 0, 0, 4][..], &[0x41; 65_536]].concat()),
        ("no length", vec![0; 64]),
        ("a length of one", vec![0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("padding over the packet", [&[0, 0, 0, 12, 255][..], &[20; 59]].concat()),
        ("no block", [&[0, 0, 0, 13, 4][..], &[20; 59]].concat()),
        ("random bytes", (0..4096_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()),
        ("an empty KEXINIT", kexinit(&[])),
        ("a KEXINIT with a list of 4 GiB", kexinit(&[0xff, 0xff, 0xff, 0xff, 0x41])),
        ("a KEXINIT with empty lists", kexinit(&[0; 45])),
        ("a KEXINIT that is not text", kexinit(&[&[0, 0, 0, 4, 0xff, 0xfe, 0, 0x80][..], &[0; 41]].concat())),
        ("a login at once", kexinit(&[0; 45]).into_iter().map(|byte| if byte == 20 { 50 } else { byte }).collect()),
    ]
}

#[tokio::test]
async fn broken_packets_end_their_connection_and_nothing_else() {
    limited(120, async {
        let mut world = World::linked().await;
        let mut bystander = world.at_the_door().await;
        let forward = allowed(&world, &mut bystander, true).await;
        let before = world.resident();
        let mut faults = Vec::new();
        for line in ["SSH-2.0-x", "SSH-2.0-caponier_1 client", "SSH-2.0-caponier_1 agent=acme/prod-eu/z"] {
            for (what, packet) in broken_packets() {
                let mut stream = connect("127.0.0.1", world.port).await;
                stream.write_all(format!("{line}\r\n").as_bytes()).await.expect("sent");
                let _ = timeout(SOON, stream.write_all(&packet)).await.expect("taken, or hung up");
                // What may still become a packet waits for the rest until the grace is over.
                let _ = stream.shutdown().await;
                if !hangs_up(&mut stream, AT_ONCE).await {
                    faults.push(format!("{line}: {what} holds the connection"));
                }
            }
        }
        let grown = world.resident().saturating_sub(before);
        assert!(grown < 64 * 1024, "{grown} KiB more");
        bystander.echoes(&forward).await;
        assert_eq!(faults, Vec::<String>::new());
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn broken_packets_from_a_gateway_do_not_end_the_agent() {
    limited(120, async {
        let mut world = World::new().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a gateway");
        world.port = listener.local_addr().expect("its address").port();
        world.start_agent(&format!("ssh://127.0.0.1:{}", world.port), "asserts = [\"provisioner\"]\n", "");
        // Few, because the agent waits longer each time.
        for (what, packet) in broken_packets().into_iter().filter(|it| it.0.contains("KEXINIT") || it.0 == "2 GiB") {
            let (mut stream, _) = timeout(SOON, listener.accept()).await.expect(what).expect(what);
            let _ = stream.write_all(format!("{GATEWAY_LINE}\r\n").as_bytes()).await;
            let _ = stream.write_all(&packet).await;
            let _ = stream.shutdown().await;
            assert!(hangs_up(&mut stream, AT_ONCE).await, "{what}");
        }
        world.assert_well();
    })
    .await;
}

/// Offers that are not acceptable; the last field says whether an exchange over AES-GCM may come of it all the same.
fn weak_offers() -> Vec<(&'static str, Value, bool)> {
    vec![
        ("DH group 14 with SHA-2", json!({"kex": ["diffie-hellman-group14-sha256"]}), false),
        ("DH group 14 with SHA-1", json!({"kex": ["diffie-hellman-group14-sha1"]}), false),
        ("DH group 1", json!({"kex": ["diffie-hellman-group1-sha1"]}), false),
        ("DH group exchange", json!({"kex": ["diffie-hellman-group-exchange-sha256"]}), false),
        ("NIST curves", json!({"kex": ["ecdh-sha2-nistp256"]}), false),
        ("no key exchange", json!({"kex": ["none"]}), false),
        ("chacha20-poly1305", json!({"ciphers": ["chacha20-poly1305@openssh.com"]}), false),
        ("counter mode", json!({"ciphers": ["aes128-ctr", "aes256-ctr"]}), false),
        ("chained mode", json!({"ciphers": ["aes128-cbc", "3des-cbc"]}), false),
        ("no cipher", json!({"ciphers": ["none"]}), false),
        ("HMAC with SHA-1", json!({"ciphers": ["aes128-ctr"], "macs": ["hmac-sha1"]}), false),
        // AES-GCM has no MAC to agree on (RFC 5647 §5.1).
        ("HMAC with SHA-1 beside AES-GCM", json!({"macs": ["hmac-sha1"]}), true),
        ("compression", json!({"compression": ["zlib@openssh.com", "zlib"]}), false),
        ("SHA-1 signatures", json!({"keys": ["ssh-rsa"]}), false),
        ("DSA", json!({"keys": ["ssh-dss"]}), false),
    ]
}

#[tokio::test]
async fn weak_offers_come_to_no_exchange_at_the_door() {
    limited(120, async {
        let mut world = World::linked().await;
        let mut peer = Peer::start();
        let mut faults = Vec::new();
        for (what, mut offer, may) in weak_offers() {
            let from = peer.ask(json!({"do": "connect", "port": world.port})).await["local"].clone();
            offer["do"] = "client".into();
            offer["within"] = AT_ONCE.as_secs().into();
            let answer = peer.ask(offer).await;
            if answer["exchanged"] == true {
                let gcm = answer["cipher"].as_str().is_some_and(|it| it.ends_with("-gcm@openssh.com"));
                if !may || !gcm {
                    faults.push(format!("{what}: {answer}"));
                }
                continue;
            }
            if answer["seconds"].as_f64() > Some(AT_ONCE.as_secs_f64() - 1.0) {
                faults.push(format!("{what} is left waiting: {answer}"));
            }
            let refused = |it: &Value| it["event"] == "auth.refused" && it["client"] == from;
            world.entry("gateway", refused).await;
        }
        assert_eq!(faults, Vec::<String>::new());
        world.enter(&mut peer).await;
        let forward = allowed(&world, &mut peer, true).await;
        peer.echoes(&forward).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn weak_offers_of_an_agent_come_to_no_link() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let mut peer = Peer::start();
        let mut faults = Vec::new();
        for (what, mut offer, may) in weak_offers() {
            // paramiko as a server needs a key of the kind it offers, and groups for the exchange of groups.
            if offer.get("keys").is_some() || what == "DH group exchange" {
                continue;
            }
            peer.ask(json!({"do": "connect", "port": world.port})).await;
            offer["do"] = "server".into();
            offer["within"] = AT_ONCE.as_secs().into();
            offer["identification"] = AGENT_LINE.into();
            offer["key"] = json!(world.path("agent"));
            let answer = peer.ask(offer).await;
            if !may && (answer["exchanged"] == true || answer["open"] == true) {
                faults.push(format!("{what}: {answer}"));
            }
        }
        assert_eq!(faults, Vec::<String>::new());
        world.link(&mut peer).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn weak_offers_of_a_gateway_come_to_no_exchange_with_an_agent() {
    limited(150, async {
        let mut peer = Peer::start();
        let mut world = World::new().await;
        let listening = peer.ask(json!({"do": "listen"})).await;
        world.port = u16::try_from(listening["port"].as_u64().expect("a port")).expect("a port");
        world.start_agent(&format!("ssh://127.0.0.1:{}", world.port), "asserts = [\"provisioner\"]\n", "");
        let mut faults = Vec::new();
        // Few, because the agent waits longer each time.
        let few = ["DH group 14 with SHA-2", "chacha20-poly1305", "compression", "SHA-1 signatures"];
        for (what, mut offer, _) in weak_offers().into_iter().filter(|it| few.contains(&it.0)) {
            peer.ask(json!({"do": "accept", "within": 60})).await;
            offer["do"] = "client".into();
            offer["within"] = AT_ONCE.as_secs().into();
            offer["identification"] = GATEWAY_LINE.into();
            let answer = peer.ask(offer).await;
            if answer["exchanged"] == true || answer["seconds"].as_f64() > Some(AT_ONCE.as_secs_f64() - 1.0) {
                faults.push(format!("{what}: {answer}"));
            }
        }
        assert_eq!(faults, Vec::<String>::new());
        peer.ask(json!({"do": "accept", "within": 60})).await;
        world.log_in_to_agent(&mut peer).await;
        world.assert_well();
    })
    .await;
}

// ---------------------------------------------------------------------------------------------------------------------
// After the login.

/// Messages that make no sense, on a session with one open channel whose number at the other end is `theirs`; each with
/// how often it is sent.
fn oddities(theirs: u64) -> Vec<(&'static str, String, u32)> {
    let none = 0x7777_7777;
    let byte = |message: u8| format!("{message:02x}");
    vec![
        ("an unknown message", byte(192), 1),
        ("message 0", byte(0), 1),
        ("message 255", byte(255), 1),
        (
            "a login after the login",
            byte(50) + &string("acme/prod-eu") + &string("ssh-connection") + &string("none"),
            1,
        ),
        ("a success of its own", byte(52), 1),
        ("a service again", byte(5) + &string("ssh-userauth"), 1),
        ("an unknown service", byte(5) + &string("frobnicate"), 1),
        ("new keys without an exchange", byte(21), 1),
        ("an exchange that is none", byte(20), 1),
        ("an exchange's reply", byte(31) + &string("x") + &string("y") + &string("z"), 1),
        ("a message cut short", byte(90) + "0000", 1),
        ("a string of 4 GiB", byte(90) + "ffffffff", 1),
        ("a confirmation nobody asked for", format!("{}{none:08x}{:08x}{:08x}{:08x}", byte(91), 0, 1, 1), 1),
        ("a refusal nobody asked for", format!("{}{none:08x}{:08x}{}{}", byte(92), 1, string("no"), string("")), 1),
        ("room on no channel", format!("{}{none:08x}{:08x}", byte(93), 1), 1),
        ("data on no channel", format!("{}{none:08x}{}", byte(94), string("x")), 1),
        ("an end on no channel", format!("{}{none:08x}", byte(96)), 1),
        ("a close of no channel", format!("{}{none:08x}", byte(97)), 1),
        ("a request on no channel", format!("{}{none:08x}{}01", byte(98), string("shell")), 1),
        ("a confirmation again", format!("{}{theirs:08x}{:08x}{:08x}{:08x}", byte(91), 0, 1, 1), 1),
        ("a refusal of what is open", format!("{}{theirs:08x}{:08x}{}{}", byte(92), 1, string("no"), string("")), 1),
        ("more room than there is", format!("{}{theirs:08x}{:08x}", byte(93), u32::MAX), 3),
        ("extended data of an unknown kind", format!("{}{theirs:08x}{:08x}{}", byte(95), u32::MAX, string("x")), 1),
        ("ends again and again", format!("{}{theirs:08x}", byte(96)), 100),
        ("closes again and again", format!("{}{theirs:08x}", byte(97)), 100),
        ("success nobody asked for", byte(81), 100),
        ("a channel's success nobody asked for", format!("{}{theirs:08x}", byte(99)), 100),
        ("much to ignore", byte(2) + &string(&"x".repeat(1_000)), 5_000),
        ("much to debug", byte(4) + "01" + &string("x") + &string(""), 5_000),
        ("many keepalives", byte(80) + &string("keepalive@openssh.com") + "01", 5_000),
        ("many unknown channels", format!("{}{}{:08x}{:08x}{:08x}", byte(90), string("x"), 9, 9, 9), 2_000),
        ("a packet of 200 KiB", byte(2) + &string(&"x".repeat(200_000)), 1),
        ("a goodbye", format!("{}{:08x}{}{}", byte(1), 11, string("\u{1b}[2J bye"), string("")), 1),
    ]
}

#[tokio::test]
async fn messages_without_sense_at_the_door_cost_their_own_session_at_most() {
    limited(180, async {
        let mut world = World::linked().await;
        let mut bystander = world.at_the_door().await;
        let forward = allowed(&world, &mut bystander, true).await;
        let before = world.resident();
        let mut peer = Peer::start();
        for index in 0..oddities(0).len() {
            world.enter(&mut peer).await;
            let opened = allowed(&world, &mut peer, true).await;
            peer.echoes(&opened).await;
            let (what, hex, times) = oddities(opened["sender"].as_u64().expect("a number")).swap_remove(index);
            // An error here is the gateway's hanging up.
            peer.try_ask(json!({"do": "raw", "hex": hex, "times": times})).await;
            peer.ask(json!({"do": "next", "messages": [1], "within": 0.2})).await;
            let alive = timeout(SOON, bystander.echoes(&forward)).await;
            assert!(alive.is_ok(), "{what}: another session is held up");
            world.assert_well();
        }
        peer.ask(json!({"do": "drop"})).await;
        let grown = world.resident().saturating_sub(before);
        assert!(grown < 64 * 1024, "{grown} KiB more");
        // Every forward that was opened has its end.
        let left = || {
            let trail = world.trail("gateway");
            let of =
                |events: &[&str]| trail.iter().filter(|it| events.iter().any(|event| it["event"] == *event)).count();
            (of(&["forward.open"]) == of(&["forward.ended", "forward.abandoned", "forward.failed"]) + 1).then_some(())
        };
        until("all forwards but the bystander's have ended", SOON, left).await;
    })
    .await;
}

#[tokio::test]
async fn messages_without_sense_from_an_agent_cost_its_link_at_most() {
    limited(180, async {
        let mut world = World::with_gateway().await;
        let before = world.resident();
        let mut peer = Peer::start();
        let mut client = world.at_the_door().await;
        for index in 0..oddities(0).len() {
            world.link(&mut peer).await;
            let (channel, asked) = world.asked(&mut client, &mut peer).await;
            peer.ask(json!({"do": "accept_channel", "sender": asked["sender"]})).await;
            let opened = client.ask(json!({"do": "opened", "id": channel})).await;
            assert_eq!(opened["message"], 91, "{opened}");
            let (what, hex, times) = oddities(asked["sender"].as_u64().expect("a number")).swap_remove(index);
            peer.try_ask(json!({"do": "raw", "hex": hex, "times": times})).await;
            peer.ask(json!({"do": "next", "messages": [1], "within": 0.2})).await;
            peer.ask(json!({"do": "drop"})).await;
            let end = client.ask(json!({"do": "receive", "id": channel, "bytes_": 1})).await;
            assert!(end["closed"] == true || end["eof"] == true, "{what}: the client is left with {end}");
            let id = forward_id(&asked);
            let ended = |it: &Value| it["forward"] == id && it["event"] != "forward.open";
            world.entry("gateway", ended).await;
            // Until the link is seen to be gone, requests may still be sent to it.
            let ups = |event: &str| world.trail("gateway").iter().filter(|it| it["event"] == event).count();
            until(what, SOON, || (ups("link.down") == ups("link.up")).then_some(())).await;
            world.assert_well();
        }
        world.link(&mut peer).await;
        world.link_works(&mut client, &mut peer).await;
        let grown = world.resident().saturating_sub(before);
        assert!(grown < 64 * 1024, "{grown} KiB more");
    })
    .await;
}

#[tokio::test]
async fn messages_without_sense_from_a_gateway_do_not_end_the_agent() {
    limited(180, async {
        let mut peer = Peer::start();
        let mut world = World::served(&mut peer).await;
        for index in 0..oddities(0).len() {
            let opened = allowed(&world, &mut peer, false).await;
            peer.echoes(&opened).await;
            let (what, hex, times) = oddities(opened["sender"].as_u64().expect("a number")).swap_remove(index);
            peer.try_ask(json!({"do": "raw", "hex": hex, "times": times})).await;
            peer.ask(json!({"do": "next", "messages": [1], "within": 0.2})).await;
            world.assert_well();
            let seen = peer.ask(json!({"do": "seen"})).await;
            // A link that goes on carries the next forward. Where it ended, a new agent dials without a wait.
            if seen["open"] == false || allowed(&world, &mut peer, false).await["message"] != 91 {
                peer.ask(json!({"do": "drop"})).await;
                // Until it has ended it holds its trail, which the next one wants.
                world.agent.take().expect("an agent").child.kill().await.expect("it ended");
                // On another port, because the last agent may have dialled this one again before it ended.
                let listening = peer.ask(json!({"do": "listen"})).await;
                world.port = u16::try_from(listening["port"].as_u64().expect("a port")).expect("a port");
                world.start_agent(&format!("ssh://127.0.0.1:{}", world.port), "asserts = [\"provisioner\"]\n", "");
                let accepted = peer.try_ask(json!({"do": "accept"})).await;
                assert!(accepted.get("error").is_none(), "{what}: {accepted}");
                world.log_in_to_agent(&mut peer).await;
            }
        }
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_session_at_the_door_has_so_many_channels() {
    limited(120, async {
        let mut world = World::linked().await;
        let mut peer = world.at_the_door().await;
        let most = limits::CHANNELS_PER_SESSION;
        // In lots, so that the limit on opens under way is not the one that is met.
        let mut answers = Vec::new();
        let mut ids = Vec::new();
        for _ in 0..10 {
            let many = json!({"do": "open_many", "count": 32, "host": "127.0.0.1", "port": world.echo});
            let lot = peer.ask(many).await;
            answers.extend(lot["answers"].as_array().expect("answers").clone());
            ids.extend(lot["ids"].as_array().expect("numbers").clone());
        }
        let opened = answers.iter().filter(|it| **it == json!("opened")).count();
        assert_eq!(opened, most, "{answers:?}");
        assert!(answers[most..].iter().all(|it| *it == json!("not available")), "{:?}", &answers[most..]);
        assert!(answers[..most].iter().all(|it| *it == json!("opened")), "{:?}", &answers[..most]);
        // Each refusal is an entry.
        let refused = || (refusals(&world.trail("gateway")).len() == answers.len() - most).then_some(());
        until("an entry for each refusal", SOON, refused).await;
        // Room again for as many as have ended.
        for id in &ids[..2] {
            peer.ask(json!({"do": "close", "id": id})).await;
        }
        let again = allowed(&world, &mut peer, true).await;
        peer.echoes(&again).await;
        // Another session has its own.
        let mut other = world.at_the_door().await;
        let forward = allowed(&world, &mut other, true).await;
        other.echoes(&forward).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn a_session_at_the_door_has_so_many_opens_under_way() {
    limited(120, async {
        let mut world = World::with_gateway().await;
        let mut agent = Peer::start();
        world.link(&mut agent).await;
        let mut peer = world.at_the_door().await;
        let most = limits::PENDING_OPENS_PER_SESSION;
        let many = json!({"do": "open_many", "count": most + 30, "host": "10.0.0.1", "port": 5432, "within": 5});
        let answers = peer.ask(many).await["answers"].as_array().expect("answers").clone();
        let waiting = answers.iter().filter(|it| it.is_null()).count();
        let refused = answers.iter().filter(|it| **it == json!("not available")).count();
        assert_eq!((waiting, refused), (most, 30), "{answers:?}");
        // What another client asks for is not behind them.
        let mut other = world.at_the_door().await;
        for _ in 0..most {
            let asked = agent.ask(json!({"do": "next", "messages": [90]})).await;
            assert_eq!(asked["type"], "direct-tcpip", "{asked}");
        }
        world.link_works(&mut other, &mut agent).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn channels_without_room_hold_nobody_up() {
    limited(90, async {
        let mut world = World::linked().await;
        let mut bystander = world.at_the_door().await;
        let forward = allowed(&world, &mut bystander, true).await;
        for (window, packet) in [(0_u32, 0_u32), (0, 32_768), (u32::MAX, 0), (1, 1), (u32::MAX, u32::MAX)] {
            let mut peer = world.at_the_door().await;
            let open = json!({"do": "open", "type": "direct-tcpip", "host": "127.0.0.1", "port": world.echo,
                "window": window, "packet_size": packet});
            let opened = peer.ask(open).await;
            if opened["message"] == 91 {
                // The target returns it, and there is little or no room to pass it on.
                peer.ask(json!({"do": "send", "id": opened["id"], "hex": "00".repeat(20_000)})).await;
                peer.ask(json!({"do": "receive", "id": opened["id"], "bytes_": 100, "within": 1})).await;
            }
            let alive = timeout(SOON, bystander.echoes(&forward)).await;
            assert!(alive.is_ok(), "window {window}, packet {packet}: another session is held up");
            // A spinning process takes all it gets, again and again; what is left to do from before does not last.
            let deadline = Instant::now() + SOON;
            loop {
                let spent = world.processor();
                sleep(Duration::from_millis(500)).await;
                let spun = world.processor() - spent;
                if spun < Duration::from_millis(300) {
                    break;
                }
                assert!(Instant::now() < deadline, "window {window}, packet {packet}: {spun:?} of idle time");
            }
        }
        world.assert_well();
    })
    .await;
}

impl World {
    /// Processor time that both processes have taken.
    fn processor(&self) -> Duration {
        let both = [&self.gateway, &self.agent];
        let ids = both.into_iter().flatten().filter_map(|it| it.child.id());
        let ticks = ids.map(|id| {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).expect("its state");
            let (_, fields) = stat.rsplit_once(") ").expect("its name");
            let number = |field: usize| fields.split(' ').nth(field).and_then(|it| it.parse::<u64>().ok());
            number(11).expect("user time") + number(12).expect("system time")
        });
        // The kernel counts in hundredths of a second wherever Debian runs.
        Duration::from_millis(ticks.sum::<u64>() * 10)
    }
}

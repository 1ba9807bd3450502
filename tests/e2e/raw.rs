//! Peers that do not behave: foreign SSH (Debian's paramiko, driven through `raw.py`) against the door and the agent, and
//! in the place of an agent. Everything is refused on the wire, recorded, and costs nobody else their session.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
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

// ---------------------------------------------------------------------------------------------------------------------
// Set-up.

/// Debian's own Python, which is the one that python3-paramiko is installed for.
const PYTHON: &str = "/usr/bin/python3";

/// What the gateway says to an agent.
const GATEWAY_LINE: &str = "SSH-2.0-caponier_1 client";

/// An ordinary wait for something that happens at once.
const SOON: Duration = Duration::from_secs(10);

/// Runs a test under a deadline.
async fn limited<T>(seconds: u64, test: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(seconds), test).await.unwrap_or_else(|_| panic!("not done in {seconds} s"))
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
struct Peer {
    _child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Peer {
    fn start() -> Self {
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
    async fn try_ask(&mut self, command: Value) -> Value {
        let line = format!("{command}\n");
        self.input.write_all(line.as_bytes()).await.expect("raw.py reads");
        let answer = timeout(Duration::from_secs(90), self.output.next_line()).await;
        let answer = answer.unwrap_or_else(|_| panic!("raw.py does not answer {command}")).expect("raw.py's output");
        let answer = answer.unwrap_or_else(|| panic!("raw.py ended over {command} (is python3-paramiko installed?)"));
        serde_json::from_str(&answer).expect("an answer in JSON")
    }

    /// Sends a command and returns its answer; it is the test's fault if that is an error.
    async fn ask(&mut self, command: Value) -> Value {
        let answer = self.try_ask(command.clone()).await;
        assert!(answer.get("error").is_none(), "{command}: {answer}");
        answer
    }

    /// Opens a plain forward; the answer is a confirmation (91), a refusal (92), or nothing.
    async fn forward(&mut self, host: &str, port: u64) -> Value {
        self.ask(json!({"do": "open", "type": "direct-tcpip", "host": host, "port": port})).await
    }

    /// Opens a forward in the name of a gateway.
    async fn gateway_forward(&mut self, originator: &str, host: &str, port: u16) -> Value {
        self.ask(json!({"do": "open", "type": "direct-tcpip", "host": host, "port": port, "originator": originator,
            "within": 25}))
            .await
    }

    /// Sends bytes over an open channel to a target that returns them.
    async fn echoes(&mut self, opened: &Value) {
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
        let config = self.path("gateway.toml");
        let text = "
            [gateway]
            listen = [\"127.0.0.1:0\"]
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
        ";
        fs::write(&config, text).expect("a configuration");
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
        let login = self.public("login-acme");
        let asserts = if orchestrator.is_empty() { "asserts = [\"provisioner\"]\n" } else { orchestrator };
        let text = format!(
            "[agent]\nid = \"prod-eu\"\nreplica = \"r1\"\nhost_key = \"agent\"\n{agent}\n\
             [audit]\nfile = \"agent.jsonl\"\n[log]\nformat = \"json\"\n\
             [[organisation]]\nid = \"acme\"\ngateways = [\"{gateway}\"]\n\
             [[organisation.orchestrator]]\nkey = \"{login}\"\n{asserts}\
             [[organisation.allow]]\nname = \"echo\"\naddresses = [\"127.0.0.1/32\"]\nports = [{echo}, {port}]\n\
             [[organisation.allow]]\nname = \"wide\"\naddresses = [\"0.0.0.0/0\", \"::/0\"]\nports = [80, {echo}]\n\
             [[organisation.allow]]\nname = \"silent\"\naddresses = [\"127.0.0.1/32\"]\nports = [1]\n\
             principals = [\"ci-*\"]\n",
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
        whole.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line:?}"))).collect()
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

/// Bytes in hexadecimal, as `raw.py` takes them.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An SSH string (RFC 4251 §5) in hexadecimal.
fn string(text: &str) -> String {
    format!("{:08x}{}", text.len(), hex(text.as_bytes()))
}

// ---------------------------------------------------------------------------------------------------------------------
// What SSH can ask for, and neither side does.

/// Channel types with their bodies: everything but `direct-tcpip`, and `session`, which has a test of its own.
fn foreign_channels(world: &World) -> Vec<(&'static str, String)> {
    let socket = string(&world.path("socket").display().to_string());
    let pair = format!("{}{:08x}{}{:08x}", string("127.0.0.1"), world.echo, string("127.0.0.1"), 1);
    vec![
        ("x11", format!("{}{:08x}", string("127.0.0.1"), 6000)),
        ("auth-agent@openssh.com", String::new()),
        ("auth-agent", String::new()),
        ("direct-streamlocal@openssh.com", format!("{socket}{}{:08x}", string(""), 0)),
        ("forwarded-streamlocal@openssh.com", format!("{socket}{}", string(""))),
        ("forwarded-tcpip", pair),
        ("tun@openssh.com", format!("{:08x}{:08x}", 1, 0x7fff_ffff)),
        ("frobnicate@example.com", String::new()),
        ("", String::new()),
    ]
}

/// Requests on a channel with their bodies.
fn channel_requests(world: &World) -> Vec<(&'static str, String)> {
    let command = format!("touch {}", world.path("executed").display());
    vec![
        ("shell", String::new()),
        ("exec", string(&command)),
        ("env", format!("{}{}", string("LD_PRELOAD"), string(&command))),
        ("pty-req", format!("{}{:08x}{:08x}{:08x}{:08x}{}", string("xterm"), 80, 24, 0, 0, string("\0"))),
        ("subsystem", string("sftp")),
        ("subsystem", string("control@caponier")),
        ("subsystem", string("frobnicate")),
        ("x11-req", format!("00{}{}{:08x}", string("MIT-MAGIC-COOKIE-1"), string("00112233445566778899aabbccddeeff"), 0)),
        ("auth-agent-req@openssh.com", String::new()),
        ("signal", string("KILL")),
        ("window-change", format!("{:08x}{:08x}{:08x}{:08x}", 80, 24, 0, 0)),
        ("break", format!("{:08x}", 500)),
        ("xon-xoff", "01".into()),
        ("eow@openssh.com", String::new()),
        ("frobnicate@example.com", String::new()),
    ]
}

fn global_requests(world: &World) -> Vec<(&'static str, String)> {
    let socket = string(&world.path("socket").display().to_string());
    vec![
        ("tcpip-forward", format!("{}{:08x}", string("127.0.0.1"), 0)),
        ("tcpip-forward", format!("{}{:08x}", string(""), 2222)),
        ("cancel-tcpip-forward", format!("{}{:08x}", string("127.0.0.1"), 2222)),
        ("streamlocal-forward@openssh.com", socket.clone()),
        ("cancel-streamlocal-forward@openssh.com", socket),
        ("hostkeys-prove-00@openssh.com", String::new()),
        ("frobnicate@example.com", String::new()),
    ]
}

/// How an allowed forward is asked for: plainly at the door, with an originator at the agent.
async fn allowed(world: &World, peer: &mut Peer, door: bool) -> Value {
    let originator = if door { "127.0.0.1".to_owned() } else { originator("provisioner") };
    peer.gateway_forward(&originator, "127.0.0.1", world.echo).await
}

/// A well-formed originator with a fresh forward id.
fn originator(principal: &str) -> String {
    format!("caponier1:{}:{principal}:192.0.2.1:40000", caponier::tunnel::wire::ForwardId::random())
}

/// Everything that was not refused, in words.
async fn not_refused(world: &World, peer: &mut Peer, door: bool) -> Vec<String> {
    let mut faults = Vec::new();
    for (kind, body) in foreign_channels(world) {
        let answer = peer.ask(json!({"do": "open", "type": kind, "rest": body, "within": 5})).await;
        if answer["message"] != 92 {
            faults.push(format!("channel {kind:?}: {answer}"));
        }
    }
    for (name, body) in global_requests(world) {
        let answer = peer.ask(json!({"do": "global", "name": name, "rest": body, "within": 5})).await;
        if answer["message"] != 82 {
            faults.push(format!("global request {name:?}: {answer}"));
        }
        // Without a wish for a reply there must be none, or it would be taken for the next request's.
        peer.ask(json!({"do": "global", "name": name, "rest": body, "reply": false})).await;
    }
    let forward = allowed(world, peer, door).await;
    if forward["message"] != 91 {
        faults.push(format!("a forward after foreign channels and global requests: {forward}"));
        return faults;
    }
    for (name, body) in channel_requests(world) {
        let request = json!({"do": "request", "id": forward["id"], "name": name, "rest": body, "reply": false});
        peer.ask(request).await;
        let request = json!({"do": "request", "id": forward["id"], "name": name, "rest": body, "within": 5});
        let answer = peer.ask(request).await;
        if answer["message"] != 100 {
            faults.push(format!("request {name:?} on a forward: {answer}"));
            if answer["open"] == false {
                return faults;
            }
        }
    }
    peer.echoes(&forward).await;
    let later = allowed(world, peer, door).await;
    peer.echoes(&later).await;
    let late = peer.ask(json!({"do": "next", "messages": [81, 82, 99, 100], "within": 1})).await;
    if late["nothing"] != true {
        faults.push(format!("a reply nobody asked for: {late}"));
    }
    faults
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
            let request = json!({"do": "request", "id": control["id"], "name": name, "rest": body, "within": 5});
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
            let again = json!({"do": "request", "id": control["id"], "name": name, "rest": body, "within": 5});
            let answer = peer.ask(again).await;
            if answer["message"] != 100 {
                faults.push(format!("{name:?} on the control channel: {answer}"));
            }
        }
        let second = peer.ask(json!({"do": "open", "type": "session"})).await;
        if second["message"] == 91 {
            let request = json!({"do": "request", "id": second["id"], "name": "subsystem", "rest": body, "within": 5});
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
            let found = timeout(Duration::from_secs(3), async {
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
            peer.ask(json!({"do": "accept", "within": 30})).await;
            world.log_in_to_agent(&mut peer).await;
        }
        let forward = allowed(&world, &mut peer, false).await;
        peer.echoes(&forward).await;
        world.assert_well();
    })
    .await;
}

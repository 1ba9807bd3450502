//! A site: a gateway and an agent, run as the built program, with all that they need in a folder of their own.
//!
//! The world, unless a test says otherwise: a gateway for the organisations `acme` and `globex`; an agent `prod-eu` of
//! `acme`; a principal `provisioner` of `acme` who may use `prod-*`. The agent allows nothing but what the test allows.
//!
//! Programs write their logs to files in the folder, which is shown when a test fails. Whatever a test waits for, it waits
//! for under [`PATIENCE`]. A program that panics fails the test that started it, even if nothing else noticed.

use std::fmt::Display;
use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as SocketAddress, UnixListener};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use caponier::identity::{Algorithm, PrivateKey};
use caponier::task::Tasks;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::time::Instant;

/// How long anything is waited for: ample on a machine that does much else at the time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// What counts as soon where five seconds are promised: on a machine that is ten times slower for a while, too. A timer that
/// fires by mistake only, and a wait for somebody else's, are longer or have no end.
pub(crate) const SOON: Duration = Duration::from_secs(50);

/// The agent's name at the doors.
pub(crate) const AGENT: &str = "acme/prod-eu";

/// Which of the two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Gateway,
    Agent,
}

impl Side {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Agent => "agent",
        }
    }
}

/// Waits until `look` finds something.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        // What is waited for lies in files and other processes, which tell nobody when they change.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits for a future.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// What a program that has ended said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Said {
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("ended by signal {:?}: {self:?}", self.status.signal()))
    }

    /// Standard output, of a program that has succeeded.
    pub(crate) fn done(self) -> String {
        assert!(self.status.success(), "{self:?}");
        self.stdout
    }
}

/// Runs a command to its end.
pub(crate) async fn run(command: &mut Command) -> Said {
    run_for(PATIENCE, command).await
}

/// Runs a command that may take so long to its end.
pub(crate) async fn run_for(patience: Duration, command: &mut Command) -> Said {
    let name = format!("{command:?}");
    let output = tokio::time::timeout(patience, command.kill_on_drop(true).stdin(Stdio::null()).output()).await;
    let output = output.unwrap_or_else(|_| panic!("not within {patience:?}: {name}"));
    let output = output.unwrap_or_else(|error| panic!("{name}: {error}"));
    Said {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The built program, without settings from this process' environment.
pub(crate) fn caponier() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_caponier"));
    let proxies = ["AGENT_PROXY", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"];
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CAPONIER") || proxies.contains(&name)) {
            command.env_remove(name);
        }
    }
    command
}

/// A port that nobody takes but who is told of it here: for programs that cannot choose one themselves, for what comes back
/// where it was before, and for places where nobody is to listen.
///
/// What the system chooses, for a listener on port 0 or for the near end of a connection, may at once become another's
/// when it is given back. So these lie below what the system chooses from, each is given once, and every process of
/// tests has a block of them to itself for as long as it runs.
pub(crate) fn free_port() -> u16 {
    static PORTS: LazyLock<Mutex<Ports>> = LazyLock::new(|| Mutex::new(Ports::new()));
    let mut ports = PORTS.lock().expect("the ports");
    loop {
        let port = ports.next();
        // Another program of the machine may have a listener there.
        if StdListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Ports in blocks, of which other processes take others.
struct Ports {
    /// The lowest port that the system chooses itself.
    above: u16,
    /// What is left of the block.
    left: Range<u16>,
    /// One for each block, for as long as the process runs: the name in the abstract namespace is of the same network as
    /// the ports, can be held by one process only, and is free when that ends.
    held: Vec<UnixListener>,
}

impl Ports {
    const BLOCK: u16 = 500;
    /// Below are ports of well-known services.
    const LOWEST: u16 = 15_000;

    fn new() -> Self {
        let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("the range of ports");
        let above = range.split_whitespace().next().and_then(|low| low.parse().ok()).expect("the lowest port");
        Self { above, left: 0..0, held: Vec::new() }
    }

    fn next(&mut self) -> u16 {
        if let Some(port) = self.left.next() {
            return port;
        }
        // Where the system chooses from nearly all, the highest are not less likely to stay free than others.
        let end = if self.above >= Self::LOWEST + 2 * Self::BLOCK { self.above } else { u16::MAX };
        for begin in (Self::LOWEST..end - Self::BLOCK).step_by(usize::from(Self::BLOCK)) {
            let name = SocketAddress::from_abstract_name(format!("caponier-tests-ports-{begin}")).expect("a name");
            if let Ok(listener) = UnixListener::bind_addr(&name) {
                self.held.push(listener);
                self.left = begin + 1..begin + Self::BLOCK;
                return begin;
            }
        }
        panic!("other processes have all ports");
    }
}

/// Connects once somebody listens.
pub(crate) async fn connect(address: SocketAddr) -> TcpStream {
    eventually(&format!("a listener on {address}"), async || TcpStream::connect(address).await.ok()).await
}

/// Writes `bytes` and reads as many back, which must be the same.
pub(crate) async fn echoes(mut stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) {
    within("an echo", async {
        stream.write_all(bytes).await.expect("written");
        let mut back = vec![0; bytes.len()];
        stream.read_exact(&mut back).await.expect("read");
        assert!(back == bytes, "what came back is something else");
    })
    .await;
}

/// Reads to the end; a connection that was reset has ended too.
pub(crate) async fn read_to_end(mut stream: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut all = Vec::new();
    match within("the end of a stream", stream.read_to_end(&mut all)).await {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
        _ => all,
    }
}

/// A listener on loopback whose connections are each given to `serve`, until the test ends.
pub(crate) async fn listen<F, Fut>(serve: F) -> SocketAddr
where
    F: Fn(TcpStream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    listen_on(StdListener::bind("127.0.0.1:0").expect("a listener"), serve)
}

/// Like [`listen`], on a listener that is there, which may be of another network.
pub(crate) fn listen_on<F, Fut>(listener: StdListener, serve: F) -> SocketAddr
where
    F: Fn(TcpStream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    listener.set_nonblocking(true).expect("not blocking");
    let listener = TcpListener::from_std(listener).expect("a listener");
    let address = listener.local_addr().expect("its address");
    let tasks = Tasks::new();
    let accepting = tasks.clone();
    tasks.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            accepting.spawn(serve(stream));
        }
    });
    address
}

/// A target that sends back what it gets.
pub(crate) async fn echo() -> SocketAddr {
    listen(async |mut stream| {
        let (mut read, mut write) = stream.split();
        // Clients leave as they like.
        drop(tokio::io::copy(&mut read, &mut write).await);
    })
    .await
}

/// A target that answers every HTTP request with `hello through the tunnel`.
pub(crate) async fn web() -> SocketAddr {
    listen(async |mut stream| {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => request.push(byte),
                Err(_) => return,
            }
        }
        let reply = "HTTP/1.1 200 OK\r\nContent-Length: 24\r\nConnection: close\r\n\r\nhello through the tunnel";
        drop(stream.write_all(reply.as_bytes()).await);
    })
    .await
}

/// A program that runs beside the test, and is killed with it.
#[derive(Debug)]
pub(crate) struct Program {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Program {
    /// Starts it, with both output streams to `log`.
    pub(crate) fn start(name: &str, command: Command, log: &Path) -> Self {
        Self::start_with_output(name, command, log, None)
    }

    /// Starts it, with standard output to a file of its own, if there is one.
    fn start_with_output(name: &str, command: Command, log: &Path, output: Option<fs::File>) -> Self {
        let file = fs::File::create(log).expect("a log file");
        let output = output.unwrap_or_else(|| file.try_clone().expect("a log file"));
        let mut command = command.into_std();
        command.stdin(Stdio::null()).stdout(output).stderr(file);
        let child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        Self { child, name: name.to_owned(), log: log.to_owned() }
    }

    /// Starts it with two descriptors in the place of its standard input and output, for [`ACTIVATE`].
    pub(crate) fn start_with_sockets(name: &str, command: Command, log: &Path, sockets: [OwnedFd; 2]) -> Self {
        let file = fs::File::create(log).expect("a log file");
        let [first, second] = sockets;
        let mut command = command.into_std();
        command.stdin(first).stdout(second).stderr(file);
        let child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        Self { child, name: name.to_owned(), log: log.to_owned() }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has said so far.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits for a line that holds `text`.
    pub(crate) async fn says(&mut self, text: &str) -> String {
        let what = format!("{} says {text:?}", self.name);
        eventually(&what, async || {
            // In this order: what it says last before it ends is not missed.
            let ended = self.child.try_wait().expect("its status");
            let log = self.log();
            let line = log.lines().find(|line| line.contains(text)).map(str::to_owned);
            assert!(line.is_some() || ended.is_none(), "{} has ended ({ended:?}): {log}", self.name);
            line
        })
        .await
    }

    pub(crate) fn signal(&self, signal: &str) {
        let done = std::process::Command::new("kill").arg(format!("-{signal}")).arg(self.pid().to_string()).status();
        assert!(done.expect("kill runs").success(), "could not signal {}", self.name);
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let what = format!("the end of {}", self.name);
        eventually(&what, async || self.child.try_wait().expect("its status")).await
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("its status").is_some()
    }

    /// SIGTERM; the exit code.
    pub(crate) async fn stop(&mut self) -> Option<i32> {
        self.signal("TERM");
        self.ended().await.code()
    }

    /// SIGKILL.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.ended().await;
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        let log = self.log();
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{log}", self.name);
        } else {
            assert!(!log.contains("panicked at"), "{} panicked: {log}", self.name);
        }
    }
}

/// The registry's folder.
#[derive(Debug, Clone)]
pub(crate) struct Registry(PathBuf);

impl Registry {
    /// In this folder.
    pub(crate) fn at(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// Where the folder of an agent's or a principal's keys is; `whose` is `ORG/agents/NAME` or `ORG/principals/NAME`.
    pub(crate) fn folder(&self, whose: &str) -> PathBuf {
        self.0.join("organisations").join(whose)
    }

    /// Puts a public key there, as `FILE.pub`.
    pub(crate) fn key(&self, whose: &str, file: &str, public: &str) {
        let folder = self.folder(whose);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(format!("{file}.pub")), public).expect("a public key");
    }

    /// Says what is said of one key beside it.
    pub(crate) fn about_key(&self, whose: &str, file: &str, toml: &str) {
        fs::write(self.folder(whose).join(format!("{file}.toml")), toml).expect("written");
    }

    /// Says what is said of an agent or a principal beside its folder.
    pub(crate) fn about(&self, whose: &str, toml: &str) {
        let file = self.folder(&format!("{whose}.toml"));
        fs::create_dir_all(file.parent().expect("a parent")).expect("a folder");
        fs::write(file, toml).expect("written");
    }
}

/// What a site will be.
pub(crate) struct Plan {
    dir: TempDir,
    rules: String,
    doors: Vec<String>,
    agent_settings: String,
    /// The agent's `gateways`, with `{}` where the gateway's address belongs.
    gateways: String,
    gateway_settings: String,
    gateway_tables: String,
    serves_globex: bool,
    agent_environment: Vec<(String, String)>,
    gateway_environment: Vec<(String, String)>,
    /// What the gateway inherits: its main listener and a door's, held here as a service manager would.
    shared: Option<[StdListener; 2]>,
    piped: Option<Side>,
    agent_network: Option<String>,
    /// Lines for the `[audit]` of both sides.
    audit_settings: String,
}

impl Plan {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("caponier-e2e-").tempdir().expect("a folder");
        let plan = Self {
            dir,
            rules: String::new(),
            doors: Vec::new(),
            agent_settings: String::new(),
            gateways: "[\"ssh://{}\"]".to_owned(),
            gateway_settings: String::new(),
            gateway_tables: String::new(),
            serves_globex: false,
            agent_environment: Vec::new(),
            gateway_environment: Vec::new(),
            shared: None,
            piped: None,
            agent_network: None,
            audit_settings: String::new(),
        };
        for name in ["gateway", "login-acme", "login-globex", "agent", "provisioner"] {
            plan.key(name);
        }
        let registry = plan.registry();
        registry.key("acme/agents/prod-eu", "one", &plan.public("agent"));
        registry.key("acme/principals/provisioner", "one", &plan.public("provisioner"));
        registry.about("acme/principals/provisioner", "agents = [\"prod-*\"]");
        fs::create_dir_all(registry.folder("globex/agents")).expect("a folder");
        plan
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Makes a key pair; the path of the private key.
    pub(crate) fn key(&self, name: &str) -> PathBuf {
        make_key(self.path(), name)
    }

    /// The public half of a key pair.
    pub(crate) fn public(&self, name: &str) -> String {
        public(self.path(), name)
    }

    pub(crate) fn registry(&self) -> Registry {
        Registry(self.path().join("keys"))
    }

    /// The agent allows this address and port.
    pub(crate) fn allow(self, address: SocketAddr) -> Self {
        let (ip, port) = (address.ip(), address.port());
        self.rule(&format!("name = \"to-{port}\"\naddresses = [\"{ip}/32\"]\nports = [{port}]\n"))
    }

    /// The agent has this rule.
    pub(crate) fn rule(mut self, toml: &str) -> Self {
        self.rules.push_str(&format!("[[organisation.allow]]\n{toml}\n"));
        self
    }

    /// The agent has this deny rule.
    pub(crate) fn deny(mut self, toml: &str) -> Self {
        self.rules.push_str(&format!("[[organisation.deny]]\n{toml}\n"));
        self
    }

    /// The gateway has a loopback door to this target, on behalf of the provisioner.
    pub(crate) fn door(mut self, target: impl Display) -> Self {
        self.doors.push(target.to_string());
        self
    }

    /// A line for the agent's `[agent]`.
    pub(crate) fn agent_setting(mut self, line: &str) -> Self {
        self.agent_settings.push_str(line);
        self.agent_settings.push('\n');
        self
    }

    /// A line for the `[audit]` of both sides, with `{}` where a side's name belongs.
    pub(crate) fn audit_setting(mut self, line: &str) -> Self {
        self.audit_settings.push_str(line);
        self.audit_settings.push('\n');
        self
    }

    /// The agent runs in this network, as `ip netns` names it.
    pub(crate) fn agent_network(mut self, name: &str) -> Self {
        self.agent_network = Some(name.to_owned());
        self
    }

    /// The agent has these `gateways`, with `{}` where the gateway's address belongs.
    pub(crate) fn gateways(mut self, toml: &str) -> Self {
        self.gateways = toml.to_owned();
        self
    }

    /// Seconds that a side's forwards have after its signal to end. Without this it is [`DRAIN`].
    pub(crate) fn drain(mut self, side: Side, seconds: u32) -> Self {
        let variable = (format!("CAPONIER_{}__DRAIN_S", side.name().to_uppercase()), seconds.to_string());
        match side {
            Side::Gateway => self.gateway_environment.push(variable),
            Side::Agent => self.agent_environment.push(variable),
        }
        self
    }

    /// A variable of the gateway's environment.
    pub(crate) fn gateway_variable(mut self, name: &str, value: &str) -> Self {
        self.gateway_environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A variable of the agent's environment.
    pub(crate) fn agent_variable(mut self, name: &str, value: &str) -> Self {
        self.agent_environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The gateway inherits its listeners, and so can have successors. It has one door.
    pub(crate) fn socket_activation(mut self) -> Self {
        assert_eq!(self.doors.len(), 1, "one door");
        self.shared = Some([(); 2].map(|()| StdListener::bind("127.0.0.1:0").expect("a listener")));
        self
    }

    /// A line for the gateway's `[gateway]`.
    pub(crate) fn gateway_setting(mut self, line: &str) -> Self {
        self.gateway_settings.push_str(line);
        self.gateway_settings.push('\n');
        self
    }

    /// Tables for the end of the gateway's configuration.
    pub(crate) fn gateway_table(mut self, toml: &str) -> Self {
        self.gateway_tables.push_str(toml);
        self.gateway_tables.push('\n');
        self
    }

    /// The agent serves `globex` too, with the same rules, where the provisioner's key is registered as well.
    pub(crate) fn serve_globex(mut self) -> Self {
        let registry = self.registry();
        registry.key("globex/agents/prod-eu", "one", &self.public("agent"));
        registry.key("globex/principals/provisioner", "one", &self.public("provisioner"));
        registry.about("globex/principals/provisioner", "agents = [\"prod-*\"]");
        self.serves_globex = true;
        self
    }

    /// One side writes its trail to standard output, which is the named pipe `trail.pipe`. The caller reads it.
    pub(crate) fn trail_to_pipe(mut self, side: Side) -> Self {
        self.piped = Some(side);
        self
    }

    /// Starts the gateway alone.
    pub(crate) async fn start_gateway(self) -> Site {
        let mut doors = self.gateway_tables.clone();
        let address = |listener: &StdListener| listener.local_addr().expect("its address");
        let [main, door] = match &self.shared {
            Some(shared) => shared.each_ref().map(address),
            None => [SocketAddr::from(([127, 0, 0, 1], 0)); 2],
        };
        for target in &self.doors {
            doors.push_str(&format!(
                "[[local]]\nlisten = \"{door}\"\nagent = \"{AGENT}\"\ntarget = \"{target}\"\nprincipal = \"provisioner\"\n"
            ));
        }
        let mut site = Site {
            plan: self,
            gateway: None,
            agent: None,
            address: main,
            doors: Vec::new(),
            starts: 0,
            gateway_end: doors,
        };
        site.restart_gateway().await;
        site
    }

    /// Starts the gateway and the agent, and waits until they are linked.
    pub(crate) async fn start(self) -> Site {
        let mut site = self.start_gateway().await;
        site.restart_agent().await;
        site.linked().await;
        site
    }
}

/// A running gateway and agent.
pub(crate) struct Site {
    // Dropped in this order: the programs end before their folder goes.
    agent: Option<Program>,
    gateway: Option<Program>,
    /// Where the gateway listens.
    pub(crate) address: SocketAddr,
    /// Where its loopback doors are.
    pub(crate) doors: Vec<SocketAddr>,
    plan: Plan,
    starts: usize,
    gateway_end: String,
}

impl Site {
    /// A site to be described.
    pub(crate) fn plan() -> Plan {
        Plan::new()
    }

    pub(crate) fn path(&self) -> &Path {
        self.plan.path()
    }

    pub(crate) fn key(&self, name: &str) -> PathBuf {
        self.plan.key(name)
    }

    pub(crate) fn public(&self, name: &str) -> String {
        self.plan.public(name)
    }

    pub(crate) fn registry(&self) -> Registry {
        self.plan.registry()
    }

    pub(crate) fn program(&mut self, side: Side) -> &mut Program {
        match side {
            Side::Gateway => self.gateway.as_mut().expect("a gateway"),
            Side::Agent => self.agent.as_mut().expect("an agent"),
        }
    }

    /// Where a side's configuration is.
    pub(crate) fn config(&self, side: Side) -> PathBuf {
        self.path().join(format!("{}.toml", side.name()))
    }

    pub(crate) fn admin_socket(&self) -> PathBuf {
        self.path().join("admin.sock")
    }

    /// Starts the gateway, again where it ran before, and on the same ports.
    pub(crate) async fn restart_gateway(&mut self) {
        self.gateway = None;
        let dir = self.path().display();
        let config = format!(
            "[gateway]\nlisten = [\"{}\"]\nhost_key = \"gateway\"\nregistry = \"keys\"\nadmin_socket = \"{dir}/admin.sock\"\n{}\
             {}\
             [[organisation]]\nid = \"acme\"\nlogin_key = \"login-acme\"\n\
             [[organisation]]\nid = \"globex\"\nlogin_key = \"login-globex\"\n{}",
            self.address,
            self.plan.gateway_settings,
            self.audit(Side::Gateway),
            self.gateway_end
        );
        fs::write(self.config(Side::Gateway), config).expect("written");
        self.start_gateway().await;
    }

    /// Starts the gateway with the configuration that is there.
    pub(crate) async fn start_gateway_as_written(&mut self) {
        self.gateway = None;
        self.start_gateway().await;
    }

    /// Starts another gateway on the same listeners, while the one before goes on. Its trail is a file of its own, of which
    /// the name is returned beside the one before.
    pub(crate) async fn succeed_gateway(&mut self) -> (Program, String) {
        let before = self.gateway.take().expect("a gateway");
        let trail = format!("gateway-{}.jsonl", self.starts);
        self.plan.gateway_environment.retain(|(name, _)| name != "CAPONIER_AUDIT__FILE");
        self.plan.gateway_environment.push(("CAPONIER_AUDIT__FILE".to_owned(), trail.clone()));
        self.start_gateway().await;
        (before, trail)
    }

    async fn start_gateway(&mut self) {
        let environment = self.plan.gateway_environment.clone();
        let expected = self.plan.doors.len();
        let said = |line: &str, words: &str| -> Option<SocketAddr> {
            line.split_once(words).map(|(_, address)| address.trim().parse().expect("an address"))
        };
        // The system may have given a port of the one before to another test meanwhile, which has it for as long as that lasts.
        let (address, doors) = eventually("a gateway that listens", async || {
            self.gateway = Some(self.start_program(Side::Gateway, &environment));
            let gateway = self.program(Side::Gateway);
            eventually("the gateway's listeners", async || {
                // In this order: what it says last before it ends is not missed.
                let ended = gateway.child.try_wait().expect("its status");
                let log = gateway.log();
                let address = log.lines().find_map(|line| said(line, LISTENING));
                let doors: Vec<_> = log.lines().filter_map(|line| said(line, DOOR)).collect();
                if let Some(address) = address.filter(|_| doors.len() == expected) {
                    return Some(Some((address, doors)));
                }
                let taken = log.contains("Address already in use");
                assert!(ended.is_none() || taken, "the gateway has ended ({ended:?}): {log}");
                ended.is_some().then_some(None)
            })
            .await
        })
        .await;
        for door in &doors {
            self.gateway_end = self.gateway_end.replacen("\"127.0.0.1:0\"", &format!("\"{door}\""), 1);
        }
        self.address = address;
        self.doors = doors;
        let known = format!("[{}]:{} {}\n", address.ip(), address.port(), self.public("gateway"));
        fs::write(self.path().join("known_hosts"), known).expect("written");
    }

    /// Replaces what the agent's `[agent]` and environment hold beside the necessary, from its next start on.
    pub(crate) fn change_agent(&mut self, settings: &str, environment: &[(&str, &str)]) {
        self.plan.agent_settings = format!("{settings}\n");
        self.plan.agent_environment =
            environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    }

    /// Replaces the agent's `gateways`, from its next start on.
    pub(crate) fn change_gateways(&mut self, toml: &str) {
        self.plan.gateways = toml.to_owned();
    }

    /// Starts the agent, again where it ran before.
    pub(crate) async fn restart_agent(&mut self) {
        self.agent = None;
        let mut config = format!(
            "[agent]\nid = \"prod-eu\"\nreplica = \"one\"\nhost_key = \"agent\"\n{}\
             {}\
             [[organisation]]\nid = \"acme\"\ngateways = {}\n\
             [[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n{}",
            self.plan.agent_settings,
            self.audit(Side::Agent),
            self.plan.gateways.replace("{}", &self.address.to_string()),
            self.public("login-acme").trim(),
            self.plan.rules
        );
        if self.plan.serves_globex {
            config.push_str(&format!(
                "[[organisation]]\nid = \"globex\"\ngateways = [\"ssh://{}\"]\n\
                 [[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n{}",
                self.address,
                self.public("login-globex").trim(),
                self.plan.rules
            ));
        }
        fs::write(self.config(Side::Agent), config).expect("written");
        let environment = self.plan.agent_environment.clone();
        self.agent = Some(self.start_program(Side::Agent, &environment));
        self.program(Side::Agent).says("agent started").await;
    }

    fn start_program(&mut self, side: Side, environment: &[(String, String)]) -> Program {
        self.starts += 1;
        let name = side.name();
        let mut command = caponier();
        let inherits = self.plan.shared.as_ref().filter(|_| side == Side::Gateway);
        if inherits.is_some() {
            let program = command.as_std().get_program().to_owned();
            let mut wrapped = Command::new("python3");
            wrapped.args(["-c", ACTIVATE, "2"]).arg(program);
            command = wrapped;
        }
        if let Some(network) = self.plan.agent_network.as_ref().filter(|_| side == Side::Agent) {
            // It becomes the agent, which keeps its number.
            let program = command.as_std().get_program().to_owned();
            let mut wrapped = Command::new("ip");
            wrapped.args(["netns", "exec", network]).arg(program);
            for (name, _) in command.as_std().get_envs().filter(|(_, value)| value.is_none()) {
                wrapped.env_remove(name);
            }
            command = wrapped;
        }
        command.arg(name).arg("--config").arg(self.config(side));
        command.env(format!("CAPONIER_{}__DRAIN_S", name.to_uppercase()), DRAIN.to_string());
        command.env("CAPONIER_LOG", "warn,caponier=debug").envs(environment.iter().cloned());
        if let Some([main, door]) = inherits {
            let log = self.path().join(format!("{name}.{}.log", self.starts));
            return Program::start_with_sockets(
                name,
                command,
                &log,
                [main, door].map(|one| OwnedFd::from(one.try_clone().expect("a copy"))),
            );
        }
        let output = (self.plan.piped == Some(side)).then(|| {
            fs::OpenOptions::new().write(true).open(self.path().join("trail.pipe")).expect("a pipe that is read")
        });
        Program::start_with_output(name, command, &self.path().join(format!("{name}.{}.log", self.starts)), output)
    }

    fn audit(&self, side: Side) -> String {
        let sink = match self.plan.piped == Some(side) {
            true => "stdout = true".to_owned(),
            false => format!("file = \"{}.jsonl\"", side.name()),
        };
        format!("[audit]\n{sink}\n{}", self.plan.audit_settings.replace("{}", side.name()))
    }

    /// Waits until the gateway that runs now has a link to the agent that runs now.
    pub(crate) async fn linked(&mut self) {
        self.program(Side::Agent).says(" linked ").await;
        self.program(Side::Gateway).says(" linked ").await;
    }

    /// The records of a trail, oldest first.
    pub(crate) fn trail(&self, side: Side) -> Vec<Value> {
        self.trail_in(&format!("{}.jsonl", side.name()))
    }

    /// The records of the trail in a file of the site's folder, oldest first.
    pub(crate) fn trail_in(&self, file: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path().join(file)).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(checked_record).collect()
    }

    /// The records that have all the fields of `like`, with the same values.
    pub(crate) fn records(&self, side: Side, like: &Value) -> Vec<Value> {
        let mut records = self.trail(side);
        records.retain(|record| is_like(record, like));
        records
    }

    /// Waits for a record that has all the fields of `like`, with the same values.
    pub(crate) async fn record(&self, side: Side, like: Value) -> Value {
        let what = format!("a record like {like} in the {}'s trail: {:#?}", side.name(), self.trail(side));
        eventually(&what, async || self.records(side, &like).into_iter().next()).await
    }

    /// Stock ssh as the provisioner, to the agent. Options that `arguments` give take precedence over what stands here.
    pub(crate) fn ssh(&self, arguments: &[&str]) -> Command {
        self.ssh_as("provisioner", AGENT, arguments)
    }

    /// Stock ssh with a key of the site's folder, to an agent.
    pub(crate) fn ssh_as(&self, key: &str, agent: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command.env_remove("SSH_AUTH_SOCK").args(arguments).args(self.ssh_options());
        command.args(["-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-i"]).arg(self.path().join(key));
        command.args(["-l", agent, &self.address.ip().to_string()]);
        command
    }

    /// What every use of ssh with this gateway needs.
    pub(crate) fn ssh_options(&self) -> Vec<String> {
        let known_hosts = self.path().join("known_hosts");
        let options = [
            "BatchMode=yes".to_owned(),
            "StrictHostKeyChecking=yes".to_owned(),
            "ExitOnForwardFailure=yes".to_owned(),
            format!("UserKnownHostsFile={}", known_hosts.display()),
            "GlobalKnownHostsFile=none".to_owned(),
            format!("Port={}", self.address.port()),
        ];
        let mut words = vec!["-F".to_owned(), "none".to_owned()];
        for option in options {
            words.extend(["-o".to_owned(), option]);
        }
        words
    }

    /// Starts `ssh -N` in the background.
    pub(crate) fn background(&self, name: &str, command: Command) -> Program {
        Program::start(name, command, &self.path().join(format!("{name}.log")))
    }

    /// Starts `ssh -N -L` to `target` and waits for it; where it listens.
    pub(crate) async fn local_forward(&self, target: impl Display) -> (Program, SocketAddr) {
        let port = free_port();
        let ssh = self.ssh(&["-N", "-L", &format!("127.0.0.1:{port}:{target}"), "-v"]);
        let mut ssh = self.background(&format!("ssh-L-{port}"), ssh);
        ssh.says("Entering interactive session").await;
        (ssh, SocketAddr::from(([127, 0, 0, 1], port)))
    }

    /// Stops the agent of a site whose gateway has ended.
    pub(crate) async fn stop_agent(mut self) {
        self.gateway = None;
        self.stop().await;
    }

    /// Stops both sides, which must end well, and checks that every forward in the trails was closed once.
    pub(crate) async fn stop(mut self) {
        for side in [Side::Agent, Side::Gateway] {
            let program = match side {
                Side::Agent => &mut self.agent,
                Side::Gateway => &mut self.gateway,
            };
            let Some(program) = program else { continue };
            // A test may have stopped it already.
            let code = if program.has_ended() { program.ended().await.code() } else { program.stop().await };
            let log = program.log();
            if self.plan.piped == Some(side) {
                assert_eq!(code, Some(0), "{}: {log}", side.name());
                continue;
            }
            let trail = self.trail(side);
            // A test that ends with forwards open has them cut.
            let started = trail.iter().rposition(|record| record["event"] == "trail.started").unwrap_or(0);
            let cut = trail[started..].iter().any(|record| {
                record["reason"] == "drained"
                    && record["event"].as_str().is_some_and(|event| event.starts_with("forward"))
            });
            assert_eq!(code, Some(i32::from(cut)), "{}: {log}", side.name());
            assert_balanced(side, &trail);
        }
    }
}

/// Every opening has one closing record, after it; and nothing follows the stop.
pub(crate) fn assert_balanced(side: Side, trail: &[Value]) {
    let mut open = std::collections::BTreeSet::new();
    for record in trail {
        let forward = record["forward"].as_str().unwrap_or_default();
        match record["event"].as_str().expect("an event") {
            "forward.open" => assert!(open.insert(forward), "{}: opened twice: {record}", side.name()),
            "forward.failed" | "forward.ended" | "forward.abandoned" => {
                assert!(open.remove(forward), "{}: closed, but not open: {record}", side.name());
            }
            // A denial closes an opening, or stands alone.
            "forward.denied" => {
                open.remove(forward);
            }
            _ => {}
        }
    }
    assert!(open.is_empty(), "{}: never closed: {open:?}", side.name());
    assert_eq!(trail.last().expect("a record")["event"], "trail.stopped", "{}", side.name());
}

/// A line of a trail, held to the schema.
pub(crate) fn checked_record(line: &str) -> Value {
    let record = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    caponier::audit::schema::check(&record).unwrap_or_else(|why| panic!("{why}: {line}"));
    record
}

fn is_like(record: &Value, like: &Value) -> bool {
    like.as_object().expect("an object").iter().all(|(field, value)| record[field] == *value)
}

/// A key pair in the files `name` and `name.pub`, unless it is there.
pub(crate) fn make_key(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    if !path.exists() {
        let key = PrivateKey::generate(Algorithm::Ed25519);
        key.write_new(&path).expect("a key");
        fs::write(dir.join(format!("{name}.pub")), key.public().to_openssh()).expect("a public key");
    }
    path
}

/// The public half of a key pair.
pub(crate) fn public(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(format!("{name}.pub"))).expect("a public key")
}

/// Seconds that forwards have after the signal to end: few, because tests end with some that are open.
pub(crate) const DRAIN: u32 = 2;

/// What a service manager does: so many sockets (the first argument), which are this script's standard input and output,
/// become the descriptors from 3 on of the program that the other arguments are.
pub(crate) const ACTIVATE: &str = "
import os, sys
number = int(sys.argv[1])
saved = [os.dup(fd) for fd in range(number)]
high = [os.dup2(fd, 100 + at) for at, fd in enumerate(saved)]
os.closerange(3, 100)
for at, fd in enumerate(high):
    os.dup2(fd, 3 + at, inheritable=True)
    os.close(fd)
null = os.open('/dev/null', os.O_RDONLY)
os.dup2(null, 0, inheritable=True)
os.close(null)
os.dup2(2, 1, inheritable=True)
os.environ.update(LISTEN_FDS=str(number), LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
";

pub(crate) const LISTENING: &str = " listening on ";
pub(crate) const DOOR: &str = " loopback door on ";

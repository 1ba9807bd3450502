//! Bastions without a gateway: the agent that listens, to stock ssh and to our own client; and a stock sshd, to our own
//! client.

use std::fmt::Display;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caponier::identity::{Algorithm, PrivateKey};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::Instant;

use crate::harness::{
    PATIENCE, Program, Said, caponier, checked_record, connect, echo, echoes, eventually, free_port, listen,
    read_to_end, run, web, within,
};
use crate::postgres::{Postgres, SUPERUSER_PASSWORD, bin_directories};

/// Where the agent accepts from, unless a test says otherwise. Clients come from 127.0.0.1; from 127.0.0.2 they are others.
const HERE: &str = "127.0.0.1/32";

/// A folder with keys, and an SSH server in front of targets.
pub(crate) struct Bastion {
    // Dropped in this order: the program ends before its folder goes.
    program: Program,
    pub(crate) address: SocketAddr,
    /// Whom our own key logs in as.
    pub(crate) user: String,
    dir: TempDir,
    rules: String,
}

impl Bastion {
    /// An agent that listens and has no gateway. `own` is its own principal, `speaker` must say for whom it speaks, and
    /// `globex` is another organisation's.
    async fn agent(rules: &str) -> Self {
        let dir = folder();
        fs::write(dir.path().join("agent.toml"), configuration(&dir, rules, &listening(HERE))).expect("written");
        let mut program = start_agent(&dir);
        let line = program.says(LISTENING).await;
        let address = line.split_once(LISTENING).and_then(|(_, rest)| rest.trim().parse().ok()).expect("an address");
        pin(&dir, address);
        Self { program, address, user: "acme".to_owned(), dir, rules: rules.to_owned() }
    }

    /// The agent is given another configuration, and says what it makes of it.
    async fn reload(&mut self, listen: &str, change: impl Fn(String) -> String) -> String {
        let text = change(configuration(&self.dir, &self.rules, listen));
        fs::write(self.path("agent.toml"), text).expect("written");
        let before = self.trail().len();
        self.program.signal("HUP");
        let is_of_reload = |record: &Value| record["event"].as_str().is_some_and(|event| event.starts_with("config."));
        let record =
            eventually("the reload's record", async || self.trail().into_iter().skip(before).find(is_of_reload));
        let record = record.await;
        format!("{}: {}", record["event"].as_str().expect("an event"), record["detail"].as_str().unwrap_or_default())
    }

    /// A stock sshd, which lets our own key in as the user that the test runs as.
    pub(crate) async fn stock(settings: &str) -> Self {
        let dir = folder();
        let port = free_port();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let (path, user) = (dir.path().display(), run(Command::new("id").arg("-un")).await.done().trim().to_owned());
        fs::write(
            dir.path().join("sshd_config"),
            format!(
                "ListenAddress 127.0.0.1:{port}\nHostKey {path}/bastion\nAuthorizedKeysFile {path}/own.pub\nPidFile none\n\
                 UsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n\
                 ClientAliveInterval 5\n{settings}\n"
            ),
        )
        .expect("written");
        if rustix::process::geteuid().is_root() {
            fs::create_dir_all("/run/sshd").expect("sshd's own directory");
        }
        let program = start_sshd(&dir);
        drop(connect(address).await);
        pin(&dir, address);
        Self { program, address, user, dir, rules: String::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn trail(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("agent.jsonl")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(checked_record).collect()
    }

    /// Waits for a record with these fields.
    async fn record(&self, like: Value) -> Value {
        let fits =
            |record: &Value| like.as_object().expect("an object").iter().all(|(key, value)| record[key] == *value);
        let what = format!("a record like {like} among {:#?}", self.trail());
        eventually(&what, async || self.trail().into_iter().find(fits)).await
    }

    /// Stock ssh with this key, as this user. What `arguments` say takes precedence.
    pub(crate) fn ssh(&self, key: &str, user: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command.env_remove("SSH_AUTH_SOCK").args(["-F", "none"]).args(arguments);
        for option in ["BatchMode=yes", "StrictHostKeyChecking=yes", "ExitOnForwardFailure=yes", "IdentitiesOnly=yes"] {
            command.args(["-o", option]);
        }
        command.args(["-o", "IdentityAgent=none", "-o", "GlobalKnownHostsFile=none", "-o"]);
        command.arg(format!("UserKnownHostsFile={}", self.path("known_hosts").display()));
        command.args(["-p", &self.address.port().to_string(), "-i"]).arg(self.path(key));
        command.args(["-l", user, "127.0.0.1"]);
        command
    }

    /// `ssh -N` with a local forward to each target; where they listen.
    async fn forwards(&self, targets: &[SocketAddr]) -> (Program, Vec<SocketAddr>) {
        let ports: Vec<_> = targets.iter().map(|_| free_port()).collect();
        let words: Vec<_> =
            ports.iter().zip(targets).map(|(port, target)| format!("127.0.0.1:{port}:{target}")).collect();
        let mut arguments = vec!["-N", "-v"];
        for word in &words {
            arguments.extend(["-L", word]);
        }
        let name = format!("ssh-{}", ports[0]);
        let mut ssh =
            Program::start(&name, self.ssh("own", &self.user, &arguments), &self.path(&format!("{name}.log")));
        ssh.says("Entering interactive session").await;
        (ssh, ports.iter().map(|port| SocketAddr::from(([127, 0, 0, 1], *port))).collect())
    }

    /// Our own client, without a way of listening and a pin.
    fn client(&self, key: &str) -> Command {
        let mut command = caponier();
        command.args(["forward", "--ssh-host", "127.0.0.1", "--ssh-port", &self.address.port().to_string()]);
        command.args(["--ssh-user", &self.user, "--identity"]).arg(self.path(key));
        command
    }

    /// Our own client with local forwards; where they listen.
    async fn our_forwards(&self, key: &str, more: &[&str], targets: &[SocketAddr]) -> (Program, Vec<SocketAddr>) {
        let mut command = self.client(key);
        command.arg("--known-hosts").arg(self.path("known_hosts")).args(more);
        for target in targets {
            command.args(["-L", &format!("0:{target}")]);
        }
        let name = format!("forward-{}", free_port());
        let mut program = Program::start(&name, command, &self.path(&format!("{name}.log")));
        let mut addresses = Vec::new();
        for target in targets {
            let line = program.says(&format!(" for {target}")).await;
            let (_, rest) = line.split_once("listening ").expect("where it listens");
            addresses.push(rest.split(' ').next().expect("an address").parse().expect("an address"));
        }
        (program, addresses)
    }

    fn fingerprint(&self, key: &str) -> String {
        PrivateKey::read(&self.path(key)).expect("a key").public().fingerprint().to_string()
    }

    /// Ends the agent; each forward in its trail has ended too.
    async fn stop(mut self) {
        let code = self.program.stop().await;
        assert!(matches!(code, Some(0 | 1)), "{code:?}: {}", self.program.log());
        crate::harness::assert_balanced(crate::harness::Side::Agent, &self.trail());
    }
}

fn folder() -> TempDir {
    let dir = tempfile::Builder::new().prefix("caponier-bastion-").tempdir().expect("a folder");
    for name in ["bastion", "own", "speaker", "globex", "stranger"] {
        let key = PrivateKey::generate(Algorithm::Ed25519);
        key.write_new(&dir.path().join(name)).expect("a key");
        fs::write(dir.path().join(format!("{name}.pub")), format!("{}\n", key.public().to_openssh())).expect("written");
    }
    dir
}

fn public(dir: &TempDir, name: &str) -> String {
    fs::read_to_string(dir.path().join(format!("{name}.pub"))).expect("a public key").trim().to_owned()
}

fn pin(dir: &TempDir, address: SocketAddr) {
    let line = format!("[{}]:{} {}\n", address.ip(), address.port(), public(dir, "bastion"));
    fs::write(dir.path().join("known_hosts"), line).expect("written");
}

fn listening(accept_from: &str) -> String {
    format!("[listen]\naddress = \"127.0.0.1:0\"\naccept_from = [\"{accept_from}\"]\n")
}

fn configuration(dir: &TempDir, rules: &str, listen: &str) -> String {
    format!(
        "[agent]\nid = \"prod-eu\"\nreplica = \"one\"\nhost_key = \"bastion\"\ndrain_s = 2\n\
         [audit]\nfile = \"agent.jsonl\"\n{listen}\
         [[organisation]]\nid = \"acme\"\n\
         [[organisation.orchestrator]]\nkey = \"{}\"\n\
         [[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"ci-*\"]\n{rules}\
         [[organisation]]\nid = \"globex\"\n[[organisation.orchestrator]]\nkey = \"{}\"\n",
        public(dir, "own"),
        public(dir, "speaker"),
        public(dir, "globex"),
    )
}

fn start_agent(dir: &TempDir) -> Program {
    let mut command = caponier();
    command.args(["agent", "--config"]).arg(dir.path().join("agent.toml")).env("CAPONIER_LOG", "warn,caponier=debug");
    Program::start("agent", command, &dir.path().join("agent.log"))
}

/// `ssh -D` through a stock sshd, which is a SOCKS5 server; what keeps it up, and where it listens.
pub(crate) async fn dynamic_forward() -> (impl Sized, SocketAddr) {
    let stock = Bastion::stock("AllowTcpForwarding local").await;
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let ssh = stock.ssh("own", &stock.user, &["-N", "-v", "-D", &address.to_string()]);
    let mut ssh = Program::start("ssh-D", ssh, &stock.path("ssh-D.log"));
    ssh.says("Entering interactive session").await;
    ((ssh, stock), address)
}

fn start_sshd(dir: &TempDir) -> Program {
    let mut sshd = Command::new(sshd());
    sshd.args(["-D", "-e", "-f"]).arg(dir.path().join("sshd_config"));
    Program::start("sshd", sshd, &dir.path().join("sshd.log"))
}

/// It wants to be called by its whole path, and is not in everybody's.
fn sshd() -> PathBuf {
    let places = ["/usr/sbin/sshd", "/usr/local/sbin/sshd", "/usr/bin/sshd"];
    places.iter().map(Path::new).find(|path| path.exists()).expect("sshd (apt-get install openssh-server)").to_owned()
}

/// A rule for these targets.
fn allow(targets: &[SocketAddr]) -> String {
    let rule = |target: &SocketAddr| {
        let (ip, port) = (target.ip(), target.port());
        format!("[[organisation.allow]]\nname = \"to-{port}\"\naddresses = [\"{ip}/32\"]\nports = [{port}]\n")
    };
    targets.iter().map(rule).collect()
}

const LISTENING: &str = " listening on ";

#[tokio::test]
async fn nobody_logs_in_with_one_thing_wrong_and_nobody_is_told_which() {
    let target = echo().await;
    let bastion = Bastion::agent(&allow(&[target])).await;
    let to = target.to_string();
    let mut words = Vec::new();
    for (key, user, reason) in [
        ("stranger", "acme", "unknown_key"),
        ("globex", "acme", "other_organisation"),
        ("own", "globex", "other_organisation"),
        ("own", "nobody", "unknown_organisation"),
        ("own", "acme/prod-eu", "malformed_user"),
        ("own", "root", "unknown_organisation"),
    ] {
        let said = run(&mut bastion.ssh(key, user, &["-W", &to])).await;
        assert_eq!(said.code(), 255, "{key} as {user}: {said:?}");
        words.push(said.stderr.trim().replace(user, "USER"));
        let key = bastion.fingerprint(key);
        bastion.record(json!({"event": "auth.refused", "reason": reason, "key": key, "door": "listen"})).await;
    }
    assert!(words.windows(2).all(|pair| pair[0] == pair[1]), "they can be told apart: {words:?}");
    assert!(!bastion.trail().iter().any(|record| record["event"] == "auth.accepted"), "somebody was let in");

    // From elsewhere not a byte is read or written.
    let said = run(&mut bastion.ssh("own", "acme", &["-b", "127.0.0.2", "-W", &to])).await;
    assert_eq!(said.code(), 255, "{said:?}");
    assert!(!said.stderr.contains("Permission denied"), "{said:?}");
    bastion.record(json!({"event": "auth.refused", "reason": "source_network", "door": "listen"})).await;
    assert!(!bastion.trail().iter().any(|record| record["event"] == "auth.accepted"), "somebody was let in");

    // The same with nothing wrong.
    let (_ssh, local) = bastion.forwards(&[target]).await;
    echoes(connect(local[0]).await, b"what is let in").await;
    bastion.record(json!({"event": "auth.accepted", "organisation": "acme", "door": "listen"})).await;
    bastion.stop().await;
}

#[tokio::test]
async fn nothing_is_opened_with_one_thing_wrong() {
    let (target, other) = (echo().await, echo().await);
    let mut bastion = Bastion::agent(&allow(&[target])).await;
    let refused = |said: &Said| {
        assert_eq!(said.code(), 255, "{said:?}");
        assert!(said.stderr.contains("administratively prohibited: not allowed"), "{said:?}");
    };
    for (key, user, to, reason) in [
        ("own", "acme", other.to_string(), "port"),
        ("own", "acme", format!("127.0.0.2:{}", target.port()), "no_rule"),
        ("own", "acme", format!("localhost:{}", target.port()), "no_rule"),
        ("own", "acme", format!("2130706433:{}", target.port()), "malformed_target"),
        // A stock client has no way to say for whom it asks.
        ("speaker", "acme", target.to_string(), "principal_missing"),
        ("globex", "globex", target.to_string(), "no_rule"),
    ] {
        let said = run(&mut bastion.ssh(key, user, &["-W", &to])).await;
        refused(&said);
        let key = bastion.fingerprint(key);
        let record =
            bastion.record(json!({"event": "forward.denied", "key": key, "target": to, "door": "listen"})).await;
        assert_eq!(record["reason"], reason, "{record}");
        assert!(record["client"].as_str().is_some_and(|client| client.starts_with("127.0.0.1:")), "{record}");
    }
    // What is allowed and does not answer is something else.
    let closed = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let rules = format!("{}{}", allow(&[target]), allow(&[closed]));
    bastion.rules = rules;
    bastion.reload(&listening(HERE), |text| text).await;
    let said = run(&mut bastion.ssh("own", "acme", &["-W", &closed.to_string()])).await;
    assert!(said.stderr.contains("connect failed: not available"), "{said:?}");

    // No shell, no command, no subsystem, no way back, no local socket.
    for (options, command) in [
        (&["-T"][..], None),
        (&["-tt"], None),
        (&["-T"], Some("true")),
        (&["-s"], Some("sftp")),
        (&["-s"], Some("control@caponier")),
        (&["-N", "-R", "0:127.0.0.1:1"], None),
        (&["-N", "-R", "127.0.0.1:2222:127.0.0.1:1"], None),
        (&["-N", "-R", "/tmp/caponier-test-socket:127.0.0.1:1"], None),
    ] {
        let said = run(bastion.ssh("own", "acme", options).args(command)).await;
        assert_eq!(said.code(), 255, "{options:?} {command:?}: {said:?}");
        assert!(!said.stderr.contains("Permission denied"), "{options:?} {command:?}: {said:?}");
    }
    let (_ssh, local) = bastion.forwards(&[target]).await;
    echoes(connect(local[0]).await, b"and still it serves").await;
    bastion.stop().await;
}

#[tokio::test]
async fn stock_ssh_reaches_postgresql_and_a_web_server() {
    let server = Postgres::start("localhost").await;
    let web = web().await;
    let port = server.address.port();
    let rules = format!(
        "[[organisation.allow]]\nname = \"db\"\nhosts = [\"localhost\"]\nwithin = [\"127.0.0.0/8\"]\nports = [{port}]\n{}",
        allow(&[web, server.address])
    );
    let bastion = Bastion::agent(&rules).await;
    let (_ssh, local) = bastion.forwards(&[server.address]).await;
    let mut psql = Command::new(bin_directories()[0].join("psql"));
    psql.env_clear().env("PGPASSWORD", SUPERUSER_PASSWORD).env("PGSSLMODE", "verify-full");
    psql.env("PGSSLROOTCERT", server.ca_file());
    let connection =
        format!("host=localhost hostaddr=127.0.0.1 port={} user=postgres dbname=postgres", local[0].port());
    let answer = run(psql.args(["-XAtq", "-c", "SELECT 6 * 7", &connection])).await.done();
    assert_eq!(answer.trim(), "42");

    let said = run(Command::new("sh").arg("-c").arg("printf 'GET / HTTP/1.1\\r\\n\\r\\n' | \"$@\"").arg("sh").args({
        let ssh = bastion.ssh("own", "acme", &["-W", &web.to_string()]);
        let ssh = ssh.as_std();
        std::iter::once(ssh.get_program()).chain(ssh.get_args()).map(ToOwned::to_owned).collect::<Vec<_>>()
    }))
    .await;
    assert!(said.stdout.ends_with("hello through the tunnel"), "{said:?}");

    let socks = free_port();
    let ssh = bastion.ssh("own", "acme", &["-N", "-v", "-D", &format!("127.0.0.1:{socks}")]);
    let mut ssh = Program::start("ssh-D", ssh, &bastion.path("ssh-D.log"));
    ssh.says("Entering interactive session").await;
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--noproxy", "", "--socks5-hostname", &format!("127.0.0.1:{socks}"), &format!("http://{web}/")]);
    assert_eq!(run(&mut curl).await.done(), "hello through the tunnel");
    let record = bastion.record(json!({"event": "forward.ended", "target": web.to_string()})).await;
    assert_eq!((&record["principal"], &record["door"]), (&json!(bastion.fingerprint("own")), &json!("listen")));
    drop((ssh, _ssh));
    bastion.stop().await;
}

#[tokio::test]
async fn what_the_configuration_takes_back_is_cut_and_what_it_changes_holds() {
    let target = echo().await;
    let mut bastion = Bastion::agent(&allow(&[target])).await;
    let (mut ssh, local) = bastion.forwards(&[target]).await;
    let open = connect(local[0]).await;

    // Something else: nobody is touched.
    let said =
        bastion.reload("[listen]\naddress = \"127.0.0.1:0\"\naccept_from = [\"127.0.0.0/8\"]\n", |text| text).await;
    assert!(said.contains("config.reloaded") && said.contains("listen 127.0.0.1:0"), "{said}");
    assert!(!ssh.has_ended());
    let said = run(&mut bastion.ssh("speaker", "acme", &["-b", "127.0.0.2", "-W", "127.0.0.1:1"])).await;
    assert!(said.stderr.contains("not allowed"), "who is accepted now gets as far as the rules: {said:?}");

    // A port that is taken: nothing of it holds.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let taken = taken.local_addr().map(|address| (taken, address)).expect("its address");
    let listen = format!("[listen]\naddress = \"{}\"\naccept_from = [\"{HERE}\"]\n", taken.1);
    let said = bastion.reload(&listen, |text| text).await;
    assert!(said.contains("config.rejected") && said.contains("could not listen"), "{said}");
    assert!(!ssh.has_ended());
    echoes(connect(local[0]).await, b"as before").await;

    // The key is no longer there.
    let (own, stranger) = (public(&bastion.dir, "own"), public(&bastion.dir, "stranger"));
    let said = bastion.reload(&listening(HERE), |text| text.replace(&own, &stranger)).await;
    assert!(said.contains("config.reloaded"), "{said}");
    assert_eq!(read_to_end(open).await, b"");
    within("the session's end", ssh.ended()).await;
    bastion.record(json!({"event": "forward.ended", "reason": "revoked"})).await;

    // The network is no longer accepted, then there is no listener at all.
    let said = bastion.reload(&listening(HERE), |text| text).await;
    assert!(said.contains("config.reloaded"), "{said}");
    for listen in [listening("127.0.0.9/32"), String::new()] {
        let said = bastion.reload(&listening(HERE), |text| text).await;
        assert!(said.starts_with("config.reloaded"), "{said}");
        let (mut ssh, local) = bastion.forwards(&[target]).await;
        let open = connect(local[0]).await;
        let gateways =
            if listen.is_empty() { "id = \"acme\"\ngateways = [\"ssh://127.0.0.1:9\"]" } else { "id = \"acme\"" };
        let globex = gateways.replace("acme", "globex");
        let change = |text: String| text.replace("id = \"acme\"", gateways).replace("id = \"globex\"", &globex);
        let said = bastion.reload(&listen, change).await;
        assert!(said.starts_with("config.reloaded"), "{said}");
        assert_eq!(read_to_end(open).await, b"");
        within("the session's end", ssh.ended()).await;
    }
    eventually("nobody listens any more", async || TcpStream::connect(bastion.address).await.err()).await;
    bastion.stop().await;
}

#[tokio::test]
async fn a_drain_takes_on_nothing_new_and_lets_what_runs_end() {
    let target = echo().await;
    let mut bastion = Bastion::agent(&allow(&[target])).await;
    let (mut ssh, local) = bastion.forwards(&[target]).await;
    let mut open = connect(local[0]).await;
    echoes(&mut open, b"before").await;
    bastion.program.signal("TERM");
    bastion.record(json!({"event": "drain.began"})).await;
    eventually("nobody is accepted", async || TcpStream::connect(bastion.address).await.err()).await;
    let refused = connect(local[0]).await;
    assert_eq!(read_to_end(refused).await, b"");
    bastion.record(json!({"event": "forward.denied", "reason": "draining"})).await;
    echoes(&mut open, b"meanwhile").await;
    drop(open);
    bastion.record(json!({"event": "forward.ended", "reason": "eof"})).await;
    within("the session's end", ssh.ended()).await;
    assert_eq!(bastion.program.ended().await.code(), Some(0), "{}", bastion.program.log());
}

#[tokio::test]
async fn who_says_nothing_or_not_enough_is_cut_and_in_nobodys_way() {
    let target = echo().await;
    let bastion = Bastion::agent(&allow(&[target])).await;
    let begun = Instant::now();
    let silent = connect(bastion.address).await;
    let mut half = connect(bastion.address).await;
    half.write_all(b"SSH-2.0-half\r\n").await.expect("written");
    let mut garbage = connect(bastion.address).await;
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("written");
    assert_eq!(read_to_end(garbage).await, b"", "what is not SSH gets no answer");
    let (_ssh, local) = bastion.forwards(&[target]).await;
    echoes(connect(local[0]).await, b"beside them").await;
    assert_eq!(read_to_end(silent).await, b"SSH-2.0-caponier_1\r\n");
    let said = read_to_end(half).await;
    assert!(said.starts_with(b"SSH-2.0-caponier_1\r\n"), "{:?}", String::from_utf8_lossy(&said));
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(18) && took < PATIENCE, "{took:?}");
    bastion.record(json!({"event": "auth.refused", "reason": "identification", "door": "listen"})).await;
    bastion.record(json!({"event": "auth.refused", "reason": "timeout", "door": "listen"})).await;
    bastion.stop().await;
}

#[tokio::test]
async fn bytes_are_the_same_both_ways_and_a_reader_that_stalls_holds_nobody_up() {
    let source = listen(async |mut stream| {
        let chunk: Vec<u8> = (0..=255).cycle().take(64 * 1024).collect();
        while stream.write_all(&chunk).await.is_ok() {}
    })
    .await;
    let target = echo().await;
    let bastion = Bastion::agent(&allow(&[source, target])).await;
    let bytes: Vec<u8> = (0..32 * 1024 * 1024u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for ours in [false, true] {
        let (_stalled, stalled) = match ours {
            false => bastion.forwards(&[source, target]).await,
            true => bastion.our_forwards("own", &[], &[source, target]).await,
        };
        // It begins, and then nobody reads.
        let mut reader = connect(stalled[0]).await;
        reader.read_exact(&mut [0; 1024]).await.expect("the beginning");
        let (_second, local) = match ours {
            false => bastion.forwards(&[target]).await,
            true => bastion.our_forwards("own", &[], &[target]).await,
        };
        both_ways(connect(local[0]).await, &bytes).await;
        drop(reader);
    }
    bastion.stop().await;
}

/// Sends all of it and reads it back at the same time.
async fn both_ways(stream: TcpStream, bytes: &[u8]) {
    let (mut read, mut write) = stream.into_split();
    within("all bytes", async {
        let mut back = Vec::with_capacity(bytes.len());
        let receive = async {
            read.read_to_end(&mut back).await.expect("read");
        };
        let send = async {
            write.write_all(bytes).await.expect("written");
            write.shutdown().await.expect("ended");
        };
        tokio::join!(send, receive);
        assert!(back == bytes, "what came back is something else");
    })
    .await;
}

#[tokio::test]
async fn our_client_says_for_whom_a_key_speaks() {
    let target = echo().await;
    let rule = format!("{}principals = [\"ci-1\"]\n", allow(&[target]));
    let bastion = Bastion::agent(&rule).await;
    let (_one, local) = bastion.our_forwards("speaker", &["--principal", "ci-1"], &[target]).await;
    echoes(connect(local[0]).await, b"in the name of ci-1").await;
    let record = bastion.record(json!({"event": "forward.ended", "principal": "ci-1"})).await;
    assert_eq!(record["asserted_by"], bastion.fingerprint("speaker"), "{record}");
    assert!(record["client"].as_str().is_some_and(|client| client.starts_with("127.0.0.1:")), "{record}");
    for (key, principal, reason) in [
        ("speaker", Some("ci-2"), "principal"),
        ("speaker", Some("root"), "principal_not_asserted"),
        ("speaker", None, "principal_missing"),
        ("own", Some("ci-1"), "principal_not_asserted"),
        ("own", None, "principal"),
    ] {
        let more: Vec<_> = principal.iter().flat_map(|principal| ["--principal", principal]).collect();
        let (mut program, local) = bastion.our_forwards(key, &more, &[target]).await;
        assert_eq!(read_to_end(connect(local[0]).await).await, b"");
        program.says("is not allowed").await;
        let key = bastion.fingerprint(key);
        bastion.record(json!({"event": "forward.denied", "key": key, "reason": reason, "door": "listen"})).await;
    }
    bastion.stop().await;

    let stock = Bastion::stock("").await;
    let mut command = stock.client("own");
    command.arg("--known-hosts").arg(stock.path("known_hosts")).args(["--principal", "ci-1", "-L", "0:127.0.0.1:1"]);
    let said = run(&mut command).await;
    assert!(said.code() == 1 && said.stderr.contains("is no caponier agent"), "{said:?}");
}

#[tokio::test]
async fn a_stock_sshd_is_a_bastion_too() {
    let (one, other, closed) = (echo().await, echo().await, SocketAddr::from(([127, 0, 0, 1], free_port())));
    let (barred, source) = (echo().await, web().await);
    let permitted = format!("PermitOpen {one} {other} {closed} {source}\nRekeyLimit 8M\nAllowTcpForwarding yes");
    let mut stock = Bastion::stock(&permitted).await;
    let (mut program, local) = stock.our_forwards("own", &[], &[one, other, closed, barred]).await;
    echoes(connect(local[0]).await, b"one").await;
    echoes(connect(local[1]).await, b"other").await;
    assert_eq!(read_to_end(connect(local[2]).await).await, b"");
    program.says(&format!("{closed} is not available: does its name resolve at SSH server")).await;
    assert_eq!(read_to_end(connect(local[3]).await).await, b"");
    program.says(&format!("connecting to {barred} is not allowed, by SSH server")).await;
    let bytes: Vec<u8> = (0..24 * 1024 * 1024u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    both_ways(connect(local[0]).await, &bytes).await;

    // It is started again: the next connection finds it.
    stock.program.kill().await;
    let again = start_sshd(&stock.dir);
    drop(connect(stock.address).await);
    stock.program = again;
    eventually("the session is made anew", async || {
        let mut stream = TcpStream::connect(local[1]).await.ok()?;
        stream.write_all(b"again").await.ok()?;
        let mut back = [0; 5];
        stream.read_exact(&mut back).await.ok().filter(|_| back == *b"again")
    })
    .await;
}

#[tokio::test]
async fn a_server_that_is_not_the_pinned_one_is_refused() {
    let stock = Bastion::stock("").await;
    let direct = Bastion::agent("").await;
    for bastion in [&stock, &direct] {
        let shown = bastion.fingerprint("bastion");
        let wrong = bastion.fingerprint("stranger");
        let said = run(bastion.client("own").args(["--host-key-fingerprint", &wrong, "-L", "0:127.0.0.1:1"])).await;
        assert_eq!(said.code(), 1, "{said:?}");
        assert!(said.stderr.contains(&format!("shows host key {shown}, which is not the one pinned")), "{said:?}");
        let said = run(bastion.client("own").args(["-L", "0:127.0.0.1:1"])).await;
        assert_eq!(said.code(), 2, "without a pin: {said:?}");
        fs::write(bastion.path("others"), format!("elsewhere {}\n", public(&bastion.dir, "bastion"))).expect("written");
        let others = bastion.path("others").display().to_string();
        let said = run(bastion.client("own").args(["--known-hosts", &others, "-L", "0:127.0.0.1:1"])).await;
        assert!(said.code() == 2 && said.stderr.contains("has no key for"), "{said:?}");
        let said =
            run(bastion.client("stranger").args(["--host-key-fingerprint", &shown, "-L", "0:127.0.0.1:1"])).await;
        assert!(said.code() == 1 && said.stderr.contains("did not let key"), "{said:?}");
    }
    let said = run(direct.client("own").args(["--gateway", "ssh://g", "--agent", "acme/prod-eu"])).await;
    assert_eq!(said.code(), 2, "two ways: {said:?}");
}

/// A resources file for a way there.
fn resources(bastion: &Bastion, server: &Postgres, pin: impl Display) -> PathBuf {
    let file = bastion.path("resources.toml");
    let text = format!(
        "[provision]\nssh_host = \"127.0.0.1\"\nssh_port = {}\nssh_user = \"{}\"\nidentity = \"own\"\n\
         host_key_fingerprint = \"{pin}\"\nid = \"orders\"\noutput = \"credentials.json\"\n\
         [instance]\nhost = \"localhost\"\nport = {}\nuser = \"postgres\"\nca_file = \"{}\"\n\
         [[database]]\nname = \"orders\"\n",
        bastion.address.port(),
        bastion.user,
        server.address.port(),
        server.ca_file().display()
    );
    fs::write(&file, text).expect("written");
    file
}

async fn provision(verb: &str, file: &Path) -> Said {
    let mut command = caponier();
    command.args(["provision", verb, "-f"]).arg(file).env("CAPONIER_DATABASE_PASSWORD", SUPERUSER_PASSWORD);
    run(&mut command).await
}

#[tokio::test]
async fn databases_are_provisioned_through_either_kind_of_bastion() {
    let server = Postgres::start("localhost").await;
    let port = server.address.port();
    let rules = format!(
        "[[organisation.allow]]\nname = \"db\"\nhosts = [\"localhost\"]\nwithin = [\"127.0.0.0/8\"]\nports = [{port}]\n"
    );
    let bastions = [Bastion::agent(&rules).await, Bastion::stock("AllowTcpForwarding yes").await];
    for bastion in &bastions {
        let count = async || -> i64 {
            let client = server.superuser("postgres").await;
            let row = client.query_one("SELECT count(*) FROM pg_database WHERE datname = 'orders'", &[]).await;
            row.expect("a count").get(0)
        };
        let file = resources(bastion, &server, bastion.fingerprint("stranger"));
        let said = provision("apply", &file).await;
        assert!(said.code() == 1 && said.stderr.contains("not the one pinned"), "{said:?}");
        assert_eq!((count().await, bastion.path("credentials.json").exists()), (0, false));

        let file = resources(bastion, &server, bastion.fingerprint("bastion"));
        let said = provision("apply", &file).await;
        assert_eq!(said.code(), 0, "{said:?}");
        assert_eq!(count().await, 1);
        let text = fs::read_to_string(bastion.path("credentials.json")).expect("credentials");
        assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON")[0]["username"], "orders");
        let said = provision("apply", &file).await;
        assert!(said.code() == 0 && said.stderr.contains("done: 0 step(s) taken"), "{said:?}");
        let said = provision("destroy", &file).await;
        assert_eq!((said.code(), count().await), (0, 0), "{said:?}");
    }
    let [direct, stock] = bastions;
    // What the bastion does not allow is a refusal, with the exit code of one.
    let barred = Bastion::stock("AllowTcpForwarding no").await;
    let said = provision("plan", &resources(&barred, &server, barred.fingerprint("bastion"))).await;
    assert_eq!(said.code(), 3, "{said:?}");
    drop(stock);
    direct.stop().await;
}

#[tokio::test]
async fn a_stock_sshd_takes_our_certificate_where_it_trusts_the_ca() {
    let target = echo().await;
    let folder = tempfile::tempdir().expect("a folder");
    let authority = folder.path().join("user-ca");
    let key = PrivateKey::generate(Algorithm::Ed25519);
    key.write_new(&authority).expect("a key");
    fs::write(folder.path().join("user-ca.pub"), format!("{}\n", key.public().to_openssh())).expect("written");
    let settings = format!("TrustedUserCAKeys {}.pub\nAllowTcpForwarding yes", authority.display());
    let stock = Bastion::stock(&settings).await;
    let sign = async |principal: &str| {
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-I", "speaker", "-V", "always:forever", "-n", principal, "-s"]).arg(&authority);
        run(keygen.arg(stock.path("speaker.pub"))).await.done();
    };
    // For somebody else, which is told before the server says no.
    sign("somebody-else").await;
    let pin = ["--host-key-fingerprint", &stock.fingerprint("bastion")];
    let said = run(stock.client("speaker").args(pin).args(["-L", "0:127.0.0.1:1"])).await;
    assert_eq!(said.code(), 1, "{said:?}");
    let told = format!("the certificate is for somebody-else, and not for {}", stock.user);
    assert!(said.stderr.contains(&told) && said.stderr.contains("nor with the certificate \"speaker\""), "{said:?}");
    sign(&stock.user).await;
    let (_program, local) = stock.our_forwards("speaker", &[], &[target]).await;
    echoes(connect(local[0]).await, b"by certificate").await;
    // Another key has no use of it.
    let certificate = stock.path("speaker-cert.pub").display().to_string();
    let said = run(stock.client("own").args(pin).args(["-L", "0:127.0.0.1:1", "--certificate", &certificate])).await;
    assert!(said.code() == 2 && said.stderr.contains("it serves no other key"), "{said:?}");
}

#[tokio::test]
async fn who_fails_too_often_at_an_agent_is_turned_away_as_its_configuration_says() {
    let target = echo().await;
    let mut bastion = Bastion::agent(&allow(&[target])).await;
    let with = |settings: &str| {
        let table = format!("[agent.penalties]\n{settings}\n[audit]");
        move |text: String| text.replace("[audit]", &table)
    };
    // Left out, this host's own addresses are exempt; an empty list exempts nobody.
    let taken = bastion.reload(&listening(HERE), with("exempt = []")).await;
    assert_eq!(taken, "config.reloaded: changed: penalties");
    eventually("the address is turned away", async || {
        let mut stream = connect(bastion.address).await;
        drop(stream.write_all(b"garbage\r\n\r\n").await);
        // A reset, where it is not even listened to.
        drop(within("the end", stream.read_to_end(&mut Vec::new())).await);
        bastion.trail().iter().any(|record| record["reason"] == "too_many_failures").then_some(())
    })
    .await;
    let taken = bastion.reload(&listening(HERE), with("enabled = false")).await;
    assert_eq!(taken, "config.reloaded: changed: penalties");
    let (program, local) = bastion.our_forwards("own", &[], &[target]).await;
    echoes(connect(local[0]).await, b"served").await;
    drop(program);
    let wrong = bastion.reload(&listening(HERE), with("exempt = [\"everybody\"]")).await;
    assert!(wrong.starts_with("config.rejected: "), "{wrong}");
    bastion.stop().await;
}

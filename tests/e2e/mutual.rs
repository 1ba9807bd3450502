//! Mutual TLS under the customer's control: who is let in with which certificate, what a revocation, an end and a renewal do to
//! what runs, and which configurations do not start.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::harness::{Program, caponier, echo, echoes, read_to_end, run, within};
use crate::pki::{Authority, Leaf};
use crate::yard::Yard;

const GOOD: &str = "caponier://acme/agents/prod-eu";
const MISSING: &str = "client_certificate_missing";

/// A gateway's folder, and those who certify.
struct World {
    yard: Yard,
    /// Of the gateway's certificate.
    web: Authority,
    /// Of the customer's.
    corp: Authority,
    gateway: SocketAddr,
    door: Option<SocketAddr>,
    target: SocketAddr,
}

impl World {
    /// A gateway whose one listener has these lines, for the organisation `acme` with this `acme.toml`, of which `client-ca`
    /// holds the customer's CA where `registered`.
    async fn start(listener: &str, acme: &str, registered: bool) -> Self {
        let mut world = Self::prepare(registered).await;
        world.yard.write("keys/organisations/acme.toml", acme);
        let config = world.config(listener);
        let (gateway, doors) = world.yard.gateway("gateway", &config).await;
        (world.gateway, world.door) = (gateway, doors.first().copied());
        world
    }

    async fn prepare(registered: bool) -> Self {
        let yard = Yard::new();
        let (web, corp) = (Authority::new(&yard.path(""), "web"), Authority::new(&yard.path(""), "corp"));
        web.sign("gateway", &Leaf::new("127.0.0.1", 1));
        for key in ["host", "login-acme"] {
            yard.key(key);
        }
        yard.register("acme/agents/prod-eu", "agent");
        yard.principal("acme/principals/ci", "ci", "agents = [\"*\"]");
        if registered {
            fs::create_dir_all(yard.path("keys/organisations/acme/client-ca")).expect("a folder");
            yard.write("keys/organisations/acme/client-ca/corp.pem", &corp.pem());
        }
        let (target, gateway) = (echo().await, SocketAddr::from(([127, 0, 0, 1], 0)));
        Self { yard, web, corp, gateway, door: None, target }
    }

    fn config(&self, listener: &str) -> String {
        format!(
            "[gateway]\nhost_key = \"host\"\nregistry = \"keys\"\n[audit]\nfile = \"gateway.jsonl\"\n\
             [[certificate]]\nchain = \"gateway.pem\"\nkey = \"gateway.key\"\n\
             [[listener]]\naddress = \"127.0.0.1:0\"\n{listener}\n\
             [[organisation]]\nid = \"acme\"\nlogin_key = \"login-acme\"\n\
             [[local]]\nlisten = \"127.0.0.1:0\"\nagent = \"acme/prod-eu\"\ntarget = \"{}\"\nprincipal = \"ci\"\n",
            self.target
        )
    }

    /// Registers what the customer's CA has revoked.
    fn revoke(&self, serials: &[u64]) {
        self.revoke_until(serials, SystemTime::now() + Duration::from_secs(3600));
    }

    fn revoke_until(&self, serials: &[u64], end: SystemTime) {
        let text = self.corp.revoke("corp", serials, end);
        // Whole or not at all, as whoever fetches such lists should do it.
        self.yard.write("keys/organisations/acme/client-ca/.corp.crl", &text);
        let folder = self.yard.path("keys/organisations/acme/client-ca");
        fs::rename(folder.join(".corp.crl"), folder.join("corp.crl")).expect("renamed");
    }

    /// Starts an agent of this name, which shows a certificate if it has one.
    async fn agent(&mut self, name: &str, transport: &str, certificate: Option<&str>) {
        let gateways = format!("\"{transport}://{}\"", self.gateway);
        self.agent_by(name, &gateways, certificate).await;
    }

    /// The same, with these gateways.
    async fn agent_by(&mut self, name: &str, gateways: &str, certificate: Option<&str>) {
        let shows = certificate
            .map_or(String::new(), |file| format!("tls_certificate = \"{file}.pem\"\ntls_key = \"{file}.key\"\n"));
        let config = format!(
            "[agent]\nid = \"prod-eu\"\nreplica = \"{name}\"\nhost_key = \"agent\"\ntls_ca_file = \"web.pem\"\n{shows}\
             [audit]\nfile = \"{name}.jsonl\"\n\
             [[organisation]]\nid = \"acme\"\ngateways = [{gateways}]\n\
             [[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n\
             [[organisation.allow]]\nname = \"echo\"\naddresses = [\"127.0.0.1/32\"]\nports = [{}]\n",
            self.yard.public("login-acme"),
            self.target.port()
        );
        self.yard.agent(name, &config).await;
    }

    /// What the gateway records of the next one who comes, from the `from`th record on: that it was let in, or not.
    async fn outcome(&self, from: usize, what: &str) -> Value {
        let wanted = |entry: &Value| {
            ["link.up", "auth.refused", "auth.accepted"].iter().any(|kind| entry["event"] == *kind)
                // On a machine that does much else, who is about to speak TLS may be taken for one who waits for our line.
                && entry["reason"] != "identification"
        };
        self.yard.entry("gateway", from, what, wanted).await
    }

    fn entries(&self) -> usize {
        self.yard.trail("gateway").len()
    }

    /// `ssh -N -L` as `ci`, over TLS made by OpenSSL, which shows a certificate if it has one.
    fn ssh(&self, certificate: Option<&str>) -> Command {
        let path = |name: &str| self.yard.path(name).display().to_string();
        let shows = certificate.map_or(String::new(), |name| {
            format!(" -cert {} -key {}", path(&format!("{name}.pem")), path(&format!("{name}.key")))
        });
        let proxy = format!(
            "openssl s_client -quiet -verify_quiet -connect {} -CAfile {}{shows}",
            self.gateway,
            path("web.pem")
        );
        self.ssh_through(Some(&proxy))
    }

    fn ssh_through(&self, proxy: Option<&str>) -> Command {
        let known = self.yard.path("known_hosts");
        fs::write(&known, format!("* {}\n", self.yard.public("host"))).expect("written");
        let mut command = Command::new("ssh");
        command.env_remove("SSH_AUTH_SOCK").args(["-F", "none", "-v", "-N", "-o", "BatchMode=yes"]);
        command.args(["-o", &format!("UserKnownHostsFile={}", known.display()), "-o", "StrictHostKeyChecking=yes"]);
        command.args(["-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-i"]).arg(self.yard.path("ci"));
        if let Some(proxy) = proxy {
            command.args(["-o", &format!("ProxyCommand={proxy}")]);
        }
        command.args(["-p", &self.gateway.port().to_string(), "-l", "acme/prod-eu", "127.0.0.1"]);
        command
    }
}

/// What is expected of somebody who comes.
enum Expected {
    /// Is let in, with this mark.
    Up(String),
    /// Is not, with this reason.
    Refused(&'static str),
}
use Expected::{Refused, Up};

/// All that an agent could show, with the reason for which it is refused where certificates count.
fn certificates(world: &World) -> Vec<(&'static str, Option<&'static str>, Option<&'static str>)> {
    let other = Authority::new(&world.yard.path(""), "other");
    world.corp.sign("good", &Leaf::new(GOOD, 1));
    world.corp.sign("of-b", &Leaf::new("caponier://acme/agents/prod-us", 2));
    world.corp.sign("of-ci", &Leaf::new("caponier://acme/principals/ci", 3));
    world.corp.sign("expired", &Leaf::new(GOOD, 4).expired());
    world.corp.sign("early", &Leaf::new(GOOD, 5).early());
    world.corp.sign("revoked", &Leaf::new(GOOD, 6));
    other.sign("foreign", &Leaf::new(GOOD, 7));
    world.corp.sign("server", &Leaf { for_servers: true, ..Leaf::new(GOOD, 8) });
    let between = world.corp.below("between");
    between.sign("through", &Leaf::new(GOOD, 9));
    let path = world.yard.path("through.pem");
    let chain = fs::read_to_string(&path).expect("read") + &between.pem();
    fs::write(path, chain).expect("written");
    world.revoke(&[6]);
    vec![
        ("its own", Some("good"), None),
        ("agent B's", Some("of-b"), Some("client_certificate_other_name")),
        ("a principal's", Some("of-ci"), Some("client_certificate_other_name")),
        ("one that has expired", Some("expired"), Some("client_certificate_expired")),
        ("one that is not valid yet", Some("early"), Some("client_certificate_not_yet_valid")),
        ("one that was revoked", Some("revoked"), Some("client_certificate_revoked")),
        ("one of another CA", Some("foreign"), Some("client_certificate_unknown_ca")),
        ("a server's", Some("server"), Some("client_certificate_invalid")),
        ("one of which no list says anything", Some("through"), Some("client_certificate_revocation_unknown")),
        ("none", None, Some(MISSING)),
    ]
}

async fn shows_everything(mode: &str, of_organisation: bool) {
    let (listener, acme) = match of_organisation {
        true => (String::new(), format!("client_auth = \"{mode}\"")),
        false => (format!("client_auth = \"{mode}\""), String::new()),
    };
    let mut world = World::prepare(true).await;
    let cases = certificates(&world);
    world.yard.write("keys/organisations/acme.toml", &acme);
    let config = world.config(&listener);
    (world.gateway, _) = world.yard.gateway("gateway", &config).await;
    for (number, (what, certificate, flaw)) in cases.into_iter().enumerate() {
        let fingerprint = |name: &str| {
            let pem = fs::read_to_string(world.yard.path(&format!("{name}.pem"))).expect("read");
            fingerprint(&pem)
        };
        let expected = match (mode, flaw) {
            ("off", _) => Up("null".to_owned()),
            ("loose", Some(MISSING)) => Up("missing".to_owned()),
            (_, Some(flaw)) => Refused(flaw),
            (_, None) => Up(certificate.map(fingerprint).expect("one")),
        };
        let (from, name) = (world.entries(), format!("agent-{number}"));
        world.agent(&name, "tls", certificate).await;
        let entry = world.outcome(from, what).await;
        match expected {
            Up(mark) if mark == "null" => {
                assert!(
                    entry["event"] == "link.up" && entry["client_certificate"].is_null(),
                    "{mode}, {what}: {entry}"
                );
            }
            Up(mark) => {
                assert!(entry["event"] == "link.up" && entry["client_certificate"] == mark, "{mode}, {what}: {entry}")
            }
            Refused(reason) => {
                assert!(entry["event"] == "auth.refused" && entry["reason"] == reason, "{mode}, {what}: {entry}");
            }
        }
        world.yard.program(&name).kill().await;
    }
}

fn fingerprint(pem: &str) -> String {
    use base64::Engine as _;
    let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let der = base64::engine::general_purpose::STANDARD.decode(body).expect("base64");
    caponier::identity::Fingerprint::of(&der).to_string()
}

#[tokio::test]
async fn a_strict_listener_lets_in_who_has_a_certificate_of_their_own() {
    shows_everything("strict", false).await;
}

#[tokio::test]
async fn a_loose_listener_marks_who_has_none_and_refuses_bad_ones() {
    shows_everything("loose", false).await;
}

#[tokio::test]
async fn a_strict_organisation_holds_at_every_listener() {
    shows_everything("strict", true).await;
}

#[tokio::test]
async fn who_is_not_asked_is_not_marked() {
    shows_everything("off", false).await;
}

#[tokio::test]
async fn a_raw_link_has_no_certificate() {
    let mut world = World::start("", "client_auth = \"strict\"", true).await;
    world.agent("raw", "ssh", None).await;
    let entry = world.outcome(0, "a raw link").await;
    assert!(entry["event"] == "auth.refused" && entry["reason"] == MISSING, "{entry}");
    assert_eq!(entry["agent"], "prod-eu", "{entry}");
    world.yard.write("keys/organisations/acme.toml", "client_auth = \"loose\"");
    world.yard.links("gateway", 1).await;
    let up = world.yard.entry("gateway", 0, "the link", |entry| entry["event"] == "link.up").await;
    assert_eq!(up["client_certificate"], "missing", "{up}");
    // A restart is for nobody to need: what is stricter from now on ends it.
    world.yard.write("keys/organisations/acme.toml", "client_auth = \"strict\"");
    let down = world.yard.entry("gateway", 0, "its end", |entry| entry["event"] == "link.down").await;
    assert_eq!(down["reason"], MISSING, "{down}");
}

#[tokio::test]
async fn an_agent_that_has_a_certificate_tries_the_way_by_which_it_can_show_it() {
    let mut world = World::start("", "client_auth = \"strict\"", true).await;
    world.corp.sign("good", &Leaf::new(GOOD, 1));
    let ways = format!("[\"ssh://{gateway}\", \"tls://{gateway}\"]", gateway = world.gateway);
    // Without one it would be told the same by both.
    world.agent_by("without", &ways, None).await;
    let line = world.yard.program("without").says("not linked").await;
    assert!(line.contains("no other way to this gateway is tried"), "{line}");
    world.yard.program("without").kill().await;
    let from = world.entries();
    world.agent_by("with", &ways, Some("good")).await;
    let up = |entry: &Value| entry["event"] == "link.up" && entry["transport"] == "tls";
    world.yard.entry("gateway", from, "a link by the second way", up).await;
    let log = world.yard.program("with").log();
    assert!(log.contains(&format!("; trying tls://{} next", world.gateway)), "{log}");
}

#[tokio::test]
async fn a_strict_listener_speaks_to_nobody_in_clear() {
    let mut world = World::start("client_auth = \"strict\"", "", true).await;
    world.agent("raw", "ssh", None).await;
    let entry = world.outcome(0, "a raw link").await;
    assert!(entry["event"] == "auth.refused" && entry["reason"] == MISSING, "{entry}");
    let from = world.entries();
    let said = run(&mut world.ssh_through(None)).await;
    assert_eq!(said.code(), 255, "{said:?}");
    let is_refused = |entry: &Value| entry["reason"] == MISSING && entry["agent"].is_null();
    world.yard.entry("gateway", from, "a raw client", is_refused).await;
    let mut stream = TcpStream::connect(world.gateway).await.expect("connected");
    stream.write_all(b"CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\n").await.expect("written");
    let answer = String::from_utf8_lossy(&read_to_end(stream).await).into_owned();
    assert!(!answer.contains(" 200 "), "{answer}");
}

#[tokio::test]
async fn principals_have_certificates_of_their_own_too() {
    let mut world = World::start("client_auth = \"strict\"", "", true).await;
    world.corp.sign("of-ci", &Leaf::new("caponier://acme/principals/ci", 1));
    world.corp.sign("of-agent", &Leaf::new(GOOD, 2));
    let fingerprint = fingerprint(&fs::read_to_string(world.yard.path("of-ci.pem")).expect("read"));
    for (certificate, reason) in [(Some("of-agent"), "client_certificate_other_name"), (None, MISSING)] {
        let from = world.entries();
        let said = run(&mut world.ssh(certificate)).await;
        assert_eq!(said.code(), 255, "{said:?}");
        let entry = world.outcome(from, reason).await;
        assert!(entry["event"] == "auth.refused" && entry["reason"] == reason, "{entry}");
    }
    let from = world.entries();
    let command = world.ssh(Some("of-ci"));
    world.yard.run("ssh", command);
    let entry = world.outcome(from, "a principal with its own").await;
    assert!(entry["event"] == "auth.accepted" && entry["client_certificate"] == fingerprint, "{entry}");
    // A session lives no longer than its certificate.
    world.revoke(&[1]);
    let ended = world.yard.program("ssh").ended();
    assert_eq!(within("the end of the session", ended).await.code(), Some(255));
}

#[tokio::test]
async fn a_revocation_cuts_the_link_and_what_it_carries() {
    let mut world = World::prepare(true).await;
    world.revoke(&[99]);
    world.yard.write("keys/organisations/acme.toml", "client_auth = \"strict\"");
    world.corp.sign("agent", &Leaf::new(GOOD, 1));
    let config = world.config("");
    let (gateway, doors) = world.yard.gateway("gateway", &config).await;
    world.gateway = gateway;
    world.agent("one", "tls", Some("agent")).await;
    world.yard.links("gateway", 1).await;
    let mut forward = TcpStream::connect(doors[0]).await.expect("connected");
    echoes(&mut forward, b"before").await;
    world.revoke(&[99, 1]);
    let down = world.yard.entry("gateway", 0, "the end of the link", |entry| entry["event"] == "link.down").await;
    assert_eq!(down["reason"], "client_certificate_revoked", "{down}");
    assert_eq!(read_to_end(forward).await, b"");
    let refused = |entry: &Value| entry["event"] == "auth.refused" && entry["reason"] == "client_certificate_revoked";
    world.yard.entry("gateway", 0, "that it does not come back", refused).await;
    // A new certificate is all that it takes, on disk and nowhere else.
    world.corp.sign("agent", &Leaf::new(GOOD, 2));
    world.yard.links("gateway", 2).await;
}

#[tokio::test]
async fn a_list_that_is_out_of_date_refuses_everybody_until_there_is_another() {
    let mut world = World::prepare(true).await;
    world.revoke_until(&[99], SystemTime::now() - Duration::from_secs(60));
    world.yard.write("keys/organisations/acme.toml", "client_auth = \"loose\"");
    world.corp.sign("agent", &Leaf::new(GOOD, 1));
    let config = world.config("");
    (world.gateway, _) = world.yard.gateway("gateway", &config).await;
    world.yard.program("gateway").says("the revocation list of CN=corp has ended").await;
    world.agent("one", "tls", Some("agent")).await;
    let entry = world.outcome(0, "an agent of that CA").await;
    assert!(entry["event"] == "auth.refused" && entry["reason"] == "client_certificate_crl_expired", "{entry}");
    world.revoke(&[99]);
    world.yard.links("gateway", 1).await;
}

#[tokio::test]
async fn a_link_lives_no_longer_than_its_certificate() {
    let mut world = World::start("client_auth = \"strict\"", "", true).await;
    world.corp.sign("agent", &Leaf::new(GOOD, 1).ending_in(Duration::from_secs(16)));
    world.agent("one", "tls", Some("agent")).await;
    world.yard.links("gateway", 1).await;
    let down = world.yard.entry("gateway", 0, "the end of the link", |entry| entry["event"] == "link.down").await;
    assert_eq!(down["reason"], "client_certificate_expired", "{down}");
}

#[tokio::test]
async fn both_ends_renew_their_certificates_without_a_restart_or_a_lost_forward() {
    let mut world = World::start("client_auth = \"strict\"", "", true).await;
    let first = world.corp.sign("agent", &Leaf::new(GOOD, 1));
    world.agent("one", "tls", Some("agent")).await;
    world.yard.links("gateway", 1).await;
    let mut forward = TcpStream::connect(world.door.expect("a door")).await.expect("connected");
    echoes(&mut forward, b"before").await;
    // The agent's: the next link is there before the last one goes.
    let second = world.corp.sign("agent", &Leaf::new(GOOD, 2));
    world.yard.links("gateway", 2).await;
    let ups: Vec<_> = world.yard.trail("gateway").into_iter().filter(|entry| entry["event"] == "link.up").collect();
    assert_eq!([&ups[0]["client_certificate"], &ups[1]["client_certificate"]], [&json!(first), &json!(second)]);
    echoes(&mut forward, b"after the agent's").await;
    // The gateway's.
    let from = world.entries();
    let renewed = world.web.sign("gateway", &Leaf::new("127.0.0.1", 2));
    world.yard.entry("gateway", from, "the new certificate", |entry| entry["event"] == "config.reloaded").await;
    let mut shown = Command::new("sh");
    let connect =
        format!("openssl s_client -connect {} </dev/null 2>/dev/null | openssl x509 -outform pem", world.gateway);
    let shown = run(shown.args(["-c", &connect])).await.done();
    assert_eq!(fingerprint(&shown), renewed);
    echoes(&mut forward, b"after the gateway's").await;
    drop(forward);
    assert!(world.yard.trail("gateway").iter().all(|entry| entry["reason"] != "lost"));
}

/// The rules for what starts, one wrong thing at a time: whether clients are asked, by whether anybody could be asked and judged.
#[tokio::test]
async fn what_could_not_be_judged_does_not_start() {
    let mut world = World::prepare(false).await;
    let certificate = "[[certificate]]\nchain = \"gateway.pem\"\nkey = \"gateway.key\"\n";
    for (mode, tls, ca, expected) in [
        // Nothing said: nobody is asked, and a CA that nobody is asked about is a mistake.
        (None, false, false, Ok(())),
        (None, true, false, Ok(())),
        (None, true, true, Err("a CA, but no client_auth")),
        (Some("strict"), false, false, Err("[[certificate]]")),
        (Some("strict"), true, false, Err("without a CA")),
        (Some("strict"), true, true, Ok(())),
        // What is said to be off is off, whatever else is there.
        (Some("off"), false, false, Ok(())),
        (Some("off"), true, false, Ok(())),
        (Some("off"), true, true, Ok(())),
        (Some("loose"), false, false, Err("[[certificate]]")),
        (Some("loose"), true, false, Err("without a CA")),
        (Some("loose"), true, true, Ok(())),
    ] {
        let listener = [
            mode.map(|mode| format!("client_auth = \"{mode}\"\n")),
            ca.then(|| "client_ca = [\"corp.pem\"]\n".to_owned()),
        ];
        let listener: String = listener.into_iter().flatten().collect();
        let config = world.config(&listener);
        let config = if tls { config } else { config.replace(certificate, "") };
        let case = format!("{mode:?}, TLS {tls}, CA {ca}");
        starts(&mut world, &case, &config, expected).await;
    }
}

/// Other things that do not start, each with one clear message.
#[tokio::test]
async fn what_would_be_open_does_not_start() {
    let mut world = World::prepare(false).await;
    let good = world.config("");
    for socket in ["127.0.0.1:9000", "tcp://127.0.0.1:9000", "[::1]:9000", "localhost:9000", "0.0.0.0"] {
        let config = good.replace("[audit]", &format!("admin_socket = \"{socket}\"\n[audit]"));
        starts(&mut world, socket, &config, Err("the admin surface is a Unix socket")).await;
    }
    world.yard.write("keys/organisations/acme.toml", "client_auth = \"strict\"");
    starts(&mut world, "a strict organisation", &good, Err("without a CA")).await;
    fs::create_dir_all(world.yard.path("keys/organisations/acme/client-ca")).expect("a folder");
    world.yard.write("keys/organisations/acme/client-ca/corp.pem", &world.corp.pem());
    starts(&mut world, "a strict organisation with its CA", &good, Ok(())).await;
    let in_clear = good.replace("[[certificate]]\nchain = \"gateway.pem\"\nkey = \"gateway.key\"\n", "");
    starts(&mut world, "and no TLS", &in_clear, Err("no [[certificate]]")).await;

    let listens = |listen: &str, orchestrator: &str| {
        format!(
            "[agent]\nid = \"prod-eu\"\nreplica = \"one\"\nhost_key = \"agent\"\n[audit]\nstdout = true\n\
             [listen]\naddress = \"127.0.0.1:0\"\n{listen}\n[[organisation]]\nid = \"acme\"\n{orchestrator}"
        )
    };
    let key = format!("[[organisation.orchestrator]]\nkey = \"{}\"\n", world.yard.public("login-acme"));
    let from = "accept_from = [\"127.0.0.1/32\"]";
    for (config, problem) in [
        (listens("", &key), "accept_from: this key is missing"),
        (listens("accept_from = []", &key), "at least one element"),
        (listens(from, ""), "without a key nobody may log in"),
    ] {
        world.yard.write("case.toml", &config);
        let path = world.yard.path("case.toml");
        for command in [["check", ""], ["agent", "--config"]] {
            let said = run(caponier().args(command.iter().filter(|word| !word.is_empty())).arg(&path)).await;
            assert_eq!(said.code(), 2, "{problem}: {said:?}");
            assert!(said.stderr.contains(problem), "{problem}: {said:?}");
        }
    }
}

/// Whether a gateway starts with a configuration, and what `check` says of the same.
async fn starts(world: &mut World, case: &str, config: &str, expected: Result<(), &str>) {
    world.yard.write("case.toml", config);
    let path = world.yard.path("case.toml");
    let checked = run(caponier().arg("check").arg(&path)).await;
    match expected {
        Ok(()) => {
            assert_eq!(checked.code(), 0, "{case}: {checked:?}");
            let log = world.yard.path("case.log");
            let mut command = caponier();
            command.arg("gateway").arg("--config").arg(&path);
            let mut program = Program::start("gateway", command, &log);
            program.says("listening on").await;
            program.kill().await;
        }
        Err(problem) => {
            let started = run(caponier().arg("gateway").arg("--config").arg(&path)).await;
            for said in [checked, started] {
                assert_eq!(said.code(), 2, "{case}: {said:?}");
                assert!(said.stderr.contains(problem), "{case}: {said:?}");
            }
        }
    }
}

//! OpenSSH certificates, made by `ssh-keygen` and shown by `ssh`: at the SSH door, at the agent, and of the door's host key.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::Instant;

use crate::harness::{
    AGENT, Plan, SOON, Said, Side, Site, caponier, connect, echo, echoes, eventually, free_port, read_to_end, run,
};
use crate::raw::{LOGIN_FAILURE, Peer, originator};

/// How long a certificate holds at least that holds for 30 s, in whole seconds, when it is made: enough for what is done with
/// it meanwhile on a busy machine.
const BRIEF: Duration = Duration::from_secs(29);

/// Where the registry has acme's CA.
const CA: &str = "acme/user-ca";

/// A site with a second listener, which takes certificates of the CA `ca` for `provisioner`.
struct Certified {
    site: Site,
    port: u16,
}

impl Certified {
    async fn start(plan: Plan) -> Self {
        let port = free_port();
        let registry = plan.registry();
        for name in ["ca", "holder"] {
            plan.key(name);
        }
        registry.key(CA, "ca", &plan.public("ca"));
        registry.about_key(CA, "ca", "principals = [\"prov*\"]");
        let listener = format!("[[listener]]\naddress = \"127.0.0.1:{port}\"\nuser_ca = true");
        let site = plan.gateway_setting(&listener).start().await;
        fs::write(site.path().join("known_any"), format!("* {}\n", site.public("gateway"))).expect("written");
        Self { site, port }
    }

    /// Stock ssh that shows nothing but the certificate of this name.
    fn ssh(&self, port: u16, certificate: &str, arguments: &[&str]) -> Command {
        let path = self.site.path();
        let options = [
            format!("Port={port}"),
            format!("UserKnownHostsFile={}", path.join("known_any").display()),
            "PubkeyAcceptedAlgorithms=ssh-ed25519-cert-v01@openssh.com".to_owned(),
        ];
        let mut words: Vec<&str> = options.iter().flat_map(|option| ["-o", option.as_str()]).collect();
        words.extend(arguments);
        self.site.ssh_as(certificate, AGENT, &words)
    }

    /// A session with a forward to `target` at the listener that takes certificates.
    async fn forward(&self, certificate: &str, target: SocketAddr) -> (crate::harness::Program, SocketAddr) {
        let port = free_port();
        let ssh = self.ssh(self.port, certificate, &["-N", "-v", "-L", &format!("127.0.0.1:{port}:{target}")]);
        let mut ssh = self.site.background(&format!("ssh-{certificate}"), ssh);
        ssh.says("Entering interactive session").await;
        (ssh, SocketAddr::from(([127, 0, 0, 1], port)))
    }
}

/// Has `ca` sign a copy of a key of the site's folder; `name-cert.pub` is the certificate, where `ssh` looks for it.
pub(crate) async fn sign(dir: &std::path::Path, ca: &str, subject: &str, name: &str, arguments: &[&str]) -> PathBuf {
    for end in ["", ".pub"].into_iter().filter(|_| subject != name) {
        fs::copy(dir.join(format!("{subject}{end}")), dir.join(format!("{name}{end}"))).expect("a copy");
    }
    let mut keygen = Command::new("ssh-keygen");
    keygen
        .arg("-q")
        .arg("-s")
        .arg(dir.join(ca))
        .args(["-I", name])
        .args(arguments)
        .arg(dir.join(format!("{name}.pub")));
    run(&mut keygen).await.done();
    dir.join(format!("{name}-cert.pub"))
}

fn fingerprint(public: &str) -> String {
    caponier::identity::PublicKey::parse(public).expect("a key").fingerprint().to_string()
}

const REFUSED: &str = "acme/prod-eu@127.0.0.1: Permission denied (publickey).\r\n";

fn is_refused(said: &Said, what: &str) {
    assert_eq!((said.code(), said.stdout.as_str()), (255, ""), "{what}: {said:?}");
    assert_eq!(said.stderr, REFUSED, "{what}");
}

#[tokio::test]
async fn one_wrong_field_of_a_certificate_is_refused_as_any_wrong_key_is() {
    let target = echo().await;
    let plan = Site::plan().allow(target);
    let dir = plan.path().to_owned();
    for name in ["other-ca", "globex-ca"] {
        plan.key(name);
    }
    for (file, arguments) in [("rsa-ca", ["-t", "rsa", "-b", "3072"]), ("weak-ca", ["-t", "rsa", "-b", "2048"])] {
        let mut keygen = Command::new("ssh-keygen");
        run(keygen.args(arguments).args(["-q", "-N", "", "-f"]).arg(dir.join(file))).await.done();
    }
    let registry = plan.registry();
    registry.key("globex/user-ca", "globex-ca", &plan.public("globex-ca"));
    registry.about_key("globex/user-ca", "globex-ca", "principals = [\"*\"]");
    registry.key(CA, "rsa-ca", &fs::read_to_string(dir.join("rsa-ca.pub")).expect("a key"));
    registry.about_key(CA, "rsa-ca", "principals = [\"*\"]");
    registry.key(CA, "late-ca", &plan_key(&plan, "late-ca"));
    registry.about_key(CA, "late-ca", "principals = [\"*\"]\nexpires = 2020-01-01T00:00:00Z");
    registry.key(CA, "gone-ca", &plan_key(&plan, "gone-ca"));
    registry.about_key(CA, "gone-ca", "principals = [\"*\"]\nrevoked = true");
    registry.key("acme/principals/other", "one", &plan_key(&plan, "other"));
    registry.about("acme/principals/other", "agents = [\"*\"]");
    let world = Certified::start(plan).await;
    registry_revokes(&world.site);
    let (site, target) = (&world.site, target.to_string());
    let ask = async |port: u16, certificate: &str| run(&mut world.ssh(port, certificate, &["-W", &target])).await;

    let always = ["-V", "always:forever"];
    let good = ["-n", "provisioner", "-z", "5"];
    for (name, ca) in [("good", "ca"), ("good-rsa", "rsa-ca")] {
        sign(&dir, ca, "holder", name, &[&good[..], &always].concat()).await;
        let said = ask(world.port, name).await;
        assert_eq!(said.code(), 0, "{name}: {said:?}");
        let like = json!({"event": "forward.ended", "key_id": name, "serial": "5", "principal": "provisioner"});
        let record = site.record(Side::Gateway, like).await;
        assert_eq!(record["ca"], fingerprint(&site.public(ca)), "{record}");
        assert_eq!(record["key"], fingerprint(&site.public("holder")), "{record}");
        site.record(Side::Gateway, json!({"event": "auth.accepted", "key_id": name})).await;
    }
    // Elsewhere the same is not even listened to.
    let refused = json!({"event": "auth.refused"});
    let mut seen = site.records(Side::Gateway, &refused).len();
    is_refused(&ask(site.address.port(), "good").await, "a listener without user_ca");
    let more = ["source-address=10.0.0.0/8", "force-command=/bin/true", "critical:unheard@example.com=x"];
    let option = |at: usize| vec!["-n", "provisioner", "-O", more[at]];
    let cases: Vec<(&str, &str, Vec<&str>, &str)> = vec![
        ("another CA", "other-ca", vec!["-n", "provisioner"], "certificate_unknown_ca"),
        ("another organisation's CA", "globex-ca", vec!["-n", "provisioner"], "certificate_unknown_ca"),
        ("a weak CA", "weak-ca", vec!["-n", "provisioner"], "certificate_weak_ca"),
        ("SHA-1", "rsa-ca", vec!["-n", "provisioner", "-t", "ssh-rsa"], "certificate_sha1"),
        ("a CA that expired", "late-ca", vec!["-n", "provisioner"], "certificate_ca_expired"),
        ("a CA that was revoked", "gone-ca", vec!["-n", "provisioner"], "certificate_ca_revoked"),
        // Which ssh does not even show.
        ("a host's", "ca", vec!["-h", "-n", "provisioner"], "left_before_login"),
        ("no principals", "ca", vec![], "certificate_principal"),
        ("a principal that is not this CA's", "ca", vec!["-n", "other"], "certificate_principal"),
        ("two principals", "rsa-ca", vec!["-n", "provisioner,other"], "certificate_principal"),
        ("an unknown principal", "ca", vec!["-n", "provident"], "certificate_principal"),
        ("another network", "ca", option(0), "certificate_source_address"),
        ("a command", "ca", option(1), "certificate_option"),
        ("an unknown option", "ca", option(2), "certificate_option"),
        ("verify-required", "ca", vec!["-n", "provisioner", "-O", "verify-required"], "certificate_option"),
        ("no forwarding", "ca", vec!["-n", "provisioner", "-O", "no-port-forwarding"], "certificate_no_forwarding"),
        ("a revoked serial number", "ca", vec!["-n", "provisioner", "-z", "666"], "certificate_revoked"),
        ("a revoked key id", "ca", vec!["-n", "provisioner", "-I", "gone"], "certificate_revoked"),
        // The SSH library refuses these two before anybody else is asked.
        ("expired", "ca", vec!["-n", "provisioner", "-V", "20200101:20200102"], "left_before_login"),
        ("not yet valid", "ca", vec!["-n", "provisioner", "-V", "20980101:20990101"], "left_before_login"),
    ];
    seen += 1;
    for (number, (what, ca, arguments, reason)) in cases.iter().enumerate() {
        let mut arguments = arguments.clone();
        if !arguments.contains(&"-V") {
            arguments.extend(always);
        }
        let name = format!("wrong-{number}");
        sign(&dir, ca, "holder", &name, &arguments).await;
        is_refused(&ask(world.port, &name).await, what);
        let record =
            eventually(what, async || site.records(Side::Gateway, &refused).into_iter().nth(seen + number)).await;
        assert_eq!(record["reason"], *reason, "{what}: {record}");
    }
    // A plain key does there as everywhere, if it is registered.
    let known = site.path().join("known_any").display().to_string();
    let options = [format!("Port={}", world.port), format!("UserKnownHostsFile={known}")];
    let plain = async |key: &str| {
        run(&mut site.ssh_as(key, AGENT, &["-o", &options[0], "-o", &options[1], "-W", &target])).await
    };
    is_refused(&plain("holder").await, "a plain key that is not registered");
    assert_eq!(plain("provisioner").await.code(), 0);
    // A key that is registered does not bring a certificate along where none is taken.
    sign(&dir, "ca", "provisioner", "of-the-registered", &["-n", "provisioner", "-V", "always:forever"]).await;
    let only = "PubkeyAcceptedAlgorithms=ssh-ed25519-cert-v01@openssh.com";
    is_refused(
        &run(&mut site.ssh_as("of-the-registered", AGENT, &["-o", only, "-W", &target])).await,
        "a certificate of a good key",
    );
    site.record(Side::Gateway, json!({"event": "auth.refused", "reason": "certificate_not_accepted"})).await;
    world.site.stop().await;
}

fn plan_key(plan: &Plan, name: &str) -> String {
    plan.key(name);
    plan.public(name)
}

fn registry_revokes(site: &Site) {
    let toml = "principals = [\"prov*\"]\nrevoked_serials = [666]\nrevoked_key_ids = [\"gone\"]";
    site.registry().about_key(CA, "ca", toml);
}

#[tokio::test]
async fn a_session_ends_with_its_certificate() {
    let target = echo().await;
    let world = Certified::start(Site::plan().allow(target)).await;
    let (site, dir) = (&world.site, world.site.path().to_owned());
    let begun = Instant::now();
    let brief = ["-n", "provisioner", "-z", "1", "-V", "-1m:+30s"];
    sign(&dir, "ca", "holder", "brief", &brief).await;
    for (name, serial) in [("revoked", "666"), ("other", "7")] {
        sign(&dir, "ca", "holder", name, &["-n", "provisioner", "-z", serial, "-V", "always:forever"]).await;
    }
    let mut sessions = Vec::new();
    for name in ["brief", "revoked", "other"] {
        let (ssh, listens) = world.forward(name, target).await;
        let mut stream = connect(listens).await;
        echoes(&mut stream, name.as_bytes()).await;
        sessions.push((ssh, stream));
    }
    let [mut brief, mut revoked, mut other] = sessions.try_into().unwrap_or_else(|_| panic!("three"));

    let told = Instant::now();
    registry_revokes(site);
    assert_eq!(read_to_end(&mut revoked.1).await, b"");
    assert!(told.elapsed() < SOON, "{:?}", told.elapsed());
    revoked.0.ended().await;
    site.record(Side::Gateway, json!({"event": "forward.ended", "key_id": "revoked", "reason": "revoked"})).await;
    echoes(&mut other.1, b"another serial number").await;

    assert_eq!(read_to_end(&mut brief.1).await, b"");
    assert!((BRIEF..BRIEF + SOON).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    brief.0.ended().await;
    site.record(Side::Gateway, json!({"event": "forward.ended", "key_id": "brief", "reason": "revoked"})).await;
    echoes(&mut other.1, b"another certificate").await;

    // The CA goes, and all with it.
    site.registry().about_key(CA, "ca", "principals = [\"prov*\"]\nrevoked = true");
    assert_eq!(read_to_end(&mut other.1).await, b"");
    other.0.ended().await;
    world.site.stop().await;
}

#[tokio::test]
async fn a_listener_that_takes_no_certificates_any_more_cuts_those_that_came_by_one() {
    let target = echo().await;
    let mut world = Certified::start(Site::plan().allow(target)).await;
    let dir = world.site.path().to_owned();
    sign(&dir, "ca", "holder", "good", &["-n", "provisioner", "-V", "always:forever"]).await;
    let (mut ssh, listens) = world.forward("good", target).await;
    let mut certified = connect(listens).await;
    echoes(&mut certified, b"by certificate").await;
    // By a plain key at the same listener.
    let (port, local) = (format!("Port={}", world.port), free_port());
    let known = format!("UserKnownHostsFile={}", dir.join("known_any").display());
    let forward = format!("127.0.0.1:{local}:{target}");
    let plain = world.site.ssh(&["-o", &port, "-o", &known, "-N", "-v", "-L", &forward]);
    let mut plain = world.site.background("plain", plain);
    plain.says("Entering interactive session").await;
    let mut stays = connect(SocketAddr::from(([127, 0, 0, 1], local))).await;
    echoes(&mut stays, b"by key").await;

    change(&mut world.site, Side::Gateway, "user_ca = true", "user_ca = false");
    let told = Instant::now();
    assert_eq!(read_to_end(&mut certified).await, b"");
    assert!(told.elapsed() < SOON, "{:?}", told.elapsed());
    ssh.ended().await;
    let like = json!({"event": "forward.ended", "key_id": "good", "reason": "revoked"});
    world.site.record(Side::Gateway, like).await;
    echoes(&mut stays, b"still by key").await;
    drop(stays);
    world.site.stop().await;
}

/// Replaces a text of a side's configuration, and has it read.
fn change(site: &mut Site, side: Side, old: &str, new: &str) {
    let path = site.config(side);
    let text = fs::read_to_string(&path).expect("a configuration");
    assert!(text.contains(old), "{old} in {text}");
    fs::write(path, text.replacen(old, new, 1)).expect("written");
    site.program(side).signal("HUP");
}

#[tokio::test]
async fn a_gateway_logs_in_with_a_certificate_until_it_is_revoked() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.key("agent-ca");
    let mut site = plan.start().await;
    let dir = site.path().to_owned();
    sign(&dir, "agent-ca", "login-acme", "login", &["-n", "acme", "-z", "3", "-V", "always:forever"]).await;
    change(
        &mut site,
        Side::Gateway,
        "login_key = \"login-acme\"\n",
        "login_key = \"login-acme\"\nlogin_certificate = \"login-cert.pub\"\n",
    );
    site.record(Side::Gateway, json!({"event": "config.reloaded"})).await;
    let orchestrator = format!("[[organisation.orchestrator]]\nkey = \"{}\"\n", site.public("login-acme").trim());
    let authority = format!("[[organisation.orchestrator_ca]]\nkey = \"{}\"\n", site.public("agent-ca").trim());
    // The plain key is not known any more.
    change(&mut site, Side::Agent, &orchestrator, &authority);
    let link = site.record(Side::Agent, json!({"event": "link.up", "key_id": "login", "serial": "3"})).await;
    assert_eq!(link["ca"], fingerprint(&site.public("agent-ca")));
    let mut stream = eventually("a forward on the new link", async || through(site.doors[0]).await).await;
    let open = site.record(Side::Agent, json!({"event": "forward.open", "key_id": "login"})).await;
    assert_eq!((&open["principal"], &open["serial"]), (&json!("provisioner"), &json!("3")));
    assert_eq!(open["asserted_by"], fingerprint(&site.public("login-acme")));

    change(&mut site, Side::Agent, &authority, &format!("{authority}revoked_serials = [3]\n"));
    let told = Instant::now();
    assert_eq!(read_to_end(&mut stream).await, b"");
    assert!(told.elapsed() < SOON, "{:?}", told.elapsed());
    site.record(Side::Agent, json!({"event": "link.down", "key_id": "login", "reason": "revoked"})).await;
    site.record(Side::Agent, json!({"event": "forward.ended", "key_id": "login", "reason": "revoked"})).await;
    site.record(Side::Agent, json!({"event": "auth.refused", "reason": "certificate_revoked"})).await;
    site.stop().await;
}

#[tokio::test]
async fn check_finds_certificates_that_nobody_could_accept() {
    let plan = Site::plan();
    plan.key("some-ca");
    let site = plan.start_gateway().await;
    let dir = site.path().to_owned();
    let text = fs::read_to_string(site.config(Side::Gateway)).expect("a configuration");
    let cases: &[(&str, &str, &[&str], &str)] = &[
        ("login", "login-acme", &["-n", "acme"], ""),
        ("login", "login-globex", &["-n", "acme"], "for another key than login_key"),
        ("login", "login-acme", &["-n", "globex"], "only principal must be acme"),
        ("login", "login-acme", &["-n", "acme,globex"], "only principal must be acme"),
        ("login", "login-acme", &[], "names no principal"),
        ("login", "login-acme", &["-h", "-n", "acme"], "is a host's"),
        // What is wrong besides does not hide behind it.
        ("login", "login-acme", &["-n", "acme", "-V", "20200101:20200102", "-O", "clear"], "does not permit port"),
        ("login", "login-acme", &["-n", "acme", "-O", "no-port-forwarding"], "does not permit port forwarding"),
        ("host", "gateway", &["-h", "-n", "gw.example.com"], ""),
        ("host", "gateway", &["-n", "gw.example.com"], "is a user's"),
        ("host", "gateway", &["-h"], "names no principal"),
        ("host", "login-acme", &["-h", "-n", "gw.example.com"], "for another key than host_key"),
    ];
    // No faults: what is wrong with them is only the time.
    let warned: &[(&str, &str, &[&str], &str)] = &[
        (
            "login",
            "login-acme",
            &["-n", "acme", "-V", "20200101:20200102"],
            "login_certificate of acme has expired at 2020",
        ),
        (
            "login",
            "login-acme",
            &["-n", "acme", "-V", "20980101:20990101"],
            "login_certificate of acme is not valid before",
        ),
        ("login", "login-acme", &["-n", "acme", "-V", "-1d:+29d"], "login_certificate of acme expires at"),
        (
            "host",
            "gateway",
            &["-h", "-n", "gw.example.com", "-V", "20200101:20200102"],
            "host_certificate has expired at 2020",
        ),
    ];
    let cases: Vec<_> = cases.iter().map(|case| (case, 2)).chain(warned.iter().map(|case| (case, 0))).collect();
    for (number, ((kind, subject, arguments, problem), code)) in cases.into_iter().enumerate() {
        let name = format!("case-{number}");
        let mut arguments = arguments.to_vec();
        if !arguments.contains(&"-V") {
            arguments.extend(["-V", "always:forever"]);
        }
        let file = sign(&dir, "some-ca", subject, &name, &arguments).await;
        let (after, key) = match *kind {
            "login" => ("login_key = \"login-acme\"\n", "login_certificate"),
            _ => ("host_key = \"gateway\"\n", "host_certificate"),
        };
        let changed = text.replacen(after, &format!("{after}{key} = \"{}\"\n", file.display()), 1);
        let config = dir.join(format!("{name}.toml"));
        fs::write(&config, changed).expect("written");
        let said = run(caponier().arg("check").arg(&config)).await;
        assert_eq!(said.code(), if problem.is_empty() { 0 } else { code }, "{arguments:?}: {said:?}");
        // That nobody signs this trail is said of each that has no faults.
        let mut besides = said.stderr.lines().filter(|line| !line.contains("the trail's heads are not signed"));
        assert_eq!(besides.next().is_none(), problem.is_empty(), "{arguments:?}: {said:?}");
        assert!(said.stderr.contains(problem), "{arguments:?}: {said:?}");
    }
    site.stop().await;
}

#[tokio::test]
async fn a_host_certificate_is_what_ssh_and_our_client_go_by() {
    let target = echo().await;
    let plan = Site::plan().allow(target);
    for name in ["host-ca", "other-ca"] {
        plan.key(name);
    }
    let dir = plan.path().to_owned();
    sign(&dir, "host-ca", "gateway", "host", &["-h", "-n", "127.0.0.1", "-V", "always:forever"]).await;
    let site = plan.gateway_setting("host_certificate = \"host-cert.pub\"").start().await;
    let known = |name: &str, line: String| {
        let path = dir.join(name);
        fs::write(&path, line).expect("written");
        path.display().to_string()
    };
    let good = known("known-ca", format!("@cert-authority 127.0.0.*,[127.0.0.1]:* {}\n", site.public("host-ca")));
    let wrong = known("known-other", format!("@cert-authority * {}\n", site.public("other-ca")));
    let ssh = async |known: &str| {
        let known = format!("UserKnownHostsFile={known}");
        run(&mut site.ssh(&["-o", &known, "-W", &target.to_string()])).await
    };
    let said = ssh(&good).await;
    assert_eq!(said.code(), 0, "{said:?}");
    let said = ssh(&wrong).await;
    assert_eq!(said.code(), 255, "{said:?}");
    assert!(said.stderr.contains("Host key verification failed"), "{said:?}");
    // Whoever knows the key goes on as before.
    assert_eq!(run(&mut site.ssh(&["-W", &target.to_string()])).await.code(), 0);

    let forward = |known: &str| {
        let port = free_port();
        let mut command = caponier();
        command.args(["forward", "--agent", AGENT, "-L", &format!("{port}:{target}"), "--known-hosts", known]);
        command.arg("--gateway").arg(format!("ssh://{}", site.address)).arg("--identity").arg(site.key("provisioner"));
        (command, SocketAddr::from(([127, 0, 0, 1], port)))
    };
    let (command, listens) = forward(&good);
    let mut ours = site.background("forward-ca", command);
    ours.says("listening 127.").await;
    echoes(connect(listens).await, b"by certificate").await;
    ours.signal("TERM");
    ours.ended().await;
    let said = run(&mut forward(&wrong).0).await;
    assert_eq!(said.code(), 1, "{said:?}");
    assert!(said.stderr.contains("is not the one pinned"), "{said:?}");
    site.stop().await;
}

#[tokio::test]
async fn a_certificate_of_the_gateway_outside_of_its_time_holds_nobody_up() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    for name in ["agent-ca", "host-ca"] {
        plan.key(name);
    }
    let dir = plan.path().to_owned();
    let past = ["-V", "20200101:20200102"];
    sign(&dir, "host-ca", "gateway", "host", &[&["-h", "-n", "127.0.0.1"][..], &past].concat()).await;
    let mut site = plan.gateway_setting("host_certificate = \"host-cert.pub\"").start().await;
    let gateway = Side::Gateway;
    site.program(gateway).says("host_certificate has expired at 2020-01-02").await;
    // Who knows the key goes by that.
    assert_eq!(run(&mut site.ssh(&["-W", &target.to_string()])).await.code(), 0);
    echoes(connect(site.doors[0]).await, b"by the plain key").await;

    // The same of one organisation's login holds up no reload, and its agents are logged in to with the plain key.
    sign(&dir, "agent-ca", "login-acme", "login", &[&["-n", "acme"][..], &past].concat()).await;
    let (key, both) =
        ("login_key = \"login-acme\"\n", "login_key = \"login-acme\"\nlogin_certificate = \"login-cert.pub\"\n");
    change(&mut site, gateway, key, both);
    site.record(gateway, json!({"event": "config.reloaded"})).await;
    site.program(gateway).says("login_certificate of acme has expired at 2020-01-02").await;
    site.restart_agent().await;
    site.linked().await;
    echoes(connect(site.doors[0]).await, b"by the plain key").await;
    // Nor does it keep the gateway from starting.
    assert_eq!(site.program(gateway).stop().await, Some(0));
    site.start_gateway_as_written().await;
    site.program(gateway).says("login_certificate of acme has expired at 2020-01-02").await;
    site.restart_agent().await;
    site.linked().await;

    // The next one is yet to come: no more of a fault.
    sign(&dir, "agent-ca", "login-acme", "login", &["-n", "acme", "-V", "20980101:20990101"]).await;
    site.program(gateway).signal("HUP");
    site.program(gateway).says("login_certificate of acme is not valid before 2098-01-01").await;
    echoes(connect(site.doors[0]).await, b"by the plain key").await;
    // And one that does not fit its key still is.
    sign(&dir, "agent-ca", "provisioner", "login", &["-n", "acme", "-V", "always:forever"]).await;
    site.program(gateway).signal("HUP");
    let rejected = site.record(gateway, json!({"event": "config.rejected"})).await;
    assert!(rejected["detail"].as_str().is_some_and(|detail| detail.contains("for another key")), "{rejected}");
    site.stop().await;
}

#[tokio::test]
async fn an_agents_link_and_its_forwards_end_with_the_gateways_certificate() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.key("agent-ca");
    let mut site = plan.start().await;
    let dir = site.path().to_owned();
    let orchestrator = format!("[[organisation.orchestrator]]\nkey = \"{}\"\n", site.public("login-acme").trim());
    let authority = format!("[[organisation.orchestrator_ca]]\nkey = \"{}\"\n", site.public("agent-ca").trim());
    let begun = Instant::now();
    sign(&dir, "agent-ca", "login-acme", "login", &["-n", "acme", "-z", "1", "-V", "-1m:+30s"]).await;
    let key = "login_key = \"login-acme\"\n";
    change(&mut site, Side::Gateway, key, &format!("{key}login_certificate = \"login-cert.pub\"\n"));
    site.record(Side::Gateway, json!({"event": "config.reloaded"})).await;
    change(&mut site, Side::Agent, &orchestrator, &authority);
    site.record(Side::Agent, json!({"event": "link.up", "serial": "1"})).await;
    let mut stream = eventually("a forward on the new link", async || through(site.doors[0]).await).await;

    assert_eq!(read_to_end(&mut stream).await, b"");
    assert!((BRIEF..BRIEF + SOON).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    site.record(Side::Agent, json!({"event": "forward.ended", "serial": "1", "reason": "expired"})).await;
    site.record(Side::Agent, json!({"event": "link.down", "serial": "1", "reason": "expired"})).await;
    site.program(Side::Gateway).says("login_certificate of acme has expired").await;
    // The plain key, which is shown from then on, is not this agent's to accept.
    let refused = json!({"event": "auth.refused", "reason": "unknown_key"});
    site.record(Side::Agent, refused).await;
    assert!(through(site.doors[0]).await.is_none());
    // A new certificate in the old one's place is taken up by itself.
    sign(&dir, "agent-ca", "login-acme", "login", &["-n", "acme", "-z", "2", "-V", "always:forever"]).await;
    site.record(Side::Agent, json!({"event": "link.up", "serial": "2"})).await;
    eventually("a forward on the newest link", async || through(site.doors[0]).await).await;
    site.stop().await;
}

/// A connection by a door that leads to an echo, if it does now.
async fn through(door: SocketAddr) -> Option<TcpStream> {
    let mut stream = connect(door).await;
    stream.write_all(b"x").await.ok()?;
    stream.read_exact(&mut [0]).await.ok()?;
    Some(stream)
}

#[tokio::test]
async fn an_agents_own_listener_takes_certificates_of_its_orchestrators_ca() {
    let target = echo().await;
    let listen = "[listen]\naddress = \"127.0.0.1:0\"\naccept_from = [\"127.0.0.1/32\"]";
    let plan = Site::plan().allow(target).agent_setting(listen);
    for name in ["agent-ca", "other-ca", "holder"] {
        plan.key(name);
    }
    let mut site = plan.start().await;
    let line = site.program(Side::Agent).says(" listening on ").await;
    let port: u16 = line.rsplit_once(':').and_then(|(_, port)| port.trim().parse().ok()).expect("a port");
    let dir = site.path().to_owned();
    let orchestrator = format!("[[organisation.orchestrator]]\nkey = \"{}\"\n", site.public("login-acme").trim());
    let (key, of_other) = (site.public("agent-ca"), site.public("other-ca"));
    let authority = format!("[[organisation.orchestrator_ca]]\nrevoked_serials = [666]\nkey = \"{}\"\n", key.trim());
    change(&mut site, Side::Agent, &orchestrator, &authority);
    site.record(Side::Agent, json!({"event": "config.reloaded"})).await;
    // A session at the listener, where the certificate of this name is shown.
    let enter = async |name: &str| {
        let mut peer = Peer::start();
        peer.ask(json!({"do": "connect", "port": port})).await;
        let exchanged = peer.ask(json!({"do": "client"})).await;
        assert_eq!(exchanged["exchanged"], true, "{exchanged}");
        let certificate = dir.join(format!("{name}-cert.pub"));
        let login = json!({"do": "login", "user": "acme", "key": dir.join("holder"), "certificate": certificate});
        let login = peer.ask(login).await;
        (peer, login)
    };
    let always = ["-V", "always:forever"];
    for (name, more) in [("good", &["-z", "5"][..]), ("from-here", &["-O", "source-address=127.0.0.0/8"])] {
        sign(&dir, "agent-ca", "holder", name, &[&["-n", "acme"], more, &always].concat()).await;
        let (mut peer, login) = enter(name).await;
        assert_eq!(login["ok"], true, "{name}: {login}");
        let opened = peer.gateway_forward(&originator("provisioner"), "127.0.0.1", target.port()).await;
        peer.echoes(&opened).await;
        let record = site.record(Side::Agent, json!({"event": "forward.open", "door": "listen", "key_id": name})).await;
        assert_eq!(record["ca"], fingerprint(&key), "{record}");
    }
    let refused = json!({"event": "auth.refused", "door": "listen"});
    let cases: &[(&str, &str, &[&str], &str)] = &[
        ("another CA", "other-ca", &["-n", "acme"], "certificate_unknown_ca"),
        ("another organisation", "agent-ca", &["-n", "globex"], "certificate_principal"),
        ("two organisations", "agent-ca", &["-n", "acme,globex"], "certificate_principal"),
        ("nobody", "agent-ca", &[], "certificate_principal"),
        ("a host", "agent-ca", &["-h", "-n", "acme"], "certificate_type"),
        ("elsewhere", "agent-ca", &["-n", "acme", "-O", "source-address=192.0.2.0/24"], "certificate_source_address"),
        ("an option", "agent-ca", &["-n", "acme", "-O", "verify-required"], "certificate_option"),
        ("no forwarding", "agent-ca", &["-n", "acme", "-O", "no-port-forwarding"], "certificate_no_forwarding"),
        ("a serial number", "agent-ca", &["-n", "acme", "-z", "666"], "certificate_revoked"),
        ("expired", "agent-ca", &["-n", "acme", "-V", "20200101:20200102"], "left_before_login"),
    ];
    for (number, (what, ca, arguments, reason)) in cases.iter().enumerate() {
        let time = if arguments.contains(&"-V") { &[][..] } else { &always };
        let name = format!("wrong-{number}");
        sign(&dir, ca, "holder", &name, &[arguments, time].concat()).await;
        let (peer, login) = enter(&name).await;
        assert_eq!(login["answers"], json!([LOGIN_FAILURE]), "{what}: {login}");
        drop(peer);
        let record = eventually(what, async || site.records(Side::Agent, &refused).into_iter().nth(number)).await;
        assert_eq!(record["reason"], *reason, "{what}: {record}");
    }

    // What came in by one ends with it, and with its CA.
    let begun = Instant::now();
    sign(&dir, "agent-ca", "holder", "brief", &["-n", "acme", "-V", "-1m:+30s"]).await;
    let (mut brief, mut stays) = (enter("brief").await.0, enter("good").await.0);
    for peer in [&mut brief, &mut stays] {
        let opened = peer.gateway_forward(&originator("provisioner"), "127.0.0.1", target.port()).await;
        peer.echoes(&opened).await;
    }
    // Which it may notice while it is asked.
    let end = brief.try_ask(json!({"do": "closed", "within": 80})).await;
    assert!(end["closed"] == true || end["error"] == "EOFError: ", "{end}");
    assert!((BRIEF..BRIEF + SOON).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    site.record(Side::Agent, json!({"event": "forward.ended", "key_id": "brief", "reason": "expired"})).await;
    let opened = stays.gateway_forward(&originator("provisioner"), "127.0.0.1", target.port()).await;
    stays.echoes(&opened).await;
    change(&mut site, Side::Agent, key.trim(), of_other.trim());
    let end = stays.try_ask(json!({"do": "closed", "within": 60})).await;
    assert!(end["closed"] == true || end["error"] == "EOFError: ", "{end}");
    site.record(Side::Agent, json!({"event": "forward.ended", "key_id": "good", "reason": "revoked"})).await;
    site.stop().await;
}

#[tokio::test]
async fn our_client_shows_a_certificate_and_tells_of_one_that_is_of_no_use() {
    let target = echo().await;
    let world = Certified::start(Site::plan().allow(target)).await;
    let (site, dir) = (&world.site, world.site.path().to_owned());
    let always = ["-V", "always:forever"];
    for (name, arguments) in [
        ("good", &["-n", "provisioner"][..]),
        ("stranger", &["-n", "nobody-there"]),
        ("unfit", &["-n", "Some_Body"]),
        ("host", &["-h", "-n", "provisioner"]),
        ("late", &["-n", "provisioner", "-V", "20200101:20200102"]),
        ("early", &["-n", "provisioner", "-V", "20990101:20990102"]),
        ("closed", &["-n", "provisioner", "-O", "no-port-forwarding"]),
    ] {
        let time = if arguments.contains(&"-V") { &[][..] } else { &always };
        sign(&dir, "ca", "holder", name, &[arguments, time].concat()).await;
    }
    let pin = fingerprint(&site.public("gateway"));
    let forward = |gateway: SocketAddr, identity: &str, certificate: Option<&str>| {
        let mut command = caponier();
        command.args(["forward", "--agent", AGENT, "--host-key-fingerprint", &pin, "-L", &format!("0:{target}")]);
        command.arg("--gateway").arg(format!("ssh://{gateway}")).arg("--identity").arg(dir.join(identity));
        if let Some(certificate) = certificate {
            command.arg("--certificate").arg(dir.join(certificate));
        }
        command
    };
    let door = SocketAddr::from(([127, 0, 0, 1], world.port));
    // Nobody is there: nothing is dialled.
    let nowhere = SocketAddr::from(([127, 0, 0, 1], free_port()));
    for (identity, certificate, words) in [
        ("holder", "late-cert.pub", "it has expired, at 2020-01-0"),
        ("holder", "early-cert.pub", "it is not valid yet, before 20"),
        ("holder", "host-cert.pub", "it is a host's"),
        ("holder", "unfit-cert.pub", "names nobody who could be a principal"),
        ("holder", "closed-cert.pub", "does not permit port forwarding"),
        ("provisioner", "good-cert.pub", "it serves no other key"),
        ("holder", "holder.pub", "it is a plain key"),
        ("holder", "nothing", "nothing"),
    ] {
        let said = run(&mut forward(nowhere, identity, Some(certificate))).await;
        assert_eq!((said.code(), said.stdout.as_str()), (2, ""), "{certificate}: {said:?}");
        assert!(said.stderr.contains(words), "{certificate}: {said:?}");
    }
    // One that lies beside the key, and is of no use, is told and does not keep the key from being shown.
    let said = run(&mut forward(door, "late", None)).await;
    assert_eq!(said.code(), 1, "{said:?}");
    assert!(said.stderr.contains("warning: passed over") && said.stderr.contains("did not let key"), "{said:?}");
    // What only the gateway knows, it keeps to itself; what was shown is said.
    let said = run(&mut forward(door, "stranger", None)).await;
    assert_eq!(said.code(), 1, "{said:?}");
    let shown = "nor with the certificate \"stranger\" for nobody-there, by the CA ";
    assert!(said.stderr.contains(&format!("{shown}{}", fingerprint(&site.public("ca")))), "{said:?}");
    site.record(Side::Gateway, json!({"event": "auth.refused", "reason": "certificate_principal"})).await;

    for (name, identity, certificate) in [("given", "holder", Some("good-cert.pub")), ("beside", "good", None)] {
        let mut program = site.background(name, forward(door, identity, certificate));
        let line = program.says("listening 127.").await;
        let listens = line.split_once("listening ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
        let listens: SocketAddr = listens.expect("an address");
        echoes(connect(listens).await, b"by certificate").await;
        let like = json!({"event": "forward.ended", "key_id": "good", "principal": "provisioner"});
        eventually("its record", async || site.records(Side::Gateway, &like).pop()).await;
        if certificate.is_none() {
            continue;
        }
        // It is replaced under the session, which then ends: the next one is made with the new one.
        sign(&dir, "ca", "holder", "renewed", &["-n", "provisioner", "-V", "always:forever"]).await;
        let (new, old) = (dir.join("renewed-cert.pub"), dir.join("good-cert.pub"));
        let kept = fs::read(&old).expect("a certificate");
        fs::rename(&new, &old).expect("renamed");
        site.registry().about_key(CA, "ca", "principals = [\"prov*\"]\nrevoked_key_ids = [\"good\"]");
        let like = json!({"event": "forward.open", "key_id": "renewed"});
        eventually("a forward by the new one", async || {
            through(listens).await;
            site.records(Side::Gateway, &like).pop()
        })
        .await;
        site.registry().about_key(CA, "ca", "principals = [\"prov*\"]");
        fs::write(&old, kept).expect("written");
        let reloads = json!({"event": "registry.reloaded"});
        eventually("both changes are taken over", async || {
            (site.records(Side::Gateway, &reloads).len() > 1).then_some(())
        })
        .await;
    }
    world.site.stop().await;
}

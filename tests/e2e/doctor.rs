//! `caponier doctor`: each stage broken once, and named as the first that is broken, with a step that helps; a site that is well;
//! that nothing is disturbed; and others at the other end than one would wish.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caponier::tls::{Acceptor, Certificates, ClientPolicy, Identity};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::Command;
use tokio::time::{Instant, timeout};

use crate::harness::{
    PATIENCE, Said, Side, Site, caponier, connect, echo, echoes, eventually, free_port, listen, make_key, public, run,
    within,
};
use crate::kinds::hex;
use crate::pki;
use crate::postgres::Postgres;
use crate::raw::Peer;
use crate::squid::{Authority, Squid};

/// An agent's configuration in a site's folder; the agent does not run.
struct Patient {
    settings: String,
    organisation: String,
    gateway: String,
    orchestrator: String,
    rules: String,
}

impl Patient {
    fn of(site: &Site) -> Self {
        Self {
            settings: String::new(),
            organisation: "acme".to_owned(),
            gateway: format!("ssh://{}", site.address),
            orchestrator: site.public("login-acme").trim().to_owned(),
            rules: String::new(),
        }
    }

    fn rule(mut self, toml: &str) -> Self {
        self.rules.push_str(&format!("[[organisation.allow]]\n{toml}\n"));
        self
    }

    fn write(&self, dir: &Path) -> PathBuf {
        let Self { settings, organisation, gateway, orchestrator, rules } = self;
        let file = dir.join("patient.toml");
        let text = format!(
            "[agent]\nid = \"prod-eu\"\nreplica = \"one\"\nhost_key = \"agent\"\n{settings}\n[audit]\nfile = \"patient.jsonl\"\n\
             [[organisation]]\nid = \"{organisation}\"\ngateways = [\"{gateway}\"]\n\
             [[organisation.orchestrator]]\nkey = \"{orchestrator}\"\nasserts = [\"*\"]\n{rules}"
        );
        fs::write(&file, text).expect("written");
        file
    }
}

/// Runs the doctor; its exit code and its report.
async fn doctor(config: &Path, arguments: &[&str]) -> (i32, Value) {
    let said = run(caponier().args(["doctor", "--json", "--config"]).arg(config).args(arguments)).await;
    report(&said)
}

fn report(said: &Said) -> (i32, Value) {
    let report = serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
    (said.code(), report)
}

/// The first broken stage is this one; what else there is of its way is skipped, and its next step says this.
fn broken<'a>((code, report): &'a (i32, Value), stage: &str, advice: &str) -> &'a Value {
    assert_eq!(*code, 1, "{report:#}");
    let at = report["first_broken"].as_u64().unwrap_or_else(|| panic!("nothing is broken: {report:#}"));
    let stages = report["stages"].as_array().expect("stages");
    let first = &stages[usize::try_from(at).expect("an index")];
    assert_eq!((&first["stage"], &first["verdict"]), (&json!(stage), &json!("broken")), "{report:#}");
    let next = first["next"].as_str().unwrap_or_default();
    assert!(next.contains(advice), "{advice}: {first:#}");
    for later in stages.iter().filter(|other| other["subject"] == first["subject"] && *other != first) {
        let well = ["ok", "skipped", "warning"].contains(&later["verdict"].as_str().unwrap_or_default());
        assert!(well, "{report:#}");
    }
    first
}

fn verdict(report: &Value, stage: &str) -> Vec<String> {
    let stages = report["stages"].as_array().expect("stages").iter().filter(|one| one["stage"] == stage);
    stages.map(|one| one["verdict"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Who answers TLS at a port, with this certificate; and nothing more.
async fn tls_server(dir: &Path, chain: &str, key: &str) -> SocketAddr {
    use std::os::unix::fs::PermissionsExt;
    let (chain_file, key_file) = (dir.join("server-chain.pem"), dir.join("server-key.pem"));
    fs::write(&chain_file, chain).expect("written");
    fs::write(&key_file, key).expect("written");
    fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).expect("permissions");
    let identity = Identity::read(&chain_file, &key_file).expect("a certificate");
    let certificates = Certificates::new(vec![identity]).expect("certificates");
    listen(move |stream| {
        let acceptor = Acceptor::new(certificates.clone(), ClientPolicy::default());
        async move {
            if let Ok(mut accepted) = acceptor.accept(stream).await {
                let mut all = Vec::new();
                let _ = accepted.stream.read_to_end(&mut all).await;
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_site_that_is_well_is_not_disturbed() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    let live = connect(site.doors[0]).await;
    let agents = async || -> Value {
        let said = run(caponier().args(["agents", "--json", "--socket"]).arg(site.admin_socket())).await.done();
        let mut rows: Value = serde_json::from_str(&said).expect("rows");
        for row in rows.as_array_mut().expect("rows") {
            for counted in ["credit", "held", "unsent"] {
                row[counted] = Value::Null;
            }
        }
        rows
    };
    let mut live = live;
    live.write_all(b"before").await.expect("written");
    let mut read = [0; 6];
    live.read_exact(&mut read).await.expect("read");
    let before = agents().await;
    for _ in 0..2 {
        let (code, report) = doctor(&site.config(Side::Agent), &[]).await;
        assert_eq!((code, &report["verdict"], &report["version"]), (0, &json!("ok"), &json!(1)), "{report:#}");
        for stage in ["configuration", "keys", "dns", "tcp", "clock", "ssh", "key", "organisation", "trail", "target"] {
            assert_eq!(verdict(&report, stage), ["ok"], "{stage}: {report:#}");
        }
    }
    assert_eq!(agents().await, before);
    echoes(live, b"after").await;
    // At the gateway: that it was examined, and nothing that did not happen.
    let examined = json!({"event": "agent.examined", "organisation": "acme", "agent": "prod-eu"});
    eventually("both examinations are on record", async || {
        (site.records(Side::Gateway, &examined).len() == 2).then_some(())
    })
    .await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 1);
    assert!(site.records(Side::Gateway, &json!({"event": "link.down"})).is_empty());
    for refused in site.records(Side::Gateway, &json!({"event": "auth.refused"})) {
        assert_eq!(refused["reason"], "http_in_clear", "{refused}");
    }
    // At the agent: its trail is its own, and the doctor's stands beside it.
    assert!(site.records(Side::Agent, &json!({"door": "doctor"})).is_empty());
    let of_doctor = site.trail_in("agent.jsonl.doctor");
    let dials =
        |event: &str| of_doctor.iter().filter(|record| record["event"] == event && record["door"] == "doctor").count();
    assert!(dials("forward.open") >= 2 && dials("forward.open") == dials("forward.ended"), "{of_doctor:#?}");
    let open = of_doctor.iter().find(|record| record["event"] == "forward.open").expect("a dial");
    assert_eq!((&open["target"], &open["rule"]), (&json!(target.to_string()), &json!(format!("to-{}", target.port()))));
    assert!(open.get("principal").is_none(), "{open}");
    // For people, on a terminal without UTF-8.
    let said = run(caponier().env("LC_ALL", "C").args(["doctor", "--config"]).arg(site.config(Side::Agent))).await;
    let text = said.done();
    assert!(text.is_ascii() && text.contains("ok   organisation") && text.contains("all well"), "{text}");
    site.stop().await;
}

#[tokio::test]
async fn what_the_gateway_does_not_know_is_named_with_whom_to_ask() {
    let site = Site::plan().start_gateway().await;
    // A key that is not registered.
    make_key(site.path(), "stranger");
    let file = Patient::of(&site).write(site.path());
    let text = fs::read_to_string(&file).expect("read").replace("host_key = \"agent\"", "host_key = \"stranger\"");
    fs::write(&file, text).expect("written");
    let told = doctor(&file, &[]).await;
    let first = broken(&told, "key", "caponier keys add --registry DIR agent acme/prod-eu");
    let line = public(site.path(), "stranger");
    assert!(first["next"].as_str().expect("a step").contains(line.trim().split(' ').nth(1).expect("a key")), "{first}");
    assert_eq!(verdict(&told.1, "organisation"), ["skipped"]);
    // An organisation that is called otherwise there.
    let file = Patient { organisation: "acne".to_owned(), ..Patient::of(&site) }.write(site.path());
    broken(&doctor(&file, &[]).await, "key", "organisation.id");
    // A login key that the agent does not know.
    let other = site.public("login-globex").trim().to_owned();
    let file = Patient { orchestrator: other, ..Patient::of(&site) }.write(site.path());
    let told = doctor(&file, &[]).await;
    let first = broken(&told, "organisation", "[[organisation.orchestrator]]");
    assert!(first["evidence"].as_str().expect("evidence").contains("unknown_key"), "{first}");
    assert_eq!(verdict(&told.1, "key"), ["ok"]);
    site.stop().await;
}

#[tokio::test]
async fn what_lies_on_the_way_is_named() {
    let authority = Authority::new("the gateway's own");
    let site = Site::plan().start_gateway().await;
    authority.write(&site.path().join("ca.pem"));
    // A name that nobody knows.
    let file = Patient { gateway: "ssh://gateway.invalid:443".to_owned(), ..Patient::of(&site) }.write(site.path());
    let told = doctor(&file, &[]).await;
    broken(&told, "dns", "getent hosts gateway.invalid");
    assert_eq!(verdict(&told.1, "tcp"), ["skipped"]);
    // Nobody there.
    let gateway = format!("ssh://127.0.0.1:{}", free_port());
    let file = Patient { gateway, ..Patient::of(&site) }.write(site.path());
    broken(&doctor(&file, &[]).await, "tcp", "let TCP from this host");
    // A proxy that wants a login.
    let squid = Squid::with_password().await;
    let file = Patient { settings: squid.setting(), ..Patient::of(&site) }.write(site.path());
    let told = doctor(&file, &[]).await;
    let first = broken(&told, "proxy", "agent.proxy_credentials_file");
    assert!(first["evidence"].as_str().expect("evidence").contains("407"), "{first}");
    assert_eq!(verdict(&told.1, "ssh"), ["skipped"]);
    // A middlebox that ends TLS with a certificate of its own.
    let middlebox = Authority::new("Inspection of Traffic");
    let (chain, key) = middlebox.certify(&["127.0.0.1", "localhost"]);
    let address = tls_server(site.path(), &chain, &key).await;
    let settings = "tls_ca_file = \"ca.pem\"".to_owned();
    let gateway = format!("tls://{address}");
    let file = Patient { settings: settings.clone(), gateway, ..Patient::of(&site) }.write(site.path());
    let told = doctor(&file, &["--timeout", "20"]).await;
    let first = broken(&told, "tls", "leave TLS to");
    let evidence = first["evidence"].as_str().expect("evidence");
    assert!(evidence.contains("a middlebox ends TLS here") && evidence.contains("Inspection of Traffic"), "{evidence}");
    assert!(evidence.contains("SHA256:"), "{evidence}");
    // A portal, or any other web server.
    let portal = listen(|mut stream: TcpStream| async move {
        let mut read = [0; 4096];
        let _ = stream.read(&mut read).await;
        let _ = stream
            .write_all(b"HTTP/1.1 302 Found\r\nLocation: http://portal.example/\r\nContent-Length: 0\r\n\r\n")
            .await;
    })
    .await;
    let file = Patient { gateway: format!("ssh://{portal}"), ..Patient::of(&site) }.write(site.path());
    let told = doctor(&file, &[]).await;
    broken(&told, "ssh", "captive portal");
    assert_eq!(verdict(&told.1, "clock"), ["warning"]);
    site.stop().await;
}

#[tokio::test]
async fn a_clock_that_is_an_hour_wrong_is_named_before_what_it_breaks() {
    let site = Site::plan().start_gateway().await;
    let file = Patient::of(&site).write(site.path());
    for (offset, word) in [("+1h", "ahead of"), ("-1h", "behind")] {
        let mut command = Command::new("faketime");
        let program = caponier().as_std().get_program().to_owned();
        // Timers go by the clock that nobody sets.
        command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").args(["-f", offset]).arg(program);
        let said = run(command.args(["doctor", "--json", "--config"]).arg(&file)).await;
        let told = report(&said);
        let first = broken(&told, "clock", "timedatectl");
        let evidence = first["evidence"].as_str().expect("evidence");
        assert!(evidence.contains(word) && (evidence.contains("60 min") || evidence.contains("59 min")), "{evidence}");
    }
    site.stop().await;
}

#[tokio::test]
async fn targets_resolve_are_permitted_and_answer_or_are_named() {
    let site = Site::plan().start_gateway().await;
    let database = Postgres::start("orders.db.internal").await;
    let port = database.address.port();
    let within = "within = [\"127.0.0.0/8\"]";
    // The database's certificate has another name.
    let rule = format!("name = \"orders\"\nhosts = [\"localhost\"]\n{within}\nports = [{port}]");
    let told = doctor(&Patient::of(&site).rule(&rule).write(site.path()), &[]).await;
    let first = broken(&told, "target", "sslmode=verify-full");
    let evidence = first["evidence"].as_str().expect("evidence");
    assert!(evidence.contains("PostgreSQL over TLS") && evidence.contains("orders.db.internal"), "{evidence}");
    // A literal address has names that the rule does not know: that is worth a word, and no more.
    let rule = format!("name = \"orders\"\naddresses = [\"127.0.0.1/32\"]\nports = [{port}]");
    let wide = "name = \"wide\"\naddresses = [\"10.0.0.0/8\"]\nports = [\"1-9\"]";
    let (code, report) = doctor(&Patient::of(&site).rule(&rule).rule(wide).write(site.path()), &[]).await;
    assert_eq!(code, 0, "{report:#}");
    assert_eq!(verdict(&report, "target"), ["warning", "skipped"], "{report:#}");
    // Nobody there; and the one that is asked for by hand is.
    let down = format!("name = \"down\"\naddresses = [\"127.0.0.1/32\"]\nports = [{}]", free_port());
    let patient = Patient::of(&site).rule(&down).rule(&rule);
    let told = doctor(&patient.write(site.path()), &["--target", &format!("127.0.0.1:{port}")]).await;
    let first = broken(&told, "target", "ask the network team");
    assert!(first["subject"].as_str().expect("a subject").starts_with("down: "), "{first}");
    assert_eq!(verdict(&told.1, "target"), ["broken", "warning", "warning"]);
    // A name that nobody has, one that leads elsewhere, and one that no rule has.
    let rule = "name = \"lost\"\nhosts = [\"nobody.invalid\"]\nwithin = [\"10.0.0.0/8\"]\nports = [5432]";
    broken(&doctor(&Patient::of(&site).rule(rule).write(site.path()), &[]).await, "target", "[agent.resolver]");
    let rule = "name = \"moved\"\nhosts = [\"localhost\"]\nwithin = [\"10.0.0.0/8\"]\nports = [5432]";
    let told = doctor(&Patient::of(&site).rule(rule).write(site.path()), &[]).await;
    broken(&told, "target", "`within`");
    let told = doctor(&Patient::of(&site).write(site.path()), &["--target", "127.0.0.1:9"]).await;
    broken(&told, "target", "allowlist");
    // An API server whose certificate has expired.
    let authority = pki::Authority::new(site.path(), "internal-ca");
    let leaf = pki::Leaf { names: vec!["localhost".to_owned()], for_servers: true, ..pki::Leaf::new("localhost", 7) };
    let (chain, key) = certified(site.path(), &authority, leaf.expired());
    let api = tls_server(site.path(), &chain, &key).await;
    let rule = format!("name = \"api\"\nhosts = [\"localhost\"]\n{within}\nports = [{}]", api.port());
    let told = doctor(&Patient::of(&site).rule(&rule).write(site.path()), &[]).await;
    let first = broken(&told, "target", "renew its certificate");
    assert!(first["evidence"].as_str().expect("evidence").contains("expired"), "{first}");
    // Every dial is on record, also those to nobody.
    let trail = site.trail_in("patient.jsonl.doctor");
    let count = |event: &str| trail.iter().filter(|record| record["event"] == event).count();
    assert_eq!(count("forward.open"), count("forward.ended") + count("forward.failed"), "{trail:#?}");
    assert!(count("forward.failed") >= 1);
    // Where nothing can be recorded, nothing is dialled.
    let rule = format!("name = \"orders\"\naddresses = [\"127.0.0.1/32\"]\nports = [{port}]");
    let told = doctor(&Patient::of(&site).rule(&rule).write(site.path()), &["--trail", "/proc/nowhere"]).await;
    broken(&told, "trail", "--trail FILE");
    assert_eq!(verdict(&told.1, "target"), ["skipped"]);
    site.stop().await;
}

/// A certificate and its key.
fn certified(dir: &Path, authority: &pki::Authority, leaf: pki::Leaf) -> (String, String) {
    authority.sign("doctor-leaf", &leaf);
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    (read("doctor-leaf.pem"), read("doctor-leaf.key"))
}

/// Whoever answers, each stage ends in its time, and takes little memory for it.
#[tokio::test]
async fn hostile_others_are_waited_for_until_the_deadline_and_no_longer() {
    let site = Site::plan().start_gateway().await;
    let flood = async |begin: &'static [u8], more: &'static [u8]| {
        listen(move |mut stream: TcpStream| async move {
            let _ = stream.write_all(begin).await;
            let chunk = more.repeat(64 * 1024 / more.len().max(1));
            for _ in 0..16 * 1024 {
                if more.is_empty() || stream.write_all(&chunk).await.is_err() {
                    break;
                }
            }
            // Then silence.
            let mut read = [0; 4096];
            while stream.read(&mut read).await.is_ok_and(|read| read > 0) {}
        })
        .await
    };
    let others = [
        flood(b"", b"").await,
        flood(b"SSH-2.0-", b"x").await,
        flood(b"SSH-2.0-caponier_1\r\n", b"\x00\x00\x00\x0c\x0aIGNORED").await,
        flood(b"HTTP/1.1 200 OK\r\n", b"X-Y: z\r\n").await,
        flood(b"\x16\x03\x03\x40\x00", b"\x02").await,
        flood(b"\x4a\x00\x00\x00\x0a", b"8.0").await,
    ];
    for address in others {
        for scheme in ["ssh", "tls"] {
            let rule = format!("name = \"same\"\naddresses = [\"127.0.0.1/32\"]\nports = [{}]", address.port());
            let mut patient = Patient { gateway: format!("{scheme}://{address}"), ..Patient::of(&site) };
            // The gateway's own address is not a target.
            let other = if scheme == "ssh" { others[0] } else { others[1] };
            let rule = rule.replace(&address.port().to_string(), &other.port().to_string());
            patient.settings = "tls_ca_file = \"ca.pem\"".to_owned();
            Authority::new("nobody").write(&site.path().join("ca.pem"));
            let file = patient.rule(&rule).write(site.path());
            let mut command = Command::new("prlimit");
            // Of what a gigabyte would not fit into.
            command.arg("--as=900000000").arg(caponier().as_std().get_program());
            let begun = Instant::now();
            let said = run(command.args(["doctor", "--json", "--timeout", "2", "--config"]).arg(&file)).await;
            let (code, report) = report(&said);
            assert_eq!(code, 1, "{scheme}://{address}: {report:#}");
            for stage in report["stages"].as_array().expect("stages") {
                let elapsed = stage["elapsed_ms"].as_u64().expect("a time");
                assert!(elapsed < 30_000, "{stage}");
            }
            assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
        }
    }
    site.stop().await;
}

/// Runs the gateway's doctor.
async fn of_gateway(site: &Site) -> (i32, Value) {
    doctor(&site.config(Side::Gateway), &["--gateway"]).await
}

#[tokio::test]
async fn a_gateway_is_examined_from_where_it_runs() {
    let mut site = Site::plan().start().await;
    // With the port that it was given.
    let config = fs::read_to_string(site.config(Side::Gateway)).expect("read");
    let config = config.replace("listen = [\"127.0.0.1:0\"]", &format!("listen = [\"{}\"]", site.address));
    fs::write(site.config(Side::Gateway), config).expect("written");
    let (code, told) = of_gateway(&site).await;
    assert_eq!((code, &told["verdict"], &told["of"]), (0, &json!("ok"), &json!("gateway")), "{told:#}");
    for stage in ["configuration", "clock", "registry", "certificates", "trail", "descriptors", "admin", "agents"] {
        assert_eq!(verdict(&told, stage), ["ok"], "{stage}: {told:#}");
    }
    // An agent that is missing, a key that ends soon, one that nobody has: each is a word, and nothing is broken.
    site.registry().about_key("acme/principals/provisioner", "one", "expires = 2099-01-01T00:00:00Z");
    fs::create_dir_all(site.registry().folder("acme/agents/bare")).expect("a folder");
    site.program(Side::Agent).stop().await;
    let (code, told) = of_gateway(&site).await;
    assert_eq!((code, &told["verdict"]), (0, &json!("warning")), "{told:#}");
    let registry = told["stages"].as_array().expect("stages").iter().find(|one| one["stage"] == "registry");
    let evidence = registry.expect("a stage")["evidence"].as_str().expect("evidence");
    assert!(evidence.contains("acme/bare has no key"), "{evidence}");
    assert_eq!(verdict(&told, "agents"), ["warning", "ok"], "{told:#}");
    // A fault in the registry.
    site.registry().key("acme/agents/prod-eu", "two", "garbage");
    let told = of_gateway(&site).await;
    broken(&told, "registry", "correct what stands");
    fs::remove_file(site.registry().folder("acme/agents/prod-eu").join("two.pub")).expect("removed");
    // Somebody else has the port.
    site.program(Side::Gateway).stop().await;
    let taken = std::net::TcpListener::bind(site.address).expect("the port");
    broken(&of_gateway(&site).await, "listener", "ss -ltnp");
    drop(taken);
    // A disk that is full.
    let disk = site.path().join("disk");
    fs::create_dir(&disk).expect("a folder");
    let config = fs::read_to_string(site.config(Side::Gateway)).expect("read");
    let config = config.replace("file = \"gateway.jsonl\"", "file = \"disk/gateway.jsonl\"");
    fs::write(site.config(Side::Gateway), config).expect("written");
    let script = format!(
        "mount -t tmpfs -o size=512k caponier {disk} && : > {disk}/gateway.jsonl && chmod 600 {disk}/gateway.jsonl && \
         {program} doctor --json --gateway --config {config}",
        disk = disk.display(),
        program = caponier().as_std().get_program().display(),
        config = site.config(Side::Gateway).display(),
    );
    let said = run(Command::new("unshare").args(["--mount", "sh", "-c", &script])).await;
    broken(&report(&said), "trail", "make room");
    // A configuration with a fault is the other exit code.
    fs::write(site.config(Side::Gateway), "[gateway]\nlisten = 5\n").expect("written");
    let (code, told) = of_gateway(&site).await;
    assert_eq!((code, told["stages"][0]["stage"].as_str()), (2, Some("configuration")), "{told:#}");
    within("the site's end", async { drop(site) }).await;
}

#[tokio::test]
async fn an_agent_is_examined_over_its_link_where_its_owner_has_chosen_so() {
    let target = echo().await;
    let down = free_port();
    let plan = Site::plan().allow(target).allow(SocketAddr::from(([127, 0, 0, 1], down)));
    let mut site = plan.start().await;
    let ask = async |site: &Site| {
        let mut command = caponier();
        run(command.args(["doctor", "acme/prod-eu", "--json", "--socket"]).arg(site.admin_socket())).await
    };
    // Whoever has not chosen so answers nothing, and the command says so.
    let said = ask(&site).await;
    assert!(said.code() == 4 && said.stderr.contains("agent.remote_doctor"), "{said:?}");
    assert!(site.records(Side::Agent, &json!({"event": "agent.examined"})).is_empty());
    site.change_agent("remote_doctor = true", &[]);
    site.restart_agent().await;
    site.linked().await;
    let said = ask(&site).await;
    let told = report(&said);
    assert_eq!((told.0, &told.1["of"]), (1, &json!("remote")), "{told:?}");
    let found: Vec<_> =
        told.1["stages"].as_array().expect("stages").iter().map(|one| (&one["subject"], &one["evidence"])).collect();
    let rules = [format!("to-{}", target.port()), format!("to-{down}")].map(Value::from);
    assert_eq!(found, [(&rules[0], &json!("answers")), (&rules[1], &json!("connect_failed"))]);
    // Nothing of the network behind the agent is told.
    assert!(!said.stdout.contains("127.0.0.1"), "{said:?}");
    // Once a minute; what was not examined is not called well.
    let again = ask(&site).await;
    assert!(again.code() == 4 && again.stderr.contains("a moment ago") && again.stdout.is_empty(), "{again:?}");
    // Both trails have the one that there was, and the agent's has each dial. The gateway's has what came of the other.
    for side in [Side::Agent, Side::Gateway] {
        let examined = json!({"event": "agent.examined", "organisation": "acme", "agent": "prod-eu"});
        let record = site.record(side, examined.clone()).await;
        assert_eq!(site.records(side, &examined).len(), 1, "{}", side.name());
        let detail = record["detail"].as_str().expect("a detail");
        assert!(side == Side::Agent || detail.contains("1 in order, 0 with a warning, 1 broken"), "{detail}");
    }
    let failed = json!({"event": "agent.examination_failed", "agent": "prod-eu", "reason": "nothing_examined"});
    site.record(Side::Gateway, failed).await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "agent.examination_asked"})).len(), 2);
    site.record(Side::Agent, json!({"event": "forward.failed", "door": "doctor", "reason": "connect_failed"})).await;
    site.record(Side::Agent, json!({"event": "forward.ended", "door": "doctor", "reason": "examined"})).await;
    // An agent that nobody knows.
    let said = run(caponier().args(["doctor", "acme/nobody", "--socket"]).arg(site.admin_socket())).await;
    assert!(said.code() == 4 && said.stderr.contains("not linked"), "{said:?}");
    site.stop().await;
}

/// An agent that is played: it lets itself be examined, and says what a test wants.
struct Played {
    peer: Peer,
    control: Value,
}

impl Played {
    async fn link(site: &Site, replica: &str) -> Self {
        let mut peer = Peer::start();
        peer.ask(json!({"do": "connect", "port": site.address.port()})).await;
        let line = format!("SSH-2.0-caponier_1 agent=acme/prod-eu/{replica}");
        peer.ask(json!({"do": "server", "identification": line, "key": site.key("agent")})).await;
        let session = peer.ask(json!({"do": "next", "messages": [90], "within": 60})).await;
        let control = peer.ask(json!({"do": "accept_channel", "sender": session["sender"]})).await["id"].clone();
        peer.ask(json!({"do": "next", "messages": [98], "within": 60})).await;
        peer.ask(json!({"do": "reply", "id": control})).await;
        let mut played = Self { peer, control };
        let hello = json!({"version": "0.1.0", "features": ["credit", "doctor"], "channels": 64, "replica": replica});
        played.say(1, hello.to_string().as_bytes()).await;
        played.hears(1).await;
        site.record(Side::Gateway, json!({"event": "link.up", "replica": replica})).await;
        played
    }

    /// Says something on the control channel.
    async fn say(&mut self, kind: u16, body: &[u8]) {
        let length = u32::try_from(body.len() + 2).expect("short");
        let message = [&length.to_be_bytes()[..], &kind.to_be_bytes(), body].concat();
        self.peer.ask(json!({"do": "send", "id": self.control, "hex": hex(&message)})).await;
    }

    async fn take(&mut self, bytes: usize) -> Vec<u8> {
        let asked = json!({"do": "receive", "id": self.control, "bytes_": bytes, "within": 60});
        let got = self.peer.ask(asked).await["data"].as_str().expect("bytes").to_owned();
        assert_eq!(got.len(), 2 * bytes, "{got}");
        let digits = |at| u8::from_str_radix(&got[at..at + 2], 16).expect("digits");
        (0..got.len()).step_by(2).map(digits).collect()
    }

    /// Waits for such a message on the control channel.
    async fn hears(&mut self, kind: u16) {
        loop {
            let length = self.take(4).await;
            let length = u32::from_be_bytes(length.try_into().expect("four"));
            let message = self.take(usize::try_from(length).expect("a length")).await;
            if message[..2] == kind.to_be_bytes() {
                return;
            }
        }
    }
}

const EXAMINE: u16 = 8;
const EXAMINED: u16 = 9;

#[tokio::test]
async fn a_report_that_tells_of_nothing_is_a_failure_with_words_of_its_own() {
    let site = Site::plan().start_gateway().await;
    let mut played = Played::link(&site, "one").await;
    let finding = json!({"stage": "target", "subject": "to-db", "verdict": "ok", "evidence": "answers"});
    let of = |stages: Value, more: Value| {
        let mut report = json!({"version": 1, "of": "remote", "verdict": "ok", "stages": stages});
        report.as_object_mut().expect("a report").extend(more.as_object().expect("members").clone());
        report
    };
    let not_all =
        json!([finding, {"stage": "doctor", "subject": "-", "verdict": "skipped", "evidence": "not all of it"}]);
    let many: Vec<_> = std::iter::repeat_n(finding.clone(), 129).collect();
    for (report, code, words, reason) in [
        (of(json!([]), json!({})), 4, "empty report", Some("empty")),
        (of(json!([finding]), json!({"version": 2})), 4, "makes no sense", Some("nonsense")),
        (of(json!([finding]), json!({"verdict": "broken", "first_broken": 0})), 4, "makes no sense", Some("nonsense")),
        (of(json!(many), json!({})), 4, "more than 128", Some("too_long")),
        (of(not_all, json!({})), 4, "not all of it", None),
        (of(json!([finding]), json!({})), 0, "", None),
    ] {
        let mut command = caponier();
        command.args(["doctor", "acme/prod-eu", "--socket"]).arg(site.admin_socket());
        let answering = async {
            played.hears(EXAMINE).await;
            played.say(EXAMINED, report.to_string().as_bytes()).await;
        };
        let (said, ()) = tokio::join!(run(&mut command), answering);
        assert_eq!(said.code(), code, "{report}: {said:?}");
        assert!(said.stderr.contains(words), "{words}: {said:?}");
        match reason {
            Some(reason) => {
                site.record(Side::Gateway, json!({"event": "agent.examination_failed", "reason": reason})).await;
                assert!(site.records(Side::Gateway, &json!({"event": "agent.examined"})).is_empty());
                assert_eq!(said.stdout, "");
            }
            None => drop(site.record(Side::Gateway, json!({"event": "agent.examined", "replica": "one"})).await),
        }
    }
    assert_eq!(site.records(Side::Gateway, &json!({"event": "agent.examined"})).len(), 2);
    // One that is cut off in the middle breaks the protocol, and with it the link.
    let mut command = caponier();
    command.args(["doctor", "acme/prod-eu", "--socket"]).arg(site.admin_socket());
    let answering = async {
        played.hears(EXAMINE).await;
        played.say(EXAMINED, b"{\"version\":1,\"of\":\"remote\",\"verdict\":\"ok\",\"stages\":[").await;
    };
    let (said, ()) = tokio::join!(run(&mut command), answering);
    assert!(said.code() == 4 && said.stderr.contains("was lost meanwhile"), "{said:?}");
    site.record(Side::Gateway, json!({"event": "agent.examination_failed", "reason": "link_lost"})).await;
    site.stop().await;
}

#[tokio::test]
async fn examinations_leave_the_admin_socket_to_others() {
    let site = Site::plan().start_gateway().await;
    let mut silent = Vec::new();
    for replica in ["one", "two", "three", "four", "five"] {
        silent.push(Played::link(&site, replica).await);
    }
    let asked = json!({"event": "agent.examination_asked"});
    let ask = async || {
        let before = site.records(Side::Gateway, &asked).len();
        let mut stream = UnixStream::connect(site.admin_socket()).await.expect("the admin socket");
        stream.write_all(b"{\"request\":\"examine\",\"agent\":\"acme/prod-eu\"}\n").await.expect("asked");
        eventually("the agent is asked", async || (site.records(Side::Gateway, &asked).len() > before).then_some(()))
            .await;
        stream
    };
    let mut waiting = Vec::new();
    for _ in 0..4 {
        waiting.push(ask().await);
    }
    // A fifth is refused at once, whoever else would still answer; and other questions are answered.
    let mut command = caponier();
    let said = run(command.args(["doctor", "acme/prod-eu", "--socket"]).arg(site.admin_socket())).await;
    assert!(said.code() == 4 && said.stderr.contains("4 examinations are under way"), "{said:?}");
    assert_eq!(site.records(Side::Gateway, &asked).len(), 4);
    run(caponier().args(["agents", "--socket"]).arg(site.admin_socket())).await.done();
    // Whoever asked goes away: that one is given up, and its place is free.
    drop(waiting.pop());
    site.record(Side::Gateway, json!({"event": "agent.examination_failed", "reason": "given_up"})).await;
    waiting.push(
        within("a place", async {
            loop {
                let before = site.records(Side::Gateway, &asked).len();
                let mut stream = UnixStream::connect(site.admin_socket()).await.expect("the admin socket");
                stream.write_all(b"{\"request\":\"examine\",\"agent\":\"acme/prod-eu\"}\n").await.expect("asked");
                // It is on record, or an answer says that there is no place yet.
                let mut answer = [0; 1];
                let refused = loop {
                    match timeout(Duration::from_millis(50), stream.read(&mut answer)).await {
                        Ok(_) => break true,
                        Err(_) if site.records(Side::Gateway, &asked).len() > before => break false,
                        Err(_) => {}
                    }
                };
                if !refused {
                    return stream;
                }
            }
        })
        .await,
    );
    drop(waiting);
    drop(silent);
    site.stop().await;
}

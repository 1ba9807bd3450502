//! Bad input: from strangers on the wire, in configurations, and in key files.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::harness::{Said, Side, Site, caponier, connect, echo, echoes, eventually, listen, read_to_end, run};

/// What is no identification string that we go on with, and what is said about it.
const IDENTIFICATIONS: [(&[u8], &str); 16] = [
    (b"", "closed the connection before it identified itself"),
    (b"SSH-2.0-OpenSS", "closed the connection before it identified itself"),
    (b"\0", "does not speak SSH"),
    (b"\r\n", "does not speak SSH"),
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "does not speak SSH; it said \"GET / HTTP/1.1"),
    (b"\x16\x03\x01\x02\x00\x01\x00", "answered in TLS, and SSH was asked for"),
    (b"\xff\xfe\xfd\xfc", "does not speak SSH"),
    (b"a line before\r\nSSH-2.0-OpenSSH_9.2\r\n", "does not speak SSH"),
    (b"SSH-1.5-old\r\n", "another version of SSH"),
    (b"SSH-2.0-\x1b]0;pwned\x07\r\n", "not printable ASCII"),
    (b"SSH-2.0-a\0b\r\n", "not printable ASCII"),
    (b"SSH-2.0-caf\xc3\xa9\r\n", "not printable ASCII"),
    (&[b'S'; 4096], "does not speak SSH"),
    (b"SSH-2.0-caponier_2 client\r\n", "version 2 of caponier's protocol and this end version 1"),
    (b"SSH-2.0-caponier_1 agent=ACME/../prod\r\n", "not one of caponier's"),
    (b"SSH-2.0-caponier_99999999999999999999\r\n", "not one of caponier's"),
];

/// An identification string of 4,000 characters.
fn oversized() -> Vec<u8> {
    [&b"SSH-2.0-"[..], &[b'x'; 4_000], b"\r\n"].concat()
}

/// That nothing in a log or a trail could act on a terminal.
fn is_plain(text: &str) {
    let odd: Vec<_> = text.chars().filter(|character| character.is_control() && *character != '\n').collect();
    assert!(odd.is_empty(), "{odd:?} in {text}");
}

#[tokio::test]
async fn the_gateway_turns_malformed_identifications_away_and_says_why() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let oversized = oversized();
    // At the gateway, which speaks more than SSH, those two have tests of their own.
    let other = |bytes: &[u8]| bytes.starts_with(b"GET ") || bytes.starts_with(b"\x16");
    let cases = IDENTIFICATIONS.iter().map(|(bytes, words)| (*bytes, *words)).filter(|(bytes, _)| !other(bytes));
    for (number, (bytes, words)) in cases.chain([(&oversized[..], "longer than 255 bytes")]).enumerate() {
        let mut stream = TcpStream::connect(site.address).await.expect("connected");
        // The gateway may have closed already.
        drop(stream.write_all(bytes).await);
        drop(stream.shutdown().await);
        let answer = read_to_end(stream).await;
        // Whoever is silent long enough gets the door's line, and nothing else.
        assert!([&b""[..], b"SSH-2.0-caponier_1\r\n"].contains(&&answer[..]), "{bytes:?} is answered {answer:?}");
        let refused = eventually("a record of the refusal", async || {
            site.records(Side::Gateway, &json!({"event": "auth.refused"})).into_iter().nth(number)
        })
        .await;
        assert_eq!(refused["reason"], "identification", "{bytes:?}: {refused}");
        assert!(refused["detail"].as_str().expect("a detail").contains(words), "{bytes:?}: {refused}");
        assert!(refused["client"].as_str().expect("a client").starts_with("127.0.0.1:"));
    }
    let log = site.program(Side::Gateway).log();
    is_plain(&log);
    is_plain(&fs::read_to_string(site.path().join("gateway.jsonl")).expect("a trail"));
    echoes(connect(site.doors[0]).await, b"the gateway lives on").await;
    site.stop().await;
}

#[tokio::test]
async fn the_gateway_outlives_garbage_after_the_identification() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    // Neither key exchange, nor packets; and lengths that are none.
    let noise: Vec<u8> = (0..100_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for line in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"SSH-2.0-caponier_1 agent=acme/prod-eu/two\r\n"] {
        for garbage in [&noise[..], &[0; 4096], &[0xff; 4096], b"\0\0\0\x0c\x0a\x14"] {
            let mut stream = TcpStream::connect(site.address).await.expect("connected");
            drop(stream.write_all(line).await);
            drop(stream.write_all(garbage).await);
            drop(stream.shutdown().await);
            read_to_end(stream).await;
        }
    }
    eventually("eight refusals", async || {
        (site.records(Side::Gateway, &json!({"event": "auth.refused"})).len() == 8).then_some(())
    })
    .await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 1);
    echoes(connect(site.doors[0]).await, b"the gateway lives on").await;
    site.stop().await;
}

#[tokio::test]
async fn the_agent_turns_malformed_identifications_away_and_says_why() {
    let mut site = Site::plan().start_gateway().await;
    let gateway = site.address;
    let oversized = oversized();
    let cases = IDENTIFICATIONS.iter().map(|(bytes, words)| (*bytes, *words)).chain([
        (oversized.leak() as &'static [u8], "longer than 255 bytes"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is an SSH server or client, but no caponier gateway"),
        (b"SSH-2.0-caponier_1 client\r\n\xff\xff\xff\xffgarbage", "the SSH handshake with gateway"),
    ]);
    for (bytes, words) in cases {
        site.address = listen(move |mut stream: TcpStream| async move {
            drop(stream.write_all(bytes).await);
            drop(stream.shutdown().await);
            // Until the agent hangs up.
            drop(tokio::io::copy(&mut stream, &mut tokio::io::sink()).await);
        })
        .await;
        site.restart_agent().await;
        let agent = site.program(Side::Agent);
        let line = agent.says("not linked").await;
        assert!(line.contains(words), "{bytes:?}: {line}");
        is_plain(&agent.log());
        agent.says("waiting before the next attempt").await;
        assert_eq!(agent.stop().await, Some(0));
    }
    site.address = gateway;
    site.restart_agent().await;
    site.linked().await;
    site.stop().await;
}

/// Checks a changed configuration, and starts with it: both must say the same, with exit code 2.
async fn is_refused(dir: &Path, side: Side, text: &str, words: &[&str]) {
    let file = dir.join("changed.toml");
    fs::write(&file, text).expect("written");
    let checked = run(caponier().arg("check").arg(&file)).await;
    let started = run(caponier().arg(side.name()).arg("--config").arg(&file)).await;
    for said in [&checked, &started] {
        assert_eq!((said.code(), said.stdout.as_str()), (2, ""), "{words:?}: {said:?}");
        assert!(!said.stderr.contains("panicked"), "{said:?}");
        for word in words.iter().chain(&["changed.toml"]) {
            assert!(said.stderr.contains(word), "{word} is not in {said:?}");
        }
    }
    assert_eq!(checked.stderr, started.stderr);
}

#[tokio::test]
async fn faulty_configurations_are_refused_with_file_line_and_key() {
    let target = SocketAddr::from(([127, 0, 0, 1], 1));
    let plan = Site::plan().allow(target).door(target);
    let network = "name = \"by-name\"\nhosts = [\"db.internal\"]\nwithin = [\"10.0.0.0/8\"]\nports = [5432]";
    let mut site = plan.rule(network).start().await;
    let dir = site.path().to_owned();
    let agent = fs::read_to_string(site.config(Side::Agent)).expect("a configuration");
    let gateway = fs::read_to_string(site.config(Side::Gateway)).expect("a configuration");
    for side in [Side::Agent, Side::Gateway] {
        assert_eq!(site.program(side).stop().await, Some(0));
        let checked = run(caponier().arg("check").arg(site.config(side))).await;
        assert!(checked.done().contains("in order"));
    }
    let gateways = format!("ssh://{}", site.address);
    let cases: [(Side, &str, &str, &[&str]); 21] = [
        (Side::Agent, "replica = ", "colour = ", &["toml:3: agent.colour: unknown key"]),
        (Side::Agent, "[audit]", "[audits]", &["audits: unknown key", "audit: "]),
        (Side::Agent, "10.0.0.0/8", "10.0.0.0/33", &["organisation[0].allow[1].within[0]: a network is wanted"]),
        (Side::Agent, "127.0.0.1/32", "127.0.0.256/32", &["organisation[0].allow[0].addresses[0]: a network"]),
        (Side::Agent, "127.0.0.1/32", "127.0.0.1/8", &["organisation[0].allow[0].addresses"]),
        (Side::Agent, "name = \"by-name\"", "name = \"to-1\"", &["organisation[0].allow[1].name", "to-1"]),
        (Side::Agent, "within = [\"10.0.0.0/8\"]", "", &["organisation[0].allow[1].within: this key is missing"]),
        (Side::Agent, "ports = [5432]", "ports = []", &["organisation[0].allow[1].ports"]),
        (Side::Agent, "ports = [5432]", "ports = [0]", &["organisation[0].allow[1].ports[0]"]),
        (Side::Agent, "ports = [5432]", "ports = \"5432\"", &["organisation[0].allow[1].ports"]),
        (
            Side::Agent,
            "host_key = \"agent\"",
            "host_key = \"absent\"",
            &["agent.host_key: key file ", "absent", "No such file"],
        ),
        (Side::Agent, "db.internal", "db..internal", &["organisation[0].allow[1].hosts[0]"]),
        (Side::Agent, &gateways, "https://gateway", &["organisation[0].gateways[0]", "ssh://HOST"]),
        (Side::Agent, "id = \"acme\"", "id = \"acme\"\nid = \"acme\"", &["duplicate"]),
        (Side::Agent, "[agent]", "[agent", &["toml:1"]),
        (Side::Gateway, "registry = \"keys\"", "registry = \"absent\"", &["gateway.registry: no folder", "absent"]),
        (Side::Gateway, "host_key = \"gateway\"", "host_key = \"keys\"", &["gateway.host_key: key file ", "keys"]),
        (Side::Gateway, "id = \"globex\"", "id = \"acme\"", &["organisation[1].id"]),
        (Side::Gateway, "login_key = \"login-globex\"", "login_key = \"login-acme\"", &["organisation[1].login_key"]),
        (Side::Gateway, "principal = \"provisioner\"", "", &["local[0].principal: this key is missing"]),
        (Side::Gateway, "agent = \"acme/prod-eu\"", "agent = \"nobody/prod-eu\"", &["local[0].agent", "nobody"]),
    ];
    for (side, from, to, words) in cases {
        let whole = if side == Side::Agent { &agent } else { &gateway };
        assert!(whole.contains(from), "{from} is not in {whole}");
        is_refused(&dir, side, &whole.replacen(from, to, 1), words).await;
    }
    // All at once, not one after the other.
    let many = agent.replace("replica = ", "colour = ").replace("10.0.0.0/8", "10.0.0.0/33").replace("5432", "0");
    is_refused(&dir, Side::Agent, &many, &["agent.colour", "within[0]", "ports[0]"]).await;

    let absent = run(caponier().args(["agent", "--config", "/nonexistent/agent.toml"])).await;
    assert_eq!(absent.code(), 2);
    assert!(absent.stderr.contains("/nonexistent/agent.toml"), "{absent:?}");
    let other = run(caponier().args(["agent", "--config"]).arg(site.config(Side::Gateway))).await;
    assert_eq!(other.code(), 2);
    assert!(other.stderr.contains("gateway.toml is not an agent's configuration"), "{other:?}");
    // The environment is told apart from the file.
    let environment =
        run(caponier().arg("check").arg(site.config(Side::Agent)).env("CAPONIER_AGENT__COLOUR", "red")).await;
    assert_eq!(environment.code(), 2);
    assert!(environment.stderr.contains("CAPONIER_AGENT__COLOUR"), "{environment:?}");
}

#[tokio::test]
async fn key_files_of_a_wrong_kind_are_refused_by_name() {
    let site = Site::plan().start().await;
    let dir = site.path();
    let keygen = async |name: &str, arguments: &[&str]| -> Said {
        run(Command::new("ssh-keygen").args(arguments).args(["-q", "-C", "", "-f"]).arg(dir.join(name))).await
    };
    keygen("short", &["-t", "rsa", "-b", "2048", "-N", ""]).await.done();
    keygen("locked", &["-t", "ed25519", "-N", "passphrase"]).await.done();
    keygen("signer", &["-t", "ed25519", "-N", ""]).await.done();
    keygen("signed", &["-t", "ed25519", "-N", ""]).await.done();
    let mut sign = Command::new("ssh-keygen");
    sign.arg("-q").arg("-s").arg(dir.join("signer")).args(["-I", "id"]).arg(dir.join("signed.pub"));
    run(&mut sign).await.done();
    let certified = rcgen::KeyPair::generate().expect("a key");
    let certificate = rcgen::CertificateParams::new(vec!["x".to_owned()]).expect("parameters");
    let certificate = certificate.self_signed(&certified).expect("a certificate").pem();
    let whole = fs::read_to_string(dir.join("agent")).expect("a key");
    let mut files = vec![
        ("empty", Vec::new()),
        ("garbage", b"this is no key".to_vec()),
        ("binary", (0..=255).collect()),
        ("certificate.pem", certificate.into_bytes()),
        ("truncated", whole.as_bytes()[..whole.len() / 2].to_vec()),
        ("huge", vec![b'A'; 2 * 1024 * 1024]),
        ("public", fs::read(dir.join("agent.pub")).expect("a key")),
    ];
    for name in ["short", "locked"] {
        files.push((name, fs::read(dir.join(name)).expect("a key")));
    }
    let agent = fs::read_to_string(site.config(Side::Agent)).expect("a configuration");
    for (name, bytes) in &files {
        let name = format!("bad-{name}");
        let path = dir.join(&name);
        fs::write(&path, bytes).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("permissions");
        let text = agent.replace("host_key = \"agent\"", &format!("host_key = \"{name}\""));
        is_refused(dir, Side::Agent, &text, &["agent.host_key: key file ", &name]).await;
        if name != "bad-public" {
            let told = run(caponier().args(["keys", "fingerprint"]).arg(&path)).await;
            // That others may read a fingerprint of a short key is no reason to accept it, nor is a lock to be picked.
            assert_eq!((told.code(), told.stdout.as_str()), (2, ""), "{name}: {told:?}");
            assert!(told.stderr.contains(&name), "{told:?}");
        }
    }
    fs::copy(dir.join("agent"), dir.join("open")).expect("copied");
    fs::set_permissions(dir.join("open"), fs::Permissions::from_mode(0o640)).expect("permissions");
    let text = agent.replace("host_key = \"agent\"", "host_key = \"open\"");
    is_refused(dir, Side::Agent, &text, &["agent.host_key", "chmod 600"]).await;

    // In the registry, where public keys belong: the file is named, and nothing of a private one is shown.
    let gateway = fs::read_to_string(site.config(Side::Gateway)).expect("a configuration");
    let private = fs::read_to_string(dir.join("agent")).expect("a key");
    let pair = format!("{}\n{}\n", site.public("agent"), site.public("gateway"));
    let certificate = fs::read_to_string(dir.join("signed-cert.pub")).expect("a certificate");
    let short = fs::read_to_string(dir.join("short.pub")).expect("a key");
    for (what, text) in [
        ("private", &private),
        ("two", &pair),
        ("certificate", &certificate),
        ("short", &short),
        ("garbage", &"ssh-ed25519 AAAA".to_owned()),
        ("empty", &String::new()),
    ] {
        let file = format!("wrong-{what}");
        site.registry().key("globex/agents/somebody", &file, text);
        let changed = dir.join("changed.toml");
        fs::write(&changed, &gateway).expect("written");
        for command in [&["check"][..], &["gateway", "--config"]] {
            let said = run(caponier().args(command).arg(&changed)).await;
            assert_eq!(said.code(), 2, "{what} with {command:?}: {said:?}");
            assert!(said.stderr.contains(&format!("{file}.pub")), "{said:?}");
            assert!(!said.stderr.contains(private.lines().nth(2).expect("a line")), "{said:?}");
        }
        fs::remove_dir_all(site.registry().folder("globex/agents/somebody")).expect("removed");
    }
    site.stop().await;
}

#[tokio::test]
async fn every_command_shows_an_example() {
    let mut commands: Vec<Vec<String>> = vec![Vec::new()];
    let mut seen = 0;
    while let Some(command) = commands.pop() {
        let help = run(caponier().args(&command).arg("--help")).await.done();
        assert!(help.contains("\nExample:\n  caponier "), "{command:?} shows none: {help}");
        seen += 1;
        let listed = help.split_once("\nCommands:\n").map_or("", |(_, rest)| rest);
        for line in listed.lines().take_while(|line| !line.is_empty()) {
            // Continuations of a description are indented further.
            let Some(name) = line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')) else { continue };
            let name = name.split(' ').next().expect("a name");
            if name != "help" {
                commands.push(command.iter().cloned().chain([name.to_owned()]).collect());
            }
        }
    }
    assert!(seen >= 13, "only {seen} commands found");
}

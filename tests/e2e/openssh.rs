//! Stock OpenSSH at the SSH door.

use std::net::SocketAddr;
use std::process::Stdio;

use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::harness::{
    AGENT, Said, Side, Site, connect, echo, echoes, eventually, free_port, read_to_end, run, web, within,
};

/// What carries a megabyte carries everything that the tests below send.
fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
}

#[tokio::test]
async fn local_forwarding_carries_bytes_and_is_recorded_on_both_sides() {
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    let (ssh, address) = site.local_forward(target).await;
    let mut stream = connect(address).await;
    for _ in 0..32 {
        echoes(&mut stream, &bytes(32 * 1024)).await;
    }
    stream.shutdown().await.expect("shut down");
    assert_eq!(read_to_end(&mut stream).await, b"");

    let opened = site.record(Side::Gateway, json!({"event": "forward.open"})).await;
    let ended = site.record(Side::Gateway, json!({"event": "forward.ended"})).await;
    for record in [&opened, &ended] {
        assert_eq!(record["forward"], opened["forward"]);
        assert_eq!(record["organisation"], "acme");
        assert_eq!(record["agent"], "prod-eu");
        assert_eq!(record["principal"], "provisioner");
        assert_eq!(record["door"], "ssh");
        assert_eq!(record["target"], target.to_string());
        let key = record["key"].as_str().expect("a key");
        assert!(key.starts_with("SHA256:"), "{key}");
        let client: SocketAddr = record["client"].as_str().expect("a client").parse().expect("an address");
        assert!(client.ip().is_loopback());
    }
    assert_eq!(ended["reason"], "eof");
    assert_eq!((&ended["to_target"], &ended["from_target"]), (&json!(1 << 20), &json!(1 << 20)));
    assert_eq!(ended["replica"], "one");

    let of_agent = site.record(Side::Agent, json!({"event": "forward.ended"})).await;
    assert_eq!(of_agent["peer_forward"], opened["forward"]);
    assert_ne!(of_agent["forward"], opened["forward"]);
    assert_eq!(of_agent["principal"], "provisioner");
    assert!(of_agent["asserted_by"].as_str().expect("who asserts").starts_with("SHA256:"));
    assert_eq!(of_agent["client"], opened["client"]);
    assert_eq!(of_agent["rule"], format!("to-{}", target.port()));
    assert_eq!(of_agent["resolved"], json!([target.ip().to_string()]));
    assert_eq!(of_agent["dialled"], target.to_string());
    assert_eq!((&of_agent["to_target"], &of_agent["from_target"]), (&json!(1 << 20), &json!(1 << 20)));
    drop(ssh);
    site.stop().await;
}

#[tokio::test]
async fn stdio_forwarding_carries_bytes_and_ends_with_them() {
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    let mut ssh = site.ssh(&["-W", &target.to_string()]);
    let mut ssh = ssh.kill_on_drop(true).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("ssh runs");
    let (mut stdin, stdout) = (ssh.stdin.take().expect("stdin"), ssh.stdout.take().expect("stdout"));
    stdin.write_all(b"one line\n").await.expect("written");
    drop(stdin);
    assert_eq!(read_to_end(stdout).await, b"one line\n");
    assert_eq!(within("the end of ssh", ssh.wait()).await.expect("its status").code(), Some(0));
    let ended = site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "eof"})).await;
    assert_eq!((&ended["to_target"], &ended["from_target"]), (&json!(9), &json!(9)));
    site.stop().await;
}

#[tokio::test]
async fn dynamic_forwarding_serves_names_and_addresses_that_are_allowed_and_no_others() {
    let target = web().await;
    let port = target.port();
    let site = Site::plan()
        .allow(target)
        .rule(&format!("name = \"by-name\"\nhosts = [\"localhost\"]\nwithin = [\"127.0.0.0/8\"]\nports = [{port}]"))
        .start()
        .await;
    let socks = free_port();
    let mut ssh = site.background("ssh-D", site.ssh(&["-v", "-N", "-D", &format!("127.0.0.1:{socks}")]));
    ssh.says("Entering interactive session").await;
    let curl = async |url: String| {
        let proxy = format!("127.0.0.1:{socks}");
        run(Command::new("curl").args(["-sS", "--noproxy", "", "--socks5-hostname", &proxy, &url])).await
    };
    for host in ["127.0.0.1", "localhost"] {
        assert_eq!(curl(format!("http://{host}:{port}/")).await.done(), "hello through the tunnel");
    }
    let by_name = site.record(Side::Agent, json!({"event": "forward.ended", "rule": "by-name"})).await;
    assert_eq!(by_name["target"], format!("localhost:{port}"));
    assert_eq!(by_name["dialled"], target.to_string());
    for (host, reason) in [("127.0.0.2", "no_rule"), ("other.internal", "no_rule")] {
        assert_ne!(curl(format!("http://{host}:{port}/")).await.code(), 0);
        let denied = site.record(Side::Agent, json!({"event": "forward.denied", "target": format!("{host}:{port}")}));
        assert_eq!(denied.await["reason"], reason);
    }
    drop(ssh);
    site.stop().await;
}

#[tokio::test]
async fn a_control_master_carries_twenty_channels_at_once() {
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    let control = site.path().join("control").display().to_string();
    let mut master = site.background("ssh-M", site.ssh(&["-v", "-M", "-N", "-S", &control]));
    master.says("Entering interactive session").await;
    let mut sessions = Vec::new();
    for number in 0..20 {
        let mut ssh = site.ssh(&["-S", &control, "-W", &target.to_string()]);
        let mut ssh = ssh.kill_on_drop(true).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("ssh runs");
        let stream = tokio::io::join(ssh.stdout.take().expect("stdout"), ssh.stdin.take().expect("stdin"));
        sessions.push((ssh, stream, format!("this is channel {number}")));
    }
    for (_, stream, words) in &mut sessions {
        echoes(stream, words.as_bytes()).await;
    }
    // All are open now.
    assert_eq!(site.records(Side::Agent, &json!({"event": "forward.open"})).len(), 20);
    assert_eq!(site.records(Side::Agent, &json!({"event": "forward.ended"})).len(), 0);
    for (mut ssh, stream, _) in sessions {
        let (stdout, stdin) = stream.into_inner();
        drop(stdin);
        assert_eq!(read_to_end(stdout).await, b"");
        within("the end of ssh", ssh.wait()).await.expect("its status");
    }
    for side in [Side::Gateway, Side::Agent] {
        eventually("twenty endings", async || {
            (site.records(side, &json!({"event": "forward.ended", "reason": "eof"})).len() == 20).then_some(())
        })
        .await;
    }
    assert_eq!(site.records(Side::Gateway, &json!({"event": "auth.accepted"})).len(), 1, "one login served all");
    drop(master);
    site.stop().await;
}

#[tokio::test]
async fn an_ssh_agent_with_eight_wrong_keys_gets_to_the_right_one() {
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    let socket = site.path().join("agent.sock");
    let mut agent = Command::new("ssh-agent");
    agent.arg("-D").arg("-a").arg(&socket);
    let agent = site.background("ssh-agent", agent);
    eventually("the ssh-agent", async || socket.exists().then_some(())).await;
    for key in (0..8).map(|number| format!("wrong-{number}")).chain(["provisioner".to_owned()]) {
        run(Command::new("ssh-add").arg(site.key(&key)).env("SSH_AUTH_SOCK", &socket)).await.done();
    }
    let mut ssh = Command::new("ssh");
    ssh.env("SSH_AUTH_SOCK", &socket).env("HOME", site.path()).args(["-v", "-W", &target.to_string()]);
    ssh.args(site.ssh_options()).args(["-l", AGENT, "127.0.0.1"]);
    let said = run(&mut ssh).await;
    assert_eq!(said.code(), 0, "{said:?}");
    assert_eq!(said.stderr.matches("Offering public key").count(), 9, "{}", said.stderr);
    site.record(Side::Gateway, json!({"event": "auth.accepted", "principal": "provisioner"})).await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "auth.refused"})).len(), 0, "a search is no refusal");
    drop(agent);
    site.stop().await;
}

#[tokio::test]
async fn rsa_ecdsa_and_ed25519_user_keys_log_in() {
    let target = echo().await;
    let plan = Site::plan().allow(target);
    let kinds = [
        ("rsa-512", vec!["-t", "rsa", "-b", "3072"], "rsa-sha2-512"),
        ("rsa-256", vec!["-t", "rsa", "-b", "3072"], "rsa-sha2-256"),
        ("ecdsa-256", vec!["-t", "ecdsa", "-b", "256"], "ecdsa-sha2-nistp256"),
        ("ecdsa-384", vec!["-t", "ecdsa", "-b", "384"], "ecdsa-sha2-nistp384"),
        ("ecdsa-521", vec!["-t", "ecdsa", "-b", "521"], "ecdsa-sha2-nistp521"),
        ("ed25519", vec!["-t", "ed25519"], "ssh-ed25519"),
    ];
    for (name, arguments, _) in &kinds {
        let file = plan.path().join(name);
        run(Command::new("ssh-keygen").args(arguments).args(["-q", "-N", "", "-f"]).arg(&file)).await.done();
        plan.registry().key("acme/principals/provisioner", name, &plan.public(name));
    }
    let site = plan.start().await;
    for (name, _, algorithm) in kinds {
        let accepted = format!("PubkeyAcceptedAlgorithms={algorithm}");
        let said = run(&mut site.ssh_as(name, AGENT, &["-o", &accepted, "-W", &target.to_string()])).await;
        assert_eq!(said.code(), 0, "{name}: {said:?}");
        let fingerprint = run(Command::new("ssh-keygen").arg("-lf").arg(site.path().join(name))).await.done();
        let fingerprint = fingerprint.split(' ').nth(1).expect("a fingerprint");
        site.record(Side::Gateway, json!({"event": "forward.ended", "key": fingerprint})).await;
    }
    site.stop().await;
}

#[tokio::test]
async fn a_signature_with_sha1_is_refused() {
    let target = echo().await;
    let plan = Site::plan().allow(target);
    let file = plan.path().join("rsa");
    run(Command::new("ssh-keygen").args(["-t", "rsa", "-b", "3072", "-q", "-N", "", "-f"]).arg(&file)).await.done();
    plan.registry().key("acme/principals/provisioner", "rsa", &plan.public("rsa"));
    let site = plan.start().await;
    let ssh = async |algorithms: &str| {
        let accepted = format!("PubkeyAcceptedAlgorithms={algorithms}");
        run(&mut site.ssh_as("rsa", AGENT, &["-v", "-o", &accepted, "-W", &target.to_string()])).await
    };
    let said = ssh("ssh-rsa").await;
    assert_eq!(said.code(), 255, "{said:?}");
    assert!(said.stderr.contains("Permission denied (publickey)"), "{}", said.stderr);
    // The same key, with a signature that is not broken.
    assert_eq!(ssh("rsa-sha2-256").await.code(), 0);
    site.record(Side::Gateway, json!({"event": "auth.refused", "door": "ssh"})).await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "auth.accepted"})).len(), 1);
    site.stop().await;
}

#[tokio::test]
async fn ssh_keyscan_shows_the_host_key() {
    let site = Site::plan().start_gateway().await;
    let port = site.address.port().to_string();
    let shown = run(Command::new("ssh-keyscan").args(["-p", &port, "-t", "ed25519", "127.0.0.1"])).await;
    let known = shown.stdout.lines().find(|line| !line.starts_with('#')).expect("a key");
    assert_eq!(known, format!("[127.0.0.1]:{port} {}", site.public("gateway").trim()), "{shown:?}");
    site.stop().await;
}

#[tokio::test]
async fn a_session_is_refused_without_a_hang() {
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    for arguments in [&["-T"][..], &["-tt"], &["-T", "-A"], &["-s"], &["-N", "-R", "0:127.0.0.1:1"]] {
        let mut ssh = site.ssh(arguments);
        if arguments == ["-s"] {
            ssh.arg("sftp");
        }
        let said = run(&mut ssh).await;
        assert_eq!(said.code(), 255, "{arguments:?}: {said:?}");
        assert_eq!(said.stdout, "", "{arguments:?}");
    }
    let said = run(site.ssh(&["-T"]).arg("id")).await;
    assert_eq!((said.code(), said.stdout.as_str()), (255, ""), "{said:?}");
    // Neither opens anything at the agent.
    assert_eq!(site.records(Side::Agent, &json!({"event": "forward.open"})).len(), 0);
    site.stop().await;
}

#[tokio::test]
async fn logins_are_refused_alike_and_recorded_with_the_true_reason() {
    let target = echo().await;
    let plan = Site::plan().allow(target);
    let registry = plan.registry();
    for name in ["stranger", "visitor", "limited", "expired", "late", "revoked", "spare"] {
        plan.key(name);
    }
    registry.key("acme/agents/spare", "one", &plan.public("spare"));
    registry.key("globex/principals/visitor", "one", &plan.public("visitor"));
    registry.about("globex/principals/visitor", "agents = [\"*\"]");
    registry.key("acme/principals/limited", "one", &plan.public("limited"));
    registry.about("acme/principals/limited", "agents = [\"spare\"]");
    registry.key("acme/principals/provisioner", "expired", &plan.public("expired"));
    registry.about_key("acme/principals/provisioner", "expired", "expires = 2020-01-01T00:00:00Z");
    registry.key("acme/principals/provisioner", "revoked", &plan.public("revoked"));
    registry.about_key("acme/principals/provisioner", "revoked", "revoked = true");
    registry.key("acme/principals/late", "one", &plan.public("late"));
    registry.about("acme/principals/late", "agents = [\"*\"]\nexpires = 2020-01-01T00:00:00Z");
    let site = plan.start().await;

    let cases = [
        ("stranger", AGENT, "unknown_key"),
        ("visitor", AGENT, "other_organisation"),
        ("visitor", "globex/prod-eu", "unknown_agent"),
        ("provisioner", "acme/nowhere", "unknown_agent"),
        ("provisioner", "nobody/prod-eu", "unknown_organisation"),
        ("provisioner", "acme/spare", "not_granted"),
        ("limited", AGENT, "not_granted"),
        ("expired", AGENT, "expired"),
        ("late", AGENT, "expired"),
        ("revoked", AGENT, "revoked"),
        ("provisioner", "root", "malformed_user"),
        ("provisioner", "acme/prod-eu/one", "malformed_user"),
    ];
    let mut texts = Vec::new();
    for (number, (key, agent, reason)) in cases.iter().enumerate() {
        let said = run(&mut site.ssh_as(key, agent, &["-W", &target.to_string()])).await;
        assert_eq!((said.code(), said.stdout.as_str()), (255, ""), "{key} for {agent}: {said:?}");
        texts.push(said.stderr.replace(agent, "USER"));
        let refused = eventually("the record of the refusal", async || {
            site.records(Side::Gateway, &json!({"event": "auth.refused"})).into_iter().nth(number)
        })
        .await;
        assert_eq!(refused["reason"], *reason, "{key} for {agent}: {refused}");
        let shown = run(Command::new("ssh-keygen").arg("-lf").arg(site.path().join(key))).await.done();
        assert_eq!(refused["key"].as_str(), shown.split(' ').nth(1), "{refused}");
    }
    for (text, (key, agent, _)) in texts.iter().zip(cases) {
        assert_eq!(text, "USER@127.0.0.1: Permission denied (publickey).\r\n", "{key} for {agent}");
    }
    // And whoever may is let in.
    assert_eq!(run(&mut site.ssh(&["-W", &target.to_string()])).await.code(), 0);
    assert_eq!(site.records(Side::Gateway, &json!({"event": "auth.refused"})).len(), cases.len());
    assert_eq!(site.records(Side::Gateway, &json!({"event": "auth.accepted"})).len(), 1);
    site.stop().await;
}

#[tokio::test]
async fn forwards_are_refused_alike_and_recorded_with_the_true_reason() {
    let (target, other) = (echo().await, echo().await);
    let (port, closed) = (target.port(), free_port());
    let plan = Site::plan()
        .allow(target)
        .allow(SocketAddr::from(([127, 0, 0, 1], closed)))
        .rule(&format!(
            "name = \"for-others\"\naddresses = [\"127.0.0.9/32\"]\nports = [{port}]\nprincipals = [\"other\"]"
        ))
        .rule("name = \"elsewhere\"\nhosts = [\"localhost\"]\nwithin = [\"10.0.0.0/8\"]\nports = [1]")
        .rule("name = \"anywhere\"\naddresses = [\"0.0.0.0/0\"]\nports = [80]");
    plan.key("narrow");
    plan.registry().key("acme/principals/narrow", "one", &plan.public("narrow"));
    plan.registry().about("acme/principals/narrow", &format!("agents = [\"prod-eu\"]\ntargets = [\"{target}\"]"));
    plan.key("waiting");
    plan.registry().key("acme/agents/prod-waiting", "one", &plan.public("waiting"));
    let site = plan.start().await;
    let gateway = site.address.port();

    // By the gateway's grant, by the agent's rules, and what no rule can allow.
    let denied = [
        ("narrow", other.to_string(), None),
        ("narrow", format!("127.0.0.1:{gateway}"), None),
        ("provisioner", other.to_string(), Some("port")),
        ("provisioner", "[2001:db8::1]:80".to_owned(), Some("no_rule")),
        ("provisioner", format!("127.0.0.9:{port}"), Some("principal")),
        ("provisioner", "10.1.2.3:81".to_owned(), Some("port")),
        ("provisioner", format!("localhost:{port}"), Some("port")),
        ("provisioner", "localhost:1".to_owned(), Some("outside_within")),
        ("provisioner", "unheard-of.internal:80".to_owned(), Some("no_rule")),
        ("provisioner", "169.254.169.254:80".to_owned(), Some("reserved_address")),
        ("provisioner", format!("127.0.0.1:{gateway}"), Some("own_gateway")),
    ];
    let ask = async |key: &str, agent: &str, target: &str| run(&mut site.ssh_as(key, agent, &["-W", target])).await;
    let said_no = "channel 0: open failed: administratively prohibited: not allowed\nstdio forwarding failed\n";
    for (key, target, reason) in &denied {
        let said = ask(key, AGENT, target).await;
        assert_eq!((said.code(), said.stdout.as_str()), (255, ""), "{said:?}");
        assert_eq!(plain(&said), said_no, "{target}");
        let record =
            site.record(Side::Gateway, json!({"event": "forward.denied", "principal": key, "target": target})).await;
        match reason {
            None => assert_eq!(record["reason"], "target_not_granted", "{record}"),
            Some(reason) => {
                let of_agent = site.record(Side::Agent, json!({"event": "forward.denied", "target": target})).await;
                assert_eq!(of_agent["peer_forward"], record["forward"]);
                assert_eq!(of_agent["reason"], *reason, "{of_agent}");
                assert!(
                    record["detail"]
                        .as_str()
                        .expect("a detail")
                        .contains(of_agent["reason"].as_str().expect("a reason")),
                    "{record}"
                );
            }
        }
    }
    let asked = site.records(Side::Agent, &json!({"event": "forward.denied"})).len();
    assert_eq!(
        asked,
        denied.iter().filter(|(_, _, reason)| reason.is_some()).count(),
        "the gateway's denials stay there"
    );

    // What is allowed and does not work looks alike, too.
    let said_unavailable = "channel 0: open failed: connect failed: not available\nstdio forwarding failed\n";
    for (agent, target, reason) in
        [(AGENT, format!("127.0.0.1:{closed}"), "connect_failed"), ("acme/prod-waiting", target.to_string(), "no_link")]
    {
        let said = ask("provisioner", agent, &target).await;
        assert_eq!(plain(&said), said_unavailable, "{target}");
        site.record(Side::Gateway, json!({"event": "forward.failed", "target": target, "reason": reason})).await;
    }
    site.stop().await;
}

/// Standard error without the carriage returns that ssh adds.
fn plain(said: &Said) -> String {
    said.stderr.replace('\r', "")
}

//! Where connections may come from: source networks of listeners, organisations, agents and principals.
//!
//! All of 127.0.0.0/8 is this host, so that a client can come from several addresses at once.

use std::cell::Cell;
use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use caponier::identity::{Algorithm, PrivateKey};
use caponier::limits;
use caponier::task::{self, Tasks};
use caponier::tunnel::ssh::{self, ClientOptions, Flow};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::Command;

use crate::harness::{
    AGENT, Program, Side, Site, caponier, connect, echo, echoes, eventually, free_port, listen, read_to_end, run,
    within,
};

/// Where the site's agent and, unless it says otherwise, everybody else comes from.
const HERE: &str = "127.0.0.1";

/// Another address of this host.
const ELSEWHERE: &str = "127.0.0.2";

/// Connects to `address` from an address of this host.
async fn connect_from(from: &str, address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::new(from.parse().expect("an address"), 0)).expect("bound");
    within("a connection", socket.connect(address)).await.expect("connected")
}

/// Stock ssh as the provisioner from an address of this host, with a listener for a forward to `target`.
fn forward_from(site: &Site, from: &str, target: SocketAddr) -> (Command, SocketAddr) {
    let port = free_port();
    let ssh = site.ssh(&["-N", "-v", "-b", from, "-L", &format!("127.0.0.1:{port}:{target}")]);
    (ssh, SocketAddr::from(([127, 0, 0, 1], port)))
}

/// The same, once it has logged in.
async fn forwarding(site: &Site, name: &str, from: &str, target: SocketAddr) -> (Program, SocketAddr) {
    let (ssh, listens) = forward_from(site, from, target);
    let mut ssh = site.background(name, ssh);
    ssh.says("Entering interactive session").await;
    (ssh, listens)
}

/// A login from there is refused, and the trail says why.
async fn is_refused(site: &Site, from: &str, target: SocketAddr, reason: &str) {
    let before = refusals(site, reason).len();
    let (ssh, _) = forward_from(site, from, target);
    let mut ssh = site.background(&format!("refused-{before}-{reason}"), ssh);
    assert!(!ssh.ended().await.success(), "{}", ssh.log());
    assert!(!ssh.log().contains("Server accepts key"), "{}", ssh.log());
    eventually("a record of the refusal", async || (refusals(site, reason).len() > before).then_some(())).await;
}

fn refusals(site: &Site, reason: &str) -> Vec<Value> {
    site.records(Side::Gateway, &json!({"event": "auth.refused", "reason": reason}))
}

#[tokio::test]
async fn a_principal_is_accepted_from_its_networks_and_cut_when_they_change() {
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    let registry = site.registry();
    let (_kept, here) = forwarding(&site, "here", HERE, target).await;
    let (mut cut, elsewhere) = forwarding(&site, "elsewhere", ELSEWHERE, target).await;
    let mut streams = [connect(here).await, connect(elsewhere).await];
    for stream in &mut streams {
        echoes(stream, b"before").await;
    }
    let [mut stays, goes] = streams;
    registry.about("acme/principals/provisioner", "agents = [\"prod-*\"]\naccept_from = [\"127.0.0.1/32\"]");
    assert_eq!(read_to_end(goes).await, b"");
    assert!(!cut.ended().await.success());
    let ended = site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "revoked"})).await;
    assert!(ended["client"].as_str().is_some_and(|client| client.starts_with(ELSEWHERE)), "{ended}");
    is_refused(&site, ELSEWHERE, target, "source_network").await;
    echoes(&mut stays, b"after").await;
    drop(stays);
    site.stop().await;
}

#[tokio::test]
async fn an_organisations_networks_hold_for_its_links_principals_and_loopback_doors() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let (_ssh, forward) = forwarding(&site, "forward", HERE, target).await;
    for address in [site.doors[0], forward] {
        echoes(connect(address).await, b"before").await;
    }
    let mut open = connect(site.doors[0]).await;
    echoes(&mut open, b"open").await;
    let registry = site.registry();
    registry.about("acme", "accept_from = [\"127.0.0.2/32\"]");
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "revoked"})).await;
    assert_eq!(read_to_end(&mut open).await, b"");
    assert_eq!(read_to_end(connect(site.doors[0]).await).await, b"");
    let like = json!({"event": "forward.denied", "door": "local", "reason": "source_network"});
    site.record(Side::Gateway, like).await;
    is_refused(&site, HERE, target, "source_network").await;
    // The agent itself is told no more than that its key is not accepted.
    let like = json!({"event": "auth.refused", "reason": "source_network", "agent": "prod-eu", "principal": null});
    site.record(Side::Gateway, like).await;
    fs::remove_file(registry.folder("acme.toml")).expect("removed");
    let before = site.records(Side::Gateway, &json!({"event": "link.up"})).len();
    eventually("another link", async || {
        (site.records(Side::Gateway, &json!({"event": "link.up"})).len() > before.min(1)).then_some(())
    })
    .await;
    eventually("the door serves again", async || {
        let mut stream = TcpStream::connect(site.doors[0]).await.ok()?;
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"x").await.ok()?;
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut [0]).await.ok()
    })
    .await;
    assert!(!site.program(Side::Gateway).has_ended());
    site.stop().await;
}

#[tokio::test]
async fn an_agent_is_accepted_from_its_networks_alone() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let registry = site.registry();
    registry.about("acme/agents/prod-eu", "accept_from = [\"127.0.0.2/32\"]");
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "revoked"})).await;
    site.record(Side::Gateway, json!({"event": "auth.refused", "agent": "prod-eu", "reason": "source_network"})).await;
    site.program(Side::Agent).says("closed").await;
    registry.about("acme/agents/prod-eu", "accept_from = [\"127.0.0.0/8\"]");
    eventually("another link", async || {
        (site.records(Side::Gateway, &json!({"event": "link.up"})).len() > 1).then_some(())
    })
    .await;
    site.stop().await;
}

#[tokio::test]
async fn a_listener_refuses_before_a_byte_and_its_networks_follow_the_configuration() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).start().await;
    let listener = |networks: &str| format!("[[listener]]\naddress = \"ADDRESS\"\naccept_from = [{networks}]\n");
    // The same address, of which more is said from now on.
    let plain = fs::read_to_string(site.config(Side::Gateway)).expect("a configuration");
    let address = site.address;
    let with = |networks: &str| {
        let listening = format!("listen = [\"{address}\"]\n");
        let text = plain.replace("listen = [\"127.0.0.1:0\"]\n", &listening).replace(&listening, "");
        format!("{text}\n{}", listener(networks).replace("ADDRESS", &address.to_string()))
    };
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    fs::write(site.config(Side::Gateway), with("\"127.0.0.0/8\"")).expect("written");
    site.start_gateway_as_written().await;
    site.program(Side::Gateway).says(" linked ").await;
    let (mut cut, elsewhere) = forwarding(&site, "elsewhere", ELSEWHERE, target).await;
    let (_kept, here) = forwarding(&site, "here", HERE, target).await;
    let mut goes = connect(elsewhere).await;
    echoes(&mut goes, b"before").await;
    let mut stays = connect(here).await;
    echoes(&mut stays, b"before").await;
    fs::write(site.config(Side::Gateway), with("\"127.0.0.1/32\"")).expect("written");
    site.program(Side::Gateway).signal("HUP");
    let detail = format!("changed: listener {address}");
    site.record(Side::Gateway, json!({"event": "config.reloaded", "detail": detail})).await;
    assert_eq!(read_to_end(goes).await, b"");
    assert!(!cut.ended().await.success());
    site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "revoked"})).await;
    assert_eq!(read_to_end(connect_from(ELSEWHERE, address).await).await, b"", "not a byte");
    let refused = site.record(Side::Gateway, json!({"event": "auth.refused", "reason": "source_network"})).await;
    assert!(refused["client"].as_str().is_some_and(|client| client.starts_with(ELSEWHERE)), "{refused}");
    echoes(&mut stays, b"after").await;
    drop(stays);
    // And the link, too.
    fs::write(site.config(Side::Gateway), with("\"127.0.0.2/32\"")).expect("written");
    site.program(Side::Gateway).signal("HUP");
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "revoked"})).await;
    site.stop().await;
}

/// A balancer's address.
const BALANCER: &str = "127.0.0.9";

/// A header of version 2 for a client's IPv4 address and port.
fn v2(client: [u8; 4], port: u16) -> Vec<u8> {
    let body = [&client[..], &[127, 0, 0, 3], &port.to_be_bytes(), &443_u16.to_be_bytes()].concat();
    [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..], &body].concat()
}

/// A site with a listener behind a balancer, and where that listens.
async fn balanced(setting: &str) -> (Site, SocketAddr, SocketAddr) {
    let target = echo().await;
    let table = format!(
        "[[listener]]\naddress = \"127.0.0.3:0\"\nproxy_protocol_from = [\"{BALANCER}/32\"]\n\
         accept_from = [\"192.0.2.0/24\", \"{ELSEWHERE}/32\"]"
    );
    let site = Site::plan().allow(target).gateway_setting(setting).gateway_table(&table);
    let mut site = site.gateway_variable("CAPONIER_GATEWAY__PENALTIES__EXEMPT__0", "127.0.0.1/32").start().await;
    let line = site.program(Side::Gateway).says(" listening on 127.0.0.3:").await;
    let (_, address) = line.rsplit_once(' ').expect("an address");
    let address = address.parse().expect("an address");
    (site, address, target)
}

/// A balancer before `to`, which begins every connection with `header`.
async fn balancer(to: SocketAddr, header: Vec<u8>) -> SocketAddr {
    listen(move |mut near| {
        let header = header.clone();
        async move {
            let mut far = connect_from(BALANCER, to).await;
            if far.write_all(&header).await.is_ok() {
                drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
            }
        }
    })
    .await
}

/// Stock ssh as the provisioner through something that listens at `through`.
fn ssh_through(site: &Site, through: SocketAddr, arguments: &[&str]) -> Command {
    let port = format!("Port={}", through.port());
    let alias = format!("HostKeyAlias=[{}]:{}", site.address.ip(), site.address.port());
    site.ssh(&[&["-o", &port, "-o", &alias], arguments].concat())
}

#[tokio::test]
async fn behind_a_balancer_a_client_is_whom_the_balancer_names() {
    let (site, address, target) = balanced("").await;
    let mut streams = Vec::new();
    let mut programs = Vec::new();
    for (header, client) in [
        (b"PROXY TCP4 192.0.2.7 127.0.0.3 1111 443\r\n".to_vec(), "192.0.2.7:1111"),
        (v2([192, 0, 2, 8], 2222), "192.0.2.8:2222"),
    ] {
        let through = balancer(address, header).await;
        let port = free_port();
        let ssh = ssh_through(&site, through, &["-N", "-v", "-L", &format!("127.0.0.1:{port}:{target}")]);
        let mut ssh = site.background(&format!("for-{client}"), ssh);
        ssh.says("Entering interactive session").await;
        let mut stream = connect(SocketAddr::from(([127, 0, 0, 1], port))).await;
        echoes(&mut stream, b"through a balancer").await;
        for event in ["auth.accepted", "forward.open"] {
            site.record(Side::Gateway, json!({"event": event, "client": client})).await;
        }
        site.record(Side::Agent, json!({"event": "forward.open", "client": client})).await;
        streams.push(stream);
        programs.push(ssh);
    }
    // It is that address which the principal's networks are about.
    let about = "agents = [\"prod-*\"]\naccept_from = [\"192.0.2.7/32\"]";
    site.registry().about("acme/principals/provisioner", about);
    assert_eq!(read_to_end(&mut streams[1]).await, b"");
    assert!(!programs[1].ended().await.success());
    let like = json!({"event": "forward.ended", "reason": "revoked", "client": "192.0.2.8:2222"});
    site.record(Side::Gateway, like).await;
    echoes(&mut streams[0], b"still").await;
    drop(streams);
    site.stop().await;
}

#[tokio::test]
async fn a_balancers_header_is_believed_from_balancers_alone_and_missed_from_none() {
    let (site, address, target) = balanced("").await;
    // Who comes past the balancer is who it is, and may not say otherwise.
    let through = listen(move |mut near| async move {
        let mut far = connect_from(ELSEWHERE, address).await;
        drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
    })
    .await;
    let port = free_port();
    let ssh = ssh_through(&site, through, &["-N", "-v", "-L", &format!("127.0.0.1:{port}:{target}")]);
    let mut ssh = site.background("past", ssh);
    ssh.says("Entering interactive session").await;
    echoes(connect(SocketAddr::from(([127, 0, 0, 1], port))).await, b"past the balancer").await;
    let count = |reason: &str| refusals(&site, reason).len();
    for (what, from, bytes, reason) in [
        ("a lie", ELSEWHERE, &b"PROXY TCP4 192.0.2.7 127.0.0.3 1 443\r\nSSH-2.0-x\r\n"[..], "identification"),
        ("a lie in version 2", ELSEWHERE, &v2([192, 0, 2, 7], 1), "identification"),
        ("no header", BALANCER, b"SSH-2.0-x\r\n", "proxy_protocol"),
        ("a malformed one", BALANCER, b"PROXY TCP4 192.0.2.07 127.0.0.3 1 443\r\nSSH-2.0-x\r\n", "proxy_protocol"),
        ("a path", BALANCER, b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\0", "proxy_protocol"),
        ("two headers", BALANCER, &[v2([192, 0, 2, 7], 1), v2([192, 0, 2, 8], 1)].concat(), "identification"),
        ("a client from elsewhere", BALANCER, &v2([198, 51, 100, 1], 1), "source_network"),
        ("nothing but the balancer's word", HERE, b"", "source_network"),
    ] {
        let before = count(reason);
        let mut stream = connect_from(from, address).await;
        // It may be hung up on first.
        drop(stream.write_all(bytes).await);
        assert_eq!(read_to_end(stream).await, b"", "{what}");
        eventually(what, async || (count(reason) > before).then_some(())).await;
    }
    let like = json!({"event": "auth.refused", "reason": "source_network", "client": "198.51.100.1:1"});
    site.record(Side::Gateway, like).await;
    // A header that does not come is not waited for as long as a login.
    let before = count("proxy_protocol");
    let mut stream = connect_from(BALANCER, address).await;
    stream.write_all(b"PROXY TCP4 192.0.2.7").await.expect("written");
    let began = Instant::now();
    assert_eq!(read_to_end(stream).await, b"");
    assert!(began.elapsed() < limits::LOGIN_GRACE, "{:?}", began.elapsed());
    eventually("a record", async || (count("proxy_protocol") > before).then_some(())).await;
    // Health checks are nobody.
    let all = || site.records(Side::Gateway, &json!({"event": "auth.refused"})).len();
    let before = all();
    for bytes in [&b""[..], b"PROXY UNKNOWN\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\0"]
    {
        let mut stream = connect_from(BALANCER, address).await;
        stream.write_all(bytes).await.expect("written");
        stream.shutdown().await.expect("shut");
        assert_eq!(read_to_end(stream).await, b"");
    }
    assert_eq!(all(), before);
    // Nothing of all this is held against the balancer.
    for _ in 0..20 {
        let mut stream = connect_from(BALANCER, address).await;
        drop(stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await);
        assert_eq!(read_to_end(stream).await, b"");
    }
    let through = balancer(address, v2([192, 0, 2, 8], 2222)).await;
    let ssh = ssh_through(&site, through, &["-N", "-v"]);
    site.background("after", ssh).says("Entering interactive session").await;
    site.stop().await;
}

/// Says something that is no SSH from an address, and is hung up on; `header` comes first.
async fn garbage(from: &str, to: SocketAddr, header: &[u8]) {
    let mut stream = connect_from(from, to).await;
    drop(stream.write_all(&[header, b"garbage\r\n\r\n"].concat()).await);
    assert_eq!(read_to_end(stream).await, b"");
}

/// How many faults of this kind an address may have at once.
const TOLERATED: usize = limits::PENALTY_TOLERANCE.as_secs() as usize / 5;

/// Commits faults until the gateway turns `who` away. On a busy machine time forgives some of them meanwhile.
async fn is_barred(site: &Site, who: &str, from: &str, to: SocketAddr, header: &[u8]) {
    eventually(&format!("{who} is barred"), async || {
        for _ in 0..=TOLERATED {
            garbage(from, to, header).await;
        }
        barred(site).await.contains(&who.to_owned()).then_some(())
    })
    .await;
}

/// The addresses that the gateway turns away.
async fn barred(site: &Site) -> Vec<String> {
    let mut command = caponier();
    command.args(["agents", "--handshakes", "--socket"]).arg(site.admin_socket());
    let told: Value = serde_json::from_str(&run(&mut command).await.done()).expect("JSON");
    let rows = told["barred"].as_array().expect("a list").iter();
    rows.map(|row| row["address"].as_str().expect("an address").to_owned()).collect()
}

#[tokio::test]
async fn an_address_that_fails_too_often_is_turned_away_for_a_while_and_nobody_else() {
    let (site, proxied, target) = balanced("").await;
    let attacker = "127.0.0.66";
    let began = Instant::now();
    is_barred(&site, attacker, attacker, site.address, b"").await;
    // Not even the line that a silent client gets.
    let early = Instant::now();
    assert_eq!(read_to_end(connect_from(attacker, site.address).await).await, b"");
    assert!(early.elapsed() < limits::LOGIN_GRACE, "it was kept");
    let refused = site.record(Side::Gateway, json!({"event": "auth.refused", "reason": "too_many_failures"})).await;
    assert!(refused["client"].as_str().is_some_and(|client| client.starts_with(attacker)), "{refused}");
    let (_ssh, forward) = forwarding(&site, "neighbour", ELSEWHERE, target).await;
    echoes(connect(forward).await, b"served").await;
    // Behind a balancer it is the client that is turned away.
    is_barred(&site, "192.0.2.66", BALANCER, proxied, &v2([192, 0, 2, 66], 1)).await;
    let mut stream = connect_from(BALANCER, proxied).await;
    stream.write_all(&v2([192, 0, 2, 66], 1)).await.expect("written");
    assert_eq!(read_to_end(stream).await, b"");
    let through = balancer(proxied, v2([192, 0, 2, 7], 1)).await;
    let ssh = ssh_through(&site, through, &["-N", "-v"]);
    site.background("other", ssh).says("Entering interactive session").await;
    // And then it is over.
    let (ssh, _) = forward_from(&site, attacker, target);
    let mut ssh = site.background("too-early", ssh);
    assert!(!ssh.ended().await.success() || began.elapsed() > limits::PENALTY_FIRST);
    eventually("the address is served again", async || {
        (!barred(&site).await.contains(&attacker.to_owned())).then_some(())
    })
    .await;
    let (_ssh, forward) = forwarding(&site, "forgiven", attacker, target).await;
    echoes(connect(forward).await, b"served again").await;
    site.stop().await;
}

#[tokio::test]
async fn who_shares_an_address_with_somebody_who_is_logged_in_is_held_responsible_for_little() {
    let (site, _, target) = balanced("").await;
    let shared = "127.0.0.67";
    let (_ssh, forward) = forwarding(&site, "first", shared, target).await;
    for _ in 0..=TOLERATED * 4 {
        garbage(shared, site.address, b"").await;
    }
    assert_eq!(barred(&site).await, Vec::<String>::new());
    let (_second, other) = forwarding(&site, "second", shared, target).await;
    for listens in [forward, other] {
        echoes(connect(listens).await, b"served").await;
    }
    site.stop().await;
}

#[tokio::test]
async fn penalties_can_be_turned_off_while_the_gateway_runs() {
    let target = echo().await;
    let setting = "[gateway.penalties]\nenabled = true\nexempt = []";
    let mut site = Site::plan().allow(target).gateway_setting(setting).start().await;
    let attacker = "127.0.0.68";
    is_barred(&site, attacker, attacker, site.address, b"").await;
    let config = fs::read_to_string(site.config(Side::Gateway)).expect("a configuration");
    fs::write(site.config(Side::Gateway), config.replace("enabled = true", "enabled = false")).expect("written");
    site.program(Side::Gateway).signal("HUP");
    site.record(Side::Gateway, json!({"event": "config.reloaded", "detail": "changed: penalties"})).await;
    let (_ssh, forward) = forwarding(&site, "attacker", attacker, target).await;
    echoes(connect(forward).await, b"served").await;
    site.stop().await;
}

#[tokio::test]
async fn seats_that_a_few_addresses_have_taken_are_given_to_whoever_comes_from_elsewhere() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut idle = Vec::new();
    for attempt in 0.. {
        for host in 1..=4 {
            for _ in 0..limits::UNAUTHENTICATED_PER_ADDRESS {
                idle.push(connect_from(&format!("127.66.0.{host}"), site.address).await);
            }
        }
        let began = Instant::now();
        // A person, and an agent that comes back.
        let (_ssh, forward) = forwarding(&site, &format!("person-{attempt}"), HERE, target).await;
        echoes(connect(forward).await, b"a person").await;
        assert_eq!(site.program(Side::Agent).stop().await, Some(0));
        site.restart_agent().await;
        site.program(Side::Agent).says(" linked ").await;
        if began.elapsed() < limits::LOGIN_GRACE {
            break;
        }
        // On a machine that is too busy to show it, the others may have had to go by then.
        assert!(attempt < 5, "they got in because the others had to go");
    }
    echoes(connect(site.doors[0]).await, b"an agent").await;
    let like = json!({"event": "auth.refused", "reason": "too_many_connections"});
    let refused = site.record(Side::Gateway, like).await;
    assert!(refused["client"].as_str().is_some_and(|client| client.starts_with("127.66.0.")), "{refused}");
    drop(idle);
    site.stop().await;
}

#[tokio::test]
async fn a_thousand_logins_from_an_address_are_not_held_up_by_a_neighbour_who_fails_as_often() {
    const LOGINS: usize = 1_000;
    const AT_ONCE: usize = 8;
    let setting = "[gateway.penalties]\nexempt = []";
    let site = Site::plan().gateway_setting(setting).start().await;
    let shared = "127.0.0.69";
    let stranger = PrivateKey::generate(Algorithm::Ed25519);
    let honest = PrivateKey::read(&site.key("provisioner")).expect("a key");
    let tasks = Tasks::new();
    let log_in = async |key: &PrivateKey| {
        let options = ClientOptions {
            line: "SSH-2.0-stock",
            said: false,
            head: Bytes::new(),
            host_key: Box::new(|_| true),
            host_certificate: None,
            keepalive: limits::DOOR_KEEPALIVE,
            flow: Flow::Stock,
            report: Arc::new(|_| ()),
        };
        let stranger = ssh::connect(connect_from(shared, site.address).await, options).await.expect("it is taken up");
        stranger.login(AGENT, key, &tasks, 1).await
    };
    let done = Cell::new(0);
    let behind_the_address = async || {
        while done.get() < LOGINS {
            done.set(done.get() + 1);
            let number = done.get();
            // Nobody stays: none of them softens what the neighbour does.
            let session = within("a login", log_in(&honest)).await;
            assert!(session.is_ok(), "the {number}th login is refused");
            drop(session);
            match number % 4 {
                0 => assert!(within("a refusal", log_in(&stranger)).await.is_err()),
                _ => garbage(shared, site.address, b"").await,
            }
        }
    };
    task::all((0..AT_ONCE).map(|_| behind_the_address())).await;
    assert_eq!(barred(&site).await, Vec::<String>::new());
    assert_eq!(refusals(&site, "too_many_failures").len(), 0);
    assert!(site.records(Side::Gateway, &json!({"event": "auth.accepted"})).len() >= LOGINS);
    // The same neighbour alone is.
    for _ in 0..=TOLERATED {
        garbage(shared, site.address, b"").await;
    }
    eventually("the address is barred", async || barred(&site).await.contains(&shared.to_owned()).then_some(())).await;
    // And nobody but that address, whatever it does.
    let (_ssh, _) = forwarding(&site, "elsewhere", ELSEWHERE, SocketAddr::from(([127, 0, 0, 1], 9))).await;
    site.stop().await;
}

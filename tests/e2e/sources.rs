//! Where connections may come from: source networks of listeners, organisations, agents and principals.
//!
//! All of 127.0.0.0/8 is this host, so that a client can come from several addresses at once.

use std::fs;
use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::Command;

use crate::harness::{Program, Side, Site, connect, echo, echoes, eventually, free_port, read_to_end, within};

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

//! Limits that an operator has set: each is reached, named in the trails, and costs nobody else anything.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{interval, timeout};

use crate::harness::{AGENT, Plan, Program, Side, Site, connect, echo, echoes, eventually, listen, within};

/// The agent of the other organisation.
const GLOBEX: &str = "globex/prod-eu";

/// A site for two organisations and two principals of the first, with a loopback door for one of these, to a target that
/// echoes.
async fn site(gateway: &str, agent: &str) -> (Site, SocketAddr) {
    let target = echo().await;
    let site = start(plan(gateway, agent).allow(target).door(target)).await;
    (site, target)
}

fn plan(gateway: &str, agent: &str) -> Plan {
    let mut plan = Site::plan().serve_globex();
    for (table, lines) in [("gateway", gateway), ("agent", agent)] {
        let lines = format!("[{table}.limits]\n{lines}");
        plan = if table == "gateway" { plan.gateway_setting(&lines) } else { plan.agent_setting(&lines) };
    }
    plan.key("other");
    let registry = plan.registry();
    registry.key("acme/principals/other", "one", &plan.public("other"));
    registry.about("acme/principals/other", "agents = [\"prod-*\"]");
    plan
}

/// Starts it, and waits for the links of both organisations.
async fn start(plan: Plan) -> Site {
    let site = plan.start().await;
    for organisation in ["acme", "globex"] {
        site.record(Side::Gateway, json!({"event": "link.up", "organisation": organisation})).await;
    }
    site
}

/// A listener of stock ssh's that leads to `target`.
async fn forward(site: &Site, key: &str, agent: &str, target: SocketAddr) -> (Program, SocketAddr) {
    let port = crate::harness::free_port();
    let ssh = site.ssh_as(key, agent, &["-N", "-L", &format!("127.0.0.1:{port}:{target}"), "-v"]);
    let mut ssh = site.background(&format!("ssh-{key}-{port}"), ssh);
    ssh.says("Entering interactive session").await;
    (ssh, SocketAddr::from(([127, 0, 0, 1], port)))
}

async fn served(address: SocketAddr) -> TcpStream {
    let mut stream = connect(address).await;
    echoes(&mut stream, b"served").await;
    stream
}

/// Whether a connection is served, and not refused.
async fn is_served(address: SocketAddr) -> Option<TcpStream> {
    // Once and no more, so that every attempt is counted: a refusal can be as early as the connect.
    let mut stream = TcpStream::connect(address).await.ok()?;
    within("an answer or a refusal", async {
        stream.write_all(b"x").await.ok()?;
        stream.read_u8().await.ok().map(|_| stream)
    })
    .await
}

async fn refused(address: SocketAddr) {
    assert!(is_served(address).await.is_none(), "it was served");
}

/// Both trails name a limit of the agent's.
async fn named_by_both(site: &Site, limit: &str) {
    site.record(Side::Agent, json!({"event": "forward.denied", "reason": "limit", "detail": limit})).await;
    site.record(Side::Gateway, json!({"event": "forward.failed", "reason": "agent_limit", "detail": limit})).await;
}

fn denials(site: &Site, side: Side, limit: &str) -> usize {
    site.records(side, &json!({"event": "forward.denied", "reason": "limit", "detail": limit})).len()
}

/// How many opens the trail has as a sum.
fn unheard(site: &Site, side: Side) -> usize {
    let floods = site.records(side, &json!({"event": "peer.violation", "reason": "opens_flood"}));
    let count = |detail: &str| detail.split_once(' ').and_then(|(count, _)| count.parse::<usize>().ok());
    floods.iter().map(|flood| flood["detail"].as_str().and_then(count).expect("a count")).sum()
}

#[tokio::test]
async fn principals_and_organisations_have_so_many_forwards_at_the_gateway() {
    let (site, target) = site("forwards_per_principal = 2\nforwards_per_organisation = 3", "").await;
    let mut held = vec![served(site.doors[0]).await, served(site.doors[0]).await];
    refused(site.doors[0]).await;
    site.record(
        Side::Gateway,
        json!({"event": "forward.denied", "principal": "provisioner", "reason": "limit", "detail": "forwards_per_principal"}),
    )
    .await;

    let (_other, by_other) = forward(&site, "other", AGENT, target).await;
    held.push(served(by_other).await);
    refused(by_other).await;
    site.record(
        Side::Gateway,
        json!({"event": "forward.denied", "principal": "other", "reason": "limit", "detail": "forwards_per_organisation"}),
    )
    .await;

    let (_globex, by_globex) = forward(&site, "provisioner", GLOBEX, target).await;
    held.push(served(by_globex).await);
    for stream in &mut held {
        echoes(stream, b"still there").await;
    }
    assert_eq!(site.records(Side::Agent, &json!({"reason": "limit"})).len(), 0, "the agent was not even asked");
    drop(held);
    eventually("room again", async || is_served(site.doors[0]).await).await;
    site.stop().await;
}

#[tokio::test]
async fn organisations_have_so_many_forwards_at_the_agent() {
    let (site, target) = site("", "forwards_per_organisation = 2\nforwards = 3").await;
    let mut held = vec![served(site.doors[0]).await, served(site.doors[0]).await];
    refused(site.doors[0]).await;
    named_by_both(&site, "forwards_per_organisation").await;

    let (_globex, by_globex) = forward(&site, "provisioner", GLOBEX, target).await;
    held.push(served(by_globex).await);
    refused(by_globex).await;
    named_by_both(&site, "forwards").await;
    for stream in &mut held {
        echoes(stream, b"still there").await;
    }
    drop(held);
    eventually("room again", async || is_served(by_globex).await).await;
    site.stop().await;
}

#[tokio::test]
async fn a_link_has_so_many_forwards_by_either_sides_word() {
    for (gateway, agent) in [("forwards_per_link = 2", ""), ("", "forwards_per_link = 2")] {
        let (site, target) = site(gateway, agent).await;
        let mut held = vec![served(site.doors[0]).await, served(site.doors[0]).await];
        refused(site.doors[0]).await;
        match agent {
            "" => {
                let like = json!({"event": "forward.failed", "reason": "limit", "detail": "forwards_per_link"});
                site.record(Side::Gateway, like).await;
            }
            _ => named_by_both(&site, "forwards_per_link").await,
        }
        let (_globex, by_globex) = forward(&site, "provisioner", GLOBEX, target).await;
        held.push(served(by_globex).await);
        for stream in &mut held {
            echoes(stream, b"still there").await;
        }
        drop(held);
        site.stop().await;
    }
}

/// A target whose connections come to nothing: its queue is full, and nobody accepts. Holds what fills it.
async fn mute() -> (SocketAddr, (TcpListener, Vec<TcpStream>)) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("bound");
    let listener = socket.listen(1).expect("a listener");
    let address = listener.local_addr().expect("its address");
    let mut filling = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(300), TcpStream::connect(address)).await {
        filling.push(stream.expect("connected"));
        assert!(filling.len() < 64, "its queue has no end");
    }
    (address, (listener, filling))
}

#[tokio::test]
async fn so_many_opens_of_a_principal_are_under_way() {
    let (mute, _held) = mute().await;
    let target = echo().await;
    let plan = plan("pending_opens_per_principal = 2", "").allow(mute).allow(target).door(mute).door(target);
    let site = start(plan).await;
    let waiting = [connect(site.doors[0]).await, connect(site.doors[0]).await];
    eventually("two that wait", async || {
        (site.records(Side::Agent, &json!({"event": "forward.open"})).len() == 2).then_some(())
    })
    .await;
    for door in [site.doors[0], site.doors[1]] {
        refused(door).await;
    }
    site.record(
        Side::Gateway,
        json!({"event": "forward.denied", "reason": "limit", "detail": "pending_opens_per_principal"}),
    )
    .await;
    let (_other, by_other) = forward(&site, "other", AGENT, target).await;
    served(by_other).await;
    // The targets give up before we do; then there is room again.
    eventually("room again", async || is_served(site.doors[1]).await).await;
    drop(waiting);
    site.stop().await;
}

#[tokio::test]
async fn so_many_opens_on_a_link_are_under_way() {
    let (mute, _held) = mute().await;
    let target = echo().await;
    let plan = plan("", "pending_opens_per_link = 1").allow(mute).allow(target).door(mute).door(target);
    let site = start(plan).await;
    let waiting = connect(site.doors[0]).await;
    site.record(Side::Agent, json!({"event": "forward.open"})).await;
    refused(site.doors[1]).await;
    named_by_both(&site, "pending_opens_per_link").await;
    let (_globex, by_globex) = forward(&site, "provisioner", GLOBEX, target).await;
    served(by_globex).await;
    eventually("room again", async || is_served(site.doors[1]).await).await;
    drop(waiting);
    site.stop().await;
}

#[tokio::test]
async fn a_principal_has_so_many_sessions() {
    let (site, target) = site("sessions_per_principal = 1", "").await;
    let (first, by_first) = forward(&site, "provisioner", AGENT, target).await;
    served(by_first).await;
    let mut second = site.ssh(&["-N", "-v"]);
    let said = crate::harness::run(&mut second).await;
    assert_eq!(said.code(), 255, "{said:?}");
    site.record(
        Side::Gateway,
        json!({"event": "auth.refused", "principal": "provisioner", "reason": "limit", "detail": "sessions_per_principal"}),
    )
    .await;
    for (key, agent) in [("other", AGENT), ("provisioner", GLOBEX)] {
        let (_session, address) = forward(&site, key, agent, target).await;
        served(address).await;
    }
    served(by_first).await;
    drop(first);
    site.stop().await;
}

/// What comes far too fast.
const FLOOD: usize = 200;

async fn flood(address: SocketAddr) -> usize {
    let mut served = 0;
    for _ in 0..FLOOD {
        served += usize::from(is_served(address).await.is_some());
    }
    served
}

#[tokio::test]
async fn a_principal_opens_so_many_a_second_at_a_loopback_door() {
    let (site, target) = site("opens_per_second_per_principal = 1", "").await;
    let (_other, by_other) = forward(&site, "other", AGENT, target).await;
    let served_at_once = flood(site.doors[0]).await;
    assert!((5..FLOOD / 2).contains(&served_at_once), "{served_at_once}");
    served(by_other).await;
    // A few are recorded one by one, the others as a sum.
    let refusals = FLOOD - served_at_once;
    eventually("all refusals in the trail", async || {
        let alone = denials(&site, Side::Gateway, "opens_per_second_per_principal");
        (alone > 0 && alone + unheard(&site, Side::Gateway) == refusals).then_some(())
    })
    .await;
    assert!(unheard(&site, Side::Gateway) > 0, "every one of a flood has a record");
    eventually("its turn again", async || is_served(site.doors[0]).await).await;
    site.stop().await;
}

#[tokio::test]
async fn an_organisation_opens_so_many_a_second_at_the_ssh_door() {
    let (mut site, target) = site("opens_per_second_per_organisation = 1", "").await;
    let (mut other, by_other) = forward(&site, "other", AGENT, target).await;
    let (_globex, by_globex) = forward(&site, "provisioner", GLOBEX, target).await;
    let served_at_once = flood(by_other).await;
    assert!((5..FLOOD / 2).contains(&served_at_once), "{served_at_once}");
    assert!(!other.has_ended(), "its session goes on");
    served(by_globex).await;
    // The other principals of the organisation share what there is, and nothing is lost of the count.
    refused(site.doors[0]).await;
    other.kill().await;
    let refusals = FLOOD - served_at_once;
    eventually("all refusals in the trail", async || {
        let like = json!({"event": "forward.denied", "principal": "other", "reason": "limit",
            "detail": "opens_per_second_per_organisation"});
        let alone = site.records(Side::Gateway, &like).len();
        (alone > 0 && alone + unheard(&site, Side::Gateway) == refusals).then_some(())
    })
    .await;
    assert!(!site.program(Side::Gateway).has_ended());
    site.stop().await;
}

#[tokio::test]
async fn an_organisation_opens_so_many_a_second_at_the_agent() {
    let (mut site, target) = site("", "opens_per_second_per_organisation = 1").await;
    let (_globex, by_globex) = forward(&site, "provisioner", GLOBEX, target).await;
    let served_at_once = flood(site.doors[0]).await;
    assert!((5..FLOOD / 2).contains(&served_at_once), "{served_at_once}");
    served(by_globex).await;
    // At the gateway each is a forward of its own that has failed; at the agent they are a flood.
    let refusals = FLOOD - served_at_once;
    let like =
        json!({"event": "forward.failed", "reason": "agent_limit", "detail": "opens_per_second_per_organisation"});
    eventually("all refusals in the gateway's trail", async || {
        (site.records(Side::Gateway, &like).len() == refusals).then_some(())
    })
    .await;
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    eventually("all refusals in the agent's trail", async || {
        let alone = denials(&site, Side::Agent, "opens_per_second_per_organisation");
        (alone > 0 && alone + unheard(&site, Side::Agent) == refusals).then_some(())
    })
    .await;
    assert!(unheard(&site, Side::Agent) > 0, "every one of a flood has a record");
    assert_eq!(site.program(Side::Agent).stop().await, Some(0));
}

#[tokio::test]
async fn limits_change_with_the_configuration() {
    for (side, gateway, agent) in
        [(Side::Gateway, "forwards_per_principal = 1", ""), (Side::Agent, "", "forwards_per_organisation = 1")]
    {
        let (mut site, _) = site(gateway, agent).await;
        let mut first = served(site.doors[0]).await;
        refused(site.doors[0]).await;
        let text = std::fs::read_to_string(site.config(side)).expect("a configuration");
        std::fs::write(site.config(side), text.replace("= 1\n", "= 2\n")).expect("written");
        site.program(side).signal("HUP");
        site.record(side, json!({"event": "config.reloaded", "detail": "changed: limits"})).await;
        let second = served(site.doors[0]).await;
        refused(site.doors[0]).await;
        echoes(&mut first, b"still there").await;
        drop((first, second));
        site.stop().await;
    }
}

/// Reads until the end, which must not look like a clean one; what came.
async fn cut(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let error = within("the cut", stream.read_to_end(&mut all)).await.expect_err("a clean end");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    all
}

#[tokio::test]
async fn an_idle_forward_ends_and_a_busy_one_does_not() {
    for (side, gateway, agent, seen_by_other) in [
        (Side::Gateway, "idle_s = 4", "", (Side::Agent, "client_gone")),
        (Side::Agent, "", "idle_s = 4", (Side::Gateway, "target_broke")),
    ] {
        let (site, _) = site(gateway, agent).await;
        let mut idle = served(site.doors[0]).await;
        let mut busy = served(site.doors[0]).await;
        // To the end of an echo: what is left of one would come before the next.
        let over = std::cell::Cell::new(false);
        let tick = async {
            let mut tick = interval(Duration::from_millis(200));
            while !over.get() {
                tick.tick().await;
                echoes(&mut busy, b"tick").await;
            }
        };
        let ends = async {
            assert_eq!(cut(&mut idle).await, b"");
            site.record(side, json!({"event": "forward.ended", "reason": "idle", "to_target": 6, "from_target": 6}))
                .await;
            let (other, reason) = seen_by_other;
            site.record(other, json!({"event": "forward.ended", "reason": reason, "to_target": 6})).await;
            over.set(true);
        };
        tokio::join!(ends, tick);
        echoes(&mut busy, b"still there").await;
        drop(busy);
        site.stop().await;
    }
}

#[tokio::test]
async fn a_forward_lives_so_long_and_what_came_through_is_a_prefix() {
    for (side, gateway, agent) in [(Side::Gateway, "life_s = 1", ""), (Side::Agent, "", "life_s = 1")] {
        // A target that says bytes one after another, without an end.
        let source = listen(async |mut stream| {
            let pattern: Vec<u8> = (0..=250).collect();
            while stream.write_all(&pattern).await.is_ok() {}
        })
        .await;
        let site = start(plan(gateway, agent).allow(source).door(source)).await;
        let mut stream = connect(site.doors[0]).await;
        let came = cut(&mut stream).await;
        assert!(came.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at % 251), "not a prefix");
        let ended = site.record(side, json!({"event": "forward.ended", "reason": "expired"})).await;
        let (lived, moved) = (ended["duration_ms"].as_u64(), ended["from_target"].as_u64());
        assert!(lived.is_some_and(|ms| (1_000..30_000).contains(&ms)), "{ended}");
        assert!(moved.is_some_and(|moved| moved >= came.len() as u64 || side == Side::Agent), "{ended}");
        site.stop().await;
    }
}

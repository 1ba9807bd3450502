//! SIGHUP: what a new configuration takes away ends, what it does not touch goes on, and a faulty one changes nothing.

use std::fs;
use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use crate::harness::{SOON, Side, Site, caponier, connect, echo, echoes, eventually, free_port, read_to_end, run};

/// Changes a side's configuration, and nothing else.
fn edit(site: &Site, side: Side, change: impl FnOnce(String) -> String) {
    let path = site.config(side);
    let before = fs::read_to_string(&path).expect("a configuration");
    let after = change(before.clone());
    assert_ne!(before, after, "the configuration is as it was");
    fs::write(path, after).expect("written");
}

/// Puts `new` in the place of `old`, which is there.
fn replace(site: &Site, side: Side, old: &str, new: &str) {
    edit(site, side, |text| {
        assert!(text.contains(old), "{old:?} is not in {text}");
        text.replace(old, new)
    });
}

/// SIGHUP; the record of what came of it, which is of this kind.
async fn reload(site: &mut Site, side: Side, kind: &str) -> Value {
    let like = json!({"event": kind});
    let before = site.records(side, &like).len();
    site.program(side).signal("HUP");
    eventually(kind, async || site.records(side, &like).into_iter().nth(before)).await
}

fn detail(record: &Value) -> &str {
    record["detail"].as_str().expect("a detail")
}

/// The links that the gateway has.
async fn agents(site: &Site) -> Vec<Value> {
    let said = run(caponier().args(["agents", "--json", "--socket"]).arg(site.admin_socket())).await.done();
    let rows: Vec<Value> = serde_json::from_str(&said).expect("JSON");
    rows.into_iter().filter(|row| row["state"] != "absent" && row["state"] != "never linked").collect()
}

/// Waits until the gateway has links that fit.
async fn agents_are(site: &Site, what: &str, fit: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    eventually(what, async || {
        let agents = agents(site).await;
        fit(&agents).then_some(agents)
    })
    .await
}

/// A new connection to a loopback door is closed without a byte.
async fn refuses(door: SocketAddr) {
    assert_eq!(read_to_end(connect(door).await).await, b"", "the door is open");
}

/// The stream ends, soon after `since`.
async fn ends(stream: &mut TcpStream, since: Instant) {
    assert_eq!(read_to_end(stream).await, b"");
    assert!(since.elapsed() < SOON, "it took {:?}", since.elapsed());
}

fn fingerprint(public: &str) -> String {
    caponier::identity::PublicKey::parse(public).expect("a key").fingerprint().to_string()
}

#[tokio::test]
async fn a_removed_rule_ends_its_forwards_and_no_others() {
    let (gone, stays) = (echo().await, echo().await);
    let mut site = Site::plan().allow(gone).allow(stays).door(gone).door(stays).start().await;
    let mut ending = connect(site.doors[0]).await;
    let mut staying = connect(site.doors[1]).await;
    echoes(&mut ending, b"before").await;
    echoes(&mut staying, b"before").await;

    let rule = format!("to-{}", gone.port());
    let (address, port) = (gone.ip(), gone.port());
    let written =
        format!("[[organisation.allow]]\nname = \"{rule}\"\naddresses = [\"{address}/32\"]\nports = [{port}]\n");
    replace(&site, Side::Agent, &written, "");
    let since = Instant::now();
    let reloaded = reload(&mut site, Side::Agent, "config.reloaded").await;
    assert_eq!(detail(&reloaded), format!("gone: rule acme/{rule}"));
    ends(&mut ending, since).await;
    site.record(Side::Agent, json!({"event": "forward.ended", "reason": "revoked", "rule": rule})).await;
    echoes(&mut staying, b"and after").await;
    echoes(connect(site.doors[1]).await, b"anew").await;
    refuses(site.doors[0]).await;
    site.record(Side::Agent, json!({"event": "forward.denied", "reason": "port"})).await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 1, "the link is the same");

    // Given back, it serves again; with a rule of another name over the same address, what runs goes on.
    edit(&site, Side::Agent, |text| text + &written);
    assert_eq!(detail(&reload(&mut site, Side::Agent, "config.reloaded").await), format!("new: rule acme/{rule}"));
    let mut again = connect(site.doors[0]).await;
    echoes(&mut again, b"again").await;
    replace(&site, Side::Agent, &format!("name = \"{rule}\""), "name = \"renamed\"");
    reload(&mut site, Side::Agent, "config.reloaded").await;
    echoes(&mut again, b"still").await;
    drop((again, staying));
    site.stop().await;
}

#[tokio::test]
async fn a_principal_that_is_no_longer_asserted_loses_its_forwards() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    // Also a key that is its own principal from now on speaks for nobody else.
    replace(&site, Side::Agent, "asserts = [\"*\"]", "asserts = [\"ci-*\"]");
    let since = Instant::now();
    let reloaded = reload(&mut site, Side::Agent, "config.reloaded").await;
    assert_eq!(detail(&reloaded), format!("changed: orchestrator acme {}", fingerprint(&site.public("login-acme"))));
    ends(&mut stream, since).await;
    site.record(Side::Agent, json!({"event": "forward.ended", "reason": "revoked"})).await;
    refuses(site.doors[0]).await;
    site.record(Side::Agent, json!({"event": "forward.denied", "reason": "principal_not_asserted"})).await;
    assert_eq!(site.records(Side::Agent, &json!({"event": "link.up"})).len(), 1, "the link is the same");
    site.stop().await;
}

#[tokio::test]
async fn a_removed_orchestrator_key_cuts_its_link() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.key("other");
    let mut site = plan.start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    let (old, new) = (site.public("login-acme"), site.public("other"));
    replace(&site, Side::Agent, old.trim(), new.trim());
    let since = Instant::now();
    let reloaded = reload(&mut site, Side::Agent, "config.reloaded").await;
    let (gone, came) = (fingerprint(&old), fingerprint(&new));
    assert_eq!(detail(&reloaded), format!("gone: orchestrator acme {gone}; new: orchestrator acme {came}"));
    ends(&mut stream, since).await;
    site.record(Side::Agent, json!({"event": "forward.ended", "reason": "revoked"})).await;
    site.record(Side::Agent, json!({"event": "link.down", "reason": "revoked", "key": gone})).await;
    let line = site.program(Side::Agent).says("not linked").await;
    assert!(line.contains("not among this agent's orchestrator keys"), "{line}");

    // Given back, the agent does not wait for its next attempt.
    replace(&site, Side::Agent, new.trim(), old.trim());
    reload(&mut site, Side::Agent, "config.reloaded").await;
    agents_are(&site, "a link", |agents| agents.len() == 1).await;
    echoes(connect(site.doors[0]).await, b"again").await;
    site.stop().await;
}

#[tokio::test]
async fn a_faulty_configuration_changes_nothing() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    for side in [Side::Agent, Side::Gateway] {
        let good = fs::read_to_string(site.config(side)).expect("a configuration");
        // What is taken away in the same breath, is not: all or nothing.
        let faulty = match side {
            Side::Agent => good.replace("[[organisation.allow]]", "[[organisation.alow]]"),
            Side::Gateway => good.replace("[[local]]", "[[lokal]]"),
        };
        for (text, words) in [(faulty.as_str(), "unknown key"), ("", "none of [agent]"), ("[", "agent.toml")] {
            if side == Side::Gateway && text == "[" {
                continue;
            }
            fs::write(site.config(side), text).expect("written");
            let rejected = reload(&mut site, side, "config.rejected").await;
            assert!(detail(&rejected).contains(words), "{rejected}");
            echoes(&mut stream, b"meanwhile").await;
            echoes(connect(site.doors[0]).await, b"anew").await;
        }
        site.program(side).says("nothing that changed in it holds").await;
        assert!(site.records(side, &json!({"event": "config.reloaded"})).is_empty());
        // The other kind's configuration is none of this one.
        let other = if side == Side::Agent { Side::Gateway } else { Side::Agent };
        fs::write(site.config(side), fs::read_to_string(site.config(other)).expect("read")).expect("written");
        let rejected = reload(&mut site, side, "config.rejected").await;
        // What the environment sets for the one is unknown to the other.
        let words = ["this is no longer a", "(set by CAPONIER_"];
        assert!(words.iter().any(|words| detail(&rejected).contains(words)), "{rejected}");
        fs::write(site.config(side), good).expect("written");
        assert_eq!(detail(&reload(&mut site, side, "config.reloaded").await), "nothing changed");
        echoes(&mut stream, b"and after").await;
    }
    assert_eq!(site.records(Side::Agent, &json!({"event": "link.up"})).len(), 1, "the link is the same");
    drop(stream);
    site.stop().await;
}

#[tokio::test]
async fn an_organisation_comes_and_goes_beside_a_link_that_stays() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.registry().key("globex/agents/prod-eu", "one", &plan.public("agent"));
    let mut site = plan.start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    let first = agents(&site).await;
    let before = fs::read_to_string(site.config(Side::Agent)).expect("a configuration");
    let globex = format!(
        "[[organisation]]\nid = \"globex\"\ngateways = [\"ssh://{}\"]\n[[organisation.orchestrator]]\nkey = \"{}\"\n\
         asserts = [\"*\"]\n",
        site.address,
        site.public("login-globex").trim()
    );
    edit(&site, Side::Agent, |text| text + &globex);
    assert_eq!(detail(&reload(&mut site, Side::Agent, "config.reloaded").await), "new: organisation globex");
    let both = agents_are(&site, "two links", |agents| agents.len() == 2).await;
    assert_eq!(both[0]["since"], first[0]["since"], "the first link is another one");
    assert_eq!(both[1]["organisation"], "globex");
    echoes(&mut stream, b"meanwhile").await;

    fs::write(site.config(Side::Agent), before).expect("written");
    assert_eq!(detail(&reload(&mut site, Side::Agent, "config.reloaded").await), "gone: organisation globex");
    let one = agents_are(&site, "one link", |agents| agents.len() == 1).await;
    assert_eq!(one[0]["since"], first[0]["since"], "the first link is another one");
    site.record(Side::Agent, json!({"event": "link.down", "reason": "revoked", "organisation": "globex"})).await;
    echoes(&mut stream, b"and after").await;
    drop(stream);
    site.stop().await;
}

#[tokio::test]
async fn a_gateway_comes_and_goes_beside_a_link_that_stays() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut other = Site::plan().door(target).start_gateway().await;
    // The other gateway knows the agent, and logs in with a key of its own.
    other.registry().key("acme/agents/prod-eu", "other", &site.public("agent"));
    other.record(Side::Gateway, json!({"event": "registry.reloaded"})).await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    let first = agents(&site).await;
    let orchestrator = format!(
        "[[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n[[organisation.allow]]",
        other.public("login-acme").trim()
    );
    let gateways = format!("gateways = [\"ssh://{}\"]", site.address);
    let more = format!("gateways = [\"ssh://{}\", \"ssh://{}\"]", site.address, other.address);
    replace(&site, Side::Agent, "[[organisation.allow]]", &orchestrator);
    replace(&site, Side::Agent, &gateways, &more);
    reload(&mut site, Side::Agent, "config.reloaded").await;
    agents_are(&other, "a link", |agents| agents.len() == 1).await;
    let mut through = connect(other.doors[0]).await;
    echoes(&mut through, b"through the other").await;
    assert_eq!(agents(&site).await[0]["since"], first[0]["since"], "the first link is another one");

    replace(&site, Side::Agent, &more, &gateways);
    let since = Instant::now();
    let reloaded = reload(&mut site, Side::Agent, "config.reloaded").await;
    assert_eq!(detail(&reloaded), format!("gone: gateway acme ssh://{}", other.address));
    ends(&mut through, since).await;
    site.record(Side::Agent, json!({"event": "forward.ended", "reason": "revoked"})).await;
    agents_are(&other, "no link", <[Value]>::is_empty).await;
    echoes(&mut stream, b"and after").await;
    assert_eq!(agents(&site).await[0]["since"], first[0]["since"], "the first link is another one");
    drop(stream);
    assert_eq!(other.program(Side::Gateway).stop().await, Some(0));
    site.stop().await;
}

#[tokio::test]
async fn a_rotated_login_key_moves_the_link_and_keeps_its_forwards() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.key("login-next");
    let mut site = plan.start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    let first = agents(&site).await;
    let next = site.public("login-next");

    // Too early: the agent does not know the new key, and the link stays.
    replace(&site, Side::Gateway, "\"login-acme\"", "\"login-next\"");
    assert_eq!(detail(&reload(&mut site, Side::Gateway, "config.reloaded").await), "changed: organisation acme");
    let line = site.program(Side::Agent).says("not linked").await;
    assert!(line.contains("the link that there is stays"), "{line}");
    assert!(line.contains(&fingerprint(&next)), "{line}");
    echoes(&mut stream, b"meanwhile").await;
    echoes(connect(site.doors[0]).await, b"anew").await;

    let second =
        format!("[[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n[[organisation.allow]]", next.trim());
    replace(&site, Side::Agent, "[[organisation.allow]]", &second);
    reload(&mut site, Side::Agent, "config.reloaded").await;
    let agents = agents_are(&site, "a second link", |agents| agents.len() == 2).await;
    assert_eq!((&agents[0]["since"], &agents[0]["state"]), (&first[0]["since"], &json!("retired")));
    assert_eq!(agents[1]["state"], "active");
    site.record(Side::Agent, json!({"event": "link.up", "key": fingerprint(&next)})).await;
    echoes(&mut stream, b"still on the old one").await;
    echoes(connect(site.doors[0]).await, b"on the new one").await;

    drop(stream);
    agents_are(&site, "one link", |agents| agents.len() == 1).await;
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "replaced"})).await;
    // Now the old key can go, and nobody notices.
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    let old =
        format!("[[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n", site.public("login-acme").trim());
    replace(&site, Side::Agent, &old, "");
    reload(&mut site, Side::Agent, "config.reloaded").await;
    echoes(&mut stream, b"and after").await;
    drop(stream);
    site.stop().await;
}

#[tokio::test]
async fn a_rotated_host_key_is_taken_on_without_a_gap() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.key("agent-next");
    let mut site = plan.start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    let next = site.public("agent-next");

    // Too early: the gateway does not know the new key, and the link stays.
    replace(&site, Side::Agent, "host_key = \"agent\"", "host_key = \"agent-next\"");
    let reloaded = reload(&mut site, Side::Agent, "config.reloaded").await;
    assert_eq!(detail(&reloaded), format!("changed: host_key {}", fingerprint(&next)));
    let line = site.program(Side::Agent).says("not linked").await;
    assert!(line.contains("the link that there is stays"), "{line}");
    assert!(line.contains(&format!("key {} is not registered", fingerprint(&next))), "{line}");
    echoes(&mut stream, b"meanwhile").await;
    echoes(connect(site.doors[0]).await, b"anew").await;

    site.registry().key("acme/agents/prod-eu", "next", &next);
    let agents = agents_are(&site, "a second link", |agents| agents.len() == 2).await;
    assert_eq!(
        (&agents[0]["key"], &agents[0]["state"]),
        (&json!(fingerprint(&site.public("agent"))), &json!("retired"))
    );
    assert_eq!((&agents[1]["key"], &agents[1]["state"]), (&json!(fingerprint(&next)), &json!("active")));
    echoes(&mut stream, b"still on the old one").await;
    drop(stream);
    let agents = agents_are(&site, "one link", |agents| agents.len() == 1).await;
    assert_eq!(agents[0]["key"], fingerprint(&next));
    echoes(connect(site.doors[0]).await, b"and after").await;
    site.stop().await;
}

#[tokio::test]
async fn another_replica_name_is_taken_on_without_a_gap() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    replace(&site, Side::Agent, "replica = \"one\"", "replica = \"two\"");
    assert_eq!(detail(&reload(&mut site, Side::Agent, "config.reloaded").await), "changed: replica two");
    agents_are(&site, "a second link", |agents| {
        agents.iter().any(|agent| agent["replica"] == "two" && agent["state"] == "active")
    })
    .await;
    echoes(&mut stream, b"still on the old one").await;
    echoes(connect(site.doors[0]).await, b"anew").await;
    drop(stream);
    let agents = agents_are(&site, "one link", |agents| agents.len() == 1).await;
    assert_eq!(agents[0]["replica"], "two");
    site.stop().await;
}

#[tokio::test]
async fn loopback_doors_come_go_and_change() {
    let (one, two) = (echo().await, echo().await);
    let mut site = Site::plan().allow(one).allow(two).door(one).door(two).start().await;
    let mut ending = connect(site.doors[0]).await;
    let mut staying = connect(site.doors[1]).await;
    echoes(&mut ending, b"before").await;
    echoes(&mut staying, b"before").await;
    let block = |listen: SocketAddr, target: SocketAddr| {
        format!(
            "[[local]]\nlisten = \"{listen}\"\nagent = \"acme/prod-eu\"\ntarget = \"{target}\"\nprincipal = \"provisioner\"\n"
        )
    };

    // A door that cannot be made is a fault, and then the other one is not closed either.
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let occupied = taken.local_addr().expect("its address");
    let before = fs::read_to_string(site.config(Side::Gateway)).expect("a configuration");
    let first = before.split_once("[[local]]").map(|(head, _)| head.to_owned()).expect("doors");
    let (first_door, second_door) = (site.doors[0], site.doors[1]);
    fs::write(site.config(Side::Gateway), format!("{first}{}{}", block(second_door, two), block(occupied, one)))
        .expect("written");
    let rejected = reload(&mut site, Side::Gateway, "config.rejected").await;
    assert!(detail(&rejected).contains(&format!("could not listen on {occupied}")), "{rejected}");
    echoes(&mut ending, b"meanwhile").await;
    echoes(connect(first_door).await, b"anew").await;

    // One is gone, one is new, one stays.
    let third_door = SocketAddr::from(([127, 0, 0, 1], free_port()));
    fs::write(site.config(Side::Gateway), format!("{first}{}{}", block(second_door, two), block(third_door, one)))
        .expect("written");
    let since = Instant::now();
    let reloaded = reload(&mut site, Side::Gateway, "config.reloaded").await;
    assert_eq!(detail(&reloaded), format!("gone: door {first_door}; new: door {third_door}"));
    ends(&mut ending, since).await;
    site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "revoked", "target": one.to_string()})).await;
    eventually("the first door is closed", async || TcpStream::connect(first_door).await.is_err().then_some(())).await;
    echoes(&mut staying, b"and after").await;
    let mut changing = connect(third_door).await;
    echoes(&mut changing, b"new").await;

    // One leads elsewhere: what came in by it ends, and what comes goes there.
    fs::write(site.config(Side::Gateway), format!("{first}{}{}", block(second_door, two), block(third_door, two)))
        .expect("written");
    let since = Instant::now();
    let reloaded = reload(&mut site, Side::Gateway, "config.reloaded").await;
    assert_eq!(detail(&reloaded), format!("changed: door {third_door}"));
    ends(&mut changing, since).await;
    let like = json!({"event": "forward.open", "target": two.to_string()});
    let opened = site.records(Side::Gateway, &like).len();
    echoes(connect(third_door).await, b"elsewhere").await;
    assert_eq!(site.records(Side::Gateway, &like).len(), opened + 1);
    echoes(&mut staying, b"and after").await;
    drop(staying);
    site.stop().await;
}

#[tokio::test]
async fn an_organisation_that_the_gateway_no_longer_serves_is_cut() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.registry().key("globex/agents/prod-eu", "one", &plan.public("agent"));
    let mut site = plan.start().await;
    let (ssh, address) = site.local_forward(target).await;
    let mut through = connect(address).await;
    echoes(&mut through, b"before").await;
    edit(&site, Side::Gateway, |text| {
        let text = text.split_once("[[local]]").map(|(head, _)| head.to_owned()).expect("a door");
        text.replace("[[organisation]]\nid = \"acme\"\nlogin_key = \"login-acme\"\n", "")
    });
    let since = Instant::now();
    let reloaded = reload(&mut site, Side::Gateway, "config.reloaded").await;
    assert_eq!(detail(&reloaded), format!("gone: organisation acme, door {}", site.doors[0]));
    ends(&mut through, since).await;
    site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "revoked", "door": "ssh"})).await;
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "revoked"})).await;
    let mut refused = connect(address).await;
    // The client's ssh may have read the first bytes before it hears of the refusal.
    drop(refused.write_all(b"after").await);
    assert_eq!(read_to_end(&mut refused).await, b"");
    site.record(Side::Gateway, json!({"event": "forward.denied", "reason": "organisation_not_served"})).await;
    site.program(Side::Agent).says("not linked").await;
    drop(ssh);
    site.stop().await;
}

#[tokio::test]
async fn what_runs_on_in_a_drain_can_be_revoked() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    for side in [Side::Gateway, Side::Agent] {
        let mut stream = connect(site.doors[0]).await;
        echoes(&mut stream, b"before").await;
        site.program(side).signal("TERM");
        site.record(side, json!({"event": "drain.began"})).await;
        echoes(&mut stream, b"on its way out").await;
        match side {
            Side::Gateway => {
                edit(&site, side, |text| text.split_once("[[local]]").map(|(head, _)| head.to_owned()).expect("a door"))
            }
            Side::Agent => edit(&site, side, |text| {
                text.split_once("[[organisation.allow]]").map(|(head, _)| head.to_owned()).expect("a rule")
            }),
        }
        let since = Instant::now();
        reload(&mut site, side, "config.reloaded").await;
        ends(&mut stream, since).await;
        site.record(side, json!({"event": "forward.ended", "reason": "revoked"})).await;
        // Nothing had to be cut at the deadline.
        assert_eq!(site.program(side).ended().await.code(), Some(0));
        if side == Side::Gateway {
            site.restart_gateway().await;
            site.program(Side::Gateway).says(" linked ").await;
        }
    }
}

#[tokio::test]
async fn what_needs_a_restart_is_said_and_the_rest_taken_over() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    edit(&site, Side::Agent, |text| {
        let text = text.replace("id = \"prod-eu\"", "id = \"prod-us\"").replace("agent.jsonl", "elsewhere.jsonl");
        text.replace("asserts = [\"*\"]", "asserts = [\"provisioner\"]") + "[log]\nformat = \"json\"\n"
    });
    reload(&mut site, Side::Agent, "config.reloaded").await;
    let line = site.program(Side::Agent).says("need a restart").await;
    assert!(line.ends_with("need a restart: log, agent.id, audit"), "{line}");
    assert!(!site.path().join("elsewhere.jsonl").exists());

    let port = free_port();
    replace(&site, Side::Gateway, "listen = [\"127.0.0.1:0\"]", &format!("listen = [\"127.0.0.1:{port}\"]"));
    site.key("gateway-next");
    replace(&site, Side::Gateway, "host_key = \"gateway\"", "host_key = \"gateway-next\"");
    replace(&site, Side::Gateway, "admin.sock", "other.sock");
    let reloaded = reload(&mut site, Side::Gateway, "config.reloaded").await;
    assert_eq!(detail(&reloaded), format!("changed: host_key {}", fingerprint(&site.public("gateway-next"))));
    let line = site.program(Side::Gateway).says("need a restart").await;
    assert!(line.ends_with("need a restart: gateway.listen, gateway.admin_socket"), "{line}");
    assert_eq!(agents(&site).await.len(), 1);
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
    // The door shows its new key to who comes now.
    let said = run(&mut site.ssh(&["-W", &target.to_string()])).await;
    assert_eq!(said.code(), 255, "{said:?}");
    assert!(said.stderr.contains("HOST IDENTIFICATION HAS CHANGED"), "{said:?}");
    let known = format!("[{}]:{} {}\n", site.address.ip(), site.address.port(), site.public("gateway-next"));
    fs::write(site.path().join("known_hosts"), known).expect("written");
    assert_eq!(run(&mut site.ssh(&["-W", &target.to_string()])).await.code(), 0);
    echoes(&mut stream, b"and after").await;
    drop(stream);
    site.stop().await;
}

/// Signals come faster than files are read, and the file goes, comes back cut short at any place, and comes back whole.
#[tokio::test]
async fn a_storm_of_reloads_of_a_file_that_comes_and_goes_leaves_what_runs() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    for side in [Side::Agent, Side::Gateway] {
        let (path, good) = (site.config(side), fs::read_to_string(site.config(side)).expect("a configuration"));
        let limits = format!("[{}.limits]\nforwards_per_link = 7\n[audit]", side.name());
        for round in 0..30 {
            match round % 3 {
                0 => fs::remove_file(&path).expect("removed"),
                // Within its first table, where nothing that it needs has come yet.
                1 => fs::write(&path, &good[..good.len() * round / 300]).expect("written"),
                _ => fs::write(&path, good.replace("[audit]", &limits)).expect("written"),
            }
            for _ in 0..5 {
                site.program(side).signal("HUP");
            }
            echoes(&mut stream, b"meanwhile").await;
        }
        fs::write(&path, &good).expect("written");
        // Of what the storm has left under way, some may be recorded yet; the last request finds the good one.
        eventually("the good configuration", async || {
            site.program(side).signal("HUP");
            let last = site.records(side, &json!({"event": "config.reloaded"})).pop()?;
            (detail(&last) == "nothing changed").then_some(())
        })
        .await;
        echoes(connect(site.doors[0]).await, b"anew").await;
    }
    assert_eq!(site.records(Side::Agent, &json!({"event": "link.up"})).len(), 1, "the link is the same");
    drop(stream);
    site.stop().await;
}

//! The same promises over each transport of a link, directly and through a proxy.
//!
//! Each test below takes the way as its parameter, and stands in a module for each: `transports::tls::…`. Over each transport
//! directly all of them run, through squid those that its bytes could matter to. The rest of the product, and what takes longer
//! than any balancer lets a connection idle, is run by `scripts/soak transports`, which is `cargo test` with `--include-ignored`
//! and `CAPONIER_SOAK=1`.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use caponier::limits;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::{sleep, timeout};

use crate::harness::{
    AGENT, PATIENCE, Plan, Program, Side, Site, caponier, connect, echo, echoes, eventually, free_port, listen,
    read_to_end, run, within,
};
use crate::squid::{Authority, Squid, USER};

/// How the agent's link goes.
#[derive(Debug, Clone, Copy)]
struct Leg {
    transport: &'static str,
    through: Through,
}

/// What is on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Through {
    Nothing,
    /// squid, which wants a password, over HTTP.
    Http,
    /// The same over TLS.
    Https,
}

/// A site whose link goes so.
struct Stand {
    site: Site,
    squid: Option<Squid>,
}

impl Leg {
    const fn new(transport: &'static str, through: Through) -> Self {
        Self { transport, through }
    }

    /// The agent's `gateways`, where the address stands for the gateway's.
    fn gateways(self) -> String {
        format!("[\"{}://{{}}\"]", self.transport)
    }

    /// Starts the site.
    async fn stand(self, plan: Plan) -> Stand {
        let authority = Authority::new("caponier's tests");
        let mut plan = secured(plan, &authority).gateways(&self.gateways());
        let squid = match self.through {
            Through::Nothing => None,
            Through::Http => Some(Squid::with_password().await),
            Through::Https => Some(Squid::with_password_within_tls(&authority).await),
        };
        if let Some(squid) = &squid {
            let password = "pass%3Aword%2Fof%40the%25agent";
            plan = plan.agent_setting(&format!("proxy = \"{}\"", squid.url_with(USER, password)));
        }
        if self.through == Through::Https {
            plan = plan.agent_setting("proxy_ca_file = \"ca.pem\"");
        }
        let site = plan.start().await;
        let up = site.record(Side::Agent, json!({"event": "link.up"})).await;
        let expected = format!("{}://{}", self.transport, site.address);
        assert_eq!(up["detail"], expected, "{up}");
        Stand { site, squid }
    }
}

impl Stand {
    /// Stops it all, and looks that the link went through what it should.
    async fn stop(self) {
        self.site.stop().await;
        if let Some(squid) = self.squid {
            eventually("the proxy's record", async || squid.access().contains(&format!(" {USER} ")).then_some(()))
                .await;
        }
    }
}

/// The gateway has a certificate of this authority, and the agent trusts it.
fn secured(plan: Plan, authority: &Authority) -> Plan {
    certify(plan.path(), authority);
    let plan = plan.gateway_table("[[certificate]]\nchain = \"tls.pem\"\nkey = \"tls-key.pem\"");
    plan.agent_setting("tls_ca_file = \"ca.pem\"")
}

/// `ca.pem`, and for the gateway or whatever stands before it `tls.pem` and `tls-key.pem`.
fn certify(dir: &Path, authority: &Authority) {
    use std::os::unix::fs::PermissionsExt;
    authority.write(&dir.join("ca.pem"));
    let (chain, key) = authority.certify(&["localhost", "127.0.0.1"]);
    fs::write(dir.join("tls.pem"), chain).expect("written");
    let file = dir.join("tls-key.pem");
    fs::write(&file, key).expect("written");
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).expect("permissions");
}

/// Whether this is the long run.
fn soaking() -> bool {
    std::env::var_os("CAPONIER_SOAK").is_some()
}

/// Bytes of which a lost, repeated or swapped piece is seen.
fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(29) ^ (at >> 8) as u8 ^ (at >> 16) as u8).collect()
}

/// Bytes that a door leads to nobody for: the connection ends without one.
async fn is_refused(address: SocketAddr) {
    let mut stream = connect(address).await;
    // The end may come before these do.
    drop(stream.write_all(b"anybody?").await);
    assert_eq!(read_to_end(stream).await, b"");
}

/// The tests, each by its name, for a way.
macro_rules! tests {
    ($module:ident, $leg:expr, $($test:ident),+ $(,)?) => {
        mod $module {
            use super::{Leg, Through};
            $(#[tokio::test]
            async fn $test() {
                const LEG: Leg = $leg;
                super::$test(LEG).await;
            })+
        }
    };
    (later $module:ident, $leg:expr, $($test:ident),+ $(,)?) => {
        mod $module {
            use super::{Leg, Through};
            $(#[tokio::test]
            #[ignore = "scripts/soak transports runs it"]
            async fn $test() {
                const LEG: Leg = $leg;
                super::$test(LEG).await;
            })+
        }
    };
}

/// All that run directly, and in the soak through squid.
macro_rules! most {
    ($($later:ident)? : $module:ident, $leg:expr) => {
        tests!($($later)? $module, $leg,
            a_target_is_reached_and_both_trails_say_by_which_way,
            what_is_not_allowed_or_not_there_is_refused,
            a_stream_is_carried_both_ways_whole,
            either_half_ends_by_itself,
            a_stream_that_nobody_reads_hinders_no_other,
            many_at_once_and_many_one_after_another,
            a_burst_of_small_messages_comes_back_in_order,
            a_rotated_key_replaces_the_link_under_a_stream,
            a_gateway_that_drains_lets_a_stream_end,
            a_gateway_that_is_gone_is_found_again,
            a_removed_key_cuts_the_link_and_is_told_plainly,
            a_replaced_way_goes_on_until_its_streams_end,
            a_client_comes_by_the_same_transport,
        );
    };
}

most!(: ssh, Leg::new("ssh", Through::Nothing));
most!(: tls, Leg::new("tls", Through::Nothing));
most!(: wss, Leg::new("wss", Through::Nothing));
tests!(
    tls_through_http_squid,
    Leg::new("tls", Through::Http),
    a_target_is_reached_and_both_trails_say_by_which_way,
    what_is_not_allowed_or_not_there_is_refused,
    a_stream_is_carried_both_ways_whole,
);
tests!(
    wss_through_http_squid,
    Leg::new("wss", Through::Http),
    a_target_is_reached_and_both_trails_say_by_which_way,
    what_is_not_allowed_or_not_there_is_refused,
    a_stream_is_carried_both_ways_whole,
);
tests!(
    ssh_through_https_squid,
    Leg::new("ssh", Through::Https),
    a_target_is_reached_and_both_trails_say_by_which_way,
    what_is_not_allowed_or_not_there_is_refused,
    a_stream_is_carried_both_ways_whole,
);
tests!(
    tls_through_https_squid,
    Leg::new("tls", Through::Https),
    a_target_is_reached_and_both_trails_say_by_which_way,
    what_is_not_allowed_or_not_there_is_refused,
    a_stream_is_carried_both_ways_whole,
);
tests!(
    wss_through_https_squid,
    Leg::new("wss", Through::Https),
    a_target_is_reached_and_both_trails_say_by_which_way,
    what_is_not_allowed_or_not_there_is_refused,
    a_stream_is_carried_both_ways_whole,
);

/// The whole product, through squid.
mod whole {
    use super::*;
    most!(later: ssh_through_http_squid, Leg::new("ssh", Through::Http));
    most!(later: tls_through_http_squid, Leg::new("tls", Through::Http));
    most!(later: wss_through_http_squid, Leg::new("wss", Through::Http));
    most!(later: ssh_through_https_squid, Leg::new("ssh", Through::Https));
    most!(later: tls_through_https_squid, Leg::new("tls", Through::Https));
    most!(later: wss_through_https_squid, Leg::new("wss", Through::Https));
}

async fn a_target_is_reached_and_both_trails_say_by_which_way(leg: Leg) {
    let target = echo().await;
    let stand = leg.stand(Site::plan().allow(target).door(target)).await;
    let site = &stand.site;
    echoes(connect(site.doors[0]).await, b"through it all").await;
    site.record(Side::Gateway, json!({"event": "link.up", "transport": leg.transport})).await;
    site.record(Side::Agent, json!({"event": "forward.ended", "reason": "eof"})).await;
    let listed = run(caponier().arg("agents").arg("--json").arg("--socket").arg(site.admin_socket())).await.done();
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!(listed[0]["transport"], leg.transport, "{listed}");
    // The target is reached by the agent alone, and the gateway by no other way.
    assert_eq!(site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 1);
    stand.stop().await;
}

async fn what_is_not_allowed_or_not_there_is_refused(leg: Leg) {
    let (allowed, other) = (echo().await, echo().await);
    let nobody = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let plan = Site::plan().allow(allowed).allow(nobody).door(allowed).door(other).door(nobody);
    let stand = leg.stand(plan).await;
    let site = &stand.site;
    is_refused(site.doors[1]).await;
    site.record(Side::Agent, json!({"event": "forward.denied"})).await;
    is_refused(site.doors[2]).await;
    site.record(Side::Agent, json!({"event": "forward.failed"})).await;
    // The gateway itself is no target, whatever the transport.
    let gateway = site.address.to_string();
    let said = run(&mut site.ssh(&["-W", &gateway])).await;
    assert_eq!(said.code(), 255, "{said:?}");
    site.record(Side::Agent, json!({"event": "forward.denied", "target": gateway})).await;
    echoes(connect(site.doors[0]).await, b"the rest goes on").await;
    stand.stop().await;
}

async fn a_stream_is_carried_both_ways_whole(leg: Leg) {
    let target = echo().await;
    let stand = leg.stand(Site::plan().allow(target).door(target)).await;
    let sent = bytes(if soaking() { 100_000_000 } else { 12_000_000 });
    let (mut read, mut write) = connect(stand.site.doors[0]).await.into_split();
    let mut heard = Vec::with_capacity(sent.len());
    let both = async {
        tokio::join!(
            async {
                write.write_all(&sent).await.expect("written");
                write.shutdown().await.expect("shut down");
            },
            async { read.read_to_end(&mut heard).await.map(drop).expect("read to an orderly end") },
        )
    };
    timeout(Duration::from_secs(300), both).await.expect("not in time");
    assert!(heard == sent, "bytes were changed, lost or reordered");
    let total = sent.len() as u64;
    for side in [Side::Gateway, Side::Agent] {
        let counted = json!({"event": "forward.ended", "reason": "eof", "to_target": total, "from_target": total});
        stand.site.record(side, counted).await;
    }
    stand.stop().await;
}

async fn either_half_ends_by_itself(leg: Leg) {
    // Answers with all it has read, once that has ended; or says its piece first and reads then.
    let late = listen(async |mut stream: TcpStream| {
        let mut all = Vec::new();
        if stream.read_to_end(&mut all).await.is_ok() {
            drop(stream.write_all(&all).await);
        }
    })
    .await;
    let early = listen(async |mut stream: TcpStream| {
        drop(stream.write_all(b"first").await);
        drop(stream.shutdown().await);
        let mut all = Vec::new();
        drop(stream.read_to_end(&mut all).await);
        assert_eq!(all, b"and then");
    })
    .await;
    let stand = leg.stand(Site::plan().allow(late).allow(early).door(late).door(early)).await;
    let mut stream = connect(stand.site.doors[0]).await;
    let sent = bytes(300_000);
    stream.write_all(&sent).await.expect("written");
    stream.shutdown().await.expect("shut down");
    assert!(read_to_end(stream).await == sent);
    let mut stream = connect(stand.site.doors[1]).await;
    let mut heard = Vec::new();
    within("the target's end", stream.read_to_end(&mut heard)).await.expect("read");
    assert_eq!(heard, b"first");
    stream.write_all(b"and then").await.expect("written");
    stream.shutdown().await.expect("shut down");
    for side in [Side::Gateway, Side::Agent] {
        stand.site.record(side, json!({"event": "forward.ended", "reason": "eof", "to_target": 8})).await;
    }
    stand.stop().await;
}

async fn a_stream_that_nobody_reads_hinders_no_other(leg: Leg) {
    let flood = listen(async |mut stream: TcpStream| {
        let chunk = vec![7; 65_536];
        while stream.write_all(&chunk).await.is_ok() {}
    })
    .await;
    let target = echo().await;
    let stand = leg.stand(Site::plan().allow(target).allow(flood).door(target).door(flood)).await;
    let mut before = connect(stand.site.doors[0]).await;
    echoes(&mut before, b"open before").await;
    let mut stalled = connect(stand.site.doors[1]).await;
    within("the first byte", stalled.read_u8()).await.expect("read");
    // Written to, and never read.
    let mut filled = connect(stand.site.doors[0]).await;
    let chunk = vec![7; 65_536];
    while timeout(Duration::from_secs(1), filled.write_all(&chunk)).await.is_ok() {}
    for _ in 0..4 {
        echoes(&mut before, &bytes(1_000_000)).await;
        echoes(connect(stand.site.doors[0]).await, b"anew").await;
    }
    assert_eq!(stand.site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 1);
    drop((stalled, filled, before));
    stand.stop().await;
}

async fn many_at_once_and_many_one_after_another(leg: Leg) {
    let target = echo().await;
    let stand = leg.stand(Site::plan().allow(target).door(target)).await;
    let door = stand.site.doors[0];
    let mut open = Vec::new();
    for number in 0..64_u8 {
        let mut stream = connect(door).await;
        stream.write_all(&[number; 100]).await.expect("written");
        open.push(stream);
    }
    for (number, stream) in open.iter_mut().enumerate() {
        let mut back = [0; 100];
        within("an echo", stream.read_exact(&mut back)).await.expect("read");
        assert_eq!(back, [number as u8; 100]);
    }
    for _ in 0..100 {
        echoes(connect(door).await, b"and again").await;
    }
    drop(open);
    stand.stop().await;
}

async fn a_burst_of_small_messages_comes_back_in_order(leg: Leg) {
    let target = echo().await;
    let stand = leg.stand(Site::plan().allow(target).door(target)).await;
    let mut stream = connect(stand.site.doors[0]).await;
    stream.set_nodelay(true).expect("an option");
    // One at a time, each of which waits for all layers on the way to let go of it; then all at once.
    for number in 0..300_u16 {
        echoes(&mut stream, &number.to_be_bytes()).await;
    }
    let (mut read, mut write) = stream.into_split();
    let sent = bytes(20_000);
    let mut back = vec![0; sent.len()];
    within("all of them", async {
        tokio::join!(
            async {
                for byte in sent.chunks(3) {
                    write.write_all(byte).await.expect("written");
                }
            },
            async { read.read_exact(&mut back).await.map(drop).expect("read") },
        )
    })
    .await;
    assert!(back == sent);
    drop((read, write));
    stand.stop().await;
}

async fn a_rotated_key_replaces_the_link_under_a_stream(leg: Leg) {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    plan.key("agent-next");
    let mut stand = leg.stand(plan).await;
    let site = &mut stand.site;
    let next = site.public("agent-next");
    site.registry().key("acme/agents/prod-eu", "next", &next);
    site.record(Side::Gateway, json!({"event": "registry.reloaded"})).await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    edit(site, "host_key = \"agent\"", "host_key = \"agent-next\"");
    site.program(Side::Agent).says("replacing the link").await;
    eventually("another link", async || {
        (site.records(Side::Gateway, &json!({"event": "link.up"})).len() == 2).then_some(())
    })
    .await;
    echoes(&mut stream, b"still").await;
    echoes(connect(site.doors[0]).await, b"anew").await;
    drop(stream);
    site.record(Side::Gateway, json!({"event": "link.down"})).await;
    stand.stop().await;
}

async fn a_gateway_that_drains_lets_a_stream_end(leg: Leg) {
    let target = echo().await;
    let mut stand = leg.stand(Site::plan().allow(target).door(target).drain(Side::Gateway, 300)).await;
    let site = &mut stand.site;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).says("draining: 1 forward(s) still run, ").await;
    echoes(&mut stream, b"goes on").await;
    stream.shutdown().await.expect("shut down");
    assert_eq!(read_to_end(stream).await, b"");
    assert_eq!(site.program(Side::Gateway).ended().await.code(), Some(0));
    // In order, also for the layers of the way: nothing was merely cut.
    site.record(Side::Agent, json!({"event": "link.down", "reason": "closed"})).await;
    site.restart_gateway().await;
    site.program(Side::Gateway).says(" linked ").await;
    echoes(connect(site.doors[0]).await, b"linked again").await;
    stand.stop().await;
}

async fn a_gateway_that_is_gone_is_found_again(leg: Leg) {
    let target = echo().await;
    let mut stand = leg.stand(Site::plan().allow(target).door(target)).await;
    let site = &mut stand.site;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    site.program(Side::Gateway).kill().await;
    drop(stream);
    site.program(Side::Agent).says("the link is lost; dialling again").await;
    site.record(Side::Agent, json!({"event": "forward.ended", "reason": "link_lost"})).await;
    site.restart_gateway().await;
    site.program(Side::Gateway).says(" linked ").await;
    echoes(connect(site.doors[0]).await, b"linked again").await;
    stand.stop().await;
}

async fn a_removed_key_cuts_the_link_and_is_told_plainly(leg: Leg) {
    let target = echo().await;
    let mut stand = leg.stand(Site::plan().allow(target).door(target)).await;
    let site = &mut stand.site;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    fs::remove_file(site.registry().folder("acme/agents/prod-eu/one.pub")).expect("removed");
    assert_eq!(read_to_end(stream).await, b"");
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "revoked"})).await;
    let line = site.program(Side::Agent).says("not linked").await;
    assert!(line.contains("closed the connection after key exchange, before login"), "{line}");
    site.registry().key("acme/agents/prod-eu", "one", &site.public("agent"));
    eventually("another link", async || {
        (site.records(Side::Gateway, &json!({"event": "link.up"})).len() == 2).then_some(())
    })
    .await;
    stand.stop().await;
}

async fn a_replaced_way_goes_on_until_its_streams_end(leg: Leg) {
    let target = echo().await;
    let mut stand = leg.stand(Site::plan().allow(target).door(target)).await;
    let site = &mut stand.site;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    let other = if leg.transport == "tls" { "wss" } else { "tls" };
    let gateways = leg.gateways().replace("{}", &site.address.to_string());
    edit(site, &gateways, &gateways.replace(leg.transport, other));
    site.record(Side::Agent, json!({"event": "link.up", "detail": format!("{other}://{}", site.address)})).await;
    site.program(Side::Agent).says("replacing the link: the configuration has other ways to its gateway").await;
    echoes(&mut stream, b"still on the old link").await;
    echoes(connect(site.doors[0]).await, b"on the new link").await;
    assert_eq!(site.records(Side::Agent, &json!({"event": "link.down"})).len(), 0);
    drop(stream);
    site.record(Side::Agent, json!({"event": "link.down", "reason": "closed"})).await;
    stand.stop().await;
}

async fn a_client_comes_by_the_same_transport(leg: Leg) {
    let target = echo().await;
    let stand = leg.stand(Site::plan().allow(target)).await;
    let site = &stand.site;
    let (_forward, address) = forward(site, &format!("{}://{}", leg.transport, site.address), target).await;
    echoes(connect(address).await, &bytes(2_000_000)).await;
    let mut stream = connect(address).await;
    stream.write_all(b"half").await.expect("written");
    stream.shutdown().await.expect("shut down");
    assert_eq!(read_to_end(stream).await, b"half");
    site.record(Side::Gateway, json!({"event": "auth.accepted", "transport": leg.transport})).await;
    stand.stop().await;
}

/// `caponier forward` to a target, by a URL; where it listens.
async fn forward(site: &Site, url: &str, target: SocketAddr) -> (Program, SocketAddr) {
    let port = free_port();
    let mut command = caponier();
    command.args(["forward", "--gateway", url, "--agent", AGENT, "--tls-ca-file"]).arg(site.path().join("ca.pem"));
    command.arg("--identity").arg(site.path().join("provisioner"));
    command.arg("--host-key-fingerprint").arg(fingerprint(&site.public("gateway")));
    command.args(["-L", &format!("{port}:{target}")]);
    let mut program = site.background("forward", command);
    program.says("listening 127.0.0.1:").await;
    (program, SocketAddr::from(([127, 0, 0, 1], port)))
}

fn fingerprint(public: &str) -> String {
    caponier::identity::PublicKey::parse(public).expect("a public key").fingerprint().to_string()
}

/// Changes the agent's configuration.
fn edit(site: &Site, from: &str, to: &str) {
    let file = site.config(Side::Agent);
    let text = fs::read_to_string(&file).expect("the configuration");
    assert!(text.contains(from), "{from} in {text}");
    fs::write(&file, text.replace(from, to)).expect("written");
}

/// Three ways, of which the first leads nowhere and the second to something else.
#[tokio::test]
async fn ways_are_tried_in_order_and_each_failure_is_told_once_with_what_is_tried_next() {
    let (target, nobody) = (echo().await, free_port());
    let plan = Site::plan().allow(target).door(target).agent_setting("tls_ca_file = \"ca.pem\"");
    certify(plan.path(), &Authority::new("caponier's tests"));
    let ways = format!("[[\"tls://127.0.0.1:{nobody}\", \"wss://{{}}\", \"ssh://{{}}\"]]");
    let mut site = plan.gateways(&ways).start().await;
    let (gateway, first) = (site.address, format!("127.0.0.1:{nobody}"));
    let told = |log: &str, way: &str| -> Vec<String> {
        let of = format!("gateway={way}");
        log.lines().filter(|line| line.contains("not linked: ") && line.ends_with(&of)).map(str::to_owned).collect()
    };
    let log = site.program(Side::Agent).log();
    let lines = told(&log, &format!("tls://{first}"));
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains(&format!("could not connect to gateway {first}")), "{}", lines[0]);
    assert!(lines[0].contains(&format!("; trying wss://{gateway} next")), "{}", lines[0]);
    let lines = told(&log, &format!("wss://{gateway}"));
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains("could not make TLS with gateway"), "{}", lines[0]);
    assert!(lines[0].contains(&format!("; trying ssh://{gateway} next")), "{}", lines[0]);
    site.record(Side::Agent, json!({"event": "link.up", "detail": format!("ssh://{gateway}")})).await;
    echoes(connect(site.doors[0]).await, b"by the last way").await;

    // Each round begins with the first, and says nothing twice.
    site.program(Side::Gateway).kill().await;
    site.program(Side::Agent).says("still not linked").await;
    site.restart_gateway().await;
    site.program(Side::Gateway).says(" linked ").await;
    assert_eq!(told(&site.program(Side::Agent).log(), &format!("tls://{first}")).len(), 1);

    // Where the gateway itself says no, no other way is tried.
    site.change_gateways(&format!("[[\"ssh://{gateway}\", \"tls://{first}\"]]"));
    fs::remove_file(site.registry().folder("acme/agents/prod-eu/one.pub")).expect("removed");
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "revoked"})).await;
    site.restart_agent().await;
    let line = site.program(Side::Agent).says("not linked").await;
    assert!(line.contains("is not registered there"), "{line}");
    assert!(line.contains("no other way to this gateway is tried"), "{line}");
    site.program(Side::Agent).says("waiting before the next attempt").await;
    assert!(!site.program(Side::Agent).log().contains(&format!("could not connect to gateway {first}")));
    site.stop().await;
}

#[tokio::test]
async fn a_way_on_which_nobody_says_a_word_is_left_for_the_next() {
    const { assert!(limits::LOGIN_GRACE.as_secs() + limits::TLS_TIMEOUT.as_secs() < PATIENCE.as_secs()) };
    let silent = listen(async |mut stream: TcpStream| {
        // Takes all that comes, until the other side gives up.
        drop(tokio::io::copy(&mut stream, &mut tokio::io::sink()).await);
    })
    .await;
    let target = echo().await;
    for way in ["ssh", "tls"] {
        let plan =
            Site::plan().allow(target).door(target).gateways(&format!("[[\"{way}://{silent}\", \"ssh://{{}}\"]]"));
        let mut site = plan.start().await;
        let line = site.program(Side::Agent).says("not linked: ").await;
        assert!(line.contains(&format!("; trying ssh://{} next", site.address)), "{line}");
        assert!(line.contains(&format!("{way}://{silent}")), "{line}");
        echoes(connect(site.doors[0]).await, b"by the way that answers").await;
        site.stop().await;
    }
}

/// A balancer that runs for one test.
struct Balancer {
    _program: Program,
    address: SocketAddr,
}

/// How long a balancer lets a connection idle, and how long nothing is said; longer than a keepalive in any case.
fn idle() -> (u64, u64) {
    if soaking() { (60, 150) } else { (30, 36) }
}

impl Balancer {
    /// haproxy, which passes TCP on and says whose it is; with `tls` it ends TLS.
    async fn haproxy(dir: &Path, gateway: SocketAddr, tls: bool) -> Self {
        let pem = ["tls.pem", "tls-key.pem"].map(|file| fs::read_to_string(dir.join(file)).expect("read")).concat();
        fs::write(dir.join("both.pem"), pem).expect("written");
        let secured = if tls { format!("ssl crt {}", dir.join("both.pem").display()) } else { String::new() };
        let idle = idle().0;
        Self::start("haproxy", dir, &["-db", "-f"], |port| {
            format!(
                "global\n  maxconn 100\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client {idle}s\n  \
                 timeout server {idle}s\nlisten gateway\n  bind 127.0.0.1:{port} {secured}\n  server one {gateway} \
                 send-proxy-v2\n"
            )
        })
        .await
    }

    /// nginx, which ends TLS and passes WebSocket on in clear.
    async fn nginx(dir: &Path, gateway: SocketAddr) -> Self {
        let idle = idle().0;
        let path = dir.display();
        // One process: a worker would outlive its master, which is killed with the test.
        Self::start("nginx", dir, &["-e", "stderr", "-g", "daemon off; master_process off;", "-c"], |port| {
            format!(
                "pid {path}/nginx.pid;\nerror_log stderr;\nworker_processes 1;\nevents {{}}\nhttp {{\n  access_log off;\n  \
                 client_body_temp_path {path}/n1;\n  proxy_temp_path {path}/n2;\n  fastcgi_temp_path {path}/n3;\n  \
                 uwsgi_temp_path {path}/n4;\n  scgi_temp_path {path}/n5;\n  server {{\n    listen 127.0.0.1:{port} ssl;\n    \
                 ssl_certificate {path}/tls.pem;\n    ssl_certificate_key {path}/tls-key.pem;\n    location /caponier {{\n      \
                 proxy_pass http://{gateway};\n      proxy_http_version 1.1;\n      proxy_set_header Host $host;\n      \
                 proxy_set_header Upgrade $http_upgrade;\n      proxy_set_header Connection upgrade;\n      \
                 proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;\n      proxy_read_timeout {idle}s;\n      \
                 proxy_send_timeout {idle}s;\n    }}\n  }}\n}}\n"
            )
        })
        .await
    }

    async fn start(name: &str, dir: &Path, arguments: &[&str], config: impl Fn(u16) -> String) -> Self {
        // Neither can choose a port itself. Somebody may take the one that was free a moment ago: then another.
        for _ in 0..5 {
            let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
            let file = dir.join(format!("{name}-{}.conf", address.port()));
            fs::write(&file, config(address.port())).expect("written");
            let mut command = Command::new(name);
            command.args(arguments).arg(&file);
            let mut program = Program::start(name, command, &dir.join(format!("{name}-{}.log", address.port())));
            let up = eventually(name, async || {
                if TcpStream::connect(address).await.is_ok() {
                    return Some(true);
                }
                program.has_ended().then_some(false)
            })
            .await;
            if up && !program.has_ended() {
                return Self { _program: program, address };
            }
            let log = program.log();
            assert!(log.contains("in use") || log.contains("cannot bind"), "{name} ended: {log}");
        }
        panic!("no port for {name}");
    }
}

/// Nothing is said for longer than each balancer lets a connection idle, and a forward stands open meanwhile.
#[tokio::test]
async fn links_outlive_the_idle_limits_of_balancers() {
    let target = echo().await;
    let behind = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let plan = Site::plan().allow(target).door(target);
    certify(plan.path(), &Authority::new("caponier's tests"));
    let listener = format!("[[listener]]\naddress = \"{behind}\"\nproxy_protocol_from = [\"127.0.0.1/32\"]");
    let plan = plan.gateway_table(&listener).agent_setting("tls_ca_file = \"ca.pem\"");
    let bare = Balancer::haproxy(plan.path(), behind, false).await;
    let ending = Balancer::haproxy(plan.path(), behind, true).await;
    // The gateway first: nginx is told where it is.
    let mut site = plan.start_gateway().await;
    let passing = Balancer::nginx(site.path(), site.address).await;
    let ways = [("ssh", bare.address), ("tls", ending.address), ("wss", passing.address)];
    let urls: Vec<_> = ways.iter().map(|(transport, address)| format!("\"{transport}://{address}\"")).collect();
    site.change_gateways(&format!("[{}]", urls.join(", ")));
    site.restart_agent().await;
    for (transport, address) in ways {
        site.record(Side::Agent, json!({"event": "link.up", "detail": format!("{transport}://{address}")})).await;
    }
    // As many as there are links, so that each has some.
    let mut open = Vec::new();
    for _ in 0..6 {
        let mut stream = connect(site.doors[0]).await;
        echoes(&mut stream, b"before").await;
        open.push(stream);
    }
    // What is waited for is that nothing happens.
    let (limit, quiet) = idle();
    assert!(quiet > limit);
    sleep(Duration::from_secs(quiet)).await;
    for stream in &mut open {
        echoes(stream, b"still").await;
    }
    for side in [Side::Gateway, Side::Agent] {
        assert_eq!(site.records(side, &json!({"event": "link.up"})).len(), ways.len(), "{side:?}");
        assert_eq!(site.records(side, &json!({"event": "link.down"})).len(), 0, "{side:?}");
    }
    drop(open);
    site.stop().await;
}

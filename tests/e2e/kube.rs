//! kubectl through the tunnel, to an API server that only the agent reaches: it and the agent are in a network of their own,
//! out of which nothing leads but the agent's link. The API server is a stand-in, or a real one: see [`cluster`].
//!
//! That link and the client's session go over relays that keep every byte ([`Wire`]): the secrets of the two ends, which are
//! what kubectl and the API server say inside their own TLS, must never stand there.

mod cluster;
mod wire;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use caponier::identity::PrivateKey;
use caponier::limits;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use self::cluster::{Cluster, HOST, PLAIN_PORT, PORT, TOKEN, User, upgrades_over_socks};
use self::wire::Wire;
use crate::harness::{
    AGENT, Plan, Program, Said, Side, Site, caponier, connect, echoes, eventually, free_port, listen_on, run, within,
};

/// What is in a config map, and nobody's business between the two ends.
const SECRET: &str = "a-secret-that-only-the-two-ends-may-see";

/// How kubectl gets to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `ssh -D`.
    Ssh,
    /// `caponier forward --socks`.
    Socks,
    /// `caponier forward --http-proxy`.
    HttpProxy,
    /// The same, with what `caponier kubeconfig` writes.
    Kubeconfig,
}

impl Way {
    const ALL: [Self; 4] = [Self::Ssh, Self::Socks, Self::HttpProxy, Self::Kubeconfig];

    /// The form of the proxy's URL.
    fn scheme(self) -> &'static str {
        match self {
            Self::Ssh | Self::Socks => "socks5",
            Self::HttpProxy | Self::Kubeconfig => "http",
        }
    }
}

/// A cluster, and a site whose agent reaches it.
struct World {
    // Dropped in this order.
    site: Site,
    cluster: Cluster,
    /// Between the agent and its gateway, and between clients and the gateway.
    link: Wire,
    client: Wire,
}

impl World {
    async fn start(name: &str, plan: impl FnOnce(Plan) -> Plan) -> Self {
        let cluster = Cluster::start(name).await;
        let rule = format!(
            "name = \"cluster\"\nhosts = [\"{HOST}\"]\nwithin = [\"127.0.0.0/8\"]\nports = [{PORT}, {PLAIN_PORT}]"
        );
        let plan = plan(Site::plan().agent_network(cluster.network.name()).rule(&rule));
        let mut site = plan.start_gateway().await;
        // For the agent the gateway is at the same address, which is the relay's in its network.
        let link = Wire::relay(cluster.listen(site.address), site.address);
        let client = Wire::before(site.address);
        site.restart_agent().await;
        site.linked().await;
        Self { site, cluster, link, client }
    }

    /// Opens a way; what kubectl's `proxy-url` has to be.
    async fn open(&self, way: Way) -> (Program, String) {
        let address = format!("127.0.0.1:{}", free_port());
        let program = match way {
            Way::Ssh => {
                let alias = format!("HostKeyAlias=[{}]:{}", self.site.address.ip(), self.site.address.port());
                let relay = self.client.address.port().to_string();
                let ssh = self.site.ssh(&["-v", "-N", "-p", &relay, "-o", &alias, "-D", &address]);
                let mut ssh = self.site.background("ssh-D", ssh);
                ssh.says("Entering interactive session").await;
                ssh
            }
            Way::Socks => self.forward("--socks", &address).await,
            Way::HttpProxy | Way::Kubeconfig => self.forward("--http-proxy", &address).await,
        };
        (program, format!("{}://{address}", way.scheme()))
    }

    async fn forward(&self, option: &str, address: &str) -> Program {
        let host_key = PrivateKey::read(&self.site.key("gateway")).expect("a key").public().fingerprint();
        let mut command = caponier();
        command.args(["forward", "--agent", AGENT, "--gateway", &format!("ssh://{}", self.client.address)]);
        command.arg("--identity").arg(self.site.key("provisioner")).args([option, address]);
        command.args(["--host-key-fingerprint", &host_key.to_string()]);
        let mut forward = self.site.background(&format!("forward{option}"), command);
        forward.says("ready").await;
        forward
    }

    /// A configuration for the API server by way of a proxy, with a CA to trust.
    async fn configure(&self, way: Way, proxy: &str, authority: &str) -> PathBuf {
        let server = format!("https://{HOST}:{PORT}");
        if way != Way::Kubeconfig {
            return self.cluster.configure("config", &server, Some(proxy), authority, User::Token);
        }
        let file = self.cluster.path(&format!("written-{authority}"));
        let mut command = caponier();
        command.args(["kubeconfig", AGENT, "--server", &server, "--proxy-url", proxy, "--set-current", "--kubeconfig"]);
        command.arg(&file).arg("--certificate-authority").arg(self.cluster.path(authority));
        command.arg("--token-file").arg(self.cluster.path("token"));
        run(&mut command).await.done();
        file
    }

    async fn kubectl(&self, config: &Path, arguments: &[&str]) -> Said {
        run(&mut self.cluster.kubectl(config, arguments)).await
    }

    /// kubectl, with so much on its standard input.
    async fn kubectl_with_input(&self, config: &Path, arguments: &[&str], input: &str) -> Said {
        let mut command = self.cluster.kubectl(config, arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("kubectl runs");
        let mut stdin = child.stdin.take().expect("its input");
        let giving = async {
            // It may have failed before it has read everything, and says why.
            drop(stdin.write_all(input.as_bytes()).await);
            drop(stdin);
        };
        let (output, ()) = within("the end of kubectl", async { tokio::join!(child.wait_with_output(), giving) }).await;
        let output = output.expect("its output");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Said { status: output.status, stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    /// Makes the config map, or changes it. The stand-in has no schema to validate against.
    async fn apply(&self, config: &Path, sky: &str) -> String {
        let map = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "colours"},
            "data": {"sky": sky, "secret": SECRET},
        });
        let arguments = ["apply", "--validate=false", "-f", "-"];
        self.kubectl_with_input(config, &arguments, &map.to_string()).await.done()
    }

    /// Nothing that the two ends say to each other was seen on the way.
    fn assert_ciphertext(&self) {
        for (leg, wire) in [("client to gateway", &self.client), ("agent to gateway", &self.link)] {
            assert!(wire.carried(4096), "{leg}: nothing went over it");
            for text in [TOKEN, SECRET, HOST, "HTTP/1.1", "configmaps"] {
                assert!(!wire.shows(text), "{leg}: {text}");
            }
        }
    }

    /// No forward failed or was refused, on either side.
    fn assert_orderly(&self) {
        for side in [Side::Gateway, Side::Agent] {
            for event in ["forward.failed", "forward.denied", "forward.abandoned", "peer.violation"] {
                let found = self.site.records(side, &json!({"event": event}));
                assert!(found.is_empty(), "{side:?}: {found:#?}");
            }
        }
    }

    async fn stop(self) {
        self.site.stop().await;
    }
}

/// What kubectl can do, all of it.
async fn walk(way: Way) {
    let name = format!("walk-{way:?}").to_lowercase();
    let world = World::start(&name, |plan| plan).await;
    let (cluster, (tunnel, proxy)) = (&world.cluster, world.open(way).await);
    let config = world.configure(way, &proxy, "ca.pem").await;
    let config = config.as_path();

    let version = world.kubectl(config, &["version"]).await.done();
    assert!(version.contains("Server Version: "), "{version}");
    assert_eq!(world.apply(config, "blue").await, "configmap/colours created\n");
    assert_eq!(world.apply(config, "grey").await, "configmap/colours configured\n");
    let sky = ["-o", "jsonpath={.metadata.name}={.data.sky}{\"\\n\"}"];
    let got = world.kubectl(config, &[&["get", "configmap", "colours"], &sky[..]].concat()).await.done();
    assert_eq!(got, "colours=grey\n");
    assert!(world.kubectl(config, &["get", "pods"]).await.done().contains("web"));

    let mut watch = cluster.watching("get-w", config, &[&["get", "configmaps", "-w"], &sky[..]].concat());
    watch.says("colours=grey").await;
    world.apply(config, "red").await;
    watch.says("colours=red").await;
    drop(watch);

    cluster.log("the first line");
    let mut logs = cluster.watching("logs-f", config, &["logs", "-f", "web"]);
    logs.says("the first line").await;
    for number in 2..5 {
        cluster.log(&format!("line {number}"));
        logs.says(&format!("line {number}")).await;
    }
    drop(logs);

    if way.scheme() == "socks5" && !upgrades_over_socks().await {
        // kubectl takes every proxy for one of HTTP here: it fails, and it alone.
        assert_ne!(world.kubectl(config, &["exec", "web", "--", "true"]).await.code(), 0);
    } else {
        exec(&world, config).await;
        port_forward(&world, config).await;
    }
    let deleted = world.kubectl(config, &["delete", "configmap", "colours"]).await.done();
    assert!(deleted.starts_with("configmap \"colours\" deleted"), "{deleted}");

    // With a certificate in place of the token. It is for the API server, to which it is an end.
    let server = format!("https://{HOST}:{PORT}");
    let config = cluster.configure("certificate", &server, Some(&proxy), "ca.pem", User::Certificate);
    assert!(world.kubectl(&config, &["get", "pods"]).await.done().contains("web"));
    for user in ["token", "admin"] {
        assert!(cluster.was_asked(user, "/api/v1/namespaces/default/pods"), "{user}");
    }

    let opened = world.site.record(Side::Agent, json!({"event": "forward.open"})).await;
    assert_eq!((&opened["target"], &opened["rule"]), (&json!(format!("{HOST}:{PORT}")), &json!("cluster")));
    world.assert_orderly();
    drop(tunnel);
    world.assert_ciphertext();
    world.stop().await;
}

/// Commands in the pod: what they say on either stream, their end, and what they are given.
async fn exec(world: &World, config: &Path) {
    let script = "echo to stdout; echo to stderr >&2; exit 3";
    let said = world.kubectl(config, &["exec", "web", "--", "sh", "-c", script]).await;
    assert_eq!((said.code(), said.stdout.as_str()), (3, "to stdout\n"), "{said:?}");
    assert!(said.stderr.starts_with("to stderr\n"), "{said:?}");
    let text = format!("{SECRET}\n").repeat(2000);
    let said = world.kubectl_with_input(config, &["exec", "-i", "web", "--", "cat"], &text).await;
    assert!(said.done() == text, "what came back is something else");
}

/// A port of the pod; several connections at once.
async fn port_forward(world: &World, config: &Path) {
    let target = listen_on(world.cluster.listen(SocketAddr::from(([127, 0, 0, 1], 0))), async |mut stream| {
        let (mut read, mut write) = stream.split();
        drop(tokio::io::copy(&mut read, &mut write).await);
    });
    let ports = format!(":{}", target.port());
    let mut forward = world.cluster.watching("port-forward", config, &["port-forward", "pod/web", &ports]);
    let line = forward.says("Forwarding from 127.0.0.1:").await;
    let address = line.trim_start_matches("Forwarding from ").split(' ').next().expect("an address");
    let address: SocketAddr = address.parse().unwrap_or_else(|error| panic!("{line}: {error}"));
    let bytes = SECRET.as_bytes().repeat(1000);
    let [one, two] = [connect(address).await, connect(address).await];
    tokio::join!(echoes(one, &bytes), echoes(two, &bytes));
}

#[tokio::test]
async fn kubectl_works_through_stock_ssh() {
    walk(Way::Ssh).await;
}

#[tokio::test]
async fn kubectl_works_through_a_socks_proxy_of_ours() {
    walk(Way::Socks).await;
}

#[tokio::test]
async fn kubectl_works_through_an_http_proxy_of_ours() {
    walk(Way::HttpProxy).await;
}

#[tokio::test]
async fn kubectl_works_with_the_configuration_that_we_write() {
    walk(Way::Kubeconfig).await;
}

#[tokio::test]
async fn a_wrong_cluster_ca_fails_in_kubectl_and_not_in_us() {
    let world = World::start("ca", |plan| plan).await;
    for way in Way::ALL {
        let (tunnel, proxy) = world.open(way).await;
        let config = world.configure(way, &proxy, "other-ca.pem").await;
        let said = world.kubectl(&config, &["get", "pods"]).await;
        assert_ne!(said.code(), 0);
        assert!(said.stderr.contains("x509: certificate signed by unknown authority"), "{way:?}: {said:?}");
        drop(tunnel);
    }
    // The API server has heard of nothing; for us these were forwards as all others.
    assert!(!world.cluster.was_asked("token", "/"));
    let open = world.site.records(Side::Agent, &json!({"event": "forward.open"})).len();
    assert!(open > 0);
    for side in [Side::Gateway, Side::Agent] {
        eventually("the ends of the forwards", async || {
            let ended = world.site.records(side, &json!({"event": "forward.ended"}));
            (ended.len() == open).then_some(())
        })
        .await;
    }
    world.assert_orderly();
    world.stop().await;
}

/// The records would tell: where kubectl says in clear what it says, they have it. That is before the tunnel alone.
#[tokio::test]
async fn what_kubectl_says_in_clear_is_seen_on_its_leg_and_not_in_the_tunnel() {
    let world = World::start("clear", |plan| plan.door(format!("{HOST}:{PLAIN_PORT}"))).await;
    let local = Wire::before(world.site.doors[0]);
    let server = format!("http://{}", local.address);
    let config = world.cluster.configure("plain", &server, None, "ca.pem", User::Token);
    // As a value, because kubectl says no token of its own in clear.
    assert_eq!(world.apply(&config, TOKEN).await, "configmap/colours created\n");
    for text in [TOKEN, SECRET, "HTTP/1.1", "configmaps"] {
        assert!(local.shows(text), "{text}");
        assert!(!world.link.shows(text), "{text}");
    }
    assert!(world.link.carried(4096));
    world.stop().await;
}

#[tokio::test]
async fn a_watch_that_is_idle_for_longer_than_a_link_may_be_silent_gets_its_next_event() {
    let world = World::start("idle", |plan| plan).await;
    let (_tunnel, proxy) = world.open(Way::Ssh).await;
    let config = world.configure(Way::Ssh, &proxy, "ca.pem").await;
    world.apply(&config, "blue").await;
    let arguments = ["get", "configmaps", "-w", "-o", "jsonpath={.metadata.name}={.data.sky}{\"\\n\"}"];
    let mut watch = world.cluster.watching("get-w", &config, &arguments);
    watch.says("colours=blue").await;
    // This time is what the test is about: a link from which nothing comes would be cut in it.
    tokio::time::sleep(limits::LINK_KEEPALIVE * 2 + limits::LINK_KEEPALIVE / 2).await;
    world.apply(&config, "red").await;
    watch.says("colours=red").await;
    let ups = world.site.records(Side::Gateway, &json!({"event": "link.up"}));
    assert_eq!(ups.len(), 1, "{ups:#?}");
    drop(watch);
    world.assert_orderly();
    world.stop().await;
}

#[tokio::test]
async fn logs_of_an_agent_that_drains_go_on_to_the_deadline_and_kubectl_says_that_they_were_cut() {
    let mut world = World::start("drain", |plan| plan.drain(Side::Agent, 8)).await;
    let (_tunnel, proxy) = world.open(Way::Ssh).await;
    let config = world.configure(Way::Ssh, &proxy, "ca.pem").await;
    world.cluster.log("before");
    let mut logs = world.cluster.watching("logs-f", &config, &["logs", "-f", "web"]);
    logs.says("before").await;
    world.site.program(Side::Agent).signal("TERM");
    world.site.program(Side::Agent).says("draining: ").await;
    world.cluster.log("while it drains");
    logs.says("while it drains").await;
    let code = logs.ended().await.code();
    let log = logs.log();
    assert!(code == Some(1) && log.to_lowercase().contains("error"), "{code:?}: {log}");
    world.site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "agent_drained"})).await;
    assert_eq!(world.site.program(Side::Agent).ended().await.code(), Some(1));
    // With the log's connection those that kubectl keeps for its next request.
    let cut = world.site.records(Side::Agent, &json!({"event": "forward.ended", "reason": "drained"}));
    assert!(!cut.is_empty());
    assert_eq!(world.site.program(Side::Gateway).stop().await, Some(0));
}

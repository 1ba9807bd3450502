//! A real kube-apiserver, with a node whose kubelet is the stand-in.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::{Cluster, HOST, PORT, TOKEN, User};
use crate::harness::{eventually, run};

/// Where the kubelet listens, in the cluster's network.
const KUBELET_PORT: u16 = 10_250;

/// Every request of whoever it is, without what it holds.
const AUDIT: &str =
    "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata}]\n";

/// Starts etcd, the API server from `bin`, and the kubelet, and makes the pod.
pub(super) async fn start(cluster: &mut Cluster, bin: &Path) {
    fs::write(cluster.path("tokens.csv"), format!("{TOKEN},token,1,\"system:masters\"\n")).expect("written");
    fs::write(cluster.path("audit.yaml"), AUDIT).expect("written");
    cluster.stand_in("kubelet", KUBELET_PORT, &[]).await;

    let mut etcd = cluster.inside("etcd");
    etcd.arg("--data-dir").arg(cluster.path("etcd")).arg("--unsafe-no-fsync");
    let (clients, peers) = ("http://127.0.0.1:2379", "http://127.0.0.1:2380");
    etcd.args(["--listen-client-urls", clients, "--advertise-client-urls", clients, "--listen-peer-urls", peers]);
    cluster.launch("etcd", etcd).says("ready to serve client requests").await;

    let mut server = cluster.inside(bin.join("kube-apiserver"));
    server
        .arg(format!("--etcd-servers={clients}"))
        .args(["--bind-address=127.0.0.1", &format!("--secure-port={PORT}")]);
    // An address for documentation: it has to have one that is not loopback, which nobody dials here.
    server.args(["--advertise-address=192.0.2.1", "--endpoint-reconciler-type=none"]);
    server.args(["--service-cluster-ip-range=10.96.0.0/24", "--authorization-mode=RBAC"]);
    // There is no controller that would make the account which every pod has otherwise.
    server.arg("--disable-admission-plugins=ServiceAccount");
    server.args([&format!("--service-account-issuer=https://{HOST}"), "--kubelet-preferred-address-types=Hostname"]);
    for (option, file) in [
        ("tls-cert-file", "server.pem"),
        ("tls-private-key-file", "server.key"),
        ("service-account-key-file", "server.pem"),
        ("service-account-signing-key-file", "server.key"),
        ("client-ca-file", "ca.pem"),
        ("token-auth-file", "tokens.csv"),
        ("kubelet-certificate-authority", "ca.pem"),
        ("kubelet-client-certificate", "admin.pem"),
        ("kubelet-client-key", "admin.key"),
        ("audit-policy-file", "audit.yaml"),
        ("audit-log-path", "audit.log"),
    ] {
        server.arg(format!("--{option}={}", cluster.path(file).display()));
    }
    server.current_dir(cluster.folder.path());
    cluster.launch("kube-apiserver", server);
    populate(cluster).await;
}

/// The node and the pod on it, which nobody schedules and nobody runs: they are as they are said to be.
async fn populate(cluster: &Cluster) {
    let config = cluster.configure("inside", &format!("https://{HOST}:{PORT}"), None, "ca.pem", User::Certificate);
    let kubectl = async |arguments: &[&str]| {
        let outside = cluster.kubectl(&config, arguments);
        let mut command = cluster.inside(outside.as_std().get_program());
        command.args(arguments).env("KUBECONFIG", &config).env("HOME", cluster.folder.path());
        run(&mut command).await
    };
    eventually("the API server", async || kubectl(&["get", "--raw", "/readyz"]).await.status.success().then_some(()))
        .await;
    let items = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node"}},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "default"},
         "spec": {"nodeName": "node", "containers": [{"name": "web", "image": "web"}]}},
    ]});
    fs::write(cluster.path("items.json"), items.to_string()).expect("written");
    kubectl(&["create", "-f", &cluster.path("items.json").display().to_string()]).await.done();
    let node = json!({"status": {
        "addresses": [{"type": "Hostname", "address": HOST}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": KUBELET_PORT}},
    }});
    let pod = json!({"status": {"phase": "Running", "containerStatuses": [{
        "name": "web", "image": "web", "imageID": "", "ready": true, "restartCount": 0,
        "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
    }]}});
    for (kind, name, patch) in [("node", "node", node), ("pod", "web", pod)] {
        kubectl(&["patch", kind, name, "--subresource=status", "-p", &patch.to_string()]).await.done();
    }
}

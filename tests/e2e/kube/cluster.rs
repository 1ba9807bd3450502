//! A cluster of one pod in a network of its own, into which nothing leads but what a test lets in; and kubectl, outside, with
//! configurations for it.
//!
//! Its API server is a stand-in, `kube.py`. With CAPONIER_KUBERNETES, as `scripts/soak kubernetes` sets it, it is the
//! kube-apiserver in that folder, with Debian's etcd; then `kube.py` is the node's kubelet.

mod real;

use std::ffi::OsStr;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use crate::harness::{Program, run};
use crate::links::Network;

/// The API server's name, which nobody outside can look up, and its ports, which are free in a network of its own.
pub(crate) const HOST: &str = "api.internal";
pub(crate) const PORT: u16 = 6443;
pub(crate) const PLAIN_PORT: u16 = 8080;

/// What opens the API server to whoever says it.
pub(crate) const TOKEN: &str = "a-bearer-token-that-only-the-two-ends-may-see";

/// Debian's own Python, whatever else is called so.
const PYTHON: &str = "/usr/bin/python3";

/// Who a configuration says that its user is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum User {
    Token,
    Certificate,
}

/// A running cluster.
pub(crate) struct Cluster {
    // Dropped in this order: the programs end before their network and their folder go.
    programs: Vec<Program>,
    pub(crate) network: Network,
    folder: TempDir,
    is_real: bool,
}

impl Cluster {
    /// Needs root, for the network.
    pub(crate) async fn start(name: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("caponier-kube-").tempdir().expect("a folder");
        let path = folder.path();
        certify(path);
        fs::write(path.join("token"), TOKEN).expect("a token");
        fs::write(path.join("web.log"), "").expect("a log");
        let network = Network::make(name);
        network.write_hosts(&format!("127.0.0.1 localhost {HOST}\n"));
        let real = std::env::var_os("CAPONIER_KUBERNETES").map(PathBuf::from);
        let mut cluster = Self { programs: Vec::new(), network, folder, is_real: real.is_some() };
        cluster.stand_in("plain", PLAIN_PORT, &["plain"]).await;
        match real {
            Some(bin) => real::start(&mut cluster, &bin).await,
            None => cluster.stand_in("api-server", PORT, &[]).await,
        }
        cluster
    }

    /// Starts `kube.py`.
    async fn stand_in(&mut self, name: &str, port: u16, how: &[&str]) {
        let mut command = self.inside(PYTHON);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/kube.py")).arg(self.folder.path());
        command.arg(format!("127.0.0.1:{port}")).args(how);
        self.launch(name, command).says("API server listening").await;
    }

    fn launch(&mut self, name: &str, command: Command) -> &mut Program {
        let log = self.path(&format!("{name}.log"));
        self.programs.push(Program::start(name, command, &log));
        self.programs.last_mut().expect("it was put there")
    }

    /// A program in the cluster's network.
    fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.network.name()]).arg(program);
        command
    }

    /// Whether this user has asked the API server for something that begins with this path.
    pub(crate) fn was_asked(&self, user: &str, path: &str) -> bool {
        if self.is_real {
            let log = fs::read_to_string(self.path("audit.log")).expect("the audit log");
            let mut records = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            return records.any(|it| {
                it["user"]["username"] == user && it["requestURI"].as_str().is_some_and(|uri| uri.starts_with(path))
            });
        }
        let log = self.programs.last().expect("the API server").log();
        log.lines().any(|line| {
            let mut words = line.split(' ');
            words.next() == Some(user) && words.nth(1).is_some_and(|asked| asked.starts_with(path))
        })
    }

    /// Appends to the log of the pod.
    pub(crate) fn log(&self, line: &str) {
        let file = fs::OpenOptions::new().append(true).open(self.path("web.log"));
        std::io::Write::write_all(&mut file.expect("the log"), format!("{line}\n").as_bytes()).expect("written");
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a configuration of kubectl; `proxy` is its `proxy-url`, and `authority` the file of the CA to trust.
    pub(crate) fn configure(
        &self,
        name: &str,
        server: &str,
        proxy: Option<&str>,
        authority: &str,
        user: User,
    ) -> PathBuf {
        let mut cluster = json!({"server": server});
        if server.starts_with("https:") {
            cluster["certificate-authority"] = json!(self.path(authority));
        }
        if let Some(proxy) = proxy {
            cluster["proxy-url"] = json!(proxy);
        }
        let user = match user {
            User::Token => json!({"token": TOKEN}),
            User::Certificate => {
                json!({"client-certificate": self.path("admin.pem"), "client-key": self.path("admin.key")})
            }
        };
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": cluster}],
            "users": [{"name": "it", "user": user}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        });
        let path = self.path(name);
        fs::write(&path, config.to_string()).expect("a configuration");
        path
    }

    /// kubectl with a configuration, and nothing from this process' environment but the PATH.
    pub(crate) fn kubectl(&self, config: &Path, arguments: &[&str]) -> Command {
        let mut command = kubectl();
        command.env("HOME", self.folder.path()).env("KUBECONFIG", config).args(arguments);
        command
    }

    /// Starts kubectl in the background.
    pub(crate) fn watching(&self, name: &str, config: &Path, arguments: &[&str]) -> Program {
        Program::start(name, self.kubectl(config, arguments), &self.path(&format!("{name}.said")))
    }

    /// A listener that only the network reaches.
    pub(crate) fn listen(&self, address: SocketAddr) -> TcpListener {
        self.network.run(move || TcpListener::bind(address).unwrap_or_else(|error| panic!("{address}: {error}")))
    }
}

/// The kubectl that `scripts/test` has found or installed.
fn kubectl() -> Command {
    let mut command = Command::new(std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into()));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

/// Whether this kubectl can do `exec` and `port-forward` over SOCKS: all from 1.24 on can. Debian 12 has 1.20.
pub(crate) async fn upgrades_over_socks() -> bool {
    let said = run(kubectl().args(["version", "--client", "-o", "json"])).await.done();
    let version: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let version = version["clientVersion"]["gitVersion"].as_str().expect("a version");
    let minor = version.split('.').nth(1).unwrap_or_else(|| panic!("{version}"));
    minor.parse::<u32>().expect("a number") >= 24
}

/// A CA with a certificate of the server and one of a user, and a CA that has nothing to do with them.
fn certify(folder: &Path) {
    let authority = |name: &str| {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = params.self_signed(&key).expect("a certificate");
        fs::write(folder.join(format!("{name}.pem")), certificate.pem()).expect("written");
        rcgen::Issuer::new(params, key)
    };
    let issuer = authority("ca");
    authority("other-ca");
    for (file, common_name, names) in [("server", "apiserver", vec![HOST.to_owned()]), ("admin", "admin", Vec::new())] {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(names).expect("parameters");
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, common_name);
        // The group that may do everything.
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:masters");
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        fs::write(folder.join(format!("{file}.pem")), certificate.pem()).expect("written");
        fs::write(folder.join(format!("{file}.key")), key.serialize_pem()).expect("written");
    }
}

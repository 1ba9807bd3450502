//! Real proxies for tests: squid in clear and within TLS, a SOCKS5 server, and an authority for their certificates.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::harness::{Program, eventually, free_port, run};

/// Whom those know that want a password.
pub(crate) const USER: &str = "agent-user";

/// What squid wants.
pub(crate) const PASSWORD: &str = "pass:word/of@the%agent";

/// What the SOCKS5 server wants.
pub(crate) const SOCKS_PASSWORD: &str = "socks:word/of@the%agent";

/// A squid that runs for one test.
pub(crate) struct Squid {
    // Dropped in this order: the program ends before its folder goes.
    _program: Program,
    dir: TempDir,
    pub(crate) address: SocketAddr,
    scheme: &'static str,
}

impl Squid {
    /// One that serves everybody, for CONNECT alone.
    pub(crate) async fn open() -> Self {
        Self::start("http_access allow CONNECT", None).await
    }

    /// One that wants [`USER`] and [`PASSWORD`].
    pub(crate) async fn with_password() -> Self {
        Self::start(PASSWORDS, None).await
    }

    /// One that serves nobody.
    pub(crate) async fn closed() -> Self {
        Self::start("", None).await
    }

    /// As [`Squid::open`], within TLS, with a certificate of this authority for these names.
    pub(crate) async fn open_within_tls(authority: &Authority, names: &[&str]) -> Self {
        Self::start("http_access allow CONNECT", Some((authority, names))).await
    }

    /// As [`Squid::with_password`], within TLS, with a certificate of this authority for 127.0.0.1 and localhost.
    pub(crate) async fn with_password_within_tls(authority: &Authority) -> Self {
        Self::start(PASSWORDS, Some((authority, &["127.0.0.1", "localhost"]))).await
    }

    async fn start(access: &str, tls: Option<(&Authority, &[&str])>) -> Self {
        let dir = tempfile::Builder::new().prefix("caponier-squid-").tempdir().expect("a folder");
        let path = dir.path().display().to_string();
        let hashed = run(Command::new("openssl").args(["passwd", "-apr1", PASSWORD])).await.done();
        fs::write(dir.path().join("passwords"), format!("{USER}:{hashed}")).expect("written");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("permissions");
        let (scheme, line, options) = match tls {
            Some((authority, names)) => {
                let (chain, key) = authority.certify(names);
                fs::write(dir.path().join("chain.pem"), chain).expect("written");
                fs::write(dir.path().join("key.pem"), key).expect("written");
                ("https", "https_port", format!(" tls-cert={path}/chain.pem tls-key={path}/key.pem"))
            }
            None => ("http", "http_port", String::new()),
        };
        if rustix::process::geteuid().is_root() {
            // Squid leaves root for the user of Debian's package.
            run(Command::new("chown").arg("-R").arg("proxy:").arg(dir.path())).await.done();
        }
        let access = access.replace("{dir}", &path);
        // Squid cannot choose a port itself. Somebody may take the one that was free a moment ago: then another.
        for attempt in 0..5 {
            let port = free_port();
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            let config = format!(
                "{line} 127.0.0.1:{port}{options}\nacl CONNECT method CONNECT\n{access}\nhttp_access deny all\n\
                 pid_filename none\naccess_log stdio:{path}/access.log\ncache_log {path}/cache.log\ncache deny all\n\
                 cache_mem 1 MB\nmemory_cache_shared off\ncoredump_dir {path}\npinger_enable off\nnetdb_filename none\n\
                 shutdown_lifetime 0 seconds\nmax_filedescriptors 1024\nvisible_hostname squid.test\n"
            );
            let file = dir.path().join("squid.conf");
            fs::write(&file, config).expect("written");
            let mut command = Command::new("squid");
            command.arg("-N").args(["-n", &format!("caponier{port}")]).arg("-f").arg(file).current_dir("/");
            let mut program = Program::start("squid", command, &dir.path().join(format!("output.{attempt}")));
            let up = eventually("squid", async || {
                if TcpStream::connect(address).await.is_ok() {
                    return Some(true);
                }
                program.has_ended().then_some(false)
            })
            .await;
            if up && !program.has_ended() {
                return Self { _program: program, dir, address, scheme };
            }
            let log = fs::read_to_string(dir.path().join("cache.log")).unwrap_or_default() + &program.log();
            assert!(log.contains("Address already in use"), "squid ended: {log}");
        }
        panic!("no port for squid");
    }

    /// What it says about the connections that have ended.
    pub(crate) fn access(&self) -> String {
        fs::read_to_string(self.dir.path().join("access.log")).unwrap_or_default()
    }

    /// Where it is, as the agent wants it.
    pub(crate) fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// The same with a user and a password, which are percent-encoded.
    pub(crate) fn url_with(&self, user: &str, password: &str) -> String {
        format!("{}://{user}:{password}@{}", self.scheme, self.address)
    }

    pub(crate) fn setting(&self) -> String {
        format!("proxy = \"{}\"", self.url())
    }
}

const PASSWORDS: &str = "auth_param basic program /usr/lib/squid/basic_ncsa_auth {dir}/passwords\n\
     auth_param basic realm caponier\nacl known proxy_auth REQUIRED\nhttp_access allow CONNECT known";

/// A SOCKS5 server that runs for one test.
pub(crate) struct Socks {
    // Dropped in this order: the program ends before its folder goes.
    _program: Program,
    _dir: TempDir,
    pub(crate) address: SocketAddr,
}

impl Socks {
    /// One that serves everybody.
    pub(crate) async fn open() -> Self {
        Self::start(&[]).await
    }

    /// One that wants [`USER`] and [`SOCKS_PASSWORD`].
    pub(crate) async fn with_password() -> Self {
        Self::start(&["-u", USER, "-P", SOCKS_PASSWORD]).await
    }

    async fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("caponier-socks-").tempdir().expect("a folder");
        // It cannot choose a port itself. Somebody may take the one that was free a moment ago: then another.
        for attempt in 0..5 {
            let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
            let mut command = Command::new("microsocks");
            command.args(["-i", "127.0.0.1", "-p", &address.port().to_string()]).args(arguments);
            let mut program = Program::start("microsocks", command, &dir.path().join(format!("output.{attempt}")));
            let up = eventually("microsocks", async || {
                if program.has_ended() {
                    return Some(false);
                }
                TcpStream::connect(address).await.is_ok().then_some(true)
            })
            .await;
            if up && !program.has_ended() {
                return Self { _program: program, _dir: dir, address };
            }
        }
        panic!("no port for microsocks");
    }
}

/// A certificate authority of a test.
pub(crate) struct Authority(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().expect("a key");
        Self(rcgen::CertifiedIssuer::self_signed(params, key).expect("a certificate"))
    }

    /// Its own certificate.
    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// Its own certificate in a file.
    pub(crate) fn write(&self, file: &Path) {
        fs::write(file, self.pem()).expect("written");
    }

    /// A certificate for these DNS names and addresses, and its key.
    pub(crate) fn certify(&self, names: &[&str]) -> (String, String) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).expect("parameters");
        params.distinguished_name.push(rcgen::DnType::CommonName, "a proxy");
        (params.signed_by(&key, &self.0).expect("a certificate").pem(), key.serialize_pem())
    }
}

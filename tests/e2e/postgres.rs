//! A real PostgreSQL server: its own data directory, TLS on, passwords (SCRAM) over TLS only, trust on its Unix socket.
//!
//! Servers of several versions can be tested: `CAPONIER_TEST_POSTGRES_BIN_DIRS` lists their `bin` directories, separated
//! by `:`; without it, Debian's newest is used.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio_postgres::NoTls;

use crate::harness::{PATIENCE, free_port};

/// The superuser's password.
pub(crate) const SUPERUSER_PASSWORD: &str = "super-secret-of-the-test";

/// A running server; it is stopped, and its data removed, when this is dropped.
pub(crate) struct Postgres {
    // Dropped in this order: the server ends before its data goes.
    _server: Server,
    directory: TempDir,
    /// Where it listens, on loopback.
    pub(crate) address: SocketAddr,
}

struct Server(Child);

impl Postgres {
    /// Starts a server from the first of [`bin_directories`], with a certificate for `name`.
    pub(crate) async fn start(name: &str) -> Self {
        Self::start_from(&bin_directories()[0], name).await
    }

    /// Starts a server from `bin`, with a certificate for `name` (and for nothing else).
    pub(crate) async fn start_from(bin: &Path, name: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("caponier-pg-").tempdir().expect("a directory");
        let root = directory.path();
        fs::set_permissions(root, fs::Permissions::from_mode(0o755)).expect("permissions");
        let data = root.join("data");
        fs::create_dir(&data).expect("data directory");
        give(&data);
        let password = root.join("password");
        fs::write(&password, SUPERUSER_PASSWORD).expect("password file");
        give(&password);
        let made = server_command(&bin.join("initdb"))
            .args(["--username=postgres", "--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8"])
            .args(["--no-sync", "--locale=C", "--pgdata"])
            .arg(&data)
            .arg(format!("--pwfile={}", password.display()))
            .current_dir(root)
            .output()
            .expect("initdb runs");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        certify(root, &data, name);
        let rules = "local all all trust\nhostssl all all all scram-sha-256\n";
        fs::write(data.join("pg_hba.conf"), rules).expect("pg_hba.conf");
        give(&data.join("pg_hba.conf"));
        // In the file, where a test can turn it off; what stands on the command line cannot be changed.
        let mut settings = fs::OpenOptions::new().append(true).open(data.join("postgresql.conf")).expect("settings");
        settings.write_all(b"ssl = on\n").expect("settings");

        // PostgreSQL cannot choose a port itself. Somebody may take the one that was free a moment ago: then another.
        for _ in 0..5 {
            let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
            let log = fs::File::create(root.join("log")).expect("log file");
            let child = server_command(&bin.join("postgres"))
                .arg("-D")
                .arg(&data)
                .args(["-c", "listen_addresses=127.0.0.1", "-c", &format!("port={}", address.port())])
                .args(["-c", "fsync=off", "-c", "password_encryption=scram-sha-256"])
                .args(["-c", "log_statement=all", "-c", "log_min_messages=info", "-c", "max_connections=50"])
                .args(["-c", &format!("unix_socket_directories={}", data.display())])
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("log file"))
                .stderr(log)
                .current_dir(root)
                .spawn()
                .expect("postgres runs");
            let mut server = Server(child);
            if server.wait_until_ready(root, address).await {
                return Self { _server: server, directory, address };
            }
        }
        panic!("no port for PostgreSQL");
    }

    /// The certificate authority of the server's certificate.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// What the server logged: every statement it was sent, among other things.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).expect("log")
    }

    /// A connection as the superuser over the Unix socket, where no password is asked for.
    pub(crate) async fn superuser(&self, database: &str) -> tokio_postgres::Client {
        local(self.directory.path(), self.address, database).await.expect("a connection")
    }

    /// Runs statements as the superuser.
    pub(crate) async fn run(&self, database: &str, statements: &[&str]) {
        let client = self.superuser(database).await;
        for statement in statements {
            client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        }
    }
}

impl Server {
    /// Whether it came up; if not, its port was taken.
    async fn wait_until_ready(&mut self, root: &Path, address: SocketAddr) -> bool {
        let log = || fs::read_to_string(root.join("log")).expect("log");
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.0.try_wait().expect("status").is_some() {
                assert!(log().contains("could not bind"), "PostgreSQL ended: {}", log());
                return false;
            }
            if local(root, address, "postgres").await.is_ok() {
                return true;
            }
            // The server has no event to wait for; it is asked until it answers, under the deadline above.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("PostgreSQL is not ready: {}", log());
    }
}

impl Drop for Server {
    /// SIGINT is PostgreSQL's fast shutdown: sessions are ended, and nothing is left behind.
    fn drop(&mut self) {
        let _ = Command::new("kill").arg("-INT").arg(self.0.id().to_string()).status();
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The `bin` directories to test with.
pub(crate) fn bin_directories() -> Vec<PathBuf> {
    if let Some(list) = std::env::var_os("CAPONIER_TEST_POSTGRES_BIN_DIRS") {
        return std::env::split_paths(&list).collect();
    }
    let versions = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed (apt-get install postgresql)");
    let mut versions: Vec<PathBuf> = versions.flatten().map(|entry| entry.path().join("bin")).collect();
    versions.retain(|bin| bin.join("postgres").exists());
    versions.sort();
    vec![versions.pop().expect("PostgreSQL is installed (apt-get install postgresql)")]
}

async fn local(
    root: &Path,
    address: SocketAddr,
    database: &str,
) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host_path(root.join("data")).port(address.port());
    config.user("postgres").dbname(database).connect_timeout(PATIENCE);
    let (client, connection) = config.connect(NoTls).await?;
    // It ends when the client is dropped.
    drop(caponier::task::Tasks::new().spawn(connection));
    Ok(client)
}

/// PostgreSQL refuses to run as root; then it runs as the user of Debian's package. `setpriv` replaces itself by the
/// command, so that the child's process id is the server's.
fn server_command(program: &Path) -> Command {
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program);
    command
}

fn give(path: &Path) {
    if rustix::process::geteuid().is_root() {
        let done = Command::new("chown").arg("postgres:postgres").arg(path).status().expect("chown runs");
        assert!(done.success(), "chown {}", path.display());
    }
}

fn certify(root: &Path, data: &Path, name: &str) {
    let ca_key = rcgen::KeyPair::generate().expect("key");
    let mut ca = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    ca.distinguished_name.push(rcgen::DnType::CommonName, "caponier test CA");
    let ca_certificate = ca.self_signed(&ca_key).expect("certificate");
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().expect("key");
    let params = rcgen::CertificateParams::new(vec![name.to_owned()]).expect("parameters");
    let certificate = params.signed_by(&key, &issuer).expect("certificate");
    fs::write(root.join("ca.pem"), ca_certificate.pem()).expect("ca.pem");
    fs::write(data.join("server.crt"), certificate.pem()).expect("server.crt");
    let mut file = fs::File::create(data.join("server.key")).expect("server.key");
    file.set_permissions(fs::Permissions::from_mode(0o600)).expect("permissions");
    file.write_all(key.serialize_pem().as_bytes()).expect("server.key");
    give(&data.join("server.crt"));
    give(&data.join("server.key"));
}

//! The agent's way out: a real squid, and proxies that misbehave.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use caponier::limits;
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::harness::{
    PATIENCE, Program, Side, Site, caponier, connect, echo, echoes, eventually, free_port, listen, run,
};

const USER: &str = "agent-user";
const PASSWORD: &str = "pass:word/of@the%agent";
const WRONG_PASSWORD: &str = "a-wrong-one-31337";

/// A squid that runs for one test.
struct Squid {
    // Dropped in this order: the program ends before its folder goes.
    _program: Program,
    dir: TempDir,
    address: SocketAddr,
}

impl Squid {
    /// One that serves everybody, for CONNECT alone.
    async fn open() -> Self {
        Self::start("http_access allow CONNECT").await
    }

    /// One that wants [`USER`] and [`PASSWORD`].
    async fn with_password() -> Self {
        Self::start(
            "auth_param basic program /usr/lib/squid/basic_ncsa_auth {dir}/passwords\n\
             auth_param basic realm caponier\nacl known proxy_auth REQUIRED\nhttp_access allow CONNECT known",
        )
        .await
    }

    /// One that serves nobody.
    async fn closed() -> Self {
        Self::start("").await
    }

    async fn start(access: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("caponier-squid-").tempdir().expect("a folder");
        let path = dir.path().display().to_string();
        let hashed = run(Command::new("openssl").args(["passwd", "-apr1", PASSWORD])).await.done();
        fs::write(dir.path().join("passwords"), format!("{USER}:{hashed}")).expect("written");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("permissions");
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
                "http_port 127.0.0.1:{port}\nacl CONNECT method CONNECT\n{access}\nhttp_access deny all\n\
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
                return Self { _program: program, dir, address };
            }
            let log = fs::read_to_string(dir.path().join("cache.log")).unwrap_or_default() + &program.log();
            assert!(log.contains("Address already in use"), "squid ended: {log}");
        }
        panic!("no port for squid");
    }

    /// What it says about the connections that have ended.
    fn access(&self) -> String {
        fs::read_to_string(self.dir.path().join("access.log")).unwrap_or_default()
    }

    fn setting(&self) -> String {
        format!("proxy = \"http://{}\"", self.address)
    }
}

/// `USER:PASSWORD` in a file as the agent wants it.
fn credentials(dir: &Path, password: &str) -> PathBuf {
    let file = dir.join("proxy-credentials");
    fs::write(&file, format!("{USER}:{password}\n")).expect("written");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("permissions");
    file
}

/// That no form of a password appears where others could read it.
async fn is_told_nowhere(site: &mut Site, password: &str) {
    let header = run(Command::new("sh").args(["-c", &format!("printf %s '{USER}:{password}' | base64 -w0")])).await;
    let percent = password.replace('%', "%25").replace('/', "%2F").replace('@', "%40").replace(':', "%3A");
    let forms = [password.to_owned(), percent, header.done()];
    let config = site.config(Side::Agent);
    let checked = run(caponier().arg("check").arg(&config)).await;
    assert_eq!(checked.code(), 0, "{checked:?}");
    let faulty = site.path().join("faulty.toml");
    let text = fs::read_to_string(&config).expect("the configuration").replace("id = \"prod-eu\"", "id = \"PROD\"");
    fs::write(&faulty, text).expect("written");
    let faulty = run(caponier().arg("check").arg(&faulty)).await;
    assert_eq!(faulty.code(), 2, "{faulty:?}");
    let agent = site.program(Side::Agent);
    let pid = agent.pid();
    let command_line = fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("a command line");
    let listed = run(Command::new("ps").args(["-o", "args", "-p", &pid.to_string()])).await.done();
    let log = agent.log();
    let trails = format!("{:?}{:?}", site.trail(Side::Agent), site.trail(Side::Gateway));
    let gateway = site.program(Side::Gateway).log();
    for form in forms {
        for place in [&checked.stdout, &checked.stderr, &faulty.stderr, &command_line, &listed, &log, &trails, &gateway]
        {
            assert!(!place.contains(&form), "{form} stands in {place}");
        }
    }
}

#[tokio::test]
async fn links_and_forwards_through_an_open_proxy_and_listens_nowhere() {
    let squid = Squid::open().await;
    let target = echo().await;
    let anywhere = format!("name = \"proxy\"\naddresses = [\"127.0.0.0/8\"]\nports = [{}]", squid.address.port());
    let mut site =
        Site::plan().allow(target).rule(&anywhere).door(target).agent_setting(&squid.setting()).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"through squid").await;

    let pid = format!("pid={},", site.program(Side::Agent).pid());
    let sockets = async |options: &str| -> Vec<String> {
        let listed = run(Command::new("ss").arg(options)).await.done();
        listed.lines().filter(|line| line.contains(&pid)).map(str::to_owned).collect()
    };
    assert_eq!(sockets("-Hlntup").await, Vec::<String>::new(), "the agent listens");
    let mut peers: Vec<String> =
        sockets("-Hntup").await.iter().map(|line| line.split_whitespace().nth(5).expect("a peer").to_owned()).collect();
    peers.sort();
    let mut expected = vec![squid.address.to_string(), target.to_string()];
    expected.sort();
    assert_eq!(peers, expected, "the agent speaks to the proxy and to the target, and to nobody else");

    // The proxy itself is no target, whatever the rules say.
    let said = run(&mut site.ssh(&["-W", &squid.address.to_string()])).await;
    assert_eq!(said.code(), 255, "{said:?}");
    site.record(Side::Agent, json!({"event": "forward.denied", "reason": "own_gateway"})).await;
    drop(stream);
    let gateway = site.address;
    site.stop().await;
    eventually("the proxy's record of the link", async || squid.access().contains("TCP_TUNNEL/200 ").then_some(()))
        .await;
    assert!(squid.access().contains(&format!("CONNECT {gateway} ")), "{}", squid.access());
}

#[tokio::test]
async fn shows_a_proxy_its_password_and_nobody_else() {
    let squid = Squid::with_password().await;
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target);
    let file = credentials(plan.path(), PASSWORD).display().to_string();
    let plan = plan.agent_setting(&squid.setting()).agent_setting(&format!("proxy_credentials_file = \"{file}\""));
    let mut site = plan.start().await;
    echoes(connect(site.doors[0]).await, b"with a password").await;
    is_told_nowhere(&mut site, PASSWORD).await;

    // The same from a URL, where special characters are percent-encoded.
    let url = format!("http://{USER}:pass%3Aword%2Fof%40the%25agent@{}", squid.address);
    site.change_agent(&format!("proxy = \"{url}\""), &[]);
    site.restart_agent().await;
    site.linked().await;
    is_told_nowhere(&mut site, PASSWORD).await;
    site.stop().await;
    eventually("two links in the proxy's log", async || {
        (squid.access().matches(&format!(" {USER} ")).count() == 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn says_with_which_status_a_proxy_refuses() {
    let (squid, closed) = (Squid::with_password().await, Squid::closed().await);
    let mut site = Site::plan().start_gateway().await;
    let file = credentials(site.path(), WRONG_PASSWORD).display().to_string();
    let wrong = format!("{}\nproxy_credentials_file = \"{file}\"", squid.setting());
    for (setting, words) in [
        (wrong, "status 407: it did not accept the credentials given"),
        (squid.setting(), "status 407: it asks for credentials, and none are configured"),
        (closed.setting(), "with status 403 Forbidden"),
    ] {
        site.change_agent(&setting, &[]);
        site.restart_agent().await;
        let line = site.program(Side::Agent).says("not linked").await;
        let proxy = if words.contains("403") { closed.address } else { squid.address };
        assert!(line.contains(words), "{line}");
        assert!(line.contains(&format!("proxy {proxy} ")) && line.contains(&site.address.to_string()), "{line}");
        is_told_nowhere(&mut site, WRONG_PASSWORD).await;
        assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    }
    assert!(squid.access().contains("TCP_DENIED/407"), "{}", squid.access());
}

#[tokio::test]
async fn names_the_stage_at_which_a_proxy_fails() {
    let broken: [(&'static [u8], &str); 4] = [
        (b"", "closed the connection, or it failed, before its reply to CONNECT"),
        (b"HTTP/1.1 200 Connection est", "closed the connection, or it failed, before its reply to CONNECT"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "with something that is not an HTTP reply"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "the peer closed the connection before it identified itself"),
    ];
    let mut site = Site::plan().start_gateway().await;
    for (reply, words) in broken {
        let proxy = listen(move |mut stream: TcpStream| async move {
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(reply).await;
            // What has been sent shall arrive, and then the end.
            let _ = stream.shutdown().await;
            let _ = stream.read(&mut request).await;
        })
        .await;
        site.change_agent(&format!("proxy = \"http://{proxy}\""), &[]);
        site.restart_agent().await;
        let line = site.program(Side::Agent).says("not linked").await;
        assert!(line.contains(words), "{reply:?}: {line}");
        // It does not give up.
        site.program(Side::Agent).says("waiting before the next attempt").await;
        assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    }
    let nobody = free_port();
    site.change_agent(&format!("proxy = \"http://127.0.0.1:{nobody}\""), &[]);
    site.restart_agent().await;
    let line = site.program(Side::Agent).says("not linked").await;
    assert!(line.contains(&format!("could not connect to proxy 127.0.0.1:{nobody}")), "{line}");
    assert!(line.contains("Connection refused"), "{line}");
    site.stop().await;
}

#[tokio::test]
async fn does_not_wait_for_a_silent_proxy_for_long() {
    const { assert!(limits::PROXY_TIMEOUT.as_secs() < PATIENCE.as_secs()) };
    let proxy = listen(async |mut stream: TcpStream| {
        // Reads, and says nothing until the other side gives up.
        let mut request = Vec::new();
        drop(stream.read_to_end(&mut request).await);
    })
    .await;
    let mut site = Site::plan().start_gateway().await;
    site.change_agent(&format!("proxy = \"http://{proxy}\""), &[]);
    site.restart_agent().await;
    let line = site.program(Side::Agent).says("not linked").await;
    let words = format!("proxy {proxy} has not answered CONNECT {} for 15 s", site.address);
    assert!(line.contains(&words), "{line}");
    site.stop().await;
}

#[tokio::test]
async fn the_environment_names_the_proxy_before_the_file_does() {
    let squid = Squid::open().await;
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let somebody = format!("http://{}", squid.address);
    let mut site = Site::plan().start_gateway().await;
    for (setting, environment) in [
        (&nobody, vec![("AGENT_PROXY", somebody.as_str())]),
        (&nobody, vec![("AGENT_PROXY", nobody.as_str()), ("CAPONIER_AGENT__PROXY", &somebody)]),
        // Empty counts as absent.
        (&somebody, vec![("AGENT_PROXY", "")]),
    ] {
        site.change_agent(&format!("proxy = \"{setting}\""), &environment);
        site.restart_agent().await;
        site.program(Side::Agent).says(" linked ").await;
        assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    }
    site.change_agent(&format!("proxy = \"{somebody}\""), &[("AGENT_PROXY", &nobody)]);
    site.restart_agent().await;
    site.program(Side::Agent).says("could not connect to proxy").await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 3);
    site.stop().await;
}

//! The way out: a real squid in clear and within TLS, SOCKS5 servers, and proxies that misbehave.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use caponier::limits;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::bastion;
use crate::harness::{
    PATIENCE, Program, Side, Site, caponier, connect, echo, echoes, eventually, free_port, listen, run,
};
use crate::squid::{Authority, PASSWORD, SOCKS_PASSWORD, Socks, Squid, USER};

const WRONG_PASSWORD: &str = "a-wrong-one-31337";

/// `USER:PASSWORD` in a file as the agent wants it.
fn credentials(dir: &Path, password: &str) -> PathBuf {
    let file = dir.join("proxy-credentials");
    fs::write(&file, format!("{USER}:{password}\n")).expect("written");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("permissions");
    file
}

/// That no form of a password appears where others could read it: neither root, nor the user that the program runs as.
async fn is_told_nowhere_but_in(environment: &[(&str, &str)], site: &mut Site, password: &str) {
    is_told_in_no_file_nor_program(environment, site, password).await;
    let file = format!("/proc/{}/environ", site.program(Side::Agent).pid());
    let mode = fs::metadata(file).expect("an environment").permissions().mode();
    assert_eq!(mode & 0o077, 0, "others can read the environment");
}

/// That no form of a password appears where others could read it.
async fn is_told_nowhere(site: &mut Site, password: &str) {
    is_told_in_no_file_nor_program(&[], site, password).await;
}

async fn is_told_in_no_file_nor_program(environment: &[(&str, &str)], site: &mut Site, password: &str) {
    let header = run(Command::new("sh").args(["-c", &format!("printf %s '{USER}:{password}' | base64 -w0")])).await;
    let percent = password.replace('%', "%25").replace('/', "%2F").replace('@', "%40").replace(':', "%3A");
    let forms = [password.to_owned(), percent, header.done()];
    let config = site.config(Side::Agent);
    let checked = run(caponier().envs(environment.iter().copied()).arg("check").arg(&config)).await;
    assert_eq!(checked.code(), 0, "{checked:?}");
    let faulty = site.path().join("faulty.toml");
    let text = fs::read_to_string(&config).expect("the configuration").replace("id = \"prod-eu\"", "id = \"PROD\"");
    fs::write(&faulty, text).expect("written");
    let faulty = run(caponier().envs(environment.iter().copied()).arg("check").arg(&faulty)).await;
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
    eventually("the refusal in the proxy's log", async || squid.access().contains("TCP_DENIED/407").then_some(()))
        .await;
}

/// A proxy that reads something, says this and hangs up.
async fn proxy_that_says(reply: impl Into<Vec<u8>>) -> std::net::SocketAddr {
    let reply = reply.into();
    listen(move |mut stream: TcpStream| {
        let reply = reply.clone();
        async move {
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(&reply).await;
            // What has been sent shall arrive, and then the end.
            let _ = stream.shutdown().await;
            let _ = stream.read(&mut request).await;
        }
    })
    .await
}

#[tokio::test]
async fn names_the_stage_at_which_a_proxy_fails() {
    let long = [&b"HTTP/1.1 200 OK\r\nX: "[..], &[b'y'; 32 * 1024]].concat();
    let interim = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(2048);
    let cut = "closed the connection, or it failed, before its reply to CONNECT";
    let between =
        "something that inspects TLS or HTTP stands between; ask the network's operators for an exclusion for ";
    let broken: Vec<(Vec<u8>, &str)> = vec![
        (b"".into(), cut),
        (b"HTTP/1.1 200 Connection est".into(), cut),
        (b"HTTP/1.1 200 OK\r\nVia: x\r\n".into(), cut),
        (b"SSH-2.0-OpenSSH_9.2\r\n".into(), "which is not an HTTP reply"),
        (b"\x15\x03\x01\x00\x02\x02\x16".into(), "with TLS, which is not an HTTP reply"),
        (long, "with a head of more than 16384 bytes"),
        (interim, "with a head of more than 16384 bytes"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://portal.example/?u=1\r\n\r\n".into(),
            "302 Found (to http://portal.example/): it sends us elsewhere, as login portals do",
        ),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".into(), "it may be a web server"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n".into(), "502 Bad Gateway: it could not reach the host and port itself"),
        (
            b"HTTP/1.1 503 Service Unavailable\r\nX-Squid-Error: ERR_DNS_FAIL 0\r\n\r\n".into(),
            "503 Service Unavailable (ERR_DNS_FAIL 0): it could not reach",
        ),
        (b"HTTP/1.1 504 Gateway Timeout\r\n\r\n".into(), "504 Gateway Timeout: it could not reach"),
        (
            b"HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n\r\n".into(),
            "status 407: it wants to be spoken to in Negotiate or NTLM, and Basic is what is spoken here",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\n".into(), "the peer closed the connection before it identified itself; if something"),
        (b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 400 Bad Request\r\n\r\n".into(), between),
        (b"HTTP/1.1 200 OK\r\n\r\n\x15\x03\x03\x00\x02\x02\x28".into(), between),
    ];
    let mut site = Site::plan().start_gateway().await;
    for (reply, words) in broken {
        let shown = String::from_utf8_lossy(&reply[..reply.len().min(60)]).into_owned();
        let proxy = proxy_that_says(reply).await;
        site.change_agent(&format!("proxy = \"http://{proxy}\""), &[]);
        site.restart_agent().await;
        let line = site.program(Side::Agent).says("not linked").await;
        assert!(line.contains(words), "{shown:?}: {line}");
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
    assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    site.change_agent("proxy = \"socks5://no-such-proxy.invalid:1080\"", &[]);
    site.restart_agent().await;
    let line = site.program(Side::Agent).says("not linked").await;
    assert!(line.contains("could not resolve proxy no-such-proxy.invalid"), "{line}");
    site.stop().await;
}

/// A proxy that makes a tunnel, and announces it so.
async fn proxy_that_announces(reply: &'static [u8], piece: usize) -> std::net::SocketAddr {
    listen(move |mut stream: TcpStream| async move {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => request.push(byte),
                Err(_) => return,
            }
        }
        let request = String::from_utf8(request).expect("text");
        let to = request.split(' ').nth(1).expect("a target").to_owned();
        let mut gateway = TcpStream::connect(to).await.expect("connected");
        // What the gateway says first comes with the reply, in pieces that end anywhere.
        gateway.write_all(b"").await.expect("written");
        stream.set_nodelay(true).expect("an option");
        for bytes in reply.chunks(piece) {
            if stream.write_all(bytes).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
        drop(tokio::io::copy_bidirectional(&mut stream, &mut gateway).await);
    })
    .await
}

#[tokio::test]
async fn a_tunnel_that_is_announced_oddly_is_a_tunnel() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start_gateway().await;
    let odd: [(&'static [u8], usize); 4] = [
        (b"HTTP/1.0 200\r\n\r\n", 1),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", 7),
        // There is no body (RFC 9110 §9.3.6): what follows is the tunnel's.
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", 1000),
        (b"HTTP/1.1 201 OK\nTransfer-Encoding: chunked\n\n", 3),
    ];
    for (reply, piece) in odd {
        let proxy = proxy_that_announces(reply, piece).await;
        site.change_agent(&format!("proxy = \"http://{proxy}\""), &[]);
        site.restart_agent().await;
        site.program(Side::Agent).says(" linked ").await;
        echoes(connect(site.doors[0]).await, b"through something odd").await;
        assert!(matches!(site.program(Side::Agent).stop().await, Some(0)));
    }
    site.stop().await;
}

#[tokio::test]
async fn every_kind_of_proxy_carries_links_and_forwards_and_is_no_target() {
    let ca = Authority::new("the proxy's authority");
    let (squid, secured) = (Squid::open().await, Squid::open_within_tls(&ca, &["localhost"]).await);
    let knowing = Squid::with_password_within_tls(&ca).await;
    let (socks, socks_with_password) = (Socks::open().await, Socks::with_password().await);
    let (_ssh, dynamic) = bastion::dynamic_forward().await;
    let target = echo().await;
    let proxies =
        [squid.address, secured.address, knowing.address, socks.address, socks_with_password.address, dynamic];
    let ports = proxies.map(|proxy| proxy.port().to_string()).join(", ");
    let anywhere = format!("name = \"proxies\"\naddresses = [\"127.0.0.0/8\"]\nports = [{ports}]");
    let mut site = Site::plan().allow(target).rule(&anywhere).door(target).start_gateway().await;
    ca.write(&site.path().join("proxy-ca.pem"));
    let file = credentials(site.path(), PASSWORD).display().to_string();
    let authorities = "proxy_ca_file = \"proxy-ca.pem\"";
    let encoded = "pass%3Aword%2Fof%40the%25agent";
    let by_name = format!("https://localhost:{}", secured.address.port());
    let socks_url = format!("socks5://{USER}:{}@{}", encoded.replace("pass", "socks"), socks_with_password.address);
    let knowing_url = knowing.url_with(USER, encoded);
    for (proxy, settings, environment) in [
        (squid.address, String::new(), vec![("HTTPS_PROXY", squid.url())]),
        (
            squid.address,
            String::new(),
            vec![("https_proxy", squid.address.to_string()), ("HTTPS_PROXY", String::new())],
        ),
        (secured.address, format!("proxy = \"{by_name}\"\n{authorities}"), vec![]),
        (knowing.address, format!("{}\nproxy_credentials_file = \"{file}\"\n{authorities}", knowing.setting()), vec![]),
        (knowing.address, authorities.to_owned(), vec![("AGENT_PROXY", knowing_url.clone())]),
        (knowing.address, authorities.to_owned(), vec![("HTTPS_PROXY", knowing_url.clone())]),
        (socks.address, format!("proxy = \"socks5://{}\"", socks.address), vec![]),
        (socks_with_password.address, format!("proxy = \"{socks_url}\""), vec![]),
        (dynamic, "proxy = \"none\"".to_owned(), vec![("CAPONIER_AGENT__PROXY", format!("socks5h://{dynamic}"))]),
    ] {
        let shown = format!("{settings} {environment:?}");
        let environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
        site.change_agent(&settings, &environment);
        site.restart_agent().await;
        site.program(Side::Agent).says(" linked ").await;
        echoes(connect(site.doors[0]).await, shown.as_bytes()).await;
        let denied = site.records(Side::Agent, &json!({"event": "forward.denied", "reason": "own_gateway"})).len();
        let said = run(&mut site.ssh(&["-W", &proxy.to_string()])).await;
        assert_eq!(said.code(), 255, "{shown}: {said:?}");
        eventually("the denial", async || {
            let like = json!({"event": "forward.denied", "reason": "own_gateway"});
            (site.records(Side::Agent, &like).len() == denied + 1).then_some(())
        })
        .await;
        let pid = site.program(Side::Agent).pid();
        let sockets = run(Command::new("ss").arg("-Hntp")).await.done();
        let to_gateway = format!(" {} ", site.address);
        let direct = sockets.lines().any(|line| line.contains(&format!("pid={pid},")) && line.contains(&to_gateway));
        assert!(!direct, "{shown}: the agent speaks to the gateway itself: {sockets}");
        if settings.contains("word") || shown.contains("word") {
            for password in [PASSWORD, SOCKS_PASSWORD] {
                is_told_nowhere_but_in(&environment, &mut site, password).await;
            }
        }
        assert_eq!(site.program(Side::Agent).stop().await, Some(0), "{shown}");
    }
    site.stop().await;
}

#[tokio::test]
async fn a_proxy_within_tls_is_known_by_its_own_certificate() {
    let ca = Authority::new("the proxy's authority");
    let (squid, elsewhere) =
        (Squid::open_within_tls(&ca, &["127.0.0.1"]).await, Squid::open_within_tls(&ca, &["p.example"]).await);
    let (plain, socks) = (Squid::open().await, Socks::open().await);
    let mut site = Site::plan().start_gateway().await;
    ca.write(&site.path().join("ca.pem"));
    Authority::new("somebody else").write(&site.path().join("other.pem"));
    let tls = |squid: &Squid, more: &str| format!("proxy = \"https://{}\"\n{more}", squid.address);
    let ours = "proxy_ca_file = \"ca.pem\"";
    let wrong = "could not make TLS with proxy ";
    for (setting, words) in [
        (
            tls(&squid, ""),
            "the proxy's own authority, name its file in proxy_ca_file; ask the network's operators for it: ",
        ),
        (tls(&squid, "proxy_ca_file = \"other.pem\""), "add it to the file in proxy_ca_file"),
        (
            tls(&elsewhere, ours),
            "should have one of its names in the place of 127.0.0.1, or another host answers there: the server's certificate is for ",
        ),
        (tls(&plain, ours), wrong),
        (format!("proxy = \"http://{}\"", squid.address), "is it an HTTP proxy, and of this scheme?"),
        (format!("proxy = \"http://{}\"", socks.address), "is it an HTTP proxy, and of this scheme?"),
        (format!("proxy = \"https://{}\"\n{ours}", socks.address), wrong),
    ] {
        site.change_agent(&setting, &[]);
        site.restart_agent().await;
        let line = site.program(Side::Agent).says("not linked").await;
        assert!(line.contains(words), "{setting}: {line}");
        // Who has signed it is told, so that somebody can be asked for it.
        assert!(!words.contains("authority") || line.contains("CN=the proxy's authority"), "{line}");
        assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    }
    // Authorities are read again as keys are.
    site.change_agent(&tls(&squid, "proxy_ca_file = \"other.pem\""), &[]);
    site.restart_agent().await;
    site.program(Side::Agent).says("not linked").await;
    ca.write(&site.path().join("other.pem"));
    site.program(Side::Agent).says(" linked ").await;
    site.stop().await;
}

#[tokio::test]
async fn what_needs_no_proxy_is_reached_without() {
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let mut site = Site::plan().start_gateway().await;
    let port = site.address.port();
    let (here, elsewhere) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{}", port ^ 1));
    let file = |list: &str| format!("proxy = \"{nobody}\"\nno_proxy = {list}");
    for (settings, environment, direct) in [
        (file(&format!("[\"{here}\"]")), vec![], true),
        (file("[\"gateway.example\", \"127.0.0.0/8\"]"), vec![], true),
        (file("[\"*\"]"), vec![], true),
        (file(&format!("[\"{elsewhere}\", \"localhost\", \"10.0.0.0/8\"]")), vec![], false),
        (String::new(), vec![("HTTPS_PROXY", nobody.as_str()), ("NO_PROXY", "localhost, 127.0.0.1")], true),
        (String::new(), vec![("HTTPS_PROXY", nobody.as_str()), ("no_proxy", "localhost")], false),
        (file("[\"localhost\"]"), vec![("NO_PROXY", "127.0.0.1")], false),
        ("proxy = \"none\"".to_owned(), vec![("HTTPS_PROXY", nobody.as_str())], true),
        (format!("proxy = \"{nobody}\""), vec![("AGENT_PROXY", "none")], true),
    ] {
        site.change_agent(&settings, &environment);
        site.restart_agent().await;
        let words = if direct { " linked " } else { "could not connect to proxy" };
        site.program(Side::Agent).says(words).await;
        assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    }
    site.stop().await;
}

#[tokio::test]
async fn other_credentials_in_the_file_are_taken_up_while_it_runs() {
    let squid = Squid::with_password().await;
    let mut site = Site::plan().start_gateway().await;
    let file = credentials(site.path(), WRONG_PASSWORD).display().to_string();
    site.change_agent(&format!("{}\nproxy_credentials_file = \"{file}\"", squid.setting()), &[]);
    site.restart_agent().await;
    site.program(Side::Agent).says("status 407: it did not accept the credentials given").await;
    credentials(site.path(), PASSWORD);
    site.program(Side::Agent).says(" linked ").await;
    is_told_nowhere(&mut site, PASSWORD).await;
    site.stop().await;
}

/// `caponier forward` to `target`, with these arguments and this environment.
fn forward(site: &Site, target: std::net::SocketAddr, arguments: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = caponier();
    command.args(["forward", "--agent", crate::harness::AGENT, "-L", &format!("0:{target}")]);
    command.args(["--gateway", &format!("ssh://{}", site.address), "--identity"]).arg(site.path().join("provisioner"));
    command.arg("--known-hosts").arg(site.path().join("known_hosts")).args(arguments);
    command.envs(environment.iter().copied());
    command
}

#[tokio::test]
async fn the_client_goes_out_as_the_agent_does() {
    let ca = Authority::new("the proxy's authority");
    let (squid, socks) = (Squid::with_password_within_tls(&ca).await, Socks::with_password().await);
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    let file = site.path().join("ca.pem");
    ca.write(&file);
    let file = file.display().to_string();
    let secured = squid.url_with(USER, "pass%3Aword%2Fof%40the%25agent");
    let socks = format!("socks5://{USER}:socks%3Aword%2Fof%40the%25agent@{}", socks.address);
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let with_ca = ["--proxy-ca-file", &file];
    for (arguments, environment) in [
        (&with_ca[..], vec![("CAPONIER_FORWARD_PROXY", secured.as_str()), ("HTTPS_PROXY", &nobody)]),
        (&with_ca[..], vec![("HTTPS_PROXY", secured.as_str()), ("AGENT_PROXY", &nobody)]),
        (&[][..], vec![("CAPONIER_FORWARD_PROXY", ""), ("HTTPS_PROXY", ""), ("https_proxy", &socks)]),
        (&["--proxy", "none"][..], vec![("CAPONIER_FORWARD_PROXY", nobody.as_str())]),
        (&["--proxy", &nobody, "--no-proxy", "10.0.0.0/8,127.0.0.0/8"][..], vec![("NO_PROXY", "x.example")]),
        (&[][..], vec![("HTTPS_PROXY", nobody.as_str()), ("NO_PROXY", "127.0.0.1")]),
    ] {
        let name = format!("forward-{}", free_port());
        let command = forward(&site, target, arguments, &environment);
        let mut program = Program::start(&name, command, &site.path().join(format!("{name}.log")));
        let line = program.says(&format!(" for {target}")).await;
        let (_, rest) = line.split_once("listening ").expect("where it listens");
        let address = rest.split(' ').next().expect("an address").parse().expect("an address");
        echoes(connect(address).await, b"through a proxy").await;
        assert!(!program.log().contains("word"), "{}", program.log());
        assert_eq!(program.stop().await, Some(0));
    }
    for (arguments, environment, code, words) in [
        (&["--proxy", &nobody][..], vec![("CAPONIER_FORWARD_PROXY", socks.as_str())], 1, "could not connect to proxy"),
        (
            &["--proxy", &socks],
            vec![],
            2,
            "can be read by everybody on this machine: put the URL into CAPONIER_FORWARD_PROXY",
        ),
        (&[], vec![("CAPONIER_FORWARD_PROXY", "ftp://u:hunter2@p:1")], 2, "CAPONIER_FORWARD_PROXY: a proxy is written"),
        (&[], vec![("HTTPS_PROXY", "socks4://u:hunter2@p:1")], 2, "HTTPS_PROXY: a proxy is written http://"),
        (&[], vec![("https_proxy", nobody.as_str()), ("NO_PROXY", "192.168.*")], 2, "NO_PROXY: entry 1 is none"),
        (&["--proxy", "http://p:1", "--proxy-ca-file", &file], vec![], 2, "--proxy-ca-file is for a proxy of https://"),
        (&[], vec![("HTTPS_PROXY", secured.as_str())], 1, "could not make TLS with proxy"),
    ] {
        let said = run(&mut forward(&site, target, arguments, &environment)).await;
        assert_eq!(said.code(), code, "{arguments:?} {said:?}");
        assert!(said.stderr.contains(words), "{arguments:?} {said:?}");
        assert!(!said.stderr.contains("hunter2") && !said.stderr.contains("word"), "{said:?}");
    }
    // One that cannot be read is none that is not there.
    for variable in ["CAPONIER_FORWARD_PROXY", "HTTPS_PROXY"] {
        let mut command = forward(&site, target, &[], &[]);
        let said = run(command.env(variable, OsStr::from_bytes(b"http://u:hunter2@\xff:1"))).await;
        assert_eq!(said.code(), 2, "{said:?}");
        assert!(said.stderr.contains(&format!("{variable}: the host or port")), "{said:?}");
        assert!(!said.stderr.contains("hunter2"), "{said:?}");
    }
    site.stop().await;
}

#[tokio::test]
async fn provisioning_goes_out_by_its_own_proxy() {
    let proxy = proxy_that_says(*b"HTTP/1.1 403 Forbidden\r\n\r\n").await;
    let site = Site::plan().start_gateway().await;
    let resources = format!(
        "[provision]\ngateway = \"ssh://{}\"\nagent = \"acme/prod-eu\"\nidentity = \"provisioner\"\n\
         known_hosts = \"known_hosts\"\noutput = \"-\"\nproxy = \"http://{proxy}\"\n\
         [instance]\nhost = \"db.internal\"\nuser = \"u\"\npassword_file = \"password\"\n[[database]]\nname = \"orders\"\n",
        site.address
    );
    let password = site.path().join("password");
    fs::write(&password, "secret\n").expect("written");
    fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).expect("permissions");
    let nobody = free_port();
    for (from, to, words) in [
        ("", "", "answered CONNECT with status 403 Forbidden: ask its operators to permit CONNECT"),
        ("proxy = ", "#proxy = ", "could not connect to proxy 127.0.0.1:"),
    ] {
        fs::write(site.path().join("resources.toml"), resources.replace(from, to)).expect("written");
        let mut command = caponier();
        command.args(["provision", "plan", "-f"]).arg(site.path().join("resources.toml"));
        let said = run(command.env("HTTPS_PROXY", format!("127.0.0.1:{nobody}"))).await;
        assert_eq!(said.code(), 1, "{said:?}");
        assert!(said.stderr.contains(words), "{said:?}");
    }
    site.stop().await;
}

#[tokio::test]
async fn a_proxy_that_closes_one_way_may_open_the_next() {
    let closed = free_port();
    // Relays, save to one port.
    let proxy = listen(move |mut near: TcpStream| async move {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let Ok(byte) = near.read_u8().await else { return };
            head.push(byte);
        }
        let head = String::from_utf8(head).expect("a head");
        let to = head.split(' ').nth(1).expect("a target").to_owned();
        if to.ends_with(&format!(":{closed}")) {
            drop(near.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await);
            drop(near.shutdown().await);
            return;
        }
        let mut far = TcpStream::connect(&to).await.expect("the gateway");
        drop(near.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await);
        drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
    })
    .await;
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target).agent_setting(&format!("proxy = \"http://{proxy}\""));
    let mut site = plan.gateways(&format!("[[\"tls://127.0.0.1:{closed}\", \"ssh://{{}}\"]]")).start().await;
    let line = site.program(Side::Agent).says("not linked: ").await;
    for words in ["403", &format!("proxy {proxy}"), &format!("; trying ssh://{} next", site.address)] {
        assert!(line.contains(words), "{words}: {line}");
    }
    echoes(connect(site.doors[0]).await, b"by the way that it opens").await;
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

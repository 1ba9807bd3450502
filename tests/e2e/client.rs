//! `caponier forward` as programs use it: as a SOCKS5 and an HTTP proxy, from a file of forwards, over standard input and
//! output, and around a command.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use caponier::limits;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::time::Instant;

use crate::bastion::Bastion;
use crate::harness::{
    AGENT, Program, Said, Side, Site, caponier, connect, echo, echoes, eventually, free_port, listen, read_to_end, run,
    web, within,
};
use crate::postgres::{Postgres, SUPERUSER_PASSWORD, bin_directories};

/// Our client, at the site's gateway, without a word about what it is to forward.
fn forward(site: &Site) -> Command {
    let mut command = caponier();
    command.args(["forward", "--agent", AGENT, "--gateway", &format!("ssh://{}", site.address), "--identity"]);
    command.arg(site.key("provisioner")).arg("--known-hosts").arg(site.path().join("known_hosts"));
    for name in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"] {
        command.env_remove(name);
    }
    command
}

/// Starts it, and waits until it is ready; where it listens, in the order of the command line.
async fn started(site: &Site, name: &str, arguments: &[&str]) -> (Program, Vec<SocketAddr>) {
    let mut command = forward(site);
    command.args(arguments);
    let mut program = site.background(name, command);
    eventually("it is ready", async || program.log().lines().any(|line| line == "ready").then_some(())).await;
    program.says("ready").await;
    let listening = program.log();
    let addresses = listening
        .lines()
        .filter_map(|line| line.strip_prefix("listening ")?.split_once(" for "))
        .map(|(address, _)| address.parse().expect("an address"))
        .collect();
    (program, addresses)
}

async fn curl(arguments: &[&str]) -> Said {
    run(Command::new("curl").args(["-q", "-sS", "--max-time", "30"]).args(arguments)).await
}

/// Sends `request`, with nothing after it, and reads all that is said to it.
async fn told(address: SocketAddr, request: &[u8]) -> Vec<u8> {
    let mut stream = connect(address).await;
    stream.write_all(request).await.expect("sent");
    read_to_end(stream).await
}

/// What a SOCKS5 request for a target is.
fn socks_request(target: SocketAddr) -> Vec<u8> {
    let SocketAddr::V4(target) = target else { panic!("IPv4 only: {target}") };
    [&[5, 1, 0, 5, 1, 0, 1][..], &target.ip().octets(), &target.port().to_be_bytes()].concat()
}

/// A port of this machine that nobody listens on, for as long as the listener's backlog is not there.
fn closed() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

#[tokio::test]
async fn curl_goes_through_both_proxies_and_the_far_side_resolves_the_names() {
    let target = web().await;
    let rule =
        format!("name = \"web\"\nhosts = [\"localhost\"]\nwithin = [\"127.0.0.0/8\"]\nports = [{}]", target.port());
    let site = Site::plan().rule(&rule).start().await;
    let (mut client, at) = started(&site, "proxies", &["--socks", "0", "--http-proxy", "localhost:0"]).await;
    let url = format!("http://localhost:{}/", target.port());
    let proxies = [format!("socks5h://{}", at[0]), format!("http://{}", at[1])];
    for proxy in &proxies {
        let said = curl(&["--noproxy", "", "--proxytunnel", "--proxy", proxy, &url]).await.done();
        assert_eq!(said, "hello through the tunnel", "{proxy}");
    }
    let opened = site.records(Side::Gateway, &json!({"event": "forward.open"}));
    assert_eq!(opened.len(), 2);
    for record in opened {
        assert_eq!(record["target"], format!("localhost:{}", target.port()), "the name came as it was");
    }

    // Without a tunnel, an HTTP proxy gets the whole request, and says in words that it does not want it.
    let said = curl(&["--noproxy", "", "--proxy", &proxies[1], "--include", &url]).await.done();
    assert!(said.starts_with("HTTP/1.1 405 ") && said.contains("CONNECT only"), "{said}");
    assert_eq!(client.stop().await, Some(0));
    site.stop().await;
}

#[tokio::test]
async fn each_refusal_has_its_code_at_both_proxies() {
    let (allowed, denied, shut) = (echo().await, echo().await, closed());
    let site = Site::plan().allow(allowed).allow(shut).start().await;
    let (mut client, at) = started(&site, "refusals", &["--socks", "0", "--http-proxy", "0"]).await;
    let (socks, http) = (at[0], at[1]);

    let reply = |code: u8| [5, 0, 5, code, 0, 1, 0, 0, 0, 0, 0, 0].to_vec();
    let domain = |name: &str| {
        [&[5, 2, 2, 0, 5, 1, 0, 3, u8::try_from(name.len()).expect("short")][..], name.as_bytes(), &[0, 80]].concat()
    };
    for (what, request, answer) in [
        ("not allowed", socks_request(denied), reply(2)),
        ("not allowed by name", domain("orders.db.internal"), reply(2)),
        ("not available", socks_request(shut), reply(4)),
        ("BIND", [&[5, 1, 0, 5, 2, 0, 1][..], &[127, 0, 0, 1, 0, 80]].concat(), reply(7)),
        ("UDP ASSOCIATE", [&[5, 1, 0, 5, 3, 0, 1][..], &[127, 0, 0, 1, 0, 80]].concat(), reply(7)),
        ("an unknown kind of address", vec![5, 1, 0, 5, 1, 0, 9], reply(8)),
        ("a name that is none", domain("a..b"), reply(1)),
        ("an address in disguise", domain("0x7f.1"), reply(1)),
        ("no name at all", domain(""), reply(1)),
        ("port 0", socks_request(SocketAddr::from(([127, 0, 0, 1], 0))), reply(1)),
        ("only with a password", vec![5, 1, 2], vec![5, 0xFF]),
        ("no way to authenticate", vec![5, 0], vec![5, 0xFF]),
        ("SOCKS4", vec![4, 1, 0, 80, 127, 0, 0, 1, 0], vec![]),
        ("HTTP", b"POST / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), vec![]),
        ("TLS", vec![0x16, 3, 1, 0, 200, 1], vec![]),
        ("another version after the greeting", vec![5, 1, 0, 4, 1, 0, 1], vec![5, 0]),
    ] {
        assert_eq!(told(socks, &request).await, answer, "{what}");
    }

    let connect_to = |target: &str, more: &str| format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{more}\r\n");
    let long = format!("CONNECT a:1 HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(limits::FRONT_HEAD_MAX));
    for (what, request, status, error) in [
        ("not allowed", connect_to(&denied.to_string(), ""), 403, "not_allowed"),
        ("not available", connect_to(&shut.to_string(), ""), 502, "not_available"),
        ("for a web page", connect_to(&allowed.to_string(), "Origin: https://evil.example\r\n"), 403, "not_allowed"),
        ("by a web page", connect_to(&allowed.to_string(), "Sec-Fetch-Site: cross-site\r\n"), 403, "not_allowed"),
        (
            "a form",
            "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nCONNECT a".to_owned(),
            405,
            "method_not_allowed",
        ),
        (
            "a WebSocket",
            "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\r\n".to_owned(),
            405,
            "method_not_allowed",
        ),
        (
            "the old way",
            format!("GET http://{allowed}/ HTTP/1.1\r\nHost: {allowed}\r\n\r\n"),
            405,
            "method_not_allowed",
        ),
        ("with a body", connect_to(&allowed.to_string(), "Transfer-Encoding: chunked\r\n"), 400, "bad_request"),
        ("bare line ends", format!("CONNECT {allowed} HTTP/1.1\nHost: x\n\n"), 400, "bad_request"),
        ("SSH", "SSH-2.0-x\r\n\r\n".to_owned(), 400, "bad_request"),
        ("no target", connect_to("a", ""), 400, "bad_target"),
        ("too long", long, 431, "too_large"),
    ] {
        let said = String::from_utf8(told(http, request.as_bytes()).await).expect("text");
        let (head, body) = said.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{what}: {said:?}"));
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{what}: {said}");
        assert!(!head.to_ascii_lowercase().contains("access-control"), "{what}: {said}");
        let body: Value = serde_json::from_str(body).unwrap_or_else(|fault| panic!("{what}: {fault}: {said}"));
        assert_eq!(body["error"], error, "{what}");
    }
    let said = told(http, b"\x16\x03\x01\x00\xc8\x01").await;
    assert!(said.starts_with(b"HTTP/1.1 400 "), "TLS: {}", String::from_utf8_lossy(&said));

    // What is sent along with the request belongs to the tunnel.
    for (at, request, reply) in [
        (socks, socks_request(allowed), reply(0)),
        (
            http,
            connect_to(&allowed.to_string(), "").into_bytes(),
            b"HTTP/1.1 200 Connection established\r\n\r\n".to_vec(),
        ),
    ] {
        let mut stream = connect(at).await;
        stream.write_all(&[&request[..], b"early"].concat()).await.expect("sent");
        let mut all = vec![0; reply.len() + 5];
        within("the reply", stream.read_exact(&mut all)).await.expect("read");
        assert_eq!(all, [&reply[..], b"early"].concat());
        stream.shutdown().await.expect("shut down");
        assert_eq!(read_to_end(stream).await, b"");
    }
    assert_eq!(client.stop().await, Some(0));
    site.stop().await;
}

#[tokio::test]
async fn whoever_asks_for_nothing_is_sent_away_in_time_and_harms_nobody_else() {
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    let (mut client, at) = started(&site, "slow", &["--socks", "0", "--http-proxy", "0"]).await;
    let begun = Instant::now();
    let mut slow = Vec::new();
    for number in 0..limits::CHANNELS_PER_SESSION {
        let mut stream = connect(at[1]).await;
        // Nothing, a byte, or one at a time.
        let head: &[u8] = [&b""[..], b"C", b"CONNECT a:1 HTTP/1.1\r\nX: "][number % 3];
        stream.write_all(head).await.expect("sent");
        slow.push(stream);
    }
    // There is no place left at this one; the other is as it was.
    assert_eq!(read_to_end(connect(at[1]).await).await, b"");
    client.says("refused a local connection").await;
    let mut stream = connect(at[0]).await;
    stream.write_all(&socks_request(target)).await.expect("sent");
    let mut reply = [0; 12];
    within("the reply", stream.read_exact(&mut reply)).await.expect("read");
    echoes(&mut stream, b"undisturbed").await;

    let dribble = slow.swap_remove(2);
    let dribbled = within("a slow one's end", async {
        let (mut read, mut write) = dribble.into_split();
        let mut all = Vec::new();
        let mut pace = tokio::time::interval(Duration::from_millis(200));
        loop {
            tokio::select! {
                read = read.read_buf(&mut all) => if !matches!(read, Ok(1..)) { break all },
                _ = pace.tick() => drop(write.write_all(b"x").await),
            }
        }
    });
    let said = dribbled.await;
    assert!(said.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&said));
    assert!(begun.elapsed() >= limits::FRONT_TIMEOUT);
    for stream in slow {
        let said = read_to_end(stream).await;
        assert!(said.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&said));
    }
    // Their places are free again.
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut again = eventually("a place", async || {
        let mut stream = connect(at[1]).await;
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut reply = [0; 12];
        stream.read_exact(&mut reply).await.ok().filter(|_| &reply == b"HTTP/1.1 200")?;
        Some(stream)
    })
    .await;
    within("the rest of the reply", again.read_exact(&mut [0; 27])).await.expect("read");
    echoes(&mut again, b"as before").await;
    echoes(&mut stream, b"all the time").await;
    drop((stream, again));
    assert_eq!(client.stop().await, Some(0));
    site.stop().await;
}

#[tokio::test]
async fn it_says_where_it_listens_once_it_is_ready_and_only_then() {
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    let file = site.path().join("forwards");
    fs::write(&file, format!("# two of them\n0:{target} # one\n\n[::1]:0:orders.db.internal:5432\n")).expect("written");
    let file = file.to_str().expect("a path");
    let listening = ["--forwards", file, "--socks", "0", "--http-proxy", "127.0.0.2:0", "-L", "0:localhost:1"];
    let first = |child: &mut tokio::process::Child, lines: usize| {
        let mut output = BufReader::new(child.stdout.take().expect("its output")).lines();
        async move {
            let mut said = Vec::new();
            for _ in 0..lines {
                said.push(within("a line", output.next_line()).await.expect("read").expect("a line"));
            }
            said
        }
    };
    for json in [false, true] {
        let mut command = forward(&site);
        command.args(listening).args(json.then_some("--json")).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("it starts");
        let said = first(&mut child, 6).await;
        let fronts = ["localhost:1", &target.to_string(), "orders.db.internal:5432", "socks", "http-proxy"];
        for (line, front) in said.iter().zip(fronts) {
            let address = if json {
                let line: Value = serde_json::from_str(line).expect("an object");
                assert_eq!((&line["event"], &line["for"]), (&json!("listening"), &json!(front)));
                line["address"].as_str().expect("an address").to_owned()
            } else {
                let (address, told) =
                    line.strip_prefix("listening ").and_then(|it| it.split_once(" for ")).expect("a line");
                assert_eq!(told, front);
                address.to_owned()
            };
            let address: SocketAddr = address.parse().expect("an address");
            assert_ne!(address.port(), 0);
            drop(connect(address).await);
        }
        assert_eq!(said[5], if json { "{\"event\":\"ready\"}" } else { "ready" });
        child.start_kill().expect("killed");
        within("its end", child.wait()).await.expect("ended");
    }

    // Nothing where it does not get ready.
    let (key, port) = (site.key("stranger"), free_port());
    let said = run(forward(&site).args(["-L", &format!("{port}:{target}"), "--identity"]).arg(&key)).await;
    assert_ne!(said.code(), 0);
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let port = taken.local_addr().expect("its address").port();
    let said = run(forward(&site).args(["--socks", &port.to_string()])).await;
    assert_eq!((said.code(), said.stdout.as_str()), (1, ""), "{said:?}");
    assert!(said.stderr.contains("could not listen on"), "{said:?}");
    fs::write(file, "1:db:2\nfive\n0.0.0.0:1:db:2\n").expect("written");
    let said = run(forward(&site).args(["--forwards", file])).await;
    assert_eq!(said.code(), 2, "{said:?}");
    assert!(said.stderr.contains("line 2: ") && said.stderr.contains("line 3: BIND must be"), "{said:?}");
    for wrong in [
        &["--stdio", "a:1", "--socks", "0"][..],
        &["--stdio", "a:1", "--", "true"],
        &["--stdio", "a"],
        &["--socks", "0.0.0.0:1080"],
        &["--http-proxy", "10.0.0.1:8118"],
        &["--json", "--socks", "0", "--", "true"],
        &["--", "true"],
        &[],
    ] {
        let said = run(forward(&site).args(wrong)).await;
        assert_eq!((said.code(), said.stdout.as_str()), (2, ""), "{wrong:?}: {said:?}");
    }
    site.stop().await;
}

#[tokio::test]
async fn standard_input_and_output_are_a_connection() {
    // Says how much it got, once it has got all.
    let counter = listen(async |mut stream| {
        let mut all = Vec::new();
        drop(stream.read_to_end(&mut all).await);
        drop(stream.write_all(format!("{} bytes", all.len()).as_bytes()).await);
    })
    .await;
    let (target, denied, shut) = (echo().await, echo().await, closed());
    let site = Site::plan().allow(target).allow(counter).allow(shut).start().await;
    let over = |target: SocketAddr| {
        let mut command = forward(&site);
        command.args(["--stdio", &target.to_string()]);
        command
    };
    let bytes: Vec<u8> = (0..8_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 7) as u8).collect();

    // Pipes, with an end of file that is passed on by itself.
    let mut child =
        over(target).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("it starts");
    let (mut input, mut output) = (child.stdin.take().expect("stdin"), child.stdout.take().expect("stdout"));
    let mut back = Vec::new();
    let sending = async {
        input.write_all(&bytes).await.expect("sent");
        drop(input);
    };
    let receiving = output.read_to_end(&mut back);
    within("an echo", async { tokio::join!(sending, receiving) }).await.1.expect("read");
    assert!(back == bytes, "{} of {} bytes came back, or others", back.len(), bytes.len());
    assert_eq!(within("its end", child.wait()).await.expect("ended").code(), Some(0));

    // Files.
    let (from, to) = (site.path().join("from"), site.path().join("to"));
    fs::write(&from, &bytes).expect("written");
    for (target, answer) in [(target, &bytes[..]), (counter, b"8000000 bytes")] {
        let mut command = over(target);
        command.stdin(fs::File::open(&from).expect("a file")).stdout(fs::File::create(&to).expect("a file"));
        let status = within("its end", command.kill_on_drop(true).status()).await.expect("it ran");
        assert_eq!(status.code(), Some(0));
        assert!(fs::read(&to).expect("read") == answer, "what came back is something else");
    }
    // Nothing to say.
    let mut command = over(counter);
    let output = within("its end", command.stdin(Stdio::null()).kill_on_drop(true).output()).await.expect("it ran");
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"0 bytes"[..]));

    for (target, code, words) in [(denied, 3, "not allowed"), (shut, 1, "not available")] {
        let said = run(&mut over(target)).await;
        assert_eq!((said.code(), said.stdout.as_str()), (code, ""), "{said:?}");
        assert!(said.stderr.contains(words), "{said:?}");
    }
    // A target that breaks off, and a reader that goes away.
    let rude = listen(async |stream| drop(stream.set_zero_linger())).await;
    site.stop().await;
    let site = Site::plan().allow(rude).start().await;
    let mut child = forward(&site);
    child.args(["--stdio", &rude.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = child.spawn().expect("it starts");
    assert_eq!(within("its end", child.wait()).await.expect("ended").code(), Some(1));
    site.stop().await;

    let site = Site::plan().allow(target).start().await;
    let mut child = forward(&site);
    child.args(["--stdio", &target.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = child.spawn().expect("it starts");
    let (mut input, mut output) = (child.stdin.take().expect("stdin"), child.stdout.take().expect("stdout"));
    input.write_all(b"x").await.expect("sent");
    within("an echo", output.read_u8()).await.expect("read");
    drop(output);
    // Nobody wants the answer to this.
    input.write_all(b"y").await.expect("sent");
    assert_eq!(within("its end", child.wait()).await.expect("ended").code(), Some(1));
    site.stop().await;
}

/// Each connection to the address that is returned gets a process of its own with `--stdio`, which has the socket as both
/// standard input and output, as inetd does it.
async fn per_connection(command: impl Fn() -> Command + Send + Sync + 'static) -> SocketAddr {
    listen(move |stream| {
        let stream = stream.into_std().expect("a socket");
        stream.set_nonblocking(false).expect("a socket that blocks");
        let (input, output) = (OwnedFd::from(stream.try_clone().expect("a copy")), OwnedFd::from(stream));
        let mut command = command();
        let status = command.stdin(input).stdout(output).kill_on_drop(true).status();
        // It holds copies, which are to be closed with the process.
        drop(command);
        // A PostgreSQL that has been told goodbye resets what it has not read, and that is told as what it is.
        async move { assert!(matches!(status.await.expect("it ran").code(), Some(0 | 1))) }
    })
    .await
}

#[tokio::test]
async fn psql_works_from_a_file_of_forwards_and_over_standard_input_and_output() {
    let server = Postgres::start("localhost").await;
    let port = server.address.port();
    let rule = format!("name = \"db\"\nhosts = [\"localhost\"]\nwithin = [\"127.0.0.0/8\"]\nports = [{port}]");
    let site = Site::plan().rule(&rule).start().await;
    let file = site.path().join("forwards");
    fs::write(&file, format!("0:localhost:{port}\n")).expect("written");
    let (mut client, at) = started(&site, "file", &["--forwards", file.to_str().expect("a path")]).await;
    let inetd = {
        let (gateway, known_hosts) = (site.address, site.path().join("known_hosts"));
        let key = site.key("provisioner");
        per_connection(move || {
            let mut command = caponier();
            command.args(["forward", "--agent", AGENT, "--gateway", &format!("ssh://{gateway}"), "--identity"]);
            command.arg(&key).arg("--known-hosts").arg(&known_hosts);
            command.args(["--stdio", &format!("localhost:{port}")]);
            command
        })
        .await
    };
    for address in [at[0], inetd] {
        let mut psql = Command::new(bin_directories()[0].join("psql"));
        psql.env_clear().env("PGHOST", "localhost").env("PGHOSTADDR", "127.0.0.1").env("PGUSER", "postgres");
        psql.env("PGPORT", address.port().to_string()).env("PGPASSWORD", SUPERUSER_PASSWORD);
        psql.env("PGSSLMODE", "verify-full").env("PGSSLROOTCERT", server.ca_file()).env("PGDATABASE", "postgres");
        let sum = run(psql.args(["-XAtqc", "SELECT sum(number) FROM generate_series(1, 100000) number"])).await.done();
        assert_eq!(sum.trim(), "5000050000");
    }
    assert_eq!(client.stop().await, Some(0));
    site.stop().await;
}

#[tokio::test]
async fn ssh_takes_it_for_a_proxy_command() {
    let inner = Bastion::stock("").await;
    let site = Site::plan().allow(inner.address).start().await;
    let words = |command: &Command| -> String {
        let command = command.as_std();
        let quoted = [command.get_program()].into_iter().chain(command.get_args());
        quoted.map(|word| format!("'{}' ", word.to_str().expect("text"))).collect()
    };
    let through = format!("ProxyCommand={} --stdio %h:%p", words(&forward(&site)));
    for (script, code) in [("echo inside; exit 5", 5), ("cat >/dev/null; echo inside", 0)] {
        let mut ssh = inner.ssh("own", &inner.user, &["-o", &through]);
        let said = run(ssh.arg(script)).await;
        assert_eq!((said.code(), said.stdout.as_str()), (code, "inside\n"), "{said:?}");
    }
    site.stop().await;
}

#[tokio::test]
async fn a_command_runs_inside_and_ends_the_tunnel_with_its_exit_code() {
    let (target, plain) = (web().await, echo().await);
    let site = Site::plan().allow(target).allow(plain).start().await;
    let inside = |script: &str| {
        let mut command = forward(&site);
        command.args(["--http-proxy", "0", "--socks", "0", "-L", &format!("0:{target}"), "-L", &format!("0:{plain}")]);
        command.args(["--", "sh", "-c", script]);
        command
    };
    for (script, code, output) in [
        ("exit 0", 0, ""),
        ("echo \"$0\" && exit 7", 7, "sh\n"),
        ("kill -TERM $$", 143, ""),
        ("curl -qsS --noproxy '*' \"http://$CAPONIER_LISTEN_1/\"", 0, "hello through the tunnel"),
        ("test -n \"$CAPONIER_LISTEN_2\" && test -z \"$CAPONIER_LISTEN_3\"", 0, ""),
        (
            &format!("test $HTTPS_PROXY = $https_proxy && curl -qsSp --noproxy '' -x $HTTPS_PROXY http://{target}/"),
            0,
            "hello through the tunnel",
        ),
        (
            &format!("test $all_proxy = $ALL_PROXY && curl -qsS --noproxy '' http://{target}/"),
            0,
            "hello through the tunnel",
        ),
    ] {
        let said = run(&mut inside(script)).await;
        assert_eq!((said.code(), said.stdout.as_str()), (code, output), "{script}: {said:?}");
    }
    // What this host goes out by is for us, and would lead the command past the tunnel.
    let mut command = forward(&site);
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"] {
        command.env(name, format!("http://{}", closed()));
    }
    command.env("NO_PROXY", "*").env("no_proxy", "*").args(["--proxy", "none", "--socks", "0", "--", "sh", "-c"]);
    command.arg(format!("test -z \"$NO_PROXY$no_proxy$HTTPS_PROXY$http_proxy\" && curl -qsS http://{target}/"));
    let said = run(&mut command).await;
    assert_eq!((said.code(), said.stdout.as_str()), (0, "hello through the tunnel"), "{said:?}");
    for (program, code) in [("/nonexistent", 127), (site.path().to_str().expect("a path"), 126)] {
        let said = run(forward(&site).args(["--socks", "0", "--", program])).await;
        assert_eq!((said.code(), said.stdout.as_str()), (code, ""), "{said:?}");
    }
    // Not started where there is no tunnel.
    let (stranger, made) = (site.key("stranger"), site.path().join("made"));
    let mut command = forward(&site);
    command.args(["--socks", "0", "--identity"]).arg(&stranger).arg("--").arg("touch").arg(&made);
    assert_ne!(run(&mut command).await.code(), 0);
    assert!(!made.exists());

    // It gets our signals, and decides what becomes of them; its end is ours.
    for signal in ["TERM", "INT", "HUP", "QUIT"] {
        let file = site.path().join(format!("inside-{signal}"));
        let script = format!(
            "trap 'echo {signal} >>{file}; exit 9' {signal}; echo started >{file}; while :; do sleep 0.05; done",
            file = file.display()
        );
        let mut program = site.background(&format!("signal-{signal}"), inside(&script));
        let is = |text: &str| fs::read_to_string(&file).unwrap_or_default() == text;
        eventually("the command's start", async || is("started\n").then_some(())).await;
        program.signal(signal);
        assert_eq!(program.ended().await.code(), Some(9), "{signal}: {}", program.log());
        assert!(is(&format!("started\n{signal}\n")), "{signal}");
    }
    // While it runs, it is not alone: a command that outlives one signal gets the next one as well.
    let file = site.path().join("stubborn");
    let script = format!(
        "trap 'echo got >>{file}' TERM; echo started >{file}; while :; do sleep 0.05; done",
        file = file.display()
    );
    let mut program = site.background("stubborn", inside(&script));
    for text in ["started\n", "started\ngot\n", "started\ngot\ngot\n"] {
        eventually(text, async || (fs::read_to_string(&file).unwrap_or_default() == text).then_some(())).await;
        program.signal(if text.matches("got").count() == 2 { "HUP" } else { "TERM" });
    }
    assert_eq!(program.ended().await.code(), Some(129), "{}", program.log());
    site.stop().await;
}

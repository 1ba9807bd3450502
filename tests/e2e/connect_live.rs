//! Forwards through the CONNECT door while they live: how they break and end, in clear and in TLS, what holds nobody up, and
//! that a token is written down nowhere.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use caponier::tls::{self, ALPN_HTTP, ClientOptions, Identity};
use caponier::tunnel::stream::Stream;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::connect_door::{TOKEN_KEYS, bearing, claims, register, send, signed, tls_plan};
use crate::harness::{AGENT, Plan, Side, Site, connect, echo, echoes, eventually, free_port, listen, within};
use crate::pki::{Authority, Leaf};

/// What leads to the gateway: bare, or in TLS.
async fn way(site: &Site, in_tls: bool) -> Stream {
    let stream = connect(site.address).await;
    if in_tls { secure(site, stream, None).await } else { stream.into() }
}

/// TLS over a connection, which shows the certificate `NAME.pem` if there is a name.
async fn secure(site: &Site, stream: TcpStream, shows: Option<&str>) -> Stream {
    let ca_files = vec![site.path().join("gateway-ca.pem")];
    let file = |name: &str, ending: &str| site.path().join(format!("{name}.{ending}"));
    let identity = shows.map(|name| Identity::read(&file(name, "pem"), &file(name, "key")).expect("a certificate"));
    let config = ClientOptions { ca_files, identity, alpn: &[ALPN_HTTP] }.build().expect("a client");
    let name = "localhost".parse().expect("a host");
    Stream::layered(within("TLS", tls::connect(&config, &name, stream)).await.expect("TLS"))
}

/// A tunnel to `target`.
async fn tunnel(site: &Site, in_tls: bool, token: &str, target: SocketAddr) -> Stream {
    opened(way(site, in_tls).await, &bearing(token, target)).await
}

/// The tunnel that this request is answered with.
async fn opened(mut stream: Stream, request: &str) -> Stream {
    stream.write_all(request.as_bytes()).await.expect("written");
    stream.flush().await.expect("flushed");
    let mut head = vec![0; b"HTTP/1.1 200 Connection established\r\n\r\n".len()];
    within("an answer", stream.read_exact(&mut head)).await.expect("an answer");
    assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&head));
    stream
}

/// A plan whose gateway speaks TLS, with these targets and a token for them.
async fn plan(targets: &[SocketAddr]) -> (Plan, String) {
    let (plan, _) = tls_plan().await;
    let plan = targets.iter().fold(plan, |plan, target| plan.allow(*target));
    let key = register(&plan, TOKEN_KEYS, "signer", "prov*");
    (plan, signed(&claims(), &key))
}

async fn ended(site: &Site, number: usize) -> Value {
    eventually("the end of a forward", async || {
        site.records(Side::Gateway, &json!({"event": "forward.ended"})).into_iter().nth(number)
    })
    .await
}

#[tokio::test]
async fn what_breaks_looks_broken_and_what_ends_looks_ended() {
    // Says something, and then ends, or breaks off.
    let speaks = async |mut stream: TcpStream, breaks: bool| {
        let mut word = [0; 4];
        if stream.read_exact(&mut word).await.is_err() {
            return;
        }
        drop(stream.write_all(b"an answer").await);
        // When it has been taken.
        drop(stream.read_exact(&mut word).await);
        if breaks {
            stream.set_zero_linger().expect("a reset");
        }
    };
    let breaks = listen(move |stream| speaks(stream, true)).await;
    let ends = listen(move |stream| speaks(stream, false)).await;
    // Tells how its client left.
    let (tell, mut told) = tokio::sync::mpsc::channel(4);
    let listens = listen(move |mut stream| {
        let tell = tell.clone();
        async move {
            let mut all = Vec::new();
            let how = stream.read_to_end(&mut all).await.map_err(|error| error.kind());
            drop(stream.write_all(b"received").await);
            tell.send((how.is_ok(), all)).await.expect("heard");
        }
    })
    .await;
    let (plan, token) = plan(&[breaks, ends, listens]).await;
    let site = plan.start().await;
    let mut number = 0;
    for in_tls in [false, true] {
        for (target, orderly) in [(ends, true), (breaks, false)] {
            let mut stream = tunnel(&site, in_tls, &token, target).await;
            for (word, answer) in [(b"word", &b"an answer"[..]), (b"over", b"")] {
                stream.write_all(word).await.expect("written");
                stream.flush().await.expect("flushed");
                let mut said = vec![0; answer.len()];
                within("an answer", stream.read_exact(&mut said)).await.expect("an answer");
                assert_eq!(said, answer);
            }
            let mut rest = Vec::new();
            let end = within("the end", stream.read_to_end(&mut rest)).await;
            assert_eq!((end.is_ok(), &rest[..]), (orderly, &b""[..]), "TLS: {in_tls}, orderly: {orderly}: {end:?}");
            if orderly {
                within("our end", stream.shutdown()).await.expect("an end");
            }
            let record = ended(&site, number).await;
            number += 1;
            let reason = record["reason"].as_str().expect("a reason");
            assert_eq!(reason == "eof", orderly, "TLS: {in_tls}: {record}");
            assert_eq!((&record["to_target"], &record["from_target"]), (&json!(8), &json!(9)), "{record}");
        }
        // One direction that ends by itself leaves the other.
        let mut stream = tunnel(&site, in_tls, &token, listens).await;
        stream.write_all(b"all of it").await.expect("written");
        within("the end of one direction", stream.shutdown()).await.expect("an end");
        let mut said = Vec::new();
        within("the answer", stream.read_to_end(&mut said)).await.expect("an orderly end");
        assert_eq!(said, b"received", "TLS: {in_tls}");
        assert_eq!(within("the target", told.recv()).await, Some((true, b"all of it".to_vec())), "TLS: {in_tls}");
        assert_eq!(ended(&site, number).await["reason"], "eof", "TLS: {in_tls}");
        number += 1;
        // A client that is cut off has not ended what it was sending: in TLS, not even if its socket has.
        let stream = tunnel(&site, in_tls, &token, listens).await;
        cut(stream, in_tls).await;
        let (orderly, _) = within("the target", told.recv()).await.expect("told");
        assert!(!orderly, "TLS: {in_tls}");
        assert_eq!(ended(&site, number).await["reason"], "client_gone", "TLS: {in_tls}");
        number += 1;
    }
    site.stop().await;
}

/// Ends a connection so that nobody could take it for the end of what was sent: in clear by a reset, in TLS by an end of the
/// socket that TLS was not told of.
async fn cut(stream: Stream, in_tls: bool) {
    if in_tls { drop(stream) } else { stream.reset() }
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_nobody_else_up() {
    let flood = listen(async |mut stream| while stream.write_all(&[7; 64 * 1024]).await.is_ok() {}).await;
    let target = echo().await;
    let (plan, token) = plan(&[flood, target]).await;
    let site = plan.start().await;
    let mut idle = Vec::new();
    for in_tls in [false, true] {
        // More than anybody between has room for waits for each of them.
        idle.push(tunnel(&site, in_tls, &token, flood).await);
    }
    for in_tls in [false, true] {
        for round in 0..20 {
            let stream = tunnel(&site, in_tls, &token, target).await;
            echoes(stream, format!("round {round}").repeat(1000).as_bytes()).await;
        }
    }
    // They were not given up either, and lose nothing.
    for stream in &mut idle {
        let mut some = vec![0; 4 << 20];
        within("what has waited", stream.read_exact(&mut some)).await.expect("read");
        assert!(some.iter().all(|byte| *byte == 7), "something else came");
    }
    drop(idle);
    eventually("their end", async || {
        let ended = json!({"event": "forward.ended", "reason": "client_gone", "target": flood.to_string()});
        let gone = site.records(Side::Gateway, &ended);
        (gone.len() == 2).then_some(())
    })
    .await;
    site.stop().await;
}

#[tokio::test]
async fn a_tunnel_lives_no_longer_than_the_certificate_it_rests_on() {
    let target = echo().await;
    let (plan, token) = plan(&[target]).await;
    let people = Authority::new(plan.path(), "people");
    let (name, day) = ("caponier://acme/principals/provisioner", Duration::from_secs(24 * 3600));
    people.sign("person", &Leaf::new(name, 1));
    people.sign("other", &Leaf::new(name, 2));
    let folder = plan.registry().folder("acme/client-ca");
    fs::create_dir_all(&folder).expect("a folder");
    let revoke = |serials: &[u64]| {
        fs::write(folder.join(".people.crl"), people.revoke("people", serials, SystemTime::now() + day))
            .expect("written");
        fs::rename(folder.join(".people.crl"), folder.join("people.crl")).expect("renamed");
    };
    fs::write(folder.join("people.pem"), people.pem()).expect("written");
    revoke(&[99]);
    plan.registry().about("acme", "client_auth = \"loose\"");
    let port = free_port();
    let listener = format!("[[listener]]\naddress = \"127.0.0.1:{port}\"\nclient_auth = \"loose\"");
    let mut site = plan.gateway_setting(&listener).start().await;
    site.address = SocketAddr::from(([127, 0, 0, 1], port));
    let alone = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nCaponier-Agent: {AGENT}\r\n\r\n");
    let with_token = bearing(&token, target);
    let come = async |shows: Option<&str>| secure(&site, connect(site.address).await, shows).await;
    let mut ends =
        [opened(come(Some("person")).await, &alone).await, opened(come(Some("person")).await, &with_token).await];
    let mut stays = [
        opened(come(Some("other")).await, &alone).await,
        opened(come(Some("other")).await, &with_token).await,
        opened(come(None).await, &with_token).await,
    ];
    for stream in ends.iter_mut().chain(&mut stays) {
        echoes(stream, b"while it counts").await;
    }
    revoke(&[99, 1]);
    for stream in &mut ends {
        let mut rest = Vec::new();
        let end = within("the end", stream.read_to_end(&mut rest)).await;
        assert!(end.is_err() && rest.is_empty(), "{end:?}");
    }
    let gone = json!({"event": "forward.ended", "door": "connect", "reason": "revoked"});
    eventually("their ends", async || (site.records(Side::Gateway, &gone).len() == 2).then_some(())).await;
    for stream in &mut stays {
        echoes(stream, b"goes on").await;
    }
    for (request, status) in [(&alone, 407), (&with_token, 403)] {
        let mut stream = come(Some("person")).await;
        stream.write_all(request.as_bytes()).await.expect("written");
        stream.flush().await.expect("flushed");
        let mut said = String::new();
        within("an answer", stream.read_to_string(&mut said)).await.expect("an orderly end");
        assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{said}");
    }
    let refused = json!({"event": "auth.refused", "door": "connect", "reason": "client_certificate_revoked"});
    eventually("both refusals", async || (site.records(Side::Gateway, &refused).len() == 2).then_some(())).await;
    drop((ends, stays));
    site.stop().await;
}

#[tokio::test]
async fn a_tunnel_in_tls_is_whose_the_balancers_header_says_and_ends_with_its_network() {
    const KEPT: &str = "192.0.2.7";
    const DROPPED: &str = "198.51.100.7";
    let target = echo().await;
    let (plan, token) = plan(&[target]).await;
    let mut site = plan.start().await;
    let plain = fs::read_to_string(site.config(Side::Gateway)).expect("a configuration");
    let behind = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let with = |plain: &str, networks: &str| {
        let from = "proxy_protocol_from = [\"127.0.0.1/32\"]";
        format!("{plain}\n[[listener]]\naddress = \"{behind}\"\n{from}\naccept_from = [{networks}]\n")
    };
    let (both, one) = (format!("\"{KEPT}/32\", \"{DROPPED}/32\""), format!("\"{KEPT}/32\""));
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    // The first listener stays where the agent looks for it.
    let plain = plain.replace("127.0.0.1:0", &site.address.to_string());
    fs::write(site.config(Side::Gateway), with(&plain, &both)).expect("written");
    site.start_gateway_as_written().await;
    site.program(Side::Gateway).says(" linked ").await;
    let come = async |client: &str| {
        let mut stream = connect(behind).await;
        let header = format!("PROXY TCP4 {client} 127.0.0.1 40000 443\r\n");
        stream.write_all(header.as_bytes()).await.expect("written");
        opened(secure(&site, stream, None).await, &bearing(&token, target)).await
    };
    let (mut kept, mut dropped) = (come(KEPT).await, come(DROPPED).await);
    for (stream, client) in [(&mut kept, KEPT), (&mut dropped, DROPPED)] {
        stream.write_all(b"word").await.expect("written");
        stream.flush().await.expect("flushed");
        within("the echo", stream.read_exact(&mut [0; 4])).await.expect("the echo");
        let like = json!({"event": "forward.open", "client": format!("{client}:40000"), "door": "connect"});
        site.record(Side::Gateway, like.clone()).await;
    }
    fs::write(site.config(Side::Gateway), with(&plain, &one)).expect("written");
    site.program(Side::Gateway).signal("HUP");
    let mut rest = Vec::new();
    let end = within("the end of what may come no more", dropped.read_to_end(&mut rest)).await;
    assert!(end.is_err(), "a break, no end: {rest:?}");
    let like = json!({"event": "forward.ended", "reason": "revoked", "client": format!("{DROPPED}:40000")});
    site.record(Side::Gateway, like).await;
    kept.write_all(b"more").await.expect("written");
    kept.flush().await.expect("flushed");
    within("the echo", kept.read_exact(&mut [0; 4])).await.expect("what may come goes on");
    site.stop().await;
}

#[tokio::test]
async fn a_drain_lets_live_tunnels_end_and_tells_who_comes_late() {
    let target = echo().await;
    let (plan, token) = plan(&[target]).await;
    let mut site = plan.drain(Side::Gateway, 20).start().await;
    let mut live = tunnel(&site, true, &token, target).await;
    // Accepted before the drain, and heard in it.
    let mut late = connect(site.address).await;
    late.write_all(b"CONNECT").await.expect("written");
    // Whoever comes after it is served, so that this one has been accepted.
    drop(tunnel(&site, false, &token, target).await);
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).says("drain").await;
    late.write_all(&bearing(&token, target).as_bytes()["CONNECT".len()..]).await.expect("written");
    let mut said = String::new();
    within("an answer", late.read_to_string(&mut said)).await.expect("an orderly end");
    assert!(said.starts_with("HTTP/1.1 503 ") && said.contains("\"draining\""), "{said}");
    echoes(&mut live, b"goes on").await;
    within("our end", live.shutdown()).await.expect("an end");
    let mut rest = Vec::new();
    within("its end", live.read_to_end(&mut rest)).await.expect("an orderly end");
    let status = within("the gateway's end", site.program(Side::Gateway).ended()).await;
    assert_eq!(status.code(), Some(0));
    let denied =
        site.records(Side::Gateway, &json!({"event": "forward.denied", "door": "connect", "reason": "draining"}));
    assert_eq!(denied.len(), 1, "{denied:?}");
    let ended = site.records(Side::Gateway, &json!({"event": "forward.ended", "reason": "eof"}));
    assert_eq!(ended.last().map(|it| it["to_target"].clone()), Some(json!(7)), "{ended:?}");
    site.stop_agent().await;
}

#[tokio::test]
async fn a_token_is_written_down_nowhere_however_much_is_logged() {
    let target = echo().await;
    let (plan, token) = plan(&[target]).await;
    let mut site = plan.gateway_variable("CAPONIER_LOG", "trace").start().await;
    let basic = BASE64_STANDARD.encode(format!("caponier:{token}"));
    let as_basic = bearing(&token, target).replace(&format!("Bearer {token}"), &format!("Basic {basic}"));
    echoes(tunnel(&site, true, &token, target).await, b"in TLS").await;
    echoes(tunnel(&site, false, &token, target).await, b"in clear").await;
    let answer = send(site.address, as_basic.as_bytes()).await;
    assert_eq!(answer.status, 200, "{}", answer.head);
    echoes(answer.stream, b"as Basic").await;
    let denied: SocketAddr = "127.0.0.1:1".parse().expect("an address");
    for (case, request, status) in [
        ("another target", bearing(&token, denied), 403),
        ("another agent", bearing(&token, target).replace("\r\n\r\n", "\r\nCaponier-Agent: acme/x\r\n\r\n"), 403),
        ("longer", bearing(&format!("{token}AAAA"), target), 407),
        ("another user", as_basic.replace(&basic, &BASE64_STANDARD.encode(format!("x:{token}"))), 407),
        ("another scheme", as_basic.replace("Basic", "Digest"), 407),
        ("a control character", bearing(&format!("{token}\0"), target), 400),
        ("in the target", format!("CONNECT caponier:{token}@h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n"), 400),
        ("in a path", format!("GET /{token} HTTP/1.1\r\nHost: h\r\n\r\n"), 404),
        ("in the name of a host", format!("CONNECT h:1 HTTP/1.1\r\nHost: {token} x\r\n\r\n"), 400),
    ] {
        let answer = send(site.address, request.as_bytes()).await;
        assert_eq!(answer.status, status, "{case}: {}", answer.head);
    }
    // Half of a request, and in the place of SSH's line.
    for bytes in [&as_basic[..as_basic.len() - 2], &format!("SSH-2.0-{token}\r\n"), &token] {
        let mut stream = connect(site.address).await;
        stream.write_all(bytes.as_bytes()).await.expect("written");
        stream.shutdown().await.expect("an end");
        let mut said = Vec::new();
        drop(within("the end", stream.read_to_end(&mut said)).await);
    }
    assert!(site.program(Side::Gateway).log().contains(" DEBUG "), "it logs less than it was told to");
    let secret = token.rsplit('.').next().expect("a signature");
    // The middle of what is encoded, wherever in it the token begins.
    let encoded = &basic[basic.len() / 2..basic.len() - 8];
    // So that all of it has been written.
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).ended().await;
    for file in everything(site.path()) {
        let bytes = fs::read(&file).expect("a file");
        let text = String::from_utf8_lossy(&bytes);
        for part in [&secret[..32], &secret[secret.len() - 32..], encoded] {
            assert!(!text.contains(part), "{} has a token: {}", file.display(), around(&text, part));
        }
        // Bytes that were written as numbers.
        let numbers: Vec<String> = secret.bytes().take(12).map(|byte| byte.to_string()).collect();
        assert!(!text.contains(&numbers.join(", ")), "{} has a token, as numbers", file.display());
    }
    site.stop_agent().await;
}

fn around(text: &str, part: &str) -> String {
    text.lines().find(|line| line.contains(part)).unwrap_or_default().chars().take(300).collect()
}

/// All files in a folder and its folders.
fn everything(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let kind = entry.file_type().expect("a type");
        if kind.is_dir() {
            files.extend(everything(&entry.path()));
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    files
}

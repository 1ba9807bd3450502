//! TLS at the proxy: who gets in, what can be read on which leg, what is renewed, and what makes it refuse to start.

use std::fs;
use std::time::{Duration, SystemTime};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::place::{Place, ask, head};
use super::upstream::{Authority, NAME, Serves, Tap, Upstream, shake, shake_for};
use crate::harness::{Site, caponier, connect, echo, echoes, eventually, free_port, read_to_end, run, within};
use crate::squid::Squid;

const SECRET: &[u8] = b"what nobody on the way may read";

/// The authorities of a scene: of servers, of the proxy's clients, of the upstream's clients.
struct Cast {
    servers: Authority,
    clients: Authority,
    proxies: Authority,
}

impl Cast {
    /// In the folder of `place`: the CAs, the proxy's certificates, and a client's for `agent-a`.
    fn new(place: &Place) -> Self {
        let folder = place.path();
        let cast = Self {
            servers: Authority::new("servers"),
            clients: Authority::new("clients"),
            proxies: Authority::new("proxies"),
        };
        cast.servers.write(&folder.join("servers-ca.pem"));
        cast.clients.write(&folder.join("clients-ca.pem"));
        cast.servers.issue(folder, "front", "proxy.internal", 2);
        cast.clients.issue(folder, "a", "agent-a", 3);
        cast.proxies.issue(folder, "back", "the-proxy", 4);
        cast
    }
}

fn upstream(to: impl std::fmt::Display, rest: &str) -> String {
    format!(
        "[[upstream]]\nname = \"control\"\nto = \"{to}\"\nserver_name = \"{NAME}\"\ntls_ca_file = \"servers-ca.pem\"\n{rest}"
    )
}

const BACK: &str = "tls_certificate = \"back.pem\"\ntls_key = \"back.key\"\n";

fn listener(mode: &str, rest: &str) -> String {
    format!("[[listener]]\naddress = \"127.0.0.1:0\"\nmode = \"{mode}\"\nupstream = \"control\"\n{rest}")
}

fn front(names: &str, rest: &str) -> String {
    format!(
        "tls_certificate = \"front.pem\"\ntls_key = \"front.key\"\nclient_ca = [\"clients-ca.pem\"]\nclient_names = [{names}]\n\
         {rest}"
    )
}

#[tokio::test]
async fn with_mutual_tls_both_legs_are_ciphertext_and_each_end_sees_its_own_certificate() {
    let mut place = Place::new();
    let cast = Cast::new(&place);
    let control = Upstream::start(place.path(), &cast.servers, Some(&cast.proxies), Serves::Echo).await;
    let outer = Tap::before(control.address).await;
    place.write("", &format!("{}{}", upstream(outer.address, BACK), listener("mutual", &front("\"agent-a\"", ""))));
    place.start(1).await;
    let inner = Tap::before(place.listeners[0]).await;
    let stream = connect(inner.address).await;
    let mut stream = shake(place.path(), "servers-ca.pem", Some("a"), "proxy.internal", stream).await.expect("TLS");
    stream.write_all(SECRET).await.expect("written");
    stream.flush().await.expect("flushed");
    let mut back = vec![0; SECRET.len()];
    within("an echo", stream.read_exact(&mut back)).await.expect("read");
    assert_eq!(back, SECRET);
    assert!(inner.length() > SECRET.len() && outer.length() > SECRET.len());
    assert!(!inner.heard(SECRET) && !outer.heard(SECRET), "in clear on the way");
    let [Some(shown)] = &control.shown()[..] else { panic!("{:?}", control.shown()) };
    assert_ne!(shown, &fs::read(place.path().join("a.pem")).expect("a certificate")[..].into());
    stream.shutdown().await.expect("ended");
    assert_eq!(
        within("the end", async {
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.map(|_| rest)
        })
        .await
        .expect("a clean end"),
        b""
    );
    let end = place.record(json!({"event": "forward.ended", "reason": "eof", "door": "mutual"})).await;
    assert_eq!((&end["to_target"], &end["from_target"]), (&json!(SECRET.len()), &json!(SECRET.len())), "{end}");
    assert!(end["client_certificate"].as_str().is_some_and(|mark| mark.starts_with("SHA256:")), "{end}");
    place.stop().await;
}

#[tokio::test]
async fn who_speaks_http2_alone_is_passed_on_with_mutual_tls_and_told_at_once_elsewhere() {
    let mut place = Place::new();
    let cast = Cast::new(&place);
    let folder = place.path().to_owned();
    let control = Upstream::start(&folder, &cast.servers, Some(&cast.proxies), Serves::Http2).await;
    let reverse = listener("reverse", "tls_certificate = \"front.pem\"\ntls_key = \"front.key\"\n");
    let listeners = format!("{}{reverse}{}", listener("mutual", &front("\"agent-a\"", "")), listener("reverse", ""));
    place.write("", &format!("{}{listeners}", upstream(control.address, BACK)));
    place.start(3).await;
    let come = async |alpn: &'static [&'static [u8]], at: usize| {
        let stream = connect(place.listeners[at]).await;
        let identity = (at == 0).then_some("a");
        shake_for(alpn, &folder, "servers-ca.pem", identity, "proxy.internal", stream).await
    };
    let mut stream = come(&[b"h2"], 0).await.expect("TLS");
    assert_eq!(stream.alpn(), Some(&b"h2"[..]));
    echoes(&mut stream, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    drop(stream);
    // Whoever can do without it does; that the upstream cannot is then between the two.
    let stream = come(&[b"h2", b"http/1.1"], 0).await.expect("TLS");
    assert_eq!(stream.alpn(), Some(&b"http/1.1"[..]));
    drop(stream);
    // A reverse proxy says so in the handshake, before anything was sent in vain.
    let refused = come(&[b"h2"], 1).await.expect_err("no such protocol there");
    assert!(format!("{refused:?}").contains("NoApplicationProtocol"), "{refused:?}");
    place.record(json!({"event": "auth.refused", "door": "reverse", "reason": "tls_failed"})).await;
    let stream = come(&[b"h2", b"http/1.1"], 1).await.expect("TLS");
    assert_eq!(stream.alpn(), Some(&b"http/1.1"[..]));
    drop(stream);
    // In clear there is no handshake: the preface of HTTP/2 ends the connection, and is on record.
    let mut clear = connect(place.listeners[2]).await;
    clear.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("written");
    drop(read_to_end(&mut clear).await);
    place.record(json!({"event": "auth.refused", "door": "reverse", "reason": "malformed_head"})).await;
    place.stop().await;
}

#[tokio::test]
async fn no_certificate_but_a_listed_one_gets_through() {
    let mut place = Place::new();
    let cast = Cast::new(&place);
    let folder = place.path().to_owned();
    cast.clients.issue(&folder, "b", "agent-b", 10);
    cast.clients.issue(&folder, "revoked", "agent-a", 11);
    cast.clients.issue_until(&folder, "expired", "agent-a", 12, SystemTime::now() - Duration::from_secs(60));
    cast.clients.issue_until(&folder, "early", "agent-a", 13, SystemTime::now() + Duration::from_secs(3 * 3600));
    cast.servers.issue(&folder, "foreign", "agent-a", 14);
    cast.clients.revoke(&folder.join("clients.crl"), &[11]);
    let control = Upstream::start(&folder, &cast.servers, Some(&cast.proxies), Serves::Echo).await;
    let of = |name: &str| listener("mutual", &front(&format!("\"{name}\""), "client_crl = [\"clients.crl\"]\n"));
    place.write("", &format!("{}{}{}", upstream(control.address, BACK), of("agent-a"), of("agent-b")));
    place.start(2).await;
    for (file, at, reason) in [
        (None, 0, "client_certificate_missing"),
        (Some("b"), 0, "client_certificate_other_name"),
        (Some("a"), 1, "client_certificate_other_name"),
        (Some("revoked"), 0, "client_certificate_revoked"),
        (Some("expired"), 0, "client_certificate_expired"),
        (Some("early"), 0, "client_certificate_not_yet_valid"),
        (Some("foreign"), 0, "client_certificate_unknown_ca"),
    ] {
        let before = place.records(&json!({"event": "auth.refused", "reason": reason})).len();
        let stream = connect(place.listeners[at]).await;
        if let Ok(mut stream) = shake(&folder, "servers-ca.pem", file, "proxy.internal", stream).await {
            drop(stream.write_all(b"let me in").await);
            drop(stream.flush().await);
            let mut got = Vec::new();
            drop(within("the end", stream.read_to_end(&mut got)).await);
            assert_eq!(got, b"", "{file:?}");
        }
        eventually(&format!("{file:?} at {at}: {reason}"), async || {
            (place.records(&json!({"event": "auth.refused", "reason": reason})).len() > before).then_some(())
        })
        .await;
    }
    assert_eq!(control.shown().len(), 0, "the upstream was reached");
    assert_eq!(place.records(&json!({"event": "forward.open"})).len(), 0);
    for (file, at) in [("a", 0), ("b", 1)] {
        let stream = connect(place.listeners[at]).await;
        echoes(shake(&folder, "servers-ca.pem", Some(file), "proxy.internal", stream).await.expect("TLS"), b"in").await;
    }
    // One that is revoked while it is used.
    let stream = connect(place.listeners[0]).await;
    let mut stream = shake(&folder, "servers-ca.pem", Some("a"), "proxy.internal", stream).await.expect("TLS");
    stream.write_all(b"x").await.expect("written");
    stream.flush().await.expect("flushed");
    within("an echo", stream.read_u8()).await.expect("read");
    cast.clients.revoke(&folder.join("clients.crl"), &[11, 3]);
    drop(within("the cut", stream.read_to_end(&mut Vec::new())).await);
    place.record(json!({"event": "forward.ended", "reason": "revoked"})).await;
    place.stop().await;
}

#[tokio::test]
async fn certificates_are_renewed_on_disk_and_what_runs_goes_on() {
    let mut place = Place::new();
    let cast = Cast::new(&place);
    let folder = place.path().to_owned();
    let control = Upstream::start(&folder, &cast.servers, Some(&cast.proxies), Serves::Echo).await;
    place.write("", &format!("{}{}", upstream(control.address, BACK), listener("mutual", &front("\"agent-a\"", ""))));
    place.start(1).await;
    let come = async || {
        let stream = connect(place.listeners[0]).await;
        shake(&folder, "servers-ca.pem", Some("a"), "proxy.internal", stream).await
    };
    let mut before = come().await.expect("TLS");
    echoes(&mut before, b"before").await;
    let renewed = cast.proxies.issue(&folder, "back", "the-proxy-renewed", 20);
    let others = Authority::new("other servers");
    others.write(&folder.join("others-ca.pem"));
    others.issue(&folder, "front", "proxy.internal", 21);
    eventually("the new certificates", async || {
        let stream = connect(place.listeners[0]).await;
        let mut stream = shake(&folder, "others-ca.pem", Some("a"), "proxy.internal", stream).await.ok()?;
        echoes(&mut stream, b"renewed").await;
        (control.shown().last().expect("a client").as_ref() == Some(&renewed)).then_some(())
    })
    .await;
    assert!(come().await.is_err(), "the old certificate is shown");
    echoes(&mut before, b"goes on").await;
    drop(before);
    place.stop().await;
}

#[tokio::test]
async fn a_reverse_proxy_alone_holds_the_certificate_and_addresses_the_upstream_by_its_name() {
    let mut place = Place::new();
    let cast = Cast::new(&place);
    let control = Upstream::start(place.path(), &cast.servers, Some(&cast.proxies), Serves::Web).await;
    let outer = Tap::before(control.address).await;
    place.write("", &format!("{}{}", upstream(outer.address, BACK), listener("reverse", "")));
    place.start(1).await;
    let inner = Tap::before(place.listeners[0]).await;
    let mut stream = connect(inner.address).await;
    let request = "GET /path?query HTTP/1.1\r\nHost: proxy.internal:7777\r\nX-Secret: what-only-two-may-read\r\n\
                   Connection: X-Mine, keep-alive\r\nX-Mine: 1\r\nProxy-Authorization: Basic eDp5\r\nX-Forwarded-For: 1.2.3.4\r\n\
                   Forwarded: for=1.2.3.4\r\nX-Real-IP: 1.2.3.4\r\nX_Forwarded_Proto: https\r\n\
                   Client-Cert: :MA==:\r\nClient_Cert_Chain: :MA==:\r\nTE: trailers\r\nUpgrade: h2c\r\n\r\n";
    let reply = head(&mut stream, request.as_bytes()).await;
    assert!(reply.starts_with("HTTP/1.1 200 ") && !reply.to_ascii_lowercase().contains("keep-alive"), "{reply}");
    let length = reply.to_ascii_lowercase().split_once("content-length: ").expect("a length").1.to_owned();
    let mut body = vec![0; length.lines().next().expect("a length").parse().expect("a number")];
    within("the body", stream.read_exact(&mut body)).await.expect("read");
    let seen = String::from_utf8(body).expect("UTF-8").to_ascii_lowercase();
    assert!(seen.starts_with("get /path?query http/1.1\r\n"), "{seen}");
    assert!(seen.contains(&format!("host: {NAME}:{}\r\n", outer.address.port())), "{seen}");
    assert!(seen.contains("x-secret: what-only-two-may-read\r\n") && seen.contains("via: 1.1 caponier\r\n"), "{seen}");
    for header in ["x-mine", "proxy-", "forwarded", "x-real-ip", "client", "te:", "upgrade", "connection"] {
        assert!(!seen.contains(header), "{header}: {seen}");
    }
    assert!(inner.heard(b"what-only-two-may-read") && !outer.heard(b"what-only-two-may-read"));
    // A body in chunks, and one of a known length, on the same connection.
    stream.write_all(b"POST /upload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n").await.expect("written");
    stream.write_all(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n").await.expect("written");
    let mut answer = head(&mut stream, b"").await;
    let mut digits = [0; 2];
    within("the length", stream.read_exact(&mut digits)).await.expect("read");
    assert!(answer.starts_with("HTTP/1.1 200 ") && &digits == b"11", "{answer}{digits:?}");
    let megabyte = vec![b'x'; 1_000_000];
    stream.write_all(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n").await.expect("written");
    stream.write_all(&megabyte).await.expect("written");
    answer = head(&mut stream, b"").await;
    let mut digits = [0; 7];
    within("the length", stream.read_exact(&mut digits)).await.expect("read");
    assert!(&digits == b"1000000", "{answer}{digits:?}");
    assert_eq!(place.records(&json!({"event": "forward.open"})).len(), 1, "one connection, one entry");
    // Of two lengths the chunks count, and what may have been smuggled behind them is not taken for a request.
    let two_lengths = "POST /upload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n\
                       2\r\nhi\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
    let said = ask(&mut stream, two_lengths).await;
    assert!(said.ends_with("\r\n\r\n2") && !said.contains("smuggled"), "{said}");
    drop(stream);
    let end = place.record(json!({"event": "forward.ended", "door": "reverse", "reason": "eof"})).await;
    assert!(end["to_target"].as_u64().is_some_and(|count| count > 1_000_000), "{end}");
    assert!(control.shown().iter().all(Option::is_some));
    place.stop().await;
}

#[tokio::test]
async fn a_reverse_proxy_goes_nowhere_else_and_changes_protocols_with_care() {
    let mut place = Place::new();
    let cast = Cast::new(&place);
    let control = Upstream::start(place.path(), &cast.servers, Some(&cast.proxies), Serves::Web).await;
    place.write("drain_s = 60", &format!("{}{}", upstream(control.address, BACK), listener("reverse", "")));
    place.start(1).await;
    for (request, status) in [
        ("GET http://169.254.169.254/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", 400),
        ("CONNECT elsewhere.example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        ("nonsense\r\n\r\n", 400),
    ] {
        let said = ask(&mut connect(place.listeners[0]).await, request).await;
        assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {said}");
    }
    assert_eq!(place.records(&json!({"event": "forward.open"})).len(), 0);
    // What follows a request in the same segment is another request of the same client, and nobody else's.
    let two = "GET /one HTTP/1.1\r\nHost: x\r\n\r\nGET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let said = ask(&mut connect(place.listeners[0]).await, two).await;
    assert!(said.contains("GET /one ") && said.contains("GET /last "), "{said}");
    let mut stream = connect(place.listeners[0]).await;
    let socket = "GET /socket HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\nsoon";
    let reply = head(&mut stream, socket.as_bytes()).await.to_ascii_lowercase();
    assert!(
        reply.starts_with("http/1.1 101 ") && reply.contains("upgrade: websocket") && reply.contains("x-kept: 1"),
        "{reply}"
    );
    let mut first = [0; 9];
    within("what was said at once", stream.read_exact(&mut first)).await.expect("read");
    assert_eq!(&first, b"firstsoon");
    // It outlives the beginning of a drain, like all that runs.
    place.program().signal("TERM");
    eventually("nobody listens", async || tokio::net::TcpStream::connect(place.listeners[0]).await.err()).await;
    echoes(&mut stream, b"still a socket").await;
    stream.shutdown().await.expect("ended");
    drop(read_to_end(stream).await);
    assert_eq!(place.program().ended().await.code(), Some(0));
    crate::harness::assert_balanced(crate::harness::Side::Gateway, &place.trail());
}

#[tokio::test]
async fn an_upstream_that_wants_a_certificate_that_is_not_there_is_not_served() {
    let mut place = Place::new();
    let cast = Cast::new(&place);
    let control = Upstream::start(place.path(), &cast.servers, Some(&cast.proxies), Serves::Web).await;
    let tables = |to: std::net::SocketAddr, rest: &str| format!("{}{}", upstream(to, rest), listener("reverse", ""));
    place.write("", &tables(control.address, ""));
    let said = run(caponier().arg("proxy").arg("--config").arg(place.config())).await;
    assert_eq!(said.code(), 2, "{said:?}");
    let words = format!("upstream control ({}) asks for a client certificate, and none is configured", control.address);
    assert!(said.stderr.contains(&words), "{said:?}");
    // One that could not be asked at the start is asked by each connection.
    let port = free_port();
    place.write("", &tables(([127, 0, 0, 1], port).into(), ""));
    place.start(1).await;
    place.program().says("could not ask upstream control whether it wants a client certificate").await;
    let ask_it =
        async |place: &Place| ask(&mut connect(place.listeners[0]).await, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(ask_it(&place).await.starts_with("HTTP/1.1 502 "));
    place.record(json!({"event": "forward.failed", "reason": "connect_failed"})).await;
    place.write("", &tables(control.address, ""));
    place.record(json!({"event": "config.reloaded"})).await;
    assert!(ask_it(&place).await.starts_with("HTTP/1.1 502 "));
    place.record(json!({"event": "forward.failed", "reason": "certificate_wanted"})).await;
    // Nor is one whose own certificate is not what it should be.
    place.write("", &tables(control.address, BACK).replace(NAME, "other.example.com"));
    place.record(json!({"event": "config.reloaded"})).await;
    eventually("a refusal", async || {
        drop(ask_it(&place).await);
        place.records(&json!({"event": "forward.failed", "reason": "tls_failed"})).first().cloned()
    })
    .await;
    place.stop().await;
}

#[tokio::test]
async fn what_is_not_safe_is_a_fault_and_nothing_starts() {
    let place = Place::new();
    let _cast = Cast::new(&place);
    let good =
        format!("{}{}", upstream("control.example.com:443", BACK), listener("mutual", &front("\"agent-a\"", "")));
    let bare = upstream("control.example.com:443", "");
    let check = async |tables: &str, words: &str| {
        place.write("", tables);
        let said = run(caponier().arg("check").arg(place.config())).await;
        let told = format!("{}{}", said.stdout, said.stderr);
        assert_eq!(said.code(), if words == "in order" { 0 } else { 2 }, "{words}: {told}\n{tables}");
        assert!(told.contains(words), "{words}: {told}");
        let said =
            run(caponier().arg("proxy").arg("--config").arg(place.config()).env("CAPONIER_PROXY__NOPE", "1")).await;
        assert_eq!(said.code(), 2, "{said:?}");
    };
    check(&good, "in order").await;
    // What is wrong with one upstream makes nothing of another's unknown.
    let address = upstream("10.0.0.1:443", &format!("within = [\"10.0.0.0/8\"]\n{BACK}"));
    let other = "[[upstream]]\nname = \"other\"\nto = \"other.example.com:443\"\n";
    place.write("", &format!("{address}{other}{}", listener("mutual", &front("\"agent-a\"", ""))));
    let said = run(caponier().arg("check").arg(place.config())).await;
    let told = format!("{}{}", said.stdout, said.stderr);
    assert!(told.contains("within belongs to a name") && !told.contains("unknown key"), "{told}");
    check(&good.replace("client_ca = [\"clients-ca.pem\"]\n", ""), "client_auth is strict, and no CA is named").await;
    check(&good.replace("client_names = [\"agent-a\"]\n", ""), "say in client_names whom it must name").await;
    check(&good.replace("client_ca", "client_auth = \"loose\"\nclient_ca"), "strict is the only choice").await;
    check(
        &good.replace("tls_certificate = \"front.pem\"\ntls_key = \"front.key\"\n", ""),
        "give tls_certificate and tls_key too",
    )
    .await;
    check(&good.replace(BACK, ""), "shows the proxy's own certificate to the upstream").await;
    check(&good.replace("upstream = \"control\"", ""), "upstream: this key is missing").await;
    check(&good.replace("upstream = \"control\"", "upstream = \"nobody\""), "has the name nobody").await;
    check(&good.replace("127.0.0.1:0", "0.0.0.0:7777"), "give accept_from").await;
    let beyond = |rest: &str| format!("{bare}{}", listener("reverse", rest).replace("127.0.0.1:0", "0.0.0.0:7777"));
    check(&beyond("accept_from = [\"10.0.0.0/8\"]\n"), "in clear beyond loopback").await;
    check(&beyond("accept_from = [\"10.0.0.0/8\"]\nplain = true\n"), "in order").await;
    check(&bare, "no [[listener]]").await;
    check(&listener("reverse", ""), "no [[upstream]]").await;
    check(&good.replace("back.key", "front.key"), "is not that of the certificate").await;
    check(&good.replace("mode = \"mutual\"", "mode = \"both\""), "mutual").await;
    check(&format!("{good}plain = true\n"), "choose one of the two").await;
}

#[tokio::test]
async fn in_a_tunnel_the_proxy_reads_nothing() {
    let mut place = Place::new();
    let cast = Cast::new(&place);
    let control = Upstream::start(place.path(), &cast.servers, Some(&cast.clients), Serves::Echo).await;
    let outer = Tap::before(control.address).await;
    let to = outer.address;
    place.write("", &format!("[[upstream]]\nname = \"control\"\nto = \"{to}\"\n[[listener]]\naddress = \"127.0.0.1:0\"\nmode = \"connect\"\nupstreams = [\"control\"]\n"));
    place.start(1).await;
    let inner = Tap::before(place.listeners[0]).await;
    let mut stream = connect(inner.address).await;
    assert!(head(&mut stream, format!("CONNECT {to} HTTP/1.1\r\n\r\n").as_bytes()).await.starts_with("HTTP/1.1 200 "));
    let stream = shake(place.path(), "servers-ca.pem", Some("a"), NAME, stream).await.expect("TLS end to end");
    echoes(stream, SECRET).await;
    // The proxy has what both legs have, and no key to either.
    assert!(inner.heard(format!("CONNECT {to}").as_bytes()));
    assert!(!inner.heard(SECRET) && !outer.heard(SECRET), "in clear on the way");
    assert!(control.shown()[0].is_some(), "the client's own certificate came through");
    let end = place.record(json!({"event": "forward.ended"})).await;
    assert_eq!(end["client_certificate"], json!(null), "{end}");
    place.stop().await;
}

#[tokio::test]
async fn upstreams_are_reached_through_a_proxy_on_the_way() {
    let squid = Squid::open().await;
    let mut place = Place::new();
    let cast = Cast::new(&place);
    let control = Upstream::start(place.path(), &cast.servers, Some(&cast.proxies), Serves::Echo).await;
    let bare = echo().await;
    let tables = format!(
        "{}{}[[upstream]]\nname = \"bare\"\nto = \"{bare}\"\n[[listener]]\naddress = \"127.0.0.1:0\"\nmode = \"connect\"\n\
         upstreams = [\"bare\"]\n",
        upstream(control.address, BACK),
        listener("mutual", &front("\"agent-a\"", ""))
    );
    place.write(&format!("proxy = \"http://{}\"", squid.address), &tables);
    place.start(2).await;
    let stream = connect(place.listeners[0]).await;
    echoes(shake(place.path(), "servers-ca.pem", Some("a"), "proxy.internal", stream).await.expect("TLS"), b"mutual")
        .await;
    let mut stream = connect(place.listeners[1]).await;
    assert!(
        head(&mut stream, format!("CONNECT {bare} HTTP/1.1\r\n\r\n").as_bytes()).await.starts_with("HTTP/1.1 200 ")
    );
    echoes(&mut stream, b"bare").await;
    drop(stream);
    place.stop().await;
    for to in [control.address, bare] {
        eventually("squid's record", async || squid.access().contains(&format!("CONNECT {to} ")).then_some(())).await;
    }
}

#[tokio::test]
async fn an_agent_takes_it_for_its_way_out() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start_gateway().await;
    let mut place = Place::new();
    let gateway = site.address;
    place.write("drain_s = 1", &format!("[[upstream]]\nname = \"gateway\"\nto = \"{gateway}\"\n[[listener]]\naddress = \"127.0.0.1:0\"\nmode = \"connect\"\nupstreams = [\"gateway\"]\n"));
    place.start(1).await;
    site.change_agent(&format!("proxy = \"http://{}\"", place.listeners[0]), &[]);
    site.restart_agent().await;
    site.linked().await;
    echoes(connect(site.doors[0]).await, b"by way of the proxy").await;
    place.record(json!({"event": "forward.open", "target": gateway.to_string(), "rule": "gateway"})).await;
    site.stop().await;
    place.record(json!({"event": "forward.ended"})).await;
    place.stop().await;
}

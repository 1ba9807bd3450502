//! The mode `connect`.

use caponier::limits;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::place::{Place, ask, head};
use crate::harness::{connect, echo, echoes, eventually, free_port, read_to_end, within};

/// A proxy with one listener, which leads to `control` alone.
async fn to(control: impl std::fmt::Display, settings: &str) -> Place {
    let mut place = Place::new();
    place.write(settings, &tables(control));
    place.start(1).await;
    place
}

fn tables(control: impl std::fmt::Display) -> String {
    format!(
        "[[upstream]]\nname = \"control\"\nto = \"{control}\"\n\
         [[upstream]]\nname = \"other\"\nto = \"other.example.com:443\"\n\
         [[listener]]\naddress = \"127.0.0.1:0\"\nmode = \"connect\"\nupstreams = [\"control\"]\n"
    )
}

#[tokio::test]
async fn what_is_not_listed_is_refused_and_recorded() {
    let target = echo().await;
    let place = to(target, "").await;
    for (asked, status, reason) in [
        ("other.example.com:443", 403, "upstream_not_listed"),
        ("127.0.0.1:1", 403, "upstream_not_listed"),
        ("169.254.169.254:80", 403, "upstream_not_listed"),
        (&format!("localhost:{}", target.port()), 403, "upstream_not_listed"),
        (&format!("0x7f.0.0.1:{}", target.port()), 403, "malformed_target"),
        (&format!("x@{target}"), 403, "malformed_target"),
        (&format!("127.0.0.1.:{}", target.port()), 403, "malformed_target"),
    ] {
        let mut stream = connect(place.listeners[0]).await;
        let said = ask(&mut stream, &format!("CONNECT {asked} HTTP/1.1\r\nHost: {asked}\r\n\r\n")).await;
        assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{asked}: {said}");
        assert!(said.ends_with("\r\n\r\nnot allowed\n"), "{asked}: {said}");
        place.record(json!({"event": "forward.denied", "target": asked, "reason": reason, "door": "connect"})).await;
    }
    assert_eq!(place.records(&json!({"event": "forward.open"})).len(), 0);
    place.stop().await;
}

#[tokio::test]
async fn what_is_no_connect_request_is_refused_within_the_deadline() {
    let target = echo().await;
    let place = to(target, "").await;
    let asks = |rest: &str| format!("CONNECT {target} HTTP/1.1\r\n{rest}");
    for (request, status, text) in [
        (format!("GET http://{target}/ HTTP/1.1\r\nHost: {target}\r\n\r\n"), "405", "takes CONNECT alone"),
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "405", "takes CONNECT alone"),
        ("CONNECT / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "400", ""),
        (asks(&format!("Host: {target}\r\nHost: x\r\n\r\n")), "400", "malformed"),
        (asks("Content-Length: 5\r\n\r\nhello"), "400", "malformed"),
        (asks("Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), "400", "malformed"),
        (asks("Host : x\r\n\r\n"), "400", ""),
        (asks("X: a\r\n b\r\n\r\n"), "400", ""),
        ("\u{1}\u{2}\u{3}\r\n\r\n".to_owned(), "400", ""),
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n".to_owned(), "400", ""),
        (asks(&"X: y\r\n".repeat(limits::HEADERS_MAX + 1)) + "\r\n", "431", ""),
    ] {
        let mut stream = connect(place.listeners[0]).await;
        let said = ask(&mut stream, &request).await;
        assert!(said.starts_with(&format!("HTTP/1.1 {status} ")) && said.contains(text), "{request:?}: {said}");
    }
    // A head without an end, and one that comes too slowly.
    let mut huge = connect(place.listeners[0]).await;
    let long = format!("{}X: {}", asks(""), "y".repeat(2 * limits::HEAD_MAX));
    drop(huge.write_all(long.as_bytes()).await);
    drop(read_to_end(&mut huge).await);
    let mut slow = connect(place.listeners[0]).await;
    slow.write_all(b"CONNECT ").await.expect("written");
    let silent = connect(place.listeners[0]).await;
    // Others are served meanwhile.
    let mut stream = connect(place.listeners[0]).await;
    assert!(head(&mut stream, asks("\r\n").as_bytes()).await.starts_with("HTTP/1.1 200 "));
    echoes(&mut stream, b"unaffected").await;
    drop(stream);
    drop(read_to_end(&mut slow).await);
    drop(read_to_end(silent).await);
    place.record(json!({"event": "auth.refused", "reason": "slow_head"})).await;
    assert_eq!(place.records(&json!({"event": "forward.open"})).len(), 1);
    place.stop().await;
}

#[tokio::test]
async fn bytes_go_through_as_they_are_and_none_is_lost_at_the_seam() {
    let target = echo().await;
    let place = to(target, "").await;
    let mut stream = connect(place.listeners[0]).await;
    // What a client sends along with its request belongs to the tunnel.
    let request =
        format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: Basic eDp5\r\n\r\nearly");
    let reply = head(&mut stream, request.as_bytes()).await;
    assert_eq!(reply, "HTTP/1.1 200 OK\r\n\r\n");
    let mut early = [0; 5];
    within("what was early", stream.read_exact(&mut early)).await.expect("read");
    assert_eq!(&early, b"early");
    let bytes: Vec<u8> = (0..2_000_000_u32).map(|at| (at % 251) as u8).collect();
    let (mut read, mut write) = stream.split();
    let writing = async {
        write.write_all(&bytes).await.expect("written");
        write.shutdown().await.expect("ended");
    };
    let reading = async {
        let mut back = Vec::new();
        read.read_to_end(&mut back).await.expect("read");
        back
    };
    let ((), back) = within("all of it", async { tokio::join!(writing, reading) }).await;
    assert!(back == bytes, "what came back is something else");
    drop(stream);
    let end = place.record(json!({"event": "forward.ended"})).await;
    assert_eq!((&end["to_target"], &end["from_target"]), (&json!(2_000_005), &json!(2_000_005)), "{end}");
    assert_eq!((&end["reason"], &end["rule"], &end["door"]), (&json!("eof"), &json!("control"), &json!("connect")));
    assert_eq!(end["target"], json!(target.to_string()));
    assert_eq!(end["dialled"], json!(target.to_string()));
    assert!(end["client"].as_str().is_some_and(|client| client.starts_with("127.0.0.1:")), "{end}");
    place.stop().await;
}

#[tokio::test]
async fn an_upstream_that_speaks_first_or_not_at_all_is_told_as_it_is() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("its address");
    let place = to(address, "").await;
    let mut stream = connect(place.listeners[0]).await;
    let request = format!("CONNECT {address} HTTP/1.1\r\n\r\n");
    let asking = head(&mut stream, request.as_bytes());
    let (reply, accepted) = tokio::join!(asking, listener.accept());
    assert!(reply.starts_with("HTTP/1.1 200 "), "{reply}");
    let (mut upstream, _) = accepted.expect("accepted");
    upstream.write_all(b"SSH-2.0-first\r\n").await.expect("written");
    let mut line = [0; 15];
    within("the first line", stream.read_exact(&mut line)).await.expect("read");
    assert_eq!(&line, b"SSH-2.0-first\r\n");
    // What breaks there looks broken here.
    upstream.set_zero_linger().expect("an option");
    drop(upstream);
    let broke = within("the end", stream.read_u8()).await.expect_err("no clean end");
    assert_eq!(broke.kind(), std::io::ErrorKind::ConnectionReset);
    place.record(json!({"event": "forward.ended", "reason": "target_broke"})).await;
    // Nobody there at all.
    drop(listener);
    let mut stream = connect(place.listeners[0]).await;
    let said = ask(&mut stream, &format!("CONNECT {address} HTTP/1.1\r\n\r\n")).await;
    assert!(said.starts_with("HTTP/1.1 502 ") && said.ends_with("\r\n\r\nnot available\n"), "{said}");
    place.record(json!({"event": "forward.failed", "reason": "connect_failed"})).await;
    place.stop().await;
}

#[tokio::test]
async fn a_name_that_leads_home_is_not_dialled_unless_that_is_meant() {
    let target = echo().await;
    let named = format!("localhost:{}", target.port());
    let mut place = to(&named, "").await;
    let request = format!("CONNECT {named} HTTP/1.1\r\n\r\n");
    let said = ask(&mut connect(place.listeners[0]).await, &request).await;
    assert!(said.starts_with("HTTP/1.1 502 "), "{said}");
    let denied = place.record(json!({"event": "forward.denied", "reason": "reserved_address"})).await;
    assert_eq!(denied["refused"], denied["resolved"], "{denied}");
    let meant = tables(&named).replacen("name = \"control\"", "name = \"control\"\nwithin = [\"127.0.0.0/8\"]", 1);
    place.write("", &meant);
    place.program().signal("HUP");
    place.record(json!({"event": "config.reloaded", "detail": "changed: upstream control"})).await;
    let mut stream = connect(place.listeners[0]).await;
    assert!(head(&mut stream, request.as_bytes()).await.starts_with("HTTP/1.1 200 "));
    echoes(&mut stream, b"meant").await;
    drop(stream);
    place.stop().await;
}

#[tokio::test]
async fn what_the_configuration_takes_back_is_cut_and_the_rest_goes_on() {
    let (kept, dropped) = (echo().await, echo().await);
    let mut place = Place::new();
    let upstreams = format!(
        "[[upstream]]\nname = \"kept\"\nto = \"{kept}\"\n[[upstream]]\nname = \"dropped\"\nto = \"{dropped}\"\n"
    );
    let (first, second) = (free_port(), free_port());
    let listener = |port: u16, names: &str| {
        format!("[[listener]]\naddress = \"127.0.0.1:{port}\"\nmode = \"connect\"\nupstreams = [{names}]\n")
    };
    let both = listener(first, "\"kept\", \"dropped\"");
    place.write("", &format!("{upstreams}{both}{}", listener(second, "\"kept\"")));
    place.start(2).await;
    let open = async |at: usize, to: std::net::SocketAddr| -> TcpStream {
        let mut stream = connect(place.listeners[at]).await;
        assert!(
            head(&mut stream, format!("CONNECT {to} HTTP/1.1\r\n\r\n").as_bytes()).await.starts_with("HTTP/1.1 200 ")
        );
        stream
    };
    let mut stays = open(0, kept).await;
    let goes = open(0, dropped).await;
    let withdrawn = open(1, kept).await;
    // A configuration with a fault changes nothing.
    place.write(
        "",
        &format!(
            "{upstreams}{both}[[listener]]\naddress = \"0.0.0.0:1\"\nmode = \"connect\"\nupstreams = [\"kept\"]\n"
        ),
    );
    place.record(json!({"event": "config.rejected"})).await;
    echoes(&mut stays, b"before").await;
    place.write("", &format!("{upstreams}{}", listener(first, "\"kept\"")));
    drop(read_to_end(goes).await);
    drop(read_to_end(withdrawn).await);
    eventually("two that were cut", async || {
        (place.records(&json!({"event": "forward.ended", "reason": "revoked"})).len() == 2).then_some(())
    })
    .await;
    echoes(&mut stays, b"after").await;
    let said = ask(&mut connect(place.listeners[0]).await, &format!("CONNECT {dropped} HTTP/1.1\r\n\r\n")).await;
    assert!(said.starts_with("HTTP/1.1 403 "), "{said}");
    eventually("the listener is gone", async || TcpStream::connect(place.listeners[1]).await.err()).await;
    drop(stays);
    place.stop().await;
}

#[tokio::test]
async fn a_drain_lets_what_runs_end_and_health_tells_of_it() {
    let target = echo().await;
    let mut place = to(target, "drain_s = 60\n[health]\nlisten = \"127.0.0.1:0\"").await;
    assert_eq!(place.health("/livez").await.0, 200);
    let (status, ready) = place.health("/readyz?verbose").await;
    let ready: Value = serde_json::from_str(&ready).expect("JSON");
    assert_eq!((status, &ready["ready"], &ready["side"]), (200, &json!(true), &json!("proxy")), "{ready}");
    let upstream = ready["parts"].as_array().expect("parts").iter().find(|part| part["part"] == "upstream");
    assert!(upstream.is_some_and(|part| part["upstream"] == "control" && part["ready"] == true), "{ready}");
    assert_eq!(place.health("/metrics").await.0, 404);
    let mut stream = connect(place.listeners[0]).await;
    let reply = head(&mut stream, format!("CONNECT {target} HTTP/1.1\r\n\r\n").as_bytes()).await;
    assert!(reply.starts_with("HTTP/1.1 200 "), "{reply}");
    place.program().signal("TERM");
    eventually("a drain", async || {
        let (status, told) = place.health("/readyz").await;
        (status == 503).then(|| assert!(told.contains("\"part\":\"drain\""), "{told}"))
    })
    .await;
    assert_eq!(place.health("/livez").await.0, 200, "it drains, and lives");
    eventually("nobody listens", async || TcpStream::connect(place.listeners[0]).await.err()).await;
    echoes(&mut stream, b"still here").await;
    stream.shutdown().await.expect("ended");
    assert_eq!(read_to_end(stream).await, b"");
    assert_eq!(place.program().ended().await.code(), Some(0));
    let end = place.record(json!({"event": "drain.ended"})).await;
    assert_eq!(end["counts"], json!({"ended": 1, "cut": 0}));
    crate::harness::assert_balanced(crate::harness::Side::Gateway, &place.trail());
}

#[tokio::test]
async fn health_that_is_asked_for_later_takes_a_restart_and_keeps_nothing_else_from_changing() {
    let target = echo().await;
    let mut place = to(target, "").await;
    // Somebody else is there, which is of no concern before that restart.
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let settings = format!("drain_s = 7\n[health]\nlisten = \"{}\"", taken.local_addr().expect("an address"));
    place.write(&settings, &tables(target));
    place.program().says("need a restart: health").await;
    place.record(json!({"event": "config.reloaded"})).await;
    place.stop().await;
}

#[tokio::test]
async fn readiness_tells_which_upstream_does_not_answer() {
    let place = to(format!("127.0.0.1:{}", free_port()), "[health]\nlisten = \"127.0.0.1:0\"").await;
    assert_eq!(place.health("/livez").await.0, 200);
    let (status, told) = place.health("/readyz").await;
    let told: Value = serde_json::from_str(&told).expect("JSON");
    let part = &told["parts"][0];
    let seen = (status, &told["ready"], &part["part"], &part["upstream"], &part["detail"]);
    let expected = (503, &json!(false), &json!("upstream"), &json!("control"), &json!("it does not answer"));
    assert_eq!(seen, expected, "{told}");
    place.stop().await;
}

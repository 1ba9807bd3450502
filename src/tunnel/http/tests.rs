use std::time::Duration;

use super::*;

const CONNECT: &str = "CONNECT db.internal:5432 HTTP/1.1\r\nHost: db.internal:5432\r\n\r\n";

fn error(text: &str) -> HeadError {
    parse(text.as_bytes()).map(|head| head.is_some()).expect_err(&text.escape_debug().to_string())
}

fn good(text: &str) -> Head {
    let (head, length) = parse(text.as_bytes()).expect("a good head").expect("a whole head");
    assert_eq!(length, text.len());
    head
}

#[test]
fn heads_are_taken_apart() {
    let head = good(
        "CONNECT db.internal:5432 HTTP/1.1\r\nHost: db.internal:5432\r\nProxy-Authorization:  Basic Zm9v \r\ncaponier-agent: \
         acme/prod-eu\r\nX-A: 1\r\nx-a: 2\r\nEmpty:\r\n\r\n",
    );
    assert_eq!((head.method(), head.target()), ("CONNECT", "db.internal:5432"));
    assert_eq!(head.only("proxy-authorization"), Some("Basic Zm9v"));
    assert_eq!(head.only("Caponier-Agent"), Some("acme/prod-eu"));
    assert_eq!(head.all("X-a").collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!((head.only("x-a"), head.only("absent"), head.only("empty")), (None, None, Some("")));
    let shown = format!("{head:?}");
    assert!(!shown.contains("Zm9v") && !shown.contains("acme"), "{shown}");
    // Clients of HTTP/1.0 name no host, and some say that they have no body.
    good("CONNECT db:5432 HTTP/1.0\r\n\r\n");
    good("CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\nContent-Length: 0\r\n\r\n");
    good("GET /healthz?x=1 HTTP/1.0\r\n\r\n");
}

#[test]
fn what_follows_a_head_is_not_part_of_it_and_less_is_not_enough() {
    for length in 0..CONNECT.len() {
        assert!(parse(&CONNECT.as_bytes()[..length]).expect("nothing wrong so far").is_none(), "{length}");
    }
    let two = CONNECT.repeat(2);
    assert_eq!(parse(two.as_bytes()).expect("good").expect("whole").1, CONNECT.len());
    let garbage = [CONNECT.as_bytes(), &[0, 0xff, b'\n']].concat();
    assert_eq!(parse(&garbage).expect("good").expect("whole").1, CONNECT.len());
}

/// What others have been led to read differently.
#[test]
fn shapes_that_two_readers_could_take_differently_are_refused() {
    let with = |header: &str| format!("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n{header}\r\n\r\n");
    for (text, expected) in [
        ("CONNECT a:1 HTTP/1.1\r\n\r\n".to_owned(), HeadError::Host),
        (with("Host: b:1"), HeadError::Host),
        (with("HOST: a:1"), HeadError::Host),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n".to_owned(), HeadError::Host),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n".to_owned(), HeadError::Host),
        ("GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n".to_owned(), HeadError::Host),
        (with("Content-Length: 5"), HeadError::Body),
        (with("Content-Length: 0\r\nContent-Length: 0"), HeadError::Body),
        (with("Content-Length: 0\r\nContent-Length: 5"), HeadError::Body),
        (with("Content-Length: +0"), HeadError::Body),
        (with("Content-Length: 00"), HeadError::Body),
        (with("Content-Length: 0, 0"), HeadError::Body),
        (with("Content-Length: 0\r\nTransfer-Encoding: chunked"), HeadError::Body),
        (with("Transfer-Encoding: identity"), HeadError::Body),
        (with("transfer-encoding:\u{b}chunked"), HeadError::Control),
        (with("X: 1\r\n folded"), HeadError::Folded),
        (with("X: 1\r\n\tfolded"), HeadError::Folded),
        ("GET / HTTP/1.1\r\n Host: a\r\n\r\n".to_owned(), HeadError::Folded),
        (with("X: 1\nY: 2"), HeadError::LineEnd),
        (with("X: 1\rY: 2"), HeadError::LineEnd),
        (with("X: 1\r\r\nY: 2"), HeadError::LineEnd),
        ("GET / HTTP/1.1\nHost: a\n\n".to_owned(), HeadError::LineEnd),
        ("GET / HTTP/1.1\r\nHost: a\r\n\n".to_owned(), HeadError::LineEnd),
        (with("X: \0"), HeadError::Control),
        (with("X\0: 1"), HeadError::Control),
        ("GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Control),
        (with("X: \u{7f}"), HeadError::Control),
        (with("X : 1"), HeadError::Malformed),
        (with(": 1"), HeadError::Malformed),
        (with("no colon"), HeadError::Malformed),
        (with("X(1): 1"), HeadError::Malformed),
        (with("Content_Length: 5"), HeadError::Malformed),
        (with("X_Forwarded_For: 1.2.3.4"), HeadError::Malformed),
        ("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Malformed),
        ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Malformed),
        ("GET / HTTP/1.1 \r\nHost: a\r\n\r\n".to_owned(), HeadError::Malformed),
        ("GET / HTTP/2.0\r\nHost: a\r\n\r\n".to_owned(), HeadError::Malformed),
        ("GET / http/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Malformed),
        ("GET /\r\n\r\n".to_owned(), HeadError::Malformed),
        ("GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Target),
        ("GET a:1 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Target),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Target),
        ("GET /# HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Target),
        ("CONNECT http://a:1 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Target),
        ("CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Target),
        ("CONNECT u@a:1 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), HeadError::Target),
    ] {
        assert_eq!(error(&text), expected, "{}", text.escape_debug());
    }
}

#[test]
fn heads_are_bounded() {
    let header = |count: usize| "X: 1\r\n".repeat(count);
    good(&format!("GET / HTTP/1.0\r\n{}\r\n", header(limits::HTTP_HEADERS_MAX)));
    let many = format!("GET / HTTP/1.0\r\n{}", header(limits::HTTP_HEADERS_MAX + 1));
    assert_eq!(error(&many), HeadError::TooManyHeaders, "before its end has come");
    let long = |length: usize| {
        let (before, after) = ("GET / HTTP/1.0\r\nX: ", "\r\n\r\n");
        format!("{before}{}{after}", "x".repeat(length - before.len() - after.len()))
    };
    good(&long(limits::HTTP_HEAD_MAX));
    assert_eq!(error(&long(limits::HTTP_HEAD_MAX + 1)), HeadError::TooLong);
    assert_eq!(error(&long(limits::HTTP_HEAD_MAX * 2)[..limits::HTTP_HEAD_MAX]), HeadError::TooLong);
    assert_eq!(HeadError::TooLong.reply(), Reply::TooLarge);
}

#[test]
fn the_last_that_a_balancer_says_counts() {
    for (headers, client) in [
        ("X-Forwarded-For: 192.0.2.1", Some("192.0.2.1:0")),
        ("X-Forwarded-For: 10.0.0.1, 192.0.2.1", Some("192.0.2.1:0")),
        ("X-Forwarded-For: 10.0.0.1\r\nx-forwarded-for: 192.0.2.1", Some("192.0.2.1:0")),
        ("X-Forwarded-For: spoofed, 192.0.2.1:5000", Some("192.0.2.1:5000")),
        ("X-Forwarded-For: 2001:db8::1", Some("[2001:db8::1]:0")),
        ("X-Forwarded-For: [2001:db8::1]", Some("[2001:db8::1]:0")),
        ("X-Forwarded-For: [2001:db8::1]:7", Some("[2001:db8::1]:7")),
        ("X-Forwarded-For: ::ffff:192.0.2.1", Some("192.0.2.1:0")),
        ("X-Forwarded-For: 192.0.2.1, unknown", None),
        ("X-Forwarded-For: 192.0.2.1,", None),
        ("X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-For:", None),
        ("X-Forwarded-For: [192.0.2.1]", None),
        ("X-Forwarded-For: 192.0.2.01", None),
        ("Forwarded: for=192.0.2.1", None),
    ] {
        let head = good(&format!("GET / HTTP/1.0\r\n{headers}\r\n\r\n"));
        assert_eq!(head.forwarded_for().map(|client| client.to_string()).as_deref(), client, "{headers}");
    }
}

#[tokio::test]
async fn a_head_is_read_however_it_comes_and_nothing_behind_it_is_lost() {
    let sent = [CONNECT.as_bytes(), b"early bytes"].concat();
    for begun in [0, 7, CONNECT.len() - 1, CONNECT.len(), sent.len()] {
        let (mut near, mut far) = tokio::io::duplex(3);
        let rest = sent[begun..].to_vec();
        let sending = async move {
            far.write_all(&rest).await.expect("written");
            drop(far);
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        let reading = async {
            let begun = Bytes::copy_from_slice(&sent[..begun]);
            let request = read(&mut near, begun, deadline).await.expect("a request");
            let mut rest = request.rest.to_vec();
            near.read_to_end(&mut rest).await.expect("read");
            (request.head.target().to_owned(), rest)
        };
        let ((), (target, rest)) = tokio::join!(sending, reading);
        assert_eq!((target.as_str(), &rest[..]), ("db.internal:5432", &b"early bytes"[..]), "{begun}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_come_is_not_waited_for() {
    let (mut near, mut far) = tokio::io::duplex(64);
    far.write_all(b"GET / HT").await.expect("written");
    let error = read(&mut near, Bytes::new(), Instant::now() + Duration::from_secs(5)).await.expect_err("half");
    assert!(matches!(error, ReadError::Timeout) && error.fault() == Some(Fault::Timeout), "{error:?}");
    drop(far);
    let error = read(&mut near, Bytes::new(), Instant::now() + Duration::from_secs(5)).await.expect_err("gone");
    assert!(matches!(error, ReadError::Closed) && error.fault().is_none(), "{error:?}");
}

#[test]
fn every_reply_is_whole_and_closes() {
    for reply in Reply::ALL {
        let (head, body) = reply.text().split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 ") && head.contains("close"), "{head}");
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_refused_reads_the_answer_and_is_not_waited_for() {
    let (near, mut far) = tokio::io::duplex(64);
    let client = async {
        let mut read = String::new();
        far.read_to_string(&mut read).await.expect("read");
        read
    };
    let (read, ()) = tokio::join!(client, answer(near, Reply::UpgradeRequired));
    assert!(read.starts_with("HTTP/1.1 426 "), "{read}");
    // One that reads nothing, and one that goes on sending.
    let begun = Instant::now();
    let (near, far) = tokio::io::duplex(8);
    answer(near, Reply::NotFound).await;
    assert_eq!(begun.elapsed(), limits::REFUSED_PATIENCE);
    drop(far);
    let (near, mut far) = tokio::io::duplex(1024);
    let flooding = async { while far.write_all(&[b'x'; 1024]).await.is_ok() {} };
    tokio::join!(flooding, answer(near, Reply::NotFound));
}

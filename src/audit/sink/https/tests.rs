//! What a URL may be, what an answer means, and collectors that misbehave.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use super::*;
use crate::audit::chain::{self, TrailId};
use crate::audit::sink::{Batch, Connecting, pipe};
use crate::task::Tasks;

const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Debug)]
struct Direct;

impl Connect for Direct {
    fn connect<'a>(&'a self, to: &'a Target, _proxy: Option<&'a str>) -> Connecting<'a> {
        Box::pin(async move { Ok(Box::new(TcpStream::connect(to.to_string()).await?) as Box<dyn Stream>) })
    }
}

fn config(url: &str, format: Format) -> Config {
    let url: Url = url.parse().expect("a URL");
    let place = Place { to: url.to, tls: None, proxy: None };
    let token = Some(Secret::new("hunter2".to_owned()));
    Config { place, path: url.path, token, format, records: 100, linger: Duration::ZERO }
}

fn lines(count: usize) -> Batch {
    let mut chain = chain::Chain::begin(&TrailId::parse("000102030405060708090a0b0c0d0e0f").expect("an id"));
    let mut bytes = Vec::new();
    for _ in 0..count {
        let mut line = b"{\"v\":1,\"time\":\"2026-11-21T20:00:00.123Z\",\"event\":\"forward.denied\"}\n".to_vec();
        chain.link(&mut line);
        bytes.extend_from_slice(&line);
    }
    Batch { bytes: bytes.into(), first: 0, last: count as u64 - 1, records: count as u64, times: (0, 0) }
}

#[test]
fn urls() {
    let url: Url = "https://siem.example.com/in?a=b".parse().expect("a URL");
    assert_eq!((url.to.to_string().as_str(), url.tls), ("siem.example.com:443", true));
    assert_eq!(url.path.0.expose(), "/in?a=b");
    let url: Url = "http://[::1]:8088".parse().expect("a URL");
    assert_eq!((url.to.to_string().as_str(), url.tls, url.path.0.expose().as_str()), ("[::1]:8088", false, "/"));
    for (text, error) in [
        ("siem.example.com", UrlError::Scheme),
        ("ftp://siem.example.com/", UrlError::Scheme),
        ("http://siem.example.com/", UrlError::Clear),
        ("http://localhost/", UrlError::Clear),
        ("http://10.0.0.1/", UrlError::Clear),
        ("https://user:secret@siem.example.com/", UrlError::Credentials),
        ("https://", UrlError::Host),
        ("https://a:0/", UrlError::Host),
        ("https://a:99999/", UrlError::Host),
        ("https://a/ b", UrlError::Path),
        ("https://a/b#c", UrlError::Path),
        ("https://a/b\r\nX: y", UrlError::Path),
    ] {
        assert_eq!(text.parse::<Url>(), Err(error), "{text}");
    }
}

#[test]
fn no_secret_is_shown() {
    let config = config("http://127.0.0.1/in?key=secret", Format::Caponier);
    let shown = format!("{config:?}");
    assert!(!shown.contains("hunter2") && !shown.contains("secret"), "{shown}");
}

#[test]
fn answers() {
    let judged = |status: u16, after: Option<&str>| {
        let mut answer = Response::builder().status(status);
        if let Some(after) = after {
            answer = answer.header(RETRY_AFTER, after);
        }
        judge(&answer.body(()).expect("an answer")).map_err(|failure| (failure.reason, failure.pause.as_secs()))
    };
    for status in [200, 201, 202, 204] {
        assert_eq!(judged(status, None), Ok(()));
    }
    let refused = HTTPS_REFUSED_PAUSE.as_secs();
    for (status, after, failure) in [
        (500, None, ("server_failed", 0)),
        (503, Some("7"), ("server_failed", 7)),
        (429, Some("30"), ("too_many_requests", 30)),
        (429, Some("99999999999"), ("too_many_requests", HTTPS_RETRY_AFTER_MAX.as_secs())),
        (429, Some("soon"), ("too_many_requests", 0)),
        (408, None, ("timed_out", 0)),
        (401, None, ("unauthorised", refused)),
        (403, None, ("unauthorised", refused)),
        (400, None, ("refused", refused)),
        (413, None, ("refused", refused)),
        (302, None, ("redirected", refused)),
        (308, None, ("redirected", refused)),
        (304, None, ("redirected", refused)),
    ] {
        assert_eq!(judged(status, after), Err(failure), "{status}");
    }
}

/// A request, as far as its body.
struct Asked {
    head: String,
    body: String,
}

async fn asked(stream: &mut TcpStream) -> Option<Asked> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).expect("UTF-8").to_ascii_lowercase();
    let len = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next()?.parse().ok());
    let mut body = vec![0; len.expect("a length")];
    stream.read_exact(&mut body).await.ok()?;
    Some(Asked { head, body: String::from_utf8(body).expect("UTF-8") })
}

/// A collector that gives one answer after the other, each on a connection of its own if it closes; what it was asked.
async fn exchange(format: Format, answers: &[&[u8]]) -> (Vec<Asked>, Option<u64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/in", listener.local_addr().expect("an address"));
    let (feed, batches, progress) = pipe();
    let tasks = Tasks::new();
    tasks.spawn(run(config(&url, format), batches, progress, Arc::new(Direct), CancellationToken::new()));
    feed.force(lines(2));
    let mut all = Vec::new();
    for answer in answers {
        let (mut stream, _) = timeout(PATIENCE, listener.accept()).await.expect("in time").expect("a connection");
        all.extend(timeout(PATIENCE, asked(&mut stream)).await.expect("in time"));
        // One that sends more than is read of it finds the connection gone.
        let _ = stream.write_all(answer).await;
        let _ = stream.shutdown().await;
    }
    let until = Instant::now() + PATIENCE;
    while feed.written().is_none() && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (all, feed.written())
}

const GOOD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

#[tokio::test]
async fn a_request_says_what_it_is_and_comes_again_as_it_was() {
    let (asked, written) = exchange(
        Format::Caponier,
        &[
            b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
            b"",
            b"HTTP/1.1 200",
            b"nonsense\r\n\r\n",
            b"HTTP/1.1 429 No\r\nRetry-After: 1\r\nContent-Length: 3\r\n\r\nno!",
            GOOD,
        ],
    )
    .await;
    assert_eq!((asked.len(), written), (6, Some(1)));
    for one in &asked {
        assert_eq!((&one.head, &one.body), (&asked[0].head, &asked[0].body));
    }
    let head = &asked[0].head;
    assert!(head.starts_with("post /in http/1.1\r\n"), "{head}");
    for line in ["content-type: application/x-ndjson\r\n", "authorization: bearer hunter2\r\n", "-0-1\r\n"] {
        assert!(head.contains(line), "{line} is not in {head}");
    }
    assert_eq!(asked[0].body.as_bytes(), lines(2).bytes);
}

#[tokio::test]
async fn a_large_answer_is_not_read_and_counts_by_its_head() {
    let huge = [b"HTTP/1.1 200 OK\r\n\r\n".as_slice(), &vec![b'x'; 4 << 20]].concat();
    let (asked, written) = exchange(Format::Caponier, &[&huge]).await;
    assert_eq!((asked.len(), written), (1, Some(1)));
    let head = [b"HTTP/1.1 200 OK\r\nX: ".as_slice(), &vec![b'x'; 1 << 20], b"\r\n\r\n"].concat();
    let (asked, written) = exchange(Format::Caponier, &[&head, GOOD]).await;
    assert_eq!((asked.len(), written), (2, Some(1)));
}

#[tokio::test]
async fn ocsf_is_an_array_of_events() {
    let (asked, written) = exchange(Format::Ocsf, &[GOOD]).await;
    assert_eq!(written, Some(1));
    assert!(asked[0].head.contains("content-type: application/json\r\n"), "{}", asked[0].head);
    let events: Value = serde_json::from_str(&asked[0].body).expect("JSON");
    let sequence: Vec<_> =
        events.as_array().expect("an array").iter().map(|event| &event["metadata"]["sequence"]).collect();
    assert_eq!(sequence, [0, 1]);
    assert_eq!(events[0]["class_uid"], 4001);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_does_not_come_to_an_end_is_told_of() {
    #[derive(Debug)]
    struct Slow(Tasks);
    impl Connect for Slow {
        fn connect<'a>(&'a self, _to: &'a Target, _proxy: Option<&'a str>) -> Connecting<'a> {
            let (near, mut far) = tokio::io::duplex(64 * 1024);
            // One byte a second, for ever.
            self.0.spawn(async move {
                for byte in b"HTTP/1.1 200 OK\r\nX: ".iter().chain(std::iter::repeat(&b'x')) {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    if far.write_all(&[*byte]).await.is_err() {
                        return;
                    }
                }
            });
            Box::pin(async move { Ok(Box::new(near) as Box<dyn Stream>) })
        }
    }
    let (feed, batches, progress) = pipe();
    let (tasks, stop) = (Tasks::new(), CancellationToken::new());
    let slow = Arc::new(Slow(tasks.clone()));
    tasks.spawn(run(config("http://127.0.0.1:1/", Format::Caponier), batches, progress, slow, stop.clone()));
    feed.force(lines(1));
    tokio::time::sleep(crate::limits::SINK_DELIVERY + Duration::from_secs(1)).await;
    assert_eq!(feed.failure().map(|failure| failure.reason), Some("timed_out"));
    assert_eq!(feed.written(), None);
    stop.cancel();
    assert!(tasks.drain(PATIENCE).await, "it ends at the stop");
}

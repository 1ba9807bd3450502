//! What a URL may be, what an answer means, and collectors that misbehave.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use super::*;
use crate::audit::chain::{self, TrailId};
use crate::audit::sink::{Batch, Connect, Connecting, Feed, pipe};
use crate::limits::{SINK_REFUSALS, SINK_RETRY_CAP, SINK_RETRY_FIRST};
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
    let token = Some(Token { file: "absent".into(), value: Secret::new("hunter2".to_owned()) });
    Config { place, path: url.path, token, format, records: 100, linger: Duration::ZERO }
}

fn lines(count: usize) -> Batch {
    lines_from(0, count)
}

/// So many lines of a chain, from this number on.
fn lines_from(first: u64, count: usize) -> Batch {
    let mut chain = chain::Chain::begin(&TrailId::parse("000102030405060708090a0b0c0d0e0f").expect("an id"));
    let mut bytes = Vec::new();
    for number in 0..first + count as u64 {
        let mut line = b"{\"v\":1,\"time\":\"2026-11-21T20:00:00.123Z\",\"event\":\"forward.denied\"}\n".to_vec();
        chain.link(&mut line);
        if number >= first {
            bytes.extend_from_slice(&line);
        }
    }
    Batch { bytes: bytes.into(), first, last: chain.next() - 1, records: count as u64, times: (0, 0) }
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
        let judged = judge(&answer.body(()).expect("an answer"));
        judged.map_err(|failure| {
            assert!(!failure.for_good || failure.reason == "refused", "{failure:?}");
            (if failure.for_good { "refused for good" } else { failure.reason }, failure.pause.as_secs())
        })
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
        (407, None, ("unauthorised", refused)),
        (425, Some("2"), ("too_many_requests", 2)),
        (400, None, ("refused for good", 0)),
        (413, Some("30"), ("refused for good", 0)),
        (422, None, ("refused for good", 0)),
        // Whoever answers so has not looked at the records.
        (402, None, ("refused", refused)),
        (404, None, ("refused", refused)),
        (405, None, ("refused", refused)),
        (410, None, ("refused", refused)),
        (415, None, ("refused", refused)),
        (421, None, ("refused", refused)),
        (431, None, ("refused", refused)),
        (101, None, ("refused", refused)),
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

async fn asked(stream: &mut (impl AsyncRead + Unpin)) -> Option<Asked> {
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
    let means = Means { connect: Arc::new(Direct), tasks: tasks.clone() };
    tasks.spawn(run(config(&url, format), batches, progress, means, false, CancellationToken::new()));
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

/// A collector in memory that judges bodies.
#[derive(Debug)]
struct Judging {
    judge: Mutex<fn(&[u64], usize) -> u16>,
    tasks: Tasks,
    /// Of each request the numbers of its records, and what was answered.
    asked: Mutex<Vec<(Vec<u64>, u16)>>,
}

impl Judging {
    fn new(judge: fn(&[u64], usize) -> u16) -> Arc<Self> {
        Arc::new(Self { judge: Mutex::new(judge), tasks: Tasks::new(), asked: Mutex::default() })
    }

    fn judge_by(&self, judge: fn(&[u64], usize) -> u16) {
        *self.judge.lock().expect("a judge") = judge;
    }

    /// What it has taken, in order.
    fn taken(&self) -> Vec<u64> {
        self.asked().into_iter().filter(|(_, status)| *status == 200).flat_map(|(numbers, _)| numbers).collect()
    }

    fn asked(&self) -> Vec<(Vec<u64>, u16)> {
        self.asked.lock().expect("what was asked").clone()
    }
}

#[derive(Debug)]
struct To(Arc<Judging>);

impl Connect for To {
    fn connect<'a>(&'a self, _to: &'a Target, _proxy: Option<&'a str>) -> Connecting<'a> {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let judging = Arc::clone(&self.0);
        self.0.tasks.spawn(async move {
            let mut far = far;
            while let Some(asked) = asked(&mut far).await {
                let number = |line: &str| chain::Linked::read(format!("{line}\n").as_bytes()).expect("a record").seq;
                let numbers: Vec<_> = asked.body.lines().map(number).collect();
                let judge = *judging.judge.lock().expect("a judge");
                let status = judge(&numbers, asked.body.len());
                judging.asked.lock().expect("what was asked").push((numbers, status));
                let answer = format!("HTTP/1.1 {status} Whatever\r\nContent-Length: 0\r\n\r\n");
                if far.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
        Box::pin(async move { Ok(Box::new(near) as Box<dyn Stream>) })
    }
}

/// A sink that delivers to such a collector, until what is returned fires.
fn delivering(to: &Arc<Judging>, required: bool) -> (Feed, CancellationToken) {
    let (feed, batches, progress) = pipe();
    let stop = CancellationToken::new();
    let means = Means { connect: Arc::new(To(Arc::clone(to))), tasks: to.tasks.clone() };
    let config = config("http://127.0.0.1:1/", Format::Caponier);
    to.tasks.spawn(run(config, batches, progress, means, required, stop.clone()));
    (feed, stop)
}

/// Waits for something to be so, on a clock that runs ahead.
async fn until(what: &str, so: impl Fn() -> bool) {
    for _ in 0..100_000 {
        if so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("never: {what}");
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_is_too_large_goes_in_pieces_and_the_next_ones_are_smaller() {
    let collector = Judging::new(|_, bytes| if bytes > 1_000 { 413 } else { 200 });
    let (feed, _stop) = delivering(&collector, true);
    let all = lines(40);
    feed.force(all.clone());
    until("all is written", || feed.written() == Some(39)).await;
    assert_eq!(collector.taken(), (0..40).collect::<Vec<_>>(), "each once, in order");
    assert_eq!((feed.failure().map(|failure| failure.reason), feed.losses()), (None, None));
    assert_eq!(feed.waiting(), 0);
    let refused = collector.asked().iter().filter(|(_, status)| *status == 413).count();
    assert!(refused <= 8, "{:?}", collector.asked());
    // It has learnt.
    feed.force(all);
    until("it comes again", || collector.taken().len() == 80).await;
    let again = collector.asked().iter().filter(|(_, status)| *status == 413).count();
    assert!(again <= refused + 1, "{:?}", collector.asked());
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_refused_alone_is_lost_to_a_sink_that_is_not_required_and_no_other() {
    for status in [400, 413, 422] {
        let judge: fn(&[u64], usize) -> u16 = match status {
            400 => |numbers, _| if numbers.contains(&17) || numbers.contains(&39) { 400 } else { 200 },
            413 => |numbers, _| if numbers.contains(&17) || numbers.contains(&39) { 413 } else { 200 },
            _ => |numbers, _| if numbers.contains(&17) || numbers.contains(&39) { 422 } else { 200 },
        };
        let collector = Judging::new(judge);
        let (feed, _stop) = delivering(&collector, false);
        assert!(feed.offer(lines(40)));
        until("nothing waits", || feed.waiting() == 0).await;
        assert_eq!(collector.taken(), (0..40).filter(|number| ![17, 39].contains(number)).collect::<Vec<_>>());
        let losses = feed.losses().expect("losses");
        assert_eq!((losses.records, losses.reason), (2, "refused"));
        let told = format!("it answered {status} to record 39 alone");
        assert!(losses.detail.starts_with(&told), "{losses:?}");
        // The last one was refused, so that it fails until something is taken.
        assert_eq!(feed.failure().map(|failure| failure.reason), Some("refused"));
        let alone = collector.asked().iter().filter(|(numbers, _)| numbers == &[17]).count();
        assert_eq!(alone, SINK_REFUSALS as usize, "{:?}", collector.asked());
        collector.judge_by(|_, _| 200);
        assert!(feed.offer(lines_from(40, 40)));
        until("it works again", || feed.failure().is_none()).await;
        assert_eq!((feed.losses(), feed.waiting()), (None, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_collector_that_takes_nothing_is_not_asked_without_a_pause() {
    let collector = Judging::new(|_, _| 400);
    let (feed, stop) = delivering(&collector, false);
    assert!(feed.offer(lines(64)));
    tokio::time::sleep(Duration::from_secs(300)).await;
    // Pauses of up to 5 s each, and so 2.5 s each in the middle.
    let asked = collector.asked().len();
    assert!((30..=400).contains(&asked), "{asked} requests in 300 s");
    until("all is lost, and told", || feed.waiting() == 0).await;
    assert_eq!(feed.losses().map(|losses| losses.records), Some(64));
    assert!(collector.taken().is_empty());
    stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn halves_come_soon_however_long_the_collector_was_away() {
    let collector = Judging::new(|_, _| 503);
    let (feed, _stop) = delivering(&collector, false);
    assert!(feed.offer(lines(64)));
    tokio::time::sleep(Duration::from_secs(60)).await;
    collector.judge_by(|numbers, _| if numbers.contains(&0) { 422 } else { 200 });
    let since = Instant::now();
    until("it comes alone", || collector.asked().iter().any(|(numbers, _)| numbers == &[0])).await;
    // What is left of the pause after the last failure, and six short ones.
    assert!(since.elapsed() < SINK_RETRY_CAP + 7 * SINK_RETRY_FIRST, "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_refused_alone_fails_a_sink_that_is_required_until_it_is_taken() {
    let collector = Judging::new(|numbers, _| if numbers.contains(&17) { 422 } else { 200 });
    let (feed, _stop) = delivering(&collector, true);
    feed.force(lines(40));
    until("it fails", || feed.failure().is_some()).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    let failure = feed.failure().expect("it still fails");
    assert_eq!(failure.reason, "refused");
    assert!(failure.detail.starts_with("it answered 422 to record 17 alone ("), "{failure:?}");
    assert!(failure.detail.contains("nothing opens before it takes it"), "{failure:?}");
    assert_eq!((feed.written(), feed.losses()), (Some(16), None));
    assert_eq!(collector.taken(), (0..17).collect::<Vec<_>>(), "nothing after it");
    collector.judge_by(|_, _| 200);
    until("all is written", || feed.written() == Some(39)).await;
    assert_eq!(collector.taken(), (0..40).collect::<Vec<_>>());
    assert!(feed.failure().is_none());
}

#[tokio::test(start_paused = true)]
async fn what_is_not_about_the_records_is_waited_for_and_nothing_is_lost() {
    for judge in [(|_, _| 401) as fn(&[u64], usize) -> u16, |_, _| 404, |_, _| 429, |_, _| 503, |_, _| 302] {
        let collector = Judging::new(judge);
        let (feed, _stop) = delivering(&collector, false);
        assert!(feed.offer(lines(40)));
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(feed.failure().is_some());
        assert_eq!((feed.losses(), feed.waiting()), (None, 40));
        assert!(collector.asked().iter().all(|(numbers, _)| numbers.len() == 40), "it came in pieces");
        collector.judge_by(|_, _| 200);
        until("all is written", || feed.written() == Some(39)).await;
        assert_eq!(collector.taken(), (0..40).collect::<Vec<_>>());
    }
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
    let slow = Means { connect: Arc::new(Slow(tasks.clone())), tasks: tasks.clone() };
    tasks.spawn(run(config("http://127.0.0.1:1/", Format::Caponier), batches, progress, slow, false, stop.clone()));
    feed.force(lines(1));
    tokio::time::sleep(crate::limits::SINK_DELIVERY + Duration::from_secs(1)).await;
    assert_eq!(feed.failure().map(|failure| failure.reason), Some("timed_out"));
    assert_eq!(feed.written(), None);
    stop.cancel();
    assert!(tasks.drain(PATIENCE).await, "it ends at the stop");
}

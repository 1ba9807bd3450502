//! What is asked for, how, and by whom it is not to be disturbed.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::ask::{self, Answer, AskError, Question};
use super::*;
use crate::task::Threads;

const SOON: Duration = Duration::from_secs(180);

/// A program whose links are as it is told.
#[derive(Default)]
struct Program(Mutex<Option<&'static str>>);

impl State for Program {
    fn side(&self) -> &'static str {
        "agent"
    }

    async fn parts(&self) -> Vec<Part> {
        let links = match *self.0.lock().expect("a lock") {
            Some(why) => Part::failing("links", why, "do something").of("acme").since(Some(Timestamp::UNIX_EPOCH)),
            None => Part::ready("links").of("acme"),
        };
        vec![links, Part::trail(None, None), Part::drain(None)]
    }
}

struct Place {
    program: Arc<Program>,
    tasks: Tasks,
    crew: Crew,
    threads: Threads,
    ports: Vec<SocketAddr>,
    dir: tempfile::TempDir,
}

impl Place {
    async fn start(named: impl FnOnce(&std::path::Path) -> Config) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let config = named(dir.path());
        let (crew, threads) = Crew::start("test", 2, SOON).expect("a crew");
        let (program, tasks) = (Arc::new(Program::default()), Tasks::new());
        let bind = |address| {
            std::net::TcpListener::bind(address).and_then(|listener| {
                listener.set_nonblocking(true)?;
                TcpListener::from_std(listener)
            })
        };
        let open = open(&config, bind).await.expect("open");
        let ports = open.ports.iter().map(|(listener, _)| listener.local_addr().expect("an address")).collect();
        open.serve(&program, &crew, &tasks);
        Self { program, tasks, crew, threads, ports, dir }
    }

    fn breaks(&self, why: Option<&'static str>) {
        *self.program.0.lock().expect("a lock") = why;
    }

    async fn end(self) {
        assert!(self.tasks.drain(SOON).await);
        self.threads.end(SOON).await.expect("ended");
    }
}

fn at_loopback() -> Option<SocketAddr> {
    Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
}

async fn say(port: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(port).await.expect("connected");
    // It may hang up before it has read all.
    drop(stream.write_all(request.as_bytes()).await);
    let mut said = Vec::new();
    drop(timeout(SOON, stream.read_to_end(&mut said)).await.expect("an end"));
    String::from_utf8(said).expect("text")
}

async fn get(port: SocketAddr, path: &str) -> String {
    say(port, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await
}

#[tokio::test]
async fn each_port_answers_what_it_is_for_and_nothing_else() {
    let place = Place::start(|_| Config { listen: at_loopback(), metrics: at_loopback(), ..Config::default() }).await;
    let (metrics, health) = (place.ports[0], place.ports[1]);
    let told = get(metrics, "/metrics").await;
    assert!(told.starts_with("HTTP/1.1 200 ") && told.contains("text/plain; version=0.0.4"), "{told}");
    assert!(told.contains("\nprocess_open_fds "), "{told}");
    assert!(get(health, "/metrics").await.starts_with("HTTP/1.1 404 "));
    for port in [metrics, health] {
        assert!(get(port, "/livez").await.ends_with("\r\n\r\n{\"live\":true}\n"));
        assert!(get(port, "/readyz").await.starts_with("HTTP/1.1 200 "));
        for path in ["/", "/healthz", "/metrics/", "//livez", "/readyz/../livez", "/../../etc/passwd"] {
            let told = get(port, path).await;
            assert!(told.starts_with("HTTP/1.1 404 ") && told.ends_with(" is wanted\n"), "{path}: {told}");
        }
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"] {
            let told =
                say(port, &format!("{method} /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")).await;
            assert!(told.starts_with("HTTP/1.1 405 ") || told.starts_with("HTTP/1.1 400 "), "{method}: {told}");
        }
        let head = say(port, "HEAD /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head}");
        // One question a connection.
        let twice = say(port, "GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(twice.matches("HTTP/1.1").count(), 1, "{twice}");
    }
    place.end().await;
}

#[tokio::test]
async fn what_is_not_in_order_is_named_and_all_of_it_only_on_request() {
    let place = Place::start(|_| Config { listen: at_loopback(), ..Config::default() }).await;
    place.breaks(Some("gone"));
    let told = get(place.ports[0], "/readyz").await;
    assert!(told.starts_with("HTTP/1.1 503 "), "{told}");
    let report: Report = serde_json::from_str(told.split_once("\r\n\r\n").expect("a body").1).expect("a report");
    assert!(report.live && !report.ready && report.side == "agent");
    let names: Vec<_> = report.parts.iter().map(Part::name).collect();
    assert_eq!(names, ["links acme"]);
    assert_eq!(report.parts[0].since, Some(Timestamp::UNIX_EPOCH));
    let told = get(place.ports[0], "/readyz?verbose").await;
    for part in ["threads", "links", "trail", "drain"] {
        assert!(told.contains(&format!("\"part\":\"{part}\"")), "{told}");
    }
    place.breaks(None);
    assert!(get(place.ports[0], "/readyz").await.contains("\"parts\":[]"));
    place.end().await;
}

#[tokio::test]
async fn a_thread_that_is_stuck_is_told() {
    let place = Place::start(|_| Config { listen: at_loopback(), ..Config::default() }).await;
    let (release, busy) = std::sync::mpsc::sync_channel::<()>(0);
    place.crew.workers()[1].spawn(&place.tasks, async move { busy.recv().is_err() });
    // Many want to know, and the thread is asked once.
    let asked: Vec<_> = (0..8).map(|_| place.tasks.spawn(get(place.ports[0], "/livez"))).collect();
    for told in asked {
        let told = told.await.expect("asked");
        assert!(told.starts_with("HTTP/1.1 503 ") && told.ends_with("{\"live\":false}\n"), "{told}");
    }
    let told = get(place.ports[0], "/readyz").await;
    assert!(told.starts_with("HTTP/1.1 503 ") && told.contains("\"part\":\"threads\""), "{told}");
    drop(release);
    place.end().await;
}

#[tokio::test]
async fn a_thousand_that_dawdle_keep_nobody_out_and_cost_no_more_than_a_few() {
    let place = Place::start(|_| Config { listen: at_loopback(), ..Config::default() }).await;
    let mut silent = Vec::new();
    for number in 0..1_000 {
        let mut stream = TcpStream::connect(place.ports[0]).await.expect("connected");
        if number % 2 == 0 {
            drop(stream.write_all(b"GET /livez HTTP/1.1\r\nX-Slow: ").await);
        }
        silent.push(stream);
        assert!(place.tasks.len() <= limits::HEALTH_CONNECTIONS + 2, "{}", place.tasks.len());
        if number % 100 == 99 {
            assert!(get(place.ports[0], "/readyz").await.starts_with("HTTP/1.1 200 "));
        }
    }
    drop(silent);
    place.end().await;
}

#[tokio::test]
async fn a_head_without_end_is_refused() {
    let place = Place::start(|_| Config { listen: at_loopback(), ..Config::default() }).await;
    let line = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(4 * limits::HEALTH_HEAD_MAX));
    let headers = format!("GET /livez HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(4 * limits::HEALTH_HEAD_MAX));
    let many = format!("GET /livez HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(2_000));
    for request in [line, headers, many, "\u{16}\u{3}\u{1}\0\0garbage\r\n\r\n".to_owned(), "GET\r\n\r\n".to_owned()] {
        let told = say(place.ports[0], &request).await;
        assert!(told.is_empty() || told.starts_with("HTTP/1.1 4"), "{told}");
    }
    assert!(get(place.ports[0], "/livez").await.starts_with("HTTP/1.1 200 "));
    place.end().await;
}

#[tokio::test]
async fn asking_says_the_same_at_a_port_at_a_socket_and_from_a_file() {
    let place = Place::start(|dir| Config {
        listen: at_loopback(),
        socket: Some(dir.join("health.sock")),
        file: Some(dir.join("health")),
        metrics: None,
    })
    .await;
    let (socket, file) = (place.dir.path().join("health.sock"), place.dir.path().join("health"));
    assert_eq!(std::fs::metadata(&socket).expect("a socket").permissions().mode() & 0o777, 0o600);
    let port = place.ports[0].port();
    for broken in [None, Some("gone")] {
        place.breaks(broken);
        let by_port = ask::port("127.0.0.1", port, Question::Ready).await.expect("an answer");
        let by_socket = ask::socket(&socket, Question::Ready).await.expect("an answer");
        for answer in [by_port, by_socket] {
            let Answer::Report(report) = answer else { panic!("a report") };
            assert_eq!((report.ready, report.parts.len()), (broken.is_none(), 4));
        }
        assert_eq!(ask::socket(&socket, Question::Live).await.expect("an answer"), Answer::Live(true));
        let deadline = tokio::time::Instant::now() + SOON;
        loop {
            match ask::file(&file) {
                Ok(report) if report.ready == broken.is_none() => break,
                other => assert!(tokio::time::Instant::now() < deadline, "{other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    assert_eq!(std::fs::metadata(&file).expect("a file").permissions().mode() & 0o777, 0o600);
    let dir = place.dir.path().to_owned();
    let Place { program: _, tasks, threads, dir: _dir, .. } = place;
    assert!(tasks.drain(SOON).await);
    assert_eq!(std::fs::read_dir(dir).expect("a folder").count(), 0, "nothing is left");
    assert!(matches!(ask::file(&file), Err(AskError::File { .. })));
    assert!(matches!(ask::socket(&socket, Question::Live).await, Err(AskError::Connect { .. })));
    threads.end(SOON).await.expect("ended");
}

#[test]
fn a_file_that_is_not_renewed_is_nobodys() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("health");
    let report = Report {
        side: "agent".to_owned(),
        version: "1".to_owned(),
        pid: 1,
        time: Timestamp::UNIX_EPOCH,
        live: true,
        ready: true,
        parts: Vec::new(),
    };
    std::fs::write(&path, serde_json::to_vec(&report).expect("JSON")).expect("written");
    assert_eq!(ask::file(&path).expect("a report"), report);
    let old = SystemTime::now() - limits::HEALTH_FILE_STALE - Duration::from_secs(1);
    std::fs::File::options().write(true).open(&path).and_then(|file| file.set_modified(old)).expect("set");
    assert!(matches!(ask::file(&path), Err(AskError::Stale { .. })));
    std::fs::write(&path, b"{").expect("written");
    assert!(matches!(ask::file(&path), Err(AskError::File { .. })));
}

#[tokio::test]
async fn what_is_in_the_way_is_told_at_the_start() {
    let dir = tempfile::tempdir().expect("a folder");
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "somebody's").expect("written");
    let bind = |_| Err(io::Error::from(io::ErrorKind::AddrInUse));
    let try_it = async |config: Config| open(&config, bind).await.expect_err("refused");
    let nowhere = dir.path().join("no/such/folder");
    assert!(matches!(try_it(Config { listen: at_loopback(), ..Config::default() }).await, OpenError::Listen { .. }));
    assert!(matches!(
        try_it(Config { socket: Some(plain.clone()), ..Config::default() }).await,
        OpenError::Socket { .. }
    ));
    assert!(matches!(try_it(Config { file: Some(nowhere), ..Config::default() }).await, OpenError::File { .. }));
    let folder = Some(dir.path().to_owned());
    assert!(matches!(try_it(Config { file: folder, ..Config::default() }).await, OpenError::File { .. }));
    assert_eq!(std::fs::read_to_string(&plain).expect("there"), "somebody's");
}

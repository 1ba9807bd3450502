//! The frames, and collectors that are slow, gone or not who they should be.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncRead, BufReader, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::*;
use crate::audit::chain::{Chain, Link, TrailId};
use crate::audit::sink::deliver::{Tls, TlsFiles};
use crate::audit::sink::{Batch, Connect, Connecting, pipe};
use crate::target::Target;
use crate::task::Tasks;
use crate::tls::{Acceptor, Certificates, ClientPolicy, Identity};

const PATIENCE: Duration = Duration::from_secs(180);

fn config(to: SocketAddr) -> Config {
    let place = Place { to: to.to_string().parse().expect("a target"), tls: None, proxy: None };
    Config { place, facility: Facility::default(), hostname: Some("bastion".parse().expect("a name")) }
}

/// Dials from here.
#[derive(Debug)]
struct Direct;

impl Connect for Direct {
    fn connect<'a>(&'a self, to: &'a Target, _proxy: Option<&'a str>) -> Connecting<'a> {
        Box::pin(async move { Ok(Box::new(TcpStream::connect(to.to_string()).await?) as Box<dyn Stream>) })
    }
}

fn means(connect: impl Connect + 'static, tasks: &Tasks) -> Means {
    Means { connect: Arc::new(connect), tasks: tasks.clone() }
}

/// Lines of a chain.
fn lines(chain: &mut Chain, count: usize) -> Batch {
    let (first, mut bytes) = (chain.next(), Vec::new());
    for number in 0..count {
        let mut line =
            format!("{{\"v\":1,\"time\":\"2026-11-21T20:00:00.123Z\",\"event\":\"forward.denied\",\"n\":{number}}}\n")
                .into_bytes();
        chain.link(&mut line);
        bytes.extend_from_slice(&line);
    }
    let last = chain.next() - 1;
    Batch { bytes: Bytes::from(bytes), first, last, records: count as u64, times: (0, 0) }
}

fn chain() -> Chain {
    Chain::begin(&TrailId::parse("000102030405060708090a0b0c0d0e0f").expect("an id"))
}

/// One frame, as a collector reads it.
async fn frame(stream: &mut (impl AsyncRead + Unpin)) -> Option<String> {
    let mut len = 0;
    loop {
        match stream.read_u8().await.ok()? {
            b' ' => break,
            digit => {
                len = len * 10 + usize::from(digit.checked_sub(b'0').filter(|digit| *digit < 10).expect("a length"))
            }
        }
    }
    let mut text = vec![0; len];
    stream.read_exact(&mut text).await.ok()?;
    Some(String::from_utf8(text).expect("UTF-8"))
}

#[test]
fn a_frame_is_as_the_standards_want_it() {
    let framer = Framer { facility: 13, origin: "bastion caponier 7".into() };
    let mut frames = Vec::new();
    let line = "{\"v\":1,\"time\":\"2026-11-21T20:00:00.123Z\",\"event\":\"forward.denied\",\"detail\":\"é\"}\n";
    framer.frame(line.as_bytes(), &mut frames);
    framer.frame(b"nonsense\n", &mut frames);
    // 13 * 8 + 4: the length counts bytes, and the mark of UTF-8 is absent.
    let first = format!("<108>1 2026-11-21T20:00:00.123Z bastion caponier 7 forward.denied - {}", line.trim_end());
    let second = "<110>1 - bastion caponier 7 - - nonsense";
    let expected = format!("{} {first}{} {second}", first.len(), second.len());
    assert_eq!(String::from_utf8(frames).expect("UTF-8"), expected);
}

#[test]
fn a_record_cannot_put_anything_into_the_header() {
    let framer = Framer { facility: 1, origin: "- caponier 7".into() };
    for head in ["{\"time\":\"a b\",\"event\":\"x\"}", "{\"time\":\"\",\"event\":\"\"}", "{\"time\":1}", "[]"] {
        let mut frames = Vec::new();
        framer.frame(head.as_bytes(), &mut frames);
        let text = String::from_utf8(frames).expect("UTF-8");
        assert!(text.contains(" <14>1 - - caponier 7 "), "{text}");
    }
}

#[test]
fn names_are_checked() {
    assert_eq!("local7".parse::<Facility>(), Ok(Facility(23)));
    for text in ["", "kern", "13", "LOCAL0"] {
        assert_eq!(text.parse::<Facility>(), Err(FacilityError), "{text:?}");
    }
    for text in ["", "a b", "a\n", "ä", &"x".repeat(256)] {
        assert_eq!(text.parse::<Hostname>(), Err(HostnameError), "{text:?}");
    }
}

#[tokio::test]
async fn what_arrives_is_the_chain() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (feed, batches, progress) = pipe();
    let tasks = Tasks::new();
    let config = config(listener.local_addr().expect("an address"));
    tasks.spawn(run(config, batches, progress, means(Direct, &tasks), CancellationToken::new()));
    let mut chain = chain();
    feed.force(lines(&mut chain, 3));
    feed.force(lines(&mut chain, 2_000));
    let (stream, _) = timeout(PATIENCE, listener.accept()).await.expect("in time").expect("a connection");
    let mut stream = BufReader::new(stream);
    let mut before = None;
    for _ in 0..2_003 {
        let text = timeout(PATIENCE, frame(&mut stream)).await.expect("in time").expect("a frame");
        let line = format!("{}\n", text.split_once(" - ").expect("a header").1);
        let linked = crate::audit::chain::Linked::read(line.as_bytes()).expect("a record");
        assert!(before.is_none_or(|before| before == linked.prev), "{line}");
        before = Some(Link::of(line.as_bytes()));
    }
    assert_eq!(before, Some(chain.last()));
    drop(feed);
    assert_eq!(timeout(PATIENCE, frame(&mut stream)).await.expect("in time"), None, "the goodbye");
}

#[tokio::test]
async fn a_connection_that_was_closed_is_made_anew() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (feed, batches, progress) = pipe();
    let tasks = Tasks::new();
    let config = config(listener.local_addr().expect("an address"));
    tasks.spawn(run(config, batches, progress, means(Direct, &tasks), CancellationToken::new()));
    let mut chain = chain();
    for round in 0..3 {
        feed.force(lines(&mut chain, 1));
        let (stream, _) = timeout(PATIENCE, listener.accept()).await.expect("in time").expect("a connection");
        let mut stream = BufReader::new(stream);
        let text = timeout(PATIENCE, frame(&mut stream)).await.expect("in time").expect("a frame");
        assert!(text.contains(&format!("\"seq\":{round},")), "{text}");
        // Gone, and the other end has seen it when this returns.
        let mut stream = stream.into_inner();
        stream.shutdown().await.expect("a goodbye");
        assert_eq!(timeout(PATIENCE, stream.read_u8()).await.expect("in time").ok(), None);
    }
}

/// A collector in memory: each connection comes out of a channel.
#[derive(Debug)]
struct Memory(mpsc::Sender<DuplexStream>);

impl Connect for Memory {
    fn connect<'a>(&'a self, _to: &'a Target, _proxy: Option<&'a str>) -> Connecting<'a> {
        // Much smaller than what is sent at once, so that the sender is in the middle of it whenever the other end hangs up.
        let (near, far) = tokio::io::duplex(1024);
        Box::pin(async move {
            self.0.send(far).await.map_err(std::io::Error::other)?;
            Ok(Box::new(near) as Box<dyn Stream>)
        })
    }
}

/// TLS at both ends: whom the sink trusts, and the collector.
fn tls(dir: &Path) -> (Tls, Acceptor) {
    let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = || rcgen::KeyPair::generate().expect("a key");
    let authority = rcgen::CertifiedIssuer::self_signed(params, key()).expect("an authority");
    let own = key();
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
    let certificate = params.signed_by(&own, &authority).expect("a certificate");
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("a mode");
        path
    };
    let ca_file = Some(put("ca.pem", &authority.pem()));
    let identity = Identity::read(&put("own.pem", &certificate.pem()), &put("own.key", &own.serialize_pem()));
    let certificates = Certificates::new(vec![identity.expect("an identity")]).expect("one");
    let tls = Tls::read(TlsFiles { ca_file, identity: None }).expect("whom it trusts");
    (tls, Acceptor::new(certificates, ClientPolicy::Off))
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_is_cut_within_tls_comes_again_whole() {
    let dir = tempfile::tempdir().expect("a folder");
    let (tls, acceptor) = tls(dir.path());
    let (sender, mut connections) = mpsc::channel(1);
    let (feed, batches, progress) = pipe();
    let (tasks, stop) = (Tasks::new(), CancellationToken::new());
    let mut config = config("127.0.0.1:6514".parse().expect("an address"));
    config.place.tls = Some(tls);
    tasks.spawn(run(config, batches, progress, means(Memory(sender), &tasks), stop.clone()));
    let mut chain = chain();
    feed.force(lines(&mut chain, 3_000));

    // What a collector keeps: whole messages, of each connection in order.
    let mut kept: Vec<Vec<u64>> = Vec::new();
    let seq = |text: &str| {
        let line = format!("{}\n", text.split_once(" - ").expect("a header").1);
        crate::audit::chain::Linked::read(line.as_bytes()).expect("a record, whole").seq
    };
    // Within the length, the header and the text of a message, and right at its end.
    for cut in [Some(0), Some(1), Some(2), Some(20), Some(60), Some(150), None] {
        let far = connections.recv().await.expect("a connection");
        let accepted = acceptor.accept(far).await.map_err(|(error, _)| error).expect("TLS");
        let mut stream = accepted.stream;
        let mut numbers = Vec::new();
        match cut {
            Some(cut) => {
                for _ in 0..200 {
                    numbers.push(seq(&frame(&mut stream).await.expect("a frame")));
                }
                stream.read_exact(&mut vec![0; cut]).await.expect("a piece of the next");
            }
            None => {
                while numbers.last() != Some(&2_999) {
                    numbers.push(seq(&frame(&mut stream).await.expect("a frame")));
                }
                tasks.spawn(async move { while frame(&mut stream).await.is_some() {} });
            }
        }
        assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{numbers:?}");
        kept.push(numbers);
    }
    // The last connection begins no later than what was cut, so that all of them are there, whole.
    let all: std::collections::BTreeSet<u64> = kept.into_iter().flatten().collect();
    assert_eq!(all.into_iter().collect::<Vec<_>>(), (0..3_000).collect::<Vec<_>>());
    let written = timeout(PATIENCE, async {
        while feed.written() != Some(2_999) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    written.await.expect("it knows that all is taken");
    stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_collector_that_stalls_is_told_of() {
    #[derive(Debug)]
    struct Stalling;
    impl Connect for Stalling {
        fn connect<'a>(&'a self, _to: &'a Target, _proxy: Option<&'a str>) -> Connecting<'a> {
            let (near, far) = tokio::io::duplex(16);
            // Never read, and never dropped.
            std::mem::forget(far);
            Box::pin(async move { Ok(Box::new(near) as Box<dyn Stream>) })
        }
    }
    let (feed, batches, progress) = pipe();
    let tasks = Tasks::new();
    let stop = CancellationToken::new();
    let config = config("127.0.0.1:1".parse().expect("an address"));
    tasks.spawn(run(config, batches, progress, means(Stalling, &tasks), stop.clone()));
    feed.force(lines(&mut chain(), 1));
    tokio::time::sleep(crate::limits::SINK_DELIVERY + Duration::from_secs(1)).await;
    assert_eq!(feed.failure().map(|failure| failure.reason), Some("timed_out"));
    assert_eq!(feed.written(), None);
    stop.cancel();
    assert!(tasks.drain(PATIENCE).await, "it ends at the stop");
}

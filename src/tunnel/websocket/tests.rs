use std::collections::VecDeque;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::frame::{Event, write_control, write_data};
use super::*;
use crate::target::Target;

/// The other end's.
fn other(role: Role) -> Role {
    match role {
        Role::Client => Role::Server,
        Role::Server => Role::Client,
    }
}

/// A frame as it could be, and as ours never are.
fn raw(first: u8, payload: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
    let mut frame = vec![first, if mask.is_some() { 0x80 } else { 0 }];
    match payload.len() {
        len @ 0..126 => frame[1] |= len as u8,
        len @ 126..=0xffff => {
            frame[1] |= 126;
            frame.extend((len as u16).to_be_bytes());
        }
        len => {
            frame[1] |= 127;
            frame.extend((len as u64).to_be_bytes());
        }
    }
    frame.extend(mask.iter().flatten());
    let mask = mask.unwrap_or_default();
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// What comes out where this goes in, in pieces that end at each of `cuts`.
fn take(role: Role, bytes: &[u8], cuts: &[usize]) -> (Vec<u8>, Vec<Result<Event, Violation>>) {
    let mut incoming = Incoming::new(role);
    let (mut data, mut events) = (Vec::new(), Vec::new());
    let mut at = 0;
    for end in cuts.iter().copied().chain([bytes.len()]) {
        let mut piece = bytes[at..end].to_vec();
        let (kept, new) = incoming.take(&mut piece);
        data.extend_from_slice(&piece[..kept]);
        let over = new.last().is_some_and(|event| matches!(event, Err(_) | Ok((Control::Close, _))));
        events.extend(new);
        if over {
            break;
        }
        at = end;
    }
    (data, events)
}

#[derive(Debug, Clone)]
enum Said {
    /// A message in so many parts.
    Message(Vec<Vec<u8>>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
}

fn said() -> impl Strategy<Value = Said> {
    let bytes = |most| prop::collection::vec(any::<u8>(), 1..most);
    prop_oneof![
        4 => prop::collection::vec(prop_oneof![bytes(300), bytes(20)], 1..4).prop_map(Said::Message),
        1 => bytes(125).prop_map(Said::Ping),
        1 => bytes(125).prop_map(Said::Pong),
    ]
}

proptest! {
    /// Whatever the pieces are in which frames come, whichever masks they have, and whether control frames stand between the
    /// parts of a message.
    #[test]
    fn frames_in_any_pieces_are_one_stream(
        script in prop::collection::vec(said(), 1..20),
        ping_between in any::<bool>(),
        masked in any::<bool>(),
        masks in prop::collection::vec(any::<[u8; 4]>(), 1..7),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let mut masks = masks.into_iter().cycle().map(|mask| masked.then_some(mask));
        let (mut bytes, mut data, mut controls) = (Vec::new(), Vec::new(), Vec::new());
        let mut mask = || masks.next().flatten();
        for one in script {
            match one {
                Said::Message(parts) => {
                    let last = parts.len() - 1;
                    for (at, part) in parts.iter().enumerate() {
                        let first = if at == 0 { 0x02 } else { 0x00 } | if at == last { 0x80 } else { 0 };
                        bytes.extend(raw(first, part, mask()));
                        data.extend_from_slice(part);
                        if ping_between && at < last {
                            bytes.extend(raw(0x89, b"between", mask()));
                            controls.push((Control::Ping, b"between".to_vec()));
                        }
                    }
                }
                Said::Ping(payload) => {
                    bytes.extend(raw(0x89, &payload, mask()));
                    controls.push((Control::Ping, payload));
                }
                Said::Pong(payload) => {
                    bytes.extend(raw(0x8a, &payload, mask()));
                    controls.push((Control::Pong, payload));
                }
            }
        }
        let role = if masked { Role::Server } else { Role::Client };
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        cuts.sort_unstable();
        let controls: Vec<_> = controls.into_iter().map(Ok).collect();
        prop_assert_eq!(take(role, &bytes, &cuts), (data, controls));
    }

    /// What is no WebSocket is refused or waited for, and never makes a panic; what comes out is never more than what came in.
    #[test]
    fn garbage_is_borne(bytes in prop::collection::vec(any::<u8>(), 0..300), server in any::<bool>(), cut in any::<prop::sample::Index>()) {
        let role = if server { Role::Server } else { Role::Client };
        let cut = if bytes.is_empty() { 0 } else { cut.index(bytes.len()) };
        let (data, events) = take(role, &bytes, &[cut]);
        prop_assert!(data.len() <= bytes.len() && events.len() <= bytes.len());
        prop_assert_eq!(take(role, &bytes, &[]), (data, events));
    }
}

/// Lengths around those at which the form of a header changes, and every single place where they can be cut.
#[test]
fn what_we_write_can_be_read_wherever_it_is_cut() {
    for role in [Role::Client, Role::Server] {
        for len in [1, 125, 126, 127, 0xffff, 0x1_0000, 0x1_0001] {
            let payload: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
            let mut bytes = Vec::new();
            write_control(&mut bytes, role, Control::Ping, b"x");
            write_data(&mut bytes, role, &payload);
            write_control(&mut bytes, role, Control::Close, &1000_u16.to_be_bytes());
            let expected = vec![Ok((Control::Ping, b"x".to_vec())), Ok((Control::Close, vec![3, 232]))];
            let cuts = (0..bytes.len()).filter(|cut| *cut < 40 || bytes.len() - cut < 40);
            for cut in cuts {
                assert_eq!(
                    take(other(role), &bytes, &[cut]),
                    (payload.clone(), expected.clone()),
                    "{role:?} {len} {cut}"
                );
            }
        }
    }
}

#[test]
fn what_our_ends_never_send_is_refused() {
    let mask = Some([1, 2, 3, 4]);
    let part = raw(0x02, b"part", mask);
    let big = [&[0x82, 0xff][..], &(limits::WEBSOCKET_MESSAGE_MAX + 1).to_be_bytes(), &[0; 4]].concat();
    let endless = [&[0x00, 0xff][..], &(limits::WEBSOCKET_MESSAGE_MAX - 3).to_be_bytes(), &[0; 4]].concat();
    let absurd = [&[0x82, 0xff][..], &u64::MAX.to_be_bytes(), &[0; 4]].concat();
    for (what, frames, violation) in [
        ("text", raw(0x81, b"hello", mask), Violation::Text),
        ("no mask", raw(0x82, b"hello", None), Violation::Mask),
        ("too long", big, Violation::Oversize),
        ("too long in parts", [&part[..], &endless].concat(), Violation::Oversize),
        ("absurdly long", absurd, Violation::Oversize),
        ("an extension", raw(0xc2, b"hello", mask), Violation::Reserved),
        ("a kind of data that there is not", raw(0x83, b"hello", mask), Violation::Reserved),
        ("a kind of control that there is not", raw(0x8b, b"", mask), Violation::Reserved),
        ("a part of nothing", raw(0x80, b"hello", mask), Violation::Fragment),
        ("a message within another", [&part[..], &part].concat(), Violation::Fragment),
        ("half a ping", raw(0x09, b"hello", mask), Violation::Control),
        ("a long ping", raw(0x89, &[0; 126], mask), Violation::Control),
        ("a length in two bytes", vec![0x82, 0xfe, 0, 125, 0, 0, 0, 0], Violation::Length),
        ("a length in eight", vec![0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0], Violation::Length),
        ("empty messages", raw(0x82, b"", mask).repeat(limits::WEBSOCKET_IDLE_FRAMES + 1), Violation::Flood),
        (
            "a part of a message that never comes",
            {
                let parts = raw(0x00, b"", mask).repeat(limits::WEBSOCKET_IDLE_FRAMES + 1);
                [&part[..], &parts].concat()
            },
            Violation::Flood,
        ),
    ] {
        let (_, events) = take(Role::Server, &frames, &[]);
        assert_eq!(events, [Err(violation)], "{what}");
    }
    let (_, events) = take(Role::Client, &raw(0x82, b"hello", mask), &[]);
    assert_eq!(events, [Err(Violation::Mask)]);
    let pings = raw(0x89, b"", mask).repeat(limits::WEBSOCKET_IDLE_FRAMES + 1);
    assert_eq!(take(Role::Server, &pings, &[]).1.last(), Some(&Err(Violation::Flood)));
    // As many as that are good, again and again, where something comes between.
    let good =
        [raw(0x89, b"", mask).repeat(limits::WEBSOCKET_IDLE_FRAMES - 1), raw(0x82, b"x", mask)].concat().repeat(3);
    assert!(take(Role::Server, &good, &[]).1.iter().all(Result::is_ok));
}

fn pair(room: usize) -> (WebSocket<DuplexStream>, WebSocket<DuplexStream>) {
    let (near, far) = tokio::io::duplex(room);
    (WebSocket::new(near, Role::Client, Bytes::new()), WebSocket::new(far, Role::Server, Bytes::new()))
}

/// Both ways at once, through less room than a frame takes.
#[tokio::test]
async fn bytes_go_both_ways_unchanged() {
    let (near, far) = pair(1000);
    let sent: Vec<u8> = (0..=255).cycle().take(3_000_000).collect();
    let ((mut near_read, mut near_write), (mut far_read, mut far_write)) =
        (tokio::io::split(near), tokio::io::split(far));
    let (mut there, mut back) = (Vec::new(), Vec::new());
    tokio::join!(
        async {
            near_write.write_all(&sent).await.expect("written");
            near_write.shutdown().await.expect("shut down");
        },
        async {
            far_write.write_all(&sent).await.expect("written");
            far_write.flush().await.expect("flushed");
            // The other end closes: there is nothing more that could be lost.
            far_read.read_to_end(&mut there).await.expect("read to an orderly end");
            far_write.shutdown().await.expect("shut down");
        },
        async { near_read.read_to_end(&mut back).await.map(drop).expect("read to an orderly end") },
    );
    assert!(there == sent && back == sent, "bytes were changed, lost or reordered");
}

#[tokio::test]
async fn whoever_has_closed_still_reads_until_the_other_end_has() {
    let (mut near, mut far) = pair(64 * 1024);
    near.write_all(b"last words").await.expect("written");
    near.shutdown().await.expect("shut down");
    assert_eq!(near.write(b"x").await.expect_err("it is closed").kind(), io::ErrorKind::BrokenPipe);
    far.write_all(b"an answer").await.expect("written");
    let mut read = Vec::new();
    far.read_to_end(&mut read).await.expect("an orderly end");
    assert_eq!(read, b"last words");
    far.write_all(b"goes nowhere").await.expect("as over TCP");
    far.shutdown().await.expect("shut down");
    drop(far);
    read.clear();
    near.read_to_end(&mut read).await.expect("an orderly end");
    assert_eq!(read, b"an answer");
}

#[tokio::test]
async fn an_end_without_a_close_is_an_error() {
    for cut in [0, 1, 5, 9] {
        let (mut near, far) = tokio::io::duplex(64);
        near.write_all(&raw(0x82, b"hello", Some([1; 4]))[..cut]).await.expect("written");
        drop(near);
        let mut far = WebSocket::new(far, Role::Server, Bytes::new());
        let error = far.read_to_end(&mut Vec::new()).await.expect_err("abrupt");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{cut}");
    }
    // So is a close because something is wrong.
    let (mut near, far) = tokio::io::duplex(64);
    near.write_all(&raw(0x88, &1011_u16.to_be_bytes(), Some([1; 4]))).await.expect("written");
    let mut far = WebSocket::new(far, Role::Server, Bytes::new());
    let error = far.read_to_end(&mut Vec::new()).await.expect_err("a fault at the other end");
    assert!(error.to_string().contains("code 1011"), "{error}");
}

/// A peer that breaks the rules is told so, reads no end in order, and gets nothing more.
#[tokio::test]
async fn a_violation_is_told_and_stays() {
    let (mut near, far) = tokio::io::duplex(64);
    near.write_all(&[raw(0x82, b"good", Some([1; 4])), raw(0x81, b"text", Some([1; 4]))].concat())
        .await
        .expect("written");
    let mut far = WebSocket::new(far, Role::Server, Bytes::new());
    let mut read = [0; 4];
    far.read_exact(&mut read).await.expect("what came before");
    assert_eq!(&read, b"good");
    for _ in 0..2 {
        let error = far.read(&mut read).await.expect_err("text");
        assert!(error.kind() == io::ErrorKind::InvalidData && error.to_string().contains("text"), "{error}");
    }
    let mut told = [0; 4];
    near.read_exact(&mut told).await.expect("told");
    assert_eq!(told, [0x88, 2, 0x03, 0xeb]);
}

#[tokio::test(start_paused = true)]
async fn both_ends_ping_while_nothing_is_said_and_answer() {
    let (near, far) = tokio::io::duplex(64);
    let mut far = WebSocket::new(far, Role::Server, Bytes::new());
    let (mut near_read, mut near_write) = tokio::io::split(near);
    let since = Instant::now();
    let reading = async { far.read_u8().await };
    let watching = async {
        let mut heard = [0; 2];
        for _ in 0..3 {
            near_read.read_exact(&mut heard).await.expect("a ping");
            assert_eq!(heard, [0x89, 0]);
        }
        assert!(since.elapsed() >= 3 * limits::WEBSOCKET_PING && since.elapsed() < 4 * limits::WEBSOCKET_PING);
        near_write.write_all(&raw(0x89, b"are you there", Some([7; 4]))).await.expect("written");
        let mut pong = [0; 15];
        near_read.read_exact(&mut pong).await.expect("a pong");
        assert_eq!(&pong, b"\x8a\x0dare you there");
        near_write.write_all(&raw(0x82, b"!", Some([7; 4]))).await.expect("written");
    };
    let (read, ()) = tokio::join!(reading, watching);
    assert_eq!(read.expect("a byte"), b'!');
}

/// A peer that takes nothing makes nobody keep more than is said, whatever it asks for.
#[tokio::test]
async fn what_waits_to_be_written_is_bounded() {
    let (mut near, far) = tokio::io::duplex(16);
    let mut far = WebSocket::new(far, Role::Server, Bytes::new());
    let chunk = vec![0; limits::CHUNK];
    let filling = async {
        loop {
            far.write_all(&chunk).await.expect("written");
        }
    };
    assert!(tokio::time::timeout(std::time::Duration::from_millis(20), filling).await.is_err(), "it waits");
    let most = limits::WEBSOCKET_UNSENT + limits::CHUNK + 14;
    assert!(far.unsent() >= limits::WEBSOCKET_UNSENT && far.unsent() <= most, "{}", far.unsent());
    let before = far.unsent();
    let asking = async {
        for _ in 0..1000 {
            near.write_all(&raw(0x89, &[0; 125], Some([7; 4]))).await.expect("written");
            near.write_all(&raw(0x82, b"!", Some([7; 4]))).await.expect("written");
        }
    };
    let reading = async {
        for _ in 0..1000 {
            far.read_u8().await.expect("read");
        }
    };
    tokio::join!(asking, reading);
    assert!(far.unsent() <= before, "{}", far.unsent());
}

/// What the other end says to a request, and what is left after it.
async fn ask(reply: &'static [u8]) -> Result<Bytes, UpgradeError> {
    let (near, mut far) = tokio::io::duplex(1 << 17);
    let to: Target = "gateway.example:443".parse().expect("a target");
    let answering = async {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(far.read_u8().await.expect("read"));
        }
        let request = String::from_utf8(request).expect("text");
        assert!(request.starts_with("GET /x HTTP/1.1\r\nHost: gateway.example\r\n"), "{request}");
        let headers: VecDeque<_> = request.lines().skip(1).filter_map(|line| line.split_once(": ")).collect();
        let header =
            |name: &str| headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name)).map(|(_, value)| *value);
        let upgrade = Upgrade::of(header).expect("what we ask for is what we accept");
        let reply = String::from_utf8_lossy(reply).replace("ACCEPT", &upgrade.accept);
        far.write_all(reply.as_bytes()).await.expect("written");
        far.shutdown().await.expect("shut down");
        far
    };
    let (asked, _far) = tokio::join!(connect(near, &to, "/x", Bytes::new()), answering);
    asked.map(|socket| socket.rest)
}

const GOOD: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nConnection: keep-alive, upgrade\r\n\
    Sec-WebSocket-Accept: ACCEPT\r\nSec-WebSocket-Protocol: caponier\r\n\r\n";

#[tokio::test]
async fn what_follows_an_agreement_is_kept() {
    let rest = ask(format!("{GOOD}\u{1}after").leak().as_bytes()).await.expect("agreed");
    assert_eq!(&rest[..], b"\x01after");
}

#[tokio::test]
async fn other_answers_say_what_to_do() {
    for (from, to, says) in [
        ("101", "200", "status 200: an inspecting proxy or balancer stands between"),
        ("101", "302", "login page"),
        ("101", "403", "status 403: an inspecting proxy or balancer stands between, and refuses it"),
        ("101", "404", "no gateway is behind this path"),
        ("101", "426", "tls_terminated_by"),
        ("101", "502", "does not reach the gateway"),
        ("101", "418", "ask the network team"),
        ("HTTP/1.1 101", "HTTP/1.0 503", "status 503"),
        ("HTTP/1.1", "HTTP/2", "not an HTTP reply"),
        ("HTTP/1.1", "SSH-2.0-x", "not an HTTP reply"),
        ("Upgrade: WebSocket", "Upgrade: h2c", "agreed to another protocol than was asked for (Upgrade)"),
        ("keep-alive, upgrade", "keep-alive", "(Connection)"),
        ("ACCEPT", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", "(Sec-WebSocket-Accept)"),
        ("caponier", "chat", "(Sec-WebSocket-Protocol)"),
        ("Sec-WebSocket-Protocol: caponier\r\n", "", "(Sec-WebSocket-Protocol)"),
        ("\r\n\r\n", "\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n", "(Sec-WebSocket-Extensions)"),
        ("\r\n\r\n", "\r\n", "closed the connection"),
        (GOOD, "", "closed the connection"),
    ] {
        let error = ask(GOOD.replacen(from, to, 1).leak().as_bytes()).await.expect_err(to);
        assert!(error.to_string().contains(says), "{to}: {error}");
    }
    let long = format!("HTTP/1.1 101 x\r\nX: {}", "y".repeat(limits::WEBSOCKET_REPLY_MAX));
    assert!(matches!(ask(long.leak().as_bytes()).await, Err(UpgradeError::NotHttp { .. })));
}

#[test]
fn requests_for_something_else_are_refused() {
    let good = [
        ("upgrade", "WebSocket"),
        ("connection", "keep-alive, Upgrade"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-protocol", "chat, caponier"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let judge = |headers: &[(&str, &'static str)]| {
        Upgrade::of(|name: &str| headers.iter().find(|(header, _)| *header == name).map(|(_, value)| *value))
    };
    // The example of RFC 6455 §1.3.
    assert_eq!(judge(&good).expect("accepted").accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    for (at, wrong) in [(0, "h2c"), (1, "close"), (2, "8"), (3, "chat"), (4, "c2hvcnQ="), (4, "not base64")] {
        let mut headers = good;
        headers[at].1 = wrong;
        assert_eq!(judge(&headers).expect_err(wrong), UpgradeFault(good[at].0), "{wrong}");
        let without: Vec<_> = good.iter().copied().filter(|(name, _)| *name != good[at].0).collect();
        assert_eq!(judge(&without).expect_err("missing"), UpgradeFault(good[at].0));
    }
}

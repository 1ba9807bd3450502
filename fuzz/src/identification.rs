//! Identification strings, whole and as they come off a stream.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use caponier::limits;
use caponier::tunnel::admit::{Greeted, greet};
use caponier::tunnel::wire::{self, IdentificationError, Peer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
}

/// What is said to be ours is written in exactly one way, nobody else is taken for one of ours, and how a line is cut into
/// packets changes nothing. The first byte says how it is cut.
pub fn holds(bytes: &[u8]) {
    line_holds(bytes);
    let Some((cut, said)) = bytes.split_first() else { return };
    let whole = greeting(said, usize::MAX);
    let cut = greeting(said, usize::from(*cut).max(1));
    match (&whole, &cut) {
        (Some(whole), Some(cut)) => assert_eq!(whole.peer, cut.peer),
        (None, None) => {}
        _ => panic!("{} depends on how it is cut", said.escape_ascii()),
    }
    for greeted in [whole, cut].into_iter().flatten() {
        assert!(said.starts_with(&greeted.head), "what was read is replayed as it was");
        let end = greeted.head.iter().position(|byte| *byte == b'\n').expect("a line");
        assert!(end < limits::IDENTIFICATION_MAX && greeted.said.is_none());
        let line = &greeted.head[..end];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        assert_eq!(Peer::parse(line), Ok(greeted.peer));
    }
}

fn line_holds(line: &[u8]) {
    let claims = line.starts_with(b"SSH-2.0-caponier_");
    match Peer::parse(line) {
        Ok(peer) => {
            assert!(line.len() <= 253 && line.iter().all(|byte| (0x20..0x7f).contains(byte)));
            assert!(line.starts_with(b"SSH-2.0-"));
            let text = str::from_utf8(line).expect("ASCII");
            match peer {
                Peer::Agent { name, replica: Some(replica) } => assert_eq!(text, wire::agent_line(&name, &replica)),
                Peer::Agent { name, replica: None } => {
                    assert_eq!(text, format!("{} agent={name}", wire::DOOR_LINE));
                }
                Peer::Client => assert_eq!(text, wire::CLIENT_LINE),
                Peer::Door => assert_eq!(text, wire::DOOR_LINE),
                Peer::Stock => assert!(!claims, "{text}"),
            }
        }
        Err(error) => {
            let said = error.to_string();
            assert!(super::is_printable(&said) && said.len() < 1_000, "{said:?}");
            match error {
                IdentificationError::NotSsh(_) => assert!(!line.starts_with(b"SSH-")),
                IdentificationError::Major(major) => assert!(claims && major != wire::MAJOR),
                IdentificationError::Malformed => assert!(claims),
                IdentificationError::SshVersion => assert!(!line.starts_with(b"SSH-2.0-")),
                IdentificationError::TooLong => assert!(line.len() > 253),
                IdentificationError::Character => assert!(line.iter().any(|byte| !(0x20..0x7f).contains(byte))),
            }
        }
    }
}

/// What the reader of a connection makes of it, in pieces of at most `most` bytes.
fn greeting(said: &[u8], most: usize) -> Option<Greeted> {
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            // It never waits: after the last byte the stream is at its end.
            let deadline = Instant::now() + Duration::from_secs(60);
            greet(&mut Said { rest: said, most }, Bytes::new(), None, deadline).await.ok()
        })
    })
}

/// A connection whose peer has said all that it will.
struct Said<'a> {
    rest: &'a [u8],
    most: usize,
}

impl AsyncRead for Said<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let length = self.rest.len().min(self.most).min(into.remaining());
        let (piece, rest) = self.rest.split_at(length);
        into.put_slice(piece);
        self.rest = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Said<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        panic!("nothing is said to a peer that speaks first");
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

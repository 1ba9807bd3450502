//! Moves the bytes of one forward, both ways, until both ends have said that they are done or one of them breaks.
//!
//! Promised: an end of file is passed on by itself, so that half-closed connections work; what breaks on one side looks
//! broken on the other (a reset, or a channel closed without EOF), never like a clean end; what arrives is a prefix of
//! what was sent, and all of it when both sides ended cleanly.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_util::sync::CancellationToken;

use super::ssh;
use crate::audit::Counters;
use crate::limits;

/// How a splice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both sides said that they were done.
    Clean,
    /// The principal's side broke.
    NearBroke(io::ErrorKind),
    /// The target's side broke.
    FarBroke(io::ErrorKind),
    /// It was stopped from here.
    Stopped,
}

/// One side of a splice.
pub enum Side {
    /// A socket.
    Tcp(TcpStream),
    /// A channel.
    Channel(ssh::Channel),
    /// A pipe within the process, for whoever needs a stream.
    Pipe(DuplexStream),
}

enum Reader {
    Tcp(OwnedReadHalf, BytesMut),
    Channel(ssh::Reader),
    Pipe(ReadHalf<DuplexStream>, BytesMut),
}

enum Writer {
    Tcp(OwnedWriteHalf),
    Channel(ssh::Writer),
    Pipe(WriteHalf<DuplexStream>),
}

/// Runs the forward between `near`, the principal's side, and `far`, the target's, until its end or `stop`.
///
/// The forward is over when this returns; what is left of its two sides is then to be [left](Remains::leave).
pub async fn splice(near: Side, far: Side, counters: &Counters, stop: &CancellationToken) -> (End, Remains) {
    let (mut near_reader, mut near_writer) = near.split();
    let (mut far_reader, mut far_writer) = far.split();
    let halves = Halves::default();
    let end = tokio::select! {
        end = direction(&mut near_reader, &mut far_writer, |bytes| counters.add_to_target(bytes), &halves) => match end {
            Broke::Reading(kind) => End::NearBroke(kind),
            Broke::Writing(kind) => End::FarBroke(kind),
        },
        end = direction(&mut far_reader, &mut near_writer, |bytes| counters.add_from_target(bytes), &halves) => match end {
            Broke::Reading(kind) => End::FarBroke(kind),
            Broke::Writing(kind) => End::NearBroke(kind),
        },
        () = halves.both.cancelled() => End::Clean,
        () = stop.cancelled() => End::Stopped,
    };
    let clean = end == End::Clean;
    (end, Remains { near: (near_reader, near_writer), far: (far_reader, far_writer), clean })
}

/// The two sides of a forward that is over.
#[must_use = "sides that are not left properly look as if the forward had ended well"]
pub struct Remains {
    near: (Reader, Writer),
    far: (Reader, Writer),
    clean: bool,
}

impl Remains {
    /// Closes both sides: in order after a clean end, else so that each peer sees that something broke. May wait a little for
    /// a peer to close first.
    pub async fn leave(self) {
        tokio::join!(leave(self.near.0, self.near.1, self.clean), leave(self.far.0, self.far.1, self.clean));
    }
}

#[derive(Default)]
struct Halves {
    one: AtomicBool,
    both: CancellationToken,
}

enum Broke {
    Reading(io::ErrorKind),
    Writing(io::ErrorKind),
}

/// Copies until the end of file, passes it on, and then waits for the reader's side to break: a channel that is closed while
/// the other direction waits must end the forward.
async fn direction(reader: &mut Reader, writer: &mut Writer, count: impl Fn(u64), halves: &Halves) -> Broke {
    loop {
        match reader.next().await {
            Ok(Some(bytes)) => {
                let length = bytes.len() as u64;
                if let Err(error) = writer.send(bytes).await {
                    return Broke::Writing(error.kind());
                }
                count(length);
            }
            Ok(None) => break,
            Err(error) => return Broke::Reading(error.kind()),
        }
    }
    if let Err(error) = writer.finish().await {
        return Broke::Writing(error.kind());
    }
    if halves.one.swap(true, Ordering::Relaxed) {
        halves.both.cancel();
    }
    reader.gone().await;
    // Whichever comes first when both halves are done: that is the clean end.
    if halves.both.is_cancelled() {
        std::future::pending::<()>().await;
    }
    Broke::Reading(io::ErrorKind::ConnectionReset)
}

async fn leave(reader: Reader, writer: Writer, clean: bool) {
    match (reader, writer) {
        (Reader::Tcp(reader, _), Writer::Tcp(writer)) => {
            if !clean && let Ok(stream) = reader.reunite(writer) {
                // A broken forward must not look like an orderly end: the peer gets a reset. If the socket is beyond even
                // that, there is nobody left to be told.
                drop(stream.set_zero_linger());
            }
        }
        (Reader::Channel(mut reader), Writer::Channel(mut writer)) => {
            // The SSH library forgets a channel at once only if the peer closes it first. Whoever opened it does so.
            let patient = clean && reader.opened_by_peer();
            if patient && tokio::time::timeout(limits::CLOSE_PATIENCE, reader.closed()).await.is_ok() {
                writer.peer_closed();
            } else {
                writer.close().await;
            }
        }
        // A pipe ends by being dropped, and a side has halves of one kind only.
        _ => {}
    }
}

impl Side {
    fn split(self) -> (Reader, Writer) {
        match self {
            Self::Tcp(stream) => {
                let (reader, writer) = stream.into_split();
                (Reader::Tcp(reader, BytesMut::new()), Writer::Tcp(writer))
            }
            Self::Channel(channel) => (Reader::Channel(channel.reader), Writer::Channel(channel.writer)),
            Self::Pipe(pipe) => {
                let (reader, writer) = tokio::io::split(pipe);
                (Reader::Pipe(reader, BytesMut::new()), Writer::Pipe(writer))
            }
        }
    }
}

impl Reader {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Tcp(reader, buffer) => {
                buffer.reserve(limits::CHUNK);
                let read = reader.read_buf(buffer).await?;
                Ok((read > 0).then(|| buffer.split().freeze()))
            }
            Self::Channel(reader) => reader.next().await,
            Self::Pipe(reader, buffer) => {
                buffer.reserve(limits::CHUNK);
                let read = reader.read_buf(buffer).await?;
                Ok((read > 0).then(|| buffer.split().freeze()))
            }
        }
    }

    /// Waits until the side has broken or been closed for good.
    async fn gone(&mut self) {
        match self {
            // A socket whose end of file has been read says nothing more; writing to it will tell.
            Self::Tcp(..) | Self::Pipe(..) => std::future::pending().await,
            Self::Channel(reader) => reader.closed().await,
        }
    }
}

impl Writer {
    async fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        match self {
            Self::Tcp(writer) => writer.write_all(&bytes).await,
            Self::Channel(writer) => writer.send(bytes).await,
            Self::Pipe(writer) => writer.write_all(&bytes).await,
        }
    }

    async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(writer) => writer.shutdown().await,
            Self::Channel(writer) => writer.finish().await,
            Self::Pipe(writer) => writer.shutdown().await,
        }
    }
}

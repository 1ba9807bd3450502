//! Moves the bytes of one forward, both ways, until both ends have said that they are done or one of them breaks.
//!
//! Promised: an end of file is passed on by itself, so that half-closed connections work; what breaks on one side looks
//! broken on the other (a reset, or a channel closed without EOF), never like a clean end; what arrives is a prefix of
//! what was sent, and all of it when both sides ended cleanly.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, SetOnce};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::pool::Buffer;
use super::ssh::{self, Event, Returns};
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
    /// One side took nothing for so long, at the cost of others, that it was given up.
    Stalled,
    /// No byte has moved for as long as it may be idle.
    Idle,
    /// It has lived as long as it may.
    Expired,
    /// It was stopped from here.
    Stopped,
}

/// How long a forward may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bounds {
    /// Without a byte in either direction, whether or not one of them has ended.
    pub idle: Option<Duration>,
    /// At all.
    pub life: Option<Duration>,
}

impl Bounds {
    /// Waits until one of them is passed. It looks at what has been counted now and then: the bytes themselves reset nothing.
    /// An idle forward is noticed up to a quarter of its time late ([`limits::IDLE_LOOKS`]).
    async fn passed(self, counters: &Counters) -> End {
        let moved = || (counters.to_target(), counters.from_target());
        let began = Instant::now();
        let (mut seen, mut since) = (moved(), began);
        loop {
            let now = Instant::now();
            let expires = self.life.map(|life| began + life);
            if expires.is_some_and(|at| at <= now) {
                return End::Expired;
            }
            if moved() != seen {
                (seen, since) = (moved(), now);
            } else if self.idle.is_some_and(|idle| since + idle <= now) {
                return End::Idle;
            }
            let looks = self.idle.map(|idle| (now + idle / limits::IDLE_LOOKS).min(now.max(since + idle)));
            match [expires, looks].into_iter().flatten().min() {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            }
        }
    }
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
    Tcp(OwnedReadHalf),
    Channel(ssh::Reader),
    Pipe(ReadHalf<DuplexStream>, BytesMut),
}

enum Writer {
    Tcp(OwnedWriteHalf),
    Channel(ssh::Writer),
    Pipe(WriteHalf<DuplexStream>),
}

/// Runs the forward between `near`, the principal's side, and `far`, the target's, until its end, one of its `bounds` or
/// `stop`.
///
/// The forward is over when this returns; what is left of its two sides is then to be [left](Remains::leave).
pub async fn splice(
    near: Side,
    far: Side,
    counters: &Counters,
    bounds: Bounds,
    stop: &CancellationToken,
) -> (End, Remains) {
    let (mut near_reader, mut near_writer) = near.split();
    let (mut far_reader, mut far_writer) = far.split();
    let (up, down) = (Half::default(), Half::default());
    let both = CancellationToken::new();
    let end = {
        let upward = direction(&mut near_reader, &mut far_writer, |n| counters.add_to_target(n), (&up, &down), &both);
        let downward =
            direction(&mut far_reader, &mut near_writer, |n| counters.add_from_target(n), (&down, &up), &both);
        let moving = async { tokio::join!(upward, downward).0 };
        let cut = async {
            tokio::select! {
                biased;
                () = stop.cancelled() => End::Stopped,
                end = bounds.passed(counters) => end,
            }
        };
        tokio::pin!(moving, cut);
        tokio::select! {
            biased;
            never = &mut moving => match never {},
            () = both.cancelled() => End::Clean,
            end = &mut cut => end,
            broke = up.broke.wait() => {
                // What the target has said before it would take no more still reaches the principal.
                if matches!(broke, Broke::Writing(_)) {
                    last_words(moving, &down, cut).await;
                }
                broke.end(End::NearBroke, End::FarBroke)
            }
            broke = down.broke.wait() => {
                // What the principal has sent before it went away still reaches the target.
                if matches!(broke, Broke::Writing(_)) {
                    last_words(moving, &up, cut).await;
                }
                broke.end(End::FarBroke, End::NearBroke)
            }
        }
    };
    let clean = end == End::Clean;
    let near = Leaving { reader: near_reader, writer: near_writer, clean, told: down.is_done() };
    let far = Leaving { reader: far_reader, writer: far_writer, clean, told: up.is_done() };
    (end, Remains { near, far })
}

/// Lets a direction that is still on its way deliver what was sent into it. Both go on meanwhile: the one that broke still
/// has to take what comes.
async fn last_words(moving: impl Future<Output = Infallible>, half: &Half, cut: impl Future<Output = End>) {
    if half.is_done() {
        return;
    }
    tokio::select! {
        _ = tokio::time::timeout(limits::DELIVERY, moving) => {}
        () = half.done.cancelled() => {}
        _ = half.broke.wait() => {}
        _ = cut => {}
    }
}

/// Whether one direction has come to its end of file and passed it on, or how it broke.
#[derive(Default)]
struct Half {
    done: CancellationToken,
    broke: SetOnce<Broke>,
}

impl Half {
    fn is_done(&self) -> bool {
        self.done.is_cancelled()
    }
}

#[derive(Debug, Clone, Copy)]
enum Broke {
    Reading(io::ErrorKind),
    Writing(io::ErrorKind),
    /// The sink took nothing for too long, and was given up.
    Stalled,
}

impl Broke {
    fn end(self, reading: fn(io::ErrorKind) -> End, writing: fn(io::ErrorKind) -> End) -> End {
        match self {
            Self::Reading(kind) => reading(kind),
            Self::Writing(kind) => writing(kind),
            Self::Stalled => End::Stalled,
        }
    }
}

/// Copies until the end of file and passes it on, or says how that broke. It never returns, because a channel must be read
/// for as long as it is there: a direction that is done goes on watching its reader, since a channel that is closed while
/// the other direction waits must end the forward; and one that has lost its writer goes on emptying its reader, since the
/// SSH library holds up the whole session for a channel that is not read.
async fn direction(
    reader: &mut Reader,
    writer: &mut Writer,
    count: impl Fn(u64),
    (this, other): (&Half, &Half),
    both: &CancellationToken,
) -> Infallible {
    let finish = async |writer: &mut Writer| {
        if let Err(error) = writer.finish().await {
            return Broke::Writing(error.kind());
        }
        this.done.cancel();
        if other.is_done() {
            both.cancel();
        }
        std::future::pending().await
    };
    let say = |broke| {
        // A direction breaks but once.
        drop(this.broke.set(broke));
    };
    match reader {
        Reader::Tcp(_) | Reader::Pipe(..) => {
            let copy = async {
                loop {
                    match reader.read().await {
                        Ok(Some(bytes)) => {
                            let length = bytes.len() as u64;
                            if let Err(error) = writer.send(bytes).await {
                                return Broke::Writing(error.kind());
                            }
                            count(length);
                        }
                        Ok(None) => return finish(writer).await,
                        Err(error) => return Broke::Reading(error.kind()),
                    }
                }
            };
            say(copy.await);
        }
        Reader::Channel(reader) => {
            let returns = reader.returns();
            let inbox = Inbox::new(returns.clone());
            let fill = async {
                loop {
                    match reader.next().await {
                        Event::Data(bytes) => inbox.push(bytes),
                        Event::Eof => inbox.end(Last::Eof),
                        Event::Starved => inbox.starve(),
                        Event::Closed => {
                            inbox.end(Last::Broken(io::ErrorKind::ConnectionReset));
                            break;
                        }
                        Event::Violation => return Broke::Reading(io::ErrorKind::InvalidData),
                    }
                }
                // The channel is closed. What it brought is still delivered; after that, if there was an EOF, nothing is left to
                // wait for; without one, the other half says so.
                this.done.cancelled().await;
                if both.is_cancelled() {
                    return std::future::pending().await;
                }
                Broke::Reading(io::ErrorKind::ConnectionReset)
            };
            let empty = async {
                loop {
                    match inbox.front(writer.batch()).await {
                        Ok(batch) => {
                            let sent = match stalling(writer.send_some(&batch), &returns).await {
                                Ok(sent) => sent,
                                Err(broke) => return broke,
                            };
                            drop(batch);
                            count(sent as u64);
                            returns.all_taken(inbox.shift(sent).into_iter()).await;
                        }
                        Err(Last::Starved) => returns.grow().await,
                        Err(Last::Eof) => return finish(writer).await,
                        Err(Last::Broken(kind)) => return Broke::Reading(kind),
                    }
                }
            };
            tokio::pin!(fill);
            let broke = tokio::select! {
                // What has come is emptied with the same wake-up.
                biased;
                broke = &mut fill => broke,
                broke = empty => broke,
            };
            say(broke);
            if matches!(broke, Broke::Writing(_) | Broke::Stalled) {
                inbox.give_up();
                fill.await;
            }
        }
    }
    std::future::pending().await
}

/// Sends, but not for ever: a sink that takes nothing is given up after [`limits::STALL`] where it keeps a stock client's
/// whole session from being read, and after [`limits::DELIVERY`] where the sender has gone. One that harms nobody else may
/// take its time.
async fn stalling<T>(send: impl Future<Output = io::Result<T>>, returns: &Returns) -> Result<T, Broke> {
    tokio::pin!(send);
    let mut stalled = Duration::ZERO;
    loop {
        tokio::select! {
            biased;
            result = &mut send => return result.map_err(|error| Broke::Writing(error.kind())),
            () = tokio::time::sleep(limits::STALL) => {
                stalled += limits::STALL;
                if returns.blocks_session() || returns.is_closed() && stalled >= limits::DELIVERY {
                    return Err(Broke::Stalled);
                }
            }
        }
    }
}

/// What a channel has received and its sink has not taken. Credit, or the session's own count, bounds it.
struct Inbox {
    state: Mutex<InboxState>,
    filled: Notify,
    returns: Returns,
}

#[derive(Default)]
struct InboxState {
    waiting: VecDeque<Waiting>,
    /// Set while the sender waits for credit.
    starved: bool,
    last: Option<Last>,
}

/// A message, of which the sink may have taken a part.
struct Waiting {
    left: Bytes,
    /// What it had when it came, for which it is accounted.
    length: usize,
}

#[derive(Debug, Clone, Copy)]
enum Last {
    /// Nothing for now, because the sender has no credit.
    Starved,
    Eof,
    Broken(io::ErrorKind),
}

impl Inbox {
    fn new(returns: Returns) -> Self {
        Self { state: Mutex::default(), filled: Notify::new(), returns }
    }

    fn push(&self, bytes: Bytes) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some() {
            // Data after EOF, which RFC 4254 §5.3 forbids.
            return self.returns.dropped(bytes.len());
        }
        state.waiting.push_back(Waiting { length: bytes.len(), left: bytes });
        self.filled.notify_one();
    }

    /// Says how the channel's data ended; only the first word counts.
    fn end(&self, last: Last) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.last.get_or_insert(last);
        self.filled.notify_one();
    }

    fn starve(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).starved = true;
        self.filled.notify_one();
    }

    /// What comes next: all that has come, up to so many `messages`. It stays here until it is [shifted](Inbox::shift) out, so
    /// that it is accounted for whatever happens.
    async fn front(&self, messages: usize) -> Result<Vec<Bytes>, Last> {
        loop {
            let filled = self.filled.notified();
            {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if !state.waiting.is_empty() {
                    return Ok(state.waiting.iter().take(messages).map(|waiting| waiting.left.clone()).collect());
                }
                if std::mem::take(&mut state.starved) {
                    return Err(Last::Starved);
                }
                if let Some(last) = state.last {
                    return Err(last);
                }
            }
            filled.await;
        }
    }

    /// Drops what waits, and all that comes.
    fn give_up(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.last.get_or_insert(Last::Broken(io::ErrorKind::BrokenPipe));
        state.waiting.drain(..).for_each(|waiting| self.returns.dropped(waiting.length));
    }

    /// Counts `sent` bytes as taken by the sink, and tells the lengths of the messages that are thereby done with.
    fn shift(&self, mut sent: usize) -> Vec<usize> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = Vec::new();
        while let Some(first) = state.waiting.front_mut().filter(|_| sent > 0) {
            let part = sent.min(first.left.len());
            first.left.advance(part);
            sent -= part;
            if first.left.is_empty() {
                done.push(first.length);
                state.waiting.pop_front();
            }
        }
        done
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.waiting.iter().for_each(|waiting| self.returns.dropped(waiting.length));
    }
}

/// The two sides of a forward that is over.
#[must_use = "sides that are not left properly look as if the forward had ended well"]
pub struct Remains {
    near: Leaving,
    far: Leaving,
}

struct Leaving {
    reader: Reader,
    writer: Writer,
    /// Whether the forward ended well.
    clean: bool,
    /// Whether this side has been told of the end of what it receives, which then was complete.
    told: bool,
}

impl Remains {
    /// Closes both sides: in order after a clean end, else so that each peer sees that something broke. May wait a little for
    /// a peer to close first.
    pub async fn leave(self) {
        tokio::join!(self.near.leave(), self.far.leave());
    }
}

impl Leaving {
    async fn leave(self) {
        match (self.reader, self.writer) {
            (Reader::Tcp(reader), Writer::Tcp(writer)) => {
                if !self.clean
                    && !self.told
                    && let Ok(stream) = reader.reunite(writer)
                {
                    // What is incomplete must not look complete: the peer gets a reset. One that was told of the end is left
                    // in peace, since a reset would take from it what it has not read yet. If the socket is beyond even a
                    // reset, there is nobody left to be told.
                    drop(stream.set_zero_linger());
                }
            }
            (Reader::Channel(mut reader), Writer::Channel(mut writer)) => {
                // The SSH library forgets a channel at once only if the peer closes it first. Whoever opened it does so.
                let patient = self.clean && reader.opened_by_peer();
                if patient && tokio::time::timeout(limits::CLOSE_PATIENCE, reader.closed()).await.is_ok() {
                    writer.peer_closed();
                } else {
                    // First: saying so may take its time, and a channel that is there and not read holds up its session.
                    drop(reader);
                    writer.close().await;
                }
            }
            // A pipe ends by being dropped, and a side has halves of one kind only.
            _ => {}
        }
    }
}

impl Side {
    fn split(self) -> (Reader, Writer) {
        match self {
            Self::Tcp(stream) => {
                let (reader, writer) = stream.into_split();
                (Reader::Tcp(reader), Writer::Tcp(writer))
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
    /// Reads from what is a stream in itself; a channel is read by its events.
    async fn read(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Tcp(reader) => {
                let read = poll_fn(|cx| {
                    // Given back at once where there is nothing to read: a socket that is silent needs no buffer. Not `try_read`,
                    // which would not take a short read as a sign that nothing is left, and look again.
                    let mut buffer = Buffer::take();
                    let mut read = ReadBuf::new(&mut buffer);
                    ready!(Pin::new(&mut *reader).poll_read(cx, &mut read))?;
                    let filled = read.filled().len();
                    Poll::Ready(io::Result::Ok(buffer.into_bytes(filled)))
                });
                Ok(Some(read.await?).filter(|bytes| !bytes.is_empty()))
            }
            Self::Pipe(reader, buffer) => {
                buffer.reserve(limits::CHUNK);
                let read = reader.read_buf(buffer).await?;
                Ok((read > 0).then(|| buffer.split().freeze()))
            }
            Self::Channel(reader) => Ok(reader.bytes().await),
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

    /// How many messages it takes at once.
    fn batch(&self) -> usize {
        match self {
            Self::Tcp(_) => limits::BATCH,
            _ => 1,
        }
    }

    /// Sends as much of `batch` as is taken at once, and tells how much that is; to a socket with one call.
    async fn send_some(&mut self, batch: &[Bytes]) -> io::Result<usize> {
        let Some(first) = batch.first() else { return Ok(0) };
        let sent = match self {
            Self::Tcp(writer) => {
                let slices: [IoSlice<'_>; limits::BATCH] =
                    std::array::from_fn(|n| IoSlice::new(batch.get(n).map_or(&[], |bytes| bytes)));
                writer.write_vectored(&slices[..batch.len().min(limits::BATCH)]).await?
            }
            Self::Channel(writer) => {
                writer.send(first.clone()).await?;
                first.len()
            }
            Self::Pipe(writer) => writer.write(first).await?,
        };
        if sent == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(sent) }
    }

    async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(writer) => writer.shutdown().await,
            Self::Channel(writer) => writer.finish().await,
            Self::Pipe(writer) => writer.shutdown().await,
        }
    }
}

#[cfg(test)]
mod tests;

//! Moves the bytes of one forward, both ways, until both ends have said that they are done or one of them breaks.
//!
//! Promised: an end of file is passed on by itself, so that half-closed connections work; what breaks on one side looks
//! broken on the other (a reset, or a channel closed without EOF), never like a clean end; what arrives is a prefix of
//! what was sent, and all of it when both sides ended cleanly.
//!
//! **Where the two sides live on different threads**, each thread runs a splice of its own between its side and an end of a
//! [`bridge`], made by [`across`]. Both together behave as one: the ending, the bytes counted and the credit given back are
//! the same, because the principal's half ends only when the target's half has said how it ended, bytes are counted where
//! they leave the process, and what is under way on the bridge is not given back as taken.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, SetOnce, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::bridge::{self, Receipts};
use super::pool::Buffer;
use super::ssh::{self, Event, Returns};
use super::stream::Stream;
use super::wire;
use crate::audit::Counters;
use crate::limits;
use crate::task::apart;

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

/// How a splice ends whose far side has broken the rules of credit.
const VIOLATED: End = End::FarBroke(io::ErrorKind::InvalidData);

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
    pub async fn passed(self, counters: &Counters) -> End {
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
    /// A connection in layers, or a pipe within the process.
    Stream(Stream),
    /// The way to another thread, where the other half of the forward is.
    Bridge(Bridge),
}

/// An end of a bridge as a side of a splice.
pub struct Bridge {
    end: bridge::End,
    /// What the principal's half knows of the target's.
    rest: Option<Rest>,
}

enum Reader {
    Tcp(OwnedReadHalf),
    Channel(ssh::Reader),
    Stream(ReadHalf<Stream>),
    Bridge(bridge::Reader),
}

enum Writer {
    Tcp(OwnedWriteHalf),
    Channel(ssh::Writer),
    Stream(WriteHalf<Stream>),
    Bridge(bridge::Writer),
}

/// Parts a forward in two: the side that stands for the target in the principal's half, and the target's half, which is to
/// [run](Across::run) on the thread of the target's side. Dropping either breaks the other.
#[must_use]
pub fn across(counters: Arc<Counters>) -> (Side, Across) {
    let (near, far) = bridge::pair();
    let (verdict, ended) = oneshot::channel();
    let cut = CancellationToken::new();
    let violated = CancellationToken::new();
    let rest = Rest { leave: near.leave(), cut: cut.clone(), violated: violated.clone(), ended };
    (Side::Bridge(Bridge { end: near, rest: Some(rest) }), Across { end: far, counters, cut, violated, verdict })
}

/// The target's half of a forward whose sides live on different threads.
pub struct Across {
    end: bridge::End,
    counters: Arc<Counters>,
    cut: CancellationToken,
    violated: CancellationToken,
    verdict: oneshot::Sender<End>,
}

impl Across {
    /// Runs it to its end, and closes `far`.
    pub async fn run(self, far: Side) {
        let near = Side::Bridge(Bridge { end: self.end, rest: None });
        let (end, remains) = splice(near, far, &self.counters, Bounds::default(), &self.cut).await;
        if end == VIOLATED {
            self.violated.cancel();
        }
        // If nobody waits for it any more, the other half has been dropped.
        self.verdict.send(end).ok();
        remains.leave().await;
    }
}

/// The principal's hold on the target's half.
struct Rest {
    leave: bridge::Leave,
    cut: CancellationToken,
    /// Fires when the target's side has broken the rules: what it has sent before is not delivered any more.
    violated: CancellationToken,
    ended: oneshot::Receiver<End>,
}

impl Rest {
    /// Ends the target's half after the principal's, and tells how both together ended. What was given to it is still
    /// delivered, unless the forward was or is `cut`.
    async fn end(
        mut self,
        ours: Ours,
        mut moving: Pin<&mut impl Future<Output = Infallible>>,
        cut: Pin<&mut impl Future<Output = End>>,
    ) -> End {
        self.leave.now();
        let mut end = ours.end;
        if !ours.cut {
            tokio::select! {
                biased;
                theirs = &mut self.ended => return ours.with(theirs.ok()),
                never = moving.as_mut() => match never {},
                how = cut => end = how,
            }
        }
        self.cut.cancel();
        // Soon; after it nothing more is counted.
        tokio::select! {
            _ = self.ended => end,
            never = moving => match never {},
        }
    }
}

/// How the principal's half ended, or a forward that has no other.
struct Ours {
    end: End,
    /// Whether it was cut or given up, so that nothing is to be waited for.
    cut: bool,
    /// Whether all was done to deliver what the principal had sent; what goes wrong at the target since is not the reason.
    delivered: bool,
}

impl Ours {
    /// How both halves together ended. Without a word from the target's its thread is going down, and so is the program.
    fn with(self, theirs: Option<End>) -> End {
        match (self.end, theirs) {
            (End::NearBroke(_), _) if self.delivered => self.end,
            (_, Some(theirs @ (End::FarBroke(_) | End::Stalled))) => theirs,
            // That the principal's side is gone is what it has been told by this one.
            _ => self.end,
        }
    }
}

/// Runs the forward between `near`, the principal's side, and `far`, the target's, until its end, one of its `bounds` or
/// `stop`.
///
/// The forward is over when this returns; what is left of its two sides is then to be [left](Remains::leave).
pub async fn splice(
    near: Side,
    mut far: Side,
    counters: &Counters,
    bounds: Bounds,
    stop: &CancellationToken,
) -> (End, Remains) {
    let rest = far.rest();
    let (mut near_reader, mut near_writer) = near.split();
    let (mut far_reader, mut far_writer) = far.split();
    let (up, down) = (Half::default(), Half::default());
    let both = CancellationToken::new();
    let end = {
        let to_target = |n| counters.add_to_target(n);
        let from_target = |n| counters.add_from_target(n);
        // A principal may pause before it reads the end of an answer; but what one has sent that is gone, nobody waits for.
        let upward = direction(&mut near_reader, &mut far_writer, to_target, (&up, &down), &both, limits::STALL);
        let downward = direction(&mut far_reader, &mut near_writer, from_target, (&down, &up), &both, limits::DELIVERY);
        let moving = async { tokio::join!(apart(upward), apart(downward)).0 };
        let cut = async {
            tokio::select! {
                biased;
                () = stop.cancelled() => End::Stopped,
                end = bounds.passed(counters) => end,
            }
        };
        let violated = async {
            match &rest {
                Some(rest) => rest.violated.cancelled().await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(moving, cut);
        let (mut was_cut, mut delivered) = (false, false);
        let watch = apart(async {
            tokio::select! {
                biased;
                () = both.cancelled() => Over::Ended(End::Clean),
                end = &mut cut => Over::Cut(end),
                () = violated => Over::Ended(VIOLATED),
                broke = up.broke.wait() => Over::Up(*broke),
                broke = down.broke.wait() => Over::Down(*broke),
            }
        });
        let over = tokio::select! {
            biased;
            never = &mut moving => match never {},
            over = watch => over,
        };
        let end = match over {
            Over::Ended(end) => end,
            Over::Cut(end) => {
                was_cut = true;
                end
            }
            Over::Up(broke) => {
                // What the target has said before it would take no more still reaches the principal.
                if matches!(broke, Broke::Writing(_)) {
                    was_cut = last_words(moving.as_mut(), &down, cut.as_mut(), std::future::pending()).await;
                }
                broke.end(End::NearBroke, End::FarBroke)
            }
            Over::Down(broke) => {
                // What the principal has sent before it went away still reaches the target.
                if matches!(broke, Broke::Writing(_)) {
                    was_cut = last_words(moving.as_mut(), &up, cut.as_mut(), stuck(counters)).await;
                    delivered = true;
                }
                broke.end(End::FarBroke, End::NearBroke)
            }
        };
        match rest {
            Some(rest) => {
                let ours = Ours { end, cut: was_cut || end == End::Stalled, delivered };
                rest.end(ours, moving, cut).await
            }
            None => end,
        }
    };
    let clean = end == End::Clean;
    let near = Leaving { reader: near_reader, writer: near_writer, clean, told: down.is_done() };
    let far = Leaving { reader: far_reader, writer: far_writer, clean, told: up.is_done() };
    (end, Remains { near, far })
}

/// Lets a direction that is still on its way deliver what was sent into it, unless it is `hopeless`, and tells whether it was
/// cut meanwhile. Both go on: the one that broke still has to take what comes, or a target that waits for its answers to be
/// read would never take what is left.
async fn last_words(
    moving: Pin<&mut impl Future<Output = Infallible>>,
    half: &Half,
    cut: Pin<&mut impl Future<Output = End>>,
    hopeless: impl Future<Output = ()>,
) -> bool {
    if half.is_done() {
        return false;
    }
    tokio::select! {
        _ = tokio::time::timeout(limits::DELIVERY, moving) => false,
        () = half.done.cancelled() => false,
        _ = half.broke.wait() => false,
        _ = cut => true,
        () = hopeless => false,
    }
}

/// Waits until the target has taken nothing for [`limits::STALL`].
async fn stuck(counters: &Counters) {
    loop {
        let seen = counters.to_target();
        tokio::time::sleep(limits::STALL).await;
        if counters.to_target() == seen {
            return;
        }
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

/// Why the bytes of a forward move no more.
enum Over {
    Ended(End),
    Cut(End),
    Up(Broke),
    Down(Broke),
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

/// Copies until the end of file and passes it on, or says how that broke; a sink that takes nothing for `patience` after its
/// sender has gone is given up. It never returns, because a channel must be read
/// for as long as it is there: a direction that is done goes on watching its reader, since a channel that is closed while
/// the other direction waits must end the forward; and one that has lost its writer goes on emptying its reader, since the
/// SSH library holds up the whole session for a channel that is not read.
async fn direction(
    reader: &mut Reader,
    writer: &mut Writer,
    count: impl Fn(u64),
    (this, other): (&Half, &Half),
    both: &CancellationToken,
    patience: Duration,
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
    // What is given to a bridge is taken, and counted, at its other end.
    let receipts = writer.receipts();
    let progress = || receipts.as_ref().map_or(0, Receipts::total);
    match reader {
        Reader::Tcp(_) | Reader::Stream(_) => {
            let copy = async {
                loop {
                    match reader.read().await {
                        Ok(Some(bytes)) => {
                            let length = bytes.len() as u64;
                            if let Err(error) = writer.send(bytes).await {
                                return Broke::Writing(error.kind());
                            }
                            if receipts.is_none() {
                                count(length);
                            }
                        }
                        Ok(None) => return finish(writer).await,
                        Err(error) => return Broke::Reading(error.kind()),
                    }
                }
            };
            let broke = copy.await;
            say(broke);
            // Nobody wants it any more; but who sends it may take nothing until it is read.
            while matches!(broke, Broke::Writing(_)) && matches!(reader.read().await, Ok(Some(_))) {}
        }
        Reader::Bridge(reader) => {
            let copy = async {
                loop {
                    match reader.next().await {
                        Ok(Some(batch)) => {
                            // The other half is patient in its own way for as long as it is there.
                            let hopeless = Hopeless { blocking: || false, gone: || reader.is_closed(), patience };
                            for bytes in &batch {
                                if let Err(broke) = stalling(writer.send(bytes.clone()), &hopeless, progress).await {
                                    return broke;
                                }
                            }
                            reader.taken(&batch);
                            count(batch.iter().map(|bytes| bytes.len() as u64).sum());
                        }
                        Ok(None) => break,
                        Err(error) => return Broke::Reading(error.kind()),
                    }
                }
                let gone = async {
                    this.done.cancelled().await;
                    reader.closed().await;
                    if both.is_cancelled() {
                        return std::future::pending().await;
                    }
                    Broke::Reading(io::ErrorKind::ConnectionReset)
                };
                tokio::select! {
                    broke = finish(writer) => broke,
                    broke = gone => broke,
                }
            };
            let broke = copy.await;
            say(broke);
            if matches!(broke, Broke::Writing(_) | Broke::Stalled) {
                reader.give_up();
            }
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
                            // A sink that takes nothing is given up where it keeps a stock client's whole session from being
                            // read, or where the sender has gone. One that harms nobody else may take its time.
                            let hopeless = Hopeless {
                                blocking: || returns.blocks_session(),
                                gone: || returns.is_closed(),
                                patience,
                            };
                            if receipts.is_some() {
                                // One by one: a message is accounted for either here or on the bridge.
                                for bytes in batch {
                                    let length = bytes.len();
                                    if let Err(broke) = stalling(writer.send(bytes), &hopeless, &progress).await {
                                        return broke;
                                    }
                                    inbox.shift(length);
                                }
                                continue;
                            }
                            let sent = match stalling(writer.send_some(&batch), &hopeless, &progress).await {
                                Ok(sent) => sent,
                                Err(broke) => return broke,
                            };
                            drop(batch);
                            count(sent as u64);
                            returns.repay(inbox.shift(sent)).await;
                        }
                        Err(Last::Starved) => {
                            if let Some(receipts) = &receipts {
                                returns.repay(receipts.drained().await).await;
                            }
                            returns.grow().await;
                        }
                        Err(Last::Eof) => return finish(writer).await,
                        Err(Last::Broken(kind)) => return Broke::Reading(kind),
                    }
                }
            };
            let unsettled = receipts.as_ref().map(|receipts| Unsettled { receipts, returns: &returns });
            let settle = async {
                let Some(unsettled) = &unsettled else { return std::future::pending().await };
                loop {
                    returns.repay(unsettled.receipts.taken().await).await;
                }
            };
            tokio::pin!(fill);
            let broke = tokio::select! {
                // What has come is emptied with the same wake-up.
                biased;
                broke = &mut fill => broke,
                broke = empty => broke,
                broke = settle => broke,
            };
            say(broke);
            if matches!(broke, Broke::Writing(_) | Broke::Stalled) {
                let lost = unsettled.map_or(0, Unsettled::take);
                // Given back as if it had been taken, so that the sender, too, goes on taking what is left.
                let discard = async {
                    returns.repay(lost).await;
                    inbox.discard().await;
                };
                // Both at once: the channel is read also while credit waits to be sent.
                tokio::join!(fill, discard);
            }
        }
    }
    std::future::pending().await
}

/// When a sink that takes nothing is given up.
struct Hopeless<B, G> {
    /// Whether it harms others.
    blocking: B,
    /// Whether the sender has gone.
    gone: G,
    /// How long it may take nothing after that.
    patience: Duration,
}

/// Sends, but not for ever: looks every [`limits::STALL`] in which nothing moved whether it is hopeless.
async fn stalling<T>(
    send: impl Future<Output = io::Result<T>>,
    hopeless: &Hopeless<impl Fn() -> bool, impl Fn() -> bool>,
    progress: impl Fn() -> u64,
) -> Result<T, Broke> {
    tokio::pin!(send);
    // Most is taken at once, and needs no clock.
    if let Poll::Ready(result) = poll_fn(|cx| Poll::Ready(send.as_mut().poll(cx))).await {
        return result.map_err(|error| Broke::Writing(error.kind()));
    }
    // For how long nothing has moved since the sender has gone.
    let (mut gone, mut stalled, mut seen) = ((hopeless.gone)(), Duration::ZERO, progress());
    loop {
        tokio::select! {
            biased;
            result = &mut send => return result.map_err(|error| Broke::Writing(error.kind())),
            () = tokio::time::sleep(limits::STALL) => {
                let now = progress();
                let still = now == seen;
                seen = now;
                stalled = if still && gone { stalled + limits::STALL } else { Duration::ZERO };
                gone = (hopeless.gone)();
                if still && (hopeless.blocking)() || stalled >= hopeless.patience {
                    return Err(Broke::Stalled);
                }
            }
        }
    }
}

/// Gives up what is on a bridge when it is no longer watched.
struct Unsettled<'a> {
    receipts: &'a Receipts,
    returns: &'a Returns,
}

impl Unsettled<'_> {
    /// What that had cost, which is then for the caller to account for.
    fn take(self) -> usize {
        let cost = self.receipts.rest();
        std::mem::forget(self);
        cost
    }
}

impl Drop for Unsettled<'_> {
    fn drop(&mut self) {
        self.returns.write_off(self.receipts.rest());
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

    /// Takes what waits, and all that comes, for nobody.
    async fn discard(&self) {
        // A sender without credit has it as soon as all is taken.
        loop {
            match self.front(usize::MAX).await {
                Ok(batch) => {
                    let sent = batch.iter().map(Bytes::len).sum();
                    drop(batch);
                    self.returns.repay(self.shift(sent)).await;
                }
                Err(Last::Starved) => {}
                Err(Last::Eof | Last::Broken(_)) => return,
            }
        }
    }

    /// Counts `sent` bytes as taken by the sink, and tells the cost of the messages that are thereby done with.
    fn shift(&self, mut sent: usize) -> usize {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        while let Some(first) = state.waiting.front_mut().filter(|_| sent > 0) {
            let part = sent.min(first.left.len());
            first.left.advance(part);
            sent -= part;
            if first.left.is_empty() {
                done += wire::message_cost(first.length);
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
            (Reader::Stream(reader), Writer::Stream(writer)) if !self.clean && !self.told => {
                reader.unsplit(writer).reset();
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
            // A stream or a bridge ends by being dropped, and a side has halves of one kind only.
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
            Self::Stream(stream) => match stream.into_tcp() {
                Ok(stream) => Self::Tcp(stream).split(),
                Err(stream) => {
                    let (reader, writer) = tokio::io::split(stream);
                    (Reader::Stream(reader), Writer::Stream(writer))
                }
            },
            Self::Bridge(bridge) => (Reader::Bridge(bridge.end.reader), Writer::Bridge(bridge.end.writer)),
        }
    }

    fn rest(&mut self) -> Option<Rest> {
        match self {
            Self::Bridge(bridge) => bridge.rest.take(),
            Self::Tcp(_) | Self::Channel(_) | Self::Stream(_) => None,
        }
    }
}

impl Reader {
    /// Reads from what is a stream in itself; a channel and a bridge have readers of their own.
    async fn read(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Tcp(reader) => read_from(reader).await,
            Self::Stream(reader) => read_from(reader).await,
            Self::Channel(reader) => Ok(reader.bytes().await),
            Self::Bridge(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

async fn read_from(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Bytes>> {
    let read = poll_fn(|cx| {
        // Given back at once where there is nothing to read: a connection that is silent needs no buffer. Not `try_read`,
        // which would not take a short read as a sign that nothing is left, and look again.
        let mut buffer = Buffer::take();
        let mut read = ReadBuf::new(&mut buffer);
        ready!(Pin::new(&mut *reader).poll_read(cx, &mut read))?;
        let filled = read.filled().len();
        Poll::Ready(io::Result::Ok(buffer.into_bytes(filled)))
    });
    Ok(Some(read.await?).filter(|bytes| !bytes.is_empty()))
}

impl Writer {
    async fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        match self {
            Self::Tcp(writer) => writer.write_all(&bytes).await,
            Self::Channel(writer) => writer.send(bytes).await,
            Self::Stream(writer) => {
                writer.write_all(&bytes).await?;
                writer.flush().await
            }
            Self::Bridge(writer) => writer.send(bytes).await,
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
            Self::Stream(writer) => {
                let sent = writer.write(first).await?;
                // A layer may hold back what it was given; nobody would ask it for that later.
                writer.flush().await?;
                sent
            }
            Self::Bridge(writer) => {
                writer.send(first.clone()).await?;
                first.len()
            }
        };
        if sent == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(sent) }
    }

    async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(writer) => writer.shutdown().await,
            Self::Channel(writer) => writer.finish().await,
            Self::Stream(writer) => writer.shutdown().await,
            Self::Bridge(writer) => writer.finish(),
        }
    }

    fn receipts(&self) -> Option<Receipts> {
        match self {
            Self::Bridge(writer) => Some(writer.receipts()),
            Self::Tcp(_) | Self::Channel(_) | Self::Stream(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;

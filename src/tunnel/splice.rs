//! Moves the bytes of one forward, both ways, until both ends have said that they are done or one of them breaks.
//!
//! Promised: an end of file is passed on by itself, so that half-closed connections work; what breaks on one side looks
//! broken on the other (a reset, or a channel closed without EOF), never like a clean end; what arrives is a prefix of
//! what was sent, and all of it when both sides ended cleanly.
//!
//! **Where the two sides live on different threads**, each thread runs a splice of its own between its side and an end of a
//! [`bridge`](super::bridge), made by [`across`]. Both together behave as one: the ending, the bytes counted and the credit given back are
//! the same, because the principal's half ends only when the target's half has said how it ended, bytes are counted where
//! they leave the process, and what is under way on the bridge is not given back as taken.

mod across;
mod inbox;
mod leaving;
mod side;

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::SetOnce;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use across::Ours;
pub use across::{Across, across};
use inbox::{Inbox, Last};
use leaving::Leaving;
pub use leaving::Remains;
pub use side::{Bridge, Side};
use side::{Reader, Writer};

use super::bridge::Receipts;
use super::ssh::{Event, Returns};
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

#[cfg(test)]
mod tests;

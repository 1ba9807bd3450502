//! Carries the bytes of one forward between two threads, both ways.
//!
//! Promised, for each way: what was given arrives in its order, without a copy; an end of file is passed on by itself; an end
//! that goes away without one looks broken on the other, after all that it had given; so many bytes and messages are under
//! way and no more. Under way is what the receiver has not [taken](Reader::taken), so that whoever answers for the memory of
//! what it passes on here is told when somebody has really had it: see [`Receipts`].
//!
//! What waits on what: a giver for room, a receiver for something to come. Each wakes the other only if it waits, and seldom:
//! the receiver takes all that is there at once, and room is told of when there is a good deal of it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use super::wire;
use crate::limits;

/// One end. Dropping it without [finishing](Writer::finish) is a break.
#[derive(Debug)]
pub struct End {
    /// Where the other end's bytes come out.
    pub reader: Reader,
    /// Where this end's bytes go in.
    pub writer: Writer,
}

/// The receiving half of an end.
#[derive(Debug)]
pub struct Reader {
    lane: Arc<Lane>,
    /// What was there at the last look.
    batch: VecDeque<Bytes>,
}

/// The giving half of an end.
#[derive(Debug)]
pub struct Writer {
    lane: Arc<Lane>,
}

/// Tells a giver what has been taken of what it gave. One at a time may wait for each.
#[derive(Debug, Clone)]
pub struct Receipts(Arc<Lane>);

/// Takes an end away from its other end, while its halves are still in use.
#[derive(Debug)]
pub struct Leave {
    reads: Arc<Lane>,
    writes: Arc<Lane>,
}

/// A bridge: its two ends.
#[must_use]
pub fn pair() -> (End, End) {
    let (one, other) = (Arc::new(Lane::default()), Arc::new(Lane::default()));
    let end = |reads: &Arc<Lane>, writes: &Arc<Lane>| End {
        reader: Reader { lane: reads.clone(), batch: VecDeque::new() },
        writer: Writer { lane: writes.clone() },
    };
    (end(&one, &other), end(&other, &one))
}

/// One way over the bridge.
#[derive(Debug, Default)]
struct Lane {
    state: Mutex<State>,
    /// For the receiver.
    filled: Notify,
    /// For the giver: there is room, or nobody to give to.
    room: Notify,
    /// For whoever waits for receipts.
    taken: Notify,
    drained: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Bytes>,
    /// What was given and not taken yet.
    under_way: Amount,
    /// What was taken, and nobody was told of yet.
    untold: Amount,
    /// How many messages have been taken in all.
    total: u64,
    /// Set while the receiver waits for more.
    hungry: bool,
    /// Set while the giver waits for room.
    crowded: bool,
    /// Set while somebody waits to be told of what was taken.
    watched: bool,
    /// Set while somebody waits until all was taken.
    draining: bool,
    eof: bool,
    giver_gone: bool,
    receiver_gone: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Amount {
    messages: usize,
    bytes: usize,
}

impl Amount {
    fn add(&mut self, bytes: usize) {
        self.messages += 1;
        self.bytes += bytes;
    }

    fn subtract(&mut self, bytes: usize) {
        self.messages -= 1;
        self.bytes -= bytes;
    }

    /// What so many messages cost: see [`wire::message_cost`].
    fn cost(self) -> usize {
        self.messages * wire::message_cost(0) + self.bytes
    }
}

impl Lane {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave_as_giver(&self) {
        let mut state = self.state();
        state.giver_gone = true;
        drop(state);
        self.filled.notify_one();
    }

    fn leave_as_receiver(&self) {
        let mut state = self.state();
        state.receiver_gone = true;
        let dropped = std::mem::take(&mut state.waiting);
        drop(state);
        drop(dropped);
        self.room.notify_one();
    }
}

impl State {
    /// One message always fits, however large.
    fn fits(&self, bytes: usize) -> bool {
        self.under_way.messages == 0
            || self.under_way.messages < limits::BRIDGE_MESSAGES && self.under_way.bytes + bytes <= limits::BRIDGE_BYTES
    }

    /// Whether there is so much room that a giver is worth waking.
    fn is_roomy(&self) -> bool {
        self.under_way.bytes <= limits::BRIDGE_BYTES / 4 * 3
            && self.under_way.messages <= limits::BRIDGE_MESSAGES / 4 * 3
    }

    /// Whether whoever waits for receipts is worth waking: with what a channel's credit is given back for at the least, and
    /// less often the more there is still to come.
    fn is_news(&self) -> bool {
        let untold = self.untold.cost();
        untold >= wire::CREDIT_INITIAL / 4 && untold >= self.under_way.cost() / 2
    }
}

impl Writer {
    /// Gives bytes to the other end, waiting for room. May be dropped; then nothing was given.
    ///
    /// # Errors
    /// If the other end is gone.
    pub async fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        loop {
            {
                let mut state = self.lane.state();
                if state.receiver_gone || state.giver_gone {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                if state.fits(bytes.len()) {
                    state.under_way.add(bytes.len());
                    state.waiting.push_back(bytes);
                    let wake = std::mem::take(&mut state.hungry);
                    drop(state);
                    if wake {
                        self.lane.filled.notify_one();
                    }
                    return Ok(());
                }
                state.crowded = true;
            }
            // A word that came in between is kept for us.
            self.lane.room.notified().await;
        }
    }

    /// Tells the other end that no more bytes will come.
    ///
    /// # Errors
    /// If the other end is gone.
    pub fn finish(&mut self) -> io::Result<()> {
        let mut state = self.lane.state();
        if state.receiver_gone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.eof = true;
        drop(state);
        self.lane.filled.notify_one();
        Ok(())
    }

    /// What is told of what was given here.
    #[must_use]
    pub fn receipts(&self) -> Receipts {
        Receipts(self.lane.clone())
    }
}

impl Reader {
    /// All that has come, up to [`limits::BATCH`] messages; `None` when there will be no more. They are under way until they
    /// are said to be [taken](Reader::taken). May be dropped; then nothing is lost.
    ///
    /// # Errors
    /// If the other end went away without saying that it was done.
    pub async fn next(&mut self) -> io::Result<Option<Vec<Bytes>>> {
        loop {
            if !self.batch.is_empty() {
                let messages = self.batch.len().min(limits::BATCH);
                return Ok(Some(self.batch.drain(..messages).collect()));
            }
            {
                let mut state = self.lane.state();
                if !state.waiting.is_empty() {
                    std::mem::swap(&mut self.batch, &mut state.waiting);
                    continue;
                }
                if state.eof {
                    return Ok(None);
                }
                if state.giver_gone {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                state.hungry = true;
            }
            self.lane.filled.notified().await;
        }
    }

    /// Says that messages are no longer here.
    pub fn taken(&self, batch: &[Bytes]) {
        let mut state = self.lane.state();
        for bytes in batch {
            state.under_way.subtract(bytes.len());
            state.untold.add(bytes.len());
        }
        state.total += batch.len() as u64;
        let room = state.crowded && state.is_roomy();
        if room {
            state.crowded = false;
        }
        let news = state.watched && state.is_news();
        if news {
            state.watched = false;
        }
        let drained = state.under_way.messages == 0 && std::mem::take(&mut state.draining);
        drop(state);
        if room {
            self.lane.room.notify_one();
        }
        if news {
            self.lane.taken.notify_one();
        }
        if drained {
            self.lane.drained.notify_one();
        }
    }

    /// Drops what is here, and all that comes.
    pub fn give_up(&mut self) {
        self.batch.clear();
        self.lane.leave_as_receiver();
    }

    /// Whether the other end has gone away, done or not.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.lane.state().giver_gone
    }

    /// Waits until the other end has gone away.
    pub async fn closed(&self) {
        while !self.is_closed() {
            self.lane.filled.notified().await;
        }
    }
}

impl Receipts {
    /// Waits until a good deal was taken, and tells what it had [cost](wire::message_cost). Each message is told of once,
    /// here or by [`Receipts::drained`]. May be dropped.
    pub async fn taken(&self) -> usize {
        loop {
            {
                let mut state = self.0.state();
                if state.is_news() {
                    return std::mem::take(&mut state.untold).cost();
                }
                state.watched = true;
            }
            self.0.taken.notified().await;
        }
    }

    /// Waits until all was taken, and tells what that had cost, as far as it was not told of before. May be dropped.
    pub async fn drained(&self) -> usize {
        loop {
            {
                let mut state = self.0.state();
                if state.under_way.messages == 0 {
                    return std::mem::take(&mut state.untold).cost();
                }
                state.draining = true;
            }
            self.0.drained.notified().await;
        }
    }

    /// How many messages have been taken so far.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.state().total
    }

    /// What all had cost that was given and not told of: what is to be given up with the bridge.
    #[must_use]
    pub fn rest(&self) -> usize {
        let mut state = self.0.state();
        std::mem::take(&mut state.untold).cost() + state.under_way.cost()
    }
}

impl End {
    /// See [`Leave`].
    #[must_use]
    pub fn leave(&self) -> Leave {
        Leave { reads: self.reader.lane.clone(), writes: self.writer.lane.clone() }
    }
}

impl Leave {
    /// Goes away: the other end still gets what was given, and can give nothing more.
    pub fn now(self) {
        self.writes.leave_as_giver();
        self.reads.leave_as_receiver();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.lane.leave_as_giver();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.lane.leave_as_receiver();
    }
}

#[cfg(test)]
mod tests;

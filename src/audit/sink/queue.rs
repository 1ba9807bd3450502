//! What lies between the writer and a sink that has its own thread or task.
//!
//! Promised: what is handed over and not yet written is bounded in bytes, and what does not fit is refused, never waited
//! for. The writer learns up to which record the sink has got, and since when it fails.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::limits::TRAIL_SINK_BYTES;

/// Whole lines of the trail, one after the other.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The lines, each with its newline.
    pub bytes: Bytes,
    /// The number of the first.
    pub first: u64,
    /// The number of the last.
    pub last: u64,
    /// How many lines they are: fewer than the numbers say, where a sink does not get everything.
    pub records: u64,
    /// The earliest and the latest time of the records, in milliseconds of Unix time.
    pub times: (i64, i64),
}

/// What a sink is to do.
#[derive(Debug, Clone)]
pub(in crate::audit) enum Order {
    /// Write this.
    Write(Batch),
    /// Begin a new file, whose first record has this number.
    Rotate(u64),
    /// End the line that an earlier process has left unfinished.
    Mend,
}

/// Why a sink does not get on.
#[derive(Debug, Clone)]
pub(in crate::audit) struct Failure {
    pub(in crate::audit) since: Instant,
    pub(in crate::audit) reason: &'static str,
    pub(in crate::audit) detail: String,
}

/// Records that a sink will never get, because it would not take them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::audit) struct Losses {
    pub(in crate::audit) records: u64,
    /// Why not the last of them.
    pub(in crate::audit) reason: &'static str,
    pub(in crate::audit) detail: String,
}

/// Makes a queue for one sink: the writer's end, the sink's, and the sink's word on how far it is.
pub(in crate::audit) fn pipe() -> (Feed, Batches, Progress) {
    let shared = Arc::new(Shared::default());
    (Feed(Arc::clone(&shared)), Batches(Arc::clone(&shared)), Progress(shared))
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Told of every change, for threads.
    changed: Condvar,
    /// Told of every order and of the end, for tasks.
    ordered: Notify,
}

#[derive(Debug, Default)]
struct State {
    orders: VecDeque<Order>,
    /// What was handed over and is not written: of each batch the last number, its bytes, and its records.
    outstanding: VecDeque<(u64, usize, u64)>,
    bytes: usize,
    records: u64,
    written: Option<u64>,
    failure: Option<Failure>,
    /// What the collector would not take, until the writer has heard of it.
    losses: Option<Losses>,
    /// The writer gives no more.
    closed: bool,
    /// The sink takes no more.
    gone: bool,
}

impl State {
    /// Nothing up to the record `last` waits any longer.
    fn got_to(&mut self, last: u64) {
        while let Some((_, bytes, records)) = self.outstanding.front().copied().filter(|(number, ..)| *number <= last) {
            self.bytes = self.bytes.saturating_sub(bytes);
            self.records = self.records.saturating_sub(records);
            self.outstanding.pop_front();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The writer's end.
#[derive(Debug)]
pub(in crate::audit) struct Feed(Arc<Shared>);

impl Feed {
    /// Hands a batch over if there is room for it; whether there was.
    pub(in crate::audit) fn offer(&self, batch: Batch) -> bool {
        let fits = self.0.state().bytes.saturating_add(batch.bytes.len()) <= TRAIL_SINK_BYTES;
        if fits {
            self.force(batch);
        }
        fits
    }

    /// Hands a batch over, room or not: of a required sink, which the writer gives no more before it has got on.
    pub(in crate::audit) fn force(&self, batch: Batch) {
        let mut state = self.0.state();
        state.bytes += batch.bytes.len();
        state.records += batch.records;
        state.outstanding.push_back((batch.last, batch.bytes.len(), batch.records));
        drop(state);
        self.order(Order::Write(batch));
    }

    /// Gives an order. Those that are no batches come at most so often as the writer looks around.
    pub(in crate::audit) fn order(&self, order: Order) {
        self.0.state().orders.push_back(order);
        self.0.changed.notify_all();
        self.0.ordered.notify_one();
    }

    /// Up to which record the sink has got.
    pub(in crate::audit) fn written(&self) -> Option<u64> {
        self.0.state().written
    }

    /// How many records were handed over and are not written.
    pub(in crate::audit) fn waiting(&self) -> u64 {
        self.0.state().records
    }

    /// Whether what it has not written is more than half of what it may.
    pub(in crate::audit) fn is_half_full(&self) -> bool {
        self.0.state().bytes > TRAIL_SINK_BYTES / 2
    }

    /// Since when the sink fails, if it does.
    pub(in crate::audit) fn failure(&self) -> Option<Failure> {
        let state = self.0.state();
        let gone = || Failure { since: Instant::now(), reason: "ended", detail: String::new() };
        state.failure.clone().or_else(|| (state.gone && !state.closed).then(gone))
    }

    /// What it would not take since this was asked last.
    pub(in crate::audit) fn losses(&self) -> Option<Losses> {
        self.0.state().losses.take()
    }

    /// Waits until the sink has got to `last`, or fails, or `until` has come; whether it has got there.
    pub(in crate::audit) fn wait(&self, last: u64, until: std::time::Instant) -> bool {
        let mut state = self.0.state();
        loop {
            if state.written.is_some_and(|written| written >= last) {
                return true;
            }
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() || state.failure.is_some() || state.gone {
                return false;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives nothing more, and waits until the sink has ended, or `until` has come; whether all is written.
    pub(in crate::audit) fn close(&self, until: std::time::Instant) -> bool {
        let mut state = self.0.state();
        state.closed = true;
        self.0.changed.notify_all();
        self.0.ordered.notify_one();
        loop {
            let left = until.saturating_duration_since(std::time::Instant::now());
            if state.gone || left.is_zero() {
                return state.outstanding.is_empty();
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.changed.notify_all();
        self.0.ordered.notify_one();
    }
}

/// What a sink is to write, in order.
#[derive(Debug)]
pub struct Batches(Arc<Shared>);

impl Batches {
    /// The next batch, when there is one; `None` when there will be none. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Batch> {
        loop {
            let ordered = self.0.ordered.notified();
            {
                let mut state = self.0.state();
                while let Some(order) = state.orders.pop_front() {
                    if let Order::Write(batch) = order {
                        return Some(batch);
                    }
                }
                if state.closed {
                    return None;
                }
            }
            ordered.await;
        }
    }

    /// The next order if there is one within `limit`: `Ok(None)` when there is none, and an error when there will be none.
    pub(in crate::audit) fn next_within(&mut self, limit: Duration) -> Result<Option<Order>, Closed> {
        let until = std::time::Instant::now() + limit;
        let mut state = self.0.state();
        loop {
            if let Some(order) = state.orders.pop_front() {
                return Ok(Some(order));
            }
            if state.closed {
                return Err(Closed);
            }
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Batches {
    /// Waits for `limit`, or until the writer gives no more; whether that is so.
    pub(in crate::audit) fn ended_within(&mut self, limit: Duration) -> bool {
        let until = std::time::Instant::now() + limit;
        let mut state = self.0.state();
        loop {
            let left = until.saturating_duration_since(std::time::Instant::now());
            if state.closed || left.is_zero() {
                return state.closed;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.0.state().gone = true;
        self.0.changed.notify_all();
    }
}

/// The writer gives no more.
#[derive(Debug)]
pub(in crate::audit) struct Closed;

/// How far a sink is, by its own word.
#[derive(Debug, Clone)]
pub struct Progress(Arc<Shared>);

impl Progress {
    /// Everything up to the record `last` is written: the collector has said so, or the system has taken it where there is
    /// nobody to say so.
    pub fn written(&self, last: u64) {
        let mut state = self.0.state();
        state.written = state.written.max(Some(last));
        state.got_to(last);
        state.failure = None;
        drop(state);
        self.0.changed.notify_all();
    }

    /// It does not get on: why, in one of a fixed set of words in snake case, and more about it for the operator. Told again
    /// while it lasts, it has still failed since the first time; the next [`Progress::written`] ends it.
    pub fn failed(&self, reason: &'static str, detail: String) {
        let mut state = self.0.state();
        let since = state.failure.as_ref().map_or_else(Instant::now, |failure| failure.since);
        state.failure = Some(Failure { since, reason, detail });
        drop(state);
        self.0.changed.notify_all();
    }

    /// The record `last` will never be written, everything before it is or was told of: why, as in [`Progress::failed`]. Only for a
    /// sink that is not required. It fails until something is written again.
    pub fn lost(&self, last: u64, reason: &'static str, detail: String) {
        let mut state = self.0.state();
        let records = state.losses.as_ref().map_or(0, |losses| losses.records) + 1;
        state.losses = Some(Losses { records, reason, detail: detail.clone() });
        state.got_to(last);
        drop(state);
        self.failed(reason, detail);
    }

    /// It gets on again, before anything new is written.
    pub fn works(&self) {
        self.0.state().failure = None;
        self.0.changed.notify_all();
    }
}

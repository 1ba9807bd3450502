//! The way of the trail's lines to one sink.
//!
//! A required sink of this machine is written by the writer itself. Every other one has a queue ([`super::sink`]) and a
//! thread or task of its own; so a sink that is not required and hangs keeps nobody waiting, not even the end of the
//! process. What such a sink does not take is counted here, and told in the trail at most once a look.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;

use super::record::{Record, SINK_FAILED, SINK_WORKS, Side, milliseconds, text};
use super::sink::{Batch, Batches, Content, Feed, Fsync, Losses, Order, Output, Progress, Rotation, SinkConfig};
use super::syncer::UnderWay;
use crate::chain::Chain;
use crate::limits::{TRAIL_PATIENCE, TRAIL_RETRY, TRAIL_ROTATION_RETRY};
use crate::metrics;

/// One sink, as the writer sees it.
pub(super) struct Lane {
    name: String,
    required: bool,
    only: Content,
    turning: Option<Turning>,
    way: Way,
    trouble: Trouble,
    /// Whether it is required, and did not take what is owed to it the last time.
    stuck: bool,
    /// Why it fails, as far as that is counted.
    counted: Option<&'static str>,
}

enum Way {
    /// Written by the writer.
    Inline(Hand),
    /// Handed over.
    Apart { feed: Feed, last: Option<u64> },
}

/// When a file is due for a rotation.
#[derive(Debug)]
pub(super) struct Turning {
    pub(super) policy: Rotation,
    /// What it holds, with what is on the way to it.
    pub(super) bytes: u64,
    pub(super) begun: Timestamp,
    /// Not before, because it has just failed.
    pub(super) not_before: Option<Instant>,
}

/// Why a sink fails that says nothing itself.
const TOO_SLOW: &str = "too_slow";

/// What a sink that is not required has not taken.
#[derive(Debug, Default)]
struct Trouble {
    /// Since when the trail says that it does not work.
    told: Option<Instant>,
    /// Records that it does not get, since it worked last.
    lost: u64,
    /// As it was at the last look.
    seen: u64,
}

impl Lane {
    pub(super) fn inline(config: &SinkConfig, hand: Hand, turning: Option<Turning>) -> Self {
        Self::new(config, Way::Inline(hand), turning)
    }

    pub(super) fn apart(config: &SinkConfig, feed: Feed, turning: Option<Turning>) -> Self {
        Self::new(config, Way::Apart { feed, last: None }, turning)
    }

    fn new(config: &SinkConfig, way: Way, turning: Option<Turning>) -> Self {
        let (name, only) = (config.name.clone(), config.only);
        metrics::AUDIT_SINK_FAILING.of([name.clone()]).set(0);
        metrics::AUDIT_SINK_LAG.of([name.clone()]).set(0);
        if !config.required {
            // What grows for the first time is not seen to grow where it was not there before.
            metrics::AUDIT_SINK_LOST.of([name.clone()]).inc_by(0);
        }
        let (trouble, stuck, counted) = (Trouble::default(), false, None);
        Self { name, required: config.required, only, turning, way, trouble, stuck, counted }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn required(&self) -> bool {
        self.required
    }

    /// Whether its file is due for a rotation.
    pub(super) fn due(&self, now: Timestamp) -> bool {
        let Some(turning) = &self.turning else { return false };
        let later = turning.not_before.is_some_and(|moment| Instant::now() < moment);
        let large = turning.policy.bytes.is_some_and(|bytes| turning.bytes >= bytes);
        let lasted = Duration::try_from(now.duration_since(turning.begun)).unwrap_or_default();
        let old = turning.policy.age.is_some_and(|age| lasted >= age);
        turning.bytes > 0 && !later && (large || old)
    }

    /// Begins a new file with the record `first`, when it gets that far.
    pub(super) fn rotate(&mut self, first: u64) {
        if let Some(turning) = &mut self.turning {
            (turning.bytes, turning.begun) = (0, Timestamp::now());
        }
        match &mut self.way {
            Way::Inline(hand) => hand.owed.push_back(Order::Rotate(first)),
            Way::Apart { feed, .. } => feed.order(Order::Rotate(first)),
        }
    }

    /// Takes a batch on. Of a required sink it is owed from here on.
    pub(super) fn give(&mut self, batch: &Batch) {
        let Some(batch) = self.part(batch) else { return };
        if let Some(turning) = &mut self.turning {
            turning.bytes += batch.bytes.len() as u64;
        }
        match &mut self.way {
            Way::Inline(hand) => hand.owed.push_back(Order::Write(batch)),
            Way::Apart { feed, last } if self.required => {
                *last = Some(batch.last);
                feed.force(batch);
            }
            Way::Apart { feed, last } => {
                let (number, records) = (batch.last, batch.records);
                if feed.offer(batch) {
                    *last = Some(number);
                } else {
                    self.trouble.lost += records;
                    metrics::AUDIT_SINK_LOST.of([self.name.clone()]).inc_by(records);
                }
            }
        }
    }

    /// What of a batch this sink gets.
    fn part(&self, batch: &Batch) -> Option<Batch> {
        if self.only == Content::All {
            return Some(batch.clone());
        }
        let mut bytes = Vec::new();
        let (mut first, mut last, mut records) = (None, batch.first, 0);
        for (number, line) in (batch.first..).zip(batch.bytes.split_inclusive(|byte| *byte == b'\n')) {
            if super::record::event_of(line).is_some_and(|event| event.starts_with("trail.")) {
                bytes.extend_from_slice(line);
                first.get_or_insert(number);
                (last, records) = (number, records + 1);
            }
        }
        Some(Batch { bytes: Bytes::from(bytes), first: first?, last, records, times: batch.times })
    }

    /// Writes what is owed, or waits until `until` for whoever does. Nothing where the sink is not required.
    ///
    /// # Errors
    /// If something is still owed.
    pub(super) fn settle(&mut self, until: Instant) -> io::Result<()> {
        let settled = self.settle_owed(until);
        if self.stuck != settled.is_err() {
            self.stuck = settled.is_err();
            metrics::AUDIT_SINK_FAILING.of([self.name.clone()]).set(self.stuck.into());
        }
        let reason = settled.is_err().then(|| self.reason());
        self.count(reason);
        settled
    }

    /// Why it does not take what is owed to it, in one of a fixed set of words.
    pub(super) fn reason(&self) -> &'static str {
        match &self.way {
            Way::Inline(_) => "write",
            Way::Apart { feed, .. } => feed.failure().map_or(TOO_SLOW, |failure| failure.reason),
        }
    }

    /// Counts a failure when it begins, and when it becomes another.
    fn count(&mut self, reason: Option<&'static str>) {
        if let Some(reason) = reason.filter(|reason| self.counted != Some(*reason)) {
            metrics::AUDIT_SINK_FAILURES.of([self.name.clone().into(), Cow::Borrowed(reason)]).inc();
        }
        self.counted = reason;
    }

    fn settle_owed(&mut self, until: Instant) -> io::Result<()> {
        match &mut self.way {
            Way::Inline(hand) => hand.push(),
            Way::Apart { feed, last: Some(last) } if self.required => {
                if feed.wait(*last, until) {
                    return Ok(());
                }
                let why = feed.failure().map_or_else(
                    || "it has not taken the records in time".to_owned(),
                    |failure| format!("{}: {}", failure.reason, failure.detail),
                );
                Err(io::Error::other(format!("the sink {}: {why}", self.name)))
            }
            Way::Apart { .. } => Ok(()),
        }
    }

    /// Up to which record everything has been taken that this sink is to get; `batch` is the last that was given.
    pub(super) fn taken(&self, batch: &Batch) -> Option<u64> {
        match &self.way {
            Way::Inline(hand) if hand.owed.is_empty() && !hand.unsynced() => Some(batch.last),
            Way::Inline(hand) => hand.upto(),
            Way::Apart { feed, last } => {
                let written = feed.written();
                if written >= *last { Some(batch.last) } else { written }
            }
        }
    }

    /// Says how far behind it is, also while the trail fails.
    pub(super) fn measure(&self) {
        let waiting = match &self.way {
            Way::Inline(hand) => hand.waiting(),
            Way::Apart { feed, .. } => feed.waiting(),
        };
        metrics::AUDIT_SINK_LAG.of([self.name.clone()]).set(i64::try_from(waiting).unwrap_or(i64::MAX));
    }

    /// Looks how the sink does: what there is to be said of one that is not required.
    pub(super) fn look(&mut self, side: Side) -> Option<Record> {
        let (failure, full) = match &mut self.way {
            Way::Inline(hand) => return Self::complain(&self.name, hand, self.turning.as_mut(), side),
            Way::Apart { feed, .. } => (feed.failure(), feed.is_half_full()),
        };
        if self.required {
            return None;
        }
        let refused = self.hear_losses();
        let trouble = &mut self.trouble;
        let losing = trouble.lost > trouble.seen;
        trouble.seen = trouble.lost;
        let name = self.name.clone();
        let record = |event| Record { sink: text(&name), ..Record::own(side, event) };
        match trouble.told {
            None if failure.is_some() || losing => {
                let since = failure.as_ref().map_or_else(Instant::now, |failure| failure.since.into_std());
                trouble.told = Some(since);
                let (reason, detail) = match (failure, refused) {
                    (_, Some(losses)) => (losses.reason, losses.detail),
                    (Some(failure), None) => (failure.reason, failure.detail),
                    (None, None) => (TOO_SLOW, String::new()),
                };
                self.count(Some(reason));
                metrics::AUDIT_SINK_FAILING.of([self.name.clone()]).set(1);
                tracing::warn!(sink = self.name, reason, detail, "a sink of the audit trail does not work");
                Some(Record { reason: text(reason), detail: text(detail), ..record(SINK_FAILED) })
            }
            // Not before it has caught up, else it could lose the next record, and nothing has shown that it works.
            Some(since) if failure.is_none() && !losing && !full => {
                let lost = trouble.lost;
                *trouble = Trouble::default();
                self.count(None);
                metrics::AUDIT_SINK_FAILING.of([self.name.clone()]).set(0);
                tracing::info!(sink = self.name, lost, "a sink of the audit trail works again");
                let lasted = milliseconds(since.elapsed());
                Some(Record { lost: Some(lost), duration_ms: Some(lasted), ..record(SINK_WORKS) })
            }
            _ => None,
        }
    }

    /// Counts what it would not take since this was done last.
    fn hear_losses(&mut self) -> Option<Losses> {
        let Way::Apart { feed, .. } = &self.way else { return None };
        let losses = feed.losses()?;
        self.trouble.lost += losses.records;
        metrics::AUDIT_SINK_LOST.of([self.name.clone()]).inc_by(losses.records);
        Some(losses)
    }

    fn complain(name: &str, hand: &mut Hand, turning: Option<&mut Turning>, side: Side) -> Option<Record> {
        let error = hand.unturned.take()?;
        if let Some(turning) = turning {
            // It is as large and as old as it was.
            (turning.bytes, turning.begun) = (hand.length, hand.begun);
            turning.not_before = Some(Instant::now() + TRAIL_ROTATION_RETRY);
        }
        let detail = Chain(&error).to_string();
        let record = Record::own(side, SINK_FAILED);
        Some(Record { sink: text(name), reason: text("rotation"), detail: text(detail), ..record })
    }

    /// Writes and synchronises what is left, or gives whoever does until `until`.
    ///
    /// # Errors
    /// If something is left that a required sink should have.
    pub(super) fn close(&mut self, until: Instant) -> io::Result<()> {
        let closed = match &mut self.way {
            Way::Inline(hand) => return hand.finish(),
            Way::Apart { feed, .. } => feed.close(until),
        };
        // The trail has ended, and cannot tell of them any more.
        let refused = self.hear_losses().map_or(0, |losses| losses.records);
        match &mut self.way {
            Way::Inline(_) => Ok(()),
            Way::Apart { .. } if closed && refused == 0 => Ok(()),
            Way::Apart { feed, .. } => {
                let records = feed.waiting() + refused;
                tracing::warn!(sink = self.name, records, "a sink of the audit trail has not got all of it");
                if !self.required {
                    return Ok(());
                }
                Err(io::Error::other(format!("the sink {} lacks {records} records", self.name)))
            }
        }
    }
}

/// Writes to a sink of this machine what is owed to it, in order and without leaving anything out.
///
/// At intervals it is synchronised beside the writing, once at a time; a failure of that is one of the sink, and after it
/// nothing is in order before the disk has said so to whoever writes. A rotation and the end wait for it.
pub(super) struct Hand {
    output: Box<dyn Output>,
    owed: VecDeque<Order>,
    /// How much of the first batch that is owed has been written.
    at: usize,
    fsync: Fsync,
    /// Something was written since the last synchronisation, which was then.
    dirty: bool,
    synced: Instant,
    /// What is being synchronised on another thread.
    syncing: Option<UnderWay>,
    /// The last synchronisation failed.
    doubtful: bool,
    /// The last record that was written.
    written: Option<u64>,
    /// Why the last rotation failed, until that is told.
    unturned: Option<io::Error>,
    /// Of what the last rotation was to put away.
    length: u64,
    begun: Timestamp,
}

impl Hand {
    /// Begins; `torn` says that the last line lacks its end, and is to be ended first.
    pub(super) fn new(output: Box<dyn Output>, fsync: Fsync, torn: bool) -> Self {
        Self::going_on(output, fsync, torn, (0, Timestamp::now()))
    }

    /// Goes on with a file that is so long and was begun then.
    pub(super) fn going_on(output: Box<dyn Output>, fsync: Fsync, torn: bool, so_far: (u64, Timestamp)) -> Self {
        Self {
            output,
            owed: torn.then_some(Order::Mend).into_iter().collect(),
            at: 0,
            fsync,
            dirty: false,
            synced: Instant::now(),
            syncing: None,
            doubtful: false,
            written: None,
            unturned: None,
            length: so_far.0,
            begun: so_far.1,
        }
    }

    /// Writes all that is owed. What was written of a line before is completed, never written again.
    pub(super) fn push(&mut self) -> io::Result<()> {
        while let Some(order) = self.owed.front() {
            match order {
                Order::Write(batch) => {
                    let batch = batch.clone();
                    self.write(&batch.bytes)?;
                    self.output.wrote(&batch);
                    self.length += batch.bytes.len() as u64;
                    self.written = Some(batch.last);
                }
                Order::Mend => self.write(b"\n")?,
                Order::Rotate(first) => {
                    let first = *first;
                    // Whether the old file is whole is told by the one under way, and by nothing after it.
                    self.await_sync()?;
                    match self.output.rotate(first) {
                        Ok(()) => {
                            (self.length, self.begun) = (0, Timestamp::now());
                            (self.dirty, self.doubtful) = (false, false);
                        }
                        Err(error) => {
                            tracing::warn!(
                                error = %Chain(&error),
                                "could not rotate the audit trail's file; it goes on"
                            );
                            self.unturned = Some(error);
                        }
                    }
                }
            }
            self.owed.pop_front();
            self.at = 0;
        }
        match self.fsync {
            Fsync::Each => self.sync(),
            Fsync::Interval(interval) => self.sync_beside(interval),
        }
    }

    /// Sees to it that the file is synchronised when it is time for that, and waits for nothing unless that failed before.
    fn sync_beside(&mut self, interval: Duration) -> io::Result<()> {
        if let Some(syncing) = &self.syncing {
            let Some(outcome) = syncing.outcome() else {
                let lasts = syncing.lasts();
                if lasts < TRAIL_PATIENCE {
                    return Ok(());
                }
                let told = format!("the disk has been synchronising the file for {} s", lasts.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, told));
            };
            self.syncing = None;
            self.judge_sync(outcome)?;
        }
        if self.doubtful {
            return self.sync();
        }
        if self.synced.elapsed() < interval {
            return Ok(());
        }
        if self.dirty {
            // Without the means to do it elsewhere it is done here.
            let begun = self.output.syncing().and_then(|syncing| syncing.map(UnderWay::begin).transpose());
            let Ok(Some(under_way)) = begun else { return self.sync() };
            (self.syncing, self.dirty) = (Some(under_way), false);
        }
        self.synced = Instant::now();
        Ok(())
    }

    /// Waits for the synchronisation that is under way, if there is one.
    fn await_sync(&mut self) -> io::Result<()> {
        let Some(syncing) = self.syncing.take() else { return Ok(()) };
        self.judge_sync(syncing.wait())
    }

    fn judge_sync(&mut self, outcome: io::Result<()>) -> io::Result<()> {
        outcome.inspect_err(|_| (self.dirty, self.doubtful) = (true, true))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        while self.at < bytes.len() {
            match self.output.write(&bytes[self.at..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => (self.at, self.dirty) = (self.at + count, true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.await_sync()?;
        if self.dirty {
            self.output.sync()?;
            self.dirty = false;
        }
        (self.synced, self.doubtful) = (Instant::now(), false);
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        let so_far = self.await_sync();
        self.push()?;
        self.sync()?;
        so_far
    }

    /// How many records are owed.
    fn waiting(&self) -> u64 {
        let records = |order: &Order| if let Order::Write(batch) = order { batch.records } else { 0 };
        self.owed.iter().map(records).sum()
    }

    fn unsynced(&self) -> bool {
        self.fsync == Fsync::Each && self.dirty
    }

    /// The last record that is written whole.
    fn upto(&self) -> Option<u64> {
        if self.unsynced() {
            return None;
        }
        let Some(Order::Write(batch)) = self.owed.front() else { return self.written };
        let lines = batch.bytes[..self.at].iter().filter(|byte| **byte == b'\n').count() as u64;
        if lines == 0 || batch.records != batch.last - batch.first + 1 {
            return self.written;
        }
        Some(batch.first + lines - 1)
    }
}

/// Makes the [`Hand`] of a sink, again and again until it can.
pub(super) type Opener = Box<dyn FnMut() -> io::Result<Hand> + Send>;

/// Writes to a sink that is not required, for as long as there is anything to come. Returns when it is written, or cannot be.
pub(super) fn work(hand: Option<Hand>, mut open: Opener, mut batches: Batches, progress: &Progress) {
    let mut hand = hand;
    loop {
        let Some(held) = &mut hand else {
            match open() {
                Ok(opened) => {
                    progress.works();
                    hand = Some(opened);
                }
                Err(error) => {
                    progress.failed("open", Chain(&error).to_string());
                    if batches.ended_within(TRAIL_RETRY) {
                        return;
                    }
                }
            }
            continue;
        };
        // While something is owed, nothing more is taken off the queue, which is what bounds it all.
        let (ended, last) = if held.owed.is_empty() {
            match batches.next_within(TRAIL_RETRY) {
                Ok(order) => {
                    held.owed.extend(order);
                    (false, false)
                }
                Err(_) => (true, true),
            }
        } else {
            (batches.ended_within(TRAIL_RETRY), false)
        };
        let pushed = if last { held.finish() } else { held.push() };
        let stuck = pushed.is_err();
        match pushed {
            Ok(()) => match held.written {
                Some(written) => progress.written(written),
                None => progress.works(),
            },
            Err(error) => progress.failed("write", Chain(&error).to_string()),
        }
        if let Some(error) = held.unturned.take() {
            tracing::warn!(error = %Chain(&error), "could not rotate a file of the audit trail; it goes on");
        }
        if last || (ended && stuck) {
            return;
        }
    }
}

/// Runs [`work`] on a thread that nobody waits for longer than he likes: it may hang in a write.
///
/// # Errors
/// If there is no thread to be had.
pub(super) fn work_apart(hand: Option<Hand>, open: Opener, batches: Batches, progress: Progress) -> io::Result<()> {
    std::thread::Builder::new().name("trail-sink".to_owned()).spawn(move || work(hand, open, batches, &progress))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A disk that synchronises when a test says so, and how that goes.
    struct Disk {
        written: Arc<Mutex<Vec<String>>>,
        /// What is asked for on another thread waits for its outcome here.
        outcomes: Arc<Mutex<Receiver<io::Result<()>>>>,
        begun: Arc<AtomicUsize>,
        /// What is asked for at once fails so often.
        fails: Arc<AtomicUsize>,
    }

    struct Held {
        written: Arc<Mutex<Vec<String>>>,
        outcomes: SyncSender<io::Result<()>>,
        begun: Arc<AtomicUsize>,
        fails: Arc<AtomicUsize>,
    }

    impl Disk {
        fn new() -> (Self, Held) {
            let (sender, receiver) = sync_channel(8);
            let disk = Self {
                written: Arc::default(),
                outcomes: Arc::new(Mutex::new(receiver)),
                begun: Arc::default(),
                fails: Arc::default(),
            };
            let held = Held {
                written: Arc::clone(&disk.written),
                outcomes: sender,
                begun: Arc::clone(&disk.begun),
                fails: Arc::clone(&disk.fails),
            };
            (disk, held)
        }

        fn note(&self, what: &str) {
            self.written.lock().expect("a list").push(what.to_owned());
        }
    }

    impl Output for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.note(std::str::from_utf8(bytes).expect("text").trim_end());
            Ok(bytes.len())
        }

        fn sync(&mut self) -> io::Result<()> {
            self.note("sync");
            let failing = self.fails.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            if failing.is_ok() { Err(io::Error::other("the disk is gone")) } else { Ok(()) }
        }

        fn syncing(&self) -> io::Result<Option<super::super::sink::Syncing>> {
            self.begun.fetch_add(1, Ordering::Relaxed);
            let outcomes = Arc::clone(&self.outcomes);
            Ok(Some(Box::new(move || outcomes.lock().expect("outcomes").recv().expect("an outcome"))))
        }

        fn rotate(&mut self, _first: u64) -> io::Result<()> {
            self.note("rotate");
            Ok(())
        }
    }

    impl Held {
        fn written(&self) -> Vec<String> {
            self.written.lock().expect("a list").clone()
        }
    }

    fn order(number: u64) -> Order {
        let bytes = Bytes::from(format!("{number}\n"));
        Order::Write(Batch { bytes, first: number, last: number, records: 1, times: (0, 0) })
    }

    /// Pushes until the synchronisation under way has been heard of.
    fn hear(hand: &mut Hand) -> io::Result<()> {
        let until = Instant::now() + Duration::from_secs(60);
        while hand.syncing.is_some() && Instant::now() < until {
            hand.push()?;
            std::thread::yield_now();
        }
        Ok(())
    }

    #[test]
    fn what_is_synchronised_at_intervals_is_written_meanwhile_and_once_at_a_time() {
        let (disk, held) = Disk::new();
        let mut hand = Hand::new(Box::new(disk), Fsync::Interval(Duration::ZERO), false);
        for number in 0..5 {
            hand.owed.push_back(order(number));
            hand.push().expect("written");
        }
        assert_eq!(held.written(), ["0", "1", "2", "3", "4"]);
        assert_eq!(held.begun.load(Ordering::Relaxed), 1);
        held.outcomes.send(Ok(())).expect("heard");
        held.outcomes.send(Ok(())).expect("heard");
        hear(&mut hand).expect("synchronised");
        // Again, for what came since; and not for nothing.
        assert_eq!(held.begun.load(Ordering::Relaxed), 2);
        hand.push().expect("in order");
        assert_eq!((held.begun.load(Ordering::Relaxed), hand.dirty), (2, false));
        assert!(!held.written().contains(&"sync".to_owned()));
    }

    #[test]
    fn a_failed_synchronisation_is_a_failure_until_the_disk_has_said_that_it_is_whole() {
        let (disk, held) = Disk::new();
        held.fails.store(1, Ordering::Relaxed);
        let mut hand = Hand::new(Box::new(disk), Fsync::Interval(Duration::ZERO), false);
        hand.owed.push_back(order(0));
        hand.push().expect("written");
        held.outcomes.send(Err(io::Error::other("a bad sector"))).expect("heard");
        let error = hear(&mut hand).expect_err("it failed");
        assert_eq!(error.to_string(), "a bad sector");
        // Nothing is under way any more: whoever asks waits for the disk itself.
        let error = hand.push().expect_err("it still fails");
        assert_eq!(error.to_string(), "the disk is gone");
        hand.push().expect("it works again");
        assert_eq!((held.written(), hand.doubtful), (vec!["0".into(), "sync".into(), "sync".into()], false));
        assert_eq!(held.begun.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_rotation_and_the_end_wait_for_what_is_under_way_and_hear_how_it_went() {
        let (disk, held) = Disk::new();
        let mut hand = Hand::new(Box::new(disk), Fsync::Interval(Duration::ZERO), false);
        hand.owed.push_back(order(0));
        hand.push().expect("written");
        held.outcomes.send(Err(io::Error::other("a bad sector"))).expect("told");
        hand.owed.extend([Order::Rotate(1), order(1)]);
        let error = hand.push().expect_err("no rotation of what may not be there");
        assert_eq!(error.to_string(), "a bad sector");
        assert_eq!(held.written(), ["0"]);
        held.outcomes.send(Ok(())).expect("told");
        hand.push().expect("rotated, which synchronises");
        assert_eq!(held.written(), ["0", "rotate", "1"]);
        assert!(hand.syncing.is_some());
        // One for what is under way, and one for what comes after it.
        held.outcomes.send(Ok(())).expect("told");
        hand.owed.push_back(order(2));
        hand.finish().expect("the end");
        assert!(hand.syncing.is_none() && !hand.dirty);
        assert_eq!(held.written()[..4], ["0", "rotate", "1", "2"]);
    }

    #[test]
    fn a_disk_that_hangs_is_a_failure_of_the_sink_and_no_thread_more() {
        let (disk, held) = Disk::new();
        let mut hand = Hand::new(Box::new(disk), Fsync::Interval(Duration::ZERO), false);
        hand.owed.push_back(order(0));
        hand.push().expect("written");
        hand.syncing.as_mut().expect("under way").begun_before(TRAIL_PATIENCE);
        for number in 1..3 {
            hand.owed.push_back(order(number));
            let error = hand.push().expect_err("it hangs");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        }
        // What is to be written is written all the same.
        assert_eq!(held.written(), ["0", "1", "2"]);
        assert_eq!(held.begun.load(Ordering::Relaxed), 1);
        held.outcomes.send(Ok(())).expect("heard");
        held.outcomes.send(Ok(())).expect("heard");
        hand.finish().expect("it gets on");
    }

    #[test]
    fn where_each_record_is_to_be_durable_it_is_waited_for() {
        let (disk, held) = Disk::new();
        let mut hand = Hand::new(Box::new(disk), Fsync::Each, false);
        for number in 0..2 {
            hand.owed.push_back(order(number));
            hand.push().expect("written");
        }
        assert_eq!(held.written(), ["0", "sync", "1", "sync"]);
        assert_eq!(held.begun.load(Ordering::Relaxed), 0);
    }
}

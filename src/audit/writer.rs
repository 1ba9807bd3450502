//! The writer: one blocking task that numbers the lines and brings them to the sinks.
//!
//! It takes everything that is queued, links it to the chain, gives it to each sink in one piece, and then answers all who
//! wait (group commit). It runs until the trail is closed or nobody holds it any more, and writes what is queued even when
//! the runtime is going away.
//!
//! A line that has its number is never taken back: another sink may have it already. When a required sink fails, what it
//! lacks is owed to it, and those who wait for it are told so; their lines follow, and so do the ends of the forwards whose
//! openings they are. Until it has got them nothing new is numbered: whoever comes is refused, and only endings are kept, in
//! their order. So what is kept is bounded by one batch and the places that openings reserved. Every further write, and every
//! tick of the watcher, tries again; then `trail.resumed` tells of the gap.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};

use super::chain::{Chain, TrailId};
use super::head::{Head, Signer};
use super::lane::Lane;
use super::prepare::Prepared;
use super::record::{
    CONTINUED, HEAD, RESUMED, Record, STOPPED, STRANGERS, event_of, milliseconds, moment, text, time_of,
};
use super::sink::{Batch, Heads};
use super::{Culprit, Shared, StartError, lock};
use crate::chain::Chain as Causes;
use crate::limits::{TRAIL_BATCH, TRAIL_PATIENCE, TRAIL_RETRY, TRAIL_SINK_GRACE};
use crate::metrics;

/// Where the outcome of a write goes.
pub(super) type Answer = oneshot::Sender<Result<(), Arc<io::Error>>>;

/// What the writer is asked to do. Lines end in a newline.
#[derive(Debug)]
pub(super) enum Message {
    /// A forward is about to open.
    Open { forward: Arc<str>, line: Vec<u8>, answer: Answer },
    /// It goes on, and says how far it is; ignored if it has ended.
    Progress { forward: Arc<str>, line: Vec<u8> },
    /// It has ended. Never lost while the sink may recover; ignored if the opening was not accepted.
    End { forward: Arc<str>, line: Vec<u8> },
    /// Anything else that somebody waits for.
    Record { line: Vec<u8>, answer: Answer },
    /// Something that nobody waits for; counted if it cannot be written.
    Stranger { line: Vec<u8>, reason: &'static str },
    /// See to it that a head covers all that comes before this, if any of that is news.
    Head { answer: Answer },
    /// Time has passed.
    Tick,
    /// Write what there is, and end.
    Stop { answer: Answer },
}

pub(super) struct Writer {
    trail: TrailId,
    chain: Chain,
    lanes: Vec<Lane>,
    queue: mpsc::Receiver<Message>,
    shared: Arc<Shared>,
    /// What is to be written and has no number yet, in order. Between two flushes only what survives a failure is left here.
    pending: VecDeque<Item>,
    /// Forwards whose opening is in the trail, or on its way there, and whose ending is not, each with the record that tells of
    /// it: its opening, or the last one that says how far it is.
    open: HashMap<Arc<str>, Option<u64>>,
    failing: Option<Failing>,
    heads: HeadClock,
    /// Those who wait for a head.
    asked: Vec<Answer>,
}

/// When the next head is due, and what it is signed with.
pub(super) struct HeadClock {
    pub(super) policy: Heads,
    pub(super) signer: Option<Signer>,
    /// Whether there was anything since the last head but what trails say of themselves and of each other: two ends that tell
    /// each other of their heads must not keep each other awake.
    pub(super) news: bool,
    /// The last head that has news, until it is in the trail.
    pub(super) made: Option<Head>,
    /// The number that the record after the last head had.
    pub(super) since: u64,
    pub(super) last: Instant,
}

/// A line on its way.
struct Item {
    line: Vec<u8>,
    fate: Fate,
}

/// What becomes of a line that cannot be written.
enum Fate {
    /// It stays: it closes this forward, of which that record tells, unless the opening is dropped.
    End(Arc<str>, Option<u64>),
    /// It is left out: it says how far this forward is.
    Progress(Arc<str>),
    /// Somebody is told so.
    Refuse(Answer, Option<Arc<str>>),
    /// It is counted as one of many.
    Count(&'static str),
    /// It is split again into the counts it was made of.
    Uncount(BTreeMap<&'static str, u64>),
    /// It is made anew for the next attempt.
    Forget,
}

struct Failing {
    since: Instant,
    /// The first required sink that failed.
    sink: String,
    /// Why the last one did.
    reason: &'static str,
    lost: u64,
}

impl Writer {
    /// Writes the first records and is then ready to run.
    pub(super) fn start(
        prepared: Prepared,
        heads: (Heads, Option<Signer>),
        queue: mpsc::Receiver<Message>,
        shared: Arc<Shared>,
    ) -> Result<Self, StartError> {
        let Prepared { trail, chain, lanes, first } = prepared;
        let (policy, signer) = heads;
        if let Some(signer) = &signer {
            // There is one writer, and it starts once.
            let _ = shared.signer.set(signer.clone());
        }
        let heads = HeadClock { policy, signer, since: chain.next(), last: Instant::now(), news: true, made: None };
        let pending = first.iter().map(|record| Item { line: record.line(), fate: Fate::Forget }).collect();
        let open = HashMap::new();
        let (failing, asked) = (None, Vec::new());
        let mut writer = Self { trail, chain, lanes, queue, shared, pending, open, failing, heads, asked };
        // Not yet time for a rotation: what the first records say is about the files as they are.
        let items = std::mem::take(&mut writer.pending);
        writer.commit(items).map_err(StartError::Write)?;
        if writer.heads.signer.is_some() {
            // What a crash has left without a signature does not stay so.
            let line = writer.head().line();
            writer.commit([Item { line, fate: Fate::Forget }].into()).map_err(StartError::Write)?;
        }
        Ok(writer)
    }

    /// Writes until the trail is closed or dropped.
    pub(super) fn run(mut self) {
        let mut stops = Vec::new();
        while stops.is_empty() {
            let Some(message) = self.queue.blocking_recv() else { break };
            stops.extend(self.take(message));
            for _ in 1..TRAIL_BATCH {
                let Ok(message) = self.queue.try_recv() else { break };
                stops.extend(self.take(message));
            }
            if stops.is_empty() {
                // Whoever needs to know has been told.
                let _ = self.flush();
            }
        }
        self.finish(stops);
    }

    fn finish(mut self, mut stops: Vec<Answer>) {
        self.queue.close();
        while let Ok(message) = self.queue.try_recv() {
            stops.extend(self.take(message));
        }
        self.add_strangers(true);
        let result = self.flush().and_then(|()| self.sign_off(if stops.is_empty() { "dropped" } else { "closed" }));
        if let Err(error) = &result {
            let endings = self.pending.len();
            tracing::error!(error = %Causes(error.as_ref()), endings, "the audit trail was closed incomplete");
        }
        for stop in stops {
            let _ = stop.send(result.clone());
        }
        let until = Instant::now() + TRAIL_SINK_GRACE;
        for lane in self.lanes.iter_mut().filter(|lane| !lane.required()) {
            // It has said in the log what is missing.
            let _ = lane.close(until);
        }
    }

    /// Writes the last head and the last record.
    fn sign_off(&mut self, reason: &str) -> Result<(), Arc<io::Error>> {
        let mut items = VecDeque::new();
        if self.chain.next() > self.heads.since {
            items.push_back(Item { line: self.head().line(), fate: Fate::Forget });
            self.commit(std::mem::take(&mut items))?;
        }
        let record = Record {
            trail: text(self.trail),
            forwards: Some(self.open.len() as u64),
            reason: text(reason),
            ..Record::own(self.shared.side, STOPPED)
        };
        items.push_back(Item { line: record.line(), fate: Fate::Forget });
        self.commit(items)?;
        let until = Instant::now() + TRAIL_PATIENCE;
        for lane in self.lanes.iter_mut().filter(|lane| lane.required()) {
            lane.close(until).map_err(Arc::new)?;
        }
        Ok(())
    }

    /// Queues what a message asks for. Returns the answer that a stop waits for.
    fn take(&mut self, message: Message) -> Option<Answer> {
        let (line, fate) = match message {
            Message::Open { forward, line, answer } => {
                self.open.insert(Arc::clone(&forward), None);
                (line, Fate::Refuse(answer, Some(forward)))
            }
            Message::Progress { forward, line } => {
                if !self.open.contains_key(&forward) {
                    return None;
                }
                (line, Fate::Progress(forward))
            }
            Message::End { forward, line } => {
                let told = self.open.remove(&forward)?;
                (line, Fate::End(forward, told))
            }
            Message::Record { line, answer } => (line, Fate::Refuse(answer, None)),
            Message::Stranger { line, reason } => (line, Fate::Count(reason)),
            Message::Head { answer } => {
                self.asked.push(answer);
                return None;
            }
            Message::Tick => {
                self.look_around();
                return None;
            }
            Message::Stop { answer } => return Some(answer),
        };
        self.pending.push_back(Item { line, fate });
        None
    }

    /// What is done from time to time.
    fn look_around(&mut self) {
        self.add_strangers(false);
        self.lanes.iter().for_each(Lane::measure);
        if self.failing.is_some() {
            return;
        }
        for lane in &mut self.lanes {
            let record = lane.look(self.shared.side);
            self.pending.extend(record.map(|record| Item { line: record.line(), fate: Fate::Forget }));
        }
    }

    fn add_strangers(&mut self, at_once: bool) {
        // While a sink fails they go on being counted.
        if self.failing.is_some() && !at_once {
            return;
        }
        let now = tokio::time::Instant::now();
        let Some((counts, lasted)) = self.shared.strangers().due(now, at_once) else { return };
        let record = Record {
            counts: counts.clone(),
            duration_ms: Some(milliseconds(lasted)),
            ..Record::own(self.shared.side, STRANGERS)
        };
        self.pending.push_back(Item { line: record.line(), fate: Fate::Uncount(counts) });
    }

    /// Brings all that is pending to the sinks, with a head if somebody asks for one, and tells everybody concerned.
    fn flush(&mut self) -> Result<(), Arc<io::Error>> {
        let result = self.write_out();
        for answer in std::mem::take(&mut self.asked) {
            let _ = answer.send(result.clone());
        }
        result
    }

    /// Brings all that is pending to the sinks, if need be after what they lack.
    fn write_out(&mut self) -> Result<(), Arc<io::Error>> {
        if let Some(failing) = &self.failing {
            let since = failing.since;
            if let Err((culprit, error)) = self.settle(Instant::now() + TRAIL_RETRY / 4) {
                let error = Arc::new(error);
                self.fails(culprit, &error);
                self.refuse(&error);
                return Err(error);
            }
            let Some(failing) = self.failing.take() else { return Ok(()) };
            tracing::info!(lost = failing.lost, "the audit trail can be written again");
            let record = Record {
                duration_ms: Some(milliseconds(since.elapsed())),
                lost: Some(failing.lost),
                sink: text(&failing.sink),
                ..Record::own(self.shared.side, RESUMED)
            };
            self.pending.push_front(Item { line: record.line(), fate: Fate::Forget });
        }
        let result = self.turn().and_then(|()| {
            let items = std::mem::take(&mut self.pending);
            self.commit(items)
        });
        let Err(error) = result else {
            let new = self.heads.news && self.chain.next() > self.heads.since;
            if self.heads_due() || (new && !self.asked.is_empty()) {
                let line = self.head().line();
                return self.commit([Item { line, fate: Fate::Forget }].into());
            }
            return Ok(());
        };
        self.refuse(&error);
        Err(error)
    }

    /// Rotates the files that are due: the old one ends with a head, and the new one begins with a word on what goes on.
    fn turn(&mut self) -> Result<(), Arc<io::Error>> {
        let now = Timestamp::now();
        let due: Vec<usize> = (0..self.lanes.len()).filter(|at| self.lanes[*at].due(now)).collect();
        if due.is_empty() {
            return Ok(());
        }
        if self.chain.next() > self.heads.since {
            let line = self.head().line();
            self.commit([Item { line, fate: Fate::Forget }].into())?;
        }
        let mut names = Vec::new();
        for at in due {
            self.lanes[at].rotate(self.chain.next());
            names.push(self.lanes[at].name().to_owned());
        }
        // Those whose end is not written yet are open at this place.
        let ending = || self.pending.iter().map(|item| if let Fate::End(_, told) = item.fate { told } else { None });
        let told = || self.open.values().copied().chain(ending()).flatten();
        let record = Record {
            trail: text(self.trail),
            sink: text(names.join(" ")),
            forwards: Some(told().count() as u64),
            open_from: told().min(),
            ..Record::own(self.shared.side, CONTINUED)
        };
        self.commit([Item { line: record.line(), fate: Fate::Forget }].into())
    }

    fn heads_due(&self) -> bool {
        let new = self.chain.next() - self.heads.since;
        new > 0 && (new >= self.heads.policy.records || self.heads.last.elapsed() >= self.heads.policy.every)
    }

    /// The record of the trail's head as it is now.
    fn head(&mut self) -> Record {
        let (seq, last) = (self.chain.next().saturating_sub(1), self.chain.last());
        let mut record = Record {
            trail: text(self.trail),
            covers: Some(seq),
            head: text(last),
            head_records: Some(self.heads.policy.records),
            head_s: Some(self.heads.policy.every.as_secs().max(1)),
            ..Record::own(self.shared.side, HEAD)
        };
        let time_ms = moment(record.time.as_bytes()).and_then(|time| u64::try_from(time).ok()).unwrap_or_default();
        let head = Head { trail: self.trail, seq, record: last, time_ms };
        match self.heads.signer.as_ref().map(|signer| signer.sign(&head)).transpose() {
            Ok(Some(seal)) => (record.key, record.signature) = (text(seal.key), text(seal.signature)),
            Ok(None) => {}
            // Without a signature it still says what it says.
            Err(error) => tracing::error!(error = %Causes(&error), "could not sign the head of the audit trail"),
        }
        if std::mem::take(&mut self.heads.news) {
            self.heads.made = Some(head);
        }
        // The head's own record is not news.
        (self.heads.since, self.heads.last) = (self.chain.next() + 1, Instant::now());
        record
    }

    /// Numbers lines and brings them to the sinks. Whoever waits for one of them is told how it went. A head that they make due
    /// goes with them, so that a trail is not seen, nor left by a crash, with more records without one than it promises; after its
    /// stop there is nothing.
    fn commit(&mut self, mut items: VecDeque<Item>) -> Result<(), Arc<io::Error>> {
        if items.is_empty() {
            // A file may be due to be synchronised.
            return match self.settle(Instant::now() + TRAIL_PATIENCE) {
                Ok(()) => {
                    self.works();
                    Ok(())
                }
                Err((culprit, error)) => {
                    let error = Arc::new(error);
                    self.fails(culprit, &error);
                    Err(error)
                }
            };
        }
        let first = self.chain.next();
        let mut bytes = Vec::with_capacity(items.iter().map(|item| item.line.len() + LINK_ROOM).sum());
        let mut answers = Vec::with_capacity(items.len());
        let mut times: Option<(Vec<u8>, Vec<u8>)> = None;
        let mut events: HashMap<String, u64> = HashMap::new();
        while let Some(Item { mut line, fate }) = items.pop_front() {
            let number = self.chain.next();
            if let Some(time) = time_of(&line) {
                let (earliest, latest) = times.get_or_insert_with(|| (time.to_vec(), time.to_vec()));
                if time < earliest.as_slice() {
                    time.clone_into(earliest);
                } else if time > latest.as_slice() {
                    time.clone_into(latest);
                }
            }
            if let Some(event) = event_of(&line) {
                self.heads.news |= !event.starts_with("trail.");
                match events.get_mut(event) {
                    Some(count) => *count += 1,
                    None => drop(events.insert(event.to_owned(), 1)),
                }
            }
            self.chain.link(&mut line);
            bytes.extend_from_slice(&line);
            match fate {
                Fate::Refuse(answer, forward) => {
                    if let Some(open) = forward.and_then(|forward| self.open.get_mut(&forward)) {
                        *open = Some(number);
                    }
                    answers.push((number, answer));
                }
                Fate::Progress(forward) => {
                    if let Some(open) = self.open.get_mut(&forward) {
                        *open = Some(number);
                    }
                }
                Fate::End(..) | Fate::Count(_) | Fate::Uncount(_) | Fate::Forget => {}
            }
            if items.is_empty() && self.heads_due() && event_of(&line) != Some(STOPPED) {
                items.push_back(Item { line: self.head().line(), fate: Fate::Forget });
            }
        }
        let moments = times.as_ref().and_then(|(earliest, latest)| moment(earliest).zip(moment(latest)));
        let last = self.chain.next() - 1;
        let now = || Timestamp::now().as_millisecond();
        let times = moments.unwrap_or_else(|| (now(), now()));
        let batch = Batch { bytes: Bytes::from(bytes), first, last, records: last - first + 1, times };
        for (event, count) in events {
            metrics::AUDIT_RECORDS.of([event]).inc_by(count);
        }

        let begun = Instant::now();
        *lock(&self.shared.writing) = Some(tokio::time::Instant::now());
        self.lanes.iter_mut().for_each(|lane| lane.give(&batch));
        let settled = self.settle(begun + TRAIL_PATIENCE);
        *lock(&self.shared.writing) = None;
        metrics::AUDIT_WRITE_SECONDS.observe(begun.elapsed().as_secs_f64());
        match settled {
            Ok(()) => {
                // Before anybody hears of it: to whoever was told that a record is in the trail, the sinks work.
                self.works();
                for (_, answer) in answers {
                    // Nobody waiting means that the caller gave up; its entry ends itself.
                    let _ = answer.send(Ok(()));
                }
                if let Some(head) = self.heads.made.take_if(|head| head.seq < last) {
                    self.shared.heads.send_replace(Some(head));
                }
                Ok(())
            }
            Err((culprit, error)) => {
                let error = Arc::new(error);
                self.fails(culprit, &error);
                let required = self.lanes.iter().filter(|lane| lane.required());
                let taken = required.map(|lane| lane.taken(&batch)).min().flatten();
                for (number, answer) in answers {
                    // What is not everywhere yet will be. If it is an opening, its entry is dropped because of this
                    // answer, and closes it.
                    let there = taken.is_some_and(|taken| number <= taken);
                    let _ = answer.send(if there { Ok(()) } else { Err(Arc::clone(&error)) });
                }
                Err(error)
            }
        }
    }

    /// Sees to it that every required sink has all that was given to it, as far as that can be had until `until`.
    fn settle(&mut self, until: Instant) -> Result<(), (Culprit, io::Error)> {
        let mut result = Ok(());
        // Each gets its own, whatever becomes of the others.
        for lane in &mut self.lanes {
            if let Err(error) = lane.settle(until) {
                result = result.and(Err((Culprit { sink: lane.name().to_owned(), reason: lane.reason() }, error)));
            }
        }
        result
    }

    fn works(&mut self) {
        *lock(&self.shared.culprit) = None;
        self.shared.failed.send_if_modified(|failed| failed.take().is_some());
    }

    fn fails(&mut self, culprit: Culprit, error: &Arc<io::Error>) {
        let (sink, reason) = (culprit.sink.clone(), culprit.reason);
        *lock(&self.shared.culprit) = Some(culprit);
        let failing = self.failing.get_or_insert_with(|| {
            tracing::error!(
                sink,
                error = %Causes(error.as_ref()),
                "the audit trail cannot be written: nothing opens until it can"
            );
            Failing { since: Instant::now(), sink: sink.clone(), reason, lost: 0 }
        });
        if std::mem::replace(&mut failing.reason, reason) != reason {
            tracing::error!(
                sink,
                error = %Causes(error.as_ref()),
                "the audit trail cannot be written, now for another reason"
            );
        }
        let since = tokio::time::Instant::from_std(failing.since);
        self.shared.failed.send_if_modified(|failed| failed.is_none() && failed.replace(since).is_none());
    }

    /// Refuses what has no number yet, but for what has to be told in the end.
    fn refuse(&mut self, error: &Arc<io::Error>) {
        let mut dropped = HashSet::new();
        let mut lost = 0;
        for item in std::mem::take(&mut self.pending) {
            match item.fate {
                Fate::End(forward, told) => {
                    if !dropped.remove(&forward) {
                        self.pending.push_back(Item { line: item.line, fate: Fate::End(forward, told) });
                    }
                }
                Fate::Refuse(answer, forward) => {
                    lost += 1;
                    if let Some(forward) = forward {
                        self.open.remove(&forward);
                        dropped.insert(forward);
                    }
                    let _ = answer.send(Err(Arc::clone(error)));
                }
                Fate::Count(reason) => self.shared.strangers().count(reason, 1),
                Fate::Uncount(counts) => {
                    let mut strangers = self.shared.strangers();
                    counts.into_iter().for_each(|(reason, number)| strangers.count(reason, number));
                }
                Fate::Progress(_) | Fate::Forget => {}
            }
        }
        if let Some(failing) = &mut self.failing {
            failing.lost += lost;
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.over.cancel();
    }
}

/// What a line grows by when it gets its number and the digest of the one before.
const LINK_ROOM: usize = 96;

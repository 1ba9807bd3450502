//! The audit: who asked for what, what was decided, and what became of it.
//!
//! Promised:
//!
//! * [`Trail::open`] returns an [`Entry`] only after the `forward.open` record has been written to every required sink.
//!   Whoever needs an entry to open a stream cannot open one that is not recorded.
//! * Every `forward.open` is followed by exactly one closing record: `forward.denied`, `forward.failed`,
//!   `forward.ended` or `forward.abandoned`. The opening reserves the place of its closing record in the queue, so that
//!   dropping an [`Entry`] neither waits nor loses anything. What a crash left open is closed when the trail is next
//!   started on the same file, also where it was opened before a rotation.
//! * If a required sink fails, [`Trail::open`], [`Trail::deny`] and [`Trail::note`] fail until it works again. Endings are
//!   kept meanwhile, in order. [`Trail::failed`] says since when. A sink that is not required never makes anything fail or
//!   wait; what it loses is counted and told.
//! * Every record has a number and the digest of the one before ([`chain`]). A record that has its number is never taken
//!   back: what was written of an unfinished line is completed first. So a record whose writer was told that it failed may
//!   be in the trail after all; if it is an opening, `forward.abandoned` follows it.
//! * [`Trail::stranger`] never waits, and what unauthenticated peers cause has a budget of its own.
//!
//! Not promised: that records survive a power failure, unless a file has [`Fsync::Each`]. They have reached the kernel, and
//! the file is synchronised at intervals and when the trail is closed.
//!
//! A record is one line of JSON. `v`, `time` (RFC 3339, UTC, milliseconds), `event` and `side` come first, `seq` and `prev`
//! last; fields that do not apply are absent. Records hold neither contents nor secrets. Texts from elsewhere are bounded to
//! [`crate::limits::TRAIL_TEXT_MAX`] bytes, and characters that could act on a terminal are escaped or replaced.
//!
//! One blocking task numbers the records and writes the required sinks of this machine, and ends with the trail;
//! `audit/writer.rs` says how. Other sinks have a thread or task each (`audit/lane.rs`, `audit/sink`). One small task watches
//! the writer, and has long forwards tell how far they are.

pub mod chain;
mod changed;
pub mod compare;
mod event;
mod forward;
pub mod head;
mod lane;
pub mod ocsf;
mod prepare;
pub mod read;
mod record;
mod recover;
pub mod schema;
pub mod sink;
mod strangers;
mod syncer;
mod tally;
pub mod verify;
mod writer;

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::identity::signature::SignatureError;
use crate::identity::{OrganisationId, PrivateKey};
use crate::limits::{
    FORWARD_ID_MAX, PROGRESS_BATCH, PROGRESS_LOOK, TRAIL_PATIENCE, TRAIL_QUEUE, TRAIL_RETRY, TRAIL_SYNC,
};
use crate::task::Tasks;

pub use event::{Event, Kind};
pub use forward::{Counters, Ending, Entry, Opening, Resolved};
pub use record::Side;
pub use sink::{Content, Fsync, Rotation, SinkConfig, SinkKind, Sinks};

use forward::Running;
use head::{Countersigned, Head, Seal, Signer};
use prepare::Prepared;
use record::{DENIED, OPEN, text, unsafe_to_show};
use sink::{Connect, Heads, Means};
use strangers::Strangers;
use writer::Message;

/// A handle on a trail. Clones write the same one.
#[derive(Debug, Clone)]
pub struct Trail {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Message>,
}

/// Why a trail could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The file could not be opened or made.
    #[error("could not open the audit trail {} for appending", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The path is a device, a directory or another thing that cannot be locked, cut and read again.
    #[error("the audit trail {} is not a regular file; name a file, or choose standard output", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Others than the owner have access to the file.
    #[error("the audit trail {} is open to others (mode {mode:04o}); run: chmod 600 {}", path.display(), path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is locked.
    #[error("another process writes the audit trail {}; give each process a file of its own", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// What the file holds could not be read.
    #[error("could not read what the audit trail {} holds already", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file holds more open forwards than a trail can.
    #[error(
        "the audit trail {} holds more open forwards than one process can have had; is it a trail? move it away",
        path.display()
    )]
    TooManyOpen {
        /// The file.
        path: PathBuf,
    },
    /// There is no randomness for the trail's id.
    #[error("the operating system has no randomness for the audit trail's id")]
    Random(#[source] getrandom::Error),
    /// The key cannot sign a trail.
    #[error("the audit trail's signing_key")]
    SigningKey(#[source] head::KindError),
    /// A sink has no thread.
    #[error("could not start a thread for a sink of the audit trail")]
    Thread(#[source] io::Error),
    /// Standard output could not be used.
    #[error("could not use standard output for the audit trail")]
    Stdout(#[source] io::Error),
    /// The first records could not be written.
    #[error("could not write the first records of the audit trail")]
    Write(#[source] Arc<io::Error>),
    /// The runtime is going away.
    #[error("the audit trail's writer ended before it was ready")]
    Gone,
}

/// Why a record was not accepted. In every case, what it was to record must not happen.
#[derive(Debug, thiserror::Error)]
pub enum TrailError {
    /// The sink failed; the record is not in the trail.
    #[error("could not write to the audit trail; nothing opens until that works again")]
    Write(#[source] Arc<io::Error>),
    /// The sink took longer than [`TRAIL_PATIENCE`]; the record may appear in the trail later.
    #[error("the audit trail did not take a record in time; does anything read its output?")]
    Slow,
    /// All places in the queue are taken, by live forwards or by records that wait.
    #[error("the audit trail has no room for another record")]
    Full,
    /// A forward with this id is live.
    #[error("a forward with the same id is live")]
    Duplicate,
    /// The forward's id is empty or longer than [`FORWARD_ID_MAX`].
    #[error("the forward's id is empty or too long")]
    Id,
    /// The trail was closed.
    #[error("the audit trail is closed")]
    Closed,
}

impl Trail {
    /// Starts a trail: opens and locks the sink, closes what an earlier process left open in it, and writes
    /// `trail.started`. The writer is a task of `tasks`; [`Trail::close`] the trail before draining them.
    ///
    /// # Errors
    /// If the sink cannot be used, or the first records cannot be written.
    pub async fn start(sinks: Sinks, side: Side, connect: Arc<dyn Connect>, tasks: &Tasks) -> Result<Self, StartError> {
        let over = CancellationToken::new();
        let mut feeds = Vec::new();
        for config in &sinks.list {
            let (feed, batches, progress) = sink::pipe();
            let means = Means { connect: Arc::clone(&connect), tasks: tasks.clone() };
            let (required, over) = (config.required, over.clone());
            match config.kind.clone() {
                SinkKind::Syslog(config) => {
                    tasks.spawn(sink::syslog::run(config, batches, progress, means, over));
                }
                SinkKind::Https(config) => {
                    tasks.spawn(sink::https::run(config, batches, progress, means, required, over));
                }
                SinkKind::File { .. } | SinkKind::Stdout => continue,
            }
            feeds.push(feed);
        }
        let how = How { heads: sinks.heads, signing_key: sinks.signing_key.clone(), progress: sinks.progress, over };
        Self::begin(side, tasks, how, move || prepare::prepare(&sinks, side, feeds)).await
    }

    /// Records that a forward is about to open, and returns once the write of that record has returned. Dropping the
    /// future is safe: if the record is written all the same, `forward.abandoned` follows it.
    ///
    /// # Errors
    /// If the record was not accepted. The forward must not open.
    pub async fn open(&self, opening: Opening) -> Result<Entry, TrailError> {
        let place = self.queue.clone().try_reserve_owned().map_err(refused)?;
        let room = self.queue.try_reserve().map_err(refused)?;
        let line = opening.record(self.shared.side, OPEN).line();
        let (running, peer) = self.shared.admit(opening)?;
        let forward = Arc::clone(&running.forward);
        // From here on the entry ends itself, whatever happens to this future.
        let shared = Arc::clone(&self.shared);
        let mut entry = Entry { shared, running, place: Some(place), peer, abandoned: "cancelled" };
        let (answer, answered) = oneshot::channel();
        room.send(Message::Open { forward, line, answer });
        match self.shared.accepted(answered, TRAIL_PATIENCE).await {
            Ok(()) => {
                entry.abandoned = "dropped";
                Ok(entry)
            }
            Err(error) => {
                entry.abandoned = "trail_failed";
                Err(error)
            }
        }
    }

    /// Records that a forward was refused before it was opened, and returns once that write has returned.
    ///
    /// # Errors
    /// If the record was not accepted; the refusal stands. A live forward's id is not accepted, since the record would
    /// read as that forward's end.
    pub async fn deny(&self, opening: Opening, reason: &str, detail: &str) -> Result<(), TrailError> {
        if self.shared.live().forwards.contains_key(opening.forward.as_str()) {
            return Err(TrailError::Duplicate);
        }
        tally::denied(self.shared.side, &opening, reason);
        let mut record = opening.record(self.shared.side, DENIED);
        record.reason = text(reason);
        record.detail = text(detail);
        self.write(record.line()).await
    }

    /// Records an event that is not a forward's, and returns once that write has returned.
    ///
    /// # Errors
    /// If the record was not accepted.
    pub fn note(&self, event: Event) -> impl Future<Output = Result<(), TrailError>> {
        // Before the wait, which then has room for a line alone: those who note things wait for much else, for hours.
        let record = event.stamped(self.shared.side);
        tally::happened(&record);
        self.write(record.line())
    }

    /// Records an event that an unauthenticated peer caused. Never waits: within the budget of [`STRANGER_RECORDS`] per
    /// [`STRANGER_PERIOD`] and with room in the queue the event becomes a record; else it is counted by `reason`, and
    /// the counts become one `auth.refused_more` record at the end of the period.
    pub fn stranger(&self, event: Event, reason: &'static str) {
        let event = event.reason(reason);
        tally::happened(&event.0);
        if self.shared.strangers().admit(Instant::now()) {
            let line = event.stamped(self.shared.side).line();
            if self.queue.try_send(Message::Stranger { line, reason }).is_ok() {
                return;
            }
        }
        self.shared.strangers().count(reason, 1);
    }

    /// Since when the sink has been failing; `None` while it works. Running forwards are to be ended once it has failed
    /// for [`crate::limits::TRAIL_FAILURE_GRACE`].
    #[must_use]
    pub fn failed(&self) -> watch::Receiver<Option<Instant>> {
        self.shared.failed.subscribe()
    }

    /// Has a head written that covers all that was accepted before, unless the last one does but for what trails say of
    /// themselves and of each other. Returns the newest there is.
    ///
    /// # Errors
    /// If it could not be written.
    pub async fn head(&self) -> Result<Option<Head>, TrailError> {
        let (answer, answered) = oneshot::channel();
        match tokio::time::timeout(TRAIL_PATIENCE, self.queue.send(Message::Head { answer })).await {
            Ok(Ok(())) => self.shared.accepted(answered, TRAIL_PATIENCE).await?,
            Ok(Err(_)) => return Err(TrailError::Closed),
            Err(_) => return Err(TrailError::Full),
        }
        Ok(*self.shared.heads.borrow())
    }

    /// The sink because of which it fails, if it does: of several the first one. None where a write hangs.
    #[must_use]
    pub fn culprit(&self) -> Option<Culprit> {
        lock(&self.shared.culprit).clone()
    }

    /// The newest head that is in the trail, and each that comes.
    #[must_use]
    pub fn heads(&self) -> watch::Receiver<Option<Head>> {
        self.shared.heads.subscribe()
    }

    /// Signs that the head of another trail is on record here; `None` where this trail is not signed.
    ///
    /// # Errors
    /// If the key cannot sign.
    pub fn countersign(&self, seen: &Countersigned) -> Result<Option<Seal>, SignatureError> {
        self.shared.signer.get().map(|signer| signer.countersign(seen)).transpose()
    }

    /// How many forwards are live.
    #[must_use]
    pub fn live(&self) -> usize {
        self.shared.live().forwards.len()
    }

    /// Waits a little for the endings of live forwards, writes what is queued and `trail.stopped`, and synchronises the
    /// file. Other handles then answer [`TrailError::Closed`], and what ends later is closed by the next start.
    ///
    /// # Errors
    /// If not everything could be written or synchronised.
    pub async fn close(self) -> Result<(), TrailError> {
        // The owner has drained its forwards; this is for those that are in the middle of being dropped.
        let _ = tokio::time::timeout(TRAIL_PATIENCE, self.shared.quiet()).await;
        let (answer, answered) = oneshot::channel();
        match tokio::time::timeout(TRAIL_PATIENCE, self.queue.send(Message::Stop { answer })).await {
            Ok(Ok(())) => self.shared.accepted(answered, TRAIL_SYNC).await,
            Ok(Err(_)) => Err(TrailError::Closed),
            Err(_) => Err(TrailError::Slow),
        }
    }

    async fn write(&self, line: Vec<u8>) -> Result<(), TrailError> {
        let (answer, answered) = oneshot::channel();
        match tokio::time::timeout(TRAIL_PATIENCE, self.queue.send(Message::Record { line, answer })).await {
            Ok(Ok(())) => self.shared.accepted(answered, TRAIL_PATIENCE).await,
            Ok(Err(_)) => Err(TrailError::Closed),
            Err(_) => Err(TrailError::Full),
        }
    }

    async fn begin<F>(side: Side, tasks: &Tasks, how: How, prepare: F) -> Result<Self, StartError>
    where
        F: FnOnce() -> Result<Prepared, StartError> + Send + 'static,
    {
        let How { heads, signing_key, progress, over } = how;
        let signer = signing_key.map(Signer::new).transpose().map_err(StartError::SigningKey)?;
        let shared = Arc::new(Shared {
            side,
            progress,
            live: Mutex::default(),
            ended: Notify::new(),
            strangers: Mutex::default(),
            failed: watch::Sender::new(None),
            culprit: Mutex::new(None),
            writing: Mutex::new(None),
            over,
            heads: watch::Sender::new(None),
            signer: OnceLock::new(),
        });
        let (queue, messages) = mpsc::channel(TRAIL_QUEUE);
        let (ready, started) = oneshot::channel();
        let writers = Arc::clone(&shared);
        tasks.spawn_blocking(move || {
            let writer =
                prepare().and_then(|prepared| writer::Writer::start(prepared, (heads, signer), messages, writers));
            match writer {
                Ok(writer) => {
                    // Nobody waiting means that the trail is gone; the writer will see its queue closed.
                    let _ = ready.send(Ok(()));
                    writer.run();
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        });
        started.await.unwrap_or(Err(StartError::Gone))?;
        tasks.spawn(watch_over(Arc::clone(&shared), queue.downgrade()));
        Ok(Self { shared, queue })
    }
}

/// What a writer is told beside its sinks.
struct How {
    heads: Heads,
    signing_key: Option<PrivateKey>,
    progress: Duration,
    /// Fires when the writer has ended.
    over: CancellationToken,
}

/// Calls `cut` once the sink has been failing for [`crate::limits::TRAIL_FAILURE_GRACE`], and again whenever that happens
/// anew: what runs unrecorded must end. Returns when `stop` fires.
pub async fn watch_failure(mut failed: watch::Receiver<Option<Instant>>, stop: CancellationToken, cut: impl Fn()) {
    let mut failing = false;
    loop {
        let since = *failed.borrow_and_update();
        // Told once by whoever runs, not by every forward that is refused meanwhile.
        match (failing, since.is_some()) {
            (false, true) => error!("the audit trail cannot be written: nothing opens until it can"),
            (true, false) => info!("the audit trail can be written again"),
            _ => {}
        }
        failing = since.is_some();
        let grace = async {
            match since {
                Some(since) => tokio::time::sleep_until(since + crate::limits::TRAIL_FAILURE_GRACE).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = grace => {
                cut();
                // The same failure cuts once; a new one begins with a change.
                tokio::select! {
                    changed = failed.changed() => if changed.is_err() { return },
                    () = stop.cancelled() => return,
                }
            }
            changed = failed.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}

/// The required sink because of which a trail cannot be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Culprit {
    /// What the configuration calls it.
    pub sink: String,
    /// One of the words that `sink.failed` has, or `write`.
    pub reason: &'static str,
}

impl Culprit {
    /// The sink, and why it fails.
    #[must_use]
    pub fn words(&self) -> (&str, &str) {
        (&self.sink, self.reason)
    }
}

/// What handles, entries, the writer and its watcher share.
#[derive(Debug)]
struct Shared {
    side: Side,
    /// How often a forward that lasts says how far it is.
    progress: Duration,
    live: Mutex<Live>,
    /// Told whenever a forward has ended.
    ended: Notify,
    strangers: Mutex<Strangers>,
    failed: watch::Sender<Option<Instant>>,
    /// The sink that failed at the last attempt.
    culprit: Mutex<Option<Culprit>>,
    /// Since when a write has been under way.
    writing: Mutex<Option<Instant>>,
    /// Fires when the writer has ended.
    over: CancellationToken,
    /// The newest head that is in the trail.
    heads: watch::Sender<Option<Head>>,
    /// What heads are signed with.
    signer: OnceLock<Signer>,
}

/// The forwards that have an [`Entry`].
#[derive(Debug, Default)]
struct Live {
    forwards: HashMap<Arc<str>, Arc<Running>>,
    peers: HashSet<PeerForward>,
}

/// The other side's id of a forward. It is unique within an organisation only, so that none can use up another's ids.
type PeerForward = (Option<OrganisationId>, String);

impl Shared {
    fn admit(&self, opening: Opening) -> Result<(Arc<Running>, Option<PeerForward>), TrailError> {
        let fits = |id: &str| !id.is_empty() && id.len() <= FORWARD_ID_MAX && !id.chars().any(unsafe_to_show);
        if !fits(&opening.forward) || !opening.peer_forward.as_deref().is_none_or(fits) {
            return Err(TrailError::Id);
        }
        let mut live = self.live();
        let peer = opening.peer_forward.clone().map(|forward| (opening.organisation.clone(), forward));
        if live.forwards.contains_key(opening.forward.as_str())
            || peer.as_ref().is_some_and(|id| live.peers.contains(id))
        {
            return Err(TrailError::Duplicate);
        }
        let running = Arc::new(Running::new(opening));
        live.forwards.insert(Arc::clone(&running.forward), Arc::clone(&running));
        live.peers.extend(peer.clone());
        Ok((running, peer))
    }

    fn release(&self, forward: &str, peer: Option<PeerForward>) {
        let mut live = self.live();
        live.forwards.remove(forward);
        if let Some(peer) = peer {
            live.peers.remove(&peer);
        }
        drop(live);
        self.ended.notify_waiters();
    }

    /// Waits until no forward is live.
    async fn quiet(&self) {
        loop {
            let ended = self.ended.notified();
            if self.live().forwards.is_empty() {
                return;
            }
            ended.await;
        }
    }

    async fn accepted(
        &self,
        answered: oneshot::Receiver<Result<(), Arc<io::Error>>>,
        patience: Duration,
    ) -> Result<(), TrailError> {
        match tokio::time::timeout(patience, answered).await {
            Ok(Ok(answer)) => answer.map_err(TrailError::Write),
            Ok(Err(_)) => Err(TrailError::Closed),
            Err(_) => Err(TrailError::Slow),
        }
    }

    /// Reports a write that hangs as a failure of the sink; the writer takes that back when it gets on.
    fn judge_write(&self) {
        let writing = *lock(&self.writing);
        if let Some(since) = writing.filter(|since| since.elapsed() >= TRAIL_PATIENCE) {
            self.failed.send_if_modified(|failed| failed.is_none() && failed.replace(since).is_none());
        }
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        lock(&self.live)
    }

    fn strangers(&self) -> MutexGuard<'_, Strangers> {
        lock(&self.strangers)
    }
}

/// Has forwards that last say how far they are: those whose turn it is, but not too many at once. Whether there may be more.
fn tell_progress(shared: &Shared, queue: &mpsc::Sender<Message>) -> bool {
    let due = |running: &&Arc<Running>| running.is_due(shared.progress);
    let batch: Vec<_> = shared.live().forwards.values().filter(due).take(PROGRESS_BATCH).cloned().collect();
    for running in &batch {
        let line = running.progress(shared.side).line();
        // Without room it is left out, and told when its next turn comes.
        let _ = queue.try_send(Message::Progress { forward: Arc::clone(&running.forward), line });
    }
    batch.len() == PROGRESS_BATCH
}

/// Looks after the writer from outside, for as long as it runs: it cannot tell that it hangs, and has no clock to wake by.
async fn watch_over(shared: Arc<Shared>, queue: mpsc::WeakSender<Message>) {
    let _levels = tally::refresh(&shared, &queue);
    let mut every = tokio::time::interval(TRAIL_RETRY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let pause = (shared.progress / 16).min(PROGRESS_LOOK);
    let mut next = Instant::now() + pause;
    while shared.over.run_until_cancelled(every.tick()).await.is_some() {
        shared.judge_write();
        let Some(queue) = queue.upgrade() else { continue };
        if Instant::now() >= next && !tell_progress(&shared, &queue) {
            next = Instant::now() + pause;
        }
        // A full queue means that the writer has work, and so will look by itself.
        let _ = queue.try_send(Message::Tick);
    }
}

fn refused<T>(error: TrySendError<T>) -> TrailError {
    match error {
        TrySendError::Full(_) => TrailError::Full,
        TrySendError::Closed(_) => TrailError::Closed,
    }
}

/// The guarded value, also after a panic elsewhere: what is guarded here is whole after every step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

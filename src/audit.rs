//! The audit: who asked for what, what was decided, and what became of it.
//!
//! Promised:
//!
//! * [`Trail::open`] returns an [`Entry`] only after the write of the `forward.open` record has returned on the sink.
//!   Whoever needs an entry to open a stream cannot open one that is not recorded.
//! * Every `forward.open` is followed by exactly one closing record: `forward.denied`, `forward.failed`,
//!   `forward.ended` or `forward.abandoned`. The opening reserves the place of its closing record in the queue, so that
//!   dropping an [`Entry`] neither waits nor loses anything. What a crash left open is closed when the trail is next
//!   started on the same file.
//! * If the sink fails, [`Trail::open`], [`Trail::deny`] and [`Trail::note`] fail until it works again. Endings are kept
//!   meanwhile, in order, and written first. [`Trail::failed`] says since when.
//! * Lines are never torn: what was written of an unfinished line is cut off again, or completed first.
//! * [`Trail::stranger`] never waits, and what unauthenticated peers cause has a budget of its own.
//!
//! Not promised: that records survive a power failure. They have reached the kernel, and the file is synchronised when
//! the trail is closed. A file that is moved is written on where it went; rotate by copying and truncating.
//!
//! A record is one line of JSON. `time` (RFC 3339, UTC, milliseconds), `event` and `side` come first; fields that do not
//! apply are absent. Records hold neither contents nor secrets. Texts from elsewhere are bounded to [`TRAIL_TEXT_MAX`]
//! bytes, and characters that could act on a terminal are escaped or replaced.
//!
//! One blocking task owns the sink and ends with the trail; one small task watches it. `audit/writer.rs` says
//! how.

mod writer;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::identity::{AgentId, Fingerprint, OrganisationId, Principal, ReplicaId};
use crate::limits::{
    ADDRESSES_PER_NAME, FORWARD_ID_MAX, STRANGER_PERIOD, STRANGER_RECORDS, TRAIL_PATIENCE, TRAIL_QUEUE, TRAIL_RETRY,
    TRAIL_TEXT_MAX,
};
use crate::task::Tasks;

use writer::{Message, Prepared};

/// Where a trail is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sink {
    /// A regular file of mode 0600, appended to and locked against other writers; made if it does not exist.
    File(PathBuf),
    /// Standard output.
    Stdout,
}

/// Which of the two sides writes the trail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The gateway.
    Gateway,
    /// The agent.
    Agent,
}

impl Side {
    /// The side as records name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Agent => "agent",
        }
    }
}

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
    pub async fn start(sink: Sink, side: Side, tasks: &Tasks) -> Result<Self, StartError> {
        Self::begin(side, tasks, move || writer::prepare(&sink, side)).await
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
        let (forward, peer) = self.shared.admit(&opening)?;
        // From here on the entry ends itself, whatever happens to this future.
        let mut entry = Entry {
            shared: Arc::clone(&self.shared),
            opening,
            begun: Instant::now(),
            established: false,
            dialled: None,
            counters: Arc::default(),
            place: Some((place, Arc::clone(&forward))),
            peer,
            abandoned: "cancelled",
        };
        let (answer, answered) = oneshot::channel();
        room.send(Message::Open { forward, line, answer });
        match self.shared.accepted(answered).await {
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
        if self.shared.live().forwards.contains(opening.forward.as_str()) {
            return Err(TrailError::Duplicate);
        }
        let mut record = opening.record(self.shared.side, DENIED);
        record.reason = text(reason);
        record.detail = text(detail);
        self.write(&record).await
    }

    /// Records an event that is not a forward's, and returns once that write has returned.
    ///
    /// # Errors
    /// If the record was not accepted.
    pub async fn note(&self, event: Event) -> Result<(), TrailError> {
        self.write(&event.stamped(self.shared.side)).await
    }

    /// Records an event that an unauthenticated peer caused. Never waits: within the budget of [`STRANGER_RECORDS`] per
    /// [`STRANGER_PERIOD`] and with room in the queue the event becomes a record; else it is counted by `reason`, and
    /// the counts become one `auth.refused_more` record at the end of the period.
    pub fn stranger(&self, event: Event, reason: &'static str) {
        if self.shared.strangers().admit(Instant::now()) {
            let line = event.reason(reason).stamped(self.shared.side).line();
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
            Ok(Ok(())) => self.shared.accepted(answered).await,
            Ok(Err(_)) => Err(TrailError::Closed),
            Err(_) => Err(TrailError::Slow),
        }
    }

    async fn write(&self, record: &Record) -> Result<(), TrailError> {
        let line = record.line();
        let (answer, answered) = oneshot::channel();
        match tokio::time::timeout(TRAIL_PATIENCE, self.queue.send(Message::Record { line, answer })).await {
            Ok(Ok(())) => self.shared.accepted(answered).await,
            Ok(Err(_)) => Err(TrailError::Closed),
            Err(_) => Err(TrailError::Full),
        }
    }

    async fn begin<F>(side: Side, tasks: &Tasks, prepare: F) -> Result<Self, StartError>
    where
        F: FnOnce() -> Result<Prepared, StartError> + Send + 'static,
    {
        let shared = Arc::new(Shared {
            side,
            live: Mutex::default(),
            ended: Notify::new(),
            strangers: Mutex::default(),
            failed: watch::Sender::new(None),
            writing: Mutex::new(None),
            over: CancellationToken::new(),
        });
        let (queue, messages) = mpsc::channel(TRAIL_QUEUE);
        let (ready, started) = oneshot::channel();
        let writers = Arc::clone(&shared);
        tasks.spawn_blocking(move || {
            let writer = prepare().and_then(|(output, first)| writer::Writer::start(output, first, messages, writers));
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

/// Calls `cut` once the sink has been failing for [`crate::limits::TRAIL_FAILURE_GRACE`], and again whenever that happens
/// anew: what runs unrecorded must end. Returns when `stop` fires.
pub async fn watch_failure(mut failed: watch::Receiver<Option<Instant>>, stop: CancellationToken, cut: impl Fn()) {
    loop {
        let since = *failed.borrow_and_update();
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

/// What is known of a forward when it is asked for. Absent fields are left out of the record.
#[derive(Debug, Clone, Default)]
pub struct Opening {
    /// This side's id of the forward, unique among the live ones.
    pub forward: String,
    /// The other side's id of the forward; a live duplicate within the organisation is refused.
    pub peer_forward: Option<String>,
    /// The organisation.
    pub organisation: Option<OrganisationId>,
    /// The agent.
    pub agent: Option<AgentId>,
    /// Which of its replicas.
    pub replica: Option<ReplicaId>,
    /// On whose behalf.
    pub principal: Option<Principal>,
    /// On whose word the principal rests, where that is not its own key: a fingerprint, or a name of configuration.
    pub asserted_by: Option<String>,
    /// The key that the principal logged in with.
    pub key: Option<Fingerprint>,
    /// Where the principal connects from.
    pub client: Option<String>,
    /// Which kind of door was used.
    pub door: Option<&'static str>,
    /// The host and port asked for, as far as it could be read.
    pub target: String,
    /// The rule that allows it.
    pub rule: Option<String>,
    /// What the target's name resolved to.
    pub resolved: Vec<IpAddr>,
    /// Those of the resolved addresses that are not permitted.
    pub refused: Vec<IpAddr>,
}

/// How a forward came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It was refused after it had been recorded as opening: by the other side, or because the policy changed meanwhile.
    Denied {
        /// One of a fixed set of words, in snake case.
        reason: &'static str,
        /// More about it, for the operator.
        detail: String,
    },
    /// It never carried anything, because something did not work.
    Failed {
        /// One of a fixed set of words, in snake case.
        reason: &'static str,
        /// More about it, for the operator.
        detail: String,
    },
    /// It was open and has ended, whether well or not.
    Ended {
        /// One of a fixed set of words, in snake case.
        reason: &'static str,
        /// Bytes carried toward the target.
        to_target: u64,
        /// Bytes carried from the target.
        from_target: u64,
        /// More about it, for the operator; may be empty.
        detail: String,
    },
}

/// Bytes that a forward has carried so far; whoever splices adds to them.
#[derive(Debug, Default)]
pub struct Counters {
    to_target: AtomicU64,
    from_target: AtomicU64,
}

impl Counters {
    /// Adds bytes carried toward the target.
    pub fn add_to_target(&self, bytes: u64) {
        self.to_target.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds bytes carried from the target.
    pub fn add_from_target(&self, bytes: u64) {
        self.from_target.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes carried toward the target.
    #[must_use]
    pub fn to_target(&self) -> u64 {
        self.to_target.load(Ordering::Relaxed)
    }

    /// Bytes carried from the target.
    #[must_use]
    pub fn from_target(&self) -> u64 {
        self.from_target.load(Ordering::Relaxed)
    }

    /// An ordinary end, with the bytes counted here.
    #[must_use]
    pub fn ended(&self, reason: &'static str) -> Ending {
        Ending::Ended { reason, to_target: self.to_target(), from_target: self.from_target(), detail: String::new() }
    }
}

/// A forward that the trail holds as open. Dropped unfinished, it is recorded as `forward.abandoned`.
#[derive(Debug)]
#[must_use = "dropping an entry records the forward as abandoned"]
pub struct Entry {
    shared: Arc<Shared>,
    opening: Opening,
    begun: Instant,
    established: bool,
    dialled: Option<SocketAddr>,
    counters: Arc<Counters>,
    /// The place of the closing record in the queue, with the id it closes; taken by closing.
    place: Option<(OwnedPermit<Message>, Arc<str>)>,
    /// The other side's id, if it stands for this forward among the live ones.
    peer: Option<PeerForward>,
    /// What to say if nobody finishes it.
    abandoned: &'static str,
}

impl Entry {
    /// The forward's id.
    #[must_use]
    pub fn forward(&self) -> &str {
        &self.opening.forward
    }

    /// Notes for the closing record what the target's name resolved to, and which of these are not permitted.
    pub fn resolved(&mut self, resolved: &[IpAddr], refused: &[IpAddr]) {
        self.opening.resolved = resolved.to_vec();
        self.opening.refused = refused.to_vec();
    }

    /// Notes for the closing record which replica serves the forward, and under which id.
    pub fn served_by(&mut self, replica: Option<ReplicaId>, peer_forward: Option<String>) {
        if replica.is_some() {
            self.opening.replica = replica;
        }
        if peer_forward.is_some() {
            self.opening.peer_forward = peer_forward;
        }
    }

    /// Notes for the closing record that bytes can flow from now on, and to which address.
    pub fn established(&mut self, dialled: Option<SocketAddr>) {
        self.established = true;
        self.dialled = dialled;
    }

    /// The bytes carried so far, to be added to.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Records the end. Neither waits nor fails: the place in the queue was reserved by the opening.
    pub fn finish(mut self, ending: Ending) {
        self.close(Some(ending));
    }

    fn close(&mut self, ending: Option<Ending>) {
        let Some((place, forward)) = self.place.take() else { return };
        let mut record = self.opening.record(self.shared.side, ABANDONED);
        record.dialled = self.dialled.map(|address| address.to_string());
        record.duration_ms = Some(milliseconds(self.begun.elapsed()));
        match ending {
            Some(Ending::Denied { reason, detail }) => {
                record.event = DENIED;
                record.reason = text(reason);
                record.detail = text(&detail);
            }
            Some(Ending::Failed { reason, detail }) => {
                record.event = FAILED;
                record.reason = text(reason);
                record.detail = text(&detail);
            }
            Some(Ending::Ended { reason, to_target, from_target, detail }) => {
                record.event = ENDED;
                record.reason = text(reason);
                record.detail = text(&detail);
                record.to_target = Some(to_target);
                record.from_target = Some(from_target);
            }
            None => {
                record.reason = text(self.abandoned);
                if self.established {
                    record.to_target = Some(self.counters.to_target());
                    record.from_target = Some(self.counters.from_target());
                }
            }
        }
        place.send(Message::End { forward, line: record.line() });
        // After the ending is in the queue, so that a second opening of the same id comes after it.
        self.shared.release(&self.opening.forward, self.peer.take());
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.close(None);
    }
}

/// What an [`Event`] tells. Forwards and the trail itself have events of their own, which only this module writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `link.up`: an agent and the gateway are linked.
    LinkUp,
    /// `link.down`: a link has ended.
    LinkDown,
    /// `auth.accepted`: a peer has proved who it is.
    AuthAccepted,
    /// `auth.refused`: a peer was not let in.
    AuthRefused,
    /// `peer.violation`: a peer asked for something that it never may.
    PeerViolation,
    /// `registry.reloaded`: a new state of the registry is in force.
    RegistryReloaded,
    /// `registry.rejected`: a new state of the registry has faults, and the last good one stays in force.
    RegistryRejected,
}

impl Kind {
    /// The name of the event in records.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LinkUp => "link.up",
            Self::LinkDown => "link.down",
            Self::AuthAccepted => "auth.accepted",
            Self::AuthRefused => "auth.refused",
            Self::PeerViolation => "peer.violation",
            Self::RegistryReloaded => "registry.reloaded",
            Self::RegistryRejected => "registry.rejected",
        }
    }
}

/// An event that is not a forward's opening or end, to be filled in and given to [`Trail::note`] or [`Trail::stranger`].
/// Texts may come from a peer: they are bounded here.
#[derive(Debug, Clone)]
pub struct Event(Record);

impl Event {
    /// An event without particulars.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self(Record { event: kind.as_str(), ..Record::default() })
    }

    /// The forward it belongs to.
    #[must_use]
    pub fn forward(mut self, forward: impl fmt::Display) -> Self {
        self.0.forward = text(forward);
        self
    }

    /// The organisation concerned.
    #[must_use]
    pub fn organisation(mut self, organisation: impl fmt::Display) -> Self {
        self.0.organisation = text(organisation);
        self
    }

    /// The agent concerned.
    #[must_use]
    pub fn agent(mut self, agent: impl fmt::Display) -> Self {
        self.0.agent = text(agent);
        self
    }

    /// The replica concerned.
    #[must_use]
    pub fn replica(mut self, replica: impl fmt::Display) -> Self {
        self.0.replica = text(replica);
        self
    }

    /// The principal concerned.
    #[must_use]
    pub fn principal(mut self, principal: impl fmt::Display) -> Self {
        self.0.principal = text(principal);
        self
    }

    /// The key that was shown.
    #[must_use]
    pub fn key(mut self, key: impl fmt::Display) -> Self {
        self.0.key = text(key);
        self
    }

    /// The peer's address.
    #[must_use]
    pub fn client(mut self, client: impl fmt::Display) -> Self {
        self.0.client = text(client);
        self
    }

    /// The kind of door.
    #[must_use]
    pub fn door(mut self, door: &'static str) -> Self {
        self.0.door = text(door);
        self
    }

    /// The target asked for.
    #[must_use]
    pub fn target(mut self, target: impl fmt::Display) -> Self {
        self.0.target = text(target);
        self
    }

    /// How long what has ended had lasted.
    #[must_use]
    pub fn duration(mut self, duration: Duration) -> Self {
        self.0.duration_ms = Some(milliseconds(duration));
        self
    }

    /// Why, in one of a fixed set of words in snake case.
    #[must_use]
    pub fn reason(mut self, reason: impl fmt::Display) -> Self {
        self.0.reason = text(reason);
        self
    }

    /// More about it, for the operator. Never a secret.
    #[must_use]
    pub fn detail(mut self, detail: impl fmt::Display) -> Self {
        self.0.detail = text(detail);
        self
    }

    fn stamped(mut self, side: Side) -> Record {
        self.0.side = side.as_str();
        self.0.time = now();
        self.0
    }
}

/// One line of the trail. Field names and order are what readers of trails rely on. Read back, it yields the particulars
/// of a forward; time, event and side are then the reader's own.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Record {
    #[serde(skip_deserializing)]
    time: String,
    #[serde(skip_deserializing)]
    event: &'static str,
    #[serde(skip_deserializing)]
    side: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    forward: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_forward: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    organisation: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replica: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    principal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    asserted_by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    door: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    resolved: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    refused: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dialled: Option<String>,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    to_target: Option<u64>,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    from_target: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    /// `auth.refused_more`: how many of each reason.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", skip_deserializing)]
    counts: BTreeMap<&'static str, u64>,
    /// `trail.started`: what writes.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    version: Option<&'static str>,
    /// `trail.started`: which process.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pid: Option<u32>,
    /// `trail.recovered`: how many forwards were closed. `trail.stopped`: how many were not.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    forwards: Option<u64>,
    /// `trail.recovered`: where an unfinished last line begins, in bytes from the file's beginning.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    torn_at: Option<u64>,
    /// `trail.recovered`: lines since the last start that are no records.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    unreadable: Option<u64>,
    /// `trail.recovered`: where the first of these begins.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    unreadable_at: Option<u64>,
    /// `trail.resumed`: records that were not accepted while the sink failed.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    lost: Option<u64>,
}

impl Record {
    /// A record of the trail about itself.
    fn own(side: Side, event: &'static str) -> Self {
        Self { time: now(), event, side: side.as_str(), ..Self::default() }
    }

    /// The line, with its newline.
    fn line(&self) -> Vec<u8> {
        // Strings, numbers and maps with string keys always serialise.
        let mut line = serde_json::to_vec(self).expect("a record always serialises");
        line.push(b'\n');
        line
    }
}

impl Opening {
    fn record(&self, side: Side, event: &'static str) -> Record {
        Record {
            forward: text(&self.forward),
            peer_forward: self.peer_forward.as_deref().and_then(text),
            organisation: self.organisation.as_ref().and_then(text),
            agent: self.agent.as_ref().and_then(text),
            replica: self.replica.as_ref().and_then(text),
            principal: self.principal.as_ref().and_then(text),
            asserted_by: self.asserted_by.as_deref().and_then(text),
            key: self.key.as_ref().and_then(text),
            client: self.client.as_deref().and_then(text),
            door: self.door.and_then(text),
            target: text(&self.target),
            rule: self.rule.as_deref().and_then(text),
            resolved: self.resolved.iter().take(ADDRESSES_PER_NAME).copied().collect(),
            refused: self.refused.iter().take(ADDRESSES_PER_NAME).copied().collect(),
            ..Record::own(side, event)
        }
    }
}

/// What handles, entries, the writer and its watcher share.
#[derive(Debug)]
struct Shared {
    side: Side,
    live: Mutex<Live>,
    /// Told whenever a forward has ended.
    ended: Notify,
    strangers: Mutex<Strangers>,
    failed: watch::Sender<Option<Instant>>,
    /// Since when a write has been under way.
    writing: Mutex<Option<Instant>>,
    /// Fires when the writer has ended.
    over: CancellationToken,
}

/// The forwards that have an [`Entry`].
#[derive(Debug, Default)]
struct Live {
    forwards: HashSet<Arc<str>>,
    peers: HashSet<PeerForward>,
}

/// The other side's id of a forward. It is unique within an organisation only, so that none can use up another's ids.
type PeerForward = (Option<OrganisationId>, String);

impl Shared {
    fn admit(&self, opening: &Opening) -> Result<(Arc<str>, Option<PeerForward>), TrailError> {
        let fits = |id: &str| !id.is_empty() && id.len() <= FORWARD_ID_MAX && !id.chars().any(unsafe_to_show);
        if !fits(&opening.forward) || !opening.peer_forward.as_deref().is_none_or(fits) {
            return Err(TrailError::Id);
        }
        let mut live = self.live();
        let peer = opening.peer_forward.clone().map(|forward| (opening.organisation.clone(), forward));
        if live.forwards.contains(opening.forward.as_str()) || peer.as_ref().is_some_and(|id| live.peers.contains(id)) {
            return Err(TrailError::Duplicate);
        }
        let forward: Arc<str> = opening.forward.as_str().into();
        live.forwards.insert(Arc::clone(&forward));
        live.peers.extend(peer.clone());
        Ok((forward, peer))
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

    async fn accepted(&self, answered: oneshot::Receiver<Result<(), Arc<io::Error>>>) -> Result<(), TrailError> {
        match tokio::time::timeout(TRAIL_PATIENCE, answered).await {
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

/// What unauthenticated peers may still cause in this period, and what they have caused beyond it.
#[derive(Debug, Default)]
struct Strangers {
    since: Option<Instant>,
    written: u32,
    counts: BTreeMap<&'static str, u64>,
}

impl Strangers {
    /// Whether one more record is within the budget.
    fn admit(&mut self, now: Instant) -> bool {
        // While there are counts to be written, the writer ends the period.
        let over = self.since.is_none_or(|since| now.saturating_duration_since(since) >= STRANGER_PERIOD);
        if over && self.counts.is_empty() {
            self.since = Some(now);
            self.written = 0;
        }
        let within = self.written < STRANGER_RECORDS;
        self.written = self.written.saturating_add(1);
        within
    }

    fn count(&mut self, reason: &'static str, number: u64) {
        *self.counts.entry(reason).or_default() += number;
    }

    /// What to write as a sum, if the period is over or `at_once`; begins the next period.
    fn due(&mut self, now: Instant, at_once: bool) -> Option<(BTreeMap<&'static str, u64>, Duration)> {
        let lasted = self.since.map_or(STRANGER_PERIOD, |since| now.saturating_duration_since(since));
        if self.counts.is_empty() || !(at_once || lasted >= STRANGER_PERIOD) {
            return None;
        }
        self.since = Some(now);
        self.written = 0;
        Some((std::mem::take(&mut self.counts), lasted))
    }
}

/// Looks after the writer from outside, for as long as it runs: it cannot tell that it hangs, and has no clock to wake by.
async fn watch_over(shared: Arc<Shared>, queue: mpsc::WeakSender<Message>) {
    let mut every = tokio::time::interval(TRAIL_RETRY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while shared.over.run_until_cancelled(every.tick()).await.is_some() {
        shared.judge_write();
        let needed = shared.failed.borrow().is_some() || !shared.strangers().counts.is_empty();
        if let Some(queue) = queue.upgrade().filter(|_| needed) {
            // A full queue means that the writer has work, and so will look by itself.
            let _ = queue.try_send(Message::Tick);
        }
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

fn now() -> String {
    format!("{:.3}", jiff::Timestamp::now())
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A text for a record: at most [`TRAIL_TEXT_MAX`] bytes, nothing in it that acts on a terminal and that JSON would let
/// pass, and absent if empty.
fn text(value: impl fmt::Display) -> Option<String> {
    let mut bounded = Bounded(String::new());
    // An error only says that the bound was reached.
    let _ = fmt::write(&mut bounded, format_args!("{value}"));
    (!bounded.0.is_empty()).then_some(bounded.0)
}

/// Takes text up to the bound, so that a longer one is never held.
struct Bounded(String);

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let character = if unsafe_to_show(character) { char::REPLACEMENT_CHARACTER } else { character };
            if self.0.len() + character.len_utf8() > TRAIL_TEXT_MAX {
                return Err(fmt::Error);
            }
            self.0.push(character);
        }
        Ok(())
    }
}

/// Characters that JSON does not escape and that change how a terminal shows what follows: DEL, the C1 controls, and
/// those that turn the direction of text.
fn unsafe_to_show(character: char) -> bool {
    matches!(character, '\u{7f}'..='\u{9f}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

const OPEN: &str = "forward.open";
const DENIED: &str = "forward.denied";
const FAILED: &str = "forward.failed";
const ABANDONED: &str = "forward.abandoned";
const ENDED: &str = "forward.ended";
const STRANGERS: &str = "auth.refused_more";
const STARTED: &str = "trail.started";
const STOPPED: &str = "trail.stopped";
const RECOVERED: &str = "trail.recovered";
const RESUMED: &str = "trail.resumed";

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
    use std::path::Path;
    use std::sync::Condvar;

    use serde_json::Value;

    use super::writer::Output;
    use super::*;
    use crate::chain::Chain;

    #[tokio::test]
    async fn nothing_opens_while_the_sink_fails() {
        let (trail, tape, tasks) = tape_trail().await;
        tape.set(|state| state.room = Some(0));
        let error = trail.open(opening("f1")).await.expect_err("must be refused");
        assert!(matches!(error, TrailError::Write(_)), "{error:?}");
        assert!(Chain(&error).to_string().contains("no room on this tape"), "{}", Chain(&error));
        assert!(matches!(trail.deny(opening("f2"), "no_rule", "").await, Err(TrailError::Write(_))));
        assert!(matches!(trail.note(Event::new(Kind::LinkUp)).await, Err(TrailError::Write(_))));
        assert!(trail.failed().borrow().is_some());
        assert_eq!(trail.live(), 0, "a refused opening must not stay live");

        tape.set(|state| state.room = None);
        trail.open(opening("f1")).await.expect("works again").finish(Counters::default().ended("closed"));
        assert!(trail.failed().borrow().is_none());
        stop(trail, tasks).await.expect("closes");
        let records = tape.records();
        assert_eq!(
            events(&records),
            ["trail.started", "trail.resumed", "forward.open", "forward.ended", "trail.stopped"]
        );
        assert_eq!(records[1]["lost"], 3);
        assert_eq!(records[4]["forwards"], 0);
    }

    #[tokio::test]
    async fn a_full_device_refuses() {
        let tasks = Tasks::new();
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let error = Trail::begin(Side::Agent, &tasks, || Ok((writer::stream(full), vec![b"{}\n".to_vec()]))).await;
        assert!(matches!(error, Err(StartError::Write(_))), "{error:?}");
        assert!(tasks.drain(TRAIL_PATIENCE).await);
    }

    #[tokio::test]
    async fn what_was_written_of_a_line_is_cut_off_again() {
        let (trail, tape, tasks) = tape_trail().await;
        let entry = trail.open(opening("f1")).await.expect("opens");
        for room in [1, 7, 90] {
            tape.set(|state| state.room = Some(room));
            assert!(matches!(trail.open(opening("f2")).await, Err(TrailError::Write(_))));
            assert_eq!(events(&tape.records()), ["trail.started", "forward.open"], "{room}");
        }
        tape.set(|state| state.room = Some(10));
        entry.finish(Counters::default().ended("closed"));
        tape.set(|state| state.room = None);
        stop(trail, tasks).await.expect("closes");
        assert_eq!(
            events(&tape.records()),
            ["trail.started", "forward.open", "trail.resumed", "forward.ended", "trail.stopped"]
        );
    }

    #[tokio::test]
    async fn what_a_stream_has_of_a_line_is_completed_first() {
        let (trail, tape, tasks) = tape_trail().await;
        tape.set(|state| {
            state.retracts = false;
            state.room = Some(40);
        });
        let error = trail.open(opening("f1")).await;
        assert!(matches!(error, Err(TrailError::Write(_))), "{error:?}");
        // The rest of the line is owed in several steps.
        for room in [1, 2, 3] {
            tape.set(|state| state.room = Some(room));
            assert!(matches!(trail.note(Event::new(Kind::LinkUp)).await, Err(TrailError::Write(_))));
        }
        tape.set(|state| state.room = None);
        trail.note(Event::new(Kind::LinkDown)).await.expect("works again");
        stop(trail, tasks).await.expect("closes");
        let records = tape.records();
        assert_eq!(
            events(&records),
            ["trail.started", "forward.open", "trail.resumed", "forward.abandoned", "link.down", "trail.stopped"]
        );
        assert_eq!(records[3]["forward"], "f1");
        assert_eq!(records[3]["reason"], "trail_failed");
    }

    #[tokio::test]
    async fn endings_wait_for_the_sink_in_their_order() {
        let (trail, tape, tasks) = tape_trail().await;
        let mut entries = Vec::new();
        for number in 0..50 {
            entries.push(trail.open(opening(&format!("f{number}"))).await.expect("opens"));
        }
        tape.set(|state| state.room = Some(0));
        for entry in entries {
            entry.finish(Counters::default().ended("closed"));
        }
        assert!(matches!(trail.open(opening("late")).await, Err(TrailError::Write(_))));
        assert_eq!(tape.records().len(), 51);
        tape.set(|state| state.room = None);
        // Nobody writes: the trail finds out by itself.
        let mut failed = trail.failed();
        within(failed.wait_for(Option::is_none)).await.expect("the trail lives");
        let records = tape.records();
        assert_eq!(records[51]["event"], "trail.resumed");
        let ended: Vec<_> = records[52..].iter().map(|record| record["forward"].as_str().unwrap_or("")).collect();
        assert_eq!(ended, (0..50).map(|number| format!("f{number}")).collect::<Vec<_>>());
        stop(trail, tasks).await.expect("closes");
    }

    #[tokio::test]
    async fn a_write_that_hangs_is_a_failure() {
        let (trail, tape, tasks) = tape_trail().await;
        tape.set(|state| state.hangs = true);
        let mut failed = trail.failed();
        let (opened, since) =
            tokio::join!(trail.open(opening("f1")), async { *within(failed.wait_for(Option::is_some)).await.unwrap() });
        assert!(matches!(opened, Err(TrailError::Slow)), "{opened:?}");
        assert!(since.is_some());
        tape.set(|state| state.hangs = false);
        within(failed.wait_for(Option::is_none)).await.expect("the trail lives");
        stop(trail, tasks).await.expect("closes");
        assert_eq!(events(&tape.records()), ["trail.started", "forward.open", "forward.abandoned", "trail.stopped"]);
    }

    #[tokio::test]
    async fn a_closed_pipe_is_a_failure() {
        let tasks = Tasks::new();
        let (reader, pipe) = io::pipe().expect("a pipe");
        let file = fs::File::from(OwnedFd::from(pipe));
        let trail = Trail::begin(Side::Agent, &tasks, || Ok((writer::stream(file), Vec::new()))).await.expect("starts");
        let entry = trail.open(opening("f1")).await.expect("opens");
        let mut line = String::new();
        let mut reader = BufReader::new(reader);
        reader.read_line(&mut line).expect("a line is there already");
        assert!(line.contains("forward.open"), "{line}");
        drop(reader);
        assert!(matches!(trail.open(opening("f2")).await, Err(TrailError::Write(_))));
        drop(entry);
        assert!(matches!(stop(trail, tasks).await, Err(TrailError::Write(_))));
    }

    #[tokio::test]
    async fn live_duplicates_are_refused() {
        let (trail, tape, tasks) = tape_trail().await;
        let with_peer = |forward: &str, organisation: &str| Opening {
            peer_forward: Some("p".to_owned()),
            organisation: organisation.parse().ok(),
            ..opening(forward)
        };
        let entry = trail.open(with_peer("f1", "acme")).await.expect("opens");
        assert!(matches!(trail.open(opening("f1")).await, Err(TrailError::Duplicate)));
        assert!(matches!(trail.deny(opening("f1"), "no_rule", "").await, Err(TrailError::Duplicate)));
        assert!(matches!(trail.open(with_peer("f2", "acme")).await, Err(TrailError::Duplicate)));
        drop(trail.open(with_peer("f2", "other")).await.expect("another organisation's ids are its own"));
        for id in ["", "x\u{9b}", "y".repeat(FORWARD_ID_MAX + 1).as_str()] {
            assert!(matches!(trail.open(opening(id)).await, Err(TrailError::Id)), "{id:?}");
        }
        drop(entry);
        drop(trail.open(with_peer("f1", "acme")).await.expect("free again"));
        stop(trail, tasks).await.expect("closes");
        assert_eq!(tape.records().len(), 2 + 3 * 2);
    }

    #[tokio::test]
    async fn a_cancelled_opening_leaves_no_open_forward() {
        let (trail, tape, tasks) = tape_trail().await;
        tape.set(|state| state.hangs = true);
        for number in 0..10 {
            let mut open = Box::pin(trail.open(opening(&format!("f{number}"))));
            // Polled once: the record is queued.
            assert!(
                std::future::poll_fn(|context| std::task::Poll::Ready(open.as_mut().poll(context))).await.is_pending()
            );
        }
        assert_eq!(trail.live(), 0);
        tape.set(|state| state.hangs = false);
        stop(trail, tasks).await.expect("closes");
        let records = tape.records();
        for number in 0..10 {
            let forward = format!("f{number}");
            let own: Vec<_> = records.iter().filter(|record| record["forward"] == forward.as_str()).collect();
            assert_eq!(own.len(), 2, "{forward}");
            assert_eq!((&own[0]["event"], &own[1]["event"]), (&OPEN.into(), &ABANDONED.into()));
            assert_eq!(own[1]["reason"], "cancelled");
        }
        assert_eq!(records.last().expect("a record")["forwards"], 0);
    }

    #[tokio::test]
    async fn a_refused_opening_takes_its_ending_with_it() {
        let (trail, tape, tasks) = tape_trail().await;
        tape.set(|state| state.hangs = true);
        // Two records in two writes: while the first hangs, an opening and its ending get into the second together.
        let first = trail.note(Event::new(Kind::LinkUp));
        let second = async {
            within(async {
                while lock(&trail.shared.writing).is_none() {
                    tokio::task::yield_now().await;
                }
            })
            .await;
            let mut open = Box::pin(trail.open(opening("f1")));
            assert!(
                std::future::poll_fn(|context| std::task::Poll::Ready(open.as_mut().poll(context))).await.is_pending()
            );
            drop(open);
            tape.set(|state| {
                state.room = Some(0);
                state.hangs = false;
            });
        };
        let (first, ()) = tokio::join!(first, second);
        assert!(matches!(first, Err(TrailError::Write(_))), "{first:?}");
        assert!(trail.note(Event::new(Kind::LinkDown)).await.is_err());
        tape.set(|state| state.room = None);
        stop(trail, tasks).await.expect("closes");
        assert_eq!(events(&tape.records()), ["trail.started", "trail.resumed", "trail.stopped"]);
    }

    #[tokio::test]
    async fn endings_are_told_apart() {
        let (trail, tape, tasks) = tape_trail().await;
        trail.deny(opening("f0"), "no_rule", "no rule names it").await.expect("recorded");
        let entry = trail.open(opening("f1")).await.expect("opens");
        entry.finish(Ending::Denied { reason: "agent_denied", detail: String::new() });
        let entry = trail.open(opening("f2")).await.expect("opens");
        entry.finish(Ending::Failed { reason: "connect", detail: "connection refused".to_owned() });
        drop(trail.open(opening("f3")).await.expect("opens"));
        for (forward, drops) in [("f4", true), ("f5", false)] {
            let mut entry = trail.open(opening(forward)).await.expect("opens");
            entry.resolved(&[[10, 0, 0, 1].into(), [127, 0, 0, 1].into()], &[[127, 0, 0, 1].into()]);
            entry.served_by("r1".parse().ok(), Some("peer".to_owned()));
            entry.established(Some(([10, 0, 0, 1], 5432).into()));
            let counters = entry.counters();
            counters.add_to_target(3);
            counters.add_from_target(4);
            match drops {
                true => drop(entry),
                false => entry.finish(counters.ended("client_closed")),
            }
        }
        stop(trail, tasks).await.expect("closes");
        let records = tape.records();
        let closing: Vec<_> = records
            .iter()
            .filter(|record| record["event"] != OPEN && !record["forward"].is_null())
            .map(|record| {
                let field = |name: &str| record[name].as_str().unwrap_or("-").to_owned();
                (field("forward"), field("event"), field("reason"), field("detail"), record["to_target"].as_u64())
            })
            .collect();
        let expected = [
            ("f0", "forward.denied", "no_rule", "no rule names it", None),
            ("f1", "forward.denied", "agent_denied", "-", None),
            ("f2", "forward.failed", "connect", "connection refused", None),
            ("f3", "forward.abandoned", "dropped", "-", None),
            ("f4", "forward.abandoned", "dropped", "-", Some(3)),
            ("f5", "forward.ended", "client_closed", "-", Some(3)),
        ]
        .map(|(f, e, r, d, n)| (f.to_owned(), e.to_owned(), r.to_owned(), d.to_owned(), n));
        assert_eq!(closing, expected);
        let last = &records[records.len() - 2];
        assert_eq!(last["dialled"], "10.0.0.1:5432");
        assert_eq!(last["resolved"], serde_json::json!(["10.0.0.1", "127.0.0.1"]));
        assert_eq!(last["refused"], serde_json::json!(["127.0.0.1"]));
        assert_eq!((&last["replica"], &last["peer_forward"]), (&"r1".into(), &"peer".into()));
        assert!(last["duration_ms"].is_u64());
    }

    #[tokio::test]
    async fn a_thousand_openings_at_once_are_all_written() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("trail");
        let tasks = Tasks::new();
        let trail = Trail::start(Sink::File(path.clone()), Side::Gateway, &tasks).await.expect("starts");
        assert_eq!(fs::metadata(&path).expect("made").permissions().mode() & 0o777, 0o600);
        let opens = Tasks::new();
        let handles: Vec<_> = (0..1000)
            .map(|number| {
                let (trail, path) = (trail.clone(), path.clone());
                opens.spawn(async move {
                    let forward = format!("f{number}");
                    let entry = trail.open(opening(&forward)).await.expect("opens");
                    if number % 100 == 0 {
                        let text = fs::read_to_string(path).expect("readable");
                        assert!(text.contains(&format!("\"forward\":\"{forward}\"")), "accepted means written");
                    }
                    entry.finish(Counters::default().ended("closed"));
                })
            })
            .collect();
        for handle in handles {
            handle.await.expect("no panic");
        }
        stop(trail, tasks).await.expect("closes");
        let records = read(&path);
        assert_eq!(records.len(), 2_002);
        let count = |event: &str| records.iter().filter(|record| record["event"] == event).count();
        assert_eq!((count(OPEN), count(ENDED)), (1000, 1000));
    }

    #[tokio::test]
    async fn a_flood_of_strangers_is_summed_up() {
        let (trail, tape, tasks) = tape_trail().await;
        for number in 0..10_000 {
            let reason = if number % 4 == 0 { "unknown_key" } else { "identification" };
            trail.stranger(Event::new(Kind::AuthRefused).client("192.0.2.1:1"), reason);
        }
        stop(trail, tasks).await.expect("closes");
        let records = tape.records();
        let single = records.iter().filter(|record| record["event"] == "auth.refused").count() as u64;
        assert!(single <= u64::from(STRANGER_RECORDS), "{single}");
        let sums: Vec<_> = records.iter().filter(|record| record["event"] == STRANGERS).collect();
        assert_eq!(sums.len(), 1);
        let total: u64 = sums[0]["counts"].as_object().expect("counts").values().filter_map(Value::as_u64).sum();
        assert_eq!(single + total, 10_000);
        assert!(sums[0]["counts"]["unknown_key"].is_u64() && sums[0]["counts"]["identification"].is_u64());
    }

    #[tokio::test]
    async fn strangers_that_cannot_be_written_are_counted() {
        let (trail, tape, tasks) = tape_trail().await;
        tape.set(|state| state.room = Some(0));
        for _ in 0..10 {
            trail.stranger(Event::new(Kind::AuthRefused), "unknown_key");
        }
        // In the queue behind them, so that the writer has tried them.
        assert!(trail.note(Event::new(Kind::LinkUp)).await.is_err());
        tape.set(|state| state.room = None);
        stop(trail, tasks).await.expect("closes");
        let records = tape.records();
        let sum = records.iter().find(|record| record["event"] == STRANGERS).expect("a sum");
        assert_eq!(sum["counts"]["unknown_key"], 10);
    }

    #[test]
    fn the_strangers_budget_begins_anew_with_each_period() {
        let mut strangers = Strangers::default();
        let begin = Instant::now();
        let admitted = (0..2 * STRANGER_RECORDS).filter(|_| strangers.admit(begin)).count();
        assert_eq!(admitted, STRANGER_RECORDS as usize);
        strangers.count("a", 2);
        assert_eq!(strangers.due(begin, false), None);
        let later = begin + STRANGER_PERIOD;
        assert!(!strangers.admit(later), "the sum comes first");
        assert_eq!(strangers.due(later, false), Some(([("a", 2)].into(), STRANGER_PERIOD)));
        assert!(strangers.admit(later));
        assert!(strangers.admit(later + STRANGER_PERIOD));
    }

    #[tokio::test]
    async fn a_crash_is_made_good_at_the_next_start() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("trail");
        let tasks = Tasks::new();
        let trail = Trail::start(Sink::File(path.clone()), Side::Agent, &tasks).await.expect("starts");
        let mut lost = opening("lost");
        lost.organisation = "acme".parse().ok();
        lost.rule = Some("orders-db".to_owned());
        lost.resolved = vec![[10, 0, 0, 1].into()];
        let lost = trail.open(lost).await.expect("opens");
        trail.open(opening("ended")).await.expect("opens").finish(Counters::default().ended("closed"));
        trail.note(Event::new(Kind::LinkUp)).await.expect("recorded");
        // What a crash would have left: a copy, with half a line behind it.
        let crashed = directory.path().join("crashed");
        let mut text = fs::read_to_string(&path).expect("readable");
        text.push_str("not a record\n");
        let unreadable_at = text.len() - 13;
        text.push_str(&format!("{{\"{}\":0}}\n", "x".repeat(crate::limits::TRAIL_RECORD_MAX * 2)));
        let torn_at = text.len();
        text.push_str("{\"time\":\"2026-");
        private(&crashed, &text);
        drop(lost);
        stop(trail, tasks).await.expect("closes");

        let before = text.lines().count();
        for start in 0..2 {
            let tasks = Tasks::new();
            let trail = Trail::start(Sink::File(crashed.clone()), Side::Agent, &tasks).await.expect("starts");
            stop(trail, tasks).await.expect("closes");
            let after = fs::read_to_string(&crashed).expect("readable");
            assert!(after.starts_with(&format!("{text}\n")), "what was there stays as it was");
            let added: Vec<Value> = after.lines().skip(before).map(parse).collect();
            let once = ["forward.abandoned", "trail.recovered", "trail.started", "trail.stopped"];
            if start == 1 {
                assert_eq!(events(&added), [&once[..], &["trail.started", "trail.stopped"]].concat());
                continue;
            }
            assert_eq!(events(&added), once);
            assert_eq!((&added[0]["forward"], &added[0]["reason"]), (&"lost".into(), &"writer_ended".into()));
            assert_eq!((&added[0]["organisation"], &added[0]["rule"]), (&"acme".into(), &"orders-db".into()));
            assert_eq!(added[0]["resolved"], serde_json::json!(["10.0.0.1"]));
            assert_eq!(added[1]["forwards"], 1);
            assert_eq!(added[1]["torn_at"], torn_at);
            assert_eq!((&added[1]["unreadable"], &added[1]["unreadable_at"]), (&2.into(), &unreadable_at.into()));
        }
    }

    #[tokio::test]
    async fn recovery_closes_each_opening_once_in_their_order() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("trail");
        let line = |event: &str, forward: &str, target: &str| {
            format!("{{\"time\":\"t\",\"event\":\"{event}\",\"forward\":\"{forward}\",\"target\":\"{target}\"}}\n")
        };
        let text = [
            line(OPEN, "b", "1"),
            line(OPEN, "a", "2"),
            line(OPEN, "c", "3"),
            line(OPEN, "d", "4"),
            line(OPEN, "e", "5"),
            line(OPEN, "f", "6"),
            line(DENIED, "c", "3"),
            line(FAILED, "d", "4"),
            line(ENDED, "e", "5"),
            line(ABANDONED, "f", "6"),
            line("forward.attempt", "a", "2"),
            // Opened again without having been closed.
            line(OPEN, "a", "7"),
        ]
        .concat();
        private(&path, &text);
        let tasks = Tasks::new();
        let trail = Trail::start(Sink::File(path.clone()), Side::Agent, &tasks).await.expect("starts");
        stop(trail, tasks).await.expect("closes");
        let records = read(&path);
        let closed: Vec<_> = records[12..15].iter().map(|record| record["target"].as_str().unwrap_or("-")).collect();
        assert_eq!(closed, ["1", "2", "7"]);
        assert_eq!(
            events(&records[12..]),
            [ABANDONED, ABANDONED, ABANDONED, "trail.recovered", "trail.started", "trail.stopped"]
        );
        assert!(records[15]["torn_at"].is_null() && records[15]["unreadable"].is_null());
    }

    #[tokio::test]
    async fn files_that_will_not_do_are_refused_untouched() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("trail");
        let link = directory.path().join("link");
        symlink(&path, &link).expect("a link");
        let tasks = Tasks::new();
        let start = |path: &Path| {
            let (path, tasks) = (path.to_owned(), tasks.clone());
            async move { Trail::start(Sink::File(path), Side::Agent, &tasks).await.map(drop).expect_err("must be refused") }
        };

        private(&path, "{\"event\"");
        for mode in [0o640, 0o604, 0o620, 0o644] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            let error = start(&path).await.to_string();
            assert!(error.contains("chmod 600") && error.contains(&path.display().to_string()), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        assert!(matches!(start(&link).await, StartError::Open { .. }));
        assert!(matches!(start(directory.path()).await, StartError::Open { .. }));
        assert!(matches!(start(Path::new("/dev/null")).await, StartError::NotAFile { .. }));
        assert!(matches!(start(&directory.path().join("no/trail")).await, StartError::Open { .. }));
        assert_eq!(fs::read_to_string(&path).expect("readable"), "{\"event\"");

        let trail = Trail::start(Sink::File(path.clone()), Side::Agent, &tasks).await.expect("starts");
        let error = start(&path).await;
        assert!(matches!(error, StartError::Locked { .. }), "{error:?}");
        stop(trail, tasks.clone()).await.expect("closes");
        let again = Tasks::new();
        let trail = Trail::start(Sink::File(path), Side::Agent, &again).await.expect("the lock ends with the trail");
        stop(trail, again).await.expect("closes");
    }

    #[tokio::test]
    async fn a_removed_file_is_a_failure_and_a_truncated_one_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("trail");
        let tasks = Tasks::new();
        let trail = Trail::start(Sink::File(path.clone()), Side::Agent, &tasks).await.expect("starts");
        let file = fs::OpenOptions::new().write(true).open(&path).expect("opens");
        file.set_len(0).expect("truncates");
        trail.note(Event::new(Kind::LinkUp)).await.expect("recorded");
        assert_eq!(events(&read(&path)), ["link.up"]);
        fs::remove_file(&path).expect("removes");
        assert!(matches!(trail.open(opening("f1")).await, Err(TrailError::Write(_))));
        assert!(stop(trail, tasks).await.is_err());
    }

    #[tokio::test]
    async fn a_closed_trail_refuses_and_late_endings_do_no_harm() {
        let (trail, tape, tasks) = tape_trail().await;
        let entry = trail.open(opening("f1")).await.expect("opens");
        let other = trail.clone();
        // As if the patience of `close` were over: the forward is still live.
        let (answer, answered) = oneshot::channel();
        trail.queue.send(Message::Stop { answer }).await.expect("the writer runs");
        within(answered).await.expect("answered").expect("written");
        assert!(matches!(other.open(opening("f2")).await, Err(TrailError::Closed)));
        assert!(matches!(other.note(Event::new(Kind::LinkUp)).await, Err(TrailError::Closed)));
        other.stranger(Event::new(Kind::AuthRefused), "unknown_key");
        drop(entry);
        assert!(matches!(other.close().await, Err(TrailError::Closed)));
        assert!(tasks.drain(TRAIL_PATIENCE).await);
        let records = tape.records();
        assert_eq!(events(&records), ["trail.started", "forward.open", "trail.stopped"]);
        assert_eq!(records[2]["forwards"], 1);
    }

    #[test]
    fn a_dropped_runtime_still_writes_what_is_queued() {
        let tape = Tape::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let recorder = tape.clone();
        let tasks = Tasks::new();
        runtime.block_on(async {
            let trail =
                Trail::begin(Side::Agent, &tasks, || Ok((Box::new(recorder), Vec::new()))).await.expect("starts");
            let entry = trail.open(opening("f1")).await.expect("opens");
            tasks.spawn(async move {
                let _entry = entry;
                std::future::pending::<()>().await;
            });
        });
        drop(runtime);
        assert_eq!(events(&tape.records()), ["forward.open", "forward.abandoned", "trail.stopped"]);
    }

    #[tokio::test]
    async fn records_have_stable_names_in_a_stable_order() {
        let (trail, tape, tasks) = tape_trail().await;
        let full = Opening {
            forward: "f1".to_owned(),
            peer_forward: Some("p1".to_owned()),
            organisation: "acme".parse().ok(),
            agent: "prod-eu".parse().ok(),
            replica: "r1".parse().ok(),
            principal: "ci".parse().ok(),
            asserted_by: Some("local".to_owned()),
            key: None,
            client: Some("192.0.2.1:1".to_owned()),
            door: Some("ssh"),
            target: "db:5432".to_owned(),
            rule: Some("orders".to_owned()),
            resolved: Vec::new(),
            refused: Vec::new(),
        };
        trail.deny(full, "no_rule", "why").await.expect("recorded");
        stop(trail, tasks).await.expect("closes");
        let text = tape.text();
        let line = text.lines().nth(1).expect("a line");
        let (time, rest) = line.split_at("{\"time\":\"2026-01-01T00:00:00.000Z\",".len());
        assert!(time.ends_with("Z\",") && time.as_bytes()[28] == b'.', "{line}");
        assert_eq!(
            rest,
            "\"event\":\"forward.denied\",\"side\":\"gateway\",\"forward\":\"f1\",\"peer_forward\":\"p1\",\
             \"organisation\":\"acme\",\"agent\":\"prod-eu\",\"replica\":\"r1\",\"principal\":\"ci\",\
             \"asserted_by\":\"local\",\"client\":\"192.0.2.1:1\",\"door\":\"ssh\",\"target\":\"db:5432\",\
             \"rule\":\"orders\",\"reason\":\"no_rule\",\"detail\":\"why\"}"
        );
    }

    #[tokio::test]
    async fn texts_are_bounded_and_cannot_act_on_a_terminal() {
        let (trail, tape, tasks) = tape_trail().await;
        let nasty = format!("\u{1b}[31m\n\u{9b}1A\u{7f}\u{202e}{}", "ä".repeat(10_000));
        let event = Event::new(Kind::PeerViolation).organisation(&nasty).target(&nasty).detail(&nasty).key("");
        trail.note(event).await.expect("recorded");
        let all = Opening {
            asserted_by: Some("\0".repeat(1000)),
            client: Some("\0".repeat(1000)),
            target: "\0".repeat(1000),
            rule: Some("\0".repeat(1000)),
            resolved: vec![[0xffff; 8].into(); 1000],
            refused: vec![[0xffff; 8].into(); 1000],
            ..opening("f1")
        };
        trail.deny(all, &"\0".repeat(1000), &"\0".repeat(1000)).await.expect("recorded");
        stop(trail, tasks).await.expect("closes");
        let text = tape.text();
        assert!(!text.contains(|c: char| c != '\n' && (c.is_control() || unsafe_to_show(c))));
        let records = tape.records();
        for field in ["organisation", "target", "detail"] {
            let length = records[1][field].as_str().expect(field).len();
            assert!((TRAIL_TEXT_MAX - 3..=TRAIL_TEXT_MAX).contains(&length), "{field} {length}");
        }
        assert!(records[1]["key"].is_null());
        assert!(text.lines().all(|line| line.len() < crate::limits::TRAIL_RECORD_MAX));
    }

    async fn tape_trail() -> (Trail, Tape, Tasks) {
        let (tape, tasks) = (Tape::default(), Tasks::new());
        let output = tape.clone();
        let first = vec![Record::own(Side::Gateway, STARTED).line()];
        let trail = Trail::begin(Side::Gateway, &tasks, || Ok((Box::new(output), first))).await.expect("starts");
        (trail, tape, tasks)
    }

    fn opening(forward: &str) -> Opening {
        Opening { forward: forward.to_owned(), target: "db:5432".to_owned(), ..Opening::default() }
    }

    async fn stop(trail: Trail, tasks: Tasks) -> Result<(), TrailError> {
        let result = trail.close().await;
        assert!(tasks.drain(TRAIL_PATIENCE).await, "the writer and its watcher end with the trail");
        result
    }

    async fn within<F: Future>(future: F) -> F::Output {
        tokio::time::timeout(4 * TRAIL_PATIENCE, future).await.expect("in time")
    }

    fn parse(line: &str) -> Value {
        serde_json::from_str(line).unwrap_or_else(|_| panic!("torn: {line:?}"))
    }

    fn events(records: &[Value]) -> Vec<&str> {
        records.iter().map(|record| record["event"].as_str().unwrap_or("-")).collect()
    }

    fn read(path: &Path) -> Vec<Value> {
        let mut text = String::new();
        fs::File::open(path).expect("opens").read_to_string(&mut text).expect("readable");
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(parse).collect()
    }

    fn private(path: &Path, text: &str) {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).expect("made");
        file.write_all(text.as_bytes()).expect("written");
    }

    /// A sink in memory that fails on request.
    #[derive(Clone, Default)]
    struct Tape(Arc<(Mutex<TapeState>, Condvar)>);

    struct TapeState {
        bytes: Vec<u8>,
        /// How many bytes fit before writes fail.
        room: Option<usize>,
        retracts: bool,
        hangs: bool,
    }

    impl Default for TapeState {
        fn default() -> Self {
            Self { bytes: Vec::new(), room: None, retracts: true, hangs: false }
        }
    }

    impl Tape {
        fn set(&self, change: impl FnOnce(&mut TapeState)) {
            change(&mut lock(&self.0.0));
            self.0.1.notify_all();
        }

        fn text(&self) -> String {
            String::from_utf8(lock(&self.0.0).bytes.clone()).expect("UTF-8")
        }

        fn records(&self) -> Vec<Value> {
            let text = self.text();
            assert!(text.is_empty() || text.ends_with('\n'), "torn: {text}");
            text.lines().map(parse).collect()
        }
    }

    impl Output for Tape {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut state = lock(&self.0.0);
            while state.hangs {
                state = self.0.1.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            // Short writes are the rule here.
            let mut count = bytes.len().min(100);
            if let Some(room) = &mut state.room {
                if *room == 0 {
                    return Err(io::Error::other("no room on this tape"));
                }
                count = count.min(*room);
                *room -= count;
            }
            state.bytes.extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn retract(&mut self, count: u64) -> io::Result<()> {
            let mut state = lock(&self.0.0);
            if !state.retracts {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let length = state.bytes.len() - usize::try_from(count).expect("small");
            state.bytes.truncate(length);
            Ok(())
        }

        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}

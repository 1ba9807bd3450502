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

pub mod chain;
pub mod ocsf;
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
use tracing::{error, info};

use crate::identity::{AgentId, Certificate, Credential, Fingerprint, OrganisationId, Principal, ReplicaId};
use crate::limits::{
    ADDRESSES_PER_NAME, FORWARD_ID_MAX, STRANGER_PERIOD, STRANGER_RECORDS, TRAIL_PATIENCE, TRAIL_QUEUE, TRAIL_RETRY,
    TRAIL_TEXT_MAX,
};
use crate::task::Tasks;
use crate::token::TokenId;

use writer::{Message, Prepared};

/// Where a trail is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sink {
    /// A regular file of mode 0600, appended to and locked against other writers; made if it does not exist.
    File(PathBuf),
    /// Standard output.
    Stdout,
}

/// Who writes the trail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The gateway.
    Gateway,
    /// The agent.
    Agent,
    /// The network proxy, which belongs to neither.
    Proxy,
}

impl Side {
    /// The side as records name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Agent => "agent",
            Self::Proxy => "proxy",
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
    /// The certificate of that key, where it was that which counted.
    pub certificate: Option<Certificate>,
    /// The id of the token that this key has signed, where it was that which counted.
    pub token: Option<TokenId>,
    /// The TLS certificate that was shown besides or instead, or that it was missing; absent where none was asked for.
    pub client_certificate: Option<String>,
    /// Where the principal connects from.
    pub client: Option<String>,
    /// Which kind of door was used.
    pub door: Option<&'static str>,
    /// The host and port asked for, as far as it could be read.
    pub target: String,
    /// The rule that allows it.
    pub rule: Option<String>,
    /// What the target's name resolved to.
    pub resolved: Vec<Resolved>,
    /// Those of the resolved addresses that are not permitted.
    pub refused: Vec<Resolved>,
}

/// What a target's name resolved to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Resolved {
    /// An address; the port is the one that was asked for.
    Address(IpAddr),
    /// Where an instance of a service is.
    Instance(SocketAddr),
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
    pub fn resolved(&mut self, resolved: &[Resolved], refused: &[Resolved]) {
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

/// What an [`Event`] tells. The openings and ends of forwards, and the trail itself, have events of their own, which only
/// this module writes.
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
    /// `forward.attempt`: an agent was asked for a forward and could not open it; another may be asked.
    ForwardAttempt,
    /// `registry.reloaded`: a new state of the registry is in force.
    RegistryReloaded,
    /// `registry.rejected`: a new state of the registry has faults, and the last good one stays in force.
    RegistryRejected,
    /// `agent.examined`: an agent was looked at by `caponier doctor`; the detail says from where.
    AgentExamined,
    /// `drain.began`: nothing new is taken on; `counts` says what there is.
    DrainBegan,
    /// `drain.ended`: `counts` says how many forwards ended by themselves, and how many were cut.
    DrainEnded,
    /// `config.reloaded`: the configuration was read again and is in force; the detail says what came and went.
    ConfigReloaded,
    /// `config.rejected`: the configuration was read again and has faults, or cannot be taken over; nothing has changed.
    ConfigRejected,
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
            Self::ForwardAttempt => "forward.attempt",
            Self::RegistryReloaded => "registry.reloaded",
            Self::RegistryRejected => "registry.rejected",
            Self::AgentExamined => "agent.examined",
            Self::DrainBegan => "drain.began",
            Self::DrainEnded => "drain.ended",
            Self::ConfigReloaded => "config.reloaded",
            Self::ConfigRejected => "config.rejected",
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

    /// What was shown: the key, and of a certificate who signed it, and what the CA calls it.
    #[must_use]
    pub fn credential(self, credential: &Credential) -> Self {
        let mut event = self.key(credential.key());
        if let Some(certificate) = credential.certificate() {
            event.0.certified(certificate);
        }
        event
    }

    /// The fingerprint of the TLS certificate that the peer has shown, or `missing` where it was let in without one. Nothing is
    /// said where nobody asks for one.
    #[must_use]
    pub fn client_certificate(mut self, mark: Option<impl fmt::Display>) -> Self {
        self.0.client_certificate = mark.and_then(text);
        self
    }

    /// What carries the SSH session: `ssh`, `tls`, `wss` or `ws`.
    #[must_use]
    pub fn transport(mut self, transport: &'static str) -> Self {
        self.0.transport = text(transport);
        self
    }

    /// The id of the token that was shown.
    #[must_use]
    pub fn token(mut self, id: &TokenId) -> Self {
        self.0.token = text(id);
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

    /// How many there are of something.
    #[must_use]
    pub fn count(mut self, what: &'static str, number: usize) -> Self {
        self.0.counts.insert(what, number as u64);
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
    /// The CA of the key's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<String>,
    /// A text, since readers of JSON commonly lose the last digits of such numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<String>,
    /// The fingerprint of the peer's TLS certificate, or `missing`.
    #[serde(skip_serializing_if = "Option::is_none")]
    client_certificate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    transport: Option<String>,
    /// The id that a token gives itself (`jti`), never the token.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    door: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    resolved: Vec<Resolved>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    refused: Vec<Resolved>,
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
    /// `auth.refused_more`: how many of each reason. `drain.began`, `drain.ended`: how many of what.
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

    fn certified(&mut self, certificate: &Certificate) {
        self.ca = text(certificate.authority().fingerprint());
        self.serial = text(certificate.serial());
        self.key_id = text(certificate.key_id());
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
        let mut record = self.plain_record(side, event);
        if let Some(certificate) = &self.certificate {
            record.certified(certificate);
        }
        record
    }

    fn plain_record(&self, side: Side, event: &'static str) -> Record {
        Record {
            forward: text(&self.forward),
            peer_forward: self.peer_forward.as_deref().and_then(text),
            organisation: self.organisation.as_ref().and_then(text),
            agent: self.agent.as_ref().and_then(text),
            replica: self.replica.as_ref().and_then(text),
            principal: self.principal.as_ref().and_then(text),
            asserted_by: self.asserted_by.as_deref().and_then(text),
            key: self.key.as_ref().and_then(text),
            token: self.token.as_ref().and_then(text),
            client_certificate: self.client_certificate.as_deref().and_then(text),
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
    matches!(character, '\u{7f}'..='\u{9f}' | '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
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
mod tests;

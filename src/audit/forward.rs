//! A forward in the trail: what is known when it is asked for, the entry that stands for it while it is open, and how it
//! came to its end.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::OwnedPermit;
use tokio::time::Instant;

use super::record::{ABANDONED, DENIED, ENDED, FAILED, PROGRESS, Record, milliseconds, text};
use super::writer::Message;
use super::{PeerForward, Shared, Side, lock, tally};
use crate::identity::{AgentId, Certificate, Fingerprint, OrganisationId, Principal, ReplicaId};
use crate::limits::ADDRESSES_PER_NAME;
use crate::metrics;
use crate::token::TokenId;
use crate::trace::Asked;

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
    /// When it was asked for: now, unless somebody says otherwise.
    pub asked: Asked,
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
        metrics::BYTES_TO_TARGET.inc_by(bytes);
    }

    /// Adds bytes carried from the target.
    pub fn add_from_target(&self, bytes: u64) {
        self.from_target.fetch_add(bytes, Ordering::Relaxed);
        metrics::BYTES_FROM_TARGET.inc_by(bytes);
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

/// A forward that the trail holds as open.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) forward: Arc<str>,
    begun: Instant,
    counters: Arc<Counters>,
    state: Mutex<Particulars>,
    _counted: tally::Running,
}

/// What is known of a forward by now.
#[derive(Debug)]
struct Particulars {
    opening: Opening,
    /// Since when bytes can flow.
    established: Option<Instant>,
    dialled: Option<SocketAddr>,
    /// When the trail was told of it the last time.
    told: Instant,
}

impl Running {
    pub(super) fn new(opening: Opening) -> Self {
        let now = Instant::now();
        Self {
            forward: opening.forward.as_str().into(),
            begun: now,
            counters: Arc::default(),
            state: Mutex::new(Particulars { opening, established: None, dialled: None, told: now }),
            _counted: tally::Running::begin(),
        }
    }

    /// Whether the trail should be told again how far it is.
    pub(super) fn is_due(&self, every: Duration) -> bool {
        let state = lock(&self.state);
        state.established.is_some() && state.told.elapsed() >= every
    }

    /// How far it is.
    pub(super) fn progress(&self, side: Side) -> Record {
        let mut state = lock(&self.state);
        state.told = Instant::now();
        let mut record = self.record(&state, side, PROGRESS);
        record.to_target = Some(self.counters.to_target());
        record.from_target = Some(self.counters.from_target());
        record
    }

    fn record(&self, state: &Particulars, side: Side, event: &'static str) -> Record {
        let mut record = state.opening.record(side, event);
        record.dialled = state.dialled.map(|address| address.to_string());
        record.duration_ms = Some(milliseconds(self.begun.elapsed()));
        record
    }
}

/// A forward that the trail holds as open. Dropped unfinished, it is recorded as `forward.abandoned`.
#[derive(Debug)]
#[must_use = "dropping an entry records the forward as abandoned"]
pub struct Entry {
    pub(super) shared: Arc<Shared>,
    pub(super) running: Arc<Running>,
    /// The place of the closing record in the queue; taken by closing.
    pub(super) place: Option<OwnedPermit<Message>>,
    /// The other side's id, if it stands for this forward among the live ones.
    pub(super) peer: Option<PeerForward>,
    /// What to say if nobody finishes it.
    pub(super) abandoned: &'static str,
}

impl Entry {
    /// The forward's id.
    #[must_use]
    pub fn forward(&self) -> &str {
        &self.running.forward
    }

    /// Notes for the closing record what the target's name resolved to, and which of these are not permitted.
    pub fn resolved(&mut self, resolved: &[Resolved], refused: &[Resolved]) {
        let mut state = lock(&self.running.state);
        state.opening.resolved = resolved.to_vec();
        state.opening.refused = refused.to_vec();
    }

    /// Notes for the closing record which replica serves the forward, and under which id.
    pub fn served_by(&mut self, replica: Option<ReplicaId>, peer_forward: Option<String>) {
        let mut state = lock(&self.running.state);
        if replica.is_some() {
            state.opening.replica = replica;
        }
        if peer_forward.is_some() {
            state.opening.peer_forward = peer_forward;
        }
    }

    /// Notes for the closing record that bytes can flow from now on, and to which address.
    pub fn established(&mut self, dialled: Option<SocketAddr>) {
        let mut state = lock(&self.running.state);
        state.established = Some(Instant::now());
        metrics::FORWARD_OPEN_SECONDS.observe(metrics::seconds(self.running.begun.elapsed()));
        state.dialled = dialled;
    }

    /// The bytes carried so far, to be added to.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.running.counters)
    }

    /// Records the end. Neither waits nor fails: the place in the queue was reserved by the opening.
    pub fn finish(mut self, ending: Ending) {
        self.close(Some(ending));
    }

    fn close(&mut self, ending: Option<Ending>) {
        let Some(place) = self.place.take() else { return };
        let (mut record, established) = {
            let state = lock(&self.running.state);
            let open_s = state.established.map(|since| metrics::seconds(since.elapsed()));
            let opening = &state.opening;
            let why = tally::ended(self.shared.side, opening, ending.as_ref(), self.abandoned, open_s);
            let opened = state.established.map(|since| opening.asked.until(since));
            tally::told(self.shared.side, opening, why, opening.asked.until(self.running.begun), opened);
            (self.running.record(&state, self.shared.side, ABANDONED), state.established.is_some())
        };
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
                if established {
                    record.to_target = Some(self.running.counters.to_target());
                    record.from_target = Some(self.running.counters.from_target());
                }
            }
        }
        place.send(Message::End { forward: Arc::clone(&self.running.forward), line: record.line() });
        // After the ending is in the queue, so that a second opening of the same id comes after it.
        self.shared.release(&self.running.forward, self.peer.take());
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.close(None);
    }
}

impl Opening {
    pub(super) fn record(&self, side: Side, event: &'static str) -> Record {
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

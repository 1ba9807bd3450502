//! Events that are no forward's opening or end.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;

use super::Side;
use super::chain::TrailId;
use super::changed::Changed;
use super::head::{Anchor, Countersigned, Seal};
use super::record::{Record, milliseconds, now, text};
use crate::identity::Credential;
use crate::reload::Changes;
use crate::token::TokenId;

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
    /// `agent.examined`: an agent was looked at by `caponier doctor`; the detail says from where, and what came of it.
    AgentExamined,
    /// `agent.examination_asked`: the gateway is about to ask an agent over its link.
    ExaminationAsked,
    /// `agent.examination_failed`: it was asked, and gave no report.
    ExaminationFailed,
    /// `drain.began`: nothing new is taken on; `counts` says what there is.
    DrainBegan,
    /// `drain.ended`: `counts` says how many forwards ended by themselves, and how many were cut.
    DrainEnded,
    /// `config.reloaded`: the configuration was read again and is in force; the detail says what came and went.
    ConfigReloaded,
    /// `config.rejected`: the configuration was read again and has faults, or cannot be taken over; nothing has changed.
    ConfigRejected,
    /// `trail.anchored`: what the other side's trail has come to is on record here.
    TrailAnchored,
    /// `trail.countersigned`: the other side has this trail's head on record, and has signed that.
    TrailCountersigned,
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
            Self::ExaminationAsked => "agent.examination_asked",
            Self::ExaminationFailed => "agent.examination_failed",
            Self::DrainBegan => "drain.began",
            Self::DrainEnded => "drain.ended",
            Self::ConfigReloaded => "config.reloaded",
            Self::ConfigRejected => "config.rejected",
            Self::TrailAnchored => "trail.anchored",
            Self::TrailCountersigned => "trail.countersigned",
        }
    }
}

/// An event that is not a forward's opening or end, to be filled in and given to [`Trail::note`] or [`Trail::stranger`].
/// Texts may come from a peer: they are bounded here.
#[derive(Debug, Clone)]
pub struct Event(pub(super) Record);

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

    /// What came, went and changed, by ids.
    #[must_use]
    pub fn changes(mut self, changes: &Changes) -> Self {
        self.0.changes = Changed::new(changes);
        self
    }

    /// What was seen of another trail.
    #[must_use]
    pub fn seen(mut self, trail: &TrailId, anchor: &Anchor) -> Self {
        self.0.peer_trail = text(trail);
        self.0.peer_digest = text(anchor);
        self
    }

    /// Who has signed that a head of this trail was seen, which covers the record `covers`.
    #[must_use]
    pub fn countersigned(mut self, covers: u64, seen: &Countersigned, seal: &Seal) -> Self {
        self.0.covers = Some(covers);
        self.0.digest = text(seen.anchor);
        let signed = i64::try_from(seen.time_ms).ok().and_then(|time| Timestamp::from_millisecond(time).ok());
        self.0.signed = signed.map(|signed| format!("{signed:.3}"));
        self.0.key = text(seal.key);
        self.0.signature = text(&seal.signature);
        self
    }

    /// How many there are of something.
    #[must_use]
    pub fn count(mut self, what: &'static str, number: usize) -> Self {
        self.0.counts.insert(what, number as u64);
        self
    }

    pub(super) fn stamped(mut self, side: Side) -> Record {
        self.0.side = side.as_str();
        self.0.time = now();
        self.0
    }
}

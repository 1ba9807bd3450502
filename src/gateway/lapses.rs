//! Who was linked, and what went wrong last with each agent's links: so that an operator sees at once who is missing, and
//! why. No I/O, no waiting.
//!
//! Promised: it is bounded. Only agents that the registry holds are remembered, of each a few replicas by their proved
//! names, and one failure of those who only claimed to be it.
//!
//! What a connection says before its host key is accepted is a claim that anybody can make. Its failure is kept apart from
//! the replicas', and says that it is a claim: a stranger can be seen here, but cannot hide what befell the agent itself.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;

use super::roster::Peer;
use crate::identity::{AgentName, ReplicaId};
use crate::limits;

/// What is remembered of all agents.
#[derive(Debug, Default)]
pub(super) struct Lapses(Mutex<HashMap<AgentName, Record>>);

/// What is remembered of one agent.
#[derive(Debug, Clone, Default)]
pub(super) struct Record {
    /// Its replicas: in boxes, since the map has room for eleven as soon as there is one, and mostly there is one.
    pub(super) replicas: BTreeMap<ReplicaId, Box<Seen>>,
    /// The last failure of a connection that has shown the agent's key, and did not become a link.
    pub(super) failed: Option<Lapse>,
    /// The last failure of a connection that claimed to be this agent and has not proved it.
    pub(super) claimed: Option<Lapse>,
}

/// A replica that is or was there.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    /// Who it was.
    pub(super) peer: Peer,
    /// When its last link began, or ended if it has.
    pub(super) at: Timestamp,
    /// What went wrong last.
    pub(super) lapse: Option<Lapse>,
}

/// Something that went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lapse {
    /// When.
    pub(super) at: Timestamp,
    /// The word that the audit uses.
    pub(super) reason: &'static str,
    /// More about it.
    pub(super) detail: String,
    /// Where the other end was.
    pub(super) address: SocketAddr,
    /// Whether the other end had not proved yet to be the agent.
    pub(super) claimed: bool,
}

impl Record {
    /// What went wrong last as far as the agent itself is concerned, or if somebody who claims to be it has failed since, that.
    pub(super) fn last(&self, replica: Option<&ReplicaId>) -> Option<&Lapse> {
        let of_replica = replica.and_then(|replica| self.replicas.get(replica)).and_then(|seen| seen.lapse.as_ref());
        [of_replica, self.failed.as_ref(), self.claimed.as_ref()].into_iter().flatten().max_by_key(|lapse| lapse.at)
    }
}

impl Lapses {
    /// A replica has linked.
    pub(super) fn linked(&self, peer: &Peer) {
        self.saw(peer, None);
    }

    /// A link of a replica has ended, by `lapse` if something was wrong; `holds` tells whether the replica has another.
    pub(super) fn ended(&self, peer: &Peer, lapse: Option<Lapse>, holds: bool) {
        match (holds, lapse) {
            (false, Some(lapse)) => self.saw(peer, Some(lapse)),
            // A process that goes by another name now, or a gateway that stops: nobody is missed.
            (false, None) => {
                let mut agents = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(record) = agents.get_mut(&peer.name) {
                    record.replicas.remove(&peer.replica);
                }
            }
            (true, Some(lapse)) => {
                let mut agents = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                let record = agents.entry(peer.name.clone()).or_default();
                if let Some(seen) = record.replicas.get_mut(&peer.replica) {
                    seen.lapse = Some(lapse);
                }
            }
            (true, None) => {}
        }
    }

    fn saw(&self, peer: &Peer, lapse: Option<Lapse>) {
        let mut agents = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let record = agents.entry(peer.name.clone()).or_default();
        let earlier = record.replicas.remove(&peer.replica).and_then(|seen| seen.lapse);
        if record.replicas.len() >= limits::REPLICAS_REMEMBERED {
            let oldest = record.replicas.iter().min_by_key(|(_, seen)| seen.at).map(|(replica, _)| replica.clone());
            oldest.map(|oldest| record.replicas.remove(&oldest));
        }
        let seen = Seen { peer: peer.clone(), at: Timestamp::now(), lapse: lapse.or(earlier) };
        record.replicas.insert(peer.replica.clone(), Box::new(seen));
    }

    /// A connection of this agent did not become a link, or one that only claimed to be the agent's. The caller has made sure
    /// that the agent is registered.
    pub(super) fn not_linked(&self, name: &AgentName, lapse: Lapse) {
        let mut agents = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let record = agents.entry(name.clone()).or_default();
        let place = if lapse.claimed { &mut record.claimed } else { &mut record.failed };
        *place = Some(lapse);
    }

    /// What is remembered of an agent.
    pub(super) fn of(&self, name: &AgentName) -> Record {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned().unwrap_or_default()
    }

    /// Forgets the agents that are not registered any more.
    pub(super) fn retain(&self, is_registered: impl Fn(&AgentName) -> bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|name, _| is_registered(name));
    }
}

impl Lapse {
    /// Something that went wrong just now. `detail` may come from a peer: it is bounded here.
    pub(super) fn now(reason: &'static str, detail: &str, address: SocketAddr) -> Self {
        let detail = detail.chars().filter(|c| !c.is_control()).take(limits::TRAIL_TEXT_MAX / 4).collect();
        // From the end of the key exchange on, the other end is the agent.
        let claimed = !PROVED.contains(&reason);
        Self { at: Timestamp::now(), reason, detail, address, claimed }
    }
}

/// The reason of a link that has ended because its agent went away in order.
pub(super) const AGENT_DRAINED: &str = "agent_drained";

/// The reasons of failures that come after the agent has shown its key.
const PROVED: &[&str] = &[
    "login_refused_by_agent",
    "control_channel",
    "lost",
    "revoked",
    "superseded",
    "unanswering",
    AGENT_DRAINED,
    "protocol_violation",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Algorithm, PrivateKey};

    fn peer(replica: &str) -> Peer {
        Peer {
            name: "acme/prod-eu".parse().expect("a name"),
            replica: replica.parse().expect("a replica"),
            process: None,
            address: SocketAddr::from(([10, 0, 0, 1], 1)),
            transport: "ssh",
            version: "1".to_owned(),
            key: PrivateKey::generate(Algorithm::Ed25519).public().fingerprint(),
        }
    }

    fn lapse(reason: &'static str) -> Lapse {
        Lapse::now(reason, "detail", SocketAddr::from(([10, 0, 0, 2], 2)))
    }

    #[test]
    fn names_that_an_agent_makes_up_push_out_its_own_oldest_and_nothing_else() {
        let lapses = Lapses::default();
        let other = Peer { name: "acme/other".parse().expect("a name"), ..peer("one") };
        lapses.saw(&other, Some(lapse("lost")));
        for number in 0..limits::REPLICAS_REMEMBERED * 3 {
            lapses.saw(&peer(&format!("r{number}")), None);
        }
        let record = lapses.of(&peer("x").name);
        assert_eq!(record.replicas.len(), limits::REPLICAS_REMEMBERED);
        let newest = format!("r{}", limits::REPLICAS_REMEMBERED * 3 - 1).parse().expect("a replica");
        assert!(record.replicas.contains_key(&newest));
        assert_eq!(lapses.of(&other.name).replicas.len(), 1);
    }

    #[test]
    fn a_claim_does_not_hide_what_befell_the_agent_and_a_new_link_does_not_either() {
        let lapses = Lapses::default();
        let one = peer("one");
        lapses.saw(&one, Some(lapse("lost")));
        lapses.not_linked(&one.name, lapse("unknown_key"));
        lapses.not_linked(&one.name, lapse("login_refused_by_agent"));
        lapses.saw(&one, None);
        let record = lapses.of(&one.name);
        assert_eq!(record.replicas[&one.replica].lapse.as_ref().map(|lapse| lapse.reason), Some("lost"));
        assert_eq!(record.claimed.as_ref().map(|lapse| lapse.reason), Some("unknown_key"));
        assert_eq!(record.failed.as_ref().map(|lapse| lapse.reason), Some("login_refused_by_agent"));
        lapses.retain(|_| false);
        assert!(lapses.of(&one.name).replicas.is_empty());
    }

    #[test]
    fn details_are_bounded_and_printable() {
        let lapse = Lapse::now("handshake", &"\u{1b}[2Jé".repeat(10_000), SocketAddr::from(([10, 0, 0, 2], 2)));
        assert!(lapse.detail.len() <= limits::TRAIL_TEXT_MAX && !lapse.detail.contains('\u{1b}'));
    }
}

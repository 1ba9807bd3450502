//! What is looked up when somebody asks for metrics: who is linked, and what comes to its end first. Waits for nothing.

use std::sync::{Arc, Weak};

use jiff::Timestamp;

use super::Gateway;
use super::roster::Standing;
use crate::metrics::{self, Refresh};
use crate::registry::Registry;

/// Looks for as long as what is returned is held.
pub(super) fn refresh(gateway: &Arc<Gateway>) -> Refresh {
    let gateway = Arc::downgrade(gateway);
    metrics::refreshed_by(move || {
        if let Some(gateway) = Weak::upgrade(&gateway) {
            links(&gateway);
            endings(&gateway, Timestamp::now());
        }
    })
}

fn links(gateway: &Gateway) {
    let links = gateway.roster.list();
    for standing in Standing::ALL {
        let level = links.iter().filter(|link| link.standing() == standing).count();
        metrics::LINKS.of([standing.as_str()]).set(whole(level));
    }
    let serving: Vec<_> = links
        .iter()
        .filter(|link| link.standing() == Standing::Active)
        .map(|link| (&link.peer.name.organisation, &link.peer.name.agent))
        .collect();
    let snapshot = gateway.registry.current();
    let (mut linked, mut unlinked) = (0, 0);
    metrics::AGENT_LINKS.clear();
    // Both are in the order of names.
    let mut rest = serving.as_slice();
    for (organisation, held) in snapshot.organisations() {
        for agent in held.agents.keys() {
            let name = (organisation, agent);
            let before = rest.iter().take_while(|other| **other < name).count();
            let here = rest[before..].iter().take_while(|other| **other == name).count();
            rest = &rest[before + here..];
            *(if here > 0 { &mut linked } else { &mut unlinked }) += 1;
            metrics::AGENT_LINKS.of([organisation.to_string(), agent.to_string()]).inc_by(whole(here));
        }
    }
    metrics::AGENTS.of(["linked"]).set(linked);
    metrics::AGENTS.of(["unlinked"]).set(unlinked);
}

fn endings(gateway: &Gateway, now: Timestamp) {
    metrics::KEY_EXPIRY.clear();
    for (holder, ends) in gateway.registry.current().first_endings(now) {
        metrics::KEY_EXPIRY.of([holder]).set(ends.as_second());
    }
    metrics::CERTIFICATE_EXPIRY.clear();
    for (certificate, ends) in gateway.state.current().first_endings() {
        metrics::CERTIFICATE_EXPIRY.of([certificate]).set(ends.as_second());
    }
}

fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

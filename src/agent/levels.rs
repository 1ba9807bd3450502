//! What is looked up when somebody asks for metrics: what comes to its end first. Waits for nothing.

use std::sync::{Arc, Weak};

use super::Agent;
use super::live::State;
use crate::metrics::{self, Refresh};

/// Looks for as long as what is returned is held.
pub(super) fn refresh(agent: &Arc<Agent>) -> Refresh {
    let agent = Arc::downgrade(agent);
    metrics::refreshed_by(move || {
        if let Some(agent) = Weak::upgrade(&agent) {
            endings(&agent.state.current());
        }
    })
}

/// Of the keys that let orchestrators log in for an organisation, the last one counts: the others are being rotated.
fn endings(state: &State) {
    metrics::KEY_EXPIRY.clear();
    for (holder, ca) in [("orchestrator", false), ("orchestrator_ca", true)] {
        let entries = || state.entries().filter(|entry| entry.ca == ca);
        let last = |organisation| {
            let ends: Option<Vec<_>> = entries()
                .filter(|entry| entry.organisation == organisation)
                .map(|entry| entry.window.expires)
                .collect();
            ends?.into_iter().max()
        };
        if let Some(ends) = entries().filter_map(|entry| last(entry.organisation)).min() {
            metrics::KEY_EXPIRY.of([holder]).set(ends.as_second());
        }
    }
    metrics::CERTIFICATE_EXPIRY.clear();
    if let Some(ends) = state.certificates().filter_map(|(_, identity)| identity.ends()).min() {
        metrics::CERTIFICATE_EXPIRY.of(["tls_client"]).set(ends.as_second());
    }
}

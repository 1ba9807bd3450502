//! Keys that expire soon: the operator is told in the log, and an agent over its links. The gateway's own certificates, too.
//!
//! Promised: each is told once when a key has 30 days left, 7 days, and none, and again after each start, as far as that is
//! still ahead ([`crate::registry::expiry`] decides). It waits for the registry or the configuration to change, and for the
//! clock.

use std::sync::Arc;

use jiff::Timestamp;
use tracing::warn;

use super::Gateway;
use super::roster::Link;
use crate::registry::Registry;
use crate::registry::expiry::{self, Left, Said, Stage};
use crate::tunnel::wire::{Control, KeyNotice};

/// Tells the operator, until the gateway stops.
pub(super) async fn watch(gateway: Arc<Gateway>) {
    let stop = gateway.tasks.stopping().clone();
    let mut changed = gateway.registry.changed();
    let mut said = Said::default();
    loop {
        let (snapshot, now) = (gateway.registry.current(), Timestamp::now());
        for ending in said.take_new(snapshot.endings(now)) {
            let left = Left { expires: ending.expires, now };
            let advice = if ending.succeeded {
                "it has another key that lasts longer, so take this one away when that is in use"
            } else {
                "it has no key that lasts longer: add one (`caponier keys add`, `caponier keys rotate`)"
            };
            warn!(organisation = %ending.organisation, holder = ending.holder, key = %ending.key, "a key {left}; {advice}");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = expiry::until(snapshot.next_ending(now), now) => {}
            changed = changed.changed() => if changed.is_err() { return },
        }
    }
}

/// Tells the operator of the gateway's own certificates, until the gateway stops.
pub(super) async fn watch_certificates(gateway: Arc<Gateway>) {
    let stop = gateway.tasks.stopping().clone();
    let mut said = Vec::new();
    loop {
        let ((state, mut changed), now) = (gateway.state.follow(), Timestamp::now());
        let warnings = state.certificate_warnings(now);
        for warning in warnings.iter().filter(|warning| !said.contains(*warning)) {
            warn!("{warning}");
        }
        said = warnings;
        tokio::select! {
            () = stop.cancelled() => return,
            () = expiry::until(state.next_certificate_warning(now), now) => {}
            changed = changed.changed() => if changed.is_err() { return },
        }
    }
}

/// Waits until the agent is to be told of the end of its link's key, other than what it was told last.
pub(super) async fn notice(gateway: &Gateway, link: &Link, told: &mut Option<(Timestamp, Stage)>) -> Control {
    let mut changed = gateway.registry.changed();
    loop {
        let now = Timestamp::now();
        let expires = gateway.registry.current().agent_key_expires(&link.peer.name, &link.peer.key);
        let due = expires.and_then(|expires| Some((expires, Stage::of(expires, now)?)));
        if let Some((expires, _)) = due
            && *told != due
        {
            *told = due;
            return Control::KeyNotice(KeyNotice { expires: u64::try_from(expires.as_second()).unwrap_or_default() });
        }
        tokio::select! {
            () = expiry::until(expires.and_then(|expires| Stage::next(expires, now)), now) => {}
            changed = changed.changed() => if changed.is_err() { std::future::pending::<()>().await },
        }
    }
}

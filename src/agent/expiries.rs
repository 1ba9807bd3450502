//! Keys that expire soon: the owner is told in the log, of the agent's own key when a gateway says so, and of the
//! orchestrators' keys by the configuration.
//!
//! Promised: each is told once when a key has 30 days left, 7 days, and none, and again after each start, as far as that is
//! still ahead. What a gateway says of a key's end is its word: it changes nothing here.

use std::sync::{Arc, PoisonError};

use jiff::Timestamp;
use tracing::warn;

use super::{Agent, Post};
use crate::registry::expiry::{self, Ending, Left, Said, Stage};
use crate::tunnel::wire::KeyNotice;

/// What was heard last of the end of a key.
pub(super) type Noticed = Option<(u64, Stage)>;

/// Tells of a gateway's notice, unless that was told before.
pub(super) fn heed(post: &Post, notice: KeyNotice) {
    let now = Timestamp::now();
    let expires = i64::try_from(notice.expires).ok().and_then(|second| Timestamp::from_second(second).ok());
    let Some((expires, stage)) = expires.and_then(|expires| Some((expires, Stage::of(expires, now)?))) else { return };
    let heard = Some((notice.expires, stage));
    if std::mem::replace(&mut *post.noticed.lock().unwrap_or_else(PoisonError::into_inner), heard) == heard {
        return;
    }
    let left = Left { expires, now };
    warn!(
        organisation = %post.name.organisation,
        gateway = %post.gateway,
        "this agent's key {left}, says the gateway: make a new one with `caponier keys rotate` and give its public half to \
         the gateway's operator"
    );
}

/// Tells of orchestrators' keys, until the agent stops. Waits for another configuration, and for the clock.
pub(super) async fn watch(agent: Arc<Agent>) {
    let stop = agent.tasks.stopping().clone();
    let mut said = Said::default();
    loop {
        let (state, mut changes) = agent.state.follow();
        let now = Timestamp::now();
        let ends = || state.orchestrators().filter_map(|(id, one)| Some((id, one, one.window.expires?)));
        let endings = ends().filter_map(|(id, one, expires)| {
            Some(Ending {
                organisation: id.clone(),
                holder: "orchestrator".to_owned(),
                key: one.key.fingerprint(),
                expires,
                stage: Stage::of(expires, now)?,
                succeeded: state.orchestrators().any(|(other, key)| {
                    other == id && key.window.at(now).is_ok() && key.window.expires.is_none_or(|end| end > expires)
                }),
            })
        });
        for ending in said.take_new(endings.collect()) {
            let left = Left { expires: ending.expires, now };
            let advice = if ending.succeeded {
                "the organisation has another that lasts longer"
            } else {
                "the organisation has none that lasts longer, and will not get in: add its next [[organisation.orchestrator]]"
            };
            warn!(organisation = %ending.organisation, key = %ending.key, "an orchestrator's key {left}; {advice}");
        }
        let next = ends().filter_map(|(_, _, expires)| Stage::next(expires, now)).min();
        tokio::select! {
            () = stop.cancelled() => return,
            () = expiry::until(next, now) => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

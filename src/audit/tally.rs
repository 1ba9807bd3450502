//! What of the trail the metrics count: every event, by words of ours. Counted when it happens, whether or not the trail can
//! still be written.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::event::Kind;
use super::forward::{Ending, Opening};
use super::record::{ABANDONED, DENIED, ENDED, FAILED, Record};
use super::writer::Message;
use super::{Shared, Side};
use crate::metrics::{self, Held, Refresh};
use crate::trace;

/// A forward, counted for as long as its entry is open.
#[derive(Debug)]
pub(super) struct Running(#[expect(dead_code, reason = "held to be counted")] Held);

impl Running {
    pub(super) fn begin() -> Self {
        Self(Held::one_of(&metrics::FORWARDS))
    }
}

/// How a forward came to its end: `denied`, `failed`, `ended` or `abandoned`, and why.
pub(super) type Why = (&'static str, Cow<'static, str>);

/// A forward that ends after it was recorded as opening. `open_s` is how long it was established, if it was.
pub(super) fn ended(
    side: Side,
    opening: &Opening,
    ending: Option<&Ending>,
    abandoned: &'static str,
    open_s: Option<f64>,
) -> Why {
    let (outcome, reason) = match ending {
        Some(Ending::Denied { reason, .. }) => (DENIED, *reason),
        Some(Ending::Failed { reason, .. }) => (FAILED, *reason),
        Some(Ending::Ended { reason, .. }) => (ENDED, *reason),
        None => (ABANDONED, abandoned),
    };
    if let Some(seconds) = open_s {
        metrics::FORWARD_SECONDS.observe(seconds);
    }
    finished(side, opening, outcome, reason.into())
}

/// A forward that is denied before it is recorded as opening.
pub(super) fn denied(side: Side, opening: &Opening, reason: &str) {
    let why = finished(side, opening, DENIED, reason.to_owned().into());
    told(side, opening, why, opening.asked.until(Instant::now()), None);
}

/// Tells whoever exports traces. `decided` and `opened` are how long after it was asked for.
pub(super) fn told(side: Side, opening: &Opening, why: Why, decided: Duration, opened: Option<Duration>) {
    trace::tell(|| {
        let (outcome, reason) = why;
        trace::Forward {
            side: side.as_str(),
            forward: opening.forward.clone(),
            // At the gateway this is the agent's, and the trace has the gateway's.
            peer_forward: opening.peer_forward.clone().filter(|_| side == Side::Agent),
            organisation: opening.organisation.as_ref().map(ToString::to_string),
            agent: opening.agent.as_ref().map(ToString::to_string),
            door: opening.door,
            outcome,
            reason,
            asked: opening.asked.wall,
            decided,
            opened,
            ended: opening.asked.until(Instant::now()),
        }
    });
}

fn finished(side: Side, opening: &Opening, outcome: &'static str, reason: Cow<'static, str>) -> Why {
    // The events of forwards are called `forward.denied` and so on.
    let word = outcome.split('.').next_back().unwrap_or(outcome);
    metrics::FORWARDS_ENDED.of([word, opening.door.unwrap_or("link")]).inc();
    metrics::FORWARD_REASONS.of([word.into(), reason.clone()]).inc();
    if outcome == DENIED {
        // Elsewhere a rule is not this program's own.
        let rule = opening.rule.clone().filter(|_| side == Side::Agent).unwrap_or_default();
        metrics::DENIALS.of([reason.clone(), rule.into()]).inc();
    }
    (word, reason)
}

/// An event that is no forward's opening or end.
pub(super) fn happened(record: &Record) {
    let is = |kind: Kind| record.event == kind.as_str();
    let reason = || record.reason.clone().unwrap_or_default();
    if is(Kind::LinkUp) {
        metrics::LINK_UPS.inc();
    } else if is(Kind::LinkDown) {
        metrics::LINK_DOWNS.of([reason()]).inc();
    } else if is(Kind::AuthAccepted) {
        metrics::LOGINS.inc();
    } else if is(Kind::AuthRefused) {
        metrics::refuse(reason());
    } else if is(Kind::PeerViolation) {
        metrics::VIOLATIONS.inc();
    } else if is(Kind::ForwardAttempt) {
        metrics::ATTEMPTS_FAILED.of([reason()]).inc();
    } else if is(Kind::RegistryReloaded) || is(Kind::RegistryRejected) {
        let rejected = is(Kind::RegistryRejected);
        metrics::REGISTRY_LOADS.of([outcome(rejected)]).inc();
        metrics::REGISTRY_REJECTED.of::<&str>([]).set(rejected.into());
    } else if is(Kind::ConfigReloaded) || is(Kind::ConfigRejected) {
        let rejected = is(Kind::ConfigRejected);
        metrics::CONFIG_LOADS.of([outcome(rejected)]).inc();
        metrics::CONFIG_REJECTED.set(rejected.into());
    } else if is(Kind::DrainBegan) {
        metrics::DRAINING.set(1);
    }
}

fn outcome(rejected: bool) -> &'static str {
    if rejected { "rejected" } else { "accepted" }
}

/// Looks how full the queue is, and whether the sinks work, for as long as what is returned is held.
pub(super) fn refresh(shared: &Arc<Shared>, queue: &mpsc::WeakSender<Message>) -> Refresh {
    let (shared, queue) = (Arc::downgrade(shared), queue.clone());
    metrics::refreshed_by(move || {
        let Some((shared, queue)) = shared.upgrade().zip(queue.upgrade()) else { return };
        let whole = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        metrics::AUDIT_QUEUE_MAX.set(whole(queue.max_capacity()));
        metrics::AUDIT_QUEUE.set(whole(queue.max_capacity() - queue.capacity()));
        metrics::AUDIT_FAILING.set(shared.failed.borrow().is_some().into());
    })
}

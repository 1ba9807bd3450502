//! One forward, from the peer's request to its end.
//!
//! The order is fixed: who asks → could any rule allow it → resolve → decide → record → dial → accept → splice → record the
//! end. The permit that the decision yields is what the dial consumes, and each address is judged again when it is dialled.

use std::io;
use std::net::SocketAddr;

use jiff::Timestamp;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::live::{self, Case};
use super::reach::reach;
use super::serve::{DOOR, Session};
use crate::audit::{Ending, Resolved, TrailError};
use crate::chain::Chain;
use crate::drain::Ticket;
use crate::identity::Principal;
use crate::limits;
use crate::policy::rule::Lookup;
use crate::policy::{Decision, Denial};
use crate::target::{Host, Target};
use crate::task::apart;
use crate::tunnel::splice::{self, End, Side};
use crate::tunnel::ssh::{Flow, Opening};
use crate::tunnel::wire::{ForwardId, Originator, RefusalCode};

/// Serves a forward to its end; or, with a limit that it is `over`, or without a ticket because the
/// agent drains, to its refusal.
pub(super) async fn forward(session: &Session, opening: Opening, over: Option<&'static str>, ticket: Option<Ticket>) {
    let agent = &session.agent;
    let credential = &session.orchestrator;
    // Decided on the state that holds now, and from then on again on each that this has not seen.
    let (state, changes) = agent.state.follow();
    let now = Timestamp::now();
    let originator = Originator::parse(&opening.originator);
    let mut record = crate::audit::Opening {
        forward: ForwardId::random().to_string(),
        organisation: Some(session.organisation.clone()),
        agent: Some(agent.id.clone()),
        replica: Some(session.replica.clone()),
        key: Some(credential.key()),
        certificate: credential.certificate().cloned(),
        client: session.guest.as_ref().map(|guest| guest.client.to_string()),
        door: session.guest.as_ref().map(|_| DOOR),
        target: format!("{}:{}", opening.host, opening.port),
        ..crate::audit::Opening::default()
    };
    let peer = match &originator {
        Ok(Some(originator)) => {
            record.peer_forward = Some(originator.forward.to_string());
            record.principal = Some(Principal::Named(originator.principal.clone()));
            record.asserted_by = Some(credential.key().to_string());
            // Who came in at the listener is where it is, whatever it says.
            record.client.get_or_insert_with(|| originator.client.clone());
            Some(originator.forward.clone())
        }
        _ => None,
    };
    let refusal = Refusal { session, opening, record, peer };

    let claimed = match &originator {
        Ok(originator) => originator.as_ref().map(|originator| &originator.principal),
        Err(_) => {
            let claimed: String = refusal.opening.originator.escape_debug().take(128).collect();
            return refusal.deny(RefusalCode::Malformed, "malformed_originator", &claimed).await;
        }
    };
    let (served, asserts) = match state.orchestrator(&session.organisation, credential, session.from(), now) {
        Ok(served) => served,
        Err(reason) => {
            let detail = format!("the configuration no longer lets the session's key log in: {reason}");
            return refusal.deny(RefusalCode::Denied, live::lapse(reason), &detail).await;
        }
    };
    let principal = match live::speaker(asserts, credential, claimed) {
        Ok(principal) => principal,
        Err((reason, detail)) => return refusal.deny(RefusalCode::Denied, reason, detail).await,
    };
    let mut refusal = refusal;
    refusal.record.principal = Some(principal.clone());

    let counted = match over {
        Some(limit) => Err(limit),
        None => agent.usage.forward(&agent.limits(), &session.organisation),
    };
    let _counted = match counted {
        Ok(counted) => counted,
        Err(limit) => return refusal.deny(RefusalCode::Limit, "limit", limit).await,
    };
    let Some(mut ticket) = ticket else {
        return refusal.deny(RefusalCode::Draining, "draining", "the agent goes away").await;
    };
    let target = match Target::from_wire(&refusal.opening.host, refusal.opening.port) {
        Ok(target) => target,
        Err(error) => return refusal.deny(RefusalCode::Malformed, "malformed_target", &error.to_string()).await,
    };
    refusal.record.target = target.to_string();

    let guard = agent.guard(&state);
    let allow = &served.allow;
    let lookup = match allow.consider(&principal, &target, &guard, now) {
        Ok(lookup) => lookup,
        Err(denial) => return refusal.denied(denial).await,
    };
    let deadline = Instant::now() + limits::OPEN_TIMEOUT;
    let resolver = &state.resolver;
    let found = match (lookup, &target.host) {
        (Lookup::Address(address), _) => Ok(vec![address]),
        (_, Host::Address(address)) => Ok(vec![SocketAddr::new(*address, target.port)]),
        (Lookup::Addresses, Host::Name(name)) => resolver
            .addresses(name)
            .await
            .map(|found| found.into_iter().map(|address| SocketAddr::new(address, target.port)).collect()),
        (Lookup::Service, Host::Name(name)) => resolver.service(name).await,
    };
    let resolved: Vec<SocketAddr> = match found {
        Ok(resolved) => resolved,
        Err(error) => {
            let detail = Chain(&error).to_string();
            return refusal.fail(RefusalCode::Unresolved, "unresolved", detail).await;
        }
    };
    // A service's instances have ports and an order of their own; and who asks for an address means that one.
    let turns = matches!(lookup, Lookup::Addresses).then(|| resolver.family());
    let on_record = |place: &SocketAddr| match lookup {
        Lookup::Address(_) | Lookup::Addresses => Resolved::Address(place.ip()),
        Lookup::Service => Resolved::Instance(*place),
    };
    refusal.record.resolved = resolved.iter().map(on_record).collect();
    let permit = match allow.decide(&principal, &target, &resolved, &guard, Timestamp::now()) {
        Decision::Allow(permit) => permit,
        Decision::Deny(denial) => return refusal.denied(denial).await,
    };
    refusal.record.rule = Some(permit.rule().to_owned());
    refusal.record.refused = permit.refused().iter().map(on_record).collect();

    let unrecorded = agent.unrecorded.token();
    let mut entry = match agent.trail.open(refusal.record.clone()).await {
        Ok(entry) => entry,
        // The trail holds the gateway's ids of the live forwards, by organisation.
        Err(TrailError::Duplicate) => return refusal.deny(RefusalCode::Malformed, "duplicate_forward", "").await,
        Err(error) => return refusal.unrecorded(&error).await,
    };
    let case = Case {
        organisation: &session.organisation,
        credential,
        from: session.from(),
        claimed,
        principal: &principal,
        target: &target,
    };
    // Each by itself: that another address of the name would still do is no permission for this one.
    let still = |address| session.allows(&agent.state.current(), &case, &[address]).is_ok();
    let dialled = tokio::select! {
        // First: to what has been taken back by now, no connection is made.
        biased;
        reason = session.no_longer_allows(changes.clone(), &case, &resolved) => Err(reason),
        dialled = timeout_at(deadline, reach(permit, turns, still)) => {
            Ok(dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())))
        }
        why = agent.drain.cut() => {
            entry.finish(Ending::Failed { reason: why, detail: "it was not open yet".to_owned() });
            return refusal.answer(RefusalCode::Draining, "the agent goes away").await;
        }
        // The peer is gone: the entry ends as abandoned.
        () = session.switch.gone().cancelled() => return,
    };
    let (stream, address) = match dialled {
        Ok(Ok(dialled)) => dialled,
        Err(reason) => {
            let detail = "the configuration changed, or its time came, while the forward was opened".to_owned();
            entry.finish(Ending::Denied { reason, detail });
            return refusal.answer(RefusalCode::Denied, reason).await;
        }
        Ok(Err(error)) => {
            entry.finish(Ending::Failed { reason: "connect_failed", detail: error.to_string() });
            return refusal.answer(RefusalCode::ConnectFailed, &format!("could not connect: {}", error.kind())).await;
        }
    };
    entry.established(Some(address));
    ticket.opened();
    let flow = match &session.guest {
        Some(guest) => guest.flow,
        // Whoever names an originator in our form is our gateway, and speaks of credit.
        None if refusal.peer.is_some() => Flow::Credit,
        None => Flow::Stock,
    };
    let Some(channel) = refusal.opening.accept(flow).await else { return };
    let counters = entry.counters();
    let stop = CancellationToken::new();
    let mut cut = None;
    // Of all that were permitted, the one that counts from here on.
    let addresses = [address];
    let (end, remains) = {
        let splice =
            splice::splice(Side::Channel(channel), Side::Tcp(stream), &counters, agent.limits().forward, &stop);
        tokio::pin!(splice);
        let watch = apart(async {
            tokio::select! {
                why = session.no_longer_allows(changes, &case, &addresses) => Some(why),
                why = agent.drain.cut() => Some(why),
                () = unrecorded.cancelled() => None,
            }
        });
        let why = tokio::select! {
            // First: bytes that never end must not hide it.
            biased;
            why = watch => {
                cut = why;
                None
            }
            end = &mut splice => Some(end),
        };
        match why {
            Some(end) => end,
            None => {
                stop.cancel();
                splice.await
            }
        }
    };
    // Where the link was cut for the same reason, and that was noticed first.
    let lapsed = match end {
        End::NearBroke(_) | End::Stopped => session.allows(&agent.state.current(), &case, &addresses).err(),
        _ => None,
    };
    let reason = match (end, cut.or(lapsed)) {
        (End::Clean, _) => "eof",
        // Whatever was wrong with it already: it still went on, to deliver what it had, and was cut.
        (_, Some(why)) => why,
        (End::NearBroke(_), None) if session.departure.is_due() => "gateway_drained",
        (End::NearBroke(_), None) if session.guest.is_none() && session.switch.gone().is_cancelled() => "link_lost",
        (End::NearBroke(_), None) => "client_gone",
        (End::FarBroke(_), None) => "target_broke",
        (End::Stalled, None) => "stalled",
        (End::Idle, None) => "idle",
        (End::Expired, None) => "expired",
        (End::Stopped, None) if unrecorded.is_cancelled() => "audit_failed",
        (End::Stopped, None) => "agent_stopped",
    };
    entry.finish(counters.ended(reason));
    // It has ended: a drain gives it time for its goodbye, and does not count it as cut.
    let _leaving = agent.drain.leave();
    drop(ticket);
    remains.leave().await;
}

/// A forward that has not been granted yet, and all that is needed to refuse it.
struct Refusal<'a> {
    session: &'a Session,
    opening: Opening,
    record: crate::audit::Opening,
    peer: Option<ForwardId>,
}

impl Refusal<'_> {
    /// Records what the policy said, then tells the gateway.
    async fn denied(mut self, denial: Denial) {
        self.record.rule = denial.rule;
        self.deny(RefusalCode::Denied, denial.reason.as_str(), &denial.detail).await;
    }

    /// Records a denial, then tells the peer. A gateway's operator may read the reason, which both trails then share.
    async fn deny(self, code: RefusalCode, reason: &str, detail: &str) {
        debug!(reason, detail, "denied a forward");
        match self.session.agent.trail.deny(self.record.clone(), reason, detail).await {
            // Which limit it is, so that the gateway's trail says so too.
            Ok(()) if code == RefusalCode::Limit => self.answer(code, detail).await,
            Ok(()) => self.answer(code, reason).await,
            Err(error) => self.unrecorded(&error).await,
        }
    }

    /// Records a forward that failed before it could be decided to the end, then tells the peer.
    async fn fail(self, code: RefusalCode, reason: &'static str, detail: String) {
        match self.session.agent.trail.open(self.record.clone()).await {
            Ok(entry) => {
                entry.finish(Ending::Failed { reason, detail });
                self.answer(code, reason).await;
            }
            Err(error) => self.unrecorded(&error).await,
        }
    }

    async fn unrecorded(self, error: &TrailError) {
        debug!(error = %Chain(error), "refused a forward because it could not be recorded");
        self.answer(RefusalCode::Unrecorded, "the agent could not record the forward").await;
    }

    async fn answer(self, code: RefusalCode, words: &str) {
        self.session.answer(self.opening, code, self.peer.as_ref(), words).await;
    }
}

//! The one way from a request to a stream, whatever the door: decide → record → (pick a link → ask its agent), as often as
//! it takes → accept → splice → record the end.
//!
//! Promised: a denial is final, whoever denies; what another replica might do better ([`Failure::verdict`]) is tried on
//! another link, no link twice, at most [`limits::ATTEMPTS`] and until [`limits::OPENING_TIMEOUT`]; every attempt that
//! failed is a record of its own; who is allowed, and finds no link, waits for one for [`limits::LINK_PATIENCE`]. Who is
//! not allowed is refused before any of this, and so learns nothing of who is linked.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use tokio::time::{self, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::Gateway;
use super::forwards::About;
use super::roster::{Link, NoRide, Ride, Standing};
use crate::audit::{self, Counters, Ending, Entry, Event, Kind};
use crate::chain::Chain;
use crate::drain::Ticket;
use crate::identity::{AgentName, Credential, Principal, PrincipalId};
use crate::limits;
use crate::policy::Decision;
use crate::policy::grant::Pass;
use crate::registry::Registry;
use crate::target::{Target, TargetError};
use crate::task::{apart, reached};
use crate::token::Verified;
use crate::tunnel::splice::{self, End, Side};
use crate::tunnel::ssh::{OpenError, Public};
use crate::tunnel::wire::{ForwardId, Originator, RefusalCode};

/// What a door asks for.
pub(super) struct Request {
    /// Who is asking; the door has made sure of that.
    pub(super) principal: PrincipalId,
    /// What it was made sure with, where there is anything.
    pub(super) credential: Option<Credential>,
    /// The token that it was made sure with, where it was that.
    pub(super) token: Option<Verified>,
    /// What is to be recorded of a TLS certificate.
    pub(super) client_certificate: Option<String>,
    /// Which agent is to serve it.
    pub(super) agent: AgentName,
    /// Where to, or why that could not be read.
    pub(super) target: Result<Target, TargetError>,
    /// The same as it was asked for.
    pub(super) asked: String,
    /// Where the principal connects from.
    pub(super) client: SocketAddr,
    /// Which kind of door.
    pub(super) door: &'static str,
    /// On whose word the principal rests, where that is not its own key.
    pub(super) asserted_by: Option<String>,
    /// A limit that stands against it already.
    pub(super) over: Option<&'static str>,
    /// Its place among the forwards that a drain waits for; `None` if the drain came first.
    pub(super) ticket: Option<Ticket>,
    /// Fires when the door itself is taken away, which takes what came in by it along.
    pub(super) withdrawn: Option<CancellationToken>,
}

/// What a request is, as far as limits go. Doors ask for this before they make a task of it: a flood of refusals must not
/// become a flood of tasks, or of records.
pub(super) enum Admission {
    /// In a task of its own.
    Judge(Request),
    /// In line: it can only be recorded and refused.
    Refuse(Request),
    /// Refused without a record of its own. The door counts it, and records the sum.
    Unheard,
}

impl Request {
    /// Counts it among what its principal asks for in a second.
    pub(super) fn admit(mut self, gateway: &Gateway) -> Admission {
        let limits = gateway.limits();
        let counted = gateway.quotas.open(&limits, &self.agent.organisation, &self.principal, Instant::now());
        match counted {
            Ok(()) if self.over.is_none() && self.ticket.is_some() => return Admission::Judge(self),
            Err(flood) if !flood.record => return Admission::Unheard,
            Err(flood) => self.over = self.over.or(Some(flood.limit)),
            Ok(()) => {}
        }
        Admission::Refuse(self)
    }
}

/// How a door answers its client.
pub(super) trait Answer: Send {
    /// Opens the principal's side; `None` where the client is gone.
    fn accept(self) -> impl Future<Output = Option<Side>> + Send;
    /// Refuses.
    fn refuse(self, public: Public) -> impl Future<Output = ()> + Send;
}

/// Runs one forward from its request to its end. `gone` fires when the door's session has ended: a forward that is still
/// opening is then abandoned; one that is open ends by itself, when what its client had sent has been delivered.
pub(super) async fn forward(gateway: &Gateway, mut request: Request, answer: impl Answer, gone: &CancellationToken) {
    let ticket = request.ticket.take();
    let id = ForwardId::random();
    let record = audit::Opening {
        forward: id.to_string(),
        organisation: Some(request.agent.organisation.clone()),
        agent: Some(request.agent.agent.clone()),
        principal: Some(Principal::Named(request.principal.clone())),
        asserted_by: request.asserted_by.clone(),
        key: request.credential.as_ref().map(Credential::key).or(request.token.as_ref().map(Verified::key)),
        token: request.token.as_ref().map(|token| token.claims().id.clone()),
        certificate: request.credential.as_ref().and_then(Credential::certificate).cloned(),
        client_certificate: request.client_certificate.clone(),
        client: Some(request.client.to_string()),
        door: Some(request.door),
        target: request.target.as_ref().map_or_else(|_| request.asked.clone(), ToString::to_string),
        ..audit::Opening::default()
    };
    let denied = |reason: &'static str, detail: String, public: Public| (reason, detail, public);
    let decided = match (&request.target, request.over) {
        _ if ticket.is_none() => Err(denied("draining", "the gateway goes away".to_owned(), Public::Draining)),
        (_, Some(limit)) => Err(denied("limit", limit.to_owned(), Public::NotAvailable)),
        (Err(error), None) => Err(denied("malformed_target", error.to_string(), Public::NotAllowed)),
        (Ok(_), None) if !gateway.state.current().serves(&request.agent.organisation) => {
            let detail = "the configuration has no such organisation".to_owned();
            Err(denied("organisation_not_served", detail, Public::NotAllowed))
        }
        (Ok(target), None) if request.token.as_ref().is_some_and(|token| !token.claims().covers(target)) => {
            Err(denied("token_target", "the token names other targets".to_owned(), Public::NotAllowed))
        }
        (Ok(target), None) => {
            let (snapshot, from) = (gateway.registry.current(), request.client.ip());
            match snapshot.decide(&request.principal, &request.agent, target, from, Timestamp::now()) {
                Decision::Allow(pass) => {
                    match gateway.quotas.forward(&gateway.limits(), &request.agent.organisation, &request.principal) {
                        Ok(counted) => Ok((pass, target, counted)),
                        Err(limit) => Err(denied("limit", limit.to_owned(), Public::NotAvailable)),
                    }
                }
                Decision::Deny(denial) => Err(denied(denial.reason.as_str(), denial.detail, Public::NotAllowed)),
            }
        }
    };
    let (pass, target, mut counted) = match decided {
        Ok(decided) => decided,
        Err((reason, detail, public)) => {
            debug!(reason, "denied a forward");
            gateway.forwards.denied(&request.agent, &about(&id, &request), reason);
            if let Err(error) = gateway.trail.deny(record, reason, &detail).await {
                debug!(error = %Chain(&error), "could not record a denial");
            }
            return answer.refuse(public).await;
        }
    };

    let unrecorded = gateway.unrecorded.token();
    let mut entry = match gateway.trail.open(record).await {
        Ok(entry) => entry,
        Err(error) => {
            debug!(error = %Chain(&error), "refused a forward because it could not be recorded");
            return answer.refuse(Public::NotAvailable).await;
        }
    };
    let listed = gateway.forwards.list(&request.agent, about(&id, &request), entry.counters());
    let revoked = no_longer_allowed(gateway, &request, target);
    tokio::pin!(revoked);
    let reached = tokio::select! {
        // First: what has been taken back by now is not even asked for.
        biased;
        reason = &mut revoked => {
            let detail = "the registry or the configuration changed while the forward was opened".to_owned();
            entry.finish(Ending::Denied { reason, detail });
            return answer.refuse(Public::NotAllowed).await;
        }
        reached = reach(gateway, &request, pass, &id, &mut entry) => reached,
        why = gateway.drain.cut() => {
            entry.finish(Ending::Failed { reason: why, detail: "it was not open yet".to_owned() });
            return answer.refuse(Public::Draining).await;
        }
        // The client is gone: the entry ends as abandoned, and a channel is closed when its confirmation comes.
        () = gone.cancelled() => return,
    };
    let (ride, far) = match reached {
        Ok(reached) => reached,
        Err(failure) => {
            let public = failure.public();
            listed.failed(failure.reason(), public == Public::NotAllowed);
            entry.finish(failure.ending());
            return answer.refuse(public).await;
        }
    };
    listed.by(ride.link());
    counted.opened();
    entry.established(None);
    let ticket = ticket.map(|mut ticket| {
        ticket.opened();
        ticket
    });
    let counters = entry.counters();
    // A session that is not read may keep this waiting.
    let accepted = tokio::select! {
        biased;
        reason = &mut revoked => Err(reason),
        why = gateway.drain.cut() => Err(why),
        near = answer.accept() => Ok(near),
    };
    let near = match accepted {
        Ok(Some(near)) => near,
        Ok(None) => return,
        Err(reason) => return entry.finish(counters.ended(reason)),
    };
    let stop = CancellationToken::new();
    let splice = splice::splice(near, far, &counters, gateway.limits().forward, &stop);
    tokio::pin!(splice);
    let cut = {
        let watch = apart(async {
            tokio::select! {
                reason = &mut revoked => reason,
                () = unrecorded.cancelled() => "audit_failed",
                why = gateway.drain.cut() => why,
            }
        });
        tokio::select! {
            // First: bytes that never end must not hide it.
            biased;
            why = watch => Ok(why),
            end = &mut splice => Err(end),
        }
    };
    let (reason, remains) = match cut {
        Ok(reason) => {
            stop.cancel();
            (reason, splice.await.1)
        }
        Err((end, remains)) => {
            let reason = match end {
                End::Clean => "eof",
                End::NearBroke(_) => "client_gone",
                // The link was cut with all of its organisation's, and that was noticed first.
                End::FarBroke(_) if !gateway.state.current().serves(&request.agent.organisation) => "revoked",
                End::FarBroke(_) => ride.link().broke_as(),
                End::Stalled => "stalled",
                End::Idle => "idle",
                End::Expired => "expired",
                End::Stopped => "gateway_stopped",
            };
            (reason, remains)
        }
    };
    entry.finish(counters.ended(reason));
    // It has ended: a drain gives it time for its goodbye, and does not count it as cut.
    let _leaving = gateway.drain.leave();
    drop(ticket);
    remains.leave().await;
}

/// What an operator is shown of a forward.
fn about(id: &ForwardId, request: &Request) -> About {
    About {
        forward: id.to_string(),
        principal: request.principal.to_string(),
        client: request.client.to_string(),
        door: request.door,
        target: request.target.as_ref().map_or_else(|_| request.asked.clone(), ToString::to_string),
    }
}

/// Waits until the registry or the configuration says no to what it has allowed, which it may have done since it was asked, or
/// until the token's time is over; which of them it was.
async fn no_longer_allowed(gateway: &Gateway, request: &Request, target: &Target) -> &'static str {
    let withdrawn = async {
        match &request.withdrawn {
            Some(withdrawn) => withdrawn.cancelled().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = no_longer_registered(gateway, request, target) => {}
        () = gateway.state.until(|state| !state.serves(&request.agent.organisation)) => {}
        () = withdrawn => {}
    }
    let over = request.token.as_ref().is_some_and(|token| token.claims().over() <= Timestamp::now());
    if over { "expired" } else { "revoked" }
}

async fn no_longer_registered(gateway: &Gateway, request: &Request, target: &Target) {
    let mut changed = gateway.registry.changed();
    let from = request.client.ip();
    let expires = match &request.token {
        Some(token) => Some(token.claims().over()),
        None => request.credential.as_ref().and_then(Credential::expires),
    };
    loop {
        let now = Timestamp::now();
        let snapshot = gateway.registry.current();
        let key_holds = request.credential.as_ref().is_none_or(|credential| {
            snapshot.admits_credential(&request.agent, credential, from, now).as_ref() == Ok(&request.principal)
        });
        let token_holds = request
            .token
            .as_ref()
            .is_none_or(|token| snapshot.admits_token(token, from, now).as_ref() == Ok(&request.principal));
        let decision = snapshot.decide(&request.principal, &request.agent, target, from, now);
        if !key_holds || !token_holds || matches!(decision, Decision::Deny(_)) {
            return;
        }
        tokio::select! {
            changed = changed.changed() => if changed.is_err() {
                // The registry is going away with the gateway, which ends the forward itself.
                return std::future::pending().await;
            },
            () = reached(expires, limits::CERTIFICATE_LOOK) => {}
        }
    }
}

/// Asks one link after another, until an agent has opened the forward or nobody is left to be asked.
async fn reach(
    gateway: &Gateway,
    request: &Request,
    pass: Pass,
    id: &ForwardId,
    entry: &mut Entry,
) -> Result<(Ride, Side), Failure> {
    let begun = time::Instant::now();
    let deadline = begun + limits::OPENING_TIMEOUT;
    let originator =
        Originator { forward: id.clone(), principal: request.principal.clone(), client: request.client.to_string() };
    let mut tried = Vec::new();
    let mut last = None;
    while let Some(ride) = next(gateway, request, &tried, begun + limits::LINK_PATIENCE).await {
        entry.served_by(Some(ride.link().peer.replica.clone()), None);
        let failure = match ask(gateway, &ride, &pass, &originator, id, entry.counters(), deadline).await {
            Ok(far) => return Ok((ride, far)),
            Err(failure) => failure,
        };
        debug!(reason = failure.reason(), replica = %ride.link().peer.replica, "an agent did not open a forward");
        // It has said so before we could hear it on the control channel.
        if failure.is_draining() {
            ride.link().retire(Standing::Draining);
        }
        tried.push(ride.link().clone());
        let recorded = record_attempt(gateway, request, id, ride.link(), &failure).await;
        let spent = tried.len() >= limits::ATTEMPTS || time::Instant::now() >= deadline;
        if spent || !recorded || failure.verdict() == Verdict::Final {
            return Err(failure);
        }
        last = Some(failure);
    }
    Err(last.unwrap_or(if gateway.drain.begun().is_cancelled() { Failure::Leaving } else { Failure::NoLink }))
}

/// The link to be asked next. Where the agent has none at all, one is waited for, unless this gateway goes away: then agents
/// link to others.
async fn next(gateway: &Gateway, request: &Request, tried: &[Arc<Link>], patience: time::Instant) -> Option<Ride> {
    loop {
        match gateway.roster.pick(&request.agent, tried) {
            Ok(ride) => return Some(ride),
            Err(NoRide::Tried) => return None,
            Err(NoRide::Unlinked(arrival)) => tokio::select! {
                waited = timeout_at(patience, arrival.wait()) => waited.ok()?,
                () = gateway.drain.begun().cancelled() => return None,
            },
        }
    }
}

/// Asks one agent.
async fn ask(
    gateway: &Gateway,
    ride: &Ride,
    pass: &Pass,
    originator: &Originator,
    id: &ForwardId,
    counters: Arc<Counters>,
    deadline: time::Instant,
) -> Result<Side, Failure> {
    if ride.link().live() > gateway.limits().forwards_per_link {
        return Err(Failure::Full);
    }
    let begun = time::Instant::now();
    match timeout_at(deadline.min(begun + limits::ANSWER_TIMEOUT), ride.open(pass, originator, id, counters)).await {
        Ok(opened) => opened.map_err(Failure::Refused),
        Err(_) => Err(Failure::Unanswered { seconds: begun.elapsed().as_secs() }),
    }
}

/// Records an attempt that failed; false if that could not be done. What a policy refuses is no failure: the forward's own
/// end tells it.
async fn record_attempt(gateway: &Gateway, request: &Request, id: &ForwardId, link: &Link, failure: &Failure) -> bool {
    if failure.public() == Public::NotAllowed {
        return true;
    }
    let event = Event::new(Kind::ForwardAttempt)
        .forward(id)
        .organisation(&request.agent.organisation)
        .agent(&request.agent.agent)
        .replica(&link.peer.replica)
        .key(link.peer.key)
        .client(link.peer.address)
        .reason(failure.reason())
        .detail(failure.detail());
    let recorded = gateway.trail.note(event).await;
    if let Err(error) = &recorded {
        debug!(error = %Chain(error), "a forward is not tried elsewhere, because that could not be recorded");
    }
    recorded.is_ok()
}

/// Why a forward did not come about once it was allowed and recorded.
#[derive(Debug)]
enum Failure {
    /// No link to ask.
    NoLink,
    /// No link to ask, and none will come, because this gateway goes away.
    Leaving,
    /// The link has no room.
    Full,
    /// The agent has not answered for so long.
    Unanswered { seconds: u64 },
    /// The agent has refused, or its link was lost.
    Refused(OpenError),
}

/// Whether another link may do better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Retry,
    Final,
}

impl Failure {
    /// A denial is final. So is what no replica would do better, and a reason that this version does not know: it may be a
    /// denial. Another link may help where one was lost, is short of something, or cannot reach the target from where it is.
    fn verdict(&self) -> Verdict {
        match self {
            Self::Full | Self::Unanswered { .. } | Self::Refused(OpenError::Gone) => Verdict::Retry,
            Self::NoLink | Self::Leaving => Verdict::Final,
            Self::Refused(OpenError::Refused { code, .. }) => match RefusalCode::from_wire(*code) {
                Some(
                    RefusalCode::Draining
                    | RefusalCode::Limit
                    | RefusalCode::Unrecorded
                    | RefusalCode::ConnectFailed
                    | RefusalCode::Unresolved,
                ) => Verdict::Retry,
                Some(RefusalCode::Denied | RefusalCode::Malformed) | None => Verdict::Final,
            },
        }
    }

    fn is_draining(&self) -> bool {
        matches!(self, Self::Refused(OpenError::Refused { code, .. }) if *code == RefusalCode::Draining as u32)
    }

    /// What an outsider is told of it.
    fn public(&self) -> Public {
        match self {
            Self::Refused(OpenError::Refused { code, .. }) if *code == RefusalCode::Denied as u32 => Public::NotAllowed,
            Self::Leaving => Public::Draining,
            Self::Unanswered { .. } => Public::TimedOut,
            _ => Public::NotAvailable,
        }
    }

    /// The reason as the audit writes it.
    fn reason(&self) -> &'static str {
        match self {
            Self::NoLink => "no_link",
            Self::Leaving => "draining",
            Self::Full => "limit",
            Self::Unanswered { .. } => "timeout",
            Self::Refused(OpenError::Gone) => "link_lost",
            Self::Refused(OpenError::Refused { code, .. }) => {
                RefusalCode::from_wire(*code).map_or("agent_refused", RefusalCode::as_str)
            }
        }
    }

    fn detail(&self) -> String {
        match self {
            Self::NoLink => format!("the agent was not linked for {} s", limits::LINK_PATIENCE.as_secs()),
            Self::Leaving => "the gateway goes away, and the agent is not linked".to_owned(),
            Self::Full => "forwards_per_link".to_owned(),
            Self::Unanswered { seconds } => format!("the agent has not answered within {seconds} s"),
            Self::Refused(OpenError::Gone) => String::new(),
            Self::Refused(OpenError::Refused { words, .. }) => words.clone(),
        }
    }

    fn ending(&self) -> Ending {
        let (reason, detail) = (self.reason(), self.detail());
        match self.public() {
            Public::NotAllowed => Ending::Denied { reason, detail },
            Public::Draining | Public::TimedOut | Public::NotAvailable => Ending::Failed { reason, detail },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: u32) -> Failure {
        Failure::Refused(OpenError::Refused { code, words: "words".to_owned() })
    }

    #[test]
    fn a_denial_is_final_and_so_is_what_nobody_knows() {
        for code in [
            RefusalCode::Denied as u32,
            RefusalCode::Malformed as u32,
            // The codes of RFC 4254 and one of a later version.
            0,
            1,
            2,
            3,
            4,
            0xFE00_00FF,
            u32::MAX,
        ] {
            assert_eq!(refused(code).verdict(), Verdict::Final, "{code:#x}");
        }
        assert_eq!(Failure::NoLink.verdict(), Verdict::Final);
        assert_eq!((Failure::Leaving.verdict(), Failure::Leaving.public()), (Verdict::Final, Public::Draining));
    }

    #[test]
    fn loss_shortage_drain_and_failures_to_connect_are_tried_elsewhere() {
        for failure in [
            Failure::Full,
            Failure::Unanswered { seconds: 25 },
            Failure::Refused(OpenError::Gone),
            refused(RefusalCode::Draining as u32),
            refused(RefusalCode::Limit as u32),
            refused(RefusalCode::Unrecorded as u32),
            refused(RefusalCode::ConnectFailed as u32),
            refused(RefusalCode::Unresolved as u32),
        ] {
            assert_eq!(failure.verdict(), Verdict::Retry, "{failure:?}");
            assert!(matches!(failure.ending(), Ending::Failed { .. }), "{failure:?}");
        }
    }

    #[test]
    fn only_a_denial_reads_as_one_outside_and_in_the_trail() {
        for code in 0xFE00_0000..0xFE00_0010 {
            let failure = refused(code);
            let denied = code == RefusalCode::Denied as u32;
            assert_eq!(failure.public() == Public::NotAllowed, denied, "{code:#x}");
            assert_eq!(matches!(failure.ending(), Ending::Denied { .. }), denied, "{code:#x}");
            assert_eq!(failure.is_draining(), code == RefusalCode::Draining as u32, "{code:#x}");
        }
    }
}

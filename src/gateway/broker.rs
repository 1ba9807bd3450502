//! The one way from a request to a stream, whatever the door: decide → record → pick a link → open → accept → splice →
//! record the end.

use std::sync::PoisonError;
use std::time::Instant;

use jiff::Timestamp;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::Gateway;
use crate::audit::{self, Ending};
use crate::chain::Chain;
use crate::drain::Ticket;
use crate::identity::{AgentName, Fingerprint, Principal, PrincipalId};
use crate::limits;
use crate::policy::Decision;
use crate::registry::Registry;
use crate::target::{Target, TargetError};
use crate::tunnel::splice::{self, End, Side};
use crate::tunnel::ssh::OpenError;
use crate::tunnel::wire::{ForwardId, Originator, RefusalCode};

/// What a door asks for.
pub(super) struct Request {
    /// Who is asking; the door has made sure of that.
    pub(super) principal: PrincipalId,
    /// The key it was made sure with, where there is one.
    pub(super) key: Option<Fingerprint>,
    /// Which agent is to serve it.
    pub(super) agent: AgentName,
    /// Where to, or why that could not be read.
    pub(super) target: Result<Target, TargetError>,
    /// The same as it was asked for.
    pub(super) asked: String,
    /// Where the principal connects from.
    pub(super) client: String,
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

/// What an outsider is told: one of these, and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Public {
    /// The policy of either side says no.
    NotAllowed,
    /// This gateway goes away; another one may serve.
    Draining,
    /// Anything else.
    NotAvailable,
}

impl Public {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::NotAllowed => "not allowed",
            Self::Draining | Self::NotAvailable => "not available",
        }
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
        key: request.key,
        client: Some(request.client.clone()),
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
        (Ok(target), None) => {
            match gateway.registry.current().decide(&request.principal, &request.agent, target, Timestamp::now()) {
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
            if let Err(error) = gateway.trail.deny(record, reason, &detail).await {
                debug!(error = %Chain(&error), "could not record a denial");
            }
            return answer.refuse(public).await;
        }
    };

    let unrecorded = gateway.unrecorded.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut entry = match gateway.trail.open(record).await {
        Ok(entry) => entry,
        Err(error) => {
            debug!(error = %Chain(&error), "refused a forward because it could not be recorded");
            return answer.refuse(Public::NotAvailable).await;
        }
    };
    let Some(ride) = gateway.roster.pick(&request.agent) else {
        entry.finish(Ending::Failed { reason: "no_link", detail: "the agent is not linked".to_owned() });
        return answer.refuse(Public::NotAvailable).await;
    };
    entry.served_by(Some(ride.link().replica.clone()), None);
    if ride.link().live() > gateway.limits().forwards_per_link {
        entry.finish(Ending::Failed { reason: "limit", detail: "forwards_per_link".to_owned() });
        return answer.refuse(Public::NotAvailable).await;
    }
    let originator =
        Originator { forward: id.clone(), principal: request.principal.clone(), client: request.client.clone() };
    let revoked = no_longer_allowed(gateway, &request, target);
    tokio::pin!(revoked);
    let opened = tokio::select! {
        // First: what has been taken back by now is not even asked for.
        biased;
        () = &mut revoked => {
            let detail = "the registry or the configuration changed while the forward was opened".to_owned();
            entry.finish(Ending::Denied { reason: "revoked", detail });
            return answer.refuse(Public::NotAllowed).await;
        }
        opened = timeout(limits::ANSWER_TIMEOUT, ride.open(pass, &originator, &id)) => opened,
        why = gateway.drain.cut() => {
            entry.finish(Ending::Failed { reason: why, detail: "it was not open yet".to_owned() });
            return answer.refuse(Public::Draining).await;
        }
        // The client is gone: the entry ends as abandoned, and the channel is closed when its confirmation comes.
        () = gone.cancelled() => return,
    };
    let channel = match opened {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => {
            let (ending, public) = refusal(error);
            entry.finish(ending);
            return answer.refuse(public).await;
        }
        Err(_) => {
            let detail = format!("the agent has not answered within {} s", limits::ANSWER_TIMEOUT.as_secs());
            entry.finish(Ending::Failed { reason: "timeout", detail });
            return answer.refuse(Public::NotAvailable).await;
        }
    };
    counted.opened();
    entry.established(None);
    let _ticket = ticket.map(|mut ticket| {
        ticket.opened();
        ticket
    });
    let Some(near) = answer.accept().await else { return };

    let counters = entry.counters();
    let stop = CancellationToken::new();
    let splice = splice::splice(near, Side::Channel(channel), &counters, gateway.limits().forward, &stop);
    tokio::pin!(splice);
    let cut = tokio::select! {
        end = &mut splice => Err(end),
        () = &mut revoked => Ok("revoked"),
        () = unrecorded.cancelled() => Ok("audit_failed"),
        why = gateway.drain.cut() => Ok(why),
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
                End::FarBroke(_) if ride.link().client().control().gone().is_cancelled() => "link_lost",
                End::FarBroke(_) => "target_broke",
                End::Stalled => "stalled",
                End::Idle => "idle",
                End::Expired => "expired",
                End::Stopped => "gateway_stopped",
            };
            (reason, remains)
        }
    };
    entry.finish(counters.ended(reason));
    remains.leave().await;
}

/// Waits until the registry or the configuration says no to what it has allowed, which it may have done since it was asked.
async fn no_longer_allowed(gateway: &Gateway, request: &Request, target: &Target) {
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
}

async fn no_longer_registered(gateway: &Gateway, request: &Request, target: &Target) {
    let mut changed = gateway.registry.changed();
    loop {
        let now = Timestamp::now();
        let snapshot = gateway.registry.current();
        let key_holds = match &request.key {
            Some(key) => {
                snapshot.admits(&request.agent, key, now).is_ok_and(|principal| principal == request.principal)
            }
            None => true,
        };
        let decision = snapshot.decide(&request.principal, &request.agent, target, now);
        if !key_holds || matches!(decision, Decision::Deny(_)) {
            return;
        }
        if changed.changed().await.is_err() {
            // The registry is going away with the gateway, which ends the forward itself.
            return std::future::pending().await;
        }
    }
}

fn refusal(error: OpenError) -> (Ending, Public) {
    match error {
        OpenError::Refused { code, words } => match RefusalCode::from_wire(code) {
            Some(RefusalCode::Denied) => {
                (Ending::Denied { reason: RefusalCode::Denied.as_str(), detail: words }, Public::NotAllowed)
            }
            Some(code) => (Ending::Failed { reason: code.as_str(), detail: words }, Public::NotAvailable),
            None => (Ending::Failed { reason: "agent_refused", detail: words }, Public::NotAvailable),
        },
        OpenError::Gone => (Ending::Failed { reason: "link_lost", detail: String::new() }, Public::NotAvailable),
    }
}

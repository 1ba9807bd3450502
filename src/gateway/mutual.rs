//! Clients' TLS certificates at the gateway: judged when somebody comes, and again for as long as they stay.
//!
//! Promised: who is linked or logged in could come in now with what they have shown then. What they have shown is judged anew
//! whenever the registry or the configuration changes, when the certificate, its CA or a revocation list ends, and no later
//! than that; the one whose certificate is good no more is cut. Where a certificate must be shown, a connection in clear is
//! turned away before anything else is done for it.
//!
//! What waits on what: one wait beside each link and session, for the registry, the configuration and the clock; one task
//! ([`watch`]) for the operator to be told of CAs and lists that end.

use std::sync::Arc;

use jiff::Timestamp;
use tracing::warn;

use super::live::State;
use super::{Config, Gateway};
use crate::identity::{AgentName, OrganisationId, PrincipalId};
use crate::limits;
use crate::registry::mutual::{Listener, Shown};
use crate::registry::{Registry, Snapshot, expiry};
use crate::task::reached;
use crate::tls::judge::Flaw;
use crate::tls::{ClientAuth, PeerChain, Trust};

/// Whose certificate is judged.
#[derive(Debug, Clone)]
pub(super) enum Whose {
    /// An agent's, on the way to a link.
    Agent(AgentName),
    /// A principal's, besides what it has logged in with.
    Principal(OrganisationId, PrincipalId),
}

/// A client as far as its certificate goes.
#[derive(Debug, Clone)]
pub(super) struct Visitor {
    /// By which main listener it has come.
    pub(super) listener: usize,
    /// What it has shown.
    pub(super) shown: Option<PeerChain>,
    /// Who it is.
    pub(super) whose: Whose,
}

impl Visitor {
    /// Judges it as things are.
    ///
    /// # Errors
    /// If more is wanted of it than it has shown.
    pub(super) fn judge(&self, gateway: &Gateway, now: Timestamp) -> Result<Shown, Flaw> {
        self.judge_by(&gateway.state.current(), &gateway.registry.current(), now)
    }

    fn judge_by(&self, state: &State, snapshot: &Snapshot, now: Timestamp) -> Result<Shown, Flaw> {
        let nobody = Trust::default();
        let listener =
            state.mutual(self.listener).unwrap_or(Listener { client_auth: ClientAuth::Strict, trust: &nobody });
        match &self.whose {
            Whose::Agent(name) => snapshot.link_certificate(name, listener, self.shown.as_ref(), now),
            Whose::Principal(organisation, principal) => {
                snapshot.principal_certificate(organisation, principal, listener, self.shown.as_ref(), now)
            }
        }
    }

    /// Waits until it would not be let in any more. Returns why.
    pub(super) async fn unwelcome(&self, gateway: &Gateway) -> Flaw {
        let mut registered = gateway.registry.changed();
        loop {
            registered.mark_unchanged();
            let ((state, mut configured), now) = (gateway.state.follow(), Timestamp::now());
            let shown = match self.judge_by(&state, &gateway.registry.current(), now) {
                Ok(shown) => shown,
                Err(flaw) => return flaw,
            };
            // The registry tells of the ends of its own.
            let ends = state.mutual(self.listener).and_then(|listener| listener.trust.next_end(now));
            let next = match shown {
                Shown::Unasked | Shown::Missing => None,
                Shown::Good(_) => shown.expires().into_iter().chain(ends).min(),
            };
            tokio::select! {
                changed = registered.changed() => if changed.is_err() {
                    // The registry is going away with the gateway, which ends everything itself.
                    return std::future::pending().await;
                },
                changed = configured.changed() => if changed.is_err() {
                    return std::future::pending().await;
                },
                () = reached(next, limits::CERTIFICATE_LOOK) => {}
            }
        }
    }
}

/// Whether a main listener takes nobody who comes without TLS.
pub(super) fn refuses_clear(state: &State, listener: usize) -> bool {
    state.mutual(listener).is_none_or(|listener| listener.client_auth == ClientAuth::Strict)
}

/// Why a gateway with this configuration and registry would refuse everybody somewhere, or ask for what nobody could judge.
pub(super) fn contradiction(config: &Config, registry: &Snapshot) -> Option<String> {
    let registered = registry.client_trusts().any(|(_, trust)| !trust.is_empty());
    let asks = |listener: &&super::Listener| listener.client_auth != ClientAuth::Off;
    config.listen.iter().filter(asks).find(|listener| listener.client_trust.is_empty() && !registered).map(|listener| {
        format!(
            "client_auth = \"{}\" at the listener {} without a CA: no certificate could be good there; name one as client_ca, or \
             register one as organisations/ORGANISATION/client-ca/NAME.pem",
            listener.client_auth, listener.address
        )
    })
}

/// Tells the operator of client CAs and revocation lists that end, once each time there is something else to say, until the
/// gateway stops. Waits for the registry, the configuration and the clock.
pub(super) async fn watch(gateway: Arc<Gateway>) {
    let stop = gateway.tasks.stopping().clone();
    let mut registered = gateway.registry.changed();
    let mut said: Vec<String> = Vec::new();
    loop {
        registered.mark_unchanged();
        let ((state, mut configured), now) = (gateway.state.follow(), Timestamp::now());
        let (warnings, next) = warnings(&state, &gateway.registry.current(), now);
        for warning in warnings.iter().filter(|warning| !said.contains(*warning)) {
            warn!("{warning}");
        }
        said = warnings;
        tokio::select! {
            () = stop.cancelled() => return,
            () = expiry::until(next, now) => {}
            changed = registered.changed() => if changed.is_err() { return },
            changed = configured.changed() => if changed.is_err() { return },
        }
    }
}

/// What is to be said of client CAs and their lists, and when that changes next.
fn warnings(state: &State, registry: &Snapshot, now: Timestamp) -> (Vec<String>, Option<Timestamp>) {
    let of_listeners = state.client_trusts().map(|(address, trust)| (format!("listener {address}"), trust));
    let of_registry = registry.client_trusts().map(|(id, trust)| (format!("organisation {id}"), trust));
    let (mut warnings, mut next) = (Vec::new(), None::<Timestamp>);
    for (whose, trust) in of_listeners.chain(of_registry) {
        for end in trust.ends() {
            warnings.extend(end.warning(now).map(|warning| format!("{whose}: {warning}")));
            next = [next, end.next(now)].into_iter().flatten().min();
        }
    }
    (warnings, next)
}

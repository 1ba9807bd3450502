//! Clients' TLS certificates at the gateway: judged when somebody comes, and again for as long as they stay.
//!
//! Promised: who is linked or logged in could come in now with what they have shown then. What they have shown is judged anew
//! whenever the registry or the configuration changes, when the certificate, its CA or a revocation list ends, and no later
//! than that; the one whose certificate is good no more is cut. Where a certificate must be shown, a connection in clear is
//! turned away before anything else is done for it.
//!
//! What waits on what: one wait beside each link and session, for the registry, the configuration and the clock; one task
//! ([`watch`]) for the operator to be told of CAs and lists that end.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use tracing::warn;

use super::live::State;
use super::{Config, Gateway};
use crate::identity::{AgentName, OrganisationId, PrincipalId};
use crate::limits;
use crate::registry::mutual::{Listener, Shown};
use crate::registry::{Refusal, Registry, Snapshot, expiry};
use crate::task::reached;
use crate::tls::judge::{self, Flaw};
use crate::tls::{ClientAuth, ClientPolicy, PeerChain, Trust};

/// Whose certificate is judged.
#[derive(Debug, Clone)]
pub(super) enum Whose {
    /// An agent's, on the way to a link.
    Agent(AgentName),
    /// A principal's, besides what it has logged in with.
    Principal(OrganisationId, PrincipalId),
    /// A principal's that shows nothing else, from this address and for this agent.
    Alone(AgentName, PrincipalId, IpAddr),
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
            Whose::Alone(agent, principal, from) => {
                let shown = self.shown.as_ref().ok_or(Flaw::Missing)?;
                match snapshot.admits_client_certificate(agent, listener, shown, *from, now) {
                    Ok((named, certificate)) if named == *principal => Ok(Shown::Good(certificate)),
                    Err(Refusal::ClientCertificate(flaw)) => Err(flaw),
                    Ok(_) | Err(_) => Err(Flaw::OtherName),
                }
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

/// What is asked of clients in the TLS handshake at a main listener, as things are. Where one must be shown, anything that
/// leads to none of the client CAs, or is good no more, ends the handshake; whose it is, is judged when that is claimed.
pub(super) fn client_policy(gateway: &Arc<Gateway>, listener: usize) -> ClientPolicy {
    let state = gateway.state.current();
    let here = state.mutual(listener).map_or(ClientAuth::Strict, |listener| listener.client_auth);
    let anywhere = gateway.registry.current().strictest_client_auth().max(here);
    // Not kept alive by what it keeps.
    let gateway = Arc::downgrade(gateway);
    match anywhere {
        ClientAuth::Off => ClientPolicy::Off,
        _ if here == ClientAuth::Strict => ClientPolicy::Require(judge::gate(move |chain| {
            let Some(gateway) = gateway.upgrade() else { return Err(Flaw::Invalid) };
            let (state, registry) = (gateway.state.current(), gateway.registry.current());
            let here = state.mutual(listener).map(|listener| listener.trust);
            let trusts = here.into_iter().chain(registry.client_trusts().map(|(_, trust)| trust));
            judge::vouch_any(trusts, chain, Timestamp::now()).map(drop)
        })),
        ClientAuth::Loose | ClientAuth::Strict => ClientPolicy::Ask,
    }
}

/// Whether a main listener takes nobody who comes without TLS.
pub(super) fn refuses_clear(state: &State, listener: usize) -> bool {
    state.mutual(listener).is_none_or(|listener| listener.client_auth == ClientAuth::Strict)
}

/// Why a gateway with this configuration and registry would refuse everybody somewhere, or ask for what nobody could judge.
pub(super) fn contradiction(config: &Config, registry: &Snapshot) -> Option<String> {
    if config.certificates.is_none() {
        let strict = |organisation: &&super::Organisation| registry.client_auth(&organisation.id) == ClientAuth::Strict;
        if let Some(organisation) = config.organisations.iter().find(strict) {
            return Some(format!(
                "client_auth = \"strict\" for the organisation {} in the registry, but no [[certificate]] of the gateway's own: \
                 without TLS nobody could show one, and none of its agents could link",
                organisation.id
            ));
        }
    }
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

//! What an agent goes by, as one value that a reload replaces; and what differs from one to the next.
//!
//! Promised: pure functions, no I/O, no waiting. Every forward is decided on the newest state, and decided again on each
//! later one, by where it leads already: nothing is looked up again. The same is done at each moment that a state names,
//! when something begins or ceases to hold ([`State::changes_between`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::{Config, Limits, Listen, Orchestrator, OrchestratorAuthority};
use crate::identity::certificate::{Certificate, Flaw, Trust, Use};
use crate::identity::{
    Credential, Fingerprint, OrganisationId, Principal, PrincipalId, PrivateKey, PublicKey, ReplicaId,
};
use crate::limits;
use crate::policy::guard::Guard;
use crate::policy::rule::{Allowlist, PrincipalPattern};
use crate::policy::window::Window;
use crate::reload::Changes;
use crate::resolve::Resolver;
use crate::target::Target;
use crate::tls::Identity;
use crate::tunnel::admit::penalty::Terms;
use crate::tunnel::connect::Egress;
use crate::tunnel::dial::{Tls, Way};

/// What holds now. It does not change.
pub(super) struct State {
    /// The name of this process among those that run the same agent.
    pub(super) replica: ReplicaId,
    /// The host key: the agent's identity.
    pub(super) key: PrivateKey,
    /// How it leaves its network.
    pub(super) egress: Egress,
    /// How long forwards that run may go on after the signal to end.
    pub(super) drain: Duration,
    /// The agent's own gateways, proxy and listener as they are written, which no forward may reach.
    pub(super) ways_out: HashSet<Target>,
    /// How much the gateways may have.
    pub(super) limits: Limits,
    /// How the names of targets are looked up, and what is known of them already.
    pub(super) resolver: Arc<Resolver>,
    /// Whether gateways may ask for an examination.
    pub(super) remote_doctor: bool,
    /// The listener, if there is one.
    listen: Option<Listen>,
    /// What is held against those who come there.
    penalties: Terms,
    organisations: HashMap<OrganisationId, Served>,
}

/// One organisation, ready for lookups.
pub(super) struct Served {
    orchestrators: HashMap<Fingerprint, Orchestrator>,
    authorities: Vec<OrchestratorAuthority>,
    pub(super) allow: Allowlist,
    /// How TLS is made with its gateways, if it is.
    tls: Option<Tls>,
}

/// A key that lets somebody log in for an organisation.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) organisation: &'a OrganisationId,
    pub(super) key: &'a PublicKey,
    /// Whether it is that of a CA.
    pub(super) ca: bool,
    pub(super) window: &'a Window,
}

/// For whom somebody may speak; for itself alone, where there is none.
pub(super) type Asserts<'a> = Option<&'a [PrincipalPattern]>;

/// Why a key may not speak for whom it claims to: a reason for the trail, and words for the operator.
pub(super) type NotAsserted = (&'static str, &'static str);

impl State {
    pub(super) fn new(config: &Config, resolver: Arc<Resolver>) -> Self {
        let ways_out = config.ways_out();
        let organisations = config
            .organisations
            .iter()
            .map(|organisation| {
                let orchestrators = organisation
                    .orchestrators
                    .iter()
                    .map(|orchestrator| (orchestrator.key.fingerprint(), orchestrator.clone()))
                    .collect();
                let (authorities, allow) = (organisation.authorities.clone(), organisation.allow.clone());
                let tls = organisation.tls.clone();
                (organisation.id.clone(), Served { orchestrators, authorities, allow, tls })
            })
            .collect();
        Self {
            replica: config.replica.clone(),
            key: config.key.clone(),
            egress: config.egress.clone(),
            drain: config.drain,
            ways_out,
            limits: config.limits,
            resolver,
            remote_doctor: config.remote_doctor,
            listen: config.listen.clone(),
            penalties: config.penalties.clone(),
            organisations,
        }
    }

    /// How the gateways of an organisation are dialled.
    pub(super) fn way(&self, organisation: &OrganisationId) -> Way {
        let tls = self.tls(organisation).cloned();
        Way { egress: self.egress.clone(), tls }
    }

    /// Whether the agent has a listener, which accepts from there.
    pub(super) fn listens_to(&self, client: IpAddr) -> bool {
        self.listen.as_ref().is_some_and(|listen| listen.accepts(client))
    }

    /// Whether faults are held against an address.
    pub(super) fn blames(&self, client: IpAddr) -> bool {
        self.penalties.hold(client)
    }

    /// What lets somebody log in, and when: the orchestrators' keys and CAs.
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        self.organisations.iter().flat_map(|(organisation, served)| {
            let entry = |key, ca, window| Entry { organisation, key, ca, window };
            let keys = served.orchestrators.values().map(move |one| entry(&one.key, false, &one.window));
            keys.chain(served.authorities.iter().map(move |one| entry(&one.key, true, &one.window)))
        })
    }

    /// What holds for whoever logged in for an organisation, from the address `from` where that is known, if that may at the
    /// time `now`: the organisation, and for whom they may speak.
    ///
    /// # Errors
    /// If they may not, with the word that the audit uses.
    pub(super) fn orchestrator(
        &self,
        organisation: &OrganisationId,
        credential: &Credential,
        from: Option<IpAddr>,
        now: Timestamp,
    ) -> Result<(&Served, Asserts<'_>), &'static str> {
        let served = self.organisations.get(organisation).ok_or("unknown_key")?;
        let asserts = match credential {
            Credential::Key(key) => {
                let orchestrator = served.orchestrators.get(key).ok_or("unknown_key")?;
                orchestrator.window.at(now).map_err(|closed| closed.reason().as_str())?;
                orchestrator.asserts.as_deref()
            }
            Credential::Certificate(certificate) => {
                Some(self.certified(organisation, served, certificate, from, now)?.asserts.as_slice())
            }
        };
        Ok((served, asserts))
    }

    /// The CA that lets the holder of a certificate log in.
    fn certified<'a>(
        &self,
        organisation: &OrganisationId,
        served: &'a Served,
        certificate: &Certificate,
        from: Option<IpAddr>,
        now: Timestamp,
    ) -> Result<&'a OrchestratorAuthority, &'static str> {
        let authority = served.authorities.iter().find(|authority| authority.key == *certificate.authority());
        let authority = authority.ok_or(Flaw::UnknownAuthority.as_str())?;
        authority.window.at(now).map_err(|_| Flaw::AuthorityExpired.as_str())?;
        let trust = Trust { authority: &authority.key, revocations: &authority.revocations };
        certificate.judge(trust, Use::Login(from), now).map_err(Flaw::as_str)?;
        // Exactly: one that is good for two organisations would be good for the wrong one.
        if !matches!(certificate.principals(), [only] if only == organisation.as_str()) {
            return Err(Flaw::Principal.as_str());
        }
        let key = certificate.subject().fingerprint();
        if self.organisations.iter().any(|(id, served)| id != organisation && served.orchestrators.contains_key(&key)) {
            return Err("other_organisation");
        }
        Ok(authority)
    }

    /// Whether certificates are accepted for this organisation.
    pub(super) fn has_authority(&self, organisation: &OrganisationId) -> bool {
        self.organisations.get(organisation).is_some_and(|served| !served.authorities.is_empty())
    }

    /// Whether certificates are accepted for any organisation.
    pub(super) fn has_any_authority(&self) -> bool {
        self.organisations.values().any(|served| !served.authorities.is_empty())
    }

    /// How long from `now` on the clock need not be looked at; for as long as this state holds, if it gives no times. Never
    /// longer than [`limits::CLOCK_LOOK`], because clocks are set.
    pub(super) fn next_look(&self, now: Timestamp) -> Option<Duration> {
        self.next_change(Timestamp::MIN)?;
        let until = |at: Timestamp| Duration::try_from(at.duration_since(now)).unwrap_or_default();
        Some(self.next_change(now).map_or(limits::CLOCK_LOOK, until).min(limits::CLOCK_LOOK))
    }

    /// Whether something begins or ceases to hold between two moments, whichever of them is the later.
    pub(super) fn changes_between(&self, one: Timestamp, other: Timestamp) -> bool {
        self.next_change(one.min(other)).is_some_and(|at| at <= one.max(other))
    }

    /// The first moment after `after` at which a rule or a key begins or ceases to hold.
    fn next_change(&self, after: Timestamp) -> Option<Timestamp> {
        let organisations = self.organisations.values();
        let changes = organisations.flat_map(|served| {
            let of_keys = served.orchestrators.values().flat_map(|orchestrator| orchestrator.window.edges());
            let of_authorities = served.authorities.iter().flat_map(|authority| authority.window.edges());
            of_keys.chain(of_authorities).filter(|at| *at > after).chain(served.allow.next_change(after))
        });
        changes.min()
    }

    /// Whether this credential may log in for this organisation from that address at the time `now`; if not, the word that the
    /// audit uses.
    pub(super) fn admits(
        &self,
        organisation: &OrganisationId,
        credential: &Credential,
        from: Option<IpAddr>,
        now: Timestamp,
    ) -> Result<(), &'static str> {
        let Some(served) = self.organisations.get(organisation) else { return Err("unknown_organisation") };
        let key = match credential {
            Credential::Key(key) if !served.orchestrators.contains_key(key) => key,
            _ => return self.orchestrator(organisation, credential, from, now).map(drop),
        };
        let elsewhere = self.organisations.values().any(|served| served.orchestrators.contains_key(key));
        Err(if elsewhere { "other_organisation" } else { "unknown_key" })
    }

    /// Whether a link for an organisation that was made under `other` is made as one would be now, so that it need not be
    /// replaced.
    pub(super) fn same_identity(&self, other: &Self, organisation: &OrganisationId) -> bool {
        let certificate = |state: &Self| state.tls(organisation).and_then(Tls::identity).cloned();
        self.replica == other.replica
            && self.key.public() == other.key.public()
            && certificate(self) == certificate(other)
    }

    /// Whether a dial for an organisation would take the same way and introduce itself alike.
    pub(super) fn same_way(&self, other: &Self, organisation: &OrganisationId) -> bool {
        self.same_identity(other, organisation)
            && self.egress == other.egress
            && self.tls(organisation) == other.tls(organisation)
    }

    fn tls(&self, organisation: &OrganisationId) -> Option<&Tls> {
        self.organisations.get(organisation)?.tls.as_ref()
    }

    /// The certificates that are shown to organisations' gateways.
    pub(super) fn certificates(&self) -> impl Iterator<Item = (&OrganisationId, &Identity)> {
        self.organisations.iter().filter_map(|(id, served)| Some((id, served.tls.as_ref()?.identity()?)))
    }

    /// Whether a forward that was permitted to `addresses` would be still, at the time `now`.
    ///
    /// # Errors
    /// If it would not, with the word that the audit uses for what has ended it ([`lapse`]).
    pub(super) fn allows(
        &self,
        case: &Case<'_>,
        addresses: &[SocketAddr],
        guard: &Guard,
        now: Timestamp,
    ) -> Result<(), &'static str> {
        let orchestrator = self.orchestrator(case.organisation, case.credential, case.from, now);
        let (served, asserts) = orchestrator.map_err(lapse)?;
        if speaker(asserts, case.credential, case.claimed).as_ref() != Ok(case.principal) {
            return Err(REVOKED);
        }
        let decision = served.allow.reconsider(case.principal, case.target, addresses, guard, now);
        decision.map_err(|denial| lapse(denial.reason.as_str()))
    }
}

/// What ends something that ran, for the audit, by the reason for which it would be refused now: the time, or somebody's
/// will.
pub(super) fn lapse(refused: &'static str) -> &'static str {
    let time = ["expired", "not_yet_valid"];
    let of = |word: &&&str| refused == **word || refused.starts_with("certificate_") && refused.ends_with(**word);
    time.iter().find(of).unwrap_or(&REVOKED)
}

/// What the audit calls the end of something that the configuration no longer allows.
pub(super) const REVOKED: &str = "revoked";

/// A forward that was permitted, with all that the permit rested on but its addresses.
pub(super) struct Case<'a> {
    pub(super) organisation: &'a OrganisationId,
    /// Of the orchestrator that asked.
    pub(super) credential: &'a Credential,
    /// Where it asked from, if that is known.
    pub(super) from: Option<IpAddr>,
    /// For whom it said it speaks.
    pub(super) claimed: Option<&'a PrincipalId>,
    /// For whom it spoke.
    pub(super) principal: &'a Principal,
    pub(super) target: &'a Target,
}

/// For whom an orchestrator speaks that names this principal, or none.
///
/// # Errors
/// If it may not.
pub(super) fn speaker(
    asserts: Asserts<'_>,
    credential: &Credential,
    claimed: Option<&PrincipalId>,
) -> Result<Principal, NotAsserted> {
    match (claimed, asserts) {
        (Some(claimed), Some(asserts)) => {
            let principal = Principal::Named(claimed.clone());
            if asserts.iter().any(|pattern| pattern.matches(&principal)) {
                Ok(principal)
            } else {
                Err(("principal_not_asserted", "the key may not speak for it"))
            }
        }
        (Some(_), None) => Err(("principal_not_asserted", "the key has no asserts, so it speaks for itself alone")),
        (None, Some(_)) => Err(("principal_missing", "the key must say for whom it speaks")),
        (None, None) => Ok(Principal::Key(credential.key())),
    }
}

/// What differs between two configurations, by ids.
pub(super) fn changes(old: &Config, new: &Config) -> Changes {
    let mut changes = Changes::default();
    let organisations =
        |config: &Config| config.organisations.iter().map(|organisation| (organisation.id.clone(), ())).collect();
    changes.compare("organisation ", &organisations(old), &organisations(new));
    for before in &old.organisations {
        let Some(after) = new.organisations.iter().find(|after| after.id == before.id) else { continue };
        let id = &before.id;
        let gateways = |organisation: &super::Organisation| {
            organisation.gateways.iter().map(|gateway| (gateway.to_string(), ())).collect()
        };
        changes.compare(format_args!("gateway {id} "), &gateways(before), &gateways(after));
        let certificate = |organisation: &super::Organisation| -> BTreeMap<_, _> {
            let identity = organisation.tls.as_ref().and_then(Tls::identity);
            identity.map(|identity| (identity.fingerprint(), ())).into_iter().collect()
        };
        changes.compare(format_args!("tls_certificate {id} "), &certificate(before), &certificate(after));
        let orchestrators = |organisation: &super::Organisation| -> BTreeMap<_, _> {
            organisation.orchestrators.iter().map(|one| (one.key.fingerprint(), one.clone())).collect()
        };
        changes.compare(format_args!("orchestrator {id} "), &orchestrators(before), &orchestrators(after));
        let authorities = |organisation: &super::Organisation| -> BTreeMap<_, _> {
            organisation.authorities.iter().map(|one| (one.key.fingerprint(), one.clone())).collect()
        };
        changes.compare(format_args!("orchestrator_ca {id} "), &authorities(before), &authorities(after));
        let rules = |organisation: &super::Organisation| -> BTreeMap<_, _> {
            organisation.allow.rules().iter().map(|rule| (rule.name.clone(), rule.clone())).collect()
        };
        changes.compare(format_args!("rule {id}/"), &rules(before), &rules(after));
        let denies = |organisation: &super::Organisation| -> BTreeMap<_, _> {
            organisation.allow.denies().iter().map(|deny| (deny.name.clone(), deny.clone())).collect()
        };
        changes.compare(format_args!("deny rule {id}/"), &denies(before), &denies(after));
    }
    let single = |changes: &mut Changes, what: &str, differs: bool| {
        if differs {
            changes.change(what);
        }
    };
    let key = new.key.public();
    single(&mut changes, &format!("host_key {}", key.fingerprint()), old.key.public() != key);
    single(&mut changes, &format!("replica {}", new.replica), old.replica != new.replica);
    single(&mut changes, "proxy", old.egress != new.egress);
    single(&mut changes, "limits", old.limits != new.limits);
    single(&mut changes, "penalties", old.penalties != new.penalties);
    single(&mut changes, "resolver", old.resolver != new.resolver);
    single(&mut changes, "drain_s", old.drain != new.drain);
    single(&mut changes, "remote_doctor", old.remote_doctor != new.remote_doctor);
    let listener = |config: &Config| -> BTreeMap<_, _> {
        config.listen.iter().map(|listen| (listen.address, listen.accept_from.clone())).collect()
    };
    changes.compare("listen ", &listener(old), &listener(new));
    changes
}

/// Settings of `new` that a running agent cannot take over; they are put back to what they were.
pub(super) fn keep(old: &Config, new: &mut Config) -> Vec<&'static str> {
    let mut kept = Vec::new();
    if new.id != old.id {
        kept.push("agent.id");
        new.id = old.id.clone();
    }
    if new.audit != old.audit {
        kept.push("audit");
        new.audit = old.audit.clone();
    }
    if new.health != old.health {
        kept.extend(old.health.differences(&new.health));
        new.health = old.health.clone();
    }
    kept
}

#[cfg(test)]
pub(super) mod tests;

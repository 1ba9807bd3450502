//! What an agent goes by, as one value that a reload replaces; and what differs from one to the next.
//!
//! Promised: pure functions, no I/O, no waiting. Every forward is decided on the newest state, and decided again on each
//! later one, by where it leads already: nothing is looked up again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use super::{Config, Orchestrator};
use crate::identity::{Fingerprint, OrganisationId, Principal, PrincipalId, PrivateKey, ReplicaId};
use crate::policy::guard::Guard;
use crate::policy::rule::Allowlist;
use crate::reload::Changes;
use crate::target::Target;
use crate::tunnel::connect::Proxy;

/// What holds now. It does not change.
pub(super) struct State {
    /// The name of this process among those that run the same agent.
    pub(super) replica: ReplicaId,
    /// The host key: the agent's identity.
    pub(super) key: PrivateKey,
    /// The HTTP proxy on the way out.
    pub(super) proxy: Option<Proxy>,
    /// The agent's own gateways and proxy as they are written, which no forward may reach.
    pub(super) ways_out: HashSet<Target>,
    organisations: HashMap<OrganisationId, Served>,
}

/// One organisation, ready for lookups.
pub(super) struct Served {
    orchestrators: HashMap<Fingerprint, Orchestrator>,
    pub(super) allow: Allowlist,
}

/// Why a key may not speak for whom it claims to: a reason for the trail, and words for the operator.
pub(super) type NotAsserted = (&'static str, &'static str);

impl State {
    pub(super) fn new(config: &Config) -> Self {
        let ways_out = config
            .organisations
            .iter()
            .flat_map(|organisation| organisation.gateways.iter().map(|gateway| gateway.target().clone()))
            .chain(config.proxy.iter().map(|proxy| proxy.endpoint.clone()))
            .collect();
        let organisations = config
            .organisations
            .iter()
            .map(|organisation| {
                let orchestrators = organisation
                    .orchestrators
                    .iter()
                    .map(|orchestrator| (orchestrator.key.fingerprint(), orchestrator.clone()))
                    .collect();
                (organisation.id.clone(), Served { orchestrators, allow: organisation.allow.clone() })
            })
            .collect();
        Self {
            replica: config.replica.clone(),
            key: config.key.clone(),
            proxy: config.proxy.clone(),
            ways_out,
            organisations,
        }
    }

    /// What holds for whoever logged in for an organisation with a key, if that still may.
    pub(super) fn orchestrator(
        &self,
        organisation: &OrganisationId,
        key: &Fingerprint,
    ) -> Option<(&Served, &Orchestrator)> {
        let served = self.organisations.get(organisation)?;
        Some((served, served.orchestrators.get(key)?))
    }

    /// Whether a link that was made under `other` is made as one would be now, so that it need not be replaced.
    pub(super) fn same_identity(&self, other: &Self) -> bool {
        self.replica == other.replica && self.key.public() == other.key.public()
    }

    /// Whether a dial would take the same way and introduce itself alike.
    pub(super) fn same_way(&self, other: &Self) -> bool {
        self.same_identity(other) && self.proxy == other.proxy
    }

    /// Whether a forward that was permitted to `addresses` would be still.
    pub(super) fn allows(&self, case: &Case<'_>, addresses: &[IpAddr], guard: &Guard) -> bool {
        self.orchestrator(case.organisation, case.key).is_some_and(|(served, orchestrator)| {
            speaker(orchestrator, case.key, case.claimed).as_ref() == Ok(case.principal)
                && served.allow.reconsider(case.principal, case.target, addresses, guard).is_ok()
        })
    }
}

/// A forward that was permitted, with all that the permit rested on but its addresses.
pub(super) struct Case<'a> {
    pub(super) organisation: &'a OrganisationId,
    /// Of the orchestrator that asked.
    pub(super) key: &'a Fingerprint,
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
    orchestrator: &Orchestrator,
    key: &Fingerprint,
    claimed: Option<&PrincipalId>,
) -> Result<Principal, NotAsserted> {
    match (claimed, &orchestrator.asserts) {
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
        (None, None) => Ok(Principal::Key(*key)),
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
        let orchestrators = |organisation: &super::Organisation| -> BTreeMap<_, _> {
            organisation.orchestrators.iter().map(|one| (one.key.fingerprint(), one.asserts.clone())).collect()
        };
        changes.compare(format_args!("orchestrator {id} "), &orchestrators(before), &orchestrators(after));
        let rules = |organisation: &super::Organisation| -> BTreeMap<_, _> {
            organisation.allow.rules().iter().map(|rule| (rule.name.clone(), rule.clone())).collect()
        };
        changes.compare(format_args!("rule {id}/"), &rules(before), &rules(after));
    }
    let single = |changes: &mut Changes, what: &str, differs: bool| {
        if differs {
            changes.change(what);
        }
    };
    let key = new.key.public();
    single(&mut changes, &format!("host_key {}", key.fingerprint()), old.key.public() != key);
    single(&mut changes, &format!("replica {}", new.replica), old.replica != new.replica);
    single(&mut changes, "proxy", old.proxy != new.proxy);
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
    kept
}

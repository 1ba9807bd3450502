//! What one principal and one organisation may have at once, so that none can use up what all share: places in the trail,
//! descriptors, channels of links. No I/O, no waiting.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use crate::identity::{OrganisationId, PrincipalId};
use crate::limits;

/// Counts what is in use. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub(super) struct Quotas(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    forwards: HashMap<OrganisationId, usize>,
    forwards_by_principal: HashMap<(OrganisationId, PrincipalId), usize>,
    sessions_by_principal: HashMap<(OrganisationId, PrincipalId), usize>,
}

/// A forward or a session that is counted until this is dropped.
#[derive(Debug)]
pub(super) struct Counted {
    quotas: Quotas,
    principal: (OrganisationId, PrincipalId),
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Forward,
    Session,
}

impl Quotas {
    /// Counts a forward, or names the limit that stands against it.
    pub(super) fn forward(
        &self,
        organisation: &OrganisationId,
        principal: &PrincipalId,
    ) -> Result<Counted, &'static str> {
        let key = (organisation.clone(), principal.clone());
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.forwards_by_principal.get(&key).is_some_and(|live| *live >= limits::FORWARDS_PER_PRINCIPAL) {
            return Err("forwards_per_principal");
        }
        if counts.forwards.get(organisation).is_some_and(|live| *live >= limits::FORWARDS_PER_ORGANISATION) {
            return Err("forwards_per_organisation");
        }
        *counts.forwards.entry(organisation.clone()).or_default() += 1;
        *counts.forwards_by_principal.entry(key.clone()).or_default() += 1;
        Ok(Counted { quotas: self.clone(), principal: key, kind: Kind::Forward })
    }

    /// Counts a session at a door, or names the limit that stands against it.
    pub(super) fn session(
        &self,
        organisation: &OrganisationId,
        principal: &PrincipalId,
    ) -> Result<Counted, &'static str> {
        let key = (organisation.clone(), principal.clone());
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let live = counts.sessions_by_principal.entry(key.clone()).or_default();
        if *live >= limits::SESSIONS_PER_PRINCIPAL {
            return Err("sessions_per_principal");
        }
        *live += 1;
        Ok(Counted { quotas: self.clone(), principal: key, kind: Kind::Session })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.quotas.0.lock().unwrap_or_else(PoisonError::into_inner);
        match self.kind {
            Kind::Forward => {
                take_one(&mut counts.forwards, &self.principal.0);
                take_one(&mut counts.forwards_by_principal, &self.principal);
            }
            Kind::Session => take_one(&mut counts.sessions_by_principal, &self.principal),
        }
    }
}

/// Takes one off a count, and the count away with the last.
fn take_one<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(organisation: &str, principal: &str) -> (OrganisationId, PrincipalId) {
        (organisation.parse().expect("an id"), principal.parse().expect("an id"))
    }

    #[test]
    fn one_principal_cannot_use_up_its_organisation_nor_one_organisation_the_gateway() {
        let quotas = Quotas::default();
        let mut counted = Vec::new();
        let (acme, greedy) = ids("acme", "greedy");
        while let Ok(forward) = quotas.forward(&acme, &greedy) {
            counted.push(forward);
        }
        assert_eq!(counted.len(), limits::FORWARDS_PER_PRINCIPAL);
        assert_eq!(quotas.forward(&acme, &greedy).expect_err("full"), "forwards_per_principal");
        let mut last = 0;
        let full = (0..).find_map(|principal| {
            let (_, principal) = ids("acme", &format!("p{principal}"));
            while last < limits::FORWARDS_PER_PRINCIPAL {
                match quotas.forward(&acme, &principal) {
                    Ok(forward) => counted.push(forward),
                    Err("forwards_per_principal") => return None,
                    Err(limit) => return Some(limit),
                }
                last += 1;
            }
            last = 0;
            None
        });
        assert_eq!(full, Some("forwards_per_organisation"));
        assert_eq!(counted.len(), limits::FORWARDS_PER_ORGANISATION);
        let (other, same_name) = ids("other", "greedy");
        assert!(quotas.forward(&other, &same_name).is_ok(), "another organisation is not touched");
        counted.clear();
        let counts = quotas.0.lock().expect("not poisoned");
        assert!(counts.forwards.is_empty() && counts.forwards_by_principal.is_empty(), "nothing is left behind");
    }

    #[test]
    fn sessions_are_counted_by_principal() {
        let quotas = Quotas::default();
        let (acme, one) = ids("acme", "one");
        let (_, two) = ids("acme", "two");
        let held: Vec<_> =
            (0..limits::SESSIONS_PER_PRINCIPAL).map(|_| quotas.session(&acme, &one).expect("room")).collect();
        assert_eq!(quotas.session(&acme, &one).expect_err("full"), "sessions_per_principal");
        assert!(quotas.session(&acme, &two).is_ok());
        drop(held);
        assert!(quotas.session(&acme, &one).is_ok());
    }
}

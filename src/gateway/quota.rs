//! What one principal and one organisation may have at once and in a second, so that none can use up what all share: places
//! in the trail, descriptors, channels of links. No I/O, no waiting; the limits and the time come from the caller.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Limits;
use crate::identity::{OrganisationId, PrincipalId};
use crate::limits;
use crate::rate::{Rate, Rates};

/// Counts what is in use. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub(super) struct Quotas(Arc<Mutex<Counts>>);

type Key = (OrganisationId, PrincipalId);

#[derive(Debug, Default)]
struct Counts {
    forwards: HashMap<OrganisationId, usize>,
    forwards_by_principal: HashMap<Key, usize>,
    pending_by_principal: HashMap<Key, usize>,
    sessions_by_principal: HashMap<Key, usize>,
    opens: Rates<OrganisationId>,
    opens_by_principal: Rates<Key>,
    floods_by_principal: Rates<Key>,
}

/// A session that is counted until this is dropped.
#[derive(Debug)]
pub(super) struct Session {
    quotas: Quotas,
    principal: Key,
}

/// A forward that is counted until this is dropped, and as one that is being opened until it [is open](Self::opened).
#[derive(Debug)]
pub(super) struct Forward {
    quotas: Quotas,
    principal: Key,
    pending: bool,
}

/// An open too many within a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flood {
    /// The limit that stands against it.
    pub(super) limit: &'static str,
    /// Whether it is to have a record of its own. One that has none is counted by its door, which records the sum.
    pub(super) record: bool,
}

impl Quotas {
    /// Counts what a principal asks for, whatever becomes of it, or names the limit that stands against it.
    pub(super) fn open(
        &self,
        limits: &Limits,
        organisation: &OrganisationId,
        principal: &PrincipalId,
        now: Instant,
    ) -> Result<(), Flood> {
        let key = (organisation.clone(), principal.clone());
        let rate = |per_second| Rate { per_second, burst: limits::OPENS_BURST };
        let of_one = rate(limits.opens_per_second_per_principal);
        let of_all = rate(limits.opens_per_second_per_organisation);
        let mut counts = self.counts();
        let limit = if !counts.opens_by_principal.admits(&key, of_one, now) {
            "opens_per_second_per_principal"
        } else if !counts.opens.admits(organisation, of_all, now) {
            "opens_per_second_per_organisation"
        } else {
            counts.opens_by_principal.count(key, of_one, now);
            counts.opens.count(organisation.clone(), of_all, now);
            return Ok(());
        };
        let records = Rate { per_second: limits::FLOOD_RECORDS_PER_SECOND, burst: Duration::from_secs(1) };
        Err(Flood { limit, record: counts.floods_by_principal.take(key, records, now) })
    }

    /// Counts a forward that is about to be opened, or names the limit that stands against it.
    pub(super) fn forward(
        &self,
        limits: &Limits,
        organisation: &OrganisationId,
        principal: &PrincipalId,
    ) -> Result<Forward, &'static str> {
        let key = (organisation.clone(), principal.clone());
        let mut counts = self.counts();
        if is_full(&counts.forwards_by_principal, &key, limits.forwards_per_principal) {
            return Err("forwards_per_principal");
        }
        if is_full(&counts.forwards, organisation, limits.forwards_per_organisation) {
            return Err("forwards_per_organisation");
        }
        if is_full(&counts.pending_by_principal, &key, limits.pending_opens_per_principal) {
            return Err("pending_opens_per_principal");
        }
        *counts.forwards.entry(organisation.clone()).or_default() += 1;
        *counts.forwards_by_principal.entry(key.clone()).or_default() += 1;
        *counts.pending_by_principal.entry(key.clone()).or_default() += 1;
        Ok(Forward { quotas: self.clone(), principal: key, pending: true })
    }

    /// Counts a session at a door, or names the limit that stands against it.
    pub(super) fn session(
        &self,
        limits: &Limits,
        organisation: &OrganisationId,
        principal: &PrincipalId,
    ) -> Result<Session, &'static str> {
        let key = (organisation.clone(), principal.clone());
        let mut counts = self.counts();
        if is_full(&counts.sessions_by_principal, &key, limits.sessions_per_principal) {
            return Err("sessions_per_principal");
        }
        *counts.sessions_by_principal.entry(key.clone()).or_default() += 1;
        Ok(Session { quotas: self.clone(), principal: key })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Forward {
    /// It is open.
    pub(super) fn opened(&mut self) {
        if std::mem::take(&mut self.pending) {
            take_one(&mut self.quotas.counts().pending_by_principal, &self.principal);
        }
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.opened();
        let mut counts = self.quotas.counts();
        take_one(&mut counts.forwards, &self.principal.0);
        take_one(&mut counts.forwards_by_principal, &self.principal);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        take_one(&mut self.quotas.counts().sessions_by_principal, &self.principal);
    }
}

fn is_full<K: Hash + Eq>(counts: &HashMap<K, usize>, key: &K, limit: usize) -> bool {
    counts.get(key).is_some_and(|live| *live >= limit)
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

    fn ids(organisation: &str, principal: &str) -> Key {
        (organisation.parse().expect("an id"), principal.parse().expect("an id"))
    }

    fn few() -> Limits {
        Limits {
            forwards_per_principal: 3,
            forwards_per_organisation: 5,
            pending_opens_per_principal: 2,
            sessions_per_principal: 2,
            opens_per_second_per_principal: 5,
            opens_per_second_per_organisation: 8,
            ..Limits::default()
        }
    }

    #[test]
    fn one_principal_cannot_use_up_its_organisation_nor_one_organisation_the_gateway() {
        let (quotas, limits) = (Quotas::default(), few());
        let (acme, greedy) = ids("acme", "greedy");
        let (_, second) = ids("acme", "second");
        let (_, third) = ids("acme", "third");
        let mut live = Vec::new();
        let mut open = |principal: &PrincipalId| {
            let mut forward = quotas.forward(&limits, &acme, principal)?;
            forward.opened();
            live.push(forward);
            Ok::<_, &'static str>(())
        };
        for (principal, outcome) in [
            (&greedy, Ok(())),
            (&greedy, Ok(())),
            (&greedy, Ok(())),
            (&greedy, Err("forwards_per_principal")),
            (&second, Ok(())),
            (&second, Ok(())),
            (&second, Err("forwards_per_organisation")),
            (&third, Err("forwards_per_organisation")),
        ] {
            assert_eq!(open(principal), outcome);
        }
        let (other, same_name) = ids("globex", "greedy");
        assert!(quotas.forward(&limits, &other, &same_name).is_ok(), "another organisation is not touched");
        live.pop();
        assert!(quotas.forward(&limits, &acme, &third).is_ok(), "there is room again");
        live.clear();
        let counts = quotas.counts();
        assert!(counts.forwards.is_empty() && counts.forwards_by_principal.is_empty(), "nothing is left behind");
        assert!(counts.pending_by_principal.is_empty(), "nothing is left behind");
    }

    #[test]
    fn what_is_being_opened_is_counted_until_it_is_open_or_given_up() {
        let (quotas, limits) = (Quotas::default(), few());
        let (acme, one) = ids("acme", "one");
        let mut first = quotas.forward(&limits, &acme, &one).expect("room");
        let second = quotas.forward(&limits, &acme, &one).expect("room");
        assert_eq!(quotas.forward(&limits, &acme, &one).expect_err("full"), "pending_opens_per_principal");
        let (_, two) = ids("acme", "two");
        assert!(quotas.forward(&limits, &acme, &two).is_ok(), "another principal is not touched");
        first.opened();
        first.opened();
        let third = quotas.forward(&limits, &acme, &one).expect("one of the two is open");
        drop((second, third));
        assert_eq!(quotas.counts().forwards_by_principal.len(), 1);
        assert!(quotas.counts().pending_by_principal.is_empty());
    }

    #[test]
    fn sessions_are_counted_by_principal() {
        let (quotas, limits) = (Quotas::default(), few());
        let (acme, one) = ids("acme", "one");
        let (_, two) = ids("acme", "two");
        let held: Vec<_> = (0..2).map(|_| quotas.session(&limits, &acme, &one).expect("room")).collect();
        assert_eq!(quotas.session(&limits, &acme, &one).expect_err("full"), "sessions_per_principal");
        assert!(quotas.session(&limits, &acme, &two).is_ok());
        drop(held);
        assert!(quotas.session(&limits, &acme, &one).is_ok());
    }

    #[test]
    fn opens_are_counted_by_principal_and_organisation_and_a_flood_has_few_records() {
        let (quotas, limits, now) = (Quotas::default(), few(), Instant::now());
        let burst = limits::OPENS_BURST.as_secs() as usize;
        let (acme, greedy) = ids("acme", "greedy");
        let (_, second) = ids("acme", "second");
        let flood = |principal: &PrincipalId, now| {
            let outcomes: Vec<_> = (0..1_000).map(|_| quotas.open(&limits, &acme, principal, now)).collect();
            let refused: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.err()).collect();
            let recorded = refused.iter().filter(|flood| flood.record).count();
            (outcomes.len() - refused.len(), refused[0].limit, recorded)
        };
        let records = limits::FLOOD_RECORDS_PER_SECOND as usize;
        assert_eq!(flood(&greedy, now), (5 * burst, "opens_per_second_per_principal", records));
        // What is refused for one principal is not taken from the others.
        assert_eq!(flood(&second, now), (3 * burst, "opens_per_second_per_organisation", records));
        let (other, same_name) = ids("globex", "greedy");
        assert_eq!(quotas.open(&limits, &other, &same_name, now), Ok(()), "another organisation is not touched");
        let later = now + Duration::from_secs(1);
        assert_eq!(flood(&greedy, later), (5, "opens_per_second_per_principal", records));
        // Of its own it has more left, but all together have 8 a second.
        assert_eq!(flood(&second, later), (3, "opens_per_second_per_organisation", records));
    }
}

//! What an agent's gateways have of it at once and in a second, so that no organisation can use up what all share. No I/O, no
//! waiting; the limits and the time come from the caller.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Limits;
use crate::identity::OrganisationId;
use crate::limits;
use crate::rate::{Rate, Rates};

/// Counts what is in use. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub(super) struct Usage(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    live: usize,
    live_by_organisation: HashMap<OrganisationId, usize>,
    sessions_by_organisation: HashMap<OrganisationId, usize>,
    opens: Rates<OrganisationId>,
    floods: Rates<OrganisationId>,
}

/// A forward that is counted until this is dropped.
#[derive(Debug)]
pub(super) struct Forward {
    usage: Usage,
    organisation: OrganisationId,
}

/// A session at the listener that is counted until this is dropped.
#[derive(Debug)]
pub(super) struct Session {
    usage: Usage,
    organisation: OrganisationId,
}

/// An open too many within a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flood {
    /// The limit that stands against it.
    pub(super) limit: &'static str,
    /// Whether it is to have a record of its own. One that has none is counted by its link, which records the sum.
    pub(super) record: bool,
}

impl Usage {
    /// Counts what an organisation's gateway asks for, whatever becomes of it, or names the limit that stands against it.
    pub(super) fn open(&self, limits: &Limits, organisation: &OrganisationId, now: Instant) -> Result<(), Flood> {
        let rate = Rate { per_second: limits.opens_per_second_per_organisation, burst: limits::OPENS_BURST };
        let mut counts = self.counts();
        if counts.opens.take(organisation.clone(), rate, now) {
            return Ok(());
        }
        let records = Rate { per_second: limits::FLOOD_RECORDS_PER_SECOND, burst: Duration::from_secs(1) };
        let record = counts.floods.take(organisation.clone(), records, now);
        Err(Flood { limit: "opens_per_second_per_organisation", record })
    }

    /// Counts a forward, or names the limit that stands against it.
    pub(super) fn forward(&self, limits: &Limits, organisation: &OrganisationId) -> Result<Forward, &'static str> {
        let mut counts = self.counts();
        let of_organisation = counts.live_by_organisation.get(organisation).copied().unwrap_or_default();
        if of_organisation >= limits.forwards_per_organisation {
            return Err("forwards_per_organisation");
        }
        if counts.live >= limits.forwards {
            return Err("forwards");
        }
        counts.live += 1;
        counts.live_by_organisation.insert(organisation.clone(), of_organisation + 1);
        Ok(Forward { usage: self.clone(), organisation: organisation.clone() })
    }

    /// Counts a session at the listener, or names the limit that stands against it.
    pub(super) fn session(&self, limits: &Limits, organisation: &OrganisationId) -> Result<Session, &'static str> {
        let mut counts = self.counts();
        let of_organisation = counts.sessions_by_organisation.entry(organisation.clone()).or_default();
        if *of_organisation >= limits.sessions_per_organisation {
            return Err("sessions_per_organisation");
        }
        *of_organisation += 1;
        Ok(Session { usage: self.clone(), organisation: organisation.clone() })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let mut counts = self.usage.counts();
        counts.live -= 1;
        take_one(&mut counts.live_by_organisation, &self.organisation);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        take_one(&mut self.usage.counts().sessions_by_organisation, &self.organisation);
    }
}

fn take_one(counts: &mut HashMap<OrganisationId, usize>, organisation: &OrganisationId) {
    if let Some(count) = counts.get_mut(organisation) {
        *count -= 1;
        if *count == 0 {
            counts.remove(organisation);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(organisation: &str) -> OrganisationId {
        organisation.parse().expect("an id")
    }

    #[test]
    fn one_organisation_cannot_use_up_the_agent() {
        let limits = Limits { forwards: 4, forwards_per_organisation: 3, ..Limits::default() };
        let (usage, acme, globex) = (Usage::default(), id("acme"), id("globex"));
        let mut live = Vec::new();
        for (organisation, outcome) in [
            (&acme, None),
            (&acme, None),
            (&acme, None),
            (&acme, Some("forwards_per_organisation")),
            (&globex, None),
            (&globex, Some("forwards")),
        ] {
            match usage.forward(&limits, organisation) {
                Ok(forward) => {
                    assert_eq!(outcome, None);
                    live.push(forward);
                }
                Err(limit) => assert_eq!(Some(limit), outcome),
            }
        }
        live.remove(0);
        assert!(usage.forward(&limits, &globex).is_ok(), "there is room again");
        live.clear();
        let counts = usage.counts();
        assert!(counts.live == 0 && counts.live_by_organisation.is_empty(), "nothing is left behind");
    }

    #[test]
    fn sessions_are_counted_by_organisation() {
        let limits = Limits { sessions_per_organisation: 2, ..Limits::default() };
        let (usage, acme, globex) = (Usage::default(), id("acme"), id("globex"));
        let first = usage.session(&limits, &acme).expect("room");
        let _second = usage.session(&limits, &acme).expect("room");
        assert_eq!(usage.session(&limits, &acme).expect_err("full"), "sessions_per_organisation");
        assert!(usage.session(&limits, &globex).is_ok(), "another organisation is not touched");
        drop(first);
        assert!(usage.session(&limits, &acme).is_ok(), "there is room again");
        let counts = usage.counts();
        assert_eq!(counts.sessions_by_organisation.len(), 1, "nothing is left behind");
    }

    #[test]
    fn opens_are_counted_by_organisation_and_a_flood_has_few_records() {
        let limits = Limits { opens_per_second_per_organisation: 10, ..Limits::default() };
        let (usage, acme, now) = (Usage::default(), id("acme"), Instant::now());
        let outcomes: Vec<_> = (0..1_000).map(|_| usage.open(&limits, &acme, now)).collect();
        let refused: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.err()).collect();
        assert_eq!(outcomes.len() - refused.len(), 10 * limits::OPENS_BURST.as_secs() as usize);
        assert!(refused.iter().all(|flood| flood.limit == "opens_per_second_per_organisation"));
        let recorded = refused.iter().filter(|flood| flood.record).count();
        assert_eq!(recorded, limits::FLOOD_RECORDS_PER_SECOND as usize);
        assert_eq!(usage.open(&limits, &id("globex"), now), Ok(()), "another organisation is not touched");
        assert_eq!(usage.open(&limits, &acme, now + Duration::from_secs(1)), Ok(()));
    }
}

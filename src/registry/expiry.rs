//! Keys that expire soon: who is to be told, of what, and when. Pure, save for [`until`]; what time it is comes from the caller.
//!
//! Promised: of each key it is said once when it has 30 days left, once when it has 7, and once when it has expired; each
//! only if the one before has not come meanwhile, so that whoever starts late hears the newest alone. A key that is
//! revoked, or whose expiry has been moved, is another matter.

use std::collections::HashMap;
use std::fmt;

use jiff::{SignedDuration, Timestamp};

use super::{RegisteredKey, Role, Snapshot};
use crate::identity::{AgentName, Fingerprint, OrganisationId};
use crate::limits;

/// How near the end of a key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Thirty days or less.
    Month,
    /// Seven days or less.
    Week,
    /// It has come.
    Expired,
}

/// How long before the end each stage begins.
const STAGES: [(Stage, SignedDuration); 3] = [
    (Stage::Expired, SignedDuration::ZERO),
    (Stage::Week, SignedDuration::from_hours(7 * 24)),
    (Stage::Month, SignedDuration::from_hours(30 * 24)),
];

impl Stage {
    /// The stage at the time `now` of what ends at `expires`, if it has come to one.
    #[must_use]
    pub fn of(expires: Timestamp, now: Timestamp) -> Option<Self> {
        let left = now.duration_until(expires);
        STAGES.iter().find(|(_, before)| left <= *before).map(|(stage, _)| *stage)
    }

    /// When the next stage of what ends at `expires` begins, after `now`.
    #[must_use]
    pub fn next(expires: Timestamp, now: Timestamp) -> Option<Timestamp> {
        // From the first to the last.
        let begins = STAGES.iter().rev().filter_map(|(_, before)| expires.checked_sub(*before).ok());
        begins.into_iter().find(|at| *at > now)
    }
}

/// Waits until `next`, as seen at `now`, or for ever where there is none. At most for an hour: the clock may be set meanwhile.
pub async fn until(next: Option<Timestamp>, now: Timestamp) {
    let Some(next) = next else { return std::future::pending().await };
    let left = now.duration_until(next).unsigned_abs().min(limits::EXPIRIES_LOOKED_AT);
    // A moment later than sooner: it is to be past then.
    tokio::time::sleep(left + std::time::Duration::from_millis(1)).await;
}

/// How long something has left, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// When it ends.
    pub expires: Timestamp,
    /// When that is asked.
    pub now: Timestamp,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hours = self.now.duration_until(self.expires).as_hours();
        match hours {
            _ if self.expires <= self.now => write!(f, "has expired (at {})", self.expires),
            0..48 => write!(f, "expires in {hours} h (at {})", self.expires),
            _ => write!(f, "expires in {} days (at {})", hours / 24, self.expires),
        }
    }
}

/// A key that has come to a stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// In which organisation it is registered.
    pub organisation: OrganisationId,
    /// For which agent or principal, in words.
    pub holder: String,
    /// Which key.
    pub key: Fingerprint,
    /// When it ends.
    pub expires: Timestamp,
    /// How near that is.
    pub stage: Stage,
    /// Whether its holder has another key that counts now and lasts longer: then it is being rotated already.
    pub succeeded: bool,
}

/// What has been said of which key.
#[derive(Debug, Default)]
pub struct Said(HashMap<(OrganisationId, Fingerprint), (Timestamp, Stage)>);

impl Said {
    /// Those of `endings` of which that was not said yet. What is not among them any more is forgotten.
    pub fn take_new(&mut self, endings: Vec<Ending>) -> Vec<Ending> {
        let mut said = HashMap::with_capacity(endings.len());
        let mut new = Vec::new();
        for ending in endings {
            let key = (ending.organisation.clone(), ending.key);
            let now = (ending.expires, ending.stage);
            said.insert(key.clone(), now);
            if self.0.get(&key) != Some(&now) {
                new.push(ending);
            }
        }
        self.0 = said;
        new
    }
}

impl Snapshot {
    /// Every key that is at some stage of its end at the time `now`; not those that were revoked.
    #[must_use]
    pub fn endings(&self, now: Timestamp) -> Vec<Ending> {
        let mut endings = Vec::new();
        for (id, organisation) in &self.organisations {
            for (role, key) in organisation.keys() {
                let Some((expires, stage)) = at_stage(key, now) else { continue };
                let keys = match &role {
                    Role::Agent(agent) => organisation.agents.get(agent).map(|agent| &agent.keys),
                    Role::Principal(principal) => organisation.principals.get(principal).map(|record| &record.keys),
                    // Of several CAs, or keys for tokens, none can be told to take the place of another.
                    Role::Authority | Role::TokenKey => None,
                };
                let lasts_longer = |other: &RegisteredKey| other.expires.is_none_or(|end| end > expires);
                let succeeded = keys.into_iter().flatten().any(|other| other.counts(now) && lasts_longer(other));
                endings.push(Ending {
                    organisation: id.clone(),
                    holder: role.to_string(),
                    key: key.key.fingerprint(),
                    expires,
                    stage,
                    succeeded,
                });
            }
        }
        endings
    }

    /// When the next key comes to a stage, after `now`.
    #[must_use]
    pub fn next_ending(&self, now: Timestamp) -> Option<Timestamp> {
        let keys = self.organisations.values().flat_map(super::Organisation::keys);
        keys.filter(|(_, key)| !key.revoked).filter_map(|(_, key)| Stage::next(key.expires?, now)).min()
    }

    /// When the first agent or principal loses the last of its keys, and when the first CA or key for tokens ends, by what
    /// they are. Who lost it longer ago than the longest stage is nobody's concern any more.
    #[must_use]
    pub fn first_endings(&self, now: Timestamp) -> Vec<(&'static str, Timestamp)> {
        let counts = |key: &RegisteredKey| !key.revoked && key.not_before.is_none_or(|from| from <= now);
        let concerns = |ends: &Timestamp| ends.duration_until(now) <= STAGES[2].1;
        let last = |keys: &[RegisteredKey]| {
            let ends: Option<Vec<Timestamp>> = keys.iter().filter(|key| counts(key)).map(|key| key.expires).collect();
            ends?.into_iter().max()
        };
        let (mut agents, mut principals, mut authorities, mut token_keys) = (None, None, None, None);
        let earlier = |first: &mut Option<Timestamp>, ends: Option<Timestamp>| {
            *first = [*first, ends.filter(concerns)].into_iter().flatten().min();
        };
        for organisation in self.organisations.values() {
            organisation.agents.values().for_each(|agent| earlier(&mut agents, last(&agent.keys)));
            organisation.principals.values().for_each(|principal| earlier(&mut principals, last(&principal.keys)));
            for (role, key) in organisation.keys().filter(|(_, key)| counts(key)) {
                match role {
                    Role::Authority => earlier(&mut authorities, key.expires),
                    Role::TokenKey => earlier(&mut token_keys, key.expires),
                    Role::Agent(_) | Role::Principal(_) => {}
                }
            }
        }
        let all = [("agent", agents), ("principal", principals), ("authority", authorities), ("token_key", token_keys)];
        all.into_iter().filter_map(|(holder, first)| Some((holder, first?))).collect()
    }

    /// When this key of an agent expires, if it is registered for it with an end.
    #[must_use]
    pub fn agent_key_expires(&self, name: &AgentName, key: &Fingerprint) -> Option<Timestamp> {
        let agent = self.organisations.get(&name.organisation)?.agents.get(&name.agent)?;
        agent.keys.iter().find(|registered| registered.key.fingerprint() == *key)?.expires
    }

    /// When the last of an agent's keys that count expires; `None` where one has no end, or none counts.
    #[must_use]
    pub fn agent_expires(&self, name: &AgentName, now: Timestamp) -> Option<Timestamp> {
        let agent = self.organisations.get(&name.organisation)?.agents.get(&name.agent)?;
        let counting = agent.keys.iter().filter(|key| !key.revoked && key.not_before.is_none_or(|from| from <= now));
        let ends: Option<Vec<Timestamp>> = counting.map(|key| key.expires).collect();
        ends?.into_iter().max()
    }
}

fn at_stage(key: &RegisteredKey, now: Timestamp) -> Option<(Timestamp, Stage)> {
    let expires = key.expires.filter(|_| !key.revoked)?;
    Some((expires, Stage::of(expires, now)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Algorithm, PrivateKey};
    use crate::registry::{Agent, Organisation};

    fn at(text: &str) -> Timestamp {
        text.parse().expect(text)
    }

    const END: &str = "2027-01-31T00:00:00Z";

    #[test]
    fn stages_begin_thirty_and_seven_days_ahead_and_at_the_end() {
        for (now, stage, next) in [
            ("2026-12-31T23:59:59Z", None, Some("2027-01-01T00:00:00Z")),
            ("2027-01-01T00:00:00Z", Some(Stage::Month), Some("2027-01-24T00:00:00Z")),
            ("2027-01-23T23:59:59Z", Some(Stage::Month), Some("2027-01-24T00:00:00Z")),
            ("2027-01-24T00:00:00Z", Some(Stage::Week), Some(END)),
            ("2027-01-30T23:59:59Z", Some(Stage::Week), Some(END)),
            (END, Some(Stage::Expired), None),
            ("2030-01-01T00:00:00Z", Some(Stage::Expired), None),
        ] {
            assert_eq!(Stage::of(at(END), at(now)), stage, "{now}");
            assert_eq!(Stage::next(at(END), at(now)), next.map(at), "{now}");
        }
        // At the ends of time.
        assert_eq!(Stage::of(Timestamp::MAX, at(END)), None);
        assert_eq!(Stage::of(Timestamp::MIN, at(END)), Some(Stage::Expired));
        assert_eq!(Stage::next(Timestamp::MIN, at(END)), None);
    }

    #[test]
    fn what_is_left_is_told_in_days_and_at_last_in_hours() {
        for (now, words) in [
            ("2027-01-01T00:00:00Z", "expires in 30 days (at 2027-01-31T00:00:00Z)"),
            ("2027-01-28T12:00:00Z", "expires in 2 days (at 2027-01-31T00:00:00Z)"),
            ("2027-01-29T00:00:01Z", "expires in 47 h (at 2027-01-31T00:00:00Z)"),
            ("2027-01-30T23:59:59Z", "expires in 0 h (at 2027-01-31T00:00:00Z)"),
            (END, "has expired (at 2027-01-31T00:00:00Z)"),
        ] {
            assert_eq!(Left { expires: at(END), now: at(now) }.to_string(), words, "{now}");
        }
    }

    fn registered(expires: Option<&str>) -> RegisteredKey {
        let key = PrivateKey::generate(Algorithm::Ed25519).public();
        RegisteredKey { key, not_before: None, expires: expires.map(at), revoked: false, comment: None }
    }

    fn of(keys: Vec<RegisteredKey>) -> Snapshot {
        let agents = [("prod-eu".parse().expect("an id"), Agent { keys, ..Agent::default() })].into();
        let acme = Organisation { agents, ..Organisation::default() };
        Snapshot::new([("acme".parse().expect("an id"), acme)].into()).expect("no key twice")
    }

    #[test]
    fn each_key_is_told_once_a_stage_and_again_after_its_end_was_moved() {
        let key = registered(Some(END));
        let snapshot = of(vec![key.clone()]);
        let mut said = Said::default();
        for (now, told) in [
            ("2026-12-01T00:00:00Z", None),
            ("2027-01-01T00:00:00Z", Some(Stage::Month)),
            ("2027-01-02T00:00:00Z", None),
            ("2027-01-24T00:00:00Z", Some(Stage::Week)),
            ("2027-01-25T00:00:00Z", None),
            (END, Some(Stage::Expired)),
            ("2027-02-01T00:00:00Z", None),
        ] {
            let new = said.take_new(snapshot.endings(at(now)));
            assert_eq!(new.iter().map(|ending| ending.stage).collect::<Vec<_>>(), told.into_iter().collect::<Vec<_>>());
        }
        let moved = of(vec![RegisteredKey { expires: Some(at("2027-02-03T00:00:00Z")), ..key }]);
        assert_eq!(said.take_new(moved.endings(at("2027-02-01T00:00:00Z"))).len(), 1);
        // Whoever starts late hears the newest alone.
        let late = Said::default().take_new(snapshot.endings(at("2028-01-01T00:00:00Z")));
        assert_eq!(late.iter().map(|ending| ending.stage).collect::<Vec<_>>(), [Stage::Expired]);
    }

    #[test]
    fn the_first_holder_to_lose_its_last_key_is_what_counts() {
        let first = |keys: Vec<RegisteredKey>, now| of(keys).first_endings(at(now));
        let before = "2027-01-01T00:00:00Z";
        let agent = |end| vec![("agent", at(end))];
        assert_eq!(first(vec![registered(Some(END))], before), agent(END));
        assert_eq!(first(vec![registered(Some(END))], "2027-02-20T00:00:00Z"), agent(END));
        assert_eq!(first(vec![registered(Some(END))], "2027-03-20T00:00:00Z"), vec![], "long gone");
        assert_eq!(first(vec![registered(Some(END)), registered(None)], before), vec![]);
        let later = "2028-01-01T00:00:00Z";
        assert_eq!(first(vec![registered(Some(END)), registered(Some(later))], before), agent(later));
        let revoked = RegisteredKey { revoked: true, ..registered(Some(later)) };
        assert_eq!(first(vec![registered(Some(END)), revoked], before), agent(END));
        assert_eq!(first(vec![], before), vec![]);
    }

    #[test]
    fn revoked_keys_are_not_told_and_rotated_ones_said_to_be() {
        let now = at("2027-01-25T00:00:00Z");
        let ending = registered(Some(END));
        let told = |others: Vec<RegisteredKey>| {
            let endings = of([vec![ending.clone()], others].concat()).endings(now);
            endings.iter().filter(|it| it.key == ending.key.fingerprint()).map(|it| it.succeeded).collect::<Vec<_>>()
        };
        assert_eq!(told(vec![]), [false]);
        assert_eq!(told(vec![registered(None)]), [true]);
        assert_eq!(told(vec![registered(Some("2028-01-01T00:00:00Z"))]), [true]);
        assert_eq!(told(vec![registered(Some("2027-01-30T00:00:00Z"))]), [false]);
        assert_eq!(told(vec![RegisteredKey { revoked: true, ..registered(None) }]), [false]);
        assert_eq!(told(vec![RegisteredKey { not_before: Some(at(END)), ..registered(None) }]), [false]);
        assert!(of(vec![RegisteredKey { revoked: true, ..ending.clone() }]).endings(now).is_empty());
        assert_eq!(of(vec![RegisteredKey { revoked: true, ..ending.clone() }]).next_ending(now), None);
        assert_eq!(of(vec![registered(None), ending.clone()]).next_ending(now), Some(at(END)));

        let name: AgentName = "acme/prod-eu".parse().expect("a name");
        assert_eq!(of(vec![ending.clone()]).agent_expires(&name, now), Some(at(END)));
        assert_eq!(of(vec![ending.clone(), registered(None)]).agent_expires(&name, now), None);
        assert_eq!(of(vec![]).agent_expires(&name, now), None);
        assert_eq!(of(vec![ending.clone()]).agent_key_expires(&name, &ending.key.fingerprint()), Some(at(END)));
    }
}

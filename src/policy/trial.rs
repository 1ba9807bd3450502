//! What an allowlist would say, and what it has for somebody: told in full, to whoever may read the configuration.
//!
//! Nothing here permits anything. The answers come from the same decisions that forwards get, with the permits thrown away.

use std::net::SocketAddr;

use jiff::Timestamp;

use super::guard::Guard;
use super::rule::{Allowlist, PrincipalPattern, Reach};
use super::window::{Closed, Window};
use super::{Decision, Denial, Reason};
use crate::identity::Principal;
use crate::target::{Host, Target, normal};

/// What would become of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// The rule that would permit it, or why none would.
    pub outcome: Result<String, Denial>,
    /// Every address that was looked at, in the order of the lookup.
    pub addresses: Vec<Place>,
}

/// An address of the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The address.
    pub address: SocketAddr,
    /// Why it would not be dialled, if it would not.
    pub refusal: Option<Denial>,
}

/// A rule as far as it is about one principal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Whether it denies.
    pub denies: bool,
    /// Its name.
    pub rule: String,
    /// The hosts, services and networks that it names.
    pub what: Vec<String>,
    /// Where the addresses of its names must lie; empty where that says nothing.
    pub within: Vec<String>,
    /// Its ports.
    pub ports: Vec<String>,
    /// When it holds.
    pub window: Window,
    /// Why it does not hold at the moment that was asked about, if it does not.
    pub closed: Option<Closed>,
}

impl Allowlist {
    /// What [`Allowlist::decide`] would answer, for the request and for each of the addresses.
    #[must_use]
    pub fn try_out(
        &self,
        principal: &Principal,
        target: &Target,
        resolved: &[SocketAddr],
        guard: &Guard,
        now: Timestamp,
    ) -> Trial {
        let literal = match target.host {
            Host::Address(address) => Some(SocketAddr::new(address, target.port)),
            Host::Name(_) => None,
        };
        let looked_at = literal.as_ref().map_or(resolved, std::slice::from_ref);
        let (outcome, permitted) = match self.decide(principal, target, resolved, guard, now) {
            Decision::Allow(permit) => (Ok(permit.rule().to_owned()), permit.addresses().to_vec()),
            Decision::Deny(denial) => (Err(denial), Vec::new()),
        };
        let alone = |address: SocketAddr| self.decide(principal, target, &[address], guard, now).into_result().err();
        let place = |&address: &SocketAddr| {
            let normal = SocketAddr::new(normal(address.ip()), address.port());
            // Where another rule would permit it alone, the request has been decided before that rule came.
            let late = || {
                let decided = outcome.as_ref().map_or("no rule", String::as_str);
                let detail = format!("another rule has it, but rule {decided} has decided the request");
                Denial::new(Reason::OutsideWithin, detail)
            };
            let refusal = (!permitted.contains(&normal)).then(|| alone(address).unwrap_or_else(late));
            Place { address, refusal }
        };
        Trial { addresses: looked_at.iter().map(place).collect(), outcome }
    }

    /// The rules that are about this principal: deny rules first, then the others in the order in which they are tried.
    #[must_use]
    pub fn lines(&self, principal: &Principal, now: Timestamp) -> Vec<Line> {
        let concerns = |principals: &Option<Vec<PrincipalPattern>>| {
            principals.as_ref().is_none_or(|all| all.iter().any(|pattern| pattern.matches(principal)))
        };
        let denies = self.denies().iter().filter(|deny| concerns(&deny.principals)).map(|deny| Line {
            denies: true,
            rule: deny.name.clone(),
            what: texts(&deny.hosts).chain(texts(&deny.addresses)).collect(),
            within: Vec::new(),
            ports: texts(&deny.ports).collect(),
            window: deny.window,
            closed: deny.window.at(now).err(),
        });
        let rules = self.rules().iter().filter(|rule| concerns(&rule.principals)).map(|rule| {
            let (what, within) = match &rule.reach {
                Reach::Hosts { hosts, within } => (texts(hosts).collect(), texts(within).collect()),
                Reach::Services { services, within } => (texts(services).collect(), texts(within).collect()),
                Reach::Addresses(networks) => (texts(networks).collect(), Vec::new()),
            };
            Line {
                denies: false,
                rule: rule.name.clone(),
                what,
                within,
                ports: texts(&rule.ports).collect(),
                window: rule.window,
                closed: rule.window.at(now).err(),
            }
        });
        denies.chain(rules).collect()
    }
}

fn texts<T: ToString>(all: &[T]) -> impl Iterator<Item = String> {
    all.iter().map(T::to_string)
}

#[cfg(test)]
mod tests {
    use super::super::deny::Deny;
    use super::super::rule::Rule;
    use super::*;

    fn all<T: std::str::FromStr<Err: std::fmt::Debug>>(texts: &[&str]) -> Vec<T> {
        texts.iter().map(|text| text.parse().expect(text)).collect()
    }

    fn list() -> Allowlist {
        let rule = |name: &str, within: &str| Rule {
            name: name.to_owned(),
            reach: Reach::Hosts { hosts: all(&["*.db.internal"]), within: all(&[within]) },
            ports: all(&["5432"]),
            principals: Some(all(&["ci-*"])),
            window: Window::default(),
        };
        let later = Window { not_before: Some("2027-01-01T00:00:00Z".parse().expect("a moment")), expires: None };
        let support = Rule {
            reach: Reach::Addresses(all(&["10.20.0.0/16"])),
            principals: None,
            window: later,
            ..rule("support", "10.0.0.0/8")
        };
        let deny = Deny {
            name: "no-secrets".to_owned(),
            hosts: all(&["**.secret.internal"]),
            addresses: all(&["10.20.9.0/24"]),
            ports: all(&["1-65535"]),
            principals: None,
            window: Window::default(),
        };
        let rules = vec![rule("eu", "10.20.0.0/16"), rule("us", "10.30.0.0/16"), support];
        Allowlist::new(rules).and_then(|list| list.denying(vec![deny])).expect("an allowlist")
    }

    #[test]
    fn every_address_is_told_with_its_reason() {
        let (principal, target) =
            ("ci-1".parse().expect("an id"), "orders.db.internal:5432".parse().expect("a target"));
        let now = "2026-12-01T00:00:00Z".parse().expect("a moment");
        let resolved = all(&["10.20.0.5:5432", "10.20.9.5:5432", "10.30.0.5:5432", "192.0.2.1:5432", "10.20.0.6:22"]);
        let trial = list().try_out(&principal, &target, &resolved, &Guard::default(), now);
        assert_eq!(trial.outcome, Ok("eu".to_owned()));
        let reasons: Vec<_> =
            trial.addresses.iter().map(|place| place.refusal.as_ref().map(|denial| denial.reason)).collect();
        let expected = [
            None,
            Some(Reason::DenyRule),
            Some(Reason::OutsideWithin),
            Some(Reason::OutsideWithin),
            Some(Reason::Port),
        ];
        assert_eq!(reasons, expected);
        let of_another = trial.addresses[2].refusal.as_ref().map(|denial| denial.detail.as_str());
        assert_eq!(of_another, Some("another rule has it, but rule eu has decided the request"));

        let trial =
            list().try_out(&principal, &"10.20.0.5:5432".parse().expect("a target"), &[], &Guard::default(), now);
        assert_eq!(trial.outcome.map_err(|denial| denial.reason), Err(Reason::NotYetValid));
        assert_eq!(trial.addresses.len(), 1);
    }

    #[test]
    fn lines_are_those_of_the_principal_with_denials_first() {
        let now = "2026-12-01T00:00:00Z".parse().expect("a moment");
        let told = |principal: &str| {
            let lines = list().lines(&principal.parse().expect(principal), now);
            lines.iter().map(|line| (line.rule.clone(), line.denies, line.closed.is_some())).collect::<Vec<_>>()
        };
        let line = |rule: &str, denies, closed| (rule.to_owned(), denies, closed);
        assert_eq!(
            told("ci-1"),
            [
                line("no-secrets", true, false),
                line("eu", false, false),
                line("us", false, false),
                line("support", false, true)
            ]
        );
        assert_eq!(told("other"), [line("no-secrets", true, false), line("support", false, true)]);
    }
}

//! The gateway's side: which agents a principal may use, and optionally for which targets.
//!
//! The gateway knows targets only as they were asked for. It compares a name with names and a literal with literals,
//! and leaves addresses to the agent, which is the one that resolves and dials.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use super::{Decision, Denial, Reason, list};
use crate::identity::{AgentId, AgentName, Pattern, Principal};
use crate::target::{Host, Target, TargetError};

/// What the registry lets one principal do within its organisation. The default grants nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grant {
    /// The agents; none, if empty.
    pub agents: Vec<Pattern>,
    /// The targets behind these agents. Without it the agents' own allowlists are the only limit; an empty list allows
    /// no target at all.
    pub targets: Option<Vec<TargetPattern>>,
}

impl Grant {
    /// Whether the grant names this agent.
    #[must_use]
    pub fn covers(&self, agent: &AgentId) -> bool {
        self.agents.iter().any(|pattern| pattern.matches(agent.as_str()))
    }

    /// Decides whether `principal`, who holds this grant, may ask `agent` for `target`.
    ///
    /// That the grant is this principal's, and of the same organisation as the agent, is the caller's part: a grant
    /// does not know whose it is.
    pub fn decide(&self, principal: &Principal, agent: &AgentName, target: &Target) -> Decision<Pass> {
        if !self.covers(&agent.agent) {
            let detail = if self.agents.is_empty() {
                format!("the grant of {principal} has no agents")
            } else {
                format!(
                    "no agent pattern of {principal} matches {}: {}",
                    agent.agent,
                    list(self.agents.iter().map(Pattern::as_str))
                )
            };
            return Decision::Deny(Denial::new(Reason::AgentNotGranted, detail));
        }
        if let Some(targets) = &self.targets
            && !targets.iter().any(|pattern| pattern.matches(target))
        {
            let ports: Vec<_> = targets.iter().filter(|pattern| pattern.host == target.host).collect();
            let detail = if targets.is_empty() {
                format!("the grant of {principal} has an empty list of targets")
            } else if ports.is_empty() {
                format!("no target of the grant of {principal} has the host {}", target.host)
            } else {
                format!("the grant of {principal} has {}, but not port {}", list(ports), target.port)
            };
            return Decision::Deny(Denial::new(Reason::TargetNotGranted, detail));
        }
        Decision::Allow(Pass { principal: principal.clone(), agent: agent.clone(), target: target.clone() })
    }
}

/// The gateway's permit: this principal may ask this agent for this target. Only [`Grant::decide`] makes one, and
/// opening a forward consumes it.
#[derive(Debug)]
#[must_use = "a pass is to be used for the forward it was given for"]
pub struct Pass {
    principal: Principal,
    agent: AgentName,
    target: Target,
}

impl Pass {
    /// Who asked.
    #[must_use]
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// Which agent is to open the forward.
    #[must_use]
    pub fn agent(&self) -> &AgentName {
        &self.agent
    }

    /// Where the forward is to lead.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }
}

/// A target in a grant: `host:port`, or `host:*` for every port of that host. IPv6 addresses stand in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetPattern {
    host: Host,
    port: Option<u16>,
}

impl TargetPattern {
    /// Whether `target` has exactly this host, and this port or any.
    #[must_use]
    pub fn matches(&self, target: &Target) -> bool {
        self.host == target.host && self.port.is_none_or(|port| port == target.port)
    }
}

/// Why a text is no target pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a target is written HOST:PORT, or HOST:* for every port, with an IPv6 address in brackets")]
pub struct TargetPatternError(#[source] TargetError);

impl FromStr for TargetPattern {
    type Err = TargetPatternError;

    fn from_str(text: &str) -> Result<Self, TargetPatternError> {
        // The host's syntax is that of a target; any valid port lets its parser read it.
        let any_port = text.strip_suffix(":*").map(|host| format!("{host}:1"));
        let target: Target = any_port.as_deref().unwrap_or(text).parse().map_err(TargetPatternError)?;
        Ok(Self { host: target.host, port: if any_port.is_some() { None } else { Some(target.port) } })
    }
}

impl fmt::Display for TargetPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => Target { host: self.host.clone(), port }.fmt(f),
            None => match &self.host {
                Host::Address(IpAddr::V6(address)) => write!(f, "[{address}]:*"),
                host => write!(f, "{host}:*"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn principal() -> Principal {
        Principal::Named("provisioner".parse().expect("an id"))
    }

    fn grant(agents: &[&str], targets: Option<&[&str]>) -> Grant {
        Grant {
            agents: agents.iter().map(|text| text.parse().expect(text)).collect(),
            targets: targets.map(|all| all.iter().map(|text| text.parse().expect(text)).collect()),
        }
    }

    #[test]
    fn refuses_what_is_not_granted() {
        let db: Option<&[&str]> = Some(&["orders.db.internal:5432"]);
        for (case, agents, targets, agent, target, reason) in [
            ("empty grant", &[][..], None, "acme/prod-eu", "orders.db.internal:5432", Reason::AgentNotGranted),
            ("other agent", &["prod-eu"][..], db, "acme/prod-us", "orders.db.internal:5432", Reason::AgentNotGranted),
            ("longer agent", &["prod-eu"], db, "acme/prod-eu2", "orders.db.internal:5432", Reason::AgentNotGranted),
            (
                "agent outside the pattern",
                &["prod-*"],
                db,
                "acme/my-prod-eu",
                "orders.db.internal:5432",
                Reason::AgentNotGranted,
            ),
            ("empty targets", &["*"], Some(&[]), "acme/prod-eu", "orders.db.internal:5432", Reason::TargetNotGranted),
            ("other port", &["*"], db, "acme/prod-eu", "orders.db.internal:22", Reason::TargetNotGranted),
            ("other host", &["*"], db, "acme/prod-eu", "stock.db.internal:5432", Reason::TargetNotGranted),
            ("suffix trick", &["*"], db, "acme/prod-eu", "orders.db.internal.evil.com:5432", Reason::TargetNotGranted),
            ("prefix trick", &["*"], db, "acme/prod-eu", "evilorders.db.internal:5432", Reason::TargetNotGranted),
            ("literal for a name", &["*"], db, "acme/prod-eu", "10.20.0.5:5432", Reason::TargetNotGranted),
            (
                "name for a literal",
                &["*"],
                Some(&["10.20.0.5:*"]),
                "acme/prod-eu",
                "orders.db.internal:5432",
                Reason::TargetNotGranted,
            ),
            (
                "neighbouring literal",
                &["*"],
                Some(&["10.20.0.5:*"]),
                "acme/prod-eu",
                "10.20.0.50:5432",
                Reason::TargetNotGranted,
            ),
        ] {
            let agent: AgentName = agent.parse().expect(agent);
            let target: Target = target.parse().expect(target);
            match grant(agents, targets).decide(&principal(), &agent, &target) {
                Decision::Deny(denial) => assert_eq!(denial.reason, reason, "{case}: {}", denial.detail),
                Decision::Allow(pass) => panic!("{case}: {pass:?}"),
            }
        }
    }

    #[test]
    fn denials_name_the_closest_miss() {
        let agent: AgentName = "acme/prod-eu".parse().expect("an agent");
        let target: Target = "db.internal:22".parse().expect("a target");
        let detail =
            |grant: Grant| grant.decide(&principal(), &agent, &target).into_result().expect_err("denied").detail;
        assert_eq!(
            detail(grant(&["*"], Some(&["db.internal:5432", "db.internal:80", "other:22"]))),
            "the grant of provisioner has db.internal:5432, db.internal:80, but not port 22"
        );
        assert_eq!(
            detail(grant(&["test-*", "dev"], None)),
            "no agent pattern of provisioner matches prod-eu: test-*, dev"
        );
    }

    #[test]
    fn passes_what_is_granted() {
        for (agents, targets, target) in [
            (&["prod-*"][..], None, "anything.internal:1"),
            (&["x", "prod-eu"], Some(&["db.internal:5432"][..]), "DB.internal.:5432"),
            (&["*"], Some(&["db.internal:*"]), "db.internal:65535"),
            (&["*"], Some(&["[2001:db8::1]:*"]), "[2001:DB8:0::1]:443"),
            (&["*"], Some(&["10.0.0.1:443"]), "[::ffff:10.0.0.1]:443"),
        ] {
            let agent: AgentName = "acme/prod-eu".parse().expect("an agent");
            let target: Target = target.parse().expect(target);
            let pass = grant(agents, targets).decide(&principal(), &agent, &target).into_result().expect("allowed");
            assert_eq!((pass.principal(), pass.agent(), pass.target()), (&principal(), &agent, &target));
        }
    }

    #[test]
    fn target_patterns_are_exact_and_in_normal_form() {
        for text in [
            "",
            "*",
            "*:*",
            "*:443",
            "db",
            "db:",
            "db:0",
            "db:65536",
            "db:**",
            "*.db:1",
            "::1:*",
            "2130706433:*",
            "d b:*",
        ] {
            assert!(text.parse::<TargetPattern>().is_err(), "{text}");
        }
        for (text, normal) in [
            ("DB.Internal.:443", "db.internal:443"),
            ("db:*", "db:*"),
            ("[2001:DB8::0001]:*", "[2001:db8::1]:*"),
            ("[::ffff:10.0.0.1]:*", "10.0.0.1:*"),
        ] {
            assert_eq!(
                text.parse::<TargetPattern>().map(|pattern| pattern.to_string()).as_deref(),
                Ok(normal),
                "{text}"
            );
        }
    }
}

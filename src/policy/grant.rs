//! The gateway's side: which agents a principal may use, and optionally for which targets.
//!
//! The gateway knows targets only as they were asked for. It compares a name with names and a literal with literals,
//! and leaves addresses to the agent, which is the one that resolves and dials.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use super::pattern::{HostPattern, HostPatternError};
use super::ports::{Ports, PortsError};
use super::{Decision, Denial, Reason, list};
use crate::identity::{AgentId, AgentName, Pattern, Principal};
use crate::target::{Host, Target, TargetError, normal};

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
            let ports: Vec<_> = targets.iter().filter(|pattern| pattern.has(&target.host)).collect();
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

/// A target in a grant: `host:port`, `host:first-last`, or `host:*` for every port of that host. The host is a literal
/// address, IPv6 ones in brackets, or a pattern for names ([`super::pattern`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetPattern {
    host: HostSet,
    ports: Option<Ports>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum HostSet {
    Address(IpAddr),
    Names(HostPattern),
}

impl TargetPattern {
    /// Whether `target` has this host, and one of these ports.
    #[must_use]
    pub fn matches(&self, target: &Target) -> bool {
        self.has(&target.host) && self.ports.is_none_or(|ports| ports.contains(target.port))
    }

    fn has(&self, host: &Host) -> bool {
        match (&self.host, host) {
            (HostSet::Address(ours), Host::Address(address)) => *ours == normal(*address),
            (HostSet::Names(pattern), Host::Name(name)) => pattern.grants(name),
            (HostSet::Address(_), Host::Name(_)) | (HostSet::Names(_), Host::Address(_)) => false,
        }
    }
}

/// Why a text is no target pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetPatternError {
    /// Not two parts with a colon between.
    #[error(
        "a target is written HOST:PORT, HOST:FIRST-LAST or HOST:* for every port, with an IPv6 address in brackets"
    )]
    Form,
    /// The host.
    #[error("the host of this target cannot be used")]
    Host(#[source] TargetError),
    /// The host, which stands for several names.
    #[error("the host of this target cannot be used")]
    Pattern(#[source] HostPatternError),
    /// The port.
    #[error("the port of this target cannot be used: `*` stands for every port")]
    Ports(#[source] PortsError),
}

impl FromStr for TargetPattern {
    type Err = TargetPatternError;

    fn from_str(text: &str) -> Result<Self, TargetPatternError> {
        let (host, ports) = text.rsplit_once(':').ok_or(TargetPatternError::Form)?;
        let ports = match ports {
            "*" => None,
            ports => Some(ports.parse().map_err(TargetPatternError::Ports)?),
        };
        let host = if host.contains('*') {
            HostSet::Names(host.parse().map_err(TargetPatternError::Pattern)?)
        } else {
            // The host's syntax is that of a target, brackets included; any valid port lets its parser read it.
            let target: Target = format!("{host}:1").parse().map_err(TargetPatternError::Host)?;
            match target.host {
                Host::Address(address) => HostSet::Address(address),
                Host::Name(name) => HostSet::Names(HostPattern::from(name)),
            }
        };
        Ok(Self { host, ports })
    }
}

impl fmt::Display for TargetPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            HostSet::Address(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            HostSet::Address(address) => write!(f, "{address}:")?,
            HostSet::Names(pattern) => write!(f, "{pattern}:")?,
        }
        match self.ports {
            Some(ports) => ports.fmt(f),
            None => f.write_str("*"),
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
            (
                "no label for the wildcard",
                &["*"],
                Some(&["*.db.internal:5432"]),
                "acme/prod-eu",
                "db.internal:5432",
                Reason::TargetNotGranted,
            ),
            (
                "two labels for the wildcard",
                &["*"],
                Some(&["*.db.internal:5432"]),
                "acme/prod-eu",
                "a.b.db.internal:5432",
                Reason::TargetNotGranted,
            ),
            (
                "suffix trick on a wildcard",
                &["*"],
                Some(&["**.db.internal:*"]),
                "acme/prod-eu",
                "a.db.internal.evil.com:5432",
                Reason::TargetNotGranted,
            ),
            (
                "literal for a wildcard",
                &["*"],
                Some(&["*.db.internal:*"]),
                "acme/prod-eu",
                "10.20.0.5:5432",
                Reason::TargetNotGranted,
            ),
            (
                "service for a wildcard",
                &["*"],
                Some(&["**.db.internal:*"]),
                "acme/prod-eu",
                "_pg._tcp.db.internal:5432",
                Reason::TargetNotGranted,
            ),
            (
                "port beside the range",
                &["*"],
                Some(&["db:5432-5440"]),
                "acme/prod-eu",
                "db:5441",
                Reason::TargetNotGranted,
            ),
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
            (&["*"], Some(&["*.db.internal:5432"]), "orders.db.internal:5432"),
            (&["*"], Some(&["**.db.internal:*"]), "a.b.db.internal:1"),
            (&["*"], Some(&["db:5432-5440"]), "db:5440"),
            (&["*"], Some(&["_pg._tcp.db.internal:5432"]), "_pg._tcp.db.internal:5432"),
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
            "*.*:1",
            "db.*:1",
            "d*:1",
            "10.20.*:1",
            "*.db:",
            "db:2-1",
            "db:0-1",
            "db:1-",
            "db:1-2-3",
            "db:+1",
            "db:01",
            "0177.0.0.1:1",
            "fe80::1:1",
            "[fe80::1%eth0]:1",
            "[10.0.0.1]:1",
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
            ("*.DB.Internal.:5432", "*.db.internal:5432"),
            ("**.db.internal:*", "**.db.internal:*"),
            ("db:5432-5440", "db:5432-5440"),
            ("[2001:DB8::0001]:1-2", "[2001:db8::1]:1-2"),
        ] {
            assert_eq!(
                text.parse::<TargetPattern>().map(|pattern| pattern.to_string()).as_deref(),
                Ok(normal),
                "{text}"
            );
        }
    }
}

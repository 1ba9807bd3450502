//! Who may reach what. Default deny, on both sides of a link.
//!
//! The gateway decides by the [`grant`] that its registry gives a principal. The agent decides again, by the rules that
//! the network's owner wrote into the agent's own configuration, and on the address that it is about to dial.
//!
//! Promised: every decision is a pure function of its arguments. It does no I/O, never waits, has an answer for every
//! input, and that answer is a denial unless something was written down that allows the request. What it allows comes
//! as a value with private fields that cannot be copied; the next layer consumes it, so there is no way round the
//! policy.
//!
//! Absent: names are not resolved here, and nothing is dialled or recorded.

pub mod deny;
pub mod grant;
pub mod guard;
pub mod pattern;
pub mod ports;
pub mod rule;
pub mod trial;
pub mod window;

use std::fmt;

/// What a policy answers.
#[derive(Debug)]
#[must_use = "a decision that nobody looks at protects nothing"]
pub enum Decision<P> {
    /// Yes, and this is the permit that the next layer asks for.
    Allow(P),
    /// No.
    Deny(Denial),
}

impl<P> Decision<P> {
    /// The permit, or why there is none.
    ///
    /// # Errors
    /// The denial, if it is one.
    pub fn into_result(self) -> Result<P, Denial> {
        match self {
            Self::Allow(permit) => Ok(permit),
            Self::Deny(denial) => Err(denial),
        }
    }
}

/// Why a policy said no. It deliberately does not implement `Display`: all of it goes into the audit, and none of it to
/// whoever asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// The kind of denial, for counting and for searching.
    pub reason: Reason,
    /// What came closest and where it ended, for the operator who reads the audit.
    pub detail: String,
    /// The name of the deny rule that said so, if one did.
    pub rule: Option<String>,
}

impl Denial {
    pub(crate) fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), rule: None }
    }
}

/// The kinds of denial. Those of the agent are ordered by how close the request came to being allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Gateway: the organisation, the principal or the agent is not registered.
    NotRegistered,
    /// Gateway: the principal's registration has ended.
    PrincipalExpired,
    /// Gateway: the principal is not accepted from where it comes.
    SourceNetwork,
    /// Gateway: the grant does not name this agent.
    AgentNotGranted,
    /// Gateway: the grant names the agent, but not this target.
    TargetNotGranted,
    /// Agent: nobody who may log in may speak for the principal.
    PrincipalNotAsserted,
    /// Agent: no rule names the host or address.
    NoRule,
    /// Agent: a rule names the host or address, but not the port.
    Port,
    /// Agent: a rule names the host or address and the port, but not the principal.
    Principal,
    /// A rule fits the request, or at the gateway the principal is registered, but not yet.
    NotYetValid,
    /// Agent: a rule fits the request, but no longer.
    Expired,
    /// Agent: a rule fits the request, but the name has no address.
    NoAddress,
    /// Agent: a rule fits the request, but none of the name's addresses lies in its `within`.
    OutsideWithin,
    /// Agent: a rule fits, but the address belongs to a range that no network wider than the range opens.
    ReservedAddress,
    /// Agent: a deny rule holds. No other rule opens what it denies.
    DenyRule,
    /// Agent: one of the agent's own gateways, its upstream proxy or its listener. No rule opens these.
    OwnGateway,
}

impl Reason {
    /// The word that the audit uses.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotRegistered => "not_registered",
            Self::PrincipalExpired => "principal_expired",
            Self::SourceNetwork => "source_network",
            Self::AgentNotGranted => "agent_not_granted",
            Self::TargetNotGranted => "target_not_granted",
            Self::PrincipalNotAsserted => "principal_not_asserted",
            Self::NoRule => "no_rule",
            Self::Port => "port",
            Self::Principal => "principal",
            Self::NotYetValid => "not_yet_valid",
            Self::Expired => "expired",
            Self::NoAddress => "no_address",
            Self::OutsideWithin => "outside_within",
            Self::ReservedAddress => "reserved_address",
            Self::DenyRule => "deny_rule",
            Self::OwnGateway => "own_gateway",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Writes a list into a detail.
fn list(items: impl IntoIterator<Item = impl fmt::Display>) -> String {
    join(items, ", ")
}

/// Writes a list into a detail, cut short: what an operator wrote may be long, an audit record must not be.
fn join(items: impl IntoIterator<Item = impl fmt::Display>, separator: &str) -> String {
    const SHOWN: usize = 8;
    let mut items = items.into_iter();
    let mut text = String::new();
    for item in items.by_ref().take(SHOWN) {
        if !text.is_empty() {
            text.push_str(separator);
        }
        text.push_str(&item.to_string());
    }
    match items.count() {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

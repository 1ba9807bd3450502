//! The agent's side: the allowlist that the network's owner wrote.
//!
//! A rule fits a request if it names the host or address, the port and the principal, all by itself: two rules never
//! add up. Rules that name hosts never fit a literal address, and rules that name addresses never fit a name, so that
//! an operator who grants one kind has not granted the other unawares; nor do rules that name hosts fit the name of a
//! service, whose records lead to other hosts and ports. What a deny rule ([`super::deny`]) denies, no rule permits.
//!
//! A request by name is decided in two steps: [`Allowlist::consider`] before the lookup, so that nobody can use the
//! agent to look up names that no rule has, and [`Allowlist::decide`] on what the name resolved to.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use ipnet::IpNet;
use jiff::Timestamp;

use super::deny::Deny;
use super::guard::{Guard, opens};
use super::pattern::HostPattern;
use super::ports::Ports;
use super::window::{NeverOpen, Window};
use super::{Decision, Denial, Reason, join, list};
use crate::identity::{Fingerprint, ID_MAX, IdError, Pattern, Principal};
use crate::network::unmapped;
use crate::target::{Host, Name, Target, normal};

/// One grant, as the configuration has it. [`Rule::check`] says whether it means anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// What the audit calls it; unique in its allowlist.
    pub name: String,
    /// Which hosts or addresses.
    pub reach: Reach,
    /// Which ports; for a service, those that may be asked for and those that its records may lead to.
    pub ports: Vec<Ports>,
    /// For whom; everyone of the organisation, if omitted.
    pub principals: Option<Vec<PrincipalPattern>>,
    /// When.
    pub window: Window,
}

/// What a rule reaches: hosts by name, services by name, or literal addresses. Never two of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// Hosts by their names.
    Hosts {
        /// The names, exact or with wildcards.
        hosts: Vec<HostPattern>,
        /// Where the addresses of these names must lie.
        within: Vec<IpNet>,
    },
    /// Services by their exact names.
    Services {
        /// The names, such as `_postgresql._tcp.db.internal`.
        services: Vec<Name>,
        /// Where the addresses of the hosts in their records must lie.
        within: Vec<IpNet>,
    },
    /// Literal addresses in these networks.
    Addresses(Vec<IpNet>),
}

impl Reach {
    fn networks(&self) -> &[IpNet] {
        match self {
            Self::Hosts { within, .. } | Self::Services { within, .. } => within,
            Self::Addresses(networks) => networks,
        }
    }
}

/// Why a rule means nothing, or not what its author may think.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// The name would not look well in the audit.
    #[error("a rule's name is 1 to {ID_MAX} of A-Z, a-z, 0-9, '-', '_' and '.'")]
    Name,
    /// A grant by name without names.
    #[error("no host is listed: the rule would never allow anything")]
    Hosts,
    /// A grant by service without services.
    #[error("no service is listed: the rule would never allow anything")]
    Services,
    /// A service among hosts.
    #[error("{0} is the name of a service: make a rule with services")]
    HostIsService(Name),
    /// A host among services.
    #[error("{0} is not the name of a service, such as \"_postgresql._tcp.db.internal\"")]
    NoService(Name),
    /// A deny rule that names nothing.
    #[error("this rule denies nothing: give hosts, or addresses, or both")]
    Nothing,
    /// A grant by name without networks.
    #[error("no network is listed in which the hosts' addresses must lie, such as \"10.20.0.0/16\"")]
    Within,
    /// A grant by address without networks.
    #[error("no network is listed, such as \"10.30.4.7/32\": the rule would never allow anything")]
    Addresses,
    /// A network that has more bits than its prefix.
    #[error("{network} has bits beyond its prefix: write {} for the network or {}/{} for the one address",
        network.trunc(), network.addr(), network.max_prefix_len())]
    HostBits {
        /// In which setting.
        key: &'static str,
        /// The network as it was written.
        network: IpNet,
    },
    /// No ports.
    #[error("no port is listed: the rule would never hold")]
    Ports,
    /// A list of principals without any.
    #[error("the list is empty: the rule would never hold (leave it out to mean the whole organisation)")]
    Principals,
    /// A window that never opens.
    #[error(transparent)]
    Window(#[from] NeverOpen),
}

impl RuleError {
    /// Which setting of the rule is wrong, by its name in the configuration.
    #[must_use]
    pub fn key(&self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Hosts | Self::HostIsService(_) | Self::Nothing => "hosts",
            Self::Services | Self::NoService(_) => "services",
            Self::Within => "within",
            Self::Addresses => "addresses",
            Self::HostBits { key, .. } => key,
            Self::Ports => "ports",
            Self::Principals => "principals",
            Self::Window(_) => "expires",
        }
    }
}

impl Rule {
    /// Checks that every list has something in it and that every network is written as one.
    ///
    /// # Errors
    /// The first fault.
    pub fn check(&self) -> Result<(), RuleError> {
        check_name(&self.name)?;
        let key = match &self.reach {
            Reach::Hosts { hosts, .. } if hosts.is_empty() => return Err(RuleError::Hosts),
            Reach::Services { services, .. } if services.is_empty() => return Err(RuleError::Services),
            Reach::Hosts { within, .. } | Reach::Services { within, .. } if within.is_empty() => {
                return Err(RuleError::Within);
            }
            Reach::Addresses(networks) if networks.is_empty() => return Err(RuleError::Addresses),
            Reach::Hosts { hosts, .. } => {
                match hosts.iter().filter_map(HostPattern::name).find(|name| name.is_service()) {
                    Some(service) => return Err(RuleError::HostIsService(service.clone())),
                    None => "within",
                }
            }
            Reach::Services { services, .. } => match services.iter().find(|name| !name.is_service()) {
                Some(name) => return Err(RuleError::NoService(name.clone())),
                None => "within",
            },
            Reach::Addresses(_) => "addresses",
        };
        check_networks(key, self.reach.networks())?;
        if self.ports.is_empty() {
            return Err(RuleError::Ports);
        }
        if self.principals.as_ref().is_some_and(Vec::is_empty) {
            return Err(RuleError::Principals);
        }
        Ok(self.window.check()?)
    }

    /// The addresses of the request that this rule permits, or how close it came.
    ///
    /// `addresses` is what is known of them: `None` before the lookup of a name.
    fn judge(&self, request: &Request<'_>, addresses: Option<&[SocketAddr]>) -> Result<Vec<SocketAddr>, Denial> {
        let Request { principal, target, .. } = request;
        self.names(&target.host)?;
        if !self.has_port(target.port) {
            let detail = format!(
                "rule {} has {}, but not port {} (it has {})",
                self.name,
                target.host,
                target.port,
                list(&self.ports)
            );
            return Err(Denial::new(Reason::Port, detail));
        }
        if let Some(principals) = &self.principals
            && !principals.iter().any(|pattern| pattern.matches(principal))
        {
            let detail =
                format!("rule {} has {target}, but not for {principal} (it has {})", self.name, list(principals));
            return Err(Denial::new(Reason::Principal, detail));
        }
        if let Err(closed) = self.window.at(request.now) {
            return Err(Denial::new(closed.reason(), format!("rule {} has {target}, but {closed}", self.name)));
        }
        let Some(addresses) = addresses else { return Ok(Vec::new()) };
        let mut permitted = Vec::new();
        let mut denials = Vec::new();
        for &address in addresses {
            match self.admits(address, request) {
                Ok(()) => permitted.push(address),
                Err(denial) => denials.push(denial),
            }
        }
        if permitted.is_empty() {
            return Err(closest(denials).unwrap_or_else(|| {
                Denial::new(Reason::NoAddress, format!("rule {} has {target}, but the name has no address", self.name))
            }));
        }
        Ok(permitted)
    }

    fn names(&self, host: &Host) -> Result<(), Denial> {
        let miss = match (&self.reach, host) {
            (Reach::Hosts { hosts, .. }, Host::Name(name)) => {
                if hosts.iter().any(|pattern| pattern.grants(name)) {
                    return Ok(());
                }
                let first = |name: &str| name.split('.').next().map(str::to_owned);
                let other = hosts.iter().find(|host| first(host.as_str()) == first(name.as_str()));
                match (hosts.iter().find(|pattern| pattern.denies(name)), other) {
                    (Some(pattern), _) => format!(
                        "rule {} has {pattern}, but stands for no service: a service is granted by services",
                        self.name
                    ),
                    (None, Some(host)) => format!("rule {} has {host}, which is another name", self.name),
                    (None, None) => String::new(),
                }
            }
            (Reach::Services { services, .. }, Host::Name(name)) => {
                if services.contains(name) {
                    return Ok(());
                }
                String::new()
            }
            (Reach::Addresses(networks), Host::Address(address)) => {
                let address = normal(*address);
                if networks.iter().any(|network| network.contains(&address)) {
                    return Ok(());
                }
                String::new()
            }
            (Reach::Hosts { within, .. } | Reach::Services { within, .. }, Host::Address(address)) => {
                if within.iter().any(|network| network.contains(&normal(*address))) {
                    let names = match &self.reach {
                        Reach::Services { services, .. } => list(services),
                        Reach::Hosts { hosts, .. } => list(hosts),
                        Reach::Addresses(_) => String::new(),
                    };
                    format!("rule {} reaches that network by name only: ask for {names}", self.name)
                } else {
                    String::new()
                }
            }
            (Reach::Addresses(_), Host::Name(_)) => String::new(),
        };
        Err(Denial::new(Reason::NoRule, miss))
    }

    fn has_port(&self, port: u16) -> bool {
        self.ports.iter().any(|ports| ports.contains(port))
    }

    fn admits(&self, address: SocketAddr, request: &Request<'_>) -> Result<(), Denial> {
        let port = address.port();
        let address = address.ip();
        if request.guard.holds_address(address, port) {
            return Err(own_gateway(request.target, address));
        }
        // Only the records of a service have ports of their own.
        let fits = match self.reach {
            Reach::Services { .. } => self.has_port(port),
            Reach::Hosts { .. } | Reach::Addresses(_) => port == request.target.port,
        };
        if !fits {
            let detail = format!(
                "rule {} has {}, but it leads to port {port} (the rule has {})",
                self.name,
                request.target,
                list(&self.ports)
            );
            return Err(Denial::new(Reason::Port, detail));
        }
        let mut too_wide = None;
        for network in self.reach.networks().iter().filter(|network| network.contains(&address)) {
            match opens(network, address) {
                Ok(()) => return request.denied(SocketAddr::new(address, port)),
                Err(reserved) => too_wide = Some((network, reserved)),
            }
        }
        Err(match too_wide {
            Some((network, reserved)) => Denial::new(
                Reason::ReservedAddress,
                format!(
                    "rule {} has {network}, which does not lie wholly inside of {}: {address} is reserved ({})",
                    self.name, reserved.range, reserved.why
                ),
            ),
            None => Denial::new(
                Reason::OutsideWithin,
                format!(
                    "rule {} has {}, but {address} lies outside of {}",
                    self.name,
                    request.target,
                    list(self.reach.networks())
                ),
            ),
        })
    }
}

/// Whether a rule's name looks well in the audit.
pub(super) fn check_name(name: &str) -> Result<(), RuleError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > ID_MAX || !name.bytes().all(allowed) {
        return Err(RuleError::Name);
    }
    Ok(())
}

/// Whether networks are written as such.
pub(super) fn check_networks(key: &'static str, networks: &[IpNet]) -> Result<(), RuleError> {
    match networks.iter().find(|network| network.trunc() != **network) {
        Some(&network) => Err(RuleError::HostBits { key, network }),
        None => Ok(()),
    }
}

/// A principal in a rule: a pattern for named principals, or the fingerprint of a key that is its own principal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrincipalPattern {
    /// Named principals. No pattern, not even `*`, stands for keys that have no name.
    Pattern(Pattern),
    /// One key.
    Key(Fingerprint),
}

impl PrincipalPattern {
    /// Whether it stands for this principal.
    #[must_use]
    pub fn matches(&self, principal: &Principal) -> bool {
        match (self, principal) {
            (Self::Pattern(pattern), Principal::Named(id)) => pattern.matches(id.as_str()),
            (Self::Key(key), Principal::Key(fingerprint)) => key == fingerprint,
            (Self::Pattern(_), Principal::Key(_)) | (Self::Key(_), Principal::Named(_)) => false,
        }
    }
}

impl FromStr for PrincipalPattern {
    type Err = IdError;

    /// Reads a fingerprint in OpenSSH's form, or a pattern.
    fn from_str(text: &str) -> Result<Self, IdError> {
        match text.parse() {
            Ok(fingerprint) => Ok(Self::Key(fingerprint)),
            Err(_) => text.parse().map(Self::Pattern),
        }
    }
}

impl fmt::Display for PrincipalPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pattern(pattern) => f.write_str(pattern.as_str()),
            Self::Key(fingerprint) => fingerprint.fmt(f),
        }
    }
}

/// What is to be looked up before a request can be decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// Nothing: the target is this literal address.
    Address(SocketAddr),
    /// The addresses of the target's name; the port is the target's.
    Addresses,
    /// The SRV records of the target's name, and the addresses of the hosts in them; the ports are the records'.
    Service,
}

/// The rules of one organisation. The default has none and denies everything.
#[derive(Debug, Clone, Default)]
pub struct Allowlist {
    rules: Vec<Rule>,
    denies: Vec<Deny>,
}

/// Why rules are no allowlist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllowlistError {
    /// One of the rules is wrong.
    #[error("rule {} (\"{}\") is not usable", .index + 1, .name.escape_default())]
    Rule {
        /// Where it stands, from 0.
        index: usize,
        /// Its name.
        name: String,
        /// What is wrong.
        #[source]
        source: RuleError,
    },
    /// One of the deny rules is wrong.
    #[error("deny rule {} (\"{}\") is not usable", .index + 1, .name.escape_default())]
    Deny {
        /// Where it stands among the deny rules, from 0.
        index: usize,
        /// Its name.
        name: String,
        /// What is wrong.
        #[source]
        source: RuleError,
    },
    /// A deny rule has the name of another rule.
    #[error("deny rule {} has the name of another rule: \"{name}\"", .index + 1)]
    DenyName {
        /// Where it stands among the deny rules, from 0.
        index: usize,
        /// The name of both.
        name: String,
    },
    /// Two rules have one name, so that the audit could not tell them apart.
    #[error("rules {} and {} are both named \"{name}\"", .first + 1, .index + 1)]
    Name {
        /// Where the second one stands, from 0.
        index: usize,
        /// Where the first one stands, from 0.
        first: usize,
        /// The name of both.
        name: String,
    },
    /// Two rules say the same.
    #[error("rule \"{name}\" says the same as rule \"{first}\": remove one of them")]
    Same {
        /// Where the second one stands, from 0.
        index: usize,
        /// The name of the first one.
        first: String,
        /// The name of the second one.
        name: String,
    },
}

impl AllowlistError {
    /// Where the rule stands that it is about, from 0: among the rules, or among the deny rules.
    #[must_use]
    pub fn index(&self) -> usize {
        match self {
            Self::Rule { index, .. }
            | Self::Name { index, .. }
            | Self::Same { index, .. }
            | Self::Deny { index, .. }
            | Self::DenyName { index, .. } => *index,
        }
    }
}

impl Allowlist {
    /// Makes an allowlist of rules. No rules make one that denies everything.
    ///
    /// # Errors
    /// If a rule fails [`Rule::check`], or repeats the name or all of the contents of another.
    pub fn new(mut rules: Vec<Rule>) -> Result<Self, AllowlistError> {
        let mut names: HashMap<String, usize> = HashMap::new();
        for (index, rule) in rules.iter().enumerate() {
            let name = || rule.name.clone();
            rule.check().map_err(|source| AllowlistError::Rule { index, name: name(), source })?;
            if let Some(first) = names.insert(name(), index) {
                return Err(AllowlistError::Name { index, first, name: name() });
            }
        }
        for rule in &mut rules {
            match &mut rule.reach {
                Reach::Hosts { within: networks, .. }
                | Reach::Services { within: networks, .. }
                | Reach::Addresses(networks) => {
                    networks.iter_mut().for_each(|network| *network = unmapped(*network));
                }
            }
        }
        for (index, rule) in rules.iter().enumerate() {
            let same = |other: &&Rule| {
                (&other.reach, &other.ports, &other.principals, other.window)
                    == (&rule.reach, &rule.ports, &rule.principals, rule.window)
            };
            if let Some(first) = rules.iter().take(index).find(same) {
                return Err(AllowlistError::Same { index, first: first.name.clone(), name: rule.name.clone() });
            }
        }
        Ok(Self { rules, denies: Vec::new() })
    }

    /// The same allowlist, with these deny rules: what they deny, its rules no longer permit.
    ///
    /// # Errors
    /// If one fails [`Deny::check`], or has the name of another rule.
    pub fn denying(mut self, mut denies: Vec<Deny>) -> Result<Self, AllowlistError> {
        let mut names: HashSet<&str> = self.rules.iter().map(|rule| rule.name.as_str()).collect();
        for (index, deny) in denies.iter().enumerate() {
            deny.check().map_err(|source| AllowlistError::Deny { index, name: deny.name.clone(), source })?;
            if !names.insert(&deny.name) {
                return Err(AllowlistError::DenyName { index, name: deny.name.clone() });
            }
        }
        denies.iter_mut().for_each(Deny::normalise);
        self.denies = denies;
        Ok(self)
    }

    /// The rules, in the order in which they are tried.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The deny rules. Each of them holds, in whatever order.
    #[must_use]
    pub fn denies(&self) -> &[Deny] {
        &self.denies
    }

    /// The first moment after `after` at which a rule begins or ceases to hold: until then, all decisions stay as they are.
    #[must_use]
    pub fn next_change(&self, after: Timestamp) -> Option<Timestamp> {
        let rules = self.rules.iter().map(|rule| rule.window);
        let windows = rules.chain(self.denies.iter().map(|deny| deny.window));
        windows.flat_map(|window| window.edges()).filter(|edge| *edge > after).min()
    }

    /// Whether a request has a chance, and what is to be looked up for it: to be asked before a name is looked up. For a literal
    /// address this is the whole decision, without the permit.
    ///
    /// # Errors
    /// The denial, if no address that the name could have would be permitted.
    pub fn consider(
        &self,
        principal: &Principal,
        target: &Target,
        guard: &Guard,
        now: Timestamp,
    ) -> Result<Lookup, Denial> {
        let request = self.request(principal, target, guard, now);
        match &target.host {
            Host::Address(address) => {
                let address = SocketAddr::new(normal(*address), target.port);
                self.judge(&request, Some(&[address])).map(|_| Lookup::Address(address))
            }
            Host::Name(name) => {
                let lookup = if name.is_service() { Lookup::Service } else { Lookup::Addresses };
                self.judge(&request, None).map(|_| lookup)
            }
        }
    }

    /// Decides on a request whose name has been looked up.
    ///
    /// `resolved` are the addresses of the name, in the order in which they are to be tried. For a literal target it is
    /// ignored: the only address of a literal is itself. The permit comes from the first rule that permits any of the
    /// addresses, and has only those that this one rule permits.
    pub fn decide(
        &self,
        principal: &Principal,
        target: &Target,
        resolved: &[SocketAddr],
        guard: &Guard,
        now: Timestamp,
    ) -> Decision<Permit> {
        let request = self.request(principal, target, guard, now);
        let mut addresses = Vec::new();
        match target.host {
            Host::Address(address) => addresses.push(SocketAddr::new(normal(address), target.port)),
            Host::Name(_) => {
                for address in resolved.iter().map(|address| SocketAddr::new(normal(address.ip()), address.port())) {
                    if !addresses.contains(&address) {
                        addresses.push(address);
                    }
                }
            }
        }
        match self.judge(&request, Some(&addresses)) {
            Ok((rule, permitted)) => {
                addresses.retain(|address| !permitted.contains(address));
                Decision::Allow(Permit {
                    target: target.clone(),
                    rule: rule.name.clone(),
                    addresses: permitted,
                    refused: addresses,
                })
            }
            Err(denial) => Decision::Deny(denial),
        }
    }

    /// Decides again on what has been decided: whether these rules would still permit any of `addresses`, which a name was
    /// resolved to, or which was dialled. Nothing is looked up, so that what runs is judged by where it leads and not by
    /// what its name means by now. Yields no permit: it is about what is there already.
    ///
    /// # Errors
    /// The denial, if they would permit none of them.
    pub fn reconsider(
        &self,
        principal: &Principal,
        target: &Target,
        addresses: &[SocketAddr],
        guard: &Guard,
        now: Timestamp,
    ) -> Result<(), Denial> {
        self.decide(principal, target, addresses, guard, now).into_result().map(drop)
    }

    fn request<'a>(
        &'a self,
        principal: &'a Principal,
        target: &'a Target,
        guard: &'a Guard,
        now: Timestamp,
    ) -> Request<'a> {
        let denies = self.denies.iter().filter(|deny| deny.concerns(principal, now)).collect();
        Request { principal, target, guard, now, denies }
    }

    fn judge(
        &self,
        request: &Request<'_>,
        addresses: Option<&[SocketAddr]>,
    ) -> Result<(&Rule, Vec<SocketAddr>), Denial> {
        if request.guard.holds(request.target) {
            return Err(own_gateway(request.target, &request.target.host));
        }
        if let Some(deny) = request.denies.iter().find(|deny| deny.denies_target(request.target)) {
            return Err(denied(deny, format!("deny rule {} has {}", deny.name, request.target)));
        }
        let mut denials = Vec::new();
        for rule in &self.rules {
            match rule.judge(request, addresses) {
                Ok(permitted) => return Ok((rule, permitted)),
                Err(denial) => denials.push(denial),
            }
        }
        let denial = closest(denials).unwrap_or_else(|| Denial::new(Reason::NoRule, "the allowlist has no rules"));
        Err(match denial.reason {
            Reason::NoRule => {
                let kind = match request.target.host {
                    Host::Name(_) => "no rule has the host",
                    Host::Address(_) => "no rule has an address network that holds",
                };
                let near = if denial.detail.is_empty() { String::new() } else { format!("; {}", denial.detail) };
                Denial::new(Reason::NoRule, format!("{kind} {}{near}", request.target.host))
            }
            _ => denial,
        })
    }
}

/// The agent's permit: this target, at these addresses. Only [`Allowlist::decide`] makes one, and opening consumes it.
#[derive(Debug)]
#[must_use = "a permit is to be used for the forward it was given for"]
pub struct Permit {
    target: Target,
    rule: String,
    addresses: Vec<SocketAddr>,
    refused: Vec<SocketAddr>,
}

impl Permit {
    /// What was asked for.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The name of the rule that permits it.
    #[must_use]
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// The addresses that may be dialled, in the order of the lookup; at least one, each once.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The addresses that the name has as well, and that must not be dialled. For the audit.
    #[must_use]
    pub fn refused(&self) -> &[SocketAddr] {
        &self.refused
    }
}

/// What is asked, and by whom.
struct Request<'a> {
    principal: &'a Principal,
    target: &'a Target,
    guard: &'a Guard,
    now: Timestamp,
    /// The deny rules that hold for this principal at this moment.
    denies: Vec<&'a Deny>,
}

impl Request<'_> {
    /// Whether a deny rule holds for an address to which the target leads.
    fn denied(&self, address: SocketAddr) -> Result<(), Denial> {
        match self.denies.iter().find(|deny| deny.denies(self.target, address)) {
            Some(deny) => {
                let detail = format!("{} leads to {}, which deny rule {} has", self.target, address.ip(), deny.name);
                Err(denied(deny, detail))
            }
            None => Ok(()),
        }
    }
}

/// The denial of what came closest to being allowed; where several came equally close, all of their details.
fn closest(denials: Vec<Denial>) -> Option<Denial> {
    let reason = denials.iter().map(|denial| denial.reason).max()?;
    let rule = denials.iter().find(|denial| denial.reason == reason).and_then(|denial| denial.rule.clone());
    let details = denials.into_iter().filter(|denial| denial.reason == reason && !denial.detail.is_empty());
    Some(Denial { rule, ..Denial::new(reason, join(details.map(|denial| denial.detail), "; ")) })
}

fn denied(deny: &Deny, detail: String) -> Denial {
    Denial { rule: Some(deny.name.clone()), ..Denial::new(Reason::DenyRule, detail) }
}

fn own_gateway(target: &Target, address: impl fmt::Display) -> Denial {
    let detail = format!(
        "{target} leads to {address}, a gateway, the proxy or the listener of this agent, which no rule can open"
    );
    Denial::new(Reason::OwnGateway, detail)
}

#[cfg(test)]
mod tests;

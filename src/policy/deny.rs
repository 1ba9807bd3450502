//! What is never to be reached, whatever else is allowed.
//!
//! A deny rule by hosts is about names as they are asked for; one by addresses about every address that a forward would
//! lead to, literal or looked up, in any of its spellings. Denying a name denies no machine: who may ask for the machine by
//! its address, or by another name, still can. So what must not be reached is denied by address.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use jiff::Timestamp;

use super::guard::embedded;
use super::pattern::HostPattern;
use super::ports::Ports;
use super::rule::{PrincipalPattern, RuleError, check_name, check_networks};
use super::window::Window;
use crate::identity::Principal;
use crate::network::unmapped;
use crate::target::{Host, Target, normal};

/// One denial, as the configuration has it. [`Deny::check`] says whether it means anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deny {
    /// What the audit calls it; unique among all rules of its allowlist.
    pub name: String,
    /// Names, as they are asked for; also those of services.
    pub hosts: Vec<HostPattern>,
    /// Networks, for literal addresses and for looked up ones.
    pub addresses: Vec<IpNet>,
    /// Which ports.
    pub ports: Vec<Ports>,
    /// To whom; to everyone of the organisation, if omitted.
    pub principals: Option<Vec<PrincipalPattern>>,
    /// When.
    pub window: Window,
}

impl Deny {
    /// Checks that the rule denies something, and that every network is written as one.
    ///
    /// # Errors
    /// The first fault.
    pub fn check(&self) -> Result<(), RuleError> {
        check_name(&self.name)?;
        if self.hosts.is_empty() && self.addresses.is_empty() {
            return Err(RuleError::Nothing);
        }
        check_networks("addresses", &self.addresses)?;
        if self.ports.is_empty() {
            return Err(RuleError::Ports);
        }
        if self.principals.as_ref().is_some_and(Vec::is_empty) {
            return Err(RuleError::Principals);
        }
        Ok(self.window.check()?)
    }

    /// Whether it holds for this principal at the time `now`.
    pub(super) fn concerns(&self, principal: &Principal, now: Timestamp) -> bool {
        self.window.at(now).is_ok()
            && self.principals.as_ref().is_none_or(|all| all.iter().any(|pattern| pattern.matches(principal)))
    }

    /// Whether it denies what is asked for, before anything is looked up.
    pub(super) fn denies_target(&self, target: &Target) -> bool {
        match &target.host {
            Host::Name(name) => self.has_port(target.port) && self.hosts.iter().any(|pattern| pattern.denies(name)),
            Host::Address(address) => self.denies(target, SocketAddr::new(*address, target.port)),
        }
    }

    /// Whether it denies that `target` leads to this address.
    pub(super) fn denies(&self, target: &Target, address: SocketAddr) -> bool {
        let ip = normal(address.ip());
        let held = |one: IpAddr| self.addresses.iter().any(|network| network.contains(&one));
        let by_address = held(ip) || embedded(ip).any(|(inner, _)| held(inner.into()));
        let by_name = matches!(&target.host, Host::Name(name) if self.hosts.iter().any(|pattern| pattern.denies(name)));
        self.has_port(address.port()) && (by_address || by_name)
    }

    /// Puts its networks into the form in which policies compare them.
    pub(super) fn normalise(&mut self) {
        self.addresses.iter_mut().for_each(|network| *network = unmapped(*network));
    }

    fn has_port(&self, port: u16) -> bool {
        self.ports.iter().any(|ports| ports.contains(port))
    }
}

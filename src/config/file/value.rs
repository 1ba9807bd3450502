//! Single values that several tables have, and what may stand in a configuration but once.

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::chain::Chain;
use crate::document::{Item, Place, read_secret};
use crate::identity::{Fingerprint, PrivateKey, PublicKey};
use crate::network::{self, Network, Networks};
use crate::policy::pattern::{HostPattern, HostPatternError};
use crate::secret::Secret;
use crate::target::TargetError;

/// Networks, at least one.
pub(in crate::config) fn networks(item: &Item<'_>) -> Option<Networks> {
    item.list(Item::parse::<Network>).and_then(Networks::new)
}

/// Reads a file that only its owner can read. `what` says what is in it.
pub(in crate::config) fn secret_file(item: &Item<'_>, what: &str) -> Option<Secret<String>> {
    match read_secret(&item.file()?) {
        Ok(text) => Some(text),
        Err(faults) => item.reject(format!("{what} file {faults}")),
    }
}

pub(in crate::config) fn private_key(item: &Item<'_>) -> Option<PrivateKey> {
    match PrivateKey::read(&item.file()?) {
        Ok(key) => Some(key),
        Err(error) => item.reject(Chain(&error).to_string()),
    }
}

pub(super) fn public_key(item: &Item<'_>) -> Option<PublicKey> {
    match PublicKey::parse(item.string()?) {
        Ok(key) => Some(key),
        Err(error) => item.reject(format!("this {}", Chain(&error))),
    }
}

pub(in crate::config) fn address(item: &Item<'_>) -> Option<SocketAddr> {
    match item.string()?.parse() {
        Ok(address) => Some(address),
        Err(_) => item.reject("an address with a port is wanted, such as 0.0.0.0:443 or [::]:443"),
    }
}

pub(super) fn host(item: &Item<'_>) -> Option<HostPattern> {
    match item.string()?.parse() {
        Ok(pattern) => Some(pattern),
        Err(HostPatternError::Numeric | HostPatternError::Name(TargetError::Numeric)) => {
            item.reject("a name is wanted, and this is or looks like an address: make a rule with addresses")
        }
        Err(error) => item.reject(error.to_string()),
    }
}

pub(in crate::config) fn network(item: &Item<'_>) -> Option<IpNet> {
    let text = item.string()?;
    if let Some(network) = network::parse(text) {
        return Some(network);
    }
    match text.parse::<IpAddr>() {
        Ok(address) => item.reject(format!("a network is wanted: write {} for this one address", IpNet::from(address))),
        Err(_) => item.reject("a network is wanted, such as 10.20.0.0/16 or 2001:db8::/32"),
    }
}

/// Reads something optional: `Some(None)` if it is absent, `None` if it is wrong.
pub(in crate::config) fn optional<'a, T>(
    item: Option<Item<'a>>,
    read: impl FnOnce(&Item<'a>) -> Option<T>,
) -> Option<Option<T>> {
    match item {
        Some(item) => read(&item).map(Some),
        None => Some(None),
    }
}

/// Things of which each may be there once.
pub(in crate::config) struct Once<T>(pub(super) HashMap<T, Place>, &'static str);

impl<T: Eq + Hash + Display> Once<T> {
    pub(in crate::config) fn new(what: &'static str) -> Self {
        Self(HashMap::new(), what)
    }

    /// Whether this is the first of its kind; if it is not, that is recorded as a fault.
    pub(in crate::config) fn first(&mut self, thing: T, item: &Item<'_>) -> bool {
        if let Some(first) = self.0.get(&thing) {
            // A name that we did not check may hold anything.
            let name = thing.to_string();
            item.fault(format!("{} {} is there already, at {first}", self.1, name.escape_debug()));
            return false;
        }
        self.0.insert(thing, item.place().clone());
        true
    }
}

/// The keys of one configuration, each of which has one use.
#[derive(Default)]
pub(super) struct Keys(HashMap<Fingerprint, (String, Place)>);

impl Keys {
    /// Notes what a key is used for; a second use is recorded as a fault.
    pub(super) fn claim(&mut self, key: Fingerprint, used_as: &str, item: &Item<'_>) {
        match self.0.get(&key) {
            Some((other, first)) => {
                item.fault(format!(
                    "this key is {other} too (at {first}): each use and each organisation needs its own"
                ));
            }
            None => {
                self.0.insert(key, (used_as.to_owned(), item.place().clone()));
            }
        }
    }
}

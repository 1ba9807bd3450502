//! Names to addresses, through the system's resolver or through DNS servers that the configuration names.
//!
//! Promised: a name with a dot in it is absolute, so that no search domain is ever appended and `orders.db.internal` cannot
//! turn into `orders.db.internal.example.com`. A lookup ends within its time and yields at most [`ADDRESSES_PER_NAME`]
//! addresses, in normal form, each once, of the families that are wanted, these taking turns.
//!
//! Through the system's resolver nothing is cached, and a name without a dot is looked up as the system is configured to.
//! Through servers of the owner's choosing every name is absolute, and asked for there alone: neither the hosts file nor
//! any other configuration of the system counts, so that the configuration alone says who is believed. What they answer is
//! used again for as long as they say, but no longer than the configuration does; what lives for no time is not kept.
//! Services (SRV records, RFC 2782) can be asked for only there.
//!
//! Absent: DNSSEC, which is for the servers to check. And whether an address may be dialled is for `policy` to say, on every
//! answer anew, cached or not.

mod answer;
mod cache;
mod hosts;
mod servers;
mod service;
mod shared;
mod system;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::time::timeout;

use crate::limits::{
    ADDRESSES_PER_NAME, ALIASES_MAX, ANSWER_LIFE, FAMILY_PATIENCE, LOOKUPS_MAX, RESOLVE_TIMEOUT, SERVICE_TARGETS,
};
use crate::target::{Name, normal};
use crate::task::{Tasks, all};
use answer::{Kind, Records};
use servers::{Failure, Found, Servers};

/// How names are looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The DNS servers to ask, in this order; the system's resolver, if there are none.
    pub servers: Vec<SocketAddr>,
    /// How long a lookup may take.
    pub timeout: Duration,
    /// The longest that an answer of these servers is used again.
    pub life: Duration,
    /// Which addresses are wanted, and which first.
    pub family: Family,
}

impl Default for Config {
    fn default() -> Self {
        Self { servers: Vec::new(), timeout: RESOLVE_TIMEOUT, life: ANSWER_LIFE, family: Family::Any }
    }
}

/// Which families of addresses are wanted, and which first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// Both; the one first that the system puts first, of configured servers IPv6 (RFC 8305 §4).
    #[default]
    Any,
    /// Both, IPv4 first.
    PreferIpv4,
    /// Both, IPv6 first.
    PreferIpv6,
    /// IPv4 alone.
    Ipv4,
    /// IPv6 alone.
    Ipv6,
}

impl Family {
    /// Leaves out what is not wanted and has the families take turns (RFC 8305 §4), each in its own order.
    #[must_use]
    pub fn arrange(self, addresses: &[SocketAddr]) -> Vec<SocketAddr> {
        self.take_turns(addresses.iter().copied(), SocketAddr::is_ipv4)
    }

    fn take_turns<T>(self, addresses: impl IntoIterator<Item = T>, is_ipv4: impl Fn(&T) -> bool) -> Vec<T> {
        let mut addresses = addresses.into_iter().filter(|one| self.wants(is_ipv4(one))).peekable();
        let ipv4_first = match self {
            Self::Any => addresses.peek().is_some_and(&is_ipv4),
            Self::PreferIpv4 | Self::Ipv4 => true,
            Self::PreferIpv6 | Self::Ipv6 => false,
        };
        let (first, second): (Vec<T>, Vec<T>) = addresses.partition(|one| is_ipv4(one) == ipv4_first);
        let mut turns = Vec::with_capacity(first.len() + second.len());
        let (mut first, mut second) = (first.into_iter(), second.into_iter());
        loop {
            let before = turns.len();
            turns.extend(first.next());
            turns.extend(second.next());
            if turns.len() == before {
                return turns;
            }
        }
    }

    fn wants(self, ipv4: bool) -> bool {
        match self {
            Self::Any | Self::PreferIpv4 | Self::PreferIpv6 => true,
            Self::Ipv4 => ipv4,
            Self::Ipv6 => !ipv4,
        }
    }
}

/// Why a name has no addresses.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The system's resolver said so, or could not be asked.
    #[error("could not look up {name}")]
    System {
        /// The name.
        name: Name,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// None of the servers gave an answer that could be used.
    #[error("could not look up {name}: {told}")]
    Servers {
        /// The name.
        name: Name,
        /// What each server did instead.
        told: String,
    },
    /// There is no such name.
    #[error("could not look up {name}: there is no such name")]
    Absent {
        /// The name.
        name: Name,
    },
    /// The name exists, but has no address, or none of the family that is wanted.
    #[error("could not look up {name}: it exists, but has no address")]
    Empty {
        /// The name.
        name: Name,
    },
    /// There is such a service, but nothing that could be connected to.
    #[error("could not look up {name}: no instance of the service has a host, a port and an address")]
    NoInstance {
        /// The name.
        name: Name,
    },
    /// Services can only be asked for at servers that the configuration names.
    #[error("could not look up {name}: the system's resolver knows no services; name DNS servers in [agent.resolver]")]
    NoServers {
        /// The name.
        name: Name,
    },
    /// The name's aliases lead nowhere.
    #[error("could not look up {name}: more than {ALIASES_MAX} aliases, or aliases in a circle")]
    Aliases {
        /// The name.
        name: Name,
    },
    /// Too many other lookups wait.
    #[error("could not look up {name}: {LOOKUPS_MAX} other names are waited for already")]
    Busy {
        /// The name.
        name: Name,
    },
    /// There was no answer in time.
    #[error("could not look up {name}: no answer within {} s", .limit.as_secs())]
    Timeout {
        /// The name.
        name: Name,
        /// The time it had.
        limit: Duration,
    },
}

/// Looks a name up through the system's resolver.
///
/// # Errors
/// If there is no address, or no answer in time.
pub async fn lookup(name: &Name) -> Result<Vec<IpAddr>, ResolveError> {
    Resolver::system(&Config::default()).addresses(name).await
}

/// Looks names up as a configuration says.
pub struct Resolver {
    servers: Option<Servers>,
    timeout: Duration,
    family: Family,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("servers", &self.servers.is_some()).finish_non_exhaustive()
    }
}

impl Resolver {
    /// A resolver with an empty cache. Its lookups are tasks of `tasks`.
    #[must_use]
    pub fn new(config: &Config, tasks: &Tasks) -> Self {
        let servers =
            (!config.servers.is_empty()).then(|| Servers::new(&config.servers, config.timeout, config.life, tasks));
        Self { servers, ..Self::system(config) }
    }

    /// The system's resolver, whatever servers the configuration names.
    #[must_use]
    pub fn system(config: &Config) -> Self {
        Self { servers: None, timeout: config.timeout, family: config.family }
    }

    /// Which families are wanted, and which first.
    #[must_use]
    pub fn family(&self) -> Family {
        self.family
    }

    /// The addresses of a name, in the order in which they are to be tried.
    ///
    /// # Errors
    /// If there is none, or no answer in time.
    pub async fn addresses(&self, name: &Name) -> Result<Vec<IpAddr>, ResolveError> {
        let found = self.in_time(name, async {
            match &self.servers {
                Some(servers) => self.ask_for_addresses(servers, name).await,
                None => system::addresses(name).await,
            }
        });
        let addresses = tidy(found.await?, self.family);
        if addresses.is_empty() { Err(ResolveError::Empty { name: name.clone() }) } else { Ok(addresses) }
    }

    /// Where the instances of a service are, in the order in which they are to be tried: by priority, drawn by weight among
    /// those of one priority, and the addresses of each as [`Resolver::addresses`] has them.
    ///
    /// # Errors
    /// If there is none, no answer in time, or nobody who could be asked.
    pub async fn service(&self, name: &Name) -> Result<Vec<SocketAddr>, ResolveError> {
        let Some(servers) = &self.servers else { return Err(ResolveError::NoServers { name: name.clone() }) };
        self.in_time(name, self.ask_for_service(servers, name)).await
    }

    async fn in_time<T>(
        &self,
        name: &Name,
        work: impl Future<Output = Result<T, ResolveError>>,
    ) -> Result<T, ResolveError> {
        let late = |_| Err(ResolveError::Timeout { name: name.clone(), limit: self.timeout });
        timeout(self.timeout, work).await.unwrap_or_else(late)
    }

    /// Asks for both families side by side, as far as they are wanted.
    async fn ask_for_addresses(&self, servers: &Servers, name: &Name) -> Result<Vec<IpAddr>, ResolveError> {
        let ask = |kind| servers.find(name.as_str(), kind);
        let answers = match self.family {
            Family::Ipv4 => vec![ask(Kind::Ipv4).await],
            Family::Ipv6 => vec![ask(Kind::Ipv6).await],
            Family::Any | Family::PreferIpv4 | Family::PreferIpv6 => {
                let (mut ipv4, mut ipv6) = (std::pin::pin!(ask(Kind::Ipv4)), std::pin::pin!(ask(Kind::Ipv6)));
                tokio::select! {
                    first = &mut ipv6 => {
                        let second = patiently(&first, ipv4).await;
                        [Some(first), second].into_iter().flatten().collect()
                    }
                    first = &mut ipv4 => {
                        let second = patiently(&first, ipv6).await;
                        [second, Some(first)].into_iter().flatten().collect()
                    }
                }
            }
        };
        let (mut addresses, mut exists, mut failure) = (Vec::new(), true, None);
        for answer in answers {
            match answer {
                Ok(Found::Records(Records::Addresses(found))) => addresses.extend(found),
                Ok(Found::Records(Records::Instances(_))) => {}
                Ok(Found::Nothing { exists: false }) => exists = false,
                Ok(Found::Nothing { exists: true }) => {}
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            _ if !addresses.is_empty() => Ok(addresses),
            Some(failure) => Err(self.failed(name, failure)),
            None if !exists => Err(ResolveError::Absent { name: name.clone() }),
            None => Err(ResolveError::Empty { name: name.clone() }),
        }
    }

    async fn ask_for_service(&self, servers: &Servers, name: &Name) -> Result<Vec<SocketAddr>, ResolveError> {
        let instances = match servers.find(name.as_str(), Kind::Service).await {
            Ok(Found::Records(Records::Instances(instances))) => service::order(instances, service::draw),
            Ok(Found::Nothing { exists: false }) => return Err(ResolveError::Absent { name: name.clone() }),
            Ok(_) => return Err(ResolveError::NoInstance { name: name.clone() }),
            Err(failure) => return Err(self.failed(name, failure)),
        };
        let mut hosts: Vec<&Name> = Vec::new();
        for (host, _) in &instances {
            if !hosts.contains(&host) && hosts.len() < SERVICE_TARGETS {
                hosts.push(host);
            }
        }
        let lookups: Vec<_> = hosts.iter().map(|host| self.ask_for_addresses(servers, host)).collect();
        let found = all(lookups).await;
        let mut known = HashMap::new();
        let mut failure = None;
        for (host, found) in hosts.into_iter().zip(found) {
            match found {
                Ok(addresses) => drop(known.insert(host, tidy(addresses, self.family))),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        let mut places = Vec::new();
        for (host, port) in &instances {
            for address in known.get(host).into_iter().flatten() {
                let place = SocketAddr::new(*address, *port);
                if places.len() < ADDRESSES_PER_NAME && !places.contains(&place) {
                    places.push(place);
                }
            }
        }
        if places.is_empty() {
            return Err(failure.unwrap_or_else(|| ResolveError::NoInstance { name: name.clone() }));
        }
        Ok(places)
    }

    fn failed(&self, name: &Name, failure: Failure) -> ResolveError {
        let name = name.clone();
        match failure {
            Failure::Servers(told) => ResolveError::Servers { name, told },
            Failure::Aliases => ResolveError::Aliases { name },
            Failure::Timeout => ResolveError::Timeout { name, limit: self.timeout },
            Failure::Busy => ResolveError::Busy { name },
            Failure::BrokenOff => ResolveError::Servers { name, told: "the lookup was broken off".to_owned() },
        }
    }
}

/// Waits for the second family: for a while, where there are addresses already.
async fn patiently(
    first: &Result<Found, Failure>,
    second: impl Future<Output = Result<Found, Failure>>,
) -> Option<Result<Found, Failure>> {
    match first {
        Ok(Found::Records(_)) => timeout(FAMILY_PATIENCE, second).await.ok(),
        _ => Some(second.await),
    }
}

fn is_absolute(name: &Name) -> bool {
    name.as_str().contains('.')
}

/// Normal form, each once, as many as are wanted of each family, and of all.
fn tidy(found: impl IntoIterator<Item = IpAddr>, family: Family) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    let mut count = [0; 2];
    for address in found.into_iter().map(normal) {
        let count = &mut count[usize::from(address.is_ipv4())];
        if *count < ADDRESSES_PER_NAME && !addresses.contains(&address) {
            *count += 1;
            addresses.push(address);
        }
    }
    let mut addresses = family.take_turns(addresses, IpAddr::is_ipv4);
    addresses.truncate(ADDRESSES_PER_NAME);
    addresses
}

#[cfg(test)]
mod tests;

//! The way to an upstream.
//!
//! Promised: what is dialled is the upstream's own host and port. Where its name is looked up here, no reserved address is
//! dialled that the configuration does not name: an answer of DNS opens neither this host nor its cloud's metadata. Behind a
//! proxy on the way out, the name is that proxy's to look up.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use ipnet::IpNet;
use tokio::time::Instant;

use super::Upstream;
use super::live::Pass;
use crate::audit::{Ending, Resolved};
use crate::chain::Chain;
use crate::policy::guard;
use crate::resolve;
use crate::target::Host;
use crate::tunnel::connect::{self, ConnectError, Connection};
use crate::tunnel::stream::Stream;

/// Why an upstream could not be reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutwardError {
    /// Its name.
    #[error("could not resolve {host}")]
    Resolve {
        host: Host,
        #[source]
        source: resolve::ResolveError,
    },
    /// Its name stands for nothing.
    #[error("{host} has no address")]
    NoAddress { host: Host },
    /// Its name leads where none of ours may.
    #[error(
        "{host} has no address but reserved ones ({address}: {why}); name their network in `within` if that is meant"
    )]
    Reserved { host: Host, address: IpAddr, why: &'static str },
    /// TCP.
    #[error("could not connect to {address}")]
    Tcp {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// The proxy on the way, or TCP to it.
    #[error("could not get through to it")]
    Connect(#[source] ConnectError),
}

impl OutwardError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Resolve { .. } | Self::NoAddress { .. } => "unresolved",
            Self::Reserved { .. } => "reserved_address",
            Self::Tcp { .. } | Self::Connect(_) => "connect_failed",
        }
    }

    pub(super) fn ending(&self) -> Ending {
        let (reason, detail) = (self.reason(), Chain(self).to_string());
        match self {
            Self::Reserved { .. } => Ending::Denied { reason, detail },
            _ => Ending::Failed { reason, detail },
        }
    }
}

/// What a name resolved to, for the trail.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) resolved: Vec<Resolved>,
    pub(super) refused: Vec<Resolved>,
}

/// An upstream that has been reached.
pub(super) struct Reached {
    pub(super) stream: Stream,
    /// What it has said already.
    pub(super) head: Bytes,
    /// Where it is, if it was dialled from here.
    pub(super) address: Option<SocketAddr>,
}

/// Connects to where a pass leads. `found` is told what its name resolved to.
///
/// # Errors
/// If any stage fails.
pub(super) async fn reach(pass: Pass, found: &mut Found) -> Result<Reached, OutwardError> {
    let (upstream, egress) = pass.spend();
    if egress.proxy_to(&upstream.to).is_some() {
        let Connection { stream, head } =
            connect::connect(&upstream.to, &egress, |_| ()).await.map_err(OutwardError::Connect)?;
        return Ok(Reached { stream, head, address: None });
    }
    let mut failure = None;
    for address in addresses(&upstream, found).await? {
        match connect::dial(address).await {
            Ok(stream) => return Ok(Reached { stream: stream.into(), head: Bytes::new(), address: Some(address) }),
            Err(source) => failure = Some(OutwardError::Tcp { address, source }),
        }
    }
    Err(failure.unwrap_or_else(|| OutwardError::NoAddress { host: upstream.to.host.clone() }))
}

/// The addresses that may be dialled.
async fn addresses(upstream: &Upstream, found: &mut Found) -> Result<Vec<SocketAddr>, OutwardError> {
    let host = &upstream.to.host;
    let name = match host {
        // Written down as it is, it is what is meant.
        Host::Address(address) => return Ok(vec![SocketAddr::new(*address, upstream.to.port)]),
        Host::Name(name) => name,
    };
    let resolved =
        resolve::lookup(name).await.map_err(|source| OutwardError::Resolve { host: host.clone(), source })?;
    found.resolved = resolved.iter().copied().map(Resolved::Address).collect();
    let mut permitted = Vec::new();
    let mut refused = None;
    for address in resolved {
        match reserved(address, &upstream.within) {
            None => permitted.push(SocketAddr::new(address, upstream.to.port)),
            Some(why) => {
                found.refused.push(Resolved::Address(address));
                refused = Some((address, why));
            }
        }
    }
    match refused {
        Some((address, why)) if permitted.is_empty() => {
            Err(OutwardError::Reserved { host: host.clone(), address, why })
        }
        _ => Ok(permitted),
    }
}

/// Why a name's address is not dialled, unless a network that somebody wrote down for it opens it.
fn reserved(address: IpAddr, within: &[IpNet]) -> Option<&'static str> {
    let reserved = guard::reserved(address);
    let opened = within.iter().any(|network| network.contains(&address) && guard::opens(network, address).is_ok());
    reserved.first().filter(|_| !opened).map(|reserved| reserved.why)
}

/// How upstreams answered last.
#[derive(Debug, Default)]
pub(super) struct Standings(Mutex<HashMap<String, Standing>>);

/// Whether an upstream answered, and when.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    pub(super) answers: bool,
    pub(super) at: Instant,
}

impl Standings {
    /// Notes how an upstream answered just now.
    pub(super) fn note(&self, upstream: &str, answers: bool) {
        let mut standings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        standings.insert(upstream.to_owned(), Standing { answers, at: Instant::now() });
    }

    /// How it answered last.
    pub(super) fn of(&self, upstream: &str) -> Option<Standing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(upstream).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_addresses_are_dialled_only_where_they_are_meant() {
        let refuses = |address: &str, within: &[&str]| {
            let within: Vec<_> = within.iter().map(|network| network.parse().expect("a network")).collect();
            reserved(address.parse().expect("an address"), &within).is_some()
        };
        for address in
            ["127.0.0.1", "169.254.169.254", "0.0.0.0", "::1", "fe80::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
        {
            assert!(refuses(address, &[]), "{address}");
            assert!(refuses(address, &["0.0.0.0/0", "::/0"]), "{address}");
        }
        for address in ["10.0.0.1", "203.0.113.7", "192.168.1.1", "2600::1"] {
            assert!(!refuses(address, &[]), "{address}");
        }
        assert!(!refuses("127.0.0.1", &["127.0.0.0/8"]));
        assert!(refuses("169.254.169.254", &["127.0.0.0/8"]));
    }
}

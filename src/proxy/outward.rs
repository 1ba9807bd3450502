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
use jiff::Timestamp;
use tokio::time::{Instant, timeout};
use tracing::warn;

use super::live::{Pass, Slot, State};
use super::{Config, Outbound, RunError, Upstream};
use crate::audit::{Ending, Resolved};
use crate::chain::Chain;
use crate::limits;
use crate::policy::guard;
use crate::resolve;
use crate::target::Host;
use crate::tls;
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
    /// TLS with it.
    #[error(
        "could not make TLS with it as {name}; its certificate must be for that and come from an authority of tls_ca_file, or \
         without one of the system's"
    )]
    Tls {
        name: Host,
        #[source]
        source: tls::ConnectError,
    },
    /// TLS took too long.
    #[error("it has not finished the TLS handshake within {} s", limits::OUTBOUND_HANDSHAKE.as_secs())]
    Slow,
    /// It asks for a certificate.
    #[error("it asks for a client certificate, and none is configured for it: give tls_certificate and tls_key")]
    WantsCertificate,
    /// The configuration has no TLS for it.
    #[error("no TLS is configured for it")]
    NoTls,
}

impl OutwardError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Resolve { .. } | Self::NoAddress { .. } => "unresolved",
            Self::Reserved { .. } => "reserved_address",
            Self::Tcp { .. } | Self::Connect(_) => "connect_failed",
            Self::Tls { .. } | Self::Slow | Self::NoTls => "tls_failed",
            Self::WantsCertificate => "certificate_wanted",
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

/// What is spoken with an upstream, beyond TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inside {
    /// What the client speaks: nothing of ours.
    Theirs,
    /// TLS, and nothing is said of what is in it.
    Tls,
    /// HTTP in TLS.
    Http,
    /// SSH in TLS, as links and sessions of ours have it.
    Ssh,
    /// HTTP/2 in TLS, of which nothing is read here.
    Http2,
}

impl Inside {
    /// What was agreed on with the client is what is offered to the upstream.
    pub(super) fn like(spoken: Option<&[u8]>) -> Self {
        match spoken {
            Some(tls::ALPN_HTTP) => Self::Http,
            Some(tls::ALPN_SSH) => Self::Ssh,
            Some(tls::ALPN_HTTP2) => Self::Http2,
            _ => Self::Tls,
        }
    }
}

/// Connects to where a pass leads, and speaks TLS with it unless that is the client's to do. `found` is told what its name
/// resolved to.
///
/// # Errors
/// If any stage fails.
pub(super) async fn reach(pass: Pass, inside: Inside, found: &mut Found) -> Result<Reached, OutwardError> {
    let upstream = pass.upstream().clone();
    let reached = dial(pass, found).await?;
    if inside == Inside::Theirs {
        return Ok(reached);
    }
    let tls = upstream.tls.as_ref().ok_or(OutwardError::NoTls)?;
    let Reached { stream, head, address } = reached;
    let stream = timeout(limits::OUTBOUND_HANDSHAKE, secure(tls, inside, stream.preceded_by(head)))
        .await
        .map_err(|_| OutwardError::Slow)??;
    Ok(Reached { stream, head: Bytes::new(), address })
}

async fn secure(tls: &Outbound, inside: Inside, stream: Stream) -> Result<Stream, OutwardError> {
    let [said_nothing, http, ssh, http2] = &tls.configs;
    let config = match inside {
        Inside::Theirs | Inside::Tls => said_nothing,
        Inside::Http => http,
        Inside::Ssh => ssh,
        Inside::Http2 => http2,
    };
    let name = &tls.server_name;
    let failed = |source| OutwardError::Tls { name: name.clone(), source };
    if tls.identity.is_some() {
        return tls::connect(config, name, stream).await.map(Stream::layered).map_err(failed);
    }
    match tls::connect_bare(config, name, stream).await {
        // Whether it goes on without is not tried: that may be as somebody, and for something, that nobody meant.
        (_, true) if !tls.without_certificate => Err(OutwardError::WantsCertificate),
        (connected, _) => connected.map(Stream::layered).map_err(failed),
    }
}

/// Asks each upstream that is to be reached without a certificate whether it wants one.
///
/// # Errors
/// If one does. One that cannot be reached is warned of: each connection to it asks again.
pub(super) async fn ask_for_wishes(config: &Config) -> Result<(), RunError> {
    let state = State::new(config, &(0..).map(Slot).take(config.listeners.len()).collect::<Vec<_>>());
    for upstream in state.used() {
        let bare = |tls: &Outbound| tls.identity.is_none() && !tls.without_certificate;
        if !upstream.tls.as_ref().is_some_and(bare) {
            continue;
        }
        let mut found = Found::default();
        let asking = reach(state.trial(upstream), Inside::Http, &mut found);
        let warning = match timeout(limits::OUTBOUND_HANDSHAKE, asking).await {
            Ok(Ok(_)) => continue,
            Ok(Err(OutwardError::WantsCertificate)) => {
                return Err(RunError::WantsCertificate { name: upstream.name.clone(), to: upstream.to.clone() });
            }
            Ok(Err(error)) => Chain(&error).to_string(),
            Err(_) => "it does not answer".to_owned(),
        };
        let name = &upstream.name;
        warn!(
            "could not ask upstream {name} whether it wants a client certificate; each connection asks again: {warning}"
        );
    }
    Ok(())
}

/// Connects to where a pass leads. `found` is told what its name resolved to.
///
/// # Errors
/// If any stage fails.
async fn dial(pass: Pass, found: &mut Found) -> Result<Reached, OutwardError> {
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
    /// Since when it has been so.
    pub(super) since: Timestamp,
}

impl Standings {
    /// Notes how an upstream answered just now.
    pub(super) fn note(&self, upstream: &str, answers: bool) -> Standing {
        let mut standings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = standings.get(upstream).filter(|before| before.answers == answers);
        let since = before.map_or_else(Timestamp::now, |before| before.since);
        let standing = Standing { answers, at: Instant::now(), since };
        standings.insert(upstream.to_owned(), standing);
        standing
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

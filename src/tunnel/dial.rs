//! Reaching a gateway by its URL: a connection, directly or through a proxy, and over it what the URL's transport adds.
//!
//! Promised: every step has a deadline, and an error that names the step and says what to do; not a byte that the gateway
//! sends is lost, whatever it came with.

use std::net::SocketAddr;

use bytes::Bytes;

use super::connect::url::{GatewayUrl, Transport};
use super::connect::{self, ConnectError, Egress};
use super::stream::Stream;
use crate::target::Target;

/// How whoever dials leaves its network.
#[derive(Debug, Clone)]
pub struct Way {
    /// Directly, or through a proxy.
    pub egress: Egress,
}

/// A gateway that was reached.
#[derive(Debug)]
pub struct Dialled {
    /// What carries the SSH session.
    pub stream: Stream,
    /// What the gateway has said of that already.
    pub head: Bytes,
}

/// Why a gateway could not be reached, by stage.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The connection, or the proxy on the way.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The transport.
    #[error("{0} is not supported in this version")]
    Transport(Transport),
}

/// Dials `url`. Before anything is dialled, `resolved` is told every address of the host that is to be: the gateway's, or the
/// proxy's.
///
/// # Errors
/// If any stage fails or exceeds its time; see [`DialError`].
pub async fn dial(url: &GatewayUrl, way: &Way, resolved: impl FnOnce(&[SocketAddr])) -> Result<Dialled, DialError> {
    if url.transport() != Transport::Ssh {
        return Err(DialError::Transport(url.transport()));
    }
    bare(url.target(), way, resolved).await
}

/// As [`dial`], of a server that is spoken to without anything between.
///
/// # Errors
/// As [`dial`].
pub async fn bare(to: &Target, way: &Way, resolved: impl FnOnce(&[SocketAddr])) -> Result<Dialled, DialError> {
    let connection = connect::connect(to, &way.egress, resolved).await?;
    Ok(Dialled { stream: connection.stream, head: connection.head })
}

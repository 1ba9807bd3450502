//! Reaching a gateway by its URL: a connection, directly or through a proxy, and over it what the URL's transport adds: TLS,
//! WebSocket, or both.
//!
//! Promised: every step has a deadline, and an error that names the step and says what to do; not a byte that the gateway
//! sends is lost, whatever it came with; where the URL says TLS, the gateway's certificate is verified for the URL's host, and
//! nothing falls back to clear text.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use tokio::time::timeout;

use super::connect::url::GatewayUrl;
use super::connect::{self, ConnectError, Egress};
use super::stream::Stream;
use super::websocket::{self, UpgradeError};
use crate::limits;
use crate::target::Target;
use crate::tls::{self, ClientConfig, ClientOptions, Identity, TlsError};

/// How whoever dials leaves its network, and how it makes TLS.
#[derive(Debug, Clone)]
pub struct Way {
    /// Directly, or through a proxy.
    pub egress: Egress,
    /// Whose certificates are trusted; not needed where there is no TLS.
    pub tls: Option<Tls>,
}

/// How TLS is made with gateways. Two are equal if they were made of the same options.
#[derive(Clone)]
pub struct Tls {
    options: ClientOptions,
    /// Where SSH is inside, and where HTTP is: a balancer goes by what the handshake says of it.
    ssh: Arc<ClientConfig>,
    http: Arc<ClientConfig>,
}

impl Tls {
    /// Reads the authorities that count. What is to be spoken inside is for each dial to say.
    ///
    /// # Errors
    /// If they cannot be read, or there are none.
    pub fn new(options: ClientOptions) -> Result<Self, TlsError> {
        let speaking = |alpn| ClientOptions { alpn, ..options.clone() }.build();
        let (ssh, http) = (speaking(&[tls::ALPN_SSH])?, speaking(&[tls::ALPN_HTTP])?);
        Ok(Self { options, ssh, http })
    }

    /// What is shown to gateways that ask for a certificate.
    #[must_use]
    pub fn identity(&self) -> Option<&Identity> {
        self.options.identity.as_ref()
    }

    /// What TLS is made by.
    #[must_use]
    pub fn options(&self) -> &ClientOptions {
        &self.options
    }
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.options == other.options
    }
}

impl Eq for Tls {}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.options.fmt(f)
    }
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
    /// A server that speaks before it is spoken to.
    #[error("gateway {to} does not speak TLS: it speaks first, which is {}", match ssh {
        true => "SSH in clear; write ssh:// if that is what it shall be",
        false => "not for a TLS server to do",
    })]
    SpeaksFirst {
        /// The gateway.
        to: Target,
        /// Whether what it says begins as SSH does.
        ssh: bool,
    },
    /// TLS took too long.
    #[error(
        "gateway {to} has not completed the TLS handshake within {} s; does a firewall let TLS to it through?",
        limits::TLS_TIMEOUT.as_secs()
    )]
    TlsSilent {
        /// The gateway.
        to: Target,
    },
    /// TLS.
    #[error("could not make TLS with gateway {to}; {}", advice(source, to, *own))]
    Tls {
        /// The gateway.
        to: Target,
        /// Whether there is a file with authorities.
        own: bool,
        /// Why.
        #[source]
        source: tls::ConnectError,
    },
    /// WebSocket.
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    /// Whoever dials has not said how it makes TLS.
    #[error("no certificate authorities were read for TLS with gateway {to}")]
    NoAuthorities {
        /// The gateway.
        to: Target,
    },
}

/// What somebody can do about it. `own` says whether there is a file with authorities.
#[must_use]
pub fn advice(error: &tls::ConnectError, to: &Target, own: bool) -> String {
    match error {
        tls::ConnectError::Untrusted { .. } => {
            let named = if own { "add it to the file in tls_ca_file" } else { "name its file in tls_ca_file" };
            format!(
                "if that is the gateway's own authority, {named}; if it is that of an inspecting proxy, ask the network team to \
                 leave TLS to {to} alone"
            )
        }
        tls::ConnectError::OtherName { .. } => {
            format!("either the URL should have one of its names in the place of {}, or another host answers there", to.host)
        }
        tls::ConnectError::Certificate(_) => {
            "ask the gateway's operator to look at its certificate, and see that this host's clock is right".to_owned()
        }
        tls::ConnectError::Refused(_) => {
            "it says why in an alert; the gateway's trail may say more: does it want a certificate of this end?".to_owned()
        }
        tls::ConnectError::Protocol(_) => {
            "does TLS end there? ssh:// is for a gateway without certificates, and an inspecting proxy may stand between".to_owned()
        }
        tls::ConnectError::Closed | tls::ConnectError::Io(_) => {
            "it, or a firewall between, breaks off where TLS begins; ask the network team whether TLS to it is let through"
                .to_owned()
        }
        tls::ConnectError::Name => "write its host by the name that stands in its certificate".to_owned(),
    }
}

/// Dials `url`. Before anything is dialled, `resolved` is told every address of the host that is to be: the gateway's, or the
/// proxy's.
///
/// # Errors
/// If any stage fails or exceeds its time; see [`DialError`].
pub async fn dial(url: &GatewayUrl, way: &Way, resolved: impl FnOnce(&[SocketAddr])) -> Result<Dialled, DialError> {
    let (to, transport) = (url.target(), url.transport());
    let Dialled { mut stream, head } = bare(to, way, resolved).await?;
    if transport.is_tls() {
        if !head.is_empty() {
            return Err(DialError::SpeaksFirst { to: to.clone(), ssh: head.starts_with(b"SSH-") });
        }
        let tls = way.tls.as_ref().ok_or_else(|| DialError::NoAuthorities { to: to.clone() })?;
        let config = if transport.is_websocket() { &tls.http } else { &tls.ssh };
        let secured = timeout(limits::TLS_TIMEOUT, tls::connect(config, &to.host, stream)).await;
        let secured = secured.map_err(|_| DialError::TlsSilent { to: to.clone() })?;
        let own = !tls.options.ca_files.is_empty();
        stream = Stream::layered(secured.map_err(|source| DialError::Tls { to: to.clone(), own, source })?);
    }
    if transport.is_websocket() {
        let socket = websocket::connect(stream, to, url.path(), head).await?;
        return Ok(Dialled { stream: Stream::layered(socket), head: Bytes::new() });
    }
    Ok(Dialled { stream, head })
}

/// As [`dial`], of a server that is spoken to without anything between.
///
/// # Errors
/// As [`dial`].
pub async fn bare(to: &Target, way: &Way, resolved: impl FnOnce(&[SocketAddr])) -> Result<Dialled, DialError> {
    let connection = connect::connect(to, &way.egress, resolved).await?;
    Ok(Dialled { stream: connection.stream, head: connection.head })
}

#[cfg(test)]
mod tests;

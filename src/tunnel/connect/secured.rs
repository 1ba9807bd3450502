//! TLS with a proxy.

use std::io;
use std::sync::Arc;

use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::target::Host;
use crate::tls::ClientConfig;
use crate::tunnel::stream::{Layer, Stream};

/// Why there is no TLS with a proxy.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// No certificate could be for it.
    #[error("no certificate can have the name of this host")]
    Name,
    /// The handshake.
    #[error("the TLS handshake failed")]
    Handshake(#[source] io::Error),
}

impl Layer for TlsStream<Stream> {
    fn socket(&self) -> Option<&TcpStream> {
        self.get_ref().0.socket()
    }
}

/// Shakes hands with the server `name`.
///
/// # Errors
/// If it is not that server, or the handshake fails.
pub(super) async fn connect(config: &Arc<ClientConfig>, name: &Host, stream: Stream) -> Result<Stream, HandshakeError> {
    let name = match name {
        Host::Address(address) => ServerName::from(*address),
        Host::Name(name) => ServerName::try_from(name.to_string()).map_err(|_| HandshakeError::Name)?,
    };
    let shaken = TlsConnector::from(config.clone()).connect(name, stream).await;
    shaken.map(Stream::layered).map_err(HandshakeError::Handshake)
}

//! Whether a server asks for a certificate: of interest to whoever has none to show.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite};

use super::client::{ClientConfig, ConnectError, connect};
use super::stream::TlsStream;
use crate::target::Host;

/// Shakes hands as [`connect`] does, without a certificate whatever the configuration has, and tells whether the server asked for
/// one. A server of TLS 1.3 that wants one says so only after the handshake; that it asked is known before.
pub async fn connect_bare<S>(
    config: &ClientConfig,
    name: &Host,
    stream: S,
) -> (Result<TlsStream<S>, ConnectError>, bool)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let asked = Arc::new(Asked::default());
    let mut config = config.clone();
    config.client_auth_cert_resolver = asked.clone();
    let connected = connect(&Arc::new(config), name, stream).await;
    (connected, asked.0.load(Ordering::Relaxed))
}

/// Has no certificate, and remembers that it was asked for one.
#[derive(Debug, Default)]
struct Asked(AtomicBool);

impl ResolvesClientCert for Asked {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.store(true, Ordering::Relaxed);
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

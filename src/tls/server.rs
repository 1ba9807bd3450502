//! TLS toward a client.
//!
//! Promised: a client without a name, or with one that no certificate has, gets the first certificate; a certificate that
//! a client shows is never taken for one without proof that the client has its key, whatever else is asked of it; what a
//! handshake may read is bounded by [`TLS_HANDSHAKE_BYTES`], and by the deadline of whoever calls.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, ServerConfig};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DistinguishedName};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

use super::proof::proof;
use super::stream::{TlsStream, out_from_under, under};
use super::{ALPN_HTTP, ALPN_SSH, Identity, PeerChain, VERSIONS, provider};
use crate::limits::TLS_HANDSHAKE_BYTES;

/// What a server can show. Clones share it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificates(Arc<Vec<Identity>>);

impl Certificates {
    /// These, of which the first is shown to whoever asks for none of them; `None` if there is none.
    #[must_use]
    pub fn new(identities: Vec<Identity>) -> Option<Self> {
        (!identities.is_empty()).then(|| Self(Arc::new(identities)))
    }

    /// All of them, in the order of the configuration.
    pub fn identities(&self) -> impl Iterator<Item = &Identity> {
        self.0.iter()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().and_then(|name| ServerName::try_from(name).ok());
        let named = |identity: &&Identity| name.as_ref().is_some_and(|name| identity.is_for(name));
        // Of several for one name, the first with a key that the client can verify.
        let verifiable =
            |identity: &&Identity| identity.certified().key.choose_scheme(hello.signature_schemes()).is_some();
        let chosen = self.0.iter().filter(named).find(verifiable);
        let chosen = chosen.or_else(|| self.0.iter().find(named)).or_else(|| self.0.first())?;
        Some(chosen.certified().clone())
    }
}

/// Decides in the handshake about a client's certificate, where one is required.
pub trait Gate: fmt::Debug + Send + Sync {
    /// Whether a client with this chain may go on. What is wrong becomes the alert.
    ///
    /// # Errors
    /// If it may not.
    fn admits(&self, chain: &PeerChain, now: UnixTime) -> Result<(), CertificateError>;

    /// The names of the authorities that count, for clients that have several certificates. Empty where that is not told.
    fn authorities(&self) -> &[DistinguishedName] {
        &[]
    }
}

/// Whether a client is asked for a certificate.
#[derive(Debug, Clone, Default)]
pub enum ClientPolicy {
    /// It is not.
    #[default]
    Off,
    /// It is asked for one, and may go on without. Whatever it shows is judged later.
    Ask,
    /// It must have one that passes this gate.
    Require(Arc<dyn Gate>),
}

/// Takes up TLS with clients.
#[derive(Debug, Clone)]
pub struct Acceptor(Arc<ServerConfig>);

/// A client with whom the handshake is done.
#[derive(Debug)]
pub struct Accepted<S> {
    /// The connection.
    pub stream: TlsStream<S>,
    /// What will be spoken inside, if that was negotiated.
    pub alpn: Option<Vec<u8>>,
    /// The name that the client has asked for.
    pub sni: Option<String>,
    /// What it has shown of itself.
    pub peer: Option<PeerChain>,
}

/// Why there is no TLS with a client.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// It has no certificate where one is required.
    #[error("the client has no certificate, and must have one")]
    NoCertificate,
    /// Its certificate does not pass.
    #[error("the client's certificate is not accepted")]
    Certificate(#[source] rustls::Error),
    /// It does not accept ours, or what we offer.
    #[error("the client refused TLS")]
    Refused(#[source] rustls::Error),
    /// It speaks something else, or TLS of another kind.
    #[error("the client does not speak TLS as we do")]
    Protocol(#[source] rustls::Error),
    /// It has hung up.
    #[error("the client closed the connection during the TLS handshake")]
    Closed,
    /// The connection failed.
    #[error("the connection failed during the TLS handshake")]
    Io(#[source] io::Error),
}

impl Acceptor {
    /// With these certificates, and this to ask of clients.
    #[must_use]
    pub fn new(certificates: Certificates, clients: ClientPolicy) -> Self {
        let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(VERSIONS);
        #[expect(clippy::expect_used, reason = "both versions have suites among ours, which a test makes sure of")]
        let builder = builder.expect("suites for each version");
        let (mandatory, gate) = match clients {
            ClientPolicy::Off => (None, None),
            ClientPolicy::Ask => (Some(false), None),
            ClientPolicy::Require(gate) => (Some(true), Some(gate)),
        };
        let builder = match mandatory {
            Some(mandatory) => builder.with_client_cert_verifier(Arc::new(Possession { mandatory, gate })),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(Arc::new(certificates));
        config.alpn_protocols = [ALPN_SSH, ALPN_HTTP].map(<[u8]>::to_vec).to_vec();
        // Our order, so that the strongest that both know is taken.
        config.ignore_client_order = true;
        // See the module above for why.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_tls13_tickets = 0;
        config.max_early_data_size = 0;
        config.send_half_rtt_data = false;
        config.cert_decompressors = Vec::new();
        config.cert_compressors = Vec::new();
        Self(Arc::new(config))
    }

    /// Agrees on this too, with clients that want nothing of what is agreed on otherwise.
    #[must_use]
    pub fn at_last(self, alpn: &[u8]) -> Self {
        let mut config = Arc::unwrap_or_clone(self.0);
        config.alpn_protocols.push(alpn.to_vec());
        Self(Arc::new(config))
    }

    /// Shakes hands with a client over a stream. Waits for it without a deadline, which is the caller's; may be dropped.
    ///
    /// # Errors
    /// If the handshake fails. A client that still listens is told by an alert, and the stream comes back for the rest of what
    /// an orderly end needs.
    pub async fn accept<S>(&self, stream: S) -> Result<Accepted<S>, (AcceptError, S)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let accepted =
            TlsAcceptor::from(self.0.clone()).accept(under(stream, Some(TLS_HANDSHAKE_BYTES))).into_fallible().await;
        let mut stream = match accepted {
            Ok(stream) => stream,
            Err((error, stream)) => return Err((failure(error), out_from_under(stream))),
        };
        // The handshake is over for the client when it has this, and whoever waits for our word first waits for it.
        if let Err(error) = stream.flush().await {
            return Err((failure(error), out_from_under(stream.into_inner().0)));
        }
        let session = stream.get_ref().1;
        let alpn = session.alpn_protocol().map(<[u8]>::to_vec);
        let sni = session.server_name().map(str::to_owned);
        let peer = session.peer_certificates().and_then(PeerChain::new);
        Ok(Accepted { stream: TlsStream::new(stream), alpn, sni, peer })
    }
}

fn failure(error: io::Error) -> AcceptError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()).cloned() {
        Some(rustls::Error::NoCertificatesPresented) => AcceptError::NoCertificate,
        Some(error @ rustls::Error::InvalidCertificate(_)) => AcceptError::Certificate(error),
        Some(error @ rustls::Error::AlertReceived(_)) => AcceptError::Refused(error),
        Some(error) => AcceptError::Protocol(error),
        None if error.kind() == io::ErrorKind::UnexpectedEof => AcceptError::Closed,
        None => AcceptError::Io(error),
    }
}

/// Verifies that a client has the key of the certificate that it shows, and leaves the rest to its gate, or to others.
#[derive(Debug)]
struct Possession {
    mandatory: bool,
    gate: Option<Arc<dyn Gate>>,
}

impl ClientCertVerifier for Possession {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.gate.as_ref().map_or(&[], |gate| gate.authorities())
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if let Some(gate) = &self.gate {
            let chain: Vec<_> = std::iter::once(own).chain(between).cloned().collect();
            let chain = PeerChain::new(&chain).ok_or(rustls::Error::NoCertificatesPresented)?;
            gate.admits(&chain, now)?;
        }
        Ok(ClientCertVerified::assertion())
    }

    proof!();
}

//! TLS toward a server.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::CertificateError;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::sign::SingleCertAndKey;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use super::issuer::{Telling, Untrusted, plain};
use super::stream::{TlsStream, under};
use super::{Identity, TlsError, VERSIONS, provider, roots};
use crate::target::Host;

/// A verifying client configuration.
pub type ClientConfig = rustls::ClientConfig;

/// How to go to a server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientOptions {
    /// Files of authorities, which are the only ones that count; without one the system's do.
    pub ca_files: Vec<PathBuf>,
    /// What to show to a server that asks for a certificate.
    pub identity: Option<Identity>,
    /// What will be spoken inside, the most wanted first; empty where that is not negotiated.
    pub alpn: &'static [&'static [u8]],
}

impl ClientOptions {
    /// Reads the authorities.
    ///
    /// # Errors
    /// If they cannot be read, or there are none.
    pub fn build(&self) -> Result<Arc<ClientConfig>, TlsError> {
        self.build_with(self.verifier()?)
    }

    /// What judges servers.
    pub(super) fn verifier(&self) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
        let roots = roots::roots(&self.ca_files)?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|_| TlsError::NoSystemRoots)?;
        Ok(Arc::new(Telling(verifier)))
    }

    /// As [`ClientOptions::build`], with another judge of servers.
    pub(super) fn build_with(&self, verifier: Arc<dyn ServerCertVerifier>) -> Result<Arc<ClientConfig>, TlsError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(TlsError::Library)?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &self.identity {
            Some(identity) => {
                let certified = identity.certified().as_ref().clone();
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

/// A configuration that accepts a server whose certificate comes from one of the authorities in `ca_file`, or without a
/// file from one of the system's, and names what the caller asks for when connecting.
///
/// # Errors
/// If the authorities cannot be read, or there are none.
pub fn client(ca_file: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    ClientOptions { ca_files: ca_file.map(Path::to_owned).into_iter().collect(), ..ClientOptions::default() }.build()
}

/// Why there is no TLS with a server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No certificate could be for it.
    #[error("no certificate can have the name of this host")]
    Name,
    /// Its certificate comes from an authority that nobody here trusts.
    #[error("the server's certificate comes from {issuer}, which is not among the authorities that are trusted here")]
    Untrusted {
        /// The authority, as the certificate names it.
        issuer: String,
    },
    /// Its certificate is for somebody else.
    #[error("the server's certificate is for {presented}")]
    OtherName {
        /// Whom it is for, as it says.
        presented: String,
    },
    /// Its certificate is not accepted for another reason: its time, or its form.
    #[error("the server's certificate is not accepted")]
    Certificate(#[source] rustls::Error),
    /// It has hung up with a reason.
    #[error("the server refused TLS")]
    Refused(#[source] rustls::Error),
    /// It speaks something else, or TLS of another kind.
    #[error("the server does not speak TLS as we do")]
    Protocol(#[source] rustls::Error),
    /// It has hung up without a word.
    #[error("the server closed the connection during the TLS handshake")]
    Closed,
    /// The connection failed.
    #[error("the connection failed during the TLS handshake")]
    Io(#[source] io::Error),
}

/// Shakes hands with the server `name` over a stream. Waits for it without a deadline, which is the caller's; may be dropped.
///
/// # Errors
/// If it is not that server, or the handshake fails.
pub async fn connect<S>(config: &Arc<ClientConfig>, name: &Host, stream: S) -> Result<TlsStream<S>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name = match name {
        Host::Address(address) => ServerName::from(*address),
        Host::Name(name) => ServerName::try_from(name.to_string()).map_err(|_| ConnectError::Name)?,
    };
    match TlsConnector::from(config.clone()).connect(name, under(stream, None)).await {
        Ok(stream) => Ok(TlsStream::new(stream)),
        Err(error) => Err(failure(error)),
    }
}

fn failure(error: io::Error) -> ConnectError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()).cloned() {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(ref other)))
            if let Some(Untrusted(issuer)) = other.0.downcast_ref() =>
        {
            ConnectError::Untrusted { issuer: issuer.clone() }
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { presented, .. })) => {
            let presented = if presented.is_empty() { "nobody".to_owned() } else { plain(&presented.join(", ")) };
            ConnectError::OtherName { presented }
        }
        Some(error @ (rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented)) => {
            ConnectError::Certificate(error)
        }
        Some(error @ rustls::Error::AlertReceived(_)) => ConnectError::Refused(error),
        Some(error) => ConnectError::Protocol(error),
        None if error.kind() == io::ErrorKind::UnexpectedEof => ConnectError::Closed,
        None => ConnectError::Io(error),
    }
}

//! Says which authority a server's certificate comes from where nobody here trusts it, so that whoever reads the error learns
//! who stands between.
//!
//! Promised: what is accepted is what the TLS library's own verifier accepts, and nothing else.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::{CertificateError, OtherError};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::proof::proof;

/// The library's verifier, which tells more where it does not know the authority.
#[derive(Debug)]
pub(super) struct Telling(pub(super) Arc<WebPkiServerVerifier>);

/// The authority that nobody here trusts, by the name that the certificate gives it.
pub(super) struct Untrusted(pub(super) String);

impl fmt::Debug for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown issuer {}", self.0)
    }
}

impl std::error::Error for Untrusted {}

impl ServerCertVerifier for Telling {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.0.verify_server_cert(own, between, name, ocsp, now).map_err(|error| match error {
            // Or one of the same name with another key.
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                let untrusted = Untrusted(issuer(between.last().unwrap_or(own)));
                CertificateError::Other(OtherError(Arc::new(untrusted))).into()
            }
            error => error,
        })
    }

    proof!();
}

/// The name of a certificate's issuer. It comes from a stranger.
fn issuer(certificate: &CertificateDer<'_>) -> String {
    let name = Certificate::from_der(certificate).map(|read| read.tbs_certificate().issuer().to_string());
    plain(&name.unwrap_or_default())
}

/// What can be shown of a stranger's text.
pub(super) fn plain(text: &str) -> String {
    let shown: String = text.chars().filter(|c| !c.is_control()).take(SHOWN).collect();
    if shown.is_empty() { "without a name".to_owned() } else { shown }
}

/// Names of authorities are shorter.
const SHOWN: usize = 200;

//! What a client has shown of itself.

use std::fmt;

use rustls_pki_types::CertificateDer;

use crate::identity::Fingerprint;

/// A client's certificate and what it sent along. That it has the certificate's key was proved in the handshake; whose it
/// is, and whether it counts, is judged by whoever knows what the client claims to be.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerChain(Vec<CertificateDer<'static>>);

impl PeerChain {
    /// `None` where there is no certificate.
    pub(super) fn new(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let chain: Vec<_> = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        (!chain.is_empty()).then_some(Self(chain))
    }

    /// The SHA-256 of the client's own certificate.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.0[0])
    }

    /// The certificates, the client's own first.
    pub(super) fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.0
    }
}

impl fmt::Debug for PeerChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerChain({} certificates)", self.certificates().len())
    }
}

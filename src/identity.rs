//! Who is who: identifiers, keys and fingerprints.
//!
//! Promised: an identifier that exists is well formed, so that no other module ever checks one, and none can break out
//! of a path, a log line or a wire format. Keys are in [`key`], what CAs say of them in [`certificate`], what is signed with
//! them apart from a login in [`signature`].

pub mod certificate;
pub mod key;
pub mod signature;

use std::fmt;
use std::str::FromStr;

pub use certificate::{Certificate, CertificateError, Credential};
pub use key::{Algorithm, KeyError, PrivateKey, PublicKey};

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} ids are 1 to 63 of {alphabet}, and begin and end with a letter or digit")]
pub struct IdError {
    what: &'static str,
    alphabet: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $alphabet:literal, |$byte:ident| $allowed:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Box<str>);

        impl $name {
            /// The identifier as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let allowed = |$byte: u8| $allowed;
                let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
                let bytes = text.as_bytes();
                if bytes.len() > ID_MAX
                    || !edge(bytes.first())
                    || !edge(bytes.last())
                    || !bytes.iter().all(|byte| allowed(*byte))
                {
                    return Err(IdError { what: $what, alphabet: $alphabet });
                }
                Ok(Self(text.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// An organisation: owns agents and principals.
    OrganisationId, "organisation", "a-z, 0-9 and '-'",
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'
);
id!(
    /// An agent within an organisation.
    AgentId, "agent", "a-z, 0-9 and '-'",
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'
);
id!(
    /// One of several processes that run the same agent.
    ReplicaId, "replica", "A-Z, a-z, 0-9, '-', '.' and '_'",
    |b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_')
);
id!(
    /// A principal within an organisation, as the registry names it.
    PrincipalId, "principal", "a-z, 0-9 and '-'",
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'
);

/// An agent with the organisation it belongs to, written `ORG/AGENT`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AgentName {
    /// The organisation.
    pub organisation: OrganisationId,
    /// The agent.
    pub agent: AgentId,
}

impl FromStr for AgentName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let (organisation, agent) = text
            .split_once('/')
            .ok_or(IdError { what: "ORG/AGENT", alphabet: "a-z, 0-9 and '-' on each side of the '/'" })?;
        Ok(Self { organisation: organisation.parse()?, agent: agent.parse()? })
    }
}

impl fmt::Display for AgentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.organisation, self.agent)
    }
}

/// On whose behalf a forward is asked for: a registered principal, or, where a key speaks for nobody else, the key itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Principal {
    /// A principal by name.
    Named(PrincipalId),
    /// A key that is its own principal.
    Key(Fingerprint),
}

impl FromStr for Principal {
    type Err = IdError;

    /// Reads a principal id, or a fingerprint in OpenSSH's form.
    fn from_str(text: &str) -> Result<Self, IdError> {
        match text.parse::<Fingerprint>() {
            Ok(fingerprint) => Ok(Self::Key(fingerprint)),
            Err(_) => text.parse().map(Self::Named),
        }
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(id) => id.fmt(f),
            Self::Key(fingerprint) => fingerprint.fmt(f),
        }
    }
}

/// A pattern for identifiers: letters stand for themselves, `*` for any run of characters, also none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(Box<str>);

impl Pattern {
    /// Whether `text` as a whole matches.
    #[must_use]
    pub fn matches(&self, text: &str) -> bool {
        glob(&self.0, text)
    }

    /// The pattern as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Pattern {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'*');
        if text.is_empty() || text.len() > ID_MAX || !text.bytes().all(allowed) {
            return Err(IdError { what: "patterns for", alphabet: "a-z, 0-9, '-' and '*'" });
        }
        Ok(Self(text.into()))
    }
}

/// Whether `text` as a whole is of the form of `pattern`, in which `*` stands for any run of characters, also none.
#[must_use]
pub fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

/// The SHA-256 of a public key in SSH wire form, written as OpenSSH writes it: `SHA256:` and 43 characters of base64. That of
/// a TLS certificate is written alike.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub(crate) [u8; 32]);

impl Fingerprint {
    /// Of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(key::sha256(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        key::fingerprint_text(&self.0).fmt(f)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        key::parse_fingerprint(text).map(Self)
    }
}

/// Longest identifier, in bytes: a DNS label's, and five of them fit into an SSH identification string.
pub const ID_MAX: usize = 63;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_ids_that_could_break_out() {
        let long = "a".repeat(64);
        for text in ["", "-a", "a-", "A", "a/b", "a.b", "..", "a b", "a\n", "ä", "a_b", long.as_str()] {
            assert!(text.parse::<OrganisationId>().is_err(), "{text:?}");
            assert!(text.parse::<AgentId>().is_err(), "{text:?}");
            assert!(text.parse::<PrincipalId>().is_err(), "{text:?}");
        }
        for text in ["", ".", "..", ".a", "a/b", "a b", "a:", "a\0"] {
            assert!(text.parse::<ReplicaId>().is_err(), "{text:?}");
        }
        assert!("a".repeat(63).parse::<AgentId>().is_ok());
        assert!("Host-1.example_2".parse::<ReplicaId>().is_ok());
    }

    #[test]
    fn agent_names_have_exactly_two_parts() {
        assert_eq!("acme/prod-eu".parse::<AgentName>().map(|name| name.to_string()).as_deref(), Ok("acme/prod-eu"));
        for text in ["acme", "/prod", "acme/", "acme/prod/eu", "acme//eu"] {
            assert!(text.parse::<AgentName>().is_err(), "{text}");
        }
    }

    #[test]
    fn patterns_match_as_a_whole() {
        for (pattern, text, matches) in [
            ("prod-*", "prod-eu", true),
            ("prod-*", "prod-", true),
            ("prod-*", "prod", false),
            ("prod-*", "my-prod-eu", false),
            ("*", "", true),
            ("*-eu", "prod-eu", true),
            ("*-eu", "prod-eu2", false),
            ("a*b*c", "abc", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "acb", false),
            ("a*a", "a", false),
            ("prod", "prod", true),
            ("prod", "prod2", false),
        ] {
            let parsed: Pattern = pattern.parse().expect(pattern);
            assert_eq!(parsed.matches(text), matches, "{pattern} {text}");
        }
        assert!("".parse::<Pattern>().is_err());
        assert!("a?".parse::<Pattern>().is_err());
    }
}

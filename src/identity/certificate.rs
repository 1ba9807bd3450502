//! OpenSSH certificates (OpenSSH's PROTOCOL.certkeys): a public key with what a CA says of it.
//!
//! Promised: a [`Certificate`] that exists is well formed and bounded, its key and its CA's key are of a kind and strength
//! that a plain key must have too, and the CA's signature, which is not made with SHA-1, verifies. **Whether the CA is trusted,
//! and whether the certificate counts now and here, is [`Certificate::judge`]'s to say**, each time anew.
//!
//! Stricter than OpenSSH, on purpose: a certificate without principals, which OpenSSH takes as good for everybody, is good for
//! nobody; the option `force-command` refuses, since nothing is run here, and so does `verify-required`, since the library does
//! not tell whether a security token has verified its user; a host's names are compared as they are, without patterns; an
//! authority is a plain key, never a certificate.
//!
//! Absent: revocation lists in files (KRL). A registry or a configuration lists what it revokes, see [`Revocations`].

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;
use russh::keys::Algorithm;
use russh::keys::ssh_key::certificate::{CertType, OptionsMap};

use super::{Fingerprint, KeyError, PublicKey, key};
use crate::limits::{CERTIFICATE_KEY_ID_MAX, CERTIFICATE_MAX, CERTIFICATE_NAMES_MAX};
use crate::network;

/// Why something is no certificate that could ever count.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The certificate is in this file; the source says what is wrong with it.
    #[error("certificate file {}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        fault: Box<CertificateError>,
    },
    /// The text is none.
    #[error("cannot be read as an OpenSSH certificate (FILE-cert.pub, as `ssh-keygen -s` makes it)")]
    Text(#[source] KeyError),
    /// Its bytes are not what they should be.
    #[error("looks like an OpenSSH certificate but is damaged or incomplete ({0})")]
    Damaged(String),
    /// More of something than any honest certificate has.
    #[error("has {0}, which no honest certificate has")]
    TooMuch(&'static str),
    /// A certificate within the certificate.
    #[error("is signed by a certificate; only a plain key can be a CA")]
    Nested,
    /// The certified key.
    #[error("certifies a key that is not accepted")]
    Subject(#[source] KeyError),
    /// The CA's key.
    #[error("is signed by a CA whose key is not accepted")]
    Authority(#[source] KeyError),
    /// The CA's signature is made with SHA-1.
    #[error("is signed with SHA-1 (ssh-rsa); sign it anew with `ssh-keygen -t rsa-sha2-512`")]
    Sha1,
    /// The CA's signature is wrong.
    #[error("has a signature that is not its CA's")]
    Signature,
}

impl CertificateError {
    /// The word that the audit uses.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::File { fault, .. } => fault.reason(),
            Self::Text(_) | Self::Damaged(_) | Self::TooMuch(_) => "certificate_malformed",
            Self::Nested => "certificate_nested",
            Self::Subject(_) => "certificate_weak_key",
            Self::Authority(_) => "certificate_weak_ca",
            Self::Sha1 => "certificate_sha1",
            Self::Signature => "certificate_signature",
        }
    }
}

/// What a certificate says its holder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Somebody who logs in.
    User,
    /// Somebody who is logged in to.
    Host,
}

/// A certificate that its CA has signed. Clones share it; equal are those with the same bytes.
#[derive(Clone)]
pub struct Certificate(Arc<Inner>);

struct Inner {
    whole: russh::keys::Certificate,
    subject: PublicKey,
    authority: PublicKey,
    kind: Kind,
    sources: Option<Vec<IpNet>>,
    /// A critical option that is not met here.
    unmet: Option<String>,
    permits_forwarding: bool,
}

/// A CA as somebody trusts it.
#[derive(Debug, Clone, Copy)]
pub struct Trust<'a> {
    /// Its key.
    pub authority: &'a PublicKey,
    /// What it has signed and counts no more.
    pub revocations: &'a Revocations,
}

/// Certificates of one CA that count no more.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Revocations {
    /// By serial number. 0 is none: OpenSSH gives it to certificates that are not numbered.
    pub serials: BTreeSet<u64>,
    /// By key id, exactly.
    pub key_ids: BTreeSet<String>,
}

impl Revocations {
    fn cover(&self, certificate: &Certificate) -> bool {
        let serial = certificate.serial();
        (serial != 0 && self.serials.contains(&serial)) || self.key_ids.contains(certificate.key_id())
    }
}

/// What a certificate is shown for.
#[derive(Debug, Clone, Copy)]
pub enum Use<'a> {
    /// To log in, from this address. Where it is not known, a `source-address` is not met.
    Login(Option<IpAddr>),
    /// To be logged in to, under this name.
    Host(&'a str),
    /// To be logged in to, under whichever of its names.
    AnyHost,
}

/// Why a certificate does not count, though it is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// Its CA is not the one that is trusted.
    UnknownAuthority,
    /// Its CA is trusted no more, because its time is over.
    AuthorityExpired,
    /// Its CA was withdrawn.
    AuthorityRevoked,
    /// It was withdrawn, by serial number or key id.
    Revoked,
    /// A host's where a user's is wanted, or the other way round.
    Kind,
    /// It names no principal, more than one, or none that counts here.
    Principal,
    /// It has a critical option that is not met here.
    CriticalOption,
    /// Its `source-address` does not hold the address that it is shown from.
    SourceAddress,
    /// Its time has not begun.
    NotYetValid,
    /// Its time is over.
    Expired,
    /// It does not have the extension `permit-port-forwarding`.
    NoForwarding,
}

impl Flaw {
    /// The word that the audit uses.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UnknownAuthority => "certificate_unknown_ca",
            Self::AuthorityExpired => "certificate_ca_expired",
            Self::AuthorityRevoked => "certificate_ca_revoked",
            Self::Revoked => "certificate_revoked",
            Self::Kind => "certificate_type",
            Self::Principal => "certificate_principal",
            Self::CriticalOption => "certificate_option",
            Self::SourceAddress => "certificate_source_address",
            Self::NotYetValid => "certificate_not_yet_valid",
            Self::Expired => "certificate_expired",
            Self::NoForwarding => "certificate_no_forwarding",
        }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Certificate {
    /// Reads the one certificate of a file, an OpenSSH line.
    ///
    /// # Errors
    /// [`CertificateError::File`], which names the file and says what is wrong.
    pub fn read(path: &Path) -> Result<Self, CertificateError> {
        let read = key::read_certificate(path).map_err(CertificateError::Text).and_then(|blob| Self::from_blob(&blob));
        read.map_err(|fault| CertificateError::File { path: path.to_owned(), fault: Box::new(fault) })
    }

    /// As [`Certificate::read`], from text.
    ///
    /// # Errors
    /// If the text is not exactly one certificate that could ever count.
    pub fn parse(text: &str) -> Result<Self, CertificateError> {
        Self::from_blob(&key::certificate_blob(text).map_err(CertificateError::Text)?)
    }

    /// Takes a certificate that came over SSH. Verifies the CA's signature.
    ///
    /// # Errors
    /// If it could never count.
    pub fn from_ssh(whole: &russh::keys::Certificate) -> Result<Self, CertificateError> {
        if whole.key_id().len() > CERTIFICATE_KEY_ID_MAX {
            return Err(CertificateError::TooMuch("a longer key id"));
        }
        let principals = whole.valid_principals();
        if principals.len() > CERTIFICATE_NAMES_MAX {
            return Err(CertificateError::TooMuch("more principals"));
        }
        if whole.critical_options().len() + whole.extensions().len() > CERTIFICATE_NAMES_MAX {
            return Err(CertificateError::TooMuch("more options"));
        }
        let subject = PublicKey::from_ssh(whole.public_key().clone().into()).map_err(CertificateError::Subject)?;
        let authority = match PublicKey::from_ssh(whole.signature_key().clone().into()) {
            Ok(key) => key,
            Err(KeyError::Certificate(_)) => return Err(CertificateError::Nested),
            Err(error) => return Err(CertificateError::Authority(error)),
        };
        if matches!(whole.signature().algorithm(), Algorithm::Rsa { hash: None }) {
            return Err(CertificateError::Sha1);
        }
        whole.verify_signature().map_err(|_| CertificateError::Signature)?;
        let kind = match whole.cert_type() {
            CertType::User => Kind::User,
            CertType::Host => Kind::Host,
        };
        let (sources, unmet) = options(whole.critical_options());
        // With data it would be another option of the same name, which OpenSSH calls corrupt.
        let permits_forwarding = whole.extensions().get(PORT_FORWARDING).is_some_and(String::is_empty);
        Ok(Self(Arc::new(Inner { whole: whole.clone(), subject, authority, kind, sources, unmet, permits_forwarding })))
    }

    fn from_blob(blob: &[u8]) -> Result<Self, CertificateError> {
        if blob.len() > CERTIFICATE_MAX {
            return Err(CertificateError::TooMuch("more bytes"));
        }
        // Looked at before the library decodes it: that recurses without a bound into certificates within certificates.
        if blob.windows(MARK.len()).filter(|window| *window == MARK).count() > 2 {
            return Err(CertificateError::Nested);
        }
        let whole = russh::keys::Certificate::from_bytes(blob)
            .map_err(|error| CertificateError::Damaged(key::unquoted(&error)))?;
        Self::from_ssh(&whole)
    }

    /// The certificate, for the SSH library.
    #[must_use]
    pub fn as_ssh(&self) -> &russh::keys::Certificate {
        &self.0.whole
    }

    /// The key that it certifies.
    #[must_use]
    pub fn subject(&self) -> &PublicKey {
        &self.0.subject
    }

    /// The CA that has signed it.
    #[must_use]
    pub fn authority(&self) -> &PublicKey {
        &self.0.authority
    }

    /// What it says its holder is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The number that the CA gave it; 0 where it gave none.
    #[must_use]
    pub fn serial(&self) -> u64 {
        self.0.whole.serial()
    }

    /// What the CA calls it: any text, and nothing that anybody but the CA vouches for.
    #[must_use]
    pub fn key_id(&self) -> &str {
        self.0.whole.key_id()
    }

    /// For whom it counts.
    #[must_use]
    pub fn principals(&self) -> &[String] {
        self.0.whole.valid_principals()
    }

    /// From when on it counts no more; `None` if that is beyond all time.
    #[must_use]
    pub fn expires(&self) -> Option<Timestamp> {
        i64::try_from(self.0.whole.valid_before()).ok().and_then(|seconds| Timestamp::from_second(seconds).ok())
    }

    /// From when on it counts; `None` if that is beyond all time.
    #[must_use]
    pub fn begins(&self) -> Option<Timestamp> {
        i64::try_from(self.0.whole.valid_after()).ok().and_then(|seconds| Timestamp::from_second(seconds).ok())
    }

    /// The critical option that is not met here, if there is one.
    #[must_use]
    pub fn unmet_option(&self) -> Option<&str> {
        self.0.unmet.as_deref()
    }

    /// Whether it counts at the time `now` for what it is shown for, on the word of the CA that is trusted. For whom it counts
    /// is for the caller to ask [`Certificate::principals`], which are not empty then.
    ///
    /// # Errors
    /// If it does not, with the first reason found.
    pub fn judge(&self, trust: Trust<'_>, shown: Use<'_>, now: Timestamp) -> Result<(), Flaw> {
        if self.authority() != trust.authority {
            return Err(Flaw::UnknownAuthority);
        }
        if trust.revocations.cover(self) {
            return Err(Flaw::Revoked);
        }
        self.judge_apart_from_trust(shown, now)
    }

    /// As [`Certificate::judge`], for whoever presents it himself and cannot know who is trusted by those who see it.
    ///
    /// # Errors
    /// If it does not count, with the first reason found.
    pub fn judge_apart_from_trust(&self, shown: Use<'_>, now: Timestamp) -> Result<(), Flaw> {
        let wanted = match shown {
            Use::Login(_) => Kind::User,
            Use::Host(_) | Use::AnyHost => Kind::Host,
        };
        if self.kind() != wanted {
            return Err(Flaw::Kind);
        }
        if self.0.unmet.is_some() {
            return Err(Flaw::CriticalOption);
        }
        match (shown, &self.0.sources) {
            (_, None) => {}
            (Use::Login(from), Some(sources)) => {
                // As an IPv4 client may reach a listener for IPv6.
                let from = from.map(|from| from.to_canonical());
                if !from.is_some_and(|from| sources.iter().any(|network| network.contains(&from))) {
                    return Err(Flaw::SourceAddress);
                }
            }
            // It means nothing for a host, and what means nothing is not met.
            (Use::Host(_) | Use::AnyHost, Some(_)) => return Err(Flaw::CriticalOption),
        }
        let named = match shown {
            Use::Login(_) | Use::AnyHost => !self.principals().is_empty(),
            Use::Host(name) => self.principals().iter().any(|principal| principal.eq_ignore_ascii_case(name)),
        };
        if !named {
            return Err(Flaw::Principal);
        }
        if matches!(shown, Use::Login(_)) && !self.0.permits_forwarding {
            return Err(Flaw::NoForwarding);
        }
        // At last: what is wrong with its time alone may be right later.
        self.judge_time(now)
    }

    /// Whether its time has begun and is not over: good from its first second on, and no more from its last.
    ///
    /// # Errors
    /// [`Flaw::NotYetValid`] or [`Flaw::Expired`].
    pub fn judge_time(&self, now: Timestamp) -> Result<(), Flaw> {
        let now = u64::try_from(now.as_second()).unwrap_or(0);
        if now < self.0.whole.valid_after() {
            return Err(Flaw::NotYetValid);
        }
        if now >= self.0.whole.valid_before() {
            return Err(Flaw::Expired);
        }
        Ok(())
    }
}

impl PartialEq for Certificate {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.whole == other.0.whole
    }
}

impl Eq for Certificate {}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("subject", &self.subject().fingerprint())
            .field("authority", &self.authority().fingerprint())
            .field("serial", &self.serial())
            .field("key_id", &self.key_id())
            .finish_non_exhaustive()
    }
}

/// What somebody has logged in with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// A plain key.
    Key(Fingerprint),
    /// A certificate.
    Certificate(Certificate),
}

impl Credential {
    /// The key that its holder has.
    #[must_use]
    pub fn key(&self) -> Fingerprint {
        match self {
            Self::Key(key) => *key,
            Self::Certificate(certificate) => certificate.subject().fingerprint(),
        }
    }

    /// The certificate, where it is one.
    #[must_use]
    pub fn certificate(&self) -> Option<&Certificate> {
        match self {
            Self::Key(_) => None,
            Self::Certificate(certificate) => Some(certificate),
        }
    }

    /// From when on it counts no more by itself. A plain key has no such time; what is registered of it may.
    #[must_use]
    pub fn expires(&self) -> Option<Timestamp> {
        self.certificate().and_then(Certificate::expires)
    }
}

/// The networks of `source-address`, and the first option that is not met.
fn options(options: &OptionsMap) -> (Option<Vec<IpNet>>, Option<String>) {
    let (mut sources, mut unmet) = (None, None);
    for (name, data) in options.iter() {
        let networks = if name == SOURCE_ADDRESS { networks(data) } else { None };
        match networks {
            Some(networks) => sources = Some(networks),
            None => unmet = unmet.or_else(|| Some(name.escape_debug().take(64).collect())),
        }
    }
    (sources, unmet)
}

/// A list as `sshd` reads it: networks or addresses between commas, without anything else. A list of which anything cannot be
/// read holds nothing.
fn networks(list: &str) -> Option<Vec<IpNet>> {
    let network = |text: &str| match network::parse(text) {
        Some(network) => Some(network).filter(|network| network.network() == network.addr()),
        None => text.parse::<IpAddr>().ok().map(IpNet::from),
    };
    list.split(',').map(network).collect::<Option<Vec<_>>>().filter(|list| list.len() <= CERTIFICATE_NAMES_MAX)
}

const SOURCE_ADDRESS: &str = "source-address";

const PORT_FORWARDING: &str = "permit-port-forwarding";

const MARK: &[u8] = b"-cert-v01@";

#[cfg(test)]
pub(crate) mod forge;
#[cfg(test)]
mod tests;

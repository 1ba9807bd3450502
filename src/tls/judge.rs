//! Judges the certificates that TLS clients show, by authorities and revocation lists that somebody chose.
//!
//! Promised: a certificate is good only if it leads to one of the authorities, by signatures that are not made with SHA-1; if
//! all of the chain, the authority included, is valid at the time that is asked about; if nothing of it was revoked; if it may
//! be used by a client; and if it names whoever its holder claims to be. **That it comes from the right authority is never
//! enough.** The same chain can be judged again at any later time.
//!
//! Stricter than others, on purpose: an authority that has a list of revocations must have a valid one that covers each
//! certificate between it and the client, and refuses where it does not, whatever another authority of the same place says. A
//! list that is out of date says nothing of whom it does not name.
//!
//! Absent: fetching lists, and OCSP. Lists lie in files, which whoever runs the authority keeps up to date.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use x509_cert::crl::CertificateList;
use x509_cert::der::Decode;
use x509_cert::ext::pkix::BasicConstraints;
use x509_cert::name::Name;

use super::names::{Particulars, PeerCertificate, Wanted, particulars, seconds};
use super::peer::PeerChain;
use super::server::{AcceptError, Gate};
use crate::identity::Fingerprint;
use crate::limits::{CA_WARN, CLIENT_CAS_MAX, CRL_WARN_SHARE, PEER_CHAIN_MAX};

/// Whether clients show a certificate of their own. The stricter of two holds where both have a say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum ClientAuth {
    /// None is asked for, and none counts.
    #[default]
    Off,
    /// One may be missing, which is marked in the audit; one that is shown must be good.
    Loose,
    /// Whoever has no good one is refused.
    Strict,
}

impl ClientAuth {
    /// All of them, by the words that configurations use.
    pub const WORDS: [(&'static str, Self); 3] = [("off", Self::Off), ("loose", Self::Loose), ("strict", Self::Strict)];
}

impl fmt::Display for ClientAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = Self::WORDS.iter().find(|(_, mode)| mode == self).map_or("", |(word, _)| word);
        f.write_str(word)
    }
}

/// Why a client's certificate is not good: for the audit, never for whoever showed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flaw {
    /// None was shown.
    Missing,
    /// It leads to none of the authorities.
    UnknownAuthority,
    /// It is malformed, or not for clients, or an authority's own.
    Invalid,
    /// The authority's list does not cover it, so that nobody knows whether it was revoked.
    RevocationUnknown,
    /// The authority's list is out of date.
    RevocationsExpired,
    /// It, or something of its chain, does not count yet.
    NotYetValid,
    /// It, or something of its chain, has expired.
    Expired,
    /// It, or something of its chain, was revoked.
    Revoked,
    /// All is well with it, but it is somebody else's.
    OtherName,
}

impl Flaw {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Missing,
        Self::UnknownAuthority,
        Self::Invalid,
        Self::RevocationUnknown,
        Self::RevocationsExpired,
        Self::NotYetValid,
        Self::Expired,
        Self::Revoked,
        Self::OtherName,
    ];

    /// The word that the audit uses.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "client_certificate_missing",
            Self::UnknownAuthority => "client_certificate_unknown_ca",
            Self::Invalid => "client_certificate_invalid",
            Self::RevocationUnknown => "client_certificate_revocation_unknown",
            Self::RevocationsExpired => "client_certificate_crl_expired",
            Self::NotYetValid => "client_certificate_not_yet_valid",
            Self::Expired => "client_certificate_expired",
            Self::Revoked => "client_certificate_revoked",
            Self::OtherName => "client_certificate_other_name",
        }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a file does not say whom to trust.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// It is not a list of PEM certificates.
    #[error("is not a file of PEM certificates (BEGIN CERTIFICATE)")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// It holds none.
    #[error("holds no PEM certificate (BEGIN CERTIFICATE)")]
    Empty,
    /// It holds a private key, which must not be where a gateway can read it.
    #[error(
        "holds a private key: a CA's key belongs to whoever runs the CA, so take it out of here, and treat it as known"
    )]
    PrivateKey,
    /// A certificate in it cannot be one of an authority.
    #[error("certificate {number} cannot be used as an authority's (it must have basicConstraints CA:TRUE)")]
    Certificate {
        /// Which one, counted from 1.
        number: usize,
    },
    /// There are too many.
    #[error("more than {CLIENT_CAS_MAX} authorities in one place are not accepted")]
    TooMany,
    /// The list is not one of PEM revocation lists.
    #[error("is not a PEM revocation list (BEGIN X509 CRL); make one of a binary list with `openssl crl -inform der`")]
    ListPem(#[source] rustls_pki_types::pem::Error),
    /// It holds none.
    #[error("holds no PEM revocation list (BEGIN X509 CRL); make one of a binary list with `openssl crl -inform der`")]
    ListEmpty,
    /// A list that cannot be used.
    #[error("revocation list {number} cannot be used (it must be a complete one, of version 2, with a nextUpdate)")]
    List {
        /// Which one, counted from 1.
        number: usize,
    },
    /// Lists of somebody else.
    #[error("holds no revocation list of an authority in the certificates beside it")]
    ListOfOthers,
}

/// Authorities and what they have revoked. Clones share them; equal are those that were read from the same bytes.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Trust {
    authorities: Vec<Arc<Authority>>,
}

impl Trust {
    /// Adds the authorities of a file of PEM certificates, with the file of revocation lists beside it, if there is one.
    ///
    /// # Errors
    /// If either is not what it should be; `Err((true, …))` if it is the lists.
    pub fn add(&mut self, certificates: &str, lists: Option<&str>) -> Result<(), (bool, TrustError)> {
        let certificates = read_certificates(certificates).map_err(|error| (false, error))?;
        let lists = match lists {
            Some(lists) => read_lists(lists).map_err(|error| (true, error))?,
            None => Arc::default(),
        };
        let mut covered = lists.is_empty();
        for (index, certificate) in certificates.into_iter().enumerate() {
            let authority = Authority::new(certificate, &lists).map_err(|wrong| match wrong {
                Wrong::Certificate => (false, TrustError::Certificate { number: index + 1 }),
                Wrong::List(number) => (true, TrustError::List { number }),
            })?;
            covered |= authority.lists_end.is_some();
            if self.authorities.contains(&authority) {
                continue;
            }
            if self.authorities.len() == CLIENT_CAS_MAX {
                return Err((false, TrustError::TooMany));
            }
            self.authorities.push(authority);
        }
        if covered { Ok(()) } else { Err((true, TrustError::ListOfOthers)) }
    }

    /// Whether nobody is trusted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.authorities.is_empty()
    }

    /// Whether the chain is good as far as the authorities go, whomever it names.
    ///
    /// # Errors
    /// If it is not.
    pub fn vouch(&self, chain: &PeerChain, now: Timestamp) -> Result<PeerCertificate, Flaw> {
        vouch_any([self], chain, now)
    }

    /// Whether the chain is good and names `wanted`.
    ///
    /// # Errors
    /// If it is not.
    pub fn judge(&self, chain: &PeerChain, wanted: &Wanted<'_>, now: Timestamp) -> Result<PeerCertificate, Flaw> {
        let certificate = self.vouch(chain, now)?;
        if certificate.names.name(wanted) { Ok(certificate) } else { Err(Flaw::OtherName) }
    }

    /// Whether the chain leads to one of the authorities, and none that it leads to says by its lists that it does not count:
    /// a root and one below it may both be here, with lists of the one or the other.
    fn verify(
        &self,
        end: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        issuers: &[Name],
        begin: Timestamp,
        now: Timestamp,
    ) -> Result<(), Flaw> {
        let mut judged = Err(Flaw::UnknownAuthority);
        // Those that have signed nothing of the chain are not worth a look: there may be some of each organisation.
        for authority in self.authorities.iter().filter(|authority| issuers.contains(&authority.name)) {
            match authority.verify(end, between, begin, now) {
                Ok(()) => judged = Ok(()),
                Err(flaw @ (Flaw::Revoked | Flaw::RevocationsExpired | Flaw::RevocationUnknown)) => return Err(flaw),
                // What is wrong with one of ours tells more than that it is not another's.
                Err(worse) => judged = judged.map_err(|flaw: Flaw| flaw.max(worse)),
            }
        }
        judged
    }

    /// When a revocation list or an authority itself ends next after `after`: from then on the same chain may be judged
    /// otherwise.
    #[must_use]
    pub fn next_end(&self, after: Timestamp) -> Option<Timestamp> {
        self.ends().map(|end| end.at).filter(|at| *at > after).min()
    }

    /// Each of the authorities by the fingerprint of its certificate, with what it has revoked.
    pub fn authorities(&self) -> impl Iterator<Item = (Fingerprint, Lists)> {
        self.authorities.iter().map(|one| (Fingerprint::of(&one.certificate), Lists(one.lists.clone())))
    }

    /// When each of the authorities and of their lists ends.
    pub fn ends(&self) -> impl Iterator<Item = End> {
        self.authorities.iter().flat_map(|authority| authority.ends())
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.authorities.iter().map(|authority| authority.name.to_string())).finish()
    }
}

/// Whether the chain is good as far as some of these authorities go, whomever it names.
///
/// # Errors
/// If it is not.
pub fn vouch_any<'a>(
    several: impl IntoIterator<Item = &'a Trust>,
    chain: &PeerChain,
    now: Timestamp,
) -> Result<PeerCertificate, Flaw> {
    let Some((end, between)) = chain.certificates().split_first() else { return Err(Flaw::Missing) };
    if between.len() >= PEER_CHAIN_MAX {
        return Err(Flaw::Invalid);
    }
    let particulars = particulars(end).ok_or(Flaw::Invalid)?;
    let issuers = chain.certificates().iter().map(|der| Some(parse(der)?.tbs_certificate().issuer().clone()));
    let issuers: Vec<Name> = issuers.collect::<Option<_>>().ok_or(Flaw::Invalid)?;
    let mut flaw = Flaw::UnknownAuthority;
    for trust in several {
        match trust.verify(end, between, &issuers, particulars.not_before, now) {
            Ok(()) => {
                let (names, not_after) = (particulars.names, particulars.not_after);
                return Ok(PeerCertificate { fingerprint: chain.fingerprint(), names, not_after });
            }
            Err(worse) => flaw = flaw.max(worse),
        }
    }
    Err(flaw)
}

/// A gate for clients who must have a certificate: what `judge` says of it becomes the alert.
pub fn gate<F>(judge: F) -> Arc<dyn Gate>
where
    F: Fn(&PeerChain) -> Result<(), Flaw> + Send + Sync + 'static,
{
    Arc::new(Judging(judge))
}

struct Judging<F>(F);

impl<F> fmt::Debug for Judging<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Judging")
    }
}

impl<F: Fn(&PeerChain) -> Result<(), Flaw> + Send + Sync> Gate for Judging<F> {
    fn admits(&self, chain: &PeerChain, _: UnixTime) -> Result<(), CertificateError> {
        (self.0)(chain).map_err(|flaw| match flaw {
            Flaw::UnknownAuthority => CertificateError::UnknownIssuer,
            Flaw::RevocationUnknown => CertificateError::UnknownRevocationStatus,
            Flaw::RevocationsExpired => CertificateError::ExpiredRevocationList,
            Flaw::NotYetValid => CertificateError::NotValidYet,
            Flaw::Expired => CertificateError::Expired,
            Flaw::Revoked => CertificateError::Revoked,
            Flaw::Missing | Flaw::Invalid | Flaw::OtherName => CertificateError::BadEncoding,
        })
    }
}

impl AcceptError {
    /// What was wrong with the client's certificate, if it was that for which the handshake failed.
    #[must_use]
    pub fn flaw(&self) -> Option<Flaw> {
        match self {
            Self::NoCertificate => Some(Flaw::Missing),
            Self::Certificate(error) => Some(flaw(error)),
            Self::Refused(_) | Self::Protocol(_) | Self::Closed | Self::Io(_) => None,
        }
    }
}

/// What an authority has revoked, to be compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lists(Arc<[CertificateRevocationListDer<'static>]>);

/// One authority's certificate, with the lists that stand beside it.
struct Authority {
    certificate: CertificateDer<'static>,
    lists: Arc<[CertificateRevocationListDer<'static>]>,
    verifier: Arc<dyn ClientCertVerifier>,
    name: Name,
    not_before: Timestamp,
    not_after: Timestamp,
    /// When the first of its own lists ends.
    lists_end: Option<Timestamp>,
    /// From when on its operator is warned of that.
    lists_warn: Option<Timestamp>,
}

/// What an authority cannot be made of.
enum Wrong {
    Certificate,
    /// Counted from 1.
    List(usize),
}

impl Authority {
    fn new(
        certificate: CertificateDer<'static>,
        lists: &Arc<[CertificateRevocationListDer<'static>]>,
    ) -> Result<Arc<Self>, Wrong> {
        let parsed = parse(&certificate).ok_or(Wrong::Certificate)?;
        let parsed = parsed.tbs_certificate();
        let constraints = parsed.get_extension::<BasicConstraints>().ok().flatten();
        let mut roots = RootCertStore::empty();
        let fits = constraints.is_some_and(|(_, constraints)| constraints.ca) && roots.add(certificate.clone()).is_ok();
        let Some(Particulars { not_before, not_after, .. }) = particulars(&certificate).filter(|_| fits) else {
            return Err(Wrong::Certificate);
        };
        let mut own = Vec::new();
        for (index, list) in lists.iter().enumerate() {
            let span = Span::of(list, parsed.subject()).map_err(|()| Wrong::List(index + 1))?;
            own.extend(span);
        }
        // One that has none of its own is not asked about revocations: the lists are another's of the same file.
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), super::provider());
        let builder = if own.is_empty() { builder } else { builder.with_crls(lists.iter().cloned()) };
        let verifier = builder.enforce_revocation_expiration().build().map_err(|_| Wrong::List(1))?;
        Ok(Arc::new(Self {
            name: parsed.subject().clone(),
            lists: lists.clone(),
            lists_end: own.iter().map(|span| span.end).min(),
            lists_warn: own.iter().map(Span::warn).min(),
            certificate,
            verifier,
            not_before,
            not_after,
        }))
    }

    /// Whether the chain leads here and is good at the time `now`. `begin` is when its first certificate begins to count.
    fn verify(
        &self,
        end: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        begin: Timestamp,
        now: Timestamp,
    ) -> Result<(), Flaw> {
        let verify = |at: Timestamp| {
            let second = u64::try_from(at.as_second()).map_err(|_| Flaw::NotYetValid)?;
            let at = UnixTime::since_unix_epoch(Duration::from_secs(second));
            self.verifier.verify_client_cert(end, between, at).map(drop).map_err(|error| flaw(&error))
        };
        match verify(now) {
            Ok(()) => {}
            // The library looks at its time before it looks at whose it is, which tells more.
            Err(Flaw::Expired | Flaw::NotYetValid) if verify(begin) == Err(Flaw::UnknownAuthority) => {
                return Err(Flaw::UnknownAuthority);
            }
            Err(flaw) => return Err(flaw),
        }
        // The library takes an authority's key as it is, for ever.
        if now < self.not_before {
            return Err(Flaw::NotYetValid);
        }
        if now >= self.not_after { Err(Flaw::Expired) } else { Ok(()) }
    }

    fn ends(&self) -> impl Iterator<Item = End> {
        let end = |warn, at, list| End { subject: self.name.to_string(), list, warn, at };
        let lists = self.lists_warn.zip(self.lists_end).map(|(warn, at)| end(warn, at, true));
        let warn = self.not_after.checked_sub(CA_WARN).unwrap_or(self.not_after);
        lists.into_iter().chain([end(warn, self.not_after, false)])
    }
}

/// The end of an authority or of its list of revocations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    subject: String,
    list: bool,
    warn: Timestamp,
    at: Timestamp,
}

impl End {
    /// What is to be said of it at the time `now`, if it is near or has come.
    #[must_use]
    pub fn warning(&self, now: Timestamp) -> Option<String> {
        if now < self.warn {
            return None;
        }
        let Self { subject, at, .. } = self;
        let (subject, list) = (subject.escape_debug(), if self.list { "the revocation list of " } else { "" });
        let refused = "all certificates of this client CA are refused";
        Some(match now < *at {
            true => format!("{list}{subject} ends at {at}, and from then on {refused}: put the next one in its place"),
            false => format!("{list}{subject} has ended at {at}, and so {refused}: put a new one in its place"),
        })
    }

    /// When that is.
    #[must_use]
    pub fn at(&self) -> Timestamp {
        self.at
    }

    /// When there will be something else to say, after `now`.
    #[must_use]
    pub fn next(&self, now: Timestamp) -> Option<Timestamp> {
        [self.warn, self.at].into_iter().find(|at| *at > now)
    }
}

impl PartialEq for Authority {
    fn eq(&self, other: &Self) -> bool {
        self.certificate == other.certificate && self.lists == other.lists
    }
}

impl Eq for Authority {}

/// When a revocation list holds.
struct Span {
    begin: Timestamp,
    end: Timestamp,
}

impl Span {
    /// That of a list, if it is this issuer's. A list without an end cannot be told from one that was left behind.
    fn of(list: &CertificateRevocationListDer<'_>, issuer: &Name) -> Result<Option<Self>, ()> {
        let list = CertificateList::<x509_cert::certificate::Rfc5280>::from_der(list).map_err(drop)?.tbs_cert_list;
        let (begin, end) = (seconds(list.this_update), list.next_update.and_then(seconds));
        let (Some(begin), Some(end)) = (begin, end) else { return Err(()) };
        Ok((list.issuer == *issuer).then_some(Self { begin, end }))
    }

    /// From when on its operator is warned.
    fn warn(&self) -> Timestamp {
        let share = self.end.duration_since(self.begin) / CRL_WARN_SHARE;
        self.end.checked_sub(share).unwrap_or(self.end)
    }
}

/// Whether a text holds revocation lists that could be used.
///
/// # Errors
/// If it does not; as of [`Trust::add`].
pub fn check_lists(text: &str) -> Result<(), (bool, TrustError)> {
    let lists = read_lists(text).map_err(|error| (true, error))?;
    let nobody = Name::default();
    let broken = lists.iter().position(|list| Span::of(list, &nobody).is_err());
    broken.map_or(Ok(()), |index| Err((true, TrustError::List { number: index + 1 })))
}

fn parse(der: &[u8]) -> Option<x509_cert::Certificate> {
    x509_cert::Certificate::from_der(der).ok()
}

fn read_certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    if text.contains("PRIVATE KEY-----") {
        return Err(TrustError::PrivateKey);
    }
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let certificates = certificates.map_err(TrustError::Pem)?;
    if certificates.is_empty() { Err(TrustError::Empty) } else { Ok(certificates) }
}

fn read_lists(text: &str) -> Result<Arc<[CertificateRevocationListDer<'static>]>, TrustError> {
    let lists: Result<Arc<[_]>, _> = CertificateRevocationListDer::pem_slice_iter(text.as_bytes()).collect();
    let lists = lists.map_err(TrustError::ListPem)?;
    if lists.is_empty() { Err(TrustError::ListEmpty) } else { Ok(lists) }
}

/// What the library's error means. One that we do not know is a fault of the certificate: it is refused in any case.
fn flaw(error: &rustls::Error) -> Flaw {
    let error = match error {
        rustls::Error::InvalidCertificate(error) => error,
        // One that is not its authority's, above all.
        rustls::Error::InvalidCertRevocationList(_) => return Flaw::RevocationUnknown,
        _ => return Flaw::Invalid,
    };
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => Flaw::Expired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Flaw::NotYetValid,
        CertificateError::Revoked => Flaw::Revoked,
        // A signature that is not its authority's: somebody else's, who goes by the same name.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Flaw::UnknownAuthority,
        CertificateError::UnknownRevocationStatus => Flaw::RevocationUnknown,
        CertificateError::ExpiredRevocationList | CertificateError::ExpiredRevocationListContext { .. } => {
            Flaw::RevocationsExpired
        }
        _ => Flaw::Invalid,
    }
}

#[cfg(test)]
pub(crate) mod tests;

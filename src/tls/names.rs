//! Whom a certificate names, and whom it has to.
//!
//! Promised: names are compared whole, and nothing is a pattern, on either side. What stands in a certificate counts only
//! where its authority was judged first ([`super::judge`]).

use std::fmt;

use jiff::Timestamp;
use x509_cert::Certificate;
use x509_cert::der::{Decode, Tag, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::{DirectoryString, GeneralName};

use crate::identity::{AgentName, Fingerprint, OrganisationId, PrincipalId};
use crate::limits::PEER_NAMES_MAX;

/// A certificate that was judged good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// The SHA-256 of its DER form.
    pub fingerprint: Fingerprint,
    /// Whom it names.
    pub names: Names,
    /// When it ends.
    pub not_after: Timestamp,
}

/// Whom a certificate names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    uris: Vec<String>,
    dns: Vec<String>,
    common: Option<String>,
}

impl Names {
    /// Whether it names `wanted`. Nothing is a pattern here, on either side.
    #[must_use]
    pub fn name(&self, wanted: &Wanted<'_>) -> bool {
        let uris = wanted.uri.iter().chain(wanted.names.iter().filter(|_| wanted.uri.is_none()));
        uris.into_iter().any(|uri| self.uris.contains(uri)) || wanted.names.iter().any(|name| self.has(name))
    }

    fn has(&self, name: &str) -> bool {
        self.dns.iter().any(|dns| dns.eq_ignore_ascii_case(name)) || self.common.as_deref() == Some(name)
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let common = self.common.iter();
        let mut all = self.uris.iter().chain(&self.dns).chain(common).peekable();
        if all.peek().is_none() {
            return f.write_str("nobody");
        }
        for (at, name) in all.take(4).enumerate() {
            write!(f, "{}{}", if at == 0 { "" } else { ", " }, name.escape_debug())?;
        }
        Ok(())
    }
}

/// Whom a certificate has to name.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    uri: Option<String>,
    names: &'a [String],
}

impl<'a> Wanted<'a> {
    /// An agent, or one of the `names` that stand for it.
    #[must_use]
    pub fn agent(name: &AgentName, names: &'a [String]) -> Self {
        Self { uri: Some(format!("caponier://{}/agents/{}", name.organisation, name.agent)), names }
    }

    /// Whoever has one of the `names`, which may be URIs as well.
    #[must_use]
    pub fn any(names: &'a [String]) -> Self {
        Self { uri: None, names }
    }

    /// A principal, or one of the `names` that stand for it.
    #[must_use]
    pub fn principal(organisation: &OrganisationId, id: &PrincipalId, names: &'a [String]) -> Self {
        Self { uri: Some(format!("caponier://{organisation}/principals/{id}")), names }
    }
}

/// What is read of a certificate beside its signature.
pub(super) struct Particulars {
    pub(super) names: Names,
    pub(super) not_before: Timestamp,
    pub(super) not_after: Timestamp,
}

/// Reads it; `None` if it is not well formed, or has more names than any honest one.
pub(super) fn particulars(der: &[u8]) -> Option<Particulars> {
    let certificate = Certificate::from_der(der).ok()?;
    let certificate = certificate.tbs_certificate();
    let (mut uris, mut dns) = (Vec::new(), Vec::new());
    let alternatives = certificate.get_extension::<SubjectAltName>().ok()?;
    for name in alternatives.map(|(_, names)| names.0).unwrap_or_default() {
        match name {
            GeneralName::UniformResourceIdentifier(uri) => uris.push(uri.to_string()),
            GeneralName::DnsName(name) => dns.push(name.to_string()),
            _ => {}
        }
    }
    if uris.len() + dns.len() > PEER_NAMES_MAX {
        return None;
    }
    // Of several, it could not be told which is meant.
    let mut commons = certificate.subject().iter().filter(|attribute| attribute.oid == COMMON_NAME);
    let common = commons.next().filter(|_| commons.next().is_none());
    let common = common.and_then(|attribute| match attribute.value.tag() {
        Tag::Utf8String | Tag::PrintableString => attribute.value.decode_as::<DirectoryString>().ok(),
        _ => None,
    });
    let common = common.map(|text| text.value().into_owned());
    let validity = certificate.validity();
    let (not_before, not_after) = (seconds(validity.not_before)?, seconds(validity.not_after)?);
    Some(Particulars { names: Names { uris, dns, common }, not_before, not_after })
}

/// When that is.
pub(super) fn seconds(time: x509_cert::time::Time) -> Option<Timestamp> {
    i64::try_from(time.to_unix_duration().as_secs()).ok().and_then(|second| Timestamp::from_second(second).ok())
}

/// X.520's commonName.
const COMMON_NAME: x509_cert::der::asn1::ObjectIdentifier =
    x509_cert::der::asn1::ObjectIdentifier::new_unwrap("2.5.4.3");

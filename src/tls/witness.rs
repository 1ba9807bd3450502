//! What a server shows of itself, for whoever examines it: also of one that is not trusted, so that it can be said who stands
//! there.
//!
//! Promised: [`connect_seeing`] accepts exactly what [`super::connect`] accepts. [`look`] accepts any certificate whose key the
//! server proves to have, sends nothing over the connection and gives it to nobody: what it tells is for people to read.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::server::ParsedCertificate;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::TlsError;
use super::client::{ClientOptions, ConnectError, connect};
use super::issuer::plain;
use super::names::seconds;
use super::proof::proof;
use super::stream::TlsStream;
use crate::identity::Fingerprint;
use crate::limits::PEER_NAMES_MAX;
use crate::target::Host;

/// What a server has shown: its own certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Whose it is, as it says.
    pub subject: String,
    /// Which authority it names.
    pub issuer: String,
    /// For which hosts.
    pub names: Vec<String>,
    /// From when on it counts.
    pub begins: Timestamp,
    /// From when on it does not count any more.
    pub ends: Timestamp,
    /// The SHA-256 of its DER form.
    pub fingerprint: Fingerprint,
    /// Whether it is for the host that was asked for.
    pub fits: bool,
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "subject {}, issuer {}, certificate {}", self.subject, self.issuer, self.fingerprint)
    }
}

/// Shakes hands as [`connect`] does, and tells what the server has shown, whether or not it is accepted.
///
/// # Errors
/// If the authorities cannot be read.
pub async fn connect_seeing<S>(
    options: &ClientOptions,
    name: &Host,
    stream: S,
) -> Result<(Result<TlsStream<S>, ConnectError>, Option<Shown>), TlsError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let witness = Arc::new(Witness { judge: Some(options.verifier()?), seen: Mutex::default() });
    let config = options.build_with(witness.clone())?;
    let connected = connect(&config, name, stream).await;
    Ok((connected, witness.shown(name)))
}

/// Shakes hands with whoever answers, and tells what it has shown. `alpn` is what is said to be spoken inside. The stream is of
/// use for nothing that matters: nobody knows with whom it is.
///
/// # Errors
/// If the library cannot be set up.
pub async fn look<S>(
    alpn: &'static [&'static [u8]],
    name: &Host,
    stream: S,
) -> Result<(Result<TlsStream<S>, ConnectError>, Option<Shown>), TlsError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let witness = Arc::new(Witness { judge: None, seen: Mutex::default() });
    let options = ClientOptions { alpn, ..ClientOptions::default() };
    let config = options.build_with(witness.clone())?;
    let connected = connect(&config, name, stream).await;
    Ok((connected, witness.shown(name)))
}

/// Remembers what it was shown. Without a judge it accepts all of it.
#[derive(Debug)]
struct Witness {
    judge: Option<Arc<dyn ServerCertVerifier>>,
    seen: Mutex<Option<CertificateDer<'static>>>,
}

impl Witness {
    fn shown(&self, name: &Host) -> Option<Shown> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        shown(seen.as_ref()?, name)
    }
}

impl ServerCertVerifier for Witness {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(own.clone().into_owned());
        match &self.judge {
            Some(judge) => judge.verify_server_cert(own, between, name, ocsp, now),
            None => Ok(ServerCertVerified::assertion()),
        }
    }

    proof!();
}

/// Reads a certificate; `None` if it is not well formed.
fn shown(der: &CertificateDer<'_>, host: &Host) -> Option<Shown> {
    let whole = Certificate::from_der(der).ok()?;
    let certificate = whole.tbs_certificate();
    let alternatives = certificate.get_extension::<SubjectAltName>().ok().flatten();
    let names = alternatives.map(|(_, names)| names.0).unwrap_or_default();
    let names = names.iter().filter_map(|name| match name {
        GeneralName::DnsName(name) => Some(plain(name.as_str())),
        GeneralName::IpAddress(bytes) => address(bytes.as_bytes()).map(|address| address.to_string()),
        _ => None,
    });
    let wanted = match host {
        Host::Address(address) => Some(ServerName::from(*address)),
        Host::Name(name) => ServerName::try_from(name.to_string()).ok(),
    };
    let parsed = ParsedCertificate::try_from(der).ok();
    let fits = parsed.zip(wanted).is_some_and(|(parsed, wanted)| verify_server_name(&parsed, &wanted).is_ok());
    let validity = certificate.validity();
    Some(Shown {
        subject: plain(&certificate.subject().to_string()),
        issuer: plain(&certificate.issuer().to_string()),
        names: names.take(PEER_NAMES_MAX).collect(),
        begins: seconds(validity.not_before)?,
        ends: seconds(validity.not_after)?,
        fingerprint: Fingerprint::of(der),
        fits,
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

#[cfg(test)]
mod tests;

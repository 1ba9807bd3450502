//! Tests of the module above.

use std::time::Duration;

use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};
use rustls::server::ServerConfig;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls_pki_types::PrivateKeyDer;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::tls::tests::Yard;
use crate::tls::{VERSIONS, provider};

const DEADLINE: Duration = Duration::from_secs(120);

const NAME: &str = "gateway.example.com";

type Seen = (Result<TlsStream<DuplexStream>, ConnectError>, Option<Shown>);

fn host(text: &str) -> Host {
    text.parse().expect("a host")
}

/// A certificate of the yard's authority, with its key, as `change` wants it.
fn certified(yard: &Yard, change: impl FnOnce(&mut CertificateParams)) -> CertifiedKey {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(vec![NAME.to_owned()]).expect("params");
    change(&mut params);
    let certificate = params.signed_by(&key, &yard.authority).expect("a certificate");
    CertifiedKey::new(vec![certificate.der().clone()], signing(&key))
}

fn signing(key: &KeyPair) -> Arc<dyn rustls::sign::SigningKey> {
    provider().key_provider.load_private_key(PrivateKeyDer::Pkcs8(key.serialize_der().into())).expect("a signing key")
}

/// A server that shows this, whatever it is, in these versions of TLS.
fn server(shown: CertifiedKey, versions: &[&'static rustls::SupportedProtocolVersion]) -> TlsAcceptor {
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .expect("suites for each version")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
    TlsAcceptor::from(Arc::new(config))
}

async fn seen(server: &TlsAcceptor, options: &ClientOptions, name: &str) -> Seen {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = host(name);
    let both = async { tokio::join!(connect_seeing(options, &name, far), server.accept(near)).0 };
    timeout(DEADLINE, both).await.expect("in time").expect("authorities")
}

async fn looked(server: &TlsAcceptor, name: &str) -> Seen {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = host(name);
    let both = async { tokio::join!(look(&[], &name, far), server.accept(near)).0 };
    timeout(DEADLINE, both).await.expect("in time").expect("a client")
}

fn trusting(yard: &Yard) -> ClientOptions {
    ClientOptions { ca_files: vec![yard.path("ca.pem")], ..ClientOptions::default() }
}

#[tokio::test]
async fn what_connect_refuses_is_refused_and_told_of_all_the_same() {
    let (yard, other) = (Yard::new(), Yard::new());
    let good = || server(certified(&yard, |_| {}), VERSIONS);
    let (connected, shown) = seen(&good(), &trusting(&yard), NAME).await;
    assert!(connected.is_ok(), "{connected:?}");
    let shown = shown.expect("a certificate");
    assert_eq!((&shown.names[..], shown.fits), (&[NAME.to_owned()][..], true));

    let (connected, shown) = seen(&good(), &trusting(&yard), "other.example.com").await;
    assert!(matches!(connected, Err(ConnectError::OtherName { .. })), "{connected:?}");
    assert!(!shown.expect("told").fits);
    let (connected, shown) = seen(&good(), &trusting(&other), NAME).await;
    assert!(matches!(connected, Err(ConnectError::Untrusted { .. })), "{connected:?}");
    // For the right host all the same: that nobody vouches for it is another matter.
    assert!(shown.expect("told").fits);
    for (begins, ends) in [(2020, 2021), (2100, 2101)] {
        let outside = certified(&yard, |params| {
            params.not_before = rcgen::date_time_ymd(begins, 1, 1);
            params.not_after = rcgen::date_time_ymd(ends, 1, 1);
        });
        let (connected, shown) = seen(&server(outside, VERSIONS), &trusting(&yard), NAME).await;
        assert!(matches!(connected, Err(ConnectError::Certificate(_))), "{begins}: {connected:?}");
        let shown = shown.expect("told");
        assert_eq!(shown.begins.to_string(), format!("{begins}-01-01T00:00:00Z"));
        assert_eq!(shown.ends.to_string(), format!("{ends}-01-01T00:00:00Z"));
    }
}

/// The certificate of one, the key of another: what somebody can do who has only seen a certificate.
#[tokio::test]
async fn nothing_passes_without_proof_of_the_key() {
    let yard = Yard::new();
    for version in VERSIONS {
        let stolen = || {
            let key = KeyPair::generate().expect("a key");
            server(CertifiedKey::new(certified(&yard, |_| {}).cert, signing(&key)), &[*version])
        };
        let (connected, shown) = looked(&stolen(), NAME).await;
        assert!(matches!(connected, Err(ConnectError::Certificate(_))), "looked at {version:?}: {connected:?}");
        assert!(shown.is_some());
        let (connected, _) = seen(&stolen(), &trusting(&yard), NAME).await;
        assert!(matches!(connected, Err(ConnectError::Certificate(_))), "{version:?}: {connected:?}");
    }
}

#[tokio::test]
async fn whoever_is_looked_at_need_not_be_trusted() {
    let yard = Yard::new();
    for version in VERSIONS {
        let server = server(certified(&yard, |_| {}), &[*version]);
        let (connected, shown) = looked(&server, "other.example.com").await;
        assert!(connected.is_ok(), "{version:?}: {connected:?}");
        assert!(!shown.expect("a certificate").fits);
    }
}

#[tokio::test]
async fn what_is_no_certificate_is_not_shown() {
    let (yard, key) = (Yard::new(), KeyPair::generate().expect("a key"));
    let whole = certified(&yard, |_| {}).cert.remove(0);
    for broken in [&b"no certificate"[..], &whole[..whole.len() / 2], &[&whole[..], &b"more"[..]].concat()] {
        let broken = CertifiedKey::new(vec![CertificateDer::from(broken.to_vec())], signing(&key));
        let (connected, shown) = looked(&server(broken, VERSIONS), NAME).await;
        assert!(connected.is_err(), "{connected:?}");
        assert_eq!(shown, None);
    }
}

#[tokio::test]
async fn who_does_not_speak_tls_has_shown_nothing() {
    let yard = Yard::new();
    // With room for all of the hello, which nobody reads.
    let (near, mut far) = tokio::io::duplex(64 * 1024);
    far.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.expect("written");
    let (options, name) = (trusting(&yard), host(NAME));
    let (connected, shown) = timeout(DEADLINE, look(&[], &name, near)).await.expect("in time").expect("a client");
    assert!(matches!(connected, Err(ConnectError::Protocol(_))), "{connected:?}");
    assert_eq!(shown, None);
    let (near, far) = tokio::io::duplex(1024);
    drop(far);
    let seeing = connect_seeing(&options, &name, near);
    let (connected, shown) = timeout(DEADLINE, seeing).await.expect("in time").expect("authorities");
    assert!(connected.is_err(), "{connected:?}");
    assert_eq!(shown, None);
}

/// What a stranger writes ends in a terminal.
#[test]
fn what_is_shown_is_bounded_and_disturbs_no_terminal() {
    let yard = Yard::new();
    let much = certified(&yard, |params| {
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("\u{1b}[2J{}\n", "a".repeat(1000)));
        params.subject_alt_names = vec![SanType::DnsName(Ia5String::try_from("x\u{1b}[2J").expect("ASCII"))];
        for number in 0..=PEER_NAMES_MAX {
            let name = Ia5String::try_from(format!("n{number}.example.com")).expect("ASCII");
            params.subject_alt_names.push(SanType::DnsName(name));
        }
    });
    let shown = shown(&much.cert[0], &host(NAME)).expect("a certificate");
    assert_eq!(shown.names.len(), PEER_NAMES_MAX);
    assert_eq!(shown.names[0], "x[2J");
    assert!(shown.subject.len() <= 200, "{}", shown.subject.len());
    assert!(!shown.to_string().contains(char::is_control), "{shown:?}");
    assert!(!shown.fits);
}

#[test]
fn addresses_are_of_four_bytes_or_sixteen() {
    assert_eq!(address(&[10, 0, 0, 1]), "10.0.0.1".parse().ok());
    assert_eq!(address(&[0; 16]), "::".parse().ok());
    for bytes in [&[][..], &[10, 0, 0], &[10, 0, 0, 1, 2], &[0; 8], &[0; 15], &[0; 17]] {
        assert_eq!(address(bytes), None, "{bytes:?}");
    }
}

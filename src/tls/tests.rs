use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, PKCS_RSA_SHA256};
use rustls::CertificateError;
use rustls_pki_types::UnixTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::limits::{TLS_CHAIN_MAX, TLS_HANDSHAKE_BYTES};
use crate::target::Host;

#[test]
fn names_are_dns_names_or_addresses() {
    for name in ["orders.db.internal", "10.1.2.3", "2001:db8::1"] {
        assert!(is_server_name(name), "{name}");
    }
    for name in ["", "a b", "db:5432", "-a"] {
        assert!(!is_server_name(name), "{name}");
    }
}

/// A folder with an authority, `ca.pem`, and what it has signed.
pub(super) struct Yard {
    dir: tempfile::TempDir,
    pub(super) authority: CertifiedIssuer<'static, KeyPair>,
}

impl Yard {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority =
            CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
        let yard = Self { dir: tempfile::tempdir().expect("a folder"), authority };
        fs::write(yard.path("ca.pem"), yard.authority.pem()).expect("written");
        yard
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write_key(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("a mode");
        path
    }

    /// `NAME.pem` and `NAME.key`, for these names.
    fn files(&self, name: &str, names: &[&str]) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().expect("a key");
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let params = CertificateParams::new(names).expect("params");
        let certificate = params.signed_by(&key, &self.authority).expect("a certificate");
        let chain = self.path(&format!("{name}.pem"));
        fs::write(&chain, certificate.pem()).expect("written");
        (chain, self.write_key(&format!("{name}.key"), &key.serialize_pem()))
    }

    fn identity(&self, name: &str, names: &[&str]) -> Identity {
        let (chain, key) = self.files(name, names);
        Identity::read(&chain, &key).expect("an identity")
    }

    fn client(&self, identity: Option<Identity>) -> Arc<ClientConfig> {
        let options = ClientOptions { ca_files: vec![self.path("ca.pem")], identity, alpn: &[ALPN_SSH] };
        options.build().expect("a client")
    }

    fn acceptor(&self, clients: ClientPolicy) -> Acceptor {
        let identities = vec![self.identity("server", &["gateway.example.com"])];
        Acceptor::new(Certificates::new(identities).expect("one"), clients)
    }
}

type Outcome = (Result<Accepted<DuplexStream>, AcceptError>, Result<TlsStream<DuplexStream>, ConnectError>);

async fn shake(acceptor: &Acceptor, client: &Arc<ClientConfig>, name: &str) -> Outcome {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name: Host = name.parse().expect("a host");
    let accepting = async { acceptor.accept(near).await.map_err(|(error, _)| error) };
    tokio::join!(accepting, connect(client, &name, far))
}

#[tokio::test]
async fn both_ends_agree_on_what_is_inside_and_bytes_pass() {
    let yard = Yard::new();
    let (accepted, connected) =
        shake(&yard.acceptor(ClientPolicy::Off), &yard.client(None), "gateway.example.com").await;
    let (mut accepted, mut connected) = (accepted.expect("accepted"), connected.expect("connected"));
    assert_eq!(accepted.alpn.as_deref(), Some(ALPN_SSH));
    assert_eq!(connected.alpn(), Some(ALPN_SSH));
    assert_eq!(accepted.sni.as_deref(), Some("gateway.example.com"));
    assert_eq!(accepted.peer, None);
    let session = connected.session();
    assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let group = session.negotiated_key_exchange_group().expect("a group").name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768, "post-quantum where both ends know it");
    connected.write_all(b"SSH-2.0-x\r\n").await.expect("written");
    connected.shutdown().await.expect("ended");
    let mut read = String::new();
    accepted.stream.read_to_string(&mut read).await.expect("an end that was announced");
    assert_eq!(read, "SSH-2.0-x\r\n");
}

#[tokio::test]
async fn a_connection_that_was_cut_is_not_complete() {
    let yard = Yard::new();
    let (accepted, connected) =
        shake(&yard.acceptor(ClientPolicy::Off), &yard.client(None), "gateway.example.com").await;
    let mut connected = connected.expect("connected");
    connected.write_all(b"half").await.expect("written");
    connected.flush().await.expect("flushed");
    drop(connected);
    let error = accepted.expect("accepted").stream.read_to_end(&mut Vec::new()).await.expect_err("cut off");
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn a_client_refuses_other_names_and_authorities() {
    let (yard, other) = (Yard::new(), Yard::new());
    let acceptor = yard.acceptor(ClientPolicy::Off);
    let (accepted, connected) = shake(&acceptor, &yard.client(None), "other.example.com").await;
    let said = connected.expect_err("another name");
    assert!(
        matches!(&said, ConnectError::OtherName { presented } if presented.contains("gateway.example.com")),
        "{said:?}"
    );
    assert!(matches!(accepted, Err(AcceptError::Refused(_) | AcceptError::Closed)), "{accepted:?}");
    let (accepted, connected) = shake(&acceptor, &other.client(None), "gateway.example.com").await;
    // Whoever stands between is told by name.
    let said = connected.expect_err("another authority");
    assert!(matches!(&said, ConnectError::Untrusted { issuer } if issuer.contains("CN=")), "{said:?}");
    assert!(matches!(accepted, Err(AcceptError::Refused(_) | AcceptError::Closed)), "{accepted:?}");
}

#[tokio::test]
async fn a_certificate_is_picked_by_name_and_the_first_is_for_everybody_else() {
    let yard = Yard::new();
    let identities = vec![
        yard.identity("a", &["a.example.com", "10.1.2.3"]),
        yard.identity("b", &["*.b.example.com", "b.example.com"]),
    ];
    let acceptor = Acceptor::new(Certificates::new(identities).expect("two"), ClientPolicy::Off);
    for name in ["a.example.com", "b.example.com", "x.b.example.com", "10.1.2.3"] {
        let (accepted, connected) = shake(&acceptor, &yard.client(None), name).await;
        assert!(accepted.is_ok() && connected.is_ok(), "{name}: {connected:?}");
    }
    for name in ["c.example.com", "x.y.b.example.com"] {
        let (_, connected) = shake(&acceptor, &yard.client(None), name).await;
        assert!(matches!(connected, Err(ConnectError::OtherName { .. })), "{name}");
    }
}

#[derive(Debug)]
struct Verdict(Result<(), CertificateError>);

impl Gate for Verdict {
    fn admits(&self, _: &PeerChain, _: UnixTime) -> Result<(), CertificateError> {
        self.0.clone()
    }
}

#[tokio::test]
async fn a_client_is_asked_or_must_show_one_or_is_not_asked_at_all() {
    let yard = Yard::new();
    let shown = || Some(yard.identity("client", &["agent-7.example.com"]));
    let name = "gateway.example.com";
    let (accepted, _) = shake(&yard.acceptor(ClientPolicy::Off), &yard.client(shown()), name).await;
    assert_eq!(accepted.expect("accepted").peer, None);
    let (accepted, _) = shake(&yard.acceptor(ClientPolicy::Ask), &yard.client(None), name).await;
    assert_eq!(accepted.expect("accepted").peer, None);
    let (accepted, _) = shake(&yard.acceptor(ClientPolicy::Ask), &yard.client(shown()), name).await;
    assert_eq!(accepted.expect("accepted").peer.map(|peer| peer.certificates().len()), Some(1));

    let good = || ClientPolicy::Require(Arc::new(Verdict(Ok(()))));
    let (accepted, _) = shake(&yard.acceptor(good()), &yard.client(None), name).await;
    assert!(matches!(accepted, Err(AcceptError::NoCertificate)), "{accepted:?}");
    let (accepted, _) = shake(&yard.acceptor(good()), &yard.client(shown()), name).await;
    assert!(accepted.expect("accepted").peer.is_some());
    let bad = ClientPolicy::Require(Arc::new(Verdict(Err(CertificateError::Revoked))));
    let (accepted, connected) = shake(&yard.acceptor(bad), &yard.client(shown()), name).await;
    assert!(matches!(accepted, Err(AcceptError::Certificate(_))), "{accepted:?}");
    // It takes itself for connected until it reads.
    let error = connected.expect("half of it").read(&mut [0]).await.expect_err("an alert").to_string();
    assert!(error.contains("CertificateRevoked"), "{error}");
}

/// The certificate of one, the key of another: what somebody can do who has only seen a certificate.
#[tokio::test]
async fn a_certificate_without_its_key_is_worth_nothing() {
    let yard = Yard::new();
    let (theirs, own) = (yard.identity("theirs", &["agent-7"]), yard.identity("own", &["agent-8"]));
    let stolen = rustls::sign::CertifiedKey::new(theirs.certified().cert.clone(), own.certified().key.clone());
    let mut config = ClientConfig::clone(&yard.client(None));
    config.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(stolen));
    for policy in [ClientPolicy::Ask, ClientPolicy::Require(Arc::new(Verdict(Ok(()))))] {
        let (accepted, _) = shake(&yard.acceptor(policy), &Arc::new(config.clone()), "gateway.example.com").await;
        assert!(matches!(accepted, Err(AcceptError::Certificate(_) | AcceptError::Protocol(_))), "{accepted:?}");
    }
}

#[tokio::test]
async fn nothing_is_resumed() {
    let yard = Yard::new();
    let acceptor = yard.acceptor(ClientPolicy::Ask);
    let mut willing = ClientConfig::clone(&yard.client(Some(yard.identity("client", &["agent-7"]))));
    willing.resumption = rustls::client::Resumption::in_memory_sessions(8);
    let willing = Arc::new(willing);
    for _ in 0..3 {
        let (accepted, connected) = shake(&acceptor, &willing, "gateway.example.com").await;
        let (mut accepted, mut connected) = (accepted.expect("accepted"), connected.expect("connected"));
        accepted.stream.write_all(b"x").await.expect("written");
        accepted.stream.flush().await.expect("flushed");
        connected.read_exact(&mut [0]).await.expect("read");
        assert_eq!(connected.session().handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert!(accepted.peer.is_some());
    }
}

#[tokio::test]
async fn a_handshake_reads_no_more_than_its_bound() {
    let yard = Yard::new();
    let acceptor = yard.acceptor(ClientPolicy::Off);
    // A hello that says that it is long, in records that are not.
    let (near, mut far) = tokio::io::duplex(1024);
    let sending = async {
        let mut sent = 0;
        let mut record = vec![0x16, 3, 1, 0x04, 0];
        record.extend([1, 0, 0xff, 0]);
        record.resize(5 + 1024, 0);
        while far.write_all(&record).await.is_ok() {
            sent += record.len();
            record[5..].fill(0);
        }
        sent
    };
    let (accepted, sent) = tokio::join!(
        async {
            let (error, near) = acceptor.accept(near).await.expect_err("too long");
            drop(near);
            error
        },
        sending
    );
    assert!(matches!(accepted, AcceptError::Protocol(_)), "{accepted:?}");
    assert!(sent <= TLS_HANDSHAKE_BYTES + 4096, "{sent}");
}

#[tokio::test]
async fn what_is_not_tls_is_told_apart() {
    let yard = Yard::new();
    let (near, mut far) = tokio::io::duplex(1024);
    far.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("written");
    let (error, _) = yard.acceptor(ClientPolicy::Off).accept(near).await.expect_err("HTTP");
    assert!(matches!(error, AcceptError::Protocol(_)), "{error:?}");
    let (near, mut far) = tokio::io::duplex(16 * 1024);
    far.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.expect("written");
    let name = "gateway.example.com".parse().expect("a host");
    let error = connect(&yard.client(None), &name, near).await.expect_err("SSH");
    assert!(matches!(error, ConnectError::Protocol(_)), "{error:?}");
}

#[test]
fn pairs_that_do_not_fit_or_can_be_read_by_others_are_refused() {
    let yard = Yard::new();
    let ((chain, key), (other, _)) = (yard.files("one", &["a"]), yard.files("two", &["b"]));
    let read = |chain: &Path, key: &Path| Identity::read(chain, key).expect_err("refused");
    assert!(matches!(read(&other, &key), IdentityError::Mismatch { .. }));
    assert!(matches!(read(&yard.path("absent"), &key), IdentityError::Read { .. }));
    assert!(matches!(read(&chain, &yard.path("absent")), IdentityError::Read { .. }));
    assert!(matches!(read(&key, &key), IdentityError::NoCertificate(_)));
    assert!(matches!(read(&chain, &yard.write_key("no.key", "")), IdentityError::NoKey(_)));
    let text = fs::read_to_string(&key).expect("read");
    assert!(matches!(read(&chain, &yard.write_key("two.key", &text.repeat(2))), IdentityError::SeveralKeys(_)));
    let encrypted = text.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    assert!(matches!(read(&chain, &yard.write_key("enc.key", &encrypted)), IdentityError::Encrypted(_)));
    assert!(matches!(read(&chain, &yard.write_key("half.key", &text[..text.len() / 2])), IdentityError::Pem { .. }));
    let half = fs::read_to_string(&chain).expect("read");
    fs::write(yard.path("half.pem"), &half[..half.len() / 2]).expect("written");
    assert!(matches!(read(&yard.path("half.pem"), &key), IdentityError::Pem { .. }));
    fs::write(yard.path("many.pem"), half.repeat(TLS_CHAIN_MAX + 1)).expect("written");
    assert!(matches!(read(&yard.path("many.pem"), &key), IdentityError::TooMany(_)));
    fs::write(yard.path("bad.pem"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").expect("written");
    assert!(matches!(read(&yard.path("bad.pem"), &key), IdentityError::Certificate { number: 1, .. }));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).expect("a mode");
    let error = read(&chain, &key).to_string();
    assert!(error.contains("chmod 600"), "{error}");
}

#[test]
fn keys_of_each_kind_are_read_and_none_is_shown() {
    let yard = Yard::new();
    for algorithm in
        [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519, &PKCS_RSA_SHA256]
    {
        let key = KeyPair::generate_for(algorithm).expect("a key");
        let params = CertificateParams::new(vec!["a.example.com".to_owned()]).expect("params");
        let certificate = params.signed_by(&key, &yard.authority).expect("a certificate");
        fs::write(yard.path("a.pem"), certificate.pem() + &yard.authority.pem()).expect("written");
        let identity = Identity::read(&yard.path("a.pem"), &yard.write_key("a.key", &key.serialize_pem()));
        let identity = identity.expect("an identity");
        assert_eq!(format!("{identity:?}"), "Identity(2 certificates)");
        assert_eq!(identity, identity.clone());
    }
}

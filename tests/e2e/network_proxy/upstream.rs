//! Upstreams that speak TLS and demand certificates, authorities, and what can be read on a leg.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use caponier::target::Host;
use caponier::tls::{self, ClientOptions, Identity, TlsStream};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType, IsCa, KeyIdMethod,
    KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional, split};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use crate::harness::{listen, within};

/// What the upstream's certificate names.
pub(crate) const NAME: &str = "control.example.com";

const HOUR: Duration = Duration::from_secs(3600);

/// A CA.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a CA"))
    }

    /// Puts its certificate into a file.
    pub(crate) fn write(&self, file: &Path) {
        fs::write(file, self.0.pem()).expect("written");
    }

    /// Puts a certificate for `name`, with this serial number, into `FILE.pem`, and its key into `FILE.key`.
    pub(crate) fn issue(&self, folder: &Path, file: &str, name: &str, serial: u64) -> CertificateDer<'static> {
        self.issue_until(folder, file, name, serial, SystemTime::now() + HOUR)
    }

    pub(crate) fn issue_until(
        &self,
        folder: &Path,
        file: &str,
        name: &str,
        serial: u64,
        end: SystemTime,
    ) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from(serial));
        params.not_before = (end - 2 * HOUR).into();
        params.not_after = end.into();
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        // The key first, and both by renaming: whoever looks between the two sees a pair that does not fit, and looks again.
        let key_file = folder.join(format!("{file}.key"));
        let put = |path: &Path, text: &str| {
            let new = path.with_extension("new");
            fs::write(&new, text).expect("written");
            fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).expect("permissions");
            fs::rename(&new, path).expect("renamed");
        };
        put(&key_file, &key.serialize_pem());
        put(&folder.join(format!("{file}.pem")), &certificate.pem());
        certificate.der().clone()
    }

    /// Puts a list of what it has revoked into a file.
    pub(crate) fn revoke(&self, file: &Path, serials: &[u64]) {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: (SystemTime::now() - HOUR).into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: (SystemTime::now() - HOUR).into(),
            next_update: (SystemTime::now() + HOUR).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.0).expect("a list").pem().expect("PEM");
        let new = file.with_extension("new");
        fs::write(&new, list).expect("written");
        fs::rename(&new, file).expect("renamed");
    }
}

/// What an upstream does with a connection once TLS is spoken.
#[derive(Clone, Copy)]
pub(crate) enum Serves {
    /// Sends back what it gets.
    Echo,
    /// As that, to whoever agrees to speak HTTP/2 and to nobody else, as servers of gRPC are.
    Http2,
    /// Answers HTTP requests: with the head of the request, or on `/upload` with the length of the body, or on `/socket` with
    /// another protocol that sends back what it gets.
    Web,
}

/// A control plane.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    /// The certificates that clients have shown, in the order of their coming.
    pub(crate) shown: Arc<Mutex<Vec<Option<CertificateDer<'static>>>>>,
}

impl Upstream {
    /// One whose certificate is from `own`, and that demands certificates of `clients`, if given.
    pub(crate) async fn start(folder: &Path, own: &Authority, clients: Option<&Authority>, serves: Serves) -> Self {
        own.issue(folder, "upstream", NAME, 1);
        let chain =
            CertificateDer::pem_file_iter(folder.join("upstream.pem")).expect("PEM").map(|one| one.expect("PEM"));
        let key = PrivateKeyDer::from_pem_file(folder.join("upstream.key")).expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("versions");
        let builder = match clients {
            Some(clients) => {
                let mut roots = RootCertStore::empty();
                roots.add(clients.0.der().clone()).expect("a CA");
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
            }
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain.collect(), key).expect("a configuration");
        if matches!(serves, Serves::Http2) {
            config.alpn_protocols = vec![b"h2".to_vec()];
        }
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let shown: Arc<Mutex<Vec<_>>> = Arc::default();
        let showing = shown.clone();
        let address = listen(move |stream| {
            let (acceptor, showing) = (acceptor.clone(), showing.clone());
            async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let own = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).cloned();
                showing.lock().expect("no panic").push(own.map(CertificateDer::into_owned));
                match serves {
                    Serves::Echo => echo(stream).await,
                    Serves::Http2 if stream.get_ref().1.alpn_protocol().is_none() => {}
                    Serves::Http2 => echo(stream).await,
                    Serves::Web => web(stream).await,
                }
            }
        })
        .await;
        Self { address, shown }
    }

    pub(crate) fn shown(&self) -> Vec<Option<CertificateDer<'static>>> {
        self.shown.lock().expect("no panic").clone()
    }
}

async fn echo(stream: impl AsyncRead + AsyncWrite) {
    let (mut read, mut write) = split(stream);
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = read.read(&mut bytes).await {
        if write.write_all(&bytes[..count]).await.is_err() || write.flush().await.is_err() {
            return;
        }
    }
    drop(write.shutdown().await);
}

async fn web(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        let head = String::from_utf8(head).expect("UTF-8");
        let header = |name: &str| {
            let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let reply = if head.contains(" /socket ") && head.to_ascii_lowercase().contains("upgrade: websocket") {
            let reply = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX-Kept: 1\r\n\r\nfirst";
            drop(stream.write_all(reply.as_bytes()).await);
            drop(stream.flush().await);
            return echo(stream).await;
        } else if head.contains(" /upload ") {
            let mut length = 0;
            if let Some(whole) = header("content-length:") {
                let mut body = vec![0; whole.parse().expect("a length")];
                stream.read_exact(&mut body).await.expect("a body");
                length = body.len();
            } else {
                // Chunks: lengths in hexadecimal, each followed by so much and an end of line.
                loop {
                    let mut line = Vec::new();
                    while !line.ends_with(b"\r\n") {
                        line.push(stream.read_u8().await.expect("a chunk"));
                    }
                    let size = usize::from_str_radix(String::from_utf8_lossy(&line).trim(), 16).expect("a size");
                    let mut chunk = vec![0; size + 2];
                    stream.read_exact(&mut chunk).await.expect("a chunk");
                    length += size;
                    if size == 0 {
                        break;
                    }
                }
            }
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{length}", length.to_string().len())
        } else {
            let close = if head.contains(" /last ") { "Connection: close\r\n" } else { "" };
            format!("HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\n{close}Content-Length: {}\r\n\r\n{head}", head.len())
        };
        if stream.write_all(reply.as_bytes()).await.is_err()
            || stream.flush().await.is_err()
            || reply.contains("close\r\n")
        {
            drop(stream.shutdown().await);
            return;
        }
    }
}

/// A leg on which somebody listens in.
#[derive(Clone)]
pub(crate) struct Tap {
    pub(crate) address: SocketAddr,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Tap {
    /// Whoever connects here is led to `to`, and all that is said either way is written down.
    pub(crate) async fn before(to: SocketAddr) -> Self {
        let heard: Arc<Mutex<Vec<u8>>> = Arc::default();
        let hearing = heard.clone();
        let address = listen(move |near| {
            let hearing = hearing.clone();
            async move {
                let Ok(far) = TcpStream::connect(to).await else { return };
                let mut near = Listening { stream: near, heard: hearing };
                let mut far = far;
                drop(copy_bidirectional(&mut near, &mut far).await);
            }
        })
        .await;
        Self { address, heard }
    }

    /// Whether this was said in clear.
    pub(crate) fn heard(&self, words: &[u8]) -> bool {
        self.heard.lock().expect("no panic").windows(words.len()).any(|window| window == words)
    }

    /// How much was said.
    pub(crate) fn length(&self) -> usize {
        self.heard.lock().expect("no panic").len()
    }
}

struct Listening {
    stream: TcpStream,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl AsyncRead for Listening {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        std::task::ready!(std::pin::Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.heard.lock().expect("no panic").extend_from_slice(&buf.filled()[before..]);
        std::task::Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Listening {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        let written = std::task::ready!(std::pin::Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.heard.lock().expect("no panic").extend_from_slice(&bytes[..written]);
        std::task::Poll::Ready(Ok(written))
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Speaks TLS over a connection, as a client who trusts `ca.pem` in `folder` and shows `identity` there, if given.
pub(crate) async fn shake(
    folder: &Path,
    ca: &str,
    identity: Option<&str>,
    name: &str,
    stream: TcpStream,
) -> Result<TlsStream<TcpStream>, tls::ConnectError> {
    shake_for(&[], folder, ca, identity, name, stream).await
}

/// As [`shake`], to speak one of these inside.
pub(crate) async fn shake_for(
    alpn: &'static [&'static [u8]],
    folder: &Path,
    ca: &str,
    identity: Option<&str>,
    name: &str,
    stream: TcpStream,
) -> Result<TlsStream<TcpStream>, tls::ConnectError> {
    let identity = identity.map(|file| {
        let at = |end: &str| folder.join(format!("{file}.{end}"));
        Identity::read(&at("pem"), &at("key")).expect("an identity")
    });
    let config = ClientOptions { ca_files: vec![folder.join(ca)], identity, alpn }.build().expect("a configuration");
    let name: Host = name.parse().expect("a host");
    within("a handshake", tls::connect(&config, &name, stream)).await
}

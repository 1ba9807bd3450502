use std::path::{Path, PathBuf};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::chain::Chain;
use crate::task::Tasks;
use crate::tls::{Acceptor, Certificates, ClientPolicy, Identity};
use crate::tunnel::stream::Layer;
use crate::tunnel::websocket::Upgrade;

/// An authority's certificate in `NAME.pem`, and a server's of it for `host`.
fn authority(dir: &Path, name: &str, host: &str) -> (PathBuf, Identity) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    use std::os::unix::fs::PermissionsExt;
    let mut params = CertificateParams::new(Vec::new()).expect("params");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
    let file = dir.join(format!("{name}.pem"));
    std::fs::write(&file, authority.pem()).expect("written");
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec![host.to_owned()]).expect("params");
    let certificate = params.signed_by(&key, &authority).expect("a certificate");
    let (chain, secret) = (dir.join("server.pem"), dir.join("server.key"));
    std::fs::write(&chain, certificate.pem()).expect("written");
    std::fs::write(&secret, key.serialize_pem()).expect("written");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).expect("a mode");
    (file, Identity::read(&chain, &secret).expect("an identity"))
}

fn way(ca_file: Option<&Path>) -> Way {
    let options =
        ClientOptions { ca_files: ca_file.map(Path::to_owned).into_iter().collect(), ..ClientOptions::default() };
    Way { egress: Egress::default(), tls: Some(Tls::new(options).expect("authorities")) }
}

/// Each connection is given to `serve`.
async fn listen<F, Fut>(tasks: &Tasks, serve: F) -> u16
where
    F: Fn(TcpStream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = listener.local_addr().expect("an address").port();
    tasks.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            serve(stream).await;
        }
    });
    port
}

/// Accepts a WebSocket as a gateway does, and says something at once.
async fn upgrade(mut stream: impl Layer) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await.expect("read"));
    }
    let request = String::from_utf8(request).expect("text");
    let headers: Vec<_> = request.lines().filter_map(|line| line.split_once(": ")).collect();
    let header =
        |name: &str| headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name)).map(|(_, value)| *value);
    let upgrade = Upgrade::of(header).expect("a request");
    answer(upgrade.accept(stream, Bytes::new()).await.expect("accepted")).await;
}

async fn answer(mut stream: impl Layer) {
    stream.write_all(b"hello ").await.expect("written");
    stream.flush().await.expect("flushed");
    let mut word = [0; 5];
    stream.read_exact(&mut word).await.expect("read");
    stream.write_all(&word).await.expect("written");
    stream.shutdown().await.expect("shut down");
}

#[tokio::test]
async fn each_transport_carries_bytes_and_has_its_socket() {
    let dir = tempfile::tempdir().expect("a folder");
    let (ca, identity) = authority(dir.path(), "ours", "127.0.0.1");
    let acceptor = Acceptor::new(Certificates::new(vec![identity]).expect("one"), ClientPolicy::Off);
    let tasks = Tasks::new();
    for scheme in ["ssh", "tls", "wss", "ws"] {
        let acceptor = acceptor.clone();
        let port = listen(&tasks, move |stream| {
            let acceptor = acceptor.clone();
            async move {
                let secured = async |stream, alpn: &[u8]| {
                    let accepted = acceptor.accept(stream).await.map_err(|(error, _)| error).expect("accepted");
                    assert_eq!(accepted.alpn.as_deref(), Some(alpn));
                    accepted.stream
                };
                match scheme {
                    "ssh" => answer(stream).await,
                    "ws" => upgrade(stream).await,
                    "tls" => answer(secured(stream, tls::ALPN_SSH).await).await,
                    _ => upgrade(secured(stream, tls::ALPN_HTTP).await).await,
                }
            }
        })
        .await;
        let url: GatewayUrl = format!("{scheme}://127.0.0.1:{port}").parse().expect("a gateway");
        let Dialled { mut stream, head } = dial(&url, &way(Some(&ca)), |_| ()).await.expect(scheme);
        assert!(stream.socket().is_some() && head.is_empty(), "{scheme}");
        stream.write_all(b"world").await.expect("written");
        stream.flush().await.expect("flushed");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("read to an orderly end");
        assert_eq!(all, b"hello world", "{scheme}");
    }
}

/// One way to fail at a time, with what the text must say.
#[tokio::test]
async fn each_stage_that_fails_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().expect("a folder");
    let (ours, identity) = authority(dir.path(), "ours", "127.0.0.1");
    let (_, inspecting) = authority(dir.path(), "Inspecting Proxy CA", "127.0.0.1");
    let (theirs, other) = authority(dir.path(), "theirs", "other.example.com");
    let acceptor =
        |identity: &Identity| Acceptor::new(Certificates::new(vec![identity.clone()]).expect("one"), ClientPolicy::Off);
    let tasks = Tasks::new();
    let tls = async |identity: &Identity| {
        let acceptor = acceptor(identity);
        listen(&tasks, move |stream| {
            let acceptor = acceptor.clone();
            async move { drop(acceptor.accept(stream).await) }
        })
        .await
    };
    let says = async |words: &'static [u8]| {
        listen(&tasks, move |mut stream: TcpStream| async move {
            drop(stream.read(&mut [0; 1024]).await);
            drop(stream.write_all(words).await);
            drop(stream.shutdown().await);
            drop(stream.read(&mut [0; 1024]).await);
        })
        .await
    };
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        listener.local_addr().expect("an address").port()
    };
    for (scheme, port, ca, expected) in [
        ("tls", nobody, &ours, vec!["could not connect to gateway"]),
        (
            "tls",
            tls(&inspecting).await,
            &ours,
            vec![
                "could not make TLS with gateway",
                "Inspecting Proxy CA",
                "add it to the file in tls_ca_file",
                "network team",
            ],
        ),
        ("wss", tls(&other).await, &theirs, vec!["other.example.com", "its names in the place of 127.0.0.1"]),
        ("tls", says(b"SSH-2.0-OpenSSH_9.2\r\n").await, &ours, vec!["could not make TLS", "does not speak TLS"]),
        ("tls", says(b"").await, &ours, vec!["breaks off where TLS begins", "network team"]),
        (
            "wss",
            tls(&identity).await,
            &ours,
            vec!["closed the connection, or it failed, before its reply to the WebSocket"],
        ),
        ("ws", says(b"HTTP/1.1 403 Forbidden\r\n\r\n").await, &ours, vec!["HTTP status 403", "inspecting proxy"]),
        (
            "ws",
            says(b"HTTP/1.1 502 Bad Gateway\r\n\r\n").await,
            &ours,
            vec!["HTTP status 502", "does not reach the gateway"],
        ),
        ("ws", says(b"SSH-2.0-x\r\n").await, &ours, vec!["not an HTTP reply"]),
    ] {
        let url: GatewayUrl = format!("{scheme}://127.0.0.1:{port}").parse().expect("a gateway");
        let error = dial(&url, &way(Some(ca)), |_| ()).await.expect_err(expected[0]);
        let text = Chain(&error).to_string();
        for words in expected {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}

//! What `ssh -L` is to the SSH door, for the CONNECT door: a local listener whose connections each go to one target, over
//! TLS and with a token. For `scripts/bench`, so that both parties have a client that encrypts.
//!
//! ```text
//! proxied PORT GATEWAY TARGET CA.pem     listens on 127.0.0.1:PORT, with the signed URL's token in the variable TOKEN
//! ```

use std::error::Error;
use std::fs::File;
use std::io::{self, BufReader};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

/// What one read carries at most: as much as the load writes at once.
const BUFFER: usize = 256 * 1024;

#[tokio::main(flavor = "current_thread")]
#[expect(clippy::disallowed_methods, reason = "a load, which ends by being killed")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [port, gateway, target, authority] = &arguments[..] else {
        return Err("usage: proxied PORT GATEWAY TARGET CA.pem".into());
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_reader_iter(BufReader::new(File::open(authority)?)) {
        roots.add(certificate?)?;
    }
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    let token = std::env::var("TOKEN")?;
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: Bearer {token}\r\n\r\n");
    let listener = TcpListener::bind(("127.0.0.1", port.parse()?)).await?;
    loop {
        let (near, _) = listener.accept().await?;
        let (connector, gateway, request) = (connector.clone(), gateway.clone(), request.clone());
        tokio::spawn(async move {
            // What goes wrong with one connection shows at its other end.
            if let Err(error) = carry(near, &connector, &gateway, &request).await {
                eprintln!("proxied: {error}");
            }
        });
    }
}

async fn carry(mut near: TcpStream, connector: &TlsConnector, gateway: &str, request: &str) -> io::Result<()> {
    let far = TcpStream::connect(gateway).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
    let mut far = connector.connect(name, far).await?;
    far.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(far.read_u8().await?);
    }
    if !head.starts_with(b"HTTP/1.1 200 ") {
        return Err(io::Error::other(String::from_utf8_lossy(&head).into_owned()));
    }
    copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER, BUFFER).await.map(drop)
}

//! Reaching the other end over TCP, through a proxy if need be: HTTP CONNECT in clear or within TLS, or SOCKS5.
//!
//! Promised: every step has a deadline and an error that names the step and says what to do; what the other end says first
//! is not lost, whatever it comes with; a proxy's certificate is verified against the proxy's own name and authorities, and
//! never stands in for that of who is reached through it; credentials appear in no error and no `Debug`.

pub mod bypass;
pub mod http_proxy;
pub mod proxy;
pub mod socks;
pub mod url;

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use self::bypass::Bypass;
use self::http_proxy::HttpProxyError;
use self::proxy::{Proxy, Scheme};
use self::socks::SocksError;
use crate::limits;
use crate::resolve;
use crate::target::{Host, Target};
use crate::tls::{self, ClientOptions, TlsError};
use crate::tunnel::stream::Stream;

/// How whoever dials leaves its network: directly, or through a proxy, except where that is not wanted. The default is
/// directly. Two are equal if a dial would go the same way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Egress {
    proxy: Option<Proxy>,
    no_proxy: Bypass,
    proxy_tls: Option<ProxyTls>,
}

/// How a proxy's certificate is judged.
#[derive(Clone)]
struct ProxyTls {
    config: Arc<tls::ClientConfig>,
    /// The authorities that count, as they were read; the system's, if there are none.
    authorities: Option<Arc<[u8]>>,
}

impl PartialEq for ProxyTls {
    fn eq(&self, other: &Self) -> bool {
        self.authorities == other.authorities
    }
}

impl Eq for ProxyTls {}

impl fmt::Debug for ProxyTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.authorities.is_some() {
            "ProxyTls(a file's authorities)"
        } else {
            "ProxyTls(the system's)"
        })
    }
}

impl Egress {
    /// Through `proxy`, if there is one, but for what `no_proxy` holds. Where the proxy is one of `https://`, its certificate
    /// must come from an authority in `ca_file`, or without a file from one of the system's; otherwise none is read.
    ///
    /// # Errors
    /// If the authorities cannot be read, or there are none.
    pub fn new(proxy: Option<Proxy>, no_proxy: Bypass, ca_file: Option<&Path>) -> Result<Self, TlsError> {
        let secured = proxy.as_ref().is_some_and(|proxy| proxy.scheme == Scheme::Https);
        let proxy_tls = if secured {
            let ca_files = ca_file.map(Path::to_owned).into_iter().collect();
            let config = ClientOptions { ca_files, identity: None, alpn: &[tls::ALPN_HTTP] }.build()?;
            let read = |path: &Path| {
                fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source }).map(Arc::from)
            };
            Some(ProxyTls { config, authorities: ca_file.map(read).transpose()? })
        } else {
            None
        };
        Ok(Self { proxy, no_proxy, proxy_tls })
    }

    /// The proxy, if there is one.
    #[must_use]
    pub fn proxy(&self) -> Option<&Proxy> {
        self.proxy.as_ref()
    }

    /// The proxy through which `to` is reached; none where it is reached directly.
    #[must_use]
    pub fn proxy_to(&self, to: &Target) -> Option<&Proxy> {
        self.proxy.as_ref().filter(|_| !self.no_proxy.holds(to))
    }
}

/// Why the other end could not be reached, by stage.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Name resolution.
    #[error("could not resolve {what} {host}")]
    Resolve {
        /// The gateway or the proxy.
        what: &'static str,
        /// Its name.
        host: Host,
        /// Why.
        #[source]
        source: resolve::ResolveError,
    },
    /// The TCP connection.
    #[error("could not connect to {what} {endpoint}; is it running, and does a firewall let this host reach it?")]
    Tcp {
        /// The gateway or the proxy.
        what: &'static str,
        /// Where.
        endpoint: Target,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// TLS with the proxy.
    #[error("could not make TLS with proxy {proxy}; {}", advice(source, proxy, *own))]
    ProxyTls {
        /// The proxy.
        proxy: Target,
        /// Whether it has authorities of its own.
        own: bool,
        /// Why.
        #[source]
        source: tls::ConnectError,
    },
    /// The proxy did not answer.
    #[error("proxy {proxy} {stage} {to} for {} s", limits::PROXY_TIMEOUT.as_secs())]
    ProxySilent {
        /// The proxy.
        proxy: Target,
        /// What it has not done.
        stage: &'static str,
        /// The gateway.
        to: Target,
    },
    /// An HTTP proxy said no, or nothing of use.
    #[error("proxy {proxy} made no tunnel to {to}")]
    HttpProxy {
        /// The proxy.
        proxy: Target,
        /// The gateway.
        to: Target,
        /// Why.
        #[source]
        source: HttpProxyError,
    },
    /// A SOCKS5 proxy said no, or nothing of use.
    #[error("proxy {proxy} made no connection to {to}")]
    SocksProxy {
        /// The proxy.
        proxy: Target,
        /// The gateway.
        to: Target,
        /// Why.
        #[source]
        source: SocksError,
    },
}

/// What somebody can do about a proxy with which there is no TLS.
fn advice(error: &tls::ConnectError, proxy: &Target, own: bool) -> String {
    match error {
        tls::ConnectError::Untrusted { .. } => {
            let named = if own { "add it to the file in proxy_ca_file" } else { "name its file in proxy_ca_file" };
            format!("if that is the proxy's own authority, {named}; ask the network's operators for it")
        }
        tls::ConnectError::OtherName { .. } => {
            format!(
                "either the proxy's URL should have one of its names in the place of {}, or another host answers there",
                proxy.host
            )
        }
        tls::ConnectError::Certificate(_) => {
            "ask its operators to look at its certificate, and see that this host's clock is right".to_owned()
        }
        tls::ConnectError::Refused(_) => "it says why in an alert; ask its operators".to_owned(),
        tls::ConnectError::Protocol(_) | tls::ConnectError::Closed | tls::ConnectError::Io(_) => {
            "is it a proxy of https://? Most are of http://".to_owned()
        }
        tls::ConnectError::Name => "write its host by the name that stands in its certificate".to_owned(),
    }
}

/// A connection to the other end.
#[derive(Debug)]
pub struct Connection {
    /// The connection.
    pub stream: Stream,
    /// What the other end has said already.
    pub head: Bytes,
}

/// Connects to `to`, the way that `egress` has for it. Before anything is dialled, `resolved` is told every address of the
/// host that is to be: the gateway's, or the proxy's.
///
/// # Errors
/// If any stage fails or exceeds its time; see [`ConnectError`].
pub async fn connect(
    to: &Target,
    egress: &Egress,
    resolved: impl FnOnce(&[SocketAddr]),
) -> Result<Connection, ConnectError> {
    let Some(proxy) = egress.proxy_to(to) else {
        return Ok(Connection { stream: tcp("gateway", to, resolved).await?.into(), head: Bytes::new() });
    };
    let endpoint = || proxy.endpoint.clone();
    let mut stream = Stream::from(tcp("proxy", &proxy.endpoint, resolved).await?);
    let deadline = Instant::now() + limits::PROXY_TIMEOUT;
    let silent = |stage| ConnectError::ProxySilent { proxy: endpoint(), stage, to: to.clone() };
    if let (Scheme::Https, Some(tls)) = (proxy.scheme, &egress.proxy_tls) {
        let shaken = timeout_at(deadline, tls::connect(&tls.config, &proxy.endpoint.host, stream)).await;
        let shaken = shaken
            .map_err(|_| silent("has not finished the TLS handshake (is it a proxy of https://?) on the way to"))?;
        let own = tls.authorities.is_some();
        let shaken = shaken.map_err(|source| ConnectError::ProxyTls { proxy: endpoint(), own, source })?;
        stream = Stream::layered(shaken);
    }
    let credentials = proxy.credentials.as_ref();
    let head = if proxy.scheme == Scheme::Socks5 {
        let asked = timeout_at(deadline, socks::ask(&mut stream, to, credentials)).await;
        let asked = asked.map_err(|_| silent("has not answered (is it a SOCKS5 proxy?) the request for"))?;
        asked.map_err(|source| ConnectError::SocksProxy { proxy: endpoint(), to: to.clone(), source })?;
        Bytes::new()
    } else {
        let asked = timeout_at(deadline, http_proxy::ask(&mut stream, to, credentials)).await;
        let asked = asked.map_err(|_| silent("has not answered CONNECT"))?;
        asked.map_err(|source| ConnectError::HttpProxy { proxy: endpoint(), to: to.clone(), source })?
    };
    Ok(Connection { stream, head })
}

pub(super) async fn tcp(
    what: &'static str,
    to: &Target,
    resolved: impl FnOnce(&[SocketAddr]),
) -> Result<TcpStream, ConnectError> {
    let addresses = match &to.host {
        Host::Address(address) => vec![*address],
        Host::Name(name) => resolve::lookup(name).await.map_err(|source| ConnectError::Resolve {
            what,
            host: to.host.clone(),
            source,
        })?,
    };
    let addresses: Vec<_> = addresses.into_iter().map(|address| SocketAddr::new(address, to.port)).collect();
    resolved(&addresses);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match dial(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(ConnectError::Tcp { what, endpoint: to.clone(), source: last })
}

/// Connects to one address under [`limits::CONNECT_TIMEOUT`], with small writes sent at once. A peer that vanishes without a
/// word is noticed, also where neither side has anything to say.
///
/// # Errors
/// If the connection is refused or takes too long.
pub async fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = timeout(limits::CONNECT_TIMEOUT, TcpStream::connect(address)).await.map_err(|_| {
        io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", secs(limits::CONNECT_TIMEOUT)))
    })??;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, limits::PROBE_AFTER)?;
    sockopt::set_tcp_keepintvl(&stream, limits::PROBE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&stream, limits::PROBES)?;
    Ok(stream)
}

fn secs(duration: Duration) -> u64 {
    duration.as_secs()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::chain::Chain;
    use crate::task::Tasks;

    fn through(url: &str) -> Egress {
        Egress::new(Some(url.parse().expect(url)), Bypass::default(), None).expect("a way out")
    }

    fn gateway() -> Target {
        "gateway:443".parse().expect("a target")
    }

    /// A proxy that reads something and then says `reply` and closes.
    async fn proxy_that_says(reply: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        Tasks::new().spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let mut request = [0; 1024];
            assert_ne!(stream.read(&mut request).await.expect("read"), 0);
            stream.write_all(reply).await.expect("written");
        });
        address
    }

    #[tokio::test]
    async fn an_error_names_the_proxy_the_gateway_and_the_stage_and_no_password() {
        for (scheme, reply, says) in [
            (
                "http",
                &b"HTTP/1.1 407 No\r\n\r\n"[..],
                "made no tunnel to gateway:443: it answered CONNECT with status 407",
            ),
            ("http", b"", "made no tunnel to gateway:443: it closed the connection"),
            ("socks5", b"\x05\xff", "made no connection to gateway:443: it takes neither"),
        ] {
            let address = proxy_that_says(reply).await;
            let egress = through(&format!("{scheme}://ali:open%20sesame@{address}"));
            let error = connect(&gateway(), &egress, |_| ()).await.expect_err("refused");
            let text = format!("{} {error:?} {egress:?}", Chain(&error));
            assert!(text.contains(&format!("proxy {address} {says}")), "{text}");
            assert!(!text.contains("sesame") && !text.contains("ali"), "{text}");
        }
    }

    #[tokio::test]
    async fn what_follows_the_reply_is_in_the_connection() {
        let address = proxy_that_says(b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nSSH-2.0-x\r\n").await;
        let connected = connect(&gateway(), &through(&format!("http://{address}")), |_| ()).await;
        let mut connection = connected.expect("connected");
        let mut all = connection.head.to_vec();
        connection.stream.read_to_end(&mut all).await.expect("read");
        assert_eq!(all, b"SSH-2.0-x\r\n");
    }

    #[tokio::test]
    async fn every_address_is_told_although_none_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let closed: Target = format!("localhost:{port}").parse().expect("a target");
        let proxy = through(&format!("http://{closed}"));
        let mut bypassed = through("http://192.0.2.1:1");
        bypassed.no_proxy = "localhost".parse().expect("a list");
        for (to, egress) in [(&closed, &Egress::default()), (&gateway(), &proxy), (&closed, &bypassed)] {
            let mut told = Vec::new();
            assert!(connect(to, egress, |addresses| told.extend_from_slice(addresses)).await.is_err());
            assert!(told.contains(&SocketAddr::from(([127, 0, 0, 1], port))), "{told:?}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_vanishes_is_probed_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let stream = dial(listener.local_addr().expect("an address")).await.expect("connected");
        assert!(sockopt::socket_keepalive(&stream).expect("an option"));
        assert_eq!(sockopt::tcp_keepidle(&stream).expect("an option"), limits::PROBE_AFTER);
    }
}

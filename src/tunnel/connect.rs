//! Reaching the other end over TCP, through an HTTP CONNECT proxy if need be (RFC 9110 §9.3.6).
//!
//! Promised: every step has a deadline and an error that names the step; the proxy's reply is read up to its end and not a
//! byte further is lost (SSH servers speak first, so what follows the reply in the same segment belongs to the tunnel);
//! credentials appear in no error and no `Debug`.

pub mod url;

use std::io;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use base64::Engine;
use bytes::{Bytes, BytesMut};
use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::limits;
use crate::resolve;
use crate::secret::Secret;
use crate::target::{Host, Target};
use crate::tunnel::stream::Stream;

/// An HTTP proxy: `http://[USER:PASSWORD@]HOST:PORT`. `Debug` shows no credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Where it listens.
    pub endpoint: Target,
    /// What it wants to know first.
    pub credentials: Option<Credentials>,
}

/// A user name and password for Basic authentication (RFC 7617).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    user: Secret<String>,
    password: Secret<String>,
}

/// Why a text is no URL of the kind wanted. It is never repeated: it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not `http://`.
    #[error("a proxy is written http://[USER:PASSWORD@]HOST:PORT; other schemes are not supported in this version")]
    ProxyScheme,
    /// Path, query, or user information where none belongs.
    #[error("nothing may follow the port, and user information belongs to proxies alone")]
    Extra,
    /// The host or the port.
    #[error("the host or port is not well formed")]
    Endpoint(#[source] crate::target::TargetError),
    /// The user information.
    #[error(
        "the credentials must be USER:PASSWORD, percent-encoded where they hold special characters, without control characters"
    )]
    Credentials,
}

impl FromStr for Proxy {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let rest = text.strip_prefix("http://").ok_or(UrlError::ProxyScheme)?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, endpoint) = match rest.rsplit_once('@') {
            Some((userinfo, endpoint)) => {
                let (user, password) = userinfo.split_once(':').ok_or(UrlError::Credentials)?;
                (Some(Credentials::new(percent_decode(user)?, percent_decode(password)?)?), endpoint)
            }
            None => (None, rest),
        };
        if endpoint.contains(['/', '?', '#']) {
            return Err(UrlError::Extra);
        }
        Ok(Self { endpoint: endpoint.parse().map_err(UrlError::Endpoint)?, credentials })
    }
}

impl Credentials {
    /// Checks a user name and a password.
    ///
    /// # Errors
    /// If the name is empty or holds a colon, or either holds a control character (RFC 7617 §2).
    pub fn new(user: String, password: String) -> Result<Self, UrlError> {
        let (user, password) = (Secret::new(user), Secret::new(password));
        let unfit = user.expose().is_empty()
            || user.expose().contains(':')
            || [&user, &password].iter().any(|text| text.expose().chars().any(char::is_control));
        if unfit { Err(UrlError::Credentials) } else { Ok(Self { user, password }) }
    }

    /// Reads `USER:PASSWORD`, as a credentials file holds it; nothing is decoded.
    ///
    /// # Errors
    /// As [`Credentials::new`].
    pub fn from_line(line: &str) -> Result<Self, UrlError> {
        let (user, password) = line.trim_end_matches(['\r', '\n']).split_once(':').ok_or(UrlError::Credentials)?;
        Self::new(user.to_owned(), password.to_owned())
    }

    fn header(&self) -> Secret<String> {
        let pair = Secret::new(format!("{}:{}", self.user.expose(), self.password.expose()));
        Secret::new(base64::engine::general_purpose::STANDARD.encode(pair.expose()))
    }
}

fn percent_decode(text: &str) -> Result<String, UrlError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()).ok_or(UrlError::Credentials)?;
        if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(UrlError::Credentials);
        }
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| UrlError::Credentials)?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| UrlError::Credentials)
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
    /// The proxy broke off while we spoke to it.
    #[error("proxy {proxy} closed the connection, or it failed, before its reply to CONNECT {to} was complete")]
    ProxyBroke {
        /// The proxy.
        proxy: Target,
        /// The gateway.
        to: Target,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The proxy did not answer.
    #[error("proxy {proxy} has not answered CONNECT {to} for {} s", limits::PROXY_TIMEOUT.as_secs())]
    ProxySilent {
        /// The proxy.
        proxy: Target,
        /// The gateway.
        to: Target,
    },
    /// The reply is not HTTP, or too long.
    #[error("proxy {proxy} answered CONNECT {to} with something that is not an HTTP reply; is it an HTTP proxy?")]
    ProxyReply {
        /// The proxy.
        proxy: Target,
        /// The gateway.
        to: Target,
    },
    /// The proxy wants other credentials.
    #[error("proxy {proxy} answered CONNECT {to} with status 407: {}", match sent {
        true => "it did not accept the credentials given; check them",
        false => "it asks for credentials, and none are configured",
    })]
    ProxyAuthentication {
        /// The proxy.
        proxy: Target,
        /// The gateway.
        to: Target,
        /// Whether credentials were sent.
        sent: bool,
    },
    /// The proxy said no.
    #[error(
        "proxy {proxy} refused CONNECT {to} with status {status} {reason}; ask its operators to permit this host and port"
    )]
    ProxyRefused {
        /// The proxy.
        proxy: Target,
        /// The gateway.
        to: Target,
        /// The status code.
        status: u16,
        /// The reason phrase, printable ASCII only.
        reason: String,
    },
}

/// A connection to the other end.
#[derive(Debug)]
pub struct Connection {
    /// The connection.
    pub stream: Stream,
    /// What the other end has said already.
    pub head: Bytes,
}

/// Connects to `to`, directly or through `proxy`. Before anything is dialled, `resolved` is told every address of the host
/// that is to be: the gateway's, or the proxy's.
///
/// # Errors
/// If any stage fails or exceeds its time; see [`ConnectError`].
pub async fn connect(
    to: &Target,
    proxy: Option<&Proxy>,
    resolved: impl FnOnce(&[SocketAddr]),
) -> Result<Connection, ConnectError> {
    let Some(proxy) = proxy else {
        return Ok(Connection { stream: tcp("gateway", to, resolved).await?.into(), head: Bytes::new() });
    };
    let mut stream = tcp("proxy", &proxy.endpoint, resolved).await?;
    let head = timeout(limits::PROXY_TIMEOUT, tunnel(&mut stream, to, proxy))
        .await
        .map_err(|_| ConnectError::ProxySilent { proxy: proxy.endpoint.clone(), to: to.clone() })??;
    Ok(Connection { stream: stream.into(), head })
}

async fn tcp(what: &'static str, to: &Target, resolved: impl FnOnce(&[SocketAddr])) -> Result<TcpStream, ConnectError> {
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

async fn tunnel(stream: &mut TcpStream, to: &Target, proxy: &Proxy) -> Result<Bytes, ConnectError> {
    let broke = |source| ConnectError::ProxyBroke { proxy: proxy.endpoint.clone(), to: to.clone(), source };
    let odd = || ConnectError::ProxyReply { proxy: proxy.endpoint.clone(), to: to.clone() };
    let mut request = Secret::new(format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n"));
    if let Some(credentials) = &proxy.credentials {
        let header = credentials.header();
        request = Secret::new(format!("{}Proxy-Authorization: Basic {}\r\n", request.expose(), header.expose()));
    }
    request = Secret::new(format!("{}\r\n", request.expose()));
    stream.write_all(request.expose().as_bytes()).await.map_err(broke)?;

    let mut reply = BytesMut::with_capacity(1024);
    let end = loop {
        if let Some(end) = head_end(&reply) {
            break end;
        }
        // Not HTTP: no need to wait for more of it.
        if reply.len() >= 5 && !reply.starts_with(b"HTTP/") || reply.len() > limits::CONNECT_REPLY_MAX {
            return Err(odd());
        }
        if stream.read_buf(&mut reply).await.map_err(broke)? == 0 {
            return Err(broke(io::ErrorKind::UnexpectedEof.into()));
        }
    };
    let head = reply.split_to(end);
    let (status, reason) = status(&head).ok_or_else(odd)?;
    match status {
        200..=299 => Ok(reply.freeze()),
        407 => Err(ConnectError::ProxyAuthentication {
            proxy: proxy.endpoint.clone(),
            to: to.clone(),
            sent: proxy.credentials.is_some(),
        }),
        _ => Err(ConnectError::ProxyRefused { proxy: proxy.endpoint.clone(), to: to.clone(), status, reason }),
    }
}

/// Where the reply's head ends: after the empty line.
fn head_end(reply: &[u8]) -> Option<usize> {
    reply.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

fn status(head: &[u8]) -> Option<(u16, String)> {
    let line = head.split(|byte| *byte == b'\r').next()?;
    let line = std::str::from_utf8(line).ok()?;
    let rest = line.strip_prefix("HTTP/1.1 ").or_else(|| line.strip_prefix("HTTP/1.0 "))?;
    let (code, reason) = rest.split_at_checked(3)?;
    if !code.bytes().all(|byte| byte.is_ascii_digit()) || !(reason.is_empty() || reason.starts_with(' ')) {
        return None;
    }
    let reason = reason.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(80).collect::<String>();
    Some((code.parse().ok()?, reason.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::chain::Chain;

    #[test]
    fn proxy_urls() {
        let proxy: Proxy = "http://us%40er:p%3Aa%2Fss@proxy.example:3128/".parse().expect("a proxy");
        assert_eq!(proxy.endpoint.to_string(), "proxy.example:3128");
        let credentials = proxy.credentials.clone().expect("credentials");
        assert_eq!((credentials.user.expose().as_str(), credentials.password.expose().as_str()), ("us@er", "p:a/ss"));
        let shown = format!("{proxy:?}");
        assert!(!shown.contains("p:a") && !shown.contains("us@er"), "{shown}");
        for text in [
            "proxy:3128",
            "https://proxy:3128",
            "socks5://proxy:1080",
            "http://proxy",
            "http://user@proxy:1",
            "http://:p@proxy:1",
            "http://u:%zz@proxy:1",
            "http://u:%+1@proxy:1",
            "http://u:%0a@proxy:1",
            "http://proxy:1/path",
            "http://u:%ff@proxy:1",
        ] {
            assert!(text.parse::<Proxy>().is_err(), "{text}");
        }
    }

    /// A proxy that reads the request's head and then says `reply` and closes.
    async fn proxy_that_says(reply: &'static [u8]) -> (Proxy, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("an address").port();
        let tasks = crate::task::Tasks::new();
        let served = tasks.spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let mut request = BytesMut::new();
            while head_end(&request).is_none() {
                assert_ne!(stream.read_buf(&mut request).await.expect("read"), 0);
            }
            stream.write_all(reply).await.expect("written");
            String::from_utf8_lossy(&request).into_owned()
        });
        (format!("http://user:open%20sesame@127.0.0.1:{port}").parse().expect("a proxy"), served)
    }

    #[tokio::test]
    async fn refusals_name_the_status_and_never_the_password() {
        for (reply, says) in [
            (&b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"[..], "status 407"),
            (b"HTTP/1.0 403 Forbidden\x1b[2J\r\nX: y\r\n\r\n", "status 403 Forbidden[2J"),
            (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "status 502"),
            (b"HTTP/1.1 20 OK\r\n\r\n", "not an HTTP reply"),
            (b"SSH-2.0-OpenSSH\r\n", "not an HTTP reply"),
            (b"HTTP/1.1 200 OK\r\n", "closed the connection"),
            (b"", "closed the connection"),
        ] {
            let (proxy, served) = proxy_that_says(reply).await;
            let error =
                connect(&"gateway:443".parse().expect("a target"), Some(&proxy), |_| ()).await.expect_err("refused");
            let text = format!("{} {error:?}", Chain(&error));
            assert!(text.contains(says), "{text}");
            let encoded = base64::engine::general_purpose::STANDARD.encode("user:open sesame");
            assert!(!text.contains("sesame") && !text.contains(&encoded), "{text}");
            let request = served.await.expect("served");
            assert!(request.starts_with("CONNECT gateway:443 HTTP/1.1\r\nHost: gateway:443\r\n"), "{request}");
            assert!(request.contains(&encoded), "{request}");
        }
    }

    #[tokio::test]
    async fn bytes_that_follow_the_reply_are_kept() {
        let (proxy, served) =
            proxy_that_says(b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nSSH-2.0-x\r\n").await;
        let mut connection =
            connect(&"gateway:443".parse().expect("a target"), Some(&proxy), |_| ()).await.expect("connected");
        served.await.expect("served");
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
        let proxy = Proxy { endpoint: closed.clone(), credentials: None };
        let gateway: Target = "gateway:443".parse().expect("a target");
        for (to, proxy) in [(&closed, None), (&gateway, Some(&proxy))] {
            let mut told = Vec::new();
            assert!(connect(to, proxy, |addresses| told.extend_from_slice(addresses)).await.is_err());
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

    #[tokio::test]
    async fn an_endless_reply_is_cut() {
        let long: &'static [u8] =
            Box::leak([&b"HTTP/1.1 200 OK\r\nX: "[..], &[b'y'; 64 * 1024]].concat().into_boxed_slice());
        let (proxy, _served) = proxy_that_says(long).await;
        let error =
            connect(&"gateway:443".parse().expect("a target"), Some(&proxy), |_| ()).await.expect_err("refused");
        assert!(matches!(error, ConnectError::ProxyReply { .. }), "{error:?}");
    }
}

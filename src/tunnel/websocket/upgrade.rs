//! Both ends of the agreement to speak WebSocket on an HTTP connection (RFC 6455 §4).

use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::{Role, WebSocket};
use crate::limits;
use crate::secret;
use crate::target::Target;

/// What is spoken inside.
const PROTOCOL: &str = "caponier";

/// Why the other end does not speak WebSocket with us.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The connection.
    #[error("{to} closed the connection, or it failed, before its reply to the WebSocket request was complete")]
    Broke {
        /// The gateway.
        to: Target,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Time.
    #[error("{to} has not answered the WebSocket request for {} s", limits::WEBSOCKET_TIMEOUT.as_secs())]
    Silent {
        /// The gateway.
        to: Target,
    },
    /// Something else.
    #[error(
        "{to} answered the WebSocket request with something that is not an HTTP reply; is it a gateway, or a balancer for HTTP?"
    )]
    NotHttp {
        /// The gateway.
        to: Target,
    },
    /// An answer that is none of a gateway's.
    #[error("{to} answered the WebSocket request with HTTP status {status}: {}", advice(*status))]
    Status {
        /// The gateway.
        to: Target,
        /// The status code.
        status: u16,
    },
    /// An agreement to something else.
    #[error(
        "{to} agreed to another protocol than was asked for ({wrong}); an inspecting proxy or balancer may stand between that \
         answers in the gateway's place"
    )]
    Other {
        /// The gateway.
        to: Target,
        /// What was wrong.
        wrong: &'static str,
    },
}

/// What somebody can do about it. A gateway itself answers 101 or 404 alone where there is TLS.
fn advice(status: u16) -> &'static str {
    match status {
        101 => "without agreeing to WebSocket",
        200..=299 => {
            "an inspecting proxy or balancer stands between, and does not pass the upgrade on; ask the network team to let \
             WebSocket connections to this host through"
        }
        300..=399 => {
            "a proxy's login page or a balancer stands between, and sends elsewhere; ask the network team to let WebSocket \
             connections to this host through"
        }
        401 | 403 | 407 | 451 => {
            "an inspecting proxy or balancer stands between, and refuses it; ask the network team to permit WebSocket \
             connections to this host, or to leave its TLS alone"
        }
        404 => "no gateway is behind this path there; check the path in the URL, and where the balancer sends it",
        426 => "the balancer passes it on in clear, and the gateway does not know it: see tls_terminated_by there",
        502..=504 => {
            "an inspecting proxy or balancer stands between, and does not reach the gateway; ask its operators whether it \
             is up and where they send this path"
        }
        _ => {
            "an inspecting proxy or balancer stands between; ask the network team to let WebSocket connections to this host \
             through"
        }
    }
}

/// Asks for a WebSocket on `stream`, which leads to `to`. `head` is what has come on it already.
///
/// # Errors
/// If the answer is no, or none comes in time.
pub async fn connect<S>(mut stream: S, to: &Target, path: &str, head: Bytes) -> Result<WebSocket<S>, UpgradeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let asked = timeout(limits::WEBSOCKET_TIMEOUT, ask(&mut stream, to, path, head)).await;
    let rest = asked.map_err(|_| UpgradeError::Silent { to: to.clone() })??;
    Ok(WebSocket::new(stream, Role::Client, rest))
}

/// Yields what has come after the reply.
async fn ask<S>(stream: &mut S, to: &Target, path: &str, head: Bytes) -> Result<Bytes, UpgradeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let broke = |source| UpgradeError::Broke { to: to.clone(), source };
    let key = STANDARD.encode(secret::random::<16>());
    // Balancers find a host by its name, and many by its name alone.
    let host = if to.port == 443 { to.to_string().trim_end_matches(":443").to_owned() } else { to.to_string() };
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: caponier\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: {PROTOCOL}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.map_err(broke)?;
    stream.flush().await.map_err(broke)?;

    let mut reply = BytesMut::from(&head[..]);
    let end = loop {
        if let Some(end) = reply.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        // Not HTTP: no need to wait for more of it.
        let begun = reply.len().min(5);
        if reply[..begun] != b"HTTP/"[..begun] || reply.len() > limits::WEBSOCKET_REPLY_MAX {
            return Err(UpgradeError::NotHttp { to: to.clone() });
        }
        if stream.read_buf(&mut reply).await.map_err(broke)? == 0 {
            return Err(broke(io::ErrorKind::UnexpectedEof.into()));
        }
    };
    let head = reply.split_to(end + 4);
    let head = std::str::from_utf8(&head[..end]).map_err(|_| UpgradeError::NotHttp { to: to.clone() })?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(status).ok_or_else(|| UpgradeError::NotHttp { to: to.clone() })?;
    if status != 101 {
        return Err(UpgradeError::Status { to: to.clone(), status });
    }
    let headers: Vec<_> = lines.filter_map(|line| line.split_once(':')).collect();
    agreed(&headers, &derive_accept_key(key.as_bytes()))
        .map_err(|wrong| UpgradeError::Other { to: to.clone(), wrong })?;
    Ok(reply.freeze())
}

fn status(line: &str) -> Option<u16> {
    let rest = line.strip_prefix("HTTP/1.1 ").or_else(|| line.strip_prefix("HTTP/1.0 "))?;
    let (code, reason) = rest.split_at_checked(3)?;
    let well_formed = code.bytes().all(|byte| byte.is_ascii_digit()) && (reason.is_empty() || reason.starts_with(' '));
    if well_formed { code.parse().ok() } else { None }
}

/// Whether a reply agrees to what we have asked for.
fn agreed(headers: &[(&str, &str)], accept: &str) -> Result<(), &'static str> {
    let one = |name: &str| {
        let mut values = headers.iter().filter(|(header, _)| header.eq_ignore_ascii_case(name));
        let value = values.next().map(|(_, value)| value.trim());
        value.filter(|_| values.next().is_none())
    };
    if !one("upgrade").is_some_and(|value| value.eq_ignore_ascii_case("websocket")) {
        return Err("Upgrade");
    }
    if !one("connection").is_some_and(|value| names(value, "upgrade")) {
        return Err("Connection");
    }
    if one("sec-websocket-accept") != Some(accept) {
        return Err("Sec-WebSocket-Accept");
    }
    if one("sec-websocket-protocol") != Some(PROTOCOL) {
        return Err("Sec-WebSocket-Protocol");
    }
    if headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("sec-websocket-extensions")) {
        return Err("Sec-WebSocket-Extensions");
    }
    Ok(())
}

/// Whether a list of words in a header has this one, in whichever case.
fn names(list: &str, word: &str) -> bool {
    list.split(',').any(|one| one.trim().eq_ignore_ascii_case(word))
}

/// A request for a WebSocket that can be accepted.
#[derive(Debug)]
pub struct Upgrade {
    /// What shows that we have understood.
    pub(super) accept: String,
}

/// Why a request is none for a WebSocket of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the request has no {0} as a WebSocket of ours wants it")]
pub struct UpgradeFault(pub &'static str);

impl Upgrade {
    /// Judges a `GET` request by its headers, of which `header` yields the only one with a name, in whichever case; nothing
    /// where there is none or several.
    ///
    /// # Errors
    /// If it asks for something else.
    pub fn of<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Result<Self, UpgradeFault> {
        let wants = |name: &'static str, fits: &dyn Fn(&str) -> bool| {
            header(name).filter(|value| fits(value)).ok_or(UpgradeFault(name))
        };
        wants("upgrade", &|value| names(value, "websocket"))?;
        wants("connection", &|value| names(value, "upgrade"))?;
        wants("sec-websocket-version", &|value| value.trim() == "13")?;
        wants("sec-websocket-protocol", &|value| value.split(',').any(|one| one.trim() == PROTOCOL))?;
        let is_key = |value: &str| STANDARD.decode(value.trim()).is_ok_and(|key| key.len() == 16);
        let key = wants("sec-websocket-key", &is_key)?;
        Ok(Self { accept: derive_accept_key(key.trim().as_bytes()) })
    }

    /// Agrees to it. `rest` is what has come after the request.
    ///
    /// # Errors
    /// If the connection fails.
    pub async fn accept<S>(self, mut stream: S, rest: Bytes) -> io::Result<WebSocket<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let reply = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n\
             Sec-WebSocket-Protocol: {PROTOCOL}\r\n\r\n",
            self.accept
        );
        stream.write_all(reply.as_bytes()).await?;
        stream.flush().await?;
        Ok(WebSocket::new(stream, Role::Server, rest))
    }
}

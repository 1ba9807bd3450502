//! Where a gateway is, and by which transport: `ssh://`, `tls://` or `wss://`, and several of these in order.
//!
//! Promised: a URL holds no credentials, no query and no fragment, so that it can stand in any log; one in clear text that
//! only the upgrade of HTTP protects is refused, except where it never leaves this host; what several ways to one gateway
//! have in common is that there is at least one, none of them twice, and no more than [`limits::WAYS_PER_GATEWAY`].

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::limits;
use crate::target::{Host, Target, TargetError};

/// What carries the SSH session to a gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Nothing: SSH over TCP.
    Ssh,
    /// TLS.
    Tls,
    /// WebSocket within TLS.
    Wss,
    /// WebSocket over TCP, to a balancer on this host which adds TLS.
    Ws,
}

/// Where a gateway listens: `ssh://HOST[:PORT]`, `tls://HOST[:PORT]` or `wss://HOST[:PORT][/PATH]`, port 443 and path
/// `/caponier` unless given.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GatewayUrl {
    transport: Transport,
    target: Target,
    /// Empty where the transport has none.
    path: String,
}

/// The ways to one gateway, in the order in which they are tried.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ways(Vec<GatewayUrl>);

/// Why a text is no URL of a gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GatewayUrlError {
    /// None of ours.
    #[error("a gateway is written ssh://HOST[:PORT], tls://HOST[:PORT] or wss://HOST[:PORT][/PATH]")]
    Scheme,
    /// WebSocket in clear.
    #[error(
        "ws:// is clear text, which whoever is on the way can read and cut: write wss://; ws:// is for a balancer on this \
         host alone, by its loopback address, such as ws://127.0.0.1:8080"
    )]
    Clear,
    /// Path, query, or user information where none belongs.
    #[error(
        "a gateway's URL holds no user information, query or fragment, and only wss:// has a path, of at most {PATH_MAX} letters, \
         digits and /-._~"
    )]
    Extra,
    /// The host or the port.
    #[error("the host or port is not well formed")]
    Endpoint(#[source] TargetError),
}

/// Why these are not the ways to a gateway.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WaysError {
    /// There is none.
    #[error("at least one way to the gateway is wanted")]
    Empty,
    /// There are more than anybody needs.
    #[error("more than {} ways to one gateway", limits::WAYS_PER_GATEWAY)]
    TooMany,
    /// The same twice.
    #[error("{0} is there already")]
    Twice(GatewayUrl),
}

impl Transport {
    /// Its name, which is its scheme.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ssh => "ssh",
            Self::Tls => "tls",
            Self::Wss => "wss",
            Self::Ws => "ws",
        }
    }

    /// Whether there is TLS in it, which verifies the gateway's certificate.
    #[must_use]
    pub fn is_tls(self) -> bool {
        matches!(self, Self::Tls | Self::Wss)
    }

    /// Whether there is WebSocket in it.
    #[must_use]
    pub fn is_websocket(self) -> bool {
        matches!(self, Self::Wss | Self::Ws)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl GatewayUrl {
    /// What carries the session.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// Host and port.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// What a WebSocket asks for; empty for other transports.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl FromStr for GatewayUrl {
    type Err = GatewayUrlError;

    fn from_str(text: &str) -> Result<Self, GatewayUrlError> {
        let (scheme, rest) = text.split_once("://").ok_or(GatewayUrlError::Scheme)?;
        let transport = match scheme {
            "ssh" => Transport::Ssh,
            "tls" => Transport::Tls,
            "wss" => Transport::Wss,
            "ws" => Transport::Ws,
            _ => return Err(GatewayUrlError::Scheme),
        };
        let (endpoint, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let path = match (transport.is_websocket(), path) {
            (true, "") => DEFAULT_PATH,
            (true, path) if is_path(path) => path,
            (false, "" | "/") => "",
            _ => return Err(GatewayUrlError::Extra),
        };
        if endpoint.contains(['?', '#', '@']) {
            return Err(GatewayUrlError::Extra);
        }
        let has_port = match endpoint.rsplit_once(']') {
            Some((_, after)) => after.starts_with(':'),
            None => endpoint.contains(':'),
        };
        let target: Result<Target, _> = if has_port { endpoint.parse() } else { format!("{endpoint}:443").parse() };
        let target = target.map_err(GatewayUrlError::Endpoint)?;
        // By its address: what a name stands for, somebody else may say.
        if transport == Transport::Ws && !matches!(target.host, Host::Address(address) if is_loopback(address)) {
            return Err(GatewayUrlError::Clear);
        }
        Ok(Self { transport, target, path: path.to_owned() })
    }
}

impl fmt::Display for GatewayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.transport, self.target)?;
        if self.path != DEFAULT_PATH { f.write_str(&self.path) } else { Ok(()) }
    }
}

impl Ways {
    /// Several ways to one gateway, the one that is tried first at the front.
    ///
    /// # Errors
    /// If there is none, the same twice, or more than [`limits::WAYS_PER_GATEWAY`].
    pub fn new(urls: Vec<GatewayUrl>) -> Result<Self, WaysError> {
        if urls.is_empty() {
            return Err(WaysError::Empty);
        }
        if urls.len() > limits::WAYS_PER_GATEWAY {
            return Err(WaysError::TooMany);
        }
        let twice = urls.iter().enumerate().find(|(at, url)| urls[..*at].contains(url));
        match twice {
            Some((_, url)) => Err(WaysError::Twice(url.clone())),
            None => Ok(Self(urls)),
        }
    }

    /// In the order in which they are tried; at least one.
    pub fn iter(&self) -> std::slice::Iter<'_, GatewayUrl> {
        self.0.iter()
    }

    /// Whether this is one of them.
    #[must_use]
    pub fn contains(&self, url: &GatewayUrl) -> bool {
        self.0.contains(url)
    }

    /// Whether one of these leads to where one of the others leads, by whichever transport: both are then ways to one gateway.
    #[must_use]
    pub fn meet(&self, others: &Self) -> bool {
        self.iter().any(|one| others.iter().any(|other| one.target == other.target))
    }
}

impl From<GatewayUrl> for Ways {
    fn from(url: GatewayUrl) -> Self {
        Self(vec![url])
    }
}

impl FromStr for Ways {
    type Err = GatewayUrlError;

    /// One way alone.
    fn from_str(text: &str) -> Result<Self, GatewayUrlError> {
        text.parse().map(|url: GatewayUrl| url.into())
    }
}

impl fmt::Display for Ways {
    /// One way is written as it is, several as a list.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [only] = &self.0[..] {
            return only.fmt(f);
        }
        for (at, url) in self.iter().enumerate() {
            write!(f, "{}{url}", if at == 0 { "[" } else { ", " })?;
        }
        f.write_str("]")
    }
}

fn is_loopback(address: IpAddr) -> bool {
    address.is_loopback()
}

/// Nothing that a balancer could take for anything else than what it is.
fn is_path(path: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'-' | b'.' | b'_' | b'~');
    let steps = path.split('/').skip(1);
    path.len() <= PATH_MAX
        && path.starts_with('/')
        && path.bytes().all(plain)
        && !path.contains("//")
        && !steps.into_iter().any(|step| step == "." || step == "..")
}

/// What a WebSocket asks for unless told otherwise.
const DEFAULT_PATH: &str = "/caponier";

/// Balancers take more; nobody needs it.
const PATH_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_urls() {
        for (text, normal) in [
            ("ssh://gateway.example.com", "ssh://gateway.example.com:443"),
            ("ssh://gateway.example.com:8443/", "ssh://gateway.example.com:8443"),
            ("ssh://[2001:db8::1]", "ssh://[2001:db8::1]:443"),
            ("ssh://[2001:db8::1]:22", "ssh://[2001:db8::1]:22"),
            ("ssh://10.0.0.1", "ssh://10.0.0.1:443"),
            ("tls://gateway.example.com/", "tls://gateway.example.com:443"),
            ("tls://[2001:db8::1]:8443", "tls://[2001:db8::1]:8443"),
            ("wss://gateway.example.com", "wss://gateway.example.com:443"),
            ("wss://gateway.example.com:8443/caponier", "wss://gateway.example.com:8443"),
            ("wss://gateway.example.com/", "wss://gateway.example.com:443/"),
            ("wss://gateway.example.com/a/b-c_d.e~", "wss://gateway.example.com:443/a/b-c_d.e~"),
            ("ws://127.0.0.1:8080", "ws://127.0.0.1:8080"),
            ("ws://[::1]/x", "ws://[::1]:443/x"),
        ] {
            let url: GatewayUrl = text.parse().expect(text);
            assert_eq!(url.to_string(), normal);
            assert_eq!(normal.parse().as_ref(), Ok(&url), "{normal}");
        }
        let wss: GatewayUrl = "wss://g".parse().expect("a gateway");
        assert_eq!((wss.transport(), wss.path()), (Transport::Wss, "/caponier"));
        assert!(wss.transport().is_tls() && wss.transport().is_websocket());
    }

    #[test]
    fn what_is_no_gateway_url_is_refused_with_the_reason() {
        use GatewayUrlError::{Clear, Endpoint, Extra, Scheme};
        for (text, error) in [
            ("gateway", Scheme),
            ("https://gateway", Scheme),
            ("SSH://gateway", Scheme),
            ("ssh://", Endpoint(TargetError::Empty)),
            ("ssh://a/b", Extra),
            ("tls://a/caponier", Extra),
            ("ssh://u@a", Extra),
            ("wss://u:hunter2@a", Extra),
            ("wss://a/b?c", Extra),
            ("wss://a/b#c", Extra),
            ("wss://a/b c", Extra),
            ("wss://a/%2e%2e", Extra),
            ("wss://a/../b", Extra),
            ("wss://a//b", Extra),
            ("wss://a/\r\nX: y", Extra),
            ("ssh://a?x", Extra),
            ("ssh://a:0", Endpoint(TargetError::Port)),
            ("tls://a:b", Endpoint(TargetError::Port)),
            ("ssh://2130706433", Endpoint(TargetError::Numeric)),
            ("ws://gateway.example.com", Clear),
            ("ws://10.0.0.1", Clear),
            ("ws://localhost:8080", Clear),
        ] {
            assert_eq!(text.parse::<GatewayUrl>(), Err(error), "{text}");
            assert!(!error.to_string().contains("hunter2"));
        }
        assert_eq!(format!("wss://a/{}", "x".repeat(PATH_MAX)).parse::<GatewayUrl>(), Err(Extra));
    }

    #[test]
    fn ways_are_some_and_none_twice() {
        let urls =
            |texts: &[&str]| -> Vec<GatewayUrl> { texts.iter().map(|text| text.parse().expect("a gateway")).collect() };
        let ways = Ways::new(urls(&["tls://b", "wss://b"])).expect("ways");
        assert_eq!(ways.to_string(), "[tls://b:443, wss://b:443]");
        assert_eq!("ssh://a".parse::<Ways>().map(|ways| ways.to_string()).as_deref(), Ok("ssh://a:443"));
        assert_eq!(Ways::new(Vec::new()), Err(WaysError::Empty));
        assert!(matches!(Ways::new(urls(&["tls://b", "tls://b:443/"])), Err(WaysError::Twice(_))));
        let many: Vec<_> = (1..=limits::WAYS_PER_GATEWAY + 1).map(|port| format!("tls://b:{port}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert!(Ways::new(urls(&many[1..])).is_ok());
        assert_eq!(Ways::new(urls(&many)), Err(WaysError::TooMany));
        let meets = |texts: &[&str]| ways.meet(&Ways::new(urls(texts)).expect("ways"));
        assert!(meets(&["ssh://a", "ssh://b"]) && !meets(&["ssh://a", "tls://b:8443"]));
    }
}

//! Where a proxy is, by which protocol it is asked, and what it wants to know first.
//!
//! Promised: a text that is no URL of a proxy is never repeated, since it may hold a password; neither `Debug` nor `Display`
//! shows credentials.

use std::fmt;
use std::str::FromStr;

use base64::Engine;

use crate::secret::Secret;
use crate::target::{Target, TargetError};

/// A proxy: `http://`, `https://` or `socks5://`, then `[USER:PASSWORD@]HOST:PORT`. `Display` leaves the credentials out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// How it is asked.
    pub scheme: Scheme,
    /// Where it listens.
    pub endpoint: Target,
    /// What it wants to know first.
    pub credentials: Option<Credentials>,
}

/// How a proxy is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// HTTP CONNECT (RFC 9110 §9.3.6) in clear.
    Http,
    /// The same within TLS.
    Https,
    /// SOCKS5 (RFC 1928). Names are looked up by the proxy.
    Socks5,
}

/// A user name and password: for Basic authentication (RFC 7617), or for SOCKS5 (RFC 1929).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    user: Secret<String>,
    password: Secret<String>,
}

/// Why a text is no URL of a proxy. It is never repeated: it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProxyUrlError {
    /// None of ours.
    #[error(
        "a proxy is written http://[USER:PASSWORD@]HOST:PORT, or with https:// or socks5:// in place of http://; other schemes \
         are not known here"
    )]
    Scheme,
    /// Path or query.
    #[error("nothing may follow the port of a proxy")]
    Extra,
    /// The host or the port.
    #[error("the host or port of the proxy is not well formed (the port has no default: programs differ in it)")]
    Endpoint(#[source] TargetError),
    /// The user information.
    #[error(
        "the credentials must be USER:PASSWORD, percent-encoded where they hold special characters, without control characters"
    )]
    Credentials,
    /// Longer than the protocol can say.
    #[error("SOCKS5 has room for a user name and a password of 1 to 255 bytes each")]
    SocksCredentials,
}

impl Scheme {
    /// As it is written, without `://`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
            Self::Socks5 => "socks5",
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Proxy {
    /// The same with these credentials.
    ///
    /// # Errors
    /// If its protocol cannot say them.
    pub fn with(self, credentials: Credentials) -> Result<Self, ProxyUrlError> {
        let fits = |text: &Secret<String>| (1..=255).contains(&text.expose().len());
        if self.scheme == Scheme::Socks5 && !(fits(&credentials.user) && fits(&credentials.password)) {
            return Err(ProxyUrlError::SocksCredentials);
        }
        Ok(Self { credentials: Some(credentials), ..self })
    }
}

impl FromStr for Proxy {
    type Err = ProxyUrlError;

    fn from_str(text: &str) -> Result<Self, ProxyUrlError> {
        let (scheme, rest) = text.split_once("://").ok_or(ProxyUrlError::Scheme)?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            // Elsewhere the second says that the proxy looks names up, which ours always does.
            "socks5" | "socks5h" => Scheme::Socks5,
            _ => return Err(ProxyUrlError::Scheme),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, endpoint) = match rest.rsplit_once('@') {
            Some((userinfo, endpoint)) => {
                let (user, password) = userinfo.split_once(':').ok_or(ProxyUrlError::Credentials)?;
                (Some(Credentials::new(percent_decode(user)?, percent_decode(password)?)?), endpoint)
            }
            None => (None, rest),
        };
        if endpoint.contains(['/', '?', '#']) {
            return Err(ProxyUrlError::Extra);
        }
        let proxy = Self { scheme, endpoint: endpoint.parse().map_err(ProxyUrlError::Endpoint)?, credentials: None };
        match credentials {
            Some(credentials) => proxy.with(credentials),
            None => Ok(proxy),
        }
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.endpoint)
    }
}

impl Credentials {
    /// Checks a user name and a password.
    ///
    /// # Errors
    /// If the name is empty or holds a colon, or either holds a control character (RFC 7617 §2).
    pub fn new(user: String, password: String) -> Result<Self, ProxyUrlError> {
        let (user, password) = (Secret::new(user), Secret::new(password));
        let unfit = user.expose().is_empty()
            || user.expose().contains(':')
            || [&user, &password].iter().any(|text| text.expose().chars().any(char::is_control));
        if unfit { Err(ProxyUrlError::Credentials) } else { Ok(Self { user, password }) }
    }

    /// Reads `USER:PASSWORD`, as a credentials file holds it; nothing is decoded.
    ///
    /// # Errors
    /// As [`Credentials::new`].
    pub fn from_line(line: &str) -> Result<Self, ProxyUrlError> {
        let (user, password) = line.trim_end_matches(['\r', '\n']).split_once(':').ok_or(ProxyUrlError::Credentials)?;
        Self::new(user.to_owned(), password.to_owned())
    }

    /// What stands after `Basic ` in a header.
    pub(super) fn basic(&self) -> Secret<String> {
        let pair = Secret::new(format!("{}:{}", self.user.expose(), self.password.expose()));
        Secret::new(base64::engine::general_purpose::STANDARD.encode(pair.expose()))
    }

    /// The name and the password, for the protocols of this module's parent alone.
    pub(super) fn pair(&self) -> (&str, &str) {
        (self.user.expose(), self.password.expose())
    }
}

fn percent_decode(text: &str) -> Result<String, ProxyUrlError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits =
            rest.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()).ok_or(ProxyUrlError::Credentials)?;
        if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(ProxyUrlError::Credentials);
        }
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| ProxyUrlError::Credentials)?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| ProxyUrlError::Credentials)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Chain;

    #[test]
    fn a_url_says_scheme_endpoint_and_credentials_and_shows_none() {
        for (text, shown) in [
            ("http://us%40er:p%3Aa%2Fss@proxy.example:3128/", "http://proxy.example:3128"),
            ("HTTPS://us%40er:p%3Aa%2Fss@[2001:db8::1]:443", "https://[2001:db8::1]:443"),
            ("socks5://us%40er:p%3Aa%2Fss@10.0.0.1:1080", "socks5://10.0.0.1:1080"),
            ("socks5h://us%40er:p:a%2fss@10.0.0.1:1080", "socks5://10.0.0.1:1080"),
        ] {
            let proxy: Proxy = text.parse().expect(text);
            assert_eq!(proxy.to_string(), shown);
            assert_eq!(proxy.credentials.as_ref().map(Credentials::pair), Some(("us@er", "p:a/ss")));
            let debug = format!("{proxy:?}");
            assert!(!debug.contains("p:a") && !debug.contains("us@er"), "{debug}");
        }
    }

    #[test]
    fn what_is_no_proxy_is_refused_without_a_word_of_it() {
        let long = "hunter2".repeat(40);
        for text in [
            "proxy:3128",
            "none",
            "",
            "socks4://proxy:1080",
            "socks://hunter2:hunter2@proxy:1080",
            "ftp://hunter2:hunter2@proxy:1080",
            "http://proxy",
            "http://",
            "http://user@proxy:1",
            "http://:hunter2@proxy:1",
            "http://u:%zz@proxy:1",
            "http://u:%+1@proxy:1",
            "http://u:%0a@proxy:1",
            "http://proxy:1/path",
            "http://u:hunter2@proxy:1?x",
            "http://u:%ff@proxy:1",
            "socks5://u:@proxy:1",
            &format!("socks5://u:{long}@proxy:1"),
        ] {
            let error = text.parse::<Proxy>().expect_err(text);
            let told = format!("{} {error:?}", Chain(&error));
            assert!(!told.contains("hunter2"), "{told}");
        }
    }
}

//! Asking an HTTP proxy for a tunnel: CONNECT (RFC 9110 §9.3.6).
//!
//! Promised: the reply is read up to the end of its head and not a byte further is lost (SSH servers speak first, so what
//! follows in the same segment belongs to the tunnel); a 2xx reply has no body, whatever its headers say; interim replies are
//! passed over; what the proxy says is told in printable ASCII, cut short, and never where it repeats the credentials.

use std::fmt;
use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::proxy::Credentials;
use crate::limits;
use crate::secret::Secret;
use crate::target::Target;

/// Why an HTTP proxy made no tunnel, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HttpProxyError {
    /// It broke off.
    #[error(
        "it closed the connection, or it failed, before its reply to CONNECT was complete; is it an HTTP proxy, and of this \
         scheme?"
    )]
    Broke(#[source] io::Error),
    /// Not HTTP.
    #[error("it answered CONNECT with {0}, which is not an HTTP reply; is it an HTTP proxy, and of this scheme?")]
    NotHttp(&'static str),
    /// Too much of it.
    #[error("it answered CONNECT with a head of more than {} bytes; is it an HTTP proxy?", limits::CONNECT_REPLY_MAX)]
    TooLong,
    /// It wants other credentials, or any.
    #[error("it answered CONNECT with status 407: {0}")]
    Authentication(Wanted),
    /// It said no.
    #[error("it answered CONNECT with status {said}: {}", said.advice())]
    Refused {
        /// What it said.
        said: Said,
    },
}

/// Which credentials a proxy wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Whether some were sent.
    pub sent: bool,
    /// The ways to authenticate that it offers.
    pub schemes: Vec<String>,
    /// What it calls itself.
    pub realm: Option<String>,
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let basic = self.schemes.iter().any(|scheme| scheme.eq_ignore_ascii_case("basic"));
        if !basic && !self.schemes.is_empty() {
            return write!(
                f,
                "it wants to be spoken to in {}, and Basic is what is spoken here: ask its operators for a user with Basic, or \
                 to permit this host and port without a login",
                self.schemes.join(" or ")
            );
        }
        f.write_str(match self.sent {
            true => "it did not accept the credentials given; check them",
            false => "it asks for credentials, and none are configured",
        })?;
        match &self.realm {
            Some(realm) => write!(f, " (it calls itself \"{realm}\")"),
            None => Ok(()),
        }
    }
}

/// What a proxy said to explain itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// The status code.
    pub status: u16,
    /// The reason phrase.
    pub reason: String,
    /// What its headers tell of the cause.
    pub cause: Option<String>,
}

impl Said {
    fn advice(&self) -> &'static str {
        match self.status {
            300..=399 => {
                "it sends us elsewhere, as login portals do: log in there, or ask the network's operators to let this host and \
                 port through without"
            }
            400 | 404 | 405 | 501 => "it may be a web server: check the proxy's address with the network's operators",
            401 => "it is a web server that wants a login, and no proxy: check the proxy's address",
            403 | 451 => "ask its operators to permit CONNECT to this host and port",
            429 => "it has had too many requests: ask its operators for a higher limit",
            502..=504 => {
                "it could not reach the host and port itself: ask its operators whether it can resolve and connect to them"
            }
            _ => "ask its operators, who can find this request in its log",
        }
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)?;
        if !self.reason.is_empty() {
            write!(f, " {}", self.reason)?;
        }
        match &self.cause {
            Some(cause) => write!(f, " ({cause})"),
            None => Ok(()),
        }
    }
}

/// Asks for a tunnel to `to`. Returns what the tunnel's other end has said already.
///
/// # Errors
/// If the proxy makes none.
pub(super) async fn ask<S>(
    stream: &mut S,
    to: &Target,
    credentials: Option<&Credentials>,
) -> Result<Bytes, HttpProxyError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut request = Secret::new(format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n"));
    if let Some(credentials) = credentials {
        let basic = credentials.basic();
        request = Secret::new(format!("{}Proxy-Authorization: Basic {}\r\n", request.expose(), basic.expose()));
    }
    request = Secret::new(format!("{}\r\n", request.expose()));
    stream.write_all(request.expose().as_bytes()).await.map_err(HttpProxyError::Broke)?;
    stream.flush().await.map_err(HttpProxyError::Broke)?;

    let mut read = BytesMut::with_capacity(1024);
    // Over all heads, so that interim replies come to an end.
    let mut over = 0;
    loop {
        let end = loop {
            if let Some(end) = head_end(&read) {
                break end;
            }
            // No need to wait for more of what is not HTTP.
            if !read.starts_with(&b"HTTP/1."[..read.len().min(7)]) {
                return Err(HttpProxyError::NotHttp(looks_like(&read)));
            }
            if over + read.len() > limits::CONNECT_REPLY_MAX {
                return Err(HttpProxyError::TooLong);
            }
            if stream.read_buf(&mut read).await.map_err(HttpProxyError::Broke)? == 0 {
                return Err(HttpProxyError::Broke(io::ErrorKind::UnexpectedEof.into()));
            }
        };
        over += end;
        let head = read.split_to(end);
        let reply = Reply::parse(&head).ok_or_else(|| HttpProxyError::NotHttp(looks_like(&head)))?;
        match reply.status {
            // To another protocol, which nobody has asked for.
            101 => return Err(HttpProxyError::NotHttp("a switch to another protocol")),
            100..=199 if over > limits::CONNECT_REPLY_MAX => return Err(HttpProxyError::TooLong),
            100..=199 => {}
            200..=299 => return Ok(read.freeze()),
            407 => return Err(HttpProxyError::Authentication(reply.wants(credentials))),
            _ => return Err(HttpProxyError::Refused { said: reply.says(credentials) }),
        }
    }
}

/// What the beginning of a reply that is not HTTP says of the peer.
fn looks_like(read: &[u8]) -> &'static str {
    match read {
        [0x14..=0x17, 0x03, ..] => "TLS",
        [b'S', b'S', b'H', b'-', ..] => "an SSH server's line",
        [0x05, ..] => "SOCKS5",
        [0x00, ..] => "SOCKS4",
        [b'H', b'T', b'T', b'P', b'/', b'1', ..] => "a broken status line",
        [b'H', b'T', b'T', b'P', b'/', ..] => "another version of HTTP",
        _ => "something unknown",
    }
}

/// Where a head ends: after the empty line. A line may end without CR (RFC 9112 §2.2).
fn head_end(reply: &[u8]) -> Option<usize> {
    let ends = reply.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    ends.into_iter().find_map(|at| match &reply[at..] {
        [b'\n', ..] => Some(at + 1),
        [b'\r', b'\n', ..] => Some(at + 2),
        _ => None,
    })
}

/// A head, as far as it matters.
struct Reply<'a> {
    status: u16,
    reason: &'a [u8],
    headers: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> Reply<'a> {
    fn parse(head: &'a [u8]) -> Option<Self> {
        let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
        let line = lines.next()?;
        let rest = line.strip_prefix(b"HTTP/1.1 ").or_else(|| line.strip_prefix(b"HTTP/1.0 "))?;
        let (code, reason) = rest.split_at_checked(3)?;
        let digits = code.iter().all(u8::is_ascii_digit) && (reason.is_empty() || reason.starts_with(b" "));
        let status = std::str::from_utf8(code).ok().filter(|_| digits)?.parse().ok().filter(|status| *status >= 100)?;
        let headers = lines.filter_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            Some((&line[..colon], line[colon + 1..].trim_ascii()))
        });
        Some(Self { status, reason: reason.trim_ascii(), headers: headers.collect() })
    }

    fn named(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.headers.iter().filter(move |(key, _)| key.eq_ignore_ascii_case(name.as_bytes())).map(|(_, value)| *value)
    }

    fn says(&self, credentials: Option<&Credentials>) -> Said {
        let cause = |name: &str| self.named(name).next().map(|value| told(value, credentials));
        // Squid's own, and RFC 9209; where a portal sends us, without what its query may tell of us.
        let cause = cause("X-Squid-Error").or_else(|| cause("Proxy-Status")).or_else(|| {
            let to = self.named("Location").next()?;
            let to = to.split(|byte| b"?#".contains(byte)).next().unwrap_or(to);
            (300..=399).contains(&self.status).then(|| format!("to {}", told(to, credentials)))
        });
        Said {
            status: self.status,
            reason: told(self.reason, credentials),
            cause: cause.filter(|cause| !cause.is_empty()),
        }
    }

    fn wants(&self, credentials: Option<&Credentials>) -> Wanted {
        let mut wanted = Wanted { sent: credentials.is_some(), schemes: Vec::new(), realm: None };
        for value in self.named("Proxy-Authenticate") {
            for part in split_quoted(value) {
                let (first, rest) = match part.iter().position(|byte| *byte == b' ') {
                    Some(blank) => (&part[..blank], part[blank + 1..].trim_ascii()),
                    None => (part, &b""[..]),
                };
                // A scheme, perhaps with its first parameter; or a further parameter.
                let parameter = if first.contains(&b'=') {
                    part
                } else {
                    let scheme = told(first, credentials);
                    if !scheme.is_empty() && !wanted.schemes.contains(&scheme) && wanted.schemes.len() < SCHEMES_TOLD {
                        wanted.schemes.push(scheme);
                    }
                    rest
                };
                let realm = parameter.split_at_checked(6).filter(|(name, _)| name.eq_ignore_ascii_case(b"realm="));
                if let Some((_, realm)) = realm {
                    let realm = told(realm, credentials).replace('"', "");
                    wanted.realm = wanted.realm.or_else(|| Some(realm).filter(|realm| !realm.is_empty()));
                }
            }
        }
        wanted
    }
}

/// The parts between commas that are not quoted.
fn split_quoted(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut quoted = false;
    let parts = value.split(move |byte| {
        quoted ^= *byte == b'"';
        *byte == b',' && !quoted
    });
    parts.map(<[u8]>::trim_ascii)
}

/// What may be repeated of a proxy's words: nothing, if the credentials are in them.
fn told(words: &[u8], credentials: Option<&Credentials>) -> String {
    let printable = words.iter().filter(|byte| byte.is_ascii_graphic() || **byte == b' ').map(|byte| char::from(*byte));
    let all: String = printable.collect();
    let repeats = credentials.is_some_and(|credentials| {
        let (user, password) = credentials.pair();
        [credentials.basic().expose(), user, password].iter().any(|secret| !secret.is_empty() && all.contains(*secret))
    });
    if repeats {
        return "[it repeats the credentials]".to_owned();
    }
    all.chars().take(WORDS_TOLD).collect()
}

/// Characters of what a proxy says that are told.
const WORDS_TOLD: usize = 80;

/// Ways to authenticate that are told.
const SCHEMES_TOLD: usize = 8;

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;
    use crate::chain::Chain;
    use crate::task::Tasks;

    fn gateway() -> Target {
        "gateway.example:443".parse().expect("a target")
    }

    fn credentials() -> Credentials {
        Credentials::from_line("user:open sesame").expect("credentials")
    }

    /// Asks a proxy that says `pieces`, one write each, and closes.
    async fn asked(pieces: &[&[u8]], credentials: Option<&Credentials>) -> (Result<Vec<u8>, HttpProxyError>, String) {
        let (mut ours, mut theirs) = duplex(64 * 1024);
        let pieces: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.to_vec()).collect();
        let proxy = Tasks::new().spawn(async move {
            let mut request = BytesMut::new();
            while head_end(&request).is_none() {
                assert_ne!(theirs.read_buf(&mut request).await.expect("read"), 0);
            }
            for piece in pieces {
                if theirs.write_all(&piece).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            String::from_utf8_lossy(&request).into_owned()
        });
        let head = ask(&mut ours, &gateway(), credentials).await;
        let head = match head {
            Ok(head) => {
                let mut all = head.to_vec();
                ours.read_to_end(&mut all).await.expect("read");
                Ok(all)
            }
            Err(error) => {
                drop(ours);
                Err(error)
            }
        };
        (head, proxy.await.expect("served"))
    }

    #[tokio::test]
    async fn refusals_name_the_status_and_never_the_password() {
        let encoded = credentials().basic().expose().clone();
        let echo = format!("HTTP/1.1 403 no {encoded}\r\nX-Squid-Error: open sesame\r\n\r\n");
        for (reply, says) in [
            (
                &b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"[..],
                "status 407: it did not accept the credentials",
            ),
            (b"HTTP/1.0 403 Forbidden\x1b[2J\r\nX: y\r\n\r\n", "status 403 Forbidden[2J: ask its operators to permit"),
            (b"HTTP/1.1 451\r\n\r\n", "status 451: ask its operators to permit"),
            (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "status 502 Bad Gateway: it could not reach the host"),
            (
                b"HTTP/1.1 503 Service Unavailable\r\nx-squid-error: ERR_DNS_FAIL 0\r\n\r\n",
                "status 503 Service Unavailable (ERR_DNS_FAIL 0): it could not reach",
            ),
            (b"HTTP/1.1 504 \nProxy-Status: p; error=connection_timeout\n\n", "504 (p; error=connection_timeout): it"),
            (
                b"HTTP/1.1 302 Found\r\nLocation: https://portal.example/login?user=u\r\n\r\n",
                "status 302 Found (to https://portal.example/login): it sends us elsewhere",
            ),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it may be a web server"),
            (b"HTTP/1.1 429 Slow\r\n\r\n", "too many requests"),
            (b"HTTP/1.1 500 Oops\r\n\r\n", "ask its operators, who can find this request"),
            (echo.as_bytes(), "status 403 [it repeats the credentials] ([it repeats the credentials])"),
            (b"HTTP/1.1 20 OK\r\n\r\n", "a broken status line, which is not an HTTP reply"),
            (b"HTTP/1.1 099 OK\r\n\r\n", "a broken status line, which is not an HTTP reply"),
            (b"HTTP/1.1 2000 OK\r\n\r\n", "a broken status line, which is not an HTTP reply"),
            (b"HTTP/2 200\r\n\r\n", "another version of HTTP"),
            (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "a switch to another protocol"),
            (b"SSH-2.0-OpenSSH\r\n", "an SSH server's line, which is not an HTTP reply"),
            (b"\x15\x03\x01\x00\x02\x02\x16", "TLS, which is not an HTTP reply"),
            (b"\x05\xff", "SOCKS5, which is not an HTTP reply"),
            (b"<html>", "something unknown, which is not an HTTP reply"),
            (b"HTTP/1.1 200 OK\r\n", "closed the connection"),
            (b"HTTP/1.1 100 Continue\r\n\r\n", "closed the connection"),
            (b"HT", "closed the connection"),
            (b"", "closed the connection"),
        ] {
            let (answer, request) = asked(&[reply], Some(&credentials())).await;
            let error = answer.expect_err("refused");
            let text = format!("{} {error:?}", Chain(&error));
            assert!(text.contains(says), "{text}");
            assert!(!text.contains("sesame") && !text.contains(&encoded), "{text}");
            let start =
                "CONNECT gateway.example:443 HTTP/1.1\r\nHost: gateway.example:443\r\nProxy-Authorization: Basic ";
            assert_eq!(request, format!("{start}{encoded}\r\n\r\n"));
        }
    }

    #[tokio::test]
    async fn says_which_credentials_a_proxy_wants() {
        let basic = credentials();
        for (headers, sent, says) in [
            ("", false, "it asks for credentials, and none are configured"),
            ("", true, "it did not accept the credentials given; check them"),
            (
                "Proxy-Authenticate: Basic realm=\"corp, EU\"",
                false,
                "none are configured (it calls itself \"corp, EU\")",
            ),
            ("proxy-authenticate: BASIC Realm=corp", true, "check them (it calls itself \"corp\")"),
            (
                "Proxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM",
                false,
                "spoken to in Negotiate or NTLM, and Basic",
            ),
            (
                "Proxy-Authenticate: Negotiate, NTLM",
                true,
                "spoken to in Negotiate or NTLM, and Basic is what is spoken here",
            ),
            (
                "Proxy-Authenticate: Digest realm=\"a\", nonce=\"b\", qop=\"auth\"",
                false,
                "spoken to in Digest, and Basic",
            ),
            ("Proxy-Authenticate: NTLM\r\nProxy-Authenticate: Basic realm=\"x\"", false, "and none are configured (it"),
        ] {
            let headers = if headers.is_empty() { String::new() } else { format!("{headers}\r\n") };
            let reply = format!("HTTP/1.1 407 Proxy Authentication Required\r\n{headers}Content-Length: 3\r\n\r\nbye");
            let (answer, _) = asked(&[reply.as_bytes()], sent.then_some(&basic)).await;
            let text = answer.expect_err("refused").to_string();
            assert!(text.contains(says), "{text}");
        }
    }

    /// Every way to cut the reply and what follows it into two or three pieces.
    #[tokio::test]
    async fn bytes_that_follow_the_reply_are_kept_however_they_are_cut() {
        let says = b"SSH-2.0-x\r\n\r\nmore";
        for head in [
            &b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n"[..],
            b"HTTP/1.0 200\r\n\r\n",
            b"HTTP/1.1 200 OK\n\n",
            // There is no body (RFC 9110 §9.3.6).
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
            b"HTTP/1.1 299 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        ] {
            let all = [head, says].concat();
            for cut in 0..=all.len() {
                let (answer, _) = asked(&[&all[..cut], &all[cut..]], None).await;
                assert_eq!(answer.expect("a tunnel"), says, "cut at {cut}");
                let middle = cut + (all.len() - cut) / 2;
                let (answer, _) = asked(&[&all[..cut], &all[cut..middle], &all[middle..]], None).await;
                assert_eq!(answer.expect("a tunnel"), says, "cut at {cut} and {middle}");
            }
            let each: Vec<_> = all.chunks(1).collect();
            assert_eq!(asked(&each, None).await.0.expect("a tunnel"), says);
        }
    }

    #[tokio::test]
    async fn an_endless_reply_is_cut() {
        let line = [&b"HTTP/1.1 200 OK\r\nX: "[..], &[b'y'; limits::CONNECT_REPLY_MAX]].concat();
        let interim = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(limits::CONNECT_REPLY_MAX / 20);
        for long in [line, interim] {
            let (answer, _) = asked(&[&long], None).await;
            assert!(matches!(answer, Err(HttpProxyError::TooLong)), "{answer:?}");
        }
    }
}

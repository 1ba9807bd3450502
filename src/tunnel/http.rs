//! What is spoken of HTTP/1 here: the head of one request, and fixed replies.
//!
//! Promised: [`parse`] is pure and total, and takes nothing that two readers could take for two different things: whoever
//! stands before us, a balancer or a proxy, must not see other requests in the same bytes than we do. So every line ends with
//! CR LF, none is continued by the next, a header's name is followed by its colon, a request has no body and says so in no odd
//! way, it names one host, and its target has the one form that its method wants. A head is bounded in bytes and in headers
//! ([`limits::HTTP_HEAD_MAX`], [`limits::HTTP_HEADERS_MAX`]), is looked at once however slowly it comes, and is refused at the
//! first byte that is wrong in itself. [`read`] loses no byte that follows it. One request is answered on a connection, and
//! then it ends: what follows a head is never taken for another.
//!
//! A head may hold credentials. It is wiped when it is dropped, and neither `Debug` nor an error shows any of it.

pub mod date;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};

use super::admit::penalty::Fault;
use crate::limits;
use crate::secret::Secret;

/// The head of a request.
pub struct Head {
    text: Secret<Vec<u8>>,
    method: Range<usize>,
    target: Range<usize>,
    headers: Vec<(Range<usize>, Range<usize>)>,
}

/// A request: its head, and what has come behind it.
#[derive(Debug)]
pub struct Request {
    /// The head.
    pub head: Head,
    /// What follows it, as far as it was read.
    pub rest: Bytes,
}

/// Why there is no head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// One without an end.
    #[error("a request's head of more than {} bytes", limits::HTTP_HEAD_MAX)]
    TooLong,
    /// Too many lines.
    #[error("a request with more than {} headers", limits::HTTP_HEADERS_MAX)]
    TooManyHeaders,
    /// CR or LF alone.
    #[error("a line of a request that does not end with CR LF")]
    LineEnd,
    /// NUL and its like.
    #[error("a control character in a request's head")]
    Control,
    /// A header over several lines (RFC 9112 §5.2), or a space before the first.
    #[error("a header of a request that goes on in the next line")]
    Folded,
    /// Something else that is not HTTP/1.
    #[error("a malformed request")]
    Malformed,
    /// No host, or several, or none that could be.
    #[error("a request that does not name one host")]
    Host,
    /// A body, or what could be taken for one.
    #[error("a request with a body")]
    Body,
    /// Not the form that the method wants (RFC 9112 §3.2).
    #[error("a request whose target is not of its method's form")]
    Target,
}

impl HeadError {
    /// What its sender is told.
    #[must_use]
    pub fn reply(self) -> Reply {
        match self {
            Self::TooLong | Self::TooManyHeaders => Reply::TooLarge,
            _ => Reply::BadRequest,
        }
    }
}

impl Head {
    /// The method, in capitals.
    #[must_use]
    pub fn method(&self) -> &str {
        self.text(&self.method)
    }

    /// What is asked for: a host and port where the method is CONNECT, else a path.
    #[must_use]
    pub fn target(&self) -> &str {
        self.text(&self.target)
    }

    /// All values of a header, in their order. A value that is not text is empty.
    pub fn all<'a>(&'a self, name: &'a str) -> impl DoubleEndedIterator<Item = &'a str> {
        let named = move |(of, _): &&(Range<usize>, Range<usize>)| self.text(of).eq_ignore_ascii_case(name);
        self.headers.iter().filter(named).map(|(_, value)| self.text(value))
    }

    /// The value of a header that is there once; none where it is not there, or several times.
    #[must_use]
    pub fn only(&self, name: &str) -> Option<&str> {
        let mut named = self.headers.iter().filter(|(of, _)| self.text(of).eq_ignore_ascii_case(name));
        let (_, value) = named.next()?;
        named.next().is_none().then(|| self.text(value))
    }

    /// For whom a balancer has passed this on: the last entry of `X-Forwarded-For`, which is the one that it has made itself.
    /// With port 0 where it does not say the port. None where there is no such entry, or none that is an address.
    #[must_use]
    pub fn forwarded_for(&self) -> Option<SocketAddr> {
        let last = self.all("x-forwarded-for").next_back()?.rsplit(',').next()?.trim_matches([' ', '\t']);
        let bracketed = last.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let address = match bracketed {
            Some(v6) => v6.parse().ok().filter(IpAddr::is_ipv6),
            None => last.parse::<IpAddr>().ok(),
        };
        let client = address.map(|address| SocketAddr::new(address, 0)).or_else(|| last.parse().ok())?;
        Some(SocketAddr::new(client.ip().to_canonical(), client.port()))
    }

    fn text(&self, range: &Range<usize>) -> &str {
        self.text.expose().get(range.clone()).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Head({}, {} headers)", self.method(), self.headers.len())
    }
}

/// Looks for the head of a request at the beginning of `read`, and how long it is. `None` means that it is not complete.
///
/// # Errors
/// If there is none that we would take, whatever may follow.
pub fn parse(read: &[u8]) -> Result<Option<(Head, usize)>, HeadError> {
    match Scan::default().go_on(read)? {
        Some(end) => Ok(Some((head(read[..end].to_vec())?, end))),
        None => Ok(None),
    }
}

/// Looks at each byte once, for what is wrong in itself and for the end.
#[derive(Debug, Default)]
struct Scan {
    at: usize,
    lines: usize,
    line: usize,
}

impl Scan {
    /// The length of the head, once all of it has come.
    fn go_on(&mut self, read: &[u8]) -> Result<Option<usize>, HeadError> {
        while let Some(byte) = read.get(self.at) {
            if self.at >= limits::HTTP_HEAD_MAX {
                return Err(HeadError::TooLong);
            }
            let after_cr = self.at > self.line && read[self.at - 1] == b'\r';
            match byte {
                b'\n' if !after_cr => return Err(HeadError::LineEnd),
                b'\n' => {
                    let empty = self.at == self.line + 1;
                    if empty && self.lines > 0 {
                        return Ok(Some(self.at + 1));
                    }
                    self.lines += 1;
                    self.line = self.at + 1;
                    if empty {
                        return Err(HeadError::Malformed);
                    }
                }
                _ if after_cr => return Err(HeadError::LineEnd),
                b' ' | b'\t' if self.at == self.line => return Err(HeadError::Folded),
                b'\r' | b'\t' => {}
                0..0x20 | 0x7f => return Err(HeadError::Control),
                _ => {}
            }
            // The request line, the headers, and the empty line.
            if self.lines > limits::HTTP_HEADERS_MAX && self.at == self.line && *byte != b'\r' {
                return Err(HeadError::TooManyHeaders);
            }
            self.at += 1;
        }
        if self.at >= limits::HTTP_HEAD_MAX { Err(HeadError::TooLong) } else { Ok(None) }
    }
}

/// Takes a head apart that ends where it should.
fn head(text: Vec<u8>) -> Result<Head, HeadError> {
    let text = Secret::new(text);
    let bytes = text.expose();
    let range = |part: &[u8]| {
        // What the parser yields are pieces of what it was given.
        let start = (part.as_ptr() as usize).saturating_sub(bytes.as_ptr() as usize);
        start..start + part.len()
    };
    let mut headers = [httparse::EMPTY_HEADER; limits::HTTP_HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(end)) if end == bytes.len() => {}
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyHeaders),
        _ => return Err(HeadError::Malformed),
    }
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Err(HeadError::Malformed);
    };
    judge(method, target, minor, request.headers)?;
    let (method, target) = (range(method.as_bytes()), range(target.as_bytes()));
    let headers = request.headers.iter().map(|header| (range(header.name.as_bytes()), range(header.value))).collect();
    Ok(Head { method, target, headers, text })
}

/// What HTTP permits and we do not take, because others read it differently.
fn judge(method: &str, target: &str, minor: u8, headers: &[httparse::Header<'_>]) -> Result<(), HeadError> {
    let values = |name: &'static str| {
        headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
    };
    // A name is a token (RFC 9110 §5.6.2), of which some readers make another one.
    if headers
        .iter()
        .any(|header| header.name.is_empty() || header.name.contains(['_', '.']) && is_weighty(header.name))
    {
        return Err(HeadError::Malformed);
    }
    let printable = |text: &[u8]| !text.is_empty() && text.iter().all(u8::is_ascii_graphic);
    match values("host").collect::<Vec<_>>()[..] {
        [host] if printable(host) => {}
        // A client of HTTP/1.0 names none (Python's http.client until 3.12, and a balancer's health check).
        [] if minor == 0 => {}
        _ => return Err(HeadError::Host),
    }
    if values("transfer-encoding").next().is_some() {
        return Err(HeadError::Body);
    }
    match values("content-length").collect::<Vec<_>>()[..] {
        [] | [b"0"] => {}
        _ => return Err(HeadError::Body),
    }
    let well_formed = match method {
        "CONNECT" => !target.contains(['/', '?', '#', '@', '\\']),
        _ => target.starts_with('/') && !target.contains('#'),
    };
    if !well_formed || !printable(target.as_bytes()) {
        return Err(HeadError::Target);
    }
    Ok(())
}

/// Whether a name with `_` or `.` for `-` could be taken for one that we go by.
fn is_weighty(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace(['_', '.'], "-");
    ["host", "content-length", "transfer-encoding", "x-forwarded-for", "proxy-authorization", "caponier-agent"]
        .contains(&name.as_str())
}

/// Why a request could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The connection failed.
    #[error("the connection failed before the head of its request had come")]
    Io(#[source] io::Error),
    /// It was closed.
    #[error("the connection was closed before the head of its request had come")]
    Closed,
    /// Time.
    #[error("the head of a request did not come in time")]
    Timeout,
    /// Bytes.
    #[error(transparent)]
    Head(#[from] HeadError),
}

impl ReadError {
    /// What is held against the address for it; nothing where it may have been the network.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        match self {
            Self::Timeout => Some(Fault::Timeout),
            Self::Head(_) => Some(Fault::Garbage),
            Self::Closed | Self::Io(_) => None,
        }
    }
}

/// Reads the head of a request off a stream. `begun` is what was read of it before.
///
/// # Errors
/// If there is none that we would take by `deadline`.
pub async fn read<S>(stream: &mut S, begun: Bytes, deadline: Instant) -> Result<Request, ReadError>
where
    S: AsyncRead + Unpin,
{
    // As large as it may get, so that no copy of what may be a secret is left behind when it grows.
    let mut text = Vec::with_capacity(limits::HTTP_HEAD_MAX.max(begun.len()));
    text.extend_from_slice(&begun);
    let mut text = Secret::new(text);
    drop(begun);
    let mut scan = Scan::default();
    loop {
        if let Some(end) = scan.go_on(text.expose())? {
            let rest = Bytes::copy_from_slice(&text.expose()[end..]);
            let head = head(text.expose()[..end].to_vec())?;
            return Ok(Request { head, rest });
        }
        match timeout_at(deadline, stream.read_buf(text.expose_mut())).await {
            Ok(Ok(0)) => return Err(ReadError::Closed),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(ReadError::Io(error)),
            Err(_) => return Err(ReadError::Timeout),
        }
    }
}

/// What is said to a client of HTTP, apart from what the CONNECT door says to who asks for a tunnel. Nothing else ever is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// To a balancer's health check.
    Well,
    /// The head is not one that we take.
    BadRequest,
    /// There is nothing here.
    NotFound,
    /// This is not said in clear.
    UpgradeRequired,
    /// The head is too large.
    TooLarge,
}

impl Reply {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Well, Self::BadRequest, Self::NotFound, Self::UpgradeRequired, Self::TooLarge];

    /// The whole of it.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Well => {
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\nCache-Control: no-store\r\n\
                 Connection: close\r\n\r\nok\n"
            }
            Self::BadRequest => "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            Self::NotFound => "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            Self::UpgradeRequired => {
                "HTTP/1.1 426 Upgrade Required\r\nUpgrade: TLS/1.2\r\nContent-Type: text/plain\r\nContent-Length: 40\r\n\
                 Connection: Upgrade, close\r\n\r\nnot in clear: use https:// on this port\n"
            }
            Self::TooLarge => {
                "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            }
        }
    }
}

/// Says so, and what time it is here (RFC 9110 §6.6.1), and ends the connection.
pub async fn answer<S: AsyncRead + AsyncWrite + Unpin>(stream: S, reply: Reply) {
    end(stream, date::dated(reply.text(), Timestamp::now()).as_bytes()).await;
}

/// Ends a connection after the last that is said on it. What the client has sent besides is thrown away, as far as that is a
/// little: a connection that is closed with something unread is reset, and the client might never see what was said.
pub async fn end<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, last: &[u8]) {
    let ending = async {
        stream.write_all(last).await?;
        stream.flush().await?;
        stream.shutdown().await?;
        let mut thrown = [0; 1024];
        let mut left = limits::REFUSED_BYTES;
        while left > 0 {
            match stream.read(&mut thrown).await? {
                0 => break,
                read => left = left.saturating_sub(read),
            }
        }
        Ok::<_, io::Error>(())
    };
    // Whoever does not take it in time, or is gone, has done without.
    drop(timeout(limits::REFUSED_PATIENCE, ending).await);
}

#[cfg(test)]
mod tests;

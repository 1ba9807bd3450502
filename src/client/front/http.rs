//! HTTP CONNECT as a proxy on loopback hears it.
//!
//! This is another promise than that of [`crate::tunnel::http`], which reads what comes through balancers: here no byte behind
//! the head is taken off the socket, which goes on bare; a `Host` is not asked for, because old clients send none; and a browser
//! or a client that wants no tunnel is told so (403, 405), and not merely that its request is bad.

use std::io;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::client::keeper::Cause;
use crate::limits;
use crate::target::{Target, TargetError};

/// Why there is no target.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// Not HTTP, or not well formed.
    #[error("its request is not well formed: {0}")]
    Form(&'static str),
    /// Something else than CONNECT.
    #[error("its method is not CONNECT")]
    Method,
    /// A web page has asked for it.
    #[error("it comes from a web page")]
    Page,
    /// A name or a port that is none.
    #[error("its target is not well formed: {0}")]
    Target(TargetError),
    /// Too much.
    #[error("its head is longer than {} bytes", limits::FRONT_HEAD_MAX)]
    Long,
    /// Time.
    #[error("it has not asked for anything in time")]
    Slow,
    /// It went away.
    #[error("it went away: {0}")]
    Io(#[from] io::Error),
}

impl Fault {
    pub(super) fn reply(&self) -> Vec<u8> {
        match self {
            Self::Form(_) => answer(400, "Bad Request", "", "bad_request", "this is no well-formed CONNECT request"),
            Self::Method => answer(
                405,
                "Method Not Allowed",
                "Allow: CONNECT\r\n",
                "method_not_allowed",
                "this proxy serves CONNECT only: use https://, or a client that also makes tunnels for http://",
            ),
            Self::Page => answer(403, "Forbidden", "", "not_allowed", "this proxy does not serve web pages"),
            Self::Target(_) => {
                answer(400, "Bad Request", "", "bad_target", "CONNECT wants HOST:PORT, a name or an address and a port")
            }
            Self::Long => answer(431, "Request Header Fields Too Large", "", "too_large", "the request is too long"),
            Self::Slow => answer(408, "Request Timeout", "", "timeout", "no request has come in time"),
            Self::Io(_) => Vec::new(),
        }
    }
}

/// Reads what is wanted, up to the last byte of the request's head.
pub(super) async fn ask(stream: &mut TcpStream) -> Result<Target, Fault> {
    parse(&head(stream).await?)
}

/// It is connected.
pub(super) const OPENED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

/// It is not.
pub(super) fn refused(cause: Cause) -> Vec<u8> {
    match cause {
        Cause::NotAllowed => answer(403, "Forbidden", "", "not_allowed", "not allowed"),
        Cause::NotAvailable => answer(502, "Bad Gateway", "", "not_available", "not available"),
        Cause::Busy => answer(503, "Service Unavailable", "", "busy", "try again"),
        Cause::NoSession => answer(503, "Service Unavailable", "", "no_session", "there is no session with the server"),
        Cause::Timeout => answer(504, "Gateway Timeout", "", "timeout", "no answer has come in time"),
    }
}

fn answer(status: u16, reason: &str, headers: &str, error: &str, message: &str) -> Vec<u8> {
    let body = format!("{{\"error\":\"{error}\",\"message\":\"{message}\"}}\n");
    format!(
        "HTTP/1.1 {status} {reason}\r\n{headers}Content-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// A request's head, with its empty line. What follows it stays unread.
async fn head(stream: &mut TcpStream) -> Result<Vec<u8>, Fault> {
    let mut head = Vec::new();
    let mut chunk = [0; 2048];
    loop {
        let seen = stream.peek(&mut chunk).await?;
        if seen == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let begun = head.len();
        head.extend_from_slice(&chunk[..seen]);
        let end = head[begun.saturating_sub(END.len() - 1)..].windows(END.len()).position(|window| window == END);
        let end = end.map(|at| begun.saturating_sub(END.len() - 1) + at + END.len());
        head.truncate(end.unwrap_or(head.len()));
        stream.read_exact(&mut chunk[..head.len() - begun]).await?;
        // Not HTTP, or not what we take for it: there is no need to wait for more of it.
        if !head[0].is_ascii_uppercase() {
            return Err(Fault::Form("it is not HTTP"));
        }
        if !ends_lines_well(&head) {
            return Err(Fault::Form("a line ends with LF or CR alone"));
        }
        if head.len() > limits::FRONT_HEAD_MAX {
            return Err(Fault::Long);
        }
        if end.is_some() {
            return Ok(head);
        }
    }
}

const END: &[u8] = b"\r\n\r\n";

/// Whether CR and LF come together only; the last byte may be a CR that waits for its LF.
fn ends_lines_well(head: &[u8]) -> bool {
    let pairs = head.windows(2).all(|pair| (pair[0] == b'\r') == (pair[1] == b'\n'));
    pairs && head.first() != Some(&b'\n')
}

/// The target of a CONNECT.
fn parse(head: &[u8]) -> Result<Target, Fault> {
    let text = std::str::from_utf8(head).ok().filter(|text| text.is_ascii()).ok_or(Fault::Form("it is not ASCII"))?;
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some("HTTP/1.1" | "HTTP/1.0"), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Fault::Form("its first line is none"));
    };
    if method != "CONNECT" {
        return Err(Fault::Method);
    }
    let mut hosts = 0;
    let mut page = false;
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').ok_or(Fault::Form("a line is no field"))?;
        if name.is_empty()
            || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
        {
            return Err(Fault::Form("a field has no name"));
        }
        if value.bytes().any(|byte| byte.is_ascii_control() && byte != b'\t') {
            return Err(Fault::Form("a field holds control characters"));
        }
        match name.to_ascii_lowercase().as_str() {
            "host" => hosts += 1,
            "transfer-encoding" => return Err(Fault::Form("it has a body")),
            "content-length" if value.trim() != "0" => return Err(Fault::Form("it has a body")),
            // Only pages send them, and a browser adds them to what a page asks for, whether or not it wants to.
            "origin" => page = true,
            name if name.starts_with("sec-fetch-") => page = true,
            _ => {}
        }
    }
    if page {
        return Err(Fault::Page);
    }
    if hosts > 1 {
        return Err(Fault::Form("it has several Host fields"));
    }
    target.parse().map_err(Fault::Target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_connect_is_taken() {
        let status = |request: &str| match parse(request.as_bytes()) {
            Ok(target) => target.to_string(),
            Err(fault) => String::from_utf8_lossy(&fault.reply()).split(' ').nth(1).expect("a status").to_owned(),
        };
        for (request, answer) in [
            ("CONNECT api.internal:6443 HTTP/1.1\r\nHost: api.internal:6443\r\n\r\n", "api.internal:6443"),
            ("CONNECT API.Internal.:443 HTTP/1.1\r\nHost: x\r\nUser-Agent: curl/8\r\n\r\n", "api.internal:443"),
            ("CONNECT [2001:db8::1]:443 HTTP/1.0\r\n\r\n", "[2001:db8::1]:443"),
            ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nProxy-Authorization: Basic eDp5\r\n\r\n", "a:1"),
            ("GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", "405"),
            ("POST / HTTP/1.1\r\nHost: 127.0.0.1:8118\r\nOrigin: https://evil.example\r\n\r\n", "405"),
            ("OPTIONS / HTTP/1.1\r\nHost: a\r\n\r\n", "405"),
            ("connect a:1 HTTP/1.1\r\nHost: a\r\n\r\n", "405"),
            ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nOrigin: null\r\n\r\n", "403"),
            ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nSec-Fetch-Mode: no-cors\r\n\r\n", "403"),
            ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", "400"),
            ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n", "400"),
            ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: +0\r\n\r\n", "400"),
            ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400"),
            ("CONNECT a:1 HTTP/1.1\r\nHost : a\r\n\r\n", "400"),
            ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", "400"),
            ("CONNECT a:1 HTTP/1.1\r\nX: a\0\r\n\r\n", "400"),
            ("CONNECT a:1 HTTP/1.1\r\nX: ä\r\n\r\n", "400"),
            ("CONNECT a:1 HTTP/2\r\n\r\n", "400"),
            ("CONNECT  a:1 HTTP/1.1\r\n\r\n", "400"),
            ("CONNECT a:1\r\n\r\n", "400"),
            ("CONNECT a HTTP/1.1\r\n\r\n", "400"),
            ("CONNECT a:0 HTTP/1.1\r\n\r\n", "400"),
            ("CONNECT u@a:1 HTTP/1.1\r\n\r\n", "400"),
            ("CONNECT 2130706433:1 HTTP/1.1\r\n\r\n", "400"),
            ("CONNECT https://a:1/ HTTP/1.1\r\n\r\n", "400"),
        ] {
            assert_eq!(status(request), answer, "{request}");
        }
    }

    #[test]
    fn lines_end_with_both() {
        for (head, good) in [
            ("a\r\nb\r\n\r\n", true),
            ("a\r\nb\r", true),
            ("a\nb", false),
            ("a\rb", false),
            ("\na", false),
            ("a\r\n\n", false),
            ("a\r\r\n", false),
        ] {
            assert_eq!(ends_lines_well(head.as_bytes()), good, "{head:?}");
        }
    }
}

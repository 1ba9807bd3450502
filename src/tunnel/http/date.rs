//! What time it is at the other end, as its replies say (RFC 9110 §6.6.1).
//!
//! Promised: what is read of a reply is bounded, and a peer that says nothing is waited for until the deadline and no longer.

use jiff::Timestamp;
use jiff::fmt::rfc2822;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use crate::limits;
use crate::target::Target;

/// What a peer has answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The status code.
    pub status: u16,
    /// What time it is there, by itself.
    pub date: Option<Timestamp>,
    /// Where it would have one go: a captive portal says so.
    pub location: Option<String>,
}

/// A reply with the time in it, behind its first line.
pub(super) fn dated(reply: &str, now: Timestamp) -> String {
    // A year beyond 9999 has no such form, and then there is none.
    let date = rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&now);
    match (reply.split_once("\r\n"), date) {
        (Some((first, rest)), Ok(date)) => format!("{first}\r\nDate: {date}\r\n{rest}"),
        _ => reply.to_owned(),
    }
}

/// Asks for the health of what is at `to`, and reads what time it is there. `None` if what comes is no reply of HTTP.
pub async fn ask<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, to: &Target, deadline: Instant) -> Option<Told> {
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n");
    let asked = async {
        stream.write_all(request.as_bytes()).await.ok()?;
        stream.flush().await.ok()?;
        let mut reply = Vec::new();
        loop {
            let mut more = [0; 1024];
            let read = stream.read(&mut more).await.ok()?;
            reply.extend_from_slice(more.get(..read)?);
            let whole = reply.windows(4).any(|end| end == b"\r\n\r\n");
            if whole || read == 0 || reply.len() >= limits::CONNECT_REPLY_MAX {
                return told(&reply);
            }
        }
    };
    timeout_at(deadline, asked).await.ok().flatten()
}

fn told(reply: &[u8]) -> Option<Told> {
    let mut headers = [httparse::EMPTY_HEADER; limits::HTTP_HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    response.parse(reply).ok()?;
    let status = response.code?;
    let header = |name: &str| {
        let header = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(header.value).ok()
    };
    let date = header("date").and_then(|date| rfc2822::DateTimeParser::new().parse_timestamp(date).ok());
    Some(Told { status, date, location: header("location").map(|place| place.chars().take(200).collect()) })
}

#[cfg(test)]
mod tests {
    use super::super::Reply;
    use super::*;

    #[test]
    fn every_reply_says_what_time_it_is() {
        let now: Timestamp = "2026-11-21T20:00:05Z".parse().expect("a moment");
        for reply in Reply::ALL {
            let text = dated(reply.text(), now);
            assert!(text.contains("\r\nDate: Sat, 21 Nov 2026 20:00:05 GMT\r\n"), "{text}");
            assert_eq!(text.replace("Date: Sat, 21 Nov 2026 20:00:05 GMT\r\n", ""), reply.text());
            assert_eq!(told(text.as_bytes()).expect("a reply").date, Some(now));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_waited_for_beyond_the_deadline_and_no_flood_is_kept() {
        let to: Target = "gateway:443".parse().expect("a target");
        let deadline = || Instant::now() + std::time::Duration::from_secs(5);
        let (near, far) = tokio::io::duplex(1024);
        assert_eq!(ask(near, &to, deadline()).await, None);
        drop(far);
        let (near, mut far) = tokio::io::duplex(1024);
        let flood = async { while far.write_all(&[b'x'; 1024]).await.is_ok() {} };
        let (asked, ()) = tokio::join!(ask(near, &to, deadline()), flood);
        assert_eq!(asked, None);
        let (near, mut far) = tokio::io::duplex(1024);
        far.write_all(b"HTTP/1.1 302 Found\r\nLocation: http://portal/\r\n\r\n").await.expect("written");
        let told = ask(near, &to, deadline()).await.expect("a reply");
        assert_eq!((told.status, told.date, told.location.as_deref()), (302, None, Some("http://portal/")));
    }
}

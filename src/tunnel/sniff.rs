//! What a connection speaks, by its first bytes: SSH, TLS or HTTP.
//!
//! Promised: [`tell`] is pure and total, knows it after a few bytes, and knows at the first wrong byte that it is none of
//! them; [`sniff`] reads no more than [`limits::SNIFF_MAX`] bytes before it knows, under a deadline, and loses none of them.
//! A peer that waits for a server's line first gets it after [`limits::IDENTIFICATION_PATIENCE`]; from then on it speaks SSH,
//! or nothing.

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::admit::{Awaited, GreetError};
use super::wire::{IdentificationError, Peer};
use crate::limits;

/// What a peer speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// An identification string of SSH begins.
    Ssh,
    /// A TLS record with a client's hello begins.
    Tls,
    /// A request of HTTP/1 begins.
    Http,
}

/// The first bytes are those of none of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unknown;

/// What begins an identification string (RFC 4253 §4.2).
const SSH: &[u8] = b"SSH-";

/// The methods of HTTP (RFC 9110 §9.3, RFC 5789), each with the space that follows it. `PRI`, of HTTP/2, is none of them.
const METHODS: &[&[u8]] =
    &[b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"CONNECT ", b"OPTIONS ", b"TRACE ", b"PATCH "];

/// A record of the handshake, of TLS 1.0 to 1.3 as it says of itself (RFC 8446 §5.1), and a client's hello in it (§4).
const HANDSHAKE: u8 = 22;
const VERSION: u8 = 3;
const MINORS: std::ops::RangeInclusive<u8> = 0..=4;
const CLIENT_HELLO: u8 = 1;

/// Says what the first bytes of a connection are. `None` means that there are too few.
///
/// # Errors
/// If they are nothing that is spoken here, whatever may follow.
pub fn tell(read: &[u8]) -> Result<Option<Protocol>, Unknown> {
    let begins = |with: &[u8]| read.iter().zip(with).all(|(one, other)| one == other);
    let complete = |with: &[u8], is| if read.len() < with.len() { Ok(None) } else { Ok(Some(is)) };
    let Some(first) = read.first() else { return Ok(None) };
    if *first == HANDSHAKE {
        return hello(read);
    }
    if begins(SSH) {
        return complete(SSH, Protocol::Ssh);
    }
    match METHODS.iter().find(|method| begins(method)) {
        Some(method) if read.len() >= method.len() => Ok(Some(Protocol::Http)),
        // Several may begin alike.
        Some(_) => Ok(None),
        None => Err(Unknown),
    }
}

/// The header of a record, and the type of the first message in it.
fn hello(read: &[u8]) -> Result<Option<Protocol>, Unknown> {
    let fits = |at: usize, fits: &dyn Fn(u8) -> bool| read.get(at).is_none_or(|byte| fits(*byte));
    // A message has four bytes before its own, and a record 2^14 at most.
    let length = read.get(3..5).map(|bytes| usize::from(u16::from_be_bytes([bytes[0], bytes[1]])));
    let length_fits = length.is_none_or(|length| (4..=1 << 14).contains(&length));
    if !fits(1, &|byte| byte == VERSION)
        || !fits(2, &|byte| MINORS.contains(&byte))
        || !length_fits
        || !fits(5, &|byte| byte == CLIENT_HELLO)
    {
        return Err(Unknown);
    }
    Ok((read.len() > 5).then_some(Protocol::Tls))
}

/// A connection of which the first bytes have come.
#[derive(Debug)]
pub struct Sniffed {
    /// What it speaks.
    pub protocol: Protocol,
    /// Everything read so far, to be read again.
    pub head: Bytes,
    /// The line that has already been sent in our name, if any, without its end.
    pub said: Option<&'static str>,
}

/// Reads the first bytes of a stream. `head` is what was read of it before. Where `first` is given, a peer that stays silent
/// for [`limits::IDENTIFICATION_PATIENCE`] is sent that line.
///
/// # Errors
/// If they do not come by `deadline`, or are nothing that is spoken here.
pub async fn sniff<S>(
    stream: &mut S,
    head: Bytes,
    first: Option<&'static str>,
    deadline: Instant,
) -> Result<Sniffed, GreetError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut read = BytesMut::from(&head[..]);
    let mut awaited = Awaited::new(first, deadline);
    loop {
        match tell(&read) {
            // Only who speaks SSH waits for our line, and nobody else could make anything of it.
            Ok(Some(protocol)) if awaited.said.is_none() || protocol == Protocol::Ssh => {
                return Ok(Sniffed { protocol, head: read.freeze(), said: awaited.said });
            }
            Ok(None) => {}
            Ok(Some(_)) | Err(Unknown) => return Err(unknown(&read).into()),
        }
        read.reserve(limits::SNIFF_MAX.saturating_sub(read.len()).max(1));
        awaited.more(stream, &mut read).await?;
    }
}

fn unknown(read: &[u8]) -> IdentificationError {
    Peer::parse(&read[..read.len().min(200)]).err().unwrap_or(IdentificationError::Malformed)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const HELLO: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn the_first_bytes_tell_and_too_few_do_not() {
        for (bytes, protocol, enough) in [
            (&b"SSH-2.0-OpenSSH_9.2\r\n"[..], Protocol::Ssh, 4),
            (b"SSH-1.5-x\r\n", Protocol::Ssh, 4),
            (HELLO, Protocol::Tls, 6),
            (b"GET / HTTP/1.1\r\n\r\n", Protocol::Http, 4),
            (b"CONNECT db:5432 HTTP/1.1\r\n\r\n", Protocol::Http, 8),
            (b"PATCH / HTTP/1.1\r\n\r\n", Protocol::Http, 6),
            (b"PUT / HTTP/1.1\r\n\r\n", Protocol::Http, 4),
            (b"POST / HTTP/1.1\r\n\r\n", Protocol::Http, 5),
        ] {
            for length in 0..=bytes.len() {
                let expected = (length >= enough).then_some(protocol);
                assert_eq!(tell(&bytes[..length]), Ok(expected), "{length} of {}", bytes.escape_ascii());
            }
        }
    }

    #[test]
    fn everything_else_is_refused_at_its_first_wrong_byte() {
        for (bytes, wrong) in [
            (&b"\n"[..], 1),
            (b"\0", 1),
            (b"SSX-", 3),
            (b"ssh-2.0", 1),
            (b"get / HTTP/1.1", 1),
            (b"GETT / ", 4),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 2),
            (b"CONNECT\tdb", 8),
            (b"\x16\x02", 2),
            (b"\x16\x03\x05", 3),
            (b"\x16\x03\x01\x00\x03", 5),
            (b"\x16\x03\x01\x40\x01", 5),
            // A server's hello, an alert, application data, and a hello of SSL 2.
            (b"\x16\x03\x01\x02\x00\x02", 6),
            (b"\x15\x03\x01\x00\x02", 1),
            (b"\x17\x03\x03\x00\x20", 1),
            (b"\x80\x2e\x01\x03\x01", 1),
            (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\r\n", 2),
        ] {
            assert_eq!(tell(&bytes[..wrong - 1]), Ok(None), "{}", bytes.escape_ascii());
            for length in wrong..=bytes.len() {
                assert_eq!(tell(&bytes[..length]), Err(Unknown), "{length} of {}", bytes.escape_ascii());
            }
        }
    }

    #[tokio::test]
    async fn nothing_that_was_read_is_lost_however_it_comes() {
        for bytes in [HELLO, b"SSH-2.0-x\r\nmore", b"CONNECT db:1 HTTP/1.1\r\n\r\n"] {
            let (mut near, mut far) = tokio::io::duplex(1);
            let sending = async {
                far.write_all(bytes).await.expect("written");
                drop(far);
            };
            let receiving = async {
                let sniffed = sniff(&mut near, Bytes::new(), None, soon()).await.expect("something known");
                let mut all = sniffed.head.to_vec();
                near.read_to_end(&mut all).await.expect("read");
                all
            };
            assert_eq!(tokio::join!(sending, receiving).1, bytes);
            // What came in behind a balancer's header counts.
            let (mut near, _far) = tokio::io::duplex(64);
            let sniffed = sniff(&mut near, Bytes::from_static(bytes), None, soon()).await.expect("something known");
            assert_eq!(sniffed.head, bytes);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_gets_our_line_and_then_speaks_ssh_or_nothing() {
        for (bytes, fine) in [(&b"SSH-2.0-x\r\n"[..], true), (HELLO, false), (b"GET / HTTP/1.1\r\n\r\n", false)] {
            let (mut near, mut far) = tokio::io::duplex(64);
            let peer = async {
                let mut line = [0; 20];
                far.read_exact(&mut line).await.expect("our line");
                assert_eq!(&line, b"SSH-2.0-caponier_1\r\n");
                far.write_all(bytes).await.expect("written");
            };
            let line = Some(crate::tunnel::wire::DOOR_LINE);
            let (sniffed, ()) = tokio::join!(sniff(&mut near, Bytes::new(), line, soon()), peer);
            assert_eq!(sniffed.is_ok_and(|sniffed| sniffed.said.is_some()), fine, "{}", bytes.escape_ascii());
        }
        let (mut near, _far) = tokio::io::duplex(64);
        let begun = Instant::now();
        let error = sniff(&mut near, Bytes::new(), None, soon()).await.expect_err("silence");
        assert!(matches!(error, GreetError::Timeout), "{error:?}");
        assert_eq!(begun.elapsed(), Duration::from_secs(20));
    }
}

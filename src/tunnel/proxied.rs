//! The PROXY protocol, versions 1 and 2: how a TCP balancer says whose connection it passes on.
//!
//! Promised: [`parse`] is pure and total, looks at no more than [`limits::PROXY_HEADER_MAX`] bytes, knows at the first wrong
//! byte that there is no header, and takes nothing that does not follow the specification to the letter: another reader of
//! the same bytes, such as the balancer, must not come to another address. [`read`] loses no byte that follows the header.
//! Who may send one is the caller's business: from anybody but a known balancer it is a lie.
//!
//! Written here because it is a few lines, and because what the crates for it take is more than that (a second space, a
//! leading zero, an unfinished line of any length).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, timeout_at};

use crate::limits;

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The client; `None` where the balancer speaks for itself, as in its health checks.
    pub client: Option<SocketAddr>,
    /// Its bytes, after which the client's own begin.
    pub length: usize,
}

/// Why there is no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Other bytes.
    #[error("this does not begin with a PROXY protocol header")]
    Missing,
    /// Nearly one.
    #[error("a malformed PROXY protocol header: {0}")]
    Malformed(&'static str),
    /// One that does not end.
    #[error("a PROXY protocol header of more than {} bytes", limits::PROXY_HEADER_MAX)]
    TooLong,
}

/// What version 2 begins with.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// What version 1 begins with.
const WORD: &[u8] = b"PROXY ";

/// The longest line of version 1, with its end.
const LINE_MAX: usize = 107;

/// Looks for a header at the beginning of `read`. `None` means that it is not complete.
///
/// # Errors
/// If there is none, whatever may follow.
pub fn parse(read: &[u8]) -> Result<Option<Header>, HeaderError> {
    let begins = |with: &[u8]| read.iter().zip(with).all(|(one, other)| one == other);
    if begins(SIGNATURE) {
        return binary(read);
    }
    if begins(WORD) {
        return line(read);
    }
    Err(HeaderError::Missing)
}

/// Version 2, of which the signature is right as far as it is there.
fn binary(read: &[u8]) -> Result<Option<Header>, HeaderError> {
    let after = &read[SIGNATURE.len().min(read.len())..];
    let Some(&command) = after.first() else { return Ok(None) };
    let local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err(HeaderError::Malformed("an unknown version or command")),
    };
    let Some(&family) = after.get(1) else { return Ok(None) };
    // An address of neither kind is one's own to interpret, or the balancer's.
    let addresses = match family {
        _ if local => 0,
        0x00 => 0,
        0x11 => 12,
        0x21 => 36,
        0x31 | 0x32 => return Err(HeaderError::Malformed("an address that is a path")),
        _ => return Err(HeaderError::Malformed("an unknown family or protocol")),
    };
    let Some(&[high, low]) = after.get(2..4) else { return Ok(None) };
    let stated = usize::from(u16::from_be_bytes([high, low]));
    let length = SIGNATURE.len() + 4 + stated;
    if length > limits::PROXY_HEADER_MAX {
        return Err(HeaderError::TooLong);
    }
    if stated < addresses {
        return Err(HeaderError::Malformed("its length leaves no room for its addresses"));
    }
    let Some(body) = read.get(SIGNATURE.len() + 4..length) else { return Ok(None) };
    let client = match addresses {
        12 => body.first_chunk::<4>().map(|bytes| IpAddr::from(Ipv4Addr::from(*bytes))).zip(port(body, 8)),
        36 => body.first_chunk::<16>().map(|bytes| IpAddr::from(Ipv6Addr::from(*bytes))).zip(port(body, 32)),
        _ => None,
    };
    Ok(Some(Header { client: client.map(canonical), length }))
}

fn port(body: &[u8], at: usize) -> Option<u16> {
    body.get(at..)?.first_chunk::<2>().map(|bytes| u16::from_be_bytes(*bytes))
}

/// Version 1, of which the first word is right as far as it is there.
fn line(read: &[u8]) -> Result<Option<Header>, HeaderError> {
    let seen = &read[..read.len().min(LINE_MAX)];
    let Some(end) = seen.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
        return if seen.len() < LINE_MAX { Ok(None) } else { Err(HeaderError::TooLong) };
    };
    match (seen[end], seen.get(end + 1)) {
        (b'\r', Some(b'\n')) => {}
        (b'\r', None) if seen.len() < LINE_MAX => return Ok(None),
        (b'\r', None) => return Err(HeaderError::TooLong),
        _ => return Err(HeaderError::Malformed("its line does not end as it should")),
    }
    let length = end + 2;
    let text = std::str::from_utf8(&seen[..end]).map_err(|_| HeaderError::Malformed("it is not ASCII"))?;
    let mut words = text.split(' ').skip(1);
    let client = match words.next() {
        // Whatever follows is to be ignored.
        Some("UNKNOWN") => return Ok(Some(Header { client: None, length })),
        Some("TCP4") => addresses::<Ipv4Addr>(words),
        Some("TCP6") => addresses::<Ipv6Addr>(words),
        _ => return Err(HeaderError::Malformed("an unknown protocol")),
    };
    let client = client.ok_or(HeaderError::Malformed("two addresses and two ports were expected"))?;
    Ok(Some(Header { client: Some(client), length }))
}

/// Source, destination, source's port, destination's port.
fn addresses<'a, A: FromStr + Into<IpAddr>>(mut words: impl Iterator<Item = &'a str>) -> Option<SocketAddr> {
    let mut address = || words.next()?.parse::<A>().ok().map(Into::into);
    let (source, _) = (address()?, address()?);
    let mut port = || {
        let word = words.next()?;
        let plain = word.bytes().all(|byte| byte.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
        word.parse::<u16>().ok().filter(|_| plain)
    };
    let (of_source, _) = (port()?, port()?);
    words.next().is_none().then(|| canonical((source, of_source)))
}

/// An IPv4 address stays one where a balancer carries it as an IPv6 address.
fn canonical((address, port): (IpAddr, u16)) -> SocketAddr {
    SocketAddr::new(address.to_canonical(), port)
}

/// Why a header could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The connection failed.
    #[error("the connection failed before its PROXY protocol header had come")]
    Io(#[source] io::Error),
    /// It was closed.
    #[error("the connection was closed before its PROXY protocol header had come")]
    Closed,
    /// Time.
    #[error("no PROXY protocol header came in time")]
    Timeout,
    /// Bytes.
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// Reads a header off the beginning of a stream: whose connection it is, and what has been read beyond.
///
/// # Errors
/// If there is none by `deadline`.
pub async fn read<S>(stream: &mut S, deadline: Instant) -> Result<(Option<SocketAddr>, Bytes), ReadError>
where
    S: AsyncRead + Unpin,
{
    let mut read = BytesMut::with_capacity(256);
    loop {
        if let Some(header) = parse(&read)? {
            return Ok((header.client, read.split_off(header.length).freeze()));
        }
        match timeout_at(deadline, stream.read_buf(&mut read)).await {
            Ok(Ok(0)) => return Err(ReadError::Closed),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(ReadError::Io(error)),
            Err(_) => return Err(ReadError::Timeout),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    use super::*;

    /// A header of version 2.
    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).expect("short").to_be_bytes();
        [SIGNATURE, &[command, family], &length, body].concat()
    }

    const V4: [u8; 12] = [192, 0, 2, 1, 10, 0, 0, 1, 0xdc, 0x04, 0x01, 0xbb];

    fn v6(source: &str) -> Vec<u8> {
        let source: Ipv6Addr = source.parse().expect("an address");
        [&source.octets()[..], &Ipv6Addr::LOCALHOST.octets(), &[0xdc, 0x04, 0x01, 0xbb]].concat()
    }

    fn good() -> Vec<(Vec<u8>, Option<&'static str>)> {
        let tlv = [&V4[..], &[0x04, 0, 2, 1, 2], &[0xee, 0xff, 0xff]].concat();
        vec![
            (b"PROXY TCP4 192.0.2.1 10.0.0.1 56324 443\r\n".to_vec(), Some("192.0.2.1:56324")),
            (b"PROXY TCP6 2001:db8::1 ::1 56324 443\r\n".to_vec(), Some("[2001:db8::1]:56324")),
            (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:10.0.0.1 0 65535\r\n".to_vec(), Some("192.0.2.1:0")),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN what ever it is 1 2 3\r\n".to_vec(), None),
            (v2(0x21, 0x11, &V4), Some("192.0.2.1:56324")),
            (v2(0x21, 0x11, &tlv), Some("192.0.2.1:56324")),
            (v2(0x21, 0x21, &v6("2001:db8::1")), Some("[2001:db8::1]:56324")),
            (v2(0x21, 0x21, &v6("::ffff:192.0.2.1")), Some("192.0.2.1:56324")),
            (v2(0x20, 0x00, &[]), None),
            (v2(0x20, 0x11, &V4), None),
            (v2(0x20, 0xff, b"anything"), None),
            (v2(0x21, 0x00, b"anything"), None),
        ]
    }

    #[test]
    fn reads_headers_with_all_their_beginnings_and_not_a_byte_more() {
        for (bytes, client) in good() {
            for end in 0..bytes.len() {
                assert_eq!(parse(&bytes[..end]), Ok(None), "{:?}", String::from_utf8_lossy(&bytes[..end]));
            }
            for after in [&b""[..], b"SSH-2.0-x\r\n", b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\n", b"\n"] {
                let header = parse(&[&bytes[..], after].concat()).expect("a header").expect("complete");
                assert_eq!(header.length, bytes.len());
                assert_eq!(header.client.map(|client| client.to_string()).as_deref(), client);
            }
        }
    }

    #[test]
    fn refuses_everything_else_at_once() {
        let lines: &[&[u8]] = &[
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"GET / HTTP/1.1\r\n",
            b"proxy TCP4 192.0.2.1 10.0.0.1 1 1\r\n",
            b" PROXY TCP4 192.0.2.1 10.0.0.1 1 1\r\n",
            b"PROXYTCP4",
            b"PROXY\r\n",
            b"PROXY \r\n",
            b"PROXY TCP4\r\n",
            b"PROXY TCP5 192.0.2.1 10.0.0.1 1 1\r\n",
            b"PROXY UDP4 192.0.2.1 10.0.0.1 1 1\r\n",
            b"PROXY UNKNOWNTCP4 192.0.2.1 10.0.0.1 1 1\r\n",
            b"PROXY UNIX /a /b\r\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 1\r\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 1 1 1\r\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 1 1 \r\n",
            b"PROXY TCP4  192.0.2.1 10.0.0.1 1 1\r\n",
            b"PROXY  TCP4 192.0.2.1 10.0.0.1 1 1\r\n",
            b"PROXY TCP4\t192.0.2.1 10.0.0.1 1 1\r\n",
            b"PROXY TCP4 192.0.2.01 10.0.0.1 1 1\r\n",
            b"PROXY TCP4 3221225985 10.0.0.1 1 1\r\n",
            b"PROXY TCP4 192.0.2.1/32 10.0.0.1 1 1\r\n",
            b"PROXY TCP4 192.0.2.1 ::1 1 1\r\n",
            b"PROXY TCP4 2001:db8::1 ::1 1 1\r\n",
            b"PROXY TCP6 192.0.2.1 10.0.0.1 1 1\r\n",
            b"PROXY TCP6 fe80::1%eth0 ::1 1 1\r\n",
            b"PROXY TCP6 [2001:db8::1] ::1 1 1\r\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 65536 1\r\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 -1 1\r\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 +1 1\r\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 01 1\r\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 1 1\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 1 1\rx",
            b"PROXY TCP4 192.0.2.1\0 10.0.0.1 1 1\r\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 1 \xb9\r\n",
        ];
        for bytes in lines {
            assert!(parse(bytes).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
        let long = [b"PROXY UNKNOWN ".to_vec(), vec![b'x'; 200], b"\r\n".to_vec()].concat();
        assert_eq!(parse(&long), Err(HeaderError::TooLong));
        assert_eq!(parse(&long[..LINE_MAX]), Err(HeaderError::TooLong));
        assert_eq!(
            parse(&[b"PROXY UNKNOWN ".to_vec(), vec![b'x'; 92], b"\r".to_vec()].concat()),
            Err(HeaderError::TooLong)
        );
        for bytes in [
            v2(0x11, 0x11, &V4),
            v2(0x22, 0x11, &V4),
            v2(0x01, 0x11, &V4),
            v2(0x21, 0x12, &V4),
            v2(0x21, 0x22, &v6("::1")),
            v2(0x21, 0x31, &[0; 216]),
            v2(0x21, 0x32, &[0; 216]),
            v2(0x21, 0x41, &V4),
            v2(0x21, 0x11, &V4[..11]),
            v2(0x21, 0x21, &V4),
            v2(0x21, 0x11, &[]),
            v2(0x21, 0x11, &vec![0; limits::PROXY_HEADER_MAX]),
            v2(0x20, 0x00, &vec![0; limits::PROXY_HEADER_MAX]),
            b"\r\n\r\nSSH-2.0-x".to_vec(),
        ] {
            assert!(parse(&bytes).is_err(), "{bytes:x?}");
        }
        // Before what is wrong could be waited for.
        assert!(parse(&v2(0x21, 0x31, &[])[..14]).is_err());
        assert!(parse(&v2(0x22, 0x11, &[])[..13]).is_err());
        assert_eq!(parse(&[SIGNATURE, &[0x21, 0x11, 0xff, 0xff]].concat()), Err(HeaderError::TooLong));
    }

    #[tokio::test(start_paused = true)]
    async fn reads_in_pieces_keeps_what_follows_and_waits_no_longer_than_allowed() {
        let soon = || Instant::now() + std::time::Duration::from_secs(20);
        for (bytes, client) in good() {
            let (mut near, mut far) = tokio::io::duplex(4096);
            let all = [&bytes[..], b"SSH-2.0-x\r\nmore"].concat();
            let write = async {
                for byte in &all {
                    far.write_all(&[*byte]).await.expect("written");
                    tokio::task::yield_now().await;
                }
            };
            let (read, ()) = tokio::join!(read(&mut near, soon()), write);
            let (found, mut rest) = read.map(|(found, rest)| (found, rest.to_vec())).expect("a header");
            assert_eq!(found.map(|client| client.to_string()).as_deref(), client);
            drop(far);
            near.read_to_end(&mut rest).await.expect("read");
            assert_eq!(rest, b"SSH-2.0-x\r\nmore");
        }
        let (mut near, mut far) = tokio::io::duplex(4096);
        far.write_all(b"PROXY TCP4 ").await.expect("written");
        assert!(matches!(read(&mut near, soon()).await, Err(ReadError::Timeout)));
        drop(far);
        assert!(matches!(read(&mut near, soon()).await, Err(ReadError::Closed)));
    }

    proptest! {
        /// More bytes complete a header or show that there is none; they change no answer.
        #[test]
        fn an_answer_stays_as_it_is(
            start in prop::sample::select(vec![&b""[..], WORD, SIGNATURE, b"PROXY TCP4 1.1.1.1 ", b"\r\n\r\n\0\r\nQUIT\n\x21\x11"]),
            tail in prop::collection::vec(any::<u8>(), 0..700),
        ) {
            let bytes = [start, &tail[..]].concat();
            let mut answer = Ok(None);
            for end in 0..=bytes.len() {
                let now = parse(&bytes[..end]);
                if answer != Ok(None) {
                    prop_assert_eq!(now, answer);
                }
                if let Ok(Some(header)) = now {
                    prop_assert!(header.length <= end.min(limits::PROXY_HEADER_MAX));
                }
                prop_assert!(now != Ok(None) || end < limits::PROXY_HEADER_MAX);
                answer = now;
            }
        }

        #[test]
        fn what_a_balancer_writes_is_what_is_read(source in any::<SocketAddr>()) {
            let source = SocketAddr::new(source.ip(), source.port());
            let destination = match source.ip() {
                IpAddr::V4(_) => IpAddr::from([10, 0, 0, 1]),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            let ports = [source.port().to_be_bytes(), [1, 187]].concat();
            let (protocol, family, octets) = match (source.ip(), destination) {
                (IpAddr::V4(one), IpAddr::V4(other)) => ("TCP4", 0x11, [one.octets(), other.octets()].concat()),
                (IpAddr::V6(one), IpAddr::V6(other)) => ("TCP6", 0x21, [one.octets(), other.octets()].concat()),
                _ => unreachable!("of one family"),
            };
            let text = format!("PROXY {protocol} {} {destination} {} 443\r\n", source.ip(), source.port());
            for bytes in [text.into_bytes(), v2(0x21, family, &[octets, ports].concat())] {
                let client = parse(&bytes).expect("a header").expect("complete").client;
                prop_assert_eq!(client, Some(SocketAddr::new(source.ip().to_canonical(), source.port())));
            }
        }
    }
}

//! PROXY protocol headers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use caponier::limits;
use caponier::tunnel::proxied::{HeaderError, parse};

/// A header is found as soon as it is complete and not before, whatever follows it; what is refused stays so whatever follows;
/// and an address is the one that a second reading of the bytes finds.
pub fn holds(bytes: &[u8]) {
    let whole = parse(bytes);
    if let Ok(Some(header)) = whole {
        assert!((1..=bytes.len().min(limits::PROXY_HEADER_MAX)).contains(&header.length));
        assert_eq!(parse(&bytes[..header.length]), whole, "what follows makes no difference");
        assert_eq!(parse(&[&bytes[..header.length], b"more"].concat()), whole);
        assert!(header.client.is_none_or(|client| client.ip().to_canonical() == client.ip()));
        assert_eq!(header.client, again(&bytes[..header.length]), "{}", bytes[..header.length].escape_ascii());
    }
    // No error before the first wrong byte, no header before its last one, and nothing after an error.
    let mut end = None;
    for length in 0..=bytes.len().min(limits::PROXY_HEADER_MAX + 1) {
        let now = parse(&bytes[..length]);
        match (end, now) {
            (None, Ok(None)) => assert!(length < limits::PROXY_HEADER_MAX, "a header that never ends"),
            (None, now) => end = Some(now),
            (Some(Err(_)), now) => assert!(now.is_err(), "refused at first, and then taken"),
            (Some(before), now) => assert_eq!(now, before),
        }
        if length > 64 && end.is_some() {
            break;
        }
    }
    if whole == Err(HeaderError::Missing) {
        let begins = |with: &[u8]| bytes.len() >= with.len() && bytes.starts_with(with);
        assert!(!begins(b"PROXY ") && !begins(b"\r\n\r\n\0\r\nQUIT\n"));
    }
}

/// The client in a header that was found to be one.
fn again(header: &[u8]) -> Option<SocketAddr> {
    if let Some(line) = header.strip_prefix(b"PROXY ") {
        let words: Vec<&str> = str::from_utf8(line).ok()?.trim_end_matches("\r\n").split(' ').collect();
        let [protocol, source, destination, port, other] = words[..] else { return None };
        let address = |text: &str| match protocol {
            "TCP4" => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
            "TCP6" => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            _ => None,
        };
        address(destination)?;
        other.parse::<u16>().ok()?;
        return Some(SocketAddr::new(address(source)?.to_canonical(), port.parse().ok()?));
    }
    let (head, body) = header.split_at_checked(16)?;
    let port = |at: usize| Some(u16::from_be_bytes([*body.get(at)?, *body.get(at + 1)?]));
    match (head[12], head[13]) {
        (0x21, 0x11) => {
            let source: [u8; 4] = body.get(..4)?.try_into().ok()?;
            Some(SocketAddr::new(IpAddr::from(source), port(8)?))
        }
        (0x21, 0x21) => {
            let source: [u8; 16] = body.get(..16)?.try_into().ok()?;
            Some(SocketAddr::new(IpAddr::from(source).to_canonical(), port(32)?))
        }
        _ => None,
    }
}

//! What a connection speaks, by its first bytes.

use caponier::limits;
use caponier::tunnel::sniff::{Protocol, tell};

/// What is told stays so whatever follows, and is told as soon as it can be; what is not is refused at the first byte that
/// no beginning of a connection has there.
pub fn holds(bytes: &[u8]) {
    let mut known = None;
    for length in 0..=bytes.len().min(limits::SNIFF_MAX) {
        let now = tell(&bytes[..length]);
        let (expected, open) = again(&bytes[..length]);
        match (known, now) {
            (None, Ok(None)) => assert!(open && expected.is_none() && length < 16, "nothing after {length} bytes"),
            (None, Ok(Some(protocol))) => {
                assert_eq!(Some(protocol), expected, "{}", bytes.escape_ascii());
                known = Some(now);
            }
            (None, Err(_)) => {
                assert!(!open, "refused too early: {}", bytes[..length].escape_ascii());
                known = Some(now);
            }
            (Some(before), now) => assert_eq!(now, before, "another answer for more bytes"),
        }
        if length > 32 {
            break;
        }
    }
}

/// What these bytes are, and whether they could become something.
fn again(bytes: &[u8]) -> (Option<Protocol>, bool) {
    let texts = ["SSH-", "GET ", "HEAD ", "POST ", "PUT ", "DELETE ", "CONNECT ", "OPTIONS ", "TRACE ", "PATCH "];
    if let Some(text) = texts.iter().find(|text| bytes.starts_with(text.as_bytes())) {
        return (Some(if *text == "SSH-" { Protocol::Ssh } else { Protocol::Http }), true);
    }
    let text = texts.iter().any(|text| text.as_bytes().starts_with(bytes));
    let at = |index: usize, fits: fn(u8) -> bool| bytes.get(index).is_none_or(|byte| fits(*byte));
    let record = at(0, |byte| byte == 0x16) && at(1, |byte| byte == 3) && at(2, |byte| byte <= 4);
    let length = match bytes {
        [_, _, _, high, low, ..] => (4..=16_384).contains(&(usize::from(*high) * 256 + usize::from(*low))),
        _ => true,
    };
    let hello = record && length && at(5, |byte| byte == 1);
    ((hello && bytes.len() > 5).then_some(Protocol::Tls), text || hello)
}

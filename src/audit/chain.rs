//! The chain of a trail: what makes it show that a record was changed, taken out, put in or moved.
//!
//! Promised: every record ends in its number and the digest of the record before it, and nothing in it can change without
//! its own digest changing. What was cut off at the end shows only in what was kept elsewhere: see `audit::head`.
//!
//! A record is one line of JSON, whose last two members are always, in this order and with nothing between or after them,
//!
//! ```text
//! ,"seq":17,"prev":"<43 characters>"}\n
//! ```
//!
//! `seq` counts from 0 without a gap for as long as the trail goes on: over rotated files, restarts and crashes. `prev` is
//! the SHA-256 of all bytes of the line before, its newline included, in base64url without padding (RFC 4648, section 5);
//! of the first record it is that of `caponier-trail-1:` and the trail's id. So `head -n 1 FILE | sha256sum` is what the
//! second line has to name.

use std::fmt;

use aws_lc_rs::digest::{self, SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// What a trail is called, all its life: 16 random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrailId([u8; 16]);

impl TrailId {
    /// An id that no other trail has.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut id = [0; 16];
        getrandom::fill(&mut id)?;
        Ok(Self(id))
    }

    /// Reads 32 lower-case hexadecimal digits; `None` of anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != 32 || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        u128::from_str_radix(text, 16).ok().map(|id| Self(id.to_be_bytes()))
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The first and the last of all, in their order.
    pub(super) const FIRST: Self = Self([0; 16]);
    pub(super) const LAST: Self = Self([u8::MAX; 16]);
}

impl fmt::Display for TrailId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// The SHA-256 of a record's line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Link([u8; 32]);

impl Link {
    /// What stands before the first record of a trail.
    #[must_use]
    pub fn origin(trail: &TrailId) -> Self {
        Self::of(format!("caponier-trail-1:{trail}").as_bytes())
    }

    /// The digest of a whole line, its newline included.
    #[must_use]
    pub fn of(line: &[u8]) -> Self {
        let mut link = [0; 32];
        link.copy_from_slice(digest::digest(&SHA256, line).as_ref());
        Self(link)
    }

    /// The digest of all that is read.
    ///
    /// # Errors
    /// If reading fails.
    pub fn over(mut reader: impl std::io::Read) -> std::io::Result<Self> {
        let mut context = digest::Context::new(&SHA256);
        let mut piece = [0; 8 * 1024];
        loop {
            match reader.read(&mut piece)? {
                0 => break,
                count => context.update(&piece[..count]),
            }
        }
        let mut link = [0; 32];
        link.copy_from_slice(context.finish().as_ref());
        Ok(Self(link))
    }

    /// Reads it as records hold it; `None` of anything else.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let mut link = [0; 32];
        (URL_SAFE_NO_PAD.decode_slice(text, &mut link) == Ok(32)).then_some(Self(link))
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

/// The end of a trail so far, to which the next record is linked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    next: u64,
    last: Link,
}

impl Chain {
    /// A trail without a record.
    #[must_use]
    pub fn begin(trail: &TrailId) -> Self {
        Self { next: 0, last: Link::origin(trail) }
    }

    /// A trail whose last record has this number, and its line this digest.
    #[must_use]
    pub fn after(seq: u64, line: Link) -> Self {
        Self { next: seq.saturating_add(1), last: line }
    }

    /// The number of the next record.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The digest of the last record.
    #[must_use]
    pub fn last(&self) -> Link {
        self.last
    }

    /// Ends `line`, an object of JSON with at least one member and its newline, with its number and the digest of the one
    /// before. The line is then the last one.
    pub fn link(&mut self, line: &mut Vec<u8>) {
        debug_assert!(line.ends_with(b"}\n"), "a record");
        line.truncate(line.len().saturating_sub(2));
        line.extend_from_slice(format!(",\"seq\":{},\"prev\":\"{}\"}}\n", self.next, self.last).as_bytes());
        self.next += 1;
        self.last = Link::of(line);
    }
}

/// What a line says at its end: its number, and the digest of the line before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linked {
    /// Its number.
    pub seq: u64,
    /// The digest that it names.
    pub prev: Link,
}

impl Linked {
    /// Reads the end of a whole line, its newline included; `None` where it does not end as a record does. The rest of the
    /// line is not looked at.
    #[must_use]
    pub fn read(line: &[u8]) -> Option<Self> {
        let rest = line.strip_suffix(b"\"}\n")?;
        let (rest, prev) = rest.split_at_checked(rest.len().checked_sub(LINK_LEN)?)?;
        let rest = rest.strip_suffix(b",\"prev\":\"")?;
        let digits = rest.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
        let (rest, seq) = rest.split_at(rest.len() - digits);
        let number = std::str::from_utf8(seq).ok()?;
        let plain = number == "0" || !number.starts_with('0');
        if !plain || !rest.ends_with(b",\"seq\":") {
            return None;
        }
        Some(Self { seq: number.parse().ok()?, prev: Link::parse(prev)? })
    }
}

/// Characters of a digest in base64url without padding.
const LINK_LEN: usize = 43;

#[cfg(test)]
mod tests {
    use super::*;

    fn trail() -> TrailId {
        TrailId::parse("000102030405060708090a0b0c0d0e0f").expect("an id")
    }

    #[test]
    fn the_format_is_frozen() {
        let mut chain = Chain::begin(&trail());
        let mut first = b"{\"v\":1}\n".to_vec();
        chain.link(&mut first);
        let mut second = b"{\"v\":1}\n".to_vec();
        chain.link(&mut second);
        let text = |line: &[u8]| String::from_utf8(line.to_vec()).expect("UTF-8");
        assert_eq!(text(&first), format!("{{\"v\":1,\"seq\":0,\"prev\":\"{}\"}}\n", Link::origin(&trail())));
        assert_eq!(text(&second), format!("{{\"v\":1,\"seq\":1,\"prev\":\"{}\"}}\n", Link::of(&first)));
        assert_eq!(Link::of(b"").to_string(), "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU");
        assert_eq!(chain, Chain::after(1, Link::of(&second)));
    }

    #[test]
    fn what_was_linked_is_read_back() {
        let mut chain = Chain::after(u64::MAX - 3, Link::of(b"x"));
        let mut line = b"{\"event\":\"trail.started\"}\n".to_vec();
        chain.link(&mut line);
        assert_eq!(Linked::read(&line), Some(Linked { seq: u64::MAX - 2, prev: Link::of(b"x") }));
    }

    #[test]
    fn what_is_not_the_end_of_a_record_is_not_read() {
        let prev = Link::of(b"x");
        for line in [
            String::new(),
            "\n".to_owned(),
            "{}\n".to_owned(),
            format!(",\"seq\":1,\"prev\":\"{prev}\"}}"),
            format!(",\"seq\":,\"prev\":\"{prev}\"}}\n"),
            format!(",\"seq\":01,\"prev\":\"{prev}\"}}\n"),
            format!(",\"seq\":-1,\"prev\":\"{prev}\"}}\n"),
            format!(",\"seq\":99999999999999999999,\"prev\":\"{prev}\"}}\n"),
            format!(",\"seq\":1, \"prev\":\"{prev}\"}}\n"),
            format!(",\"seq\":1,\"prev\":\"{prev}=\"}}\n"),
            format!(",\"seq\":1,\"prev\":\"{}\"}}\n", "!".repeat(43)),
            format!("\"{prev}\"}}\n"),
        ] {
            assert_eq!(Linked::read(line.as_bytes()), None, "{line:?}");
        }
    }

    #[test]
    fn an_id_is_read_as_it_is_written() {
        assert_eq!(trail().to_string(), "000102030405060708090a0b0c0d0e0f");
        assert_ne!(TrailId::generate().expect("randomness"), TrailId::generate().expect("randomness"));
        for text in ["", "00", "000102030405060708090A0b0c0d0e0f", "+00102030405060708090a0b0c0d0e0f"] {
            assert_eq!(TrailId::parse(text), None, "{text:?}");
        }
    }
}

//! Ports of a rule: one, or a range with both of its ends.

use std::fmt;
use std::str::FromStr;

/// One port or more, without gaps; never port 0, and never none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    first: u16,
    last: u16,
}

/// Why a text is no port and no range of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PortsError {
    /// Not digits, or digits with a hyphen between them.
    #[error("ports are written as a number from 1 to 65535, or as two with a hyphen between, such as \"6000-6010\"")]
    Form,
    /// Port 0.
    #[error("port 0 cannot be connected to")]
    Zero,
    /// The end comes before the beginning.
    #[error("the range ends before it begins")]
    Reversed,
}

impl Ports {
    /// Whether `port` is among them.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl TryFrom<u16> for Ports {
    type Error = PortsError;

    /// A single port.
    fn try_from(port: u16) -> Result<Self, PortsError> {
        if port == 0 { Err(PortsError::Zero) } else { Ok(Self { first: port, last: port }) }
    }
}

impl FromStr for Ports {
    type Err = PortsError;

    /// Reads digits, or two numbers with a hyphen between; no signs, no blanks, no leading zeros.
    fn from_str(text: &str) -> Result<Self, PortsError> {
        let port = |text: &str| -> Result<u16, PortsError> {
            let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
            match text.parse() {
                Ok(0) if plain => Err(PortsError::Zero),
                Ok(port) if plain => Ok(port),
                _ => Err(PortsError::Form),
            }
        };
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        if last < first { Err(PortsError::Reversed) } else { Ok(Self { first, last }) }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_no_range() {
        use PortsError::{Form, Reversed, Zero};
        for (text, error) in [
            ("", Form),
            ("-", Form),
            ("1-", Form),
            ("-1", Form),
            ("+1", Form),
            ("1-+2", Form),
            (" 1", Form),
            ("1 ", Form),
            ("1 - 2", Form),
            ("1-2-3", Form),
            ("1--2", Form),
            ("1..2", Form),
            ("1,2", Form),
            ("0x10", Form),
            ("010", Form),
            ("00", Form),
            ("65536", Form),
            ("1-65536", Form),
            ("99999999999999999999", Form),
            ("１", Form),
            ("*", Form),
            ("http", Form),
            ("0", Zero),
            ("0-1", Zero),
            ("0-65535", Zero),
            ("1-0", Zero),
            ("2-1", Reversed),
            ("65535-1", Reversed),
        ] {
            assert_eq!(text.parse::<Ports>(), Err(error), "{text:?}");
        }
        assert_eq!(Ports::try_from(0), Err(Zero));
    }

    #[test]
    fn holds_its_ends_and_what_lies_between() {
        for (text, inside, outside) in [
            ("5432", &[5432][..], &[5431, 5433, 0, 1, 65_535][..]),
            ("6000-6010", &[6000, 6005, 6010], &[5999, 6011, 0]),
            ("7-7", &[7], &[6, 8]),
            ("1-65535", &[1, 80, 65_535], &[0]),
        ] {
            let ports: Ports = text.parse().expect(text);
            assert!(inside.iter().all(|port| ports.contains(*port)), "{text}");
            assert!(!outside.iter().any(|port| ports.contains(*port)), "{text}");
            assert_eq!(ports.to_string().parse(), Ok(ports), "{text}");
        }
        assert_eq!("7-7".parse::<Ports>().map(|ports| ports.to_string()).as_deref(), Ok("7"));
    }
}

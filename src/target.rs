//! A target: the host and port somebody asks to be connected to.
//!
//! Promised: a [`Target`] that exists is well formed. A host is either a literal address or a DNS name in one normal
//! form (lower case, no trailing dot), and never something that a resolver might read as the other kind: spellings such
//! as `0177.0.0.1`, `2130706433` or `0x7f.1`, which `inet_aton` takes for addresses, are refused here, before any policy
//! sees them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A host and a port, both checked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Where to.
    pub host: Host,
    /// Which port; never 0.
    pub port: u16,
}

/// A host: a literal address, or a name to be resolved.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// A literal address. IPv4-mapped IPv6 addresses (`::ffff:a.b.c.d`) are kept as IPv4.
    Address(IpAddr),
    /// A DNS name.
    Name(Name),
}

/// A DNS name: 1 to 253 bytes of lower-case LDH labels (RFC 1123 §2.1), also `_`; the last label is not all digits and
/// does not look like a hexadecimal number.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

/// Why a text is no target. The text itself is not repeated: it may come from a stranger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Nothing there.
    #[error("the host is empty")]
    Empty,
    /// Longer than RFC 1035 §2.3.4 allows.
    #[error("the host name is longer than 253 bytes, or one of its labels longer than 63")]
    TooLong,
    /// Outside of the permitted alphabet; internationalised names are written in their `xn--` form.
    #[error(
        "the host has a character that is not a letter, digit, '-', '_' or '.' (write international names as xn--…)"
    )]
    Character,
    /// An empty label, or one that begins or ends with a hyphen.
    #[error("the host name has an empty label, or one that begins or ends with '-'")]
    Label,
    /// A number that some resolvers take for an address.
    #[error("the host looks like an address but is not in its normal form (four decimal numbers, or RFC 5952)")]
    Numeric,
    /// An IPv6 zone identifier.
    #[error("addresses with a zone identifier cannot be targets")]
    Zone,
    /// No port, or not a number from 1 to 65535.
    #[error("the port is not a number from 1 to 65535")]
    Port,
}

impl Target {
    /// Checks what SSH carries in `direct-tcpip` (RFC 4254 §7.2): a host without brackets, and a port of 32 bits.
    ///
    /// # Errors
    /// If either is not acceptable.
    pub fn from_wire(host: &str, port: u32) -> Result<Self, TargetError> {
        let host = host.parse()?;
        let port = u16::try_from(port).ok().filter(|port| *port != 0).ok_or(TargetError::Port)?;
        Ok(Self { host, port })
    }
}

impl FromStr for Target {
    type Err = TargetError;

    /// Reads `host:port`, with IPv6 addresses in brackets.
    fn from_str(text: &str) -> Result<Self, TargetError> {
        let (host, port) = text.rsplit_once(':').ok_or(TargetError::Port)?;
        let bracketed = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let host = match bracketed {
            Some(address) => Host::Address(normal(IpAddr::V6(address.parse().map_err(|_| TargetError::Numeric)?))),
            // An unbracketed IPv6 address would make the port ambiguous.
            None if host.contains(':') => return Err(TargetError::Port),
            None => host.parse()?,
        };
        // `u16::from_str` takes a leading '+'.
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(TargetError::Port);
        }
        let port = port.parse().ok().filter(|port| *port != 0).ok_or(TargetError::Port)?;
        Ok(Self { host, port })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Address(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.port),
            host => write!(f, "{host}:{}", self.port),
        }
    }
}

impl FromStr for Host {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        if text.is_empty() {
            return Err(TargetError::Empty);
        }
        if text.contains('%') {
            return Err(if text.contains(':') { TargetError::Zone } else { TargetError::Character });
        }
        if text.contains(':') {
            let address: Ipv6Addr = text.parse().map_err(|_| TargetError::Numeric)?;
            return Ok(Self::Address(normal(IpAddr::V6(address))));
        }
        if let Ok(address) = text.parse::<Ipv4Addr>() {
            return Ok(Self::Address(IpAddr::V4(address)));
        }
        text.parse().map(Self::Name)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl Name {
    /// The name, without a trailing dot.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the name of a service (RFC 2782), as in `_postgresql._tcp.db.internal`: what it stands for is in SRV
    /// records, which name hosts and ports.
    #[must_use]
    pub fn is_service(&self) -> bool {
        let mut labels = self.0.splitn(3, '.');
        let service = labels.next().is_some_and(|label| label.len() > 1 && label.starts_with('_'));
        service && labels.next() == Some("_tcp") && labels.next().is_some()
    }
}

impl FromStr for Name {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() {
            return Err(TargetError::Empty);
        }
        if text.len() > 253 {
            return Err(TargetError::TooLong);
        }
        if !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
            return Err(TargetError::Character);
        }
        for label in text.split('.') {
            if label.is_empty() || label.starts_with('-') || label.ends_with('-') {
                return Err(TargetError::Label);
            }
            if label.len() > 63 {
                return Err(TargetError::TooLong);
            }
        }
        let last = text.rsplit('.').next().unwrap_or(text);
        let hexadecimal = last
            .strip_prefix("0x")
            .or_else(|| last.strip_prefix("0X"))
            .is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        if hexadecimal || last.bytes().all(|b| b.is_ascii_digit()) {
            return Err(TargetError::Numeric);
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The form of an address that policies compare: IPv4-mapped IPv6 becomes IPv4.
#[must_use]
pub fn normal(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Texts that come close to hosts: whatever a resolver, a policy or a parser might read in two ways.
    fn nearly_a_host() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => "[a-zA-Z0-9_.x:-]{0,24}",
            2 => "(0x[0-9a-fA-F]{0,8}|[0-9]{1,10})(\\.(0x[0-9a-fA-F]{0,4}|[0-9]{1,4})){0,4}\\.?",
            2 => "([a-zA-Z0-9_-]{1,6}\\.){0,4}[a-zA-Z0-9-]{1,6}\\.?",
            2 => any::<IpAddr>().prop_map(|address| address.to_string()),
            1 => any::<Ipv4Addr>().prop_map(|address| format!("::ffff:{address}")),
            1 => "\\PC{0,24}",
            1 => any::<String>(),
        ]
    }

    fn nearly_a_target() -> impl Strategy<Value = String> {
        let port = prop_oneof![3 => any::<u16>().prop_map(|port| port.to_string()), 1 => "[+ 0-9-]{0,7}"];
        prop_oneof![
            2 => (nearly_a_host(), port.clone()).prop_map(|(host, port)| format!("{host}:{port}")),
            2 => (nearly_a_host(), port).prop_map(|(host, port)| format!("[{host}]:{port}")),
            1 => any::<String>(),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4_000, ..ProptestConfig::default() })]

        #[test]
        fn a_host_has_one_form(text in nearly_a_host()) {
            let Ok(host) = text.parse::<Host>() else { return Ok(()) };
            let written = host.to_string();
            prop_assert_eq!(written.parse::<Host>(), Ok(host.clone()));
            prop_assert_eq!(written.parse::<Host>().map(|again| again.to_string()), Ok(written.clone()));
            prop_assert_eq!(written.to_ascii_lowercase(), written.clone());
            match host {
                Host::Address(address) => {
                    prop_assert_eq!(normal(address), address);
                    prop_assert_eq!(normal(text.parse().expect("an address to the standard library as well")), address);
                }
                Host::Name(name) => {
                    prop_assert!(!name.as_str().ends_with('.') && (1..=253).contains(&name.as_str().len()));
                    prop_assert!(text.parse::<IpAddr>().is_err());
                    prop_assert!(name.as_str().bytes().any(|byte| !byte.is_ascii_digit() && byte != b'.'));
                    prop_assert_eq!(name.to_string().to_ascii_uppercase().parse::<Name>(), Ok(name.clone()));
                    prop_assert_eq!(format!("{name}.").parse::<Name>(), Ok(name));
                }
            }
        }

        #[test]
        fn a_target_reads_back_as_it_is_written(text in nearly_a_target()) {
            let Ok(target) = text.parse::<Target>() else { return Ok(()) };
            let written = target.to_string();
            prop_assert_eq!(written.parse::<Target>(), Ok(target.clone()));
            prop_assert_eq!(written.parse::<Target>().map(|again| again.to_string()), Ok(written));
            prop_assert_ne!(target.port, 0);
            // The other way in, from the wire, agrees.
            prop_assert_eq!(Target::from_wire(&target.host.to_string(), target.port.into()), Ok(target));
        }

        #[test]
        fn every_address_can_be_a_target(address in any::<IpAddr>(), port in 1..=u16::MAX) {
            let target = Target { host: Host::Address(normal(address)), port };
            prop_assert_eq!(target.to_string().parse::<Target>(), Ok(target.clone()));
            prop_assert_eq!(Target::from_wire(&address.to_string(), port.into()), Ok(target));
        }
    }

    #[test]
    fn refuses_what_a_resolver_might_take_for_an_address() {
        for text in [
            "0177.0.0.1",
            "2130706433",
            "0x7f.1",
            "0x7f000001",
            "127.1",
            "1.2.3.4.5",
            "256.1.1.1",
            "01.2.3.4",
            "0x",
            "foo.0x1",
            "foo.1",
        ] {
            assert_eq!(text.parse::<Host>(), Err(TargetError::Numeric), "{text}");
        }
    }

    #[test]
    fn refuses_malformed_names() {
        let long_label = format!("{}.example", "a".repeat(64));
        let long_name = format!("{}example", "abcdefgh.".repeat(28));
        for (text, error) in [
            ("", TargetError::Empty),
            (".", TargetError::Empty),
            ("a..b", TargetError::Label),
            (".a", TargetError::Label),
            ("a..", TargetError::Label),
            ("-a.b", TargetError::Label),
            ("a-.b", TargetError::Label),
            ("a b", TargetError::Character),
            ("a\0b", TargetError::Character),
            ("a/b", TargetError::Character),
            ("a%2eb", TargetError::Character),
            ("bücher.example", TargetError::Character),
            ("fe80::1%eth0", TargetError::Zone),
            ("::ffff:1.2.3", TargetError::Numeric),
            (long_label.as_str(), TargetError::TooLong),
            (long_name.as_str(), TargetError::TooLong),
        ] {
            assert_eq!(text.parse::<Host>(), Err(error), "{text:?}");
        }
    }

    /// Each of these is refused at both ways in, or is in one normal form: there is no third.
    #[test]
    fn every_spelling_is_normal_or_refused() {
        let name_of = |length: usize| format!("{}xx", "a.".repeat(length / 2 - 1));
        let (most, over) = (name_of(252), name_of(256));
        assert_eq!((most.len(), over.len()), (252, 256));
        for (text, expected) in [
            ("0177.0.0.1", Err(TargetError::Numeric)),
            ("0177.1", Err(TargetError::Numeric)),
            ("2130706433", Err(TargetError::Numeric)),
            ("017700000001", Err(TargetError::Numeric)),
            ("0x7f.1", Err(TargetError::Numeric)),
            ("0X7F000001", Err(TargetError::Numeric)),
            ("127.0.0.1.", Err(TargetError::Numeric)),
            ("127.0.0.01", Err(TargetError::Numeric)),
            ("169.254.43518", Err(TargetError::Numeric)),
            ("127.0.0.1..", Err(TargetError::Label)),
            ("::ffff:169.254.169.254", Ok("169.254.169.254")),
            ("::FFFF:A9FE:A9FE", Ok("169.254.169.254")),
            ("0:0:0:0:0:ffff:a9fe:a9fe", Ok("169.254.169.254")),
            ("::ffff:0177.0.0.1", Err(TargetError::Numeric)),
            // Another address, and kept as one: the guard and deny rules look inside.
            ("64:ff9b::169.254.169.254", Ok("64:ff9b::a9fe:a9fe")),
            ("64:FF9B:0:0:0:0:A9FE:A9FE", Ok("64:ff9b::a9fe:a9fe")),
            ("fe80::1%eth0", Err(TargetError::Zone)),
            ("fe80::1%25eth0", Err(TargetError::Zone)),
            ("::1%", Err(TargetError::Zone)),
            ("[::1]", Err(TargetError::Numeric)),
            ("db.internal.", Ok("db.internal")),
            ("db.internal..", Err(TargetError::Label)),
            ("DB.Internal", Ok("db.internal")),
            ("XN--BCHER-KVA.Example", Ok("xn--bcher-kva.example")),
            ("xn--bcher-kva.example.", Ok("xn--bcher-kva.example")),
            ("bücher.example", Err(TargetError::Character)),
            ("ＤＢ.internal", Err(TargetError::Character)),
            ("１２７.0.0.1", Err(TargetError::Character)),
            ("１２７．０．０．１", Err(TargetError::Character)),
            ("db\u{3002}internal", Err(TargetError::Character)),
            ("127\u{3002}0\u{3002}0\u{3002}1", Err(TargetError::Character)),
            ("db\u{ff0e}internal", Err(TargetError::Character)),
            ("db\u{ad}.internal", Err(TargetError::Character)),
            ("db\u{200b}.internal", Err(TargetError::Character)),
            ("db.internal\0.evil.com", Err(TargetError::Character)),
            ("db.internal\0", Err(TargetError::Character)),
            ("127.0.0.1\0", Err(TargetError::Character)),
            ("db%2einternal", Err(TargetError::Character)),
            ("%31%32%37.0.0.1", Err(TargetError::Character)),
            ("db.internal/", Err(TargetError::Character)),
            ("user@db.internal", Err(TargetError::Character)),
            (" db.internal", Err(TargetError::Character)),
            ("db.internal\n", Err(TargetError::Character)),
            (most.as_str(), Ok(most.as_str())),
            (over.as_str(), Err(TargetError::TooLong)),
        ] {
            let host = text.parse::<Host>().map(|host| host.to_string());
            assert_eq!(host.as_deref(), expected.as_ref().copied(), "{text:?}");
            let of_wire = Target::from_wire(text, 5432).map(|target| target.host.to_string());
            assert_eq!(of_wire.as_deref(), expected.as_ref().copied(), "{text:?}");
        }
    }

    #[test]
    fn normalises_case_trailing_dot_and_mapped_addresses() {
        for (text, normal) in [
            ("Orders.DB.internal.", "orders.db.internal"),
            ("::ffff:169.254.169.254", "169.254.169.254"),
            ("::FFFF:A00:1", "10.0.0.1"),
            ("2001:DB8::0001", "2001:db8::1"),
            ("10.0.0.1", "10.0.0.1"),
        ] {
            assert_eq!(text.parse::<Host>().map(|host| host.to_string()).as_deref(), Ok(normal), "{text}");
        }
    }

    #[test]
    fn services_have_a_form_of_their_own() {
        for (text, service) in [
            ("_postgresql._tcp.db.internal", true),
            ("_PostgreSQL._TCP.internal.", true),
            ("_postgresql._tcp", false),
            ("_._tcp.db.internal", false),
            ("postgresql._tcp.db.internal", false),
            ("_postgresql.tcp.db.internal", false),
            ("_postgresql._udp.db.internal", false),
            ("x._postgresql._tcp.db.internal", false),
            ("db.internal", false),
        ] {
            assert_eq!(text.parse::<Name>().expect(text).is_service(), service, "{text}");
        }
    }

    #[test]
    fn reads_host_and_port() {
        for (text, normal) in [
            ("db:5432", "db:5432"),
            ("10.1.2.3:1", "10.1.2.3:1"),
            ("[2001:db8::1]:65535", "[2001:db8::1]:65535"),
            ("[::ffff:10.0.0.1]:5432", "10.0.0.1:5432"),
        ] {
            assert_eq!(text.parse::<Target>().map(|target| target.to_string()).as_deref(), Ok(normal), "{text}");
        }
        for text in ["db", "db:", "db:0", "db:65536", "db:+1", "db: 1", "2001:db8::1:5432", "[10.0.0.1]:1", "db:-1"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }

    #[test]
    fn refuses_ports_that_only_fit_thirty_two_bits() {
        for port in [0, 65_536, u32::MAX] {
            assert_eq!(Target::from_wire("db", port), Err(TargetError::Port), "{port}");
        }
        assert!(Target::from_wire("db", 65_535).is_ok());
    }
}

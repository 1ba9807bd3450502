//! What is reached without the proxy: `no_proxy`, `NO_PROXY`.
//!
//! Promised: pure, no lookups. A name is compared with names and an address with addresses and networks: what a name means
//! is not looked up for this, so that the decision cannot change with DNS, and so a network never matches a name.
//!
//! How programs read `NO_PROXY` differs. Here:
//!
//! | Entry | Matches | curl | Go |
//! |---|---|---|---|
//! | `example.com` | it and all names below it | same | same |
//! | `.example.com`, `*.example.com` | the names below it alone | `.`: it too; `*.`: nothing | same |
//! | `10.20.0.7`, `2001:db8::1`, `[2001:db8::1]` | this address, written so as the target | same | same |
//! | `10.20.0.0/16`, `2001:db8::/32` | addresses in it, written so as the target | same (from 7.86) | same |
//! | any of these with `:PORT` | the same at this port | no ports | same, but for networks |
//! | `*` | everything | same, if it is alone | same |
//!
//! Names are compared without case and without a dot at the end, addresses in one form (`::ffff:10.0.0.1` is `10.0.0.1`).
//! This host itself gets no rule of its own: Go never uses a proxy for it.

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use crate::limits;
use crate::network;
use crate::target::{Host, Name, Target, normal};

/// What is reached without the proxy. The default is nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bypass(Vec<Entry>);

/// One entry: hosts, and perhaps the port that they must be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    hosts: Hosts,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Hosts {
    All,
    /// A name and all below it.
    Domain(Name),
    /// All names below this one.
    Below(Name),
    Network(IpNet),
}

/// Why a text is no list of what is reached without the proxy, or no entry of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BypassError {
    /// One entry.
    #[error(
        "a host (db.internal), the hosts below a name (.internal), an address, a network (10.20.0.0/16) or * is wanted, each \
         with :PORT or without"
    )]
    Entry,
    /// One entry of several.
    #[error("entry {0} is none: {wanted}", wanted = BypassError::Entry)]
    EntryOf(usize),
    /// Too long.
    #[error("more than {} entries", limits::NO_PROXY_MAX)]
    TooMany,
}

impl Bypass {
    /// These.
    ///
    /// # Errors
    /// If there are more than [`limits::NO_PROXY_MAX`].
    pub fn new(entries: Vec<Entry>) -> Result<Self, BypassError> {
        if entries.len() > limits::NO_PROXY_MAX { Err(BypassError::TooMany) } else { Ok(Self(entries)) }
    }

    /// Whether `target` is reached without the proxy.
    #[must_use]
    pub fn holds(&self, target: &Target) -> bool {
        self.0.iter().any(|entry| entry.holds(target))
    }
}

impl FromStr for Bypass {
    type Err = BypassError;

    /// Reads a list with commas or blanks between its entries, as the environment has it.
    fn from_str(text: &str) -> Result<Self, BypassError> {
        let texts = text.split(|c: char| c == ',' || c.is_ascii_whitespace()).filter(|entry| !entry.is_empty());
        let entries = texts.take(limits::NO_PROXY_MAX + 1).enumerate();
        let entries = entries.map(|(at, entry)| entry.parse().map_err(|_| BypassError::EntryOf(at + 1)));
        Self::new(entries.collect::<Result<_, _>>()?)
    }
}

impl Entry {
    fn holds(&self, target: &Target) -> bool {
        if self.port.is_some_and(|port| port != target.port) {
            return false;
        }
        match (&self.hosts, &target.host) {
            (Hosts::All, _) => true,
            (Hosts::Domain(name), Host::Name(asked)) => asked == name || is_below(asked, name),
            (Hosts::Below(name), Host::Name(asked)) => is_below(asked, name),
            (Hosts::Network(network), Host::Address(address)) => network.contains(address),
            (Hosts::Domain(_) | Hosts::Below(_), Host::Address(_)) | (Hosts::Network(_), Host::Name(_)) => false,
        }
    }
}

impl FromStr for Entry {
    type Err = BypassError;

    fn from_str(text: &str) -> Result<Self, BypassError> {
        let (hosts, port) = split_port(text)?;
        Ok(Self { hosts: hosts.parse()?, port })
    }
}

impl FromStr for Hosts {
    type Err = BypassError;

    fn from_str(text: &str) -> Result<Self, BypassError> {
        if text == "*" {
            return Ok(Self::All);
        }
        if text.contains('/') {
            let network = network::parse(text).ok_or(BypassError::Entry)?;
            return Ok(Self::Network(network::unmapped(network).trunc()));
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Network(normal(address).into()));
        }
        let below = text.strip_prefix("*.").or_else(|| text.strip_prefix('.'));
        let name = below.unwrap_or(text).parse().map_err(|_| BypassError::Entry)?;
        Ok(if below.is_some() { Self::Below(name) } else { Self::Domain(name) })
    }
}

/// Takes brackets and a port off. Without brackets, what has several colons is an IPv6 address without a port.
fn split_port(text: &str) -> Result<(String, Option<u16>), BypassError> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (address, rest) = rest.split_once(']').ok_or(BypassError::Entry)?;
        let (length, port) = match rest.split_once(':') {
            Some((length, port)) => (length, Some(port)),
            None => (rest, None),
        };
        if !address.contains(':') || !(length.is_empty() || length.starts_with('/')) {
            return Err(BypassError::Entry);
        }
        (format!("{address}{length}"), port)
    } else {
        match text.split_once(':') {
            Some((host, port)) if !port.contains(':') => (host.to_owned(), Some(port)),
            _ => (text.to_owned(), None),
        }
    };
    let Some(port) = port else { return Ok((host, None)) };
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(BypassError::Entry);
    }
    let port = port.parse().ok().filter(|port| *port != 0).ok_or(BypassError::Entry)?;
    Ok((host, Some(port)))
}

fn is_below(asked: &Name, name: &Name) -> bool {
    asked.as_str().strip_suffix(name.as_str()).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn holds(list: &str, target: &str) -> bool {
        list.parse::<Bypass>().expect(list).holds(&target.parse().expect(target))
    }

    #[test]
    fn each_kind_of_entry_holds_what_the_table_says() {
        for (entry, inside, outside) in [
            (
                "example.com",
                &["example.com:443", "EXAMPLE.com.:1", "a.example.com:443", "b.a.example.com:22"][..],
                &["notexample.com:443", "example.com.evil.net:443", "com:443", "10.0.0.1:443"][..],
            ),
            (".example.com", &["a.example.com:443", "A.B.example.com.:1"], &["example.com:443", "aexample.com:443"]),
            ("*.example.com", &["a.example.com:443"], &["example.com:443", "xexample.com:443"]),
            ("EXAMPLE.com.", &["a.example.com:443"], &["example.org:443"]),
            ("gateway", &["gateway:443", "a.gateway:443"], &["gateways:443", "my-gateway:443"]),
            ("10.20.0.7", &["10.20.0.7:443", "[::ffff:10.20.0.7]:443"], &["10.20.0.70:443", "10.20.0.7.example:443"]),
            ("::ffff:10.20.0.7", &["10.20.0.7:443"], &["[::10.20.0.7]:443"]),
            ("2001:db8::1", &["[2001:db8:0::1]:443"], &["[2001:db8::2]:443"]),
            ("[2001:db8::1]", &["[2001:db8::1]:443"], &["[2001:db8::11]:443"]),
            ("[2001:db8::1]:443", &["[2001:db8::1]:443"], &["[2001:db8::1]:22"]),
            ("10.20.0.0/16", &["10.20.255.1:443", "[::ffff:10.20.0.1]:1"], &["10.21.0.1:443", "ten.internal:443"]),
            ("10.20.9.9/16", &["10.20.255.1:443"], &["10.21.0.1:443"]),
            ("::ffff:10.20.0.0/112", &["10.20.255.1:443"], &["10.21.0.1:443"]),
            ("10.20.0.0/16:443", &["10.20.0.1:443"], &["10.20.0.1:22"]),
            ("2001:db8::/32", &["[2001:db8::1]:443"], &["[2001:db9::1]:443", "10.0.0.1:443"]),
            ("[2001:db8::]/32:443", &["[2001:db8::1]:443"], &["[2001:db8::1]:22"]),
            ("0.0.0.0/0", &["10.0.0.1:443"], &["[2001:db8::1]:443", "gateway:443"]),
            ("example.com:8443", &["example.com:8443", "a.example.com:8443"], &["example.com:443"]),
            ("*", &["example.com:443", "10.0.0.1:1", "[::1]:9"], &[]),
            ("*:22", &["example.com:22"], &["example.com:443"]),
            ("", &[], &["example.com:443", "127.0.0.1:443", "localhost:443"]),
            (" ,, ", &[], &["example.com:443"]),
            ("a.test, b.test c.test,\t10.0.0.0/8", &["a.test:1", "b.test:1", "c.test:1", "10.9.9.9:1"], &["d.test:1"]),
        ] {
            for target in inside {
                assert!(holds(entry, target), "{entry} holds {target}");
            }
            for target in outside {
                assert!(!holds(entry, target), "{entry} does not hold {target}");
            }
        }
    }

    #[test]
    fn what_no_entry_can_mean_is_refused() {
        for entry in [
            "http://example.com",
            "example.com/path",
            "192.168.*",
            "*example.com",
            "a.*.example.com",
            ".",
            "*.",
            "..example.com",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0.0/",
            "010.0.0.1",
            "2130706433",
            "example.com:",
            "example.com:0",
            "example.com:65536",
            "example.com:+1",
            "[10.0.0.1]",
            "[2001:db8::1",
            "[2001:db8::1]x",
            "fe80::1%eth0",
            "<local>",
            "bücher.example",
        ] {
            assert_eq!(entry.parse::<Entry>(), Err(BypassError::Entry), "{entry}");
        }
        assert_eq!("a.test, 192.168.*".parse::<Bypass>(), Err(BypassError::EntryOf(2)));
        let many = vec!["a.test"; limits::NO_PROXY_MAX + 1].join(",");
        assert_eq!(many.parse::<Bypass>(), Err(BypassError::TooMany));
        assert!(many[7..].parse::<Bypass>().is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2_000, ..ProptestConfig::default() })]

        #[test]
        fn any_text_is_read_or_refused(text in "[a-z0-9.*:/\\[\\] ,-]{0,40}") {
            if let Ok(bypass) = text.parse::<Bypass>() {
                let _ = bypass.holds(&"a.example:443".parse().expect("a target"));
            }
        }

        #[test]
        fn a_name_never_matches_a_network_and_an_address_never_a_name(address: IpAddr, length in 0u8..=32) {
            let target = Target { host: Host::Address(normal(address)), port: 443 };
            let written = match address { IpAddr::V4(v4) => v4.to_string(), IpAddr::V6(v6) => format!("[{v6}]") };
            let entry: Bypass = written.parse().expect("an address");
            prop_assert!(entry.holds(&target));
            let network: Bypass = format!("{address}/{length}").parse().expect("a network");
            prop_assert!(network.holds(&target) || normal(address) != address);
            prop_assert!(!network.holds(&"name.example:443".parse().expect("a target")));
        }
    }
}

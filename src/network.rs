//! Networks that something is accepted from.
//!
//! Promised: an IPv4 address is one and the same however it is written, also as `::ffff:10.0.0.1`; a list is never empty, so
//! that none can mean "everybody" or "nobody" by accident; where no list was written, that is an `Option`'s `None`, and
//! nothing is narrowed ([`admits`]).

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

/// A network as an operator writes it: `10.0.0.0/8`, `2001:db8::/32`, or `10.0.0.7/32` for one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network(IpNet);

/// Why a text is not a network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// An address alone.
    #[error("a network is wanted: write {0} for this one address")]
    Address(IpNet),
    /// More than a network.
    #[error("{network} has bits beyond its prefix: write {} for the network or {} for the one address", network.trunc(), IpNet::from(network.addr()))]
    HostBits {
        /// As it was written.
        network: IpNet,
    },
    /// Neither.
    #[error("a network is wanted, such as 10.20.0.0/16 or 2001:db8::/32")]
    Malformed,
}

impl Network {
    /// How many bits tell its addresses apart: 0 for a single one.
    #[must_use]
    pub fn host_bits(&self) -> u8 {
        self.0.max_prefix_len() - self.0.prefix_len()
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let Some(written) = parse(text) else {
            let address = text.parse::<IpAddr>().map_err(|_| NetworkError::Malformed)?;
            return Err(NetworkError::Address(address.to_canonical().into()));
        };
        let network = unmapped(written);
        if network.trunc() != network {
            return Err(NetworkError::HostBits { network });
        }
        Ok(Self(network))
    }
}

/// Reads a network, which may have bits beyond its prefix. By the standard library's reading of addresses, which refuses the
/// leading zero that means octal to some.
#[must_use]
pub fn parse(text: &str) -> Option<IpNet> {
    let (address, length) = text.split_once('/')?;
    let plain = length.bytes().all(|byte| byte.is_ascii_digit()) && (length == "0" || !length.starts_with('0'));
    let length = length.parse().ok().filter(|_| plain)?;
    IpNet::new(address.parse().ok()?, length).ok()
}

/// A network of IPv4-mapped addresses is one of IPv4 addresses.
#[must_use]
pub fn unmapped(network: IpNet) -> IpNet {
    const MAPPED: u8 = 96;
    let IpNet::V6(v6) = network else { return network };
    let address = v6.addr().to_ipv4_mapped().zip(v6.prefix_len().checked_sub(MAPPED));
    address.and_then(|(address, length)| IpNet::new(address.into(), length).ok()).unwrap_or(network)
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One network or several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Networks(Vec<Network>);

impl Networks {
    /// These; `None` if there is none.
    #[must_use]
    pub fn new(networks: Vec<Network>) -> Option<Self> {
        (!networks.is_empty()).then_some(Self(networks))
    }

    /// Whether an address lies in both.
    #[must_use]
    pub fn overlap(&self, other: &Self) -> bool {
        let meet = |one: &Network, other: &Network| one.0.contains(&other.0) || other.0.contains(&one.0);
        self.0.iter().any(|one| other.0.iter().any(|other| meet(one, other)))
    }

    /// Whether one of them holds the address.
    #[must_use]
    pub fn contain(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.0.contains(&address))
    }
}

impl fmt::Display for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, network) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{network}")?;
        }
        Ok(())
    }
}

/// Whether something with this `accept_from` accepts the address; left out, it narrows nothing.
#[must_use]
pub fn admits(accept_from: Option<&Networks>, address: IpAddr) -> bool {
    accept_from.is_none_or(|networks| networks.contain(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(texts: &[&str]) -> Networks {
        Networks::new(texts.iter().map(|text| text.parse().expect(text)).collect()).expect("not empty")
    }

    #[test]
    fn refuses_what_is_no_network() {
        for (text, problem) in [
            ("", "a network is wanted, such as"),
            ("10.0.0.0", "write 10.0.0.0/32 for this one address"),
            ("::ffff:10.0.0.1", "write 10.0.0.1/32"),
            ("10.0.0.0/33", "a network is wanted"),
            ("10.0.0.0/-1", "a network is wanted"),
            ("10.0.0.0/+8", "a network is wanted"),
            ("10.0.0.0/08", "a network is wanted"),
            ("10.0.0.0/", "a network is wanted"),
            ("010.0.0.0/8", "a network is wanted"),
            ("10.0.0.0/8 ", "a network is wanted"),
            ("fe80::%eth0/64", "a network is wanted"),
            ("example.com/8", "a network is wanted"),
            ("10.0.0.1/8", "write 10.0.0.0/8 for the network or 10.0.0.1/32"),
            ("2001:db8::1/64", "write 2001:db8::/64"),
            ("::ffff:10.0.0.1/104", "write 10.0.0.0/8"),
        ] {
            let error = text.parse::<Network>().expect_err(text).to_string();
            assert!(error.contains(problem), "{text}: {error}");
        }
        assert!(Networks::new(Vec::new()).is_none());
    }

    #[test]
    fn an_address_is_the_same_however_it_is_written() {
        for (network, inside, outside) in [
            (
                &["10.0.0.0/8"][..],
                &["10.1.2.3", "::ffff:10.1.2.3"][..],
                &["11.0.0.1", "::ffff:11.0.0.1", "::10.1.2.3"][..],
            ),
            (&["::ffff:10.0.0.0/104"], &["10.1.2.3", "::ffff:10.1.2.3"], &["11.0.0.1", "::1"]),
            (&["2001:db8::/32", "192.0.2.7/32"], &["2001:db8::1", "192.0.2.7"], &["2001:db9::1", "192.0.2.8"]),
            (&["0.0.0.0/0"], &["10.1.2.3", "::ffff:1.2.3.4"], &["::1", "2001:db8::1"]),
            (&["::/0"], &["::1", "2001:db8::1"], &["10.1.2.3", "::ffff:10.1.2.3"]),
        ] {
            let list = networks(network);
            let judge = |text: &&str| list.contain(text.parse().expect("an address"));
            assert!(inside.iter().all(judge), "{network:?}");
            assert!(!outside.iter().any(judge), "{network:?}");
            assert!(inside.iter().chain(outside).all(|text| admits(None, text.parse().expect("an address"))));
        }
    }
}

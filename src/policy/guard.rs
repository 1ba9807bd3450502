//! What no ordinary rule reaches: reserved addresses, and the agent's own ways out.
//!
//! A *reserved* address is one that an operator hardly ever means when writing down a network: loopback, cloud
//! metadata, multicast, and every IPv6 form that hides an IPv4 address. A network reaches such an address only if it
//! lies wholly inside of the reserved range, so that it cannot have been written for any other purpose: `0.0.0.0/0`
//! never reaches `127.0.0.1`, `127.0.0.0/8` does.
//!
//! The agent's own gateways, its upstream proxy, the collectors of its trail and its traces, and its listeners (also for health
//! and metrics) are not reachable at all: through the former a principal could go on to places that no rule has seen, at a
//! collector write what passes for the agent's own, and at a listener come from the agent's own address. A listener on all
//! addresses is not known here by any of them; that is for rules not to open.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::target::{Host, Target, normal};

/// The agent's own gateways, upstream proxy and listener: as they are configured, and as they were resolved.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    targets: HashSet<Target>,
    addresses: HashSet<(IpAddr, u16)>,
}

impl Guard {
    /// A guard for these hosts and ports, and for these addresses that some of them are known to have.
    #[must_use]
    pub fn new(targets: impl IntoIterator<Item = Target>, addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        let targets: HashSet<Target> = targets.into_iter().collect();
        let literals = targets.iter().filter_map(|target| match target.host {
            Host::Address(address) => Some((normal(address), target.port)),
            Host::Name(_) => None,
        });
        let addresses =
            addresses.into_iter().map(|address| (normal(address.ip()), address.port())).chain(literals).collect();
        Self { targets, addresses }
    }

    /// Whether this is, as it was asked for, one of the agent's own gateways, its proxy or its listener.
    #[must_use]
    pub fn holds(&self, target: &Target) -> bool {
        match target.host {
            Host::Address(address) => self.holds_address(address, target.port),
            Host::Name(_) => self.targets.contains(target),
        }
    }

    /// Whether this is an address of one of the agent's own gateways, its proxy or its listener, also behind an embedding IPv6 form.
    #[must_use]
    pub fn holds_address(&self, address: IpAddr, port: u16) -> bool {
        let address = normal(address);
        self.addresses.contains(&(address, port))
            || embedded(address).any(|(inner, _)| self.addresses.contains(&(IpAddr::V4(inner), port)))
    }
}

/// A range that holds a reserved address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    /// The range, in the family of the address that it was asked about.
    pub range: IpNet,
    /// What the range is and why it is reserved.
    pub why: &'static str,
}

/// Whether `network`, which somebody wrote into a rule and which holds `address`, is narrow enough to reach it.
///
/// # Errors
/// The reserved range that holds the address and does not wholly hold the network.
pub fn opens(network: &IpNet, address: IpAddr) -> Result<(), Reserved> {
    match reserved(address).into_iter().find(|reserved| !reserved.range.contains(network)) {
        Some(reserved) => Err(reserved),
        None => Ok(()),
    }
}

/// Every reserved range that holds `address`. Where the address embeds an IPv4 address, the reserved ranges of that one
/// count as well, as the IPv6 networks whose members embed them.
#[must_use]
pub fn reserved(address: IpAddr) -> Vec<Reserved> {
    match normal(address) {
        IpAddr::V4(address) => reserved_v4(address).map(|(range, why)| Reserved { range: range.into(), why }).collect(),
        IpAddr::V6(address) => {
            let own = RESERVED_V6.iter().filter(|(range, _)| range.contains(&address));
            let own = own.map(|&(range, why)| Reserved { range: range.into(), why });
            let inner = embedded(IpAddr::V6(address)).flat_map(|(inner, octets)| {
                reserved_v4(inner).map(move |(range, why)| {
                    let length = image_length(octets, range.prefix_len());
                    // A length always fits; if one did not, only the address itself would be written narrowly enough.
                    let range = Ipv6Net::new(address, length).unwrap_or_else(|_| address.into()).trunc();
                    Reserved { range: range.into(), why }
                })
            });
            own.chain(inner).collect()
        }
    }
}

fn reserved_v4(address: Ipv4Addr) -> impl Iterator<Item = (Ipv4Net, &'static str)> {
    RESERVED_V4.iter().copied().filter(move |(range, _)| range.contains(&address))
}

/// The IPv4 addresses that an address may stand for, each with the octets that hold it.
pub(super) fn embedded(address: IpAddr) -> impl Iterator<Item = (Ipv4Addr, Octets)> {
    let address = match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(address) => Some(address),
    };
    address.into_iter().flat_map(|address| {
        let held = EMBEDDING.iter().filter(move |(range, _)| range.contains(&address));
        held.map(move |&(_, octets)| (Ipv4Addr::from(octets.map(|at| address.octets()[at])), octets))
    })
}

/// How long the prefix is in IPv6 that fixes the first `length` bits of an IPv4 address held in `octets`.
fn image_length(octets: Octets, length: u8) -> u8 {
    let Some(last) = length.checked_sub(1) else { return 0 };
    let octet = octets.get(usize::from(last / 8)).copied().unwrap_or(15);
    u8::try_from(octet * 8).unwrap_or(120) + last % 8 + 1
}

/// Which octets of an IPv6 address hold an IPv4 address.
pub(super) type Octets = [usize; 4];

const fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)
}

const fn v6(segments: [u16; 8], length: u8) -> Ipv6Net {
    let [a, b, c, d, e, f, g, h] = segments;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), length)
}

const COMPATIBLE: Ipv6Net = v6([0, 0, 0, 0, 0, 0, 0, 0], 96);
const TRANSLATED: Ipv6Net = v6([0, 0, 0, 0, 0xffff, 0, 0, 0], 96);
const NAT64: Ipv6Net = v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96);
const NAT64_LOCAL: Ipv6Net = v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48);
const SIX_TO_FOUR: Ipv6Net = v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16);

const RESERVED_V4: &[(Ipv4Net, &str)] = &[
    (v4(0, 0, 0, 0, 8), "this host (RFC 1122 §3.2.1.3): a connection to 0.0.0.0 ends at the agent's own host"),
    (v4(127, 0, 0, 0, 8), "loopback: services of the agent's own host that trust whoever is on it"),
    (v4(169, 254, 0, 0, 16), "link-local: holds the metadata services of most clouds, which hand out credentials"),
    (v4(224, 0, 0, 0, 4), "multicast: not an address of one host"),
    (v4(240, 0, 0, 0, 4), "reserved (RFC 1112 §4) and broadcast: not an address of one host"),
    (v4(100, 100, 100, 200, 32), "the metadata service of Alibaba Cloud, which hands out credentials"),
    (v4(168, 63, 129, 16, 32), "the wire server of Azure, which hands out configuration and certificates"),
    (v4(192, 0, 0, 192, 32), "the metadata service of Oracle Cloud Classic"),
];

const RESERVED_V6: &[(Ipv6Net, &str)] = &[
    (v6([0, 0, 0, 0, 0, 0, 0, 0], 128), "unspecified: a connection to :: ends at the agent's own host"),
    (v6([0, 0, 0, 0, 0, 0, 0, 1], 128), "loopback: services of the agent's own host that trust whoever is on it"),
    (v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), "link-local: neighbours and metadata services, which need no route"),
    (v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), "multicast: not an address of one host"),
    (v6([0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x254], 128), "the metadata service of AWS, which hands out credentials"),
    (v6([0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x23], 128), "the pod identity service of AWS, which hands out credentials"),
    (
        v6([0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x254], 128),
        "the metadata service of Google Cloud, which hands out credentials",
    ),
    (v6([0xfd00, 0x0042, 0, 0, 0, 0, 0, 0x42], 128), "the metadata service of Scaleway, which hands out configuration"),
    (COMPATIBLE, "IPv4-compatible (RFC 4291 §2.5.5.1): another spelling of an IPv4 address"),
    (TRANSLATED, "IPv4-translated (RFC 2765 §2.1): another spelling of an IPv4 address"),
    (NAT64, "NAT64 (RFC 6052): a translator makes an IPv4 address of it"),
    (NAT64_LOCAL, "NAT64 for local use (RFC 8215): a translator makes an IPv4 address of it"),
    (SIX_TO_FOUR, "6to4 (RFC 3056): a relay makes an IPv4 address of it"),
    (v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 32), "Teredo (RFC 4380): a relay makes an IPv4 address of it"),
];

/// Where IPv4 addresses are embedded. In the prefix for local use, the operator of the translator chooses between the
/// forms of RFC 6052 §2.2, in which octet 8 is skipped; all four count, since nothing here knows which it is.
const EMBEDDING: &[(Ipv6Net, Octets)] = &[
    (COMPATIBLE, [12, 13, 14, 15]),
    (TRANSLATED, [12, 13, 14, 15]),
    (NAT64, [12, 13, 14, 15]),
    (NAT64_LOCAL, [6, 7, 9, 10]),
    (NAT64_LOCAL, [7, 9, 10, 11]),
    (NAT64_LOCAL, [9, 10, 11, 12]),
    (NAT64_LOCAL, [12, 13, 14, 15]),
    (SIX_TO_FOUR, [2, 3, 4, 5]),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn refuses(network: &str, address: &str) -> bool {
        opens(&network.parse().expect(network), address.parse().expect(address)).is_err()
    }

    #[test]
    fn no_wider_network_opens_a_reserved_address() {
        for (address, wide) in [
            ("0.0.0.0", "0.0.0.0/0"),
            ("0.1.2.3", "0.0.0.0/7"),
            ("127.0.0.1", "0.0.0.0/0"),
            ("127.255.255.255", "126.0.0.0/7"),
            ("169.254.169.254", "169.0.0.0/8"),
            ("169.254.170.2", "169.254.0.0/15"),
            ("224.0.0.1", "224.0.0.0/3"),
            ("239.255.255.255", "224.0.0.0/3"),
            ("240.0.0.1", "224.0.0.0/3"),
            ("255.255.255.255", "128.0.0.0/1"),
            ("100.100.100.200", "100.64.0.0/10"),
            ("100.100.100.200", "100.100.100.200/31"),
            ("168.63.129.16", "168.63.0.0/16"),
            ("192.0.0.192", "192.0.0.0/24"),
            ("::ffff:169.254.169.254", "0.0.0.0/0"),
            ("::", "::/0"),
            ("::", "::/127"),
            ("::1", "::/0"),
            ("::1", "::/127"),
            ("::a00:1", "::/0"),
            ("::7f00:1", "::/96"),
            ("::ffff:0:7f00:1", "::ffff:0:0:0/96"),
            ("fe80::1", "fe00::/8"),
            ("febf::1", "fe80::/9"),
            ("ff02::1", "fe00::/7"),
            ("fd00:ec2::254", "fc00::/7"),
            ("fd00:ec2::254", "fd00:ec2::/32"),
            ("fd00:ec2::23", "fd00:ec2::/64"),
            ("fd00:42::42", "fd00::/16"),
            ("fd20:ce::254", "fd20:ce::/64"),
            ("64:ff9b::a00:1", "64:ff9b::/32"),
            ("64:ff9b::a9fe:a9fe", "64:ff9b::/96"),
            ("64:ff9b::a9fe:a9fe", "64:ff9b::a900:0/104"),
            ("64:ff9b::6464:64c8", "64:ff9b::6464:6400/120"),
            ("64:ff9b:1::a00:1", "64:ff9b::/32"),
            // 127.0.0.1 in each of the four forms of RFC 6052.
            ("64:ff9b:1:7f00:0:100::", "64:ff9b:1::/48"),
            ("64:ff9b:1:7f:0:1::", "64:ff9b:1::/56"),
            ("64:ff9b:1:1:7f:0:100:0", "64:ff9b:1:1::/64"),
            ("64:ff9b:1:fffe::7f00:1", "64:ff9b:1:fffe::/96"),
            ("2002:a00:1::1", "2000::/3"),
            ("2002:7f00:1::1", "2002::/16"),
            ("2002:a9fe:a9fe::1", "2002:a800::/22"),
            ("2001:0:a00:1::1", "2000::/3"),
        ] {
            assert!(refuses(wide, address), "{wide} {address}");
            assert!(refuses("::/0", address) || refuses("0.0.0.0/0", address), "{address}");
        }
    }

    #[test]
    fn a_network_inside_of_the_range_opens_it() {
        for (address, network) in [
            ("127.0.0.1", "127.0.0.0/8"),
            ("127.0.0.1", "127.0.0.1/32"),
            ("169.254.169.254", "169.254.0.0/16"),
            ("255.255.255.255", "255.255.255.255/32"),
            ("100.100.100.200", "100.100.100.200/32"),
            ("::", "::/128"),
            ("::1", "::1/128"),
            ("fe80::1", "fe80::/10"),
            ("fd00:ec2::254", "fd00:ec2::254/128"),
            ("64:ff9b::a00:1", "64:ff9b::/96"),
            ("64:ff9b::a9fe:a9fe", "64:ff9b::a9fe:0/112"),
            ("64:ff9b:1:fffe::a00:1", "64:ff9b:1:fffe::a00:0/104"),
            ("64:ff9b:1:7f00:0:100::", "64:ff9b:1:7f00:0:100::/128"),
            ("2002:a00:1::1", "2002:a00::/24"),
            ("2002:7f00:1::1", "2002:7f00::/24"),
        ] {
            assert!(!refuses(network, address), "{network} {address}");
        }
    }

    #[test]
    fn neighbours_of_reserved_ranges_are_ordinary() {
        for address in [
            "1.0.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "169.255.0.0",
            "223.255.255.255",
            "100.100.100.199",
            "168.63.129.17",
            "10.0.0.1",
            "2001:db8::1",
            "2003::1",
            "fec0::1",
            "fd00:ec2::255",
            "64:ff9b:2::1",
            "64:ff9a::1",
            "::1:0:0:0",
        ] {
            assert_eq!(reserved(address.parse().expect(address)), [], "{address}");
        }
    }

    #[test]
    fn guards_its_targets_in_every_spelling() {
        let target = |text: &str| text.parse::<Target>().expect(text);
        let guard = Guard::new(
            [target("gateway.example.com:443"), target("192.0.2.1:3128")],
            [
                "[::ffff:198.51.100.7]:443".parse().expect("an address"),
                "[2001:db8::7]:443".parse().expect("an address"),
            ],
        );
        for text in [
            "Gateway.Example.com.:443",
            "192.0.2.1:3128",
            "[::ffff:192.0.2.1]:3128",
            "[64:ff9b::192.0.2.1]:3128",
            "[2002:c000:201::1]:3128",
            "198.51.100.7:443",
            "[2001:db8:0::7]:443",
        ] {
            assert!(guard.holds(&target(text)), "{text}");
        }
        for text in
            ["gateway.example.com:444", "example.com:443", "192.0.2.1:443", "192.0.2.2:3128", "[2001:db8::8]:443"]
        {
            assert!(!guard.holds(&target(text)), "{text}");
        }
    }
}

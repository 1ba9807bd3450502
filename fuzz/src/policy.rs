//! The rules in an agent's configuration, from their text to what they decide.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use caponier::config;
use caponier::identity::{Fingerprint, Principal};
use caponier::policy::Decision;
use caponier::policy::deny::Deny;
use caponier::policy::guard::{Guard, reserved};
use caponier::policy::pattern::HostPattern;
use caponier::policy::ports::Ports;
use caponier::policy::rule::{Allowlist, PrincipalPattern, Reach, Rule};
use caponier::policy::window::Window;
use caponier::target::{Host, Name, Target, normal};
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};

/// Requests that are tried on one text: enough for every field of a few rules.
const REQUESTS: usize = 300;

/// What is tried of each field, beside what the rules name.
const ADDRESSES: [&str; 6] =
    ["127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "10.0.0.1", "::1"];

/// A text that means anything permits nothing that a second reading of its rules does not permit, and every fault of one that
/// means nothing is said in printable words.
pub fn holds(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let list = match config::rules(Path::new("rules.toml"), text) {
        Ok(list) => list,
        Err(faults) => {
            let said = faults.to_string();
            assert!(!said.is_empty() && said.lines().all(super::is_printable), "{said:?}");
            return;
        }
    };
    for rule in list.rules() {
        rule.check().expect("a rule that was read is in order");
        assert!(rule.name.bytes().all(|byte| byte.is_ascii_graphic()));
    }
    list.denies().iter().for_each(|deny| deny.check().expect("a deny rule that was read is in order"));
    let (names, addresses, ports, principals, times) = fields(&list);
    let own = addresses.first().map(|address| SocketAddr::new(*address, ports[0]));
    let guard = Guard::new([], own);
    let resolved: Vec<SocketAddr> =
        addresses.iter().flat_map(|ip| ports.iter().map(|port| (*ip, *port).into())).collect();
    let hosts: Vec<Host> =
        names.into_iter().map(Host::Name).chain(addresses.iter().copied().map(normal).map(Host::Address)).collect();
    // Each field in another step, so that in few requests all their values meet.
    for at in 0..REQUESTS {
        let pick = |step: usize, length: usize| (at * step + at / length.max(1)) % length.max(1);
        let target = Target { host: hosts[pick(1, hosts.len())].clone(), port: ports[pick(3, ports.len())] };
        let principal = &principals[pick(5, principals.len())];
        let now = times[pick(7, times.len())];
        decision_holds(&list, principal, &target, &resolved, &guard, now);
    }
}

fn decision_holds(
    list: &Allowlist,
    principal: &Principal,
    target: &Target,
    resolved: &[SocketAddr],
    guard: &Guard,
    now: Timestamp,
) {
    let considered = list.consider(principal, target, guard, now);
    match list.decide(principal, target, resolved, guard, now) {
        Decision::Allow(permit) => {
            assert!(considered.is_ok(), "what is not looked up is not permitted");
            assert_eq!(permit.target(), target);
            let rule = list.rules().iter().find(|rule| rule.name == permit.rule()).expect("a rule of the list");
            assert!(fits(rule, principal, target, now), "{rule:?} does not fit {target}");
            assert!(!permit.addresses().is_empty());
            for address in permit.addresses() {
                assert!(!permit.refused().contains(address));
                match (&target.host, &rule.reach) {
                    (Host::Address(literal), _) => assert_eq!(*address, SocketAddr::new(normal(*literal), target.port)),
                    (_, reach) => {
                        assert!(
                            resolved.iter().any(|one| normal(one.ip()) == address.ip() && one.port() == address.port())
                        );
                        let service = matches!(reach, Reach::Services { .. });
                        assert!(service || address.port() == target.port);
                        assert!(has_port(&rule.ports, address.port()));
                    }
                }
                let ip = address.ip();
                assert!(!guard.holds_address(ip, address.port()), "{address} is a way out of the agent's own");
                let open = |network: &&IpNet| {
                    network.contains(&ip) && reserved(ip).iter().all(|reserved| reserved.range.contains(*network))
                };
                assert!(networks(rule).iter().find(open).is_some(), "{address} lies in no network of {rule:?}");
                for deny in list.denies() {
                    assert!(!denies(deny, principal, target, *address, now), "{address} is denied by {deny:?}");
                }
            }
        }
        Decision::Deny(denial) => {
            assert!(!denial.detail.is_empty() && super::is_printable(&denial.detail), "{denial:?}");
            if let Err(considered) = considered {
                assert_eq!(considered, denial);
            }
        }
    }
}

// What rules mean, a second time.

fn fits(rule: &Rule, principal: &Principal, target: &Target, now: Timestamp) -> bool {
    let host = match (&rule.reach, &target.host) {
        (Reach::Hosts { hosts, .. }, Host::Name(name)) => {
            // A wildcard stands for no service.
            hosts.iter().any(|host| matches(host.as_str(), name) && (host.name().is_some() || !name.is_service()))
        }
        (Reach::Services { services, .. }, Host::Name(name)) => services.iter().any(|service| service == name),
        (Reach::Addresses(_), Host::Address(_)) => true,
        _ => false,
    };
    host && has_port(&rule.ports, target.port)
        && concerns(rule.principals.as_deref(), principal)
        && within(rule.window, now)
}

fn denies(deny: &Deny, principal: &Principal, target: &Target, address: SocketAddr, now: Timestamp) -> bool {
    let name = matches!(&target.host, Host::Name(name) if deny.hosts.iter().any(|host| matches(host.as_str(), name)));
    let held = deny.addresses.iter().any(|network| network.contains(&address.ip()));
    (name || held)
        && has_port(&deny.ports, address.port())
        && concerns(deny.principals.as_deref(), principal)
        && within(deny.window, now)
}

fn networks(rule: &Rule) -> &[IpNet] {
    match &rule.reach {
        Reach::Hosts { within, .. } | Reach::Services { within, .. } => within,
        Reach::Addresses(networks) => networks,
    }
}

fn has_port(ports: &[Ports], port: u16) -> bool {
    ports.iter().any(|range| {
        let text = range.to_string();
        let (first, last) = text.split_once('-').unwrap_or((&text, &text));
        (first.parse::<u16>().expect("a port")..=last.parse().expect("a port")).contains(&port)
    })
}

fn concerns(principals: Option<&[PrincipalPattern]>, principal: &Principal) -> bool {
    principals.is_none_or(|all| all.iter().any(|pattern| pattern.matches(principal)))
}

fn within(window: Window, now: Timestamp) -> bool {
    window.not_before.is_none_or(|from| from <= now) && window.expires.is_none_or(|until| now < until)
}

/// Whether labels fit, from the left: `*` takes one, `**` takes one or more.
fn matches(pattern: &str, name: &Name) -> bool {
    fn fit(pattern: &[&str], labels: &[&str]) -> bool {
        match (pattern.split_first(), labels.split_first()) {
            (None, None) => true,
            (Some((&"**", rest)), Some((_, labels))) => fit(rest, labels) || fit(pattern, labels),
            (Some((&"*", rest)), Some((_, labels))) => fit(rest, labels),
            (Some((literal, rest)), Some((label, labels))) => literal == label && fit(rest, labels),
            _ => false,
        }
    }
    let (pattern, labels): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), name.as_str().split('.').collect());
    // The second reading need not be quick, but has to end.
    pattern.iter().filter(|label| **label == "**").count() > 4 || fit(&pattern, &labels)
}

/// What to ask for: what the rules name, what lies beside it, and what no rule should reach.
#[expect(clippy::type_complexity, reason = "the five fields of a request")]
fn fields(list: &Allowlist) -> (Vec<Name>, Vec<IpAddr>, Vec<u16>, Vec<Principal>, Vec<Timestamp>) {
    let (mut names, mut addresses, mut ports) = (vec![], vec![], vec![]);
    let (mut principals, mut times) = (vec![], vec![Timestamp::UNIX_EPOCH]);
    let mut name = |text: &str| names.extend(text.parse::<Name>());
    let mut host = |pattern: &HostPattern| {
        let text = pattern.as_str();
        name(text);
        name(&text.replace("**", "x.y").replace('*', "z"));
        name(&format!("other.{}", text.replace('*', "x")));
        name(&text.replace("**.", "").replace("*.", ""));
    };
    for rule in list.rules() {
        match &rule.reach {
            Reach::Hosts { hosts, .. } => hosts.iter().take(4).for_each(&mut host),
            Reach::Services { .. } | Reach::Addresses(_) => {}
        }
    }
    list.denies().iter().for_each(|deny| deny.hosts.iter().take(4).for_each(&mut host));
    for rule in list.rules() {
        if let Reach::Services { services, .. } = &rule.reach {
            names.extend(services.iter().take(4).cloned());
        }
    }
    names.extend(["db.internal", "_postgresql._tcp.db.internal"].map(|text| text.parse().expect("a name")));
    let of_rules = list.rules().iter().map(networks);
    for network in
        of_rules.chain(list.denies().iter().map(|deny| deny.addresses.as_slice())).flat_map(|all| all.iter().take(4))
    {
        addresses.extend([network.network(), network.broadcast()].map(normal));
        addresses.extend([network.network(), network.broadcast()].map(beside));
    }
    addresses.extend(ADDRESSES.map(|text| text.parse::<IpAddr>().expect("an address")));
    let of_rules = list.rules().iter().map(|rule| (&rule.ports, rule.principals.as_deref(), rule.window));
    let of_denies = list.denies().iter().map(|deny| (&deny.ports, deny.principals.as_deref(), deny.window));
    for (ranges, patterns, window) in of_rules.chain(of_denies) {
        for range in ranges.iter().take(4) {
            for end in range.to_string().split('-') {
                let end: u16 = end.parse().expect("a port");
                ports.extend([end, end.saturating_sub(1).max(1), end.saturating_add(1)]);
            }
        }
        for pattern in patterns.unwrap_or_default().iter().take(4) {
            principals.extend(pattern.to_string().replace('*', "x").parse::<Principal>());
        }
        for edge in window.edges() {
            let second = SignedDuration::from_secs(1);
            times.extend(
                [Some(edge), edge.checked_sub(second).ok(), edge.checked_add(second).ok()].into_iter().flatten(),
            );
        }
    }
    ports.push(5432);
    principals.push("ci-deploy".parse().expect("a principal"));
    let key = "SHA256:nThbg6kXUpJWGl7E1IGOCspRomTxdCARLviKw6E5SY8".parse::<Fingerprint>();
    principals.push(Principal::Key(key.expect("a fingerprint")));
    addresses.truncate(16);
    (names, addresses, ports, principals, times)
}

/// The next address.
fn beside(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => normal(IpAddr::V4(u32::from(v4).wrapping_add(1).into())),
        IpAddr::V6(v6) => normal(IpAddr::V6(u128::from(v6).wrapping_add(1).into())),
    }
}

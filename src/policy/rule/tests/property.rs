//! What is never permitted, over rules and requests that nobody thought of.

use proptest::prelude::*;

use super::super::super::guard::reserved;
use super::*;

/// Addresses from a small world, in which hits are as likely as misses, and from everywhere.
fn any_address() -> impl Strategy<Value = IpAddr> {
    let small = (0..4_u8, 0..4_u8).prop_map(|(c, d)| IpAddr::from([10, 0, c, d]));
    let reserved =
        prop::sample::select(vec!["127.0.0.1", "169.254.169.254", "::1", "fe80::1", "0.0.0.0", "fd00:ec2::254"]);
    let spelt = any_v4().prop_flat_map(|v4| {
        let [a, b] = [u16::from_be_bytes([v4[0], v4[1]]), u16::from_be_bytes([v4[2], v4[3]])];
        prop::sample::select(vec![
            IpAddr::from([0, 0, 0, 0, 0, 0xffff, a, b]),
            IpAddr::from([0, 0, 0, 0, 0, 0, a, b]),
            IpAddr::from([0x64, 0xff9b, 0, 0, 0, 0, a, b]),
            IpAddr::from([0x64, 0xff9b, 1, 0, 0, 0, a, b]),
            IpAddr::from([0x2002, a, b, 0, 0, 0, 0, 1]),
        ])
    });
    prop_oneof![
        4 => small,
        1 => reserved.prop_map(|text| text.parse().expect(text)),
        2 => spelt,
        1 => any::<IpAddr>(),
    ]
}

fn any_v4() -> impl Strategy<Value = [u8; 4]> {
    prop_oneof![Just([127, 0, 0, 1]), Just([169, 254, 169, 254]), Just([10, 0, 0, 1]), any::<[u8; 4]>()]
}

fn any_network() -> impl Strategy<Value = IpNet> {
    (any_address(), any::<u8>()).prop_map(|(address, length)| {
        let longest = IpNet::from(address).max_prefix_len();
        IpNet::new(address, length % (longest + 1)).expect("a length that fits").trunc()
    })
}

fn any_name() -> impl Strategy<Value = Name> {
    prop::sample::select(vec!["a", "a.b", "b", "a.b.c", "c.b.c", "_s._tcp.c"])
        .prop_map(|text| text.parse().expect(text))
}

fn any_pattern() -> impl Strategy<Value = HostPattern> {
    prop::sample::select(vec!["a", "a.b", "*.b", "**.c", "*.b.c", "a.*.c"]).prop_map(|text| text.parse().expect(text))
}

fn any_ports() -> impl Strategy<Value = Vec<Ports>> {
    prop::collection::vec(prop::sample::select(vec!["1", "2", "3", "1-2", "2-3"]), 1..3)
        .prop_map(|texts| texts.iter().map(|text| text.parse().expect(text)).collect())
}

/// Windows about the moment of the test, which is open on one side or both, or closed.
fn any_window() -> impl Strategy<Value = Window> {
    let edge = || prop::option::of(-2..3_i64);
    (edge(), edge()).prop_map(|(from, until)| {
        let at = |edge: i64| Timestamp::from_second(now().as_second() + edge).expect("a moment");
        let window = Window { not_before: from.map(at), expires: until.map(at) };
        if window.check().is_ok() { window } else { Window::default() }
    })
}

fn any_deny() -> impl Strategy<Value = Deny> {
    let hosts = prop::collection::vec(any_pattern(), 0..3);
    let networks = prop::collection::vec(any_network(), 0..2);
    (hosts, networks, any_ports(), any_principals(), any_window()).prop_map(
        |(hosts, addresses, ports, principals, window)| Deny {
            name: String::new(),
            hosts,
            addresses,
            ports,
            principals,
            window,
        },
    )
}

fn any_principals() -> impl Strategy<Value = Option<Vec<PrincipalPattern>>> {
    let pattern = prop::sample::select(vec!["a", "a*", "*", KEY]).prop_map(|text| text.parse().expect(text));
    prop::option::of(prop::collection::vec(pattern, 1..3))
}

fn any_principal() -> impl Strategy<Value = Principal> {
    prop::sample::select(vec!["a", "ab", "b", KEY, OTHER_KEY]).prop_map(|text| text.parse().expect(text))
}

fn any_target() -> impl Strategy<Value = Target> {
    let host = prop_oneof![any_name().prop_map(Host::Name), any_address().prop_map(|a| Host::Address(normal(a)))];
    (host, 1..4_u16).prop_map(|(host, port)| Target { host, port })
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let networks = || prop::collection::vec(any_network(), 1..4);
    let reach = prop_oneof![
        (prop::collection::vec(any_pattern(), 1..3), networks())
            .prop_map(|(hosts, within)| Reach::Hosts { hosts, within }),
        networks().prop_map(|within| Reach::Services { services: all(&["_s._tcp.c"]), within }),
        networks().prop_map(Reach::Addresses),
    ];
    (reach, any_ports(), any_principals(), any_window()).prop_map(|(reach, ports, principals, window)| Rule {
        name: String::new(),
        reach,
        ports,
        principals,
        window,
    })
}

/// Whether a rule fits but for the addresses, written down a second time and without any of the code above.
fn fits(rule: &Rule, principal: &Principal, target: &Target) -> bool {
    let reach = match (&rule.reach, &target.host) {
        (Reach::Hosts { hosts, .. }, Host::Name(name)) => {
            !name.as_str().starts_with("_s._tcp.") && hosts.iter().any(|host| stands_for(host, name))
        }
        (Reach::Services { .. }, Host::Name(name)) => name.as_str() == "_s._tcp.c",
        (Reach::Addresses(_), Host::Address(_)) => true,
        _ => false,
    };
    reach && has_port(&rule.ports, target.port) && concerns(&rule.principals, principal) && is_open(&rule.window)
}

fn stands_for(pattern: &HostPattern, name: &Name) -> bool {
    fn rest(pattern: &[&str], labels: &[&str]) -> bool {
        match (pattern, labels) {
            ([], []) => true,
            (["**", after @ ..], [_, others @ ..]) => rest(after, others) || rest(pattern, others),
            (["*", after @ ..], [_, others @ ..]) => rest(after, others),
            ([literal, after @ ..], [label, others @ ..]) => literal == label && rest(after, others),
            _ => false,
        }
    }
    let pattern: Vec<&str> = pattern.as_str().split('.').collect();
    let labels: Vec<&str> = name.as_str().split('.').collect();
    rest(&pattern, &labels)
}

fn has_port(ports: &[Ports], port: u16) -> bool {
    let ends = |ports: &Ports| {
        let text = ports.to_string();
        let (first, last) = text.split_once('-').unwrap_or((&text, &text));
        (first.parse::<u16>().expect("a port"), last.parse::<u16>().expect("a port"))
    };
    ports.iter().map(ends).any(|(first, last)| first <= port && port <= last)
}

fn concerns(principals: &Option<Vec<PrincipalPattern>>, principal: &Principal) -> bool {
    principals.as_ref().is_none_or(|all| all.iter().any(|pattern| pattern.matches(principal)))
}

fn is_open(window: &Window) -> bool {
    window.not_before.is_none_or(|from| from <= now()) && window.expires.is_none_or(|until| now() < until)
}

/// Whether a deny rule holds for a target that leads to this address.
fn denies(deny: &Deny, principal: &Principal, target: &Target, address: SocketAddr) -> bool {
    let by_name = matches!(&target.host, Host::Name(name) if deny.hosts.iter().any(|host| stands_for(host, name)));
    let by_address = deny.addresses.iter().any(|network| network.contains(&normal(address.ip())));
    concerns(&deny.principals, principal)
        && is_open(&deny.window)
        && ((by_name || by_address) && has_port(&deny.ports, address.port())
            || by_name && has_port(&deny.ports, target.port))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn never_permits_more_than_one_rule_says(
        mut rules in prop::collection::vec(any_rule(), 0..5),
        mut denials in prop::collection::vec(any_deny(), 0..3),
        principal in any_principal(),
        target in any_target(),
        resolved in prop::collection::vec((any_address(), 1..4_u16), 0..5),
        own in prop::collection::vec((any_address(), 1..4_u16), 0..3),
    ) {
        for (index, rule) in rules.iter_mut().enumerate() {
            rule.name = format!("rule-{index}");
        }
        for (index, deny) in denials.iter_mut().enumerate() {
            deny.name = format!("deny-{index}");
        }
        let Ok(list) = Allowlist::new(rules).and_then(|list| list.denying(denials)) else { return Ok(()) };
        let guard = Guard::new([], own.iter().map(|&own| own.into()));
        let resolved: Vec<SocketAddr> = resolved.into_iter().map(SocketAddr::from).collect();
        let denied = |address| list.denies().iter().any(|deny| denies(deny, &principal, &target, address));
        let service = |rule: &Rule| matches!(rule.reach, Reach::Services { .. });
        let considered = list.consider(&principal, &target, &guard, now());
        match list.decide(&principal, &target, &resolved, &guard, now()) {
            Decision::Allow(permit) => {
                prop_assert!(considered.is_ok());
                prop_assert_eq!(permit.target(), &target);
                prop_assert!(!permit.addresses().is_empty());
                let rule = list.rules().iter().find(|rule| rule.name == permit.rule()).expect("a rule of the list");
                prop_assert!(fits(rule, &principal, &target));
                for &address in permit.addresses() {
                    match target.host {
                        Host::Address(literal) => prop_assert_eq!(address, SocketAddr::new(literal, target.port)),
                        Host::Name(_) => prop_assert!(
                            resolved.iter().any(|one| (normal(one.ip()), one.port()) == (address.ip(), address.port()))
                        ),
                    }
                    let port = address.port();
                    let fitting = if service(rule) { has_port(&rule.ports, port) } else { port == target.port };
                    prop_assert!(fitting, "port {port}");
                    prop_assert!(!permit.refused().contains(&address));
                    prop_assert!(!denied(address), "{address} is denied");
                    let (address, port) = (address.ip(), address.port());
                    prop_assert!(!own.iter().any(|(one, own)| normal(*one) == address && *own == port));
                    let network = rule.reach.networks().iter().find(|network| {
                        network.contains(&address) && reserved(address).iter().all(|r| r.range.contains(*network))
                    });
                    prop_assert!(network.is_some(), "{address} is in none of {rule:?}");
                }
            }
            Decision::Deny(denial) => {
                prop_assert!(!denial.detail.is_empty());
                prop_assert_eq!(denial.rule.is_some(), denial.reason == Reason::DenyRule);
                // An ordinary address that a fitting rule holds, and nothing denies, is not refused for no reason.
                let candidates = match target.host {
                    Host::Address(literal) => vec![SocketAddr::new(literal, target.port)],
                    Host::Name(_) => resolved.iter().map(|one| SocketAddr::new(normal(one.ip()), one.port())).collect(),
                };
                for address in candidates {
                    let (ip, port) = (address.ip(), address.port());
                    let free = reserved(ip).is_empty() && !guard.holds_address(ip, port) && !denied(address);
                    let held = list.rules().iter().any(|rule| {
                        let fitting = if service(rule) { has_port(&rule.ports, port) } else { port == target.port };
                        fits(rule, &principal, &target)
                            && fitting
                            && rule.reach.networks().iter().any(|network| network.contains(&ip))
                    });
                    prop_assert!(!(free && held), "{address} was refused: {denial:?}");
                }
                if let Err(considered) = considered {
                    prop_assert_eq!(considered, denial);
                }
            }
        }
    }
}

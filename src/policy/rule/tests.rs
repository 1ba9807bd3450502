//! Tests of the module above.

use std::error::Error;
use std::net::IpAddr;

use super::*;

mod property;

const KEY: &str = "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const OTHER_KEY: &str = "SHA256:AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

fn all<T: FromStr<Err: fmt::Debug>>(texts: &[&str]) -> Vec<T> {
    texts.iter().map(|text| text.parse().expect(text)).collect()
}

fn hosts(name: &str, hosts: &[&str], within: &[&str], ports: &[u16], principals: Option<&[&str]>) -> Rule {
    let reach = Reach::Hosts { hosts: all(hosts), within: all(within) };
    let window = Window::default();
    Rule { name: name.into(), reach, ports: self::ports(ports), principals: principals.map(all), window }
}

fn addresses(name: &str, networks: &[&str], ports: &[u16], principals: Option<&[&str]>) -> Rule {
    let reach = Reach::Addresses(all(networks));
    let window = Window::default();
    Rule { name: name.into(), reach, ports: self::ports(ports), principals: principals.map(all), window }
}

fn ports(ports: &[u16]) -> Vec<Ports> {
    ports.iter().map(|port| Ports::try_from(*port).expect("a port")).collect()
}

/// Rules as somebody careful writes them.
fn careful() -> Vec<Rule> {
    let ours = Some(&["provisioner", "ci-*"][..]);
    vec![
        hosts("orders-db", &["orders.db.internal"], &["10.20.0.0/16", "2001:db8:20::/48"], &[5432], ours),
        addresses("legacy", &["10.30.4.7/32", "::ffff:10.31.0.0/112"], &[3306], ours),
        hosts("own-host", &["own.internal", "localhost"], &["127.0.0.0/8", "10.0.0.0/8"], &[8080], None),
        hosts("key", &["vault.internal"], &["10.40.0.0/16"], &[8200], Some(&[KEY])),
        hosts("names-only", &["consul.internal"], &["10.40.0.0/16"], &[8500], Some(&["*"])),
        hosts("gateway", &["gateway.example.com", "alias.internal"], &["192.0.2.0/24"], &[443], None),
        hosts("eu", &["*.eu.internal", "**.shard.internal"], &["10.50.0.0/16"], &[5432], ours),
        Rule { ports: all(&["6000-6010"]), ..hosts("range", &["range.internal"], &["10.50.0.0/16"], &[1], ours) },
        Rule {
            reach: Reach::Services { services: all(&["_pg._tcp.db.internal"]), within: all(&["10.60.0.0/16"]) },
            ports: all(&["5432-5440"]),
            ..hosts("service", &["x"], &["10.60.0.0/16"], &[1], ours)
        },
        Rule {
            window: window("2026-12-24T00:00:00Z", "2027-01-02T00:00:00Z"),
            ..hosts("support", &["support.internal"], &["10.70.0.0/16"], &[22], ours)
        },
        hosts("denied", &["denied.internal", "partly.internal"], &["10.80.0.0/16"], &[443], None),
        addresses("denied-address", &["10.80.0.0/16"], &[443], None),
    ]
}

/// And what is denied beside them.
fn denials() -> Vec<Deny> {
    let deny = |name: &str, hosts: &[&str], addresses: &[&str]| Deny {
        name: name.to_owned(),
        hosts: all(hosts),
        addresses: all(addresses),
        ports: all(&["1-65535"]),
        principals: None,
        window: Window::default(),
    };
    vec![
        deny("no-name", &["denied.internal", "**.secret.shard.internal"], &[]),
        deny("no-address", &[], &["10.80.9.0/24", "::ffff:10.50.9.0/120"]),
        Deny { ports: all(&["5440"]), ..deny("no-port", &["_pg._tcp.db.internal"], &["10.60.0.0/16"]) },
        Deny { principals: Some(all(&["ci-bad"])), ..deny("no-ci", &["orders.db.internal"], &["10.30.4.7/32"]) },
        Deny {
            window: window("2027-01-01T00:00:00Z", "2027-01-01T01:00:00Z"),
            ..deny("freeze", &["frozen.eu.internal"], &["10.31.0.0/24"])
        },
    ]
}

fn window(not_before: &str, expires: &str) -> Window {
    Window { not_before: Some(not_before.parse().expect(not_before)), expires: Some(expires.parse().expect(expires)) }
}

/// The same, and rules that hold every address there is.
fn careless() -> Vec<Rule> {
    let mut rules = careful();
    rules.push(hosts("wide", &["wide.internal", "localhost"], &["0.0.0.0/0", "::/0"], &[80], None));
    rules.push(addresses("any", &["0.0.0.0/0", "::/0", "64:ff9b::/96"], &[80, 443, 3128], None));
    rules
}

fn guard() -> Guard {
    Guard::new(
        all::<Target>(&["gateway.example.com:443", "192.0.2.9:3128"]),
        all::<std::net::SocketAddr>(&["192.0.2.7:443", "[2001:db8:ffff::7]:443"]),
    )
}

fn decide(rules: Vec<Rule>, principal: &str, target: &str, resolved: &[&str]) -> Result<Permit, Denial> {
    let principal = principal.parse().expect(principal);
    let target = target.parse().expect(target);
    let resolved = found(&target, resolved);
    list(rules).decide(&principal, &target, &resolved, &guard(), now()).into_result()
}

fn list(rules: Vec<Rule>) -> Allowlist {
    Allowlist::new(rules).and_then(|list| list.denying(denials())).expect("an allowlist")
}

fn consider(rules: Vec<Rule>, principal: &str, target: &str) -> Result<Lookup, Denial> {
    let principal = principal.parse().expect(principal);
    list(rules).consider(&principal, &target.parse().expect(target), &guard(), now())
}

fn now() -> Timestamp {
    "2027-01-01T00:00:00Z".parse().expect("a moment")
}

/// What a lookup gives: addresses with the target's port, unless they come with one.
fn found(target: &Target, addresses: &[&str]) -> Vec<SocketAddr> {
    let one = |text: &&str| match text.parse::<IpAddr>() {
        Ok(address) => SocketAddr::new(address, target.port),
        Err(_) => text.parse().expect(text),
    };
    addresses.iter().map(one).collect()
}

type Refusal<'a> = (&'a str, &'a str, &'a str, &'a [&'a str], Reason);

fn refuses(rules: fn() -> Vec<Rule>, (case, principal, target, resolved, reason): Refusal<'_>) {
    let denial = decide(rules(), principal, target, resolved).expect_err(case);
    assert_eq!(denial.reason, reason, "{case}: {}", denial.detail);
    assert!(!denial.detail.is_empty(), "{case}");
    // What depends on the addresses of a name is not known before the lookup; everything else is.
    let by_name = matches!(target.parse(), Ok(Target { host: Host::Name(_), .. }));
    let late = matches!(reason, Reason::NoAddress | Reason::OutsideWithin | Reason::ReservedAddress)
        || matches!(target, "alias.internal:443" | "partly.internal:443" | "_pg._tcp.db.internal:5432")
        || case.starts_with("late");
    match consider(rules(), principal, target) {
        Ok(_) => assert!(by_name && late, "{case}: looked up"),
        Err(considered) => assert_eq!(considered.reason, reason, "{case}: {}", considered.detail),
    }
}

#[test]
fn refuses_with_one_field_wrong() {
    let (db, in_db) = ("orders.db.internal:5432", &["10.20.0.5"][..]);
    for row in [
        ("other port", "provisioner", "orders.db.internal:22", in_db, Reason::Port),
        ("next port", "provisioner", "orders.db.internal:5433", in_db, Reason::Port),
        ("port of another rule", "provisioner", "orders.db.internal:3306", in_db, Reason::Port),
        ("other host", "provisioner", "stock.db.internal:5432", in_db, Reason::NoRule),
        ("suffix trick", "provisioner", "orders.db.internal.evil.com:5432", in_db, Reason::NoRule),
        ("prefix trick", "provisioner", "evil-orders.db.internal:5432", in_db, Reason::NoRule),
        ("label before", "provisioner", "evil.orders.db.internal:5432", in_db, Reason::NoRule),
        ("parent domain", "provisioner", "db.internal:5432", in_db, Reason::NoRule),
        ("first label", "provisioner", "orders:5432", in_db, Reason::NoRule),
        ("literal for a named grant", "provisioner", "10.20.0.5:5432", &[], Reason::NoRule),
        ("IPv6 literal for a named grant", "provisioner", "[2001:db8:20::5]:5432", &[], Reason::NoRule),
        ("name for an address grant", "provisioner", "legacy.internal:3306", &["10.30.4.7"], Reason::NoRule),
        (
            "granted name, other rule's port and address",
            "provisioner",
            "orders.db.internal:3306",
            &["10.30.4.7"],
            Reason::Port,
        ),
        ("neighbouring literal", "provisioner", "10.30.4.8:3306", &[], Reason::NoRule),
        ("what is resolved is not what is asked for", "provisioner", "10.30.4.8:3306", &["10.30.4.7"], Reason::NoRule),
        ("literal, other port", "provisioner", "10.30.4.7:3307", &[], Reason::Port),
        ("principal not listed", "intruder", db, in_db, Reason::Principal),
        ("principal that begins alike", "provisioner2", db, in_db, Reason::Principal),
        ("principal outside of the pattern", "my-ci-1", db, in_db, Reason::Principal),
        ("principal not listed, literal", "intruder", "10.30.4.7:3306", &[], Reason::Principal),
        ("key principal where names are listed", KEY, db, in_db, Reason::Principal),
        ("key principal for any name", KEY, "consul.internal:8500", &["10.40.0.1"], Reason::Principal),
        ("other key", OTHER_KEY, "vault.internal:8200", &["10.40.0.1"], Reason::Principal),
        ("name for a key", "provisioner", "vault.internal:8200", &["10.40.0.1"], Reason::Principal),
        ("no address", "provisioner", db, &[], Reason::NoAddress),
        ("outside", "provisioner", db, &["10.21.0.5"], Reason::OutsideWithin),
        ("all outside", "provisioner", db, &["10.21.0.5", "192.0.2.1", "2001:db8:21::1"], Reason::OutsideWithin),
        ("address of the other rule", "provisioner", db, &["10.30.4.7"], Reason::OutsideWithin),
        ("mapped outside", "provisioner", db, &["::ffff:10.21.0.5"], Reason::OutsideWithin),
        ("IPv4 spelt as NAT64", "provisioner", db, &["64:ff9b::10.20.0.5"], Reason::OutsideWithin),
        ("metadata by a granted name", "provisioner", db, &["169.254.169.254"], Reason::OutsideWithin),
        ("late: another port than was asked for", "provisioner", db, &["10.20.0.5:22"], Reason::Port),
        ("no label for the wildcard", "provisioner", "eu.internal:5432", &["10.50.0.1"], Reason::NoRule),
        ("two labels for a wildcard", "provisioner", "a.b.eu.internal:5432", &["10.50.0.1"], Reason::NoRule),
        ("part of a label", "provisioner", "a.xeu.internal:5432", &["10.50.0.1"], Reason::NoRule),
        ("no label for wildcards", "provisioner", "shard.internal:5432", &["10.50.0.1"], Reason::NoRule),
        ("suffix after wildcards", "provisioner", "a.b.shard.internal.evil.com:5432", &["10.50.0.1"], Reason::NoRule),
        ("wildcard, outside", "provisioner", "a.eu.internal:5432", &["10.51.0.1"], Reason::OutsideWithin),
        ("wildcard, other port", "provisioner", "a.eu.internal:5433", &["10.50.0.1"], Reason::Port),
        ("wildcard, other principal", "intruder", "a.eu.internal:5432", &["10.50.0.1"], Reason::Principal),
        ("literal for a wildcard", "provisioner", "10.50.0.1:5432", &[], Reason::NoRule),
        ("service for wildcards", "provisioner", "_pg._tcp.shard.internal:5432", &["10.50.0.1"], Reason::NoRule),
        ("port before the range", "provisioner", "range.internal:5999", &["10.50.0.1"], Reason::Port),
        ("port after the range", "provisioner", "range.internal:6011", &["10.50.0.1"], Reason::Port),
        ("other service", "provisioner", "_my._tcp.db.internal:5432", &["10.60.0.1:5432"], Reason::NoRule),
        ("host of a service", "provisioner", "db.internal:5432", &["10.60.0.1"], Reason::NoRule),
        ("port that a service may not be asked for", "provisioner", "_pg._tcp.db.internal:22", &[], Reason::Port),
        ("instance's port", "provisioner", "_pg._tcp.db.internal:5432", &["10.60.0.1:22"], Reason::Port),
        ("instance outside", "provisioner", "_pg._tcp.db.internal:5432", &["10.61.0.1:5433"], Reason::OutsideWithin),
        ("instance denied", "provisioner", "_pg._tcp.db.internal:5432", &["10.60.0.1:5440"], Reason::DenyRule),
        ("service denied as asked for", "provisioner", "_pg._tcp.db.internal:5440", &[], Reason::DenyRule),
        ("service, other principal", "intruder", "_pg._tcp.db.internal:5432", &["10.60.0.1:5432"], Reason::Principal),
        ("denied name", "provisioner", "denied.internal:443", &["10.80.0.1"], Reason::DenyRule),
        ("denied name, however written", "provisioner", "DENIED.Internal.:443", &["10.80.0.1"], Reason::DenyRule),
        ("denied by wildcards", "provisioner", "a.b.secret.shard.internal:5432", &["10.50.0.1"], Reason::DenyRule),
        ("denied literal", "provisioner", "10.80.9.1:443", &[], Reason::DenyRule),
        ("denied mapped literal", "provisioner", "[::ffff:10.80.9.1]:443", &[], Reason::DenyRule),
        ("denied address of an allowed name", "provisioner", "partly.internal:443", &["10.80.9.1"], Reason::DenyRule),
        ("late: denied in another family's network", "ci-1", "a.eu.internal:5432", &["10.50.9.1"], Reason::DenyRule),
        ("denied, and not allowed either", "provisioner", "10.80.9.1:22", &[], Reason::DenyRule),
        ("denied to one principal", "ci-bad", db, in_db, Reason::DenyRule),
        ("denied to one principal, literal", "ci-bad", "10.30.4.7:3306", &[], Reason::DenyRule),
        ("denied for a time", "provisioner", "frozen.eu.internal:5432", &["10.50.0.1"], Reason::DenyRule),
        ("denied for a time, literal", "provisioner", "10.31.0.1:3306", &[], Reason::DenyRule),
        ("metadata beside loopback", "provisioner", "own.internal:8080", &["169.254.169.254"], Reason::OutsideWithin),
    ] {
        refuses(careful, row);
    }
}

/// A denied address hides behind no other spelling of it.
#[test]
fn denied_addresses_are_denied_in_every_spelling() {
    let rules = vec![addresses("nat64", &["64:ff9b::/96", "2002::/16"], &[443], None)];
    let list = Allowlist::new(rules)
        .and_then(|list| {
            list.denying(vec![Deny {
                name: "no-net".to_owned(),
                hosts: Vec::new(),
                addresses: all(&["10.80.9.0/24"]),
                ports: all(&["443"]),
                principals: None,
                window: Window::default(),
            }])
        })
        .expect("an allowlist");
    let principal = "p".parse().expect("a principal");
    let decide = |target: &str| {
        let target = target.parse().expect(target);
        list.decide(&principal, &target, &[], &Guard::default(), now()).into_result().map(drop).map_err(|d| d.reason)
    };
    for target in ["[64:ff9b::10.80.9.1]:443", "[64:ff9b::a50:901]:443", "[2002:a50:901::1]:443"] {
        assert_eq!(decide(target), Err(Reason::DenyRule), "{target}");
    }
    for target in ["[64:ff9b::10.80.8.1]:443", "[2002:a50:801::1]:443"] {
        assert_eq!(decide(target), Ok(()), "{target}");
    }
}

/// The same request at another moment: nothing else differs.
#[test]
fn a_rule_holds_in_its_time_and_so_does_a_denial() {
    let list = list(careful());
    let at = |moment: &str, target: &str, resolved: &[&str]| {
        let target = target.parse().expect(target);
        let principal = "provisioner".parse().expect("a principal");
        let now = moment.parse().expect(moment);
        let resolved = found(&target, resolved);
        let considered = list.consider(&principal, &target, &guard(), now).map(drop).map_err(|denial| denial.reason);
        let decided = list.decide(&principal, &target, &resolved, &guard(), now).into_result().map(drop);
        let decided = decided.map_err(|denial| denial.reason);
        assert_eq!(considered, decided, "{moment}");
        let again = list.reconsider(&principal, &target, &resolved, &guard(), now).map_err(|denial| denial.reason);
        assert_eq!(again, decided, "{moment}");
        decided
    };
    for (moment, expected) in [
        ("2026-12-23T23:59:59.999Z", Err(Reason::NotYetValid)),
        ("2026-12-24T00:00:00Z", Ok(())),
        ("2027-01-01T23:59:59.999Z", Ok(())),
        ("2027-01-02T00:00:00Z", Err(Reason::Expired)),
        ("2099-01-01T00:00:00Z", Err(Reason::Expired)),
    ] {
        assert_eq!(at(moment, "support.internal:22", &["10.70.0.1"]), expected, "{moment}");
    }
    for (moment, expected) in [
        ("2026-12-31T23:59:59.999Z", Ok(())),
        ("2027-01-01T00:00:00Z", Err(Reason::DenyRule)),
        ("2027-01-01T00:59:59.999Z", Err(Reason::DenyRule)),
        ("2027-01-01T01:00:00Z", Ok(())),
    ] {
        assert_eq!(at(moment, "frozen.eu.internal:5432", &["10.50.0.1"]), expected, "{moment}");
        assert_eq!(at(moment, "10.31.0.1:3306", &[]), expected, "{moment}");
    }
    let from = |moment: &str| list.next_change(moment.parse().expect(moment)).map(|at| at.to_string());
    assert_eq!(from("2020-01-01T00:00:00Z").as_deref(), Some("2026-12-24T00:00:00Z"));
    assert_eq!(from("2026-12-24T00:00:00Z").as_deref(), Some("2027-01-01T00:00:00Z"));
    assert_eq!(from("2027-01-02T00:00:00Z"), None);
}

#[test]
fn refuses_denials_that_mean_nothing() {
    let good = || denials().remove(0);
    for (deny, key) in [
        (Deny { name: "a b".into(), ..good() }, "name"),
        (Deny { hosts: Vec::new(), ..good() }, "hosts"),
        (Deny { addresses: all(&["10.0.0.1/8"]), ..good() }, "addresses"),
        (Deny { ports: Vec::new(), ..good() }, "ports"),
        (Deny { principals: Some(Vec::new()), ..good() }, "principals"),
        (Deny { window: window("2027-01-01T00:00:00Z", "2027-01-01T00:00:00Z"), ..good() }, "expires"),
    ] {
        assert_eq!(deny.check().map_err(|error| error.key()), Err(key), "{deny:?}");
        let other = Deny { name: "other".into(), ..good() };
        let error = Allowlist::default().denying(vec![other, deny]).expect_err(key);
        assert!(matches!(error, AllowlistError::Deny { index: 1, .. }) && error.index() == 1, "{error:?}");
    }
    let rules = || Allowlist::new(vec![addresses("no-name", &["10.0.0.0/8"], &[1], None)]).expect("an allowlist");
    for (list, denies) in [(rules(), vec![good()]), (Allowlist::default(), vec![good(), good()])] {
        let error = list.denying(denies).expect_err("a repeated name");
        assert!(error.to_string().ends_with("has the name of another rule: \"no-name\""), "{error}");
    }
}

#[test]
fn a_denial_names_its_rule() {
    for (target, resolved, rule, detail) in [
        ("denied.internal:443", &[][..], "no-name", "deny rule no-name has denied.internal:443"),
        (
            "partly.internal:443",
            &["10.80.9.1"],
            "no-address",
            "partly.internal:443 leads to 10.80.9.1, which deny rule no-address has",
        ),
    ] {
        let denial = decide(careful(), "provisioner", target, resolved).expect_err(target);
        assert_eq!((denial.rule.as_deref(), denial.detail.as_str()), (Some(rule), detail));
    }
}

/// What runs is judged by the address it was dialled at.
#[test]
fn reconsiders_by_address_and_by_the_newest_rules() {
    let ours = Some(&["provisioner"][..]);
    let one = || hosts("orders-db", &["orders.db.internal"], &["10.20.0.0/16"], &[5432], ours);
    let literal = || addresses("legacy", &["10.30.4.0/24"], &[3306], ours);
    let reconsider = |rules: Vec<Rule>, principal: &str, target: &str, dialled: &str| {
        let principal = principal.parse().expect(principal);
        let target = target.parse().expect(target);
        let rules = Allowlist::new(rules).expect("an allowlist");
        let dialled = found(&target, &[dialled]);
        rules.reconsider(&principal, &target, &dialled, &guard(), now()).map_err(|denial| denial.reason)
    };
    let (db, old) = ("orders.db.internal:5432", "10.30.4.7:3306");
    for (case, rules, principal, target, dialled, expected) in [
        ("no rules", vec![], "provisioner", db, "10.20.0.5", Err(Reason::NoRule)),
        ("host gone", vec![literal()], "provisioner", db, "10.20.0.5", Err(Reason::NoRule)),
        (
            "within narrowed",
            vec![hosts("orders-db", &["orders.db.internal"], &["10.20.1.0/24"], &[5432], ours)],
            "provisioner",
            db,
            "10.20.0.5",
            Err(Reason::OutsideWithin),
        ),
        (
            "port gone",
            vec![hosts("orders-db", &["orders.db.internal"], &["10.20.0.0/16"], &[5433], ours)],
            "provisioner",
            db,
            "10.20.0.5",
            Err(Reason::Port),
        ),
        (
            "principal gone",
            vec![hosts("orders-db", &["orders.db.internal"], &["10.20.0.0/16"], &[5432], Some(&["ci-*"]))],
            "provisioner",
            db,
            "10.20.0.5",
            Err(Reason::Principal),
        ),
        (
            "literal narrowed",
            vec![addresses("legacy", &["10.30.4.8/32"], &[3306], ours)],
            "provisioner",
            old,
            "10.30.4.7",
            Err(Reason::NoRule),
        ),
        (
            "a gateway of the agent's by now",
            vec![hosts("orders-db", &["orders.db.internal"], &["192.0.2.0/24"], &[443], ours)],
            "provisioner",
            "orders.db.internal:443",
            "192.0.2.7",
            Err(Reason::OwnGateway),
        ),
        ("the same", vec![one()], "provisioner", db, "10.20.0.5", Ok(())),
        ("the same, mapped", vec![one()], "provisioner", db, "::ffff:10.20.0.5", Ok(())),
        ("literal, the same", vec![literal()], "provisioner", old, "10.30.4.7", Ok(())),
        (
            "another rule's by now",
            vec![hosts("renamed", &["orders.db.internal"], &["10.0.0.0/8"], &[5432], None)],
            "provisioner",
            db,
            "10.20.0.5",
            Ok(()),
        ),
    ] {
        assert_eq!(reconsider(rules, principal, target, dialled), expected, "{case}");
    }
}

#[test]
fn refuses_reserved_addresses_and_own_gateways_to_careless_rules() {
    for row in [
        ("metadata in 0.0.0.0/0", "provisioner", "wide.internal:80", &["169.254.169.254"][..], Reason::ReservedAddress),
        ("mapped metadata", "provisioner", "wide.internal:80", &["::ffff:169.254.169.254"], Reason::ReservedAddress),
        ("NAT64 metadata", "provisioner", "wide.internal:80", &["64:ff9b::a9fe:a9fe"], Reason::ReservedAddress),
        ("6to4 metadata", "provisioner", "wide.internal:80", &["2002:a9fe:a9fe::1"], Reason::ReservedAddress),
        ("compatible metadata", "provisioner", "wide.internal:80", &["::a9fe:a9fe"], Reason::ReservedAddress),
        ("IPv6 metadata", "provisioner", "wide.internal:80", &["fd00:ec2::254"], Reason::ReservedAddress),
        ("loopback in 0.0.0.0/0", "provisioner", "localhost:80", &["127.0.0.1", "::1"], Reason::ReservedAddress),
        ("unspecified in 0.0.0.0/0", "provisioner", "wide.internal:80", &["0.0.0.0", "::"], Reason::ReservedAddress),
        ("broadcast in 0.0.0.0/0", "provisioner", "wide.internal:80", &["255.255.255.255"], Reason::ReservedAddress),
        ("multicast in ::/0", "provisioner", "wide.internal:80", &["ff02::1"], Reason::ReservedAddress),
        ("literal metadata", "provisioner", "169.254.169.254:80", &[], Reason::ReservedAddress),
        ("literal mapped metadata", "provisioner", "[::ffff:169.254.169.254]:80", &[], Reason::ReservedAddress),
        ("literal NAT64 metadata", "provisioner", "[64:ff9b::169.254.169.254]:80", &[], Reason::ReservedAddress),
        ("literal loopback", "provisioner", "127.0.0.1:443", &[], Reason::ReservedAddress),
        ("own gateway by name", "provisioner", "gateway.example.com:443", &["192.0.2.100"], Reason::OwnGateway),
        ("own gateway by another name", "provisioner", "alias.internal:443", &["192.0.2.7"], Reason::OwnGateway),
        ("own gateway by address", "provisioner", "192.0.2.7:443", &[], Reason::OwnGateway),
        ("own gateway by mapped address", "provisioner", "[::ffff:192.0.2.7]:443", &[], Reason::OwnGateway),
        ("own gateway by NAT64", "provisioner", "[64:ff9b::192.0.2.7]:443", &[], Reason::OwnGateway),
        ("own gateway over IPv6", "provisioner", "[2001:db8:ffff::7]:443", &[], Reason::OwnGateway),
        ("own proxy", "provisioner", "192.0.2.9:3128", &[], Reason::OwnGateway),
    ] {
        refuses(careless, row);
    }
}

#[test]
fn permits_what_one_rule_allows() {
    for (case, principal, target, resolved, rule, permitted, refused) in [
        (
            "by name",
            "provisioner",
            "orders.db.internal:5432",
            &["10.20.0.5"][..],
            "orders-db",
            &["10.20.0.5"][..],
            &[][..],
        ),
        ("case and trailing dot", "ci-7", "Orders.DB.Internal.:5432", &["10.20.0.5"], "orders-db", &["10.20.0.5"], &[]),
        (
            "one inside, one outside",
            "provisioner",
            "orders.db.internal:5432",
            &["10.21.0.5", "10.20.0.5", "169.254.169.254"],
            "orders-db",
            &["10.20.0.5"],
            &["10.21.0.5", "169.254.169.254"],
        ),
        (
            "both families, repeated, mapped, in order",
            "provisioner",
            "orders.db.internal:5432",
            &["2001:db8:20::5", "::ffff:10.20.0.5", "10.20.0.5", "2001:db8:20::5"],
            "orders-db",
            &["2001:db8:20::5", "10.20.0.5"],
            &[],
        ),
        ("by address", "provisioner", "10.30.4.7:3306", &[], "legacy", &["10.30.4.7"], &[]),
        (
            "by address, whatever is resolved",
            "provisioner",
            "10.30.4.7:3306",
            &["127.0.0.1"],
            "legacy",
            &["10.30.4.7"],
            &[],
        ),
        ("by mapped address", "provisioner", "[::ffff:10.30.4.7]:3306", &[], "legacy", &["10.30.4.7"], &[]),
        ("in a network written as mapped", "provisioner", "10.31.200.1:3306", &[], "legacy", &["10.31.200.1"], &[]),
        (
            "loopback where it is meant",
            "anyone",
            "localhost:8080",
            &["127.0.0.1", "::1"],
            "own-host",
            &["127.0.0.1"],
            &["::1"],
        ),
        (
            "ordinary address in 0.0.0.0/0",
            "anyone",
            "wide.internal:80",
            &["10.1.1.1", "127.0.0.1"],
            "wide",
            &["10.1.1.1"],
            &["127.0.0.1"],
        ),
        ("NAT64 where it is meant", "anyone", "[64:ff9b::10.1.1.1]:80", &[], "any", &["64:ff9b::a01:101"], &[]),
        (
            "a name with one denied address keeps its others",
            "provisioner",
            "partly.internal:443",
            &["10.80.9.1", "10.80.0.1", "10.80.9.2"],
            "denied",
            &["10.80.0.1"],
            &["10.80.9.1", "10.80.9.2"],
        ),
        ("one label", "ci-1", "A.eu.internal:5432", &["10.50.0.1"], "eu", &["10.50.0.1"], &[]),
        ("several labels", "ci-1", "a.b.c.shard.internal:5432", &["10.50.0.1"], "eu", &["10.50.0.1"], &[]),
        ("first of a range", "ci-1", "range.internal:6000", &["10.50.0.1"], "range", &["10.50.0.1"], &[]),
        ("last of a range", "ci-1", "range.internal:6010", &["10.50.0.1"], "range", &["10.50.0.1"], &[]),
        (
            "instances of a service",
            "ci-1",
            "_pg._tcp.db.internal:5432",
            &["10.60.0.1:5433", "10.60.0.1:22", "10.60.0.1:5440", "10.61.0.1:5433", "10.60.0.2:5432"],
            "service",
            &["10.60.0.1:5433", "10.60.0.2:5432"],
            &["10.60.0.1:22", "10.60.0.1:5440", "10.61.0.1:5433"],
        ),
        (
            "in a time that is denied to others",
            "ci-1",
            "support.internal:22",
            &["10.70.0.1"],
            "support",
            &["10.70.0.1"],
            &[],
        ),
        ("by key", KEY, "vault.internal:8200", &["10.40.0.1"], "key", &["10.40.0.1"], &[]),
        ("own gateway's host, other port", "anyone", "192.0.2.7:80", &[], "any", &["192.0.2.7"], &[]),
        (
            "beside the own gateway",
            "anyone",
            "alias.internal:443",
            &["192.0.2.7", "192.0.2.8"],
            "gateway",
            &["192.0.2.8"],
            &["192.0.2.7"],
        ),
    ] {
        let lookup = consider(careless(), principal, target).expect(case);
        let by_name = matches!(target.parse(), Ok(Target { host: Host::Name(_), .. }));
        match lookup {
            Lookup::Address(_) => assert!(!by_name, "{case}"),
            Lookup::Addresses => assert!(by_name && !target.starts_with('_'), "{case}"),
            Lookup::Service => assert!(target.starts_with('_'), "{case}"),
        }
        let permit = decide(careless(), principal, target, resolved).expect(case);
        assert_eq!(permit.rule(), rule, "{case}");
        let target = target.parse().expect(target);
        assert_eq!(permit.addresses(), found(&target, permitted), "{case}");
        assert_eq!(permit.refused(), found(&target, refused), "{case}");
        assert_eq!(permit.target(), &target, "{case}");
    }
}

#[test]
fn no_rules_allow_nothing() {
    let (principal, target) = ("p".parse().expect("a principal"), "db:1".parse().expect("a target"));
    let none = Allowlist::new(Vec::new()).expect("an allowlist");
    assert_eq!(none.consider(&principal, &target, &Guard::default(), now()).map_err(|d| d.reason), Err(Reason::NoRule));
    let resolved = found(&target, &["10.0.0.1"]);
    let decision = none.decide(&principal, &target, &resolved, &Guard::default(), now()).into_result();
    let detail = decision.expect_err("denied").detail;
    assert_eq!(detail, "no rule has the host db; the allowlist has no rules");
}

#[test]
fn two_rules_do_not_add_up() {
    let list = Allowlist::new(vec![
        hosts("a", &["x.internal"], &["10.1.0.0/16"], &[1], None),
        hosts("b", &["x.internal"], &["10.2.0.0/16"], &[2], None),
        hosts("c", &["x.internal"], &["10.3.0.0/16"], &[1], None),
    ])
    .expect("an allowlist");
    let principal = "p".parse().expect("a principal");
    let decide = |port: u16, resolved: &[&str]| {
        let target = Target::from_wire("x.internal", port.into()).expect("a target");
        list.decide(&principal, &target, &found(&target, resolved), &Guard::default(), now()).into_result()
    };
    assert_eq!(decide(1, &["10.2.0.1"]).expect_err("denied").reason, Reason::OutsideWithin);
    assert_eq!(decide(2, &["10.1.0.1"]).expect_err("denied").reason, Reason::OutsideWithin);
    let permit = decide(1, &["10.3.0.1", "10.1.0.1"]).expect("permitted");
    assert_eq!((permit.rule(), permit.addresses()), ("a", &all(&["10.1.0.1:1"])[..]));
    let permit = decide(1, &["10.3.0.1"]).expect("permitted by the later rule");
    assert_eq!(permit.rule(), "c");
}

#[test]
fn denials_name_the_closest_miss() {
    for (principal, target, resolved, detail) in [
        (
            "provisioner",
            "orders.db.internal:22",
            &[][..],
            "rule orders-db has orders.db.internal, but not port 22 (it has 5432)",
        ),
        (
            "intruder",
            "orders.db.internal:5432",
            &[],
            "rule orders-db has orders.db.internal:5432, but not for intruder (it has provisioner, ci-*)",
        ),
        (
            "provisioner",
            "orders:5432",
            &[],
            "no rule has the host orders; rule orders-db has orders.db.internal, which is another name",
        ),
        ("provisioner", "x.internal:5432", &[], "no rule has the host x.internal"),
        (
            "provisioner",
            "orders.db.internal:5432",
            &["10.21.0.5", "10.22.0.5"],
            "rule orders-db has orders.db.internal:5432, but 10.21.0.5 lies outside of 10.20.0.0/16, \
                 2001:db8:20::/48; rule orders-db has orders.db.internal:5432, but 10.22.0.5 lies outside of \
                 10.20.0.0/16, 2001:db8:20::/48",
        ),
        (
            "provisioner",
            "orders.db.internal:5432",
            &[],
            "rule orders-db has orders.db.internal:5432, but the name has no address",
        ),
        (
            "provisioner",
            "localhost:80",
            &["127.0.0.1"],
            "rule wide has 0.0.0.0/0, which does not lie wholly inside of 127.0.0.0/8: 127.0.0.1 is reserved \
                 (loopback: services of the agent's own host that trust whoever is on it)",
        ),
        (
            "provisioner",
            "alias.internal:443",
            &["192.0.2.7"],
            "alias.internal:443 leads to 192.0.2.7, a gateway, the proxy or the listener of this agent, which no rule can open",
        ),
    ] {
        assert_eq!(decide(careless(), principal, target, resolved).expect_err(target).detail, detail);
    }
    let list = Allowlist::new(vec![hosts("db", &["db.internal"], &["10.20.0.0/16"], &[1], None)]).expect("a list");
    let denial =
        list.consider(&"p".parse().expect("p"), &"10.20.0.5:1".parse().expect("a target"), &Guard::default(), now());
    assert_eq!(
        denial.expect_err("denied").detail,
        "no rule has an address network that holds 10.20.0.5; rule db reaches that network by name only: \
             ask for db.internal"
    );
}

#[test]
fn refuses_rules_that_mean_nothing() {
    let good = || hosts("good", &["db"], &["10.0.0.0/8"], &[1], None);
    for (rule, key) in [
        (Rule { name: String::new(), ..good() }, "name"),
        (Rule { name: "a b".into(), ..good() }, "name"),
        (Rule { name: "a\n".into(), ..good() }, "name"),
        (Rule { name: "a".repeat(64), ..good() }, "name"),
        (hosts("x", &[], &["10.0.0.0/8"], &[1], None), "hosts"),
        (hosts("x", &["db"], &[], &[1], None), "within"),
        (hosts("x", &["db"], &["10.0.0.1/8"], &[1], None), "within"),
        (addresses("x", &[], &[1], None), "addresses"),
        (addresses("x", &["10.0.0.0/8", "2001:db8::1/64"], &[1], None), "addresses"),
        (Rule { ports: Vec::new(), ..good() }, "ports"),
        (Rule { principals: Some(Vec::new()), ..good() }, "principals"),
        (Rule { window: window("2027-01-01T00:00:00Z", "2026-01-01T00:00:00Z"), ..good() }, "expires"),
        (hosts("x", &["_pg._tcp.db"], &["10.0.0.0/8"], &[1], None), "hosts"),
        (Rule { reach: Reach::Services { services: Vec::new(), within: all(&["10.0.0.0/8"]) }, ..good() }, "services"),
        (
            Rule { reach: Reach::Services { services: all(&["db"]), within: all(&["10.0.0.0/8"]) }, ..good() },
            "services",
        ),
        (Rule { reach: Reach::Services { services: all(&["_pg._tcp.db"]), within: Vec::new() }, ..good() }, "within"),
    ] {
        assert_eq!(rule.check().map_err(|error| error.key()), Err(key), "{rule:?}");
        let error = Allowlist::new(vec![good(), rule.clone()]).expect_err(key);
        assert!(matches!(error, AllowlistError::Rule { index: 1, .. }), "{error:?}");
        assert!(error.source().is_some());
    }
    let fault = addresses("x", &["10.0.0.1/8"], &[1], None).check().expect_err("host bits");
    assert_eq!(
        fault.to_string(),
        "10.0.0.1/8 has bits beyond its prefix: write 10.0.0.0/8 for the network or 10.0.0.1/32 for the one address"
    );
}

#[test]
fn refuses_rules_that_repeat_others() {
    let one = || hosts("one", &["db"], &["10.0.0.0/8"], &[1], None);
    let named_alike = Allowlist::new(vec![one(), addresses("one", &["10.0.0.0/8"], &[1], None)]);
    assert_eq!(named_alike.expect_err("a repeated name").to_string(), "rules 1 and 2 are both named \"one\"");
    let same = Allowlist::new(vec![one(), hosts("two", &["DB."], &["::ffff:10.0.0.0/104"], &[1], None)]);
    assert_eq!(
        same.expect_err("a repeated rule").to_string(),
        "rule \"two\" says the same as rule \"one\": remove one of them"
    );
}

#[test]
fn reads_principal_patterns() {
    for text in ["", "A", "a b", "SHA256:short", "SHA256:*", "a/b"] {
        assert!(text.parse::<PrincipalPattern>().is_err(), "{text}");
    }
    for text in ["provisioner", "ci-*", "*", KEY] {
        assert_eq!(text.parse::<PrincipalPattern>().expect(text).to_string(), text);
    }
}

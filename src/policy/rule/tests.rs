//! Tests of the module above.

use std::error::Error;

use proptest::prelude::*;

use super::super::guard::reserved;
use super::*;

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
    ]
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
    Allowlist::new(rules).expect("an allowlist").decide(&principal, &target, &resolved, &guard(), now()).into_result()
}

fn consider(rules: Vec<Rule>, principal: &str, target: &str) -> Result<Lookup, Denial> {
    let principal = principal.parse().expect(principal);
    Allowlist::new(rules).expect("an allowlist").consider(&principal, &target.parse().expect(target), &guard(), now())
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
        || target == "alias.internal:443";
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
        ("metadata beside loopback", "provisioner", "own.internal:8080", &["169.254.169.254"], Reason::OutsideWithin),
    ] {
        refuses(careful, row);
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
        consider(careless(), principal, target).expect(case);
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
            "alias.internal:443 leads to 192.0.2.7, a gateway or the proxy of this agent, which no rule can open",
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
    prop::sample::select(vec!["a", "a.b", "b", "a.b.c"]).prop_map(|text| text.parse().expect(text))
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
        (prop::collection::vec(any_name(), 1..3), networks())
            .prop_map(|(hosts, within)| Reach::Hosts { hosts: hosts.into_iter().map(Into::into).collect(), within }),
        networks().prop_map(Reach::Addresses),
    ];
    let pattern = prop::sample::select(vec!["a", "a*", "*", KEY]).prop_map(|text| text.parse().expect(text));
    let principals = prop::option::of(prop::collection::vec(pattern, 1..3));
    (reach, prop::collection::vec(1..4_u16, 1..3), principals).prop_map(|(reach, ports, principals)| Rule {
        name: String::new(),
        reach,
        ports: self::ports(&ports),
        principals,
        window: Window::default(),
    })
}

/// Whether a rule fits, written down a second time and without any of the code above.
fn fits(rule: &Rule, principal: &Principal, target: &Target) -> bool {
    let reach = match (&rule.reach, &target.host) {
        (Reach::Hosts { hosts, .. }, Host::Name(name)) => hosts.iter().any(|host| host.name() == Some(name)),
        (Reach::Addresses(_), Host::Address(_)) => true,
        _ => false,
    };
    let principals = rule.principals.as_ref().is_none_or(|all| all.iter().any(|pattern| pattern.matches(principal)));
    reach && rule.ports.iter().any(|ports| ports.contains(target.port)) && principals
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn never_permits_more_than_one_rule_says(
        mut rules in prop::collection::vec(any_rule(), 0..5),
        principal in any_principal(),
        target in any_target(),
        resolved in prop::collection::vec((any_address(), 1..4_u16), 0..5),
        own in prop::collection::vec((any_address(), 1..4_u16), 0..3),
    ) {
        for (index, rule) in rules.iter_mut().enumerate() {
            rule.name = format!("rule-{index}");
        }
        let Ok(list) = Allowlist::new(rules.clone()) else { return Ok(()) };
        let guard = Guard::new([], own.iter().map(|&own| own.into()));
        let resolved: Vec<SocketAddr> = resolved.into_iter().map(SocketAddr::from).collect();
        let considered = list.consider(&principal, &target, &guard, now());
        match list.decide(&principal, &target, &resolved, &guard, now()) {
            Decision::Allow(permit) => {
                prop_assert!(considered.is_ok());
                prop_assert_eq!(permit.target(), &target);
                prop_assert!(!permit.addresses().is_empty());
                let rule = list.rules().iter().find(|rule| rule.name == permit.rule()).expect("a rule of the list");
                prop_assert!(fits(rule, &principal, &target));
                for address in permit.addresses() {
                    match target.host {
                        Host::Address(literal) => prop_assert_eq!(*address, SocketAddr::new(literal, target.port)),
                        Host::Name(_) => prop_assert!(
                            resolved.iter().any(|one| (normal(one.ip()), one.port()) == (address.ip(), target.port))
                        ),
                    }
                    prop_assert!(!permit.refused().contains(address));
                    let address = address.ip();
                    prop_assert!(!own.iter().any(|(one, port)| normal(*one) == address && *port == target.port));
                    let network = rule.reach.networks().iter().find(|network| {
                        network.contains(&address) && reserved(address).iter().all(|r| r.range.contains(*network))
                    });
                    prop_assert!(network.is_some(), "{address} is in none of {rule:?}");
                }
            }
            Decision::Deny(denial) => {
                prop_assert!(!denial.detail.is_empty());
                // An ordinary address that a fitting rule holds is not refused for no reason.
                let candidates = match target.host {
                    Host::Address(literal) => vec![literal],
                    Host::Name(_) => {
                        let fitting = resolved.iter().filter(|one| one.port() == target.port);
                        fitting.map(|one| normal(one.ip())).collect()
                    }
                };
                for address in candidates {
                    let free = reserved(address).is_empty() && !guard.holds_address(address, target.port);
                    let held = list.rules().iter().any(|rule| {
                        fits(rule, &principal, &target)
                            && rule.reach.networks().iter().any(|network| network.contains(&address))
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

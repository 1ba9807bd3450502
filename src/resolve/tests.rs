use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    text.parse().expect(text)
}

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().expect(text)).collect()
}

#[tokio::test(start_paused = true)]
async fn gives_up_in_time() {
    let never = std::future::pending::<Result<(), ResolveError>>();
    let resolver = Resolver::system(&Config::default());
    let error = resolver.in_time(&name("db.internal"), never).await.expect_err("no answer");
    assert_eq!(error.to_string(), "could not look up db.internal: no answer within 5 s");
}

#[tokio::test]
async fn the_system_knows_no_services() {
    let error = Resolver::system(&Config::default()).service(&name("_x._tcp.internal")).await.expect_err("no servers");
    assert!(matches!(error, ResolveError::NoServers { .. }), "{error}");
}

#[test]
fn addresses_are_normal_distinct_and_bounded() {
    let found = addresses(&["10.0.0.2", "::ffff:10.0.0.1", "10.0.0.1", "10.0.0.2", "2001:db8::1"]);
    assert_eq!(tidy(found, Family::Any), addresses(&["10.0.0.2", "2001:db8::1", "10.0.0.1"]));
    let many = |first: u16| (0..=u16::MAX).map(move |low| IpAddr::from([first, 0xdb8, 0, 0, 0, 0, 0, low]));
    assert_eq!(tidy(many(0x2001), Family::Any).len(), ADDRESSES_PER_NAME);
    // However many there are of one family, the other has its turns.
    let both = many(0x2001).chain(addresses(&["10.0.0.1", "10.0.0.2"]));
    assert_eq!(tidy(both, Family::PreferIpv6).iter().filter(|address| address.is_ipv4()).count(), 2);
}

#[test]
fn families_are_left_out_and_take_turns() {
    let all = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "2001:db8::1", "2001:db8::2"];
    for (family, wanted) in [
        (Family::Any, &["10.0.0.1", "2001:db8::1", "10.0.0.2", "2001:db8::2", "10.0.0.3"][..]),
        (Family::PreferIpv4, &["10.0.0.1", "2001:db8::1", "10.0.0.2", "2001:db8::2", "10.0.0.3"]),
        (Family::PreferIpv6, &["2001:db8::1", "10.0.0.1", "2001:db8::2", "10.0.0.2", "10.0.0.3"]),
        (Family::Ipv4, &["10.0.0.1", "10.0.0.2", "10.0.0.3"]),
        (Family::Ipv6, &["2001:db8::1", "2001:db8::2"]),
    ] {
        assert_eq!(tidy(addresses(&all), family), addresses(wanted), "{family:?}");
    }
    // An IPv4 address in another spelling is one all the same.
    assert_eq!(tidy(addresses(&["::ffff:10.0.0.1"]), Family::Ipv6), addresses(&[]));
    let reversed = addresses(&["2001:db8::1", "2001:db8::2", "10.0.0.1"]);
    assert_eq!(tidy(reversed, Family::Any), addresses(&["2001:db8::1", "10.0.0.1", "2001:db8::2"]));
}

fn families() -> impl Strategy<Value = Family> {
    prop::sample::select(vec![Family::Any, Family::PreferIpv4, Family::PreferIpv6, Family::Ipv4, Family::Ipv6])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arranging_loses_and_adds_nothing_that_is_wanted(
        family in families(),
        given in prop::collection::vec(any::<SocketAddr>(), 0..40),
    ) {
        let arranged = family.arrange(&given);
        let of = |all: &[SocketAddr], ipv4: bool| -> Vec<SocketAddr> {
            all.iter().copied().filter(|address| address.is_ipv4() == ipv4).collect()
        };
        for ipv4 in [false, true] {
            let wanted = if family.wants(ipv4) { of(&given, ipv4) } else { vec![] };
            prop_assert_eq!(of(&arranged, ipv4), wanted, "in their order");
        }
        // While there are some of both left, two neighbours are of different families.
        let fewer = of(&arranged, true).len().min(of(&arranged, false).len());
        for pair in arranged.windows(2).take((2 * fewer).saturating_sub(1)) {
            prop_assert_ne!(pair[0].is_ipv4(), pair[1].is_ipv4());
        }
        prop_assert_eq!(family.arrange(&arranged), arranged);
    }
}

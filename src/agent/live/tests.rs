//! Tests of the module above.

use super::*;
use crate::agent::Organisation;
use crate::audit::Sinks;
use crate::identity::Algorithm;
use crate::network::Networks;
use crate::policy::rule::{PrincipalPattern, Reach, Rule};
use crate::tunnel::connect::bypass::Bypass;

pub(in crate::agent) fn key() -> PublicKey {
    PrivateKey::generate(Algorithm::Ed25519).public()
}

pub(in crate::agent) fn orchestrator(key: &PublicKey, asserts: Option<&[&str]>) -> Orchestrator {
    let pattern = |text: &&str| text.parse::<PrincipalPattern>().expect("a pattern");
    let asserts = asserts.map(|asserts| asserts.iter().map(pattern).collect());
    Orchestrator { key: key.clone(), asserts, window: Window::default() }
}

pub(in crate::agent) fn authority(key: &PublicKey, asserts: &[&str]) -> OrchestratorAuthority {
    OrchestratorAuthority {
        key: key.clone(),
        asserts: asserts.iter().map(|text| text.parse().expect("a pattern")).collect(),
        window: Window::default(),
        revocations: crate::identity::certificate::Revocations::default(),
    }
}

fn rule(name: &str, network: &str) -> Rule {
    let reach = Reach::Addresses(vec![network.parse().expect(network)]);
    Rule {
        name: name.to_owned(),
        reach,
        ports: vec![5432.try_into().expect("a port")],
        principals: None,
        window: Window::default(),
    }
}

pub(in crate::agent) fn organisation(
    id: &str,
    gateways: &[&str],
    orchestrators: &[Orchestrator],
    rules: &[Rule],
) -> Organisation {
    Organisation {
        id: id.parse().expect(id),
        gateways: gateways.iter().map(|url| url.parse().expect(url)).collect(),
        tls: None,
        orchestrators: orchestrators.to_vec(),
        authorities: Vec::new(),
        allow: Allowlist::new(rules.to_vec()).expect("an allowlist"),
    }
}

fn through(proxy: &str) -> Egress {
    Egress::new(Some(proxy.parse().expect(proxy)), Bypass::default(), None).expect("a way out")
}

pub(in crate::agent) fn config(organisations: Vec<Organisation>) -> Config {
    Config {
        id: "prod".parse().expect("an id"),
        replica: "one".parse().expect("an id"),
        key: PrivateKey::generate(Algorithm::Ed25519),
        egress: Egress::default(),
        organisations,
        drain: std::time::Duration::ZERO,
        limits: crate::agent::Limits::default(),
        resolver: crate::resolve::Config::default(),
        audit: Sinks::stdout(),
        listen: None,
        health: crate::health::Config::default(),
        remote_doctor: false,
        penalties: Terms::default(),
    }
}

pub(in crate::agent) fn state(config: &Config) -> State {
    State::new(config, Arc::new(Resolver::system(&config.resolver)))
}

#[test]
fn changes_are_told_by_ids_and_hold_no_secret() {
    let (first, second) = (key(), key());
    let acme = |asserts: &[&str], rules: &[Rule]| {
        organisation("acme", &["ssh://g:443"], &[orchestrator(&first, Some(asserts))], rules)
    };
    let old = config(vec![acme(&["*"], &[rule("db", "10.0.0.1/32"), rule("old", "10.0.0.2/32")])]);
    assert_eq!(changes(&old, &old.clone()).to_string(), "nothing changed");

    let mut new = old.clone();
    new.organisations = vec![
        acme(&["ci-*"], &[rule("db", "10.0.0.9/32"), rule("new", "10.0.0.3/32")]),
        organisation("globex", &["ssh://h"], &[orchestrator(&second, None)], &[rule("x", "10.0.0.4/32")]),
    ];
    new.egress = through("http://user:hunter2@proxy:3128");
    let told = changes(&old, &new).to_string();
    assert_eq!(
        told,
        format!(
            "gone: rule acme/old; new: organisation globex, rule acme/new; changed: orchestrator acme {}, rule acme/db, proxy",
            first.fingerprint()
        )
    );
    assert!(!changes(&new, &old).to_string().contains("hunter2"));

    let mut new = old.clone();
    new.organisations[0].gateways = vec!["ssh://other".parse().expect("a gateway")];
    new.organisations[0].orchestrators = vec![orchestrator(&second, None)];
    new.key = PrivateKey::generate(Algorithm::Ed25519);
    new.replica = "two".parse().expect("an id");
    new.resolver.servers = vec!["10.0.0.2:53".parse().expect("an address")];
    assert_eq!(
        changes(&old, &new).to_string(),
        format!(
            "gone: gateway acme ssh://g:443, orchestrator acme {}; new: gateway acme ssh://other:443, orchestrator acme {}; \
             changed: host_key {}, replica two, resolver",
            first.fingerprint(),
            second.fingerprint(),
            new.key.public().fingerprint()
        )
    );
}

#[test]
fn what_cannot_change_is_put_back() {
    let old = config(vec![]);
    let mut new = old.clone();
    assert!(keep(&old, &mut new).is_empty());
    new.id = "other".parse().expect("an id");
    new.audit = Sinks::file("elsewhere");
    assert_eq!(keep(&old, &mut new), ["agent.id", "audit"]);
    assert_eq!((&new.id, &new.audit), (&old.id, &old.audit));
}

/// One thing taken away at a time, and each is enough.
#[test]
fn a_forward_is_allowed_for_as_long_as_all_that_it_rests_on() {
    let (ours, other) = (key(), key());
    let asserting = |asserts: Option<&[&str]>| orchestrator(&ours, asserts);
    let db = || rule("db", "10.0.0.0/24");
    let with = |orchestrators: &[Orchestrator], rules: &[Rule]| {
        state(&config(vec![organisation("acme", &["ssh://10.0.0.7:5432"], orchestrators, rules)]))
    };
    let target: Target = "10.0.0.1:5432".parse().expect("a target");
    let claimed: PrincipalId = "ci-1".parse().expect("an id");
    let (organisation, key) = ("acme".parse().expect("an id"), Credential::Key(ours.fingerprint()));
    let named = Principal::Named(claimed.clone());
    let case = Case {
        organisation: &organisation,
        credential: &key,
        from: None,
        claimed: Some(&claimed),
        principal: &named,
        target: &target,
    };
    let allows = |state: &State| {
        let guard = Guard::new(state.ways_out.clone(), []);
        state.allows(&case, &["10.0.0.1:5432".parse().expect("an address")], &guard, Timestamp::now()).is_ok()
    };
    assert!(allows(&with(&[asserting(Some(&["ci-*"]))], &[db()])));
    assert!(allows(&with(&[orchestrator(&other, None), asserting(Some(&["*"]))], &[rule("renamed", "10.0.0.1/32")])));
    for (case, state) in [
        ("no organisation", state(&config(vec![]))),
        ("no key", with(&[orchestrator(&other, Some(&["*"]))], &[db()])),
        ("not asserted", with(&[asserting(Some(&["cd-*"]))], &[db()])),
        ("no asserts", with(&[asserting(None)], &[db()])),
        ("no rule", with(&[asserting(Some(&["*"]))], &[])),
        ("another network", with(&[asserting(Some(&["*"]))], &[rule("db", "10.0.0.2/32")])),
        (
            "a gateway of its own",
            state(&config(vec![super::super::Organisation {
                gateways: vec!["ssh://10.0.0.1:5432".parse().expect("a gateway")],
                ..organisation_of(&ours, &[db()])
            }])),
        ),
    ] {
        assert!(!allows(&state), "{case}");
    }
    // A key that was its own principal is not, once it speaks for others.
    let own = Principal::Key(key.key());
    let case = Case { claimed: None, principal: &own, ..case };
    let allows = |state: &State| {
        let address = "10.0.0.1:5432".parse().expect("an address");
        state.allows(&case, &[address], &Guard::default(), Timestamp::now()).is_ok()
    };
    assert!(allows(&with(&[asserting(None)], &[db()])));
    assert!(!allows(&with(&[asserting(Some(&["*"]))], &[db()])));
}

#[test]
fn what_the_time_ends_is_told_from_what_somebody_took_back() {
    let at = |second| Timestamp::from_second(second).expect("a time");
    let window = Window { not_before: Some(at(100)), expires: Some(at(200)) };
    let ours = key();
    let (id, credential) = ("acme".parse().expect("an id"), Credential::Key(ours.fingerprint()));
    let principal = Principal::Key(ours.fingerprint());
    let target: Target = "10.0.0.1:5432".parse().expect("a target");
    let case = Case {
        organisation: &id,
        credential: &credential,
        from: None,
        claimed: None,
        principal: &principal,
        target: &target,
    };
    let db = || rule("db", "10.0.0.1/32");
    let with = |key: Orchestrator, rules: &[Rule]| state(&config(vec![organisation("acme", &[], &[key], rules)]));
    let (plain, timed) = (orchestrator(&ours, None), Orchestrator { window, ..orchestrator(&ours, None) });
    for (state, now, expected) in [
        (with(plain.clone(), &[Rule { window, ..db() }]), 150, Ok(())),
        (with(plain.clone(), &[Rule { window, ..db() }]), 200, Err("expired")),
        (with(plain.clone(), &[Rule { window, ..db() }]), 99, Err("not_yet_valid")),
        (with(plain.clone(), &[rule("db", "10.0.0.2/32")]), 150, Err("revoked")),
        (with(timed.clone(), &[db()]), 150, Ok(())),
        (with(timed.clone(), &[db()]), 200, Err("expired")),
        (with(timed, &[db()]), 99, Err("not_yet_valid")),
        (with(orchestrator(&key(), None), &[db()]), 150, Err("revoked")),
        (with(orchestrator(&ours, Some(&["*"])), &[db()]), 150, Err("revoked")),
    ] {
        let address = "10.0.0.1:5432".parse().expect("an address");
        assert_eq!(state.allows(&case, &[address], &Guard::default(), at(now)), expected, "{now}");
    }
    for (refused, word) in [
        ("certificate_expired", "expired"),
        ("certificate_ca_expired", "expired"),
        ("certificate_not_yet_valid", "not_yet_valid"),
        ("certificate_revoked", "revoked"),
        ("deny_rule", "revoked"),
        ("unknown_key", "revoked"),
    ] {
        assert_eq!(lapse(refused), word, "{refused}");
    }
}

/// A principal is mandatory on a key with `asserts` and must match; on one without it is refused.
#[test]
fn a_key_speaks_for_whom_it_may_and_for_nobody_else() {
    let key = key().fingerprint();
    let credential = Credential::Key(key);
    let (refused, missing) = (Err("principal_not_asserted"), Err("principal_missing"));
    let named = |text: &str| Ok(Principal::Named(text.parse().expect(text)));
    for (case, asserts, claimed, expected) in [
        ("exact", Some(&["provisioner"][..]), Some("provisioner"), named("provisioner")),
        ("pattern", Some(&["ci-*"]), Some("ci-7"), named("ci-7")),
        ("second pattern", Some(&["x", "ci-*"]), Some("ci-7"), named("ci-7")),
        ("all", Some(&["*"]), Some("anybody"), named("anybody")),
        ("itself", None, None, Ok(Principal::Key(key))),
        ("no principal", Some(&["provisioner"]), None, missing.clone()),
        ("no principal, though all would do", Some(&["*"]), None, missing),
        ("another", Some(&["provisioner"]), Some("intruder"), refused.clone()),
        ("one that begins alike", Some(&["provisioner"]), Some("provisioner2"), refused.clone()),
        ("one that ends alike", Some(&["ci-*"]), Some("my-ci-7"), refused.clone()),
        ("a principal on a key that speaks for itself", None, Some("provisioner"), refused),
    ] {
        let asserts: Option<Vec<PrincipalPattern>> =
            asserts.map(|all| all.iter().map(|text| text.parse().expect("a pattern")).collect());
        let claimed = claimed.map(|text| text.parse::<PrincipalId>().expect(text));
        let speaks = speaker(asserts.as_deref(), &credential, claimed.as_ref()).map_err(|(reason, _)| reason);
        assert_eq!(speaks, expected, "{case}");
    }
}

#[test]
fn the_clock_is_looked_at_when_something_changes_and_often_enough_besides() {
    let at = |second: i64| Timestamp::from_second(1_800_000_000 + second).expect("a moment");
    let window = |from: i64, until: i64| Window { not_before: Some(at(from)), expires: Some(at(until)) };
    let key = Orchestrator { window: window(0, 100), ..orchestrator(&key(), None) };
    let timed = Rule { window: window(50, 60), ..rule("db", "10.0.0.1/32") };
    let held = state(&config(vec![organisation("acme", &[], &[key], &[timed])]));
    let changes: Vec<_> = std::iter::successors(held.next_change(at(-1)), |at| held.next_change(*at)).collect();
    assert_eq!(changes, [at(0), at(50), at(60), at(100)]);
    for (one, other, expected) in [
        (-1, 0, true),
        (0, 49, false),
        (0, 50, true),
        (55, 49, true),
        (60, 50, true),
        (60, 61, false),
        (101, 500, false),
    ] {
        assert_eq!(held.changes_between(at(one), at(other)), expected, "{one} {other}");
    }
    let half = std::time::Duration::from_millis(500);
    assert_eq!(held.next_look(at(50) - half), Some(half));
    assert_eq!(held.next_look(at(10)), Some(limits::CLOCK_LOOK));
    assert_eq!(held.next_look(at(500)), Some(limits::CLOCK_LOOK), "the clock may be set back");
    let timeless = state(&config(vec![organisation("acme", &[], &[], &[rule("db", "10.0.0.1/32")])]));
    assert_eq!(timeless.next_look(at(0)), None);
}

fn organisation_of(key: &PublicKey, rules: &[Rule]) -> Organisation {
    organisation("acme", &[], &[orchestrator(key, Some(&["*"]))], rules)
}

/// As its gateways are; one on all addresses has none that is known.
#[test]
fn the_agents_own_listener_is_guarded_where_it_is() {
    let at = |address: &str| {
        let address = address.parse().expect("an address");
        let accept_from = Networks::new(vec!["10.0.0.0/8".parse().expect("a network")]).expect("one at least");
        let config = Config { listen: Some(Listen { address, accept_from }), ..config(vec![]) };
        Guard::new(state(&config).ways_out.clone(), [])
    };
    for (listens, address, port, held) in [
        ("10.0.0.7:2222", "10.0.0.7", 2222, true),
        ("10.0.0.7:2222", "64:ff9b::a00:7", 2222, true),
        ("[::ffff:10.0.0.7]:2222", "10.0.0.7", 2222, true),
        ("10.0.0.7:2222", "10.0.0.7", 22, false),
        ("10.0.0.7:2222", "10.0.0.8", 2222, false),
        ("[fd00::7]:2222", "fd00::7", 2222, true),
        ("0.0.0.0:2222", "10.0.0.7", 2222, false),
        ("[::]:2222", "fd00::7", 2222, false),
    ] {
        assert_eq!(at(listens).holds_address(address.parse().expect(address), port), held, "{listens} {address}");
    }
}

#[test]
fn a_link_is_made_anew_for_another_identity_and_a_dial_for_another_way() {
    let old = config(vec![organisation_of(&key(), &[])]);
    let before = state(&old);
    let differs = |change: &dyn Fn(&mut Config)| {
        let mut new = old.clone();
        change(&mut new);
        let new = state(&new);
        {
            let acme = "acme".parse().expect("an id");
            (!new.same_identity(&before, &acme), !new.same_way(&before, &acme))
        }
    };
    assert_eq!(differs(&|_| ()), (false, false));
    assert_eq!(differs(&|config| config.organisations.clear()), (false, false));
    assert_eq!(differs(&|config| config.egress = through("http://p:1")), (false, true));
    assert_eq!(differs(&|config| config.replica = "two".parse().expect("an id")), (true, true));
    assert_eq!(differs(&|config| config.key = PrivateKey::generate(Algorithm::Ed25519)), (true, true));
}

/// A certificate that is good in every field, and then one thing wrong at a time.
#[test]
fn a_certificate_logs_in_for_the_organisation_that_is_its_only_principal() {
    use crate::identity::certificate::forge::Forge;
    use crate::identity::certificate::{Kind, Revocations};
    let [ca, other_ca] = [(); 2].map(|()| PrivateKey::generate(Algorithm::Ed25519));
    let at = |second| Timestamp::from_second(second).expect("a time");
    let authority = |key: &PrivateKey| OrchestratorAuthority {
        window: Window { not_before: None, expires: Some(at(1900)) },
        revocations: Revocations { serials: [666].into(), key_ids: ["gone".to_owned()].into() },
        ..authority(&key.public(), &["ci-*"])
    };
    let with = |id: &str, key: &PrivateKey, orchestrators: &[Orchestrator]| Organisation {
        authorities: vec![authority(key)],
        ..organisation(id, &[], orchestrators, &[])
    };
    let theirs = PrivateKey::generate(Algorithm::Ed25519).public();
    let organisations = vec![
        with("acme", &ca, &[]),
        with("globex", &other_ca, &[orchestrator(&theirs, None)]),
        organisation("initech", &[], &[], &[]),
    ];
    let state = state(&config(organisations));
    let judge = |forge: &Forge, organisation: &str, second: i64| {
        let credential = Credential::Certificate(forge.sign());
        let (organisation, now) = (organisation.parse().expect("an id"), at(second));
        let judged = state.orchestrator(&organisation, &credential, None, now);
        assert_eq!(judged.as_ref().err(), state.admits(&organisation, &credential, None, now).as_ref().err());
        judged.map(|(_, asserts)| asserts.map_or(0, <[_]>::len))
    };
    let good = Forge::new(&ca, &["acme"]);
    assert_eq!(judge(&good, "acme", 1500), Ok(1));
    let only = |name: &str| vec![(name.to_owned(), String::new())];
    let wrong = [
        ("another CA", "certificate_unknown_ca", Forge { authority: other_ca.clone(), ..good.clone() }),
        ("another organisation", "certificate_principal", Forge { principals: vec!["globex".into()], ..good.clone() }),
        (
            "two organisations",
            "certificate_principal",
            Forge { principals: vec!["acme".into(), "globex".into()], ..good.clone() },
        ),
        ("no organisation", "certificate_principal", Forge { principals: Vec::new(), ..good.clone() }),
        ("a host's", "certificate_type", Forge { kind: Kind::Host, ..good.clone() }),
        ("not yet valid", "certificate_not_yet_valid", Forge { valid_after: 1501, ..good.clone() }),
        ("expired", "certificate_expired", Forge { valid_before: 1500, ..good.clone() }),
        ("a serial number", "certificate_revoked", Forge { serial: 666, ..good.clone() }),
        ("a key id", "certificate_revoked", Forge { key_id: "gone".into(), ..good.clone() }),
        ("an option", "certificate_option", Forge { options: only("force-command"), ..good.clone() }),
        (
            "a network, where nobody knows where the gateway is",
            "certificate_source_address",
            Forge { options: vec![("source-address".into(), "0.0.0.0/0".into())], ..good.clone() },
        ),
        ("no forwarding", "certificate_no_forwarding", Forge { extensions: Vec::new(), ..good.clone() }),
        ("another organisation's key", "other_organisation", Forge { subject: theirs, ..good.clone() }),
    ];
    for (what, reason, forge) in wrong {
        assert_eq!(judge(&forge, "acme", 1500), Err(reason), "{what}");
    }
    assert_eq!(judge(&good, "acme", 1900), Err("certificate_ca_expired"));
    // The same elsewhere, with and without a CA of its own.
    for elsewhere in ["globex", "initech"] {
        assert_eq!(judge(&good, elsewhere, 1500), Err("certificate_unknown_ca"));
    }
    let [acme, initech] = ["acme", "initech"].map(|id| id.parse().expect("an id"));
    assert!(state.has_authority(&acme) && !state.has_authority(&initech) && state.has_any_authority());
}

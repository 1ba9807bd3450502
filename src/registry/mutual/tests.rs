//! Tests of the module above.

use std::net::Ipv4Addr;

use super::*;
use crate::identity::Pattern;
use crate::policy::grant::Grant;
use crate::registry::{Agent, PrincipalRecord};
use crate::tls::judge::tests::{Issuer, NOW, ca, shown, trust};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn id<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect(text)
}

fn now() -> Timestamp {
    id(NOW)
}

/// Who certifies here.
struct World {
    of_acme: Issuer,
    of_eu: Issuer,
    of_listener: Issuer,
}

impl World {
    fn new() -> Self {
        Self { of_acme: ca("acme"), of_eu: ca("eu"), of_listener: ca("listener") }
    }

    /// acme has a CA, and its agent prod-eu one of its own; globex has none.
    fn snapshot(&self, acme: ClientAuth) -> Snapshot {
        let agent = |names: &[&str], client_trust| Agent {
            certificate_names: names.iter().map(|name| (*name).to_owned()).collect(),
            client_trust,
            ..Agent::default()
        };
        let grant = Grant { agents: vec![id::<Pattern>("*")], targets: None };
        let principal = |names: &[&str]| PrincipalRecord {
            certificate_names: names.iter().map(|name| (*name).to_owned()).collect(),
            grant: grant.clone(),
            ..PrincipalRecord::default()
        };
        let of_acme = Organisation {
            client_auth: acme,
            client_trust: trust(&[(&self.of_acme, None)]),
            agents: [
                (id("prod-eu"), agent(&[], Some(trust(&[(&self.of_eu, None)])))),
                (id("prod-us"), agent(&["us.example"], None)),
            ]
            .into(),
            principals: [(id("ci"), principal(&["ci.example"])), (id("visitor"), principal(&[]))].into(),
            ..Organisation::default()
        };
        let of_globex = Organisation { agents: [(id("prod"), agent(&[], None))].into(), ..Organisation::default() };
        Snapshot::new([(id("acme"), of_acme), (id("globex"), of_globex)].into()).expect("no key twice")
    }
}

#[test]
fn the_stricter_of_listener_and_organisation_holds() {
    use ClientAuth::{Loose, Off, Strict};
    let world = World::new();
    let trusted = trust(&[(&world.of_listener, None)]);
    let good = shown("caponier://acme/agents/prod-us", "x", &world.of_acme);
    let bad = shown("caponier://acme/agents/other", "x", &world.of_acme);
    for organisation in [Off, Loose, Strict] {
        for listener in [Off, Loose, Strict] {
            let snapshot = world.snapshot(organisation);
            let at = Listener { client_auth: listener, trust: &trusted };
            let case = format!("{organisation} and {listener}");
            let judge = |shown| snapshot.link_certificate(&id("acme/prod-us"), at, shown, now());
            let mode = organisation.max(listener);
            let missing = [Ok(Shown::Unasked), Ok(Shown::Missing), Err(Flaw::Missing)];
            assert_eq!(judge(None), missing[mode as usize], "{case}");
            let mark = judge(Some(&good)).expect(&case).mark();
            assert_eq!(mark, (mode != Off).then(|| good.fingerprint().to_string()), "{case}");
            assert_eq!(judge(Some(&bad)).err(), (mode != Off).then_some(Flaw::OtherName), "{case}");
        }
    }
    assert_eq!(Shown::Missing.mark().as_deref(), Some("missing"));
}

#[test]
fn who_has_a_ca_is_certified_by_no_other() {
    let world = World::new();
    let snapshot = world.snapshot(ClientAuth::Strict);
    let trusted = trust(&[(&world.of_listener, None)]);
    let at = Listener { client_auth: ClientAuth::Strict, trust: &trusted };
    for (agent, issuer, good) in [
        ("acme/prod-eu", &world.of_eu, true),
        ("acme/prod-eu", &world.of_acme, false),
        ("acme/prod-eu", &world.of_listener, false),
        ("acme/prod-us", &world.of_acme, true),
        ("acme/prod-us", &world.of_eu, false),
        ("acme/prod-us", &world.of_listener, false),
        ("globex/prod", &world.of_listener, true),
        ("globex/prod", &world.of_acme, false),
        ("initech/prod", &world.of_acme, false),
    ] {
        let name: AgentName = id(agent);
        let uri = format!("caponier://{}/agents/{}", name.organisation, name.agent);
        let judged = snapshot.link_certificate(&name, at, Some(&shown(&uri, "x", issuer)), now());
        let wanted = if good { None } else { Some(Flaw::UnknownAuthority) };
        assert_eq!(judged.err(), wanted, "{agent} by {}", issuer.pem());
    }
}

#[test]
fn a_name_stands_for_the_one_that_registers_it() {
    let world = World::new();
    let snapshot = world.snapshot(ClientAuth::Strict);
    let trusted = Trust::default();
    let at = Listener { client_auth: ClientAuth::Strict, trust: &trusted };
    let link = |agent, chain: &PeerChain| snapshot.link_certificate(&id(agent), at, Some(chain), now()).is_ok();
    let host = shown("https://us.example", "us.example", &world.of_acme);
    assert!(link("acme/prod-us", &host));
    let principal =
        |name, chain: &PeerChain| snapshot.principal_certificate(&id("acme"), &id(name), at, Some(chain), now());
    assert_eq!(principal("ci", &host).err(), Some(Flaw::OtherName));
    let ci = shown("https://ci.example", "ci.example", &world.of_acme);
    assert!(principal("ci", &ci).is_ok());
    assert_eq!(principal("visitor", &ci).err(), Some(Flaw::OtherName));
    assert!(!link("acme/prod-us", &ci));
    let nobody = snapshot.principal_certificate(&id("acme"), &id("gone"), at, None, now());
    assert_eq!(nobody.err(), Some(Flaw::Missing));
}

#[test]
fn a_certificate_alone_is_one_principal_or_nobody() {
    let world = World::new();
    let snapshot = world.snapshot(ClientAuth::Off);
    let trusted = trust(&[(&world.of_listener, None)]);
    let at = |client_auth| Listener { client_auth, trust: &trusted };
    let admits = |agent, mode, chain: &PeerChain| {
        snapshot.admits_client_certificate(&id(agent), at(mode), chain, HERE, now()).map(|(id, _)| id.to_string())
    };
    let flaw = |flaw| Err(Refusal::ClientCertificate(flaw));
    let loose = ClientAuth::Loose;
    let ci = shown("caponier://acme/principals/ci", "x", &world.of_acme);
    assert_eq!(admits("acme/prod-us", loose, &ci).as_deref(), Ok("ci"));
    assert_eq!(admits("acme/prod-us", ClientAuth::Off, &ci), flaw(Flaw::Missing), "nobody asks for one");
    assert_eq!(admits("acme/gone", loose, &ci), Err(Refusal::UnknownAgent));
    assert_eq!(admits("initech/prod", loose, &ci), Err(Refusal::UnknownOrganisation));
    assert_eq!(admits("globex/prod", loose, &ci), flaw(Flaw::UnknownAuthority));
    let of_agent = shown("caponier://acme/agents/prod-us", "us.example", &world.of_acme);
    assert_eq!(admits("acme/prod-us", loose, &of_agent), flaw(Flaw::OtherName), "an agent's");
    let two = shown("caponier://acme/principals/visitor", "ci.example", &world.of_acme);
    assert_eq!(admits("acme/prod-us", loose, &two), flaw(Flaw::OtherName), "two principals");
    let foreign = shown("caponier://acme/principals/ci", "x", &world.of_listener);
    assert_eq!(admits("acme/prod-us", loose, &foreign), flaw(Flaw::UnknownAuthority));
}

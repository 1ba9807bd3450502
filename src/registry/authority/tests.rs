use std::collections::BTreeMap;

use super::*;
use crate::identity::certificate::forge::Forge;
use crate::identity::{Algorithm, OrganisationId, PrivateKey, PublicKey};
use crate::network::Networks;
use crate::policy::grant::Grant;
use crate::registry::{Agent, PrincipalRecord};

fn key() -> PrivateKey {
    PrivateKey::generate(Algorithm::Ed25519)
}

fn registered(key: &PublicKey) -> RegisteredKey {
    RegisteredKey { key: key.clone(), not_before: None, expires: None, revoked: false, comment: None }
}

fn authority(ca: &PrivateKey, principals: &[&str]) -> Authority {
    Authority {
        registered: registered(&ca.public()),
        principals: principals.iter().map(|text| text.parse().expect(text)).collect(),
        revocations: Revocations::default(),
    }
}

fn principal(agents: &[&str]) -> PrincipalRecord {
    let agents = agents.iter().map(|text| text.parse().expect(text)).collect();
    PrincipalRecord { grant: Grant { agents, targets: None }, ..PrincipalRecord::default() }
}

/// Two agents; `ci-1` and `ci-2` may use the one, `ci-2` and `admin` the other.
fn organisation(authorities: &[Authority]) -> Organisation {
    Organisation {
        agents: ["eu", "us"].map(|id| (id.parse().expect(id), Agent::default())).into(),
        principals: [("ci-1", &["eu"][..]), ("ci-2", &["eu", "us"]), ("admin", &["us"])]
            .map(|(id, agents)| (id.parse().expect(id), principal(agents)))
            .into(),
        authorities: authorities.to_vec(),
        ..Organisation::default()
    }
}

fn snapshot(organisations: &[(&str, Organisation)]) -> Snapshot {
    let organisations: BTreeMap<OrganisationId, _> =
        organisations.iter().map(|(id, organisation)| (id.parse().expect(id), organisation.clone())).collect();
    Snapshot::new(organisations).expect("a registry")
}

fn admits(snapshot: &Snapshot, agent: &str, certificate: &Certificate) -> Result<String, Refusal> {
    let from = "192.0.2.7".parse().expect("an address");
    let now = Timestamp::from_second(1500).expect("a time");
    let credential = Credential::Certificate(certificate.clone());
    let admitted = snapshot.admits_credential(&agent.parse().expect(agent), &credential, from, now);
    admitted.map(|id| id.to_string())
}

#[test]
fn a_certificate_is_the_one_principal_that_it_can_be() {
    let ca = key();
    let snapshot = snapshot(&[("acme", organisation(&[authority(&ca, &["ci-*"])]))]);
    for (principals, agent, admitted) in [
        (&["ci-1"][..], "acme/eu", Ok("ci-1")),
        (&["ci-1", "ci-1"], "acme/eu", Ok("ci-1")),
        // Names that mean something elsewhere.
        (&["root", "Someone Else", "ci-1", "ci-9"], "acme/eu", Ok("ci-1")),
        (&["ci-1", "ci-2"], "acme/us", Ok("ci-2")),
        (&["ci-1", "ci-2"], "acme/eu", Err(Refusal::Certificate(Flaw::Principal))),
        (&["ci-9"], "acme/eu", Err(Refusal::Certificate(Flaw::Principal))),
        (&["admin"], "acme/us", Err(Refusal::Certificate(Flaw::Principal))),
        (&["CI-1"], "acme/eu", Err(Refusal::Certificate(Flaw::Principal))),
        (&["ci-*"], "acme/eu", Err(Refusal::Certificate(Flaw::Principal))),
        (&[], "acme/eu", Err(Refusal::Certificate(Flaw::Principal))),
        (&["ci-1"], "acme/us", Err(Refusal::NotGranted)),
        (&["ci-1"], "acme/nowhere", Err(Refusal::UnknownAgent)),
        (&["ci-1"], "nobody/eu", Err(Refusal::UnknownOrganisation)),
    ] {
        let certificate = Forge::new(&ca, principals).sign();
        assert_eq!(admits(&snapshot, agent, &certificate), admitted.map(str::to_owned), "{principals:?} {agent}");
    }
}

/// One thing different in the registry at a time.
#[test]
fn one_reason_in_the_registry_is_enough_to_refuse() {
    let (ca, holder) = (key(), key());
    let certificate = Forge { subject: holder.public(), ..Forge::new(&ca, &["ci-1"]) }.sign();
    let past = || Some(Timestamp::from_second(1500).expect("a time"));
    let future = || Some(Timestamp::from_second(1501).expect("a time"));
    let judge = |change: &dyn Fn(&mut Organisation)| {
        let mut organisation = organisation(&[authority(&ca, &["ci-*"])]);
        change(&mut organisation);
        admits(&snapshot(&[("acme", organisation)]), "acme/eu", &certificate)
    };
    assert_eq!(judge(&|_| ()), Ok("ci-1".to_owned()));
    assert_eq!(judge(&|it| it.authorities[0].registered.expires = future()), Ok("ci-1".to_owned()));
    assert_eq!(judge(&|it| it.authorities[0].registered.not_before = past()), Ok("ci-1".to_owned()));
    fn record<'a>(organisation: &'a mut Organisation, id: &str) -> &'a mut PrincipalRecord {
        organisation.principals.get_mut(&id.parse().expect(id)).expect("a principal")
    }
    let elsewhere = || Networks::new(vec!["10.0.0.0/8".parse().expect("a network")]);
    type Change<'a> = (&'a str, Refusal, &'a dyn Fn(&mut Organisation));
    let changes: &[Change<'_>] = &[
        ("no CA", Flaw::UnknownAuthority.into(), &|it| it.authorities.clear()),
        ("another CA", Flaw::UnknownAuthority.into(), &|it| it.authorities = vec![authority(&key(), &["*"])]),
        ("a CA that expired", Flaw::AuthorityExpired.into(), &|it| it.authorities[0].registered.expires = past()),
        ("a CA to come", Flaw::AuthorityExpired.into(), &|it| it.authorities[0].registered.not_before = future()),
        ("a CA withdrawn", Flaw::AuthorityRevoked.into(), &|it| it.authorities[0].registered.revoked = true),
        ("a CA of others", Flaw::Principal.into(), &|it| it.authorities[0] = authority(&ca, &["admin"])),
        ("a serial number", Flaw::Revoked.into(), &|it| it.authorities[0].revocations.serials = [7].into()),
        ("a key id", Flaw::Revoked.into(), &|it| {
            it.authorities[0].revocations.key_ids = ["somebody".to_owned()].into();
        }),
        ("no principal", Flaw::Principal.into(), &|it| it.principals.clear()),
        ("a principal that expired", Refusal::Expired, &|it| record(it, "ci-1").expires = past()),
        ("a principal to come", Refusal::NotYetValid, &|it| record(it, "ci-1").not_before = future()),
        ("no grant", Refusal::NotGranted, &|it| record(it, "ci-1").grant.agents.clear()),
        ("the principal's networks", Refusal::SourceNetwork, &|it| record(it, "ci-1").accept_from = elsewhere()),
        ("the organisation's networks", Refusal::SourceNetwork, &|it| it.accept_from = elsewhere()),
        ("a key that was withdrawn", Refusal::Revoked, &|it| {
            record(it, "admin").keys = vec![RegisteredKey { revoked: true, ..registered(&holder.public()) }];
        }),
        ("an agent's key", Refusal::OtherHolder, &|it| {
            let keys = vec![registered(&holder.public())];
            it.agents.insert("us".parse().expect("an id"), Agent { keys, ..Agent::default() });
        }),
        ("a CA's key", Refusal::OtherHolder, &|it| it.authorities.push(authority(&holder, &["*"]))),
    ];
    for (what, refusal, change) in changes {
        assert_eq!(judge(change), Err(*refusal), "{what}");
    }
}

#[test]
fn a_ca_is_asked_about_in_the_organisation_that_the_user_names() {
    let (of_acme, of_both) = (key(), key());
    let acme = organisation(&[authority(&of_acme, &["*"]), authority(&of_both, &["admin"])]);
    let globex = organisation(&[authority(&of_both, &["ci-*"])]);
    let snapshot = snapshot(&[("acme", acme), ("globex", globex), ("initech", organisation(&[]))]);
    let unknown = Err(Refusal::Certificate(Flaw::UnknownAuthority));
    let own = Forge::new(&of_acme, &["ci-1"]).sign();
    assert_eq!(admits(&snapshot, "acme/eu", &own), Ok("ci-1".to_owned()));
    assert_eq!(admits(&snapshot, "globex/eu", &own), unknown);
    assert_eq!(admits(&snapshot, "initech/eu", &own), unknown);
    // What it may certify in one organisation it may not in another.
    let (ci, admin) = (Forge::new(&of_both, &["ci-1"]).sign(), Forge::new(&of_both, &["admin"]).sign());
    assert_eq!(admits(&snapshot, "globex/eu", &ci), Ok("ci-1".to_owned()));
    assert_eq!(admits(&snapshot, "acme/eu", &ci), Err(Refusal::Certificate(Flaw::Principal)));
    assert_eq!(admits(&snapshot, "acme/us", &admin), Ok("admin".to_owned()));
    assert_eq!(admits(&snapshot, "globex/us", &admin), Err(Refusal::Certificate(Flaw::Principal)));
}

#[test]
fn a_ca_s_key_is_nothing_else_in_its_organisation() {
    let ca = key();
    let agent = Agent { keys: vec![registered(&ca.public())], ..Agent::default() };
    let mut acme = organisation(&[authority(&ca, &["*"])]);
    acme.agents.insert("eu".parse().expect("an id"), agent);
    let twice = organisation(&[authority(&ca, &["*"]), authority(&ca, &["ci-*"])]);
    for organisation in [acme, twice] {
        let made = Snapshot::new([("acme".parse().expect("an id"), organisation)].into());
        assert!(made.expect_err("a key with two holders").to_string().contains("a user CA"));
    }
    // Nor does it log in by itself.
    let snapshot = snapshot(&[("acme", organisation(&[authority(&ca, &["*"])]))]);
    let (from, now) = ("192.0.2.7".parse().expect("an address"), Timestamp::from_second(1500).expect("a time"));
    let agent: AgentName = "acme/eu".parse().expect("a name");
    let fingerprint = ca.public().fingerprint();
    assert_eq!(snapshot.admits(&agent, &fingerprint, from, now), Err(Refusal::OtherHolder));
    assert_eq!(snapshot.agent(&agent, &fingerprint, from, now), Err(Refusal::OtherHolder));
}

#[test]
fn a_ca_s_time_counts_as_a_change() {
    let mut expiring = authority(&key(), &["*"]);
    expiring.registered.expires = Some(Timestamp::from_second(1500).expect("a time"));
    let snapshot = snapshot(&[("acme", organisation(&[expiring]))]);
    let at = |second| Timestamp::from_second(second).expect("a time");
    assert!(snapshot.expires_within(at(1499), at(1500)));
    assert!(!snapshot.expires_within(at(1500), at(1501)));
}

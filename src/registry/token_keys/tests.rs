use std::net::Ipv4Addr;

use jiff::SignedDuration;

use super::*;
use crate::identity::{Algorithm, PrivateKey};
use crate::policy::grant::Grant;
use crate::registry::{Agent, Organisation, PrincipalRecord};
use crate::token::{Claims, Token};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn id<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect(text)
}

fn now() -> Timestamp {
    id("2026-11-21T12:00:00Z")
}

fn good(key: &PrivateKey) -> RegisteredKey {
    RegisteredKey { key: key.public(), not_before: None, expires: None, revoked: false, comment: None }
}

struct World {
    acme: Organisation,
    globex: Organisation,
    signer: PrivateKey,
    theirs: PrivateKey,
    ci: PrivateKey,
    agent: PrivateKey,
}

impl World {
    fn new() -> Self {
        let [signer, theirs, ci, agent] = std::array::from_fn(|_| PrivateKey::generate(Algorithm::Ed25519));
        let grant = || Grant { agents: vec![id("prod-*")], targets: None };
        let record = |keys| PrincipalRecord { grant: grant(), keys, ..PrincipalRecord::default() };
        let token_key = |key: &PrivateKey| TokenKey {
            registered: good(key),
            principals: vec![id("ci*")],
            revoked_tokens: BTreeSet::new(),
        };
        let acme = Organisation {
            agents: [
                (id("prod-eu"), Agent { keys: vec![good(&agent)], ..Agent::default() }),
                (id("test"), Agent::default()),
            ]
            .into(),
            principals: [
                (id("ci"), record(vec![good(&ci)])),
                (id("ci-two"), record(vec![])),
                (id("dba"), record(vec![])),
            ]
            .into(),
            token_keys: vec![token_key(&signer)],
            ..Organisation::default()
        };
        let globex = Organisation {
            agents: [(id("prod-eu"), Agent::default())].into(),
            principals: [(id("ci"), record(vec![]))].into(),
            token_keys: vec![token_key(&theirs)],
            ..Organisation::default()
        };
        Self { acme, globex, signer, theirs, ci, agent }
    }

    fn snapshot(&self) -> Snapshot {
        let all = [(id("acme"), self.acme.clone()), (id("globex"), self.globex.clone())];
        Snapshot::new(all.into()).expect("no key is there twice")
    }

    fn judge(&self, token: &Token, now: Timestamp) -> Result<PrincipalId, Refusal> {
        let snapshot = self.snapshot();
        let key = snapshot.signer(&token.key()).ok_or(Refusal::UnknownKey)?;
        snapshot.admits_token(&token.verify(key).expect("its signature"), HERE, now)
    }
}

fn claims(principal: &str, agent: &str) -> Claims {
    Claims::new(id(principal), id(agent), None, now(), SignedDuration::from_hours(1)).expect("claims")
}

fn jwt(principal: &str, agent: &str, key: &PrivateKey) -> Token {
    claims(principal, agent).sign(key).expect("a token")
}

fn ssh(principal: &str, agent: &str, key: &PrivateKey) -> Token {
    claims(principal, agent).sign_with_ssh(key).expect("a token")
}

#[test]
fn a_token_stands_for_its_principal_and_for_nobody_else() {
    let world = World::new();
    let stranger = PrivateKey::generate(Algorithm::Ed25519);
    let (ours, theirs, ci) = (&world.signer, &world.theirs, &world.ci);
    assert_eq!(world.judge(&jwt("ci", "acme/prod-eu", ours), now()), Ok(id("ci")));
    assert_eq!(world.judge(&jwt("ci-two", "acme/prod-eu", ours), now()), Ok(id("ci-two")));
    assert_eq!(world.judge(&ssh("ci", "acme/prod-eu", ci), now()), Ok(id("ci")));
    assert_eq!(world.judge(&jwt("ci", "globex/prod-eu", theirs), now()), Ok(id("ci")));
    for (case, token, refusal) in [
        ("a stranger's", jwt("ci", "acme/prod-eu", &stranger), Refusal::UnknownKey),
        ("a stranger's own", ssh("ci", "acme/prod-eu", &stranger), Refusal::UnknownKey),
        ("an agent's", jwt("ci", "acme/prod-eu", &world.agent), Refusal::UnknownKey),
        ("another organisation's", jwt("ci", "acme/prod-eu", theirs), Refusal::OtherOrganisation),
        ("for another organisation", jwt("ci", "globex/prod-eu", ours), Refusal::OtherOrganisation),
        ("for nobody's organisation", jwt("ci", "initech/prod-eu", ours), Refusal::UnknownOrganisation),
        ("for a principal it may not sign for", jwt("dba", "acme/prod-eu", ours), TokenFlaw::Principal.into()),
        ("for a principal that does not exist", jwt("ci-three", "acme/prod-eu", ours), Refusal::NotGranted),
        ("another principal's own key", ssh("ci-two", "acme/prod-eu", ci), Refusal::OtherHolder),
        ("a principal's key as if it signed for others", jwt("ci", "acme/prod-eu", ci), Refusal::OtherHolder),
        ("a token key as if it were the principal's", ssh("ci", "acme/prod-eu", ours), Refusal::OtherHolder),
        ("an agent that is not granted", jwt("ci", "acme/test", ours), Refusal::NotGranted),
        ("an agent that does not exist", jwt("ci", "acme/prod-xx", ours), Refusal::UnknownAgent),
    ] {
        assert_eq!(world.judge(&token, now()), Err(refusal), "{case}");
    }
}

#[test]
fn a_token_ends_with_whatever_it_rests_on() {
    type Change = fn(&mut Organisation, &TokenId);
    let cases: [(&str, Change, Refusal, Refusal); 7] = [
        (
            "the principal has gone",
            |acme, _| drop(acme.principals.remove(&id::<PrincipalId>("ci"))),
            Refusal::NotGranted,
            Refusal::UnknownKey,
        ),
        (
            "the principal has expired",
            |acme, _| acme.principals.get_mut(&id::<PrincipalId>("ci")).expect("ci").expires = Some(now()),
            Refusal::Expired,
            Refusal::Expired,
        ),
        (
            "the token was withdrawn",
            |acme, jti| {
                let record = acme.principals.get_mut(&id::<PrincipalId>("ci")).expect("ci");
                record.revoked_tokens.insert(jti.clone());
            },
            TokenFlaw::Revoked.into(),
            TokenFlaw::Revoked.into(),
        ),
        (
            "the key was withdrawn",
            |acme, _| {
                acme.token_keys[0].registered.revoked = true;
                acme.principals.get_mut(&id::<PrincipalId>("ci")).expect("ci").keys[0].revoked = true;
            },
            Refusal::Revoked,
            Refusal::Revoked,
        ),
        (
            "the key has expired",
            |acme, _| {
                acme.token_keys[0].registered.expires = Some(now());
                acme.principals.get_mut(&id::<PrincipalId>("ci")).expect("ci").keys[0].expires = Some(now());
            },
            Refusal::Expired,
            Refusal::Expired,
        ),
        (
            "the key is not good yet",
            |acme, _| {
                let later = now().checked_add(SignedDuration::from_secs(1)).ok();
                acme.token_keys[0].registered.not_before = later;
                acme.principals.get_mut(&id::<PrincipalId>("ci")).expect("ci").keys[0].not_before = later;
            },
            Refusal::NotYetValid,
            Refusal::NotYetValid,
        ),
        (
            "it comes from elsewhere",
            |acme, _| acme.accept_from = crate::network::Networks::new(vec![id("192.0.2.0/24")]),
            Refusal::SourceNetwork,
            Refusal::SourceNetwork,
        ),
    ];
    for (case, change, of_jwt, of_ssh) in cases {
        let mut world = World::new();
        let [one, other] = [(); 2].map(|()| claims("ci", "acme/prod-eu"));
        let token = |claims: &Claims| claims.sign(&world.signer).expect("a token");
        let (jwt, left) = (token(&one), token(&other));
        let own = one.sign_with_ssh(&world.ci).expect("a token");
        assert!(world.judge(&jwt, now()).is_ok() && world.judge(&own, now()).is_ok(), "{case}");
        change(&mut world.acme, &one.id);
        assert_eq!(world.judge(&jwt, now()), Err(of_jwt), "{case}");
        assert_eq!(world.judge(&own, now()), Err(of_ssh), "{case}");
        // Only a token's own withdrawal leaves the others alone.
        assert_eq!(world.judge(&left, now()).is_ok(), case == "the token was withdrawn", "{case}");
    }
}

#[test]
fn a_key_withdraws_only_its_own_tokens_and_time_is_the_tokens() {
    let mut world = World::new();
    let claims = claims("ci", "acme/prod-eu");
    world.acme.token_keys[0].revoked_tokens.insert(claims.id.clone());
    assert_eq!(world.judge(&claims.sign(&world.signer).expect("a token"), now()), Err(TokenFlaw::Revoked.into()));
    assert!(world.judge(&claims.sign_with_ssh(&world.ci).expect("a token"), now()).is_ok());
    let own = claims.sign_with_ssh(&world.ci).expect("a token");
    assert_eq!(world.judge(&own, id("2026-11-21T11:58:00Z")), Err(TokenFlaw::NotYetValid.into()));
    assert!(world.judge(&own, id("2026-11-21T13:00:59Z")).is_ok());
    assert_eq!(world.judge(&own, id("2026-11-21T13:01:00Z")), Err(TokenFlaw::Expired.into()));
}

#[test]
fn a_key_has_one_role_and_keys_replace_each_other_by_overlap() {
    let mut world = World::new();
    let next = PrivateKey::generate(Algorithm::Ed25519);
    let old = jwt("ci", "acme/prod-eu", &world.signer);
    let mut key = world.acme.token_keys[0].clone();
    key.registered = good(&next);
    world.acme.token_keys.push(key);
    let new = jwt("ci", "acme/prod-eu", &next);
    assert!(world.judge(&old, now()).is_ok() && world.judge(&new, now()).is_ok());
    world.acme.token_keys.remove(0);
    assert_eq!(world.judge(&old, now()), Err(Refusal::UnknownKey));
    assert!(world.judge(&new, now()).is_ok());
    for holder in ["principal", "agent"] {
        let mut acme = world.acme.clone();
        match holder {
            "agent" => {
                acme.agents.get_mut(&id::<crate::identity::AgentId>("test")).expect("test").keys.push(good(&next))
            }
            _ => acme.principals.get_mut(&id::<PrincipalId>("dba")).expect("dba").keys.push(good(&next)),
        }
        assert!(Snapshot::new([(id("acme"), acme)].into()).is_err(), "{holder}");
    }
}

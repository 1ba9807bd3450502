//! What differs between two states of a registry, by ids: for the trail, which says after the fact who was let in when.
//!
//! Promised: pure, and nothing but ids and fingerprints. A key that is revoked is gone and a revoked one is new, since that
//! is what whoever reads of it looks for. Of a state that is the same nothing is said.

use std::collections::BTreeMap;

use super::{Organisation, RegisteredKey, Role, Snapshot};
use crate::identity::OrganisationId;
use crate::reload::Changes;

/// What came, went and changed from `old` to `new`.
#[must_use]
pub fn between(old: &Snapshot, new: &Snapshot) -> Changes {
    let mut changes = Changes::default();
    // What is theirs is told of by itself.
    let own = |snapshot: &Snapshot| -> BTreeMap<OrganisationId, _> {
        let organisations = snapshot.organisations.iter();
        organisations.map(|(id, one)| (id.clone(), (one.client_auth, one.accept_from.clone()))).collect()
    };
    changes.compare("organisation ", &own(old), &own(new));
    let (nobody, mut ids) = (Organisation::default(), Vec::from_iter(old.organisations.keys()));
    ids.extend(new.organisations.keys().filter(|id| !old.organisations.contains_key(id)));
    for id in ids {
        let (before, after) = (old.organisations.get(id), new.organisations.get(id));
        if before != after {
            organisation(&mut changes, id, before.unwrap_or(&nobody), after.unwrap_or(&nobody));
        }
    }
    changes
}

fn organisation(changes: &mut Changes, id: &OrganisationId, old: &Organisation, new: &Organisation) {
    // Keys first: they are what opens, and the list has an end.
    for (revoked, what) in [(false, ""), (true, "revoked ")] {
        changes.compare(what, &keys(id, old, revoked), &keys(id, new, revoked));
    }
    let tokens = |one: &Organisation| -> BTreeMap<_, _> {
        let of_principals = one.principals.values().flat_map(|record| &record.revoked_tokens);
        let of_keys = one.token_keys.iter().flat_map(|key| &key.revoked_tokens);
        of_principals.chain(of_keys).map(|token| (token.to_string(), ())).collect()
    };
    changes.compare(format_args!("revoked token {id} "), &tokens(old), &tokens(new));
    let client_cas =
        |one: &Organisation| -> BTreeMap<_, _> { one.client_trusts().flat_map(|trust| trust.authorities()).collect() };
    changes.compare(format_args!("client CA {id} "), &client_cas(old), &client_cas(new));
    let agents = |one: &Organisation| -> BTreeMap<_, _> {
        let without_keys = |agent: &super::Agent| super::Agent { keys: Vec::new(), ..agent.clone() };
        one.agents.iter().map(|(agent, record)| (agent.clone(), without_keys(record))).collect()
    };
    changes.compare(format_args!("agent {id}/"), &agents(old), &agents(new));
    let principals = |one: &Organisation| -> BTreeMap<_, _> {
        let without_keys = |record: &super::PrincipalRecord| super::PrincipalRecord {
            keys: Vec::new(),
            revoked_tokens: std::collections::BTreeSet::new(),
            ..record.clone()
        };
        one.principals.iter().map(|(principal, record)| (principal.clone(), without_keys(record))).collect()
    };
    changes.compare(format_args!("principal {id}/"), &principals(old), &principals(new));
}

/// The keys of an organisation by what they open, with all that is said of them.
fn keys(id: &OrganisationId, organisation: &Organisation, revoked: bool) -> BTreeMap<String, String> {
    let name = |role: &Role, key: &RegisteredKey| {
        let fingerprint = key.key.fingerprint();
        match role {
            Role::Agent(agent) => format!("key {fingerprint} of agent {id}/{agent}"),
            Role::Principal(principal) => format!("key {fingerprint} of principal {id}/{principal}"),
            Role::Authority => format!("user CA {fingerprint} of {id}"),
            Role::TokenKey => format!("token key {fingerprint} of {id}"),
        }
    };
    let said = |role: &Role, key: &RegisteredKey| {
        let principals = match role {
            Role::Authority => {
                let own = organisation.authorities.iter().filter(|authority| authority.registered.key == key.key);
                format!(
                    "{:?}",
                    own.map(|authority| (&authority.principals, &authority.revocations)).collect::<Vec<_>>()
                )
            }
            Role::TokenKey => {
                let own = organisation.token_keys.iter().filter(|signer| signer.registered.key == key.key);
                format!("{:?}", own.map(|signer| &signer.principals).collect::<Vec<_>>())
            }
            Role::Agent(_) | Role::Principal(_) => String::new(),
        };
        format!("{:?} {:?} {:?} {principals}", key.not_before, key.expires, key.comment)
    };
    let keys = organisation.keys().filter(|(_, key)| key.revoked == revoked);
    keys.map(|(role, key)| (name(&role, key), said(&role, key))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Algorithm, PrivateKey, PublicKey};
    use crate::registry::{Agent, PrincipalRecord};

    fn key() -> PublicKey {
        PrivateKey::generate(Algorithm::Ed25519).public()
    }

    fn registered(key: &PublicKey) -> RegisteredKey {
        RegisteredKey { key: key.clone(), not_before: None, expires: None, revoked: false, comment: None }
    }

    fn snapshot(organisations: &[(&str, Organisation)]) -> Snapshot {
        let pairs = organisations.iter().map(|(id, one)| (id.parse().expect("an id"), one.clone()));
        Snapshot::new(pairs.collect()).expect("a registry")
    }

    fn acme(agent_keys: Vec<RegisteredKey>, principal_keys: Vec<RegisteredKey>) -> Organisation {
        let agent = Agent { keys: agent_keys, ..Agent::default() };
        let principal = PrincipalRecord { keys: principal_keys, ..PrincipalRecord::default() };
        Organisation {
            agents: [("prod".parse().expect("an id"), agent)].into(),
            principals: [("ci".parse().expect("an id"), principal)].into(),
            ..Organisation::default()
        }
    }

    #[test]
    fn the_same_is_no_change() {
        let state = snapshot(&[("acme", acme(vec![registered(&key())], vec![]))]);
        assert_eq!(between(&state, &state.clone()), Changes::default());
    }

    #[test]
    fn keys_come_go_and_change_by_fingerprint() {
        let [host, next, ci] = [key(), key(), key()];
        let old = snapshot(&[("acme", acme(vec![registered(&host)], vec![registered(&ci)]))]);
        let mut expiring = registered(&ci);
        expiring.expires = Some("2030-01-01T00:00:00Z".parse().expect("a time"));
        let new = snapshot(&[("acme", acme(vec![registered(&next)], vec![expiring]))]);
        let (host, next, ci) = (host.fingerprint(), next.fingerprint(), ci.fingerprint());
        assert_eq!(
            between(&old, &new).to_string(),
            format!(
                "gone: key {host} of agent acme/prod; new: key {next} of agent acme/prod; changed: key {ci} of principal acme/ci"
            )
        );
    }

    #[test]
    fn a_revoked_key_is_gone() {
        let host = key();
        let old = snapshot(&[("acme", acme(vec![registered(&host)], vec![]))]);
        let revoked = RegisteredKey { revoked: true, ..registered(&host) };
        let new = snapshot(&[("acme", acme(vec![revoked], vec![]))]);
        let host = host.fingerprint();
        let told = between(&old, &new).to_string();
        assert_eq!(told, format!("gone: key {host} of agent acme/prod; new: revoked key {host} of agent acme/prod"));
    }

    #[test]
    fn a_whole_organisation_comes_with_all_that_is_its() {
        let host = key();
        let new = snapshot(&[("acme", acme(vec![registered(&host)], vec![]))]);
        let host = host.fingerprint();
        let parts = format!("organisation acme, key {host} of agent acme/prod, agent acme/prod, principal acme/ci");
        assert_eq!(between(&Snapshot::default(), &new).to_string(), format!("new: {parts}"));
        assert_eq!(between(&new, &Snapshot::default()).to_string(), format!("gone: {parts}"));
    }

    #[test]
    fn what_a_principal_may_use_is_told_by_its_name() {
        let old = snapshot(&[("acme", acme(vec![], vec![]))]);
        let mut organisation = acme(vec![], vec![]);
        for record in organisation.principals.values_mut() {
            record.expires = Some("2030-01-01T00:00:00Z".parse().expect("a time"));
        }
        let new = snapshot(&[("acme", organisation)]);
        assert_eq!(between(&old, &new).to_string(), "changed: principal acme/ci");
    }
}

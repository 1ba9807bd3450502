//! CAs whose certificates let an organisation's principals log in.
//!
//! Promised: a CA is trusted in the organisation that registers it, and asked about nowhere else; it certifies only the registered
//! principals that it was given; a certificate that could be two of them is nobody's; what it grants ends with the CA's own
//! registration, with a revocation and with its own time, whichever is first.
//!
//! One CA may be registered in several organisations, as a key may: the user's name says in which of them it is asked about.
//! Within one organisation a CA's key is nothing else.

use std::net::IpAddr;

use jiff::Timestamp;

use super::{Organisation, Refusal, RegisteredKey, Role, Snapshot};
use crate::identity::certificate::{Flaw, Revocations, Trust, Use};
use crate::identity::{AgentName, Certificate, Credential, Pattern, PrincipalId};

/// A registered CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authority {
    /// Its key.
    pub registered: RegisteredKey,
    /// Which of the organisation's principals it may certify.
    pub principals: Vec<Pattern>,
    /// What it has signed and counts no more.
    pub revocations: Revocations,
}

impl Authority {
    fn certifies(&self, principal: &PrincipalId) -> bool {
        self.principals.iter().any(|pattern| pattern.matches(principal.as_str()))
    }
}

impl From<Flaw> for Refusal {
    fn from(flaw: Flaw) -> Self {
        Self::Certificate(flaw)
    }
}

impl Snapshot {
    /// As [`Snapshot::admits`], for whoever has shown a key or a certificate.
    ///
    /// # Errors
    /// As [`Snapshot::admits`] and [`Snapshot::admits_certificate`].
    pub fn admits_credential(
        &self,
        agent: &AgentName,
        credential: &Credential,
        from: IpAddr,
        now: Timestamp,
    ) -> Result<PrincipalId, Refusal> {
        match credential {
            Credential::Key(key) => self.admits(agent, key, from, now),
            Credential::Certificate(certificate) => self.admits_certificate(agent, certificate, from, now),
        }
    }

    /// The principal whom `certificate` stands for, if it may use this agent at the time `now` from the address `from`: the one
    /// among those that the certificate names which is registered in the agent's organisation, which the CA may certify, and
    /// which is granted the agent.
    ///
    /// # Errors
    /// If the organisation does not trust the CA, the certificate does not count, its key is registered as something else or
    /// revoked, it names no such principal or several, or that one is not admitted for a reason of its own.
    pub fn admits_certificate(
        &self,
        agent: &AgentName,
        certificate: &Certificate,
        from: IpAddr,
        now: Timestamp,
    ) -> Result<PrincipalId, Refusal> {
        let organisation = self.organisation(&agent.organisation)?;
        let authority = organisation
            .authorities
            .iter()
            .find(|authority| authority.registered.key == *certificate.authority())
            .ok_or(Flaw::UnknownAuthority)?;
        let registered = &authority.registered;
        if registered.revoked {
            return Err(Flaw::AuthorityRevoked.into());
        }
        if !registered.counts(now) {
            return Err(Flaw::AuthorityExpired.into());
        }
        let trust = Trust { authority: &registered.key, revocations: &authority.revocations };
        certificate.judge(trust, Use::Login(Some(from)), now)?;
        self.judge_subject(agent, organisation, certificate)?;
        let id = named(agent, organisation, authority, certificate)?;
        self.admits_principal(agent, &id, from, now)?;
        Ok(id)
    }

    /// A key that was withdrawn does not come back with a certificate, and one that is an agent's or a CA's, or signs tokens, logs nobody in.
    fn judge_subject(
        &self,
        agent: &AgentName,
        organisation: &Organisation,
        certificate: &Certificate,
    ) -> Result<(), Refusal> {
        let subject = certificate.subject();
        match self.role(&agent.organisation, &subject.fingerprint()) {
            Err(_) => Ok(()),
            Ok(Role::Agent(_) | Role::Authority | Role::TokenKey) => Err(Refusal::OtherHolder),
            Ok(Role::Principal(id)) => {
                let keys = organisation.principals.get(id).map(|record| &record.keys[..]).unwrap_or_default();
                let revoked = keys.iter().any(|registered| registered.revoked && registered.key == *subject);
                if revoked { Err(Refusal::Revoked) } else { Ok(()) }
            }
        }
    }
}

/// The one principal that the certificate can mean for this agent.
fn named(
    agent: &AgentName,
    organisation: &Organisation,
    authority: &Authority,
    certificate: &Certificate,
) -> Result<PrincipalId, Refusal> {
    let certified = |name: &String| {
        let id = name.parse::<PrincipalId>().ok().filter(|id| authority.certifies(id))?;
        organisation.principals.get(&id).map(|record| (id, record))
    };
    let mut certified: Vec<_> = certificate.principals().iter().filter_map(certified).collect();
    if certified.is_empty() {
        return Err(Flaw::Principal.into());
    }
    if !organisation.agents.contains_key(&agent.agent) {
        return Err(Refusal::UnknownAgent);
    }
    certified.retain(|(_, record)| record.grant.covers(&agent.agent));
    certified.sort_by(|(one, _), (other, _)| one.cmp(other));
    certified.dedup_by(|(one, _), (other, _)| one == other);
    match certified.as_slice() {
        [(id, _)] => Ok(id.clone()),
        [] => Err(Refusal::NotGranted),
        _ => Err(Flaw::Principal.into()),
    }
}

#[cfg(test)]
mod tests;

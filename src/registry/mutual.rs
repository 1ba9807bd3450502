//! TLS certificates of clients: by whose they are judged, and whom they have to name.
//!
//! Promised: an agent's certificate comes from a CA of that agent if it has some, else of its organisation, else of the listener;
//! a principal's from one of its organisation, else of the listener. So no CA of a listener, and none of another organisation,
//! can stand in for one that an organisation has chosen. Whatever its CA, a certificate has to name whoever its holder is, and
//! a name stands for one agent or principal of an organisation.
//!
//! A certificate adds to a key and never takes its place at a link; at a door that says so it stands for a principal.

use std::net::IpAddr;

use jiff::Timestamp;

use super::{Organisation, Refusal, Snapshot};
use crate::identity::{AgentName, OrganisationId, PrincipalId};
use crate::tls::judge::Flaw;
use crate::tls::{ClientAuth, PeerCertificate, PeerChain, Trust, Wanted};

/// What the listener wants by which a client has come in.
#[derive(Debug, Clone, Copy)]
pub struct Listener<'a> {
    /// Whether clients show certificates there.
    pub client_auth: ClientAuth,
    /// Its own CAs.
    pub trust: &'a Trust,
}

/// What a client has shown, as far as anybody wanted it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    /// Nobody asks.
    Unasked,
    /// Nothing, which is let pass.
    Missing,
    /// A certificate that is good.
    Good(PeerCertificate),
}

impl Shown {
    /// What the audit says of it.
    #[must_use]
    pub fn mark(&self) -> Option<String> {
        match self {
            Self::Unasked => None,
            Self::Missing => Some("missing".to_owned()),
            Self::Good(certificate) => Some(certificate.fingerprint.to_string()),
        }
    }

    /// When a certificate ends.
    #[must_use]
    pub fn expires(&self) -> Option<Timestamp> {
        match self {
            Self::Unasked | Self::Missing => None,
            Self::Good(certificate) => Some(certificate.not_after),
        }
    }
}

impl Snapshot {
    /// Judges what an agent has shown on the way to a link, at the time `now`.
    ///
    /// # Errors
    /// If the listener or the organisation wants more.
    pub fn link_certificate(
        &self,
        name: &AgentName,
        listener: Listener<'_>,
        shown: Option<&PeerChain>,
        now: Timestamp,
    ) -> Result<Shown, Flaw> {
        let organisation = self.organisations.get(&name.organisation);
        let agent = organisation.and_then(|organisation| organisation.agents.get(&name.agent));
        let wanted = Wanted::agent(name, agent.map(|agent| &agent.certificate_names[..]).unwrap_or_default());
        let trust = agent.and_then(|agent| agent.client_trust.as_ref());
        let trust = trust.unwrap_or_else(|| trust_of(organisation, listener));
        judge(self.client_auth(&name.organisation).max(listener.client_auth), trust, &wanted, shown, now)
    }

    /// Judges what a principal has shown besides its key or token, at the time `now`. What its organisation wants of its agents
    /// is not wanted here.
    ///
    /// # Errors
    /// If the listener wants more.
    pub fn principal_certificate(
        &self,
        organisation: &OrganisationId,
        principal: &PrincipalId,
        listener: Listener<'_>,
        shown: Option<&PeerChain>,
        now: Timestamp,
    ) -> Result<Shown, Flaw> {
        let organisation_id = organisation;
        let organisation = self.organisations.get(organisation);
        let record = organisation.and_then(|organisation| organisation.principals.get(principal));
        let names = record.map(|record| &record.certificate_names[..]).unwrap_or_default();
        let wanted = Wanted::principal(organisation_id, principal, names);
        judge(listener.client_auth, trust_of(organisation, listener), &wanted, shown, now)
    }

    /// The principal whom a TLS certificate alone stands for, if it may use this agent at the time `now` from the address `from`,
    /// and what was good.
    ///
    /// # Errors
    /// If nobody asks for certificates, it is not good, it names no principal of the agent's organisation or several, or that one
    /// is not admitted for a reason of its own.
    pub fn admits_client_certificate(
        &self,
        agent: &AgentName,
        listener: Listener<'_>,
        shown: &PeerChain,
        from: IpAddr,
        now: Timestamp,
    ) -> Result<(PrincipalId, PeerCertificate), Refusal> {
        let organisation = self.organisation(&agent.organisation)?;
        if organisation.client_auth.max(listener.client_auth) == ClientAuth::Off {
            return Err(Refusal::ClientCertificate(Flaw::Missing));
        }
        let trust = trust_of(Some(organisation), listener);
        let certificate = trust.vouch(shown, now).map_err(Refusal::ClientCertificate)?;
        let mut named = organisation.principals.iter().filter(|(id, record)| {
            certificate.names.name(&Wanted::principal(&agent.organisation, id, &record.certificate_names))
        });
        let (Some((id, _)), None) = (named.next(), named.next()) else {
            return Err(Refusal::ClientCertificate(Flaw::OtherName));
        };
        self.admits_principal(agent, id, from, now)?;
        Ok((id.clone(), certificate))
    }

    /// Whether an organisation's agents show certificates.
    #[must_use]
    pub fn client_auth(&self, organisation: &OrganisationId) -> ClientAuth {
        self.organisations.get(organisation).map_or(ClientAuth::Off, |organisation| organisation.client_auth)
    }

    /// The strictest of what the organisations want.
    #[must_use]
    pub fn strictest_client_auth(&self) -> ClientAuth {
        self.organisations.values().map(|organisation| organisation.client_auth).max().unwrap_or_default()
    }

    /// All client CAs, whoever's.
    pub fn client_trusts(&self) -> impl Iterator<Item = (&OrganisationId, &Trust)> {
        self.organisations.iter().flat_map(|(id, organisation)| organisation.client_trusts().map(move |it| (id, it)))
    }
}

impl Organisation {
    /// Its client CAs, and its agents'.
    pub fn client_trusts(&self) -> impl Iterator<Item = &Trust> {
        std::iter::once(&self.client_trust).chain(self.agents.values().filter_map(|agent| agent.client_trust.as_ref()))
    }
}

/// The CAs of an organisation, or where it has none, of the listener.
fn trust_of<'a>(organisation: Option<&'a Organisation>, listener: Listener<'a>) -> &'a Trust {
    let own = organisation.map(|organisation| &organisation.client_trust).filter(|trust| !trust.is_empty());
    own.unwrap_or(listener.trust)
}

fn judge(
    mode: ClientAuth,
    trust: &Trust,
    wanted: &Wanted<'_>,
    shown: Option<&PeerChain>,
    now: Timestamp,
) -> Result<Shown, Flaw> {
    match (mode, shown) {
        (ClientAuth::Off, _) => Ok(Shown::Unasked),
        (ClientAuth::Loose, None) => Ok(Shown::Missing),
        (ClientAuth::Strict, None) => Err(Flaw::Missing),
        (ClientAuth::Loose | ClientAuth::Strict, Some(shown)) => trust.judge(shown, wanted, now).map(Shown::Good),
    }
}

#[cfg(test)]
mod tests;

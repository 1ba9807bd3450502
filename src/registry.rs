//! Who exists: organisations with their agents, principals and public keys, and what each principal is granted.
//!
//! A [`Snapshot`] is one state of all that, and answers from memory. Where it comes from is a [`Registry`]'s business;
//! [`file`] keeps it in folders.
//!
//! Promised: what is not registered is refused; a key counts only in the organisation, and for the agent or principal,
//! that it is registered for; expiry is judged at the moment of the question. A [`Refusal`] is the true reason and goes
//! into the audit: whoever was refused is told one and the same text for all of them.
//!
//! Absent: nothing here proves that the other side holds a key. Ask only after SSH has.

pub mod authority;
pub mod changes;
pub mod edit;
pub mod expiry;
pub mod file;
pub mod mutual;
pub mod token_keys;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::watch;

use crate::identity::certificate::Flaw;
use crate::identity::{AgentId, AgentName, Fingerprint, OrganisationId, Principal, PrincipalId, PublicKey};
use crate::network::{self, Networks};
use crate::policy::grant::{Grant, Pass};
use crate::policy::window::{Closed, Window};
use crate::policy::{Decision, Denial, Reason};
use crate::target::Target;
use crate::tls::{ClientAuth, Trust, judge};
use crate::token::TokenId;

pub use authority::Authority;
pub use token_keys::{TokenFlaw, TokenKey};

/// Where snapshots come from.
pub trait Registry: Send + Sync + 'static {
    /// The state that holds now.
    fn current(&self) -> Arc<Snapshot>;

    /// Tells of each new state, and of each moment at which an expiry of the present one takes effect: whoever lets
    /// something go on because of an answer asks again then.
    fn changed(&self) -> watch::Receiver<u64>;
}

/// One state of the registry. It does not change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    organisations: BTreeMap<OrganisationId, Organisation>,
    /// Every place where a key is registered.
    holders: HashMap<Fingerprint, Vec<Holder>>,
}

/// What one organisation owns.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Organisation {
    /// Its agents.
    pub agents: BTreeMap<AgentId, Agent>,
    /// Its principals.
    pub principals: BTreeMap<PrincipalId, PrincipalRecord>,
    /// The CAs that may certify its principals.
    pub authorities: Vec<Authority>,
    /// Whether its agents show TLS certificates of their own.
    pub client_auth: ClientAuth,
    /// The CAs of those, and of its principals'.
    pub client_trust: Trust,
    /// The keys that may sign tokens for its principals.
    pub token_keys: Vec<TokenKey>,
    /// Where all of them are accepted from; each may be narrowed further. `None` narrows nothing.
    pub accept_from: Option<Networks>,
}

/// A registered agent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Agent {
    /// A note for people.
    pub description: Option<String>,
    /// Where it is accepted from.
    pub accept_from: Option<Networks>,
    /// Its host keys: several while one replaces another. Without any the agent is known but cannot link.
    pub keys: Vec<RegisteredKey>,
    /// The CAs of its TLS certificates, in the place of the organisation's.
    pub client_trust: Option<Trust>,
    /// What its TLS certificates may be called, besides the agent's own name.
    pub certificate_names: Vec<String>,
}

/// A registered principal.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PrincipalRecord {
    /// What it may use.
    pub grant: Grant,
    /// From when on it may use anything.
    pub not_before: Option<Timestamp>,
    /// From when on it may use nothing.
    pub expires: Option<Timestamp>,
    /// Where it is accepted from. Who comes in by a loopback door comes from loopback.
    pub accept_from: Option<Networks>,
    /// Its keys. Without any only the gateway's own configuration, and who has a token, can act as this principal.
    pub keys: Vec<RegisteredKey>,
    /// What its TLS certificates may be called, besides the principal's own name.
    pub certificate_names: Vec<String>,
    /// Tokens in its name that count no more, whichever key has signed them.
    pub revoked_tokens: BTreeSet<TokenId>,
}

/// A public key with what is registered about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegisteredKey {
    /// The key.
    pub key: PublicKey,
    /// From when on it counts.
    pub not_before: Option<Timestamp>,
    /// From when on it does not count any more.
    pub expires: Option<Timestamp>,
    /// Whether it was withdrawn. A revoked key stays registered so that the audit can say what it was.
    pub revoked: bool,
    /// A note for people.
    pub comment: Option<String>,
}

/// Why the registry says no: for the audit, never for whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The key is registered nowhere.
    UnknownKey,
    /// The key is registered in this organisation, but for another agent or in another role.
    OtherHolder,
    /// The key is registered in other organisations only.
    OtherOrganisation,
    /// The key or its principal does not count yet.
    NotYetValid,
    /// The key or its principal has expired.
    Expired,
    /// The key was revoked.
    Revoked,
    /// There is no such organisation.
    UnknownOrganisation,
    /// There is no such agent.
    UnknownAgent,
    /// The principal has no grant for the agent.
    NotGranted,
    /// All would be well, but not from that address.
    SourceNetwork,
    /// What is wrong is the certificate.
    Certificate(Flaw),
    /// What is wrong is the TLS certificate.
    ClientCertificate(judge::Flaw),
    /// What is wrong is the token.
    Token(TokenFlaw),
}

impl Refusal {
    /// The word that the audit uses.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UnknownKey => "unknown_key",
            Self::OtherHolder => "other_holder",
            Self::OtherOrganisation => "other_organisation",
            Self::NotYetValid => "not_yet_valid",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::UnknownOrganisation => "unknown_organisation",
            Self::UnknownAgent => "unknown_agent",
            Self::NotGranted => "not_granted",
            Self::SourceNetwork => "source_network",
            Self::Certificate(flaw) => flaw.as_str(),
            Self::ClientCertificate(flaw) => flaw.as_str(),
            Self::Token(flaw) => flaw.as_str(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Snapshot {
    /// A state with these organisations.
    ///
    /// # Errors
    /// If a key is registered twice within one organisation: it could not be told then whose it is, or which expiry
    /// holds.
    pub fn new(organisations: BTreeMap<OrganisationId, Organisation>) -> Result<Self, DuplicateKey> {
        let mut holders: HashMap<Fingerprint, Vec<Holder>> = HashMap::new();
        for (id, organisation) in &organisations {
            for (role, key) in organisation.keys() {
                let fingerprint = key.key.fingerprint();
                let held = holders.entry(fingerprint).or_default();
                if let Some(first) = held.iter().find(|holder| holder.organisation == *id) {
                    let [first, second] = [first.role.to_string(), role.to_string()];
                    return Err(DuplicateKey { fingerprint, organisation: id.clone(), first, second });
                }
                held.push(Holder { organisation: id.clone(), role });
            }
        }
        Ok(Self { organisations, holders })
    }

    /// The organisations with all they own.
    #[must_use]
    pub fn organisations(&self) -> &BTreeMap<OrganisationId, Organisation> {
        &self.organisations
    }

    /// Whether this agent is registered, with whatever keys.
    #[must_use]
    pub fn has(&self, name: &AgentName) -> bool {
        self.organisation(&name.organisation).is_ok_and(|organisation| organisation.agents.contains_key(&name.agent))
    }

    /// Whether `key` is, at the time `now`, a host key of exactly this agent, which may link from the address `from`.
    ///
    /// # Errors
    /// If it is not, with the true reason.
    pub fn agent(&self, name: &AgentName, key: &Fingerprint, from: IpAddr, now: Timestamp) -> Result<(), Refusal> {
        let organisation = self.organisation(&name.organisation)?;
        let agent = organisation.agents.get(&name.agent).ok_or(Refusal::UnknownAgent)?;
        match self.role(&name.organisation, key)? {
            Role::Agent(id) if *id == name.agent => active(&agent.keys, key, now)?,
            _ => return Err(Refusal::OtherHolder),
        }
        organisation.accepts(agent.accept_from.as_ref(), from).then_some(()).ok_or(Refusal::SourceNetwork)
    }

    /// The principal of this organisation whom `key` stands for at the time `now`.
    ///
    /// # Errors
    /// If there is none, with the true reason.
    pub fn principal(
        &self,
        organisation: &OrganisationId,
        key: &Fingerprint,
        now: Timestamp,
    ) -> Result<PrincipalId, Refusal> {
        let principals = &self.organisation(organisation)?.principals;
        let Role::Principal(id) = self.role(organisation, key)? else { return Err(Refusal::OtherHolder) };
        let record = principals.get(id).ok_or(Refusal::UnknownKey)?;
        active(&record.keys, key, now)?;
        record.open(now)?;
        Ok(id.clone())
    }

    /// The principal whom `key` stands for, if it may use this agent at the time `now` from the address `from`.
    ///
    /// # Errors
    /// If the key stands for nobody, the agent is not registered, the grant does not name it, or the principal is not
    /// accepted from there. The last only if all else is well: in the trail it means a good key in a wrong place.
    pub fn admits(
        &self,
        agent: &AgentName,
        key: &Fingerprint,
        from: IpAddr,
        now: Timestamp,
    ) -> Result<PrincipalId, Refusal> {
        let id = self.principal(&agent.organisation, key, now)?;
        self.admits_principal(agent, &id, from, now)?;
        Ok(id)
    }

    /// Whether this principal may use this agent, however it has shown who it is.
    fn admits_principal(
        &self,
        agent: &AgentName,
        id: &PrincipalId,
        from: IpAddr,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        let organisation = self.organisation(&agent.organisation)?;
        let record = organisation.principals.get(id).ok_or(Refusal::NotGranted)?;
        record.open(now)?;
        if !organisation.agents.contains_key(&agent.agent) {
            return Err(Refusal::UnknownAgent);
        }
        if !record.grant.covers(&agent.agent) {
            return Err(Refusal::NotGranted);
        }
        organisation.accepts(record.accept_from.as_ref(), from).then_some(()).ok_or(Refusal::SourceNetwork)
    }

    /// Decides whether a principal of the agent's organisation may ask that agent for `target` at the time `now`, from the
    /// address `from`.
    ///
    /// The principal is the caller's word: who came with a key is first looked up with [`Snapshot::admits`], and again
    /// whenever the registry changes, because this does not know which key was shown.
    pub fn decide(
        &self,
        principal: &PrincipalId,
        agent: &AgentName,
        target: &Target,
        from: IpAddr,
        now: Timestamp,
    ) -> Decision<Pass> {
        let deny = |reason, detail: String| Decision::Deny(Denial::new(reason, detail));
        let Some(organisation) = self.organisations.get(&agent.organisation) else {
            return deny(Reason::NotRegistered, format!("no organisation {}", agent.organisation));
        };
        let Some(record) = organisation.principals.get(principal) else {
            return deny(Reason::NotRegistered, format!("no principal {principal} in {}", agent.organisation));
        };
        match record.window().at(now) {
            Ok(()) => {}
            Err(Closed::NotYet(from)) => {
                return deny(Reason::NotYetValid, format!("principal {principal} is registered from {from} on"));
            }
            Err(Closed::Expired(at)) => {
                return deny(Reason::PrincipalExpired, format!("principal {principal} expired at {at}"));
            }
        }
        if !organisation.agents.contains_key(&agent.agent) {
            return deny(Reason::NotRegistered, format!("no agent {agent}"));
        }
        if !organisation.accepts(record.accept_from.as_ref(), from) {
            return deny(Reason::SourceNetwork, format!("principal {principal} is not accepted from {from}"));
        }
        record.grant.decide(&Principal::Named(principal.clone()), agent, target)
    }

    /// Whether the validity of some key, principal or client CA begins or ends between two moments, the later one included; `since` is
    /// the later one if the clock has been set back.
    #[must_use]
    pub fn expires_within(&self, since: Timestamp, now: Timestamp) -> bool {
        self.organisations.values().any(|organisation| {
            let of_keys = organisation.keys().flat_map(|(_, key)| [key.not_before, key.expires]);
            let of_principals = organisation.principals.values().flat_map(|record| [record.not_before, record.expires]);
            let of_trusts = organisation.client_trusts().flat_map(|trust| trust.ends().map(|end| Some(end.at())));
            let edges = of_keys.chain(of_principals).chain(of_trusts).flatten();
            edges.into_iter().any(|at| since.min(now) < at && at <= since.max(now))
        })
    }

    fn organisation(&self, id: &OrganisationId) -> Result<&Organisation, Refusal> {
        self.organisations.get(id).ok_or(Refusal::UnknownOrganisation)
    }

    /// What `key` is registered as in this organisation.
    fn role(&self, organisation: &OrganisationId, key: &Fingerprint) -> Result<&Role, Refusal> {
        let holders = self.holders.get(key).ok_or(Refusal::UnknownKey)?;
        let holder = holders.iter().find(|holder| holder.organisation == *organisation);
        holder.map(|holder| &holder.role).ok_or(Refusal::OtherOrganisation)
    }
}

impl Organisation {
    /// Whether a member with this `accept_from` is accepted from the address: the organisation's holds as well.
    fn accepts(&self, of_member: Option<&Networks>, from: IpAddr) -> bool {
        network::admits(self.accept_from.as_ref(), from) && network::admits(of_member, from)
    }

    /// All keys, those that do not count too, with what each is registered as.
    pub fn keys(&self) -> impl Iterator<Item = (Role, &RegisteredKey)> {
        let agents =
            self.agents.iter().flat_map(|(id, agent)| agent.keys.iter().map(move |key| (Role::Agent(id.clone()), key)));
        let principals = self
            .principals
            .iter()
            .flat_map(|(id, record)| record.keys.iter().map(move |key| (Role::Principal(id.clone()), key)));
        let authorities = self.authorities.iter().map(|authority| (Role::Authority, &authority.registered));
        let token_keys = self.token_keys.iter().map(|key| (Role::TokenKey, &key.registered));
        agents.chain(principals).chain(authorities).chain(token_keys)
    }
}

impl PrincipalRecord {
    /// When it may use what it may use.
    #[must_use]
    pub fn window(&self) -> Window {
        Window { not_before: self.not_before, expires: self.expires }
    }

    fn open(&self, now: Timestamp) -> Result<(), Refusal> {
        self.window().at(now).map_err(|closed| match closed {
            Closed::NotYet(_) => Refusal::NotYetValid,
            Closed::Expired(_) => Refusal::Expired,
        })
    }
}

impl RegisteredKey {
    /// Whether the key is good at the time `now`.
    #[must_use]
    pub fn counts(&self, now: Timestamp) -> bool {
        !self.revoked && self.not_before.is_none_or(|from| from <= now) && !expired(self.expires, now)
    }
}

/// A key that is registered twice in one organisation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("key {fingerprint} is registered twice in {organisation}: for {first} and for {second}")]
pub struct DuplicateKey {
    fingerprint: Fingerprint,
    organisation: OrganisationId,
    first: String,
    second: String,
}

/// Where a key is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holder {
    organisation: OrganisationId,
    role: Role,
}

/// What a key is registered as.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A host key of this agent.
    Agent(AgentId),
    /// A key of this principal.
    Principal(PrincipalId),
    /// A certificate authority.
    Authority,
    /// A key that signs tokens.
    TokenKey,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(id) => write!(f, "agent {id}"),
            Self::Principal(id) => write!(f, "principal {id}"),
            Self::Authority => f.write_str("a user CA"),
            Self::TokenKey => f.write_str("tokens"),
        }
    }
}

/// Whether the key with this fingerprint counts at the time `now`.
fn active(keys: &[RegisteredKey], fingerprint: &Fingerprint, now: Timestamp) -> Result<(), Refusal> {
    let registered = keys.iter().find(|registered| registered.key.fingerprint() == *fingerprint);
    match registered.ok_or(Refusal::UnknownKey)? {
        registered if registered.revoked => Err(Refusal::Revoked),
        registered if registered.not_before.is_some_and(|from| now < from) => Err(Refusal::NotYetValid),
        registered if expired(registered.expires, now) => Err(Refusal::Expired),
        _ => Ok(()),
    }
}

/// Good before that moment, expired from then on.
fn expired(expires: Option<Timestamp>, now: Timestamp) -> bool {
    expires.is_some_and(|expires| expires <= now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Algorithm, PrivateKey};

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn key() -> PublicKey {
        PrivateKey::generate(Algorithm::Ed25519).public()
    }

    fn good(key: &PublicKey) -> RegisteredKey {
        RegisteredKey { key: key.clone(), not_before: None, expires: None, revoked: false, comment: None }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().expect(text)
    }

    fn id<T: std::str::FromStr<Err: fmt::Debug>>(text: &str) -> T {
        text.parse().expect(text)
    }

    struct World {
        snapshot: Snapshot,
        eu: PublicKey,
        us: PublicKey,
        revoked: PublicKey,
        expiring: PublicKey,
        ci: PublicKey,
        ci_expiring: PublicKey,
        leaver: PublicKey,
        other: PublicKey,
        shared: PublicKey,
    }

    fn world() -> World {
        let [eu, us, revoked, expiring, ci, ci_expiring, leaver, other, shared] = std::array::from_fn(|_| key());
        let expires = Some(at("2027-01-01T00:00:00Z"));
        let grant = |agents: &[&str], targets: Option<&[&str]>| Grant {
            agents: agents.iter().map(|text| id(text)).collect(),
            targets: targets.map(|all| all.iter().map(|text| id(text)).collect()),
        };
        let acme = Organisation {
            authorities: Vec::new(),
            agents: [
                (
                    id("prod-eu"),
                    Agent {
                        keys: vec![
                            good(&eu),
                            RegisteredKey { revoked: true, ..good(&revoked) },
                            RegisteredKey { expires, ..good(&expiring) },
                        ],
                        ..Agent::default()
                    },
                ),
                (id("prod-us"), Agent { keys: vec![good(&us)], ..Agent::default() }),
                (id("test"), Agent::default()),
            ]
            .into(),
            principals: [
                (
                    id("ci"),
                    PrincipalRecord {
                        grant: grant(&["prod-*", "gone"], Some(&["db:5432"])),
                        keys: vec![good(&ci), RegisteredKey { expires, ..good(&ci_expiring) }, good(&shared)],
                        ..PrincipalRecord::default()
                    },
                ),
                (
                    id("leaver"),
                    PrincipalRecord {
                        grant: grant(&["*"], None),
                        not_before: Some(at("2026-01-01T00:00:00Z")),
                        expires,
                        keys: vec![good(&leaver)],
                        ..PrincipalRecord::default()
                    },
                ),
                (id("nobody"), PrincipalRecord::default()),
            ]
            .into(),
            ..Organisation::default()
        };
        let globex = Organisation {
            authorities: Vec::new(),
            agents: [(id("prod-eu"), Agent { keys: vec![good(&other)], ..Agent::default() })].into(),
            principals: [(
                id("visitor"),
                PrincipalRecord { grant: grant(&["*"], None), keys: vec![good(&shared)], ..PrincipalRecord::default() },
            )]
            .into(),
            ..Organisation::default()
        };
        let snapshot =
            Snapshot::new([(id("acme"), acme), (id("globex"), globex)].into()).expect("no key is there twice");
        World { snapshot, eu, us, revoked, expiring, ci, ci_expiring, leaver, other, shared }
    }

    #[test]
    fn refuses_agents_with_the_true_reason() {
        let world = world();
        let before = at("2026-12-31T23:59:59Z");
        let after = at("2027-01-01T00:00:00Z");
        for (case, name, key, now, refusal) in [
            ("organisation", "initech/prod-eu", &world.eu, before, Refusal::UnknownOrganisation),
            ("agent", "acme/prod-asia", &world.eu, before, Refusal::UnknownAgent),
            ("key of nobody", "acme/prod-eu", &key(), before, Refusal::UnknownKey),
            ("key of another agent", "acme/prod-eu", &world.us, before, Refusal::OtherHolder),
            ("key of a principal", "acme/prod-eu", &world.ci, before, Refusal::OtherHolder),
            ("agent without keys", "acme/test", &world.eu, before, Refusal::OtherHolder),
            ("same id in another organisation", "acme/prod-eu", &world.other, before, Refusal::OtherOrganisation),
            ("the other way round", "globex/prod-eu", &world.eu, before, Refusal::OtherOrganisation),
            ("revoked", "acme/prod-eu", &world.revoked, before, Refusal::Revoked),
            ("expired", "acme/prod-eu", &world.expiring, after, Refusal::Expired),
        ] {
            let answer = world.snapshot.agent(&id(name), &key.fingerprint(), HERE, now);
            assert_eq!(answer, Err(refusal), "{case}");
        }
    }

    #[test]
    fn knows_agents_by_each_of_their_keys() {
        let world = world();
        for key in [&world.eu, &world.expiring] {
            let answer =
                world.snapshot.agent(&id("acme/prod-eu"), &key.fingerprint(), HERE, at("2026-12-31T23:59:59Z"));
            assert_eq!(answer, Ok(()));
        }
    }

    #[test]
    fn refuses_principals_with_the_true_reason() {
        let world = world();
        let early = at("2025-12-31T23:59:59Z");
        let before = at("2026-12-31T23:59:59Z");
        let after = at("2027-01-01T00:00:00Z");
        for (case, name, key, now, refusal) in [
            ("organisation", "initech/prod-eu", &world.ci, before, Refusal::UnknownOrganisation),
            ("key of nobody", "acme/prod-eu", &key(), before, Refusal::UnknownKey),
            ("key of an agent", "acme/prod-eu", &world.eu, before, Refusal::OtherHolder),
            ("key of another organisation", "globex/prod-eu", &world.ci, before, Refusal::OtherOrganisation),
            ("expired key", "acme/prod-eu", &world.ci_expiring, after, Refusal::Expired),
            ("expired principal", "acme/prod-eu", &world.leaver, after, Refusal::Expired),
            ("principal before its time", "acme/prod-eu", &world.leaver, early, Refusal::NotYetValid),
            ("agent that is not there", "acme/prod-asia", &world.ci, before, Refusal::UnknownAgent),
            ("granted agent that is not there", "acme/gone", &world.ci, before, Refusal::UnknownAgent),
            ("agent that is not granted", "acme/test", &world.ci, before, Refusal::NotGranted),
        ] {
            let answer = world.snapshot.admits(&id(name), &key.fingerprint(), HERE, now);
            assert_eq!(answer, Err(refusal), "{case}");
        }
    }

    #[test]
    fn every_network_that_is_written_must_hold() {
        let mut world = world();
        let now = at("2026-12-01T00:00:00Z");
        let networks = |texts: &[&str]| Networks::new(texts.iter().map(|text| id(text)).collect());
        let acme = world.snapshot.organisations.get_mut(&id::<OrganisationId>("acme")).expect("acme");
        acme.accept_from = networks(&["10.0.0.0/8", "2001:db8::/32"]);
        acme.agents.get_mut(&id::<AgentId>("prod-eu")).expect("an agent").accept_from = networks(&["10.1.0.0/16"]);
        let ci = acme.principals.get_mut(&id::<PrincipalId>("ci")).expect("a principal");
        ci.accept_from = networks(&["10.2.0.0/16", "192.0.2.0/24"]);
        for (case, from, agent, principal, without_own) in [
            ("the organisation's alone", "10.3.0.1", false, false, true),
            ("the agent's too", "10.1.0.1", true, false, true),
            ("the principal's too", "10.2.0.1", false, true, true),
            ("mapped", "::ffff:10.2.0.1", false, true, true),
            ("the principal's alone", "192.0.2.1", false, false, false),
            ("IPv6", "2001:db8::1", false, false, true),
            ("none", "203.0.113.1", false, false, false),
        ] {
            let (snapshot, from) = (&world.snapshot, id(from));
            let of = |allowed| if allowed { None } else { Some(Refusal::SourceNetwork) };
            let name = id("acme/prod-eu");
            assert_eq!(snapshot.agent(&name, &world.eu.fingerprint(), from, now).err(), of(agent), "{case}");
            assert_eq!(snapshot.admits(&name, &world.ci.fingerprint(), from, now).err(), of(principal), "{case}");
            assert_eq!(snapshot.admits(&name, &world.leaver.fingerprint(), from, now).err(), of(without_own), "{case}");
            let denial = snapshot.decide(&id("ci"), &name, &id("db:5432"), from, now).into_result().err();
            assert_eq!(denial.map(|denial| denial.reason), (!principal).then_some(Reason::SourceNetwork), "{case}");
            // Another organisation knows nothing of it.
            assert_eq!(snapshot.agent(&id("globex/prod-eu"), &world.other.fingerprint(), from, now), Ok(()), "{case}");
        }
        // Whatever else is wrong is said first.
        let elsewhere = id("203.0.113.1");
        let revoked = world.snapshot.agent(&id("acme/prod-eu"), &world.revoked.fingerprint(), elsewhere, now);
        assert_eq!(revoked, Err(Refusal::Revoked));
        let other = world.snapshot.admits(&id("acme/test"), &world.ci.fingerprint(), elsewhere, now);
        assert_eq!(other, Err(Refusal::NotGranted));
    }

    #[test]
    fn a_key_in_two_organisations_is_who_it_is_in_each() {
        let world = world();
        let now = at("2026-12-01T00:00:00Z");
        let key = world.shared.fingerprint();
        assert_eq!(world.snapshot.admits(&id("acme/prod-eu"), &key, HERE, now), Ok(id("ci")));
        assert_eq!(world.snapshot.admits(&id("globex/prod-eu"), &key, HERE, now), Ok(id("visitor")));
        assert_eq!(world.snapshot.principal(&id("globex"), &key, now), Ok(id("visitor")));
    }

    #[test]
    fn decisions_ask_who_exists_before_what_is_granted() {
        let world = world();
        let early = at("2025-12-31T23:59:59Z");
        let before = at("2026-12-31T23:59:59Z");
        let after = at("2027-01-01T00:00:00Z");
        for (case, principal, agent, target, now, reason) in [
            ("organisation", "ci", "initech/prod-eu", "db:5432", before, Reason::NotRegistered),
            ("principal", "visitor", "acme/prod-eu", "db:5432", before, Reason::NotRegistered),
            ("agent", "ci", "acme/gone", "db:5432", before, Reason::NotRegistered),
            ("expired", "leaver", "acme/prod-eu", "db:5432", after, Reason::PrincipalExpired),
            ("before its time", "leaver", "acme/prod-eu", "db:5432", early, Reason::NotYetValid),
            ("no grant at all", "nobody", "acme/prod-eu", "db:5432", before, Reason::AgentNotGranted),
            ("other agent", "ci", "acme/test", "db:5432", before, Reason::AgentNotGranted),
            ("other target", "ci", "acme/prod-eu", "db:22", before, Reason::TargetNotGranted),
        ] {
            let denial = world.snapshot.decide(&id(principal), &id(agent), &id(target), HERE, now).into_result();
            assert_eq!(denial.expect_err(case).reason, reason, "{case}");
        }
        let pass = world.snapshot.decide(&id("ci"), &id("acme/prod-eu"), &id("db:5432"), HERE, before).into_result();
        assert_eq!(pass.expect("allowed").agent(), &id::<AgentName>("acme/prod-eu"));
        let pass = world.snapshot.decide(&id("leaver"), &id("acme/test"), &id("any:1"), HERE, before);
        assert!(pass.into_result().is_ok());
    }

    #[test]
    fn an_empty_registry_refuses_everybody() {
        let snapshot = Snapshot::default();
        let now = Timestamp::UNIX_EPOCH;
        let key = key().fingerprint();
        assert_eq!(snapshot.agent(&id("acme/prod-eu"), &key, HERE, now), Err(Refusal::UnknownOrganisation));
        assert_eq!(snapshot.admits(&id("acme/prod-eu"), &key, HERE, now), Err(Refusal::UnknownOrganisation));
        assert!(snapshot.decide(&id("ci"), &id("acme/prod-eu"), &id("db:1"), HERE, now).into_result().is_err());
    }

    #[test]
    fn refuses_a_key_twice_in_one_organisation() {
        let key = key();
        let agent = Agent { keys: vec![good(&key)], ..Agent::default() };
        let record = PrincipalRecord { keys: vec![good(&key)], ..PrincipalRecord::default() };
        for organisation in [
            Organisation {
                authorities: Vec::new(),
                agents: [(id("a"), agent.clone()), (id("b"), agent.clone())].into(),
                ..Organisation::default()
            },
            Organisation {
                authorities: Vec::new(),
                principals: [(id("a"), record.clone()), (id("b"), record.clone())].into(),
                ..Organisation::default()
            },
            Organisation {
                authorities: Vec::new(),
                agents: [(id("a"), agent)].into(),
                principals: [(id("b"), record)].into(),
                ..Organisation::default()
            },
            Organisation {
                authorities: Vec::new(),
                agents: [(id("a"), Agent { keys: vec![good(&key), good(&key)], ..Agent::default() })].into(),
                ..Organisation::default()
            },
        ] {
            assert!(Snapshot::new([(id("acme"), organisation)].into()).is_err());
        }
    }

    #[test]
    fn knows_when_a_validity_begins_or_ends() {
        let snapshot = world().snapshot;
        let (earlier, begin) = (at("2025-12-31T23:59:59Z"), at("2026-01-01T00:00:00Z"));
        assert!(snapshot.expires_within(earlier, begin));
        assert!(snapshot.expires_within(begin, earlier), "the clock was set back");
        let [early, before, moment, after] =
            ["2026-01-01T00:00:00Z", "2026-12-31T23:59:59Z", "2027-01-01T00:00:00Z", "2027-01-01T00:00:01Z"].map(at);
        assert!(!snapshot.expires_within(early, before));
        assert!(snapshot.expires_within(before, moment));
        assert!(snapshot.expires_within(before, after));
        assert!(!snapshot.expires_within(moment, after));
    }
}

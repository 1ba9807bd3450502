//! What a gateway goes by and a reload replaces; and what differs from one configuration to the next.
//!
//! Promised: pure functions, no I/O, no waiting.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use jiff::Timestamp;

use super::{Config, Limits, Listener, Local};
use crate::identity::{Certificate, Credential, OrganisationId, PrivateKey};
use crate::network;
use crate::registry::expiry::Stage;
use crate::registry::mutual;
use crate::reload::Changes;
use crate::tls::{Certificates, Trust};
use crate::tunnel::admit::penalty::Terms;

/// What holds now. It does not change.
pub(super) struct State {
    /// The SSH door's host key, for sessions that begin.
    pub(super) host_key: PrivateKey,
    /// How much anybody may have.
    pub(super) limits: Limits,
    penalties: Terms,
    /// The main listeners; each has one place in the list for good.
    listeners: Vec<Listener>,
    /// What clients of TLS are shown.
    pub(super) certificates: Option<Certificates>,
    /// A certificate for it.
    host_certificate: Option<Certificate>,
    logins: HashMap<OrganisationId, Login>,
    /// How long forwards that run may go on after the signal to end.
    pub(super) drain: Duration,
}

/// How an organisation's agents are logged in to.
pub(super) struct Login {
    pub(super) key: PrivateKey,
    certificate: Option<Certificate>,
}

impl Login {
    /// The certificate, while its time lasts: before and after, the key may do.
    pub(super) fn certificate(&self, now: Timestamp) -> Option<&Certificate> {
        self.certificate.as_ref().filter(|certificate| certificate.judge_time(now).is_ok())
    }

    /// What is shown first.
    pub(super) fn credential(&self, now: Timestamp) -> Credential {
        match self.certificate(now) {
            Some(certificate) => Credential::Certificate(certificate.clone()),
            None => Credential::Key(self.key.public().fingerprint()),
        }
    }
}

impl State {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            host_key: config.host_key.clone(),
            drain: config.drain,
            limits: config.limits,
            penalties: config.penalties.clone(),
            listeners: config.listen.clone(),
            certificates: config.certificates.clone(),
            host_certificate: config.host_certificate.clone(),
            logins: config
                .organisations
                .iter()
                .map(|organisation| {
                    let (key, certificate) = (organisation.login_key.clone(), organisation.login_certificate.clone());
                    (organisation.id.clone(), Login { key, certificate })
                })
                .collect(),
        }
    }

    /// Whether an organisation's agents are served.
    pub(super) fn serves(&self, organisation: &OrganisationId) -> bool {
        self.logins.contains_key(organisation)
    }

    /// What holds at a main listener.
    pub(super) fn listener(&self, index: usize) -> Option<&Listener> {
        self.listeners.get(index)
    }

    /// What a main listener wants of clients' certificates.
    pub(super) fn mutual(&self, index: usize) -> Option<mutual::Listener<'_>> {
        let Listener { client_auth, client_trust, .. } = self.listener(index)?;
        Some(mutual::Listener { client_auth: *client_auth, trust: client_trust })
    }

    /// The client CAs of the main listeners.
    pub(super) fn client_trusts(&self) -> impl Iterator<Item = (SocketAddr, &Trust)> {
        self.listeners.iter().map(|listener| (listener.address, &listener.client_trust))
    }

    /// Whether a main listener accepts connections from an address.
    pub(super) fn accepts(&self, listener: usize, from: IpAddr) -> bool {
        self.listener(listener).is_some_and(|listener| network::admits(listener.accept_from.as_ref(), from))
    }

    /// Whether who came in by a main listener from an address, and showed this, could do so now.
    pub(super) fn takes(&self, listener: usize, from: IpAddr, shown: &Credential) -> bool {
        let certified = shown.certificate().is_some();
        self.accepts(listener, from)
            && (!certified || self.listener(listener).is_some_and(|listener| listener.certificates))
    }

    /// Whether an address is a balancer's before a main listener.
    pub(super) fn is_balancer(&self, listener: usize, address: IpAddr) -> bool {
        let balancers = self.listener(listener).and_then(|listener| listener.balancers.as_ref());
        balancers.is_some_and(|balancers| balancers.contain(address))
    }

    /// Whether an address is that of a balancer before a main listener that has ended TLS.
    pub(super) fn is_terminator(&self, listener: usize, address: IpAddr) -> bool {
        let terminators = self.listener(listener).and_then(|listener| listener.terminators.as_ref());
        terminators.is_some_and(|terminators| terminators.contain(address))
    }

    /// Whether faults are held against an address. Never against a balancer's, which is everybody's.
    pub(super) fn blames(&self, address: IpAddr) -> bool {
        let named = |listener: &Listener| {
            let balancers = [&listener.balancers, &listener.terminators];
            balancers.into_iter().flatten().any(|known| known.contain(address))
        };
        self.penalties.hold(address) && !self.listeners.iter().any(named)
    }

    /// How an organisation's agents are logged in to.
    pub(super) fn login(&self, organisation: &OrganisationId) -> Option<&Login> {
        self.logins.get(organisation)
    }

    /// The certificate of the SSH door's host key, while its time lasts: else a client that asks for one takes the key.
    pub(super) fn host_certificate(&self, now: Timestamp) -> Option<&Certificate> {
        self.host_certificate.as_ref().filter(|certificate| certificate.judge_time(now).is_ok())
    }

    /// The gateway's own certificates, with their names: OpenSSH's, and those of TLS.
    fn own_certificates(&self) -> impl Iterator<Item = Own> {
        let ssh = |what: String, certificate: &Certificate| Own {
            what,
            kind: Shown::Ssh,
            begins: certificate.begins(),
            expires: certificate.expires(),
        };
        let host = self.host_certificate.as_ref().map(|certificate| ssh("host_certificate".to_owned(), certificate));
        let logins = self.logins.iter().filter_map(move |(id, login)| {
            login.certificate.as_ref().map(|certificate| ssh(format!("login_certificate of {id}"), certificate))
        });
        let tls = self.certificates.iter().flat_map(Certificates::identities).map(|identity| Own {
            what: format!("[[certificate]] {}", identity.fingerprint()),
            kind: Shown::Tls,
            begins: identity.begins(),
            expires: identity.ends(),
        });
        host.into_iter().chain(logins).chain(tls)
    }

    /// When the first of the gateway's own certificates of each kind ends.
    pub(super) fn first_endings(&self) -> Vec<(&'static str, Timestamp)> {
        [("ssh", Shown::Ssh), ("tls_server", Shown::Tls)]
            .into_iter()
            .filter_map(|(name, kind)| {
                let ends =
                    self.own_certificates().filter(|own| own.kind == kind).filter_map(|own| own.expires).min()?;
                Some((name, ends))
            })
            .collect()
    }

    /// Which of the gateway's own certificates do not count, or end soon.
    pub(super) fn certificate_warnings(&self, now: Timestamp) -> Vec<Warning> {
        let warned = |own: Own| {
            if let Some(begins) = own.begins.filter(|begins| *begins > now) {
                return Some(Warning { what: own.what, kind: own.kind, at: begins, stage: None });
            }
            let expires = own.expires?;
            Some(Warning { what: own.what, kind: own.kind, at: expires, stage: Some(Stage::of(expires, now)?) })
        };
        let mut warnings: Vec<_> = self.own_certificates().filter_map(warned).collect();
        warnings.sort_by(|one, other| one.what.cmp(&other.what));
        warnings
    }

    /// When those change next, after `now`, if nothing else does.
    pub(super) fn next_certificate_warning(&self, now: Timestamp) -> Option<Timestamp> {
        let next = |own: Own| {
            let begins = own.begins.filter(|begins| *begins > now);
            [begins, own.expires.and_then(|expires| Stage::next(expires, now))].into_iter().flatten().min()
        };
        self.own_certificates().filter_map(next).min()
    }
}

/// One of the gateway's own certificates.
struct Own {
    what: String,
    kind: Shown,
    begins: Option<Timestamp>,
    expires: Option<Timestamp>,
}

/// What a certificate is shown in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    /// Where its time is not now, the plain key is shown in its place.
    Ssh,
    /// Where nothing can take its place.
    Tls,
}

/// What is to be said of one of the gateway's own certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    what: String,
    kind: Shown,
    /// Its end, or where that is what is wrong, its beginning.
    at: Timestamp,
    /// How near its end is; `None` before its beginning.
    stage: Option<Stage>,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, kind, at, stage } = self;
        match stage {
            None if *kind == Shown::Tls => {
                write!(f, "{what} is not valid before {at}, and until then clients refuse it: look at the clock")
            }
            Some(Stage::Expired) if *kind == Shown::Tls => {
                write!(f, "{what} has expired at {at}, and clients refuse it: put a new one in its place")
            }
            None => {
                write!(f, "{what} is not valid before {at}, and until then the plain key is used: look at the clock")
            }
            Some(Stage::Expired) => {
                write!(f, "{what} has expired at {at}, and the plain key is used in its place: have it signed anew")
            }
            Some(Stage::Week | Stage::Month) => write!(f, "{what} expires at {at}: have it signed anew"),
        }
    }
}

/// What differs between two configurations, by ids.
pub(super) fn changes(old: &Config, new: &Config) -> Changes {
    let mut changes = Changes::default();
    let organisations = |config: &Config| -> BTreeMap<_, _> {
        config
            .organisations
            .iter()
            .map(|organisation| {
                let login = (organisation.login_key.public(), organisation.login_certificate.clone());
                (organisation.id.clone(), login)
            })
            .collect()
    };
    // The login is all there is to an organisation here.
    changes.compare("organisation ", &organisations(old), &organisations(new));
    let key = new.host_key.public();
    if old.host_key.public() != key {
        changes.change(format_args!("host_key {}", key.fingerprint()));
    }
    for (old, new) in old.listen.iter().zip(&new.listen) {
        if old != new {
            changes.change(format_args!("listener {}", new.address));
        }
    }
    if old.host_certificate != new.host_certificate {
        changes.change("host_certificate");
    }
    if old.certificates != new.certificates {
        changes.change("certificates");
    }
    if old.drain != new.drain {
        changes.change("drain_s");
    }
    if old.penalties != new.penalties {
        changes.change("penalties");
    }
    if old.limits != new.limits {
        changes.change("limits");
    }
    changes
}

/// Settings of `new` that a running gateway cannot take over; they are put back to what they were.
pub(super) fn keep(old: &Config, new: &mut Config) -> Vec<&'static str> {
    let mut kept = Vec::new();
    let addresses = |config: &Config| -> Vec<_> { config.listen.iter().map(|listener| listener.address).collect() };
    if addresses(new) != addresses(old) {
        kept.push("gateway.listen");
        // What is said of those that stay holds all the same: a network that was taken out is out.
        let said = |listener: &Listener| new.listen.iter().find(|new| new.address == listener.address).cloned();
        new.listen = old.listen.iter().map(|listener| said(listener).unwrap_or_else(|| listener.clone())).collect();
    }
    if new.registry != old.registry {
        kept.push("gateway.registry");
        new.registry.clone_from(&old.registry);
    }
    if new.admin_socket != old.admin_socket {
        kept.push("gateway.admin_socket");
        new.admin_socket.clone_from(&old.admin_socket);
    }
    if new.audit != old.audit {
        kept.push("audit");
        new.audit = old.audit.clone();
    }
    if new.health != old.health {
        kept.extend(old.health.differences(&new.health));
        new.health = old.health.clone();
    }
    kept
}

/// What becomes of the loopback doors. Running ones are named by their place in the list.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct DoorPlan {
    /// Stay as they are.
    pub(super) stay: Vec<usize>,
    /// Go on listening, and lead elsewhere from now on.
    pub(super) change: Vec<(usize, Local)>,
    /// Have to be made.
    pub(super) open: Vec<Local>,
    /// Are closed.
    pub(super) close: Vec<usize>,
}

impl DoorPlan {
    /// Notes what becomes of the doors.
    pub(super) fn tell(&self, running: &[(SocketAddr, &Local)], changes: &mut Changes) {
        for index in &self.close {
            changes.remove(format_args!("door {}", running[*index].0));
        }
        for (index, _) in &self.change {
            changes.change(format_args!("door {}", running[*index].0));
        }
        for local in &self.open {
            changes.add(format_args!("door {}", local.listen));
        }
    }
}

/// Fits the doors that run, each with where it really listens, to those that are wanted.
pub(super) fn fit_doors(running: &[(SocketAddr, &Local)], wanted: &[Local]) -> DoorPlan {
    let mut plan = DoorPlan::default();
    let mut free: Vec<usize> = (0..running.len()).collect();
    let mut take = |fits: &dyn Fn(SocketAddr, &Local) -> bool| -> Option<usize> {
        let at = free.iter().position(|&index| fits(running[index].0, running[index].1))?;
        Some(free.remove(at))
    };
    // A door that was made at whichever port was free is the same whether that is still said, or which port it was; who
    // names the port comes first.
    let (any, named): (Vec<_>, Vec<_>) = wanted.iter().partition(|local| local.listen.port() == 0);
    let mut left = Vec::new();
    for local in named.into_iter().chain(any) {
        let same =
            |bound: SocketAddr, other: &Local| other == local || Local { listen: bound, ..other.clone() } == *local;
        match take(&same) {
            Some(index) => plan.stay.push(index),
            None => left.push(local),
        }
    }
    for local in left {
        match take(&|bound, _| bound == local.listen) {
            Some(index) => plan.change.push((index, local.clone())),
            None => plan.open.push(local.clone()),
        }
    }
    plan.close = free;
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(listen: &str, target: &str) -> Local {
        Local {
            listen: listen.parse().expect(listen),
            agent: "acme/prod".parse().expect("a name"),
            target: target.parse().expect(target),
            principal: "provisioner".parse().expect("an id"),
        }
    }

    fn plan(running: &[(&str, &Local)], wanted: &[Local]) -> DoorPlan {
        let running: Vec<_> = running.iter().map(|(bound, local)| (bound.parse().expect(bound), *local)).collect();
        fit_doors(&running, wanted)
    }

    #[test]
    fn doors_are_fitted_by_where_they_listen() {
        let (one, two) = ("127.0.0.1:1", "127.0.0.1:2");
        let (a, b) = (local(one, "a:1"), local(two, "b:1"));
        let running = [(one, &a), (two, &b)];
        assert_eq!(plan(&running, &[b.clone(), a.clone()]), DoorPlan { stay: vec![1, 0], ..DoorPlan::default() });
        assert_eq!(plan(&running, &[]), DoorPlan { close: vec![0, 1], ..DoorPlan::default() });
        assert_eq!(
            plan(&running, &[a.clone(), local("127.0.0.1:3", "b:1")]),
            DoorPlan { stay: vec![0], open: vec![local("127.0.0.1:3", "b:1")], close: vec![1], ..DoorPlan::default() }
        );
        // Two that change places go on listening.
        let swapped = [local(one, "b:1"), local(two, "a:1")];
        let change = vec![(0, swapped[0].clone()), (1, swapped[1].clone())];
        assert_eq!(plan(&running, &swapped), DoorPlan { change, ..DoorPlan::default() });
    }

    #[test]
    fn doors_at_any_port_are_fitted_by_what_they_are() {
        let any = local("127.0.0.1:0", "a:1");
        let running = [("127.0.0.1:7001", &any), ("127.0.0.1:7002", &any)];
        let stay = |indices: &[usize], close: &[usize]| DoorPlan {
            stay: indices.to_vec(),
            close: close.to_vec(),
            ..DoorPlan::default()
        };
        assert_eq!(plan(&running, &[any.clone(), any.clone()]), stay(&[0, 1], &[]));
        assert_eq!(plan(&running, std::slice::from_ref(&any)), stay(&[0], &[1]));
        assert_eq!(plan(&running, &[local("127.0.0.1:7002", "a:1")]), stay(&[1], &[0]));
        assert_eq!(plan(&running, &[any.clone(), local("127.0.0.1:7001", "a:1")]), stay(&[0, 1], &[]));
        let elsewhere = local("127.0.0.1:7002", "b:1");
        assert_eq!(
            plan(&running, std::slice::from_ref(&elsewhere)),
            DoorPlan { change: vec![(1, elsewhere)], close: vec![0], ..DoorPlan::default() }
        );
        let other = local("127.0.0.1:0", "b:1");
        assert_eq!(
            plan(&running, std::slice::from_ref(&other)),
            DoorPlan { open: vec![other], close: vec![0, 1], ..DoorPlan::default() }
        );
    }
}

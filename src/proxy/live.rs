//! What the proxy goes by, and its decisions.
//!
//! Promised: decisions are pure, and yield a [`Pass`] that nothing else makes; who runs asks again whenever the state is
//! another one.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::{Config, Limits, Listener, Mode, Upstream};
use crate::reload::Changes;
use crate::target::{Target, TargetError};
use crate::tls::judge::{self, Flaw};
use crate::tls::{self, Acceptor, ClientAuth, ClientPolicy, Identity, PeerChain};
use crate::tunnel::connect::Egress;

/// A listener that there is, whatever the configuration says of it at the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Slot(pub(super) u64);

/// What a configuration says, as it is asked.
#[derive(Debug, Default)]
pub(super) struct State {
    listeners: HashMap<Slot, Arc<Listener>>,
    acceptors: HashMap<Slot, Acceptor>,
    upstreams: HashMap<String, Arc<Upstream>>,
    egress: Egress,
    limits: Limits,
    drain: Duration,
}

/// Who has come in, and where.
#[derive(Debug, Clone)]
pub(super) struct Guest {
    pub(super) slot: Slot,
    /// The mode of the listener when he came: it counts only while it is that.
    pub(super) mode: &'static str,
    pub(super) address: IpAddr,
    /// What he has shown of himself, where he was asked to.
    pub(super) chain: Option<PeerChain>,
}

/// Where somebody wants to go.
#[derive(Debug, Clone)]
pub(super) enum Wanted {
    /// To the one upstream that the listener leads to.
    TheOne,
    /// To what has been asked for.
    Named(Result<Target, TargetError>),
}

/// That somebody may go to an upstream; dialling it consumes this.
#[derive(Debug)]
#[must_use]
pub(super) struct Pass {
    upstream: Arc<Upstream>,
    egress: Egress,
}

/// Why somebody may not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Denial {
    /// In one word, for the trail.
    pub(super) reason: &'static str,
    /// More about it, for the trail.
    pub(super) detail: String,
}

impl Denial {
    /// The reason of [`Denial::leaving`].
    pub(super) const LEAVING: &str = "draining";

    /// Nothing new is taken on.
    pub(super) fn leaving() -> Self {
        Self { reason: Self::LEAVING, detail: "the proxy goes away".to_owned() }
    }
}

impl Pass {
    pub(super) fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// What is needed to dial, at the cost of the permission.
    pub(super) fn spend(self) -> (Arc<Upstream>, Egress) {
        (self.upstream, self.egress)
    }
}

impl State {
    /// What `config` says, with these for its listeners.
    pub(super) fn new(config: &Config, slots: &[Slot]) -> Self {
        let listeners = config.listeners.iter().cloned().map(Arc::new);
        let acceptors = slots.iter().zip(&config.listeners).filter_map(|(slot, listener)| {
            let tls = listener.tls.as_ref()?;
            // Whether it is a client of ours is judged afterwards, and again for as long as he is there.
            let clients = match tls.client_auth {
                ClientAuth::Off => ClientPolicy::Off,
                ClientAuth::Loose => ClientPolicy::Ask,
                ClientAuth::Strict => {
                    let trust = tls.client_trust.clone();
                    ClientPolicy::Require(judge::gate(move |chain| trust.vouch(chain, Timestamp::now()).map(drop)))
                }
            };
            let acceptor = Acceptor::new(tls.certificates.clone(), clients);
            // The other modes read HTTP themselves. Whoever can do without HTTP/2 gets what he always got.
            let passed_on = matches!(listener.mode, Mode::Mutual(_));
            Some((*slot, if passed_on { acceptor.at_last(tls::ALPN_HTTP2) } else { acceptor }))
        });
        let upstreams = config.upstreams.iter().map(|upstream| (upstream.name.clone(), Arc::new(upstream.clone())));
        Self {
            listeners: slots.iter().copied().zip(listeners).collect(),
            acceptors: acceptors.collect(),
            upstreams: upstreams.collect(),
            egress: config.egress.clone(),
            limits: config.limits,
            drain: config.drain,
        }
    }

    /// When the first certificate that is shown to clients ends, and the first that is shown to upstreams.
    pub(super) fn first_endings(&self) -> Vec<(&'static str, Timestamp)> {
        let inbound = self.listeners.values().filter_map(|listener| listener.tls.as_ref());
        let server = inbound.flat_map(|tls| tls.certificates.identities()).filter_map(Identity::ends).min();
        let outbound = self.upstreams.values().filter_map(|upstream| upstream.tls.as_ref()?.identity.as_ref());
        let client = outbound.filter_map(Identity::ends).min();
        [("tls_server", server), ("tls_client", client)]
            .into_iter()
            .filter_map(|(name, at)| Some((name, at?)))
            .collect()
    }

    pub(super) fn listener(&self, slot: Slot) -> Option<&Arc<Listener>> {
        self.listeners.get(&slot)
    }

    /// What takes up TLS at a listener, if that is spoken there.
    pub(super) fn acceptor(&self, slot: Slot) -> Option<Acceptor> {
        self.acceptors.get(&slot).cloned()
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn drain(&self) -> Duration {
        self.drain
    }

    /// The upstreams that some listener leads to, by name.
    pub(super) fn used(&self) -> Vec<&Arc<Upstream>> {
        let mut names: Vec<_> = self.listeners.values().flat_map(|listener| listener.mode.upstreams()).collect();
        names.sort_unstable();
        names.dedup();
        names.into_iter().filter_map(|name| self.upstreams.get(name)).collect()
    }

    /// A pass for the proxy itself, which carries nothing: to see whether an upstream answers.
    pub(super) fn trial(&self, upstream: &Arc<Upstream>) -> Pass {
        Pass { upstream: upstream.clone(), egress: self.egress.clone() }
    }

    /// Whether somebody may go where he wants to.
    ///
    /// # Errors
    /// Why he may not.
    pub(super) fn decide(&self, guest: &Guest, wanted: &Wanted, now: Timestamp) -> Result<Pass, Denial> {
        let deny = |reason, detail: String| Err(Denial { reason, detail });
        let listener = match self.listener(guest.slot) {
            Some(listener) if listener.mode.as_str() == guest.mode => listener,
            _ => return deny("listener_withdrawn", "the configuration has the listener no more".to_owned()),
        };
        if !listener.accepts(guest.address) {
            return deny("source_network", "the listener does not accept from there".to_owned());
        }
        self.judge(guest, now)?;
        let upstream = match (&listener.mode, wanted) {
            (Mode::Mutual(name) | Mode::Reverse(name), Wanted::TheOne) => self.upstreams.get(name),
            (Mode::Connect(names), Wanted::Named(Ok(target))) => {
                names.iter().filter_map(|name| self.upstreams.get(name)).find(|upstream| upstream.to == *target)
            }
            (_, Wanted::Named(Err(error))) => return deny("malformed_target", error.to_string()),
            _ => None,
        };
        match upstream {
            Some(upstream) => Ok(Pass { upstream: upstream.clone(), egress: self.egress.clone() }),
            None => deny("upstream_not_listed", "no upstream of this listener is that host and port".to_owned()),
        }
    }

    /// Whether somebody who has gone to `upstream` may be there still. How it is reached may have changed.
    pub(super) fn still_allows(&self, guest: &Guest, wanted: &Wanted, upstream: &Upstream) -> bool {
        self.decide(guest, wanted, Timestamp::now()).is_ok_and(|pass| pass.upstream().to == upstream.to)
    }

    /// Whether somebody has shown what the listener wants to see of its clients, and what that was. Until when it holds, if
    /// nothing else changes.
    ///
    /// # Errors
    /// If he has not.
    pub(super) fn judge(&self, guest: &Guest, now: Timestamp) -> Result<Option<Timestamp>, Denial> {
        let Some(tls) = self.listener(guest.slot).and_then(|listener| listener.tls.as_ref()) else { return Ok(None) };
        let deny = |flaw: Flaw, detail: String| Err(Denial { reason: flaw.as_str(), detail });
        match (tls.client_auth, &guest.chain) {
            (ClientAuth::Off, _) | (ClientAuth::Loose, None) => Ok(None),
            (ClientAuth::Strict, None) => deny(Flaw::Missing, "the client has shown no certificate".to_owned()),
            (ClientAuth::Loose | ClientAuth::Strict, Some(chain)) => {
                match tls.client_trust.judge(chain, &tls::Wanted::any(&tls.client_names), now) {
                    Ok(certificate) => {
                        let lists = tls.client_trust.next_end(now);
                        Ok(Some(lists.map_or(certificate.not_after, |end| end.min(certificate.not_after))))
                    }
                    Err(flaw) => deny(flaw, format!("certificate {}", chain.fingerprint())),
                }
            }
        }
    }

    /// What a record says of somebody's certificate: nothing where none is asked for.
    pub(super) fn mark(&self, guest: &Guest) -> Option<String> {
        let tls = self.listener(guest.slot)?.tls.as_ref()?;
        if tls.client_auth == ClientAuth::Off {
            return None;
        }
        Some(guest.chain.as_ref().map_or_else(|| "missing".to_owned(), |chain| chain.fingerprint().to_string()))
    }
}

/// Puts back what only a restart takes over; what that is, by its keys.
pub(super) fn keep(old: &Config, new: &mut Config) -> Vec<&'static str> {
    let mut restart = Vec::new();
    if old.audit != new.audit {
        new.audit = old.audit.clone();
        restart.push("audit");
    }
    if old.health != new.health {
        restart.extend(old.health.differences(&new.health));
        new.health = old.health.clone();
    }
    restart
}

/// What differs between two configurations, by names.
pub(super) fn changes(old: &Config, new: &Config) -> Changes {
    let mut changes = Changes::default();
    let listeners = |config: &Config| -> BTreeMap<_, _> {
        config.listeners.iter().map(|listener| (listener.address.to_string(), listener.clone())).collect()
    };
    let upstreams = |config: &Config| -> BTreeMap<_, _> {
        config.upstreams.iter().map(|upstream| (upstream.name.clone(), upstream.clone())).collect()
    };
    changes.compare("listener ", &listeners(old), &listeners(new));
    changes.compare("upstream ", &upstreams(old), &upstreams(new));
    if old.egress != new.egress {
        changes.change("proxy");
    }
    if old.limits != new.limits {
        changes.change("limits");
    }
    if old.drain != new.drain {
        changes.change("drain_s");
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::Sinks;
    use crate::health;

    const SLOT: Slot = Slot(7);

    fn config(mode: Mode, accept_from: &[&str]) -> Config {
        let upstream = |name: &str, to: &str| Upstream {
            name: name.to_owned(),
            to: to.parse().expect("a target"),
            within: Vec::new(),
            tls: None,
        };
        let networks = accept_from.iter().map(|network| network.parse().expect("a network")).collect();
        Config {
            listeners: vec![Listener {
                address: "127.0.0.1:7777".parse().expect("an address"),
                accept_from: crate::network::Networks::new(networks),
                tls: None,
                mode,
            }],
            upstreams: vec![
                upstream("control", "control.example.com:443"),
                upstream("other", "other.example.com:8443"),
            ],
            egress: Egress::default(),
            health: health::Config::default(),
            drain: Duration::ZERO,
            audit: Sinks::stdout(),
            limits: Limits::default(),
        }
    }

    fn guest(mode: &'static str, address: &str) -> Guest {
        Guest { slot: SLOT, mode, address: address.parse().expect("an address"), chain: None }
    }

    fn decide(config: &Config, guest: &Guest, wanted: &Wanted) -> Result<String, &'static str> {
        let state = State::new(config, &[SLOT]);
        state
            .decide(guest, wanted, Timestamp::now())
            .map(|pass| pass.upstream().name.clone())
            .map_err(|denial| denial.reason)
    }

    #[test]
    fn only_what_a_listener_lists_is_reached_and_only_by_who_it_accepts() {
        let connect = config(Mode::Connect(vec!["control".into()]), &[]);
        let named = |target: &str| Wanted::Named(target.parse());
        let here = guest("connect", "127.0.0.1");
        for (target, outcome) in [
            ("control.example.com:443", Ok("control".to_owned())),
            ("CONTROL.example.com.:443", Ok("control".to_owned())),
            ("control.example.com:444", Err("upstream_not_listed")),
            ("control.example.com.evil.test:443", Err("upstream_not_listed")),
            ("xcontrol.example.com:443", Err("upstream_not_listed")),
            ("example.com:443", Err("upstream_not_listed")),
            // There is such an upstream, but not for this listener.
            ("other.example.com:8443", Err("upstream_not_listed")),
            ("127.0.0.1:443", Err("upstream_not_listed")),
            ("control.example.com", Err("malformed_target")),
            ("user@control.example.com:443", Err("malformed_target")),
            ("control.example.com:0443443", Err("malformed_target")),
            ("0x7f.1:443", Err("malformed_target")),
        ] {
            assert_eq!(decide(&connect, &here, &named(target)), outcome, "{target}");
        }
        let wanted = named("control.example.com:443");
        for (guest, outcome) in [
            (guest("connect", "::1"), Ok("control".to_owned())),
            (guest("connect", "::ffff:127.0.0.1"), Ok("control".to_owned())),
            (guest("connect", "10.0.0.1"), Err("source_network")),
            (guest("reverse", "127.0.0.1"), Err("listener_withdrawn")),
            (Guest { slot: Slot(8), ..here.clone() }, Err("listener_withdrawn")),
        ] {
            assert_eq!(decide(&connect, &guest, &wanted), outcome, "{guest:?}");
        }
        let elsewhere = config(Mode::Reverse("control".into()), &["10.0.0.0/8"]);
        assert_eq!(decide(&elsewhere, &guest("reverse", "10.0.0.1"), &Wanted::TheOne), Ok("control".to_owned()));
        assert_eq!(decide(&elsewhere, &guest("reverse", "127.0.0.1"), &Wanted::TheOne), Err("source_network"));
        assert_eq!(decide(&elsewhere, &guest("reverse", "10.0.0.1"), &wanted), Err("upstream_not_listed"));
        assert_eq!(decide(&connect, &here, &Wanted::TheOne), Err("upstream_not_listed"));
    }

    #[test]
    fn what_runs_ends_with_its_listener_its_upstream_and_its_network() {
        let before = config(Mode::Reverse("control".into()), &["10.0.0.0/8"]);
        let (guest, upstream) = (guest("reverse", "10.0.0.1"), &before.upstreams[0]);
        let still = |config: &Config| State::new(config, &[SLOT]).still_allows(&guest, &Wanted::TheOne, upstream);
        assert!(still(&before));
        let mut other = before.clone();
        other.upstreams[0].to.port = 444;
        assert!(!still(&other), "it is at another place");
        let mut other = before.clone();
        other.upstreams.remove(0);
        assert!(!still(&other), "it is gone");
        let mut other = before.clone();
        other.listeners[0].mode = Mode::Reverse("other".into());
        assert!(!still(&other), "the listener leads elsewhere");
        let narrower = config(Mode::Reverse("control".into()), &["10.1.0.0/16"]);
        assert!(!still(&narrower), "the address is no longer accepted");
        assert!(!State::default().still_allows(&guest, &Wanted::TheOne, upstream), "all is gone");
    }
}

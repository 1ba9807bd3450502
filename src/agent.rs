//! The agent: dials out to its organisations' gateways, or listens for their orchestrators itself, and forwards what its own
//! allowlist permits.
//!
//! Promised: it opens no listening socket but the one that its owner may have asked for; nothing that comes over a link
//! changes its keys or rules; every forward is decided here, on the resolved address, and the address that was checked
//! is the one dialled; what cannot be recorded is not opened.
//!
//! A configuration that is read again is taken over whole or not at all; what it no longer allows is closed at once, what
//! it does not touch goes on, and a changed identity is taken on without a gap.
//!
//! What waits on what: one task takes over new configurations ([`live`]), one waits for the times that they give, and
//! has everything judged again when one has come; one task per organisation and gateway keeps a link ([`dial`]), one
//! accepts where it listens itself ([`listen`]), one task per link or session there serves it ([`serve`]), one task per
//! forward ([`forward`]) moves its bytes and watches for a configuration that no longer allows it. When the stop given to
//! [`run`] asks for a drain, nobody dials any more, each link tells its gateway to give it nothing new, and opens that
//! come all the same are refused. When no forward is left, or those that were have been cut, everything else is stopped
//! and waited for, and the trail closed.
//!
//! What runs where: whoever keeps a link lives on one thread of a [`Crew`], with all its links and their forwards, as
//! [`crate::tunnel::ssh`] wants it. There is a thread per link as far as there are processors; the usual agent, with one
//! link, has the caller's alone. One that listens uses all processors, and gives each connection to the lightest thread.

mod dial;
pub mod doctor;
mod expiries;
mod forward;
mod health;
mod levels;
mod listen;
mod live;
mod reach;
mod serve;
mod usage;

use std::collections::{HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use listen::Listen;
use listen::Listening;
use live::State;
use usage::Usage;

use crate::audit::{self, Side, Trail};
use crate::chain::Chain;
use crate::drain::{Drain, Outcome, Stop};
use crate::identity::certificate::Revocations;
use crate::identity::{AgentId, AgentName, Credential, OrganisationId, Principal, PrivateKey, PublicKey, ReplicaId};
use crate::limits;
use crate::metrics;
use crate::policy::guard::Guard;
use crate::policy::rule::{Allowlist, PrincipalPattern};
use crate::policy::window::Window;
use crate::policy::{Denial, Reason};
use crate::registry::expiry::{Left, Stage};
use crate::reload::{Fresh, Live, Reloads};
use crate::resolve::{self, Resolver};
use crate::service::{self, Service, ServiceError, Taken, Unrecorded};
use crate::systemd::Supervisor;
use crate::target::{Host, Target, normal};
use crate::task::{Crew, Load, Tasks};
use crate::tunnel;
use crate::tunnel::admit::penalty::{Penalties, Terms};
use crate::tunnel::admit::{Handshakes, Room};
use crate::tunnel::connect::Egress;
use crate::tunnel::connect::url::Ways;
use crate::tunnel::dial::Tls;
use crate::tunnel::splice::Bounds;
use crate::tunnel::wire::InstanceId;

/// What an agent is told by its owner.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its name within each organisation.
    pub id: AgentId,
    /// The name of this process among those that run the same agent.
    pub replica: ReplicaId,
    /// The host key: the agent's identity.
    pub key: PrivateKey,
    /// How it leaves its network: directly, or through a proxy.
    pub egress: Egress,
    /// How long forwards that run may go on after the signal to end.
    pub drain: Duration,
    /// Whom it serves.
    pub organisations: Vec<Organisation>,
    /// Where its trail goes.
    pub audit: audit::Sinks,
    /// How much its gateways may have of it.
    pub limits: Limits,
    /// How the names of targets are looked up.
    pub resolver: resolve::Config,
    /// Where it listens itself, if at all.
    pub listen: Option<Listen>,
    /// What is held against addresses that nobody logs in from there.
    pub penalties: Terms,
    /// Where its health and metrics can be asked for, if at all.
    pub health: crate::health::Config,
    /// Whether its gateways may ask what the doctor finds at its targets.
    pub remote_doctor: bool,
}

impl Config {
    /// What is to be said of the agent's own TLS certificates at the time `now`: that they do not count yet, or end soon.
    #[must_use]
    pub fn certificate_warnings(&self, now: Timestamp) -> Vec<String> {
        let mut warnings = Vec::new();
        for organisation in &self.organisations {
            let Some(identity) = organisation.tls.as_ref().and_then(Tls::identity) else { continue };
            let what = format!("the tls_certificate for {}", organisation.id);
            if let Some(begins) = identity.begins().filter(|begins| *begins > now) {
                warnings.push(format!("{what} is not valid before {begins}: look at the clock"));
            }
            if let Some(expires) = identity.ends().filter(|ends| Stage::of(*ends, now).is_some()) {
                warnings.push(format!("{what} {}", Left { expires, now }));
            }
        }
        warnings
    }
}

/// How much an agent's gateways may have of it, at once or in a second. What is refused for one of these says which, by its
/// name here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Live forwards.
    pub forwards: usize,
    /// Live forwards for one organisation.
    pub forwards_per_organisation: usize,
    /// Live forwards on one link; holds for links that are made from then on.
    pub forwards_per_link: usize,
    /// Forwards on one link that are still being opened; holds for links that are made from then on.
    pub pending_opens_per_link: usize,
    /// Forwards that one organisation's gateways ask for in a second.
    pub opens_per_second_per_organisation: u32,
    /// Sessions of one organisation at the listener.
    pub sessions_per_organisation: usize,
    /// How long a forward may go on, and how long without a byte.
    pub forward: Bounds,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            forwards: limits::FORWARDS_PER_AGENT,
            forwards_per_organisation: limits::FORWARDS_PER_ORGANISATION,
            forwards_per_link: limits::CHANNELS_PER_LINK,
            pending_opens_per_link: limits::PENDING_OPENS_PER_LINK,
            opens_per_second_per_organisation: limits::OPENS_PER_SECOND_PER_ORGANISATION,
            sessions_per_organisation: limits::SESSIONS_PER_PRINCIPAL,
            forward: Bounds::default(),
        }
    }
}

/// What an agent does for one organisation.
#[derive(Debug, Clone)]
pub struct Organisation {
    /// Which.
    pub id: OrganisationId,
    /// Where to link; at all of them, each by the first of its ways that leads there. May be none where the agent listens
    /// itself.
    pub gateways: Vec<Ways>,
    /// How TLS is made with them, if it is.
    pub tls: Option<Tls>,
    /// Who may log in.
    pub orchestrators: Vec<Orchestrator>,
    /// Whose certificates may log in.
    pub authorities: Vec<OrchestratorAuthority>,
    /// What may be reached.
    pub allow: Allowlist,
}

impl Config {
    /// Its own gateways and proxy as they are written, and its listeners (also those for health and metrics), where they have
    /// an address. No forward may reach them.
    #[must_use]
    pub fn ways_out(&self) -> HashSet<Target> {
        let gateways = self.organisations.iter().flat_map(|organisation| &organisation.gateways);
        let gateways = gateways.flat_map(Ways::iter).map(|gateway| gateway.target().clone());
        // Not where it is on all addresses: which these are is not known here.
        let listeners = [self.listen.as_ref().map(|listen| listen.address), self.health.listen, self.health.metrics];
        let listeners = listeners
            .into_iter()
            .flatten()
            .filter(|address| !address.ip().is_unspecified())
            .map(|address| Target { host: Host::Address(normal(address.ip())), port: address.port() });
        gateways.chain(self.egress.proxy().map(|proxy| proxy.endpoint.clone())).chain(listeners).collect()
    }
}

impl Organisation {
    /// Whether anybody who may log in at the time `now` may speak for this principal: without that, no rule is asked.
    ///
    /// # Errors
    /// The denial, if nobody may.
    pub fn speaks_for(&self, principal: &Principal, now: Timestamp) -> Result<(), Denial> {
        let claimed = match principal {
            Principal::Named(id) => Some(id),
            Principal::Key(_) => None,
        };
        let speaks = |asserts: Option<&[PrincipalPattern]>, key: &PublicKey| {
            let credential = Credential::Key(key.fingerprint());
            live::speaker(asserts, &credential, claimed).is_ok_and(|speaker| speaker == *principal)
        };
        let keys = self.orchestrators.iter().map(|one| (one.asserts.as_deref(), &one.key, &one.window));
        let authorities = self.authorities.iter().map(|one| (Some(one.asserts.as_slice()), &one.key, &one.window));
        let mut closed = None;
        for (_, key, window) in keys.chain(authorities).filter(|(asserts, key, _)| speaks(*asserts, key)) {
            match window.at(now) {
                Ok(()) => return Ok(()),
                Err(why) => closed = Some((key.fingerprint(), why)),
            }
        }
        Err(match closed {
            Some((key, why)) => {
                Denial::new(why.reason(), format!("orchestrator key {key} speaks for {principal}, but {why}"))
            }
            None => Denial::new(Reason::PrincipalNotAsserted, format!("no orchestrator key may speak for {principal}")),
        })
    }
}

/// A key that may log in, and for whom it may speak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orchestrator {
    /// The key.
    pub key: PublicKey,
    /// The principals that it may speak for; without them it is its own principal.
    pub asserts: Option<Vec<PrincipalPattern>>,
    /// When it may.
    pub window: Window,
}

/// A CA whose certificates may log in for the organisation that is their only principal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrchestratorAuthority {
    /// Its key.
    pub key: PublicKey,
    /// The principals that its certificates' holders may speak for.
    pub asserts: Vec<PrincipalPattern>,
    /// When it counts.
    pub window: Window,
    /// What it has signed and counts no more.
    pub revocations: Revocations,
}

/// Why an agent could not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The listener.
    #[error("could not listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The listener, while the one before is in its way.
    #[error(
        "could not listen on {address}, because this agent listens on {before} already: give it another port as well, or \
         restart the agent"
    )]
    ListenAgain {
        /// Where.
        address: SocketAddr,
        /// Where it listens until then.
        before: SocketAddr,
    },
    /// Health or metrics.
    #[error(transparent)]
    Health(#[from] crate::health::OpenError),
    /// Its threads, its tasks or its trail.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// What the tasks of one agent share.
struct Agent {
    id: AgentId,
    /// Which of the processes that have the replica's name one after another this is, and since when: Unix time in
    /// milliseconds.
    instance: InstanceId,
    started: u64,
    /// What a reload replaces.
    state: Live<State>,
    trail: Trail,
    tasks: Tasks,
    crew: Crew,
    drain: Drain,
    usage: Usage,
    /// When it was last examined over a link.
    examined: Mutex<Option<tokio::time::Instant>>,
    /// Who has not logged in at the listener yet.
    room: Room,
    /// What is held against addresses that come to the listener.
    penalties: Penalties,
    handshakes: Handshakes,
    ways_out: Mutex<WaysOut>,
    /// How it stands with its gateways.
    standings: health::Standings,
    /// Fires for all forwards that run when the trail has failed for too long.
    unrecorded: Unrecorded,
}

/// Addresses that the agent's own gateways and proxy have, or have had: no forward may reach them.
#[derive(Default)]
struct WaysOut {
    /// The one that was learnt last stands last.
    addresses: VecDeque<SocketAddr>,
}

/// Runs an agent until `stop`. Returns how the drain went.
///
/// # Errors
/// If the trail cannot be started or completed, or tasks do not end.
pub async fn run(
    config: Config,
    reloads: Reloads<Config>,
    stop: Stop,
    supervisor: &Supervisor,
) -> Result<Outcome, RunError> {
    let mut listening = Listening::default();
    let prepared = listening.prepare(config.listen.as_ref())?;
    let health = crate::health::open(&config.health, tunnel::listen::bind).await?;
    let way = if prepared.is_some() { "listening" } else { "dialling out" };
    let links: usize = config.organisations.iter().map(|organisation| organisation.gateways.len()).sum();
    // At a listener there may be any number of sessions.
    let sessions = if config.listen.is_some() { limits::WORKERS_MAX } else { links };
    let workers = std::thread::available_parallelism().map_or(1, NonZero::get).min(sessions).min(limits::WORKERS_MAX);
    let service = Service::start(Side::Agent, config.audit.clone(), workers, supervisor).await?;
    let tasks = service.tasks.clone();
    let agent = Arc::new(Agent {
        id: config.id.clone(),
        instance: InstanceId::random(),
        started: u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default(),
        state: Live::new(State::new(&config, Arc::new(Resolver::new(&config.resolver, &tasks)))),
        trail: service.trail.clone(),
        tasks: tasks.clone(),
        crew: service.crew.clone(),
        drain: Drain::new(),
        usage: Usage::default(),
        examined: Mutex::default(),
        penalties: Penalties::default(),
        room: Room::new(limits::UNAUTHENTICATED_MAX, limits::UNAUTHENTICATED_PER_ADDRESS),
        handshakes: Handshakes::new(workers),
        ways_out: Mutex::default(),
        standings: health::Standings::default(),
        unrecorded: service.unrecorded.clone(),
    });
    metrics::start();
    let _levels = levels::refresh(&agent);
    info!(agent = %agent.id, replica = %config.replica, key = %config.key.public().fingerprint(), "agent started");
    let mut posts = Posts::default();
    posts.fit(&agent, &config);
    listening.fit(&agent, config.listen.as_ref(), prepared);
    health.serve(&agent, &service.crew, &tasks);
    tasks.spawn(follow(agent.clone(), config, reloads, posts, listening));
    tasks.spawn(keep_time(agent.clone()));
    tasks.spawn(expiries::watch(agent.clone()));
    supervisor.ready(way);
    service.until_stop(&stop).await;
    let grace = agent.state.current().drain;
    agent.drain.begin(grace);
    let outcome = service.drain(&agent.drain, grace, Some(agent.drain.sessions()), &stop, supervisor).await;
    service.end(agent).await?;
    Ok(outcome)
}

/// Takes over each configuration that is read anew, whole or not at all, until the stop.
async fn follow(
    agent: Arc<Agent>,
    mut config: Config,
    mut reloads: Reloads<Config>,
    mut posts: Posts,
    mut listening: Listening,
) {
    let stop = agent.tasks.stopping().clone();
    loop {
        let read = tokio::select! {
            read = reloads.next(&agent.tasks) => read,
            () = stop.cancelled() => return,
        };
        // All that can fail comes first.
        let read = read.map_err(|faults| faults.to_string()).and_then(|fresh| {
            let prepared =
                listening.prepare(fresh.config.listen.as_ref()).map_err(|error| Chain(&error).to_string())?;
            Ok((fresh, prepared))
        });
        let taken = match read {
            Ok((Fresh { config: mut new, mut restart }, prepared)) => {
                restart.extend(live::keep(&config, &mut new));
                let changes = live::changes(&config, &new);
                // With what it knows already, unless it is to be asked otherwise from now on.
                let resolver = match new.resolver == config.resolver {
                    true => agent.state.current().resolver.clone(),
                    false => Arc::new(Resolver::new(&new.resolver, &agent.tasks)),
                };
                config = new;
                // First the state, by which forwards and links judge themselves, then the links that come and go.
                agent.state.replace(State::new(&config, resolver));
                posts.fit(&agent, &config);
                listening.fit(&agent, config.listen.as_ref(), prepared);
                Ok(Taken { changes, restart })
            }
            Err(why) => Err(why),
        };
        service::tell_of_reload(&agent.trail, taken).await;
        reloads.settled();
    }
}

/// Has all that runs judged again at each moment at which a rule or a key begins or ceases to hold, until the stop.
async fn keep_time(agent: Arc<Agent>) {
    let stop = agent.tasks.stopping().clone();
    let mut looked_at = Timestamp::now();
    loop {
        let (state, mut changes) = agent.state.follow();
        let wait = state.next_look(looked_at);
        tokio::select! {
            () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {}
            Ok(()) = changes.changed() => {}
            () = stop.cancelled() => return,
        }
        let now = Timestamp::now();
        if agent.state.current().changes_between(looked_at, now) {
            agent.state.tell_again();
        }
        looked_at = now;
    }
}

/// The gateways at which links are kept.
#[derive(Default)]
struct Posts {
    kept: Vec<Arc<Post>>,
    /// How many there have been.
    ways: u32,
}

impl Posts {
    /// Dismisses those that a configuration no longer has, and begins to keep links at those that are new in it. One whose
    /// ways have changed, but to which one of them leads as before, is the same gateway: its link is replaced, not cut.
    fn fit(&mut self, agent: &Arc<Agent>, config: &Config) {
        let mut wanted: Vec<_> = config
            .organisations
            .iter()
            .flat_map(|organisation| organisation.gateways.iter().map(|ways| (&organisation.id, ways)))
            .collect();
        let mut before = std::mem::take(&mut self.kept);
        // What has not changed at all comes first, so that no other gateway takes its place.
        for same in [
            |post: &Post, ways: &Ways| *post.ways.current() == *ways,
            |post: &Post, ways: &Ways| post.ways.current().meet(ways),
        ] {
            wanted.retain(|(organisation, ways)| {
                let found = before.iter().position(|post| post.name.organisation == **organisation && same(post, ways));
                let Some(post) = found.map(|at| before.swap_remove(at)) else { return true };
                if *post.ways.current() != **ways {
                    post.ways.replace((*ways).clone());
                }
                self.kept.push(post);
                false
            });
        }
        for post in before {
            agent.standings.forget(&post);
            post.dismissed.cancel();
            if !config.organisations.iter().any(|organisation| organisation.id == post.name.organisation) {
                metrics::ORGANISATION_LINKS.forget([post.name.organisation.to_string()]);
            }
        }
        // One that has no link is to be seen to have none.
        for organisation in &config.organisations {
            let _ = metrics::ORGANISATION_LINKS.of([organisation.id.to_string()]);
        }
        for (organisation, ways) in wanted {
            self.ways = self.ways.wrapping_add(1);
            let post = Arc::new(Post {
                name: AgentName { organisation: organisation.clone(), agent: agent.id.clone() },
                ways: Live::new(ways.clone()),
                way: self.ways,
                dismissed: CancellationToken::new(),
                noticed: Mutex::default(),
            });
            self.kept.push(post.clone());
            agent.standings.expect(&post);
            let worker = agent.crew.lightest();
            let carried = worker.carry(Load::Session);
            let keeping = dial::keep_linked(agent.clone(), post);
            worker.spawn(&agent.tasks, async move {
                let _carried = carried;
                keeping.await;
            });
        }
    }
}

/// A gateway at which a link is kept for an organisation.
struct Post {
    name: AgentName,
    /// How it is reached; what a reload replaces.
    ways: Live<Ways>,
    /// Its number, for a gateway that has several links of this process.
    way: u32,
    /// Fires when the configuration no longer has it: its links are cut at once.
    dismissed: CancellationToken,
    /// What it has said of the end of the agent's key.
    noticed: Mutex<expiries::Noticed>,
}

impl Agent {
    /// What holds now; asked for at the moment of use.
    fn limits(&self) -> Limits {
        self.state.current().limits
    }

    /// What keeps forwards away from the agent's own gateways, proxy and listener.
    fn guard(&self, state: &State) -> Guard {
        let ways_out = self.ways_out.lock().unwrap_or_else(PoisonError::into_inner);
        Guard::new(state.ways_out.iter().cloned(), ways_out.addresses.iter().copied())
    }

    /// Remembers the addresses of a gateway or the proxy, all that its name has, whether or not they answer.
    fn learn(&self, addresses: &[SocketAddr]) {
        self.ways_out.lock().unwrap_or_else(PoisonError::into_inner).learn(addresses);
    }
}

impl WaysOut {
    /// Old addresses stay as long as there is room: a gateway that has moved may move back, and links that were made through
    /// a proxy go on through it when the configuration names another.
    fn learn(&mut self, addresses: &[SocketAddr]) {
        self.addresses.retain(|known| !addresses.contains(known));
        self.addresses.extend(addresses);
        let over = self.addresses.len().saturating_sub(limits::WAYS_OUT);
        self.addresses.drain(..over);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn address(number: u32) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::from(0x0a00_0000 + number), 443))
    }

    #[test]
    fn a_gateway_that_keeps_moving_is_guarded_where_it_is_now() {
        let mut ways_out = WaysOut::default();
        let home = [address(1), address(2)];
        for number in 3..3_000 {
            ways_out.learn(&home);
            ways_out.learn(&[address(number)]);
            let guard = Guard::new([], ways_out.addresses.iter().copied());
            for held in home.iter().chain([&address(number)]) {
                assert!(guard.holds_address(held.ip(), held.port()), "{held}");
            }
        }
        assert_eq!(ways_out.addresses.len(), limits::WAYS_OUT);
    }
}

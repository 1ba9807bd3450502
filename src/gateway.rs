//! The gateway: agents link to it, principals come in by its doors, and one function decides about every forward.
//!
//! Promised: an agent can open nothing toward the orchestrator; a stranger learns nothing but "not allowed" or "not
//! available"; every forward goes through [`broker`]; what cannot be recorded is not opened; what the registry or the
//! configuration no longer allows is cut. A configuration that is read again is taken over whole or not at all, and what it
//! does not touch goes on.
//!
//! What waits on what: one task takes over new configurations ([`live`]); one task per listener accepts ([`intake`]);
//! one task per connection becomes a link, kept in the [`roster`], or a session at the SSH [`door`]; one task per
//! forward runs through the broker to its end. The [`admin`] socket answers questions about the roster.
//!
//! When the stop given to [`run`] asks for a drain, listeners end first, with all that they have accepted taken on; then
//! agents are told, door sessions and links end with their last forward, and the admin socket goes on answering. When no
//! forward is left, or those that were have been cut, everything else is stopped and waited for, and the trail closed.
//!
//! What runs where: the caller's thread accepts, and hands each connection, of which nothing has been read, to the thread of
//! a [`Crew`] that carries the fewest forwards. There it lives for good, with all that belongs to it, as
//! [`crate::tunnel::ssh`] wants it. A forward of the loopback door runs on the thread of the link it is likely to take; one
//! of the SSH door runs on its session's, and where the link lives on another, [`roster::Ride::open`] has a bridge built.

mod admin;
mod arrive;
mod broker;
pub mod doctor;
mod door;
mod examination;
mod expiries;
mod forwards;
mod health;
mod inherit;
mod intake;
mod lapses;
mod levels;
mod live;
mod mutual;
mod quota;
mod roster;
mod status;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::audit::{self, Event, Kind, Side, Trail};
use crate::chain::Chain;
use crate::document::Faults;
use crate::drain::{Count, Drain, Outcome, Stop};
use crate::identity::{AgentName, Certificate, OrganisationId, PrincipalId, PrivateKey};
use crate::limits;
use crate::metrics;
use crate::network::Networks;
use crate::registry::file::{Files, Reload, writable_by_others};
use crate::registry::{Registry, Snapshot, changes};
use crate::reload::{Fresh, Live, Reloads};
use crate::service::{self, Service, ServiceError, Taken, Unrecorded};
use crate::systemd::Supervisor;
use crate::target::Target;
use crate::task::{Crew, Tasks};
use crate::tls::{Certificates, ClientAuth, Trust};
use crate::tunnel;
use crate::tunnel::admit::penalty::{self, Fault};
use crate::tunnel::admit::{Handshakes, Room};
use crate::tunnel::splice::Bounds;

pub use admin::{AgentRow, AgentsError, Barred, HandshakeCount, LastError};
pub use admin::{agents, examined, handshakes, health, status};
pub use forwards::{ForwardRow, Happened, Totals};
pub use inherit::{InheritError, Inherited};
pub use live::Warning;
pub use status::{Carrier, Status, Wanted};

/// What a gateway is told by its operator.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where agents and clients connect.
    pub listen: Vec<Listener>,
    /// What clients of TLS are shown, by name; without any there is no TLS.
    pub certificates: Option<Certificates>,
    /// The SSH door's host key.
    pub host_key: PrivateKey,
    /// A certificate for it, shown to clients that ask for one.
    pub host_certificate: Option<Certificate>,
    /// The directory of the registry.
    pub registry: PathBuf,
    /// Where the admin socket is made.
    pub admin_socket: Option<PathBuf>,
    /// How long forwards that run may go on after the signal to end.
    pub drain: Duration,
    /// Whose agents are served.
    pub organisations: Vec<Organisation>,
    /// Loopback doors.
    pub local: Vec<Local>,
    /// Where the trail goes.
    pub audit: audit::Sinks,
    /// How much anybody may have.
    pub limits: Limits,
    /// What is held against addresses that nobody logs in from.
    pub penalties: penalty::Terms,
    /// Where its health and metrics can be asked for, if at all.
    pub health: crate::health::Config,
}

/// Where agents and clients connect, and what holds for those who do it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// The address.
    pub address: SocketAddr,
    /// From where connections are accepted; from others nothing is read, and nothing is sent to them.
    pub accept_from: Option<Networks>,
    /// The balancers before it, which begin each connection with a PROXY protocol header. Nobody else may.
    pub balancers: Option<Networks>,
    /// Whether principals may log in with certificates here.
    pub certificates: bool,
    /// Whether clients show a TLS certificate of their own here.
    pub client_auth: ClientAuth,
    /// The CAs of those, for organisations that have none of their own.
    pub client_trust: Trust,
    /// The balancers before it that end TLS, from which HTTP is therefore taken in clear. They say whose connection it is.
    pub terminators: Option<Networks>,
}

impl Config {
    /// Which of the gateway's own certificates do not count at the time `now`, or end soon.
    #[must_use]
    pub fn certificate_warnings(&self, now: Timestamp) -> Vec<Warning> {
        live::State::new(self).certificate_warnings(now)
    }

    /// Why it cannot be run with this registry, each of which is in order by itself.
    #[must_use]
    pub fn contradiction(&self, registry: &Snapshot) -> Option<String> {
        mutual::contradiction(self, registry)
    }
}

impl Listener {
    /// A listener that narrows nothing.
    #[must_use]
    pub fn plain(address: SocketAddr) -> Self {
        Self {
            address,
            accept_from: None,
            balancers: None,
            certificates: false,
            client_auth: ClientAuth::Off,
            client_trust: Trust::default(),
            terminators: None,
        }
    }
}

/// How much anybody may have at once or in a second. What is refused for one of these says which, by its name here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Live forwards on one link.
    pub forwards_per_link: usize,
    /// Live forwards of one principal, over all doors.
    pub forwards_per_principal: usize,
    /// Live forwards of one organisation.
    pub forwards_per_organisation: usize,
    /// Sessions of one principal at the SSH door.
    pub sessions_per_principal: usize,
    /// Forwards of one principal that are still being opened.
    pub pending_opens_per_principal: usize,
    /// Forwards that one principal asks for in a second.
    pub opens_per_second_per_principal: u32,
    /// Forwards that one organisation's principals ask for in a second.
    pub opens_per_second_per_organisation: u32,
    /// How long a forward may go on, and how long without a byte.
    pub forward: Bounds,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            forwards_per_link: limits::CHANNELS_PER_LINK,
            forwards_per_principal: limits::FORWARDS_PER_PRINCIPAL,
            forwards_per_organisation: limits::FORWARDS_PER_ORGANISATION,
            sessions_per_principal: limits::SESSIONS_PER_PRINCIPAL,
            pending_opens_per_principal: limits::PENDING_OPENS_PER_PRINCIPAL,
            opens_per_second_per_principal: limits::OPENS_PER_SECOND_PER_PRINCIPAL,
            opens_per_second_per_organisation: limits::OPENS_PER_SECOND_PER_ORGANISATION,
            forward: Bounds::default(),
        }
    }
}

/// An organisation whose agents are served.
#[derive(Debug, Clone)]
pub struct Organisation {
    /// Which.
    pub id: OrganisationId,
    /// The key that logs in to its agents, and to no other organisation's.
    pub login_key: PrivateKey,
    /// A certificate for it, which is shown first.
    pub login_certificate: Option<Certificate>,
}

/// A loopback door: a plain listener that leads to one target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// Where it listens; a loopback address.
    pub listen: SocketAddr,
    /// Through which agent.
    pub agent: AgentName,
    /// Where to.
    pub target: Target,
    /// On whose behalf.
    pub principal: PrincipalId,
}

/// Why a gateway could not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The registry.
    #[error("could not load the registry {}", .path.display())]
    Registry {
        /// Where it was looked for.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Faults,
    },
    /// What the configuration wants of clients' certificates and the registry does not give.
    #[error("{0}")]
    Mutual(String),
    /// A listener.
    #[error(
        "could not listen on {address}; is another process using it, or is the port below 1024 and the capability missing?"
    )]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Listeners that were inherited.
    #[error("could not use the sockets that this process was started with")]
    Inherited(#[source] InheritError),
    /// The admin socket.
    #[error("could not make the admin socket {}", .path.display())]
    Admin {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Health or metrics.
    #[error(transparent)]
    Health(#[from] crate::health::OpenError),
    /// Its threads, its tasks or its trail.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// What the tasks of one gateway share.
struct Gateway {
    /// What a reload replaces.
    state: Live<live::State>,
    registry: Arc<Files>,
    roster: roster::Roster,
    lapses: lapses::Lapses,
    forwards: forwards::Forwards,
    started: Timestamp,
    quotas: quota::Quotas,
    trail: Trail,
    tasks: Tasks,
    crew: Crew,
    room: Room,
    penalties: penalty::Penalties,
    handshakes: Handshakes,
    /// Agents that look at their targets for somebody at the admin socket.
    examinations: examination::Examinations,
    drain: Drain,
    /// The tasks that accept.
    accepting: Count,
    /// When the registry was refused for its faults, if what it holds now was.
    rejected: Mutex<Option<Timestamp>>,
    /// Fires for all forwards that run when the trail has failed for too long.
    unrecorded: Unrecorded,
}

/// A loopback door that is open.
struct OpenDoor {
    local: Local,
    bound: SocketAddr,
    /// None any more once the gateway drains.
    listener: Option<Arc<TcpListener>>,
    /// Fires when it is no longer there as it is: nothing more is accepted by it, and what came in by it ends.
    withdrawn: CancellationToken,
}

/// Runs a gateway until `stop`, on listeners of its own and on those that it has inherited. `ready` is told the addresses it
/// listens on: the main ones, then the loopback doors'. Returns how the drain went.
///
/// # Errors
/// If anything it needs cannot be had, the trail cannot be completed, or tasks do not end.
pub async fn run(
    config: Config,
    reloads: Reloads<Config>,
    mut inherited: Inherited,
    stop: Stop,
    supervisor: &Supervisor,
    ready: impl FnOnce(&[SocketAddr], &[SocketAddr]),
) -> Result<Outcome, RunError> {
    let registry = Files::open(config.registry.clone())
        .map_err(|source| RunError::Registry { path: config.registry.clone(), source })?;
    for path in writable_by_others(&config.registry) {
        warn!("others than its owner may write {}, and so say who gets in: run `chmod o-w` on it", path.display());
    }
    if let Some(why) = config.contradiction(&registry.current()) {
        return Err(RunError::Mutual(why));
    }
    // With listeners that it shares, this process is meant to take the place of another.
    let successor = !inherited.is_empty();
    let mut listeners = Vec::new();
    for listener in &config.listen {
        listeners.push(listen(listener.address, &mut inherited)?);
    }
    let mut local = Vec::new();
    for door in &config.local {
        local.push((listen(door.listen, &mut inherited)?, door.clone()));
    }
    inherited.all_taken().map_err(RunError::Inherited)?;
    let admin = match &config.admin_socket {
        Some(path) => {
            Some(admin::bind(path, successor).await.map_err(|source| RunError::Admin { path: path.clone(), source })?)
        }
        None => None,
    };
    let health = crate::health::open(&config.health, tunnel::listen::bind).await?;
    let workers = std::thread::available_parallelism().map_or(1, NonZero::get);
    let workers = workers.clamp(limits::GATEWAY_WORKERS, limits::WORKERS_MAX);
    let service = Service::start(Side::Gateway, config.audit.clone(), workers, supervisor).await?;
    let tasks = service.tasks.clone();
    let gateway = Arc::new(Gateway {
        state: Live::new(live::State::new(&config)),
        registry: registry.clone(),
        roster: roster::Roster::default(),
        lapses: lapses::Lapses::default(),
        forwards: forwards::Forwards::default(),
        started: Timestamp::now(),
        quotas: quota::Quotas::default(),
        trail: service.trail.clone(),
        tasks: tasks.clone(),
        crew: service.crew.clone(),
        room: Room::new(limits::UNAUTHENTICATED_MAX, limits::UNAUTHENTICATED_PER_ADDRESS),
        penalties: penalty::Penalties::default(),
        handshakes: Handshakes::new(workers),
        examinations: examination::Examinations::default(),
        drain: Drain::new(),
        accepting: Count::default(),
        rejected: Mutex::default(),
        unrecorded: service.unrecorded.clone(),
    });
    metrics::start();
    let _levels = levels::refresh(&gateway);
    watch_registry(&gateway, registry);
    tasks.spawn(expiries::watch(gateway.clone()));
    tasks.spawn(expiries::watch_certificates(gateway.clone()));
    tasks.spawn(mutual::watch(gateway.clone()));
    let main: Vec<_> = listeners.iter().map(bound).collect();
    let doors: Vec<_> = local.iter().map(|(listener, _)| bound(listener)).collect();
    for (index, listener) in listeners.into_iter().enumerate() {
        accept(&gateway, intake::accept(gateway.clone(), listener, index));
    }
    let open = local.into_iter().map(|(listener, door)| OpenDoor::open(&gateway, Arc::new(listener), door)).collect();
    let host_key = config.host_key.public().fingerprint();
    tasks.spawn(follow(gateway.clone(), config, reloads, open));
    if let Some((listener, guard)) = admin {
        tasks.spawn(admin::serve(gateway.clone(), listener, guard));
    }
    health.serve(&gateway, &service.crew, &tasks);
    info!(key = %host_key, listen = ?main, "gateway started");
    ready(&main, &doors);
    service.until_stop(&stop).await;
    let grace = gateway.state.current().drain;
    gateway.drain.begin(grace);
    // Before anything is counted: what they have accepted is a forward by then, or on its way to the login.
    gateway.accepting.none().await;
    let outcome = service.drain(&gateway.drain, grace, Some(gateway.roster.list().len()), &stop, supervisor).await;
    service.end(gateway).await?;
    Ok(outcome)
}

impl Gateway {
    /// What holds now; asked for at the moment of use.
    fn limits(&self) -> Limits {
        self.state.current().limits
    }

    /// Whether faults are held against an address.
    fn blames(&self, address: IpAddr) -> bool {
        self.state.current().blames(address)
    }

    /// Holds something against an address.
    fn blame(&self, address: IpAddr, fault: Fault) {
        if !self.blames(address) {
            return;
        }
        if let Some(bar) = self.penalties.blame(address, fault, Instant::now()) {
            debug!(?fault, "an address is turned away for {} s", bar.as_secs());
        }
    }
}

/// Takes over each configuration that is read anew, whole or not at all, until the stop.
async fn follow(gateway: Arc<Gateway>, mut config: Config, mut reloads: Reloads<Config>, mut doors: Vec<OpenDoor>) {
    let stop = gateway.tasks.stopping().clone();
    let draining = gateway.drain.begun().clone();
    loop {
        let read = tokio::select! {
            read = reloads.next(&gateway.tasks) => read,
            // Nobody is to wait at a listener that accepts nothing. What may run on is judged by new configurations still.
            () = draining.cancelled(), if doors.iter().any(|door| door.listener.is_some()) => {
                doors.iter_mut().for_each(|door| door.listener = None);
                continue;
            }
            () = stop.cancelled() => return,
        };
        // Whoever asks for the configuration means the registry, too.
        gateway.registry.look_again();
        let taken = match read {
            Ok(fresh) => take_over(&gateway, &mut config, fresh, &mut doors).map_err(|error| Chain(&error).to_string()),
            Err(faults) => Err(faults.to_string()),
        };
        service::tell_of_reload(&gateway.trail, taken).await;
        reloads.settled();
    }
}

fn take_over(
    gateway: &Arc<Gateway>,
    config: &mut Config,
    Fresh { config: mut new, mut restart }: Fresh<Config>,
    doors: &mut Vec<OpenDoor>,
) -> Result<Taken, RunError> {
    restart.extend(live::keep(config, &mut new));
    let mut changes = live::changes(config, &new);
    let running: Vec<_> = doors.iter().map(|door| (door.bound, &door.local)).collect();
    let mut plan = live::fit_doors(&running, &new.local);
    if gateway.drain.begun().is_cancelled() {
        plan.open.clear();
    }
    plan.tell(&running, &mut changes);
    // All that can fail comes first.
    let made: Vec<_> = plan
        .open
        .into_iter()
        .map(|door| Ok((listen(door.listen, &mut Inherited::default())?, door)))
        .collect::<Result<_, RunError>>()?;

    // Then the state, by which forwards and links judge themselves, and the doors.
    gateway.state.replace(live::State::new(&new));
    for index in &plan.close {
        doors[*index].withdrawn.cancel();
    }
    for (index, local) in plan.change {
        let door = &mut doors[index];
        door.withdrawn.cancel();
        if let Some(listener) = door.listener.clone() {
            *door = OpenDoor::open(gateway, listener, local);
        }
    }
    for (listener, local) in made {
        let door = OpenDoor::open(gateway, Arc::new(listener), local);
        info!("loopback door on {}", door.bound);
        doors.push(door);
    }
    doors.retain(|door| !door.withdrawn.is_cancelled());
    *config = new;
    Ok(Taken { changes, restart })
}

impl OpenDoor {
    /// Begins to accept.
    fn open(gateway: &Arc<Gateway>, listener: Arc<TcpListener>, local: Local) -> Self {
        let withdrawn = CancellationToken::new();
        accept(gateway, door::local::accept(gateway.clone(), listener.clone(), local.clone(), withdrawn.clone()));
        Self { local, bound: bound(&listener), listener: Some(listener), withdrawn }
    }
}

/// Spawns a task that accepts, and that a drain waits for before it counts.
fn accept(gateway: &Gateway, accepting: impl Future<Output = ()> + Send + 'static) {
    let counted = gateway.accepting.enter();
    gateway.tasks.spawn(async move {
        accepting.await;
        drop(counted);
    });
}

fn bound(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)))
}

/// Listens on exactly this address, save that a listener that was inherited is as whoever opened it has made it.
fn listen(address: SocketAddr, inherited: &mut Inherited) -> Result<TcpListener, RunError> {
    if let Some(listener) = inherited.take(address) {
        return TcpListener::from_std(listener).map_err(|source| RunError::Listen { address, source });
    }
    tunnel::listen::bind(address).map_err(|source| RunError::Listen { address, source })
}

fn watch_registry(gateway: &Arc<Gateway>, registry: Arc<Files>) {
    let trail = gateway.trail.clone();
    let tasks = gateway.tasks.clone();
    let watched = gateway.clone();
    let (sender, mut reloads) = tokio::sync::mpsc::channel(limits::RELOAD_QUEUE);
    gateway.tasks.spawn(async move {
        registry
            .watch(tasks, move |reload| {
                if sender.try_send(reload).is_err() {
                    warn!("more registry changes than can be recorded; the newest state is in force all the same");
                }
            })
            .await;
    });
    // What is on record already. A state that was replaced before it could be recorded is told of with the next one.
    let mut told = gateway.registry.current();
    gateway.tasks.spawn(async move {
        while let Some(reload) = reloads.recv().await {
            if !matches!(reload, Reload::PollOnly(_)) {
                let rejected = matches!(reload, Reload::Rejected(_)).then(Timestamp::now);
                *watched.rejected.lock().unwrap_or_else(PoisonError::into_inner) = rejected;
            }
            let event = match &reload {
                Reload::Accepted { .. } => {
                    let snapshot = watched.registry.current();
                    watched.lapses.retain(|name| snapshot.has(name));
                    let changes = changes::between(&told, &snapshot);
                    told = snapshot;
                    info!("the registry has changed; the new state is in force");
                    watched.forwards.tell("registry.reloaded", None, &changes.to_string());
                    Event::new(Kind::RegistryReloaded).detail(&changes).changes(&changes)
                }
                Reload::Rejected(faults) => {
                    watched.forwards.tell("registry.rejected", None, &faults.to_string());
                    warn!(
                        "the registry has faults, so that nothing changed in it holds, revocations included; the last good \
                         state stays in force: {faults}"
                    );
                    Event::new(Kind::RegistryRejected).detail(faults)
                }
                Reload::PollOnly(why) => {
                    warn!(why, "the system does not tell of changes in the registry; looking for them at intervals");
                    continue;
                }
            };
            if let Err(error) = trail.note(event).await {
                error!(error = %Chain(&error), "could not record a change of the registry");
            }
        }
    });
}

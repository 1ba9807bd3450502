//! The gateway: agents link to it, principals come in by its doors, and one function decides about every forward.
//!
//! Promised: an agent can open nothing toward the orchestrator; a stranger learns nothing but "not allowed" or "not
//! available"; every forward goes through [`broker`]; what cannot be recorded is not opened; what the registry no longer
//! allows is cut.
//!
//! What waits on what: one task per listener accepts ([`intake`]); one task per connection becomes a link, kept in the
//! [`roster`], or a session at the SSH [`door`]; one task per forward runs through the broker to its end. The [`admin`]
//! socket answers questions about the roster. All end with the stop token given to [`run`], which waits for them and then
//! closes the trail. Everything runs on the caller's thread: see [`crate::tunnel::ssh`].

mod admin;
mod broker;
mod door;
mod intake;
mod lapses;
mod quota;
mod roster;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::audit::{self, Event, Kind, Side, Trail};
use crate::chain::Chain;
use crate::document::Faults;
use crate::identity::{AgentName, OrganisationId, PrincipalId, PrivateKey};
use crate::limits;
use crate::registry::Registry;
use crate::registry::file::{Files, Reload};
use crate::target::Target;
use crate::task::Tasks;
use crate::tunnel::admit::Room;

pub use admin::{AgentRow, AgentsError, LastError, agents};

/// What a gateway is told by its operator.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where agents and clients connect.
    pub listen: Vec<SocketAddr>,
    /// The SSH door's host key.
    pub host_key: PrivateKey,
    /// The directory of the registry.
    pub registry: PathBuf,
    /// Where the admin socket is made.
    pub admin_socket: Option<PathBuf>,
    /// Whose agents are served.
    pub organisations: Vec<Organisation>,
    /// Loopback doors.
    pub local: Vec<Local>,
    /// Where the trail goes.
    pub audit: audit::Sink,
}

/// An organisation whose agents are served.
#[derive(Debug, Clone)]
pub struct Organisation {
    /// Which.
    pub id: OrganisationId,
    /// The key that logs in to its agents, and to no other organisation's.
    pub login_key: PrivateKey,
}

/// A loopback door: a plain listener that leads to one target.
#[derive(Debug, Clone)]
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
    /// The admin socket.
    #[error("could not make the admin socket {}", .path.display())]
    Admin {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No trail.
    #[error("could not start the audit trail")]
    Trail(#[source] audit::StartError),
    /// The trail could not be completed.
    #[error("could not close the audit trail")]
    Close(#[source] audit::TrailError),
    /// Tasks were left.
    #[error("tasks were still running {} s after the stop", limits::STOP_GRACE.as_secs())]
    Drain,
}

/// What the tasks of one gateway share.
struct Gateway {
    host_key: PrivateKey,
    login_keys: HashMap<OrganisationId, PrivateKey>,
    registry: Arc<Files>,
    roster: roster::Roster,
    lapses: lapses::Lapses,
    quotas: quota::Quotas,
    trail: Trail,
    tasks: Tasks,
    room: Room,
    /// Fires for all forwards that run when the trail has failed for too long.
    unrecorded: Mutex<CancellationToken>,
}

/// Runs a gateway until `stop`. `ready` is told the addresses it listens on: the main ones, then the loopback doors'.
///
/// # Errors
/// If anything it needs cannot be had, the trail cannot be completed, or tasks do not end.
pub async fn run(
    config: Config,
    stop: CancellationToken,
    ready: impl FnOnce(&[SocketAddr], &[SocketAddr]),
) -> Result<(), RunError> {
    let registry = Files::open(config.registry.clone())
        .map_err(|source| RunError::Registry { path: config.registry.clone(), source })?;
    let mut listeners = Vec::new();
    for address in &config.listen {
        listeners.push(listen(*address)?);
    }
    let mut local = Vec::new();
    for door in config.local {
        local.push((listen(door.listen)?, door));
    }
    let admin = match &config.admin_socket {
        Some(path) => Some(admin::bind(path).map_err(|source| RunError::Admin { path: path.clone(), source })?),
        None => None,
    };
    let writer = Tasks::new();
    let trail = Trail::start(config.audit, Side::Gateway, &writer).await.map_err(RunError::Trail)?;
    let tasks = Tasks::new();
    let gateway = Arc::new(Gateway {
        host_key: config.host_key,
        login_keys: config
            .organisations
            .into_iter()
            .map(|organisation| (organisation.id, organisation.login_key))
            .collect(),
        registry: registry.clone(),
        roster: roster::Roster::default(),
        lapses: lapses::Lapses::default(),
        quotas: quota::Quotas::default(),
        trail: trail.clone(),
        tasks: tasks.clone(),
        room: Room::new(limits::UNAUTHENTICATED_MAX, limits::UNAUTHENTICATED_PER_ADDRESS),
        unrecorded: Mutex::default(),
    });
    watch_registry(&gateway, registry);
    let bound = |listener: &TcpListener| listener.local_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
    let main: Vec<_> = listeners.iter().map(bound).collect();
    let doors: Vec<_> = local.iter().map(|(listener, _)| bound(listener)).collect();
    for listener in listeners {
        tasks.spawn(intake::accept(gateway.clone(), listener));
    }
    for (listener, door) in local {
        tasks.spawn(door::local::accept(gateway.clone(), listener, door));
    }
    if let Some((listener, guard)) = admin {
        tasks.spawn(admin::serve(gateway.clone(), listener, guard));
    }
    tasks.spawn(audit::watch_failure(trail.failed(), tasks.stopping().clone(), {
        let gateway = gateway.clone();
        move || {
            error!("the audit trail has failed for {} s: ending all forwards", limits::TRAIL_FAILURE_GRACE.as_secs());
            std::mem::take(&mut *gateway.unrecorded.lock().unwrap_or_else(PoisonError::into_inner)).cancel();
        }
    }));
    info!(key = %gateway.host_key.public().fingerprint(), listen = ?main, "gateway started");
    ready(&main, &doors);
    stop.cancelled().await;
    info!("stopping");
    let drained = tasks.drain(limits::STOP_GRACE).await;
    drop(gateway);
    trail.close().await.map_err(RunError::Close)?;
    writer.drain(limits::STOP_GRACE).await;
    if drained { Ok(()) } else { Err(RunError::Drain) }
}

/// Listens on exactly this address: `[::]` does not take `0.0.0.0` with it, so that both can be listed, or one of them.
fn listen(address: SocketAddr) -> Result<TcpListener, RunError> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
    let bound = || -> io::Result<TcpListener> {
        let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        // A gateway that is started again must not wait for the connections of the one before to be forgotten.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, limits::LISTEN_BACKLOG)?;
        TcpListener::from_std(std::net::TcpListener::from(socket))
    };
    bound().map_err(|source| RunError::Listen { address, source })
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
    gateway.tasks.spawn(async move {
        while let Some(reload) = reloads.recv().await {
            let event = match &reload {
                Reload::Accepted { .. } => {
                    let snapshot = watched.registry.current();
                    watched.lapses.retain(|name| snapshot.has(name));
                    info!("the registry has changed; the new state is in force");
                    Event::new(Kind::RegistryReloaded)
                }
                Reload::Rejected(faults) => {
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

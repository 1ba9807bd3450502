//! The network proxy: the one way out for clients inside a network that must reach a control plane beyond it.
//!
//! Promised: a connection leads to an upstream that the configuration names for its listener, or nowhere; nothing that a
//! client says leads elsewhere. Listeners are on loopback unless they say from where they accept, and those in clear are
//! beyond it only where that is written out. Where a listener demands certificates of its clients, one of the right
//! authority is not enough: it must bear a name that the listener lists, and is judged again whenever the configuration
//! or its time says otherwise. What cannot be recorded is not opened, and what is denied is recorded.
//!
//! Three modes, one for each listener ([`Mode`]): `mutual` ends TLS on both sides and relays bytes; `reverse` speaks HTTP and
//! alone holds the certificate that the upstream asks for; `connect` is an HTTP CONNECT proxy through which the client's own
//! TLS goes unread.
//!
//! What runs where: the caller's thread accepts, and gives each connection to the lightest thread of a [`Crew`], where it
//! stays with its connection to the upstream. There is a thread per processor.
//!
//! What waits on what: one task per listener waits for connections until the drain, or until the configuration withdraws
//! it; one task per connection waits for the client's handshake and for the head of its first request under a deadline, then for
//! the trail and for the upstream, then moves bytes until both ends are done, the configuration no longer allows it, its
//! certificate has come to its end, the trail has failed for too long, or the stop. A connection to an upstream that
//! speaks HTTP has a task of its own, which ends with it. One task follows the configuration.

mod connect;
mod exchange;
mod forward;
mod health;
mod intake;
mod levels;
mod live;
mod mutual;
mod outward;
mod places;
mod reverse;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnet::IpNet;
use tracing::info;

use intake::Listening;
use live::State;
use outward::Standings;
use places::Places;

use crate::audit::{self, Side, Trail};
use crate::chain::Chain;
use crate::drain::{Drain, Outcome, Stop};
use crate::limits;
use crate::metrics;
use crate::network::Networks;
use crate::rate::Rates;
use crate::reload::{Fresh, Live, Reloads};
use crate::service::{self, Service, ServiceError, Taken, Unrecorded};
use crate::systemd::Supervisor;
use crate::target::{Host, Target};
use crate::task::{Crew, Tasks};
use crate::tls::{self, ClientAuth, Identity, Trust};
use crate::tunnel::admit::Room;
use crate::tunnel::connect::Egress;
use crate::tunnel::listen;
use crate::tunnel::splice::Bounds;

/// What a proxy is told by its owner.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it listens; at least one.
    pub listeners: Vec<Listener>,
    /// Where it leads to.
    pub upstreams: Vec<Upstream>,
    /// How it leaves the network itself.
    pub egress: Egress,
    /// Where its health and metrics can be asked for, if at all.
    pub health: crate::health::Config,
    /// How long what runs may go on after the signal to end.
    pub drain: Duration,
    /// Where its trail goes.
    pub audit: audit::Sinks,
    /// How much its clients may have of it.
    pub limits: Limits,
}

/// How much clients may have at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections in all.
    pub connections: usize,
    /// Connections of one address; not of this host's own.
    pub connections_per_address: usize,
    /// How long a connection may go on, and how long without a byte.
    pub bounds: Bounds,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: limits::PROXY_CONNECTIONS,
            connections_per_address: limits::PROXY_CONNECTIONS_PER_ADDRESS,
            bounds: Bounds::default(),
        }
    }
}

/// A place beyond the network that clients may be led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// What listeners and records call it.
    pub name: String,
    /// The host and port; nothing else is dialled.
    pub to: Target,
    /// Reserved networks in which its name's addresses may lie nevertheless.
    pub within: Vec<IpNet>,
    /// How TLS is spoken with it, where that is ours to do.
    pub tls: Option<Outbound>,
}

/// TLS toward an upstream.
#[derive(Clone)]
pub struct Outbound {
    /// Whom its certificate is to name.
    pub server_name: Host,
    /// What to show to it.
    pub identity: Option<Identity>,
    /// That it asks for a certificate and gets none is meant.
    pub without_certificate: bool,
    /// The authorities that count, as they were read; the system's, if there are none.
    pub authorities: Option<Arc<[u8]>>,
    /// The client's end, by what is spoken inside: nothing said, HTTP, SSH, HTTP/2.
    pub configs: [Arc<tls::ClientConfig>; 4],
}

impl PartialEq for Outbound {
    fn eq(&self, other: &Self) -> bool {
        let of = |one: &Self| (one.server_name.clone(), one.without_certificate);
        of(self) == of(other) && self.identity == other.identity && self.authorities == other.authorities
    }
}

impl Eq for Outbound {}

impl fmt::Debug for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbound").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

/// Where clients come in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// The address.
    pub address: SocketAddr,
    /// From where it accepts; without it, from this host.
    pub accept_from: Option<Networks>,
    /// How TLS is spoken with clients; without it, they are spoken to in clear.
    pub tls: Option<Inbound>,
    /// What it does, and where to.
    pub mode: Mode,
}

/// TLS toward clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inbound {
    /// What to show to them.
    pub certificates: tls::Certificates,
    /// Whether they show one as well.
    pub client_auth: ClientAuth,
    /// Whose those must be.
    pub client_trust: Trust,
    /// Whom they must name: one of these.
    pub client_names: Vec<String>,
}

/// What a listener does with a connection, and to which upstreams that leads, by their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// Ends TLS with certificates on both sides, and relays the bytes between.
    Mutual(String),
    /// Speaks HTTP with the client, and HTTP over TLS with the upstream.
    Reverse(String),
    /// Is an HTTP CONNECT proxy.
    Connect(Vec<String>),
}

impl Mode {
    /// As configuration and records name it.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Mutual(_) => "mutual",
            Self::Reverse(_) => "reverse",
            Self::Connect(_) => "connect",
        }
    }

    /// The upstreams that it leads to.
    pub fn upstreams(&self) -> impl Iterator<Item = &str> {
        let (one, several) = match self {
            Self::Mutual(one) | Self::Reverse(one) => (Some(one), [].as_slice()),
            Self::Connect(several) => (None, several.as_slice()),
        };
        one.into_iter().chain(several).map(String::as_str)
    }
}

impl Listener {
    /// Whether it takes up connections from there.
    #[must_use]
    pub fn accepts(&self, client: IpAddr) -> bool {
        match &self.accept_from {
            Some(networks) => networks.contain(client),
            None => client.to_canonical().is_loopback(),
        }
    }
}

/// Why a proxy could not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A listener.
    #[error("could not listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An upstream asks for what the proxy does not have.
    #[error(
        "upstream {name} ({to}) asks for a client certificate, and none is configured for it: give tls_certificate and tls_key, or \
         write without_certificate = true if it is to be asked in vain"
    )]
    WantsCertificate {
        /// Its name.
        name: String,
        /// Where it is.
        to: Target,
    },
    /// Health or metrics.
    #[error(transparent)]
    Health(#[from] crate::health::OpenError),
    /// Its threads, its tasks or its trail.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// What the tasks of one proxy share.
struct Proxy {
    /// What a reload replaces.
    state: Live<State>,
    trail: Trail,
    tasks: Tasks,
    crew: Crew,
    drain: Drain,
    /// Who has not said yet what it wants.
    room: Room,
    /// Who is there at all.
    places: Places,
    /// Who has been denied something lately.
    denials: Mutex<Rates<IpAddr>>,
    /// How upstreams answered lately.
    standings: Standings,
    /// Fires for all that runs when the trail has failed for too long.
    unrecorded: Unrecorded,
}

/// Runs a proxy until `stop`. Returns how the drain went.
///
/// # Errors
/// If it cannot listen, the trail cannot be started or completed, or tasks do not end.
pub async fn run(
    config: Config,
    reloads: Reloads<Config>,
    stop: Stop,
    supervisor: &Supervisor,
) -> Result<Outcome, RunError> {
    // Before anything is opened: what would fail for every client is told to the operator instead.
    outward::ask_for_wishes(&config).await?;
    let mut listening = Listening::default();
    let prepared = listening.prepare(&config)?;
    let health = crate::health::open(&config.health, listen::bind).await?;
    let workers = std::thread::available_parallelism().map_or(1, NonZero::get).min(limits::WORKERS_MAX);
    let service = Service::start(Side::Proxy, config.audit.clone(), workers, supervisor).await?;
    let tasks = service.tasks.clone();
    let proxy = Arc::new(Proxy {
        state: Live::new(State::default()),
        trail: service.trail.clone(),
        tasks: tasks.clone(),
        crew: service.crew.clone(),
        drain: Drain::new(),
        room: Room::new(limits::PROXY_SEATS, limits::PROXY_SEATS_PER_ADDRESS),
        places: Places::default(),
        denials: Mutex::default(),
        standings: Standings::default(),
        unrecorded: service.unrecorded.clone(),
    });
    metrics::start();
    let _levels = levels::refresh(&proxy);
    info!("proxy started");
    listening.fit(&proxy, &config, prepared);
    health.serve(&proxy, &service.crew, &tasks);
    tasks.spawn(follow(proxy.clone(), config, reloads, listening));
    supervisor.ready("listening");
    service.until_stop(&stop).await;
    let grace = proxy.state.current().drain();
    proxy.drain.begin(grace);
    let outcome = service.drain(&proxy.drain, grace, None, &stop, supervisor).await;
    service.end(proxy).await?;
    Ok(outcome)
}

/// Takes over each configuration that is read anew, whole or not at all, until the stop.
async fn follow(proxy: Arc<Proxy>, mut config: Config, mut reloads: Reloads<Config>, mut listening: Listening) {
    let stop = proxy.tasks.stopping().clone();
    loop {
        let read = tokio::select! {
            read = reloads.next(&proxy.tasks) => read,
            () = stop.cancelled() => return,
        };
        // All that can fail comes first.
        let read = read.map_err(|faults| faults.to_string()).and_then(|fresh| {
            let prepared = listening.prepare(&fresh.config).map_err(|error| Chain(&error).to_string())?;
            Ok((fresh, prepared))
        });
        let taken = match read {
            Ok((Fresh { config: mut new, mut restart }, prepared)) => {
                restart.extend(live::keep(&config, &mut new));
                let changes = live::changes(&config, &new);
                config = new;
                // The state, by which what runs judges itself, is in force before anything new is accepted.
                listening.fit(&proxy, &config, prepared);
                Ok(Taken { changes, restart })
            }
            Err(why) => Err(why),
        };
        service::tell_of_reload(&proxy.trail, taken).await;
        reloads.settled();
    }
}

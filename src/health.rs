//! Whether a program lives and is ready, for whoever supervises it; and its metrics.
//!
//! Promised: nothing here is open unless the configuration names it. What answers is small and bounded: GET and HEAD of three
//! fixed paths, one request a connection, so many connections at once, heads of so many bytes within so much time; of those that
//! have not said yet what they want, the oldest gives way to a new one, so that nobody who dawdles keeps a probe out. Answers name
//! the program's own parts and organisations, and no principal, target or address.
//!
//! *Live* is a program whose threads all get to their work, by the same signal as the service manager's watchdog. *Ready* is
//! one that is live and of which each [`Part`] is in order: the program says which parts it has ([`State`]), and since when each is
//! as it is.
//!
//! What waits on what: one task per listener ([`serve`]) waits for connections until the stop, also during a drain, of which it
//! tells; one task per connection waits for its head and the answer, each under a deadline. One task writes the [`file`] at each
//! change and at intervals, and takes it away at the stop.

pub mod ask;
pub mod file;
mod serve;
pub mod socket;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, UnixListener};
use tracing::{info, warn};

use crate::limits;
use crate::task::{Crew, Tasks};

/// Where health and metrics can be asked for; nowhere, unless something is set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// `/livez` and `/readyz`.
    pub listen: Option<SocketAddr>,
    /// The same on a Unix socket, for this user alone.
    pub socket: Option<PathBuf>,
    /// A file that says the same.
    pub file: Option<PathBuf>,
    /// `/metrics`, and the others as well.
    pub metrics: Option<SocketAddr>,
}

impl Config {
    /// The tables in which another one differs.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let health = (self.listen, &self.socket, &self.file) != (other.listen, &other.socket, &other.file);
        let metrics = self.metrics != other.metrics;
        [(health, "health"), (metrics, "metrics")]
            .into_iter()
            .filter(|(differs, _)| *differs)
            .map(|(_, what)| what)
            .collect()
    }
}

/// What a program is, as a probe sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// `agent`, `gateway` or `proxy`.
    pub side: String,
    /// What it runs.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// When this was so, in RFC 3339.
    pub time: Timestamp,
    /// Whether its threads get to their work.
    pub live: bool,
    /// Whether it is live and each of its parts is in order.
    pub ready: bool,
    /// Its parts.
    pub parts: Vec<Part>,
}

/// A part of a program, and whether it is in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is called.
    pub part: String,
    /// Of which organisation, where there is one for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organisation: Option<String>,
    /// Of which upstream, where there is one for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    /// Whether it is in order.
    pub ready: bool,
    /// Since when it is so, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// More about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub advice: String,
}

impl Part {
    /// One that is in order.
    #[must_use]
    pub fn ready(part: &str) -> Self {
        Self {
            part: part.to_owned(),
            organisation: None,
            upstream: None,
            ready: true,
            since: None,
            detail: String::new(),
            advice: String::new(),
        }
    }

    /// One that is not, and what to do.
    #[must_use]
    pub fn failing(part: &str, detail: impl Into<String>, advice: &str) -> Self {
        Self { ready: false, detail: detail.into(), advice: advice.to_owned(), ..Self::ready(part) }
    }

    /// The same, of this organisation.
    #[must_use]
    pub fn of(self, organisation: impl ToString) -> Self {
        Self { organisation: Some(organisation.to_string()), ..self }
    }

    /// The same, since that time.
    #[must_use]
    pub fn since(self, since: Option<Timestamp>) -> Self {
        Self { since, ..self }
    }

    /// What it is called, with whose it is.
    #[must_use]
    pub fn name(&self) -> String {
        match self.organisation.as_ref().or(self.upstream.as_ref()) {
            Some(whose) => format!("{} {whose}", self.part),
            None => self.part.clone(),
        }
    }

    /// The trail, by since when it fails, and because of which of its sinks, in a word of the trail's.
    #[must_use]
    pub fn trail(failed: Option<tokio::time::Instant>, because: Option<(&str, &str)>) -> Self {
        let Some(instant) = failed else { return Self::ready("trail") };
        let detail = "the audit trail cannot be written, so that nothing opens";
        let detail = because.map_or_else(|| detail.to_owned(), |(sink, why)| format!("{detail}: sink {sink}, {why}"));
        let advice = match because.map(|(_, why)| why) {
            Some("refused") => {
                "its collector answers, and does not take the records: the log has its answer, and its own log says why. \
                 Mend it there; if it cannot be mended, give the sink `required = false` and restart"
            }
            Some("unauthorised") => "renew its token or certificate: the files are read again, without a restart",
            Some("redirected") => "give the sink the URL that its collector points to, and restart",
            Some("tls_failed") => "look whether its collector's certificate is good for the host, and from its ca_file",
            Some(
                "connect_failed" | "connection_lost" | "timed_out" | "too_slow" | "server_failed" | "too_many_requests"
                | "protocol",
            ) => "look whether its collector runs, keeps up and can be reached; the log says why",
            _ => "look whether its disk is full or its sink away; the log says why",
        };
        Self::failing("trail", detail, advice).since(Timestamp::now().checked_sub(instant.elapsed()).ok())
    }

    /// The drain, by since when there is one.
    #[must_use]
    pub fn drain(since: Option<Timestamp>) -> Self {
        match since {
            None => Self::ready("drain"),
            since => {
                Self::failing("drain", "it goes away, and takes on nothing new", "wait for its successor").since(since)
            }
        }
    }
}

/// What a program says of itself.
pub trait State: Send + Sync + 'static {
    /// `agent`, `gateway` or `proxy`.
    fn side(&self) -> &'static str;

    /// Its parts as they are now. Must come back within [`limits::HEALTH_ANSWER`]; after that it counts as not ready.
    fn parts(&self) -> impl Future<Output = Vec<Part>> + Send;
}

impl Report {
    /// How a program is now.
    pub async fn of<S: State>(state: &S, crew: &Crew) -> Self {
        let (live, parts) = tokio::join!(
            crew.answers(limits::HEALTH_PATIENCE),
            tokio::time::timeout(limits::HEALTH_ANSWER, state.parts())
        );
        let mut all = vec![match live {
            true => Part::ready("threads"),
            false => Part::failing(
                "threads",
                "a thread does not get to its work",
                "it is overloaded or stuck; if this lasts, restart it and report what its log said last",
            ),
        }];
        match parts {
            Ok(parts) => all.extend(parts),
            Err(_) => all.push(Part::failing("answer", "its parts could not be looked at in time", "look at its load")),
        }
        Self {
            side: state.side().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            time: Timestamp::now(),
            live,
            ready: all.iter().all(|part| part.ready),
            parts: all,
        }
    }

    /// Whether somebody who knows `other` learns something new from this.
    fn differs(&self, other: &Self) -> bool {
        self.live != other.live || self.ready != other.ready || self.parts != other.parts
    }
}

/// Why health could not be made to be asked for.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A port.
    #[error("could not listen on {address} for questions about health or metrics")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket.
    #[error("could not make the health socket {}", .path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file.
    #[error("could not write the health file {}", .path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What is open for questions, of which none is answered yet.
#[derive(Debug, Default)]
pub struct Open {
    ports: Vec<(TcpListener, What)>,
    socket: Option<(UnixListener, socket::Guard)>,
    file: Option<PathBuf>,
}

/// What a listener is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Health,
    Metrics,
}

/// Opens what the configuration names; `bind` makes a listener.
///
/// # Errors
/// If something cannot be had.
pub async fn open(config: &Config, bind: impl Fn(SocketAddr) -> io::Result<TcpListener>) -> Result<Open, OpenError> {
    let mut open = Open::default();
    for (address, what) in [(config.metrics, What::Metrics), (config.listen, What::Health)] {
        let Some(address) = address else { continue };
        let listener = bind(address).map_err(|source| OpenError::Listen { address, source })?;
        if !address.ip().to_canonical().is_loopback() {
            warn!("whoever reaches {address} may ask there for {}", what.as_str());
        }
        open.ports.push((listener, what));
    }
    if let Some(path) = &config.socket {
        let busy = socket::is_answered(path).await;
        let made = if busy {
            Err(io::Error::new(io::ErrorKind::AddrInUse, "another program answers there"))
        } else {
            socket::place(path)
        };
        open.socket = Some(made.map_err(|source| OpenError::Socket { path: path.clone(), source })?);
    }
    if let Some(path) = &config.file {
        // Tried now, so that a folder that cannot be written is told at the start.
        file::probe(path).map_err(|source| OpenError::File { path: path.clone(), source })?;
        open.file = Some(path.clone());
    }
    Ok(open)
}

impl Open {
    /// Answers, and writes the file, until the stop of `tasks`.
    pub fn serve<S: State>(self, state: &Arc<S>, crew: &Crew, tasks: &Tasks) {
        let asked = |what| serve::Asked { state: state.clone(), crew: crew.clone(), metrics: what == What::Metrics };
        for (listener, what) in self.ports {
            match listener.local_addr() {
                Ok(bound) => info!("{} on {bound}", what.as_str()),
                Err(error) => warn!(%error, "{}, but not known where", what.as_str()),
            }
            tasks.spawn(serve::tcp(asked(what), listener, tasks.clone()));
        }
        if let Some((listener, guard)) = self.socket {
            tasks.spawn(serve::unix(asked(What::Health), listener, guard, tasks.clone()));
        }
        if let Some(path) = self.file {
            tasks.spawn(file::keep(state.clone(), crew.clone(), path, tasks.clone()));
        }
    }
}

impl What {
    fn as_str(self) -> &'static str {
        match self {
            Self::Health => "health",
            Self::Metrics => "metrics and health",
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

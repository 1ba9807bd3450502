//! The admin socket: a Unix socket for the gateway's own user, one JSON line each way.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::lapses::{AGENT_DRAINED, Lapse, Record, Seen};
use super::roster::{Link, Peer, Standing};
use super::status::{self, Status, Wanted};
use super::{Gateway, examination};
use crate::diagnosis::Report;
use crate::health::{self, socket};
use crate::identity::{AgentName, ReplicaId};
use crate::limits;
use crate::registry::Registry;

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
enum Question {
    /// Who is linked?
    Agents,
    /// How many handshakes are there at once?
    Handshakes,
    /// Does this gateway go away?
    State,
    /// How is it?
    Health,
    /// What goes on in it?
    Status(Wanted),
    /// What does this agent find at its targets?
    Examine {
        /// Which: its organisation, a slash, its name.
        agent: String,
    },
}

/// The answer to [`Question::Examine`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Examined {
    /// What it found.
    Report(Report),
    /// Why it was not asked, or has not answered.
    Unanswered(String),
}

/// The answer to [`Question::State`].
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
enum State {
    Serving,
    Draining,
}

/// Handshakes that have begun, at the gateway's SSH door: of agents and of clients; and who may begin none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandshakeCount {
    /// That are under way.
    pub now: usize,
    /// That were at once, at most, since the gateway was started.
    pub most: usize,
    /// Addresses that are turned away after too many failures.
    #[serde(default)]
    pub barred: Vec<Barred>,
}

/// An address that is turned away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Barred {
    /// The address; of IPv6, the first one of its /64.
    pub address: String,
    /// For how many seconds still.
    pub seconds: u64,
}

/// One link, or an agent or replica that has none, as `caponier agents` shows it. Fields are null where nothing is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRow {
    /// The organisation.
    pub organisation: String,
    /// The agent.
    pub agent: String,
    /// Which of its processes.
    pub replica: Option<String>,
    /// `active`; `retired`, `superseded`, `draining` or `unanswering` while a link that gets no forwards any more waits for
    /// its last one; `absent` without a link, and `never linked` where there was none since the gateway was started.
    pub state: String,
    /// Where it dials from, as the gateway sees it.
    pub address: Option<String>,
    /// What carries its session: `ssh`, `tls` or `wss`, or `ws` from a balancer that ends TLS.
    pub transport: Option<String>,
    /// What it runs.
    pub version: Option<String>,
    /// Since when it is linked, or absent; in RFC 3339.
    pub since: Option<String>,
    /// The fingerprint of its host key.
    pub key: Option<String>,
    /// When that key expires, in RFC 3339; without a link, when the last key does that is registered for the agent. Null
    /// where there is no such end.
    pub expires: Option<String>,
    /// How many forwards it carries now.
    pub live: usize,
    /// How many forwards the link was asked for.
    pub opened: u64,
    /// Bytes of credit that the agent has been given: what it may make the gateway hold.
    pub credit: usize,
    /// Bytes that the agent has sent and that wait for their clients.
    pub held: usize,
    /// Bytes that wait to be sent to the agent.
    pub unsent: usize,
    /// What went wrong last.
    pub last_error: Option<LastError>,
}

/// What went wrong last with an agent's links.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// When, in RFC 3339.
    pub at: String,
    /// In the word that the trail uses.
    pub reason: String,
    /// More about it.
    pub detail: String,
    /// Where the other end was.
    pub address: String,
    /// Whether the other end only claimed to be the agent.
    pub claimed: bool,
}

/// Why a question was not answered.
#[derive(Debug, thiserror::Error)]
pub enum AgentsError {
    /// No gateway there.
    #[error("could not reach a gateway at {}; is it running, and are you its user?", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The answer.
    #[error("the gateway's answer could not be read")]
    Answer(#[source] io::Error),
    /// An agent that tells nothing.
    #[error("{0}")]
    Unanswered(String),
}

/// Asks the gateway behind the socket `path` who is linked.
///
/// # Errors
/// If nobody answers, or not as expected.
pub async fn agents(path: &Path) -> Result<Vec<AgentRow>, AgentsError> {
    ask(path, &Question::Agents).await
}

/// Asks the gateway behind the socket `path` how many handshakes it has at once.
///
/// # Errors
/// If nobody answers, or not as expected.
pub async fn handshakes(path: &Path) -> Result<HandshakeCount, AgentsError> {
    ask(path, &Question::Handshakes).await
}

/// Asks the gateway behind the socket `path` how it is.
///
/// # Errors
/// If nobody answers, or not as expected.
pub async fn health(path: &Path) -> Result<health::Report, AgentsError> {
    ask(path, &Question::Health).await
}

/// Has the agent `name` look at its targets, over its link to the gateway behind the socket `path`. Every text in the report is
/// bounded, and does nothing to a terminal.
///
/// # Errors
/// If no gateway answers, or the agent does not.
pub async fn examined(path: &Path, name: &AgentName) -> Result<Report, AgentsError> {
    let question = Question::Examine { agent: name.to_string() };
    match ask_for(path, &question, limits::EXAMINED_REMOTE + limits::ADMIN_TIMEOUT).await? {
        Examined::Report(report) => Ok(report),
        Examined::Unanswered(why) => Err(AgentsError::Unanswered(why)),
    }
}

/// Asks the gateway behind the socket `path` what goes on in it.
///
/// # Errors
/// If nobody answers, or not as expected.
pub async fn status(path: &Path, wanted: Wanted) -> Result<Status, AgentsError> {
    ask(path, &Question::Status(wanted)).await
}

async fn ask<T: DeserializeOwned>(path: &Path, question: &Question) -> Result<T, AgentsError> {
    ask_for(path, question, limits::ADMIN_TIMEOUT).await
}

async fn ask_for<T: DeserializeOwned>(path: &Path, question: &Question, patience: Duration) -> Result<T, AgentsError> {
    let connect = |source| AgentsError::Connect { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).await.map_err(connect)?;
    let mut line = serde_json::to_vec(question).map_err(|error| AgentsError::Answer(error.into()))?;
    line.push(b'\n');
    let answered = async {
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        (&mut stream).take(limits::ADMIN_ANSWER_MAX as u64).read_to_end(&mut answer).await?;
        Ok(serde_json::from_slice(&answer)?)
    };
    timeout(patience, answered)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(AgentsError::Answer)
}

/// Makes the socket, for this user alone. One that nobody listens on any more is replaced, and so is that of a gateway that
/// goes away. A `successor` replaces any gateway's: it takes over its listeners, too.
pub(super) async fn bind(path: &Path, successor: bool) -> io::Result<(UnixListener, socket::Guard)> {
    if socket::is_answered(path).await && !successor && !is_draining(path).await {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another gateway answers there"));
    }
    socket::place(path)
}

/// Whether the gateway behind `path` says that it goes away.
async fn is_draining(path: &Path) -> bool {
    let asked = async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(b"{\"request\":\"state\"}\n").await?;
        let mut answer = Vec::new();
        (&mut stream).take(limits::ADMIN_LINE_MAX as u64).read_to_end(&mut answer).await?;
        io::Result::Ok(serde_json::from_slice::<State>(&answer)?)
    };
    matches!(timeout(limits::ADMIN_TIMEOUT, asked).await, Ok(Ok(State::Draining)))
}

/// Answers until the gateway stops.
pub(super) async fn serve(gateway: Arc<Gateway>, listener: UnixListener, guard: socket::Guard) {
    let _guard = guard;
    let stop = gateway.tasks.stopping().clone();
    let room = Arc::new(Semaphore::new(limits::ADMIN_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "could not accept a connection at the admin socket");
                tokio::select! {
                    () = tokio::time::sleep(limits::ACCEPT_PAUSE) => continue,
                    () = stop.cancelled() => return,
                }
            }
        };
        let Ok(place) = room.clone().try_acquire_owned() else { continue };
        let gateway = gateway.clone();
        let tasks = gateway.tasks.clone();
        tasks.spawn(async move {
            // What is asked is read in less, and most is answered at once; an examination has its record to write after it.
            let patience = limits::EXAMINED_REMOTE + limits::ADMIN_TIMEOUT * 2;
            let answered = timeout(patience, answer(&gateway, stream)).await;
            if !matches!(answered, Ok(Ok(()))) {
                debug!(?answered, "an admin question was not answered");
            }
            drop(place);
        });
    }
}

async fn answer(gateway: &Gateway, stream: UnixStream) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    let mut begun = (&mut stream).take(limits::ADMIN_LINE_MAX as u64);
    timeout(limits::ADMIN_TIMEOUT, begun.read_until(b'\n', &mut line)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    let draining = gateway.drain.begun().is_cancelled();
    let answer = match serde_json::from_slice(&line)? {
        Question::State => serde_json::to_vec(if draining { &State::Draining } else { &State::Serving })?,
        Question::Handshakes => {
            let (now, most) = gateway.handshakes.under_way();
            let barred = gateway
                .penalties
                .barred(std::time::Instant::now())
                .into_iter()
                .map(|(address, left)| Barred { address: address.to_string(), seconds: left.as_secs() + 1 });
            serde_json::to_vec(&HandshakeCount { now, most, barred: barred.collect() })?
        }
        Question::Health => serde_json::to_vec(&health::Report::of(gateway, &gateway.crew).await)?,
        Question::Status(wanted) => serde_json::to_vec(&status::status(gateway, &wanted).await)?,
        Question::Agents => {
            let rows = rows(gateway, draining);
            serde_json::to_vec(&rows)?
        }
        Question::Examine { agent } => {
            // Whoever asks says nothing more, and is there as long as its half is open.
            let gone = async { while matches!(stream.read(&mut [0; 64]).await, Ok(1..)) {} };
            serde_json::to_vec(&match examination::examine(gateway, &agent, gone).await {
                Ok(report) => Examined::Report(report),
                Err(why) => Examined::Unanswered(why),
            })?
        }
    };
    stream.write_all(&answer).await?;
    stream.shutdown().await
}

/// Every link, and every registered agent or remembered replica that has none. Of a gateway that drains, all links do.
fn rows(gateway: &Gateway, draining: bool) -> Vec<AgentRow> {
    let links = gateway.roster.list();
    let snapshot = gateway.registry.current();
    let registered = snapshot.organisations().iter().flat_map(|(organisation, held)| {
        held.agents.keys().map(|agent| AgentName { organisation: organisation.clone(), agent: agent.clone() })
    });
    // What has been taken from the registry a moment ago may still have a link.
    let names: BTreeSet<AgentName> = registered.chain(links.iter().map(|link| link.peer.name.clone())).collect();
    let now = Timestamp::now();
    let mut rows = Vec::new();
    let mut links = links.into_iter().peekable();
    for name in names {
        let record = gateway.lapses.of(&name);
        let mut linked = Vec::new();
        // Both are in the order of names.
        while let Some(link) = links.next_if(|link| link.peer.name == name) {
            let expires = snapshot.agent_key_expires(&name, &link.peer.key);
            rows.push(AgentRow::of_link(&link, &record, draining).expiring(expires));
            linked.push(link);
        }
        let replicas: Vec<_> = linked.iter().map(|link| &link.peer.replica).collect();
        let expires = snapshot.agent_expires(&name, now);
        let absent = missing(&record, &replicas, now).into_iter().map(|seen| AgentRow::absent(seen, &record));
        rows.extend(absent.map(|row| row.expiring(expires)));
        if linked.is_empty() && record.replicas.is_empty() {
            rows.push(AgentRow::never_linked(&name, &record).expiring(expires));
        }
    }
    rows
}

/// The replicas that are not linked: those that were until lately, and where none is linked at all, at least the last one.
fn missing<'a>(record: &'a Record, linked: &[&ReplicaId], now: Timestamp) -> Vec<&'a Seen> {
    let absent = || record.replicas.values().map(Box::as_ref).filter(|seen| !linked.contains(&&seen.peer.replica));
    // Whoever has said goodbye is not missed as long as others are there.
    let left = |seen: &&Seen| seen.lapse.as_ref().is_some_and(|lapse| lapse.reason == AGENT_DRAINED);
    let lately = |seen: &&Seen| now.duration_since(seen.at).unsigned_abs() < limits::ABSENT_LISTED && !left(seen);
    let recent: Vec<_> = absent().filter(lately).collect();
    match recent.is_empty() && linked.is_empty() {
        true => absent().max_by_key(|seen| seen.at).into_iter().collect(),
        false => recent,
    }
}

impl AgentRow {
    fn bare(name: &AgentName, state: &str, last: Option<&Lapse>) -> Self {
        Self {
            organisation: name.organisation.to_string(),
            agent: name.agent.to_string(),
            replica: None,
            state: state.to_owned(),
            address: None,
            transport: None,
            version: None,
            since: None,
            key: None,
            expires: None,
            live: 0,
            opened: 0,
            credit: 0,
            held: 0,
            unsent: 0,
            last_error: last.map(LastError::of),
        }
    }

    fn expiring(self, expires: Option<Timestamp>) -> Self {
        Self { expires: expires.map(|expires| expires.to_string()), ..self }
    }

    fn of_peer(peer: &Peer, since: Timestamp, state: &str, last: Option<&Lapse>) -> Self {
        Self {
            replica: Some(peer.replica.to_string()),
            address: Some(peer.address.to_string()),
            transport: Some(peer.transport.to_owned()),
            version: Some(peer.version.clone()),
            since: Some(since.to_string()),
            key: Some(peer.key.to_string()),
            ..Self::bare(&peer.name, state, last)
        }
    }

    fn of_link(link: &Link, record: &Record, draining: bool) -> Self {
        let memory = link.client().control().memory();
        let last = record.replicas.get(&link.peer.replica).and_then(|seen| seen.lapse.as_ref());
        let standing = if draining { Standing::Draining } else { link.standing() };
        Self {
            live: link.live(),
            opened: link.opened(),
            credit: memory.credit,
            held: memory.held,
            unsent: memory.unsent,
            ..Self::of_peer(&link.peer, link.since, standing.as_str(), last)
        }
    }

    fn absent(seen: &Seen, record: &Record) -> Self {
        Self::of_peer(&seen.peer, seen.at, "absent", record.last(Some(&seen.peer.replica)))
    }

    fn never_linked(name: &AgentName, record: &Record) -> Self {
        Self::bare(name, "never linked", record.last(None))
    }
}

impl LastError {
    fn of(lapse: &Lapse) -> Self {
        Self {
            at: lapse.at.to_string(),
            reason: lapse.reason.to_owned(),
            detail: lapse.detail.clone(),
            address: lapse.address.to_string(),
            claimed: lapse.claimed,
        }
    }
}

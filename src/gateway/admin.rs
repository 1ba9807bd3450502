//! The admin socket: a Unix socket for the gateway's own user, one JSON line each way.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::Gateway;
use crate::limits;

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
enum Question {
    /// Who is linked?
    Agents,
    /// Does this gateway go away?
    State,
}

/// The answer to [`Question::State`].
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
enum State {
    Serving,
    Draining,
}

/// One link, as `caponier agents` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRow {
    /// The organisation.
    pub organisation: String,
    /// The agent.
    pub agent: String,
    /// Which of its processes.
    pub replica: String,
    /// Where it dials from, as the gateway sees it.
    pub address: String,
    /// What it runs.
    pub version: String,
    /// Since when, in RFC 3339.
    pub since: String,
    /// The fingerprint of its host key.
    pub key: String,
    /// How many forwards it carries now.
    pub live: usize,
    /// How many forwards the link was asked for.
    pub opened: u64,
    /// `active`; `retired` while a replaced link waits for its last forward; `draining` while one does because its agent or
    /// this gateway goes away.
    pub state: String,
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
}

/// Asks the gateway behind the socket `path` who is linked.
///
/// # Errors
/// If nobody answers, or not as expected.
pub async fn agents(path: &Path) -> Result<Vec<AgentRow>, AgentsError> {
    let connect = |source| AgentsError::Connect { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).await.map_err(connect)?;
    let mut line = serde_json::to_vec(&Question::Agents).map_err(|error| AgentsError::Answer(error.into()))?;
    line.push(b'\n');
    let answered = async {
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        (&mut stream).take(limits::ADMIN_ANSWER_MAX as u64).read_to_end(&mut answer).await?;
        Ok(serde_json::from_slice(&answer)?)
    };
    timeout(limits::ADMIN_TIMEOUT, answered)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(AgentsError::Answer)
}

/// Removes the socket when the gateway goes.
pub(super) struct Guard {
    path: PathBuf,
    /// Device and inode: what stands at the path later may be another gateway's.
    made: (u64, u64),
}

impl Drop for Guard {
    fn drop(&mut self) {
        match std::fs::symlink_metadata(&self.path) {
            Ok(now) if (now.dev(), now.ino()) == self.made => {}
            _ => return debug!("the admin socket is another gateway's by now"),
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            debug!(%error, "could not remove the admin socket");
        }
    }
}

/// Makes the socket, for this user alone. One that nobody listens on any more is replaced, and so is that of a gateway that
/// goes away. A `successor` replaces any gateway's: it takes over its listeners, too.
pub(super) async fn bind(path: &Path, successor: bool) -> io::Result<(UnixListener, Guard)> {
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something else at this path"));
        }
        let answers = UnixStream::connect(path).await.is_ok();
        if answers && !successor && !is_draining(path).await {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another gateway answers there"));
        }
    }
    // Bound under a name of its own in the same folder and renamed once its mode is set: it is never open to others.
    let mut staging = path.as_os_str().to_owned();
    staging.push(format!(".{}", std::process::id()));
    let staging = PathBuf::from(staging);
    // Left by a process of the same id that was killed in between; in a container every process has that id.
    match std::fs::remove_file(&staging) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&staging)?;
    let placed = std::fs::set_permissions(&staging, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::symlink_metadata(&staging))
        .and_then(|made| std::fs::rename(&staging, path).map(|()| (made.dev(), made.ino())));
    match placed {
        Ok(made) => Ok((listener, Guard { path: path.to_owned(), made })),
        Err(error) => {
            drop(std::fs::remove_file(&staging));
            Err(error)
        }
    }
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
pub(super) async fn serve(gateway: Arc<Gateway>, listener: UnixListener, guard: Guard) {
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
            let answered = timeout(limits::ADMIN_TIMEOUT, answer(&gateway, stream)).await;
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
    (&mut stream).take(limits::ADMIN_LINE_MAX as u64).read_until(b'\n', &mut line).await?;
    let draining = gateway.drain.begun().is_cancelled();
    let answer = match serde_json::from_slice(&line)? {
        Question::State => serde_json::to_vec(if draining { &State::Draining } else { &State::Serving })?,
        Question::Agents => {
            let rows: Vec<AgentRow> = gateway
                .roster
                .list()
                .iter()
                .map(|link| AgentRow {
                    organisation: link.name.organisation.to_string(),
                    agent: link.name.agent.to_string(),
                    replica: link.replica.to_string(),
                    address: link.address.to_string(),
                    version: link.version.clone(),
                    since: link.since.to_string(),
                    key: link.key.to_string(),
                    live: link.live(),
                    opened: link.opened(),
                    state: match link.is_retired() {
                        _ if draining || link.is_leaving() => "draining",
                        true => "retired",
                        false => "active",
                    }
                    .to_owned(),
                })
                .collect();
            serde_json::to_vec(&rows)?
        }
    };
    stream.write_all(&answer).await?;
    stream.shutdown().await
}

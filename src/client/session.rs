//! One session at a server: logging in, and asking for targets.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::certified::{self, CertifiedError};
use super::{Config, Server};
use crate::audit::Counters;
use crate::identity::{Certificate, Fingerprint};
use crate::limits;
use crate::target::Target;
use crate::task::Tasks;
use crate::tunnel::admit::{self, GreetError};
use crate::tunnel::connect::url::Transport;
use crate::tunnel::dial::{self, DialError, Dialled, Way};
use crate::tunnel::splice::{self, Bounds, End, Side};
use crate::tunnel::ssh::{self, Channel, ClientOptions, Flow, HandshakeError, LoginError};
use crate::tunnel::stream::Stream;
use crate::tunnel::wire::{self, ForwardId, Originator, Peer, RefusalCode};

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No connection.
    #[error("could not reach {server}")]
    Dial {
        /// Which.
        server: Server,
        /// Why.
        #[source]
        source: DialError,
    },
    /// No SSH server.
    #[error("could not speak to {server}")]
    Greet {
        /// Which.
        server: Server,
        /// Why.
        #[source]
        source: GreetError,
    },
    /// The host key.
    #[error(
        "{server} shows host key {shown}, which is not the one pinned: either its operator has changed the key, and can tell \
         you so (then pin this one), or somebody stands between"
    )]
    HostKey {
        /// Which.
        server: Server,
        /// The key it has shown.
        shown: String,
    },
    /// The handshake.
    #[error("the SSH handshake with {server} failed")]
    Handshake {
        /// Which.
        server: Server,
        /// Why.
        #[source]
        source: HandshakeError,
    },
    /// The login.
    #[error(
        "{server} did not let key {key} in as {user}{}; it does not say why: ask its operator, whose trail or log does",
        certified_too(.certificate)
    )]
    Login {
        /// Which.
        server: Server,
        /// With which key.
        key: Fingerprint,
        /// With which certificate besides.
        certificate: Option<String>,
        /// As whom.
        user: String,
        /// Why.
        #[source]
        source: LoginError,
    },
    /// Our certificate.
    #[error("no certificate to show {server}")]
    Certificate {
        /// Whom.
        server: Server,
        /// Why.
        #[source]
        source: Box<CertifiedError>,
    },
    /// A stock server, where one of ours is needed.
    #[error("{server} is no caponier agent: nobody's principal can be claimed there")]
    NoPrincipals {
        /// Which.
        server: Server,
    },
    /// Time.
    #[error("{server} has not let us in within {} s", limits::LOGIN_GRACE.as_secs())]
    Timeout {
        /// Which.
        server: Server,
    },
}

/// Why a target is not connected.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A policy says no.
    #[error("connecting to {target} is not allowed, by {}", decides(.server))]
    NotAllowed {
        /// Through which server.
        server: Server,
        /// Where to.
        target: Target,
    },
    /// The server takes on nothing new.
    #[error(
        "{server} goes away, so that it does not connect us to {target}; another one may be there already: try again"
    )]
    Draining {
        /// Through which server.
        server: Server,
        /// Where to.
        target: Target,
    },
    /// Anything else that a server does not explain.
    #[error("{target} is not available: {}", asks(.server))]
    NotAvailable {
        /// Through which server.
        server: Server,
        /// Where to.
        target: Target,
    },
    /// The session ended, or too much was asked of it.
    #[error("{server} did not connect us to {target}")]
    Open {
        /// Through which server.
        server: Server,
        /// Where to.
        target: Target,
        /// Why.
        #[source]
        source: ssh::OpenError,
    },
    /// Time.
    #[error("{server} has not connected us to {target} within {} s", limits::CLIENT_PATIENCE.as_secs())]
    Timeout {
        /// Through which server.
        server: Server,
        /// Where to.
        target: Target,
    },
}

fn certified_too(certificate: &Option<String>) -> String {
    certificate.as_ref().map(|words| format!(", nor with the {words}")).unwrap_or_default()
}

fn decides(server: &Server) -> String {
    match server {
        Server::Gateway { .. } => "the gateway's registry or the agent's own rules: their trails say why".to_owned(),
        Server::Bastion { .. } => format!(
            "{server}: at an agent its trail says which rule is missing, and a stock sshd forwards what its \
             AllowTcpForwarding and PermitOpen let it"
        ),
    }
}

fn asks(server: &Server) -> String {
    match server {
        Server::Gateway { .. } => {
            "is the agent linked, and does the target answer? The gateway's trail says why".to_owned()
        }
        Server::Bastion { .. } => {
            format!("does its name resolve at {server}, and does it answer there? The server's trail or log says why")
        }
    }
}

/// A session at a server.
pub struct Session {
    client: ssh::Client,
    server: Server,
    /// The streams that were handed out.
    streams: Tasks,
}

/// Logs in.
///
/// # Errors
/// If any step fails or all together take too long.
pub async fn connect(config: &Config, tasks: &Tasks) -> Result<Session, SessionError> {
    let server = config.server.clone();
    let certificate = certificate(config, tasks).await?;
    let way = Way { egress: config.egress.clone(), tls: config.tls.clone() };
    let dialled = match &server {
        Server::Gateway { url, .. } => dial::dial(url, &way, |_| ()).await,
        Server::Bastion { endpoint, .. } => dial::bare(endpoint, &way, |_| ()).await,
    };
    let dialled = dialled.map_err(|source| SessionError::Dial { server: server.clone(), source })?;
    let deadline = Instant::now() + limits::LOGIN_GRACE;
    timeout_at(deadline, log_in(config, certificate, dialled, deadline, tasks))
        .await
        .map_err(|_| SessionError::Timeout { server })?
}

/// Our certificate, as it is now.
async fn certificate(config: &Config, tasks: &Tasks) -> Result<Option<Certificate>, SessionError> {
    let Some(certified) = config.certificate.clone() else { return Ok(None) };
    let (key, server) = (config.key.public(), config.server.clone());
    let read = tasks.spawn_blocking(move || certified.show(&key, &server, Timestamp::now())).await;
    match read {
        Ok(Ok(certificate)) => Ok(certificate),
        Ok(Err(source)) => Err(SessionError::Certificate { server: config.server.clone(), source: Box::new(source) }),
        // The runtime is being shut down.
        Err(_) => Ok(None),
    }
}

async fn log_in(
    config: &Config,
    certificate: Option<Certificate>,
    dialled: Dialled,
    deadline: Instant,
    tasks: &Tasks,
) -> Result<Session, SessionError> {
    let server = &config.server;
    let Dialled { mut stream, head } = dialled;
    let greet = |source: GreetError| {
        let bare = matches!(server, Server::Gateway { url, .. } if url.transport() == Transport::Ssh);
        let source = if bare { source.of_dialled(server.target()) } else { source };
        SessionError::Greet { server: server.clone(), source }
    };
    let greeting = format!("{}\r\n", wire::CLIENT_LINE);
    stream.write_all(greeting.as_bytes()).await.map_err(|error| greet(GreetError::Io(error)))?;
    stream.flush().await.map_err(|error| greet(GreetError::Io(error)))?;
    let greeted = admit::greet(&mut stream, head, None, deadline).await.map_err(greet)?;
    match server {
        _ if greeted.peer == Peer::Door => {}
        Server::Bastion { principal: Some(_), .. } => {
            return Err(SessionError::NoPrincipals { server: server.clone() });
        }
        _ => debug!(peer = ?greeted.peer, "the peer is none of ours; its host key decides"),
    }
    let shown = Arc::new(std::sync::Mutex::new(String::from("none")));
    let options = ClientOptions {
        line: wire::CLIENT_LINE,
        said: true,
        head: greeted.head,
        host_key: Box::new({
            let (pin, shown) = (config.pin.clone(), shown.clone());
            move |key| {
                *shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = key.fingerprint().to_string();
                pin.holds(key)
            }
        }),
        // Only where one could be accepted is one asked for: else the gateway would show it in the place of a key that is pinned.
        host_certificate: config.pin.has_authorities().then(|| {
            let pin = config.pin.clone();
            Box::new(move |certificate: &Certificate| pin.certifies(certificate, Timestamp::now())) as _
        }),
        keepalive: limits::LINK_KEEPALIVE,
        flow: if greeted.peer == Peer::Door { Flow::Credit } else { Flow::Stock },
        report: Arc::new(|violation| warn!(?violation, "the server asked for something it never may; refused")),
    };
    let stranger = ssh::connect(stream, options).await.map_err(|source| match source {
        HandshakeError::HostKey => SessionError::HostKey {
            server: server.clone(),
            shown: shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone(),
        },
        source => SessionError::Handshake { server: server.clone(), source },
    })?;
    let shown = certificate.as_ref().map(certified::described);
    let stranger = stranger.with_certificate(certificate);
    let login = stranger.login(&server.user(), &config.key, tasks, limits::PENDING_OPENS_PER_SESSION).await;
    let client = login.map_err(|source| SessionError::Login {
        server: server.clone(),
        key: config.key.public().fingerprint(),
        certificate: shown,
        user: server.user(),
        source,
    })?;
    Ok(Session { client, server: server.clone(), streams: tasks.child() })
}

impl Session {
    /// Whether the session has ended.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.client.control().gone().is_cancelled()
    }

    /// Asks for a connection to `target`, on behalf of `client`.
    ///
    /// # Errors
    /// If it is refused, or takes too long.
    pub(super) async fn open(&self, target: &Target, client: &str) -> Result<Channel, OpenError> {
        let (server, target) = (self.server.clone(), target.clone());
        let originator = match &server {
            Server::Bastion { principal: Some(principal), .. } => {
                Originator { forward: ForwardId::random(), principal: principal.clone(), client: client.to_owned() }
                    .to_string()
            }
            _ => client.to_owned(),
        };
        // The gateway and the agent each have a deadline of their own, which tell more.
        match timeout(limits::CLIENT_PATIENCE, self.client.open(&target, &originator, None)).await {
            Err(_) => Err(OpenError::Timeout { server, target }),
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(ssh::OpenError::Refused { code: ssh::NOT_ALLOWED, .. })) => {
                Err(OpenError::NotAllowed { server, target })
            }
            Ok(Err(ssh::OpenError::Refused { code, .. })) if code == RefusalCode::Draining as u32 => {
                Err(OpenError::Draining { server, target })
            }
            Ok(Err(ssh::OpenError::Refused { .. })) => Err(OpenError::NotAvailable { server, target }),
            Ok(Err(source)) => Err(OpenError::Open { server, target, source }),
        }
    }

    /// A connection to `target` as a stream.
    ///
    /// # Errors
    /// As for any target: see [`OpenError`].
    pub async fn stream(&self, target: &Target) -> Result<DuplexStream, OpenError> {
        let channel = self.open(target, "127.0.0.1").await?;
        let (near, far) = tokio::io::duplex(limits::CHUNK * 2);
        let stop = self.streams.stopping().clone();
        self.streams.spawn(async move {
            let (end, remains) = splice::splice(
                Side::Stream(far.into()),
                Side::Channel(channel),
                &Counters::default(),
                Bounds::default(),
                &stop,
            )
            .await;
            debug!(?end, "a stream has ended");
            remains.leave().await;
        });
        Ok(near)
    }

    /// Carries `near` to `target` and back until both are done, and tells how that ended.
    ///
    /// # Errors
    /// If there is no connection to the target; see [`OpenError`].
    pub async fn carry(&self, target: &Target, near: Stream, stop: &CancellationToken) -> Result<End, OpenError> {
        let Some(opened) = stop.run_until_cancelled(self.open(target, "127.0.0.1")).await else {
            return Ok(End::Stopped);
        };
        let channel = opened?;
        let (near, far) = (Side::Stream(near), Side::Channel(channel));
        let (end, remains) = splice::splice(near, far, &Counters::default(), Bounds::default(), stop).await;
        remains.leave().await;
        Ok(end)
    }

    /// Ends the session, once the streams that were dropped have said their goodbyes.
    pub async fn close(&self) {
        if !self.streams.settle(limits::GOODBYE_PATIENCE).await {
            debug!("a stream was still open when the session was closed");
        }
        self.streams.stop();
        self.client.disconnect("done").await;
        drop(timeout(limits::GOODBYE_PATIENCE, self.client.control().gone().cancelled()).await);
        self.client.control().cut();
    }
}

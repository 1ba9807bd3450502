//! The client side: a session at a gateway's SSH door or at any bastion, an agent that listens or a stock `sshd`, for
//! `caponier forward` and `caponier provision`.
//!
//! Promised: the server's host key is pinned, by a fingerprint or a `known_hosts` file, and never trusted because it is
//! the first one seen; where a CA is named that vouches for it, a certificate of that CA, with the server's name, does as
//! well; what the server opens toward us is refused; a server that is none of ours is spoken to as any stock client does,
//! with the same list of algorithms.
//!
//! What waits on what: a [`Session`] is one task of the SSH library. Each listener of [`forward`] has a task that accepts,
//! and each connection one that moves its bytes; all end with the stop token.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use jiff::Timestamp;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::audit::Counters;
use crate::backoff::Backoff;
use crate::chain::Chain;
use crate::identity::certificate::{Revocations, Trust, Use};
use crate::identity::{AgentName, Certificate, Fingerprint, PrincipalId, PrivateKey, PublicKey};
use crate::limits;
use crate::secret;
use crate::target::Target;
use crate::task::Tasks;
use crate::tunnel::admit::{self, GreetError};
use crate::tunnel::connect::Egress;
use crate::tunnel::connect::url::GatewayUrl;
use crate::tunnel::dial::{self, DialError, Dialled, Way};
use crate::tunnel::splice::{self, Bounds, Side};
use crate::tunnel::ssh::{self, Channel, ClientOptions, Flow, HandshakeError, LoginError};
use crate::tunnel::wire::{self, ForwardId, Originator, Peer, RefusalCode};

/// How to log in to a server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where, and as whom.
    pub server: Server,
    /// Our key.
    pub key: PrivateKey,
    /// The server's host keys, of which it must show one.
    pub pin: Pin,
    /// Directly, or through a proxy.
    pub egress: Egress,
}

/// A server that leads to targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// A gateway of ours.
    Gateway {
        /// Where.
        url: GatewayUrl,
        /// Which agent's targets are wanted.
        agent: AgentName,
    },
    /// An SSH server that forwards: an agent that listens, or any other.
    Bastion {
        /// Where.
        endpoint: Target,
        /// As whom; at an agent, for which organisation.
        user: User,
        /// For whom our key speaks; only an agent has an ear for that.
        principal: Option<PrincipalId>,
    },
}

impl Server {
    /// Where it is.
    #[must_use]
    pub fn target(&self) -> &Target {
        match self {
            Self::Gateway { url, .. } => url.target(),
            Self::Bastion { endpoint, .. } => endpoint,
        }
    }

    /// The name that we log in with.
    #[must_use]
    pub fn user(&self) -> String {
        match self {
            Self::Gateway { agent, .. } => agent.to_string(),
            Self::Bastion { user, .. } => user.0.clone(),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gateway { url, .. } => write!(f, "gateway {url}"),
            Self::Bastion { endpoint, .. } => write!(f, "SSH server {endpoint}"),
        }
    }
}

/// A user at a bastion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User(String);

/// Why this is no user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a user is 1 to {USER_MAX} characters without spaces and control characters")]
pub struct UserError;

impl FromStr for User {
    type Err = UserError;

    fn from_str(text: &str) -> Result<Self, UserError> {
        let fits = |c: char| !c.is_control() && !c.is_whitespace();
        if text.is_empty() || text.len() > USER_MAX || !text.chars().all(fits) {
            return Err(UserError);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What PAM and directories take at most.
const USER_MAX: usize = 255;

/// The port of SSH (RFC 4253 §4.2).
pub const SSH_PORT: u16 = 22;

/// Which host keys a server may have, and whose certificates for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    keys: Vec<Fingerprint>,
    authorities: Vec<PublicKey>,
    /// Keys that count for nothing, whoever signed them.
    revoked: Vec<Fingerprint>,
    /// The name that a certificate must have.
    host: String,
}

/// Why a `known_hosts` file does not pin a server.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The file.
    #[error("could not read the known_hosts file {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line of it.
    #[error("the known_hosts file {} is not well formed", .path.display())]
    Form {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: russh::keys::Error,
    },
    /// Nothing in it.
    #[error(
        "the known_hosts file {} has no key for {server}; compare the fingerprint that its operator gives you with what \
         `ssh-keyscan` shows, then add the line", .path.display()
    )]
    Unknown {
        /// Which.
        path: PathBuf,
        /// Whose key is missing.
        server: Target,
    },
}

impl Pin {
    /// One key, by fingerprint.
    #[must_use]
    pub fn fingerprint(fingerprint: Fingerprint) -> Self {
        Self { keys: vec![fingerprint], authorities: Vec::new(), revoked: Vec::new(), host: String::new() }
    }

    /// The keys that an OpenSSH `known_hosts` file has for the server, hashed names included, and the CAs
    /// (`@cert-authority`) whose certificates it takes, without those it revokes.
    ///
    /// # Errors
    /// If the file cannot be read or has none.
    pub fn known_hosts(path: &Path, target: &Target) -> Result<Self, PinError> {
        let text = std::fs::read_to_string(path).map_err(|source| PinError::Read { path: path.to_owned(), source })?;
        let revoked: Vec<Fingerprint> = text
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("@revoked"))
            .filter_map(|rest| {
                let mut words = rest.split_whitespace().skip(1);
                let key = format!("{} {}", words.next()?, words.next()?);
                PublicKey::parse(&key).ok().map(|key| key.fingerprint())
            })
            .collect();
        let keys = russh::keys::known_hosts::known_host_keys_path(&target.host.to_string(), target.port, path)
            .map_err(|source| PinError::Form { path: path.to_owned(), source })?;
        let pinned: Vec<Fingerprint> = keys
            .into_iter()
            .filter_map(|(_, key)| PublicKey::from_ssh(key).ok())
            .map(|key| key.fingerprint())
            .filter(|fingerprint| !revoked.contains(fingerprint))
            .collect();
        let authorities: Vec<PublicKey> = text
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("@cert-authority"))
            .filter_map(|rest| {
                let mut words = rest.split_whitespace();
                let named = names(words.next()?, &target.host.to_string(), target.port);
                let key = format!("{} {}", words.next()?, words.next()?);
                PublicKey::parse(&key).ok().filter(|key| named && !revoked.contains(&key.fingerprint()))
            })
            .collect();
        if pinned.is_empty() && authorities.is_empty() {
            return Err(PinError::Unknown { path: path.to_owned(), server: target.clone() });
        }
        Ok(Self { keys: pinned, authorities, revoked, host: target.host.to_string() })
    }

    fn holds(&self, key: &PublicKey) -> bool {
        self.keys.contains(&key.fingerprint())
    }

    fn certifies(&self, certificate: &Certificate, now: Timestamp) -> bool {
        let trusted = |authority: &PublicKey| {
            let trust = Trust { authority, revocations: &Revocations::default() };
            certificate.judge(trust, Use::Host(&self.host), now).is_ok()
        };
        !self.revoked.contains(&certificate.subject().fingerprint()) && self.authorities.iter().any(trusted)
    }
}

/// Whether the patterns of a line in `known_hosts` (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT") name a host. One that is negated
/// stands against all others. Hashed names have no patterns, and are not read here.
fn names(patterns: &str, host: &str, port: u16) -> bool {
    let name = if port == 22 { host.to_owned() } else { format!("[{host}]:{port}") };
    let matched =
        |pattern: &str| matches(pattern.to_ascii_lowercase().as_bytes(), name.to_ascii_lowercase().as_bytes());
    let (negated, named): (Vec<_>, Vec<_>) = patterns.split(',').partition(|pattern| pattern.starts_with('!'));
    named.into_iter().any(matched) && !negated.into_iter().any(|pattern| matched(&pattern[1..]))
}

/// `*` stands for any characters, `?` for one. Takes at most as many steps as both lengths multiplied.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut read, mut star) = (0, 0, None);
    while read < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, read));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[read] => {
                at += 1;
                read += 1;
            }
            _ => match star {
                Some((begun, taken)) => {
                    star = Some((begun, taken + 1));
                    at = begun + 1;
                    read = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

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
        "{server} did not let key {key} in as {user}; it does not say why: ask its operator, whose trail or log does"
    )]
    Login {
        /// Which.
        server: Server,
        /// With which key.
        key: Fingerprint,
        /// As whom.
        user: String,
        /// Why.
        #[source]
        source: LoginError,
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
    let way = Way { egress: config.egress.clone() };
    let dialled = match &server {
        Server::Gateway { url, .. } => dial::dial(url, &way, |_| ()).await,
        Server::Bastion { endpoint, .. } => dial::bare(endpoint, &way, |_| ()).await,
    };
    let dialled = dialled.map_err(|source| SessionError::Dial { server: server.clone(), source })?;
    let deadline = Instant::now() + limits::LOGIN_GRACE;
    timeout_at(deadline, log_in(config, dialled, deadline, tasks))
        .await
        .map_err(|_| SessionError::Timeout { server })?
}

async fn log_in(config: &Config, dialled: Dialled, deadline: Instant, tasks: &Tasks) -> Result<Session, SessionError> {
    let server = &config.server;
    let Dialled { mut stream, head } = dialled;
    let greet = |source| SessionError::Greet { server: server.clone(), source };
    let greeting = format!("{}\r\n", wire::CLIENT_LINE);
    stream.write_all(greeting.as_bytes()).await.map_err(|error| greet(GreetError::Io(error)))?;
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
        host_certificate: (!config.pin.authorities.is_empty()).then(|| {
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
    let client = stranger.login(&server.user(), &config.key, tasks, limits::PENDING_OPENS_PER_SESSION).await.map_err(
        |source| SessionError::Login {
            server: server.clone(),
            key: config.key.public().fingerprint(),
            user: server.user(),
            source,
        },
    )?;
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
    async fn open(&self, target: &Target, client: &str) -> Result<Channel, OpenError> {
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

/// A local listener and where its connections go.
#[derive(Debug)]
pub struct Forward {
    /// The listener.
    pub listener: TcpListener,
    /// Where to.
    pub target: Target,
}

/// Forwards connections until `stop`. A session that is lost, or whose server goes away, is made anew when the next
/// connection comes; what runs on the old one goes on.
pub async fn forward(
    config: Config,
    session: Session,
    forwards: Vec<Forward>,
    tasks: &Tasks,
    stop: &CancellationToken,
) {
    let keeper = Arc::new(Keeper { config, held: Mutex::new(Held::new(session)), tasks: tasks.clone() });
    for forward in forwards {
        let (keeper, stop) = (keeper.clone(), stop.clone());
        tasks.spawn(async move { accept(&keeper, forward, &stop).await });
    }
    stop.cancelled().await;
    let session = keeper.held.lock().await.session.clone();
    session.close().await;
}

struct Keeper {
    config: Config,
    held: Mutex<Held>,
    tasks: Tasks,
}

/// The session in use, and when another may be made.
struct Held {
    session: Arc<Session>,
    since: Instant,
    /// Set when the gateway has refused a forward because it goes away.
    spent: bool,
    backoff: Backoff,
    /// No login before this.
    not_before: Instant,
    /// Why the last one failed.
    failed: String,
}

impl Held {
    fn new(session: Session) -> Self {
        let now = Instant::now();
        let backoff = Backoff::new(limits::RECONNECT_FIRST, limits::RECONNECT_CAP);
        Self { session: Arc::new(session), since: now, spent: false, backoff, not_before: now, failed: String::new() }
    }

    /// The session is of no more use. One that was good for long is replaced at once; one that was not, after a wait, so that
    /// a gateway that always says so is not asked ever faster.
    fn give_up(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.since) >= limits::LINK_PROVED {
            self.backoff.reset();
        } else {
            self.not_before = now + self.backoff.fail(secret::random_u32());
            self.failed = "the last session ended soon after it was made".to_owned();
        }
        self.spent = true;
    }
}

impl Keeper {
    /// The session, made anew if it was lost or is `not` to be used any more. Attempts that fail are made again, at growing
    /// intervals for all who wait together, for as long as a connection can be asked to wait.
    async fn session(&self, not: Option<&Arc<Session>>) -> Result<Arc<Session>, String> {
        let deadline = Instant::now() + limits::RELOGIN_PATIENCE;
        loop {
            let mut held = self.held.lock().await;
            let unwanted = not.is_some_and(|not| Arc::ptr_eq(not, &held.session));
            if !held.spent && (held.session.is_gone() || unwanted) {
                held.give_up();
            }
            if !held.spent {
                return Ok(held.session.clone());
            }
            let wait = held.not_before;
            if wait >= deadline {
                return Err(held.failed.clone());
            }
            if wait > Instant::now() {
                drop(held);
                tokio::time::sleep_until(wait).await;
                continue;
            }
            info!("{}: the session has ended; logging in again", self.config.server);
            match connect(&self.config, &self.tasks).await {
                Ok(session) => {
                    held.session = Arc::new(session);
                    held.since = Instant::now();
                    held.spent = false;
                    return Ok(held.session.clone());
                }
                Err(error) => {
                    held.not_before = Instant::now() + held.backoff.fail(secret::random_u32());
                    held.failed = Chain(&error).to_string();
                    // A gateway that is being started again answers soon. One with another key, or that does not know ours,
                    // says what has to be mended.
                    let final_word = matches!(
                        error,
                        SessionError::HostKey { .. } | SessionError::Login { source: LoginError::Refused { .. }, .. }
                    );
                    if final_word {
                        return Err(held.failed.clone());
                    }
                    debug!(error = held.failed, "could not log in again; trying once more");
                }
            }
        }
    }

    /// A channel to `target`, and the session that it belongs to. Where the gateway goes away before it has answered, the
    /// next one is asked, once: nothing has been sent yet.
    async fn open(&self, target: &Target, client: &str) -> Result<(Arc<Session>, Channel), String> {
        let said = |error: &OpenError| Chain(error).to_string();
        let session = self.session(None).await?;
        match session.open(target, client).await {
            Ok(channel) => Ok((session, channel)),
            Err(OpenError::Draining { .. } | OpenError::Open { source: ssh::OpenError::Gone, .. }) => {
                debug!("the session has ended before it gave an answer; asking once more");
                let session = self.session(Some(&session)).await?;
                let channel = session.open(target, client).await.map_err(|error| said(&error))?;
                Ok((session, channel))
            }
            Err(error) => Err(said(&error)),
        }
    }
}

async fn accept(keeper: &Arc<Keeper>, forward: Forward, stop: &CancellationToken) {
    let room = Arc::new(Semaphore::new(limits::CHANNELS_PER_SESSION));
    loop {
        let accepted = tokio::select! {
            accepted = forward.listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "could not accept a local connection");
                tokio::select! {
                    () = tokio::time::sleep(limits::ACCEPT_PAUSE) => continue,
                    () = stop.cancelled() => return,
                }
            }
        };
        let Ok(place) = room.clone().try_acquire_owned() else {
            warn!("refused a local connection: {} are open already", limits::CHANNELS_PER_SESSION);
            continue;
        };
        let (keeper, target, stop) = (keeper.clone(), forward.target.clone(), stop.clone());
        let tasks = keeper.tasks.clone();
        tasks.spawn(async move {
            carry(&keeper, stream, client, &target, &stop).await;
            drop(place);
        });
    }
}

async fn carry(keeper: &Keeper, stream: TcpStream, client: SocketAddr, target: &Target, stop: &CancellationToken) {
    let opened = async {
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        keeper.open(target, &client.ip().to_string()).await
    };
    match opened.await {
        // The session is held for as long as one of its channels is in use.
        Ok((_session, channel)) => {
            let (end, remains) = splice::splice(
                Side::Tcp(stream),
                Side::Channel(channel),
                &Counters::default(),
                Bounds::default(),
                stop,
            )
            .await;
            debug!(?end, "a forward has ended");
            remains.leave().await;
        }
        Err(error) => {
            warn!("{error}");
            // There is no way to say why on a plain socket; a reset at least does not look like an orderly end.
            drop(stream.set_zero_linger());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::identity::Algorithm;

    #[test]
    fn known_hosts_pin_only_what_is_listed_for_the_gateway_and_not_revoked() {
        let key = || PrivateKey::generate(Algorithm::Ed25519).public();
        let (ours, other, gone) = (key(), key(), key());
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        writeln!(file, "# a comment").expect("written");
        writeln!(file, "[gateway.example]:443 {}", ours.to_openssh()).expect("written");
        writeln!(file, "gateway.example {}", other.to_openssh()).expect("written");
        writeln!(file, "[gateway.example]:443 {}", gone.to_openssh()).expect("written");
        writeln!(file, "@revoked * {}", gone.to_openssh()).expect("written");
        let pin = Pin::known_hosts(file.path(), &"gateway.example:443".parse().expect("a target")).expect("pinned");
        assert!(pin.holds(&ours));
        assert!(!pin.holds(&other) && !pin.holds(&gone));
        let unknown = Pin::known_hosts(file.path(), &"other.example:443".parse().expect("a target"));
        assert!(matches!(unknown, Err(PinError::Unknown { .. })));
        let missing = Pin::known_hosts(Path::new("/nonexistent"), &"gateway.example:443".parse().expect("a target"));
        assert!(matches!(missing, Err(PinError::Read { .. })));
    }

    #[test]
    fn a_line_of_known_hosts_names_by_patterns() {
        for (patterns, host, port, named) in [
            ("gw.example.com", "gw.example.com", 22, true),
            ("gw.example.com", "GW.example.com", 22, true),
            ("gw.example.com", "gw.example.com", 443, false),
            ("[gw.example.com]:443", "gw.example.com", 443, true),
            ("*", "gw.example.com", 443, true),
            ("*.example.com", "gw.example.com", 22, true),
            ("*.example.com", "example.com", 22, false),
            ("*.example.com", "gw.example.org", 22, false),
            ("gw?.example.com", "gw1.example.com", 22, true),
            ("other,[*.example.com]:443", "gw.example.com", 443, true),
            ("*.example.com,!gw.example.com", "gw.example.com", 22, false),
            ("!gw.example.com", "gw.example.com", 22, false),
            ("!gw.example.com", "other.example.com", 22, false),
            ("", "gw.example.com", 22, false),
            ("|1|x|y", "gw.example.com", 22, false),
            ("*a*b*c*", "xaxbxcx", 22, true),
            ("*a*b*c*", "xaxcxbx", 22, false),
        ] {
            assert_eq!(names(patterns, host, port), named, "{patterns} {host} {port}");
        }
    }

    #[test]
    fn a_ca_of_known_hosts_vouches_for_the_gateway_alone() {
        use crate::identity::certificate::Kind;
        use crate::identity::certificate::forge::Forge;
        let [ca, other, gone] = std::array::from_fn(|_| PrivateKey::generate(Algorithm::Ed25519));
        let file = tempfile::NamedTempFile::new().expect("a file");
        let line = |key: &PrivateKey| key.public().to_openssh();
        let text = format!(
            "@cert-authority *.example {}\n@cert-authority other.test {}\n@revoked * {}\n@cert-authority * {}\n",
            line(&ca),
            line(&other),
            line(&gone),
            line(&gone)
        );
        std::fs::write(file.path(), text).expect("written");
        let gateway = "gateway.example:22".parse().expect("a target");
        let pin = Pin::known_hosts(file.path(), &gateway).expect("pinned");
        let host = |ca: &PrivateKey| Forge { kind: Kind::Host, ..Forge::new(ca, &["gateway.example"]) };
        let good = host(&ca);
        let certifies =
            |forge: &Forge, second| pin.certifies(&forge.sign(), Timestamp::from_second(second).expect("a time"));
        assert!(certifies(&good, 1500));
        for (what, forge) in [
            ("another name", Forge { principals: vec!["other.example".to_owned()], ..good.clone() }),
            ("no name", Forge { principals: Vec::new(), ..good.clone() }),
            ("a user's", Forge { kind: Kind::User, ..good.clone() }),
            ("a CA of others", host(&other)),
            ("a CA that was revoked", host(&gone)),
            ("an unknown CA", host(&PrivateKey::generate(Algorithm::Ed25519))),
            ("a key that was revoked", Forge { subject: gone.public(), ..good.clone() }),
        ] {
            assert!(!certifies(&forge, 1500), "{what}");
        }
        assert!(!certifies(&good, 999) && !certifies(&good, 2000));
        assert!(!pin.holds(&ca.public()), "a CA's key is no host key");
    }
}

//! SSH sessions in both roles, and their channels as streams: the only way to the SSH library.
//!
//! Promised, where the library by itself promises less:
//! - algorithms are listed, never defaulted: ML-KEM and X25519 key exchange, AES-GCM alone (so that Terrapin has nothing to
//!   work on), no SHA-1, no finite-field groups, no compression;
//! - a session can be cut at once and tells when it is gone ([`Control`]);
//! - an open that nobody waits for any more is closed when its confirmation comes, and a channel is closed on every way out;
//! - a writer that waits for window ends when its channel or session does;
//! - in the client role every channel the server opens is refused and reported; in the server role everything but
//!   `direct-tcpip`, and on agents the control channel, is refused.
//!
//! What waits on what: a session is one task of the library, which ends when its stream does. Its handler waits for
//! nothing: opens are handed over through a bounded queue. **A session and the tasks that use its channels must run on the
//! same thread** (a current-thread runtime): the library takes the confirmation of an open and the data that follows it
//! from two queues, and on several threads may look at the second one first and drop the data.

mod channel;
mod handler;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use russh::keys::agent::AgentIdentity;
use russh::keys::signature::Signer as _;
use russh::keys::ssh_key::Signature;
use russh::keys::{HashAlg, PrivateKeyWithHashAlg};
use russh::{
    ChannelOpenFailure, ChannelReadHalf, ChannelWriteHalf, Preferred, SshId, cipher, client, compression, kex, mac,
    server,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use channel::Half;
pub use channel::{Channel, Event, Flow, Reader, Returns, Writer};

use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::transport::{Control, CutOnDrop, Transport};
use super::wire::{self, ForwardId, RefusalCode};
use crate::audit::{self, Kind, Trail};
use crate::chain::Chain;
use crate::identity::{Certificate, PrivateKey, PublicKey};
use crate::limits;
use crate::target::Target;
use crate::task::Tasks;

/// What a peer in the server role tried that it must not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// It opened a channel of this type toward us.
    OpenedChannel(&'static str),
}

/// Reports what a peer tried; it must not wait.
pub type Report = Arc<dyn Fn(Violation) + Send + Sync>;

/// Judges a host key; it must not wait.
pub type HostKeyCheck = Box<dyn Fn(&PublicKey) -> bool + Send + Sync>;

/// Judges a host certificate, whose CA has signed it; it must not wait.
pub type HostCertificateCheck = Box<dyn Fn(&Certificate) -> bool + Send + Sync>;

/// How to be a client on a stream.
pub struct ClientOptions {
    /// Our identification string.
    pub line: &'static str,
    /// Whether the peer has it already.
    pub said: bool,
    /// What was read from the stream already, to be replayed.
    pub head: Bytes,
    /// Which host keys are accepted.
    pub host_key: HostKeyCheck,
    /// Which host certificates are accepted, in the place of their keys. Without this none is asked for or accepted.
    pub host_certificate: Option<HostCertificateCheck>,
    /// Keepalives are sent this often.
    pub keepalive: Duration,
    /// Whether the peer is one of our ends.
    pub flow: Flow,
    /// Who hears of violations.
    pub report: Report,
}

/// Why a session did not come about.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The host key is not accepted.
    #[error("the peer's host key is not one that is accepted for it")]
    HostKey,
    /// One of our own ends without strict key exchange, or somebody between who has taken it out of the offer.
    #[error("the peer does not keep to strict key exchange, which all of our ends do: somebody may stand between")]
    NotStrict,
    /// Anything else.
    #[error("the SSH handshake failed")]
    Ssh(#[source] russh::Error),
    /// The peer broke off.
    #[error("the peer closed the connection during the SSH handshake")]
    Closed,
}

/// Why a login failed.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// Refused.
    #[error("the peer does not accept this key for user {user}")]
    Refused {
        /// Who we tried to be.
        user: String,
    },
    /// The session ended first.
    #[error("the session ended during login")]
    Ssh(#[source] russh::Error),
}

/// Why a channel did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The peer refused.
    #[error("the peer refused: {words}")]
    Refused {
        /// Its reason code: one of ours, or one of RFC 4254 §5.1.
        code: u32,
        /// Its words, bounded and printable, where the forward had an id to find them by; else the library's.
        words: String,
    },
    /// The session ended.
    #[error("the session ended")]
    Gone,
}

/// The outside of a session in the client role. Clones share it.
#[derive(Clone)]
pub struct Client {
    handle: Arc<client::Handle<handler::Client>>,
    control: Control,
    failures: Failures,
    opens: Arc<Semaphore>,
    answers: Answers,
    host_key: PublicKey,
    flow: Flow,
    tasks: Tasks,
}

/// Whether the peer answers opens at all. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Answers(Arc<Mutex<Asked>>);

#[derive(Debug, Default)]
struct Asked {
    /// Opens that the peer was asked for since it last answered one.
    opens: usize,
    since: Option<Instant>,
    /// Opens that it was asked for at all.
    total: u64,
}

impl Answers {
    /// Counts an open that the peer is asked for.
    pub fn asked(&self, now: Instant) {
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        asked.opens += 1;
        asked.total += 1;
        asked.since.get_or_insert(now);
    }

    /// Counts an answer, whatever it says.
    pub fn answered(&self) {
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (asked.opens, asked.since) = (0, None);
    }

    /// How many opens the peer was asked for in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).total
    }

    /// Whether the peer has answered none of at least so many opens, the first of which was asked for so long ago.
    #[must_use]
    pub fn are_missing(&self, opens: usize, patience: Duration, now: Instant) -> bool {
        let asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        asked.opens >= opens && asked.since.is_some_and(|since| now.duration_since(since) >= patience)
    }
}

/// Descriptions of refused opens, by forward id: the library hands them to the handler alone.
type Failures = Arc<Mutex<HashMap<ForwardId, String>>>;

/// A session in the client role whose login is still to come.
pub struct Stranger {
    certificate: Option<Certificate>,
    handle: client::Handle<handler::Client>,
    control: Control,
    failures: Failures,
    host_key: PublicKey,
    flow: Flow,
    cut: CutOnDrop,
}

/// Becomes a client on `stream`, up to the end of the key exchange. Dropping the future cuts the session.
///
/// # Errors
/// If the handshake fails or the host key is not accepted.
pub async fn connect<S>(stream: S, options: ClientOptions) -> Result<Stranger, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let control = Control::new();
    let cut = control.cut_on_drop();
    let unsaid = if options.said { options.line.len() + 2 } else { 0 };
    // In a box: the library moves it about, and keeps room for it in several places of its future.
    let stream = Box::new(Transport::new(stream, &control, options.head, unsaid));
    let failures = Failures::default();
    let host_key = Arc::new(Mutex::new(handler::HostKey::Unseen));
    let preferred = preferred(options.host_certificate.is_some());
    let handler = handler::Client {
        check: options.host_key,
        check_certificate: options.host_certificate,
        strict: matches!(options.flow, Flow::Credit),
        host_key: host_key.clone(),
        failures: failures.clone(),
        report: options.report,
        control: control.clone(),
        violations: 0,
    };
    let config = client::Config {
        client_id: SshId::Standard(options.line.into()),
        limits: rekey_limits(),
        window_size: options.flow.window(),
        maximum_packet_size: options.flow.packet(),
        channel_buffer_size: limits::CHANNEL_QUEUE,
        preferred,
        inactivity_timeout: Some(options.keepalive * 5),
        keepalive_interval: Some(options.keepalive),
        keepalive_max: 1,
        anonymous: false,
        gex: client::GexParams::default(),
        nodelay: false,
    };
    let result = client::connect_stream(Arc::new(config), stream, handler).await;
    let seen =
        std::mem::replace(&mut *host_key.lock().unwrap_or_else(PoisonError::into_inner), handler::HostKey::Unseen);
    match (result, seen) {
        (Ok(handle), handler::HostKey::Accepted(host_key)) => {
            Ok(Stranger { certificate: None, handle, control, failures, host_key, flow: options.flow, cut })
        }
        (_, handler::HostKey::Refused) => Err(HandshakeError::HostKey),
        (_, handler::HostKey::NotStrict) => Err(HandshakeError::NotStrict),
        (Err(russh::Error::Disconnect | russh::Error::HUP), _) => Err(HandshakeError::Closed),
        (Err(russh::Error::IO(error)), _) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(HandshakeError::Closed)
        }
        (Err(error), _) => Err(HandshakeError::Ssh(error)),
        (Ok(_), _) => Err(HandshakeError::HostKey),
    }
}

impl Stranger {
    /// The host key that was accepted.
    #[must_use]
    pub fn host_key(&self) -> &PublicKey {
        &self.host_key
    }

    /// Logs in with this certificate, where it is accepted, before the plain key is tried.
    #[must_use]
    pub fn with_certificate(self, certificate: Option<Certificate>) -> Self {
        Self { certificate, ..self }
    }

    /// Logs in as `user` with `key`. Dropping the future cuts the session. Opens that outlive their requester belong to
    /// `tasks`, and so many of them may be under way at once.
    ///
    /// # Errors
    /// If the peer does not accept the key, or goes away.
    pub async fn login(
        mut self,
        user: &str,
        key: &PrivateKey,
        tasks: &Tasks,
        opens: usize,
    ) -> Result<Client, LoginError> {
        if let Some(certificate) = self.certificate.take()
            && self.log_in_certified(user, key, &certificate).await?
        {
            return Ok(self.logged_in(tasks, opens));
        }
        // For RSA, SHA-512: every server worth talking to has had it since 2016. Other keys ignore it.
        let key = PrivateKeyWithHashAlg::new(key.as_ssh().clone(), Some(HashAlg::Sha512));
        let result = self.handle.authenticate_publickey(user, key).await.map_err(LoginError::Ssh)?;
        if !result.success() {
            return Err(LoginError::Refused { user: user.to_owned() });
        }
        Ok(self.logged_in(tasks, opens))
    }

    /// Whether the peer accepts the certificate.
    async fn log_in_certified(
        &mut self,
        user: &str,
        key: &PrivateKey,
        certificate: &Certificate,
    ) -> Result<bool, LoginError> {
        let hash = certificate.subject().as_ssh().algorithm().is_rsa().then_some(HashAlg::Sha512);
        let mut holder = Holder(key.clone());
        let whole = certificate.as_ssh().clone();
        match self.handle.authenticate_certificate_with(user, whole, hash, &mut holder).await {
            Ok(result) => Ok(result.success()),
            Err(NotSigned(error)) => Err(LoginError::Ssh(error)),
        }
    }

    fn logged_in(self, tasks: &Tasks, opens: usize) -> Client {
        self.cut.disarm();
        self.control.know();
        Client {
            handle: Arc::new(self.handle),
            control: self.control,
            failures: self.failures,
            opens: Arc::new(Semaphore::new(opens)),
            answers: Answers::default(),
            host_key: self.host_key,
            flow: self.flow,
            tasks: tasks.clone(),
        }
    }
}

/// Signs logins by certificate: the library's own way does so with SHA-1 where the key is an RSA key.
struct Holder(PrivateKey);

struct NotSigned(russh::Error);

impl From<russh::SendError> for NotSigned {
    fn from(_: russh::SendError) -> Self {
        Self(russh::Error::SendError)
    }
}

impl russh::Signer for Holder {
    type Error = NotSigned;

    /// What is to be signed, with the signature after it: for RSA one with SHA-512.
    async fn auth_sign(
        &mut self,
        _key: &AgentIdentity,
        _hash: Option<HashAlg>,
        mut to_sign: Vec<u8>,
    ) -> Result<Vec<u8>, NotSigned> {
        let failed = || NotSigned(russh::Error::WrongServerSig);
        let signature: Signature = self.0.as_ssh().try_sign(&to_sign).map_err(|_| failed())?;
        let signature = Vec::<u8>::try_from(signature).map_err(|_| failed())?;
        let len = u32::try_from(signature.len()).map_err(|_| failed())?;
        to_sign.extend_from_slice(&len.to_be_bytes());
        to_sign.extend_from_slice(&signature);
        Ok(to_sign)
    }
}

impl Client {
    /// The host key of the peer.
    #[must_use]
    pub fn host_key(&self) -> &PublicKey {
        &self.host_key
    }

    /// The session's switch.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Whether the peer answers opens. Those that nobody waits for any more count too.
    #[must_use]
    pub fn answers(&self) -> &Answers {
        &self.answers
    }

    /// Makes this end break the rules of credit.
    #[cfg(test)]
    pub(crate) fn ignore_credit(&mut self) {
        self.flow = Flow::Plain;
    }

    /// Asks the peer to connect to `target` (RFC 4254 §7.2). With `forward`, a refusal's description is looked for under
    /// that id. The future may be dropped: a confirmation that comes later is answered with a close.
    ///
    /// # Errors
    /// If the peer refuses, or the session ends.
    pub async fn open(
        &self,
        target: &Target,
        originator: &str,
        forward: Option<&ForwardId>,
    ) -> Result<Channel, OpenError> {
        // Who comes while too many are under way waits; how long is the caller's to say.
        let permit = self.opens.clone().acquire_owned().await.map_err(|_| OpenError::Gone)?;
        let noted = forward.map(|forward| Noted::new(&self.failures, forward));
        let (host, port) = (target.host.to_string(), u32::from(target.port));
        let originator = originator.to_owned();
        let handle = self.handle.clone();
        let result =
            self.detached(permit, self.flow, async move {
                handle.channel_open_direct_tcpip(host, port, originator, 0).await
            })
            .await?;
        result.map_err(|code| {
            let words = noted.and_then(|noted| noted.words()).unwrap_or_else(|| {
                // A refusal without our forward's id, as a stock peer's: what its code means is all there is to tell.
                match RefusalCode::from_wire(code.code()) {
                    Some(ours) => ours.as_str().to_owned(),
                    None => code.description().to_owned(),
                }
            });
            OpenError::Refused { code: code.code(), words }
        })
    }

    /// Opens a session channel and asks for `subsystem` on it (RFC 4254 §6.5).
    ///
    /// # Errors
    /// If the peer refuses either, or the session ends.
    pub async fn subsystem(&self, subsystem: &'static str) -> Result<Channel, OpenError> {
        // Who comes while too many are under way waits; how long is the caller's to say.
        let permit = self.opens.clone().acquire_owned().await.map_err(|_| OpenError::Gone)?;
        let handle = self.handle.clone();
        let result = self.detached(permit, Flow::Plain, async move { handle.channel_open_session().await }).await?;
        let refused = |words: &str| OpenError::Refused { code: NOT_AVAILABLE, words: words.to_owned() };
        let mut channel = result.map_err(|code| refused(code.description()))?;
        match channel.request_subsystem(subsystem).await {
            Some(true) => Ok(channel),
            Some(false) => Err(refused("the subsystem is refused")),
            None => Err(OpenError::Gone),
        }
    }

    /// Runs an open in a task of its own, since it must not be dropped half-way.
    async fn detached<F>(
        &self,
        permit: OwnedSemaphorePermit,
        flow: Flow,
        open: F,
    ) -> Result<Result<Channel, ChannelOpenFailure>, OpenError>
    where
        F: Future<Output = Result<russh::Channel<client::Msg>, russh::Error>> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let (tasks, control, answers) = (self.tasks.clone(), self.control.clone(), self.answers.clone());
        self.tasks.spawn(async move {
            let _permit = permit;
            // The answer, and what comes with the channel's end.
            control.earn(limits::PACKETS_PER_OPEN);
            answers.asked(Instant::now());
            let result = tokio::select! {
                result = open => result,
                () = control.gone().cancelled() => Err(russh::Error::Disconnect),
            };
            if matches!(result, Ok(_) | Err(russh::Error::ChannelOpenFailure(_))) {
                answers.answered();
            }
            let result = match result {
                Ok(channel) => {
                    let (reader, writer) = channel.split();
                    Ok(Ok(Channel::new(reader, Half::Client(writer), flow, &control, &tasks, None)))
                }
                Err(russh::Error::ChannelOpenFailure(code)) => Ok(Err(code)),
                Err(_) => Err(OpenError::Gone),
            };
            // Nobody waits any more: what comes back is dropped, and dropping a channel closes it.
            drop(sender.send(result));
        });
        receiver.await.unwrap_or(Err(OpenError::Gone))
    }

    /// Says goodbye; the session ends soon after.
    pub async fn disconnect(&self, words: &str) {
        // Its queue is the session's own, which a peer can keep from being read, as by a rekey that it does not finish.
        let said = self.handle.disconnect(russh::Disconnect::ByApplication, words, "");
        if !matches!(tokio::time::timeout(limits::GOODBYE_PATIENCE, said).await, Ok(Ok(()))) {
            // The session is gone already, which is what was wanted, or does not listen.
            self.control.cut();
        }
    }
}

/// A place for one refusal's description, taken back on drop.
struct Noted {
    failures: Failures,
    forward: ForwardId,
}

impl Noted {
    fn new(failures: &Failures, forward: &ForwardId) -> Self {
        failures.lock().unwrap_or_else(PoisonError::into_inner).insert(forward.clone(), String::new());
        Self { failures: failures.clone(), forward: forward.clone() }
    }

    fn words(&self) -> Option<String> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.get(&self.forward).filter(|words| !words.is_empty()).cloned()
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.forward);
    }
}

/// Decides about logins. The methods run inside of the session and must not wait.
pub trait Login: Send + 'static {
    /// Whether `key` could log in as `user`, before anything is signed. The library asks this of certificates too, with the bare
    /// key: who accepts certificates must say yes to every key here.
    fn offered(&mut self, user: &str, key: &PublicKey) -> bool;
    /// Whether `key`, whose signature has been verified, logs in as `user`.
    fn verified(&mut self, user: &str, key: &PublicKey) -> bool;
    /// Whether the holder of this certificate logs in as `user`. The signatures of the CA and of the holder have been verified;
    /// nothing else has. Nobody does who does not say otherwise.
    fn certified(&mut self, user: &str, certificate: &Certificate) -> bool {
        let _ = certificate;
        self.unfit(user, "certificate_not_accepted");
        false
    }
    /// A key, certificate or method was refused before it came to any of the others.
    fn unfit(&mut self, user: &str, why: &'static str);
}

/// How to be a server on a stream.
pub struct ServerOptions {
    /// Our identification string.
    pub line: String,
    /// Whether the peer has it already.
    pub said: bool,
    /// What was read from the stream already, to be replayed.
    pub head: Bytes,
    /// The only host key.
    pub key: PrivateKey,
    /// A certificate for it, shown to those who ask for one.
    pub certificate: Option<Certificate>,
    /// Whether one session channel with the control subsystem is accepted.
    pub control_channel: bool,
    /// Keepalives are sent this often, also before login: never more often than the login may take.
    pub keepalive: Duration,
    /// Whether the peer is one of our ends, so that windows are no bound.
    pub flow: Flow,
    /// How many unanswered ones end the session.
    pub keepalive_max: usize,
    /// Channels that may be open at once.
    pub channels: usize,
    /// Opens that may be under way at once.
    pub opens: usize,
}

/// A session channel that may become the control channel. It must be read from now on.
pub struct ControlChannel {
    /// The channel.
    pub channel: Channel,
    /// Fires when the peer has asked for the subsystem and been granted it.
    pub granted: CancellationToken,
}

/// A session in the server role.
pub struct Server {
    /// Fires with the first successful login.
    pub logged_in: CancellationToken,
    /// What the peer asks for.
    pub opens: mpsc::Receiver<Opening>,
    /// The control channel, once the peer has opened it.
    pub control_channel: oneshot::Receiver<ControlChannel>,
    /// What the peer tried in vain, without anybody having heard of it.
    pub misconduct: Arc<Misconduct>,
    /// The session's switch.
    pub control: Control,
    running: server::RunningSession<handler::BoxedServer>,
}

/// Becomes a server on `stream`. Returns before the key exchange; the caller cuts the session if `logged_in` does not fire
/// in time.
///
/// # Errors
/// If the identification strings cannot be exchanged.
pub async fn serve<S>(
    stream: S,
    options: ServerOptions,
    login: impl Login,
    tasks: &Tasks,
) -> Result<Server, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let control = Control::new();
    let cut = control.cut_on_drop();
    let unsaid = if options.said { options.line.len() + 2 } else { 0 };
    // In a box: the library moves it about, and keeps room for it in several places of its future.
    let stream = Box::new(Transport::new(stream, &control, options.head, unsaid));
    let logged_in = CancellationToken::new();
    // The queue never fills before the pending opens do: what exceeds them is passed on marked, to be recorded.
    let (opens_sender, opens) = mpsc::channel(options.opens * 2);
    let (control_sender, control_channel) = oneshot::channel();
    let misconduct = Arc::new(Misconduct { control: control.clone(), ..Misconduct::default() });
    let handler = handler::BoxedServer {
        login: Box::new(login),
        logged_in: logged_in.clone(),
        opens: opens_sender,
        pending: Arc::new(Semaphore::new(options.opens)),
        channels: Arc::new(Semaphore::new(options.channels)),
        control_sender: options.control_channel.then_some(control_sender),
        session: None,
        probes: 0,
        misconduct: misconduct.clone(),
        control: control.clone(),
        tasks: tasks.clone(),
    };
    let config = server::Config {
        server_id: SshId::Standard(options.line.into()),
        methods: russh::MethodSet::from(&[russh::MethodKind::PublicKey][..]),
        auth_rejection_time: limits::LOGIN_REFUSAL_DELAY,
        // The `none` probe that every OpenSSH login begins with.
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![options.key.as_ssh().as_ref().clone()],
        certificates: options.certificate.iter().map(|certificate| certificate.as_ssh().clone()).collect(),
        window_size: options.flow.window(),
        maximum_packet_size: options.flow.packet(),
        channel_buffer_size: limits::CHANNEL_QUEUE,
        event_buffer_size: limits::SESSION_QUEUE,
        limits: rekey_limits(),
        preferred: preferred(false),
        max_auth_attempts: limits::LOGIN_ATTEMPTS,
        inactivity_timeout: Some(options.keepalive * 5),
        keepalive_interval: Some(options.keepalive),
        keepalive_max: options.keepalive_max,
        nodelay: false,
    };
    let running = server::run_stream(Arc::new(config), stream, handler).await.map_err(HandshakeError::Ssh)?;
    cut.disarm();
    Ok(Server { logged_in, opens, control_channel, misconduct, control, running })
}

/// What the peer of a session in the server role tried in vain, counted, so that a flood of it does not become one of
/// records: to be recorded when the session has ended.
#[derive(Debug, Default)]
pub struct Misconduct {
    /// Opens that were refused because there were too many, and have no records of their own.
    pub opens: AtomicU64,
    /// Channels that are no forwards, and the type of the first of them.
    channels: AtomicU64,
    first: OnceLock<&'static str>,
    control: Control,
}

impl Misconduct {
    /// Counts a channel of a type that is refused to everybody.
    fn refused(&self, kind: &'static str) {
        self.channels.fetch_add(1, Ordering::Relaxed);
        self.first.get_or_init(|| kind);
    }

    /// Records it in entries that are otherwise as `event` makes them. What the trail does not take is said in the log: the
    /// session has ended, and nothing else can be done about it.
    pub async fn record(&self, trail: &Trail, event: impl Fn(Kind) -> audit::Event) {
        for (reason, detail) in self.sums() {
            if let Err(error) = trail.note(event(Kind::PeerViolation).reason(reason).detail(detail)).await {
                debug!(error = %Chain(&error), "could not record what a peer tried");
            }
        }
    }

    /// What there is to record, each with its reason: nothing for an honest peer.
    fn sums(&self) -> Vec<(&'static str, String)> {
        let mut sums = Vec::new();
        let opens = self.opens.load(Ordering::Relaxed);
        if opens > 0 {
            sums.push(("opens_flood", format!("{opens} opens were refused without a record of their own")));
        }
        if let Some(first) = self.first.get() {
            let channels = self.channels.load(Ordering::Relaxed);
            sums.push((
                "opened_channel",
                format!("{channels} channels other than forwards were refused, the first of type {first}"),
            ));
        }
        if self.control.was_flooded() {
            sums.push((IDLE_FLOOD, IDLE_FLOOD_TEXT.to_owned()));
        }
        sums
    }
}

/// The reason and the words for a session that was cut as [`Control::was_flooded`] tells.
pub const IDLE_FLOOD: &str = "idle_flood";

/// See [`IDLE_FLOOD`].
pub const IDLE_FLOOD_TEXT: &str = "the session was cut for too many packets without any use";

impl Server {
    /// Says goodbye, and waits a little for the client to hang up when it has read that. If it does not, that is for the
    /// caller to do.
    pub async fn farewell(&self, words: &str) {
        if self.disconnect(words).await {
            drop(tokio::time::timeout(limits::GOODBYE_PATIENCE, self.control.gone().cancelled()).await);
        }
    }

    /// Returns whether there was a session to say it on.
    async fn disconnect(&self, words: &str) -> bool {
        let handle = self.running.handle();
        // Its queue is the session's own, which may be waiting for its peer: the caller must not.
        let said = handle.disconnect(russh::Disconnect::ByApplication, words.to_owned(), String::new());
        matches!(tokio::time::timeout(limits::GOODBYE_PATIENCE, said).await, Ok(Ok(())))
    }

    /// Splits off what the caller consumes from the session's end.
    #[must_use]
    pub fn split(self) -> (mpsc::Receiver<Opening>, oneshot::Receiver<ControlChannel>, Running) {
        (self.opens, self.control_channel, Running(self.running))
    }
}

/// How a session that was under way failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The connection ended without a word of goodbye.
    #[error("the connection ended without a goodbye")]
    Closed,
    /// SSH.
    #[error("the SSH session failed")]
    Ssh(#[source] russh::Error),
}

/// A session in the server role, to be awaited.
pub struct Running(server::RunningSession<handler::BoxedServer>);

impl Running {
    /// Waits for the end of the session.
    ///
    /// # Errors
    /// If it ended otherwise than by a goodbye of either side.
    pub async fn ended(self) -> Result<(), RunError> {
        match self.0.await {
            Ok(()) | Err(russh::Error::Disconnect | russh::Error::HUP) => Ok(()),
            Err(russh::Error::IO(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Err(RunError::Closed),
            Err(error) => Err(RunError::Ssh(error)),
        }
    }
}

/// Which limit of [`ServerOptions`] stands against an opening; its owner knows it by a name of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// [`ServerOptions::channels`].
    Channels,
    /// [`ServerOptions::opens`].
    Opens,
}

/// A `direct-tcpip` channel that a peer asks for. Dropped, it is refused.
pub struct Opening {
    /// The host, as the peer wrote it.
    pub host: String,
    /// The port, as the peer wrote it: 32 bits on the wire.
    pub port: u32,
    /// The originator's address, as the peer wrote it.
    pub originator: String,
    /// Set where a limit stands against it: it can only be recorded and refused.
    pub over: Option<Over>,
    channel: Option<(ChannelReadHalf, ChannelWriteHalf<server::Msg>)>,
    reply: Option<server::ChannelOpenHandle>,
    slot: Option<OwnedSemaphorePermit>,
    _pending: Option<OwnedSemaphorePermit>,
    control: Control,
    tasks: Tasks,
}

impl Opening {
    /// Grants it; `None` where a limit stands against it.
    pub async fn accept(mut self, flow: Flow) -> Option<Channel> {
        let slot = self.slot.take()?;
        let (reader, writer) = self.channel.take()?;
        self.reply.take()?.accept().await;
        Some(Channel::new(reader, Half::Server(writer), flow, &self.control, &self.tasks, Some(slot)))
    }

    /// Refuses it with one of our reasons, as an agent does to its gateway.
    pub async fn refuse(mut self, code: RefusalCode, forward: Option<&ForwardId>, words: &str) {
        if let Some(reply) = self.reply.take() {
            reply
                .reject(ChannelOpenFailure::Other { code: code as u32, reason: wire::refusal_text(forward, words) })
                .await;
        }
    }

    /// Refuses it with nothing but what anybody may be told, as a door does to its clients.
    pub async fn refuse_publicly(mut self, public: Public, flow: Flow) {
        let code = match (public, flow) {
            (Public::NotAllowed, _) => NOT_ALLOWED,
            // Our own client asks whoever is there next.
            (Public::Draining, Flow::Credit) => RefusalCode::Draining as u32,
            (Public::Draining | Public::TimedOut | Public::NotAvailable, _) => NOT_AVAILABLE,
        };
        if let Some(reply) = self.reply.take() {
            reply.reject(ChannelOpenFailure::Other { code, reason: public.as_str().to_owned() }).await;
        }
    }
}

/// What an outsider is told of a refusal: one of these, and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Public {
    /// A policy says no.
    NotAllowed,
    /// This end goes away; another one may serve.
    Draining,
    /// Nobody has answered in time.
    TimedOut,
    /// Anything else.
    NotAvailable,
}

impl Public {
    /// The words.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotAllowed => "not allowed",
            Self::Draining | Self::TimedOut | Self::NotAvailable => "not available",
        }
    }
}

/// Reason code 1 of RFC 4254 §5.1, "administratively prohibited".
pub const NOT_ALLOWED: u32 = 1;

/// The words that go with [`NOT_ALLOWED`] where the session itself refuses.
const NOT_ALLOWED_TEXT: &str = "not allowed";

/// Reason code 2 of RFC 4254 §5.1, "connect failed".
pub const NOT_AVAILABLE: u32 = 2;

fn rekey_limits() -> russh::Limits {
    russh::Limits {
        rekey_write_limit: limits::REKEY_BYTES,
        rekey_read_limit: limits::REKEY_BYTES,
        rekey_time_limit: limits::REKEY_TIME,
    }
}

fn preferred(host_certificates: bool) -> Preferred {
    use russh::keys::{Algorithm, EcdsaCurve};
    // What a server announces as acceptable for user keys, too.
    let keys = vec![
        Algorithm::Ed25519,
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
        Algorithm::Rsa { hash: Some(HashAlg::Sha512) },
        Algorithm::Rsa { hash: Some(HashAlg::Sha256) },
    ];
    Preferred {
        kex: vec![
            kex::MLKEM768X25519_SHA256,
            kex::CURVE25519,
            kex::CURVE25519_PRE_RFC_8731,
            kex::EXTENSION_SUPPORT_AS_CLIENT,
            kex::EXTENSION_SUPPORT_AS_SERVER,
            kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
            kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
        ]
        .into(),
        host_key_certificates: if host_certificates { keys.clone() } else { Vec::new() }.into(),
        key: keys.into(),
        cipher: vec![cipher::AES_128_GCM, cipher::AES_256_GCM].into(),
        // Never used: the ciphers authenticate by themselves. The negotiation wants a name all the same.
        mac: vec![mac::HMAC_SHA512_ETM, mac::HMAC_SHA256_ETM].into(),
        compression: vec![compression::NONE].into(),
    }
}

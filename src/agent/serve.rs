//! One link of the agent: from the dial to its end, and the forwards on it.
//!
//! The order of a forward is fixed: who asks → could any rule allow it → resolve → decide → record → dial → accept →
//! splice → record the end. The permit that the decision yields is what the dial consumes.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::BytesMut;
use jiff::Timestamp;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::live::{self, Case, State};
use super::reach::reach;
use super::{Agent, Post, expiries};
use crate::audit::{Ending, Event, Kind, Resolved, TrailError};
use crate::chain::Chain;
use crate::drain::{Count, Departure, Ticket};
use crate::identity::{Certificate, Credential, Fingerprint, OrganisationId, Principal, PublicKey, ReplicaId};
use crate::limits;
use crate::policy::rule::Lookup;
use crate::policy::{Decision, Denial};
use crate::target::{Host, Target};
use crate::task::{apart, reached};
use crate::tunnel::admit::{self, GreetError};
use crate::tunnel::connect::{self, ConnectError, GatewayUrl};
use crate::tunnel::splice::{self, End, Side};
use crate::tunnel::ssh::{
    self, ControlChannel, Flow, HandshakeError, Login, Misconduct, Opening, Over, Public, RunError, Running,
    ServerOptions,
};
use crate::tunnel::transport::Control as Switch;
use crate::tunnel::wire::{self, Control, Drain, ForwardId, Hello, Originator, Peer, RefusalCode};

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("could not reach gateway {gateway}")]
    Connect {
        gateway: GatewayUrl,
        #[source]
        source: ConnectError,
    },
    #[error("could not speak to gateway {gateway}")]
    Greet {
        gateway: GatewayUrl,
        #[source]
        source: GreetError,
    },
    #[error("{gateway} is an SSH server or client, but no caponier gateway")]
    NotAGateway { gateway: GatewayUrl },
    #[error("the SSH handshake with gateway {gateway} failed")]
    Handshake {
        gateway: GatewayUrl,
        #[source]
        source: HandshakeError,
    },
    #[error(
        "gateway {gateway} closed the connection after key exchange, before login: the agent's key {key} is not registered \
         there for {agent}, has expired or been revoked, or is not accepted from this address; the trail there says which"
    )]
    KeyNotAccepted { gateway: GatewayUrl, key: Fingerprint, agent: String },
    #[error(
        "gateway {gateway} tried to log in for {organisation} with a key that is not among this agent's orchestrator keys \
         ({reason}, last key {key}): add it to the configuration if it is the orchestrator's"
    )]
    LoginRefused { gateway: GatewayUrl, organisation: String, reason: &'static str, key: String },
    #[error("gateway {gateway} has not logged in within {} s", limits::LOGIN_GRACE.as_secs())]
    LoginTimeout { gateway: GatewayUrl },
    #[error("could not record the link")]
    Trail(#[source] TrailError),
}

/// How a link ended.
pub(super) enum LinkEnd {
    /// The agent stops.
    Stopped,
    /// Everything else.
    Lost,
}

/// A link whose gateway has logged in.
pub(super) struct Link {
    shared: Arc<Shared>,
    opens: mpsc::Receiver<Opening>,
    control_channel: oneshot::Receiver<ControlChannel>,
    misconduct: Arc<Misconduct>,
    running: Running,
}

/// What belongs to one link beside what is as in any session.
struct Shared {
    session: Arc<Session>,
    post: Arc<Post>,
    worn: CancellationToken,
    superseded: CancellationToken,
    moved: CancellationToken,
}

/// An SSH session whose peer has logged in for an organisation: a link's, or one at the listener. What its forwards share.
pub(super) struct Session {
    pub(super) agent: Arc<Agent>,
    pub(super) organisation: OrganisationId,
    /// The agent's name in its records.
    pub(super) replica: ReplicaId,
    /// What the peer logged in with. What it may do is for each moment's configuration to say.
    pub(super) orchestrator: Credential,
    pub(super) switch: Switch,
    /// Fires when the configuration no longer has the gateway that a link leads to.
    pub(super) dismissed: CancellationToken,
    /// What a gateway has said of its drain.
    pub(super) departure: Departure,
    /// Who came in at the listener; nobody on a link, whose gateway says where its clients are.
    pub(super) guest: Option<Guest>,
}

/// Who came in at the listener.
pub(super) struct Guest {
    pub(super) client: SocketAddr,
    pub(super) flow: Flow,
}

/// Dials, shakes hands and waits for the gateway's login.
pub(super) async fn link(agent: &Arc<Agent>, state: &State, post: &Arc<Post>) -> Result<Link, LinkError> {
    let Post { name, gateway, .. } = &**post;
    let connection = connect::connect(gateway.target(), state.proxy.as_ref(), |addresses| agent.learn(addresses))
        .await
        .map_err(|source| LinkError::Connect { gateway: gateway.clone(), source })?;
    let deadline = Instant::now() + limits::LOGIN_GRACE;
    let mut stream = connection.stream;
    let line = wire::agent_line(name, &state.replica);
    let greet = |source| LinkError::Greet { gateway: gateway.clone(), source };
    let greeting = format!("{line}\r\n");
    stream.write_all(greeting.as_bytes()).await.map_err(|error| greet(GreetError::Io(error)))?;
    let greeted = admit::greet(&mut stream, connection.head, None, deadline).await.map_err(greet)?;
    // A gateway that had to wait for our line has sent its door's.
    if !matches!(greeted.peer, Peer::Client | Peer::Door) {
        return Err(LinkError::NotAGateway { gateway: gateway.clone() });
    }

    let logins = Arc::new(Mutex::new(Logins::default()));
    let login = OrchestratorLogin { agent: agent.clone(), post: post.clone(), logins: logins.clone() };
    let options = ServerOptions {
        line,
        said: true,
        head: greeted.head,
        key: state.key.clone(),
        certificate: None,
        control_channel: true,
        keepalive: limits::LINK_KEEPALIVE,
        keepalive_max: 1,
        flow: Flow::Credit,
        channels: agent.limits().forwards_per_link,
        opens: agent.limits().pending_opens_per_link,
    };
    let server = ssh::serve(stream, options, login, &agent.tasks)
        .await
        .map_err(|source| LinkError::Handshake { gateway: gateway.clone(), source })?;
    let (logged_in, switch) = (server.logged_in.clone(), server.control.clone());
    let cut = switch.cut_on_drop();
    let ended = tokio::select! {
        outcome = timeout_at(deadline, logged_in.cancelled()) => match outcome {
            Ok(()) => false,
            Err(_) => return Err(LinkError::LoginTimeout { gateway: gateway.clone() }),
        },
        () = switch.gone().cancelled() => true,
    };
    let accepted = {
        let logins = logins.lock().unwrap_or_else(PoisonError::into_inner);
        match (&logins.accepted, &logins.refused) {
            (Some(orchestrator), _) if !ended => Some(orchestrator.clone()),
            (_, Some((reason, key))) => {
                let event = Event::new(Kind::AuthRefused)
                    .organisation(&name.organisation)
                    .agent(&name.agent)
                    .key(key)
                    .detail(gateway);
                agent.trail.stranger(event, reason);
                return Err(LinkError::LoginRefused {
                    gateway: gateway.clone(),
                    organisation: name.organisation.to_string(),
                    reason,
                    key: key.clone(),
                });
            }
            _ => None,
        }
    };
    let Some(accepted) = accepted else {
        let (_, _, running) = server.split();
        return Err(match timeout(limits::GOODBYE_PATIENCE, running.ended()).await {
            Ok(Err(RunError::Ssh(source))) => {
                let event = Event::new(Kind::AuthRefused)
                    .organisation(&name.organisation)
                    .agent(&name.agent)
                    .detail(format!("{gateway}: {}", Chain(&source)));
                agent.trail.stranger(event, "handshake");
                LinkError::Handshake { gateway: gateway.clone(), source: HandshakeError::Ssh(source) }
            }
            _ => LinkError::KeyNotAccepted {
                gateway: gateway.clone(),
                key: state.key.public().fingerprint(),
                agent: name.to_string(),
            },
        });
    };
    let event = Event::new(Kind::LinkUp)
        .organisation(&name.organisation)
        .agent(&name.agent)
        .replica(&state.replica)
        .credential(&accepted)
        .detail(gateway);
    agent.trail.note(event).await.map_err(LinkError::Trail)?;
    cut.disarm();
    let misconduct = server.misconduct.clone();
    let (opens, control_channel, running) = server.split();
    let session = Arc::new(Session {
        agent: agent.clone(),
        organisation: name.organisation.clone(),
        replica: state.replica.clone(),
        orchestrator: accepted,
        switch,
        dismissed: post.dismissed.clone(),
        departure: Departure::default(),
        guest: None,
    });
    let shared = Arc::new(Shared {
        session,
        post: post.clone(),
        worn: CancellationToken::new(),
        superseded: CancellationToken::new(),
        moved: CancellationToken::new(),
    });
    Ok(Link { shared, opens, control_channel, misconduct, running })
}

#[derive(Default)]
struct Logins {
    /// What the orchestrator has logged in with.
    accepted: Option<Credential>,
    /// Why the last login was refused, and which key it was.
    refused: Option<(&'static str, String)>,
}

struct OrchestratorLogin {
    agent: Arc<Agent>,
    post: Arc<Post>,
    logins: Arc<Mutex<Logins>>,
}

impl OrchestratorLogin {
    fn knows(&self, user: &str, credential: &Credential) -> bool {
        let organisation = &self.post.name.organisation;
        let reason = if user == organisation.as_str() {
            // Behind a proxy nobody can tell where the gateway is.
            match self.agent.state.current().orchestrator(organisation, credential, None, Timestamp::now()) {
                Ok(_) => return true,
                Err(reason) => reason,
            }
        } else {
            "other_organisation"
        };
        self.refuse(reason, credential.key().to_string());
        false
    }

    fn lets_in(&self, user: &str, credential: Credential) -> bool {
        let known = self.knows(user, &credential);
        if known {
            self.logins.lock().unwrap_or_else(PoisonError::into_inner).accepted = Some(credential);
        }
        known
    }

    /// A gateway shows the bare key after the certificate; what was wrong with that tells more.
    fn refuse(&self, reason: &'static str, key: String) {
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        let certified = logins
            .refused
            .as_ref()
            .is_some_and(|(last, shown)| last.starts_with("certificate_") && *shown == key && reason == "unknown_key");
        if !certified {
            logins.refused = Some((reason, key));
        }
    }
}

impl Login for OrchestratorLogin {
    fn offered(&mut self, user: &str, key: &PublicKey) -> bool {
        let organisation = &self.post.name.organisation;
        // The key may turn out to be that of a certificate.
        let certifiable = user == organisation.as_str() && self.agent.state.current().has_authority(organisation);
        certifiable || self.knows(user, &Credential::Key(key.fingerprint()))
    }

    fn verified(&mut self, user: &str, key: &PublicKey) -> bool {
        self.lets_in(user, Credential::Key(key.fingerprint()))
    }

    fn certified(&mut self, user: &str, certificate: &Certificate) -> bool {
        self.lets_in(user, Credential::Certificate(certificate.clone()))
    }

    fn unfit(&mut self, _user: &str, why: &'static str) {
        self.refuse(why, "not given".to_owned());
    }
}

impl Link {
    /// Fires once the link has carried as many opens as one should.
    pub(super) fn worn(&self) -> &CancellationToken {
        &self.shared.worn
    }

    /// Fires once the gateway has said that another process has taken the link's place.
    pub(super) fn superseded(&self) -> &CancellationToken {
        &self.shared.superseded
    }

    /// Fires when the gateway wants another link in the place of this one, which it may do again on each.
    pub(super) fn moved(&self) -> &CancellationToken {
        &self.shared.moved
    }

    /// Its session's switch.
    pub(super) fn switch(&self) -> &Switch {
        &self.shared.session.switch
    }

    /// Serves the link to its end. After `share` opens it is worn.
    pub(super) async fn serve(mut self, share: u64) -> LinkEnd {
        let shared = self.shared;
        let session = shared.session.clone();
        let agent = session.agent.clone();
        let stop = agent.tasks.stopping().clone();
        let _present = agent.drain.greet();
        let conversation = agent.tasks.spawn(converse(shared.clone(), self.control_channel));
        let mut opened: u64 = 0;
        let (mut revoked, mut worn_out) = (false, false);
        let end = loop {
            tokio::select! {
                opening = self.opens.recv() => {
                    let Some(opening) = opening else { break LinkEnd::Lost };
                    opened += 1;
                    if opened == share {
                        shared.worn.cancel();
                    }
                    if opened > limits::OPENS_PER_LINK_MAX {
                        warn!(gateway = %shared.post.gateway, "cutting a link that has long carried its share of opens");
                        worn_out = true;
                        break LinkEnd::Lost;
                    }
                    let over = opening.over.map(|over| match over {
                        Over::Channels => "forwards_per_link",
                        Over::Opens => "pending_opens_per_link",
                    });
                    session.take(opening, over, &Count::default(), &self.misconduct.opens).await;
                }
                () = session.revoked() => {
                    info!(gateway = %shared.post.gateway, "cutting a link that the configuration no longer allows");
                    revoked = true;
                    break LinkEnd::Lost;
                }
                () = stop.cancelled() => break LinkEnd::Stopped,
            }
        };
        session.switch.cut();
        for (reason, detail) in self.misconduct.sums() {
            let event = Event::new(Kind::PeerViolation)
                .organisation(&session.organisation)
                .agent(&agent.id)
                .replica(&session.replica)
                .credential(&session.orchestrator)
                .reason(reason)
                .detail(detail);
            if let Err(error) = agent.trail.note(event).await {
                debug!(error = %Chain(&error), "could not record what a gateway tried");
            }
        }
        let ended = timeout(limits::STOP_GRACE, self.running.ended()).await;
        // What the gateway said before it hung up is heard before the link counts as ended.
        drop(timeout(limits::STOP_GRACE, conversation).await);
        let (reason, detail) = match (ended, &end) {
            (_, LinkEnd::Stopped) => ("stopped", shared.post.gateway.to_string()),
            (_, LinkEnd::Lost) if revoked => ("revoked", shared.post.gateway.to_string()),
            (_, LinkEnd::Lost) if worn_out => ("worn_out", shared.post.gateway.to_string()),
            (Ok(Ok(())), LinkEnd::Lost) => ("closed", shared.post.gateway.to_string()),
            (Ok(Err(error)), LinkEnd::Lost) => ("lost", format!("{}: {}", shared.post.gateway, Chain(&error))),
            (Err(_), LinkEnd::Lost) => ("lost", format!("{}: the session did not end", shared.post.gateway)),
        };
        let event = Event::new(Kind::LinkDown)
            .organisation(&session.organisation)
            .agent(&agent.id)
            .replica(&session.replica)
            .credential(&session.orchestrator)
            .reason(reason)
            .detail(detail);
        if let Err(error) = agent.trail.note(event).await {
            debug!(error = %Chain(&error), "could not record the end of a link");
        }
        end
    }
}

impl Session {
    /// Takes on what the peer asks for, in a task of its own that `forwards` counts. What a limit or a drain stands against,
    /// as one that it is `over` already, is refused in line: a flood of refusals must not become a flood of tasks; nor one of
    /// records, so that some are only counted as `unheard`.
    pub(super) async fn take(
        self: &Arc<Self>,
        opening: Opening,
        over: Option<&'static str>,
        forwards: &Count,
        unheard: &AtomicU64,
    ) {
        let agent = &self.agent;
        let counted = agent.usage.open(&agent.limits(), &self.organisation, std::time::Instant::now());
        let ticket = agent.drain.admit();
        match (counted, over) {
            (Ok(()), None) if ticket.is_some() => {
                let (session, running) = (self.clone(), forwards.enter());
                agent.tasks.spawn(async move {
                    forward(&session, opening, None, ticket).await;
                    drop(running);
                });
            }
            (Err(flood), _) if !flood.record => {
                unheard.fetch_add(1, Ordering::Relaxed);
                let peer = Originator::parse(&opening.originator).ok().flatten();
                let forward = peer.as_ref().map(|originator| &originator.forward);
                self.answer(opening, RefusalCode::Limit, forward, flood.limit).await;
            }
            (Err(flood), None) => forward(self, opening, Some(flood.limit), ticket).await,
            (_, over) => forward(self, opening, over, ticket).await,
        }
    }

    /// Refuses an opening. A gateway is told the reason, which its operator may read; everybody else as little as at any door.
    async fn answer(&self, opening: Opening, code: RefusalCode, forward: Option<&ForwardId>, words: &str) {
        let Some(guest) = &self.guest else { return opening.refuse(code, forward, words).await };
        let public = match code {
            RefusalCode::Denied | RefusalCode::Malformed => Public::NotAllowed,
            RefusalCode::Draining => Public::Draining,
            RefusalCode::Unresolved | RefusalCode::ConnectFailed | RefusalCode::Unrecorded | RefusalCode::Limit => {
                Public::NotAvailable
            }
        };
        opening.refuse_publicly(public, guest.flow).await;
    }

    /// Whether the configuration still has what the session came by, and the key that it was logged in with.
    fn stands(&self, state: &State) -> bool {
        self.guest.as_ref().is_none_or(|guest| state.listens_to(guest.client.ip()))
            && state.orchestrator(&self.organisation, &self.orchestrator, self.from(), Timestamp::now()).is_ok()
    }

    /// Where the peer is; of a gateway nobody can tell.
    fn from(&self) -> Option<IpAddr> {
        self.guest.as_ref().map(|guest| guest.client.ip())
    }

    /// Waits until the configuration no longer has the way that the session came by, or the key that it was logged in with.
    pub(super) async fn revoked(&self) {
        tokio::select! {
            () = self.dismissed.cancelled() => {}
            () = self.agent.state.until(|state| !self.stands(state)) => {}
            // By itself, and nothing else tells of it.
            () = reached(self.orchestrator.expires(), limits::CERTIFICATE_LOOK) => {}
        }
    }

    /// Whether a forward that was permitted to `addresses` would be still, in this session.
    fn allows(&self, state: &State, case: &Case<'_>, addresses: &[SocketAddr]) -> bool {
        !self.dismissed.is_cancelled()
            && self.stands(state)
            && state.allows(case, addresses, &self.agent.guard(state), Timestamp::now())
    }

    /// Waits until a state that `changes` has not seen yet no longer allows what was permitted.
    async fn no_longer_allows(
        &self,
        mut changes: watch::Receiver<Arc<State>>,
        case: &Case<'_>,
        addresses: &[SocketAddr],
    ) {
        loop {
            tokio::select! {
                () = self.dismissed.cancelled() => return,
                () = reached(self.orchestrator.expires(), limits::CERTIFICATE_LOOK) => return,
                changed = changes.changed() => {
                    if changed.is_err() {
                        // The agent is going away, and ends the forward itself.
                        std::future::pending().await
                    }
                }
            }
            let state = changes.borrow_and_update().clone();
            if !self.allows(&state, case, addresses) {
                return;
            }
        }
    }
}

/// The control channel: says hello, listens, and says when the agent drains.
async fn converse(shared: Arc<Shared>, channel: oneshot::Receiver<ControlChannel>) {
    let Ok(ControlChannel { mut channel, granted }) = channel.await else { return };
    tokio::select! {
        biased;
        () = granted.cancelled() => {}
        event = channel.reader.next() => {
            if event == ssh::Event::Closed {
                return;
            }
            debug!(gateway = %shared.post.gateway, "cutting a link whose gateway uses a channel that it was not granted");
            return shared.session.switch.cut();
        }
    }
    let hello = Control::Hello(Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        features: vec![wire::CREDIT.to_owned()],
        channels: u32::try_from(limits::CHANNELS_PER_LINK).unwrap_or(u32::MAX),
        replica: Some(shared.session.replica.to_string()),
        instance: Some(shared.session.agent.instance.clone()),
        started: Some(shared.session.agent.started),
        way: Some(shared.post.way),
    });
    if channel.writer.send(hello.encode()).await.is_err() {
        return;
    }
    let ssh::Channel { reader, mut writer } = channel;
    let drain = &shared.session.agent.drain;
    let speak = async {
        drain.begun().cancelled().await;
        let goodbye = Control::Drain(Drain { deadline_s: drain.left_s() });
        if writer.send(goodbye.encode()).await.is_err() {
            debug!(gateway = %shared.post.gateway, "the gateway could not be told of the drain");
        }
        // Whoever listens sees the end of the channel.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = speak => {}
        () = listen(&shared, reader) => {}
    }
}

/// Reads what the gateway says on the control channel, to its end.
async fn listen(shared: &Shared, mut reader: ssh::Reader) {
    let mut buffer = BytesMut::new();
    let mut notices = 0;
    while let Some(bytes) = reader.bytes().await {
        buffer.extend_from_slice(&bytes);
        loop {
            let message = Control::decode(&mut buffer);
            if let Ok(Some(Control::Drain(drain))) = &message {
                shared.session.departure.told(drain.deadline_s);
            }
            match message {
                Ok(Some(Control::Hello(hello))) => debug!(version = hello.version, "the gateway said hello"),
                Ok(Some(Control::Superseded)) => shared.superseded.cancel(),
                // Once is enough: what is said again on the same link asks for nothing more.
                Ok(Some(message @ (Control::Drain(_) | Control::Move))) if !shared.moved.is_cancelled() => {
                    info!(gateway = %shared.post.gateway, ?message, "the gateway wants another link");
                    shared.moved.cancel();
                }
                Ok(Some(message @ (Control::Drain(_) | Control::Move))) => {
                    debug!(?message, "the gateway said");
                }
                Ok(Some(Control::KeyNotice(notice))) if notices < limits::KEY_NOTICES_PER_LINK => {
                    notices += 1;
                    expiries::heed(&shared.post, notice);
                }
                Ok(Some(Control::KeyNotice(_))) => debug!("the gateway goes on about the end of a key"),
                Ok(Some(Control::Unknown(kind))) => debug!(kind, "skipped a control message of a later version"),
                Ok(None) => break,
                Err(error) => {
                    info!(gateway = %shared.post.gateway, %error, "cutting a link whose gateway breaks the protocol");
                    shared.session.switch.cut();
                    return;
                }
            }
        }
    }
}

/// One forward, from the peer's request to its end; or, with a limit that it is `over`, or without a ticket because the
/// agent drains, to its refusal.
async fn forward(session: &Session, opening: Opening, over: Option<&'static str>, ticket: Option<Ticket>) {
    let agent = &session.agent;
    let credential = &session.orchestrator;
    // Decided on the state that holds now, and from then on again on each that this has not seen.
    let (state, changes) = agent.state.follow();
    let now = Timestamp::now();
    let originator = Originator::parse(&opening.originator);
    let mut record = crate::audit::Opening {
        forward: ForwardId::random().to_string(),
        organisation: Some(session.organisation.clone()),
        agent: Some(agent.id.clone()),
        replica: Some(session.replica.clone()),
        key: Some(credential.key()),
        certificate: credential.certificate().cloned(),
        client: session.guest.as_ref().map(|guest| guest.client.to_string()),
        door: session.guest.as_ref().map(|_| DOOR),
        target: format!("{}:{}", opening.host, opening.port),
        ..crate::audit::Opening::default()
    };
    let peer = match &originator {
        Ok(Some(originator)) => {
            record.peer_forward = Some(originator.forward.to_string());
            record.principal = Some(Principal::Named(originator.principal.clone()));
            record.asserted_by = Some(credential.key().to_string());
            // Who came in at the listener is where it is, whatever it says.
            record.client.get_or_insert_with(|| originator.client.clone());
            Some(originator.forward.clone())
        }
        _ => None,
    };
    let refusal = Refusal { session, opening, record, peer };

    let claimed = match &originator {
        Ok(originator) => originator.as_ref().map(|originator| &originator.principal),
        Err(_) => {
            let claimed: String = refusal.opening.originator.escape_debug().take(128).collect();
            return refusal.deny(RefusalCode::Malformed, "malformed_originator", &claimed).await;
        }
    };
    let (served, asserts) = match state.orchestrator(&session.organisation, credential, session.from(), now) {
        Ok(served) => served,
        Err(reason) => {
            let detail = format!("the configuration no longer lets the session's key log in: {reason}");
            return refusal.deny(RefusalCode::Denied, "revoked", &detail).await;
        }
    };
    let principal = match live::speaker(asserts, credential, claimed) {
        Ok(principal) => principal,
        Err((reason, detail)) => return refusal.deny(RefusalCode::Denied, reason, detail).await,
    };
    let mut refusal = refusal;
    refusal.record.principal = Some(principal.clone());

    let counted = match over {
        Some(limit) => Err(limit),
        None => agent.usage.forward(&agent.limits(), &session.organisation),
    };
    let _counted = match counted {
        Ok(counted) => counted,
        Err(limit) => return refusal.deny(RefusalCode::Limit, "limit", limit).await,
    };
    let Some(mut ticket) = ticket else {
        return refusal.deny(RefusalCode::Draining, "draining", "the agent goes away").await;
    };
    let target = match Target::from_wire(&refusal.opening.host, refusal.opening.port) {
        Ok(target) => target,
        Err(error) => return refusal.deny(RefusalCode::Malformed, "malformed_target", &error.to_string()).await,
    };
    refusal.record.target = target.to_string();

    let guard = agent.guard(&state);
    let allow = &served.allow;
    let lookup = match allow.consider(&principal, &target, &guard, now) {
        Ok(lookup) => lookup,
        Err(denial) => return refusal.denied(denial).await,
    };
    let deadline = Instant::now() + limits::OPEN_TIMEOUT;
    let resolver = &state.resolver;
    let found = match (lookup, &target.host) {
        (Lookup::Address(address), _) => Ok(vec![address]),
        (_, Host::Address(address)) => Ok(vec![SocketAddr::new(*address, target.port)]),
        (Lookup::Addresses, Host::Name(name)) => resolver
            .addresses(name)
            .await
            .map(|found| found.into_iter().map(|address| SocketAddr::new(address, target.port)).collect()),
        (Lookup::Service, Host::Name(name)) => resolver.service(name).await,
    };
    let resolved: Vec<SocketAddr> = match found {
        Ok(resolved) => resolved,
        Err(error) => {
            let detail = Chain(&error).to_string();
            return refusal.fail(RefusalCode::Unresolved, "unresolved", detail).await;
        }
    };
    // A service's instances have ports and an order of their own; and who asks for an address means that one.
    let turns = matches!(lookup, Lookup::Addresses).then(|| resolver.family());
    let on_record = |place: &SocketAddr| match lookup {
        Lookup::Address(_) | Lookup::Addresses => Resolved::Address(place.ip()),
        Lookup::Service => Resolved::Instance(*place),
    };
    refusal.record.resolved = resolved.iter().map(on_record).collect();
    let permit = match allow.decide(&principal, &target, &resolved, &guard, Timestamp::now()) {
        Decision::Allow(permit) => permit,
        Decision::Deny(denial) => return refusal.denied(denial).await,
    };
    refusal.record.rule = Some(permit.rule().to_owned());
    refusal.record.refused = permit.refused().iter().map(on_record).collect();

    let unrecorded = agent.unrecorded.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut entry = match agent.trail.open(refusal.record.clone()).await {
        Ok(entry) => entry,
        // The trail holds the gateway's ids of the live forwards, by organisation.
        Err(TrailError::Duplicate) => return refusal.deny(RefusalCode::Malformed, "duplicate_forward", "").await,
        Err(error) => return refusal.unrecorded(&error).await,
    };
    let case = Case {
        organisation: &session.organisation,
        credential,
        from: session.from(),
        claimed,
        principal: &principal,
        target: &target,
    };
    let dialled = tokio::select! {
        // First: to what has been taken back by now, no connection is made.
        biased;
        () = session.no_longer_allows(changes.clone(), &case, &resolved) => {
            let detail = "the configuration changed while the forward was opened".to_owned();
            entry.finish(Ending::Denied { reason: "revoked", detail });
            return refusal.answer(RefusalCode::Denied, "revoked").await;
        }
        dialled = timeout_at(deadline, reach(permit, turns)) => dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        why = agent.drain.cut() => {
            entry.finish(Ending::Failed { reason: why, detail: "it was not open yet".to_owned() });
            return refusal.answer(RefusalCode::Draining, "the agent goes away").await;
        }
        // The peer is gone: the entry ends as abandoned.
        () = session.switch.gone().cancelled() => return,
    };
    let (stream, address) = match dialled {
        Ok(dialled) => dialled,
        Err(error) => {
            entry.finish(Ending::Failed { reason: "connect_failed", detail: error.to_string() });
            return refusal.answer(RefusalCode::ConnectFailed, &format!("could not connect: {}", error.kind())).await;
        }
    };
    entry.established(Some(address));
    ticket.opened();
    let flow = match &session.guest {
        Some(guest) => guest.flow,
        // Whoever names an originator in our form is our gateway, and speaks of credit.
        None if refusal.peer.is_some() => Flow::Credit,
        None => Flow::Stock,
    };
    let Some(channel) = refusal.opening.accept(flow).await else { return };
    let counters = entry.counters();
    let stop = CancellationToken::new();
    let mut cut = None;
    // Of all that were permitted, the one that counts from here on.
    let addresses = [address];
    let (end, remains) = {
        let splice =
            splice::splice(Side::Channel(channel), Side::Tcp(stream), &counters, agent.limits().forward, &stop);
        tokio::pin!(splice);
        let watch = apart(async {
            tokio::select! {
                () = session.no_longer_allows(changes, &case, &addresses) => None,
                why = agent.drain.cut() => Some(why),
                () = unrecorded.cancelled() => None,
            }
        });
        let why = tokio::select! {
            // First: bytes that never end must not hide it.
            biased;
            why = watch => {
                cut = why;
                None
            }
            end = &mut splice => Some(end),
        };
        match why {
            Some(end) => end,
            None => {
                stop.cancel();
                splice.await
            }
        }
    };
    let reason = match (end, cut) {
        (End::Clean, _) => "eof",
        // Whatever was wrong with it already: it still went on, to deliver what it had, and was cut.
        (_, Some(why)) => why,
        // Also where the link was cut for the same reason, and that was noticed first.
        (End::NearBroke(_) | End::Stopped, None) if !session.allows(&agent.state.current(), &case, &addresses) => {
            "revoked"
        }
        (End::NearBroke(_), None) if session.departure.is_due() => "gateway_drained",
        (End::NearBroke(_), None) if session.guest.is_none() && session.switch.gone().is_cancelled() => "link_lost",
        (End::NearBroke(_), None) => "client_gone",
        (End::FarBroke(_), None) => "target_broke",
        (End::Stalled, None) => "stalled",
        (End::Idle, None) => "idle",
        (End::Expired, None) => "expired",
        (End::Stopped, None) if unrecorded.is_cancelled() => "audit_failed",
        (End::Stopped, None) => "agent_stopped",
    };
    entry.finish(counters.ended(reason));
    // It has ended: a drain gives it time for its goodbye, and does not count it as cut.
    let _leaving = agent.drain.leave();
    drop(ticket);
    remains.leave().await;
}

/// A forward that has not been granted yet, and all that is needed to refuse it.
struct Refusal<'a> {
    session: &'a Session,
    opening: Opening,
    record: crate::audit::Opening,
    peer: Option<ForwardId>,
}

impl Refusal<'_> {
    /// Records what the policy said, then tells the gateway.
    async fn denied(mut self, denial: Denial) {
        self.record.rule = denial.rule;
        self.deny(RefusalCode::Denied, denial.reason.as_str(), &denial.detail).await;
    }

    /// Records a denial, then tells the peer. A gateway's operator may read the reason, which both trails then share.
    async fn deny(self, code: RefusalCode, reason: &str, detail: &str) {
        debug!(reason, detail, "denied a forward");
        match self.session.agent.trail.deny(self.record.clone(), reason, detail).await {
            // Which limit it is, so that the gateway's trail says so too.
            Ok(()) if code == RefusalCode::Limit => self.answer(code, detail).await,
            Ok(()) => self.answer(code, reason).await,
            Err(error) => self.unrecorded(&error).await,
        }
    }

    /// Records a forward that failed before it could be decided to the end, then tells the peer.
    async fn fail(self, code: RefusalCode, reason: &'static str, detail: String) {
        match self.session.agent.trail.open(self.record.clone()).await {
            Ok(entry) => {
                entry.finish(Ending::Failed { reason, detail });
                self.answer(code, reason).await;
            }
            Err(error) => self.unrecorded(&error).await,
        }
    }

    async fn unrecorded(self, error: &TrailError) {
        debug!(error = %Chain(error), "refused a forward because it could not be recorded");
        self.answer(RefusalCode::Unrecorded, "the agent could not record the forward").await;
    }

    async fn answer(self, code: RefusalCode, words: &str) {
        self.session.answer(self.opening, code, self.peer.as_ref(), words).await;
    }
}

/// The listener's name in the trail.
pub(super) const DOOR: &str = "listen";

const _: () = assert!(limits::LINK_KEEPALIVE.as_secs() >= limits::LOGIN_GRACE.as_secs(), "see limits::DOOR_KEEPALIVE");

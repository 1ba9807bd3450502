//! One link of the agent, from the dial to its end; and what a session of whoever may open forwards has, at the end of a link or
//! at the listener.

mod login;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub(super) use login::Coming;

use super::forward::forward;
use super::live::{self, Case, REVOKED, State};
use super::{Agent, Post, doctor, expiries};
use crate::audit::{Event, Kind, TrailError};
use crate::chain::Chain;
use crate::diagnosis::Report;
use crate::drain::{Count, Departure};
use crate::identity::{Credential, Fingerprint, OrganisationId, ReplicaId};
use crate::limits;
use crate::task::reached;
use crate::tunnel::admit::{self, GreetError};
use crate::tunnel::anchors::{self, Ear};
use crate::tunnel::connect::url::{GatewayUrl, Transport};
use crate::tunnel::dial::{self, DialError, Dialled};
use crate::tunnel::ssh::{self, ControlChannel, Flow, HandshakeError, Misconduct, Opening, Over, Public, Running};
use crate::tunnel::stream::Stream;
use crate::tunnel::transport::Control as Switch;
use crate::tunnel::wire::{self, Control, Drain, ForwardId, Hello, Originator, Peer, RefusalCode};

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("could not reach gateway {gateway}")]
    Dial {
        gateway: GatewayUrl,
        #[source]
        source: DialError,
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
         there for {agent}, has expired or been revoked, is not accepted from this address, or came without the TLS certificate \
         that is wanted of this agent; the trail there says which"
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

impl LinkError {
    /// Whether the gateway itself has been reached, and said no, or we did: it would not be otherwise by another way.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::KeyNotAccepted { .. } | Self::LoginRefused { .. } | Self::Trail(_) => true,
            Self::Dial { .. }
            | Self::Greet { .. }
            | Self::NotAGateway { .. }
            | Self::Handshake { .. }
            | Self::LoginTimeout { .. } => false,
        }
    }

    /// The same in a few words, without an address.
    pub(super) fn brief(&self) -> &'static str {
        match self {
            Self::Dial { .. } => "its gateways cannot be reached",
            Self::Greet { .. } | Self::NotAGateway { .. } => "what answers is no gateway",
            Self::Handshake { .. } => "the SSH handshake with its gateway fails",
            Self::KeyNotAccepted { .. } => "its gateway does not accept the agent's key",
            Self::LoginRefused { .. } => "its gateway's key is not among the orchestrator keys",
            Self::LoginTimeout { .. } => "its gateway does not log in",
            Self::Trail(_) => "a link cannot be recorded",
        }
    }

    /// Whether it may be that the gateway wanted a TLS certificate, which cannot be shown by the way that was tried, and can by
    /// the `next`: that is said in no other words than that the key does not count.
    pub(super) fn lacks_certificate(&self, tried: &GatewayUrl, next: &GatewayUrl) -> bool {
        matches!(self, Self::KeyNotAccepted { .. }) && !tried.transport().is_tls() && next.transport().is_tls()
    }
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
    /// The way that it was made by.
    gateway: GatewayUrl,
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

/// Dials by this way, shakes hands and waits for the gateway's login.
pub(super) async fn link(
    agent: &Arc<Agent>,
    state: &State,
    post: &Arc<Post>,
    gateway: &GatewayUrl,
) -> Result<Link, LinkError> {
    let name = &post.name;
    let way = state.way(&name.organisation);
    let Dialled { mut stream, head } = dial::dial(gateway, &way, |addresses| agent.learn(addresses))
        .await
        .map_err(|source| LinkError::Dial { gateway: gateway.clone(), source })?;
    let deadline = Instant::now() + limits::LOGIN_GRACE;
    let line = wire::agent_line(name, &state.replica);
    let head = introduce(&mut stream, head, &line, gateway, deadline).await?;
    let current = {
        let agent = agent.clone();
        move || agent.state.current()
    };
    let bounds = (agent.limits().forwards_per_link, agent.limits().pending_opens_per_link);
    let coming = Coming { name, gateway, line, head, key: &state.key, bounds, deadline };
    let refused = |reason: &'static str, event: Event| {
        let event = event.organisation(&name.organisation).agent(&name.agent);
        agent.trail.stranger(event, reason);
    };
    let (server, accepted) = coming.log_in(stream, current, &agent.tasks).await.inspect_err(|error| match error {
        LinkError::LoginRefused { reason, key, .. } => {
            refused(reason, Event::new(Kind::AuthRefused).key(key).detail(gateway));
        }
        LinkError::Handshake { source: HandshakeError::Ssh(source), .. } => {
            let detail = format!("{gateway}: {}", Chain(source));
            refused("handshake", Event::new(Kind::AuthRefused).detail(detail));
        }
        _ => {}
    })?;
    let switch = server.control.clone();
    let cut = switch.cut_on_drop();
    let event = Event::new(Kind::LinkUp)
        .organisation(&name.organisation)
        .agent(&name.agent)
        .replica(&state.replica)
        .credential(&accepted)
        .transport(gateway.transport().as_str())
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
        gateway: gateway.clone(),
        worn: CancellationToken::new(),
        superseded: CancellationToken::new(),
        moved: CancellationToken::new(),
    });
    Ok(Link { shared, opens, control_channel, misconduct, running })
}

/// Says who comes, and reads what the gateway says of itself. Yields what it has said.
pub(super) async fn introduce(
    stream: &mut Stream,
    head: Bytes,
    line: &str,
    gateway: &GatewayUrl,
    deadline: Instant,
) -> Result<Bytes, LinkError> {
    let greet = |source: GreetError| {
        let bare = gateway.transport() == Transport::Ssh;
        let source = if bare { source.of_dialled(gateway.target()) } else { source };
        LinkError::Greet { gateway: gateway.clone(), source }
    };
    let greeting = format!("{line}\r\n");
    stream.write_all(greeting.as_bytes()).await.map_err(|error| greet(GreetError::Io(error)))?;
    stream.flush().await.map_err(|error| greet(GreetError::Io(error)))?;
    let greeted = admit::greet(stream, head, None, deadline).await.map_err(greet)?;
    // A gateway that had to wait for our line has sent its door's.
    if !matches!(greeted.peer, Peer::Client | Peer::Door) {
        return Err(LinkError::NotAGateway { gateway: gateway.clone() });
    }
    Ok(greeted.head)
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

    /// Where it is kept.
    pub(super) fn post(&self) -> &Arc<Post> {
        &self.shared.post
    }

    /// The way that it was made by.
    pub(super) fn gateway(&self) -> &GatewayUrl {
        &self.shared.gateway
    }

    /// What its forwards share.
    pub(super) fn session(&self) -> &Arc<Session> {
        &self.shared.session
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
        let (mut revoked, mut worn_out) = (None, false);
        let end = loop {
            tokio::select! {
                opening = self.opens.recv() => {
                    let Some(opening) = opening else { break LinkEnd::Lost };
                    opened += 1;
                    if opened == share {
                        shared.worn.cancel();
                    }
                    if opened > limits::OPENS_PER_LINK_MAX {
                        warn!(gateway = %shared.gateway, "cutting a link that has long carried its share of opens");
                        worn_out = true;
                        break LinkEnd::Lost;
                    }
                    let over = opening.over.map(|over| match over {
                        Over::Channels => "forwards_per_link",
                        Over::Opens => "pending_opens_per_link",
                    });
                    session.take(opening, over, &Count::default(), &self.misconduct.opens).await;
                }
                why = session.revoked() => {
                    info!(gateway = %shared.gateway, "cutting a link that the configuration no longer allows");
                    revoked = Some(why);
                    break LinkEnd::Lost;
                }
                () = stop.cancelled() => break LinkEnd::Stopped,
            }
        };
        session.switch.cut();
        let event = |kind| {
            Event::new(kind)
                .organisation(&session.organisation)
                .agent(&agent.id)
                .replica(&session.replica)
                .credential(&session.orchestrator)
        };
        self.misconduct.record(&agent.trail, event).await;
        let ended = timeout(limits::STOP_GRACE, self.running.ended()).await;
        // What the gateway said before it hung up is heard before the link counts as ended.
        drop(timeout(limits::STOP_GRACE, conversation).await);
        let (reason, detail) = match (ended, &end) {
            (_, LinkEnd::Stopped) => ("stopped", shared.gateway.to_string()),
            (_, LinkEnd::Lost) if let Some(why) = revoked => (why, shared.gateway.to_string()),
            (_, LinkEnd::Lost) if worn_out => ("worn_out", shared.gateway.to_string()),
            (Ok(Ok(())), LinkEnd::Lost) => ("closed", shared.gateway.to_string()),
            (Ok(Err(error)), LinkEnd::Lost) => ("lost", format!("{}: {}", shared.gateway, Chain(&error))),
            (Err(_), LinkEnd::Lost) => ("lost", format!("{}: the session did not end", shared.gateway)),
        };
        if let Err(error) = agent.trail.note(event(Kind::LinkDown).reason(reason).detail(detail)).await {
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
    pub(super) async fn answer(&self, opening: Opening, code: RefusalCode, forward: Option<&ForwardId>, words: &str) {
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
    ///
    /// # Errors
    /// If it has not, with the word that the audit uses.
    fn stands(&self, state: &State) -> Result<(), &'static str> {
        if self.dismissed.is_cancelled() || self.from().is_some_and(|from| !state.listens_to(from)) {
            return Err(REVOKED);
        }
        let login = state.orchestrator(&self.organisation, &self.orchestrator, self.from(), Timestamp::now());
        login.map(drop).map_err(live::lapse)
    }

    /// Where the peer is; of a gateway nobody can tell.
    pub(super) fn from(&self) -> Option<IpAddr> {
        self.guest.as_ref().map(|guest| guest.client.ip())
    }

    /// Waits until the configuration no longer has the way that the session came by, or the key that it was logged in with.
    /// Yields the word that the audit uses.
    pub(super) async fn revoked(&self) -> &'static str {
        tokio::select! {
            () = self.dismissed.cancelled() => {}
            () = self.agent.state.until(|state| self.stands(state).is_err()) => {}
            // By itself, and nothing else tells of it.
            () = reached(self.orchestrator.expires(), limits::CERTIFICATE_LOOK) => {}
        }
        // What has ended it may hold again by now, and has ended it all the same.
        self.stands(&self.agent.state.current()).err().unwrap_or(REVOKED)
    }

    /// Whether a forward that was permitted to `addresses` would be still, in this session.
    ///
    /// # Errors
    /// If it would not, with the word that the audit uses.
    pub(super) fn allows(&self, state: &State, case: &Case<'_>, addresses: &[SocketAddr]) -> Result<(), &'static str> {
        self.stands(state)?;
        state.allows(case, addresses, &self.agent.guard(state), Timestamp::now())
    }

    /// Waits until a state that `changes` has not seen yet no longer allows what was permitted. Yields the word that the audit
    /// uses.
    pub(super) async fn no_longer_allows(
        &self,
        mut changes: watch::Receiver<Arc<State>>,
        case: &Case<'_>,
        addresses: &[SocketAddr],
    ) -> &'static str {
        loop {
            tokio::select! {
                () = self.dismissed.cancelled() => return REVOKED,
                () = reached(self.orchestrator.expires(), limits::CERTIFICATE_LOOK) => {
                    return self.stands(&self.agent.state.current()).err().unwrap_or(REVOKED);
                }
                changed = changes.changed() => {
                    if changed.is_err() {
                        // The agent is going away, and ends the forward itself.
                        std::future::pending().await
                    }
                }
            }
            let state = changes.borrow_and_update().clone();
            if let Err(why) = self.allows(&state, case, addresses) {
                return why;
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
            debug!(gateway = %shared.gateway, "cutting a link whose gateway uses a channel that it was not granted");
            return shared.session.switch.cut();
        }
    }
    let hello = Control::Hello(Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        features: features(&shared.session.agent),
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
    let session = &shared.session;
    let drain = &session.agent.drain;
    // One that is asked for while another is under way is not taken on.
    let (reports, mut found) = mpsc::channel(1);
    let (ear, anchors, mut said) = anchors::exchange(&session.agent.trail, |kind| {
        Event::new(kind)
            .organisation(&session.organisation)
            .agent(&session.agent.id)
            .replica(&session.replica)
            .detail(&shared.gateway)
    });
    let anchors = anchors.leaving_if({
        let session = session.clone();
        move || session.agent.drain.begun().is_cancelled() || session.departure.is_told()
    });
    let anchors = anchors.run();
    tokio::pin!(anchors);
    let speak = async {
        let mut told = false;
        loop {
            let message = tokio::select! {
                biased;
                () = drain.begun().cancelled(), if !told => {
                    told = true;
                    Control::Drain(Drain { deadline_s: drain.left_s() })
                }
                Some(report) = found.recv() => Control::Examined(report),
                Some(message) = said.recv() => *message,
                else => return std::future::pending::<()>().await,
            };
            if writer.send(message.encode()).await.is_err() {
                debug!(gateway = %shared.gateway, "the gateway could not be told something");
                // Whoever listens sees the end of the channel.
                return std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = speak => return,
        () = &mut anchors => return,
        () = listen(&shared, reader, ear, &reports) => {}
    }
    drop(said);
    // What the gateway has said of the trails at last is put on record.
    drop(timeout(limits::ANCHOR_FAREWELL, anchors).await);
}

/// What this agent can do beyond the major version, as its configuration has it now.
fn features(agent: &Agent) -> Vec<String> {
    let doctor = agent.state.current().remote_doctor.then_some(wire::DOCTOR);
    [Some(wire::CREDIT), Some(wire::ANCHORS), doctor].into_iter().flatten().map(str::to_owned).collect()
}

/// Reads what the gateway says on the control channel, to its end.
async fn listen(shared: &Shared, mut reader: ssh::Reader, mut ear: Ear, reports: &mpsc::Sender<Report>) {
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
                Ok(Some(Control::Hello(hello))) => {
                    debug!(version = hello.version, "the gateway said hello");
                    ear.greeted(&hello);
                }
                Ok(Some(Control::Anchor(anchor))) if ear.anchor(anchor).is_ok() => {}
                Ok(Some(Control::Anchored(anchored))) if ear.anchored(anchored.clone()).is_ok() => {}
                Ok(Some(Control::Anchor(_) | Control::Anchored(_))) => {
                    info!(gateway = %shared.gateway, "cutting a link whose gateway sends its trail's heads without end");
                    shared.session.switch.cut();
                    return;
                }
                Ok(Some(Control::Superseded)) => shared.superseded.cancel(),
                // Once is enough: what is said again on the same link asks for nothing more.
                Ok(Some(message @ (Control::Drain(_) | Control::Move))) if !shared.moved.is_cancelled() => {
                    info!(gateway = %shared.gateway, ?message, "the gateway wants another link");
                    shared.moved.cancel();
                }
                Ok(Some(message @ (Control::Drain(_) | Control::Move))) => {
                    debug!(?message, "the gateway said");
                }
                Ok(Some(Control::KeyNotice(notice))) if notices < limits::KEY_NOTICES_PER_LINK => {
                    notices += 1;
                    expiries::heed(&shared.post, &shared.gateway, notice);
                }
                Ok(Some(Control::KeyNotice(_))) => debug!("the gateway goes on about the end of a key"),
                Ok(Some(Control::Examine)) => doctor::remote::examine(&shared.session, reports),
                Ok(Some(Control::Examined(_))) => debug!("the gateway answers what it was not asked"),
                Ok(Some(Control::Unknown(kind))) => debug!(kind, "skipped a control message of a later version"),
                Ok(None) => break,
                Err(error) => {
                    info!(gateway = %shared.gateway, %error, "cutting a link whose gateway breaks the protocol");
                    shared.session.switch.cut();
                    return;
                }
            }
        }
    }
}

/// The listener's name in the trail.
pub(super) const DOOR: &str = "listen";

const _: () = assert!(limits::LINK_KEEPALIVE.as_secs() >= limits::LOGIN_GRACE.as_secs(), "see limits::DOOR_KEEPALIVE");

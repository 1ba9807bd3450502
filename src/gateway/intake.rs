//! Accepts connections, and makes links or door sessions of them.
//!
//! Promised: a connection has a seat before its first byte is read and gives it back when it has logged in; everything up
//! to the login happens under one deadline; what an agent claims to be is believed only with a host key that the registry
//! holds for exactly that agent.
//!
//! A connection is handed over to its thread before anything is read of it, the one that carries the fewest forwards: so a
//! thousand idle agents that come back after a restart shake hands where they hinder nobody, as far as there is such a thread.

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};

use bytes::BytesMut;
use jiff::Timestamp;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::arrive::{Arrived, Arriving, Entrance, Said, TlsFacts};
use super::door::connect::Arrival;
use super::lapses::{AGENT_DRAINED, Lapse};
use super::live::Login;
use super::mutual::{self, Visitor, Whose};
use super::roster::{Link, Peer as Linked, Process, Standing};
use super::{Gateway, door, expiries};
use crate::audit::{Event, Kind};
use crate::chain::Chain;
use crate::identity::{AgentName, Credential, ReplicaId};
use crate::limits;
use crate::registry::{Refusal, Registry};
use crate::task::{Load, Worker};
use crate::tls::judge::Flaw;
use crate::tunnel::admit::penalty::Fault;
use crate::tunnel::admit::{Full, Greeted, Place, Seat};
use crate::tunnel::anchors::{self, Ear, Leave};
use crate::tunnel::listen;
use crate::tunnel::ssh::{self, Channel, ClientOptions, Reader, Violation, Writer};
use crate::tunnel::stream::Stream;
use crate::tunnel::wire::{self, Control, Drain, Hello, Peer};

/// Accepts at a main listener, which has this place in the configuration, until the gateway drains.
pub(super) async fn accept(gateway: Arc<Gateway>, listener: TcpListener, index: usize) {
    let stop = gateway.drain.begun().clone();
    loop {
        let accepted = tokio::select! {
            // What is not accepted now waits for whoever shares the listener.
            biased;
            () = stop.cancelled() => return,
            accepted = listen::accept(&listener) => accepted,
        };
        let (stream, address) = accepted;
        let state = gateway.state.current();
        let balanced = state.is_balancer(index, address.ip());
        let terminated = state.is_terminator(index, address.ip());
        let entrance = Entrance { listener: index, address, balanced, terminated };
        match admit(&gateway, &entrance) {
            Ok(seat) => hand_over(&gateway, stream, entrance, seat),
            Err(reason) => {
                turn_away(&gateway, address, reason);
            }
        }
    }
}

/// Whether a connection is taken up at all, before a byte of it is read. A balancer's is judged when it is known whose it is.
fn admit(gateway: &Gateway, entrance: &Entrance) -> Result<Seat, &'static str> {
    let client = (!entrance.balanced && !entrance.terminated).then(|| entrance.address.ip());
    if let Some(client) = client {
        judge(gateway, entrance.listener, client)?;
    }
    gateway.room.seat(client, Instant::now()).map_err(no_seat)
}

/// Whether a client is taken up, as far as its address goes.
pub(super) fn judge(gateway: &Gateway, listener: usize, from: IpAddr) -> Result<(), &'static str> {
    if !gateway.state.current().accepts(listener, from) {
        return Err("source_network");
    }
    if !gateway.blames(from) || gateway.penalties.admits(from, Instant::now().into_std()) {
        return Ok(());
    }
    Err("too_many_failures")
}

pub(super) fn no_seat(_: Full) -> &'static str {
    "too_many_connections"
}

/// Records a connection that ends before its login because of the address that it comes from.
pub(super) fn turn_away(gateway: &Gateway, address: SocketAddr, reason: &'static str) {
    debug!(reason, "turned a connection away");
    gateway.trail.stranger(Event::new(Kind::AuthRefused).client(address), reason);
}

fn hand_over(gateway: &Arc<Gateway>, stream: TcpStream, entrance: Entrance, seat: Seat) {
    let deadline = Instant::now() + limits::LOGIN_GRACE;
    let worker = gateway.crew.lightest().clone();
    // From here on, so that many who come at once are spread.
    let carried = worker.carry(Load::Session);
    let stream = match stream.into_std() {
        Ok(stream) => stream,
        Err(error) => return debug!(%error, "a connection ended at once"),
    };
    let (gateway, there) = (gateway.clone(), worker.clone());
    let tasks = gateway.tasks.clone();
    worker.spawn(&tasks, async move {
        let _carried = carried;
        let stream = match TcpStream::from_std(stream) {
            Ok(stream) => stream,
            Err(error) => return warn!(%error, "could not hand a connection over to its thread"),
        };
        let life = Box::pin(greet(gateway, there, stream, entrance, deadline, seat)).await;
        if let Some(life) = life {
            life.await;
        }
    });
}

/// What a connection goes on as, for the rest of its life.
type Life = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Waits until it is known what a connection wants, and for an SSH session until it may shake hands. Yields what it goes on
/// as, if anything: what comes before that is no part of it, since a link waits for most of its life, a thousand times over.
async fn greet(
    gateway: Arc<Gateway>,
    worker: Worker,
    stream: TcpStream,
    entrance: Entrance,
    deadline: Instant,
    seat: Seat,
) -> Option<Life> {
    let Entrance { listener, address, .. } = entrance;
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "a connection ended at once");
        return None;
    }
    let stop = gateway.tasks.stopping().clone();
    let arriving =
        Arriving { gateway: &gateway, worker: &worker, entrance, deadline, seat: &seat, client: address, tls: None };
    let arrived = tokio::select! {
        arrived = arriving.arrive(stream.into()) => arrived?,
        () = seat.lost().cancelled() => {
            turn_away(&gateway, address, "too_many_connections");
            return None;
        }
        () = stop.cancelled() => return None,
    };
    let Arrived { stream, client: address, transport, tls, said } = arrived;
    let clear = tls.is_none() && mutual::refuses_clear(&gateway.state.current(), listener);
    let greeted = match said {
        Said::Ssh(greeted) => greeted,
        Said::Connect(_) if clear => {
            turn_away(&gateway, address, Flaw::Missing.as_str());
            return None;
        }
        Said::Connect(request) => {
            let arrival = Arrival { address, listener, shown: tls.and_then(|tls| tls.peer), seat };
            return Some(Box::pin(door::connect::serve(gateway, stream, *request, arrival)));
        }
    };
    if clear {
        let reason = Flaw::Missing.as_str();
        match &greeted.peer {
            Peer::Agent { name, .. } => not_linked(&gateway, name, address, reason, "it came without TLS"),
            Peer::Client | Peer::Stock | Peer::Door => turn_away(&gateway, address, reason),
        }
        return None;
    }
    if greeted.peer == Peer::Door {
        debug!("turned away a gateway");
        gateway.trail.stranger(Event::new(Kind::AuthRefused).client(address), "is_a_gateway");
        return None;
    }
    // Not before: who says nothing costs a seat, and no place.
    let place = tokio::select! {
        place = timeout_at(deadline, gateway.handshakes.begin(worker.number(), address.ip())) => place,
        () = seat.lost().cancelled() => {
            turn_away(&gateway, address, "too_many_connections");
            return None;
        }
        () = stop.cancelled() => return None,
    };
    let Ok(place) = place else {
        debug!("turned a connection away: too many handshakes came before it");
        gateway.trail.stranger(Event::new(Kind::AuthRefused).client(address), "too_many_handshakes");
        return None;
    };
    let certificates = gateway.state.current().listener(listener).is_some_and(|listener| listener.certificates);
    let admitted = Admitted { address, listener, certificates, greeted, deadline, seat, place, transport, tls };
    Some(match admitted.greeted.peer.clone() {
        Peer::Agent { name, replica } => Box::pin(link(gateway, worker, stream, admitted, (name, replica))),
        Peer::Client | Peer::Stock | Peer::Door => Box::pin(door::ssh::serve(gateway, stream, admitted)),
    })
}

/// A connection that may shake hands.
pub(super) struct Admitted {
    /// Where it comes from; behind a balancer, where the balancer says.
    pub(super) address: SocketAddr,
    /// The main listener that it came in by.
    pub(super) listener: usize,
    /// Whether principals may log in with certificates there.
    pub(super) certificates: bool,
    /// What it has said.
    pub(super) greeted: Greeted,
    /// When it has to have logged in.
    pub(super) deadline: Instant,
    /// Kept until then.
    pub(super) seat: Seat,
    /// For the handshake.
    pub(super) place: Place,
    /// What carries its SSH, as the trail calls it.
    pub(super) transport: &'static str,
    /// What TLS has told, if there is any.
    pub(super) tls: Option<TlsFacts>,
}

type Claim = (AgentName, Option<ReplicaId>);

async fn link(gateway: Arc<Gateway>, worker: Worker, stream: Stream, admitted: Admitted, (name, replica): Claim) {
    let Admitted { address, listener, greeted, deadline, seat, place, transport, tls, .. } = admitted;
    let stop = gateway.tasks.stopping().clone();
    let visitor = Visitor { listener, shown: tls.and_then(|tls| tls.peer), whose: Whose::Agent(name.clone()) };
    let establishing =
        place.during(timeout_at(deadline, Box::pin(establish(&gateway, stream, greeted, address, &name, &visitor))));
    let established = tokio::select! {
        established = establishing => established,
        () = seat.lost().cancelled() => return turn_away(&gateway, address, "too_many_connections"),
        () = stop.cancelled() => return,
    };
    let (client, login, control, hello) = match established {
        Ok(Ok(established)) => established,
        Ok(Err((EXAMINED, key))) => return examined(&gateway, &name, address, &key).await,
        Ok(Err((reason, detail))) => return not_linked(&gateway, &name, address, reason, &detail),
        Err(_) => return not_linked(&gateway, &name, address, "timeout", ""),
    };
    drop(seat);
    let _welcome = gateway.penalties.welcome(address.ip());
    // A replica without a name of its own is told apart by nothing; it shares the name with others of its kind.
    let replica = replica.or_else(|| "unnamed".parse().ok());
    let Some(replica) = replica else { return };
    let key = client.host_key().fingerprint();
    let process = Process::of(&hello);
    let features = hello.clone();
    let peer = Linked { name, replica, process, address, transport, version: hello.version, key };
    let link = Arc::new(Link::new(peer.clone(), client, worker, gateway.tasks.clone()));
    if hello.features.iter().any(|feature| feature == wire::DOCTOR) {
        link.examination().permit();
    }
    let _present = gateway.drain.greet();
    let event = |kind| {
        Event::new(kind)
            .organisation(&peer.name.organisation)
            .agent(&peer.name.agent)
            .replica(&peer.replica)
            .key(peer.key)
            .client(peer.address)
    };
    // Before its record, so that whoever reads of the link finds it there. A forward on another thread may take it at once,
    // and be recorded a moment before it.
    let surplus = gateway.roster.insert(&link);
    // Before anything is waited for: they are in the roster no more, and would be links that nobody asks.
    for surplus in surplus {
        let Linked { name, replica, .. } = &surplus.peer;
        warn!(agent = %name, replica = %replica, "cutting the oldest link: the agent has too many");
        surplus.client().control().cut();
    }
    let up = match visitor.judge(&gateway, Timestamp::now()) {
        Ok(shown) => event(Kind::LinkUp).transport(transport).client_certificate(shown.mark()),
        // It has lapsed since the handshake, which is noticed below.
        Err(_) => event(Kind::LinkUp).transport(transport),
    };
    if let Err(error) = gateway.trail.note(up).await {
        warn!(error = %Chain(&error), "cutting a link that could not be recorded");
        gateway.roster.remove(&link);
        link.client().control().cut();
        return;
    }
    info!(agent = %peer.name, replica = %peer.replica, key = %peer.key, "linked");
    gateway.lapses.linked(&peer);
    gateway.forwards.tell("link.up", Some(&peer.name), peer.replica.as_str());
    let gone = link.client().control().gone().clone();
    let Channel { reader, writer } = control;
    let told = CancellationToken::new();
    let (ear, anchors, said) = anchors::exchange(&gateway.trail, |kind| {
        Event::new(kind).organisation(&peer.name.organisation).agent(&peer.name.agent).replica(&peer.replica)
    });
    ear.greeted(&features);
    // Where it ends in order, with the reason for that: whatever becomes of it while it is kept for the last anchors.
    let (leave, ending) = (anchors.leave(), OnceLock::new());
    // In this order: what is taken back is not merely lost, and a session that is gone has not broken the protocol.
    let reason = tokio::select! {
        biased;
        () = no_longer_registered(&gateway, &link) => "revoked",
        flaw = visitor.unwelcome(&gateway) => flaw.as_str(),
        () = gateway.state.until(|state| !state.serves(&peer.name.organisation)) => "revoked",
        () = gateway.state.until(|state| !state.accepts(listener, address.ip())) => "revoked",
        () = gone.cancelled() => "lost",
        () = stop.cancelled() => "stopped",
        reason = async {
            let reason = last_forward(&link, &told).await;
            let reason = *ending.get_or_init(|| reason);
            leave.take().await;
            reason
        } => reason,
        () = listen(reader, &link, ear) => "protocol_violation",
        () = speak(&gateway, &link, login, (writer, said), &told, (&leave, &ending)) => "drained",
        () = anchors.run() => "lost",
    };
    let (reason, in_order) = ending.get().map_or((reason, false), |reason| (*reason, true));
    link.ends(reason);
    gateway.roster.remove(&link);
    if in_order {
        link.client().disconnect(reason).await;
        // The agent hangs up when it has read that; if it does not, the cut below does.
        drop(timeout_at(Instant::now() + limits::GOODBYE_PATIENCE, gone.cancelled()).await);
    }
    link.client().control().cut();
    info!(agent = %peer.name, replica = %peer.replica, reason, "the link has ended");
    gateway.forwards.tell("link.down", Some(&peer.name), &format!("{reason}: {}", peer.replica));
    let well = ["replaced", "drained", "stopped"].contains(&reason);
    let lapse = (!well).then(|| Lapse::now(reason, "", address));
    if gateway.registry.current().has(&peer.name) {
        gateway.lapses.ended(&peer, lapse, gateway.roster.holds(&peer));
    }
    if link.client().control().was_flooded() {
        let event = event(Kind::PeerViolation).reason(ssh::IDLE_FLOOD).detail(ssh::IDLE_FLOOD_TEXT);
        if let Err(error) = gateway.trail.note(event).await {
            debug!(error = %Chain(&error), "could not record what an agent tried");
        }
    }
    if let Err(error) = gateway.trail.note(event(Kind::LinkDown).reason(reason)).await {
        warn!(error = %Chain(&error), "could not record the end of a link");
    }
}

/// Records a connection that claimed to be an agent and did not become a link.
fn not_linked(gateway: &Gateway, name: &AgentName, address: SocketAddr, reason: &'static str, detail: &str) {
    debug!(reason, detail, "did not link");
    gateway.blame(address.ip(), fault(reason));
    if gateway.registry.current().has(name) {
        gateway.lapses.not_linked(name, Lapse::now(reason, detail, address));
    }
    let event = Event::new(Kind::AuthRefused).organisation(&name.organisation).agent(&name.agent).client(address);
    let event = if detail.is_empty() { event } else { event.detail(detail) };
    gateway.trail.stranger(event, reason);
}

/// Records an agent that has been let in and wanted no link: its owner examines it. There is nothing wrong with it, so that
/// nothing is held against it.
async fn examined(gateway: &Gateway, name: &AgentName, address: SocketAddr, key: &str) {
    info!(agent = %name, "an agent's owner has looked whether it would be let in");
    let event = Event::new(Kind::AgentExamined).organisation(&name.organisation).agent(&name.agent);
    let event = event.key(key).client(address).detail("by its owner: it would be let in, and no link was made");
    if let Err(error) = gateway.trail.note(event).await {
        warn!(error = %Chain(&error), "could not record that an agent was examined");
    }
}

/// Not linked, because that was not wanted.
const EXAMINED: &str = "examined";

/// What is held against the address of an agent that did not link. That it has its key was proved before its key was judged.
fn fault(reason: &str) -> Fault {
    match reason {
        "timeout" => Fault::Timeout,
        "handshake" => Fault::Garbage,
        "unknown_key" | "unknown_organisation" | "unknown_agent" | "other_organisation" => Fault::Refused,
        // Its key is registered there, or it is the agent that refuses.
        _ => Fault::Misconfigured,
    }
}

/// Waits until the link takes no more forwards, its agent has been told so and the last one has ended. Returns the reason of
/// its end.
async fn last_forward(link: &Link, told: &CancellationToken) -> &'static str {
    let why = link.spent().await;
    told.cancelled().await;
    match why {
        Standing::Superseded => "superseded",
        Standing::Unanswering => "unanswering",
        Standing::Draining => AGENT_DRAINED,
        Standing::Active | Standing::Retired => "replaced",
    }
}

/// Handshake, login and hello.
async fn establish(
    gateway: &Arc<Gateway>,
    stream: Stream,
    greeted: Greeted,
    address: SocketAddr,
    name: &AgentName,
    visitor: &Visitor,
) -> Result<(ssh::Client, Credential, Channel, Hello), (&'static str, String)> {
    let line = greeted.said.unwrap_or(wire::CLIENT_LINE);
    let refused = Arc::new(std::sync::Mutex::new(None::<(&'static str, String)>));
    let host_key = Box::new({
        let (gateway, name, refused, visitor) = (gateway.clone(), name.clone(), refused.clone(), visitor.clone());
        move |key: &crate::identity::PublicKey| {
            let (fingerprint, now) = (key.fingerprint(), Timestamp::now());
            let served = gateway.state.current().serves(&name.organisation);
            let judged = gateway.registry.current().agent(&name, &fingerprint, address.ip(), now);
            let reason = match judged {
                Ok(()) if served => match visitor.judge(&gateway, now) {
                    Ok(_) => return true,
                    Err(flaw) => flaw.as_str(),
                },
                Ok(()) => "organisation_not_served",
                Err(refusal) => Refusal::as_str(refusal),
            };
            *refused.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                Some((reason, format!("the key shown is {fingerprint}")));
            false
        }
    });
    let report = Arc::new({
        let (gateway, name) = (gateway.clone(), name.clone());
        move |violation: Violation| {
            let Violation::OpenedChannel(kind) = violation;
            warn!(agent = %name, channel = kind, "an agent opened a channel toward the gateway; refused");
            let event = Event::new(Kind::PeerViolation)
                .organisation(&name.organisation)
                .agent(&name.agent)
                .client(address)
                .detail(format!("opened a channel of type {kind}"));
            gateway.trail.stranger(event, "opened_channel");
        }
    });
    let options = ClientOptions {
        line,
        said: greeted.said.is_some(),
        head: greeted.head,
        host_key,
        host_certificate: None,
        keepalive: limits::LINK_KEEPALIVE,
        flow: ssh::Flow::Credit,
        report,
    };
    let stranger = ssh::connect(stream, options).await.map_err(|error| {
        let refused = refused.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        refused.unwrap_or_else(|| ("handshake", Chain(&error).to_string()))
    })?;
    let state = gateway.state.current();
    let login = state.login(&name.organisation).ok_or(("organisation_not_served", String::new()))?;
    let (key, now) = (&login.key, Timestamp::now());
    let client = stranger
        .with_certificate(login.certificate(now).cloned())
        .login(name.organisation.as_str(), key, &gateway.tasks, limits::PENDING_OPENS_PER_LINK)
        .await
        .map_err(|error| {
            let what = format!("{}; the key is {}", Chain(&error), key.public().fingerprint());
            warn!(agent = %name, "an agent did not accept the gateway's login: {what}");
            ("login_refused_by_agent", what)
        })?;
    // An agent that does not answer from here on would else keep the session for itself.
    let cut = client.control().cut_on_drop();
    let mut control = client
        .subsystem(wire::CONTROL_SUBSYSTEM)
        .await
        .map_err(|error| ("control_channel", Chain(&error).to_string()))?;
    let hello = Control::Hello(Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        features: vec![wire::CREDIT.to_owned(), wire::ANCHORS.to_owned()],
        channels: u32::try_from(limits::CHANNELS_PER_LINK).unwrap_or(u32::MAX),
        replica: None,
        instance: None,
        started: None,
        way: None,
    });
    let broken = |error: &dyn std::fmt::Display| ("control_channel", error.to_string());
    control.writer.send(hello.encode()).await.map_err(|error| broken(&error))?;
    let mut buffer = BytesMut::new();
    loop {
        match Control::decode(&mut buffer).map_err(|error| broken(&error))? {
            // Without it nothing would keep the two ends from blocking each other; no agent of this major version lacks it.
            Some(Control::Hello(hello)) if !hello.features.iter().any(|feature| feature == wire::CREDIT) => {
                return Err(("control_channel", "the agent knows nothing of credit".to_owned()));
            }
            Some(Control::Hello(hello)) => {
                cut.disarm();
                return Ok((client, login.credential(now), control, hello));
            }
            // Its owner has looked whether it would be let in, and wants no link.
            Some(Control::Examine) => return Err((EXAMINED, client.host_key().fingerprint().to_string())),
            // What else an agent has to say before its hello is of no use yet.
            Some(
                Control::Drain(_)
                | Control::Move
                | Control::Superseded
                | Control::KeyNotice(_)
                | Control::Examined(_)
                | Control::Anchor(_)
                | Control::Anchored(_)
                | Control::Unknown(_),
            ) => continue,
            None => {}
        }
        match control.reader.bytes().await {
            Some(bytes) => buffer.extend_from_slice(&bytes),
            None => return Err(("control_channel", "the agent closed it".to_owned())),
        }
    }
}

/// Reads the control channel; returns when the agent breaks the protocol.
async fn listen(mut reader: Reader, link: &Link, mut ear: Ear) {
    let gone = link.client().control().gone();
    let mut buffer = BytesMut::new();
    loop {
        match reader.bytes().await {
            Some(bytes) => buffer.extend_from_slice(&bytes),
            // Without its control channel a link is of no use; if the session is gone, that is the reason to tell.
            None => {
                if tokio::time::timeout(limits::GOODBYE_PATIENCE, gone.cancelled()).await.is_ok() {
                    std::future::pending::<()>().await;
                }
                return;
            }
        }
        loop {
            match Control::decode(&mut buffer) {
                // It knows best, and without this its forwards would be refused one by one.
                Ok(Some(Control::Drain(drain))) => {
                    link.departure().told(drain.deadline_s);
                    if link.retire(Standing::Draining) {
                        let Linked { name, replica, .. } = &link.peer;
                        info!(agent = %name, replica = %replica, "the agent drains; it gets nothing new");
                    }
                }
                Ok(Some(Control::Anchor(anchor))) if ear.anchor(anchor).is_err() => return,
                Ok(Some(Control::Anchored(anchored))) if ear.anchored(anchored.clone()).is_err() => return,
                Ok(Some(Control::Examined(report))) => link.examination().answer(report),
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// Says on the control channel what an agent has to know: that it is to make another link, because the organisation has
/// another login key or certificate than `login` (the link is then retired by the other, or, where the agent does not know the
/// new one, stays); that this gateway drains; what its trail has come to (`said`); that the link's key comes to its end; why the link is retired, where the agent is
/// not behind that, and
/// fires `told` after it. Returns when a drain has left the link without a forward.
async fn speak(
    gateway: &Gateway,
    link: &Link,
    login: Credential,
    (mut writer, mut said): (Writer, mpsc::Receiver<Box<Control>>),
    told: &CancellationToken,
    (leave, ending): (&Leave, &OnceLock<&'static str>),
) {
    let Linked { name, replica, .. } = &link.peer;
    let differs = |now: &Login| now.credential(Timestamp::now()) != login;
    let (mut moves, mut drains, mut retires) = (false, false, false);
    let mut noticed = None;
    // What has been accepted may still need the link; when nothing does, it ends with its last forward.
    let over = async {
        gateway.drain.all_opened().await;
        link.idle().await;
        let _ = ending.set("drained");
        leave.take().await;
    };
    tokio::pin!(over);
    loop {
        let message = tokio::select! {
            biased;
            standing = link.retired(), if !retires => {
                retires = true;
                farewell(link, standing)
            }
            () = gateway.drain.begun().cancelled(), if !drains => {
                drains = true;
                Some(Control::Drain(Drain { deadline_s: gateway.drain.left_s() }))
            }
            () = gateway.state.until(|state| state.login(&name.organisation).is_some_and(differs)), if !moves => {
                info!(agent = %name, replica = %replica, "the login key has changed: asking for another link");
                moves = true;
                Some(Control::Move)
            }
            notice = expiries::notice(gateway, link, &mut noticed) => Some(notice),
            Some(message) = said.recv() => Some(*message),
            () = link.examination().asked() => Some(Control::Examine),
            () = &mut over, if drains => return,
        };
        let sent = match message {
            // In a box: it is said once in hours, and room for it would be kept all that time.
            Some(message) => Box::pin(writer.send(message.encode())).await,
            None => Ok(()),
        };
        if retires {
            told.cancel();
        }
        if let Err(error) = sent {
            // The link is as good as gone, which is noticed elsewhere. The writer is kept: without it the channel would end.
            debug!(%error, "could not tell an agent about its link");
            told.cancel();
            return std::future::pending().await;
        }
    }
}

/// What an agent is told when one of its links gets no more forwards.
fn farewell(link: &Link, standing: Standing) -> Option<Control> {
    let Linked { name, replica, .. } = &link.peer;
    match standing {
        Standing::Superseded => {
            warn!(agent = %name, replica = %replica, "two processes of an agent have the same replica name; the one that \
                was started last gets the forwards: give each a name of its own");
            Some(Control::Superseded)
        }
        Standing::Unanswering => {
            warn!(agent = %name, replica = %replica, "an agent answers no opens: asking it for another link");
            Some(Control::Move)
        }
        Standing::Active | Standing::Retired | Standing::Draining => None,
    }
}

/// Waits until the registry no longer holds the link's key for its agent.
async fn no_longer_registered(gateway: &Gateway, link: &Link) {
    let mut changed = gateway.registry.changed();
    loop {
        let Linked { name, key, address, .. } = &link.peer;
        if gateway.registry.current().agent(name, key, address.ip(), Timestamp::now()).is_err() {
            return;
        }
        if changed.changed().await.is_err() {
            // The registry is going away with the gateway, which ends the link itself.
            return std::future::pending().await;
        }
    }
}

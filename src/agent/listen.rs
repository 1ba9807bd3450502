//! The listener: the agent as a bastion, for orchestrators that can reach it and need no gateway.
//!
//! Promised: it is there only if the configuration says where it listens and from where it accepts; others are turned away
//! before a byte of theirs is read. A connection has a seat until it has logged in, shakes hands at a measured pace, and all
//! that under one deadline. The user is the organisation, the key one of that organisation's orchestrator keys; every other
//! pair is refused with the same bytes after the same delay, and the trail has the true reason. What may be opened is
//! decided, recorded and dialled as on a link ([`serve`](super::serve)), and nothing else can be asked for.
//!
//! What waits on what: a task accepts until the drain, or until the listener is withdrawn. One task per connection, on a
//! thread of the crew, waits for the identification string, a place among the handshakes and the login, then for opens, for
//! the configuration to drop its key, its address or the listener, for its last forward in a drain, and for the stop.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::serve::{DOOR, Guest, Session};
use super::{Agent, RunError};
use crate::audit::{Event, Kind};
use crate::chain::Chain;
use crate::drain::{Count, Departure};
use crate::identity::{Certificate, Credential, OrganisationId, PublicKey};
use crate::limits;
use crate::network::Networks;
use crate::task::{Load, Worker};
use crate::tunnel::admit::penalty::Fault;
use crate::tunnel::admit::{self, Seat};
use crate::tunnel::listen;
use crate::tunnel::ssh::{self, Flow, Login, Over, ServerOptions};
use crate::tunnel::wire::{self, Peer};

/// Where an agent listens itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// The address.
    pub address: SocketAddr,
    /// From where connections are accepted.
    pub accept_from: Networks,
}

impl Listen {
    pub(super) fn accepts(&self, client: IpAddr) -> bool {
        self.accept_from.contain(client)
    }
}

/// The listener that there is.
#[derive(Default)]
pub(super) struct Listening(Option<(SocketAddr, CancellationToken)>);

impl Listening {
    /// Makes what a configuration wants and there is not yet: it can fail, and is done before anything is changed.
    ///
    /// # Errors
    /// If the address cannot be had.
    pub(super) fn prepare(&self, wanted: Option<&Listen>) -> Result<Option<TcpListener>, RunError> {
        let Some(&Listen { address, .. }) = wanted else { return Ok(None) };
        let before = self.0.as_ref().map(|(at, _)| *at);
        if before == Some(address) {
            return Ok(None);
        }
        listen::bind(address).map(Some).map_err(|source| match before {
            // One address and all addresses exclude each other on a port, and what there is must not go before this is there.
            Some(before) if before.port() == address.port() && source.kind() == io::ErrorKind::AddrInUse => {
                RunError::ListenAgain { address, before }
            }
            _ => RunError::Listen { address, source },
        })
    }

    /// Withdraws what a configuration no longer wants, and accepts on what was prepared for it.
    pub(super) fn fit(&mut self, agent: &Arc<Agent>, wanted: Option<&Listen>, prepared: Option<TcpListener>) {
        if let Some((address, withdrawn)) = &self.0
            && wanted.is_none_or(|wanted| wanted.address != *address)
        {
            withdrawn.cancel();
            self.0 = None;
        }
        let (Some(wanted), Some(listener)) = (wanted, prepared) else { return };
        let withdrawn = CancellationToken::new();
        self.0 = Some((wanted.address, withdrawn.clone()));
        match listener.local_addr() {
            Ok(bound) => info!("listening on {bound}"),
            Err(error) => warn!(%error, "listening, but not known where"),
        }
        agent.tasks.spawn(accept(agent.clone(), listener, withdrawn));
    }
}

/// Accepts until the agent drains, or the listener is withdrawn.
async fn accept(agent: Arc<Agent>, listener: TcpListener, withdrawn: CancellationToken) {
    let stop = agent.drain.begun().clone();
    loop {
        let (stream, address) = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = withdrawn.cancelled() => return,
            accepted = listen::accept(&listener) => accepted,
        };
        // Before anything is read or kept of it: who may not come in costs no more than this.
        if !agent.state.current().listens_to(address.ip()) {
            debug!("turned a connection away: it comes from elsewhere");
            agent.trail.stranger(refused(address), "source_network");
            continue;
        }
        let blamed = agent.state.current().blames(address.ip());
        if blamed && !agent.penalties.admits(address.ip(), Instant::now().into_std()) {
            debug!("turned a connection away: its address has failed too often");
            agent.trail.stranger(refused(address), "too_many_failures");
            continue;
        }
        match agent.room.seat(Some(address.ip()), Instant::now()) {
            Ok(seat) => hand_over(&agent, stream, address, seat),
            Err(full) => {
                debug!(?full, "turned a connection away: too many have not logged in");
                agent.trail.stranger(refused(address), "too_many_connections");
            }
        }
    }
}

/// Holds something against an address, unless the operator has it exempt.
fn blame(agent: &Agent, address: SocketAddr, fault: Fault) {
    if !agent.state.current().blames(address.ip()) {
        return;
    }
    if let Some(bar) = agent.penalties.blame(address.ip(), fault, Instant::now().into_std()) {
        debug!(?fault, "an address is turned away for {} s", bar.as_secs());
    }
}

fn refused(address: SocketAddr) -> Event {
    Event::new(Kind::AuthRefused).client(address).door(DOOR)
}

fn hand_over(agent: &Arc<Agent>, stream: TcpStream, address: SocketAddr, seat: Seat) {
    let deadline = Instant::now() + limits::LOGIN_GRACE;
    let worker = agent.crew.lightest().clone();
    // From here on, so that many who come at once are spread.
    let carried = worker.carry(Load::Session);
    let stream = match stream.set_nodelay(true).and_then(|()| stream.into_std()) {
        Ok(stream) => stream,
        Err(error) => return debug!(%error, "a connection ended at once"),
    };
    let (agent, there) = (agent.clone(), worker.clone());
    let tasks = agent.tasks.clone();
    worker.spawn(&tasks, async move {
        let _carried = carried;
        match TcpStream::from_std(stream) {
            Ok(stream) => Box::pin(serve(agent, there, stream, address, deadline, seat)).await,
            Err(error) => warn!(%error, "could not hand a connection over to its thread"),
        }
    });
}

/// Serves one connection to its end.
async fn serve(
    agent: Arc<Agent>,
    worker: Worker,
    mut stream: TcpStream,
    address: SocketAddr,
    deadline: Instant,
    seat: Seat,
) {
    let stop = agent.tasks.stopping().clone();
    let greeted = tokio::select! {
        greeted = admit::greet(&mut stream, Bytes::new(), Some(wire::DOOR_LINE), deadline) => greeted,
        () = seat.lost().cancelled() => return agent.trail.stranger(refused(address), "too_many_connections"),
        () = stop.cancelled() => return,
    };
    let greeted = match greeted {
        Ok(greeted) => greeted,
        Err(error) => {
            debug!(error = %Chain(&error), "turned away a connection");
            if let Some(fault) = error.fault() {
                blame(&agent, address, fault);
            }
            return agent.trail.stranger(refused(address).detail(Chain(&error)), "identification");
        }
    };
    let flow = match greeted.peer {
        Peer::Client => Flow::Credit,
        Peer::Stock => Flow::Stock,
        Peer::Agent { .. } => return agent.trail.stranger(refused(address), "is_an_agent"),
        Peer::Door => return agent.trail.stranger(refused(address), "is_a_gateway"),
    };
    // Not before: who says nothing costs a seat, and no place.
    let place = tokio::select! {
        place = timeout_at(deadline, agent.handshakes.begin(worker.number(), address.ip())) => place,
        () = seat.lost().cancelled() => return agent.trail.stranger(refused(address), "too_many_connections"),
        () = stop.cancelled() => return,
    };
    let Ok(place) = place else {
        debug!("turned a connection away: too many handshakes came before it");
        return agent.trail.stranger(refused(address), "too_many_handshakes");
    };
    let state = agent.state.current();
    let logins = Arc::new(Mutex::new(Logins::default()));
    let login = GuestLogin { agent: agent.clone(), logins: logins.clone(), from: address.ip() };
    let options = ServerOptions {
        line: wire::DOOR_LINE.to_owned(),
        said: greeted.said.is_some(),
        head: greeted.head,
        key: state.key.clone(),
        certificate: None,
        control_channel: false,
        keepalive: limits::DOOR_KEEPALIVE,
        keepalive_max: 3,
        flow,
        channels: limits::CHANNELS_PER_SESSION,
        opens: limits::PENDING_OPENS_PER_SESSION,
    };
    let mut server = match ssh::serve(stream, options, login, &agent.tasks).await {
        Ok(server) => server,
        Err(error) => {
            blame(&agent, address, Fault::Garbage);
            return agent.trail.stranger(refused(address).detail(Chain(&error)), "handshake");
        }
    };
    let switch = server.control.clone();
    let _cut = switch.cut_on_drop();
    let timed_out = tokio::select! {
        outcome = place.during(timeout_at(deadline, server.logged_in.cancelled())) => outcome.is_err(),
        () = switch.gone().cancelled() => false,
        () = seat.lost().cancelled() => return agent.trail.stranger(refused(address), "too_many_connections"),
        () = stop.cancelled() => return,
    };
    let accepted = logins.lock().unwrap_or_else(PoisonError::into_inner).accepted.clone().filter(|_| !timed_out);
    let Some((organisation, orchestrator)) = accepted else {
        return record_stranger(&agent, address, &logins, timed_out, switch.is_flooded());
    };
    drop(seat);
    let _welcome = agent.penalties.welcome(address.ip());
    let event = |kind| {
        Event::new(kind)
            .organisation(&organisation)
            .agent(&agent.id)
            .replica(&state.replica)
            .credential(&orchestrator)
            .client(address)
            .door(DOOR)
    };
    let counted = agent.usage.session(&agent.limits(), &organisation);
    let _counted = match counted {
        Ok(counted) => counted,
        Err(limit) => {
            debug!(limit, "cutting a session: its organisation has too many");
            return agent.trail.stranger(event(Kind::AuthRefused).detail(limit), "limit");
        }
    };
    if let Err(error) = agent.trail.note(event(Kind::AuthAccepted)).await {
        return debug!(error = %Chain(&error), "cutting a session that could not be recorded");
    }
    let session = Arc::new(Session {
        agent: agent.clone(),
        organisation: organisation.clone(),
        replica: state.replica.clone(),
        orchestrator: orchestrator.clone(),
        switch: switch.clone(),
        dismissed: CancellationToken::new(),
        departure: Departure::default(),
        guest: Some(Guest { client: address, flow }),
    });
    let gone = switch.gone();
    let _present = agent.drain.greet();
    let forwards = Count::default();
    let mut goodbye = false;
    loop {
        tokio::select! {
            opening = server.opens.recv() => {
                let Some(opening) = opening else { break };
                let over = opening.over.map(|over| match over {
                    Over::Channels => "channels_per_session",
                    Over::Opens => "pending_opens_per_session",
                });
                session.take(opening, over, &forwards, &server.misconduct.opens).await;
            }
            () = gone.cancelled() => break,
            why = session.revoked() => {
                debug!(why, "cutting a session that the configuration no longer allows");
                // The forwards see the same change and say so; nothing is left but the session.
                tokio::task::yield_now().await;
                break;
            }
            () = stop.cancelled() => break,
            () = agent.drain.spent(&forwards) => {
                goodbye = true;
                break;
            }
        }
    }
    if goodbye {
        server.farewell("the agent goes away").await;
    }
    switch.cut();
    server.misconduct.record(&agent.trail, event).await;
}

#[derive(Default)]
struct Logins {
    accepted: Option<(OrganisationId, Credential)>,
    /// The last refusal: its true reason, and what is known of who was refused.
    refused: Option<(&'static str, Option<Credential>, Option<OrganisationId>)>,
    refusals: usize,
}

struct GuestLogin {
    agent: Arc<Agent>,
    logins: Arc<Mutex<Logins>>,
    from: IpAddr,
}

impl GuestLogin {
    fn judge(&self, user: &str, credential: Credential) -> Option<(OrganisationId, Credential)> {
        let Ok(organisation) = user.parse::<OrganisationId>() else {
            self.refuse("malformed_user", Some(credential), None);
            return None;
        };
        let state = self.agent.state.current();
        match state.admits(&organisation, &credential, Some(self.from), Timestamp::now()) {
            Ok(()) => Some((organisation, credential)),
            Err(reason) => {
                self.refuse(reason, Some(credential), Some(organisation));
                None
            }
        }
    }

    fn lets_in(&self, user: &str, credential: Credential) -> bool {
        let Some(accepted) = self.judge(user, credential) else { return false };
        self.logins.lock().unwrap_or_else(PoisonError::into_inner).accepted = Some(accepted);
        true
    }

    fn refuse(&self, reason: &'static str, credential: Option<Credential>, organisation: Option<OrganisationId>) {
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        logins.refused = Some((reason, credential, organisation));
        logins.refusals += 1;
    }
}

impl Login for GuestLogin {
    fn offered(&mut self, user: &str, key: &PublicKey) -> bool {
        // The key may turn out to be that of a certificate; whose organisation has a CA is nothing to tell strangers.
        self.agent.state.current().has_any_authority() || self.judge(user, Credential::Key(key.fingerprint())).is_some()
    }

    fn verified(&mut self, user: &str, key: &PublicKey) -> bool {
        self.lets_in(user, Credential::Key(key.fingerprint()))
    }

    fn certified(&mut self, user: &str, certificate: &Certificate) -> bool {
        self.lets_in(user, Credential::Certificate(certificate.clone()))
    }

    fn unfit(&mut self, user: &str, why: &'static str) {
        self.refuse(why, None, user.parse().ok());
    }
}

fn record_stranger(agent: &Agent, address: SocketAddr, logins: &Mutex<Logins>, timed_out: bool, flooded: bool) {
    let logins = logins.lock().unwrap_or_else(PoisonError::into_inner);
    let mut event = refused(address);
    let reason = match &logins.refused {
        _ if flooded => "too_much_before_login",
        Some((reason, credential, organisation)) => {
            if let Some(credential) = credential {
                event = event.credential(credential);
            }
            if let Some(organisation) = organisation {
                event = event.organisation(organisation);
            }
            if logins.refusals > 1 {
                event = event.detail(format!("{} refusals on this connection; this is the last", logins.refusals));
            }
            *reason
        }
        None if timed_out => "timeout",
        None => "left_before_login",
    };
    blame(agent, address, Fault::of_login(reason, timed_out));
    agent.trail.stranger(event, reason);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listener_that_is_in_the_way_of_the_next_is_named() {
        let accept_from = || Networks::new(vec!["127.0.0.0/8".parse().expect("a network")]).expect("one at least");
        let at = |address| Listen { address, accept_from: accept_from() };
        let nowhere = Listening::default();
        let any = SocketAddr::from(([0, 0, 0, 0], 0));
        let there = nowhere.prepare(Some(&at(any))).expect("a port").expect("a listener");
        let bound = there.local_addr().expect("its address");
        let listening = Listening(Some((bound, CancellationToken::new())));
        assert!(listening.prepare(Some(&at(bound))).expect("nothing to do").is_none());
        assert!(listening.prepare(None).expect("nothing to do").is_none());
        let narrower = SocketAddr::from(([127, 0, 0, 1], bound.port()));
        let error = listening.prepare(Some(&at(narrower))).expect_err("in the way").to_string();
        assert!(error.contains(&bound.to_string()) && error.contains("restart the agent"), "{error}");
        // Somebody else's is another matter.
        let error = nowhere.prepare(Some(&at(narrower))).expect_err("in the way").to_string();
        assert_eq!(error, format!("could not listen on {narrower}"));
        let elsewhere = SocketAddr::from(([127, 0, 0, 1], 0));
        assert!(listening.prepare(Some(&at(elsewhere))).expect("a port").is_some());
    }
}

//! The SSH door: stock clients log in as `ORG/AGENT` with a registered key, or where the listener says so with a certificate of
//! a registered CA, and ask for `direct-tcpip` channels.
//!
//! Promised: a key that is unknown, of another organisation, expired, revoked or not granted the agent, and an agent that
//! does not exist, are refused with the same bytes after the same delay; the trail has the true reason. So is a certificate.
//!
//! Before anything is signed, a key is acknowledged only if it may log in as that user. A listener that takes certificates has
//! to acknowledge every key, because the library asks about a certificate with its bare key; it so tells strangers even less.

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::audit::{Event, Kind};
use crate::chain::Chain;
use crate::drain::{Count, Ticket};
use crate::gateway::Gateway;
use crate::gateway::broker::{self, Admission, Answer, Request};
use crate::gateway::intake::Admitted;
use crate::gateway::mutual::{Visitor, Whose};
use crate::identity::{AgentName, Certificate, Credential, PrincipalId, PublicKey};
use crate::limits;
use crate::registry::{Refusal, Registry};
use crate::target::Target;
use crate::task::reached;
use crate::tls::PeerChain;
use crate::tunnel::admit::penalty::Fault;
use crate::tunnel::splice::Side;
use crate::tunnel::ssh::{self, Flow, Login, Opening, Over, Public, ServerOptions};
use crate::tunnel::stream::Stream;
use crate::tunnel::wire::{self, Peer};

/// Who has logged in.
#[derive(Debug, Clone)]
struct Guest {
    principal: PrincipalId,
    credential: Credential,
    agent: AgentName,
    /// The same as far as TLS goes.
    visitor: Visitor,
}

#[derive(Default)]
struct Logins {
    guest: Option<Guest>,
    /// The last refusal.
    refused: Option<Refused>,
    refusals: usize,
}

/// The true reason of a refusal, and what is known of who was refused.
struct Refused {
    reason: &'static str,
    credential: Option<Credential>,
    agent: Option<AgentName>,
}

struct DoorLogin {
    gateway: Arc<Gateway>,
    logins: Arc<Mutex<Logins>>,
    from: IpAddr,
    /// Whether certificates are accepted.
    certificates: bool,
    /// The main listener.
    listener: usize,
    /// What was shown in TLS.
    shown: Option<PeerChain>,
}

impl DoorLogin {
    fn judge(&self, user: &str, credential: Credential) -> Option<Guest> {
        let Ok(agent) = user.parse::<AgentName>() else {
            self.refuse("malformed_user", Some(credential), None);
            return None;
        };
        let (snapshot, now) = (self.gateway.registry.current(), Timestamp::now());
        let admitted = snapshot.admits_credential(&agent, &credential, self.from, now).and_then(|principal| {
            let whose = Whose::Principal(agent.organisation.clone(), principal.clone());
            let visitor = Visitor { listener: self.listener, shown: self.shown.clone(), whose };
            visitor.judge(&self.gateway, now).map_err(Refusal::ClientCertificate)?;
            Ok((principal, visitor))
        });
        match admitted {
            Ok((principal, visitor)) => Some(Guest { principal, credential, agent, visitor }),
            Err(refusal) => {
                self.refuse(Refusal::as_str(refusal), Some(credential), Some(agent));
                None
            }
        }
    }

    fn let_in(&self, guest: Option<Guest>) -> bool {
        let accepted = guest.is_some();
        if accepted {
            self.logins.lock().unwrap_or_else(PoisonError::into_inner).guest = guest;
        }
        accepted
    }

    fn refuse(&self, reason: &'static str, credential: Option<Credential>, agent: Option<AgentName>) {
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        logins.refusals += 1;
        // Clients show the bare key after the certificate; what was wrong with that tells more.
        let key = credential.as_ref().filter(|shown| shown.certificate().is_none()).map(Credential::key);
        let certified = |last: &Refused| {
            last.credential.as_ref().filter(|shown| shown.certificate().is_some()).map(Credential::key)
        };
        if key.is_none() || logins.refused.as_ref().and_then(certified) != key {
            logins.refused = Some(Refused { reason, credential, agent });
        }
    }
}

impl Login for DoorLogin {
    fn offered(&mut self, user: &str, key: &PublicKey) -> bool {
        self.certificates || self.judge(user, Credential::Key(key.fingerprint())).is_some()
    }

    fn verified(&mut self, user: &str, key: &PublicKey) -> bool {
        self.let_in(self.judge(user, Credential::Key(key.fingerprint())))
    }

    fn certified(&mut self, user: &str, certificate: &Certificate) -> bool {
        let credential = Credential::Certificate(certificate.clone());
        if self.certificates {
            return self.let_in(self.judge(user, credential));
        }
        self.refuse("certificate_not_accepted", Some(credential), user.parse().ok());
        false
    }

    fn unfit(&mut self, user: &str, why: &'static str) {
        self.refuse(why, None, user.parse().ok());
    }
}

struct Channel(Opening, Flow);

impl Answer for Channel {
    async fn accept(self) -> Option<Side> {
        self.0.accept(self.1).await.map(Side::Channel)
    }

    async fn refuse(self, public: Public) {
        self.0.refuse_publicly(public, self.1).await;
    }
}

/// Serves one connection to its end.
pub(in crate::gateway) async fn serve(gateway: Arc<Gateway>, stream: Stream, admitted: Admitted) {
    let Admitted { address, listener, certificates, greeted, deadline, seat, place, transport, tls } = admitted;
    let shown = tls.and_then(|tls| tls.peer);
    let flow = if greeted.peer == Peer::Client { Flow::Credit } else { Flow::Stock };
    let logins = Arc::new(Mutex::new(Logins::default()));
    let login = DoorLogin {
        gateway: gateway.clone(),
        logins: logins.clone(),
        from: address.ip(),
        certificates,
        listener,
        shown: shown.clone(),
    };
    let state = gateway.state.current();
    let options = ServerOptions {
        line: wire::DOOR_LINE.to_owned(),
        said: greeted.said.is_some(),
        head: greeted.head,
        key: state.host_key.clone(),
        certificate: state.host_certificate(Timestamp::now()).cloned(),
        control_channel: false,
        keepalive: limits::DOOR_KEEPALIVE,
        keepalive_max: 3,
        flow,
        channels: limits::CHANNELS_PER_SESSION,
        opens: limits::PENDING_OPENS_PER_SESSION,
    };
    let mut server = match ssh::serve(stream, options, login, &gateway.tasks).await {
        Ok(server) => server,
        Err(error) => {
            gateway.blame(address.ip(), Fault::Garbage);
            let event = Event::new(Kind::AuthRefused).client(address).door("ssh").detail(Chain(&error));
            return gateway.trail.stranger(event, "handshake");
        }
    };
    let switch = server.control.clone();
    let stop = gateway.tasks.stopping().clone();
    let timed_out = tokio::select! {
        outcome = place.during(timeout_at(deadline, server.logged_in.cancelled())) => outcome.is_err(),
        () = switch.gone().cancelled() => false,
        () = seat.lost().cancelled() => {
            switch.cut();
            let event = Event::new(Kind::AuthRefused).client(address).door("ssh");
            return gateway.trail.stranger(event, "too_many_connections");
        }
        () = stop.cancelled() => {
            switch.cut();
            return;
        }
    };
    let guest = logins.lock().unwrap_or_else(PoisonError::into_inner).guest.clone().filter(|_| !timed_out);
    let Some(guest) = guest else {
        switch.cut();
        return record_stranger(&gateway, address, &logins, timed_out, switch.is_flooded());
    };
    drop(seat);
    let _welcome = gateway.penalties.welcome(address.ip());
    let counted = gateway.quotas.session(&gateway.limits(), &guest.agent.organisation, &guest.principal);
    let event = |kind| {
        Event::new(kind)
            .organisation(&guest.agent.organisation)
            .agent(&guest.agent.agent)
            .principal(&guest.principal)
            .credential(&guest.credential)
            .client(address)
            .door("ssh")
    };
    let _counted = match counted {
        Ok(counted) => counted,
        Err(limit) => {
            debug!(limit, "cutting a session: its principal has too many");
            gateway.trail.stranger(event(Kind::AuthRefused).detail(limit), "limit");
            switch.cut();
            return;
        }
    };
    let mark = guest.visitor.judge(&gateway, Timestamp::now()).ok().and_then(|shown| shown.mark());
    if let Err(error) =
        gateway.trail.note(event(Kind::AuthAccepted).transport(transport).client_certificate(mark)).await
    {
        debug!(error = %Chain(&error), "cutting a session that could not be recorded");
        switch.cut();
        return;
    }
    let gone = switch.gone().clone();
    let _present = gateway.drain.greet();
    let forwards = Count::default();
    let mut goodbye = false;
    // Fires when the guest, its address or its certificate is no longer accepted, which takes the session's forwards along.
    let withdrawn = CancellationToken::new();
    // One wait for all of the session: it begins with a judgement.
    let mut unwelcome = pin!(guest.visitor.unwelcome(&gateway));
    loop {
        tokio::select! {
            opening = server.opens.recv() => {
                let Some(opening) = opening else { break };
                match request(&guest, address, &opening, gateway.drain.admit(), &withdrawn).admit(&gateway) {
                    Admission::Judge(request) => {
                        let (gateway, gone, counted) = (gateway.clone(), gone.clone(), forwards.enter());
                        let tasks = gateway.tasks.clone();
                        tasks.spawn(async move {
                            broker::forward(&gateway, request, Channel(opening, flow), &gone).await;
                            drop(counted);
                        });
                    }
                    Admission::Refuse(request) => {
                        broker::forward(&gateway, request, Channel(opening, flow), &gone).await;
                    }
                    Admission::Unheard => {
                        server.misconduct.opens.fetch_add(1, Ordering::Relaxed);
                        Channel(opening, flow).refuse(Public::NotAvailable).await;
                    }
                }
            }
            () = gone.cancelled() => break,
            flaw = &mut unwelcome => {
                debug!(%flaw, "cutting a session");
                withdraw(&withdrawn).await;
                break;
            }
            () = no_longer_admitted(&gateway, &guest, address.ip()) => {
                withdraw(&withdrawn).await;
                break;
            }
            () = gateway.state.until(|state| !state.takes(listener, address.ip(), &guest.credential)) => {
                withdraw(&withdrawn).await;
                break;
            }
            () = stop.cancelled() => break,
            () = gateway.drain.spent(&forwards) => {
                goodbye = true;
                break;
            }
        }
    }
    if goodbye {
        server.farewell("the gateway goes away").await;
    }
    switch.cut();
    server.misconduct.record(&gateway.trail, event).await;
}

/// Lets the session's forwards say that they were taken back, before they lose their session. They would notice the same
/// themselves, but perhaps later than that.
async fn withdraw(withdrawn: &CancellationToken) {
    withdrawn.cancel();
    tokio::task::yield_now().await;
}

fn request(
    guest: &Guest,
    address: SocketAddr,
    opening: &Opening,
    ticket: Option<Ticket>,
    withdrawn: &CancellationToken,
) -> Request {
    Request {
        principal: guest.principal.clone(),
        credential: Some(guest.credential.clone()),
        token: None,
        client_certificate: None,
        agent: guest.agent.clone(),
        target: Target::from_wire(&opening.host, opening.port),
        asked: format!("{}:{}", opening.host, opening.port),
        client: address,
        door: "ssh",
        asserted_by: None,
        over: opening.over.map(|over| match over {
            Over::Channels => "channels_per_session",
            Over::Opens => "pending_opens_per_session",
        }),
        ticket,
        withdrawn: Some(withdrawn.clone()),
    }
}

fn record_stranger(gateway: &Gateway, address: SocketAddr, logins: &Mutex<Logins>, timed_out: bool, flooded: bool) {
    let logins = logins.lock().unwrap_or_else(PoisonError::into_inner);
    let mut event = Event::new(Kind::AuthRefused).client(address).door("ssh");
    let reason = match &logins.refused {
        _ if flooded => "too_much_before_login",
        Some(Refused { reason, credential, agent }) => {
            if let Some(credential) = credential {
                event = event.credential(credential);
            }
            if let Some(agent) = agent {
                event = event.organisation(&agent.organisation).agent(&agent.agent);
            }
            if logins.refusals > 1 {
                event = event.detail(format!("{} refusals on this connection; this is the last", logins.refusals));
            }
            *reason
        }
        None if timed_out => "timeout",
        None => "left_before_login",
    };
    gateway.blame(address.ip(), Fault::of_login(reason, timed_out));
    gateway.trail.stranger(event, reason);
}

/// Waits until the registry no longer admits the guest.
async fn no_longer_admitted(gateway: &Gateway, guest: &Guest, from: IpAddr) {
    let mut changed = gateway.registry.changed();
    loop {
        let snapshot = gateway.registry.current();
        let admitted = snapshot.admits_credential(&guest.agent, &guest.credential, from, Timestamp::now());
        if admitted.as_ref() != Ok(&guest.principal) {
            return;
        }
        tokio::select! {
            changed = changed.changed() => if changed.is_err() {
                // The registry is going away with the gateway, which ends the session itself.
                return std::future::pending().await;
            },
            () = reached(guest.credential.expires(), limits::CERTIFICATE_LOOK) => {}
        }
    }
}

//! The loopback door: a plain listener for a co-located orchestrator, which leads to one target on behalf of one principal.
//!
//! A connection is handed raw to the thread of the link that it will likely take, so that its bytes never cross threads. If
//! it takes another in the end, they do.

use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::audit::{Event, Kind};
use crate::chain::Chain;
use crate::gateway::broker::{self, Admission, Answer, Request};
use crate::gateway::{Gateway, Local};
use crate::limits;
use crate::tunnel::splice::Side;
use crate::tunnel::ssh::Public;

/// A socket that no thread has been told of yet.
struct Socket(std::net::TcpStream);

impl Answer for Socket {
    async fn accept(self) -> Option<Side> {
        match TcpStream::from_std(self.0) {
            Ok(stream) => Some(Side::Tcp(stream)),
            Err(error) => {
                warn!(%error, "could not take up a connection at a loopback door");
                None
            }
        }
    }

    async fn refuse(self, public: Public) {
        debug!(public = public.as_str(), "refused at a loopback door");
        // There is no way to say why on a plain socket; a reset at least does not look like an orderly end.
        // If the socket is beyond even that, there is nobody left to be told.
        sockopt::set_socket_linger(&self.0, Some(Duration::ZERO)).ok();
    }
}

/// Accepts until the gateway drains, or the door is `withdrawn`, which also ends what came in by it. The listener may go on to
/// serve another door at the same place: what has not been accepted yet is that one's.
pub(in crate::gateway) async fn accept(
    gateway: Arc<Gateway>,
    listener: Arc<TcpListener>,
    door: Local,
    withdrawn: CancellationToken,
) {
    let stop = gateway.drain.begun().clone();
    let room = Arc::new(Semaphore::new(limits::CHANNELS_PER_LINK));
    let never = CancellationToken::new();
    let mut flood = Flood::default();
    loop {
        // A place first: what has none waits in the kernel's queue.
        let place = tokio::select! {
            place = room.clone().acquire_owned() => place,
            () = withdrawn.cancelled() => break,
            () = stop.cancelled() => break,
        };
        let Ok(place) = place else { break };
        let accepted = tokio::select! {
            // What is not accepted now waits for whoever shares the listener.
            biased;
            () = withdrawn.cancelled() => break,
            () = stop.cancelled() => break,
            () = flood.due() => {
                flood.record(&gateway, &door).await;
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "could not accept a connection at a loopback door");
                tokio::select! {
                    () = tokio::time::sleep(limits::ACCEPT_PAUSE) => continue,
                    () = withdrawn.cancelled() => break,
                    () = stop.cancelled() => break,
                }
            }
        };
        let stream = match stream.set_nodelay(true).and_then(|()| stream.into_std()) {
            Ok(stream) => stream,
            Err(error) => {
                debug!(%error, "a connection ended at once");
                continue;
            }
        };
        let request = Request {
            principal: door.principal.clone(),
            credential: None,
            token: None,
            client_certificate: None,
            agent: door.agent.clone(),
            target: Ok(door.target.clone()),
            asked: door.target.to_string(),
            client,
            door: "local",
            asserted_by: Some(format!("local {}", door.listen)),
            over: None,
            // It has been accepted, so that nobody else can serve it: the drain waits for this task before it counts.
            ticket: Some(gateway.drain.take()),
            withdrawn: Some(withdrawn.clone()),
        };
        match request.admit(&gateway) {
            Admission::Judge(request) => {
                let worker = gateway.roster.worker(&door.agent).unwrap_or_else(|| gateway.crew.lightest().clone());
                let (gateway, never) = (gateway.clone(), never.clone());
                let tasks = gateway.tasks.clone();
                worker.spawn(&tasks, async move {
                    broker::forward(&gateway, request, Socket(stream), &never).await;
                    drop(place);
                });
            }
            Admission::Refuse(request) => broker::forward(&gateway, request, Socket(stream), &never).await,
            Admission::Unheard => {
                flood.count();
                Socket(stream).refuse(Public::NotAvailable).await;
            }
        }
    }
    flood.record(&gateway, &door).await;
}

/// Connections that were refused without a record of their own.
#[derive(Default)]
struct Flood {
    unheard: u64,
    /// When their sum is to be recorded.
    due: Option<Instant>,
}

impl Flood {
    fn count(&mut self) {
        self.unheard += 1;
        self.due.get_or_insert_with(|| Instant::now() + limits::FLOOD_PERIOD);
    }

    async fn due(&self) {
        match self.due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    async fn record(&mut self, gateway: &Gateway, door: &Local) {
        let Self { unheard, .. } = std::mem::take(self);
        if unheard == 0 {
            return;
        }
        let event = Event::new(Kind::PeerViolation)
            .organisation(&door.agent.organisation)
            .agent(&door.agent.agent)
            .principal(&door.principal)
            .door("local")
            .reason("opens_flood")
            .detail(format!("{unheard} opens at {} were refused without a record of their own", door.listen));
        if let Err(error) = gateway.trail.note(event).await {
            debug!(error = %Chain(&error), "could not record a flood of opens");
        }
    }
}

//! The loopback door: a plain listener for a co-located orchestrator, which leads to one target on behalf of one principal.

use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::gateway::broker::{self, Answer, Public, Request};
use crate::gateway::{Gateway, Local};
use crate::limits;
use crate::tunnel::splice::Side;

struct Socket(TcpStream);

impl Answer for Socket {
    async fn accept(self) -> Option<Side> {
        Some(Side::Tcp(self.0))
    }

    async fn refuse(self, public: Public) {
        debug!(public = public.as_str(), "refused at a loopback door");
        // There is no way to say why on a plain socket; a reset at least does not look like an orderly end.
        drop(self.0.set_zero_linger());
    }
}

/// Accepts until the gateway stops, or the door is `withdrawn`, which also ends what came in by it. The listener may go on to
/// serve another door at the same place: what has not been accepted yet is that one's.
pub(in crate::gateway) async fn accept(
    gateway: Arc<Gateway>,
    listener: Arc<TcpListener>,
    door: Local,
    withdrawn: CancellationToken,
) {
    let stop = gateway.tasks.stopping().clone();
    let room = Arc::new(Semaphore::new(limits::CHANNELS_PER_LINK));
    let never = CancellationToken::new();
    loop {
        // A place first: what has none waits in the kernel's queue.
        let place = tokio::select! {
            place = room.clone().acquire_owned() => place,
            () = withdrawn.cancelled() => return,
            () = stop.cancelled() => return,
        };
        let Ok(place) = place else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = withdrawn.cancelled() => return,
            () = stop.cancelled() => return,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "could not accept a connection at a loopback door");
                tokio::select! {
                    () = tokio::time::sleep(limits::ACCEPT_PAUSE) => continue,
                    () = withdrawn.cancelled() => return,
                    () = stop.cancelled() => return,
                }
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "a connection ended at once");
            continue;
        }
        let request = Request {
            principal: door.principal.clone(),
            key: None,
            agent: door.agent.clone(),
            target: Ok(door.target.clone()),
            asked: door.target.to_string(),
            client: client.to_string(),
            door: "local",
            asserted_by: Some(format!("local {}", door.listen)),
            over: None,
            withdrawn: Some(withdrawn.clone()),
        };
        let (gateway, never) = (gateway.clone(), never.clone());
        let tasks = gateway.tasks.clone();
        tasks.spawn(async move {
            broker::forward(&gateway, request, Socket(stream), &never).await;
            drop(place);
        });
    }
}

//! Local listeners, and what becomes of their connections.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::front::Front;
use super::keeper::Keeper;
use super::{Config, Session};
use crate::audit::Counters;
use crate::limits;
use crate::task::Tasks;
use crate::tunnel::splice::{self, Bounds, Side};
use crate::tunnel::ssh::Channel;

/// A local listener and where its connections go.
#[derive(Debug)]
pub struct Forward {
    /// The listener.
    pub listener: TcpListener,
    /// Where to.
    pub front: Front,
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
    let keeper = Arc::new(Keeper::new(config, session, tasks));
    for forward in forwards {
        let (keeper, stop) = (keeper.clone(), stop.clone());
        tasks.spawn(async move { accept(&keeper, forward, &stop).await });
    }
    stop.cancelled().await;
    keeper.close().await;
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
        let (keeper, front, stop) = (keeper.clone(), forward.front.clone(), stop.clone());
        let tasks = keeper.tasks().clone();
        tasks.spawn(async move {
            carry(&keeper, stream, client, &front, &stop).await;
            drop(place);
        });
    }
}

async fn carry(keeper: &Keeper, stream: TcpStream, client: SocketAddr, front: &Front, stop: &CancellationToken) {
    // Before it is connected there is nothing that the stop would have to end in an orderly way.
    let connected = stop.run_until_cancelled(connect(keeper, stream, client, front)).await;
    // The session is held for as long as one of its channels is in use.
    let Some(Some((stream, _session, channel))) = connected else { return };
    let (end, remains) =
        splice::splice(Side::Tcp(stream), Side::Channel(channel), &Counters::default(), Bounds::default(), stop).await;
    debug!(?end, "a forward has ended");
    remains.leave().await;
}

/// Asks for what a connection wants. One that does not get it has been told so.
async fn connect(
    keeper: &Keeper,
    mut stream: TcpStream,
    client: SocketAddr,
    front: &Front,
) -> Option<(TcpStream, Arc<Session>, Channel)> {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "a local connection has gone");
        return None;
    }
    let target = front.ask(&mut stream).await?;
    match keeper.open(&target, &client.ip().to_string()).await {
        Ok((session, channel)) => {
            // Where it has gone meanwhile, the splice finds out, and ends the channel well.
            drop(front.opened(&mut stream).await);
            Some((stream, session, channel))
        }
        Err(unopened) => {
            warn!("{}", unopened.why);
            front.refused(stream, unopened.cause).await;
            None
        }
    }
}

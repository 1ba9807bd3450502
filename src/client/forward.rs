//! Local listeners, and what becomes of their connections.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::keeper::Keeper;
use super::{Config, Session};
use crate::audit::Counters;
use crate::limits;
use crate::target::Target;
use crate::task::Tasks;
use crate::tunnel::splice::{self, Bounds, Side};

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
        let (keeper, target, stop) = (keeper.clone(), forward.target.clone(), stop.clone());
        let tasks = keeper.tasks().clone();
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

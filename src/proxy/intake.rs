//! Accepts connections, and gives each to a thread.
//!
//! Promised: whoever may not come in, or for whom there is no place, is hung up on before a byte is read; a connection
//! that has not yet said what it wants holds a seat, of which there are few.

use std::net::SocketAddr;
use std::sync::Arc;

use jiff::Timestamp;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::live::{Guest, Slot, State};
use super::places::Place;
use super::{Config, Mode, Proxy, RunError, connect, mutual, reverse};
use crate::audit::{Event, Kind};
use crate::chain::Chain;
use crate::limits;
use crate::task::Load;
use crate::tls::Acceptor;
use crate::tls::judge::Flaw;
use crate::tunnel::admit::Seat;
use crate::tunnel::listen;
use crate::tunnel::stream::Stream;

/// The listeners that there are.
#[derive(Default)]
pub(super) struct Listening {
    open: Vec<Open>,
    /// How many there have been.
    made: u64,
}

struct Open {
    slot: Slot,
    /// As it is configured: port 0 is another port each time.
    address: SocketAddr,
    withdrawn: CancellationToken,
}

/// What a configuration wants and there was not before: for each of its listeners one, where there is none.
pub(super) struct Prepared {
    slots: Vec<(Slot, Option<TcpListener>)>,
}

impl Listening {
    /// Makes what a configuration wants and there is not yet: it can fail, and is done before anything is changed.
    ///
    /// # Errors
    /// If an address cannot be had.
    pub(super) fn prepare(&mut self, config: &Config) -> Result<Prepared, RunError> {
        let bind = |address| listen::bind(address).map_err(|source| RunError::Listen { address, source });
        let mut left: Vec<_> = self.open.iter().map(|open| (open.address, open.slot)).collect();
        let mut slots = Vec::new();
        for listener in &config.listeners {
            match left.iter().position(|(address, _)| *address == listener.address) {
                Some(at) => slots.push((left.swap_remove(at).1, None)),
                None => {
                    self.made += 1;
                    slots.push((Slot(self.made), Some(bind(listener.address)?)));
                }
            }
        }
        Ok(Prepared { slots })
    }

    /// Puts a configuration in force: withdraws what it no longer wants, and accepts on what was prepared for it.
    pub(super) fn fit(&mut self, proxy: &Arc<Proxy>, config: &Config, prepared: Prepared) {
        let slots: Vec<_> = prepared.slots.iter().map(|(slot, _)| *slot).collect();
        proxy.state.replace(State::new(config, &slots));
        self.open.retain(|open| {
            let stays = slots.contains(&open.slot);
            if !stays {
                open.withdrawn.cancel();
            }
            stays
        });
        for (listener, (slot, made)) in config.listeners.iter().zip(prepared.slots) {
            let Some(made) = made else { continue };
            match made.local_addr() {
                Ok(bound) => info!("listening on {bound} ({})", listener.mode.as_str()),
                Err(error) => warn!(%error, "listening, but not known where"),
            }
            let withdrawn = CancellationToken::new();
            self.open.push(Open { slot, address: listener.address, withdrawn: withdrawn.clone() });
            proxy.tasks.spawn(accept(proxy.clone(), made, slot, withdrawn));
        }
    }
}

/// Accepts until the proxy drains, or the listener is withdrawn.
async fn accept(proxy: Arc<Proxy>, listener: TcpListener, slot: Slot, withdrawn: CancellationToken) {
    let stop = proxy.drain.begun().clone();
    loop {
        let (stream, address) = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = withdrawn.cancelled() => return,
            accepted = listen::accept(&listener) => accepted,
        };
        match admit(&proxy, slot, address) {
            Ok(entrance) => hand_over(&proxy, stream, entrance),
            Err((mode, reason)) => turn_away(&proxy, mode, address, reason),
        }
    }
}

/// Somebody who has come in, and what he holds until he has said what he wants.
pub(super) struct Entrance {
    pub(super) guest: Guest,
    /// With the port.
    pub(super) address: SocketAddr,
    pub(super) seat: Seat,
    pub(super) place: Place,
    /// When he must have said it.
    pub(super) deadline: Instant,
}

fn admit(proxy: &Proxy, slot: Slot, address: SocketAddr) -> Result<Entrance, (&'static str, &'static str)> {
    let state = proxy.state.current();
    let Some(listener) = state.listener(slot) else { return Err(("", "listener_withdrawn")) };
    let mode = listener.mode.as_str();
    if !listener.accepts(address.ip()) {
        return Err((mode, "source_network"));
    }
    let place = proxy.places.take(address.ip(), state.limits()).map_err(|limit| (mode, limit))?;
    let now = Instant::now();
    let seat = proxy.room.seat(Some(address.ip()), now).map_err(|_| (mode, "too_many_connections"))?;
    let guest = Guest { slot, mode, address: address.ip(), chain: None };
    Ok(Entrance { guest, address, seat, place, deadline: now + limits::HEAD_TIMEOUT })
}

/// Records a connection that ends before it has said what it wants, because of `reason`.
pub(super) fn turn_away(proxy: &Proxy, mode: &'static str, address: SocketAddr, reason: &'static str) {
    debug!(reason, "turned a connection away");
    proxy.trail.stranger(refused(mode, address), reason);
}

/// An event about somebody who is not let in.
pub(super) fn refused(mode: &'static str, address: SocketAddr) -> Event {
    Event::new(Kind::AuthRefused).client(address).door(mode)
}

fn hand_over(proxy: &Arc<Proxy>, stream: TcpStream, entrance: Entrance) {
    let worker = proxy.crew.lightest().clone();
    // From here on, so that many who come at once are spread.
    let carried = worker.carry(Load::Session);
    let stream = match stream.set_nodelay(true).and_then(|()| stream.into_std()) {
        Ok(stream) => stream,
        Err(error) => return debug!(%error, "a connection ended at once"),
    };
    let proxy = proxy.clone();
    let tasks = proxy.tasks.clone();
    worker.spawn(&tasks, async move {
        let _carried = carried;
        match TcpStream::from_std(stream) {
            Ok(stream) => serve(proxy, stream.into(), entrance).await,
            Err(error) => warn!(%error, "could not hand a connection over to its thread"),
        }
    });
}

/// Serves one connection to its end.
async fn serve(proxy: Arc<Proxy>, stream: Stream, mut entrance: Entrance) {
    let state = proxy.state.current();
    let slot = entrance.guest.slot;
    let Some(listener) = state.listener(slot).cloned() else { return };
    let acceptor = state.acceptor(slot);
    drop(state);
    let (stream, spoken) = match acceptor {
        None => (stream, None),
        Some(acceptor) => match greet(&proxy, &acceptor, stream, &mut entrance).await {
            Some(greeted) => greeted,
            None => return,
        },
    };
    match listener.mode {
        Mode::Connect(_) => Box::pin(connect::serve(proxy, stream, entrance)).await,
        Mode::Reverse(_) => Box::pin(reverse::serve(proxy, stream, entrance)).await,
        Mode::Mutual(_) => Box::pin(mutual::serve(proxy, stream, entrance, spoken)).await,
    }
}

/// Shakes hands with a client, and judges what it has shown. Returns the connection, and what will be spoken on it, or nothing
/// where it was turned away.
async fn greet(
    proxy: &Proxy,
    acceptor: &Acceptor,
    stream: Stream,
    entrance: &mut Entrance,
) -> Option<(Stream, Option<Vec<u8>>)> {
    let (mode, address) = (entrance.guest.mode, entrance.address);
    let stop = proxy.tasks.stopping();
    let accepted = tokio::select! {
        accepted = timeout_at(entrance.deadline, acceptor.accept(stream)) => accepted,
        () = entrance.seat.lost().cancelled() => {
            turn_away(proxy, mode, address, "too_many_connections");
            return None;
        }
        () = stop.cancelled() => return None,
    };
    let accepted = match accepted {
        Ok(Ok(accepted)) => accepted,
        Ok(Err((error, _))) => {
            debug!(error = %Chain(&error), "turned away a connection: no TLS");
            let reason = error.flaw().map_or("tls_failed", Flaw::as_str);
            proxy.trail.stranger(refused(mode, address).detail(Chain(&error)), reason);
            return None;
        }
        Err(_) => {
            turn_away(proxy, mode, address, "slow_handshake");
            return None;
        }
    };
    entrance.guest.chain = accepted.peer;
    let state = proxy.state.current();
    if let Err(denial) = state.judge(&entrance.guest, Timestamp::now()) {
        debug!(reason = denial.reason, "turned away a client for its certificate");
        let event = refused(mode, address).client_certificate(state.mark(&entrance.guest)).detail(denial.detail);
        proxy.trail.stranger(event, denial.reason);
        // Not an orderly end: nothing was said that could have one.
        Stream::layered(accepted.stream).reset();
        return None;
    }
    Some((Stream::layered(accepted.stream), accepted.alpn))
}

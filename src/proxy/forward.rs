//! The one way to an upstream: decide, record, reach, move bytes, record the end.
//!
//! Promised: an upstream is reached with a [`Pass`](super::live::Pass) that the state has made and an entry that the trail has
//! taken, in this order; what the configuration no longer allows is cut, whether it is being opened or runs.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::exchange::Refusal;
use super::intake::refused;
use super::live::{Denial, Guest, Wanted};
use super::outward::{self, Found, Inside, Reached};
use super::{Proxy, Upstream};
use crate::audit::{Counters, Ending, Entry, Opening};
use crate::chain::Chain;
use crate::drain::{Counted, Ticket};
use crate::limits;
use crate::rate::Rate;
use crate::task::{apart, reached};
use crate::tunnel::splice::{self, End, Side};
use crate::tunnel::stream::Stream;
use crate::tunnel::wire::ForwardId;

/// What somebody has asked for, as it is recorded and judged.
pub(super) struct Request {
    pub(super) guest: Guest,
    /// With the port.
    pub(super) client: SocketAddr,
    pub(super) wanted: Wanted,
    /// What the proxy speaks with the upstream.
    pub(super) inside: Inside,
    /// The host and port, as far as they could be read.
    pub(super) asked: String,
}

/// An upstream that has been reached on somebody's behalf, and what records that.
pub(super) struct Open {
    pub(super) reached: Reached,
    pub(super) run: Run,
}

/// What an open connection holds until its end.
pub(super) struct Run {
    entry: Entry,
    pub(super) upstream: Arc<Upstream>,
    /// Fires when the trail has failed for too long.
    pub(super) unrecorded: CancellationToken,
    ticket: Ticket,
}

impl Run {
    /// The bytes carried so far, to be added to.
    pub(super) fn counters(&self) -> Arc<Counters> {
        self.entry.counters()
    }

    /// Records the end. What is returned gives the two ends time for their goodbye in a drain, which no longer counts this.
    pub(super) fn finish(self, proxy: &Proxy, reason: &'static str) -> Counted {
        let counters = self.entry.counters();
        self.entry.finish(counters.ended(reason));
        let leaving = proxy.drain.leave();
        drop(self.ticket);
        leaving
    }
}

/// Reaches the upstream that a request leads to.
pub(super) async fn open(proxy: &Proxy, request: &Request) -> Result<Open, Refusal> {
    let ticket = proxy.drain.admit();
    let opening = opening(proxy, request);
    let decided = match ticket {
        Some(ticket) => {
            proxy.state.current().decide(&request.guest, &request.wanted, Timestamp::now()).map(|pass| (pass, ticket))
        }
        None => return Err(deny(proxy, request, opening, Denial::leaving()).await),
    };
    let (pass, mut ticket) = match decided {
        Ok(decided) => decided,
        Err(denial) => return Err(deny(proxy, request, opening, denial).await),
    };
    let upstream = pass.upstream().clone();
    let opening = Opening { target: upstream.to.to_string(), rule: Some(upstream.name.clone()), ..opening };
    // Before it is recorded: who fails after this looks at the token that was there then.
    let unrecorded = proxy.unrecorded.token();
    let mut entry = match proxy.trail.open(opening).await {
        Ok(entry) => entry,
        Err(error) => {
            debug!(error = %Chain(&error), "refused a connection because it could not be recorded");
            return Err(Refusal::NotAvailable);
        }
    };
    let mut found = Found::default();
    let revoked = revoked(proxy, request, &upstream);
    let outcome = tokio::select! {
        // First: what has been taken back by now is not even dialled.
        biased;
        () = revoked => {
            let detail = "the configuration changed while the connection was opened".to_owned();
            entry.finish(Ending::Denied { reason: "revoked", detail });
            return Err(Refusal::NotAllowed);
        }
        outcome = timeout(limits::OPENING_TIMEOUT, outward::reach(pass, request.inside, &mut found)) => outcome,
        why = proxy.drain.cut() => {
            entry.finish(Ending::Failed { reason: why, detail: "it was not open yet".to_owned() });
            return Err(Refusal::Leaving);
        }
    };
    entry.resolved(&found.resolved, &found.refused);
    let answers = matches!(outcome, Ok(Ok(_)));
    proxy.standings.note(&upstream.name, answers);
    let reached = match outcome {
        Ok(Ok(reached)) => reached,
        Ok(Err(error)) => {
            debug!(error = %Chain(&error), upstream = upstream.name, "could not reach an upstream");
            entry.finish(error.ending());
            return Err(Refusal::NotAvailable);
        }
        Err(_) => {
            let detail = format!("it was not open after {} s", limits::OPENING_TIMEOUT.as_secs());
            entry.finish(Ending::Failed { reason: "timeout", detail });
            return Err(Refusal::NotAvailable);
        }
    };
    entry.established(reached.address);
    ticket.opened();
    Ok(Open { reached, run: Run { entry, upstream, unrecorded, ticket } })
}

fn opening(proxy: &Proxy, request: &Request) -> Opening {
    Opening {
        forward: ForwardId::random().to_string(),
        client: Some(request.client.to_string()),
        client_certificate: proxy.state.current().mark(&request.guest),
        door: Some(request.guest.mode),
        target: request.asked.clone(),
        ..Opening::default()
    }
}

/// Records a denial. Whoever causes more than so many records has the rest counted.
async fn deny(proxy: &Proxy, request: &Request, opening: Opening, denial: Denial) -> Refusal {
    const PACE: Rate = Rate { per_second: limits::FLOOD_RECORDS_PER_SECOND, burst: limits::FLOOD_PERIOD };
    let Denial { reason, detail } = denial;
    debug!(reason, "denied a connection");
    let heard = {
        let mut denials = proxy.denials.lock().unwrap_or_else(PoisonError::into_inner);
        denials.take(request.guest.address, PACE, Instant::now().into_std())
    };
    if heard {
        if let Err(error) = proxy.trail.deny(opening, reason, &detail).await {
            debug!(error = %Chain(&error), "could not record a denial");
        }
    } else {
        let event = refused(request.guest.mode, request.client).target(&opening.target).detail(&detail);
        proxy.trail.stranger(event, reason);
    }
    match reason {
        Denial::LEAVING => Refusal::Leaving,
        _ => Refusal::NotAllowed,
    }
}

/// Waits until the configuration, or the clock, says no to what it has allowed.
async fn revoked(proxy: &Proxy, request: &Request, upstream: &Upstream) {
    loop {
        let (state, mut changes) = proxy.state.follow();
        let now = Timestamp::now();
        if !state.still_allows(&request.guest, &request.wanted, upstream) {
            return;
        }
        // Other lists or names have another end.
        let until = state.judge(&request.guest, now).ok().flatten();
        drop(state);
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                // The proxy itself is going away.
                return std::future::pending().await;
            },
            () = reached(until, limits::CERTIFICATE_LOOK) => {}
        }
    }
}

/// Waits for what ends a connection that runs, other than its two ends. Returns why.
pub(super) async fn no_longer_allowed(
    proxy: &Proxy,
    request: &Request,
    upstream: &Upstream,
    unrecorded: &CancellationToken,
) -> &'static str {
    apart(async {
        tokio::select! {
            () = revoked(proxy, request, upstream) => "revoked",
            () = unrecorded.cancelled() => "audit_failed",
            why = proxy.drain.cut() => why,
        }
    })
    .await
}

/// Moves bytes between a client and an upstream until the end, and records that. `said` is what the client has said already.
pub(super) async fn relay(proxy: &Proxy, request: &Request, mut near: Stream, said: Bytes, open: Open) {
    let Open { reached: Reached { stream: mut far, head, .. }, run } = open;
    let counters = run.counters();
    let (reason, remains) = {
        let cut = no_longer_allowed(proxy, request, &run.upstream, &run.unrecorded);
        tokio::pin!(cut);
        let handed = tokio::select! {
            biased;
            why = &mut cut => Err(why),
            handed = timeout(limits::STALL, hand_over(&mut near, &head, &mut far, &said, &counters)) => match handed {
                Ok(handed) => handed,
                Err(_) => Err("stalled"),
            },
        };
        match handed {
            Err(why) => {
                near.reset();
                far.reset();
                (why, None)
            }
            Ok(()) => {
                let bounds = proxy.state.current().limits().bounds;
                let stop = CancellationToken::new();
                let splice = splice::splice(side(near), side(far), &counters, bounds, &stop);
                tokio::pin!(splice);
                tokio::select! {
                    // First: bytes that never end must not hide it.
                    biased;
                    why = &mut cut => {
                        stop.cancel();
                        (why, Some(splice.await.1))
                    }
                    (end, remains) = &mut splice => (ended(end), Some(remains)),
                }
            }
        }
    };
    let _leaving = run.finish(proxy, reason);
    if let Some(remains) = remains {
        remains.leave().await;
    }
}

/// Gives each end what the other has said before the two were one.
async fn hand_over(
    near: &mut Stream,
    heard: &Bytes,
    far: &mut Stream,
    said: &Bytes,
    counters: &Counters,
) -> Result<(), &'static str> {
    let back = async {
        if !heard.is_empty() {
            near.write_all(heard).await?;
            near.flush().await?;
            counters.add_from_target(heard.len() as u64);
        }
        io::Result::Ok(())
    };
    let forth = async {
        if !said.is_empty() {
            far.write_all(said).await?;
            far.flush().await?;
            counters.add_to_target(said.len() as u64);
        }
        io::Result::Ok(())
    };
    match tokio::join!(back, forth) {
        (Err(_), _) => Err("client_gone"),
        (_, Err(_)) => Err("target_broke"),
        (Ok(()), Ok(())) => Ok(()),
    }
}

fn side(stream: Stream) -> Side {
    stream.into_tcp().map_or_else(Side::Stream, Side::Tcp)
}

/// Why it ended, as the trail says it.
pub(super) fn ended(end: End) -> &'static str {
    match end {
        End::Clean => "eof",
        End::NearBroke(_) => "client_gone",
        End::FarBroke(_) => "target_broke",
        End::Stalled => "stalled",
        End::Idle => "idle",
        End::Expired => "expired",
        End::Stopped => "proxy_stopped",
    }
}

//! Keeps one link to one gateway: dials, and dials again.
//!
//! Promised: waits between attempts are jittered, grow, and are capped; they start afresh only after a link that lasted. A
//! link that has carried as many opens as one should is replaced while it still serves; of those replaced, so many are
//! kept, however many the gateway would keep. A process whose place another one has taken keeps its forwards and stands by:
//! it dials again at long intervals, so that two with one name do not throw each other out by turns.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use tracing::{debug, info, warn};

use super::serve::{self, Link, LinkEnd};
use super::{Agent, Served};
use crate::backoff::Backoff;
use crate::chain::Chain;
use crate::limits;
use crate::secret;
use crate::tunnel::connect::GatewayUrl;
use crate::tunnel::transport::Control as Switch;

pub(super) async fn keep_linked(agent: Arc<Agent>, served: Arc<Served>, gateway: GatewayUrl) {
    let stop = agent.tasks.stopping().clone();
    let mut backoff = Backoff::new(limits::RECONNECT_FIRST, limits::RECONNECT_CAP);
    let mut last = String::new();
    let mut replaced: VecDeque<Switch> = VecDeque::new();
    loop {
        let attempt = tokio::select! {
            attempt = serve::link(&agent, &served, &gateway) => attempt,
            () = stop.cancelled() => return,
        };
        match attempt {
            Ok(link) => {
                info!(organisation = %served.name.organisation, gateway = %gateway, "linked");
                last.clear();
                let switch = link.switch().clone();
                match serve_until_replaced(&agent, link).await {
                    Next::Stop => return,
                    Next::Replace => {
                        debug!(gateway = %gateway, "replacing a link that has carried its share of opens");
                        backoff.reset();
                        keep(&mut replaced, switch, &gateway);
                        continue;
                    }
                    Next::StandBy => {
                        let Agent { replica, .. } = &*agent;
                        warn!(
                            organisation = %served.name.organisation,
                            gateway = %gateway,
                            replica = %replica,
                            "another process of this agent, started later, has the same replica name and gets the forwards; \
                             give each process a `replica` of its own"
                        );
                        keep(&mut replaced, switch, &gateway);
                        let extra = f64::from(secret::random_u32()) / f64::from(u32::MAX) / 2.0;
                        let wait = limits::SUPERSEDED_WAIT.mul_f64(1.0 + extra);
                        tokio::select! {
                            () = tokio::time::sleep(wait) => continue,
                            () = stop.cancelled() => return,
                        }
                    }
                    Next::Lost { proved } => {
                        if proved {
                            backoff.reset();
                        }
                        warn!(organisation = %served.name.organisation, gateway = %gateway, "the link is lost; dialling again");
                    }
                }
            }
            Err(error) => {
                let text = Chain(&error).to_string();
                // The same failure again and again is told once; the attempts go on.
                if text == last {
                    debug!(gateway = %gateway, error = text, "still not linked");
                } else {
                    warn!(organisation = %served.name.organisation, gateway = %gateway, "not linked: {text}");
                    last = text;
                }
            }
        }
        let wait = backoff.fail(secret::random_u32());
        debug!(gateway = %gateway, wait_ms = wait.as_millis(), "waiting before the next attempt");
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Remembers a link that goes on until its last forward has ended; of too many, the oldest is cut.
fn keep(replaced: &mut VecDeque<Switch>, switch: Switch, gateway: &GatewayUrl) {
    replaced.retain(|switch| !switch.gone().is_cancelled());
    replaced.push_back(switch);
    if replaced.len() > limits::REPLACED_LINKS
        && let Some(oldest) = replaced.pop_front()
    {
        warn!(gateway = %gateway, "cutting the oldest replaced link: the gateway keeps too many");
        oldest.cut();
    }
}

enum Next {
    Stop,
    Replace,
    StandBy,
    Lost { proved: bool },
}

async fn serve_until_replaced(agent: &Arc<Agent>, link: Link) -> Next {
    let since = Instant::now();
    let stop = agent.tasks.stopping();
    let (worn, superseded) = (link.worn().clone(), link.superseded().clone());
    let mut served = agent.tasks.spawn(link.serve());
    tokio::select! {
        // First: a link that was superseded may be gone already, and is not to be dialled anew at once.
        biased;
        () = superseded.cancelled() => Next::StandBy,
        end = &mut served => match end {
            _ if superseded.is_cancelled() => Next::StandBy,
            Ok(LinkEnd::Stopped) => Next::Stop,
            Ok(LinkEnd::Lost) | Err(_) if stop.is_cancelled() => Next::Stop,
            Ok(LinkEnd::Lost) | Err(_) => Next::Lost { proved: since.elapsed() >= limits::LINK_PROVED },
        },
        // The old link goes on by itself until its last forward has ended.
        () = worn.cancelled() => Next::Replace,
    }
}

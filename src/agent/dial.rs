//! Keeps one link to one gateway: dials, and dials again.
//!
//! Promised: waits between attempts are jittered, grow, and are capped; they start afresh only after a link that lasted. A
//! link that has carried as many opens as one should, or whose gateway goes away or asks for another, is replaced while it
//! still serves: the new one is made first. A gateway that asks on every link gets the next one after the same waits as one
//! that drops them. Of the links replaced, so many are kept, however many the gateway would keep. Nobody dials once the
//! agent drains.

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
    let stop = agent.drain.begun().clone();
    let mut backoff = Backoff::new(limits::RECONNECT_FIRST, limits::RECONNECT_CAP);
    let mut last = String::new();
    let mut replaced: VecDeque<Switch> = VecDeque::new();
    loop {
        let attempt = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            attempt = serve::link(&agent, &served, &gateway) => attempt,
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
                    Next::Move { proved } => {
                        keep(&mut replaced, switch, &gateway);
                        if proved {
                            backoff.reset();
                            continue;
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

/// Keeps a link that has been replaced, which ends with its last forward.
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
    /// The link is worn.
    Replace,
    /// The gateway wants another.
    Move {
        proved: bool,
    },
    Lost {
        proved: bool,
    },
}

async fn serve_until_replaced(agent: &Arc<Agent>, link: Link) -> Next {
    let since = Instant::now();
    let stop = agent.drain.begun();
    let (worn, moved) = (link.worn().clone(), link.moved().clone());
    let mut served = agent.tasks.spawn(link.serve());
    let proved = || since.elapsed() >= limits::LINK_PROVED;
    tokio::select! {
        biased;
        // The link goes on by itself until its last forward has ended, here and below.
        () = stop.cancelled() => Next::Stop,
        () = moved.cancelled() => Next::Move { proved: proved() },
        () = worn.cancelled() => Next::Replace,
        end = &mut served => match end {
            Ok(LinkEnd::Stopped) => Next::Stop,
            // What it said before it hung up is what counts.
            Ok(LinkEnd::Lost) | Err(_) if moved.is_cancelled() => Next::Move { proved: proved() },
            Ok(LinkEnd::Lost) | Err(_) => Next::Lost { proved: proved() },
        },
    }
}

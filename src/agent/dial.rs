//! Keeps one link to one gateway: dials, and dials again.
//!
//! Promised: waits between attempts are jittered, grow, and are capped; they start afresh only after a link that lasted. A
//! link that has carried as many opens as one should is replaced while it still serves; of those replaced, so many are
//! kept, however many the gateway would keep.

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
                        replaced.retain(|switch| !switch.gone().is_cancelled());
                        replaced.push_back(switch);
                        if replaced.len() > limits::REPLACED_LINKS
                            && let Some(oldest) = replaced.pop_front()
                        {
                            warn!(gateway = %gateway, "cutting the oldest replaced link: the gateway keeps too many");
                            oldest.cut();
                        }
                        continue;
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

enum Next {
    Stop,
    Replace,
    Lost { proved: bool },
}

async fn serve_until_replaced(agent: &Arc<Agent>, link: Link) -> Next {
    let since = Instant::now();
    let stop = agent.tasks.stopping();
    let worn = link.worn().clone();
    let mut served = agent.tasks.spawn(link.serve());
    tokio::select! {
        end = &mut served => match end {
            Ok(LinkEnd::Stopped) => Next::Stop,
            Ok(LinkEnd::Lost) | Err(_) if stop.is_cancelled() => Next::Stop,
            Ok(LinkEnd::Lost) | Err(_) => Next::Lost { proved: since.elapsed() >= limits::LINK_PROVED },
        },
        // The old link goes on by itself until its last forward has ended.
        () = worn.cancelled() => Next::Replace,
    }
}

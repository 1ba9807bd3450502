//! Keeps one link to one gateway: dials, and dials again.
//!
//! Promised: waits between attempts are jittered, grow, and are capped; they start afresh only after a link that lasted. A
//! link that has carried as many opens as one should, that its gateway wants made anew, or that was made with a host key or
//! replica name which the configuration no longer has, is replaced while it still serves: it retires when the new one is
//! good, and until then stays. Of those replaced, so many are kept, however many the gateway would keep. A process whose
//! place another one has taken keeps its forwards and stands by: it dials again at long intervals, so that two with one
//! name do not throw each other out by turns.
//!
//! Each attempt goes by the newest configuration. One that changes the way or the identity ends an attempt, and any ends
//! the wait for the next; one that no longer has this gateway for its organisation ends it all.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use tracing::{debug, info, warn};

use super::live::State;
use super::serve::{self, Link, LinkEnd};
use super::{Agent, Post};
use crate::backoff::Backoff;
use crate::chain::Chain;
use crate::limits;
use crate::secret;
use crate::tunnel::connect::GatewayUrl;
use crate::tunnel::transport::Control as Switch;

pub(super) async fn keep_linked(agent: Arc<Agent>, post: Arc<Post>) {
    let stop = agent.tasks.stopping().clone();
    let gateway = &post.gateway;
    let mut backoff = Backoff::new(limits::RECONNECT_FIRST, limits::RECONNECT_CAP);
    let mut last = String::new();
    let mut replaced: VecDeque<Switch> = VecDeque::new();
    loop {
        let (state, mut changes) = agent.state.follow();
        let attempt = tokio::select! {
            attempt = serve::link(&agent, &state, &post) => attempt,
            () = agent.state.until(|now| !now.same_way(&state)) => continue,
            () = post.dismissed.cancelled() => return,
            () = stop.cancelled() => return,
        };
        match attempt {
            Ok(link) => {
                info!(organisation = %post.name.organisation, gateway = %gateway, "linked");
                last.clear();
                let switch = link.switch().clone();
                match serve_until_replaced(&agent, &state, link).await {
                    Next::Stop => return,
                    Next::Replace(why) => {
                        info!(organisation = %post.name.organisation, gateway = %gateway, "replacing the link: {why}");
                        backoff.reset();
                        keep(&mut replaced, switch, &gateway);
                        continue;
                    }
                    Next::StandBy => {
                        warn!(
                            organisation = %post.name.organisation,
                            gateway = %gateway,
                            replica = %state.replica,
                            "another process of this agent, started later, has the same replica name and gets the forwards; \
                             give each process a `replica` of its own"
                        );
                        keep(&mut replaced, switch, &gateway);
                        let extra = f64::from(secret::random_u32()) / f64::from(u32::MAX) / 2.0;
                        let wait = limits::SUPERSEDED_WAIT.mul_f64(1.0 + extra);
                        tokio::select! {
                            () = tokio::time::sleep(wait) => continue,
                            // It may have given this process a name of its own.
                            Ok(()) = changes.changed() => continue,
                            () = post.dismissed.cancelled() => return,
                            () = stop.cancelled() => return,
                        }
                    }
                    Next::Lost { proved } => {
                        if proved {
                            backoff.reset();
                        }
                        if post.dismissed.is_cancelled() {
                            return;
                        }
                        warn!(organisation = %post.name.organisation, gateway = %gateway, "the link is lost; dialling again");
                    }
                }
            }
            Err(error) => {
                let text = Chain(&error).to_string();
                // The same failure again and again is told once; the attempts go on.
                if text == last {
                    debug!(gateway = %gateway, error = text, "still not linked");
                } else {
                    let stays = match replaced.back() {
                        Some(old) if !old.gone().is_cancelled() => " anew, so the link that there is stays",
                        _ => "",
                    };
                    warn!(organisation = %post.name.organisation, gateway = %gateway, "not linked{stays}: {text}");
                    last = text;
                }
            }
        }
        let wait = backoff.fail(secret::random_u32());
        debug!(gateway = %gateway, wait_ms = wait.as_millis(), "waiting before the next attempt");
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            // What stood in the way may have been mended.
            Ok(()) = changes.changed() => {}
            () = post.dismissed.cancelled() => return,
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
    Replace(&'static str),
    StandBy,
    Lost { proved: bool },
}

async fn serve_until_replaced(agent: &Arc<Agent>, made_under: &State, link: Link) -> Next {
    let since = Instant::now();
    let stop = agent.tasks.stopping();
    let (worn, moved, superseded) = (link.worn().clone(), link.moved().clone(), link.superseded().clone());
    let mut served = agent.tasks.spawn(link.serve());
    // Where the link has not ended, it goes on by itself until its last forward has ended.
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
        () = worn.cancelled() => Next::Replace("it has carried its share of opens"),
        () = moved.cancelled() => Next::Replace("its gateway wants it made anew"),
        () = agent.state.until(|now| !now.same_identity(made_under)) => {
            Next::Replace("the configuration has another host key or replica name")
        }
    }
}

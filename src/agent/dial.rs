//! Keeps one link to one gateway: dials, and dials again.
//!
//! A gateway may be reached by several ways. They are tried in order, in rounds: each round begins with the first, also after
//! a link that was lost; the next way is tried where one leads to no gateway, and not where the gateway itself has said no: then only one
//! of TLS is, if the agent has a certificate to show there and has not shown it yet. The waits below lie between rounds.
//!
//! Promised: waits between attempts are jittered, grow, and are capped; they start afresh only after a link that lasted. A
//! link that has carried as many opens as one should, whose gateway goes away or wants it made anew, or that was made with a
//! host key, TLS certificate or replica name which the configuration no longer has, is replaced while it still serves: it retires when the new
//! one is good, and until then stays. A gateway that wants a new one on every link gets the next after the same waits as one
//! that drops them. Of those replaced, so many are kept, however many the gateway would keep, and none goes on for ever
//! without being replaced. Nobody dials once the agent
//! drains. A process whose place another one has taken keeps its forwards and stands by: it dials again at long intervals,
//! so that two with one name do not throw each other out by turns.
//!
//! Each round goes by the newest configuration. One that changes a way or the identity ends a round, and any ends the wait for
//! the next; one that changes the ways to a gateway has its link replaced; one that no longer has this gateway for its organisation ends it all.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use tracing::{debug, info, warn};

use super::live::State;
use super::serve::{self, Link, LinkEnd};
use super::{Agent, Post, health};
use crate::backoff::Backoff;
use crate::chain::Chain;
use crate::limits;
use crate::metrics::{self, Held};
use crate::secret;
use crate::tunnel::connect::url::{GatewayUrl, Ways};
use crate::tunnel::transport::Control as Switch;

pub(super) async fn keep_linked(agent: Arc<Agent>, post: Arc<Post>) {
    let stop = agent.drain.begun().clone();
    let mut backoff = Backoff::new(limits::RECONNECT_FIRST, limits::RECONNECT_CAP);
    let mut failures = Failures::default();
    let mut replaced: VecDeque<Switch> = VecDeque::new();
    loop {
        let (state, mut changes) = agent.state.follow();
        let ways = post.ways.current();
        replaced.retain(|switch| !switch.gone().is_cancelled());
        let stays = !replaced.is_empty();
        let linked = tokio::select! {
            biased;
            () = post.dismissed.cancelled() => return,
            () = stop.cancelled() => return,
            () = agent.state.until(|now| !now.same_way(&state, &post.name.organisation)) => continue,
            () = post.ways.until(|now| *now != *ways) => continue,
            linked = round(&agent, &state, &post, &ways, stays, &mut failures) => linked,
        };
        match linked {
            Some(link) => {
                let gateway = &link.gateway().clone();
                info!(organisation = %post.name.organisation, gateway = %gateway, "linked");
                agent.standings.linked(&post, &link);
                let switch = link.switch().clone();
                match serve_until_replaced(&agent, &state, &ways, link, share(replaced.len())).await {
                    Next::Stop => return,
                    Next::Replace(why, at_once) => {
                        metrics::LINK_RECONNECTS.of(["replaced"]).inc();
                        info!(organisation = %post.name.organisation, gateway = %gateway, "replacing the link: {why}");
                        keep(&agent, &mut replaced, switch, gateway);
                        if at_once {
                            backoff.reset();
                            continue;
                        }
                    }
                    Next::StandBy => {
                        agent.standings.lost(&post, health::SUPERSEDED);
                        metrics::LINK_RECONNECTS.of(["superseded"]).inc();
                        warn!(
                            organisation = %post.name.organisation,
                            gateway = %gateway,
                            replica = %state.replica,
                            "another process of this agent, started later, has the same replica name and gets the forwards; \
                             give each process a `replica` of its own"
                        );
                        keep(&agent, &mut replaced, switch, gateway);
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
                        agent.standings.lost(&post, health::LOST);
                        if proved {
                            backoff.reset();
                        }
                        if post.dismissed.is_cancelled() {
                            return;
                        }
                        metrics::LINK_RECONNECTS.of(["lost"]).inc();
                        warn!(organisation = %post.name.organisation, gateway = %gateway, "the link is lost; dialling again");
                    }
                }
            }
            None => debug!(gateway = %ways, "no way leads to a link"),
        }
        let wait = backoff.fail(secret::random_u32());
        debug!(gateway = %ways, wait_ms = wait.as_millis(), "waiting before the next attempt");
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            // What stood in the way may have been mended.
            Ok(()) = changes.changed() => {}
            () = post.dismissed.cancelled() => return,
            () = stop.cancelled() => return,
        }
    }
}

/// Tries the ways in order. `stays` says whether there is a link meanwhile.
async fn round(
    agent: &Arc<Agent>,
    state: &State,
    post: &Arc<Post>,
    ways: &Ways,
    stays: bool,
    failures: &mut Failures,
) -> Option<Link> {
    failures.keep(ways);
    let certified = state.way(&post.name.organisation).tls.as_ref().is_some_and(|tls| tls.identity().is_some());
    let mut rest = ways.iter();
    while let Some(way) = rest.next() {
        let error = match serve::link(agent, state, post, way).await {
            Ok(link) => {
                metrics::LINK_DIALS.of(["linked"]).inc();
                failures.clear(way);
                return Some(link);
            }
            Err(error) => error,
        };
        metrics::LINK_DIALS.of(["failed"]).inc();
        let text = Chain(&error).to_string();
        agent.standings.failed(post, error.brief());
        let hopeful = |next: &GatewayUrl| !error.is_final() || certified && error.lacks_certificate(way, next);
        let passed = rest.as_slice().iter().position(hopeful);
        let next = passed.map(|passed| &rest.as_slice()[passed]);
        // The same failure again and again is told once; the attempts go on.
        if failures.is_told(way, &text) {
            debug!(gateway = %way, error = text, "still not linked");
        } else {
            let then = match next {
                Some(next) => format!("; trying {next} next"),
                None if rest.len() > 0 => {
                    "; no other way to this gateway is tried, since it would say the same".to_owned()
                }
                None => String::new(),
            };
            let stays = if stays { " anew, so the link that there is stays" } else { "" };
            warn!(organisation = %post.name.organisation, gateway = %way, "not linked{stays}: {text}{then}");
        }
        rest = rest.as_slice()[passed?..].iter();
    }
    None
}

/// What was told of each way last, for as long as it has not led to a link.
#[derive(Default)]
struct Failures(HashMap<GatewayUrl, String>);

impl Failures {
    /// Forgets ways that there are no more.
    fn keep(&mut self, ways: &Ways) {
        self.0.retain(|way, _| ways.contains(way));
    }

    fn clear(&mut self, way: &GatewayUrl) {
        self.0.remove(way);
    }

    /// Whether this is what was told last; it will have been.
    fn is_told(&mut self, way: &GatewayUrl, text: &str) -> bool {
        self.0.insert(way.clone(), text.to_owned()).is_some_and(|before| before == text)
    }
}

/// Keeps a link that has been replaced, which ends with its last forward. It is counted as retired until then.
fn keep(agent: &Agent, replaced: &mut VecDeque<Switch>, switch: Switch, gateway: &GatewayUrl) {
    replaced.retain(|switch| !switch.gone().is_cancelled());
    let (gone, stop) = (switch.gone().clone(), agent.tasks.stopping().clone());
    agent.tasks.spawn(async move {
        let _counted = Held::one_of(&metrics::LINKS.of(["retired"]));
        tokio::select! {
            () = gone.cancelled() => {}
            () = stop.cancelled() => {}
        }
    });
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
    /// Whether the next one is to be made at once.
    Replace(&'static str, bool),
    /// Another process has taken its place.
    StandBy,
    Lost {
        proved: bool,
    },
}

/// The opens that a link carries before it is replaced, while `kept` replaced ones wait for their last forward: the more
/// there are, the later comes the next, since one too many is cut, and forwards that live long must not be lost to many
/// short ones beside them.
fn share(kept: usize) -> u64 {
    limits::OPENS_PER_LINK * (1 + kept as u64 / 16)
}

async fn serve_until_replaced(agent: &Arc<Agent>, made_under: &State, ways: &Ways, link: Link, share: u64) -> Next {
    let since = Instant::now();
    let stop = agent.drain.begun();
    let post = link.post().clone();
    let _counted = [
        Held::one_of(&metrics::ORGANISATION_LINKS.of([post.name.organisation.to_string()])),
        Held::one_of(&metrics::LINKS.of(["active"])),
    ];
    let (worn, moved, superseded) = (link.worn().clone(), link.moved().clone(), link.superseded().clone());
    let mut served = agent.tasks.spawn(link.serve(share));
    let proved = || since.elapsed() >= limits::LINK_PROVED;
    let moves = "its gateway wants it made anew";
    // Unless it has ended, the old link goes on by itself until its last forward has.
    tokio::select! {
        biased;
        () = stop.cancelled() => Next::Stop,
        () = superseded.cancelled() => Next::StandBy,
        () = moved.cancelled() => Next::Replace(moves, proved()),
        () = worn.cancelled() => Next::Replace("it has carried its share of opens", true),
        end = &mut served => match end {
            Ok(LinkEnd::Stopped) => Next::Stop,
            // What it said before it hung up is what counts.
            Ok(LinkEnd::Lost) | Err(_) if superseded.is_cancelled() => Next::StandBy,
            Ok(LinkEnd::Lost) | Err(_) if moved.is_cancelled() => Next::Replace(moves, proved()),
            Ok(LinkEnd::Lost) | Err(_) => Next::Lost { proved: proved() },
        },
        () = agent.state.until(|now| !now.same_identity(made_under, &post.name.organisation)) => {
            Next::Replace("the configuration has another host key, TLS certificate or replica name", true)
        }
        () = post.ways.until(|now| now != ways) => Next::Replace("the configuration has other ways to its gateway", true),
    }
}

const _: () = assert!(
    limits::OPENS_PER_LINK * (1 + limits::REPLACED_LINKS as u64 / 16) < limits::OPENS_PER_LINK_MAX,
    "a link is to be replaced before it is cut"
);

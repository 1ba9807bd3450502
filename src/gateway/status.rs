//! What `caponier top` shows: how the gateway is, its agents, and the forwards of one of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Gateway;
use super::forwards::{ForwardRow, Happened, Totals};
use super::roster::Standing;
use crate::identity::AgentName;
use crate::limits;
use crate::metrics;
use crate::registry::Registry;

/// How a gateway is at a moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it runs.
    pub version: String,
    /// The moment.
    pub time: Timestamp,
    /// When it was started.
    pub started: Timestamp,
    /// `serving`, or `draining`.
    pub state: String,
    /// Whether its trail can be written.
    pub recording: bool,
    /// Numbers of all of it.
    pub totals: Totals,
    /// Its links, those with the most forwards if not all; then agents without one.
    pub agents: Vec<Carrier>,
    /// How many of these are left out.
    pub left_out: usize,
    /// The forwards of the agent that was asked for.
    pub forwards: Vec<ForwardRow>,
    /// Whether it has more.
    pub more_forwards: bool,
    /// What happened last, newest first.
    pub events: Vec<Happened>,
}

/// A link, or an agent without one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carrier {
    /// The organisation and the agent.
    pub agent: String,
    /// Which of its processes.
    pub replica: Option<String>,
    /// As `caponier agents` says it.
    pub state: String,
    /// Since when it is linked.
    pub since: Option<Timestamp>,
    /// Forwards that run.
    pub live: usize,
    /// Forwards that it was asked for.
    pub opened: u64,
    /// Bytes toward targets.
    pub to_target: u64,
    /// Bytes from targets.
    pub from_target: u64,
}

/// Which forwards are asked for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Wanted {
    /// Those of this agent.
    pub agent: Option<String>,
    /// From after this number on.
    pub after: u64,
}

/// How the gateway is now.
pub(super) async fn status(gateway: &Gateway, wanted: &Wanted) -> Status {
    let mut moved: HashMap<usize, [u64; 2]> = HashMap::new();
    let mut totals = gateway
        .forwards
        .sum(|link, to, from| {
            let sums = moved.entry(Arc::as_ptr(link).addr()).or_default();
            sums[0] += to;
            sums[1] += from;
        })
        .await;
    let mut links = gateway.roster.list();
    totals.links = links.len();
    totals.refused = metrics::refused();
    let draining = gateway.drain.begun().is_cancelled();
    let linked: HashSet<AgentName> = links.iter().map(|link| link.peer.name.clone()).collect();
    let snapshot = gateway.registry.current();
    let unlinked: Vec<AgentName> = snapshot
        .organisations()
        .iter()
        .flat_map(|(organisation, held)| {
            held.agents.keys().map(|agent| AgentName { organisation: organisation.clone(), agent: agent.clone() })
        })
        .filter(|name| !linked.contains(name))
        .collect();
    let all = links.len() + unlinked.len();
    if links.len() > limits::STATUS_ROWS {
        links.sort_by_key(|link| std::cmp::Reverse(link.live()));
        links.truncate(limits::STATUS_ROWS);
    }
    let room = limits::STATUS_ROWS - links.len();
    let carriers = links.iter().map(|link| {
        let [to, from] = moved.get(&Arc::as_ptr(link).addr()).copied().unwrap_or_default();
        let [to_before, from_before] = link.carried_before();
        let standing = if draining { Standing::Draining } else { link.standing() };
        Carrier {
            agent: link.peer.name.to_string(),
            replica: Some(link.peer.replica.to_string()),
            state: standing.as_str().to_owned(),
            since: Some(link.since),
            live: link.live(),
            opened: link.opened(),
            to_target: to + to_before,
            from_target: from + from_before,
        }
    });
    let absent = unlinked.iter().take(room).map(|name| Carrier {
        agent: name.to_string(),
        replica: None,
        state: if gateway.lapses.of(name).replicas.is_empty() { "never linked" } else { "absent" }.to_owned(),
        since: None,
        live: 0,
        opened: 0,
        to_target: 0,
        from_target: 0,
    });
    let agents: Vec<_> = carriers.chain(absent).collect();
    let mut forwards = wanted
        .agent
        .as_ref()
        .and_then(|agent| agent.parse::<AgentName>().ok())
        .map_or_else(Vec::new, |agent| gateway.forwards.page(&agent, wanted.after, limits::STATUS_FORWARDS + 1));
    let more_forwards = forwards.len() > limits::STATUS_FORWARDS;
    forwards.truncate(limits::STATUS_FORWARDS);
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        time: Timestamp::now(),
        started: gateway.started,
        state: if draining { "draining" } else { "serving" }.to_owned(),
        recording: gateway.trail.failed().borrow().is_none(),
        totals,
        left_out: all - agents.len(),
        agents,
        forwards,
        more_forwards,
        events: gateway.forwards.happened(),
    }
}

//! The forwards that run, and what happened last: for the operator who looks on.
//!
//! Promised: it is bounded, by the forwards that there are and by [`limits::HAPPENED`] events of [`limits::HAPPENED_TEXT`]
//! characters; and nobody who looks holds it for longer than [`limits::FORWARDS_AT_ONCE`] forwards take. No I/O, no waiting.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound::{Excluded, Included};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::roster::Link;
use crate::audit::Counters;
use crate::identity::AgentName;
use crate::limits;

/// All forwards that run, and what came of those before them.
#[derive(Default)]
pub(super) struct Forwards {
    table: Mutex<Table>,
    opened: AtomicU64,
    failed: AtomicU64,
    /// Bytes of those that have ended: toward the target, and from it.
    carried: [AtomicU64; 2],
}

#[derive(Default)]
struct Table {
    running: BTreeMap<(AgentName, u64), Arc<Running>>,
    /// The number of the last one.
    last: u64,
    denied: BTreeMap<&'static str, u64>,
    happened: VecDeque<Happened>,
}

/// One forward.
pub(super) struct Running {
    number: u64,
    agent: AgentName,
    about: About,
    since: Timestamp,
    counters: Arc<Counters>,
    link: OnceLock<Arc<Link>>,
}

/// What is shown of a forward, and does not change.
#[derive(Debug, Clone)]
pub(super) struct About {
    pub(super) forward: String,
    pub(super) principal: String,
    pub(super) client: String,
    pub(super) door: &'static str,
    pub(super) target: String,
}

/// A forward that is listed until this is dropped.
pub(super) struct Listed<'a> {
    forwards: &'a Forwards,
    running: Arc<Running>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Happened {
    /// When.
    pub at: Timestamp,
    /// In the word that the trail uses for such an event.
    pub event: String,
    /// To which agent, if it was to one.
    pub agent: Option<String>,
    /// Why, in the word that the trail uses, and more about it.
    pub detail: String,
}

/// A forward that runs, as `caponier top` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardRow {
    /// Its place in the list; what is asked for next begins after it.
    pub number: u64,
    /// The gateway's id of it.
    pub forward: String,
    /// The agent's replica that serves it; none before one does.
    pub replica: Option<String>,
    /// Who asked for it.
    pub principal: String,
    /// From where.
    pub client: String,
    /// By which door.
    pub door: String,
    /// Where it leads.
    pub target: String,
    /// Since when.
    pub since: Timestamp,
    /// Bytes toward the target.
    pub to_target: u64,
    /// Bytes from the target.
    pub from_target: u64,
}

/// Numbers since the gateway was started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Links that there are.
    pub links: usize,
    /// Forwards that run.
    pub live: usize,
    /// Forwards that were permitted and recorded.
    pub opened: u64,
    /// Of these, those that did not come about.
    pub failed: u64,
    /// Bytes toward targets.
    pub to_target: u64,
    /// Bytes from targets.
    pub from_target: u64,
    /// Denials, by the reason that the trail gives.
    pub denied: BTreeMap<String, u64>,
    /// Logins and connections that were not let in.
    #[serde(default)]
    pub refused: u64,
}

impl Forwards {
    /// Lists a forward that was permitted and recorded.
    pub(super) fn list(&self, agent: &AgentName, about: About, counters: Arc<Counters>) -> Listed<'_> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let mut table = self.table();
        table.last += 1;
        let running = Arc::new(Running {
            number: table.last,
            agent: agent.clone(),
            about,
            since: Timestamp::now(),
            counters,
            link: OnceLock::new(),
        });
        table.running.insert((agent.clone(), running.number), running.clone());
        Listed { forwards: self, running }
    }

    /// Counts a denial, and tells of it.
    pub(super) fn denied(&self, agent: &AgentName, about: &About, reason: &'static str) {
        let detail = format!("{reason}: {} to {}", about.principal, about.target);
        let mut table = self.table();
        *table.denied.entry(reason).or_default() += 1;
        table.tell("forward.denied", Some(agent), &detail);
    }

    /// Tells of something that happened.
    pub(super) fn tell(&self, event: &str, agent: Option<&AgentName>, detail: &str) {
        self.table().tell(event, agent, detail);
    }

    /// What happened last, newest first.
    pub(super) fn happened(&self) -> Vec<Happened> {
        self.table().happened.iter().rev().cloned().collect()
    }

    /// Up to `limit` forwards of an agent, from after the number `after` on.
    pub(super) fn page(&self, agent: &AgentName, after: u64, limit: usize) -> Vec<ForwardRow> {
        let range = (Excluded((agent.clone(), after)), Included((agent.clone(), u64::MAX)));
        let page: Vec<_> = self
            .table()
            .running
            .range(range)
            .take(limit.min(limits::FORWARDS_AT_ONCE))
            .map(|(_, one)| one.clone())
            .collect();
        page.iter().map(|one| one.row()).collect()
    }

    /// The totals, and calls `each` with every forward that has a link: the link, and its bytes.
    pub(super) async fn sum(&self, mut each: impl FnMut(&Arc<Link>, u64, u64)) -> Totals {
        let mut totals = Totals::default();
        let mut last: Option<(AgentName, u64)> = None;
        loop {
            let some: Vec<_> = {
                let table = self.table();
                let take = limits::FORWARDS_AT_ONCE;
                match &last {
                    None => table.running.values().take(take).cloned().collect(),
                    Some(last) => {
                        let rest = (Excluded(last.clone()), std::ops::Bound::Unbounded);
                        table.running.range(rest).take(take).map(|(_, one)| one.clone()).collect()
                    }
                }
            };
            let Some(end) = some.last() else { break };
            last = Some((end.agent.clone(), end.number));
            for one in &some {
                let (to, from) = (one.counters.to_target(), one.counters.from_target());
                totals.live += 1;
                totals.to_target += to;
                totals.from_target += from;
                if let Some(link) = one.link.get() {
                    each(link, to, from);
                }
            }
            // Whoever else lives on this thread has a turn.
            tokio::task::yield_now().await;
        }
        totals.opened = self.opened.load(Ordering::Relaxed);
        totals.failed = self.failed.load(Ordering::Relaxed);
        totals.to_target += self.carried[0].load(Ordering::Relaxed);
        totals.from_target += self.carried[1].load(Ordering::Relaxed);
        totals.denied = self.table().denied.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect();
        totals
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn tell(&mut self, event: &str, agent: Option<&AgentName>, detail: &str) {
        if self.happened.len() >= limits::HAPPENED {
            self.happened.pop_front();
        }
        self.happened.push_back(Happened {
            at: Timestamp::now(),
            event: event.to_owned(),
            agent: agent.map(ToString::to_string),
            detail: detail.chars().take(limits::HAPPENED_TEXT).collect(),
        });
    }
}

impl Running {
    fn row(&self) -> ForwardRow {
        ForwardRow {
            number: self.number,
            forward: self.about.forward.clone(),
            replica: self.link.get().map(|link| link.peer.replica.to_string()),
            principal: self.about.principal.clone(),
            client: self.about.client.clone(),
            door: self.about.door.to_owned(),
            target: self.about.target.clone(),
            since: self.since,
            to_target: self.counters.to_target(),
            from_target: self.counters.from_target(),
        }
    }
}

impl Listed<'_> {
    /// It goes over this link.
    pub(super) fn by(&self, link: &Arc<Link>) {
        // One link opens it.
        let _ = self.running.link.set(link.clone());
    }

    /// It did not come about; `denied` tells whether the agent's owner said so.
    pub(super) fn failed(&self, reason: &'static str, denied: bool) {
        let one = &*self.running;
        if denied {
            return self.forwards.denied(&one.agent, &one.about, reason);
        }
        self.forwards.failed.fetch_add(1, Ordering::Relaxed);
        let detail = format!("{reason}: {} to {}", one.about.principal, one.about.target);
        self.forwards.tell("forward.failed", Some(&one.agent), &detail);
    }
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        let one = &self.running;
        let bytes = [one.counters.to_target(), one.counters.from_target()];
        for (sum, bytes) in self.forwards.carried.iter().zip(bytes) {
            sum.fetch_add(bytes, Ordering::Relaxed);
        }
        if let Some(link) = one.link.get() {
            link.carried(bytes);
        }
        self.forwards.table().running.remove(&(one.agent.clone(), one.number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(target: &str) -> About {
        About {
            forward: "f".to_owned(),
            principal: "ci".to_owned(),
            client: "10.0.0.1:1".to_owned(),
            door: "ssh",
            target: target.to_owned(),
        }
    }

    fn name(name: &str) -> AgentName {
        name.parse().expect("a name")
    }

    #[tokio::test]
    async fn what_runs_is_listed_by_pages_and_what_has_ended_is_in_the_sums() {
        let forwards = Forwards::default();
        let (one, other) = (name("acme/one"), name("acme/two"));
        let counters = Arc::new(Counters::default());
        counters.add_to_target(5);
        let listed: Vec<_> =
            (0..10).map(|at| forwards.list(&one, about(&format!("t{at}:1")), counters.clone())).collect();
        let beside = forwards.list(&other, about("u:1"), Arc::default());
        let first = forwards.page(&one, 0, 7);
        let rest = forwards.page(&one, first[6].number, 100);
        let targets: Vec<_> = first.iter().chain(&rest).map(|row| row.target.clone()).collect();
        assert_eq!(targets, (0..10).map(|at| format!("t{at}:1")).collect::<Vec<_>>());
        assert_eq!(forwards.page(&other, 0, 100).len(), 1);
        let totals = forwards.sum(|_, _, _| panic!("none has a link")).await;
        assert_eq!((totals.live, totals.opened, totals.to_target), (11, 11, 50));
        beside.failed("no_link", false);
        beside.failed("denied", true);
        drop((listed, beside));
        let totals = forwards.sum(|_, _, _| ()).await;
        assert_eq!((totals.live, totals.failed, totals.to_target), (0, 1, 50));
        assert_eq!(totals.denied, BTreeMap::from([("denied".to_owned(), 1)]));
        assert!(forwards.page(&one, 0, 100).is_empty());
    }

    #[test]
    fn what_happened_is_bounded() {
        let forwards = Forwards::default();
        for at in 0..3 * limits::HAPPENED {
            forwards.tell("link.up", Some(&name("acme/one")), &format!("{at} {}", "x".repeat(10_000)));
        }
        let happened = forwards.happened();
        assert_eq!(happened.len(), limits::HAPPENED);
        assert!(happened[0].detail.starts_with(&format!("{} ", 3 * limits::HAPPENED - 1)));
        assert!(happened.iter().all(|one| one.detail.len() <= limits::HAPPENED_TEXT));
    }
}

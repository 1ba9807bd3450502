//! Who is linked now, and which link gets the next forward. Holds handles only; no I/O, no waiting.
//!
//! Promised: a link that is retired gets no forward, nor does one whose session is gone; among the others of an agent the
//! least loaded one does, and among equals the one that was asked longest ago. Of one replica name at most one process is
//! active: the one that was started last, whatever the order in which they linked. A link whose agent answers no opens any
//! more is retired when it is next looked at.
//!
//! An agent can only change its own entries here: all is kept by the name that its host key has proved.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use jiff::Timestamp;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::lapses::AGENT_DRAINED;
use crate::audit::Counters;
use crate::diagnosis::Report;
use crate::drain::Departure;
use crate::identity::{AgentName, Fingerprint, ReplicaId};
use crate::limits;
use crate::policy::grant::Pass;
use crate::task::{Carried, Load, Tasks, Worker};
use crate::tunnel::splice::{self, Side};
use crate::tunnel::ssh::{Answers, Client, OpenError};
use crate::tunnel::wire::{ForwardId, Hello, InstanceId, Originator};

/// All links, by agent.
pub(super) struct Roster<S = Client>(Mutex<Table<S>>);

struct Table<S> {
    links: HashMap<AgentName, Vec<Arc<Link<S>>>>,
    /// Fires when the agent has an active link; there while somebody waits for that.
    awaited: HashMap<AgentName, Arc<CancellationToken>>,
    /// Counts the picks.
    picks: u64,
}

/// Who is at the other end of a link.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// Which agent.
    pub(super) name: AgentName,
    /// Which of its processes, by name.
    pub(super) replica: ReplicaId,
    /// Which of those that have the name; agents of earlier versions do not say.
    pub(super) process: Option<Process>,
    /// Where it dialled from, as seen here.
    pub(super) address: SocketAddr,
    /// What carries its session.
    pub(super) transport: &'static str,
    /// What it runs.
    pub(super) version: String,
    /// Its host key.
    pub(super) key: Fingerprint,
}

/// One process of an agent. The later one is the greater.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Process {
    started: u64,
    /// Decides between two that say to have been started in the same millisecond.
    instance: String,
    /// By which of its ways it has linked; agents of earlier versions do not say. Between two processes it decides nothing.
    way: Option<u32>,
}

impl Process {
    /// The process that a hello tells of.
    pub(super) fn of(hello: &Hello) -> Option<Self> {
        let instance = hello.instance.as_ref().map(InstanceId::to_string)?;
        Some(Self { started: hello.started?, instance, way: hello.way })
    }
}

/// Whether a link gets new forwards, or why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It does.
    Active,
    /// Another link of the same process has taken its place.
    Retired,
    /// Another process with the same replica name, which was started later, has.
    Superseded,
    /// Its agent goes away.
    Draining,
    /// Its agent answers no opens.
    Unanswering,
}

impl Standing {
    /// All of them.
    pub(super) const ALL: [Self; 5] =
        [Self::Active, Self::Retired, Self::Superseded, Self::Draining, Self::Unanswering];

    /// The standing as an operator reads it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Retired => "retired",
            Self::Superseded => "superseded",
            Self::Draining => "draining",
            Self::Unanswering => "unanswering",
        }
    }
}

/// One link, logged in.
pub(super) struct Link<S = Client> {
    /// Who is at its other end.
    pub(super) peer: Peer,
    /// Since when.
    pub(super) since: Timestamp,
    /// How many forwards it carries now.
    live: AtomicUsize,
    /// How many it was asked for.
    opened: AtomicU64,
    /// Bytes of forwards that have ended: toward the target, and from it.
    carried: [AtomicU64; 2],
    /// When it was last picked, as a number of [`Table::picks`].
    picked: AtomicU64,
    /// Why it takes no more forwards, once it does not.
    retired: OnceLock<Standing>,
    /// Fires after `retired` was set.
    retires: CancellationToken,
    /// What the agent has said of its drain.
    departure: Departure,
    /// Why it was ended from here, if it was.
    ended: OnceLock<&'static str>,
    /// Who waits for what the agent finds at its targets.
    examination: Examination,
    idle: Notify,
    answers: Answers,
    gone: CancellationToken,
    client: S,
    /// Where its session lives, whose channels are used there and nowhere else.
    home: Option<Home>,
}

/// What passes between whoever wants an agent examined and whoever speaks with it.
#[derive(Debug, Default)]
pub(super) struct Examination {
    /// Set once the agent has said that it may be asked.
    permitted: OnceLock<()>,
    asked: Notify,
    waiting: Mutex<Option<oneshot::Sender<Report>>>,
}

impl Examination {
    /// Notes that the agent may be asked.
    pub(super) fn permit(&self) {
        self.permitted.get_or_init(|| ());
    }

    /// Whether the agent may be asked, and nobody waits for its answer.
    pub(super) fn is_free(&self) -> bool {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.permitted.get().is_some() && waiting.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Has the agent asked; `None` where it may not be, or somebody waits for its answer already.
    pub(super) fn ask(&self) -> Option<oneshot::Receiver<Report>> {
        self.permitted.get()?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.as_ref().is_some_and(|waiting| !waiting.is_closed()) {
            return None;
        }
        let (answer, answered) = oneshot::channel();
        *waiting = Some(answer);
        self.asked.notify_one();
        Some(answered)
    }

    /// Waits for the agent to be asked.
    pub(super) async fn asked(&self) {
        self.asked.notified().await;
    }

    /// Takes the agent's answer. One that nobody waits for is dropped.
    pub(super) fn answer(&self, report: Report) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waiting) = waiting {
            drop(waiting.send(report));
        }
    }
}

/// A thread, and whose tasks run there.
struct Home {
    worker: Worker,
    tasks: Tasks,
}

/// One forward on a link, counted until it is dropped.
pub(super) struct Ride<S = Client> {
    link: Arc<Link<S>>,
    _carried: Option<Carried>,
}

/// Why there is no link to ask.
pub(super) enum NoRide<'a, S = Client> {
    /// All that take forwards have been tried.
    Tried,
    /// There is none; one may come.
    Unlinked(Arrival<'a, S>),
}

/// The wait for an active link of one agent.
pub(super) struct Arrival<'a, S = Client> {
    roster: &'a Roster<S>,
    name: AgentName,
    came: Arc<CancellationToken>,
}

impl<S> Default for Roster<S> {
    fn default() -> Self {
        Self(Mutex::new(Table { links: HashMap::new(), awaited: HashMap::new(), picks: 0 }))
    }
}

impl<S> Roster<S> {
    /// Adds a link. Of the links with the same replica name one stays active: see [`succession`]. Returns those that have to
    /// go at once, because an agent may only have so many.
    pub(super) fn insert(&self, link: &Arc<Link<S>>) -> Vec<Arc<Link<S>>> {
        let mut table = self.table();
        let links = table.links.entry(link.peer.name.clone()).or_default();
        let holds = |other: &&Arc<Link<S>>| other.is_active() && !other.gone.is_cancelled();
        for other in links.iter().filter(holds) {
            match succession(&other.peer, &link.peer) {
                Succession::None => {}
                Succession::Replaces => _ = other.retire(Standing::Retired),
                Succession::Supersedes => _ = other.retire(Standing::Superseded),
                Succession::IsSuperseded => _ = link.retire(Standing::Superseded),
            }
        }
        links.push(link.clone());
        let mut surplus = Vec::new();
        while links.len() > limits::LINKS_PER_AGENT {
            // The oldest retired link first, else the oldest.
            let at = links.iter().position(|link| !link.is_active()).unwrap_or(0);
            surplus.push(links.remove(at));
        }
        if link.is_active()
            && let Some(came) = table.awaited.remove(&link.peer.name)
        {
            came.cancel();
        }
        surplus
    }

    /// Takes a link out.
    pub(super) fn remove(&self, link: &Arc<Link<S>>) {
        let mut table = self.table();
        if let Some(links) = table.links.get_mut(&link.peer.name) {
            links.retain(|other| !Arc::ptr_eq(other, link));
            if links.is_empty() {
                table.links.remove(&link.peer.name);
            }
        }
    }

    /// The link that is to be asked for a forward: the least loaded of those that were not tried yet, rather of a replica
    /// that was not tried either.
    pub(super) fn pick(&self, name: &AgentName, tried: &[Arc<Link<S>>]) -> Result<Ride<S>, NoRide<'_, S>> {
        let mut table = self.table();
        let table = &mut *table;
        let active = || table.links.get(name).into_iter().flatten().filter(|link| link.takes_forwards());
        if active().next().is_none() {
            let came = table.awaited.entry(name.clone()).or_default().clone();
            return Err(NoRide::Unlinked(Arrival { roster: self, name: name.clone(), came }));
        }
        let untried = active().filter(|link| !tried.iter().any(|other| Arc::ptr_eq(other, link)));
        let link = untried.min_by_key(|link| {
            let again = tried.iter().any(|other| other.peer.replica == link.peer.replica);
            (again, link.live(), link.picked.load(Ordering::Relaxed))
        });
        let Some(link) = link else { return Err(NoRide::Tried) };
        table.picks += 1;
        link.picked.store(table.picks, Ordering::Relaxed);
        Ok(Ride::new(link.clone()))
    }

    /// Where the link lives that would be [picked](Roster::pick) now.
    pub(super) fn worker(&self, name: &AgentName) -> Option<Worker> {
        let table = self.table();
        let active = table.links.get(name)?.iter().filter(|link| link.takes_forwards());
        let link = active.min_by_key(|link| (link.live(), link.picked.load(Ordering::Relaxed)))?;
        link.home.as_ref().map(|home| home.worker.clone())
    }

    /// Whether the agent has a link with this replica name.
    pub(super) fn holds(&self, peer: &Peer) -> bool {
        let table = self.table();
        let mut links = table.links.get(&peer.name).into_iter().flatten();
        links.any(|link| link.peer.replica == peer.replica)
    }

    /// All links, by agent and replica, oldest first.
    pub(super) fn list(&self) -> Vec<Arc<Link<S>>> {
        let mut links: Vec<_> = self.table().links.values().flatten().cloned().collect();
        let order = |link: &Arc<Link<S>>| (link.peer.name.clone(), link.peer.replica.clone(), link.since);
        links.sort_by_cached_key(order);
        links
    }

    fn table(&self) -> MutexGuard<'_, Table<S>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a new link means for an active one of the same agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Succession {
    /// Nothing.
    None,
    /// It takes its place.
    Replaces,
    /// It takes the place of another process.
    Supersedes,
    /// The other process was started later, and keeps the place.
    IsSuperseded,
}

/// Links of one process replace each other, whatever it calls itself by now: the newest holds. But those that it has made by
/// different ways, of which several may lead here, stay beside each other: each is kept by itself, so that they would throw
/// each other out by turns. Of two processes with one
/// replica name, the one that was started later holds: that is the one that an operator has just started, and an order
/// that does not depend on who linked last keeps them from throwing each other out by turns. Where one of them does not
/// say, the newest link holds.
fn succession(active: &Peer, new: &Peer) -> Succession {
    let same_name = active.replica == new.replica;
    match (&active.process, &new.process) {
        (Some(active), Some(new)) if active.instance == new.instance && active.way != new.way => Succession::None,
        (Some(active), Some(new)) if active.instance == new.instance => Succession::Replaces,
        _ if !same_name => Succession::None,
        (Some(active), Some(new)) if active > new => Succession::IsSuperseded,
        (Some(_), Some(_)) => Succession::Supersedes,
        _ => Succession::Replaces,
    }
}

impl<S> Arrival<'_, S> {
    /// Waits until the agent has an active link; by the time it is looked for, it may be gone again.
    pub(super) async fn wait(self) {
        self.came.cancelled().await;
    }
}

impl<S> Drop for Arrival<'_, S> {
    fn drop(&mut self) {
        let mut table = self.roster.table();
        let mine = table.awaited.get(&self.name).is_some_and(|came| Arc::ptr_eq(came, &self.came));
        // The table's and this one: nobody else waits.
        if mine && Arc::strong_count(&self.came) == 2 {
            table.awaited.remove(&self.name);
        }
    }
}

impl Link {
    /// A link whose agent has said hello, and whose session lives on `worker`.
    pub(super) fn new(peer: Peer, client: Client, worker: Worker, tasks: Tasks) -> Self {
        let (answers, gone) = (client.answers().clone(), client.control().gone().clone());
        Self { home: Some(Home { worker, tasks }), ..Self::with(peer, answers, gone, client) }
    }

    /// The SSH session.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }
}

impl<S> Link<S> {
    /// What its agent can be asked to find.
    pub(super) fn examination(&self) -> &Examination {
        &self.examination
    }

    fn with(peer: Peer, answers: Answers, gone: CancellationToken, client: S) -> Self {
        Self {
            peer,
            since: Timestamp::now(),
            live: AtomicUsize::new(0),
            opened: AtomicU64::new(0),
            carried: Default::default(),
            picked: AtomicU64::new(0),
            retired: OnceLock::new(),
            retires: CancellationToken::new(),
            departure: Departure::default(),
            ended: OnceLock::new(),
            examination: Examination::default(),
            idle: Notify::new(),
            answers,
            gone,
            client,
            home: None,
        }
    }

    /// How many forwards it carries.
    pub(super) fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// How many forwards it was asked for.
    pub(super) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Adds the bytes of a forward that has ended.
    pub(super) fn carried(&self, bytes: [u64; 2]) {
        for (sum, bytes) in self.carried.iter().zip(bytes) {
            sum.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Bytes of forwards that have ended: toward the target, and from it.
    pub(super) fn carried_before(&self) -> [u64; 2] {
        self.carried.each_ref().map(|sum| sum.load(Ordering::Relaxed))
    }

    /// Whether it takes forwards, and if not, why.
    pub(super) fn standing(&self) -> Standing {
        self.retired.get().copied().unwrap_or(Standing::Active)
    }

    fn is_active(&self) -> bool {
        self.retired.get().is_none()
    }

    fn takes_forwards(&self) -> bool {
        if self.is_active()
            && self.answers.are_missing(limits::UNANSWERED_OPENS, limits::ANSWER_TIMEOUT, Instant::now())
        {
            self.retire(Standing::Unanswering);
        }
        // An agent of ours has long made another link by then; one that does not must not make us keep what the library does.
        if self.is_active() && self.answers.total() >= limits::OPENS_PER_LINK_MAX {
            self.retire(Standing::Retired);
        }
        self.is_active() && !self.gone.is_cancelled()
    }

    /// Gives it no more forwards; it ends with its last one. The first reason stands; returns whether this is it.
    pub(super) fn retire(&self, why: Standing) -> bool {
        let first = self.retired.set(why).is_ok();
        self.retires.cancel();
        first
    }

    /// Waits until it takes no more forwards, and tells why.
    pub(super) async fn retired(&self) -> Standing {
        self.retires.cancelled().await;
        self.standing()
    }

    /// Waits until it is retired and its last forward has ended, and tells why.
    pub(super) async fn spent(&self) -> Standing {
        let why = self.retired().await;
        self.idle().await;
        why
    }

    /// Waits until it carries no forward.
    pub(super) async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.live() == 0 {
                return;
            }
            idle.await;
        }
    }

    /// Notes why it is about to be ended from here, for the records of its forwards.
    pub(super) fn ends(&self, why: &'static str) {
        // Whatever came first is what ends them.
        let _ = self.ended.set(why);
    }

    /// What the agent has said of its drain.
    pub(super) fn departure(&self) -> &Departure {
        &self.departure
    }

    /// Why a forward on it has ended whose target's side broke.
    pub(super) fn broke_as(&self) -> &'static str {
        match self.ended.get() {
            Some(&"revoked") if self.gone.is_cancelled() => "revoked",
            _ if self.departure.is_due() => AGENT_DRAINED,
            _ if self.gone.is_cancelled() => "link_lost",
            _ => "target_broke",
        }
    }
}

impl<S> Ride<S> {
    fn new(link: Arc<Link<S>>) -> Self {
        link.live.fetch_add(1, Ordering::Relaxed);
        link.opened.fetch_add(1, Ordering::Relaxed);
        let carried = link.home.as_ref().map(|home| home.worker.carry(Load::Forward));
        Self { link, _carried: carried }
    }

    /// The link.
    pub(super) fn link(&self) -> &Arc<Link<S>> {
        &self.link
    }
}

impl Ride {
    /// Asks the agent for the forward that `pass` permits, and gives the side that leads to the target. Where the link lives
    /// on another thread than the caller, that is one end of a bridge; bytes that leave at its other end are added to
    /// `counters` there. May be dropped: what then still opens is closed.
    pub(super) async fn open(
        &self,
        pass: &Pass,
        originator: &Originator,
        forward: &ForwardId,
        counters: Arc<Counters>,
    ) -> Result<Side, OpenError> {
        let link = self.link.clone();
        let originator = originator.to_string();
        let Some(Home { worker, tasks }) = link.home.as_ref().filter(|home| !home.worker.is_here()) else {
            return link.client.open(pass.target(), &originator, Some(forward)).await.map(Side::Channel);
        };
        debug!(%forward, worker = worker.number(), "the link lives on another thread");
        let (mut answer, answered) = oneshot::channel();
        let (target, forward) = (pass.target().clone(), forward.clone());
        worker.spawn(tasks, {
            let link = link.clone();
            async move {
                let opened = tokio::select! {
                    opened = link.client.open(&target, &originator, Some(&forward)) => opened,
                    () = answer.closed() => return,
                };
                match opened {
                    Ok(channel) => {
                        let (side, across) = splice::across(counters);
                        // If nobody waits any more, the side is dropped, and what was opened closed.
                        drop(answer.send(Ok(side)));
                        across.run(Side::Channel(channel)).await;
                    }
                    Err(error) => drop(answer.send(Err(error))),
                }
            }
        });
        answered.await.unwrap_or(Err(OpenError::Gone))
    }
}

impl<S> Drop for Ride<S> {
    fn drop(&mut self) {
        if self.link.live.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.link.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::identity::{Algorithm, PrivateKey};

    type Roster = super::Roster<()>;
    type Link = super::Link<()>;

    fn process(instance: &str, started: u64) -> Option<Process> {
        Some(Process { started, instance: instance.to_owned(), way: None })
    }

    fn link_of(agent: &str, replica: &str, process: Option<Process>) -> Arc<Link> {
        let peer = Peer {
            name: agent.parse().expect("a name"),
            replica: replica.parse().expect("a replica"),
            process,
            address: SocketAddr::from(([10, 0, 0, 1], 1)),
            transport: "ssh",
            version: "1".to_owned(),
            key: PrivateKey::generate(Algorithm::Ed25519).public().fingerprint(),
        };
        Arc::new(Link::with(peer, Answers::default(), CancellationToken::new(), ()))
    }

    fn link(replica: &str, process: Option<Process>) -> Arc<Link> {
        link_of("acme/prod-eu", replica, process)
    }

    fn name() -> AgentName {
        "acme/prod-eu".parse().expect("a name")
    }

    fn standings(links: &[&Arc<Link>]) -> Vec<Standing> {
        links.iter().map(|link| link.standing()).collect()
    }

    #[test]
    fn what_a_second_link_of_a_name_means() {
        let (early, late) = (process("aaaa", 1), process("bbbb", 2));
        let (twin, other_twin) = (process("aaaa", 7), process("bbbb", 7));
        let peer = |replica: &str, process: &Option<Process>| link(replica, process.clone()).peer.clone();
        for (active, new, expected) in [
            // The same process: make-before-break, whatever it says of its start.
            (&late, &late, Succession::Replaces),
            (&process("aaaa", 9), &early, Succession::Replaces),
            // Two processes: the later one, whatever the order.
            (&early, &late, Succession::Supersedes),
            (&late, &early, Succession::IsSuperseded),
            (&twin, &other_twin, Succession::Supersedes),
            (&other_twin, &twin, Succession::IsSuperseded),
            // Those that do not say: the newest link, as ever.
            (&None, &None, Succession::Replaces),
            (&late, &None, Succession::Replaces),
            (&None, &early, Succession::Replaces),
        ] {
            assert_eq!(succession(&peer("one", active), &peer("one", new)), expected, "{active:?} {new:?}");
            let other_name = succession(&peer("one", active), &peer("two", new));
            let same_process = active.as_ref().zip(new.as_ref()).is_some_and(|(a, b)| a.instance == b.instance);
            assert_eq!(other_name == Succession::Replaces, same_process, "{active:?} {new:?}");
            assert!([Succession::Replaces, Succession::None].contains(&other_name));
        }
    }

    #[test]
    fn the_process_that_started_later_is_active_whatever_the_order() {
        let roster = Roster::default();
        let old = link("one", process("a", 1));
        let new = link("one", process("b", 2));
        let again = link("one", process("a", 1));
        let newest = link("one", process("b", 2));
        for link in [&old, &new, &again, &newest] {
            assert!(roster.insert(link).is_empty());
        }
        assert_eq!(
            standings(&[&old, &new, &again, &newest]),
            [Standing::Superseded, Standing::Retired, Standing::Superseded, Standing::Active]
        );
        assert!(Arc::ptr_eq(roster.pick(&name(), &[]).ok().expect("a link").link(), &newest));
        // Its session is gone, even if nobody has taken it out yet: the other process is welcome.
        newest.gone.cancel();
        let third = link("one", process("a", 1));
        roster.insert(&third);
        assert_eq!(third.standing(), Standing::Active);
        assert!(Arc::ptr_eq(roster.pick(&name(), &[]).ok().expect("a link").link(), &third));
    }

    #[test]
    fn links_of_one_process_by_two_ways_do_not_replace_each_other() {
        let roster = Roster::default();
        let by = |way, started, instance: &str| {
            link("one", process(instance, started).map(|process| Process { way: Some(way), ..process }))
        };
        let (first, second, again) = (by(1, 5, "a"), by(2, 5, "a"), by(1, 5, "a"));
        for link in [&first, &second, &again] {
            roster.insert(link);
        }
        assert_eq!(standings(&[&first, &second, &again]), [Standing::Retired, Standing::Active, Standing::Active]);
        // Another process with the name, started earlier or later, by whatever way.
        let (early, late) = (by(1, 4, "b"), by(3, 6, "c"));
        for link in [&early, &late] {
            roster.insert(link);
        }
        assert_eq!(standings(&[&early, &second, &again]), [Standing::Superseded; 3]);
        assert_eq!(late.standing(), Standing::Active);
    }

    #[test]
    fn no_start_time_harms_another_agent_or_another_replica() {
        let roster = Roster::default();
        let (other_agent, other_replica) =
            (link_of("acme/prod-us", "one", process("a", 1)), link("two", process("b", 1)));
        let other_organisation = link_of("globex/prod-eu", "one", process("c", 1));
        for link in [&other_agent, &other_replica, &other_organisation] {
            roster.insert(link);
        }
        for started in [0, 2, u64::MAX] {
            roster.insert(&link("one", process(&format!("x{started}"), started)));
        }
        assert_eq!(standings(&[&other_agent, &other_replica, &other_organisation]), [Standing::Active; 3]);
    }

    #[test]
    fn the_least_loaded_link_is_picked_and_equals_take_turns() {
        let roster = Roster::default();
        let links = ["one", "two", "three"].map(|replica| link(replica, None));
        links.iter().for_each(|link| drop(roster.insert(link)));
        let pick = || roster.pick(&name(), &[]).ok().expect("a link");
        // One after another, none of them running on: by turns.
        for _ in 0..9 {
            drop(pick());
        }
        assert!(links.iter().all(|link| link.opened() == 3));
        let mut rides: Vec<_> = (0..9).map(|_| pick()).collect();
        assert!(links.iter().all(|link| link.live() == 3));
        rides.retain(|ride| !Arc::ptr_eq(ride.link(), &links[1]));
        for _ in 0..3 {
            let ride = pick();
            assert!(Arc::ptr_eq(ride.link(), &links[1]));
            rides.push(ride);
        }
    }

    #[test]
    fn no_link_is_tried_twice_and_another_replica_comes_first() {
        let roster = Roster::default();
        let one = link("one", process("a", 1));
        roster.insert(&one);
        let first = roster.pick(&name(), &[]).ok().expect("a link");
        let two = link("two", process("b", 1));
        let newer = link("one", process("a", 1));
        roster.insert(&newer);
        roster.insert(&two);
        let busy: Vec<_> = (0..5).map(|_| Ride::new(two.clone())).collect();
        let mut tried = vec![first.link().clone()];
        let second = roster.pick(&name(), &tried).ok().expect("a link");
        assert!(Arc::ptr_eq(second.link(), &two), "however loaded it is");
        tried.push(two.clone());
        let third = roster.pick(&name(), &tried).ok().expect("a link");
        assert!(Arc::ptr_eq(third.link(), &newer));
        tried.push(newer.clone());
        assert!(matches!(roster.pick(&name(), &tried), Err(NoRide::Tried)));
        newer.retire(Standing::Draining);
        two.retire(Standing::Draining);
        assert!(matches!(roster.pick(&name(), &tried), Err(NoRide::Unlinked(_))), "a link may come");
        drop(busy);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_is_woken_by_an_active_link_and_leaves_nothing_behind() {
        let roster = Roster::default();
        let newer = link("one", process("b", 2));
        newer.retire(Standing::Draining);
        roster.insert(&newer);
        let mut waiting = Vec::new();
        for _ in 0..3 {
            let Err(NoRide::Unlinked(arrival)) = roster.pick(&name(), &[]) else { panic!("a link") };
            waiting.push(arrival);
        }
        assert_eq!(roster.table().awaited.len(), 1);
        roster.insert(&link_of("acme/prod-us", "one", None));
        assert!(!waiting[0].came.is_cancelled(), "woken by another agent's link");
        roster.insert(&link("one", None));
        for arrival in waiting {
            tokio::time::timeout(Duration::from_secs(1), arrival.wait()).await.expect("woken");
        }
        assert!(roster.table().awaited.is_empty());
        // Those who give up are forgotten with the last of them.
        let absent: AgentName = "acme/absent".parse().expect("a name");
        let wait = || match roster.pick(&absent, &[]) {
            Err(NoRide::Unlinked(arrival)) => arrival,
            _ => panic!("a link"),
        };
        let (first, second) = (wait(), wait());
        drop(first);
        assert_eq!(roster.table().awaited.len(), 1);
        drop(second);
        assert!(roster.table().awaited.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_whose_opens_stay_unanswered_gets_no_more_of_them() {
        let roster = Roster::default();
        let (broken, good) = (link("one", None), link("two", None));
        roster.insert(&broken);
        roster.insert(&good);
        let now = Instant::now;
        for _ in 0..limits::UNANSWERED_OPENS - 1 {
            broken.answers.asked(now());
        }
        tokio::time::advance(limits::ANSWER_TIMEOUT * 2).await;
        assert!(broken.takes_forwards(), "too few to judge by");
        broken.answers.asked(now());
        broken.answers.answered();
        for _ in 0..limits::PENDING_OPENS_PER_LINK {
            broken.answers.asked(now());
        }
        tokio::time::advance(limits::ANSWER_TIMEOUT - Duration::from_millis(1)).await;
        assert!(broken.takes_forwards(), "there is time left");
        tokio::time::advance(Duration::from_millis(1)).await;
        for _ in 0..4 {
            assert!(Arc::ptr_eq(roster.pick(&name(), &[]).ok().expect("a link").link(), &good));
        }
        assert_eq!(standings(&[&broken, &good]), [Standing::Unanswering, Standing::Active]);
        assert_eq!(broken.spent().await, Standing::Unanswering);
    }

    #[tokio::test]
    async fn a_retired_link_is_spent_with_its_last_forward() {
        let link = link("one", None);
        let ride = Ride::new(link.clone());
        link.retire(Standing::Superseded);
        link.retire(Standing::Draining);
        assert_eq!(link.retired().await, Standing::Superseded, "the first reason stands");
        let spent = link.spent();
        tokio::pin!(spent);
        assert!(tokio::time::timeout(Duration::from_millis(1), &mut spent).await.is_err());
        drop(ride);
        assert_eq!(spent.await, Standing::Superseded);
    }

    #[test]
    fn an_agent_holds_so_many_links_and_loses_retired_ones_first() {
        let roster = Roster::default();
        let links: Vec<_> = (0..limits::LINKS_PER_AGENT).map(|number| link(&format!("r{number}"), None)).collect();
        links.iter().for_each(|link| assert!(roster.insert(link).is_empty()));
        links[5].retire(Standing::Draining);
        for expected in [&links[5], &links[0], &links[1]] {
            let surplus = roster.insert(&link(&format!("x{}", expected.peer.replica), None));
            assert!(surplus.len() == 1 && Arc::ptr_eq(&surplus[0], expected));
        }
        roster.list().iter().for_each(|link| roster.remove(link));
        assert!(roster.table().links.is_empty());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Link { replica: usize, process: Option<(u64, usize)> },
        Retire(usize),
        Lose(usize),
        Remove(usize),
        Pick,
        End(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let process = proptest::option::of((0_u64..4, 0_usize..4));
        prop_oneof![
            (0_usize..3, process).prop_map(|(replica, process)| Step::Link { replica, process }),
            any::<usize>().prop_map(Step::Retire),
            any::<usize>().prop_map(Step::Lose),
            any::<usize>().prop_map(Step::Remove),
            Just(Step::Pick),
            any::<usize>().prop_map(Step::End),
        ]
    }

    proptest! {
        #[test]
        fn never_a_retired_link_nor_two_of_one_name_nor_one_with_more_load(
            steps in proptest::collection::vec(step(), 1..80),
        ) {
            let roster = Roster::default();
            let mut rides: Vec<Ride<()>> = Vec::new();
            for step in steps {
                let links = roster.list();
                let at = |index: usize| (!links.is_empty()).then(|| &links[index % links.len()]);
                match step {
                    Step::Link { replica, process } => {
                        let process = process.map(|(started, instance)| Process {
                            started, instance: format!("i{instance}"), way: None
                        });
                        roster.insert(&link(&format!("r{replica}"), process));
                    }
                    Step::Retire(index) => at(index).into_iter().for_each(|link| _ = link.retire(Standing::Draining)),
                    Step::Lose(index) => at(index).into_iter().for_each(|link| link.gone.cancel()),
                    Step::Remove(index) => at(index).into_iter().for_each(|link| roster.remove(link)),
                    Step::Pick => {
                        let able: Vec<_> = links.iter().filter(|link| link.takes_forwards()).collect();
                        match roster.pick(&name(), &[]) {
                            Ok(ride) => {
                                let link = ride.link();
                                prop_assert!(link.is_active() && !link.gone.is_cancelled());
                                let least = able.iter().map(|link| link.live()).min();
                                // The least before the pick, which counts itself.
                                prop_assert!(able.len() == 1 || Some(link.live() - 1) <= least, "{least:?}");
                                rides.push(ride);
                            }
                            Err(_) => prop_assert!(able.is_empty()),
                        }
                    }
                    Step::End(index) => {
                        if !rides.is_empty() {
                            rides.swap_remove(index % rides.len());
                        }
                    }
                }
                let mut names: Vec<_> = roster.list().iter().filter(|link| link.takes_forwards())
                    .map(|link| link.peer.replica.clone()).collect();
                let all = names.len();
                names.dedup();
                prop_assert_eq!(all, names.len(), "two are active of one name");
            }
        }
    }
}

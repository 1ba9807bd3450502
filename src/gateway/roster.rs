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
mod tests;

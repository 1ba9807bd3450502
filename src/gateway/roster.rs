//! Who is linked now. Holds handles only; no I/O, no waiting.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::identity::{AgentName, Fingerprint, ReplicaId};
use crate::limits;
use crate::policy::grant::Pass;
use crate::tunnel::ssh::{Channel, Client, OpenError};
use crate::tunnel::wire::{ForwardId, Originator};

/// All links, by agent.
#[derive(Default)]
pub(super) struct Roster(Mutex<HashMap<AgentName, Vec<Arc<Link>>>>);

/// One link, logged in.
pub(super) struct Link {
    /// Which agent.
    pub(super) name: AgentName,
    /// Which of its processes.
    pub(super) replica: ReplicaId,
    /// Where it dialled from, as seen here.
    pub(super) address: SocketAddr,
    /// Since when.
    pub(super) since: Timestamp,
    /// What it runs.
    pub(super) version: String,
    /// Its host key.
    pub(super) key: Fingerprint,
    /// How many forwards it carries now.
    live: AtomicUsize,
    /// How many it was asked for.
    opened: AtomicU64,
    /// Fires when it takes no more forwards.
    retired: CancellationToken,
    /// Set when the agent has said that it goes away.
    leaving: AtomicBool,
    idle: Notify,
    client: Client,
}

/// One forward on a link, counted until it is dropped.
pub(super) struct Ride {
    link: Arc<Link>,
}

impl Roster {
    /// Adds a link; an older one of the same replica is retired. Returns those that have to go at once, because an agent
    /// may only have so many.
    pub(super) fn insert(&self, link: &Arc<Link>) -> Vec<Arc<Link>> {
        let mut roster = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let links = roster.entry(link.name.clone()).or_default();
        for older in links.iter().filter(|older| older.replica == link.replica) {
            older.retired.cancel();
        }
        links.push(link.clone());
        let mut surplus = Vec::new();
        while links.len() > limits::LINKS_PER_AGENT {
            // The oldest retired link first, else the oldest.
            let at = links.iter().position(|link| link.retired.is_cancelled()).unwrap_or(0);
            surplus.push(links.remove(at));
        }
        surplus
    }

    /// Takes a link out.
    pub(super) fn remove(&self, link: &Arc<Link>) {
        let mut roster = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(links) = roster.get_mut(&link.name) {
            links.retain(|other| !Arc::ptr_eq(other, link));
            if links.is_empty() {
                roster.remove(&link.name);
            }
        }
    }

    /// The least loaded link of an agent that takes forwards.
    pub(super) fn pick(&self, name: &AgentName) -> Option<Ride> {
        let roster = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let link = roster
            .get(name)?
            .iter()
            .filter(|link| !link.retired.is_cancelled() && !link.client.control().gone().is_cancelled())
            .min_by_key(|link| link.live.load(Ordering::Relaxed))?;
        Some(Ride::new(link.clone()))
    }

    /// All links, by agent and replica.
    pub(super) fn list(&self) -> Vec<Arc<Link>> {
        let roster = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut links: Vec<_> = roster.values().flatten().cloned().collect();
        links.sort_by(|a, b| (&a.name, &a.replica, a.since).cmp(&(&b.name, &b.replica, b.since)));
        links
    }
}

impl Link {
    pub(super) fn new(
        name: AgentName,
        replica: ReplicaId,
        address: SocketAddr,
        version: String,
        client: Client,
    ) -> Self {
        Self {
            key: client.host_key().fingerprint(),
            name,
            replica,
            address,
            since: Timestamp::now(),
            version,
            live: AtomicUsize::new(0),
            opened: AtomicU64::new(0),
            retired: CancellationToken::new(),
            leaving: AtomicBool::new(false),
            idle: Notify::new(),
            client,
        }
    }

    /// The SSH session.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// How many forwards it carries.
    pub(super) fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// How many forwards it was asked for.
    pub(super) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Whether it takes no more forwards.
    pub(super) fn is_retired(&self) -> bool {
        self.retired.is_cancelled()
    }

    /// The agent goes away: the link takes no more forwards. Returns whether that is news.
    pub(super) fn leave(&self) -> bool {
        self.retired.cancel();
        !self.leaving.swap(true, Ordering::Relaxed)
    }

    /// Whether the agent has said that it goes away.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Waits until it is retired and its last forward has ended.
    pub(super) async fn spent(&self) {
        self.retired.cancelled().await;
        self.idle().await;
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
}

impl Ride {
    fn new(link: Arc<Link>) -> Self {
        link.live.fetch_add(1, Ordering::Relaxed);
        link.opened.fetch_add(1, Ordering::Relaxed);
        Self { link }
    }

    /// The link.
    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Asks the agent for the forward that `pass` permits.
    pub(super) async fn open(
        &self,
        pass: Pass,
        originator: &Originator,
        forward: &ForwardId,
    ) -> Result<Channel, OpenError> {
        self.link.client.open(pass.target(), &originator.to_string(), Some(forward)).await
    }
}

impl Drop for Ride {
    fn drop(&mut self) {
        if self.link.live.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.link.idle.notify_waiters();
        }
    }
}

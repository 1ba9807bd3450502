//! Tasks that somebody owns.
//!
//! Promised: every task of the program is spawned through a [`Tasks`], carries its stop token, and is awaited by
//! [`Tasks::drain`] before the owner goes away. Nothing else may call `tokio::spawn` (clippy refuses it).
//!
//! A task runs on the thread of whoever spawns it. What is to run on another one of a [`Crew`] is spawned through a
//! [`Worker`]; see there.

mod crew;

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crew::{Carried, Crew, CrewError, Load, Threads, Worker};

/// A group of tasks with one stop token. Clones share the group.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Tasks {
    /// An empty group.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A group of its own whose stop token fires with this one's. Whoever made it drains it.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { tracker: TaskTracker::new(), stop: self.stop.child_token() }
    }

    /// Runs `future` as a task of this group. It is expected to watch [`Tasks::stopping`] if it could run for long.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place tasks are made; the tracker makes sure that they are awaited"
    )]
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tracker.spawn(future)
    }

    /// Runs `work` on a thread where it may block.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place blocking tasks are made; the tracker makes sure that they are awaited"
    )]
    pub fn spawn_blocking<F, T>(&self, work: F) -> JoinHandle<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.tracker.spawn_blocking(work)
    }

    /// The group's stop token.
    #[must_use]
    pub fn stopping(&self) -> &CancellationToken {
        &self.stop
    }

    /// Asks every task of the group to stop.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// How many tasks are running.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    /// Whether no task is running.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tracker.is_empty()
    }

    /// Waits for the group's tasks to end by themselves, at most for `limit`. Returns whether all of them did.
    pub async fn settle(&self, limit: Duration) -> bool {
        self.tracker.close();
        tokio::time::timeout(limit, self.tracker.wait()).await.is_ok()
    }

    /// Stops the group and waits for its tasks, at most for `limit`. Returns whether all of them ended.
    pub async fn drain(&self, limit: Duration) -> bool {
        self.stop.cancel();
        self.settle(limit).await
    }
}

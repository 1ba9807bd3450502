//! Tasks that somebody owns.
//!
//! Promised: every task of the program is spawned through a [`Tasks`], carries its stop token, and is awaited by
//! [`Tasks::drain`] before the owner goes away. Nothing else may call `tokio::spawn` (clippy refuses it).
//!
//! A task runs on the thread of whoever spawns it. What is to run on another one of a [`Crew`] is spawned through a
//! [`Worker`]; see there.

mod crew;
mod race;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crew::{Carried, Crew, CrewError, Load, Threads, Worker};
pub use race::{all, staggered};

/// Waits until the clock says `at`; without it, for ever. The clock is looked at again after each `look`, because clocks are set
/// and machines sleep, which timers do not notice.
pub async fn reached(at: Option<Timestamp>, look: Duration) {
    let Some(at) = at else { return std::future::pending().await };
    while let Some(left) = Duration::try_from(at.duration_since(Timestamp::now())).ok().filter(|left| !left.is_zero()) {
        tokio::time::sleep(left.min(look)).await;
    }
}

/// Runs `future` so that it is polled only when it was woken itself, and not whenever something else wakes the task that
/// it is a part of: for what waits for the rare beside what happens all the time.
pub async fn apart<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let bell = Arc::new(Bell { rung: AtomicBool::new(true), task: Mutex::new(Waker::noop().clone()) });
    let waker = Waker::from(bell.clone());
    poll_fn(|cx| {
        {
            // Before the look, so that a ring between the two wakes the task.
            let mut task = bell.task.lock().unwrap_or_else(PoisonError::into_inner);
            if !task.will_wake(cx.waker()) {
                task.clone_from(cx.waker());
            }
        }
        if !bell.rung.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        future.as_mut().poll(&mut Context::from_waker(&waker))
    })
    .await
}

/// Wakes a task on behalf of a part of it, and keeps in mind which one that was.
struct Bell {
    rung: AtomicBool,
    task: Mutex<Waker>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        // Not under the lock: a waker may be the last to hold its task.
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).clone();
        task.wake();
    }
}

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

    /// Does `work` on a thread where it may block, and waits for that for so long; `None` where it comes to no end within it.
    /// The thread is then left behind, with whatever it waits for: a mount whose server is away lets nobody go.
    pub async fn aside<F, T>(&self, limit: Duration, work: F) -> Option<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        tokio::time::timeout(limit, self.spawn_blocking(work)).await.ok()?.ok()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    /// Counts how often a task was woken.
    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_future_apart_is_polled_when_it_was_woken_and_wakes_the_task_that_looked_last() {
        let polls = AtomicUsize::new(0);
        let inner: Mutex<Option<Waker>> = Mutex::new(None);
        let wake = || inner.lock().expect("a lock").take().expect("a waker").wake();
        let mut future = pin!(apart(poll_fn(|cx| {
            *inner.lock().expect("a lock") = Some(cx.waker().clone());
            if polls.fetch_add(1, Ordering::Relaxed) == 2 { Poll::Ready("over") } else { Poll::Pending }
        })));
        let (first, second) = (Arc::new(Woken::default()), Arc::new(Woken::default()));
        let (first_waker, second_waker) = (Waker::from(first.clone()), Waker::from(second.clone()));

        for _ in 0..3 {
            assert!(future.as_mut().poll(&mut Context::from_waker(&first_waker)).is_pending());
        }
        assert_eq!(polls.load(Ordering::Relaxed), 1, "nobody woke it");
        wake();
        assert_eq!(first.0.load(Ordering::Relaxed), 1);
        assert!(future.as_mut().poll(&mut Context::from_waker(&second_waker)).is_pending());
        assert_eq!(polls.load(Ordering::Relaxed), 2);
        wake();
        assert_eq!((first.0.load(Ordering::Relaxed), second.0.load(Ordering::Relaxed)), (1, 1));
        assert_eq!(future.as_mut().poll(&mut Context::from_waker(&second_waker)), Poll::Ready("over"));
    }
}

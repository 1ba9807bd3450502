//! The threads that work is spread over: one current-thread runtime each.
//!
//! Promised: what is spawned on a worker stays there, with all that it spawns itself, so that an SSH session and the tasks
//! that use its channels share a thread. The first worker is the caller's own thread; the others are threads that end, and
//! are waited for, with [`Threads::end`]. A worker that ends by itself is an error with its name, and gets no more work.
//!
//! What waits on what: a worker's thread drives its tasks until the crew ends. Nothing here waits for a lock that is held
//! across an `await`.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;
use std::{fmt, io};

use tokio::runtime::{Builder, Handle, RuntimeFlavor};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Tasks;

/// The workers. Clones share them.
#[derive(Debug, Clone)]
pub struct Crew(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    workers: Vec<Worker>,
    broken: CancellationToken,
    pings: Tasks,
    /// Held by whoever asks whether the workers answer: each is asked once, however many want to know.
    asking: tokio::sync::Mutex<()>,
}

/// One of a crew. Clones are the same one.
#[derive(Clone)]
pub struct Worker(Arc<Inner>);

struct Inner {
    number: usize,
    handle: Handle,
    thread: ThreadId,
    /// Fires when its thread has ended.
    over: CancellationToken,
    forwards: AtomicUsize,
    sessions: AtomicUsize,
    /// The last question whether it still works, until it is answered.
    ping: Mutex<Option<JoinHandle<()>>>,
}

/// What a worker carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// A link, or a session at a door.
    Session,
    /// A forward that runs.
    Forward,
}

/// Something that a worker carries, until this is dropped.
#[derive(Debug)]
pub struct Carried {
    worker: Worker,
    load: Load,
}

/// The threads of a crew, to be ended. Dropped, it lets them end by themselves.
#[derive(Debug)]
#[must_use = "whoever starts threads waits for their end"]
pub struct Threads {
    threads: Vec<Thread>,
    stop: CancellationToken,
    _stop: DropGuard,
}

#[derive(Debug)]
struct Thread {
    name: String,
    handle: thread::JoinHandle<()>,
    /// Closed when the thread is about to end.
    ended: oneshot::Receiver<()>,
}

/// Why a crew could not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum CrewError {
    /// The caller's runtime has several threads itself.
    #[error("a crew needs a caller with a thread of its own")]
    Caller,
    /// A thread.
    #[error("could not start the thread {name}")]
    Start {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It panicked.
    #[error("the thread {name} panicked")]
    Panicked {
        /// Which.
        name: String,
    },
    /// It did not end in time.
    #[error("the thread {name} has not ended within {} s", .limit.as_secs())]
    Stuck {
        /// Which.
        name: String,
        /// What it was given.
        limit: Duration,
    },
}

impl Crew {
    /// Starts a crew of `size` workers, at least one, the first of which is the caller's current-thread runtime. The threads
    /// of the others are called `name-1` and so on. When they end, calls that block on them are waited for as long as
    /// `blocking`, and then left behind.
    ///
    /// # Errors
    /// If a thread cannot be started, or the caller's runtime is of another kind.
    pub fn start(name: &str, size: usize, blocking: Duration) -> Result<(Self, Threads), CrewError> {
        let here = Handle::current();
        if here.runtime_flavor() != RuntimeFlavor::CurrentThread {
            return Err(CrewError::Caller);
        }
        let stop = CancellationToken::new();
        let broken = CancellationToken::new();
        let mut workers = vec![Worker::new(0, here, thread::current().id(), CancellationToken::new())];
        let mut threads = Threads { threads: Vec::new(), _stop: stop.clone().drop_guard(), stop: stop.clone() };
        for number in 1..size {
            let name = format!("{name}-{number}");
            let failed = |source| CrewError::Start { name: name.clone(), source };
            let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
            let handle = runtime.handle().clone();
            let over = CancellationToken::new();
            let (ending, ended) = oneshot::channel::<()>();
            let work = {
                let (stop, broken, over) = (stop.clone(), broken.clone(), over.clone());
                move || {
                    // Dropped last, and also by a panic.
                    let _ending = ending;
                    let _over = Over { over, stop: stop.clone(), broken };
                    runtime.block_on(stop.cancelled());
                    runtime.shutdown_timeout(blocking);
                }
            };
            let handle_of_thread = thread::Builder::new().name(name.clone()).spawn(work).map_err(failed)?;
            workers.push(Worker::new(number, handle, handle_of_thread.thread().id(), over));
            threads.threads.push(Thread { name, handle: handle_of_thread, ended });
        }
        Ok((
            Self(Arc::new(Shared { workers, broken, pings: Tasks::new(), asking: tokio::sync::Mutex::default() })),
            threads,
        ))
    }

    /// All workers; the first is the thread that started the crew.
    #[must_use]
    pub fn workers(&self) -> &[Worker] {
        &self.0.workers
    }

    /// Who carries the fewest forwards, and of those the fewest sessions: what is idle goes where it is in nobody's way.
    /// Where all are equal, not the first, which has the rest of the program to run.
    #[must_use]
    pub fn lightest(&self) -> &Worker {
        let at_work = self.0.workers.iter().rev().filter(|worker| !worker.0.over.is_cancelled());
        // The first is the caller, who is at work.
        at_work.min_by_key(|worker| worker.load()).unwrap_or(&self.0.workers[0])
    }

    /// Fires when a worker has ended that nobody asked to; [`Threads::end`] then says which.
    #[must_use]
    pub fn broken(&self) -> &CancellationToken {
        &self.0.broken
    }

    /// Whether every worker takes up a task within `limit`. One that has not answered yet is not asked again, and one that was
    /// asked to end not any more. Several callers take turns.
    pub async fn answers(&self, limit: Duration) -> bool {
        if self.0.broken.is_cancelled() {
            return false;
        }
        let deadline = Instant::now() + limit;
        let Ok(_turn) = timeout_at(deadline, self.0.asking.lock()).await else { return false };
        let mut asked = Vec::new();
        for worker in self.0.workers.iter().filter(|worker| !worker.0.over.is_cancelled()) {
            let last = worker.0.ping.lock().unwrap_or_else(PoisonError::into_inner).take();
            asked.push((worker, last.unwrap_or_else(|| worker.spawn(&self.0.pings, std::future::ready(())))));
        }
        let mut all = true;
        for (worker, mut ping) in asked {
            match timeout_at(deadline, &mut ping).await {
                Ok(answer) => all &= answer.is_ok(),
                Err(_) => {
                    all = false;
                    *worker.0.ping.lock().unwrap_or_else(PoisonError::into_inner) = Some(ping);
                }
            }
        }
        all
    }
}

impl Worker {
    fn new(number: usize, handle: Handle, thread: ThreadId, over: CancellationToken) -> Self {
        Self(Arc::new(Inner {
            number,
            handle,
            thread,
            over,
            forwards: AtomicUsize::new(0),
            sessions: AtomicUsize::new(0),
            ping: Mutex::new(None),
        }))
    }

    /// Its place in the crew, from 0.
    #[must_use]
    pub fn number(&self) -> usize {
        self.0.number
    }

    /// Runs `future` on this worker as a task of the group `tasks`. What it spawns itself is spawned here, too.
    #[expect(clippy::disallowed_methods, reason = "as in the parent: the tracker makes sure that the task is awaited")]
    pub fn spawn<F>(&self, tasks: &Tasks, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        tasks.tracker.spawn_on(future, &self.0.handle)
    }

    /// Whether the caller runs on this worker.
    #[must_use]
    pub fn is_here(&self) -> bool {
        self.0.thread == thread::current().id()
    }

    /// Counts something that it carries from now on.
    #[must_use]
    pub fn carry(&self, load: Load) -> Carried {
        self.count(load).fetch_add(1, Ordering::Relaxed);
        Carried { worker: self.clone(), load }
    }

    /// How many forwards it carries, and how many sessions.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        (self.0.forwards.load(Ordering::Relaxed), self.0.sessions.load(Ordering::Relaxed))
    }

    fn count(&self, load: Load) -> &AtomicUsize {
        match load {
            Load::Session => &self.0.sessions,
            Load::Forward => &self.0.forwards,
        }
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Worker({})", self.0.number)
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.worker.count(self.load).fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tells that a worker's thread has ended, whatever it ended of.
struct Over {
    over: CancellationToken,
    stop: CancellationToken,
    broken: CancellationToken,
}

impl Drop for Over {
    fn drop(&mut self) {
        self.over.cancel();
        if !self.stop.is_cancelled() {
            self.broken.cancel();
        }
    }
}

impl Threads {
    /// Ends the threads and waits for them, for so long at most. Tasks that still run on them are dropped.
    ///
    /// # Errors
    /// If one panicked, now or before, or does not end in time; it is then left behind.
    pub async fn end(mut self, limit: Duration) -> Result<(), CrewError> {
        self.stop.cancel();
        let deadline = Instant::now() + limit;
        let mut result = Ok(());
        for Thread { name, handle, ended } in self.threads.drain(..) {
            // Closed is all that it ever becomes.
            let ended = timeout_at(deadline, ended).await.map(drop);
            let this = match ended {
                Ok(()) => handle.join().map_err(|_| CrewError::Panicked { name }),
                Err(_) => Err(CrewError::Stuck { name, limit }),
            };
            result = result.and(this);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[tokio::test(flavor = "multi_thread")]
    async fn a_caller_with_several_threads_is_refused() {
        assert!(matches!(Crew::start("test", 2, SOON), Err(CrewError::Caller)));
    }

    #[tokio::test]
    async fn what_is_spawned_on_a_worker_stays_there() {
        let (crew, threads) = Crew::start("test", 3, SOON).expect("a crew");
        let tasks = Tasks::new();
        let here = thread::current().id();
        for worker in crew.workers() {
            let (inner, tasks_of_it) = (worker.clone(), tasks.clone());
            let ids = worker.spawn(&tasks, async move {
                assert!(inner.is_here());
                tokio::time::sleep(Duration::from_millis(1)).await;
                let child = tasks_of_it.spawn(async move { thread::current().id() });
                (thread::current().id(), child.await.expect("ran"))
            });
            let (outer, child) = ids.await.expect("ran");
            assert_eq!(outer, child);
            assert_eq!(outer == here, worker.number() == 0);
            assert_eq!(worker.is_here(), worker.number() == 0);
        }
        assert!(tasks.drain(SOON).await);
        threads.end(SOON).await.expect("ended");
    }

    #[tokio::test]
    async fn live_forwards_weigh_more_than_any_number_of_idle_sessions() {
        let (crew, threads) = Crew::start("test", 2, SOON).expect("a crew");
        assert_eq!(crew.lightest().number(), 1, "the caller has other work");
        let busy = crew.lightest().clone();
        let forward = busy.carry(Load::Forward);
        let mut idle = Vec::new();
        for _ in 0..1_000 {
            let worker = crew.lightest();
            assert_eq!(worker.number(), 0, "they keep away from the forward");
            idle.push(worker.carry(Load::Session));
        }
        drop(forward);
        assert_eq!((busy.load(), crew.lightest().number()), ((0, 0), 1));
        idle.clear();
        assert_eq!(crew.workers()[0].load(), (0, 0));
        threads.end(SOON).await.expect("ended");
    }

    #[tokio::test]
    async fn one_that_is_busy_does_not_answer_and_does_once_it_is_not() {
        let (crew, threads) = Crew::start("test", 3, SOON).expect("a crew");
        assert!(crew.answers(SOON).await);
        let (release, busy) = mpsc::sync_channel::<()>(0);
        let tasks = Tasks::new();
        crew.workers()[1].spawn(&tasks, async move { busy.recv().is_err() });
        for _ in 0..3 {
            assert!(!crew.answers(Duration::from_millis(10)).await);
        }
        assert!(crew.0.pings.len() <= 1, "it is asked once");
        drop(release);
        assert!(crew.answers(SOON).await);
        threads.end(SOON).await.expect("ended");
    }

    #[tokio::test]
    async fn one_that_is_stuck_is_named_and_left_behind() {
        let (crew, threads) = Crew::start("test", 3, SOON).expect("a crew");
        let (release, stuck) = mpsc::sync_channel::<()>(0);
        let tasks = Tasks::new();
        let (begun, began) = oneshot::channel();
        crew.workers()[2].spawn(&tasks, async move {
            begun.send(()).expect("waited for");
            stuck.recv().expect_err("released");
        });
        began.await.expect("begun");
        let error = threads.end(Duration::from_millis(50)).await.expect_err("stuck");
        assert!(matches!(&error, CrewError::Stuck { name, .. } if name == "test-2"), "{error:?}");
        drop(release);
    }

    #[tokio::test]
    async fn what_still_runs_at_the_end_is_dropped_and_nothing_runs_after_it() {
        let (crew, threads) = Crew::start("test", 2, SOON).expect("a crew");
        let tasks = Tasks::new();
        let worker = crew.workers()[1].clone();
        let left = worker.spawn(&tasks, std::future::pending::<()>());
        threads.end(SOON).await.expect("ended");
        assert!(left.await.expect_err("dropped").is_cancelled());
        assert!(worker.spawn(&tasks, async {}).await.expect_err("nobody runs it").is_cancelled());
        assert_eq!(crew.lightest().number(), 0, "it gets no more work");
        assert!(crew.answers(SOON).await, "nobody asks it any more");
        assert!(!crew.broken().is_cancelled(), "it was asked to end");
        assert!(tasks.drain(SOON).await);
    }

    #[tokio::test]
    async fn a_panic_of_a_task_is_its_own_and_one_of_the_thread_has_a_name() {
        let (crew, threads) = Crew::start("test", 2, SOON).expect("a crew");
        let tasks = Tasks::new();
        let panicked = crew.workers()[1].spawn(&tasks, async { panic!("of a task") }).await;
        assert!(panicked.expect_err("panicked").is_panic());
        assert!(crew.answers(SOON).await && !crew.broken().is_cancelled());
        threads.end(SOON).await.expect("ended");

        let broken = CancellationToken::new();
        let stop = CancellationToken::new();
        let over = Over { over: CancellationToken::new(), stop: stop.clone(), broken: broken.clone() };
        let (ending, ended) = oneshot::channel();
        let handle = thread::Builder::new()
            .name("test-9".to_owned())
            .spawn(move || {
                let _ending = ending;
                let _over = over;
                panic!("of a thread");
            })
            .expect("started");
        broken.cancelled().await;
        let thread = Thread { name: "test-9".to_owned(), handle, ended };
        let threads = Threads { threads: vec![thread], _stop: stop.clone().drop_guard(), stop };
        let error = threads.end(SOON).await.expect_err("panicked");
        assert!(matches!(&error, CrewError::Panicked { name } if name == "test-9"), "{error:?}");
    }
}

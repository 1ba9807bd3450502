//! What a network sink has from files that others renew while it runs: a token, certificates, authorities.
//!
//! Promised: they are read again before each new connection, so that what was renewed is used without a restart. What cannot
//! be read, or does not fit together, changes nothing: what was read in order before stays in use, and that is said once for
//! each thing that is wrong, not at every attempt. The files are read on a thread that may block, one at a time, and each reading
//! is waited for once, no longer than [`SINK_FILES`]: while it hangs, connections are made with what was read before.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::limits::SINK_FILES;
use crate::task::Tasks;

/// Something that can be read again.
pub(super) trait Renew: Clone + Send + 'static {
    /// What it is called in the log.
    const WHAT: &'static str;

    /// Reads it again.
    ///
    /// # Errors
    /// If the files are not in order: what is wrong, without any secret.
    fn again(&self) -> Result<Self, String>;
}

/// What was read last, and how to read it again.
pub(super) struct Renewed<T> {
    state: Mutex<State<T>>,
    tasks: Tasks,
}

struct State<T> {
    last: T,
    /// What is being read.
    reading: Option<JoinHandle<Result<T, String>>>,
    /// What was told to be wrong.
    told: Option<String>,
}

impl<T: Renew> Renewed<T> {
    /// Begins with what the configuration has read.
    pub(super) fn new(first: T, tasks: Tasks) -> Self {
        Self { state: Mutex::new(State { last: first, reading: None, told: None }), tasks }
    }

    /// What was read last.
    pub(super) fn last(&self) -> T {
        self.state().last.clone()
    }

    /// Reads it again, and returns what counts then.
    pub(super) async fn read(&self) -> T {
        let mut reading = {
            let mut state = self.state();
            match state.reading.take() {
                Some(reading) if !reading.is_finished() => {
                    // Whoever began it has waited for it, and has told so.
                    state.reading = Some(reading);
                    return state.last.clone();
                }
                Some(reading) => reading,
                None => {
                    let last = state.last.clone();
                    self.tasks.spawn_blocking(move || last.again())
                }
            }
        };
        let read = match timeout(SINK_FILES, &mut reading).await {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => {
                // It goes on, and is heard of when it is over.
                self.state().reading = Some(reading);
                Err(format!("not read within {} s", SINK_FILES.as_secs()))
            }
        };
        let mut state = self.state();
        match read {
            Ok(value) => {
                if state.told.take().is_some() {
                    tracing::info!("the {} of an audit collector can be read again", T::WHAT);
                }
                state.last = value;
            }
            Err(fault) => {
                if state.told.as_ref() != Some(&fault) {
                    tracing::warn!(fault, "the {} of an audit collector stays as it was; mend the files", T::WHAT);
                    state.told = Some(fault);
                }
            }
        }
        state.last.clone()
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> fmt::Debug for Renewed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Renewed")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, Barrier};

    use super::*;

    /// Reads what a test has put there.
    #[derive(Clone)]
    struct Number(u32, Arc<Mutex<Result<u32, String>>>);

    impl Renew for Number {
        const WHAT: &'static str = "number";

        fn again(&self) -> Result<Self, String> {
            let there = self.1.lock().expect("what is there").clone();
            there.map(|number| Self(number, Arc::clone(&self.1)))
        }
    }

    #[tokio::test]
    async fn what_is_not_in_order_leaves_the_last_good_one_in_use_and_is_told_once() {
        let there = Arc::new(Mutex::new(Ok(2)));
        let renewed = Renewed::new(Number(1, Arc::clone(&there)), Tasks::new());
        assert_eq!(renewed.last().0, 1);
        assert_eq!(renewed.read().await.0, 2);
        *there.lock().expect("the place") = Err("torn".to_owned());
        for _ in 0..3 {
            assert_eq!(renewed.read().await.0, 2);
            assert_eq!(renewed.state().told.as_deref(), Some("torn"));
        }
        *there.lock().expect("the place") = Ok(3);
        assert_eq!((renewed.read().await.0, renewed.last().0), (3, 3));
        assert_eq!(renewed.state().told, None);
    }

    /// Waits for the test, as on a file system that hangs.
    #[derive(Clone)]
    struct Stuck(Arc<Barrier>, Arc<AtomicU32>);

    impl Renew for Stuck {
        const WHAT: &'static str = "stuck thing";

        fn again(&self) -> Result<Self, String> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.wait();
            Ok(self.clone())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_system_that_hangs_is_asked_once_and_not_waited_for() {
        let (barrier, asked) = (Arc::new(Barrier::new(2)), Arc::new(AtomicU32::new(0)));
        let renewed = Renewed::new(Stuck(Arc::clone(&barrier), Arc::clone(&asked)), Tasks::new());
        // The clock does not run ahead by itself while a thread is busy.
        let ahead = async {
            tokio::time::advance(SINK_FILES + SINK_FILES).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            _ = renewed.read() => {}
            () = ahead => {}
        }
        for _ in 0..3 {
            assert!(renewed.state().told.is_some());
            tokio::select! {
                biased;
                _ = renewed.read() => {}
                () = std::future::ready(()) => panic!("it is waited for again"),
            }
        }
        barrier.wait();
        while renewed.state().told.is_some() {
            let _ = renewed.read().await;
            tokio::task::yield_now().await;
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1, "readings at once");
    }
}

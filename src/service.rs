//! What the programs that run for long have in common: how one begins, how it tells of a configuration that was read again, and
//! how it ends.
//!
//! Promised: when [`Service::start`] returns, the trail can be written; it is closed last, after all tasks and threads, so that
//! every ending is on record; the end waits for each of them no longer than [`limits::STOP_GRACE`]. When the trail has failed for
//! too long, all that runs is cut ([`Unrecorded`]), and what begins afterwards is not.
//!
//! What the drain waits for is for [`crate::drain`] to say; here it is recorded.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::audit::{self, Event, Kind, Side, Sinks, Trail};
use crate::chain::Chain;
use crate::drain::{Drain, Outcome, Stop};
use crate::limits;
use crate::reload::Changes;
use crate::systemd::Supervisor;
use crate::task::{Crew, CrewError, Tasks, Threads};
use crate::tunnel::outlet::Outlet;

/// Why a program could not run, whichever it is.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Threads.
    #[error("the {side}'s threads failed")]
    Crew {
        /// Whose.
        side: &'static str,
        /// Why.
        #[source]
        source: CrewError,
    },
    /// No trail.
    #[error("could not start the audit trail")]
    Trail(#[source] audit::StartError),
    /// The trail could not be completed.
    #[error("could not close the audit trail")]
    Close(#[source] audit::TrailError),
    /// Tasks were left.
    #[error("tasks were still running {} s after the stop", limits::STOP_GRACE.as_secs())]
    Drain,
}

/// A program's threads, tasks and trail.
#[derive(Debug)]
pub(crate) struct Service {
    side: Side,
    /// Its threads.
    pub(crate) crew: Crew,
    /// What it does beside what belongs to the trail.
    pub(crate) tasks: Tasks,
    /// What it writes.
    pub(crate) trail: Trail,
    /// Fires when that fails for too long.
    pub(crate) unrecorded: Unrecorded,
    threads: Threads,
    writer: Tasks,
    watch: JoinHandle<()>,
}

impl Service {
    /// Begins, with so many threads that work.
    ///
    /// # Errors
    /// If the threads or the trail cannot be started.
    pub(crate) async fn start(
        side: Side,
        sinks: Sinks,
        workers: usize,
        supervisor: &Supervisor,
    ) -> Result<Self, ServiceError> {
        let (crew, threads) = Crew::start("caponier", workers, limits::RESOLVE_TIMEOUT)
            .map_err(|source| ServiceError::Crew { side: side.as_str(), source })?;
        supervisor.watch(crew.clone());
        let (tasks, writer) = (Tasks::new(), Tasks::new());
        let trail = Trail::start(sinks, side, Arc::new(Outlet), &writer).await.map_err(ServiceError::Trail)?;
        let unrecorded = Unrecorded::default();
        let watch = tasks.spawn(audit::watch_failure(trail.failed(), tasks.stopping().clone(), {
            let unrecorded = unrecorded.clone();
            move || {
                error!(
                    "the audit trail has failed for {} s: ending all that runs",
                    limits::TRAIL_FAILURE_GRACE.as_secs()
                );
                unrecorded.cut();
            }
        }));
        Ok(Self { side, crew, tasks, trail, unrecorded, threads, writer, watch })
    }

    /// Waits until the program is to end.
    pub(crate) async fn until_stop(&self, stop: &Stop) {
        tokio::select! {
            () = stop.drain().cancelled() => {}
            () = self.crew.broken().cancelled() => error!("stopping, because a thread has ended that nobody asked to"),
        }
    }

    /// From the beginning of the drain to the end of the last forward, and what is recorded of it. `links` is how many there
    /// are, where there are any at all.
    pub(crate) async fn drain(
        &self,
        drain: &Drain,
        grace: Duration,
        links: Option<usize>,
        stop: &Stop,
        supervisor: &Supervisor,
    ) -> Outcome {
        let forwards = drain.forwards();
        info!(forwards, links, "stopping: nothing new is taken on, and what runs may go on for {} s", grace.as_secs());
        let note = async |event: Event| {
            if let Err(error) = self.trail.note(event).await {
                error!(error = %Chain(&error), "could not record the drain");
            }
        };
        let mut began = Event::new(Kind::DrainBegan).count("forwards", forwards);
        if let Some(links) = links {
            began = began.count("links", links);
        }
        note(began.detail(format!("what runs is cut after {} s", grace.as_secs()))).await;
        let stopped = match self.side {
            Side::Gateway => "gateway_stopped",
            Side::Agent => "agent_stopped",
            Side::Proxy => "proxy_stopped",
        };
        let outcome = drain.finish(stop.now(), stopped, supervisor).await;
        // Whatever is left by now, for whatever reason, has no more time.
        drain.cut_all(stopped);
        info!(ended = outcome.ended, cut = outcome.cut, "drained");
        note(Event::new(Kind::DrainEnded).count("ended", outcome.ended).count("cut", outcome.cut)).await;
        outcome
    }

    /// Stops what is left and waits for it, lets go of what the tasks have `shared`, and closes the trail.
    ///
    /// # Errors
    /// If tasks or threads do not end, or the trail cannot be completed.
    pub(crate) async fn end<T>(self, shared: Arc<T>) -> Result<(), ServiceError> {
        let drained = self.tasks.drain(limits::STOP_GRACE).await;
        // Before the trail is closed: what is still left on a thread ends with it, and the endings are recorded.
        let ended = self.threads.end(limits::STOP_GRACE).await;
        self.watch.abort();
        drop(shared);
        self.trail.close().await.map_err(ServiceError::Close)?;
        self.writer.drain(limits::STOP_GRACE).await;
        ended.map_err(|source| ServiceError::Crew { side: self.side.as_str(), source })?;
        if drained { Ok(()) } else { Err(ServiceError::Drain) }
    }
}

/// Fires for all that runs when the trail has failed for too long. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Unrecorded(Arc<Mutex<CancellationToken>>);

impl Unrecorded {
    /// Fires when what begins now has to end because of that.
    pub(crate) fn token(&self) -> CancellationToken {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn cut(&self) {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).cancel();
    }
}

/// A configuration that is in force since it was read again.
pub(crate) struct Taken {
    /// What is another in it.
    pub(crate) changes: Changes,
    /// What would be, and needs a restart.
    pub(crate) restart: Vec<&'static str>,
}

/// Tells, and has on record, what came of a configuration that was read again: it is in force, or why nothing of it is.
pub(crate) async fn tell_of_reload(trail: &Trail, taken: Result<Taken, String>) {
    let event = match taken {
        Ok(Taken { changes, restart }) => {
            info!("the configuration was read again and is in force: {changes}");
            if !restart.is_empty() {
                warn!("these settings have changed too, and need a restart: {}", restart.join(", "));
            }
            Event::new(Kind::ConfigReloaded).detail(&changes).changes(&changes)
        }
        Err(why) => {
            error!("the configuration cannot be taken over, so that nothing that changed in it holds: {why}");
            Event::new(Kind::ConfigRejected).detail(why)
        }
    };
    if let Err(error) = trail.note(event).await {
        error!(error = %Chain(&error), "could not record a change of the configuration");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_is_cut_and_what_begins_afterwards_is_not() {
        let unrecorded = Unrecorded::default();
        let (one, other) = (unrecorded.token(), unrecorded.clone().token());
        unrecorded.cut();
        assert!(one.is_cancelled() && other.is_cancelled());
        let later = unrecorded.token();
        assert!(!later.is_cancelled());
        unrecorded.cut();
        assert!(later.is_cancelled());
    }
}

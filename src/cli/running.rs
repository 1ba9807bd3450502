//! What the commands that run for long have in common: one thread, its log, the signals that end it, and the service manager
//! that watches it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{Level, debug};

use crate::config::{self, Loaded, Log, LogFormat};
use crate::document::Faults;
use crate::drain::Stop;
use crate::limits;
use crate::reload::{Fresh, Phase, Reloads, Watched};
use crate::systemd::Supervisor;
use crate::task::Tasks;
use crate::telemetry;
use crate::telemetry::otlp::Exporter;

/// Raises the number of descriptors this process may have to what the system allows it: each forward takes one or two, and
/// the usual default is for programs that have a few.
pub(super) fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        debug!(%error, "the number of descriptors stays as it is");
    }
}

/// Starts the log, and taking traces, as a configuration says.
pub(super) fn start_log(log: &Log) {
    let format = match log.format {
        LogFormat::Text => telemetry::Format::Text,
        LogFormat::Json => telemetry::Format::Json,
    };
    telemetry::start(format, Level::INFO);
    let exporter = log.traces.clone().and_then(Exporter::to);
    *EXPORTER.lock().unwrap_or_else(PoisonError::into_inner) = exporter;
}

/// What exports traces, until there is a runtime for it.
static EXPORTER: Mutex<Option<Exporter>> = Mutex::new(None);

/// Reads a configuration for the first time, and notes from which files.
///
/// # Errors
/// With every fault of it.
pub(super) fn load(file: &Path) -> Result<(Loaded, Watched), Faults> {
    Watched::read(file, || noting(file))
}

fn noting(file: &Path) -> (Result<Loaded, Faults>, Vec<PathBuf>) {
    let (loaded, files) = config::load_noting_files(file);
    (loaded, files.into_iter().map(|(_, file)| file).collect())
}

/// From now on SIGHUP asks for the configuration to be read again, and so does a change of the files that it was read from.
/// `pick` takes out of it what the program runs with, and `what` is what that is called; `log` is how the log is written,
/// which stays as it is. The `supervisor` hears of each reload.
///
/// # Errors
/// If the signal cannot be had.
pub(super) fn reloads<C: Send + 'static>(
    (file, watched): (PathBuf, Watched),
    what: &'static str,
    log: Log,
    supervisor: &Supervisor,
    pick: fn(Loaded) -> Option<(Box<C>, Log)>,
) -> anyhow::Result<Reloads<C>> {
    let load = {
        let file = file.clone();
        move || {
            let (loaded, files) = noting(&file);
            let fresh = loaded.and_then(|loaded| {
                let (config, newest) = pick(loaded)
                    .ok_or_else(|| Faults::file(&file, format!("this is no longer {what}'s configuration")))?;
                let restart = log.differences(&newest);
                Ok(Fresh { config: *config, restart })
            });
            (fresh, files)
        }
    };
    let supervisor = supervisor.clone();
    let reloads = Reloads::following(file, watched, load).context("could not listen for SIGHUP")?;
    Ok(reloads.telling(move |phase| match phase {
        Phase::Reloading => supervisor.reloading(),
        Phase::Settled => supervisor.reloaded(),
    }))
}

/// Has glibc keep freed memory for the next allocation, up to twice [`limits::MEMORY_KEPT`], and not give it back to the
/// system at once: it takes the largest mapping that was ever freed as the measure. With its default, the buffers of a busy
/// forward were given back and faulted in again all the time, which cost a tenth to a quarter of the processor time per byte.
/// Other allocators have their own ways, and lose nothing by this.
fn keep_memory() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(limits::MEMORY_KEPT)));
}

/// Runs `work` on this thread until it ends; SIGTERM and SIGINT fire the token that it gets, and a second one ends the
/// program at once.
///
/// # Errors
/// If the runtime cannot be had, or `work` fails.
pub(super) fn block_on<T>(work: impl AsyncFnOnce(CancellationToken) -> anyhow::Result<T>) -> anyhow::Result<T> {
    run(async || {
        let stop = CancellationToken::new();
        watch_signals({
            let stop = stop.clone();
            move || {
                let first = !stop.is_cancelled();
                stop.cancel();
                first
            }
        })?;
        work(stop).await
    })
}

/// Runs a service on this thread until it ends. The first SIGTERM or SIGINT asks it to drain, the second to end now, and the
/// third ends the program. Meanwhile the service manager is told that its threads still get to everything.
///
/// # Errors
/// If the runtime cannot be had, or `work` fails.
pub(super) fn serve<T>(work: impl AsyncFnOnce(Stop, Supervisor) -> anyhow::Result<T>) -> anyhow::Result<T> {
    run(async || {
        let (stop, supervisor) = (Stop::new(), Supervisor::from_environment());
        let signals = watch_signals({
            let stop = stop.clone();
            move || stop.advance()
        })?;
        if let Some(interval) = supervisor.watchdog() {
            let supervisor = supervisor.clone();
            signals.spawn(async move {
                loop {
                    let alive = supervisor.alive(interval / 2).await;
                    // Asked again before the time is up: a thread that was busy for a moment is not stuck.
                    tokio::time::sleep(if alive { interval } else { interval / 4 }).await;
                }
            });
        }
        let telemetry = Tasks::new();
        telemetry.spawn(telemetry::tell(telemetry.stopping().clone()));
        let exporter = EXPORTER.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(exporter) = exporter {
            telemetry.spawn(exporter.run(telemetry.stopping().clone()));
        }
        let worked = work(stop, supervisor).await;
        // After all that is traced. A collector that does not answer is not waited for any longer than at other times.
        telemetry.drain(limits::TRACE_TIMEOUT).await;
        worked
    })
}

/// Calls `next` for each SIGTERM and SIGINT, and ends the program at once where that returns that there is nothing more to
/// ask for. The task ends with the runtime: a signal may come at any time before.
fn watch_signals(next: impl Fn() -> bool + Send + 'static) -> anyhow::Result<Tasks> {
    let tasks = Tasks::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tasks.spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if !next() {
                std::process::exit(1);
            }
        }
    });
    Ok(tasks)
}

/// Runs `work` on this thread until it ends. Signals are its own affair.
///
/// # Errors
/// If the runtime cannot be had, or `work` fails.
pub(super) fn run<T>(work: impl AsyncFnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    keep_memory();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(work());
    // A name lookup that the system has not answered must not hold the program up.
    runtime.shutdown_timeout(limits::RESOLVE_TIMEOUT);
    result
}

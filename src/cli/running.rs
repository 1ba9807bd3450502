//! What the commands that run for long have in common: one thread, its log, and the signals that end it.

use std::path::PathBuf;

use anyhow::Context;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{Level, debug};

use crate::config::{self, Loaded, Log, LogFormat};
use crate::document::Faults;
use crate::limits;
use crate::reload::{Fresh, Reloads};
use crate::task::Tasks;
use crate::telemetry;

/// Raises the number of descriptors this process may have to what the system allows it: each forward takes one or two, and
/// the usual default is for programs that have a few.
pub(super) fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        debug!(%error, "the number of descriptors stays as it is");
    }
}

/// Starts the log as a configuration says.
pub(super) fn start_log(log: Log) {
    let format = match log.format {
        LogFormat::Text => telemetry::Format::Text,
        LogFormat::Json => telemetry::Format::Json,
    };
    telemetry::start(format, Level::INFO);
}

/// From now on SIGHUP asks for the configuration to be read again. `pick` takes out of it what the program runs with, and
/// `what` is what that is called; `log` is how the log is written, which stays as it is.
///
/// # Errors
/// If the signal cannot be had.
pub(super) fn reloads<C: Send + 'static>(
    file: PathBuf,
    what: &'static str,
    log: Log,
    pick: fn(Loaded) -> Option<(Box<C>, Log)>,
) -> anyhow::Result<Reloads<C>> {
    let load = move || {
        let (config, newest) = pick(config::load(&file)?)
            .ok_or_else(|| Faults::file(&file, format!("this is no longer {what}'s configuration")))?;
        let restart = if newest == log { Vec::new() } else { vec!["log"] };
        Ok(Fresh { config: *config, restart })
    };
    Reloads::on_hangup(load).context("could not listen for SIGHUP")
}

/// Runs `work` on this thread until it ends; SIGTERM and SIGINT fire the token that it gets, and a second one ends the
/// program at once.
///
/// # Errors
/// If the runtime cannot be had, or `work` fails.
pub(super) fn block_on<T>(work: impl AsyncFnOnce(CancellationToken) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let tasks = Tasks::new();
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let signals = tasks.spawn({
            let stop = stop.clone();
            async move {
                for _ in 0..2 {
                    tokio::select! {
                        _ = terminate.recv() => {}
                        _ = interrupt.recv() => {}
                    }
                    if stop.is_cancelled() {
                        std::process::exit(1);
                    }
                    stop.cancel();
                }
            }
        });
        let result = work(stop).await;
        signals.abort();
        result
    });
    // A name lookup that the system has not answered must not hold the program up.
    runtime.shutdown_timeout(limits::RESOLVE_TIMEOUT);
    result
}

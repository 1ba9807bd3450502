//! The health file: for probes that can run a command and reach no port.
//!
//! Promised: it is replaced whole, by a rename, at each change within [`limits::HEALTH_LOOK`] and otherwise every
//! [`limits::HEALTH_FILE_EVERY`], and taken away when the program ends. So one that is older than [`limits::HEALTH_FILE_STALE`]
//! is that of a program which was killed or hangs.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{Report, State};
use crate::limits;
use crate::task::{Crew, Tasks};

/// Whether the file can be written where it is to be.
///
/// # Errors
/// If it cannot.
pub(super) fn probe(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "there is a folder at this path"));
    }
    let staging = staging(path);
    write_new(&staging, b"")?;
    fs::remove_file(&staging)
}

/// Keeps the file until the stop.
pub(super) async fn keep<S: State>(state: Arc<S>, crew: Crew, path: PathBuf, tasks: Tasks) {
    let stop = tasks.stopping().clone();
    let mut written: Option<(Report, Instant)> = None;
    let mut failing = false;
    loop {
        let report = tokio::select! {
            report = Report::of(&*state, &crew) => report,
            () = stop.cancelled() => break,
        };
        let due = written.as_ref().is_none_or(|(last, at)| {
            report.differs(last) || at.elapsed() + limits::HEALTH_LOOK > limits::HEALTH_FILE_EVERY
        });
        if due {
            let (path, text) = (path.clone(), serde_json::to_vec_pretty(&report).unwrap_or_default());
            // A file system that hangs must not hold up anything else.
            let done = tasks.spawn_blocking(move || replace(&path, &text));
            let done = tokio::select! {
                done = done => done.unwrap_or_else(|error| Err(io::Error::other(error))),
                () = stop.cancelled() => break,
            };
            match (&done, failing) {
                (Err(error), false) => warn!(%error, "the health file cannot be written, and grows stale"),
                (Ok(()), true) => info!("the health file can be written again"),
                _ => {}
            }
            failing = done.is_err();
            written = done.is_ok().then(|| (report, Instant::now()));
        }
        tokio::select! {
            () = tokio::time::sleep(limits::HEALTH_LOOK) => {}
            () = stop.cancelled() => break,
        }
    }
    if let Err(error) = fs::remove_file(&path) {
        debug!(%error, "could not remove the health file");
    }
}

fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let staging = staging(path);
    let placed = write_new(&staging, text).and_then(|()| fs::rename(&staging, path));
    if placed.is_err() {
        drop(fs::remove_file(&staging));
    }
    placed
}

/// Beside the file, so that a rename can put it there; a probe never sees a part of it.
fn staging(path: &Path) -> PathBuf {
    let mut staging = path.as_os_str().to_owned();
    staging.push(format!(".{}", std::process::id()));
    PathBuf::from(staging)
}

fn write_new(path: &Path, text: &[u8]) -> io::Result<()> {
    // What a process of the same id left; in a container every process has that id.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text)?;
    file.write_all(b"\n")
}

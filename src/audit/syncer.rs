//! Synchronising a file beside whoever writes it: a disk can take a second for that, and nothing opens meanwhile where it is waited
//! for.
//!
//! Promised: how it went is told to whoever asks next, and is never lost. Each has a thread, of which its owner has one at a
//! time; one that hangs is left behind.

use std::io;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use super::sink::Syncing;

/// A synchronisation that is under way.
#[derive(Debug)]
pub(super) struct UnderWay {
    since: Instant,
    outcome: Receiver<io::Result<()>>,
}

impl UnderWay {
    /// Begins.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub(super) fn begin(syncing: Syncing) -> io::Result<Self> {
        let (sender, outcome) = sync_channel(1);
        std::thread::Builder::new().name("trail-sync".to_owned()).spawn(move || {
            // Nobody hears it where the file was given up.
            let _ = sender.send(syncing());
        })?;
        Ok(Self { since: Instant::now(), outcome })
    }

    /// How it went, if it is over.
    pub(super) fn outcome(&self) -> Option<io::Result<()>> {
        match self.outcome.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(ended())),
        }
    }

    /// How long it has lasted.
    pub(super) fn lasts(&self) -> Duration {
        self.since.elapsed()
    }

    /// As if it had begun so long ago as well.
    #[cfg(test)]
    pub(super) fn begun_before(&mut self, ago: Duration) {
        self.since = self.since.checked_sub(ago).expect("a machine that has been up for seconds");
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it failed.
    pub(super) fn wait(self) -> io::Result<()> {
        self.outcome.recv().unwrap_or_else(|_| Err(ended()))
    }
}

fn ended() -> io::Error {
    io::Error::other("the thread that synchronises the file has ended")
}

//! Traces of forwards, on their way to whoever exports them: one for each forward, told when it has ended.
//!
//! Promised: telling neither waits nor fails; where nobody exports, it costs the look whether somebody does. What is told are
//! words of ours, ids that we draw, and names that the operator has given to organisations and agents: no principal, target or
//! address.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::limits::{TRACE_QUEUE, WAYS_OUT};
use crate::metrics;

/// When a forward was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// As the clock had it.
    pub wall: SystemTime,
    at: Instant,
}

impl Default for Asked {
    /// Now.
    fn default() -> Self {
        Self { wall: SystemTime::now(), at: Instant::now() }
    }
}

impl Asked {
    /// How long after that `moment` is.
    #[must_use]
    pub fn until(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.at)
    }
}

/// A forward that has ended.
#[derive(Debug, Clone)]
pub struct Forward {
    /// `gateway`, `agent` or `proxy`.
    pub side: &'static str,
    /// This side's id of the forward.
    pub forward: String,
    /// The gateway's, where this is another side.
    pub peer_forward: Option<String>,
    /// The organisation.
    pub organisation: Option<String>,
    /// The agent.
    pub agent: Option<String>,
    /// Which kind of door was used.
    pub door: Option<&'static str>,
    /// `denied`, `failed`, `ended` or `abandoned`.
    pub outcome: &'static str,
    /// Why, in a word of ours.
    pub reason: Cow<'static, str>,
    /// When it was asked for, as the clock had it.
    pub asked: SystemTime,
    /// How long after that it was decided about.
    pub decided: Duration,
    /// How long after that bytes could flow, if they could.
    pub opened: Option<Duration>,
    /// How long after that it ended.
    pub ended: Duration,
}

static EXPORT: OnceLock<mpsc::Sender<Forward>> = OnceLock::new();

/// From now on what is told comes out here. Only the first call has a say: there is one exporter.
#[must_use]
pub fn export() -> Option<mpsc::Receiver<Forward>> {
    let (sender, receiver) = mpsc::channel(TRACE_QUEUE);
    EXPORT.set(sender).ok().map(|()| receiver)
}

/// Notes the addresses that the collector has, for whoever keeps forwards away from it. Earlier ones stay as long as there is
/// room: it may move back.
pub fn reached(addresses: &[SocketAddr]) {
    let mut held = COLLECTOR.lock().unwrap_or_else(PoisonError::into_inner);
    held.retain(|known| !addresses.contains(known));
    held.extend(addresses);
    let over = held.len().saturating_sub(WAYS_OUT);
    held.drain(..over);
}

/// The addresses that the collector has had, the latest last.
#[must_use]
pub fn collector() -> Vec<SocketAddr> {
    COLLECTOR.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

static COLLECTOR: Mutex<Vec<SocketAddr>> = Mutex::new(Vec::new());

/// Tells of a forward, if somebody exports. `forward` is not called otherwise.
pub fn tell(forward: impl FnOnce() -> Forward) {
    if let Some(export) = EXPORT.get()
        && export.try_send(forward()).is_err()
    {
        metrics::TRACES.of(["dropped"]).inc();
    }
}

//! The budget of those who have not said who they are.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::limits::{STRANGER_PERIOD, STRANGER_RECORDS};

/// What unauthenticated peers may still cause in this period, and what they have caused beyond it.
#[derive(Debug, Default)]
pub(super) struct Strangers {
    since: Option<Instant>,
    written: u32,
    pub(super) counts: BTreeMap<&'static str, u64>,
}

impl Strangers {
    /// Whether one more record is within the budget.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        // While there are counts to be written, the writer ends the period.
        let over = self.since.is_none_or(|since| now.saturating_duration_since(since) >= STRANGER_PERIOD);
        if over && self.counts.is_empty() {
            self.since = Some(now);
            self.written = 0;
        }
        let within = self.written < STRANGER_RECORDS;
        self.written = self.written.saturating_add(1);
        within
    }

    pub(super) fn count(&mut self, reason: &'static str, number: u64) {
        *self.counts.entry(reason).or_default() += number;
    }

    /// What to write as a sum, if the period is over or `at_once`; begins the next period.
    pub(super) fn due(&mut self, now: Instant, at_once: bool) -> Option<(BTreeMap<&'static str, u64>, Duration)> {
        let lasted = self.since.map_or(STRANGER_PERIOD, |since| now.saturating_duration_since(since));
        if self.counts.is_empty() || !(at_once || lasted >= STRANGER_PERIOD) {
            return None;
        }
        self.since = Some(now);
        self.written = 0;
        Some((std::mem::take(&mut self.counts), lasted))
    }
}

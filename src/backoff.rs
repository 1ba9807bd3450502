//! Waiting between attempts: exponential growth, a cap, and full jitter.
//!
//! Full jitter (a uniform draw between nothing and the current ceiling) is what keeps a thousand agents from returning
//! in step after a gateway restart. The module draws no randomness of its own: the caller passes a number in, so that
//! the schedule can be tested as a table.

use std::time::Duration;

/// The state of one series of attempts.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// A series whose first ceiling is `first` and which never waits longer than `cap`.
    #[must_use]
    pub fn new(first: Duration, cap: Duration) -> Self {
        Self { first, cap, failures: 0 }
    }

    /// The highest wait the next failure can cause.
    #[must_use]
    pub fn ceiling(&self) -> Duration {
        self.first.saturating_mul(1_u32.checked_shl(self.failures.min(31)).unwrap_or(u32::MAX)).min(self.cap)
    }

    /// Counts one failure and returns how long to wait. `random` is any uniformly drawn number.
    pub fn fail(&mut self, random: u32) -> Duration {
        let ceiling = self.ceiling();
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(f64::from(random) / f64::from(u32::MAX))
    }

    /// An attempt has proved good: the next failure starts from the beginning.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_the_cap_and_stays_there() {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(4));
        let waits: Vec<_> = (0..6).map(|_| backoff.fail(u32::MAX).as_millis()).collect();
        assert_eq!(waits, [500, 1000, 2000, 4000, 4000, 4000]);
    }

    #[test]
    fn jitter_spans_the_whole_range() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(1));
        assert_eq!(backoff.fail(0), Duration::ZERO);
        assert_eq!(backoff.fail(u32::MAX), Duration::from_secs(1));
    }

    #[test]
    fn never_overflows() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        for _ in 0..10_000 {
            assert!(backoff.fail(u32::MAX) <= Duration::from_secs(60));
        }
    }

    #[test]
    fn reset_starts_again() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        backoff.fail(1);
        backoff.fail(1);
        backoff.reset();
        assert_eq!(backoff.ceiling(), Duration::from_secs(1));
    }
}

//! How often somebody may do something: so many times a second on average, and more at once after a pause.
//!
//! Promised: in any stretch of time, each key is admitted at most `per_second` times the stretch and what [`Rate::burst`]
//! allows at once; a clock that goes backwards admits nobody more. A key whose allowance is whole again is forgotten, so
//! that the map holds those that came lately and no others. No I/O, no waiting, and the caller tells the time.
//!
//! This is the generic cell rate algorithm: all that is kept of a key is the moment at which its allowance is whole again.
//! A rate may therefore change from one question to the next.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// How often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// On average. Nothing at all is once a second, since a limit that admits nobody is no rate.
    pub per_second: u32,
    /// At once: what comes together in so much time.
    pub burst: Duration,
}

/// Who came lately.
#[derive(Debug, Clone)]
pub struct Rates<K> {
    /// When the allowance of each is whole again.
    whole_at: HashMap<K, Instant>,
    /// The latest time that was told.
    now: Option<Instant>,
    /// Looked through once it holds so many.
    full: usize,
}

/// So few are not looked through: an empty map takes as much room.
const FEW: usize = 64;

impl Rate {
    /// What one costs, rounded up so that the rate is never exceeded.
    fn cost(self) -> Duration {
        Duration::from_nanos(1_000_000_000_u64.div_ceil(u64::from(self.per_second.max(1))))
    }

    /// How far ahead of the clock an allowance may be used up: at least one is always admitted.
    fn allowance(self) -> Duration {
        self.burst.max(self.cost())
    }
}

impl<K> Default for Rates<K> {
    fn default() -> Self {
        Self { whole_at: HashMap::new(), now: None, full: FEW }
    }
}

impl<K: Hash + Eq> Rates<K> {
    /// Whether `key` may now; nothing is counted.
    #[must_use]
    pub fn admits(&self, key: &K, rate: Rate, now: Instant) -> bool {
        let now = self.now.map_or(now, |latest| latest.max(now));
        let whole_at = self.whole_at.get(key).map_or(now, |whole_at| now.max(*whole_at));
        whole_at + rate.cost() <= now + rate.allowance()
    }

    /// Counts one that was admitted.
    pub fn count(&mut self, key: K, rate: Rate, now: Instant) {
        let now = self.now.map_or(now, |latest| latest.max(now));
        self.now = Some(now);
        if self.whole_at.len() >= self.full {
            self.whole_at.retain(|_, whole_at| *whole_at > now);
            self.full = (self.whole_at.len() * 2).max(FEW);
            self.whole_at.shrink_to(self.full);
        }
        let whole_at = self.whole_at.entry(key).or_insert(now);
        *whole_at = now.max(*whole_at) + rate.cost();
    }

    /// Admits and counts one, or does neither.
    #[must_use]
    pub fn take(&mut self, key: K, rate: Rate, now: Instant) -> bool {
        let admitted = self.admits(&key, rate, now);
        if admitted {
            self.count(key, rate, now);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    /// Some moment, with room before it.
    static NOON: LazyLock<Instant> = LazyLock::new(|| Instant::now() + Duration::from_secs(1_000_000));

    fn rate(per_second: u32, burst_ms: u64) -> Rate {
        Rate { per_second, burst: Duration::from_millis(burst_ms) }
    }

    fn at(ms: u64) -> Instant {
        *NOON + Duration::from_millis(ms)
    }

    #[test]
    fn so_many_at_once_and_so_many_a_second() {
        for (per_second, burst_ms, moments, admitted) in [
            // All that the burst allows, then one whenever its time has come.
            (1, 3_000, &[0, 0, 0, 0, 999, 1_000, 1_001, 2_000][..], &[1, 1, 1, 0, 0, 1, 0, 1][..]),
            // After a pause the burst is whole, and no more than whole.
            (2, 1_000, &[0, 0, 0, 60_000, 60_000, 60_000], &[1, 1, 0, 1, 1, 0]),
            // A burst shorter than one still admits one.
            (1, 0, &[0, 0, 500, 1_000], &[1, 0, 0, 1]),
            (0, 0, &[0, 500, 1_000], &[1, 0, 1]),
            // The clock goes back: it stands still meanwhile, and nobody gains or is kept out for longer.
            (1, 1_000, &[5_000, 0, 4_000, 5_999, 6_000, 1_000, 7_000], &[1, 0, 0, 0, 1, 0, 1]),
            // Thousands.
            (10_000, 0, &[0, 0, 1, 1], &[1, 0, 1, 0]),
        ] {
            let mut rates = Rates::default();
            let rate = rate(per_second, burst_ms);
            let seen: Vec<_> = moments.iter().map(|ms| u8::from(rates.take((), rate, at(*ms)))).collect();
            assert_eq!(seen, admitted, "{per_second} a second, {burst_ms} ms at once, at {moments:?}");
        }
    }

    #[test]
    fn each_has_an_allowance_of_its_own() {
        let mut rates = Rates::default();
        assert!(rates.take("a", rate(1, 0), at(0)));
        assert!(!rates.take("a", rate(1, 0), at(0)));
        assert!(rates.take("b", rate(1, 0), at(0)));
    }

    #[test]
    fn a_rate_may_change_on_the_way() {
        let mut rates = Rates::default();
        assert!(rates.take((), rate(1, 0), at(0)));
        assert!(rates.admits(&(), rate(1, 2_000), at(0)), "a longer burst holds at once");
        assert!(!rates.admits(&(), rate(100, 0), at(900)), "what was used is used");
        assert!(rates.admits(&(), rate(100, 0), at(1_000)));
    }

    #[test]
    fn whoever_came_long_ago_is_forgotten() {
        let mut rates = Rates::default();
        for key in 0..100_000_u64 {
            // A hundred a second, each whole again after a second.
            assert!(rates.take(key, rate(1, 0), at(key * 10)));
            assert!(rates.whole_at.len() <= 200 + FEW, "{} are held", rates.whole_at.len());
        }
        assert!(rates.whole_at.capacity() < 2_000, "{}", rates.whole_at.capacity());
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_and_the_burst(
            per_second in 1..5_000_u32,
            burst_ms in 0..3_000_u64,
            steps in prop::collection::vec((-500..1_500_i64, 1..40_u32), 1..60),
        ) {
            let rate = rate(per_second, burst_ms);
            let mut rates = Rates::default();
            let (mut now, mut latest, mut admitted) = (0_i64, 0, Vec::new());
            for (step, times) in steps {
                now = (now + step).max(0);
                latest = latest.max(now);
                for _ in 0..times {
                    if rates.take((), rate, at(now.unsigned_abs())) {
                        admitted.push(latest);
                    }
                }
            }
            // Over every stretch from one admission to a later one, by a clock that stands still where it would go back.
            let at_once = (f64::from(per_second) * burst_ms as f64 / 1_000.0).max(1.0);
            for first in 0..admitted.len() {
                for last in first..admitted.len() {
                    let stretch = (admitted[last] - admitted[first]) as f64 / 1_000.0;
                    let count = (last - first + 1) as f64;
                    prop_assert!(count <= at_once + f64::from(per_second) * stretch + 1e-6, "{count} in {stretch} s");
                }
            }
        }

        #[test]
        fn whoever_keeps_to_the_rate_is_admitted(per_second in 1..5_000_u32, burst_ms in 0..3_000_u64, times in 1..300_u32) {
            let rate = rate(per_second, burst_ms);
            let mut rates = Rates::default();
            for time in 0..times {
                prop_assert!(rates.take((), rate, *NOON + rate.cost() * time));
            }
        }
    }
}

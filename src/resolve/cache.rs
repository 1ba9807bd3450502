//! Answers that may be used again for a while.
//!
//! Promised: nothing is found after its time, nor what was never to be kept; there are never more entries than there is room
//! for, and what makes room is what would have gone first. No I/O, no waiting, and no clock of its own.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Cache<K, V> {
    entries: HashMap<K, (V, Instant)>,
    room: usize,
}

impl<K: Eq + Hash + Clone, V: Clone> Cache<K, V> {
    pub(super) fn new(room: usize) -> Self {
        Self { entries: HashMap::new(), room }
    }

    /// What was put there for `key`, if it is still good at `now`.
    pub(super) fn find(&self, key: &K, now: Instant) -> Option<V> {
        let (value, until) = self.entries.get(key)?;
        (now < *until).then(|| value.clone())
    }

    /// Keeps `value` for so long; not at all, if that is no time.
    pub(super) fn keep(&mut self, key: K, value: V, life: Duration, now: Instant) {
        // What was known before is not true any more either way.
        self.entries.remove(&key);
        let Some(until) = now.checked_add(life).filter(|_| !life.is_zero()) else { return };
        if self.entries.len() >= self.room {
            self.entries.retain(|_, (_, until)| now < *until);
        }
        if self.entries.len() >= self.room {
            let first = self.entries.iter().min_by_key(|(_, (_, until))| *until).map(|(key, _)| key.clone());
            first.and_then(|first| self.entries.remove(&first));
        }
        if self.entries.len() < self.room {
            self.entries.insert(key, (value, until));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_lives_for_no_time_is_never_found_and_takes_away_what_was_there() {
        let (mut cache, now) = (Cache::new(4), Instant::now());
        cache.keep("db", 1, Duration::from_secs(60), now);
        assert_eq!(cache.find(&"db", now), Some(1));
        cache.keep("db", 2, Duration::ZERO, now);
        assert_eq!(cache.find(&"db", now), None);
        assert!(cache.entries.is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Against a model that forgets nothing: whatever is found is the newest value, within its life; and a cache that
        /// is never full finds all of these.
        #[test]
        fn nothing_is_found_after_its_time_and_the_room_is_never_exceeded(
            room in 0..8_usize,
            steps in prop::collection::vec((0..12_u8, 0..5_u64, 0..3_u64, any::<bool>()), 0..200),
        ) {
            let mut cache = Cache::new(room);
            let mut model: HashMap<u8, (usize, Instant)> = HashMap::new();
            let mut now = Instant::now();
            for (at, (key, life, pause, keeps)) in steps.into_iter().enumerate() {
                now += Duration::from_secs(pause);
                if keeps {
                    cache.keep(key, at, Duration::from_secs(life), now);
                    model.insert(key, (at, now + Duration::from_secs(life)));
                }
                prop_assert!(cache.entries.len() <= room);
                let alive = model.iter().filter(|(_, (_, until))| now < *until).count();
                for key in 0..12 {
                    let wanted = model.get(&key).filter(|(_, until)| now < *until).map(|(value, _)| *value);
                    match cache.find(&key, now) {
                        Some(found) => prop_assert_eq!(Some(found), wanted),
                        None => prop_assert!(wanted.is_none() || alive > room || model.len() > room),
                    }
                }
            }
        }
    }
}

//! Keeps the log readable when peers do something again and again: each place in the program writes so many lines in so much
//! time, and what is left out is counted and told.
//!
//! Only lines of the levels `info` and `warn` are: an `error` is nobody's doing but ours, and who asked for `debug` means all
//! of it.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::callsite::Identifier;
use tracing::{Event, Level, Metadata, Subscriber, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::limits::{LOG_BURST, LOG_PERIOD};
use crate::metrics;

/// Leaves out what is too much.
#[derive(Debug)]
pub(super) struct Limit;

impl<S: Subscriber> Layer<S> for Limit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if ![Level::INFO, Level::WARN].contains(metadata.level()) {
            return true;
        }
        let admitted = PLACES.lock().unwrap_or_else(PoisonError::into_inner).admit(metadata, Instant::now());
        if !admitted {
            metrics::LOGS_LEFT_OUT.of([if *metadata.level() == Level::WARN { "warn" } else { "info" }]).inc();
        }
        admitted
    }
}

static PLACES: LazyLock<Mutex<Places>> = LazyLock::new(Mutex::default);

/// The places that have written lately: at most as many as there are in the program.
#[derive(Debug, Default)]
struct Places(HashMap<Identifier, Place>);

#[derive(Debug)]
struct Place {
    metadata: &'static Metadata<'static>,
    since: Instant,
    written: u32,
    left_out: u64,
}

impl Places {
    fn admit(&mut self, metadata: &'static Metadata<'static>, now: Instant) -> bool {
        let fresh = || Place { metadata, since: now, written: 0, left_out: 0 };
        let place = self.0.entry(metadata.callsite()).or_insert_with(fresh);
        if now.duration_since(place.since) >= LOG_PERIOD {
            (place.since, place.written) = (now, 0);
        }
        let admitted = place.written < LOG_BURST;
        match admitted {
            true => place.written += 1,
            false => place.left_out += 1,
        }
        admitted
    }

    /// Where something was left out since this was asked last, and how much.
    fn left_out(&mut self) -> Vec<(String, u64)> {
        let told = |place: &mut Place| {
            let count = std::mem::take(&mut place.left_out);
            let metadata = place.metadata;
            let at = format!("{}:{}", metadata.file().unwrap_or_default(), metadata.line().unwrap_or_default());
            (count > 0).then_some((at, count))
        };
        self.0.values_mut().filter_map(told).collect()
    }
}

/// Tells every [`LOG_PERIOD`] what was left out, until the stop.
pub async fn tell(stop: CancellationToken) {
    let period: Duration = LOG_PERIOD;
    while stop.run_until_cancelled(tokio::time::sleep(period)).await.is_some() {
        let left_out = PLACES.lock().unwrap_or_else(PoisonError::into_inner).left_out();
        for (at, count) in left_out {
            warn!(
                at,
                count,
                "lines of one kind came too fast and were left out of the log; the audit trail has what they tell of"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::callsite::Callsite;

    #[test]
    fn each_place_writes_so_many_lines_in_a_period_and_the_rest_is_told() {
        struct Here;
        static HERE: Here = Here;
        static METADATA: Metadata<'static> = tracing::metadata! {
            name: "here", target: "here", level: Level::INFO, fields: &[], callsite: &HERE, kind: tracing::metadata::Kind::EVENT
        };
        impl Callsite for Here {
            fn set_interest(&self, _: tracing::subscriber::Interest) {}
            fn metadata(&self) -> &Metadata<'_> {
                &METADATA
            }
        }
        let (mut places, now) = (Places::default(), Instant::now());
        let admitted = (0..LOG_BURST + 5).filter(|_| places.admit(&METADATA, now)).count();
        assert_eq!(admitted, LOG_BURST as usize);
        let left_out: Vec<_> = places.left_out().into_iter().map(|(_, count)| count).collect();
        assert_eq!(left_out, [5]);
        assert!(places.left_out().is_empty(), "told once");
        assert!(places.admit(&METADATA, now + LOG_PERIOD));
    }
}

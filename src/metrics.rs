//! What a program counts about itself, for whoever watches many of them.
//!
//! Promised: everything counted has a help text, a base unit and a name that says both; counting neither waits nor fails;
//! [`encode`] gives all of it in one piece. A label's value is a word of a fixed set, or a name that the operator has
//! given to something of their own (an agent, a rule, a sink): never a principal, a target, an address or a forward's id.
//! A family holds at most [`METRIC_SERIES_MAX`] series; what comes on top is counted in one whose labels say `other`.
//!
//! The families are global: what is counted is the process. What is cheaper to look up than to count (who is linked, which
//! key ends first) is looked up when somebody asks: see [`refreshed_by`].

mod page;
mod process;

use std::borrow::Cow;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::{MetricType, TypedMetric, family};
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::limits::METRIC_SERIES_MAX;

pub use page::{OPENMETRICS, Page, TEXT, page};

/// Counts what only grows.
pub type Count = Counter;
/// Sums what only grows and has fractions: seconds.
pub type Sum = Counter<f64, AtomicU64>;
/// Says how much there is now.
pub type Level = Gauge;
/// Says how much there is now, with fractions.
pub type Amount = Gauge<f64, AtomicU64>;
/// Says how often something took how long.
pub type Spread = Histogram;

/// Series of one name, told apart by the values of `N` labels.
#[derive(Debug, Clone)]
pub struct Family<M, const N: usize> {
    keys: [&'static str; N],
    series: family::Family<[(&'static str, Cow<'static, str>); N], M>,
    /// How many there are; held while one is added.
    held: Arc<Mutex<usize>>,
}

impl<M: Clone + Default, const N: usize> Family<M, N> {
    fn by(keys: [&'static str; N]) -> Self {
        Self { keys, series: family::Family::default(), held: Arc::default() }
    }

    /// The series with these values, in the order of the family's labels; the one of all others where there are too many.
    #[must_use]
    pub fn of<V: Into<Cow<'static, str>>>(&self, values: [V; N]) -> M {
        let mut keys = self.keys.iter();
        let labels = values.map(|value| (keys.next().copied().unwrap_or_default(), value.into()));
        if let Some(series) = self.series.get(&labels) {
            return series.clone();
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if *held >= METRIC_SERIES_MAX {
            return self.series.get_or_create_owned(&self.keys.map(|key| (key, Cow::Borrowed(OTHER))));
        }
        // Somebody else may have added the same by now; that counts twice, which only makes the bound come sooner.
        *held += 1;
        self.series.get_or_create_owned(&labels)
    }

    /// Forgets one series: what it counted is there no more.
    pub fn forget(&self, values: [impl Into<Cow<'static, str>>; N]) {
        let mut keys = self.keys.iter();
        let labels = values.map(|value| (keys.next().copied().unwrap_or_default(), value.into()));
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if self.series.remove(&labels) {
            *held = held.saturating_sub(1);
        }
    }

    /// Forgets all series: for what is looked up anew each time.
    pub fn clear(&self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        self.series.clear();
        *held = 0;
    }
}

impl<M: Clone + EncodeMetric + TypedMetric, const N: usize> EncodeMetric for Family<M, N> {
    fn encode(&self, encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.series.encode(encoder)
    }

    fn metric_type(&self) -> MetricType {
        self.series.metric_type()
    }

    fn is_empty(&self) -> bool {
        self.series.is_empty()
    }
}

/// One of what a [`Level`] counts, until it is dropped.
#[derive(Debug)]
#[must_use = "it counts for as long as it is held"]
pub struct Held(Level);

impl Held {
    /// One more, until this is dropped.
    pub fn one_of(level: &Level) -> Self {
        level.inc();
        Self(level.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Declares families and enters them into the registry: name, help text, and the unit that the name ends in.
macro_rules! families {
    ($($name:ident: $kind:ty = $make:expr, $called:literal $(in $unit:ident)?, $help:literal;)*) => {
        $(#[doc = $help] pub static $name: LazyLock<$kind> = LazyLock::new(|| $make);)*

        fn enter(registry: &mut Registry) {
            $(enter_one(registry, $called, $help, families!(@unit $($unit)?), LazyLock::force(&$name).clone());)*
        }
    };
    (@unit $unit:ident) => { Some(Unit::$unit) };
    (@unit) => { None };
}

families! {
    BUILD: Family<Level, 1> = Family::by(["version"]), "build_info", "The version that runs; always 1";
    LINKS: Family<Level, 1> = Family::by(["state"]), "links", "Links between this process and others, by whether they take forwards";
    AGENT_LINKS: Family<Level, 2> = Family::by(["organisation", "agent"]), "agent_links", "Links of each registered agent to this gateway that take forwards";
    AGENTS: Family<Level, 1> = Family::by(["state"]), "agents", "Registered agents, by whether one of their links takes forwards here";
    ORGANISATION_LINKS: Family<Level, 1> = Family::by(["organisation"]), "organisation_links", "Links of this agent that take forwards, for each organisation that it serves";
    LINK_UPS: Count = Count::default(), "link_ups", "Links that have come up";
    LINK_DOWNS: Family<Count, 1> = Family::by(["reason"]), "link_downs", "Links that have ended, by why";
    LINK_DIALS: Family<Count, 1> = Family::by(["outcome"]), "link_dials", "Attempts of this agent to link with a gateway, by outcome";
    LINK_RECONNECTS: Family<Count, 1> = Family::by(["reason"]), "link_reconnects", "Times that this agent began to dial anew, by why";
    FORWARDS: Level = Level::default(), "forwards", "Forwards that run, from the record of their opening to the record of their end";
    FORWARDS_ENDED: Family<Count, 2> = Family::by(["outcome", "door"]), "forwards_finished", "Forwards that were asked for and have been recorded as denied, failed, ended or abandoned, by door";
    FORWARD_REASONS: Family<Count, 2> = Family::by(["outcome", "reason"]), "forward_reasons", "The same, by the reason in the trail";
    FORWARD_BYTES: Family<Count, 1> = Family::by(["direction"]), "forward" in Bytes, "Bytes that forwards have carried so far, those that still run included";
    FORWARD_OPEN_SECONDS: Spread = Spread::new(exponential_buckets(0.001, 2.0, 16)), "forward_open" in Seconds, "From the record that a forward opens to bytes that can flow";
    FORWARD_SECONDS: Spread = Spread::new(exponential_buckets(0.1, 4.0, 10)), "forward_duration" in Seconds, "How long forwards were open";
    ATTEMPTS_FAILED: Family<Count, 1> = Family::by(["reason"]), "forward_attempts_failed", "Agents' processes that were asked for a forward and did not open it, by why";
    DENIALS: Family<Count, 2> = Family::by(["reason", "rule"]), "denials", "Forwards that were denied, by reason, and by the rule of this agent's own configuration that denies";
    LOGINS: Count = Count::default(), "logins", "Peers that have proved who they are and were let in, links not included";
    AUTH_FAILURES: Family<Count, 1> = Family::by(["reason"]), "auth_failures", "Connections that were not let in, by reason";
    VIOLATIONS: Count = Count::default(), "peer_violations", "Things that peers asked for and never may";
    SEATS: Level = Level::default(), "seats", "Connections that have not logged in yet";
    HANDSHAKES: Level = Level::default(), "handshakes", "Handshakes in progress";
    CREDIT_STALLS: Count = Count::default(), "credit_stalls", "Times that a forward had bytes to send and no credit to send them with";
    CREDIT_STALLED_SECONDS: Sum = Sum::default(), "credit_stalled" in Seconds, "How long forwards had bytes to send and no credit, summed over all";
    AUDIT_QUEUE: Level = Level::default(), "audit_queue_records", "Places in the trail's queue that are taken, by records or by the endings of forwards that run";
    AUDIT_QUEUE_MAX: Level = Level::default(), "audit_queue_limit_records", "Places in the trail's queue";
    AUDIT_RECORDS: Family<Count, 1> = Family::by(["event"]), "audit_records", "Records that were written to the trail, by event";
    AUDIT_WRITE_SECONDS: Spread = Spread::new(exponential_buckets(0.000_05, 3.0, 12)), "audit_write" in Seconds, "How long the trail's writer took to write what was queued, on all its local sinks";
    AUDIT_FAILING: Level = Level::default(), "audit_failing", "1 while a sink that is required cannot be written, so that nothing opens";
    AUDIT_SINK_LAG: Family<Level, 1> = Family::by(["sink"]), "audit_sink_lag_records", "Records of the trail that a sink has not taken yet";
    AUDIT_SINK_LOST: Family<Count, 1> = Family::by(["sink"]), "audit_sink_lost_records", "Records of the trail that a sink, which is not required, will never get";
    AUDIT_SINK_FAILING: Family<Level, 1> = Family::by(["sink"]), "audit_sink_failing", "1 while a sink does not work";
    AUDIT_SINK_FAILURES: Family<Count, 2> = Family::by(["sink", "reason"]), "audit_sink_failures", "Times that a sink of the trail began to fail, by why";
    CERTIFICATE_EXPIRY: Family<Level, 1> = Family::by(["certificate"]), "certificate_expiry_timestamp" in Seconds, "When the first certificate of a kind ends, in seconds since 1970";
    KEY_EXPIRY: Family<Level, 1> = Family::by(["holder"]), "key_expiry_timestamp" in Seconds, "When the first key of a kind of holder ends, in seconds since 1970";
    REGISTRY_LOADS: Family<Count, 1> = Family::by(["outcome"]), "registry_loads", "Times that the registry was read again, by whether the new state is in force";
    REGISTRY_REJECTED: Family<Level, 0> = Family::by([]), "registry_rejected", "1 while the newest state of the registry has faults, so that an older one is in force";
    CONFIG_LOADS: Family<Count, 1> = Family::by(["outcome"]), "config_loads", "Times that the configuration was read again, by whether it is in force";
    CONFIG_REJECTED: Level = Level::default(), "config_rejected", "1 while the newest configuration has faults, so that an older one is in force";
    DRAINING: Level = Level::default(), "draining", "1 while this process takes on nothing new and waits for what runs";
    LOGS_LEFT_OUT: Family<Count, 1> = Family::by(["level"]), "log_lines_left_out", "Log lines that were left out because too many of their kind came at once";
    TRACES: Family<Count, 1> = Family::by(["outcome"]), "traces", "Traces of forwards, by whether the collector got them";
}

fn enter_one(registry: &mut Registry, name: &'static str, help: &'static str, unit: Option<Unit>, metric: impl Metric) {
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, metric),
        None => registry.register(name, help, metric),
    }
}

static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    let mut registry = Registry::with_prefix("caponier");
    enter(&mut registry);
    registry
});

/// These have no prefix: their names are everybody's.
static PROCESS: LazyLock<Registry> = LazyLock::new(|| {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(process::Process));
    registry
});

/// What is looked up when somebody asks.
static REFRESHED: Mutex<Vec<Weak>> = Mutex::new(Vec::new());

type Look = dyn Fn() + Send + Sync;
type Weak = std::sync::Weak<Look>;

/// Keeps what it was made of being called.
#[must_use = "dropping it ends the looking up"]
#[derive(Clone)]
pub struct Refresh {
    _look: Arc<Look>,
}

impl std::fmt::Debug for Refresh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refresh").finish_non_exhaustive()
    }
}

/// Has `look` called before every [`encode`], for as long as what is returned is held: it sets the levels that nobody
/// counts. It must not wait.
pub fn refreshed_by(look: impl Fn() + Send + Sync + 'static) -> Refresh {
    let look: Arc<Look> = Arc::new(look);
    let mut all = REFRESHED.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|look| look.strong_count() > 0);
    all.push(Arc::downgrade(&look));
    Refresh { _look: look }
}

/// Says which version runs, and begins to count those families at 0 whose first step must not be missed.
pub fn start() {
    BUILD.of([env!("CARGO_PKG_VERSION")]).set(1);
    process::started();
    LazyLock::force(&BYTES_TO_TARGET);
    LazyLock::force(&BYTES_FROM_TARGET);
}

/// Everything that is counted, as OpenMetrics text.
#[must_use]
pub fn encode() -> String {
    // One at a time: looking up clears what it then fills.
    let all = REFRESHED.lock().unwrap_or_else(PoisonError::into_inner);
    for look in all.iter().filter_map(Weak::upgrade) {
        look();
    }
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = text::encode_registry(&mut text, &REGISTRY);
    let _ = text::encode(&mut text, &PROCESS);
    text
}

/// Bytes of forwards toward their targets. Told apart from others once, and not for each piece.
pub static BYTES_TO_TARGET: LazyLock<Count> = LazyLock::new(|| FORWARD_BYTES.of(["to_target"]));

/// Bytes of forwards from their targets.
pub static BYTES_FROM_TARGET: LazyLock<Count> = LazyLock::new(|| FORWARD_BYTES.of(["from_target"]));

/// What has taken so long, as a [`Spread`] or a [`Sum`] takes it.
#[must_use]
pub fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

/// The value of all labels of the series beyond the bound.
pub const OTHER: &str = "other";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_has_so_many_series_and_one_for_the_rest() {
        let family: Family<Count, 2> = Family::by(["a", "b"]);
        for number in 0..METRIC_SERIES_MAX + 10 {
            family.of([number.to_string(), String::new()]).inc();
        }
        assert_eq!(family.of([OTHER, OTHER]).get(), 10);
        assert_eq!(family.of(["0", ""]).inc(), 1, "what has a series keeps it");
    }

    #[test]
    fn what_nobody_counts_is_looked_up_when_somebody_asks() {
        let look = refreshed_by(|| _ = LINKS.of(["tested"]).set(7));
        assert!(encode().contains("\ncaponier_links{state=\"tested\"} 7\n"));
        drop(look);
        LINKS.of(["tested"]).set(8);
        assert!(encode().contains("\ncaponier_links{state=\"tested\"} 8\n"));
    }

    #[test]
    fn what_is_held_is_counted() {
        let level = Level::default();
        let held = [Held::one_of(&level), Held::one_of(&level)];
        assert_eq!(level.get(), 2);
        drop(held);
        assert_eq!(level.get(), 0);
    }

    #[test]
    fn all_families_have_a_help_text_and_a_name_of_their_own() {
        start();
        let text = encode();
        let names: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next()).collect();
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(names.len(), distinct.len(), "{names:?}");
        for name in ["caponier_build_info", "process_open_fds", "process_cpu_seconds", "process_resident_memory_bytes"]
        {
            assert!(names.contains(&name), "{name}: {names:?}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}

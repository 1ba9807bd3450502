//! Health, metrics, traces and logs.

use std::time::Duration;

/// Questions about health and metrics at once at each listener: whoever asks does so once in a few seconds.
pub const HEALTH_CONNECTIONS: usize = 16;

/// The head of a question about health; no client's own is longer than a few hundred bytes, and the library wants no
/// less.
pub const HEALTH_HEAD_MAX: usize = 8 * 1024;

/// How long a question about health may take to be asked: probes send it at once.
pub const HEALTH_HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a thread may take to show that it gets to its work: far more than any piece of work of ours, and less than
/// any supervisor waits before it restarts a program.
pub const HEALTH_PATIENCE: Duration = Duration::from_secs(5);

/// How long an upstream of a proxy may take to show that it is there, where it is asked for the purpose.
pub const HEALTH_PROBE: Duration = Duration::from_secs(10);

/// How long the parts of a program may take to be looked at: all upstreams are asked at once.
pub const HEALTH_ANSWER: Duration = Duration::from_secs(15);

/// A question about health, from its head to the end of the answer.
pub const HEALTH_CONNECTION: Duration = Duration::from_secs(25);

const _: () = assert!(
    HEALTH_CONNECTION.as_secs() >= HEALTH_HEAD_TIMEOUT.as_secs() + HEALTH_ANSWER.as_secs() + HEALTH_PATIENCE.as_secs(),
    "see there"
);

/// One answer about health: a thousand parts.
pub const HEALTH_ANSWER_MAX: usize = 1024 * 1024;

/// How often it is looked whether the health file is still true.
pub const HEALTH_LOOK: Duration = Duration::from_secs(1);

/// How often the health file is written where nothing changes: as often as a probe usually looks.
pub const HEALTH_FILE_EVERY: Duration = Duration::from_secs(10);

/// A health file that is older is nobody's: two were left out, and the third is late.
pub const HEALTH_FILE_STALE: Duration = Duration::from_secs(30);

/// How long an answer about an upstream's health counts, so that nobody who asks for it causes more than a few
/// connections.
pub const HEALTH_KEPT: Duration = Duration::from_secs(10);

/// Series of one metric: an operator's agents, rules and sinks are mostly fewer, and a scraper keeps each for weeks.
/// What comes on top is counted as one.
pub const METRIC_SERIES_MAX: usize = 1_024;

/// Forwards that have ended and whose traces wait for the exporter: as many as end in a second at the highest rate that
/// was measured, and a few hundred kilobytes.
pub const TRACE_QUEUE: usize = 4_096;

/// Forwards whose traces go into one message to the collector: 512 KiB, an eighth of what collectors take.
pub const TRACE_BATCH: usize = 256;

/// How long a trace may wait for others that go with it.
pub const TRACE_PERIOD: Duration = Duration::from_secs(1);

/// How long a collector has for a message; another one waits meanwhile, and those behind it are dropped.
pub const TRACE_TIMEOUT: Duration = Duration::from_secs(5);

/// Lines of the log that one place in the program may write in [`LOG_PERIOD`]: as many as a restart of a gateway with
/// some dozens of agents causes, and no more than anybody reads.
pub const LOG_BURST: u32 = 100;

/// After so long each place may write as many again, and says how many were left out.
pub const LOG_PERIOD: Duration = Duration::from_secs(10);

//! The trail's collectors.

use std::time::Duration;

/// Sinks of one trail besides its first: each is a thread or a task, and a copy of everything.
pub const SINKS_MAX: usize = 16;

/// From the beginning of a connection to a collector to its end: the name, the proxy, TCP and TLS. Longer than each of
/// them may take alone and shorter than all together, since nothing is sent meanwhile.
pub const SINK_CONNECT: Duration = Duration::from_secs(20);

/// How long a collector may take for what was sent to it: one that is busy answers within that, one that stalls is
/// noticed.
pub const SINK_DELIVERY: Duration = Duration::from_secs(15);

/// How long a collector may take to hang up when all is sent.
pub const SINK_GOODBYE: Duration = Duration::from_secs(2);

/// The longest pause after the first failure of a collector: most are gone for as long as a restart takes. Also that
/// between records that it refuses for what they are and the halves of them.
pub const SINK_RETRY_FIRST: Duration = Duration::from_millis(250);

/// The longest pause between two attempts to reach a collector: where it is required, nothing opens meanwhile.
pub const SINK_RETRY_CAP: Duration = Duration::from_secs(5);

/// How long a new connection to a collector waits for its token, and for its certificates, to be read again: a disk
/// takes milliseconds, and what was read before will do. Both together are less than
/// [`TRAIL_PATIENCE`](super::TRAIL_PATIENCE), so that a disk that hangs fails no sink that is required.
pub const SINK_FILES: Duration = Duration::from_secs(2);

/// How often a collector must refuse a record by itself until a sink that is not required goes on without it: what
/// stands before a collector may refuse once what it takes the next time.
pub const SINK_REFUSALS: u32 = 3;

/// How many requests a collector must have taken, after one that was too much for it, until twice as much is tried
/// again: its limit costs one refusal in so many then, and one record that it refused does not keep requests small.
pub const SINK_TAKEN_BEFORE_MORE: u32 = 32;

/// Records that are written to a syslog collector at once.
pub const SYSLOG_RECORDS: usize = 1_024;

/// Bytes of records that are written to a syslog collector at once: a slow one takes that within [`SINK_DELIVERY`].
pub const SYSLOG_PORTION: usize = 256 * 1024;

/// Bytes of records in one request to a collector; what most collectors take at once, and OCSF makes twice as much of
/// it.
pub const HTTPS_BODY: usize = 1 << 20;

/// Records in one request to a collector, unless `batch_records` says otherwise.
pub const HTTPS_RECORDS: usize = 1_000;

/// The most that `batch_records` can be set to: more never fit into [`HTTPS_BODY`].
pub const HTTPS_RECORDS_MAX: usize = 10_000;

/// How long a record waits for others to go with it, unless `batch_ms` says otherwise; where the sink is required they
/// do not wait, since somebody waits for each.
pub const HTTPS_LINGER: Duration = Duration::from_millis(500);

/// The most that `batch_ms` can be set to: within it a crash loses what has not been sent.
pub const HTTPS_LINGER_MAX: Duration = Duration::from_secs(60);

/// What is read of a collector's answer, in bytes: its head counts, and the rest is thrown away.
pub const HTTPS_ANSWER_MAX: usize = 64 * 1024;

/// Headers of a collector's answer.
pub const HTTPS_HEADERS_MAX: usize = 64;

/// The longest that a collector can ask to be left alone.
pub const HTTPS_RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// The pause after an answer that time alone does not mend: a wrong token, a wrong path. Somebody has to look.
pub const HTTPS_REFUSED_PAUSE: Duration = Duration::from_secs(15);

//! Examinations: what the doctor looks at, and for how long.

use std::time::Duration;

use super::ADMIN_CONNECTIONS;

/// How long one stage of an examination may take unless it is said otherwise: longer than any step of a link may, so
/// that the step's own error, which says more, comes first.
pub const EXAMINED_STAGE: Duration = Duration::from_secs(30);

/// The longest time that may be given to a stage: who waits longer wants something else.
pub const EXAMINED_STAGE_MAX: Duration = Duration::from_secs(600);

/// How far two clocks may be apart before it is worth a word: HTTP tells whole seconds, and an answer may take some.
pub const CLOCK_NOTABLE: Duration = Duration::from_secs(10);

/// How many targets one examination dials: an allowlist that spells out more is not one that somebody reads the report
/// of.
pub const EXAMINED_TARGETS: usize = 200;

/// How long a target has to answer: a dial has [`CONNECT_TIMEOUT`](super::CONNECT_TIMEOUT) for each address, and TLS
/// takes a few round trips.
pub const EXAMINED_TARGET: Duration = Duration::from_secs(15);

/// How long a target may take to speak first, as MySQL and SSH do, before it is spoken to.
pub const GREETING_PATIENCE: Duration = Duration::from_millis(500);

/// What is read of a target's greeting: the longest that a MySQL server sends is shorter.
pub const GREETING_MAX: usize = 1024;

/// How often an agent is examined over its link at most: each time it dials all its targets.
pub const EXAMINED_EVERY: Duration = Duration::from_secs(60);

/// How long the gateway waits for what an agent found: it looks at its targets one after another, most answer at once.
pub const EXAMINED_REMOTE: Duration = Duration::from_secs(120);

/// How many findings a report over a link has: a finding is less than 256 bytes, and the report has to fit in a
/// message.
pub const EXAMINED_REPORT: usize = 128;

/// Examinations of agents that a gateway has under way at once: each holds a question at the admin socket for as long
/// as its agent takes, and most of those have to stay free for health and for whoever looks at what goes on.
pub const EXAMINATIONS: usize = 4;

const _: () = assert!(EXAMINATIONS * 2 <= ADMIN_CONNECTIONS, "most are for other questions");

/// How much of a registry the doctor goes through to see how its files' times stand to the clock: far more than any
/// folder has.
pub const REGISTRY_ENTRIES: usize = 100_000;

/// Room on the trail's disk below which it counts as full: a day's last records still fit in, nothing else does.
pub const TRAIL_ROOM_LEAST: u64 = 1024 * 1024;

/// Room on the trail's disk that is worth a word: a busy gateway writes that much in hours.
pub const TRAIL_ROOM: u64 = 1024 * 1024 * 1024;

/// Descriptors below which a gateway runs short under a load that is ordinary: each forward takes up to two.
pub const DESCRIPTORS_LEAST: u64 = 8_192;

/// How long a gateway has to say what time it is: the connection that is to become a session waits meanwhile, and the
/// gateway waits [`LOGIN_GRACE`](super::LOGIN_GRACE) for it.
pub const CLOCK_PATIENCE: Duration = Duration::from_secs(6);

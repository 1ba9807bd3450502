//! The process itself: its threads, its end, and the admin socket.

use std::time::Duration;

/// Threads that links and sessions are spread over: as many as there are processors, but more would only share one
/// listener and one trail.
pub const WORKERS_MAX: usize = 32;

/// Threads of a gateway at least, also on one processor: handshakes then need not share the one that carries forwards.
pub const GATEWAY_WORKERS: usize = 2;

/// How long forwards that run may go on after the signal to end, where the configuration does not say: long enough for
/// most queries, within what an operator waits for.
pub const DRAIN: Duration = Duration::from_secs(300);

/// The longest that a configuration may ask for.
pub const DRAIN_MAX: Duration = Duration::from_secs(24 * 3600);

/// How much sooner than it had said a peer's drain may be over: it says whole seconds, and its word takes its time.
pub const DRAIN_TOLERANCE: Duration = Duration::from_secs(2);

/// How often a drain says how it goes.
pub const DRAIN_PROGRESS: Duration = Duration::from_secs(10);

/// Listeners that a process can be started with: more than addresses in any configuration.
pub const INHERITED_MAX: usize = 1_024;

/// How long a stop waits for tasks to end.
pub const STOP_GRACE: Duration = Duration::from_secs(10);

/// One question on the admin socket.
pub const ADMIN_LINE_MAX: usize = 64 * 1024;

/// One answer on the admin socket: a hundred thousand links.
pub const ADMIN_ANSWER_MAX: usize = 64 * 1024 * 1024;

/// Registry changes that wait to be recorded.
pub const RELOAD_QUEUE: usize = 64;

/// Forwards that are looked at in one go while nobody can add one: a hundred microseconds or so.
pub const FORWARDS_AT_ONCE: usize = 1_000;

/// What happened last at a gateway, as `caponier top` shows it: more than fit on a screen.
pub const HAPPENED: usize = 64;

/// The text of one such event, in characters: a wide terminal.
pub const HAPPENED_TEXT: usize = 256;

/// Links, and agents without one, in one answer for `caponier top`: more than anybody reads, and less than a megabyte.
pub const STATUS_ROWS: usize = 2_000;

/// Forwards of one agent in one such answer.
pub const STATUS_FORWARDS: usize = 500;

const _: () = assert!(STATUS_FORWARDS < FORWARDS_AT_ONCE, "it is asked for one more");

/// Questions on the admin socket under way at once.
pub const ADMIN_CONNECTIONS: usize = 16;

/// One question on the admin socket, from connect to answer; longer than it takes to find that a thread is stuck.
pub const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);

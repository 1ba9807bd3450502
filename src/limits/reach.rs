//! Names to addresses, and connections to them.

use std::time::Duration;

use super::OPEN_TIMEOUT;

/// One TCP connect by the agent to a target address.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that has been silent for so long is probed, so that a target whose host vanished gives its forward
/// back; seldom enough to cost nothing, and often enough for firewalls that forget silent connections.
pub const PROBE_AFTER: Duration = Duration::from_secs(60);

/// Between two such probes.
pub const PROBE_INTERVAL: Duration = Duration::from_secs(20);

/// Probes without an answer after which the connection is lost.
pub const PROBES: u32 = 3;

/// One name resolution, unless `timeout_s` says otherwise.
pub const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest that `timeout_s` can be set to: half of [`OPEN_TIMEOUT`](super::OPEN_TIMEOUT) is left for the
/// connection.
pub const RESOLVE_TIMEOUT_MAX: Duration = Duration::from_secs(10);

const _: () = assert!(RESOLVE_TIMEOUT_MAX.as_secs() * 2 <= OPEN_TIMEOUT.as_secs(), "see RESOLVE_TIMEOUT_MAX");

/// Names that are being looked up at once, each on a thread, also those whose asker has given up: more than the hosts
/// that rules usually have, and half of the threads that the runtime has for such work.
pub const LOOKUPS_MAX: usize = 256;

/// Addresses of one name that are looked at; more than any honest name has.
pub const ADDRESSES_PER_NAME: usize = 32;

/// DNS servers that a configuration names; a third one is seldom asked already.
pub const RESOLVERS_MAX: usize = 8;

/// How long a DNS server may be silent before the next one is asked beside it: longer than honest ones take, and so
/// short that all of a few can be asked within [`RESOLVE_TIMEOUT`].
pub const SERVER_PATIENCE: Duration = Duration::from_secs(1);

/// How long the answer for one address family waits for the other's. RFC 8305 asks for 50 ms; here a family that comes
/// late is missing where a rule may permit it alone, and a server that answers one type never is rare.
pub const FAMILY_PATIENCE: Duration = Duration::from_millis(500);

/// Questions that configured servers are asked at once: two for each of [`LOOKUPS_MAX`] names. Each holds a few
/// sockets.
pub const QUERIES_MAX: usize = 2 * LOOKUPS_MAX;

/// Answers of configured servers that are kept: more names than rules usually have, with both families, in a few
/// megabytes. Where a rule's wildcards let principals ask for any number of names, those that would expire first make
/// room.
pub const ANSWERS_KEPT: usize = 4_096;

/// How long such an answer is used again at most, unless `cache_ttl_max_s` says otherwise: an owner who moves a host
/// need not wait for a day because a zone says so.
pub const ANSWER_LIFE: Duration = Duration::from_secs(300);

/// The most that `cache_ttl_max_s` can be set to.
pub const ANSWER_LIFE_MAX: Duration = Duration::from_secs(24 * 3600);

/// How long it is remembered at most that a name does not exist or has no address: whoever has just made it tries again
/// soon.
pub const ABSENCE_KEPT: Duration = Duration::from_secs(30);

/// Aliases (CNAME) that are followed from one name: more than honest chains have.
pub const ALIASES_MAX: usize = 16;

/// SRV records of one service that are looked at; more than any honest one has.
pub const SERVICE_RECORDS: usize = 32;

/// Hosts of one service that are looked up for one forward, the first in its order: each costs two questions.
pub const SERVICE_TARGETS: usize = 8;

/// Between the beginnings of two connects to addresses of one target: RFC 8305 §5 recommends it.
pub const CONNECT_STAGGER: Duration = Duration::from_millis(250);

/// Connects of one forward that are under way at once: if that many addresses are silent, those behind them are tried
/// within [`OPEN_TIMEOUT`](super::OPEN_TIMEOUT) too, and a flood of opens costs few descriptors each.
pub const CONNECTS_AT_ONCE: usize = 8;

/// The system's hosts file; block lists of a hundred thousand names still fit.
pub const HOSTS_MAX: u64 = 8 * 1024 * 1024;

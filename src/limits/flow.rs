//! Bytes that are under way: what is read, held, credited and sent, and when a session is cut for them.

use std::time::Duration;

use super::CHANNELS_PER_SESSION;

/// What one read from a socket, and one channel message between our own ends, carries at most: an SSH packet's worth,
/// which the SSH library wants below 64 KiB. What each packet costs by itself halves against the 32 KiB that every peer
/// must take.
pub const CHUNK: usize = 63 * 1024;

/// What is read at once from a session's socket where its next packet's length is asked for: many small packets, and
/// the beginning of a large one.
pub const READ_AHEAD: usize = 16 * 1024;

/// A session that asks for so much gets it from the socket without a copy in between.
pub const READ_PAST: usize = 8 * 1024;

/// Messages of a channel that are written to a socket with one call.
pub const BATCH: usize = 16;

/// Buffers of [`CHUNK`] bytes that a thread keeps for the next read: as many as are under way on a few busy forwards.
pub const POOLED: usize = 32;

/// Freed memory that is kept for the next allocation, at half: what a few busy forwards have under way.
pub const MEMORY_KEPT: usize = 4 * 1024 * 1024;

/// SSH channel window toward stock peers, in bytes.
pub const WINDOW: u32 = 2 * 1024 * 1024;

/// SSH channel window between our own ends, in bytes: far above [`CREDIT_MAX`], which is the real bound. The SSH
/// library grants it anew when half of it has come, so that half of it must exceed what can be under way.
pub const WINDOW_OURS: u32 = 64 * 1024 * 1024;

/// The most credit of one channel: 400 MB/s over a round trip of 50 ms. A sender never uses more, whatever it is
/// offered.
pub const CREDIT_MAX: usize = 24 * 1024 * 1024;

/// Credit that a channel may grow to however short the way is: as much as is under way between two busy threads.
pub const CREDIT_NEAR: usize = 1024 * 1024;

/// Credit per second of round trip that a channel may grow to; a way that is shorter than its queues must not be filled
/// up just because it is fast. A core moves this much at most.
pub const CREDIT_RATE: usize = 1024 * 1024 * 1024;

/// A sender without credit gets so many times what it had: from the beginning to [`CREDIT_MAX`] in six round trips.
pub const CREDIT_GROWTH: usize = 4;

/// Owed credit that is given back at once, however large the window is.
pub const CREDIT_OWED: usize = 1024 * 1024;

/// The credit of all channels of a session together: what its peer can make this end hold. Channels begin with so
/// little that [`CHANNELS_PER_LINK`](super::CHANNELS_PER_LINK) of them fit, and grow only while as much again stays
/// free: a few that have grown and whose sinks then stall leave enough for the others.
pub const CREDIT_PER_SESSION: usize = 64 * 1024 * 1024;

/// Above this, channels with much credit give some of it back, so that others can have it.
pub const CREDIT_SCARCE: usize = CREDIT_PER_SESSION / 4 * 3;

/// Bytes that a socket has not taken, above which nothing more is given to its session.
pub const UNSENT_HIGH: usize = 256 * 1024;

/// Bytes that a socket has not taken, at which its session is cut: more than all queues of a session together.
pub const UNSENT_MAX: usize = 32 * 1024 * 1024;

/// Messages, each of a writer of its own, that are given to a session at once when its socket has room: together far
/// below [`UNSENT_MAX`], and as many as a session at the SSH door has channels, because there a writer may hold its
/// place while it waits for a stock peer's window, and must not keep others from theirs.
pub const FEEDERS: usize = CHANNELS_PER_SESSION;

/// Bytes of a stock peer's channels that wait for their sinks, above which its session stops reading.
pub const HELD_HIGH: usize = 4 * 1024 * 1024;

/// See [`HELD_HIGH`]: below this it reads on. Not far below, so that a session whose target is slow reads often enough
/// to hear that its peer is alive.
pub const HELD_LOW: usize = HELD_HIGH - 128 * 1024;

/// Bytes that may wait while a session reads on because a writer needs window. Whatever a peer had under way when it
/// granted that window lies below it (the kernels' buffers on both ends, and its own); if it has not come by then, it
/// will not.
pub const HELD_STARVING: usize = 32 * 1024 * 1024;

/// Bytes that may wait at all; a session has stopped reading long before.
pub const HELD_MAX: usize = 64 * 1024 * 1024;

/// Bytes of one forward, each way, that are on their way from one thread to another: so many that both threads work at
/// the same time and seldom wake each other, so few that they stay in the processor's cache. A channel's credit, or its
/// session's own bound, holds for them as well.
pub const BRIDGE_BYTES: usize = 256 * 1024;

/// Messages of one forward, each way, that are on their way from one thread to another: as many as [`BRIDGE_BYTES`]
/// have room for where each is small.
pub const BRIDGE_MESSAGES: usize = 1_024;

/// How long a target may take nothing while what waits for it keeps a stock client's whole session from being read, or
/// once its principal is gone: what was sent before is then still delivered, but nobody waits for it. Longer than a
/// link may be silent ([`LINK_KEEPALIVE`](super::LINK_KEEPALIVE)), shorter than a kernel keeps the last bytes of a
/// closed socket for a peer that takes nothing.
pub const STALL: Duration = Duration::from_secs(60);

/// How long it may take in all to deliver what a peer had sent before it went away, and how long a principal may take
/// nothing of what its target had: it may pause in the middle of an answer, but not for ever.
pub const DELIVERY: Duration = Duration::from_secs(600);

/// Messages of a channel that its session hands over before the channel's reader gets to run. It always takes them all,
/// so that more would only mean more memory between the two, beyond what a processor's cache holds.
pub const CHANNEL_QUEUE: usize = 16;

/// Messages that wait to be sent on a session: so many go into one write, and the session keeps a buffer for as much.
pub const SESSION_QUEUE: usize = 16;

/// Rekey limits lie above OpenSSH's own, so that a client begins the exchange; AES-GCM's counter allows far more.
pub const REKEY_BYTES: usize = 64 << 30;

/// See [`REKEY_BYTES`].
pub const REKEY_TIME: Duration = Duration::from_secs(24 * 3600);

/// Packets that do nothing, such as ignored messages, unknown requests and windows that nobody needs, which a session
/// may send at once and be spared for. So many are some hundredths of a second of a core; an honest peer sends a few in
/// a minute.
pub const IDLE_PACKETS: usize = 32_768;

/// The same for each second: a fraction of a hundredth of a core.
pub const IDLE_PACKETS_PER_SECOND: usize = 2_000;

/// Bytes of a packet that count as one more: reading them costs as much.
pub const BYTES_PER_PACKET: usize = 4 * 1024;

/// Bytes on a control channel that count as a packet: to read so many messages from them takes as long.
pub const BYTES_PER_IDLE_PACKET: usize = 64;

/// Packets about a channel that come and go with an open, on either side: the open or its answer, the ends and the
/// close.
pub const PACKETS_PER_OPEN: usize = 4;

/// Bytes sent for which a peer may answer with a packet of its own, as with window or credit: stock peers do so for
/// 64 KiB or more.
pub const BYTES_PER_ANSWER: usize = 8 * 1024;

/// What a peer may ask for on one session that it never may, before the session is cut: an honest one asks for nothing.
pub const VIOLATIONS_PER_SESSION: usize = 64;

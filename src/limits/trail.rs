//! The audit trail: its queue, its files, its heads and anchors, reading and verifying it.

use std::time::Duration;

/// Audit records that wait for their sink. Each live forward also holds one place, reserved for its ending.
pub const TRAIL_QUEUE: usize = 65_536;

/// Audit records that go into one write, so that the buffer of a write stays at a few megabytes.
pub const TRAIL_BATCH: usize = 4_096;

/// How long a caller waits for the trail to accept a record: well within [`OPEN_TIMEOUT`](super::OPEN_TIMEOUT), and a
/// sink that takes longer (a full pipe that nobody reads) is a failed sink.
pub const TRAIL_PATIENCE: Duration = Duration::from_secs(5);

/// How long a disk may take to synchronise a file beside the writer, and how long the end of a trail, which synchronises
/// it too, is waited for: a disk that others keep busy takes seconds, and meanwhile nobody waits for a forward.
pub const TRAIL_SYNC: Duration = Duration::from_secs(20);

/// How often the trail looks whether a failed sink works again, and whether a write hangs.
pub const TRAIL_RETRY: Duration = Duration::from_secs(1);

/// What a sink that has a queue of its own may hold and not have written, in bytes: some ten thousand records, so that
/// a collector may be away for a moment; what a sink that is not required gets beyond that is counted as lost.
pub const TRAIL_SINK_BYTES: usize = 8 << 20;

/// How often a trail's file is made to survive a power failure, unless the configuration says otherwise: what is lost
/// then is seconds, and a disk is not kept busy by it.
pub const TRAIL_FSYNC: Duration = Duration::from_secs(5);

/// How much of a trail's file one entry of its index is about: little enough to be read in a millisecond or two.
pub const TRAIL_INDEX_STEP: u64 = 1 << 20;

/// How much of a file is read at a start to go on with its index; of a file that lacks more of it there is none.
pub const TRAIL_INDEX_CATCH_UP: u64 = 16 << 20;

/// How long the sinks that are not required may go on writing what they have when the trail is closed.
pub const TRAIL_SINK_GRACE: Duration = Duration::from_secs(2);

/// How long after a rotation that failed the next one is tried.
pub const TRAIL_ROTATION_RETRY: Duration = Duration::from_secs(60);

/// How often it is looked which forwards have to say how far they are, where that is not often: the look goes over all.
pub const PROGRESS_LOOK: Duration = Duration::from_secs(10);

/// Forwards that say how far they are in one second, so that many old ones cannot fill the trail's queue.
pub const PROGRESS_BATCH: usize = 256;

/// How large a trail's file becomes before it is put away, unless `rotate_mib` says otherwise: half a million records,
/// which a start reads in a second or two after a crash.
pub const TRAIL_ROTATE: u64 = 256 << 20;

/// How old a trail's file becomes before it is put away, unless `rotate_hours` says otherwise: whoever looks for a day
/// then looks into one or two files.
pub const TRAIL_ROTATE_AGE: Duration = Duration::from_secs(24 * 3_600);

/// After how many records the head of a trail is written, unless `head_records` says otherwise: what is not yet covered
/// by a head could be cut off without being seen.
pub const HEAD_RECORDS: u64 = 1_000;

/// How often the head of a trail is written when there are few records, unless `head_s` says otherwise.
pub const HEAD_EVERY: Duration = Duration::from_secs(60);

/// How often a forward that lasts says how far it is, unless `progress_s` says otherwise.
pub const PROGRESS_EVERY: Duration = Duration::from_secs(900);

/// One line of a trail, with its newline; our own records are smaller even if every character of theirs is escaped.
pub const TRAIL_RECORD_MAX: usize = 64 * 1024;

/// How often an end tells the other what its trail has come to, at the most and once the first few are sent. Each costs
/// both trails a record: thirty a second at a gateway with ten thousand links.
pub const ANCHOR_EVERY: Duration = Duration::from_secs(300);

/// Anchors that may follow one another without that: at the beginning of a link. As many may be sent beside them when an end goes
/// away, so that what happened last is not left out.
pub const ANCHORS_SENT_BURST: u32 = 4;

/// How long the answer to an anchor is awaited: as long as until the next anchor at the latest. What comes later is passed over.
pub const ANCHOR_ANSWER: Duration = ANCHOR_EVERY;

/// How long a link that ends in order is kept for the last anchors: a few round trips to most places and a write at both ends. With
/// [`super::GOODBYE_PATIENCE`] after it, it stays well within the time that a stop has anyway.
pub const ANCHOR_FAREWELL: Duration = Duration::from_secs(2);

/// Anchors that an end takes before the other counts as breaking the protocol: twice what it may send.
pub const ANCHORS_BURST: u32 = 2 * ANCHORS_SENT_BURST;

/// After how long one more is taken: half of [`ANCHOR_EVERY`], as clocks and networks go.
pub const ANCHORS_TAKEN_EVERY: Duration = Duration::from_secs(150);

/// Anchors of a link that wait for the trail to have them on record; beyond that they are passed over.
pub const ANCHORS_WAITING: usize = 4;

/// What is found in a trail that is verified, in detail; more than anybody reads, and a trail of nothing but damage
/// stays bounded.
pub const VERIFY_FINDINGS_MAX: usize = 1_000;

/// Anchors and heads from elsewhere that a trail is verified against: a head a minute for four months, and 32 MiB.
pub const VERIFY_ANCHORS_MAX: usize = 262_144;

/// Trails that other places have seen and that are told apart: those of all agents that a gateway holds links to, with
/// a restart of each.
pub const VERIFY_TRAILS_MAX: usize = 16_384;

/// Heads of a trail that a countersignature may still come for: an answer is awaited for far less.
pub const VERIFY_HEADS: usize = 4_096;

/// Forwards that are held while two trails are compared: all that can live at once, on both sides, and what ended
/// within the tolerance for clocks; some 50 MiB.
pub const COMPARE_FORWARDS: usize = 2 * TRAIL_QUEUE;

/// Bytes of a forward that one side may have taken and the other not delivered when it broke: the budget of a link's
/// credit, what waits in the queues before and behind it, and in the sockets.
pub const COMPARE_FLIGHT: u64 = 96 * 1024 * 1024;

/// Links and replicas of one agent's trail that are told apart while it is compared.
pub const COMPARE_LINKS: usize = 4_096;

/// Lines and gaps in a trail for which it may account further on: one of each crash or failing sink.
pub const VERIFY_TORN: usize = 1_024;

/// Bytes of a trail that are read at once: enough for the disk to be the limit, and for many lines of any length.
pub const TRAIL_READ: usize = 1024 * 1024;

/// Bytes that are held of the time index of a file of a trail: of one of 350 GB. What lies behind is read without.
pub const TRAIL_INDEX_MAX: u64 = 8 * 1024 * 1024;

/// How often a trail that is followed is looked at: a person does not notice, and a thousand times as rare as a busy
/// loop.
pub const TRAIL_LOOK: Duration = Duration::from_millis(250);

/// One free text in an audit record, in bytes; enough for an error with its causes, too little to fill a disk with.
pub const TRAIL_TEXT_MAX: usize = 512;

/// What an audit record lists of changes, in bytes as JSON has them: half of [`TRAIL_RECORD_MAX`], and some two hundred
/// keys with whose they are. What goes beyond is counted.
pub const TRAIL_CHANGES_MAX: usize = 32 * 1024;

/// One forward id, in bytes; ours are far shorter.
pub const FORWARD_ID_MAX: usize = 128;

/// How long running forwards may go on after a required audit sink has failed.
pub const TRAIL_FAILURE_GRACE: Duration = Duration::from_secs(30);

/// Records about strangers' failed logins written in one period; what exceeds them is counted and written as a sum.
pub const STRANGER_RECORDS: u32 = 50;

/// The period of [`STRANGER_RECORDS`].
pub const STRANGER_PERIOD: Duration = Duration::from_secs(10);

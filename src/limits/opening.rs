//! Forwards and the channels that carry them: how many there are, how fast they come, and how long opening one may take.

use std::time::Duration;

use super::TRAIL_QUEUE;

/// Channels open at once on one session at the SSH door.
pub const CHANNELS_PER_SESSION: usize = 256;

/// Channels open at once on one link; the most that `forwards_per_link` can be set to, on either side.
pub const CHANNELS_PER_LINK: usize = 4_096;

/// Opens under way at once on one link: each holds a task and a resolver or connect call on the agent. A gateway asks
/// for no more at once, and an agent's `pending_opens_per_link` can be set to less.
pub const PENDING_OPENS_PER_LINK: usize = 256;

/// Opens under way at once on one session at the SSH door.
pub const PENDING_OPENS_PER_SESSION: usize = 128;

/// Opens, failed ones included, after which the agent replaces a link: the SSH library keeps some kilobytes for every
/// channel that was closed locally, until the session ends. Each thread that has had such a link keeps that memory for
/// the next one, so that it is to be a few megabytes; a handshake among so many opens costs nothing.
pub const OPENS_PER_LINK: u64 = 2_000;

/// Opens after which the agent cuts a link that has not been replaced, or is asked for more all the same, and the
/// gateway gives it no more: with what the library keeps for each, a peer that never lets a link be replaced makes us
/// hold less than 64 MiB. Eight times [`OPENS_PER_LINK`], so that a link whose replacement fails for a while goes on.
pub const OPENS_PER_LINK_MAX: u64 = 8 * OPENS_PER_LINK;

/// From a request to an open stream, over all steps; a forward that takes longer has failed.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a gateway waits for an agent's answer to an open: a little longer than the agent takes at most, so that its
/// reason is heard.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(25);

/// How long a forward waits at the gateway for its agent to link: an agent that has lost its link is back within a few
/// seconds, and one that is restarted too; what takes longer is better told to the client.
pub const LINK_PATIENCE: Duration = Duration::from_secs(15);

/// Links that one forward is tried on: as many as a rolling restart can take away under it, and few enough that a
/// target that is down everywhere is not dialled by every replica there is.
pub const ATTEMPTS: usize = 4;

/// From the record of a forward to an agent's answer at the gateway, over all attempts and the wait for a link. Long
/// enough for an agent that does not answer at all and a second one that takes nearly all of [`OPEN_TIMEOUT`].
pub const OPENING_TIMEOUT: Duration = Duration::from_secs(45);

/// How long a client of ours waits for the gateway's answer to an open: a little longer than [`OPENING_TIMEOUT`], so
/// that the answer is heard.
pub const CLIENT_PATIENCE: Duration = Duration::from_secs(50);

const _: () = assert!(ANSWER_TIMEOUT.as_secs() > OPEN_TIMEOUT.as_secs(), "see ANSWER_TIMEOUT");
const _: () = assert!(OPENING_TIMEOUT.as_secs() >= ANSWER_TIMEOUT.as_secs() + OPEN_TIMEOUT.as_secs(), "see there");
const _: () = assert!(CLIENT_PATIENCE.as_secs() > OPENING_TIMEOUT.as_secs(), "see CLIENT_PATIENCE");

/// Forwards that one principal may have at once, over all doors, unless `forwards_per_principal` says otherwise: more
/// than any pool of connections, far fewer than all principals share.
pub const FORWARDS_PER_PRINCIPAL: usize = 1_024;

/// Forwards that one organisation may have at once, unless `forwards_per_organisation` says otherwise: one of many
/// cannot take all places in the trail ([`TRAIL_QUEUE`](super::TRAIL_QUEUE)).
pub const FORWARDS_PER_ORGANISATION: usize = 8_192;

/// Forwards that an agent has at once, over all its links, unless `forwards` says otherwise: a quarter of the
/// descriptors that our unit for systemd gives it, and two organisations' worth.
pub const FORWARDS_PER_AGENT: usize = 16_384;

/// The most that a limit of live forwards can be set to: half of the places in the trail
/// ([`TRAIL_QUEUE`](super::TRAIL_QUEUE)), of which each live forward holds one.
pub const FORWARDS_MAX: usize = TRAIL_QUEUE / 2;

/// Sessions at the SSH door that one principal may have at once, unless `sessions_per_principal` says otherwise.
pub const SESSIONS_PER_PRINCIPAL: usize = 128;

/// The most that `sessions_per_principal` can be set to: each may make the gateway hold [`HELD_MAX`](super::HELD_MAX).
pub const SESSIONS_MAX: usize = 1_024;

/// Opens of one principal that may be under way at once, unless `pending_opens_per_principal` says otherwise: as many
/// as it may have forwards, because a pool of connections begins all at once. To be lowered where principals that share
/// an agent must not hold up each other with targets that do not answer.
pub const PENDING_OPENS_PER_PRINCIPAL: usize = FORWARDS_PER_PRINCIPAL;

/// Forwards that one principal may ask for in a second, refused ones included, unless `opens_per_second_per_principal`
/// says otherwise: about twice what one core opens, so that no honest program comes near it, and a loop that has run
/// away writes only so much into the trail on a faster one.
pub const OPENS_PER_SECOND_PER_PRINCIPAL: u32 = 10_000;

/// The same for one organisation, at the gateway and at each agent: two principals' worth.
pub const OPENS_PER_SECOND_PER_ORGANISATION: u32 = 20_000;

/// The most that a limit of opens per second can be set to: each writes two records or more into the trail, and several
/// times [`TRAIL_QUEUE`](super::TRAIL_QUEUE) in a second is more than any sink takes.
pub const OPENS_PER_SECOND_MAX: u32 = 100_000;

/// What may come at once after a pause, as the time in which the rate would allow it: browsers and pools begin with
/// many.
pub const OPENS_BURST: Duration = Duration::from_secs(5);

/// Refusals for opens per second that become records of their own, a second and principal (organisation, at an agent);
/// what exceeds them is counted, and the sum recorded: at the end of a session, at a loopback door after
/// [`FLOOD_PERIOD`].
pub const FLOOD_RECORDS_PER_SECOND: u32 = 5;

/// See [`FLOOD_RECORDS_PER_SECOND`].
pub const FLOOD_PERIOD: Duration = Duration::from_secs(10);

/// The longest idle time or life of a forward that can be set: a year. Who wants more wants no limit, which is the
/// default of both, since a psql that idles overnight is legitimate.
pub const FORWARD_LIFE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// How often, in an idle time, a forward is looked at: it ends at most so much of it too late, and moving bytes costs
/// it nothing.
pub const IDLE_LOOKS: u32 = 4;

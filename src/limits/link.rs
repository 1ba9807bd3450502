//! Links between agents and gateways: how they are made, kept, replaced and counted.

use std::time::Duration;

/// Opens that a link's agent has answered none of for [`ANSWER_TIMEOUT`](super::ANSWER_TIMEOUT), after which it gets no
/// more. One could be a target's fault in an agent of a later version; an agent that answers nothing of several is
/// broken.
pub const UNANSWERED_OPENS: usize = 3;

/// How long an agent's process waits before it dials again once another with the same replica name has taken its place,
/// and up to half as long in addition: what it costs to stand by for the other's end is then two handshakes in a
/// minute.
pub const SUPERSEDED_WAIT: Duration = Duration::from_secs(30);

/// Ways to one gateway that an agent tries in order: three transports, with and without a balancer between, and room to
/// spare. Each costs a round of attempts its time where nothing answers ([`CONNECT_TIMEOUT`](super::CONNECT_TIMEOUT)
/// and more).
pub const WAYS_PER_GATEWAY: usize = 8;

/// From a connection to a gateway to the end of the TLS handshake on it, with a balancer between that may reach for the
/// gateway first.
pub const TLS_TIMEOUT: Duration = Duration::from_secs(15);

/// A gateway's, or a balancer's, reply to a WebSocket request: status line and headers.
pub const WEBSOCKET_REPLY_MAX: usize = 16 * 1024;

/// A gateway must answer a WebSocket request within this, with a balancer between that reaches for it first.
pub const WEBSOCKET_TIMEOUT: Duration = Duration::from_secs(15);

/// Between pings on a WebSocket. Balancers end what is idle for a minute, nginx's and AWS's among them; ten seconds of
/// that are for what holds a packet up.
pub const WEBSOCKET_PING: Duration = Duration::from_secs(40);

/// What a message of a WebSocket may carry. Ours carry [`CHUNK`](super::CHUNK) at most; a balancer that puts messages
/// together puts some of them together.
pub const WEBSOCKET_MESSAGE_MAX: u64 = 1024 * 1024;

/// Bytes of frames that a socket has not taken, at which nothing more is put into frames: a few of our messages.
pub const WEBSOCKET_UNSENT: usize = 128 * 1024;

/// Frames in a row without a byte for anybody: the pings of an hour in which nothing else is said, at one a minute.
/// Where SSH is inside, something is said far sooner.
pub const WEBSOCKET_IDLE_FRAMES: usize = 64;

/// The reply of an HTTP proxy to CONNECT: status line and headers, with those of interim replies.
pub const CONNECT_REPLY_MAX: usize = 16 * 1024;

/// From the first byte sent to a proxy to the end of its reply, TLS included.
pub const PROXY_TIMEOUT: Duration = Duration::from_secs(15);

/// Entries of `no_proxy`: lists of large networks have hundreds, and each is compared with for every dial.
pub const NO_PROXY_MAX: usize = 1024;

/// The agent's first wait after a lost or failed link, before jitter.
pub const RECONNECT_FIRST: Duration = Duration::from_millis(500);

/// The agent's longest wait between attempts.
pub const RECONNECT_CAP: Duration = Duration::from_secs(30);

/// A link that has lived so long has proved good: the next failure starts the backoff afresh.
pub const LINK_PROVED: Duration = Duration::from_secs(30);

/// How long a local connection of `caponier forward` waits for a session that is being made anew: a gateway that is
/// started again is back by then.
pub const RELOGIN_PATIENCE: Duration = Duration::from_secs(15);

/// Keepalives on a link: sent after this long without a packet, unanswered once, then the link is cut (40 s in all).
pub const LINK_KEEPALIVE: Duration = Duration::from_secs(20);

/// Keepalives at the SSH door; not below [`LOGIN_GRACE`](super::LOGIN_GRACE), because a keepalive during login is fatal
/// to OpenSSH.
pub const DOOR_KEEPALIVE: Duration = Duration::from_secs(60);

/// How long we wait for the other end of a channel to close first once both directions have ended. Longer than a round
/// trip to most places; short, because `ssh -W` never closes first and its user waits.
pub const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// How long we wait for the other end to hang up after goodbye.
pub const GOODBYE_PATIENCE: Duration = Duration::from_secs(5);

/// Addresses of its own gateways and proxy that an agent remembers, to keep forwards away from them.
pub const WAYS_OUT: usize = 1_024;

/// Links of one agent that are held at once, over all its replicas, replaced ones that still carry forwards included:
/// what a few replicas may keep by [`REPLACED_LINKS`].
pub const LINKS_PER_AGENT: usize = 256;

/// Replicas of one agent whose last link, or last failure to link, a gateway remembers: more than an agent usually has,
/// and little enough for every agent that a registry can hold.
pub const REPLICAS_REMEMBERED: usize = 16;

/// How long a replica that is not linked any more is listed beside others of its agent that are: names come and go with
/// every rollout where they are drawn at random.
pub const ABSENT_LISTED: Duration = Duration::from_secs(24 * 3600);

/// Links to one gateway that an agent has replaced and that still carry forwards; the oldest is cut for one more. An
/// idle one costs less than a hundred kilobytes on either side, and with each of them links are replaced more seldom:
/// it takes more than three hundred thousand opens, with a forward among each link's that never ends, until one is cut.
pub const REPLACED_LINKS: usize = 64;

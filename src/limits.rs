//! Every bound of the program, each with its reason. A full queue or a reached limit is an outcome with a name.

use std::time::Duration;

/// From `accept` to a finished login, on either side of a link and at the SSH door. Long enough for a hardware key to be
/// touched, short enough that strangers cannot hold connections.
pub const LOGIN_GRACE: Duration = Duration::from_secs(20);

/// How long the gateway waits for the peer's identification string before it sends its own: clients that wait for the
/// server's line (ssh-keyscan) are served, agents and ordinary clients speak at once.
pub const IDENTIFICATION_PATIENCE: Duration = Duration::from_millis(300);

/// The longest identification string, with its line end (RFC 4253 §4.2).
pub const IDENTIFICATION_MAX: usize = 255;

/// A balancer's PROXY protocol header: its addresses, and with room to spare what else balancers tell of a connection.
pub const PROXY_HEADER_MAX: usize = 2 * 1024;

/// From `accept` to the end of that header, which a balancer sends at once.
pub const PROXY_HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes that are read at once while it is not known whether a connection speaks SSH, TLS or HTTP: the longest beginning has
/// eight, and most first messages come whole.
pub const SNIFF_MAX: usize = 2 * 1024;

/// The head of an HTTP request: a token of the largest size ([`TOKEN_MAX`]) in base64, and what clients and balancers add.
pub const HTTP_HEAD_MAX: usize = 16 * 1024;

/// Headers of an HTTP request; browsers send twenty, and balancers add a dozen.
pub const HTTP_HEADERS_MAX: usize = 64;

/// What a client that is refused may have sent behind that for which it is, so that it still gets to read the answer: what a
/// socket takes without waiting.
pub const REFUSED_BYTES: usize = 64 * 1024;

/// How long such a client has to read it and to hang up.
pub const REFUSED_PATIENCE: Duration = Duration::from_secs(2);

/// Bytes that are read from a client in a TLS handshake: a hello with post-quantum keys is two kilobytes, and a client's
/// certificate with those between it and its authority comes to less than half of this. The TLS library alone would take
/// messages of 64 KiB, and keep them.
pub const TLS_HANDSHAKE_BYTES: usize = 32 * 1024;

/// Certificates of a gateway, each for some names: every handshake looks through them.
pub const TLS_CERTIFICATES_MAX: usize = 64;

/// Bits that tell the addresses of a network of balancers apart that end TLS: 256 of them. Whoever is at one of these is
/// believed without proof, and a network in which anything else lives as well would be a way around TLS.
pub const TERMINATOR_BITS: u8 = 8;

/// Certificates in one file, from an end's own up to its authority: honest chains have three or four.
pub const TLS_CHAIN_MAX: usize = 16;

/// What is read at once from a socket under TLS: a record of the largest size. The TLS library asks for 4 KiB at a time.
pub const TLS_READ_AHEAD: usize = 17 * 1024;

/// Connections that have not logged in yet, over the whole gateway.
pub const UNAUTHENTICATED_MAX: usize = 256;

/// Connections from one address that have not logged in yet.
pub const UNAUTHENTICATED_PER_ADDRESS: usize = 64;

/// How long a seat among [`UNAUTHENTICATED_MAX`] is one's own when all are taken and nobody has more than others: an
/// honest login takes a second, and longer only where a key has to be touched.
pub const SEAT_SURE: Duration = Duration::from_secs(5);

/// Connections that one address makes in a second on average before it is held against it: as many as two threads take up.
pub const CONNECTIONS_PER_SECOND_PER_ADDRESS: u32 = 200;

/// What may come at once, as the time in which [`CONNECTIONS_PER_SECOND_PER_ADDRESS`] would allow it: a thousand agents
/// behind one address that come back at the same time, are turned away for want of [seats](UNAUTHENTICATED_PER_ADDRESS) and
/// try again.
pub const CONNECTIONS_BURST: Duration = Duration::from_secs(60);

/// What is held against an address without consequences, in the seconds after which it is forgiven: a dozen logins with a
/// wrong key, which is a person who looks for the right one, or an agent's attempts in its first minutes.
pub const PENALTY_TOLERANCE: Duration = Duration::from_secs(60);

/// How long an address is turned away the first time: short enough for somebody who has found the mistake.
pub const PENALTY_FIRST: Duration = Duration::from_secs(15);

/// How long at most: longer keeps out nobody who has other addresses, and whoever gets the address next.
pub const PENALTY_CAP: Duration = Duration::from_secs(600);

/// By how much less counts what comes from an address from which somebody is logged in: a few agents of many behind it that
/// are set up wrongly, each of which tries again every [`RECONNECT_CAP`] at least.
pub const PENALTY_MILD: u32 = 10;

/// Addresses that something is held against: a megabyte or two.
pub const PENALTIES_MAX: usize = 16_384;

/// Handshakes under way at once over the whole gateway, from the end of the identification strings to the login: a thousand
/// agents that come back at the same time are let in one after another, each soon, instead of all at once and none in time.
pub const HANDSHAKES: usize = 64;

/// Handshakes under way at once from one address: the same share of all as one address has of
/// [the connections](UNAUTHENTICATED_PER_ADDRESS) without a login.
pub const HANDSHAKES_PER_ADDRESS: usize = HANDSHAKES * UNAUTHENTICATED_PER_ADDRESS / UNAUTHENTICATED_MAX;

/// How long a handshake keeps its place among [`HANDSHAKES`]. What takes longer waits for its peer and costs nothing: a key
/// that has to be touched may go on, and a stranger who dawdles keeps nobody else out.
pub const HANDSHAKE_HOLD: Duration = Duration::from_secs(5);

/// Between the beginnings of two handshakes on one thread, once [`HANDSHAKE_BURST`] have begun: a handshake takes about a
/// millisecond of processor time, so that they take a tenth of a thread at most, and what else runs there goes on between.
pub const HANDSHAKE_PACE: Duration = Duration::from_millis(10);

/// Handshakes that may begin at once on one thread that has had none for a while: a person's `ssh` never waits.
pub const HANDSHAKE_BURST: u32 = 16;

/// Threads that links and sessions are spread over: as many as there are processors, but more would only share one listener
/// and one trail.
pub const WORKERS_MAX: usize = 32;

/// Threads of a gateway at least, also on one processor: handshakes then need not share the one that carries forwards.
pub const GATEWAY_WORKERS: usize = 2;

/// Bytes that a session takes from its peer before the login: a key exchange is four kilobytes, and an ssh-agent that offers
/// all of [`LOGIN_ATTEMPTS`] keys with certificates comes to less than half of this.
pub const LOGIN_BYTES: usize = 128 * 1024;

/// The largest packet before the login: what RFC 4253 §6.1 wants everybody to take. The SSH library makes room for a packet
/// when its length has come, and keeps a key exchange's twice over, so that this is what a stranger's memory goes by.
pub const LOGIN_PACKET_MAX: usize = 35_000;

/// Bytes that a peer has not taken before the login, at which its session is cut: ours are a few kilobytes.
pub const LOGIN_UNSENT: usize = 64 * 1024;

/// Logins refused on one connection before it is closed; an ssh-agent with a dozen keys still gets to the right one.
pub const LOGIN_ATTEMPTS: usize = 16;

/// Keys that one connection may ask about without an attempt being counted, because they were acknowledged: where
/// certificates are accepted that is every key, and the answer costs a signature's verification. An ssh-agent holds fewer.
pub const LOGIN_PROBES: usize = 64;

/// Longest OpenSSH certificate: with the largest keys accepted and a hundred principals it is half of this.
pub const CERTIFICATE_MAX: usize = 16 * 1024;

/// Longest key id of a certificate, so that it is told whole in the trail.
pub const CERTIFICATE_KEY_ID_MAX: usize = 256;

/// Most principals of a certificate, and most options: as many as OpenSSH reads.
pub const CERTIFICATE_NAMES_MAX: usize = 256;

/// What rests on a certificate looks at the clock at least this often: a timer for its end does not notice that the clock was
/// set meanwhile.
pub const CERTIFICATE_LOOK: Duration = Duration::from_secs(3);

/// Certificates that a TLS client may show, with its own: a few between it and its authority. Those of a link are kept for as
/// long as it lives, to be judged again.
pub const PEER_CHAIN_MAX: usize = 8;

/// Most names of a TLS certificate that are looked at: one that stands for more hosts stands for no one agent.
pub const PEER_NAMES_MAX: usize = 100;

/// Names of TLS certificates that stand for one agent or principal: a few hosts or renewals, not a fleet.
pub const CERTIFICATE_NAMES_OF_ONE: usize = 16;

/// Certificates of client CAs in one place, that of an organisation or an agent or a listener: each may cost a chain to be
/// built when somebody shows a certificate.
pub const CLIENT_CAS_MAX: usize = 16;

/// What is left of the life of a revocation list when its operator is warned, as a share of the whole: lists live for hours
/// or for months.
pub const CRL_WARN_SHARE: i32 = 4;

/// What is left of the life of a client CA when its operator is warned, as for keys.
pub const CA_WARN: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a refused login waits: constant, so that a refusal does not tell by its time what was wrong.
pub const LOGIN_REFUSAL_DELAY: Duration = Duration::from_millis(50);

/// Channels open at once on one session at the SSH door.
pub const CHANNELS_PER_SESSION: usize = 256;

/// Channels open at once on one link; the most that `forwards_per_link` can be set to, on either side.
pub const CHANNELS_PER_LINK: usize = 4_096;

/// Opens under way at once on one link: each holds a task and a resolver or connect call on the agent. A gateway asks for
/// no more at once, and an agent's `pending_opens_per_link` can be set to less.
pub const PENDING_OPENS_PER_LINK: usize = 256;

/// Opens under way at once on one session at the SSH door.
pub const PENDING_OPENS_PER_SESSION: usize = 128;

/// Opens, failed ones included, after which the agent replaces a link: the SSH library keeps some kilobytes for every
/// channel that was closed locally, until the session ends. Each thread that has had such a link keeps that memory for the
/// next one, so that it is to be a few megabytes; a handshake among so many opens costs nothing.
pub const OPENS_PER_LINK: u64 = 2_000;

/// Opens after which the agent cuts a link that has not been replaced, or is asked for more all the same, and the gateway
/// gives it no more: with what the library keeps for each, a peer that never lets a link be replaced makes us hold less than
/// 64 MiB. Eight times [`OPENS_PER_LINK`], so that a link whose replacement fails for a while goes on.
pub const OPENS_PER_LINK_MAX: u64 = 8 * OPENS_PER_LINK;

/// From a request to an open stream, over all steps; a forward that takes longer has failed.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a gateway waits for an agent's answer to an open: a little longer than the agent takes at most, so that its
/// reason is heard.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(25);

/// How long a forward waits at the gateway for its agent to link: an agent that has lost its link is back within a few
/// seconds, and one that is restarted too; what takes longer is better told to the client.
pub const LINK_PATIENCE: Duration = Duration::from_secs(15);

/// Links that one forward is tried on: as many as a rolling restart can take away under it, and few enough that a target
/// that is down everywhere is not dialled by every replica there is.
pub const ATTEMPTS: usize = 4;

/// From the record of a forward to an agent's answer at the gateway, over all attempts and the wait for a link. Long enough
/// for an agent that does not answer at all and a second one that takes nearly all of [`OPEN_TIMEOUT`].
pub const OPENING_TIMEOUT: Duration = Duration::from_secs(45);

/// How long a client of ours waits for the gateway's answer to an open: a little longer than [`OPENING_TIMEOUT`], so that
/// the answer is heard.
pub const CLIENT_PATIENCE: Duration = Duration::from_secs(50);

const _: () = assert!(ANSWER_TIMEOUT.as_secs() > OPEN_TIMEOUT.as_secs(), "see ANSWER_TIMEOUT");
const _: () = assert!(OPENING_TIMEOUT.as_secs() >= ANSWER_TIMEOUT.as_secs() + OPEN_TIMEOUT.as_secs(), "see there");
const _: () = assert!(CLIENT_PATIENCE.as_secs() > OPENING_TIMEOUT.as_secs(), "see CLIENT_PATIENCE");

/// From a connection to a local SOCKS or HTTP proxy to the end of its request: programs on the same machine ask at once.
pub const FRONT_TIMEOUT: Duration = Duration::from_secs(10);

/// What such a request may take; a CONNECT is a few hundred bytes, and credentials that nobody asked for are some more.
pub const FRONT_HEAD_MAX: usize = 16 * 1024;

/// How long a local connection has to read why it was refused.
pub const FRONT_FAREWELL: Duration = Duration::from_secs(2);

/// Local listeners of one command: each takes a descriptor, and as many connections as a session has channels.
pub const FRONTS_MAX: usize = 256;

/// A file of forwards: that many lines with the longest names, and as many comments.
pub const FORWARDS_FILE_MAX: u64 = 256 * 1024;

/// Opens that a link's agent has answered none of for [`ANSWER_TIMEOUT`], after which it gets no more. One could be a
/// target's fault in an agent of a later version; an agent that answers nothing of several is broken.
pub const UNANSWERED_OPENS: usize = 3;

/// How long an agent's process waits before it dials again once another with the same replica name has taken its place, and
/// up to half as long in addition: what it costs to stand by for the other's end is then two handshakes in a minute.
pub const SUPERSEDED_WAIT: Duration = Duration::from_secs(30);

/// One TCP connect by the agent to a target address.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that has been silent for so long is probed, so that a target whose host vanished gives its forward back;
/// seldom enough to cost nothing, and often enough for firewalls that forget silent connections.
pub const PROBE_AFTER: Duration = Duration::from_secs(60);

/// Between two such probes.
pub const PROBE_INTERVAL: Duration = Duration::from_secs(20);

/// Probes without an answer after which the connection is lost.
pub const PROBES: u32 = 3;

/// One name resolution, unless `timeout_s` says otherwise.
pub const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest that `timeout_s` can be set to: half of [`OPEN_TIMEOUT`] is left for the connection.
pub const RESOLVE_TIMEOUT_MAX: Duration = Duration::from_secs(10);

const _: () = assert!(RESOLVE_TIMEOUT_MAX.as_secs() * 2 <= OPEN_TIMEOUT.as_secs(), "see RESOLVE_TIMEOUT_MAX");

/// Names that are being looked up at once, each on a thread, also those whose asker has given up: more than the hosts that
/// rules usually have, and half of the threads that the runtime has for such work.
pub const LOOKUPS_MAX: usize = 256;

/// Addresses of one name that are looked at; more than any honest name has.
pub const ADDRESSES_PER_NAME: usize = 32;

/// DNS servers that a configuration names; a third one is seldom asked already.
pub const RESOLVERS_MAX: usize = 8;

/// How long a DNS server may be silent before the next one is asked beside it: longer than honest ones take, and so short that
/// all of a few can be asked within [`RESOLVE_TIMEOUT`].
pub const SERVER_PATIENCE: Duration = Duration::from_secs(1);

/// How long the answer for one address family waits for the other's. RFC 8305 asks for 50 ms; here a family that comes late is
/// missing where a rule may permit it alone, and a server that answers one type never is rare.
pub const FAMILY_PATIENCE: Duration = Duration::from_millis(500);

/// Questions that configured servers are asked at once: two for each of [`LOOKUPS_MAX`] names. Each holds a few sockets.
pub const QUERIES_MAX: usize = 2 * LOOKUPS_MAX;

/// Answers of configured servers that are kept: more names than rules usually have, with both families, in a few megabytes.
/// Where a rule's wildcards let principals ask for any number of names, those that would expire first make room.
pub const ANSWERS_KEPT: usize = 4_096;

/// How long such an answer is used again at most, unless `cache_ttl_max_s` says otherwise: an owner who moves a host need not
/// wait for a day because a zone says so.
pub const ANSWER_LIFE: Duration = Duration::from_secs(300);

/// The most that `cache_ttl_max_s` can be set to.
pub const ANSWER_LIFE_MAX: Duration = Duration::from_secs(24 * 3600);

/// How long it is remembered at most that a name does not exist or has no address: whoever has just made it tries again soon.
pub const ABSENCE_KEPT: Duration = Duration::from_secs(30);

/// Aliases (CNAME) that are followed from one name: more than honest chains have.
pub const ALIASES_MAX: usize = 16;

/// SRV records of one service that are looked at; more than any honest one has.
pub const SERVICE_RECORDS: usize = 32;

/// Hosts of one service that are looked up for one forward, the first in its order: each costs two questions.
pub const SERVICE_TARGETS: usize = 8;

/// Between the beginnings of two connects to addresses of one target: RFC 8305 §5 recommends it.
pub const CONNECT_STAGGER: Duration = Duration::from_millis(250);

/// Connects of one forward that are under way at once: if that many addresses are silent, those behind them are tried within
/// [`OPEN_TIMEOUT`] too, and a flood of opens costs few descriptors each.
pub const CONNECTS_AT_ONCE: usize = 8;

/// The system's hosts file; block lists of a hundred thousand names still fit.
pub const HOSTS_MAX: u64 = 8 * 1024 * 1024;

/// Ways to one gateway that an agent tries in order: three transports, with and without a balancer between, and room to spare.
/// Each costs a round of attempts its time where nothing answers ([`CONNECT_TIMEOUT`] and more).
pub const WAYS_PER_GATEWAY: usize = 8;

/// From a connection to a gateway to the end of the TLS handshake on it, with a balancer between that may reach for the gateway
/// first.
pub const TLS_TIMEOUT: Duration = Duration::from_secs(15);

/// A gateway's, or a balancer's, reply to a WebSocket request: status line and headers.
pub const WEBSOCKET_REPLY_MAX: usize = 16 * 1024;

/// A gateway must answer a WebSocket request within this, with a balancer between that reaches for it first.
pub const WEBSOCKET_TIMEOUT: Duration = Duration::from_secs(15);

/// Between pings on a WebSocket. Balancers end what is idle for a minute, nginx's and AWS's among them; ten seconds of that are
/// for what holds a packet up.
pub const WEBSOCKET_PING: Duration = Duration::from_secs(40);

/// What a message of a WebSocket may carry. Ours carry [`CHUNK`] at most; a balancer that puts messages together puts some of
/// them together.
pub const WEBSOCKET_MESSAGE_MAX: u64 = 1024 * 1024;

/// Bytes of frames that a socket has not taken, at which nothing more is put into frames: a few of our messages.
pub const WEBSOCKET_UNSENT: usize = 128 * 1024;

/// Frames in a row without a byte for anybody: the pings of an hour in which nothing else is said, at one a minute. Where SSH is
/// inside, something is said far sooner.
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

/// How long a local connection of `caponier forward` waits for a session that is being made anew: a gateway that is started
/// again is back by then.
pub const RELOGIN_PATIENCE: Duration = Duration::from_secs(15);

/// Keepalives on a link: sent after this long without a packet, unanswered once, then the link is cut (40 s in all).
pub const LINK_KEEPALIVE: Duration = Duration::from_secs(20);

/// Keepalives at the SSH door; not below [`LOGIN_GRACE`], because a keepalive during login is fatal to OpenSSH.
pub const DOOR_KEEPALIVE: Duration = Duration::from_secs(60);

/// How long we wait for the other end of a channel to close first once both directions have ended. Longer than a round
/// trip to most places; short, because `ssh -W` never closes first and its user waits.
pub const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// How long we wait for the other end to hang up after goodbye.
pub const GOODBYE_PATIENCE: Duration = Duration::from_secs(5);

/// What one read from a socket, and one channel message between our own ends, carries at most: an SSH packet's worth, which
/// the SSH library wants below 64 KiB. What each packet costs by itself halves against the 32 KiB that every peer must take.
pub const CHUNK: usize = 63 * 1024;

/// What is read at once from a session's socket where its next packet's length is asked for: many small packets, and the
/// beginning of a large one.
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

/// SSH channel window between our own ends, in bytes: far above [`CREDIT_MAX`], which is the real bound. The SSH library
/// grants it anew when half of it has come, so that half of it must exceed what can be under way.
pub const WINDOW_OURS: u32 = 64 * 1024 * 1024;

/// The most credit of one channel: 400 MB/s over a round trip of 50 ms. A sender never uses more, whatever it is offered.
pub const CREDIT_MAX: usize = 24 * 1024 * 1024;

/// Credit that a channel may grow to however short the way is: as much as is under way between two busy threads.
pub const CREDIT_NEAR: usize = 1024 * 1024;

/// Credit per second of round trip that a channel may grow to; a way that is shorter than its queues must not be filled up
/// just because it is fast. A core moves this much at most.
pub const CREDIT_RATE: usize = 1024 * 1024 * 1024;

/// A sender without credit gets so many times what it had: from the beginning to [`CREDIT_MAX`] in six round trips.
pub const CREDIT_GROWTH: usize = 4;

/// Owed credit that is given back at once, however large the window is.
pub const CREDIT_OWED: usize = 1024 * 1024;

/// The credit of all channels of a session together: what its peer can make this end hold. Channels begin with so little
/// that [`CHANNELS_PER_LINK`] of them fit, and grow only while as much again stays free: a few that have grown and whose
/// sinks then stall leave enough for the others.
pub const CREDIT_PER_SESSION: usize = 64 * 1024 * 1024;

/// Above this, channels with much credit give some of it back, so that others can have it.
pub const CREDIT_SCARCE: usize = CREDIT_PER_SESSION / 4 * 3;

/// Bytes that a socket has not taken, above which nothing more is given to its session.
pub const UNSENT_HIGH: usize = 256 * 1024;

/// Bytes that a socket has not taken, at which its session is cut: more than all queues of a session together.
pub const UNSENT_MAX: usize = 32 * 1024 * 1024;

/// Messages, each of a writer of its own, that are given to a session at once when its socket has room: together far below
/// [`UNSENT_MAX`], and as many as a session at the SSH door has channels, because there a writer may hold its place while it
/// waits for a stock peer's window, and must not keep others from theirs.
pub const FEEDERS: usize = CHANNELS_PER_SESSION;

/// Bytes of a stock peer's channels that wait for their sinks, above which its session stops reading.
pub const HELD_HIGH: usize = 4 * 1024 * 1024;

/// See [`HELD_HIGH`]: below this it reads on. Not far below, so that a session whose target is slow reads often enough to
/// hear that its peer is alive.
pub const HELD_LOW: usize = HELD_HIGH - 128 * 1024;

/// Bytes that may wait while a session reads on because a writer needs window. Whatever a peer had under way when it granted
/// that window lies below it (the kernels' buffers on both ends, and its own); if it has not come by then, it will not.
pub const HELD_STARVING: usize = 32 * 1024 * 1024;

/// Bytes that may wait at all; a session has stopped reading long before.
pub const HELD_MAX: usize = 64 * 1024 * 1024;

/// Bytes of one forward, each way, that are on their way from one thread to another: so many that both threads work at the
/// same time and seldom wake each other, so few that they stay in the processor's cache. A channel's credit, or its session's
/// own bound, holds for them as well.
pub const BRIDGE_BYTES: usize = 256 * 1024;

/// Messages of one forward, each way, that are on their way from one thread to another: as many as [`BRIDGE_BYTES`] have room
/// for where each is small.
pub const BRIDGE_MESSAGES: usize = 1_024;

/// How long a target may take nothing while what waits for it keeps a stock client's whole session from being read, or once
/// its principal is gone: what was sent before is then still delivered, but nobody waits for it. Longer than a link may be silent
/// ([`LINK_KEEPALIVE`]), shorter than a kernel keeps the last bytes of a closed socket for a peer that takes nothing.
pub const STALL: Duration = Duration::from_secs(60);

/// How long it may take in all to deliver what a peer had sent before it went away, and how long a principal may take nothing
/// of what its target had: it may pause in the middle of an answer, but not for ever.
pub const DELIVERY: Duration = Duration::from_secs(600);

/// Messages of a channel that its session hands over before the channel's reader gets to run. It always takes them all, so
/// that more would only mean more memory between the two, beyond what a processor's cache holds.
pub const CHANNEL_QUEUE: usize = 16;

/// Messages that wait to be sent on a session: so many go into one write, and the session keeps a buffer for as much.
pub const SESSION_QUEUE: usize = 16;

/// Audit records that wait for their sink. Each live forward also holds one place, reserved for its ending.
pub const TRAIL_QUEUE: usize = 65_536;

/// Audit records that go into one write, so that the buffer of a write stays at a few megabytes.
pub const TRAIL_BATCH: usize = 4_096;

/// How long a caller waits for the trail to accept a record: well within [`OPEN_TIMEOUT`], and a sink that takes longer
/// (a full pipe that nobody reads) is a failed sink.
pub const TRAIL_PATIENCE: Duration = Duration::from_secs(5);

/// How often the trail looks whether a failed sink works again, and whether a write hangs.
pub const TRAIL_RETRY: Duration = Duration::from_secs(1);

/// What a sink that has a queue of its own may hold and not have written, in bytes: some ten thousand records, so that a
/// collector may be away for a moment; what a sink that is not required gets beyond that is counted as lost.
pub const TRAIL_SINK_BYTES: usize = 8 << 20;

/// How often a trail's file is made to survive a power failure, unless the configuration says otherwise: what is lost then
/// is seconds, and a disk is not kept busy by it.
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

/// How large a trail's file becomes before it is put away, unless `rotate_mib` says otherwise: half a million records, which
/// a start reads in a second or two after a crash.
pub const TRAIL_ROTATE: u64 = 256 << 20;

/// How old a trail's file becomes before it is put away, unless `rotate_hours` says otherwise: whoever looks for a day then
/// looks into one or two files.
pub const TRAIL_ROTATE_AGE: Duration = Duration::from_secs(24 * 3_600);

/// After how many records the head of a trail is written, unless `head_records` says otherwise: what is not yet covered by a
/// head could be cut off without being seen.
pub const HEAD_RECORDS: u64 = 1_000;

/// How often the head of a trail is written when there are few records, unless `head_s` says otherwise.
pub const HEAD_EVERY: Duration = Duration::from_secs(60);

/// How often a forward that lasts says how far it is, unless `progress_s` says otherwise.
pub const PROGRESS_EVERY: Duration = Duration::from_secs(900);

/// Sinks of one trail besides its first: each is a thread or a task, and a copy of everything.
pub const SINKS_MAX: usize = 16;

/// From the beginning of a connection to a collector to its end: the name, the proxy, TCP and TLS. Longer than each of them
/// may take alone and shorter than all together, since nothing is sent meanwhile.
pub const SINK_CONNECT: Duration = Duration::from_secs(20);

/// How long a collector may take for what was sent to it: one that is busy answers within that, one that stalls is noticed.
pub const SINK_DELIVERY: Duration = Duration::from_secs(15);

/// How long a collector may take to hang up when all is sent.
pub const SINK_GOODBYE: Duration = Duration::from_secs(2);

/// The longest pause after the first failure of a collector: most are gone for as long as a restart takes.
pub const SINK_RETRY_FIRST: Duration = Duration::from_millis(250);

/// The longest pause between two attempts to reach a collector: where it is required, nothing opens meanwhile.
pub const SINK_RETRY_CAP: Duration = Duration::from_secs(5);

/// Records that are written to a syslog collector at once.
pub const SYSLOG_RECORDS: usize = 1_024;

/// Bytes of records that are written to a syslog collector at once: a slow one takes that within [`SINK_DELIVERY`].
pub const SYSLOG_PORTION: usize = 256 * 1024;

/// Bytes of records in one request to a collector; what most collectors take at once, and OCSF makes twice as much of it.
pub const HTTPS_BODY: usize = 1 << 20;

/// Records in one request to a collector, unless `batch_records` says otherwise.
pub const HTTPS_RECORDS: usize = 1_000;

/// The most that `batch_records` can be set to: more never fit into [`HTTPS_BODY`].
pub const HTTPS_RECORDS_MAX: usize = 10_000;

/// How long a record waits for others to go with it, unless `batch_ms` says otherwise; where the sink is required they do not
/// wait, since somebody waits for each.
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

/// One line of a trail, with its newline; our own records are smaller even if every character of theirs is escaped.
pub const TRAIL_RECORD_MAX: usize = 64 * 1024;

/// How often an end tells the other what its trail has come to, at the most and once the first few are sent. Each costs both
/// trails a record: thirty a second at a gateway with ten thousand links.
pub const ANCHOR_EVERY: Duration = Duration::from_secs(300);

/// Anchors that may follow one another without that: at the beginning of a link. As many may be sent beside them when an end goes
/// away, so that what happened last is not left out.
pub const ANCHORS_SENT_BURST: u32 = 4;

/// How long the answer to an anchor is awaited: as long as until the next anchor at the latest. What comes later is passed over.
pub const ANCHOR_ANSWER: Duration = ANCHOR_EVERY;

/// How long a link that ends in order is kept for the last anchors: a few round trips to most places and a write at both ends. With
/// [`GOODBYE_PATIENCE`] after it, it stays well within the time that a stop has anyway.
pub const ANCHOR_FAREWELL: Duration = Duration::from_secs(2);

/// Anchors that an end takes before the other counts as breaking the protocol: twice what it may send.
pub const ANCHORS_BURST: u32 = 2 * ANCHORS_SENT_BURST;

/// After how long one more is taken: half of [`ANCHOR_EVERY`], as clocks and networks go.
pub const ANCHORS_TAKEN_EVERY: Duration = Duration::from_secs(150);

/// Anchors of a link that wait for the trail to have them on record; beyond that they are passed over.
pub const ANCHORS_WAITING: usize = 4;

/// What is found in a trail that is verified, in detail; more than anybody reads, and a trail of nothing but damage stays
/// bounded.
pub const VERIFY_FINDINGS_MAX: usize = 1_000;

/// Anchors and heads from elsewhere that a trail is verified against: a head a minute for four months, and 32 MiB.
pub const VERIFY_ANCHORS_MAX: usize = 262_144;

/// Trails that other places have seen and that are told apart: those of all agents that a gateway holds links to, with a restart of
/// each.
pub const VERIFY_TRAILS_MAX: usize = 16_384;

/// Heads of a trail that a countersignature may still come for: an answer is awaited for far less.
pub const VERIFY_HEADS: usize = 4_096;

/// Forwards that are held while two trails are compared: all that can live at once, on both sides, and what ended within the
/// tolerance for clocks; some 50 MiB.
pub const COMPARE_FORWARDS: usize = 2 * TRAIL_QUEUE;

/// Bytes of a forward that one side may have taken and the other not delivered when it broke: the budget of a link's credit,
/// what waits in the queues before and behind it, and in the sockets.
pub const COMPARE_FLIGHT: u64 = 96 * 1024 * 1024;

/// Links and replicas of one agent's trail that are told apart while it is compared.
pub const COMPARE_LINKS: usize = 4_096;

/// Lines and gaps in a trail for which it may account further on: one of each crash or failing sink.
pub const VERIFY_TORN: usize = 1_024;

/// Bytes of a trail that are read at once: enough for the disk to be the limit, and for many lines of any length.
pub const TRAIL_READ: usize = 1024 * 1024;

/// Bytes that are held of the time index of a file of a trail: of one of 350 GB. What lies behind is read without.
pub const TRAIL_INDEX_MAX: u64 = 8 * 1024 * 1024;

/// How often a trail that is followed is looked at: a person does not notice, and a thousand times as rare as a busy loop.
pub const TRAIL_LOOK: Duration = Duration::from_millis(250);

/// One free text in an audit record, in bytes; enough for an error with its causes, too little to fill a disk with.
pub const TRAIL_TEXT_MAX: usize = 512;

/// What an audit record lists of changes, in bytes as JSON has them: half of [`TRAIL_RECORD_MAX`], and some two hundred keys
/// with whose they are. What goes beyond is counted.
pub const TRAIL_CHANGES_MAX: usize = 32 * 1024;

/// One forward id, in bytes; ours are far shorter.
pub const FORWARD_ID_MAX: usize = 128;

/// How long running forwards may go on after a required audit sink has failed.
pub const TRAIL_FAILURE_GRACE: Duration = Duration::from_secs(30);

/// How long forwards that run may go on after the signal to end, where the configuration does not say: long enough for most
/// queries, within what an operator waits for.
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

/// Records about strangers' failed logins written in one period; what exceeds them is counted and written as a sum.
pub const STRANGER_RECORDS: u32 = 50;

/// The period of [`STRANGER_RECORDS`].
pub const STRANGER_PERIOD: Duration = Duration::from_secs(10);

/// Rekey limits lie above OpenSSH's own, so that a client begins the exchange; AES-GCM's counter allows far more.
pub const REKEY_BYTES: usize = 64 << 30;

/// See [`REKEY_BYTES`].
pub const REKEY_TIME: Duration = Duration::from_secs(24 * 3600);

/// One question on the admin socket.
pub const ADMIN_LINE_MAX: usize = 64 * 1024;

/// One answer on the admin socket: a hundred thousand links.
pub const ADMIN_ANSWER_MAX: usize = 64 * 1024 * 1024;

/// A key file, a configuration or a registry file; anything larger is not one.
pub const FILE_MAX: u64 = 1024 * 1024;

/// How often an agent whose configuration gives times looks at the clock: its owner may set the clock, and it goes on while a
/// machine sleeps, which no timer notices. So a time is noticed at most this late.
pub const CLOCK_LOOK: Duration = Duration::from_secs(1);

/// Addresses of its own gateways and proxy that an agent remembers, to keep forwards away from them.
pub const WAYS_OUT: usize = 1_024;

/// Links of one agent that are held at once, over all its replicas, replaced ones that still carry forwards included: what
/// a few replicas may keep by [`REPLACED_LINKS`].
pub const LINKS_PER_AGENT: usize = 256;

/// Replicas of one agent whose last link, or last failure to link, a gateway remembers: more than an agent usually has, and
/// little enough for every agent that a registry can hold.
pub const REPLICAS_REMEMBERED: usize = 16;

/// How long a replica that is not linked any more is listed beside others of its agent that are: names come and go with
/// every rollout where they are drawn at random.
pub const ABSENT_LISTED: Duration = Duration::from_secs(24 * 3600);

/// Links to one gateway that an agent has replaced and that still carry forwards; the oldest is cut for one more. An idle
/// one costs less than a hundred kilobytes on either side, and with each of them links are replaced more seldom: it takes
/// more than three hundred thousand opens, with a forward among each link's that never ends, until one is cut.
pub const REPLACED_LINKS: usize = 64;

/// How long accepting pauses after an error that is not of one connection alone.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Packets that do nothing, such as ignored messages, unknown requests and windows that nobody needs, which a session may
/// send at once and be spared for. So many are some hundredths of a second of a core; an honest peer sends a few in a minute.
pub const IDLE_PACKETS: usize = 32_768;

/// The same for each second: a fraction of a hundredth of a core.
pub const IDLE_PACKETS_PER_SECOND: usize = 2_000;

/// Bytes of a packet that count as one more: reading them costs as much.
pub const BYTES_PER_PACKET: usize = 4 * 1024;

/// Bytes on a control channel that count as a packet: to read so many messages from them takes as long.
pub const BYTES_PER_IDLE_PACKET: usize = 64;

/// Packets about a channel that come and go with an open, on either side: the open or its answer, the ends and the close.
pub const PACKETS_PER_OPEN: usize = 4;

/// Bytes sent for which a peer may answer with a packet of its own, as with window or credit: stock peers do so for
/// 64 KiB or more.
pub const BYTES_PER_ANSWER: usize = 8 * 1024;

/// What a peer may ask for on one session that it never may, before the session is cut: an honest one asks for nothing.
pub const VIOLATIONS_PER_SESSION: usize = 64;

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

/// From an open stream to a finished login at a database, TLS included.
pub const DATABASE_LOGIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Saying goodbye to a database; without it the server only logs that a client went away.
pub const DATABASE_GOODBYE: Duration = Duration::from_secs(2);

/// One statement at a database, save those that copy a whole one. Longer than [`DATABASE_LOCK_TIMEOUT`], so that the
/// server's own explanation arrives first.
pub const DATABASE_STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Making, dropping or extending a database: a template may hold many gigabytes.
pub const DATABASE_COPY_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Waiting for a lock at a database. A run that was killed holds its lock until the server notices, which takes it as
/// long as the tunnel needs to close.
pub const DATABASE_LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a provisioning run looks whether another one has let go of the output file, within
/// [`DATABASE_LOCK_TIMEOUT`].
pub const OUTPUT_LOCK_RETRY: Duration = Duration::from_millis(100);

/// Rounds of observing and changing in one provisioning run. The first does the work, the second finds what a template
/// brought along; more than a few mean that the server does not keep what it confirms.
pub const PROVISION_ROUNDS: usize = 4;

/// Characters of a generated password: 192 bits.
pub const PASSWORD_LENGTH: usize = 32;
/// How long another program may keep a kubeconfig locked: it writes a file, and kubectl does not wait at all.
pub const KUBECONFIG_LOCK: Duration = Duration::from_secs(5);

/// How often it is looked whether it has let go.
pub const KUBECONFIG_LOCK_RETRY: Duration = Duration::from_millis(20);

/// Faults of a configuration that are shown; more than a person mends in one go are only counted.
pub const FAULTS_MAX: usize = 100;

/// Files and folders of a file registry; more than that belongs into a database.
pub const REGISTRY_ENTRIES_MAX: usize = 100_000;

/// A file registry is read once nothing in it has changed for this long, so that what an editor or `git pull` writes in
/// several steps is seen as one.
pub const REGISTRY_SETTLE: Duration = Duration::from_millis(100);

/// A file registry that does not come to rest is read anyhow after this long.
pub const REGISTRY_SETTLE_MAX: Duration = Duration::from_secs(2);

/// How often a file registry is looked at where the system does not tell of changes (network file systems do not): a
/// revocation is to hold within five seconds, and reading takes time, too.
pub const REGISTRY_POLL: Duration = Duration::from_secs(3);

/// How often it is looked whether a key has come near its end, at the least: clocks may be set.
pub const EXPIRIES_LOOKED_AT: Duration = Duration::from_secs(3600);

/// Notices of its key's end that an agent takes to heart on one link: there are three of each key, and an end that is moved
/// makes more. A gateway that goes on talks to nobody.
pub const KEY_NOTICES_PER_LINK: usize = 16;

/// How often `caponier keys rotate` asks a gateway whether an agent has come with its new key.
pub const ROTATION_POLL: Duration = Duration::from_millis(500);

/// Files of a registry that others may write and that are named one by one: more are as bad.
pub const EXPOSED_SHOWN: usize = 5;

/// How often the configuration file and the files that it names are looked at.
pub const CONFIG_POLL: Duration = Duration::from_secs(1);

/// A configuration is read once it has been the same for this long: an editor writes in several steps, and whoever has
/// changed it and sends SIGHUP comes before that.
pub const CONFIG_SETTLE: Duration = Duration::from_millis(700);

/// A configuration that does not come to rest is read anyhow after this long.
pub const CONFIG_SETTLE_MAX: Duration = Duration::from_millis(2500);

/// The clocks of file systems are coarse: within this time of a change, another one may leave all times and sizes the
/// same. Network file systems are the worst, with seconds.
pub const FILE_CLOCK: Duration = Duration::from_secs(2);

/// How often an operator is told that a faulty file registry is still not in force: a revocation in it is not either, and
/// one line is soon scrolled away.
pub const REGISTRY_REMINDER: Duration = Duration::from_secs(300);

/// Connections that the kernel holds for a listener until they are accepted: a thousand agents may come back at once.
pub const LISTEN_BACKLOG: i32 = 1_024;

/// Forwards that one principal may have at once, over all doors, unless `forwards_per_principal` says otherwise: more than
/// any pool of connections, far fewer than all principals share.
pub const FORWARDS_PER_PRINCIPAL: usize = 1_024;

/// Forwards that one organisation may have at once, unless `forwards_per_organisation` says otherwise: one of many cannot
/// take all places in the trail ([`TRAIL_QUEUE`]).
pub const FORWARDS_PER_ORGANISATION: usize = 8_192;

/// Forwards that an agent has at once, over all its links, unless `forwards` says otherwise: a quarter of the descriptors
/// that our unit for systemd gives it, and two organisations' worth.
pub const FORWARDS_PER_AGENT: usize = 16_384;

/// The most that a limit of live forwards can be set to: half of the places in the trail ([`TRAIL_QUEUE`]), of which each
/// live forward holds one.
pub const FORWARDS_MAX: usize = TRAIL_QUEUE / 2;

/// Sessions at the SSH door that one principal may have at once, unless `sessions_per_principal` says otherwise.
pub const SESSIONS_PER_PRINCIPAL: usize = 128;

/// The most that `sessions_per_principal` can be set to: each may make the gateway hold [`HELD_MAX`].
pub const SESSIONS_MAX: usize = 1_024;

/// Opens of one principal that may be under way at once, unless `pending_opens_per_principal` says otherwise: as many as it
/// may have forwards, because a pool of connections begins all at once. To be lowered where principals that share an agent
/// must not hold up each other with targets that do not answer.
pub const PENDING_OPENS_PER_PRINCIPAL: usize = FORWARDS_PER_PRINCIPAL;

/// Forwards that one principal may ask for in a second, refused ones included, unless `opens_per_second_per_principal` says
/// otherwise: about twice what one core opens, so that no honest program comes near it, and a loop that has run away
/// writes only so much into the trail on a faster one.
pub const OPENS_PER_SECOND_PER_PRINCIPAL: u32 = 10_000;

/// The same for one organisation, at the gateway and at each agent: two principals' worth.
pub const OPENS_PER_SECOND_PER_ORGANISATION: u32 = 20_000;

/// The most that a limit of opens per second can be set to: each writes two records or more into the trail, and several
/// times [`TRAIL_QUEUE`] in a second is more than any sink takes.
pub const OPENS_PER_SECOND_MAX: u32 = 100_000;

/// What may come at once after a pause, as the time in which the rate would allow it: browsers and pools begin with many.
pub const OPENS_BURST: Duration = Duration::from_secs(5);

/// Refusals for opens per second that become records of their own, a second and principal (organisation, at an agent);
/// what exceeds them is counted, and the sum recorded: at the end of a session, at a loopback door after [`FLOOD_PERIOD`].
pub const FLOOD_RECORDS_PER_SECOND: u32 = 5;

/// See [`FLOOD_RECORDS_PER_SECOND`].
pub const FLOOD_PERIOD: Duration = Duration::from_secs(10);

/// The longest idle time or life of a forward that can be set: a year. Who wants more wants no limit, which is the default
/// of both, since a psql that idles overnight is legitimate.
pub const FORWARD_LIFE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// How often, in an idle time, a forward is looked at: it ends at most so much of it too late, and moving bytes costs it
/// nothing.
pub const IDLE_LOOKS: u32 = 4;

/// Connections to a network proxy at once, unless its configuration says otherwise: each holds two descriptors and the
/// buffers of two sockets, and may hold those of two TLS sessions besides.
pub const PROXY_CONNECTIONS: usize = 4_096;

/// The same from one address: a node whose clients share it has several hundred, and four of its kind fit in.
pub const PROXY_CONNECTIONS_PER_ADDRESS: usize = 1_024;

/// The most that an operator may allow a network proxy: each has a place in the trail, and this is half of them.
pub const PROXY_CONNECTIONS_MAX: usize = FORWARDS_MAX;

/// Connections to a network proxy that have not said what they want. More than at a gateway, where a login comes but once: HTTP
/// clients keep connections open that they have no use for yet.
pub const PROXY_SEATS: usize = 1_024;

/// The same from one address: as many as a client opens in a burst, and four such clients fit in.
pub const PROXY_SEATS_PER_ADDRESS: usize = 256;

/// How long the head of a request may take, and a connection may lie between two of them: the time of a login, which is about
/// as much work for a client. Who has a use for it again makes another one.
pub const HEAD_TIMEOUT: Duration = LOGIN_GRACE;

/// The head of a request, and what is buffered of its body: what other servers take, with cookies and tokens.
pub const HEAD_MAX: usize = 64 * 1024;

/// The headers of a request: what other servers take.
pub const HEADERS_MAX: usize = 100;

/// Upstreams and listeners in one configuration: each listener holds a socket, and a health report names each upstream.
pub const PROXY_PARTS: usize = 64;

/// Questions about health and metrics at once at each listener: whoever asks does so once in a few seconds.
pub const HEALTH_CONNECTIONS: usize = 16;

/// How long an upstream has for its TLS handshake: as long as a proxy for its answer.
pub const OUTBOUND_HANDSHAKE: Duration = PROXY_TIMEOUT;

/// Names that a listener of a network proxy takes its clients' certificates for: each is compared with each name of a
/// certificate.
pub const CLIENT_NAMES_MAX: usize = 256;

/// The head of a question about health; no client's own is longer than a few hundred bytes, and the library wants no less.
pub const HEALTH_HEAD_MAX: usize = 8 * 1024;

/// How long a question about health may take to be asked: probes send it at once.
pub const HEALTH_HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a thread may take to show that it gets to its work: far more than any piece of work of ours, and less than any
/// supervisor waits before it restarts a program.
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

/// How long an answer about an upstream's health counts, so that nobody who asks for it causes more than a few connections.
pub const HEALTH_KEPT: Duration = Duration::from_secs(10);

/// The longest token, in characters: claims with all the targets that one may have, signed with the largest RSA key, and
/// still a small part of what an HTTP client sends as a header.
pub const TOKEN_MAX: usize = 4_096;

/// The longest time that a token may be good for: whoever needs a key for longer is to have a key.
pub const TOKEN_LIFE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// How far the clock of whoever signs a token may be from the gateway's, either way: what NTP keeps is far closer, and a clock
/// that is a minute wrong is noticed elsewhere.
pub const TOKEN_LEEWAY: Duration = Duration::from_secs(60);

/// The most targets that a token may name: it is for one purpose, and the grant is the place for lists.
pub const TOKEN_TARGETS_MAX: usize = 16;

/// The longest id of a token: a UUID's length, almost twice.
pub const TOKEN_ID_MAX: usize = 64;

/// Series of one metric: an operator's agents, rules and sinks are mostly fewer, and a scraper keeps each for weeks. What
/// comes on top is counted as one.
pub const METRIC_SERIES_MAX: usize = 1_024;

/// Forwards that have ended and whose traces wait for the exporter: as many as end in a second at the highest rate that was
/// measured, and a few hundred kilobytes.
pub const TRACE_QUEUE: usize = 4_096;

/// Forwards whose traces go into one message to the collector: 512 KiB, an eighth of what collectors take.
pub const TRACE_BATCH: usize = 256;

/// How long a trace may wait for others that go with it.
pub const TRACE_PERIOD: Duration = Duration::from_secs(1);

/// How long a collector has for a message; another one waits meanwhile, and those behind it are dropped.
pub const TRACE_TIMEOUT: Duration = Duration::from_secs(5);

/// Lines of the log that one place in the program may write in [`LOG_PERIOD`]: as many as a restart of a gateway with some
/// dozens of agents causes, and no more than anybody reads.
pub const LOG_BURST: u32 = 100;

/// After so long each place may write as many again, and says how many were left out.
pub const LOG_PERIOD: Duration = Duration::from_secs(10);

/// How long one stage of an examination may take unless it is said otherwise: longer than any step of a link may, so that the
/// step's own error, which says more, comes first.
pub const EXAMINED_STAGE: Duration = Duration::from_secs(30);

/// The longest time that may be given to a stage: who waits longer wants something else.
pub const EXAMINED_STAGE_MAX: Duration = Duration::from_secs(600);

/// How far two clocks may be apart before it is worth a word: HTTP tells whole seconds, and an answer may take some.
pub const CLOCK_NOTABLE: Duration = Duration::from_secs(10);

/// How many targets one examination dials: an allowlist that spells out more is not one that somebody reads the report of.
pub const EXAMINED_TARGETS: usize = 200;

/// How long a target has to answer: a dial has [`CONNECT_TIMEOUT`] for each address, and TLS takes a few round trips.
pub const EXAMINED_TARGET: Duration = Duration::from_secs(15);

/// How long a target may take to speak first, as MySQL and SSH do, before it is spoken to.
pub const GREETING_PATIENCE: Duration = Duration::from_millis(500);

/// What is read of a target's greeting: the longest that a MySQL server sends is shorter.
pub const GREETING_MAX: usize = 1024;

/// How often an agent is examined over its link at most: each time it dials all its targets.
pub const EXAMINED_EVERY: Duration = Duration::from_secs(60);

/// How long the gateway waits for what an agent found: it looks at its targets one after another, most answer at once.
pub const EXAMINED_REMOTE: Duration = Duration::from_secs(120);

/// How many findings a report over a link has: a finding is less than 256 bytes, and the report has to fit in a message.
pub const EXAMINED_REPORT: usize = 128;

/// How much of a registry the doctor goes through to see how its files' times stand to the clock: far more than any folder has.
pub const REGISTRY_ENTRIES: usize = 100_000;

/// Room on the trail's disk below which it counts as full: a day's last records still fit in, nothing else does.
pub const TRAIL_ROOM_LEAST: u64 = 1024 * 1024;

/// Room on the trail's disk that is worth a word: a busy gateway writes that much in hours.
pub const TRAIL_ROOM: u64 = 1024 * 1024 * 1024;

/// Descriptors below which a gateway runs short under a load that is ordinary: each forward takes up to two.
pub const DESCRIPTORS_LEAST: u64 = 8_192;

/// How long a gateway has to say what time it is: the connection that is to become a session waits meanwhile, and the gateway
/// waits [`LOGIN_GRACE`] for it.
pub const CLOCK_PATIENCE: Duration = Duration::from_secs(6);

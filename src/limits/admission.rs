//! From a connection to a login: who may wait, how long, with how many bytes; and what certificates and tokens may hold.

use std::time::Duration;

/// From `accept` to a finished login, on either side of a link and at the SSH door. Long enough for a hardware key to
/// be touched, short enough that strangers cannot hold connections.
pub const LOGIN_GRACE: Duration = Duration::from_secs(20);

/// How long the gateway waits for the peer's identification string before it sends its own: clients that wait for the
/// server's line (ssh-keyscan, which waits for 5 s) are served, agents and ordinary clients speak at once. On the same
/// port come clients of TLS and HTTP, to whom that line is garbage: it has to be later than a first word that was lost
/// on the way and sent again, which is a second after the first (RFC 6298), or that a busy host is slow to make.
pub const IDENTIFICATION_PATIENCE: Duration = Duration::from_millis(1_500);

/// The longest identification string, with its line end (RFC 4253 §4.2).
pub const IDENTIFICATION_MAX: usize = 255;

/// A balancer's PROXY protocol header: its addresses, and with room to spare what else balancers tell of a connection.
pub const PROXY_HEADER_MAX: usize = 2 * 1024;

/// From `accept` to the end of that header, which a balancer sends at once.
pub const PROXY_HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes that are read at once while it is not known whether a connection speaks SSH, TLS or HTTP: the longest
/// beginning has eight, and most first messages come whole.
pub const SNIFF_MAX: usize = 2 * 1024;

/// The head of an HTTP request: a token of the largest size ([`TOKEN_MAX`]) in base64, and what clients and balancers
/// add.
pub const HTTP_HEAD_MAX: usize = 16 * 1024;

/// Headers of an HTTP request; browsers send twenty, and balancers add a dozen.
pub const HTTP_HEADERS_MAX: usize = 64;

/// What a client that is refused may have sent behind that for which it is, so that it still gets to read the answer:
/// what a socket takes without waiting.
pub const REFUSED_BYTES: usize = 64 * 1024;

/// How long such a client has to read it and to hang up.
pub const REFUSED_PATIENCE: Duration = Duration::from_secs(2);

/// Bytes that are read from a client in a TLS handshake: a hello with post-quantum keys is two kilobytes, and a
/// client's certificate with those between it and its authority comes to less than half of this. The TLS library alone
/// would take messages of 64 KiB, and keep them.
pub const TLS_HANDSHAKE_BYTES: usize = 32 * 1024;

/// Certificates of a gateway, each for some names: every handshake looks through them.
pub const TLS_CERTIFICATES_MAX: usize = 64;

/// Bits that tell the addresses of a network of balancers apart that end TLS: 256 of them. Whoever is at one of these
/// is believed without proof, and a network in which anything else lives as well would be a way around TLS.
pub const TERMINATOR_BITS: u8 = 8;

/// Certificates in one file, from an end's own up to its authority: honest chains have three or four.
pub const TLS_CHAIN_MAX: usize = 16;

/// What is read at once from a socket under TLS: a record of the largest size. The TLS library asks for 4 KiB at a
/// time.
pub const TLS_READ_AHEAD: usize = 17 * 1024;

/// Connections that have not logged in yet, over the whole gateway.
pub const UNAUTHENTICATED_MAX: usize = 256;

/// Connections from one address that have not logged in yet.
pub const UNAUTHENTICATED_PER_ADDRESS: usize = 64;

/// How long a seat among [`UNAUTHENTICATED_MAX`] is one's own when all are taken and nobody has more than others: an
/// honest login takes a second, and longer only where a key has to be touched.
pub const SEAT_SURE: Duration = Duration::from_secs(5);

/// Connections that one address makes in a second on average before it is held against it: as many as two threads take
/// up.
pub const CONNECTIONS_PER_SECOND_PER_ADDRESS: u32 = 200;

/// What may come at once, as the time in which [`CONNECTIONS_PER_SECOND_PER_ADDRESS`] would allow it: a thousand agents
/// behind one address that come back at the same time, are turned away for want of [seats](UNAUTHENTICATED_PER_ADDRESS)
/// and try again.
pub const CONNECTIONS_BURST: Duration = Duration::from_secs(60);

/// What is held against an address without consequences, in the seconds after which it is forgiven: a dozen logins with
/// a wrong key, which is a person who looks for the right one, or an agent's attempts in its first minutes.
pub const PENALTY_TOLERANCE: Duration = Duration::from_secs(60);

/// How long an address is turned away the first time: short enough for somebody who has found the mistake.
pub const PENALTY_FIRST: Duration = Duration::from_secs(15);

/// How long at most: longer keeps out nobody who has other addresses, and whoever gets the address next.
pub const PENALTY_CAP: Duration = Duration::from_secs(600);

/// By how much less counts what comes from an address from which somebody is logged in: a few agents of many behind it
/// that are set up wrongly, each of which tries again every [`RECONNECT_CAP`](super::RECONNECT_CAP) at least.
pub const PENALTY_MILD: u32 = 10;

/// Addresses that something is held against: a megabyte or two.
pub const PENALTIES_MAX: usize = 16_384;

/// Handshakes under way at once over the whole gateway, from the end of the identification strings to the login: a
/// thousand agents that come back at the same time are let in one after another, each soon, instead of all at once and
/// none in time.
pub const HANDSHAKES: usize = 64;

/// Handshakes under way at once from one address: the same share of all as one address has of
/// [the connections](UNAUTHENTICATED_PER_ADDRESS) without a login.
pub const HANDSHAKES_PER_ADDRESS: usize = HANDSHAKES * UNAUTHENTICATED_PER_ADDRESS / UNAUTHENTICATED_MAX;

/// How long a handshake keeps its place among [`HANDSHAKES`]. What takes longer waits for its peer and costs nothing: a
/// key that has to be touched may go on, and a stranger who dawdles keeps nobody else out.
pub const HANDSHAKE_HOLD: Duration = Duration::from_secs(5);

/// Between the beginnings of two handshakes on one thread, once [`HANDSHAKE_BURST`] have begun: a handshake takes about
/// a millisecond of processor time, so that they take a tenth of a thread at most, and what else runs there goes on
/// between.
pub const HANDSHAKE_PACE: Duration = Duration::from_millis(10);

/// Handshakes that may begin at once on one thread that has had none for a while: a person's `ssh` never waits.
pub const HANDSHAKE_BURST: u32 = 16;

/// Bytes that a session takes from its peer before the login: a key exchange is four kilobytes, and an ssh-agent that
/// offers all of [`LOGIN_ATTEMPTS`] keys with certificates comes to less than half of this.
pub const LOGIN_BYTES: usize = 128 * 1024;

/// The largest packet before the login: what RFC 4253 §6.1 wants everybody to take. The SSH library makes room for a
/// packet when its length has come, and keeps a key exchange's twice over, so that this is what a stranger's memory
/// goes by.
pub const LOGIN_PACKET_MAX: usize = 35_000;

/// Bytes that a peer has not taken before the login, at which its session is cut: ours are a few kilobytes.
pub const LOGIN_UNSENT: usize = 64 * 1024;

/// Logins refused on one connection before it is closed; an ssh-agent with a dozen keys still gets to the right one.
pub const LOGIN_ATTEMPTS: usize = 16;

/// Keys that one connection may ask about without an attempt being counted, because they were acknowledged: where
/// certificates are accepted that is every key, and the answer costs a signature's verification. An ssh-agent holds
/// fewer.
pub const LOGIN_PROBES: usize = 64;

/// Longest OpenSSH certificate: with the largest keys accepted and a hundred principals it is half of this.
pub const CERTIFICATE_MAX: usize = 16 * 1024;

/// Longest key id of a certificate, so that it is told whole in the trail.
pub const CERTIFICATE_KEY_ID_MAX: usize = 256;

/// Most principals of a certificate, and most options: as many as OpenSSH reads.
pub const CERTIFICATE_NAMES_MAX: usize = 256;

/// What rests on a certificate looks at the clock at least this often: a timer for its end does not notice that the
/// clock was set meanwhile.
pub const CERTIFICATE_LOOK: Duration = Duration::from_secs(3);

/// Certificates that a TLS client may show, with its own: a few between it and its authority. Those of a link are kept
/// for as long as it lives, to be judged again.
pub const PEER_CHAIN_MAX: usize = 8;

/// Most names of a TLS certificate that are looked at: one that stands for more hosts stands for no one agent.
pub const PEER_NAMES_MAX: usize = 100;

/// Names of TLS certificates that stand for one agent or principal: a few hosts or renewals, not a fleet.
pub const CERTIFICATE_NAMES_OF_ONE: usize = 16;

/// Certificates of client CAs in one place, that of an organisation or an agent or a listener: each may cost a chain to
/// be built when somebody shows a certificate.
pub const CLIENT_CAS_MAX: usize = 16;

/// What is left of the life of a revocation list when its operator is warned, as a share of the whole: lists live for
/// hours or for months.
pub const CRL_WARN_SHARE: i32 = 4;

/// What is left of the life of a client CA when its operator is warned, as for keys.
pub const CA_WARN: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a refused login waits: constant, so that a refusal does not tell by its time what was wrong.
pub const LOGIN_REFUSAL_DELAY: Duration = Duration::from_millis(50);

/// How long accepting pauses after an error that is not of one connection alone.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections that the kernel holds for a listener until they are accepted: a thousand agents may come back at once.
pub const LISTEN_BACKLOG: i32 = 1_024;

/// The longest token, in characters: claims with all the targets that one may have, signed with the largest RSA key,
/// and still a small part of what an HTTP client sends as a header.
pub const TOKEN_MAX: usize = 4_096;

/// The longest time that a token may be good for: whoever needs a key for longer is to have a key.
pub const TOKEN_LIFE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// How far the clock of whoever signs a token may be from the gateway's, either way: what NTP keeps is far closer, and
/// a clock that is a minute wrong is noticed elsewhere.
pub const TOKEN_LEEWAY: Duration = Duration::from_secs(60);

/// The most targets that a token may name: it is for one purpose, and the grant is the place for lists.
pub const TOKEN_TARGETS_MAX: usize = 16;

/// The longest id of a token: a UUID's length, almost twice.
pub const TOKEN_ID_MAX: usize = 64;

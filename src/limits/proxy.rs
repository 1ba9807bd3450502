//! The network proxy.

use std::time::Duration;

use super::{FORWARDS_MAX, LOGIN_GRACE, PROXY_TIMEOUT};

/// Connections to a network proxy at once, unless its configuration says otherwise: each holds two descriptors and the
/// buffers of two sockets, and may hold those of two TLS sessions besides.
pub const PROXY_CONNECTIONS: usize = 4_096;

/// The same from one address: a node whose clients share it has several hundred, and four of its kind fit in.
pub const PROXY_CONNECTIONS_PER_ADDRESS: usize = 1_024;

/// The most that an operator may allow a network proxy: each has a place in the trail, and this is half of them.
pub const PROXY_CONNECTIONS_MAX: usize = FORWARDS_MAX;

/// Connections to a network proxy that have not said what they want. More than at a gateway, where a login comes but
/// once: HTTP clients keep connections open that they have no use for yet.
pub const PROXY_SEATS: usize = 1_024;

/// The same from one address: as many as a client opens in a burst, and four such clients fit in.
pub const PROXY_SEATS_PER_ADDRESS: usize = 256;

/// How long the head of a request may take, and a connection may lie between two of them: the time of a login, which is
/// about as much work for a client. Who has a use for it again makes another one.
pub const HEAD_TIMEOUT: Duration = LOGIN_GRACE;

/// The head of a request, and what is buffered of its body: what other servers take, with cookies and tokens.
pub const HEAD_MAX: usize = 64 * 1024;

/// The headers of a request: what other servers take.
pub const HEADERS_MAX: usize = 100;

/// Upstreams and listeners in one configuration: each listener holds a socket, and a health report names each upstream.
pub const PROXY_PARTS: usize = 64;

/// How long an upstream has for its TLS handshake: as long as a proxy for its answer.
pub const OUTBOUND_HANDSHAKE: Duration = PROXY_TIMEOUT;

/// Names that a listener of a network proxy takes its clients' certificates for: each is compared with each name of a
/// certificate.
pub const CLIENT_NAMES_MAX: usize = 256;

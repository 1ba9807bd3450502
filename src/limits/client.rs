//! The listeners of `caponier forward`.

use std::time::Duration;

/// From a connection to a local SOCKS or HTTP proxy to the end of its request: programs on the same machine ask at
/// once.
pub const FRONT_TIMEOUT: Duration = Duration::from_secs(10);

/// What such a request may take; a CONNECT is a few hundred bytes, and credentials that nobody asked for are some more.
pub const FRONT_HEAD_MAX: usize = 16 * 1024;

/// How long a local connection has to read why it was refused.
pub const FRONT_FAREWELL: Duration = Duration::from_secs(2);

/// Local listeners of one command: each takes a descriptor, and as many connections as a session has channels.
pub const FRONTS_MAX: usize = 256;

/// A file of forwards: that many lines with the longest names, and as many comments.
pub const FORWARDS_FILE_MAX: u64 = 256 * 1024;

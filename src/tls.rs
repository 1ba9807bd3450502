//! TLS, as whoever asks for a connection and as whoever answers.
//!
//! Promised: TLS 1.3, or 1.2 with ephemeral keys and authenticated ciphers, and nothing else, with no renegotiation, no
//! early data, no compression and no secret written anywhere; the provider, its suites and its groups are named here and
//! never taken from the process. A client verifies the server's chain *and* name; there is no mode in between, and nothing
//! that falls back to clear text. Key exchange is hybrid with ML-KEM where the other end knows it.
//!
//! **No session is resumed**, at either end. A resumed session takes the client's certificate from the ticket, without
//! asking for a signature and without the verifier: what was revoked, expired or withdrawn since would pass the handshake,
//! and a key that was taken from a disk yesterday would do without the certificate of today. What resumption saves is a
//! signature, a millisecond at most, and links and tunnels last.
//!
//! This and what lies below are the only modules that name the TLS library:
//!
//! - [`roots`](self::TlsError) says whom a client trusts;
//! - [`Identity`] is a certificate with its key, from files;
//! - [`ClientOptions`] and [`connect`] are the outbound end;
//! - [`Acceptor`] is the inbound one, with [`Certificates`] by name and a [`ClientPolicy`];
//! - [`PeerChain`] is what a client has shown and proved to have the key of; [`judge`] says what that is worth, and [`names`] whose
//!   it is;
//! - [`TlsStream`] is the connection.

mod asked;
mod client;
mod identity;
mod issuer;
pub mod judge;
pub mod names;
mod peer;
mod proof;
mod roots;
mod server;
mod stream;
mod witness;

use std::sync::{Arc, LazyLock};

use rustls::SupportedProtocolVersion;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls_pki_types::ServerName;

pub use asked::connect_bare;
pub use client::{ClientConfig, ClientOptions, ConnectError, client, connect};
pub use identity::{Identity, IdentityError};
pub use judge::{ClientAuth, Trust};
pub use names::{PeerCertificate, Wanted};
pub use peer::PeerChain;
pub use roots::TlsError;
pub use server::{AcceptError, Accepted, Acceptor, Certificates, ClientPolicy, Gate};
pub use stream::TlsStream;
pub use witness::{Shown, connect_seeing, look};

/// What a link and a session of ours say that they speak inside: SSH.
pub const ALPN_SSH: &[u8] = b"caponier/1";

/// HTTP, which leads on to WebSocket or CONNECT.
pub const ALPN_HTTP: &[u8] = b"http/1.1";

/// HTTP/2, which nothing of ours speaks: for those whose bytes are passed on as they are.
pub const ALPN_HTTP2: &[u8] = b"h2";

/// Whether a certificate could carry `name`: a DNS name or a literal address.
#[must_use]
pub fn is_server_name(name: &str) -> bool {
    ServerName::try_from(name).is_ok()
}

const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

/// What is offered and accepted.
fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

/// In this order.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    use aws_lc_rs::cipher_suite as suite;
    use aws_lc_rs::kx_group as group;
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            suite::TLS13_AES_256_GCM_SHA384,
            suite::TLS13_AES_128_GCM_SHA256,
            suite::TLS13_CHACHA20_POLY1305_SHA256,
            suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
            suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
            suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
            suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
            suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![group::X25519MLKEM768, group::X25519, group::SECP256R1, group::SECP384R1],
        ..aws_lc_rs::default_provider()
    })
});

#[cfg(test)]
mod tests;

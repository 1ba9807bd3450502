//! The client side: a session at a gateway's SSH door or at any bastion, an agent that listens or a stock `sshd`, for
//! `caponier forward` and `caponier provision`.
//!
//! Promised: the server's host key is pinned, by a fingerprint or a `known_hosts` file, and never trusted because it is
//! the first one seen; where a CA is named that vouches for it, a certificate of that CA, with the server's name, does as
//! well; what the server opens toward us is refused; a server that is none of ours is spoken to as any stock client does,
//! with the same list of algorithms.
//!
//! With a [`Certified`] key its certificate is shown first, and the plain key where that is not taken, as `ssh` does.
//!
//! What waits on what: a [`Session`] is one task of the SSH library. Each listener of [`forward`] has a task that accepts,
//! and each connection one that moves its bytes; all end with the stop token.

mod certified;
mod forward;
mod front;
mod keeper;
pub mod kubeconfig;
mod pin;
mod server;
mod session;

use crate::identity::PrivateKey;
use crate::tunnel::connect::Egress;
use crate::tunnel::dial::Tls;

pub use certified::{Certified, CertifiedError, doubt};
pub use forward::{Forward, forward};
pub use front::Front;
pub use pin::{Pin, PinError};
pub use server::{SSH_PORT, Server, User, UserError};
pub use session::{OpenError, Session, SessionError, connect};

/// How to log in to a server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where, and as whom.
    pub server: Server,
    /// Our key.
    pub key: PrivateKey,
    /// A CA's certificate for it, which is shown before the plain key.
    pub certificate: Option<Certified>,
    /// The server's host keys, of which it must show one.
    pub pin: Pin,
    /// Directly, or through a proxy.
    pub egress: Egress,
    /// How TLS is made with the gateway, if it is.
    pub tls: Option<Tls>,
}

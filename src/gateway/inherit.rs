//! Listeners that were opened by somebody else (sd_listen_fds(3)), so that a new process accepts while the old one drains,
//! and what nobody has accepted yet is not lost in between.
//!
//! Promised: only TCP sockets that listen are taken; each is matched with an address of the configuration by its own local
//! address, and one that is not in the configuration is an error: it would else be open with nobody behind it.

use std::io;
use std::net::{SocketAddr, TcpListener};

use listenfd::ListenFd;
use rustix::net::sockopt;

use crate::limits;

/// Listeners that this process was started with.
#[derive(Debug, Default)]
pub struct Inherited(Vec<(SocketAddr, TcpListener)>);

/// Why inherited listeners cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// Too many, or not a number.
    #[error("LISTEN_FDS={0} is not a number of sockets that could be meant: at most {max} are taken", max = limits::INHERITED_MAX)]
    Number(String),
    /// The wrong kind.
    #[error(
        "socket {index} of LISTEN_FDS is not a TCP listener; only ListenStream= with an address and port is of use here"
    )]
    Kind {
        /// Which, from 0.
        index: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No address of ours.
    #[error(
        "LISTEN_FDS has a socket that listens on {0}, which is neither in [gateway] listen nor a [[listener]]'s \
         address nor the listen of a [[local]]: add it there, in the same form, or take it out of the socket unit"
    )]
    Unknown(SocketAddr),
}

impl Inherited {
    /// Takes what the environment names, and the variables out of it. To be called before anything else is opened or
    /// started: descriptors are known by their numbers alone.
    ///
    /// # Errors
    /// If a socket is no TCP listener.
    pub fn from_environment() -> Result<Self, InheritError> {
        if let Some(number) = std::env::var_os("LISTEN_FDS") {
            let number = number.to_string_lossy();
            if number.parse::<usize>().is_ok_and(|number| number > limits::INHERITED_MAX) || number.starts_with('-') {
                return Err(InheritError::Number(number.into_owned()));
            }
        }
        let mut sockets = ListenFd::from_env();
        let mut taken = Vec::new();
        for index in 0..sockets.len() {
            let kind = |source| InheritError::Kind { index, source };
            let Some(listener) = sockets.take_tcp_listener(index).map_err(kind)? else { continue };
            if !sockopt::socket_acceptconn(&listener).map_err(|error| kind(error.into()))? {
                return Err(kind(io::Error::new(io::ErrorKind::InvalidInput, "it does not listen")));
            }
            listener.set_nonblocking(true).map_err(kind)?;
            taken.push((listener.local_addr().map_err(kind)?, listener));
        }
        Ok(Self(taken))
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The one that listens on `address`, if there is one.
    pub(super) fn take(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let at = self.0.iter().position(|(known, _)| *known == address)?;
        Some(self.0.swap_remove(at).1)
    }

    /// Makes sure that all have been taken.
    pub(super) fn all_taken(self) -> Result<(), InheritError> {
        match self.0.first() {
            Some((address, _)) => Err(InheritError::Unknown(*address)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_matched_by_their_address_and_none_may_be_left() {
        let listeners: Vec<_> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").expect("a listener")).collect();
        let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().expect("its address")).collect();
        let mut inherited = Inherited(addresses.iter().copied().zip(listeners).collect());
        assert!(inherited.take(SocketAddr::from(([127, 0, 0, 1], 1))).is_none());
        assert!(inherited.take(SocketAddr::from(([0, 0, 0, 0], addresses[0].port()))).is_none());
        let taken = inherited.take(addresses[0]).expect("inherited");
        assert_eq!(taken.local_addr().expect("its address"), addresses[0]);
        assert!(inherited.take(addresses[0]).is_none());
        assert!(matches!(inherited.all_taken(), Err(InheritError::Unknown(address)) if address == addresses[1]));
    }
}

//! Who may take up a handshake, and what a connection turns out to be.
//!
//! Promised: a connection that has not logged in holds a [`Seat`], of which there are few, in all and per address; its
//! first line is read under a deadline and a length, and nothing else is read before it is judged. A peer that waits for
//! our line first gets it after a short patience.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::wire::{IdentificationError, Peer};
use crate::limits;

/// Counts the connections that have not logged in.
#[derive(Debug, Clone)]
pub struct Room(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
    max: usize,
    max_per_address: usize,
}

/// A place among the connections that have not logged in; given back on drop.
#[derive(Debug)]
pub struct Seat {
    room: Room,
    address: IpAddr,
}

/// Why there is no seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// Too many in all.
    Total,
    /// Too many from this address.
    Address,
}

impl Room {
    /// Room for so many in all, and so many from one address.
    #[must_use]
    pub fn new(max: usize, max_per_address: usize) -> Self {
        Self(Arc::new(Mutex::new(Taken { max, max_per_address, ..Taken::default() })))
    }

    /// Takes a seat.
    ///
    /// # Errors
    /// If there is none.
    pub fn seat(&self, address: IpAddr) -> Result<Seat, Full> {
        let address = network(address);
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.total >= taken.max {
            return Err(Full::Total);
        }
        let max = taken.max_per_address;
        let of_address = taken.by_address.entry(address).or_default();
        if *of_address >= max {
            return Err(Full::Address);
        }
        *of_address += 1;
        taken.total += 1;
        Ok(Seat { room: self.clone(), address })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.total -= 1;
        if let Some(of_address) = taken.by_address.get_mut(&self.address) {
            *of_address -= 1;
            if *of_address == 0 {
                taken.by_address.remove(&self.address);
            }
        }
    }
}

/// What counts as one address: of IPv6 the /64, since whoever has one address has all of it.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
        v4 => v4,
    }
}

/// A connection whose peer has identified itself.
#[derive(Debug)]
pub struct Greeted {
    /// Who it says it is.
    pub peer: Peer,
    /// Everything read so far, to be replayed.
    pub head: Bytes,
    /// The line that has already been sent in our name, if any, without its end.
    pub said: Option<&'static str>,
}

/// Why a connection ended before its peer had identified itself.
#[derive(Debug, thiserror::Error)]
pub enum GreetError {
    /// The connection failed.
    #[error("the connection failed before the peer identified itself")]
    Io(#[source] io::Error),
    /// The peer closed it.
    #[error("the peer closed the connection before it identified itself")]
    Closed,
    /// Time.
    #[error("the peer has not identified itself in time")]
    Timeout,
    /// What it said.
    #[error(transparent)]
    Identification(#[from] IdentificationError),
}

/// Reads the peer's identification string. `head` is what was read of the stream before. Where `first` is given, a peer that
/// stays silent for [`limits::IDENTIFICATION_PATIENCE`] is sent that line.
///
/// # Errors
/// If the peer does not identify itself by `deadline`, or not as it should.
pub async fn greet<S>(
    stream: &mut S,
    head: Bytes,
    first: Option<&'static str>,
    deadline: Instant,
) -> Result<Greeted, GreetError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut read = BytesMut::from(&head[..]);
    let mut said = None;
    let patience = Instant::now() + limits::IDENTIFICATION_PATIENCE;
    loop {
        if let Some(end) = read.iter().position(|byte| *byte == b'\n') {
            if end >= limits::IDENTIFICATION_MAX {
                return Err(IdentificationError::TooLong.into());
            }
            let line = &read[..end];
            let peer = Peer::parse(line.strip_suffix(b"\r").unwrap_or(line))?;
            return Ok(Greeted { peer, head: read.freeze(), said });
        }
        // Judged before the line is complete, so that what is not SSH is not waited for.
        if !read.starts_with(&b"SSH-"[..read.len().min(4)]) {
            return Err(Peer::parse(&read[..read.len().min(200)])
                .err()
                .unwrap_or(IdentificationError::Malformed)
                .into());
        }
        if read.len() >= limits::IDENTIFICATION_MAX {
            return Err(IdentificationError::TooLong.into());
        }
        match first {
            Some(line) if said.is_none() && read.is_empty() => {
                match timeout_at(patience.min(deadline), stream.read_buf(&mut read)).await {
                    Ok(Ok(0)) => return Err(GreetError::Closed),
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => return Err(GreetError::Io(error)),
                    Err(_) => {
                        let line_end = format!("{line}\r\n");
                        timeout_at(deadline, stream.write_all(line_end.as_bytes()))
                            .await
                            .map_err(|_| GreetError::Timeout)?
                            .map_err(GreetError::Io)?;
                        said = Some(line);
                    }
                }
            }
            _ => match timeout_at(deadline, stream.read_buf(&mut read)).await {
                Ok(Ok(0)) => return Err(GreetError::Closed),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(GreetError::Io(error)),
                Err(_) => return Err(GreetError::Timeout),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::tunnel::wire;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    async fn greet_with(bytes: &[u8]) -> Result<Greeted, GreetError> {
        let (mut near, mut far) = tokio::io::duplex(4096);
        far.write_all(bytes).await.expect("written");
        drop(far);
        greet(&mut near, Bytes::new(), Some(wire::DOOR_LINE), soon()).await
    }

    #[tokio::test]
    async fn refuses_garbage_before_its_line_is_complete() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"\x16\x03\x01\x02\x00",
            b"SSX",
            b"\nSSH-2.0-x\r\n",
            b"hello\r\nSSH-2.0-x\r\n",
        ] {
            assert!(
                matches!(greet_with(bytes).await, Err(GreetError::Identification(IdentificationError::NotSsh(_)))),
                "{bytes:?}"
            );
        }
        let long = [&b"SSH-2.0-"[..], &[b'x'; 2000]].concat();
        assert!(matches!(greet_with(&long).await, Err(GreetError::Identification(IdentificationError::TooLong))));
        assert!(matches!(greet_with(b"SSH-2.0-x").await, Err(GreetError::Closed)));
        assert!(matches!(greet_with(b"").await, Err(GreetError::Closed)));
    }

    #[tokio::test(start_paused = true)]
    async fn serves_a_silent_client_and_ends_one_that_stays_so() {
        let (mut near, mut far) = tokio::io::duplex(4096);
        let error = greet(&mut near, Bytes::new(), Some(wire::DOOR_LINE), soon()).await.expect_err("silent");
        assert!(matches!(error, GreetError::Timeout), "{error:?}");
        drop(near);
        let mut said = String::new();
        far.read_to_string(&mut said).await.expect("read");
        assert_eq!(said, "SSH-2.0-caponier_1\r\n");
    }

    #[tokio::test]
    async fn keeps_what_follows_the_line() {
        let greeted = greet_with(b"SSH-2.0-OpenSSH_9.2\r\nmore").await.expect("greeted");
        assert_eq!(greeted.peer, Peer::Stock);
        assert_eq!(&greeted.head[..], b"SSH-2.0-OpenSSH_9.2\r\nmore");
        assert_eq!(greeted.said, None);
    }

    #[test]
    fn seats_are_bounded_and_come_back() {
        let room = Room::new(3, 2);
        let a: IpAddr = "10.0.0.1".parse().expect("an address");
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().expect("an address");
        let first = room.seat(a).expect("a seat");
        let _second = room.seat(mapped).expect("a seat");
        assert_eq!(room.seat(a).expect_err("full"), Full::Address);
        let _third = room.seat("2001:db8::1".parse().expect("an address")).expect("a seat");
        assert_eq!(room.seat("10.0.0.2".parse().expect("an address")).expect_err("full"), Full::Total);
        drop(first);
        assert!(room.seat(a).is_ok());
    }

    #[test]
    fn one_ipv6_network_is_one_address() {
        let room = Room::new(10, 1);
        let _seat = room.seat("2001:db8::1".parse().expect("an address")).expect("a seat");
        assert_eq!(room.seat("2001:db8::ffff".parse().expect("an address")).expect_err("full"), Full::Address);
        assert!(room.seat("2001:db8:0:1::1".parse().expect("an address")).is_ok());
    }
}

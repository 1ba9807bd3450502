//! Who may take up a handshake, and what a connection turns out to be.
//!
//! Promised: a connection that has not logged in holds a [`Seat`], of which there are few, in all and per address; who
//! fails too often is not taken up for a while ([`penalty`]); its first line is read under a deadline and a length, and
//! nothing else is read before it is judged. A peer that waits for our line first gets it after a short patience. What
//! follows, the handshake, costs processor time: it begins with a [`Place`], of which there are fewer, in all and per
//! address, and at a measured pace on each thread. Who waits for one keeps its seat.

pub mod penalty;
mod room;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::wire::{IdentificationError, Peer};
use crate::limits;
use crate::metrics;
use crate::target::Target;

use penalty::Fault;
pub use room::{Full, Room, Seat};

/// Lets handshakes begin, so many at once and so fast.
#[derive(Debug)]
pub struct Handshakes {
    places: Arc<Semaphore>,
    by_address: Arc<Mutex<HashMap<IpAddr, OfAddress>>>,
    paces: Vec<Pace>,
    tally: Arc<Tally>,
}

/// How many handshakes there are at once.
#[derive(Debug, Default)]
struct Tally {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// One of what a [`Tally`] counts, until it is dropped.
#[derive(Debug)]
struct Tallied(Arc<Tally>, #[expect(dead_code, reason = "held to be counted")] metrics::Held);

impl Tallied {
    fn new(tally: &Arc<Tally>) -> Self {
        let now = tally.now.fetch_add(1, Ordering::Relaxed) + 1;
        tally.most.fetch_max(now, Ordering::Relaxed);
        Self(tally.clone(), metrics::Held::one_of(&metrics::HANDSHAKES))
    }
}

impl Drop for Tallied {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The places that one address may have; here for as long as somebody has or wants one.
#[derive(Debug)]
struct OfAddress {
    places: Arc<Semaphore>,
    users: usize,
}

/// Somebody who has or wants a place.
#[derive(Debug)]
struct User {
    by_address: Arc<Mutex<HashMap<IpAddr, OfAddress>>>,
    address: IpAddr,
}

/// A handshake's place; given back on drop.
#[derive(Debug)]
pub struct Place {
    _of_all: Option<OwnedSemaphorePermit>,
    _of_address: Option<OwnedSemaphorePermit>,
    _user: User,
    _tallied: Tallied,
}

impl Handshakes {
    /// For handshakes on so many threads.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(limits::HANDSHAKES)),
            by_address: Arc::default(),
            paces: (0..threads).map(|_| Pace::new(limits::HANDSHAKE_PACE, limits::HANDSHAKE_BURST)).collect(),
            tally: Arc::default(),
        }
    }

    /// Waits until a handshake with `address` may begin on the thread of this number. May be dropped. Who waits for a place
    /// of its address stands in nobody else's way.
    pub async fn begin(&self, thread: usize, address: IpAddr) -> Place {
        let (user, of_address) = self.user(network(address));
        // Nobody closes them.
        let of_address = of_address.acquire_owned().await.ok();
        let of_all = self.places.clone().acquire_owned().await.ok();
        if let Some(pace) = self.paces.get(thread) {
            pace.turn().await;
        }
        Place { _of_all: of_all, _of_address: of_address, _user: user, _tallied: Tallied::new(&self.tally) }
    }

    /// How many have a place and have begun, now and at most so far.
    #[must_use]
    pub fn under_way(&self) -> (usize, usize) {
        (self.tally.now.load(Ordering::Relaxed), self.tally.most.load(Ordering::Relaxed))
    }

    fn user(&self, address: IpAddr) -> (User, Arc<Semaphore>) {
        let mut by_address = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let of_address = by_address.entry(address).or_insert_with(|| OfAddress {
            places: Arc::new(Semaphore::new(limits::HANDSHAKES_PER_ADDRESS)),
            users: 0,
        });
        of_address.users += 1;
        (User { by_address: self.by_address.clone(), address }, of_address.places.clone())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut by_address = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_address) = by_address.get_mut(&self.address) {
            of_address.users -= 1;
            if of_address.users == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

impl Place {
    /// Runs the handshake. The place is given back at its end, or before, when it has lasted for
    /// [`limits::HANDSHAKE_HOLD`].
    pub async fn during<T>(self, handshake: impl Future<Output = T>) -> T {
        tokio::pin!(handshake);
        tokio::select! {
            biased;
            result = &mut handshake => return result,
            () = sleep(limits::HANDSHAKE_HOLD) => drop(self),
        }
        handshake.await
    }
}

/// Turns at a steady rate, some of which may be saved up.
#[derive(Debug)]
struct Pace {
    every: Duration,
    burst: u32,
    next: Mutex<Instant>,
}

impl Pace {
    fn new(every: Duration, burst: u32) -> Self {
        let now = Instant::now();
        Self { every, burst, next: Mutex::new(now.checked_sub(every * burst).unwrap_or(now)) }
    }

    async fn turn(&self) {
        let turn = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let saved = Instant::now().checked_sub(self.every * (self.burst - 1)).unwrap_or(*next);
            let turn = saved.max(*next);
            *next = turn + self.every;
            turn
        };
        sleep_until(turn).await;
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
    /// Somebody on the way who speaks for it.
    #[error(
        "{to} answered in {said}, and SSH was asked for: something that inspects TLS or HTTP stands between; ask the network's \
         operators for an exclusion for {to}, or reach the gateway by tls:// or wss://"
    )]
    Inspected {
        /// What it spoke.
        said: &'static str,
        /// Who was dialled.
        to: Target,
    },
    /// Closed by it, or by somebody on the way.
    #[error(
        "the peer closed the connection before it identified itself; if something on the way lets no SSH through, ask the \
         network's operators for an exclusion for {0}, or reach the gateway by tls:// or wss://"
    )]
    ClosedOnTheWay(Target),
}

impl GreetError {
    /// What is held against the address for it; nothing where it may have been a health check, or the network.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        match self {
            Self::Timeout => Some(Fault::Timeout),
            Self::Identification(_) => Some(Fault::Garbage),
            Self::Closed | Self::Io(_) | Self::Inspected { .. } | Self::ClosedOnTheWay(_) => None,
        }
    }

    /// The same for whoever dialled `to` to speak SSH with nothing between: what others on the way may have to do with it.
    #[must_use]
    pub fn of_dialled(self, to: &Target) -> Self {
        match self {
            Self::Closed => Self::ClosedOnTheWay(to.clone()),
            Self::Identification(IdentificationError::NotSsh(start)) if start.starts_with("HTTP/") => {
                Self::Inspected { said: "HTTP", to: to.clone() }
            }
            // A record of TLS: an alert, or a handshake.
            Self::Identification(IdentificationError::NotSsh(start))
                if start.starts_with("\\x15\\x03") || start.starts_with("\\x16\\x03") =>
            {
                Self::Inspected { said: "TLS", to: to.clone() }
            }
            other => other,
        }
    }
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
    let mut awaited = Awaited::new(first, deadline);
    loop {
        if let Some(end) = read.iter().position(|byte| *byte == b'\n') {
            if end >= limits::IDENTIFICATION_MAX {
                return Err(IdentificationError::TooLong.into());
            }
            let line = &read[..end];
            let peer = Peer::parse(line.strip_suffix(b"\r").unwrap_or(line))?;
            return Ok(Greeted { peer, head: read.freeze(), said: awaited.said });
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
        awaited.more(stream, &mut read).await?;
    }
}

/// Waits for what a peer says before it has identified itself, and speaks first where it stays silent.
#[derive(Debug)]
pub(super) struct Awaited {
    line: Option<&'static str>,
    patience: Instant,
    deadline: Instant,
    /// The line, once it has been sent.
    pub(super) said: Option<&'static str>,
}

impl Awaited {
    /// Until `deadline`. Where `line` is given, a peer that stays silent for [`limits::IDENTIFICATION_PATIENCE`] is sent that.
    pub(super) fn new(line: Option<&'static str>, deadline: Instant) -> Self {
        Self { line, patience: Instant::now() + limits::IDENTIFICATION_PATIENCE, deadline, said: None }
    }

    /// Reads more of it, or sends the line.
    pub(super) async fn more<S>(&mut self, stream: &mut S, read: &mut BytesMut) -> Result<(), GreetError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let line = self.line.filter(|_| self.said.is_none() && read.is_empty());
        let until = if line.is_some() { self.patience.min(self.deadline) } else { self.deadline };
        match (timeout_at(until, stream.read_buf(read)).await, line) {
            (Ok(Ok(0)), _) => Err(GreetError::Closed),
            (Ok(Ok(_)), _) => Ok(()),
            (Ok(Err(error)), _) => Err(GreetError::Io(error)),
            (Err(_), Some(line)) if until != self.deadline => {
                let saying = async {
                    stream.write_all(format!("{line}\r\n").as_bytes()).await?;
                    stream.flush().await
                };
                let said = timeout_at(self.deadline, saying).await;
                said.map_err(|_| GreetError::Timeout)?.map_err(GreetError::Io)?;
                self.said = Some(line);
                Ok(())
            }
            (Err(_), _) => Err(GreetError::Timeout),
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

    #[tokio::test(start_paused = true)]
    async fn handshakes_begin_at_a_pace() {
        let pace = Pace::new(Duration::from_millis(10), 16);
        let begun = Instant::now();
        for _ in 0..16 {
            pace.turn().await;
        }
        assert_eq!(begun.elapsed(), Duration::ZERO, "so many at once");
        for _ in 0..100 {
            pace.turn().await;
        }
        let took = begun.elapsed();
        assert!((Duration::from_millis(990)..=Duration::from_millis(1_200)).contains(&took), "{took:?}");
        sleep(Duration::from_secs(60)).await;
        let begun = Instant::now();
        for _ in 0..17 {
            pace.turn().await;
        }
        assert!(begun.elapsed() >= Duration::from_millis(10), "no more than a burst is saved up");
    }

    #[tokio::test(start_paused = true)]
    async fn places_for_handshakes_are_bounded_in_all_and_per_address() {
        let handshakes = Handshakes::new(1);
        let at = |number: u8| IpAddr::from([10, 0, 0, number]);
        let soon = Duration::from_secs(2);
        let mut places = Vec::new();
        for _ in 0..limits::HANDSHAKES_PER_ADDRESS {
            places.push(handshakes.begin(0, at(1)).await);
        }
        // Somebody of that address has to wait, and keeps nobody else waiting.
        let mut waiting = Box::pin(handshakes.begin(0, at(1)));
        assert!(tokio::time::timeout(soon, &mut waiting).await.is_err());
        for number in 0..(limits::HANDSHAKES - limits::HANDSHAKES_PER_ADDRESS) as u8 {
            places.push(tokio::time::timeout(soon, handshakes.begin(0, at(10 + number))).await.expect("a place"));
        }
        assert!(tokio::time::timeout(soon, handshakes.begin(0, at(200))).await.is_err(), "all are taken");
        drop(places.pop());
        places.push(tokio::time::timeout(soon, handshakes.begin(0, at(200))).await.expect("a place that came back"));
        drop(places);
        drop(tokio::time::timeout(soon, waiting).await.expect("a place that came back"));
        assert!(handshakes.by_address.lock().expect("not poisoned").is_empty(), "nothing is left behind");
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_that_dawdles_loses_its_place_and_goes_on() {
        let handshakes = Handshakes::new(1);
        let address = IpAddr::from([10, 0, 0, 1]);
        let mut slow = Vec::new();
        for _ in 0..limits::HANDSHAKES_PER_ADDRESS {
            let place = handshakes.begin(0, address).await;
            slow.push(place.during(async {
                sleep(limits::LOGIN_GRACE).await;
                "logged in"
            }));
        }
        let last = slow.pop().expect("one of them");
        let others = slow.into_iter().map(Box::pin).collect::<Vec<_>>();
        let begun = Instant::now();
        let (outcome, waited) = tokio::join!(last, async {
            drop(handshakes.begin(0, address).await);
            begun.elapsed()
        });
        assert_eq!(outcome, "logged in");
        assert!(waited <= limits::HANDSHAKE_HOLD + Duration::from_secs(1), "{waited:?}");
        drop(others);
    }

    #[test]
    fn one_ipv6_network_is_one_address() {
        let room = Room::new(10, 1);
        let seat = |address: &str| room.seat(Some(address.parse().expect("an address")), Instant::now());
        let _seat = seat("2001:db8::1").expect("a seat");
        assert_eq!(seat("2001:db8::ffff").expect_err("full"), Full::Address);
        assert!(seat("2001:db8:0:1::1").is_ok());
    }
}

//! Seats for connections that have not logged in.
//!
//! Promised: there are so many in all, and so many for one address (of IPv6, one /64). When all are taken, whoever comes
//! from elsewhere still gets one: the network that has most of them gives up its oldest. So one host, or one provider's
//! customer with all the addresses of an IPv6 /48, keeps nobody out. Where all have the same share, the oldest seat goes if
//! it has been taken for [`limits::SEAT_SURE`]: an honest login is over by then, and strangers who only sit are not. Who
//! comes from an address that has all of its own is turned away, since nothing tells honest newcomers from there apart, and
//! taking each other's seats none of them would get to the end.
//!
//! No I/O, no waiting; whoever sits looks at [`Seat::lost`] beside whatever it waits for.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::network;
use crate::limits;
use crate::metrics::{self, Held};

/// Counts the connections that have not logged in.
#[derive(Debug, Clone)]
pub struct Room(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    /// In the order of their coming.
    seats: BTreeMap<u64, Sitting>,
    next: u64,
    max: usize,
    max_per_address: usize,
}

#[derive(Debug)]
struct Sitting {
    /// `None` for a balancer's connection of which it has not said whose it is.
    address: Option<IpAddr>,
    since: Instant,
    lost: CancellationToken,
}

/// A place among the connections that have not logged in; given back on drop.
#[derive(Debug)]
pub struct Seat {
    room: Room,
    number: u64,
    lost: CancellationToken,
    _counted: Held,
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

    /// Takes a seat; `None` for an address that is not known yet.
    ///
    /// # Errors
    /// If there is none.
    pub fn seat(&self, address: Option<IpAddr>, now: Instant) -> Result<Seat, Full> {
        let address = address.map(network);
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.admits(address)?;
        if taken.seats.len() >= taken.max {
            let victim = taken.victim(address, now).ok_or(Full::Total)?;
            if let Some(sitting) = taken.seats.remove(&victim) {
                sitting.lost.cancel();
            }
        }
        let number = taken.next;
        taken.next += 1;
        let lost = CancellationToken::new();
        taken.seats.insert(number, Sitting { address, since: now, lost: lost.clone() });
        Ok(Seat { room: self.clone(), number, lost, _counted: Held::one_of(&metrics::SEATS) })
    }
}

impl Seat {
    /// Fires when the seat has been given to somebody else.
    #[must_use]
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// Says whose it is, once that is known.
    ///
    /// # Errors
    /// If that address has all of its own.
    pub fn belongs_to(&self, address: IpAddr) -> Result<(), Full> {
        let address = Some(network(address));
        let mut taken = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.admits(address)?;
        if let Some(sitting) = taken.seats.get_mut(&self.number) {
            sitting.address = address;
        }
        Ok(())
    }
}

impl Taken {
    fn admits(&self, address: Option<IpAddr>) -> Result<(), Full> {
        let of_address = self.seats.values().filter(|sitting| sitting.address == address).count();
        match address {
            Some(_) if of_address >= self.max_per_address => Err(Full::Address),
            _ => Ok(()),
        }
    }

    /// Whose seat somebody from this address gets when all are taken. Looks at all of them, of which there are few.
    fn victim(&self, newcomer: Option<IpAddr>, now: Instant) -> Option<u64> {
        let wide = |address: Option<IpAddr>| address.map(provider);
        let addresses = || self.seats.values().map(|sitting| sitting.address);
        let within = |greedy| addresses().filter(move |address| wide(*address) == greedy);
        let fullest = match fullest(addresses().map(wide)) {
            Some((greedy, count)) if count > addresses().filter(|one| wide(*one) == wide(newcomer)).count() + 1 => {
                fullest(within(greedy))
            }
            // Nobody else's; perhaps a neighbour's.
            _ => fullest(within(wide(newcomer)))
                .filter(|(_, count)| *count > addresses().filter(|one| *one == newcomer).count() + 1),
        };
        if let Some((greedy, _)) = fullest {
            return self.seats.iter().find(|(_, sitting)| sitting.address == greedy).map(|(number, _)| *number);
        }
        let (oldest, sitting) = self.seats.first_key_value()?;
        (now.duration_since(sitting.since) >= limits::SEAT_SURE).then_some(*oldest)
    }
}

/// Who is there most often, and how often.
fn fullest<K: Hash + Eq + Copy>(keys: impl Iterator<Item = K>) -> Option<(K, usize)> {
    let mut counts: HashMap<K, usize> = HashMap::new();
    keys.for_each(|key| *counts.entry(key).or_default() += 1);
    counts.into_iter().max_by_key(|(_, count)| *count)
}

/// What one customer may have of addresses: of IPv4 a /24, of IPv6 a /48.
fn provider(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => IpAddr::V4((u32::from(v4) >> 8 << 8).into()),
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 80 << 80).into()),
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.room.0.lock().unwrap_or_else(PoisonError::into_inner).seats.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(text: &str) -> Option<IpAddr> {
        Some(text.parse().expect("an address"))
    }

    fn lost(seats: &[Seat]) -> Vec<bool> {
        seats.iter().map(|seat| seat.lost().is_cancelled()).collect()
    }

    #[test]
    fn seats_are_bounded_and_come_back() {
        let (room, now) = (Room::new(3, 2), Instant::now());
        let first = room.seat(at("10.0.0.1"), now).expect("a seat");
        let _second = room.seat(at("::ffff:10.0.0.1"), now).expect("a seat");
        assert_eq!(room.seat(at("10.0.0.1"), now).expect_err("full"), Full::Address);
        let _third = room.seat(at("2001:db8::1"), now).expect("a seat");
        drop(first);
        assert!(room.seat(at("10.0.0.1"), now).is_ok());
    }

    #[test]
    fn who_has_most_gives_up_the_oldest_for_whoever_comes_from_elsewhere() {
        let (room, now) = (Room::new(8, 4), Instant::now());
        let greedy: Vec<_> = (0..4).map(|_| room.seat(at("10.0.0.1"), now).expect("a seat")).collect();
        let other: Vec<_> = (0..3).map(|_| room.seat(at("192.0.2.1"), now).expect("a seat")).collect();
        let _lone = room.seat(at("198.51.100.1"), now).expect("a seat");
        assert_eq!(room.seat(at("10.0.0.1"), now).expect_err("its own"), Full::Address);
        let newcomer = room.seat(at("203.0.113.1"), now).expect("a seat");
        assert_eq!((lost(&greedy), lost(&other)), (vec![true, false, false, false], vec![false; 3]));
        // Who has more than it would have itself gives up one; from there on they take turns.
        let _again = room.seat(at("203.0.113.1"), now).expect("a seat");
        assert_eq!(room.seat(at("203.0.113.1"), now).expect_err("as many as others"), Full::Total);
        assert!(!newcomer.lost().is_cancelled());
    }

    #[test]
    fn the_addresses_of_one_provider_count_together() {
        for (room_of, one_of, elsewhere) in [
            ("IPv6", (|at| format!("2001:db8:0:{at:x}::1")) as fn(u32) -> String, "2001:db8:1::1"),
            ("IPv4", |at| format!("10.0.0.{at}"), "10.0.1.1"),
        ] {
            let (room, now) = (Room::new(16, 4), Instant::now());
            let many: Vec<_> = (0..16).map(|one| room.seat(at(&one_of(one)), now).expect("a seat")).collect();
            let newcomer = room.seat(at(elsewhere), now).unwrap_or_else(|full| panic!("{room_of}: {full:?}"));
            assert_eq!(lost(&many).iter().filter(|lost| **lost).count(), 1, "{room_of}");
            assert_eq!(room.seat(at(&one_of(17)), now).expect_err(room_of), Full::Total, "they have most already");
            assert!(!newcomer.lost().is_cancelled());
            // A neighbour who has only one gets one of who has several.
            drop(many);
            let greedy: Vec<_> = (0..15).map(|one| room.seat(at(&one_of(one / 4)), now).expect("a seat")).collect();
            let _neighbour = room.seat(at(&one_of(9)), now).expect("a seat");
            assert_eq!(lost(&greedy).iter().filter(|lost| **lost).count(), 1, "{room_of}");
        }
    }

    #[test]
    fn where_all_have_the_same_the_oldest_goes_when_it_has_had_its_time() {
        let (room, then) = (Room::new(4, 4), Instant::now());
        let four: Vec<_> = (0..4).map(|one| room.seat(at(&format!("10.0.{one}.1")), then).expect("a seat")).collect();
        let soon = then + limits::SEAT_SURE - Duration::from_millis(1);
        assert_eq!(room.seat(at("203.0.113.1"), soon).expect_err("full"), Full::Total);
        let later = then + limits::SEAT_SURE;
        let _newcomer = room.seat(at("203.0.113.1"), later).expect("a seat");
        assert_eq!(lost(&four), [true, false, false, false]);
    }

    #[test]
    fn a_lost_seat_is_not_given_back_twice() {
        let (room, now) = (Room::new(3, 3), Instant::now());
        let greedy: Vec<_> = (0..3).map(|_| room.seat(at("10.0.0.1"), now).expect("a seat")).collect();
        let _newcomer = room.seat(at("203.0.113.1"), now).expect("a seat");
        assert_eq!(lost(&greedy), [true, false, false]);
        drop(greedy);
        let taken = room.0.lock().expect("no panic").seats.len();
        assert_eq!(taken, 1);
    }

    #[test]
    fn a_balancers_connections_count_for_whom_it_names() {
        let (room, now) = (Room::new(8, 2), Instant::now());
        let unknown: Vec<_> = (0..4).map(|_| room.seat(None, now).expect("a seat")).collect();
        for seat in &unknown[..2] {
            seat.belongs_to([10, 0, 0, 1].into()).expect("room");
        }
        assert_eq!(unknown[2].belongs_to([10, 0, 0, 1].into()).expect_err("full"), Full::Address);
        assert_eq!(room.seat(at("10.0.0.1"), now).expect_err("full"), Full::Address);
        unknown[2].belongs_to([10, 0, 0, 2].into()).expect("room");
    }
}

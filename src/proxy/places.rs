//! How many connections there are, in all and of each address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use super::Limits;

/// Counts connections. Clones share the count.
#[derive(Debug, Clone, Default)]
pub(super) struct Places(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// A connection's place; given back when the last of its holders is dropped.
#[derive(Debug, Clone)]
pub(super) struct Place {
    _held: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    places: Places,
    address: IpAddr,
}

impl Places {
    /// Takes a place.
    ///
    /// # Errors
    /// The limit that is reached, by its key.
    pub(super) fn take(&self, address: IpAddr, limits: &Limits) -> Result<Place, &'static str> {
        let address = counted(address);
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.all >= limits.connections {
            return Err("connections");
        }
        // Behind this host's own address may be anybody on it.
        let of_address = taken.by_address.get(&address).copied().unwrap_or_default();
        if !address.is_loopback() && of_address >= limits.connections_per_address {
            return Err("connections_per_address");
        }
        taken.all += 1;
        *taken.by_address.entry(address).or_default() += 1;
        Ok(Place { _held: Arc::new(Held { places: self.clone(), address }) })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all -= 1;
        if let Some(count) = taken.by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                taken.by_address.remove(&self.address);
            }
        }
    }
}

/// What counts as one address: of IPv6 the /64, since whoever has one address has all of it.
fn counted(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if !v6.is_loopback() => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn places_are_bounded_by_address_and_in_all_and_come_back() {
        let limits = Limits { connections: 4, connections_per_address: 2, ..Limits::default() };
        let places = Places::default();
        let first = places.take(at("2001:db8::1"), &limits).expect("a place");
        let _second = places.take(at("2001:db8::2"), &limits).expect("a place");
        assert_eq!(places.take(at("2001:db8::3"), &limits).expect_err("full"), "connections_per_address");
        let local: Vec<_> = (0..2).map(|_| places.take(at("127.0.0.1"), &limits).expect("a place")).collect();
        assert_eq!(places.take(at("10.0.0.1"), &limits).expect_err("full"), "connections");
        drop(first);
        let _third = places.take(at("127.0.0.1"), &limits).expect("not counted by address");
        drop(local);
        assert!(places.take(at("2001:db8::4"), &limits).is_ok());
        assert!(places.take(at("2001:db8:0:1::1"), &limits).is_ok());
    }

    #[test]
    fn nothing_is_kept_of_addresses_that_have_gone() {
        let places = Places::default();
        drop(places.take(at("10.0.0.1"), &Limits::default()));
        assert!(places.0.lock().expect("no panic").by_address.is_empty());
    }
}

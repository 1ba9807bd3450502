//! Addresses whose connections have failed too often are turned away for a while, before a byte is sent to them.
//!
//! Promised: what an address (of IPv6, a /64) does wrong adds up, and is forgiven at a steady rate; above
//! [`limits::PENALTY_TOLERANCE`] it is barred for [`limits::PENALTY_FIRST`], twice as long each time that happens again, up
//! to [`limits::PENALTY_CAP`], and what has grown shrinks again by one step for each such time without another. What comes
//! while an address is barred adds nothing, so that an honest peer that tries again and again gets through in the end.
//!
//! An address may be a whole company's. Therefore a login forgives everything, and **while somebody from an address is
//! logged in**, faults from there count a [tenth](limits::PENALTY_MILD), and it is barred for no longer than the first time:
//! a thousand agents behind one address are not shut out because of a few that are set up wrongly, and those whose keys are
//! registered and refused all the same (expired, from the wrong network) count least of all. Whoever abuses that has a
//! key of somebody registered, who is on record.
//!
//! The table is bounded ([`limits::PENALTIES_MAX`]). When it is full, those go first that would be forgiven first: to have
//! one address forgotten, one would have to do worse from thousands of others, each of which could have been used instead.
//!
//! No I/O, no waiting, and the caller tells the time.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::network;
use crate::limits;
use crate::network::Networks;
use crate::rate::{Rate, Rates};

/// What a connection without a login may have done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It left without a word of SSH too few: a scanner's, or a health check's.
    Left,
    /// It proved a key that is registered and did not get in: set up wrongly, more likely than hostile.
    Misconfigured,
    /// It had no key that gets in.
    Refused,
    /// It said something that is not what it should have been.
    Garbage,
    /// It came to no end in time.
    Timeout,
    /// It came on top of more than one address needs.
    Flood,
}

impl Fault {
    /// What a connection has done that came to a handshake and to no login, by the reason that the trail has for it. That a
    /// key was offered proves nothing: whose it is says nothing of who this is.
    #[must_use]
    pub fn of_login(reason: &str, timed_out: bool) -> Self {
        match reason {
            _ if timed_out => Self::Timeout,
            "too_much_before_login" => Self::Garbage,
            "left_before_login" => Self::Left,
            _ => Self::Refused,
        }
    }

    /// For how long it is remembered, in addition to what is.
    fn weight(self) -> Duration {
        let seconds = match self {
            Self::Left | Self::Misconfigured => 1,
            Self::Refused | Self::Garbage => 5,
            Self::Timeout | Self::Flood => 10,
        };
        Duration::from_secs(seconds)
    }
}

/// Whether, and to whom, an address is barred after too many failures, as an operator says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// Whether at all.
    pub enabled: bool,
    /// To whom nothing is held.
    pub exempt: Exempt,
}

/// Addresses that nothing is held against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exempt {
    /// This host's own: what comes through a tunnel or a proxy on it is not its fault.
    Loopback,
    /// These, and not even loopback if it is not among them.
    Networks(Option<Networks>),
}

impl Terms {
    /// Whether faults are held against an address.
    #[must_use]
    pub fn hold(&self, address: IpAddr) -> bool {
        self.enabled && !self.exempt.contain(address)
    }
}

impl Exempt {
    fn contain(&self, address: IpAddr) -> bool {
        match self {
            Self::Loopback => address.to_canonical().is_loopback(),
            Self::Networks(networks) => networks.as_ref().is_some_and(|networks| networks.contain(address)),
        }
    }
}

impl Default for Terms {
    fn default() -> Self {
        Self { enabled: true, exempt: Exempt::Loopback }
    }
}

/// What is held against addresses. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Penalties(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    records: HashMap<IpAddr, Record>,
    /// Who is logged in from where.
    guests: HashMap<IpAddr, usize>,
    came: Rates<IpAddr>,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    /// When everything is forgiven.
    forgiven: Instant,
    /// Until when it is barred.
    barred: Instant,
    /// How often it was, less what has shrunk since.
    times: u32,
}

impl Record {
    /// From when on nothing is lost by forgetting it.
    fn over(&self) -> Instant {
        self.forgiven.max(self.barred + limits::PENALTY_CAP * self.times)
    }
}

/// How many connections an address may make.
const PACE: Rate = Rate { per_second: limits::CONNECTIONS_PER_SECOND_PER_ADDRESS, burst: limits::CONNECTIONS_BURST };

impl Penalties {
    /// Counts a connection. Whether it is to be taken up: not while its address is barred.
    #[must_use]
    pub fn admits(&self, address: IpAddr, now: Instant) -> bool {
        let mut table = self.lock();
        let key = network(address);
        if table.records.get(&key).is_some_and(|record| record.barred > now) {
            return false;
        }
        if !table.came.take(key, PACE, now) {
            table.blame(key, Fault::Flood, now);
        }
        true
    }

    /// Holds something against an address. For how long it is barred from now on, if it was not and is because of this.
    pub fn blame(&self, address: IpAddr, fault: Fault, now: Instant) -> Option<Duration> {
        self.lock().blame(network(address), fault, now)
    }

    /// Somebody has logged in from an address, and stays for as long as the value lives.
    #[must_use]
    pub fn welcome(&self, address: IpAddr) -> Guest {
        let address = network(address);
        let mut table = self.lock();
        table.records.remove(&address);
        *table.guests.entry(address).or_default() += 1;
        drop(table);
        Guest { penalties: self.clone(), address }
    }

    /// The addresses that are barred, and for how long.
    #[must_use]
    pub fn barred(&self, now: Instant) -> Vec<(IpAddr, Duration)> {
        let table = self.lock();
        let left = |record: &Record| record.barred.saturating_duration_since(now);
        let barred = table.records.iter().map(|(address, record)| (*address, left(record)));
        barred.filter(|(_, left)| !left.is_zero()).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn blame(&mut self, address: IpAddr, fault: Fault, now: Instant) -> Option<Duration> {
        if self.records.len() >= limits::PENALTIES_MAX && !self.records.contains_key(&address) {
            self.make_room(now);
        }
        let mild = self.guests.contains_key(&address);
        let fresh = Record { forgiven: now, barred: now, times: 0 };
        let record = self.records.entry(address).or_insert(fresh);
        if record.barred > now {
            return None;
        }
        let shrunk = now.saturating_duration_since(record.barred).as_secs() / limits::PENALTY_CAP.as_secs();
        if let Some(shrunk) = u32::try_from(shrunk).ok().filter(|shrunk| *shrunk > 0) {
            record.times = record.times.saturating_sub(shrunk);
            record.barred += limits::PENALTY_CAP * shrunk;
        }
        let weight = if mild { fault.weight() / limits::PENALTY_MILD } else { fault.weight() };
        record.forgiven = record.forgiven.max(now) + weight;
        if record.forgiven.duration_since(now) <= limits::PENALTY_TOLERANCE {
            return None;
        }
        let longer = limits::PENALTY_FIRST * 2_u32.saturating_pow(record.times.min(16));
        let bar = if mild { limits::PENALTY_FIRST } else { longer.min(limits::PENALTY_CAP) };
        *record = Record {
            forgiven: now,
            barred: now + bar,
            times: if mild || longer > limits::PENALTY_CAP { record.times } else { record.times + 1 },
        };
        Some(bar)
    }

    /// Forgets what is over, and if that is not much, the quarter that would be over first.
    fn make_room(&mut self, now: Instant) {
        self.records.retain(|_, record| record.over() > now);
        let few = limits::PENALTIES_MAX / 4 * 3;
        if self.records.len() > few {
            let mut ends: Vec<_> = self.records.values().map(Record::over).collect();
            let at = ends.len() / 4;
            let (_, end, _) = ends.select_nth_unstable(at);
            let end = *end;
            self.records.retain(|_, record| record.over() > end);
        }
    }
}

/// Somebody who is logged in.
#[derive(Debug)]
pub struct Guest {
    penalties: Penalties,
    address: IpAddr,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut table = self.penalties.lock();
        if let Some(guests) = table.guests.get_mut(&self.address) {
            *guests -= 1;
            if *guests == 0 {
                table.guests.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    /// Refused logins until it is barred; for how long it is then.
    fn until_barred(penalties: &Penalties, address: IpAddr, now: Instant) -> (u32, Duration) {
        for count in 1.. {
            if let Some(bar) = penalties.blame(address, Fault::Refused, now) {
                return (count, bar);
            }
            assert!(count < 10_000, "never barred");
        }
        unreachable!("it counts on");
    }

    #[test]
    fn bars_grow_to_a_cap_and_shrink_again() {
        let penalties = Penalties::default();
        let mut now = Instant::now();
        let mut bars = Vec::new();
        for _ in 0..8 {
            let (count, bar) = until_barred(&penalties, HERE, now);
            assert_eq!(count, 13, "so many are tolerated each time");
            assert!(!penalties.admits(HERE, now) && penalties.admits([192, 0, 2, 2].into(), now));
            // What comes meanwhile makes it no longer.
            assert_eq!(penalties.blame(HERE, Fault::Flood, now), None);
            let last = now + bar - Duration::from_millis(1);
            assert!(!penalties.admits(HERE, last));
            assert_eq!(penalties.barred(last).len(), 1);
            now += bar;
            assert!(penalties.admits(HERE, now) && penalties.barred(now).is_empty());
            bars.push(bar.as_secs());
        }
        assert_eq!(bars, [15, 30, 60, 120, 240, 480, 600, 600]);
        now += limits::PENALTY_CAP * 2;
        assert_eq!(until_barred(&penalties, HERE, now).1.as_secs(), 240, "two steps less");
        now += Duration::from_secs(240) + limits::PENALTY_CAP * 20;
        assert_eq!(until_barred(&penalties, HERE, now).1, limits::PENALTY_FIRST);
    }

    #[test]
    fn faults_are_forgiven_at_a_steady_rate() {
        for (fault, every) in [
            (Fault::Left, 1),
            (Fault::Misconfigured, 1),
            (Fault::Refused, 5),
            (Fault::Garbage, 5),
            (Fault::Timeout, 10),
            (Fault::Flood, 10),
        ] {
            let (penalties, begun) = (Penalties::default(), Instant::now());
            for time in 0..1_000 {
                let now = begun + Duration::from_secs(every) * time;
                assert_eq!(penalties.blame(HERE, fault, now), None, "{fault:?}");
            }
            let often = (1..10_000_u32).find(|time| {
                let now = begun + Duration::from_secs(every * 1_000) + Duration::from_millis(every * 900) * *time;
                penalties.blame(HERE, fault, now).is_some()
            });
            assert!(often.is_some(), "{fault:?} a little more often is barred in the end");
        }
    }

    #[test]
    fn a_login_forgives_and_who_is_logged_in_softens() {
        let (penalties, now) = (Penalties::default(), Instant::now());
        for _ in 0..12 {
            assert_eq!(penalties.blame(HERE, Fault::Refused, now), None);
        }
        let guest = penalties.welcome(HERE);
        let (count, bar) = until_barred(&penalties, HERE, now);
        assert!((100..200).contains(&count), "{count}");
        assert_eq!(bar, limits::PENALTY_FIRST);
        // And the same again: it does not grow.
        let later = now + bar;
        assert_eq!(until_barred(&penalties, HERE, later).1, limits::PENALTY_FIRST);
        let second = penalties.welcome(HERE);
        drop(guest);
        assert!(until_barred(&penalties, HERE, later).0 > 100, "one is still there");
        drop(second);
        let (count, bar) = until_barred(&penalties, HERE, later + bar);
        assert_eq!((count, bar), (13, limits::PENALTY_FIRST));
        assert!(penalties.lock().guests.is_empty());
    }

    #[test]
    fn a_thousand_agents_behind_one_address_outlive_a_few_that_are_set_up_wrongly() {
        let (penalties, begun) = (Penalties::default(), Instant::now());
        let _guests: Vec<_> = (0..970).map(|_| penalties.welcome(HERE)).collect();
        // Thirty that are refused for ever, each twice a minute.
        for time in 0..3_600_u32 {
            let now = begun + Duration::from_secs(1) * time;
            assert_eq!(penalties.blame(HERE, Fault::Refused, now), None, "after {time} s");
            assert!(penalties.admits(HERE, now));
        }
    }

    #[test]
    fn a_thousand_agents_that_come_back_at_once_are_no_flood_and_more_for_long_is() {
        let (penalties, begun) = (Penalties::default(), Instant::now());
        // Most are turned away at first, for want of a seat, and come again.
        for time in 0..5_000_u32 {
            assert!(penalties.admits(HERE, begun + Duration::from_millis(2) * time));
        }
        let flooded = (0..100_000_u32)
            .find(|time| !penalties.admits(HERE, begun + Duration::from_millis(20 + u64::from(*time) / 10)));
        assert!(flooded.is_some_and(|count| count > 5_000), "{flooded:?}");
        assert!(penalties.admits([192, 0, 2, 2].into(), begun));
    }

    #[test]
    fn one_ipv6_network_is_one_address() {
        let (penalties, now) = (Penalties::default(), Instant::now());
        until_barred(&penalties, "2001:db8::1".parse().expect("an address"), now);
        assert!(!penalties.admits("2001:db8::ffff:1".parse().expect("an address"), now));
        assert!(penalties.admits("2001:db8:0:1::1".parse().expect("an address"), now));
        until_barred(&penalties, HERE, now);
        assert!(!penalties.admits("::ffff:192.0.2.1".parse().expect("an address"), now));
    }

    #[test]
    fn the_table_is_bounded_and_forgets_who_did_least() {
        let (penalties, now) = (Penalties::default(), Instant::now());
        until_barred(&penalties, HERE, now);
        let other = |at: u32| IpAddr::from(std::net::Ipv6Addr::from((0x2001_0db8_u128 << 96) | u128::from(at) << 64));
        for at in 0..200_000 {
            // Each a little later than the one before, and as bad as one may be without being barred.
            let now = now + Duration::from_micros(10) * at;
            for _ in 0..6 {
                assert_eq!(penalties.blame(other(at), Fault::Flood, now), None);
            }
            assert!(penalties.lock().records.len() <= limits::PENALTIES_MAX);
        }
        assert!(!penalties.admits(HERE, now + Duration::from_secs(2)), "its penalty was forgotten");
        // What is over makes room first, and all of it.
        let later = now + Duration::from_secs(3_600);
        let count = |penalties: &Penalties| penalties.lock().records.len();
        let mut at = 300_000;
        while count(&penalties) > 10 {
            penalties.blame(other(at), Fault::Left, later);
            at += 1;
            assert!(at < 400_000, "{} are held", count(&penalties));
        }
    }

    proptest! {
        #[test]
        fn nobody_is_barred_for_longer_than_the_cap_or_for_what_is_tolerated(
            steps in prop::collection::vec((0..120_000_u64, 0..6_usize), 1..200),
        ) {
            let (penalties, mut now) = (Penalties::default(), Instant::now());
            let faults =
                [Fault::Left, Fault::Misconfigured, Fault::Refused, Fault::Garbage, Fault::Timeout, Fault::Flood];
            let mut owed = Duration::ZERO;
            for (after, fault) in steps {
                now += Duration::from_millis(after);
                owed += faults[fault].weight();
                let barred_before = !penalties.barred(now).is_empty();
                if let Some(bar) = penalties.blame(HERE, faults[fault], now) {
                    prop_assert!(!barred_before);
                    prop_assert!(bar >= limits::PENALTY_FIRST && bar <= limits::PENALTY_CAP);
                    prop_assert!(owed > limits::PENALTY_TOLERANCE, "{owed:?}");
                    owed = Duration::ZERO;
                }
                prop_assert!(penalties.barred(now + limits::PENALTY_CAP).is_empty());
            }
        }
    }
}

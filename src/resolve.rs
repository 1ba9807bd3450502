//! Names to addresses, through the system's resolver.
//!
//! Promised: a name with a dot in it is absolute. It is handed to the resolver with a trailing dot, so that no search
//! domain is ever appended and `orders.db.internal` cannot turn into `orders.db.internal.example.com`. A name without a
//! dot is looked up as the system is configured to. A lookup ends within [`RESOLVE_TIMEOUT`] and yields at most
//! [`ADDRESSES_PER_NAME`] addresses, in normal form, each once, in the resolver's order.
//!
//! The C library does not find a name with a trailing dot in the hosts file. For names with a dot that file is
//! therefore read here, before the resolver is asked, which is the order that nearly every system is configured for.
//!
//! A lookup whose time has run out keeps a thread until the system's resolver gives up as well, which may take it half a
//! minute. So each name is looked up once at a time: who asks for it meanwhile shares that answer, and a name that nobody
//! answers holds one thread, however often a gateway asks for it. All names together hold at most [`LOOKUPS_MAX`].
//!
//! Absent: nothing is cached, and whether an address may be dialled is for `policy` to say.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::{LazyLock, Mutex, PoisonError};

use tokio::sync::watch;

use crate::limits::{ADDRESSES_PER_NAME, HOSTS_MAX, LOOKUPS_MAX, RESOLVE_TIMEOUT};
use crate::target::{Name, normal};

/// Why a name has no addresses.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The resolver said so, or could not be asked.
    #[error("could not look up {name}")]
    System {
        /// The name.
        name: Name,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// The resolver found the name, but no address.
    #[error("could not look up {name}: it exists, but has no address")]
    Empty {
        /// The name.
        name: Name,
    },
    /// Too many other lookups wait for the resolver.
    #[error("could not look up {name}: {LOOKUPS_MAX} other names wait for the resolver already")]
    Busy {
        /// The name.
        name: Name,
    },
    /// The resolver did not answer in time.
    #[error("could not look up {name}: no answer within {} s", RESOLVE_TIMEOUT.as_secs())]
    Timeout {
        /// The name.
        name: Name,
    },
}

/// Looks a name up.
///
/// # Errors
/// If there is no address, or no answer in time.
pub async fn lookup(name: &Name) -> Result<Vec<IpAddr>, ResolveError> {
    in_time(name, share(&UNDER_WAY, name, ask)).await
}

async fn in_time<T>(name: &Name, work: impl Future<Output = Result<T, ResolveError>>) -> Result<T, ResolveError> {
    tokio::time::timeout(RESOLVE_TIMEOUT, work)
        .await
        .unwrap_or_else(|_| Err(ResolveError::Timeout { name: name.clone() }))
}

/// The lookups under way, each with those who wait for it.
type UnderWay = Mutex<HashMap<Name, watch::Receiver<Option<Found>>>>;

/// Addresses, or what the resolver said; its error cannot be shared as it is.
type Found = Result<Vec<IpAddr>, (io::ErrorKind, String)>;

/// Joins the lookup of `name` that is under way, or begins one on a thread of its own.
async fn share(
    under_way: &'static UnderWay,
    name: &Name,
    ask: impl FnOnce(&Name) -> io::Result<Vec<IpAddr>> + Send + 'static,
) -> Result<Vec<IpAddr>, ResolveError> {
    let (mut answer, lookup) = {
        let mut lookups = under_way.lock().unwrap_or_else(PoisonError::into_inner);
        match lookups.get(name) {
            Some(answer) => (answer.clone(), None),
            None if lookups.len() >= LOOKUPS_MAX => return Err(ResolveError::Busy { name: name.clone() }),
            None => {
                let (sender, answer) = watch::channel(None);
                lookups.insert(name.clone(), answer.clone());
                (answer, Some(Lookup { under_way, name: name.clone(), sender }))
            }
        }
    };
    // Not under the lock: a runtime that is going down drops the lookup at once.
    if let Some(lookup) = lookup {
        begin(lookup, ask);
    }
    let found = match answer.wait_for(Option::is_some).await {
        Ok(found) => found.clone(),
        // The thread panicked, or the runtime is going down.
        Err(_) => None,
    };
    match found.unwrap_or_else(|| Err((io::ErrorKind::Interrupted, "the lookup was broken off".to_owned()))) {
        Ok(addresses) if addresses.is_empty() => Err(ResolveError::Empty { name: name.clone() }),
        Ok(addresses) => Ok(addresses),
        Err((kind, text)) => Err(ResolveError::System { name: name.clone(), source: io::Error::new(kind, text) }),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "nobody can wait for it: the system's resolver cannot be told to stop, and the runtime's end leaves it behind"
)]
fn begin(lookup: Lookup, ask: impl FnOnce(&Name) -> io::Result<Vec<IpAddr>> + Send + 'static) {
    tokio::task::spawn_blocking(move || {
        let found = ask(&lookup.name).map_err(|error| (error.kind(), error.to_string()));
        lookup.sender.send_replace(Some(found));
    });
}

/// A lookup under way; when it goes, the next who asks for the name begins another.
struct Lookup {
    under_way: &'static UnderWay,
    name: Name,
    sender: watch::Sender<Option<Found>>,
}

impl Drop for Lookup {
    fn drop(&mut self) {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

/// Asks the hosts file where the system would not, then the system. Blocks.
fn ask(name: &Name) -> io::Result<Vec<IpAddr>> {
    if is_absolute(name)
        && let Some(text) = read_hosts(Path::new(HOSTS))
    {
        let listed = tidy(in_hosts(&text, name));
        if !listed.is_empty() {
            return Ok(listed);
        }
    }
    let found = (spelling(name).as_str(), 0).to_socket_addrs()?;
    Ok(tidy(found.map(|address| address.ip())))
}

fn is_absolute(name: &Name) -> bool {
    name.as_str().contains('.')
}

/// The name as the system's resolver is to get it.
fn spelling(name: &Name) -> String {
    if is_absolute(name) { format!("{name}.") } else { name.to_string() }
}

fn tidy(found: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for address in found.map(normal) {
        if addresses.len() == ADDRESSES_PER_NAME {
            break;
        }
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// The hosts file, if there is one of a sensible size that can be read; the C library does not mind its absence either.
fn read_hosts(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(HOSTS_MAX + 1).read_to_end(&mut bytes).ok()?;
    // A file cut short could end in the middle of a longer name.
    if bytes.len() as u64 > HOSTS_MAX {
        return None;
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The addresses that a hosts file (hosts(5)) gives to `name`. Lines that do not begin with an address are passed over.
fn in_hosts<'a>(text: &'a str, name: &'a Name) -> impl Iterator<Item = IpAddr> + 'a {
    text.lines().filter_map(move |line| {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_ascii_whitespace();
        let address = words.next()?.parse().ok()?;
        let named = |word: &str| word.strip_suffix('.').unwrap_or(word).eq_ignore_ascii_case(name.as_str());
        words.any(named).then_some(address)
    })
}

static UNDER_WAY: LazyLock<UnderWay> = LazyLock::new(Mutex::default);

const HOSTS: &str = "/etc/hosts";

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use super::*;

    fn name(text: &str) -> Name {
        text.parse().expect(text)
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_in_time() {
        let never = std::future::pending::<Result<(), ResolveError>>();
        let error = in_time(&name("db.internal"), never).await.expect_err("no answer");
        assert_eq!(error.to_string(), "could not look up db.internal: no answer within 5 s");
    }

    #[test]
    fn no_search_domain_applies_to_names_with_dots() {
        assert_eq!(spelling(&name("orders.db.internal")), "orders.db.internal.");
        assert_eq!(spelling(&name("Orders.DB.internal.")), "orders.db.internal.");
        assert_eq!(spelling(&name("db")), "db");
    }

    #[test]
    fn addresses_are_normal_distinct_bounded_and_in_order() {
        let found = ["10.0.0.2", "::ffff:10.0.0.1", "10.0.0.1", "10.0.0.2", "2001:db8::1"];
        let found = tidy(found.iter().map(|text| text.parse().expect(text)));
        assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.2", "10.0.0.1", "2001:db8::1"]);
        let many = (0..=u16::MAX).map(|low| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, low]));
        assert_eq!(tidy(many).len(), ADDRESSES_PER_NAME);
    }

    #[test]
    fn reads_the_hosts_file_exactly() {
        let text = "# 10.0.0.9 db.internal\n\
                    10.0.0.1\tdb.internal db # db.other\n\
                    \n\
                    10.0.0.2 evil.db.internal db.internal.evil.com\n\
                    nonsense db.internal\n\
                    fe80::1%lo db.internal\n\
                    db.internal 10.0.0.3\n\
                    2001:db8::1  x DB.Internal.\n\
                    10.0.0.4 db.internal# glued\n\
                    10.0.0.5 # db.internal";
        let found = |host: &str| in_hosts(text, &name(host)).map(|a| a.to_string()).collect::<Vec<_>>();
        assert_eq!(found("internal"), [""; 0]);
        assert_eq!(found("db.other"), [""; 0]);
        assert_eq!(found("db.internal"), ["10.0.0.1", "2001:db8::1", "10.0.0.4"]);
        assert_eq!(found("evil.db.internal"), ["10.0.0.2"]);
    }

    /// A resolver that answers when it is told to, and counts how often it was asked.
    struct Slow {
        under_way: &'static UnderWay,
        asked: Arc<AtomicUsize>,
        answer: mpsc::SyncSender<()>,
        told: Arc<Mutex<mpsc::Receiver<()>>>,
    }

    impl Slow {
        fn new() -> Self {
            let (answer, told) = mpsc::sync_channel(LOOKUPS_MAX);
            Self {
                under_way: Box::leak(Box::default()),
                asked: Arc::default(),
                answer,
                told: Arc::new(Mutex::new(told)),
            }
        }

        async fn lookup(&self, text: &str) -> Result<Vec<IpAddr>, ResolveError> {
            let (asked, told) = (self.asked.clone(), self.told.clone());
            let ask = move |_: &Name| {
                asked.fetch_add(1, Ordering::SeqCst);
                let told = told.lock().unwrap_or_else(PoisonError::into_inner);
                told.recv_timeout(Duration::from_secs(20)).map_err(io::Error::other)?;
                Ok(vec![IpAddr::from([10, 0, 0, 1])])
            };
            share(self.under_way, &name(text), ask).await
        }

        /// Asks, and gives up at once, as an open does when its time has run out.
        async fn abandon(&self, text: &str) {
            assert!(tokio::time::timeout(Duration::ZERO, self.lookup(text)).await.is_err(), "{text} was answered");
        }

        fn answer(&self) {
            self.answer.send(()).expect("a resolver");
        }

        fn under_way(&self) -> usize {
            self.under_way.lock().expect("whole").len()
        }
    }

    #[tokio::test]
    async fn a_slow_name_asked_for_again_and_again_holds_one_thread() {
        let slow = Slow::new();
        for _ in 0..2_000 {
            slow.abandon("db.internal").await;
        }
        assert_eq!(slow.under_way(), 1);
        let tell = async {
            tokio::task::yield_now().await;
            slow.answer();
        };
        let (one, other, ()) = tokio::join!(slow.lookup("db.internal"), slow.lookup("DB.internal."), tell);
        for found in [one, other] {
            assert_eq!(found.expect("an answer"), [IpAddr::from([10, 0, 0, 1])]);
        }
        assert_eq!(slow.asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn names_that_nobody_answers_are_bounded_and_let_go() {
        let slow = Slow::new();
        for index in 0..LOOKUPS_MAX {
            slow.abandon(&format!("db-{index}.internal")).await;
        }
        let one_more = slow.lookup("more.internal").await.expect_err("too many");
        assert!(matches!(one_more, ResolveError::Busy { .. }), "{one_more}");
        (0..LOOKUPS_MAX).for_each(|_| slow.answer());
        while slow.under_way() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        slow.answer();
        assert!(slow.lookup("more.internal").await.is_ok());
    }

    #[tokio::test]
    async fn a_lookup_that_panics_is_an_error_and_not_a_name_lost() {
        let under_way: &'static UnderWay = Box::leak(Box::default());
        let broken = share(under_way, &name("db.internal"), |_| panic!("the resolver broke")).await;
        assert!(matches!(broken, Err(ResolveError::System { .. })), "{broken:?}");
        let found = share(under_way, &name("db.internal"), |_| Ok(vec![IpAddr::from([10, 0, 0, 1])])).await;
        assert!(found.is_ok(), "{found:?}");
    }

    #[test]
    fn a_hosts_file_that_is_missing_or_huge_is_passed_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let huge = dir.path().join("huge");
        std::fs::write(&huge, vec![b'\n'; 1 + usize::try_from(HOSTS_MAX).expect("a size")]).expect("written");
        assert_eq!(read_hosts(&huge), None);
        assert_eq!(read_hosts(&dir.path().join("hosts")), None);
        assert_eq!(read_hosts(dir.path()), None);
    }

    #[tokio::test]
    async fn the_system_knows_localhost() {
        let found = lookup(&name("localhost")).await.expect("addresses");
        assert!(found.iter().all(IpAddr::is_loopback), "{found:?}");
    }
}

//! The system's resolver.
//!
//! The C library does not find a name with a trailing dot in the hosts file. For names with a dot that file is
//! therefore read here, before the resolver is asked, which is the order that nearly every system is configured for.
//!
//! A lookup whose time has run out keeps a thread until the system's resolver gives up as well, which may take it half a
//! minute. So each name is looked up once at a time: who asks for it meanwhile shares that answer, and a name that nobody
//! answers holds one thread, however often a gateway asks for it. All names together hold at most [`LOOKUPS_MAX`].

use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::LazyLock;

use super::shared::{Owed, Shared, Unanswered};
use super::{ResolveError, hosts, is_absolute};
use crate::limits::LOOKUPS_MAX;
use crate::target::Name;

/// All addresses that the system knows.
pub(super) async fn addresses(name: &Name) -> Result<Vec<IpAddr>, ResolveError> {
    share(&UNDER_WAY, name, ask).await
}

/// Addresses, or what the resolver said; its error cannot be shared as it is.
type Found = Result<Vec<IpAddr>, (io::ErrorKind, String)>;

/// Joins the lookup of `name` that is under way, or begins one on a thread of its own.
async fn share(
    under_way: &Shared<Name, Found>,
    name: &Name,
    ask: impl FnOnce(&Name) -> io::Result<Vec<IpAddr>> + Send + 'static,
) -> Result<Vec<IpAddr>, ResolveError> {
    let system = |source| ResolveError::System { name: name.clone(), source };
    match under_way.join(name, |lookup| begin(lookup, ask)).await {
        Ok(Ok(addresses)) if addresses.is_empty() => Err(ResolveError::Empty { name: name.clone() }),
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err((kind, text))) => Err(system(io::Error::new(kind, text))),
        Err(Unanswered::Busy) => Err(ResolveError::Busy { name: name.clone() }),
        Err(Unanswered::BrokenOff) => {
            Err(system(io::Error::new(io::ErrorKind::Interrupted, "the lookup was broken off")))
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "nobody can wait for it: the system's resolver cannot be told to stop, and the runtime's end leaves it behind"
)]
fn begin(lookup: Owed<Name, Found>, ask: impl FnOnce(&Name) -> io::Result<Vec<IpAddr>> + Send + 'static) {
    tokio::task::spawn_blocking(move || {
        let found = ask(lookup.question()).map_err(|error| (error.kind(), error.to_string()));
        lookup.answer(found);
    });
}

/// Asks the hosts file where the system would not, then the system. Blocks.
fn ask(name: &Name) -> io::Result<Vec<IpAddr>> {
    if is_absolute(name) {
        let listed = hosts::addresses(name);
        if !listed.is_empty() {
            return Ok(listed);
        }
    }
    let found = (spelling(name).as_str(), 0).to_socket_addrs()?;
    Ok(found.map(|address| address.ip()).collect())
}

/// The name as the system's resolver is to get it.
fn spelling(name: &Name) -> String {
    if is_absolute(name) { format!("{name}.") } else { name.to_string() }
}

static UNDER_WAY: LazyLock<Shared<Name, Found>> = LazyLock::new(|| Shared::new(LOOKUPS_MAX));

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex, PoisonError, mpsc};
    use std::time::Duration;

    use super::*;

    fn name(text: &str) -> Name {
        text.parse().expect(text)
    }

    #[test]
    fn no_search_domain_applies_to_names_with_dots() {
        assert_eq!(spelling(&name("orders.db.internal")), "orders.db.internal.");
        assert_eq!(spelling(&name("Orders.DB.internal.")), "orders.db.internal.");
        assert_eq!(spelling(&name("db")), "db");
    }

    /// A resolver that answers when it is told to, and counts how often it was asked.
    struct Slow {
        under_way: Shared<Name, Found>,
        asked: Arc<AtomicUsize>,
        answer: mpsc::SyncSender<()>,
        told: Arc<Mutex<mpsc::Receiver<()>>>,
    }

    impl Slow {
        fn new() -> Self {
            let (answer, told) = mpsc::sync_channel(LOOKUPS_MAX);
            Self {
                under_way: Shared::new(LOOKUPS_MAX),
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
                told.recv_timeout(Duration::from_secs(300)).map_err(io::Error::other)?;
                Ok(vec![IpAddr::from([10, 0, 0, 1])])
            };
            share(&self.under_way, &name(text), ask).await
        }

        /// Asks, and gives up at once, as an open does when its time has run out.
        async fn abandon(&self, text: &str) {
            assert!(tokio::time::timeout(Duration::ZERO, self.lookup(text)).await.is_err(), "{text} was answered");
        }

        fn answer(&self) {
            self.answer.send(()).expect("a resolver");
        }
    }

    #[tokio::test]
    async fn a_slow_name_asked_for_again_and_again_holds_one_thread() {
        let slow = Slow::new();
        for _ in 0..2_000 {
            slow.abandon("db.internal").await;
        }
        assert_eq!(slow.under_way.len(), 1);
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
        while slow.under_way.len() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        slow.answer();
        assert!(slow.lookup("more.internal").await.is_ok());
    }

    #[tokio::test]
    async fn a_lookup_that_panics_is_an_error_and_not_a_name_lost() {
        let under_way = Shared::new(LOOKUPS_MAX);
        let broken = share(&under_way, &name("db.internal"), |_| panic!("the resolver broke")).await;
        assert!(matches!(broken, Err(ResolveError::System { .. })), "{broken:?}");
        let found = share(&under_way, &name("db.internal"), |_| Ok(vec![IpAddr::from([10, 0, 0, 1])])).await;
        assert!(found.is_ok(), "{found:?}");
    }

    #[tokio::test]
    async fn the_system_knows_localhost() {
        let found = addresses(&name("localhost")).await.expect("addresses");
        assert!(found.iter().all(IpAddr::is_loopback), "{found:?}");
    }
}

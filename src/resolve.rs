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
//! Absent: nothing is cached, and whether an address may be dialled is for `policy` to say. A lookup whose time has run
//! out leaves a thread behind until the system's resolver gives up as well; the number of opens under way bounds them.

use std::io;
use std::net::IpAddr;
use std::path::Path;

use tokio::io::AsyncReadExt;

use crate::limits::{ADDRESSES_PER_NAME, HOSTS_MAX, RESOLVE_TIMEOUT};
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
    in_time(name, async {
        if is_absolute(name)
            && let Some(text) = read_hosts(Path::new(HOSTS)).await
        {
            let listed = tidy(in_hosts(&text, name));
            if !listed.is_empty() {
                return Ok(listed);
            }
        }
        let system = |source| ResolveError::System { name: name.clone(), source };
        let found = tokio::net::lookup_host((spelling(name), 0)).await.map_err(system)?;
        let found = tidy(found.map(|address| address.ip()));
        if found.is_empty() { Err(ResolveError::Empty { name: name.clone() }) } else { Ok(found) }
    })
    .await
}

async fn in_time<T>(name: &Name, work: impl Future<Output = Result<T, ResolveError>>) -> Result<T, ResolveError> {
    tokio::time::timeout(RESOLVE_TIMEOUT, work)
        .await
        .unwrap_or_else(|_| Err(ResolveError::Timeout { name: name.clone() }))
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
async fn read_hosts(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    tokio::fs::File::open(path).await.ok()?.take(HOSTS_MAX + 1).read_to_end(&mut bytes).await.ok()?;
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

const HOSTS: &str = "/etc/hosts";

#[cfg(test)]
mod tests {
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

    #[tokio::test]
    async fn a_hosts_file_that_is_missing_or_huge_is_passed_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let huge = dir.path().join("huge");
        std::fs::write(&huge, vec![b'\n'; 1 + usize::try_from(HOSTS_MAX).expect("a size")]).expect("written");
        assert_eq!(read_hosts(&huge).await, None);
        assert_eq!(read_hosts(&dir.path().join("hosts")).await, None);
        assert_eq!(read_hosts(dir.path()).await, None);
    }

    #[tokio::test]
    async fn the_system_knows_localhost() {
        let found = lookup(&name("localhost")).await.expect("addresses");
        assert!(found.iter().all(IpAddr::is_loopback), "{found:?}");
    }
}

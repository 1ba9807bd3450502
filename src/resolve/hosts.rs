//! The system's hosts file, for names that its resolver does not find there.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;

use crate::limits::HOSTS_MAX;
use crate::target::Name;

/// The addresses that the system's hosts file gives to `name`. Blocks.
pub(super) fn addresses(name: &Name) -> Vec<IpAddr> {
    match read(Path::new(HOSTS)) {
        Some(text) => find(&text, name).collect(),
        None => Vec::new(),
    }
}

/// The hosts file, if there is one of a sensible size that can be read; the C library does not mind its absence either.
fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(HOSTS_MAX + 1).read_to_end(&mut bytes).ok()?;
    // A file cut short could end in the middle of a longer name.
    if bytes.len() as u64 > HOSTS_MAX {
        return None;
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The addresses that a hosts file (hosts(5)) gives to `name`. Lines that do not begin with an address are passed over.
fn find<'a>(text: &'a str, name: &'a Name) -> impl Iterator<Item = IpAddr> + 'a {
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
        let found =
            |host: &str| find(text, &host.parse().expect(host)).map(|address| address.to_string()).collect::<Vec<_>>();
        assert_eq!(found("internal"), [""; 0]);
        assert_eq!(found("db.other"), [""; 0]);
        assert_eq!(found("db.internal"), ["10.0.0.1", "2001:db8::1", "10.0.0.4"]);
        assert_eq!(found("evil.db.internal"), ["10.0.0.2"]);
    }

    #[test]
    fn a_hosts_file_that_is_missing_or_huge_is_passed_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let huge = dir.path().join("huge");
        std::fs::write(&huge, vec![b'\n'; 1 + usize::try_from(HOSTS_MAX).expect("a size")]).expect("written");
        assert_eq!(read(&huge), None);
        assert_eq!(read(&dir.path().join("hosts")), None);
        assert_eq!(read(dir.path()), None);
    }
}

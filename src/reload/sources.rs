//! The files that a configuration was read from, and whether they still say the same.
//!
//! Promised: what counts is contents, not times: a file that is written anew with what it held is no change, and one whose
//! time and size stay the same is noticed nevertheless. Paths are followed anew each time, so that a symbolic link which
//! leads elsewhere is seen (Kubernetes swaps such links). Contents are not kept, only their digests.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use crate::document::Faults;
use crate::limits::{CONFIG_SETTLE, CONFIG_SETTLE_MAX, FILE_CLOCK, FILE_MAX};

/// What the file system says of a file without its being read: if any of it differs, the file may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    place: (u64, u64),
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    mode: (u32, u32),
}

impl Stamp {
    /// Of this file.
    #[must_use]
    pub fn of(data: &Metadata) -> Self {
        Self {
            place: (data.dev(), data.ino()),
            len: data.len(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
            mode: (data.mode(), data.uid()),
        }
    }
}

/// What some files held, as a digest: of no use but to be compared with another of the same process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest(u64);

/// Files, and what is known of them.
#[derive(Debug, Default)]
pub struct Sources {
    files: Vec<PathBuf>,
    known: HashMap<PathBuf, Known>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    stamp: Stamp,
    digest: u64,
    /// When that digest was taken first.
    since: Instant,
    /// Whether it was taken again after the clocks of files had moved on.
    confirmed: bool,
}

impl Sources {
    /// From now on it is these files.
    pub fn replace(&mut self, mut files: Vec<PathBuf>) {
        files.sort();
        files.dedup();
        self.known.retain(|path, _| files.contains(path));
        self.files = files;
    }

    /// Looks at all of them. Blocks while it does; a file is read only if it may have changed.
    pub fn look(&mut self) -> Digest {
        let mut hasher = DefaultHasher::new();
        for path in &self.files {
            path.hash(&mut hasher);
            match std::fs::metadata(path) {
                Ok(data) => {
                    let known = digest(path, &Stamp::of(&data), self.known.get(path));
                    // Who may read or write it decides about a key file, too.
                    (known.digest, data.mode(), data.uid()).hash(&mut hasher);
                    self.known.insert(path.clone(), known);
                }
                Err(error) => {
                    self.known.remove(path);
                    error.kind().to_string().hash(&mut hasher);
                }
            }
        }
        Digest(hasher.finish())
    }
}

fn digest(path: &Path, stamp: &Stamp, known: Option<&Known>) -> Known {
    let known = known.filter(|known| known.stamp == *stamp);
    if let Some(known) = known
        && (known.confirmed || known.since.elapsed() < FILE_CLOCK)
    {
        return *known;
    }
    let digest = read(path);
    match known {
        Some(known) if known.digest == digest => Known { confirmed: true, ..*known },
        _ => Known { stamp: *stamp, digest, since: Instant::now(), confirmed: false },
    }
}

fn read(path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    // Without O_NONBLOCK the open of a pipe would wait for a writer.
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let read = || {
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        if !file.metadata()?.is_file() {
            return Ok(Zeroizing::new(Vec::new()));
        }
        let mut bytes = Zeroizing::new(Vec::new());
        file.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    match read() {
        Ok(bytes) => bytes.hash(&mut hasher),
        Err(error) => error.kind().to_string().hash(&mut hasher),
    }
    hasher.finish()
}

/// Has `load` read a configuration, which also says from which files; again, where they changed meanwhile. The digest is of
/// what was read; there is none where it would not hold still, and then the result is a fault.
pub fn read_steadily<T>(
    sources: &mut Sources,
    file: &Path,
    load: impl Fn() -> (Result<T, Faults>, Vec<PathBuf>),
) -> (Result<T, Faults>, Option<Digest>) {
    const ATTEMPTS: usize = 4;
    let mut before = sources.look();
    for _ in 0..ATTEMPTS {
        let (read, files) = load();
        sources.replace(files);
        let after = sources.look();
        if before == after {
            return (read, Some(after));
        }
        before = after;
    }
    (Err(Faults::file(file, "kept changing while it was read: it is read again when it has come to rest")), None)
}

/// Decides when what has changed is read: once it has been the same for a while, or has not come to rest for long.
#[derive(Debug, Default)]
pub struct Settling {
    /// What was seen last, since when, and since when there has been something new at all.
    pending: Option<(Digest, Instant, Instant)>,
}

impl Settling {
    /// Whether to read now, having `seen` this, with `read` the state that was read last. A state that could not be held
    /// still while it was read is not known (`None`), and is read again.
    pub fn is_due(&mut self, read: Option<Digest>, seen: Digest, now: Instant) -> bool {
        if read == Some(seen) {
            self.pending = None;
            return false;
        }
        let (since, first) = match self.pending {
            Some((pending, since, first)) if pending == seen => (since, first),
            Some((_, _, first)) => (now, first),
            None => (now, now),
        };
        self.pending = Some((seen, since, first));
        let due = now.duration_since(since) >= CONFIG_SETTLE || now.duration_since(first) >= CONFIG_SETTLE_MAX;
        if due {
            self.pending = None;
        }
        due
    }

    /// When to look again, where `poll` is the usual.
    #[must_use]
    pub fn next(&self, poll: Duration) -> Duration {
        if self.pending.is_some() { CONFIG_SETTLE.min(poll) } else { poll }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn contents_count_and_times_do_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        std::fs::write(&one, "a").expect("written");
        let mut sources = Sources::default();
        sources.replace(vec![two.clone(), one.clone(), one.clone()]);
        let first = sources.look();
        assert_eq!(sources.look(), first);
        std::fs::write(&one, "a").expect("written");
        assert_eq!(sources.look(), first, "the same contents");
        // What is not there yet counts, and so does where a link leads.
        std::fs::write(dir.path().join("b1"), "b").expect("written");
        std::fs::write(dir.path().join("b2"), "c").expect("written");
        symlink("b1", &two).expect("a link");
        let second = sources.look();
        assert_ne!(second, first);
        symlink("b2", dir.path().join("next")).expect("a link");
        std::fs::rename(dir.path().join("next"), &two).expect("swapped");
        let third = sources.look();
        assert_ne!(third, second);
        std::fs::remove_file(&two).expect("removed");
        assert_eq!(sources.look(), first);
    }

    /// The file system's clock need not move between two changes.
    #[test]
    fn a_change_that_leaves_size_and_times_alone_is_noticed() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("one");
        std::fs::write(&path, "b").expect("written");
        let stamp = Stamp::of(&std::fs::metadata(&path).expect("there"));
        let began = Instant::now().checked_sub(FILE_CLOCK).expect("the machine has been up for so long");
        let before = Known { stamp, digest: 7, since: began, confirmed: false };
        let after = digest(&path, &stamp, Some(&before));
        assert_ne!(after.digest, 7);
        assert!(!after.confirmed);
        let confirmed = digest(&path, &stamp, Some(&Known { since: began, ..after }));
        assert!(confirmed.confirmed);
        assert_eq!(confirmed.digest, after.digest);
    }

    #[test]
    fn a_change_is_read_when_it_has_come_to_rest_or_for_long_has_not() {
        let begin = Instant::now();
        let at = |ms: u64| begin + Duration::from_millis(ms);
        let (old, new) = (Digest(0), Digest(1));
        let mut settling = Settling::default();
        let settle = u64::try_from(CONFIG_SETTLE.as_millis()).expect("a short time");
        assert!(!settling.is_due(Some(old), old, at(0)));
        assert!(!settling.is_due(Some(old), new, at(10)));
        assert!(!settling.is_due(Some(old), new, at(10 + settle - 1)));
        assert!(settling.is_due(Some(old), new, at(10 + settle)));
        assert!(!settling.is_due(Some(new), new, at(11 + settle)), "once");
        // Changed back meanwhile, there is nothing to read.
        assert!(!settling.is_due(Some(new), old, at(5_000)));
        assert!(!settling.is_due(Some(new), new, at(5_100)));
        assert!(!settling.is_due(Some(new), old, at(6_000)));
        let mut restless = Settling::default();
        let due = (0..100).find(|step| restless.is_due(Some(old), Digest(2 + step), at(step * 100)));
        assert_eq!(due, Some(u64::try_from(CONFIG_SETTLE_MAX.as_millis()).expect("short") / 100));
    }
}

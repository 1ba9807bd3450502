//! Files that are read: configurations, the registry, keys and what is told of their ends.

use std::time::Duration;

/// A key file, a configuration or a registry file; anything larger is not one.
pub const FILE_MAX: u64 = 1024 * 1024;

/// How often an agent whose configuration gives times looks at the clock: its owner may set the clock, and it goes on
/// while a machine sleeps, which no timer notices. So a time is noticed at most this late.
pub const CLOCK_LOOK: Duration = Duration::from_secs(1);

/// Faults of a configuration that are shown; more than a person mends in one go are only counted.
pub const FAULTS_MAX: usize = 100;

/// Files and folders of a file registry; more than that belongs into a database.
pub const REGISTRY_ENTRIES_MAX: usize = 100_000;

/// A file registry is read once nothing in it has changed for this long, so that what an editor or `git pull` writes in
/// several steps is seen as one.
pub const REGISTRY_SETTLE: Duration = Duration::from_millis(100);

/// A file registry that does not come to rest is read anyhow after this long.
pub const REGISTRY_SETTLE_MAX: Duration = Duration::from_secs(2);

/// How often a file registry is looked at where the system does not tell of changes (network file systems do not): a
/// revocation is to hold within five seconds, and reading takes time, too.
pub const REGISTRY_POLL: Duration = Duration::from_secs(3);

/// How often it is looked whether a key has come near its end, at the least: clocks may be set.
pub const EXPIRIES_LOOKED_AT: Duration = Duration::from_secs(3600);

/// Notices of its key's end that an agent takes to heart on one link: there are three of each key, and an end that is
/// moved makes more. A gateway that goes on talks to nobody.
pub const KEY_NOTICES_PER_LINK: usize = 16;

/// How often `caponier keys rotate` asks a gateway whether an agent has come with its new key.
pub const ROTATION_POLL: Duration = Duration::from_millis(500);

/// Files of a registry that others may write and that are named one by one: more are as bad.
pub const EXPOSED_SHOWN: usize = 5;

/// How often the configuration file and the files that it names are looked at.
pub const CONFIG_POLL: Duration = Duration::from_secs(1);

/// A configuration is read once it has been the same for this long: an editor writes in several steps, and whoever has
/// changed it and sends SIGHUP comes before that.
pub const CONFIG_SETTLE: Duration = Duration::from_millis(700);

/// A configuration that does not come to rest is read anyhow after this long.
pub const CONFIG_SETTLE_MAX: Duration = Duration::from_millis(2500);

/// The clocks of file systems are coarse: within this time of a change, another one may leave all times and sizes the
/// same. Network file systems are the worst, with seconds.
pub const FILE_CLOCK: Duration = Duration::from_secs(2);

/// How often an operator is told that a faulty file registry is still not in force: a revocation in it is not either,
/// and one line is soon scrolled away.
pub const REGISTRY_REMINDER: Duration = Duration::from_secs(300);

//! Provisioning: databases, and the files that are written for applications.

use std::time::Duration;

/// From an open stream to a finished login at a database, TLS included.
pub const DATABASE_LOGIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Saying goodbye to a database; without it the server only logs that a client went away.
pub const DATABASE_GOODBYE: Duration = Duration::from_secs(2);

/// One statement at a database, save those that copy a whole one. Longer than [`DATABASE_LOCK_TIMEOUT`], so that the
/// server's own explanation arrives first.
pub const DATABASE_STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Making, dropping or extending a database: a template may hold many gigabytes.
pub const DATABASE_COPY_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Waiting for a lock at a database. A run that was killed holds its lock until the server notices, which takes it as
/// long as the tunnel needs to close.
pub const DATABASE_LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a provisioning run looks whether another one has let go of the output file, within
/// [`DATABASE_LOCK_TIMEOUT`].
pub const OUTPUT_LOCK_RETRY: Duration = Duration::from_millis(100);

/// Rounds of observing and changing in one provisioning run. The first does the work, the second finds what a template
/// brought along; more than a few mean that the server does not keep what it confirms.
pub const PROVISION_ROUNDS: usize = 4;

/// Characters of a generated password: 192 bits.
pub const PASSWORD_LENGTH: usize = 32;

/// How long another program may keep a kubeconfig locked: it writes a file, and kubectl does not wait at all.
pub const KUBECONFIG_LOCK: Duration = Duration::from_secs(5);

/// How often it is looked whether it has let go.
pub const KUBECONFIG_LOCK_RETRY: Duration = Duration::from_millis(20);

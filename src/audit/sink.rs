//! Where a trail goes: its sinks, and what each of them is promised.
//!
//! Promised:
//!
//! * Every sink gets the same bytes in the same order: a copy verifies by itself, and one that lost records shows that in
//!   the numbers of those it has.
//! * A sink that is `required` has a record before anything happens that rests on it. One that is not never keeps anybody
//!   waiting: it has a queue bounded in bytes and a thread or task of its own, what does not fit is counted, and the trail
//!   and the metrics say so.
//! * What is handed over is written, or known to be lost: [`Progress::written`] says up to where a sink has got.
//!
//! Sinks of this machine are an [`Output`] that blocks. Those over a network are tasks with [`Batches`] to send; they get
//! their streams from a [`Connect`], which is made higher up.

pub mod deliver;
pub(in crate::audit) mod file;
pub mod https;
mod queue;
mod renewed;
pub mod syslog;

use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::identity::PrivateKey;
use crate::limits::{HEAD_EVERY, HEAD_RECORDS, PROGRESS_EVERY, TRAIL_FSYNC};
use crate::target::Target;
use crate::task::Tasks;

pub use queue::{Batch, Batches, Progress};
pub(in crate::audit) use queue::{Feed, Losses, Order, pipe};

/// All that a trail is told: where it goes, how often it is signed, and what it says of long forwards.
#[derive(Debug, Clone)]
pub struct Sinks {
    /// The sinks; each has a name of its own.
    pub list: Vec<SinkConfig>,
    /// What the trail's heads are signed with.
    pub signing_key: Option<PrivateKey>,
    /// When a head is written.
    pub heads: Heads,
    /// How often a forward that lasts says how far it is.
    pub progress: Duration,
}

/// When the trail's head is written besides: at every rotation, and before the trail ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// After so many records.
    pub records: u64,
    /// After so long, if there is anything new.
    pub every: Duration,
}

impl Default for Heads {
    fn default() -> Self {
        Self { records: HEAD_RECORDS, every: HEAD_EVERY }
    }
}

/// One sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SinkConfig {
    /// What the trail, the metrics and the log call it.
    pub name: String,
    /// What it is.
    pub kind: SinkKind,
    /// Whether nothing happens that it does not have on record.
    pub required: bool,
    /// What of the trail it gets.
    pub only: Content,
}

/// What a sink gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Content {
    /// Everything.
    #[default]
    All,
    /// The heads alone, and what says which trail they are of: to be kept in another place.
    Heads,
}

/// What a sink is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SinkKind {
    /// A regular file of mode 0600, appended to and locked against other writers; made if it does not exist.
    File {
        /// Where the newest records are.
        path: PathBuf,
        /// When it is made to survive a power failure.
        fsync: Fsync,
        /// When it becomes an old one.
        rotate: Rotation,
    },
    /// Standard output.
    Stdout,
    /// A collector that speaks syslog.
    Syslog(syslog::Config),
    /// A collector that takes batches over HTTPS.
    Https(https::Config),
}

/// When a file is made to survive a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fsync {
    /// Before anybody is told that a record is written.
    Each,
    /// So often, if there is anything new, and at the end.
    Interval(Duration),
}

impl Default for Fsync {
    fn default() -> Self {
        Self::Interval(TRAIL_FSYNC)
    }
}

/// When a file is given another name and a new one begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rotation {
    /// When it is this large.
    pub bytes: Option<u64>,
    /// When it was begun so long ago.
    pub age: Option<Duration>,
    /// How many of the old ones are kept; all of them, where it does not say.
    pub keep: Option<usize>,
}

impl Sinks {
    /// Sinks with everything else as it is by default.
    #[must_use]
    pub fn new(list: Vec<SinkConfig>) -> Self {
        Self { list, signing_key: None, heads: Heads::default(), progress: PROGRESS_EVERY }
    }

    /// One required file that is never rotated.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>) -> Self {
        let kind = SinkKind::File { path: path.into(), fsync: Fsync::default(), rotate: Rotation::default() };
        Self::new(vec![SinkConfig::required("file", kind)])
    }

    /// The files among them.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.list.iter().filter_map(|sink| match &sink.kind {
            SinkKind::File { path, .. } => Some(path.as_path()),
            SinkKind::Stdout | SinkKind::Syslog(_) | SinkKind::Https(_) => None,
        })
    }

    /// Standard output alone.
    #[must_use]
    pub fn stdout() -> Self {
        Self::new(vec![SinkConfig::required("stdout", SinkKind::Stdout)])
    }
}

impl PartialEq for Sinks {
    fn eq(&self, other: &Self) -> bool {
        let key = |sinks: &Self| sinks.signing_key.as_ref().map(|key| key.public().fingerprint());
        let rest = |sinks: &Self| (sinks.heads, sinks.progress);
        self.list == other.list && rest(self) == rest(other) && key(self) == key(other)
    }
}

impl Eq for Sinks {}

impl SinkConfig {
    /// A sink that has to have everything.
    #[must_use]
    pub fn required(name: &str, kind: SinkKind) -> Self {
        Self { name: name.to_owned(), kind, required: true, only: Content::All }
    }
}

/// Makes a file durable, and blocks until then.
pub type Syncing = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// A sink of this machine, as far as whoever writes to it knows it. It blocks.
pub trait Output: Send {
    /// Writes some of `bytes`, and returns how many.
    ///
    /// # Errors
    /// If nothing could be written. What was written before stays.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Makes what was written durable.
    ///
    /// # Errors
    /// If that is not certain.
    fn sync(&mut self) -> io::Result<()>;

    /// What makes durable, on another thread, what was written until then. None where that is nothing to wait for.
    ///
    /// # Errors
    /// If there are no means for it; [`Output::sync`] does it then.
    fn syncing(&self) -> io::Result<Option<Syncing>> {
        Ok(None)
    }

    /// Puts what there is away under another name and begins anew; `first` is the number of the record that comes next.
    /// Nothing where there are no files.
    ///
    /// # Errors
    /// If that cannot be done; what there is then goes on.
    fn rotate(&mut self, first: u64) -> io::Result<()> {
        let _ = first;
        Ok(())
    }

    /// Told when a batch is written whole.
    fn wrote(&mut self, batch: &Batch) {
        let _ = batch;
    }
}

/// A stream to a collector.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// What a [`Connect`] promises.
pub type Connecting<'a> = Pin<Box<dyn Future<Output = io::Result<Box<dyn Stream>>> + Send + 'a>>;

/// Makes the connections of network sinks. Made higher up, where names are resolved and proxies are known.
pub trait Connect: fmt::Debug + Send + Sync {
    /// A TCP stream to `to`, through the proxy of that URL where there is one.
    fn connect<'a>(&'a self, to: &'a Target, proxy: Option<&'a str>) -> Connecting<'a>;
}

/// What a network sink works with.
#[derive(Debug, Clone)]
pub struct Means {
    /// How its collector is reached.
    pub connect: Arc<dyn Connect>,
    /// Whose threads read its files.
    pub tasks: Tasks,
}

/// Reaches nothing.
#[derive(Debug)]
pub struct NoNetwork;

impl Connect for NoNetwork {
    fn connect<'a>(&'a self, _to: &'a Target, _proxy: Option<&'a str>) -> Connecting<'a> {
        Box::pin(async { Err(io::Error::other("no sink of this process is reached over a network")) })
    }
}

/// Standard output. Not through the standard library's buffer: "written" has to mean written.
pub(in crate::audit) fn stdout() -> io::Result<Box<dyn Output>> {
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    Ok(stream(File::from(stdout)))
}

/// A pipe, terminal or socket.
pub(in crate::audit) fn stream(file: File) -> Box<dyn Output> {
    Box::new(Written(file))
}

/// What has no names and no disk.
struct Written(File);

impl Output for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// For what need not be synchronised.
pub(in crate::audit) const NEVER: Duration = Duration::MAX;

//! A configuration that is read again while the program runs: when SIGHUP asks for it, or when a file that it was read from
//! ([`sources`]) says something else than when it was read last.
//!
//! Promised: a change of the files is taken up within five seconds without being asked for, once it has come to rest; a
//! state is read once, whether it is in order or not, save that SIGHUP has any state read. It is read on a thread that
//! may block, so that a file system that hangs holds nothing up but the reading; requests that come meanwhile are one
//! request; who stops waiting for one and waits again gets what was read for it; and a service manager can be told when
//! a reload is under way. What a new configuration means is its program's business: see `agent` and `gateway`.

pub mod sources;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::sources::{Digest, Settling, Sources};
use crate::document::Faults;
use crate::limits;
use crate::task::Tasks;

/// A configuration that was read again and is in order.
#[derive(Debug)]
pub struct Fresh<C> {
    /// The configuration.
    pub config: C,
    /// Settings that have changed and that only a restart takes over, as far as whoever has read them knows.
    pub restart: Vec<&'static str>,
}

/// What a service manager is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A configuration is being read and taken over.
    Reloading,
    /// It is in force, or was refused.
    Settled,
}

/// Reasons to read the configuration again, and how to read it.
pub struct Reloads<C> {
    asked: Option<Asked<C>>,
    /// What is being read for a request.
    reading: Option<JoinHandle<Read<C>>>,
    tell: Tell,
}

struct Asked<C> {
    signal: Signal,
    load: Load<C>,
    file: PathBuf,
    watched: Watched,
    settling: Settling,
}

/// The files that a configuration was read from, and what they held then.
#[derive(Debug, Clone, Default)]
pub struct Watched {
    sources: Arc<Mutex<Sources>>,
    read: Option<Digest>,
}

type Tell = Box<dyn Fn(Phase) + Send + Sync>;

type Load<C> = Arc<dyn Fn() -> (Result<Fresh<C>, Faults>, Vec<PathBuf>) + Send + Sync>;

type Read<C> = (Result<Fresh<C>, Faults>, Option<Digest>);

impl Watched {
    /// Has `load` read the configuration in `file` for the first time. `load` also says which files it was read from.
    ///
    /// # Errors
    /// As `load`.
    pub fn read<T>(file: &Path, load: impl Fn() -> (Result<T, Faults>, Vec<PathBuf>)) -> Result<(T, Self), Faults> {
        let mut sources = Sources::default();
        let (loaded, read) = sources::read_steadily(&mut sources, file, load);
        Ok((loaded?, Self { sources: Arc::new(Mutex::new(sources)), read }))
    }
}

impl<C> fmt::Debug for Reloads<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloads").finish_non_exhaustive()
    }
}

impl<C: Send + 'static> Reloads<C> {
    /// From now on SIGHUP is a request, and no longer ends the process; and so is a change of the files that the configuration
    /// in `file` was read from. `load` may block; it also says which files it has read, or would have.
    ///
    /// # Errors
    /// If the signal cannot be had.
    pub fn following(
        file: PathBuf,
        watched: Watched,
        load: impl Fn() -> (Result<Fresh<C>, Faults>, Vec<PathBuf>) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let signal = signal(SignalKind::hangup())?;
        let asked = Asked { signal, load: Arc::new(load), file, watched, settling: Settling::default() };
        Ok(Self { asked: Some(asked), reading: None, tell: Box::new(|_| ()) })
    }

    /// No request ever comes: for a program within another, to which signals belong.
    #[must_use]
    pub fn never() -> Self {
        Self { asked: None, reading: None, tell: Box::new(|_| ()) }
    }

    /// Has `tell` called when a reload begins and when it is over, each once. It must not block.
    #[must_use]
    pub fn telling(self, tell: impl Fn(Phase) + Send + Sync + 'static) -> Self {
        Self { tell: Box::new(tell), ..self }
    }

    /// Waits for a request, or for the files to be other than what was read last, and reads. The caller says
    /// [`Reloads::settled`] when it has taken over what was read, or has refused it. Never comes back where no request
    /// can come any more. May be dropped; then nothing is lost.
    ///
    /// # Errors
    /// With every fault of what was read.
    pub async fn next(&mut self, tasks: &Tasks) -> Result<Fresh<C>, Faults> {
        loop {
            let reading = match &mut self.reading {
                Some(reading) => reading,
                none => {
                    let Some(asked) = &mut self.asked else { return std::future::pending().await };
                    asked.next(tasks).await;
                    (self.tell)(Phase::Reloading);
                    let (load, file, sources) = (asked.load.clone(), asked.file.clone(), asked.watched.sources.clone());
                    none.insert(tasks.spawn_blocking(move || {
                        let mut sources = sources.lock().unwrap_or_else(PoisonError::into_inner);
                        sources::read_steadily(&mut sources, &file, || load())
                    }))
                }
            };
            let read = reading.await;
            self.reading = None;
            match read {
                Ok((read, digest)) => {
                    if let Some(asked) = &mut self.asked {
                        asked.watched.read = digest;
                    }
                    return read;
                }
                // The reading panicked, or the runtime is going down: what is in force stays in force.
                Err(_) => self.settled(),
            }
        }
    }

    /// The reload is over.
    pub fn settled(&self) {
        (self.tell)(Phase::Settled);
    }
}

impl<C> Asked<C> {
    /// Waits for SIGHUP, or for the files to have changed and come to rest. May be dropped; then nothing is lost.
    async fn next(&mut self, tasks: &Tasks) {
        loop {
            let wait = self.settling.next(limits::CONFIG_POLL);
            tokio::select! {
                asked = self.signal.recv() => match asked {
                    Some(()) => return,
                    // The runtime is going down.
                    None => std::future::pending().await,
                },
                () = tokio::time::sleep(wait) => {}
            }
            let sources = self.watched.sources.clone();
            let looking = tasks.spawn_blocking(move || sources.lock().unwrap_or_else(PoisonError::into_inner).look());
            // A file system that hangs holds up a request, too, which would hang like it.
            let Ok(seen) = looking.await else { continue };
            if self.settling.is_due(self.watched.read, seen, Instant::now()) {
                return;
            }
        }
    }
}

/// What a program goes by: one value, which a reload replaces as a whole.
#[derive(Debug)]
pub struct Live<T>(watch::Sender<Arc<T>>);

impl<T> Live<T> {
    /// Begins with `value`.
    pub fn new(value: T) -> Self {
        Self(watch::Sender::new(Arc::new(value)))
    }

    /// What holds now.
    #[must_use]
    pub fn current(&self) -> Arc<T> {
        self.0.borrow().clone()
    }

    /// From now on `value` holds.
    pub fn replace(&self, value: T) {
        self.0.send_replace(Arc::new(value));
    }

    /// Has everybody who follows the value look at it again: what it says about a moment may have changed.
    pub fn tell_again(&self) {
        self.0.send_modify(|_| ());
    }

    /// What holds now, and a receiver that is told of every value after it.
    #[must_use]
    pub fn follow(&self) -> (Arc<T>, watch::Receiver<Arc<T>>) {
        let mut receiver = self.0.subscribe();
        let value = receiver.borrow_and_update().clone();
        (value, receiver)
    }

    /// Waits until what holds passes a test.
    pub async fn until(&self, mut test: impl FnMut(&T) -> bool) {
        // There is a sender for as long as there is somebody to ask this, so that the wait does not fail.
        let gone = self.0.subscribe().wait_for(|value| test(value)).await.is_err();
        if gone {
            std::future::pending().await
        }
    }
}

/// What came, went and changed from one configuration to the next, by ids: for the log and the trail, so never a secret.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    gone: Vec<String>,
    new: Vec<String>,
    changed: Vec<String>,
}

impl Changes {
    /// Notes that something is gone.
    pub fn remove(&mut self, what: impl fmt::Display) {
        self.gone.push(what.to_string());
    }

    /// Notes that something is new.
    pub fn add(&mut self, what: impl fmt::Display) {
        self.new.push(what.to_string());
    }

    /// Notes that something changed.
    pub fn change(&mut self, what: impl fmt::Display) {
        self.changed.push(what.to_string());
    }

    /// What is gone, what is new and what changed, in this order.
    #[must_use]
    pub fn lists(&self) -> [&[String]; 3] {
        [&self.gone, &self.new, &self.changed]
    }

    /// Compares two lists of things, each with what it goes by; `what` is put before that.
    pub fn compare<K: Ord + fmt::Display, V: PartialEq>(
        &mut self,
        what: impl fmt::Display,
        old: &BTreeMap<K, V>,
        new: &BTreeMap<K, V>,
    ) {
        for (id, thing) in old {
            match new.get(id) {
                None => self.gone.push(format!("{what}{id}")),
                Some(other) if other != thing => self.changed.push(format!("{what}{id}")),
                Some(_) => {}
            }
        }
        self.new.extend(new.keys().filter(|id| !old.contains_key(*id)).map(|id| format!("{what}{id}")));
    }
}

impl fmt::Display for Changes {
    /// What is gone first: records cut long texts short, and a revocation should be read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (word, things) in [("gone", &self.gone), ("new", &self.new), ("changed", &self.changed)] {
            if !things.is_empty() {
                let separator = if first { "" } else { "; " };
                write!(f, "{separator}{word}: {}", things.join(", "))?;
                first = false;
            }
        }
        if first { f.write_str("nothing changed") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn following<C: Send + 'static>(
        load: impl Fn() -> (Result<Fresh<C>, Faults>, Vec<PathBuf>) + Send + Sync + 'static,
    ) -> Reloads<C> {
        let ((), watched) = Watched::read(Path::new("none"), || (Ok(()), Vec::new())).expect("nothing to read");
        Reloads::following("none".into(), watched, load).expect("the signal")
    }

    fn things(pairs: &[(&'static str, u8)]) -> BTreeMap<&'static str, u8> {
        pairs.iter().copied().collect()
    }

    #[test]
    fn changes_name_what_is_gone_first() {
        let mut changes = Changes::default();
        assert_eq!(changes.to_string(), "nothing changed");
        changes.compare("rule acme/", &things(&[("a", 1), ("b", 1)]), &things(&[("a", 1), ("b", 1)]));
        assert_eq!(changes, Changes::default());
        changes.change("proxy");
        assert_eq!(changes.to_string(), "changed: proxy");
        changes.compare(
            "rule acme/",
            &things(&[("a", 1), ("b", 1), ("c", 1)]),
            &things(&[("b", 2), ("c", 1), ("d", 1)]),
        );
        assert_eq!(changes.to_string(), "gone: rule acme/a; new: rule acme/d; changed: proxy, rule acme/b");
    }

    /// A program that began to drain while it read its configuration waited for the next request, and what had been taken
    /// out of the configuration went on.
    #[tokio::test]
    async fn what_was_being_read_when_the_wait_was_dropped_is_not_lost() {
        let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
        let held = std::sync::Mutex::new(held);
        let load = move || {
            held.lock().expect("no panic").recv().ok();
            (Ok(Fresh { config: 7, restart: Vec::new() }), Vec::new())
        };
        let (tell, mut told) = tokio::sync::mpsc::channel(4);
        let mut reloads = following(load).telling(move |phase| tell.try_send(phase).expect("room"));
        let tasks = Tasks::new();
        let this = rustix::process::getpid();
        rustix::process::kill_process(this, rustix::process::Signal::HUP).expect("a signal");
        tokio::select! {
            read = reloads.next(&tasks) => panic!("read {read:?} before it could be"),
            phase = told.recv() => assert_eq!(phase, Some(Phase::Reloading)),
        }
        release.send(()).expect("somebody reads");
        let read = tokio::time::timeout(std::time::Duration::from_secs(30), reloads.next(&tasks)).await;
        assert_eq!(read.expect("in time").expect("in order").config, 7);
        reloads.settled();
        assert_eq!(told.recv().await, Some(Phase::Settled));
    }
}

//! The writer: one blocking task that owns the sink.
//!
//! It takes everything that is queued, writes it with as few calls as the sink allows, and then answers all who wait
//! (group commit). It runs until the trail is closed or nobody holds it any more, and writes what is queued even when
//! the runtime is going away.
//!
//! When a write fails, the part of a line that was written is cut off again (a file), or kept as owed and completed
//! before anything else (a stream). Those who wait are told; endings are kept in their order. Their number is bounded by
//! the places that openings reserved, because nothing opens meanwhile. Every further write, and every tick of the watcher,
//! begins with what is kept, and with a `trail.resumed` record, so that the gap is told in the trail itself.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FlockOperation, OFlags};
use serde::Deserialize;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::record::{
    ABANDONED, DENIED, ENDED, FAILED, OPEN, RECOVERED, RESUMED, Record, STARTED, STOPPED, STRANGERS, milliseconds, text,
};
use super::{Shared, Side, SinkKind, Sinks, StartError, lock};
use crate::chain::Chain;
use crate::limits::{TRAIL_BATCH, TRAIL_QUEUE, TRAIL_RECORD_MAX};

/// Where the outcome of a write goes.
pub(super) type Answer = oneshot::Sender<Result<(), Arc<io::Error>>>;

/// What the writer is asked to do. Lines end in a newline.
#[derive(Debug)]
pub(super) enum Message {
    /// A forward is about to open.
    Open { forward: Arc<str>, line: Vec<u8>, answer: Answer },
    /// It has ended. Never lost while the sink may recover; ignored if the opening was not accepted.
    End { forward: Arc<str>, line: Vec<u8> },
    /// Anything else that somebody waits for.
    Record { line: Vec<u8>, answer: Answer },
    /// Something that nobody waits for; counted if it cannot be written.
    Stranger { line: Vec<u8>, reason: &'static str },
    /// Time has passed.
    Tick,
    /// Write what there is, and end.
    Stop { answer: Answer },
}

/// A sink, as far as the writer knows it.
pub(super) trait Output: Send + 'static {
    /// Writes some of `bytes`, and returns how many.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Takes back the last `count` bytes written.
    fn retract(&mut self, count: u64) -> io::Result<()>;

    /// Makes what was written durable.
    fn sync(&mut self) -> io::Result<()>;
}

/// An open sink, and the lines that have to come first.
pub(super) type Prepared = (Box<dyn Output>, Vec<Vec<u8>>);

/// Opens a sink, and says which lines have to come first.
pub(super) fn prepare(sinks: &Sinks, side: Side) -> Result<Prepared, StartError> {
    let mut first = Vec::new();
    let output: Box<dyn Output> = match sinks.list.first().map(|sink| &sink.kind) {
        Some(SinkKind::File { path, .. }) => {
            let file = open(path)?;
            first = recover(&file, path, side)?;
            Box::new(AppendedFile(file))
        }
        _ => {
            // Not through the standard library's buffer: "written" has to mean written.
            let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(StartError::Stdout)?;
            Box::new(Stream(File::from(stdout)))
        }
    };
    first.push(started(side).line());
    Ok((output, first))
}

pub(super) struct Writer {
    output: Box<dyn Output>,
    queue: mpsc::Receiver<Message>,
    shared: Arc<Shared>,
    /// What is to be written, in order. Between two flushes only what survives a failure is left here.
    pending: VecDeque<Item>,
    /// Forwards whose opening is in the trail, or on its way there, and whose ending is not.
    open: HashSet<Arc<str>>,
    failing: Option<Failing>,
}

/// A line on its way.
struct Item {
    line: Vec<u8>,
    fate: Fate,
    /// The sink holds the line's beginning, and `line` is the rest of it.
    owed: bool,
}

/// What becomes of a line that cannot be written.
enum Fate {
    /// It stays. With the forward it closes, if it closes one whose opening may yet be dropped.
    Keep(Option<Arc<str>>),
    /// Somebody is told so.
    Refuse(Answer, Option<Arc<str>>),
    /// It is counted as one of many.
    Count(&'static str),
    /// It is split again into the counts it was made of.
    Uncount(BTreeMap<&'static str, u64>),
    /// It is made anew for the next attempt.
    Forget,
}

struct Failing {
    since: Instant,
    lost: u64,
}

impl Writer {
    /// Writes the first lines and is then ready to run.
    pub(super) fn start(
        output: Box<dyn Output>,
        first: Vec<Vec<u8>>,
        queue: mpsc::Receiver<Message>,
        shared: Arc<Shared>,
    ) -> Result<Self, StartError> {
        let pending = first.into_iter().map(|line| Item::new(line, Fate::Forget)).collect();
        let mut writer = Self { output, queue, shared, pending, open: HashSet::new(), failing: None };
        writer.flush().map_err(StartError::Write)?;
        Ok(writer)
    }

    /// Writes until the trail is closed or dropped.
    pub(super) fn run(mut self) {
        let mut stops = Vec::new();
        while stops.is_empty() {
            let Some(message) = self.queue.blocking_recv() else { break };
            stops.extend(self.take(message));
            for _ in 1..TRAIL_BATCH {
                let Ok(message) = self.queue.try_recv() else { break };
                stops.extend(self.take(message));
            }
            if stops.is_empty() {
                // Whoever needs to know has been told.
                let _ = self.flush();
            }
        }
        self.finish(stops);
    }

    fn finish(mut self, mut stops: Vec<Answer>) {
        self.queue.close();
        while let Ok(message) = self.queue.try_recv() {
            stops.extend(self.take(message));
        }
        self.add_strangers(true);
        let reason = if stops.is_empty() { "dropped" } else { "closed" };
        let open = self.open.len() as u64;
        let record = Record { forwards: Some(open), reason: text(reason), ..Record::own(self.shared.side, STOPPED) };
        self.pending.push_back(Item::new(record.line(), Fate::Forget));
        let result = self.flush().and_then(|()| self.output.sync().map_err(Arc::new));
        if let Err(error) = &result {
            let endings = self.pending.len();
            tracing::error!(error = %Chain(error.as_ref()), endings, "the audit trail was closed incomplete");
        }
        for stop in stops {
            let _ = stop.send(result.clone());
        }
    }

    /// Queues what a message asks for. Returns the answer that a stop waits for.
    fn take(&mut self, message: Message) -> Option<Answer> {
        let (line, fate) = match message {
            Message::Open { forward, line, answer } => {
                self.open.insert(Arc::clone(&forward));
                (line, Fate::Refuse(answer, Some(forward)))
            }
            Message::End { forward, line } => {
                if !self.open.remove(&forward) {
                    return None;
                }
                (line, Fate::Keep(Some(forward)))
            }
            Message::Record { line, answer } => (line, Fate::Refuse(answer, None)),
            Message::Stranger { line, reason } => (line, Fate::Count(reason)),
            Message::Tick => {
                self.add_strangers(false);
                return None;
            }
            Message::Stop { answer } => return Some(answer),
        };
        self.pending.push_back(Item::new(line, fate));
        None
    }

    fn add_strangers(&mut self, at_once: bool) {
        // While the sink fails they go on being counted.
        if self.failing.is_some() && !at_once {
            return;
        }
        let Some((counts, lasted)) = self.shared.strangers().due(Instant::now(), at_once) else { return };
        let record = Record {
            counts: counts.clone(),
            duration_ms: Some(milliseconds(lasted)),
            ..Record::own(self.shared.side, STRANGERS)
        };
        self.pending.push_back(Item::new(record.line(), Fate::Uncount(counts)));
    }

    /// Writes all that is pending, if need be after a word about the gap, and tells everybody concerned.
    fn flush(&mut self) -> Result<(), Arc<io::Error>> {
        if let Some(failing) = &self.failing {
            let record = Record {
                duration_ms: Some(milliseconds(failing.since.elapsed())),
                lost: Some(failing.lost),
                ..Record::own(self.shared.side, RESUMED)
            };
            // A line that the sink holds a part of has to be completed before any other.
            let at = usize::from(self.pending.front().is_some_and(|item| item.owed));
            self.pending.insert(at, Item::new(record.line(), Fate::Forget));
        }
        let mut bytes = Vec::with_capacity(self.pending.iter().map(|item| item.line.len()).sum());
        self.pending.iter().for_each(|item| bytes.extend_from_slice(&item.line));
        *lock(&self.shared.writing) = Some(Instant::now());
        let (written, failure) = self.write(&bytes);
        *lock(&self.shared.writing) = None;
        let partial = self.settle(written);
        match failure {
            None => {
                self.works();
                Ok(())
            }
            Some(error) => {
                let error = Arc::new(error);
                self.fails(partial, &error);
                Err(error)
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> (usize, Option<io::Error>) {
        let mut written = 0;
        while written < bytes.len() {
            match self.output.write(&bytes[written..]) {
                Ok(0) => return (written, Some(io::ErrorKind::WriteZero.into())),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (written, Some(error)),
            }
        }
        (written, None)
    }

    /// Takes the lines off that were written as a whole, and returns how many bytes of the next one were.
    fn settle(&mut self, mut written: usize) -> usize {
        while self.pending.front().is_some_and(|item| item.line.len() <= written) {
            let Some(item) = self.pending.pop_front() else { break };
            written -= item.line.len();
            if let Fate::Refuse(answer, _) = item.fate {
                // Nobody waiting means that the caller gave up; its entry ends itself.
                let _ = answer.send(Ok(()));
            }
        }
        written
    }

    fn works(&mut self) {
        if let Some(failing) = self.failing.take() {
            tracing::info!(lost = failing.lost, "the audit trail can be written again");
        }
        self.shared.failed.send_if_modified(|failed| failed.take().is_some());
    }

    fn fails(&mut self, partial: usize, error: &Arc<io::Error>) {
        let failing = self.failing.get_or_insert_with(|| {
            tracing::error!(
                error = %Chain(error.as_ref()),
                "the audit trail cannot be written: nothing opens until it can"
            );
            Failing { since: Instant::now(), lost: 0 }
        });
        let since = failing.since;
        self.shared.failed.send_if_modified(|failed| failed.is_none() && failed.replace(since).is_none());

        // What the sink holds of a line is taken back, else the rest of the line is owed.
        if let Some(item) = self.pending.front_mut() {
            item.owed = item.owed || (partial > 0 && self.output.retract(partial as u64).is_err());
        }
        let mut dropped = HashSet::new();
        for mut item in std::mem::take(&mut self.pending) {
            if item.owed {
                item.line.drain(..partial);
                if let Fate::Refuse(answer, _) = item.fate {
                    // The record will be in the trail after all. If it is an opening, its entry is dropped because of
                    // this answer, and closes it.
                    let _ = answer.send(Err(Arc::clone(error)));
                    failing.lost += 1;
                }
                self.pending.push_back(Item { fate: Fate::Keep(None), ..item });
                continue;
            }
            match item.fate {
                Fate::Keep(forward) => {
                    if !forward.as_ref().is_some_and(|forward| dropped.remove(forward)) {
                        self.pending.push_back(Item::new(item.line, Fate::Keep(forward)));
                    }
                }
                Fate::Refuse(answer, forward) => {
                    failing.lost += 1;
                    if let Some(forward) = forward {
                        self.open.remove(&forward);
                        dropped.insert(forward);
                    }
                    let _ = answer.send(Err(Arc::clone(error)));
                }
                Fate::Count(reason) => self.shared.strangers().count(reason, 1),
                Fate::Uncount(counts) => {
                    let mut strangers = self.shared.strangers();
                    counts.into_iter().for_each(|(reason, number)| strangers.count(reason, number));
                }
                Fate::Forget => {}
            }
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.over.cancel();
    }
}

impl Item {
    fn new(line: Vec<u8>, fate: Fate) -> Self {
        Self { line, fate, owed: false }
    }
}

/// A regular file that is only appended to.
struct AppendedFile(File);

impl Output for AppendedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // What goes into a file without a name is lost; better to stop opening than to write there.
        if self.0.metadata()?.nlink() == 0 {
            return Err(io::Error::other("the file was removed; restart, and rotate by copying and truncating"));
        }
        self.0.write(bytes)
    }

    fn retract(&mut self, count: u64) -> io::Result<()> {
        // By the present length: the file may have been truncated from outside since the last write.
        let length = self.0.metadata()?.len();
        self.0.set_len(length.saturating_sub(count))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// A sink of which nothing can be taken back.
#[cfg(test)]
pub(super) fn stream(file: File) -> Box<dyn Output> {
    Box::new(Stream(file))
}

/// A pipe, terminal or socket: what is written is gone.
struct Stream(File);

impl Output for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn retract(&mut self, _count: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open(path: &Path) -> Result<File, StartError> {
    let failed = |source| StartError::Open { path: path.to_owned(), source };
    // Not through a symbolic link, which would let whoever owns the directory choose another file; and without waiting
    // for the other end, should it be a pipe.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(flags.cast_signed())
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(StartError::NotAFile { path: path.to_owned() });
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(StartError::Mode { path: path.to_owned(), mode });
    }
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StartError::Locked { path: path.to_owned() }),
        Err(error) => Err(failed(error.into())),
    }
}

fn started(side: Side) -> Record {
    Record { version: Some(env!("CARGO_PKG_VERSION")), pid: Some(std::process::id()), ..Record::own(side, STARTED) }
}

/// Reads what an earlier process left, and returns the lines that put it in order: the end of a torn line, a closing
/// record for each forward that has none, and a `trail.recovered` that says so. Nothing if all is in order.
fn recover(file: &File, path: &Path, side: Side) -> Result<Vec<Vec<u8>>, StartError> {
    let left = Left::read(file).map_err(|source| StartError::Read { path: path.to_owned(), source })?;
    let mut open = left.unclosed;
    open.extend(left.open.into_values());
    if open.len() > TRAIL_QUEUE {
        return Err(StartError::TooManyOpen { path: path.to_owned() });
    }
    if open.is_empty() && left.torn_at.is_none() && left.unreadable == 0 {
        return Ok(Vec::new());
    }
    open.sort_by_key(|(offset, _)| *offset);
    let closed = open.len() as u64;
    let mut lines = Vec::with_capacity(open.len() + 3);
    if left.torn_at.is_some() {
        // The torn line stays, so that it can be seen that there was one.
        lines.push(b"\n".to_vec());
    }
    for (_, opening) in open {
        let own = Record::own(side, ABANDONED);
        let record = Record {
            time: own.time,
            event: own.event,
            side: own.side,
            reason: text("writer_ended"),
            detail: text("the process that wrote the opening ended without its end; when and how is not known"),
            ..*opening
        };
        lines.push(record.line());
    }
    let recovered = Record {
        forwards: Some(closed),
        torn_at: left.torn_at,
        unreadable: (left.unreadable > 0).then_some(left.unreadable),
        unreadable_at: left.unreadable_at,
        ..Record::own(side, RECOVERED)
    };
    lines.push(recovered.line());
    Ok(lines)
}

/// What is found in a file, in memory bounded by the forwards that are open at any one place of it.
#[derive(Default)]
struct Left {
    open: HashMap<String, (u64, Box<Record>)>,
    /// Those whose id was opened again without having been closed.
    unclosed: Vec<(u64, Box<Record>)>,
    torn_at: Option<u64>,
    unreadable: u64,
    unreadable_at: Option<u64>,
}

/// What decides about a line.
#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow)]
    forward: Option<Cow<'a, str>>,
}

impl Left {
    fn read(file: &File) -> io::Result<Self> {
        let mut left = Self::default();
        let mut reader = BufReader::with_capacity(TRAIL_RECORD_MAX, file);
        let mut offset = 0;
        let mut line = Vec::new();
        loop {
            let mut length = read_piece(&mut reader, &mut line)?;
            if length == 0 {
                return Ok(left);
            }
            let whole = line.last() == Some(&b'\n');
            if !whole && length < TRAIL_RECORD_MAX as u64 {
                // The file's end. If nothing but the newline is missing, then the line is a record, since that is
                // about to be written.
                left.torn_at = Some(offset);
                left.judge(&line, offset);
                return Ok(left);
            }
            let mut ended = whole;
            while !ended {
                let more = read_piece(&mut reader, &mut line)?;
                if more == 0 {
                    left.torn_at = Some(offset);
                    return Ok(left);
                }
                length += more;
                ended = line.last() == Some(&b'\n');
            }
            if !whole || !left.judge(&line, offset) {
                left.unreadable += 1;
                left.unreadable_at.get_or_insert(offset);
            }
            if left.open.len() + left.unclosed.len() > TRAIL_QUEUE {
                // Too many already; the caller refuses the file.
                return Ok(left);
            }
            offset += length;
        }
    }

    /// Takes a line into account, and returns whether it is a record.
    fn judge(&mut self, line: &[u8], offset: u64) -> bool {
        let Ok(head) = serde_json::from_slice::<Head<'_>>(line) else { return false };
        match (&*head.event, head.forward) {
            (STARTED, _) => {
                // What was unreadable before has been reported by then.
                self.unreadable = 0;
                self.unreadable_at = None;
            }
            (OPEN, Some(forward)) => {
                let Ok(record) = serde_json::from_slice::<Record>(line) else { return false };
                self.unclosed.extend(self.open.insert(forward.into_owned(), (offset, Box::new(record))));
            }
            (DENIED | FAILED | ENDED | ABANDONED, Some(forward)) => {
                self.open.remove(&*forward);
            }
            (OPEN, None) => return false,
            _ => {}
        }
        true
    }
}

/// Reads up to the next newline, but no more than a record may have. Returns how many bytes that were.
fn read_piece(reader: &mut BufReader<&File>, line: &mut Vec<u8>) -> io::Result<u64> {
    line.clear();
    Ok(reader.take(TRAIL_RECORD_MAX as u64).read_until(b'\n', line)? as u64)
}

//! What an earlier process left in a file: where the trail goes on, and what has to be put in order first.
//!
//! Promised: the chain goes on from the last whole record. A line that is torn stays as it is and is named with its digest;
//! one that lacks nothing but its newline is a record. Every forward that was left open is found, however many rotations ago
//! it was opened: `trail.continued` says where to begin. Files are read in one go, in memory bounded by the forwards that are
//! open at any one place. A trail that was stopped in good order is not read again but for its end.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use serde::Deserialize;

use super::StartError;
use super::chain::{Chain, Link, Linked, TrailId};
use super::record::{ABANDONED, CONTINUED, DENIED, ENDED, FAILED, OPEN, PROGRESS, RECOVERED, Record, STOPPED};
use super::sink::file::rotated;
use crate::limits::{TRAIL_QUEUE, TRAIL_RECORD_MAX};

/// What is found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The last record, if there is any.
    pub(super) last: Option<Last>,
    /// What is known of the forwards that were left open, in the order of their openings.
    #[expect(clippy::vec_box, reason = "they come boxed out of the map in which they were looked for")]
    pub(super) open: Vec<Box<Record>>,
    /// Whether records are missing among those that were read: the ends of what is taken for open may be among them.
    pub(super) gap: bool,
    /// An unfinished line at the end.
    pub(super) torn: Option<Torn>,
    /// Lines that are no records and that nobody has named yet, and where the first begins.
    pub(super) unreadable: u64,
    pub(super) unreadable_at: Option<u64>,
}

/// The end of a trail.
#[derive(Debug, Clone, Copy)]
pub(super) struct Last {
    pub(super) trail: TrailId,
    pub(super) seq: u64,
    pub(super) line: Link,
}

impl Last {
    pub(super) fn chain(&self) -> Chain {
        Chain::after(self.seq, self.line)
    }
}

/// An unfinished line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Torn {
    /// Where it begins.
    pub(super) at: u64,
    /// Of what is there; `None` if nothing but the newline is missing.
    pub(super) digest: Option<Link>,
}

/// Looks at what the file at `path` holds, and at those before it as far as needed.
///
/// # Errors
/// If it cannot be read, or holds more open forwards than a trail can.
pub(super) fn look(path: &Path, file: &File) -> Result<Found, StartError> {
    let failed = |source| StartError::Read { path: path.to_owned(), source };
    if let Some(last) = stopped(file).map_err(failed)? {
        return Ok(Found { last: Some(last), ..Found::default() });
    }
    let mut scan = Scan::default();
    for earlier in earlier(path, file).map_err(failed)? {
        scan.read(&earlier).map_err(failed)?;
        // Offsets are told of the file that is written on.
        (scan.torn, scan.unreadable, scan.unreadable_at) = (None, 0, None);
    }
    scan.read(file).map_err(failed)?;
    if scan.too_many() {
        return Err(StartError::TooManyOpen { path: path.to_owned() });
    }
    Ok(scan.found())
}

/// The end of a trail that was stopped in good order, with nothing open.
fn stopped(file: &File) -> io::Result<Option<Last>> {
    let length = file.metadata()?.len();
    let wide = length.min(TRAIL_RECORD_MAX as u64);
    let mut end = vec![0; usize::try_from(wide).unwrap_or_default()];
    file.read_exact_at(&mut end, length - wide)?;
    let Some(rest) = end.strip_suffix(b"\n") else { return Ok(None) };
    let begin = memchr::memrchr(b'\n', rest).map_or(0, |at| at + 1);
    let line = &end[begin..];
    let (Some(linked), Ok(head)) = (Linked::read(line), serde_json::from_slice::<Head<'_>>(line)) else {
        return Ok(None);
    };
    let trail = head.trail.as_deref().and_then(TrailId::parse);
    let in_order = head.event == STOPPED && head.forwards == Some(0);
    Ok(trail.filter(|_| in_order).map(|trail| Last { trail, seq: linked.seq, line: Link::of(line) }))
}

/// The rotated files in which forwards may have been opened that are still open where `file` begins.
fn earlier(path: &Path, file: &File) -> io::Result<Vec<File>> {
    let mut files = rotated(path)?;
    let mut from = continued(file)?;
    let mut chosen = Vec::new();
    // From the newest back. A file that holds no whole record yet says nothing of where to begin; the one before it does.
    while let (From::Record(_) | From::Unknown, Some((first, name))) = (&from, files.pop()) {
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
        let old = OpenOptions::new().read(true).custom_flags(flags.cast_signed()).open(name)?;
        from = match from {
            From::Record(wanted) if first <= wanted => From::Here,
            From::Unknown => continued(&old)?,
            from => from,
        };
        chosen.push(old);
    }
    chosen.reverse();
    Ok(chosen)
}

/// Where to begin to read for all that is open.
enum From {
    /// At the beginning of this file.
    Here,
    /// At this record of an earlier one.
    Record(u64),
    /// The file does not say, since it holds nothing.
    Unknown,
}

fn continued(file: &File) -> io::Result<From> {
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(0))?;
    let mut line = Vec::new();
    read_piece(&mut reader, &mut line)?;
    let Ok(head) = serde_json::from_slice::<Head<'_>>(&line) else {
        return Ok(if line.ends_with(b"\n") { From::Here } else { From::Unknown });
    };
    Ok(match head.open_from {
        Some(from) if head.event == CONTINUED => From::Record(from),
        _ => From::Here,
    })
}

/// What is found on the way through one file after the other.
#[derive(Default)]
struct Scan {
    open: HashMap<String, (u64, Box<Record>)>,
    /// Those whose id was opened again without having been closed.
    unclosed: Vec<(u64, Box<Record>)>,
    trail: Option<TrailId>,
    /// The last line that is linked, if `linked`.
    last: Vec<u8>,
    linked: Option<u64>,
    /// Whether one of the lines that are linked does not follow the one before.
    gap: bool,
    /// How many lines have been read.
    lines: u64,
    torn: Option<Torn>,
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
    #[serde(borrow)]
    trail: Option<Cow<'a, str>>,
    forwards: Option<u64>,
    open_from: Option<u64>,
}

impl Scan {
    fn read(&mut self, file: &File) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(TRAIL_RECORD_MAX, file);
        reader.seek(SeekFrom::Start(0))?;
        let mut offset = 0;
        let mut line = Vec::new();
        loop {
            let mut length = read_piece(&mut reader, &mut line)?;
            if length == 0 {
                return Ok(());
            }
            let whole = line.ends_with(b"\n");
            if !whole && length < TRAIL_RECORD_MAX as u64 {
                // The file's end. If nothing but the newline is missing, then the line is a record, since that is
                // about to be written.
                let torn = Link::of(&line);
                line.push(b'\n');
                let record = self.judge(&mut line);
                self.torn = Some(Torn { at: offset, digest: (!record).then_some(torn) });
                return Ok(());
            }
            let mut ended = whole;
            while !ended {
                let more = read_piece(&mut reader, &mut line)?;
                if more == 0 {
                    let mut rest = file;
                    rest.seek(SeekFrom::Start(offset))?;
                    self.torn = Some(Torn { at: offset, digest: Some(Link::over(rest)?) });
                    return Ok(());
                }
                length += more;
                ended = line.ends_with(b"\n");
            }
            if !whole || !self.judge(&mut line) {
                self.unreadable += 1;
                self.unreadable_at.get_or_insert(offset);
            }
            if self.too_many() {
                // The caller refuses the file.
                return Ok(());
            }
            offset += length;
        }
    }

    /// Takes a line into account, and returns whether it is a record.
    fn judge(&mut self, line: &mut Vec<u8>) -> bool {
        let Ok(head) = serde_json::from_slice::<Head<'_>>(line) else { return false };
        self.lines += 1;
        match (&*head.event, head.forward) {
            (RECOVERED, _) => {
                // What was unreadable before has been reported by this.
                self.unreadable = 0;
                self.unreadable_at = None;
            }
            (OPEN, Some(forward)) => {
                let Ok(record) = serde_json::from_slice::<Record>(line) else { return false };
                self.unclosed.extend(self.open.insert(forward.into_owned(), (self.lines, Box::new(record))));
            }
            (PROGRESS, Some(forward)) => {
                let Ok(record) = serde_json::from_slice::<Record>(line) else { return false };
                // Where the opening is too long ago to be read, this stands for it.
                let at = self.open.get(&*forward).map_or(self.lines, |(at, _)| *at);
                self.open.insert(forward.into_owned(), (at, Box::new(record)));
            }
            (DENIED | FAILED | ENDED | ABANDONED, Some(forward)) => {
                self.open.remove(&*forward);
            }
            (OPEN, None) => return false,
            _ => {}
        }
        if let Some(trail) = head.trail.as_deref().and_then(TrailId::parse) {
            self.trail = Some(trail);
        }
        if let Some(linked) = Linked::read(line) {
            self.gap |= self.linked.is_some_and(|before| before.checked_add(1) != Some(linked.seq));
            self.linked = Some(linked.seq);
            std::mem::swap(&mut self.last, line);
        }
        true
    }

    fn too_many(&self) -> bool {
        self.open.len() + self.unclosed.len() > TRAIL_QUEUE
    }

    fn found(mut self) -> Found {
        let mut open = std::mem::take(&mut self.unclosed);
        open.extend(self.open.into_values());
        open.sort_by_key(|(line, _)| *line);
        let last = self.trail.zip(self.linked);
        Found {
            last: last.map(|(trail, seq)| Last { trail, seq, line: Link::of(&self.last) }),
            open: open.into_iter().map(|(_, record)| record).collect(),
            gap: self.gap,
            torn: self.torn,
            unreadable: self.unreadable,
            unreadable_at: self.unreadable_at,
        }
    }
}

/// Reads up to the next newline, but no more than a record may have. Returns how many bytes that were.
fn read_piece(reader: &mut BufReader<&File>, line: &mut Vec<u8>) -> io::Result<u64> {
    line.clear();
    Ok(reader.take(TRAIL_RECORD_MAX as u64).read_until(b'\n', line)? as u64)
}

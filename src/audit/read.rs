//! Reading trails: as fast as the disk allows, in memory that does not grow with them.
//!
//! Promised:
//!
//! * What is read is what whole lines say. A line that is torn, too long, or no record is counted and passed over, and never
//!   ends the reading; who reads is told where the first of them begins.
//! * Memory is bounded by [`crate::limits::TRAIL_READ`] for each file that is open, whatever is in it.
//! * A trail is found with all of its rotated files, in their order ([`files`]).
//! * The time index beside a file ([`index`]) only saves reading: it is held against the file before it is believed, and
//!   what it does not cover is read.
//! * Nothing here writes, locks or changes a file; a trail can be read while it is written.
//!
//! Not promised: that what is read is what was written. That is for [`crate::audit::verify`].
//!
//! Nothing here waits but [`Follow`]'s caller, between two looks at the file.

pub mod files;
pub mod filter;
pub mod index;
pub mod joined;
mod last;
mod lines;
mod record;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use files::{FileId, Part};
use filter::Filter;
use lines::{Lines, Piece};

pub use last::last;
pub use record::Record;

/// Why a trail could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// There is no such file.
    #[error("there is no audit trail {}; `file` in the [audit] table of the configuration says where it is", path.display())]
    Absent {
        /// The file.
        path: PathBuf,
    },
    /// The file is another user's.
    #[error("the audit trail {} may not be read; run this as the user that writes it, or as root", path.display())]
    Forbidden {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The path is a directory.
    #[error("{} is a directory; name the trail's file in it", path.display())]
    Directory {
        /// The path.
        path: PathBuf,
    },
    /// Reading failed.
    #[error("could not read the audit trail {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ReadError {
    fn of(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::Absent { path },
            io::ErrorKind::PermissionDenied => Self::Forbidden { path, source },
            io::ErrorKind::IsADirectory => Self::Directory { path },
            _ => Self::Read { path, source },
        }
    }
}

/// Who hears of what is found.
pub trait Hearer {
    /// A record that was asked for, with its line, which ends in a newline. `Break` ends the reading.
    fn found(&mut self, line: &[u8], record: Record) -> ControlFlow<()>;

    /// So many bytes more have been read or found to hold nothing that is asked for.
    fn passed(&mut self, _bytes: u64) {}

    /// The last file of a trail has been read.
    fn ended(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// What was met besides records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Lines that are no records.
    pub unreadable: u64,
    /// The file and the place in it where the first of these begins.
    pub first_unreadable: Option<(PathBuf, u64)>,
    /// Whether the last file ends within a line. Somebody may be writing it.
    pub torn: bool,
}

impl Tally {
    fn unreadable(&mut self, path: &Path, offset: u64) {
        self.unreadable += 1;
        self.first_unreadable.get_or_insert_with(|| (path.to_owned(), offset));
    }
}

/// Reads all parts in their order, and tells of what the filter admits.
///
/// # Errors
/// If a file cannot be read. What was found before has been told.
pub fn scan(parts: &[Part], filter: &Filter, hearer: &mut dyn Hearer) -> Result<Tally, ReadError> {
    let mut tally = Tally::default();
    for (at, part) in parts.iter().enumerate() {
        let failed = |source| ReadError::of(&part.path, source);
        tally.torn = false;
        let flow = if part.is_stdin() {
            read(io::stdin().lock(), 0, part, filter, hearer, &mut tally).map_err(failed)?
        } else {
            scan_file(part, filter, hearer, &mut tally).map_err(failed)?
        };
        if flow.is_break() {
            return Ok(tally);
        }
        let last = parts.get(at + 1).is_none_or(|next| next.trail != part.trail);
        if last && hearer.ended().is_break() {
            return Ok(tally);
        }
    }
    Ok(tally)
}

fn scan_file(part: &Part, filter: &Filter, hearer: &mut dyn Hearer, tally: &mut Tally) -> io::Result<ControlFlow<()>> {
    let mut file = open(&part.path)?;
    let length = file.metadata()?.len();
    let index = match (filter.window(), part.index) {
        (Some(window), true) => index::select(&mut file, &part.path, length, window),
        _ => None,
    };
    let Some(ranges) = index else { return read(file, 0, part, filter, hearer, tally) };
    let mut at = 0;
    for range in ranges {
        hearer.passed(range.start - at);
        file.seek(SeekFrom::Start(range.start))?;
        // To the end if it is the last, since the file may have grown.
        let bytes = if range.end == length { u64::MAX } else { range.end - range.start };
        if read((&file).take(bytes), range.start, part, filter, hearer, tally)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        at = range.end;
    }
    hearer.passed(length.saturating_sub(at));
    Ok(ControlFlow::Continue(()))
}

fn read(
    from: impl Read,
    offset: u64,
    part: &Part,
    filter: &Filter,
    hearer: &mut dyn Hearer,
    tally: &mut Tally,
) -> io::Result<ControlFlow<()>> {
    let mut lines = Lines::new(from, offset);
    let mut told = offset;
    while let Some(piece) = lines.next()? {
        if piece.offset - told >= PROGRESS_BYTES {
            hearer.passed(piece.offset - told);
            told = piece.offset;
        }
        let Piece { offset, line } = piece;
        match judge(line, filter) {
            Judged::Other => {}
            Judged::Unreadable => tally.unreadable(&part.path, offset),
            Judged::Wanted(record) => {
                if hearer.found(line.unwrap_or_default(), *record).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
    }
    hearer.passed(lines.position() - told);
    tally.torn = lines.rest() > 0;
    Ok(ControlFlow::Continue(()))
}

enum Judged {
    /// Not what is asked for.
    Other,
    Unreadable,
    Wanted(Box<Record>),
}

/// What a line is; `None` is one that was too long. Most are judged by their first and last bytes, and by a search.
fn judge(line: Option<&[u8]>, filter: &Filter) -> Judged {
    let Some(line) = line.filter(|line| line.starts_with(b"{") && line.ends_with(b"}\n")) else {
        return Judged::Unreadable;
    };
    if !filter.may_admit(line) {
        return Judged::Other;
    }
    match Record::read(line) {
        None => Judged::Unreadable,
        Some(record) if filter.admits(&record) => Judged::Wanted(Box::new(record)),
        Some(_) => Judged::Other,
    }
}

/// How often who reads hears how far it is.
const PROGRESS_BYTES: u64 = 4 << 20;

fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    Ok(file)
}

/// A trail that is read on while it is written: over rotations, and after having been cut.
#[derive(Debug)]
pub struct Follow {
    path: PathBuf,
    file: FileId,
    lines: Lines<File>,
    tally: Tally,
    cut: bool,
}

impl Follow {
    /// Begins after the last whole line of the file.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn at_end(path: &Path) -> Result<Self, ReadError> {
        let failed = |source| ReadError::of(path, source);
        let mut file = open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let end = last::end_of_lines(&file, metadata.len()).map_err(failed)?;
        file.seek(SeekFrom::Start(end)).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            file: FileId::of(&metadata),
            lines: Lines::new(file, end),
            tally: Tally::default(),
            cut: false,
        })
    }

    /// The file that is read now.
    #[must_use]
    pub fn file(&self) -> FileId {
        self.file
    }

    /// How far it has been read.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.lines.position()
    }

    /// What was met besides records, since the last time that this was asked.
    pub fn tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    /// Whether the file was cut since the last time that this was asked: what it held and was not read is lost.
    pub fn was_cut(&mut self) -> bool {
        std::mem::take(&mut self.cut)
    }

    /// Reads what has come, on into the files that came after, and tells of what the filter admits.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn look(&mut self, filter: &Filter, hearer: &mut dyn Hearer) -> Result<ControlFlow<()>, ReadError> {
        loop {
            if self.drain(filter, hearer)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            // What was written up to the rotation is there by now; what comes after goes into the next file.
            let Some(next) = files::after(&self.path, self.file).map_err(|error| self.failed(error))? else {
                return Ok(ControlFlow::Continue(()));
            };
            if self.drain(filter, hearer)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            if self.lines.rest() > 0 {
                self.tally.unreadable(&self.path, self.lines.position());
            }
            let file = match open(&next) {
                Ok(file) => file,
                // Renamed or taken away since: the next look finds it under its other name, or what came after it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ControlFlow::Continue(())),
                Err(error) => return Err(ReadError::of(&next, error)),
            };
            self.file = FileId::of(&file.metadata().map_err(|error| self.failed(error))?);
            self.lines = Lines::new(file, 0);
        }
    }

    fn drain(&mut self, filter: &Filter, hearer: &mut dyn Hearer) -> Result<ControlFlow<()>, ReadError> {
        let path = self.path.clone();
        let failed = |source| ReadError::of(&path, source);
        let length = self.lines.inner().metadata().map_err(failed)?.len();
        if length < self.lines.position() + self.lines.rest() as u64 {
            self.cut = true;
            self.lines.rewind().map_err(failed)?;
        }
        while let Some(Piece { offset, line }) = self.lines.next().map_err(failed)? {
            match judge(line, filter) {
                Judged::Other => {}
                Judged::Unreadable => self.tally.unreadable(&path, offset),
                Judged::Wanted(record) => {
                    if hearer.found(line.unwrap_or_default(), *record).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn failed(&self, source: io::Error) -> ReadError {
        ReadError::of(&self.path, source)
    }
}

#[cfg(test)]
mod tests;

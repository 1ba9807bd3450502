//! A file that a trail is appended to.
//!
//! Promised: it is a regular file of mode 0600 that nobody else writes, and it is not reached through a symbolic link. A
//! file that was removed, moved or replaced is not written to any more. At a rotation it gets the name
//! `PATH.20261121T200000Z-<number of its first record>`, and a new one stands in its place at once; the newest records are
//! always at `PATH`. If that cannot be done the old one goes on. Old files are deleted only where it is said how many to keep.
//!
//! Beside it lies `PATH.index`, for whoever looks for a time: an entry of 24 bytes for about each MiB of whole lines, with
//! the offset of their end (`u64`) and the earliest and the latest time among them in milliseconds of Unix time (`i64`), all in
//! little-endian order. It is a convenience: nothing fails because of it, and where it could be wrong it is taken away.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, OFlags};

use super::super::StartError;
use super::super::chain::Linked;
use super::super::record::{moment, time_of};
use super::{Batch, Fsync, Output, Syncing};
use crate::limits::{TRAIL_INDEX_CATCH_UP, TRAIL_INDEX_STEP, TRAIL_RECORD_MAX};

/// An open file of a trail.
#[derive(Debug)]
pub(in crate::audit) struct Appended {
    path: PathBuf,
    file: File,
    /// How long it is, as far as we know.
    length: u64,
    /// The number of its first record, if it has any.
    first: Option<u64>,
    keep: Option<usize>,
    /// Whether names are made durable, too.
    durable: bool,
    index: Option<Index>,
}

impl Appended {
    /// Opens and locks the file at `path`, and makes it if it does not exist.
    ///
    /// # Errors
    /// If there is something at `path` that will not do, or another process writes to it.
    pub(in crate::audit) fn open(path: &Path, fsync: Fsync, keep: Option<usize>) -> Result<Self, StartError> {
        let file = open(path, false)?;
        let failed = |source| StartError::Open { path: path.to_owned(), source };
        // What a rotation left that was cut short before the new file had its name.
        let _ = remove_empty(&fresh_name(path));
        let length = file.metadata().map_err(failed)?.len();
        let index = Index::resume(&index_name(path), &file, length);
        let first = first_number(&file).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, length, first, keep, durable: fsync == Fsync::Each, index })
    }

    pub(in crate::audit) fn file(&self) -> &File {
        &self.file
    }

    pub(in crate::audit) fn length(&self) -> u64 {
        self.length
    }

    /// When its first record was written; now, where that cannot be said.
    pub(in crate::audit) fn begun(&self) -> Timestamp {
        let mut head = [0; 64];
        let count = self.file.read_at(&mut head, 0).unwrap_or(0);
        let time = time_of(&head[..count]).and_then(moment);
        time.and_then(|time| Timestamp::from_millisecond(time).ok()).unwrap_or_else(Timestamp::now)
    }

    /// Whether what is written goes where people look for it.
    fn in_place(&mut self) -> io::Result<()> {
        let held = self.file.metadata()?;
        if held.nlink() == 0 {
            return Err(io::Error::other("the file was removed; restart, or let caponier rotate it"));
        }
        let moved = |what| io::Error::other(format!("the file was {what}; move it back, and let caponier rotate it"));
        match fs::symlink_metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) == (held.dev(), held.ino()) => {}
            Ok(_) => return Err(moved("replaced by another")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(moved("moved")),
            Err(error) => return Err(error),
        }
        if held.len() != self.length {
            if held.len() < self.length {
                tracing::warn!(path = %self.path.display(), "the audit trail's file was cut; what is missing shows");
            }
            self.length = held.len();
            self.drop_index();
        }
        Ok(())
    }

    fn drop_index(&mut self) {
        if self.index.take().is_some() {
            let _ = fs::remove_file(index_name(&self.path));
        }
    }

    /// Deletes the oldest of the rotated files that are not to be kept.
    fn forget(&self) {
        let Some(keep) = self.keep else { return };
        let mut files = rotated(&self.path).unwrap_or_default();
        files.truncate(files.len().saturating_sub(keep));
        for (_, old) in files {
            if let Err(error) = fs::remove_file(&old) {
                tracing::warn!(path = %old.display(), %error, "could not delete an old file of the audit trail");
            }
            let _ = fs::remove_file(index_name(&old));
        }
    }
}

impl Output for Appended {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.in_place()?;
        let count = self.file.write(bytes)?;
        self.length += count as u64;
        Ok(count)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn syncing(&self) -> io::Result<Option<Syncing>> {
        let file = self.file.try_clone()?;
        Ok(Some(Box::new(move || file.sync_data())))
    }

    fn rotate(&mut self, first: u64) -> io::Result<()> {
        self.in_place()?;
        // Before anything has another name, so that a full disk changes nothing.
        let fresh = fresh_name(&self.path);
        remove_empty(&fresh)?;
        let next = open(&fresh, true).map_err(io::Error::other)?;
        self.file.sync_data()?;
        let old = rotated_name(&self.path, Timestamp::now(), self.first.unwrap_or_default());
        if old.symlink_metadata().is_ok() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{} exists", old.display())));
        }
        fs::rename(&self.path, &old)?;
        if let Err(error) = fs::rename(&fresh, &self.path) {
            // Back to what was, so that the records go where people look for them.
            fs::rename(&old, &self.path)?;
            return Err(error);
        }
        if self.index.take().is_some() {
            let _ = fs::rename(index_name(&self.path), index_name(&old));
        }
        self.file = next;
        (self.length, self.first) = (0, Some(first));
        self.index = Index::resume(&index_name(&self.path), &self.file, 0);
        if self.durable {
            File::open(folder(&self.path))?.sync_all()?;
        }
        self.forget();
        Ok(())
    }

    fn wrote(&mut self, batch: &Batch) {
        self.first.get_or_insert(batch.first);
        let length = self.length;
        if self.index.as_mut().is_some_and(|index| index.add(batch.times, length).is_err()) {
            self.drop_index();
        }
    }
}

/// The files that a trail's file was before, with the number of the first record of each. The oldest come first.
///
/// # Errors
/// If the folder cannot be read.
pub(in crate::audit) fn rotated(path: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let Some(name) = path.file_name() else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder(path))? {
        let entry = entry?;
        let first = entry
            .file_name()
            .as_encoded_bytes()
            .strip_prefix(name.as_encoded_bytes())
            .and_then(|rest| rest.strip_prefix(b"."))
            .and_then(|rest| std::str::from_utf8(rest).ok())
            .and_then(rotated_at);
        if let Some(first) = first {
            // Called as the trail itself was, for whoever compares the two.
            found.push((first, path.with_file_name(entry.file_name())));
        }
    }
    found.sort();
    Ok(found)
}

/// The number in the name that a rotation gives, after the file's own name and a dot.
fn rotated_at(suffix: &str) -> Option<u64> {
    let (time, number) = suffix.split_once('-')?;
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (day, clock) = time.strip_suffix('Z')?.split_once('T')?;
    let dated = day.len() == 8 && clock.len() == 6 && digits(day) && digits(clock);
    (dated && number.len() >= 12 && digits(number)).then(|| number.parse().ok()).flatten()
}

fn rotated_name(path: &Path, now: Timestamp, first: u64) -> PathBuf {
    with(path, &format!(".{}-{first:012}", now.strftime("%Y%m%dT%H%M%SZ")))
}

/// What the index of a file is called.
pub(in crate::audit) fn index_name(path: &Path) -> PathBuf {
    with(path, ".index")
}

/// What a new file is called until it has its place.
fn fresh_name(path: &Path) -> PathBuf {
    with(path, ".new")
}

fn with(path: &Path, end: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(end);
    name.into()
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn remove_empty(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(there) if there.is_file() && there.len() == 0 => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{} is in the way", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn open(path: &Path, new: bool) -> Result<File, StartError> {
    let failed = |source| StartError::Open { path: path.to_owned(), source };
    // Not through a symbolic link, which would let whoever owns the directory choose another file; and without waiting
    // for the other end, should it be a pipe.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(!new)
        .create_new(new)
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

/// The number of the first record of a file.
fn first_number(file: &File) -> io::Result<Option<u64>> {
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(0))?;
    let mut line = Vec::new();
    io::Read::take(reader, TRAIL_RECORD_MAX as u64).read_until(b'\n', &mut line)?;
    Ok(Linked::read(&line).map(|linked| linked.seq))
}

/// The index of one file.
#[derive(Debug)]
struct Index {
    file: File,
    /// Where the records end that have an entry.
    end: u64,
    /// The earliest and the latest time of those after them.
    times: Option<(i64, i64)>,
}

impl Index {
    /// Goes on with the index of a file that is so long, or begins it; none where that would take long, or fails.
    fn resume(path: &Path, data: &File, length: u64) -> Option<Self> {
        Self::try_resume(path, data, length).ok().flatten().or_else(|| {
            let _ = fs::remove_file(path);
            None
        })
    }

    fn try_resume(path: &Path, data: &File, length: u64) -> io::Result<Option<Self>> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600).custom_flags(flags.bits().cast_signed());
        let file = options.open(path)?;
        let size = file.metadata()?.len();
        let mut index = Self { file, end: 0, times: None };
        if length == 0 {
            index.file.set_len(0)?;
            return Ok(Some(index));
        }
        // Whatever is at the end and is no whole entry was on its way when the process died.
        let whole = size - size % ENTRY_LEN;
        index.file.set_len(whole)?;
        if whole > 0 {
            let mut end = [0; 8];
            index.file.read_exact_at(&mut end, whole - ENTRY_LEN)?;
            index.end = u64::from_le_bytes(end);
        }
        if index.end > length || length - index.end > TRAIL_INDEX_CATCH_UP {
            return Ok(None);
        }
        let mut reader = BufReader::with_capacity(TRAIL_RECORD_MAX, data);
        reader.seek(SeekFrom::Start(index.end))?;
        let mut line = Vec::new();
        while io::Read::take(&mut reader, TRAIL_RECORD_MAX as u64).read_until(b'\n', &mut line)? > 0 {
            if let Some(time) = time_of(&line).and_then(moment) {
                index.times = Some(widen(index.times, (time, time)));
            }
            line.clear();
        }
        Ok(Some(index))
    }

    /// Takes a batch into account after which the file is so long.
    fn add(&mut self, times: (i64, i64), length: u64) -> io::Result<()> {
        let (earliest, latest) = widen(self.times, times);
        self.times = Some((earliest, latest));
        if length.saturating_sub(self.end) < TRAIL_INDEX_STEP {
            return Ok(());
        }
        let mut entry = length.to_le_bytes().to_vec();
        entry.extend_from_slice(&earliest.to_le_bytes());
        entry.extend_from_slice(&latest.to_le_bytes());
        self.file.write_all(&entry)?;
        (self.end, self.times) = (length, None);
        Ok(())
    }
}

fn widen(times: Option<(i64, i64)>, more: (i64, i64)) -> (i64, i64) {
    times.map_or(more, |times| (times.0.min(more.0), times.1.max(more.1)))
}

/// Bytes of an entry of the index.
const ENTRY_LEN: u64 = 24;

//! The time index of a trail's file: which parts of it can hold records of a time.
//!
//! An entry is written for about each MiB of records. It has 24 bytes, in little-endian order: the offset at which the
//! records end that it is about (`u64`), and the earliest and the latest time among these, or among all up to there, in
//! milliseconds since 1970 (`i64`). The records of an entry begin where those of the one before end.
//!
//! So a clock that jumps does no harm: what is left out is only what is not within the bounds of its own entry, and bounds
//! that are too wide only cost time. An index that does not fit its file is not used at all.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::files::index_of;
use super::record::time_of;
use crate::limits::{TRAIL_INDEX_MAX, TRAIL_RECORD_MAX};

/// Moments in milliseconds since 1970, the second excluded.
pub(super) type Window = Range<i64>;

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where the records end that it is about.
    pub end: u64,
    /// The earliest time among them.
    pub earliest: i64,
    /// The latest.
    pub latest: i64,
}

impl Entry {
    /// Bytes of an entry.
    pub const LEN: usize = 24;

    /// The entry as it stands in an index.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.end.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.earliest.to_le_bytes());
        bytes[16..].copy_from_slice(&self.latest.to_le_bytes());
        bytes
    }

    /// Reads it back.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            word
        };
        Self {
            end: u64::from_le_bytes(word(0)),
            earliest: i64::from_le_bytes(word(8)),
            latest: i64::from_le_bytes(word(16)),
        }
    }
}

/// The parts of a file that can hold records of a time; the last one ends at `length` if the file's end is among them. `None`
/// if there is no index that fits: everything has to be read.
pub(super) fn select(file: &mut File, path: &Path, length: u64, window: &Window) -> Option<Vec<Range<u64>>> {
    let entries = load(path).ok()?;
    if !fits(file, length, &entries).ok()? {
        return None;
    }
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut add = |range: Range<u64>| match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    };
    let mut start = 0;
    for entry in &entries {
        if entry.latest >= window.start && entry.earliest < window.end {
            add(start..entry.end);
        }
        start = entry.end;
    }
    if start < length {
        add(start..length);
    }
    Some(ranges)
}

fn load(path: &Path) -> io::Result<Vec<Entry>> {
    let mut bytes = Vec::new();
    File::open(index_of(path))?.take(TRAIL_INDEX_MAX).read_to_end(&mut bytes)?;
    // The last entry may be on its way.
    Ok(bytes.as_chunks::<{ Entry::LEN }>().0.iter().map(Entry::decode).collect())
}

/// Whether an index can be this file's: its entries are in order, a line ends where each of some of them says, and the
/// records on both sides of that have times within the bounds.
fn fits(file: &File, length: u64, entries: &[Entry]) -> io::Result<bool> {
    let mut before = 0;
    for entry in entries {
        if entry.end <= before || entry.end > length || entry.earliest > entry.latest {
            return Ok(false);
        }
        before = entry.end;
    }
    let step = entries.len().div_ceil(PROBES).max(1);
    let mut probes: Vec<usize> = (0..entries.len()).step_by(step).collect();
    probes.extend(entries.len().checked_sub(1));
    for at in probes {
        let entry = &entries[at];
        let begun = if at == 0 { 0 } else { entries[at - 1].end };
        let mut end = [0];
        file.read_exact_at(&mut end, entry.end - 1)?;
        if end != *b"\n" {
            return Ok(false);
        }
        // The first record of the part. A line without a time that can be seen says nothing.
        let mut head = [0; HEAD];
        let count = file.read_at(&mut head, begun)?;
        let within = |time| time >= entry.earliest && time <= entry.latest;
        if time_of(&head[..count]).is_some_and(|time| !within(time)) {
            return Ok(false);
        }
        let wide = (entry.end - begun).min(TRAIL_RECORD_MAX as u64);
        let mut tail = vec![0; usize::try_from(wide).unwrap_or_default()];
        file.read_exact_at(&mut tail, entry.end - wide)?;
        let whole = &tail[..tail.len() - 1];
        let last = memchr::memrchr(b'\n', whole).map_or(0, |at| at + 1);
        if time_of(&whole[last..]).is_some_and(|time| !within(time)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Entries that are held against the file: enough to find an index that belongs to another file or another time of it.
const PROBES: usize = 32;

/// Bytes that hold a record's time.
const HEAD: usize = 64;

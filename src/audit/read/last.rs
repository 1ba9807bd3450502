//! The last records of a trail, read from its end.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use memchr::{memchr, memrchr};

use super::files::Part;
use super::filter::Filter;
use super::{Judged, ReadError, Record, Tally, judge, open};
use crate::limits::TRAIL_RECORD_MAX;

/// A line, and the record that it is.
pub(super) type Found = (Vec<u8>, Record);

/// The last `count` records that the filter admits, oldest first, with their lines. Of the last part only what lies before its
/// `length` is read.
///
/// # Errors
/// If a file cannot be read.
pub fn last(parts: &[Part], filter: &Filter, count: usize) -> Result<(Vec<Found>, Tally), ReadError> {
    let mut found = Vec::new();
    let mut tally = Tally::default();
    for part in parts.iter().rev() {
        if found.len() >= count {
            break;
        }
        let failed = |source| ReadError::of(&part.path, source);
        let file = open(&part.path).map_err(failed)?;
        let mut backwards = Backwards::new(file, part.length.unwrap_or_default());
        while let Some((offset, line)) = backwards.next().map_err(failed)? {
            match judge(line.as_deref(), filter) {
                Judged::Other => {}
                Judged::Unreadable => {
                    tally.unreadable += 1;
                    tally.first_unreadable = Some((part.path.clone(), offset));
                }
                Judged::Wanted(record) => found.push((line.unwrap_or_default(), *record)),
            }
            if found.len() >= count {
                break;
            }
        }
    }
    found.reverse();
    Ok((found, tally))
}

/// Where the last whole line of a file ends.
pub(super) fn end_of_lines(file: &File, length: u64) -> io::Result<u64> {
    let mut end = length;
    let mut block = vec![0; BLOCK];
    while end > 0 {
        let count = end.min(BLOCK as u64);
        let bytes = &mut block[..usize::try_from(count).unwrap_or_default()];
        file.read_exact_at(bytes, end - count)?;
        if let Some(at) = memrchr(b'\n', bytes) {
            return Ok(end - count + at as u64 + 1);
        }
        end -= count;
    }
    Ok(0)
}

/// Whole lines from a file's end to its beginning.
struct Backwards {
    file: File,
    /// What lies before here was not read yet.
    start: u64,
    /// What was read and not given out: lines that begin after `start`, and before these the end of one.
    held: Vec<u8>,
    /// The line whose end is held is too long, and bytes of it were thrown away.
    too_long: bool,
    begun: bool,
}

impl Backwards {
    fn new(file: File, length: u64) -> Self {
        Self { file, start: length, held: Vec::new(), too_long: false, begun: false }
    }

    /// The line before the last one that was given, with where it begins; its text is `None` if it is longer than any record.
    fn next(&mut self) -> io::Result<Option<(u64, Option<Vec<u8>>)>> {
        if !self.begun {
            // What follows the last newline is no line yet.
            self.start = end_of_lines(&self.file, self.start)?;
            self.begun = true;
        }
        loop {
            let whole = self.held.len().saturating_sub(1);
            if let Some(at) = memrchr(b'\n', &self.held[..whole]) {
                let line = self.held.split_off(at + 1);
                return Ok(Some((self.start + at as u64 + 1, self.finish(line))));
            }
            if self.start == 0 {
                let line = std::mem::take(&mut self.held);
                return Ok((!line.is_empty()).then(|| (0, self.finish(line))));
            }
            if self.held.len() > TRAIL_RECORD_MAX {
                // Its newline stays, so that the line is still one.
                self.too_long = true;
                self.held = b"\n".to_vec();
            }
            let count = self.start.min(BLOCK as u64);
            let mut block = vec![0; usize::try_from(count).unwrap_or_default()];
            self.start -= count;
            self.file.read_exact_at(&mut block, self.start)?;
            if self.too_long && memchr(b'\n', &block).is_none() {
                continue;
            }
            block.extend_from_slice(&self.held);
            self.held = block;
        }
    }

    fn finish(&mut self, line: Vec<u8>) -> Option<Vec<u8>> {
        let too_long = std::mem::take(&mut self.too_long);
        (!too_long && line.len() <= TRAIL_RECORD_MAX).then_some(line)
    }
}

/// Bytes that are read at once.
const BLOCK: usize = 64 * 1024;

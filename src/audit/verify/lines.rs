//! The lines of a file, one after the other, with where they stand.
//!
//! Promised: a line is handed out with every byte of it, or, where it is longer than any record, with none and its length; the
//! memory is one buffer.

use std::io::{self, Read};

use crate::limits::TRAIL_RECORD_MAX;

/// A line, its newline included.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::audit) struct Line<'a> {
    /// Counted from 1.
    pub(in crate::audit) number: u64,
    /// Bytes of the file before it.
    pub(in crate::audit) offset: u64,
    /// The line; empty if it is longer than any record.
    pub(in crate::audit) bytes: &'a [u8],
    /// Whether it has its newline.
    pub(in crate::audit) whole: bool,
}

/// Reads lines.
pub(in crate::audit) struct Lines<R> {
    input: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    over: bool,
    number: u64,
    offset: u64,
}

impl<R: Read> Lines<R> {
    pub(in crate::audit) fn new(input: R) -> Self {
        Self { input, buffer: vec![0; BUFFER], start: 0, end: 0, over: false, number: 0, offset: 0 }
    }

    /// Bytes that were handed out.
    pub(in crate::audit) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next line; `None` at the end.
    ///
    /// # Errors
    /// If reading fails.
    pub(in crate::audit) fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        let mut looked = 0;
        let mut skipped = 0;
        loop {
            let held = &self.buffer[self.start..self.end];
            let newline = memchr::memchr(b'\n', &held[looked..]).map(|at| looked + at);
            let (taken, whole) = match newline {
                Some(at) => (at + 1, true),
                None if self.over => (held.len(), false),
                None => {
                    looked = held.len();
                    if looked > TRAIL_RECORD_MAX {
                        // No record is that long: what is passed over is only counted.
                        skipped += looked as u64;
                        (self.start, self.end, looked) = (0, 0, 0);
                    }
                    self.fill()?;
                    continue;
                }
            };
            if taken == 0 && skipped == 0 {
                return Ok(None);
            }
            let long = skipped > 0 || taken > TRAIL_RECORD_MAX;
            let from = self.start;
            self.start += taken;
            self.number += 1;
            let offset = self.offset;
            self.offset += skipped + taken as u64;
            let bytes = if long { &[][..] } else { &self.buffer[from..from + taken] };
            return Ok(Some(Line { number: self.number, offset, bytes, whole }));
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        loop {
            match self.input.read(&mut self.buffer[self.end..]) {
                Ok(count) => {
                    self.end += count;
                    self.over = count == 0;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What is read at once, and room for the record that does not end in it.
const BUFFER: usize = 512 * 1024 + 2 * TRAIL_RECORD_MAX;

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a few bytes at a time.
    struct Dribble<'a>(&'a [u8], usize);

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(buffer.len());
            self.0.read(&mut buffer[..count])
        }
    }

    #[test]
    fn lines_come_with_their_places_however_they_are_read() {
        let long = vec![b'x'; 3 * TRAIL_RECORD_MAX];
        let text = [&b"one\n\ntwo\n"[..], &long, b"\nlast"].concat();
        for count in [1, 2, 7, 1 << 20] {
            let mut lines = Lines::new(Dribble(&text, count));
            let mut seen = Vec::new();
            while let Some(line) = lines.next().expect("read") {
                seen.push((line.number, line.offset, line.bytes.to_vec(), line.whole));
            }
            let after = 9 + long.len() as u64 + 1;
            assert_eq!(
                seen,
                [
                    (1, 0, b"one\n".to_vec(), true),
                    (2, 4, b"\n".to_vec(), true),
                    (3, 5, b"two\n".to_vec(), true),
                    (4, 9, Vec::new(), true),
                    (5, after, b"last".to_vec(), false),
                ]
            );
            assert_eq!(lines.offset(), text.len() as u64);
        }
    }
}

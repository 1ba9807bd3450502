//! Lines of a file, whatever is in it, in a buffer of fixed size.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use memchr::memchr;

use crate::limits::{TRAIL_READ, TRAIL_RECORD_MAX};

/// A line, or what stands in the place of one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece<'a> {
    /// Where it begins.
    pub(super) offset: u64,
    /// The line with its newline; `None` if it is longer than any record.
    pub(super) line: Option<&'a [u8]>,
}

/// Whole lines, one after the other. At the end of what there is so far, more may be asked for later.
#[derive(Debug)]
pub(super) struct Lines<R> {
    from: R,
    buffer: Box<[u8]>,
    start: usize,
    /// No newline lies between `start` and here.
    searched: usize,
    end: usize,
    /// Where `start` is in the file.
    offset: u64,
    /// Where a line begins of which the beginning was thrown away, since it is too long.
    too_long: Option<u64>,
}

impl<R: Read> Lines<R> {
    /// Of a reader that is so far into its file.
    pub(super) fn new(from: R, offset: u64) -> Self {
        let buffer = vec![0; TRAIL_READ].into_boxed_slice();
        Self { from, buffer, start: 0, searched: 0, end: 0, offset, too_long: None }
    }

    /// The next line; `None` where no whole one is left.
    pub(super) fn next(&mut self) -> io::Result<Option<Piece<'_>>> {
        let newline = loop {
            if let Some(at) = memchr(b'\n', &self.buffer[self.searched..self.end]) {
                break self.searched + at + 1;
            }
            self.searched = self.end;
            if self.end - self.start > TRAIL_RECORD_MAX {
                self.too_long.get_or_insert(self.offset);
                self.offset += (self.end - self.start) as u64;
                self.start = self.end;
            }
            if self.end == self.buffer.len() || self.start == self.end {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.searched = self.end;
                self.start = 0;
            }
            match self.from.read(&mut self.buffer[self.end..]) {
                Ok(0) => return Ok(None),
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        let line = self.start..newline;
        let begun = self.too_long.take();
        let piece = Piece {
            offset: begun.unwrap_or(self.offset),
            line: (begun.is_none() && line.len() <= TRAIL_RECORD_MAX).then_some(&self.buffer[line.clone()]),
        };
        self.offset += line.len() as u64;
        self.start = newline;
        self.searched = newline;
        Ok(Some(piece))
    }

    /// Where the next line begins, or would.
    pub(super) fn position(&self) -> u64 {
        self.too_long.unwrap_or(self.offset)
    }

    /// Bytes that have been read of a line without an end.
    pub(super) fn rest(&self) -> usize {
        let thrown = self.too_long.map_or(0, |begun| self.offset - begun);
        self.end - self.start + usize::try_from(thrown).unwrap_or(usize::MAX)
    }
}

impl Lines<File> {
    /// The file.
    pub(super) fn inner(&self) -> &File {
        &self.from
    }

    /// Begins again at the file's beginning.
    pub(super) fn rewind(&mut self) -> io::Result<()> {
        self.from.seek(SeekFrom::Start(0))?;
        (self.start, self.searched, self.end, self.offset, self.too_long) = (0, 0, 0, 0, None);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives few bytes at a time.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.len().min(buffer.len()).min(self.1);
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    #[test]
    fn lines_are_the_same_however_they_come() {
        let long = "x".repeat(TRAIL_RECORD_MAX);
        let fits = "y".repeat(TRAIL_RECORD_MAX - 1);
        let text = format!("a\n\n{long}\n{fits}\nb\n{}\nc\nrest", "z".repeat(3 * TRAIL_READ));
        for step in [1_000, 65_536, usize::MAX] {
            let mut lines = Lines::new(Slow(text.as_bytes(), step), 10);
            let mut found = Vec::new();
            while let Some(piece) = lines.next().expect("reads") {
                found.push((piece.offset - 10, piece.line.map(<[u8]>::len)));
            }
            let begun = |part: &str| text.find(part).expect("there") as u64;
            let z = begun("zz");
            assert_eq!(
                found,
                [
                    (0, Some(2)),
                    (2, Some(1)),
                    (3, None),
                    (begun("yy"), Some(TRAIL_RECORD_MAX)),
                    (begun("b\n"), Some(2)),
                    (z, None),
                    (begun("\nc\n") + 1, Some(2)),
                ],
                "{step}"
            );
            assert_eq!((lines.rest(), lines.position() - 10), (4, begun("rest")), "{step}");
        }
    }

    #[test]
    fn a_last_line_without_an_end_may_get_one() {
        let mut file = tempfile::tempfile().expect("a file");
        let mut lines = Lines::new(file.try_clone().expect("a handle"), 0);
        let write = |file: &mut File, text: &str, at: u64| {
            use std::os::unix::fs::FileExt;
            file.write_all_at(text.as_bytes(), at).expect("writes");
        };
        write(&mut file, "one\ntw", 0);
        assert_eq!(lines.next().expect("reads").and_then(|piece| piece.line), Some(&b"one\n"[..]));
        assert_eq!(lines.next().expect("reads"), None);
        assert_eq!(lines.rest(), 2);
        write(&mut file, "o\n", 6);
        assert_eq!(lines.next().expect("reads"), Some(Piece { offset: 4, line: Some(b"two\n") }));
        lines.rewind().expect("seeks");
        assert_eq!(lines.next().expect("reads").map(|piece| piece.offset), Some(0));
    }
}

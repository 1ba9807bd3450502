//! What holds for every input of each parser that reads what others wrote, as functions of bytes.
//!
//! The fuzz targets call them with what libFuzzer finds; `tests/properties.rs`, which includes this file, with what proptest
//! draws and with the seeds. They know the public interface alone, and judge by rules that are written down here a second
//! time, not by the code that they test.

#![allow(unreachable_pub, reason = "a library of its own for the fuzz targets, a private module of the tests")]

pub mod certificates;
pub mod http;
pub mod identification;
pub mod keys;
pub mod policy;
pub mod proxied;
pub mod sniff;
pub mod target;
pub mod verify;
pub mod wire;

/// Gives bytes away in pieces of these lengths, over and over, until they are used up.
pub fn pieces<'a>(bytes: &'a [u8], lengths: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let mut lengths = lengths.iter().cycle();
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = lengths.next().map_or(1, |length| usize::from(*length).max(1)).min(rest.len());
        let (piece, after) = rest.split_at(length);
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// What an error may show of what a peer or a file said.
pub fn is_printable(text: &str) -> bool {
    text.chars().all(|c| !c.is_control())
}

//! See `properties::sniff`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::sniff::holds(bytes));

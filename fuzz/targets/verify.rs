//! See `properties::verify`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::verify::holds(bytes));

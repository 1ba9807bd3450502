//! See `properties::identification`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::identification::holds(bytes));

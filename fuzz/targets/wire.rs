//! See `properties::wire`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::wire::holds(bytes));

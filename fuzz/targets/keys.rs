//! See `properties::keys`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::keys::holds(bytes));

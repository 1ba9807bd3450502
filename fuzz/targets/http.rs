//! See `properties::http`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::http::holds(bytes));

//! See `properties::proxied`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::proxied::holds(bytes));

//! See `properties::certificates`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::certificates::holds(bytes));

//! See `properties::policy`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::policy::holds(bytes));

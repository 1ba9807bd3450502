//! Tests with real components, in one binary.

mod postgres;
mod provision;
mod raw;

//! Tests with real components, in one binary.

mod hostile;
mod postgres;
mod provision;

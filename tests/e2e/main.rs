//! Tests with real components, in one binary.

mod harness;
mod openssh;
mod postgres;
mod provision;
mod proxy;

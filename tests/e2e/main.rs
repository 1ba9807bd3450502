//! Tests with real components, in one binary.

mod harness;
mod lifecycle;
mod openssh;
mod postgres;
mod provision;
mod proxy;

//! Tests with real components, in one binary.

mod harness;
mod input;
mod lifecycle;
mod openssh;
mod postgres;
mod provision;
mod proxy;

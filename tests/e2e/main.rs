//! Tests with real components, in one binary.

mod harness;
mod input;
mod lifecycle;
mod openssh;
mod postgres;
mod postgres_through;
mod provision;
mod proxy;

//! The network proxy, run as the built program: its three modes, what each refuses, and what can be read on which leg.

mod connecting;
pub(crate) mod place;
mod securing;
mod upstream;

//! The ways in for principals. Each makes a [`super::broker::Request`] and calls [`super::broker::forward`].

#[expect(dead_code, reason = "nothing comes in by it yet")]
pub(super) mod connect;
pub(super) mod local;
pub(super) mod ssh;

//! The ways in for principals. Each makes a [`super::broker::Request`] and calls [`super::broker::forward`].

pub(super) mod connect;
pub(super) mod local;
pub(super) mod ssh;

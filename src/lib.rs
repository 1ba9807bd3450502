//! caponier: a bastion-style SSH tunnel service.

pub mod backoff;
pub mod chain;
pub mod identity;
pub mod limits;
pub mod postgres;
pub mod provision;
pub mod secret;
pub mod target;
pub mod task;
pub mod tls;

//! caponier: a bastion-style SSH tunnel service.

pub mod audit;
pub mod backoff;
pub mod chain;
pub mod identity;
pub mod limits;
pub mod secret;
pub mod target;
pub mod task;

//! caponier: a bastion-style SSH tunnel service.

pub mod agent;
pub mod audit;
pub mod backoff;
pub mod chain;
pub mod cli;
pub mod client;
pub mod config;
pub mod document;
pub mod gateway;
pub mod identity;
pub mod limits;
pub mod policy;
pub mod postgres;
pub mod provision;
pub mod registry;
pub mod resolve;
pub mod secret;
pub mod target;
pub mod task;
pub mod telemetry;
pub mod tls;
pub mod tunnel;

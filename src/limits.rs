//! Every bound of the program, each with its reason. A full queue or a reached limit is an outcome with a name.
//!
//! They stand by subject, and are named without it.

mod admission;
mod client;
mod examination;
mod files;
mod flow;
mod link;
mod opening;
mod process;
mod provision;
mod proxy;
mod reach;
mod sink;
mod trail;
mod watching;

pub use admission::*;
pub use client::*;
pub use examination::*;
pub use files::*;
pub use flow::*;
pub use link::*;
pub use opening::*;
pub use process::*;
pub use provision::*;
pub use proxy::*;
pub use reach::*;
pub use sink::*;
pub use trail::*;
pub use watching::*;

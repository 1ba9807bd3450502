//! The way to the collectors of an audit trail: TCP, directly or through a proxy of their own.
//!
//! Promised: what a proxy says of a collector is not lost, every step has a deadline, and no credentials are in an error.
//! What an agent's forwards may reach has nothing to do with it: collectors stand in the configuration alone.

use std::io;

use super::connect::bypass::Bypass;
use super::connect::proxy::Proxy;
use super::connect::{self, ConnectError, Egress};
use super::stream::Stream;
use crate::audit::sink::{self, Connect, Connecting};
use crate::chain::Chain;
use crate::target::Target;

/// Reaches collectors.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outlet;

impl Connect for Outlet {
    fn connect<'a>(&'a self, to: &'a Target, proxy: Option<&'a str>) -> Connecting<'a> {
        Box::pin(async move {
            let told = |error: ConnectError| io::Error::other(Chain(&error).to_string());
            let Some(proxy) = proxy else {
                let stream = connect::tcp("audit collector", to, |_| {}).await.map_err(told)?;
                return Ok(Box::new(Stream::from(stream)) as Box<dyn sink::Stream>);
            };
            let proxy: Proxy = proxy.parse().map_err(io::Error::other)?;
            let egress = Egress::new(Some(proxy), Bypass::default(), None).map_err(io::Error::other)?;
            let connection = connect::connect(to, &egress, |_| {}).await.map_err(told)?;
            Ok(Box::new(connection.stream.preceded_by(connection.head)) as Box<dyn sink::Stream>)
        })
    }
}

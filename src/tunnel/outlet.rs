//! The way to the collectors of an audit trail: TCP, directly or through a proxy of their own.
//!
//! Promised: what a proxy says of a collector is not lost, every step has a deadline, and no credentials are in an error.
//! What an agent's forwards may reach has nothing to do with it: collectors stand in the configuration alone, and are themselves
//! out of reach of forwards.

use std::fmt;
use std::io;
use std::net::SocketAddr;

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
        Box::pin(reach(to, proxy, |_| {}))
    }
}

/// Reaches collectors, and tells of the addresses that they and their proxies have before it dials them: an agent keeps its
/// forwards away from those.
pub struct Telling<F>(pub F);

impl<F: Fn(&[SocketAddr]) + Send + Sync> Connect for Telling<F> {
    fn connect<'a>(&'a self, to: &'a Target, proxy: Option<&'a str>) -> Connecting<'a> {
        Box::pin(reach(to, proxy, &self.0))
    }
}

impl<F> fmt::Debug for Telling<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telling").finish_non_exhaustive()
    }
}

async fn reach(
    to: &Target,
    proxy: Option<&str>,
    tell: impl Fn(&[SocketAddr]) + Send,
) -> io::Result<Box<dyn sink::Stream>> {
    let told = |error: ConnectError| io::Error::other(Chain(&error).to_string());
    let Some(proxy) = proxy else {
        let stream = connect::tcp("audit collector", to, |addresses| tell(addresses)).await.map_err(told)?;
        return Ok(Box::new(Stream::from(stream)));
    };
    let proxy: Proxy = proxy.parse().map_err(io::Error::other)?;
    let egress = Egress::new(Some(proxy), Bypass::default(), None).map_err(io::Error::other)?;
    let connection = connect::connect(to, &egress, |addresses| tell(addresses)).await.map_err(told)?;
    Ok(Box::new(connection.stream.preceded_by(connection.head)))
}

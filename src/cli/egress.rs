//! The arguments that say how a command leaves its network.

use std::path::PathBuf;

use super::{Exit, ExitWith};
use crate::client::Server;
use crate::config;
use crate::tls::{ClientOptions, Identity};
use crate::tunnel::connect::Egress;
use crate::tunnel::dial::Tls;

/// How to leave the network. It needs no group of its own, whose name the command's own `Args` has.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// A proxy on the way to the server: http://, https:// or socks5://, then HOST:PORT; none: no proxy. Left out,
    /// CAPONIER_FORWARD_PROXY counts, which may hold credentials as USER:PASSWORD@ before HOST, and after it HTTPS_PROXY.
    #[arg(long, value_name = "URL")]
    proxy: Option<String>,
    /// What is reached without the proxy, with commas between: hosts with all below them, .SUFFIX, addresses, networks, *, each
    /// with :PORT or without. Names are not looked up for it. Left out, NO_PROXY counts.
    #[arg(long, value_name = "LIST")]
    no_proxy: Option<String>,
    /// The certificate authorities of a proxy of https://, in PEM; those of the system unless given.
    #[arg(long, value_name = "FILE")]
    proxy_ca_file: Option<PathBuf>,
    /// The certificate authorities of a gateway of tls:// or wss://, in PEM; those of the system unless given.
    #[arg(long, value_name = "FILE")]
    tls_ca_file: Option<PathBuf>,
    /// A TLS certificate of your own, in PEM with those between it and its authority, for a gateway that asks for one.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// Its key, in PEM without a passphrase, in a file that nobody else can read.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
}

/// The variable that may hold a proxy with a password, which the command line may not: everybody can read that.
const VARIABLE: &str = "CAPONIER_FORWARD_PROXY";

impl Args {
    /// How TLS is made with the server, if it is.
    ///
    /// # Errors
    /// If there are no authorities to trust, or the certificate and its key cannot be used.
    pub(super) fn tls(&self, server: &Server) -> anyhow::Result<Option<Tls>> {
        if !server.url().is_some_and(|url| url.transport().is_tls()) {
            return Ok(None);
        }
        let identity = self.tls_certificate.as_deref().zip(self.tls_key.as_deref());
        let identity = identity.map(|(chain, key)| Identity::read(chain, key)).transpose().exit_with(Exit::Usage)?;
        let ca_files = self.tls_ca_file.iter().cloned().collect();
        let options = ClientOptions { ca_files, identity, ..ClientOptions::default() };
        Tls::new(options).map(Some).exit_with(Exit::Usage)
    }

    /// What they say, with the environment.
    ///
    /// # Errors
    /// If any of it cannot be used.
    pub(super) fn egress(&self) -> anyhow::Result<Egress> {
        let (proxy, no_proxy, ca_file) =
            (self.proxy.as_deref(), self.no_proxy.as_deref(), self.proxy_ca_file.as_deref());
        // What is not UTF-8 is a fault of what it was to be, and not as if it were not there.
        let environment = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        config::egress_of_command(proxy, no_proxy, ca_file, VARIABLE, environment).exit_with(Exit::Usage)
    }
}

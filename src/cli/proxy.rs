//! `caponier proxy`: runs a network proxy.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::{Exit, ExitWith, running};
use crate::config::Loaded;
use crate::proxy;

/// Run a network proxy: the way out for clients inside a network that must reach a control plane, until SIGTERM or SIGINT.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier proxy --config /etc/caponier/proxy.toml
  HTTPS_PROXY=http://127.0.0.1:7777 curl https://control.example.com/

Each listener leads to the upstreams that the configuration names for it, and nowhere else, in one of three modes: mutual (TLS \
with certificates on both sides), reverse (HTTP, the proxy alone holds the certificate), connect (an HTTP CONNECT proxy, through \
which the client's own TLS goes unread).

The configuration and the certificates that it names are read again within five seconds of a change, and on SIGHUP at once: \
whole or, if they have faults, not at all. What it no longer allows ends at once; [audit], [health], [metrics] and [log] need a restart. \
CAPONIER_TABLE__KEY sets any single value, as in CAPONIER_PROXY__DRAIN_S.

SIGTERM and SIGINT make it drain: what runs may go on for drain_s seconds (300 unless the configuration says otherwise); the exit \
code is 1 if something had to be cut then. A second signal cuts at once.")]
pub struct Args {
    /// The configuration, with a `[proxy]` table; deploy/proxy.toml explains it.
    #[arg(long, short, value_name = "FILE")]
    config: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// If the configuration has faults, or the proxy cannot run.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (loaded, watched) = running::load(&args.config).exit_with(Exit::Usage)?;
    let Loaded::Proxy(config, log) = loaded else {
        return Err(anyhow::anyhow!("{} is not a proxy's configuration: it has no [proxy]", args.config.display()))
            .exit_with(Exit::Usage);
    };
    running::start_log(&log);
    running::raise_descriptors();
    let outcome = running::serve(async |stop, supervisor| {
        let reloads = running::reloads((args.config, watched), "a proxy", log, &supervisor, |loaded| match loaded {
            Loaded::Proxy(config, log) => Some((config, log)),
            _ => None,
        })?;
        match proxy::run(*config, reloads, stop, &supervisor).await {
            // The configuration does not fit what is there, which does not go away by itself.
            Err(error @ proxy::RunError::WantsCertificate { .. }) => Err(error).exit_with(Exit::Usage),
            ended => ended.context("the proxy ended"),
        }
    })?;
    Ok(if outcome.cut == 0 { Exit::Done } else { Exit::Failed }.into())
}

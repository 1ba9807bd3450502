//! `caponier gateway`: runs a gateway.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use tracing::info;

use super::{Exit, ExitWith, running};
use crate::config::Loaded;
use crate::gateway;

/// Run a gateway: let agents link and principals in, and decide about every forward, until SIGTERM or SIGINT.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier gateway --config /etc/caponier/gateway.toml

The registry and the configuration are read again within five seconds of a change, and on SIGHUP at once: each whole or, if it \
has faults, not at all. What they no longer allow ends at once, and what they do not touch goes on; addresses to listen on \
(those of [[local]] excepted), gateway.registry, gateway.admin_socket, [audit], [health], [metrics] and [log] need a restart. CAPONIER_TABLE__KEY \
sets any single value, as in CAPONIER_GATEWAY__HOST_KEY.

SIGTERM and SIGINT make it drain: it accepts nothing new, agents link elsewhere, and what runs may go on for drain_s \
seconds (300 unless the configuration says otherwise); the exit code is 1 if something had to be cut then. A second signal cuts at once. Listeners are inherited by \
socket activation (LISTEN_FDS), which deploy/ explains, so that a new process accepts meanwhile.")]
pub struct Args {
    /// The configuration, with a `[gateway]` table; deploy/gateway.toml explains it.
    #[arg(long, short, value_name = "FILE")]
    config: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// If the configuration has faults, or the gateway cannot run.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (loaded, watched) = running::load(&args.config).exit_with(Exit::Usage)?;
    let Loaded::Gateway(config, log) = loaded else {
        return Err(anyhow::anyhow!("{} is not a gateway's configuration: it has no [gateway]", args.config.display()))
            .exit_with(Exit::Usage);
    };
    running::start_log(&log);
    let inherited = gateway::Inherited::from_environment()
        .context("could not use the sockets that this process was started with")
        .exit_with(Exit::Usage)?;
    running::raise_descriptors();
    let outcome = running::serve(async |stop, supervisor| {
        let ready = |listening: &[std::net::SocketAddr], local: &[std::net::SocketAddr]| {
            for address in listening {
                info!("listening on {address}");
            }
            for address in local {
                info!("loopback door on {address}");
            }
            let addresses: Vec<_> = listening.iter().map(ToString::to_string).collect();
            supervisor.ready(&format!("listening on {}", addresses.join(", ")));
        };
        let reloads = running::reloads((args.config, watched), "a gateway", log, &supervisor, |loaded| match loaded {
            Loaded::Gateway(config, log) => Some((config, log)),
            _ => None,
        })?;
        let ran = gateway::run(*config, reloads, inherited, stop, &supervisor, ready).await;
        // The registry is configuration, too, and so is what a socket unit passes on.
        let configured = matches!(
            ran,
            Err(gateway::RunError::Registry { .. } | gateway::RunError::Mutual(_) | gateway::RunError::Inherited(_))
        );
        ran.context("the gateway ended").exit_with(if configured { Exit::Usage } else { Exit::Failed })
    })?;
    Ok(if outcome.cut == 0 { Exit::Done } else { Exit::Failed }.into())
}

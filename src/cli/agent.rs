//! `caponier agent`: runs an agent.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::{Exit, ExitWith, running};
use crate::agent;
use crate::config::Loaded;

/// Run an agent: dial out to its gateways, or listen where its configuration says so, and forward what its allowlist permits,
/// until SIGTERM or SIGINT.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier agent --config /etc/caponier/agent.toml

The configuration and the keys that it names are read again within five seconds of a change, and on SIGHUP at once: whole or, \
if they have faults, not at all. What it no longer allows ends at once, and what it does not touch goes on; agent.id, [audit], \
[health], [metrics] and [log] need a restart. CAPONIER_TABLE__KEY sets any single value, as in CAPONIER_AGENT__HOST_KEY.

The proxy on the way out (http://, https:// or socks5://, then HOST:PORT) is the first of these that is set and not empty: \
CAPONIER_AGENT__PROXY, AGENT_PROXY, agent.proxy, HTTPS_PROXY, https_proxy; \"none\" is none. What is reached without it is said by \
agent.no_proxy, or else NO_PROXY or no_proxy.

SIGTERM and SIGINT make it drain: its gateways give it nothing new, and what runs may go on for drain_s seconds (300 unless \
the configuration says otherwise); the exit code is 1 if something had to be cut then. A second signal cuts at once.")]
pub struct Args {
    /// The configuration, with an `[agent]` table; deploy/agent.toml explains it.
    #[arg(long, short, value_name = "FILE")]
    config: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// If the configuration has faults, or the agent cannot run.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (loaded, watched) = running::load(&args.config).exit_with(Exit::Usage)?;
    let Loaded::Agent(config, log) = loaded else {
        return Err(anyhow::anyhow!("{} is not an agent's configuration: it has no [agent]", args.config.display()))
            .exit_with(Exit::Usage);
    };
    running::start_log(&log);
    running::raise_descriptors();
    let outcome = running::serve(async |stop, supervisor| {
        let reloads = running::reloads((args.config, watched), "an agent", log, &supervisor, |loaded| match loaded {
            Loaded::Agent(config, log) => Some((config, log)),
            _ => None,
        })?;
        agent::run(*config, reloads, stop, &supervisor).await.context("the agent ended")
    })?;
    Ok(if outcome.cut == 0 { Exit::Done } else { Exit::Failed }.into())
}

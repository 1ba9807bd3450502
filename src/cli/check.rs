//! `caponier check`: loads a configuration and opens nothing.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{Exit, ExitWith, print};
use crate::config::{self, Loaded};
use crate::registry;

/// Check a configuration file (an agent's, a gateway's, or resources to provision) and report all its faults.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier check /etc/caponier/agent.toml

Exit code 0 if the file is in order, 2 if not. Key files that it names are read, and a gateway's registry; nothing is opened.")]
pub struct Args {
    /// The file; its tables say what kind it is.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// With every fault of the file.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let kind = match config::load(&args.file).exit_with(Exit::Usage)? {
        Loaded::Agent(config, _) => {
            let rules: usize = config.organisations.iter().map(|organisation| organisation.allow.rules().len()).sum();
            format!("agent {} for {} organisation(s), {rules} rule(s)", config.id, config.organisations.len())
        }
        Loaded::Gateway(config, _) => {
            let registry = registry::file::load(&config.registry).exit_with(Exit::Usage)?;
            let organisations = registry.organisations().values();
            let (agents, principals) = organisations.fold((0, 0), |(agents, principals), organisation| {
                (agents + organisation.agents.len(), principals + organisation.principals.len())
            });
            format!(
                "gateway for {} organisation(s), {} loopback door(s); {agents} agent(s) and {principals} principal(s) in its \
                 registry",
                config.organisations.len(),
                config.local.len(),
            )
        }
        Loaded::Resources(config) => {
            let (databases, server) = (config.resources.databases.len(), &config.client.server);
            format!("resources: {databases} database(s) through {server} as {}", server.user())
        }
    };
    print(&format!("{}: in order ({kind})\n", args.file.display()))?;
    Ok(Exit::Done.into())
}

//! `caponier check`: loads a configuration and opens nothing.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use jiff::Timestamp;

use super::{Exit, ExitWith, print};
use crate::audit::Sinks;
use crate::config::{self, Loaded};
use crate::policy::Decision;
use crate::registry;

/// Check a configuration file (an agent's, a gateway's, a network proxy's, or resources to provision) and report all its faults.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier check /etc/caponier/agent.toml

Exit code 0 if the file is in order, 2 if not. Key files that it names are read, and a gateway's registry; nothing is opened. \
Warned of, without effect on the exit code: loopback doors that the registry refuses, files of the registry that everybody may \
write, certificates of one's own outside of their time or near its end, and a trail whose heads are not signed.")]
pub struct Args {
    /// The file; its tables say what kind it is.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// A trail without signed heads shows what was changed only to whoever has other evidence.
fn warn_unsigned(sinks: &Sinks) {
    if sinks.signing_key.is_none() {
        warn(
            "the trail's heads are not signed: whoever can write the trail can make it anew without being seen; give [audit] a \
             signing_key (`caponier keys generate`)",
        );
    }
}

fn warn(text: &str) {
    let _ = writeln!(io::stderr(), "caponier: warning: {text}");
}

/// Runs the command.
///
/// # Errors
/// With every fault of the file.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let kind = match config::load(&args.file).exit_with(Exit::Usage)? {
        Loaded::Agent(config, _) => {
            for warning in config.certificate_warnings(Timestamp::now()) {
                warn(&warning);
            }
            warn_unsigned(&config.audit);
            let rules: usize = config.organisations.iter().map(|organisation| organisation.allow.rules().len()).sum();
            format!("agent {} for {} organisation(s), {rules} rule(s)", config.id, config.organisations.len())
        }
        Loaded::Gateway(config, _) => {
            let registry = registry::file::load(&config.registry).exit_with(Exit::Usage)?;
            if let Some(why) = config.contradiction(&registry) {
                return Err(anyhow::anyhow!("{}: {why}", args.file.display())).exit_with(Exit::Usage);
            }
            for path in registry::file::writable_by_others(&config.registry) {
                warn(&format!("others than its owner may write {}, and so say who gets in", path.display()));
            }
            // Not a fault: the registry has a life of its own, a gateway runs with such a door, and the door is shut.
            for local in &config.local {
                let (now, from) = (Timestamp::now(), local.listen.ip());
                let decision = registry.decide(&local.principal, &local.agent, &local.target, from, now);
                if let Decision::Deny(denial) = decision {
                    let why = denial.detail;
                    warn(&format!("the registry refuses all that comes by the loopback door {}: {why}", local.listen));
                }
            }
            let organisations = registry.organisations().values();
            let (agents, principals) = organisations.fold((0, 0), |(agents, principals), organisation| {
                (agents + organisation.agents.len(), principals + organisation.principals.len())
            });
            // Nor this: the gateway goes on with the plain key.
            for warning in config.certificate_warnings(Timestamp::now()) {
                warn(&warning.to_string());
            }
            warn_unsigned(&config.audit);
            format!(
                "gateway for {} organisation(s), {} loopback door(s); {agents} agent(s) and {principals} principal(s) in its \
                 registry",
                config.organisations.len(),
                config.local.len(),
            )
        }
        Loaded::Proxy(config, _) => {
            warn_unsigned(&config.audit);
            let (listeners, upstreams) = (config.listeners.len(), config.upstreams.len());
            format!("proxy: {listeners} listener(s), {upstreams} upstream(s)")
        }
        Loaded::Resources(config) => {
            let (databases, server) = (config.resources.databases.len(), &config.client.server);
            format!("resources: {databases} database(s) through {server} as {}", server.user())
        }
    };
    print(&format!("{}: in order ({kind})\n", args.file.display()))?;
    Ok(Exit::Done.into())
}

//! `caponier doctor`: what is wrong, where, and what to do about it.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use super::{Exit, ExitWith, print, running};
use crate::agent::doctor::Asked;
use crate::config::{self, Loaded};
use crate::diagnosis::{Examination, Finding, Report, Style, Verdict};
use crate::identity::AgentName;
use crate::limits;
use crate::target::Target;
use crate::{agent, gateway};

/// Look stage by stage at what an agent or a gateway needs, and say which stage is the first that is broken, and what to do.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier doctor --config /etc/caponier/agent.toml
  caponier doctor --config agent.toml --target orders.db.internal:5432
  caponier doctor --gateway --config /etc/caponier/gateway.toml
  caponier doctor acme/prod-eu --socket /run/caponier/gateway.sock
  caponier doctor --config agent.toml --json | jq -r '.stages[.first_broken // empty].next'

At an agent, for each way to a gateway: dns, proxy or tcp, clock, tls, websocket, ssh, key, organisation; then every target \
that the allowlist spells out: it resolves, which addresses are permitted, it answers, its certificate's name and time. What \
comes after a broken stage and needs it is skipped. It works before the first link and beside a running agent, and changes \
nothing: the session with the gateway ends before it is a link.

Targets are dialled under the agent's own rules and recorded: beside the agent's trail in a file that ends in .doctor, or in \
that of --trail.

ORG/AGENT, at the gateway, asks an agent over its link; it answers only where its owner has set agent.remote_doctor.

Exit codes: 0 nothing is broken, 1 something is, 2 usage or configuration, 4 (of ORG/AGENT) the agent was not examined, or \
not all of it: nobody answers, it was asked a moment ago, or its report is empty or makes no sense.")]
pub struct Args {
    /// An agent to be asked over its link to the gateway behind --socket.
    #[arg(value_name = "ORG/AGENT", conflicts_with_all = ["config", "gateway", "target", "trail"], required_unless_present = "config")]
    agent: Option<AgentName>,
    /// The configuration of the agent, or with --gateway of the gateway, that is to be examined.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Examine a gateway.
    #[arg(long, requires = "config", conflicts_with_all = ["target", "trail"])]
    gateway: bool,
    /// The gateway's admin socket (`admin_socket` in its configuration).
    #[arg(long, value_name = "PATH", default_value = "/run/caponier/gateway.sock")]
    socket: PathBuf,
    /// A target to look at besides those that the rules spell out. May be given several times.
    #[arg(long, value_name = "HOST:PORT")]
    target: Vec<Target>,
    /// Where dials are recorded, in the place of the agent's trail.
    #[arg(long, value_name = "FILE")]
    trail: Option<PathBuf>,
    /// How many seconds a stage may take.
    #[arg(long, value_name = "SECONDS", default_value_t = limits::EXAMINED_STAGE.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..=limits::EXAMINED_STAGE_MAX.as_secs()))]
    timeout: u64,
    /// Print the report as JSON, when it is complete.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// If no gateway answers, or the report cannot be written.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let style = style();
    let patience = Duration::from_secs(args.timeout);
    let tell = |finding: &Finding| {
        if !args.json {
            // Whoever reads it may have gone away; the exit code says all the same.
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(finding.text(style).as_bytes()).and_then(|()| out.flush());
        }
    };
    if let Some(agent) = &args.agent {
        let asking = async |_| gateway::examined(&args.socket, agent).await.exit_with(Exit::Unexamined);
        let report = running::block_on(asking)?;
        report.stages.iter().for_each(tell);
        let code = finish(&report, &args, style, Exit::Failed)?;
        let left_out = report.left_out().filter(|_| report.broken().is_none());
        return match left_out {
            Some(left_out) => Err(anyhow::anyhow!("{agent}: {}", left_out.evidence)).exit_with(Exit::Unexamined),
            None => Ok(code),
        };
    }
    let Some(path) = &args.config else { return Err(anyhow::anyhow!("give --config FILE")).exit_with(Exit::Usage) };
    let mut examination = Examination::new(tell);
    let subject = path.display().to_string();
    let loaded = match config::load(path) {
        Ok(loaded) => loaded,
        Err(faults) => {
            let evidence = faults.to_string().replace('\n', "; ");
            let next = format!(
                "correct what stands at each of these places, until caponier check {subject} finds it in order"
            );
            examination.add(Finding::new("configuration", &subject, Verdict::Broken, &evidence).advising(&next));
            let of = if args.gateway { "gateway" } else { "agent" };
            return finish(&examination.report(of), &args, style, Exit::Usage);
        }
    };
    let of = match loaded {
        Loaded::Agent(config, _) if !args.gateway => {
            let rules: usize = config.organisations.iter().map(|organisation| organisation.allow.rules().len()).sum();
            let said =
                format!("agent {} for {} organisation(s), {rules} rule(s)", config.id, config.organisations.len());
            examination.add(Finding::new("configuration", &subject, Verdict::Ok, &said));
            let asked = Asked { targets: args.target.clone(), trail: args.trail.clone(), patience };
            running::block_on(async |_| {
                agent::doctor::examine(&config, &asked, &mut examination).await;
                Ok(())
            })?;
            "agent"
        }
        Loaded::Gateway(config, _) if args.gateway => {
            let said = format!("gateway for {} organisation(s)", config.organisations.len());
            examination.add(Finding::new("configuration", &subject, Verdict::Ok, &said));
            running::block_on(async |_| {
                gateway::doctor::examine(&config, patience, &mut examination).await;
                Ok(())
            })?;
            "gateway"
        }
        _ => {
            let wanted =
                if args.gateway { "a gateway's configuration" } else { "an agent's (for a gateway's: --gateway)" };
            return Err(anyhow::anyhow!("{subject} is not {wanted}")).exit_with(Exit::Usage);
        }
    };
    finish(&examination.report(of), &args, style, Exit::Failed)
}

/// Prints what is left to print. `broken` is how the program ends where a stage is.
fn finish(report: &Report, args: &Args, style: Style, broken: Exit) -> anyhow::Result<ExitCode> {
    print(&match args.json {
        true => format!("{}\n", serde_json::to_string_pretty(report)?),
        false => format!("\n{}", report.summary(style)),
    })?;
    Ok(if report.first_broken.is_some() { broken } else { Exit::Done }.into())
}

/// What the terminal can show, by the first of the variables that is set (POSIX).
fn style() -> Style {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set).unwrap_or_default().to_ascii_uppercase();
    if locale.contains("UTF-8") || locale.contains("UTF8") { Style::Unicode } else { Style::Ascii }
}

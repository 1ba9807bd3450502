//! `caponier audit`: reading trails.

pub mod schema;
pub mod verify;

use std::process::ExitCode;

use clap::Subcommand;

/// Read audit trails: who reached what, and what was refused.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier audit schema --markdown
  caponier audit verify /var/log/caponier/agent.jsonl* --key audit.pub")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Schema(schema::Args),
    Verify(verify::Args),
}

/// Runs the command.
///
/// # Errors
/// If a trail cannot be read, or is not in order.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Schema(args) => schema::run(&args),
        Command::Verify(args) => verify::run(&args),
    }
}

//! `caponier audit`: reading trails.

pub mod query;
pub mod schema;
mod show;
pub mod tail;
pub mod verify;
mod wanted;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Subcommand;

use super::Exit;
use crate::audit::read::Tally;

/// Read audit trails: who reached what, and what was refused.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier audit tail -f /var/log/caponier/gateway.jsonl
  caponier audit query --since yesterday --principal alice /var/log/caponier/gateway.jsonl
  caponier audit verify /var/log/caponier/gateway.jsonl* --key audit.pub
  caponier audit schema --markdown")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Tail(Box<tail::Args>),
    Query(Box<query::Args>),
    Schema(schema::Args),
    Verify(verify::Args),
}

/// Runs the command.
///
/// # Errors
/// If a trail cannot be read, or is not in order.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Tail(args) => tail::run(*args),
        Command::Query(args) => query::run(*args),
        Command::Schema(args) => schema::run(&args),
        Command::Verify(args) => verify::run(&args),
    }
}

/// Says on standard error what was met besides records, and how the command ends because of that.
fn judge(tally: &Tally) -> Exit {
    let Some((path, offset)) = &tally.first_unreadable else { return Exit::Done };
    let lines = if tally.unreadable == 1 { "line is no record" } else { "lines are no records" };
    complain(&format!(
        "{} {lines} and had to be passed over, the first at byte {offset} of {}; `caponier audit verify` says more",
        tally.unreadable,
        path.display()
    ));
    Exit::Failed
}

fn complain(text: &str) {
    // With standard error gone there is nobody left to tell.
    let _ = writeln!(io::stderr(), "caponier: {text}");
}

/// The path of standard input in arguments that name trails.
fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

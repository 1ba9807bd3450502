//! `caponier audit schema`: what a record is made of.

use std::process::ExitCode;

use crate::audit::schema;
use crate::cli::{Exit, print};

/// Print what records of a trail are made of, event by event and member by member, as JSON Schema (2020-12).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier audit schema >caponier-audit.schema.json
  caponier audit schema --markdown | less

The number of the schema stands in every record as `v`. Within one number members and events may be added; none changes \
its meaning or goes.")]
pub struct Args {
    /// Print two tables in Markdown instead, of the events and of the members.
    #[arg(long)]
    markdown: bool,
}

/// Runs the command.
///
/// # Errors
/// If standard output takes no more.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.markdown {
        print(&schema::markdown())?;
    } else {
        print(&format!("{:#}\n", schema::json_schema()))?;
    }
    Ok(Exit::Done.into())
}

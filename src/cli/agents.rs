//! `caponier agents`: who is linked to a gateway.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use super::{Exit, print, running};
use crate::gateway;

/// Show the agents that are linked to a gateway, over its admin socket.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier agents --socket /run/caponier/gateway.sock
  caponier agents --json

To be run as the gateway's user, or as root. LIVE is the forwards that a link carries now, OPENED those it was asked for. \
A link that is retired takes no new ones.")]
pub struct Args {
    /// The gateway's admin socket (`admin_socket` in its configuration).
    #[arg(long, value_name = "PATH", default_value = "/run/caponier/gateway.sock")]
    socket: PathBuf,
    /// Print a JSON array with one object per link.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// If no gateway answers.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let rows = running::block_on(async |_| Ok(gateway::agents(&args.socket).await?))?;
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&rows)?))?;
        return Ok(Exit::Done.into());
    }
    let heads =
        ["AGENT", "REPLICA", "ADDRESS", "VERSION", "SINCE", "LIVE", "OPENED", "STATE", "KEY"].map(str::to_owned);
    let lines: Vec<[String; 9]> = std::iter::once(heads)
        .chain(rows.into_iter().map(|row| {
            [
                format!("{}/{}", row.organisation, row.agent),
                row.replica,
                row.address,
                row.version,
                row.since.get(..19).map_or(row.since.clone(), |second| format!("{second}Z")),
                row.live.to_string(),
                row.opened.to_string(),
                row.state,
                row.key,
            ]
        }))
        .collect();
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths: [usize; 9] = std::array::from_fn(width);
    let mut text = String::new();
    for line in &lines {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(widths) {
            write!(row, "{cell:width$}  ")?;
        }
        writeln!(text, "{}", row.trim_end())?;
    }
    print(&text)?;
    Ok(Exit::Done.into())
}

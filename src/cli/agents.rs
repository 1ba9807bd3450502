//! `caponier agents`: who is linked to a gateway, and who is missing.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use jiff::Timestamp;

use super::{Exit, print, running};
use crate::gateway::{self, AgentRow, LastError};
use crate::registry::expiry::Stage;

/// Show the agents of a gateway, linked or not, over its admin socket.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier agents --socket /run/caponier/gateway.sock
  caponier agents --wide
  caponier agents --json | jq -r '.[] | select(.state == \"absent\") | .agent'

To be run as the gateway's user, or as root. A line is a link, or a registered agent or replica without one. LIVE is the \
forwards that a link carries now.

States: active gets new forwards. Links that get no more, and end with their last forward: retired (replaced by a newer \
one of the same process), superseded (another process with the same replica name was started later: give each its own), \
draining (its agent goes away), unanswering (its agent answers no opens). Without a link: absent (listed for a day beside \
others of its agent), and never linked (not since the gateway was started).

SINCE is how long the link has been up, or the agent absent. LAST ERROR is what went wrong last and how long ago, in the \
words of the trail; with a question mark where the other end only claimed to be the agent and did not prove it.

KEY is how long the key of a link has left, or the last one of an agent without a link; the column is there where one has \
30 days or less.

With --wide: OPENED is the forwards that a link was asked for. CREDIT, HELD and UNSENT are bytes: what the agent has been \
allowed to make the gateway hold, what of it waits for slow clients, and what waits to be sent to the agent.")]
pub struct Args {
    /// The gateway's admin socket (`admin_socket` in its configuration).
    #[arg(long, value_name = "PATH", default_value = "/run/caponier/gateway.sock")]
    socket: PathBuf,
    /// Show all columns: addresses, versions, times, keys, memory, and errors in full.
    #[arg(long, conflicts_with = "json")]
    wide: bool,
    /// Print a JSON array with one object per line of the table.
    #[arg(long)]
    json: bool,
    /// Print instead, as JSON, how many SSH handshakes of agents and clients are under way, how many were at most, and which
    /// addresses are turned away after too many failures.
    #[arg(long, conflicts_with_all = ["json", "wide"])]
    handshakes: bool,
}

/// Runs the command.
///
/// # Errors
/// If no gateway answers.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.handshakes {
        let told = running::block_on(async |_| Ok(gateway::handshakes(&args.socket).await?))?;
        print(&format!("{}\n", serde_json::to_string(&told)?))?;
        return Ok(Exit::Done.into());
    }
    let rows = running::block_on(async |_| Ok(gateway::agents(&args.socket).await?))?;
    let text = match (args.json, args.wide) {
        (true, _) => format!("{}\n", serde_json::to_string_pretty(&rows)?),
        (false, true) => table(&WIDE, rows.iter().map(wide))?,
        (false, false) => {
            let now = Timestamp::now();
            // Only where there is something to say: the table is to fit a terminal.
            match rows.iter().any(|row| ending(row, now).is_some()) {
                true => table(&NARROW_ENDING, rows.iter().map(|row| narrow_ending(row, now)))?,
                false => table(&NARROW, rows.iter().map(|row| narrow(row, now)))?,
            }
        }
    };
    print(&text)?;
    Ok(Exit::Done.into())
}

const NARROW: [&str; 6] = ["AGENT", "REPLICA", "STATE", "LIVE", "SINCE", "LAST ERROR"];

fn narrow(row: &AgentRow, now: Timestamp) -> [String; 6] {
    let error = row.last_error.as_ref().map(|error| {
        let doubt = if error.claimed { "?" } else { "" };
        format!("{}{doubt} {}", error.reason, ago(&error.at, now))
    });
    [
        format!("{}/{}", row.organisation, row.agent),
        known(&row.replica),
        row.state.clone(),
        row.live.to_string(),
        row.since.as_deref().map_or_else(unknown, |since| ago(since, now)),
        error.unwrap_or_else(unknown),
    ]
}

const NARROW_ENDING: [&str; 7] = ["AGENT", "REPLICA", "STATE", "LIVE", "SINCE", "KEY", "LAST ERROR"];

fn narrow_ending(row: &AgentRow, now: Timestamp) -> [String; 7] {
    let [agent, replica, state, live, since, error] = narrow(row, now);
    [agent, replica, state, live, since, ending(row, now).unwrap_or_else(unknown), error]
}

/// How long a key has left that expires soon, in its largest unit.
fn ending(row: &AgentRow, now: Timestamp) -> Option<String> {
    let expires = row.expires.as_deref()?.parse::<Timestamp>().ok()?;
    match Stage::of(expires, now)? {
        Stage::Expired => Some("expired".to_owned()),
        Stage::Month | Stage::Week => {
            let hours = now.duration_until(expires).as_hours();
            Some(if hours < 48 { format!("{hours}h") } else { format!("{}d", hours / 24) })
        }
    }
}

const WIDE: [&str; 15] = [
    "AGENT",
    "REPLICA",
    "STATE",
    "LIVE",
    "SINCE",
    "ADDRESS",
    "TRANSPORT",
    "VERSION",
    "OPENED",
    "CREDIT",
    "HELD",
    "UNSENT",
    "KEY",
    "EXPIRES",
    "LAST ERROR",
];

fn wide(row: &AgentRow) -> [String; 15] {
    let error = |error: &LastError| {
        let doubt = if error.claimed { "?" } else { "" };
        let detail = if error.detail.is_empty() { String::new() } else { format!(": {}", error.detail) };
        format!("{}{doubt} at {} from {}{detail}", error.reason, second(&error.at), error.address)
    };
    [
        format!("{}/{}", row.organisation, row.agent),
        known(&row.replica),
        row.state.clone(),
        row.live.to_string(),
        row.since.as_deref().map_or_else(unknown, second),
        known(&row.address),
        known(&row.transport),
        known(&row.version),
        row.opened.to_string(),
        row.credit.to_string(),
        row.held.to_string(),
        row.unsent.to_string(),
        known(&row.key),
        row.expires.as_deref().map_or_else(unknown, second),
        row.last_error.as_ref().map_or_else(unknown, error),
    ]
}

fn unknown() -> String {
    "-".to_owned()
}

fn known(text: &Option<String>) -> String {
    text.clone().unwrap_or_else(unknown)
}

/// A time to the second.
fn second(time: &str) -> String {
    time.get(..19).map_or_else(|| time.to_owned(), |second| format!("{second}Z"))
}

/// How long ago a time was, in its largest unit.
pub(super) fn ago(time: &str, now: Timestamp) -> String {
    let Ok(time) = time.parse::<Timestamp>() else { return unknown() };
    let seconds = now.duration_since(time).as_secs().max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Columns as wide as their widest cell.
pub(super) fn table<const N: usize>(
    heads: &[&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> Result<String, std::fmt::Error> {
    let lines: Vec<[String; N]> = std::iter::once(heads.map(str::to_owned)).chain(rows).collect();
    let widths: [usize; N] =
        std::array::from_fn(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for line in &lines {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(widths) {
            write!(row, "{cell:width$}  ")?;
        }
        writeln!(text, "{}", row.trim_end())?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> AgentRow {
        AgentRow {
            organisation: "acme".to_owned(),
            agent: "prod-eu".to_owned(),
            replica: Some("host-1".to_owned()),
            state: "superseded".to_owned(),
            address: Some("10.20.30.40:50607".to_owned()),
            transport: Some("tls".to_owned()),
            version: Some("0.1.0".to_owned()),
            since: Some("2026-11-21T10:00:00Z".to_owned()),
            key: Some("SHA256:abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG".to_owned()),
            expires: None,
            live: 1_000,
            opened: 1_000_000,
            credit: 64 << 20,
            held: 0,
            unsent: 1,
            last_error: Some(LastError {
                at: "2026-11-21T10:00:00.123Z".to_owned(),
                reason: "login_refused_by_agent".to_owned(),
                detail: "more".to_owned(),
                address: "10.20.30.40:50607".to_owned(),
                claimed: false,
            }),
        }
    }

    fn never() -> AgentRow {
        let error = row().last_error.map(|error| LastError { reason: "unknown_key".into(), claimed: true, ..error });
        AgentRow {
            replica: None,
            state: "never linked".to_owned(),
            address: None,
            transport: None,
            version: None,
            since: None,
            key: None,
            last_error: error,
            ..row()
        }
    }

    #[test]
    fn the_table_fits_a_terminal_and_says_what_is_not_known() {
        let now = "2026-11-22T09:59:00Z".parse().expect("a time");
        let text = table(&NARROW, [row(), never()].iter().map(|row| narrow(row, now))).expect("a table");
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("AGENT") && lines[0].ends_with("LAST ERROR"), "{text}");
        assert!(lines[1].contains("superseded") && lines[1].ends_with("login_refused_by_agent 23h"), "{text}");
        assert!(lines[2].contains("never linked") && lines[2].ends_with("-      unknown_key? 23h"), "{text}");
        let text = table(&WIDE, [row(), never()].iter().map(wide)).expect("a table");
        assert!(text.contains("at 2026-11-21T10:00:00Z from 10.20.30.40:50607: more"), "{text}");
    }

    #[test]
    fn the_end_of_a_key_is_shown_where_it_is_near() {
        let now = "2026-11-22T10:00:00Z".parse().expect("a time");
        for (expires, shown) in [
            (None, None),
            (Some("2027-11-22T10:00:00Z"), None),
            (Some("2026-12-22T10:00:00Z"), Some("30d")),
            (Some("2026-11-23T10:00:00Z"), Some("24h")),
            (Some("2026-11-22T10:00:00Z"), Some("expired")),
        ] {
            let row = AgentRow { expires: expires.map(str::to_owned), ..row() };
            assert_eq!(ending(&row, now).as_deref(), shown, "{expires:?}");
            if let Some(shown) = shown {
                let text = table(&NARROW_ENDING, [row].iter().map(|row| narrow_ending(row, now))).expect("a table");
                assert!(text.contains("SINCE  KEY") && text.contains(shown), "{text}");
            }
        }
    }

    #[test]
    fn ages_are_told_in_their_largest_unit() {
        let now = "2026-11-21T10:00:00Z".parse().expect("a time");
        for (time, age) in [
            ("2026-11-21T10:00:01Z", "0s"),
            ("2026-11-21T09:58:01Z", "119s"),
            ("2026-11-21T09:58:00Z", "2m"),
            ("2026-11-21T08:00:00Z", "2h"),
            ("2026-11-01T10:00:00Z", "20d"),
            ("yesterday", "-"),
        ] {
            assert_eq!(ago(time, now), age, "{time}");
        }
    }
}

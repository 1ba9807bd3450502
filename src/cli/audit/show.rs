//! Records as tables, lines of JSON, CSV or OCSF.
//!
//! Promised: nothing of a record acts on a terminal or in a spreadsheet. In tables and CSV, characters that would are
//! replaced, and a cell that a spreadsheet would take for a formula begins with an apostrophe; in JSON they are escaped.
//! When whoever reads has seen enough and goes away, the reading ends, and that is no failure.

use std::fmt::Write as _;
use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};
use std::ops::ControlFlow;
use std::time::Duration;

use clap::ValueEnum;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::audit::ocsf;
use crate::audit::read::filter::Outcome;
use crate::audit::read::joined::Row;

/// In which form records are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// A table for people.
    Table,
    /// The records' own lines.
    Json,
    /// Comma-separated values (RFC 4180), for spreadsheets and databases.
    Csv,
    /// Events of the Open Cybersecurity Schema Framework (OCSF 1.3), one a line.
    Ocsf,
}

impl Format {
    /// Whether what is shown are rows, of which several records can make one.
    pub(super) fn is_rows(self) -> bool {
        matches!(self, Self::Table | Self::Csv)
    }
}

/// How the answer is to look.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Form of the answer")]
pub(super) struct Form {
    /// The form: a table is shown on a terminal, and lines of JSON are written elsewhere, unless this says otherwise.
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// The same as --format json.
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Show all columns of the table, and all that is in them.
    #[arg(long)]
    wide: bool,
}

impl Form {
    /// The form to use.
    pub(super) fn format(&self) -> Format {
        match (self.json, self.format) {
            (true, _) => Format::Json,
            (false, Some(format)) => format,
            (false, None) if io::stdout().is_terminal() || self.wide => Format::Table,
            (false, None) => Format::Json,
        }
    }

    /// Where the answer goes.
    pub(super) fn output(&self) -> Output<'static> {
        let width = rustix::termios::tcgetwinsize(io::stdout()).map_or(0, |size| usize::from(size.ws_col));
        Output {
            out: BufWriter::new(io::stdout().lock()),
            format: self.format(),
            table: Table { wide: self.wide, width: width.max(NARROWEST), rows: Vec::new(), widths: None },
            shown: 0,
            failed: None,
        }
    }
}

/// Standard output, as the answer goes to it.
pub(super) struct Output<'a> {
    out: BufWriter<StdoutLock<'a>>,
    format: Format,
    table: Table,
    shown: u64,
    failed: Option<io::Error>,
}

impl Output<'_> {
    /// How many rows or records were shown.
    pub(super) fn shown(&self) -> u64 {
        self.shown
    }

    /// Shows a record as a line: its own, or what it becomes in the format.
    pub(super) fn line(&mut self, line: &[u8]) -> ControlFlow<()> {
        self.shown += 1;
        if self.format == Format::Ocsf {
            // It was a record when it was read.
            let record = serde_json::from_slice(line).unwrap_or(serde_json::Value::Null);
            return self.write(escaped(ocsf::event(&record).to_string().as_bytes()).as_bytes());
        }
        let text = escaped(line);
        self.write(text.as_bytes())
    }

    /// Shows a row.
    pub(super) fn row(&mut self, row: &Row) -> ControlFlow<()> {
        let first = self.shown == 0;
        self.shown += 1;
        if self.format == Format::Csv {
            let head = if first { csv_line(CSV.iter().map(|(name, _)| (*name).to_owned())) } else { String::new() };
            return self.write((head + &csv_line(CSV.iter().map(|(_, cell)| cell(row)))).as_bytes());
        }
        self.table.rows.push(self.table.cells(row));
        if self.table.widths.is_none() && self.table.rows.len() < FIRST_ROWS {
            return ControlFlow::Continue(());
        }
        self.settle()
    }

    /// Writes what is held back.
    pub(super) fn flush(&mut self) -> ControlFlow<()> {
        self.settle()?;
        let flushed = self.out.flush();
        self.note(flushed)
    }

    /// Ends the answer.
    ///
    /// # Errors
    /// If it could not be written, for another reason than that nobody reads it.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        if self.failed.is_none() {
            // What went wrong is told below.
            let _ = self.flush();
        }
        match self.failed {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(anyhow::Error::new(error).context("could not write the answer to standard output"))
            }
            _ => Ok(()),
        }
    }

    fn settle(&mut self) -> ControlFlow<()> {
        let text = self.table.settle();
        self.write(text.as_bytes())
    }

    fn write(&mut self, bytes: &[u8]) -> ControlFlow<()> {
        let written = self.out.write_all(bytes);
        self.note(written)
    }

    fn note(&mut self, result: io::Result<()>) -> ControlFlow<()> {
        match result {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.failed.get_or_insert(error);
                ControlFlow::Break(())
            }
        }
    }
}

/// Waits, and says whether anybody still reads standard output then: of a pipe that can be told at once, and whoever follows a
/// quiet trail need not stay for its next record.
pub(super) fn anybody_after(patience: Duration) -> bool {
    let out = io::stdout();
    // Nothing is asked for: a hang-up is told all the same.
    let mut asked = [PollFd::new(&out, PollFlags::empty())];
    let timeout = Timespec::try_from(patience).ok();
    match poll(&mut asked, timeout.as_ref()) {
        Ok(0) => true,
        Ok(_) => !asked[0].revents().intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL),
        // A signal came; the next look waits again.
        Err(_) => true,
    }
}

/// Rows, of which the first decide how wide the columns are.
struct Table {
    wide: bool,
    width: usize,
    rows: Vec<Vec<String>>,
    widths: Option<Vec<usize>>,
}

impl Table {
    fn cells(&self, row: &Row) -> Vec<String> {
        let columns: &[Column] = if self.wide { WIDE } else { NARROW };
        columns.iter().map(|(_, cell)| shown(cell(row))).collect()
    }

    /// The text of the rows so far; before the first of them their heads.
    fn settle(&mut self) -> String {
        let mut text = String::new();
        if self.rows.is_empty() {
            return text;
        }
        let heads: &[Column] = if self.wide { WIDE } else { NARROW };
        let rows = std::mem::take(&mut self.rows);
        let new = self.widths.is_none();
        let widths = self.widths.get_or_insert_with(|| {
            let widest = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
            let natural = heads.iter().enumerate().map(|(at, (head, _))| widest(at).max(head.len())).collect();
            if self.wide { natural } else { fitted(natural, self.width) }
        });
        let head = new.then(|| heads.iter().map(|(head, _)| (*head).to_owned()).collect());
        for row in head.iter().chain(&rows) {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths.iter()) {
                // Writing into a String cannot fail.
                let _ = match self.wide {
                    true => write!(line, "{cell:width$}  "),
                    false => write!(line, "{:width$} ", cut(cell, *width)),
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Column widths that fit a terminal: the widest gives way first.
fn fitted(mut widths: Vec<usize>, terminal: usize) -> Vec<usize> {
    let room = terminal.saturating_sub(widths.len() - 1);
    while widths.iter().sum::<usize>() > room {
        // Half a time says nothing.
        let Some(widest) = widths[1..].iter_mut().max().filter(|width| **width > NARROWEST_COLUMN) else { break };
        *widest -= 1;
    }
    widths
}

fn cut(cell: &str, width: usize) -> String {
    if cell.chars().count() <= width {
        return cell.to_owned();
    }
    cell.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// A column: its head, and what is in it.
type Column = (&'static str, fn(&Row) -> String);

const NARROW: &[Column] = &[
    ("TIME", |row| time(row.began, Timestamp::now())),
    ("TOOK", |row| row.record.duration_ms.map_or_else(String::new, took)),
    ("WHO", who),
    ("AGENT", agent),
    ("TARGET", |row| text(&row.record.target)),
    ("BYTES", |row| match (row.record.to_target, row.record.from_target) {
        (None, None) => String::new(),
        (to, from) => bytes(to.unwrap_or(0).saturating_add(from.unwrap_or(0))),
    }),
    ("OUTCOME", |row| [what(row), text(&row.record.reason)].join(" ").trim().to_owned()),
];

const WIDE: &[Column] = &[
    ("TIME", |row| precise(row.began)),
    ("SIDE", |row| row.record.side.clone()),
    ("TOOK", |row| row.record.duration_ms.map_or_else(String::new, took)),
    ("WHO", who),
    ("ASSERTED BY", |row| text(&row.record.asserted_by)),
    ("AGENT", |row| [agent(row), text(&row.record.replica)].join(" ").trim().to_owned()),
    ("CLIENT", |row| text(&row.record.client)),
    ("DOOR", |row| text(&row.record.door)),
    ("TARGET", |row| text(&row.record.target)),
    ("RULE", |row| text(&row.record.rule)),
    ("DIALLED", |row| text(&row.record.dialled)),
    ("TO", |row| row.record.to_target.map_or_else(String::new, bytes)),
    ("FROM", |row| row.record.from_target.map_or_else(String::new, bytes)),
    ("OUTCOME", what),
    ("REASON", |row| text(&row.record.reason)),
    ("KEY", |row| text(&row.record.key)),
    ("FORWARD", |row| text(&row.record.forward)),
    ("DETAIL", |row| text(&row.record.detail)),
];

const CSV: &[Column] = &[
    ("began", |row| precise(row.began)),
    ("time", |row| precise(row.record.time)),
    ("duration_ms", |row| number(row.record.duration_ms)),
    ("side", |row| row.record.side.clone()),
    ("event", |row| row.record.event.clone()),
    ("outcome", |row| row.outcome.map_or_else(String::new, |outcome| outcome.to_string())),
    ("organisation", |row| text(&row.record.organisation)),
    ("agent", |row| text(&row.record.agent)),
    ("replica", |row| text(&row.record.replica)),
    ("principal", |row| text(&row.record.principal)),
    ("asserted_by", |row| text(&row.record.asserted_by)),
    ("key", |row| text(&row.record.key)),
    ("client", |row| text(&row.record.client)),
    ("door", |row| text(&row.record.door)),
    ("target", |row| text(&row.record.target)),
    ("rule", |row| text(&row.record.rule)),
    ("dialled", |row| text(&row.record.dialled)),
    ("to_target", |row| number(row.record.to_target)),
    ("from_target", |row| number(row.record.from_target)),
    ("reason", |row| text(&row.record.reason)),
    ("detail", |row| text(&row.record.detail)),
    ("forward", |row| text(&row.record.forward)),
    ("peer_forward", |row| text(&row.record.peer_forward)),
];

fn text(text: &Option<String>) -> String {
    text.clone().unwrap_or_default()
}

fn number(number: Option<u64>) -> String {
    number.map_or_else(String::new, |number| number.to_string())
}

/// The principal; where there is none, the key or the address.
fn who(row: &Row) -> String {
    let record = &row.record;
    text(&record.principal.clone().or_else(|| record.key.clone()).or_else(|| record.client_address()))
}

fn agent(row: &Row) -> String {
    match (&row.record.organisation, &row.record.agent) {
        (Some(organisation), Some(agent)) => format!("{organisation}/{agent}"),
        (one, other) => text(if one.is_some() { one } else { other }),
    }
}

/// The outcome of a forward; of what is none, the event.
fn what(row: &Row) -> String {
    match row.outcome {
        Some(Outcome::Refused) | None => row.record.event.clone(),
        Some(outcome) => outcome.to_string(),
    }
}

/// To the second; the year only where it is not this one.
fn time(time: Timestamp, now: Timestamp) -> String {
    let utc = |time: Timestamp| time.to_zoned(TimeZone::UTC).datetime();
    let (time, now) = (utc(time), utc(now));
    let (month, day, hour, minute) = (time.month(), time.day(), time.hour(), time.minute());
    if time.year() == now.year() {
        format!("{month:02}-{day:02} {hour:02}:{minute:02}:{:02}", time.second())
    } else {
        format!("{:04}-{month:02}-{day:02} {hour:02}:{minute:02}", time.year())
    }
}

fn precise(time: Timestamp) -> String {
    format!("{time:.3}")
}

/// A duration in its largest unit.
fn took(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms}ms"),
        1_000..120_000 => format!("{}s", ms / 1_000),
        120_000..7_200_000 => format!("{}m", ms / 60_000),
        7_200_000..172_800_000 => format!("{}h", ms / 3_600_000),
        _ => format!("{}d", ms / 86_400_000),
    }
}

/// Bytes in the unit that leaves at most four digits.
fn bytes(bytes: u64) -> String {
    let mut bytes = bytes;
    for unit in ["B", "K", "M", "G", "T"] {
        if bytes < 10_000 {
            return format!("{bytes}{unit}");
        }
        bytes /= 1_024;
    }
    format!("{bytes}P")
}

/// A text in which nothing acts on a terminal.
fn shown(cell: String) -> String {
    if cell.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return cell;
    }
    cell.chars().map(|character| if acts(character) { char::REPLACEMENT_CHARACTER } else { character }).collect()
}

/// Whether a character changes how a terminal shows what follows, or hides in it.
fn acts(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        )
}

/// A record's line with nothing in it that acts on a terminal. What would can only stand within a string, where its escape
/// means the same, or be space between members.
fn escaped(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let body = text.trim_end_matches('\n');
    let mut out = String::with_capacity(body.len() + 1);
    for character in body.chars() {
        match character {
            '\t' | '\r' => out.push(' '),
            character if acts(character) => {
                let mut units = [0; 2];
                for unit in character.encode_utf16(&mut units) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            character => out.push(character),
        }
    }
    out.push('\n');
    out
}

/// A line of CSV.
fn csv_line(cells: impl Iterator<Item = String>) -> String {
    let mut line = cells.map(csv_cell).collect::<Vec<_>>().join(",");
    line.push_str("\r\n");
    line
}

fn csv_cell(cell: String) -> String {
    let mut cell = shown(cell);
    if cell.starts_with(['=', '+', '-', '@']) {
        // Else a spreadsheet would compute it.
        cell.insert(0, '\'');
    }
    if cell.contains([',', '"', '\'', ';']) {
        cell = format!("\"{}\"", cell.replace('"', "\"\""));
    }
    cell
}

/// Columns of a terminal that there are at least, and everywhere else.
const NARROWEST: usize = 80;

/// Characters that a column keeps.
const NARROWEST_COLUMN: usize = 6;

/// Rows that are held back to see how wide the columns have to be.
const FIRST_ROWS: usize = 500;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::read::Record;

    fn row(record: &str) -> Row {
        Row::of(Record::read(record.as_bytes()).expect("a record"))
    }

    #[test]
    fn a_table_fits_eighty_columns() {
        let long = "a-name-that-is-as-long-as-names-may-be-in-every-place-of-all-of-it";
        let record = format!(
            "{{\"time\":\"2020-01-02T03:04:05.006Z\",\"event\":\"forward.ended\",\"side\":\"gateway\",\"principal\":\"{long}\",\
             \"organisation\":\"{long}\",\"agent\":\"{long}\",\"target\":\"{long}.{long}:65535\",\"reason\":\"{long}\",\
             \"duration_ms\":99999999999,\"to_target\":18446744073709551615,\"from_target\":1}}\n"
        );
        let mut table = Table { wide: false, width: 80, rows: Vec::new(), widths: None };
        table.rows.push(table.cells(&row(&record)));
        let text = table.settle();
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains("2020-01-02 03:04"), "{text}");
        table.rows.push(table.cells(&row(&record)));
        assert_eq!(table.settle().lines().count(), 1, "the heads stand once");
        let mut table = Table { wide: true, width: 80, rows: Vec::new(), widths: None };
        table.rows.push(table.cells(&row(&record)));
        assert!(table.settle().contains(&format!("{long}.{long}:65535")));
    }

    #[test]
    fn nothing_acts_on_a_terminal() {
        let record = "{\"time\":\"2026-01-02T03:04:05.006Z\",\"event\":\"auth.refused\",\"side\":\"gateway\",\
                      \"principal\":\"\\u001b[2Jx\u{9b}31m\u{202e}y\u{1f600}\"}\r\n";
        let row = row(record);
        let cells = Table { wide: true, width: 80, rows: Vec::new(), widths: None }.cells(&row);
        assert!(cells.iter().all(|cell| !cell.chars().any(acts)), "{cells:?}");
        assert!(cells.iter().any(|cell| cell.contains("x\u{fffd}31m\u{fffd}y\u{1f600}")), "{cells:?}");
        let line = escaped(record.as_bytes());
        assert!(!line.trim_end_matches('\n').chars().any(acts), "{line:?}");
        let again = Record::read(line.as_bytes()).expect("still a record");
        assert_eq!(again.principal, row.record.principal);
    }

    #[test]
    fn cells_are_text_to_spreadsheets() {
        for (cell, written) in [
            ("plain", "plain"),
            ("", ""),
            ("=cmd|' /C calc'!A0", "\"'=cmd|' /C calc'!A0\""),
            ("+1", "\"'+1\""),
            ("-1", "\"'-1\""),
            ("@SUM(A1)", "\"'@SUM(A1)\""),
            ("\t=1", "\u{fffd}=1"),
            ("a,b", "\"a,b\""),
            ("a\"b", "\"a\"\"b\""),
            ("a\r\nb", "a\u{fffd}\u{fffd}b"),
        ] {
            assert_eq!(csv_cell(cell.to_owned()), written, "{cell:?}");
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [0, 999, 1_000, 119_999, 120_000, 7_200_000, u64::MAX].map(took)[..6],
            ["0ms", "999ms", "1s", "119s", "2m", "2h"]
        );
        assert_eq!([0, 9_999, 10_000, 10_240_000, u64::MAX].map(bytes), ["0B", "9999B", "9K", "9M", "16383P"]);
    }
}

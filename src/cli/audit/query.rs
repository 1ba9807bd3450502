//! `caponier audit query`: what a trail says about something.

use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::show::{Form, Format, Output};
use super::wanted::Wanted;
use super::{complain, is_stdin, judge};
use crate::audit::read::filter::Outcome;
use crate::audit::read::joined::{Joiner, Row};
use crate::audit::read::{self, Hearer, Record, files};

/// Search audit trails: who reached what, when, and how it ended.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier audit query --since 2h --principal alice /var/log/caponier/gateway.jsonl
  caponier audit query --target orders.db.internal --outcome denied --wide gateway.jsonl
  caponier audit query --since 2026-11-21T08:00 --until 2026-11-21T09:00 --format csv agent.jsonl >hour.csv
  caponier audit query --forward ID --json gateway.jsonl agent.jsonl | jq .

A trail's rotated files are read with it, oldest first. Names may hold `*`. Times are UTC, unless they come with an offset. \
--since and --until look at when a record was written, and read only the part of a file that its index (FILE.index) says \
can hold it; without an index, everything is read.

In a table and in CSV a forward is one line: when it began, how long it took, and what became of it; `open` if no end of it \
stands in what was read. In JSON every record is a line, as the trail has it; in \
OCSF every record is an event.

In a cell of CSV that begins with = + - or @ an apostrophe stands before that, so that no spreadsheet computes it.

Exit code 0, also if there is nothing of the kind; 1 if a file cannot be read, or lines in it are no records, which are \
passed over; 2 if the question is wrong.")]
pub struct Args {
    #[command(flatten)]
    wanted: Wanted,
    /// With one of these outcomes: allowed (whatever became of it then), open, ended, denied, failed, abandoned; or refused, of
    /// logins. Several with commas.
    #[arg(long, value_name = "OUTCOME", value_delimiter = ',', help_heading = "Which records")]
    outcome: Vec<Outcome>,
    #[command(flatten)]
    form: Form,
    /// Show every record by itself, also in tables and CSV.
    #[arg(long, help_heading = "Form of the answer")]
    each: bool,
    /// Do not use the time indexes: read everything.
    #[arg(long)]
    no_index: bool,
    /// The trails; `-` is standard input.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// If a trail cannot be read, or standard output takes no more.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let format = args.form.format();
    let joins = format.is_rows() && !args.each;
    let mut filter = args.wanted.filter()?;
    if !joins {
        filter = filter.outcomes(args.outcome.clone());
    }
    let mut parts = files::expand(&args.files)?;
    for part in &mut parts {
        part.index &= !args.no_index;
    }
    let total = parts.iter().map(|part| part.length).sum::<Option<u64>>();
    let mut asker = Asker {
        output: args.form.output(),
        format,
        joiner: joins.then(Joiner::default),
        outcomes: args.outcome,
        bar: bar(total.filter(|_| !args.files.iter().any(|path| is_stdin(path)))),
        done: 0,
    };
    let read = read::scan(&parts, &filter, &mut asker);
    asker.bar.finish_and_clear();
    let shown = asker.output.shown();
    asker.output.finish()?;
    let exit = judge(&read?);
    if shown == 0 && io::stderr().is_terminal() {
        complain("no record is of that kind");
    }
    Ok(exit.into())
}

/// Shows how far the reading is, on a terminal and where it takes long enough to be seen.
fn bar(total: Option<u64>) -> ProgressBar {
    let Some(total) = total.filter(|total| *total >= BAR_BYTES && io::stderr().is_terminal()) else {
        return ProgressBar::hidden();
    };
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(5));
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

struct Asker {
    output: Output<'static>,
    format: Format,
    joiner: Option<Joiner>,
    outcomes: Vec<Outcome>,
    bar: ProgressBar,
    done: u64,
}

impl Asker {
    fn show(&mut self, row: &Row) -> ControlFlow<()> {
        // Where rows are joined, only the whole says what the outcome is.
        let wanted = |asked: &Outcome| row.outcome.is_some_and(|outcome| outcome.is(*asked));
        if self.joiner.is_some() && !self.outcomes.is_empty() && !self.outcomes.iter().any(wanted) {
            return ControlFlow::Continue(());
        }
        self.output.row(row)
    }
}

impl Hearer for Asker {
    fn found(&mut self, line: &[u8], record: Record) -> ControlFlow<()> {
        if !self.format.is_rows() {
            return self.output.line(line);
        }
        let row = match &mut self.joiner {
            Some(joiner) => joiner.take(record),
            None => Some(Row::of(record)),
        };
        row.map_or(ControlFlow::Continue(()), |row| self.show(&row))
    }

    fn passed(&mut self, bytes: u64) {
        self.done += bytes;
        self.bar.set_position(self.done);
    }

    fn ended(&mut self) -> ControlFlow<()> {
        let Some(joiner) = &mut self.joiner else { return ControlFlow::Continue(()) };
        for row in joiner.finish() {
            self.show(&row)?;
        }
        ControlFlow::Continue(())
    }
}

/// What is read within a second needs no bar.
const BAR_BYTES: u64 = 256 << 20;

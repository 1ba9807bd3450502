//! `caponier audit tail`: the last records of a trail, and those that come.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use super::show::{Form, Format, Output, anybody_after};
use super::wanted::Wanted;
use super::{complain, judge};
use crate::audit::read::filter::Outcome;
use crate::audit::read::joined::Row;
use crate::audit::read::{self, Follow, Hearer, Record, files};
use crate::cli::Exit;
use crate::limits::TRAIL_LOOK;

/// Show the last records of an audit trail, and with -f those that come.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier audit tail /var/log/caponier/gateway.jsonl
  caponier audit tail -f --outcome denied,refused /var/log/caponier/gateway.jsonl
  caponier audit tail -n 0 -f --json /var/log/caponier/agent.jsonl | jq .

-f goes on over rotations, and when the file is cut. It looks at the file four times a second, and ends with Ctrl-C, or when \
nobody reads its output any more. Names may hold `*`. Every record is a line; `caponier audit query` puts those of a forward \
together.")]
pub struct Args {
    /// Go on, and show what comes.
    #[arg(short, long)]
    follow: bool,
    /// How many of the last records to show.
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 10)]
    number: u16,
    #[command(flatten)]
    wanted: Wanted,
    /// With one of these outcomes: allowed, open, ended, denied, failed, abandoned; or refused, of logins. Several with commas.
    #[arg(long, value_name = "OUTCOME", value_delimiter = ',', help_heading = "Which records")]
    outcome: Vec<Outcome>,
    #[command(flatten)]
    form: Form,
    /// The trail that is written, or another file of it.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// If the trail cannot be read, or standard output takes no more.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let filter = args.wanted.filter()?.outcomes(args.outcome.clone());
    // Opened first: what is shown from the end and what comes then meet at this place, whatever happens meanwhile.
    let mut follow = Follow::at_end(&args.file)?;
    let mut parts = files::expand(std::slice::from_ref(&args.file))?;
    if let Some(at) = parts.iter().position(|part| part.is(follow.file())) {
        parts.truncate(at + 1);
        parts[at].length = Some(follow.position());
    }
    let (records, tally) = read::last(&parts, &filter, usize::from(args.number))?;
    let mut teller = Teller { output: args.form.output(), format: args.form.format() };
    let mut flow = ControlFlow::Continue(());
    for (line, record) in records {
        flow = teller.found(&line, record);
        if flow.is_break() {
            break;
        }
    }
    let mut exit = judge(&tally);
    if flow.is_continue() {
        flow = teller.output.flush();
    }
    while args.follow && flow.is_continue() {
        flow = follow.look(&filter, &mut teller)?;
        if follow.was_cut() {
            complain(&format!("{} was cut; what comes is shown from its beginning", args.file.display()));
        }
        if judge(&follow.tally()) == Exit::Failed {
            exit = Exit::Failed;
        }
        if flow.is_continue() {
            flow = teller.output.flush();
        }
        if flow.is_continue() && !anybody_after(TRAIL_LOOK) {
            break;
        }
    }
    teller.output.finish()?;
    Ok(exit.into())
}

struct Teller {
    output: Output<'static>,
    format: Format,
}

impl Hearer for Teller {
    fn found(&mut self, line: &[u8], record: Record) -> ControlFlow<()> {
        if self.format.is_rows() { self.output.row(&Row::of(record)) } else { self.output.line(line) }
    }
}

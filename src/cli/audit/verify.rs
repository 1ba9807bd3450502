//! `caponier audit verify`: whether trails are as they were written.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::audit::chain::TrailId;
use crate::audit::compare::{self, Comparison};
use crate::audit::verify::{self, Anchors, Keys, Range, Report, Trail};
use crate::cli::{Exit, ExitWith, print};

/// Verify trails: find records that were changed, removed, moved, put in or cut off.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier audit verify /var/log/caponier/agent.jsonl*  --key audit.pub
  caponier audit verify gateway.jsonl* --key gateway-audit.pub --anchors agent.jsonl --anchors /mnt/elsewhere/heads.jsonl
  caponier audit verify gateway.jsonl --compare agent.jsonl --json | jq .comparison.differences

The files of one trail, with those that were rotated away, are given in any order. Every record names the one before it, so \
that any change shows with its file, line, byte and number. Whoever could write the file can also make that chain anew: this \
shows by the heads that the trail's writer has signed (--key), as long as its key was not taken; and, whoever it was, by what \
another place has kept (--anchors): the other side's trail, which records what it has seen of this one, or a copy of the heads \
(a sink with only = \"heads\").

What is vouched for and what is not is told apart: records at the end that no head covers yet are no fault, and show as such. \
Nor are a line that a crash has left incomplete, if the next start has recorded it, or records that a copy has lost, if the \
trail says so: these are notes.

A trail of this side's that another place has seen and that is not among the files is reported with its id, how many of its \
heads were seen, and from when to when. If it may be the same writer's (an agent's, by the agent and replica that the gateway's \
trail names; a gateway's, by the address at which the agent's trail has it, unless both ran at the same time; any, by a copy of \
heads that holds both), then this copy does not hold it, and that is a finding: it was deleted and begun anew, or its files were \
not given. Give them, or say with --elsewhere that you know where it is. Others', as other agents' in a gateway's trail, are \
counted only.

--compare holds the trail of a gateway and that of its agent against each other, forward by forward: who, for what, how it \
ended, how many bytes. The gateway's forwards of other agents do not count, and the agent's for organisations of which the \
gateway's trail knows nothing are counted as other gateways'. Of an agent with several gateways for one organisation, give all \
their trails. Verify the other trails as well.

Exit code 0 if all is in order, 1 if not, 2 if a file cannot be read.")]
pub struct Args {
    /// The trail's files.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// A public key, or a file of several, one a line, by which heads have to be signed, and by which countersignatures count.
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// What another place has kept: the other side's trail, or a copy of this one's heads; copied before the trail itself.
    #[arg(long, value_name = "FILE", num_args = 1)]
    anchors: Vec<PathBuf>,
    /// The id of a trail of which it is known where it is, or that it was given up in order: that it is not here is no finding.
    #[arg(long, value_name = "TRAIL", num_args = 1, value_parser = trail_id)]
    elsewhere: Vec<TrailId>,
    /// The sink whose copy the files are: that others have lost records, as the trail says, does not excuse what is missing here.
    #[arg(long, value_name = "SINK")]
    sink: Option<String>,
    /// The other side's trail, to be compared forward by forward; repeated for its rotated files, and for other gateways' or
    /// agents' trails.
    #[arg(long, value_name = "OTHER")]
    compare: Vec<PathBuf>,
    /// By how many seconds the two sides' clocks may differ.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "compare")]
    skew_s: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    report: &'a Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    comparison: Option<&'a Comparison>,
}

/// Runs the command.
///
/// # Errors
/// If a file cannot be read or is not what it is given as.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut keys = Keys::default();
    for path in &args.key {
        let text = fs::read_to_string(path).with_context(|| format!("could not read the key file {}", path.display()));
        let read = keys.read(&text.exit_with(Exit::Usage)?);
        let count =
            read.with_context(|| format!("key file {}: one of its keys", path.display())).exit_with(Exit::Usage)?;
        if count == 0 {
            return Err(anyhow::anyhow!("key file {} holds no key", path.display())).exit_with(Exit::Usage);
        }
    }
    let mut anchors = Anchors::default();
    args.elsewhere.iter().for_each(|trail| anchors.elsewhere(*trail));
    if let Some(sink) = &args.sink {
        anchors.copy_of(sink);
    }
    for path in &args.anchors {
        let read = fs::File::open(path).and_then(|file| anchors.read(&path.display().to_string(), file));
        let count = read.with_context(|| format!("could not read {}", path.display())).exit_with(Exit::Usage)?;
        if count == 0 {
            warn(&format!("{} holds neither anchors nor heads", path.display()));
        }
    }
    if anchors.is_full() {
        warn("there are more anchors than are looked at at once: give fewer files");
    }
    let size = |paths: &[PathBuf]| -> u64 {
        paths.iter().filter_map(|path| fs::metadata(path).ok()).map(|file| file.len()).sum()
    };
    let passes = if args.compare.is_empty() { 1 } else { 3 };
    let bar = bar(size(&args.files) * passes + size(&args.compare) * 2);
    let report = verify::verify(&args.files, &keys, &mut anchors, |bytes| bar.inc(bytes)).exit_with(Exit::Usage)?;
    let comparison = if args.compare.is_empty() {
        None
    } else {
        let skew = Duration::from_secs(args.skew_s.into());
        let compared = compare::compare(&args.files, &args.compare, skew, |bytes| bar.inc(bytes));
        Some(compared.exit_with(Exit::Usage)?)
    };
    bar.finish_and_clear();
    let text = if args.json {
        format!("{}\n", serde_json::to_string(&Told { report: &report, comparison: comparison.as_ref() })?)
    } else {
        told(&report, comparison.as_ref(), &keys, args.files.len())
    };
    print(&text)?;
    let agree = comparison.is_none_or(|comparison| comparison.agree);
    Ok(if report.intact && agree { Exit::Done } else { Exit::Failed }.into())
}

fn trail_id(text: &str) -> Result<TrailId, &'static str> {
    TrailId::parse(text).ok_or("not the id of a trail, which is 32 digits of 0-9 a-f")
}

fn warn(text: &str) {
    let _ = writeln!(io::stderr(), "caponier: warning: {text}");
}

/// Shows how far it is, where standard error is a terminal.
fn bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left") {
        bar.set_style(style);
    }
    bar
}

fn told(report: &Report, comparison: Option<&Comparison>, keys: &Keys, files: usize) -> String {
    let mut text = String::new();
    for trail in &report.trails {
        tell(&mut text, trail);
    }
    if keys.is_empty() && report.trails.iter().any(|trail| !trail.signed.is_empty()) {
        text.push_str("No --key was given: whose keys these are is not known.\n");
    }
    for note in &report.notes {
        let _ = writeln!(text, "note: {note}");
    }
    tell_absent(&mut text, report);
    for finding in &report.findings {
        let _ = writeln!(text, "{finding}");
    }
    if report.more_findings > 0 {
        let _ = writeln!(text, "… and {} more", report.more_findings);
    }
    let found = report.findings.len() as u64 + report.more_findings;
    let _ = match (report.intact, report.records) {
        (true, 0) => writeln!(text, "empty: there is no record in {files} file(s)"),
        (true, records) => writeln!(text, "intact: {records} record(s) in {files} file(s)"),
        (false, records) => writeln!(text, "damaged: {found} finding(s) in {records} record(s) of {files} file(s)"),
    };
    if let Some(comparison) = comparison {
        tell_comparison(&mut text, comparison);
    }
    text
}

fn tell(text: &mut String, trail: &Trail) {
    let name = trail.trail.as_deref().unwrap_or("whose id is not in these files");
    let side = trail.side.as_deref().unwrap_or("nobody's");
    let between = match (&trail.from, &trail.until) {
        (Some(from), Some(until)) => format!(", {from} to {until}"),
        _ => String::new(),
    };
    let state = if trail.stopped { "stopped" } else { "open: its writer runs, or was killed" };
    let _ = writeln!(text, "trail {name} ({side}): records {} to {}{between}; {state}", trail.first, trail.last);
    let ranges = |text: &mut String, what: &str, ranges: &[Range], tail: u64| {
        for Range { first, last, by, .. } in ranges {
            let _ = writeln!(text, "  {what}: {first} to {last} by {by}");
        }
        let all = tail > trail.last.saturating_sub(trail.first);
        let _ = match tail {
            0 => Ok(()),
            _ if all => writeln!(text, "  not {what}: any"),
            tail => writeln!(text, "  not {what}: {} to {}, the last {tail}", trail.last + 1 - tail, trail.last),
        };
    };
    ranges(text, "signed", &trail.signed, trail.unsigned_tail);
    ranges(text, "anchored", &trail.anchored, trail.unanchored_tail);
}

/// Trails that are not here and need not be; those that are missed are findings.
fn tell_absent(text: &mut String, report: &Report) {
    let others: Vec<_> = report.absent.iter().filter(|absent| !absent.missed).collect();
    for absent in others.iter().take(ABSENT_SHOWN) {
        let _ = writeln!(text, "not here: {absent}; as far as can be told, another writer's");
    }
    let more = others.len().saturating_sub(ABSENT_SHOWN) as u64 + report.more_absent;
    if more > 0 {
        let _ = writeln!(text, "not here: {more} more of others");
    }
}

/// How many trails of others' are shown one by one.
const ABSENT_SHOWN: usize = 8;

fn tell_comparison(text: &mut String, comparison: &Comparison) {
    for difference in &comparison.differences {
        let at = |place: &Option<String>| place.as_ref().map(|place| format!(" ({place})")).unwrap_or_default();
        let _ = writeln!(
            text,
            "{}: {}: the gateway says {}{}, the agent {}{}",
            difference.forward,
            difference.category.as_str(),
            difference.gateway,
            at(&difference.at_gateway),
            difference.agent,
            at(&difference.at_agent),
        );
    }
    let counted: u64 = comparison.categories.values().sum();
    if counted > comparison.differences.len() as u64 {
        let _ = writeln!(text, "… and {} more", counted - comparison.differences.len() as u64);
    }
    for (category, count) in &comparison.categories {
        let _ = writeln!(text, "  {}: {count}", category.as_str());
    }
    let Comparison { agreed, explained, never_asked, live, outside, elsewhere, not_compared, .. } = comparison;
    let _ = writeln!(
        text,
        "{}: {agreed} forward(s) agree, {explained} differ as their end explains, {never_asked} never came to the agent, {live} \
         live, {outside} outside of the other trail, {elsewhere} other gateways', {not_compared} not compared",
        if comparison.agree { "reconciled" } else { "not reconciled" },
    );
}

//! Reads `[audit]`: where the trail goes.

use std::path::PathBuf;
use std::time::Duration;

use super::collectors;
use super::file::{Once, optional, private_key};
use crate::audit::head::Signer;
use crate::audit::sink::{Content, Fsync, Rotation, SinkConfig, SinkKind, Sinks};
use crate::document::{Item, Table};
use crate::identity::{AgentId, PrivateKey};
use crate::limits::{TRAIL_ROTATE, TRAIL_ROTATE_AGE};

/// All of `[audit]`.
pub(super) fn audit(root: &Table<'_>) -> Option<Sinks> {
    let table = root.required_table("audit")?;
    let stdout = table.optional("stdout");
    let file = optional(table.optional("file"), |item| item.path());
    let further = sinks(&table);
    let signing_key = optional(table.optional("signing_key"), signing_key);
    let number = |key, range| optional(table.optional(key), |item: &Item<'_>| item.integer::<u64>(range));
    let head_records = number("head_records", 1..=1_000_000);
    let head_s = number("head_s", 1..=DAY);
    let progress_s = number("progress_s", 1..=DAY);
    let wanted = match &stdout {
        Some(item) => item.boolean()?,
        None => false,
    };
    let first = match (file?, wanted) {
        (Some(path), false) => {
            let kind = file_sink(&table, path)?;
            Some(Sinks::new(vec![SinkConfig::required("file", kind)]))
        }
        (None, true) => Some(Sinks::stdout()),
        (Some(_), true) => {
            table.fault("stdout", "a file and stdout: choose one");
            return None;
        }
        (None, false) => None,
    };
    let further = further?;
    if first.is_none() && !further.iter().any(|sink| sink.required) {
        let problem = match further.is_empty() {
            true => "nowhere to write to: give file = \"…\" or stdout = true",
            false => {
                "no sink is required, so that everything could be lost: give file = \"…\", or required = true to one"
            }
        };
        table.fault("file", problem);
        return None;
    }
    let mut sinks = first.unwrap_or_else(|| Sinks::new(Vec::new()));
    sinks.list.extend(further);
    sinks.signing_key = signing_key?;
    sinks.heads.records = head_records?.unwrap_or(sinks.heads.records);
    sinks.heads.every = head_s?.map_or(sinks.heads.every, Duration::from_secs);
    sinks.progress = progress_s?.map_or(sinks.progress, Duration::from_secs);
    Some(sinks)
}

/// The key that heads are signed with.
fn signing_key(item: &Item<'_>) -> Option<PrivateKey> {
    let key = private_key(item)?;
    match Signer::new(key.clone()) {
        Ok(_) => Some(key),
        Err(error) => item.reject(error.to_string()),
    }
}

/// The file at `path`, with what `table` says of it.
fn file_sink(table: &Table<'_>, path: PathBuf) -> Option<SinkKind> {
    let each = optional(table.optional("fsync"), |item| item.choice(&[("each", true), ("interval", false)]));
    let fsync_s = optional(table.optional("fsync_s"), |item| item.integer::<u64>(1..=3_600));
    let (each, fsync_s) = (each?.unwrap_or_default(), fsync_s?);
    if each && fsync_s.is_some() {
        table.fault("fsync_s", "stands beside fsync = \"interval\" only");
        return None;
    }
    let zero = |key, most| {
        optional(table.optional(key), |item| {
            item.integer_because::<u64>(0..=most, "0 means that there is no such bound")
        })
    };
    let (mib, hours, keep) = (zero("rotate_mib", 1 << 20), zero("rotate_hours", 24 * 366), zero("keep", 1_000_000));
    let some = |number: u64| Some(number).filter(|number| *number > 0);
    let rotate = Rotation {
        bytes: mib?.map_or(Some(TRAIL_ROTATE), |mib| some(mib << 20)),
        age: hours?.map_or(Some(TRAIL_ROTATE_AGE), |hours| some(hours).map(|hours| Duration::from_secs(hours * 3_600))),
        keep: keep?.and_then(some).and_then(|keep| usize::try_from(keep).ok()),
    };
    let fsync =
        if each { Fsync::Each } else { fsync_s.map_or(Fsync::default(), |s| Fsync::Interval(Duration::from_secs(s))) };
    Some(SinkKind::File { path, fsync, rotate })
}

/// The most seconds that are accepted for what happens at intervals.
const DAY: i64 = 86_400;

/// The further sinks: `[[audit.sink]]`.
fn sinks(table: &Table<'_>) -> Option<Vec<SinkConfig>> {
    let mut names = Once::new("sink");
    let tables = table.tables("sink");
    if let Some(table) = tables.get(crate::limits::SINKS_MAX) {
        table.fault("name", format!("more than {} sinks are not accepted", crate::limits::SINKS_MAX));
        return None;
    }
    let sinks: Vec<_> = tables.iter().map(|table| sink(table, &mut names)).collect();
    sinks.into_iter().collect()
}

#[derive(Clone, Copy)]
enum Kind {
    File,
    Stdout,
    Syslog,
    Https,
}

fn sink(table: &Table<'_>, names: &mut Once<String>) -> Option<SinkConfig> {
    let name = table.required("name").and_then(|item| {
        // A name as agents have them: it is a label of metrics.
        let name = item.parse::<AgentId>()?.to_string();
        if ["file", "stdout"].contains(&name.as_str()) {
            return item.reject("this is the name of the sink that `file` or `stdout` stands for: choose another");
        }
        names.first(name.clone(), &item).then_some(name)
    });
    let required = optional(table.optional("required"), Item::boolean).map(Option::unwrap_or_default);
    let only =
        optional(table.optional("only"), |item| item.choice(&[("all", Content::All), ("heads", Content::Heads)]));
    let kinds = [("file", Kind::File), ("stdout", Kind::Stdout), ("syslog", Kind::Syslog), ("https", Kind::Https)];
    let kind = match table.required("kind").and_then(|item| item.choice(&kinds))? {
        Kind::File => table.required("path").and_then(|item| item.path()).and_then(|path| file_sink(table, path)),
        Kind::Stdout => Some(SinkKind::Stdout),
        Kind::Syslog => collectors::syslog(table).map(SinkKind::Syslog),
        Kind::Https => collectors::https(table, required?).map(SinkKind::Https),
    };
    Some(SinkConfig { name: name?, kind: kind?, required: required?, only: only?.unwrap_or_default() })
}

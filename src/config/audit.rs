//! Reads `[audit]`: where the trail goes.

use super::collectors;
use super::file::{Once, optional};
use crate::audit::sink::{Content, Fsync, Rotation, SinkConfig, SinkKind, Sinks};
use crate::document::{Item, Table};
use crate::identity::AgentId;

/// All of `[audit]`.
pub(super) fn audit(root: &Table<'_>) -> Option<Sinks> {
    let table = root.required_table("audit")?;
    let stdout = table.optional("stdout");
    let file = optional(table.optional("file"), |item| item.path());
    let further = sinks(&table);
    let wanted = match &stdout {
        Some(item) => item.boolean()?,
        None => false,
    };
    let first = match (file?, wanted) {
        (Some(path), false) => Some(Sinks::file(path)),
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
    Some(sinks)
}

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
        Kind::File => table.required("path").and_then(|item| item.path()).map(|path| SinkKind::File {
            path,
            fsync: Fsync::default(),
            rotate: Rotation::default(),
        }),
        Kind::Stdout => Some(SinkKind::Stdout),
        Kind::Syslog => collectors::syslog(table).map(SinkKind::Syslog),
        Kind::Https => collectors::https(table, required?).map(SinkKind::Https),
    };
    Some(SinkConfig { name: name?, kind: kind?, required: required?, only: only?.unwrap_or_default() })
}

//! The schema of trails: every event and every member of a record, with its form, its meaning, and since when it is there.
//!
//! Promised: this table is the only description. `caponier audit schema` prints it, as JSON Schema (2020-12) or as tables in
//! Markdown, and tests hold the program's own records to it. Within one number of the schema (`v`) members and events may
//! come to be, and never change their meaning or go; what would break a reader makes a new number.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

/// The number of the schema that this program writes.
pub const VERSION: u64 = 1;

/// What kind of value a member has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A text of bounded length.
    Text,
    /// One of a fixed set of words in snake case.
    Word,
    /// A moment: RFC 3339, UTC, with milliseconds.
    Time,
    /// The SHA-256 of something, in base64url without padding.
    Digest,
    /// Bytes in base64 with padding.
    Base64,
    /// The id of a trail: 32 hexadecimal digits.
    TrailId,
    /// A number that counts things or names one by its place.
    Number,
    /// A number of bytes.
    Bytes,
    /// A number of milliseconds.
    Milliseconds,
    /// Addresses, or addresses with ports.
    Addresses,
    /// Numbers by name.
    Counts,
    /// Texts by name: what came, what went.
    Changes,
}

impl Form {
    /// The form in a word, for people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Word => "word",
            Self::Time => "time",
            Self::Digest => "SHA-256, base64url",
            Self::Base64 => "base64",
            Self::TrailId => "32 hexadecimal digits",
            Self::Number => "number",
            Self::Bytes => "bytes",
            Self::Milliseconds => "milliseconds",
            Self::Addresses => "addresses",
            Self::Counts => "numbers by name",
            Self::Changes => "ids by what befell them",
        }
    }

    fn schema(self) -> Value {
        let number = || json!({"type": "integer", "minimum": 0});
        match self {
            Self::Text => json!({"type": "string", "minLength": 1}),
            Self::Word => json!({"type": "string", "pattern": "^[a-z0-9_]+$"}),
            Self::Time => json!({
                "type": "string",
                "format": "date-time",
                "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{3}Z$",
            }),
            Self::Digest => json!({"type": "string", "pattern": "^[A-Za-z0-9_-]{43}$"}),
            Self::Base64 => json!({"type": "string", "contentEncoding": "base64", "pattern": "^[A-Za-z0-9+/]+={0,2}$"}),
            Self::TrailId => json!({"type": "string", "pattern": "^[0-9a-f]{32}$"}),
            Self::Number | Self::Bytes | Self::Milliseconds => number(),
            Self::Addresses => json!({"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}}),
            Self::Counts => json!({"type": "object", "minProperties": 1, "additionalProperties": number()}),
            Self::Changes => json!({
                "type": "object",
                "minProperties": 1,
                "additionalProperties": {
                    "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}, number()],
                },
            }),
        }
    }

    fn admits(self, value: &Value) -> bool {
        match self {
            Self::Text => value.as_str().is_some_and(|text| !text.is_empty()),
            Self::Word => value.as_str().is_some_and(|text| {
                !text.is_empty() && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
            }),
            Self::Time => value
                .as_str()
                .is_some_and(|text| text.len() == 24 && text.ends_with('Z') && text.parse::<jiff::Timestamp>().is_ok()),
            Self::Digest => value.as_str().is_some_and(|text| super::chain::Link::parse(text.as_bytes()).is_some()),
            Self::Base64 => value.as_str().is_some_and(|text| {
                let plain = text.trim_end_matches('=');
                !plain.is_empty()
                    && text.len() - plain.len() <= 2
                    && plain.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/'))
            }),
            Self::TrailId => value.as_str().is_some_and(|text| super::chain::TrailId::parse(text).is_some()),
            Self::Number | Self::Bytes | Self::Milliseconds => value.is_u64(),
            Self::Addresses => value.as_array().is_some_and(|all| {
                !all.is_empty() && all.iter().all(|one| one.as_str().is_some_and(|text| !text.is_empty()))
            }),
            Self::Counts => {
                value.as_object().is_some_and(|counts| !counts.is_empty() && counts.values().all(Value::is_u64))
            }
            Self::Changes => value.as_object().is_some_and(|changes| {
                let ids = |value: &Value| value.as_array().is_some_and(|ids| ids.iter().all(Value::is_string));
                !changes.is_empty() && changes.values().all(|value| ids(value) || value.is_string() || value.is_u64())
            }),
        }
    }
}

/// A member of records.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub form: Form,
    /// What it means.
    pub meaning: &'static str,
    /// The number of the schema since which it is there.
    pub since: u64,
}

/// What a record tells of.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    /// Its name: the value of the member `event`.
    pub name: &'static str,
    /// Whose trails have it.
    pub sides: &'static [&'static str],
    /// What it means.
    pub meaning: &'static str,
    /// Members that every record of this event has, beside those that all records have.
    pub always: &'static [&'static [&'static str]],
    /// Members that are there where they apply.
    pub maybe: &'static [&'static [&'static str]],
    /// The number of the schema since which it is there.
    pub since: u64,
}

impl Event {
    fn needs(&self) -> impl Iterator<Item = &'static str> {
        ALWAYS.iter().chain(self.always.iter().copied().flatten()).copied()
    }

    fn may(&self) -> impl Iterator<Item = &'static str> {
        self.needs().chain(self.maybe.iter().copied().flatten().copied())
    }
}

/// The field of this name.
#[must_use]
pub fn field(name: &str) -> Option<&'static Field> {
    FIELDS.iter().find(|field| field.name == name)
}

/// The event of this name.
#[must_use]
pub fn event(name: &str) -> Option<&'static Event> {
    EVENTS.iter().find(|event| event.name == name)
}

/// Whether a record is as the schema says.
///
/// # Errors
/// With the first thing that is not.
pub fn check(record: &Value) -> Result<(), String> {
    let members = record.as_object().ok_or("a record is an object")?;
    let text = |name: &str| members.get(name).and_then(Value::as_str).unwrap_or_default();
    let event = event(text("event")).ok_or_else(|| format!("there is no event {:?}", text("event")))?;
    if !event.sides.contains(&text("side")) {
        return Err(format!("{}: not an event of the side {:?}", event.name, text("side")));
    }
    if let Some(missing) = event.needs().find(|name| !members.contains_key(*name)) {
        return Err(format!("{}: {missing} is missing", event.name));
    }
    if members.get("v").is_some_and(|version| version.as_u64() != Some(VERSION)) {
        return Err(format!("{}: another version of the schema", event.name));
    }
    for (name, value) in members {
        let Some(field) = event.may().find(|allowed| allowed == name).and_then(field) else {
            return Err(format!("{}: {name} does not belong there", event.name));
        };
        if !field.form.admits(value) {
            return Err(format!("{}: {name} is no {}: {value}", event.name, field.form.as_str()));
        }
    }
    Ok(())
}

/// The schema as JSON Schema, draft 2020-12.
#[must_use]
pub fn json_schema() -> Value {
    let mut definitions = Map::new();
    for field in FIELDS {
        let mut schema = field.form.schema();
        if let Some(schema) = schema.as_object_mut() {
            schema.insert("description".to_owned(), field.meaning.into());
            schema.insert("$comment".to_owned(), format!("{}; since {}", field.form.as_str(), field.since).into());
        }
        definitions.insert(field.name.to_owned(), schema);
    }
    definitions.insert("v".to_owned(), json!({"const": VERSION, "description": meaning("v")}));
    let events: Vec<Value> = EVENTS
        .iter()
        .map(|event| {
            let mut properties: Map<String, Value> =
                event.may().map(|name| (name.to_owned(), json!({"$ref": format!("#/$defs/{name}")}))).collect();
            properties.insert("event".to_owned(), json!({"const": event.name}));
            properties.insert("side".to_owned(), json!({"enum": event.sides}));
            json!({
                "title": event.name,
                "description": event.meaning,
                "$comment": format!("since {}", event.since),
                "type": "object",
                "properties": properties,
                "required": event.needs().collect::<Vec<_>>(),
                "additionalProperties": false,
            })
        })
        .collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": format!("urn:caponier:audit:record:{VERSION}"),
        "title": format!("A record of caponier's audit trail, version {VERSION}"),
        "description": "One line of a trail. Members that do not apply are absent. A later program may add members and events \
                        under the same version: readers leave alone what they do not know.",
        "type": "object",
        "oneOf": events,
        "$defs": definitions,
    })
}

/// The schema as two tables in Markdown.
#[must_use]
pub fn markdown() -> String {
    let mut text =
        String::from("| Event | Sides | Meaning | Members | Where they apply | Since |\n|---|---|---|---|---|---|\n");
    let names = |names: &mut dyn Iterator<Item = &'static str>| {
        names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    };
    for event in EVENTS {
        // Writing into a String cannot fail.
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} | {} | {} |",
            event.name,
            event.sides.join(", "),
            event.meaning,
            names(&mut event.always.iter().copied().flatten().copied()),
            names(&mut event.maybe.iter().copied().flatten().copied()),
            event.since,
        );
    }
    text.push_str("\n| Member | Form | Meaning | Since |\n|---|---|---|---|\n");
    for field in FIELDS {
        let _ = writeln!(text, "| `{}` | {} | {} | {} |", field.name, field.form.as_str(), field.meaning, field.since);
    }
    text
}

fn meaning(name: &str) -> &'static str {
    field(name).map_or("", |field| field.meaning)
}

const GATEWAY: &[&str] = &["gateway"];
const LINKED: &[&str] = &["gateway", "agent"];
const ALL: &[&str] = &["gateway", "agent", "proxy"];

/// What every record has.
const ALWAYS: &[&str] = &["time", "event", "side", "v", "seq", "prev"];

/// Who somebody is, and how that was proved.
const WHO: &[&str] = &[
    "organisation",
    "agent",
    "replica",
    "principal",
    "key",
    "ca",
    "serial",
    "key_id",
    "client_certificate",
    "token",
    "client",
];

/// What is known of a forward when it is asked for.
const ASKED: &[&str] = &["peer_forward", "asserted_by", "door", "rule", "resolved", "refused"];

const BYTES: &[&str] = &["to_target", "from_target"];

/// What happened, in order of how often it is asked for.
pub const EVENTS: &[Event] = &[
    Event {
        name: "forward.open",
        sides: ALL,
        meaning: "Permitted here and about to open; written before it opens.",
        always: &[&["forward", "target"]],
        maybe: &[WHO, ASKED],
        since: 1,
    },
    Event {
        name: "forward.progress",
        sides: ALL,
        meaning: "It still runs, and has carried so much so far.",
        always: &[&["forward", "target", "duration_ms"], BYTES],
        maybe: &[WHO, ASKED, &["dialled"]],
        since: 1,
    },
    Event {
        name: "forward.denied",
        sides: ALL,
        meaning: "Refused by policy. Alone: before it was opened. After its `forward.open`: by the other side, or by \
            what changed meanwhile.",
        always: &[&["forward", "target", "reason"]],
        maybe: &[WHO, ASKED, &["dialled", "duration_ms", "detail"]],
        since: 1,
    },
    Event {
        name: "forward.failed",
        sides: ALL,
        meaning: "Permitted, but something did not work.",
        always: &[&["forward", "target", "reason"]],
        maybe: &[WHO, ASKED, &["dialled", "duration_ms", "detail"]],
        since: 1,
    },
    Event {
        name: "forward.attempt",
        sides: GATEWAY,
        meaning: "One replica could not open it; another may have been asked. The forward's own end follows.",
        always: &[&["forward", "reason"]],
        maybe: &[WHO, &["target", "duration_ms", "detail", "peer_forward"]],
        since: 1,
    },
    Event {
        name: "forward.ended",
        sides: ALL,
        meaning: "It was open and has ended.",
        always: &[&["forward", "target", "reason", "duration_ms"], BYTES],
        maybe: &[WHO, ASKED, &["dialled", "detail"]],
        since: 1,
    },
    Event {
        name: "forward.abandoned",
        sides: ALL,
        meaning: "It ended without a proper end: the client left while it opened, the trail failed, or the process \
            died (written by the next start).",
        always: &[&["forward", "target", "reason"]],
        maybe: &[WHO, ASKED, BYTES, &["dialled", "duration_ms", "detail"]],
        since: 1,
    },
    Event {
        name: "link.up",
        sides: LINKED,
        meaning: "An agent and a gateway are linked.",
        always: &[],
        maybe: &[WHO, &["transport", "detail"]],
        since: 1,
    },
    Event {
        name: "link.down",
        sides: LINKED,
        meaning: "A link has ended.",
        always: &[&["reason"]],
        maybe: &[WHO, &["transport", "duration_ms", "detail"]],
        since: 1,
    },
    Event {
        name: "auth.accepted",
        sides: ALL,
        meaning: "A peer has proved who it is.",
        always: &[],
        maybe: &[WHO, &["door", "transport", "asserted_by", "target", "detail"]],
        since: 1,
    },
    Event {
        name: "auth.refused",
        sides: ALL,
        meaning: "A peer was not let in.",
        always: &[&["reason"]],
        maybe: &[WHO, &["door", "transport", "asserted_by", "target", "detail"]],
        since: 1,
    },
    Event {
        name: "auth.refused_more",
        sides: ALL,
        meaning: "Refusals beyond the number that gets records of their own, counted by reason.",
        always: &[&["counts", "duration_ms"]],
        maybe: &[],
        since: 1,
    },
    Event {
        name: "peer.violation",
        sides: LINKED,
        meaning: "A peer asked for something that it never may.",
        always: &[&["reason"]],
        maybe: &[WHO, &["door", "transport", "target", "detail", "counts"]],
        since: 1,
    },
    Event {
        name: "registry.reloaded",
        sides: GATEWAY,
        meaning: "A new state of the registry is in force.",
        always: &[],
        maybe: &[&["detail", "changes"]],
        since: 1,
    },
    Event {
        name: "registry.rejected",
        sides: GATEWAY,
        meaning: "A new state of the registry has faults, and the last good one stays in force.",
        always: &[],
        maybe: &[&["detail"]],
        since: 1,
    },
    Event {
        name: "config.reloaded",
        sides: ALL,
        meaning: "The configuration was read again and is in force.",
        always: &[],
        maybe: &[&["detail", "changes"]],
        since: 1,
    },
    Event {
        name: "config.rejected",
        sides: ALL,
        meaning: "The configuration was read again and has faults, or cannot be taken over; nothing has changed.",
        always: &[],
        maybe: &[&["detail"]],
        since: 1,
    },
    Event {
        name: "agent.examined",
        sides: LINKED,
        meaning: "An agent was looked at by `caponier doctor`: by its owner, whom the gateway let in and who wanted no link, or \
                  over its link; the detail says which, and at the gateway how many targets are in order.",
        always: &[&["organisation", "agent"]],
        maybe: &[&["replica", "key", "client", "detail"]],
        since: 1,
    },
    Event {
        name: "agent.examination_asked",
        sides: GATEWAY,
        meaning: "Somebody at the admin socket has an agent asked over its link what it finds at its targets; what came of it is \
                  `agent.examined` or `agent.examination_failed`.",
        always: &[&["organisation", "agent"]],
        maybe: &[&["replica", "key", "detail"]],
        since: 1,
    },
    Event {
        name: "agent.examination_failed",
        sides: GATEWAY,
        meaning: "An agent that was asked over its link gave no report: `empty`, `nonsense`, `too_long`, `nothing_examined`, \
                  `silent`, `link_lost`, `busy`, or `given_up` because whoever asked had gone.",
        always: &[&["organisation", "agent", "reason"]],
        maybe: &[&["replica", "key", "detail"]],
        since: 1,
    },
    Event {
        name: "drain.began",
        sides: ALL,
        meaning: "Nothing new is taken on; `counts` says what there is.",
        always: &[],
        maybe: &[&["counts", "reason", "detail"]],
        since: 1,
    },
    Event {
        name: "drain.ended",
        sides: ALL,
        meaning: "`counts` says how many forwards `ended` by themselves, and how many were `cut`.",
        always: &[],
        maybe: &[&["counts", "reason", "detail", "duration_ms"]],
        since: 1,
    },
    Event {
        name: "trail.started",
        sides: ALL,
        meaning: "A process begins to write.",
        always: &[&["version", "pid"]],
        maybe: &[&["trail"]],
        since: 1,
    },
    Event {
        name: "trail.continued",
        sides: ALL,
        meaning: "The first record of a file after a rotation; the chain goes on.",
        always: &[&["trail"]],
        maybe: &[&["file_seq", "sink", "forwards", "open_from"]],
        since: 1,
    },
    Event {
        name: "trail.stopped",
        sides: ALL,
        meaning: "The process has ended the trail. Without it, it died.",
        always: &[&["forwards", "reason"]],
        maybe: &[&["trail"]],
        since: 1,
    },
    Event {
        name: "trail.recovered",
        sides: ALL,
        meaning: "What an earlier process left has been put in order.",
        always: &[&["forwards"]],
        maybe: &[&["sink", "torn_at", "torn", "unreadable", "unreadable_at"]],
        since: 1,
    },
    Event {
        name: "trail.resumed",
        sides: ALL,
        meaning: "A required sink failed for a while and works again.",
        always: &[&["duration_ms", "lost"]],
        maybe: &[&["sink"]],
        since: 1,
    },
    Event {
        name: "trail.head",
        sides: ALL,
        meaning: "The chain up to here, signed where there is a key for that.",
        always: &[&["trail", "covers", "head"]],
        maybe: &[&["key", "signature", "head_records", "head_s"]],
        since: 1,
    },
    Event {
        name: "trail.anchored",
        sides: LINKED,
        meaning: "The other side's head was seen here and countersigned.",
        always: &[&["peer_trail", "peer_digest"]],
        maybe: &[&["organisation", "agent", "replica", "detail", "key", "signature"]],
        since: 1,
    },
    Event {
        name: "trail.countersigned",
        sides: LINKED,
        meaning: "The other side has countersigned a head of this trail.",
        always: &[&["covers", "digest", "signed", "key", "signature"]],
        maybe: &[&["organisation", "agent", "replica", "detail", "trail"]],
        since: 1,
    },
    Event {
        name: "sink.failed",
        sides: ALL,
        meaning: "A sink that is not required does not take records; what it will never get is counted.",
        always: &[&["sink"]],
        maybe: &[&["reason", "detail"]],
        since: 1,
    },
    Event {
        name: "sink.works",
        sides: ALL,
        meaning: "It takes them again.",
        always: &[&["sink"]],
        maybe: &[&["lost", "duration_ms", "detail"]],
        since: 1,
    },
];

const fn of(name: &'static str, form: Form, meaning: &'static str) -> Field {
    Field { name, form, meaning, since: 1 }
}

/// The members, in the order in which records have them.
pub const FIELDS: &[Field] = &[
    of("v", Form::Number, "The number of the schema."),
    of("time", Form::Time, "When, by the clock of whoever wrote it."),
    of("event", Form::Text, "What happened."),
    of("side", Form::Word, "Whose trail this is: `gateway`, `agent` or `proxy`."),
    of("forward", Form::Text, "This side's id of the forward."),
    of(
        "peer_forward",
        Form::Text,
        "The other side's id of it. The agent's is the gateway's `forward`: join the two trails on it.",
    ),
    of("organisation", Form::Text, "Whose agent."),
    of("agent", Form::Text, "Which agent."),
    of("replica", Form::Text, "Which of its processes."),
    of("principal", Form::Text, "On whose behalf."),
    of(
        "asserted_by",
        Form::Text,
        "On whose word the principal rests, where that is not its own key: a key's fingerprint, or a loopback door.",
    ),
    of(
        "key",
        Form::Text,
        "The fingerprint of the key that was shown: at a gateway of who logged in, at an agent of the gateway's \
            login key; of a head, of what signed it.",
    ),
    of("ca", Form::Text, "The fingerprint of the authority of the key's certificate."),
    of("serial", Form::Text, "The number of that certificate."),
    of("key_id", Form::Text, "The key id of that certificate."),
    of("client_certificate", Form::Text, "The fingerprint of the peer's TLS certificate, or `missing`."),
    of("transport", Form::Text, "What carries the SSH session: `ssh`, `tls`, `wss` or `ws`."),
    of("token", Form::Text, "The id (`jti`) of the token that was shown, never the token; `key` has then signed it."),
    of("client", Form::Text, "Where the peer connects from."),
    of(
        "door",
        Form::Text,
        "The way in: `ssh`, `connect` or `local` at a gateway, `listen` at an agent, the mode at a network proxy.",
    ),
    of("target", Form::Text, "The host and port asked for."),
    of("rule", Form::Text, "The rule that decided."),
    of("resolved", Form::Addresses, "What the target's name resolved to; of a service its instances with their ports."),
    of("refused", Form::Addresses, "Which of these the rule does not permit."),
    of("dialled", Form::Text, "The address that was dialled."),
    of("to_target", Form::Bytes, "Carried toward the target."),
    of("from_target", Form::Bytes, "Carried from the target."),
    of("duration_ms", Form::Milliseconds, "How long it lasted."),
    of("reason", Form::Word, "Why, in one word for programs."),
    of("detail", Form::Text, "More about it, in a sentence for people."),
    of("changes", Form::Changes, "What came, went and changed, by id."),
    of("counts", Form::Counts, "How many of what."),
    of("trail", Form::TrailId, "The id of the trail."),
    of("file_seq", Form::Number, "Which file of the trail this is."),
    of("version", Form::Text, "The version of the program that writes."),
    of("pid", Form::Number, "The process that writes."),
    of(
        "forwards",
        Form::Number,
        "`trail.recovered`: forwards that were closed. `trail.stopped`: forwards that were not. \
            `trail.continued`: forwards that are open.",
    ),
    of("open_from", Form::Number, "The `seq` of the earliest record that tells of a forward which is open."),
    of("torn_at", Form::Bytes, "Where an unfinished last line begins, from the file's beginning."),
    of("torn", Form::Digest, "The digest of that line, without the newline that was added."),
    of("unreadable", Form::Number, "Lines since the last start that are no records."),
    of("unreadable_at", Form::Bytes, "Where the first of these begins."),
    of(
        "lost",
        Form::Number,
        "`trail.resumed`: records that were not accepted, for things that therefore did not happen. `sink.works`: \
            records of the trail that this sink never got.",
    ),
    of("sink", Form::Text, "The name of the sink."),
    of("covers", Form::Number, "The `seq` of the last record that the head covers."),
    of("head", Form::Digest, "The digest of that record's line."),
    of("digest", Form::Digest, "The digest of the head that was countersigned."),
    of("head_records", Form::Number, "After how many records there is another head at the latest."),
    of("head_s", Form::Number, "After how many seconds there is another head, if there is anything new."),
    of("signed", Form::Time, "When the other side has signed, by its clock."),
    of("peer_trail", Form::TrailId, "The id of the other side's trail."),
    of("peer_digest", Form::Digest, "The digest of the other side's head."),
    of("signature", Form::Base64, "The SSH signature (SSHSIG, namespace `audit@caponier`)."),
    of(
        "seq",
        Form::Number,
        "The record's place in the trail, from 0 without a gap. Alone it is no key: a collector that gets a record again \
         knows it by the trail's id (`trail`), `seq` and `prev` together.",
    ),
    of(
        "prev",
        Form::Digest,
        "The digest of the line before, its newline included. The same `seq` with another `prev` is no repeat, but a record \
         of another trail, or of a forged one.",
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    fn sources() -> String {
        fn walk(path: &Path, all: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(path).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    walk(&path, all);
                } else if path.extension().is_some_and(|end| end == "rs") && !path.ends_with("schema.rs") {
                    all.push(path);
                }
            }
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut all = vec![root.join("audit.rs")];
        walk(&root.join("audit"), &mut all);
        all.iter().map(|path| fs::read_to_string(path).expect("a source")).collect()
    }

    #[test]
    fn every_field_of_a_record_stands_in_the_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/audit/record.rs");
        let sources = fs::read_to_string(path).expect("a source");
        let (_, body) = sources.split_once("struct Record {\n").expect("the struct Record");
        let (body, _) = body.split_once("\n}").expect("its end");
        let mut fields = 0;
        for line in body.lines().map(str::trim) {
            if line.starts_with("//") || line.starts_with('#') {
                continue;
            }
            let Some((name, _)) = line.split_once(": ") else { continue };
            let name = name.rsplit(' ').next().expect("a name");
            assert!(field(name).is_some(), "the field {name} of Record is not in the schema");
            fields += 1;
        }
        assert!(fields > 30, "{fields}");
    }

    #[test]
    fn every_event_stands_in_the_table() {
        let sources = sources();
        let families: BTreeSet<&str> =
            EVENTS.iter().map(|event| event.name.split_once('.').expect("a dot").0).collect();
        let mut found = BTreeSet::new();
        for literal in sources.split('"') {
            let Some((family, rest)) = literal.split_once('.') else { continue };
            let word = !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            if families.contains(family) && word && !matches!(rest, "jsonl" | "json" | "pipe" | "rs") {
                assert!(event(literal).is_some(), "the event {literal} is not in the schema");
                found.insert(literal);
            }
        }
        assert!(found.len() > 20, "{found:?}");
    }

    #[test]
    fn the_table_is_sound() {
        for (at, field) in FIELDS.iter().enumerate() {
            assert!(FIELDS[at + 1..].iter().all(|other| other.name != field.name), "{} stands twice", field.name);
            assert!(field.meaning.ends_with('.'), "{}: a sentence is wanted", field.name);
            assert!(
                EVENTS.iter().any(|event| event.may().any(|name| name == field.name)),
                "{} is of no event",
                field.name
            );
        }
        for (at, event) in EVENTS.iter().enumerate() {
            assert!(EVENTS[at + 1..].iter().all(|other| other.name != event.name), "{} stands twice", event.name);
            let mut seen = BTreeSet::new();
            for name in event.may() {
                assert!(field(name).is_some(), "{}: there is no field {name}", event.name);
                assert!(seen.insert(name), "{}: {name} stands twice", event.name);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let good = json!({
            "v": 1, "time": "2026-11-21T20:00:00.123Z", "event": "trail.started", "side": "agent",
            "version": "0.1.0", "pid": 7, "seq": 0, "prev": "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU",
        });
        assert_eq!(check(&good), Ok(()));
        for (name, change, report) in [
            ("another event", json!({"event": "trail_begun"}), "there is no event"),
            ("another side", json!({"side": "client"}), "not an event of the side"),
            ("another version", json!({"v": 2}), "another version"),
            ("a member too many", json!({"target": "db:5432"}), "target does not belong there"),
            ("a text for a number", json!({"pid": "7"}), "pid is no number"),
            ("a negative number", json!({"pid": -7}), "pid is no number"),
            ("no UTC", json!({"time": "2026-11-21T20:00:00.123+01"}), "time is no time"),
            ("no milliseconds", json!({"time": "2026-11-21T20:00:00Z"}), "time is no time"),
            ("half a digest", json!({"prev": "47DEQ"}), "prev is no SHA-256"),
            ("an empty text", json!({"version": ""}), "version is no text"),
        ] {
            let mut record = good.clone();
            for (key, value) in change.as_object().expect("an object") {
                record[key] = value.clone();
            }
            let error = check(&record).expect_err(name);
            assert!(error.contains(report), "{name}: {error}");
        }
        for missing in ["event", "pid", "time", "side"] {
            let mut record = good.clone();
            record.as_object_mut().expect("an object").remove(missing);
            assert!(check(&record).is_err(), "{missing}");
        }
    }

    #[test]
    fn both_forms_name_everything() {
        let schema = json_schema();
        let markdown = markdown();
        assert_eq!(schema["oneOf"].as_array().map(Vec::len), Some(EVENTS.len()));
        for field in FIELDS {
            assert!(schema["$defs"].get(field.name).is_some());
            assert!(markdown.contains(&format!("| `{}` |", field.name)));
        }
        assert!(EVENTS.iter().all(|event| markdown.contains(&format!("| `{}` |", event.name))));
    }
}

//! The record: one line of a trail, and what bounds its texts.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};

use super::changed::Changed;
use super::forward::Resolved;
use crate::identity::Certificate;
use crate::limits::TRAIL_TEXT_MAX;

/// Who writes the trail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The gateway.
    Gateway,
    /// The agent.
    Agent,
    /// The network proxy, which belongs to neither.
    Proxy,
}

impl Side {
    /// The side as records name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Agent => "agent",
            Self::Proxy => "proxy",
        }
    }
}

/// The number of the schema: it stands for what the members of a record mean.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Version;

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(1)
    }
}

/// One line of the trail. Field names and order are what readers of trails rely on. Read back, it yields the particulars
/// of a forward; time, event and side are then the reader's own.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(skip_deserializing)]
    pub(super) v: Version,
    #[serde(skip_deserializing)]
    pub(super) time: String,
    #[serde(skip_deserializing)]
    pub(super) event: &'static str,
    #[serde(skip_deserializing)]
    pub(super) side: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) forward: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) peer_forward: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) organisation: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) agent: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) replica: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) principal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) asserted_by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key: Option<String>,
    /// The CA of the key's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ca: Option<String>,
    /// A text, since readers of JSON commonly lose the last digits of such numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key_id: Option<String>,
    /// The fingerprint of the peer's TLS certificate, or `missing`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) client_certificate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) transport: Option<String>,
    /// The id that a token gives itself (`jti`), never the token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) client: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) door: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rule: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub(super) resolved: Vec<Resolved>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub(super) refused: Vec<Resolved>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dialled: Option<String>,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) to_target: Option<u64>,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) from_target: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) duration_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) detail: Option<String>,
    /// `registry.reloaded`, `config.reloaded`: what came, went and changed, by ids and fingerprints.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) changes: Option<Changed>,
    /// `auth.refused_more`: how many of each reason. `drain.began`, `drain.ended`: how many of what.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", skip_deserializing)]
    pub(super) counts: BTreeMap<&'static str, u64>,
    /// The trail's id.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) trail: Option<String>,
    /// `trail.started`: what writes.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) version: Option<&'static str>,
    /// `trail.started`: which process.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) pid: Option<u32>,
    /// `trail.recovered`: how many forwards were closed. `trail.stopped`: how many were not.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) forwards: Option<u64>,
    /// `trail.continued`: the number of the earliest record that tells of a forward which is open.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) open_from: Option<u64>,
    /// `trail.recovered`: where an unfinished last line begins, in bytes from the file's beginning.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) torn_at: Option<u64>,
    /// `trail.recovered`: the digest of what an unfinished last line was, where it was not a whole record but for its newline.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) torn: Option<String>,
    /// `trail.recovered`: lines since the last start that are no records.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) unreadable: Option<u64>,
    /// `trail.recovered`: where the first of these begins.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) unreadable_at: Option<u64>,
    /// `trail.resumed`: records that were not accepted while the sink failed. `sink.works`: records that the sink never gets.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) lost: Option<u64>,
    /// Which sink it is about.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) sink: Option<String>,
    /// `trail.head`, `trail.countersigned`: the number of the last record before the head.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) covers: Option<u64>,
    /// `trail.head`: the digest of that record's line.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) head: Option<String>,
    /// `trail.head`: after how many records there is another at the latest.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) head_records: Option<u64>,
    /// `trail.head`: after how many seconds there is another, if there is anything new.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) head_s: Option<u64>,
    /// `trail.countersigned`: the digest of that head.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) digest: Option<String>,
    /// `trail.countersigned`: when, by the other side's clock.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) signed: Option<String>,
    /// `trail.anchored`: which trail of the other side's.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) peer_trail: Option<String>,
    /// `trail.anchored`: the digest of its head.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) peer_digest: Option<String>,
    /// The signature by `key`, in base64.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub(super) signature: Option<String>,
}

impl Record {
    /// A record of the trail about itself.
    pub(super) fn own(side: Side, event: &'static str) -> Self {
        Self { time: now(), event, side: side.as_str(), ..Self::default() }
    }

    pub(super) fn certified(&mut self, certificate: &Certificate) {
        self.ca = text(certificate.authority().fingerprint());
        self.serial = text(certificate.serial());
        self.key_id = text(certificate.key_id());
    }

    /// The line, with its newline.
    pub(super) fn line(&self) -> Vec<u8> {
        // Strings, numbers and maps with string keys always serialise.
        let mut line = serde_json::to_vec(self).expect("a record always serialises");
        line.push(b'\n');
        line
    }
}

pub(super) fn now() -> String {
    format!("{:.3}", jiff::Timestamp::now())
}

/// The time of a record as it stands in its line. Such texts have the order of the times.
pub(super) fn time_of(line: &[u8]) -> Option<&[u8]> {
    let time = line.strip_prefix(b"{\"v\":1,\"time\":\"")?.get(..TIME_LEN)?;
    time.ends_with(b"Z").then_some(time)
}

/// A time of a line in milliseconds of Unix time.
pub(super) fn moment(time: &[u8]) -> Option<i64> {
    let time: jiff::Timestamp = std::str::from_utf8(time).ok()?.parse().ok()?;
    Some(time.as_millisecond())
}

/// The event of a record as it stands in its line.
pub(super) fn event_of(line: &[u8]) -> Option<&str> {
    let rest = line.get(EVENT_AT..)?.strip_prefix(b",\"event\":\"")?;
    let end = rest.iter().position(|byte| *byte == b'"')?;
    std::str::from_utf8(&rest[..end]).ok()
}

/// Characters of a time: `2026-11-21T20:00:00.000Z`.
const TIME_LEN: usize = 24;

/// Where what follows the time begins.
const EVENT_AT: usize = 15 + TIME_LEN + 1;

pub(super) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A text for a record: at most [`TRAIL_TEXT_MAX`] bytes, nothing in it that acts on a terminal and that JSON would let
/// pass, and absent if empty.
pub(super) fn text(value: impl fmt::Display) -> Option<String> {
    let mut bounded = Bounded(String::new());
    // An error only says that the bound was reached.
    let _ = fmt::write(&mut bounded, format_args!("{value}"));
    (!bounded.0.is_empty()).then_some(bounded.0)
}

/// Takes text up to the bound, so that a longer one is never held.
struct Bounded(String);

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let character = if unsafe_to_show(character) { char::REPLACEMENT_CHARACTER } else { character };
            if self.0.len() + character.len_utf8() > TRAIL_TEXT_MAX {
                return Err(fmt::Error);
            }
            self.0.push(character);
        }
        Ok(())
    }
}

/// Characters that JSON does not escape and that change how a terminal shows what follows: DEL, the C1 controls, and
/// those that turn the direction of text.
pub(super) fn unsafe_to_show(character: char) -> bool {
    matches!(character, '\u{7f}'..='\u{9f}' | '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

pub(super) const OPEN: &str = "forward.open";
pub(super) const DENIED: &str = "forward.denied";
pub(super) const FAILED: &str = "forward.failed";
pub(super) const ABANDONED: &str = "forward.abandoned";
pub(super) const ENDED: &str = "forward.ended";
pub(super) const STRANGERS: &str = "auth.refused_more";
pub(super) const STARTED: &str = "trail.started";
pub(super) const STOPPED: &str = "trail.stopped";
pub(super) const RECOVERED: &str = "trail.recovered";
pub(super) const RESUMED: &str = "trail.resumed";
pub(super) const CONTINUED: &str = "trail.continued";
pub(super) const HEAD: &str = "trail.head";
pub(super) const PROGRESS: &str = "forward.progress";
pub(super) const SINK_FAILED: &str = "sink.failed";
pub(super) const SINK_WORKS: &str = "sink.works";

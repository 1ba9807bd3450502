//! The members of records that say something about the trail itself.

use std::borrow::Cow;

use serde::Deserialize;

/// What is read of such a record. The rest is passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Fields<'a> {
    #[serde(borrow)]
    pub(super) time: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) side: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) organisation: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) agent: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) replica: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) detail: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) trail: Option<Cow<'a, str>>,
    pub(super) covers: Option<u64>,
    #[serde(borrow)]
    pub(super) head: Option<Cow<'a, str>>,
    pub(super) head_records: Option<u64>,
    pub(super) head_s: Option<u64>,
    #[serde(borrow)]
    pub(super) digest: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) signed: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) key: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) signature: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) peer_digest: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) peer_trail: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) torn: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) sink: Option<Cow<'a, str>>,
    pub(super) lost: Option<u64>,
}

/// What a record's event is, without reading the record: the first members are always the same ones, and none before it can
/// hold this text.
pub(super) fn event(line: &[u8]) -> Option<&[u8]> {
    let start = &line[..line.len().min(EVENT_WITHIN)];
    let at = memchr::memmem::find(start, EVENT)? + EVENT.len();
    let rest = &line[at..];
    Some(&rest[..memchr::memchr(b'"', rest)?])
}

/// A record's time as it stands there, if it stands where it always does.
pub(super) fn time(line: &[u8]) -> Option<[u8; TIME_LEN]> {
    let start = &line[..line.len().min(EVENT_WITHIN)];
    let at = memchr::memmem::find(start, TIME)? + TIME.len();
    start.get(at..at + TIME_LEN)?.try_into().ok()
}

/// The moment that such a time means, in milliseconds of Unix time.
pub(super) fn milliseconds(time: &str) -> Option<u64> {
    u64::try_from(time.parse::<jiff::Timestamp>().ok()?.as_millisecond()).ok()
}

/// Characters of a time with its milliseconds.
pub(super) const TIME_LEN: usize = "2026-11-21T20:00:00.123Z".len();

const EVENT: &[u8] = b"\"event\":\"";

const TIME: &[u8] = b"\"time\":\"";

/// By where a record has told its event.
const EVENT_WITHIN: usize = 96;

//! A record as readers see it: the members that questions are asked about.

use std::net::SocketAddr;

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

/// What is read of a record. A member that is not a record's own is left alone; one that stands twice, or has another form
/// than it should, makes the line unreadable, since programs would differ over what it says.
#[derive(Debug, Clone, Deserialize)]
pub struct Record {
    /// When.
    #[serde(deserialize_with = "moment")]
    pub time: Timestamp,
    /// What happened.
    pub event: String,
    /// Whose trail it stands in.
    pub side: String,
    /// This side's id of the forward.
    pub forward: Option<String>,
    /// The other side's.
    pub peer_forward: Option<String>,
    /// Whose agent.
    pub organisation: Option<String>,
    /// Which agent.
    pub agent: Option<String>,
    /// Which of its processes.
    pub replica: Option<String>,
    /// On whose behalf.
    pub principal: Option<String>,
    /// On whose word.
    pub asserted_by: Option<String>,
    /// The key that was shown.
    pub key: Option<String>,
    /// The authority of its certificate.
    pub ca: Option<String>,
    /// The TLS certificate that was shown.
    pub client_certificate: Option<String>,
    /// Where the peer connects from.
    pub client: Option<String>,
    /// The way in.
    pub door: Option<String>,
    /// What was asked for.
    pub target: Option<String>,
    /// The rule that decided.
    pub rule: Option<String>,
    /// The address that was dialled.
    pub dialled: Option<String>,
    /// Bytes toward the target.
    pub to_target: Option<u64>,
    /// Bytes from it.
    pub from_target: Option<u64>,
    /// How long it lasted.
    pub duration_ms: Option<u64>,
    /// Why, in a word.
    pub reason: Option<String>,
    /// Why, in a sentence.
    pub detail: Option<String>,
}

impl Record {
    /// Reads a line; `None` if it is no record.
    #[must_use]
    pub fn read(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok()
    }

    /// The host that was asked for, without its port.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        let target = self.target.as_deref()?;
        match target.rsplit_once(':') {
            // The brackets of an IPv6 address are its form in a target, not a part of it.
            Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host))
            }
            _ => Some(target),
        }
    }

    /// The address that the peer connects from, without its port.
    #[must_use]
    pub fn client_address(&self) -> Option<String> {
        let client = self.client.as_deref()?;
        Some(client.parse::<SocketAddr>().map_or_else(|_| client.to_owned(), |address| address.ip().to_string()))
    }
}

fn moment<'de, D: Deserializer<'de>>(text: D) -> Result<Timestamp, D::Error> {
    String::deserialize(text)?.parse().map_err(D::Error::custom)
}

/// The time of a line, in milliseconds since 1970, where it stands in the place and form that the program gives it; else
/// `None`. Not a check: whoever has the time of a record from here still has to read the record.
pub(super) fn time_of(line: &[u8]) -> Option<i64> {
    // After `{"v":1,`, or at the very beginning.
    let rest = match line.strip_prefix(b"{\"v\":") {
        Some(rest) => {
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            rest.get(digits..)?.strip_prefix(b",")?
        }
        None => line.strip_prefix(b"{")?,
    };
    let text = rest.strip_prefix(b"\"time\":\"")?.get(..TIME_LEN + 1)?.strip_suffix(b"\"")?;
    let time: Timestamp = std::str::from_utf8(text).ok()?.parse().ok()?;
    Some(time.as_millisecond())
}

/// `2026-11-21T20:00:00.123Z`
const TIME_LEN: usize = 24;

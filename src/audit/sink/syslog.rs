//! The sink `syslog`: one message (RFC 5424) per record over TCP or TLS, framed by octet counting (RFC 6587, RFC 5425).
//!
//! Promised: the text of a message is the record's line without its newline, byte for byte, so that a collector that keeps
//! it can verify the chain. There is no byte order mark before it: RFC 5424 lets it be left out, and what reads JSON does not
//! expect one. Structured data is left empty. Over TLS the collector's certificate is verified for the host that is dialled.
//!
//! **What "written" means here:** syslog has no acknowledgement. A record counts as written when the system has taken it for
//! a connection that the collector had not closed. What lies in buffers when a collector dies is lost without a word, and
//! shows as a gap in `seq`; the sink `https` is the one that knows.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use super::deliver::{Collector, Failure, Most, Place, Portion, Way, deliver};
use super::{Batches, Means, Progress, Stream};
use crate::limits::{SYSLOG_PORTION, SYSLOG_RECORDS, TRAIL_RECORD_MAX};

/// Where it is, and how it is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where it is, and how it is reached.
    pub place: Place,
    /// What kind of program its messages say they are from.
    pub facility: Facility,
    /// The host that its messages say they are from; the system's own name, where it does not say.
    pub hostname: Option<Hostname>,
}

/// What kind of program a message is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facility(u8);

/// The facilities by their names, which configurations use; those that are a kernel's or another program's are left out.
const FACILITIES: &[(&str, u8)] = &[
    ("user", 1),
    ("daemon", 3),
    ("auth", 4),
    ("authpriv", 10),
    ("audit", 13),
    ("alert", 14),
    ("local0", 16),
    ("local1", 17),
    ("local2", 18),
    ("local3", 19),
    ("local4", 20),
    ("local5", 21),
    ("local6", 22),
    ("local7", 23),
];

impl Facility {
    /// All names, for whoever has given another.
    #[must_use]
    pub fn names() -> String {
        FACILITIES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    }
}

impl Default for Facility {
    fn default() -> Self {
        Self(13)
    }
}

/// Not the name of a facility.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is no facility; choose one of {}", Facility::names())]
pub struct FacilityError;

impl std::str::FromStr for Facility {
    type Err = FacilityError;

    fn from_str(text: &str) -> Result<Self, FacilityError> {
        let known = FACILITIES.iter().find(|(name, _)| *name == text);
        known.map(|(_, number)| Self(*number)).ok_or(FacilityError)
    }
}

/// The name of a host, as messages can have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hostname(String);

/// Not the name of a host.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a host name is at most 255 printable characters of ASCII, and no spaces")]
pub struct HostnameError;

impl std::str::FromStr for Hostname {
    type Err = HostnameError;

    fn from_str(text: &str) -> Result<Self, HostnameError> {
        let fits = !text.is_empty() && text.len() <= 255 && text.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Self(text.to_owned())).ok_or(HostnameError)
    }
}

/// Sends what there is until there will be no more, or `stop` fires.
pub async fn run(config: Config, batches: Batches, progress: Progress, means: Means, stop: CancellationToken) {
    let framer = Framer::new(&config);
    // It takes everything, or is not there: whether it is required changes nothing here.
    deliver(Syslog { way: Way::new(config.place, &means), framer }, batches, progress, true, stop).await;
}

struct Syslog {
    way: Way,
    framer: Framer,
}

impl Collector for Syslog {
    type Session = Box<dyn Stream>;

    fn most(&self) -> Most {
        Most { records: SYSLOG_RECORDS, bytes: SYSLOG_PORTION, linger: Duration::ZERO }
    }

    async fn open(&self) -> Result<Self::Session, Failure> {
        self.way.reach().await
    }

    async fn send(&self, session: &mut Self::Session, portion: &Portion) -> Result<(), Failure> {
        let mut frames = Vec::with_capacity(portion.len() + portion.len() / 2);
        for line in portion.lines() {
            self.framer.frame(line, &mut frames);
        }
        let lost = |error: std::io::Error| Failure::new("connection_lost", error);
        session.write_all(&frames).await.map_err(lost)?;
        session.flush().await.map_err(lost)
    }

    async fn over(session: &mut Self::Session) {
        // A collector has nothing to say; what it says all the same is of no meaning here.
        let mut ignored = [0; 512];
        while session.read(&mut ignored).await.is_ok_and(|count| count > 0) {}
    }

    async fn close(mut session: Self::Session) {
        // Until the other end has hung up too: what it has not read yet would be thrown away with the connection.
        if session.shutdown().await.is_ok() {
            Self::over(&mut session).await;
        }
    }
}

/// Makes messages of records.
struct Framer {
    facility: u8,
    /// What stands between the time and the name of the event.
    origin: String,
}

/// What a message says of its record.
#[derive(Deserialize)]
struct Head<'a> {
    time: &'a str,
    event: &'a str,
}

impl Framer {
    fn new(config: &Config) -> Self {
        let own = || {
            let system = rustix::system::uname();
            system.nodename().to_str().ok().and_then(|name| name.parse().ok())
        };
        let host = config.hostname.clone().or_else(own);
        let host = host.as_ref().map_or("-", |host| host.0.as_str());
        Self { facility: config.facility.0, origin: format!("{host} caponier {}", std::process::id()) }
    }

    /// Appends the frame of one line, which may have its newline.
    fn frame(&self, line: &[u8], frames: &mut Vec<u8>) {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        debug_assert!(line.len() < TRAIL_RECORD_MAX, "a record");
        // Times and names of events hold nothing that JSON escapes; should one all the same, the message goes without.
        let head = serde_json::from_slice(line).unwrap_or(Head { time: "-", event: "-" });
        let fits = |text: &str, most| {
            !text.is_empty() && text.len() <= most && text.bytes().all(|byte| byte.is_ascii_graphic())
        };
        let time = if fits(head.time, 64) { head.time } else { "-" };
        let event = if fits(head.event, 32) { head.event } else { "-" };
        let priority = u16::from(self.facility) * 8 + u16::from(severity(event));
        let mut header = String::with_capacity(128);
        // Writing to a text does not fail.
        let _ = write!(header, "<{priority}>1 {time} {} {event} - ", self.origin);
        frames.extend_from_slice((header.len() + line.len()).to_string().as_bytes());
        frames.push(b' ');
        frames.extend_from_slice(header.as_bytes());
        frames.extend_from_slice(line);
    }
}

/// How urgent an event is: what an operator should look at is an error or a warning, what changes who may do what a notice.
fn severity(event: &str) -> u8 {
    match event {
        "sink.failed" | "trail.resumed" | "registry.rejected" | "config.rejected" => ERROR,
        "forward.denied" | "forward.failed" | "forward.abandoned" | "auth.refused" | "auth.refused_more"
        | "peer.violation" | "trail.recovered" | "sink.works" => WARNING,
        "link.down" | "registry.reloaded" | "config.reloaded" | "drain.began" | "drain.ended" | "trail.started"
        | "trail.stopped" => NOTICE,
        _ => INFORMATIONAL,
    }
}

const ERROR: u8 = 3;
const WARNING: u8 = 4;
const NOTICE: u8 = 5;
const INFORMATIONAL: u8 = 6;

#[cfg(test)]
mod tests;

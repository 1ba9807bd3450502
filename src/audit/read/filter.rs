//! What is asked of a trail.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use jiff::Timestamp;
use memchr::memmem::Finder;

use super::record::{Record, time_of};
use crate::identity::glob;

/// What became of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// A forward that policy permitted, whatever became of it.
    Allowed,
    /// A forward that is open where the trail ends.
    Open,
    /// A forward that was open and has ended.
    Ended,
    /// A forward that policy refused.
    Denied,
    /// A forward that was permitted and did not work.
    Failed,
    /// A forward that ended without a proper end.
    Abandoned,
    /// A login that was refused.
    Refused,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Allowed, Self::Open, Self::Ended, Self::Denied, Self::Failed, Self::Abandoned, Self::Refused];

    /// The outcome that a record tells of by itself.
    #[must_use]
    pub fn of(event: &str) -> Option<Self> {
        Some(match event {
            "forward.open" | "forward.progress" => Self::Open,
            "forward.ended" => Self::Ended,
            "forward.denied" => Self::Denied,
            "forward.failed" => Self::Failed,
            "forward.abandoned" => Self::Abandoned,
            "auth.refused" => Self::Refused,
            _ => return None,
        })
    }

    /// Whether this is what was asked for.
    #[must_use]
    pub fn is(self, asked: Self) -> bool {
        self == asked
            || (asked == Self::Allowed && matches!(self, Self::Open | Self::Ended | Self::Failed | Self::Abandoned))
    }

    /// The outcome in a word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Open => "open",
            Self::Ended => "ended",
            Self::Denied => "denied",
            Self::Failed => "failed",
            Self::Abandoned => "abandoned",
            Self::Refused => "refused",
        }
    }
}

impl FromStr for Outcome {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|outcome| outcome.as_str() == text).ok_or_else(|| {
            let all = Self::ALL.map(Self::as_str).join(", ");
            format!("one of these is wanted: {all}")
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which records are wanted: those that meet every demand. Without one, all.
#[derive(Debug, Default)]
pub struct Filter {
    window: Option<Range<i64>>,
    demands: Vec<Demand>,
    outcomes: Vec<Outcome>,
    /// Texts of which every wanted line holds each.
    needles: Vec<Finder<'static>>,
}

#[derive(Debug)]
struct Demand {
    what: What,
    /// Lower case, for a target.
    pattern: String,
}

/// What a record can be chosen by. A pattern stands for itself, with `*` for any run of characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// The principal.
    Principal,
    /// The organisation.
    Organisation,
    /// The agent; `ORGANISATION/AGENT` where the pattern has a `/`.
    Agent,
    /// The host asked for, or host and port; case does not matter.
    Target,
    /// The event.
    Event,
    /// Whose trail it is.
    Side,
    /// The forward, by either side's id of it.
    Forward,
    /// A key's fingerprint: of what was shown, of who asserted the principal, of the CA, or of the TLS certificate.
    Key,
    /// The peer's address.
    Client,
    /// The reason.
    Reason,
}

impl Filter {
    /// Wants what is not before `since` and before `until`.
    #[must_use]
    pub fn between(mut self, since: Option<Timestamp>, until: Option<Timestamp>) -> Self {
        let ms = |time: Option<Timestamp>| time.map(|time| time.as_millisecond());
        if since.is_some() || until.is_some() {
            self.window = Some(ms(since).unwrap_or(i64::MIN)..ms(until).unwrap_or(i64::MAX));
        }
        self
    }

    /// Wants what fits a pattern.
    #[must_use]
    pub fn demand(mut self, what: What, pattern: &str) -> Self {
        let needles = match what {
            What::Principal | What::Organisation | What::Event | What::Forward | What::Key | What::Reason => {
                vec![pattern]
            }
            What::Agent => pattern.splitn(2, '/').collect(),
            // Asked for in another form than it stands there: in any case, without its port, or in every line.
            What::Target | What::Client | What::Side => Vec::new(),
        };
        for needle in needles {
            // The line can be searched for a text that stands in it as it is.
            if needle.bytes().all(|byte| matches!(byte, b' '..=b'~') && !matches!(byte, b'*' | b'"' | b'\\')) {
                self.needles.push(Finder::new(format!("\"{needle}\"").as_bytes()).into_owned());
            }
        }
        let pattern = if what == What::Target { pattern.to_lowercase() } else { pattern.to_owned() };
        self.demands.push(Demand { what, pattern });
        self
    }

    /// Wants what has one of these outcomes, judged record by record. None means any.
    #[must_use]
    pub fn outcomes(mut self, outcomes: Vec<Outcome>) -> Self {
        self.outcomes = outcomes;
        self
    }

    /// The time that is asked about, in milliseconds since 1970.
    #[must_use]
    pub fn window(&self) -> Option<&Range<i64>> {
        self.window.as_ref()
    }

    /// Whether a line may be wanted; `false` is certain. Much faster than reading it.
    pub(super) fn may_admit(&self, line: &[u8]) -> bool {
        if let (Some(window), Some(time)) = (&self.window, self.window.as_ref().and_then(|_| time_of(line))) {
            if !window.contains(&time) {
                return false;
            }
        }
        self.needles.iter().all(|needle| needle.find(line).is_some())
    }

    /// Whether a record is wanted.
    #[must_use]
    pub fn admits(&self, record: &Record) -> bool {
        self.window.as_ref().is_none_or(|window| window.contains(&record.time.as_millisecond()))
            && self.demands.iter().all(|demand| demand.is_met(record))
            && (self.outcomes.is_empty() || Outcome::of(&record.event).is_some_and(|outcome| self.wants(outcome)))
    }

    fn wants(&self, outcome: Outcome) -> bool {
        self.outcomes.iter().any(|asked| outcome.is(*asked))
    }
}

impl Demand {
    fn is_met(&self, record: &Record) -> bool {
        let fits = |text: &Option<String>| text.as_deref().is_some_and(|text| glob(&self.pattern, text));
        match self.what {
            What::Principal => fits(&record.principal),
            What::Organisation => fits(&record.organisation),
            What::Agent if self.pattern.contains('/') => match (&record.organisation, &record.agent) {
                (Some(organisation), Some(agent)) => glob(&self.pattern, &format!("{organisation}/{agent}")),
                _ => false,
            },
            What::Agent => fits(&record.agent),
            What::Target => {
                let low = |text: &str| glob(&self.pattern, &text.to_lowercase());
                record.target.as_deref().is_some_and(low) || record.host().is_some_and(low)
            }
            What::Event => glob(&self.pattern, &record.event),
            What::Side => glob(&self.pattern, &record.side),
            What::Forward => fits(&record.forward) || fits(&record.peer_forward),
            What::Key => {
                fits(&record.key) || fits(&record.asserted_by) || fits(&record.ca) || fits(&record.client_certificate)
            }
            What::Client => fits(&record.client) || fits(&record.client_address()),
            What::Reason => fits(&record.reason),
        }
    }
}

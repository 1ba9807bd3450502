//! What a look at a trail has shown.

use std::fmt;

use serde::Serialize;

/// What was found in the files of one call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether nothing was found that should not be.
    pub intact: bool,
    /// The trails, in the order in which they stand.
    pub trails: Vec<Trail>,
    /// What is damaged, in the order in which it stands; the first [`crate::limits::VERIFY_FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    /// How many findings there are beyond those.
    pub more_findings: u64,
    /// What is unusual and accounts for itself.
    pub notes: Vec<Finding>,
    /// Trails of the same side that other places have seen and that are not here; the first
    /// [`crate::limits::VERIFY_FINDINGS_MAX`], those that are missed before the others.
    pub absent: Vec<Absent>,
    /// How many there are beyond those.
    pub more_absent: u64,
    /// Records that were read.
    pub records: u64,
    /// Bytes that were read.
    pub bytes: u64,
}

/// One trail.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Trail {
    /// Its id, if any record has said it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trail: Option<String>,
    /// Who writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub side: Option<String>,
    /// The number of the first record.
    pub first: u64,
    /// The number of the last record.
    pub last: u64,
    /// The time of the first record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The time of the last record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// Whether it was stopped in order; else its writer runs, or was killed.
    pub stopped: bool,
    /// What signed heads vouch for.
    pub signed: Vec<Range>,
    /// What others have seen, by whom.
    pub anchored: Vec<Range>,
    /// Records at the end that no signed head covers yet.
    pub unsigned_tail: u64,
    /// Records at the end that nobody else has seen a head of.
    pub unanchored_tail: u64,
}

/// Records that somebody vouches for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Range {
    /// The first one's number.
    pub first: u64,
    /// The last one's number.
    pub last: u64,
    /// A fingerprint, or where the anchors are from.
    pub by: String,
    /// Whether that is one of the keys that were given.
    pub known: bool,
}

/// A trail that another place has seen and that is not here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Absent {
    /// Its id.
    pub trail: String,
    /// Who writes it.
    pub side: String,
    /// Which of these, as the other place has it.
    pub whose: Vec<String>,
    /// Who has seen it.
    pub by: String,
    /// How often.
    pub anchors: u64,
    /// Since when, by that place's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Up to when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// Whether it may be of whom one of the trails here is, so that it should be here as well.
    pub missed: bool,
}

/// Something at a place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is.
    pub kind: Kind,
    /// The file.
    pub file: String,
    /// The line, counted from 1; 0 where it is about the whole of a file.
    pub line: u64,
    /// Bytes of the file before that line.
    pub offset: u64,
    /// The number of the record concerned, or of the first of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    /// The number of the last one, if there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seq: Option<u64>,
    /// In words.
    pub text: String,
}

/// What something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A record is not what the next one says.
    Altered,
    /// Records are not there.
    Missing,
    /// A record that no other knows.
    Inserted,
    /// Records that stand there once more.
    Repeated,
    /// Records that stand elsewhere.
    Moved,
    /// A line that is no record.
    Unreadable,
    /// The last line is not whole.
    Torn,
    /// The first record is not one that a file begins with.
    BeginsInside,
    /// Records of several trails, one within the other.
    Mixed,
    /// A head that is not what its place in the trail makes it, or whose signature does not hold.
    HeadForged,
    /// A head by a key that is not one of those given.
    HeadForeign,
    /// A head without a signature.
    HeadUnsigned,
    /// No signed head where there has to be one.
    HeadMissing,
    /// A record is not what another place has kept of it, or a head that another place has seen is not there.
    Rewritten,
    /// Another place has seen more of the trail than there is.
    Truncated,
    /// Another place has seen a trail of the same writer's that is not here.
    Absent,
    /// A countersignature that does not hold, or of something that is not in the trail.
    CountersignatureForged,
    /// A line that a crash has left incomplete, as the next start has recorded.
    Recovered,
    /// Records that this copy never got, as the trail itself says.
    Lost,
    /// The trail began before what was given.
    BeginsLater,
}

impl Kind {
    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Altered => "altered",
            Self::Missing => "missing",
            Self::Inserted => "inserted",
            Self::Repeated => "repeated",
            Self::Moved => "moved",
            Self::Unreadable => "unreadable",
            Self::Torn => "torn",
            Self::BeginsInside => "begins_inside",
            Self::Mixed => "mixed",
            Self::HeadForged => "head_forged",
            Self::HeadForeign => "head_foreign",
            Self::HeadUnsigned => "head_unsigned",
            Self::HeadMissing => "head_missing",
            Self::Rewritten => "rewritten",
            Self::Truncated => "truncated",
            Self::Absent => "absent",
            Self::CountersignatureForged => "countersignature_forged",
            Self::Recovered => "recovered",
            Self::Lost => "lost",
            Self::BeginsLater => "begins_later",
        }
    }
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trail, side, whose, by, anchors, from, until, .. } = self;
        write!(f, "trail {trail}")?;
        match whose.first() {
            Some(whose) => write!(f, " of the {whose}")?,
            None => write!(f, " of {} {side}", if side == "agent" { "an" } else { "a" })?,
        }
        let heads = if *anchors == 1 { "a head".to_owned() } else { format!("{anchors} heads") };
        write!(f, ": {by} has seen {heads} of it")?;
        if let Some((from, until)) = from.as_ref().zip(until.as_ref()) {
            write!(f, ", from {from} to {until}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}: {}", self.file, self.kind.as_str(), self.text),
            line => write!(f, "{}:{line} (byte {}): {}: {}", self.file, self.offset, self.kind.as_str(), self.text),
        }
    }
}

/// Adds records that `by` vouches for.
pub(super) fn vouch(ranges: &mut Vec<Range>, by: &str, known: bool, first: u64, last: u64) {
    // Whoever vouches does so again and again, in turns with few others.
    if let Some(range) = ranges.iter_mut().rev().take(RANGES_NEAR).find(|range| range.by == by)
        && first <= range.last.saturating_add(1)
    {
        range.last = range.last.max(last);
        return;
    }
    if ranges.len() < RANGES_MAX {
        ranges.push(Range { first, last, by: by.to_owned(), known });
    }
}

/// Ranges of a trail that are told; each but the first of somebody's stands behind a finding.
const RANGES_MAX: usize = 1_000;

/// Among how many of the last ranges one is looked for that goes on.
const RANGES_NEAR: usize = 16;

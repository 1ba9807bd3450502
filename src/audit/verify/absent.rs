//! Trails that another place has seen and that are not among the files: which of them should be.
//!
//! Whoever deletes a trail and begins it anew has one that is in order by itself; what others have kept of the one before gives it
//! away. Such a trail is **missed** where it may have been written by whom one of those here is written by:
//!
//! * an agent's, if the gateway that has seen it names the agent and replica that the trail here is of;
//! * a gateway's, if the agent that has seen it found both at the same address. Several gateways may be behind one, so a trail
//!   that was written while the one here was is another's: a trail has one writer at a time;
//! * if a copy of heads holds those of both, and they were not written at the same time.
//!
//! Where a place has seen others but nothing of a trail here that does not say whose it is, these are missed, too. The rest are
//! other writers', and are only told of.

use std::collections::{BTreeMap, BTreeSet};

use super::fields::{self, Fields, TIME_LEN};
use super::report::Absent;
use crate::audit::chain::TrailId;
use crate::limits::VERIFY_TRAILS_MAX;

/// What each place has seen of each trail, whether it is here or not.
#[derive(Debug, Default)]
pub(super) struct Sightings {
    by_source: BTreeMap<(usize, TrailId), Sighting>,
    elsewhere: BTreeSet<TrailId>,
}

/// What one place has seen of one trail.
#[derive(Debug, Default)]
struct Sighting {
    /// Who writes the trail that was seen.
    side: &'static str,
    /// Whether the place has kept the heads themselves.
    copied: bool,
    whose: Vec<Whose>,
    count: u64,
    /// The line and the byte at which it was seen first.
    place: (u64, u64),
    from: Option<[u8; TIME_LEN]>,
    until: Option<[u8; TIME_LEN]>,
}

/// Who has written a trail, as far as records tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Whose {
    /// This agent, for this organisation.
    Agent { organisation: Box<str>, agent: Box<str>, replica: Box<str> },
    /// The gateway that was found there.
    Gateway { at: Box<str> },
}

/// A trail that is here.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) trail: Option<TrailId>,
    pub(super) side: Option<String>,
    /// For an agent's, who that is.
    pub(super) whose: Vec<Whose>,
    pub(super) from: Option<String>,
    pub(super) until: Option<String>,
}

impl Whose {
    /// The agent that a record is about; in an agent's own trail that is itself.
    pub(super) fn agent(fields: &Fields<'_>) -> Option<Self> {
        let text = |text: &Option<std::borrow::Cow<'_, str>>| {
            text.as_deref().filter(|text| text.len() <= WHOSE_LEN).map(Box::<str>::from)
        };
        let (organisation, agent) = text(&fields.organisation).zip(text(&fields.agent))?;
        Some(Self::Agent { organisation, agent, replica: text(&fields.replica).unwrap_or_default() })
    }

    fn gateway(fields: &Fields<'_>) -> Option<Self> {
        let at = fields.detail.as_deref().filter(|at| at.len() <= WHOSE_LEN)?;
        Some(Self::Gateway { at: at.into() })
    }

    fn in_words(&self) -> String {
        match self {
            Self::Agent { organisation, agent, replica } => format!("agent {organisation}/{agent}, replica {replica}"),
            Self::Gateway { at } => format!("gateway at {at}"),
        }
    }

    /// Adds it to those that are known.
    pub(super) fn add_to(self, known: &mut Vec<Self>) {
        if known.len() < WHOSE_MAX && !known.contains(&self) {
            known.push(self);
        }
    }
}

impl Sightings {
    /// This trail is known to be kept elsewhere, or to have been given up in order.
    pub(super) fn elsewhere(&mut self, trail: TrailId) {
        self.elsewhere.insert(trail);
    }

    /// Takes in `trail.anchored` or `trail.head`, which stands at this line and byte of a place. Returns whether there was room.
    pub(super) fn add(&mut self, event: &[u8], fields: &Fields<'_>, source: usize, place: (u64, u64)) -> bool {
        let copied = event == b"trail.head";
        let trail = if copied { &fields.trail } else { &fields.peer_trail };
        let Some(trail) = trail.as_deref().and_then(TrailId::parse) else { return true };
        let (side, whose) = match (fields.side.as_deref(), copied) {
            (Some("gateway"), true) => ("gateway", None),
            (Some("agent"), true) => ("agent", None),
            (Some("gateway"), false) => ("agent", Whose::agent(fields)),
            (Some("agent"), false) => ("gateway", Whose::gateway(fields)),
            _ => return true,
        };
        if self.by_source.len() >= VERIFY_TRAILS_MAX && !self.by_source.contains_key(&(source, trail)) {
            return false;
        }
        let fresh = || Sighting { side, copied, place, ..Sighting::default() };
        let sighting = self.by_source.entry((source, trail)).or_insert_with(fresh);
        sighting.count += 1;
        if let Some(whose) = whose {
            whose.add_to(&mut sighting.whose);
        }
        if let Some(time) = fields.time.as_deref().and_then(|time| <[u8; TIME_LEN]>::try_from(time.as_bytes()).ok()) {
            sighting.from = Some(sighting.from.map_or(time, |from| from.min(time)));
            sighting.until = sighting.until.max(Some(time));
        }
        true
    }

    /// The trails that were seen of the sides of those here and are not among them, each with the line and the byte where it was seen first.
    pub(super) fn absent(&self, held: &[Held], source: impl Fn(usize) -> String) -> Vec<((u64, u64), Absent)> {
        let is_held = |trail: TrailId| held.iter().any(|held| held.trail == Some(trail));
        let mut absent = Vec::new();
        for ((at, trail), sighting) in &self.by_source {
            let mut ours = held.iter().filter(|held| held.side.as_deref() == Some(sighting.side)).peekable();
            if is_held(*trail) || ours.peek().is_none() {
                continue;
            }
            let known: Vec<&Sighting> = self
                .by_source
                .range((*at, TrailId::FIRST)..=(*at, TrailId::LAST))
                .filter(|((_, trail), other)| {
                    is_held(*trail) && (other.side, other.copied) == (sighting.side, sighting.copied)
                })
                .map(|(_, other)| other)
                .collect();
            let missed = !self.elsewhere.contains(trail) && ours.any(|held| sighting.is_missed_by(held, &known));
            let text = |time: &Option<[u8; TIME_LEN]>| time.map(|time| String::from_utf8_lossy(&time).into_owned());
            let absence = Absent {
                trail: trail.to_string(),
                side: sighting.side.to_owned(),
                whose: sighting.whose.iter().map(Whose::in_words).collect(),
                by: source(*at),
                anchors: sighting.count,
                from: text(&sighting.from),
                until: text(&sighting.until),
                missed,
            };
            absent.push((sighting.place, absence));
        }
        absent
    }
}

impl Sighting {
    /// Whether it may have been written by whom a trail here is, of which and of its like the same place has seen `known`.
    fn is_missed_by(&self, held: &Held, known: &[&Self]) -> bool {
        match (self.copied, self.side) {
            (true, _) => !known.is_empty() && !self.was_beside(held),
            (false, "agent") if held.whose.is_empty() => known.is_empty(),
            (false, "agent") => self.whose.iter().any(|whose| held.whose.contains(whose)),
            (false, _) => {
                let same = |other: &&Self| self.whose.iter().any(|whose| other.whose.contains(whose));
                (known.is_empty() || known.iter().any(same)) && !self.was_beside(held)
            }
        }
    }

    /// Whether it was written while the trail here was, as far as clocks tell.
    fn was_beside(&self, held: &Held) -> bool {
        let moment = |time: Option<&str>| time.and_then(fields::milliseconds);
        let ours = moment(held.from.as_deref()).zip(moment(held.until.as_deref()));
        let seen =
            |time: &Option<[u8; TIME_LEN]>| moment(time.as_ref().and_then(|time| std::str::from_utf8(time).ok()));
        let theirs = seen(&self.from).zip(seen(&self.until));
        ours.zip(theirs).is_some_and(|(ours, theirs)| {
            theirs.0.saturating_add(CLOCKS_MS) < ours.1 && ours.0.saturating_add(CLOCKS_MS) < theirs.1
        })
    }
}

/// How many agents, organisations or addresses are known of one trail; an agent has as many as it serves organisations.
const WHOSE_MAX: usize = 64;

/// How long what names them may be; ids and the names of hosts are shorter.
const WHOSE_LEN: usize = 320;

/// By how much two trails overlap before they were surely written at the same time: so far clocks may be apart.
const CLOCKS_MS: u64 = 120_000;

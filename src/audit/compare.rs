//! Comparing the trails of gateways and of their agents, forward by forward.
//!
//! Promised: each forward that both sides should know is found on both or named; where both know it, they agree on who, for what
//! and how it ended, and on the bytes as far as its way of ending lets them. The trails are read once to see what they hold, and
//! once together by time. Memory is bounded by the forwards that live at once and those that have ended within the
//! tolerance for clocks; where even those are too many, the oldest are counted as not compared.
//!
//! A trail should be [verified](super::verify) before: what was tampered with is compared as it stands.
//!
//! An agent's trail has the forwards of all gateways that it is linked to. Those for organisations of which the gateways' trails
//! here know nothing are counted apart; of several gateways for one organisation, all trails have to be given.
//!
//! Not promised: anything about forwards of other agents, or of guests of an agent that listens.

mod pair;
mod stream;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::verify::{self, VerifyError};
use crate::limits::{COMPARE_FORWARDS, VERIFY_FINDINGS_MAX};

use pair::{Half, Pair};
use stream::{Happening, Step, Streams, Surveys};

/// How two trails compare.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Whether nothing was found on which they differ.
    pub agree: bool,
    /// Forwards on which they agree.
    pub agreed: u64,
    /// Forwards where they say different things and the way that they ended explains that.
    pub explained: u64,
    /// Forwards that only the gateway has, since they never came to the agent.
    pub never_asked: u64,
    /// Forwards that had not ended when a trail did.
    pub live: u64,
    /// Forwards of times that the other trail does not cover.
    pub outside: u64,
    /// Forwards of the agent for organisations of which the gateways' trails know nothing, so that they are other gateways'.
    pub elsewhere: u64,
    /// Forwards that were too many to be held until the other side's came.
    pub not_compared: u64,
    /// How many differences there are of each category.
    pub categories: BTreeMap<Category, u64>,
    /// The differences, in the order of time; the first [`crate::limits::VERIFY_FINDINGS_MAX`].
    pub differences: Vec<Difference>,
}

/// What two trails differ in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// The gateway knows nothing of it.
    MissingAtGateway,
    /// The agent knows nothing of it.
    MissingAtAgent,
    /// Another principal.
    Principal,
    /// Another organisation.
    Organisation,
    /// Another agent.
    Agent,
    /// Another target.
    Target,
    /// Another way of ending.
    Outcome,
    /// Other numbers of bytes.
    Bytes,
    /// An opening without an end, in a trail that was stopped or goes on long after the other side's end.
    WithoutEnd,
}

impl Category {
    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MissingAtGateway => "missing_at_gateway",
            Self::MissingAtAgent => "missing_at_agent",
            Self::Principal => "principal",
            Self::Organisation => "organisation",
            Self::Agent => "agent",
            Self::Target => "target",
            Self::Outcome => "outcome",
            Self::Bytes => "bytes",
            Self::WithoutEnd => "without_end",
        }
    }
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// What it is in.
    pub category: Category,
    /// The gateway's id of the forward.
    pub forward: String,
    /// Where the gateway's trail has it, as `FILE:LINE`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_gateway: Option<String>,
    /// Where the agent's trail has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_agent: Option<String>,
    /// What the gateway says.
    pub gateway: String,
    /// What the agent says.
    pub agent: String,
}

/// Why two trails cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// A file could not be read.
    #[error(transparent)]
    Read(#[from] VerifyError),
    /// Not a gateway's and an agent's.
    #[error("on one side have to be gateways' trails and on the other agents'; these are {0} and {1}")]
    Sides(String, String),
}

/// Compares the trails that stand in `ours` with those in `theirs`; which of them are the gateways' shows. `skew` is by how much
/// their clocks may differ. `progress` is told of the bytes that were read since it was told last; each file is read twice.
///
/// # Errors
/// If a file cannot be read, or they are not of the two sides.
pub fn compare(
    ours: &[PathBuf],
    theirs: &[PathBuf],
    skew: Duration,
    mut progress: impl FnMut(u64),
) -> Result<Comparison, CompareError> {
    let (ours, theirs) = (verify::by_trail(ours)?, verify::by_trail(theirs)?);
    let first = Surveys::of(&ours, &mut progress)?;
    let second = Surveys::of(&theirs, &mut progress)?;
    let ((gateway, at_gateway), (agent, at_agent)) = match (first.side(), second.side()) {
        (Ok(Some("gateway")), Ok(Some("agent"))) => ((ours, first), (theirs, second)),
        (Ok(Some("agent")), Ok(Some("gateway"))) => ((theirs, second), (ours, first)),
        (ours, theirs) => {
            let said = |side: Result<Option<&str>, &str>| match side {
                Ok(side) => side.unwrap_or("nobody's").to_owned(),
                Err(other) => format!("several sides', also a trail of the {other}'s"),
            };
            return Err(CompareError::Sides(said(ours), said(theirs)));
        }
    };
    let skew = i64::try_from(skew.as_millis()).unwrap_or(i64::MAX / 4);
    let mut matching = Matching {
        skew,
        apart: at_gateway.share_an_agent_with(&at_agent),
        at_gateway,
        at_agent,
        pairs: HashMap::new(),
        due: VecDeque::new(),
        result: Comparison::default(),
    };
    let mut gateway = Streams::new(gateway, &mut progress)?;
    let mut agent = Streams::new(agent, &mut progress)?;
    loop {
        let at_gateway = match (gateway.time(), agent.time()) {
            (Some(gateway), Some(agent)) => gateway <= agent,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (None, None) => break,
        };
        if at_gateway {
            let Some(happening) = gateway.next(&mut progress)? else { break };
            matching.at_gateway(happening);
        } else {
            let Some(happening) = agent.next(&mut progress)? else { break };
            matching.at_agent(happening);
        }
    }
    Ok(matching.finish())
}

struct Matching {
    skew: i64,
    at_gateway: Surveys,
    at_agent: Surveys,
    /// Whether the gateways know an agent that the agent's trail is of: then those that they do not know are other gateways'.
    apart: bool,
    /// By the gateway's id.
    pairs: HashMap<Box<str>, Pair>,
    /// When a forward that only one side has closed is to be judged, in the order of time.
    due: VecDeque<(i64, Box<str>)>,
    result: Comparison,
}

impl Matching {
    fn at_gateway(&mut self, happening: Happening) {
        let time = happening.time;
        let ours = self.at_agent.is_of(happening.organisation.as_deref().zip(happening.agent.as_deref()));
        if ours && let Some(id) = happening.forward.clone() {
            let pair = self.pair(&id, time);
            if happening.step == Step::Attempt {
                pair.attempts = pair.attempts.saturating_add(1);
            } else {
                Half::take(&mut pair.gateway, happening);
                self.settle(&id, time);
            }
        }
        self.expire(time);
    }

    fn at_agent(&mut self, happening: Happening) {
        let time = happening.time;
        if let Some(id) = happening.peer_forward.clone() {
            let pair = self.pair(&id, time);
            Half::take(&mut pair.agent, happening);
            self.settle(&id, time);
        }
        self.expire(time);
    }

    fn pair(&mut self, id: &str, now: i64) -> &mut Pair {
        if !self.pairs.contains_key(id) && self.pairs.len() >= COMPARE_FORWARDS {
            // The one that has waited longest for the other side.
            match self.due.pop_front() {
                Some((_, oldest)) => drop(self.pairs.remove(&oldest)),
                None => self.pairs.clear(),
            }
            self.result.not_compared += 1;
        }
        self.pairs.entry(id.into()).or_insert_with(|| Pair::since(now))
    }

    /// Judges a forward that both sides have closed, and else notes when that is to be done.
    fn settle(&mut self, id: &str, now: i64) {
        let Some(pair) = self.pairs.get(id) else { return };
        let closed = |half: &Option<Half>| half.as_ref().is_some_and(Half::is_closed);
        match (closed(&pair.gateway), closed(&pair.agent)) {
            (true, true) => {
                if let Some(pair) = self.pairs.remove(id) {
                    self.judge(id, &pair);
                }
            }
            (false, false) => {}
            _ => self.due.push_back((now.saturating_add(self.skew), id.into())),
        }
    }

    fn expire(&mut self, now: i64) {
        while self.due.front().is_some_and(|(due, _)| *due < now) {
            let Some((_, id)) = self.due.pop_front() else { return };
            let Some(pair) = self.pairs.get(&id) else { continue };
            // The side that has it open may yet end it; its trail says so at some time.
            let waits = [&pair.gateway, &pair.agent].into_iter().flatten().any(|half| !half.is_closed());
            if !waits && let Some(pair) = self.pairs.remove(&id) {
                self.judge(&id, &pair);
            }
        }
    }

    fn finish(mut self) -> Comparison {
        let mut rest: Vec<_> = std::mem::take(&mut self.pairs).into_iter().collect();
        rest.sort_by_key(|(_, pair)| pair.since);
        for (id, pair) in rest {
            self.judge(&id, &pair);
        }
        self.result.agree = self.result.categories.is_empty();
        self.result
    }

    fn judge(&mut self, id: &str, pair: &Pair) {
        match (&pair.gateway, &pair.agent) {
            (Some(gateway), Some(agent)) => self.judge_both(id, pair, gateway, agent),
            (Some(gateway), None) if !gateway.must_be_known() => self.result.never_asked += 1,
            (Some(gateway), None) if !self.at_agent.cover(gateway, self.skew) => self.result.outside += 1,
            (Some(gateway), None) if !gateway.is_closed() => self.without_end(id, pair),
            (Some(gateway), None) => {
                let said = (gateway.outcome_in_words(), "nothing".to_owned());
                self.differ(Category::MissingAtAgent, id, pair, said);
            }
            (None, Some(agent)) if self.is_elsewhere(agent) => self.result.elsewhere += 1,
            (None, Some(agent)) if !self.at_gateway.cover(agent, self.skew) => self.result.outside += 1,
            (None, Some(agent)) => {
                let said = ("nothing".to_owned(), agent.outcome_in_words());
                self.differ(Category::MissingAtGateway, id, pair, said);
            }
            (None, None) => {}
        }
    }

    /// Whether a forward of the agent's is another gateway's.
    fn is_elsewhere(&self, agent: &Half) -> bool {
        self.apart && agent.whose().is_some() && !self.at_gateway.is_of(agent.whose())
    }

    fn judge_both(&mut self, id: &str, pair: &Pair, gateway: &Half, agent: &Half) {
        let mut agreed = true;
        for (category, said) in pair::identities(gateway, agent) {
            agreed = false;
            self.differ(category, id, pair, said);
        }
        if !gateway.is_closed() || !agent.is_closed() {
            return self.without_end(id, pair);
        }
        match pair::outcomes(gateway, agent, pair.attempts) {
            pair::Outcomes::Agree if agreed => self.result.agreed += 1,
            pair::Outcomes::Explained if agreed => self.result.explained += 1,
            pair::Outcomes::Agree | pair::Outcomes::Explained => {}
            pair::Outcomes::Differ(category, said) => self.differ(category, id, pair, said),
        }
    }

    /// One side has it open at its trail's end.
    fn without_end(&mut self, id: &str, pair: &Pair) {
        let open = |half: &Option<Half>, surveys: &Surveys| {
            let open = half.as_ref().filter(|half| !half.is_closed());
            open.is_some_and(|half| surveys.has_ended(half, self.skew, pair.closed()))
        };
        if open(&pair.gateway, &self.at_gateway) || open(&pair.agent, &self.at_agent) {
            let said = |half: &Option<Half>| half.as_ref().map_or_else(|| "nothing".to_owned(), Half::outcome_in_words);
            self.differ(Category::WithoutEnd, id, pair, (said(&pair.gateway), said(&pair.agent)));
        } else {
            self.result.live += 1;
        }
    }

    fn differ(&mut self, category: Category, id: &str, pair: &Pair, (gateway, agent): (String, String)) {
        *self.result.categories.entry(category).or_default() += 1;
        if self.result.differences.len() >= VERIFY_FINDINGS_MAX {
            return;
        }
        let at = |half: &Option<Half>, surveys: &Surveys| half.as_ref().map(|half| surveys.place(half.place));
        self.result.differences.push(Difference {
            category,
            forward: id.to_owned(),
            at_gateway: at(&pair.gateway, &self.at_gateway),
            at_agent: at(&pair.agent, &self.at_agent),
            gateway,
            agent,
        });
    }
}

fn failed(path: &std::path::Path) -> impl Fn(io::Error) -> VerifyError {
    let path = path.to_owned();
    move |source| VerifyError::Read { path: path.clone(), source }
}

#[cfg(test)]
mod tests;

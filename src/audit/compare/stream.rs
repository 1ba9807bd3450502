//! What a trail tells of forwards, in the order in which it does.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;

use serde::Deserialize;

use super::failed;
use super::pair::Half;
use crate::audit::chain::Linked;
use crate::audit::verify::VerifyError;
use crate::audit::verify::lines::Lines;
use crate::limits::COMPARE_LINKS;

/// A file of a trail, by number, and a line of it.
pub(super) type Place = (usize, u64);

/// What a record tells of a forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Open,
    Attempt,
    Denied,
    Failed,
    Ended,
    Abandoned,
}

/// A record of a forward.
#[derive(Debug)]
pub(super) struct Happening {
    /// Unix time in milliseconds.
    pub(super) time: i64,
    pub(super) step: Step,
    pub(super) place: Place,
    pub(super) forward: Option<Box<str>>,
    pub(super) peer_forward: Option<Box<str>>,
    pub(super) organisation: Option<Box<str>>,
    pub(super) agent: Option<Box<str>>,
    pub(super) replica: Option<Box<str>>,
    pub(super) principal: Option<Box<str>>,
    pub(super) target: Option<Box<str>>,
    pub(super) reason: Option<Box<str>>,
    pub(super) bytes: Option<(u64, u64)>,
}

#[derive(Deserialize)]
struct Members<'a> {
    #[serde(borrow)]
    time: Cow<'a, str>,
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow)]
    forward: Option<Cow<'a, str>>,
    #[serde(borrow)]
    peer_forward: Option<Cow<'a, str>>,
    #[serde(borrow)]
    organisation: Option<Cow<'a, str>>,
    #[serde(borrow)]
    agent: Option<Cow<'a, str>>,
    #[serde(borrow)]
    replica: Option<Cow<'a, str>>,
    #[serde(borrow)]
    principal: Option<Cow<'a, str>>,
    #[serde(borrow)]
    target: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reason: Option<Cow<'a, str>>,
    to_target: Option<u64>,
    from_target: Option<u64>,
}

impl Happening {
    fn read(line: &[u8], place: Place) -> Option<Self> {
        memchr::memmem::find(line, b"\"event\":\"forward.")?;
        let members: Members<'_> = serde_json::from_slice(line).ok()?;
        let step = match &*members.event {
            "forward.open" => Step::Open,
            "forward.attempt" => Step::Attempt,
            "forward.denied" => Step::Denied,
            "forward.failed" => Step::Failed,
            "forward.ended" => Step::Ended,
            "forward.abandoned" => Step::Abandoned,
            _ => return None,
        };
        let boxed = |text: Option<Cow<'_, str>>| text.map(|text| Box::from(&*text));
        Some(Self {
            time: milliseconds(&members.time)?,
            step,
            place,
            forward: boxed(members.forward),
            peer_forward: boxed(members.peer_forward),
            organisation: boxed(members.organisation),
            agent: boxed(members.agent),
            replica: boxed(members.replica),
            principal: boxed(members.principal),
            target: boxed(members.target),
            reason: boxed(members.reason),
            bytes: members.to_target.zip(members.from_target),
        })
    }
}

/// The records of forwards in a trail's files.
pub(super) struct Stream {
    paths: Vec<PathBuf>,
    file: usize,
    lines: Option<Lines<File>>,
    told: u64,
}

impl Stream {
    pub(super) fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, file: 0, lines: None, told: 0 }
    }

    pub(super) fn next(&mut self, progress: &mut impl FnMut(u64)) -> Result<Option<Happening>, VerifyError> {
        while let Some(path) = self.paths.get(self.file) {
            let lines = match &mut self.lines {
                Some(lines) => lines,
                none => none.insert(Lines::new(File::open(path).map_err(failed(path))?)),
            };
            while let Some(line) = lines.next().map_err(failed(path))? {
                let offset = line.offset;
                let happening = Happening::read(line.bytes, (self.file, line.number));
                if offset - self.told >= TELL {
                    progress(offset - self.told);
                    self.told = offset;
                }
                if happening.is_some() {
                    return Ok(happening);
                }
            }
            progress(lines.offset().saturating_sub(self.told));
            (self.file, self.lines, self.told) = (self.file + 1, None, 0);
        }
        Ok(None)
    }
}

/// What a trail is of, and what time it covers.
#[derive(Debug, Default)]
pub(super) struct Survey {
    files: Vec<String>,
    pub(super) side: Option<String>,
    first: Option<i64>,
    last: i64,
    /// Whether it begins with a trail's first record.
    whole: bool,
    stopped: bool,
    agents: BTreeSet<(Box<str>, Box<str>)>,
}

#[derive(Deserialize)]
struct Outline<'a> {
    #[serde(borrow)]
    time: Cow<'a, str>,
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow)]
    side: Cow<'a, str>,
    #[serde(borrow)]
    organisation: Option<Cow<'a, str>>,
    #[serde(borrow)]
    agent: Option<Cow<'a, str>>,
}

impl Survey {
    pub(super) fn of(paths: &[PathBuf], progress: &mut impl FnMut(u64)) -> Result<Self, VerifyError> {
        let mut survey = Self::default();
        let mut looked: u64 = 0;
        for path in paths {
            survey.files.push(path.display().to_string());
            let mut lines = Lines::new(File::open(path).map_err(failed(path))?);
            let (mut last, mut told) = (Vec::new(), 0);
            while let Some(line) = lines.next().map_err(failed(path))? {
                if line.offset - told >= TELL {
                    progress(line.offset - told);
                    told = line.offset;
                }
                let forward = memchr::memmem::find(line.bytes, b"\"event\":\"forward.").is_some();
                // Who is linked is known by the links; the first forwards tell it where those were not given.
                if !forward || looked < FORWARDS_LOOKED_AT {
                    looked += u64::from(forward);
                    survey.take(line.bytes);
                }
                last.clear();
                last.extend_from_slice(line.bytes);
            }
            survey.take(&last);
            progress(lines.offset().saturating_sub(told));
        }
        Ok(survey)
    }

    fn take(&mut self, line: &[u8]) {
        let Ok(outline) = serde_json::from_slice::<Outline<'_>>(line) else { return };
        let Some(time) = milliseconds(&outline.time) else { return };
        if self.first.is_none() {
            self.first = Some(time);
            self.whole = Linked::read(line).is_some_and(|linked| linked.seq == 0);
            self.side = Some(outline.side.clone().into_owned());
        }
        self.last = self.last.max(time);
        self.stopped = outline.event == "trail.stopped";
        if let Some((organisation, agent)) = outline.organisation.zip(outline.agent)
            && self.agents.len() < COMPARE_LINKS
        {
            let known = (Box::from(&*organisation), Box::from(&*agent));
            self.agents.insert(known);
        }
    }

    /// Whether the trail is of this agent.
    pub(super) fn is_of(&self, organisation: Option<&str>, agent: Option<&str>) -> bool {
        organisation.zip(agent).is_some_and(|(organisation, agent)| {
            self.agents.iter().any(|known| &*known.0 == organisation && &*known.1 == agent)
        })
    }

    /// Whether the trail would have what the other side says, by the time of that.
    pub(super) fn covers(&self, half: &Half, skew: i64) -> bool {
        let Some(first) = self.first else { return true };
        // Where it begins or goes on is not known to the millisecond, by the other side's clock.
        let first = if self.whole { first.saturating_sub(skew) } else { first.saturating_add(skew) };
        let (opened, closed) = half.times();
        let late =
            if self.stopped { opened > self.last.saturating_add(skew) } else { closed.unwrap_or(opened) > self.last };
        opened >= first && !late
    }

    /// Whether what was open at the trail's end should have been closed by then: it was stopped, or the other side had closed it
    /// long before.
    pub(super) fn has_ended(&self, skew: i64, closed: Option<i64>) -> bool {
        self.stopped || closed.is_some_and(|closed| closed.saturating_add(skew) < self.last)
    }

    pub(super) fn place(&self, (file, line): Place) -> String {
        format!("{}:{line}", self.files.get(file).map_or("", String::as_str))
    }
}

fn milliseconds(time: &str) -> Option<i64> {
    time.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_millisecond)
}

/// After how many bytes progress is told.
const TELL: u64 = 4 << 20;

/// How many records of forwards are looked at for who they are of.
const FORWARDS_LOOKED_AT: u64 = 10_000;

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

/// What is read of a record here.
#[derive(Deserialize)]
struct Members<'a> {
    #[serde(borrow)]
    time: Cow<'a, str>,
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow)]
    side: Cow<'a, str>,
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

/// The records of forwards in several trails, in the order of time.
pub(super) struct Streams(Vec<(Stream, Option<Happening>)>);

impl Streams {
    pub(super) fn new(trails: Vec<Vec<PathBuf>>, progress: &mut impl FnMut(u64)) -> Result<Self, VerifyError> {
        let mut first = 0;
        let mut streams = Vec::new();
        for paths in trails {
            let mut stream = Stream { first, paths, file: 0, lines: None, told: 0 };
            first += stream.paths.len();
            let next = stream.next(progress)?;
            streams.push((stream, next));
        }
        Ok(Self(streams))
    }

    /// The time of the next record.
    pub(super) fn time(&self) -> Option<i64> {
        self.0.iter().filter_map(|(_, next)| next.as_ref()).map(|next| next.time).min()
    }

    pub(super) fn next(&mut self, progress: &mut impl FnMut(u64)) -> Result<Option<Happening>, VerifyError> {
        let time = |next: &Option<Happening>| next.as_ref().map_or(i64::MAX, |next| next.time);
        let Some((stream, next)) = self.0.iter_mut().min_by_key(|(_, next)| time(next)) else { return Ok(None) };
        Ok(std::mem::replace(next, stream.next(progress)?))
    }
}

/// The records of forwards in a trail's files, the first of which has this number.
struct Stream {
    first: usize,
    paths: Vec<PathBuf>,
    file: usize,
    lines: Option<Lines<File>>,
    told: u64,
}

impl Stream {
    fn next(&mut self, progress: &mut impl FnMut(u64)) -> Result<Option<Happening>, VerifyError> {
        while let Some(path) = self.paths.get(self.file) {
            let lines = match &mut self.lines {
                Some(lines) => lines,
                none => none.insert(Lines::new(File::open(path).map_err(failed(path))?)),
            };
            while let Some(line) = lines.next().map_err(failed(path))? {
                let offset = line.offset;
                let happening = Happening::read(line.bytes, (self.first + self.file, line.number));
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

/// What the trails of a side are of.
#[derive(Debug, Default)]
pub(super) struct Surveys {
    files: Vec<String>,
    trails: Vec<Survey>,
}

/// What a trail is of, and what time it covers.
#[derive(Debug, Default)]
struct Survey {
    /// The number of the first file after it.
    end: usize,
    side: Option<String>,
    first: Option<i64>,
    last: i64,
    /// Whether it begins with a trail's first record.
    whole: bool,
    stopped: bool,
    agents: BTreeSet<(Box<str>, Box<str>)>,
}

impl Surveys {
    pub(super) fn of(trails: &[Vec<PathBuf>], progress: &mut impl FnMut(u64)) -> Result<Self, VerifyError> {
        let mut surveys = Self::default();
        for paths in trails {
            surveys.files.extend(paths.iter().map(|path| path.display().to_string()));
            let survey = Survey::of(paths, progress)?;
            surveys.trails.push(Survey { end: surveys.files.len(), ..survey });
        }
        Ok(surveys)
    }

    /// Whose trails they are; `None` if nobody says so.
    ///
    /// # Errors
    /// If they are of different sides: one that is not the first one's.
    pub(super) fn side(&self) -> Result<Option<&str>, &str> {
        let mut sides = self.trails.iter().filter_map(|survey| survey.side.as_deref());
        let first = sides.next();
        sides.find(|side| Some(*side) != first).map_or(Ok(first), Err)
    }

    /// Whether one of them is of this agent, or knows it.
    pub(super) fn is_of(&self, whose: Option<(&str, &str)>) -> bool {
        self.trails.iter().any(|survey| survey.is_of(whose))
    }

    /// Whether any agent is one that both know.
    pub(super) fn share_an_agent_with(&self, other: &Self) -> bool {
        self.trails.iter().flat_map(|survey| &survey.agents).any(|(organisation, agent)| {
            let whose = (&**organisation, &**agent);
            other.is_of(Some(whose))
        })
    }

    /// Whether one of them would have what the other side says, by whose it is and the time of that.
    pub(super) fn cover(&self, half: &Half, skew: i64) -> bool {
        let known = self.is_of(half.whose());
        self.trails.iter().any(|survey| (!known || survey.is_of(half.whose())) && survey.covers(half, skew))
    }

    /// As [`Survey::has_ended`], of the trail that has it.
    pub(super) fn has_ended(&self, half: &Half, skew: i64, closed: Option<i64>) -> bool {
        self.trails.iter().find(|survey| half.place.0 < survey.end).is_some_and(|survey| survey.has_ended(skew, closed))
    }

    pub(super) fn place(&self, (file, line): Place) -> String {
        format!("{}:{line}", self.files.get(file).map_or("", String::as_str))
    }
}

impl Survey {
    fn of(paths: &[PathBuf], progress: &mut impl FnMut(u64)) -> Result<Self, VerifyError> {
        let mut survey = Self::default();
        let mut looked: u64 = 0;
        for path in paths {
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
        let Ok(members) = serde_json::from_slice::<Members<'_>>(line) else { return };
        let Some(time) = milliseconds(&members.time) else { return };
        if self.first.is_none() {
            self.first = Some(time);
            self.whole = Linked::read(line).is_some_and(|linked| linked.seq == 0);
            self.side = Some(members.side.into_owned());
        }
        self.last = self.last.max(time);
        self.stopped = members.event == "trail.stopped";
        if let Some((organisation, agent)) = members.organisation.zip(members.agent)
            && self.agents.len() < COMPARE_LINKS
        {
            self.agents.insert((Box::from(&*organisation), Box::from(&*agent)));
        }
    }

    /// Whether the trail is of this agent, or knows it; where it knows more than can be held, it may.
    fn is_of(&self, whose: Option<(&str, &str)>) -> bool {
        let full = self.agents.len() >= COMPARE_LINKS;
        whose.is_some_and(|(organisation, agent)| {
            full || self.agents.iter().any(|known| &*known.0 == organisation && &*known.1 == agent)
        })
    }

    /// Whether the trail would have what the other side says, by the time of that.
    fn covers(&self, half: &Half, skew: i64) -> bool {
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
    fn has_ended(&self, skew: i64, closed: Option<i64>) -> bool {
        self.stopped || closed.is_some_and(|closed| closed.saturating_add(skew) < self.last)
    }
}

fn milliseconds(time: &str) -> Option<i64> {
    time.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_millisecond)
}

/// After how many bytes progress is told.
const TELL: u64 = 4 << 20;

/// How many records of forwards are looked at for who they are of.
const FORWARDS_LOOKED_AT: u64 = 10_000;

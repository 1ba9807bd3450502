//! Forwards as one line each: their opening, what they did meanwhile, and their end.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use jiff::Timestamp;

use super::filter::Outcome;
use super::record::Record;
use crate::limits::FORWARDS_MAX;

/// A forward, or another record.
#[derive(Debug, Clone)]
pub struct Row {
    /// When it began: by the record of its opening, or as long before its end as it lasted.
    pub began: Timestamp,
    /// What became of it, where it is a forward or a login.
    pub outcome: Option<Outcome>,
    /// The last record about it.
    pub record: Record,
}

impl Row {
    /// A record by itself.
    #[must_use]
    pub fn of(record: Record) -> Self {
        Self { began: record.time, outcome: Outcome::of(&record.event), record }
    }
}

/// Puts the records of each forward together. Holds those whose end has not come, up to as many as can be live.
#[derive(Debug, Default)]
pub struct Joiner {
    open: BTreeMap<u64, Row>,
    places: HashMap<String, u64>,
    next: u64,
}

impl Joiner {
    /// Takes a record in, and gives what is complete with it.
    pub fn take(&mut self, record: Record) -> Option<Row> {
        let outcome = Outcome::of(&record.event);
        let forward = match (&record.forward, outcome) {
            (Some(forward), Some(_)) => forward.clone(),
            _ => return Some(Row::of(record)),
        };
        let opened = self.places.remove(&forward).and_then(|place| self.open.remove(&place));
        match outcome {
            Some(Outcome::Open) if record.event == "forward.open" => {
                let begun = Row { began: record.time, outcome, record };
                let pushed = self.put(forward, begun);
                // The same id again, without an end between: what came before is over, whatever it was.
                opened.or(pushed)
            }
            Some(Outcome::Open) => {
                let began = opened.map_or_else(|| before(&record), |opened| opened.began);
                self.put(forward, Row { began, outcome, record })
            }
            _ => {
                let began = opened.map_or_else(|| before(&record), |opened| opened.began);
                Some(Row { began, outcome, record })
            }
        }
    }

    /// What has no end in the trail, oldest first.
    pub fn finish(&mut self) -> impl Iterator<Item = Row> + use<> {
        self.places.clear();
        std::mem::take(&mut self.open).into_values()
    }

    /// Keeps a row; gives the oldest if there are too many.
    fn put(&mut self, forward: String, row: Row) -> Option<Row> {
        let place = self.next;
        self.next += 1;
        self.places.insert(forward, place);
        self.open.insert(place, row);
        if self.open.len() <= FORWARDS_MAX {
            return None;
        }
        let (_, oldest) = self.open.pop_first()?;
        self.places.remove(oldest.record.forward.as_deref().unwrap_or_default());
        Some(oldest)
    }
}

/// As long before a record as what it tells of lasted.
fn before(record: &Record) -> Timestamp {
    let lasted = Duration::from_millis(record.duration_ms.unwrap_or(0));
    record.time.checked_sub(lasted).unwrap_or(record.time)
}

//! What is known of the gateway, and what of it is looked at. No I/O, no waiting.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::gateway::{Carrier, Status, Wanted};

/// By what agents are sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    Name,
    State,
    Live,
    To,
    From,
    Opens,
}

impl Sort {
    const ALL: [Self; 6] = [Self::Name, Self::State, Self::Live, Self::To, Self::From, Self::Opens];

    fn next(self) -> Self {
        let at = Self::ALL.iter().position(|sort| *sort == self).unwrap_or_default();
        Self::ALL[(at + 1) % Self::ALL.len()]
    }
}

/// What becomes of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Stay,
    /// The gateway is to be asked now.
    Ask,
    End,
}

/// A line of the table.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) carrier: Carrier,
    /// Bytes a second toward targets, and from them; forwards asked for in a second.
    pub(super) rates: [f64; 3],
}

pub(super) struct Model {
    pub(super) place: String,
    pub(super) status: Option<Status>,
    before: Option<(Instant, Status)>,
    at: Option<Instant>,
    /// Since when the gateway does not answer, and why.
    pub(super) gone: Option<(Instant, String)>,
    pub(super) sort: Sort,
    pub(super) reversed: bool,
    pub(super) filter: String,
    pub(super) typing: bool,
    /// The selected line: of agents by what it is, of forwards by its place.
    selected: Option<(String, Option<String>)>,
    pub(super) place_in_forwards: usize,
    /// The agent whose forwards are shown.
    pub(super) opened: Option<String>,
    /// The lines of the table that fit on the screen.
    pub(super) page: usize,
}

impl Model {
    pub(super) fn new(place: &str, opened: Option<String>) -> Self {
        Self {
            place: place.to_owned(),
            status: None,
            before: None,
            at: None,
            gone: None,
            sort: Sort::Name,
            reversed: false,
            filter: String::new(),
            typing: false,
            selected: None,
            place_in_forwards: 0,
            opened,
            page: 10,
        }
    }

    /// What the gateway is to be asked for.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted { agent: self.opened.clone(), after: 0 }
    }

    /// The gateway has answered.
    pub(super) fn learn(&mut self, status: Status, now: Instant) {
        // Numbers of another process do not go on from those before.
        let same = self.status.as_ref().is_some_and(|before| before.started == status.started);
        self.before = if same { self.at.zip(self.status.take()) } else { None };
        (self.status, self.at, self.gone) = (Some(status), Some(now), None);
    }

    /// The gateway has not answered.
    pub(super) fn lose(&mut self, why: &str, now: Instant) {
        let since = self.gone.as_ref().map_or(now, |(since, _)| *since);
        self.gone = Some((since, why.to_owned()));
    }

    fn seconds(&self) -> Option<f64> {
        let (before, _) = self.before.as_ref()?;
        Some(self.at?.duration_since(*before).max(Duration::from_millis(1)).as_secs_f64())
    }

    /// Bytes a second toward targets, and from them; forwards opened, and denials, in a second.
    pub(super) fn rates(&self) -> [f64; 4] {
        let (Some(status), Some((_, before)), Some(seconds)) = (&self.status, &self.before, self.seconds()) else {
            return [0.0; 4];
        };
        let denied = |status: &Status| status.totals.denied.values().sum::<u64>();
        [
            (status.totals.to_target, before.totals.to_target),
            (status.totals.from_target, before.totals.from_target),
            (status.totals.opened, before.totals.opened),
            (denied(status), denied(before)),
        ]
        .map(|(now, then)| now.saturating_sub(then) as f64 / seconds)
    }

    /// The lines of the table of agents, in their order.
    pub(super) fn rows(&self) -> Vec<Row> {
        let Some(status) = &self.status else { return Vec::new() };
        let key = |carrier: &Carrier| (carrier.agent.clone(), carrier.replica.clone(), carrier.since);
        let before: HashMap<_, _> = self
            .before
            .iter()
            .flat_map(|(_, before)| &before.agents)
            .map(|carrier| (key(carrier), [carrier.to_target, carrier.from_target, carrier.opened]))
            .collect();
        let seconds = self.seconds().unwrap_or(1.0);
        let fits = |carrier: &&Carrier| {
            let replica = carrier.replica.as_deref().unwrap_or_default();
            carrier.agent.contains(&self.filter) || replica.contains(&self.filter)
        };
        let mut rows: Vec<Row> = status
            .agents
            .iter()
            .filter(fits)
            .map(|carrier| {
                let now = [carrier.to_target, carrier.from_target, carrier.opened];
                // A link that is new has moved all that it has since it was made.
                let fresh = if self.before.is_some() { [0; 3] } else { now };
                let then = before.get(&key(carrier)).copied().unwrap_or(fresh);
                let rates = std::array::from_fn(|at| now[at].saturating_sub(then[at]) as f64 / seconds);
                Row { carrier: carrier.clone(), rates }
            })
            .collect();
        rows.sort_by_key(|row| key(&row.carrier));
        let by_rate =
            |rows: &mut Vec<Row>, at: usize| rows.sort_by(|one, other| other.rates[at].total_cmp(&one.rates[at]));
        match self.sort {
            Sort::Name => {}
            Sort::State => rows.sort_by(|one, other| one.carrier.state.cmp(&other.carrier.state)),
            Sort::Live => rows.sort_by_key(|row| Reverse(row.carrier.live)),
            Sort::To => by_rate(&mut rows, 0),
            Sort::From => by_rate(&mut rows, 1),
            Sort::Opens => by_rate(&mut rows, 2),
        }
        if self.reversed {
            rows.reverse();
        }
        rows
    }

    /// The place of the selected line among `rows`.
    pub(super) fn selected(&self, rows: &[Row]) -> usize {
        let is = |row: &Row| {
            self.selected
                .as_ref()
                .is_some_and(|(agent, replica)| row.carrier.agent == *agent && row.carrier.replica == *replica)
        };
        rows.iter().position(is).unwrap_or_default()
    }

    /// A key was pressed.
    pub(super) fn press(&mut self, key: KeyEvent) -> Next {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if control && matches!(key.code, KeyCode::Char('c')) {
            return Next::End;
        }
        if self.typing {
            match key.code {
                KeyCode::Enter => self.typing = false,
                KeyCode::Esc => (self.typing, self.filter) = (false, String::new()),
                KeyCode::Backspace => _ = self.filter.pop(),
                KeyCode::Char(c) if !control && c.is_ascii_graphic() && self.filter.len() < 128 => self.filter.push(c),
                _ => {}
            }
            return Next::Stay;
        }
        match key.code {
            KeyCode::Char('q') => return Next::End,
            KeyCode::Up | KeyCode::Char('k') => self.step(-1),
            KeyCode::Down | KeyCode::Char('j') => self.step(1),
            KeyCode::PageUp => self.step(-self.screenful()),
            KeyCode::PageDown => self.step(self.screenful()),
            KeyCode::Home => self.step(isize::MIN / 2),
            KeyCode::End => self.step(isize::MAX / 2),
            KeyCode::Enter if self.opened.is_none() => {
                let rows = self.rows();
                if let Some(row) = rows.get(self.selected(&rows)) {
                    self.opened = Some(row.carrier.agent.clone());
                    self.place_in_forwards = 0;
                    if let Some(status) = &mut self.status {
                        status.forwards.clear();
                    }
                    return Next::Ask;
                }
            }
            KeyCode::Esc if self.opened.is_some() => self.opened = None,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Char('/') if self.opened.is_none() => self.typing = true,
            _ => {}
        }
        Next::Stay
    }

    fn screenful(&self) -> isize {
        isize::try_from(self.page.max(1)).unwrap_or(1)
    }

    fn step(&mut self, by: isize) {
        let moved = |at: usize, len: usize| at.saturating_add_signed(by).min(len.saturating_sub(1));
        if self.opened.is_some() {
            let len = self.status.as_ref().map_or(0, |status| status.forwards.len());
            self.place_in_forwards = moved(self.place_in_forwards, len);
            return;
        }
        let rows = self.rows();
        let at = moved(self.selected(&rows), rows.len());
        self.selected = rows.get(at).map(|row| (row.carrier.agent.clone(), row.carrier.replica.clone()));
    }
}

//! When something holds: from one moment on, until another, both of which may be left out.
//!
//! Pure functions of the moment that they are asked about. A window closes by itself; whoever lets something go on because
//! it was open asks again at its next edge.

use std::fmt;

use jiff::Timestamp;

use super::Reason;

/// The time in which something holds. The default holds always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Window {
    /// From when on it holds.
    pub not_before: Option<Timestamp>,
    /// From when on it does not hold any more.
    pub expires: Option<Timestamp>,
}

/// On which side of a window a moment lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// Before it opens, at this moment.
    NotYet(Timestamp),
    /// After it has closed, at this moment.
    Expired(Timestamp),
}

/// A window that closes before it opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it would never hold: expires, {expires}, is not after not_before, {not_before}")]
pub struct NeverOpen {
    not_before: Timestamp,
    expires: Timestamp,
}

impl Window {
    /// Whether it is open at the time `now`: at `not_before` it is already, at `expires` no longer.
    ///
    /// # Errors
    /// If it is closed, on which side.
    pub fn at(&self, now: Timestamp) -> Result<(), Closed> {
        if let Some(expires) = self.expires.filter(|expires| *expires <= now) {
            return Err(Closed::Expired(expires));
        }
        match self.not_before.filter(|not_before| now < *not_before) {
            Some(not_before) => Err(Closed::NotYet(not_before)),
            None => Ok(()),
        }
    }

    /// Checks that there is a moment at which it is open.
    ///
    /// # Errors
    /// If there is none.
    pub fn check(&self) -> Result<(), NeverOpen> {
        match (self.not_before, self.expires) {
            (Some(not_before), Some(expires)) if expires <= not_before => Err(NeverOpen { not_before, expires }),
            _ => Ok(()),
        }
    }

    /// The moments at which it opens or closes.
    pub fn edges(&self) -> impl Iterator<Item = Timestamp> + use<> {
        self.not_before.into_iter().chain(self.expires)
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.not_before, self.expires) {
            (None, None) => f.write_str("always"),
            (Some(from), None) => write!(f, "from {from}"),
            (None, Some(until)) => write!(f, "until {until}"),
            (Some(from), Some(until)) => write!(f, "from {from} until {until}"),
        }
    }
}

impl Closed {
    /// The reason of a denial for it.
    #[must_use]
    pub fn reason(self) -> Reason {
        match self {
            Self::NotYet(_) => Reason::NotYetValid,
            Self::Expired(_) => Reason::Expired,
        }
    }
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotYet(at) => write!(f, "it holds only from {at} on"),
            Self::Expired(at) => write!(f, "it has expired at {at}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect(text)
    }

    #[test]
    fn a_window_is_open_from_its_first_moment_up_to_its_last() {
        let [before, from, within, until] =
            ["2026-12-31T23:59:59.999Z", "2027-01-01T00:00:00Z", "2027-01-01T12:00:00Z", "2027-01-02T00:00:00Z"]
                .map(at);
        let both = Window { not_before: Some(from), expires: Some(until) };
        for (window, now, expected) in [
            (both, before, Err(Closed::NotYet(from))),
            (both, from, Ok(())),
            (both, within, Ok(())),
            (both, until, Err(Closed::Expired(until))),
            (Window { not_before: None, ..both }, before, Ok(())),
            (Window { not_before: None, ..both }, until, Err(Closed::Expired(until))),
            (Window { expires: None, ..both }, before, Err(Closed::NotYet(from))),
            (Window { expires: None, ..both }, until, Ok(())),
            (Window::default(), before, Ok(())),
        ] {
            assert_eq!(window.at(now), expected, "{window} at {now}");
        }
        assert_eq!(both.edges().collect::<Vec<_>>(), [from, until]);
        assert_eq!(both.check(), Ok(()));
        for never in
            [Window { not_before: Some(until), ..both }, Window { not_before: Some(until), expires: Some(from) }]
        {
            let error = never.check().expect_err("it is never open");
            assert!([before, from, within, until].iter().all(|now| never.at(*now).is_err()), "{error}");
        }
    }
}

//! Whether the agent can be used, organisation by organisation.
//!
//! Promised: an organisation counts as linked while one of its gateways has a link to which it gives forwards: not one that is
//! gone, or whose gateway goes away, or whose place another process has taken. A gateway that has gone silent is noticed by the
//! keepalive, within 40 s.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::serve::{Link, Session};
use super::{Agent, Post};
use crate::audit::Culprit;
use crate::health::{Part, State};
use crate::identity::OrganisationId;

/// How the agent stands with each gateway at which it keeps a link, by organisation and number.
#[derive(Default)]
pub(super) struct Standings(Mutex<BTreeMap<(OrganisationId, u32), Standing>>);

struct Standing {
    /// Since when it is as it is.
    since: Timestamp,
    state: Linked,
}

enum Linked {
    /// There is a link.
    By(Tie),
    /// There is none, and why.
    Not(&'static str),
}

/// What tells of a link's end.
struct Tie {
    session: Weak<Session>,
    gone: CancellationToken,
    superseded: CancellationToken,
}

impl Tie {
    /// # Errors
    /// If the link gets no forwards, with why.
    fn holds(&self) -> Result<(), &'static str> {
        let Some(session) = self.session.upgrade() else { return Err(LOST) };
        if self.gone.is_cancelled() {
            return Err(LOST);
        }
        if self.superseded.is_cancelled() {
            return Err(SUPERSEDED);
        }
        if session.departure.is_told() {
            return Err("its gateway goes away");
        }
        Ok(())
    }
}

pub(super) const LOST: &str = "the link was lost";
pub(super) const SUPERSEDED: &str = "another process with this replica name, started later, has taken its place";

impl Standings {
    /// From now on a link is kept there.
    pub(super) fn expect(&self, post: &Post) {
        let state = Linked::Not("there was no link yet");
        self.all().insert(key(post), Standing { since: Timestamp::now(), state });
    }

    /// No link is kept there any more.
    pub(super) fn forget(&self, post: &Post) {
        self.all().remove(&key(post));
    }

    /// There is a link, in the place of the one before if there was one.
    pub(super) fn linked(&self, post: &Post, link: &Link) {
        let session = link.session();
        let tie = Tie {
            session: std::sync::Arc::downgrade(session),
            gone: session.switch.gone().clone(),
            superseded: link.superseded().clone(),
        };
        let mut all = self.all();
        let Some(standing) = all.get_mut(&key(post)) else { return };
        standing.look();
        if matches!(standing.state, Linked::Not(_)) {
            standing.since = Timestamp::now();
        }
        standing.state = Linked::By(tie);
    }

    /// The link is no more, or gets no more forwards.
    pub(super) fn lost(&self, post: &Post, why: &'static str) {
        if let Some(standing) = self.all().get_mut(&key(post)) {
            standing.fall(why);
        }
    }

    /// An attempt to make a link has failed, which says nothing of the one that there may be.
    pub(super) fn failed(&self, post: &Post, why: &'static str) {
        if let Some(standing) = self.all().get_mut(&key(post)) {
            standing.look();
            if let Linked::Not(last) = &mut standing.state {
                *last = why;
            }
        }
    }

    /// A part for each organisation.
    fn parts(&self) -> Vec<Part> {
        let mut parts: BTreeMap<OrganisationId, Part> = BTreeMap::new();
        for ((organisation, _), standing) in &mut *self.all() {
            standing.look();
            let since = Some(standing.since);
            let part = match &standing.state {
                Linked::By(_) => Part::ready("links"),
                Linked::Not(why) => Part::failing(
                    "links",
                    format!("no usable link: {why}"),
                    "look at the agent's log, which names the gateway and the cause; principals cannot reach it meanwhile",
                ),
            };
            let part = part.of(organisation).since(since);
            parts
                .entry(organisation.clone())
                .and_modify(|known| {
                    // One that holds is enough, since the first of them; of those that do not, the last one that did tells.
                    let better = match (known.ready, part.ready) {
                        (true, true) => part.since < known.since,
                        (false, false) => part.since > known.since,
                        (known, new) => new && !known,
                    };
                    if better {
                        *known = part.clone();
                    }
                })
                .or_insert(part);
        }
        parts.into_values().collect()
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<(OrganisationId, u32), Standing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standing {
    /// Looks whether the link still holds.
    fn look(&mut self) {
        if let Linked::By(tie) = &self.state
            && let Err(why) = tie.holds()
        {
            self.fall(why);
        }
    }

    fn fall(&mut self, why: &'static str) {
        if matches!(self.state, Linked::By(_)) {
            self.since = Timestamp::now();
        }
        self.state = Linked::Not(why);
    }
}

fn key(post: &Post) -> (OrganisationId, u32) {
    (post.name.organisation.clone(), post.way)
}

impl State for Agent {
    fn side(&self) -> &'static str {
        "agent"
    }

    async fn parts(&self) -> Vec<Part> {
        let mut parts = self.standings.parts();
        parts.push(Part::trail(*self.trail.failed().borrow(), self.trail.culprit().as_ref().map(Culprit::words)));
        parts.push(Part::drain(self.drain.since()));
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn not(why: &'static str, since: &str) -> Standing {
        Standing { since: since.parse().expect("a time"), state: Linked::Not(why) }
    }

    #[test]
    fn an_organisation_without_links_says_which_gave_out_last_and_when() {
        let standings = Standings::default();
        let (acme, globex): (OrganisationId, OrganisationId) =
            ("acme".parse().expect("id"), "globex".parse().expect("id"));
        standings.all().insert((acme.clone(), 1), not("first", "2026-11-21T10:00:00Z"));
        standings.all().insert((acme, 2), not("second", "2026-11-21T11:00:00Z"));
        standings.all().insert((globex, 3), not("third", "2026-11-21T09:00:00Z"));
        let parts = standings.parts();
        let told: Vec<_> = parts.iter().map(|part| (part.name(), part.ready, part.detail.as_str())).collect();
        assert_eq!(
            told,
            [
                ("links acme".to_owned(), false, "no usable link: second"),
                ("links globex".to_owned(), false, "no usable link: third")
            ]
        );
        assert_eq!(parts[0].since, Some("2026-11-21T11:00:00Z".parse().expect("a time")));
    }

    #[test]
    fn a_link_whose_session_is_gone_has_fallen() {
        let standings = Standings::default();
        let tie = Tie { session: Weak::new(), gone: CancellationToken::new(), superseded: CancellationToken::new() };
        let acme: OrganisationId = "acme".parse().expect("id");
        let long_ago = "2026-01-01T00:00:00Z".parse().expect("a time");
        standings.all().insert((acme, 1), Standing { since: long_ago, state: Linked::By(tie) });
        let parts = standings.parts();
        assert!(!parts[0].ready && parts[0].since > Some(long_ago), "{parts:?}");
        assert_eq!(parts[0].detail, format!("no usable link: {LOST}"));
        assert_eq!(standings.parts()[0].since, parts[0].since, "it fell once");
    }
}

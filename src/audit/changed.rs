//! What came, went and changed, as a record has it: bounded, since a registry can be replaced as a whole.

use serde::Serialize;

use super::record::text;
use crate::limits::TRAIL_CHANGES_MAX;
use crate::reload::Changes;

/// Ids and fingerprints, as many as fit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Changed {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    removed: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    added: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    changed: Vec<String>,
    /// How many there are besides.
    #[serde(skip_serializing_if = "is_none")]
    more: usize,
}

impl Changed {
    /// What fits of `changes`, and first what is gone: that is a revocation. `None` if nothing differs.
    pub(super) fn new(changes: &Changes) -> Option<Self> {
        let mut listed = Self::default();
        let mut room = TRAIL_CHANGES_MAX;
        let [gone, new, changed] = changes.lists();
        let Self { removed, added, changed: other, more } = &mut listed;
        for (from, to) in [(gone, removed), (new, added), (changed, other)] {
            for thing in from {
                let thing = text(thing).unwrap_or_default();
                // As it will be written, with what is escaped in it, and a comma.
                let taken = serde_json::to_string(&thing).map_or(usize::MAX, |json| json.len() + 1);
                match room.checked_sub(taken) {
                    Some(left) => {
                        room = left;
                        to.push(thing);
                    }
                    None => *more += 1,
                }
            }
        }
        (listed != Self::default()).then_some(listed)
    }
}

fn is_none(number: &usize) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_no_list() {
        assert_eq!(Changed::new(&Changes::default()), None);
    }

    #[test]
    fn what_is_gone_comes_before_the_rest_and_the_rest_is_counted() {
        let mut changes = Changes::default();
        for number in 0..1_000 {
            changes.add(format_args!("key {number} \"\u{1}\" {}", "x".repeat(100)));
        }
        changes.remove("key of agent acme/prod");
        let listed = Changed::new(&changes).expect("a list");
        assert_eq!(listed.removed, ["key of agent acme/prod"]);
        assert!(listed.added.len() > 100 && listed.more > 100, "{} and {}", listed.added.len(), listed.more);
        assert_eq!(listed.added.len() + listed.more, 1_000);
        let written = serde_json::to_string(&listed).expect("JSON").len();
        assert!(written < TRAIL_CHANGES_MAX + 100, "{written}");
    }
}

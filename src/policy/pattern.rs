//! Patterns for host names, label by label.
//!
//! Promised: a pattern stands for names only, never for a literal address. A wildcard is a whole label: `*` stands for
//! exactly one label, `**` for one or more, and nothing matches a part of a label. The last label is always spelt out, so
//! that no pattern reaches beyond the zone that its author had in mind. A name of a service (`_postgresql._tcp.db.internal`)
//! is matched by a wildcard where something is denied, and never where something is granted: what is looked up for such a
//! name are other hosts and ports.

use std::fmt;
use std::str::FromStr;

use crate::target::{Name, TargetError};

/// A name, or names with a common form. Written and compared in normal form: lower case, no trailing dot.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPattern {
    text: Box<str>,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Kind {
    /// One name.
    Exact(Name),
    /// Some label is a wildcard.
    Labels(Box<[Label]>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Label {
    Literal(Box<str>),
    /// `*`
    One,
    /// `**`
    Many,
}

/// Why a text is no pattern for host names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HostPatternError {
    /// A `*` within a label.
    #[error("a wildcard is a whole label: `*` stands for exactly one label, `**` for one or more")]
    Part,
    /// Nothing is spelt out at the end.
    #[error("the last label must be spelt out, as in \"*.db.internal\"")]
    Last,
    /// It looks like an address, or like a part of one.
    #[error("a pattern for names cannot stand for addresses: write a network, such as 10.20.0.0/16")]
    Numeric,
    /// Without its wildcards it would be no name.
    #[error(transparent)]
    Name(#[from] TargetError),
}

impl HostPattern {
    /// Whether what is granted to the pattern is granted to `name`.
    #[must_use]
    pub fn grants(&self, name: &Name) -> bool {
        match &self.kind {
            Kind::Exact(exact) => exact == name,
            Kind::Labels(labels) => !name.is_service() && fit(labels, name),
        }
    }

    /// Whether what is denied to the pattern is denied to `name`.
    #[must_use]
    pub fn denies(&self, name: &Name) -> bool {
        match &self.kind {
            Kind::Exact(exact) => exact == name,
            Kind::Labels(labels) => fit(labels, name),
        }
    }

    /// The one name that it stands for, if it has no wildcard.
    #[must_use]
    pub fn name(&self) -> Option<&Name> {
        match &self.kind {
            Kind::Exact(name) => Some(name),
            Kind::Labels(_) => None,
        }
    }

    /// The pattern in its normal form.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Whether the labels of a name are, from the first to the last, what the pattern has.
fn fit(pattern: &[Label], name: &Name) -> bool {
    let labels: Vec<&str> = name.as_str().split('.').collect();
    // What the pattern so far can have used up: `reached[n]` if n labels. Takes the product of both lengths, whatever they hold.
    let mut reached = vec![false; labels.len() + 1];
    reached[0] = true;
    for wanted in pattern {
        let mut next = vec![false; labels.len() + 1];
        for (used, label) in labels.iter().enumerate() {
            next[used + 1] = match wanted {
                Label::Literal(literal) => reached[used] && **literal == **label,
                Label::One => reached[used],
                Label::Many => reached[used] || next[used],
            };
        }
        reached = next;
    }
    reached[labels.len()]
}

impl From<Name> for HostPattern {
    /// The pattern that stands for this one name.
    fn from(name: Name) -> Self {
        Self { text: name.as_str().into(), kind: Kind::Exact(name) }
    }
}

impl FromStr for HostPattern {
    type Err = HostPatternError;

    fn from_str(text: &str) -> Result<Self, HostPatternError> {
        if !text.contains('*') {
            return Ok(text.parse::<Name>()?.into());
        }
        let text = text.strip_suffix('.').unwrap_or(text);
        let labels: Vec<&str> = text.split('.').collect();
        // Two dots at the end: one of them would be taken off again with the name below, and leave a wildcard last.
        if text.ends_with('.') {
            return Err(TargetError::Label.into());
        }
        if labels.iter().any(|label| label.contains('*') && !matches!(*label, "*" | "**")) {
            return Err(HostPatternError::Part);
        }
        // Before anything is said of the last label: of whoever writes `10.20.*`, addresses are on the mind.
        let numeric = |label: &str| label.parse::<Name>() == Err(TargetError::Numeric);
        if labels.iter().all(|label| label.contains('*') || numeric(label)) && labels.iter().any(|label| numeric(label))
        {
            return Err(HostPatternError::Numeric);
        }
        if labels.last().is_none_or(|label| label.contains('*')) {
            return Err(HostPatternError::Last);
        }
        // With a letter for each wildcard it is the shortest name that it stands for: all that holds for names is in there.
        let shortest: Vec<&str> = labels.iter().map(|label| if label.contains('*') { "a" } else { label }).collect();
        let shortest: Name = shortest.join(".").parse().map_err(|error| match error {
            TargetError::Numeric => HostPatternError::Numeric,
            error => HostPatternError::Name(error),
        })?;
        let labels: Box<[Label]> = shortest
            .as_str()
            .split('.')
            .zip(labels)
            .map(|(normal, written)| match written {
                "*" => Label::One,
                "**" => Label::Many,
                _ => Label::Literal(normal.into()),
            })
            .collect();
        let text: Vec<&str> = labels
            .iter()
            .map(|label| match label {
                Label::Literal(literal) => literal,
                Label::One => "*",
                Label::Many => "**",
            })
            .collect();
        Ok(Self { text: text.join(".").into(), kind: Kind::Labels(labels) })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(text: &str) -> HostPattern {
        text.parse().expect(text)
    }

    fn name(text: &str) -> Name {
        text.parse().expect(text)
    }

    #[test]
    fn refuses_what_is_not_label_wise() {
        use HostPatternError::{Last, Numeric, Part};
        let long = format!("*.{}", "a".repeat(64));
        let longer = format!("*.{}", "abcdefgh.".repeat(28) + "a");
        for (text, error) in [
            ("*", Last),
            ("**", Last),
            ("*.*", Last),
            ("db.*", Last),
            ("db.**", Last),
            ("db.*.", Last),
            ("*.**", Last),
            ("db*", Part),
            ("*db.internal", Part),
            ("db*.internal", Part),
            ("d*b.internal", Part),
            ("***.internal", Part),
            ("*-1.internal", Part),
            ("a.**b.internal", Part),
            ("10.20.*", Numeric),
            ("10.20.*.*", Numeric),
            ("10.**", Numeric),
            ("*.1", Numeric),
            ("**.0x7f", Numeric),
            ("*.20.0.5", Numeric),
            ("a.*.1", Numeric),
            ("", HostPatternError::Name(TargetError::Empty)),
            (".", HostPatternError::Name(TargetError::Empty)),
            ("*.", Last),
            ("*..", HostPatternError::Name(TargetError::Label)),
            ("**..", HostPatternError::Name(TargetError::Label)),
            ("db.*..", HostPatternError::Name(TargetError::Label)),
            ("*.internal..", HostPatternError::Name(TargetError::Label)),
            ("*..internal", HostPatternError::Name(TargetError::Label)),
            (".*.internal", HostPatternError::Name(TargetError::Label)),
            ("*.-a.internal", HostPatternError::Name(TargetError::Label)),
            ("*.inter nal", HostPatternError::Name(TargetError::Character)),
            ("*.bücher", HostPatternError::Name(TargetError::Character)),
            ("*.internal:1", HostPatternError::Name(TargetError::Character)),
            ("*.a?c.internal", HostPatternError::Name(TargetError::Character)),
            ("*.[ab].internal", HostPatternError::Name(TargetError::Character)),
            ("*。internal", Part),
            ("10.20.0.5", HostPatternError::Name(TargetError::Numeric)),
            ("::1", HostPatternError::Name(TargetError::Character)),
            (long.as_str(), HostPatternError::Name(TargetError::TooLong)),
            (longer.as_str(), HostPatternError::Name(TargetError::TooLong)),
        ] {
            assert_eq!(text.parse::<HostPattern>(), Err(error), "{text:?}");
        }
    }

    #[test]
    fn matches_label_by_label() {
        for (text, hits, misses) in [
            (
                "orders.db.internal",
                &["orders.db.internal", "Orders.DB.Internal."][..],
                &[
                    "db.internal",
                    "x.orders.db.internal",
                    "orders.db.internal.evil.com",
                    "eorders.db.internal",
                    "orders",
                ][..],
            ),
            (
                "*.db.internal",
                &["orders.db.internal", "a-b.db.internal", "xn--bcher-kva.db.internal"],
                &[
                    "db.internal",
                    "a.b.db.internal",
                    "orders.db.internal.evil.com",
                    "ordersdb.internal",
                    "x.edb.internal",
                ],
            ),
            (
                "**.db.internal",
                &["orders.db.internal", "a.b.c.db.internal"],
                &["db.internal", "edb.internal", "a.db.internal.com", "a.db.internal.evil.db", "x.edb.internal"],
            ),
            ("a.*.c", &["a.b.c"], &["a.c", "a.b.b.c", "a.b.c.d"]),
            ("a.**.c", &["a.b.c", "a.b.b.c", "a.c.c", "a.a.c.c"], &["a.c", "a.b.cc", "b.b.c"]),
            ("*.*.c", &["a.b.c"], &["b.c", "a.a.b.c"]),
            ("*.**.c", &["a.b.c", "x.a.b.c"], &["b.c", "c"]),
            ("**.b.**.c", &["a.b.a.c", "a.b.b.c", "b.b.b.c"], &["a.b.c", "b.a.c", "a.a.a.c"]),
            ("_x.*.c", &["_x.b.c"], &["x.b.c"]),
        ] {
            let pattern = pattern(text);
            for hit in hits {
                assert!(pattern.grants(&name(hit)) && pattern.denies(&name(hit)), "{text} {hit}");
            }
            for miss in misses {
                assert!(!pattern.grants(&name(miss)) && !pattern.denies(&name(miss)), "{text} {miss}");
            }
        }
    }

    #[test]
    fn a_wildcard_denies_services_and_grants_none() {
        let service = name("_postgresql._tcp.db.internal");
        for text in ["**.db.internal", "*.*.db.internal", "*._tcp.db.internal", "_postgresql.*.db.internal"] {
            assert!(!pattern(text).grants(&service), "{text}");
            assert!(pattern(text).denies(&service), "{text}");
        }
        let exact = pattern("_PostgreSQL._tcp.db.internal");
        assert!(exact.grants(&service) && exact.denies(&service));
        // Only the form of a service is set apart.
        assert!(pattern("*.db.internal").grants(&name("_orders.db.internal")));
    }

    /// The definition, written down a second time: the first label of the pattern decides how many of the name's it takes.
    fn naive(pattern: &[&str], labels: &[&str]) -> bool {
        match pattern {
            [] => labels.is_empty(),
            ["**", rest @ ..] => (1..=labels.len()).any(|taken| naive(rest, &labels[taken..])),
            ["*", rest @ ..] => !labels.is_empty() && naive(rest, &labels[1..]),
            [literal, rest @ ..] => labels.first() == Some(literal) && naive(rest, &labels[1..]),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4_000, ..ProptestConfig::default() })]

        #[test]
        fn matches_what_the_definition_says_and_nothing_else(
            pattern in prop::collection::vec(prop::sample::select(vec!["a", "b", "ab", "*", "**"]), 1..7),
            labels in prop::collection::vec(prop::sample::select(vec!["a", "b", "ab", "aab"]), 1..9),
        ) {
            let text = pattern.join(".");
            let Ok(parsed) = text.parse::<HostPattern>() else {
                prop_assert!(pattern.last().is_some_and(|last| last.contains('*')));
                return Ok(());
            };
            prop_assert_eq!(parsed.to_string(), text);
            let name = name(&labels.join("."));
            prop_assert_eq!(parsed.grants(&name), naive(&pattern, &labels));
            prop_assert_eq!(parsed.denies(&name), naive(&pattern, &labels));
        }

        #[test]
        fn a_pattern_has_one_form(text in "[a-zA-Z0-9_*.-]{0,24}|(\\*{1,2}\\.|[a-c]{1,3}\\.){0,5}[a-z]{1,4}\\.?|\\PC{0,16}") {
            let Ok(pattern) = text.parse::<HostPattern>() else { return Ok(()) };
            prop_assert_eq!(pattern.to_string().parse(), Ok(pattern.clone()));
            prop_assert_eq!(text.to_ascii_uppercase().parse(), Ok(pattern.clone()));
            prop_assert!(pattern.to_string().parse::<std::net::IpAddr>().is_err());
            prop_assert_eq!(pattern.name().is_some(), !text.contains('*'));
        }
    }
}

//! What an examination has found: stages in their order, each with a verdict, what was tried and seen, and what to do next.
//!
//! Promised: a stage is told when it is done, not at the end; what an earlier stage that is broken stands in the way of is
//! skipped, and the summary names the first broken stage alone, with its next step; a text that comes from a stranger is
//! bounded and holds nothing that could act on a terminal. The JSON form has a version ([`VERSION`]) and keeps its fields.
//!
//! Nothing here tries anything or waits: `agent::doctor` and `gateway::doctor` do.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// The stage that stands for the examination itself, where there is something to say of that.
pub const DOCTOR: &str = "doctor";

/// The version of the JSON form. Fields may be added; none changes its meaning while this stays.
pub const VERSION: u32 = 1;

/// What became of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// In order.
    Ok,
    /// It works, but not as it should, or not for long.
    Warning,
    /// It does not work.
    Broken,
    /// Not looked at: what comes before it is broken, or it cannot be looked at here.
    Skipped,
}

/// What was found at one stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Which stage: one word, such as `dns` or `target`.
    pub stage: String,
    /// Of what: a gateway, a rule and its target, a file.
    pub subject: String,
    /// What became of it.
    pub verdict: Verdict,
    /// What was tried, and what was seen.
    pub evidence: String,
    /// What somebody can do about it; absent where there is nothing to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// How long it took.
    #[serde(default)]
    pub elapsed_ms: u64,
}

impl Finding {
    /// A finding without a next step.
    #[must_use]
    pub fn new(stage: &str, subject: &str, verdict: Verdict, evidence: &str) -> Self {
        Self {
            stage: plain(stage),
            subject: plain(subject),
            verdict,
            evidence: plain(evidence),
            next: None,
            elapsed_ms: 0,
        }
    }

    /// The same with a next step.
    #[must_use]
    pub fn advising(self, next: &str) -> Self {
        Self { next: Some(plain(next)).filter(|next| !next.is_empty()), ..self }
    }

    /// The same as it may be taken from somebody else: bounded, and with nothing that could act on a terminal.
    #[must_use]
    pub fn tidied(self) -> Self {
        let Self { stage, subject, verdict, evidence, next, elapsed_ms } = self;
        let tidy = Self::new(&stage, &subject, verdict, &evidence);
        Self { elapsed_ms, ..tidy.advising(&next.unwrap_or_default()) }
    }

    /// The finding for a terminal of [`COLUMNS`] columns, with a line break at the end.
    #[must_use]
    pub fn text(&self, style: Style) -> String {
        let mark = match (self.verdict, style) {
            (Verdict::Ok, Style::Unicode) => "\u{2713}",
            (Verdict::Warning, Style::Unicode) => "\u{26a0}",
            (Verdict::Broken, Style::Unicode) => "\u{2717}",
            (Verdict::Skipped, Style::Unicode) => "\u{2013}",
            (Verdict::Ok, Style::Ascii) => "ok  ",
            (Verdict::Warning, Style::Ascii) => "WARN",
            (Verdict::Broken, Style::Ascii) => "FAIL",
            (Verdict::Skipped, Style::Ascii) => "skip",
        };
        let mut text = String::new();
        wrap(&mut text, &format!("{mark} {:<13}", self.stage), "    ", &self.subject);
        wrap(&mut text, "    ", "    ", &self.evidence);
        if let Some(next) = &self.next {
            let arrow = if style == Style::Unicode { "    \u{2192} " } else { "    -> " };
            wrap(&mut text, arrow, "      ", next);
        }
        match style {
            Style::Unicode => text,
            Style::Ascii => text.chars().map(|c| if c.is_ascii() { c } else { '?' }).collect(),
        }
    }
}

/// What the terminal shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// UTF-8.
    Unicode,
    /// Nothing but ASCII.
    Ascii,
}

/// All that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// What was examined: `agent`, `gateway`, or `remote` for an agent that was asked over its link.
    pub of: String,
    /// The worst verdict: `ok`, `warning` or `broken`.
    pub verdict: Verdict,
    /// Where the first broken stage stands in `stages`, from 0; absent where none is broken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_broken: Option<usize>,
    /// The stages, in the order in which they were looked at.
    pub stages: Vec<Finding>,
}

impl Report {
    /// A report of these findings.
    #[must_use]
    pub fn new(of: &str, stages: Vec<Finding>) -> Self {
        let first_broken = stages.iter().position(|finding| finding.verdict == Verdict::Broken);
        let warned = stages.iter().any(|finding| finding.verdict == Verdict::Warning);
        let verdict = match (first_broken, warned) {
            (Some(_), _) => Verdict::Broken,
            (None, true) => Verdict::Warning,
            (None, false) => Verdict::Ok,
        };
        Self { version: VERSION, of: of.to_owned(), verdict, first_broken, stages }
    }

    /// The first stage that is broken.
    #[must_use]
    pub fn broken(&self) -> Option<&Finding> {
        self.stages.get(self.first_broken?)
    }

    /// The finding that says that not all was looked at, if there is one.
    #[must_use]
    pub fn left_out(&self) -> Option<&Finding> {
        self.stages.iter().find(|finding| finding.stage == DOCTOR && finding.verdict == Verdict::Skipped)
    }

    /// The summary for a terminal, with a line break at the end.
    #[must_use]
    pub fn summary(&self, style: Style) -> String {
        let count = |verdict| self.stages.iter().filter(|finding| finding.verdict == verdict).count();
        let (warnings, skipped) = (count(Verdict::Warning), count(Verdict::Skipped));
        let mut text = String::new();
        match self.broken() {
            Some(first) => {
                let what = format!("{} ({})", first.stage, first.subject);
                wrap(&mut text, "broken: ", "    ", &what);
                if let Some(next) = &first.next {
                    wrap(&mut text, "    next: ", "      ", next);
                }
            }
            None if skipped == self.stages.len() => text.push_str("nothing was looked at\n"),
            None => {
                let _ = write!(text, "all well: {} stages", self.stages.len() - skipped);
                if warnings > 0 {
                    let _ = write!(text, ", {warnings} with a warning");
                }
                if skipped > 0 {
                    let _ = write!(text, ", {skipped} not looked at");
                }
                text.push('\n');
            }
        }
        match style {
            Style::Unicode => text,
            Style::Ascii => text.chars().map(|c| if c.is_ascii() { c } else { '?' }).collect(),
        }
    }
}

/// An examination under way. Whoever runs it hears of each finding when it is made.
pub struct Examination<'a> {
    findings: Vec<Finding>,
    tell: Box<dyn FnMut(&Finding) + 'a>,
}

impl<'a> Examination<'a> {
    /// One that has found nothing yet. `tell` hears of each finding.
    #[must_use]
    pub fn new(tell: impl FnMut(&Finding) + 'a) -> Self {
        Self { findings: Vec::new(), tell: Box::new(tell) }
    }

    /// Takes a finding on.
    pub fn add(&mut self, finding: Finding) {
        (self.tell)(&finding);
        self.findings.push(finding);
    }

    /// Whether any stage is broken so far.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.findings.iter().any(|finding| finding.verdict == Verdict::Broken)
    }

    /// The report of all that was found.
    #[must_use]
    pub fn report(self, of: &str) -> Report {
        Report::new(of, self.findings)
    }
}

/// What can be shown of a text that may be a stranger's.
fn plain(text: &str) -> String {
    let shown = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    // Marks that turn the direction of writing could make a line read as another one.
    let shown =
        shown.filter(|c| !matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'));
    shown.take(TEXT_MAX).collect()
}

/// Writes words in lines of [`COLUMNS`], the first after `first`, the others after `rest`. A word that is longer has a line of
/// its own: what is to be copied must stay whole.
fn wrap(text: &mut String, first: &str, rest: &str, words: &str) {
    let mut line = first.to_owned();
    let mut width = line.chars().count();
    let mut begun = false;
    for word in words.split_whitespace() {
        let len = word.chars().count();
        if begun && width + 1 + len > COLUMNS {
            text.push_str(line.trim_end());
            text.push('\n');
            rest.clone_into(&mut line);
            width = rest.chars().count();
            begun = false;
        }
        if begun || !line.ends_with(' ') {
            line.push(' ');
            width += 1;
        }
        line.push_str(word);
        width += len;
        begun = true;
    }
    if begun || !first.trim().is_empty() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

/// What a terminal shows at least.
pub const COLUMNS: usize = 80;

/// The longest text of a finding, in characters: a public RSA key with the words around it fits in, a stranger's novel does not.
const TEXT_MAX: usize = 2_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(stage: &str, verdict: Verdict) -> Finding {
        Finding::new(stage, "tls://gateway:443", verdict, "seen")
    }

    #[test]
    fn the_first_broken_stage_is_named_alone() {
        let stages = vec![
            finding("dns", Verdict::Ok),
            finding("tcp", Verdict::Broken).advising("open the firewall"),
            finding("tls", Verdict::Skipped),
            finding("target", Verdict::Broken).advising("start the database"),
        ];
        let report = Report::new("agent", stages);
        assert_eq!((report.first_broken, report.verdict), (Some(1), Verdict::Broken));
        let summary = report.summary(Style::Ascii);
        assert!(summary.contains("tcp") && summary.contains("open the firewall"), "{summary}");
        assert!(!summary.contains("target") && !summary.contains("database"), "{summary}");
        let warned = Report::new("agent", vec![finding("dns", Verdict::Ok), finding("tls", Verdict::Warning)]);
        assert_eq!((warned.first_broken, warned.verdict), (None, Verdict::Warning));
        assert!(warned.summary(Style::Ascii).contains("1 with a warning"));
    }

    #[test]
    fn lines_fit_a_terminal_and_what_is_to_be_copied_stays_whole() {
        let key = format!("ssh-ed25519 {}", "A".repeat(120));
        let long = "many words of evidence that go on and on ".repeat(6);
        let made =
            Finding::new("key", "tls://gateway:443", Verdict::Broken, &long).advising(&format!("send {key} to them"));
        let text = made.text(Style::Unicode);
        assert!(text.contains(&"A".repeat(120)), "{text}");
        for line in text.lines() {
            assert!(line.chars().count() <= COLUMNS || line.contains("AAAA"), "{line}");
        }
        assert!(text.starts_with('\u{2717}'));
        assert!(made.text(Style::Ascii).is_ascii());
    }

    #[test]
    fn strangers_texts_do_nothing_to_a_terminal() {
        let evil = format!("it said \u{1b}[2J\u{7}\n\u{202e}{}", "x".repeat(10_000));
        let made = Finding::new("ssh", "s", Verdict::Broken, &evil).advising(&evil);
        for text in [&made.evidence, made.next.as_ref().expect("a step")] {
            assert!(!text.chars().any(char::is_control) && !text.contains('\u{202e}'), "{text}");
            assert!(text.chars().count() <= TEXT_MAX);
        }
        let raw = Finding { evidence: evil, ..made.clone() };
        assert_eq!(raw.tidied().evidence, made.evidence);
    }

    #[test]
    fn the_json_form_is_frozen() {
        let report = Report::new("agent", vec![finding("dns", Verdict::Broken).advising("ask")]);
        let text = serde_json::to_string(&report).expect("a report");
        assert_eq!(
            text,
            "{\"version\":1,\"of\":\"agent\",\"verdict\":\"broken\",\"first_broken\":0,\"stages\":[{\"stage\":\"dns\",\
             \"subject\":\"tls://gateway:443\",\"verdict\":\"broken\",\"evidence\":\"seen\",\"next\":\"ask\",\
             \"elapsed_ms\":0}]}"
        );
        assert_eq!(serde_json::from_str::<Report>(&text).expect("the same"), report);
    }
}

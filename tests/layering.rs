//! The direction of imports, and the crates that stay behind fences.
//!
//! Promised: every source file belongs to a row of [`ROWS`]; a module names only modules of rows below its own, or of its
//! own subtree; a crate of [`FENCES`] is named only where its fence allows. What is named counts, wherever it stands: in a
//! `use`, in an expression, in a type, in a macro's body, in a test module. Comments and strings do not, save strings in
//! attributes that are a path.
//!
//! The checker reads tokens, not types. Ways to hide a path from it are violations themselves: another name for the crate
//! root or a fenced crate, globs of the root, `extern crate`, `#[path]`, `include!`, a macro's variable right after the root.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Who may import whom: each row only from those before it. The lowest row of the design has three steps here: what needs
/// nothing, the keys that need bounds and secrets, the reader of documents that hold ids.
const ROWS: &[(&str, &[&str])] = &[
    ("0", &["target", "secret", "limits", "backoff", "rate", "network", "chain", "task", "delegate", "diagnosis"]),
    ("0, second step", &["identity", "systemd", "metrics"]),
    ("0, third step", &["document", "drain", "trace"]),
    ("1", &["policy", "postgres", "tls", "resolve", "token", "reload"]),
    ("2", &["audit", "registry", "provision", "health"]),
    ("3", &["tunnel"]),
    ("3, second step", &["service"]),
    ("4", &["agent", "gateway", "proxy", "client"]),
    ("5", &["config", "telemetry"]),
    ("6", &["cli"]),
];

/// Which modules, with what lies below them, may name a crate.
const FENCES: &[(&str, &[&str])] = &[
    ("russh", &["tunnel::ssh", "gateway::door::ssh", "client", "identity"]),
    ("rustls", &["tls"]),
    ("tokio_rustls", &["tls"]),
    ("httparse", &["tunnel::http"]),
    ("tokio_postgres", &["postgres", "registry::postgres", "provision::apply"]),
    ("jsonwebtoken", &["token"]),
    ("clap", &["cli"]),
    ("anyhow", &["main", "cli"]),
    ("toml", &["document", "config"]),
    ("listenfd", &["gateway::inherit"]),
    ("hickory_resolver", &["resolve"]),
    ("yaml_serde", &["client::kubeconfig"]),
    ("hyper", &["proxy", "health", "audit::sink", "telemetry::otlp"]),
    ("hyper_util", &["proxy", "health", "audit::sink", "telemetry::otlp"]),
    ("http_body_util", &["proxy", "health", "audit::sink", "telemetry::otlp"]),
    ("prometheus_client", &["metrics"]),
    ("aws_lc_rs", &["audit::chain", "client::pin", "tls"]),
    ("ratatui", &["cli::top"]),
    ("indicatif", &["cli"]),
    ("clap_mangen", &["cli"]),
    ("clap_complete", &["cli"]),
    ("tokio_tungstenite", &["tunnel::websocket"]),
];

/// A source file: its path below `src/`, and its text.
struct Source {
    path: String,
    text: String,
}

/// All violations in a tree, one line each.
fn check(tree: &[Source]) -> Vec<String> {
    let mut violations = Vec::new();
    if tree.is_empty() {
        violations.push("src/: there is no source".to_owned());
    }
    for source in tree {
        File::new(source, &mut violations).check();
    }
    violations
}

struct File<'a> {
    path: &'a str,
    module: Vec<String>,
    tokens: Vec<Token>,
    violations: &'a mut Vec<String>,
}

impl<'a> File<'a> {
    fn new(source: &'a Source, violations: &'a mut Vec<String>) -> Self {
        let stem = source.path.strip_suffix(".rs").unwrap_or(&source.path);
        let module = if stem == "lib" { Vec::new() } else { stem.split('/').map(str::to_owned).collect() };
        Self { path: &source.path, module, tokens: tokens(&source.text), violations }
    }

    fn check(mut self) {
        if self.path.ends_with("mod.rs") {
            self.report(1, "is a mod.rs: a module's file stands beside its folder");
        }
        if self.tokens.is_empty() {
            self.report(1, "is empty");
        }
        if !self.is_root() && self.row(&self.module[0]).is_none() {
            self.report(1, &format!("no row names `{}`: give it one", self.module[0]));
        }
        for at in 0..self.tokens.len() {
            self.refuse_gap(at);
        }
        let mut inline = Inline { stack: Vec::new(), depth: 0 };
        let mut at = 0;
        while at < self.tokens.len() {
            inline.step(&self.tokens, at);
            let module = [&self.module[..], &inline.path()].concat();
            at = match &self.tokens[at].kind {
                Kind::Word(word) if word == "use" && !self.is(at + 1, "<") => self.import(at + 1, &module),
                Kind::Word(word) if word == "extern" && self.is(at + 1, "crate") => {
                    self.report(self.tokens[at].line, "`extern crate` can give a crate a second name");
                    at + 2
                }
                Kind::Mark('#') => self.attribute(at, &module),
                Kind::Word(_) if self.starts_path(at) => self.expression(at, &module),
                _ => at + 1,
            };
        }
    }

    /// A macro's variable where the name of a module belongs: `crate::$module`.
    fn refuse_gap(&mut self, at: usize) {
        let root = ["crate", "super", "self"].iter().any(|root| self.is(at, root));
        let separated = matches!(self.tokens.get(at + 1).map(|token| &token.kind), Some(Kind::Separator));
        if root && separated && self.is(at + 2, "$") {
            self.report(
                self.tokens[at].line,
                "a macro's variable stands where a module's name belongs, which hides it",
            );
        }
    }

    /// `use` trees, with groups to any depth. Returns where to go on.
    fn import(&mut self, start: usize, module: &[String]) -> usize {
        let mut leaves = Vec::new();
        let end = self.tree(start, &mut Vec::new(), &mut leaves);
        for (line, path) in leaves {
            match &path[..] {
                [krate, renamed] if renamed == "as" => {
                    self.report(line, &format!("the crate {krate} gets a second name, which hides it from its fence"));
                }
                _ => self.judge(line, module, &path, true),
            }
        }
        end.max(start)
    }

    fn tree(&self, mut at: usize, prefix: &mut Vec<String>, leaves: &mut Vec<(usize, Vec<String>)>) -> usize {
        let (len, line) = (prefix.len(), self.tokens.get(at).map_or(0, |token| token.line));
        loop {
            match self.tokens.get(at).map(|token| &token.kind) {
                Some(Kind::Separator) => at += 1,
                Some(Kind::Mark('{')) => {
                    at += 1;
                    while at < self.tokens.len() && !self.is(at, "}") {
                        at = if self.is(at, ",") { at + 1 } else { self.tree(at, prefix, leaves).max(at + 1) };
                    }
                    at += 1;
                    break;
                }
                Some(Kind::Mark('*')) => {
                    leaves.push((line, [&prefix[..], &["*".to_owned()]].concat()));
                    at += 1;
                    break;
                }
                Some(Kind::Word(word)) => {
                    // `{self}` means what stands before the braces.
                    if word != "self" || prefix.is_empty() {
                        prefix.push(word.clone());
                    }
                    at += 1;
                    if !matches!(self.tokens.get(at).map(|token| &token.kind), Some(Kind::Separator)) {
                        leaves.push((self.tokens[at - 1].line, prefix.clone()));
                        if self.is(at, "as") {
                            let whole = prefix.len() == 1 && FENCES.iter().any(|(krate, _)| *krate == prefix[0]);
                            if whole {
                                leaves.push((self.tokens[at].line, vec![prefix[0].clone(), "as".to_owned()]));
                            }
                            at += 2;
                        }
                        break;
                    }
                }
                _ => break,
            }
        }
        prefix.truncate(len);
        at
    }

    fn starts_path(&self, at: usize) -> bool {
        let Some(Kind::Separator) = at.checked_sub(1).map(|before| &self.tokens[before].kind) else { return true };
        // After `::`, a path begins only where that is the global one.
        match at.checked_sub(2).map(|before| &self.tokens[before].kind) {
            Some(Kind::Word(word)) => KEYWORDS.contains(&word.as_str()),
            Some(Kind::Mark(mark)) => *mark != '>',
            _ => true,
        }
    }

    /// A path in code; a single word is one only if it is a whole argument of `pub(in …)` or the like, which is harmless.
    fn expression(&mut self, start: usize, module: &[String]) -> usize {
        let (mut path, mut at) = (Vec::new(), start);
        while let Some(Kind::Word(word)) = self.tokens.get(at).map(|token| &token.kind) {
            path.push(word.clone());
            at += 1;
            match (self.tokens.get(at).map(|token| &token.kind), self.tokens.get(at + 1).map(|token| &token.kind)) {
                (Some(Kind::Separator), Some(Kind::Word(_))) => at += 1,
                _ => break,
            }
        }
        if path.last().is_some_and(|word| word == "include") && self.is(at, "!") {
            self.report(self.tokens[start].line, "`include!` hides source from this check");
        }
        if path.len() > 1 {
            self.judge(self.tokens[start].line, module, &path, false);
        }
        at
    }

    /// `#[path = …]`, and strings in attributes that are paths (`#[serde(with = "…")]`). The tokens between are then read
    /// like any others.
    fn attribute(&mut self, start: usize, module: &[String]) -> usize {
        let mut at = start + 1 + usize::from(self.is(start + 1, "!"));
        if !self.is(at, "[") {
            return at;
        }
        let mut conditional = at + 1;
        if self.is(conditional, "cfg_attr") {
            while conditional < self.tokens.len()
                && !self.is(conditional, "]")
                && !(self.is(conditional, "path") && self.is(conditional + 1, "="))
            {
                conditional += 1;
            }
        }
        if self.is(conditional, "path") {
            self.report(self.tokens[at].line, "`#[path]` hides which module a file is");
        }
        let mut depth = 0;
        let mut found = Vec::new();
        while let Some(token) = self.tokens.get(at) {
            match &token.kind {
                Kind::Mark('[') => depth += 1,
                Kind::Mark(']') => depth -= 1,
                Kind::Text(text) if ["crate::", "super::", "self::"].iter().any(|root| text.starts_with(root)) => {
                    let words = text.split("::").map(|word| word.trim().to_owned()).collect::<Vec<_>>();
                    if words.iter().all(|word| word.chars().all(|c| c.is_alphanumeric() || c == '_')) {
                        found.push((token.line, words));
                    }
                }
                _ => {}
            }
            at += 1;
            if depth == 0 {
                break;
            }
        }
        for (line, path) in found {
            self.judge(line, module, &path, false);
        }
        start + 1
    }

    fn judge(&mut self, line: usize, module: &[String], path: &[String], import: bool) {
        let shown = path.join("::");
        for (krate, homes) in FENCES {
            // Also further along: what an allowed module re-exports is still the crate.
            let named = path.iter().any(|word| word == krate) && (path.len() > 1 || import);
            if named && !homes.iter().any(|home| self.lies_in(home)) {
                self.report(line, &format!("`{shown}`: the crate {krate} is fenced to {}", homes.join(", ")));
            }
        }
        let absolute = match path.first().map(String::as_str) {
            Some("crate" | "caponier") => path[1..].to_vec(),
            Some("self" | "super") => {
                let rest = &path[usize::from(path[0] == "self")..];
                let ups = rest.iter().take_while(|word| *word == "super").count();
                if ups > module.len() {
                    return self.report(line, &format!("`{shown}` leaves the crate"));
                }
                [&module[..module.len() - ups], &rest[ups..]].concat()
            }
            // A crate, a name imported before, or a child of this module.
            _ => return,
        };
        let Some(top) = absolute.first().filter(|top| *top != "*") else {
            if self.path != "lib.rs" {
                self.report(line, &format!("`{shown}` is the crate root as a whole, which hides what is imported"));
            }
            return;
        };
        if self.path == "lib.rs" || self.module.first() == Some(top) {
            return;
        }
        let Some(theirs) = self.row(top) else {
            return self.report(line, &format!("`{shown}`: no row names `{top}`"));
        };
        if self.path == "main.rs" {
            if top != "cli" {
                self.report(line, &format!("`{shown}`: main imports cli only"));
            }
            return;
        }
        let Some(ours) = self.row(&self.module[0]) else { return };
        if theirs >= ours {
            let way = if theirs == ours { "sideways" } else { "upwards" };
            let (ours, theirs) = (ROWS[ours].0, ROWS[theirs].0);
            self.report(line, &format!("`{shown}` imports {way}, from row {theirs} into row {ours}"));
        }
    }

    fn row(&self, top: &str) -> Option<usize> {
        ROWS.iter().position(|(_, modules)| modules.contains(&top))
    }

    fn is_root(&self) -> bool {
        matches!(self.path, "lib.rs" | "main.rs")
    }

    fn lies_in(&self, home: &str) -> bool {
        let mut ours = self.module.iter();
        home.split("::").all(|part| ours.next().is_some_and(|word| word == part))
    }

    fn is(&self, at: usize, text: &str) -> bool {
        match self.tokens.get(at).map(|token| &token.kind) {
            Some(Kind::Word(word)) => word == text,
            Some(Kind::Mark(mark)) => text.chars().eq([*mark]),
            _ => false,
        }
    }

    fn report(&mut self, line: usize, what: &str) {
        self.violations.push(format!("src/{}:{line}: {what}", self.path));
    }
}

/// Which inline modules are open (`mod tests { … }`): `super` counts from the innermost.
struct Inline {
    stack: Vec<(String, usize)>,
    depth: usize,
}

impl Inline {
    fn step(&mut self, tokens: &[Token], at: usize) {
        match &tokens[at].kind {
            Kind::Mark('{') => {
                self.depth += 1;
                let before = |back: usize| at.checked_sub(back).map(|before| &tokens[before].kind);
                if let (Some(Kind::Word(keyword)), Some(Kind::Word(name))) = (before(2), before(1))
                    && keyword == "mod"
                {
                    self.stack.push((name.clone(), self.depth));
                }
            }
            Kind::Mark('}') => {
                self.stack.pop_if(|(_, depth)| *depth == self.depth);
                self.depth = self.depth.saturating_sub(1);
            }
            _ => {}
        }
    }

    fn path(&self) -> Vec<String> {
        self.stack.iter().map(|(name, _)| name.clone()).collect()
    }
}

#[derive(Debug)]
struct Token {
    line: usize,
    kind: Kind,
}

#[derive(Debug, PartialEq)]
enum Kind {
    /// An identifier or keyword; raw ones without their `r#`.
    Word(String),
    /// `::`
    Separator,
    /// The inside of a string literal of any kind.
    Text(String),
    /// A number, a character, a lifetime.
    Other,
    /// Any other character.
    Mark(char),
}

/// Takes Rust source apart; comments vanish.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let peek = |at: usize| chars.get(at).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut found, mut at, mut line) = (Vec::new(), 0, 1);
    while at < chars.len() {
        let start = at;
        let kind = match chars[at] {
            c if c.is_whitespace() => {
                at += 1;
                None
            }
            '/' if peek(at + 1) == '/' => {
                while at < chars.len() && chars[at] != '\n' {
                    at += 1;
                }
                None
            }
            '/' if peek(at + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (peek(at), peek(at + 1)) {
                        ('/', '*') => (depth, at) = (depth + 1, at + 2),
                        ('*', '/') => (depth, at) = (depth - 1, at + 2),
                        _ => at += 1,
                    }
                    if depth == 0 || at >= chars.len() {
                        break;
                    }
                }
                None
            }
            '"' => {
                at += 1;
                Some(quoted(&chars, &mut at))
            }
            '\'' if peek(at + 1) == '\\' => {
                at += 3;
                while at < chars.len() && chars[at] != '\'' {
                    at += 1;
                }
                at += 1;
                Some(Kind::Other)
            }
            '\'' if peek(at + 2) == '\'' => {
                at += 3;
                Some(Kind::Other)
            }
            '\'' => {
                at += 1;
                while is_word(peek(at)) {
                    at += 1;
                }
                Some(Kind::Other)
            }
            c if c.is_ascii_digit() => {
                while is_word(peek(at)) {
                    at += 1;
                }
                Some(Kind::Other)
            }
            c if is_word(c) => {
                while is_word(peek(at)) {
                    at += 1;
                }
                let word: String = chars[start..at].iter().collect();
                Some(literal_or_word(&chars, word, &mut at))
            }
            ':' if peek(at + 1) == ':' => {
                at += 2;
                Some(Kind::Separator)
            }
            c => {
                at += 1;
                Some(Kind::Mark(c))
            }
        };
        found.extend(kind.map(|kind| Token { line, kind }));
        line += chars[start..at.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    found
}

/// A word, unless it is the prefix of a literal (`b"…"`, `r#"…"#`, `b'…'`) or of a raw identifier.
fn literal_or_word(chars: &[char], word: String, at: &mut usize) -> Kind {
    let peek = |at: usize| chars.get(at).copied().unwrap_or('\0');
    let hashes = chars[*at..].iter().take_while(|c| **c == '#').count();
    match word.as_str() {
        "r" | "br" | "cr" if peek(*at + hashes) == '"' => {
            *at += hashes + 1;
            let start = *at;
            while *at < chars.len() {
                if chars[*at] == '"' && chars[*at + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes {
                    let text = chars[start..*at].iter().collect();
                    *at += hashes + 1;
                    return Kind::Text(text);
                }
                *at += 1;
            }
            Kind::Other
        }
        "b" | "c" if peek(*at) == '"' => {
            *at += 1;
            quoted(chars, at)
        }
        "b" if peek(*at) == '\'' => {
            *at += if peek(*at + 1) == '\\' { 2 } else { 1 };
            *at += 1;
            while *at < chars.len() && chars[*at] != '\'' {
                *at += 1;
            }
            *at += 1;
            Kind::Other
        }
        "r" if hashes == 1 => {
            *at += 1;
            let start = *at;
            while peek(*at).is_alphanumeric() || peek(*at) == '_' {
                *at += 1;
            }
            Kind::Word(chars[start..*at].iter().collect())
        }
        _ => Kind::Word(word),
    }
}

/// The rest of a string whose opening quote has been read.
fn quoted(chars: &[char], at: &mut usize) -> Kind {
    let mut text = String::new();
    while *at < chars.len() && chars[*at] != '"' {
        if chars[*at] == '\\' {
            *at += 1;
        }
        text.extend(chars.get(*at));
        *at += 1;
    }
    *at += 1;
    Kind::Text(text)
}

/// After these words `::` begins a path.
const KEYWORDS: &[&str] = &[
    "as", "await", "break", "dyn", "else", "for", "if", "impl", "in", "let", "loop", "match", "move", "mut", "ref",
    "return", "unsafe", "where", "while",
];

/// Every `.rs` file below `dir`.
fn read(dir: &Path, root: &Path, tree: &mut Vec<Source>) {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(dir).expect("src is readable").map(|entry| entry.expect("an entry").path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            read(&path, root, tree);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let relative = path.strip_prefix(root).expect("below src").to_string_lossy().replace('\\', "/");
            tree.push(Source { path: relative, text: fs::read_to_string(&path).expect("source is text") });
        }
    }
}

#[test]
fn the_tree_keeps_to_its_rows_and_fences() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut tree = Vec::new();
    read(&root, &root, &mut tree);
    let violations = check(&tree);
    let list = violations.iter().fold(String::new(), |mut list, violation| {
        let _ = writeln!(list, "  {violation}");
        list
    });
    assert!(violations.is_empty(), "{} violations:\n{list}", violations.len());
}

#[cfg(test)]
mod checker {
    use super::*;

    fn violations(path: &str, text: &str) -> Vec<String> {
        check(&[Source { path: path.into(), text: text.into() }])
    }

    #[test]
    fn planted_violations_are_reported() {
        for (name, path, text, report) in [
            (
                "upwards",
                "policy.rs",
                "use crate::registry::Snapshot;",
                ":1: `crate::registry::Snapshot` imports upwards",
            ),
            ("far upwards", "target.rs", "use crate::cli;", "`crate::cli` imports upwards, from row 6 into row 0"),
            ("sideways", "agent.rs", "use crate::gateway::Broker;", "imports sideways, from row 4 into row 4"),
            ("sideways at the bottom", "chain.rs", "use crate::limits::CHUNK;", "sideways"),
            (
                "from a child",
                "gateway/door/ssh.rs",
                "use crate::agent::serve;",
                "`crate::agent::serve` imports sideways",
            ),
            (
                "group",
                "policy.rs",
                "use crate::{target::Target, audit::Trail};",
                "`crate::audit::Trail` imports upwards",
            ),
            (
                "nested group",
                "tls.rs",
                "use crate::{target, gateway::{door::{ssh}, intake}};",
                "`crate::gateway::intake`",
            ),
            (
                "several lines",
                "tls.rs",
                "use crate::{\n    limits,\n    // why\n    tunnel::{\n        wire,\n    },\n};",
                ":5: `crate::tunnel::wire`",
            ),
            (
                "group with self",
                "tls.rs",
                "use crate::{tunnel::{self, wire::Hello}};",
                "`crate::tunnel` imports upwards",
            ),
            ("braces first", "tls.rs", "use {std::fmt, crate::tunnel};", "`crate::tunnel` imports upwards"),
            ("alias", "tunnel.rs", "use crate::agent as a;", "`crate::agent` imports upwards"),
            ("glob", "tunnel.rs", "use crate::agent::*;", "`crate::agent::*` imports upwards"),
            ("visible", "tunnel.rs", "pub(crate) use crate::agent::Agent;", "`crate::agent::Agent` imports upwards"),
            (
                "expression",
                "audit.rs",
                "fn f() { let x = crate::tunnel::open(); }",
                "`crate::tunnel::open` imports upwards",
            ),
            ("type", "audit.rs", "struct S(Vec<crate::tunnel::Link>);", "`crate::tunnel::Link`"),
            ("qualified", "audit.rs", "type T = <crate::tunnel::Link as Clone>::X;", "`crate::tunnel::Link`"),
            ("turbofish", "audit.rs", "fn f() { g::<crate::tunnel::Link>() }", "`crate::tunnel::Link`"),
            ("macro argument", "audit.rs", "fn f() { assert!(crate::tunnel::open(1)); }", "`crate::tunnel::open`"),
            ("macro body", "audit.rs", "macro_rules! m { () => { $crate::tunnel::open() } }", "`crate::tunnel::open`"),
            ("attribute", "audit.rs", "#[derive(crate::tunnel::Derive)] struct S;", "`crate::tunnel::Derive`"),
            (
                "path in an attribute",
                "audit.rs",
                "#[serde(with = \"crate::tunnel::wire\")] struct S;",
                "`crate::tunnel::wire`",
            ),
            ("spaced", "audit.rs", "fn f() { crate :: /* x */ tunnel\n::open() }", "`crate::tunnel::open`"),
            ("raw identifier", "audit.rs", "use crate::r#tunnel::X;", "`crate::tunnel::X`"),
            ("super", "audit.rs", "use super::tunnel::Link;", "`super::tunnel::Link` imports upwards"),
            ("super super", "audit/writer.rs", "use super::super::tunnel;", "`super::super::tunnel` imports upwards"),
            (
                "super in code",
                "audit/writer.rs",
                "fn f() { super::super::tunnel::open() }",
                "`super::super::tunnel::open`",
            ),
            (
                "super from a test",
                "audit.rs",
                "mod tests { use super::super::tunnel::Link; }",
                "`super::super::tunnel::Link`",
            ),
            (
                "super after a test",
                "audit.rs",
                "mod a { fn f() { {} } } use super::tunnel::Link;",
                "`super::tunnel::Link`",
            ),
            ("self and super", "audit/writer.rs", "use self::super::super::tunnel;", "imports upwards"),
            ("beyond the crate", "audit.rs", "use super::super::tunnel;", "leaves the crate"),
            ("test module", "audit.rs", "#[cfg(test)] mod tests { use crate::tunnel::Link; }", "`crate::tunnel::Link`"),
            ("root by another name", "audit.rs", "use crate as root;", "the crate root as a whole"),
            ("root in a group", "audit.rs", "use crate::{self as root};", "the crate root as a whole"),
            ("glob of the root", "audit.rs", "use crate::*;", "the crate root as a whole"),
            ("glob of super", "audit.rs", "use super::*;", "the crate root as a whole"),
            ("super by another name", "audit.rs", "use super as root;", "the crate root as a whole"),
            ("extern crate", "audit.rs", "extern crate self as me;", "`extern crate`"),
            ("path attribute", "audit.rs", "#[path = \"agent.rs\"] mod x;", "`#[path]`"),
            ("include", "audit.rs", "include!(\"agent.rs\");", "`include!`"),
            ("qualified include", "audit.rs", "std::include!(\"agent.rs\");", "`include!`"),
            ("conditional path", "audit.rs", "#[cfg_attr(all(), path = \"agent.rs\")] mod x;", "`#[path]`"),
            ("path put together", "audit.rs", "macro_rules! m { ($x:ident) => { use crate::$x::Y; } }", "a macro's"),
            (
                "path put together in code",
                "audit.rs",
                "macro_rules! m { ($x:ident) => { $crate::$x::y() } }",
                "a macro's",
            ),
            ("fenced crate renamed inside its fence", "identity.rs", "pub use russh as r;", "a second name"),
            ("re-export at the root", "audit.rs", "use crate::Link;", "no row names `Link`"),
            ("main beyond cli", "main.rs", "fn main() { caponier::agent::run() }", "main imports cli only"),
            ("unknown module", "helpers.rs", "fn f() {}", "no row names `helpers`"),
            ("unknown folder", "bin/tool.rs", "fn main() {}", "no row names `bin`"),
            ("mod.rs", "agent/mod.rs", "fn f() {}", "is a mod.rs"),
            ("empty", "agent.rs", "", "is empty"),
            ("comments only", "agent.rs", "//! Later.\n/* nothing */\n", "is empty"),
            (
                "fenced use",
                "agent.rs",
                "use russh::server;",
                "`russh::server`: the crate russh is fenced to tunnel::ssh",
            ),
            ("fenced path", "agent.rs", "fn f() { russh::server::run() }", "`russh::server::run`: the crate russh"),
            ("fenced global path", "agent.rs", "fn f() { return ::russh::server::run() }", "the crate russh"),
            ("fenced global use", "agent.rs", "use ::russh::server;", "the crate russh"),
            ("fenced whole", "agent.rs", "use russh;", "the crate russh"),
            ("fenced alias", "agent.rs", "use russh as r;", "the crate russh"),
            ("fenced in a group", "agent.rs", "use {std::fmt, russh::{keys, server}};", "the crate russh"),
            ("fenced re-export", "agent.rs", "use crate::identity::russh::keys;", "the crate russh"),
            ("fenced sibling", "tunnel/splice.rs", "use russh::Channel;", "the crate russh"),
            ("fenced neighbour", "tunnel/ssh2.rs", "use russh::Channel;", "the crate russh"),
            ("fenced parent", "gateway/door.rs", "use russh::Channel;", "the crate russh"),
            ("fenced test", "agent.rs", "mod tests { use rustls::ClientConfig; }", "the crate rustls is fenced to tls"),
            ("fenced derive", "config.rs", "#[derive(clap::Args)] struct A;", "the crate clap is fenced to cli"),
            ("fenced macro", "agent.rs", "fn f() { anyhow::bail!(\"no\") }", "the crate anyhow is fenced to main, cli"),
            ("fenced database", "registry/file.rs", "use tokio_postgres::Client;", "the crate tokio_postgres"),
            ("fenced token", "gateway/door/connect.rs", "use jsonwebtoken::decode;", "the crate jsonwebtoken"),
            ("fenced format", "registry/file.rs", "use toml::Value;", "the crate toml is fenced to document, config"),
            ("fenced in the root", "lib.rs", "pub use russh::keys;", "the crate russh"),
        ] {
            let found = violations(path, text);
            assert!(found.iter().any(|violation| violation.contains(report)), "{name}: {found:?}");
            assert!(found.iter().all(|violation| violation.starts_with(&format!("src/{path}:"))), "{name}: {found:?}");
        }
        assert_eq!(check(&[]).len(), 1);
    }

    #[test]
    fn what_is_allowed_is_not_reported() {
        for (name, path, text) in [
            ("down", "gateway/broker.rs", "use crate::{audit::Trail, tunnel::{wire, ssh::Link}, identity::*};"),
            (
                "own subtree",
                "gateway/door/ssh.rs",
                "use crate::gateway::broker; use super::super::roster; use super::Door;",
            ),
            (
                "own child",
                "gateway.rs",
                "mod roster; use self::roster::Roster; use roster::X; fn f() { roster::new() }",
            ),
            ("test module", "audit.rs", "mod tests { use super::*; mod deep { use super::super::writer; } }"),
            ("lowest row, second step", "identity/key.rs", "use crate::secret::Secret; use crate::limits;"),
            (
                "comments",
                "audit.rs",
                "//! [`crate::tunnel`]\n/* use crate::agent; /* nested */ russh::x */ // crate::agent::X\nfn f() {}",
            ),
            (
                "strings",
                "audit.rs",
                "const A: &str = \"use crate::agent; \\\" russh::x\"; const B: &[u8] = b\"russh::x\";",
            ),
            ("raw strings", "audit.rs", "const A: &str = r##\"\"# use crate::agent; \"##; const B: &str = r\"\\\";"),
            (
                "characters",
                "audit.rs",
                "const A: [char; 4] = ['\"', '\\'', '\\\\', '\\u{1F600}']; const B: u8 = b'\"'; const C: u8 = b'\\'';",
            ),
            ("lifetimes", "audit.rs", "fn f<'a>(x: &'a str) -> impl Fn() + use<'a> { 'l: loop { break 'l } }"),
            ("visibility", "audit.rs", "pub(crate) struct S; pub(in crate::audit) fn f() {}"),
            ("prose in an attribute", "audit.rs", "#[error(\"crate::tunnel is down\")] struct S;"),
            ("other crates", "agent.rs", "use tokio_util::X; use rustls_pki_types::Y; use rustls_native_certs::Z;"),
            ("words that are no paths", "agent.rs", "fn f(toml: u8, clap: u8) -> u8 { x.toml + toml + clap }"),
            ("inside the fence", "tunnel/ssh/handler.rs", "use russh::server; fn f() { ::russh::x() }"),
            ("inside the fence, too", "identity/key/der.rs", "use russh::keys::ssh_key; mod tests { use russh::x; }"),
            (
                "the command line",
                "cli/keys.rs",
                "use anyhow::Context; use clap::{Subcommand}; use crate::agent::Agent;",
            ),
            ("main", "main.rs", "use caponier::cli; fn main() -> anyhow::Result<()> { cli::run() }"),
            ("root", "lib.rs", "//! x\npub mod agent;\nmod tests { use super::*; use crate::agent; }"),
            ("unclosed", "agent.rs", "fn f() { \"never closed"),
            ("unclosed use", "agent.rs", "use std::{fmt, io::{self"),
        ] {
            let found = violations(path, text);
            assert!(found.is_empty(), "{name}: {found:?}");
        }
    }

    #[test]
    fn every_module_has_one_row_and_fences_are_in_the_table() {
        let all: Vec<_> = ROWS.iter().flat_map(|(_, modules)| *modules).collect();
        for (at, module) in all.iter().enumerate() {
            assert!(!all[at + 1..].contains(module), "{module} is in two rows");
        }
        for (krate, homes) in FENCES {
            for home in *homes {
                let top = home.split("::").next().unwrap_or_default();
                assert!(top == "main" || all.contains(&&top), "the fence of {krate} names {home}, which no row has");
            }
        }
    }
}

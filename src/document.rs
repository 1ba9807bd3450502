//! TOML documents, read so that whoever wrote one learns of everything that is wrong with it at once.
//!
//! Promised: reading goes on after a fault, and every fault says the file, the line, the key and what is accepted there.
//! A key that nobody asks for is a fault, so that a misspelt setting never passes for an omitted one. Values are not
//! repeated in faults, because one of them may be a secret.
//!
//! A reader asks for what it knows and hands what it made to [`Document::finish`], which gives it back only if nothing
//! was wrong:
//!
//! ```ignore
//! let document = Document::read(path)?;
//! let root = document.root();
//! let name = root.required("name").and_then(|item| item.parse::<AgentId>());
//! let port = root.optional("port").and_then(|item| item.integer::<u16>(1..=65_535));
//! document.finish(name.map(|name| Settings { name, port }))
//! ```
//!
//! Settings may also come from the environment ([`Document::overlay_environment`]): they take the place of the file's
//! before anything is read, and faults about them name the variable.

mod fault;
mod item;
mod revocations;
mod table;
mod tree;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use toml::de::DeTable;

pub use fault::{Fault, Faults, Place};
pub use item::Item;
pub use table::Table;
use tree::{Lines, Node, Origin, Step, TableNode, Value, written};

use crate::limits::FILE_MAX;
use crate::secret::{self, Secret};

/// A document with the faults found in it so far.
pub struct Document {
    file: PathBuf,
    root: TableNode,
    faults: RefCell<Faults>,
    /// Files that are read because of what stands here, by the keys that name them.
    files: RefCell<Vec<(String, PathBuf)>>,
    /// What settings in the environment begin with.
    prefix: String,
    /// Variables that begin like settings but hold no `__`.
    stray: BTreeSet<String>,
}

impl Document {
    /// Reads a file of at most [`FILE_MAX`] bytes.
    ///
    /// # Errors
    /// If it cannot be read or is not TOML 1.1 in UTF-8; then with every syntax error.
    pub fn read(file: &Path) -> Result<Self, Faults> {
        let text = read_text(file)?;
        Self::parse(file, &text)
    }

    /// Reads `text` as the content of `file`.
    ///
    /// # Errors
    /// If it is not TOML 1.1; then with every syntax error.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Faults> {
        let (table, errors) = DeTable::parse_recoverable(text);
        let lines = Lines::of(text);
        let mut faults = Faults::default();
        for error in errors {
            faults.add(Fault {
                file: file.into(),
                line: error.span().map(|span| lines.at(span.start)),
                key: String::new(),
                variable: None,
                problem: format!("not TOML: {}", printable(error.message())),
            });
        }
        faults.none_in(Self {
            file: file.into(),
            root: TableNode::of(table.get_ref(), &lines),
            faults: RefCell::default(),
            files: RefCell::default(),
            prefix: String::new(),
            stray: BTreeSet::new(),
        })
    }

    /// Lets settings from the environment take the place of the file's: `PREFIX_AGENT__HOST_KEY` sets `agent.host_key`,
    /// `PREFIX_ORGANISATION__0__ID` sets `id` in the first `[[organisation]]`. Only single values can be set; an index
    /// one past the end adds an element. A variable that names no setting is a fault.
    ///
    /// Variables of that prefix without `__` are not settings, because others make such variables too (a Kubernetes
    /// service named like the prefix does); one that is a setting but for a missing `_` is a fault nevertheless.
    pub fn overlay_environment(&mut self, prefix: &str, variables: impl IntoIterator<Item = (String, String)>) {
        prefix.clone_into(&mut self.prefix);
        // Sorted by path, so that elements are added in the order of their indices.
        let mut settings: BTreeMap<Vec<Step>, (String, String)> = BTreeMap::new();
        for (variable, value) in variables {
            let Some(rest) = variable.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('_')) else { continue };
            if rest.contains("__") {
                let path: Vec<Step> = rest.split("__").map(Step::of_variable).collect();
                if let Some((other, _)) = settings.get(&path) {
                    let problem = format!("{} sets the same: keep one of the two", printable(other));
                    self.fault(&self.place(&Origin::Variable(variable), written(&path)), problem);
                } else {
                    settings.insert(path, (variable, value));
                }
            } else {
                self.stray.insert(variable);
            }
        }
        for (path, (variable, value)) in settings {
            self.set(&path, &variable, value);
        }
    }

    /// Sets a key of a top-level table from a variable with a name of its own, such as `agent.proxy` from `AGENT_PROXY`.
    pub fn overlay(&mut self, table: &str, key: &str, variable: &str, value: String) {
        self.set(&[Step::Key(table.to_owned()), Step::Key(key.to_owned())], variable, value);
    }

    /// Whether the document has this top-level key. Does not count as asking for it.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.root.entries.contains_key(key)
    }

    /// Whether a top-level table has this key. Does not count as asking for it.
    #[must_use]
    pub fn has_in(&self, table: &str, key: &str) -> bool {
        let table = self.root.entries.get(table).map(|entry| &entry.node.value);
        matches!(table, Some(Value::Table(table)) if table.entries.contains_key(key))
    }

    /// The file, as it was named when it was read.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The files that were asked for with [`Item::file`], by the keys that name them.
    #[must_use]
    pub fn files(&self) -> Vec<(String, PathBuf)> {
        self.files.borrow().clone()
    }

    /// The top-level table.
    #[must_use]
    pub fn root(&self) -> Table<'_> {
        self.table(&self.root, self.place(&Origin::Whole, String::new()))
    }

    /// Records a fault at a place that was noted before.
    pub fn fault(&self, place: &Place, problem: impl Into<String>) {
        self.faults.borrow_mut().add(place.fault(problem));
    }

    /// Gives `value` back if the whole document was in order. Keys that nobody asked for are faults.
    ///
    /// # Errors
    /// With every fault, if there is one.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, Faults> {
        self.refuse_unknown(&self.root, "");
        let mut faults = self.faults.into_inner();
        if value.is_none() && faults.is_empty() {
            faults = Faults::file(&self.file, "this file cannot be used");
        }
        let value = faults.none_in(value)?;
        value.ok_or_else(|| Faults::file(&self.file, "this file cannot be used"))
    }

    fn set(&mut self, path: &[Step], variable: &str, value: String) {
        let origin = Origin::Variable(variable.to_owned());
        if let Err(problem) = self.root.plant(path, &origin, value) {
            self.fault(&self.place(&origin, written(path)), problem);
        }
    }

    fn place(&self, origin: &Origin, key: String) -> Place {
        let (line, variable) = match origin {
            Origin::Whole => (None, None),
            Origin::Line(line) => (Some(*line), None),
            Origin::Variable(variable) => (None, Some(variable.clone())),
        };
        Place { file: self.file.clone(), line, key, variable }
    }

    fn table<'a>(&'a self, node: &'a TableNode, place: Place) -> Table<'a> {
        node.read.set(true);
        Table { document: self, node, place }
    }

    /// Records what nobody asked for, in the tables that somebody read.
    fn refuse_unknown(&self, table: &TableNode, path: &str) {
        if !table.read.get() {
            return;
        }
        let known = table.known.borrow();
        for (key, entry) in &table.entries {
            let path = join(path, key);
            if known.contains(key) {
                self.refuse_unknown_in(&entry.node, &path);
            } else {
                self.fault(&self.place(&entry.origin, path), unknown(key, &known));
            }
        }
        if path.is_empty() {
            return;
        }
        for key in known.iter() {
            let setting = join(path, key).replace(['.', '['], "_").replace(']', "").to_ascii_uppercase();
            let variable = format!("{}_{setting}", self.prefix);
            if self.stray.contains(&variable) {
                let name = join(path, key).replace(['.', '['], "__").replace(']', "").to_ascii_uppercase();
                let problem = format!("this variable sets nothing: write {}_{name}", self.prefix);
                self.fault(&self.place(&Origin::Variable(variable), join(path, key)), problem);
            }
        }
    }

    fn refuse_unknown_in(&self, node: &Node, path: &str) {
        match &node.value {
            Value::Table(table) => self.refuse_unknown(table, path),
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.refuse_unknown_in(item, &format!("{path}[{index}]"));
                }
            }
            _ => (),
        }
    }
}

impl fmt::Debug for Document {
    /// Shows the file's name alone: values may be secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Document").field("file", &self.file).finish_non_exhaustive()
    }
}

/// Reads a text file of at most [`FILE_MAX`] bytes.
///
/// # Errors
/// If it is no regular file, too long, not UTF-8, or cannot be read.
pub fn read_text(file: &Path) -> Result<String, Faults> {
    read_text_if(file, |_| Ok(()))
}

/// As [`read_text`], if `accept` says so of the very file that is read.
///
/// # Errors
/// As [`read_text`], or what `accept` says.
pub fn read_text_if(file: &Path, accept: impl FnOnce(&Metadata) -> Result<(), String>) -> Result<String, Faults> {
    let failed = |error: io::Error| Faults::file(file, format!("cannot be read: {error}"));
    // Without O_NONBLOCK the open of a pipe would wait for a writer.
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let open = OpenOptions::new().read(true).custom_flags(flags).open(file).map_err(failed)?;
    let metadata = open.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(Faults::file(file, "cannot be read: not a regular file"));
    }
    accept(&metadata).map_err(|problem| Faults::file(file, problem))?;
    let mut bytes = Vec::new();
    open.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(Faults::file(file, format!("longer than {FILE_MAX} bytes: this is some other file")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = valid.iter().filter(|byte| **byte == b'\n').count() + 1;
        let mut faults = Faults::default();
        faults.add(Fault { line: Some(line), ..Faults::whole(file, "not UTF-8 text") });
        faults
    })
}

/// As [`read_text`], of a file that keeps others out.
///
/// # Errors
/// As [`read_text`], or if others can read it.
pub fn read_secret(file: &Path) -> Result<Secret<String>, Faults> {
    let private = |metadata: &Metadata| {
        let (path, mode) = (file.display(), metadata.mode() & 0o7777);
        if secret::is_private(metadata) {
            return Ok(());
        }
        Err(format!("can be read by others (mode {mode:04o}): run `chmod 600 {path}`"))
    };
    read_text_if(file, private).map(Secret::new)
}

/// Appends a key to a dotted path; a key that could not be written bare is quoted.
fn join(path: &str, key: &str) -> String {
    let bare = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    let dot = if path.is_empty() { "" } else { "." };
    if bare { format!("{path}{dot}{key}") } else { format!("{path}{dot}\"{}\"", printable(key)) }
}

/// The text with control characters escaped, so that it cannot disturb a terminal or forge a line.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

fn unknown(key: &str, known: &BTreeSet<String>) -> String {
    let near = known.iter().map(|word| (distance(key, word), word)).min();
    if let Some((_, word)) = near.filter(|(distance, word)| *distance <= 2 && *distance * 2 < word.len()) {
        return format!("unknown key: did you mean {word}?");
    }
    let known: Vec<_> = known.iter().map(String::as_str).collect();
    if known.is_empty() {
        return "unknown key: none is accepted here".to_owned();
    }
    format!("unknown key: accepted here are {}", known.join(", "))
}

/// How many letters must be added, removed, replaced or swapped with their neighbour to make one word of the other.
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().take(64).collect(), other.chars().take(64).collect());
    let mut rows = vec![(0..=other.len()).collect::<Vec<_>>()];
    for i in 1..=one.len() {
        let mut row = vec![i];
        for j in 1..=other.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(one[i - 1] != other[j - 1]);
            let mut least = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && one[i - 1] == other[j - 2] && one[i - 2] == other[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[one.len()][other.len()]
}

#[cfg(test)]
mod tests;

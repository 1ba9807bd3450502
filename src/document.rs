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

mod revocations;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{Metadata, OpenOptions};
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::de::{DeTable, DeValue};

use crate::chain::Chain;
use crate::limits::{FAULTS_MAX, FILE_MAX};
use crate::secret::{self, Secret};

/// Something wrong in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file.
    pub file: PathBuf,
    /// The line, counted from 1, where there is one.
    pub line: Option<usize>,
    /// The key with the tables it stands in, such as `organisation[0].allow[1].within`; empty for the file as a whole.
    pub key: String,
    /// The environment variable that set the key, if one did.
    pub variable: Option<String>,
    /// What is wrong, and what is accepted.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.file.to_string_lossy()))?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        f.write_str(": ")?;
        match (&self.variable, self.key.is_empty()) {
            (Some(variable), _) => write!(f, "{} (set by {}): ", self.key, printable(variable))?,
            (None, false) => write!(f, "{}: ", self.key)?,
            (None, true) => (),
        }
        // It may name another file, whose name may hold anything.
        f.write_str(&printable(&self.problem))
    }
}

/// Everything that is wrong, in the order of files and lines; never empty when it is an error.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Faults {
    faults: Vec<Fault>,
    /// Faults beyond [`FAULTS_MAX`], which are only counted.
    more: usize,
}

impl Faults {
    /// A single fault about a file as a whole.
    #[must_use]
    pub fn file(file: &Path, problem: impl Into<String>) -> Self {
        let mut faults = Self::default();
        faults.add(Self::whole(file, problem));
        faults
    }

    fn whole(file: &Path, problem: impl Into<String>) -> Fault {
        Fault { file: file.into(), line: None, key: String::new(), variable: None, problem: problem.into() }
    }

    /// Adds a fault; beyond [`FAULTS_MAX`] it is only counted.
    pub fn add(&mut self, fault: Fault) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(fault);
        } else {
            self.more += 1;
        }
    }

    /// Takes over the faults of another file.
    pub fn append(&mut self, others: Self) {
        for fault in others.faults {
            self.add(fault);
        }
        self.more += others.more;
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.faults.is_empty()
    }

    /// The faults, without those that were only counted.
    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.faults.iter()
    }

    /// Gives `value` back if nothing is wrong.
    ///
    /// # Errors
    /// If something is wrong.
    pub fn none_in<T>(mut self, value: T) -> Result<T, Self> {
        if self.is_empty() {
            return Ok(value);
        }
        self.faults.sort_by(|one, other| (&one.file, one.line).cmp(&(&other.file, other.line)));
        Err(self)
    }
}

impl fmt::Display for Faults {
    /// One fault a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.faults.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            fault.fmt(f)?;
        }
        if self.more > 0 {
            write!(f, "\nand {} more", self.more)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

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

/// Where something stands, to be kept for faults that show only later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    file: PathBuf,
    line: Option<usize>,
    key: String,
    variable: Option<String>,
}

impl Place {
    /// A fault here.
    #[must_use]
    pub fn fault(&self, problem: impl Into<String>) -> Fault {
        Fault {
            file: self.file.clone(),
            line: self.line,
            key: self.key.clone(),
            variable: self.variable.clone(),
            problem: problem.into(),
        }
    }
}

impl fmt::Display for Place {
    /// For use in another fault of the same file: `line 12`, or the variable.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.line, &self.variable) {
            (Some(line), _) => write!(f, "line {line}"),
            (None, Some(variable)) => f.write_str(variable),
            (None, None) => f.write_str("this file"),
        }
    }
}

/// A table that is being read. Each key asked for, present or not, is from then on a known one.
#[derive(Clone)]
pub struct Table<'a> {
    document: &'a Document,
    node: &'a TableNode,
    place: Place,
}

impl<'a> Table<'a> {
    /// What stands at `key`. Its absence is a fault.
    #[must_use]
    pub fn required(&self, key: &str) -> Option<Item<'a>> {
        let item = self.optional(key);
        if item.is_none() {
            self.fault(key, "this key is missing");
        }
        item
    }

    /// What stands at `key`, if anything does.
    #[must_use]
    pub fn optional(&self, key: &str) -> Option<Item<'a>> {
        self.node.known.borrow_mut().insert(key.to_owned());
        let node = &self.node.entries.get(key)?.node;
        if matches!(node.value, Value::Vacant) {
            return None;
        }
        let place = self.document.place(&node.origin, join(&self.place.key, key));
        Some(Item { document: self.document, node, place })
    }

    /// The table at `key`. Its absence is a fault.
    #[must_use]
    pub fn required_table(&self, key: &str) -> Option<Table<'a>> {
        self.required(key)?.table()
    }

    /// The table at `key`, if there is one.
    #[must_use]
    pub fn optional_table(&self, key: &str) -> Option<Table<'a>> {
        self.optional(key)?.table()
    }

    /// The tables written `[[key]]`; none if there are none.
    #[must_use]
    pub fn tables(&self, key: &str) -> Vec<Table<'a>> {
        let Some(item) = self.optional(key) else { return Vec::new() };
        if matches!(item.node.value, Value::Table(_)) {
            item.fault(format!("a list of tables is wanted: write [[{key}]]"));
            return Vec::new();
        }
        item.items().iter().filter_map(Item::table).collect()
    }

    /// The tables written `[[key]]`. If there are none, the fault is `missing`.
    #[must_use]
    pub fn required_tables(&self, key: &str, missing: &str) -> Vec<Table<'a>> {
        match self.optional(key).map(|item| &item.node.value) {
            None => self.fault(key, missing),
            Some(Value::Array(items)) if items.is_empty() => self.fault(key, missing),
            Some(_) => (),
        }
        self.tables(key)
    }

    /// Where `key` stands, or the table if it has no such key.
    #[must_use]
    pub fn at(&self, key: &str) -> Place {
        let path = join(&self.place.key, key);
        match self.node.entries.get(key) {
            Some(entry) => self.document.place(&entry.node.origin, path),
            None => Place { key: path, ..self.place.clone() },
        }
    }

    /// Where the table itself stands.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Records a fault at `key`, or at the table if it has no such key.
    pub fn fault(&self, key: &str, problem: impl Into<String>) {
        self.document.fault(&self.at(key), problem);
    }

    /// The document that this is a part of.
    #[must_use]
    pub fn document(&self) -> &'a Document {
        self.document
    }
}

impl fmt::Debug for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Table").field(&self.place).finish()
    }
}

/// A value that is being read. Each method that returns `None` has recorded why.
#[derive(Clone)]
pub struct Item<'a> {
    document: &'a Document,
    node: &'a Node,
    place: Place,
}

impl<'a> Item<'a> {
    /// A string that is not empty.
    #[must_use]
    pub fn string(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::String(text) if text.is_empty() => self.reject("this is empty"),
            Value::String(text) => Some(text),
            _ => self.wanted("a string"),
        }
    }

    /// A string that is hidden from now on.
    #[must_use]
    pub fn secret(&self) -> Option<Secret<String>> {
        self.string().map(|text| Secret::new(text.to_owned()))
    }

    /// A string in the form of `T`. The error's text becomes the fault's.
    #[must_use]
    pub fn parse<T>(&self) -> Option<T>
    where
        T: FromStr<Err: std::error::Error + 'static>,
    {
        match self.string()?.parse() {
            Ok(value) => Some(value),
            Err(error) => self.reject(Chain(&error).to_string()),
        }
    }

    /// A whole number within `range`.
    ///
    /// # Panics
    /// Never; a number of the range that `T` cannot hold is a fault.
    #[must_use]
    pub fn integer<T: TryFrom<i64>>(&self, range: RangeInclusive<i64>) -> Option<T> {
        self.integer_because(range, "")
    }

    /// As [`Item::integer`]; the fault says `why` it is this range, if there is anything to say.
    #[must_use]
    pub fn integer_because<T: TryFrom<i64>>(&self, range: RangeInclusive<i64>, why: &str) -> Option<T> {
        let number = match &self.node.value {
            Value::Integer(number) => *number,
            Value::String(text) if self.set_by_variable() => text.parse().ok(),
            _ => return self.wanted("a whole number"),
        };
        match number.filter(|number| range.contains(number)).and_then(|number| T::try_from(number).ok()) {
            Some(number) => Some(number),
            None => {
                let why = if why.is_empty() { String::new() } else { format!(": {why}") };
                self.reject(format!("a whole number from {} to {} is wanted{why}", range.start(), range.end()))
            }
        }
    }

    /// `true` or `false`.
    #[must_use]
    pub fn boolean(&self) -> Option<bool> {
        match &self.node.value {
            Value::Boolean(value) => Some(*value),
            Value::String(text) if self.set_by_variable() => match text.as_str() {
                "true" => Some(true),
                "false" => Some(false),
                _ => self.reject("true or false is wanted"),
            },
            _ => self.wanted("true or false"),
        }
    }

    /// A moment: a TOML date and time with its offset from UTC, or the same as a string (RFC 3339).
    #[must_use]
    pub fn timestamp(&self) -> Option<jiff::Timestamp> {
        let wanted = "a date and time with an offset from UTC is wanted, such as 2027-01-31T12:00:00Z";
        let text = match &self.node.value {
            Value::Datetime(text) | Value::String(text) => text,
            _ => return self.wanted("a date and time with an offset from UTC, such as 2027-01-31T12:00:00Z,"),
        };
        text.parse().map_or_else(|_| self.reject(wanted), Some)
    }

    /// One of a few words.
    #[must_use]
    pub fn choice<T: Clone>(&self, choices: &[(&str, T)]) -> Option<T> {
        let text = self.string()?;
        if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == text) {
            return Some(choice.clone());
        }
        let names: Vec<_> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        self.reject(format!("one of {} is wanted", names.join(", ")))
    }

    /// Whether this is a list, be it empty.
    #[must_use]
    pub fn is_list(&self) -> bool {
        matches!(self.node.value, Value::Array(_))
    }

    /// Whether this is a string, whatever it stands for.
    #[must_use]
    pub fn is_text(&self) -> bool {
        matches!(self.node.value, Value::String(_))
    }

    /// A path; a relative one starts where the document's file lies.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        let path = self.string()?;
        if path.contains('\0') {
            return self.reject("no path holds a NUL character");
        }
        Some(self.document.file.parent().unwrap_or(Path::new("")).join(path))
    }

    /// As [`Item::path`], of a file that is read at once: what it holds counts as part of the document ([`Document::files`]).
    #[must_use]
    pub fn file(&self) -> Option<PathBuf> {
        let path = self.path()?;
        self.document.files.borrow_mut().push((self.place.key.clone(), path.clone()));
        Some(path)
    }

    /// The elements of a list.
    #[must_use]
    pub fn items(&self) -> Vec<Item<'a>> {
        let Value::Array(nodes) = &self.node.value else {
            if let Some(variable) = &self.place.variable {
                self.fault(format!("a list is wanted: set its elements as {variable}__0, {variable}__1, …"));
            } else {
                self.wanted::<()>("a list");
            }
            return Vec::new();
        };
        let item = |(index, node): (usize, &'a Node)| {
            let place = self.document.place(&node.origin, format!("{}[{index}]", self.place.key));
            Item { document: self.document, node, place }
        };
        nodes.iter().enumerate().filter(|(_, node)| !matches!(node.value, Value::Vacant)).map(item).collect()
    }

    /// A list of at least one element, each read by `read`; every element is read even if one is wrong.
    #[must_use]
    pub fn list<T>(&self, read: impl FnMut(&Item<'a>) -> Option<T>) -> Option<Vec<T>> {
        if matches!(&self.node.value, Value::Array(nodes) if nodes.is_empty()) {
            return self.reject("at least one element is wanted");
        }
        let items = self.items();
        let values: Vec<_> = items.iter().map(read).collect();
        if values.is_empty() { None } else { values.into_iter().collect() }
    }

    /// A table.
    #[must_use]
    pub fn table(&self) -> Option<Table<'a>> {
        match &self.node.value {
            Value::Table(node) => Some(self.document.table(node, self.place.clone())),
            _ => self.wanted("a table"),
        }
    }

    /// Where the value stands.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Records a fault here.
    pub fn fault(&self, problem: impl Into<String>) {
        self.document.fault(&self.place, problem);
    }

    /// Records a fault here, and has no value.
    pub fn reject<T>(&self, problem: impl Into<String>) -> Option<T> {
        self.fault(problem);
        None
    }

    fn wanted<T>(&self, wanted: &str) -> Option<T> {
        self.reject(format!("{wanted} is wanted, and this is {}", self.node.value.kind()))
    }

    /// Whether the value came from the environment; then it is a string, whatever it stands for.
    #[must_use]
    pub fn set_by_variable(&self) -> bool {
        self.place.variable.is_some()
    }
}

impl fmt::Debug for Item<'_> {
    /// Shows the place alone: the value may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Item").field(&self.place).finish()
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

/// Where a value comes from.
#[derive(Debug, Clone)]
enum Origin {
    /// The file as a whole.
    Whole,
    /// A line of it.
    Line(usize),
    /// A variable of the environment.
    Variable(String),
}

/// A key's place and value.
struct Entry {
    origin: Origin,
    node: Node,
}

/// A value with its place.
struct Node {
    origin: Origin,
    value: Value,
}

enum Value {
    /// Nothing yet: made on the way to a setting from the environment that then could not be set.
    Vacant,
    String(String),
    /// `None` is a number beyond 64 bits.
    Integer(Option<i64>),
    Float,
    Boolean(bool),
    Datetime(String),
    Array(Vec<Node>),
    Table(TableNode),
}

#[derive(Default)]
struct TableNode {
    entries: BTreeMap<String, Entry>,
    /// The keys that somebody asked for.
    known: RefCell<BTreeSet<String>>,
    /// Whether somebody took this for a table at all.
    read: Cell<bool>,
}

impl TableNode {
    fn of(table: &DeTable<'_>, lines: &Lines) -> Self {
        let entry = |(key, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| {
            let key: &toml::Spanned<toml::de::DeString<'_>> = key;
            let origin = Origin::Line(lines.at(key.span().start));
            (key.get_ref().to_string(), Entry { origin, node: Node::of(value, lines) })
        };
        Self { entries: table.iter().map(entry).collect(), ..Self::default() }
    }

    fn plant(&mut self, path: &[Step], origin: &Origin, value: String) -> Result<(), &'static str> {
        let Some((Step::Key(key), rest)) = path.split_first() else {
            return Err("this variable names an element of a list where there is none");
        };
        let vacant = || Entry { origin: origin.clone(), node: Node { origin: origin.clone(), value: Value::Vacant } };
        self.entries.entry(key.clone()).or_insert_with(vacant).node.plant(rest, origin, value)
    }
}

impl Node {
    fn of(value: &toml::Spanned<DeValue<'_>>, lines: &Lines) -> Self {
        let origin = Origin::Line(lines.at(value.span().start));
        let value = match value.get_ref() {
            DeValue::String(text) => Value::String(text.to_string()),
            DeValue::Integer(number) => Value::Integer(i64::from_str_radix(number.as_str(), number.radix()).ok()),
            DeValue::Float(_) => Value::Float,
            DeValue::Boolean(value) => Value::Boolean(*value),
            DeValue::Datetime(datetime) => Value::Datetime(datetime.to_string()),
            DeValue::Array(items) => Value::Array(items.iter().map(|item| Self::of(item, lines)).collect()),
            DeValue::Table(table) => Value::Table(TableNode::of(table, lines)),
        };
        Self { origin, value }
    }

    fn plant(&mut self, path: &[Step], origin: &Origin, value: String) -> Result<(), &'static str> {
        match (path.split_first(), &mut self.value) {
            (None, Value::Table(_) | Value::Array(_)) => Err("only single values can be set by a variable"),
            (None, _) => {
                *self = Self { origin: origin.clone(), value: Value::String(value) };
                Ok(())
            }
            (Some((Step::Key(_), _)), held) => {
                if matches!(held, Value::Vacant) {
                    *held = Value::Table(TableNode::default());
                }
                let Value::Table(table) = held else { return Err("this variable names a key where there is no table") };
                table.plant(path, origin, value)
            }
            (Some((Step::Index(index), rest)), held) => {
                if matches!(held, Value::Vacant) {
                    *held = Value::Array(Vec::new());
                }
                let Value::Array(items) = held else {
                    return Err("this variable names an element of a list where there is none");
                };
                if *index == items.len() {
                    items.push(Self { origin: origin.clone(), value: Value::Vacant });
                }
                let item =
                    items.get_mut(*index).ok_or("this variable names an element, but the one before is missing")?;
                item.plant(rest, origin, value)
            }
        }
    }
}

impl Value {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Vacant => "nothing",
            Self::String(_) => "a string",
            Self::Integer(_) => "a whole number",
            Self::Float => "a number with a fraction",
            Self::Boolean(_) => "true or false",
            Self::Datetime(_) => "a date or time",
            Self::Array(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

/// One step of the path that a variable names.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Key(String),
    Index(usize),
}

impl Step {
    fn of_variable(text: &str) -> Self {
        match text.parse() {
            Ok(index) if text.bytes().all(|byte| byte.is_ascii_digit()) => Self::Index(index),
            _ => Self::Key(text.to_ascii_lowercase()),
        }
    }
}

/// The path as it stands in faults.
fn written(path: &[Step]) -> String {
    path.iter().fold(String::new(), |key, step| match step {
        Step::Key(name) => join(&key, name),
        Step::Index(index) => format!("{key}[{index}]"),
    })
}

/// Finds the line of a position.
struct Lines(Vec<usize>);

impl Lines {
    fn of(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect())
    }

    fn at(&self, position: usize) -> usize {
        self.0.partition_point(|line_end| *line_end < position) + 1
    }
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

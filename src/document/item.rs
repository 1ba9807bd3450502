//! A value of a document, as it is read: what may stand there, and what is said where it does not.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::tree::{Node, Value};
use super::{Document, Place, Table};
use crate::chain::Chain;
use crate::secret::Secret;

/// A value that is being read. Each method that returns `None` has recorded why.
#[derive(Clone)]
pub struct Item<'a> {
    pub(super) document: &'a Document,
    pub(super) node: &'a Node,
    pub(super) place: Place,
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

//! What a file holds, with the place of each value, and how settings from the environment are planted in it.
//!
//! Promised: planting makes no list longer than by one element at a time, and replaces single values alone.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use toml::de::{DeTable, DeValue};

use super::join;

/// Where a value comes from.
#[derive(Debug, Clone)]
pub(super) enum Origin {
    /// The file as a whole.
    Whole,
    /// A line of it.
    Line(usize),
    /// A variable of the environment.
    Variable(String),
}

/// A key's place and value.
pub(super) struct Entry {
    pub(super) origin: Origin,
    pub(super) node: Node,
}

/// A value with its place.
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) value: Value,
}

pub(super) enum Value {
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
pub(super) struct TableNode {
    pub(super) entries: BTreeMap<String, Entry>,
    /// The keys that somebody asked for.
    pub(super) known: RefCell<BTreeSet<String>>,
    /// Whether somebody took this for a table at all.
    pub(super) read: Cell<bool>,
}

impl TableNode {
    pub(super) fn of(table: &DeTable<'_>, lines: &Lines) -> Self {
        let entry = |(key, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| {
            let key: &toml::Spanned<toml::de::DeString<'_>> = key;
            let origin = Origin::Line(lines.at(key.span().start));
            (key.get_ref().to_string(), Entry { origin, node: Node::of(value, lines) })
        };
        Self { entries: table.iter().map(entry).collect(), ..Self::default() }
    }

    pub(super) fn plant(&mut self, path: &[Step], origin: &Origin, value: String) -> Result<(), &'static str> {
        let Some((Step::Key(key), rest)) = path.split_first() else {
            return Err("this variable names an element of a list where there is none");
        };
        let vacant = || Entry { origin: origin.clone(), node: Node { origin: origin.clone(), value: Value::Vacant } };
        self.entries.entry(key.clone()).or_insert_with(vacant).node.plant(rest, origin, value)
    }
}

impl Node {
    pub(super) fn of(value: &toml::Spanned<DeValue<'_>>, lines: &Lines) -> Self {
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

    pub(super) fn plant(&mut self, path: &[Step], origin: &Origin, value: String) -> Result<(), &'static str> {
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
    pub(super) const fn kind(&self) -> &'static str {
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
pub(super) enum Step {
    Key(String),
    Index(usize),
}

impl Step {
    pub(super) fn of_variable(text: &str) -> Self {
        match text.parse() {
            Ok(index) if text.bytes().all(|byte| byte.is_ascii_digit()) => Self::Index(index),
            _ => Self::Key(text.to_ascii_lowercase()),
        }
    }
}

/// The path as it stands in faults.
pub(super) fn written(path: &[Step]) -> String {
    path.iter().fold(String::new(), |key, step| match step {
        Step::Key(name) => join(&key, name),
        Step::Index(index) => format!("{key}[{index}]"),
    })
}

/// Finds the line of a position.
pub(super) struct Lines(Vec<usize>);

impl Lines {
    pub(super) fn of(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect())
    }

    pub(super) fn at(&self, position: usize) -> usize {
        self.0.partition_point(|line_end| *line_end < position) + 1
    }
}

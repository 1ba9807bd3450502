//! What is wrong with a file, and where.
//!
//! Promised: a list of faults is bounded ([`FAULTS_MAX`]) and in the order of the lines; each is one line, which no file can forge.

use std::fmt;
use std::path::{Path, PathBuf};

use super::printable;
use crate::limits::FAULTS_MAX;

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

    pub(super) fn whole(file: &Path, problem: impl Into<String>) -> Fault {
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

/// Where something stands, to be kept for faults that show only later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub(super) file: PathBuf,
    pub(super) line: Option<usize>,
    pub(super) key: String,
    pub(super) variable: Option<String>,
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

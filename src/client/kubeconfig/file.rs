//! One kubeconfig: reading it, changing entries, and writing it under kubectl's lock.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tokio::time::Instant;
use yaml_serde::{Mapping, Value};

use super::Kind;
use crate::limits;
use crate::secret;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("could not read {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be written.
    #[error("could not write {}; it is as it was", .path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no kubeconfig, or one that we would not leave as it is.
    #[error("{} is no kubeconfig that can be changed: {why}", .path.display())]
    Form {
        /// Which.
        path: PathBuf,
        /// What is wrong; never its content.
        why: String,
    },
    /// Somebody else is writing.
    #[error(
        "{} is there: another program changes the file, or was killed when it did; if none runs, remove it", .path.display()
    )]
    Locked {
        /// The lock.
        path: PathBuf,
    },
}

/// What a kubeconfig holds.
#[derive(Debug, Clone)]
pub(super) struct Document(Mapping);

impl Default for Document {
    fn default() -> Self {
        let fields =
            [("apiVersion", "v1".into()), ("kind", "Config".into()), ("preferences", Value::Mapping(Mapping::new()))];
        Self(fields.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }
}

impl Document {
    /// Reads a file, if it is there.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, FileError> {
        let failed = |source| FileError::Read { path: path.to_owned(), source };
        let form = |why: String| FileError::Form { path: path.to_owned(), why };
        // Before it is opened, which may take for ever, and replaced: /dev/null is everybody's.
        match fs::metadata(path) {
            Ok(about) if !about.is_file() => return Err(form("it is no ordinary file".to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
                return Err(form("it is a link, and what it leads to is not there".to_owned()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        let file = File::open(path).map_err(failed)?;
        let mut text = String::new();
        file.take(limits::FILE_MAX + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > limits::FILE_MAX {
            return Err(form(format!("it is longer than {} bytes", limits::FILE_MAX)));
        }
        Self::parse(&text).map(Some).map_err(form)
    }

    fn parse(text: &str) -> Result<Self, String> {
        // The library's words tell where, but may repeat what stands there, and that may be a secret.
        let place = |error: yaml_serde::Error| match error.location() {
            Some(at) => format!("it is not well-formed YAML at line {}", at.line()),
            None => "it is not well-formed YAML".to_owned(),
        };
        let value: Value = match text.trim().is_empty() {
            true => Value::Null,
            false => yaml_serde::from_str(text).map_err(place)?,
        };
        let fields = match value {
            Value::Null => return Ok(Self::default()),
            Value::Mapping(fields) => fields,
            _ => return Err("it is not a mapping".to_owned()),
        };
        sound(&Value::Mapping(fields.clone()))?;
        for kind in [super::CLUSTER, super::USER, super::CONTEXT] {
            if !matches!(fields.get(kind.list), None | Some(Value::Null | Value::Sequence(_))) {
                return Err(format!("its {} are no list", kind.list));
            }
        }
        if fields.get("kind").is_some_and(|kind| kind.as_str() != Some("Config")) {
            return Err("its kind is not Config".to_owned());
        }
        Ok(Self(fields))
    }

    /// What an entry says, without its name.
    pub(super) fn entry(&self, kind: Kind, name: &str) -> Option<&Value> {
        let list = self.0.get(kind.list)?.as_sequence()?;
        let named = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some(name);
        list.iter().find(named).map(|entry| entry.get(kind.one).unwrap_or(&Value::Null))
    }

    /// Has an entry say `value`.
    pub(super) fn set(&mut self, kind: Kind, name: &str, value: Value) {
        let list = self.0.entry(kind.list.into()).or_insert(Value::Null);
        if list.is_null() {
            *list = Value::Sequence(Vec::new());
        }
        let Some(list) = list.as_sequence_mut() else { return };
        let entry = super::mapping([(kind.one, value), ("name", name.into())]);
        match list.iter_mut().find(|entry| entry.get("name").and_then(Value::as_str) == Some(name)) {
            Some(there) => *there = entry,
            None => list.push(entry),
        }
    }

    /// The context in use, if one is.
    pub(super) fn current(&self) -> Option<&str> {
        self.0.get("current-context").and_then(Value::as_str).filter(|name| !name.is_empty())
    }

    pub(super) fn set_current(&mut self, name: &str) {
        self.0.insert("current-context".into(), name.into());
    }

    /// Replaces the file, or what a link with its name leads to. Whoever holds its [`Lock`] may.
    pub(super) fn write(&self, path: &Path) -> Result<(), FileError> {
        let failed = |source| FileError::Write { path: path.to_owned(), source };
        let form = |_| FileError::Form { path: path.to_owned(), why: "it cannot be written as YAML".to_owned() };
        let text = yaml_serde::to_string(&self.0).map_err(form)?;
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let fresh = beside(&real, &format!(".{:08x}.new", secret::random_u32()));
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
            // It stays its owner's, also where root writes.
            if let Ok(before) = fs::metadata(&real) {
                std::os::unix::fs::fchown(&file, Some(before.uid()), Some(before.gid()))?;
            }
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&fresh, &real)
        })();
        written.map_err(|error| {
            // If it was made at all.
            drop(fs::remove_file(&fresh));
            failed(error)
        })
    }
}

/// A file beside another.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Whether writing it would leave it as it is. What YAML 1.1, which kubectl reads, and YAML 1.2, which we do, read differently is
/// written as one of the two and read as the other.
fn sound(value: &Value) -> Result<(), String> {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
        Value::String(text) if ambiguous(text) => Err(
            "it has a value that some readers of YAML take for something else (such as yes, off or 1_000): write true or \
             false, or leave it out"
                .to_owned(),
        ),
        Value::String(_) => Ok(()),
        Value::Sequence(values) => values.iter().try_for_each(sound),
        Value::Mapping(fields) => fields.iter().try_for_each(|(key, value)| {
            if key.as_str().is_none_or(|key| key == "<<") {
                return Err("it has a key that is no plain word".to_owned());
            }
            sound(key).and_then(|()| sound(value))
        }),
        Value::Tagged(_) => Err("it has a tag".to_owned()),
    }
}

fn ambiguous(text: &str) -> bool {
    let word = matches!(text.to_ascii_lowercase().as_str(), "y" | "n" | "yes" | "no" | "on" | "off");
    let digits = text.trim_start_matches(['+', '-']);
    let number = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && digits.contains('_')
        && digits.bytes().all(|byte| byte.is_ascii_hexdigit() || b"_.xob".contains(&byte));
    word || number
}

/// kubectl's lock of a file. Goes when this is dropped.
#[derive(Debug)]
pub(super) struct Lock(PathBuf);

impl Lock {
    /// Waits for it a little: who has it writes a file and no more.
    pub(super) async fn take(path: &Path) -> Result<Self, FileError> {
        let lock = beside(path, ".lock");
        let failed = |source| FileError::Write { path: path.to_owned(), source };
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        let deadline = Instant::now() + limits::KUBECONFIG_LOCK;
        loop {
            match OpenOptions::new().write(true).create_new(true).mode(0o000).open(&lock) {
                Ok(_) => return Ok(Self(lock)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(error)),
            }
            if Instant::now() >= deadline {
                return Err(FileError::Locked { path: lock });
            }
            // Nobody tells when it is gone.
            tokio::time::sleep(limits::KUBECONFIG_LOCK_RETRY).await;
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // If somebody has removed it by hand, it is gone all the same.
        drop(fs::remove_file(&self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_ours_to_read_is_refused_without_being_repeated() {
        for (text, why) in [
            ("- a\n", "not a mapping"),
            ("a: [secret", "well-formed"),
            ("a: 1\na: 2\n", "well-formed"),
            ("--- {}\n--- {}\n", "well-formed"),
            ("kind: Secret\n", "kind"),
            ("clusters: {}\n", "no list"),
            ("users: x\n", "no list"),
            ("a: !secret x\n", "tag"),
            ("1: x\n", "key"),
            ("a: &a {x: 1}\nb: {<<: *a}\n", "key"),
            ("a: {insecure: yes}\n", "other"),
            ("a: 'Off'\n", "other"),
            ("on: x\n", "other"),
            ("a: 1_000\n", "other"),
        ] {
            let fault = Document::parse(text).map(|_| ()).expect_err(text);
            let expected = if why == "other" { "something else" } else { why };
            assert!(fault.contains(expected) && !fault.contains("secret x"), "{text}: {fault}");
        }
        for text in ["", "\n", "# nothing\n", "{}", "{\"kind\": \"Config\"}", "clusters: null\n"] {
            assert!(Document::parse(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn what_is_written_reads_as_before() {
        let text = "apiVersion: v1\nkind: Config\nunknown: {deep: [1, 2.5, true, null, '0123', 'true', '1e3', '~', \"a\\nb\\n\", ' x', '#', '8080']}\n\
                    users:\n- name: u\n  user: {token: 'abc:def: #x', as: ''}\n";
        let document = Document::parse(text).expect("good");
        let again = yaml_serde::to_string(&document.0).expect("written");
        assert_eq!(Document::parse(&again).expect("good").0, document.0);
        for quoted in ["'0123'", "'true'", "'1e3'", "'8080'"] {
            assert!(again.contains(quoted), "{again}");
        }
    }
}

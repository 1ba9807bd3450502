//! The credentials, in a file that only its owner can read.
//!
//! Promised: the file is replaced as a whole, so that a reader sees one state or the next; it is on the disk, with its
//! directory entry, before [`Staged::commit`] returns; nobody but its owner can ever read it. Entries of other
//! instances or roles are left as they are. Whoever changes it holds its [`Lock`] from reading to writing, so that runs
//! on different instances can share one file.
//!
//! The form is a JSON array of `{"host", "port", "name", "username", "password"}`; `name` is the database, and null for
//! a role without one. While a password is being changed there is also `next_password`, which takes the place of
//! `password` as soon as the server has it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};
use serde_json::{Map, Value, json};
use zeroize::Zeroize;

use super::Resources;
use super::plan::Kept;
use crate::limits::FILE_MAX;
use crate::postgres::Identifier;
use crate::secret::Secret;

/// Why the output file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// It could not be read.
    #[error("could not read the output file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It could not be written.
    #[error("could not write the output file {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others may read it.
    #[error("the output file {} can be read by others; it holds passwords: chmod 600", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{} exists and is no output file of ours ({what}); name another file", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; never its content.
        what: &'static str,
    },
}

/// The content of an output file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounts {
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    host: String,
    port: u16,
    name: Option<String>,
    username: String,
    password: Option<Secret<String>>,
    next: Option<Secret<String>>,
}

impl Accounts {
    /// Reads the file; a file that does not exist is an empty one.
    ///
    /// # Errors
    /// If it cannot be read, others can read it, or it is something else.
    pub fn read(path: &Path) -> Result<Self, OutputError> {
        let failed = |source| OutputError::Read { path: path.to_owned(), source };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(failed(error)),
        };
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(OutputError::Foreign { path: path.to_owned(), what: "it is not a regular file" });
        }
        if metadata.permissions().mode() & 0o077 != 0 {
            return Err(OutputError::Exposed { path: path.to_owned() });
        }
        let mut text = String::new();
        file.take(FILE_MAX + 1).read_to_string(&mut text).map_err(failed)?;
        let parsed = Self::parse(&text);
        text.zeroize();
        parsed.map_err(|what| OutputError::Foreign { path: path.to_owned(), what })
    }

    fn parse(text: &str) -> Result<Self, &'static str> {
        if text.len() as u64 > FILE_MAX {
            return Err("it is too large");
        }
        // The parser's own error could repeat a part of the content.
        let Ok(Value::Array(items)) = serde_json::from_str(text) else { return Err("it is not a JSON array") };
        let entries = items.into_iter().map(Entry::parse).collect::<Option<_>>();
        Ok(Self { entries: entries.ok_or("it holds something that is not an entry of ours")? })
    }

    /// The entries as text. Entries without a password say `null`.
    #[must_use]
    pub fn to_text(&self) -> Secret<String> {
        let entries: Vec<_> = self.entries.iter().map(Entry::to_json).collect();
        let mut text = format!("{:#}", Value::Array(entries));
        text.push('\n');
        Secret::new(text)
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What it holds for a role of `resources`.
    #[must_use]
    pub fn kept(&self, resources: &Resources, role: &Identifier) -> Option<Kept> {
        let entries: Vec<_> = self.entries.iter().filter(|entry| entry.is_of(resources, role)).collect();
        if entries.is_empty() {
            return None;
        }
        let password = self.password(resources, role);
        let complete = wanted(resources, role).all(|name| {
            let entry = entries.iter().find(|entry| entry.name.as_deref() == name);
            entry.is_some_and(|entry| entry.password.as_ref() == password)
        });
        Some(Kept { password: password.is_some(), next: self.next(resources, role).is_some(), incomplete: !complete })
    }

    /// The password of a role.
    #[must_use]
    pub fn password(&self, resources: &Resources, role: &Identifier) -> Option<&Secret<String>> {
        self.entries.iter().filter(|entry| entry.is_of(resources, role)).find_map(|entry| entry.password.as_ref())
    }

    /// The password that is about to replace it.
    #[must_use]
    pub fn next(&self, resources: &Resources, role: &Identifier) -> Option<&Secret<String>> {
        self.entries.iter().filter(|entry| entry.is_of(resources, role)).find_map(|entry| entry.next.as_ref())
    }

    /// Makes sure that each database of a role has an entry, with this password and this next one.
    pub fn set(
        &mut self,
        resources: &Resources,
        role: &Identifier,
        password: Option<&Secret<String>>,
        next: Option<&Secret<String>>,
    ) {
        for name in wanted(resources, role) {
            if !self.entries.iter().any(|entry| entry.is_of(resources, role) && entry.name.as_deref() == name) {
                self.entries.push(Entry {
                    host: resources.instance.target.host.to_string(),
                    port: resources.instance.target.port,
                    name: name.map(str::to_owned),
                    username: resources.instance.login(role),
                    password: None,
                    next: None,
                });
            }
        }
        for entry in self.entries.iter_mut().filter(|entry| entry.is_of(resources, role)) {
            entry.password = password.cloned();
            entry.next = next.cloned();
        }
    }

    /// Removes the entries of a role.
    pub fn forget(&mut self, resources: &Resources, role: &Identifier) {
        self.entries.retain(|entry| !entry.is_of(resources, role));
    }

    /// Writes the content to the disk beside `path`, where nobody looks for it yet.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn stage(&self, path: &Path) -> Result<Staged, OutputError> {
        let staged = Staged { path: path.to_owned(), fresh: fresh_path(path)? };
        staged.write(self.to_text().expose()).map_err(|source| staged.failed(source))?;
        Ok(staged)
    }
}

/// Content that is on the disk and takes the place of the file's with [`Staged::commit`].
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
    fresh: PathBuf,
}

impl Staged {
    /// Takes the file's place; durable when this returns.
    ///
    /// # Errors
    /// If the file cannot be replaced, or the system does not confirm that it was.
    pub fn commit(self) -> Result<(), OutputError> {
        fs::rename(&self.fresh, &self.path)
            .and_then(|()| sync_directory(&self.path))
            .map_err(|source| self.failed(source))
    }

    fn write(&self, text: &str) -> io::Result<()> {
        // Left behind by a run that was killed.
        ignore_missing(fs::remove_file(&self.fresh))?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    }

    fn failed(&self, source: io::Error) -> OutputError {
        OutputError::Write { path: self.path.clone(), source }
    }
}

/// Keeps other runs away from an output file. It ends when this is dropped, or with the process.
#[derive(Debug)]
pub struct Lock {
    beside: PathBuf,
    _held: File,
}

impl Lock {
    /// Takes the lock of the output file `path`; `None` if another run has it.
    ///
    /// # Errors
    /// If the file that stands for it cannot be made beside the output file.
    pub fn take(path: &Path) -> Result<Option<Self>, OutputError> {
        let failed = |source| OutputError::Write { path: path.to_owned(), source };
        // Not the output file itself, which is replaced under the lock.
        let beside = path_beside(path, ".caponier-lock")?;
        let flags = OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(flags)
            .open(&beside)
            .map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(failed(error.into())),
        }
        // Whoever had it may have removed the file after we opened it, and then this one stands for nothing.
        let held = file.metadata().map_err(failed)?;
        match fs::symlink_metadata(&beside) {
            Ok(found) if (found.dev(), found.ino()) == (held.dev(), held.ino()) => {
                Ok(Some(Self { beside, _held: file }))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the lock itself ends. One that stays behind does no harm.
        let _ = fs::remove_file(&self.beside);
    }
}

/// Removes the file; durable when this returns. That it is gone already is no error.
///
/// # Errors
/// If it cannot be removed.
pub fn remove(path: &Path) -> Result<(), OutputError> {
    let failed = |source| OutputError::Write { path: path.to_owned(), source };
    tidy(path)?;
    ignore_missing(fs::remove_file(path)).and_then(|()| sync_directory(path)).map_err(failed)
}

/// Removes what a run left behind that was killed while it wrote.
///
/// # Errors
/// If it cannot be removed.
pub fn tidy(path: &Path) -> Result<(), OutputError> {
    let fresh = fresh_path(path)?;
    ignore_missing(fs::remove_file(fresh)).map_err(|source| OutputError::Write { path: path.to_owned(), source })
}

/// Tries whether the file could be written, without touching it.
///
/// # Errors
/// If it could not.
pub fn probe(path: &Path) -> Result<(), OutputError> {
    let staged = Accounts::default().stage(path)?;
    fs::remove_file(&staged.fresh).map_err(|source| staged.failed(source))
}

impl Entry {
    fn is_of(&self, resources: &Resources, role: &Identifier) -> bool {
        let target = &resources.instance.target;
        self.username == resources.instance.login(role)
            && self.port == target.port
            && self.host == target.host.to_string()
    }

    fn parse(item: Value) -> Option<Self> {
        let Value::Object(mut map) = item else { return None };
        let mut text = |key: &str| match map.remove(key) {
            None | Some(Value::Null) => Some(None),
            Some(Value::String(text)) => Some(Some(text)),
            Some(_) => None,
        };
        let entry = Self {
            host: text("host")??,
            name: text("name")?,
            username: text("username")??,
            password: text("password")?.map(Secret::new),
            next: text("next_password")?.map(Secret::new),
            port: u16::try_from(map.remove("port")?.as_u64()?).ok()?,
        };
        map.is_empty().then_some(entry)
    }

    fn to_json(&self) -> Value {
        let shown = |secret: &Option<Secret<String>>| secret.as_ref().map(|secret| secret.expose().clone());
        let mut map = Map::new();
        map.insert("host".into(), json!(self.host));
        map.insert("port".into(), json!(self.port));
        map.insert("name".into(), json!(self.name));
        map.insert("username".into(), json!(self.username));
        map.insert("password".into(), json!(shown(&self.password)));
        if self.next.is_some() {
            map.insert("next_password".into(), json!(shown(&self.next)));
        }
        Value::Object(map)
    }
}

/// The databases that a role has entries for.
fn wanted<'a>(resources: &'a Resources, role: &Identifier) -> impl Iterator<Item = Option<&'a str>> {
    let accounts = resources.accounts().into_iter().filter(move |(_, owner)| *owner == role);
    accounts.map(|(name, _)| name.map(Identifier::as_str)).collect::<Vec<_>>().into_iter()
}

/// The name under which new content is written: always the same, so that one left behind is found again.
fn fresh_path(path: &Path) -> Result<PathBuf, OutputError> {
    path_beside(path, ".caponier-new")
}

fn path_beside(path: &Path, ending: &str) -> Result<PathBuf, OutputError> {
    let Some(name) = path.file_name() else {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "the path names no file");
        return Err(OutputError::Write { path: path.to_owned(), source });
    };
    let mut beside = std::ffi::OsString::from(".");
    beside.push(name);
    beside.push(ending);
    Ok(path.with_file_name(beside))
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provision::{Database, Instance, Output, Tls};

    fn resources() -> Resources {
        let name = |text| Identifier::new(text).expect("name");
        let database = |text| Database {
            name: name(text),
            owner: name("orders"),
            template: None,
            encoding: None,
            connection_limit: None,
            extensions: Vec::new(),
            grants: Vec::new(),
        };
        Resources {
            id: "set".parse().expect("id"),
            instance: Instance {
                target: "db:5432".parse().expect("target"),
                database: name("postgres"),
                user: name("admin"),
                login_suffix: None,
                password: None,
                tls: Tls::Disable,
            },
            databases: vec![database("orders"), database("archive")],
            roles: Vec::new(),
            output: Output::Stdout,
        }
    }

    #[test]
    fn refuses_files_of_others_without_repeating_them() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("out.json");
        for text in [
            "hunter2",
            "{}",
            "[1]",
            "[{}]",
            r#"[{"host": "h", "port": 0.5, "username": "u", "password": "hunter2"}]"#,
            r#"[{"host": "h", "port": 65536, "username": "u", "password": "hunter2"}]"#,
            r#"[{"host": "h", "port": 1, "username": "u", "password": "hunter2", "more": 1}]"#,
            r#"[{"host": "h", "port": 1, "username": "u", "password": ["hunter2"]}]"#,
        ] {
            fs::write(&path, text).expect("write");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("mode");
            let error = Accounts::read(&path).expect_err(text);
            assert!(matches!(error, OutputError::Foreign { .. }), "{text}: {error}");
            assert!(!format!("{error} {error:?}").contains("hunter2"));
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).expect("mode");
        assert!(matches!(Accounts::read(&path), Err(OutputError::Exposed { .. })));
        assert!(matches!(Accounts::read(dir.path()), Err(OutputError::Foreign { .. })));
        assert!(Accounts::read(&dir.path().join("absent")).expect("none yet").is_empty());
        let nowhere = dir.path().join("absent").join("out.json");
        assert!(matches!(probe(&nowhere), Err(OutputError::Write { .. })));
        assert!(matches!(probe(Path::new("/")), Err(OutputError::Write { .. })));
    }

    #[test]
    fn one_run_has_the_lock_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("out.json");
        // Left behind by a run that was killed.
        fs::write(dir.path().join(".out.json.caponier-lock"), "").expect("write");
        let first = Lock::take(&path).expect("taken").expect("free");
        assert!(Lock::take(&path).expect("tried").is_none());
        assert!(Lock::take(&dir.path().join("other.json")).expect("tried").is_some(), "another file has another lock");
        drop(first);
        assert_eq!(fs::read_dir(dir.path()).expect("directory").count(), 0);
        assert!(Lock::take(&path).expect("tried").is_some());
        let nowhere = dir.path().join("absent").join("out.json");
        assert!(matches!(Lock::take(&nowhere), Err(OutputError::Write { .. })));
    }

    #[test]
    fn what_is_written_reads_back_and_others_entries_stay() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("out.json");
        let (resources, role) = (resources(), Identifier::new("orders").expect("name"));
        let mut accounts = Accounts::parse(
            r#"[{"host": "else", "port": 5432, "name": null, "username": "orders", "password": "theirs"}]"#,
        )
        .expect("an entry");
        assert_eq!(accounts.kept(&resources, &role), None);
        let (one, two) = (Secret::new("one".to_owned()), Secret::new("two".to_owned()));
        accounts.set(&resources, &role, Some(&one), Some(&two));
        // What a run that was killed left behind is in nobody's way.
        fs::write(dir.path().join(".out.json.caponier-new"), "left").expect("write");
        accounts.stage(&path).expect("stage").commit().expect("commit");
        assert_eq!(fs::metadata(&path).expect("metadata").permissions().mode() & 0o777, 0o600);
        assert_eq!(Accounts::read(&path).expect("read"), accounts);
        assert_eq!(accounts.kept(&resources, &role), Some(Kept { password: true, next: true, incomplete: false }));
        assert_eq!(accounts.entries.len(), 3);
        accounts.entries.pop();
        assert_eq!(accounts.kept(&resources, &role).map(|kept| kept.incomplete), Some(true));
        accounts.forget(&resources, &role);
        assert_eq!(accounts.entries.len(), 1);
        remove(&path).expect("remove");
        remove(&path).expect("again");
        assert_eq!(fs::read_dir(dir.path()).expect("directory").count(), 0);
    }

    #[test]
    fn debug_shows_no_password() {
        let mut accounts = Accounts::default();
        let role = Identifier::new("orders").expect("name");
        accounts.set(&resources(), &role, Some(&Secret::new("hunter2".to_owned())), None);
        assert!(!format!("{accounts:?}").contains("hunter2"));
    }
}

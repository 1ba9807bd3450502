//! Changes to a registry in folders, made by a program: a key more, a key withdrawn.
//!
//! Promised: nothing is changed in a registry that does not load, and what was written is loaded again before it is said to
//! be done, else taken back. No file is ever overwritten but a key's own `.toml`, of which all but `revoked` or `expires` stays as
//! it stands, comments included; and `expires` is only ever brought forward. Each file appears whole or not at all and is on disk when this returns. They come in such an
//! order that whoever is killed between two of them leaves a registry that loads, in which the key is not there yet or counts
//! as was said, never for longer ([`waiting`]). One program at a time: the folder is locked.
//!
//! Absent: taking files away. A revoked key stays, so that the trail can say what it was, and nobody registers it again.

use std::fmt::Write as _;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use jiff::Timestamp;

use super::file::{AboutKey, KeyFiles, load_with_files, waiting};
use super::{RegisteredKey, Role, Snapshot};
use crate::document::{Document, Faults, read_text};
use crate::identity::{Fingerprint, KeyError, OrganisationId, Pattern, PublicKey};

/// Why a registry was not changed.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// It has faults.
    #[error("the registry has faults, and is not changed before they are mended")]
    Faults(#[source] Faults),
    /// Somebody else changes it, or the system refuses.
    #[error("could not lock the registry {}; does another program change it now?", .path.display())]
    Lock {
        /// Its folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no such agent or principal.
    #[error("there is no {role} in {organisation}: say --new if it is to be made")]
    UnknownHolder {
        /// In which organisation.
        organisation: OrganisationId,
        /// Who.
        role: Role,
    },
    /// The key is there.
    #[error(
        "key {key} is registered in {organisation} already, for {role}: a key has one holder, and is never used again"
    )]
    Present {
        /// Which.
        key: Fingerprint,
        /// Where.
        organisation: OrganisationId,
        /// For whom.
        role: Role,
    },
    /// It would never count, or the words beside it cannot be stored.
    #[error("{0}")]
    Unfit(&'static str),
    /// No key has this fingerprint.
    #[error("no key in the registry has the fingerprint {0}: `caponier keys list` shows them")]
    UnknownKey(KeyName),
    /// Several organisations know it.
    #[error("key {key} is registered in {organisations}: say in which with --organisation")]
    Ambiguous {
        /// Which.
        key: KeyName,
        /// Where.
        organisations: String,
    },
    /// A sidecar that is written in a way that cannot be changed safely.
    #[error("{} cannot be changed by a program as it is written: write {} there yourself", .path.display(), .wanted)]
    Unwritable {
        /// Which.
        path: PathBuf,
        /// What is to stand there.
        wanted: String,
    },
    /// No key that signs tokens has this name.
    #[error("{organisation} has no key {name} that signs tokens now: `caponier keys add … token-key` registers one")]
    NoSigner {
        /// In which organisation.
        organisation: OrganisationId,
        /// The name.
        name: String,
    },
    /// The file system.
    #[error("could not write {}", .path.display())]
    Write {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was written does not load.
    #[error("the registry would have faults then, so that nothing was changed")]
    Broken(#[source] Faults),
}

/// A key by its fingerprint, in either form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyName {
    /// As SSH writes it.
    Ssh(Fingerprint),
    /// The SHA-256 of its SPKI, in hex.
    Spki(String),
}

impl KeyName {
    /// Whether it is this key's.
    #[must_use]
    pub fn names(&self, key: &PublicKey) -> bool {
        match self {
            Self::Ssh(fingerprint) => key.fingerprint() == *fingerprint,
            Self::Spki(hex) => key.spki_fingerprint().is_some_and(|spki| spki == *hex),
        }
    }
}

impl FromStr for KeyName {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(Self::Spki(text.to_ascii_lowercase()));
        }
        text.parse().map(Self::Ssh)
    }
}

impl std::fmt::Display for KeyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ssh(fingerprint) => fingerprint.fmt(f),
            Self::Spki(hex) => f.write_str(hex),
        }
    }
}

/// A key that is registered, with all that is known of it.
#[derive(Debug, Clone)]
pub struct Listed {
    /// In which organisation.
    pub organisation: OrganisationId,
    /// For whom.
    pub role: Role,
    /// The key.
    pub key: RegisteredKey,
    /// Where it lies.
    pub file: PathBuf,
}

/// Every key of a registry, by organisation and holder.
///
/// # Errors
/// With every fault of the registry, if there is one.
pub fn list(dir: &Path) -> Result<Vec<Listed>, Faults> {
    load_with_files(dir).map(|(snapshot, files)| listed(&snapshot, &files))
}

fn listed(snapshot: &Snapshot, files: &KeyFiles) -> Vec<Listed> {
    let mut all = Vec::new();
    for (id, organisation) in snapshot.organisations() {
        for (role, key) in organisation.keys() {
            let file = files.get(id).and_then(|files| files.get(&key.key.fingerprint())).cloned().unwrap_or_default();
            all.push(Listed { organisation: id.clone(), role, key: key.clone(), file });
        }
    }
    all
}

/// A key that is to be registered.
#[derive(Debug, Clone)]
pub struct Addition {
    /// In which organisation.
    pub organisation: OrganisationId,
    /// For whom.
    pub role: Role,
    /// The key.
    pub key: PublicKey,
    /// From when on it counts.
    pub not_before: Option<Timestamp>,
    /// From when on it does not count any more.
    pub expires: Option<Timestamp>,
    /// A note for people.
    pub comment: Option<String>,
    /// Whether the holder, and its organisation, may be new; then a principal may use these agents.
    pub new: Option<Vec<Pattern>>,
    /// Of a key that signs tokens: what it is called, and for whom it signs.
    pub signs: Option<Signs>,
}

/// What is said of a key that signs tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signs {
    /// The name of its file; those that replace it have a date behind that.
    pub name: String,
    /// For which principals it may sign.
    pub principals: Vec<Pattern>,
}

/// A key that signs tokens in the place of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Succession {
    /// Where it lies, unless it was registered before.
    pub file: Option<PathBuf>,
    /// Those that it replaces, and until when each still counts.
    pub replaced: Vec<(Fingerprint, Timestamp)>,
}

/// What became of a revocation.
#[derive(Debug, Clone)]
pub struct Revoked {
    /// The key as it was registered.
    pub key: Listed,
    /// Whether it was revoked before; then nothing was changed.
    pub before: bool,
    /// Whether its holder has no other key now that counts.
    pub last: bool,
}

/// A registry that nobody else changes meanwhile.
#[derive(Debug)]
pub struct Editor {
    dir: PathBuf,
    /// Holds the lock.
    _lock: File,
    snapshot: Snapshot,
    files: KeyFiles,
}

impl Editor {
    /// Locks and loads a registry. Does not wait for others.
    ///
    /// # Errors
    /// If it is locked, or has faults.
    pub fn open(dir: &Path) -> Result<Self, EditError> {
        let locked = || {
            let lock = File::open(dir)?;
            rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        };
        let lock = locked().map_err(|source| EditError::Lock { path: dir.to_owned(), source })?;
        let (snapshot, files) = load_with_files(dir).map_err(EditError::Faults)?;
        Ok(Self { dir: dir.to_owned(), _lock: lock, snapshot, files })
    }

    /// What is registered.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Registers a key; the file that it lies in then.
    ///
    /// # Errors
    /// If it may not be, or the file system refuses; then nothing is left behind.
    pub fn add(&mut self, addition: &Addition, now: Timestamp) -> Result<PathBuf, EditError> {
        self.judge(addition, now)?;
        let (file, steps) = self.steps(addition, now)?;
        let mut made = Made::default();
        for step in &steps {
            made.step(step)?;
        }
        (self.snapshot, self.files) = load_with_files(&self.dir).map_err(EditError::Broken)?;
        made.keep();
        // It is passed over: if it stays, that harms nobody.
        drop(std::fs::remove_file(waiting(&file)));
        Ok(file)
    }

    /// What is made for a new key, one after the other, and the file that it lies in then.
    fn steps(&self, addition: &Addition, now: Timestamp) -> Result<(PathBuf, Vec<Step>), EditError> {
        let Addition { organisation, role, .. } = addition;
        let date = now.strftime("%Y-%m-%d").to_string();
        let within = self.dir.join("organisations").join(organisation.as_str());
        let (kind, name) = match (role, &addition.signs) {
            (Role::Agent(id), _) => ("agents", id.as_str()),
            (Role::Principal(id), _) => ("principals", id.as_str()),
            (Role::Authority, _) => {
                return Err(EditError::Unfit("a user CA is registered by hand, with what it may certify"));
            }
            (Role::TokenKey, None) => {
                return Err(EditError::Unfit("of a key for tokens its name is wanted, and whom it may sign for"));
            }
            (Role::TokenKey, Some(signs)) => {
                let folder = within.join(TOKEN_KEYS);
                let stem = match is_free(&folder, &signs.name) {
                    true => signs.name.clone(),
                    false => free_stem(&folder, &format!("{}-{date}", signs.name)),
                };
                let mut steps = vec![Step::Folder(folder.clone())];
                let file = key_steps(&mut steps, &folder, &stem, addition);
                return Ok((file, steps));
            }
        };
        let members = within.join(kind);
        let folder = members.join(name);
        let mut steps = vec![Step::Folder(members.clone())];
        if let (Role::Principal(_), Some(agents)) = (role, &addition.new)
            && !self.holds(organisation, role)
        {
            let quoted: Vec<_> = agents.iter().map(|pattern| string(pattern.as_str())).collect();
            // Before the folder, which is a fault without it.
            steps.push(Step::File(members.join(format!("{name}.toml")), format!("agents = [{}]\n", quoted.join(", "))));
        }
        steps.push(Step::Folder(folder.clone()));
        let stem = free_stem(&folder, &date);
        let file = key_steps(&mut steps, &folder, &stem, addition);
        Ok((file, steps))
    }

    /// Registers a key that signs tokens in the place of those of one name, for the same principals. They count until `until`
    /// and no longer, where they do not end sooner; what they have signed does with them. Whoever is interrupted can do it
    /// again, and so can whoever wants them to end sooner.
    ///
    /// # Errors
    /// If there are none, they or the new key sign for different principals, one of them would never count then, or the key may
    /// not be registered: nothing is changed. If the file system refuses, or a file is written in a way of its own, keys before it
    /// may have their end already, and the new one counts beside them.
    pub fn succeed(
        &mut self,
        addition: &Addition,
        name: &str,
        until: Timestamp,
        now: Timestamp,
    ) -> Result<Succession, EditError> {
        let Addition { organisation, key, .. } = addition;
        let unknown = || EditError::NoSigner { organisation: organisation.clone(), name: name.to_owned() };
        let mut ours = listed(&self.snapshot, &self.files);
        ours.retain(|it| {
            let stem = it.file.file_stem().unwrap_or_default().to_string_lossy();
            it.role == Role::TokenKey && it.organisation == *organisation && is_of(&stem, name)
        });
        let present = ours.iter().position(|it| it.key.key == *key).map(|at| ours.remove(at));
        if present.as_ref().is_some_and(|present| !present.key.counts(now)) {
            return Err(EditError::Unfit("the new key is revoked, has expired, or does not count yet"));
        }
        let ends = present.as_ref().map_or(addition.expires, |present| present.key.expires);
        if ends.is_some_and(|ends| ends <= until) {
            return Err(EditError::Unfit(
                "the new key has an end of its own before the overlap is over, so that none would be left: take another key, or a \
                 shorter overlap",
            ));
        }
        ours.retain(|it| !it.key.revoked && it.key.expires.is_none_or(|expires| expires > now));
        if ours.iter().any(|old| old.key.not_before.is_some_and(|begins| begins >= until)) {
            return Err(EditError::Unfit(
                "one of the keys that are to be replaced does not count before the overlap is over: revoke it first",
            ));
        }
        let held: Vec<_> =
            self.snapshot.organisations().get(organisation).into_iter().flat_map(|held| &held.token_keys).collect();
        let mut principals: Vec<_> = held
            .iter()
            .filter(|signer| ours.iter().any(|it| it.key.key == signer.registered.key))
            .map(|signer| &signer.principals)
            .collect();
        principals.dedup();
        let principals = match principals[..] {
            [] => return Err(unknown()),
            [principals] => principals.clone(),
            _ => {
                return Err(EditError::Unfit(
                    "the keys that are to be replaced sign for different principals: add the new key with `caponier keys add`, \
                     and revoke the old ones later",
                ));
            }
        };
        let differs = held.iter().any(|signer| signer.registered.key == *key && signer.principals != principals);
        if present.is_some() && differs {
            return Err(EditError::Unfit(
                "the new key is registered already, and signs for other principals than those that it is to replace: let its .toml \
                 say the same, or take another key",
            ));
        }
        let file = match present {
            Some(_) => None,
            None => {
                let signs = Some(Signs { name: name.to_owned(), principals });
                Some(self.add(&Addition { signs, ..addition.clone() }, now)?)
            }
        };
        let mut replaced = Vec::new();
        for old in ours {
            let ends = old.key.expires.map_or(until, |expires| expires.min(until));
            if old.key.expires != Some(ends) {
                let wanted = format!("expires = {}", moment(ends));
                self.rewrite(&old, &wanted, |text, path| with_expires(path, text, ends))?;
            }
            replaced.push((old.key.key.fingerprint(), ends));
        }
        Ok(Succession { file, replaced })
    }

    /// Withdraws a key. The organisation need be given only where several know the key.
    ///
    /// # Errors
    /// If there is no such key, or the file system refuses; then it is as good as before.
    pub fn revoke(
        &mut self,
        name: &KeyName,
        organisation: Option<&OrganisationId>,
        now: Timestamp,
    ) -> Result<Revoked, EditError> {
        let mut found = listed(&self.snapshot, &self.files);
        found.retain(|it| name.names(&it.key.key) && organisation.is_none_or(|only| *only == it.organisation));
        let key = match found.len() {
            0 => return Err(EditError::UnknownKey(name.clone())),
            1 => found.remove(0),
            _ => {
                let ids: Vec<_> = found.iter().map(|it| it.organisation.as_str()).collect();
                return Err(EditError::Ambiguous { key: name.clone(), organisations: ids.join(" and ") });
            }
        };
        let before = key.key.revoked;
        if !before {
            self.write_revoked(&key)?;
        }
        let others = self.snapshot.organisations().get(&key.organisation).into_iter().flat_map(|held| held.keys());
        let member = !matches!(key.role, Role::Authority | Role::TokenKey);
        let last = member && !others.into_iter().any(|(role, other)| role == key.role && other.counts(now));
        Ok(Revoked { key, before, last })
    }

    fn write_revoked(&mut self, key: &Listed) -> Result<(), EditError> {
        let path = key.file.with_extension("toml");
        if !path.exists() {
            let mut made = Made::default();
            made.step(&Step::File(path, format!("{REVOKED}\n")))?;
            (self.snapshot, self.files) = load_with_files(&self.dir).map_err(EditError::Broken)?;
            made.keep();
            return Ok(());
        }
        self.rewrite(key, REVOKED, |text, path| with_revoked(path, text))
    }

    /// Changes what stands beside a key, to what `change` makes of it; where that is nothing, `wanted` is for people to write.
    fn rewrite(
        &mut self,
        key: &Listed,
        wanted: &str,
        change: impl FnOnce(&str, &Path) -> Option<String>,
    ) -> Result<(), EditError> {
        let path = key.file.with_extension("toml");
        let unwritable = || EditError::Unwritable { path: path.clone(), wanted: wanted.to_owned() };
        // Where the file really is: a link to it stays a link.
        let path = path.canonicalize().map_err(|source| EditError::Write { path: path.clone(), source })?;
        let text = read_text(&path).map_err(EditError::Faults)?;
        let new = change(&text, &path).ok_or_else(unwritable)?;
        replace(&path, &new)?;
        match load_with_files(&self.dir) {
            Ok(loaded) => {
                (self.snapshot, self.files) = loaded;
                Ok(())
            }
            Err(faults) => {
                replace(&path, &text)?;
                Err(EditError::Broken(faults))
            }
        }
    }

    fn holds(&self, organisation: &OrganisationId, role: &Role) -> bool {
        self.snapshot.organisations().get(organisation).is_some_and(|held| match role {
            Role::Agent(id) => held.agents.contains_key(id),
            Role::Principal(id) => held.principals.contains_key(id),
            Role::Authority => !held.authorities.is_empty(),
            // Whoever it signs for is said with it.
            Role::TokenKey => true,
        })
    }

    fn judge(&self, addition: &Addition, now: Timestamp) -> Result<(), EditError> {
        let Addition { organisation, role, key, not_before, expires, comment, new, signs } = addition;
        if !self.holds(organisation, role) && new.is_none() {
            return Err(EditError::UnknownHolder { organisation: organisation.clone(), role: role.clone() });
        }
        if *role == Role::TokenKey {
            if key.ed25519().is_none() {
                return Err(EditError::Unfit(
                    "tokens are signed with Ed25519 keys alone (`caponier keys generate` makes one)",
                ));
            }
            if signs.as_ref().is_none_or(|signs| signs.principals.is_empty()) {
                return Err(EditError::Unfit(
                    "a key for tokens that may sign for nobody is of no use: name principals",
                ));
            }
        }
        let fingerprint = key.fingerprint();
        let held = self.snapshot.organisations().get(organisation).into_iter().flat_map(|held| held.keys());
        if let Some((role, _)) = held.into_iter().find(|(_, other)| other.key.fingerprint() == fingerprint) {
            return Err(EditError::Present { key: fingerprint, organisation: organisation.clone(), role });
        }
        if expires.is_some_and(|expires| expires <= now) {
            return Err(EditError::Unfit("the key would have expired already"));
        }
        if let (Some(from), Some(to)) = (not_before, expires)
            && to <= from
        {
            return Err(EditError::Unfit("the key would never count: it expires before it begins to"));
        }
        if comment
            .as_deref()
            .is_some_and(|comment| comment.len() > COMMENT_MAX || comment.chars().any(char::is_control))
        {
            return Err(EditError::Unfit("a comment is at most 255 bytes long and has no control characters"));
        }
        Ok(())
    }
}

/// Something that is made.
#[derive(Debug)]
enum Step {
    /// Unless it is there.
    Folder(PathBuf),
    /// With this text, and not if something is there.
    File(PathBuf, String),
}

/// What was made, and goes again unless it is kept.
#[derive(Default)]
struct Made(Vec<PathBuf>);

impl Made {
    fn step(&mut self, step: &Step) -> Result<(), EditError> {
        match step {
            Step::Folder(path) => self.folder(path),
            Step::File(path, text) => self.file(path, text),
        }
    }

    /// Makes a folder, and those above it, as far as they are not there.
    fn folder(&mut self, path: &Path) -> Result<(), EditError> {
        let missing: Vec<_> = path.ancestors().take_while(|folder| !folder.exists()).collect();
        for folder in missing.into_iter().rev() {
            let failed = |source| EditError::Write { path: folder.to_owned(), source };
            DirBuilder::new().create(folder).map_err(failed)?;
            self.0.push(folder.to_owned());
            sync_folder(folder).map_err(failed)?;
        }
        Ok(())
    }

    /// Makes a file that was not there: whole, or not at all.
    fn file(&mut self, path: &Path, text: &str) -> Result<(), EditError> {
        let failed = |source| EditError::Write { path: path.to_owned(), source };
        let staging = stage(path, text).map_err(failed)?;
        // Other than a rename, a link fails where something is there.
        let linked = std::fs::hard_link(&staging, path);
        let removed = std::fs::remove_file(&staging);
        linked.map_err(failed)?;
        self.0.push(path.to_owned());
        removed.and_then(|()| sync_folder(path)).map_err(failed)
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // The last first, for the reason that it came last. A folder goes only if nothing else is in it meanwhile.
        for path in self.0.drain(..).rev() {
            drop(std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir(&path)));
        }
    }
}

/// Puts a file in the place of one that is there.
fn replace(path: &Path, text: &str) -> Result<(), EditError> {
    let replaced = || {
        let staging = stage(path, text)?;
        std::fs::set_permissions(&staging, std::fs::metadata(path)?.permissions())?;
        std::fs::rename(&staging, path).inspect_err(|_| drop(std::fs::remove_file(&staging)))?;
        sync_folder(path)
    };
    replaced().map_err(|source| EditError::Write { path: path.to_owned(), source })
}

/// Writes what a file is to hold beside it, under a name that the registry passes over.
fn stage(path: &Path, text: &str) -> io::Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let staging = path.with_file_name(format!(".{name}.{}", std::process::id()));
    // Left by a process of the same id that was killed.
    drop(std::fs::remove_file(&staging));
    let written = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&staging)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    written().inspect_err(|_| drop(std::fs::remove_file(&staging)))?;
    Ok(staging)
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// The files of a key, last that which has it count; where it lies then.
fn key_steps(steps: &mut Vec<Step>, folder: &Path, stem: &str, addition: &Addition) -> PathBuf {
    let (about, file) = (about(addition), folder.join(format!("{stem}.pub")));
    let text = format!("{}\n", addition.key.to_openssh());
    if !about.is_empty() {
        steps.push(Step::File(waiting(&file), text.clone()));
        steps.push(Step::File(file.with_extension("toml"), about));
    }
    steps.push(Step::File(file.clone(), text));
    file
}

/// A name for a key that nothing in the folder has, in whatever form.
fn free_stem(folder: &Path, first: &str) -> String {
    let names = std::iter::once(first.to_owned()).chain((2_u32..).map(|number| format!("{first}-{number}")));
    names.into_iter().find(|stem| is_free(folder, stem)).unwrap_or_default()
}

fn is_free(folder: &Path, stem: &str) -> bool {
    let file = |ending: &str| folder.join(format!("{stem}.{ending}"));
    let names = [file("pub"), file("pem"), file("toml"), waiting(&file("pub"))];
    names.iter().all(|path| path.symlink_metadata().is_err())
}

/// Whether a file has this name, or the name of what was registered in its place: with a date behind it, and perhaps a number.
fn is_of(stem: &str, name: &str) -> bool {
    let Some(rest) = stem.strip_prefix(name) else { return false };
    let Some(rest) = rest.strip_prefix('-') else { return rest.is_empty() };
    let Some((date, number)) = rest.split_at_checked("2026-11-21".len()) else { return false };
    let number = number.strip_prefix('-').map_or(number.is_empty(), |number| number.parse::<u32>().is_ok());
    number && date.parse::<jiff::civil::Date>().is_ok()
}

fn moment(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn about(addition: &Addition) -> String {
    let mut text = String::new();
    if let Some(signs) = &addition.signs {
        let quoted: Vec<_> = signs.principals.iter().map(|pattern| string(pattern.as_str())).collect();
        let _ = writeln!(text, "principals = [{}]", quoted.join(", "));
    }
    for (key, at) in [("not_before", addition.not_before), ("expires", addition.expires)] {
        if let Some(at) = at {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{key} = {}", moment(at));
        }
    }
    if let Some(comment) = &addition.comment {
        let _ = writeln!(text, "comment = {}", string(comment));
    }
    text
}

/// A TOML string. What it holds has no control characters.
fn string(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The text of a sidecar with the key revoked and all else as it stands; `None` where that cannot be had.
fn with_revoked(path: &Path, text: &str) -> Option<String> {
    let value = |line: &str| {
        let at = line.find('=').and_then(|at| line[at..].find("false").map(|value| at + value))?;
        Some(at..at + "false".len())
    };
    with(path, text, ("revoked", "true"), value, |about| AboutKey { revoked: true, ..about })
}

/// As [`with_revoked`], with the key's end.
fn with_expires(path: &Path, text: &str, ends: Timestamp) -> Option<String> {
    // To the second, as it is written.
    let ends = Timestamp::from_second(ends.as_second()).ok()?;
    let value = |line: &str| {
        let begins = line.find('=')? + 1;
        let said = line[begins..].split(['#', '\n', '\r']).next()?;
        let begins = begins + (said.len() - said.trim_start().len());
        Some(begins..begins + said.trim().len())
    };
    with(path, text, ("expires", &moment(ends)), value, |about| AboutKey { expires: Some(ends), ..about })
}

/// The text of a sidecar in which one key has another value, that of its line which `value` finds; `None` where it would not say
/// what is `wanted` then.
fn with(
    path: &Path,
    text: &str,
    (key, new): (&str, &str),
    value: impl FnOnce(&str) -> Option<std::ops::Range<usize>>,
    wanted: impl FnOnce(AboutKey) -> AboutKey,
) -> Option<String> {
    let read = |text: &str| {
        let document = Document::parse(path, text).ok()?;
        let line = document.root().optional(key).and_then(|item| item.place().fault("").line);
        // Of a CA, or a key for tokens, more is said there, which is left as it stands.
        AboutKey::read(&document).map(|about| (about, line))
    };
    let (about, line) = read(text)?;
    let changed = match line {
        Some(line) => {
            let mut lines: Vec<String> = text.split_inclusive('\n').map(str::to_owned).collect();
            let this = lines.get_mut(line.checked_sub(1)?)?;
            let value = value(this)?;
            this.replace_range(value, new);
            lines.concat()
        }
        None if text.is_empty() || text.ends_with('\n') => format!("{text}{key} = {new}\n"),
        None => format!("{text}\n{key} = {new}\n"),
    };
    // Whatever the way it is written: it is to mean that, and all else as before.
    (read(&changed)?.0 == wanted(about)).then_some(changed)
}

const TOKEN_KEYS: &str = "token-keys";

const REVOKED: &str = "revoked = true";

const COMMENT_MAX: usize = 255;

#[cfg(test)]
mod tests;

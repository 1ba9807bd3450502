//! The registry in folders: public keys as files, and TOML beside them for what is not a key.
//!
//! ```text
//! organisations/acme.toml                             optional: accept_from, for all principals and agents of it;
//!                                                     client_auth, for its agents
//! organisations/acme/client-ca/pki.pem                CAs of TLS certificates of its agents and principals (PEM)
//! organisations/acme/client-ca/pki.crl                optional: what they have revoked (PEM)
//! organisations/acme/agents/prod-eu/2026-11.pub       an OpenSSH or PEM public key (.pub or .pem)
//! organisations/acme/agents/prod-eu/2026-11.toml      optional: not_before, expires, revoked, comment of that key
//! organisations/acme/agents/prod-eu/client-ca/…       CAs of this agent's TLS certificates, in the organisation's place
//! organisations/acme/agents/prod-eu.toml              optional: description, accept_from, certificate_names
//! organisations/acme/principals/ci/laptop.pub         keys of a principal, in the same way
//! organisations/acme/user-ca/vault.pub                 a CA that certifies principals
//! organisations/acme/user-ca/vault.toml                required: principals; optional: as beside a key, and revoked_serials,
//!                                                     revoked_key_ids
//! organisations/acme/token-keys/ci.pub                a key that signs tokens for principals (Ed25519)
//! organisations/acme/token-keys/ci.toml               required: principals; optional: as beside a key, and revoked_tokens
//! organisations/acme/principals/ci.toml               required with keys: agents; optional: targets, not_before, expires,
//!                                                     accept_from, certificate_names, revoked_tokens
//! ```
//!
//! Promised: all or nothing. A state with a single fault is not taken over, and the last good one goes on to hold; a
//! state that changes while it is read is read again. Files whose names begin with a dot are passed over, and so is a
//! `README` (`.md`, `.txt`, `.rst`); every other file that does not belong there is a fault, as is a `.toml` without its
//! key (unless that [waits](waiting)). Symbolic links are followed, so that a directory which is swapped as a whole (as
//! Kubernetes does with mounted secrets) is seen as one change.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::Metadata;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use jiff::Timestamp;
use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::{Agent, Authority, Organisation, PrincipalRecord, RegisteredKey, Registry, Snapshot, TokenKey};
use crate::chain::Chain;
use crate::document::{Document, Faults, Item, Table, read_text};
use crate::identity::{Fingerprint, OrganisationId, PublicKey};
use crate::limits::{
    CERTIFICATE_NAMES_OF_ONE, EXPOSED_SHOWN, FILE_CLOCK, REGISTRY_ENTRIES_MAX, REGISTRY_POLL, REGISTRY_REMINDER,
    REGISTRY_SETTLE, REGISTRY_SETTLE_MAX,
};
use crate::network::{Network, Networks};
use crate::policy::grant::Grant;
use crate::policy::window::Window;
use crate::reload::sources::Stamp;
use crate::task::Tasks;
use crate::tls::{ClientAuth, Trust};

/// Reads a registry once.
///
/// # Errors
/// With every fault in it, if there is one.
pub fn load(dir: &Path) -> Result<Snapshot, Faults> {
    load_with_files(dir).map(|(snapshot, _)| snapshot)
}

/// Which file each key of an organisation lies in.
pub(super) type KeyFiles = BTreeMap<OrganisationId, HashMap<Fingerprint, PathBuf>>;

/// As [`load`], and where the keys are.
pub(super) fn load_with_files(dir: &Path) -> Result<(Snapshot, KeyFiles), Faults> {
    let mut reader = Reader::default();
    let mut organisations = BTreeMap::new();
    let mut files = KeyFiles::new();
    let mut found = false;
    for entry in reader.list(dir) {
        match entry {
            Entry { name, path, folder: true } if name == "organisations" => {
                found = true;
                for (id, member) in reader.members(&path) {
                    if let Some((organisation, held)) = reader.organisation(&member) {
                        files.insert(OrganisationId::clone(&id), held);
                        organisations.insert(id, organisation);
                    }
                }
            }
            entry => reader.unexpected(&entry, "only the folder organisations is accepted here"),
        }
    }
    if !found && reader.faults.is_empty() {
        reader.fault(dir, "no folder organisations in it: this is no registry (make the folder to begin one)");
    }
    reader.faults.none_in(())?;
    // Duplicates were found above, with the files' names; this is the second lock on that door.
    let snapshot = Snapshot::new(organisations).map_err(|error| Faults::file(dir, error.to_string()))?;
    Ok((snapshot, files))
}

/// What others than its owner may write in a registry, the folder itself included; the first few. Whoever may write there
/// says who gets in.
#[must_use]
pub fn writable_by_others(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    walk(dir, |path, data| {
        let others = data.as_ref().is_ok_and(|data| data.mode() & 0o002 != 0);
        if others {
            found.push(path.to_owned());
        }
        found.len() < EXPOSED_SHOWN
    });
    found
}

/// A registry in folders that follows their changes.
pub struct Files {
    dir: PathBuf,
    current: ArcSwap<Snapshot>,
    version: watch::Sender<u64>,
    /// Told of changes, by the system or on its behalf.
    woken: Arc<Notify>,
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Files").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// What came of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reload {
    /// The new state holds, with so many of each.
    Accepted {
        /// Organisations.
        organisations: usize,
        /// Agents in all of them.
        agents: usize,
        /// Principals in all of them.
        principals: usize,
        /// Keys, also revoked and expired ones.
        keys: usize,
    },
    /// The new state has faults, and the last good one goes on to hold. Told again and again for as long as it does:
    /// a key that was revoked in the new state is still good.
    Rejected(Faults),
    /// The system does not tell of changes, for this reason; they are found by looking every few seconds.
    PollOnly(String),
}

impl Registry for Files {
    fn current(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}

impl Files {
    /// Reads the registry for the first time. Blocks while it does.
    ///
    /// # Errors
    /// With every fault in it, if there is one: there is no good state yet to go on with.
    pub fn open(dir: PathBuf) -> Result<Arc<Self>, Faults> {
        let snapshot = load(&dir)?;
        Ok(Arc::new(Self {
            dir,
            current: ArcSwap::from_pointee(snapshot),
            version: watch::Sender::new(0),
            woken: Arc::default(),
        }))
    }

    /// Has the registry read again soon, whether or not the system has told of a change: for whoever follows it with
    /// [`Files::watch`].
    pub fn look_again(&self) {
        self.woken.notify_one();
    }

    /// Follows the folders' changes until `tasks` is asked to stop. Waits for the file system to tell of one, for the
    /// clock, and for the reading itself, which runs on a thread of its own; expiries take effect also while that hangs.
    /// `report` is called once for each state that was taken over, and at intervals for one that was refused; it must not
    /// block.
    pub async fn watch(self: Arc<Self>, tasks: Tasks, report: impl FnMut(Reload) + Send) {
        let pace = Pace { told: true, poll: REGISTRY_POLL, settle: REGISTRY_SETTLE, remind: REGISTRY_REMINDER };
        self.watch_at(pace, tasks, report).await;
    }

    async fn watch_at(&self, pace: Pace, tasks: Tasks, mut report: impl FnMut(Reload) + Send) {
        let woken = &self.woken;
        let mut watcher = pace.told.then(|| arm(&self.dir, woken));
        if let Some(Err(error)) = &watcher {
            report(Reload::PollOnly(error.to_string()));
        }
        let mut poll = interval(pace.poll);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked_at = Timestamp::now();
        let mut seen: Option<Seen> = None;
        let mut rejected: Option<(Faults, Instant)> = None;
        // What changed between opening and watching shows at the first tick, which comes at once.
        loop {
            let told = tokio::select! {
                () = tasks.stopping().cancelled() => return,
                () = woken.notified() => true,
                _ = poll.tick() => false,
            };
            if told && tasks.stopping().run_until_cancelled(settled(woken, pace.settle)).await.is_none() {
                return;
            }
            self.tell_expiries(&mut looked_at);
            if let Some((faults, since)) = &mut rejected
                && since.elapsed() >= pace.remind
            {
                *since = Instant::now();
                report(Reload::Rejected(faults.clone()));
            }

            let dir = self.dir.clone();
            // A change that the system told of is read even if the signature is the same, and any signature is read once more
            // some time after it was seen first: clocks of files are coarse, and one change may hide another.
            let doubtful = told || seen.is_some_and(|seen| seen.is_doubtful());
            let known = if doubtful { None } else { seen.map(|seen| seen.signature) };
            let mut look = tasks.spawn_blocking(move || look(&dir, known));
            let mut asked = Instant::now();
            let look = loop {
                tokio::select! {
                    () = tasks.stopping().cancelled() => return,
                    look = &mut look => break look,
                    // A file system that hangs holds nothing up but the reading.
                    _ = poll.tick() => self.tell_expiries(&mut looked_at),
                }
                if asked.elapsed() >= pace.remind {
                    asked = Instant::now();
                    report(Reload::Rejected(Faults::file(&self.dir, "the file system does not answer")));
                }
            };
            // The reading panicked or the runtime is going down; the last good state holds, the next tick tries again.
            let Ok(Some((signature, result))) = look else { continue };
            let differs = seen.is_some_and(|seen| Some(seen.signature) != signature);
            if !told && differs && pace.told {
                // The watch missed this: perhaps the watched folder was itself replaced.
                let told_so_far = matches!(watcher, Some(Ok(_)));
                watcher = Some(arm(&self.dir, woken));
                if let (true, Some(Err(error))) = (told_so_far, &watcher) {
                    report(Reload::PollOnly(error.to_string()));
                }
            }
            seen = signature.map(|signature| match seen {
                Some(seen) if seen.signature == signature && !told => Seen { confirmed: doubtful, ..seen },
                _ => Seen { signature, since: Instant::now(), confirmed: false },
            });
            match result {
                Ok(snapshot) => {
                    let mended = rejected.take().is_some();
                    let differs = **self.current.load() != snapshot;
                    if differs || mended {
                        let accepted = accepted(&snapshot);
                        if differs {
                            self.current.store(Arc::new(snapshot));
                            self.version.send_modify(|version| *version += 1);
                        }
                        report(accepted);
                    }
                }
                Err(faults) if rejected.as_ref().is_none_or(|(known, _)| *known != faults) => {
                    rejected = Some((faults.clone(), Instant::now()));
                    report(Reload::Rejected(faults));
                }
                Err(_) => (),
            }
        }
    }

    /// Counts an expiry since `looked_at` as a change.
    fn tell_expiries(&self, looked_at: &mut Timestamp) {
        let now = Timestamp::now();
        if self.current.load().expires_within(*looked_at, now) {
            self.version.send_modify(|version| *version += 1);
        }
        *looked_at = now;
    }
}

/// The state that was read last.
#[derive(Debug, Clone, Copy)]
struct Seen {
    signature: u64,
    /// When it was first read.
    since: Instant,
    /// Whether it has been read again after the clocks of files had moved on.
    confirmed: bool,
}

impl Seen {
    fn is_doubtful(&self) -> bool {
        !self.confirmed && self.since.elapsed() >= FILE_CLOCK
    }
}

/// How closely changes are followed.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// Whether the system is asked to tell of changes.
    told: bool,
    poll: Duration,
    settle: Duration,
    /// How often it is said that a refused state is still not in force.
    remind: Duration,
}

/// Has the system tell of changes below `dir` for as long as what this returns lives.
fn arm(dir: &Path, woken: &Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let woken = Arc::clone(woken);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading makes events too.
        let reading = |kind| !matches!(kind, AccessKind::Close(AccessMode::Write));
        match event.map(|event| event.kind) {
            Ok(EventKind::Access(kind)) if reading(kind) => (),
            // An error may mean that events were lost.
            Ok(_) | Err(_) => woken.notify_one(),
        }
    })?;
    watcher.watch(dir, RecursiveMode::Recursive)?;
    Ok(watcher)
}

/// Waits until nothing has changed for a while, or for long enough.
async fn settled(woken: &Notify, quiet: Duration) {
    let end = Instant::now() + REGISTRY_SETTLE_MAX;
    while Instant::now() < end && timeout_at(end.min(Instant::now() + quiet), woken.notified()).await.is_ok() {}
}

/// Reads the registry if its signature is not the `known` one. No signature is returned for a state that would not hold
/// still, so that it is read again at the next opportunity.
fn look(dir: &Path, known: Option<u64>) -> Option<(Option<u64>, Result<Snapshot, Faults>)> {
    const ATTEMPTS: usize = 3;
    let mut before = signature(dir);
    if known == Some(before) {
        return None;
    }
    for _ in 0..ATTEMPTS {
        let result = load(dir);
        let after = signature(dir);
        if before == after {
            return Some((Some(after), result));
        }
        before = after;
    }
    Some((None, Err(Faults::file(dir, "kept changing while it was read: it is read again when it has come to rest"))))
}

/// A digest of the names, places, sizes and times of everything that [`load`] would read.
fn signature(dir: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    walk(dir, |path, data| {
        path.hash(&mut hasher);
        match data {
            Ok(data) => Stamp::of(&data).hash(&mut hasher),
            Err(error) => error.kind().to_string().hash(&mut hasher),
        }
        true
    });
    hasher.finish()
}

/// Shows everything that [`load`] would read, the folder first, until `see` wants no more.
fn walk(dir: &Path, mut see: impl FnMut(&Path, io::Result<Metadata>) -> bool) {
    /// The tree has six levels; more could only be links in a circle.
    const DEPTH: usize = 8;
    let mut left = vec![(dir.to_owned(), DEPTH)];
    let mut entries = 0;
    if !see(dir, std::fs::metadata(dir)) {
        return;
    }
    while let Some((dir, depth)) = left.pop() {
        let mut paths: Vec<PathBuf> = match std::fs::read_dir(&dir) {
            Ok(list) => list.flatten().map(|entry| entry.path()).collect(),
            Err(error) => {
                if !see(&dir, Err(error)) {
                    return;
                }
                continue;
            }
        };
        paths.sort();
        for path in paths.into_iter().filter(|path| !is_passed_over(path)) {
            entries += 1;
            if entries > REGISTRY_ENTRIES_MAX {
                return;
            }
            let data = std::fs::metadata(&path);
            let folder = data.as_ref().is_ok_and(Metadata::is_dir);
            if !see(&path, data) {
                return;
            }
            if folder && depth > 0 {
                left.push((path, depth - 1));
            }
        }
    }
}

fn accepted(snapshot: &Snapshot) -> Reload {
    let organisations = snapshot.organisations();
    Reload::Accepted {
        organisations: organisations.len(),
        agents: organisations.values().map(|organisation| organisation.agents.len()).sum(),
        principals: organisations.values().map(|organisation| organisation.principals.len()).sum(),
        keys: organisations.values().map(|organisation| organisation.keys().count()).sum(),
    }
}

/// What stands beside a key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct AboutKey {
    pub(super) not_before: Option<Timestamp>,
    pub(super) expires: Option<Timestamp>,
    pub(super) revoked: bool,
    pub(super) comment: Option<String>,
}

impl AboutKey {
    pub(super) fn read(document: &Document) -> Option<Self> {
        let root = document.root();
        let not_before = root.optional("not_before").and_then(|item| item.timestamp());
        let end = root.optional("expires");
        let expires = end.as_ref().and_then(Item::timestamp);
        if let (Some(from), Some(to), Some(end)) = (not_before, expires, &end)
            && to <= from
        {
            end.fault("it must lie after not_before: as it stands, the key never counts");
        }
        let revoked = root.optional("revoked").and_then(|item| item.boolean()).unwrap_or(false);
        let comment = root.optional("comment").and_then(|item| item.string()).map(str::to_owned);
        Some(Self { not_before, expires, revoked, comment })
    }

    fn of(self, key: PublicKey) -> RegisteredKey {
        let Self { not_before, expires, revoked, comment } = self;
        RegisteredKey { key, not_before, expires, revoked, comment }
    }
}

/// Reads the folders, and goes on after a fault.
#[derive(Default)]
struct Reader {
    faults: Faults,
    entries: usize,
}

/// Something in a folder that is not passed over.
struct Entry {
    name: String,
    path: PathBuf,
    folder: bool,
}

/// An organisation, agent or principal as it lies there.
#[derive(Default)]
struct Member {
    /// The TOML beside the folder.
    about: Option<PathBuf>,
    folder: Option<PathBuf>,
}

impl Reader {
    fn organisation(&mut self, member: &Member) -> Option<(Organisation, HashMap<Fingerprint, PathBuf>)> {
        let about = member.about.as_deref();
        let Some(dir) = &member.folder else {
            // One letter too many in its name, and what it narrows would stay wide open.
            about.inspect(|file| self.fault(file, "no folder of this name beside it: this is said of no organisation"));
            return None;
        };
        let said = about.and_then(|file| {
            self.document(file, |document| {
                let root = document.root();
                let client_auth = root.optional("client_auth").map(|item| item.choice(&ClientAuth::WORDS));
                Some((accept_from(&root)?, client_auth.unwrap_or(Some(ClientAuth::Off))?))
            })
        });
        let (accept_from, client_auth) = said.unwrap_or_default();
        let mut organisation = Organisation { accept_from, client_auth, ..Organisation::default() };
        // A key has one holder within an organisation; in another it may have another.
        let mut holders = HashMap::new();
        let mut names = CertificateNames::new();
        for entry in self.list(dir) {
            match (entry.name.as_str(), entry.folder) {
                ("agents", true) => {
                    for (id, member) in self.members(&entry.path) {
                        let agent = self.agent(&member, &mut holders, &mut names);
                        organisation.agents.insert(id, agent);
                    }
                }
                ("principals", true) => {
                    for (id, member) in self.members(&entry.path) {
                        let record = self.principal(&member, &mut holders, &mut names);
                        organisation.principals.insert(id, record);
                    }
                }
                ("user-ca", true) => organisation.authorities = self.authorities(&entry.path, &mut holders),
                ("client-ca", true) => organisation.client_trust = self.client_trust(&entry.path),
                ("token-keys", true) => organisation.token_keys = self.token_keys(&entry.path, &mut holders),
                _ => self.unexpected(
                    &entry,
                    "only the folders agents, principals, user-ca, client-ca and token-keys are accepted here",
                ),
            }
        }
        let mut without = organisation.agents.values().filter(|agent| agent.client_trust.is_none()).peekable();
        let has_some =
            !organisation.client_trust.is_empty() || (!organisation.agents.is_empty() && without.peek().is_none());
        if let Some(file) = about.filter(|_| client_auth != ClientAuth::Off && !has_some) {
            let problem = format!(
                "client_auth = \"{client_auth}\" without a CA: no certificate could be good; put one into {}/client-ca/NAME.pem",
                dir.display()
            );
            self.fault(file, problem);
        }
        Some((organisation, holders))
    }

    fn agent(
        &mut self,
        member: &Member,
        holders: &mut HashMap<Fingerprint, PathBuf>,
        names: &mut CertificateNames,
    ) -> Agent {
        let about = member.about.as_deref().and_then(|file| {
            self.document(file, |document| {
                let root = document.root();
                let description = root.optional("description").and_then(|item| item.string());
                let certificate_names = certificate_names(&root, file, names);
                Some((description.map(str::to_owned), accept_from(&root)?, certificate_names?))
            })
        });
        let (description, accept_from, certificate_names) = about.unwrap_or_default();
        let own = member.folder.as_ref().map(|folder| folder.join("client-ca")).filter(|folder| folder.is_dir());
        let client_trust = own.map(|folder| self.client_trust(&folder));
        let keys = self.keys(member, holders, Some("client-ca"));
        Agent { description, accept_from, keys, client_trust, certificate_names }
    }

    /// The CAs of TLS certificates that lie in a folder, each with its lists.
    fn client_trust(&mut self, folder: &Path) -> Trust {
        let (mut authorities, mut lists) = (BTreeMap::new(), BTreeMap::new());
        for entry in self.list(folder) {
            match entry.name.rsplit_once('.') {
                Some((stem, "pem")) if !entry.folder => drop(authorities.insert(stem.to_owned(), entry.path)),
                Some((stem, "crl")) if !entry.folder => drop(lists.insert(stem.to_owned(), entry.path)),
                _ => {
                    self.unexpected(&entry, "accepted here are certificates of CAs (.pem) and a .crl of the same name")
                }
            }
        }
        let mut trust = Trust::default();
        for (stem, path) in &authorities {
            let list = lists.remove(stem);
            let Some(certificates) = self.text(path) else { continue };
            // A list that cannot be read revokes everything, by the fault that it is.
            let text = list.as_deref().map(|list| self.text(list));
            if let Some(None) = text {
                continue;
            }
            if let Err((in_list, error)) = trust.add(&certificates, text.flatten().as_deref()) {
                let file = list.as_ref().filter(|_| in_list).unwrap_or(path);
                self.fault(file, Chain(&error).to_string());
            }
        }
        for path in lists.values() {
            self.fault(path, "no certificate of a CA of this name beside it (.pem)");
        }
        if authorities.is_empty() {
            self.fault(folder, "no certificate of a CA in it (.pem): take the folder away if there is to be none");
        }
        trust
    }

    fn text(&mut self, path: &Path) -> Option<String> {
        read_text(path).map_err(|faults| self.faults.append(faults)).ok()
    }

    fn principal(
        &mut self,
        member: &Member,
        holders: &mut HashMap<Fingerprint, PathBuf>,
        names: &mut CertificateNames,
    ) -> PrincipalRecord {
        let about = match (&member.about, &member.folder) {
            (Some(file), _) => self.document(file, |document| {
                let root = document.root();
                let agents = root.required("agents").map(|item| read_all(&item));
                let targets = root.optional("targets").map(|item| read_all(&item));
                let window = Window {
                    not_before: root.optional("not_before").and_then(|item| item.timestamp()),
                    expires: root.optional("expires").and_then(|item| item.timestamp()),
                };
                if let Err(error) = window.check() {
                    root.fault("expires", error.to_string());
                }
                let accept_from = accept_from(&root);
                let certificate_names = certificate_names(&root, file, names);
                let revoked_tokens = root.optional("revoked_tokens").map(|item| read_all(&item)).unwrap_or_default();
                let revoked_tokens = revoked_tokens.into_iter().collect();
                Some((Grant { agents: agents?, targets }, window, accept_from?, certificate_names?, revoked_tokens))
            }),
            (None, Some(folder)) => {
                let mut file = folder.clone().into_os_string();
                file.push(".toml");
                self.fault(Path::new(&file), "missing: it says which agents this principal may use (agents = [\"…\"])");
                None
            }
            (None, None) => None,
        };
        let (grant, window, accept_from, certificate_names, revoked_tokens) = about.unwrap_or_default();
        let Window { not_before, expires } = window;
        let keys = self.keys(member, holders, None);
        PrincipalRecord { grant, not_before, expires, accept_from, keys, certificate_names, revoked_tokens }
    }

    fn keys(
        &mut self,
        member: &Member,
        holders: &mut HashMap<Fingerprint, PathBuf>,
        besides: Option<&str>,
    ) -> Vec<RegisteredKey> {
        let Some(folder) = &member.folder else { return Vec::new() };
        let mut registered = Vec::new();
        for (path, about) in self.pairs(folder, besides) {
            let Some(key) = self.claim(&path, holders) else { continue };
            let about = about.and_then(|file| self.about_key(&file)).unwrap_or_default();
            registered.push(about.of(key));
        }
        registered
    }

    /// The CAs of an organisation.
    fn authorities(&mut self, folder: &Path, holders: &mut HashMap<Fingerprint, PathBuf>) -> Vec<Authority> {
        let mut authorities = Vec::new();
        for (path, about) in self.pairs(folder, None) {
            let Some(key) = self.claim(&path, holders) else { continue };
            let Some(file) = about else {
                let missing = "nothing beside it says which principals this CA may certify (principals = [\"…\"] in a .toml of the \
                               same name)";
                self.fault(&path, missing);
                continue;
            };
            let read = self.document(&file, |document| {
                let about = AboutKey::read(document);
                let root = document.root();
                let principals = root.required("principals").and_then(|item| item.list(Item::parse));
                let revocations = root.revocations();
                Some((about?, principals?, revocations?))
            });
            let Some((about, principals, revocations)) = read else { continue };
            authorities.push(Authority { registered: about.of(key), principals, revocations });
        }
        authorities
    }

    /// The keys of an organisation that sign tokens.
    fn token_keys(&mut self, folder: &Path, holders: &mut HashMap<Fingerprint, PathBuf>) -> Vec<TokenKey> {
        let mut keys = Vec::new();
        for (path, about) in self.pairs(folder, None) {
            let Some(key) = self.claim(&path, holders) else { continue };
            if key.ed25519().is_none() {
                self.fault(&path, "tokens are signed with Ed25519 keys alone (`caponier keys generate` makes one)");
            }
            let Some(file) = about else {
                let missing = "nothing beside it says for which principals this key may sign tokens (principals = [\"…\"] in a \
                               .toml of the same name)";
                self.fault(&path, missing);
                continue;
            };
            let read = self.document(&file, |document| {
                let about = AboutKey::read(document);
                let root = document.root();
                let principals = root.required("principals").and_then(|item| item.list(Item::parse));
                let revoked_tokens = root.optional("revoked_tokens").map(|item| read_all(&item)).unwrap_or_default();
                Some((about?, principals?, revoked_tokens))
            });
            let Some((about, principals, revoked_tokens)) = read else { continue };
            let revoked_tokens = revoked_tokens.into_iter().collect();
            keys.push(TokenKey { registered: about.of(key), principals, revoked_tokens });
        }
        keys
    }

    /// The keys of a folder, each with the TOML beside it. A folder that is called as `besides` says is somebody else's.
    fn pairs(&mut self, folder: &Path, besides: Option<&str>) -> Vec<(PathBuf, Option<PathBuf>)> {
        let mut keys = BTreeMap::new();
        let mut abouts = BTreeMap::new();
        for entry in self.list(folder) {
            match entry.name.rsplit_once('.') {
                Some((stem, "pub" | "pem")) if !entry.folder => {
                    if let Some(other) = keys.insert(stem.to_owned(), entry.path.clone()) {
                        self.fault(&entry.path, format!("the same name as {}: rename one", file_name(&other)));
                    }
                }
                Some((stem, "toml")) if !entry.folder => {
                    abouts.insert(stem.to_owned(), entry.path);
                }
                _ if entry.folder && besides == Some(entry.name.as_str()) => {}
                _ => self.unexpected(&entry, "accepted here are public keys (.pub, .pem) and a .toml of the same name"),
            }
        }
        let pairs: Vec<_> = keys.into_iter().map(|(stem, path)| (path, abouts.remove(&stem))).collect();
        for path in abouts.values().filter(|path| !waiting(path).is_file()) {
            self.fault(path, "no key of this name beside it (.pub or .pem)");
        }
        pairs
    }

    /// Reads a key, which has one holder in its organisation.
    fn claim(&mut self, path: &Path, holders: &mut HashMap<Fingerprint, PathBuf>) -> Option<PublicKey> {
        let key = self.key(path)?;
        if let Some(first) = holders.insert(key.fingerprint(), path.to_owned()) {
            let problem = format!(
                "this key is registered in this organisation already, in {}: a key has one holder",
                first.display()
            );
            self.fault(path, problem);
        }
        Some(key)
    }

    fn key(&mut self, path: &Path) -> Option<PublicKey> {
        match read_text(path) {
            Ok(text) => match PublicKey::parse(&text) {
                Ok(key) => Some(key),
                Err(error) => {
                    self.fault(path, format!("this {}", Chain(&error)));
                    None
                }
            },
            Err(faults) => {
                self.faults.append(faults);
                None
            }
        }
    }

    fn about_key(&mut self, file: &Path) -> Option<AboutKey> {
        self.document(file, AboutKey::read)
    }

    /// The organisations, agents or principals of a folder: `ID/`, `ID.toml`, or both.
    fn members<T: FromStr<Err: std::error::Error + 'static> + Ord>(&mut self, dir: &Path) -> BTreeMap<T, Member> {
        let mut members: BTreeMap<T, Member> = BTreeMap::new();
        for entry in self.list(dir) {
            let name = if entry.folder { Some(entry.name.as_str()) } else { entry.name.strip_suffix(".toml") };
            let Some(name) = name else {
                self.unexpected(&entry, "accepted here are folders with keys and a .toml of the same name");
                continue;
            };
            match name.parse() {
                Ok(id) => {
                    let member = members.entry(id).or_default();
                    let place = if entry.folder { &mut member.folder } else { &mut member.about };
                    *place = Some(entry.path);
                }
                Err(error) => self.fault(&entry.path, Chain(&error).to_string()),
            }
        }
        members
    }

    /// What lies in a folder, sorted by name.
    fn list(&mut self, dir: &Path) -> Vec<Entry> {
        let listed = std::fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut paths: Vec<_> = match listed {
            Ok(list) => list.iter().map(std::fs::DirEntry::path).filter(|path| !is_passed_over(path)).collect(),
            Err(error) => {
                self.fault(dir, format!("cannot be read: {error}"));
                return Vec::new();
            }
        };
        paths.sort();
        self.entries += paths.len();
        if self.entries > REGISTRY_ENTRIES_MAX {
            self.fault(dir, format!("a registry of more than {REGISTRY_ENTRIES_MAX} files is not accepted"));
            return Vec::new();
        }
        let mut entries = Vec::new();
        for path in paths {
            match (std::fs::metadata(&path), path.file_name().and_then(|name| name.to_str())) {
                (Err(error), _) => self.fault(&path, format!("cannot be read: {error}")),
                (Ok(_), None) => self.fault(&path, "the name is not UTF-8"),
                (Ok(data), _) if !data.is_dir() && !data.is_file() => {
                    self.fault(&path, "neither a file nor a folder");
                }
                (Ok(data), Some(name)) => {
                    entries.push(Entry { name: name.to_owned(), folder: data.is_dir(), path });
                }
            }
        }
        entries
    }

    fn document<T>(&mut self, file: &Path, read: impl FnOnce(&Document) -> Option<T>) -> Option<T> {
        let result = Document::read(file).and_then(|document| {
            let value = read(&document);
            document.finish(value)
        });
        result.map_err(|faults| self.faults.append(faults)).ok()
    }

    fn unexpected(&mut self, entry: &Entry, accepted: &str) {
        let kind = if entry.folder { "folder" } else { "file" };
        self.fault(&entry.path, format!("this {kind} does not belong here: {accepted}"));
    }

    fn fault(&mut self, path: &Path, problem: impl Into<String>) {
        self.faults.append(Faults::file(path, problem));
    }
}

/// Where somebody is accepted from: `Some(None)` where nothing is said of it, `None` where it is wrong. An empty list is.
fn accept_from(table: &Table<'_>) -> Option<Option<Networks>> {
    match table.optional("accept_from") {
        Some(item) => item.list(Item::parse::<Network>).and_then(Networks::new).map(Some),
        None => Some(None),
    }
}

/// Which file has named each of the names that stand for somebody, in an organisation.
type CertificateNames = HashMap<String, PathBuf>;

/// What TLS certificates may be called: names of which each stands for one agent or principal.
fn certificate_names(table: &Table<'_>, file: &Path, known: &mut CertificateNames) -> Option<Vec<String>> {
    let Some(item) = table.optional("certificate_names") else { return Some(Vec::new()) };
    let names = item.list(|item| {
        let name = item.string()?;
        if name.is_empty() || name.len() > 253 || name.trim() != name || name.chars().any(char::is_control) {
            return item.reject("a DNS name or a common name is wanted, as it stands in the certificate");
        }
        if name.contains(['*', '/']) {
            return item
                .reject("neither a pattern nor a URI: name each certificate's DNS name or common name as it is");
        }
        if let Some(first) = known.insert(name.to_ascii_lowercase(), file.to_owned()) {
            let problem =
                format!("this name stands for somebody already, in {}: a name has one holder", first.display());
            return item.reject(problem);
        }
        Some(name.to_owned())
    })?;
    if names.len() > CERTIFICATE_NAMES_OF_ONE {
        return item.reject(format!("more than {CERTIFICATE_NAMES_OF_ONE} names for one are not accepted"));
    }
    Some(names)
}

/// The elements of a list that may be empty: written out, an empty list grants nothing.
fn read_all<T: FromStr<Err: std::error::Error + 'static>>(item: &Item<'_>) -> Vec<T> {
    item.items().iter().filter_map(Item::parse).collect()
}

/// Where the key of a `.toml` waits while both are written: under a name that is passed over (`.2026-11.pub` beside
/// `2026-11.toml`). So a `.toml` can come before its key, which must not count without it, and is no fault meanwhile.
pub(super) fn waiting(beside: &Path) -> PathBuf {
    beside.with_file_name(format!(".{}.pub", beside.file_stem().unwrap_or_default().to_string_lossy()))
}

/// Files that are about the folder and not about the registry: `.git`, `.gitkeep`, `..data`, `README`, `README.md`. A key
/// with such a name (`README.pub`) is a key.
fn is_passed_over(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    name.starts_with(b".") || [&b"README"[..], b"README.md", b"README.txt", b"README.rst"].contains(&name)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;

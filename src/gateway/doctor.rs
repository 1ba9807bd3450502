//! Examines a gateway from where it runs, beside it or in its place: configuration, registry, certificates, listeners, trail,
//! and who is linked.
//!
//! Promised: nothing is changed and nobody is served. A port is bound for a moment, without listening on it, where no gateway
//! has it; a trail is opened for appending and not written. Whether a gateway runs is asked at its admin socket. What asks a
//! file system has a thread and a deadline: one that hangs breaks its own stage and no other. What was tried is said with the
//! user who tried it, which need not be the gateway's.

use std::fs::{Metadata, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use rustix::fs::OFlags;
use tokio::net::TcpSocket;
use tokio::time::{Instant, timeout};

use super::admin::{self, AgentRow};
use super::{Config, Listener};
use crate::diagnosis::{Examination, Finding, Verdict};
use crate::document::Faults;
use crate::limits;
use crate::registry::Snapshot;
use crate::registry::expiry::{Left, Stage};
use crate::registry::file::{self, writable_by_others};
use crate::task::Tasks;

/// Examines the gateway that this would configure. A stage may take as long as `patience`.
pub async fn examine(config: &Config, patience: Duration, examination: &mut Examination<'_>) {
    let tasks = Tasks::new();
    let dir = config.registry.clone();
    let subject = dir.display().to_string();
    let begun = Instant::now();
    let newest = tasks.aside(patience, move || newest(&dir, 0)).await;
    examination.add(match newest {
        Some(newest) => timed(clock(newest), begun),
        None => {
            let why = "the registry's files do not say when they were changed; see registry";
            timed(Finding::new("clock", "this host", Verdict::Skipped, why), begun)
        }
    });
    let begun = Instant::now();
    let dir = config.registry.clone();
    let registry = tasks.aside(patience, move || (file::load(&dir), writable_by_others(&dir))).await;
    examination.add(match &registry {
        Some((registry, exposed)) => timed(registered(config, registry, exposed), begun),
        None => timed(hangs("registry", &subject, &subject, patience), begun),
    });
    examination.add(certificates(config));
    let rows = match &config.admin_socket {
        Some(path) => timeout(patience, admin::agents(path)).await.ok().and_then(Result::ok),
        None => None,
    };
    for listener in &config.listen {
        examination.add(listening("listener", listener, rows.is_some()));
    }
    for local in &config.local {
        examination.add(listening("listener", &Listener::plain(local.listen), rows.is_some()));
    }
    for trail in trails(config) {
        let begun = Instant::now();
        let subject = trail.display().to_string();
        let room = tasks.aside(patience, move || room(&trail)).await;
        examination.add(timed(room.unwrap_or_else(|| hangs("trail", &subject, &subject, patience)), begun));
    }
    examination.add(descriptors());
    let begun = Instant::now();
    let running = match (&config.admin_socket, rows.is_some()) {
        (Some(path), false) => {
            let (path, subject) = (path.clone(), path.display().to_string());
            let there = tasks.aside(patience, move || path.exists()).await;
            there.map_or_else(|| hangs("admin", &subject, &subject, patience), |there| running(config, false, there))
        }
        (_, runs) => running(config, runs, runs),
    };
    examination.add(timed(running, begun));
    match (rows, registry) {
        (Some(rows), Some((Ok(snapshot), _))) => agents(&rows, &snapshot, examination),
        (None, Some((Ok(_), _))) => {
            let why = "not looked at: no gateway runs that could be asked";
            examination.add(Finding::new("agents", "all", Verdict::Skipped, why));
        }
        (_, Some((Err(_), _)) | None) => {
            let why = "not looked at, because of registry";
            examination.add(Finding::new("agents", "all", Verdict::Skipped, why));
        }
    }
}

/// What to say where a file system does not answer.
fn hangs(stage: &str, subject: &str, place: &str, patience: Duration) -> Finding {
    let evidence = format!("its file system has not answered within {} s", patience.as_secs_f32());
    let next = format!(
        "see whether ls {place} comes back: a network mount whose server is away holds up whoever asks it, and would hold the \
         gateway up, too; df shows where it is mounted from"
    );
    Finding::new(stage, subject, Verdict::Broken, &evidence).advising(&next)
}

/// What this host's own files tell of its clock. There is nobody to compare it with: each agent's doctor does that.
fn clock(newest: Option<(SystemTime, PathBuf)>) -> Finding {
    let now = SystemTime::now();
    let ahead = newest.and_then(|(at, path)| Some((at.duration_since(now).ok()?, path)));
    let subject = "this host";
    match ahead {
        Some((ahead, path)) if ahead > limits::TOKEN_LEEWAY => {
            let evidence =
                format!("{} was changed {} s from now: this host's clock is behind", path.display(), ahead.as_secs());
            Finding::new("clock", subject, Verdict::Broken, &evidence).advising(
                "set the clock: timedatectl or chronyc tracking shows whether this host follows a time server",
            )
        }
        _ => {
            let evidence = format!(
                "it is {} here, and no file of the registry is from later; an agent's doctor compares its clock with this one",
                Timestamp::now()
            );
            Finding::new("clock", subject, Verdict::Ok, &evidence)
        }
    }
}

/// The latest change among a registry's files; it is not deeper than this.
fn newest(dir: &Path, depth: usize) -> Option<(SystemTime, PathBuf)> {
    if depth > 6 {
        return None;
    }
    let mut newest = None;
    for entry in std::fs::read_dir(dir).ok()?.flatten().take(limits::REGISTRY_ENTRIES) {
        let path = entry.path();
        let Ok(metadata) = entry.metadata() else { continue };
        let found = match metadata.is_dir() {
            true => self::newest(&path, depth + 1),
            false => metadata.modified().ok().map(|at| (at, path)),
        };
        newest = newest.max(found);
    }
    newest
}

fn registered(config: &Config, registry: &Result<Snapshot, Faults>, exposed: &[PathBuf]) -> Finding {
    let subject = config.registry.display().to_string();
    let broken =
        |evidence: &str, next: &str| Finding::new("registry", &subject, Verdict::Broken, evidence).advising(next);
    let snapshot = match registry {
        Ok(snapshot) => snapshot,
        Err(faults) => {
            let next = "correct what stands at each of these places; a gateway that runs goes on with the last state that was \
                        good, and one that starts does not";
            return broken(&faults.to_string().replace('\n', "; "), next);
        }
    };
    if let Some(why) = config.contradiction(snapshot) {
        return broken(&why, "change the registry or the configuration so that the two fit");
    }
    let now = Timestamp::now();
    let mut said = Vec::new();
    for path in exposed {
        said.push(format!("others than its owner may write {}", path.display()));
    }
    let (mut agents, mut principals) = (0, 0);
    for (id, organisation) in snapshot.organisations() {
        for (agent, record) in &organisation.agents {
            agents += 1;
            if !record.keys.iter().any(|key| key.counts(now)) {
                said.push(format!("agent {id}/{agent} has no key that counts, and cannot link"));
            }
        }
        for (principal, record) in &organisation.principals {
            principals += 1;
            if !organisation.agents.keys().any(|agent| record.grant.covers(agent)) {
                said.push(format!("principal {id}/{principal} is granted no agent that there is"));
            }
        }
        if !config.organisations.iter().any(|served| served.id == *id) && !organisation.agents.is_empty() {
            said.push(format!(
                "organisation {id} is registered, and not served: there is no [[organisation]] with its id"
            ));
        }
    }
    let endings = snapshot.endings(now).into_iter().filter(|ending| !ending.succeeded);
    said.extend(endings.map(|ending| {
        let left = Left { expires: ending.expires, now };
        format!("key {} of {} {} {left}", ending.key, ending.organisation, ending.holder)
    }));
    let counts = format!("{agents} agents and {principals} principals");
    match said.is_empty() {
        true => Finding::new("registry", &subject, Verdict::Ok, &format!("{counts}; nothing ends soon")),
        false => Finding::new("registry", &subject, Verdict::Warning, &format!("{counts}; {}", said.join("; ")))
            .advising("caponier keys list --registry DIR shows all keys; keys add and keys rotate bring new ones"),
    }
}

fn certificates(config: &Config) -> Finding {
    let begun = Instant::now();
    let now = Timestamp::now();
    let warnings: Vec<_> = config.certificate_warnings(now).iter().map(ToString::to_string).collect();
    let identities: Vec<_> = config.certificates.iter().flat_map(|certificates| certificates.identities()).collect();
    let dead: Vec<_> = identities
        .iter()
        .filter(|identity| identity.ends().is_some_and(|ends| Stage::of(ends, now) == Some(Stage::Expired)))
        .map(|identity| identity.fingerprint().to_string())
        .collect();
    let count = identities.len();
    let subject = format!("{count} for TLS");
    let evidence = warnings.join("; ");
    let finding = match (dead.is_empty(), warnings.is_empty()) {
        (false, _) => {
            Finding::new("certificates", &subject, Verdict::Broken, &format!("{evidence} ({})", dead.join(", ")))
                .advising("put a new certificate and its key in their place: the gateway reads them within seconds")
        }
        (true, false) => Finding::new("certificates", &subject, Verdict::Warning, &evidence)
            .advising("renew what ends; the gateway reads new files within seconds"),
        (true, true) if count == 0 => {
            let evidence = "none: there is no TLS at this gateway, and no token is taken";
            Finding::new("certificates", &subject, Verdict::Ok, evidence)
        }
        (true, true) => Finding::new("certificates", &subject, Verdict::Ok, "each fits its key, and none ends soon"),
    };
    timed(finding, begun)
}

/// Whether a listener's address can be had, or is by a gateway that runs.
fn listening(stage: &'static str, listener: &Listener, runs: bool) -> Finding {
    let begun = Instant::now();
    let address = listener.address;
    let subject = address.to_string();
    let finding = match bind(address) {
        Ok(()) if runs && address.port() != 0 => {
            let evidence =
                "a gateway runs, and does not have this address: its configuration has changed since it started";
            Finding::new(stage, &subject, Verdict::Warning, evidence).advising("restart it: listeners are not reloaded")
        }
        Ok(()) => Finding::new(stage, &subject, Verdict::Ok, "the address can be had"),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && runs => {
            Finding::new(stage, &subject, Verdict::Ok, "held by the gateway that runs")
        }
        Err(error) => {
            let next = match error.kind() {
                io::ErrorKind::AddrInUse => format!(
                    "find out who has the port: ss -ltnp 'sport = :{}'; if it is this gateway, name its admin_socket",
                    address.port()
                ),
                io::ErrorKind::PermissionDenied => "give the gateway AmbientCapabilities=CAP_NET_BIND_SERVICE, as \
                                                    deploy/caponier-gateway.service does, a socket unit, or a port above 1023"
                    .to_owned(),
                io::ErrorKind::AddrNotAvailable => "name an address that this host has: ip address shows them".to_owned(),
                _ => "see what the system says of this address".to_owned(),
            };
            Finding::new(stage, &subject, Verdict::Broken, &format!("could not bind it: {error}")).advising(&next)
        }
    };
    timed(finding, begun)
}

fn bind(address: SocketAddr) -> io::Result<()> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // As a gateway does: what the last one's connections have left behind does not count.
    socket.set_reuseaddr(true)?;
    socket.bind(address)
}

fn trails(config: &Config) -> Vec<PathBuf> {
    config.audit.files().map(PathBuf::from).collect()
}

/// Whether a trail can be written, and has room.
fn room(path: &Path) -> Finding {
    let subject = path.display().to_string();
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let free = rustix::fs::statvfs(parent).map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    let tried = match try_out(path, parent) {
        Ok(tried) => tried,
        Err(error) => {
            let evidence = format!("{} cannot write it: {error}", whoever());
            return Finding::new("trail", &subject, Verdict::Broken, &evidence)
                .advising("give the gateway's user the right to write there: without its trail it opens nothing");
        }
    };
    match free {
        Ok(free) if free < limits::TRAIL_ROOM_LEAST => {
            let evidence = format!("its disk is full: {free} bytes are left");
            Finding::new("trail", &subject, Verdict::Broken, &evidence)
                .advising("make room, or move the trail: a gateway that cannot record opens nothing and ends what runs")
        }
        Ok(free) if free < limits::TRAIL_ROOM => {
            let evidence = format!("its disk has {} MiB left", free >> 20);
            Finding::new("trail", &subject, Verdict::Warning, &evidence).advising("make room before it is full")
        }
        Ok(free) => {
            let evidence = format!("{tried}; its disk has {} MiB left", free >> 20);
            let finding = Finding::new("trail", &subject, Verdict::Ok, &evidence);
            match rustix::process::geteuid().is_root() {
                // What root may do says nothing of others, and a gateway is hardly ever root.
                true => finding.advising(
                    "root may write almost anything: to see whether the gateway's user may, run this as that user: \
                     runuser -u caponier -- caponier doctor --gateway --config FILE",
                ),
                false => finding,
            }
        }
        Err(error) => {
            let evidence = format!("{tried}; how much room there is, nobody says: {error}");
            Finding::new("trail", &subject, Verdict::Warning, &evidence)
        }
    }
}

/// Tries to write a trail as far as that changes nothing, and says what was tried, by whom, and whose it is.
fn try_out(path: &Path, parent: &Path) -> io::Result<String> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    // As the writer does: of a pipe that nobody reads it would wait for ever.
    match OpenOptions::new().append(true).custom_flags(flags.bits().cast_signed()).open(path) {
        Ok(file) => {
            let data = file.metadata()?;
            if !data.is_file() {
                return Err(io::Error::other("it is not a regular file"));
            }
            Ok(format!("{} could open it for appending; {}", whoever(), owned(&data)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            rustix::fs::access(parent, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)?;
            let data = parent.metadata()?;
            Ok(format!(
                "it is not there yet; {} may make it in its folder, going by permissions; {}",
                whoever(),
                owned(&data)
            ))
        }
        Err(error) => Err(error),
    }
}

/// As whom this runs.
fn whoever() -> String {
    let uid = rustix::process::geteuid();
    let name = if uid.is_root() { "root, " } else { "" };
    format!("this user ({name}uid {})", uid.as_raw())
}

fn owned(data: &Metadata) -> String {
    format!("that belongs to uid {}, mode {:04o}", data.uid(), data.mode() & 0o7777)
}

fn descriptors() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    match limit {
        Some(limit) if limit < limits::DESCRIPTORS_LEAST => {
            let evidence = format!("this process may have {limit}, and each forward takes up to two");
            Finding::new("descriptors", "this process", Verdict::Warning, &evidence)
                .advising("raise LimitNOFILE of the unit, or ulimit -Hn of whoever starts the gateway")
        }
        Some(limit) => Finding::new("descriptors", "this process", Verdict::Ok, &format!("up to {limit}")),
        None => Finding::new("descriptors", "this process", Verdict::Ok, "without a limit"),
    }
}

fn running(config: &Config, runs: bool, there: bool) -> Finding {
    let Some(path) = &config.admin_socket else {
        return Finding::new(
            "admin",
            "none",
            Verdict::Skipped,
            "there is no admin_socket, so that nobody can be asked",
        );
    };
    let subject = path.display().to_string();
    match (runs, there) {
        (true, _) => Finding::new("admin", &subject, Verdict::Ok, "a gateway runs and answers"),
        (false, true) => {
            let evidence = "there is something at this path, and it does not answer this user";
            Finding::new("admin", &subject, Verdict::Warning, evidence)
                .advising("run this as the gateway's user or as root; if the gateway does not run, start it")
        }
        (false, false) => Finding::new("admin", &subject, Verdict::Skipped, "no gateway runs"),
    }
}

/// Which of the registered agents are linked.
fn agents(rows: &[AgentRow], snapshot: &Snapshot, examination: &mut Examination<'_>) {
    let (mut linked, mut expected) = (0, 0);
    for (id, organisation) in snapshot.organisations() {
        for (agent, record) in &organisation.agents {
            let now = Timestamp::now();
            if !record.keys.iter().any(|key| key.counts(now)) {
                continue;
            }
            expected += 1;
            let of = |row: &&AgentRow| row.organisation == id.as_str() && row.agent == agent.as_str();
            if rows.iter().filter(of).any(|row| row.state == "active") {
                linked += 1;
                continue;
            }
            let last = rows.iter().filter(of).find_map(|row| row.last_error.as_ref());
            let evidence = match last {
                Some(last) => {
                    format!("not linked; what went wrong last: {} {} (at {})", last.reason, last.detail, last.at)
                }
                None => "not linked, and it has not tried since the gateway was started".to_owned(),
            };
            let next = "ask its owner whether it runs, and to run there: caponier doctor --config agent.toml";
            let subject = format!("{id}/{agent}");
            examination.add(Finding::new("agents", &subject, Verdict::Warning, &evidence).advising(next));
        }
    }
    let evidence = format!("{linked} of {expected} registered agents are linked");
    examination.add(Finding::new("agents", "all", Verdict::Ok, &evidence));
}

fn timed(finding: Finding, begun: Instant) -> Finding {
    Finding { elapsed_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX), ..finding }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trail_is_tried_out_as_whoever_asks_and_nothing_is_made() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("trail.jsonl");
        let told = try_out(&path, dir.path()).expect("the folder can be written");
        let uid = rustix::process::geteuid().as_raw();
        assert!(told.contains("not there yet") && told.contains(&format!("uid {uid})")), "{told}");
        assert!(!path.exists(), "it was made");
        std::fs::write(&path, "").expect("written");
        let told = try_out(&path, dir.path()).expect("it can be written");
        assert!(told.contains("open it for appending") && told.contains(&format!("belongs to uid {uid}")), "{told}");
        // A pipe, whether or not somebody reads it, holds nobody up, and is no trail.
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("a pipe");
        assert_eq!(room(&pipe).verdict, Verdict::Broken);
        let _reader = OpenOptions::new().read(true).write(true).open(&pipe).expect("a reader");
        let finding = room(&pipe);
        assert!(finding.verdict == Verdict::Broken && finding.evidence.contains("not a regular file"), "{finding:?}");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).expect("a link");
        assert_eq!(room(&link).verdict, Verdict::Broken);
    }

    #[tokio::test]
    async fn what_hangs_is_left_behind_and_said_so() {
        let tasks = Tasks::new();
        let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
        let hung = tasks.aside(Duration::from_millis(20), move || held.recv()).await;
        assert!(hung.is_none(), "it is waited for");
        // Others are not held up by it.
        assert_eq!(tasks.aside(limits::STOP_GRACE, || 7).await, Some(7));
        drop(release);
        let finding = hangs("registry", "/mnt/registry", "/mnt/registry", Duration::from_secs(2));
        assert!(finding.verdict == Verdict::Broken && finding.evidence.contains("within 2 s"), "{finding:?}");
    }
}

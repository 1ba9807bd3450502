//! Examines a gateway from where it runs, beside it or in its place: configuration, registry, certificates, listeners, trail,
//! and who is linked.
//!
//! Promised: nothing is changed and nobody is served. A port is bound for a moment, without listening on it, where no gateway
//! has it; a trail is opened for appending and not written. Whether a gateway runs is asked at its admin socket.

use std::fs::OpenOptions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
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

/// Examines the gateway that this would configure. A stage may take as long as `patience`.
pub async fn examine(config: &Config, patience: Duration, examination: &mut Examination<'_>) {
    examination.add(clock(config));
    let registry = file::load(&config.registry);
    examination.add(registered(config, &registry));
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
        examination.add(room(&trail));
    }
    examination.add(descriptors());
    examination.add(running(config, rows.as_deref()));
    match (rows, registry) {
        (Some(rows), Ok(snapshot)) => agents(&rows, &snapshot, examination),
        (None, Ok(_)) => {
            let why = "not looked at: no gateway runs that could be asked";
            examination.add(Finding::new("agents", "all", Verdict::Skipped, why));
        }
        (_, Err(_)) => {
            let why = "not looked at, because of registry";
            examination.add(Finding::new("agents", "all", Verdict::Skipped, why));
        }
    }
}

/// What this host's own files tell of its clock. There is nobody to compare it with: each agent's doctor does that.
fn clock(config: &Config) -> Finding {
    let begun = Instant::now();
    let now = SystemTime::now();
    let newest = newest(&config.registry, 0);
    let ahead = newest.and_then(|(at, path)| Some((at.duration_since(now).ok()?, path)));
    let subject = "this host";
    let finding = match ahead {
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
    };
    timed(finding, begun)
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

fn registered(config: &Config, registry: &Result<Snapshot, Faults>) -> Finding {
    let begun = Instant::now();
    let subject = config.registry.display().to_string();
    let broken =
        |evidence: &str, next: &str| Finding::new("registry", &subject, Verdict::Broken, evidence).advising(next);
    let snapshot = match registry {
        Ok(snapshot) => snapshot,
        Err(faults) => {
            let next = "correct what stands at each of these places; a gateway that runs goes on with the last state that was \
                        good, and one that starts does not";
            return timed(broken(&faults.to_string().replace('\n', "; "), next), begun);
        }
    };
    if let Some(why) = config.contradiction(snapshot) {
        return timed(broken(&why, "change the registry or the configuration so that the two fit"), begun);
    }
    let now = Timestamp::now();
    let mut said = Vec::new();
    for path in writable_by_others(&config.registry) {
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
    let finding = match said.is_empty() {
        true => Finding::new("registry", &subject, Verdict::Ok, &format!("{counts}; nothing ends soon")),
        false => Finding::new("registry", &subject, Verdict::Warning, &format!("{counts}; {}", said.join("; ")))
            .advising("caponier keys list --registry DIR shows all keys; keys add and keys rotate bring new ones"),
    };
    timed(finding, begun)
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
    let begun = Instant::now();
    let subject = path.display().to_string();
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = match path.exists() {
        // As the writer does: of a pipe that nobody reads it would wait for ever.
        true => OpenOptions::new().append(true).custom_flags(flags.bits().cast_signed()).open(path).map(drop),
        false => rustix::fs::access(parent, rustix::fs::Access::WRITE_OK).map_err(io::Error::from),
    };
    let free = rustix::fs::statvfs(parent).map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    let finding = match (opened, free) {
        (Err(error), _) => Finding::new("trail", &subject, Verdict::Broken, &format!("it cannot be written: {error}"))
            .advising("give the gateway's user the right to write there: without its trail it opens nothing"),
        (Ok(()), Ok(free)) if free < limits::TRAIL_ROOM_LEAST => {
            let evidence = format!("its disk is full: {free} bytes are left");
            Finding::new("trail", &subject, Verdict::Broken, &evidence)
                .advising("make room, or move the trail: a gateway that cannot record opens nothing and ends what runs")
        }
        (Ok(()), Ok(free)) if free < limits::TRAIL_ROOM => {
            let evidence = format!("its disk has {} MiB left", free >> 20);
            Finding::new("trail", &subject, Verdict::Warning, &evidence).advising("make room before it is full")
        }
        (Ok(()), Ok(free)) => {
            let evidence = format!("it can be written, and its disk has {} MiB left", free >> 20);
            Finding::new("trail", &subject, Verdict::Ok, &evidence)
        }
        (Ok(()), Err(error)) => {
            let evidence = format!("it can be written; how much room there is, nobody says: {error}");
            Finding::new("trail", &subject, Verdict::Warning, &evidence)
        }
    };
    timed(finding, begun)
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

fn running(config: &Config, rows: Option<&[AgentRow]>) -> Finding {
    let Some(path) = &config.admin_socket else {
        return Finding::new(
            "admin",
            "none",
            Verdict::Skipped,
            "there is no admin_socket, so that nobody can be asked",
        );
    };
    let subject = path.display().to_string();
    match rows {
        Some(_) => Finding::new("admin", &subject, Verdict::Ok, "a gateway runs and answers"),
        None if path.exists() => {
            let evidence = "there is something at this path, and it does not answer this user";
            Finding::new("admin", &subject, Verdict::Warning, evidence)
                .advising("run this as the gateway's user or as root; if the gateway does not run, start it")
        }
        None => Finding::new("admin", &subject, Verdict::Skipped, "no gateway runs"),
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

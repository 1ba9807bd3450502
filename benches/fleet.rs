//! Many agents in one process, for what a gateway has to bear: `scripts/bench` and `scripts/soak` start it.
//!
//! ```text
//! fleet register COUNT DIR REGISTRY         makes keys in DIR, and the agents acme/fleet-0 … in a gateway's REGISTRY
//! fleet run COUNT DIR ADDRESS LOGIN.pub PORT
//!                                           runs them: they link to the gateway at ADDRESS, let its login key in, and may
//!                                           reach 127.0.0.1:PORT
//! ```
//!
//! `run` prints a line when every agent is linked, and one again each time that all are after any lost its link. It learns
//! that from the agents' own trails: a second process runs them, and writes all their records to a pipe. Beside it, it
//! counts the connections that the gateway has accepted and that are no links yet, which are the handshakes under way.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use caponier::agent;
use caponier::config::{self, Loaded};
use caponier::drain::Stop;
use caponier::identity::{Algorithm, PrivateKey, PublicKey};
use caponier::reload::Reloads;
use caponier::systemd::Supervisor;
use caponier::task::Tasks;
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::Value;

/// Between the starts of two agents. A gateway that comes back meets them all at once; at the beginning it need not.
const START: Duration = Duration::from_millis(4);
/// Between two looks at the connections: a handshake takes longer.
const LOOK: Duration = Duration::from_millis(20);
/// The trail's writer of each agent has a thread of its own, and so do the lookups.
const SPARE_THREADS: usize = 256;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["register", count, dir, registry] => register(count.parse()?, Path::new(dir), Path::new(registry)),
        ["run", count, dir, address, login, port] => {
            let (count, address) = (count.parse()?, address.parse()?);
            let configs = configure(count, Path::new(dir), address, Path::new(login), port.parse()?)?;
            // What is made first is ended last: the agents end when their standard input does.
            let agents = Command::new(std::env::current_exe()?)
                .arg("agents")
                .args(configs)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            watch(count, address, agents)
        }
        ["agents", ref configs @ ..] => agents(configs),
        _ => Err("usage: fleet register | run; see benches/fleet.rs".into()),
    }
}

fn name(number: usize) -> String {
    format!("fleet-{number}")
}

fn register(count: usize, dir: &Path, registry: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(dir)?;
    for name in (0..count).map(name) {
        let key = PrivateKey::generate(Algorithm::Ed25519);
        key.write_new(&dir.join(&name))?;
        let home = registry.join("organisations/acme/agents").join(&name);
        fs::create_dir_all(&home)?;
        key.write_public_new(&home.join("key.pub"))?;
    }
    Ok(())
}

fn configure(
    count: usize,
    dir: &Path,
    address: SocketAddr,
    login: &Path,
    port: u16,
) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let login = PublicKey::read(login)?.to_openssh();
    let mut configs = Vec::new();
    for name in (0..count).map(name) {
        let path = dir.join(&name).with_extension("toml");
        fs::write(
            &path,
            format!(
                r#"[agent]
id = "{name}"
host_key = "{name}"

[[organisation]]
id = "acme"
gateways = ["ssh://{address}"]

[[organisation.orchestrator]]
key = "{login}"
asserts = ["*"]

[[organisation.allow]]
name = "target"
addresses = ["127.0.0.1/32"]
ports = [{port}]

[audit]
stdout = true
"#
            ),
        )?;
        configs.push(path);
    }
    Ok(configs)
}

// --- the agents ---

fn agents(paths: &[&str]) -> Result<(), Box<dyn Error>> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    let mut configs = Vec::new();
    for path in paths {
        let Loaded::Agent(config, _) = config::load(Path::new(path))? else {
            return Err(format!("{path} is no agent's").into());
        };
        configs.push(*config);
    }
    let threads = std::thread::available_parallelism()?.get();
    let share = configs.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        while !configs.is_empty() {
            let rest = configs.split_off(share.min(configs.len()));
            let part = std::mem::replace(&mut configs, rest);
            scope.spawn(move || {
                if let Err(error) = run(part) {
                    eprintln!("fleet: {error}");
                    std::process::exit(1);
                }
            });
        }
        // Whoever started this process holds the other end.
        drop(std::io::stdin().read(&mut [0]));
        std::process::exit(0)
    })
}

fn run(configs: Vec<agent::Config>) -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(configs.len() + SPARE_THREADS)
        .build()?;
    runtime.block_on(async {
        let tasks = Tasks::new();
        let stop = Stop::new();
        let mut running = Vec::new();
        for config in configs {
            let stop = stop.clone();
            running.push(
                tasks.spawn(async move { agent::run(config, Reloads::never(), stop, &Supervisor::none()).await }),
            );
            tokio::time::sleep(START).await;
        }
        for agent in running {
            agent.await??;
        }
        Ok(())
    })
}

// --- watching them ---

fn watch(count: usize, address: SocketAddr, mut agents: Child) -> Result<(), Box<dyn Error>> {
    let records = BufReader::new(agents.stdout.take().ok_or("the agents have no output")?);
    let linked = AtomicI64::new(0);
    let most = AtomicI64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                std::thread::park_timeout(LOOK);
                // The count of links comes first: a link that comes up in between must not count as a handshake.
                let links = linked.load(Ordering::Relaxed);
                most.fetch_max(accepted(address.port()) - links, Ordering::Relaxed);
            }
        });
        let result = follow(count, records, &linked, &most);
        drop(agents.kill());
        if let Err(error) = result {
            eprintln!("fleet: {error}");
        }
        // The agents are gone; there is nothing left to watch.
        std::process::exit(1)
    })
}

fn follow(count: usize, records: impl BufRead, linked: &AtomicI64, most: &AtomicI64) -> Result<(), Box<dyn Error>> {
    let mut links: HashMap<String, i64> = HashMap::new();
    let mut since = Instant::now();
    let mut complete = false;
    for line in records.lines() {
        let record: Value = serde_json::from_str(&line?)?;
        let change = match record["event"].as_str() {
            Some("link.up") => 1,
            Some("link.down") => -1,
            _ => continue,
        };
        let agent = record["agent"].as_str().ok_or("a link without an agent")?;
        let held = links.entry(agent.to_owned()).or_default();
        *held += change;
        linked.fetch_add(change, Ordering::Relaxed);
        let absent = count - links.values().filter(|held| **held > 0).count();
        if complete && absent > 0 {
            complete = false;
            since = Instant::now();
            most.store(0, Ordering::Relaxed);
        }
        if !complete && absent == 0 {
            complete = true;
            println!("linked {:.2} s handshakes {}", since.elapsed().as_secs_f64(), most.load(Ordering::Relaxed));
        }
    }
    Err("the agents have ended".into())
}

/// Connections to this port that a process has accepted: those that still wait for that have no inode.
fn accepted(port: u16) -> i64 {
    const ESTABLISHED: &str = "01";
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let suffix = format!(":{port:04X}");
    let ours = |line: &&str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&suffix))
            && fields.nth(1) == Some(ESTABLISHED)
            && fields.nth(5).is_some_and(|inode| inode != "0")
    };
    table.lines().skip(1).filter(ours).count() as i64
}

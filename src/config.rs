//! Configuration: from TOML files and the environment to the components' own `Config`s.
//!
//! A file says by its tables what it configures: `[agent]`, `[gateway]`, `[proxy]` or `[provision]`. Where a value comes from does
//! not matter to its meaning; the later of these takes precedence: `HTTPS_PROXY` and `NO_PROXY` (for `proxy` and `no_proxy`), the file,
//! `AGENT_PROXY` (for `agent.proxy` alone), and `CAPONIER_TABLE__KEY`. Relative paths start where the file lies.
//!
//! Promised: loading reads the keys and other files that the configuration names and opens nothing else; it finds every
//! fault that can be found without a network; an unknown key is a fault, and an omitted one never means "everything",
//! save the `principals` of an allow rule.

mod audit;
mod collectors;
mod egress;
mod file;
mod health;
mod mutual;
mod proxy;
mod resolver;
mod resources;
mod trust;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

pub use egress::{EgressError, egress_of_command};

use crate::document::{Document, Fault, Faults};
use crate::policy::rule::Allowlist;
use crate::target::Target;
use crate::{agent, client, gateway, provision};

/// What settings in the environment begin with.
pub const PREFIX: &str = "CAPONIER";

/// A configuration that is in order.
#[derive(Debug)]
pub enum Loaded {
    /// `caponier agent` can run with it.
    Agent(Box<agent::Config>, Log),
    /// `caponier gateway` can run with it.
    Gateway(Box<gateway::Config>, Log),
    /// `caponier proxy` can run with it.
    Proxy(Box<crate::proxy::Config>, Log),
    /// `caponier provision` can work on it.
    Resources(Box<Provisioning>),
}

/// What is to be provisioned, and the way there.
#[derive(Debug)]
pub struct Provisioning {
    /// The way: a gateway and an agent.
    pub client: client::Config,
    /// The databases and roles.
    pub resources: provision::Resources,
}

/// How the log is written, and where traces go. What is logged is said by the environment, as with other programs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Log {
    /// The form of a line.
    pub format: LogFormat,
    /// The collector that gets traces of forwards, if one does.
    pub traces: Option<Target>,
}

impl Log {
    /// The tables in which another one differs.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let tables = [(self.format != other.format, "log"), (self.traces != other.traces, "traces")];
        tables.into_iter().filter(|(differs, _)| *differs).map(|(_, table)| table).collect()
    }
}

/// The form of a line of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Reads a configuration file, and the environment of this process.
///
/// # Errors
/// With every fault in either, if there is one.
pub fn load(path: &Path) -> Result<Loaded, Faults> {
    load_with(path, std::env::vars_os())
}

/// As [`load`]; and all files that were read for it, or would have been, for whoever follows their changes: the file itself
/// first, which goes by no key, then others by the keys that name them.
pub fn load_noting_files(path: &Path) -> (Result<Loaded, Faults>, Vec<(String, PathBuf)>) {
    let mut files = vec![(String::new(), path.to_owned())];
    let loaded = load_into(path, std::env::vars_os(), &mut files);
    (loaded, files)
}

/// As [`load`], with these variables for an environment.
///
/// # Errors
/// With every fault in either, if there is one.
pub fn load_with(path: &Path, variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Loaded, Faults> {
    load_into(path, variables, &mut Vec::new())
}

fn load_into(
    path: &Path,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
    files: &mut Vec<(String, PathBuf)>,
) -> Result<Loaded, Faults> {
    let mut document = Document::read(path)?;
    // The file alone says what it is: a variable that was meant for another component must not change that.
    let kinds =
        [("agent", Kind::Agent), ("gateway", Kind::Gateway), ("proxy", Kind::Proxy), ("provision", Kind::Resources)];
    let found: Vec<_> = kinds.into_iter().filter(|(table, _)| document.has(table)).collect();
    let (table, read) = match found[..] {
        [found] => found,
        [(one, _), (other, _), ..] => {
            return Err(Faults::file(path, format!("[{one}] and [{other}] in one file: give each a file of its own")));
        }
        [] => {
            let problem = "none of [agent], [gateway], [proxy] and [provision] in it: this configures nothing of ours";
            return Err(Faults::file(path, problem));
        }
    };
    let leaves = matches!(read, Kind::Agent | Kind::Resources);
    let mut unreadable = Faults::default();
    let mut settings = Vec::new();
    for (variable, value) in variables {
        let Ok(variable) = variable.into_string() else { continue };
        let ours = variable.strip_prefix(PREFIX).is_some_and(|rest| rest.starts_with('_'));
        if !(ours || leaves && egress::is_known(&variable)) {
            continue;
        }
        match value.into_string() {
            Ok(value) => settings.push((variable, value)),
            Err(_) => unreadable.add(Fault {
                file: path.into(),
                line: None,
                key: String::new(),
                variable: Some(variable),
                problem: "the variable is not UTF-8".to_owned(),
            }),
        }
    }
    unreadable.none_in(())?;
    if leaves {
        egress::overlay(&mut document, table, PREFIX, &mut settings);
    }
    let password = settings.iter().find(|(variable, _)| variable == DATABASE_PASSWORD);
    if let (Kind::Resources, Some((_, password))) = (read, password) {
        document.overlay("instance", "password", DATABASE_PASSWORD, password.clone());
    }
    document.overlay_environment(PREFIX, settings);
    match read {
        Kind::Agent => {
            let config = file::agent(&document.root());
            files.extend(document.files());
            document.finish(config).map(|(config, log)| Loaded::Agent(Box::new(config), log))
        }
        Kind::Gateway => {
            let config = file::gateway(&document.root());
            files.extend(document.files());
            document.finish(config).map(|(config, log)| Loaded::Gateway(Box::new(config), log))
        }
        Kind::Proxy => {
            let config = proxy::proxy(&document.root());
            files.extend(document.files());
            document.finish(config).map(|(config, log)| Loaded::Proxy(Box::new(config), log))
        }
        Kind::Resources => {
            let provisioning = resources::resources(&document.root());
            document.finish(provisioning).map(|provisioning| Loaded::Resources(Box::new(provisioning)))
        }
    }
}

/// Reads rules alone, as they stand in an `[[organisation]]` of an agent: `[[allow]]` and `[[deny]]`. `file` is what faults call
/// it.
///
/// # Errors
/// With every fault, if there is one.
pub fn rules(file: &Path, text: &str) -> Result<Allowlist, Faults> {
    let document = Document::parse(file, text)?;
    let rules = file::allowlist(&document.root());
    document.finish(rules)
}

/// The administrator's password for provisioning, under a name of its own; the file itself may not hold it.
const DATABASE_PASSWORD: &str = "CAPONIER_DATABASE_PASSWORD";

#[derive(Debug, Clone, Copy)]
enum Kind {
    Agent,
    Gateway,
    Proxy,
    Resources,
}

#[cfg(test)]
mod tests;

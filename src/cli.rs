//! The command line: one file per command below `cli/`, each with `Args` and `run`.
//!
//! Promised: nothing a user types makes the program panic; a usage error or a bad configuration ends with exit code 2,
//! a target that a policy refuses with 3, any other failure with 1. What a program may want to read goes to standard
//! output, all else to standard error.
//!
//! To add a command: write `cli/NAME.rs`, and name it in `Command` twice.

pub mod agent;
pub mod agents;
pub mod audit;
pub mod check;
pub mod doctor;
mod egress;
pub mod forward;
pub mod gateway;
pub mod generate;
pub mod health;
pub mod keys;
pub mod kubeconfig;
pub mod policy;
pub mod provision;
pub mod proxy;
mod running;
pub mod top;
pub mod url;

use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use jiff::Timestamp;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// What was asked for was done.
    Done = 0,
    /// It was tried and failed.
    Failed = 1,
    /// The command line or a file that configures us is wrong; nothing was tried.
    Usage = 2,
    /// A policy refused it.
    Refused = 3,
    /// What was to be looked at was not, or not all of it: nothing is known of how it is.
    Unexamined = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Runs the command that `arguments` (the program's name first) ask for.
///
/// # Errors
/// If the command fails; [`exit_code`] tells the exit code that belongs to the error, which the caller reports.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<ExitCode> {
    match Cli::try_parse_from(arguments) {
        Ok(cli) => cli.command.run(),
        // Help and version arrive here too; clap knows which stream each belongs to.
        Err(answer) => {
            let _ = answer.print();
            Ok(ExitCode::from(u8::try_from(answer.exit_code()).unwrap_or(Exit::Usage as u8)))
        }
    }
}

/// The exit code that belongs to an error: [`Exit::Failed`], unless [`ExitWith`] said otherwise.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    error.downcast_ref::<Coded>().map_or(Exit::Failed, |coded| coded.exit).into()
}

/// Gives the error of a result its exit code, leaving its text as it is.
pub trait ExitWith<T> {
    /// The same result, whose error ends the program with `exit`.
    ///
    /// # Errors
    /// If `self` is one.
    fn exit_with(self, exit: Exit) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> ExitWith<T> for Result<T, E> {
    fn exit_with(self, exit: Exit) -> anyhow::Result<T> {
        self.map_err(|error| Coded { exit, error: error.into().into_boxed_dyn_error() }.into())
    }
}

/// Reads a moment from the command line.
///
/// # Errors
/// If it is none, with the form that is wanted.
fn moment(text: &str) -> Result<Timestamp, String> {
    text.parse().map_err(|_| "a moment such as 2027-11-30T00:00:00Z is wanted, with its offset from UTC".to_owned())
}

/// Writes an answer to standard output. A reader that has gone away is not an error: it has seen enough.
///
/// # Errors
/// If standard output takes no more for another reason, a full disk for one.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("could not write the answer to standard output"))
        }
        _ => Ok(()),
    }
}

/// An outbound-only SSH tunnel service: reach internal hosts that their network's owner allows, and have it on record.
#[derive(Debug, Parser)]
#[command(name = "caponier", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Agent(agent::Args),
    Gateway(gateway::Args),
    Generate(generate::Args),
    Proxy(proxy::Args),
    Forward(Box<forward::Args>),
    Provision(provision::Args),
    Check(check::Args),
    Doctor(doctor::Args),
    Health(health::Args),
    Agents(agents::Args),
    Audit(audit::Args),
    Keys(keys::Args),
    Kubeconfig(Box<kubeconfig::Args>),
    Policy(policy::Args),
    Top(top::Args),
    Url(url::Args),
}

impl Command {
    fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Agent(args) => agent::run(args),
            Self::Gateway(args) => gateway::run(args),
            Self::Generate(args) => generate::run(args),
            Self::Proxy(args) => proxy::run(args),
            Self::Forward(args) => forward::run(*args),
            Self::Provision(args) => provision::run(args),
            Self::Check(args) => check::run(args),
            Self::Doctor(args) => doctor::run(args),
            Self::Health(args) => health::run(args),
            Self::Agents(args) => agents::run(args),
            Self::Audit(args) => audit::run(args),
            Self::Keys(args) => keys::run(args),
            Self::Kubeconfig(args) => kubeconfig::run(*args),
            Self::Policy(args) => policy::run(args),
            Self::Top(args) => top::run(args),
            Self::Url(args) => url::run(args),
        }
    }
}

/// An error that has an exit code of its own, and otherwise looks like the error it holds.
#[derive(Debug)]
struct Coded {
    exit: Exit,
    error: Box<dyn Error + Send + Sync>,
}

impl fmt::Display for Coded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl Error for Coded {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

const EXAMPLES: &str = "\
Example:
  caponier keys generate --output agent.key
  caponier check agent.toml
  caponier agent --config agent.toml

CAPONIER_LOG sets how much the log says, as in CAPONIER_LOG=caponier=debug.
Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 refused by policy.";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_command_and_every_help_is_sound() {
        fn check(command: &mut clap::Command) {
            let name = command.get_name().to_owned();
            // clap's own `help` command.
            if name == "help" {
                return;
            }
            assert!(command.get_about().is_some(), "{name} says nothing about itself");
            assert!(command.render_help().to_string().contains("Example"), "the help of {name} has no example");
            command.get_subcommands_mut().for_each(check);
        }
        let mut command = Cli::command();
        command.clone().debug_assert();
        command.get_subcommands_mut().for_each(check);
    }

    #[test]
    fn exit_codes_leave_the_error_text_alone() {
        let inner = anyhow::Error::new(io::Error::other("inner")).context("outer");
        let error = Err::<(), _>(inner).exit_with(Exit::Refused).expect_err("an error");
        assert_eq!(format!("{error:#}"), "outer: inner");
        assert_eq!(error.downcast_ref::<Coded>().map(|coded| coded.exit), Some(Exit::Refused));
        let error = error.context("outermost");
        assert_eq!(format!("{error:#}"), "outermost: outer: inner");
        assert_eq!(error.downcast_ref::<Coded>().map(|coded| coded.exit), Some(Exit::Refused));
    }
}

//! `caponier provision`: databases, roles and grants on a PostgreSQL instance behind an agent or an SSH bastion.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;
use tokio::io::DuplexStream;
use tracing::Level;

use super::{Exit, ExitWith, print, running};
use crate::client::{self, OpenError, Session};
use crate::config::{self, Loaded};
use crate::limits;
use crate::provision::{self, Connect, Event, Output};
use crate::target::Target;
use crate::task::Tasks;
use crate::telemetry;

/// Create databases, roles and grants on a PostgreSQL instance behind an agent or an SSH bastion, or take them away again.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier provision plan -f resources.toml
  caponier provision apply -f resources.toml
  caponier provision destroy -f resources.toml

deploy/resources.toml explains the file. The administrator's password comes from the file that it names, or from \
CAPONIER_DATABASE_PASSWORD.")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Plan(Plan),
    Apply(Apply),
    Destroy(Destroy),
}

/// Show what `apply` would do, without passwords. Changes nothing.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier provision plan -f resources.toml")]
struct Plan {
    #[command(flatten)]
    file: File,
    /// Show what `apply --rotate` would do.
    #[arg(long)]
    rotate: bool,
    /// Show what `destroy` would do.
    #[arg(long, conflicts_with = "rotate")]
    destroy: bool,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

/// Make it so, and write the credentials where the file says. Can be interrupted and run again at any point.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier provision apply -f resources.toml
  caponier provision apply -f resources.toml --rotate
  caponier provision apply -f resources.toml --output - | jq -r '.[0].password'")]
struct Apply {
    #[command(flatten)]
    file: File,
    /// Replace every password, also those that have been handed over.
    #[arg(long)]
    rotate: bool,
    /// Where the credentials go, in place of what the file says: a path, or `-` for standard output, where a password that
    /// was handed over before is `null`.
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,
}

/// Take away the databases and roles that the file names, where they are ours.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier provision destroy -f resources.toml")]
struct Destroy {
    #[command(flatten)]
    file: File,
}

#[derive(Debug, clap::Args)]
struct File {
    /// The resources; deploy/resources.toml explains the file.
    #[arg(long = "file", short = 'f', value_name = "FILE")]
    path: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// If the file has faults, the instance cannot be reached, or something is in the way.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let path = match &args.command {
        Command::Plan(plan) => &plan.file.path,
        Command::Apply(apply) => &apply.file.path,
        Command::Destroy(destroy) => &destroy.file.path,
    };
    let Loaded::Resources(loaded) = config::load(path).exit_with(Exit::Usage)? else {
        return Err(anyhow::anyhow!("{} is not a resources file: it has no [provision]", path.display()))
            .exit_with(Exit::Usage);
    };
    telemetry::start(telemetry::Format::Text, Level::WARN);
    let mut resources = loaded.resources;
    if let Command::Apply(Apply { output: Some(output), .. }) = &args.command {
        resources.output = match output.to_str() {
            Some("-") => Output::Stdout,
            _ => Output::File(output.clone()),
        };
    }
    let resources = &resources;
    running::block_on(async |stop| {
        let tasks = Tasks::new();
        eprintln!("logging in to {} as {}", loaded.client.server, loaded.client.server.user());
        let session = client::connect(&loaded.client, &tasks).await?;
        let through = Through(&session);
        let progress = &mut |event: &Event<'_>| {
            eprintln!("{event}");
            if stop.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let work = async {
            match &args.command {
                Command::Plan(args) => {
                    let observed = provision::observe(&through, resources, progress).await?;
                    let plan = match args.destroy {
                        true => provision::plan_destroy(resources, &observed),
                        false => provision::plan(resources, &observed, args.rotate),
                    };
                    match args.json {
                        true => print(&format!("{}\n", serde_json::to_string_pretty(&plan.to_json())?))?,
                        false => print(&plan.to_string())?,
                    }
                }
                Command::Apply(args) => {
                    let mut out = std::io::stdout();
                    let outcome = provision::apply(&through, resources, args.rotate, &mut out, progress).await?;
                    eprintln!("done: {} step(s) taken", outcome.steps);
                }
                Command::Destroy(_) => {
                    let outcome = provision::destroy(&through, resources, progress).await?;
                    eprintln!("done: {} step(s) taken", outcome.steps);
                }
            }
            anyhow::Ok(())
        };
        let done = work.await.with_context(|| format!("provisioning {} failed", resources.instance.target));
        let denied = |cause: &(dyn Error + 'static)| matches!(cause.downcast_ref(), Some(OpenError::NotAllowed { .. }));
        let done = match &done {
            Err(error) if error.chain().any(denied) => done.exit_with(Exit::Refused),
            _ => done,
        };
        session.close().await;
        tasks.drain(limits::STOP_GRACE).await;
        done
    })?;
    Ok(Exit::Done.into())
}

/// The instance, through a session at the server.
struct Through<'a>(&'a Session);

impl Connect for Through<'_> {
    type Stream = DuplexStream;

    async fn connect(&self, target: &Target) -> Result<DuplexStream, Box<dyn Error + Send + Sync>> {
        Ok(self.0.stream(target).await?)
    }
}

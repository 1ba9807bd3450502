//! `caponier keys add`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::ValueEnum;
use jiff::Timestamp;

use super::super::{Exit, ExitWith, moment, print};
use crate::identity::{AgentName, Pattern, PrincipalId, PublicKey};
use crate::registry::Role;
use crate::registry::edit::{Addition, Editor, Signs};

/// Register a public key for an agent or a principal, or one that signs tokens. Nothing is overwritten, and a registry that would have faults then is
/// left as it is.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier keys add --registry keys agent acme/prod-eu agent.key.pub --expires 2027-11-30T00:00:00Z
  caponier keys add --registry keys principal acme/ci ci.pub --comment 'runner 7'
  caponier keys add --registry keys principal acme/new ci.pub --new --agents 'prod-*'
  caponier keys add --registry keys token-key acme/ci token.key.pub --principals 'ci-*'

A gateway that follows this registry takes it up within seconds.")]
pub(super) struct Add {
    /// The registry's folder (`registry` in the gateway's configuration).
    #[arg(long, value_name = "DIR")]
    registry: PathBuf,
    /// What the key is for.
    #[arg(value_enum)]
    kind: Kind,
    /// Whose it is: ORGANISATION/NAME; of a key that signs tokens, what it is to be called.
    #[arg(value_name = "ORG/NAME")]
    holder: AgentName,
    /// The public key (OpenSSH or PEM).
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// From when on it does not count any more, as 2027-11-30T00:00:00Z; left out, it counts until it is revoked.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    expires: Option<Timestamp>,
    /// From when on it counts; left out, at once.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    not_before: Option<Timestamp>,
    /// A note for people.
    #[arg(long)]
    comment: Option<String>,
    /// Make the agent or principal, and its organisation, if they are not there.
    #[arg(long)]
    new: bool,
    /// Agents that a new principal may use, '*' for any characters; left out, it may use none yet. May be given several times.
    #[arg(long, value_name = "PATTERN", requires = "new")]
    agents: Vec<Pattern>,
    /// Principals that a key may sign tokens for, '*' for any characters. May be given several times.
    #[arg(long, value_name = "PATTERN", required_if_eq("kind", "token-key"), conflicts_with = "agents")]
    principals: Vec<Pattern>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A host key of an agent.
    Agent,
    /// A key of a principal.
    Principal,
    /// A key that signs tokens for principals (`caponier url --key`); Ed25519.
    TokenKey,
}

impl Add {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        const WHAT: &str = "could not add the key";
        let key = PublicKey::read(&self.file).context(WHAT).exit_with(Exit::Usage)?;
        if self.kind != Kind::TokenKey && !self.principals.is_empty() {
            return Err(anyhow!("--principals is said of a token-key")).context(WHAT).exit_with(Exit::Usage);
        }
        let name = self.holder.agent.to_string();
        let signs = (self.kind == Kind::TokenKey).then_some(Signs { name, principals: self.principals });
        let role = match self.kind {
            Kind::TokenKey => Role::TokenKey,
            Kind::Agent => Role::Agent(self.holder.agent),
            Kind::Principal => {
                let id: PrincipalId = self.holder.agent.as_str().parse().context(WHAT).exit_with(Exit::Usage)?;
                Role::Principal(id)
            }
        };
        let addition = Addition {
            organisation: self.holder.organisation,
            role,
            key,
            not_before: self.not_before,
            expires: self.expires,
            comment: self.comment,
            new: self.new.then_some(self.agents),
            signs,
        };
        let mut editor = Editor::open(&self.registry).context(WHAT).exit_with(Exit::Usage)?;
        warn_of_others(&self.registry);
        let file = editor.add(&addition, Timestamp::now()).context(WHAT)?;
        let Addition { organisation, role, key, .. } = &addition;
        print(&format!(
            "added        {}\nholder       {role} of {organisation}\n{}",
            file.display(),
            super::describe(key)
        ))?;
        Ok(Exit::Done.into())
    }
}

/// Says so where others may write in the registry.
pub(super) fn warn_of_others(registry: &std::path::Path) {
    for path in crate::registry::file::writable_by_others(registry) {
        let _ = writeln!(io::stderr(), "caponier: warning: others than its owner may write {}", path.display());
    }
}

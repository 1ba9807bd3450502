//! `caponier keys revoke`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use jiff::Timestamp;

use super::super::{Exit, ExitWith, print};
use crate::identity::OrganisationId;
use crate::registry::edit::{Editor, KeyName};

/// Withdraw a key: it stays registered as revoked, so that nobody registers it again.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier keys revoke --registry keys SHA256:Zr1dJQcUYwuyoAI0vfLe1Do27ai9cbqGLN4kwCcG3hc
  caponier keys revoke --registry keys --organisation acme 6f1c…64 hex digits…

A gateway that follows this registry refuses the key within seconds, and cuts what came in with it.")]
pub(super) struct Revoke {
    /// The registry's folder (`registry` in the gateway's configuration).
    #[arg(long, value_name = "DIR")]
    registry: PathBuf,
    /// The key's fingerprint: SSH's (SHA256:…), or the SHA-256 of its SPKI in hex.
    #[arg(value_name = "FINGERPRINT")]
    key: KeyName,
    /// In which organisation, where several know the key.
    #[arg(long, value_name = "ORG")]
    organisation: Option<OrganisationId>,
}

impl Revoke {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        const WHAT: &str = "could not revoke the key";
        let mut editor = Editor::open(&self.registry).context(WHAT).exit_with(Exit::Usage)?;
        let revoked = editor.revoke(&self.key, self.organisation.as_ref(), Timestamp::now()).context(WHAT)?;
        let key = &revoked.key;
        if revoked.last {
            let _ = writeln!(
                io::stderr(),
                "caponier: warning: {} of {} has no key left that counts, and cannot get in",
                key.role,
                key.organisation
            );
        }
        print(&format!(
            "{}\nholder       {} of {}\nfile         {}\n{}",
            if revoked.before { "was revoked before" } else { "revoked" },
            key.role,
            key.organisation,
            key.file.display(),
            super::describe(&key.key.key)
        ))?;
        Ok(Exit::Done.into())
    }
}

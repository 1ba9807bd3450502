//! `caponier keys list`.

use std::path::PathBuf;
use std::process::ExitCode;

use jiff::Timestamp;
use serde_json::json;

use super::super::{Exit, ExitWith, print};
use crate::identity::OrganisationId;
use crate::registry::Role;
use crate::registry::edit::{self, Listed};
use crate::registry::expiry::{Left, Stage};

/// Show the keys of a registry: whose they are, their fingerprints, and until when they count.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier keys list --registry /etc/caponier/keys
  caponier keys list --registry keys acme --json | jq -r '.[] | select(.state == \"good\") | .fingerprint'

States: good, revoked, expired, not yet valid. A key that expires within 30 days is marked with an exclamation mark.")]
pub(super) struct List {
    /// The registry's folder (`registry` in the gateway's configuration).
    #[arg(long, value_name = "DIR")]
    registry: PathBuf,
    /// Only this organisation's.
    #[arg(value_name = "ORG")]
    organisation: Option<OrganisationId>,
    /// Print a JSON array with one object per key.
    #[arg(long)]
    json: bool,
}

impl List {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let mut keys = edit::list(&self.registry).exit_with(Exit::Usage)?;
        keys.retain(|key| self.organisation.as_ref().is_none_or(|only| *only == key.organisation));
        let now = Timestamp::now();
        if self.json {
            let objects: Vec<_> = keys.iter().map(|key| object(key, now)).collect();
            print(&format!("{:#}\n", serde_json::Value::Array(objects)))?;
        } else {
            let blocks: Vec<_> = keys.iter().map(|key| block(key, now)).collect();
            print(&blocks.join("\n"))?;
        }
        Ok(Exit::Done.into())
    }
}

/// Whether a key counts, in a word.
pub(super) fn state(key: &Listed, now: Timestamp) -> &'static str {
    let key = &key.key;
    match () {
        () if key.revoked => "revoked",
        () if key.counts(now) => "good",
        () if key.not_before.is_some_and(|from| now < from) => "not yet valid",
        () => "expired",
    }
}

fn object(listed: &Listed, now: Timestamp) -> serde_json::Value {
    let key = &listed.key;
    let stem = || listed.file.file_stem().and_then(|name| name.to_str()).unwrap_or("");
    let (role, name) = match &listed.role {
        Role::Agent(id) => ("agent", id.as_str()),
        Role::Principal(id) => ("principal", id.as_str()),
        Role::Authority => ("user-ca", stem()),
        Role::TokenKey => ("token-key", stem()),
    };
    json!({
        "organisation": listed.organisation.as_str(),
        "role": role,
        "name": name,
        "state": state(listed, now),
        "algorithm": key.key.algorithm(),
        "bits": key.key.bits(),
        "fingerprint": key.key.fingerprint().to_string(),
        "spki_sha256": key.key.spki_fingerprint(),
        "not_before": key.not_before.map(|from| from.to_string()),
        "expires": key.expires.map(|to| to.to_string()),
        "revoked": key.revoked,
        "comment": key.comment,
        "file": listed.file.to_string_lossy(),
    })
}

fn block(listed: &Listed, now: Timestamp) -> String {
    let key = &listed.key;
    let state = match key.expires {
        Some(expires) if !key.revoked && Stage::of(expires, now).is_some() => {
            format!("{}  ! {}", state(listed, now), Left { expires, now })
        }
        Some(expires) => format!("{}, expires {expires}", state(listed, now)),
        None => state(listed, now).to_owned(),
    };
    let from = key.not_before.map(|from| format!("not before   {from}\n")).unwrap_or_default();
    let comment = key.comment.as_ref().map(|comment| format!("comment      {comment}\n")).unwrap_or_default();
    format!(
        "holder       {} of {}\nstate        {state}\n{from}{}{comment}file         {}\n",
        listed.role,
        listed.organisation,
        super::describe(&key.key),
        listed.file.display()
    )
}

//! `caponier keys`: making keys, telling their fingerprints, and which keys a registry or an agent has.

mod add;
mod list;
mod revoke;
mod rotate;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Subcommand, ValueEnum};
use serde_json::json;

use super::{Exit, ExitWith, print};
use crate::chain::Chain;
use crate::identity::{KeyError, PrivateKey, PublicKey, key};

/// Make keys, show their fingerprints, and register, withdraw and replace them.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier keys generate --output agent.key
  caponier keys fingerprint agent.key.pub
  caponier keys add --registry keys agent acme/prod-eu agent.key.pub")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Generate(Generate),
    Fingerprint(Fingerprint),
    List(list::List),
    Add(add::Add),
    Revoke(revoke::Revoke),
    Rotate(rotate::Rotate),
}

/// Make a key pair: FILE (OpenSSH's form, mode 0600) and FILE.pub. Existing files are never overwritten.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier keys generate --output agent.key --comment 'prod-eu, November 2026'
  caponier keys generate --algorithm rsa-4096 --output agent.key
  caponier keys generate --output audit.key --comment 'signs the heads of the trail'

A key has one use: host key, login key, the signing_key of [audit], or signing tokens; the last two want an Ed25519 key.")]
struct Generate {
    /// The kind of key.
    #[arg(long, value_enum, default_value_t = Algorithm::Ed25519)]
    algorithm: Algorithm,
    /// Where the private key goes; the public one goes beside it, with `.pub` added.
    #[arg(long, short, value_name = "FILE", default_value = "caponier.key")]
    output: PathBuf,
    /// A comment that both files carry, to tell keys apart.
    #[arg(long, default_value = "", hide_default_value = true)]
    comment: String,
}

/// Show the fingerprints of public or private keys: SSH's (SHA256:…), and the SHA-256 of the SPKI in hex.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier keys fingerprint agent.key.pub
  caponier keys fingerprint --json keys/organisations/acme/agents/prod-eu/*.pub")]
struct Fingerprint {
    /// Key files: public (OpenSSH or PEM) or private (OpenSSH, PKCS#8, PKCS#1 or SEC1).
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Print a JSON array with one object per key.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Algorithm {
    #[value(name = "ed25519", help = "small and fast; the right choice")]
    Ed25519,
    #[value(name = "rsa-4096", help = "for rules or hardware that know no Ed25519")]
    Rsa4096,
}

/// Runs `caponier keys`.
///
/// # Errors
/// If a key cannot be read, made or written.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Generate(generate) => generate.run(),
        Command::Fingerprint(fingerprint) => fingerprint.run(),
        Command::List(list) => list.run(),
        Command::Add(add) => add.run(),
        Command::Revoke(revoke) => revoke.run(),
        Command::Rotate(rotate) => rotate.run(),
    }
}

impl Generate {
    fn run(self) -> anyhow::Result<ExitCode> {
        const WHAT: &str = "could not make a key";
        let public_path = public_path(&self.output);
        // Told before a slow RSA generation; what decides is the exclusive creation below.
        for path in [&self.output, &public_path] {
            if path.symlink_metadata().is_ok() {
                return Err(KeyError::File { path: path.clone(), fault: Box::new(KeyError::Exists) }).context(WHAT);
            }
        }
        let algorithm = match self.algorithm {
            Algorithm::Ed25519 => key::Algorithm::Ed25519,
            Algorithm::Rsa4096 => key::Algorithm::Rsa4096,
        };
        let key = PrivateKey::generate(algorithm).with_comment(&self.comment).context(WHAT).exit_with(Exit::Usage)?;
        key.write_new(&self.output).context(WHAT)?;
        if let Err(error) = key.write_public_new(&public_path) {
            // Only a whole pair is left behind; this private key is nobody's yet.
            let _ = std::fs::remove_file(&self.output);
            return Err(error).context(WHAT);
        }
        print(&format!(
            "private key  {}\npublic key   {}\n{}",
            self.output.display(),
            public_path.display(),
            describe(&key.public())
        ))?;
        Ok(Exit::Done.into())
    }
}

impl Fingerprint {
    fn run(self) -> anyhow::Result<ExitCode> {
        let (mut shown, mut objects, mut exit) = (String::new(), Vec::new(), Exit::Done);
        for path in &self.files {
            let (key, kind) = match read(path) {
                Ok(found) => found,
                // The other files are still shown.
                Err(error) => {
                    let _ = writeln!(io::stderr(), "caponier: could not tell a fingerprint: {}", Chain(&error));
                    exit = Exit::Usage;
                    continue;
                }
            };
            shown.push_str(if shown.is_empty() { "" } else { "\n" });
            shown.push_str(&format!("{kind:<13}{}\n{}", path.display(), describe(&key)));
            objects.push(json!({
                "file": path.to_string_lossy(),
                "private": kind == PRIVATE,
                "algorithm": key.algorithm(),
                "bits": key.bits(),
                "fingerprint": key.fingerprint().to_string(),
                "spki_sha256": key.spki_fingerprint(),
            }));
        }
        match self.json {
            true => print(&format!("{:#}\n", serde_json::Value::Array(objects)))?,
            false => print(&shown)?,
        }
        Ok(exit.into())
    }
}

fn read(path: &Path) -> Result<(PublicKey, &'static str), KeyError> {
    match PublicKey::read(path) {
        Err(KeyError::File { fault, .. }) if matches!(*fault, KeyError::Private) => {
            PrivateKey::read(path).map(|key| (key.public(), PRIVATE))
        }
        public => public.map(|key| (key, PUBLIC)),
    }
}

fn describe(key: &PublicKey) -> String {
    let spki = key.spki_fingerprint().unwrap_or_else(|| "none: keys of this kind have no SPKI".into());
    format!(
        "algorithm    {} ({} bits)\nfingerprint  {}\nSPKI SHA-256 {spki}\n",
        key.algorithm(),
        key.bits(),
        key.fingerprint()
    )
}

fn public_path(private: &Path) -> PathBuf {
    let mut name = private.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}

const PRIVATE: &str = "private key";
const PUBLIC: &str = "public key";

//! `caponier keys rotate`: both halves of putting another host key in the place of an agent's, and a key for tokens in the
//! place of another.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::super::{Exit, ExitWith, moment, print, running};
use crate::config;
use crate::gateway::{self, AgentRow};
use crate::identity::{AgentName, Fingerprint, PrivateKey, PublicKey};
use crate::limits;
use crate::registry::Role;
use crate::registry::edit::{Addition, Editor, KeyName};

/// Put another host key in the place of an agent's, without a gap: at the agent (--config) and at the gateway (--registry); or,
/// with --token-key, another key that signs tokens in the place of the old one.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier keys rotate --config /etc/caponier/agent.toml
  caponier keys rotate --registry keys acme/prod-eu agent.key.new.pub \\
      --admin /run/caponier/gateway.sock
  caponier keys rotate --config /etc/caponier/agent.toml --switch
  caponier keys rotate --registry keys --token-key acme/ci token.key.new.pub --overlap 7d

The first and the third are for the agent's host, the others for the gateway's.

The first makes a key pair beside the old one. The second registers its public half, waits until each replica of the agent \
that is linked has a link with it and nothing runs on the old links any more, and then revokes the old keys; if that does not come \
to pass in time, both stay, and the exit code is 1. The third, meanwhile, puts the new key in the place of the old one, \
which the running agent takes up by itself; the old one stays beside it as .old. Should the gateway not know the new key \
yet, the agent keeps the link that it has and tries again.\n\n\
The last registers a key that signs tokens for the same principals as acme/ci does, and gives those that it replaces an end: \
until then URLs by either count, and after it those by the old key do not, nor does what they have opened. Sign with the new \
key from then on. The same command again, with a shorter --overlap, ends the old keys sooner.")]
pub(super) struct Rotate {
    /// At the agent: its configuration.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["registry", "admin", "within", "expires", "cut", "agent"])]
    config: Option<PathBuf>,
    /// Put the new key in the place of the old one.
    #[arg(long, requires = "config")]
    switch: bool,
    /// At the gateway: the registry's folder.
    #[arg(long, value_name = "DIR", required_unless_present = "config", requires = "agent")]
    registry: Option<PathBuf>,
    /// The agent, as ORGANISATION/AGENT; with --token-key, the name of the key's file in token-keys in its place.
    #[arg(value_name = "ORG/AGENT", requires = "file")]
    agent: Option<AgentName>,
    /// The new public key (OpenSSH or PEM).
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// The gateway's admin socket; several, if several gateways on this host follow the registry.
    #[arg(long, value_name = "SOCKET", default_value = "/run/caponier/gateway.sock")]
    admin: Vec<PathBuf>,
    /// How long to wait for the agent's new links: seconds, minutes or hours, as 90s, 10m or 2h; a week at most.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    within: Duration,
    /// From when on the new key does not count any more, as 2027-11-30T00:00:00Z; left out, it counts until it is revoked.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    expires: Option<Timestamp>,
    /// Revoke the old keys as soon as the new links are good, which cuts what still runs on the old ones.
    #[arg(long)]
    cut: bool,
    /// The key signs tokens.
    #[arg(long, requires = "registry", conflicts_with_all = ["config", "admin", "within", "cut"])]
    token_key: bool,
    /// How long tokens by the old key still count: as 90s, 10m, 2h or 7d. As long as left out, none is cut short.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = overlap, requires = "token_key")]
    overlap: Duration,
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "a time such as 90s, 10m or 2h is wanted, a week at most".to_owned();
    let time = time(text).filter(|_| !text.ends_with('d'));
    time.filter(|time| *time <= Duration::from_secs(7 * 24 * 3600)).ok_or_else(wrong)
}

fn overlap(text: &str) -> Result<Duration, String> {
    let wrong =
        || "a time such as 90s, 10m, 2h or 7d is wanted, 30 days at most: no token is good for longer".to_owned();
    time(text).filter(|time| *time <= limits::TOKEN_LIFE_MAX).ok_or_else(wrong)
}

/// A whole number of seconds, minutes, hours or days, and no time that is none.
fn time(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return None,
    };
    let seconds = number.parse::<u64>().ok()?.checked_mul(unit)?;
    (seconds > 0).then_some(Duration::from_secs(seconds))
}

impl Rotate {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        match (&self.config, &self.registry, &self.agent, &self.file) {
            (Some(config), ..) if self.switch => switch(config),
            (Some(config), ..) => prepare(config),
            (None, Some(registry), Some(name), Some(file)) if self.token_key => self.for_tokens(registry, name, file),
            (None, Some(registry), Some(agent), Some(file)) => {
                running::block_on(async |stop| self.at_gateway(registry, agent, file, &stop).await)
            }
            _ => Err(anyhow!("give --config at the agent, or --registry, ORG/AGENT and FILE at the gateway"))
                .exit_with(Exit::Usage),
        }
    }

    fn for_tokens(&self, registry: &Path, name: &AgentName, file: &Path) -> anyhow::Result<ExitCode> {
        const WHAT: &str = "could not rotate the key";
        let key = PublicKey::read(file).context(WHAT).exit_with(Exit::Usage)?;
        let now = Timestamp::now();
        let until = now.checked_add(self.overlap).context(WHAT)?;
        // What stands in a file is to the second.
        let until = Timestamp::from_second(until.as_second()).context(WHAT)?;
        let mut editor = Editor::open(registry).context(WHAT).exit_with(Exit::Usage)?;
        super::add::warn_of_others(registry);
        let fingerprint = key.fingerprint();
        let addition = Addition {
            organisation: name.organisation.clone(),
            role: Role::TokenKey,
            key,
            not_before: None,
            expires: self.expires,
            comment: None,
            new: None,
            signs: None,
        };
        let done = editor.succeed(&addition, name.agent.as_str(), until, now).context(WHAT)?;
        match done.file {
            Some(file) => say(&format!("added key {fingerprint} as {}", file.display())),
            None => say(&format!("key {fingerprint} is registered already")),
        }
        let old = done.replaced.iter();
        let old = old.map(|(key, ends)| format!("replaced     {key}\n  counts until {ends}\n"));
        print(&format!("signs now    {fingerprint}\n{}", old.collect::<String>()))?;
        Ok(Exit::Done.into())
    }

    async fn at_gateway(
        &self,
        registry: &Path,
        agent: &AgentName,
        file: &Path,
        stop: &CancellationToken,
    ) -> anyhow::Result<ExitCode> {
        const WHAT: &str = "could not rotate the key";
        let new = PublicKey::read(file).context(WHAT).exit_with(Exit::Usage)?;
        let fingerprint = new.fingerprint();
        let now = Timestamp::now();
        let before = self.ask().await?;
        let mut editor = Editor::open(registry).context(WHAT).exit_with(Exit::Usage)?;
        super::add::warn_of_others(registry);
        let held = editor.snapshot().organisations().get(&agent.organisation);
        let keys = held.and_then(|held| held.agents.get(&agent.agent)).map(|agent| agent.keys.clone());
        let keys = keys.ok_or_else(|| anyhow!("there is no agent {agent} in the registry")).context(WHAT)?;
        let old: Vec<Fingerprint> =
            keys.iter().filter(|key| !key.revoked && key.key != new).map(|key| key.key.fingerprint()).collect();
        match keys.iter().find(|key| key.key == new) {
            Some(key) if !key.counts(now) => {
                return Err(anyhow!("the new key {fingerprint} is revoked, has expired, or does not count yet"))
                    .context(WHAT);
            }
            Some(_) => say(&format!("key {fingerprint} is registered already")),
            None => {
                let addition = Addition {
                    organisation: agent.organisation.clone(),
                    role: Role::Agent(agent.agent.clone()),
                    key: new.clone(),
                    not_before: None,
                    expires: self.expires,
                    comment: None,
                    new: None,
                    signs: None,
                };
                let file = editor.add(&addition, now).context(WHAT)?;
                say(&format!("added key {fingerprint} as {}", file.display()));
            }
        }
        // Others may change the registry while this waits.
        drop(editor);

        let mut wait = Wait::new(agent, fingerprint, &before);
        if let Err(why) = self.wait(&mut wait, before, stop).await {
            return Err(anyhow!(
                "{why}. Both keys stay registered: have the agent switch (`caponier keys rotate --config … --switch`) and \
                 run this again, or take the new key back with `caponier keys revoke … {fingerprint}`"
            ))
            .context(WHAT);
        }
        let mut editor = Editor::open(registry).context(WHAT)?;
        for old in &old {
            editor.revoke(&KeyName::Ssh(*old), Some(&agent.organisation), Timestamp::now()).context(WHAT)?;
            say(&format!("revoked key {old}"));
        }
        print(&format!("{agent} has the key {fingerprint} alone now\n"))?;
        Ok(Exit::Done.into())
    }

    /// Waits until the agent needs its old keys no more.
    ///
    /// # Errors
    /// Says why it still does when the time is up.
    async fn wait(&self, wait: &mut Wait, mut rows: Vec<AgentRow>, stop: &CancellationToken) -> Result<(), String> {
        let deadline = Instant::now() + self.within;
        let mut last = String::new();
        loop {
            let Err(why) = wait.is_over(&rows, self.cut) else { return Ok(()) };
            if why != last {
                say(&format!("waiting: {why}"));
                last.clone_from(&why);
            }
            if Instant::now() >= deadline {
                return Err(format!("not within {} s: {why}", self.within.as_secs()));
            }
            tokio::select! {
                () = tokio::time::sleep_until(deadline.min(Instant::now() + limits::ROTATION_POLL)) => {}
                () = stop.cancelled() => return Err(format!("interrupted: {why}")),
            }
            // A gateway that is started again meanwhile is asked again.
            if let Ok(newer) = self.ask().await {
                rows = newer;
            }
        }
    }

    async fn ask(&self) -> anyhow::Result<Vec<AgentRow>> {
        let mut rows = Vec::new();
        for socket in &self.admin {
            rows.extend(gateway::agents(socket).await?);
        }
        Ok(rows)
    }
}

/// Which replicas of an agent are to come with the new key.
struct Wait {
    agent: AgentName,
    key: String,
    replicas: BTreeSet<String>,
}

impl Wait {
    fn new(agent: &AgentName, key: Fingerprint, rows: &[AgentRow]) -> Self {
        let mut this = Self { agent: agent.clone(), key: key.to_string(), replicas: BTreeSet::new() };
        this.replicas = this.active(rows).filter_map(|row| row.replica.clone()).collect();
        this
    }

    fn linked<'a>(&'a self, rows: &'a [AgentRow]) -> impl Iterator<Item = &'a AgentRow> {
        let ours = |row: &&AgentRow| {
            row.organisation == self.agent.organisation.as_str() && row.agent == self.agent.agent.as_str()
        };
        rows.iter().filter(ours).filter(|row| row.state != "absent" && row.state != "never linked")
    }

    fn active<'a>(&'a self, rows: &'a [AgentRow]) -> impl Iterator<Item = &'a AgentRow> {
        self.linked(rows).filter(|row| row.state == "active")
    }

    /// Whether the old keys can go.
    fn is_over(&mut self, rows: &[AgentRow], cut: bool) -> Result<(), String> {
        // Whoever has come meanwhile with an old key is to have a new one, too.
        let more: Vec<_> = self.active(rows).filter_map(|row| row.replica.clone()).collect();
        self.replicas.extend(more);
        if self.replicas.is_empty() {
            return Err(format!("{} has no link", self.agent));
        }
        let with_new: BTreeSet<_> = self
            .active(rows)
            .filter(|row| row.key.as_ref() == Some(&self.key))
            .filter_map(|row| row.replica.clone())
            .collect();
        let missing: Vec<_> = self.replicas.difference(&with_new).map(String::as_str).collect();
        if !missing.is_empty() {
            return Err(format!("no link with the new key yet from {}", missing.join(", ")));
        }
        let old = self.linked(rows).filter(|row| row.key.as_ref() != Some(&self.key));
        match old.map(|row| row.live).sum() {
            0_usize => Ok(()),
            _ if cut => Ok(()),
            live => Err(format!("{live} forward(s) still run on links with an old key (--cut does not wait for them)")),
        }
    }
}

fn say(text: &str) {
    let _ = writeln!(io::stderr(), "caponier: {text}");
}

/// Where an agent's host key is.
fn host_key(config: &Path) -> anyhow::Result<PathBuf> {
    let (loaded, files) = config::load_noting_files(config);
    if !matches!(loaded.exit_with(Exit::Usage)?, config::Loaded::Agent(..)) {
        return Err(anyhow!("{} is not an agent's configuration: it has no [agent]", config.display()))
            .exit_with(Exit::Usage);
    }
    let path = files.into_iter().find(|(key, _)| key == "agent.host_key").map(|(_, path)| path);
    path.ok_or_else(|| anyhow!("{} names no host key", config.display()))
}

fn prepare(config: &Path) -> anyhow::Result<ExitCode> {
    const WHAT: &str = "could not make the new key";
    let path = host_key(config)?;
    let (key, files) = PrivateKey::write_successor(&path).context(WHAT)?;
    print(&format!(
        "private key  {}\npublic key   {}\n{}\n{}\n\nGive this public key to the operators of this agent's gateways, who register \
         it (`caponier keys rotate`, or\n`caponier keys add`). Then, here:\n  caponier keys rotate --config {} --switch\n",
        files.private.display(),
        files.public.display(),
        super::describe(&key.public()),
        key.public().to_openssh(),
        config.display()
    ))?;
    Ok(Exit::Done.into())
}

fn switch(config: &Path) -> anyhow::Result<ExitCode> {
    const WHAT: &str =
        "could not put the new key, which the same command without --switch makes, in the place of the old one";
    let path = host_key(config)?;
    let (new, old) = PrivateKey::switch_to_successor(&path).context(WHAT)?;
    print(&format!(
        "private key  {}\nold key      {}\n{}\nAn agent that runs takes it up within seconds; `caponier agents` at the gateway \
         shows its key. Remove the old key\nwhen the gateways have revoked it.\n",
        path.display(),
        old.display(),
        super::describe(&new.public())
    ))?;
    Ok(Exit::Done.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Algorithm;

    fn row(replica: &str, state: &str, key: &Fingerprint, live: usize) -> AgentRow {
        serde_json::from_value(serde_json::json!({
            "organisation": "acme", "agent": "prod-eu", "replica": replica, "state": state, "address": null,
            "version": null, "since": null, "key": key.to_string(), "live": live, "opened": 0, "credit": 0, "held": 0,
            "unsent": 0, "last_error": null,
        }))
        .expect("a row")
    }

    #[test]
    fn the_old_keys_go_when_every_replica_has_come_with_the_new_one() {
        let [old, new] = std::array::from_fn(|_| PrivateKey::generate(Algorithm::Ed25519).public().fingerprint());
        let agent: AgentName = "acme/prod-eu".parse().expect("a name");
        let two = [row("a", "active", &old, 1), row("b", "active", &old, 0)];
        let over = |before: &[AgentRow], rows: &[AgentRow], cut| Wait::new(&agent, new, before).is_over(rows, cut);
        for (case, before, rows, words) in [
            ("none at all", vec![], vec![], "has no link"),
            ("nobody yet", two.to_vec(), two.to_vec(), "from a, b"),
            ("one of two", two.to_vec(), vec![row("a", "active", &new, 0), row("b", "active", &old, 0)], "from b"),
            ("one went away", two.to_vec(), vec![row("a", "active", &new, 0)], "from b"),
            ("one is absent", two.to_vec(), vec![row("a", "active", &new, 0), row("b", "absent", &new, 0)], "from b"),
            (
                "one more with an old key",
                vec![row("a", "active", &old, 0)],
                vec![row("a", "active", &new, 0), row("c", "active", &old, 0)],
                "from c",
            ),
            ("a link that gets no more", two[..1].to_vec(), vec![row("a", "superseded", &new, 0)], "from a"),
            (
                "a stream on an old link",
                two[..1].to_vec(),
                vec![row("a", "retired", &old, 1), row("a", "active", &new, 3)],
                "1 forward(s) still run",
            ),
        ] {
            let why = over(&before, &rows, false).expect_err(case);
            assert!(why.contains(words), "{case}: {why}");
        }
        let streaming = [row("a", "retired", &old, 1), row("a", "active", &new, 3)];
        assert_eq!(over(&two[..1], &streaming, true), Ok(()));
        assert_eq!(over(&two[..1], &[row("a", "retired", &old, 0), row("a", "active", &new, 3)], false), Ok(()));
        assert_eq!(over(&[], &[row("a", "active", &new, 0)], false), Ok(()));
        // Another agent's links say nothing.
        let other = AgentRow { agent: "prod-us".into(), ..row("a", "active", &new, 0) };
        assert!(over(&two[..1], &[other], false).is_err());
    }

    #[test]
    fn times_are_written_with_their_unit() {
        for (text, seconds) in [("90s", 90), ("10m", 600), ("2h", 7200), ("168h", 604_800)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in
            ["", "10", "m", "0s", "-1m", "1.5h", "10 m", "1d", "169h", "99999999999999999999h", "9999999999999999h"]
        {
            assert!(duration(text).is_err(), "{text}");
        }
        assert_eq!(overlap("30d"), Ok(limits::TOKEN_LIFE_MAX));
        assert_eq!(overlap("90s"), Ok(Duration::from_secs(90)));
        for text in ["", "30", "0d", "31d", "1w", "721h", "d"] {
            assert!(overlap(text).is_err(), "{text}");
        }
    }
}

//! `caponier policy`: what would be allowed, and what somebody may reach. Nothing is opened.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::Subcommand;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::agents::table;
use super::{Exit, ExitWith, moment, print, running};
use crate::config::{self, Loaded};
use crate::identity::{AgentId, AgentName, OrganisationId, Principal};
use crate::limits;
use crate::policy::guard::Guard;
use crate::policy::rule::Lookup;
use crate::policy::trial::{Line, Place};
use crate::policy::window::Closed;
use crate::policy::{Denial, Reason};
use crate::registry::{self, Snapshot};
use crate::resolve::Resolver;
use crate::target::{Host, Target, normal};
use crate::task::Tasks;
use crate::{agent, gateway};

/// Ask a configuration what it would allow, without opening anything.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier policy test agent.toml --principal provisioner orders.db.internal:5432
  caponier policy explain agent.toml --principal provisioner")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Test(Test),
    Explain(Explain),
}

/// Tell whether a principal could reach a target: allow or deny, with the rule, the addresses and why.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier policy test agent.toml --principal provisioner orders.db.internal:5432
  caponier policy test agent.toml --principal ci-7 --at 2027-01-31T12:00:00Z --address 10.20.0.5 \\
      orders.db.internal:5432
  caponier policy test gateway.toml --principal provisioner --agent acme/prod-eu orders.db.internal:5432

An agent's configuration answers by its rules, a gateway's by its registry. Names are looked up as the agent would, unless \
--address says what they mean; nothing is connected to. Only a name that some rule could allow is looked up.

Exit code 0 if it would be allowed, 3 if not, 1 if the name could not be looked up, 2 if the file has faults.")]
struct Test {
    #[command(flatten)]
    of: Of,
    /// What is asked for, IPv6 addresses in brackets.
    #[arg(value_name = "HOST:PORT")]
    target: Target,
    /// An address that the name has, in the place of a lookup; IP:PORT for an instance of a service. May be given several
    /// times.
    #[arg(long = "address", value_name = "IP")]
    addresses: Vec<Address>,
    /// For a gateway's configuration: the client's address; 127.0.0.1, unless given.
    #[arg(long, value_name = "IP")]
    from: Option<IpAddr>,
}

/// Show all that a principal may reach, as a table: deny rules first, then what is allowed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier policy explain agent.toml --principal provisioner
  caponier policy explain gateway.toml --principal provisioner --organisation acme --json

A rule whose time has not come or is over is shown with that time. A line alone never says that something is reachable: what \
a deny rule has is not, whatever other rules say.")]
struct Explain {
    #[command(flatten)]
    of: Of,
}

/// Whose policy it is about.
#[derive(Debug, clap::Args)]
struct Of {
    /// The configuration of an agent or a gateway.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The principal: a name, or the fingerprint of a key that is its own principal at the agent.
    #[arg(long, value_name = "P")]
    principal: Principal,
    /// The organisation; may be left out where there is only one.
    #[arg(long, value_name = "ORG", conflicts_with = "agent")]
    organisation: Option<OrganisationId>,
    /// The agent, which says the organisation too; needed to test a gateway's configuration.
    #[arg(long, value_name = "ORG/AGENT")]
    agent: Option<AgentName>,
    /// The moment that it is asked for, as 2027-01-31T12:00:00Z; now, unless given.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    at: Option<Timestamp>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// An address, perhaps with a port of its own.
#[derive(Debug, Clone, Copy)]
struct Address(IpAddr, Option<u16>);

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (text.parse::<IpAddr>(), text.parse::<SocketAddr>()) {
            (Ok(address), _) => Ok(Self(address, None)),
            (_, Ok(address)) if address.port() > 0 => Ok(Self(address.ip(), Some(address.port()))),
            _ => Err("an address is wanted, such as 10.20.0.5, or 10.20.0.5:5432 and [2001:db8::5]:5432"),
        }
    }
}

/// Runs `caponier policy`.
///
/// # Errors
/// If the configuration has faults, the question does not fit it, or a name cannot be looked up.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Test(test) => test.run(),
        Command::Explain(explain) => explain.run(),
    }
}

/// What would become of a request.
struct Answer {
    outcome: Result<Option<String>, Denial>,
    places: Vec<Place>,
}

impl Test {
    fn run(self) -> anyhow::Result<ExitCode> {
        let answer = match config::load(&self.of.file).exit_with(Exit::Usage)? {
            Loaded::Agent(config, _) => self.at_agent(&config)?,
            Loaded::Gateway(config, _) => {
                let registry = registry::file::load(&config.registry).exit_with(Exit::Usage)?;
                self.at_gateway(&config, &registry)?
            }
            Loaded::Proxy(..) | Loaded::Resources(_) => return not_a_policy(),
        };
        let text = if self.of.json { format!("{:#}\n", self.json(&answer)) } else { self.text(&answer)? };
        print(&text)?;
        Ok(if answer.outcome.is_ok() { Exit::Done } else { Exit::Refused }.into())
    }

    fn at_agent(&self, config: &agent::Config) -> anyhow::Result<Answer> {
        let organisation = self.of.of_agent(config)?;
        let (principal, target, now) = (&self.of.principal, &self.target, self.of.now());
        // Whoever gives these means something by them: an answer that passes over them would be to another question.
        if self.from.is_some() {
            return usage("--from is for a gateway's configuration: an agent's rules do not ask where a client is");
        }
        let service = match &target.host {
            Host::Address(_) if !self.addresses.is_empty() => {
                return usage("--address says what a name means, and the target is an address already");
            }
            Host::Address(_) => false,
            Host::Name(name) => name.is_service(),
        };
        if !service && self.addresses.iter().any(|Address(_, port)| port.is_some()) {
            return usage("only an instance of a service has a port of its own: give --address without");
        }
        if let Err(denial) = organisation.speaks_for(principal, now) {
            return Ok(Answer { outcome: Err(denial), places: Vec::new() });
        }
        let guard = Guard::new(config.ways_out(), []);
        let lookup = match organisation.allow.consider(principal, target, &guard, now) {
            Ok(lookup) => lookup,
            Err(_) => {
                let trial = organisation.allow.try_out(principal, target, &[], &guard, now);
                return Ok(Answer { outcome: trial.outcome.map(Some), places: trial.addresses });
            }
        };
        let given = self.addresses.iter().map(|Address(ip, port)| SocketAddr::new(*ip, port.unwrap_or(target.port)));
        let (resolved, ways_out) = if self.addresses.is_empty() {
            running::block_on(async |_| look_up(config, lookup, target).await)?
        } else {
            (given.collect(), Vec::new())
        };
        let guard = Guard::new(config.ways_out(), ways_out);
        let trial = organisation.allow.try_out(principal, target, &resolved, &guard, now);
        Ok(Answer { outcome: trial.outcome.map(Some), places: trial.addresses })
    }

    fn at_gateway(&self, config: &gateway::Config, registry: &Snapshot) -> anyhow::Result<Answer> {
        let Some(agent) = &self.of.agent else {
            return usage("a gateway's configuration is tested for one agent: add --agent ORG/AGENT");
        };
        if !config.organisations.iter().any(|organisation| organisation.id == agent.organisation) {
            return usage(&format!("no [[organisation]] here has the id {}", agent.organisation));
        }
        let Principal::Named(principal) = &self.of.principal else {
            return usage("a registry knows principals by name: a fingerprint is one at an agent alone");
        };
        if !self.addresses.is_empty() {
            return usage("--address is for an agent's configuration: a registry compares names and looks none up");
        }
        let from = self.from.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let decision = registry.decide(principal, agent, &self.target, from, self.of.now());
        let outcome = decision.into_result().map(|_| None);
        Ok(Answer { outcome, places: Vec::new() })
    }

    fn text(&self, answer: &Answer) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        let request = format!("{} for {}", self.target, self.of.principal);
        match &answer.outcome {
            Ok(Some(rule)) => writeln!(text, "allow {request}: rule {rule}")?,
            Ok(None) => writeln!(text, "allow {request}: granted; the agent's own rules decide next")?,
            Err(denial) => writeln!(text, "deny {request}: {}: {}", denial.reason, denial.detail)?,
        }
        for Place { address, refusal } in &answer.places {
            match refusal {
                None => writeln!(text, "  {address}: permitted")?,
                Some(denial) => writeln!(text, "  {address}: refused: {}: {}", denial.reason, denial.detail)?,
            }
        }
        Ok(text)
    }

    fn json(&self, answer: &Answer) -> Value {
        let denial = answer.outcome.as_ref().err();
        let rule = match &answer.outcome {
            Ok(rule) => rule.as_ref(),
            Err(denial) => denial.rule.as_ref(),
        };
        let place = |Place { address, refusal }: &Place| {
            json!({
                "address": address.to_string(),
                "allowed": refusal.is_none(),
                "rule": refusal.as_ref().and_then(|denial| denial.rule.as_ref()),
                "reason": refusal.as_ref().map(|denial| denial.reason.as_str()),
                "detail": refusal.as_ref().map(|denial| &denial.detail),
            })
        };
        json!({
            "allowed": denial.is_none(),
            "principal": self.of.principal.to_string(),
            "target": self.target.to_string(),
            "at": self.of.now().to_string(),
            "rule": rule,
            "reason": denial.map(|denial| denial.reason.as_str()),
            "detail": denial.map(|denial| &denial.detail),
            "addresses": answer.places.iter().map(place).collect::<Vec<_>>(),
        })
    }
}

/// What the target's name means, and where the agent's own gateways and proxy are, as far as that can be found out.
async fn look_up(
    config: &agent::Config,
    lookup: Lookup,
    target: &Target,
) -> anyhow::Result<(Vec<SocketAddr>, Vec<SocketAddr>)> {
    let tasks = Tasks::new();
    let resolver = Resolver::new(&config.resolver, &tasks);
    let with_port = |found: Vec<IpAddr>, port| found.into_iter().map(|ip| SocketAddr::new(normal(ip), port)).collect();
    let resolved: Result<Vec<SocketAddr>, _> = match (lookup, &target.host) {
        (Lookup::Address(address), _) => Ok(vec![address]),
        (_, Host::Address(address)) => Ok(vec![SocketAddr::new(*address, target.port)]),
        (Lookup::Addresses, Host::Name(name)) => {
            resolver.addresses(name).await.map(|found| with_port(found, target.port))
        }
        (Lookup::Service, Host::Name(name)) => resolver.service(name).await,
    };
    // The agent looks these up where the system would, and so do we.
    let system = Resolver::system(&config.resolver);
    let mut ways_out = Vec::new();
    for way in config.ways_out() {
        if let Host::Name(name) = &way.host {
            let found: Vec<SocketAddr> = with_port(system.addresses(name).await.unwrap_or_default(), way.port);
            ways_out.extend(found);
        }
    }
    tasks.drain(limits::STOP_GRACE).await;
    Ok((resolved?, ways_out))
}

impl Explain {
    fn run(self) -> anyhow::Result<ExitCode> {
        let text = match config::load(&self.of.file).exit_with(Exit::Usage)? {
            Loaded::Agent(config, _) => {
                let organisation = self.of.of_agent(&config)?;
                let asserted = organisation.speaks_for(&self.of.principal, self.of.now()).err();
                let lines = organisation.allow.lines(&self.of.principal, self.of.now());
                if self.of.json { json_of_rules(&lines, asserted) } else { table_of_rules(&lines, asserted)? }
            }
            Loaded::Gateway(config, _) => {
                let registry = registry::file::load(&config.registry).exit_with(Exit::Usage)?;
                self.of_gateway(&config, &registry)?
            }
            Loaded::Proxy(..) | Loaded::Resources(_) => return not_a_policy(),
        };
        print(&text)?;
        Ok(Exit::Done.into())
    }

    fn of_gateway(&self, config: &gateway::Config, registry: &Snapshot) -> anyhow::Result<String> {
        let served = config.organisations.iter().map(|organisation| &organisation.id);
        let id = self.of.organisation(served)?;
        let Principal::Named(principal) = &self.of.principal else {
            return usage("a registry knows principals by name: a fingerprint is one at an agent alone");
        };
        let organisation = registry.organisations().get(id);
        let Some((organisation, record)) = organisation.and_then(|one| Some((one, one.principals.get(principal)?)))
        else {
            return usage(&format!("no principal {principal} is registered for {id}"));
        };
        let asked = |agent: &&AgentId| {
            self.of.agent.as_ref().is_none_or(|name| name.agent == **agent) && record.grant.covers(agent)
        };
        let agents: Vec<_> = organisation.agents.keys().filter(asked).collect();
        let targets: Option<Vec<String>> =
            record.grant.targets.as_ref().map(|all| all.iter().map(ToString::to_string).collect());
        let from: Vec<String> =
            [&organisation.accept_from, &record.accept_from].into_iter().flatten().map(ToString::to_string).collect();
        let window = record.window();
        if self.of.json {
            let lines: Vec<_> = agents
                .iter()
                .map(|agent| {
                    json!({
                        "agent": format!("{id}/{agent}"),
                        "targets": targets,
                        "accept_from": from,
                        "not_before": window.not_before.map(|at| at.to_string()),
                        "expires": window.expires.map(|at| at.to_string()),
                        "holds": window.at(self.of.now()).is_ok(),
                    })
                })
                .collect();
            return Ok(format!("{:#}\n", Value::Array(lines)));
        }
        let targets = targets.map_or_else(|| "whatever the agent allows".to_owned(), |all| or_none(&all));
        let from = if from.is_empty() { "anywhere".to_owned() } else { from.join(" and ") };
        let when = when(window.to_string(), window.at(self.of.now()).err());
        let row = |agent: &&AgentId| [format!("{id}/{agent}"), targets.clone(), from.clone(), when.clone()];
        Ok(table(&["AGENT", "TARGETS", "FROM", "WHEN"], agents.iter().map(row))?)
    }
}

fn table_of_rules(lines: &[Line], asserted: Option<Denial>) -> Result<String, std::fmt::Error> {
    let row = |line: &Line| {
        let verb = if line.denies { "deny" } else { "allow" };
        [
            format!("{verb} {}", line.rule),
            line.what.join(", "),
            if line.within.is_empty() { "-".to_owned() } else { line.within.join(", ") },
            line.ports.join(", "),
            when(line.window.to_string(), line.closed),
        ]
    };
    let mut text = table(&["RULE", "WHAT", "WITHIN", "PORTS", "WHEN"], lines.iter().map(row))?;
    if let Some(denial) = asserted {
        writeln!(text, "None of it is reachable: {}: {}", denial.reason, denial.detail)?;
    }
    Ok(text)
}

fn json_of_rules(lines: &[Line], asserted: Option<Denial>) -> String {
    let line = |line: &Line| {
        json!({
            "denies": line.denies,
            "rule": line.rule,
            "what": line.what,
            "within": line.within,
            "ports": line.ports,
            "not_before": line.window.not_before.map(|at| at.to_string()),
            "expires": line.window.expires.map(|at| at.to_string()),
            "holds": line.closed.is_none() && asserted.is_none(),
        })
    };
    format!("{:#}\n", Value::Array(lines.iter().map(line).collect()))
}

fn when(window: String, closed: Option<Closed>) -> String {
    match closed.map(Closed::reason) {
        None => window,
        Some(Reason::NotYetValid) => format!("{window} (not yet)"),
        Some(_) => format!("{window} (over)"),
    }
}

fn or_none(all: &[String]) -> String {
    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
}

impl Of {
    fn now(&self) -> Timestamp {
        self.at.unwrap_or_else(Timestamp::now)
    }

    fn of_agent<'a>(&self, config: &'a agent::Config) -> anyhow::Result<&'a agent::Organisation> {
        if let Some(name) = self.agent.as_ref().filter(|name| name.agent != config.id) {
            return usage(&format!("this is the configuration of agent {}, not of {}", config.id, name.agent));
        }
        let id = self.organisation(config.organisations.iter().map(|organisation| &organisation.id))?;
        let found = config.organisations.iter().find(|organisation| organisation.id == *id);
        found.map_or_else(|| usage(&format!("no [[organisation]] here has the id {id}")), Ok)
    }

    /// The organisation that was named, or the only one.
    fn organisation<'a>(
        &self,
        mut known: impl Iterator<Item = &'a OrganisationId>,
    ) -> anyhow::Result<&'a OrganisationId> {
        let named = self.organisation.as_ref().or(self.agent.as_ref().map(|name| &name.organisation));
        match named {
            Some(named) => known
                .find(|id| *id == named)
                .map_or_else(|| usage(&format!("no [[organisation]] here has the id {named}")), Ok),
            None => match (known.next(), known.next()) {
                (Some(only), None) => Ok(only),
                _ => usage("there are several organisations here: add --organisation ORG"),
            },
        }
    }
}

fn usage<T>(problem: &str) -> anyhow::Result<T> {
    Err(anyhow::anyhow!("{problem}")).exit_with(Exit::Usage)
}

fn not_a_policy<T>() -> anyhow::Result<T> {
    usage("this file is about resources to provision, and holds no policy")
}

//! The targets that an allowlist spells out: whether each resolves, is permitted, and answers.
//!
//! Promised: each dial is under a permit, and under an entry that is in the trail before; what rules leave open (wildcards,
//! networks, ranges of ports) is not guessed at.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use jiff::Timestamp;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::super::reach::reach;
use super::answer::{self, Answer, Probe};
use super::{DOOR, Fault};
use crate::audit::{self, Ending, Entry, Resolved, Trail};
use crate::chain::Chain;
use crate::diagnosis::{Finding, Verdict};
use crate::identity::{AgentId, OrganisationId, Principal, ReplicaId};
use crate::limits;
use crate::policy::guard::Guard;
use crate::policy::rule::{Allowlist, Lookup, PrincipalPattern, Reach, Rule};
use crate::policy::{Decision, Denial, Reason};
use crate::resolve::Resolver;
use crate::target::{Host, Target};
use crate::tunnel::wire::ForwardId;

/// An organisation's targets, and what is needed to look at them.
pub(in crate::agent) struct Site<'a> {
    pub(in crate::agent) organisation: &'a OrganisationId,
    pub(in crate::agent) agent: &'a AgentId,
    pub(in crate::agent) replica: &'a ReplicaId,
    pub(in crate::agent) allow: &'a Allowlist,
    pub(in crate::agent) resolver: &'a Resolver,
    pub(in crate::agent) guard: &'a Guard,
    pub(in crate::agent) trail: &'a Trail,
    /// How long one target may take.
    pub(in crate::agent) patience: Duration,
}

/// What became of one target.
pub(in crate::agent) struct Outcome {
    /// The rule that it stands in, by name; a dash where none was named.
    rule: String,
    subject: String,
    pub(in crate::agent) verdict: Verdict,
    /// One of a fixed set of words, which tells nothing of the network behind the agent.
    word: &'static str,
    evidence: String,
    next: String,
    elapsed: Duration,
}

impl Outcome {
    /// As much of it as the other end of a link may learn: by the rule's name, in one of a fixed set of words.
    pub(in crate::agent) fn hinted(&self) -> Finding {
        let elapsed_ms = u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX);
        Finding { elapsed_ms, ..Finding::new("target", &self.rule, self.verdict, self.word) }
    }

    /// All of it, for the agent's owner.
    pub(in crate::agent) fn told(&self) -> Finding {
        let elapsed_ms = u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX);
        let finding = Finding::new("target", &self.subject, self.verdict, &self.evidence).advising(&self.next);
        Finding { elapsed_ms, ..finding }
    }
}

/// Looks at each target that the rules spell out, and at those that were `asked` for. `tell` hears of each.
pub(in crate::agent) async fn examine(site: &Site<'_>, asked: &[Target], mut tell: impl FnMut(&Outcome)) {
    let mut left = limits::EXAMINED_TARGETS;
    for rule in site.allow.rules() {
        let Spelt { targets, open } = spelt(rule);
        for target in targets {
            if left == 0 {
                return tell(&Outcome::skipped(rule, "too_many", "more targets than one examination looks at"));
            }
            left -= 1;
            tell(&site.look(Some(rule), &target).await);
        }
        if let Some(open) = open {
            let evidence = format!("{open} cannot be gone through; to look at one of them: --target HOST:PORT");
            tell(&Outcome::skipped(rule, "not_enumerable", &evidence));
        }
    }
    for target in asked {
        tell(&site.look(None, target).await);
    }
}

/// What a rule spells out, and what it leaves open.
struct Spelt {
    targets: Vec<Target>,
    open: Option<String>,
}

fn spelt(rule: &Rule) -> Spelt {
    let (mut hosts, mut open) = (Vec::new(), Vec::new());
    match &rule.reach {
        Reach::Hosts { hosts: patterns, .. } => {
            for pattern in patterns {
                match pattern.name() {
                    Some(name) => hosts.push(Host::Name(name.clone())),
                    None => open.push(pattern.to_string()),
                }
            }
        }
        Reach::Services { services, .. } => hosts.extend(services.iter().cloned().map(Host::Name)),
        Reach::Addresses(networks) => {
            for network in networks {
                match network.prefix_len() == network.max_prefix_len() {
                    true => hosts.push(Host::Address(network.addr())),
                    false => open.push(network.to_string()),
                }
            }
        }
    }
    let mut targets = Vec::new();
    for ports in &rule.ports {
        // One port is written as one.
        match ports.to_string().parse::<u16>() {
            Ok(port) => targets.extend(hosts.iter().map(|host| Target { host: host.clone(), port })),
            Err(_) => open.push(format!("ports {ports}")),
        }
    }
    Spelt { targets, open: (!open.is_empty()).then(|| open.join(", ")) }
}

/// Somebody for whom the rule is, to see what it permits.
fn stand_in(rule: &Rule) -> Option<Principal> {
    let Some(patterns) = &rule.principals else { return "doctor".parse().ok().map(Principal::Named) };
    patterns.iter().find_map(|pattern| match pattern {
        PrincipalPattern::Key(key) => Some(Principal::Key(*key)),
        PrincipalPattern::Pattern(pattern) => pattern.as_str().replace('*', "x").parse().ok().map(Principal::Named),
    })
}

impl Outcome {
    fn skipped(rule: &Rule, word: &'static str, evidence: &str) -> Self {
        Self {
            rule: rule.name.clone(),
            subject: format!("rule {}", rule.name),
            verdict: Verdict::Skipped,
            word,
            evidence: evidence.to_owned(),
            next: String::new(),
            elapsed: Duration::ZERO,
        }
    }
}

/// What is wrong with a target: a word that says little, and words that say all.
struct Wrong(&'static str, Verdict, Fault);

impl Wrong {
    fn broken(word: &'static str, evidence: impl Into<String>, next: impl Into<String>) -> Self {
        Self(word, Verdict::Broken, Fault::new(evidence, next))
    }
}

impl Site<'_> {
    async fn look(&self, rule: Option<&Rule>, target: &Target) -> Outcome {
        let begun = Instant::now();
        let looking = timeout(self.patience, self.try_out(rule, target));
        let looked = looking.await.unwrap_or_else(|_| {
            let evidence = format!("it came to no end within {} s", self.patience.as_secs_f32());
            Err(Wrong::broken(
                "silent",
                evidence,
                format!("see whether {target} is overloaded, or a firewall holds it up"),
            ))
        });
        let (verdict, word, evidence, next) = match looked {
            Ok((verdict, word, evidence, next)) => (verdict, word, evidence, next),
            Err(Wrong(word, verdict, fault)) => (verdict, word, fault.evidence, fault.next),
        };
        let subject = match rule {
            Some(rule) => format!("{}: {target}", rule.name),
            None => target.to_string(),
        };
        Outcome {
            rule: rule.map_or_else(|| "-".to_owned(), |rule| rule.name.clone()),
            subject,
            verdict,
            word,
            evidence,
            next,
            elapsed: begun.elapsed(),
        }
    }

    async fn try_out(
        &self,
        rule: Option<&Rule>,
        target: &Target,
    ) -> Result<(Verdict, &'static str, String, String), Wrong> {
        // Of the principals of several rules, the one whom some rule lets through to it.
        let candidates: Vec<Principal> = match rule {
            Some(rule) => stand_in(rule).into_iter().collect(),
            None => self.allow.rules().iter().filter_map(stand_in).collect(),
        };
        let now = Timestamp::now();
        let able = |principal: &&Principal| self.allow.consider(principal, target, self.guard, now).is_ok();
        let principal = candidates.iter().find(able).or(candidates.first());
        let Some(principal) = principal else {
            return Err(Wrong::broken("denied", "no rule is for anybody", "look at principals in the allowlist"));
        };
        let mut probes = answer::probes(target).into_iter();
        let mut seen = String::new();
        loop {
            let Some(probe) = probes.next() else {
                return Ok((Verdict::Ok, "answers", format!("{seen}; TCP answers"), String::new()));
            };
            let (entry, stream, told) = self.dial(principal, target).await?;
            seen = told;
            let counters = entry.counters();
            let answered = answer::ask(probe, target, stream, &counters).await;
            entry.finish(counters.ended("examined"));
            match answered {
                Answer::Nothing if probe == Probe::Last => {
                    return Ok((Verdict::Ok, "answers", format!("{seen}; TCP answers"), String::new()));
                }
                // Something else may be spoken there.
                Answer::Nothing => {}
                Answer::Said(said) => return Ok((Verdict::Ok, "answers", format!("{seen}; {said}"), String::new())),
                Answer::Odd { word, said, next } => {
                    return Ok((Verdict::Warning, word, format!("{seen}; {said}"), next));
                }
                Answer::Bad { word, said, next } => {
                    return Err(Wrong::broken(word, format!("{seen}; {said}"), next));
                }
            }
        }
    }

    /// Resolves, decides, records and dials, in this order. Yields what to say of it.
    async fn dial(&self, principal: &Principal, target: &Target) -> Result<(Entry, TcpStream, String), Wrong> {
        let denied = |denial: Denial| {
            let evidence = format!("denied ({}): {}", denial.reason.as_str(), denial.detail);
            let next = denied_advice(denial.reason);
            Wrong::broken("denied", evidence, next)
        };
        let now = Timestamp::now();
        let lookup = self.allow.consider(principal, target, self.guard, now).map_err(denied)?;
        let found = match (lookup, &target.host) {
            (Lookup::Address(address), _) => Ok(vec![address]),
            (_, Host::Address(address)) => Ok(vec![SocketAddr::new(*address, target.port)]),
            (Lookup::Addresses, Host::Name(name)) => self
                .resolver
                .addresses(name)
                .await
                .map(|found| found.into_iter().map(|address| SocketAddr::new(address, target.port)).collect()),
            (Lookup::Service, Host::Name(name)) => self.resolver.service(name).await,
        };
        let resolved: Vec<SocketAddr> = found.map_err(|error| {
            let next = format!(
                "see that {} is written as its operators call it, and that the DNS servers of [agent.resolver] (or else this \
                 host's) know it",
                target.host
            );
            Wrong::broken("unresolved", Chain(&error).to_string(), next)
        })?;
        let decision = self.allow.decide(principal, target, &resolved, self.guard, Timestamp::now());
        let permit = match decision {
            Decision::Allow(permit) => permit,
            Decision::Deny(denial) => return Err(denied(denial)),
        };
        let on_record = |place: &SocketAddr| match lookup {
            Lookup::Address(_) | Lookup::Addresses => Resolved::Address(place.ip()),
            Lookup::Service => Resolved::Instance(*place),
        };
        let opening = audit::Opening {
            forward: ForwardId::random().to_string(),
            organisation: Some(self.organisation.clone()),
            agent: Some(self.agent.clone()),
            replica: Some(self.replica.clone()),
            door: Some(DOOR),
            target: target.to_string(),
            rule: Some(permit.rule().to_owned()),
            resolved: resolved.iter().map(on_record).collect(),
            refused: permit.refused().iter().map(on_record).collect(),
            ..audit::Opening::default()
        };
        let mut told = match &target.host {
            Host::Address(_) => format!("rule {} permits it", permit.rule()),
            Host::Name(name) => {
                format!("{name} has {}; rule {} permits {}", list(&resolved), permit.rule(), list(permit.addresses()))
            }
        };
        if !permit.refused().is_empty() {
            told = format!("{told} and not {}", list(permit.refused()));
        }
        let mut entry = self.trail.open(opening).await.map_err(|error| {
            let next = "see that the trail can be written: nothing is dialled that is not recorded";
            Wrong::broken("unrecorded", Chain(&error).to_string(), next)
        })?;
        let turns = matches!(lookup, Lookup::Addresses).then(|| self.resolver.family());
        let dialled = timeout(limits::OPEN_TIMEOUT, reach(permit, turns, |_| true)).await;
        match dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok((stream, address)) => {
                entry.established(Some(address));
                Ok((entry, stream, format!("{told}; connected to {address}")))
            }
            Err(error) => {
                entry.finish(Ending::Failed { reason: "connect_failed", detail: error.to_string() });
                let next = format!(
                    "see that {target} runs and listens there, and ask the network team whether this host may reach it"
                );
                Err(Wrong::broken("connect_failed", format!("{told}; could not connect: {error}"), next))
            }
        }
    }
}

fn denied_advice(reason: Reason) -> String {
    match reason {
        Reason::OutsideWithin => {
            "the name leads elsewhere than the rule's `within`: correct that, or find out who changed the name"
        }
        Reason::Expired | Reason::NotYetValid => "the rule does not hold now: renew its `expires` or take the rule out",
        Reason::NoRule => "no rule of the allowlist has it: add one, if it is to be reachable",
        _ => "caponier policy explain says which rule decides; change the allowlist if it should be otherwise",
    }
    .to_owned()
}

fn list(addresses: &[SocketAddr]) -> String {
    let texts: Vec<_> = addresses.iter().map(|address| address.ip().to_string()).collect();
    texts.join(", ")
}

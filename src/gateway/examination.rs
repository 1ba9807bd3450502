//! An agent that is asked, at the admin socket and over its link, to look at its targets.
//!
//! Promised: a report is passed on only if it tells of at least one thing that was looked at; one that is empty, cut short or
//! contradicts itself is none, and is called so. The trail has, before the agent is asked, that it is; and afterwards either
//! that it was examined, or why it was not. There are [`limits::EXAMINATIONS`] at once, so that the admin socket stays free
//! for others; whoever comes on top of that is refused at once. Each ends with its deadline, with the link, or with whoever
//! asked.

use std::future::Future;

use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::Gateway;
use super::roster::{Peer, Standing};
use crate::audit::{Event, Kind};
use crate::diagnosis::{Finding, Report, VERSION, Verdict};
use crate::identity::AgentName;
use crate::limits;

/// The examinations of a gateway that are under way.
#[derive(Debug)]
pub(super) struct Examinations(Semaphore);

impl Default for Examinations {
    fn default() -> Self {
        Self(Semaphore::new(limits::EXAMINATIONS))
    }
}

/// Why there is no report, where the agent was asked: a word for the trail, and words for people.
struct Failure(&'static str, String);

/// Has an agent look at its targets, on one of its links. Given up when `gone` is done.
///
/// # Errors
/// Why there is no report, in words.
pub(super) async fn examine(gateway: &Gateway, agent: &str, gone: impl Future<Output = ()>) -> Result<Report, String> {
    let Ok(name) = agent.parse::<AgentName>() else {
        return Err(format!("{agent:?} is no name of an agent, such as acme/prod-eu"));
    };
    let links: Vec<_> = gateway.roster.list().into_iter().filter(|link| link.peer.name == name).collect();
    if links.is_empty() {
        return Err(format!("{name} is not linked to this gateway; run there: caponier doctor --config agent.toml"));
    }
    let Ok(_seat) = gateway.examinations.0.try_acquire() else {
        return Err(format!(
            "{} examinations are under way at this gateway, and it has no more at once; ask again in a minute",
            limits::EXAMINATIONS
        ));
    };
    let mut active = links.iter().filter(|link| link.standing() == Standing::Active);
    let Some(link) = active.find(|link| link.examination().is_free()) else {
        let why = "its owner has not set agent.remote_doctor, or it is being examined already";
        return Err(format!("{name} does not let itself be examined over its link: {why}"));
    };
    let Peer { name, replica, key, .. } = &link.peer;
    let event = |kind| {
        let event = Event::new(kind).organisation(&name.organisation).agent(&name.agent);
        event.replica(replica).key(key)
    };
    let asking = event(Kind::ExaminationAsked).detail("over its link, asked for at the admin socket");
    if gateway.trail.note(asking).await.is_err() {
        return Err("it could not be recorded, and was given up".to_owned());
    }
    let answered = async {
        let Some(answer) = link.examination().ask() else {
            let why = format!("somebody else was faster: {name} is being examined already");
            return Err(Failure("busy", why));
        };
        let lost = link.client().control().gone();
        tokio::select! {
            answered = timeout(limits::EXAMINED_REMOTE, answer) => match answered {
                Ok(Ok(report)) => judge(report).map_err(|Failure(word, why)| Failure(word, format!("{name} {why}"))),
                // Nobody keeps the other half, or the time is over.
                Ok(Err(_)) => Err(Failure("link_lost", format!("the link of {name} was lost meanwhile"))),
                Err(_) => {
                    let seconds = limits::EXAMINED_REMOTE.as_secs();
                    Err(Failure("silent", format!("{name} has not answered within {seconds} s")))
                }
            },
            () = lost.cancelled() => Err(Failure("link_lost", format!("the link of {name} was lost meanwhile"))),
            () = gone => Err(Failure("given_up", "whoever asked has gone away".to_owned())),
        }
    };
    let answered = answered.await;
    let told = match &answered {
        Ok(report) => event(Kind::AgentExamined).detail(format!("over its link: {}", counted(report))),
        Err(Failure(word, why)) => event(Kind::ExaminationFailed).reason(word).detail(why),
    };
    if gateway.trail.note(told).await.is_err() {
        return Err("what came of it could not be recorded; see the gateway's own trail".to_owned());
    }
    answered.map_err(|Failure(_, why)| why)
}

/// How many of its findings there are of each verdict.
fn counted(report: &Report) -> String {
    let count = |verdict| report.stages.iter().filter(|finding| finding.verdict == verdict).count();
    format!(
        "{} in order, {} with a warning, {} broken, {} not looked at",
        count(Verdict::Ok),
        count(Verdict::Warning),
        count(Verdict::Broken),
        count(Verdict::Skipped)
    )
}

/// What an agent's report is worth. Every text of the one that is passed on is bounded, and does nothing to a terminal.
fn judge(report: Report) -> Result<Report, Failure> {
    let Report { version, of, stages, .. } = &report;
    if stages.is_empty() {
        return Err(Failure("empty", "has answered with an empty report: it has looked at nothing".to_owned()));
    }
    // The one who answers is not believed to have added up: a report that is none of ours would be read as one that is.
    let sound = *version == VERSION
        && of == "remote"
        && Report::new(of, stages.clone()) == report
        && stages.iter().all(|finding| !finding.stage.trim().is_empty() && !finding.evidence.trim().is_empty());
    if !sound {
        let why = "has answered with a report that makes no sense: its version, its verdict and its findings do not fit together";
        return Err(Failure("nonsense", why.to_owned()));
    }
    if stages.len() > limits::EXAMINED_REPORT {
        let why = format!("has answered with more than {} findings, which no agent does", limits::EXAMINED_REPORT);
        return Err(Failure("too_long", why));
    }
    let stages: Vec<_> = report.stages.into_iter().map(Finding::tidied).collect();
    if let Some(first) =
        stages.iter().find(|finding| finding.verdict != Verdict::Skipped).map_or(stages.first(), |_| None)
    {
        return Err(Failure("nothing_examined", format!("has looked at nothing: {}", first.evidence)));
    }
    Ok(Report::new("remote", stages))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(verdict: Verdict) -> Finding {
        Finding::new("target", "orders", verdict, "answers")
    }

    #[test]
    fn a_report_that_tells_of_nothing_is_none() {
        let well = || vec![finding(Verdict::Ok), finding(Verdict::Skipped)];
        assert!(judge(Report::new("remote", well())).is_ok());
        let blank = Finding { evidence: " ".to_owned(), ..finding(Verdict::Ok) };
        for (what, report, word) in [
            ("no finding", Report::new("remote", Vec::new()), "empty"),
            ("nothing but skipped", Report::new("remote", vec![finding(Verdict::Skipped); 3]), "nothing_examined"),
            ("another version", Report { version: VERSION + 1, ..Report::new("remote", well()) }, "nonsense"),
            ("of something else", Report::new("agent", well()), "nonsense"),
            ("a verdict of its own", Report { verdict: Verdict::Broken, ..Report::new("remote", well()) }, "nonsense"),
            ("a place beyond", Report { first_broken: Some(7), ..Report::new("remote", well()) }, "nonsense"),
            ("a finding without words", Report::new("remote", vec![blank]), "nonsense"),
            (
                "no end of them",
                Report::new("remote", vec![finding(Verdict::Ok); limits::EXAMINED_REPORT + 1]),
                "too_long",
            ),
        ] {
            let Err(Failure(found, why)) = judge(report) else { panic!("{what} is passed on") };
            assert_eq!(found, word, "{what}: {why}");
        }
    }

    #[test]
    fn a_report_that_is_passed_on_does_nothing_to_a_terminal() {
        let evil = Finding { evidence: "\u{1b}[2Janswers".to_owned(), ..finding(Verdict::Broken) };
        let passed = judge(Report::new("remote", vec![evil])).unwrap_or_else(|Failure(_, why)| panic!("{why}"));
        assert_eq!(passed.first_broken, Some(0));
        assert!(!passed.stages[0].evidence.contains('\u{1b}'), "{passed:?}");
    }
}

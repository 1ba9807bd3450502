//! An agent that is examined over its link, where its owner has chosen so ([`crate::agent::Config::remote_doctor`]).
//!
//! Promised: nobody at the other end hears more than what became of each rule, in one of a fixed set of words: no name, no
//! address, no error. One at a time and one a minute, however many links ask; each dial is under a permit and an entry of the
//! agent's own trail, which also says that it was examined. An agent that has not chosen so answers nothing.

use std::sync::{Arc, PoisonError};

use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tracing::{debug, info};

use super::super::serve::Session;
use super::target::{self, Site};
use crate::audit::{Event, Kind};
use crate::diagnosis::{DOCTOR, Finding, Report, Verdict};
use crate::limits;

/// Examines the agent's targets for its gateway, where its owner has chosen so, and not again and again. Nobody hears more than
/// what became of each rule.
pub(in crate::agent) fn examine(session: &Arc<Session>, reports: &mpsc::Sender<Report>) {
    let agent = &session.agent;
    if !agent.state.current().remote_doctor {
        return debug!("the gateway asks for an examination, which the configuration does not permit");
    }
    let now = Instant::now();
    {
        let mut examined = agent.examined.lock().unwrap_or_else(PoisonError::into_inner);
        if examined.is_some_and(|last| now.duration_since(last) < limits::EXAMINED_EVERY) {
            let why = "the agent was examined a moment ago; ask again in a minute";
            let finding = Finding::new(DOCTOR, "-", Verdict::Skipped, why);
            // If there is no room, another answer is on its way.
            drop(reports.try_send(Report::new("remote", vec![finding])));
            return;
        }
        *examined = Some(now);
    }
    info!(organisation = %session.organisation, "the gateway has the targets examined");
    let (session, reports) = (session.clone(), reports.clone());
    let stop = agent.tasks.stopping().clone();
    agent.tasks.clone().spawn(async move {
        let examined = tokio::select! {
            report = targets(&session) => report,
            () = session.switch.gone().cancelled() => return,
            () = stop.cancelled() => return,
        };
        drop(reports.send(examined).await);
    });
}

async fn targets(session: &Session) -> Report {
    let agent = &session.agent;
    let state = agent.state.current();
    let nothing = |verdict, stage: &str, why: &str| Report::new("remote", vec![Finding::new(stage, "-", verdict, why)]);
    let served = state.orchestrator(&session.organisation, &session.orchestrator, session.from(), Timestamp::now());
    let Ok((served, _)) = served else {
        return nothing(Verdict::Skipped, DOCTOR, "no target was looked at: the login counts no more");
    };
    let event = Event::new(Kind::AgentExamined)
        .organisation(&session.organisation)
        .agent(&agent.id)
        .replica(&session.replica)
        .credential(&session.orchestrator)
        .detail("over its link, as its configuration permits");
    if agent.trail.note(event).await.is_err() {
        return nothing(Verdict::Broken, "trail", "the agent could not record it");
    }
    let site = Site {
        organisation: &session.organisation,
        agent: &agent.id,
        replica: &session.replica,
        allow: &served.allow,
        resolver: &state.resolver,
        guard: &agent.guard(&state),
        trail: &agent.trail,
        patience: limits::EXAMINED_TARGET,
    };
    let (mut findings, mut left_out) = (Vec::new(), false);
    let examining = target::examine(&site, &[], |outcome| match findings.len() + 1 < limits::EXAMINED_REPORT {
        true => findings.push(outcome.hinted()),
        false => left_out = true,
    });
    // The gateway waits no longer: what was found until then is told, and that it is not all.
    let late = timeout(limits::EXAMINED_REMOTE / 2, examining).await.is_err();
    if late || left_out {
        findings.push(Finding::new(DOCTOR, "-", Verdict::Skipped, "not all targets were looked at"));
    }
    if findings.is_empty() {
        return nothing(Verdict::Skipped, DOCTOR, "no target was looked at: the allowlist has no rule");
    }
    Report::new("remote", findings)
}

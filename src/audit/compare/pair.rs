//! A forward as both sides have it, and where they differ.

use super::Category;
use super::stream::{Happening, Place, Step};
use crate::limits::COMPARE_FLIGHT;

/// A forward, by what each side has of it so far.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) gateway: Option<Half>,
    pub(super) agent: Option<Half>,
    /// How often the gateway tried elsewhere.
    pub(super) attempts: u8,
    /// When it was first heard of.
    pub(super) since: i64,
}

impl Pair {
    pub(super) fn since(since: i64) -> Self {
        Self { gateway: None, agent: None, attempts: 0, since }
    }

    /// When a side has closed it.
    pub(super) fn closed(&self) -> Option<i64> {
        [&self.gateway, &self.agent].into_iter().flatten().filter_map(|half| half.closed).max()
    }
}

/// What one side says.
#[derive(Debug)]
pub(super) struct Half {
    pub(super) place: Place,
    opened: i64,
    closed: Option<i64>,
    step: Step,
    organisation: Option<Box<str>>,
    agent: Option<Box<str>>,
    replica: Option<Box<str>>,
    principal: Option<Box<str>>,
    target: Option<Box<str>>,
    reason: Option<Box<str>>,
    bytes: Option<(u64, u64)>,
}

impl Half {
    /// Takes a record into account. What is opened again under the same id counts from then on.
    pub(super) fn take(half: &mut Option<Self>, happening: Happening) {
        let opened = match half {
            Some(half) if happening.step != Step::Open && !half.is_closed() => half.opened,
            _ => happening.time,
        };
        *half = Some(Self {
            place: happening.place,
            opened,
            closed: (happening.step != Step::Open).then_some(happening.time),
            step: happening.step,
            organisation: happening.organisation,
            agent: happening.agent,
            replica: happening.replica,
            principal: happening.principal,
            target: happening.target,
            reason: happening.reason,
            bytes: happening.bytes,
        });
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// Whose it is: the organisation, and the agent in it.
    pub(super) fn whose(&self) -> Option<(&str, &str)> {
        self.organisation.as_deref().zip(self.agent.as_deref())
    }

    /// When it was opened and closed.
    pub(super) fn times(&self) -> (i64, Option<i64>) {
        (self.opened, self.closed)
    }

    /// Whether an agent has a record of what the gateway says.
    pub(super) fn must_be_known(&self) -> bool {
        match self.step {
            Step::Ended => true,
            Step::Denied | Step::Failed => {
                matches!(self.reason(), "agent_denied" | "agent_malformed" | "unresolved" | "connect_failed")
            }
            Step::Open | Step::Attempt | Step::Abandoned => false,
        }
    }

    pub(super) fn outcome_in_words(&self) -> String {
        let outcome = match self.step {
            Step::Open | Step::Attempt => return "open".to_owned(),
            Step::Denied => "denied",
            Step::Failed => "failed",
            Step::Ended => "ended",
            Step::Abandoned => "abandoned",
        };
        format!("{outcome} ({})", self.reason())
    }

    fn reason(&self) -> &str {
        self.reason.as_deref().unwrap_or("no reason")
    }
}

/// Where the two sides name somebody or something else.
pub(super) fn identities(gateway: &Half, agent: &Half) -> Vec<(Category, (String, String))> {
    // An agent that does not take the gateway's word for a principal has the gateway's key there.
    let keyed = agent.principal.as_deref().is_some_and(|principal| principal.starts_with("SHA256:"));
    let members = [
        (Category::Organisation, &gateway.organisation, &agent.organisation, false),
        (Category::Agent, &gateway.agent, &agent.agent, false),
        (Category::Principal, &gateway.principal, &agent.principal, keyed),
        (Category::Target, &gateway.target, &agent.target, false),
    ];
    let mut differ = Vec::new();
    for (category, gateway, agent, other) in members {
        if let (Some(gateway), Some(agent)) = (gateway, agent)
            && gateway != agent
            && !other
        {
            differ.push((category, (gateway.to_string(), agent.to_string())));
        }
    }
    differ
}

/// How the two ends of a forward go together.
pub(super) enum Outcomes {
    Agree,
    Explained,
    Differ(Category, (String, String)),
}

/// Judges a forward that both sides have closed.
pub(super) fn outcomes(gateway: &Half, agent: &Half, attempts: u8) -> Outcomes {
    let words = || (gateway.outcome_in_words(), agent.outcome_in_words());
    let differ = || Outcomes::Differ(Category::Outcome, words());
    // It was asked of this one, and went elsewhere in the end.
    let elsewhere = attempts > 0
        && (gateway.replica != agent.replica || matches!(agent.step, Step::Denied | Step::Failed | Step::Abandoned));
    match (gateway.step, agent.step) {
        (Step::Ended, Step::Ended) => bytes(gateway, agent),
        _ if elsewhere => Outcomes::Explained,
        // Whatever it carried: its process ended with it.
        (_, Step::Abandoned) | (Step::Abandoned, _) => Outcomes::Explained,
        (Step::Ended, _) => differ(),
        (_, Step::Ended) => match gateway.reason() {
            // What the gateway says that the agent said.
            "agent_denied" | "agent_malformed" | "agent_limit" | "unresolved" | "connect_failed" => differ(),
            _ => Outcomes::Explained,
        },
        (_, Step::Denied) if matches!(gateway.reason(), "unresolved" | "connect_failed") => differ(),
        (_, Step::Failed) if matches!(gateway.reason(), "agent_denied" | "agent_malformed") => differ(),
        _ => Outcomes::Agree,
    }
}

/// A forward that ended well has the same bytes on both sides; of one that broke, some may have been on their way.
fn bytes(gateway: &Half, agent: &Half) -> Outcomes {
    let (Some(there), Some(here)) = (gateway.bytes, agent.bytes) else { return Outcomes::Explained };
    if there == here {
        return Outcomes::Agree;
    }
    let lost = |sent: u64, arrived: u64| sent.checked_sub(arrived).is_some_and(|lost| lost <= COMPARE_FLIGHT);
    let broke = gateway.reason() != "eof" || agent.reason() != "eof";
    if broke && lost(there.0, here.0) && lost(here.1, there.1) {
        return Outcomes::Explained;
    }
    let said = |half: &Half, (to, from): (u64, u64)| format!("{to} to the target, {from} from it ({})", half.reason());
    Outcomes::Differ(Category::Bytes, (said(gateway, there), said(agent, here)))
}

//! Keys that expire soon: the owner is told in the log, of the agent's own key when a gateway says so, and of the
//! orchestrators' keys and CAs, and of its own TLS certificates, by the configuration.
//!
//! Promised: each is told once when a key has 30 days left, 7 days, and none, and again after each start, as far as that is
//! still ahead. What a gateway says of a key's end is its word: it changes nothing here.

use std::sync::{Arc, PoisonError};

use jiff::Timestamp;
use tracing::warn;

use super::live::{Entry, State};
use super::{Agent, Post};
use crate::identity::OrganisationId;
use crate::registry::expiry::{self, Ending, Left, Said, Stage};
use crate::tls::Identity;
use crate::tunnel::connect::url::GatewayUrl;
use crate::tunnel::wire::KeyNotice;

/// What was heard last of the end of a key.
pub(super) type Noticed = Option<(u64, Stage)>;

/// Tells of a gateway's notice, unless that was told before.
pub(super) fn heed(post: &Post, gateway: &GatewayUrl, notice: KeyNotice) {
    let now = Timestamp::now();
    let expires = i64::try_from(notice.expires).ok().and_then(|second| Timestamp::from_second(second).ok());
    let Some((expires, stage)) = expires.and_then(|expires| Some((expires, Stage::of(expires, now)?))) else { return };
    let heard = Some((notice.expires, stage));
    if std::mem::replace(&mut *post.noticed.lock().unwrap_or_else(PoisonError::into_inner), heard) == heard {
        return;
    }
    let left = Left { expires, now };
    warn!(
        organisation = %post.name.organisation,
        %gateway,
        "this agent's key {left}, says the gateway: make a new one with `caponier keys rotate` and give its public half to \
         the gateway's operator"
    );
}

/// Tells of orchestrators' keys and CAs, until the agent stops. Waits for another configuration, and for the clock.
pub(super) async fn watch(agent: Arc<Agent>) {
    let stop = agent.tasks.stopping().clone();
    let (mut said, mut certificates) = (Said::default(), Said::default());
    loop {
        let (state, mut changes) = agent.state.follow();
        let now = Timestamp::now();
        for ending in said.take_new(endings(&state, now)) {
            let (holder, left) = (&ending.holder, Left { expires: ending.expires, now });
            let advice = if ending.succeeded {
                "the organisation has another that lasts longer".to_owned()
            } else {
                format!("the organisation has none that lasts longer: add its next [[organisation.{holder}]]")
            };
            let whose = if holder == CA { "an orchestrator CA's" } else { "an orchestrator's" };
            warn!(organisation = %ending.organisation, key = %ending.key, "{whose} key {left}; {advice}");
        }
        for ending in certificates.take_new(certificate_endings(&state, now)) {
            let left = Left { expires: ending.expires, now };
            warn!(
                organisation = %ending.organisation,
                certificate = %ending.key,
                "the TLS certificate that this agent shows to gateways {left}: put the next one, with its key, into the same \
                 files; the agent need not be started anew"
            );
        }
        let ends = state.entries().filter_map(|entry| entry.window.expires);
        let ends = ends.chain(state.certificates().filter_map(|(_, identity)| identity.ends()));
        let next = ends.filter_map(|expires| Stage::next(expires, now)).min();
        tokio::select! {
            () = stop.cancelled() => return,
            () = expiry::until(next, now) => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// What lets orchestrators log in and is at some stage of its end. A key and a CA do not take each other's place: who has
/// the one need not have the other.
fn endings(state: &State, now: Timestamp) -> Vec<Ending> {
    let at_stage = |entry: Entry<'_>| {
        let expires = entry.window.expires?;
        let lasts_longer = |other: Entry<'_>| {
            other.organisation == entry.organisation
                && other.ca == entry.ca
                && other.window.at(now).is_ok()
                && other.window.expires.is_none_or(|end| end > expires)
        };
        Some(Ending {
            organisation: entry.organisation.clone(),
            holder: if entry.ca { CA } else { "orchestrator" }.to_owned(),
            key: entry.key.fingerprint(),
            expires,
            stage: Stage::of(expires, now)?,
            succeeded: state.entries().any(lasts_longer),
        })
    };
    state.entries().filter_map(at_stage).collect()
}

/// The agent's own TLS certificates that are at some stage of their end.
fn certificate_endings(state: &State, now: Timestamp) -> Vec<Ending> {
    let at_stage = |(organisation, identity): (&OrganisationId, &Identity)| {
        let expires = identity.ends()?;
        Some(Ending {
            organisation: organisation.clone(),
            holder: String::new(),
            key: identity.fingerprint(),
            expires,
            stage: Stage::of(expires, now)?,
            succeeded: false,
        })
    };
    state.certificates().filter_map(at_stage).collect()
}

/// The table that a CA stands in.
const CA: &str = "orchestrator_ca";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::live::tests::{authority, config, key, orchestrator, organisation, state};
    use crate::agent::{Orchestrator, OrchestratorAuthority, Organisation};
    use crate::policy::window::Window;

    #[test]
    fn the_end_of_a_key_and_of_a_ca_is_told_each_with_what_takes_its_place() {
        let now = Timestamp::from_second(1_800_000_000).expect("a time");
        let until =
            |days: i64| Window { not_before: None, expires: Some(now + jiff::SignedDuration::from_hours(days * 24)) };
        let [first, second, ca, next_ca] = std::array::from_fn(|_| key());
        let login = |key, days| Orchestrator { window: until(days), ..orchestrator(key, None) };
        let certifies = |key, days| OrchestratorAuthority { window: until(days), ..authority(key, &["*"]) };
        let told = |authorities: Vec<OrchestratorAuthority>| {
            let keys = [login(&first, 20), login(&second, 200)];
            let acme = Organisation { authorities, ..organisation("acme", &[], &keys, &[]) };
            let mut told: Vec<_> = endings(&state(&config(vec![acme])), now)
                .into_iter()
                .map(|ending| (ending.holder, ending.key, ending.stage, ending.succeeded))
                .collect();
            told.sort_by_key(|(holder, ..)| holder.clone());
            told
        };
        let of_key = ("orchestrator".to_owned(), first.fingerprint(), Stage::Month, true);
        let of_ca = |succeeded| (CA.to_owned(), ca.fingerprint(), Stage::Week, succeeded);
        assert_eq!(told(vec![certifies(&ca, 100)]), std::slice::from_ref(&of_key));
        assert_eq!(told(vec![certifies(&ca, 5)]), [of_key.clone(), of_ca(false)]);
        assert_eq!(told(vec![certifies(&ca, 5), certifies(&next_ca, 100)]), [of_key, of_ca(true)]);
    }
}

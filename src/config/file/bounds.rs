//! What an operator may set of the bounds, and how far.

use std::time::Duration;

use super::value::optional;
use crate::document::Table;
use crate::limits;
use crate::tunnel::splice::Bounds;
use crate::{agent, gateway};

pub(super) fn agent_limits(table: &Table<'_>) -> Option<agent::Limits> {
    let defaults = agent::Limits::default();
    let Some(item) = table.optional("limits") else { return Some(defaults) };
    let table = item.table()?;
    let forwards = bound(&table, "forwards", defaults.forwards, FORWARDS);
    let per_organisation = bound(&table, "forwards_per_organisation", defaults.forwards_per_organisation, FORWARDS);
    let per_link = bound(&table, "forwards_per_link", defaults.forwards_per_link, LINK);
    let pending = bound(&table, "pending_opens_per_link", defaults.pending_opens_per_link, PENDING);
    let opens = bound(&table, "opens_per_second_per_organisation", defaults.opens_per_second_per_organisation, OPENS);
    let sessions = bound(&table, "sessions_per_organisation", defaults.sessions_per_organisation, SESSIONS);
    let forward = forward_bounds(&table);
    Some(agent::Limits {
        forwards: forwards?,
        forwards_per_organisation: per_organisation?,
        forwards_per_link: per_link?,
        pending_opens_per_link: pending?,
        opens_per_second_per_organisation: opens?,
        sessions_per_organisation: sessions?,
        forward: forward?,
    })
}

pub(super) fn gateway_limits(table: &Table<'_>) -> Option<gateway::Limits> {
    let defaults = gateway::Limits::default();
    let Some(item) = table.optional("limits") else { return Some(defaults) };
    let table = item.table()?;
    let per_link = bound(&table, "forwards_per_link", defaults.forwards_per_link, LINK);
    let per_principal = bound(&table, "forwards_per_principal", defaults.forwards_per_principal, FORWARDS);
    let per_organisation = bound(&table, "forwards_per_organisation", defaults.forwards_per_organisation, FORWARDS);
    let sessions = bound(&table, "sessions_per_principal", defaults.sessions_per_principal, SESSIONS);
    let pending = bound(&table, "pending_opens_per_principal", defaults.pending_opens_per_principal, FORWARDS);
    let opens = bound(&table, "opens_per_second_per_principal", defaults.opens_per_second_per_principal, OPENS);
    let all_opens =
        bound(&table, "opens_per_second_per_organisation", defaults.opens_per_second_per_organisation, OPENS);
    let forward = forward_bounds(&table);
    Some(gateway::Limits {
        forwards_per_link: per_link?,
        forwards_per_principal: per_principal?,
        forwards_per_organisation: per_organisation?,
        sessions_per_principal: sessions?,
        pending_opens_per_principal: pending?,
        opens_per_second_per_principal: opens?,
        opens_per_second_per_organisation: all_opens?,
        forward: forward?,
    })
}

/// The most that a limit can be set to, and why no more. None can be set to 0, which would refuse everything.
pub(in crate::config) type Most = (usize, &'static str);

const FORWARDS: Most = (limits::FORWARDS_MAX, "each live forward holds a place in the trail, and this is half of them");
const LINK: Most = (limits::CHANNELS_PER_LINK, "the memory of a link is bounded for so many channels");
const PENDING: Most = (limits::PENDING_OPENS_PER_LINK, "a gateway asks for no more at once");
const SESSIONS: Most = (limits::SESSIONS_MAX, "each session may hold memory of the gateway");
const OPENS: Most = (limits::OPENS_PER_SECOND_MAX as usize, "no trail takes the records of more");

pub(in crate::config) fn bound<T: TryFrom<i64>>(
    table: &Table<'_>,
    key: &str,
    default: T,
    (most, why): Most,
) -> Option<T> {
    let range = 1..=i64::try_from(most).unwrap_or(i64::MAX);
    match table.optional(key) {
        Some(item) => item.integer_because(range, &format!("0 would refuse everything, and {why}")),
        None => Some(default),
    }
}

/// How long forwards may go on. 0 is no limit, as is leaving it out.
pub(in crate::config) fn forward_bounds(table: &Table<'_>) -> Option<Bounds> {
    let seconds = |key| {
        let most = limits::FORWARD_LIFE_MAX.as_secs();
        let range = 0..=i64::try_from(most).unwrap_or(i64::MAX);
        let seconds = optional(table.optional(key), |item| {
            item.integer_because::<u64>(range, "seconds, up to a year; 0 is no limit")
        })?;
        Some(seconds.filter(|seconds| *seconds > 0).map(Duration::from_secs))
    };
    let (idle, life) = (seconds("idle_s"), seconds("life_s"));
    Some(Bounds { idle: idle?, life: life? })
}

/// How long what runs may go on after the signal to end.
pub(in crate::config) fn drain(table: &Table<'_>) -> Option<Duration> {
    let longest = i64::try_from(limits::DRAIN_MAX.as_secs()).unwrap_or(i64::MAX);
    let seconds = optional(table.optional("drain_s"), |item| item.integer::<u32>(0..=longest))?;
    Some(seconds.map_or(limits::DRAIN, |seconds| Duration::from_secs(seconds.into())))
}

//! Reads `[agent.resolver]`: how the names of targets are looked up.

use std::net::SocketAddr;
use std::time::Duration;

use super::file::{address, optional};
use crate::document::{Item, Table};
use crate::limits;
use crate::resolve::{Config, Family};

/// Reads the table in `[agent]`, if it is there. `None` if something was wrong, which is then recorded as a fault.
pub(super) fn resolver(agent: &Table<'_>) -> Option<Config> {
    let defaults = Config::default();
    let Some(item) = agent.optional("resolver") else { return Some(defaults) };
    let table = item.table()?;
    let named = table.optional("servers");
    let servers = optional(named, servers);
    let timeout = optional(table.optional("timeout_s"), |item| {
        let most = limits::RESOLVE_TIMEOUT_MAX.as_secs();
        seconds(item, 1, most, "a forward needs the rest of its time for the connection")
    });
    let life = table.optional("cache_ttl_max_s");
    if let Some(item) = &life
        && matches!(servers, Some(None))
    {
        item.fault("what the system's resolver says is never cached here: name servers too, or leave this out");
    }
    let life =
        optional(life, |item| seconds(item, 0, limits::ANSWER_LIFE_MAX.as_secs(), "a day at most; 0 caches nothing"));
    let family = optional(table.optional("family"), |item| item.choice(&FAMILIES));
    Some(Config {
        servers: servers?.unwrap_or_default(),
        timeout: timeout?.unwrap_or(defaults.timeout),
        life: life?.unwrap_or(defaults.life),
        family: family?.unwrap_or_default(),
    })
}

fn servers(item: &Item<'_>) -> Option<Vec<SocketAddr>> {
    let mut known = Vec::new();
    let servers = item.list(|item| {
        let server = address(item)?;
        if server.port() == 0 || server.ip().is_unspecified() || server.ip().is_multicast() {
            return item.reject("the address and port of one DNS server are wanted, such as 10.0.0.2:53");
        }
        if known.contains(&server) {
            return item.reject(format!("{server} is listed already"));
        }
        known.push(server);
        Some(server)
    })?;
    if servers.len() > limits::RESOLVERS_MAX {
        return item.reject(format!("at most {} servers are asked", limits::RESOLVERS_MAX));
    }
    Some(servers)
}

fn seconds(item: &Item<'_>, least: i64, most: u64, why: &str) -> Option<Duration> {
    item.integer_because(least..=i64::try_from(most).unwrap_or(i64::MAX), why).map(Duration::from_secs)
}

const FAMILIES: [(&str, Family); 5] = [
    ("any", Family::Any),
    ("prefer-ipv4", Family::PreferIpv4),
    ("prefer-ipv6", Family::PreferIpv6),
    ("ipv4", Family::Ipv4),
    ("ipv6", Family::Ipv6),
];

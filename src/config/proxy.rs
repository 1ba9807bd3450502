//! Reads `[proxy]`, `[[upstream]]` and `[[listener]]`: the network proxy.

use std::net::SocketAddr;

use super::Log;
use super::egress::egress;
use super::file::{Most, Once, address, audit, bound, drain, forward_bounds, log, network, networks, optional};
use crate::document::{Item, Table};
use crate::limits;
use crate::proxy::{Config, Limits, Listener, Mode, Upstream};
use crate::target::{Host, Target};

/// Reads a network proxy's configuration. `None` if something was wrong, which is then recorded as a fault.
pub(super) fn proxy(root: &Table<'_>) -> Option<(Config, Log)> {
    let table = root.required_table("proxy")?;
    let egress = egress(&table);
    let health = optional(table.optional("health"), |item| {
        let address = address(item)?;
        match address.ip().is_loopback() {
            true => Some(address),
            false => item.reject("health is told on loopback only (127.0.0.0/8 or [::1])"),
        }
    });
    let (drain, limits) = (drain(&table), proxy_limits(&table));
    let mut names = Once::new("upstream");
    let tables = root.required_tables("upstream", "no [[upstream]]: the proxy would have nowhere to lead to");
    let upstreams: Option<Vec<_>> = tables.iter().map(|table| upstream(table, &mut names)).collect();
    let tables = root.required_tables("listener", "no [[listener]]: nobody could connect");
    let mut addresses = Once::new("address");
    let known = upstreams.as_deref();
    let listeners: Option<Vec<_>> = tables.iter().map(|table| listener(table, &mut addresses, known)).collect();
    for (what, count) in [("upstream", upstreams.as_ref().map_or(0, Vec::len)), ("listener", tables.len())] {
        if count > limits::PROXY_PARTS {
            root.fault(what, format!("at most {} of these are accepted", limits::PROXY_PARTS));
        }
    }
    if let (Some(upstreams), Some(listeners)) = (&upstreams, &listeners) {
        refuse_circles(root, upstreams, listeners);
    }
    let (audit, log) = (audit(root), log(root));
    let config = Config {
        listeners: listeners?,
        upstreams: upstreams?,
        egress: egress?,
        health: health?,
        drain: drain?,
        audit: audit?,
        limits: limits?,
    };
    Some((config, log?))
}

fn upstream(table: &Table<'_>, names: &mut Once<String>) -> Option<Upstream> {
    let name = table.required("name").and_then(|item| {
        let name = item.string()?.to_owned();
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.len() > 63 || !name.chars().all(fits) {
            return item.reject("an upstream's name is at most 63 letters, digits, - _ and .");
        }
        names.first(name.clone(), &item).then_some(name)
    });
    let to = table.required("to").and_then(|item| item.parse::<Target>());
    let within = optional(table.optional("within"), |item| {
        if matches!(&to, Some(Target { host: Host::Address(_), .. })) {
            return item.reject("within belongs to a name: an address leads to itself");
        }
        item.list(network)
    });
    Some(Upstream { name: name?, to: to?, within: within?.unwrap_or_default() })
}

/// Where clients come in. `upstreams` are there if all of them are in order.
fn listener(table: &Table<'_>, addresses: &mut Once<SocketAddr>, upstreams: Option<&[Upstream]>) -> Option<Listener> {
    let place = table.required("address").and_then(|item| {
        let address = address(&item)?;
        // Port 0 is another port each time.
        (address.port() == 0 || addresses.first(address, &item)).then_some(address)
    });
    let accept_from = optional(table.optional("accept_from"), networks);
    let plain = optional(table.optional("plain"), |item| item.boolean());
    let mode = mode(table, upstreams);
    let (address, accept_from, plain) = (place?, accept_from?, plain?.unwrap_or_default());
    if !address.ip().is_loopback() {
        if accept_from.is_none() {
            table.fault("address", "a listener beyond loopback says from where it accepts: give accept_from");
            return None;
        }
        if !plain {
            let problem = "this listener would be in clear beyond loopback: give tls_certificate and tls_key, or write \
                           plain = true if whoever is between may read it";
            table.fault("address", problem);
            return None;
        }
    }
    Some(Listener { address, accept_from, mode: mode? })
}

fn mode(table: &Table<'_>, upstreams: Option<&[Upstream]>) -> Option<Mode> {
    const MODES: [(&str, fn(&Table<'_>, Option<&[Upstream]>) -> Option<Mode>); 3] = [
        ("mutual", |table, known| one(table, known).map(Mode::Mutual)),
        ("reverse", |table, known| one(table, known).map(Mode::Reverse)),
        ("connect", |table, known| several(table, known).map(Mode::Connect)),
    ];
    let read = table.required("mode")?.choice(&MODES)?;
    read(table, upstreams)
}

/// The one upstream of a listener that leads to one.
fn one(table: &Table<'_>, known: Option<&[Upstream]>) -> Option<String> {
    if let Some(item) = table.optional("upstreams") {
        return item.reject("upstreams belongs to mode = \"connect\": this mode leads to one, its upstream");
    }
    named(&table.required("upstream")?, known)
}

/// The upstreams of a listener that may lead to several.
fn several(table: &Table<'_>, known: Option<&[Upstream]>) -> Option<Vec<String>> {
    if let Some(item) = table.optional("upstream") {
        return item.reject("upstream belongs to the other modes: this one leads to those that upstreams lists");
    }
    let mut names = Once::new("upstream");
    table.required("upstreams")?.list(|item| named(item, known).filter(|name| names.first(name.clone(), item)))
}

/// The name of an upstream that there is.
fn named(item: &Item<'_>, known: Option<&[Upstream]>) -> Option<String> {
    let name = item.string()?;
    if known.is_some_and(|known| !known.iter().any(|upstream| upstream.name == name)) {
        return item.reject(format!("no [[upstream]] here has the name {}", name.escape_debug()));
    }
    Some(name.to_owned())
}

/// An upstream that is one of the proxy's own listeners would have it talk to itself.
fn refuse_circles(root: &Table<'_>, upstreams: &[Upstream], listeners: &[Listener]) {
    for (table, upstream) in root.tables("upstream").iter().zip(upstreams) {
        let Host::Address(address) = upstream.to.host else { continue };
        let place = SocketAddr::new(address, upstream.to.port);
        if listeners.iter().any(|listener| listener.address == place) {
            table.fault("to", "this is one of the proxy's own listeners");
        }
    }
}

const CONNECTIONS: Most =
    (limits::PROXY_CONNECTIONS_MAX, "each connection holds a place in the trail, and this is half of them");

fn proxy_limits(table: &Table<'_>) -> Option<Limits> {
    let defaults = Limits::default();
    let Some(item) = table.optional("limits") else { return Some(defaults) };
    let table = item.table()?;
    let connections = bound(&table, "connections", defaults.connections, CONNECTIONS);
    let of_address = bound(&table, "connections_per_address", defaults.connections_per_address, CONNECTIONS);
    let bounds = forward_bounds(&table);
    Some(Limits { connections: connections?, connections_per_address: of_address?, bounds: bounds? })
}

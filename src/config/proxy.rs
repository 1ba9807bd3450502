//! Reads `[proxy]`, `[[upstream]]` and `[[listener]]`: the network proxy.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use super::Log;
use super::audit::audit;
use super::egress::egress;
use super::file::{Most, Once, address, bound, drain, forward_bounds, log, network, networks, optional};
use super::health::health;
use super::mutual::client_auth_or;
use crate::chain::Chain;
use crate::document::{Item, Table};
use crate::limits;
use crate::proxy::{Config, Inbound, Limits, Listener, Mode, Outbound, Upstream};
use crate::target::{Host, Target};
use crate::tls::{self, Certificates, ClientAuth, ClientOptions, Identity};

/// Reads a network proxy's configuration. `None` if something was wrong, which is then recorded as a fault.
pub(super) fn proxy(root: &Table<'_>) -> Option<(Config, Log)> {
    let table = root.required_table("proxy")?;
    let egress = egress(&table);
    let health = health(root);
    let (drain, limits) = (drain(&table), proxy_limits(&table));
    let mut names = Once::new("upstream");
    let tables = root.required_tables("upstream", "no [[upstream]]: the proxy would have nowhere to lead to");
    let spoken_to = spoken_to(root);
    let upstreams = all(tables.iter().map(|table| upstream(table, &mut names, &spoken_to)));
    let tables = root.required_tables("listener", "no [[listener]]: nobody could connect");
    let mut addresses = Once::new("address");
    let known = upstreams.as_deref();
    let listeners = all(tables.iter().map(|table| listener(table, &mut addresses, known)));
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

/// All of them, if each is in order. Every one is read, also after one that is not: what nobody reads counts as unknown.
fn all<T>(read: impl Iterator<Item = Option<T>>) -> Option<Vec<T>> {
    let each: Vec<_> = read.collect();
    each.into_iter().collect()
}

/// The names of the upstreams with which the proxy itself speaks TLS. Faults in the tables are told where they are read.
fn spoken_to(root: &Table<'_>) -> Vec<String> {
    let tables = root.tables("listener");
    tables.iter().filter_map(|table| Some(table.optional("upstream")?.string()?.to_owned())).collect()
}

fn upstream(table: &Table<'_>, names: &mut Once<String>, spoken_to: &[String]) -> Option<Upstream> {
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
    let identity = identity(table);
    let ca = optional(table.optional("tls_ca_file"), Item::file);
    let server_name = optional(table.optional("server_name"), |item| {
        let host: Host = item.parse()?;
        match tls::is_server_name(&host.to_string()) {
            true => Some(host),
            false => item.reject("no certificate can have this name"),
        }
    });
    let without = optional(table.optional("without_certificate"), |item| item.boolean());
    let (name, to, identity, ca) = (name?, to?, identity?, ca?);
    let (server_name, without) = (server_name?, without?.unwrap_or_default());
    if without && identity.is_some() {
        table.fault("without_certificate", "there is a certificate: choose one of the two");
        return None;
    }
    let tls = if spoken_to.contains(&name) {
        let server_name = server_name.unwrap_or_else(|| to.host.clone());
        Some(outbound(table, server_name, identity, ca, without)?)
    } else {
        let unused = ["tls_ca_file", "tls_certificate", "server_name", "without_certificate"];
        for key in unused.into_iter().filter(|key| table.optional(key).is_some()) {
            table.fault(
                key,
                "the proxy speaks TLS with the upstream of a listener of mode mutual or reverse, and this is none's",
            );
        }
        None
    };
    Some(Upstream { name, to, within: within?.unwrap_or_default(), tls })
}

fn outbound(
    table: &Table<'_>,
    server_name: Host,
    identity: Option<Identity>,
    ca: Option<PathBuf>,
    without_certificate: bool,
) -> Option<Outbound> {
    const OFFERED: [&[&[u8]]; 4] = [&[], &[tls::ALPN_HTTP], &[tls::ALPN_SSH], &[tls::ALPN_HTTP2]];
    let options = |alpn| ClientOptions { ca_files: ca.iter().cloned().collect(), identity: identity.clone(), alpn };
    let built: Result<Vec<_>, _> = OFFERED.into_iter().map(|alpn| options(alpn).build()).collect();
    let configs = built.map(<[_; 4]>::try_from);
    let authorities = ca.as_ref().map(std::fs::read).transpose();
    match (configs, authorities) {
        (Ok(Ok(configs)), Ok(authorities)) => {
            let authorities = authorities.map(Arc::from);
            Some(Outbound { server_name, identity, without_certificate, authorities, configs })
        }
        (Err(error), _) => {
            table.fault("tls_ca_file", Chain(&error).to_string());
            None
        }
        _ => {
            table.fault("tls_ca_file", "the file of authorities could not be read");
            None
        }
    }
}

/// A certificate and its key, where both are named.
fn identity(table: &Table<'_>) -> Option<Option<Identity>> {
    let (chain, key) = (table.optional("tls_certificate"), table.optional("tls_key"));
    let (chain_file, key_file) = (optional(chain.clone(), Item::file), optional(key.clone(), Item::file));
    match (chain_file?, key_file?) {
        (None, None) => Some(None),
        (Some(chain_file), Some(key_file)) => match Identity::read(&chain_file, &key_file) {
            Ok(identity) => Some(Some(identity)),
            Err(error) => chain?.reject(Chain(&error).to_string()),
        },
        (Some(_), None) => chain?.reject("a certificate without its key: give tls_key too"),
        (None, Some(_)) => key?.reject("a key without its certificate: give tls_certificate too"),
    }
}

/// How a listener speaks TLS, if it does.
fn inbound(table: &Table<'_>, mode: Option<&Mode>) -> Option<Option<Inbound>> {
    let mutual = matches!(mode, Some(Mode::Mutual(_)));
    let identity = identity(table);
    let clients = client_auth_or(table, mutual.then_some(ClientAuth::Strict));
    let names = optional(table.optional("client_names"), |item| item.list(|item| item.string().map(str::to_owned)));
    let (identity, (client_auth, client_trust), names) = (identity?, clients?, names?);
    let refuse = |key: &str, problem: &str| {
        table.fault(key, problem);
        None
    };
    if mutual && client_auth != ClientAuth::Strict {
        return refuse(
            "client_auth",
            "mode = \"mutual\" is for clients that show a certificate: strict is the only choice",
        );
    }
    if client_auth != ClientAuth::Off {
        if client_trust.is_empty() {
            let problem = format!("client_auth is {client_auth}, and no CA is named: give client_ca = [\"…\"]");
            return refuse("client_auth", &problem);
        }
        if names.is_none() {
            let problem = "that a certificate comes from this CA is not enough: say in client_names whom it must name";
            return refuse("client_ca", problem);
        }
    }
    if names.as_ref().is_some_and(|names| names.len() > limits::CLIENT_NAMES_MAX) {
        return refuse("client_names", &format!("at most {} names are accepted", limits::CLIENT_NAMES_MAX));
    }
    if client_auth == ClientAuth::Off && names.is_some() {
        return refuse("client_names", "nobody is asked for a certificate here: give client_ca and client_auth too");
    }
    let Some(certificates) = identity.and_then(|identity| Certificates::new(vec![identity])) else {
        return match client_auth {
            ClientAuth::Off => Some(None),
            _ => refuse("mode", "clients show their certificates in TLS: give tls_certificate and tls_key too"),
        };
    };
    Some(Some(Inbound { certificates, client_auth, client_trust, client_names: names.unwrap_or_default() }))
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
    let tls = inbound(table, mode.as_ref());
    let (address, accept_from, plain) = (place?, accept_from?, plain?.unwrap_or_default());
    let (mode, tls) = (mode?, tls?);
    if plain && tls.is_some() {
        table.fault("plain", "this listener has a certificate, and so is not plain: choose one of the two");
        return None;
    }
    if !address.ip().is_loopback() {
        if accept_from.is_none() {
            table.fault("address", "a listener beyond loopback says from where it accepts: give accept_from");
            return None;
        }
        if tls.is_none() && !plain {
            let problem = "this listener would be in clear beyond loopback: give tls_certificate and tls_key, or write \
                           plain = true if whoever is between may read it";
            table.fault("address", problem);
            return None;
        }
    }
    if let (Mode::Mutual(name), Some(known)) = (&mode, upstreams) {
        let bare = |upstream: &&Upstream| upstream.tls.as_ref().is_some_and(|tls| tls.identity.is_none());
        if known.iter().filter(|upstream| upstream.name == *name).any(|upstream| bare(&upstream)) {
            let problem = "mode = \"mutual\" shows the proxy's own certificate to the upstream: give that one tls_certificate \
                           and tls_key";
            table.fault("upstream", problem);
            return None;
        }
    }
    Some(Listener { address, accept_from, tls, mode })
}

fn mode(table: &Table<'_>, upstreams: Option<&[Upstream]>) -> Option<Mode> {
    type Read = fn(&Table<'_>, Option<&[Upstream]>) -> Option<Mode>;
    const MODES: [(&str, Read); 3] = [
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

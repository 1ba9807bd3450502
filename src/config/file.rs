//! Reads the tables of configuration files.

mod allow;
mod bounds;
mod listen;
mod value;

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use jiff::Timestamp;

pub(super) use allow::allowlist;
use allow::{asserted, window};
pub(super) use bounds::{Most, bound, drain, forward_bounds};
use bounds::{agent_limits, gateway_limits};
use listen::{certificates, listeners, local, refuse_asking_without_tls};
use value::{Keys, public_key};
pub(super) use value::{Once, address, network, networks, optional, private_key, secret_file};

use super::audit::audit;
use super::egress::egress;
use super::health::health;
use super::resolver::resolver;
use super::{Log, LogFormat, trust};
use crate::agent::{Listen, Orchestrator, OrchestratorAuthority};
use crate::chain::Chain;
use crate::document::{Item, Table};
use crate::identity::certificate::{Flaw, Use};
use crate::identity::{Certificate, ID_MAX, OrganisationId, PrivateKey, ReplicaId};
use crate::network::{Network, Networks};
use crate::target::Target;
use crate::tls::ClientOptions;
use crate::tunnel::admit::penalty::{Exempt, Terms};
use crate::tunnel::connect::url::{GatewayUrl, Ways};
use crate::{agent, gateway};

/// Reads an agent's configuration. `None` if something was wrong, which is then recorded as a fault.
pub(super) fn agent(root: &Table<'_>) -> Option<(agent::Config, Log)> {
    let table = root.required_table("agent")?;
    let id = table.required("id").and_then(|item| item.parse());
    let mut keys = Keys::default();
    let key = table.required("host_key").and_then(|item| {
        let key = private_key(&item)?;
        keys.claim(key.public().fingerprint(), "the agent's host key", &item);
        Some(key)
    });
    let replica = match table.optional("replica") {
        Some(item) => item.parse(),
        None => replica_of_host(&table),
    };
    let egress = egress(&table);
    let tls = trust::options(&table, &ClientOptions::default());
    let drain = drain(&table);
    let tables = root.required_tables("organisation", "no [[organisation]]: the agent would have nobody to serve");
    let mut ids = Once::new("organisation");
    let listen = root.optional("listen");
    let organisations: Vec<_> = tables
        .iter()
        .map(|table| agent_organisation(table, listen.is_some(), tls.as_ref(), &mut ids, &mut keys))
        .collect();
    let listen = optional(listen, |item| listener(&item.table()?));
    let limits = agent_limits(&table);
    let penalties = penalties(&table);
    let remote_doctor = optional(table.optional("remote_doctor"), |item| item.boolean());
    let resolver = resolver(&table);
    let organisations: Option<Vec<_>> = organisations.into_iter().collect();
    if organisations.is_some() && resolver.as_ref().is_some_and(|resolver| resolver.servers.is_empty()) {
        refuse_services(&tables);
    }
    let (audit, health, log) = (audit(root), health(root), log(root));
    signs_alone(root, audit.as_ref(), &mut keys);
    tls?;
    let config = agent::Config {
        id: id?,
        replica: replica?,
        key: key?,
        egress: egress?,
        drain: drain?,
        organisations: organisations?,
        audit: audit?,
        limits: limits?,
        resolver: resolver?,
        listen: listen?,
        penalties: penalties?,
        health: health?,
        remote_doctor: remote_doctor?.unwrap_or_default(),
    };
    Some((config, log?))
}

/// What the trail is signed with is no other key of the configuration: nothing that a peer chooses is signed by it.
fn signs_alone(root: &Table<'_>, sinks: Option<&crate::audit::Sinks>, keys: &mut Keys) {
    let Some(key) = sinks.and_then(|sinks| sinks.signing_key.as_ref()) else { return };
    if let Some(item) = root.required_table("audit").and_then(|table| table.optional("signing_key")) {
        keys.claim(key.public().fingerprint(), "the trail's signing key", &item);
    }
}

/// Where an agent listens itself, and from where it accepts: neither has a default.
fn listener(table: &Table<'_>) -> Option<Listen> {
    let address = table.required("address").and_then(|item| address(&item));
    let accept_from = table.required("accept_from").and_then(|item| networks(&item));
    Some(Listen { address: address?, accept_from: accept_from? })
}

/// Reads a gateway's configuration. `None` if something was wrong, which is then recorded as a fault.
pub(super) fn gateway(root: &Table<'_>) -> Option<(gateway::Config, Log)> {
    let table = root.required_table("gateway")?;
    let mut addresses = Once::new("address");
    let listen = listeners(root, &table, &mut addresses);
    let mut keys = Keys::default();
    let host_key = table.required("host_key").and_then(|item| {
        let key = private_key(&item)?;
        keys.claim(key.public().fingerprint(), "the gateway's host key", &item);
        Some(key)
    });
    let certificates = certificates(root);
    if let (Some(None), Some(listeners)) = (&certificates, &listen) {
        refuse_asking_without_tls(root, listeners);
    }
    let host_certificate =
        optional(table.optional("host_certificate"), |item| host_certificate(item, host_key.as_ref()));
    let registry = table.required("registry").and_then(|item| {
        let path = item.path()?;
        if path.is_dir() { Some(path) } else { item.reject(format!("no folder {}", path.display())) }
    });
    let admin_socket = optional(table.optional("admin_socket"), admin_socket);
    let drain = drain(&table);
    let tables = root.required_tables("organisation", "no [[organisation]]: the gateway would have nobody to serve");
    let mut ids = Once::new("organisation");
    let organisations: Vec<_> = tables
        .iter()
        .map(|table| {
            let id = organisation_id(table, &mut ids);
            let login_key = table.required("login_key").and_then(|item| {
                let key = private_key(&item)?;
                let whose = id.as_ref().map_or("another organisation".to_owned(), OrganisationId::to_string);
                keys.claim(key.public().fingerprint(), &format!("the login key of {whose}"), &item);
                Some(key)
            });
            let login_certificate = optional(table.optional("login_certificate"), |item| {
                login_certificate(item, id.as_ref(), login_key.as_ref())
            });
            Some(gateway::Organisation { id: id?, login_key: login_key?, login_certificate: login_certificate? })
        })
        .collect();
    // Where an id is faulty, that an organisation is not there says nothing.
    let known = (ids.0.len() == tables.len()).then_some(&ids);
    let local: Vec<_> = root.tables("local").iter().map(|table| local(table, known, &mut addresses)).collect();
    let limits = gateway_limits(&table);
    let penalties = penalties(&table);
    let (audit, health, log) = (audit(root), health(root), log(root));
    signs_alone(root, audit.as_ref(), &mut keys);
    let config = gateway::Config {
        listen: listen?,
        certificates: certificates?,
        host_key: host_key?,
        host_certificate: host_certificate?,
        registry: registry?,
        admin_socket: admin_socket?,
        drain: drain?,
        organisations: organisations.into_iter().collect::<Option<_>>()?,
        local: local.into_iter().collect::<Option<_>>()?,
        audit: audit?,
        limits: limits?,
        penalties: penalties?,
        health: health?,
    };
    Some((config, log?))
}

/// Where the admin socket is made: a path, whose file mode says who may ask. There is no such thing for a port.
fn admin_socket(item: &Item<'_>) -> Option<PathBuf> {
    let text = item.string()?;
    let port = text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let url = text.contains("://");
    if port || url || text.parse::<IpAddr>().is_ok() {
        return item.reject(
            "the admin surface is a Unix socket and never a port, where anybody on the host could ask: a path is wanted, such as \
             /run/caponier/admin.sock",
        );
    }
    item.path()
}

/// What is held against addresses that nobody logs in from.
fn penalties(table: &Table<'_>) -> Option<Terms> {
    let defaults = Terms::default();
    let Some(item) = table.optional("penalties") else { return Some(defaults) };
    let table = item.table()?;
    let enabled = optional(table.optional("enabled"), |item| item.boolean());
    // Written out, an empty list exempts nobody.
    let exempt = optional(table.optional("exempt"), |item| {
        let networks: Option<Vec<_>> = item.items().iter().map(Item::parse::<Network>).collect();
        networks.map(|networks| Exempt::Networks(Networks::new(networks)))
    });
    Some(Terms { enabled: enabled?.unwrap_or(defaults.enabled), exempt: exempt?.unwrap_or(defaults.exempt) })
}

/// The system's resolver cannot be asked for services, so that rules for them would never allow anything.
fn refuse_services(organisations: &[Table<'_>]) {
    for rule in organisations.iter().flat_map(|organisation| organisation.tables("allow")) {
        if let Some(services) = rule.optional("services") {
            services.fault(
                "services are asked for at DNS servers of your choosing: name some, as servers in [agent.resolver]",
            );
        }
    }
}

fn agent_organisation(
    table: &Table<'_>,
    listens: bool,
    tls: Option<&ClientOptions>,
    ids: &mut Once<OrganisationId>,
    keys: &mut Keys,
) -> Option<agent::Organisation> {
    let id = organisation_id(table, ids);
    let whose = id.as_ref().map_or("another organisation".to_owned(), OrganisationId::to_string);
    let mut urls = Once::new("gateway");
    let mut url = |item: &Item<'_>| item.parse().filter(|url: &GatewayUrl| urls.first(url.clone(), item));
    let mut ways = |item: &Item<'_>| -> Option<Ways> {
        if item.is_text() {
            return url(item).map(Ways::from);
        }
        match Ways::new(item.list(&mut url)?) {
            Ok(ways) => Some(ways),
            Err(error) => item.reject(error.to_string()),
        }
    };
    let mut read = |item: &Item<'_>| item.list(&mut ways);
    let gateways = match table.optional("gateways") {
        Some(item) => read(&item),
        // Whoever wants something can come to the agent.
        None if listens => Some(Vec::new()),
        None => table.required("gateways").and_then(|item| read(&item)),
    };
    // Where the agent's own are at fault, those of an organisation may be, too.
    let tls = trust::options(table, tls.unwrap_or(&ClientOptions::default()));
    let tls = tls
        .and_then(|options| trust::ready(table, "gateways", options, gateways.iter().flatten().flat_map(Ways::iter)));
    let cas = table.tables("orchestrator_ca");
    let missing =
        "no [[organisation.orchestrator]] or [[organisation.orchestrator_ca]]: without a key nobody may log in";
    let tables =
        if cas.is_empty() { table.required_tables("orchestrator", missing) } else { table.tables("orchestrator") };
    let authorities: Vec<_> = cas
        .iter()
        .map(|table| {
            let key = table.required("key").and_then(|item| {
                let key = public_key(&item)?;
                keys.claim(key.fingerprint(), &format!("an orchestrator CA of {whose}"), &item);
                Some(key)
            });
            // Whose key comes and goes cannot be its own principal.
            let asserts = table.required("asserts").and_then(|item| item.list(asserted));
            let (window, revocations) = (window(table), table.revocations());
            Some(OrchestratorAuthority { key: key?, asserts: asserts?, window: window?, revocations: revocations? })
        })
        .collect();
    let orchestrators: Vec<_> = tables
        .iter()
        .map(|table| {
            let key = table.required("key").and_then(|item| {
                let key = public_key(&item)?;
                keys.claim(key.fingerprint(), &format!("an orchestrator key of {whose}"), &item);
                Some(key)
            });
            let asserts = optional(table.optional("asserts"), |item| item.list(asserted));
            let window = window(table);
            Some(Orchestrator { key: key?, asserts: asserts?, window: window? })
        })
        .collect();
    let allow = allowlist(table);
    Some(agent::Organisation {
        id: id?,
        gateways: gateways?,
        tls: tls?,
        orchestrators: orchestrators.into_iter().collect::<Option<_>>()?,
        authorities: authorities.into_iter().collect::<Option<_>>()?,
        allow: allow?,
    })
}

/// A certificate for the key that logs in to an organisation's agents.
fn login_certificate(
    item: &Item<'_>,
    organisation: Option<&OrganisationId>,
    key: Option<&PrivateKey>,
) -> Option<Certificate> {
    let certificate = certificate_of(item, "login_key", key, Use::Login(None))?;
    match organisation {
        Some(id) if !matches!(certificate.principals(), [only] if only == id.as_str()) => item
            .reject(format!("this certificate's only principal must be {id}: sign it with `ssh-keygen -s CA -n {id}`")),
        _ => Some(certificate),
    }
}

/// A certificate for the SSH door's host key.
fn host_certificate(item: &Item<'_>, key: Option<&PrivateKey>) -> Option<Certificate> {
    // Each name that it has will do: under which clients come is theirs to know.
    certificate_of(item, "host_key", key, Use::AnyHost)
}

/// A certificate that somebody could accept in its time, for the key that stands beside it. That its time is over, or yet to
/// come, is no fault: it would keep a gateway from starting for all others, and the plain key is used meanwhile.
fn certificate_of(item: &Item<'_>, beside: &str, key: Option<&PrivateKey>, shown: Use<'_>) -> Option<Certificate> {
    let certificate = match Certificate::read(&item.file()?) {
        Ok(certificate) => certificate,
        Err(error) => return item.reject(Chain(&error).to_string()),
    };
    if key.is_some_and(|key| key.public() != *certificate.subject()) {
        return item.reject(format!("this certificate is for another key than {beside}"));
    }
    let wrong = match certificate.judge_apart_from_trust(shown, Timestamp::now()) {
        Ok(()) | Err(Flaw::Expired | Flaw::NotYetValid) => return Some(certificate),
        Err(Flaw::Kind) if beside == "host_key" => "is a user's: a host's is made with `ssh-keygen -h`",
        Err(Flaw::Kind) => "is a host's: a user's is made without `ssh-keygen -h`",
        Err(Flaw::Principal) => "names no principal, and so would count for nobody (`ssh-keygen -n`)",
        Err(Flaw::NoForwarding) => "does not permit port forwarding, without which it is of no use here",
        Err(Flaw::SourceAddress) => "has a source-address, and an agent cannot tell where its gateway is",
        Err(_) => "has a critical option that is not met here",
    };
    item.reject(format!("this certificate {wrong}"))
}

pub(super) fn log(root: &Table<'_>) -> Option<Log> {
    let traces = traces(root);
    let Some(item) = root.optional("log") else { return Some(Log { traces: traces?, ..Log::default() }) };
    let format = item.table()?.optional("format");
    let choices = [("text", LogFormat::Text), ("json", LogFormat::Json)];
    let format = optional(format, |item| item.choice(&choices))?;
    Some(Log { format: format.unwrap_or_default(), traces: traces? })
}

/// The collector that gets traces.
fn traces(root: &Table<'_>) -> Option<Option<Target>> {
    let Some(item) = root.optional("traces") else { return Some(None) };
    let table = item.table()?;
    optional(table.optional("otlp"), |item| {
        let url = item.string()?;
        let Some(place) = url.strip_prefix("http://") else {
            item.fault(
                "this is not http://HOST:PORT: the collector is reached in clear, on this host or in its network",
            );
            return None;
        };
        match place.strip_suffix('/').unwrap_or(place).parse() {
            Ok(target) => Some(target),
            Err(error) => {
                item.fault(format!("this is not http://HOST:PORT: {}", Chain(&error)));
                None
            }
        }
    })
}

fn organisation_id(table: &Table<'_>, ids: &mut Once<OrganisationId>) -> Option<OrganisationId> {
    table.required("id").and_then(|item| {
        let id: OrganisationId = item.parse()?;
        ids.first(id.clone(), &item).then_some(id)
    })
}

/// The host's name, with what a replica's name cannot hold replaced.
fn replica_of_host(table: &Table<'_>) -> Option<ReplicaId> {
    let system = rustix::system::uname();
    let replica = replica_of(&system.nodename().to_string_lossy());
    if replica.is_none() {
        table.fault("replica", "the host has no name that could be used: give one here");
    }
    replica
}

fn replica_of(host: &str) -> Option<ReplicaId> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    let edge = |c: char| !c.is_ascii_alphanumeric();
    let name: String = host.trim().chars().map(|c| if fits(c) { c } else { '-' }).take(ID_MAX).collect();
    ReplicaId::from_str(name.trim_matches(edge)).ok()
}

#[cfg(test)]
mod tests {
    use super::replica_of;

    #[test]
    fn replicas_are_named_after_the_host() {
        for (host, replica) in [
            ("db-host-1\n", Some("db-host-1")),
            ("Node_7.example.com", Some("Node_7.example.com")),
            ("(none)", Some("none")),
            ("bücher", Some("b-cher")),
            ("", None),
            ("---", None),
        ] {
            assert_eq!(replica_of(host).as_ref().map(|id| id.as_str()), replica, "{host}");
        }
        assert_eq!(replica_of(&"a".repeat(200)).map(|id| id.as_str().len()), Some(63));
    }
}

//! Reads the tables of configuration files.

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::Metadata;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use jiff::Timestamp;

use super::audit::audit;
use super::egress::egress;
use super::health::health;
use super::resolver::resolver;
use super::{Log, LogFormat, mutual, trust};
use crate::agent::{Listen, Orchestrator, OrchestratorAuthority};
use crate::chain::Chain;
use crate::document::{Item, Place, Table, read_text_if};
use crate::gateway::Local;
use crate::identity::certificate::{Flaw, Use};
use crate::identity::{AgentName, Certificate, Fingerprint, ID_MAX, OrganisationId, PrivateKey, PublicKey, ReplicaId};
use crate::limits;
use crate::network::{self, Network, Networks};
use crate::policy::deny::Deny;
use crate::policy::pattern::{HostPattern, HostPatternError};
use crate::policy::ports::Ports;
use crate::policy::rule::{Allowlist, AllowlistError, PrincipalPattern, Reach, Rule};
use crate::policy::window::Window;
use crate::secret::{self, Secret};
use crate::target::Target;
use crate::target::{Name, TargetError};
use crate::tls::{Certificates, ClientAuth, ClientOptions, Identity};
use crate::tunnel::admit::penalty::{Exempt, Terms};
use crate::tunnel::connect::url::{GatewayUrl, Ways};
use crate::tunnel::splice::Bounds;
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

/// A principal for whom a key may speak: by name, since no key speaks for another key.
fn asserted(item: &Item<'_>) -> Option<PrincipalPattern> {
    match item.parse()? {
        PrincipalPattern::Key(_) => {
            item.reject("a principal's name or a pattern is wanted: a key without asserts is its own principal")
        }
        pattern @ PrincipalPattern::Pattern(_) => Some(pattern),
    }
}

/// When what a table grants holds; always, if it says nothing.
fn window(table: &Table<'_>) -> Option<Window> {
    let not_before = optional(table.optional("not_before"), Item::timestamp);
    let expires = optional(table.optional("expires"), Item::timestamp);
    let window = Window { not_before: not_before?, expires: expires? };
    if let Err(error) = window.check() {
        table.fault("expires", error.to_string());
        return None;
    }
    Some(window)
}

pub(super) fn allowlist(organisation: &Table<'_>) -> Option<Allowlist> {
    let mut names = Once::new("rule");
    let tables = organisation.tables("allow");
    let mut rules: Vec<(Rule, &Table<'_>)> = Vec::new();
    for table in &tables {
        if let Some(rule) = rule(table, &mut names) {
            match rule.check() {
                Ok(()) => rules.push((rule, table)),
                Err(error) => table.fault(error.key(), Chain(&error).to_string()),
            }
        }
    }
    let complete = rules.len() == tables.len();
    let tables = organisation.tables("deny");
    let denials: Vec<_> = tables.iter().map(|table| deny(table, &mut names)).collect();
    // Rules that contradict each other are taken out one by one, so that the next one is found too.
    let mut consistent = true;
    let allowlist = loop {
        match Allowlist::new(rules.iter().map(|(rule, _)| rule.clone()).collect()) {
            Ok(allowlist) => break (complete && consistent).then_some(allowlist),
            Err(error) => {
                consistent = false;
                let index = error.index();
                // Names were compared above, over the faulty rules too.
                if !matches!(error, AllowlistError::Name { .. }) {
                    rules[index].1.fault("name", Chain(&error).to_string());
                }
                rules.remove(index);
            }
        }
    };
    match allowlist?.denying(denials.into_iter().collect::<Option<_>>()?) {
        Ok(allowlist) => Some(allowlist),
        Err(error) => {
            tables[error.index()].fault("name", Chain(&error).to_string());
            None
        }
    }
}

fn deny(table: &Table<'_>, names: &mut Once<String>) -> Option<Deny> {
    let name = rule_name(table, names);
    let hosts = optional(table.optional("hosts"), |item| item.list(host));
    let addresses = optional(table.optional("addresses"), |item| item.list(network));
    let ports = ports(table);
    let principals = optional(table.optional("principals"), |item| item.list(Item::parse::<PrincipalPattern>));
    let window = window(table);
    let deny = Deny {
        name: name?,
        hosts: hosts?.unwrap_or_default(),
        addresses: addresses?.unwrap_or_default(),
        ports: ports?,
        principals: principals?,
        window: window?,
    };
    if let Err(error) = deny.check() {
        table.fault(error.key(), Chain(&error).to_string());
        return None;
    }
    Some(deny)
}

fn rule_name(table: &Table<'_>, names: &mut Once<String>) -> Option<String> {
    table.required("name").and_then(|item| {
        let name = item.string()?.to_owned();
        names.first(name.clone(), &item).then_some(name)
    })
}

fn ports(table: &Table<'_>) -> Option<Vec<Ports>> {
    table.required("ports")?.list(|item| {
        if item.is_text() {
            return item.parse();
        }
        let port: u16 = item.integer_because(1..=65_535, "or a range as a string, such as \"6000-6010\"")?;
        Ports::try_from(port).ok()
    })
}

fn rule(table: &Table<'_>, names: &mut Once<String>) -> Option<Rule> {
    let name = rule_name(table, names);
    let hosts = table.optional("hosts").map(|item| item.list(host));
    let services = table.optional("services").map(|item| item.list(Item::parse::<Name>));
    let within = table.optional("within").map(|item| item.list(network));
    let addresses = table.optional("addresses").map(|item| item.list(network));
    let reach = match (hosts, services, within, addresses) {
        (Some(hosts), None, Some(within), None) => {
            hosts.zip(within).map(|(hosts, within)| Reach::Hosts { hosts, within })
        }
        (None, Some(services), Some(within), None) => {
            services.zip(within).map(|(services, within)| Reach::Services { services, within })
        }
        (None, None, None, Some(networks)) => networks.map(Reach::Addresses),
        (Some(_), Some(_), _, _) => {
            table.fault("services", "hosts and services in one rule: make two rules of it");
            None
        }
        (Some(_), None, _, Some(_)) | (None, Some(_), _, Some(_)) => {
            let names = if table.optional("hosts").is_some() { "hosts" } else { "services" };
            table.fault("addresses", format!("{names} and addresses in one rule: make two rules of it"));
            None
        }
        (Some(_), None, None, None) => {
            table.fault("within", "this key is missing: hosts needs the networks in which their addresses must lie");
            None
        }
        (None, Some(_), None, None) => {
            table.fault("within", "this key is missing: services needs the networks in which their addresses must lie");
            None
        }
        (None, None, Some(_), _) => {
            let problem = "within belongs to hosts or services; a rule by address has its networks in addresses";
            table.fault("within", problem);
            None
        }
        (None, None, None, None) => {
            let problem = "this rule names nothing: give hosts with within, services with within, or addresses";
            table.fault("hosts", problem);
            None
        }
    };
    let ports = ports(table);
    let principals = optional(table.optional("principals"), |item| item.list(Item::parse::<PrincipalPattern>));
    let window = window(table);
    Some(Rule { name: name?, reach: reach?, ports: ports?, principals: principals?, window: window? })
}

/// Where a gateway listens: plain addresses, and those of which more is said.
fn listeners(root: &Table<'_>, table: &Table<'_>, addresses: &mut Once<SocketAddr>) -> Option<Vec<gateway::Listener>> {
    // Port 0 is another port each time.
    let mut read = |item: &Item<'_>| address(item).filter(|at| at.port() == 0 || addresses.first(*at, item));
    let plain = optional(table.optional("listen"), |item| item.list(&mut read));
    let tables = root.tables("listener");
    if tables.is_empty() && matches!(plain, Some(None)) {
        table.fault("listen", "this key is missing, and there is no [[listener]]: nobody could connect");
        return None;
    }
    let more: Vec<_> = tables
        .iter()
        .map(|table| {
            let address = table.required("address").and_then(|item| read(&item));
            let accept_from = optional(table.optional("accept_from"), networks);
            let balancers = optional(table.optional("proxy_protocol_from"), networks);
            let certificates = optional(table.optional("user_ca"), |item| item.boolean());
            let clients = mutual::client_auth(table);
            let terminators = optional(table.optional("tls_terminated_by"), terminators);
            if let (Some(Some(balancers)), Some(Some(terminators))) = (&balancers, &terminators)
                && balancers.overlap(terminators)
            {
                // Who comes through it without its having ended TLS could write X-Forwarded-For themselves.
                table.fault(
                    "tls_terminated_by",
                    "an address is in proxy_protocol_from too, so that a client could name itself anybody in X-Forwarded-For, and \
                     speak in clear: give what passes connections on and what ends TLS a [[listener]] each",
                );
                return None;
            }
            Some(gateway::Listener {
                address: address?,
                accept_from: accept_from?,
                balancers: balancers?,
                certificates: certificates?.unwrap_or(false),
                client_auth: clients.as_ref()?.0,
                client_trust: clients?.1,
                terminators: terminators?,
            })
        })
        .collect();
    let plain = plain?.unwrap_or_default().into_iter().map(gateway::Listener::plain).map(Some);
    plain.chain(more).collect()
}

/// A certificate is shown in TLS alone, and there is none without one of the gateway's own.
fn refuse_asking_without_tls(root: &Table<'_>, listeners: &[gateway::Listener]) {
    if listeners.iter().all(|listener| listener.client_auth == ClientAuth::Off) {
        return;
    }
    for table in root.tables("listener") {
        let asks = |item: &Item<'_>| item.string().is_some_and(|mode| mode != "off");
        if let Some(item) = table.optional("client_auth").filter(asks) {
            item.fault(
                "clients show certificates in TLS, and without a [[certificate]] of the gateway's own there is none",
            );
        }
    }
}

/// Balancers that end TLS before the gateway: each a few addresses, since whoever is at one of them is believed.
fn terminators(item: &Item<'_>) -> Option<Networks> {
    let networks = item.list(|item| {
        let network: Network = item.parse()?;
        if network.host_bits() <= limits::TERMINATOR_BITS {
            return Some(network);
        }
        item.reject(format!(
            "{network} is more than {} addresses: HTTP in clear, tokens and all, is taken from a balancer that has ended TLS and \
             from nobody else, so name the balancer",
            1 << limits::TERMINATOR_BITS
        ))
    })?;
    Networks::new(networks)
}

/// What clients of TLS are shown.
fn certificates(root: &Table<'_>) -> Option<Option<Certificates>> {
    let tables = root.tables("certificate");
    if let Some(table) = tables.get(limits::TLS_CERTIFICATES_MAX) {
        table.fault("chain", format!("more than {} certificates are not accepted", limits::TLS_CERTIFICATES_MAX));
        return None;
    }
    let identities: Vec<_> = tables
        .iter()
        .map(|table| {
            let (chain, key) = (table.required("chain"), table.required("key"));
            // Both are read, and followed, whatever is wrong with the other.
            let files = (chain.as_ref().and_then(Item::file), key.as_ref().and_then(Item::file));
            let (Some(chain), Some(key), (Some(chain_file), Some(key_file))) = (chain, key, files) else { return None };
            match Identity::read(&chain_file, &key_file) {
                Ok(identity) => Some(identity),
                Err(error) if error.file() == key_file => key.reject(Chain(&error).to_string()),
                Err(error) => chain.reject(Chain(&error).to_string()),
            }
        })
        .collect();
    Some(Certificates::new(identities.into_iter().collect::<Option<_>>()?))
}

/// Networks, at least one.
pub(super) fn networks(item: &Item<'_>) -> Option<Networks> {
    item.list(Item::parse::<Network>).and_then(Networks::new)
}

fn local(
    table: &Table<'_>,
    organisations: Option<&Once<OrganisationId>>,
    addresses: &mut Once<SocketAddr>,
) -> Option<Local> {
    let listen = table.required("listen").and_then(|item| {
        let address = address(&item)?;
        if !address.ip().is_loopback() {
            return item.reject(
                "a plain listener is accepted on loopback only (127.0.0.0/8 or [::1]): whoever reaches it is the principal",
            );
        }
        (address.port() == 0 || addresses.first(address, &item)).then_some(address)
    });
    let agent = table.required("agent").and_then(|item| {
        let name: AgentName = item.parse()?;
        if organisations.is_some_and(|known| !known.0.contains_key(&name.organisation)) {
            return item.reject(format!("no [[organisation]] here has the id {}", name.organisation));
        }
        Some(name)
    });
    let target = table.required("target").and_then(|item| item.parse());
    let principal = table.required("principal").and_then(|item| item.parse());
    Some(Local { listen: listen?, agent: agent?, target: target?, principal: principal? })
}

fn agent_limits(table: &Table<'_>) -> Option<agent::Limits> {
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

fn gateway_limits(table: &Table<'_>) -> Option<gateway::Limits> {
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
pub(super) type Most = (usize, &'static str);

const FORWARDS: Most = (limits::FORWARDS_MAX, "each live forward holds a place in the trail, and this is half of them");
const LINK: Most = (limits::CHANNELS_PER_LINK, "the memory of a link is bounded for so many channels");
const PENDING: Most = (limits::PENDING_OPENS_PER_LINK, "a gateway asks for no more at once");
const SESSIONS: Most = (limits::SESSIONS_MAX, "each session may hold memory of the gateway");
const OPENS: Most = (limits::OPENS_PER_SECOND_MAX as usize, "no trail takes the records of more");

pub(super) fn bound<T: TryFrom<i64>>(table: &Table<'_>, key: &str, default: T, (most, why): Most) -> Option<T> {
    let range = 1..=i64::try_from(most).unwrap_or(i64::MAX);
    match table.optional(key) {
        Some(item) => item.integer_because(range, &format!("0 would refuse everything, and {why}")),
        None => Some(default),
    }
}

/// How long forwards may go on. 0 is no limit, as is leaving it out.
pub(super) fn forward_bounds(table: &Table<'_>) -> Option<Bounds> {
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
pub(super) fn drain(table: &Table<'_>) -> Option<Duration> {
    let longest = i64::try_from(limits::DRAIN_MAX.as_secs()).unwrap_or(i64::MAX);
    let seconds = optional(table.optional("drain_s"), |item| item.integer::<u32>(0..=longest))?;
    Some(seconds.map_or(limits::DRAIN, |seconds| Duration::from_secs(seconds.into())))
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

/// Reads a file that only its owner can read. `what` says what is in it.
pub(super) fn secret_file(item: &Item<'_>, what: &str) -> Option<Secret<String>> {
    let path = item.file()?;
    let private = |metadata: &Metadata| {
        let (path, mode) = (path.display(), metadata.mode() & 0o7777);
        if secret::is_private(metadata) {
            return Ok(());
        }
        Err(format!("can be read by others (mode {mode:04o}): run `chmod 600 {path}`"))
    };
    match read_text_if(&path, private) {
        Ok(text) => Some(Secret::new(text)),
        Err(faults) => item.reject(format!("{what} file {faults}")),
    }
}

fn organisation_id(table: &Table<'_>, ids: &mut Once<OrganisationId>) -> Option<OrganisationId> {
    table.required("id").and_then(|item| {
        let id: OrganisationId = item.parse()?;
        ids.first(id.clone(), &item).then_some(id)
    })
}

pub(super) fn private_key(item: &Item<'_>) -> Option<PrivateKey> {
    match PrivateKey::read(&item.file()?) {
        Ok(key) => Some(key),
        Err(error) => item.reject(Chain(&error).to_string()),
    }
}

fn public_key(item: &Item<'_>) -> Option<PublicKey> {
    match PublicKey::parse(item.string()?) {
        Ok(key) => Some(key),
        Err(error) => item.reject(format!("this {}", Chain(&error))),
    }
}

pub(super) fn address(item: &Item<'_>) -> Option<SocketAddr> {
    match item.string()?.parse() {
        Ok(address) => Some(address),
        Err(_) => item.reject("an address with a port is wanted, such as 0.0.0.0:443 or [::]:443"),
    }
}

fn host(item: &Item<'_>) -> Option<HostPattern> {
    match item.string()?.parse() {
        Ok(pattern) => Some(pattern),
        Err(HostPatternError::Numeric | HostPatternError::Name(TargetError::Numeric)) => {
            item.reject("a name is wanted, and this is or looks like an address: make a rule with addresses")
        }
        Err(error) => item.reject(error.to_string()),
    }
}

pub(super) fn network(item: &Item<'_>) -> Option<IpNet> {
    let text = item.string()?;
    if let Some(network) = network::parse(text) {
        return Some(network);
    }
    match text.parse::<IpAddr>() {
        Ok(address) => item.reject(format!("a network is wanted: write {} for this one address", IpNet::from(address))),
        Err(_) => item.reject("a network is wanted, such as 10.20.0.0/16 or 2001:db8::/32"),
    }
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

/// Reads something optional: `Some(None)` if it is absent, `None` if it is wrong.
pub(super) fn optional<'a, T>(item: Option<Item<'a>>, read: impl FnOnce(&Item<'a>) -> Option<T>) -> Option<Option<T>> {
    match item {
        Some(item) => read(&item).map(Some),
        None => Some(None),
    }
}

/// Things of which each may be there once.
pub(super) struct Once<T>(HashMap<T, Place>, &'static str);

impl<T: Eq + Hash + Display> Once<T> {
    pub(super) fn new(what: &'static str) -> Self {
        Self(HashMap::new(), what)
    }

    /// Whether this is the first of its kind; if it is not, that is recorded as a fault.
    pub(super) fn first(&mut self, thing: T, item: &Item<'_>) -> bool {
        if let Some(first) = self.0.get(&thing) {
            // A name that we did not check may hold anything.
            let name = thing.to_string();
            item.fault(format!("{} {} is there already, at {first}", self.1, name.escape_debug()));
            return false;
        }
        self.0.insert(thing, item.place().clone());
        true
    }
}

/// The keys of one configuration, each of which has one use.
#[derive(Default)]
struct Keys(HashMap<Fingerprint, (String, Place)>);

impl Keys {
    /// Notes what a key is used for; a second use is recorded as a fault.
    fn claim(&mut self, key: Fingerprint, used_as: &str, item: &Item<'_>) {
        match self.0.get(&key) {
            Some((other, first)) => {
                item.fault(format!(
                    "this key is {other} too (at {first}): each use and each organisation needs its own"
                ));
            }
            None => {
                self.0.insert(key, (used_as.to_owned(), item.place().clone()));
            }
        }
    }
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

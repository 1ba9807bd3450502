//! Reads the file of `caponier provision`.

use super::Provisioning;
use super::egress::egress;
use super::file::{optional, private_key, secret_file};
use super::trust;
use crate::chain::Chain;
use crate::client::{self, Pin, Server, User};
use crate::document::{Item, Table};
use crate::identity::AgentName;
use crate::postgres::{Identifier, NameError};
use crate::provision::{Database, Extension, Grant, Grantee, Instance, Output, Privilege, Resources, Role, SetId, Tls};
use crate::secret::Secret;
use crate::target::{Host, Target};
use crate::tls::{self, ClientOptions};
use crate::tunnel::connect::url::GatewayUrl;

/// Reads a resources file. `None` if something was wrong, which is then recorded as a fault.
pub(super) fn resources(root: &Table<'_>) -> Option<Provisioning> {
    let client = root.required_table("provision").map(|table| provision(&table));
    let instance = root.required_table("instance").and_then(|table| instance(&table));
    let databases: Vec<_> = root.tables("database").iter().map(database).collect();
    let roles: Vec<_> = root.tables("role").iter().map(role).collect();
    let (client, id, output) = client?;
    let resources = Resources {
        id: id?,
        instance: instance?,
        databases: databases.into_iter().collect::<Option<_>>()?,
        roles: roles.into_iter().collect::<Option<_>>()?,
        output: output?,
    };
    for (key, problem) in resources.faults() {
        record(root, &key, &problem);
    }
    Some(Provisioning { client: client?, resources })
}

type Provision = (Option<client::Config>, Option<SetId>, Option<Output>);

fn provision(table: &Table<'_>) -> Provision {
    let server = server(table);
    let key = table.required("identity").and_then(|item| private_key(&item));
    let pin = pin(table, server.as_ref());
    let egress = egress(table);
    let tls = trust::options(table, &ClientOptions::default()).and_then(|options| {
        let url = server.iter().filter_map(Server::url);
        trust::ready(table, "gateway", options, url)
    });
    let id = match (table.optional("id"), &server) {
        (Some(item), _) => item.parse(),
        // An agent's name always is one.
        (None, Some(Server::Gateway { agent, .. })) => agent.to_string().parse().ok(),
        (None, Some(Server::Bastion { .. })) => {
            let problem = "this key is missing: without an agent's name, whose these resources are must be said";
            table.fault("id", problem);
            None
        }
        (None, None) => None,
    };
    let output = table.required("output").and_then(|item| match item.string()? {
        "-" => Some(Output::Stdout),
        _ => item.path().map(Output::File),
    });
    let config = || {
        let (server, key, pin) = (server?, key?, pin?);
        Some(client::Config { server, key, certificate: None, pin, egress: egress?, tls: tls? })
    };
    (config(), id, output)
}

/// The one way there: through a gateway and an agent, or through a bastion.
fn server(table: &Table<'_>) -> Option<Server> {
    let ours: Vec<_> = ["gateway", "agent"].into_iter().filter_map(|key| table.optional(key)).collect();
    let bastions: Vec<_> =
        ["ssh_host", "ssh_port", "ssh_user", "principal"].into_iter().filter_map(|key| table.optional(key)).collect();
    match (&ours[..], &bastions[..]) {
        ([], []) => {
            let problem = "this key is missing: give gateway and agent, or ssh_host and ssh_user for an SSH bastion";
            table.fault("gateway", problem);
            None
        }
        ([_, ..], [bastion, ..]) => {
            bastion.reject("this belongs to an SSH bastion, and there is a gateway too: choose one of the two ways")
        }
        (_, []) => {
            let url = table.required("gateway").and_then(|item| item.parse::<GatewayUrl>());
            let agent = table.required("agent").and_then(|item| item.parse::<AgentName>());
            Some(Server::Gateway { url: url?, agent: agent? })
        }
        ([], _) => {
            let host = table.required("ssh_host").and_then(|item| item.parse::<Host>());
            let port = optional(table.optional("ssh_port"), |item| item.integer::<u16>(1..=65_535));
            let user = table.required("ssh_user").and_then(|item| item.parse::<User>());
            let principal = optional(table.optional("principal"), |item| item.parse());
            let endpoint = Target { host: host?, port: port?.unwrap_or(client::SSH_PORT) };
            Some(Server::Bastion { endpoint, user: user?, principal: principal? })
        }
    }
}

fn pin(table: &Table<'_>, server: Option<&Server>) -> Option<Pin> {
    match (table.optional("known_hosts"), table.optional("host_key_fingerprint")) {
        (Some(item), None) => {
            let path = item.path()?;
            match Pin::known_hosts(&path, server?.target()) {
                Ok(pin) => Some(pin),
                Err(error) => item.reject(Chain(&error).to_string()),
            }
        }
        (None, Some(item)) => item.parse().map(Pin::fingerprint),
        (Some(_), Some(item)) => item.reject("known_hosts is given too: choose one of the two"),
        (None, None) => {
            let problem = "this key is missing: give known_hosts, or host_key_fingerprint; no server is trusted unseen";
            table.fault("known_hosts", problem);
            None
        }
    }
}

fn instance(table: &Table<'_>) -> Option<Instance> {
    let host = table.required("host").and_then(|item| item.parse::<Host>());
    let port = optional(table.optional("port"), |item| item.integer::<u16>(1..=65_535));
    let database = match table.optional("database") {
        Some(item) => existing(&item),
        None => Identifier::new("postgres").ok(),
    };
    let user = table.required("user").and_then(|item| existing(&item));
    let password = password(table);
    let suffix = login_suffix(table, host.as_ref(), user.as_ref());
    let tls = encryption(table, host.as_ref());
    Some(Instance {
        target: Target { host: host?, port: port?.unwrap_or(POSTGRESQL_PORT) },
        database: database?,
        user: user?,
        password: password?,
        login_suffix: suffix?,
        tls: tls?,
    })
}

/// What Azure's single servers want behind every user: `@` and the first label of the host, which is the server's name.
fn login_suffix(table: &Table<'_>, host: Option<&Host>, user: Option<&Identifier>) -> Option<Option<String>> {
    let Some(item) = table.optional("append_host_to_user") else { return Some(None) };
    if !item.boolean()? {
        return Some(None);
    }
    let Host::Name(name) = host? else {
        return item.reject("the host is an address, which has no server's name in it: give the host by name");
    };
    let name = name.to_string();
    let suffix = format!("@{}", name.split('.').next().unwrap_or_default());
    if user?.as_str().ends_with(&suffix) {
        return item.reject("user has the server's name already, which this appends: give it without");
    }
    Some(Some(suffix))
}

/// The administrator's password, if there is one: from the environment, or else from a file of its own.
fn password(table: &Table<'_>) -> Option<Option<Secret<String>>> {
    let file = table.optional("password_file");
    match table.optional("password") {
        Some(item) if item.set_by_variable() => item.secret().map(Some),
        Some(item) => item
            .reject("a password does not belong in this file: set CAPONIER_DATABASE_PASSWORD, or name a password_file"),
        None => optional(file, |item| {
            let text = secret_file(item, "password")?;
            let line = text.expose().trim_end_matches(['\r', '\n']);
            if line.is_empty() || line.contains(['\r', '\n', '\0']) {
                return item.reject("the password file must hold one line, the password");
            }
            Some(Secret::new(line.to_owned()))
        }),
    }
}

fn encryption(table: &Table<'_>, host: Option<&Host>) -> Option<Tls> {
    let verify = optional(table.optional("tls"), |item| item.choice(&[("verify-full", true), ("disable", false)]));
    let name = table.optional("tls_name");
    let ca_file = table.optional("ca_file");
    if !verify?.unwrap_or(true) {
        for item in [&name, &ca_file].into_iter().flatten() {
            item.fault("this has no use with tls = \"disable\"");
        }
        return (name.is_none() && ca_file.is_none()).then_some(Tls::Disable);
    }
    let name = optional(name, |item| match item.string()? {
        name if tls::is_server_name(name) => Some(name.to_owned()),
        _ => item.reject("a DNS name or an address is wanted, as it stands in the server's certificate"),
    });
    let ca_file = optional(ca_file, |item| {
        let path = item.path()?;
        match tls::client(Some(&path)) {
            Ok(_) => Some(path),
            Err(error) => item.reject(Chain(&error).to_string()),
        }
    });
    let name = name?;
    if let (None, Some(host)) = (&name, host)
        && !tls::is_server_name(&host.to_string())
    {
        table.fault("tls_name", "this key is missing: no certificate can have the name in host");
        return None;
    }
    Some(Tls::VerifyFull { name, ca_file: ca_file? })
}

fn database(table: &Table<'_>) -> Option<Database> {
    let name = table.required("name").and_then(|item| fresh(&item));
    let owner = match table.optional("owner") {
        Some(item) => fresh(&item),
        None => name.clone(),
    };
    let template = optional(table.optional("template"), existing);
    let encoding = optional(table.optional("encoding"), |item| {
        let text = item.string()?;
        let plain = text.len() <= 32 && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
        if plain { Some(text.to_owned()) } else { item.reject("an encoding of PostgreSQL is wanted, such as UTF8") }
    });
    let limit = optional(table.optional("connection_limit"), |item| item.integer(-1..=i64::from(i32::MAX)));
    let extensions: Vec<_> = table.tables("extension").iter().map(extension).collect();
    let grants: Vec<_> = table.tables("grant").iter().map(grant).collect();
    Some(Database {
        name: name?,
        owner: owner?,
        template: template?,
        encoding: encoding?,
        connection_limit: limit?,
        extensions: extensions.into_iter().collect::<Option<_>>()?,
        grants: grants.into_iter().collect::<Option<_>>()?,
    })
}

fn extension(table: &Table<'_>) -> Option<Extension> {
    let name = table.required("name").and_then(|item| existing(&item));
    let schema = optional(table.optional("schema"), existing);
    let version = optional(table.optional("version"), |item| {
        let text = item.string()?;
        let plain = text.len() <= 63 && !text.chars().any(char::is_control);
        if plain {
            Some(text.to_owned())
        } else {
            item.reject("a version is at most 63 bytes without control characters")
        }
    });
    Some(Extension { name: name?, schema: schema?, version: version? })
}

fn grant(table: &Table<'_>) -> Option<Grant> {
    let to = table.required("role").and_then(|item| match item.string()? {
        "public" => Some(Grantee::Public),
        _ => existing(&item).map(Grantee::Role),
    });
    let schema = optional(table.optional("schema"), existing);
    let privileges = table.required("privileges").and_then(|item| item.list(Item::parse::<Privilege>));
    Some(Grant { to: to?, schema: schema?, privileges: privileges? })
}

fn role(table: &Table<'_>) -> Option<Role> {
    let name = table.required("name").and_then(|item| fresh(&item));
    let member_of = optional(table.optional("member_of"), |item| item.list(existing));
    Some(Role { name: name?, member_of: member_of?.unwrap_or_default() })
}

/// The name of something that may exist already.
fn existing(item: &Item<'_>) -> Option<Identifier> {
    accept(item, Identifier::new(item.string()?))
}

/// The name of something that we make.
fn fresh(item: &Item<'_>) -> Option<Identifier> {
    accept(item, Identifier::fresh(item.string()?))
}

fn accept(item: &Item<'_>, name: Result<Identifier, NameError>) -> Option<Identifier> {
    match name {
        Ok(name) => Some(name),
        Err(error) => item.reject(error.to_string()),
    }
}

/// Records a fault at a key such as `database[0].grant[1].privileges`.
fn record(root: &Table<'_>, key: &str, problem: &str) {
    let mut table = root.clone();
    let mut rest = key;
    while let Some((step, after)) = rest.split_once('.') {
        let element = step.trim_end_matches(']').split_once('[');
        let element = element.and_then(|(name, index)| table.tables(name).into_iter().nth(index.parse().ok()?));
        let Some(element) = element else { break };
        (table, rest) = (element, after);
    }
    table.fault(rest, problem);
}

/// IANA's port for PostgreSQL.
const POSTGRESQL_PORT: u16 = 5432;

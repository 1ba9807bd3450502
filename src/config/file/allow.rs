//! What an organisation's table in an agent's configuration allows and denies.

use super::value::{Once, host, network, optional};
use crate::chain::Chain;
use crate::document::{Item, Table};
use crate::policy::deny::Deny;
use crate::policy::ports::Ports;
use crate::policy::rule::{Allowlist, AllowlistError, PrincipalPattern, Reach, Rule};
use crate::policy::window::Window;
use crate::target::Name;

/// A principal for whom a key may speak: by name, since no key speaks for another key.
pub(super) fn asserted(item: &Item<'_>) -> Option<PrincipalPattern> {
    match item.parse()? {
        PrincipalPattern::Key(_) => {
            item.reject("a principal's name or a pattern is wanted: a key without asserts is its own principal")
        }
        pattern @ PrincipalPattern::Pattern(_) => Some(pattern),
    }
}

/// When what a table grants holds; always, if it says nothing.
pub(super) fn window(table: &Table<'_>) -> Option<Window> {
    let not_before = optional(table.optional("not_before"), Item::timestamp);
    let expires = optional(table.optional("expires"), Item::timestamp);
    let window = Window { not_before: not_before?, expires: expires? };
    if let Err(error) = window.check() {
        table.fault("expires", error.to_string());
        return None;
    }
    Some(window)
}

pub(in crate::config) fn allowlist(organisation: &Table<'_>) -> Option<Allowlist> {
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

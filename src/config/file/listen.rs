//! Where a gateway listens, what clients of TLS are shown there, and its loopback doors.

use std::net::SocketAddr;

use super::value::{Once, address, networks, optional};
use crate::chain::Chain;
use crate::config::mutual;
use crate::document::{Item, Table};
use crate::gateway::{self, Local};
use crate::identity::{AgentName, OrganisationId};
use crate::limits;
use crate::network::{Network, Networks};
use crate::tls::{Certificates, ClientAuth, Identity};

/// Where a gateway listens: plain addresses, and those of which more is said.
pub(super) fn listeners(
    root: &Table<'_>,
    table: &Table<'_>,
    addresses: &mut Once<SocketAddr>,
) -> Option<Vec<gateway::Listener>> {
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
pub(super) fn refuse_asking_without_tls(root: &Table<'_>, listeners: &[gateway::Listener]) {
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
pub(super) fn certificates(root: &Table<'_>) -> Option<Option<Certificates>> {
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

pub(super) fn local(
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

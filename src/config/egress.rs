//! Reads how a program leaves its network: `proxy` and the keys beside it, and the environment that other programs go by.

use std::path::Path;

use super::file::{optional, secret_file};
use crate::chain::Chain;
use crate::document::{Document, Item, Table};
use crate::tls::TlsError;
use crate::tunnel::connect::Egress;
use crate::tunnel::connect::bypass::Bypass;
use crate::tunnel::connect::proxy::{Credentials, Proxy, Scheme};

/// The variable that names an agent's proxy alone, above the file.
pub(super) const AGENT_PROXY: &str = "AGENT_PROXY";

/// Names a proxy for all programs, where nothing else does; the first that is set counts.
const HTTPS_PROXY: [&str; 2] = ["HTTPS_PROXY", "https_proxy"];

/// What all programs reach without it.
const NO_PROXY: [&str; 2] = ["NO_PROXY", "no_proxy"];

/// What says in the place of a proxy that there is none.
const NONE: &str = "none";

/// Whether a variable without our prefix means anything to a program that leaves its network.
pub(super) fn is_known(variable: &str) -> bool {
    variable == AGENT_PROXY || HTTPS_PROXY.contains(&variable) || NO_PROXY.contains(&variable)
}

/// Sets the keys in `table` from variables without our prefix; what has it comes later, and takes precedence.
pub(super) fn overlay(document: &mut Document, table: &str, prefix: &str, settings: &mut Vec<(String, String)>) {
    let ours = |key: &str| format!("{prefix}_{}__{key}", table.to_ascii_uppercase());
    // As proxy variables elsewhere, an empty one counts as absent.
    let empty = [ours("PROXY"), ours("NO_PROXY")];
    settings.retain(|(variable, value)| !value.is_empty() || !(is_known(variable) || empty.contains(variable)));
    if !document.has_in(table, "proxy")
        && let Some((variable, url)) = first(&HTTPS_PROXY, settings)
    {
        document.overlay(table, "proxy", variable, with_scheme(url));
    }
    if table == "agent"
        && let Some((variable, url)) = first(&[AGENT_PROXY], settings)
    {
        document.overlay(table, "proxy", variable, url.to_owned());
    }
    let listed = settings.iter().any(|(variable, _)| variable.starts_with(&ours("NO_PROXY")));
    if !document.has_in(table, "no_proxy")
        && !listed
        && let Some((variable, list)) = first(&NO_PROXY, settings)
    {
        document.overlay(table, "no_proxy", variable, list.to_owned());
    }
}

fn first<'a>(names: &[&'static str], settings: &'a [(String, String)]) -> Option<(&'static str, &'a str)> {
    let of = |name: &&'static str| {
        let setting = settings.iter().find(|(variable, _)| variable == name)?;
        Some((*name, setting.1.as_str()))
    };
    names.iter().find_map(of)
}

/// Other programs take a proxy without a scheme for one of `http://`.
fn with_scheme(url: &str) -> String {
    if url.contains("://") { url.to_owned() } else { format!("http://{url}") }
}

/// The way out: the proxy, whose credentials may stand in its URL or in a file of their own, and what does without it.
pub(super) fn egress(table: &Table<'_>) -> Option<Egress> {
    let item = table.optional("proxy");
    let proxy = match &item {
        Some(item) if item.string()? != NONE => item.parse::<Proxy>().map(Some),
        _ => Some(None),
    };
    let off = item.is_some() && matches!(proxy, Some(None));
    let credentials = optional(table.optional("proxy_credentials_file"), credentials);
    let ca = table.optional("proxy_ca_file");
    let ca_file = optional(ca.clone(), Item::file);
    let listed = table.optional("no_proxy");
    // What the environment says for other programs is of no concern where there is no proxy.
    let wanted = listed.filter(|item| !(item.set_by_variable() && matches!(proxy, Some(None))));
    let no_proxy = optional(wanted, bypass);
    let (proxy, credentials, ca_file, no_proxy) = (proxy?, credentials?, ca_file?, no_proxy?.unwrap_or_default());
    let missing = |key: &str, what: &str| {
        table.fault(key, format!("{what} without a proxy: give proxy = \"http://HOST:PORT\" too"));
        None
    };
    let proxy = match (proxy, credentials) {
        (Some(Proxy { credentials: Some(_), .. }), Some(_)) => {
            table.fault("proxy_credentials_file", "proxy holds credentials too: choose one of the two");
            return None;
        }
        (Some(proxy), Some(credentials)) => match proxy.with(credentials) {
            Ok(proxy) => Some(proxy),
            Err(error) => {
                table.fault("proxy_credentials_file", Chain(&error).to_string());
                return None;
            }
        },
        (None, Some(_)) if !off => return missing("proxy_credentials_file", "credentials"),
        (proxy, _) => proxy,
    };
    match (&ca, &proxy) {
        (Some(_), None) if !off => return missing("proxy_ca_file", "authorities"),
        (Some(ca), Some(proxy)) if proxy.scheme != Scheme::Https => {
            return ca.reject(format!("this is for a proxy of https://, and there is one of {}://", proxy.scheme));
        }
        _ => {}
    }
    match Egress::new(proxy, no_proxy, ca_file.as_deref()) {
        Ok(egress) => Some(egress),
        Err(error) => {
            table.fault(if ca.is_some() { "proxy_ca_file" } else { "proxy" }, Chain(&error).to_string());
            None
        }
    }
}

/// What is reached without the proxy: a list, or a text as the environment has it. An empty list is nothing.
fn bypass(item: &Item<'_>) -> Option<Bypass> {
    let bypass = if item.is_text() {
        item.string()?.parse()
    } else {
        let items = item.items();
        if items.is_empty() && !item.is_list() {
            return None;
        }
        let entries: Vec<_> = items.iter().map(Item::parse).collect();
        Bypass::new(entries.into_iter().collect::<Option<_>>()?)
    };
    match bypass {
        Ok(bypass) => Some(bypass),
        Err(error) => item.reject(error.to_string()),
    }
}

/// Reads `USER:PASSWORD` from a file that only its owner can read.
fn credentials(item: &Item<'_>) -> Option<Credentials> {
    let text = secret_file(item, "credentials")?;
    let line = text.expose().trim_end_matches(['\r', '\n']);
    match Credentials::from_line(line) {
        Ok(credentials) => Some(credentials),
        Err(_) => item.reject(format!(
            "credentials file {} must hold one line USER:PASSWORD, as it is, without control characters",
            item.path()?.display()
        )),
    }
}

/// Why what a command was told of its way out cannot be used. A URL is never repeated.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// The proxy.
    #[error("{from}")]
    Proxy {
        /// Where it was said.
        from: String,
        /// Why.
        #[source]
        source: crate::tunnel::connect::proxy::ProxyUrlError,
    },
    /// A password where everybody can read it.
    #[error("--proxy: credentials on the command line can be read by everybody on this machine: put the URL into {0}")]
    Exposed(String),
    /// What does without it.
    #[error("{from}")]
    NoProxy {
        /// Where it was said.
        from: String,
        /// Why.
        #[source]
        source: crate::tunnel::connect::bypass::BypassError,
    },
    /// The authorities.
    #[error("--proxy-ca-file is for a proxy of https://, and there is none")]
    NoHttps,
    /// The authorities cannot be used.
    #[error(transparent)]
    Authorities(#[from] TlsError),
}

/// The way out of a command. Of the proxies that are named, the argument's counts before that of `variable`, and that before
/// `HTTPS_PROXY`; of the lists, the argument's before `NO_PROXY`.
///
/// # Errors
/// If one of those that count is not well formed, or the authorities cannot be read.
pub fn egress_of_command(
    proxy: Option<&str>,
    no_proxy: Option<&str>,
    ca_file: Option<&Path>,
    variable: &str,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Egress, EgressError> {
    let set = |names: &[&str]| {
        let value = |name: &&str| environment(name).filter(|value| !value.is_empty());
        names.iter().find_map(|name| value(name).map(|value| ((*name).to_owned(), value)))
    };
    let argument = proxy.filter(|text| !text.is_empty());
    let (from, url) = match argument {
        Some(url) => ("--proxy".to_owned(), Some(url.to_owned())),
        None => match set(&[variable]) {
            Some((from, url)) => (from, Some(url)),
            None => set(&HTTPS_PROXY).map_or_else(Default::default, |(from, url)| (from, Some(with_scheme(&url)))),
        },
    };
    let parsed = url.filter(|url| url != NONE).map(|url| url.parse::<Proxy>()).transpose();
    let proxy = parsed.map_err(|source| EgressError::Proxy { from, source })?;
    if argument.is_some() && proxy.as_ref().is_some_and(|proxy| proxy.credentials.is_some()) {
        return Err(EgressError::Exposed(variable.to_owned()));
    }
    let list = match no_proxy {
        Some(list) => Some(("--no-proxy".to_owned(), list.to_owned())),
        None => set(&NO_PROXY).filter(|_| proxy.is_some()),
    };
    let bypass = match list {
        Some((from, list)) => list.parse().map_err(|source| EgressError::NoProxy { from, source })?,
        None => Bypass::default(),
    };
    if ca_file.is_some() && proxy.as_ref().is_some_and(|proxy| proxy.scheme != Scheme::Https) {
        return Err(EgressError::NoHttps);
    }
    Ok(Egress::new(proxy, bypass, ca_file)?)
}

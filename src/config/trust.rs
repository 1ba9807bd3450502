//! Reads how TLS is made with gateways: whose certificates count there, and what is shown to them.

use super::file::optional;
use crate::chain::Chain;
use crate::document::{Item, Table};
use crate::tls::{self, ClientOptions, Identity};
use crate::tunnel::connect::url::GatewayUrl;
use crate::tunnel::dial::Tls;

/// What a table says of it, and what it leaves to `otherwise`.
pub(super) fn options(table: &Table<'_>, otherwise: &ClientOptions) -> Option<ClientOptions> {
    let ca_file = optional(table.optional("tls_ca_file"), |item: &Item<'_>| {
        let path = item.file()?;
        match tls::client(Some(&path)) {
            Ok(_) => Some(path),
            Err(error) => item.reject(Chain(&error).to_string()),
        }
    });
    let (certificate, key) = (table.optional("tls_certificate"), table.optional("tls_key"));
    let identity = match (certificate, key) {
        (None, None) => otherwise.identity.clone(),
        (Some(certificate), Some(key)) => Some(identity(&certificate, &key)?),
        (Some(certificate), None) => return certificate.reject("a certificate without its key: give tls_key too"),
        (None, Some(key)) => return key.reject("a key without its certificate: give tls_certificate too"),
    };
    let ca_files = ca_file?.map_or_else(|| otherwise.ca_files.clone(), |path| vec![path]);
    Some(ClientOptions { ca_files, identity, ..otherwise.clone() })
}

/// A certificate of this end with its key. That its time is over, or yet to come, is no fault: it may be renewed while the
/// agent runs, and who trusts it says so.
fn identity(certificate: &Item<'_>, key: &Item<'_>) -> Option<Identity> {
    let (chain, key) = (certificate.file(), key.file());
    match Identity::read(&chain?, &key?) {
        Ok(identity) => Some(identity),
        Err(error) => certificate.reject(Chain(&error).to_string()),
    }
}

/// Makes it ready, if there is TLS on any of these ways. What is wrong with the system's authorities is a fault of `key`.
pub(super) fn ready<'a>(
    table: &Table<'_>,
    key: &str,
    options: ClientOptions,
    ways: impl IntoIterator<Item = &'a GatewayUrl>,
) -> Option<Option<Tls>> {
    if !ways.into_iter().any(|url| url.transport().is_tls()) {
        return Some(None);
    }
    match Tls::new(options) {
        Ok(tls) => Some(Some(tls)),
        Err(error) => {
            table.fault(key, Chain(&error).to_string());
            None
        }
    }
}

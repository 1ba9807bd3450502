//! Reads where audit collectors are and how they are spoken to: `[[audit.sink]]` of the kinds `syslog` and `https`.

use super::file::optional;
use crate::audit::sink::deliver::{Place, Tls, TlsFiles, TlsFilesError};
use crate::audit::sink::{https, syslog};
use crate::chain::Chain;
use crate::document::{Item, Table};
use crate::limits;
use crate::target::Target;
use crate::tunnel::connect::proxy::Proxy;

/// A sink of the kind `syslog`.
pub(super) fn syslog(table: &Table<'_>) -> Option<syslog::Config> {
    let to = table.required("to").and_then(|item| {
        let text = item.string()?;
        let (tls, place) = match (text.strip_prefix("tls://"), text.strip_prefix("tcp://")) {
            (Some(place), _) => (true, place),
            (None, Some(place)) => (false, place),
            (None, None) => return item.reject("this is written tls://HOST:PORT, or tcp://HOST:PORT for clear text"),
        };
        match place.parse::<Target>() {
            Ok(target) => Some((target, tls)),
            Err(error) => item.reject(Chain(&error).to_string()),
        }
    });
    let facility = optional(table.optional("facility"), Item::parse);
    let hostname = optional(table.optional("hostname"), Item::parse);
    let place = place(table, to, "to = \"tls://…\"");
    Some(syslog::Config { place: place?, facility: facility?.unwrap_or_default(), hostname: hostname? })
}

/// A sink of the kind `https`.
pub(super) fn https(table: &Table<'_>, required: bool) -> Option<https::Config> {
    let url = table.required("url").and_then(|item| match item.string()?.parse::<https::Url>() {
        Ok(url) => Some(url),
        Err(error) => item.reject(error.to_string()),
    });
    let token = optional(table.optional("token_file"), |item| {
        https::Token::read(item.file()?).map_or_else(|error| item.reject(error.to_string()), Some)
    });
    let formats = [("caponier", https::Format::Caponier), ("ocsf", https::Format::Ocsf)];
    let format = optional(table.optional("format"), |item| item.choice(&formats));
    let records = optional(table.optional("batch_records"), |item| {
        item.integer::<usize>(1..=i64::try_from(limits::HTTPS_RECORDS_MAX).unwrap_or(i64::MAX))
    });
    let linger = optional(table.optional("batch_ms"), |item| {
        item.integer::<u64>(0..=i64::try_from(limits::HTTPS_LINGER_MAX.as_millis()).unwrap_or(i64::MAX))
    });
    let to = url.clone().map(|url| (url.to, url.tls));
    let place = place(table, to, "url = \"https://…\"");
    let usual = if required { std::time::Duration::ZERO } else { limits::HTTPS_LINGER };
    Some(https::Config {
        place: place?,
        path: url?.path,
        token: token?,
        format: format?.unwrap_or_default(),
        records: records?.unwrap_or(limits::HTTPS_RECORDS),
        linger: linger?.map_or(usual, std::time::Duration::from_millis),
    })
}

/// How a collector is reached: `to` says where it is, and whether with TLS, which is written like `secured`.
fn place(table: &Table<'_>, to: Option<(Target, bool)>, secured: &str) -> Option<Place> {
    let ca = table.optional("ca_file");
    let ca_file = optional(ca.clone(), Item::file);
    let (chain, key) = (table.optional("certificate"), table.optional("key"));
    // Both are read, and followed, whatever is wrong with the other.
    let files = (optional(chain.clone(), Item::file), optional(key.clone(), Item::file));
    let proxy = optional(table.optional("proxy"), |item| {
        let proxy = item.secret()?;
        match proxy.expose().parse::<Proxy>() {
            Ok(_) => Some(proxy),
            Err(error) => item.reject(Chain(&error).to_string()),
        }
    });
    let (to, with_tls) = to?;
    if !with_tls {
        for key in ["ca_file", "certificate", "key"] {
            if let Some(item) = table.optional(key) {
                return item.reject(format!("this is for TLS, and there is none: write {secured}"));
            }
        }
        return Some(Place { to, tls: None, proxy: proxy? });
    }
    let identity = match (&chain, &key, files) {
        (None, None, _) => None,
        (Some(_), Some(_), (Some(Some(chain_file)), Some(Some(key_file)))) => Some((chain_file, key_file)),
        (Some(_), None, _) => {
            table.fault("key", "a certificate without its key: give both, or neither");
            return None;
        }
        (None, Some(_), _) => {
            table.fault("certificate", "a key without its certificate: give both, or neither");
            return None;
        }
        (Some(_), Some(_), _) => return None,
    };
    let files = TlsFiles { ca_file: ca_file?, identity };
    match Tls::read(files.clone()) {
        Ok(tls) => Some(Place { to, tls: Some(tls), proxy: proxy? }),
        Err(TlsFilesError::Identity(error)) => {
            let is_key = files.identity.is_some_and(|(_, key_file)| error.file() == key_file);
            let item = if is_key { key } else { chain };
            item?.reject(Chain(&error).to_string())
        }
        Err(TlsFilesError::Authorities(error)) => {
            table.fault("ca_file", Chain(&error).to_string());
            None
        }
    }
}

//! Reads whether clients show TLS certificates at a listener, and whose.

use super::file::optional;
use crate::chain::Chain;
use crate::document::{Item, Table, read_text};
use crate::tls::{ClientAuth, Trust, judge};

/// What a listener says of its clients' certificates.
pub(super) fn client_auth(table: &Table<'_>) -> Option<(ClientAuth, Trust)> {
    client_auth_or(table, None)
}

/// As [`client_auth`], where something else than `off` is meant if nothing is said.
pub(super) fn client_auth_or(table: &Table<'_>, unsaid: Option<ClientAuth>) -> Option<(ClientAuth, Trust)> {
    let mode = optional(table.optional("client_auth"), |item| item.choice(&ClientAuth::WORDS));
    let ca = table.optional("client_ca");
    let authorities = optional(ca.clone(), |item| files(item, |text| Trust::default().add(text, None)));
    let crl = table.optional("client_crl");
    let lists = optional(crl.clone(), |item| files(item, judge::check_lists));
    let (mode, authorities, lists) = (mode?.or(unsaid), authorities?, lists?);
    let trust = match (authorities, lists) {
        (None, None) => Trust::default(),
        (None, Some(_)) => {
            table.fault("client_crl", "revocation lists without the CA whose they are: give client_ca = [\"…\"] too");
            return None;
        }
        (Some(authorities), lists) => {
            let mut trust = Trust::default();
            if let Err((in_list, error)) = trust.add(&authorities, lists.as_deref()) {
                table.fault(if in_list { "client_crl" } else { "client_ca" }, Chain(&error).to_string());
                return None;
            }
            trust
        }
    };
    // Whoever names a CA means that its certificates are asked for, and nobody would notice that they are not.
    if mode.is_none() && !trust.is_empty() {
        table.fault(
            "client_ca",
            "a CA, but no client_auth, so that nobody would be asked for a certificate: say client_auth = \"strict\" (or \
             \"loose\", or \"off\" if that is meant)",
        );
        return None;
    }
    Some((mode.unwrap_or_default(), trust))
}

/// What several files hold, one after the other; each is read alone first, so that a fault names it.
fn files(item: &Item<'_>, check: impl Fn(&str) -> Result<(), (bool, judge::TrustError)>) -> Option<String> {
    let texts = item.list(|item| {
        let path = item.file()?;
        match read_text(&path) {
            Ok(text) => match check(&text) {
                Ok(()) => Some(text + "\n"),
                Err((_, error)) => item.reject(format!("{} {}", path.display(), Chain(&error))),
            },
            Err(faults) => item.reject(faults.to_string()),
        }
    })?;
    Some(texts.concat())
}

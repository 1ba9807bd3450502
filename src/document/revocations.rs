//! Lists of certificates that count no more, as a registry and an agent's configuration write them.

use super::tree::Value;
use super::{Item, Table};
use crate::identity::certificate::Revocations;

impl Table<'_> {
    /// What `revoked_serials` and `revoked_key_ids` list; either may be left out, and may be empty.
    #[must_use]
    pub fn revocations(&self) -> Option<Revocations> {
        let serials = self.optional("revoked_serials").map(|item| item.items().iter().map(serial).collect());
        let key_ids = self
            .optional("revoked_key_ids")
            .map(|item| item.items().iter().map(|item| item.string().map(str::to_owned)).collect());
        Some(Revocations {
            serials: serials.unwrap_or_else(|| Some(Default::default()))?,
            key_ids: key_ids.unwrap_or_else(|| Some(Default::default()))?,
        })
    }
}

/// A serial number has 64 bits, and TOML's numbers one less: a larger one is written as a string.
fn serial(item: &Item<'_>) -> Option<u64> {
    let serial = match &item.node.value {
        Value::Integer(number) => number.and_then(|number| u64::try_from(number).ok()),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    match serial {
        Some(0) => {
            item.reject("0 is the number of all certificates that were not numbered: revoke those by their key ids")
        }
        Some(serial) => Some(serial),
        None => item
            .reject("a serial number is wanted, from 1 to 18446744073709551615; above 9223372036854775807 as a string"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::document::Document;

    fn read(text: &str) -> Result<Revocations, String> {
        let document = Document::parse(Path::new("ca.toml"), text).map_err(|faults| faults.to_string())?;
        let value = document.root().revocations();
        document.finish(value).map_err(|faults| faults.to_string())
    }

    #[test]
    fn serial_numbers_and_key_ids_are_listed() {
        assert_eq!(read(""), Ok(Revocations::default()));
        assert_eq!(read("revoked_serials = []\nrevoked_key_ids = []"), Ok(Revocations::default()));
        let read_all = read("revoked_serials = [7, \"18446744073709551615\"]\nrevoked_key_ids = [\"a b\"]");
        let all = Revocations { serials: [7, u64::MAX].into(), key_ids: ["a b".to_owned()].into() };
        assert_eq!(read_all, Ok(all));
        for (text, problem) in [
            ("revoked_serials = 7", "a list is wanted"),
            ("revoked_serials = [0]", "not numbered"),
            ("revoked_serials = [-1]", "a serial number is wanted"),
            ("revoked_serials = [\"7a\"]", "a serial number is wanted"),
            ("revoked_serials = [\"18446744073709551616\"]", "a serial number is wanted"),
            ("revoked_serials = [true]", "a serial number is wanted"),
            ("revoked_key_ids = [\"\"]", "this is empty"),
            ("revoked_key_ids = [7]", "a string is wanted"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(problem), "{text}: {error}");
        }
    }
}

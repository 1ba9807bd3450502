//! A table of a document, as it is read.

use std::fmt;

use super::tree::{TableNode, Value};
use super::{Document, Item, Place, join};

/// A table that is being read. Each key asked for, present or not, is from then on a known one.
#[derive(Clone)]
pub struct Table<'a> {
    pub(super) document: &'a Document,
    pub(super) node: &'a TableNode,
    pub(super) place: Place,
}

impl<'a> Table<'a> {
    /// What stands at `key`. Its absence is a fault.
    #[must_use]
    pub fn required(&self, key: &str) -> Option<Item<'a>> {
        let item = self.optional(key);
        if item.is_none() {
            self.fault(key, "this key is missing");
        }
        item
    }

    /// What stands at `key`, if anything does.
    #[must_use]
    pub fn optional(&self, key: &str) -> Option<Item<'a>> {
        self.node.known.borrow_mut().insert(key.to_owned());
        let node = &self.node.entries.get(key)?.node;
        if matches!(node.value, Value::Vacant) {
            return None;
        }
        let place = self.document.place(&node.origin, join(&self.place.key, key));
        Some(Item { document: self.document, node, place })
    }

    /// The table at `key`. Its absence is a fault.
    #[must_use]
    pub fn required_table(&self, key: &str) -> Option<Table<'a>> {
        self.required(key)?.table()
    }

    /// The table at `key`, if there is one.
    #[must_use]
    pub fn optional_table(&self, key: &str) -> Option<Table<'a>> {
        self.optional(key)?.table()
    }

    /// The tables written `[[key]]`; none if there are none.
    #[must_use]
    pub fn tables(&self, key: &str) -> Vec<Table<'a>> {
        let Some(item) = self.optional(key) else { return Vec::new() };
        if matches!(item.node.value, Value::Table(_)) {
            item.fault(format!("a list of tables is wanted: write [[{key}]]"));
            return Vec::new();
        }
        item.items().iter().filter_map(Item::table).collect()
    }

    /// The tables written `[[key]]`. If there are none, the fault is `missing`.
    #[must_use]
    pub fn required_tables(&self, key: &str, missing: &str) -> Vec<Table<'a>> {
        match self.optional(key).map(|item| &item.node.value) {
            None => self.fault(key, missing),
            Some(Value::Array(items)) if items.is_empty() => self.fault(key, missing),
            Some(_) => (),
        }
        self.tables(key)
    }

    /// Where `key` stands, or the table if it has no such key.
    #[must_use]
    pub fn at(&self, key: &str) -> Place {
        let path = join(&self.place.key, key);
        match self.node.entries.get(key) {
            Some(entry) => self.document.place(&entry.node.origin, path),
            None => Place { key: path, ..self.place.clone() },
        }
    }

    /// Where the table itself stands.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Records a fault at `key`, or at the table if it has no such key.
    pub fn fault(&self, key: &str, problem: impl Into<String>) {
        self.document.fault(&self.at(key), problem);
    }

    /// The document that this is a part of.
    #[must_use]
    pub fn document(&self) -> &'a Document {
        self.document
    }
}

impl fmt::Debug for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Table").field(&self.place).finish()
    }
}

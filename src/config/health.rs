//! Reads `[health]` and `[metrics]`, which mean the same in all three programs. Without them nothing is open for either.

use super::file::{address, optional};
use crate::document::{Item, Table};
use crate::health::Config;

/// Reads both tables. `None` if something was wrong, which is then recorded as a fault.
pub(super) fn health(root: &Table<'_>) -> Option<Config> {
    let metrics = match root.optional("metrics") {
        Some(item) => optional(item.table()?.optional("listen"), address)?,
        None => None,
    };
    let Some(item) = root.optional("health") else { return Some(Config { metrics, ..Config::default() }) };
    let table = item.table()?;
    let listen = optional(table.optional("listen"), |item| {
        let address = address(item)?;
        match metrics {
            Some(other) if other == address && other.port() != 0 => {
                item.reject("what listens for [metrics] answers about health, too: one of the two is enough")
            }
            _ => Some(address),
        }
    });
    let socket = optional(table.optional("socket"), Item::path);
    let file = optional(table.optional("file"), Item::path);
    let config = Config { listen: listen?, socket: socket?, file: file?, metrics };
    if config.socket.is_some() && config.socket == config.file {
        return item.reject("a socket and a file cannot be at one path");
    }
    Some(config)
}

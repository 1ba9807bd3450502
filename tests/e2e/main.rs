//! Tests with real components, in one binary.

mod certificates;
mod dns;
mod drain;
mod flow;
mod harness;
mod hostile;
mod hostile_links;
mod input;
mod kinds;
mod lifecycle;
mod limits;
mod links;
mod openssh;
mod organisations;
mod postgres;
mod postgres_through;
mod provision;
mod proxy;
mod pumps;
mod raw;
mod refusals;
mod reload;
mod replicas;
mod sources;
mod threads;
mod yard;

//! Logs: text for terminals, JSON for machines, to standard error; and traces, to a collector. Set up once, by the commands
//! that run.
//!
//! Levels go by whose fault it is: a peer's is `debug`, a change of state `info`, what an operator should look at `warn`, what
//! we cannot go on after `error`. Principals, clients' addresses and targets appear at `debug` alone; the audit trail has them.

mod limit;
pub mod otlp;

pub use limit::tell;

use tracing::{Level, warn};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For machines, one object a line.
    Json,
}

/// Starts logging. `CAPONIER_LOG` sets the level, or levels by module, as in `caponier=debug`; else it is `level` for our
/// own lines and warnings of the libraries, without those that peers can cause. A second call changes nothing.
pub fn start(format: Format, level: Level) {
    let asked = std::env::var("CAPONIER_LOG").ok().map(EnvFilter::try_new);
    let misread = matches!(asked, Some(Err(_)));
    let filter = asked.and_then(Result::ok).unwrap_or_else(|| {
        EnvFilter::new(format!("warn,russh=error,hickory_net=off,hickory_resolver=off,caponier={level}"))
    });
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines = match format {
        Format::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        Format::Json => lines.json().boxed(),
    };
    let started = tracing_subscriber::registry().with(lines).with(limit::Limit).with(filter).try_init();
    // Only in tests is there a logger before us; it serves as well.
    drop(started);
    if misread {
        warn!("CAPONIER_LOG is not a level or a list of MODULE=LEVEL; logging as if it were not set");
    }
}

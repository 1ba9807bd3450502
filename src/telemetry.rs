//! Logs: text for terminals, JSON for machines, to standard error. Set up once, by the commands that run.

use tracing::{Level, warn};
use tracing_subscriber::filter::EnvFilter;

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
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let started = match format {
        Format::Text => {
            let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
            builder.with_ansi(terminal).try_init()
        }
        Format::Json => builder.json().try_init(),
    };
    // Only in tests is there a logger before us; it serves as well.
    drop(started);
    if misread {
        warn!("CAPONIER_LOG is not a level or a list of MODULE=LEVEL; logging as if it were not set");
    }
}

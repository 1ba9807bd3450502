//! The sink `https`.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{Batches, Connect, Progress};

/// Where it is, and how it is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {}

/// Sends what there is until there will be no more, or `stop` fires.
pub async fn run(
    _config: Config,
    mut batches: Batches,
    progress: Progress,
    _connect: Arc<dyn Connect>,
    stop: CancellationToken,
) {
    while let Some(Some(_)) = stop.run_until_cancelled(batches.next()).await {
        progress.failed("unsupported", String::new());
    }
}

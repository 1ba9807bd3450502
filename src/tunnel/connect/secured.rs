//! TLS with a proxy.

use std::sync::Arc;

use crate::target::Host;
use crate::tls::{self, ClientConfig, ConnectError};
use crate::tunnel::stream::Stream;

/// Shakes hands with the server `name`.
///
/// # Errors
/// If it is not that server, or the handshake fails.
pub(super) async fn connect(config: &Arc<ClientConfig>, name: &Host, stream: Stream) -> Result<Stream, ConnectError> {
    tls::connect(config, name, stream).await.map(Stream::layered)
}

//! The mode `mutual`: TLS with certificates on both sides of the proxy, and the bytes between them as they are.
//!
//! Promised: nothing of a client is sent on before its certificate was judged and the upstream's accepted; the client's
//! certificate stays here, and the upstream sees the proxy's own.

use std::sync::Arc;

use bytes::Bytes;

use super::Proxy;
use super::forward::{self, Request};
use super::intake::Entrance;
use super::live::Wanted;
use super::outward::Inside;
use crate::tunnel::stream::Stream;

/// Serves one connection, whose client is known and speaks `spoken` inside, to its end.
pub(super) async fn serve(proxy: Arc<Proxy>, stream: Stream, entrance: Entrance, spoken: Option<Vec<u8>>) {
    let Entrance { guest, address, seat, place: _place, .. } = entrance;
    // He has proved who he is, and wants what there is.
    drop(seat);
    let inside = Inside::like(spoken.as_deref());
    let request = Request { guest, client: address, wanted: Wanted::TheOne, inside, asked: String::new() };
    match forward::open(&proxy, &request).await {
        Ok(open) => forward::relay(&proxy, &request, stream, Bytes::new(), open).await,
        // There is no way to say why; a reset at least does not look like an orderly end.
        Err(_) => stream.reset(),
    }
}

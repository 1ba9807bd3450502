//! The mode `connect`: an HTTP CONNECT proxy (RFC 9110 §9.3.6) that leads to the listed upstreams and nowhere else.
//!
//! Promised: what a client sends after our reply goes to the upstream as it is, and the other way round; it is neither read nor
//! changed, and so the client's TLS with the upstream is theirs alone. What was sent along with the request is not lost,
//! but is not sent on before the upstream was reached. A request for anything else gets one of a fixed set of texts, and the
//! connection ends.

use std::sync::Arc;

use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use hyper::{Method, Response};

use super::Proxy;
use super::exchange::{Follow, Refusal, Reply, Switched, converse};
use super::forward::{self, Open, Request};
use super::intake::Entrance;
use super::live::{Guest, Wanted};
use super::outward::Inside;
use crate::tunnel::stream::Stream;

/// Serves one connection to its end.
pub(super) async fn serve(proxy: Arc<Proxy>, stream: Stream, entrance: Entrance) {
    let (guest, client) = (entrance.guest.clone(), entrance.address);
    let follow = Follow::default();
    let respond = |request| respond(&proxy, &guest, client, request, &follow);
    // The place is kept for as long as the tunnel lasts.
    let place = entrance.place.clone();
    let Some((Switched { stream, head }, (request, open))) = converse(&proxy, stream, entrance, &follow, respond).await
    else {
        return;
    };
    forward::relay(&proxy, &request, stream, head, open).await;
    drop(place);
}

async fn respond(
    proxy: &Proxy,
    guest: &Guest,
    client: std::net::SocketAddr,
    mut request: hyper::Request<Incoming>,
    follow: &Follow<(Request, Open)>,
) -> Reply {
    if request.method() != Method::CONNECT {
        return Refusal::OnlyConnect.reply();
    }
    let headers = request.headers();
    // What follows the head belongs to the tunnel: a body would be somebody else's idea of where that begins.
    let bodied = headers.contains_key(CONTENT_LENGTH) || headers.contains_key(TRANSFER_ENCODING);
    let Some(authority) = request.uri().authority().filter(|_| !bodied && headers.get_all(HOST).iter().count() <= 1)
    else {
        return Refusal::Malformed.reply();
    };
    let asked = authority.to_string();
    let upgrade = hyper::upgrade::on(&mut request);
    let request =
        Request { guest: guest.clone(), client, wanted: Wanted::Named(asked.parse()), inside: Inside::Theirs, asked };
    match forward::open(proxy, &request).await {
        Ok(open) => {
            follow.with(upgrade, (request, open));
            Response::new(Either::Right(Full::default()))
        }
        Err(refusal) => refusal.reply(),
    }
}

//! The client's side of HTTP, for the two modes that speak it.
//!
//! Promised: the head of a request comes whole, under a deadline and a length, or the connection ends; what we answer of
//! ourselves is one of a fixed set of texts, and ends the connection. A drain lets the request that is under way come to
//! its end.

use std::convert::Infallible;
use std::sync::Mutex;
use std::sync::PoisonError;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::Proxy;
use super::intake::{Entrance, refused, turn_away};
use crate::chain::Chain;
use crate::limits;
use crate::tunnel::stream::Stream;

/// A body: the upstream's, or one of our texts.
pub(super) type Body = Either<Incoming, Full<Bytes>>;

/// What a client is answered.
pub(super) type Reply = Response<Body>;

/// What a client is told that gets nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The request is not one that we take.
    Malformed,
    /// CONNECT is what we take, and this is something else.
    OnlyConnect,
    /// CONNECT is what we do not take.
    NoConnect,
    /// It may not go there.
    NotAllowed,
    /// Something does not work.
    NotAvailable,
    /// We go away.
    Leaving,
}

impl Refusal {
    fn status(self) -> StatusCode {
        match self {
            Self::Malformed => StatusCode::BAD_REQUEST,
            Self::OnlyConnect | Self::NoConnect => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotAllowed => StatusCode::FORBIDDEN,
            Self::NotAvailable => StatusCode::BAD_GATEWAY,
            Self::Leaving => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Malformed => "malformed request\n",
            Self::OnlyConnect => "this proxy takes CONNECT alone\n",
            Self::NoConnect => "this proxy does not take CONNECT\n",
            Self::NotAllowed => "not allowed\n",
            Self::NotAvailable => "not available\n",
            Self::Leaving => "not available: the proxy goes away\n",
        }
    }

    /// The whole reply. The connection ends with it, so that nothing that follows the request is taken for another.
    pub(super) fn reply(self) -> Reply {
        let mut reply = Response::new(Either::Right(Full::new(Bytes::from_static(self.text().as_bytes()))));
        *reply.status_mut() = self.status();
        let headers = reply.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        reply
    }
}

/// A client's connection that has ceased to be HTTP.
pub(super) struct Switched {
    /// The connection.
    pub(super) stream: Stream,
    /// What the client has said on it already.
    pub(super) head: Bytes,
}

/// Where a request's handler leaves what is to follow the conversation, when it answers with a switch of protocols.
pub(super) struct Follow<T>(Mutex<Option<(OnUpgrade, T)>>);

impl<T> Default for Follow<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Follow<T> {
    /// After the reply, go on with `rest`.
    pub(super) fn with(&self, upgrade: OnUpgrade, rest: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((upgrade, rest));
    }

    fn take(&self) -> Option<(OnUpgrade, T)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Answers a client's requests by `respond`, one after the other, until the connection ends. Returns what is left to do
/// where it has become something else.
pub(super) async fn converse<T, F, Fut>(
    proxy: &Proxy,
    stream: Stream,
    entrance: Entrance,
    follow: &Follow<T>,
    respond: F,
) -> Option<(Switched, T)>
where
    F: Fn(Request<Incoming>) -> Fut,
    Fut: Future<Output = Reply>,
{
    let Entrance { guest, address, seat, place: _place, .. } = entrance;
    let heard = CancellationToken::new();
    let service = service_fn(|request| {
        heard.cancel();
        let responding = respond(request);
        async { Ok::<_, Infallible>(responding.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::HEAD_TIMEOUT)
        .max_headers(limits::HEADERS_MAX)
        .max_buf_size(limits::HEAD_MAX)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let mut seat = Some(seat);
    let lost = seat.as_ref().map(|seat| seat.lost().clone()).unwrap_or_default();
    let mut leaving = false;
    let ended = loop {
        tokio::select! {
            () = heard.cancelled(), if seat.is_some() => seat = None,
            () = lost.cancelled(), if seat.is_some() => {
                turn_away(proxy, guest.mode, address, "too_many_connections");
                return None;
            }
            () = proxy.drain.begun().cancelled(), if !leaving => {
                leaving = true;
                connection.as_mut().graceful_shutdown();
            }
            _ = proxy.drain.cut() => return None,
            () = proxy.tasks.stopping().cancelled() => return None,
            ended = connection.as_mut() => break ended,
        }
    };
    match ended {
        Ok(()) if !heard.is_cancelled() && !leaving => turn_away(proxy, guest.mode, address, "no_request"),
        Ok(()) => {}
        Err(error) => {
            debug!(error = %Chain(&error), "a client's connection ended");
            let reason = match () {
                () if error.is_timeout() && !heard.is_cancelled() => Some("slow_head"),
                () if error.is_parse_too_large() => Some("head_too_large"),
                () if error.is_parse() => Some("malformed_head"),
                () if !heard.is_cancelled() => Some("no_request"),
                () => None,
            };
            if let Some(reason) = reason {
                proxy.trail.stranger(refused(guest.mode, address).detail(Chain(&error)), reason);
            }
            return None;
        }
    }
    let (upgrade, rest) = follow.take()?;
    Some((switched(upgrade.await.ok()?)?, rest))
}

/// What the client's connection was before it was HTTP.
fn switched(upgraded: Upgraded) -> Option<Switched> {
    let parts = upgraded.downcast::<TokioIo<Stream>>().ok()?;
    Some(Switched { stream: parts.io.into_inner(), head: parts.read_buf })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_end_the_connection_and_say_nothing_of_the_reason() {
        for (refusal, status) in [
            (Refusal::Malformed, 400),
            (Refusal::OnlyConnect, 405),
            (Refusal::NoConnect, 405),
            (Refusal::NotAllowed, 403),
            (Refusal::NotAvailable, 502),
            (Refusal::Leaving, 503),
        ] {
            let reply = refusal.reply();
            assert_eq!(reply.status().as_u16(), status, "{refusal:?}");
            assert_eq!(reply.headers()[CONNECTION], "close");
            assert_eq!(reply.headers().len(), 2);
        }
    }
}

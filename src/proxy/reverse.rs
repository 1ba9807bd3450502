//! The mode `reverse`: an HTTP/1.1 reverse proxy, which speaks TLS with the upstream and alone holds the certificate that this
//! asks for.
//!
//! It works at the level of HTTP, and not of bytes, because its clients address the proxy (`PROXY_URL`) and so name that as
//! `Host`, by which the upstream tells its customers apart.
//!
//! Promised: a request goes to the listener's one upstream, whatever it says in its target, in `Host` or anywhere else; it is
//! parsed and written anew, so that the two never differ about where one ends; headers that belong to one connection stay
//! there, and what a client says about who forwarded it is taken out. Bodies stream both ways, and who does not read holds
//! up nobody but himself. A change of protocols (WebSocket, SPDY) is passed on, but that to HTTP/2, in which requests of others
//! could hide. A client's connection has a connection to the upstream of its own, which nobody else's requests take, and each
//! of those has its entry in the trail.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VIA,
};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;
use tracing::debug;

use super::exchange::{Follow, Refusal, Reply, Switched, converse};
use super::forward::{self, Open, Request, Run};
use super::intake::Entrance;
use super::live::Wanted;
use super::outward::{Inside, Reached};
use super::{Outbound, Proxy, Upstream};
use crate::audit::Counters;
use crate::chain::Chain;
use crate::limits;
use crate::tunnel::stream::Stream;

/// Serves one connection to its end.
pub(super) async fn serve(proxy: Arc<Proxy>, stream: Stream, entrance: Entrance) {
    let (guest, client) = (entrance.guest.clone(), entrance.address);
    let request = Request { guest, client, wanted: Wanted::TheOne, inside: Inside::Http, asked: String::new() };
    let visit = Visit { proxy: proxy.clone(), request: Arc::new(request), line: tokio::sync::Mutex::new(None) };
    let follow = Follow::default();
    let place = entrance.place.clone();
    let respond = |request| visit.respond(request, &follow);
    let Some((Switched { mut stream, head }, tunnel)) = converse(&proxy, stream, entrance, &follow, respond).await
    else {
        return;
    };
    let Tunnel { upgrade, run } = tunnel;
    let Some((far, heard)) = upgrade.await.ok().and_then(upstream_of) else {
        drop(run.finish(&proxy, "target_broke"));
        return stream.reset();
    };
    // Counted already, when it came.
    let handed = timeout(limits::STALL, async {
        stream.write_all(&heard).await?;
        stream.flush().await
    });
    if !matches!(handed.await, Ok(Ok(()))) {
        return drop(run.finish(&proxy, "client_gone"));
    }
    let reached = Reached { stream: far, head: Bytes::new(), address: None };
    forward::relay(&proxy, &visit.request, stream, head, Open { reached, run: *run }).await;
    drop(place);
}

/// A client's connection, and what belongs to it.
struct Visit {
    proxy: Arc<Proxy>,
    request: Arc<Request>,
    /// Its connection to the upstream, while no request is under way on it.
    line: tokio::sync::Mutex<Option<Line>>,
}

/// A connection to the upstream.
struct Line {
    sender: SendRequest<Incoming>,
    upstream: Arc<Upstream>,
    record: Arc<Mutex<Record>>,
}

/// The record of a connection to the upstream. Whoever asks for a change of protocols holds it meanwhile: the connection is over
/// in its first form when the answer comes.
enum Record {
    Runs(Box<Run>),
    Held,
    Ended(&'static str),
}

impl Record {
    /// Takes it out, if it is there.
    fn hold(record: &Mutex<Self>) -> Option<Box<Run>> {
        let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *record, Self::Held) {
            Self::Runs(run) => Some(run),
            other => {
                *record = other;
                None
            }
        }
    }

    /// Gives it back; it is finished where the connection has ended meanwhile.
    fn release(record: &Mutex<Self>, run: Box<Run>, proxy: &Proxy) {
        let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
        match *record {
            Self::Ended(reason) => drop(run.finish(proxy, reason)),
            Self::Runs(_) | Self::Held => *record = Self::Runs(run),
        }
    }

    /// The connection has ended.
    fn end(record: &Mutex<Self>, reason: &'static str, proxy: &Proxy) {
        let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
        if let Self::Runs(run) = std::mem::replace(&mut *record, Self::Ended(reason)) {
            drop(run.finish(proxy, reason));
        }
    }
}

/// A record that is held, and given back if nothing comes of the change.
struct Held<'a> {
    run: Option<Box<Run>>,
    record: Arc<Mutex<Record>>,
    proxy: &'a Proxy,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(run) = self.run.take() {
            Record::release(&self.record, run, self.proxy);
        }
    }
}

/// What follows where both ends have changed to another protocol.
struct Tunnel {
    upgrade: OnUpgrade,
    run: Box<Run>,
}

impl Visit {
    async fn respond(&self, request: hyper::Request<Incoming>, follow: &Follow<Tunnel>) -> Reply {
        self.pass_on(request, follow).await.unwrap_or_else(Refusal::reply)
    }

    async fn pass_on(&self, mut request: hyper::Request<Incoming>, follow: &Follow<Tunnel>) -> Result<Reply, Refusal> {
        if request.method() == Method::CONNECT {
            return Err(Refusal::NoConnect);
        }
        // Whoever names a host in the target takes us for a proxy to anywhere.
        if request.uri().authority().is_some() || request.headers().get_all(HOST).iter().count() > 1 {
            return Err(Refusal::Malformed);
        }
        let client_upgrade = hyper::upgrade::on(&mut request);
        let wanted = upgrade_of(request.headers()).filter(may_follow);
        let mut line = self.line.lock().await;
        // Taken out for as long as the request is under way: whoever gives it up gives up the connection.
        let known = match line.take() {
            Some(mut known) => known.sender.ready().await.is_ok().then_some(known),
            None => None,
        };
        let (mut taken, mut fresh) = match known {
            Some(known) => (known, false),
            None => (self.reach().await?, true),
        };
        address(&mut request, &taken.upstream, wanted.as_ref());
        let hold = |line: &Line| {
            let run = wanted.as_ref().and_then(|_| Record::hold(&line.record));
            Held { run, record: line.record.clone(), proxy: &self.proxy }
        };
        let mut held = hold(&taken);
        let response = loop {
            match taken.sender.try_send_request(request).await {
                Ok(response) => break response,
                Err(mut error) => {
                    debug!(error = %Chain(error.error()), "an upstream gave no answer");
                    // It has closed the connection before it took anything of the request: that is no answer to it.
                    match error.take_message() {
                        Some(unsent) if !fresh => {
                            request = unsent;
                            (taken, fresh) = (self.reach().await?, true);
                            held = hold(&taken);
                        }
                        _ => return Err(Refusal::NotAvailable),
                    }
                }
            }
        };
        let (mut head, body) = response.into_parts();
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            let agreed = upgrade_of(&head.headers);
            if wanted.is_none() || !same(agreed.as_ref(), wanted.as_ref()) {
                return Err(Refusal::NotAvailable);
            }
            let Some(run) = held.run.take() else { return Err(Refusal::NotAvailable) };
            let mut response = hyper::Response::from_parts(head, body);
            let upgrade = hyper::upgrade::on(&mut response);
            (head, _) = response.into_parts();
            strip(&mut head.headers);
            change_to(&mut head.headers, agreed.as_ref());
            follow.with(client_upgrade, Tunnel { upgrade, run });
            return Ok(hyper::Response::from_parts(head, Either::Right(http_body_util::Full::default())));
        }
        strip(&mut head.headers);
        drop(held);
        *line = Some(taken);
        Ok(hyper::Response::from_parts(head, Either::Left(body)))
    }

    /// Makes a connection to the upstream, with an entry and a task of its own.
    async fn reach(&self) -> Result<Line, Refusal> {
        let Open { reached, run } = forward::open(&self.proxy, &self.request).await?;
        let counters = run.counters();
        let io = Counted { stream: reached.stream.preceded_by(reached.head), counters: counters.clone() };
        let handshake = http1::Builder::new()
            .max_headers(limits::HEADERS_MAX)
            .max_buf_size(limits::HEAD_MAX)
            .handshake(TokioIo::new(io))
            .await;
        let (sender, connection) = match handshake {
            Ok(made) => made,
            Err(_) => {
                drop(run.finish(&self.proxy, "target_broke"));
                return Err(Refusal::NotAvailable);
            }
        };
        let (upstream, unrecorded) = (run.upstream.clone(), run.unrecorded.clone());
        let record = Arc::new(Mutex::new(Record::Runs(Box::new(run))));
        let line = Line { sender, upstream: upstream.clone(), record: record.clone() };
        let (proxy, request) = (self.proxy.clone(), self.request.clone());
        self.proxy.tasks.spawn(async move {
            let bounds = proxy.state.current().limits().bounds;
            let reason = tokio::select! {
                why = forward::no_longer_allowed(&proxy, &request, &upstream, &unrecorded) => why,
                end = bounds.passed(&counters) => forward::ended(end),
                () = proxy.tasks.stopping().cancelled() => "proxy_stopped",
                ended = connection.with_upgrades() => if ended.is_ok() { "eof" } else { "target_broke" },
            };
            Record::end(&record, reason, &proxy);
        });
        Ok(line)
    }
}

/// Addresses a request to the upstream, and takes out of it what is not for that.
fn address(request: &mut hyper::Request<Incoming>, upstream: &Upstream, upgrade: Option<&HeaderValue>) {
    let target = request.uri().path_and_query().cloned();
    *request.uri_mut() = target.map_or_else(|| Uri::from_static("/"), Uri::from);
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    strip(headers);
    // The length is that of what is sent, and the question whether to send it was answered here.
    headers.remove(CONTENT_LENGTH);
    headers.remove(EXPECT);
    let claims: Vec<_> = headers.keys().filter(|name| is_claim(name)).cloned().collect();
    for name in claims {
        headers.remove(name);
    }
    headers.append(VIA, HeaderValue::from_static("1.1 caponier"));
    if upgrade.is_some() {
        change_to(headers, upgrade);
    }
    headers.insert(HOST, host(upstream));
}

/// What the upstream is to be called in a request to it.
fn host(upstream: &Upstream) -> HeaderValue {
    let name = upstream.tls.as_ref().map_or(&upstream.to.host, |Outbound { server_name, .. }| server_name);
    let named = crate::target::Target { host: name.clone(), port: upstream.to.port }.to_string();
    let text = if upstream.to.port == 443 { named.trim_end_matches(":443") } else { &named };
    // Hosts are made of letters, digits, dots, hyphens, colons and brackets.
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Whether a header says who has forwarded a request, or with which certificate (RFC 9440): nobody did before us whom the upstream
/// would have to believe. To many upstreams `_` is the same as `-`.
fn is_claim(name: &HeaderName) -> bool {
    let name = name.as_str().replace('_', "-");
    name == FORWARDED.as_str()
        || name.starts_with("x-forwarded-")
        || ["x-real-ip", "client-cert", "client-cert-chain"].contains(&name.as_str())
}

/// Takes out what belongs to one connection (RFC 9110 §7.6.1).
fn strip(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    if headers.contains_key(TRANSFER_ENCODING) {
        // Of the two, that one counts.
        headers.remove(CONTENT_LENGTH);
    }
    for name in listed.into_iter().filter(|name| *name != HOST && *name != CONTENT_LENGTH) {
        headers.remove(name);
    }
    for name in [CONNECTION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    for name in ["keep-alive", "proxy-connection", "http2-settings"] {
        headers.remove(name);
    }
}

/// The protocol that a message proposes to change to, or agrees to.
fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let asks = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let asks = asks.flat_map(|value| value.split(',')).any(|name| name.trim().eq_ignore_ascii_case("upgrade"));
    let mut protocols = headers.get_all(UPGRADE).iter();
    let protocol = protocols.next().filter(|_| asks)?.clone();
    protocols.next().is_none().then_some(protocol)
}

/// Whether a protocol is passed on: one alone, and not another form of HTTP.
fn may_follow(protocol: &HeaderValue) -> bool {
    let Ok(protocol) = protocol.to_str() else { return false };
    let form = protocol.split('/').next().unwrap_or_default();
    !protocol.contains(',') && !["h2c", "h2", "http", "tls"].iter().any(|other| form.eq_ignore_ascii_case(other))
}

fn same(one: Option<&HeaderValue>, other: Option<&HeaderValue>) -> bool {
    let (Some(one), Some(other)) = (one, other) else { return false };
    one.as_bytes().eq_ignore_ascii_case(other.as_bytes())
}

fn change_to(headers: &mut HeaderMap, protocol: Option<&HeaderValue>) {
    if let Some(protocol) = protocol {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol.clone());
    }
}

/// What the upstream's connection was before it was HTTP, and what it has said since.
fn upstream_of(upgraded: Upgraded) -> Option<(Stream, Bytes)> {
    let parts = upgraded.downcast::<TokioIo<Counted>>().ok()?;
    Some((parts.io.into_inner().stream, parts.read_buf))
}

/// The upstream's connection, whose bytes are counted as they pass.
struct Counted {
    stream: Stream,
    counters: Arc<Counters>,
}

impl AsyncRead for Counted {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        this.counters.add_from_target((buf.filled().len() - before) as u64);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, bytes))?;
        this.counters.add_to_target(written as u64);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        list.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn what_belongs_to_one_connection_stays_there() {
        let mut all = headers(&[
            ("connection", "keep-alive, X-Mine, host, content-length"),
            ("keep-alive", "timeout=5"),
            ("x-mine", "1"),
            ("te", "trailers"),
            ("proxy-authorization", "Basic eDp5"),
            ("proxy-connection", "keep-alive"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMAAABkAAQ"),
            ("host", "x"),
            ("content-length", "5"),
            ("authorization", "Bearer y"),
            ("cookie", "a=b"),
        ]);
        strip(&mut all);
        let mut left: Vec<_> = all.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "content-length", "cookie", "host"]);
        let mut two = headers(&[("content-length", "5"), ("transfer-encoding", "chunked")]);
        strip(&mut two);
        assert!(two.is_empty(), "of two lengths the one that counts is made anew");
    }

    #[test]
    fn one_protocol_may_follow_and_no_other_form_of_http() {
        for (list, protocol) in [
            (&[("connection", "Upgrade"), ("upgrade", "websocket")][..], Some("websocket")),
            (&[("connection", "keep-alive, upgrade"), ("upgrade", "SPDY/3.1")], Some("SPDY/3.1")),
            (&[("connection", "upgrade"), ("upgrade", "h2c")], None),
            (&[("connection", "upgrade"), ("upgrade", "HTTP/2.0")], None),
            (&[("connection", "upgrade"), ("upgrade", "TLS/1.0")], None),
            (&[("connection", "upgrade"), ("upgrade", "websocket, h2c")], None),
            (&[("connection", "close"), ("upgrade", "websocket")], None),
            (&[("upgrade", "websocket")], None),
            (&[("connection", "upgrade")], None),
        ] {
            let found = upgrade_of(&headers(list)).filter(may_follow);
            assert_eq!(found.as_ref().map(HeaderValue::as_bytes), protocol.map(str::as_bytes), "{list:?}");
        }
    }

    #[test]
    fn the_upstream_is_called_by_its_own_name() {
        for (to, host_header) in [
            ("control.example.com:443", "control.example.com"),
            ("control.example.com:8443", "control.example.com:8443"),
            ("[2001:db8::1]:443", "[2001:db8::1]"),
            ("10.0.0.1:4443", "10.0.0.1:4443"),
        ] {
            let upstream =
                Upstream { name: "x".into(), to: to.parse().expect("a target"), within: Vec::new(), tls: None };
            assert_eq!(host(&upstream), host_header, "{to}");
        }
    }
}

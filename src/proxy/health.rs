//! The health endpoint, for whoever supervises the proxy on the same host.
//!
//! `GET /healthz` is 200 while the proxy takes connections and its trail can be written, else 503. `GET /readyz` is 200 while
//! every upstream of the listeners answers besides: how a connection to it went last counts for [`limits::HEALTH_KEPT`], after
//! which one is made for the purpose. The text says which upstream does not, by the name that the configuration gives it.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::debug;

use super::Proxy;
use super::outward::{self, Found, Inside};
use crate::limits;
use crate::tunnel::listen;

/// Answers until the stop: also during a drain, of which it tells.
pub(super) async fn accept(proxy: Arc<Proxy>, listener: TcpListener) {
    let stop = proxy.tasks.stopping().clone();
    let room = Arc::new(Semaphore::new(limits::HEALTH_CONNECTIONS));
    loop {
        let place = tokio::select! {
            place = room.clone().acquire_owned() => place,
            () = stop.cancelled() => return,
        };
        let (stream, _) = tokio::select! {
            accepted = listen::accept(&listener) => accepted,
            () = stop.cancelled() => return,
        };
        let (proxy, stop) = (proxy.clone(), stop.clone());
        proxy.tasks.clone().spawn(async move {
            let _place = place;
            // As long as an upstream may take, and the two heads.
            let most = limits::OPENING_TIMEOUT + 2 * limits::HEAD_TIMEOUT;
            tokio::select! {
                _ = timeout(most, serve(&proxy, stream)) => {}
                () = stop.cancelled() => {}
            }
        });
    }
}

async fn serve(proxy: &Proxy, stream: TcpStream) {
    let service = service_fn(|request| async move { Ok::<_, Infallible>(answer(proxy, &request).await) });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::HEAD_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(limits::HEAD_MAX)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        debug!(%error, "a question about health ended");
    }
}

async fn answer(proxy: &Proxy, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return reply(StatusCode::METHOD_NOT_ALLOWED, "GET is wanted\n".to_owned());
    }
    let healthy = healthy(proxy);
    match (request.uri().path(), healthy) {
        ("/healthz" | "/readyz", Err(why)) => reply(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        ("/healthz", Ok(())) => reply(StatusCode::OK, "ok\n".to_owned()),
        ("/readyz", Ok(())) => ready(proxy).await,
        _ => reply(StatusCode::NOT_FOUND, "/healthz or /readyz is wanted\n".to_owned()),
    }
}

fn healthy(proxy: &Proxy) -> Result<(), &'static str> {
    if proxy.drain.begun().is_cancelled() {
        return Err("draining");
    }
    if proxy.trail.failed().borrow().is_some() {
        return Err("the audit trail cannot be written");
    }
    Ok(())
}

async fn ready(proxy: &Proxy) -> Response<Full<Bytes>> {
    let state = proxy.state.current();
    let mut silent = String::new();
    for upstream in state.used() {
        let known = proxy.standings.of(&upstream.name).filter(|standing| standing.at.elapsed() < limits::HEALTH_KEPT);
        let answers = match known {
            Some(standing) => standing.answers,
            None => {
                let mut found = Found::default();
                let inside = if upstream.tls.is_some() { Inside::Tls } else { Inside::Theirs };
                let reaching = outward::reach(state.trial(upstream), inside, &mut found);
                let answers = matches!(timeout(limits::OPENING_TIMEOUT, reaching).await, Ok(Ok(_)));
                proxy.standings.note(&upstream.name, answers);
                answers
            }
        };
        if !answers {
            // Writing to a text cannot fail.
            let _ = writeln!(silent, "{} does not answer", upstream.name);
        }
    }
    match silent.is_empty() {
        true => reply(StatusCode::OK, "ok\n".to_owned()),
        false => reply(StatusCode::SERVICE_UNAVAILABLE, silent),
    }
}

fn reply(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::from(text));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    reply
}

//! The answers over HTTP.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Part, Report, State, socket};
use crate::limits;
use crate::metrics;
use crate::task::{Crew, Tasks};

/// Who is asked, and for what.
pub(super) struct Asked<S> {
    pub(super) state: Arc<S>,
    pub(super) crew: Crew,
    pub(super) metrics: bool,
}

/// Answers at a port until the stop.
pub(super) async fn tcp<S: State>(asked: Asked<S>, listener: TcpListener, tasks: Tasks) {
    accept(asked, tasks, listener).await;
}

/// Answers at a socket until the stop, and removes it.
pub(super) async fn unix<S: State>(asked: Asked<S>, listener: UnixListener, guard: socket::Guard, tasks: Tasks) {
    let _guard = guard;
    accept(asked, tasks, listener).await;
}

/// One connection.
struct Visitor {
    /// Whether it has said what it wants.
    heard: AtomicBool,
    /// Fires when it has to go.
    evicted: CancellationToken,
    gone: AtomicBool,
}

/// A listener of either kind.
trait Accept: Send + Sync {
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

async fn accept<S: State>(asked: Asked<S>, tasks: Tasks, listener: impl Accept) {
    let stop = tasks.stopping().clone();
    let asked = Arc::new(asked);
    let mut visitors: VecDeque<Arc<Visitor>> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.next() => accepted,
            () = stop.cancelled() => return,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                warn!(%error, "could not accept a question about health");
                tokio::select! {
                    () = tokio::time::sleep(limits::ACCEPT_PAUSE) => continue,
                    () = stop.cancelled() => return,
                }
            }
        };
        visitors.retain(|visitor| !visitor.gone.load(Ordering::Relaxed));
        if visitors.len() >= limits::HEALTH_CONNECTIONS {
            // Whoever has said nothing for longest gives way; where all are being answered, the new one does.
            let silent = visitors.iter().position(|visitor| !visitor.heard.load(Ordering::Relaxed));
            let Some(visitor) = silent.and_then(|at| visitors.remove(at)) else { continue };
            visitor.evicted.cancel();
        }
        let visitor = Arc::new(Visitor {
            heard: AtomicBool::new(false),
            evicted: CancellationToken::new(),
            gone: AtomicBool::new(false),
        });
        visitors.push_back(visitor.clone());
        let (asked, stop) = (asked.clone(), stop.clone());
        tasks.spawn(async move {
            tokio::select! {
                _ = timeout(limits::HEALTH_CONNECTION, converse(&asked, stream, &visitor)) => {}
                () = visitor.evicted.cancelled() => {}
                () = stop.cancelled() => {}
            }
            visitor.gone.store(true, Ordering::Relaxed);
        });
    }
}

async fn converse<S: State>(
    asked: &Asked<S>,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    visitor: &Visitor,
) {
    let service = service_fn(|request| async move {
        visitor.heard.store(true, Ordering::Relaxed);
        Ok::<_, Infallible>(answer(asked, &request).await)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::HEALTH_HEAD_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(limits::HEALTH_HEAD_MAX)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        debug!(%error, "a question about health ended");
    }
}

async fn answer<S: State>(asked: &Asked<S>, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut reply = reply(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "GET is wanted\n".to_owned());
        reply.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return reply;
    }
    let verbose = request.uri().query().is_some_and(|query| query.split('&').any(|word| word.starts_with("verbose")));
    match request.uri().path() {
        "/livez" => {
            let live = asked.crew.answers(limits::HEALTH_PATIENCE).await;
            reply(status(live), JSON, format!("{{\"live\":{live}}}\n"))
        }
        "/readyz" => {
            let mut report = Report::of(&*asked.state, &asked.crew).await;
            if !verbose {
                report.parts.retain(|part: &Part| !part.ready);
            }
            match serde_json::to_string(&report) {
                Ok(text) => reply(status(report.ready), JSON, text + "\n"),
                Err(error) => {
                    warn!(%error, "health could not be written down");
                    reply(StatusCode::INTERNAL_SERVER_ERROR, PLAIN, "this is a mistake of ours\n".to_owned())
                }
            }
        }
        "/metrics" if asked.metrics => {
            let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok());
            let page = metrics::page(accept);
            reply(StatusCode::OK, page.content_type, page.body)
        }
        _ if asked.metrics => reply(StatusCode::NOT_FOUND, PLAIN, "/metrics, /livez or /readyz is wanted\n".to_owned()),
        _ => reply(StatusCode::NOT_FOUND, PLAIN, "/livez or /readyz is wanted\n".to_owned()),
    }
}

const PLAIN: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

fn status(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn reply(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::from(text));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    reply.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    reply
}

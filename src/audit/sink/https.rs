//! The sink `https`: batches of records as the bodies of POST requests (HTTP/1.1).
//!
//! Promised: a record counts as written when the collector has answered 2xx to the request that holds it, and not before.
//! Everything else is a failure, and the same request comes again: after a pause that grows, and not before a `Retry-After`
//! is over. But an answer that says that the records themselves will not do (400, 413, 422 and the like) has them come in halves,
//! as [`deliver`](super::deliver) says. Each request names itself in `Idempotency-Key`, the same whenever it comes again, so that a collector can tell.
//! Redirects are never followed, since they would carry the token elsewhere; of an answer no more than its head counts, and
//! no more than a little is read. The token is in no error and no `Debug`.
//!
//! A body is lines as the trail has them (`application/x-ndjson`), whose chain can be verified, or an array of OCSF events.

use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::deliver::{Collector, Failure, Most, Place, Portion, Way, deliver};
use super::renewed::{Renew, Renewed};
use super::{Batches, Means, Progress, Stream};
use crate::audit::ocsf;
use crate::chain::Chain;
use crate::document::{Faults, read_secret};
use crate::limits::{HTTPS_ANSWER_MAX, HTTPS_BODY, HTTPS_HEADERS_MAX, HTTPS_REFUSED_PAUSE, HTTPS_RETRY_AFTER_MAX};
use crate::secret::Secret;
use crate::target::{Host, Target};

/// Where it is, and how it is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where it is, and how it is reached.
    pub place: Place,
    /// What is asked for there: the path, with the query.
    pub path: Path,
    /// What shows who is asking, if the collector wants to know.
    pub token: Option<Token>,
    /// What a body is.
    pub format: Format,
    /// How many records go into one request.
    pub records: usize,
    /// How long the first of them waits for more.
    pub linger: Duration,
}

/// What a body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Lines as the trail has them.
    #[default]
    Caponier,
    /// An array of OCSF events.
    Ocsf,
}

/// The path of a URL, with the query. Some collectors take a secret there: it does not print.
#[derive(Clone, PartialEq, Eq)]
pub struct Path(Secret<String>);

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[hidden]")
    }
}

/// What shows a collector who is asking. Two are equal if they are in the same file, whatever it holds.
#[derive(Debug, Clone)]
pub struct Token {
    file: PathBuf,
    value: Secret<String>,
}

/// Why a file holds no token. It repeats nothing of what it holds.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read, or can be read by others.
    #[error("token file {0}")]
    Read(Faults),
    /// It holds something else.
    #[error("token file {} must hold one line, the token alone", .0.display())]
    Form(PathBuf),
}

impl Token {
    /// Reads a file of mode 0600 with one line.
    ///
    /// # Errors
    /// If it cannot be read, others can read it, or it holds something else.
    pub fn read(file: PathBuf) -> Result<Self, TokenError> {
        let text = read_secret(&file).map_err(TokenError::Read)?;
        let value = Secret::new(text.expose().trim_end_matches(['\r', '\n']).to_owned());
        if is_token(value.expose()) { Ok(Self { file, value }) } else { Err(TokenError::Form(file)) }
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.file == other.file
    }
}

impl Eq for Token {}

impl Renew for Token {
    const WHAT: &'static str = "token";

    fn again(&self) -> Result<Self, String> {
        Self::read(self.file.clone()).map_err(|error| error.to_string())
    }
}

/// The URL of a collector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// Its host and port.
    pub to: Target,
    /// Whether TLS is spoken with it.
    pub tls: bool,
    /// What is asked for there.
    pub path: Path,
}

/// Why a text is no URL of a collector. It is never repeated: there may be a secret in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// It begins otherwise.
    #[error("a URL begins with https://")]
    Scheme,
    /// In clear to another host.
    #[error("records go in clear to this host alone: http:// is for 127.0.0.1 and [::1], as literals")]
    Clear,
    /// There is a user, or a password.
    #[error("credentials do not belong into a URL: put the token into a file and name it in token_file")]
    Credentials,
    /// The host or the port.
    #[error("a URL is https://HOST/PATH or https://HOST:PORT/PATH")]
    Host,
    /// What comes after them.
    #[error("the path of a URL is printable ASCII without spaces and without '#'")]
    Path,
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let (tls, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (None, Some(rest)) => (false, rest),
            (None, None) => return Err(UrlError::Scheme),
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        if authority.contains('@') {
            return Err(UrlError::Credentials);
        }
        // A port can be told from the end of an address by the bracket.
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
        let standard = if tls { 443 } else { 80 };
        let authority = if has_port { authority.to_owned() } else { format!("{authority}:{standard}") };
        let to: Target = authority.parse().map_err(|_| UrlError::Host)?;
        if !tls && !matches!(to.host, Host::Address(address) if is_this_host(address)) {
            return Err(UrlError::Clear);
        }
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        if !path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') || path.parse::<hyper::Uri>().is_err() {
            return Err(UrlError::Path);
        }
        Ok(Self { to, tls, path: Path(Secret::new(path)) })
    }
}

fn is_this_host(address: IpAddr) -> bool {
    address.is_loopback()
}

/// Whether a text can be a token: what a header takes, and no spaces.
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Sends what there is until there will be no more, or `stop` fires. What the collector will never take fails a sink that is
/// `required`, and is lost to another.
pub async fn run(
    config: Config,
    batches: Batches,
    progress: Progress,
    means: Means,
    required: bool,
    stop: CancellationToken,
) {
    let Config { place, path, token, format, records, linger } = config;
    let way = Way::new(place, &means);
    let token = token.map(|token| Renewed::new(token, means.tasks));
    deliver(Https { way, path, token, format, records, linger }, batches, progress, required, stop).await;
}

struct Https {
    way: Way,
    path: Path,
    token: Option<Renewed<Token>>,
    format: Format,
    records: usize,
    linger: Duration,
}

/// A connection to a collector.
struct Session {
    requests: SendRequest<Full<Bytes>>,
    /// What moves its bytes; there is none when it is over.
    connection: Option<Connection>,
}

type Connection = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

impl Session {
    /// Does something that needs the connection to go on.
    async fn drive<T>(connection: &mut Option<Connection>, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            let Some(moving) = connection else { return work.await };
            tokio::select! {
                biased;
                done = &mut work => return done,
                _ = moving => *connection = None,
            }
        }
    }
}

impl Collector for Https {
    type Session = Session;

    fn most(&self) -> Most {
        Most { records: self.records, bytes: HTTPS_BODY, linger: self.linger }
    }

    async fn open(&self) -> Result<Session, Failure> {
        if let Some(token) = &self.token {
            // What was renewed meanwhile counts from here on.
            let _ = token.read().await;
        }
        let stream: Box<dyn Stream> = self.way.reach().await?;
        let made = http1::Builder::new()
            .max_buf_size(HTTPS_ANSWER_MAX)
            .max_headers(HTTPS_HEADERS_MAX)
            .handshake(TokioIo::new(stream))
            .await;
        let (requests, connection) = made.map_err(|error| Failure::new("connection_lost", Chain(&error)))?;
        Ok(Session { requests, connection: Some(Box::pin(connection)) })
    }

    async fn send(&self, session: &mut Session, portion: &Portion) -> Result<(), Failure> {
        let request = self.request(portion)?;
        let Session { requests, connection } = session;
        let answer = Session::drive(connection, async {
            requests.ready().await?;
            requests.send_request(request).await
        });
        let lost = |error: hyper::Error| {
            let reason = if error.is_parse() { "protocol" } else { "connection_lost" };
            Failure::new(reason, Chain(&error))
        };
        let answer = answer.await.map_err(lost)?;
        if let Err(failure) = judge(&answer) {
            return Err(self.renewed(failure).await);
        }
        // It has said that it has them; what else it says must only be out of the way of the next answer.
        let mut body = answer.into_body();
        let mut read = 0;
        while let Some(frame) = Session::drive(connection, body.frame()).await {
            read += frame.ok().and_then(|frame| frame.data_ref().map(Bytes::len)).unwrap_or(HTTPS_ANSWER_MAX);
            if read >= HTTPS_ANSWER_MAX {
                *connection = None;
                break;
            }
        }
        Ok(())
    }

    async fn over(session: &mut Session) {
        if let Some(connection) = &mut session.connection {
            // How it ended tells nothing: what was sent was answered.
            let _ = connection.await;
            session.connection = None;
        }
    }

    async fn close(session: Session) {
        let Session { requests, connection } = session;
        drop(requests);
        if let Some(connection) = connection {
            let _ = connection.await;
        }
    }
}

impl Https {
    /// A failure, after which it goes on soon if it is about a token that has been renewed by now.
    async fn renewed(&self, failure: Failure) -> Failure {
        let Some(token) = self.token.as_ref().filter(|_| failure.reason == UNAUTHORISED) else { return failure };
        let refused = token.last().value;
        let pause = if token.read().await.value == refused { failure.pause } else { Duration::ZERO };
        Failure { pause, ..failure }
    }

    fn request(&self, portion: &Portion) -> Result<Request<Full<Bytes>>, Failure> {
        let (kind, body) = match self.format {
            Format::Caponier => {
                let mut body = Vec::with_capacity(portion.len());
                portion.lines().for_each(|line| body.extend_from_slice(line));
                ("application/x-ndjson", body)
            }
            Format::Ocsf => ("application/json", ocsf_array(portion)),
        };
        let to = self.way.to();
        let mut request = Request::post(self.path.0.expose().as_str())
            .header(HOST, to.to_string())
            .header(USER_AGENT, concat!("caponier/", env!("CARGO_PKG_VERSION")))
            .header(CONTENT_TYPE, kind);
        if let Some((first, last)) = portion.ends() {
            // The digest of the record before stands for the trail and for the place in it.
            request = request.header("Idempotency-Key", format!("{}-{}-{}", first.prev, first.seq, last.seq));
        }
        if let Some(token) = &self.token {
            let header = Secret::new(format!("Bearer {}", token.last().value.expose()));
            let value = HeaderValue::from_str(header.expose());
            let mut value = value.map_err(|_| Failure::new("protocol", "the token does not fit into a header"))?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        // What could be wrong with it was refused with the configuration.
        request.body(Full::new(body.into())).map_err(|_| Failure::new("protocol", "the request could not be made"))
    }
}

fn ocsf_array(portion: &Portion) -> Vec<u8> {
    let mut body = vec![b'['];
    for line in portion.lines() {
        if body.len() > 1 {
            body.push(b',');
        }
        let record = serde_json::from_slice::<Value>(line).unwrap_or_else(|_| String::from_utf8_lossy(line).into());
        // A value always serialises.
        body.extend_from_slice(ocsf::event(&record).to_string().as_bytes());
    }
    body.push(b']');
    body
}

/// What an answer means.
fn judge<B>(answer: &Response<B>) -> Result<(), Failure> {
    let status = answer.status();
    let (reason, pause) = match status {
        _ if status.is_success() => return Ok(()),
        // It asks for patience, and says how much.
        StatusCode::TOO_MANY_REQUESTS | StatusCode::TOO_EARLY => ("too_many_requests", retry_after(answer)),
        _ if status.is_server_error() => ("server_failed", retry_after(answer)),
        StatusCode::REQUEST_TIMEOUT => ("timed_out", Duration::ZERO),
        // Nothing that time alone would mend.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            (UNAUTHORISED, HTTPS_REFUSED_PAUSE)
        }
        _ if status.is_redirection() => ("redirected", HTTPS_REFUSED_PAUSE),
        // It speaks of the records, and would refuse the same again.
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
            return Err(Failure { for_good: true, ..Failure::new("refused", answered(status)) });
        }
        // It says nothing of them: a wrong path, a balancer without its collector, headers that are too long.
        _ => ("refused", HTTPS_REFUSED_PAUSE),
    };
    Err(Failure { pause, ..Failure::new(reason, answered(status)) })
}

fn answered(status: StatusCode) -> String {
    format!("it answered {}", status.as_u16())
}

/// It wants to know who is asking.
const UNAUTHORISED: &str = "unauthorised";

/// How many seconds the collector asks for; a date is not read.
fn retry_after<B>(answer: &Response<B>) -> Duration {
    let header = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let seconds = header.and_then(|text| text.trim().parse().ok()).unwrap_or_default();
    Duration::from_secs(seconds).min(HTTPS_RETRY_AFTER_MAX)
}

#[cfg(test)]
mod tests;

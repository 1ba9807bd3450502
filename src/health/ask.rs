//! Asking a program how it is: `caponier health`.

use std::io;
use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::Report;
use crate::limits;

/// Why it is not known how a program is.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody there.
    #[error("nobody answers at {place}")]
    Connect {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No file.
    #[error("the health file {place} could not be read")]
    File {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The answer.
    #[error("{place} answers, but not about health")]
    Http {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// Another answer than was asked for.
    #[error("{place} answers with {what}")]
    Answer {
        /// Where.
        place: String,
        /// What it says.
        what: String,
    },
    /// It takes too long.
    #[error("{place} has not answered within {} s", limits::HEALTH_CONNECTION.as_secs())]
    Slow {
        /// Where.
        place: String,
    },
    /// The file is old.
    #[error("the health file {place} is {seconds} s old, and a program that lives renews it every {} s", limits::HEALTH_FILE_EVERY.as_secs())]
    Stale {
        /// Where.
        place: String,
        /// How old.
        seconds: u64,
    },
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// Whether it lives, which says no more than that.
    Live,
    /// How each part is.
    Ready,
}

impl Question {
    fn path(self) -> &'static str {
        match self {
            Self::Live => "/livez",
            Self::Ready => "/readyz?verbose",
        }
    }
}

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// To [`Question::Live`].
    Live(bool),
    /// To [`Question::Ready`].
    Report(Box<Report>),
}

/// Asks at a port; `host` and `port` as in a URL.
///
/// # Errors
/// If nobody answers, or not as expected.
pub async fn port(host: &str, port: u16, question: Question) -> Result<Answer, AskError> {
    let place = format!("http://{host}:{port}");
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    within(&place, async {
        let connect = |source| AskError::Connect { place: place.clone(), source };
        let stream = TcpStream::connect((bare, port)).await.map_err(connect)?;
        http(&place, &format!("{host}:{port}"), stream, question).await
    })
    .await
}

/// Asks at a health socket.
///
/// # Errors
/// If nobody answers, or not as expected.
pub async fn socket(path: &Path, question: Question) -> Result<Answer, AskError> {
    let place = path.display().to_string();
    within(&place, async {
        let connect = |source| AskError::Connect { place: place.clone(), source };
        let stream = UnixStream::connect(path).await.map_err(connect)?;
        http(&place, "localhost", stream, question).await
    })
    .await
}

/// Reads a health file, and judges its age by the clock of the file system.
///
/// # Errors
/// If there is none, or it is stale.
pub fn file(path: &Path) -> Result<Report, AskError> {
    let place = path.display().to_string();
    let failed = |source| AskError::File { place: place.clone(), source };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    let text = std::fs::read(path).map_err(failed)?;
    // One that is from after now is as old as it is early: the clock was set back, and nobody knows who writes it still.
    let written = metadata.modified().map_err(failed)?;
    let age = SystemTime::now().duration_since(written).unwrap_or_else(|early| early.duration());
    if age > limits::HEALTH_FILE_STALE {
        return Err(AskError::Stale { place, seconds: age.as_secs() });
    }
    serde_json::from_slice(&text).map_err(|error| failed(error.into()))
}

async fn within<T>(place: &str, answer: impl Future<Output = Result<T, AskError>>) -> Result<T, AskError> {
    let slow = || Err(AskError::Slow { place: place.to_owned() });
    timeout(limits::HEALTH_CONNECTION, answer).await.unwrap_or_else(|_| slow())
}

async fn http(
    place: &str,
    host: &str,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    question: Question,
) -> Result<Answer, AskError> {
    let failed = |source| AskError::Http { place: place.to_owned(), source };
    let (mut sender, connection) = http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream)).await.map_err(failed)?;
    let request = Request::get(question.path()).header(HOST, host).header(CONNECTION, "close").body(Empty::new());
    let other = |what: String| AskError::Answer { place: place.to_owned(), what };
    let request = request.map_err(|error| other(error.to_string()))?;
    let asked = async {
        let response = sender.send_request(request).await.map_err(failed)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), limits::HEALTH_ANSWER_MAX).collect().await;
        let body = body.map_err(|error| other(error.to_string()))?.to_bytes();
        if !matches!(status, StatusCode::OK | StatusCode::SERVICE_UNAVAILABLE) {
            return Err(other(format!("HTTP {status}")));
        }
        match question {
            Question::Live => Ok(Answer::Live(status == StatusCode::OK)),
            Question::Ready => serde_json::from_slice(&body)
                .map(|report| Answer::Report(Box::new(report)))
                .map_err(|_| other(format!("HTTP {status}, and nothing about its parts"))),
        }
    };
    tokio::pin!(asked);
    // The connection moves on only while it is polled, and may be over before its answer is read.
    tokio::select! {
        answer = &mut asked => answer,
        ended = connection => {
            ended.map_err(failed)?;
            asked.await
        }
    }
}

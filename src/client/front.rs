//! How a local connection says where it wants to go, and what it is told of the outcome: by the listener it comes to, over
//! SOCKS5, or by an HTTP CONNECT.
//!
//! Promised: a connection that has asked for nothing yet costs no more than its place, a few kilobytes and
//! [`limits::FRONT_TIMEOUT`]; not a byte behind the request is read, so that what a client sends along belongs to the tunnel;
//! nothing that a web page can make a browser send is a request (see SECURITY.md).

mod http;
mod socks;

use std::fmt;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

use super::keeper::Cause;
use crate::limits;
use crate::target::Target;

/// How a listener learns where its connections are to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Front {
    /// All to one target.
    Fixed(Target),
    /// As each says, over SOCKS5 (RFC 1928).
    Socks,
    /// As each says, by an HTTP CONNECT (RFC 9110 §9.3.6).
    Http,
}

impl fmt::Display for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(target) => target.fmt(f),
            Self::Socks => f.write_str("socks"),
            Self::Http => f.write_str("http-proxy"),
        }
    }
}

impl Front {
    /// Where a connection wants to go. One that does not say so in time, or not well, has been told what was wrong, as far as
    /// there is a way to.
    pub(super) async fn ask(&self, stream: &mut TcpStream) -> Option<Target> {
        let deadline = Instant::now() + limits::FRONT_TIMEOUT;
        let fault = match self {
            Self::Fixed(target) => return Some(target.clone()),
            Self::Socks => match timeout_at(deadline, socks::ask(stream)).await {
                Ok(Ok(target)) => return Some(target),
                Ok(Err(fault)) => {
                    say(stream, &fault.reply()).await;
                    fault.to_string()
                }
                Err(_) => "it has not asked for anything in time".to_owned(),
            },
            Self::Http => {
                let asked = timeout_at(deadline, http::ask(stream)).await;
                match asked.unwrap_or(Err(http::Fault::Slow)) {
                    Ok(target) => return Some(target),
                    Err(fault) => {
                        say(stream, &fault.reply()).await;
                        fault.to_string()
                    }
                }
            }
        };
        debug!(fault, front = %self, "a local connection asked for nothing that can be had");
        None
    }

    /// Tells a connection that it is connected.
    ///
    /// # Errors
    /// If it has gone meanwhile.
    pub(super) async fn opened(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        match self {
            Self::Fixed(_) => Ok(()),
            Self::Socks => stream.write_all(&socks::OPENED).await,
            Self::Http => stream.write_all(http::OPENED).await,
        }
    }

    /// Tells a connection that it is not.
    pub(super) async fn refused(&self, mut stream: TcpStream, cause: Cause) {
        match self {
            // There is no way to say why on a plain socket; a reset at least does not look like an orderly end.
            Self::Fixed(_) => drop(stream.set_zero_linger()),
            Self::Socks => say(&mut stream, &socks::refused(cause)).await,
            Self::Http => say(&mut stream, &http::refused(cause)).await,
        }
    }
}

/// Says the last words to a connection, and waits a little for it to have read them: what it has sent and nobody has read would
/// take them from it otherwise.
async fn say(stream: &mut TcpStream, words: &[u8]) {
    let said = async {
        if !words.is_empty() {
            stream.write_all(words).await?;
        }
        stream.shutdown().await?;
        let mut scrap = [0; 1024];
        for _ in 0..limits::FRONT_HEAD_MAX / scrap.len() {
            if stream.read(&mut scrap).await? == 0 {
                break;
            }
        }
        std::io::Result::Ok(())
    };
    // Whoever does not want to hear it need not.
    drop(timeout(limits::FRONT_FAREWELL, said).await);
}

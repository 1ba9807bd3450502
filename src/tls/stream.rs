//! A connection under TLS, from either end.
//!
//! Promised: an end that was not announced is an error, so that what was cut off does not look complete; what is read from
//! the socket comes in large pieces, because the library asks for small ones.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};

use crate::delegate::writes_of;
use crate::limits::TLS_READ_AHEAD;

/// A connection under TLS over an `S`. What is written may be held back until it is flushed.
pub struct TlsStream<S>(tokio_rustls::TlsStream<Under<S>>);

/// What TLS runs over.
pub(super) type Under<S> = BufReader<Metered<S>>;

/// A stream of which so much may be read.
pub(super) struct Metered<S> {
    stream: S,
    left: Option<usize>,
}

/// Has TLS run over `stream`, of which no more than `most` is read in the handshake.
pub(super) fn under<S: AsyncRead + Unpin>(stream: S, most: Option<usize>) -> Under<S> {
    BufReader::with_capacity(TLS_READ_AHEAD, Metered { stream, left: most })
}

/// What [`under`] was given.
pub(super) fn out_from_under<S: AsyncRead + Unpin>(under: Under<S>) -> S {
    under.into_inner().stream
}

impl<S: AsyncRead + Unpin> TlsStream<S> {
    /// Of a handshake that is over.
    pub(super) fn new(stream: impl Into<tokio_rustls::TlsStream<Under<S>>>) -> Self {
        let mut stream = stream.into();
        stream.get_mut().0.get_mut().left = None;
        Self(stream)
    }

    /// What it runs over.
    #[must_use]
    pub fn get_ref(&self) -> &S {
        &self.0.get_ref().0.get_ref().stream
    }

    /// What the two ends have agreed to speak inside, if they have.
    #[must_use]
    pub fn alpn(&self) -> Option<&[u8]> {
        self.session().alpn_protocol()
    }

    /// What was negotiated.
    pub(super) fn session(&self) -> &rustls::CommonState {
        self.0.get_ref().1
    }
}

impl<S> fmt::Debug for TlsStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream").finish_non_exhaustive()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    writes_of!(0);
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        if this.left == Some(0) {
            let error = rustls::Error::General("more was sent than any handshake takes".to_owned());
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, error)));
        }
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        if let Some(left) = &mut this.left {
            *left = left.saturating_sub(buf.filled().len() - before);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    writes_of!(stream);
}

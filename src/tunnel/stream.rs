//! A connection to another host, bare or in layers: TLS, WebSocket, TLS within TLS.
//!
//! Promised: whoever moves bytes over a [`Stream`] need not know what it is made of; a bare socket stays one, so that
//! nothing is paid for layers that are not there; a connection can be [reset](Stream::reset) through all its layers, so
//! that what broke does not look like an orderly end.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::TcpStream;

use crate::delegate::writes_of;
use crate::tls::TlsStream;

/// A layer over a socket, or what stands for one.
pub trait Layer: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// The socket at the bottom, if there is one.
    fn socket(&self) -> Option<&TcpStream>;
}

impl Layer for DuplexStream {
    fn socket(&self) -> Option<&TcpStream> {
        None
    }
}

impl Layer for TcpStream {
    fn socket(&self) -> Option<&TcpStream> {
        Some(self)
    }
}

impl<S: Layer> Layer for TlsStream<S> {
    fn socket(&self) -> Option<&TcpStream> {
        self.get_ref().socket()
    }
}

/// A connection. What is written to one in layers may be held back until it is flushed.
pub struct Stream(Kind);

enum Kind {
    Tcp(TcpStream),
    Layered(Box<dyn Layer>),
}

impl Stream {
    /// What `layer` carries.
    #[must_use]
    pub fn layered(layer: impl Layer) -> Self {
        Self(Kind::Layered(Box::new(layer)))
    }

    /// The same, of which `head` has been read already and is read again first.
    #[must_use]
    pub fn preceded_by(self, head: Bytes) -> Self {
        if head.is_empty() { self } else { Self::layered(Preceded { head, stream: self }) }
    }

    /// The bare socket, if it is one.
    ///
    /// # Errors
    /// The stream as it was, if there are layers over it.
    pub fn into_tcp(self) -> Result<TcpStream, Self> {
        match self.0 {
            Kind::Tcp(stream) => Ok(stream),
            layered @ Kind::Layered(_) => Err(Self(layered)),
        }
    }

    /// Ends the connection so that the other end sees that something broke. Without a socket it is merely dropped.
    pub fn reset(self) {
        if let Some(socket) = self.socket() {
            // If the socket is beyond even a reset, there is nobody left to be told.
            drop(socket.set_zero_linger());
        }
    }
}

impl Layer for Stream {
    fn socket(&self) -> Option<&TcpStream> {
        match &self.0 {
            Kind::Tcp(stream) => Some(stream),
            Kind::Layered(layer) => layer.socket(),
        }
    }
}

/// A stream after what was read of it too early.
struct Preceded {
    head: Bytes,
    stream: Stream,
}

impl Layer for Preceded {
    fn socket(&self) -> Option<&TcpStream> {
        self.stream.socket()
    }
}

impl AsyncRead for Preceded {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.head.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        }
        let length = this.head.len().min(buf.remaining());
        buf.put_slice(&this.head.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Preceded {
    writes_of!(stream);
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Self(Kind::Tcp(stream))
    }
}

impl From<DuplexStream> for Stream {
    fn from(stream: DuplexStream) -> Self {
        Self::layered(stream)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Tcp(stream) => stream.fmt(f),
            Kind::Layered(_) => f.write_str("Layered"),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Kind::Layered(layer) => Pin::new(layer).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Kind::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Kind::Layered(layer) => Pin::new(layer).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Kind::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Kind::Layered(layer) => Pin::new(layer).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.0 {
            Kind::Tcp(stream) => stream.is_write_vectored(),
            Kind::Layered(layer) => layer.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Kind::Layered(layer) => Pin::new(layer).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Kind::Layered(layer) => Pin::new(layer).poll_shutdown(cx),
        }
    }
}

//! The byte stream under an SSH session.
//!
//! Promised: the session can be cut from outside at any moment ([`Control::cut`]), whatever it is waiting for, because its
//! next read or write fails; and everybody who waits for [`Control::gone`] learns when the session has let go of its
//! stream, by whatever way it ended. The SSH library offers neither. The stream also replays what was read before the
//! session began, and holds back what was already said in its place.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};

/// The outside handle of a [`Transport`]. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Control {
    cut: CancellationToken,
    gone: CancellationToken,
}

impl Control {
    /// A handle for a transport yet to be made.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every further read and write of the session fail.
    pub fn cut(&self) {
        self.cut.cancel();
    }

    /// Fires once the session has ended and dropped its stream.
    #[must_use]
    pub fn gone(&self) -> &CancellationToken {
        &self.gone
    }
}

/// A stream that [`Control`] can cut.
pub struct Transport<S> {
    stream: S,
    replay: Bytes,
    unsaid: usize,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    was_cut: bool,
    _gone: DropGuard,
}

impl<S> Transport<S> {
    /// Puts `stream` under control. `replay` is read first; the first `unsaid` bytes written are dropped, because the peer
    /// has them already.
    pub fn new(stream: S, control: &Control, replay: Bytes, unsaid: usize) -> Self {
        Self {
            stream,
            replay,
            unsaid,
            cut: Box::pin(control.cut.clone().cancelled_owned()),
            was_cut: false,
            _gone: control.gone.clone().drop_guard(),
        }
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.was_cut || self.cut.as_mut().poll(cx).is_ready() {
            // A finished future must not be polled again.
            self.was_cut = true;
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "cut"));
        }
        Ok(())
    }
}

use std::future::Future;

impl<S: AsyncRead + Unpin> AsyncRead for Transport<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        if !self.replay.is_empty() {
            let n = self.replay.len().min(buf.remaining());
            buf.put_slice(&self.replay[..n]);
            self.replay.advance(n);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Transport<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        if self.unsaid > 0 {
            let n = self.unsaid.min(buf.len());
            self.unsaid -= n;
            return Poll::Ready(Ok(n));
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn cut_ends_a_blocked_read_and_a_blocked_write() {
        let (near, _far) = tokio::io::duplex(1);
        let control = Control::new();
        let (mut reader, mut writer) = tokio::io::split(Transport::new(near, &control, Bytes::new(), 0));
        let both = async {
            let mut buf = [0; 1];
            tokio::join!(reader.read(&mut buf), writer.write_all(b"more than fits"))
        };
        tokio::pin!(both);
        assert!(tokio::time::timeout(Duration::from_millis(20), &mut both).await.is_err(), "both must block first");
        control.cut();
        let (read, written) = tokio::time::timeout(Duration::from_secs(5), both).await.expect("cut wakes both");
        assert_eq!(read.expect_err("cut").kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(written.expect_err("cut").kind(), io::ErrorKind::ConnectionAborted);
    }

    #[tokio::test]
    async fn replays_and_holds_back() {
        let (near, mut far) = tokio::io::duplex(64);
        let control = Control::new();
        let mut transport = Transport::new(near, &control, Bytes::from_static(b"before "), 6);
        far.write_all(b"after").await.expect("written");
        let mut read = [0; 12];
        transport.read_exact(&mut read).await.expect("read");
        assert_eq!(&read, b"before after");
        transport.write_all(b"said\r\nnew").await.expect("written");
        let mut read = [0; 3];
        far.read_exact(&mut read).await.expect("read");
        assert_eq!(&read, b"new");
        assert!(!control.gone().is_cancelled());
        drop(transport);
        assert!(control.gone().is_cancelled());
    }
}

//! A byte stream inside binary WebSocket messages (RFC 6455), so that an SSH session passes balancers which understand HTTP
//! alone.
//!
//! Promised:
//! - where messages and frames begin and end means nothing, since what they carry is a stream; so none is ever held here: what
//!   a frame carries is handed on as it comes, unmasked in the very buffer that it was read into. What waits to be written is
//!   copied once, and bounded ([`limits::WEBSOCKET_UNSENT`]);
//! - what our ends never send ends the connection: text, extensions, a message above [`limits::WEBSOCKET_MESSAGE_MAX`], frames
//!   without a byte for anybody over and over;
//! - the stream ends in order only where the other end has said that it closes. An end without that is an error;
//! - each end sends a ping every [`limits::WEBSOCKET_PING`], whatever else there is to send, for balancers that count nothing
//!   else. Nobody waits for the pong: a balancer may answer in the place of the gateway, so that it would prove nothing. What
//!   finds out that the other end is gone is the keepalive of the SSH session inside, which only that end can answer.
//!
//! What waits on what: nothing here is a task. Pings are sent, and what is left to be written is, when the stream is read from,
//! which a session always does unless it is busy writing.

mod frame;
mod upgrade;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use super::stream::Layer;
use crate::limits;
use frame::{Close, Control, Incoming, Violation};
pub use upgrade::{Upgrade, UpgradeError, UpgradeFault, connect};

/// Which end of a WebSocket this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that has connected; it masks what it sends.
    Client,
    /// The one that has accepted.
    Server,
}

/// A WebSocket, as a stream.
pub struct WebSocket<S> {
    stream: S,
    role: Role,
    /// What was read of it before.
    rest: Bytes,
    incoming: Incoming,
    /// Frames to be written, of which the first `written` bytes were.
    outgoing: Vec<u8>,
    written: usize,
    ping: Pin<Box<Sleep>>,
    /// Whether we have said that we close.
    said_goodbye: bool,
    /// What the other end has said when it closed.
    closed: Option<Close>,
    /// What it has done that it must not.
    violation: Option<Violation>,
}

impl<S> WebSocket<S> {
    /// Over a stream on which both ends have agreed to it. `rest` is what was read of the other end's frames already.
    pub fn new(stream: S, role: Role, rest: Bytes) -> Self {
        Self {
            stream,
            role,
            rest,
            incoming: Incoming::new(role),
            outgoing: Vec::new(),
            written: 0,
            ping: Box::pin(sleep(limits::WEBSOCKET_PING)),
            said_goodbye: false,
            closed: None,
            violation: None,
        }
    }

    fn unsent(&self) -> usize {
        self.outgoing.len() - self.written
    }

    /// Queues a control frame, if there is room for one that matters less than what waits.
    fn say(&mut self, control: Control, payload: &[u8]) {
        let matters = control == Control::Close;
        if !self.said_goodbye && (matters || self.unsent() < limits::WEBSOCKET_UNSENT) {
            frame::write_control(&mut self.outgoing, self.role, control, payload);
            self.said_goodbye |= matters;
        }
    }

    /// Goes on when the stream cannot any more: an orderly end, or an error.
    fn ended(&self) -> Option<io::Result<()>> {
        if let Some(violation) = self.violation {
            return Some(Err(io::Error::new(io::ErrorKind::InvalidData, violation)));
        }
        let close = self.closed?;
        Some(if close.is_orderly() { Ok(()) } else { Err(io::Error::new(io::ErrorKind::ConnectionAborted, close)) })
    }
}

impl<S: AsyncWrite + Unpin> WebSocket<S> {
    /// Writes what is queued, as far as the stream takes it.
    fn write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.outgoing.len() {
            let n = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.outgoing[self.written..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
        }
        self.outgoing.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    /// Writes what is queued and flushes the stream, as far as that goes now.
    fn push(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.write_out(cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Pending => return Ok(()),
        }
        match Pin::new(&mut self.stream).poll_flush(cx) {
            Poll::Ready(flushed) => flushed,
            Poll::Pending => Ok(()),
        }
    }

    fn keep_awake(&mut self, cx: &mut Context<'_>) {
        while self.ping.as_mut().poll(cx).is_ready() {
            self.ping.as_mut().reset(Instant::now() + limits::WEBSOCKET_PING);
            if self.outgoing.is_empty() {
                // What a busy time has left of it would be held by each of many idle ones.
                self.outgoing = Vec::new();
            }
            self.say(Control::Ping, &[]);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.keep_awake(cx);
        loop {
            if this.unsent() > 0
                && let Err(error) = this.push(cx)
                && this.ended().is_none()
            {
                return Poll::Ready(Err(error));
            }
            if let Some(end) = this.ended() {
                return Poll::Ready(end);
            }
            if buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            let before = buf.filled().len();
            if this.rest.is_empty() {
                ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
                if buf.filled().len() == before {
                    return Poll::Ready(Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the WebSocket was not closed",
                    )));
                }
            } else {
                let n = this.rest.len().min(buf.remaining());
                buf.put_slice(&this.rest[..n]);
                this.rest.advance(n);
            }
            let (kept, events) = this.incoming.take(&mut buf.filled_mut()[before..]);
            buf.set_filled(before + kept);
            for event in events {
                match event {
                    Ok((Control::Ping, payload)) => this.say(Control::Pong, &payload),
                    Ok((Control::Pong, _)) => {}
                    Ok((Control::Close, payload)) => {
                        let close = Close::of(&payload);
                        this.say(Control::Close, &close.answer());
                        this.closed = Some(close);
                    }
                    Err(violation) => {
                        this.say(Control::Close, &violation.code().to_be_bytes());
                        this.violation = Some(violation);
                    }
                }
            }
            if kept > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.closed.is_some_and(Close::is_orderly) {
            // It goes nowhere, as over TCP: who has something to say when the other end has closed learns of that by reading.
            return Poll::Ready(Ok(bytes.len()));
        }
        if this.said_goodbye {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if this.unsent() >= limits::WEBSOCKET_UNSENT {
            ready!(this.write_out(cx))?;
        }
        let n = bytes.len().min(limits::CHUNK);
        frame::write_data(&mut this.outgoing, this.role, &bytes[..n]);
        // What is left waits for the next write, read or flush.
        match this.write_out(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(n)),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.write_out(cx))?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    /// Says that we close. What the other end still sends can be read until it has said so too.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.say(Control::Close, &frame::NORMAL.to_be_bytes());
        ready!(this.write_out(cx))?;
        ready!(Pin::new(&mut this.stream).poll_flush(cx))?;
        // A balancer that sees half of the connection end may end the other half too, with what is still under way on it.
        if this.closed.is_some() { Pin::new(&mut this.stream).poll_shutdown(cx) } else { Poll::Ready(Ok(())) }
    }
}

impl<S: Layer> Layer for WebSocket<S> {
    fn socket(&self) -> Option<&TcpStream> {
        self.stream.socket()
    }
}

const _: () = assert!(limits::WEBSOCKET_PING.as_secs() < 50, "see limits::WEBSOCKET_PING");

#[cfg(test)]
mod tests;

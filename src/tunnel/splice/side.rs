//! The two sides of a splice, and the halves of each: what is read, and what is written, whatever it is made of.
//!
//! Promised: a side that is silent holds no buffer; what is written to a side in layers is flushed, because nobody would ask for
//! that later.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::across::Rest;
use crate::limits;
use crate::tunnel::bridge::{self, Receipts};
use crate::tunnel::pool::Buffer;
use crate::tunnel::ssh;
use crate::tunnel::stream::Stream;

/// One side of a splice.
pub enum Side {
    /// A socket.
    Tcp(TcpStream),
    /// A channel.
    Channel(ssh::Channel),
    /// A connection in layers, or a pipe within the process.
    Stream(Stream),
    /// The way to another thread, where the other half of the forward is.
    Bridge(Bridge),
}

/// An end of a bridge as a side of a splice.
pub struct Bridge {
    pub(super) end: bridge::End,
    /// What the principal's half knows of the target's.
    pub(super) rest: Option<Rest>,
}

pub(super) enum Reader {
    Tcp(OwnedReadHalf),
    Channel(ssh::Reader),
    Stream(ReadHalf<Stream>),
    Bridge(bridge::Reader),
}

pub(super) enum Writer {
    Tcp(OwnedWriteHalf),
    Channel(ssh::Writer),
    Stream(WriteHalf<Stream>),
    Bridge(bridge::Writer),
}

impl Side {
    pub(super) fn split(self) -> (Reader, Writer) {
        match self {
            Self::Tcp(stream) => {
                let (reader, writer) = stream.into_split();
                (Reader::Tcp(reader), Writer::Tcp(writer))
            }
            Self::Channel(channel) => (Reader::Channel(channel.reader), Writer::Channel(channel.writer)),
            Self::Stream(stream) => match stream.into_tcp() {
                Ok(stream) => Self::Tcp(stream).split(),
                Err(stream) => {
                    let (reader, writer) = tokio::io::split(stream);
                    (Reader::Stream(reader), Writer::Stream(writer))
                }
            },
            Self::Bridge(bridge) => (Reader::Bridge(bridge.end.reader), Writer::Bridge(bridge.end.writer)),
        }
    }

    pub(super) fn rest(&mut self) -> Option<Rest> {
        match self {
            Self::Bridge(bridge) => bridge.rest.take(),
            Self::Tcp(_) | Self::Channel(_) | Self::Stream(_) => None,
        }
    }
}

impl Reader {
    /// Reads from what is a stream in itself; a channel and a bridge have readers of their own.
    pub(super) async fn read(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Tcp(reader) => read_from(reader).await,
            Self::Stream(reader) => read_from(reader).await,
            Self::Channel(reader) => Ok(reader.bytes().await),
            Self::Bridge(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

async fn read_from(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Bytes>> {
    let read = poll_fn(|cx| {
        // Given back at once where there is nothing to read: a connection that is silent needs no buffer. Not `try_read`,
        // which would not take a short read as a sign that nothing is left, and look again.
        let mut buffer = Buffer::take();
        let mut read = ReadBuf::new(&mut buffer);
        ready!(Pin::new(&mut *reader).poll_read(cx, &mut read))?;
        let filled = read.filled().len();
        Poll::Ready(io::Result::Ok(buffer.into_bytes(filled)))
    });
    Ok(Some(read.await?).filter(|bytes| !bytes.is_empty()))
}

impl Writer {
    pub(super) async fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        match self {
            Self::Tcp(writer) => writer.write_all(&bytes).await,
            Self::Channel(writer) => writer.send(bytes).await,
            Self::Stream(writer) => {
                writer.write_all(&bytes).await?;
                writer.flush().await
            }
            Self::Bridge(writer) => writer.send(bytes).await,
        }
    }

    /// How many messages it takes at once.
    pub(super) fn batch(&self) -> usize {
        match self {
            Self::Tcp(_) => limits::BATCH,
            _ => 1,
        }
    }

    /// Sends as much of `batch` as is taken at once, and tells how much that is; to a socket with one call.
    pub(super) async fn send_some(&mut self, batch: &[Bytes]) -> io::Result<usize> {
        let Some(first) = batch.first() else { return Ok(0) };
        let sent = match self {
            Self::Tcp(writer) => {
                let slices: [IoSlice<'_>; limits::BATCH] =
                    std::array::from_fn(|n| IoSlice::new(batch.get(n).map_or(&[], |bytes| bytes)));
                writer.write_vectored(&slices[..batch.len().min(limits::BATCH)]).await?
            }
            Self::Channel(writer) => {
                writer.send(first.clone()).await?;
                first.len()
            }
            Self::Stream(writer) => {
                let sent = writer.write(first).await?;
                // A layer may hold back what it was given; nobody would ask it for that later.
                writer.flush().await?;
                sent
            }
            Self::Bridge(writer) => {
                writer.send(first.clone()).await?;
                first.len()
            }
        };
        if sent == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(sent) }
    }

    pub(super) async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(writer) => writer.shutdown().await,
            Self::Channel(writer) => writer.finish().await,
            Self::Stream(writer) => writer.shutdown().await,
            Self::Bridge(writer) => writer.finish(),
        }
    }

    pub(super) fn receipts(&self) -> Option<Receipts> {
        match self {
            Self::Bridge(writer) => Some(writer.receipts()),
            Self::Tcp(_) | Self::Channel(_) | Self::Stream(_) => None,
        }
    }
}

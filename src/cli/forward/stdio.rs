//! Standard input and output as one connection, for `--stdio`.
//!
//! Promised: neither holds up anything else, whatever is behind it; both ends of file are passed on by themselves; what the
//! descriptors share with other programs stays as it is (`O_NONBLOCK` would be theirs, too); where nobody reads the output, no
//! input is waited for.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use crate::tunnel::stream::Layer;

/// This process' standard input and output.
pub(super) struct Stdio {
    input: Descriptor,
    /// Until its end was said.
    output: Option<Descriptor>,
    /// Nobody reads the output any more. Two pipes do not know of each other, and the input might stay open for ever: what has
    /// come by now still goes, and then that ends as well.
    broken: bool,
    /// Who waits for input.
    reader: Option<Waker>,
}

impl Stdio {
    /// Takes them. What is printed from now on goes nowhere: only we may hold the output, so that its end is seen when we let
    /// go of it.
    ///
    /// # Errors
    /// If one of them cannot be had.
    pub(super) fn take() -> io::Result<Self> {
        let input = io::stdin().as_fd().try_clone_to_owned()?;
        let output = io::stdout().as_fd().try_clone_to_owned()?;
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdout(null)?;
        Ok(Self {
            input: Descriptor::new(input, Interest::READABLE)?,
            output: Some(Descriptor::new(output, Interest::WRITABLE)?),
            broken: false,
            reader: None,
        })
    }
}

/// A descriptor that blocks.
enum Descriptor {
    /// One that says when it is ready.
    Polled(AsyncFd<OwnedFd>),
    /// A file, which always is.
    File(OwnedFd),
}

impl Descriptor {
    fn new(fd: OwnedFd, interest: Interest) -> io::Result<Self> {
        let spare = fd.try_clone()?;
        #[expect(
            deprecated,
            reason = "what replaces it is unsafe; what could go wrong, a descriptor that becomes another, cannot with an OwnedFd"
        )]
        let polled = AsyncFd::with_interest(fd, interest);
        match polled {
            Ok(polled) => Ok(Self::Polled(polled)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(Self::File(spare)),
            Err(error) => Err(error),
        }
    }

    fn fd(&self) -> &OwnedFd {
        match self {
            Self::Polled(polled) => polled.get_ref(),
            Self::File(fd) => fd,
        }
    }
}

/// Calls `act`, which may block, once it will not.
fn attempt(
    guard: io::Result<AsyncFdReadyGuard<'_, OwnedFd>>,
    flags: PollFlags,
    act: impl FnOnce(&OwnedFd) -> io::Result<usize>,
) -> Option<io::Result<usize>> {
    let mut guard = match guard {
        Ok(guard) => guard,
        Err(error) => return Some(Err(error)),
    };
    // What the runtime knows of is an edge, and may be over.
    let tried = guard.try_io(|fd| at_once(fd.get_ref(), flags, act)?.ok_or(io::ErrorKind::WouldBlock.into()));
    tried.ok()
}

/// Calls `act`, which may block, if it will not.
fn at_once(
    fd: &OwnedFd,
    flags: PollFlags,
    act: impl FnOnce(&OwnedFd) -> io::Result<usize>,
) -> io::Result<Option<usize>> {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut [PollFd::new(fd, flags)], Some(&now))? {
        0 => Ok(None),
        _ => act(fd).map(Some),
    }
}

impl Stdio {
    fn write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &self.output {
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            Some(Descriptor::File(fd)) => Poll::Ready(Ok(rustix::io::write(fd, bytes)?)),
            Some(Descriptor::Polled(polled)) => loop {
                let guard = ready!(polled.poll_write_ready(cx));
                if let Some(written) = attempt(guard, PollFlags::OUT, |fd| Ok(rustix::io::write(fd, bytes)?)) {
                    return Poll::Ready(written);
                }
            },
        }
    }
}

impl Layer for Stdio {
    fn socket(&self) -> Option<&TcpStream> {
        None
    }
}

impl AsyncRead for Stdio {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.reader = Some(cx.waker().clone());
        let unfilled = buf.initialize_unfilled();
        let read = match &self.input {
            Descriptor::File(fd) => rustix::io::read(fd, unfilled)?,
            Descriptor::Polled(polled) if self.broken => {
                at_once(polled.get_ref(), PollFlags::IN, |fd| Ok(rustix::io::read(fd, unfilled)?))?.unwrap_or(0)
            }
            Descriptor::Polled(polled) => loop {
                let guard = ready!(polled.poll_read_ready(cx));
                if let Some(read) = attempt(guard, PollFlags::IN, |fd| Ok(rustix::io::read(fd, &mut *unfilled)?)) {
                    break read?;
                }
            },
        };
        buf.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stdio {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(self.write(cx, &bytes[..bytes.len().min(AT_ONCE)]));
        if written.is_err() {
            self.broken = true;
            if let Some(reader) = self.reader.take() {
                reader.wake();
            }
        }
        Poll::Ready(written)
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(output) = self.output.take() {
            // A socket may be the input as well, and stay. What is none needs nothing but to be let go.
            let _ = rustix::net::shutdown(output.fd(), rustix::net::Shutdown::Write);
        }
        Poll::Ready(Ok(()))
    }
}

/// A pipe that is ready takes this much without blocking (`PIPE_BUF`).
const AT_ONCE: usize = 4096;

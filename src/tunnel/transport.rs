//! The byte stream under an SSH session.
//!
//! Promised, where the SSH library promises nothing:
//! - the session can be cut from outside at any moment ([`Control::cut`]), whatever it is waiting for, because its next read
//!   or write fails;
//! - everybody who waits for [`Control::gone`] learns when the session has let go of its stream, by whatever way it ended;
//! - **a session never stops reading because it writes**: what the socket does not take is kept here, up to a bound at which
//!   the session is cut, and whoever feeds the session waits for [`Control::room`];
//! - **who has not logged in gets little**: of bytes that are read, of a packet's size and of what waits to be sent, until
//!   [`Control::know`];
//! - **a session that has received more than its users take stops reading**, while it goes on writing: see [`Control::hold`];
//! - a session whose peer keeps it busy with packets that have no use is cut: see [`Control::earn`];
//! - **what a peer said before it hung up is read**, although by then it takes nothing any more: its last words say how
//!   forwards ended, and a write that fails must not hide them.
//!
//! The stream also replays what was read before the session began, and holds back what was already said in its place. It
//! reads ahead, because the session asks for a packet in two steps, the first of which is four bytes: into a buffer that is
//! the thread's and not the session's, so that a session with nothing to read holds none.
//!
//! What waits on what: nothing here is a task. Bytes that are kept are written on whenever the session polls its stream,
//! which the socket's readiness makes it do.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};

use super::pool;
use crate::limits;

/// The outside handle of a [`Transport`]. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Control(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    cut: CancellationToken,
    gone: CancellationToken,
    /// Bytes that the socket has not taken yet.
    unsent: AtomicUsize,
    drained: Notify,
    feeders: Feeders,
    /// Bytes that were received and that nobody has taken yet.
    held: AtomicUsize,
    /// Set while `held` is too much.
    shut: AtomicBool,
    /// Credit that the peer has or may still be given back, over all channels.
    credit: AtomicUsize,
    /// Writers that wait for the peer to widen a window, which only reading can bring.
    starving: AtomicUsize,
    /// Packets that had a use, since somebody last looked.
    useful: AtomicUsize,
    /// How many more may come before somebody looks at that.
    spare: AtomicI64,
    /// Set when the session was cut for its packets without one.
    idle_flood: AtomicBool,
    reader: Mutex<Option<Waker>>,
    /// Set once the peer has logged in, or we have.
    known: AtomicBool,
    /// Set where it was cut because of what came before that.
    flooded: AtomicBool,
}

/// Places for those who have found room and whose message the session has not taken yet.
#[derive(Debug)]
struct Feeders(Semaphore);

impl Default for Feeders {
    fn default() -> Self {
        Self(Semaphore::new(limits::FEEDERS))
    }
}

impl Control {
    /// A handle for a transport yet to be made.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The login is over: from here on the bounds of a session hold, and no more those of a stranger.
    pub fn know(&self) {
        self.0.known.store(true, Ordering::Relaxed);
    }

    /// Whether the session ended because its peer sent more than a login needs.
    #[must_use]
    pub fn is_flooded(&self) -> bool {
        self.0.flooded.load(Ordering::Relaxed)
    }

    /// Makes every further read and write of the session fail.
    pub fn cut(&self) {
        self.0.cut.cancel();
    }

    /// Cuts the session when the value is dropped: for whoever sets a session up in steps that may fail or be given up.
    #[must_use]
    pub fn cut_on_drop(&self) -> CutOnDrop {
        CutOnDrop(Some(self.clone()))
    }

    /// Says that so many packets of the peer's have a use, or will have one: what it sends beyond them, and beyond
    /// [`limits::IDLE_PACKETS`], costs it the session. Each packet takes this end some work, and nobody else pays for that.
    pub fn earn(&self, packets: usize) {
        // What is not needed lapses when somebody looks, which is when as many have come as may be without any use.
        self.0.useful.fetch_add(packets, Ordering::Relaxed);
    }

    /// [Earns](Control::earn) a packet with so many bytes for somebody; one without any has no use.
    pub fn received(&self, bytes: usize) {
        if bytes > 0 {
            // Its frame and what is rounded off count with it.
            self.earn(2 + bytes / limits::BYTES_PER_PACKET);
        }
    }

    /// Counts work that the peer causes without any use, as so many packets.
    pub fn spend(&self, packets: usize) {
        self.0.spare.fetch_sub(i64::try_from(packets).unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// Whether the session was cut because its peer went on sending packets without any use.
    #[must_use]
    pub fn was_flooded(&self) -> bool {
        self.0.idle_flood.load(Ordering::Relaxed)
    }

    /// Fires once the session has ended and dropped its stream.
    #[must_use]
    pub fn gone(&self) -> &CancellationToken {
        &self.0.gone
    }

    /// Waits until the socket has taken so much that the session may be given one more message to write, or is gone. The
    /// place is kept until the session has the message: without it, all who wait would feed it at once.
    pub async fn room(&self) -> Option<SemaphorePermit<'_>> {
        // Nobody closes it; without a place, the rest of the bounds hold.
        let place = self.0.feeders.0.acquire().await.ok();
        while self.0.unsent.load(Ordering::Relaxed) > limits::UNSENT_HIGH && !self.0.gone.is_cancelled() {
            let drained = self.0.drained.notified();
            if self.0.unsent.load(Ordering::Relaxed) <= limits::UNSENT_HIGH {
                break;
            }
            tokio::select! {
                () = drained => {}
                () = self.0.gone.cancelled() => {}
            }
        }
        place
    }

    /// Counts bytes of a peer without credit that were received and wait for their sink. Above a bound the session stops
    /// reading until enough of them are [released](Control::release); while a writer is [starving](Control::starve), that
    /// bound is a higher one. Far above both it is cut.
    pub fn hold(&self, bytes: usize) {
        let held = self.0.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if held > limits::HELD_HIGH {
            self.0.shut.store(true, Ordering::Relaxed);
        }
        if held > limits::HELD_MAX {
            self.cut();
        }
    }

    /// Counts bytes that their sink has taken, or that are given up.
    pub fn release(&self, bytes: usize) {
        let before = self.0.held.fetch_sub(bytes, Ordering::Relaxed);
        let held = before - bytes;
        let opened = held < limits::HELD_LOW && self.0.shut.swap(false, Ordering::Relaxed);
        if opened || held <= limits::HELD_STARVING && before > limits::HELD_STARVING {
            self.wake();
        }
    }

    /// Takes credit out of the session's budget so that a channel which has `window` of it comes up to `wanted`, or as near to
    /// it as the budget allows, and tells how much that is. No channel gets so much that less than its window stays free. What
    /// a channel begins with is not asked for but [taken](Control::take_credit).
    #[must_use]
    pub fn ask_credit(&self, window: usize, wanted: usize) -> usize {
        let given = self.0.credit.load(Ordering::Relaxed);
        let others = given.saturating_sub(window);
        let fair = limits::CREDIT_PER_SESSION.saturating_sub(others) / 2;
        let more = wanted.min(fair).saturating_sub(window);
        self.0.credit.store(given + more, Ordering::Relaxed);
        more
    }

    /// Takes credit out of the session's budget, whatever is left of it.
    pub fn take_credit(&self, credit: usize) {
        self.0.credit.fetch_add(credit, Ordering::Relaxed);
    }

    /// Puts credit back.
    pub fn put_credit(&self, credit: usize) {
        self.0.credit.fetch_sub(credit, Ordering::Relaxed);
    }

    /// What the session holds and has promised, now.
    #[must_use]
    pub fn memory(&self) -> Memory {
        Memory {
            credit: self.0.credit.load(Ordering::Relaxed),
            held: self.0.held.load(Ordering::Relaxed),
            unsent: self.0.unsent.load(Ordering::Relaxed),
        }
    }

    /// Counts bytes of a peer with credit that were received and wait for their sink, until they are
    /// [released](Control::release). It is their credit that bounds them.
    pub fn note_held(&self, bytes: usize) {
        self.0.held.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether the session's budget is nearly spent.
    #[must_use]
    pub fn is_credit_scarce(&self) -> bool {
        self.0.credit.load(Ordering::Relaxed) > limits::CREDIT_SCARCE
    }

    /// Whether the session has stopped reading.
    #[must_use]
    pub fn is_shut(&self) -> bool {
        let starving = self.0.starving.load(Ordering::Relaxed) > 0;
        self.0.shut.load(Ordering::Relaxed)
            && !(starving && self.0.held.load(Ordering::Relaxed) <= limits::HELD_STARVING)
    }

    /// Says for as long as the value lives that a writer waits for window: then the session reads on, because what it waits
    /// for lies behind the data that fills the queue, and without it neither direction would ever move again. Not for ever:
    /// if much has been read and no window has come, the peer does not want what the writer has, and would only fill us.
    #[must_use]
    pub fn starve(&self) -> Starving {
        self.0.starving.fetch_add(1, Ordering::Relaxed);
        self.wake();
        Starving(self.clone())
    }

    fn wake(&self) {
        if let Some(waker) = self.0.reader.lock().unwrap_or_else(PoisonError::into_inner).take() {
            waker.wake();
        }
    }
}

/// What a session's peer can make this end hold, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// What the peer may still send and has sent, by the credit it was given: see [`limits::CREDIT_PER_SESSION`].
    pub credit: usize,
    /// What was received and waits for its sink, as the cost of its messages.
    pub held: usize,
    /// What the socket has not taken yet: see [`limits::UNSENT_MAX`].
    pub unsent: usize,
}

/// See [`Control::cut_on_drop`].
#[derive(Debug)]
pub struct CutOnDrop(Option<Control>);

impl CutOnDrop {
    /// Lets the session go on.
    pub fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        if let Some(control) = &self.0 {
            control.cut();
        }
    }
}

/// See [`Control::starve`].
#[derive(Debug)]
pub struct Starving(Control);

impl Drop for Starving {
    fn drop(&mut self) {
        self.0.0.starving.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that [`Control`] can cut.
pub struct Transport<S> {
    stream: S,
    replay: Bytes,
    ahead: Option<Ahead>,
    unsaid: usize,
    unsent: BytesMut,
    /// Whether the stream may hold back what it has taken.
    unflushed: bool,
    /// Why the peer takes nothing more, and until when what it has said before is read.
    deaf: Option<(io::ErrorKind, Pin<Box<Sleep>>)>,
    /// What the peer may still send before the login.
    allowance: usize,
    control: Control,
    packets: Packets,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    was_cut: bool,
    _gone: DropGuard,
}

impl<S> Transport<S> {
    /// Puts `stream` under control. `replay` is read first; the first `unsaid` bytes written are dropped, because the peer
    /// has them already.
    pub fn new(stream: S, control: &Control, replay: Bytes, unsaid: usize) -> Self {
        control.0.spare.store(limits::IDLE_PACKETS as i64, Ordering::Relaxed);
        Self {
            stream,
            replay,
            ahead: None,
            unsaid,
            unsent: BytesMut::new(),
            unflushed: false,
            deaf: None,
            allowance: limits::LOGIN_BYTES,
            control: control.clone(),
            packets: Packets { looked: Instant::now(), packets: 0, bytes: 0 },
            cut: Box::pin(control.0.cut.clone().cancelled_owned()),
            was_cut: false,
            _gone: control.0.gone.clone().drop_guard(),
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

impl<S> Transport<S> {
    /// Whether somebody who has not logged in may make the session read so much at once: it has made room for it already.
    fn admit(&self, wanted: usize) -> io::Result<()> {
        if self.is_known() || wanted <= limits::LOGIN_PACKET_MAX && self.allowance > 0 {
            return Ok(());
        }
        self.control.0.flooded.store(true, Ordering::Relaxed);
        Err(io::Error::new(io::ErrorKind::InvalidData, "more than a login needs"))
    }

    fn is_known(&self) -> bool {
        self.control.0.known.load(Ordering::Relaxed)
    }
}

/// What was read and not asked for yet; there is something.
struct Ahead {
    buffer: pool::Buffer,
    taken: usize,
    filled: usize,
}

impl<S: AsyncRead + Unpin> Transport<S> {
    /// Reads what is asked for, and for a small question more than that. A large one goes past the buffer: one more call to
    /// the system costs less than copying what it brings.
    fn read_ahead(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_some() {
            self.take_ahead(buf);
            return Poll::Ready(Ok(()));
        }
        if buf.remaining() >= limits::READ_PAST {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        // Given back at once if there is nothing to read.
        let mut buffer = pool::Buffer::take();
        let mut ahead = ReadBuf::new(&mut buffer[..limits::READ_AHEAD]);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut ahead))?;
        let filled = ahead.filled().len();
        self.ahead = (filled > 0).then_some(Ahead { buffer, taken: 0, filled });
        self.take_ahead(buf);
        Poll::Ready(Ok(()))
    }

    /// Hands out what was read ahead, and gives the buffer back with the last of it.
    fn take_ahead(&mut self, buf: &mut ReadBuf<'_>) {
        let Some(ahead) = &mut self.ahead else { return };
        let left = &ahead.buffer[ahead.taken..ahead.filled];
        let n = left.len().min(buf.remaining());
        buf.put_slice(&left[..n]);
        ahead.taken += n;
        if ahead.taken == ahead.filled {
            self.ahead = None;
        }
    }
}

impl<S: AsyncWrite + Unpin> Transport<S> {
    /// Writes what is kept, as far as the socket takes it.
    fn write_on(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.unsent))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.unsent.advance(written);
            self.tell();
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what is kept and then of `buf` what the socket takes of it at once; how much that is.
    fn write_now(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> io::Result<usize> {
        match self.write_on(cx) {
            Poll::Ready(result) => result?,
            Poll::Pending => return Ok(0),
        }
        let mut taken = 0;
        while taken < buf.len() {
            match Pin::new(&mut self.stream).poll_write(cx, &buf[taken..])? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => {
                    self.unflushed = true;
                    taken += written;
                }
                Poll::Pending => break,
            }
        }
        Ok(taken)
    }

    /// As [`Transport::write_on`], and what layers of the stream hold back too.
    fn flush_on(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.write_on(cx))?;
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// From now on nothing is written: it would fail again. The session ends with what there is to read, or soon.
    fn deafen(&mut self, error: &io::Error) {
        self.unsent.clear();
        self.tell();
        self.deaf.get_or_insert_with(|| (error.kind(), Box::pin(sleep(limits::GOODBYE_PATIENCE))));
    }

    fn tell(&self) {
        let before = self.control.0.unsent.swap(self.unsent.len(), Ordering::Relaxed);
        if before > limits::UNSENT_HIGH && self.unsent.len() <= limits::UNSENT_HIGH {
            self.control.0.drained.notify_waiters();
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Transport<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.check(cx)?;
        if this.deaf.is_none()
            && let Poll::Ready(Err(error)) = this.flush_on(cx)
        {
            this.deafen(&error);
        }
        if let Some((kind, patience)) = &mut this.deaf
            && patience.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err((*kind).into()));
        }
        this.admit(buf.remaining())?;
        let before = buf.filled().len();
        let read = this.read_on(cx, buf);
        this.allowance = this.allowance.saturating_sub(buf.filled().len() - before);
        read
    }
}

impl<S: AsyncRead + Unpin> Transport<S> {
    /// Reads while the session is open for it, what is to be replayed first.
    fn read_on(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self;
        if !this.replay.is_empty() {
            let n = this.replay.len().min(buf.remaining());
            buf.put_slice(&this.replay[..n]);
            this.replay.advance(n);
            return Poll::Ready(Ok(()));
        }
        if this.control.is_shut() {
            *this.control.0.reader.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
            // It may have been opened between the two looks.
            if this.control.is_shut() {
                return Poll::Pending;
            }
        }
        let asked = buf.remaining();
        ready!(this.read_ahead(cx, buf))?;
        let read = asked - buf.remaining();
        // The session asks for a packet in two steps, of which this is the first.
        if asked == LENGTH && read > 0 {
            this.packets.packets += 1;
        }
        this.packets.bytes += read;
        if (this.packets.packets > 0 || this.packets.bytes >= limits::BYTES_PER_PACKET)
            && !this.packets.count(&this.control)
        {
            this.control.0.idle_flood.store(true, Ordering::Relaxed);
            this.control.cut();
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the peer sends nothing of use")));
        }
        Poll::Ready(Ok(()))
    }
}

/// The field of a packet that says how long it is (RFC 4253 §6).
const LENGTH: usize = 4;

/// Whether the packets that come have a use, looked at seldom: each costs a subtraction.
struct Packets {
    looked: Instant,
    /// What came and is not counted yet.
    packets: usize,
    bytes: usize,
}

impl Packets {
    /// Counts what came, a large packet as several; false if it is too much.
    fn count(&mut self, control: &Control) -> bool {
        control.spend(self.packets + self.bytes / limits::BYTES_PER_PACKET);
        (self.packets, self.bytes) = (0, self.bytes % limits::BYTES_PER_PACKET);
        let spare = control.0.spare.load(Ordering::Relaxed);
        if spare >= 0 {
            return true;
        }
        let useful = control.0.useful.swap(0, Ordering::Relaxed);
        let now = Instant::now();
        let rested = now.duration_since(self.looked).as_secs_f64() * limits::IDLE_PACKETS_PER_SECOND as f64;
        self.looked = now;
        let earned = i64::try_from(useful.saturating_add(rested as usize)).unwrap_or(i64::MAX);
        let left = spare.saturating_add(earned).min(limits::IDLE_PACKETS as i64);
        control.0.spare.store(left, Ordering::Relaxed);
        left >= 0
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Transport<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.check(cx)?;
        if this.unsaid > 0 {
            let n = this.unsaid.min(buf.len());
            this.unsaid -= n;
            return Poll::Ready(Ok(n));
        }
        let written = if this.deaf.is_some() { Ok(buf.len()) } else { this.write_now(cx, buf) };
        let taken = written.unwrap_or_else(|error| {
            // As if it were on its way: the peer has gone, and what it said before is still to be read.
            this.deafen(&error);
            buf.len()
        });
        if taken < buf.len() {
            this.unsent.extend_from_slice(&buf[taken..]);
            this.tell();
            let most = if this.is_known() { limits::UNSENT_MAX } else { limits::LOGIN_UNSENT };
            if this.unsent.len() > most {
                this.control.cut();
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read")));
            }
        }
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.check(cx)?;
        // What is left is written on with the next poll of the stream: the session goes on.
        if this.deaf.is_none()
            && let Poll::Ready(Err(error)) = this.flush_on(cx)
        {
            this.deafen(&error);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.check(cx)?;
        if let Some((kind, _)) = this.deaf {
            return Poll::Ready(Err(kind.into()));
        }
        ready!(this.write_on(cx))?;
        match Pin::new(&mut this.stream).poll_shutdown(cx) {
            // Layers say goodbye, and whoever has gone already needs none.
            Poll::Ready(Err(error)) if is_gone(&error) => Poll::Ready(Ok(())),
            ended => ended,
        }
    }
}

/// Whether this says no more than that the other end is not there any more.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

const _: () = assert!(
    limits::FEEDERS >= limits::CHANNELS_PER_SESSION
        && limits::UNSENT_HIGH + (limits::FEEDERS + limits::SESSION_QUEUE) * limits::CHUNK < limits::UNSENT_MAX,
    "see limits::FEEDERS"
);

const _: () = assert!(
    limits::READ_PAST <= limits::READ_AHEAD && limits::READ_AHEAD <= limits::CHUNK,
    "a buffer of the pool is what is read ahead into"
);

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn cut_ends_a_blocked_read_and_a_blocked_shutdown() {
        for shutdown in [false, true] {
            let (near, _far) = tokio::io::duplex(1);
            let control = Control::new();
            let mut transport = Transport::new(near, &control, Bytes::new(), 0);
            transport.write_all(b"more than fits").await.expect("writing never waits");
            let blocked = async {
                let mut buf = [0; 1];
                match shutdown {
                    true => transport.shutdown().await,
                    false => transport.read(&mut buf).await.map(drop),
                }
            };
            tokio::pin!(blocked);
            assert!(
                tokio::time::timeout(Duration::from_millis(20), &mut blocked).await.is_err(),
                "it must block first"
            );
            control.cut();
            let result = tokio::time::timeout(Duration::from_secs(5), blocked).await.expect("cut wakes it");
            assert_eq!(result.expect_err("cut").kind(), io::ErrorKind::ConnectionAborted);
        }
    }

    /// A peer that has said something and takes nothing: it has hung up, or goes on as if it had not.
    struct Gone {
        says: &'static [u8],
        hangs_up: bool,
    }

    impl AsyncRead for Gone {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let this = self.get_mut();
            // A byte at a time: there is always more to read than was read.
            let Some((first, rest)) = this.says.split_first() else {
                return if this.hangs_up { Poll::Ready(Ok(())) } else { Poll::Pending };
            };
            buf.put_slice(&[*first]);
            this.says = rest;
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Gone {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_fails_does_not_hide_what_the_peer_said_before_it_hung_up() {
        for hangs_up in [true, false] {
            let control = Control::new();
            let peer = Gone { says: b"eof, close, goodbye", hangs_up };
            let mut transport = Transport::new(peer, &control, Bytes::new(), 0);
            for _ in 0..3 {
                transport.write_all(b"credit").await.expect("kept from the session");
                transport.flush().await.expect("kept from the session");
            }
            let began = tokio::time::Instant::now();
            let mut words = Vec::new();
            let read = transport.read_to_end(&mut words).await.map_err(|error| error.kind());
            assert_eq!(words, b"eof, close, goodbye");
            // One that has not hung up is given up after a while.
            let expected = if hangs_up { Ok(words.len()) } else { Err(io::ErrorKind::BrokenPipe) };
            assert_eq!(read, expected);
            assert_eq!(began.elapsed() >= limits::GOODBYE_PATIENCE, !hangs_up);
            assert_eq!(transport.shutdown().await.expect_err("gone").kind(), io::ErrorKind::BrokenPipe);
        }
    }

    /// Whether a session takes so many packets of this many bytes, each of which is of use or not.
    async fn takes(packets: usize, size: usize, useful: bool) -> bool {
        let control = Control::new();
        let packet = vec![0; LENGTH + size];
        let mut transport = Transport::new(tokio::io::empty(), &control, Bytes::new(), 0);
        control.know();
        let mut buf = vec![0; size.max(LENGTH)];
        for _ in 0..packets {
            transport.ahead = None;
            let mut buffer = pool::Buffer::take();
            buffer[..packet.len()].copy_from_slice(&packet);
            transport.ahead = Some(Ahead { buffer, taken: 0, filled: packet.len() });
            let read = async {
                transport.read_exact(&mut buf[..LENGTH]).await?;
                transport.read_exact(&mut buf[..size]).await
            };
            if read.await.is_err() {
                assert!(control.was_flooded());
                return false;
            }
            if useful {
                control.received(size);
            }
        }
        assert!(!control.was_flooded());
        true
    }

    #[tokio::test]
    async fn packets_without_any_use_end_a_session_and_others_do_not() {
        assert!(takes(limits::IDLE_PACKETS / 2, 32, false).await, "some are let be");
        assert!(!takes(4 * limits::IDLE_PACKETS, 32, false).await);
        assert!(!takes(limits::IDLE_PACKETS, 16 * 1024, false).await, "large ones count as several");
        for (packets, size) in [(8, 1), (8, 32), (2, 5_000), (2, 16 * 1024)] {
            assert!(takes(packets * limits::IDLE_PACKETS, size, true).await, "{size}");
        }
    }

    #[tokio::test]
    async fn writing_never_waits_and_reading_writes_on() {
        let (near, mut far) = tokio::io::duplex(16);
        let control = Control::new();
        control.know();
        let mut transport = Transport::new(near, &control, Bytes::new(), 0);
        let sent: Vec<u8> = (0..=255).cycle().take(limits::UNSENT_HIGH + 1000).collect();
        transport.write_all(&sent).await.expect("writing never waits");
        transport.flush().await.expect("flushing never waits");
        assert!(tokio::time::timeout(Duration::from_millis(20), control.room()).await.is_err(), "there is no room");
        let mut received = vec![0; sent.len()];
        let mut buf = [0; 1];
        tokio::select! {
            _ = transport.read(&mut buf) => unreachable!("nothing was sent back"),
            result = far.read_exact(&mut received) => drop(result.expect("read")),
        }
        assert!(received == sent, "bytes were changed, lost or reordered");
        control.room().await;
    }

    #[tokio::test]
    async fn a_peer_that_never_reads_is_cut() {
        let (near, _far) = tokio::io::duplex(16);
        let control = Control::new();
        control.know();
        let mut transport = Transport::new(near, &control, Bytes::new(), 0);
        let chunk = vec![0; 1024 * 1024];
        let mut result = Ok(());
        for _ in 0..=limits::UNSENT_MAX / chunk.len() {
            result = transport.write_all(&chunk).await;
        }
        assert_eq!(result.expect_err("too much is unsent").kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_stranger_sends_no_more_than_a_login_needs_and_makes_no_more_be_kept() {
        // Small packets, until it is too much.
        let (near, mut far) = tokio::io::duplex(2 * limits::LOGIN_BYTES);
        let control = Control::new();
        let mut transport = Transport::new(near, &control, Bytes::new(), 0);
        far.write_all(&vec![0; limits::LOGIN_BYTES + 1]).await.expect("written");
        let mut packet = [0; 1024];
        for _ in 0..limits::LOGIN_BYTES / packet.len() {
            transport.read_exact(&mut packet).await.expect("read");
        }
        assert!(!control.is_flooded());
        assert_eq!(transport.read(&mut packet).await.expect_err("too much").kind(), io::ErrorKind::InvalidData);
        assert!(control.is_flooded());
        // A large one, before any of it has come.
        let (near, _far) = tokio::io::duplex(64);
        let control = Control::new();
        let mut transport = Transport::new(near, &control, Bytes::new(), 0);
        let mut packet = vec![0; limits::LOGIN_PACKET_MAX + 1];
        assert!(transport.read(&mut packet).await.is_err() && control.is_flooded());
        // And answers that are not taken.
        let (near, _far) = tokio::io::duplex(16);
        let control = Control::new();
        let mut transport = Transport::new(near, &control, Bytes::new(), 0);
        assert!(transport.write_all(&vec![0; limits::LOGIN_UNSENT + 17]).await.is_err());
        // Who has logged in does all of that.
        let (near, mut far) = tokio::io::duplex(2 * limits::LOGIN_BYTES);
        let control = Control::new();
        let mut transport = Transport::new(near, &control, Bytes::new(), 0);
        control.know();
        far.write_all(&vec![0; limits::LOGIN_BYTES + 1]).await.expect("written");
        let mut packet = vec![0; limits::LOGIN_BYTES + 1];
        transport.read_exact(&mut packet).await.expect("read");
        transport.write_all(&vec![0; 3 * limits::LOGIN_BYTES]).await.expect("written");
    }

    #[tokio::test]
    async fn reading_stops_while_too_much_is_held_unless_a_writer_starves() {
        let (near, mut far) = tokio::io::duplex(64);
        let control = Control::new();
        let mut transport = Transport::new(near, &control, Bytes::new(), 0);
        far.write_all(b"abc").await.expect("written");
        let mut buf = [0; 1];
        control.hold(limits::HELD_HIGH + 1);
        assert!(tokio::time::timeout(Duration::from_millis(20), transport.read(&mut buf)).await.is_err(), "shut");
        let starving = control.starve();
        assert_eq!(transport.read(&mut buf).await.expect("read"), 1, "a starving writer opens it");
        drop(starving);
        let (read, ()) = tokio::time::timeout(Duration::from_secs(5), async {
            tokio::join!(transport.read(&mut buf), async { control.release(limits::HELD_HIGH + 1) })
        })
        .await
        .expect("releasing wakes the reader");
        assert_eq!(read.expect("read"), 1);
        control.hold(limits::HELD_MAX + 1);
        assert!(transport.read(&mut buf).await.is_err(), "far too much ends the session");
    }

    #[tokio::test]
    async fn regression_starving_for_ever_a_reader_that_pauses_does_not_let_an_upload_cut_the_session() {
        let (near, mut far) = tokio::io::duplex(64);
        let control = Control::new();
        let mut transport = Transport::new(near, &control, Bytes::new(), 0);
        far.write_all(b"ab").await.expect("written");
        let mut buf = [0; 1];
        let _starving = control.starve();
        control.hold(limits::HELD_STARVING);
        assert_eq!(transport.read(&mut buf).await.expect("read"), 1, "a starving writer opens it");
        control.hold(1);
        assert!(tokio::time::timeout(Duration::from_millis(20), transport.read(&mut buf)).await.is_err(), "shut");
        let (read, ()) = tokio::time::timeout(Duration::from_secs(5), async {
            tokio::join!(transport.read(&mut buf), async { control.release(1) })
        })
        .await
        .expect("releasing wakes the reader");
        assert_eq!(read.expect("read"), 1);
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

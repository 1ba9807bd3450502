//! A channel as two halves, and the credit that bounds what is under way on it.
//!
//! The library grants a peer new window when data *arrives*, and when it cannot hand the data on it blocks the whole
//! session. So a channel's receiver must always take what comes, and something else must keep the sender back. Between our
//! own ends that is **credit**: a sender spends a message's [cost](wire::message_cost) on it, and gets it back, as extended
//! data on the same channel (also after EOF), once the receiver's sink has taken it. Whoever sends more than its credit is
//! cut. A stock peer gets no such messages; what it sends is counted by the session's [`Control::hold`].
//!
//! **A channel's credit grows** with need. It begins small. A sender that has bytes and no credit says so; where the
//! receiver's sink has taken everything by then, it is the way that is long and not the sink that is slow, and the channel
//! gets a multiple of what it had: as much as the round trip calls for, which is the time from giving credit to a sender
//! without any to its next message, up to [`limits::CREDIT_MAX`] and within the session's budget. When that runs short,
//! channels with much credit give some back. So what a peer can make us hold is bounded over the session.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf, client, server};
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio_util::sync::CancellationToken;

use super::Control;
use crate::limits;
use crate::metrics;
use crate::task::Tasks;
use crate::tunnel::wire;

/// How the sender on a channel is kept from sending more than its receiver takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// By credit: both ends are ours.
    Credit,
    /// By the session as a whole: the peer is a stock one.
    Stock,
    /// Not at all: a control channel, whose messages are taken at once.
    Plain,
}

impl Flow {
    /// What one message carries at most.
    pub(super) fn packet(self) -> u32 {
        match self {
            Self::Credit => limits::CHUNK as u32,
            // What RFC 4253 §6.1 asks every peer to handle.
            Self::Stock | Self::Plain => 32 * 1024,
        }
    }

    /// The window that a session for such channels announces.
    pub(super) fn window(self) -> u32 {
        match self {
            Self::Credit => limits::WINDOW_OURS,
            Self::Stock | Self::Plain => limits::WINDOW,
        }
    }
}

/// An open channel. Dropping its writing half closes it.
pub struct Channel {
    /// Where bytes come from.
    pub reader: Reader,
    /// Where bytes go to.
    pub writer: Writer,
}

/// The receiving half of a channel. It must be read without pause.
pub struct Reader {
    half: ChannelReadHalf,
    shared: Arc<Shared>,
    /// Set after CLOSE or the session's end.
    over: bool,
}

/// The sending half of a channel.
pub struct Writer {
    shared: Arc<Shared>,
    control: Control,
    tasks: Tasks,
    slot: Option<OwnedSemaphorePermit>,
    sent_close: bool,
}

/// Gives credit back for what a sink has taken.
#[derive(Clone)]
pub struct Returns(Arc<Shared>);

/// What happened on a channel.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes came.
    Data(Bytes),
    /// No more bytes will come.
    Eof,
    /// The peer has more bytes, and no credit for them.
    Starved,
    /// The peer closed the channel, or the session has ended.
    Closed,
    /// The peer broke the rules of credit; its session has been cut.
    Violation,
}

/// A channel's sending side, of either role's message type.
pub(super) enum Half {
    Client(ChannelWriteHalf<client::Msg>),
    Server(ChannelWriteHalf<server::Msg>),
}

struct Shared {
    half: Half,
    flow: Flow,
    control: Control,
    closed: CancellationToken,
    /// What we may still send.
    credit: AtomicUsize,
    /// Set once we have said that this is not enough.
    begged: AtomicBool,
    more: Notify,
    /// What the peer may still send; below zero it has broken the rules.
    allowed: AtomicI64,
    /// What has been taken and not been given back yet.
    owed: AtomicUsize,
    /// All credit of the channel: what the peer may still send, what waits here, and what is owed.
    window: AtomicUsize,
    way: Mutex<Way>,
}

/// How long the way to the peer and back is.
#[derive(Default)]
struct Way {
    /// When a peer without credit was given some, and has not sent anything since.
    given: Option<Instant>,
    /// How long that took.
    round_trip: Duration,
}

impl Channel {
    pub(super) fn new(
        reader: ChannelReadHalf,
        half: Half,
        flow: Flow,
        control: &Control,
        tasks: &Tasks,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Self {
        let shared = Arc::new(Shared {
            half,
            flow,
            control: control.clone(),
            closed: CancellationToken::new(),
            credit: AtomicUsize::new(wire::CREDIT_INITIAL),
            begged: AtomicBool::new(false),
            more: Notify::new(),
            allowed: AtomicI64::new(wire::CREDIT_INITIAL as i64),
            owed: AtomicUsize::new(0),
            window: AtomicUsize::new(wire::CREDIT_INITIAL),
            way: Mutex::default(),
        });
        if flow == Flow::Credit {
            control.take_credit(wire::CREDIT_INITIAL);
        }
        Self {
            reader: Reader { half: reader, shared: shared.clone(), over: false },
            writer: Writer { shared, control: control.clone(), tasks: tasks.clone(), slot, sent_close: false },
        }
    }

    /// Asks for a subsystem and tells whether it is granted; `None` where the session has ended.
    pub(super) async fn request_subsystem(&mut self, subsystem: &str) -> Option<bool> {
        if let Half::Client(half) = &self.writer.shared.half {
            half.request_subsystem(true, subsystem).await.ok()?;
        }
        loop {
            match self.reader.half.wait().await {
                Some(ChannelMsg::Success) => return Some(true),
                Some(ChannelMsg::Failure | ChannelMsg::Close) => return Some(false),
                Some(_) => {}
                None => return None,
            }
        }
    }
}

impl Reader {
    /// What happens next. After [`Event::Closed`] nothing else does.
    pub async fn next(&mut self) -> Event {
        while !self.over {
            match self.half.wait().await {
                Some(ChannelMsg::Data { data }) if data.is_empty() => {}
                Some(ChannelMsg::Data { data }) => {
                    return if self.shared.received(data.len()) { Event::Data(data) } else { self.violation() };
                }
                Some(ChannelMsg::ExtendedData { data, ext: wire::CREDIT_TYPE }) if self.shared.flow == Flow::Credit => {
                    match wire::parse_credit(&data) {
                        Ok(wire::NO_CREDIT) => return Event::Starved,
                        Ok(credit) => self.shared.granted(credit),
                        Err(_) => return self.violation(),
                    }
                }
                Some(ChannelMsg::Eof) => return Event::Eof,
                Some(ChannelMsg::Close) | None => self.over(),
                // Requests and extended data of a stock peer: nothing that concerns a forward.
                Some(_) => {}
            }
        }
        Event::Closed
    }

    /// The next bytes, for a control channel; `None` when there will be no more.
    pub async fn bytes(&mut self) -> Option<Bytes> {
        match self.next().await {
            Event::Data(bytes) => Some(bytes),
            Event::Eof | Event::Starved | Event::Closed | Event::Violation => None,
        }
    }

    /// Waits until the peer has closed the channel or the session is gone; data that still comes is dropped.
    pub async fn closed(&mut self) {
        let gone = self.shared.control.gone().clone();
        while !self.over {
            tokio::select! {
                message = self.half.wait() => if matches!(message, Some(ChannelMsg::Close) | None) { self.over() },
                () = gone.cancelled() => self.over(),
            }
        }
    }

    /// How credit is given back for what was read.
    #[must_use]
    pub fn returns(&self) -> Returns {
        Returns(self.shared.clone())
    }

    /// All credit of the channel.
    #[cfg(test)]
    pub(crate) fn window(&self) -> usize {
        self.shared.window.load(Ordering::Relaxed)
    }

    /// The switch of the channel's session.
    #[cfg(test)]
    pub(crate) fn control(&self) -> Control {
        self.shared.control.clone()
    }

    /// Whether the peer opened the channel.
    #[must_use]
    pub fn opened_by_peer(&self) -> bool {
        matches!(self.shared.half, Half::Server(_))
    }

    fn over(&mut self) {
        self.over = true;
        self.shared.closed.cancel();
    }

    fn violation(&mut self) -> Event {
        self.over();
        self.shared.control.cut();
        Event::Violation
    }
}

impl Shared {
    /// Counts a message of the peer's; false if it had no credit for it.
    fn received(&self, bytes: usize) -> bool {
        match self.flow {
            Flow::Credit => {
                let mut way = self.way.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(given) = way.given.take() {
                    // What was under way already comes sooner; so the longest counts, and is forgotten by and by.
                    way.round_trip = given.elapsed().max(way.round_trip * 7 / 8);
                }
                let cost = wire::message_cost(bytes) as i64;
                let fits = self.allowed.fetch_sub(cost, Ordering::Relaxed) >= cost;
                if fits {
                    self.control.note_held(wire::message_cost(bytes));
                }
                fits
            }
            Flow::Stock => {
                self.control.hold(wire::message_cost(bytes));
                true
            }
            Flow::Plain => {
                // A control channel has no bytes for anybody: an honest end says a few messages on it in its life.
                self.control.spend(2 + bytes / limits::BYTES_PER_IDLE_PACKET);
                true
            }
        }
    }

    /// Counts credit that came back.
    fn granted(&self, granted: usize) {
        let credit = self.credit.load(Ordering::Relaxed).saturating_add(granted).min(limits::CREDIT_MAX);
        self.credit.store(credit, Ordering::Relaxed);
        self.begged.store(false, Ordering::Relaxed);
        self.more.notify_waiters();
    }

    /// Counts what messages had cost as taken, and tells how much credit is to be given back now, if any.
    fn settle(&self, cost: usize) -> Option<usize> {
        let owed = self.owed.load(Ordering::Relaxed) + cost;
        let window = self.window.load(Ordering::Relaxed);
        // Seldom enough to cost nothing, often enough that a sender never waits for it on a short way.
        if owed < (window / 4).min(limits::CREDIT_OWED) {
            self.owed.store(owed, Ordering::Relaxed);
            return None;
        }
        self.give_back(owed, window)
    }

    /// The same where a message goes out anyway, with which credit travels for nothing: in answers to small requests, all.
    fn settle_along(&self) -> Option<usize> {
        let owed = self.owed.load(Ordering::Relaxed);
        let window = self.window.load(Ordering::Relaxed);
        if owed < (window / 8).min(limits::CREDIT_OWED / 2) {
            return None;
        }
        self.give_back(owed, window)
    }

    fn give_back(&self, owed: usize, window: usize) -> Option<usize> {
        self.owed.store(0, Ordering::Relaxed);
        let scarce = self.control.is_credit_scarce() && window > 4 * wire::CREDIT_INITIAL;
        let kept = if scarce { owed / 4 * 3 } else { 0 };
        self.control.put_credit(kept);
        self.window.store(window - kept, Ordering::Relaxed);
        // Before it is sent: the peer may use it at once.
        self.allowed.fetch_add((owed - kept) as i64, Ordering::Relaxed);
        Some(owed - kept)
    }

    /// A multiple of the credit that the channel has, with all that is owed; none where there is no more to be had.
    fn grow(&self) -> Option<usize> {
        let window = self.window.load(Ordering::Relaxed);
        let mut way = self.way.lock().unwrap_or_else(PoisonError::into_inner);
        let fit = (way.round_trip.as_secs_f64() * limits::CREDIT_RATE as f64) as usize;
        let wanted = (window * limits::CREDIT_GROWTH).min(fit.clamp(limits::CREDIT_NEAR, limits::CREDIT_MAX));
        let more = self.control.ask_credit(window, wanted);
        let given = more + self.owed.swap(0, Ordering::Relaxed);
        self.window.store(window + more, Ordering::Relaxed);
        self.allowed.fetch_add(given as i64, Ordering::Relaxed);
        if given == 0 {
            return None;
        }
        way.given = Some(Instant::now());
        Some(given)
    }

    async fn give(&self, credit: usize) {
        self.control.earn(1);
        let message = wire::credit(credit);
        let sent = async {
            match &self.half {
                Half::Client(half) => half.extended_data_bytes(wire::CREDIT_TYPE, message).await,
                Half::Server(half) => half.extended_data_bytes(wire::CREDIT_TYPE, message).await,
            }
        };
        tokio::select! {
            biased;
            // A session that has ended needs no credit.
            _ = sent => {}
            () = self.closed.cancelled() => {}
            () = self.control.gone().cancelled() => {}
        }
    }

    /// Spends credit for as much of a message of `bytes` as may be sent now, and tells how much that is.
    fn spend(&self, bytes: usize) -> Option<usize> {
        let credit = self.credit.load(Ordering::Relaxed);
        let fit = credit.saturating_sub(wire::message_cost(0)).min(bytes);
        // Crumbs would cost more than they carry.
        if fit < bytes.min(limits::CHUNK / 8) {
            return None;
        }
        self.credit.store(credit - wire::message_cost(fit), Ordering::Relaxed);
        Some(fit)
    }
}

/// A wait for credit, counted when it is over, however that comes.
struct Stall(Instant);

impl Stall {
    fn begin() -> Self {
        metrics::CREDIT_STALLS.inc();
        Self(Instant::now())
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        metrics::CREDIT_STALLED_SECONDS.inc_by(metrics::seconds(self.0.elapsed()));
    }
}

impl Returns {
    /// Gives back what a message of `bytes` had cost, sooner or later.
    pub async fn taken(&self, bytes: usize) {
        self.repay(wire::message_cost(bytes)).await;
    }

    /// Gives back what messages that were taken had [cost](wire::message_cost) together, sooner or later.
    pub async fn repay(&self, cost: usize) {
        let shared = &self.0;
        match shared.flow {
            Flow::Credit => {
                shared.control.release(cost);
                if let Some(credit) = shared.settle(cost) {
                    shared.give(credit).await;
                }
            }
            Flow::Stock => shared.control.release(cost),
            Flow::Plain => {}
        }
    }

    /// Gives more credit to a sender that has none left, although everything it sent has been taken.
    pub async fn grow(&self) {
        if let Some(credit) = self.0.grow() {
            self.0.give(credit).await;
        }
    }

    /// Gives up a message of `bytes` that was read and will never be taken.
    pub fn dropped(&self, bytes: usize) {
        self.write_off(wire::message_cost(bytes));
    }

    /// Gives up messages that cost so much together, were read and will never be taken.
    pub fn write_off(&self, cost: usize) {
        if self.0.flow != Flow::Plain {
            self.0.control.release(cost);
        }
    }

    /// Whether the peer has closed the channel, or the session has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.closed.is_cancelled()
    }

    /// Whether what waits here keeps the whole session of a stock peer from being read.
    #[must_use]
    pub fn blocks_session(&self) -> bool {
        self.0.flow == Flow::Stock && self.0.control.is_shut()
    }
}

impl Writer {
    /// Sends bytes, waiting for credit, for room and for window.
    ///
    /// # Errors
    /// If the channel or the session ends first.
    pub async fn send(&mut self, mut bytes: Bytes) -> io::Result<()> {
        let shared = &self.shared;
        let sent = async {
            while !bytes.is_empty() {
                let wanted = bytes.len().min(shared.flow.packet() as usize);
                let fit = match shared.flow {
                    Flow::Credit => {
                        let mut stall = None;
                        loop {
                            let more = shared.more.notified();
                            if let Some(fit) = shared.spend(wanted) {
                                break fit;
                            }
                            let _ = stall.get_or_insert_with(Stall::begin);
                            match shared.begged.swap(true, Ordering::Relaxed) {
                                true => more.await,
                                false => shared.give(wire::NO_CREDIT).await,
                            }
                        }
                    }
                    Flow::Stock | Flow::Plain => wanted,
                };
                let _place = self.control.room().await;
                shared.send(bytes.split_to(fit)).await?;
            }
            if shared.flow == Flow::Credit
                && let Some(credit) = shared.settle_along()
            {
                shared.give(credit).await;
            }
            Ok(())
        };
        tokio::select! {
            // First: mostly it need not wait.
            biased;
            result = sent => result,
            () = shared.closed.cancelled() => Err(io::ErrorKind::ConnectionReset.into()),
            () = self.control.gone().cancelled() => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    /// Tells the peer that no more bytes will come.
    ///
    /// # Errors
    /// If the session ended.
    pub async fn finish(&mut self) -> io::Result<()> {
        let sent = async {
            match &self.shared.half {
                Half::Client(half) => half.eof().await,
                Half::Server(half) => half.eof().await,
            }
        };
        tokio::select! {
            result = sent => result.map_err(|_| io::ErrorKind::BrokenPipe.into()),
            () = self.control.gone().cancelled() => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    /// Closes the channel.
    pub async fn close(&mut self) {
        self.sent_close = true;
        self.shared.close().await;
    }

    /// Leaves the channel to the peer, which has closed it.
    pub fn peer_closed(&mut self) {
        self.sent_close = true;
    }
}

impl Shared {
    async fn send(&self, bytes: Bytes) -> io::Result<()> {
        let wanted = bytes.len();
        // Before it is sent: the answer may come at once.
        self.control.earn(1 + wanted / limits::BYTES_PER_ANSWER);
        // Credit lies below the window, which therefore is never waited for.
        let bounded = self.flow != Flow::Credit;
        let sent = match &self.half {
            Half::Client(half) => {
                let starves = bounded && half.writable_packet_size().await < wanted;
                let _starving = starves.then(|| self.control.starve());
                half.data_bytes(bytes).await
            }
            Half::Server(half) => {
                let starves = bounded && half.writable_packet_size().await < wanted;
                let _starving = starves.then(|| self.control.starve());
                half.data_bytes(bytes).await
            }
        };
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    async fn close(&self) {
        if self.flow == Flow::Credit {
            // What the peer has under way by now was allowed to it, and has had a use in vain.
            let allowed = usize::try_from(self.allowed.load(Ordering::Relaxed)).unwrap_or_default();
            self.control.earn(allowed / wire::message_cost(0));
        }
        let closing = async {
            match &self.half {
                Half::Client(half) => half.close().await,
                Half::Server(half) => half.close().await,
            }
        };
        tokio::select! {
            // A session that has ended has closed all its channels.
            _ = closing => {}
            () = self.control.gone().cancelled() => {}
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let slot = self.slot.take();
        if self.sent_close || self.control.gone().is_cancelled() {
            return;
        }
        let shared = self.shared.clone();
        self.tasks.spawn(async move {
            shared.close().await;
            drop(slot);
        });
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.flow == Flow::Credit {
            self.control.put_credit(self.window.load(Ordering::Relaxed));
        }
    }
}

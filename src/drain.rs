//! Going away in order: what lies between the first signal and the end of a program.
//!
//! Promised: from [`Drain::begin`] on no forward is [admitted](Drain::admit); [`Drain::finish`] waits for those that run, says
//! how many are left and for how long, and cuts them at the deadline or when it is told to; each of them learns
//! [why](Drain::cut).
//!
//! What counts here is a number and a token; who holds a [`Ticket`] is counted until it is dropped, on whatever thread.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::limits;
use crate::systemd::Supervisor;

/// The reason of a forward that ran into the deadline of a drain.
pub const DRAINED: &str = "drained";

/// The stages in which a program is asked to end. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    drain: CancellationToken,
    now: CancellationToken,
}

impl Stop {
    /// A stop that nobody has asked for yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Goes to the next stage. Returns whether there was one.
    #[must_use]
    pub fn advance(&self) -> bool {
        if !self.drain.is_cancelled() {
            self.drain.cancel();
            return true;
        }
        let more = !self.now.is_cancelled();
        self.now.cancel();
        more
    }

    /// Fires first: take on nothing new, and let what runs end.
    #[must_use]
    pub fn drain(&self) -> &CancellationToken {
        &self.drain
    }

    /// Fires second: cut what still runs.
    #[must_use]
    pub fn now(&self) -> &CancellationToken {
        &self.now
    }
}

/// How many there are of something. Clones share the number.
#[derive(Debug, Clone, Default)]
pub struct Count(Arc<watch::Sender<usize>>);

/// One of what a [`Count`] counts, until it is dropped.
#[derive(Debug)]
pub struct Counted(Count);

impl Count {
    /// One more.
    #[must_use]
    pub fn enter(&self) -> Counted {
        self.0.send_modify(|count| *count += 1);
        Counted(self.clone())
    }

    /// How many there are now.
    #[must_use]
    pub fn now(&self) -> usize {
        *self.0.borrow()
    }

    /// Waits until there is none.
    pub async fn none(&self) {
        // The sender lives as long as this does.
        drop(self.0.subscribe().wait_for(|count| *count == 0).await);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

/// The forwards of a program, and whether more may begin. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Drain(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    begun: CancellationToken,
    /// Set before `begun` fires, and so is the time at which it did.
    deadline: OnceLock<Instant>,
    since: OnceLock<Timestamp>,
    cut: CancellationToken,
    /// Set before `cut` fires.
    why: OnceLock<&'static str>,
    forwards: Count,
    opening: Count,
    sessions: Count,
    leaving: Count,
}

/// One forward, counted until it is dropped.
#[derive(Debug)]
pub struct Ticket {
    _forward: Counted,
    opening: Option<Counted>,
}

impl Ticket {
    /// The forward is open: it needs no link any more but the one that it has.
    pub fn opened(&mut self) {
        self.opening = None;
    }
}

/// Whether and until when a peer has said that it drains.
#[derive(Debug, Default)]
pub struct Departure(OnceLock<Instant>);

impl Departure {
    /// The peer has said that what runs may go on for so many seconds. Its first word counts.
    pub fn told(&self, seconds: u32) {
        let _ = self.0.set(Instant::now() + Duration::from_secs(seconds.into()));
    }

    /// Whether the peer has said that it drains.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.0.get().is_some()
    }

    /// Whether the peer cuts its forwards by now, so that one that breaks on its side was most likely cut.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.0.get().is_some_and(|deadline| Instant::now() + limits::DRAIN_TOLERANCE >= *deadline)
    }
}

/// How a drain went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// How many forwards ended by themselves after it had begun.
    pub ended: usize,
    /// How many had to be cut.
    pub cut: usize,
}

impl Drain {
    /// A program that runs.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a forward; `None` once the drain has begun.
    #[must_use]
    pub fn admit(&self) -> Option<Ticket> {
        // Counted before the look: whoever begins the drain afterwards finds it counted.
        let ticket = self.take();
        (!self.0.begun.is_cancelled()).then_some(ticket)
    }

    /// Counts a forward that was taken on before the drain began, whether or not it has begun since. To be called only while
    /// the one who drains waits for the caller, as he does for those who accept.
    #[must_use]
    pub fn take(&self) -> Ticket {
        Ticket { _forward: self.0.forwards.enter(), opening: Some(self.0.opening.enter()) }
    }

    /// Counts a forward that has ended and says goodbye, for which it is given time; it no longer counts as running.
    #[must_use]
    pub fn leave(&self) -> Counted {
        self.0.leaving.enter()
    }

    /// Counts a session or link, which is given the time to say goodbye.
    #[must_use]
    pub fn greet(&self) -> Counted {
        self.0.sessions.enter()
    }

    /// Fires when the drain begins.
    #[must_use]
    pub fn begun(&self) -> &CancellationToken {
        &self.0.begun
    }

    /// How long until what runs is cut; nothing before the drain.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.0.deadline.get().map_or(Duration::ZERO, |deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// The same for the wire and for people: in seconds, rounded up.
    #[must_use]
    pub fn left_s(&self) -> u32 {
        let left = self.left();
        u32::try_from(left.as_secs() + u64::from(left.subsec_nanos() > 0)).unwrap_or(u32::MAX)
    }

    /// How many forwards there are.
    #[must_use]
    pub fn forwards(&self) -> usize {
        self.0.forwards.now()
    }

    /// How many sessions and links there are.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.0.sessions.now()
    }

    /// Waits until the drain has begun and no forward is left that still needs a link.
    pub async fn all_opened(&self) {
        self.0.begun.cancelled().await;
        self.0.opening.none().await;
    }

    /// Waits until the drain has begun and none of these `forwards`, which are a session's, is left.
    pub async fn spent(&self, forwards: &Count) {
        self.0.begun.cancelled().await;
        forwards.none().await;
    }

    /// Waits until forwards are cut. Returns why they are.
    pub async fn cut(&self) -> &'static str {
        self.0.cut.cancelled().await;
        self.0.why.get().copied().unwrap_or(DRAINED)
    }

    /// Begins: nothing new from here on, and what runs may go on for `grace`.
    pub fn begin(&self, grace: Duration) {
        let _ = self.0.deadline.set(Instant::now() + grace);
        let _ = self.0.since.set(Timestamp::now());
        self.0.begun.cancel();
    }

    /// When it began, if it has.
    #[must_use]
    pub fn since(&self) -> Option<Timestamp> {
        self.0.since.get().copied()
    }

    /// Ends all forwards that are left, because of `why`.
    pub fn cut_all(&self, why: &'static str) {
        let _ = self.0.why.set(why);
        self.0.cut.cancel();
    }

    /// Waits for the forwards that run when it is called. Those that still run at the deadline are cut, and so are all when
    /// `now` fires, then because of `stopped`. What has not ended after that has had [`limits::STOP_GRACE`].
    pub async fn finish(&self, now: &CancellationToken, stopped: &'static str, supervisor: &Supervisor) -> Outcome {
        let before = self.forwards();
        let deadline = self.0.deadline.get().copied().unwrap_or_else(Instant::now);
        let why = loop {
            let (forwards, left) = (self.forwards(), self.left_s());
            if forwards > 0 {
                info!("draining: {forwards} forward(s) still run, {left} s until they are cut");
            }
            supervisor.draining(&format!("draining: {forwards} forward(s), {left} s left"), self.left());
            tokio::select! {
                biased;
                () = self.0.forwards.none() => break None,
                () = now.cancelled() => break Some(stopped),
                () = sleep_until(deadline) => break Some(DRAINED),
                () = sleep(limits::DRAIN_PROGRESS) => {}
            }
        };
        let Some(why) = why else {
            self.say_goodbye(now).await;
            return Outcome { ended: before, cut: 0 };
        };
        let cut = self.forwards();
        warn!("cutting {cut} forward(s)");
        self.cut_all(why);
        if timeout(limits::STOP_GRACE, self.0.forwards.none()).await.is_ok() {
            self.say_goodbye(now).await;
        }
        Outcome { ended: before.saturating_sub(cut), cut }
    }

    /// Waits a little until the sessions, which end with their last forward, have done so.
    async fn say_goodbye(&self, now: &CancellationToken) {
        tokio::select! {
            _ = timeout(limits::GOODBYE_PATIENCE, async { tokio::join!(self.0.leaving.none(), self.0.sessions.none()) }) => {}
            () = now.cancelled() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn finish(drain: &Drain, now: &CancellationToken) -> Outcome {
        drain.finish(now, "stopped", &Supervisor::none()).await
    }

    #[test]
    fn stages_come_one_after_the_other() {
        let stop = Stop::new();
        assert!(!stop.drain().is_cancelled());
        assert!(stop.advance());
        assert!(stop.drain().is_cancelled() && !stop.now().is_cancelled());
        assert!(stop.advance());
        assert!(stop.now().is_cancelled());
        assert!(!stop.advance());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_new_begins_and_what_ends_by_itself_is_not_cut() {
        let drain = Drain::new();
        let now = CancellationToken::new();
        let (ticket, session) = (drain.admit().expect("admitted"), drain.greet());
        drain.begin(Duration::from_secs(60));
        assert!(drain.admit().is_none());
        assert_eq!((drain.forwards(), drain.sessions(), drain.left()), (1, 1, Duration::from_secs(60)));
        let ending = async {
            sleep(Duration::from_secs(30)).await;
            drop(ticket);
            sleep(Duration::from_secs(1)).await;
            drop(session);
        };
        let since = Instant::now();
        let (outcome, ()) = tokio::join!(finish(&drain, &now), ending);
        assert_eq!((outcome, since.elapsed()), (Outcome { ended: 1, cut: 0 }, Duration::from_secs(31)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_cuts_what_is_left_and_says_so() {
        let drain = Drain::new();
        let now = CancellationToken::new();
        let (one, two) = (drain.admit().expect("admitted"), drain.admit().expect("admitted"));
        drain.begin(Duration::from_secs(5));
        let running = async {
            sleep(Duration::from_secs(1)).await;
            drop(one);
            let why = drain.cut().await;
            drop(two);
            why
        };
        let since = Instant::now();
        let (outcome, why) = tokio::join!(finish(&drain, &now), running);
        assert_eq!((outcome, why), (Outcome { ended: 1, cut: 1 }, DRAINED));
        assert_eq!(since.elapsed(), Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn being_told_to_cuts_at_once_and_what_does_not_end_is_not_waited_for_long() {
        let drain = Drain::new();
        let now = CancellationToken::new();
        let _stuck = drain.admit().expect("admitted");
        drain.begin(Duration::from_secs(3_600));
        now.cancel();
        let since = Instant::now();
        assert_eq!(finish(&drain, &now).await, Outcome { ended: 0, cut: 1 });
        assert_eq!((drain.cut().await, since.elapsed()), ("stopped", limits::STOP_GRACE));
    }

    #[tokio::test(start_paused = true)]
    async fn a_departure_is_due_at_its_deadline_and_not_before() {
        let departure = Departure::default();
        assert!(!departure.is_due(), "nobody has said anything");
        departure.told(60);
        departure.told(0);
        sleep(Duration::from_secs(60) - limits::DRAIN_TOLERANCE - Duration::from_millis(1)).await;
        assert!(!departure.is_due());
        sleep(Duration::from_millis(1)).await;
        assert!(departure.is_due());
        sleep(Duration::from_secs(60)).await;
        assert!(departure.is_due());
    }

    #[tokio::test(start_paused = true)]
    async fn links_wait_for_forwards_that_are_being_opened() {
        let drain = Drain::new();
        let mut ticket = drain.take();
        drain.begin(Duration::from_secs(60));
        assert!(timeout(Duration::from_secs(1), drain.all_opened()).await.is_err());
        ticket.opened();
        drain.all_opened().await;
        assert_eq!(drain.forwards(), 1);
    }
}

//! What the two ends of a link tell each other of their trails, so that each holds the other's to what it was.
//!
//! Promised: an end sends the digest of its trail's newest head when there is a new one, and no more often than
//! [`ANCHOR_EVERY`] but for a few at first; the other has it on record before it answers. What is answered to something that was
//! not sent, or does not hold, is passed over. A peer that sends more than an honest one could has broken the protocol: so the
//! records that it can cause are bounded. What crosses says nothing of other organisations: a digest and the id of a trail.
//!
//! Where a link ends in order, whoever ends it takes its [`Leave`] first: what is in its trail by then goes to the other end, and
//! the link is kept until that has answered, but not longer than [`ANCHOR_FAREWELL`]. An end that goes away itself, or whose peer
//! has said that it does, adds a head of its own before it answers. None of it is waited for where the peer takes no anchors.
//!
//! An end is in two halves: the [`Ear`] belongs to whoever reads the control channel, and never waits; the [`Exchange`] runs beside
//! it and waits for heads, for the ear, and for the trail.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::wire::{ANCHORS, Control, Hello, TrailAnchor, TrailAnchored};
use crate::audit::head::{self, Anchor, Countersigned, Head};
use crate::audit::{Event, Kind, Trail};
use crate::chain::Chain;
use crate::limits::{
    ANCHOR_ANSWER, ANCHOR_EVERY, ANCHOR_FAREWELL, ANCHORS_BURST, ANCHORS_SENT_BURST, ANCHORS_TAKEN_EVERY,
    ANCHORS_WAITING,
};

/// A peer that sends anchors without end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer sends more heads of its trail than it may")]
pub struct Flood;

/// The half that hears the peer.
#[derive(Debug)]
pub struct Ear {
    /// In boxes, as what is said: a queue makes room for 32 of what goes through it as soon as it is there, and this one is
    /// empty for hours, on every link.
    heard: mpsc::Sender<Box<Heard>>,
    willing: CancellationToken,
    anchors: Allowance,
    answers: Allowance,
}

/// The end of an exchange, for whoever ends the link in order. Clones are of the same one.
#[derive(Debug, Clone, Default)]
pub struct Leave {
    wanted: CancellationToken,
    taken: CancellationToken,
}

impl Leave {
    /// Returns once the other end has answered to what the trail has come to, or has had its time. Whoever waits keeps both
    /// halves going meanwhile.
    pub async fn take(&self) {
        self.wanted.cancel();
        drop(tokio::time::timeout(ANCHOR_FAREWELL, self.taken.cancelled()).await);
    }
}

/// The half that speaks and records.
pub struct Exchange<F> {
    trail: Trail,
    event: F,
    /// Whether this end goes away, or has been told that the other does.
    leaving: Box<dyn Fn() -> bool + Send + Sync>,
    leave: Leave,
    heard: mpsc::Receiver<Box<Heard>>,
    said: mpsc::Sender<Box<Control>>,
    willing: CancellationToken,
    heads: watch::Receiver<Option<Head>>,
    allowance: Allowance,
    /// How many more may be sent when an end goes away.
    farewells: u32,
    last: Option<Head>,
    sent: Sent,
}

/// What was sent and is not answered yet, each with the record that the head covers and the time.
#[derive(Debug, Default)]
struct Sent(VecDeque<(Anchor, u64, Instant)>);

impl Sent {
    fn add(&mut self, head: &Head, now: Instant) {
        self.age(now);
        if self.0.len() >= ANCHORS_BURST as usize {
            self.0.pop_front();
        }
        self.0.push_back((head.anchor(), head.seq, now));
    }

    /// Takes out what was answered; `None` if it was not sent, was answered before or too long ago.
    fn answered(&mut self, anchor: &Anchor, now: Instant) -> Option<u64> {
        self.age(now);
        let at = self.0.iter().position(|(sent, ..)| sent == anchor)?;
        self.0.remove(at).map(|(_, covers, _)| covers)
    }

    fn age(&mut self, now: Instant) {
        while self.0.front().is_some_and(|(.., since)| now.saturating_duration_since(*since) >= ANCHOR_ANSWER) {
            self.0.pop_front();
        }
    }

    fn waits_for(&self, head: Option<&Head>) -> bool {
        head.is_some_and(|head| self.0.iter().any(|(sent, ..)| *sent == head.anchor()))
    }
}

#[derive(Debug)]
enum Heard {
    Anchor(TrailAnchor),
    Anchored(TrailAnchored),
}

/// Both halves of an end, and what is to be sent. `event` makes a record that says who the peer is.
pub fn exchange<F: Fn(Kind) -> Event>(trail: &Trail, event: F) -> (Ear, Exchange<F>, mpsc::Receiver<Box<Control>>) {
    let (heard, hears) = mpsc::channel(ANCHORS_WAITING);
    let (said, says) = mpsc::channel(1);
    let willing = CancellationToken::new();
    let now = Instant::now();
    let ear = Ear {
        heard,
        willing: willing.clone(),
        anchors: Allowance::new(ANCHORS_BURST, ANCHORS_TAKEN_EVERY, now),
        answers: Allowance::new(ANCHORS_BURST, ANCHORS_TAKEN_EVERY, now),
    };
    let exchange = Exchange {
        heads: trail.heads(),
        trail: trail.clone(),
        event,
        leaving: Box::new(|| false),
        leave: Leave::default(),
        heard: hears,
        said,
        willing,
        allowance: Allowance::new(ANCHORS_SENT_BURST, ANCHOR_EVERY, now),
        farewells: ANCHORS_SENT_BURST,
        last: None,
        sent: Sent::default(),
    };
    (ear, exchange, says)
}

impl Ear {
    /// Takes note of what the peer can do: anchors go only to one that has announced that it takes them.
    pub fn greeted(&self, hello: &Hello) {
        if hello.features.iter().any(|feature| feature == ANCHORS) {
            self.willing.cancel();
        }
    }

    /// Hears an anchor.
    ///
    /// # Errors
    /// If there were too many.
    pub fn anchor(&mut self, anchor: TrailAnchor) -> Result<(), Flood> {
        self.anchors.take(Instant::now()).then_some(()).ok_or(Flood)?;
        self.hear(Heard::Anchor(anchor));
        Ok(())
    }

    /// Hears an answer.
    ///
    /// # Errors
    /// If there were too many.
    pub fn anchored(&mut self, anchored: TrailAnchored) -> Result<(), Flood> {
        self.answers.take(Instant::now()).then_some(()).ok_or(Flood)?;
        self.hear(Heard::Anchored(anchored));
        Ok(())
    }

    fn hear(&self, heard: Heard) {
        if self.heard.try_send(Box::new(heard)).is_err() {
            debug!("the trail is behind with what the peer says of its own");
        }
    }
}

impl<F: Fn(Kind) -> Event> Exchange<F> {
    /// How to end it.
    #[must_use]
    pub fn leave(&self) -> Leave {
        self.leave.clone()
    }

    /// Asks, whenever the other end has told what its trail has come to, whether one of the two goes away.
    #[must_use]
    pub fn leaving_if(mut self, leaving: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.leaving = Box::new(leaving);
        self
    }

    /// Speaks and records until what is to be sent has nobody who sends it, or nothing more is heard.
    pub async fn run(mut self) {
        let leave = self.leave.clone();
        let mut leaves = false;
        loop {
            let may = self.allowance.next();
            let said = tokio::select! {
                () = leave.wanted.cancelled(), if !leaves => {
                    leaves = true;
                    Box::pin(self.say_all()).await
                }
                heard = self.heard.recv() => match heard {
                    // Once in a while, and so not part of what waits.
                    Some(heard) => Box::pin(self.hear(*heard)).await,
                    // The ear is gone, and the link with it.
                    None => return,
                },
                head = new_head(&mut self.heads, self.last, &self.willing, may) => {
                    self.allowance.take(Instant::now());
                    self.say(head).await
                }
            };
            if !said {
                return leave.taken.cancel();
            }
            if leaves && !leave.taken.is_cancelled() && !self.sent.waits_for(self.last.as_ref()) {
                // When there is room, what was said before is on its way.
                drop(tokio::time::timeout(ANCHOR_FAREWELL, self.said.reserve()).await);
                leave.taken.cancel();
            }
        }
    }

    /// Takes in what was heard, and says what is to be said to that. Whether there is somebody who sends it.
    async fn hear(&mut self, heard: Heard) -> bool {
        let leaving = matches!(heard, Heard::Anchor(_)) && (self.leaving)();
        if leaving && !self.say_all().await {
            return false;
        }
        match self.record(heard).await {
            Some(answer) => self.said.send(Box::new(answer)).await.is_ok(),
            None => true,
        }
    }

    /// Tells what the trail has come to by now, if the other end has not been told and takes it. Whether there is somebody who
    /// sends it.
    async fn say_all(&mut self) -> bool {
        if !self.willing.is_cancelled() || self.farewells == 0 {
            return true;
        }
        // However long that takes: whoever takes its leave does not wait longer than it may.
        let head = match self.trail.head().await {
            Ok(head) => head,
            Err(error) => {
                debug!(error = %Chain(&error), "could not sign the last of the trail for the peer");
                return true;
            }
        };
        let Some(head) = head.filter(|_| head != self.last) else { return true };
        if !self.allowance.take(Instant::now()) {
            self.farewells -= 1;
        }
        self.say(head).await
    }

    async fn say(&mut self, head: Head) -> bool {
        self.last = Some(head);
        self.sent.add(&head, Instant::now());
        let anchor = Control::Anchor(TrailAnchor { trail: head.trail, anchor: head.anchor() });
        self.said.send(Box::new(anchor)).await.is_ok()
    }

    /// Puts what was heard on record, and returns what is to be answered.
    async fn record(&mut self, heard: Heard) -> Option<Control> {
        match heard {
            Heard::Anchor(TrailAnchor { trail, anchor }) => {
                let event = (self.event)(Kind::TrailAnchored).seen(&trail, &anchor);
                if let Err(error) = self.trail.note(event).await {
                    debug!(error = %Chain(&error), "could not record the head of the peer's trail");
                    return None;
                }
                let time_ms = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default();
                let seal = self.trail.countersign(&Countersigned { anchor, time_ms });
                let seal = seal.inspect_err(|error| debug!(error = %Chain(error), "could not countersign")).ok()?;
                Some(Control::Anchored(TrailAnchored { anchor, time_ms, seal }))
            }
            Heard::Anchored(TrailAnchored { anchor, time_ms, seal }) => {
                let covers = self.sent.answered(&anchor, Instant::now())?;
                // Without a signature it proves nothing here: the peer's own trail has it.
                let seal = seal?;
                let seen = Countersigned { anchor, time_ms };
                if let Err(error) = head::verify_countersigned(&seen, &seal.key.to_string(), &seal.signature) {
                    debug!(error = %Chain(&error), "the peer's countersignature does not hold");
                    return None;
                }
                let event = (self.event)(Kind::TrailCountersigned).countersigned(covers, &seen, &seal);
                if let Err(error) = self.trail.note(event).await {
                    debug!(error = %Chain(&error), "could not record the peer's countersignature");
                }
                None
            }
        }
    }
}

/// Waits for a peer that takes heads, for the moment at which one may be sent, and for one that is not the `last`; it is then the
/// newest.
async fn new_head(
    heads: &mut watch::Receiver<Option<Head>>,
    last: Option<Head>,
    willing: &CancellationToken,
    may: Instant,
) -> Head {
    willing.cancelled().await;
    tokio::time::sleep_until(may).await;
    loop {
        let head = *heads.borrow_and_update();
        if let Some(head) = head.filter(|_| head != last) {
            return head;
        }
        if heads.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// How often something may be: some at once, and one more after each stretch of time.
#[derive(Debug)]
struct Allowance {
    most: u32,
    every: Duration,
    left: u32,
    since: Instant,
}

impl Allowance {
    fn new(most: u32, every: Duration, now: Instant) -> Self {
        Self { most, every, left: most, since: now }
    }

    /// Takes one, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        while self.left < self.most && now.saturating_duration_since(self.since) >= self.every {
            self.left += 1;
            self.since += self.every;
        }
        if self.left == self.most {
            self.since = now;
        }
        let taken = self.left > 0;
        self.left = self.left.saturating_sub(1);
        taken
    }

    /// When there is one to be taken.
    fn next(&self) -> Instant {
        if self.left > 0 { self.since } else { self.since + self.every }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::audit::sink::NoNetwork;
    use crate::audit::verify::{self, Anchors, Keys};
    use crate::audit::{Side, Sinks, TrailError};
    use crate::identity::{Algorithm, PrivateKey};
    use crate::task::Tasks;

    fn hello(features: &[&str]) -> Hello {
        let features = features.iter().map(|feature| (*feature).to_owned()).collect();
        let version = "0.1.0".to_owned();
        Hello { version, features, channels: 1, replica: None, instance: None, started: None, way: None }
    }

    async fn trail(path: &Path, side: Side, key: Option<PrivateKey>, tasks: &Tasks) -> Trail {
        let mut sinks = Sinks::file(path);
        sinks.signing_key = key;
        sinks.heads.records = 1;
        Trail::start(sinks, side, std::sync::Arc::new(NoNetwork), tasks).await.expect("a trail")
    }

    /// Closes a trail, however long the disk takes to synchronise it: what is read of it is in the file before that.
    async fn close(trail: Trail, path: &Path) {
        let closed = trail.close().await;
        assert!(matches!(closed, Ok(()) | Err(TrailError::Slow)), "{closed:?}");
        let deadline = Instant::now() + Duration::from_secs(120);
        while events(path, "trail.stopped") == 0 {
            assert!(Instant::now() < deadline, "the end of the trail is not in its file");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn events(path: &Path, event: &str) -> usize {
        let text = std::fs::read_to_string(path).expect("a trail");
        text.lines().filter(|line| line.contains(&format!("\"event\":\"{event}\""))).count()
    }

    #[tokio::test]
    async fn two_ends_put_each_others_heads_on_record_and_do_not_keep_each_other_awake() {
        let dir = tempfile::tempdir().expect("a directory");
        let paths = [dir.path().join("gateway"), dir.path().join("agent")];
        let tasks = Tasks::new();
        let key = PrivateKey::generate(Algorithm::Ed25519);
        let gateway = trail(&paths[0], Side::Gateway, Some(key.clone()), &tasks).await;
        // This one does not sign.
        let agent = trail(&paths[1], Side::Agent, None, &tasks).await;
        let event = |kind| Event::new(kind).organisation("acme");
        let (mut gateways_ear, at_gateway, mut from_gateway) = exchange(&gateway, event);
        let (mut agents_ear, at_agent, mut from_agent) = exchange(&agent, event);
        gateways_ear.greeted(&hello(&[ANCHORS]));
        agents_ear.greeted(&hello(&[ANCHORS]));
        let carry = async {
            let mut carried = 0;
            // Two anchors at the most from each end, for its beginning and its news, and as many answers.
            while let Ok(Some((to_agent, message))) = tokio::time::timeout(Duration::from_secs(3), async {
                tokio::select! {
                    message = from_gateway.recv() => message.map(|message| (true, message)),
                    message = from_agent.recv() => message.map(|message| (false, message)),
                }
            })
            .await
            {
                carried += 1;
                let ear = if to_agent { &mut agents_ear } else { &mut gateways_ear };
                match *message {
                    Control::Anchor(anchor) => ear.anchor(anchor).expect("not too many"),
                    Control::Anchored(anchored) => ear.anchored(anchored).expect("not too many"),
                    other => panic!("{other:?}"),
                }
            }
            carried
        };
        agent.note(Event::new(Kind::LinkUp)).await.expect("noted");
        let carried = tokio::select! {
            carried = carry => carried,
            () = at_gateway.run() => panic!("the gateway's end is over"),
            () = at_agent.run() => panic!("the agent's end is over"),
        };
        assert!((2..=8).contains(&carried), "{carried}");
        close(gateway, &paths[0]).await;
        close(agent, &paths[1]).await;
        tasks.stop();
        assert!(events(&paths[1], "trail.anchored") >= 1 && events(&paths[0], "trail.anchored") >= 1);
        // The gateway's signature is in the agent's trail; the agent has none to give.
        assert!(events(&paths[1], "trail.countersigned") >= 1);
        assert_eq!(events(&paths[0], "trail.countersigned"), 0);
        let mut keys = Keys::default();
        keys.add(&key.public().fingerprint());
        for (ours, theirs, keys) in [(0, 1, keys), (1, 0, Keys::default())] {
            let mut anchors = Anchors::default();
            anchors.read("theirs", std::fs::File::open(&paths[theirs]).expect("a file")).expect("read");
            let report = verify::verify(&paths[ours..=ours], &keys, &mut anchors, |_| {}).expect("read");
            assert!(report.intact, "{report:#?}");
            assert!(report.trails[0].anchored.iter().any(|range| range.by == "theirs"), "{report:#?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_sends_more_than_it_may_has_broken_the_protocol() {
        let anchor = TrailAnchor {
            trail: crate::audit::chain::TrailId::parse("000102030405060708090a0b0c0d0e0f").expect("an id"),
            anchor: Anchor::from([7; 32]),
        };
        let (heard, _hears) = mpsc::channel(ANCHORS_WAITING);
        let now = Instant::now();
        let allowance = || Allowance::new(ANCHORS_BURST, ANCHORS_TAKEN_EVERY, now);
        let mut ear = Ear { heard, willing: CancellationToken::new(), anchors: allowance(), answers: allowance() };
        for _ in 0..ANCHORS_BURST {
            ear.anchor(anchor).expect("within what it may");
        }
        assert_eq!(ear.anchor(anchor), Err(Flood));
        let answer = TrailAnchored { anchor: anchor.anchor, time_ms: 0, seal: None };
        for _ in 0..ANCHORS_BURST {
            ear.anchored(answer.clone()).expect("within what it may");
        }
        assert_eq!(ear.anchored(answer), Err(Flood));
        // As an honest one goes on, for a day.
        for _ in 0..288 {
            tokio::time::advance(ANCHOR_EVERY).await;
            ear.anchor(anchor).expect("within what it may");
        }
        // Somebody who hears nothing of anchors is sent none.
        ear.greeted(&hello(&["credit"]));
        assert!(!ear.willing.is_cancelled());
    }

    /// Carries what the two ends say to each other, until both are over.
    async fn carry(
        (mut ears, mut said): ([Ear; 2], [mpsc::Receiver<Box<Control>>; 2]),
        ends: impl Future<Output = ()>,
    ) -> usize {
        let [first, second] = &mut said;
        let mut carried = 0;
        tokio::pin!(ends);
        loop {
            let (to, message) = tokio::select! {
                Some(message) = first.recv() => (1, message),
                Some(message) = second.recv() => (0, message),
                () = &mut ends => return carried,
            };
            carried += 1;
            match *message {
                Control::Anchor(anchor) => ears[to].anchor(anchor).expect("not too many"),
                Control::Anchored(anchored) => ears[to].anchored(anchored).expect("not too many"),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Both ends' trails are covered by what the other has, as far as they went before the leave.
    #[tokio::test]
    async fn what_happened_last_is_anchored_when_a_link_ends_in_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let paths = [dir.path().join("gateway"), dir.path().join("agent")];
        let tasks = Tasks::new();
        let mut trails = Vec::new();
        for (path, side) in paths.iter().zip([Side::Gateway, Side::Agent]) {
            let mut sinks = Sinks::file(path);
            sinks.signing_key = Some(PrivateKey::generate(Algorithm::Ed25519));
            // No head falls due by itself.
            (sinks.heads.records, sinks.heads.every) = (1_000_000, Duration::from_secs(1_000_000));
            trails.push(Trail::start(sinks, side, std::sync::Arc::new(NoNetwork), &tasks).await.expect("a trail"));
        }
        let event = |kind| Event::new(kind).organisation("acme");
        let (gateways_ear, at_gateway, from_gateway) = exchange(&trails[0], event);
        let (agents_ear, at_agent, from_agent) = exchange(&trails[1], event);
        // It is the agent that goes away, and the gateway that ends the link.
        let at_agent = at_agent.leaving_if(|| true);
        gateways_ear.greeted(&hello(&[ANCHORS]));
        agents_ear.greeted(&hello(&[ANCHORS]));
        for trail in &trails {
            for _ in 0..5 {
                trail.note(Event::new(Kind::LinkUp)).await.expect("noted");
            }
        }
        // As whoever takes it does, but with patience for a machine that is held up.
        let leave = at_gateway.leave();
        leave.wanted.cancel();
        let ends = async {
            tokio::select! {
                () = at_gateway.run() => panic!("the gateway's end is over"),
                () = at_agent.run() => panic!("the agent's end is over"),
                () = leave.taken.cancelled() => {}
            }
        };
        let said = ([gateways_ear, agents_ear], [from_gateway, from_agent]);
        let carried = tokio::time::timeout(Duration::from_secs(60), carry(said, ends)).await.expect("an end");
        assert!((4..=12).contains(&carried), "{carried}");
        for (trail, path) in trails.into_iter().zip(&paths) {
            close(trail, path).await;
        }
        tasks.stop();
        for (ours, theirs) in [(0, 1), (1, 0)] {
            let mut anchors = Anchors::default();
            anchors.read("theirs", std::fs::File::open(&paths[theirs]).expect("a file")).expect("read");
            let report = verify::verify(&paths[ours..=ours], &Keys::default(), &mut anchors, |_| {}).expect("read");
            assert!(report.intact, "{report:#?}");
            let text = std::fs::read_to_string(&paths[ours]).expect("a trail");
            let last_up = text.lines().take_while(|line| !line.contains("\"trail.stopped\"")).collect::<Vec<_>>();
            let last_up = last_up.iter().rposition(|line| line.contains("\"link.up\"")).expect("a record") as u64;
            let anchored = report.trails[0].anchored.iter().map(|range| range.last).max();
            assert!(anchored >= Some(last_up), "{ours}: {anchored:?} {last_up} {text}");
        }
    }

    #[tokio::test]
    async fn nobody_waits_for_a_peer_that_does_not_answer_or_takes_no_anchors() {
        let dir = tempfile::tempdir().expect("a directory");
        for (features, asked) in [(&["credit"][..], false), (&[ANCHORS], true)] {
            let tasks = Tasks::new();
            let path = dir.path().join(features[0]);
            let trail = trail(&path, Side::Gateway, None, &tasks).await;
            let (ear, end, mut said) = exchange(&trail, Event::new);
            ear.greeted(&hello(features));
            trail.note(Event::new(Kind::LinkUp)).await.expect("noted");
            let leave = end.leave();
            let mut count = 0;
            let silent = async {
                while said.recv().await.is_some() {
                    count += 1;
                }
            };
            let left = async {
                tokio::select! {
                    () = end.run() => panic!("it is over"),
                    () = silent => panic!("nothing more is said"),
                    () = leave.take() => {}
                }
            };
            tokio::time::timeout(Duration::from_secs(60), left).await.expect("an end");
            assert_eq!((leave.taken.is_cancelled(), count > 0), (!asked, asked), "{features:?}");
            close(trail, &path).await;
            tasks.stop();
        }
    }

    #[test]
    fn what_is_not_answered_is_forgotten() {
        let trail = crate::audit::chain::TrailId::parse("000102030405060708090a0b0c0d0e0f").expect("an id");
        let head = |seq| Head { trail, seq, record: crate::audit::chain::Link::of(b"x"), time_ms: 0 };
        let (mut sent, now) = (Sent::default(), Instant::now());
        for seq in 0..1_000 {
            sent.add(&head(seq), now);
            assert!(sent.0.len() <= ANCHORS_BURST as usize);
        }
        assert_eq!(sent.answered(&head(0).anchor(), now), None, "there were too many since");
        assert_eq!(sent.answered(&head(999).anchor(), now), Some(999));
        assert_eq!(sent.answered(&head(999).anchor(), now), None, "once");
        let later = now + ANCHOR_ANSWER;
        sent.add(&head(1_000), later);
        assert_eq!((sent.answered(&head(998).anchor(), later), sent.0.len()), (None, 1), "too late");
    }

    /// However much a peer says, what is recorded of it and what waits for that is bounded.
    #[tokio::test]
    async fn a_flood_of_anchors_makes_as_many_records_as_an_honest_peer_may() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("trail");
        let tasks = Tasks::new();
        let trail = trail(&path, Side::Agent, None, &tasks).await;
        let (mut ear, end, mut said) = exchange(&trail, Event::new);
        let id = crate::audit::chain::TrailId::parse("000102030405060708090a0b0c0d0e0f").expect("an id");
        let ended = end.run();
        tokio::pin!(ended);
        let mut cut = 0;
        for number in 0..10_000_u32 {
            let mut digest = [7; 32];
            digest[..4].copy_from_slice(&number.to_be_bytes());
            let anchor = Anchor::from(digest);
            let flood = ear.anchor(TrailAnchor { trail: id, anchor });
            let answer = ear.anchored(TrailAnchored { anchor, time_ms: 0, seal: None });
            cut += u32::from(flood.is_err()) + u32::from(answer.is_err());
        }
        assert_eq!(cut, 2 * (10_000 - ANCHORS_BURST));
        // The link is cut by then, and with it goes the ear.
        drop(ear);
        tokio::select! {
            () = &mut ended => {}
            () = async { while said.recv().await.is_some() {} } => {}
        }
        close(trail, &path).await;
        tasks.stop();
        assert!((1..=ANCHORS_BURST as usize).contains(&events(&path, "trail.anchored")));
        assert_eq!(events(&path, "trail.countersigned"), 0);
    }
}

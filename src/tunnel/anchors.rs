//! What the two ends of a link tell each other of their trails, so that each holds the other's to what it was.
//!
//! Promised: an end sends the digest of its trail's newest head when there is a new one, and no more often than
//! [`ANCHOR_EVERY`] but for a few at first; the other has it on record before it answers. What is answered to something that was
//! not sent, or does not hold, is passed over. A peer that sends more than an honest one could has broken the protocol: so the
//! records that it can cause are bounded. What crosses says nothing of other organisations: a digest and the id of a trail.
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
use crate::limits::{ANCHOR_EVERY, ANCHORS_BURST, ANCHORS_SENT_BURST, ANCHORS_TAKEN_EVERY, ANCHORS_WAITING};

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

/// The half that speaks and records.
#[derive(Debug)]
pub struct Exchange<F> {
    trail: Trail,
    event: F,
    heard: mpsc::Receiver<Box<Heard>>,
    said: mpsc::Sender<Box<Control>>,
    willing: CancellationToken,
    heads: watch::Receiver<Option<Head>>,
    allowance: Allowance,
    last: Option<Head>,
    /// What was sent and is not answered yet, with the record that the head covers.
    sent: VecDeque<(Anchor, u64)>,
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
        heard: hears,
        said,
        willing,
        allowance: Allowance::new(ANCHORS_SENT_BURST, ANCHOR_EVERY, now),
        last: None,
        sent: VecDeque::new(),
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
    /// Speaks and records until what is to be sent has nobody who sends it.
    pub async fn run(mut self) {
        loop {
            let may = self.allowance.next();
            let message = tokio::select! {
                heard = self.heard.recv() => match heard {
                    // Once in a while, and so not part of what waits.
                    Some(heard) => Box::pin(self.record(*heard)).await,
                    // The ear is gone, and the link with it.
                    None => std::future::pending().await,
                },
                head = new_head(&mut self.heads, self.last, &self.willing, may) => {
                    self.last = Some(head);
                    self.allowance.take(Instant::now());
                    if self.sent.len() >= ANCHORS_BURST as usize {
                        self.sent.pop_front();
                    }
                    let anchor = head.anchor();
                    self.sent.push_back((anchor, head.seq));
                    Some(Control::Anchor(TrailAnchor { trail: head.trail, anchor }))
                }
            };
            if let Some(message) = message
                && self.said.send(Box::new(message)).await.is_err()
            {
                return;
            }
        }
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
                let at = self.sent.iter().position(|(sent, _)| *sent == anchor)?;
                let (_, covers) = self.sent.remove(at)?;
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
    use crate::audit::{Side, Sinks};
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
        gateway.close().await.expect("closed");
        agent.close().await.expect("closed");
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
}

//! What all collectors over a network have in common: a queue to be emptied in order, a connection that comes and goes, and
//! time that runs out.
//!
//! Promised: records go out in the order of the trail, and what is said to be written is what the collector has taken, as
//! far as its protocol can tell. What was not taken is sent again after a failure, whole, so that a collector may get
//! something twice but never out of order: `seq` says what it has already. Every wait has a deadline, a failure is told with
//! its reason, and between attempts there is a pause that grows, with jitter.
//!
//! Waits for a batch, for the far end to hang up meanwhile, for a connection, for what is sent to be taken, for a pause to
//! be over, and for the stop at any time.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{Batch, Batches, Connect, Progress, Stream};
use crate::audit::chain::Linked;
use crate::backoff::Backoff;
use crate::chain::Chain;
use crate::limits::{SINK_CONNECT, SINK_DELIVERY, SINK_GOODBYE, SINK_RETRY_CAP, SINK_RETRY_FIRST, TLS_TIMEOUT};
use crate::secret::{Secret, random_u32};
use crate::target::Target;
use crate::tls::{self, ClientConfig, ClientOptions, TlsError};

/// Why something was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// One of a fixed set of words.
    pub(super) reason: &'static str,
    /// More about it; never a secret.
    pub(super) detail: String,
    /// How long the collector wants to be left alone, at the least.
    pub(super) pause: Duration,
}

impl Failure {
    pub(super) fn new(reason: &'static str, detail: impl ToString) -> Self {
        Self { reason, detail: detail.to_string(), pause: Duration::ZERO }
    }
}

/// Whole lines that go out together.
#[derive(Debug, Default)]
pub(super) struct Portion {
    parts: Vec<Bytes>,
    bytes: usize,
    records: usize,
}

impl Portion {
    /// Its lines, each with its newline.
    pub(super) fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.parts.iter().flat_map(|part| part.split_inclusive(|byte| *byte == b'\n'))
    }

    /// How many bytes they are.
    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    /// How the first and the last of them are linked.
    pub(super) fn ends(&self) -> Option<(Linked, Linked)> {
        let first = self.lines().next().and_then(Linked::read)?;
        let last = self.parts.last()?.split_inclusive(|byte| *byte == b'\n').next_back().and_then(Linked::read)?;
        Some((first, last))
    }
}

/// How much goes out together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Most {
    pub(super) records: usize,
    pub(super) bytes: usize,
    /// How long the first of them waits for more.
    pub(super) linger: Duration,
}

/// Something that takes records.
pub(super) trait Collector: Send + Sync {
    /// A connection to it.
    type Session: Send;

    /// How much goes out together.
    fn most(&self) -> Most;

    /// Connects.
    fn open(&self) -> impl Future<Output = Result<Self::Session, Failure>> + Send;

    /// Sends; the collector has taken it when this returns.
    fn send(&self, session: &mut Self::Session, portion: &Portion) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Returns when the far end has hung up. Dropping the future loses nothing.
    fn over(session: &mut Self::Session) -> impl Future<Output = ()> + Send;

    /// Hangs up, so that what was sent is not thrown away.
    fn close(session: Self::Session) -> impl Future<Output = ()> + Send;
}

/// Delivers what there is until there will be no more, or `stop` fires.
pub(super) async fn deliver<C: Collector>(collector: C, batches: Batches, progress: Progress, stop: CancellationToken) {
    let mut delivery = Delivery {
        collector,
        batches,
        rest: None,
        session: None,
        backoff: Backoff::new(SINK_RETRY_FIRST, SINK_RETRY_CAP),
    };
    let working = async {
        while let Some(portion) = delivery.next().await {
            let Some((_, last)) = portion.ends() else {
                // Only the chain's own lines come here.
                progress.failed("no_record", "a line without a number cannot be sent".to_owned());
                continue;
            };
            while let Err(failure) = delivery.attempt(&portion).await {
                let pause = delivery.backoff.fail(random_u32()).max(failure.pause);
                progress.failed(failure.reason, failure.detail);
                sleep(pause).await;
            }
            delivery.backoff.reset();
            progress.written(last.seq);
        }
        if let Some(session) = delivery.session.take() {
            // What was sent is on its way; whoever does not say goodbye in time has it all the same.
            let _ = timeout(SINK_GOODBYE, C::close(session)).await;
        }
    };
    stop.run_until_cancelled(working).await;
}

struct Delivery<C: Collector> {
    collector: C,
    batches: Batches,
    /// What of a batch has not gone into a portion yet.
    rest: Option<Bytes>,
    session: Option<C::Session>,
    backoff: Backoff,
}

impl<C: Collector> Delivery<C> {
    /// What goes out next; `None` when there will be nothing.
    async fn next(&mut self) -> Option<Portion> {
        let most = self.collector.most();
        let mut portion = Portion::default();
        if self.rest.is_none() {
            self.rest = Some(self.wait().await?.bytes);
        }
        let until = Instant::now() + most.linger;
        loop {
            if let Some(bytes) = self.rest.take() {
                self.rest = portion.fill(bytes, most);
            }
            if self.rest.is_some() || portion.records >= most.records || portion.bytes >= most.bytes {
                return Some(portion);
            }
            // What is there already is taken even where nothing waits for more.
            match timeout_at(until, self.batches.next()).await {
                Ok(Some(batch)) => self.rest = Some(batch.bytes),
                Ok(None) | Err(_) => return Some(portion),
            }
        }
    }

    /// Waits for a batch, and lets a connection go that the far end has given up.
    async fn wait(&mut self) -> Option<Batch> {
        loop {
            let Some(session) = &mut self.session else { return self.batches.next().await };
            tokio::select! {
                batch = self.batches.next() => return batch,
                () = C::over(session) => self.session = None,
            }
        }
    }

    async fn attempt(&mut self, portion: &Portion) -> Result<(), Failure> {
        // What is written to a connection that has ended already would be lost without a word.
        if let Some(session) = &mut self.session
            && timeout(Duration::ZERO, C::over(session)).await.is_ok()
        {
            self.session = None;
        }
        let mut session = match self.session.take() {
            Some(session) => session,
            None => timeout(SINK_CONNECT, self.collector.open()).await.unwrap_or_else(|_| {
                let waited = SINK_CONNECT.as_secs();
                Err(Failure::new("timed_out", format!("it could not be connected to within {waited} s")))
            })?,
        };
        let sent = timeout(SINK_DELIVERY, pin!(self.collector.send(&mut session, portion))).await;
        sent.unwrap_or_else(|_| {
            let waited = SINK_DELIVERY.as_secs();
            Err(Failure::new("timed_out", format!("it has not taken what was sent within {waited} s")))
        })?;
        self.session = Some(session);
        Ok(())
    }
}

impl Portion {
    /// Takes whole lines from `bytes` as far as they fit, and one at the least; what is left.
    fn fill(&mut self, mut bytes: Bytes, most: Most) -> Option<Bytes> {
        let mut taken = 0;
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let fits = self.records < most.records && self.bytes + line.len() <= most.bytes;
            if !fits && self.records > 0 {
                break;
            }
            taken += line.len();
            self.bytes += line.len();
            self.records += 1;
        }
        let rest = bytes.split_off(taken);
        if !bytes.is_empty() {
            self.parts.push(bytes);
        }
        (!rest.is_empty()).then_some(rest)
    }
}

/// Where a collector is, and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its host and port.
    pub to: Target,
    /// How TLS is made with it; clear text where it says nothing.
    pub tls: Option<Tls>,
    /// The URL of the proxy on the way, if there is one.
    pub proxy: Option<Secret<String>>,
}

/// How TLS is made with a collector: its certificate must be good for the host that is dialled. Two are equal if they were
/// made of the same options.
#[derive(Clone)]
pub struct Tls {
    options: ClientOptions,
    config: Arc<ClientConfig>,
}

impl Tls {
    /// Reads the authorities that count.
    ///
    /// # Errors
    /// If they cannot be read, or there are none.
    pub fn new(options: ClientOptions) -> Result<Self, TlsError> {
        let config = options.build()?;
        Ok(Self { options, config })
    }
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.options == other.options
    }
}

impl Eq for Tls {}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.options.fmt(f)
    }
}

impl Place {
    /// A connection to it, with TLS where that is wanted.
    pub(super) async fn reach(&self, connect: &dyn Connect) -> Result<Box<dyn Stream>, Failure> {
        let proxy = self.proxy.as_ref().map(|proxy| proxy.expose().as_str());
        let stream = connect.connect(&self.to, proxy).await;
        let stream = stream.map_err(|error| Failure::new("connect_failed", Chain(&error)))?;
        let Some(tls) = &self.tls else { return Ok(stream) };
        match timeout(TLS_TIMEOUT, tls::connect(&tls.config, &self.to.host, stream)).await {
            Ok(Ok(stream)) => Ok(Box::new(stream)),
            Ok(Err(error)) => Err(Failure::new("tls_failed", Chain(&error))),
            Err(_) => {
                let waited = TLS_TIMEOUT.as_secs();
                Err(Failure::new("tls_failed", format!("it has not completed the TLS handshake within {waited} s")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Most = Most { records: 3, bytes: 12, linger: Duration::ZERO };

    #[test]
    fn a_portion_is_whole_lines_within_both_bounds() {
        let mut portion = Portion::default();
        let rest = portion.fill(Bytes::from_static(b"one\ntwo\nthree\n"), MOST);
        assert_eq!(rest.as_deref(), Some(&b"three\n"[..]));
        assert_eq!(portion.lines().collect::<Vec<_>>(), [b"one\n", b"two\n"]);
        assert_eq!(portion.fill(Bytes::from_static(b"4\n"), MOST), None);
        assert_eq!(portion.fill(Bytes::from_static(b"5\n"), MOST).as_deref(), Some(&b"5\n"[..]));
        assert_eq!((portion.records, portion.len()), (3, 10));
    }

    #[test]
    fn a_line_that_is_too_long_goes_alone() {
        let mut portion = Portion::default();
        let rest = portion.fill(Bytes::from_static(b"a line that is too long\nnext\n"), MOST);
        assert_eq!(rest.as_deref(), Some(&b"next\n"[..]));
        assert_eq!(portion.records, 1);
    }
}

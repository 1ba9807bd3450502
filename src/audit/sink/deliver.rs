//! What all collectors over a network have in common: a queue to be emptied in order, a connection that comes and goes, and
//! time that runs out.
//!
//! Promised: records go out in the order of the trail, and what is said to be written is what the collector has taken, as
//! far as its protocol can tell. What was not taken is sent again after a failure, whole, so that a collector may get
//! something twice: the trail, `seq` and `prev` together say what it has already. Every wait has a deadline, a failure is told with
//! its reason, and between attempts there is a pause that grows, with jitter.
//!
//! What a collector refuses because of what it is, and not because of when or by whom it was sent, is never sent again as it was:
//! it goes in halves, down to one record, after short pauses. A record that is refused alone, [`SINK_REFUSALS`] times, is lost to a
//! sink that is not required, which is counted, and what comes after it goes on; a sink that is required fails until the collector
//! takes it.
//!
//! Waits for a batch, for the far end to hang up meanwhile, for a connection, for what is sent to be taken, for a pause to
//! be over, and for the stop at any time.

use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::renewed::{Renew, Renewed};
use super::{Batch, Batches, Connect, Means, Progress, Stream};
use crate::audit::chain::Linked;
use crate::backoff::Backoff;
use crate::chain::Chain;
use crate::limits::{
    SINK_CONNECT, SINK_DELIVERY, SINK_GOODBYE, SINK_REFUSALS, SINK_RETRY_CAP, SINK_RETRY_FIRST, SINK_TAKEN_BEFORE_MORE,
    TLS_TIMEOUT,
};
use crate::secret::{Secret, random_u32};
use crate::target::Target;
use crate::tls::{self, ClientConfig, ClientOptions, Identity, IdentityError, TlsError};

/// Why something was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// One of a fixed set of words.
    pub(super) reason: &'static str,
    /// More about it; never a secret.
    pub(super) detail: String,
    /// How long the collector wants to be left alone, at the least.
    pub(super) pause: Duration,
    /// Whether what was sent is refused for what it is: the same will be refused again, a part of it may not be.
    pub(super) for_good: bool,
}

impl Failure {
    pub(super) fn new(reason: &'static str, detail: impl ToString) -> Self {
        Self { reason, detail: detail.to_string(), pause: Duration::ZERO, for_good: false }
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

    /// Its first half and its second one; both hold something where there are two lines or more.
    fn halves(self) -> (Self, Self) {
        let most = Most { records: (self.records / 2).max(1), bytes: usize::MAX, linger: Duration::ZERO };
        let (mut first, mut second) = (Self::default(), Self::default());
        for part in self.parts {
            let rest = if first.records < most.records { first.fill(part, most) } else { Some(part) };
            if let Some(rest) = rest {
                // All of it fits.
                let _ = second.fill(rest, Most { records: usize::MAX, ..most });
            }
        }
        (first, second)
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

/// Delivers what there is until there will be no more, or `stop` fires. Whether the sink is `required` decides what becomes of a
/// record that the collector does not take.
pub(super) async fn deliver<C: Collector>(
    collector: C,
    batches: Batches,
    progress: Progress,
    required: bool,
    stop: CancellationToken,
) {
    let mut delivery = Delivery {
        collector,
        batches,
        progress,
        required,
        rest: None,
        session: None,
        backoff: Backoff::new(SINK_RETRY_FIRST, SINK_RETRY_CAP),
        fits: Fits::default(),
    };
    let working = async {
        while let Some(portion) = delivery.next().await {
            delivery.bring(portion).await;
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
    progress: Progress,
    required: bool,
    /// What of a batch has not gone into a portion yet.
    rest: Option<Bytes>,
    session: Option<C::Session>,
    backoff: Backoff,
    fits: Fits,
}

/// How many bytes the collector takes at once, as far as its refusals have told.
#[derive(Debug, Default)]
struct Fits {
    most: Option<usize>,
    /// How often it has taken something since.
    taken: u32,
}

impl Fits {
    /// Several records of so many bytes were too much.
    fn refused(&mut self, bytes: usize) {
        *self = Self { most: Some(bytes / 2), taken: 0 };
    }

    /// Something was taken. After a while more is tried: one record may have been to blame.
    fn taken(&mut self) {
        self.taken += 1;
        if self.taken >= SINK_TAKEN_BEFORE_MORE {
            let most = self.most.and_then(|most| most.checked_mul(2));
            *self = Self { most, taken: 0 };
        }
    }
}

impl<C: Collector> Delivery<C> {
    /// Sends a portion, however long that takes: whole, or in pieces that the collector takes.
    async fn bring(&mut self, portion: Portion) {
        // What is left of it, the last one first. Each is half of what was refused before it, so that they are few.
        let mut left = vec![portion];
        let mut refusals = 0;
        while let Some(portion) = left.pop() {
            let Some((_, last)) = portion.ends() else {
                // Only the chain's own lines come here.
                self.progress.failed("no_record", "a line without a number cannot be sent".to_owned());
                continue;
            };
            let Err(failure) = self.attempt(&portion).await else {
                self.backoff.reset();
                self.fits.taken();
                self.progress.written(last.seq);
                refusals = 0;
                continue;
            };
            if failure.for_good && portion.records > 1 {
                // Nothing to be told yet: the pieces may be taken. It is there, and they are few, so that they come soon: what
                // waits behind them is not to be lost because of one record, nor a required sink to fail meanwhile.
                let (records, bytes) = (portion.records, portion.len());
                tracing::debug!(records, bytes, detail = failure.detail, "a collector wants less at once");
                self.fits.refused(bytes);
                let (first, second) = portion.halves();
                left.extend([second, first]);
                sleep(SINK_RETRY_FIRST).await;
                continue;
            }
            let pause = self.backoff.fail(random_u32()).max(failure.pause);
            if failure.for_good {
                refusals += 1;
                let (number, bytes) = (last.seq, portion.len());
                let refused = format!("{} to record {number} alone ({bytes} bytes)", failure.detail);
                if self.required {
                    let next = "nothing opens before it takes it: its own log says what it does not like";
                    self.progress.failed(failure.reason, format!("{refused}; {next}"));
                    left.push(portion);
                } else if refusals < SINK_REFUSALS {
                    self.progress.failed(failure.reason, refused);
                    left.push(portion);
                } else {
                    let next = "the record is lost to this sink: its own log says what it did not like";
                    self.progress.lost(last.seq, failure.reason, format!("{refused}; {next}"));
                    refusals = 0;
                }
            } else {
                self.progress.failed(failure.reason, failure.detail);
                left.push(portion);
            }
            sleep(pause).await;
        }
    }

    /// What goes out next; `None` when there will be nothing.
    async fn next(&mut self) -> Option<Portion> {
        let mut most = self.collector.most();
        most.bytes = self.fits.most.map_or(most.bytes, |bytes| bytes.min(most.bytes));
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

/// How TLS is made with a collector: its certificate must be good for the host that is dialled. Two are equal if they are made
/// of the same files, whatever these hold.
#[derive(Clone)]
pub struct Tls {
    files: TlsFiles,
    config: Arc<ClientConfig>,
}

/// The files of which it is made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsFiles {
    /// The only authorities that count; without one the system's do.
    pub ca_file: Option<PathBuf>,
    /// What is shown to a collector that asks for a certificate: that, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Why they will not do.
#[derive(Debug, thiserror::Error)]
pub enum TlsFilesError {
    /// The certificate or its key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The authorities.
    #[error(transparent)]
    Authorities(#[from] TlsError),
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// If one cannot be read, or is not in order.
    pub fn read(files: TlsFiles) -> Result<Self, TlsFilesError> {
        let identity = files.identity.as_ref().map(|(chain, key)| Identity::read(chain, key)).transpose()?;
        let ca_files = files.ca_file.iter().cloned().collect();
        let config = ClientOptions { ca_files, identity, alpn: &[] }.build()?;
        Ok(Self { files, config })
    }
}

impl Renew for Tls {
    const WHAT: &'static str = "certificate, key or ca_file";

    fn again(&self) -> Result<Self, String> {
        Self::read(self.files.clone()).map_err(|error| Chain(&error).to_string())
    }
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.files == other.files
    }
}

impl Eq for Tls {}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.files.fmt(f)
    }
}

/// The way to a collector, for as long as its sink runs.
pub(super) struct Way {
    to: Target,
    proxy: Option<Secret<String>>,
    tls: Option<Renewed<Tls>>,
    connect: Arc<dyn Connect>,
}

impl Way {
    pub(super) fn new(place: Place, means: &Means) -> Self {
        let Place { to, tls, proxy } = place;
        let tls = tls.map(|tls| Renewed::new(tls, means.tasks.clone()));
        Self { to, proxy, tls, connect: Arc::clone(&means.connect) }
    }

    /// Where it leads.
    pub(super) fn to(&self) -> &Target {
        &self.to
    }

    /// A connection to it, with TLS where that is wanted.
    pub(super) async fn reach(&self) -> Result<Box<dyn Stream>, Failure> {
        let proxy = self.proxy.as_ref().map(|proxy| proxy.expose().as_str());
        let stream = self.connect.connect(&self.to, proxy).await;
        let stream = stream.map_err(|error| Failure::new("connect_failed", Chain(&error)))?;
        let Some(tls) = &self.tls else { return Ok(stream) };
        let tls = tls.read().await;
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
    fn halves_are_whole_lines_in_order() {
        let all = |portion: &Portion| portion.lines().map(<[u8]>::to_vec).collect::<Vec<_>>();
        let most = Most { records: 100, bytes: 1000, linger: Duration::ZERO };
        for count in 2..12_usize {
            for cut in 0..=count {
                let lines: Vec<_> = (0..count).map(|number| format!("line {number}\n").into_bytes()).collect();
                let mut portion = Portion::default();
                for part in [&lines[..cut], &lines[cut..]] {
                    assert_eq!(portion.fill(Bytes::from(part.concat()), most), None);
                }
                let (first, second) = portion.halves();
                assert_eq!((first.records, second.records), (count / 2, count - count / 2));
                assert_eq!([all(&first), all(&second)].concat(), lines);
                for half in [&first, &second] {
                    assert_eq!((all(half).len(), all(half).concat().len()), (half.records, half.len()));
                }
            }
        }
    }

    #[test]
    fn what_was_too_much_is_tried_again_after_a_while() {
        let mut fits = Fits::default();
        fits.refused(1000);
        for _ in 1..SINK_TAKEN_BEFORE_MORE {
            fits.taken();
        }
        assert_eq!(fits.most, Some(500));
        fits.taken();
        assert_eq!(fits.most, Some(1000));
    }

    #[test]
    fn a_line_that_is_too_long_goes_alone() {
        let mut portion = Portion::default();
        let rest = portion.fill(Bytes::from_static(b"a line that is too long\nnext\n"), MOST);
        assert_eq!(rest.as_deref(), Some(&b"next\n"[..]));
        assert_eq!(portion.records, 1);
    }
}

//! What a start does before the writer runs: opens the sinks, finds where the trail goes on, and says what comes first.

use std::io;

use super::StartError;
use super::chain::{Chain, TrailId};
use super::lane::{Hand, Lane, Opener, Turning, work_apart};
use super::record::{ABANDONED, RECOVERED, Record, SINK_WORKS, STARTED, Side, text};
use super::recover::{self, Found};
use super::sink::file::Appended;
use super::sink::{Content, Feed, Fsync, Rotation, SinkConfig, SinkKind, Sinks, pipe, stdout};

/// Open sinks, and what the writer has to say first.
pub(super) struct Prepared {
    pub(super) trail: TrailId,
    pub(super) chain: Chain,
    pub(super) lanes: Vec<Lane>,
    pub(super) first: Vec<Record>,
}

/// A file that was opened, until it is known what the others hold.
struct Opened<'a> {
    config: &'a SinkConfig,
    file: Appended,
    found: Found,
}

/// Opens all sinks, and puts in order what an earlier process has left. `feeds` are those of the network sinks, in order.
///
/// # Errors
/// If a required sink cannot be used.
pub(super) fn prepare(sinks: &Sinks, side: Side, feeds: Vec<Feed>) -> Result<Prepared, StartError> {
    let mut opened = Vec::new();
    for config in &sinks.list {
        let SinkKind::File { path, fsync, rotate } = &config.kind else { continue };
        let result = Appended::open(path, *fsync, rotate.keep)
            .and_then(|file| recover::look(path, file.file()).map(|found| Opened { config, file, found }));
        match result {
            Ok(file) => opened.push(file),
            Err(error) if config.required => return Err(error),
            // Its thread goes on trying, and the trail says so.
            Err(error) => tracing::warn!(
                sink = config.name, error = %crate::chain::Chain(&error), "a sink of the audit trail does not work"
            ),
        }
    }
    let last = goes_on(&opened);
    let trail = match last {
        Some(last) => last.trail,
        None => TrailId::generate().map_err(StartError::Random)?,
    };
    let chain = last.map_or_else(|| Chain::begin(&trail), |last| last.chain());
    let first = first(side, trail, last.map(|last| last.seq), &mut opened);
    let lanes = lanes(sinks, opened, feeds)?;
    Ok(Prepared { trail, chain, lanes, first })
}

/// Where the trail goes on: at the last record that any of the files has of it. Which trail that is the first one says
/// that holds any.
fn goes_on(opened: &[Opened<'_>]) -> Option<recover::Last> {
    let required = opened.iter().filter(|opened| opened.config.required).find_map(|opened| opened.found.last);
    let trail = required.or_else(|| opened.iter().find_map(|opened| opened.found.last))?.trail;
    let of_it = opened.iter().filter_map(|opened| opened.found.last).filter(|last| last.trail == trail);
    of_it.max_by_key(|last| last.seq)
}

/// The records that come first: who writes, what the files lack, the ends of forwards that have none, and what was found.
fn first(side: Side, trail: TrailId, last: Option<u64>, opened: &mut [Opened<'_>]) -> Vec<Record> {
    let mut records = vec![Record {
        trail: text(trail),
        version: Some(env!("CARGO_PKG_VERSION")),
        pid: Some(std::process::id()),
        ..Record::own(side, STARTED)
    }];
    for file in opened.iter().filter(|file| file.config.only == Content::All) {
        let has = file.found.last.filter(|has| has.trail == trail).map(|has| has.seq);
        if let Some(lost) = has.zip(last).and_then(|(has, last)| last.checked_sub(has)).filter(|lost| *lost > 0) {
            let record = Record { sink: text(&file.config.name), lost: Some(lost), ..Record::own(side, SINK_WORKS) };
            records.push(Record { detail: text("when the process before this one ended"), ..record });
        }
    }
    // Of the copies, the longest one has all openings and all ends that any of them has, unless it lacks records: one that was
    // behind when an earlier process was killed goes on with the others, and has openings whose ends it never got.
    let number = |file: &Opened<'_>| file.found.last.filter(|has| has.trail == trail).map(|has| has.seq);
    let whole = |file: &&mut Opened<'_>| file.config.only == Content::All;
    let longest = opened.iter_mut().filter(whole).max_by_key(|file| (number(file), !file.found.gap));
    let open = longest.map(|file| std::mem::take(&mut file.found.open)).unwrap_or_default();
    let closed = open.len() as u64;
    for opening in open {
        let own = Record::own(side, ABANDONED);
        records.push(Record {
            v: own.v,
            time: own.time,
            event: own.event,
            side: own.side,
            reason: text("writer_ended"),
            detail: text("the process that wrote the opening ended without its end; when and how is not known"),
            ..*opening
        });
    }
    let several = opened.len() > 1;
    let mut told = closed == 0;
    for file in opened.iter().filter(|file| file.found.torn.is_some() || file.found.unreadable > 0) {
        let found = &file.found;
        records.push(Record {
            forwards: Some(if told { 0 } else { closed }),
            sink: text(&file.config.name).filter(|_| several),
            torn_at: found.torn.map(|torn| torn.at),
            torn: found.torn.and_then(|torn| torn.digest).and_then(text),
            unreadable: (found.unreadable > 0).then_some(found.unreadable),
            unreadable_at: found.unreadable_at,
            ..Record::own(side, RECOVERED)
        });
        told = true;
    }
    if !told {
        records.push(Record { forwards: Some(closed), ..Record::own(side, RECOVERED) });
    }
    records
}

/// The ways to all sinks, in the order of the configuration.
fn lanes(sinks: &Sinks, opened: Vec<Opened<'_>>, feeds: Vec<Feed>) -> Result<Vec<Lane>, StartError> {
    let (mut opened, mut feeds) = (opened.into_iter().peekable(), feeds.into_iter());
    let mut lanes = Vec::with_capacity(sinks.list.len());
    for config in &sinks.list {
        let (hand, turning) = match &config.kind {
            SinkKind::File { fsync, rotate, .. } => {
                let file = opened.next_if(|file| file.config.name == config.name);
                match file {
                    Some(file) => {
                        let (hand, turning) = held(file, *fsync, *rotate);
                        (Some(hand), Some(turning))
                    }
                    None => (None, None),
                }
            }
            SinkKind::Stdout => {
                let output = stdout().map_err(StartError::Stdout)?;
                (Some(Hand::new(output, Fsync::Interval(super::sink::NEVER), false)), None)
            }
            SinkKind::Syslog(_) | SinkKind::Https(_) => {
                let feed = feeds.next().ok_or(StartError::Gone)?;
                lanes.push(Lane::apart(config, feed, None));
                continue;
            }
        };
        match hand {
            Some(hand) if config.required => lanes.push(Lane::inline(config, hand, turning)),
            hand => {
                let (feed, batches, progress) = pipe();
                work_apart(hand, opener(config), batches, progress).map_err(StartError::Thread)?;
                lanes.push(Lane::apart(config, feed, turning));
            }
        }
    }
    Ok(lanes)
}

fn held(file: Opened<'_>, fsync: Fsync, policy: Rotation) -> (Hand, Turning) {
    let (bytes, begun) = (file.file.length(), file.file.begun());
    let hand = Hand::going_on(Box::new(file.file), fsync, file.found.torn.is_some(), (bytes, begun));
    (hand, Turning { policy, bytes, begun, not_before: None })
}

/// Opens a sink that could not be opened at the start. What its last process left unfinished is ended, and shows.
fn opener(config: &SinkConfig) -> Opener {
    let kind = config.kind.clone();
    Box::new(move || match &kind {
        SinkKind::File { path, fsync, rotate } => {
            let file = Appended::open(path, *fsync, rotate.keep).map_err(io::Error::other)?;
            let torn = recover::look(path, file.file()).map_err(io::Error::other)?.torn.is_some();
            let so_far = (file.length(), file.begun());
            Ok(Hand::going_on(Box::new(file), *fsync, torn, so_far))
        }
        _ => Err(io::ErrorKind::Unsupported.into()),
    })
}

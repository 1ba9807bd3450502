//! Verifying a trail: whether anybody has changed, taken out, moved or put in records, and who vouches for it.
//!
//! Promised: whatever was done to a trail between its first and last record shows, with the place, unless whoever did it could make
//! the chain anew; that shows by the signed heads to whoever has not the key that signs them; and that of whoever has it shows by
//! what other places have kept ([`Anchors`]), which also shows where a whole trail was put in another's place. What no head covers yet, and what nobody else has seen, is told apart. Memory
//! does not grow with the trail.
//!
//! Every record has its digest made and is held to be JSON; only what the trail says of itself is read further.
//!
//! Not promised: that what was recorded is true. Nor that records are missed that were taken off the end and that no other place
//! knows of.

mod absent;
mod anchors;
mod fields;
mod judge;
pub(in crate::audit) mod lines;
mod report;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::chain::{Linked, TrailId};
use crate::identity::{Fingerprint, PublicKey};

pub use anchors::Anchors;
pub use report::{Absent, Finding, Kind, Range, Report, Trail};

use judge::Judge;
use lines::Lines;

/// Whose signatures of heads count. None: whoever's, as long as they hold.
#[derive(Debug, Clone, Default)]
pub struct Keys(BTreeSet<String>);

impl Keys {
    /// Adds a key.
    pub fn add(&mut self, key: &Fingerprint) {
        self.0.insert(key.to_string());
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn knows(&self, key: &str) -> bool {
        self.0.contains(key)
    }

    /// Adds the public keys of a text: one in PEM, or lines of OpenSSH's, where comments and empty lines are passed over.
    /// Returns how many there are.
    ///
    /// # Errors
    /// If something is no public key.
    pub fn read(&mut self, text: &str) -> Result<usize, crate::identity::KeyError> {
        if text.contains("-----BEGIN") {
            self.add(&PublicKey::parse(text)?.fingerprint());
            return Ok(1);
        }
        let mut count = 0;
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            self.add(&PublicKey::parse(line)?.fingerprint());
            count += 1;
        }
        Ok(count)
    }
}

/// Why a trail could not be verified at all.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A file could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Verifies the trail that stands in these files, in whatever order they are given. Tells `progress` of the bytes that were read
/// since it was told last.
///
/// # Errors
/// If a file cannot be read. Whatever is wrong with a trail is in the report.
pub fn verify(
    paths: &[PathBuf],
    keys: &Keys,
    anchors: &mut Anchors,
    mut progress: impl FnMut(u64),
) -> Result<Report, VerifyError> {
    let mut judge = Judge::new(keys, anchors);
    for path in in_order(paths)? {
        let failed = |source| VerifyError::Read { path: path.clone(), source };
        judge.file(&path.display().to_string());
        let mut lines = Lines::new(File::open(&path).map_err(failed)?);
        let mut told = 0;
        while let Some(line) = lines.next().map_err(failed)? {
            let offset = line.offset;
            judge.line(&line);
            if offset - told >= PROGRESS {
                progress(offset - told);
                told = offset;
            }
        }
        progress(lines.offset() - told);
    }
    Ok(judge.finish())
}

/// As [`verify`], of what `inputs` hold, in this order.
///
/// # Errors
/// If reading fails.
pub fn verify_inputs<R: Read>(inputs: Vec<(&str, R)>, keys: &Keys, anchors: &mut Anchors) -> io::Result<Report> {
    let mut judge = Judge::new(keys, anchors);
    for (name, input) in inputs {
        judge.file(name);
        let mut lines = Lines::new(input);
        while let Some(line) = lines.next()? {
            judge.line(&line);
        }
    }
    Ok(judge.finish())
}

/// The files in the order in which they were written: by the number of the first record that can be read. What belongs to
/// one trail stays together, in the order in which the trails are given. An index that is named with its file (by a `*`, say) is
/// passed over.
fn in_order(paths: &[PathBuf]) -> Result<Vec<PathBuf>, VerifyError> {
    Ok(by_trail(paths)?.into_iter().flatten().collect())
}

/// The same, each trail's by themselves.
pub(in crate::audit) fn by_trail(paths: &[PathBuf]) -> Result<Vec<Vec<PathBuf>>, VerifyError> {
    let mut known: Vec<TrailId> = Vec::new();
    let mut placed = Vec::new();
    for path in paths.iter().filter(|path| !is_index(path, paths)) {
        let begins = begins(path).map_err(|source| VerifyError::Read { path: path.clone(), source })?;
        if let Some(trail) = begins.0.filter(|trail| !known.contains(trail)) {
            known.push(trail);
        }
        placed.push((begins, path));
    }
    let mut trails: Vec<Vec<(u64, PathBuf)>> = vec![Vec::new(); known.len().max(1)];
    for ((trail, seq), path) in placed {
        let at = trail.and_then(|trail| known.iter().position(|known| *known == trail)).unwrap_or(0);
        trails[at].push((seq, path.clone()));
    }
    trails.iter_mut().for_each(|files| files.sort_by_key(|(seq, _)| *seq));
    Ok(trails.into_iter().map(|files| files.into_iter().map(|(_, path)| path).collect()).collect())
}

/// Whether that is the index of another of these files.
fn is_index(path: &Path, paths: &[PathBuf]) -> bool {
    path.extension().is_some_and(|end| end == "index") && paths.contains(&path.with_extension(""))
}

/// What trail a file says that it is of, and the number of its first record.
fn begins(path: &Path) -> io::Result<(Option<TrailId>, u64)> {
    let mut lines = Lines::new(File::open(path)?.take(LOOK));
    let (mut trail, mut first) = (None, None);
    for _ in 0..LOOK_LINES {
        let Some(line) = lines.next()? else { break };
        let Some(linked) = Linked::read(line.bytes) else { continue };
        first = first.or(Some(linked.seq));
        if let Ok(fields) = serde_json::from_slice::<fields::Fields<'_>>(line.bytes) {
            trail = fields.trail.as_deref().and_then(TrailId::parse);
        }
        if trail.is_some() {
            break;
        }
    }
    Ok((trail, first.unwrap_or(u64::MAX)))
}

/// What is read of a file to know where it belongs.
const LOOK: u64 = 1 << 20;

/// Lines that are looked at for that.
const LOOK_LINES: usize = 16;

/// After how many bytes progress is told.
const PROGRESS: u64 = 4 << 20;

#[cfg(test)]
mod tests;

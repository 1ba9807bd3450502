//! The files of a trail: the one that is written, and those that were before it.
//!
//! A rotated file is called like the one that is written, then a point, when it was rotated, a hyphen and the number of its
//! first record: `agent.jsonl.20261121T200000Z-000000012345`. That number is their order, whatever the clock did.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::ReadError;
use crate::audit::sink::file;

/// A file to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Where it is; `-` is standard input.
    pub path: PathBuf,
    /// Which of the trails that were asked for it belongs to.
    pub trail: usize,
    /// How many bytes it has; of standard input, not known.
    pub length: Option<u64>,
    /// Whether the index beside it may be used.
    pub index: bool,
}

impl Part {
    /// Whether it is standard input.
    #[must_use]
    pub fn is_stdin(&self) -> bool {
        is_stdin(&self.path)
    }

    /// Whether it is this file, by whatever name.
    #[must_use]
    pub fn is(&self, file: FileId) -> bool {
        fs::metadata(&self.path).is_ok_and(|metadata| FileId::of(&metadata) == file)
    }
}

/// What tells a file from all others, by whatever name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId(u64, u64);

impl FileId {
    /// Of this file.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Self {
        Self(metadata.dev(), metadata.ino())
    }
}

/// All files of the trails whose paths these are, oldest first. A rotated file that is named itself stands for itself, unless
/// its trail is named as well; an index that is named (by a `*`, say) is passed over.
///
/// # Errors
/// If a file is absent or cannot be looked at.
pub fn expand(paths: &[PathBuf]) -> Result<Vec<Part>, ReadError> {
    let mut trails: Vec<(&PathBuf, Vec<PathBuf>)> = Vec::new();
    for path in paths {
        let known = trails.iter().any(|(known, _)| *known == path);
        if known || (is_index(path) && !is_stdin(path)) {
            continue;
        }
        let files =
            if is_stdin(path) { Vec::new() } else { rotated(path).map_err(|source| ReadError::of(path, source))? };
        trails.push((path, files));
    }
    let mut parts = Vec::new();
    for (trail, (path, rotated)) in trails.iter().enumerate() {
        if is_stdin(path) {
            parts.push(Part { path: (*path).clone(), trail, length: None, index: false });
            continue;
        }
        if trails.iter().any(|(_, files)| files.contains(path)) {
            continue;
        }
        // A trail may consist of rotated files alone, while a new one is not there yet.
        let written = (rotated.is_empty() || path.exists()).then_some(*path);
        for file in rotated.iter().chain(written) {
            let metadata = fs::metadata(file).map_err(|source| ReadError::of(file, source))?;
            if metadata.is_dir() {
                return Err(ReadError::Directory { path: file.clone() });
            }
            let length = metadata.is_file().then_some(metadata.len());
            parts.push(Part { path: file.clone(), trail, length, index: length.is_some() });
        }
    }
    Ok(parts)
}

fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// The file that was begun after this one of the trail at `path`; `None` if it is the last.
///
/// # Errors
/// If the folder cannot be read.
pub fn after(path: &Path, file: FileId) -> io::Result<Option<PathBuf>> {
    let id = |path: &Path| match fs::metadata(path) {
        Ok(metadata) => Ok(Some(FileId::of(&metadata))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    // Mostly nothing has happened, and one look tells.
    let written = id(path)?;
    if written == Some(file) {
        return Ok(None);
    }
    let files = rotated(path)?;
    for (at, rotated) in files.iter().enumerate() {
        if id(rotated)? == Some(file) {
            let next = files.get(at + 1).cloned();
            return Ok(next.or_else(|| written.map(|_| path.to_owned())));
        }
    }
    // It is gone: what is written now is what there is.
    Ok(written.map(|_| path.to_owned()))
}

/// The rotated files of the trail at `path`, oldest first.
fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    match file::rotated(path) {
        Ok(found) => Ok(found.into_iter().map(|(_, path)| path).collect()),
        // The trail itself may be readable all the same, or absent.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

fn is_index(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "index") && path.with_extension("").exists()
}

/// The index of a file of a trail.
#[must_use]
pub fn index_of(path: &Path) -> PathBuf {
    file::index_name(path)
}

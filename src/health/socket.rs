//! Unix sockets for this user alone, and none left behind.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};
use tracing::debug;

/// Removes the socket when its program goes.
#[derive(Debug)]
pub struct Guard {
    path: PathBuf,
    /// Device and inode: what stands at the path later may be another program's.
    made: (u64, u64),
}

impl Drop for Guard {
    fn drop(&mut self) {
        match std::fs::symlink_metadata(&self.path) {
            Ok(now) if (now.dev(), now.ino()) == self.made => {}
            _ => return debug!("the socket at {} is another program's by now", self.path.display()),
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            debug!(%error, "could not remove the socket {}", self.path.display());
        }
    }
}

/// Whether somebody listens at this socket.
pub async fn is_answered(path: &Path) -> bool {
    UnixStream::connect(path).await.is_ok()
}

/// Makes the socket, for this user alone, in the place of whatever socket is there.
///
/// # Errors
/// If it cannot be made, or something else than a socket is there.
pub fn place(path: &Path) -> io::Result<(UnixListener, Guard)> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something else at this path"));
        }
        _ => {}
    }
    // Bound under a name of its own in the same folder and renamed once its mode is set: it is never open to others.
    let mut staging = path.as_os_str().to_owned();
    staging.push(format!(".{}", std::process::id()));
    let staging = PathBuf::from(staging);
    // Left by a process of the same id that was killed in between; in a container every process has that id.
    match std::fs::remove_file(&staging) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&staging)?;
    let placed = std::fs::set_permissions(&staging, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::symlink_metadata(&staging))
        .and_then(|made| std::fs::rename(&staging, path).map(|()| (made.dev(), made.ino())));
    match placed {
        Ok(made) => Ok((listener, Guard { path: path.to_owned(), made })),
        Err(error) => {
            drop(std::fs::remove_file(&staging));
            Err(error)
        }
    }
}

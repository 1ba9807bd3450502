//! A key file and the one that is to take its place.
//!
//! Promised: at every moment there is a whole key at the path, the old one or the new one; nothing is overwritten but the
//! key by its successor, and the old one stays beside it. What was interrupted can be run again.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Algorithm, KeyError, PrivateKey, sync_directory};

/// Where a new pair was written.
#[derive(Debug)]
pub struct Pair {
    /// The private key.
    pub private: PathBuf,
    /// The public one.
    pub public: PathBuf,
}

impl PrivateKey {
    /// Makes a key of the same kind as the one at `path`, and writes it beside it, with `.new` added to the name.
    ///
    /// # Errors
    /// [`KeyError::File`]: the key cannot be used, is a link to somewhere else, or a successor is there already.
    pub fn write_successor(path: &Path) -> Result<(Self, Pair), KeyError> {
        let old = Self::read(path)?;
        refuse_link(path)?;
        let algorithm = match old.public().algorithm() {
            "ssh-rsa" => Algorithm::Rsa4096,
            _ => Algorithm::Ed25519,
        };
        let pair = Pair { private: with(path, ".new"), public: with(path, ".new.pub") };
        for path in [&pair.private, &pair.public] {
            if path.symlink_metadata().is_ok() {
                return Err(KeyError::Exists.at(path));
            }
        }
        let key = Self::generate(algorithm).with_comment(&old.comment())?;
        key.write_new(&pair.private)?;
        let rest = own_as(&pair.private, path).and_then(|()| key.write_public_new(&pair.public));
        if let Err(error) = rest {
            // Only a whole pair is left behind; this private key is nobody's yet.
            drop(fs::remove_file(&pair.private));
            return Err(error);
        }
        Ok((key, pair))
    }

    /// Puts the successor of the key at `path` in its place, and the old key beside it, with `.old` added to the name. The
    /// new key, and where the old one is.
    ///
    /// # Errors
    /// [`KeyError::File`]: there is no successor that can be used, or an older key is in the way.
    pub fn switch_to_successor(path: &Path) -> Result<(Self, PathBuf), KeyError> {
        let (new, old) = (with(path, ".new"), with(path, ".old"));
        refuse_link(path)?;
        let key = Self::read(&new)?;
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| KeyError::Write(error).at(&path)
        };
        match fs::hard_link(path, &old) {
            // An attempt that was interrupted has come so far.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && same_file(path, &old) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(KeyError::Exists.at(&old)),
            linked => linked.map_err(failed(&old))?,
        }
        fs::rename(&new, path).map_err(failed(path))?;
        sync_directory(path).map_err(failed(path))?;
        // The public halves follow where they are beside it; nothing reads them.
        let public = with(path, ".pub");
        if public.symlink_metadata().is_ok() && with(path, ".new.pub").symlink_metadata().is_ok() {
            drop(fs::rename(&public, with(path, ".old.pub")));
        }
        drop(fs::rename(with(path, ".new.pub"), &public));
        Ok((key, old))
    }
}

fn with(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// A link is somebody else's way to keep the key: what was put in its place would be lost, or not be found.
fn refuse_link(path: &Path) -> Result<(), KeyError> {
    let data = path.symlink_metadata().map_err(|error| KeyError::Read(error).at(path))?;
    if data.is_symlink() { Err(KeyError::Link.at(path)) } else { Ok(()) }
}

fn same_file(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| path.symlink_metadata().map(|data| (data.dev(), data.ino()));
    matches!((place(one), place(other)), (Ok(one), Ok(other)) if one == other)
}

/// Whoever could read the old key is to read the new one: an administrator makes it for the agent's user.
fn own_as(new: &Path, old: &Path) -> Result<(), KeyError> {
    let owner = |path: &Path| path.metadata().map(|data| (data.uid(), data.gid()));
    let give = || {
        let (now, wanted) = (owner(new)?, owner(old)?);
        if now == wanted {
            return Ok(());
        }
        std::os::unix::fs::chown(new, Some(wanted.0), Some(wanted.1))
    };
    give().map_err(|error| KeyError::Write(error).at(new))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_gets_a_successor_that_takes_its_place() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("agent.key");
        let first = PrivateKey::generate(Algorithm::Ed25519).with_comment("prod").expect("a comment");
        first.write_new(&path).expect("written");
        first.write_public_new(&with(&path, ".pub")).expect("written");
        assert!(PrivateKey::switch_to_successor(&path).expect_err("none yet").to_string().contains("agent.key.new"));

        let (second, pair) = PrivateKey::write_successor(&path).expect("made");
        assert_eq!(second.comment(), "prod");
        assert_eq!(fs::metadata(&pair.private).expect("there").permissions().mode() & 0o777, 0o600);
        assert!(PrivateKey::write_successor(&path).is_err(), "one at a time");
        assert_eq!(PrivateKey::read(&path).expect("a key").public(), first.public(), "nothing has changed yet");

        let (new, old) = PrivateKey::switch_to_successor(&path).expect("switched");
        assert_eq!(new.public(), second.public());
        assert_eq!(PrivateKey::read(&path).expect("a key").public(), second.public());
        assert_eq!(PrivateKey::read(&old).expect("a key").public(), first.public());
        let public = |ending: &str| super::super::PublicKey::read(&with(&path, ending)).expect("a key");
        assert_eq!((public(".pub"), public(".old.pub")), (second.public(), first.public()));
        assert!(!pair.private.exists() && !pair.public.exists());

        // The key before is not overwritten: somebody has to say that it can go.
        let (third, _) = PrivateKey::write_successor(&path).expect("made");
        let error = PrivateKey::switch_to_successor(&path).expect_err("in the way").to_string();
        assert!(error.contains("agent.key.old"), "{error}");
        assert_eq!(PrivateKey::read(&path).expect("a key").public(), second.public());
        fs::remove_file(&old).expect("removed");
        // Interrupted between its steps, it goes on.
        fs::hard_link(&path, &old).expect("linked");
        PrivateKey::switch_to_successor(&path).expect("switched");
        assert_eq!(PrivateKey::read(&path).expect("a key").public(), third.public());
        assert_eq!(PrivateKey::read(&old).expect("a key").public(), second.public());
    }

    #[test]
    fn a_link_and_a_key_that_is_no_good_are_left_alone() {
        let dir = tempfile::tempdir().expect("a folder");
        let (path, link) = (dir.path().join("real"), dir.path().join("link"));
        PrivateKey::generate(Algorithm::Ed25519).write_new(&path).expect("written");
        std::os::unix::fs::symlink("real", &link).expect("linked");
        assert!(PrivateKey::write_successor(&link).is_err());
        assert!(PrivateKey::switch_to_successor(&link).is_err());
        let (_, pair) = PrivateKey::write_successor(&path).expect("made");
        fs::set_permissions(&pair.private, fs::Permissions::from_mode(0o644)).expect("permissions");
        assert!(PrivateKey::switch_to_successor(&path).is_err(), "others could read it");
        fs::write(&pair.private, "").expect("written");
        assert!(PrivateKey::switch_to_successor(&path).is_err());
        assert!(!with(&path, ".old").exists());
    }
}

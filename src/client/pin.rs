//! Which host keys a server may have.
//!
//! Promised: nothing is trusted because it was seen first; what a `known_hosts` file revokes counts for nothing, whoever
//! signed it.

use std::io;
use std::path::{Path, PathBuf};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use jiff::Timestamp;

use crate::identity::certificate::{Revocations, Trust, Use};
use crate::identity::{Certificate, Fingerprint, PublicKey};
use crate::target::Target;

/// Which host keys a server may have, and whose certificates for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    keys: Vec<Fingerprint>,
    authorities: Vec<PublicKey>,
    /// Keys that count for nothing, whoever signed them.
    revoked: Vec<Fingerprint>,
    /// The name that a certificate must have.
    host: String,
}

/// Why a `known_hosts` file does not pin a server.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The file.
    #[error("could not read the known_hosts file {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line of it.
    #[error("the known_hosts file {} is not well formed", .path.display())]
    Form {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: russh::keys::Error,
    },
    /// Nothing in it.
    #[error(
        "the known_hosts file {} has no key for {server}; compare the fingerprint that its operator gives you with what \
         `ssh-keyscan` shows, then add the line", .path.display()
    )]
    Unknown {
        /// Which.
        path: PathBuf,
        /// Whose key is missing.
        server: Target,
    },
}

impl Pin {
    /// One key, by fingerprint.
    #[must_use]
    pub fn fingerprint(fingerprint: Fingerprint) -> Self {
        Self { keys: vec![fingerprint], authorities: Vec::new(), revoked: Vec::new(), host: String::new() }
    }

    /// The keys that an OpenSSH `known_hosts` file has for the server, hashed names included, and the CAs
    /// (`@cert-authority`) whose certificates it takes, without those it revokes.
    ///
    /// # Errors
    /// If the file cannot be read or has none.
    pub fn known_hosts(path: &Path, target: &Target) -> Result<Self, PinError> {
        let text = std::fs::read_to_string(path).map_err(|source| PinError::Read { path: path.to_owned(), source })?;
        let revoked: Vec<Fingerprint> = text
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("@revoked"))
            .filter_map(|rest| {
                let mut words = rest.split_whitespace().skip(1);
                let key = format!("{} {}", words.next()?, words.next()?);
                PublicKey::parse(&key).ok().map(|key| key.fingerprint())
            })
            .collect();
        let keys = russh::keys::known_hosts::known_host_keys_path(&target.host.to_string(), target.port, path)
            .map_err(|source| PinError::Form { path: path.to_owned(), source })?;
        let pinned: Vec<Fingerprint> = keys
            .into_iter()
            .filter_map(|(_, key)| PublicKey::from_ssh(key).ok())
            .map(|key| key.fingerprint())
            .filter(|fingerprint| !revoked.contains(fingerprint))
            .collect();
        let host = target.host.to_string();
        let authorities: Vec<PublicKey> = text
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("@cert-authority"))
            .filter_map(|rest| {
                let mut words = rest.split_whitespace();
                let named = names(words.next()?, &host, target.port);
                let key = format!("{} {}", words.next()?, words.next()?);
                PublicKey::parse(&key).ok().filter(|key| named && !revoked.contains(&key.fingerprint()))
            })
            .collect();
        if pinned.is_empty() && authorities.is_empty() {
            return Err(PinError::Unknown { path: path.to_owned(), server: target.clone() });
        }
        Ok(Self { keys: pinned, authorities, revoked, host })
    }

    pub(super) fn holds(&self, key: &PublicKey) -> bool {
        self.keys.contains(&key.fingerprint())
    }

    /// Whether a certificate could do in the place of a key.
    pub(super) fn has_authorities(&self) -> bool {
        !self.authorities.is_empty()
    }

    pub(super) fn certifies(&self, certificate: &Certificate, now: Timestamp) -> bool {
        let trusted = |authority: &PublicKey| {
            let trust = Trust { authority, revocations: &Revocations::default() };
            certificate.judge(trust, Use::Host(&self.host), now).is_ok()
        };
        !self.revoked.contains(&certificate.subject().fingerprint()) && self.authorities.iter().any(trusted)
    }
}

/// Whether the patterns of a line in `known_hosts` (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT") name a host. One that is negated
/// stands against all others. A hashed name stands alone, and for itself.
fn names(patterns: &str, host: &str, port: u16) -> bool {
    let name = if port == 22 { host.to_owned() } else { format!("[{host}]:{port}") };
    let name = name.to_ascii_lowercase();
    if let Some(hashed) = patterns.strip_prefix("|1|") {
        return is_hashed(hashed, &name);
    }
    let matched = |pattern: &str| matches(pattern.to_ascii_lowercase().as_bytes(), name.as_bytes());
    let (negated, named): (Vec<_>, Vec<_>) = patterns.split(',').partition(|pattern| pattern.starts_with('!'));
    named.into_iter().any(matched) && !negated.into_iter().any(|pattern| matched(&pattern[1..]))
}

/// Whether `SALT|HASH` is the name's, as `ssh` hashes it (HMAC-SHA1 with the salt as the key): to hide whose keys are there, which
/// asks less of a hash than a signature does.
fn is_hashed(hashed: &str, name: &str) -> bool {
    let decoded = |part: &str| BASE64_STANDARD.decode(part).ok();
    let parts = hashed.split_once('|').and_then(|(salt, hash)| Some((decoded(salt)?, decoded(hash)?)));
    parts.is_some_and(|(salt, hash)| {
        let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, &salt);
        hmac::verify(&key, name.as_bytes(), &hash).is_ok()
    })
}

/// `*` stands for any characters, `?` for one. Takes at most as many steps as both lengths multiplied.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut read, mut star) = (0, 0, None);
    while read < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, read));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[read] => {
                at += 1;
                read += 1;
            }
            _ => match star {
                Some((begun, taken)) => {
                    star = Some((begun, taken + 1));
                    at = begun + 1;
                    read = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::identity::{Algorithm, PrivateKey};

    #[test]
    fn known_hosts_pin_only_what_is_listed_for_the_gateway_and_not_revoked() {
        let key = || PrivateKey::generate(Algorithm::Ed25519).public();
        let (ours, other, gone) = (key(), key(), key());
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        writeln!(file, "# a comment").expect("written");
        writeln!(file, "[gateway.example]:443 {}", ours.to_openssh()).expect("written");
        writeln!(file, "gateway.example {}", other.to_openssh()).expect("written");
        writeln!(file, "[gateway.example]:443 {}", gone.to_openssh()).expect("written");
        writeln!(file, "@revoked * {}", gone.to_openssh()).expect("written");
        let pin = Pin::known_hosts(file.path(), &"gateway.example:443".parse().expect("a target")).expect("pinned");
        assert!(pin.holds(&ours));
        assert!(!pin.holds(&other) && !pin.holds(&gone));
        let unknown = Pin::known_hosts(file.path(), &"other.example:443".parse().expect("a target"));
        assert!(matches!(unknown, Err(PinError::Unknown { .. })));
        let missing = Pin::known_hosts(Path::new("/nonexistent"), &"gateway.example:443".parse().expect("a target"));
        assert!(matches!(missing, Err(PinError::Read { .. })));
    }

    #[test]
    fn a_line_of_known_hosts_names_by_patterns() {
        for (patterns, host, port, named) in [
            ("gw.example.com", "gw.example.com", 22, true),
            ("gw.example.com", "GW.example.com", 22, true),
            ("gw.example.com", "gw.example.com", 443, false),
            ("[gw.example.com]:443", "gw.example.com", 443, true),
            ("*", "gw.example.com", 443, true),
            ("*.example.com", "gw.example.com", 22, true),
            ("*.example.com", "example.com", 22, false),
            ("*.example.com", "gw.example.org", 22, false),
            ("gw?.example.com", "gw1.example.com", 22, true),
            ("other,[*.example.com]:443", "gw.example.com", 443, true),
            ("*.example.com,!gw.example.com", "gw.example.com", 22, false),
            ("!gw.example.com", "gw.example.com", 22, false),
            ("!gw.example.com", "other.example.com", 22, false),
            ("", "gw.example.com", 22, false),
            ("|1|x|y", "gw.example.com", 22, false),
            ("*a*b*c*", "xaxbxcx", 22, true),
            ("*a*b*c*", "xaxcxbx", 22, false),
        ] {
            assert_eq!(names(patterns, host, port), named, "{patterns} {host} {port}");
        }
    }

    #[test]
    fn hashed_names_are_those_of_ssh_keygen_for_keys_and_for_cas() {
        let key = || PrivateKey::generate(Algorithm::Ed25519).public();
        let (ours, other) = (key(), key());
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("known_hosts");
        let plain = format!("[gateway.example]:443 {0}\nother.example {1}\n", ours.to_openssh(), other.to_openssh());
        std::fs::write(&path, plain).expect("written");
        let hashed = std::process::Command::new("ssh-keygen").args(["-q", "-H", "-f"]).arg(&path).output();
        assert!(hashed.expect("ssh-keygen runs").status.success());
        let hashed = std::fs::read_to_string(&path).expect("read");
        assert!(hashed.lines().count() == 2 && hashed.lines().all(|line| line.starts_with("|1|")), "{hashed}");
        // It leaves lines with a mark as they are; ssh reads hashed ones all the same.
        let marked: String = hashed.lines().map(|line| format!("@cert-authority {line}\n")).collect();
        let pin = |text: &str, target: &str| {
            std::fs::write(&path, text).expect("written");
            Pin::known_hosts(&path, &target.parse().expect("a target"))
        };
        for (target, key) in
            [("gateway.example:443", &ours), ("Gateway.Example:443", &ours), ("other.example:22", &other)]
        {
            let keys = pin(&hashed, target).expect("pinned");
            assert!(keys.holds(key) && !keys.has_authorities(), "{target}");
            let authorities = pin(&marked, target).expect("pinned");
            assert_eq!(
                (authorities.authorities.as_slice(), authorities.keys.len()),
                (&[key.clone()][..], 0),
                "{target}"
            );
        }
        for target in ["gateway.example:22", "other.example:443", "third.example:443"] {
            for text in [&hashed, &marked] {
                assert!(matches!(pin(text, target), Err(PinError::Unknown { .. })), "{target}");
            }
        }
        // Nor does what is no hash name anybody.
        let (salt, hash) =
            hashed["|1|".len()..].split_once(' ').and_then(|(both, _)| both.split_once('|')).expect("parts");
        for broken in
            [format!("{salt}|"), format!("|{hash}"), salt.to_owned(), format!("{hash}|{salt}"), "*|*".to_owned()]
        {
            assert!(!names(&format!("|1|{broken}"), "gateway.example", 443), "{broken}");
        }
    }

    #[test]
    fn a_ca_of_known_hosts_vouches_for_the_gateway_alone() {
        use crate::identity::certificate::Kind;
        use crate::identity::certificate::forge::Forge;
        let [ca, other, gone] = std::array::from_fn(|_| PrivateKey::generate(Algorithm::Ed25519));
        let file = tempfile::NamedTempFile::new().expect("a file");
        let line = |key: &PrivateKey| key.public().to_openssh();
        let text = format!(
            "@cert-authority *.example {}\n@cert-authority other.test {}\n@revoked * {}\n@cert-authority * {}\n",
            line(&ca),
            line(&other),
            line(&gone),
            line(&gone)
        );
        std::fs::write(file.path(), text).expect("written");
        let gateway = "gateway.example:22".parse().expect("a target");
        let pin = Pin::known_hosts(file.path(), &gateway).expect("pinned");
        let host = |ca: &PrivateKey| Forge { kind: Kind::Host, ..Forge::new(ca, &["gateway.example"]) };
        let good = host(&ca);
        let certifies =
            |forge: &Forge, second| pin.certifies(&forge.sign(), Timestamp::from_second(second).expect("a time"));
        assert!(certifies(&good, 1500));
        for (what, forge) in [
            ("another name", Forge { principals: vec!["other.example".to_owned()], ..good.clone() }),
            ("no name", Forge { principals: Vec::new(), ..good.clone() }),
            ("a user's", Forge { kind: Kind::User, ..good.clone() }),
            ("a CA of others", host(&other)),
            ("a CA that was revoked", host(&gone)),
            ("an unknown CA", host(&PrivateKey::generate(Algorithm::Ed25519))),
            ("a key that was revoked", Forge { subject: gone.public(), ..good.clone() }),
        ] {
            assert!(!certifies(&forge, 1500), "{what}");
        }
        assert!(!certifies(&good, 999) && !certifies(&good, 2000));
        assert!(!pin.holds(&ca.public()), "a CA's key is no host key");
    }
}

//! The OpenSSH certificate that a client shows for its key.
//!
//! Promised: one that nobody could accept, whoever is trusted there, is told before anything is dialled, with what is wrong
//! with it. Its file is read at each login, so that a certificate of a few hours can be renewed in place under a session that
//! lasts. One that nobody has asked for, and that merely lies beside the key, keeps the key from nothing when it is of no use.
//!
//! Absent: whether the CA is trusted there. Only the server knows that, and tells nobody.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use tracing::warn;

use super::Server;
use crate::chain::Chain;
use crate::identity::certificate::{CertificateError, Flaw, Use};
use crate::identity::{Certificate, Fingerprint, PrincipalId, PublicKey};

/// Where the certificate lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certified {
    path: PathBuf,
    /// Nobody has named it.
    beside: bool,
}

/// Why a certificate is of no use for a login.
#[derive(Debug, thiserror::Error)]
pub enum CertifiedError {
    /// The file.
    #[error(transparent)]
    Read(#[from] CertificateError),
    /// It is somebody else's.
    #[error("certificate file {} is for key {subject}, and yours is {key}: it serves no other key", .path.display())]
    OtherKey {
        /// Which.
        path: PathBuf,
        /// For which key.
        subject: Fingerprint,
        /// Which one we have.
        key: Fingerprint,
    },
    /// Its time is over.
    #[error("certificate file {}: it has expired{}; have it signed anew", .path.display(), moment("at", .at))]
    Expired {
        /// Which.
        path: PathBuf,
        /// When.
        at: Option<Timestamp>,
    },
    /// Its time has not begun.
    #[error("certificate file {}: it is not valid yet{}; is this machine's clock right?", .path.display(), moment("before", .at))]
    NotYet {
        /// Which.
        path: PathBuf,
        /// From when on it is.
        at: Option<Timestamp>,
    },
    /// It says something, or leaves something out, that nobody accepts there.
    #[error("certificate file {}: it {wrong}", .path.display())]
    Useless {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        wrong: &'static str,
    },
}

fn moment(word: &str, at: &Option<Timestamp>) -> String {
    at.map(|at| format!(", {word} {}", at.strftime("%Y-%m-%dT%H:%M:%SZ"))).unwrap_or_default()
}

impl Certified {
    /// The certificate in this file.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path, beside: false }
    }

    /// The one that lies beside a private key, where `ssh-keygen` puts it and `ssh` looks: `KEY-cert.pub`.
    #[must_use]
    pub fn beside(key: &Path) -> Option<Self> {
        let mut name = key.file_name()?.to_owned();
        name.push("-cert.pub");
        let path = key.with_file_name(name);
        path.is_file().then_some(Self { path, beside: true })
    }

    /// The certificate to show at a login; none, which is told, where one that lies beside the key is of no use by now.
    ///
    /// # Errors
    /// As [`read`](Self::read), if it was asked for.
    pub(super) fn show(
        &self,
        key: &PublicKey,
        server: &Server,
        now: Timestamp,
    ) -> Result<Option<Certificate>, CertifiedError> {
        match self.read(key, server, now) {
            Err(error) if self.beside => {
                warn!("passed over, and the plain key shown: {}", Chain(&error));
                Ok(None)
            }
            read => read.map(Some),
        }
    }

    /// The certificate as the file has it now, if it could let the holder of `key` in at `server`.
    ///
    /// # Errors
    /// If it could not, whichever CA is trusted there.
    pub fn read(&self, key: &PublicKey, server: &Server, now: Timestamp) -> Result<Certificate, CertifiedError> {
        let path = || self.path.clone();
        let certificate = Certificate::read(&self.path)?;
        if certificate.subject() != key {
            let (subject, key) = (certificate.subject().fingerprint(), key.fingerprint());
            return Err(CertifiedError::OtherKey { path: path(), subject, key });
        }
        let useless = |wrong| Err(CertifiedError::Useless { path: path(), wrong });
        match certificate.judge_time(now) {
            Err(Flaw::NotYetValid) => return Err(CertifiedError::NotYet { path: path(), at: certificate.begins() }),
            Err(_) => return Err(CertifiedError::Expired { path: path(), at: certificate.expires() }),
            Ok(()) => {}
        }
        let ours = matches!(server, Server::Gateway { .. });
        match certificate.judge_apart_from_trust(Use::Login(None), now) {
            Err(Flaw::Kind) => return useless("is a host's: a user's is made without `ssh-keygen -h`"),
            Err(Flaw::Principal) => return useless("names no principal (`ssh-keygen -n`), and so lets nobody in"),
            Err(Flaw::NoForwarding) => {
                return useless("does not permit port forwarding, which is all that is wanted of it");
            }
            // A stock server may meet options that we do not.
            Err(Flaw::CriticalOption) if ours => return useless("has a critical option that gateways do not meet"),
            // Where we come from is seen by the server alone.
            _ => {}
        }
        if ours && !certificate.principals().iter().any(|name| name.parse::<PrincipalId>().is_ok()) {
            return useless("names nobody who could be a principal of a registry: names of a-z, 0-9 and - are wanted");
        }
        Ok(certificate)
    }
}

/// What is to be said of a certificate that a server takes only if it is set up for that: it does not name the user.
#[must_use]
pub fn doubt(certificate: &Certificate, server: &Server) -> Option<String> {
    let Server::Bastion { user, .. } = server else { return None };
    let named = certificate.principals().iter().any(|name| *name == user.to_string());
    (!named).then(|| {
        format!(
            "the certificate is for {}, and not for {user}: only a server that maps principals to that user takes it",
            names(certificate)
        )
    })
}

/// What a certificate is called in a refusal.
pub(super) fn described(certificate: &Certificate) -> String {
    let (id, authority) = (certificate.key_id().escape_debug(), certificate.authority().fingerprint());
    format!("certificate \"{id}\" for {}, by the CA {authority}", names(certificate))
}

/// For whom it is, as far as a line has room.
fn names(certificate: &Certificate) -> String {
    let names = certificate.principals();
    let mut said: Vec<_> = names.iter().take(NAMES_SAID).map(|name| name.escape_debug().to_string()).collect();
    if names.len() > said.len() {
        said.push("…".to_owned());
    }
    said.join(", ")
}

const NAMES_SAID: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::SSH_PORT;
    use crate::identity::certificate::Kind;
    use crate::identity::certificate::forge::Forge;
    use crate::identity::{Algorithm, PrivateKey};
    use crate::target::Target;

    fn gateway() -> Server {
        Server::Gateway {
            url: "ssh://gateway.example".parse().expect("a URL"),
            agent: "acme/prod-eu".parse().expect("a name"),
        }
    }

    fn bastion(user: &str) -> Server {
        let endpoint = Target { host: "bastion.example".parse().expect("a host"), port: SSH_PORT };
        Server::Bastion { endpoint, user: user.parse().expect("a user"), principal: None }
    }

    fn read(forge: &Forge, key: &PublicKey, server: &Server) -> Result<Certificate, CertifiedError> {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("key-cert.pub");
        let line = forge.sign().as_ssh().to_openssh().expect("a line");
        std::fs::write(&path, line).expect("written");
        Certified::at(path).read(key, server, Timestamp::from_second(1500).expect("a time"))
    }

    #[test]
    fn a_certificate_that_nobody_could_accept_is_told_with_what_is_wrong() {
        let ca = PrivateKey::generate(Algorithm::Ed25519);
        let good = Forge::new(&ca, &["ci"]);
        let key = good.subject.clone();
        for server in [gateway(), bastion("ci")] {
            assert!(read(&good, &key, &server).is_ok(), "{server}");
            for (words, forge) in [
                ("it has expired, at 1970-01-01T00:25:00Z", Forge { valid_before: 1500, ..good.clone() }),
                ("not valid yet, before 1970-01-01T00:25:01Z", Forge { valid_after: 1501, ..good.clone() }),
                ("is for key SHA256:", Forge { subject: ca.public(), ..good.clone() }),
                ("is a host's", Forge { kind: Kind::Host, ..good.clone() }),
                ("names no principal", Forge { principals: Vec::new(), ..good.clone() }),
                ("port forwarding", Forge { extensions: Vec::new(), ..good.clone() }),
            ] {
                let error = read(&forge, &key, &server).expect_err(words).to_string();
                assert!(error.contains(words) && error.contains("key-cert.pub"), "{error}");
            }
        }
        // What a gateway alone refuses.
        let options = vec![("force-command".to_owned(), "/bin/true".to_owned())];
        let forced = Forge { options, ..good.clone() };
        let unknown = Forge { principals: vec!["Some Body".to_owned()], ..good.clone() };
        for (words, forge) in [("critical option", forced), ("names nobody", unknown)] {
            let error = read(&forge, &key, &gateway()).expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
            assert!(read(&forge, &key, &bastion("ci")).is_ok(), "{words}");
        }
        let missing = Certified::at("/nonexistent".into()).read(&key, &gateway(), Timestamp::UNIX_EPOCH);
        assert!(matches!(missing, Err(CertifiedError::Read(_))));
    }

    #[test]
    fn a_certificate_for_another_user_is_doubted_and_only_of_a_bastion() {
        let certificate = Forge::new(&PrivateKey::generate(Algorithm::Ed25519), &["alice", "bob"]).sign();
        assert_eq!(doubt(&certificate, &bastion("bob")), None);
        assert_eq!(doubt(&certificate, &gateway()), None);
        let said = doubt(&certificate, &bastion("carol")).expect("a doubt");
        assert!(said.contains("is for alice, bob, and not for carol"), "{said}");
    }

    #[test]
    fn the_certificate_beside_a_key_is_where_ssh_looks() {
        let dir = tempfile::tempdir().expect("a folder");
        let key = dir.path().join("id_ed25519");
        assert_eq!(Certified::beside(&key), None);
        let path = dir.path().join("id_ed25519-cert.pub");
        std::fs::write(&path, "").expect("written");
        assert_eq!(Certified::beside(&key), Some(Certified { path, beside: true }));
    }

    #[test]
    fn a_certificate_that_only_lies_beside_the_key_does_not_keep_it_from_being_shown() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("key-cert.pub");
        let forge = Forge::new(&PrivateKey::generate(Algorithm::Ed25519), &["ci"]);
        std::fs::write(&path, forge.sign().as_ssh().to_openssh().expect("a line")).expect("written");
        let (beside, given) = (Certified::beside(&dir.path().join("key")).expect("found"), Certified::at(path.clone()));
        let show = |certified: &Certified, second| {
            certified.show(&forge.subject, &gateway(), Timestamp::from_second(second).expect("a time"))
        };
        for certified in [&beside, &given] {
            assert!(matches!(show(certified, 1500), Ok(Some(_))), "{certified:?}");
        }
        let late = i64::try_from(forge.valid_before).expect("a time");
        assert!(matches!(show(&beside, late), Ok(None)));
        assert!(matches!(show(&given, late), Err(CertifiedError::Expired { .. })));
        std::fs::remove_file(path).expect("removed");
        assert!(matches!(show(&beside, 1500), Ok(None)));
        assert!(matches!(show(&given, 1500), Err(CertifiedError::Read(_))));
    }
}

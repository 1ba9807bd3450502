//! Heads of a trail: what is signed of it at intervals, and what another place keeps of that.
//!
//! Promised: a signing key of a trail signs the two bodies of this module and nothing else, both of a fixed length and
//! beginning, and nobody else has a say in what stands in them but for the 32 bytes of an anchor. They are frozen by tests.
//!
//! A **head** says that a record had this digest when it was the last one, and so, by the [chain](super::chain), what all records
//! before it are:
//!
//! ```text
//! "caponier audit head 1\n" ‖ trail id (16 bytes) ‖ seq (u64) ‖ SHA-256 of that record's line (32 bytes) ‖ Unix ms (u64)
//! ```
//!
//! An **anchor** is the SHA-256 of a head. That is what crosses a link: it tells the other side neither how many records there
//! are nor of whom, and holds the trail to this head all the same. A **countersignature** says that somebody has seen an anchor:
//!
//! ```text
//! "caponier audit anchor 1\n" ‖ anchor (32 bytes) ‖ Unix ms (u64)
//! ```
//!
//! Numbers are big-endian. Signatures are OpenSSH's (PROTOCOL.sshsig) in the namespace [`NAMESPACE`], by Ed25519 keys, in base64
//! with padding; `ssh-keygen -Y verify` takes them.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

use super::chain::{Link, TrailId};
use crate::identity::signature::{Signature, SignatureError};
use crate::identity::{Fingerprint, PrivateKey};

/// What signatures of a trail are for, so that none of them counts anywhere else.
pub const NAMESPACE: &str = "audit@caponier";

/// Bytes of a head.
pub const HEAD_LEN: usize = HEAD_MARK.len() + 16 + 8 + 32 + 8;

/// Bytes of what a countersignature is over.
pub const COUNTERSIGNED_LEN: usize = ANCHOR_MARK.len() + 32 + 8;

/// The state of a trail at one of its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Which trail.
    pub trail: TrailId,
    /// The number of the record that was the last one.
    pub seq: u64,
    /// The digest of its line.
    pub record: Link,
    /// When: Unix time in milliseconds. The record that holds the head says the same in its `time`.
    pub time_ms: u64,
}

impl Head {
    /// What is signed.
    #[must_use]
    pub fn body(&self) -> [u8; HEAD_LEN] {
        joined([
            HEAD_MARK,
            self.trail.as_bytes(),
            &self.seq.to_be_bytes(),
            self.record.as_bytes(),
            &self.time_ms.to_be_bytes(),
        ])
    }

    /// What another place may know of it.
    #[must_use]
    pub fn anchor(&self) -> Anchor {
        Anchor(*Link::of(&self.body()).as_bytes())
    }
}

/// The SHA-256 of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Anchor([u8; 32]);

impl Anchor {
    /// Reads 43 characters of base64url without padding; `None` of anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Link::parse(text.as_bytes()).map(|link| Self(*link.as_bytes()))
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Anchor {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

/// That somebody has seen an anchor, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Countersigned {
    /// What was seen.
    pub anchor: Anchor,
    /// When: Unix time in milliseconds.
    pub time_ms: u64,
}

impl Countersigned {
    /// What is signed.
    #[must_use]
    pub fn body(&self) -> [u8; COUNTERSIGNED_LEN] {
        joined([ANCHOR_MARK, self.anchor.as_bytes(), &self.time_ms.to_be_bytes()])
    }
}

/// The key that a trail is signed with.
#[derive(Debug, Clone)]
pub struct Signer {
    key: PrivateKey,
    fingerprint: Fingerprint,
}

/// Why a key cannot sign a trail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is a key of the kind {0}: a trail is signed with an Ed25519 key; make one with `caponier keys generate`")]
pub struct KindError(&'static str);

impl Signer {
    /// A signer with this key, which is to be used for nothing else.
    ///
    /// # Errors
    /// If it is not an Ed25519 key.
    pub fn new(key: PrivateKey) -> Result<Self, KindError> {
        let public = key.public();
        if public.ed25519().is_none() {
            return Err(KindError(public.algorithm()));
        }
        Ok(Self { fingerprint: public.fingerprint(), key })
    }

    /// The key's fingerprint.
    #[must_use]
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Signs a head.
    ///
    /// # Errors
    /// If the key cannot sign.
    pub fn sign(&self, head: &Head) -> Result<Seal, SignatureError> {
        self.seal(&head.body())
    }

    /// Signs that an anchor was seen.
    ///
    /// # Errors
    /// If the key cannot sign.
    pub fn countersign(&self, seen: &Countersigned) -> Result<Seal, SignatureError> {
        self.seal(&seen.body())
    }

    fn seal(&self, body: &[u8]) -> Result<Seal, SignatureError> {
        let signature = Signature::make(&self.key, NAMESPACE, body)?.to_bytes()?;
        Ok(Seal { key: self.fingerprint, signature: STANDARD.encode(signature) })
    }
}

/// A signature as records and messages hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// Whose.
    pub key: Fingerprint,
    /// The signature, in base64.
    pub signature: String,
}

/// Why a signature does not count.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// No signature, or longer than any.
    #[error("is not a signature in base64")]
    Encoding,
    /// Of another kind of key than trails are signed with.
    #[error("is made with another kind of key than Ed25519")]
    Kind,
    /// By another key than the record says.
    #[error("is made with another key than the record names")]
    OtherKey,
    /// Not one of this by its key.
    #[error("does not hold")]
    Signature(#[source] SignatureError),
}

/// Whether `signature` is one of `head` by the key that is called `key`. Whose that is, is for the caller to ask.
///
/// # Errors
/// If it is not.
pub fn verify_head(head: &Head, key: &str, signature: &str) -> Result<Fingerprint, SealError> {
    verify(&head.body(), key, signature)
}

/// Whether `signature` is one of `seen` by the key that is called `key`. Whose that is, is for the caller to ask.
///
/// # Errors
/// If it is not.
pub fn verify_countersigned(seen: &Countersigned, key: &str, signature: &str) -> Result<Fingerprint, SealError> {
    verify(&seen.body(), key, signature)
}

fn verify(body: &[u8], key: &str, signature: &str) -> Result<Fingerprint, SealError> {
    if signature.len() > SIGNATURE_TEXT_MAX {
        return Err(SealError::Encoding);
    }
    let bytes = STANDARD.decode(signature).map_err(|_| SealError::Encoding)?;
    let signature = Signature::read(&bytes).map_err(SealError::Signature)?;
    if signature.key().ed25519().is_none() {
        return Err(SealError::Kind);
    }
    let fingerprint = signature.key().fingerprint();
    if fingerprint.to_string() != key {
        return Err(SealError::OtherKey);
    }
    signature.verify(NAMESPACE, body).map_err(SealError::Signature)?;
    Ok(fingerprint)
}

fn joined<const PARTS: usize, const LEN: usize>(parts: [&[u8]; PARTS]) -> [u8; LEN] {
    let mut body = [0; LEN];
    let mut at = 0;
    for part in parts {
        body[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    debug_assert_eq!(at, LEN, "every byte is given");
    body
}

const HEAD_MARK: &[u8] = b"caponier audit head 1\n";
const ANCHOR_MARK: &[u8] = b"caponier audit anchor 1\n";

/// The longest signature in base64 that is looked at: one by an Ed25519 key in this namespace has 232 characters.
pub const SIGNATURE_TEXT_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::identity::Algorithm;

    fn head() -> Head {
        Head {
            trail: TrailId::parse("000102030405060708090a0b0c0d0e0f").expect("an id"),
            seq: 0x0102_0304_0506_0708,
            record: Link::of(b"x"),
            time_ms: 1_790_000_000_123,
        }
    }

    fn seen() -> Countersigned {
        Countersigned { anchor: head().anchor(), time_ms: 1_790_000_000_456 }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_bodies_are_frozen() {
        let digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881";
        assert_eq!(
            hex(&head().body()),
            format!(
                "{}000102030405060708090a0b0c0d0e0f0102030405060708{digest}000001a0c4506c7b",
                hex(b"caponier audit head 1\n")
            )
        );
        assert_eq!((HEAD_LEN, COUNTERSIGNED_LEN), (86, 64));
        let anchor = head().anchor();
        assert_eq!(anchor.to_string(), Link::of(&head().body()).to_string());
        assert_eq!(Anchor::parse(&anchor.to_string()), Some(anchor));
        let body =
            [b"caponier audit anchor 1\n", &anchor.as_bytes()[..], &1_790_000_000_456_u64.to_be_bytes()].concat();
        assert_eq!(seen().body()[..], body);
    }

    #[test]
    fn a_signature_counts_for_what_it_was_made_for_and_nothing_else() {
        let signer = Signer::new(PrivateKey::generate(Algorithm::Ed25519)).expect("a signer");
        let key = signer.fingerprint().to_string();
        let seal = signer.sign(&head()).expect("signed");
        assert!(seal.signature.len() <= SIGNATURE_TEXT_MAX);
        assert_eq!(verify_head(&head(), &key, &seal.signature).expect("it holds"), *signer.fingerprint());
        let wrong = |head: Head| verify_head(&head, &key, &seal.signature);
        assert!(matches!(wrong(Head { seq: 1, ..head() }), Err(SealError::Signature(SignatureError::Wrong))));
        assert!(matches!(wrong(Head { time_ms: 1, ..head() }), Err(SealError::Signature(SignatureError::Wrong))));
        assert!(matches!(wrong(Head { record: Link::of(b"y"), ..head() }), Err(SealError::Signature(_))));
        assert!(matches!(verify_head(&head(), "SHA256:other", &seal.signature), Err(SealError::OtherKey)));
        assert!(matches!(verify_head(&head(), &key, "?"), Err(SealError::Encoding)));
        assert!(matches!(verify_head(&head(), &key, &"A".repeat(1024)), Err(SealError::Encoding)));
        let countersigned = signer.countersign(&seen()).expect("signed");
        assert!(verify_countersigned(&seen(), &key, &countersigned.signature).is_ok());
        assert!(verify_head(&head(), &key, &countersigned.signature).is_err());
        assert!(verify_countersigned(&seen(), &key, &seal.signature).is_err());
        let other = Countersigned { time_ms: 1, ..seen() };
        assert!(verify_countersigned(&other, &key, &countersigned.signature).is_err());
        // Made by the right key for another purpose.
        let bytes =
            Signature::make(&signer.key, "file", &head().body()).and_then(|made| made.to_bytes()).expect("made");
        assert!(matches!(
            verify_head(&head(), &key, &STANDARD.encode(bytes)),
            Err(SealError::Signature(SignatureError::Namespace(_)))
        ));
    }

    #[test]
    fn only_ed25519_keys_sign() {
        let key = PrivateKey::generate(Algorithm::Rsa4096);
        assert_eq!(Signer::new(key.clone()).expect_err("RSA"), KindError("ssh-rsa"));
        let bytes = Signature::make(&key, NAMESPACE, &head().body()).and_then(|made| made.to_bytes()).expect("made");
        let key = key.public().fingerprint().to_string();
        let verified = verify_head(&head(), &key, &STANDARD.encode(bytes));
        assert!(matches!(verified, Err(SealError::Encoding | SealError::Kind)), "{verified:?}");
    }

    #[test]
    fn stock_openssh_takes_a_heads_signature() {
        let dir = tempfile::tempdir().expect("a directory");
        let key = PrivateKey::generate(Algorithm::Ed25519);
        let signer = Signer::new(key.clone()).expect("a signer");
        let seal = signer.sign(&head()).expect("signed");
        let armour = format!("-----BEGIN SSH SIGNATURE-----\n{}\n-----END SSH SIGNATURE-----\n", seal.signature);
        let (signature, signers) = (dir.path().join("head.sig"), dir.path().join("signers"));
        std::fs::write(&signature, armour).expect("written");
        std::fs::write(&signers, format!("trail {}\n", key.public().to_openssh())).expect("written");
        let run = |arguments: &[&str], text: &[u8]| {
            let mut child = Command::new("ssh-keygen")
                .args(["-Y"])
                .args(arguments)
                .args(["-n", NAMESPACE, "-s"])
                .arg(&signature)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("ssh-keygen runs");
            std::io::Write::write_all(&mut child.stdin.take().expect("its input"), text).expect("given");
            child.wait().expect("it ends").success()
        };
        let signers = signers.to_str().expect("UTF-8");
        let body = head().body();
        assert!(run(&["check-novalidate"], &body));
        assert!(run(&["verify", "-I", "trail", "-f", signers], &body));
        let other = Head { seq: 1, ..head() }.body();
        assert!(!run(&["verify", "-I", "trail", "-f", signers], &other));
    }
}

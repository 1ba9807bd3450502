//! Public and private keys: reading, judging, making, writing.
//!
//! Promised: a [`PublicKey`] or [`PrivateKey`] that exists is of a kind and strength that we accept, whichever way it
//! came in: Ed25519, ECDSA on P-256, P-384 or P-521, RSA from 3,072 to 8,192 bits, and as public keys also the two kinds
//! that security tokens hold. Two public keys are equal where their key material is; comments do not count. A private
//! key was checked to fit its public half, and its file to be readable by its owner only.
//!
//! What the bytes are decides, not what the PEM label says: tools exist that write PKCS#8 under `RSA PRIVATE KEY` and
//! SPKI under `RSA PUBLIC KEY`. `text` takes texts apart, `der` tells ASN.1 structures from each other.
//!
//! Absent: passphrases (an agent starts unattended; use the file system's or a secret store's protection), certificates,
//! which are no keys ([`super::certificate`]), and PuTTY's format.

mod der;
mod successor;
mod text;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh::keys::signature::{Signer, Verifier};
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData, RsaKeypair};
use russh::keys::ssh_key::public::{EcdsaPublicKey, KeyData};
use russh::keys::ssh_key::{LineEnding, Mpint, Signature, rand_core};
use russh::keys::{EcdsaCurve, HashAlg};
use zeroize::Zeroizing;

use self::der::Shape;
pub(super) use self::text::unquoted;
use self::text::{Block, Contents};
use super::Fingerprint;
use crate::limits::FILE_MAX;
use crate::secret::{self, Secret, random};

/// The wire form of the one OpenSSH certificate that a file holds, still to be decoded.
pub(super) fn read_certificate(path: &Path) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    open(path).and_then(|file| contents(&file)).and_then(|text| certificate_blob(&text)).map_err(|fault| fault.at(path))
}

/// As [`read_certificate`], from text.
pub(super) fn certificate_blob(text: &str) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    match text::read(text)? {
        Contents::Line(line) if line.kind.contains("-cert-v01@") => line.blob(),
        Contents::Line(_) => Err(KeyError::Form("it is a plain key; a CA makes a certificate of it (`ssh-keygen -s`)")),
        Contents::Block(_) => Err(KeyError::Form("it is PEM, and certificates of SSH are one line")),
    }
}

/// What kind of key to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// Ed25519.
    Ed25519,
    /// RSA with 4,096 bits.
    Rsa4096,
}

/// Why a key is not accepted. Each text but that of [`KeyError::File`] completes "this …"; none repeats key material.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The key is in this file; the source says what is wrong with it.
    #[error("key file {}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        fault: Box<KeyError>,
    },
    /// The operating system refused to give the file's contents.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// The operating system refused to take the key.
    #[error("cannot be written")]
    Write(#[source] io::Error),
    /// The file to be made is there already.
    #[error("is there already, and keys are never overwritten: choose another name, or move the old key away first")]
    Exists,
    /// A directory, a pipe, a device.
    #[error("is not a regular file")]
    NotAFile,
    /// A link, where the key itself is to be replaced.
    #[error("is a symbolic link: whatever keeps the key (a secret store, Kubernetes) has to put the new one there")]
    Link,
    /// Nothing in it.
    #[error("is empty")]
    Empty,
    /// More than [`FILE_MAX`] bytes.
    #[error("is larger than {FILE_MAX} bytes, so it cannot be a key")]
    TooLarge,
    /// A private key that others than its owner may read or write.
    #[error("is a private key that others can read (mode {mode:04o}): run `chmod 600 {}`", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// No form of key that we know.
    #[error("is not a key in a form that is read here: {0}")]
    Form(&'static str),
    /// The form was recognised, and what is in it is broken.
    #[error("looks like {what} but is damaged or incomplete ({detail}): copy it again from its source")]
    Damaged {
        /// Which form.
        what: &'static str,
        /// What was found broken, without contents.
        detail: String,
    },
    /// A private key where a public one belongs.
    #[error(
        "is a private key where a public key belongs: give the public half (`caponier keys fingerprint` tells which it \
         is, `ssh-keygen -y -f FILE` prints it), and make a new pair if others could read this place"
    )]
    Private,
    /// A public key where a private one belongs.
    #[error("is a public key where a private key belongs: name the file without `.pub`")]
    Public,
    /// An OpenSSH or X.509 certificate.
    #[error("is {0}, and certificates are not accepted: give the plain key")]
    Certificate(&'static str),
    /// A private key under a passphrase.
    #[error(
        "is an encrypted private key, and nobody is there to type its passphrase: store it without one, readable by its \
         owner only (`ssh-keygen -p -N ''` for OpenSSH's form, `openssl pkey` for PEM)"
    )]
    Encrypted,
    /// More than one key.
    #[error("holds more than one key or PEM section ({0}): put each key into a file of its own")]
    Several(String),
    /// A kind that is not accepted.
    #[error(
        "is a key of the kind {0}, which is not accepted: use Ed25519 (`caponier keys generate`), RSA of {RSA_BITS_MIN} \
         bits or more, or ECDSA on P-256, P-384 or P-521"
    )]
    Algorithm(String),
    /// An RSA key outside of the accepted sizes.
    #[error(
        "is an RSA key of {0} bits; {RSA_BITS_MIN} to {RSA_BITS_MAX} are accepted: make a new one \
         (`caponier keys generate --algorithm rsa-4096`)"
    )]
    RsaSize(u32),
    /// Key material that no honest generator makes.
    #[error("is an unsound key ({0}): make a new one")]
    Unsound(&'static str),
    /// A comment that cannot be stored.
    #[error("has a comment that is longer than {COMMENT_MAX} bytes or holds control characters")]
    Comment,
    /// Not a fingerprint.
    #[error("is not a fingerprint: expected `SHA256:` and 43 characters of base64, as `ssh-keygen -l` prints it")]
    Fingerprint,
}

impl KeyError {
    fn at(self, path: &Path) -> Self {
        Self::File { path: path.to_owned(), fault: Box::new(self) }
    }
}

/// A public key of an accepted kind and strength.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PublicKey(russh::keys::PublicKey);

impl PublicKey {
    /// Reads the one public key of a file: an OpenSSH line (RFC 4253 §6.6 in base64; comment lines are skipped), or PEM
    /// with SPKI (RFC 5280 §4.1.2.7) or a PKCS#1 `RSAPublicKey` (RFC 8017 §A.1.1).
    ///
    /// # Errors
    /// [`KeyError::File`], which names the file and says what it seems to hold instead.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        open(path).and_then(|file| contents(&file)).and_then(|text| Self::parse(&text)).map_err(|fault| fault.at(path))
    }

    /// As [`PublicKey::read`], from text.
    ///
    /// # Errors
    /// If the text is not exactly one public key that is accepted.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let block = match text::read(text)? {
            Contents::Line(line) => return Self::from_blob(line.kind, &line.blob()?),
            Contents::Block(block) => block,
        };
        if let Some(kind) = block.certificate() {
            return Err(KeyError::Certificate(kind));
        }
        if block.is_private() {
            return Err(KeyError::Private);
        }
        if !matches!(block.label, "PUBLIC KEY" | "RSA PUBLIC KEY") {
            return Err(KeyError::Form("its PEM section is neither a `PUBLIC KEY` nor an `RSA PUBLIC KEY`"));
        }
        let der = block.der()?;
        let key = match der::shape(&der) {
            Shape::Spki => der::read_spki(&der)?,
            Shape::RsaPublic => KeyData::Rsa(der::read_rsa_public(&der)?),
            Shape::Certificate => return Err(KeyError::Certificate("an X.509 certificate")),
            Shape::Pkcs8 | Shape::Pkcs8Encrypted | Shape::RsaPrivate | Shape::DsaPrivate | Shape::Sec1 => {
                return Err(KeyError::Private);
            }
            Shape::Sec1Explicit | Shape::Other => {
                return Err(KeyError::Damaged {
                    what: "a public key in PEM",
                    detail: "it is neither SPKI nor PKCS#1".into(),
                });
            }
        };
        Self::from_data(key)
    }

    /// Takes a key that came over SSH, if its kind and strength are accepted.
    ///
    /// # Errors
    /// If they are not, or if it is a certificate.
    pub fn from_ssh(key: russh::keys::PublicKey) -> Result<Self, KeyError> {
        Self::from_data(key.into())
    }

    /// The key, for the SSH library. It carries no comment.
    #[must_use]
    pub fn as_ssh(&self) -> &russh::keys::PublicKey {
        &self.0
    }

    /// What identifies the key here and in OpenSSH: the SHA-256 of its SSH wire form.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(sha256(&self.blob()))
    }

    /// The SHA-256 of the key's SPKI in DER, in lower-case hex: what `openssl pkey -pubin -outform DER | sha256sum`
    /// prints. None for the kinds that X.509 does not know (keys of security tokens).
    #[must_use]
    pub fn spki_fingerprint(&self) -> Option<String> {
        let spki = der::write_spki(self.0.key_data())?;
        Some(sha256(&spki).iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The kind as SSH names it: `ssh-ed25519`, `ssh-rsa`, `ecdsa-sha2-nistp256`…
    #[must_use]
    pub fn algorithm(&self) -> &'static str {
        match self.0.key_data() {
            KeyData::Ed25519(_) => "ssh-ed25519",
            KeyData::Rsa(_) => "ssh-rsa",
            KeyData::Ecdsa(key) => match key.curve() {
                EcdsaCurve::NistP256 => "ecdsa-sha2-nistp256",
                EcdsaCurve::NistP384 => "ecdsa-sha2-nistp384",
                EcdsaCurve::NistP521 => "ecdsa-sha2-nistp521",
            },
            KeyData::SkEd25519(_) => "sk-ssh-ed25519@openssh.com",
            KeyData::SkEcdsaSha2NistP256(_) => "sk-ecdsa-sha2-nistp256@openssh.com",
            // `judge` lets no other kind in.
            _ => "unknown",
        }
    }

    /// The key's size in bits, as `ssh-keygen -l` counts it.
    #[must_use]
    pub fn bits(&self) -> u32 {
        match self.0.key_data() {
            KeyData::Rsa(key) => bits(key.n()),
            KeyData::Ecdsa(key) => match key.curve() {
                EcdsaCurve::NistP256 => 256,
                EcdsaCurve::NistP384 => 384,
                EcdsaCurve::NistP521 => 521,
            },
            _ => 256,
        }
    }

    /// The 32 bytes of an Ed25519 key (RFC 8032 §5.1.5); none for other kinds.
    #[must_use]
    pub fn ed25519(&self) -> Option<[u8; 32]> {
        match self.0.key_data() {
            KeyData::Ed25519(key) => Some(key.0),
            _ => None,
        }
    }

    /// The OpenSSH line, without a comment and without a line end.
    #[must_use]
    #[expect(clippy::expect_used, reason = "encoding into memory fails only for lengths that no accepted key has")]
    pub fn to_openssh(&self) -> String {
        self.0.to_openssh().expect("an accepted key has an OpenSSH form").trim_end().to_owned()
    }

    fn from_blob(kind: &str, blob: &[u8]) -> Result<Self, KeyError> {
        const WHAT: &str = "an OpenSSH public key";
        if kind.contains("-cert-v0") {
            return Err(KeyError::Certificate("an OpenSSH certificate"));
        }
        // Looked at before the library decodes it: that recurses without a bound into certificates within certificates.
        let named = blob.get(4..4 + kind.len()).is_some_and(|name| name == kind.as_bytes())
            && blob.get(..4).is_some_and(|len| len == (kind.len() as u32).to_be_bytes());
        if !named {
            let detail = "its text and its contents name different kinds of key".into();
            return Err(KeyError::Damaged { what: WHAT, detail });
        }
        match russh::keys::PublicKey::from_bytes(blob) {
            Ok(key) => Self::from_ssh(key),
            Err(russh::keys::ssh_key::Error::AlgorithmUnknown) => Err(KeyError::Algorithm(text::printable(kind))),
            Err(error) => Err(KeyError::Damaged { what: WHAT, detail: unquoted(&error) }),
        }
    }

    fn from_data(key: KeyData) -> Result<Self, KeyError> {
        judge(&key)?;
        Ok(Self(key.into()))
    }

    #[expect(clippy::expect_used, reason = "encoding into memory fails only for lengths that no accepted key has")]
    fn blob(&self) -> Vec<u8> {
        self.0.to_bytes().expect("an accepted key has a wire form")
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({} {})", self.algorithm(), self.fingerprint())
    }
}

/// A private key of an accepted kind and strength, which fits its public half. Clones share it.
#[derive(Clone)]
pub struct PrivateKey(Arc<russh::keys::PrivateKey>);

impl PrivateKey {
    /// Makes a key from the operating system's randomness, without a comment. RSA takes seconds.
    ///
    /// # Panics
    /// If the operating system has no randomness to give.
    #[must_use]
    #[expect(clippy::expect_used, reason = "generation fails only for sizes and randomness that do not occur")]
    pub fn generate(algorithm: Algorithm) -> Self {
        let pair = match algorithm {
            Algorithm::Ed25519 => KeypairData::Ed25519(Ed25519Keypair::from_seed(&Zeroizing::new(random::<32>()))),
            Algorithm::Rsa4096 => {
                KeypairData::Rsa(RsaKeypair::random(&mut SystemRandom, 4096).expect("4096 bits are a valid RSA size"))
            }
        };
        Self(Arc::new(russh::keys::PrivateKey::new(pair, "").expect("a fresh key is not encrypted")))
    }

    /// The same key with a comment, which both of its files will carry.
    ///
    /// # Errors
    /// [`KeyError::Comment`].
    pub fn with_comment(&self, comment: &str) -> Result<Self, KeyError> {
        if comment.len() > COMMENT_MAX || comment.chars().any(char::is_control) {
            return Err(KeyError::Comment);
        }
        let mut key = russh::keys::PrivateKey::clone(&self.0);
        key.set_comment(comment);
        Ok(Self(Arc::new(key)))
    }

    /// Reads the one private key of a file: OpenSSH's form, PKCS#8 (RFC 5958), PKCS#1 (RFC 8017 §A.1.2) or SEC1
    /// (RFC 5915), none of them encrypted.
    ///
    /// # Errors
    /// [`KeyError::File`], which names the file and says what is wrong, also where others than the owner have access.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let read = || {
            let file = open(path)?;
            // A public key named by mistake is told to be one, rather than that its mode is wrong.
            let text = contents(&file)?;
            let key = Self::parse(&text);
            if matches!(key, Err(KeyError::Public | KeyError::Certificate(_))) {
                return key;
            }
            let metadata = file.metadata().map_err(KeyError::Read)?;
            if !secret::is_private(&metadata) {
                return Err(KeyError::Exposed { path: path.to_owned(), mode: metadata.mode() & 0o7777 });
            }
            key
        };
        read().map_err(|fault| fault.at(path))
    }

    /// As [`PrivateKey::read`], from text.
    ///
    /// # Errors
    /// If the text is not exactly one private key that is accepted.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let block = match text::read(text)? {
            Contents::Line(line) if line.kind.contains("-cert-v0") => {
                return Err(KeyError::Certificate("an OpenSSH certificate"));
            }
            Contents::Line(_) => return Err(KeyError::Public),
            Contents::Block(block) => block,
        };
        if let Some(kind) = block.certificate() {
            return Err(KeyError::Certificate(kind));
        }
        if matches!(block.label, "PUBLIC KEY" | "RSA PUBLIC KEY" | "SSH2 PUBLIC KEY") {
            return Err(KeyError::Public);
        }
        if !block.is_private() {
            return Err(KeyError::Form("its PEM section is not a `PRIVATE KEY` of any kind"));
        }
        if block.is_encrypted() {
            return Err(KeyError::Encrypted);
        }
        Self::from_bytes(&block)
    }

    /// The public half, without a comment.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.public_key().key_data().clone().into())
    }

    /// The comment that the key was stored or made with; empty where there is none.
    #[must_use]
    pub fn comment(&self) -> String {
        self.0.comment().as_str_lossy().to_owned()
    }

    /// The seed of an Ed25519 key (RFC 8032 §5.1.5); none for other kinds.
    #[must_use]
    pub fn ed25519_seed(&self) -> Option<Secret<[u8; 32]>> {
        match self.0.key_data() {
            KeypairData::Ed25519(pair) => Some(Secret::new(pair.private.to_bytes())),
            _ => None,
        }
    }

    /// The key, for the SSH library.
    #[must_use]
    pub fn as_ssh(&self) -> &Arc<russh::keys::PrivateKey> {
        &self.0
    }

    /// OpenSSH's form of the private key, with a line end.
    #[must_use]
    #[expect(clippy::expect_used, reason = "encoding into memory fails only for lengths that no accepted key has")]
    pub fn to_openssh(&self) -> Secret<String> {
        let text = self.0.to_openssh(LineEnding::LF).expect("an accepted key has an OpenSSH form");
        Secret::new(text.as_str().to_owned())
    }

    /// Writes the key to a new file in OpenSSH's form, mode 0600, on disk when this returns. What was begun and could not
    /// be finished is removed.
    ///
    /// # Errors
    /// [`KeyError::File`]: the file exists, or the file system refuses.
    pub fn write_new(&self, path: &Path) -> Result<(), KeyError> {
        write_new(path, 0o600, self.to_openssh().expose().as_bytes())
    }

    /// Writes the public half to a new file as an OpenSSH line with the key's comment, mode 0644.
    ///
    /// # Errors
    /// As [`PrivateKey::write_new`].
    pub fn write_public_new(&self, path: &Path) -> Result<(), KeyError> {
        let line = format!("{} {}", self.public().to_openssh(), self.comment());
        write_new(path, 0o644, format!("{}\n", line.trim_end()).as_bytes())
    }

    fn from_bytes(block: &Block<'_>) -> Result<Self, KeyError> {
        let bytes = block.der()?;
        if bytes.starts_with(OPENSSH_MAGIC) {
            // The library recurses without a bound into certificates within certificates.
            if bytes.windows(CERTIFICATE_MARK.len()).filter(|window| *window == CERTIFICATE_MARK).count() > 2 {
                return Err(KeyError::Certificate("an OpenSSH certificate"));
            }
            return Self::from_library(russh::keys::decode_openssh(&bytes, None), "a private key in OpenSSH's form");
        }
        match der::shape(&bytes) {
            // The library decodes by label and reads PEM only; rewriting it puts the bytes under the label they should have.
            Shape::Pkcs8 | Shape::Sec1 => {
                let pem = block.relabelled("PRIVATE KEY");
                Self::from_library(russh::keys::decode_secret_key(&pem, None), "a private key in PEM")
            }
            Shape::RsaPrivate => {
                let pem = block.relabelled("RSA PRIVATE KEY");
                Self::from_library(russh::keys::decode_secret_key(&pem, None), "an RSA private key in PEM")
            }
            Shape::DsaPrivate => Err(KeyError::Algorithm("ssh-dss".into())),
            Shape::Sec1Explicit => Err(KeyError::Algorithm("ECDSA with explicit curve parameters".into())),
            Shape::Pkcs8Encrypted => Err(KeyError::Encrypted),
            Shape::Spki | Shape::RsaPublic => Err(KeyError::Public),
            Shape::Certificate => Err(KeyError::Certificate("an X.509 certificate")),
            Shape::Other => Err(KeyError::Damaged {
                what: "a private key in PEM",
                detail: "it is none of OpenSSH's form, PKCS#8, PKCS#1 and SEC1".into(),
            }),
        }
    }

    fn from_library(
        decoded: Result<russh::keys::PrivateKey, russh::keys::Error>,
        what: &'static str,
    ) -> Result<Self, KeyError> {
        use russh::keys::Error;
        let key = match decoded {
            Ok(key) => key,
            Err(Error::KeyIsEncrypted) => return Err(KeyError::Encrypted),
            Err(Error::UnknownAlgorithm(oid)) => {
                return Err(KeyError::Algorithm(der::name(&oid.to_string())));
            }
            Err(error) => return Err(KeyError::Damaged { what, detail: unquoted(&error) }),
        };
        judge(key.public_key().key_data())?;
        match key.key_data() {
            KeypairData::Ed25519(_) | KeypairData::Ecdsa(_) => {}
            KeypairData::Rsa(pair) => {
                let (p, q) = (pair.private().p(), pair.private().q());
                if !odd(p) || !odd(q) || !odd(pair.private().d()) {
                    return Err(KeyError::Unsound("its private numbers cannot belong to an RSA key"));
                }
            }
            _ => return Err(KeyError::Algorithm(format!("{} as a private key", key.algorithm().as_str()))),
        }
        // The forms store both halves and the library trusts them to fit; one signature shows it before any peer sees it.
        let fits = key
            .key_data()
            .try_sign(PROBE)
            .and_then(|signature: Signature| key.public_key().key_data().verify(PROBE, &signature))
            .is_ok();
        if !fits {
            return Err(KeyError::Unsound("its private and public halves do not fit"));
        }
        Ok(Self(Arc::new(key)))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey([hidden])")
    }
}

/// Writes a digest as OpenSSH does: `SHA256:` and base64 without padding.
#[must_use]
pub fn fingerprint_text(digest: &[u8; 32]) -> String {
    russh::keys::ssh_key::Fingerprint::Sha256(*digest).to_string()
}

/// Reads what [`fingerprint_text`] writes, and nothing else.
///
/// # Errors
/// [`KeyError::Fingerprint`].
pub fn parse_fingerprint(text: &str) -> Result<[u8; 32], KeyError> {
    let parsed = text.parse::<russh::keys::ssh_key::Fingerprint>().ok().and_then(|fingerprint| fingerprint.sha256());
    // One digest has one spelling, so that fingerprints can be compared as text.
    parsed.filter(|digest| fingerprint_text(digest) == text).ok_or(KeyError::Fingerprint)
}

/// Whether kind and strength are accepted: the one place that says so.
fn judge(key: &KeyData) -> Result<(), KeyError> {
    match key {
        // An agent or gateway verifies with what the file says, and small-order points verify almost anything.
        KeyData::Ed25519(key) if SMALL_ORDER.contains(&masked(key.0)) => {
            Err(KeyError::Unsound("a point of small order"))
        }
        KeyData::SkEd25519(key) if SMALL_ORDER.contains(&masked(key.public_key().0)) => {
            Err(KeyError::Unsound("a point of small order"))
        }
        KeyData::Ed25519(_) | KeyData::SkEd25519(_) => Ok(()),
        KeyData::SkEcdsaSha2NistP256(key) => {
            judge_point(EcdsaCurve::NistP256, EcdsaPublicKey::NistP256(*key.ec_point()).as_sec1_bytes())
        }
        KeyData::Ecdsa(key) => judge_point(key.curve(), key.as_sec1_bytes()),
        KeyData::Rsa(key) => match bits(key.n()) {
            RSA_BITS_MIN..=RSA_BITS_MAX if !odd(key.n()) => Err(KeyError::Unsound("an even RSA modulus")),
            RSA_BITS_MIN..=RSA_BITS_MAX if !(2..=33).contains(&bits(key.e())) || !odd(key.e()) => {
                Err(KeyError::Unsound("an RSA exponent that is even, below 3 or above 33 bits"))
            }
            RSA_BITS_MIN..=RSA_BITS_MAX => Ok(()),
            bits => Err(KeyError::RsaSize(bits)),
        },
        KeyData::Certificate(_) => Err(KeyError::Certificate("an OpenSSH certificate")),
        other => Err(KeyError::Algorithm(text::printable(other.algorithm().as_str()))),
    }
}

fn judge_point(curve: EcdsaCurve, point: &[u8]) -> Result<(), KeyError> {
    // One key has one encoding, and so one fingerprint; OpenSSH knows the uncompressed one only.
    if point.first() != Some(&4) {
        return Err(KeyError::Algorithm("ECDSA with a compressed point".into()));
    }
    // The library takes any two numbers of the right length, and finds out when it verifies.
    let lies = match curve {
        EcdsaCurve::NistP256 => p256::PublicKey::from_sec1_bytes(point).is_ok(),
        EcdsaCurve::NistP384 => p384::PublicKey::from_sec1_bytes(point).is_ok(),
        EcdsaCurve::NistP521 => p521::PublicKey::from_sec1_bytes(point).is_ok(),
    };
    if lies { Ok(()) } else { Err(KeyError::Unsound("a point that does not lie on its curve")) }
}

fn bits(number: &Mpint) -> u32 {
    let bytes = number.as_positive_bytes().unwrap_or_default();
    let leading = bytes.first().map_or(0, |byte| byte.leading_zeros());
    u32::try_from(bytes.len()).unwrap_or(u32::MAX).saturating_mul(8).saturating_sub(leading)
}

fn odd(number: &Mpint) -> bool {
    number.as_positive_bytes().and_then(<[u8]>::last).is_some_and(|byte| byte & 1 == 1)
}

/// The encoding without its sign bit, in which the points of [`SMALL_ORDER`] come twice.
fn masked(mut point: [u8; 32]) -> [u8; 32] {
    point[31] &= 0x7f;
    point
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    digest.copy_from_slice(&HashAlg::Sha256.digest(bytes));
    digest
}

fn open(path: &Path) -> Result<File, KeyError> {
    // Without O_NONBLOCK the open of a pipe would wait for a writer.
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(KeyError::Read)?;
    if !file.metadata().map_err(KeyError::Read)?.is_file() {
        return Err(KeyError::NotAFile);
    }
    Ok(file)
}

fn contents(file: &File) -> Result<Zeroizing<String>, KeyError> {
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(KeyError::Read)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(KeyError::TooLarge);
    }
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(KeyError::Form("it is UTF-16 text; save it as UTF-8"));
    }
    if bytes.starts_with(&[0x30]) {
        return Err(KeyError::Form("it seems to be DER; convert it to PEM (`openssl pkey -inform DER`)"));
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(_) => Err(KeyError::Form("it is not text")),
    }
}

fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), KeyError> {
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(mode).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(KeyError::Exists.at(path)),
        Err(error) => return Err(KeyError::Write(error).at(path)),
    };
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| sync_directory(path));
    written.map_err(|error| {
        // Half a key helps nobody, and would stand in the way of the next try; the first error is the one to report.
        let _ = std::fs::remove_file(path);
        KeyError::Write(error).at(path)
    })
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// The operating system's generator, for the library's RSA.
struct SystemRandom;

impl rand_core::TryRng for SystemRandom {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        Ok(u32::from_ne_bytes(random()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        Ok(u64::from_ne_bytes(random()))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
        for chunk in bytes.chunks_mut(256) {
            let drawn = Zeroizing::new(random::<256>());
            chunk.copy_from_slice(&drawn[..chunk.len()]);
        }
        Ok(())
    }
}

impl rand_core::TryCryptoRng for SystemRandom {}

/// What NIST SP 800-57 counts as 128 bits of strength.
const RSA_BITS_MIN: u32 = 3072;

/// What the RSA implementation verifies at most.
const RSA_BITS_MAX: u32 = 8192;

/// Longest comment; any honest one is a name and a date.
const COMMENT_MAX: usize = 255;

const OPENSSH_MAGIC: &[u8] = b"openssh-key-v1\0";

const CERTIFICATE_MARK: &[u8] = b"-cert-v01@";

const PROBE: &[u8] = b"caponier: do both halves of this key fit?";

/// The y coordinates of the points of order 1, 2, 4 and 8 on edwards25519, little-endian, with the encodings of 0 and 1
/// that are not reduced.
#[rustfmt::skip]
const SMALL_ORDER: [[u8; 32]; 7] = [
    [0; 32],
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0,
     0xd5, 0xdf, 0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05],
    [0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f,
     0x2a, 0x20, 0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a],
    [0xec, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
     0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
    [0xed, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
     0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
    [0xee, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
     0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
];

#[cfg(test)]
mod tests;

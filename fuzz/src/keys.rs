//! Keys in all their forms.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use caponier::chain::Chain;
use caponier::identity::{Fingerprint, KeyError, PrivateKey, PublicKey};

/// The words of PEM under which bytes are tried.
const LABELS: [&str; 8] = [
    "PUBLIC KEY",
    "RSA PUBLIC KEY",
    "PRIVATE KEY",
    "RSA PRIVATE KEY",
    "EC PRIVATE KEY",
    "OPENSSH PRIVATE KEY",
    "ENCRYPTED PRIVATE KEY",
    "CERTIFICATE",
];

/// The kinds of OpenSSH lines under which bytes are tried.
const KINDS: [&str; 8] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
    "ssh-ed25519-cert-v01@openssh.com",
];

/// A key that is read is of an accepted kind and strength, reads back as itself from every form, and no text is both a public
/// and a private key; no refusal repeats what it was about. A first byte below 16 says in which form the rest is wrapped;
/// without one the bytes are the text.
pub fn holds(bytes: &[u8]) {
    match bytes.split_first() {
        Some((&form @ 0..8, der)) => {
            let label = LABELS[usize::from(form)];
            let base64 = STANDARD.encode(der);
            text_holds(&format!("-----BEGIN {label}-----\n{base64}\n-----END {label}-----\n"));
        }
        Some((&form @ 8..16, blob)) => {
            let kind = KINDS[usize::from(form - 8)];
            let name = [&u32::try_from(kind.len()).expect("short").to_be_bytes(), kind.as_bytes()].concat();
            text_holds(&format!("{kind} {}", STANDARD.encode([&name, blob].concat())));
            text_holds(&format!("{kind} {}", STANDARD.encode(blob)));
        }
        _ => {
            if let Ok(text) = str::from_utf8(bytes) {
                text_holds(text);
            }
        }
    }
}

fn text_holds(text: &str) {
    if let Ok(fingerprint) = text.parse::<Fingerprint>() {
        assert_eq!(fingerprint.to_string(), text, "a fingerprint has one form");
    }
    let (public, private) = (PublicKey::parse(text), PrivateKey::parse(text));
    assert!(public.is_err() || private.is_err(), "both a public and a private key");
    for error in [public.as_ref().err(), private.as_ref().err()].into_iter().flatten() {
        refusal_holds(text, error);
    }
    if let Ok(public) = public {
        public_holds(&public);
    }
    if let Ok(private) = private {
        public_holds(&private.public());
        let written = private.to_openssh();
        let again = PrivateKey::parse(written.expose()).expect("what we write we read");
        assert_eq!(again.public(), private.public());
        assert_eq!(again.to_openssh().expose().lines().count(), written.expose().lines().count());
        assert!(PublicKey::parse(written.expose()).is_err());
        assert_eq!(format!("{private:?}"), "PrivateKey([hidden])");
    }
}

fn public_holds(key: &PublicKey) {
    let line = key.to_openssh();
    let again = PublicKey::parse(&line).expect("what we write we read");
    assert_eq!(&again, key);
    assert_eq!(again.fingerprint(), key.fingerprint());
    assert!(line.starts_with(&format!("{} ", key.algorithm())) && line.split(' ').count() == 2, "{line}");
    assert!(PublicKey::from_ssh(key.as_ssh().clone()).as_ref().is_ok_and(|again| again == key));
    assert!(PrivateKey::parse(&line).is_err());
    match key.algorithm() {
        "ssh-ed25519" | "sk-ssh-ed25519@openssh.com" | "sk-ecdsa-sha2-nistp256@openssh.com" => {
            assert_eq!(key.bits(), 256);
        }
        "ecdsa-sha2-nistp256" => assert_eq!(key.bits(), 256),
        "ecdsa-sha2-nistp384" => assert_eq!(key.bits(), 384),
        "ecdsa-sha2-nistp521" => assert_eq!(key.bits(), 521),
        "ssh-rsa" => assert!((3_072..=8_192).contains(&key.bits()), "{} bits", key.bits()),
        other => panic!("accepted: {other}"),
    }
    let printed = key.fingerprint().to_string();
    assert_eq!(printed.parse::<Fingerprint>().ok(), Some(key.fingerprint()));
}

/// Nothing of a section's or a line's contents gets into the reason why it is refused.
fn refusal_holds(text: &str, error: &KeyError) {
    let said = Chain(error).to_string();
    assert!(super::is_printable(&said) && said.len() < 2_000, "{said:?}");
    for line in text.lines().filter(|line| !line.contains("-----")) {
        // The first word may be named as the kind that it claims to be.
        let secret = line.trim().split_once(' ').map_or(line.trim(), |(_, rest)| rest);
        if secret.len() >= 40 && secret.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte)) {
            assert!(!said.contains(secret), "{said}");
        }
    }
}

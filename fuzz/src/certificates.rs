//! OpenSSH certificates.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use caponier::chain::Chain;
use caponier::identity::PublicKey;
use caponier::identity::certificate::{Certificate, Revocations, Trust, Use};
use jiff::Timestamp;

/// A certificate that is read is no key, counts for nobody without its CA, and not when it is revoked; what is refused is
/// refused in printable words. Bytes that are no text are tried as the contents of a line.
pub fn holds(bytes: &[u8]) {
    match str::from_utf8(bytes) {
        Ok(text) => text_holds(text),
        Err(_) => {
            let length =
                bytes.get(..4).and_then(|length| length.try_into().ok()).map_or(0, u32::from_be_bytes) as usize;
            let kind =
                bytes.get(4..).and_then(|rest| rest.get(..length)).unwrap_or(b"ssh-ed25519-cert-v01@openssh.com");
            text_holds(&format!("{} {}", String::from_utf8_lossy(kind), STANDARD.encode(bytes)));
        }
    }
}

fn text_holds(text: &str) {
    let certificate = match Certificate::parse(text) {
        Ok(certificate) => certificate,
        Err(error) => {
            let said = Chain(&error).to_string();
            assert!(super::is_printable(&said) && said.len() < 2_000, "{said:?}");
            return;
        }
    };
    assert!(PublicKey::parse(text).is_err(), "a certificate is no plain key");
    assert!(Certificate::from_ssh(certificate.as_ssh()).is_ok());
    let (none, all) = (Revocations::default(), revoking(&certificate));
    let stranger = PublicKey::parse("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJoKxNEZ0nGJGSwqlUq0pr1Mt6PVhlb9lXEqmPF6Llhj");
    for second in [0, 1_700_000_000, 1_900_000_000, 4_000_000_000] {
        let now = Timestamp::from_second(second).expect("a time");
        for shown in [Use::Login("10.0.0.1".parse().ok()), Use::Host("gateway.example.com")] {
            let judged = |authority: &PublicKey, revocations: &Revocations| {
                certificate.judge(Trust { authority, revocations }, shown, now)
            };
            if let Ok(stranger) = &stranger {
                assert!(stranger == certificate.authority() || judged(stranger, &none).is_err());
            }
            assert!(judged(certificate.authority(), &all).is_err(), "it is revoked");
            if judged(certificate.authority(), &none).is_ok() {
                assert!(!certificate.principals().is_empty() && certificate.unmet_option().is_none());
                assert!(certificate.expires().is_none_or(|expires| now < expires));
            }
        }
    }
}

fn revoking(certificate: &Certificate) -> Revocations {
    Revocations { serials: [certificate.serial()].into(), key_ids: [certificate.key_id().to_owned()].into() }
}

use super::forge::Forge;
use super::*;
use crate::identity::PrivateKey;

fn ca() -> PrivateKey {
    PrivateKey::generate(crate::identity::Algorithm::Ed25519)
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("a time")
}

fn from() -> Option<IpAddr> {
    Some("192.0.2.7".parse().expect("an address"))
}

fn option(name: &str, data: &str) -> Vec<(String, String)> {
    vec![(name.to_owned(), data.to_owned())]
}

/// What is wrong, with the change that makes it so.
type Wrong = (&'static str, Flaw, fn(&mut Forge));

/// A user's certificate that is good in every field, and then one field wrong at a time.
#[test]
fn one_wrong_field_is_enough_to_refuse() {
    let authority = ca();
    let good = Forge::new(&authority, &["ci"]);
    let key = authority.public();
    let none = Revocations::default();
    let trust = Trust { authority: &key, revocations: &none };
    let judge = |forge: &Forge, now| forge.sign().judge(trust, Use::Login(from()), at(now));
    assert_eq!(judge(&good, 1500), Ok(()));
    let wrong: &[Wrong] = &[
        ("another CA", Flaw::UnknownAuthority, |forge| forge.authority = ca()),
        ("a host's", Flaw::Kind, |forge| forge.kind = Kind::Host),
        ("no principals", Flaw::Principal, |forge| forge.principals.clear()),
        ("not yet valid", Flaw::NotYetValid, |forge| forge.valid_after = 1501),
        ("expired", Flaw::Expired, |forge| forge.valid_before = 1500),
        ("no extension", Flaw::NoForwarding, |forge| forge.extensions.clear()),
        ("another extension", Flaw::NoForwarding, |forge| forge.extensions = option("permit-pty", "")),
        ("an extension with data", Flaw::NoForwarding, |forge| {
            forge.extensions = option("permit-port-forwarding", "no");
        }),
        ("a command", Flaw::CriticalOption, |forge| forge.options = option("force-command", "/bin/true")),
        ("a token's user", Flaw::CriticalOption, |forge| forge.options = option("verify-required", "")),
        ("an unknown option", Flaw::CriticalOption, |forge| forge.options = option("be-nice@example.com", "")),
        ("an extension as an option", Flaw::CriticalOption, |forge| {
            forge.options = option("permit-port-forwarding", "");
        }),
        ("another network", Flaw::SourceAddress, |forge| forge.options = option("source-address", "192.0.3.0/24")),
        ("another address", Flaw::SourceAddress, |forge| forge.options = option("source-address", "192.0.2.8")),
        ("another family", Flaw::SourceAddress, |forge| forge.options = option("source-address", "2001:db8::/32")),
        ("a network that is none", Flaw::CriticalOption, |forge| {
            forge.options = option("source-address", "192.0.2.0/33");
        }),
        ("bits beyond the mask", Flaw::CriticalOption, |forge| {
            forge.options = option("source-address", "192.0.2.7/24");
        }),
        ("a list that is partly none", Flaw::CriticalOption, |forge| {
            forge.options = option("source-address", "192.0.2.0/24,");
        }),
        ("a negated network", Flaw::CriticalOption, |forge| forge.options = option("source-address", "!192.0.3.0/24")),
        ("spaces", Flaw::CriticalOption, |forge| forge.options = option("source-address", "192.0.2.0/24, 10.0.0.0/8")),
        ("octal to some", Flaw::CriticalOption, |forge| forge.options = option("source-address", "0192.0.2.0/24")),
        ("octal in short", Flaw::CriticalOption, |forge| forge.options = option("source-address", "192.0.02.0/24")),
        ("no network", Flaw::CriticalOption, |forge| forge.options = option("source-address", "")),
    ];
    for (what, flaw, change) in wrong {
        let mut forge = good.clone();
        change(&mut forge);
        assert_eq!(judge(&forge, 1500), Err(*flaw), "{what}");
    }
    for (now, judged) in [
        (999, Err(Flaw::NotYetValid)),
        (1000, Ok(())),
        (1999, Ok(())),
        (2000, Err(Flaw::Expired)),
        (-5, Err(Flaw::NotYetValid)),
    ] {
        assert_eq!(judge(&good, now), judged, "at {now}");
    }
    for (what, options) in [
        ("its network", option("source-address", "10.0.0.0/8,192.0.2.0/24")),
        ("its address", option("source-address", "192.0.2.7")),
        ("everything", option("source-address", "0.0.0.0/0")),
    ] {
        assert_eq!(judge(&Forge { options, ..good.clone() }, 1500), Ok(()), "{what}");
    }
    // An IPv4 client at a listener for IPv6.
    let narrow = Forge { options: option("source-address", "192.0.2.7/32"), ..good.clone() }.sign();
    let mapped = "::ffff:192.0.2.7".parse().expect("an address");
    assert_eq!(narrow.judge(trust, Use::Login(Some(mapped)), at(1500)), Ok(()));
    assert_eq!(narrow.judge(trust, Use::Login(None), at(1500)), Err(Flaw::SourceAddress));
    assert_eq!(good.sign().judge(trust, Use::Login(None), at(1500)), Ok(()));
    // What is not known and not critical does not matter.
    let mut extended = good.clone();
    extended.extensions.push(("unheard-of@example.com".to_owned(), "data".to_owned()));
    assert_eq!(judge(&extended, 1500), Ok(()));
    // Good for ever is said by the largest number, and means it.
    let forever = Forge { valid_after: 0, valid_before: u64::MAX, ..good };
    assert_eq!((judge(&forever, 1500), forever.sign().expires()), (Ok(()), None));
}

#[test]
fn what_is_revoked_is_revoked_by_number_or_by_name() {
    let authority = ca();
    let key = authority.public();
    let certificate = Forge::new(&authority, &["ci"]).sign();
    let unnumbered = Forge { serial: 0, ..Forge::new(&authority, &["ci"]) }.sign();
    let judge = |certificate: &Certificate, serials: &[u64], key_ids: &[&str]| {
        let revocations = Revocations {
            serials: serials.iter().copied().collect(),
            key_ids: key_ids.iter().map(|&id| id.to_owned()).collect(),
        };
        certificate.judge(Trust { authority: &key, revocations: &revocations }, Use::Login(from()), at(1500))
    };
    assert_eq!(judge(&certificate, &[1, 7], &[]), Err(Flaw::Revoked));
    assert_eq!(judge(&certificate, &[], &["nobody", "somebody"]), Err(Flaw::Revoked));
    assert_eq!(judge(&certificate, &[6, 8], &["some", "somebody else", "Somebody"]), Ok(()));
    // No number is not the number 0.
    assert_eq!(judge(&unnumbered, &[0], &[]), Ok(()));
    assert_eq!(judge(&unnumbered, &[0], &["somebody"]), Err(Flaw::Revoked));
}

#[test]
fn a_host_is_named_as_it_is() {
    let authority = ca();
    let key = authority.public();
    let none = Revocations::default();
    let host =
        Forge { kind: Kind::Host, extensions: Vec::new(), ..Forge::new(&authority, &["gw.example.com", "*.wild"]) };
    let judge = |forge: &Forge, name| {
        forge.sign().judge(Trust { authority: &key, revocations: &none }, Use::Host(name), at(1500))
    };
    assert_eq!(judge(&host, "gw.example.com"), Ok(()));
    assert_eq!(judge(&host, "GW.example.com"), Ok(()));
    for name in ["", "other.example.com", "gw.example.com.", "a.wild", "gw.example.co"] {
        assert_eq!(judge(&host, name), Err(Flaw::Principal), "{name}");
    }
    assert_eq!(judge(&Forge { principals: Vec::new(), ..host.clone() }, "gw.example.com"), Err(Flaw::Principal));
    assert_eq!(judge(&Forge { kind: Kind::User, ..host.clone() }, "gw.example.com"), Err(Flaw::Kind));
    let limited = Forge { options: option("source-address", "0.0.0.0/0"), ..host.clone() };
    assert_eq!(judge(&limited, "gw.example.com"), Err(Flaw::CriticalOption));
    assert_eq!(judge(&Forge { valid_before: 1500, ..host }, "gw.example.com"), Err(Flaw::Expired));
}

#[test]
fn what_could_never_count_is_no_certificate() {
    let authority = ca();
    let good = Forge::new(&authority, &["ci"]);
    let reason = |forge: &Forge| forge.try_sign().map_err(|error| error.reason()).err();
    assert_eq!(reason(&good), None);
    assert_eq!(reason(&Forge { key_id: "x".repeat(CERTIFICATE_KEY_ID_MAX), ..good.clone() }), None);
    let long = Forge { key_id: "x".repeat(CERTIFICATE_KEY_ID_MAX + 1), ..good.clone() };
    assert_eq!(reason(&long), Some("certificate_malformed"));
    let many = Forge { principals: vec!["ci".to_owned(); CERTIFICATE_NAMES_MAX + 1], ..good.clone() };
    assert_eq!(reason(&many), Some("certificate_malformed"));

    // A byte of what was signed, and one of the signature.
    let text = good.whole().to_openssh().expect("a line");
    assert_eq!(
        Certificate::parse(&text).expect("a certificate"),
        Certificate::from_ssh(&good.whole()).expect("the same")
    );
    let blob = good.whole().to_bytes().expect("bytes");
    for at in [blob.len() - 1, blob.windows(8).position(|window| window == b"somebody").expect("its key id")] {
        let mut changed = blob.clone();
        changed[at] ^= 1;
        let error = Certificate::from_blob(&changed).expect_err("a certificate that nobody signed");
        assert_eq!(error.reason(), "certificate_signature", "byte {at}");
    }
    for end in [0, 3, 40, blob.len() - 1] {
        assert_eq!(Certificate::from_blob(&blob[..end]).expect_err("half of one").reason(), "certificate_malformed");
    }
    assert!(Certificate::from_blob(&[&blob[..], b"x"].concat()).is_err());
    assert_eq!(
        Certificate::from_blob(&vec![0; CERTIFICATE_MAX + 1]).expect_err("too long").reason(),
        "certificate_malformed"
    );
    // The library's decoder recurses; it is not asked.
    let nested = [b"ssh-ed25519-cert-v01@openssh.com".as_slice(); 3].concat();
    assert!(matches!(Certificate::from_blob(&nested), Err(CertificateError::Nested)));
    let plain = authority.public().to_openssh();
    assert!(matches!(Certificate::parse(&plain), Err(CertificateError::Text(_))));
    assert!(matches!(Certificate::parse(""), Err(CertificateError::Text(_))));
}

/// Signed by `ssh-keygen`, of OpenSSH 9: the CA has 2,048 bits; the CA has 3,072 and signs with SHA-1; the CA is a DSA key or a
/// certificate cannot be made with it any more.
#[test]
fn a_weak_ca_is_refused_whatever_it_has_signed() {
    for (text, reason) in [
        (include_str!("testdata/ca-rsa2048-cert.pub"), "certificate_weak_ca"),
        (include_str!("testdata/ca-sha1-cert.pub"), "certificate_sha1"),
        (include_str!("testdata/subject-rsa2048-cert.pub"), "certificate_weak_key"),
    ] {
        assert_eq!(Certificate::parse(text).expect_err("a weak one").reason(), reason);
    }
    let good = Certificate::parse(include_str!("testdata/ca-rsa3072-cert.pub")).expect("a certificate");
    assert_eq!((good.serial(), good.key_id(), good.principals().len()), (u64::MAX, "of ssh-keygen", 2));
}

#[test]
fn nothing_but_names_is_printed() {
    let shown = format!("{:?}", Forge::new(&ca(), &["ci"]).sign());
    assert!(shown.contains("somebody") && shown.len() < 300, "{shown}");
}

//! Tests of the module above, and what others need to test theirs.

use std::time::SystemTime;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};

use super::*;
use crate::limits::{PEER_CHAIN_MAX, PEER_NAMES_MAX};

pub(crate) type Issuer = CertifiedIssuer<'static, KeyPair>;

pub(crate) const NOW: &str = "2026-06-01T00:00:00Z";
const BEGIN: &str = "2026-01-01T00:00:00Z";
const END: &str = "2027-01-01T00:00:00Z";
const A: &str = "caponier://acme/agents/a";

fn at(text: &str) -> Timestamp {
    text.parse().expect(text)
}

/// Parameters of a certificate that would do.
fn params(common: &str, begin: &str, end: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common);
    params.not_before = SystemTime::from(at(begin)).into();
    params.not_after = SystemTime::from(at(end)).into();
    params
}

fn but(mut params: CertificateParams, change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    change(&mut params);
    params
}

fn ca_params(name: &str, end: &str) -> CertificateParams {
    let mut params = params(name, BEGIN, end);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// A CA that lasts.
pub(crate) fn ca(name: &str) -> Issuer {
    CertifiedIssuer::self_signed(ca_params(name, "2036-01-01T00:00:00Z"), key()).expect("a CA")
}

fn key() -> KeyPair {
    KeyPair::generate().expect("a key")
}

fn leaf_params(uri: &str) -> CertificateParams {
    let mut params = params("somebody", BEGIN, END);
    params.subject_alt_names = vec![SanType::URI(uri.try_into().expect("a URI"))];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params
}

fn signed(params: CertificateParams, issuer: &Issuer) -> CertificateDer<'static> {
    params.signed_by(&key(), issuer).expect("a certificate").der().clone()
}

fn leaf(uri: &str, issuer: &Issuer) -> CertificateDer<'static> {
    signed(leaf_params(uri), issuer)
}

/// What a client shows that has a certificate for this URI, with this common name.
pub(crate) fn shown(uri: &str, common: &str, issuer: &Issuer) -> PeerChain {
    let mut params = leaf_params(uri);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common);
    chain(&[signed(params, issuer)])
}

fn chain(certificates: &[CertificateDer<'static>]) -> PeerChain {
    PeerChain::new(certificates).expect("a chain")
}

/// A list of these serial numbers, which holds until then.
pub(crate) fn revoking(issuer: &Issuer, serials: &[u64], until: &str) -> String {
    let revoked = |serial: &u64| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: SystemTime::from(at(BEGIN)).into(),
        reason_code: None,
        invalidity_date: None,
    };
    let list = CertificateRevocationListParams {
        this_update: SystemTime::from(at(BEGIN)).into(),
        next_update: SystemTime::from(at(until)).into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(issuer).expect("a list").pem().expect("PEM")
}

/// Some authorities.
pub(crate) fn trust(authorities: &[(&Issuer, Option<String>)]) -> Trust {
    let mut trust = Trust::default();
    for (issuer, lists) in authorities {
        trust.add(&issuer.pem(), lists.as_deref()).expect("an authority");
    }
    trust
}

fn agent(name: &str) -> Wanted<'static> {
    Wanted::agent(&name.parse().expect(name), &[])
}

fn judge(trust: &Trust, chain: &PeerChain) -> Result<(), Flaw> {
    trust.judge(chain, &agent("acme/a"), at(NOW)).map(drop)
}

#[test]
fn one_thing_wrong_at_a_time() {
    let (ours, other) = (ca("ours"), ca("other"));
    let namesake = ca("ours");
    let trust = trust(&[(&ours, None)]);
    assert_eq!(judge(&trust, &chain(&[leaf(A, &ours)])), Ok(()));

    let expired = || but(leaf_params(A), |it| it.not_after = SystemTime::from(at("2026-05-31T23:59:59Z")).into());
    let early = but(leaf_params(A), |it| it.not_before = SystemTime::from(at("2026-06-01T00:00:01Z")).into());
    let for_servers = but(leaf_params(A), |it| it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    let authority = but(leaf_params(A), |it| it.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    let own: CertificateDer<'static> = leaf_params(A).self_signed(&key()).expect("a certificate").der().clone();
    let mut altered = leaf(A, &ours).to_vec();
    let last = altered.len() - 1;
    altered[last] ^= 1;
    let crowd = but(leaf_params(A), |it| {
        let names =
            (0..PEER_NAMES_MAX).map(|at| SanType::DnsName(format!("h{at}.example").try_into().expect("a name")));
        it.subject_alt_names.extend(names);
    });
    for (case, leaf, flaw) in [
        ("another CA", leaf(A, &other), Flaw::UnknownAuthority),
        ("another CA of the same name", leaf(A, &namesake), Flaw::UnknownAuthority),
        ("signed by itself", own, Flaw::UnknownAuthority),
        ("expired", signed(expired(), &ours), Flaw::Expired),
        ("expired, and another CA's", signed(expired(), &other), Flaw::UnknownAuthority),
        ("not yet valid", signed(early, &ours), Flaw::NotYetValid),
        ("for servers", signed(for_servers, &ours), Flaw::Invalid),
        ("a CA's", signed(authority, &ours), Flaw::Invalid),
        ("the CA's own", ours.der().clone(), Flaw::Invalid),
        ("altered", altered.into(), Flaw::UnknownAuthority),
        ("garbage", b"garbage".to_vec().into(), Flaw::Invalid),
        ("empty", Vec::new().into(), Flaw::Invalid),
        ("more names than anybody has", signed(crowd, &ours), Flaw::Invalid),
        ("agent b's", leaf("caponier://acme/agents/b", &ours), Flaw::OtherName),
        ("a longer name", leaf("caponier://acme/agents/ab", &ours), Flaw::OtherName),
        ("another organisation's", leaf("caponier://globex/agents/a", &ours), Flaw::OtherName),
        ("a principal's", leaf("caponier://acme/principals/a", &ours), Flaw::OtherName),
        ("another scheme", leaf("https://acme/agents/a", &ours), Flaw::OtherName),
        ("in capitals", leaf("CAPONIER://acme/agents/a", &ours), Flaw::OtherName),
        ("nobody's", signed(but(leaf_params(A), |it| it.subject_alt_names.clear()), &ours), Flaw::OtherName),
    ] {
        assert_eq!(judge(&trust, &chain(&[leaf])), Err(flaw), "{case}");
    }
    assert_eq!(judge(&Trust::default(), &chain(&[leaf(A, &ours)])), Err(Flaw::UnknownAuthority), "no CA");
}

#[test]
fn an_agents_is_no_principals() {
    let ours = ca("ours");
    let trust = trust(&[(&ours, None)]);
    let (organisation, id) = ("acme".parse().expect("an id"), "a".parse().expect("an id"));
    let principal = Wanted::principal(&organisation, &id, &[]);
    let of_agent = chain(&[leaf(A, &ours)]);
    assert_eq!(trust.judge(&of_agent, &principal, at(NOW)), Err(Flaw::OtherName));
    let of_principal = chain(&[leaf("caponier://acme/principals/a", &ours)]);
    assert!(trust.judge(&of_principal, &principal, at(NOW)).is_ok());
}

#[test]
fn names_that_stand_for_it_are_compared_whole() {
    let ours = ca("ours");
    let trust = trust(&[(&ours, None)]);
    let with = |common: &str, dns: &[&str]| {
        let mut params = params(common, BEGIN, END);
        params.subject_alt_names =
            dns.iter().map(|name| SanType::DnsName((*name).try_into().expect("a name"))).collect();
        chain(&[signed(params, &ours)])
    };
    let judge = |chain: &PeerChain, name: &str| {
        let names = [name.to_owned()];
        trust.judge(chain, &Wanted::agent(&"acme/a".parse().expect("a name"), &names), at(NOW)).is_ok()
    };
    let one = with("Agent Seven", &["agent-7.corp.example", "*.wild.example"]);
    assert!(judge(&one, "agent-7.corp.example") && judge(&one, "AGENT-7.corp.example") && judge(&one, "Agent Seven"));
    for name in ["agent-7.corp.exampl", "corp.example", "x.wild.example", "agent seven", "", "Agent Seven "] {
        assert!(!judge(&one, name), "{name}");
    }
    // Which of two common names is meant cannot be told.
    let mut two = params("one", BEGIN, END);
    two.distinguished_name.push(DnType::CustomDnType(vec![2, 5, 4, 3]), "two");
    let two = chain(&[signed(two, &ours)]);
    assert!(!judge(&two, "one") && !judge(&two, "two"));
}

#[test]
fn revoked_and_what_a_list_does_not_say() {
    let (ours, other) = (ca("ours"), ca("other"));
    let numbered = |serial: u64| {
        let params = but(leaf_params(A), |it| it.serial_number = Some(SerialNumber::from(serial)));
        chain(&[signed(params, &ours)])
    };
    let with = |list: String| trust(&[(&ours, Some(list))]);
    let list = with(revoking(&ours, &[7], END));
    assert_eq!(judge(&list, &numbered(7)), Err(Flaw::Revoked));
    assert_eq!(judge(&list, &numbered(8)), Ok(()));
    assert_eq!(list.next_end(at(NOW)), Some(at(END)));
    let outdated = with(revoking(&ours, &[7], "2026-05-31T00:00:00Z"));
    assert_eq!(judge(&outdated, &numbered(8)), Err(Flaw::RevocationsExpired));
    assert!(outdated.ends().filter_map(|end| end.warning(at(NOW))).any(|text| text.contains("has ended")));
    assert_eq!(outdated.ends().filter_map(|end| end.warning(at("2026-01-02T00:00:00Z"))).count(), 0);
    // A list of the same name that another has signed says nothing.
    let forged = with(revoking(&ca("ours"), &[], END));
    assert_eq!(judge(&forged, &numbered(8)), Err(Flaw::RevocationUnknown));
    // A second authority without lists is not asked about them.
    let both = trust(&[(&ours, Some(revoking(&ours, &[7], END))), (&other, None)]);
    assert_eq!(judge(&both, &chain(&[leaf(A, &other)])), Ok(()));
    assert_eq!(judge(&both, &numbered(7)), Err(Flaw::Revoked));

    let mut trust = Trust::default();
    assert!(matches!(trust.add(&ours.pem(), Some(&revoking(&other, &[], END))), Err((true, TrustError::ListOfOthers))));
}

#[test]
fn an_intermediate_is_believed_and_revoked() {
    let ours = ca("ours");
    let between = |serial: u64| {
        let params = but(ca_params("between", END), |it| it.serial_number = Some(SerialNumber::from(serial)));
        CertifiedIssuer::signed_by(params, key(), &ours).expect("a CA")
    };
    let (one, plain) = (between(7), between(8));
    let through = |issuer: &Issuer| chain(&[leaf(A, issuer), issuer.der().clone()]);
    let bare = trust(&[(&ours, None)]);
    assert_eq!(judge(&bare, &through(&one)), Ok(()));
    assert_eq!(judge(&bare, &chain(&[leaf(A, &one)])), Err(Flaw::UnknownAuthority), "the one between is not sent");
    let lists = |issuer: &Issuer| format!("{}{}", revoking(&ours, &[7], END), revoking(issuer, &[], END));
    assert_eq!(judge(&trust(&[(&ours, Some(lists(&one)))]), &through(&one)), Err(Flaw::Revoked));
    assert_eq!(judge(&trust(&[(&ours, Some(lists(&plain)))]), &through(&plain)), Ok(()));
    let without_its_own = trust(&[(&ours, Some(revoking(&ours, &[7], END)))]);
    assert_eq!(judge(&without_its_own, &through(&plain)), Err(Flaw::RevocationUnknown));
    // One that may certify nobody certifies nobody.
    let leaf_as_ca = CertifiedIssuer::signed_by(leaf_params(A), key(), &ours).expect("an issuer");
    assert!(judge(&bare, &through(&leaf_as_ca)).is_err());
}

#[test]
fn what_an_issuer_has_revoked_is_not_saved_by_an_authority_above_it() {
    let ours = ca("ours");
    let issuing = CertifiedIssuer::signed_by(ca_params("issuing", END), key(), &ours).expect("a CA");
    let numbered = |serial: u64| {
        let params = but(leaf_params(A), |it| it.serial_number = Some(SerialNumber::from(serial)));
        chain(&[signed(params, &issuing), issuing.der().clone()])
    };
    let list = |until: &str| Some(revoking(&issuing, &[7], until));
    let bundle = |certificates: String, list: Option<String>| {
        let mut trust = Trust::default();
        trust.add(&certificates, list.as_deref()).expect("authorities");
        trust
    };
    for (case, current, outdated) in [
        (
            "in one file, the root first",
            bundle(format!("{}{}", ours.pem(), issuing.pem()), list(END)),
            bundle(format!("{}{}", ours.pem(), issuing.pem()), list("2026-05-31T00:00:00Z")),
        ),
        (
            "in one file, the root last",
            bundle(format!("{}{}", issuing.pem(), ours.pem()), list(END)),
            bundle(format!("{}{}", issuing.pem(), ours.pem()), list("2026-05-31T00:00:00Z")),
        ),
        (
            "each in its own file",
            trust(&[(&ours, None), (&issuing, list(END))]),
            trust(&[(&ours, None), (&issuing, list("2026-05-31T00:00:00Z"))]),
        ),
    ] {
        assert_eq!(judge(&current, &numbered(7)), Err(Flaw::Revoked), "{case}");
        assert_eq!(judge(&current, &numbered(8)), Ok(()), "{case}");
        assert_eq!(judge(&outdated, &numbered(8)), Err(Flaw::RevocationsExpired), "{case}");
    }
    // Nor is one between believed, of which the root's list says that nobody knows.
    let unknown = trust(&[(&ours, Some(revoking(&ours, &[], END))), (&issuing, None)]);
    assert_eq!(judge(&unknown, &numbered(8)), Err(Flaw::RevocationUnknown));
}

#[test]
fn an_authority_ends_too() {
    let short = CertifiedIssuer::self_signed(ca_params("short", "2026-05-31T00:00:00Z"), key()).expect("a CA");
    let trust = trust(&[(&short, None)]);
    assert_eq!(judge(&trust, &chain(&[leaf(A, &short)])), Err(Flaw::Expired));
    assert!(trust.ends().any(|end| end.warning(at(NOW)).is_some_and(|text| text.contains("has ended"))));
    assert!(trust.ends().all(|end| end.next(at(NOW)).is_none()));
    assert_eq!(trust.ends().filter_map(|end| end.next(at(BEGIN))).min(), Some(at("2026-05-01T00:00:00Z")));
}

#[test]
fn large_chains_are_none() {
    let ours = ca("ours");
    assert!(PeerChain::new(&[]).is_none());
    // The most that is looked at, all of it useless.
    let trust = trust(&[(&ours, None)]);
    let mut useless = vec![ours.der().clone(); PEER_CHAIN_MAX - 1];
    useless.insert(0, leaf(A, &ca("ours")));
    assert_eq!(judge(&trust, &chain(&useless)), Err(Flaw::UnknownAuthority));
    let mut long = vec![ours.der().clone(); PEER_CHAIN_MAX];
    long.insert(0, leaf(A, &ours));
    assert_eq!(judge(&trust, &chain(&long)), Err(Flaw::Invalid));
}

#[test]
fn files_that_say_nobody_are_refused() {
    let ours = ca("ours");
    let add =
        |certificates: &str, lists: Option<&str>| Trust::default().add(certificates, lists).map_err(|(_, error)| error);
    assert!(matches!(add("", None), Err(TrustError::Empty)));
    assert!(matches!(add("ssh-ed25519 AAAA", None), Err(TrustError::Empty)));
    let not_ca = leaf_params(A).self_signed(&key()).expect("a certificate").pem();
    assert!(matches!(add(&format!("{}{not_ca}", ours.pem()), None), Err(TrustError::Certificate { number: 2 })));
    assert!(matches!(add(&format!("{}{}", ours.pem(), key().serialize_pem()), None), Err(TrustError::PrivateKey)));
    assert!(matches!(add(&ours.pem(), Some("")), Err(TrustError::ListEmpty)));
    let broken = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
    assert!(matches!(add(&ours.pem(), Some(broken)), Err(TrustError::List { number: 1 })));
    let many: String = (0..=CLIENT_CAS_MAX).map(|number| ca(&format!("ca {number}")).pem()).collect();
    assert!(matches!(add(&many, None), Err(TrustError::TooMany)));
    let mut twice = Trust::default();
    twice.add(&ours.pem(), None).expect("an authority");
    twice.add(&ours.pem(), None).expect("the same");
    assert_eq!(twice, trust(&[(&ours, None)]));
}

#[test]
fn a_gate_tells_what_it_was_told() {
    for flaw in Flaw::ALL {
        let chain = chain(&[leaf(A, &ca("ours"))]);
        let error = gate(move |_| Err(flaw)).admits(&chain, UnixTime::now()).expect_err("refused");
        let told = AcceptError::Certificate(rustls::Error::InvalidCertificate(error)).flaw();
        // These two cannot come from a gate, which is asked about a certificate and not about a name.
        let expected = if matches!(flaw, Flaw::Missing | Flaw::OtherName) { Flaw::Invalid } else { flaw };
        assert_eq!(told, Some(expected));
    }
    assert_eq!(AcceptError::NoCertificate.flaw(), Some(Flaw::Missing));
    assert_eq!(AcceptError::Closed.flaw(), None);
}

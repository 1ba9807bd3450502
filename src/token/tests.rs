use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use serde_json::{Value, json};

use super::*;
use crate::identity::key::Algorithm as Kind;
use crate::identity::signature::Signature;
use crate::identity::{PrivateKey, PublicKey};

fn id<T: FromStr<Err: fmt::Debug>>(text: &str) -> T {
    text.parse().expect(text)
}

fn now() -> Timestamp {
    id("2026-11-21T12:00:00Z")
}

fn hours(hours: i64) -> SignedDuration {
    SignedDuration::from_hours(hours)
}

fn key() -> PrivateKey {
    PrivateKey::generate(Kind::Ed25519)
}

fn claims() -> Claims {
    let targets = Some(vec![id("api.internal:6443")]);
    Claims::new(id("ci"), id("acme/prod-eu"), targets, now(), hours(1)).expect("claims")
}

fn part(bytes: &[u8]) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn header(key: &PrivateKey) -> Value {
    json!({"alg": "EdDSA", "typ": "caponier+jwt", "kid": key.public().fingerprint().to_string()})
}

fn body() -> Value {
    let at = now().as_second();
    json!({"sub": "ci", "agent": "acme/prod-eu", "iat": at, "nbf": at, "exp": at + 3600, "jti": "one"})
}

/// A JWT of these texts, with a signature of the key that is right whatever they say.
fn forged(key: &PrivateKey, header: &str, claims: &str) -> String {
    let signed = format!("{}.{}", part(header.as_bytes()), part(claims.as_bytes()));
    let seed = key.ed25519_seed().expect("Ed25519");
    let der = [&[0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20], &seed.expose()[..]].concat();
    let signature = crypto::sign(signed.as_bytes(), &EncodingKey::from_ed_der(&der), Algorithm::EdDSA);
    format!("{signed}.{}", signature.expect("a signature"))
}

fn verified(text: &str, key: &PublicKey) -> Result<Verified, TokenError> {
    Token::read(text).and_then(|token| token.verify(key))
}

fn reason(text: &str, key: &PrivateKey) -> Option<&'static str> {
    verified(text, &key.public()).err().map(|error| error.reason())
}

#[test]
fn what_was_signed_is_what_is_read() {
    let key = key();
    for (form, token) in [(Form::Jwt, claims().sign(&key)), (Form::Ssh, claims().sign_with_ssh(&key))] {
        let token = token.expect("a token");
        let text = token.text().expose().clone();
        // As the user's part of a URL it needs no escaping.
        assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)), "{text}");
        let read = verified(&text, &key.public()).expect("verified");
        assert_eq!((read.form(), read.key()), (form, key.public().fingerprint()));
        assert_eq!(read.claims().targets, Some(vec![id("api.internal:6443")]));
        assert_eq!(read.claims().principal, id("ci"));
        assert!(!format!("{token:?}").contains(&text), "Debug shows it");
        assert!(!format!("{:?} {read:?}", Token::read(&text)).contains(text.rsplit('.').next().expect("a part")));
    }
}

#[test]
fn every_character_that_is_altered_is_noticed() {
    let key = key();
    for token in [claims().sign(&key), claims().sign_with_ssh(&key)] {
        let text = token.expect("a token").text().expose().clone();
        for at in 0..text.len() {
            for other in ["A", "z", "_", ".", "=", "%", ""] {
                let mut altered = text.clone();
                altered.replace_range(at..=at, other);
                if altered != text {
                    assert!(verified(&altered, &key.public()).is_err(), "{altered}");
                }
            }
        }
        for cut in 0..text.len() {
            assert!(verified(&text[..cut], &key.public()).is_err(), "{cut} characters of it");
        }
        for around in
            [format!("{text}."), format!(".{text}"), format!(" {text}"), format!("{text}\n"), format!("{text}=")]
        {
            assert!(verified(&around, &key.public()).is_err(), "{around}");
        }
    }
}

#[test]
fn every_claim_that_is_altered_is_noticed() {
    let (key, other) = (key(), key());
    let good = forged(&key, &header(&key).to_string(), &body().to_string());
    assert!(verified(&good, &key.public()).is_ok());
    let signature = good.rsplit('.').next().expect("a signature");
    let ssh = Signature::make(&key, NAMESPACE, body().to_string().as_bytes()).and_then(|made| made.to_bytes());
    let ssh = part(&ssh.expect("a signature"));
    for (name, value) in [
        ("sub", json!("admin")),
        ("agent", json!("acme/prod-us")),
        ("agent", json!("globex/prod-eu")),
        ("targets", json!(["other:1"])),
        ("iat", json!(0)),
        ("nbf", json!(0)),
        ("exp", json!(4_000_000_000_i64)),
        ("jti", json!("two")),
    ] {
        let mut altered = body();
        altered[name] = value;
        let altered = part(altered.to_string().as_bytes());
        let jwt = format!("{}.{altered}.{signature}", part(header(&key).to_string().as_bytes()));
        assert_eq!(reason(&jwt, &key), Some("token_signature"), "{name}");
        assert_eq!(reason(&format!("caponier1.{altered}.{ssh}"), &key), Some("token_signature"), "{name}");
    }
    // Signed with another key that claims to be this one, and this one's asked about another's.
    let usurped = forged(&other, &header(&key).to_string(), &body().to_string());
    assert_eq!(reason(&usurped, &key), Some("token_signature"));
    let owned = forged(&other, &header(&other).to_string(), &body().to_string());
    assert_eq!(reason(&owned, &key), Some("token_signature"));
}

#[test]
fn the_header_decides_nothing() {
    let key = key();
    let public = part(&key.public().ed25519().expect("Ed25519"));
    let jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": public});
    for (name, value) in [
        ("alg", json!("none")),
        ("alg", json!("None")),
        ("alg", json!("HS256")),
        ("alg", json!("ES256")),
        ("alg", json!("eddsa")),
        ("alg", json!("Ed25519")),
        ("alg", json!(["EdDSA"])),
        ("alg", Value::Null),
        ("typ", json!("JWT")),
        ("typ", json!("application/caponier+jwt")),
        ("typ", Value::Null),
        ("kid", json!("")),
        ("kid", json!("../../key")),
        ("kid", Value::Null),
        ("jwk", jwk),
        ("jku", json!("https://example.com/keys")),
        ("x5c", json!(["MII"])),
        ("x5u", json!("https://example.com/cert")),
        ("x5t#S256", json!("AAAA")),
        ("crit", json!(["exp"])),
        ("crit", json!([])),
        ("b64", json!(false)),
        ("zip", json!("DEF")),
        ("cty", json!("JWT")),
        ("unknown", json!(1)),
    ] {
        let mut altered = header(&key);
        altered[name] = value.clone();
        let text = forged(&key, &altered.to_string(), &body().to_string());
        assert_eq!(reason(&text, &key), Some("token_header"), "{name} {value}");
    }
    for name in ["alg", "typ", "kid"] {
        let mut altered = header(&key);
        altered.as_object_mut().expect("an object").remove(name);
        assert_eq!(
            reason(&forged(&key, &altered.to_string(), &body().to_string()), &key),
            Some("token_header"),
            "{name}"
        );
    }
    let kid = key.public().fingerprint();
    let twice = format!("{{\"alg\":\"none\",\"alg\":\"EdDSA\",\"typ\":\"caponier+jwt\",\"kid\":\"{kid}\"}}");
    assert_eq!(reason(&forged(&key, &twice, &body().to_string()), &key), Some("token_header"));
    // A secret that everybody knows is no key: the public half, as HMAC would take it.
    let signed = format!("{}.{}", part(br#"{"alg":"HS256","typ":"caponier+jwt","kid":""}"#), part(b"{}"));
    let mac = crypto::sign(
        signed.as_bytes(),
        &EncodingKey::from_secret(&key.public().ed25519().expect("Ed25519")),
        Algorithm::HS256,
    );
    assert_eq!(reason(&format!("{signed}.{}", mac.expect("a MAC")), &key), Some("token_header"));
    // Without any signature.
    let none = format!("{}.{}.", part(header(&key).to_string().as_bytes()), part(body().to_string().as_bytes()));
    assert_eq!(reason(&none, &key), Some("token_signature"));
}

#[test]
fn claims_are_bounded_and_none_is_passed_over() {
    let key = key();
    let at = now().as_second();
    let (month, many) = (30 * 24 * 3600, vec!["db.internal:5432"; TOKEN_TARGETS_MAX + 1]);
    for (name, value) in [
        ("sub", json!("")),
        ("sub", json!("a b")),
        ("sub", json!("CI")),
        ("sub", json!(7)),
        ("agent", json!("acme")),
        ("agent", json!("acme/prod/eu")),
        ("agent", json!("acme/*")),
        ("targets", json!([])),
        ("targets", Value::Null),
        ("targets", json!("db:1")),
        ("targets", json!(["db"])),
        ("targets", json!(["db:*"])),
        ("targets", json!(["0177.0.0.1:80"])),
        ("targets", json!(many)),
        ("iat", json!("now")),
        ("iat", json!(-1)),
        ("iat", json!(1.5)),
        ("iat", json!(at + 3600)),
        ("nbf", json!(at + 3600)),
        ("nbf", json!(at - month)),
        ("exp", json!(at)),
        ("exp", json!(at - 1)),
        ("exp", json!(at + month + 1)),
        ("exp", json!(i64::MAX)),
        ("exp", json!(1e30)),
        ("jti", json!("")),
        ("jti", json!("a b")),
        ("jti", json!("a\u{1b}[2J")),
        ("jti", json!("x".repeat(TOKEN_ID_MAX + 1))),
        ("aud", json!("somebody")),
        ("iss", json!("somebody")),
        ("scope", json!("less")),
    ] {
        let mut altered = body();
        altered[name] = value.clone();
        let altered = altered.to_string();
        let text = forged(&key, &header(&key).to_string(), &altered);
        assert_eq!(reason(&text, &key), Some("token_claims"), "{name} {value}");
        let signed = Signature::make(&key, NAMESPACE, altered.as_bytes()).and_then(|made| made.to_bytes());
        let text = format!("caponier1.{}.{}", part(altered.as_bytes()), part(&signed.expect("a signature")));
        assert_eq!(reason(&text, &key), Some("token_claims"), "{name} {value}");
    }
    for name in ["sub", "agent", "iat", "nbf", "exp", "jti"] {
        let mut altered = body();
        altered.as_object_mut().expect("an object").remove(name);
        let text = forged(&key, &header(&key).to_string(), &altered.to_string());
        assert_eq!(reason(&text, &key), Some("token_claims"), "{name}");
    }
    let twice = body().to_string().replacen('{', "{\"sub\":\"admin\",", 1);
    assert_eq!(reason(&forged(&key, &header(&key).to_string(), &twice), &key), Some("token_claims"));
    let longest = {
        let mut longest = body();
        longest["exp"] = json!(at + month);
        longest
    };
    assert_eq!(reason(&forged(&key, &header(&key).to_string(), &longest.to_string()), &key), None);
}

#[test]
fn what_is_too_long_or_no_token_at_all_is_refused() {
    let key = key();
    let huge = "A".repeat(TOKEN_MAX + 1);
    for (text, expected) in [
        ("", "token_malformed"),
        (".", "token_malformed"),
        ("..", "token_header"),
        ("a.b", "token_malformed"),
        ("a.b.c.d", "token_malformed"),
        ("caponier1..", "token_signature"),
        ("caponier1.e30.", "token_signature"),
        ("caponier2.e30.AAAA", "token_malformed"),
        ("Caponier1.e30.AAAA", "token_malformed"),
        ("e30.e30.AAAA", "token_header"),
        ("bnVsbA.bnVsbA.bnVsbA", "token_header"),
        ("\u{e4}.\u{f6}.\u{fc}", "token_malformed"),
        (huge.as_str(), "token_malformed"),
    ] {
        assert_eq!(reason(text, &key), Some(expected), "{text:.40}");
    }
    let deep = forged(&key, &format!("{}1{}", "[".repeat(500), "]".repeat(500)), "{}");
    assert_eq!(reason(&deep, &key), Some("token_header"));
}

#[test]
fn a_signature_for_another_purpose_is_no_token() {
    let key = key();
    let body = body().to_string();
    let made = |namespace| {
        let bytes = Signature::make(&key, namespace, body.as_bytes()).and_then(|made| made.to_bytes());
        format!("caponier1.{}.{}", part(body.as_bytes()), part(&bytes.expect("a signature")))
    };
    assert_eq!(reason(&made(NAMESPACE), &key), None);
    for namespace in ["file", "git", "token", "token@caponier2", "TOKEN@caponier"] {
        assert_eq!(reason(&made(namespace), &key), Some("token_signature"), "{namespace}");
    }
}

#[test]
fn time_is_judged_with_a_minutes_leeway() {
    let mut claims = claims();
    claims.begins = id("2026-11-21T12:10:00Z");
    for (at, good) in [
        ("2026-11-21T12:08:59Z", false),
        ("2026-11-21T12:09:00Z", true),
        ("2026-11-21T13:00:59Z", true),
        ("2026-11-21T13:01:00Z", false),
        ("2030-01-01T00:00:00Z", false),
        ("1970-01-01T00:00:00Z", false),
    ] {
        assert_eq!(claims.judge_time(id(at)).is_ok(), good, "{at}");
    }
    let early = claims.judge_time(id("2026-11-21T11:00:00.5Z")).expect_err("early");
    assert_eq!(
        early.to_string(),
        "not yet valid: begins at 2026-11-21T12:10:00Z, this gateway's clock says 2026-11-21T11:00:00Z"
    );
    let late = claims.judge_time(id("2026-11-22T11:00:00Z")).expect_err("late");
    assert_eq!(
        late.to_string(),
        "expired: ended at 2026-11-21T13:00:00Z, this gateway's clock says 2026-11-22T11:00:00Z"
    );
}

#[test]
fn nothing_is_signed_that_no_gateway_would_accept() {
    let (key, good) = (key(), claims());
    let long = Claims::new(id("ci"), id("acme/prod-eu"), None, now(), hours(30 * 24 + 1)).expect("claims");
    let none = Claims::new(id("ci"), id("acme/prod-eu"), None, now(), hours(0)).expect("claims");
    let many = Claims { targets: Some(vec![id("db:1"); TOKEN_TARGETS_MAX + 1]), ..good.clone() };
    for claims in [long, none, many, Claims { targets: Some(Vec::new()), ..good.clone() }] {
        assert!(matches!(claims.sign(&key), Err(SignError::Claims(_))), "{claims:?}");
        assert!(matches!(claims.sign_with_ssh(&key), Err(SignError::Claims(_))), "{claims:?}");
    }
    assert!(Claims::new(id("ci"), id("acme/prod-eu"), None, now(), SignedDuration::MAX).is_err());
    let name = format!("{}.internal:1", vec!["x".repeat(60); 4].join("."));
    let large = Claims { targets: Some(vec![id(&name); TOKEN_TARGETS_MAX]), ..good };
    assert!(matches!(large.sign(&key), Err(SignError::TooLong)));
}

#[test]
fn keys_of_every_kind_sign_as_ssh_keygen_does() {
    let folder = tempfile::tempdir().expect("a folder");
    let claims = body().to_string();
    std::fs::write(folder.path().join("claims"), &claims).expect("written");
    for kind in ["ed25519", "ecdsa", "rsa"] {
        let script = format!(
            "ssh-keygen -q -t {kind} -N '' -f {kind} && ssh-keygen -q -Y sign -n {NAMESPACE} -f {kind} < claims 2>/dev/null"
        );
        let output = std::process::Command::new("sh").args(["-c", &script]).current_dir(folder.path()).output();
        let output = output.expect("ssh-keygen runs");
        assert!(output.status.success(), "{output:?}");
        let armoured = String::from_utf8(output.stdout).expect("text");
        let lines: String = armoured.lines().filter(|line| !line.starts_with('-')).collect();
        let bytes = base64::prelude::BASE64_STANDARD.decode(lines).expect("base64");
        let key = PrivateKey::read(&folder.path().join(kind)).expect("a key");
        let text = format!("caponier1.{}.{}", part(claims.as_bytes()), part(&bytes));
        assert_eq!(verified(&text, &key.public()).map(|it| it.form()).ok(), Some(Form::Ssh), "{kind}");
        let ours = self::claims().sign_with_ssh(&key).expect("a token");
        assert!(verified(ours.text().expose(), &key.public()).is_ok(), "{kind}");
        if kind != "ed25519" {
            assert!(matches!(self::claims().sign(&key), Err(SignError::KeyKind)));
        }
    }
}

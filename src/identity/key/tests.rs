//! Keys made by the real `ssh-keygen` and `openssl`, whose absence is a failure. No key is stored with the sources.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::chain::Chain;

/// Runs a shell line in `dir` and returns what it printed.
fn sh(dir: &TempDir, line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).current_dir(dir.path()).output().expect("sh runs");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

fn dir() -> TempDir {
    TempDir::new().expect("a temporary directory")
}

fn file(dir: &TempDir, name: &str, mode: u32, contents: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, contents).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode set");
    path
}

fn text(error: &KeyError) -> String {
    Chain(error).to_string()
}

/// The text of the refusal to read `name` as a public key.
fn public_refusal(dir: &TempDir, name: &str) -> String {
    text(&PublicKey::read(&dir.path().join(name)).expect_err(name))
}

/// The text of the refusal to read `name` as a private key.
fn private_refusal(dir: &TempDir, name: &str) -> String {
    text(&PrivateKey::read(&dir.path().join(name)).expect_err(name))
}

/// `der` as PEM under `label`.
fn pem(dir: &TempDir, der: &[u8], label: &str) -> String {
    file(dir, "der", 0o600, der);
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", sh(dir, "openssl base64 -in der"))
}

#[test]
fn refuses_weak_and_foreign_kinds() {
    let dir = dir();
    sh(
        &dir,
        "ssh-keygen -q -t rsa -b 2048 -N '' -f rsa2048
         ssh-keygen -q -t rsa -b 2048 -m PEM -N '' -f rsa2048.pkcs1
         ssh-keygen -q -t rsa -b 3064 -N '' -f rsa3064
         openssl dsaparam -genkey -noout 1024 > dsa 2>/dev/null
         openssl pkey -in dsa -traditional -out dsa.traditional
         openssl pkey -in dsa -pubout -out dsa.spki.pub
         openssl genpkey -algorithm ed448 -out ed448; openssl pkey -in ed448 -pubout -out ed448.pub
         openssl genpkey -algorithm x25519 -out x25519; openssl pkey -in x25519 -pubout -out x25519.pub
         openssl genpkey -algorithm rsa-pss -pkeyopt rsa_keygen_bits:3072 -out pss 2>/dev/null
         openssl pkey -in pss -pubout -out pss.pub
         openssl ecparam -name secp256k1 -genkey -noout -out k1; openssl ec -in k1 -pubout -out k1.pub 2>/dev/null
         openssl ecparam -name prime256v1 -param_enc explicit -genkey -noout -out explicit
         openssl ec -in explicit -pubout -out explicit.pub 2>/dev/null
         openssl ecparam -name prime256v1 -genkey -noout -out p256
         openssl ec -in p256 -pubout -conv_form compressed -out compressed.pub 2>/dev/null
         chmod 600 *",
    );
    for (name, reason) in [
        ("rsa2048", "2048 bits"),
        ("rsa2048.pkcs1", "2048 bits"),
        ("rsa3064", "3064 bits"),
        ("dsa", "DSA"),
        ("dsa.traditional", "ssh-dss"),
        ("ed448", "Ed448"),
        ("x25519", "X25519"),
        ("pss", "RSA-PSS"),
        ("k1", "secp256k1"),
        ("explicit", "explicit curve parameters"),
    ] {
        let refusal = private_refusal(&dir, name);
        let secp256k1_in_sec1 = name == "k1" && refusal.contains("1.3.132.0.10");
        assert!(refusal.contains(reason) || secp256k1_in_sec1, "{name}: {refusal}");
        assert!(refusal.contains(&*dir.path().join(name).to_string_lossy()), "{name}: {refusal}");
    }
    // Written by hand: newer releases of ssh-keygen know no DSA.
    let string = |bytes: &[u8]| [&(bytes.len() as u32).to_be_bytes(), bytes].concat();
    let number = [7; 20];
    file(&dir, "blob", 0o600, [&b"ssh-dss"[..], &number, &number, &number, &number].map(string).concat());
    sh(&dir, "printf 'ssh-dss %s\n' \"$(openssl base64 -A -in blob)\" > dsa.pub");
    for (name, reason) in [
        ("rsa2048.pub", "2048 bits"),
        ("rsa3064.pub", "3064 bits"),
        ("dsa.pub", "ssh-dss"),
        ("dsa.spki.pub", "DSA"),
        ("ed448.pub", "Ed448"),
        ("x25519.pub", "X25519"),
        ("pss.pub", "RSA-PSS"),
        ("k1.pub", "secp256k1"),
        ("explicit.pub", "explicit curve parameters"),
        ("compressed.pub", "compressed point"),
    ] {
        let refusal = public_refusal(&dir, name);
        assert!(refusal.contains(reason), "{name}: {refusal}");
    }
}

#[test]
fn refuses_what_belongs_elsewhere_and_says_what_it_is() {
    let dir = dir();
    sh(
        &dir,
        "ssh-keygen -q -t ed25519 -N '' -f key
         ssh-keygen -q -t ed25519 -N '' -f ca
         ssh-keygen -q -s ca -h -I host key.pub
         openssl genpkey -algorithm ed25519 -out pkcs8
         openssl pkey -in pkcs8 -pubout -out spki.pub
         openssl req -new -x509 -key pkcs8 -subj /CN=x -days 1 -out x509.pub
         openssl req -new -key pkcs8 -subj /CN=x -out csr.pub
         ssh-keygen -e -f key.pub > rfc4716.pub
         cat key.pub ca.pub > two.pub
         cat spki.pub spki.pub > twopem.pub
         cat spki.pub key.pub > mixed.pub
         cat pkcs8 x509.pub > bundle
         { echo 'command=\"x\",restrict'; cat key.pub; } | tr '\\n' ' ' > options.pub
         { echo host.example.com; cat key.pub; } | tr '\\n' ' ' > hosts.pub
         head -n 1 spki.pub > truncated.pub
         tr '\\n' ' ' < spki.pub > oneline.pub
         head -c 60 key.pub > cut.pub
         openssl pkey -in pkcs8 -outform DER -out der
         printf '' > empty
         printf '# nobody\\n' > comments.pub
         head -c 1048577 /dev/zero | tr '\\0' a > large
         iconv -f ascii -t utf-16 key.pub > utf16.pub || python3 -c \"open('utf16.pub','wb').write(open('key.pub').read().encode('utf-16'))\"
         printf 'PuTTY-User-Key-File-3: ssh-ed25519\\n' > putty
         mkfifo pipe
         chmod 600 *",
    );
    for (name, reason) in [
        ("key", "a private key where a public key belongs"),
        ("pkcs8", "a private key where a public key belongs"),
        ("key-cert.pub", "an OpenSSH certificate"),
        ("x509.pub", "an X.509 certificate"),
        ("csr.pub", "a request for an X.509 certificate"),
        ("rfc4716.pub", "ssh-keygen -i"),
        ("two.pub", "2 lines"),
        ("twopem.pub", "PUBLIC KEY, PUBLIC KEY"),
        ("mixed.pub", "PUBLIC KEY, an OpenSSH line"),
        ("options.pub", "before the kind of key"),
        ("hosts.pub", "before the kind of key"),
        ("truncated.pub", "END line is missing"),
        ("oneline.pub", "line breaks"),
        ("cut.pub", "damaged"),
        ("empty", "is empty"),
        ("comments.pub", "comments only"),
        ("large", "larger than"),
        ("utf16.pub", "UTF-16"),
        ("der", "DER"),
        ("putty", "PuTTY"),
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
        ("absent", "No such file"),
    ] {
        let refusal = public_refusal(&dir, name);
        assert!(refusal.contains(reason), "{name}: {refusal}");
        assert!(refusal.contains(&*dir.path().join(name).to_string_lossy()), "{name}: {refusal}");
    }
    for (name, reason) in [
        ("key.pub", "a public key where a private key belongs"),
        ("spki.pub", "a public key where a private key belongs"),
        ("key-cert.pub", "an OpenSSH certificate"),
        ("x509.pub", "an X.509 certificate"),
        ("bundle", "PRIVATE KEY, CERTIFICATE"),
        ("rfc4716.pub", "ssh-keygen -i"),
        ("empty", "is empty"),
        ("large", "larger than"),
        ("putty", "PuTTY"),
        ("pipe", "not a regular file"),
        ("absent", "No such file"),
    ] {
        let refusal = private_refusal(&dir, name);
        assert!(refusal.contains(reason), "{name}: {refusal}");
    }
}

#[test]
fn refuses_encrypted_private_keys() {
    let dir = dir();
    sh(
        &dir,
        "ssh-keygen -q -t ed25519 -N secret -f openssh
         openssl genpkey -algorithm ed25519 -aes-256-cbc -pass pass:secret -out pkcs8
         openssl genrsa -traditional -aes128 -passout pass:secret -out pkcs1 3072 2>/dev/null
         { echo '-----BEGIN PRIVATE KEY-----'; sed '1d;$d' pkcs8; echo '-----END PRIVATE KEY-----'; } > mislabelled
         chmod 600 *",
    );
    for name in ["openssh", "pkcs8", "pkcs1", "mislabelled"] {
        let refusal = private_refusal(&dir, name);
        assert!(refusal.contains("encrypted private key"), "{name}: {refusal}");
    }
}

#[test]
fn refuses_private_keys_that_others_can_read() {
    let dir = dir();
    let key = PrivateKey::generate(Algorithm::Ed25519);
    for mode in [0o640, 0o604, 0o620, 0o601, 0o644, 0o777, 0o610] {
        let path = file(&dir, &format!("key{mode:o}"), mode, key.to_openssh().expose());
        let refusal = text(&PrivateKey::read(&path).expect_err("exposed"));
        assert!(refusal.contains(&format!("chmod 600 {}", path.display())), "{refusal}");
        assert!(refusal.contains(&format!("{mode:04o}")), "{refusal}");
        // The mode that counts is the file's, not that of a link to it.
        let link = dir.path().join(format!("link{mode:o}"));
        symlink(&path, &link).expect("linked");
        assert!(matches!(PrivateKey::read(&link), Err(KeyError::File { .. })));
    }
    for mode in [0o600, 0o400, 0o700] {
        let path = file(&dir, &format!("good{mode:o}"), mode, key.to_openssh().expose());
        assert_eq!(PrivateKey::read(&path).expect("accepted").public(), key.public());
    }
}

#[test]
fn refuses_halves_that_do_not_fit() {
    let (one, two) = (Ed25519Keypair::from_seed(&[1; 32]), Ed25519Keypair::from_seed(&[2; 32]));
    let mixed = Ed25519Keypair { public: two.public, private: one.private };
    let key = russh::keys::PrivateKey::new(KeypairData::Ed25519(mixed), "").expect("a key");
    let pem = key.to_openssh(LineEnding::LF).expect("encodes");
    assert!(PrivateKey::parse(&pem).is_err());

    // Numbers that no RSA key has must be refused by us, not by a panic in big-number arithmetic.
    use russh::keys::ssh_key::private::RsaPrivateKey;
    use russh::keys::ssh_key::public::RsaPublicKey;
    let number = |last: u8, len: usize| {
        let mut bytes = vec![0xa5; len];
        bytes[len - 1] = last;
        Mpint::from_positive_bytes(&bytes)
    };
    for (n, e, p) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)] {
        let public = RsaPublicKey::new(number(e, 3), number(n, 384)).expect("numbers");
        let private =
            RsaPrivateKey::new(number(1, 384), number(1, 192), number(p, 192), number(1, 192)).expect("numbers");
        let pair = KeypairData::Rsa(RsaKeypair::new(public, private).expect("a pair"));
        let key = russh::keys::PrivateKey::new(pair, "").expect("a key");
        let refusal = text(&PrivateKey::parse(&key.to_openssh(LineEnding::LF).expect("encodes")).expect_err("unsound"));
        assert!(refusal.contains("unsound"), "{refusal}");
        assert_eq!(PublicKey::from_ssh(key.public_key().clone()).is_err(), n == 0 || e == 0);
    }
}

#[test]
fn refuses_points_of_small_order() {
    for point in SMALL_ORDER {
        for sign in [0, 0x80] {
            let mut point = point;
            point[31] |= sign;
            let point = russh::keys::ssh_key::public::Ed25519PublicKey(point);
            // A security token's key is judged like any other.
            let token = russh::keys::ssh_key::public::SkEd25519::new(point, "ssh:");
            for key in [KeyData::Ed25519(point), KeyData::SkEd25519(token)] {
                assert!(matches!(PublicKey::from_ssh(key.into()), Err(KeyError::Unsound(_))));
            }
        }
    }
}

#[test]
fn regression_points_off_their_curve_are_refused_in_every_form() {
    let dir = dir();
    for (bits, curve) in [(256, "prime256v1"), (384, "secp384r1"), (521, "secp521r1")] {
        sh(
            &dir,
            &format!(
                "ssh-keygen -q -t ecdsa -b {bits} -N '' -f good{bits}
                 openssl ecparam -name {curve} -genkey -noout | openssl ec -pubout -outform DER -out spki{bits} 2>/dev/null"
            ),
        );
        let public = PublicKey::read(&dir.path().join(format!("good{bits}.pub"))).expect("a good key");
        // The last byte of y: another one lies on the curve with -y alone, which differs in more than that.
        let mut blob = public.blob();
        *blob.last_mut().expect("a point") ^= 1;
        let kind = public.algorithm();
        file(&dir, "blob", 0o600, &blob);
        let line = format!("{kind} {}", sh(&dir, "openssl base64 -A -in blob"));
        assert!(matches!(PublicKey::parse(&line), Err(KeyError::Unsound(_) | KeyError::Damaged { .. })), "{kind}");
        let mut spki = fs::read(dir.path().join(format!("spki{bits}"))).expect("read");
        assert!(PublicKey::parse(&pem(&dir, &spki, "PUBLIC KEY")).is_ok(), "{kind}");
        *spki.last_mut().expect("a point") ^= 1;
        let refused = PublicKey::parse(&pem(&dir, &spki, "PUBLIC KEY"));
        assert!(matches!(refused, Err(KeyError::Unsound(_) | KeyError::Damaged { .. })), "{kind}: {refused:?}");
        if bits == 256 {
            let good = russh::keys::ssh_key::public::EcdsaPublicKey::from_sec1_bytes(&public.blob()[39..]);
            let Ok(EcdsaPublicKey::NistP256(good)) = good else { panic!("a point") };
            let bad = EcdsaPublicKey::from_sec1_bytes(&blob[39..]);
            let Ok(EcdsaPublicKey::NistP256(bad)) = bad else { panic!("two numbers") };
            let token = |point| russh::keys::ssh_key::public::SkEcdsaSha2NistP256::new(point, "ssh:");
            assert!(PublicKey::from_ssh(KeyData::SkEcdsaSha2NistP256(token(good)).into()).is_ok());
            let refused = PublicKey::from_ssh(KeyData::SkEcdsaSha2NistP256(token(bad)).into());
            assert!(matches!(refused, Err(KeyError::Unsound(_))), "{refused:?}");
        }
    }
}

/// The key material of the systems that this replaces, made as their documentation and their wizard make it: an RSA key of
/// 4096 bits by `openssl genrsa`, its public half by `openssl rsa -pubout`, a fingerprint that is the SHA-256 of the DER in
/// hex, PKCS#8 and SPKI under the labels of PKCS#1, and Ed25519 by `openssl genpkey` for the newer one.
#[test]
fn takes_the_keys_of_the_systems_before() {
    let dir = dir();
    sh(
        &dir,
        "openssl genrsa -out private.pem 4096 2>/dev/null
         openssl rsa -in private.pem -outform PEM -pubout -out public.pem 2>/dev/null
         sed 's/ PRIVATE KEY/ RSA PRIVATE KEY/' private.pem > wizard.private.pem
         sed 's/ PUBLIC KEY/ RSA PUBLIC KEY/' public.pem > wizard.public.pem
         openssl rsa -in private.pem -traditional -out terraform.pem 2>/dev/null
         openssl genpkey -algorithm ed25519 -out runner.pem; openssl pkey -in runner.pem -pubout -out runner.pub
         chmod 600 *",
    );
    let digest = sh(&dir, "openssl pkey -pubin -in public.pem -outform DER | sha256sum | cut -d' ' -f1");
    for name in ["public.pem", "wizard.public.pem"] {
        let key = PublicKey::read(&dir.path().join(name)).expect(name);
        assert_eq!((key.bits(), key.spki_fingerprint().as_deref()), (4096, Some(digest.as_str())), "{name}");
    }
    for name in ["private.pem", "wizard.private.pem", "terraform.pem"] {
        let key = PrivateKey::read(&dir.path().join(name)).expect(name).public();
        assert_eq!(key.spki_fingerprint().as_deref(), Some(digest.as_str()), "{name}");
    }
    let runner = PrivateKey::read(&dir.path().join("runner.pem")).expect("a key").public();
    assert_eq!(PublicKey::read(&dir.path().join("runner.pub")).expect("a key"), runner);
}

#[test]
fn reads_every_form_and_agrees_with_the_tools_on_fingerprints() {
    let dir = dir();
    sh(
        &dir,
        "ssh-keygen -q -t ed25519 -N '' -C 'me @ work' -f ed25519.openssh
         ssh-keygen -q -t rsa -b 3072 -N '' -f rsa3072.openssh
         ssh-keygen -q -t rsa -b 4096 -N '' -f rsa4096.openssh
         ssh-keygen -q -t rsa -b 3072 -m PEM -N '' -f rsa3072.sshpem
         for bits in 256 384 521; do
             ssh-keygen -q -t ecdsa -b $bits -N '' -f ecdsa$bits.openssh
             ssh-keygen -q -t ecdsa -b $bits -m PEM -N '' -f ecdsa$bits.sec1
             ssh-keygen -q -t ecdsa -b $bits -m PKCS8 -N '' -f ecdsa$bits.pkcs8
         done
         openssl genpkey -algorithm ed25519 -out ed25519.pkcs8
         openssl genrsa -out rsa4096.pkcs8 4096 2>/dev/null
         openssl genrsa -traditional -out rsa3072.pkcs1 3072 2>/dev/null
         openssl ecparam -name prime256v1 -genkey -out ecdsa256.withparameters
         rm -f *.pub
         chmod 600 *",
    );
    let mut names: Vec<_> = fs::read_dir(dir.path())
        .expect("listed")
        .map(|entry| entry.expect("entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    assert_eq!(names.len(), 17, "{names:?}");
    for name in names {
        let key = PrivateKey::read(&dir.path().join(&name)).unwrap_or_else(|error| panic!("{name}: {}", text(&error)));
        let public = key.public();
        // Ours, written by us, in the tools' eyes.
        key.write_new(&dir.path().join(format!("{name}.ours"))).expect("written");
        key.write_public_new(&dir.path().join(format!("{name}.ours.pub"))).expect("written");
        let listed = sh(&dir, &format!("ssh-keygen -lf {name}.ours.pub"));
        assert!(listed.starts_with(&format!("{} {} ", public.bits(), public.fingerprint())), "{name}: {listed}");
        assert_eq!(
            sh(&dir, &format!("ssh-keygen -yf {name}.ours | cut -d' ' -f1,2")),
            public.to_openssh(),
            "{name}: the private key we wrote has another public half"
        );
        // SPKI, as openssl makes it from the same key.
        sh(
            &dir,
            &format!(
                "ssh-keygen -e -m PKCS8 -f {name}.ours.pub > {name}.spki || openssl pkey -in {name} -pubout -out {name}.spki || true"
            ),
        );
        if fs::metadata(dir.path().join(format!("{name}.spki"))).expect("made").len() == 0 {
            // ssh-keygen 9.2 exports no Ed25519 key, and openssl reads no key in OpenSSH's form.
            assert_eq!(name, "ed25519.openssh");
            continue;
        }
        let spki = PublicKey::read(&dir.path().join(format!("{name}.spki"))).expect("spki");
        assert_eq!(spki, public, "{name}");
        let digest = sh(&dir, &format!("openssl pkey -pubin -in {name}.spki -outform DER | sha256sum | cut -d' ' -f1"));
        assert_eq!(public.spki_fingerprint().as_deref(), Some(digest.as_str()), "{name}");
    }
}

#[test]
fn reads_mislabelled_pem() {
    let dir = dir();
    sh(
        &dir,
        "openssl genrsa -out pkcs8 3072 2>/dev/null
         openssl rsa -in pkcs8 -traditional -out pkcs1 2>/dev/null
         openssl pkey -in pkcs8 -pubout -out spki
         openssl rsa -in pkcs8 -RSAPublicKey_out -out rsapublic
         relabel() { echo \"-----BEGIN $2-----\"; sed '1d;$d' $1; echo \"-----END $2-----\"; }
         relabel pkcs8 'RSA PRIVATE KEY' > pkcs8.wrong
         relabel pkcs1 'PRIVATE KEY' > pkcs1.wrong
         relabel spki 'RSA PUBLIC KEY' > spki.wrong
         relabel rsapublic 'PUBLIC KEY' > rsapublic.wrong
         relabel pkcs8 'PUBLIC KEY' > leak.pub
         { echo; echo 'made by hand'; sed 's/$/\\r/' pkcs8; echo; } > crlf
         chmod 600 *",
    );
    let public = PublicKey::read(&dir.path().join("spki")).expect("spki");
    for name in ["rsapublic", "spki.wrong", "rsapublic.wrong"] {
        assert_eq!(PublicKey::read(&dir.path().join(name)).expect(name), public);
    }
    for name in ["pkcs8", "pkcs1", "pkcs8.wrong", "pkcs1.wrong", "crlf"] {
        assert_eq!(PrivateKey::read(&dir.path().join(name)).expect(name).public(), public);
    }
    assert!(public_refusal(&dir, "leak.pub").contains("a private key where a public key belongs"));
}

#[test]
fn comments_do_not_make_keys_differ() {
    let key = PrivateKey::generate(Algorithm::Ed25519).with_comment("me @ work").expect("a comment");
    let line = key.public().to_openssh();
    assert_eq!(line.split(' ').count(), 2);
    let other = PublicKey::parse(&format!("# the new one\n\n  {line} somebody else\n")).expect("a line");
    assert_eq!(other, key.public());
    assert_eq!(other.to_openssh(), line);
    assert_eq!(PrivateKey::parse(key.to_openssh().expose()).expect("read back").comment(), "me @ work");
    assert!(key.with_comment("two\nlines").is_err());
    assert!(key.with_comment(&"long".repeat(64)).is_err());
}

#[test]
fn never_overwrites_and_leaves_only_its_owner_access() {
    let dir = dir();
    let (path, key) = (dir.path().join("key"), PrivateKey::generate(Algorithm::Ed25519));
    key.write_new(&path).expect("written");
    assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, 0o600);
    let before = fs::read(&path).expect("readable");
    let refusal = text(&PrivateKey::generate(Algorithm::Ed25519).write_new(&path).expect_err("exists"));
    assert!(refusal.contains("never overwritten"), "{refusal}");
    assert_eq!(fs::read(&path).expect("readable"), before);
    let link = dir.path().join("dangling");
    symlink(dir.path().join("elsewhere"), &link).expect("linked");
    assert!(key.write_new(&link).is_err());
    assert!(key.write_new(&dir.path().join("absent/key")).is_err());
}

#[test]
fn makes_rsa_keys_of_4096_bits_that_openssl_finds_sound() {
    let dir = dir();
    let key = PrivateKey::generate(Algorithm::Rsa4096);
    assert_eq!((key.public().algorithm(), key.public().bits()), ("ssh-rsa", 4096));
    key.write_new(&dir.path().join("key")).expect("written");
    assert_eq!(PrivateKey::read(&dir.path().join("key")).expect("read back").public(), key.public());
    // Converts in place; openssl reads no key in OpenSSH's form.
    sh(&dir, "ssh-keygen -q -p -m PEM -N '' -f key");
    assert!(sh(&dir, "openssl rsa -check -noout -in key 2>&1").contains("RSA key ok"));
}

#[test]
fn debug_shows_no_private_key() {
    let key = PrivateKey::generate(Algorithm::Ed25519);
    assert_eq!(format!("{key:?}"), "PrivateKey([hidden])");
    assert_eq!(format!("{:?}", key.public()), format!("PublicKey(ssh-ed25519 {})", key.public().fingerprint()));
}

#[test]
fn fingerprints_have_one_spelling() {
    let text = fingerprint_text(&[7; 32]);
    assert_eq!(parse_fingerprint(&text).expect("its own"), [7; 32]);
    let mut last_bits = text.clone();
    last_bits.pop();
    last_bits.push('d');
    for wrong in [
        String::new(),
        text[7..].to_owned(),
        text.to_lowercase(),
        format!("{text}="),
        format!(" {text}"),
        text.replace("SHA256", "SHA512"),
        text[..text.len() - 1].to_owned(),
        last_bits,
        "MD5:00".into(),
    ] {
        assert!(parse_fingerprint(&wrong).is_err(), "{wrong}");
    }
}

#[test]
fn errors_hold_no_key_material() {
    let key = PrivateKey::generate(Algorithm::Ed25519);
    let pem = key.to_openssh().expose().clone();
    let body: Vec<_> = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    for wrong in [pem.replace('A', "!"), pem.replacen("-----END", "-----BEGIN", 1), body.join("\n"), body.join("")] {
        let private = PrivateKey::parse(&wrong).expect_err("broken");
        let public = PublicKey::parse(&wrong).expect_err("broken");
        for shown in [text(&private), text(&public), format!("{private:?}{public:?}")] {
            assert!(!body.iter().any(|line| shown.contains(&line[..16])), "{shown}");
        }
    }
}

/// Certificates within certificates, `depth` deep, as the blob of a public key.
fn nested(depth: usize) -> Vec<u8> {
    const KIND: &[u8] = b"ssh-ed25519-cert-v01@openssh.com";
    let string = |bytes: &[u8]| [&(bytes.len() as u32).to_be_bytes(), bytes].concat();
    let mut blob = string(KIND);
    for _ in 0..depth {
        let rest =
            [string(&[0; 32]), string(&[0; 32]), vec![0; 8], vec![0, 0, 0, 2], string(b""), string(b""), vec![0; 8]];
        let tail = [vec![0xff; 8], string(b""), string(b""), string(b""), string(&blob)];
        blob = [string(KIND), rest.concat(), tail.concat()].concat();
    }
    blob
}

#[test]
fn certificates_within_certificates_do_not_exhaust_the_stack() {
    let dir = dir();
    let blob = nested(2_000);
    file(&dir, "blob", 0o600, &blob);
    let base64 = sh(&dir, "openssl base64 -A -in blob");
    for kind in ["ssh-ed25519-cert-v01@openssh.com", "ssh-ed25519", "ssh-rsa"] {
        assert!(PublicKey::parse(&format!("{kind} {base64}")).is_err());
    }
    let string = |bytes: &[u8]| [&(bytes.len() as u32).to_be_bytes(), bytes].concat();
    let container =
        [OPENSSH_MAGIC.to_vec(), string(b"none"), string(b"none"), string(b""), vec![0, 0, 0, 1], string(&blob)];
    let pem = pem(&dir, &container.concat(), "OPENSSH PRIVATE KEY");
    assert!(matches!(PrivateKey::parse(&pem), Err(KeyError::Certificate(_))));
}

/// Where lengths are damaged, the library takes other parts for names, and says which it does not know.
#[test]
fn regression_a_damaged_private_key_is_not_quoted() {
    let dir = dir();
    let string = |bytes: &[u8]| [&(bytes.len() as u32).to_be_bytes(), bytes].concat();
    let public = [string(b"ssh-ed25519"), string(&[7; 32])].concat();
    let private = [vec![1; 8], string(b"hunter2\x1b[2J")].concat();
    let head = [string(b"none"), string(b"none"), string(b""), vec![0, 0, 0, 1]].concat();
    for parts in [[string(&string(b"hunter2\x1b[2J")), string(&private)], [string(&public), string(&private)]] {
        let bytes = [OPENSSH_MAGIC, &head, &parts.concat()].concat();
        let error = PrivateKey::parse(&pem(&dir, &bytes, "OPENSSH PRIVATE KEY")).expect_err("damaged");
        assert!(matches!(error, KeyError::Damaged { .. }), "{error:?}");
        assert!(!text(&error).contains("hunter2") && text(&error).contains("copy it again"), "{error}");
    }
    let line =
        format!("ssh-ed25519 {}", sh(&dir, "printf '\\000\\000\\000\\013ssh-ed25519\\377hunter2' | openssl base64 -A"));
    let error = PublicKey::parse(&line).expect_err("damaged");
    assert!(!text(&error).contains("hunter2"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn garbage_never_panics(garbage in ".{0,200}") {
        let _ = PublicKey::parse(&garbage);
        let _ = PrivateKey::parse(&garbage);
        let _ = parse_fingerprint(&garbage);
    }

    #[test]
    fn garbage_in_pem_never_panics(label in "(RSA |EC |OPENSSH |DSA |)(PRIVATE|PUBLIC) KEY", body in "[A-Za-z0-9+/=\n]{0,200}") {
        let text = format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n");
        let _ = PublicKey::parse(&text);
        let _ = PrivateKey::parse(&text);
    }

    #[test]
    fn garbage_after_a_kind_never_panics(kind in "(ssh-ed25519|ssh-rsa|ssh-dss|ecdsa-sha2-nistp256)", body in "[A-Za-z0-9+/]{0,200}") {
        let _ = PublicKey::parse(&format!("{kind} {body}"));
        let _ = PublicKey::parse(&format!("{kind} AAAA{body}"));
    }

    #[test]
    fn damaged_keys_never_panic(at in 0_usize..4096, value in any::<u8>(), cut in any::<bool>(), which in 0_usize..4) {
        let text = &samples()[which];
        let mut bytes = text.clone().into_bytes();
        let at = at % bytes.len();
        if cut {
            bytes.remove(at);
        } else {
            bytes[at] = value & 0x7f;
        }
        let text = String::from_utf8(bytes).expect("ASCII");
        let _ = PublicKey::parse(&text);
        let _ = PrivateKey::parse(&text);
    }
}

/// One key per form that has a decoder of its own.
fn samples() -> &'static [String] {
    static SAMPLES: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
    SAMPLES.get_or_init(|| {
        let dir = dir();
        let lines = [
            "ssh-keygen -q -t ed25519 -N '' -f a && cat a",
            "openssl genpkey -algorithm ed25519",
            "ssh-keygen -q -t ecdsa -m PEM -N '' -f c && cat c",
            "openssl genrsa -traditional 3072 2>/dev/null",
        ];
        lines.map(|line| sh(&dir, line)).to_vec()
    })
}

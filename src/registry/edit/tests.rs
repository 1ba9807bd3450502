//! Tests of the module above.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;
use crate::identity::{Algorithm, PrivateKey};

fn key() -> PublicKey {
    PrivateKey::generate(Algorithm::Ed25519).public()
}

fn key_of_ci() -> PublicKey {
    key()
}

fn now() -> Timestamp {
    "2026-11-21T12:00:00Z".parse().expect("a time")
}

fn agent(name: &str) -> Role {
    Role::Agent(name.parse().expect("an id"))
}

/// A registry with one agent and one principal, each with a key.
fn registry() -> (TempDir, PublicKey) {
    let dir = tempfile::tempdir().expect("a folder");
    let key = key();
    let acme = dir.path().join("organisations/acme");
    for (path, text) in [
        ("agents/prod-eu/2025.pub", key.to_openssh()),
        ("agents/prod-eu/2025.toml", "# ours\ncomment = 'the first' # said so\n".to_owned()),
        ("principals/ci/one.pub", key_of_ci().to_openssh()),
        ("principals/ci.toml", "agents = []\n".to_owned()),
    ] {
        std::fs::create_dir_all(acme.join(path).parent().expect("a parent")).expect("made");
        std::fs::write(acme.join(path), text).expect("written");
    }
    (dir, key)
}

fn addition(key: &PublicKey, role: Role) -> Addition {
    Addition {
        organisation: "acme".parse().expect("an id"),
        role,
        key: key.clone(),
        not_before: None,
        expires: None,
        comment: None,
        new: None,
        signs: None,
    }
}

/// Every file, with what it holds.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(dir).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                left.push(path);
            } else {
                found.insert(path.clone(), std::fs::read(&path).expect("read"));
            }
        }
    }
    found
}

/// As [`Editor::open`], also where it was open a moment ago: a program that another test starts meanwhile shares the lock until
/// it runs.
fn open(dir: &Path) -> Editor {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    loop {
        match Editor::open(dir) {
            Err(EditError::Lock { .. }) if std::time::Instant::now() < deadline => std::thread::yield_now(),
            opened => return opened.expect("in order"),
        }
    }
}

#[test]
fn what_may_not_be_added_is_refused_and_changes_nothing() {
    let (dir, present) = registry();
    let before = files(dir.path());
    let other = key();
    let earlier: Timestamp = "2026-11-21T11:59:59Z".parse().expect("a time");
    let later: Timestamp = "2027-11-21T11:59:59Z".parse().expect("a time");
    for (case, addition, words) in [
        ("present", addition(&present, agent("prod-eu")), "is registered in acme already, for agent prod-eu"),
        ("another holder", addition(&present, agent("prod-us")), "there is no agent prod-us in acme: say --new"),
        ("present, new", Addition { new: Some(vec![]), ..addition(&present, agent("prod-us")) }, "registered in acme"),
        ("no holder", addition(&other, Role::Principal("prod-eu".parse().expect("an id"))), "no principal prod-eu"),
        (
            "no organisation",
            Addition { organisation: "globex".parse().expect("an id"), ..addition(&other, agent("prod-eu")) },
            "there is no agent prod-eu in globex",
        ),
        ("expired", Addition { expires: Some(earlier), ..addition(&other, agent("prod-eu")) }, "expired already"),
        (
            "never",
            Addition { expires: Some(later), not_before: Some(later), ..addition(&other, agent("prod-eu")) },
            "never count",
        ),
        ("comment", Addition { comment: Some("a\nb".into()), ..addition(&other, agent("prod-eu")) }, "control"),
    ] {
        let mut editor = open(dir.path());
        let error = editor.add(&addition, now()).expect_err(case).to_string();
        assert!(error.contains(words), "{case}: {error}");
        assert_eq!(files(dir.path()), before, "{case}");
    }
    // Nor is a registry with a fault touched, or one that somebody else changes.
    let editor = open(dir.path());
    assert!(matches!(Editor::open(dir.path()), Err(EditError::Lock { .. })));
    drop(editor);
    std::fs::write(dir.path().join("stray"), "").expect("written");
    assert!(matches!(Editor::open(dir.path()), Err(EditError::Faults(_))));
}

#[test]
fn a_key_is_added_beside_others_under_a_name_of_its_own() {
    let (dir, first) = registry();
    let before = files(dir.path());
    let [second, third, of_new] = std::array::from_fn(|_| key());
    let mut editor = open(dir.path());
    let comment = "a \"quoted\" \\ word = #1";
    let expires = "2027-01-31T12:00:00Z".parse().expect("a time");
    let with =
        Addition { expires: Some(expires), comment: Some(comment.into()), ..addition(&second, agent("prod-eu")) };
    let file = editor.add(&with, now()).expect("added");
    assert_eq!(file, dir.path().join("organisations/acme/agents/prod-eu/2026-11-21.pub"));
    let again = editor.add(&addition(&third, agent("prod-eu")), now()).expect("added");
    assert_eq!(again.file_name().expect("a name"), "2026-11-21-2.pub");
    assert!(!again.with_extension("toml").exists(), "nothing is said of it");
    // A new principal of a new organisation.
    let ci = Role::Principal("ci".parse().expect("an id"));
    let new = Some(vec!["prod-*".parse().expect("a pattern")]);
    let made = Addition { organisation: "globex".parse().expect("an id"), new, ..addition(&of_new, ci.clone()) };
    editor.add(&made, now()).expect("added");

    let mut listed = list(dir.path()).expect("in order");
    let of_new = listed.pop().expect("the new one");
    assert_eq!((of_new.organisation.as_str(), &of_new.role), ("globex", &ci));
    let keys: Vec<_> = listed.iter().filter(|it| it.role == agent("prod-eu")).map(|it| it.key.key.clone()).collect();
    assert_eq!(keys.len(), 3);
    assert!([&first, &second, &third].iter().all(|key| keys.contains(key)));
    let second = listed.iter().find(|it| it.key.key == second).expect("listed");
    assert_eq!((second.key.expires, second.key.comment.as_deref()), (Some(expires), Some(comment)));
    assert_eq!(second.file, file);
    // What was there is as it was, and no half of anything beside it.
    let after = files(dir.path());
    assert!(before.iter().all(|(path, text)| after.get(path) == Some(text)));
    assert_eq!(after.len(), before.len() + 5, "{after:?}");
}

#[test]
fn a_revocation_leaves_what_else_is_said() {
    let (dir, first) = registry();
    let about = dir.path().join("organisations/acme/agents/prod-eu/2025.toml");
    std::fs::set_permissions(&about, PermissionsExt::from_mode(0o640)).expect("permissions");
    let second = key();
    let mut editor = open(dir.path());
    editor.add(&addition(&second, agent("prod-eu")), now()).expect("added");
    let by_hex = first.spki_fingerprint().expect("hex").to_uppercase().parse().expect("a fingerprint");
    let revoked = editor.revoke(&by_hex, None, now()).expect("revoked");
    assert!(!revoked.before && !revoked.last);
    assert_eq!(
        std::fs::read_to_string(&about).expect("read"),
        "# ours\ncomment = 'the first' # said so\nrevoked = true\n"
    );
    assert_eq!(std::fs::metadata(&about).expect("there").permissions().mode() & 0o777, 0o640);
    assert!(editor.revoke(&by_hex, None, now()).expect("known").before, "twice is once");
    // The last one is, too, and that is said; there was nothing beside it.
    let last = KeyName::Ssh(second.fingerprint());
    assert!(editor.revoke(&last, Some(&"acme".parse().expect("an id")), now()).expect("revoked").last);
    assert!(
        list(dir.path()).expect("in order").iter().filter(|it| it.role == agent("prod-eu")).all(|it| it.key.revoked)
    );
    // Nobody has it again.
    assert!(matches!(editor.add(&addition(&first, agent("prod-eu")), now()), Err(EditError::Present { .. })));
}

#[test]
fn which_key_is_meant_is_never_guessed() {
    let (dir, first) = registry();
    let mut editor = open(dir.path());
    let globex = Addition {
        organisation: "globex".parse().expect("an id"),
        new: Some(vec![]),
        ..addition(&first, agent("prod-eu"))
    };
    editor.add(&globex, now()).expect("a key may be registered in two organisations");
    let name = KeyName::Ssh(first.fingerprint());
    let error = editor.revoke(&name, None, now()).expect_err("two").to_string();
    assert!(error.contains("acme and globex") && error.contains("--organisation"), "{error}");
    let unknown = KeyName::Ssh(key().fingerprint());
    assert!(matches!(editor.revoke(&unknown, None, now()), Err(EditError::UnknownKey(_))));
    let elsewhere = "initech".parse().expect("an id");
    assert!(matches!(editor.revoke(&name, Some(&elsewhere), now()), Err(EditError::UnknownKey(_))));
    editor.revoke(&name, Some(&globex.organisation), now()).expect("revoked");
    let standing: Vec<_> = list(dir.path()).expect("in order").iter().map(|it| it.key.revoked).collect();
    assert_eq!(standing, [false, false, true]);
    assert!("SHA256:short".parse::<KeyName>().is_err());
    assert!("0".repeat(63).parse::<KeyName>().is_err());
}

#[test]
fn a_sidecar_is_revoked_however_it_is_written_or_not_at_all() {
    let path = Path::new("x.toml");
    for (before, after) in [
        ("", "revoked = true\n"),
        ("comment = 'x'", "comment = 'x'\nrevoked = true\n"),
        ("revoked = false # false?\n", "revoked = true # false?\n"),
        ("\"revoked\"=false\r\ncomment = 'x'\r\n", "\"revoked\"=true\r\ncomment = 'x'\r\n"),
        ("comment = '''\nrevoked = false'''\nrevoked = false\n", "comment = '''\nrevoked = false'''\nrevoked = true\n"),
    ] {
        assert_eq!(with_revoked(path, before).as_deref(), Some(after), "{before:?}");
    }
    assert_eq!(with_revoked(path, "comment = "), None);
    assert_eq!(with_revoked(path, "[table]\n"), None);
}

#[test]
fn whoever_is_killed_while_a_key_is_added_leaves_a_registry_in_order() {
    let expires = Some("2027-01-31T12:00:00Z".parse().expect("a time"));
    let ci = Role::Principal("new".parse().expect("an id"));
    let mut seen = Vec::new();
    for (role, organisation, new) in
        [(agent("prod-eu"), "acme", None), (agent("new"), "globex", Some(vec![])), (ci, "globex", Some(vec![]))]
    {
        for last in 0.. {
            let (dir, _) = registry();
            let key = key();
            let organisation = organisation.parse().expect("an id");
            let adding = Addition { organisation, expires, new: new.clone(), ..addition(&key, role.clone()) };
            let editor = open(dir.path());
            let (_, steps) = editor.steps(&adding, now()).expect("steps");
            if last > steps.len() {
                break;
            }
            // No more is made, and nothing taken back.
            let mut made = Made::default();
            steps[..last].iter().for_each(|step| made.step(step).expect("made"));
            made.keep();
            drop(editor);
            let all = list(dir.path()).unwrap_or_else(|faults| panic!("{role} after {last} of {steps:?}: {faults}"));
            let found: Vec<_> = all.iter().filter(|it| it.key.key == key).map(|it| it.key.expires).collect();
            assert_eq!(found, if last == steps.len() { vec![expires] } else { vec![] }, "{role} after {last}");
            seen.push(last);
            // And it is added the next time, under whatever name.
            if last < steps.len() {
                let mut editor = open(dir.path());
                editor.add(&Addition { new: Some(vec![]), ..adding }, now()).expect("added");
            }
        }
    }
    assert!(seen.len() > 15, "{seen:?}");
}

#[test]
fn what_cannot_be_added_after_all_leaves_nothing() {
    let (dir, _) = registry();
    let before = files(dir.path());
    let new = |role: Role| Addition {
        organisation: "globex".parse().expect("an id"),
        expires: Some("2027-01-31T12:00:00Z".parse().expect("a time")),
        new: Some(vec![]),
        ..addition(&key(), role)
    };
    let mut editor = open(dir.path());
    // What somebody else has put there meanwhile, who does not know of the lock.
    std::fs::write(dir.path().join("stray"), "").expect("written");
    for role in [agent("one"), Role::Principal("one".parse().expect("an id"))] {
        assert!(matches!(editor.add(&new(role), now()), Err(EditError::Broken(_))));
        std::fs::remove_file(dir.path().join("stray")).expect("removed");
        assert_eq!(files(dir.path()), before);
        assert!(!dir.path().join("organisations/globex").exists());
        list(dir.path()).expect("in order");
        std::fs::write(dir.path().join("stray"), "").expect("written");
    }
}

fn signs(name: &str, principals: &[&str]) -> Option<Signs> {
    let principals = principals.iter().map(|pattern| pattern.parse().expect("a pattern")).collect();
    Some(Signs { name: name.into(), principals })
}

/// The keys of acme that sign tokens: the names of their files, for whom, and until when.
fn signers(dir: &Path) -> Vec<(String, usize, Option<Timestamp>)> {
    let (snapshot, files) = load_with_files(dir).expect("in order");
    let (id, held) = snapshot.organisations().iter().next().expect("acme");
    let signer = |signer: &crate::registry::TokenKey| {
        let file = &files[id][&signer.registered.key.fingerprint()];
        let name = file.file_stem().expect("a name").to_string_lossy().into_owned();
        (name, signer.principals.len(), signer.registered.expires)
    };
    held.token_keys.iter().map(signer).collect()
}

#[test]
fn a_key_for_tokens_is_registered_only_with_whom_it_signs_for() {
    let (dir, _) = registry();
    let before = files(dir.path());
    let key = key();
    let rsa = PublicKey::parse(&PrivateKey::generate(Algorithm::Rsa4096).public().to_openssh()).expect("a key");
    let adding = addition(&key, Role::TokenKey);
    for (case, addition, words) in [
        ("nothing is said", adding.clone(), "may sign for nobody"),
        ("nobody", Addition { signs: signs("ci", &[]), ..adding.clone() }, "may sign for nobody"),
        ("RSA", Addition { signs: signs("ci", &["ci"]), ..addition(&rsa, Role::TokenKey) }, "Ed25519 keys alone"),
        (
            "no organisation",
            Addition { organisation: "globex".parse().expect("an id"), signs: signs("ci", &["ci"]), ..adding.clone() },
            "in globex: say --new",
        ),
    ] {
        let error = open(dir.path()).add(&addition, now()).expect_err(case).to_string();
        assert!(error.contains(words), "{case}: {error}");
        assert_eq!(files(dir.path()), before, "{case}");
    }
    let good = Addition { signs: signs("ci", &["ci-*", "x"]), ..adding };
    let file = open(dir.path()).add(&good, now()).expect("added");
    assert_eq!(file, dir.path().join("organisations/acme/token-keys/ci.pub"));
    assert_eq!(std::fs::read_to_string(file.with_extension("toml")).expect("read"), "principals = [\"ci-*\", \"x\"]\n");
    // A second one of the name lies beside it.
    let other = Addition { signs: signs("ci", &["ci-*"]), ..addition(&key_of_ci(), Role::TokenKey) };
    open(dir.path()).add(&other, now()).expect("added");
    let [first, second] = &signers(dir.path())[..] else { panic!("{:?}", signers(dir.path())) };
    assert_eq!((first.0.as_str(), second.0.as_str()), ("ci", "ci-2026-11-21"));
}

#[test]
fn a_key_for_tokens_takes_the_place_of_others_of_its_name_which_end_later_and_never_later_than_they_did() {
    let (dir, _) = registry();
    let folder = dir.path().join("organisations/acme/token-keys");
    let at = |text: &str| -> Timestamp { text.parse().expect("a time") };
    let [first, second, third, other] = std::array::from_fn(|_| key());
    let with = |key: &PublicKey| addition(key, Role::TokenKey);
    let succeed = |key: &PublicKey, name: &str, until: &str| {
        open(dir.path()).succeed(&with(key), name, at(until), now()).map_err(|error| error.to_string())
    };
    assert!(succeed(&second, "ci", "2026-11-22T12:00:00Z").expect_err("none").contains("has no key ci"));
    for (key, name, principals) in [(&first, "ci", &["ci-*"][..]), (&other, "ci-other", &["x"])] {
        let adding = Addition { signs: signs(name, principals), ..with(key) };
        open(dir.path()).add(&adding, now()).expect("added");
    }
    let about = folder.join("ci.toml");
    let before = "principals = ['ci-*'] # them\nrevoked_tokens = []\ncomment = 'the first'";
    std::fs::write(&about, before).expect("written");

    let done = succeed(&second, "ci", "2026-11-22T12:00:00Z").expect("in its place");
    assert_eq!(done.file, Some(folder.join("ci-2026-11-21.pub")));
    assert_eq!(done.replaced, [(first.fingerprint(), at("2026-11-22T12:00:00Z"))]);
    assert_eq!(std::fs::read_to_string(&about).expect("read"), format!("{before}\nexpires = 2026-11-22T12:00:00Z\n"));
    // Again: later is never, sooner is.
    let done = succeed(&second, "ci", "2026-11-23T12:00:00Z").expect("again");
    assert_eq!((done.file, done.replaced[0].1), (None, at("2026-11-22T12:00:00Z")));
    let done = succeed(&second, "ci", "2026-11-21T13:00:00Z").expect("sooner");
    assert_eq!(done.replaced, [(first.fingerprint(), at("2026-11-21T13:00:00Z"))]);
    // A third one: both have an end then, and the other name is not touched.
    let done = succeed(&third, "ci", "2026-11-25T12:00:00Z").expect("the next");
    assert_eq!(done.file, Some(folder.join("ci-2026-11-21-2.pub")));
    let all = signers(dir.path());
    let ends: Vec<_> = all.iter().map(|(name, number, end)| (name.as_str(), *number, *end)).collect();
    assert_eq!(
        ends,
        [
            ("ci", 1, Some(at("2026-11-21T13:00:00Z"))),
            ("ci-2026-11-21", 1, Some(at("2026-11-25T12:00:00Z"))),
            ("ci-2026-11-21-2", 1, None),
            ("ci-other", 1, None),
        ]
    );
    // What has another holder, or is over, takes nobody's place; and what is written in a way of its own is left to people.
    assert!(
        succeed(&other, "ci", "2026-11-25T12:00:00Z").expect_err("taken").contains("is registered in acme already")
    );
    std::fs::write(folder.join("ci-2026-11-21-2.toml"), "principals = ['ci-*', 'more']\n").expect("written");
    assert!(
        succeed(&key(), "ci", "2026-11-25T12:00:00Z").expect_err("differ").contains("sign for different principals")
    );
    // Nothing is changed for a key that signs for others, that has an end before theirs, or where one would never count.
    let unchanged = |key: &PublicKey, words: &str| {
        let before = files(dir.path());
        let error = succeed(key, "ci", "2026-11-25T12:00:00Z").expect_err(words);
        assert!(error.contains(words), "{error}");
        assert_eq!(files(dir.path()), before, "{words}");
    };
    unchanged(&third, "signs for other principals");
    std::fs::write(folder.join("ci-2026-11-21-2.toml"), "principals = ['ci-*']\n").expect("written");
    unchanged(&second, "an end of its own");
    let later = "principals = ['ci-*']\nnot_before = 2026-12-01T00:00:00Z\n";
    std::fs::write(folder.join("ci-2026-11-21-2.toml"), later).expect("written");
    unchanged(&key(), "does not count before");
    std::fs::write(folder.join("ci-2026-11-21-2.toml"), "principals = ['ci-*']\nrevoked = true\n").expect("written");
    assert!(succeed(&third, "ci", "2026-11-25T12:00:00Z").expect_err("revoked").contains("is revoked"));
}

#[test]
fn a_sidecar_gets_an_end_however_it_is_written_or_none_at_all() {
    let (path, ends) = (Path::new("x.toml"), "2026-11-22T12:00:00Z".parse().expect("a time"));
    for (before, after) in [
        ("", "expires = 2026-11-22T12:00:00Z\n"),
        ("principals = ['x']", "principals = ['x']\nexpires = 2026-11-22T12:00:00Z\n"),
        ("expires = 2027-01-01T00:00:00Z # then\n", "expires = 2026-11-22T12:00:00Z # then\n"),
        ("expires=2027-01-01 00:00:00Z\r\ncomment = 'x'\r\n", "expires=2026-11-22T12:00:00Z\r\ncomment = 'x'\r\n"),
    ] {
        assert_eq!(with_expires(path, before, ends).as_deref(), Some(after), "{before:?}");
    }
    assert_eq!(with_expires(path, "[table]\n", ends), None);
    assert_eq!(with_expires(path, "expires = ", ends), None);
}

#[test]
fn a_name_is_that_of_a_file_and_of_what_came_in_its_place() {
    for (stem, name, same) in [
        ("ci", "ci", true),
        ("ci-2026-11-21", "ci", true),
        ("ci-2026-11-21-2", "ci", true),
        ("ci-2026-11-21", "ci-2026-11-21", true),
        ("ci-2026-11-21-x", "ci", false),
        ("ci-2026-13-41", "ci", false),
        ("ci-2026-11-2", "ci", false),
        ("ci-other", "ci", false),
        ("ci-", "ci", false),
        ("cix", "ci", false),
        ("ci", "ci-2026-11-21", false),
        ("ci-2026-11-2ü", "ci", false),
        ("", "ci", false),
    ] {
        assert_eq!(is_of(stem, name), same, "{stem} {name}");
    }
}

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

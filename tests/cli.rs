//! The command line as a user meets it: the built program, its two streams and its exit codes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

/// Runs a shell line in `dir`, where `caponier` is the program under test.
fn sh(dir: &Path, line: &str) -> Output {
    let line = format!("caponier() {{ '{}' \"$@\"; }}; {line}", env!("CARGO_BIN_EXE_caponier"));
    Command::new("sh").args(["-c", &line]).current_dir(dir).output().expect("sh runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn dir() -> tempfile::TempDir {
    tempfile::TempDir::new().expect("a temporary directory")
}

#[test]
fn usage_errors_end_with_code_2() {
    let dir = dir();
    for line in [
        "caponier",
        "caponier frobnicate",
        "caponier keys",
        "caponier keys fingerprint",
        "caponier keys generate --algorithm dsa",
        "caponier keys generate --comment \"$(printf 'two\\nlines')\"",
        "caponier keys generate --unknown",
    ] {
        let output = sh(dir.path(), line);
        assert_eq!(output.status.code(), Some(2), "{line}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{line}");
        assert_ne!(stderr(&output), "", "{line}");
    }
    assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 0, "a refused command left files behind");
}

#[test]
fn bad_key_files_end_with_code_2_and_do_not_hide_the_good_ones() {
    let dir = dir();
    let output = sh(
        dir.path(),
        "caponier keys generate --output good >/dev/null; cp good open; chmod 644 open; echo rubbish > bad
         caponier keys fingerprint bad good.pub absent open",
    );
    assert_eq!(output.status.code(), Some(2));
    assert!(stdout(&output).contains("good.pub\n"), "{}", stdout(&output));
    let errors = stderr(&output);
    let lines: Vec<_> = errors.lines().collect();
    assert_eq!(lines.len(), 3, "{errors}");
    for (line, words) in lines.iter().zip(["key file bad: ", "key file absent: ", "chmod 600 open"]) {
        assert!(line.starts_with("caponier: ") && line.contains(words), "{line}");
    }
}

#[test]
fn generation_overwrites_nothing_and_leaves_no_half_pair() {
    let dir = dir();
    for (existing, other) in [("one", "one.pub"), ("two.pub", "two")] {
        let output =
            sh(dir.path(), &format!("echo precious > {existing}; caponier keys generate -o {}", &existing[..3]));
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(&format!("key file {existing}: is there already")), "{}", stderr(&output));
        assert_eq!(fs::read_to_string(dir.path().join(existing)).expect("still there"), "precious\n");
        assert!(!dir.path().join(other).exists());
    }
    let output = sh(dir.path(), "caponier keys generate --output absent/key");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("key file absent/key: cannot be written: No such file"), "{}", stderr(&output));
}

#[test]
fn generated_keys_are_what_ssh_keygen_says_they_are() {
    let dir = dir();
    let output = sh(dir.path(), "umask 0; caponier keys generate --output key --comment 'me @ work'");
    assert!(output.status.success(), "{}", stderr(&output));
    let mode = |name: &str| fs::metadata(dir.path().join(name)).expect("made").permissions().mode() & 0o7777;
    assert_eq!((mode("key"), mode("key.pub")), (0o600, 0o644));
    let listed = stdout(&sh(dir.path(), "ssh-keygen -lf key.pub; ssh-keygen -lf key"));
    let fingerprint = listed.split(' ').nth(1).expect("a fingerprint").to_owned();
    assert_eq!(listed.matches(&format!("256 {fingerprint} me @ work (ED25519)")).count(), 2, "{listed}");
    assert!(stdout(&output).contains(&fingerprint), "{}", stdout(&output));

    let json = sh(dir.path(), "caponier keys fingerprint --json key key.pub");
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let keys = value.as_array().expect("an array");
    assert_eq!(keys.len(), 2);
    for (key, private) in keys.iter().zip([true, false]) {
        assert_eq!(key["fingerprint"], fingerprint);
        assert_eq!(key["algorithm"], "ssh-ed25519");
        assert_eq!(key["private"], private);
        assert_eq!(key["spki_sha256"].as_str().map(str::len), Some(64));
    }
}

/// A registry with one agent and one principal, and key pairs beside it.
const REGISTRY: &str = "set -e
    for name in first second ci; do caponier keys generate -o $name --comment $name > /dev/null; done
    mkdir -p keys/organisations
    caponier keys add --registry keys agent acme/prod-eu first.pub --new > /dev/null
    caponier keys add --registry keys principal acme/ci ci.pub --new --agents 'prod-*' > /dev/null
    fingerprint() { ssh-keygen -lf $1 | cut -d' ' -f2; }
    ";

#[test]
fn keys_of_a_registry_are_added_listed_and_revoked() {
    let dir = dir();
    let run = |line: &str| sh(dir.path(), &format!("{}{line}", if line.contains("set +e") { "" } else { "set -e\n" }));
    let made = sh(dir.path(), REGISTRY);
    assert!(made.status.success(), "{}", stderr(&made));
    let listed = |arguments: &str| -> Vec<serde_json::Value> {
        let output = run(&format!("caponier keys list --registry keys --json {arguments}"));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", stderr(&output)))
    };
    let keys = listed("");
    assert_eq!(keys.len(), 2);
    assert_eq!(
        (&keys[0]["role"], &keys[0]["name"], &keys[0]["state"]),
        (&"agent".into(), &"prod-eu".into(), &"good".into())
    );
    assert!(listed("globex").is_empty());

    // What is refused changes nothing and says why.
    for (line, code, words) in [
        ("caponier keys add --registry keys agent acme/prod-eu first.pub", 1, "is registered in acme already"),
        ("caponier keys add --registry keys principal acme/prod-eu second.pub", 1, "say --new"),
        ("caponier keys add --registry keys agent acme second.pub", 2, "ORG/AGENT"),
        ("caponier keys add --registry keys agent acme/prod-eu second", 2, "a private key where a public key belongs"),
        ("caponier keys add --registry keys agent acme/prod-eu second.pub --expires tomorrow", 2, "--expires"),
        (
            "caponier keys add --registry keys agent acme/prod-eu second.pub --expires 2001-01-01T00:00:00Z",
            1,
            "expired",
        ),
        ("caponier keys add --registry absent agent acme/prod-eu second.pub", 2, "could not lock the registry"),
        ("caponier keys revoke --registry keys SHA256:short", 2, "is not a fingerprint"),
        (
            "caponier keys revoke --registry keys $(ssh-keygen -lf second.pub | cut -d' ' -f2)",
            1,
            "no key in the registry",
        ),
        ("caponier keys rotate", 2, "--registry"),
        ("caponier keys rotate --registry keys acme/prod-eu second.pub --within 5", 2, "10m"),
        ("caponier keys rotate --registry keys acme/prod-eu second.pub --admin absent", 1, "could not reach a gateway"),
        ("caponier keys rotate --config first", 2, "not TOML"),
    ] {
        let output = sh(dir.path(), line);
        assert_eq!(output.status.code(), Some(code), "{line}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{line}: {}", stderr(&output));
        assert_eq!(listed("").len(), 2, "{line}");
    }

    let added = run(
        "caponier keys add --registry keys agent acme/prod-eu second.pub --expires 2099-01-01T00:00:00Z --comment next",
    );
    assert!(added.status.success(), "{}", stderr(&added));
    let second = listed("acme").into_iter().find(|key| key["comment"] == "next").expect("the second");
    assert_eq!((&second["expires"], &second["bits"]), (&"2099-01-01T00:00:00Z".into(), &256.into()));
    let hex = second["spki_sha256"].as_str().expect("hex");
    let revoked = run(&format!("caponier keys revoke --registry keys {hex}"));
    assert!(revoked.status.success() && stderr(&revoked).is_empty(), "{}", stderr(&revoked));
    let of_second = || listed("").into_iter().find(|key| key["comment"] == "next").expect("the second");
    assert_eq!((&of_second()["state"], &of_second()["expires"]), (&"revoked".into(), &"2099-01-01T00:00:00Z".into()));
    let last = run("caponier keys revoke --registry keys $(ssh-keygen -lf first.pub | cut -d' ' -f2)");
    assert!(last.status.success() && stderr(&last).contains("no key left that counts"), "{}", stderr(&last));
    let again = run("caponier keys revoke --registry keys $(ssh-keygen -lf first.pub | cut -d' ' -f2)");
    assert!(stdout(&again).contains("was revoked before"), "{}", stdout(&again));

    // Others could write there.
    let open = run("chmod o+w keys/organisations/acme/agents/prod-eu; caponier keys add --registry keys agent acme/prod-eu ci.pub || true
        rm -f ci ci.pub; caponier keys generate -o ci >/dev/null; caponier keys add --registry keys agent acme/prod-eu ci.pub");
    assert!(
        stderr(&open).contains("others than its owner may write keys/organisations/acme/agents/prod-eu"),
        "{}",
        stderr(&open)
    );
}

#[test]
fn a_loopback_door_that_the_registry_refuses_is_warned_of() {
    let dir = dir();
    let config = "[gateway]\nlisten = [\"127.0.0.1:0\"]\nhost_key = \"first\"\nregistry = \"keys\"\n[audit]\nstdout = true\n\
        [[organisation]]\nid = \"acme\"\nlogin_key = \"second\"\n\
        [[local]]\nlisten = \"127.0.0.1:1\"\nagent = \"acme/AGENT\"\ntarget = \"db:5432\"\nprincipal = \"PRINCIPAL\"\n";
    assert!(sh(dir.path(), REGISTRY).status.success());
    for (agent, principal, words) in [
        ("prod-eu", "ci", ""),
        ("prod-us", "ci", "no agent acme/prod-us"),
        ("prod-eu", "nobody", "no principal nobody in acme"),
    ] {
        let text = config.replace("AGENT", agent).replace("PRINCIPAL", principal);
        fs::write(dir.path().join("gateway.toml"), text).expect("written");
        let output = sh(dir.path(), "caponier check gateway.toml");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        // That nobody signs this trail is said of each.
        let said = stderr(&output);
        let besides: Vec<_> = said.lines().filter(|line| !line.contains("the trail's heads are not signed")).collect();
        assert_eq!(besides.is_empty(), words.is_empty(), "{said}");
        assert!(said.contains(words), "{}", stderr(&output));
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    let dir = dir();
    let output = sh(dir.path(), "caponier --version");
    assert_eq!((output.status.code(), stdout(&output)), (Some(0), format!("caponier {}\n", env!("CARGO_PKG_VERSION"))));
    for line in ["caponier --help", "caponier keys --help", "caponier keys generate --help"] {
        let output = sh(dir.path(), line);
        assert_eq!(output.status.code(), Some(0));
        assert!(stdout(&output).contains("Example:\n"), "{}", stdout(&output));
    }
}

#[test]
fn a_reader_that_goes_away_or_a_full_disk_causes_no_panic() {
    let dir = dir();
    let made = "caponier keys generate -o key >/dev/null";
    // Standard output is a pipe whose reader is gone before the program starts.
    let gone =
        sh(dir.path(), &format!("{made}; {{ read -r _; caponier keys fingerprint key.pub; echo $? >&2; }} | true"));
    assert!(!stderr(&gone).contains("panicked"), "{}", stderr(&gone));
    let full = sh(dir.path(), "caponier keys fingerprint key.pub >/dev/full");
    assert_eq!(full.status.code(), Some(1));
    assert!(stderr(&full).contains("standard output"), "{}", stderr(&full));
    let mute = sh(dir.path(), "caponier keys fingerprint absent 2>&-");
    assert_eq!(mute.status.code(), Some(2));
}

#[test]
fn manual_pages_and_completions_are_what_their_readers_take() {
    let dir = dir();
    let output = sh(
        dir.path(),
        "set -e
         caponier generate man man1
         for shell in bash zsh fish; do caponier generate completions $shell >$shell; done
         bash -n bash; zsh -n zsh; fish -n fish",
    );
    assert!(output.status.success(), "{}", stderr(&output));

    // The date is left out, so that a page is the same whenever it is made; the rest is how the library spaces values out.
    let output = sh(dir.path(), "mandoc -T lint -W warning man1/*.1");
    let faults: Vec<_> = stdout(&output)
        .lines()
        .filter(|line| {
            !["missing date, using", "skipping paragraph macro: br"].iter().any(|known| line.contains(known))
        })
        .map(str::to_owned)
        .collect();
    assert!(stderr(&output).is_empty() && faults.is_empty(), "{}{faults:?}", stderr(&output));
    let page = stdout(&sh(dir.path(), "mandoc -T ascii man1/caponier-keys-add.1 | tr -d '\\b' "));
    assert!(page.contains("caponier keys add --registry keys agent acme/prod-eu"), "{page}");

    let offered = |line: &str| stdout(&sh(dir.path(), line));
    let words = offered(
        "bash -c '. ./bash; COMP_WORDS=(caponier keys r); COMP_CWORD=2; _caponier caponier r keys; echo ${COMPREPLY[@]}'",
    );
    assert_eq!(words, "revoke rotate\n");
    let words = offered("HOME=$PWD fish -c 'source fish; complete -C \"caponier kub\"'");
    assert!(words.starts_with("kubeconfig\t"), "{words}");
}

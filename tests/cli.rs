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

//! The properties that `scripts/fuzz` tries with mutated inputs for as long as it is let, here for a moment each: with bytes
//! at random, with the seeds of the fuzz targets as they are, and with seeds that were damaged a little.

#[path = "../fuzz/src/lib.rs"]
mod properties;

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Where something is done to a seed, and what.
#[derive(Debug, Clone)]
enum Damage {
    Change(usize, u8),
    Insert(usize, u8),
    Remove(usize, usize),
    Repeat(usize, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    // Most of what the readers take apart by is among these.
    let byte = || prop_oneof![any::<u8>(), prop::sample::select(b"/:.*%@ \n\r\0\"=[]{}-_,09azAZ".to_vec())];
    prop_oneof![
        (any::<usize>(), byte()).prop_map(|(at, byte)| Damage::Change(at, byte)),
        (any::<usize>(), byte()).prop_map(|(at, byte)| Damage::Insert(at, byte)),
        (any::<usize>(), 1..16_usize).prop_map(|(at, length)| Damage::Remove(at, length)),
        (any::<usize>(), 1..64_usize).prop_map(|(at, length)| Damage::Repeat(at, length)),
    ]
}

fn damaged(seed: &[u8], damages: &[Damage]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for damage in damages {
        let (Damage::Change(at, _) | Damage::Insert(at, _) | Damage::Remove(at, _) | Damage::Repeat(at, _)) = damage;
        let at = at % (bytes.len() + 1);
        let until = |length: usize| (at + length).min(bytes.len());
        match damage {
            Damage::Change(_, byte) if at < bytes.len() => bytes[at] = *byte,
            Damage::Change(_, byte) | Damage::Insert(_, byte) => bytes.insert(at, *byte),
            Damage::Remove(_, length) => drop(bytes.drain(at..until(*length))),
            Damage::Repeat(_, length) => {
                let piece = bytes[at..until(*length)].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
    bytes
}

/// Bytes that are shown so that they can be read.
struct Input(Vec<u8>);

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

fn seeds(folder: &Path) -> Vec<Vec<u8>> {
    let files = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = files.map(|file| file.expect("a file").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} has no seeds", folder.display());
    paths.iter().map(|path| fs::read(path).expect("a seed")).collect()
}

fn make(what: &str, folder: &Path) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/fuzz");
    let made = Command::new(script).arg(what).arg(folder).output().expect("the script runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

fn committed(target: &str) -> Vec<Vec<u8>> {
    seeds(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target))
}

/// Tries a property with so many damaged seeds, and as many inputs at random.
fn holds(property: fn(&[u8]), seeds: Vec<Vec<u8>>, cases: u32) {
    for seed in &seeds {
        property(seed);
    }
    let config = ProptestConfig { failure_persistence: None, cases, ..ProptestConfig::default() };
    let strategy = prop_oneof![
        (prop::sample::select(seeds), vec(damage(), 1..4)).prop_map(|(seed, damages)| damaged(&seed, &damages)),
        vec(any::<u8>(), 0..300),
        ".{0,80}".prop_map(String::into_bytes),
    ];
    TestRunner::new(config)
        .run(&strategy.prop_map(Input), |input| {
            property(&input.0);
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn targets_hold() {
    holds(properties::target::holds, committed("target"), 20_000);
}

#[test]
fn identification_strings_hold() {
    holds(properties::identification::holds, committed("identification"), 5_000);
}

#[test]
fn what_ends_of_a_link_say_holds() {
    holds(properties::wire::holds, committed("wire"), 10_000);
}

#[test]
fn trails_that_are_verified_hold() {
    holds(properties::verify::holds, committed("verify"), 3_000);
}

#[test]
fn rules_hold() {
    holds(properties::policy::holds, committed("policy"), 1_000);
}

#[test]
fn balancers_headers_hold() {
    holds(properties::proxied::holds, committed("proxied"), 5_000);
}

#[test]
fn first_bytes_hold() {
    holds(properties::sniff::holds, committed("sniff"), 5_000);
}

#[test]
fn heads_of_requests_hold() {
    holds(properties::http::holds, committed("http"), 5_000);
}

/// Certificates are not committed either.
#[test]
fn certificates_hold() {
    let folder = tempfile::tempdir().expect("a folder");
    make("--certificates", folder.path());
    holds(properties::certificates::holds, seeds(folder.path()), 1_000);
}

/// Keys are not committed; the script that fuzzes makes them.
#[test]
fn keys_hold() {
    let folder = tempfile::tempdir().expect("a folder");
    make("--keys", folder.path());
    holds(properties::keys::holds, seeds(folder.path()), 600);
}

/// Each target of the fuzzer has a test here.
#[test]
fn every_fuzz_target_has_a_twin() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/targets");
    let own = include_str!("properties.rs");
    for file in fs::read_dir(folder).expect("the targets") {
        let path = file.expect("a file").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        assert!(own.contains(&format!("properties::{name}::holds")), "no twin of {name}");
        let text = fs::read_to_string(&path).expect("a target");
        assert!(text.contains(&format!("properties::{name}::holds(bytes)")), "{name} fuzzes something else");
    }
}

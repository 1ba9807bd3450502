//! What the documents point to is there: every file that SECURITY.md names, and every test, in the module that it names it for.

use std::fs;
use std::path::Path;

/// What stands in backticks in a document, with the text between it and what stood there before.
fn quoted(text: &str) -> Vec<(&str, &str)> {
    let parts: Vec<&str> = text.split('`').collect();
    parts.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
}

/// Whether it is a path of this repository: what has its place there, and not something that only looks like it.
fn is_path(word: &str) -> bool {
    let rooted =
        ["src/", "tests/", "scripts/", "benches/", "deploy/", "fuzz/"].iter().any(|root| word.starts_with(root));
    rooted && word.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
}

fn is_identifier(word: &str) -> bool {
    word.contains('_') && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// Whether nothing but an enumeration's signs and words lies between two names: they belong together.
fn joins(between: &str) -> bool {
    between.split_whitespace().all(|word| [",", ":", "and", ", and", "with"].contains(&word))
}

/// The file's text, with that of what lies in the folder beside it: a module is named as a whole.
fn with_subtree(root: &Path, path: &str) -> Option<String> {
    let text = fs::read_to_string(root.join(path)).ok()?;
    let beside = root.join(path.strip_suffix(".rs").unwrap_or(path));
    Some(if beside.is_dir() { text + &everything(&beside) } else { text })
}

fn everything(folder: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            all.push_str(&everything(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all.push_str(&fs::read_to_string(&path).expect("a source"));
        }
    }
    all
}

/// What a document names and is not there.
fn missing(root: &Path, document: &str) -> Vec<String> {
    let all = everything(&root.join("src")) + &everything(&root.join("tests"));
    let mut faults = Vec::new();
    // The file that the names which follow belong to.
    let mut file: Option<(&str, String)> = None;
    for (between, word) in quoted(document) {
        if is_path(word) {
            file = None;
            match with_subtree(root, word) {
                Some(text) => file = Some((word, text)),
                None if root.join(word).exists() => {}
                None => faults.push(format!("{word} does not exist")),
            }
            continue;
        }
        if !joins(between) {
            file = None;
        }
        if !is_identifier(word) {
            file = None;
            continue;
        }
        match &file {
            Some((_, text)) if text.contains(&format!("fn {word}(")) => {}
            Some((path, _)) => faults.push(format!("{path} has no {word}")),
            // A key of a configuration is short; whatever is longer can only be a test.
            None if word.split('_').count() < 5 || all.contains(&format!("fn {word}(")) => {}
            None => faults.push(format!("nothing is called {word}")),
        }
    }
    faults
}

#[test]
fn security_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = fs::read_to_string(root.join("SECURITY.md")).expect("SECURITY.md");
    assert!(document.matches("tests/e2e/").count() > 10, "it names tests by their files");
    assert_eq!(missing(root, &document), Vec::<String>::new());
}

#[test]
fn what_is_not_there_is_found() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = "security_names_tests_that_exist";
    let document = format!(
        "(`tests/documents.rs`, `{own}`), `tests/documents.rs`:\n`{own}`, `a_test_of_old`; `tests/nothing.rs` and\n\
         `accept_from`, and `tests/documents.rs` is not where `login_key` stands. `a_name_of_nobody_at_all`"
    );
    let found = missing(root, &document);
    let expected = [
        "tests/documents.rs has no a_test_of_old",
        "tests/nothing.rs does not exist",
        "nothing is called a_name_of_nobody_at_all",
    ];
    assert_eq!(found, expected);
}

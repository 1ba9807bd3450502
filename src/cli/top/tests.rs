//! What is shown, at several sizes, and what keys do.

use std::collections::BTreeMap;

use jiff::Timestamp;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::model::{Model, Next};
use super::view::{bytes, clean};
use super::{picture, size, take};
use crate::gateway::{Carrier, ForwardRow, Happened, Status, Totals};
use std::process::Stdio;
use std::time::{Duration, Instant};

fn carrier(agent: &str, replica: Option<&str>, state: &str, live: usize, to_target: u64) -> Carrier {
    Carrier {
        agent: agent.to_owned(),
        replica: replica.map(str::to_owned),
        state: state.to_owned(),
        since: replica.map(|_| Timestamp::UNIX_EPOCH),
        live,
        opened: 10,
        to_target,
        from_target: 0,
    }
}

fn status(to_target: u64) -> Status {
    let time: Timestamp = "2026-11-21T10:00:00Z".parse().expect("a time");
    Status {
        version: "0.1.0".to_owned(),
        time,
        started: "2026-11-21T07:00:00Z".parse().expect("a time"),
        state: "serving".to_owned(),
        recording: true,
        totals: Totals {
            links: 2,
            live: 7,
            opened: 9,
            failed: 1,
            to_target,
            from_target: 0,
            denied: BTreeMap::from([("no_grant".to_owned(), 3)]),
            refused: 12,
        },
        agents: vec![
            carrier("acme/prod-eu", Some("host-1"), "active", 2, to_target),
            carrier("acme/prod-us", Some("host-2"), "unanswering", 5, 0),
            carrier("globex/lab", None, "never linked", 0, 0),
        ],
        left_out: 0,
        forwards: vec![ForwardRow {
            number: 1,
            forward: "0123456789abcdef".to_owned(),
            replica: Some("host-1".to_owned()),
            principal: "ci".to_owned(),
            client: "10.0.0.1:1".to_owned(),
            door: "ssh".to_owned(),
            target: "evil\u{1b}[2J\u{202e}:1".to_owned(),
            since: time,
            to_target: 1_234_567,
            from_target: 12,
        }],
        more_forwards: false,
        events: vec![Happened {
            at: time,
            event: "link.up".to_owned(),
            agent: Some("acme/prod-eu".to_owned()),
            detail: "host-1".to_owned(),
        }],
    }
}

fn model() -> Model {
    let mut model = Model::new("/run/x.sock", None);
    let now = Instant::now();
    model.learn(status(0), now);
    model.learn(status(2_000_000), now + Duration::from_secs(1));
    model
}

fn press(model: &mut Model, code: KeyCode) -> Next {
    model.press(KeyEvent::new(code, KeyModifiers::NONE))
}

#[test]
fn all_that_matters_fits_eighty_columns_and_twenty_four_lines() {
    let text = picture(&mut model(), (80, 24)).expect("a picture");
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 24);
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{text}");
    for told in [
        "caponier top  /run/x.sock  0.1.0  up 3h  serving",
        "links 2  forwards 7",
        "to targets 2.0M/s",
        "denied 3: no_grant 3",
        "acme/prod-eu",
        "host-1",
        "never linked",
        "unanswering",
        "OPENS/s",
        "10:00:00 link.up acme/prod-eu: host-1",
        "q quit",
    ] {
        assert!(text.contains(told), "{told}: {text}");
    }
    for (columns, lines) in [(20, 5), (40, 12), (200, 60)] {
        assert!(picture(&mut model(), (columns, lines)).expect("a picture").contains("caponier top"));
    }
}

#[test]
fn forwards_are_shown_of_the_selected_agent_and_control_characters_are_not() {
    let mut model = model();
    assert_eq!(press(&mut model, KeyCode::Enter), Next::Ask);
    assert_eq!(model.wanted().agent.as_deref(), Some("acme/prod-eu"));
    model.learn(status(0), Instant::now());
    let text = picture(&mut model, (80, 24)).expect("a picture");
    assert!(
        text.contains("acme/prod-eu: 1 forwards") && text.contains("0123456789") && text.contains("1.2M"),
        "{text}"
    );
    assert!(text.contains("evil\u{fffd}[2J\u{fffd}:1"), "{text}");
    assert!(!text.contains('\u{1b}') && !text.contains('\u{202e}'));
    assert_eq!(press(&mut model, KeyCode::Esc), Next::Stay);
    assert_eq!(model.wanted().agent, None);
}

#[test]
fn keys_sort_filter_select_and_end() {
    let mut model = model();
    let first = |model: &Model| model.rows().first().map(|row| row.carrier.agent.clone());
    assert_eq!(first(&model).as_deref(), Some("acme/prod-eu"));
    press(&mut model, KeyCode::Char('s'));
    press(&mut model, KeyCode::Char('s'));
    assert_eq!(first(&model).as_deref(), Some("acme/prod-us"), "by live forwards");
    press(&mut model, KeyCode::Char('r'));
    assert_eq!(first(&model).as_deref(), Some("globex/lab"));
    press(&mut model, KeyCode::Char('r'));
    press(&mut model, KeyCode::Char('s'));
    assert_eq!(first(&model).as_deref(), Some("acme/prod-eu"), "by bytes");
    press(&mut model, KeyCode::Down);
    assert_eq!(model.selected(&model.rows()), 1);
    for _ in 0..9 {
        press(&mut model, KeyCode::Char('j'));
    }
    assert_eq!(model.selected(&model.rows()), 2);
    press(&mut model, KeyCode::Char('/'));
    for c in "globexq".chars() {
        assert_eq!(press(&mut model, KeyCode::Char(c)), Next::Stay, "typed");
    }
    assert!(model.rows().is_empty());
    press(&mut model, KeyCode::Backspace);
    press(&mut model, KeyCode::Enter);
    assert_eq!(model.rows().len(), 1);
    press(&mut model, KeyCode::Esc);
    assert_eq!(model.rows().len(), 3);
    assert_eq!(press(&mut model, KeyCode::Char('q')), Next::End);
    assert_eq!(model.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), Next::End);
}

#[test]
fn a_gateway_that_is_gone_and_one_that_is_new_are_told() {
    let mut model = model();
    model.lose("could not reach a gateway", Instant::now());
    let text = picture(&mut model, (80, 24)).expect("a picture");
    assert!(text.contains("GATEWAY GONE for 0s, asking again"), "{text}");
    assert!(text.contains("acme/prod-eu"), "what was known stays: {text}");
    // Another process begins at nothing, which is no rate below nothing.
    let other = Status { started: Timestamp::UNIX_EPOCH, recording: false, ..status(0) };
    model.learn(other, Instant::now());
    assert_eq!(model.rates(), [0.0; 4]);
    let text = picture(&mut model, (100, 24)).expect("a picture");
    assert!(!text.contains("GONE") && text.contains("TRAIL FAILS"), "{text}");
}

#[test]
fn numbers_and_sizes() {
    let told = [0.0, 999.0, 999.9, 1_234.0, 99_499.0, 1e6, 1.5e9, 1e15, 1e18].map(bytes);
    assert_eq!(told, ["0", "999", "1.0k", "1.2k", "99k", "1.0M", "1.5G", "1P", "1000P"]);
    assert_eq!(clean("a\0b\n\u{200b}c"), "a\u{fffd}b\u{fffd}\u{fffd}c");
    assert_eq!(size("80x24"), Ok((80, 24)));
    for wrong in ["80", "x", "0x0", "80x24x1", "-1x5", "70000x24", "80x2"] {
        assert!(size(wrong).is_err(), "{wrong}");
    }
}

/// A panic gives the terminal back before it says anything. This test is its own child, on a terminal that `script` makes.
#[test]
fn a_panic_gives_the_terminal_back() {
    if std::env::var_os("CAPONIER_TEST_PANICS").is_some() {
        let (_terminal, _restore) = take().expect("a terminal");
        panic!("on purpose");
    }
    let dir = tempfile::tempdir().expect("a directory");
    let own = std::env::current_exe().expect("this program");
    let inner = format!(
        "stty -a > before; CAPONIER_TEST_PANICS=1 '{}' --exact --nocapture cli::top::tests::a_panic_gives_the_terminal_back; \
         stty -a > after",
        own.display()
    );
    let mut script = std::process::Command::new("timeout")
        .args(["300", "script", "--quiet", "--return", "--command", &inner, "typescript"])
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env("SHELL", "/bin/sh")
        .env("TERM", "xterm")
        .spawn()
        .expect("timeout (coreutils) is there");
    // Open until the end: versions of script differ in what an end of their input does to what they run.
    let input = script.stdin.take();
    let said = script.wait_with_output().expect("its output");
    drop(input);
    let read = |name: &str| {
        std::fs::read_to_string(dir.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}: {said:?}"))
    };
    let (before, after, shown) = (read("before"), read("after"), read("typescript"));
    assert!(before.contains("speed") && before == after, "{before}\n{after}");
    let at = |what: &str| shown.find(what).unwrap_or_else(|| panic!("no {what:?} in {shown:?}"));
    let (entered, left, spoke) = (at("\u{1b}[?1049h"), at("\u{1b}[?1049l"), at("on purpose"));
    assert!(entered < left && left < spoke, "{shown:?}");
}

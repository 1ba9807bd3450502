//! Trails that are verified: what the chain says of any bytes.

use caponier::audit::chain::{Link, Linked, TrailId};
use caponier::audit::verify::{Anchors, Keys, verify_inputs};

/// The verifier never fails, names only places that are there, tells bytes that are a chain from such as are not, and does so
/// however they are read. What is anchors to it may be anything as well.
pub fn holds(bytes: &[u8]) {
    let look = |pieces: Vec<(&str, &[u8])>, known: &[u8]| {
        let mut anchors = Anchors::default();
        anchors.read("elsewhere", known).expect("bytes are read");
        verify_inputs(pieces, &Keys::default(), &mut anchors).expect("bytes are read")
    };
    let report = look(vec![("trail", bytes)], b"");
    for finding in report.findings.iter().chain(&report.notes) {
        let offset = usize::try_from(finding.offset).expect("an offset");
        assert!(offset < bytes.len(), "{finding:?}");
        let line = bytes[..offset].iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
        assert_eq!(line, finding.line, "{finding:?}");
        assert!(super::is_printable(&finding.text), "{finding:?}");
    }
    assert_eq!(report.intact, report.findings.is_empty());
    if report.intact && !is_chained(bytes) {
        // A crash, a copy that lost something, several trails: the trail says so itself.
        assert!(!report.notes.is_empty() || report.trails.len() > 1, "{report:?}");
    }
    // It knows itself, and cut in two at a line's end it is the same trail.
    let itself = look(vec![("trail", bytes)], bytes);
    assert_eq!(itself.records, report.records);
    if let Some(at) = bytes[..bytes.len() / 2].iter().rposition(|byte| *byte == b'\n') {
        let (first, second) = bytes.split_at(at + 1);
        let parts = look(vec![("first", first), ("second", second)], b"");
        assert_eq!((parts.intact, parts.records), (report.intact, report.records));
    }
}

/// Whether every line is a record that names the one before it.
fn is_chained(bytes: &[u8]) -> bool {
    let mut before: Option<(u64, Link)> = None;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let Some(Linked { seq, prev }) = Linked::read(line) else { return false };
        let follows = match before {
            Some((last, digest)) => Some(seq) == last.checked_add(1) && prev == digest,
            None => {
                seq > 0 || {
                    let text = String::from_utf8_lossy(line);
                    let trail =
                        text.split("\"trail\":\"").nth(1).and_then(|rest| rest.get(..32)).and_then(TrailId::parse);
                    trail.is_some_and(|trail| Link::origin(&trail) == prev)
                }
            }
        };
        if !follows {
            return false;
        }
        before = Some((seq, Link::of(line)));
    }
    true
}

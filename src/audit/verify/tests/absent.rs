//! Whole trails that somebody has deleted, and those that never belonged here.

use super::*;

const FIRST: &str = "11111111111111111111111111111111";
const SECOND: &str = "22222222222222222222222222222222";
const WRITER: &str = "ffffffffffffffffffffffffffffffff";

const BEGIN: i64 = 1_790_000_000_000;
const DAY: i64 = 86_400_000;

/// A trail with a few heads, of an agent that says who it is.
fn agents(trail: &str, since: i64, name: &str, signer: &Signer) -> Made {
    let mut made = Made::begin_as(trail, "agent", since, Some(signer));
    made.add("link.up", &members(name));
    made.forwards(3).head().forwards(3).head().stop()
}

fn gateways(trail: &str, since: i64, signer: &Signer) -> Made {
    Made::begin_as(trail, "gateway", since, Some(signer)).forwards(3).head().forwards(3).head().stop()
}

fn members(name: &str) -> String {
    format!("\"organisation\":\"acme\",\"agent\":\"{name}\",\"replica\":\"one\"")
}

/// What a gateway (agent) has on record of agents' (gateways') trails: whose, which, and since when.
fn seen(side: &'static str, of: &[(&str, &Made)]) -> Vec<u8> {
    let mut lines = Vec::new();
    for (name, trail) in of {
        let mut made = Made::begin_as(WRITER, side, trail.since, None);
        let name = if side == "gateway" { members(name) } else { format!("{},\"detail\":\"{name}\"", members("prod")) };
        for anchor in &trail.anchors {
            made.add(
                "trail.anchored",
                &format!("{name},\"peer_trail\":\"{}\",\"peer_digest\":\"{anchor}\"", trail.trail),
            );
        }
        lines.extend(made.lines);
    }
    lines.concat()
}

fn judged(trails: &[&Made], keys: &Keys, places: &[&[u8]], elsewhere: Option<&str>) -> Report {
    let mut anchors = Anchors::default();
    for (place, number) in places.iter().zip(1..) {
        anchors.read(&format!("place {number}"), *place).expect("read");
    }
    if let Some(trail) = elsewhere {
        anchors.elsewhere(TrailId::parse(trail).expect("an id"));
    }
    let bytes: Vec<_> = trails.iter().map(|trail| trail.bytes()).collect();
    let inputs = bytes.iter().map(|bytes| ("trail", &bytes[..])).collect();
    verify_inputs(inputs, keys, &mut anchors).expect("read")
}

/// What is told of each trail that is not here: which, how often it was seen, and whether it is missed.
fn absent(report: &Report) -> Vec<(&str, u64, bool)> {
    report.absent.iter().map(|absent| (&absent.trail[..], absent.anchors, absent.missed)).collect()
}

#[test]
fn a_trail_that_was_deleted_and_begun_anew_is_missed_by_whoever_has_seen_it() {
    let (signer, keys) = signer();
    let deleted = agents(FIRST, BEGIN, "prod", &signer);
    let anew = agents(SECOND, BEGIN + DAY, "prod", &signer);
    let other = agents(WRITER, BEGIN, "test", &signer);
    // One that was begun just now and never had a link does not say whose it is.
    let bare = Made::begin_as(SECOND, "agent", BEGIN + DAY, Some(&signer)).head().stop();
    let of_both = seen("gateway", &[("prod", &deleted), ("test", &other), ("prod", &anew)]);
    let of_one = seen("gateway", &[("prod", &deleted)]);
    for (trail, place) in [(&anew, &of_both), (&anew, &of_one), (&bare, &of_one)] {
        let report = judged(&[trail], &keys, &[place], None);
        assert_eq!(report.findings.iter().map(|found| found.kind).collect::<Vec<_>>(), [Kind::Absent], "{report:#?}");
        let finding = &report.findings[0];
        assert_eq!((&finding.file[..], finding.line, finding.offset), ("place 1", 2, trail_started(place)));
        for part in [FIRST, "acme/prod, replica one", "2 heads", "deleted", "--elsewhere"] {
            assert!(finding.text.contains(part), "{part}: {}", finding.text);
        }
        assert_eq!(absent(&report)[0], (FIRST, 2, true), "{report:#?}");
        assert!(report.absent[0].from < report.absent[0].until, "{report:#?}");
        // Whoever knows where it is can say so, and does not lose sight of it.
        let report = judged(&[trail], &keys, &[place], Some(FIRST));
        assert!(report.intact && absent(&report).contains(&(FIRST, 2, false)), "{report:#?}");
        // Nothing is missed where it is given, in whatever order.
        for trails in [[trail, &deleted], [&deleted, trail]] {
            let report = judged(&trails, &keys, &[place], None);
            assert!(report.intact, "{report:#?}");
        }
    }
    // Also the newer one, where somebody shows an old trail.
    let report = judged(&[&deleted], &keys, &[&of_both], None);
    assert_eq!(absent(&report), [(SECOND, 2, true), (WRITER, 2, false)], "{report:#?}");
}

/// The bytes of the first line.
fn trail_started(place: &[u8]) -> u64 {
    place.iter().position(|byte| *byte == b'\n').expect("a line") as u64 + 1
}

#[test]
fn other_agents_trails_are_not_missed() {
    let (signer, keys) = signer();
    let here = agents(FIRST, BEGIN, "prod", &signer);
    let other = agents(SECOND, BEGIN - DAY, "test", &signer);
    let report = judged(&[&here], &keys, &[&seen("gateway", &[("test", &other), ("prod", &here)])], None);
    assert!(report.intact, "{report:#?}");
    assert_eq!(absent(&report), [(SECOND, 2, false)]);
    // What an agent has seen of gateways is nothing that an agent's trail could lack; nor is a gateway's own head.
    let gateway = gateways(WRITER, BEGIN - DAY, &signer);
    let places = [seen("agent", &[("gateway:443", &gateway)]), gateway.bytes()];
    let report = judged(&[&here], &keys, &[&places[0], &places[1]], None);
    assert!(report.intact && report.absent.is_empty(), "{report:#?}");
}

#[test]
fn a_gateways_trail_is_missed_by_its_address_unless_it_ran_beside_the_one_here() {
    let (signer, keys) = signer();
    let deleted = gateways(FIRST, BEGIN, &signer);
    let anew = gateways(SECOND, BEGIN + DAY, &signer);
    // An agent that was never linked to the new one has seen nothing of it, and so does not know it by its address.
    for place in [
        seen("agent", &[("gateway:443", &deleted), ("gateway:443", &anew)]),
        seen("agent", &[("gateway:443", &deleted)]),
    ] {
        let report = judged(&[&anew], &keys, &[&place], None);
        assert_eq!(report.findings.iter().map(|found| found.kind).collect::<Vec<_>>(), [Kind::Absent], "{report:#?}");
        assert_eq!(absent(&report), [(FIRST, 2, true)]);
        assert!(judged(&[&anew], &keys, &[&place], Some(FIRST)).intact);
        assert!(judged(&[&deleted, &anew], &keys, &[&place], None).intact);
    }
    let place = seen("agent", &[("other:443", &deleted), ("gateway:443", &anew)]);
    let report = judged(&[&anew], &keys, &[&place], None);
    assert!(report.intact, "{report:#?}");
    assert_eq!(absent(&report), [(FIRST, 2, false)]);
    // Two behind one address, for an hour.
    let mut beside = Made::begin_as(FIRST, "gateway", BEGIN, Some(&signer)).forwards(3).head();
    beside.since += DAY / 24;
    let beside = beside.forwards(3).head();
    let mut here = gateways(SECOND, BEGIN, &signer);
    here.since += DAY / 24;
    here.add("trail.started", &format!("\"trail\":\"{SECOND}\""));
    let here = here.head().stop();
    let place = [
        seen(
            "agent",
            &[("gateway:443", &Made { anchors: beside.anchors[..1].to_vec(), since: BEGIN, ..beside.clone() })],
        ),
        seen("agent", &[("gateway:443", &Made { anchors: beside.anchors[1..].to_vec(), ..beside.clone() })]),
        seen("agent", &[("gateway:443", &here)]),
    ];
    let report = judged(&[&here], &keys, &[&place.concat()], None);
    assert!(report.intact, "{report:#?}");
    assert_eq!(absent(&report), [(FIRST, 2, false)]);
}

#[test]
fn a_copy_of_heads_misses_the_trail_that_it_has_kept_before() {
    let (signer, keys) = signer();
    let deleted = gateways(FIRST, BEGIN, &signer);
    let anew = gateways(SECOND, BEGIN + DAY, &signer);
    let heads = |made: &Made| {
        let is_head = |line: &&Vec<u8>| line.windows(12).any(|part| part == b"\"trail.head\"");
        made.lines.iter().filter(is_head).flatten().copied().collect::<Vec<u8>>()
    };
    let report = judged(&[&anew], &keys, &[&[heads(&deleted), heads(&anew)].concat()], None);
    assert_eq!(absent(&report), [(FIRST, 2, true)], "{report:#?}");
    assert_eq!(report.findings.iter().map(|found| found.kind).collect::<Vec<_>>(), [Kind::Absent]);
    // A file of its own may be anybody's.
    let report = judged(&[&anew], &keys, &[&heads(&deleted), &heads(&anew)], None);
    assert!(report.intact, "{report:#?}");
    assert_eq!(absent(&report), [(FIRST, 2, false)]);
}

/// Given together with the trail that was begun anew, what rotation has left of the one before is no damage.
#[test]
fn a_trail_whose_first_files_are_gone_may_stand_behind_another() {
    let (signer, keys) = signer();
    let mut before = agents(FIRST, BEGIN, "prod", &signer);
    let cut = before.lines.len();
    before.add("trail.continued", &format!("\"trail\":\"{FIRST}\",\"sink\":\"file\""));
    let before = before.forwards(2).head().stop();
    let rest = before.lines[cut..].concat();
    let anew = agents(SECOND, BEGIN + DAY, "prod", &signer).bytes();
    for inputs in [[("a", &rest[..]), ("b", &anew[..])], [("b", &anew[..]), ("a", &rest[..])]] {
        let report = verify_inputs(inputs.to_vec(), &keys, &mut Anchors::default()).expect("read");
        assert!(report.intact, "{report:#?}");
        assert_eq!((report.trails.len(), report.notes.len()), (2, 1), "{report:#?}");
    }
}

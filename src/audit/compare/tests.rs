//! Trails of two sides, and what one of them may say differently.

use std::io::Write as _;

use super::*;
use crate::audit::chain::{Chain, TrailId};

/// The trail of a side.
struct Side {
    side: &'static str,
    chain: Chain,
    bytes: Vec<u8>,
    clock: i64,
    organisation: String,
}

impl Side {
    fn new(side: &'static str) -> Self {
        let trail = TrailId::generate().expect("an id");
        let mut made = Self {
            side,
            chain: Chain::begin(&trail),
            bytes: Vec::new(),
            clock: 1_790_000_000_000,
            organisation: "acme".to_owned(),
        };
        made.add("trail.started", &format!("\"trail\":\"{trail}\""));
        if side == "agent" {
            made.add("link.up", "\"organisation\":\"acme\",\"agent\":\"prod\",\"replica\":\"r1\"");
        }
        made
    }

    fn add(&mut self, event: &str, members: &str) {
        let time = format!("{:.3}", jiff::Timestamp::from_millisecond(self.clock).expect("a time"));
        self.clock += 10;
        let (side, comma) = (self.side, if members.is_empty() { "" } else { "," });
        let mut line =
            format!("{{\"v\":1,\"time\":\"{time}\",\"event\":\"{event}\",\"side\":\"{side}\"{comma}{members}}}\n")
                .into_bytes();
        self.chain.link(&mut line);
        self.bytes.extend_from_slice(&line);
    }

    /// A record of the forward that the gateway calls by this number.
    fn forward(&mut self, event: &str, number: usize, more: &str) {
        let ids = if self.side == "agent" {
            format!("\"forward\":\"a{number}\",\"peer_forward\":\"g{number}\"")
        } else {
            format!("\"forward\":\"g{number}\",\"peer_forward\":\"a{number}\"")
        };
        let known = format!("\"organisation\":\"{}\",\"agent\":\"prod\",\"replica\":\"r1\"", self.organisation);
        let who = "\"principal\":\"ci\",\"target\":\"db:5432\"";
        let who = if more.contains("\"principal\"") || more.contains("\"target\"") { "" } else { who };
        let parts: Vec<_> = [&ids[..], &known, who, more].into_iter().filter(|part| !part.is_empty()).collect();
        self.add(&format!("forward.{event}"), &parts.join(","));
    }

    fn whole(&mut self, number: usize) {
        self.forward("open", number, "");
        self.forward("ended", number, "\"reason\":\"eof\",\"to_target\":7,\"from_target\":9");
    }
}

fn compared(gateway: &Side, agent: &Side) -> Comparison {
    let dir = tempfile::tempdir().expect("a directory");
    let paths = [dir.path().join("gateway"), dir.path().join("agent")];
    for (path, side) in paths.iter().zip([gateway, agent]) {
        std::fs::File::create(path).and_then(|mut file| file.write_all(&side.bytes)).expect("written");
    }
    let [gateway, agent] = paths.map(|path| vec![path]);
    of_files(&gateway, &agent)
}

fn of_files(gateways: &[PathBuf], agents: &[PathBuf]) -> Comparison {
    let skew = Duration::from_secs(5);
    let result = compare(gateways, agents, skew, |_| {}).expect("compared");
    // Whichever of them is ours.
    assert_eq!(compare(agents, gateways, skew, |_| {}).expect("compared"), result);
    result
}

/// One agent, two gateways, and what is to be seen of its forwards with one of their trails or both.
fn at_two_gateways(organisations: [&str; 2]) -> [Comparison; 3] {
    let dir = tempfile::tempdir().expect("a directory");
    let mut agent = Side::new("agent");
    let mut gateways = [Side::new("gateway"), Side::new("gateway")];
    for (gateway, organisation) in gateways.iter_mut().zip(organisations) {
        organisation.clone_into(&mut gateway.organisation);
        gateway.add("link.up", &format!("\"organisation\":\"{organisation}\",\"agent\":\"prod\",\"replica\":\"r1\""));
    }
    for number in 0..20 {
        let at = number % 2;
        for side in [&mut gateways[at], &mut agent] {
            organisations[at].clone_into(&mut side.organisation);
            side.clock = 1_790_000_001_000 + i64::try_from(number).expect("few") * 60_000;
            side.whole(number);
        }
    }
    let [first, second] = &gateways;
    let paths = ["first", "second", "agent"].map(|name| dir.path().join(name));
    for (path, side) in paths.iter().zip([first, second, &agent]) {
        std::fs::write(path, &side.bytes).expect("written");
    }
    let [first, second, agent] = paths;
    let agent = [agent];
    [
        of_files(std::slice::from_ref(&first), &agent),
        of_files(std::slice::from_ref(&second), &agent),
        of_files(&[second, first], &agent),
    ]
}

#[test]
fn forwards_of_an_agents_other_gateways_are_not_missed_at_this_one() {
    let [first, second, both] = at_two_gateways(["acme", "globex"]);
    for one in [&first, &second] {
        assert!(one.agree, "{one:#?}");
        assert_eq!((one.agreed, one.elsewhere), (10, 10), "{one:#?}");
    }
    assert!(both.agree, "{both:#?}");
    assert_eq!((both.agreed, both.elsewhere, both.outside), (20, 0, 0));
}

#[test]
fn two_gateways_of_one_organisation_are_compared_together() {
    let [first, _, both] = at_two_gateways(["acme", "acme"]);
    assert!(both.agree, "{both:#?}");
    assert_eq!((both.agreed, both.elsewhere, both.outside), (20, 0, 0));
    // Whose they are does not show; those after the trail's end are outside of it.
    assert!(!first.agree, "{first:#?}");
    assert_eq!((first.agreed, first.elsewhere), (10, 0), "{first:#?}");
    assert!(first.categories.contains_key(&Category::MissingAtGateway), "{first:#?}");
}

/// A gateway's trail that knows nothing of the agent at all is no excuse.
#[test]
fn a_trail_that_knows_nothing_of_the_agent_misses_all_its_forwards() {
    let (mut gateway, mut agent) = both();
    agent.whole(1);
    gateway.add("trail.stopped", "");
    agent.add("trail.stopped", "");
    let result = compared(&gateway, &agent);
    assert_eq!((result.elsewhere, result.categories), (0, BTreeMap::from([(Category::MissingAtGateway, 1)])));
}

fn both() -> (Side, Side) {
    (Side::new("gateway"), Side::new("agent"))
}

#[test]
fn what_both_sides_have_agrees_and_what_never_came_to_the_agent_is_nothing_to_it() {
    let (mut gateway, mut agent) = both();
    for number in 0..20 {
        gateway.whole(number);
        agent.whole(number);
    }
    gateway.forward("denied", 20, "\"reason\":\"not_granted\"");
    gateway.forward("failed", 21, "\"reason\":\"no_link\"");
    gateway.forward("open", 22, "");
    gateway.forward("denied", 22, "\"reason\":\"agent_denied\"");
    agent.forward("denied", 22, "\"reason\":\"target\"");
    gateway.forward("open", 23, "");
    gateway.forward("failed", 23, "\"reason\":\"connect_failed\"");
    agent.forward("open", 23, "");
    agent.forward("failed", 23, "\"reason\":\"connect_failed\"");
    // Another agent's, and a guest's of this one.
    gateway
        .add("forward.ended", "\"forward\":\"g99\",\"organisation\":\"acme\",\"agent\":\"other\",\"reason\":\"eof\"");
    agent.add("forward.ended", "\"forward\":\"a99\",\"organisation\":\"acme\",\"agent\":\"prod\",\"reason\":\"eof\"");
    gateway.add("trail.stopped", "");
    agent.add("trail.stopped", "");
    let result = compared(&gateway, &agent);
    assert!(result.agree, "{result:#?}");
    assert_eq!((result.agreed, result.explained, result.never_asked, result.live), (22, 0, 2, 0));
}

#[test]
fn each_difference_is_named_with_its_places() {
    for (category, at_gateway, at_agent) in [
        (
            Category::Bytes,
            ("ended", "\"reason\":\"eof\",\"to_target\":7,\"from_target\":9"),
            Some(("ended", "\"reason\":\"eof\",\"to_target\":7,\"from_target\":8")),
        ),
        // More came out than went in.
        (
            Category::Bytes,
            ("ended", "\"reason\":\"link_lost\",\"to_target\":7,\"from_target\":9"),
            Some(("ended", "\"reason\":\"link_lost\",\"to_target\":8,\"from_target\":9")),
        ),
        // More is lost than can be on its way.
        (
            Category::Bytes,
            ("ended", "\"reason\":\"link_lost\",\"to_target\":999999999,\"from_target\":9"),
            Some(("ended", "\"reason\":\"link_lost\",\"to_target\":8,\"from_target\":9")),
        ),
        (
            Category::Outcome,
            ("ended", "\"reason\":\"eof\",\"to_target\":7,\"from_target\":9"),
            Some(("denied", "\"reason\":\"target\"")),
        ),
        (
            Category::Outcome,
            ("denied", "\"reason\":\"agent_denied\""),
            Some(("ended", "\"reason\":\"eof\",\"to_target\":0,\"from_target\":0")),
        ),
        (Category::Outcome, ("failed", "\"reason\":\"connect_failed\""), Some(("denied", "\"reason\":\"target\""))),
        (
            Category::Principal,
            ("ended", "\"reason\":\"eof\",\"principal\":\"ci\",\"target\":\"db:5432\""),
            Some(("ended", "\"reason\":\"eof\",\"principal\":\"eve\",\"target\":\"db:5432\"")),
        ),
        (
            Category::Target,
            ("ended", "\"reason\":\"eof\",\"principal\":\"ci\",\"target\":\"db:5432\""),
            Some(("ended", "\"reason\":\"eof\",\"principal\":\"ci\",\"target\":\"db:22\"")),
        ),
        (Category::MissingAtAgent, ("ended", "\"reason\":\"eof\",\"to_target\":7,\"from_target\":9"), None),
        (Category::MissingAtAgent, ("denied", "\"reason\":\"agent_denied\""), None),
    ] {
        let (mut gateway, mut agent) = both();
        for number in 0..3 {
            gateway.whole(number);
            agent.whole(number);
        }
        gateway.forward("open", 7, "");
        gateway.forward(at_gateway.0, 7, at_gateway.1);
        if let Some((event, members)) = at_agent {
            agent.forward("open", 7, "");
            agent.forward(event, 7, members);
        }
        gateway.whole(8);
        agent.whole(8);
        gateway.add("trail.stopped", "");
        agent.add("trail.stopped", "");
        let result = compared(&gateway, &agent);
        assert!(!result.agree, "{category:?}");
        assert_eq!(result.categories, BTreeMap::from([(category, 1)]), "{result:#?}");
        let difference = &result.differences[0];
        assert_eq!((difference.category, &difference.forward[..]), (category, "g7"));
        assert!(difference.at_gateway.as_ref().is_some_and(|place| place.ends_with("gateway:9")), "{difference:?}");
        assert_eq!(difference.at_agent.as_ref().is_some_and(|place| place.ends_with("agent:10")), at_agent.is_some());
    }
}

#[test]
fn what_only_the_agent_has_and_what_never_ends_is_named() {
    let (mut gateway, mut agent) = both();
    agent.whole(1);
    gateway.whole(2);
    agent.whole(2);
    gateway.forward("open", 3, "");
    agent.forward("open", 3, "");
    agent.forward("ended", 3, "\"reason\":\"eof\",\"to_target\":7,\"from_target\":9");
    gateway.add("trail.stopped", "");
    agent.add("trail.stopped", "");
    let result = compared(&gateway, &agent);
    assert_eq!(
        result.categories,
        BTreeMap::from([(Category::MissingAtGateway, 1), (Category::WithoutEnd, 1)]),
        "{result:#?}"
    );
}

#[test]
fn what_lives_still_and_what_the_other_trail_does_not_cover_is_told_apart() {
    let (mut gateway, mut agent) = both();
    gateway.forward("open", 1, "");
    agent.forward("open", 1, "");
    gateway.whole(2);
    agent.whole(2);
    // The agent's trail ends here.
    gateway.clock += 60_000;
    gateway.whole(3);
    let result = compared(&gateway, &agent);
    assert!(result.agree, "{result:#?}");
    assert_eq!((result.agreed, result.live, result.outside), (1, 1, 1));
}

#[test]
fn broken_forwards_may_differ_by_what_was_on_its_way_and_clocks_by_the_tolerance() {
    let (mut gateway, mut agent) = both();
    agent.clock += 3_000;
    gateway.forward("open", 1, "");
    gateway.forward("ended", 1, "\"reason\":\"link_lost\",\"to_target\":500,\"from_target\":9");
    agent.forward("open", 1, "");
    agent.forward("ended", 1, "\"reason\":\"link_lost\",\"to_target\":400,\"from_target\":10");
    gateway.forward("open", 2, "");
    gateway.forward("failed", 2, "\"reason\":\"timeout\"");
    agent.forward("open", 2, "");
    agent.forward("ended", 2, "\"reason\":\"client_gone\",\"to_target\":0,\"from_target\":0");
    gateway.add(
        "forward.attempt",
        "\"forward\":\"g3\",\"organisation\":\"acme\",\"agent\":\"prod\",\"reason\":\"agent_draining\"",
    );
    agent.forward("denied", 3, "\"reason\":\"draining\"");
    gateway.forward("ended", 3, "\"reason\":\"eof\",\"to_target\":1,\"from_target\":1");
    gateway.add("trail.stopped", "");
    agent.add("trail.stopped", "");
    let result = compared(&gateway, &agent);
    assert!(result.agree, "{result:#?}");
    assert_eq!((result.agreed, result.explained), (0, 3));
}

#[test]
fn two_trails_of_one_side_are_not_compared() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("trail");
    std::fs::write(&path, Side::new("agent").bytes).expect("written");
    let paths = [path];
    let result = compare(&paths, &paths, Duration::ZERO, |_| {});
    assert!(matches!(result, Err(CompareError::Sides(..))), "{result:?}");
}

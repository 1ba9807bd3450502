//! Tests of the module above.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::identity::{Algorithm, PrivateKey};

type Roster = super::Roster<()>;
type Link = super::Link<()>;

fn process(instance: &str, started: u64) -> Option<Process> {
    Some(Process { started, instance: instance.to_owned(), way: None })
}

fn link_of(agent: &str, replica: &str, process: Option<Process>) -> Arc<Link> {
    let peer = Peer {
        name: agent.parse().expect("a name"),
        replica: replica.parse().expect("a replica"),
        process,
        address: SocketAddr::from(([10, 0, 0, 1], 1)),
        transport: "ssh",
        version: "1".to_owned(),
        key: PrivateKey::generate(Algorithm::Ed25519).public().fingerprint(),
    };
    Arc::new(Link::with(peer, Answers::default(), CancellationToken::new(), ()))
}

fn link(replica: &str, process: Option<Process>) -> Arc<Link> {
    link_of("acme/prod-eu", replica, process)
}

fn name() -> AgentName {
    "acme/prod-eu".parse().expect("a name")
}

fn standings(links: &[&Arc<Link>]) -> Vec<Standing> {
    links.iter().map(|link| link.standing()).collect()
}

#[test]
fn what_a_second_link_of_a_name_means() {
    let (early, late) = (process("aaaa", 1), process("bbbb", 2));
    let (twin, other_twin) = (process("aaaa", 7), process("bbbb", 7));
    let peer = |replica: &str, process: &Option<Process>| link(replica, process.clone()).peer.clone();
    for (active, new, expected) in [
        // The same process: make-before-break, whatever it says of its start.
        (&late, &late, Succession::Replaces),
        (&process("aaaa", 9), &early, Succession::Replaces),
        // Two processes: the later one, whatever the order.
        (&early, &late, Succession::Supersedes),
        (&late, &early, Succession::IsSuperseded),
        (&twin, &other_twin, Succession::Supersedes),
        (&other_twin, &twin, Succession::IsSuperseded),
        // Those that do not say: the newest link, as ever.
        (&None, &None, Succession::Replaces),
        (&late, &None, Succession::Replaces),
        (&None, &early, Succession::Replaces),
    ] {
        assert_eq!(succession(&peer("one", active), &peer("one", new)), expected, "{active:?} {new:?}");
        let other_name = succession(&peer("one", active), &peer("two", new));
        let same_process = active.as_ref().zip(new.as_ref()).is_some_and(|(a, b)| a.instance == b.instance);
        assert_eq!(other_name == Succession::Replaces, same_process, "{active:?} {new:?}");
        assert!([Succession::Replaces, Succession::None].contains(&other_name));
    }
}

#[test]
fn the_process_that_started_later_is_active_whatever_the_order() {
    let roster = Roster::default();
    let old = link("one", process("a", 1));
    let new = link("one", process("b", 2));
    let again = link("one", process("a", 1));
    let newest = link("one", process("b", 2));
    for link in [&old, &new, &again, &newest] {
        assert!(roster.insert(link).is_empty());
    }
    assert_eq!(
        standings(&[&old, &new, &again, &newest]),
        [Standing::Superseded, Standing::Retired, Standing::Superseded, Standing::Active]
    );
    assert!(Arc::ptr_eq(roster.pick(&name(), &[]).ok().expect("a link").link(), &newest));
    // Its session is gone, even if nobody has taken it out yet: the other process is welcome.
    newest.gone.cancel();
    let third = link("one", process("a", 1));
    roster.insert(&third);
    assert_eq!(third.standing(), Standing::Active);
    assert!(Arc::ptr_eq(roster.pick(&name(), &[]).ok().expect("a link").link(), &third));
}

#[test]
fn links_of_one_process_by_two_ways_do_not_replace_each_other() {
    let roster = Roster::default();
    let by = |way, started, instance: &str| {
        link("one", process(instance, started).map(|process| Process { way: Some(way), ..process }))
    };
    let (first, second, again) = (by(1, 5, "a"), by(2, 5, "a"), by(1, 5, "a"));
    for link in [&first, &second, &again] {
        roster.insert(link);
    }
    assert_eq!(standings(&[&first, &second, &again]), [Standing::Retired, Standing::Active, Standing::Active]);
    // Another process with the name, started earlier or later, by whatever way.
    let (early, late) = (by(1, 4, "b"), by(3, 6, "c"));
    for link in [&early, &late] {
        roster.insert(link);
    }
    assert_eq!(standings(&[&early, &second, &again]), [Standing::Superseded; 3]);
    assert_eq!(late.standing(), Standing::Active);
}

#[test]
fn no_start_time_harms_another_agent_or_another_replica() {
    let roster = Roster::default();
    let (other_agent, other_replica) = (link_of("acme/prod-us", "one", process("a", 1)), link("two", process("b", 1)));
    let other_organisation = link_of("globex/prod-eu", "one", process("c", 1));
    for link in [&other_agent, &other_replica, &other_organisation] {
        roster.insert(link);
    }
    for started in [0, 2, u64::MAX] {
        roster.insert(&link("one", process(&format!("x{started}"), started)));
    }
    assert_eq!(standings(&[&other_agent, &other_replica, &other_organisation]), [Standing::Active; 3]);
}

#[test]
fn the_least_loaded_link_is_picked_and_equals_take_turns() {
    let roster = Roster::default();
    let links = ["one", "two", "three"].map(|replica| link(replica, None));
    links.iter().for_each(|link| drop(roster.insert(link)));
    let pick = || roster.pick(&name(), &[]).ok().expect("a link");
    // One after another, none of them running on: by turns.
    for _ in 0..9 {
        drop(pick());
    }
    assert!(links.iter().all(|link| link.opened() == 3));
    let mut rides: Vec<_> = (0..9).map(|_| pick()).collect();
    assert!(links.iter().all(|link| link.live() == 3));
    rides.retain(|ride| !Arc::ptr_eq(ride.link(), &links[1]));
    for _ in 0..3 {
        let ride = pick();
        assert!(Arc::ptr_eq(ride.link(), &links[1]));
        rides.push(ride);
    }
}

#[test]
fn no_link_is_tried_twice_and_another_replica_comes_first() {
    let roster = Roster::default();
    let one = link("one", process("a", 1));
    roster.insert(&one);
    let first = roster.pick(&name(), &[]).ok().expect("a link");
    let two = link("two", process("b", 1));
    let newer = link("one", process("a", 1));
    roster.insert(&newer);
    roster.insert(&two);
    let busy: Vec<_> = (0..5).map(|_| Ride::new(two.clone())).collect();
    let mut tried = vec![first.link().clone()];
    let second = roster.pick(&name(), &tried).ok().expect("a link");
    assert!(Arc::ptr_eq(second.link(), &two), "however loaded it is");
    tried.push(two.clone());
    let third = roster.pick(&name(), &tried).ok().expect("a link");
    assert!(Arc::ptr_eq(third.link(), &newer));
    tried.push(newer.clone());
    assert!(matches!(roster.pick(&name(), &tried), Err(NoRide::Tried)));
    newer.retire(Standing::Draining);
    two.retire(Standing::Draining);
    assert!(matches!(roster.pick(&name(), &tried), Err(NoRide::Unlinked(_))), "a link may come");
    drop(busy);
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_is_woken_by_an_active_link_and_leaves_nothing_behind() {
    let roster = Roster::default();
    let newer = link("one", process("b", 2));
    newer.retire(Standing::Draining);
    roster.insert(&newer);
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let Err(NoRide::Unlinked(arrival)) = roster.pick(&name(), &[]) else { panic!("a link") };
        waiting.push(arrival);
    }
    assert_eq!(roster.table().awaited.len(), 1);
    roster.insert(&link_of("acme/prod-us", "one", None));
    assert!(!waiting[0].came.is_cancelled(), "woken by another agent's link");
    roster.insert(&link("one", None));
    for arrival in waiting {
        tokio::time::timeout(Duration::from_secs(1), arrival.wait()).await.expect("woken");
    }
    assert!(roster.table().awaited.is_empty());
    // Those who give up are forgotten with the last of them.
    let absent: AgentName = "acme/absent".parse().expect("a name");
    let wait = || match roster.pick(&absent, &[]) {
        Err(NoRide::Unlinked(arrival)) => arrival,
        _ => panic!("a link"),
    };
    let (first, second) = (wait(), wait());
    drop(first);
    assert_eq!(roster.table().awaited.len(), 1);
    drop(second);
    assert!(roster.table().awaited.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_link_whose_opens_stay_unanswered_gets_no_more_of_them() {
    let roster = Roster::default();
    let (broken, good) = (link("one", None), link("two", None));
    roster.insert(&broken);
    roster.insert(&good);
    let now = Instant::now;
    for _ in 0..limits::UNANSWERED_OPENS - 1 {
        broken.answers.asked(now());
    }
    tokio::time::advance(limits::ANSWER_TIMEOUT * 2).await;
    assert!(broken.takes_forwards(), "too few to judge by");
    broken.answers.asked(now());
    broken.answers.answered();
    for _ in 0..limits::PENDING_OPENS_PER_LINK {
        broken.answers.asked(now());
    }
    tokio::time::advance(limits::ANSWER_TIMEOUT - Duration::from_millis(1)).await;
    assert!(broken.takes_forwards(), "there is time left");
    tokio::time::advance(Duration::from_millis(1)).await;
    for _ in 0..4 {
        assert!(Arc::ptr_eq(roster.pick(&name(), &[]).ok().expect("a link").link(), &good));
    }
    assert_eq!(standings(&[&broken, &good]), [Standing::Unanswering, Standing::Active]);
    assert_eq!(broken.spent().await, Standing::Unanswering);
}

#[tokio::test]
async fn a_retired_link_is_spent_with_its_last_forward() {
    let link = link("one", None);
    let ride = Ride::new(link.clone());
    link.retire(Standing::Superseded);
    link.retire(Standing::Draining);
    assert_eq!(link.retired().await, Standing::Superseded, "the first reason stands");
    let spent = link.spent();
    tokio::pin!(spent);
    assert!(tokio::time::timeout(Duration::from_millis(1), &mut spent).await.is_err());
    drop(ride);
    assert_eq!(spent.await, Standing::Superseded);
}

#[test]
fn an_agent_holds_so_many_links_and_loses_retired_ones_first() {
    let roster = Roster::default();
    let links: Vec<_> = (0..limits::LINKS_PER_AGENT).map(|number| link(&format!("r{number}"), None)).collect();
    links.iter().for_each(|link| assert!(roster.insert(link).is_empty()));
    links[5].retire(Standing::Draining);
    for expected in [&links[5], &links[0], &links[1]] {
        let surplus = roster.insert(&link(&format!("x{}", expected.peer.replica), None));
        assert!(surplus.len() == 1 && Arc::ptr_eq(&surplus[0], expected));
    }
    roster.list().iter().for_each(|link| roster.remove(link));
    assert!(roster.table().links.is_empty());
}

#[derive(Debug, Clone)]
enum Step {
    Link { replica: usize, process: Option<(u64, usize)> },
    Retire(usize),
    Lose(usize),
    Remove(usize),
    Pick,
    End(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let process = proptest::option::of((0_u64..4, 0_usize..4));
    prop_oneof![
        (0_usize..3, process).prop_map(|(replica, process)| Step::Link { replica, process }),
        any::<usize>().prop_map(Step::Retire),
        any::<usize>().prop_map(Step::Lose),
        any::<usize>().prop_map(Step::Remove),
        Just(Step::Pick),
        any::<usize>().prop_map(Step::End),
    ]
}

proptest! {
    #[test]
    fn never_a_retired_link_nor_two_of_one_name_nor_one_with_more_load(
        steps in proptest::collection::vec(step(), 1..80),
    ) {
        let roster = Roster::default();
        let mut rides: Vec<Ride<()>> = Vec::new();
        for step in steps {
            let links = roster.list();
            let at = |index: usize| (!links.is_empty()).then(|| &links[index % links.len()]);
            match step {
                Step::Link { replica, process } => {
                    let process = process.map(|(started, instance)| Process {
                        started, instance: format!("i{instance}"), way: None
                    });
                    roster.insert(&link(&format!("r{replica}"), process));
                }
                Step::Retire(index) => at(index).into_iter().for_each(|link| _ = link.retire(Standing::Draining)),
                Step::Lose(index) => at(index).into_iter().for_each(|link| link.gone.cancel()),
                Step::Remove(index) => at(index).into_iter().for_each(|link| roster.remove(link)),
                Step::Pick => {
                    let able: Vec<_> = links.iter().filter(|link| link.takes_forwards()).collect();
                    match roster.pick(&name(), &[]) {
                        Ok(ride) => {
                            let link = ride.link();
                            prop_assert!(link.is_active() && !link.gone.is_cancelled());
                            let least = able.iter().map(|link| link.live()).min();
                            // The least before the pick, which counts itself.
                            prop_assert!(able.len() == 1 || Some(link.live() - 1) <= least, "{least:?}");
                            rides.push(ride);
                        }
                        Err(_) => prop_assert!(able.is_empty()),
                    }
                }
                Step::End(index) => {
                    if !rides.is_empty() {
                        rides.swap_remove(index % rides.len());
                    }
                }
            }
            let mut names: Vec<_> = roster.list().iter().filter(|link| link.takes_forwards())
                .map(|link| link.peer.replica.clone()).collect();
            let all = names.len();
            names.dedup();
            prop_assert_eq!(all, names.len(), "two are active of one name");
        }
    }
}

//! The order in which the instances of a service are to be tried (RFC 2782).

use crate::target::Name;

/// One SRV record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Instance {
    pub(super) priority: u16,
    pub(super) weight: u16,
    pub(super) port: u16,
    /// As it was written, in lower case; empty for the root, which says that there is no such service.
    pub(super) target: String,
}

/// The instances that can be connected to, the ones to be tried first in front: by priority, and among those of one priority
/// drawn by their weights. `draw` yields a number from 0 to the one that it is given.
pub(super) fn order(instances: Vec<Instance>, mut draw: impl FnMut(u32) -> u32) -> Vec<(Name, u16)> {
    let mut waiting: Vec<(Instance, Name)> = instances
        .into_iter()
        .filter(|instance| instance.port != 0)
        .filter_map(|instance| {
            let name = instance.target.parse().ok()?;
            Some((instance, name))
        })
        .collect();
    // Those of weight 0 in front of their priority: as the RFC has it, they are drawn then, if seldom.
    waiting.sort_by_key(|(instance, _)| (instance.priority, instance.weight));
    let mut ordered = Vec::with_capacity(waiting.len());
    while let Some((first, _)) = waiting.first() {
        let priority = first.priority;
        let same = || waiting.iter().take_while(|(instance, _)| instance.priority == priority);
        let sum = same().map(|(instance, _)| u32::from(instance.weight)).fold(0, u32::saturating_add);
        let drawn = draw(sum).min(sum);
        let mut running = 0;
        let at = same().position(|(instance, _)| {
            running += u32::from(instance.weight);
            running >= drawn
        });
        let (instance, name) = waiting.remove(at.unwrap_or_default());
        ordered.push((name, instance.port));
    }
    ordered
}

/// A number from 0 to `most`, which nobody can foresee.
pub(super) fn draw(most: u32) -> u32 {
    let mut bytes = [0; 8];
    // Without randomness the first one is as good as any.
    if getrandom::fill(&mut bytes).is_err() {
        return 0;
    }
    let drawn = u64::from_ne_bytes(bytes) % (u64::from(most) + 1);
    u32::try_from(drawn).unwrap_or(most)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn instance(priority: u16, weight: u16, port: u16, target: &str) -> Instance {
        Instance { priority, weight, port, target: target.to_owned() }
    }

    fn ports(ordered: &[(Name, u16)]) -> Vec<u16> {
        ordered.iter().map(|(_, port)| *port).collect()
    }

    #[test]
    fn what_names_no_host_and_port_is_left_out() {
        for target in ["", "10.0.0.1", "2130706433", "a b", "-x", "xn--\\233.example"] {
            assert_eq!(order(vec![instance(0, 0, 5432, target)], draw), [], "{target}");
        }
        assert_eq!(order(vec![instance(0, 0, 0, "db.internal")], draw), []);
    }

    #[test]
    fn a_lower_priority_comes_first_whatever_the_weights() {
        let all = vec![instance(20, 0, 3, "c"), instance(10, 65_535, 2, "b"), instance(0, 0, 1, "a")];
        for drawn in [0, 1, u32::MAX] {
            assert_eq!(ports(&order(all.clone(), |_| drawn)), [1, 2, 3]);
        }
    }

    /// The example of RFC 2782: 0..=sum is drawn, and the first whose running sum is not below it is taken.
    #[test]
    fn weights_are_shares() {
        let all = || vec![instance(0, 3, 3, "three"), instance(0, 0, 0xf, "none"), instance(0, 1, 1, "one")];
        let first = |drawn: u32| {
            let mut draws = [drawn, 0, 0].into_iter();
            ports(&order(all(), |_| draws.next().expect("three draws")))[0]
        };
        assert_eq!([0, 1, 2, 3, 4].map(first), [0xf, 1, 3, 3, 3]);
        let mut sums = Vec::new();
        let every = order(all(), |sum| {
            sums.push(sum);
            sum
        });
        assert_eq!((ports(&every), sums), (vec![3, 1, 0xf], vec![4, 1, 0]));
    }

    #[test]
    fn heavy_ones_are_drawn_more_often() {
        let all = || vec![instance(0, 10, 1, "light"), instance(0, 90, 2, "heavy")];
        let heavy = (0..2_000).filter(|_| ports(&order(all(), draw))[0] == 2).count();
        assert!((1_600..2_000).contains(&heavy), "{heavy}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_instance_is_there_once_and_priorities_never_fall(
            weights in prop::collection::vec((0..4_u16, any::<u16>()), 0..40),
            drawn in prop::collection::vec(any::<u32>(), 40),
        ) {
            let all: Vec<_> = weights
                .iter()
                .zip(1..)
                .map(|(&(priority, weight), port)| instance(priority, weight, port, "db.internal"))
                .collect();
            let mut drawn = drawn.into_iter();
            let ordered = ports(&order(all.clone(), |_| drawn.next().unwrap_or_default()));
            let mut sorted = ordered.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, all.iter().map(|one| one.port).collect::<Vec<_>>());
            let priorities: Vec<_> = ordered.iter().map(|port| all[usize::from(*port) - 1].priority).collect();
            prop_assert!(priorities.is_sorted());
        }
    }
}

//! Which peers know one another when there are more than each can know: a bounded overlay in place of a mesh. Pure.
//!
//! Peers are numbered in the order of their keys, and number x of n knows the [`FEW`] from `x * FEW` on, modulo n: the
//! generalised de Bruijn graph (Imase and Itoh, IEEE Trans. Comput. C-30, 1981). Each is known by as many as it knows, which
//! keeps every uplink busy, and log n to the base [`FEW`] hops lead from any peer to any other, the fewest that so few links allow.
//! Invariant: no peer knows itself, or more than [`PEERS_MAX`] others.

use muster_protocol::limits::PEERS_MAX;

/// How many peers each knows once there are too many for a mesh. Each asks all it knows in turn what they hold, so with more it
/// would ask each less often.
pub(crate) const FEW: usize = 8;

/// Numbers of the peers that number `place` of `count` is to know: all others while they are at most [`PEERS_MAX`], and
/// [`FEW`] otherwise.
pub fn partners(count: usize, place: usize) -> impl Iterator<Item = usize> {
    let (from, several) = match count <= PEERS_MAX + 1 {
        true => (0, count),
        false => (place * FEW, FEW),
    };
    let others = (from..from + several).map(move |other| other % count);
    others.filter(move |other| *other != place)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn few_know_one_another() {
        for count in [1, 2, PEERS_MAX + 1] {
            for place in 0..count {
                assert_eq!(partners(count, place).count(), count - 1);
            }
        }
    }

    proptest! {
        #[test]
        fn each_of_many_knows_few_others_and_is_known_by_as_many(count in PEERS_MAX + 2..3_000) {
            let mut known_by = vec![0; count];
            for place in 0..count {
                let others: BTreeSet<usize> = partners(count, place).collect();
                prop_assert!(others.len() >= FEW - 1 && others.len() == partners(count, place).count());
                prop_assert!(!others.contains(&place));
                others.iter().for_each(|other| known_by[*other] += 1);
            }
            prop_assert!(known_by.iter().all(|by| *by == FEW || *by == FEW - 1));
        }
    }

    #[test]
    fn every_peer_is_reached_in_a_few_hops() {
        let count = 10_000;
        let (mut reached, mut edge, mut hops) = (BTreeSet::from([0]), vec![0], 0);
        while reached.len() < count {
            let next = edge.iter().flat_map(|place| partners(count, *place));
            let next: BTreeSet<usize> = next.filter(|place| !reached.contains(place)).collect();
            assert!(!next.is_empty(), "{} of {count} are reached", reached.len());
            reached.extend(&next);
            edge = next.into_iter().collect();
            hops += 1;
        }
        assert!(hops <= 5, "{hops} hops");
    }
}

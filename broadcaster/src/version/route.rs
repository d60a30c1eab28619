//! Finds the objects that lead to a state with the fewest bytes: an anchor leads to a state from nothing, a delta from another
//! state. It is a shortest path over the few objects that announcements name. Pure.

use std::collections::BTreeMap;

use muster_protocol::id::StateRoot;
use muster_protocol::message::version::{Content, Object};

/// The objects that lead to `target` with the fewest bytes, in the order in which they are applied, from nothing or from
/// `held`. Empty if the target is held; `None` if no objects lead to it.
pub fn cheapest<'a>(
    objects: &[&'a Object],
    held: Option<StateRoot>,
    target: StateRoot,
) -> Option<Vec<&'a Object>> {
    // For every state reached so far: the fewest bytes, and the object that leads to it.
    let mut reached: BTreeMap<StateRoot, (u64, Option<&'a Object>)> = BTreeMap::new();
    reached.extend(held.map(|root| (root, (0, None))));
    // Each round settles at least one more state, so there are at most as many rounds as objects.
    for _ in 0..=objects.len() {
        let mut is_settled = true;
        for object in objects {
            let (before, to) = match object.content {
                Content::Anchor { root } => (Some(0), root),
                Content::Delta { from, to } => (reached.get(&from).map(|(cost, _)| *cost), to),
                Content::File { .. } => continue,
            };
            let Some(before) = before else { continue };
            let cost = before.saturating_add(object.bytes);
            if reached.get(&to).is_none_or(|(known, _)| cost < *known) {
                reached.insert(to, (cost, Some(object)));
                is_settled = false;
            }
        }
        if is_settled {
            break;
        }
    }
    let mut route = Vec::new();
    let mut at = target;
    while let Some(object) = reached.get(&at)?.1 {
        route.push(object);
        match object.content {
            Content::Delta { from, .. } => at = from,
            Content::Anchor { .. } | Content::File { .. } => break,
        }
    }
    debug_assert!(route.len() <= objects.len(), "a route uses an object once");
    route.reverse();
    Some(route)
}

#[cfg(test)]
mod tests {
    use muster_protocol::id::{ContentHash, PolicyVersion};
    use muster_protocol::message::version::Codec;

    use super::*;

    fn root(n: u8) -> StateRoot {
        StateRoot([n; 32])
    }

    fn object(content: Content, bytes: u64) -> Object {
        Object {
            content,
            version: PolicyVersion(1),
            bytes,
            codec: Codec::Raw,
            shard_bytes: 1 << 20,
            shards: vec![ContentHash([0; 32])],
        }
    }

    fn anchor(n: u8, bytes: u64) -> Object {
        object(Content::Anchor { root: root(n) }, bytes)
    }

    fn delta(from: u8, to: u8, bytes: u64) -> Object {
        let (from, to) = (root(from), root(to));
        object(Content::Delta { from, to }, bytes)
    }

    fn costs(objects: &[Object], held: Option<u8>, target: u8) -> Option<Vec<u64>> {
        let objects: Vec<&Object> = objects.iter().collect();
        let route = cheapest(&objects, held.map(root), root(target))?;
        Some(route.iter().map(|object| object.bytes).collect())
    }

    #[test]
    fn a_holder_of_the_parent_takes_the_delta_and_a_newcomer_the_anchor() {
        let objects = [delta(1, 2, 10), anchor(2, 1_000)];
        assert_eq!(costs(&objects, Some(1), 2), Some(vec![10]));
        assert_eq!(costs(&objects, None, 2), Some(vec![1_000]));
        assert_eq!(costs(&objects, Some(9), 2), Some(vec![1_000]));
        assert_eq!(costs(&objects, Some(2), 2), Some(vec![]));
    }

    #[test]
    fn a_newcomer_goes_by_the_last_anchor_and_what_follows_it() {
        let objects = [delta(2, 3, 11), anchor(1, 1_000), delta(1, 2, 10)];
        assert_eq!(costs(&objects, None, 3), Some(vec![1_000, 10, 11]));
    }

    #[test]
    fn a_late_peer_takes_the_squashed_delta_where_it_is_smaller_than_the_chain() {
        let mut objects = vec![anchor(5, 1_000)];
        objects.extend((1..5).map(|n| delta(n, n + 1, 10)));
        objects.push(delta(1, 5, 25));
        assert_eq!(costs(&objects, Some(1), 5), Some(vec![25]));
        assert_eq!(costs(&objects, Some(3), 5), Some(vec![10, 10]));
        objects.push(delta(1, 5, 2_000));
        assert_eq!(costs(&objects, Some(1), 5), Some(vec![25]));
    }

    #[test]
    fn an_unreachable_state_has_no_route_and_circles_end() {
        assert_eq!(costs(&[delta(1, 2, 1)], None, 2), None);
        assert_eq!(costs(&[], Some(1), 2), None);
        let circle = [
            delta(1, 2, 0),
            delta(2, 1, 0),
            delta(2, 2, 0),
            delta(2, 3, u64::MAX),
        ];
        assert_eq!(costs(&circle, Some(1), 3), Some(vec![0, u64::MAX]));
        assert_eq!(costs(&circle, None, 3), None);
    }
}

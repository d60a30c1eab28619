//! Who makes which squashed delta, and whether it is worth it: what leads over several versions at once, for those who come
//! late. Pure.
//!
//! Whoever holds both versions can make one, and one is enough. Members take turns in an order that each can tell alone
//! (rendezvous hashing: by a hash of the step and the member), so that the work is shared among them and falls to another
//! when one does not do it.

use std::num::NonZeroU64;

use muster_protocol::id::{PeerId, PolicyVersion, StateRoot};
use muster_protocol::message::version::{Object, squash_strides};
use serde::{Deserialize, Serialize};

use crate::version::route::cheapest;

/// How long a member's turn is before the next one's begins: about what 4 GiB of weights take on one thread.
const TURN_MS: u64 = 5_000;
/// The first turn begins this long after the version is here: dispatch is to have heard of it too, and others may fetch it.
const FIRST_MS: u64 = 500;
/// Most turns: of more members the last ones are not needed.
const TURNS_MAX: usize = 8;

/// How much of a member is lent to squashed deltas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SquashConfig {
    /// Most bytes of weights kept beside those in use; none are made where that is too little for two versions. 1 GiB:
    /// a model of 0.17 billion bf16 parameters for both strides, of 0.26 for the short one.
    pub bytes_max: u64,
}

impl Default for SquashConfig {
    fn default() -> Self {
        Self { bytes_max: 1 << 30 }
    }
}

/// The strides of the deltas to `version` that a member can make whose weights have `image_bytes`. A delta needs both its
/// versions, and two that end at the same version share that one.
pub fn strides_to(
    version: PolicyVersion,
    image_bytes: NonZeroU64,
    config: SquashConfig,
) -> impl Iterator<Item = u64> {
    squash_strides(version).take(strides_kept(image_bytes, config))
}

/// Of how many strides, the shortest first, the beginnings are kept.
pub fn strides_kept(image_bytes: NonZeroU64, config: SquashConfig) -> usize {
    let images = config.bytes_max / image_bytes;
    usize::try_from(images.saturating_sub(1)).unwrap_or(usize::MAX)
}

/// How long after the version is here `own` turn at the delta from `from` to `to` begins, among `others` who could make it
/// too. `None` when so many come before that it is never.
pub fn turn_ms(
    from: StateRoot,
    to: StateRoot,
    own: &PeerId,
    others: impl Iterator<Item = PeerId>,
) -> Option<u64> {
    let mine = weight(from, to, own);
    let sooner = |other: &PeerId| other != own && weight(from, to, other) < mine;
    let turn = others.filter(sooner).take(TURNS_MAX).count();
    (turn < TURNS_MAX).then(|| FIRST_MS + turn as u64 * TURN_MS)
}

/// BLAKE3("muster-squash-v1\0" ‖ from ‖ to ‖ member): the least comes first.
fn weight(from: StateRoot, to: StateRoot, member: &PeerId) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"muster-squash-v1\0");
    hasher.update(&from.0).update(&to.0).update(&member.0);
    *hasher.finalize().as_bytes()
}

/// Bytes that a delta from `from` to `to` has to be smaller than: of the single steps between them. `None` when it is not
/// known by which deltas the learner went there, as where it made none.
pub fn chain_bytes(objects: &[&Object], from: StateRoot, to: StateRoot) -> Option<u64> {
    let deltas: Vec<&Object> = objects
        .iter()
        .copied()
        .filter(|object| object.delta().is_some())
        .collect();
    let chain = cheapest(&deltas, Some(from), to)?;
    (chain.len() > 1).then(|| {
        chain
            .iter()
            .fold(0, |sum: u64, object| sum.saturating_add(object.bytes))
    })
}

#[cfg(test)]
mod tests {
    use muster_protocol::id::ContentHash;
    use muster_protocol::message::version::{Codec, Content};

    use super::*;

    fn root(n: u8) -> StateRoot {
        StateRoot([n; 32])
    }

    fn member(n: u8) -> PeerId {
        PeerId(*blake3::hash(&[n]).as_bytes())
    }

    fn strides(version: u64, image_bytes: u64, bytes_max: u64) -> Vec<u64> {
        let image_bytes = NonZeroU64::new(image_bytes).unwrap();
        strides_to(
            PolicyVersion(version),
            image_bytes,
            SquashConfig { bytes_max },
        )
        .collect()
    }

    #[test]
    fn a_delta_ends_at_multiples_of_its_stride_and_memory_bounds_the_strides() {
        assert_eq!(strides(4, 10, 30), [4]);
        assert_eq!(strides(16, 10, 30), [4, 16]);
        assert_eq!(strides(16, 10, 29), [4]);
        assert_eq!(strides(16, 10, 19), [0; 0]);
        assert_eq!(strides(16, 10, 0), [0; 0]);
        assert_eq!(strides(0, 10, 30), [0; 0]);
        assert_eq!(strides(6, 10, 30), [0; 0]);
    }

    #[test]
    fn every_step_has_one_first_member_and_all_members_get_their_share() {
        let members: Vec<PeerId> = (0..16).map(member).collect();
        let mut firsts = [0; 16];
        for step in 0..64 {
            let turns: Vec<Option<u64>> = members
                .iter()
                .map(|own| turn_ms(root(step), root(step + 1), own, members.iter().copied()))
                .collect();
            let first: Vec<usize> = (0..16).filter(|i| turns[*i] == Some(FIRST_MS)).collect();
            assert_eq!(first.len(), 1);
            firsts[first[0]] += 1;
            let mut begun: Vec<u64> = turns.into_iter().flatten().collect();
            begun.sort_unstable();
            let expected = (0..TURNS_MAX as u64).map(|turn| FIRST_MS + turn * TURN_MS);
            assert_eq!(begun, expected.collect::<Vec<_>>());
        }
        assert!(firsts.iter().all(|first| *first <= 12), "{firsts:?}");
        assert!(
            firsts.iter().filter(|first| **first > 0).count() >= 12,
            "{firsts:?}"
        );
    }

    #[test]
    fn a_member_alone_is_first() {
        assert_eq!(
            turn_ms(root(1), root(2), &member(1), std::iter::empty()),
            Some(FIRST_MS)
        );
    }

    #[test]
    fn it_is_held_against_the_learners_single_steps_and_no_anchor() {
        let object = |content, bytes| Object {
            content,
            version: PolicyVersion(1),
            bytes,
            codec: Codec::Raw,
            shard_bytes: 1 << 20,
            shards: vec![ContentHash([0; 32])],
        };
        let delta = |from, to, bytes| {
            let (from, to) = (root(from), root(to));
            object(Content::Delta { from, to }, bytes)
        };
        let objects = [
            delta(1, 2, 10),
            delta(2, 3, 11),
            object(Content::Anchor { root: root(3) }, 1),
            delta(4, 5, 9),
        ];
        let objects: Vec<&Object> = objects.iter().collect();
        assert_eq!(chain_bytes(&objects, root(1), root(3)), Some(21));
        assert_eq!(
            chain_bytes(&objects, root(1), root(2)),
            None,
            "one step is no chain"
        );
        assert_eq!(chain_bytes(&objects, root(1), root(5)), None);
    }
}

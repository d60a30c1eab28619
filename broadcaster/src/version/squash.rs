//! Decides which member makes which squashed delta (a delta over several versions, for peers that are behind), and whether the
//! delta is worth its bytes. Pure.
//!
//! Any member that holds both versions can make the delta, and one is enough. Members take turns by rendezvous hashing: each
//! orders all members by a hash of the step and the member. So the work is shared, and if one member does not do it, the next
//! one does.

use std::num::NonZeroU64;

use muster_protocol::id::{PeerId, PolicyVersion, StateRoot};
use muster_protocol::message::version::{Object, squash_strides};
use serde::{Deserialize, Serialize};

use crate::version::route::cheapest;

/// Time between the starts of two members' turns: about the time to encode 4 GiB of weights on one thread.
const TURN_MS: u64 = 5_000;
/// Time from a version's arrival to the first turn. Meanwhile dispatch hears of the version, and other peers fetch it.
const FIRST_MS: u64 = 500;
/// Most members that get a turn; the others are not needed.
const TURNS_MAX: usize = 8;

/// `[squash]`: how much memory a member lends to squashed deltas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SquashConfig {
    /// Most bytes of older weights kept in memory. A member that cannot keep two versions makes no deltas. 1 GiB: enough for
    /// both strides at 0.17 billion bf16 parameters, and for the short stride at 0.26 billion.
    pub bytes_max: u64,
}

impl Default for SquashConfig {
    fn default() -> Self {
        Self { bytes_max: 1 << 30 }
    }
}

/// The strides of the deltas to `version` that a member can make of weights of `image_bytes`. A delta needs both its versions
/// in memory; deltas to the same version share that version.
pub(crate) fn strides_to(
    version: PolicyVersion,
    image_bytes: NonZeroU64,
    config: SquashConfig,
) -> impl Iterator<Item = u64> {
    squash_strides(version).take(strides_kept(image_bytes, config))
}

/// For how many strides, shortest first, a member keeps the first version.
pub(crate) fn strides_kept(image_bytes: NonZeroU64, config: SquashConfig) -> usize {
    let images = config.bytes_max / image_bytes;
    usize::try_from(images.saturating_sub(1)).unwrap_or(usize::MAX)
}

/// Milliseconds from the version's arrival to the turn of `own` at the delta from `from` to `to`, where `others` could make it
/// too. `None` if [`TURNS_MAX`] others come first.
pub(crate) fn turn_ms(
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

/// BLAKE3("muster-squash-v1\0" ‖ from ‖ to ‖ member). The member with the lowest hash comes first.
fn weight(from: StateRoot, to: StateRoot, member: &PeerId) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"muster-squash-v1\0");
    hasher.update(&from.0).update(&to.0).update(&member.0);
    *hasher.finalize().as_bytes()
}

/// Bytes of the learner's single steps from `from` to `to`: a squashed delta must be smaller. `None` if the steps are not known,
/// for instance because the learner made no deltas.
pub(crate) fn chain_bytes(objects: &[&Object], from: StateRoot, to: StateRoot) -> Option<u64> {
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
    fn a_squashed_delta_competes_with_the_learners_single_steps_and_no_anchor() {
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

//! The descriptions of squashed deltas that members have made: what leads over several versions at once, so that who comes
//! late fetches less than the chain of single steps. Dispatch passes descriptions on and believes none: their bytes are checked
//! against the root that the learner signed. Pure.
//!
//! Bounded by what can be described: [`MAKERS_MAX`] for each stride that ends at a version which is remembered.

use muster_protocol::envelope::Signed;
use muster_protocol::id::{PeerId, PolicyVersion, StateRoot};
use muster_protocol::limits::{SQUASHED_MAX, STATEMENT_BYTES_MAX};
use muster_protocol::message::version::{Content, Object, VersionRef, squash_strides};

/// Most descriptions of one step. Two: should one not hold, there is another; further ones would never be fetched.
const MAKERS_MAX: usize = 2;

/// Why a description is not passed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unwanted {
    /// Signed by another key than the sender's.
    #[error("the squashed delta is described by {}, not by the asker: sign it yourself", author.short())]
    NotTheAskers { author: PeerId },
    /// An anchor or a file.
    #[error("only deltas are described by members: the learner describes the rest")]
    NoDelta,
    /// Too long to be passed on.
    #[error("the description has {bytes} bytes, at most {limit} are passed on: use larger shards")]
    TooLarge { bytes: usize, limit: usize },
    /// One of its ends is no version of the run that is remembered.
    #[error(
        "the delta to version {to} does not lead from one announced version to another: make it of newer ones"
    )]
    UnknownVersion { to: PolicyVersion },
    /// Another stride than the ones that late members look for.
    #[error("a delta from version {from} to {to} is not one of the strides that members look for")]
    Stride {
        from: PolicyVersion,
        to: PolicyVersion,
    },
    /// Enough others were sooner.
    #[error(
        "{MAKERS_MAX} members have described the step from version {from} to {to}: it is not needed"
    )]
    Enough {
        from: PolicyVersion,
        to: PolicyVersion,
    },
}

#[derive(Debug)]
struct Described {
    from: VersionRef,
    to: VersionRef,
    object: Signed<Object>,
}

/// The descriptions, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct SquashedDeltas {
    described: Vec<Described>,
}

impl SquashedDeltas {
    /// Takes a description by `member` in. `versions` are those that are remembered, oldest first.
    ///
    /// # Errors
    /// Why it is not passed on.
    pub(crate) fn describe(
        &mut self,
        member: PeerId,
        object: Signed<Object>,
        versions: &[VersionRef],
    ) -> Result<(), Unwanted> {
        self.retain(versions);
        if object.author != member {
            let author = object.author;
            return Err(Unwanted::NotTheAskers { author });
        }
        let Content::Delta { from, to } = object.body.content else {
            return Err(Unwanted::NoDelta);
        };
        let (bytes, limit) = (object.bytes.len(), STATEMENT_BYTES_MAX);
        if bytes > limit {
            return Err(Unwanted::TooLarge { bytes, limit });
        }
        let unknown = Unwanted::UnknownVersion {
            to: object.body.version,
        };
        let known = |root: StateRoot| versions.iter().rev().find(|known| known.root == root);
        let (Some(from), Some(to)) = (known(from), known(to)) else {
            return Err(unknown);
        };
        if to.version != object.body.version {
            return Err(unknown);
        }
        let (first, last) = (from.version, to.version);
        if !squash_strides(last).any(|stride| first.0 + stride == last.0) {
            let (from, to) = (first, last);
            return Err(Unwanted::Stride { from, to });
        }
        let same = |described: &&Described| described.from == *from && described.to == *to;
        let makers: Vec<PeerId> = self
            .described
            .iter()
            .filter(same)
            .map(|described| described.object.author)
            .collect();
        if makers.contains(&member) {
            return Ok(()); // said again by a member that did not hear the answer
        }
        if makers.len() >= MAKERS_MAX || self.described.len() >= SQUASHED_MAX {
            let (from, to) = (first, last);
            return Err(Unwanted::Enough { from, to });
        }
        self.described.push(Described {
            from: *from,
            to: *to,
            object,
        });
        Ok(())
    }

    /// Forgets what leads from or to a version that is not remembered any more.
    pub(crate) fn retain(&mut self, versions: &[VersionRef]) {
        self.described.retain(|described| {
            versions.contains(&described.from) && versions.contains(&described.to)
        });
    }

    /// Those that lead from `version` or a later one.
    pub(crate) fn from(&self, version: PolicyVersion) -> impl Iterator<Item = &Signed<Object>> {
        let later = move |described: &&Described| described.from.version >= version;
        self.described
            .iter()
            .filter(later)
            .map(|described| &described.object)
    }
}

#[cfg(test)]
mod tests {
    use muster_protocol::envelope::seal;
    use muster_protocol::id::ContentHash;
    use muster_protocol::identity::Identity;
    use muster_protocol::message::version::{Codec, SHARD_BYTES_MIN};

    use super::*;

    fn root(version: u64) -> StateRoot {
        StateRoot([version as u8; 32])
    }

    fn versions(range: std::ops::Range<u64>) -> Vec<VersionRef> {
        let reference = |version| VersionRef {
            version: PolicyVersion(version),
            root: root(version),
        };
        range.map(reference).collect()
    }

    fn object(content: Content, version: u64, shards: usize) -> Object {
        Object {
            content,
            version: PolicyVersion(version),
            bytes: u64::from(SHARD_BYTES_MIN) * shards as u64,
            codec: match content {
                Content::Delta { .. } => Codec::Delta,
                _ => Codec::Raw,
            },
            shard_bytes: SHARD_BYTES_MIN,
            shards: (0..shards)
                .map(|shard| ContentHash::of(&shard.to_le_bytes()))
                .collect(),
        }
    }

    fn delta(maker: &Identity, from: u64, to: u64) -> Signed<Object> {
        let content = Content::Delta {
            from: root(from),
            to: root(to),
        };
        signed(maker, object(content, to, 2))
    }

    fn signed(maker: &Identity, object: Object) -> Signed<Object> {
        seal(maker, &"test".parse().unwrap(), 1, object).unwrap()
    }

    fn described(
        deltas: &mut SquashedDeltas,
        maker: &Identity,
        from: u64,
        to: u64,
    ) -> Result<(), Unwanted> {
        deltas.describe(maker.peer_id(), delta(maker, from, to), &versions(0..33))
    }

    #[test]
    fn a_description_is_told_to_members_at_or_before_its_start() {
        let (maker, mut deltas) = (Identity::generate(), SquashedDeltas::default());
        for (from, to) in [(0, 4), (4, 8), (0, 16), (16, 32), (28, 32)] {
            described(&mut deltas, &maker, from, to).unwrap();
        }
        let told = |version| deltas.from(PolicyVersion(version)).count();
        assert_eq!([0, 1, 4, 5, 16, 17, 29].map(told), [5, 3, 3, 2, 2, 1, 0]);
    }

    #[test]
    fn a_description_is_refused_unless_the_asker_signed_it() {
        let (maker, other) = (Identity::generate(), Identity::generate());
        let mut deltas = SquashedDeltas::default();
        let borrowed = deltas.describe(other.peer_id(), delta(&maker, 0, 4), &versions(0..9));
        let author = maker.peer_id();
        assert_eq!(borrowed, Err(Unwanted::NotTheAskers { author }));
        assert_eq!(deltas.from(PolicyVersion(0)).count(), 0);
    }

    #[test]
    fn only_deltas_between_announced_versions_at_the_agreed_strides_are_taken() {
        let (maker, mut deltas) = (Identity::generate(), SquashedDeltas::default());
        for (from, to) in [(0, 3), (1, 5), (0, 8), (8, 4), (4, 4), (3, 4)] {
            let refused = described(&mut deltas, &maker, from, to);
            assert!(
                matches!(refused, Err(Unwanted::Stride { .. })),
                "{from} to {to}"
            );
        }
        let refused = described(&mut deltas, &maker, 32, 36);
        let to = PolicyVersion(36);
        assert_eq!(refused, Err(Unwanted::UnknownVersion { to }));
        let mut misnumbered = delta(&maker, 0, 4).body;
        misnumbered.version = PolicyVersion(8);
        let misnumbered = deltas.describe(
            maker.peer_id(),
            signed(&maker, misnumbered),
            &versions(0..9),
        );
        assert!(matches!(misnumbered, Err(Unwanted::UnknownVersion { .. })));
        let anchor = signed(&maker, object(Content::Anchor { root: root(4) }, 4, 2));
        let refused = deltas.describe(maker.peer_id(), anchor, &versions(0..9));
        assert_eq!(refused, Err(Unwanted::NoDelta));
    }

    #[test]
    fn a_step_has_two_makers_and_saying_it_again_changes_nothing() {
        let mut deltas = SquashedDeltas::default();
        let [first, second, third] = [(); 3].map(|()| Identity::generate());
        described(&mut deltas, &first, 0, 4).unwrap();
        described(&mut deltas, &first, 0, 4).unwrap();
        described(&mut deltas, &second, 0, 4).unwrap();
        let refused = described(&mut deltas, &third, 0, 4);
        let (from, to) = (PolicyVersion(0), PolicyVersion(4));
        assert_eq!(refused, Err(Unwanted::Enough { from, to }));
        described(&mut deltas, &third, 4, 8).unwrap();
        assert_eq!(deltas.from(PolicyVersion(0)).count(), 3);
    }

    #[test]
    fn what_leads_from_a_forgotten_or_replaced_version_is_forgotten() {
        let (maker, mut deltas) = (Identity::generate(), SquashedDeltas::default());
        described(&mut deltas, &maker, 0, 4).unwrap();
        described(&mut deltas, &maker, 4, 8).unwrap();
        deltas.retain(&versions(1..33));
        assert_eq!(deltas.from(PolicyVersion(0)).count(), 1);
        let mut replaced = versions(1..33);
        replaced[7].root = root(99);
        deltas.retain(&replaced);
        assert_eq!(deltas.from(PolicyVersion(0)).count(), 0);
    }

    #[test]
    fn a_description_that_is_too_long_to_be_passed_on_is_refused() {
        let (maker, mut deltas) = (Identity::generate(), SquashedDeltas::default());
        let content = delta(&maker, 0, 4).body.content;
        let long = signed(&maker, object(content, 4, 2_100));
        let refused = deltas.describe(maker.peer_id(), long, &versions(0..9));
        assert!(
            matches!(refused, Err(Unwanted::TooLarge { .. })),
            "{refused:?}"
        );
    }
}

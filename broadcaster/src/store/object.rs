//! Cuts an object's bytes into shards. Each shard has its own hash, so that any peer may relay it.
//!
//! Knows sizes and hashes, not the meaning of the bytes. Invariant: shards of a described object tile its bytes.

use std::ops::Range;

use bytes::Bytes;
use muster_protocol::id::{ContentHash, PolicyVersion};
use muster_protocol::message::version::{Codec, Content, Object, SHARD_BYTES_MAX, SHARD_BYTES_MIN};

/// About how many shards a small object has: enough that peers can trade them, few enough that frames cost little.
const SHARDS_AIM: u64 = 48;
/// About how many shards a large object has. A peer relays a shard only when it has all of it, so large shards delay a long
/// chain of peers; and each shard costs a hash in the description.
const LARGE_SHARDS_AIM: u64 = 1_024;
/// Only small objects have smaller shards than this: elsewhere their frames and requests cost more than they save.
const MEDIUM_SHARD_BYTES: u64 = 64 << 10;
/// Largest shard while the number of shards is within its limit.
const LARGE_SHARD_BYTES: u32 = 1 << 20;
/// Most shards of an object described here: 32 bytes each, so that its description fills at most half of the 1 MiB that an
/// announcement may have.
const DESCRIBED_SHARDS_MAX: u64 = 16_384;

/// Why bytes are not an object, or not a shard of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    #[error("cannot describe an object of 0 bytes: give it content")]
    Empty,
    /// More than [`DESCRIBED_SHARDS_MAX`] shards of the largest size can hold.
    #[error("an object of {bytes} bytes is over the limit of {limit} bytes: split it")]
    TooLarge { bytes: u64, limit: u64 },
    #[error("object has {found} bytes, but its description says {expected}: fetch it again")]
    Size { expected: u64, found: u64 },
    #[error("shard {shard} does not exist in an object of {shards} shards")]
    NoShard { shard: u32, shards: u32 },
    #[error("bytes {}..{} (shard {shard}) differ from the object's description: fetch them again", range.start, range.end)]
    Differs {
        shard: u32,
        /// The shard's bytes within the object.
        range: Range<u64>,
    },
}

/// The size of every shard but the last for an object of this size; a power of two.
///
/// # Errors
/// When the object is empty or larger than shards of the largest size can hold.
pub fn shard_bytes(bytes: u64) -> Result<u32, ObjectError> {
    if bytes == 0 {
        return Err(ObjectError::Empty);
    }
    let limit = DESCRIBED_SHARDS_MAX * u64::from(SHARD_BYTES_MAX);
    if bytes > limit {
        return Err(ObjectError::TooLarge { bytes, limit });
    }
    let few = bytes.div_ceil(SHARDS_AIM).next_power_of_two();
    let many = bytes.div_ceil(LARGE_SHARDS_AIM).next_power_of_two();
    let aim = few.min(MEDIUM_SHARD_BYTES).max(many);
    let needed = bytes.div_ceil(DESCRIBED_SHARDS_MAX).next_power_of_two();
    let size = aim
        .clamp(u64::from(SHARD_BYTES_MIN), u64::from(LARGE_SHARD_BYTES))
        .max(needed);
    // At most the limit divided by the number of shards, which is the largest shard.
    Ok(u32::try_from(size).unwrap_or(SHARD_BYTES_MAX))
}

/// Describes `bytes` as an object. Hashes all bytes: call it for large objects on a thread that may block.
///
/// # Errors
/// When there are no bytes or too many.
pub fn describe_object(
    content: Content,
    version: PolicyVersion,
    bytes: &[u8],
) -> Result<Object, ObjectError> {
    let shard_bytes = shard_bytes(bytes.len() as u64)?;
    let shards = bytes
        .chunks(shard_bytes as usize)
        .map(ContentHash::of)
        .collect();
    Ok(Object {
        content,
        version,
        bytes: bytes.len() as u64,
        codec: match content {
            Content::Delta { .. } => Codec::Delta,
            Content::Anchor { .. } | Content::File { .. } => Codec::Raw,
        },
        shard_bytes,
        shards,
    })
}

/// How many shards an object has; a validated description has at most 65,536.
pub fn shard_count(object: &Object) -> u32 {
    u32::try_from(object.shards.len()).unwrap_or(u32::MAX)
}

/// The bytes of one shard within the object.
///
/// # Errors
/// When there is no such shard.
pub fn shard_range(object: &Object, shard: u32) -> Result<Range<u64>, ObjectError> {
    let shards = shard_count(object);
    if shard >= shards {
        return Err(ObjectError::NoShard { shard, shards });
    }
    let start = u64::from(shard) * u64::from(object.shard_bytes);
    let end = (start + u64::from(object.shard_bytes)).min(object.bytes);
    debug_assert!(start < end, "shards tile the object");
    Ok(start..end)
}

/// Checks that `bytes` are shard number `shard`.
///
/// # Errors
/// When they are not, or there is no such shard.
pub(crate) fn verify_shard(object: &Object, shard: u32, bytes: &[u8]) -> Result<(), ObjectError> {
    let range = shard_range(object, shard)?;
    let expected = &object.shards[shard as usize];
    if bytes.len() as u64 != range.end - range.start || ContentHash::of(bytes) != *expected {
        return Err(ObjectError::Differs { shard, range });
    }
    Ok(())
}

/// Checks that `bytes` are the whole object.
///
/// # Errors
/// Names the size, or the first byte range that differs.
pub(crate) fn verify_object(object: &Object, bytes: &[u8]) -> Result<(), ObjectError> {
    if bytes.len() as u64 != object.bytes {
        return Err(ObjectError::Size {
            expected: object.bytes,
            found: bytes.len() as u64,
        });
    }
    for (shard, chunk) in bytes.chunks(object.shard_bytes.max(1) as usize).enumerate() {
        verify_shard(object, u32::try_from(shard).unwrap_or(u32::MAX), chunk)?;
    }
    Ok(())
}

/// Concatenates an object's shards. A single shard is returned without a copy.
pub(crate) fn assemble(shards: &[Bytes]) -> Bytes {
    if let [only] = shards {
        return only.clone();
    }
    let mut whole = Vec::with_capacity(shards.iter().map(Bytes::len).sum());
    shards
        .iter()
        .for_each(|shard| whole.extend_from_slice(shard));
    whole.into()
}

#[cfg(test)]
mod tests {
    use muster_protocol::envelope::Statement;
    use muster_protocol::id::StateRoot;
    use proptest::prelude::*;

    use super::*;

    fn anchor(bytes: &[u8]) -> Object {
        describe_object(
            Content::Anchor {
                root: StateRoot([1; 32]),
            },
            PolicyVersion(3),
            bytes,
        )
        .unwrap()
    }

    #[test]
    fn small_objects_have_tens_of_shards_and_large_ones_at_most_a_mebibyte_each() {
        for (bytes, shard, count) in [
            (1, 4 << 10, 1),
            (4 << 10, 4 << 10, 1),
            (1_240_000, 32 << 10, 38),
            (8 << 20, 64 << 10, 128),
            (64 << 20, 64 << 10, 1_024),
            (1 << 30, 1 << 20, 1_024),
            (40 << 30, 4 << 20, 10_240),
        ] {
            assert_eq!(shard_bytes(bytes).unwrap(), shard, "{bytes}");
            assert_eq!(bytes.div_ceil(u64::from(shard)), count, "{bytes}");
        }
    }

    #[test]
    fn an_object_without_bytes_or_with_too_many_is_refused() {
        assert_eq!(shard_bytes(0), Err(ObjectError::Empty));
        assert_eq!(shard_bytes(256 << 30), Ok(16 << 20));
        assert!(matches!(
            shard_bytes((256 << 30) + 1),
            Err(ObjectError::TooLarge { .. })
        ));
    }

    #[test]
    fn a_flipped_byte_is_named_by_its_range() {
        let mut bytes: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
        let object = anchor(&bytes);
        object.validate().unwrap();
        verify_object(&object, &bytes).unwrap();
        bytes[9_000] ^= 1;
        let expected = ObjectError::Differs {
            shard: 2,
            range: 8_192..12_288,
        };
        assert_eq!(verify_object(&object, &bytes), Err(expected));
        let truncated = verify_object(&object, &bytes[..19_999]);
        assert_eq!(
            truncated,
            Err(ObjectError::Size {
                expected: 20_000,
                found: 19_999
            })
        );
    }

    proptest! {
        #[test]
        fn shards_tile_the_object_and_assemble_to_it(bytes in proptest::collection::vec(any::<u8>(), 1..40_000)) {
            let object = anchor(&bytes);
            prop_assert!(object.validate().is_ok());
            let mut shards = Vec::new();
            for shard in 0..shard_count(&object) {
                let range = shard_range(&object, shard).unwrap();
                let slice = &bytes[range.start as usize..range.end as usize];
                prop_assert!(verify_shard(&object, shard, slice).is_ok());
                shards.push(Bytes::copy_from_slice(slice));
            }
            prop_assert!(shard_range(&object, shard_count(&object)).is_err());
            prop_assert_eq!(&assemble(&shards)[..], &bytes[..]);
        }

        #[test]
        fn every_size_gives_a_description_that_validates(bytes in 1u64..256 << 30) {
            let size = shard_bytes(bytes).unwrap();
            prop_assert!((SHARD_BYTES_MIN..=SHARD_BYTES_MAX).contains(&size));
            prop_assert!(bytes.div_ceil(u64::from(size)) <= DESCRIBED_SHARDS_MAX);
        }
    }
}

use muster_protocol::message::version::{Codec, Content};
use proptest::prelude::*;

use super::*;
use crate::version::state::tests::version_of;
use crate::version::state::{tensor_spans, verify_state};

/// A file of f32 tensors with these numbers of elements, in this order.
fn file(tensors: &[(&str, usize)]) -> Vec<u8> {
    let mut header = r#"{"__metadata__":{"format":"pt"}"#.to_owned();
    let mut data = 0;
    for (name, elements) in tensors {
        let end = data + elements * 4;
        header += &format!(
            r#","{name}":{{"dtype":"F32","shape":[{elements}],"data_offsets":[{data},{end}]}}"#
        );
        data = end;
    }
    header += "}";
    let mut bytes = vec![0; data];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &bytes,
    ]
    .concat()
}

/// The version and the description in shards of this size.
fn described(bytes: &[u8], shard_bytes: usize) -> (Version, Object) {
    let version = version_of(bytes);
    let anchor = Object {
        content: Content::Anchor { root: version.root },
        version: version.version,
        bytes: bytes.len() as u64,
        codec: Codec::Raw,
        shard_bytes: shard_bytes as u32,
        shards: bytes.chunks(shard_bytes).map(ContentHash::of).collect(),
    };
    (version, anchor)
}

#[test]
fn hashes_are_those_of_the_tensors_in_the_order_of_the_table() {
    // Small shards on one thread, large ones on two.
    for shard_bytes in [4 << 10, 64 << 10, 256 << 10, 1 << 20] {
        let bytes = file(&[("w", 300_000), ("a", 7), ("n", 100_000)]);
        let (version, anchor) = described(&bytes, shard_bytes);
        let checked = verify_stream(&mut &*bytes, &version, &anchor).unwrap();
        let spans = tensor_spans(&bytes).unwrap();
        let expected: Vec<ContentHash> = spans
            .iter()
            .map(|span| ContentHash::of(&bytes[span.range.clone()]))
            .collect();
        assert_eq!(checked.hashes, expected);
        assert!(bytes.starts_with(&checked.head));
    }
}

#[test]
fn a_flipped_byte_is_named_by_its_shard_and_tensor() {
    for (shard_bytes, expected) in [
        (4 << 10, 1_597_440..1_601_536),
        (256 << 10, 1_572_864..1_835_008),
    ] {
        let mut bytes = file(&[("w", 300_000), ("a", 50), ("n", 100_000)]);
        let (version, anchor) = described(&bytes, shard_bytes);
        bytes[1_600_000] ^= 1;
        let error = verify_stream(&mut &*bytes, &version, &anchor).unwrap_err();
        let StreamError::State(StateError::Differs { range, place }) = error else {
            panic!("{error}")
        };
        let end = expected.end.min(bytes.len() as u64);
        assert_eq!((range, place.as_str()), (expected.start..end, "tensor `n`"));
    }
}

#[test]
fn a_file_that_ends_early_or_has_another_root_is_refused() {
    let bytes = file(&[("w", 3_000), ("a", 7)]);
    let (version, anchor) = described(&bytes, 4 << 10);
    let error = verify_stream(&mut &bytes[..9_000], &version, &anchor).unwrap_err();
    assert!(matches!(error, StreamError::Read(_)), "{error}");
    let mut other = bytes;
    *other.last_mut().unwrap() ^= 1;
    let (_, lying) = described(&other, 4 << 10);
    let error = verify_stream(&mut &*other, &version, &lying).unwrap_err();
    assert!(
        matches!(error, StreamError::State(StateError::Root { .. })),
        "{error}"
    );
}

#[test]
fn a_header_that_claims_too_much_is_refused_though_it_is_described() {
    let bytes = file(&[("w", 3_000)]);
    let (version, _) = described(&bytes, 4 << 10);
    for length in [0, 1 << 20, HEADER_BYTES_MAX + 1, u64::MAX] {
        let mut lying = bytes.clone();
        lying[..8].copy_from_slice(&length.to_le_bytes());
        let (_, mut anchor) = described(&bytes, 4 << 10);
        anchor.shards = lying.chunks(4 << 10).map(ContentHash::of).collect();
        let error = verify_stream(&mut &*lying, &version, &anchor).unwrap_err();
        assert!(matches!(error, StreamError::State(_)), "{length}: {error}");
    }
}

proptest! {
    #[test]
    fn the_stream_says_what_is_said_of_the_whole(at in any::<prop::sample::Index>(), bit in 0u8..8, flip in any::<bool>()) {
        let mut bytes = file(&[("w", 2_000), ("a", 7), ("n", 1_000)]);
        let (version, anchor) = described(&bytes, 4 << 10);
        if flip {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        let whole = verify_state(&bytes, &version, Some(&anchor));
        let stream = verify_stream(&mut &*bytes, &version, &anchor);
        match (whole, stream) {
            (Ok(()), Ok(_)) => prop_assert!(!flip),
            (Err(whole), Err(StreamError::State(stream))) => prop_assert_eq!(whole, stream),
            (whole, stream) => prop_assert!(false, "{:?} and {:?}", whole, stream.map(drop)),
        }
    }
}

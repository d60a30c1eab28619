use muster_protocol::envelope::Statement;
use muster_protocol::id::{DescriptorHash, Generation, PolicyVersion};
use muster_protocol::message::version::{Content, state_root};
use proptest::prelude::*;

use super::*;
use crate::store::object::describe_object;

/// A file with these tensors of f32, laid out in the order given.
fn file(tensors: &[(&str, Vec<f32>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert(
        "__metadata__".to_owned(),
        serde_json::json!({"format": "pt"}),
    );
    let mut data = Vec::new();
    for (name, values) in tensors {
        let start = data.len();
        values
            .iter()
            .for_each(|value| data.extend_from_slice(&value.to_le_bytes()));
        let entry = serde_json::json!({
            "dtype": "F32", "shape": [values.len()], "data_offsets": [start, data.len()]
        });
        header.insert((*name).to_owned(), entry);
    }
    with_header(&serde_json::Value::Object(header).to_string(), &data)
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        data,
    ]
    .concat()
}

fn sample() -> Vec<u8> {
    file(&[
        ("norm", vec![1.0; 8]),
        ("embed", (0..3_000).map(|i| i as f32).collect()),
    ])
}

pub(super) fn version_of(bytes: &[u8]) -> Version {
    let (parameters, part) = describe_state(bytes).unwrap();
    Version {
        descriptor: DescriptorHash([0; 32]),
        generation: Generation(1),
        version: PolicyVersion(4),
        parent: None,
        parameters,
        parts: vec![part],
        root: state_root(&[part]),
        files: Vec::new(),
    }
}

fn anchor_of(bytes: &[u8]) -> Object {
    let root = version_of(bytes).root;
    describe_object(Content::Anchor { root }, PolicyVersion(4), bytes).unwrap()
}

#[test]
fn the_root_does_not_depend_on_the_layout_of_the_file() {
    let (a, b) = (("a", vec![1.0, 2.0]), ("b", vec![3.0]));
    let (table, part) = describe_state(&file(&[a.clone(), b.clone()])).unwrap();
    assert_eq!(
        describe_state(&file(&[b, a])).unwrap(),
        (table.clone(), part)
    );
    let names: Vec<&str> = table.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn the_root_is_the_one_written_out_by_hand() {
    let (_, part) = describe_state(&file(&[("w", vec![1.0, 2.0]), ("z", vec![0.5])])).unwrap();
    let by_hand = |name: &[u8], elements: u64, data: &[u8]| {
        let mut text = b"muster-tensor-v1\0".to_vec();
        text.extend_from_slice(&1u32.to_le_bytes());
        text.extend_from_slice(name);
        text.extend_from_slice(&[1, 1]);
        text.extend_from_slice(&elements.to_le_bytes());
        text.extend_from_slice(blake3::hash(data).as_bytes());
        *blake3::hash(&text).as_bytes()
    };
    let w = by_hand(b"w", 2, &[0, 0, 128, 63, 0, 0, 0, 64]);
    let z = by_hand(b"z", 1, &[0, 0, 0, 63]);
    let expected = blake3::hash(&[&b"muster-node-v1\0"[..], &w, &z].concat());
    assert_eq!(part.root.0, *expected.as_bytes());
}

#[test]
fn the_tree_has_the_shape_of_rfc_6962() {
    let leaves: Vec<ContentHash> = (0..7u8).map(|i| ContentHash::of(&[i])).collect();
    let l = |i: usize| leaves[i];
    assert_eq!(merkle_root(&leaves[..1]), l(0));
    assert_eq!(merkle_root(&leaves[..3]), node(&node(&l(0), &l(1)), &l(2)));
    let left = node(&node(&l(0), &l(1)), &node(&l(2), &l(3)));
    assert_eq!(merkle_root(&leaves[..5]), node(&left, &l(4)));
    assert_eq!(
        merkle_root(&leaves),
        node(&left, &node(&node(&l(4), &l(5)), &l(6)))
    );
}

#[test]
fn the_weights_of_a_version_are_recognised_in_any_layout() {
    let version = version_of(&sample());
    version.validate().unwrap();
    verify_state(&sample(), &version, Some(&anchor_of(&sample()))).unwrap();
    let other = file(&[
        ("embed", (0..3_000).map(|i| i as f32).collect()),
        ("norm", vec![1.0; 8]),
    ]);
    assert_ne!(other, sample());
    verify_state(&other, &version, None).unwrap();
}

#[test]
fn a_changed_tensor_is_named_with_its_bytes() {
    let version = version_of(&sample());
    let mut bytes = sample();
    bytes[9_000] ^= 1;
    let error = verify_state(&bytes, &version, Some(&anchor_of(&sample()))).unwrap_err();
    let end = (bytes.len() as u64).min(12_288);
    let expected = StateError::Differs {
        range: 8_192..end,
        place: "tensor `embed`".to_owned(),
    };
    assert_eq!(error, expected);
    assert!(matches!(
        verify_state(&bytes, &version, None),
        Err(StateError::Root { .. })
    ));
}

#[test]
fn missing_unexpected_and_reshaped_tensors_are_named() {
    let version = version_of(&file(&[("a", vec![1.0]), ("b", vec![2.0])]));
    let check =
        |tensors: &[(&str, Vec<f32>)]| verify_state(&file(tensors), &version, None).unwrap_err();
    let a = ("a", vec![1.0]);
    assert_eq!(
        check(std::slice::from_ref(&a)),
        StateError::Missing {
            name: "b".to_owned()
        }
    );
    let extra = check(&[a.clone(), ("b", vec![2.0]), ("c", vec![3.0])]);
    assert_eq!(
        extra,
        StateError::Unexpected {
            name: "c".to_owned()
        }
    );
    let reshaped = check(&[a, ("b", vec![2.0, 2.0])]);
    assert!(matches!(reshaped, StateError::Shape { name, .. } if name == "b"));
}

#[test]
fn hostile_headers_are_refused_with_the_reason() {
    let entry = |range: &str| format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":{range}}}"#);
    let refused = |header: String, problem: &str| {
        let error = describe_state(&with_header(&header, &[0; 8]))
            .unwrap_err()
            .to_string();
        assert!(error.contains(problem), "{header}: {error}");
    };
    let at = |range: &str| entry(range);
    refused("{}".to_owned(), "no tensor");
    refused("[".to_owned(), "cannot read safetensors header");
    refused(
        format!(r#"{{"a":{},"a":{}}}"#, at("[0,4]"), at("[4,8]")),
        "appears twice",
    );
    refused(
        format!(r#"{{"a":{},"b":{}}}"#, at("[0,4]"), at("[0,4]")),
        "starts at 0",
    );
    refused(format!(r#"{{"a":{}}}"#, at("[4,8]")), "starts at 4");
    refused(
        format!(r#"{{"a":{}}}"#, at("[0,4]")),
        "has 70 bytes, but its header needs 66",
    );
    refused(format!(r#"{{"a":{}}}"#, at("[8,4]")), "not the size");
    refused(
        format!(r#"{{"a":{}}}"#, at("[18446744073709551615,4]")),
        "not the size",
    );
    refused(
        r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#.to_owned(),
        "has type",
    );
    let huge = r#"{"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,8]}}"#;
    refused(huge.to_owned(), "impossible shape");
    let long = [&u64::MAX.to_le_bytes()[..], &[b'{'; 64]].concat();
    assert!(matches!(
        describe_state(&long),
        Err(StateError::Header { .. })
    ));
}

#[test]
fn a_truncated_file_says_how_much_is_missing() {
    let bytes = sample();
    for keep in [0, 7, 8, 40, bytes.len() - 1] {
        assert!(
            matches!(
                describe_state(&bytes[..keep]),
                Err(StateError::Length { .. })
            ),
            "{keep}"
        );
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(header in proptest::collection::vec(any::<u8>(), 0..200), length in 0u64..220) {
        let bytes = [&length.to_le_bytes()[..], &header].concat();
        prop_assert!(describe_state(&bytes).is_err());
    }

    #[test]
    fn no_flipped_bit_keeps_the_weights_and_the_anchor(position in 0usize..12_231, bit in 0u8..8) {
        let mut bytes = sample();
        let position = position % bytes.len();
        bytes[position] ^= 1 << bit;
        prop_assert!(verify_state(&bytes, &version_of(&sample()), Some(&anchor_of(&sample()))).is_err());
    }
}

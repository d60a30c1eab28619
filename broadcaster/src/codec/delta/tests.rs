use proptest::prelude::*;

use super::*;

const TWO: NonZeroUsize = NonZeroUsize::new(2).unwrap();

/// A safetensors file of the given tensors.
fn file(tensors: &[(&str, &str, Vec<u8>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for (name, dtype, bytes) in tensors {
        let width = if *dtype == "F32" { 4 } else { 2 };
        let entry = serde_json::json!({
            "dtype": dtype, "shape": [bytes.len() / width], "data_offsets": [at, at + bytes.len()],
        });
        header.insert((*name).to_owned(), entry);
        at += bytes.len();
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    tensors.iter().for_each(|(_, _, bytes)| file.extend(bytes));
    file
}

fn noise(n: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 11) as u8
    };
    (0..n).map(|_| byte()).collect()
}

/// A parent of three kinds of tensors, and a child of it: few bf16 steps, all f32 low bytes, one tensor unchanged.
fn pair() -> (Vec<u8>, Vec<u8>) {
    let (a, b, c) = (noise(6_001 * 2, 5), noise(900 * 4, 6), noise(50 * 2, 7));
    let parent = file(&[
        ("w", "BF16", a.clone()),
        ("norm", "F32", b.clone()),
        ("still", "F16", c.clone()),
    ]);
    let mut moved = a;
    moved.chunks_mut(2).step_by(40).for_each(|w| w[0] ^= 1);
    let mut low = b;
    low.chunks_mut(4).for_each(|w| w[0] ^= 0x15);
    (
        parent,
        file(&[
            ("w", "BF16", moved),
            ("norm", "F32", low),
            ("still", "F16", c),
        ]),
    )
}

#[test]
fn each_slice_takes_its_smallest_method() {
    let (parent, child) = pair();
    let delta = encode(&parent, &child, TWO).unwrap();
    assert_eq!(delta.methods, [1, 1, 1, 0]);
    assert_eq!(
        (delta.changed, delta.elements),
        (151 + 900, 6_001 + 900 + 50)
    );
    assert_eq!(apply(&parent, &delta.bytes, TWO).unwrap(), child);
    assert_eq!(
        apply(&parent, &delta.bytes, NonZeroUsize::MIN).unwrap(),
        child
    );
    assert!(delta.bytes.len() < 500);
}

#[test]
fn noise_goes_as_it_is_and_costs_a_few_bytes_a_tensor() {
    let parent = file(&[
        ("a", "BF16", noise(5_000, 1)),
        ("b", "F32", noise(4_000, 2)),
    ]);
    let child = file(&[
        ("a", "BF16", noise(5_000, 3)),
        ("b", "F32", noise(4_000, 4)),
    ]);
    let delta = encode(&parent, &child, TWO).unwrap();
    assert_eq!(delta.methods, [0, 0, 0, 2]);
    assert!(delta.bytes.len() <= 9_000 + 2 * 64);
    assert_eq!(apply(&parent, &delta.bytes, TWO).unwrap(), child);
}

#[test]
fn a_tensor_longer_than_a_slice_is_cut() {
    let mut weights = vec![0x3d; 2 * (SLICE_ELEMENTS + 7)];
    let parent = file(&[("w", "BF16", weights.clone())]);
    *weights.last_mut().unwrap() = 0x3e;
    let child = file(&[("w", "BF16", weights)]);
    let delta = encode(&parent, &child, TWO).unwrap();
    // Seven weights as they are take fewer bytes than any table.
    assert_eq!(delta.methods, [1, 0, 0, 1]);
    assert_eq!(apply(&parent, &delta.bytes, TWO).unwrap(), child);
}

#[test]
fn files_of_another_layout_have_no_delta() {
    let (parent, _) = pair();
    let other = file(&[("w", "BF16", noise(12, 1))]);
    assert_eq!(encode(&parent, &other, TWO), Err(DeltaError::Layout));
    let (parent, other) = (
        file(&[("a", "BF16", vec![0; 4])]),
        file(&[("b", "BF16", vec![0; 4])]),
    );
    assert_eq!(encode(&parent, &other, TWO), Err(DeltaError::Layout));
    assert!(matches!(
        encode(b"no file", b"no file", TWO),
        Err(DeltaError::State(_))
    ));
}

#[test]
fn a_delta_cut_short_anywhere_or_too_long_is_refused() {
    let (parent, child) = pair();
    let delta = encode(&parent, &child, TWO).unwrap().bytes;
    for length in 0..delta.len() {
        assert!(apply(&parent, &delta[..length], TWO).is_err(), "{length}");
    }
    let longer = [&delta[..], &[0]].concat();
    let refused = apply(&parent, &longer, TWO).unwrap_err();
    assert!(
        refused.to_string().contains("bytes are left over"),
        "{refused}"
    );
    let room = apply_into(&parent, &delta, &mut [0; 9], TWO);
    assert!(matches!(room, Err(DeltaError::Room { found: 9, .. })));
}

#[test]
fn a_method_that_a_tensor_cannot_have_is_refused_by_name() {
    let (parent, _) = pair();
    // Slices: w, norm, still. A patch of no bytes for the f32 tensor.
    let delta = [&MAGIC[..], &[0, Method::Patch as u8, 0]].concat();
    let refused = apply(&parent, &delta, TWO).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "slice 0 of tensor `norm` in the delta has an invalid table: fetch the anchor"
    );
}

proptest! {
    #[test]
    fn an_altered_delta_never_panics(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4),
        bytes in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        let (parent, child) = pair();
        let mut delta = encode(&parent, &child, TWO).unwrap().bytes;
        for (at, bit) in flips {
            let at = at.index(delta.len());
            delta[at] ^= 1 << bit;
        }
        if let Ok(applied) = apply(&parent, &delta, TWO) {
            prop_assert_eq!(applied.len(), parent.len());
        }
        prop_assert!(apply(&parent, &bytes, TWO).is_err());
    }

    #[test]
    fn numbers_return_and_endless_ones_are_refused(number in 0u64..1 << 56) {
        let mut bytes = Vec::new();
        put_number(&mut bytes, number);
        prop_assert_eq!(take_number(&mut &bytes[..]), Some(number));
        prop_assert_eq!(take_number(&mut &[0xff; 20][..]), None);
    }
}

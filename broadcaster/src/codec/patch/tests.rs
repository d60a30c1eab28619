use proptest::prelude::*;

use super::*;

fn bytes_of(weights: &[u16]) -> Vec<u8> {
    weights
        .iter()
        .flat_map(|weight| weight.to_le_bytes())
        .collect()
}

fn returns(parent: &[u16], child: &[u16], float: Float) -> Patch {
    let (parent_bytes, child_bytes) = (bytes_of(parent), bytes_of(child));
    let patch = encode(&parent_bytes, &child_bytes, float).unwrap();
    let changed = parent.iter().zip(child).filter(|(a, b)| a != b).count();
    assert_eq!(patch.changed, changed as u64);
    let mut applied = vec![0xee; parent_bytes.len()];
    apply(&patch.bytes, &parent_bytes, &mut applied, float).unwrap();
    assert_eq!(applied, child_bytes);
    patch
}

/// A parent of ordinary weights and a child in which about one of `one_in` moved by a unit.
fn moved(n: usize, one_in: u32) -> (Vec<u16>, Vec<u16>) {
    let mut state = 0x2545_f491_u32;
    let mut chance = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let parent: Vec<u16> = (0..n).map(|_| 0x3c00 + (chance() % 0x300) as u16).collect();
    let child = parent.iter().map(|w| match chance() % one_in {
        0 => w + 1 - 2 * (chance() as u16 & 1),
        _ => *w,
    });
    let child = child.collect();
    (parent, child)
}

#[test]
fn every_pattern_becomes_every_neighbour_and_any_other() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for offset in [1u16, 0x7fff, 0x8000, 0xffff, 0x0180] {
        let child: Vec<u16> = all.iter().map(|w| w.wrapping_add(offset)).collect();
        returns(&all, &child, Float::Bf16);
        returns(&all, &child, Float::F16);
    }
    let signs: Vec<u16> = all.iter().map(|w| w ^ 0x8000).collect();
    returns(&all, &signs, Float::Bf16);
}

#[test]
fn the_order_of_patterns_is_the_order_of_values() {
    assert!((0..=u16::MAX).all(|w| weight_at(place(w)) == w));
    let ordered = [
        0xff80u16, 0xbf80, 0x8001, 0x8000, 0x0000, 0x0001, 0x3f80, 0x7f80,
    ];
    assert!(
        ordered
            .windows(2)
            .all(|pair| place(pair[0]) < place(pair[1]))
    );
    for (parent, child) in [
        (0u16, 0x8000u16),
        (1, 0),
        (0x7fc0, 0x7f80),
        (0xffff, 0x7fff),
    ] {
        assert_eq!(stepped(parent, step_between(parent, child)), Some(child));
    }
    assert_eq!(stepped(0, STEP_MAX + 1), None);
}

#[test]
fn slices_of_every_small_length_return_and_an_unchanged_one_costs_almost_nothing() {
    for n in 0..200 {
        let (parent, child) = moved(n, 3);
        returns(&parent, &child, Float::Bf16);
        let same = returns(&parent, &parent, Float::Bf16);
        assert!(same.bytes.len() < 16);
    }
}

#[test]
fn rare_small_steps_cost_little_more_than_their_entropy() {
    let (parent, child) = moved(1 << 20, 100);
    let patch = returns(&parent, &child, Float::Bf16);
    let p = patch.changed as f64 / (1 << 20) as f64;
    let entropy = (1 << 20) as f64 * (-p * p.log2() - (1.0 - p) * (1.0 - p).log2());
    let bound = (entropy + patch.changed as f64) / 8.0;
    assert!((patch.bytes.len() as f64) < 1.02 * bound + 64.0);
}

#[test]
fn a_patch_for_a_longer_slice_is_refused() {
    let (parent, child) = moved(1_000, 5);
    let patch = encode(&bytes_of(&parent), &bytes_of(&child), Float::Bf16).unwrap();
    let shorter = bytes_of(&parent[..900]);
    let mut applied = vec![0; shorter.len()];
    let refused = apply(&patch.bytes, &shorter, &mut applied, Float::Bf16);
    assert_eq!(refused, Err(SliceError::Beyond));
    assert!(encode(&[0; 3], &[0; 3], Float::Bf16).is_none());
    assert!(encode(&[0; 2], &[0; 4], Float::Bf16).is_none());
}

#[test]
fn a_patch_cut_short_is_refused_at_every_length() {
    let (parent, child) = moved(2_000, 20);
    let (parent, child) = (bytes_of(&parent), bytes_of(&child));
    let patch = encode(&parent, &child, Float::Bf16).unwrap();
    let mut applied = vec![0; parent.len()];
    for length in 0..patch.bytes.len() {
        assert!(apply(&patch.bytes[..length], &parent, &mut applied, Float::Bf16).is_err());
    }
}

proptest! {
    #[test]
    fn any_two_slices_return(
        pairs in proptest::collection::vec((any::<u16>(), any::<u16>(), 0u8..4), 0..2_000),
        dense in any::<bool>(),
    ) {
        let parent: Vec<u16> = pairs.iter().map(|pair| pair.0).collect();
        let child: Vec<u16> = pairs
            .iter()
            .map(|(parent, child, kind)| match kind {
                0 => *child,
                1 if dense => parent.wrapping_add(1),
                _ => *parent,
            })
            .collect();
        returns(&parent, &child, Float::Bf16);
        returns(&parent, &child, Float::F16);
    }

    #[test]
    fn whatever_bytes_come_the_decoder_ends_without_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4),
    ) {
        let (parent, child) = moved(3_000, 10);
        let (parent, child) = (bytes_of(&parent), bytes_of(&child));
        let mut applied = vec![0; parent.len()];
        let _never_panics = apply(&bytes, &parent, &mut applied, Float::Bf16);
        let mut patch = encode(&parent, &child, Float::Bf16).unwrap().bytes;
        for (at, bit) in flips {
            let at = at.index(patch.len());
            patch[at] ^= 1 << bit;
        }
        // Almost always refused; where the coder's end agrees by chance, the root of the result decides.
        let _never_panics = apply(&patch, &parent, &mut applied, Float::Bf16);
    }
}

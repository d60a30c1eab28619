//! Blocks of 64 16-bit weights: the class of each weight, the size of each class, and which weights changed. A block has 64
//! weights so that a set of them is one word. The loops run over arrays of fixed size, without a branch on a weight, so that
//! the compiler turns them into vector instructions.

/// Weights of a block.
pub(super) const BLOCK: usize = 64;
/// Bytes of a block.
pub(super) const BLOCK_BYTES: usize = 2 * BLOCK;
/// Most classes of weights.
pub(super) const CLASSES_MAX: usize = 16;

/// Which exponents have classes of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Classes {
    /// Bits below the exponent: 7 for bf16, 10 for f16.
    pub(super) shift: u32,
    /// Exponents up to this one are class 0.
    pub(super) low: u8,
    /// Exponents from this one on are the last class.
    pub(super) high: u8,
}

impl Classes {
    #[inline(always)]
    pub(super) fn of(&self, weight: u16) -> u8 {
        let exponent = ((weight & 0x7fff) >> self.shift) as u8;
        exponent.max(self.low).min(self.high) - self.low
    }

    pub(super) fn len(&self) -> usize {
        usize::from(self.high - self.low) + 1
    }
}

/// The class of each weight of a block.
pub(super) type ClassesOf = [u8; BLOCK];

#[inline(always)]
pub(super) fn weights(bytes: &[u8; BLOCK_BYTES]) -> [u16; BLOCK] {
    let mut weights = [0; BLOCK];
    let (pairs, _) = bytes.as_chunks::<2>();
    for (weight, pair) in weights.iter_mut().zip(pairs) {
        *weight = u16::from_le_bytes(*pair);
    }
    weights
}

#[inline(always)]
pub(super) fn classes_of(bytes: &[u8; BLOCK_BYTES], classes: &Classes) -> ClassesOf {
    let mut out = [0; BLOCK];
    for (class, weight) in out.iter_mut().zip(&weights(bytes)) {
        *class = classes.of(*weight);
    }
    out
}

/// How many weights of a block each of the first `classes` classes has.
#[inline(always)]
pub(super) fn counts(of: &ClassesOf, classes: usize) -> [u8; CLASSES_MAX] {
    let mut counts = [0; CLASSES_MAX];
    for (class, count) in counts.iter_mut().enumerate().take(classes) {
        let mut sum = 0u8;
        for of in of {
            sum += u8::from(*of == class as u8);
        }
        *count = sum;
    }
    counts
}

/// The weights of a block that are in `class`, as a set: the first weight is the lowest bit.
#[inline(always)]
pub(super) fn mask(of: &ClassesOf, class: u8) -> u64 {
    let mut flags = [0; BLOCK];
    for (flag, of) in flags.iter_mut().zip(of) {
        *flag = u8::from(*of == class);
    }
    gather(&flags)
}

/// How many weights before weight `i` are in its class.
#[inline(always)]
pub(super) fn rank(of: &ClassesOf, i: usize) -> u32 {
    let class = of[i];
    let mut sum = 0u8;
    for (j, of) in of.iter().enumerate() {
        sum += u8::from(*of == class) & u8::from((j as u8) < i as u8);
    }
    u32::from(sum)
}

#[inline(always)]
pub(super) fn weight_of(bytes: &[u8; BLOCK_BYTES], i: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])
}

/// The members of a set, in ascending order.
#[inline(always)]
pub(super) fn ones(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let place = (word != 0).then(|| word.trailing_zeros() as usize % BLOCK);
        word &= word.wrapping_sub(1);
        place
    })
}

/// The set of weights in which two blocks differ.
#[inline(always)]
pub(super) fn changed(parent: &[u8; BLOCK_BYTES], child: &[u8; BLOCK_BYTES]) -> u64 {
    if parent == child {
        return 0;
    }
    let (parent, child) = (weights(parent), weights(child));
    let mut differs = [0; BLOCK];
    for ((differs, parent), child) in differs.iter_mut().zip(&parent).zip(&child) {
        *differs = u8::from(parent != child);
    }
    gather(&differs)
}

/// The set of the flags that are 1; every flag is 0 or 1. Each shift moves the bits of one half of eight bytes beside those
/// of the other half.
#[inline(always)]
fn gather(flags: &[u8; BLOCK]) -> u64 {
    let mut word = 0;
    let (eights, _) = flags.as_chunks::<8>();
    for (index, eight) in eights.iter().enumerate() {
        let pairs = u64::from_le_bytes(*eight);
        let pairs = pairs | pairs >> 7;
        let fours = pairs | pairs >> 14;
        let eight = (fours | fours >> 28) & 0xff;
        word |= eight << (8 * index);
    }
    word
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_masks_and_ranks_agree_with_a_plain_loop(words in proptest::array::uniform32(any::<u32>()), low in 0u8..255) {
            let mut bytes = [0u8; BLOCK_BYTES];
            for (pair, word) in bytes.chunks_exact_mut(4).zip(&words) {
                pair.copy_from_slice(&word.to_le_bytes());
            }
            let classes = Classes { shift: 7, low, high: low.saturating_add(9) };
            let of = classes_of(&bytes, &classes);
            let counts = counts(&of, classes.len());
            for (class, count) in counts.iter().enumerate().take(classes.len()) {
                let mut expected = 0u64;
                for (i, weight) in weights(&bytes).iter().enumerate() {
                    let exponent = ((weight & 0x7fff) >> 7) as u8;
                    let own = exponent.clamp(classes.low, classes.high) - classes.low;
                    expected |= u64::from(usize::from(own) == class) << i;
                }
                prop_assert_eq!(mask(&of, class as u8), expected);
                for i in ones(expected) {
                    let before = expected & ((1 << i) - 1);
                    prop_assert_eq!(rank(&of, i), before.count_ones());
                }
                prop_assert_eq!(u32::from(*count), expected.count_ones());
            }
        }

        #[test]
        fn every_single_difference_is_found(at in 0..BLOCK_BYTES, flip in 1u8..) {
            let parent = [0x5a; BLOCK_BYTES];
            let mut child = parent;
            child[at] ^= flip;
            prop_assert_eq!(changed(&parent, &child), 1 << (at / 2));
            prop_assert_eq!(changed(&parent, &parent), 0);
        }
    }
}

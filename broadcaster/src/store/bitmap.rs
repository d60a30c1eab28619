//! The set of an object's shards that a peer holds: one bit per shard.
//!
//! Invariant: bits past the last shard are zero, so that equal sets have equal bytes and a count is a count of shards.

/// A set of shard numbers below a fixed length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    bits: Vec<u8>,
    length: u32,
    ones: u32,
}

impl Bitmap {
    /// The empty set over `length` shards.
    pub fn empty(length: u32) -> Self {
        Self {
            bits: vec![0; length.div_ceil(8) as usize],
            length,
            ones: 0,
        }
    }

    /// The set of all `length` shards.
    pub fn full(length: u32) -> Self {
        let mut bitmap = Self::empty(length);
        (0..length).for_each(|shard| {
            bitmap.insert(shard);
        });
        bitmap
    }

    /// Decodes a set from the wire. `None` if the bytes or the padding do not fit `length` shards.
    pub fn from_bytes(bytes: &[u8], length: u32) -> Option<Self> {
        if bytes.len() != length.div_ceil(8) as usize {
            return None;
        }
        let padding_is_zero = match (length % 8, bytes.last()) {
            (0, _) | (_, None) => true,
            (used, Some(last)) => last >> used == 0,
        };
        let ones = bytes.iter().map(|byte| byte.count_ones()).sum();
        padding_is_zero.then(|| Self {
            bits: bytes.to_vec(),
            length,
            ones,
        })
    }

    /// The wire format: bit `i % 8` of byte `i / 8` is shard `i`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bits
    }

    /// How many shards the object has.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// How many shards are in the set.
    pub fn count(&self) -> u32 {
        self.ones
    }

    /// Whether every shard is in the set.
    pub(crate) fn is_full(&self) -> bool {
        self.ones == self.length
    }

    /// Whether `shard` is in the set; false for a number out of range.
    pub fn contains(&self, shard: u32) -> bool {
        shard < self.length && self.bits[(shard / 8) as usize] >> (shard % 8) & 1 == 1
    }

    /// Adds `shard`. False if the set had it already or it is out of range.
    pub fn insert(&mut self, shard: u32) -> bool {
        if shard >= self.length || self.contains(shard) {
            return false;
        }
        self.bits[(shard / 8) as usize] |= 1 << (shard % 8);
        self.ones += 1;
        debug_assert!(self.ones <= self.length, "a count of shards");
        true
    }

    /// Adds every shard of `other`, a set over as many shards.
    pub(crate) fn insert_all(&mut self, other: &Bitmap) {
        debug_assert_eq!(self.length, other.length, "sets over different objects");
        self.bits
            .iter_mut()
            .zip(&other.bits)
            .for_each(|(ours, theirs)| *ours |= theirs);
        self.ones = self.bits.iter().map(|byte| byte.count_ones()).sum();
    }

    /// Removes `shard`. False if the set did not have it.
    pub fn remove(&mut self, shard: u32) -> bool {
        if !self.contains(shard) {
            return false;
        }
        self.bits[(shard / 8) as usize] &= !(1 << (shard % 8));
        self.ones -= 1;
        true
    }

    /// The shards in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.bits.iter().copied().enumerate().flat_map(ones)
    }

    /// The shards in both sets, ascending; `other` is a set over as many shards.
    pub(crate) fn iter_both<'a>(&'a self, other: &'a Bitmap) -> impl Iterator<Item = u32> + 'a {
        debug_assert_eq!(self.length, other.length, "sets over different objects");
        let both = self.bits.iter().zip(&other.bits).map(|(a, b)| a & b);
        both.enumerate().flat_map(ones)
    }
}

/// The shards of one byte of a set.
fn ones((place, mut byte): (usize, u8)) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = (byte != 0).then(|| byte.trailing_zeros())?;
        byte &= byte - 1;
        Some(8 * place as u32 + bit)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn padding_that_is_not_zero_is_refused() {
        assert!(Bitmap::from_bytes(&[0b0000_0111], 3).is_some());
        assert_eq!(Bitmap::from_bytes(&[0b0000_1111], 3), None);
        assert_eq!(Bitmap::from_bytes(&[0, 0], 3), None);
        assert_eq!(Bitmap::from_bytes(&[], 0), Some(Bitmap::empty(0)));
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_plain_set(length in 1u32..200, moves in proptest::collection::vec((any::<bool>(), 0u32..220), 0..300)) {
            let mut bitmap = Bitmap::empty(length);
            let mut set = std::collections::BTreeSet::new();
            for (add, shard) in moves {
                if add {
                    prop_assert_eq!(bitmap.insert(shard), shard < length && set.insert(shard));
                } else {
                    prop_assert_eq!(bitmap.remove(shard), set.remove(&shard));
                }
            }
            prop_assert_eq!(bitmap.count() as usize, set.len());
            prop_assert!(bitmap.iter().eq(set.iter().copied()));
            prop_assert_eq!(Bitmap::from_bytes(bitmap.as_bytes(), length), Some(bitmap));
        }
    }
}

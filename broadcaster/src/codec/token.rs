//! Splits a whole number into a token, which is entropy coded, and raw bits. Small numbers have a token each; larger ones share two
//! tokens per octave. The numbers in half an octave are about equally likely (this costs 0.01 bit for a geometric distribution),
//! and there are few enough tokens that a table of them is small.

/// Smaller numbers are their own tokens.
const DIRECT: u32 = 8;
/// Largest number: one more than the longest gap, which is a slice less one weight.
pub(super) const VALUE_MAX: u32 = super::SLICE_ELEMENTS as u32;
pub(super) const TOKENS: usize = DIRECT as usize + 2 * (VALUE_MAX.ilog2() as usize - 2);

/// The token of `value` (at most [`VALUE_MAX`]), its raw bits, and the number of raw bits.
#[inline]
pub(super) fn split(value: u32) -> (usize, u32, u32) {
    debug_assert!(value <= VALUE_MAX, "a value that has a token");
    if value < DIRECT {
        return (value as usize, 0, 0);
    }
    let octave = value.ilog2();
    let raw_bits = octave - 1;
    let half = (value >> raw_bits) & 1;
    let token = DIRECT + (octave - 3) * 2 + half;
    (token as usize, value & ((1 << raw_bits) - 1), raw_bits)
}

/// The smallest number of a token, and the number of its raw bits.
#[inline]
pub(super) fn base(token: usize) -> (u32, u32) {
    let token = token as u32;
    if token < DIRECT {
        return (token, 0);
    }
    let octave = (token - DIRECT) / 2 + 3;
    let half = (token - DIRECT) & 1;
    ((2 + half) << (octave - 1), octave - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_back_and_every_token_exists() {
        let mut seen = [false; TOKENS];
        let near_powers = (3..=22).flat_map(|octave| {
            let power = 1u32 << octave;
            [power - 1, power, power + 1, power + power / 2]
        });
        for value in (0..70_000).chain(near_powers).filter(|v| *v <= VALUE_MAX) {
            let (token, raw, raw_bits) = split(value);
            seen[token] = true;
            assert_eq!(base(token).1, raw_bits, "{value}");
            assert_eq!(base(token).0 + raw, value);
            assert!(raw < 1 << raw_bits);
        }
        // Tokens come in pairs, so the last one lies above the largest number.
        assert_eq!(seen.iter().filter(|seen| **seen).count(), TOKENS - 1);
    }
}

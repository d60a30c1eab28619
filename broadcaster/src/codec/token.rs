//! Whole numbers as a token, which is entropy coded, and raw bits, which are as likely as not: small numbers have a token of
//! their own, larger ones share two per octave. Half an octave is fine enough that the numbers within one are about equally
//! likely (0.01 bit lost for a geometric distribution), and coarse enough that a table of tokens costs few bytes.

/// Numbers below it are tokens.
const DIRECT: u32 = 8;
/// Largest number: a gap as long as a slice, and one.
pub(super) const VALUE_MAX: u32 = super::SLICE_ELEMENTS as u32;
/// How many tokens there are.
pub(super) const TOKENS: usize = DIRECT as usize + 2 * (VALUE_MAX.ilog2() as usize - 2);

/// The token of `value` (at most [`VALUE_MAX`]), its raw bits and how many these are.
#[inline]
pub(super) fn split(value: u32) -> (usize, u32, u32) {
    if value < DIRECT {
        return (value as usize, 0, 0);
    }
    let octave = value.ilog2();
    let raw_bits = octave - 1;
    let half = (value >> raw_bits) & 1;
    let token = DIRECT + (octave - 3) * 2 + half;
    (token as usize, value & ((1 << raw_bits) - 1), raw_bits)
}

/// The smallest number of a token, and how many raw bits are added to it.
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
        // The last half octave lies behind the largest number, and is there since tokens come in pairs.
        assert_eq!(seen.iter().filter(|seen| **seen).count(), TOKENS - 1);
    }
}

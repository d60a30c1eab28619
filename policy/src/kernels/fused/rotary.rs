//! Cosines and sines of rotary angles, computed when a position is first used: a model may allow a hundred thousand
//! positions, of which a run uses a few hundred.
//!
//! Invariant: the angles of a position do not depend on earlier uses.

use std::sync::OnceLock;

use crate::config::Rope;

/// Positions whose angles are computed together: a quarter of a MiB for heads of 128.
const CHUNK: usize = 256;

/// Cosines and sines of one position, each `[D/2]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Angles<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
}

/// One rotary embedding.
#[derive(Debug)]
pub(crate) struct Rotary {
    /// Radians per position, `[D/2]`.
    frequencies: Vec<f32>,
    /// Multiplies cosines and sines.
    factor: f32,
    /// `[CHUNK, 2, D/2]` each: a position's cosines, then its sines.
    chunks: Vec<OnceLock<Box<[f32]>>>,
}

impl Rotary {
    /// For heads of width `dim` and positions below `positions`.
    pub(crate) fn new(rope: &Rope, dim: usize, positions: usize) -> Self {
        Self {
            frequencies: rope.frequencies(dim),
            factor: rope.attention_factor(),
            chunks: (0..positions.div_ceil(CHUNK))
                .map(|_| OnceLock::new())
                .collect(),
        }
    }

    /// Angles `position · frequency` in f32, as Hugging Face computes them: checkpoints were trained with these roundings.
    pub(crate) fn angles(&self, position: usize) -> Angles<'_> {
        let chunk = self.chunks[position / CHUNK].get_or_init(|| self.chunk(position / CHUNK));
        let half = self.frequencies.len();
        let (cos, sin) = chunk[position % CHUNK * 2 * half..][..2 * half].split_at(half);
        Angles { cos, sin }
    }

    fn chunk(&self, index: usize) -> Box<[f32]> {
        let mut values = Vec::with_capacity(CHUNK * 2 * self.frequencies.len());
        for position in index * CHUNK..(index + 1) * CHUNK {
            let angles = || self.frequencies.iter().map(|f| position as f32 * f);
            values.extend(angles().map(|angle| angle.cos() * self.factor));
            values.extend(angles().map(|angle| angle.sin() * self.factor));
        }
        values.into_boxed_slice()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_context_takes_no_memory_before_it_is_used() {
        let rotary = Rotary::new(&Rope::plain(1e6), 256, 1 << 21);
        let made = || {
            rotary
                .chunks
                .iter()
                .filter(|chunk| chunk.get().is_some())
                .count()
        };
        assert_eq!(made(), 0);
        let angles = rotary.angles((1 << 21) - 1);
        assert_eq!(angles.cos.len(), 128);
        assert!((angles.cos[0] - ((1 << 21) as f32 - 1.0).cos()).abs() < 1e-6);
        assert_eq!(made(), 1);
    }
}

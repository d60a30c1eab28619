//! Forms of weights in panels: f32, bf16, or rounded to eight bits.
//!
//! Knows no products. Invariant: a weight is always widened to the same bits.

use std::ops::Range;

use half::{bf16, f16};

use crate::kernels::simd::vectorised;
use crate::weights::{Format, StoredTensor};

/// Columns of a panel where vectors have sixteen elements: two registers for each of eight rows and the weights take
/// eighteen of thirty-two.
pub(super) const WIDE: usize = 32;
/// Columns where vectors have eight elements or fewer: two registers for each of six rows and the weights take fourteen of
/// sixteen.
pub(super) const NARROW: usize = 16;

/// Inputs that are transposed together, so that writes stay in the first level of cache, and that share a scale.
pub(super) const TOGETHER: usize = 64;

impl<'a> StoredTensor<'a> {
    pub(super) fn bytes_per_row(&self, inputs: usize) -> usize {
        inputs * self.format.width()
    }

    /// The elements `range` of the row that starts at byte `start`, as f32.
    pub(super) fn elements(
        &self,
        start: usize,
        range: Range<usize>,
    ) -> impl Iterator<Item = f32> + use<'a> {
        let width = self.format.width();
        let bytes = &self.bytes[start + range.start * width..start + range.end * width];
        let format = self.format;
        bytes
            .chunks_exact(width)
            .map(move |bytes| match (format, bytes) {
                (Format::Bf16, &[low, high]) => {
                    f32::from_bits(u32::from_le_bytes([0, 0, low, high]))
                }
                (Format::F16, &[low, high]) => f16::from_le_bytes([low, high]).to_f32(),
                (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                // Chunks have the width of their format.
                _ => 0.0,
            })
    }

    /// Row `index` of `[_, out.len()]`, as f32.
    pub(crate) fn copy_row(&self, index: usize, out: &mut [f32]) {
        let width = out.len();
        let elements = self.elements(index * self.bytes_per_row(width), 0..width);
        for (out, value) in out.iter_mut().zip(elements) {
            *out = value;
        }
    }
}

/// Form in which inference keeps weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    F32,
    /// For weights stored in bf16, so that none is rounded.
    Bf16,
    /// 255 steps of a scale that neighbouring inputs share: see [`Quantised`].
    Int8,
}

impl Kept {
    /// Bytes of a matrix `[outputs, inputs]`, without the padding of its last panel.
    pub(crate) fn bytes(self, outputs: usize, inputs: usize) -> usize {
        match self {
            Self::F32 => outputs * inputs * size_of::<f32>(),
            Self::Bf16 => outputs * inputs * size_of::<bf16>(),
            Self::Int8 => outputs * inputs.div_ceil(TOGETHER) * (TOGETHER + size_of::<f32>()),
        }
    }
}

/// Weights of one or several inputs for every column of a panel. It holds numbers only, and zero bytes are zeros.
pub(super) trait Lane: Copy + Send + Sync {
    const COLUMNS: usize;
    /// [`TOGETHER`] is a multiple of it.
    const INPUTS: usize;

    /// Writes one column of consecutive lanes, for [`TOGETHER`] inputs or the last of a matrix.
    fn fill(lanes: &mut [Self], column: usize, weights: impl Iterator<Item = f32>);

    /// One column of a panel, widened: as many inputs as `out` has elements.
    fn copy_column(panel: &[Self], column: usize, out: &mut [f32]);
}

/// f32. Aligned, since a load across two cache lines takes twice as long.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Full<const C: usize>(pub(super) [f32; C]);

impl<const C: usize> Lane for Full<C> {
    const COLUMNS: usize = C;
    const INPUTS: usize = 1;

    fn fill(lanes: &mut [Self], column: usize, weights: impl Iterator<Item = f32>) {
        for (lane, weight) in lanes.iter_mut().zip(weights) {
            lane.0[column] = weight;
        }
    }

    fn copy_column(panel: &[Self], column: usize, out: &mut [f32]) {
        for (out, lane) in out.iter_mut().zip(panel) {
            *out = lane.0[column];
        }
    }
}

impl<const C: usize> Full<C> {
    #[inline(always)]
    pub(super) fn widened(&self) -> [f32; C] {
        self.0
    }
}

/// bf16, columns i and i + H in one word: a shift gives one half of a panel in order, a mask the other.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
pub(super) struct Half<const H: usize>([u32; H]);

impl<const H: usize> Lane for Half<H> {
    const COLUMNS: usize = 2 * H;
    const INPUTS: usize = 1;

    fn fill(lanes: &mut [Self], column: usize, weights: impl Iterator<Item = f32>) {
        for (Self(words), weight) in lanes.iter_mut().zip(weights) {
            // Exact: a weight stored in bf16 has zeros in its lower half.
            if column < H {
                words[column] = words[column] & 0xFFFF_0000 | weight.to_bits() >> 16;
            } else {
                words[column - H] = words[column - H] & 0xFFFF | weight.to_bits() & 0xFFFF_0000;
            }
        }
    }

    fn copy_column(panel: &[Self], column: usize, out: &mut [f32]) {
        for (out, Self(words)) in out.iter_mut().zip(panel) {
            *out = f32::from_bits(match column < H {
                true => words[column] << 16,
                false => words[column - H] & 0xFFFF_0000,
            });
        }
    }
}

impl<const H: usize> Half<H> {
    #[inline(always)]
    pub(super) fn widened<const C: usize>(&self) -> [f32; C] {
        let mut weights = [0.0; C];
        for lane in 0..H {
            weights[lane] = f32::from_bits(self.0[lane] << 16);
            weights[lane + H] = f32::from_bits(self.0[lane] & 0xFFFF_0000);
        }
        weights
    }
}

/// Whole numbers and their scales, `w ≈ scale·q` with `scale = max |w| / 127` over the [`TOGETHER`] inputs of one column:
/// 8.5 bits a weight, each off by half a scale at most.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Quantised<const C: usize> {
    scales: [f32; C],
    pub(super) steps: [[i8; C]; TOGETHER],
}

impl<const C: usize> Lane for Quantised<C> {
    const COLUMNS: usize = C;
    const INPUTS: usize = TOGETHER;

    fn fill(lanes: &mut [Self], column: usize, weights: impl Iterator<Item = f32>) {
        let mut values = [0.0f32; TOGETHER];
        let mut largest = 0.0f32;
        for (value, weight) in values.iter_mut().zip(weights) {
            *value = weight;
            largest = largest.max(weight.abs());
        }
        let Some(lane) = lanes.first_mut().filter(|_| largest > 0.0) else {
            return;
        };
        let scale = largest / 127.0;
        lane.scales[column] = scale;
        for (steps, value) in lane.steps.iter_mut().zip(values) {
            // Saturates if the scale is subnormal and has lost its precision.
            steps[column] = (value / scale).round() as i8;
        }
    }

    fn copy_column(panel: &[Self], column: usize, out: &mut [f32]) {
        for (out, lane) in out.chunks_mut(TOGETHER).zip(panel) {
            for (out, steps) in out.iter_mut().zip(&lane.steps) {
                *out = f32::from(steps[column]) * lane.scales[column];
            }
        }
    }
}

/// The first `lanes` lanes, of unspecified value.
fn room<const C: usize>(widened: &mut Vec<Full<C>>, lanes: usize) -> &mut [Full<C>] {
    if widened.len() < lanes {
        widened.resize(lanes, Full([0.0; C]));
    }
    &mut widened[..lanes]
}

/// Defines the widening of a whole panel, with plain loops: the compiler might not inline closures into the function that has
/// the wide vectors.
macro_rules! widen {
    ($width:ident $name:ident, $columns:ident) => {
        vectorised! {
        $width pub(super) fn $name(panel: &[Quantised<$columns>], widened: &mut Vec<Full<$columns>>) {
            let widened = room(widened, panel.len() * TOGETHER);
            for (to, lane) in widened.chunks_exact_mut(TOGETHER).zip(panel) {
                for (to, steps) in to.iter_mut().zip(&lane.steps) {
                    *to = lane.widened(steps);
                }
            }
        }
        }
    };
}

widen!(wide widen_wide, WIDE);
widen!(narrow widen_narrow, NARROW);

impl<const C: usize> Quantised<C> {
    #[inline(always)]
    pub(super) fn widened(&self, steps: &[i8; C]) -> Full<C> {
        let mut weights = [0.0; C];
        for column in 0..C {
            weights[column] = f32::from(steps[column]) * self.scales[column];
        }
        Full(weights)
    }
}

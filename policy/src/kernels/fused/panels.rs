//! Weights laid out for `x Wᵀ`, as they are stored or widened, and the product itself.
//!
//! `Wᵀ` lies in panels of a few columns, each `[inputs, columns]`, so that a panel is read from memory once, in order, and
//! needs no copy of its own for every product, which for a handful of rows costs more than the product. Weights stored in
//! bf16 stay so and are widened in registers: decoding is bound by reading them. Invariant: each element is one sum in the
//! order of the inputs, so the result depends neither on the other rows nor on the number of threads.

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;

use super::matmul::Onto;
use super::team::{Split, Threads};
use super::vector::{Width, multiply_add, vectorised, width};
use crate::weights::Storage;

/// Columns of a panel where vectors have sixteen elements: two registers for each of eight rows and the weights take
/// eighteen of thirty-two.
const WIDE: usize = 32;
/// Columns where vectors have eight elements or fewer: two registers for each of six rows and the weights take fourteen of
/// sixteen.
const NARROW: usize = 16;

/// Work that is worth handing to another thread, in multiply-adds: some microseconds.
const PART: usize = 1 << 18;

/// What reading a weight costs beside multiplying it, in multiply-adds.
const READING: usize = 8;

/// Above so many rows a panel that is stored narrow is widened once for all of them.
const ROWS_WIDENING: usize = 16;

/// Elements of `x` that one panel after another is multiplied with, 512 KiB: they stay in the second level of cache.
const BLOCK: usize = 1 << 17;

/// Inputs transposed together when panels are made, so that what is written stays in the first level of cache.
const PACKED_TOGETHER: usize = 64;

/// Rows of a matrix as they lie in an image, little-endian.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoredRows<'a> {
    /// Bytes of one row after another.
    pub(crate) bytes: &'a [u8],
    pub(crate) storage: Storage,
}

impl<'a> StoredRows<'a> {
    fn bytes_per_row(&self, inputs: usize) -> usize {
        inputs * self.storage.width()
    }

    /// The elements `range` of the row that starts at byte `start`, as f32.
    fn elements(&self, start: usize, range: Range<usize>) -> impl Iterator<Item = f32> + use<'a> {
        let width = self.storage.width();
        let bytes = &self.bytes[start + range.start * width..start + range.end * width];
        let storage = self.storage;
        bytes
            .chunks_exact(width)
            .map(move |bytes| match (storage, bytes) {
                (Storage::Bf16, &[low, high]) => {
                    f32::from_bits(u32::from_le_bytes([0, 0, low, high]))
                }
                (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                // Chunks have the width of their storage.
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

/// One input's weights for every column of a panel.
trait Lane: Copy + Send + Sync {
    const COLUMNS: usize;
    const ZERO: Self;

    fn put(&mut self, column: usize, weight: f32);
}

/// As they are computed with. Aligned, since a load across two lines of the cache takes twice as long.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Full<const C: usize>([f32; C]);

impl<const C: usize> Lane for Full<C> {
    const COLUMNS: usize = C;
    const ZERO: Self = Self([0.0; C]);

    fn put(&mut self, column: usize, weight: f32) {
        self.0[column] = weight;
    }
}

impl<const C: usize> Full<C> {
    #[inline(always)]
    fn widened(&self) -> [f32; C] {
        self.0
    }
}

/// bf16, columns i and i + H in one word: a shift gives one half of a panel in order, a mask the other.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
struct Half<const H: usize>([u32; H]);

impl<const H: usize> Lane for Half<H> {
    const COLUMNS: usize = 2 * H;
    const ZERO: Self = Self([0; H]);

    fn put(&mut self, column: usize, weight: f32) {
        let bits = u32::from(bf16::from_f32(weight).to_bits());
        if column < H {
            self.0[column] = self.0[column] & 0xFFFF_0000 | bits;
        } else {
            self.0[column - H] = self.0[column - H] & 0xFFFF | bits << 16;
        }
    }
}

impl<const H: usize> Half<H> {
    #[inline(always)]
    fn widened<const C: usize>(&self) -> [f32; C] {
        let mut weights = [0.0; C];
        for lane in 0..H {
            weights[lane] = f32::from_bits(self.0[lane] << 16);
            weights[lane + H] = f32::from_bits(self.0[lane] & 0xFFFF_0000);
        }
        weights
    }
}

/// A matrix `[outputs, inputs]` in panels; the last one is filled up with zeros.
#[derive(Debug)]
pub(crate) struct Panels {
    lanes: Lanes,
    inputs: usize,
    outputs: usize,
}

/// Panels one after another, each of as many lanes as there are inputs.
#[derive(Debug)]
enum Lanes {
    FullWide(Vec<Full<WIDE>>),
    FullNarrow(Vec<Full<NARROW>>),
    HalfWide(Vec<Half<{ WIDE / 2 }>>),
    HalfNarrow(Vec<Half<{ NARROW / 2 }>>),
}

impl Panels {
    /// * `parts` — matrices `[_, inputs]` one below the other
    /// * `storage` — bf16 only where every part is, so that nothing is rounded
    pub(crate) fn new(
        parts: &[StoredRows<'_>],
        inputs: usize,
        storage: Storage,
        threads: &Threads,
    ) -> Self {
        let rows = Rows::new(parts, inputs);
        let outputs = rows.starts.len();
        let lanes = match (width(), storage) {
            (Width::Avx512, Storage::F32) => Lanes::FullWide(pack(&rows, threads)),
            (_, Storage::F32) => Lanes::FullNarrow(pack(&rows, threads)),
            (Width::Avx512, Storage::Bf16) => Lanes::HalfWide(pack(&rows, threads)),
            (_, Storage::Bf16) => Lanes::HalfNarrow(pack(&rows, threads)),
        };
        Self {
            lanes,
            inputs,
            outputs,
        }
    }

    /// `out = x Wᵀ` or `out += x Wᵀ`; `x` `[N, inputs]`, `out` `[N, outputs]`.
    pub(crate) fn multiply(&self, out: &mut [f32], x: &[f32], onto: Onto, threads: &Threads) {
        let rows = x.len() / self.inputs;
        assert_eq!(rows * self.inputs, x.len(), "whole rows");
        assert_eq!(rows * self.outputs, out.len(), "as many rows as there are");
        let product = Product {
            out: Split::new(out),
            width: self.outputs,
            x,
            rows,
            inputs: self.inputs,
            onto,
        };
        match &self.lanes {
            Lanes::FullWide(lanes) => product.run(lanes, threads, full_wide),
            Lanes::FullNarrow(lanes) => product.run(lanes, threads, full_narrow),
            Lanes::HalfWide(lanes) => product.run(lanes, threads, half_wide),
            Lanes::HalfNarrow(lanes) => product.run(lanes, threads, half_narrow),
        }
    }
}

/// Where every row of several parts starts.
struct Rows<'a> {
    parts: &'a [StoredRows<'a>],
    inputs: usize,
    /// (part, byte)
    starts: Vec<(usize, usize)>,
}

impl<'a> Rows<'a> {
    fn new(parts: &'a [StoredRows<'a>], inputs: usize) -> Self {
        let starts = parts.iter().enumerate().flat_map(|(index, part)| {
            let step = part.bytes_per_row(inputs);
            (0..part.bytes.len() / step).map(move |row| (index, row * step))
        });
        Self {
            parts,
            inputs,
            starts: starts.collect(),
        }
    }
}

#[allow(unsafe_code)]
fn pack<L: Lane>(rows: &Rows<'_>, threads: &Threads) -> Vec<L> {
    let (inputs, outputs) = (rows.inputs, rows.starts.len());
    let count = outputs.div_ceil(L::COLUMNS);
    let mut lanes = vec![L::ZERO; count * inputs];
    let split = Split::new(&mut lanes);
    threads.share(count, 4, |panels| {
        for panel in panels {
            // Safety: each panel is made by one part of the loop.
            let lanes = unsafe { split.range(panel * inputs..(panel + 1) * inputs) };
            let first = panel * L::COLUMNS;
            let starts = &rows.starts[first..(first + L::COLUMNS).min(outputs)];
            for from in (0..inputs).step_by(PACKED_TOGETHER) {
                let range = from..(from + PACKED_TOGETHER).min(inputs);
                let lanes = &mut lanes[range.clone()];
                for (column, &(part, start)) in starts.iter().enumerate() {
                    let elements = rows.parts[part].elements(start, range.clone());
                    for (lane, weight) in lanes.iter_mut().zip(elements) {
                        lane.put(column, weight);
                    }
                }
            }
        }
    });
    lanes
}

/// A product under way.
struct Product<'a> {
    out: Split<'a, f32>,
    /// Of a row of `out`.
    width: usize,
    x: &'a [f32],
    rows: usize,
    inputs: usize,
    onto: Onto,
}

/// One panel times some rows.
struct Tile<'a, 'b, L> {
    product: &'a Product<'b>,
    panel: &'a [L],
    /// Rows of `x` and `out`.
    rows: Range<usize>,
    /// Columns of `out`.
    columns: Range<usize>,
}

impl Product<'_> {
    /// Multiplies all panels, `tile` doing one with some rows.
    fn run<L: Lane>(&self, lanes: &[L], threads: &Threads, tile: fn(&Tile<'_, '_, L>)) {
        let panels = lanes.len() / self.inputs;
        let cost = self.inputs * L::COLUMNS * (self.rows + READING);
        let rows_together = (BLOCK / self.inputs).max(ROWS_WIDENING);
        threads.share(panels, PART / cost, |panels| {
            for first in (0..self.rows).step_by(rows_together) {
                for index in panels.clone() {
                    let column = index * L::COLUMNS;
                    tile(&Tile {
                        product: self,
                        panel: &lanes[index * self.inputs..(index + 1) * self.inputs],
                        rows: first..(first + rows_together).min(self.rows),
                        columns: column..(column + L::COLUMNS).min(self.width),
                    });
                }
            }
        });
    }
}

impl<L> Tile<'_, '_, L> {
    /// Row `row` of `x`.
    #[inline(always)]
    fn x(&self, row: usize) -> &[f32] {
        &self.product.x[row * self.product.inputs..][..self.product.inputs]
    }

    /// Writes the sums of one row.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn write(&self, row: usize, sums: &[f32]) {
        let start = row * self.product.width;
        // Safety: a panel belongs to one part of the loop, and only that part's tiles write its columns, one at a time.
        let out = unsafe {
            self.product
                .out
                .range(start + self.columns.start..start + self.columns.end)
        };
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if self.product.onto == Onto::Sum {
                *out + sum
            } else {
                *sum
            };
        }
    }

    /// The same tile with its panel in another form.
    fn with_panel<'a, M>(&'a self, panel: &'a [M]) -> Tile<'a, 'a, M> {
        Tile {
            product: self.product,
            panel,
            rows: self.rows.clone(),
            columns: self.columns.clone(),
        }
    }
}

/// (first row, height) of the pieces of `rows`, each as high as the first of `heights`, falling to 1, that fits.
fn pieces(rows: Range<usize>, heights: &'static [usize]) -> impl Iterator<Item = (usize, usize)> {
    let mut first = rows.start;
    std::iter::from_fn(move || {
        let left = rows.end - first;
        let height = heights.iter().copied().find(|&height| height <= left)?;
        first += height;
        Some((first - height, height))
    })
}

thread_local! {
    /// A widened panel, kept for the next one.
    static WIDENED: RefCell<(Vec<Full<WIDE>>, Vec<Full<NARROW>>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

fn full_wide(tile: &Tile<'_, '_, Full<WIDE>>) {
    for (row, height) in pieces(tile.rows.clone(), &[8, 4, 2, 1]) {
        match height {
            8 => full_wide_8(tile, row),
            4 => full_wide_4(tile, row),
            2 => full_wide_2(tile, row),
            _ => full_wide_1(tile, row),
        }
    }
}

fn full_narrow(tile: &Tile<'_, '_, Full<NARROW>>) {
    for (row, height) in pieces(tile.rows.clone(), &[6, 4, 2, 1]) {
        match height {
            6 => full_narrow_6(tile, row),
            4 => full_narrow_4(tile, row),
            2 => full_narrow_2(tile, row),
            _ => full_narrow_1(tile, row),
        }
    }
}

fn half_wide(tile: &Tile<'_, '_, Half<{ WIDE / 2 }>>) {
    if tile.rows.len() > ROWS_WIDENING {
        return WIDENED.with_borrow_mut(|(widened, _)| {
            widened.clear();
            widened.extend(tile.panel.iter().map(|lane| Full(lane.widened())));
            full_wide(&tile.with_panel(widened));
        });
    }
    for (row, height) in pieces(tile.rows.clone(), &[8, 4, 2, 1]) {
        match height {
            8 => half_wide_8(tile, row),
            4 => half_wide_4(tile, row),
            2 => half_wide_2(tile, row),
            _ => half_wide_1(tile, row),
        }
    }
}

fn half_narrow(tile: &Tile<'_, '_, Half<{ NARROW / 2 }>>) {
    if tile.rows.len() > ROWS_WIDENING {
        return WIDENED.with_borrow_mut(|(_, widened)| {
            widened.clear();
            widened.extend(tile.panel.iter().map(|lane| Full(lane.widened())));
            full_narrow(&tile.with_panel(widened));
        });
    }
    for (row, height) in pieces(tile.rows.clone(), &[6, 4, 2, 1]) {
        match height {
            6 => half_narrow_6(tile, row),
            4 => half_narrow_4(tile, row),
            2 => half_narrow_2(tile, row),
            _ => half_narrow_1(tile, row),
        }
    }
}

/// Defines the product of a few rows, one name triple each, with a panel.
///
/// One variable per row and not an array of them: of an array the compiler makes vectors across rows, which scatters, or
/// keeps the sums in memory.
macro_rules! few_rows {
    ($name:ident, $lane:ty, $columns:ident: $($x:ident $sums:ident $offset:literal),+) => {
        vectorised! {
        fn $name(tile: &Tile<'_, '_, $lane>, row: usize) {
            const COLUMNS: usize = $columns;
            let inputs = tile.panel.len();
            $(
                let $x = &tile.x(row + $offset)[..inputs];
                let mut $sums = [0.0f32; COLUMNS];
            )+
            for (input, lane) in tile.panel.iter().enumerate() {
                let weights: [f32; COLUMNS] = lane.widened();
                $(
                    let scale = $x[input];
                    for column in 0..COLUMNS {
                        $sums[column] = multiply_add::<FMA>(scale, weights[column], $sums[column]);
                    }
                )+
            }
            $(tile.write(row + $offset, &$sums);)+
        }
        }
    };
}

few_rows!(full_wide_1, Full<WIDE>, WIDE: x0 s0 0);
few_rows!(full_wide_2, Full<WIDE>, WIDE: x0 s0 0, x1 s1 1);
few_rows!(full_wide_4, Full<WIDE>, WIDE: x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3);
few_rows!(
    full_wide_8, Full<WIDE>, WIDE:
    x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3, x4 s4 4, x5 s5 5, x6 s6 6, x7 s7 7
);
few_rows!(full_narrow_1, Full<NARROW>, NARROW: x0 s0 0);
few_rows!(full_narrow_2, Full<NARROW>, NARROW: x0 s0 0, x1 s1 1);
few_rows!(full_narrow_4, Full<NARROW>, NARROW: x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3);
few_rows!(
    full_narrow_6, Full<NARROW>, NARROW:
    x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3, x4 s4 4, x5 s5 5
);
few_rows!(half_wide_1, Half<{ WIDE / 2 }>, WIDE: x0 s0 0);
few_rows!(half_wide_2, Half<{ WIDE / 2 }>, WIDE: x0 s0 0, x1 s1 1);
few_rows!(half_wide_4, Half<{ WIDE / 2 }>, WIDE: x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3);
few_rows!(
    half_wide_8, Half<{ WIDE / 2 }>, WIDE:
    x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3, x4 s4 4, x5 s5 5, x6 s6 6, x7 s7 7
);
few_rows!(half_narrow_1, Half<{ NARROW / 2 }>, NARROW: x0 s0 0);
few_rows!(half_narrow_2, Half<{ NARROW / 2 }>, NARROW: x0 s0 0, x1 s1 1);
few_rows!(half_narrow_4, Half<{ NARROW / 2 }>, NARROW: x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3);
few_rows!(
    half_narrow_6, Half<{ NARROW / 2 }>, NARROW:
    x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3, x4 s4 4, x5 s5 5
);

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use proptest::prelude::*;

    use super::*;
    use crate::kernels::fused::matmul::{Matrix, multiply};

    /// Whole numbers, so that every sum is exact and every order of it gives the same.
    fn whole(len: usize, step: usize, modulus: usize) -> Vec<f32> {
        let half = (modulus / 2) as f32;
        (0..len)
            .map(|i| (i * step % modulus) as f32 - half)
            .collect()
    }

    fn bytes(values: &[f32], storage: Storage) -> Vec<u8> {
        let narrow = |value: &f32| bf16::from_f32(*value).to_le_bytes().to_vec();
        let full = |value: &f32| value.to_le_bytes().to_vec();
        match storage {
            Storage::Bf16 => values.iter().flat_map(narrow).collect(),
            Storage::F32 => values.iter().flat_map(full).collect(),
        }
    }

    fn threads(count: usize) -> Threads {
        Threads::new(NonZeroUsize::new(count).unwrap())
    }

    proptest! {
        #[test]
        fn panels_agree_with_plain_products(
            rows in 0usize..40,
            outputs in 1usize..100,
            inputs in 1usize..90,
            cut in 0usize..100,
            narrow in any::<bool>(),
        ) {
            let storage = if narrow { Storage::Bf16 } else { Storage::F32 };
            let x = whole(rows * inputs, 7, 11);
            let w = whole(outputs * inputs, 5, 13);
            let mut plain = vec![0.0; rows * outputs];
            let transposed = Matrix::new(&w, outputs, inputs).transposed();
            multiply(&mut plain, Matrix::new(&x, rows, inputs), transposed, Onto::Nothing);
            let (above, below) = w.split_at(cut.min(outputs) * inputs);
            let (above, below) = (bytes(above, Storage::F32), bytes(below, storage));
            let parts = [
                StoredRows { bytes: &above, storage: Storage::F32 },
                StoredRows { bytes: &below, storage },
            ];
            let panels = Panels::new(&parts, inputs, storage, &threads(2));
            let mut out = vec![3.0; rows * outputs];
            panels.multiply(&mut out, &x, Onto::Nothing, &threads(1));
            panels.multiply(&mut out, &x, Onto::Sum, &threads(3));
            for (out, plain) in out.iter().zip(&plain) {
                prop_assert_eq!(*out, 2.0 * plain);
            }
        }
    }

    /// Numbers whose sums are rounded.
    fn fractions(len: usize) -> Vec<f32> {
        (0..len)
            .map(|i| ((i * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.1)
            .collect()
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_among_others_on_any_number_of_threads() {
        let (rows, outputs, inputs) = (45, 3 * WIDE + 5, 700);
        let (x, w) = (fractions(rows * inputs), fractions(outputs * inputs));
        for storage in [Storage::F32, Storage::Bf16] {
            let bytes = bytes(&w, storage);
            let parts = [StoredRows {
                bytes: &bytes,
                storage,
            }];
            let panels = Panels::new(&parts, inputs, storage, &threads(1));
            let mut alone = vec![0.0; rows * outputs];
            for (out, x) in alone.chunks_exact_mut(outputs).zip(x.chunks_exact(inputs)) {
                panels.multiply(out, x, Onto::Nothing, &threads(1));
            }
            for count in [1, 2, 5] {
                let mut together = vec![0.0; rows * outputs];
                panels.multiply(&mut together, &x, Onto::Nothing, &threads(count));
                assert_eq!(together, alone, "{storage:?}, {count} threads");
            }
        }
    }

    #[test]
    fn narrow_panels_give_the_bits_of_full_panels_with_the_same_weights() {
        let (outputs, inputs) = (70, 96);
        let stored = bytes(&fractions(outputs * inputs), Storage::Bf16);
        let parts = [StoredRows {
            bytes: &stored,
            storage: Storage::Bf16,
        }];
        for rows in [1, 2, 4, 8, 40] {
            let x = fractions(rows * inputs);
            let products = [Storage::F32, Storage::Bf16].map(|storage| {
                let mut out = vec![0.0; rows * outputs];
                let panels = Panels::new(&parts, inputs, storage, &threads(1));
                panels.multiply(&mut out, &x, Onto::Nothing, &threads(2));
                out
            });
            assert_eq!(products[0], products[1]);
        }
    }

    #[test]
    fn both_widths_of_panels_agree() {
        let (rows, outputs, inputs) = (21, 50, 130);
        let (x, w) = (whole(rows * inputs, 7, 11), whole(outputs * inputs, 5, 13));
        let bytes = bytes(&w, Storage::Bf16);
        let parts = [StoredRows {
            bytes: &bytes,
            storage: Storage::Bf16,
        }];
        let stored = Rows::new(&parts, inputs);
        let one = Threads::one();
        let forms = [
            Lanes::FullWide(pack(&stored, &one)),
            Lanes::FullNarrow(pack(&stored, &one)),
            Lanes::HalfWide(pack(&stored, &one)),
            Lanes::HalfNarrow(pack(&stored, &one)),
        ];
        let products = forms.map(|lanes| {
            let panels = Panels {
                lanes,
                inputs,
                outputs,
            };
            // The last rows alone as well, which are too few to be widened first.
            let mut out = vec![0.0; (rows + 15) * outputs];
            let (all, few) = out.split_at_mut(rows * outputs);
            panels.multiply(all, &x, Onto::Nothing, &one);
            panels.multiply(few, &x[6 * inputs..], Onto::Nothing, &one);
            out
        });
        assert!(products.iter().all(|product| *product == products[0]));
    }
}

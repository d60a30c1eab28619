//! Weights laid out for `x Wᵀ`, and the product itself.
//!
//! `Wᵀ` lies in panels of a few columns, each `[inputs, columns]`. A panel is read from memory once, in order, and no product
//! copies it; for a few rows a copy would cost more than the product. Weights stored in bf16 stay so and are widened in
//! registers, since decoding is bound by reading them. Invariant: each element is one sum in the order of the inputs, so the
//! result depends neither on the other rows nor on the number of threads.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::cell::RefCell;
use std::ops::Range;

use crate::kernels::matmul::Onto;
use crate::kernels::simd::{Width, multiply_add, vectorised, width};
use crate::kernels::threads::{Split, Threads};

pub(crate) use lane::Kept;
use lane::{Full, Half, Lane, NARROW, Quantised, TOGETHER, WIDE, widen_narrow, widen_wide};

use crate::weights::StoredTensor;

mod lane;

/// Fewest multiply-adds worth handing to another thread: some microseconds.
const PART: usize = 1 << 18;

/// Cost of reading a weight, in multiply-adds.
const READING: usize = 8;

/// Above this many rows a bf16 or 8-bit panel is widened once for all of them.
const ROWS_WIDENING: usize = 16;

/// Elements of `x` multiplied with one panel after another, 512 KiB: they stay in the second level of cache.
const BLOCK: usize = 1 << 17;

/// A matrix `[outputs, inputs]` in panels; the last one is padded with zeros.
#[derive(Debug)]
pub(crate) struct Panels {
    lanes: Lanes,
    inputs: usize,
    outputs: usize,
}

/// Panels in order, each with one lane for every input or group of inputs.
#[derive(Debug)]
enum Lanes {
    FullWide(Vec<Full<WIDE>>),
    FullNarrow(Vec<Full<NARROW>>),
    HalfWide(Vec<Half<{ WIDE / 2 }>>),
    HalfNarrow(Vec<Half<{ NARROW / 2 }>>),
    QuantisedWide(Vec<Quantised<WIDE>>),
    QuantisedNarrow(Vec<Quantised<NARROW>>),
}

impl Panels {
    /// * `parts` — matrices `[_, inputs]` one below the other
    pub(crate) fn new(
        parts: &[StoredTensor<'_>],
        inputs: usize,
        kept: Kept,
        threads: &Threads,
    ) -> Self {
        let rows = Rows::new(parts, inputs);
        let outputs = rows.starts.len();
        let wide = width() == Width::Avx512;
        let lanes = match (kept, wide) {
            (Kept::F32, true) => Lanes::FullWide(pack(&rows, threads)),
            (Kept::F32, false) => Lanes::FullNarrow(pack(&rows, threads)),
            (Kept::Bf16, true) => Lanes::HalfWide(pack(&rows, threads)),
            (Kept::Bf16, false) => Lanes::HalfNarrow(pack(&rows, threads)),
            (Kept::Int8, true) => Lanes::QuantisedWide(pack(&rows, threads)),
            (Kept::Int8, false) => Lanes::QuantisedNarrow(pack(&rows, threads)),
        };
        Self {
            lanes,
            inputs,
            outputs,
        }
    }

    /// Row `index` of the matrix, `[inputs]`, widened: slower than a contiguous row, but without a second copy.
    pub(crate) fn copy_row(&self, index: usize, out: &mut [f32]) {
        match &self.lanes {
            Lanes::FullWide(lanes) => copy_row(lanes, index, out),
            Lanes::FullNarrow(lanes) => copy_row(lanes, index, out),
            Lanes::HalfWide(lanes) => copy_row(lanes, index, out),
            Lanes::HalfNarrow(lanes) => copy_row(lanes, index, out),
            Lanes::QuantisedWide(lanes) => copy_row(lanes, index, out),
            Lanes::QuantisedNarrow(lanes) => copy_row(lanes, index, out),
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
            Lanes::QuantisedWide(lanes) => product.run(lanes, threads, quantised_wide),
            Lanes::QuantisedNarrow(lanes) => product.run(lanes, threads, quantised_narrow),
        }
    }
}

/// Start of every row of several parts.
struct Rows<'a> {
    parts: &'a [StoredTensor<'a>],
    inputs: usize,
    /// (part, byte)
    starts: Vec<(usize, usize)>,
}

impl<'a> Rows<'a> {
    fn new(parts: &'a [StoredTensor<'a>], inputs: usize) -> Self {
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

/// Lanes of zeros. The system clears the pages when they are first written, so the threads that fill them share that work.
#[allow(unsafe_code)]
fn zeroed<L: Lane>(count: usize) -> Vec<L> {
    let layout = match Layout::array::<L>(count) {
        Ok(layout) if layout.size() > 0 => layout,
        _ => return Vec::new(), // no file holds more than there are addresses
    };
    // Safety: of a size above zero.
    let start = unsafe { alloc_zeroed(layout) };
    if start.is_null() {
        handle_alloc_error(layout);
    }
    // Safety: allocated just now as an array of `count` lanes, and zero bytes are a valid lane: it holds numbers only.
    unsafe { Vec::from_raw_parts(start.cast(), count, count) }
}

fn copy_row<L: Lane>(lanes: &[L], index: usize, out: &mut [f32]) {
    let depth = out.len().div_ceil(L::INPUTS);
    let panel = &lanes[index / L::COLUMNS * depth..][..depth];
    L::copy_column(panel, index % L::COLUMNS, out);
}

fn pack<L: Lane>(rows: &Rows<'_>, threads: &Threads) -> Vec<L> {
    let (inputs, outputs) = (rows.inputs, rows.starts.len());
    let (count, depth) = (outputs.div_ceil(L::COLUMNS), inputs.div_ceil(L::INPUTS));
    let mut lanes = zeroed(count * depth);
    threads.share_rows(&mut lanes, depth, 4, |first, panels| {
        for (panel, lanes) in (first..).zip(panels.chunks_exact_mut(depth)) {
            let first = panel * L::COLUMNS;
            let starts = &rows.starts[first..(first + L::COLUMNS).min(outputs)];
            let ranges = (0..inputs).step_by(TOGETHER);
            for (from, lanes) in ranges.zip(lanes.chunks_mut(TOGETHER / L::INPUTS)) {
                let range = from..(from + TOGETHER).min(inputs);
                for (column, &(part, start)) in starts.iter().enumerate() {
                    L::fill(
                        lanes,
                        column,
                        rows.parts[part].elements(start, range.clone()),
                    );
                }
            }
        }
    });
    lanes
}

/// A running product.
struct Product<'a> {
    out: Split<'a, f32>,
    /// Elements of a row of `out`.
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
    /// Multiplies all panels; `tile` multiplies one panel with some rows.
    fn run<L: Lane>(&self, lanes: &[L], threads: &Threads, tile: fn(&Tile<'_, '_, L>)) {
        let depth = self.inputs.div_ceil(L::INPUTS);
        let panels = lanes.len() / depth;
        let cost = self.inputs * L::COLUMNS * (self.rows + READING);
        let rows_together = (BLOCK / self.inputs).max(ROWS_WIDENING);
        threads.share(panels, PART / cost, |panels| {
            for first in (0..self.rows).step_by(rows_together) {
                for index in panels.clone() {
                    let column = index * L::COLUMNS;
                    tile(&Tile {
                        product: self,
                        panel: &lanes[index * depth..(index + 1) * depth],
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

    /// The tile with another form of its panel.
    fn with_panel<'a, M>(&'a self, panel: &'a [M]) -> Tile<'a, 'a, M> {
        Tile {
            product: self.product,
            panel,
            rows: self.rows.clone(),
            columns: self.columns.clone(),
        }
    }
}

/// Cuts `rows` into pieces (first row, height), each with the first of the falling `heights` that fits.
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
    /// Buffers for a widened panel.
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

fn quantised_wide(tile: &Tile<'_, '_, Quantised<WIDE>>) {
    if tile.rows.len() > ROWS_WIDENING {
        return WIDENED.with_borrow_mut(|(widened, _)| {
            widen_wide(tile.panel, widened);
            full_wide(&tile.with_panel(&widened[..tile.product.inputs]));
        });
    }
    for (row, height) in pieces(tile.rows.clone(), &[8, 4, 2, 1]) {
        match height {
            8 => quantised_wide_8(tile, row),
            4 => quantised_wide_4(tile, row),
            2 => quantised_wide_2(tile, row),
            _ => quantised_wide_1(tile, row),
        }
    }
}

fn quantised_narrow(tile: &Tile<'_, '_, Quantised<NARROW>>) {
    if tile.rows.len() > ROWS_WIDENING {
        return WIDENED.with_borrow_mut(|(_, widened)| {
            widen_narrow(tile.panel, widened);
            full_narrow(&tile.with_panel(&widened[..tile.product.inputs]));
        });
    }
    for (row, height) in pieces(tile.rows.clone(), &[6, 4, 2, 1]) {
        match height {
            6 => quantised_narrow_6(tile, row),
            4 => quantised_narrow_4(tile, row),
            2 => quantised_narrow_2(tile, row),
            _ => quantised_narrow_1(tile, row),
        }
    }
}

/// Defines the product of a panel with a few rows, given as one name triple each.
///
/// Each row has variables of its own: with an array the compiler builds vectors across rows, which scatters, or keeps the
/// sums in memory.
macro_rules! few_rows {
    ($width:ident $name:ident, $lane:ty, $columns:ident: $($x:ident $sums:ident $offset:literal),+) => {
        vectorised! {
        $width fn $name(tile: &Tile<'_, '_, $lane>, row: usize) {
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

few_rows!(wide full_wide_1, Full<WIDE>, WIDE: x0 s0 0);
few_rows!(wide full_wide_2, Full<WIDE>, WIDE: x0 s0 0, x1 s1 1);
few_rows!(wide full_wide_4, Full<WIDE>, WIDE: x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3);
few_rows!(
    wide full_wide_8, Full<WIDE>, WIDE:
    x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3, x4 s4 4, x5 s5 5, x6 s6 6, x7 s7 7
);
few_rows!(narrow full_narrow_1, Full<NARROW>, NARROW: x0 s0 0);
few_rows!(narrow full_narrow_2, Full<NARROW>, NARROW: x0 s0 0, x1 s1 1);
few_rows!(narrow full_narrow_4, Full<NARROW>, NARROW: x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3);
few_rows!(
    narrow full_narrow_6, Full<NARROW>, NARROW:
    x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3, x4 s4 4, x5 s5 5
);
few_rows!(wide half_wide_1, Half<{ WIDE / 2 }>, WIDE: x0 s0 0);
few_rows!(wide half_wide_2, Half<{ WIDE / 2 }>, WIDE: x0 s0 0, x1 s1 1);
few_rows!(wide half_wide_4, Half<{ WIDE / 2 }>, WIDE: x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3);
few_rows!(
    wide half_wide_8, Half<{ WIDE / 2 }>, WIDE:
    x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3, x4 s4 4, x5 s5 5, x6 s6 6, x7 s7 7
);
few_rows!(narrow half_narrow_1, Half<{ NARROW / 2 }>, NARROW: x0 s0 0);
few_rows!(narrow half_narrow_2, Half<{ NARROW / 2 }>, NARROW: x0 s0 0, x1 s1 1);
few_rows!(narrow half_narrow_4, Half<{ NARROW / 2 }>, NARROW: x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3);
few_rows!(
    narrow half_narrow_6, Half<{ NARROW / 2 }>, NARROW:
    x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3, x4 s4 4, x5 s5 5
);

/// The same for lanes of several inputs. A weight is widened to the same bits as in a whole panel.
macro_rules! few_rows_quantised {
    ($width:ident $name:ident, $columns:ident: $($x:ident $sums:ident $offset:literal),+) => {
        vectorised! {
        $width fn $name(tile: &Tile<'_, '_, Quantised<$columns>>, row: usize) {
            const COLUMNS: usize = $columns;
            let inputs = tile.product.inputs;
            $(let mut $sums = [0.0f32; COLUMNS];)+
            for (first, lane) in (0..inputs).step_by(TOGETHER).zip(tile.panel) {
                let count = TOGETHER.min(inputs - first);
                $(let $x = &tile.x(row + $offset)[first..first + count];)+
                for (input, steps) in lane.steps[..count].iter().enumerate() {
                    let Full(weights) = lane.widened(steps);
                    $(
                        let scale = $x[input];
                        for column in 0..COLUMNS {
                            $sums[column] = multiply_add::<FMA>(scale, weights[column], $sums[column]);
                        }
                    )+
                }
            }
            $(tile.write(row + $offset, &$sums);)+
        }
        }
    };
}

few_rows_quantised!(wide quantised_wide_1, WIDE: x0 s0 0);
few_rows_quantised!(wide quantised_wide_2, WIDE: x0 s0 0, x1 s1 1);
few_rows_quantised!(wide quantised_wide_4, WIDE: x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3);
few_rows_quantised!(
    wide quantised_wide_8, WIDE:
    x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3, x4 s4 4, x5 s5 5, x6 s6 6, x7 s7 7
);
few_rows_quantised!(narrow quantised_narrow_1, NARROW: x0 s0 0);
few_rows_quantised!(narrow quantised_narrow_2, NARROW: x0 s0 0, x1 s1 1);
few_rows_quantised!(narrow quantised_narrow_4, NARROW: x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3);
few_rows_quantised!(
    narrow quantised_narrow_6, NARROW:
    x0 s0 0, x1 s1 1, x2 s2 2, x3 s3 3, x4 s4 4, x5 s5 5
);

#[cfg(test)]
mod tests;

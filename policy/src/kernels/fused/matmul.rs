//! Products of f32 matrices on one thread: a safe face for crate `gemm`.
//!
//! Parallelism is over rows of the batch, outside: on a few cores, forking inside products of these sizes costs more than
//! it gives, and the result would depend on the number of threads.

use std::ops::Range;

use gemm::{Parallelism, gemm};

use super::vector::{multiply_add, vectorised};

/// Columns of a panel: two AVX-512 registers for each of [`TALL`] rows fill three quarters of the machine's registers.
const PANEL: usize = 32;

/// Rows multiplied together.
const TALL: usize = 8;

/// A matrix as a view of a slice, element (i, j) at `i·row_stride + j·column_stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after another without gaps.
    pub(crate) fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "a matrix covers its slice");
        Self {
            values,
            rows,
            columns,
            row_stride: columns,
            column_stride: 1,
        }
    }

    /// Rows and columns swapped.
    pub(crate) fn transposed(self) -> Self {
        Self {
            values: self.values,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// Whether the product replaces what is there or is added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Onto {
    Nothing,
    Sum,
}

/// `out = a b` or `out += a b`, `out` `[a.rows, b.columns]` without gaps.
#[allow(unsafe_code)]
pub(crate) fn multiply(out: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, onto: Onto) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner sizes agree");
    assert_eq!(out.len(), m * n, "the product covers its slice");
    // Safety: `Matrix` covers its slice exactly, whichever way it is turned, and `out` was checked just now; `out` is
    // borrowed mutably, so it overlaps neither.
    unsafe {
        gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            onto == Onto::Sum,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `Wᵀ` laid out for products of few rows: panels of 32 columns, each `[in, 32]`, the last filled up with zeros.
///
/// A general product copies W into such a form every time, which for a handful of rows costs more than the product.
#[derive(Debug)]
pub(crate) struct Panels {
    values: Vec<f32>,
    inputs: usize,
    outputs: usize,
}

impl Panels {
    /// * `weight` — `[outputs, inputs]`
    pub(crate) fn new(weight: &[f32], outputs: usize, inputs: usize) -> Self {
        let mut values = vec![0.0; outputs.div_ceil(PANEL) * PANEL * inputs];
        for (output, row) in weight.chunks_exact(inputs).enumerate() {
            let start = output / PANEL * PANEL * inputs + output % PANEL;
            for (input, &value) in row.iter().enumerate() {
                values[start + input * PANEL] = value;
            }
        }
        Self {
            values,
            inputs,
            outputs,
        }
    }

    /// `out = x Wᵀ` or `out += x Wᵀ`; `x` `[N, inputs]`, `out` `[N, outputs]`.
    ///
    /// Panels are the outer loop: a panel is read from memory once, and the rows stay in the processor's cache.
    pub(crate) fn multiply(&self, out: &mut [f32], x: &[f32], onto: Onto) {
        let rows = x.len() / self.inputs;
        assert_eq!(rows * self.outputs, out.len(), "as many rows as there are");
        for (index, panel) in self.values.chunks_exact(PANEL * self.inputs).enumerate() {
            let (panel, _) = panel.as_chunks::<PANEL>();
            let column = index * PANEL;
            let columns = column..(column + PANEL).min(self.outputs);
            for (first, height) in tiles(rows) {
                let x = &x[first * self.inputs..(first + height) * self.inputs];
                let out = &mut out[first * self.outputs..(first + height) * self.outputs];
                let target = Target {
                    out,
                    width: self.outputs,
                    columns: columns.clone(),
                    onto,
                };
                match height {
                    TALL => eight_rows(target, x, panel),
                    4 => four_rows(target, x, panel),
                    2 => two_rows(target, x, panel),
                    _ => one_row(target, x, panel),
                }
            }
        }
    }
}

/// (first row, height) of tiles of eight rows, and the rest as four, two and one.
fn tiles(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let height = match rows - first {
            0 => return None,
            TALL.. => TALL,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        first += height;
        Some((first - height, height))
    })
}

/// Where a tile's product goes: some columns of rows of `width`.
struct Target<'a> {
    out: &'a mut [f32],
    width: usize,
    columns: Range<usize>,
    onto: Onto,
}

/// Defines the product of a few rows of `x`, one name pair each, with a panel `[inputs, 32]`.
///
/// One variable per row and not an array of them: of an array the compiler makes vectors across rows, which scatters, or
/// keeps the sums in memory.
macro_rules! few_rows {
    ($name:ident: $($x:ident $sums:ident),+) => {
        vectorised! {
        fn $name(target: Target<'_>, x: &[f32], panel: &[[f32; PANEL]]) {
            let inputs = panel.len();
            let mut rows = x.chunks_exact(inputs);
            $(
                let $x = rows.next().unwrap_or_default();
                assert_eq!($x.len(), inputs, "as many rows as the kernel takes");
                let mut $sums = [0.0f32; PANEL];
            )+
            for (input, weights) in panel.iter().enumerate() {
                $(
                    let scale = $x[input];
                    for lane in 0..PANEL {
                        $sums[lane] = multiply_add::<FMA>(scale, weights[lane], $sums[lane]);
                    }
                )+
            }
            let mut rows = target.out.chunks_exact_mut(target.width);
            $(
                let row = rows.next().unwrap_or_default();
                for (out, sum) in row[target.columns.clone()].iter_mut().zip($sums) {
                    *out = if target.onto == Onto::Sum { *out + sum } else { sum };
                }
            )+
        }
        }
    };
}

few_rows!(one_row: x0 s0);
few_rows!(two_rows: x0 s0, x1 s1);
few_rows!(four_rows: x0 s0, x1 s1, x2 s2, x3 s3);
few_rows!(eight_rows: x0 s0, x1 s1, x2 s2, x3 s3, x4 s4, x5 s5, x6 s6, x7 s7);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn panels_agree_with_plain_products(rows in 0usize..20, outputs in 1usize..70, inputs in 1usize..40) {
            let x: Vec<f32> = (0..rows * inputs).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
            let w: Vec<f32> = (0..outputs * inputs).map(|i| (i * 5 % 13) as f32 - 6.0).collect();
            let mut plain = vec![0.0; rows * outputs];
            let transposed = Matrix::new(&w, outputs, inputs).transposed();
            multiply(&mut plain, Matrix::new(&x, rows, inputs), transposed, Onto::Nothing);
            let mut out = vec![3.0; rows * outputs];
            let panels = Panels::new(&w, outputs, inputs);
            panels.multiply(&mut out, &x, Onto::Nothing);
            panels.multiply(&mut out, &x, Onto::Sum);
            for (out, plain) in out.iter().zip(&plain) {
                prop_assert_eq!(*out, 2.0 * plain);
            }
        }

        #[test]
        fn products_agree_with_plain_loops(m in 1usize..20, n in 1usize..40, k in 1usize..40) {
            let a: Vec<f32> = (0..m * k).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i * 5 % 13) as f32 - 6.0).collect();
            let bt: Vec<f32> = (0..k * n).map(|i| b[i % k * n + i / k]).collect();
            let plain = |i: usize, j: usize| -> f32 { (0..k).map(|p| a[i * k + p] * b[p * n + j]).sum() };
            let mut out = vec![1.0; m * n];
            multiply(&mut out, Matrix::new(&a, m, k), Matrix::new(&b, k, n), Onto::Nothing);
            multiply(&mut out, Matrix::new(&a, m, k), Matrix::new(&bt, n, k).transposed(), Onto::Sum);
            for i in 0..m {
                for j in 0..n {
                    prop_assert_eq!(out[i * n + j], 2.0 * plain(i, j));
                }
            }
        }
    }
}

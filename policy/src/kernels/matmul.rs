//! Products of f32 matrices on one thread: a safe interface to crate `gemm`.
//!
//! Callers parallelise over rows of the batch. On a few cores, threads inside products of these sizes cost more than they
//! gain, and the result would depend on their number.

use gemm::{Parallelism, gemm};

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
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

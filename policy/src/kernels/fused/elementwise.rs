//! The operations that work row by row without a product of matrices: norms and gated activations, with derivatives.

use std::ops::Range;

use crate::config::Activation;
use crate::kernels::matmul::Onto;
use crate::kernels::simd::{dot, exp, tanh, vectorised};

/// `√(2/π)`, of the tanh form of the Gaussian error linear unit.
const GELU_SLOPE: f32 = 0.797_884_6;

/// Its cubic term.
const GELU_CUBE: f32 = 0.044_715;

/// What a norm does beside its weight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NormConstants {
    /// Added to the mean square.
    pub(crate) eps: f32,
    /// Added to the weight.
    pub(crate) offset: f32,
}

vectorised! {
/// `y = x·r·(o + w)` or `y += …`, `r = 1/√(mean(x²) + eps)`; `x`, `y` `[N, width]`, `w` `[width]`.
pub(crate) fn norm_forward(y: &mut [f32], x: &[f32], w: &[f32], constants: NormConstants, onto: Onto) {
    let (width, offset) = (w.len(), constants.offset);
    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let r = 1.0 / (dot(x, x) / width as f32 + constants.eps).sqrt();
        match onto {
            Onto::Nothing => {
                for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                    *y = x * r * (offset + w);
                }
            }
            Onto::Sum => {
                for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                    *y += x * r * (offset + w);
                }
            }
        }
    }
}
}

vectorised! {
/// Adds to `dx` `[N, width]` and `dw` `[width]` what `g` = ∂/∂y contributes:
/// `dx = r·(o + w)·g − x·r³/width·Σ(g·(o + w)·x)`, `dw = Σ g·x·r`.
pub(crate) fn norm_backward(dx: &mut [f32], dw: &mut [f32], g: &[f32], x: &[f32], w: &[f32], constants: NormConstants) {
    let width = w.len();
    let mut gw = vec![0.0; width];
    for ((dx, g), x) in
        dx.chunks_exact_mut(width).zip(g.chunks_exact(width)).zip(x.chunks_exact(width))
    {
        let (r, shared) = norm_slopes(&mut gw, g, x, w, constants);
        for ((dx, gw), x) in dx.iter_mut().zip(&gw).zip(x) {
            *dx += r * gw - x * shared;
        }
        for ((dw, g), x) in dw.iter_mut().zip(g).zip(x) {
            *dw += g * x * r;
        }
    }
}
}

/// (r, r³/width·Σ(g·(o + w)·x)) of one row, and `gw = g·(o + w)`.
#[inline(always)]
fn norm_slopes(
    gw: &mut [f32],
    g: &[f32],
    x: &[f32],
    w: &[f32],
    constants: NormConstants,
) -> (f32, f32) {
    let width = w.len() as f32;
    let r = 1.0 / (dot(x, x) / width + constants.eps).sqrt();
    for ((gw, g), w) in gw.iter_mut().zip(g).zip(w) {
        *gw = g * (constants.offset + w);
    }
    (r, dot(gw, x) * r * r * r / width)
}

vectorised! {
/// The norm of every head of width `w.len()` within `columns` of `values` `[N, width]`, in place.
pub(crate) fn head_norm_forward(values: &mut [f32], width: usize, columns: Range<usize>, w: &[f32], constants: NormConstants) {
    let dim = w.len();
    for row in values.chunks_exact_mut(width) {
        for head in row[columns.clone()].chunks_exact_mut(dim) {
            let r = 1.0 / (dot(head, head) / dim as f32 + constants.eps).sqrt();
            for (x, w) in head.iter_mut().zip(w) {
                *x = *x * r * (constants.offset + w);
            }
        }
    }
}
}

vectorised! {
/// Replaces the heads within `columns` of `g` `[N, width]` by the derivative by `x` `[N, width]`, and adds to `dw`; the
/// formulas are those of [`norm_backward`].
pub(crate) fn head_norm_backward(
    g: &mut [f32],
    dw: &mut [f32],
    x: &[f32],
    width: usize,
    columns: Range<usize>,
    w: &[f32],
    constants: NormConstants,
) {
    let dim = w.len();
    let mut gw = vec![0.0; dim];
    for (g, x) in g.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let (g, x) = (&mut g[columns.clone()], &x[columns.clone()]);
        for (g, x) in g.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
            let (r, shared) = norm_slopes(&mut gw, g, x, w, constants);
            for ((dw, g), x) in dw.iter_mut().zip(g.iter()).zip(x) {
                *dw += g * x * r;
            }
            for ((g, gw), x) in g.iter_mut().zip(&gw).zip(x) {
                *g = r * gw - x * shared;
            }
        }
    }
}
}

/// `y = f(g)·u`; `gate_up` `[N, 2·F]` with g first, `y` `[N, F]`.
pub(crate) fn gated_forward(y: &mut [f32], gate_up: &[f32], width: usize, activation: Activation) {
    match activation {
        Activation::Silu => silu_forward(y, gate_up, width),
        Activation::GeluTanh => gelu_forward(y, gate_up, width),
    }
}

/// Replaces `gate_up` `[N, 2·F]` by its derivative, given `dy` `[N, F]`: `dg = dy·u·f′(g)`, `du = dy·f(g)`.
pub(crate) fn gated_backward(
    gate_up: &mut [f32],
    dy: &[f32],
    width: usize,
    activation: Activation,
) {
    match activation {
        Activation::Silu => silu_backward(gate_up, dy, width),
        Activation::GeluTanh => gelu_backward(gate_up, dy, width),
    }
}

vectorised! {
/// `f(g) = g·σ(g)`
fn silu_forward(y: &mut [f32], gate_up: &[f32], width: usize) {
    for (y, row) in y.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
        let (gate, up) = row.split_at(width);
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = g / (1.0 + exp(-g)) * u;
        }
    }
}
}

vectorised! {
/// `f′(g) = σ(g)·(1 + g·(1 − σ(g)))`
fn silu_backward(gate_up: &mut [f32], dy: &[f32], width: usize) {
    for (row, dy) in gate_up.chunks_exact_mut(2 * width).zip(dy.chunks_exact(width)) {
        let (gate, up) = row.split_at_mut(width);
        for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
            let sigma = 1.0 / (1.0 + exp(-*g));
            let silu = *g * sigma;
            let dg = dy * *u * sigma * (1.0 + *g * (1.0 - sigma));
            *u = dy * silu;
            *g = dg;
        }
    }
}
}

vectorised! {
/// `f(g) = g/2·(1 + t)`, `t = tanh(√(2/π)·(g + 0.044715·g³))`
fn gelu_forward(y: &mut [f32], gate_up: &[f32], width: usize) {
    for (y, row) in y.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
        let (gate, up) = row.split_at(width);
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            let t = tanh(GELU_SLOPE * g * (1.0 + GELU_CUBE * g * g));
            *y = 0.5 * g * (1.0 + t) * u;
        }
    }
}
}

vectorised! {
/// `f′(g) = (1 + t)/2 + g/2·(1 − t²)·√(2/π)·(1 + 3·0.044715·g²)`
fn gelu_backward(gate_up: &mut [f32], dy: &[f32], width: usize) {
    for (row, dy) in gate_up.chunks_exact_mut(2 * width).zip(dy.chunks_exact(width)) {
        let (gate, up) = row.split_at_mut(width);
        for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
            let square = *g * *g;
            let t = tanh(GELU_SLOPE * *g * (1.0 + GELU_CUBE * square));
            let inner = GELU_SLOPE * (1.0 + 3.0 * GELU_CUBE * square);
            let slope = 0.5 * (1.0 + t) + 0.5 * *g * (1.0 - t * t) * inner;
            let dg = dy * *u * slope;
            *u = dy * 0.5 * *g * (1.0 + t);
            *g = dg;
        }
    }
}
}

vectorised! {
/// `x ← cap·tanh(x/cap)`
pub(crate) fn soft_cap(x: &mut [f32], cap: f32) {
    let inverse = 1.0 / cap;
    for x in x {
        *x = cap * tanh(*x * inverse);
    }
}
}

vectorised! {
/// `out ← out·scale`
pub(crate) fn scale(out: &mut [f32], by: f32) {
    for out in out {
        *out *= by;
    }
}
}

vectorised! {
/// `out += by·x`
pub(crate) fn add_multiple(out: &mut [f32], x: &[f32], by: f32) {
    for (out, x) in out.iter_mut().zip(x) {
        *out += by * x;
    }
}
}

vectorised! {
/// `out += x`
pub(crate) fn add(out: &mut [f32], x: &[f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out += x;
    }
}
}

vectorised! {
/// Adds `bias` `[width]` to every row of `x` `[N, width]`.
pub(crate) fn add_bias(x: &mut [f32], bias: &[f32]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (x, b) in row.iter_mut().zip(bias) {
            *x += b;
        }
    }
}
}

vectorised! {
/// Adds every row of `g` `[N, width]` to `sum` `[width]`.
pub(crate) fn sum_rows(sum: &mut [f32], g: &[f32]) {
    for row in g.chunks_exact(sum.len()) {
        for (sum, g) in sum.iter_mut().zip(row) {
            *sum += g;
        }
    }
}
}

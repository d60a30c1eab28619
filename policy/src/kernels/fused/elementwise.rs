//! The operations that work row by row without a product of matrices: norm and gated activation, with derivatives.

use super::vector::{dot, exp, vectorised};

vectorised! {
/// `y = x·r·w`, `r = 1/√(mean(x²) + eps)`; `x`, `y` `[N, width]`, `w` `[width]`.
pub(crate) fn norm_forward(y: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    let width = w.len();
    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let r = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * r * w;
        }
    }
}
}

vectorised! {
/// Adds to `dx` `[N, width]` and `dw` `[width]` what `g` = ∂/∂y contributes:
/// `dx = r·w·g − x·r³/width·Σ(g·w·x)`, `dw = Σ g·x·r`.
pub(crate) fn norm_backward(dx: &mut [f32], dw: &mut [f32], g: &[f32], x: &[f32], w: &[f32], eps: f32) {
    let width = w.len();
    let mut gw = vec![0.0; width];
    for ((dx, g), x) in
        dx.chunks_exact_mut(width).zip(g.chunks_exact(width)).zip(x.chunks_exact(width))
    {
        let r = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
        for ((gw, g), w) in gw.iter_mut().zip(g).zip(w) {
            *gw = g * w;
        }
        let shared = dot(&gw, x) * r * r * r / width as f32;
        for ((dx, gw), x) in dx.iter_mut().zip(&gw).zip(x) {
            *dx += r * gw - x * shared;
        }
        for ((dw, g), x) in dw.iter_mut().zip(g).zip(x) {
            *dw += g * x * r;
        }
    }
}
}

vectorised! {
/// `y = g·σ(g)·u`; `gate_up` `[N, 2·F]` with g first, `y` `[N, F]`.
pub(crate) fn gated_forward(y: &mut [f32], gate_up: &[f32], width: usize) {
    for (y, row) in y.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
        let (gate, up) = row.split_at(width);
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = g / (1.0 + exp(-g)) * u;
        }
    }
}
}

vectorised! {
/// Replaces `gate_up` `[N, 2·F]` by its derivative, given `dy` `[N, F]`:
/// `dg = dy·u·σ(g)·(1 + g·(1 − σ(g)))`, `du = dy·g·σ(g)`.
pub(crate) fn gated_backward(gate_up: &mut [f32], dy: &[f32], width: usize) {
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

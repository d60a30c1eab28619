//! Rotary embedding and causal grouped attention over ragged rows, with and without a cache, and the derivative.
//!
//! Scores exist for one query at a time. The derivative computes them again from the logarithm of their sum
//! (FlashAttention, arXiv:2205.14135), so memory grows with the tokens and not with their square. Keys are read
//! transposed, `[D, positions]`, so that a query's scores are a sum of rows.

use super::vector::{LANES, add_scaled, dot, exp, exp_shifted, largest, row_product, vectorised};
use crate::kernels::Row;

/// Positions are padded to a multiple of this where keys lie transposed, so that no scores are computed one by one.
const PADDING: usize = LANES;

/// Sizes of one attention layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) query: usize,
    pub(crate) key: usize,
    pub(crate) dim: usize,
}

impl Heads {
    /// Width of q, k and v of one token together.
    pub(crate) fn width(self) -> usize {
        (self.query + 2 * self.key) * self.dim
    }

    /// Query heads that share one key head.
    fn group(self) -> usize {
        self.query / self.key
    }

    fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// Where key head `j` starts within a token; its values start `key·dim` later.
    fn key_offset(self, j: usize) -> usize {
        (self.query + j) * self.dim
    }

    fn value_offset(self, j: usize) -> usize {
        (self.query + self.key + j) * self.dim
    }
}

/// Cosines and sines of every position, each `[positions, D/2]`.
#[derive(Debug)]
pub(crate) struct Rotary {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl Rotary {
    /// Angles `position · theta^(−2i/D)`, in f32 as Hugging Face computes them: later positions of a checkpoint were
    /// trained with exactly these roundings.
    pub(crate) fn new(positions: usize, dim: usize, theta: f64) -> Self {
        let frequencies: Vec<f32> = (0..dim / 2)
            .map(|i| (1.0 / theta.powf(2.0 * i as f64 / dim as f64)) as f32)
            .collect();
        let angles = (0..positions)
            .flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        let (sin, cos) = angles.map(f32::sin_cos).unzip();
        Self { cos, sin }
    }
}

/// Whether angles are added or taken off again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Forward,
    Back,
}

/// Turns q and k of every token of `qkv` `[N, (H + 2 KV)·D]` by its position's angles.
pub(crate) fn rotate(qkv: &mut [f32], heads: Heads, rows: &[Row], rotary: &Rotary, turn: Turn) {
    let (width, half) = (heads.width(), heads.dim / 2);
    for row in rows {
        let tokens = &mut qkv[row.start * width..(row.start + row.len) * width];
        for (token, position) in tokens.chunks_exact_mut(width).zip(row.position..) {
            let angles = position * half..(position + 1) * half;
            let turned = &mut token[..(heads.query + heads.key) * heads.dim];
            rotate_heads(
                turned,
                &rotary.cos[angles.clone()],
                &rotary.sin[angles],
                turn,
            );
        }
    }
}

vectorised! {
fn rotate_heads(heads: &mut [f32], cos: &[f32], sin: &[f32], turn: Turn) {
    let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
    for head in heads.chunks_exact_mut(2 * cos.len()) {
        let (left, right) = head.split_at_mut(cos.len());
        for (((l, r), cos), sin) in left.iter_mut().zip(right).zip(cos).zip(sin) {
            let (x, y, sin) = (*l, *r, sin * sign);
            *l = x * cos - y * sin;
            *r = y * cos + x * sin;
        }
    }
}
}

/// Keys and values of one layer for every slot: keys `[slots, KV, D, capacity]`, values `[slots, KV, capacity, D]`.
#[derive(Debug)]
pub(crate) struct CacheLayer {
    keys: Vec<f32>,
    values: Vec<f32>,
    capacity: usize,
}

impl CacheLayer {
    pub(crate) fn new(heads: Heads, slots: usize, capacity: usize) -> Self {
        let capacity = capacity.next_multiple_of(PADDING);
        let len = slots * heads.key * heads.dim * capacity;
        Self {
            keys: vec![0.0; len],
            values: vec![0.0; len],
            capacity,
        }
    }

    fn base(&self, heads: Heads, slot: usize, j: usize) -> usize {
        (slot * heads.key + j) * heads.dim * self.capacity
    }

    fn store(&mut self, heads: Heads, row: &Row, j: usize, qkv: &[f32]) {
        let (width, dim, base) = (heads.width(), heads.dim, self.base(heads, row.slot, j));
        for (token, position) in qkv.chunks_exact(width).zip(row.position..) {
            let key = &token[heads.key_offset(j)..][..dim];
            for (d, &value) in key.iter().enumerate() {
                self.keys[base + d * self.capacity + position] = value;
            }
            let value = &token[heads.value_offset(j)..][..dim];
            self.values[base + position * dim..][..dim].copy_from_slice(value);
        }
    }

    fn view(&self, heads: Heads, slot: usize, j: usize) -> Keys<'_> {
        let base = self.base(heads, slot, j);
        let len = heads.dim * self.capacity;
        Keys {
            transposed: &self.keys[base..base + len],
            stride: self.capacity,
            values: &self.values[base..base + len],
            value_stride: heads.dim,
        }
    }

    pub(crate) fn copy_prefix(&mut self, heads: Heads, from: usize, to: usize, len: usize) {
        for j in 0..heads.key {
            let (source, target) = (self.base(heads, from, j), self.base(heads, to, j));
            for d in 0..heads.dim {
                let source = source + d * self.capacity;
                self.keys
                    .copy_within(source..source + len, target + d * self.capacity);
            }
            self.values
                .copy_within(source..source + len * heads.dim, target);
        }
    }
}

/// One key head of one row: `transposed` `[D, stride]`, `values` `[positions, value_stride]`.
#[derive(Clone, Copy)]
struct Keys<'a> {
    transposed: &'a [f32],
    stride: usize,
    values: &'a [f32],
    value_stride: usize,
}

/// Attention of rotated `qkv` `[N, (H + 2 KV)·D]` into `out` `[N, H·D]`; `log_sums` `[N, H]` receives
/// `ln Σ exp(scores)`, which the derivative needs.
pub(crate) fn forward(
    (out, log_sums): (&mut [f32], &mut [f32]),
    qkv: &[f32],
    heads: Heads,
    rows: &[Row],
    mut cache: Option<&mut CacheLayer>,
) {
    let width = heads.width();
    let (mut transposed, mut scores) = (Vec::new(), Vec::new());
    for row in rows {
        let tokens = &qkv[row.start * width..(row.start + row.len) * width];
        scores.resize((row.position + row.len).next_multiple_of(PADDING), 0.0);
        for j in 0..heads.key {
            let keys = match cache.as_deref_mut() {
                Some(layer) => {
                    layer.store(heads, row, j, tokens);
                    layer.view(heads, row.slot, j)
                }
                None => {
                    let stride = transpose(&mut transposed, tokens, heads, heads.key_offset(j));
                    Keys {
                        transposed: &transposed,
                        stride,
                        values: &tokens[heads.value_offset(j)..],
                        value_stride: width,
                    }
                }
            };
            for h in j * heads.group()..(j + 1) * heads.group() {
                let start = row.start * heads.query;
                let out = &mut out[start * heads.dim..][..row.len * heads.query * heads.dim];
                let log_sums = &mut log_sums[start..][..row.len * heads.query];
                attend(
                    out,
                    log_sums,
                    tokens,
                    keys,
                    &mut scores,
                    heads,
                    h,
                    row.position,
                );
            }
        }
    }
}

/// Copies one head of every token of a row to `[D, positions]`, padded; returns the padded number of positions.
fn transpose(to: &mut Vec<f32>, tokens: &[f32], heads: Heads, offset: usize) -> usize {
    let width = heads.width();
    let stride = (tokens.len() / width).next_multiple_of(PADDING);
    to.clear();
    to.resize(heads.dim * stride, 0.0);
    for (position, token) in tokens.chunks_exact(width).enumerate() {
        for (d, &value) in token[offset..offset + heads.dim].iter().enumerate() {
            to[d * stride + position] = value;
        }
    }
    stride
}

vectorised! {
/// One query head of one row: `s = q Kᵀ/√D`, `p = softmax(s)` over earlier positions and its own, `o = p V`.
fn attend(
    out: &mut [f32],
    log_sums: &mut [f32],
    tokens: &[f32],
    keys: Keys<'_>,
    scores: &mut [f32],
    heads: Heads,
    h: usize,
    position: usize,
) {
    let (dim, scale) = (heads.dim, heads.scale());
    for (i, token) in tokens.chunks_exact(heads.width()).enumerate() {
        let visible = position + i + 1;
        let query = &token[h * dim..(h + 1) * dim];
        let padded = visible.next_multiple_of(PADDING);
        let scores = &mut scores[..padded];
        row_product(scores, query, keys.transposed, keys.stride);
        // Padding and later positions get no weight.
        scores[visible..].fill(f32::NEG_INFINITY);
        let max = largest(scores);
        let sum = exp_shifted(scores, max, scale);
        log_sums[i * heads.query + h] = max * scale + sum.ln();
        let out = &mut out[(i * heads.query + h) * dim..][..dim];
        row_product(out, &scores[..visible], keys.values, keys.value_stride);
        let inverse = 1.0 / sum;
        for value in out.iter_mut() {
            *value *= inverse;
        }
    }
}
}

/// What [`forward`] left behind.
#[derive(Clone, Copy)]
pub(crate) struct Attended<'a> {
    /// Rotated, `[N, (H + 2 KV)·D]`.
    pub(crate) qkv: &'a [f32],
    /// `[N, H·D]`
    pub(crate) out: &'a [f32],
    /// `[N, H]`
    pub(crate) log_sums: &'a [f32],
}

/// Derivative by the rotated q, k and v, into `dqkv` `[N, (H + 2 KV)·D]` which must hold zeros; `dout` `[N, H·D]`.
pub(crate) fn backward(
    dqkv: &mut [f32],
    dout: &[f32],
    attended: Attended<'_>,
    heads: Heads,
    rows: &[Row],
) {
    let (width, out_width) = (heads.width(), heads.query * heads.dim);
    let (mut keys, mut values, mut room) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let all = row.start * width..(row.start + row.len) * width;
        let outs = row.start * out_width..(row.start + row.len) * out_width;
        let tokens = &attended.qkv[all.clone()];
        let sums = &attended.log_sums[row.start * heads.query..][..row.len * heads.query];
        for j in 0..heads.key {
            let stride = transpose(&mut keys, tokens, heads, heads.key_offset(j));
            transpose(&mut values, tokens, heads, heads.value_offset(j));
            room.resize(2 * stride, 0.0);
            for h in j * heads.group()..(j + 1) * heads.group() {
                attend_backward(
                    &mut dqkv[all.clone()],
                    &dout[outs.clone()],
                    Attended {
                        qkv: tokens,
                        out: &attended.out[outs.clone()],
                        log_sums: sums,
                    },
                    (&keys, &values),
                    &mut room,
                    heads,
                    h,
                );
            }
        }
    }
}

vectorised! {
/// One query head of one row. With `P = softmax(s)`: `dV = Pᵀ dO`, `dP = dO Vᵀ`, `dS = P∘(dP − rowsum(dO∘O))/√D`,
/// `dQ = dS K`, `dK = dSᵀ Q`.
fn attend_backward(
    dqkv: &mut [f32],
    dout: &[f32],
    attended: Attended<'_>,
    transposed: (&[f32], &[f32]),
    room: &mut [f32],
    heads: Heads,
    h: usize,
) {
    let (width, dim, scale) = (heads.width(), heads.dim, heads.scale());
    let (key, value) = (heads.key_offset(h / heads.group()), heads.value_offset(h / heads.group()));
    let stride = room.len() / 2;
    let (weights, slopes) = room.split_at_mut(stride);
    for (i, token) in attended.qkv.chunks_exact(width).enumerate() {
        let (visible, padded) = (i + 1, (i + 1).next_multiple_of(PADDING));
        let query = &token[h * dim..(h + 1) * dim];
        let at = (i * heads.query + h) * dim;
        let (dout, out) = (&dout[at..at + dim], &attended.out[at..at + dim]);
        row_product(&mut weights[..padded], query, transposed.0, stride);
        row_product(&mut slopes[..padded], dout, transposed.1, stride);
        let (shared, log_sum) = (dot(dout, out), attended.log_sums[i * heads.query + h]);
        for (weight, slope) in weights[..padded].iter_mut().zip(&mut slopes[..padded]) {
            *weight = exp(*weight * scale - log_sum);
            *slope = *weight * (*slope - shared) * scale;
        }
        let dquery = &mut dqkv[i * width + h * dim..][..dim];
        row_product(dquery, &slopes[..visible], &attended.qkv[key..], width);
        for (j, (&weight, &slope)) in weights.iter().zip(slopes.iter()).take(visible).enumerate() {
            add_scaled(&mut dqkv[j * width + key..][..dim], slope, query);
            add_scaled(&mut dqkv[j * width + value..][..dim], weight, dout);
        }
    }
}
}

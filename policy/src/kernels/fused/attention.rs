//! Rotary embedding and causal grouped attention over ragged rows, with and without a cache, and the derivative.
//!
//! Scores exist for one query at a time. The derivative computes them again from the logarithm of their sum
//! (FlashAttention, arXiv:2205.14135), so memory grows with the tokens and not with their square. Keys are transposed,
//! `[D, positions]`, so that a query's scores are a sum of rows. A row with shared earlier tokens is joined with a copy of
//! them, so that its sums have the same order as those of a contiguous text.

use std::cell::RefCell;
use std::ops::Range;

use super::cache::{CacheLayer, CachedHead};
use super::elementwise;
use super::heads::Heads;
use super::rotary::{Angles, Rotary};
use crate::kernels::Row;
use crate::kernels::simd::{
    LANES, add_scaled, dot, exp, exp_shifted, largest, row_product, tanh, vectorised,
};
use crate::kernels::threads::Threads;
use crate::layout::Attention;

/// Transposed keys are padded to a multiple of this many positions, so that scores are computed in whole vectors.
const PADDING: usize = LANES;

/// Fewest multiply-adds worth handing to another thread: some microseconds, since these products are short.
const PART: usize = 1 << 16;

/// Direction of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Forward,
    Back,
}

/// Turns q and k of every token of `qkv` `[N, (H + 2 KV)·D]` by its position's angles.
pub(crate) fn rotate(qkv: &mut [f32], heads: Heads, rows: &[Row], rotary: &Rotary, turn: Turn) {
    let width = heads.width();
    for row in rows {
        let tokens = &mut qkv[row.start * width..(row.start + row.len) * width];
        for (token, position) in tokens.chunks_exact_mut(width).zip(row.position..) {
            let turned = &mut token[..(heads.query + heads.key) * heads.dim];
            rotate_heads(turned, rotary.angles(position), turn);
        }
    }
}

vectorised! {
fn rotate_heads(heads: &mut [f32], angles: Angles<'_>, turn: Turn) {
    let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
    let Angles { cos, sin } = angles;
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

/// One key head of one row.
#[derive(Clone, Copy)]
enum Keys<'a> {
    /// `transposed` `[D, stride]`, `values` `[positions, value_stride]`
    Packed {
        transposed: &'a [f32],
        stride: usize,
        values: &'a [f32],
        value_stride: usize,
    },
    Cached(CachedHead<'a>),
}

impl Keys<'_> {
    /// `scores = q Kᵀ` at consecutive positions from `start`; those of padding are undefined.
    #[inline(always)]
    fn scores(self, scores: &mut [f32], start: usize, query: &[f32]) {
        match self {
            Keys::Packed {
                transposed, stride, ..
            } => row_product(scores, query, &transposed[start..], stride),
            Keys::Cached(head) => head.scores(scores, start, query),
        }
    }

    /// `out = Σ weights · v` over consecutive positions from `start`.
    #[inline(always)]
    fn weighted(self, out: &mut [f32], weights: &[f32], start: usize) {
        match self {
            Keys::Packed {
                values,
                value_stride,
                ..
            } => row_product(out, weights, &values[start * value_stride..], value_stride),
            Keys::Cached(head) => head.weighted(out, weights, start),
        }
    }
}

/// Attention of rotated `qkv` `[N, (H + 2 KV)·D]` into `out` `[N, H·D]`; `log_sums` `[N, H]` receives
/// `ln Σ exp(scores)`, which the derivative needs. `rows` lie one after another.
pub(crate) fn forward(
    (out, log_sums): (&mut [f32], &mut [f32]),
    qkv: &[f32],
    shape: (Heads, &Attention),
    rows: &[Row],
    cache: Option<(&mut CacheLayer, &[Vec<u32>])>,
    threads: &Threads,
) {
    let heads = shape.0;
    let earlier = match cache {
        Some((layer, tables)) => {
            for row in rows {
                let tokens = &qkv[columns(row.own(), heads.width())];
                layer.store(heads, tokens, row.position, &tables[row.slot]);
            }
            Earlier::Cached(layer, tables)
        }
        None => Earlier::packed(qkv, heads, rows),
    };
    let seen = rows.iter().map(|row| row.position + row.len).max();
    let cost = 2 * heads.query * heads.dim * seen.unwrap_or(1);
    let (one, other) = ((out, heads.query * heads.dim), (log_sums, heads.query));
    threads.share_rows_of_two(one, other, PART / cost, |first, out, log_sums| {
        attend_tokens((out, log_sums), first, qkv, shape, rows, &earlier);
    });
}

/// Keys and values that queries attend to.
enum Earlier<'a> {
    Cached(&'a CacheLayer, &'a [Vec<u32>]),
    Packed(Packed),
}

/// Keys and values of rows without a cache.
struct Packed {
    /// Keys of every row and head transposed, `[KV, D, stride]`.
    keys: Vec<f32>,
    /// Contiguous texts of rows whose earlier tokens lie elsewhere.
    joined: Vec<f32>,
    places: Vec<Place>,
}

/// Location of one row's keys and values.
struct Place {
    keys: usize,
    stride: usize,
    /// Start in the joined texts; none if the row lies in the batch.
    joined: Option<usize>,
}

impl Earlier<'_> {
    fn packed(qkv: &[f32], heads: Heads, rows: &[Row]) -> Self {
        let mut packed = Packed {
            keys: Vec::new(),
            joined: Vec::new(),
            places: Vec::with_capacity(rows.len()),
        };
        for row in rows {
            let (mut stride, keys) = (0, packed.keys.len());
            let joined = (row.position > 0).then_some(packed.joined.len());
            let text = match joined {
                None => &qkv[columns(row.own(), heads.width())],
                Some(start) => {
                    join(&mut packed.joined, qkv, row, heads.width());
                    &packed.joined[start..]
                }
            };
            for j in 0..heads.key {
                stride = transpose(&mut packed.keys, text, heads, heads.key_offset(j));
            }
            packed.places.push(Place {
                keys,
                stride,
                joined,
            });
        }
        Self::Packed(packed)
    }

    /// Key head `j` of row number `index`, whose own tokens are `tokens`.
    fn keys<'b>(
        &'b self,
        heads: Heads,
        j: usize,
        (index, row): (usize, &Row),
        tokens: &'b [f32],
    ) -> Keys<'b> {
        match self {
            Self::Cached(layer, tables) => Keys::Cached(layer.head(j, &tables[row.slot])),
            Self::Packed(packed) => {
                let place = &packed.places[index];
                let len = heads.dim * place.stride;
                let text = match place.joined {
                    None => tokens,
                    Some(start) => &packed.joined[start..],
                };
                Keys::Packed {
                    transposed: &packed.keys[place.keys + j * len..][..len],
                    stride: place.stride,
                    values: &text[heads.value_offset(j)..],
                    value_stride: heads.width(),
                }
            }
        }
    }
}

thread_local! {
    /// Buffer for the scores of one query.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Attention of consecutive tokens, the first of them token `first` of the batch.
fn attend_tokens(
    (out, log_sums): (&mut [f32], &mut [f32]),
    first: usize,
    qkv: &[f32],
    (heads, attention): (Heads, &Attention),
    rows: &[Row],
    earlier: &Earlier<'_>,
) {
    let (width, out_width) = (heads.width(), heads.query * heads.dim);
    let end = first + log_sums.len() / heads.query;
    let from = rows.partition_point(|row| row.start + row.len <= first);
    for (index, row) in rows.iter().enumerate().skip(from) {
        let (start, end) = (row.start.max(first), (row.start + row.len).min(end));
        if start >= end {
            break;
        }
        let all = &qkv[row.start * width..][..row.len * width];
        let tokens = &qkv[start * width..end * width];
        let out = &mut out[(start - first) * out_width..(end - first) * out_width];
        let log_sums = &mut log_sums[(start - first) * heads.query..(end - first) * heads.query];
        let position = row.position + start - row.start;
        // One token: all heads together, since they are independent. Several: head by head, so that its keys stay in cache.
        let together = if end - start == 1 { heads.query } else { 1 };
        SCORES.with_borrow_mut(|scores| {
            let padded = (position + end - start).next_multiple_of(PADDING);
            scores.resize(together * (padded + 1), 0.0);
            for h in (0..heads.query).step_by(together) {
                let source = Source {
                    earlier,
                    row: (index, row),
                    tokens: all,
                };
                attend(
                    out,
                    log_sums,
                    tokens,
                    source,
                    scores,
                    (heads, attention),
                    h..h + together,
                    position,
                );
            }
        });
    }
}

/// Source of the keys and values of a row.
#[derive(Clone, Copy)]
struct Source<'a> {
    earlier: &'a Earlier<'a>,
    row: (usize, &'a Row),
    /// Tokens of the row in this batch.
    tokens: &'a [f32],
}

impl<'a> Source<'a> {
    /// Keys and values for query head `h`.
    #[inline(always)]
    fn keys(self, heads: Heads, h: usize) -> Keys<'a> {
        let j = h / heads.group();
        self.earlier.keys(heads, j, self.row, self.tokens)
    }
}

/// Elements of consecutive tokens, each `width` wide.
fn columns(tokens: Range<usize>, width: usize) -> Range<usize> {
    tokens.start * width..tokens.end * width
}

/// Appends the whole text of a row, `[position + len, width]`.
fn join(to: &mut Vec<f32>, from: &[f32], row: &Row, width: usize) {
    to.extend_from_slice(&from[columns(row.earlier(), width)]);
    to.extend_from_slice(&from[columns(row.own(), width)]);
}

/// Appends one head of every token of a row as `[D, positions]`, padded; returns the padded number of positions.
fn transpose(to: &mut Vec<f32>, tokens: &[f32], heads: Heads, offset: usize) -> usize {
    let width = heads.width();
    let stride = (tokens.len() / width).next_multiple_of(PADDING);
    let start = to.len();
    to.resize(start + heads.dim * stride, 0.0);
    for (position, token) in tokens.chunks_exact(width).enumerate() {
        for (d, &value) in token[offset..offset + heads.dim].iter().enumerate() {
            to[start + d * stride + position] = value;
        }
    }
    stride
}

vectorised! {
/// Some query heads of one row: `s = cap(q Kᵀ·scale)`, `p = softmax(s)` over the positions that the query sees, `o = p V`.
///
/// `scores` has room for the positions of every head and one number more.
fn attend(
    out: &mut [f32],
    log_sums: &mut [f32],
    tokens: &[f32],
    source: Source<'_>,
    scores: &mut [f32],
    shape: (Heads, &Attention),
    those: Range<usize>,
    position: usize,
) {
    let (heads, attention) = shape;
    let dim = heads.dim;
    let (sums, scores) = scores.split_at_mut(those.len());
    for (i, token) in tokens.chunks_exact(heads.width()).enumerate() {
        let seen = Seen::new(attention, position + i);
        let len = seen.padded().len();
        for (h, scores) in those.clone().zip(scores.chunks_exact_mut(len)) {
            let query = &token[h * dim..(h + 1) * dim];
            source.keys(heads, h).scores(scores, seen.start, query);
        }
        for ((h, scores), sum) in those.clone().zip(scores.chunks_exact_mut(len)).zip(&mut *sums) {
            let scale = bend(scores, attention);
            // Padding, later positions and those before the window get no weight.
            scores[seen.end - seen.start..].fill(f32::NEG_INFINITY);
            scores[..seen.first - seen.start].fill(f32::NEG_INFINITY);
            let max = largest(scores);
            *sum = exp_shifted(scores, max, scale);
            log_sums[i * heads.query + h] = max * scale + sum.ln();
        }
        for ((h, scores), sum) in those.clone().zip(scores.chunks_exact(len)).zip(&*sums) {
            let out = &mut out[(i * heads.query + h) * dim..][..dim];
            let weights = &scores[seen.first - seen.start..seen.end - seen.start];
            source.keys(heads, h).weighted(out, weights, seen.first);
            let inverse = 1.0 / sum;
            for value in out.iter_mut() {
                *value *= inverse;
            }
        }
    }
}
}

/// Positions `first..end` that one query sees, and the start of the vectors that hold them.
#[derive(Debug, Clone, Copy)]
struct Seen {
    start: usize,
    first: usize,
    end: usize,
}

impl Seen {
    #[inline(always)]
    fn new(attention: &Attention, position: usize) -> Self {
        let first = attention.first_visible(position);
        Self {
            start: first / PADDING * PADDING,
            first,
            end: position + 1,
        }
    }

    /// Whole vectors around the seen positions.
    #[inline(always)]
    fn padded(self) -> Range<usize> {
        self.start..self.end.next_multiple_of(PADDING)
    }
}

/// With a cap, scores become `cap·tanh(s·scale/cap)`; without one they stay unscaled. Returns the factor that is left to
/// apply.
#[inline(always)]
fn bend(scores: &mut [f32], attention: &Attention) -> f32 {
    let scale = attention.scale as f32;
    let Some(cap) = attention.softcap else {
        return scale;
    };
    let (cap, inner) = (cap as f32, (attention.scale / cap) as f32);
    for score in scores {
        *score = cap * tanh(*score * inner);
    }
    1.0
}

/// Inputs and results of [`forward`], for the derivative.
#[derive(Clone, Copy)]
pub(crate) struct Attended<'a> {
    /// Rotated, `[N, (H + 2 KV)·D]`.
    pub(crate) qkv: &'a [f32],
    /// `[N, H·D]`
    pub(crate) out: &'a [f32],
    /// `[N, H]`
    pub(crate) log_sums: &'a [f32],
}

/// Derivative by the rotated q, k and v, into `dqkv` `[N, (H + 2 KV)·D]`, which must hold zeros; `dout` `[N, H·D]`. The
/// derivatives of several rows by shared tokens add up.
pub(crate) fn backward(
    dqkv: &mut [f32],
    dout: &[f32],
    attended: Attended<'_>,
    (heads, attention): (Heads, &Attention),
    rows: &[Row],
) {
    let (width, out_width) = (heads.width(), heads.query * heads.dim);
    let (mut text, mut dtext) = (Vec::new(), Vec::new());
    for row in rows {
        let (own, outs) = (columns(row.own(), width), columns(row.own(), out_width));
        let of_row = |qkv| Attended {
            qkv,
            out: &attended.out[outs.clone()],
            log_sums: &attended.log_sums[columns(row.own(), heads.query)],
        };
        let dout = &dout[outs.clone()];
        if row.position == 0 {
            let tokens = of_row(&attended.qkv[own.clone()]);
            row_backward(&mut dqkv[own], dout, tokens, (heads, attention));
            continue;
        }
        text.clear();
        join(&mut text, attended.qkv, row, width);
        dtext.clear();
        dtext.resize(text.len(), 0.0);
        row_backward(&mut dtext, dout, of_row(&text), (heads, attention));
        let (earlier, late) = dtext.split_at(row.position * width);
        elementwise::add(&mut dqkv[columns(row.earlier(), width)], earlier);
        elementwise::add(&mut dqkv[own], late);
    }
}

/// The derivative of one text, `attended.qkv` and `dqkv` `[positions, (H + 2 KV)·D]`; the queries are its last tokens.
fn row_backward(
    dqkv: &mut [f32],
    dout: &[f32],
    attended: Attended<'_>,
    shape: (Heads, &Attention),
) {
    let heads = shape.0;
    let (mut keys, mut values, mut room) = (Vec::new(), Vec::new(), Vec::new());
    for j in 0..heads.key {
        keys.clear();
        values.clear();
        let stride = transpose(&mut keys, attended.qkv, heads, heads.key_offset(j));
        transpose(&mut values, attended.qkv, heads, heads.value_offset(j));
        room.resize(2 * stride, 0.0);
        for h in j * heads.group()..(j + 1) * heads.group() {
            attend_backward(dqkv, dout, attended, (&keys, &values), &mut room, shape, h);
        }
    }
}

vectorised! {
/// One query head of one row. With `P = softmax(s)`: `dV = Pᵀ dO`, `dP = dO Vᵀ`, `dS = P∘(dP − rowsum(dO∘O))·scale`,
/// times `1 − (s/cap)²` where there is a cap, `dQ = dS K`, `dK = dSᵀ Q`.
fn attend_backward(
    dqkv: &mut [f32],
    dout: &[f32],
    attended: Attended<'_>,
    transposed: (&[f32], &[f32]),
    room: &mut [f32],
    shape: (Heads, &Attention),
    h: usize,
) {
    let (heads, attention) = shape;
    let (width, dim, scale) = (heads.width(), heads.dim, attention.scale as f32);
    let (key, value) = (heads.key_offset(h / heads.group()), heads.value_offset(h / heads.group()));
    let stride = room.len() / 2;
    let (weights, slopes) = room.split_at_mut(stride);
    let earlier = attended.qkv.len() / width - attended.log_sums.len() / heads.query;
    for (i, token) in attended.qkv.chunks_exact(width).enumerate().skip(earlier) {
        let seen = Seen::new(attention, i);
        let query = &token[h * dim..(h + 1) * dim];
        let place = (i - earlier) * heads.query + h;
        let at = place * dim;
        let (dout, out) = (&dout[at..at + dim], &attended.out[at..at + dim]);
        let (weights, slopes) = (&mut weights[seen.padded()], &mut slopes[seen.padded()]);
        row_product(weights, query, &transposed.0[seen.start..], stride);
        row_product(slopes, dout, &transposed.1[seen.start..], stride);
        let (shared, log_sum) = (dot(dout, out), attended.log_sums[place]);
        let left = bend(weights, attention);
        let bent = attention.softcap.map_or(0.0, |cap| (1.0 / (cap * cap)) as f32);
        for (weight, slope) in weights.iter_mut().zip(slopes.iter_mut()) {
            let score = *weight;
            *weight = exp(score * left - log_sum);
            *slope = *weight * (*slope - shared) * scale * (1.0 - score * score * bent);
        }
        let places = seen.first - seen.start..seen.end - seen.start;
        let (weights, slopes) = (&weights[places.clone()], &slopes[places]);
        let dquery = &mut dqkv[i * width + h * dim..][..dim];
        row_product(dquery, slopes, &attended.qkv[seen.first * width + key..], width);
        for (j, (&weight, &slope)) in (seen.first..).zip(weights.iter().zip(slopes)) {
            add_scaled(&mut dqkv[j * width + key..][..dim], slope, query);
            add_scaled(&mut dqkv[j * width + value..][..dim], weight, dout);
        }
    }
}
}

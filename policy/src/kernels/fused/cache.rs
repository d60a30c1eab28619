//! Keys and values of one layer, in blocks: keys transposed, so that a query's scores are a sum of rows.
//!
//! Knows no texts: a table of blocks says where a text lies. Invariant: sums run over positions in order, as they do over
//! keys that were never cached, so that cutting a text into blocks or steps changes no bit of its attention.

use super::attention::Heads;
use super::vector::row_product;
use crate::kernels::BLOCK;

/// Keys `[blocks, KV, D, BLOCK]` and values `[blocks, KV, BLOCK, D]`, of as many blocks as were reached so far.
#[derive(Debug)]
pub(crate) struct CacheLayer {
    keys: Vec<f32>,
    values: Vec<f32>,
    heads: usize,
    dim: usize,
}

/// One key head of one text.
#[derive(Clone, Copy)]
pub(super) struct CachedHead<'a> {
    layer: &'a CacheLayer,
    j: usize,
    table: &'a [u32],
}

impl CacheLayer {
    /// Room for so many blocks, which the system lends without memory behind it until it is written.
    pub(super) fn new(heads: Heads, blocks: usize) -> Self {
        let len = blocks * heads.key * heads.dim * BLOCK;
        Self {
            keys: Vec::with_capacity(len),
            values: Vec::with_capacity(len),
            heads: heads.key,
            dim: heads.dim,
        }
    }

    /// Fills all up to a block with zeros before the first write to it. The lowest free block is handed out first, so what is
    /// written for the first time lies behind what was written before.
    fn reach(&mut self, block: u32) {
        let end = self.base(block + 1, 0);
        if self.keys.len() < end {
            self.keys.resize(end, 0.0);
            self.values.resize(end, 0.0);
        }
    }

    /// Where key head `j` of a block starts, in keys and in values.
    fn base(&self, block: u32, j: usize) -> usize {
        (block as usize * self.heads + j) * self.dim * BLOCK
    }

    /// Writes key head `j` of consecutive tokens `[N, (H + 2 KV)·D]`, the first at `position` of the text.
    pub(super) fn store(
        &mut self,
        heads: Heads,
        j: usize,
        qkv: &[f32],
        position: usize,
        table: &[u32],
    ) {
        let dim = self.dim;
        let newest = table.iter().max();
        newest.into_iter().for_each(|block| self.reach(*block));
        for (token, position) in qkv.chunks_exact(heads.width()).zip(position..) {
            let (base, at) = (self.base(table[position / BLOCK], j), position % BLOCK);
            let key = &token[heads.key_offset(j)..][..dim];
            for (d, &value) in key.iter().enumerate() {
                self.keys[base + d * BLOCK + at] = value;
            }
            let value = &token[heads.value_offset(j)..][..dim];
            self.values[base + at * dim..][..dim].copy_from_slice(value);
        }
    }

    pub(super) fn head<'a>(&'a self, j: usize, table: &'a [u32]) -> CachedHead<'a> {
        CachedHead {
            layer: self,
            j,
            table,
        }
    }

    pub(super) fn copy_block(&mut self, from: u32, to: u32) {
        self.reach(from.max(to));
        let (from, to) = (self.base(from, 0), self.base(to, 0));
        let len = self.heads * self.dim * BLOCK;
        self.keys.copy_within(from..from + len, to);
        self.values.copy_within(from..from + len, to);
    }
}

impl CachedHead<'_> {
    /// `scores = q Kᵀ` at consecutive positions from `start`; those beyond the text's end are of no meaning.
    #[inline(always)]
    pub(super) fn scores(self, scores: &mut [f32], start: usize, query: &[f32]) {
        let (mut rest, mut position) = (scores, start);
        while !rest.is_empty() {
            let at = position % BLOCK;
            let (now, later) = rest.split_at_mut((BLOCK - at).min(rest.len()));
            let base = self.layer.base(self.table[position / BLOCK], self.j);
            row_product(now, query, &self.layer.keys[base + at..], BLOCK);
            position += now.len();
            rest = later;
        }
    }

    /// `out = Σ weights · v` over consecutive positions from `start`.
    #[inline(always)]
    pub(super) fn weighted(self, out: &mut [f32], weights: &[f32], start: usize) {
        let (mut rest, mut position, dim) = (weights, start, self.layer.dim);
        out.fill(0.0);
        while !rest.is_empty() {
            let at = position % BLOCK;
            let (now, later) = rest.split_at((BLOCK - at).min(rest.len()));
            let base = self.layer.base(self.table[position / BLOCK], self.j);
            add_row_product(out, now, &self.layer.values[base + at * dim..], dim);
            position += now.len();
            rest = later;
        }
    }
}

/// `outⱼ += Σₚ aₚ bₚⱼ`, one after another, so that several calls add up as one would.
#[inline(always)]
fn add_row_product(out: &mut [f32], a: &[f32], b: &[f32], stride: usize) {
    let mut column = 0;
    while column + 32 <= out.len() {
        add_columns::<32>(out, a, b, stride, column);
        column += 32;
    }
    if column + 16 <= out.len() {
        add_columns::<16>(out, a, b, stride, column);
        column += 16;
    }
    if column + 8 <= out.len() {
        add_columns::<8>(out, a, b, stride, column);
        column += 8;
    }
    while column < out.len() {
        add_columns::<1>(out, a, b, stride, column);
        column += 1;
    }
}

#[inline(always)]
fn add_columns<const C: usize>(
    out: &mut [f32],
    a: &[f32],
    b: &[f32],
    stride: usize,
    column: usize,
) {
    let mut sums = [0.0; C];
    sums.copy_from_slice(&out[column..column + C]);
    for (p, &scale) in a.iter().enumerate() {
        let row = &b[p * stride + column..][..C];
        for lane in 0..C {
            sums[lane] += scale * row[lane];
        }
    }
    out[column..column + C].copy_from_slice(&sums);
}

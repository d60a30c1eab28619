//! Keys and values of one layer, in blocks: keys transposed, so that a query's scores are a sum of rows.
//!
//! Knows no texts: a table of blocks says where a text lies. Invariant: sums run over positions in order, as they do over
//! keys that were never cached, so that cutting a text into blocks or steps changes no bit of its attention.

use std::sync::Arc;

use super::heads::Heads;
use super::memory::Memory;
use crate::kernels::BLOCK;
use crate::kernels::simd::row_product;

/// Keys `[blocks, KV, D, BLOCK]` and values `[blocks, KV, BLOCK, D]`.
///
/// Threads share it while they compute rows of their own: a block that one of them writes in a step is in no table of
/// another's.
#[derive(Debug)]
pub(crate) struct CacheLayer {
    keys: Memory,
    values: Memory,
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
            keys: Memory::with_capacity(len),
            values: Memory::with_capacity(len),
            heads: heads.key,
            dim: heads.dim,
        }
    }

    /// Where key head `j` of a block starts, in keys and in values.
    #[inline(always)]
    fn base(&self, block: u32, j: usize) -> usize {
        (block as usize * self.heads + j) * self.dim * BLOCK
    }

    /// Elements of a block, of one key head.
    fn block(&self) -> usize {
        self.dim * BLOCK
    }

    /// Writes all key heads of consecutive tokens `[N, (H + 2 KV)·D]`, the first at `position` of the text.
    ///
    /// # Safety
    /// No other thread may use the blocks of these positions meanwhile.
    #[allow(unsafe_code)]
    pub(super) unsafe fn store(&self, heads: Heads, qkv: &[f32], position: usize, table: &[u32]) {
        for (token, position) in qkv.chunks_exact(heads.width()).zip(position..) {
            let (block, at) = (table[position / BLOCK], position % BLOCK);
            for j in 0..self.heads {
                let base = self.base(block, j);
                // Safety: within one block, which is this caller's.
                let keys = unsafe { self.keys.write(base..base + self.block()) };
                let key = &token[heads.key_offset(j)..][..self.dim];
                for (&value, row) in key.iter().zip(keys.chunks_exact_mut(BLOCK)) {
                    row[at] = value;
                }
                let start = base + at * self.dim;
                // Safety: the same.
                let values = unsafe { self.values.write(start..start + self.dim) };
                values.copy_from_slice(&token[heads.value_offset(j)..][..self.dim]);
            }
        }
    }

    pub(super) fn head<'a>(&'a self, j: usize, table: &'a [u32]) -> CachedHead<'a> {
        CachedHead {
            layer: self,
            j,
            table,
        }
    }

    /// Makes all blocks up to this one usable, between two steps. The lowest free block is handed out first, so what is
    /// reached for the first time lies behind what was reached before.
    pub(crate) fn reach(layer: &mut Arc<Self>, block: u32) {
        let layer = Self::alone(layer);
        let end = layer.base(block + 1, 0);
        layer.keys.reach(end);
        layer.values.reach(end);
    }

    /// Copies one block to another, between two steps.
    #[allow(unsafe_code)]
    pub(crate) fn copy_block(layer: &mut Arc<Self>, from: u32, to: u32) {
        Self::reach(layer, from.max(to));
        if from == to {
            return;
        }
        let layer = Self::alone(layer);
        let (from, to) = (layer.base(from, 0), layer.base(to, 0));
        let len = layer.heads * layer.block();
        for memory in [&layer.keys, &layer.values] {
            // Safety: two blocks of memory that nobody else has a handle to.
            let (from, to) = unsafe { (memory.read(from..from + len), memory.write(to..to + len)) };
            to.copy_from_slice(from);
        }
    }

    fn alone(layer: &mut Arc<Self>) -> &mut Self {
        match Arc::get_mut(layer) {
            Some(layer) => layer,
            None => unreachable!("a step's handles end with it"),
        }
    }
}

impl<'a> CachedHead<'a> {
    /// Keys and values of one block.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn block(self, index: usize) -> (&'a [f32], &'a [f32]) {
        let base = self.layer.base(self.table[index], self.j);
        let range = base..base + self.layer.block();
        // Safety: a block in a table of this thread's, which nobody else writes; its own writes lie before.
        unsafe {
            (
                self.layer.keys.read(range.clone()),
                self.layer.values.read(range),
            )
        }
    }

    /// `scores = q Kᵀ` at consecutive positions from `start`; those beyond the text's end are of no meaning.
    #[inline(always)]
    pub(super) fn scores(self, scores: &mut [f32], start: usize, query: &[f32]) {
        let (mut rest, mut position) = (scores, start);
        while !rest.is_empty() {
            let at = position % BLOCK;
            let (now, later) = rest.split_at_mut((BLOCK - at).min(rest.len()));
            let (keys, _) = self.block(position / BLOCK);
            row_product(now, query, &keys[at..], BLOCK);
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
            let (_, values) = self.block(position / BLOCK);
            add_row_product(out, now, &values[at * dim..], dim);
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

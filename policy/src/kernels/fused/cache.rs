//! Keys and values of one layer, in blocks: keys transposed, so that a query's scores are a sum of rows.
//!
//! Knows no texts: a table of blocks says where a text lies. Invariant: sums run over positions in order, as they do without
//! a cache, so cutting a text into blocks or steps changes no bit of its attention.

use std::sync::Arc;

use super::heads::Heads;
use super::memory::Memory;
use crate::kernels::BLOCK;
use crate::kernels::simd::row_product;

/// A handle to the keys and values of one layer.
///
/// A handle is used as its memory would be: writing takes it exclusively, reading shares it. Further handles to the same
/// memory come from [`CacheLayer::share`] alone, whose caller answers for what they write.
#[derive(Debug)]
pub(crate) struct CacheLayer {
    memory: Arc<LayerMemory>,
}

/// Keys `[blocks, KV, D, BLOCK]` and values `[blocks, KV, BLOCK, D]`.
#[derive(Debug)]
struct LayerMemory {
    keys: Memory,
    values: Memory,
    heads: usize,
    dim: usize,
}

/// One key head of one text.
#[derive(Clone, Copy)]
pub(super) struct CachedHead<'a> {
    layer: &'a LayerMemory,
    j: usize,
    table: &'a [u32],
}

impl LayerMemory {
    /// Start of key head `j` of a block, in keys and in values.
    #[inline(always)]
    fn base(&self, block: u32, j: usize) -> usize {
        (block as usize * self.heads + j) * self.dim * BLOCK
    }

    /// Elements of a block, of one key head.
    fn block(&self) -> usize {
        self.dim * BLOCK
    }
}

impl CacheLayer {
    /// Room for `blocks` blocks; the system provides memory when a block is first written.
    pub(super) fn new(heads: Heads, blocks: usize) -> Self {
        let len = blocks * heads.key * heads.dim * BLOCK;
        Self {
            memory: Arc::new(LayerMemory {
                keys: Memory::with_capacity(len),
                values: Memory::with_capacity(len),
                heads: heads.key,
                dim: heads.dim,
            }),
        }
    }

    /// Another handle to the same memory.
    ///
    /// # Safety
    /// As long as several handles exist, no thread may write a block through one of them while another thread uses that
    /// block through another.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn share(&self) -> Self {
        Self {
            memory: Arc::clone(&self.memory),
        }
    }

    /// Writes all key heads of consecutive tokens `[N, (H + 2 KV)·D]`, the first at `position` of the text.
    #[allow(unsafe_code)]
    pub(super) fn store(&mut self, heads: Heads, qkv: &[f32], position: usize, table: &[u32]) {
        let layer = &*self.memory;
        for (token, position) in qkv.chunks_exact(heads.width()).zip(position..) {
            let (block, at) = (table[position / BLOCK], position % BLOCK);
            for j in 0..layer.heads {
                let base = layer.base(block, j);
                // Safety: this handle is held exclusively, and the caller of `share` keeps other handles off the block.
                let keys = unsafe { layer.keys.write(base..base + layer.block()) };
                let key = &token[heads.key_offset(j)..][..layer.dim];
                for (&value, row) in key.iter().zip(keys.chunks_exact_mut(BLOCK)) {
                    row[at] = value;
                }
                let start = base + at * layer.dim;
                // Safety: the same.
                let values = unsafe { layer.values.write(start..start + layer.dim) };
                values.copy_from_slice(&token[heads.value_offset(j)..][..layer.dim]);
            }
        }
    }

    /// Key head `j` of the text whose blocks are `table`.
    pub(super) fn head<'a>(&'a self, j: usize, table: &'a [u32]) -> CachedHead<'a> {
        debug_assert!(j < self.memory.heads, "the layer has this key head");
        CachedHead {
            layer: &self.memory,
            j,
            table,
        }
    }

    /// Makes all blocks up to this one usable, between two steps. The lowest free block is handed out first, so new memory
    /// lies behind the memory in use.
    pub(crate) fn reach(&mut self, block: u32) {
        let layer = self.alone();
        let end = layer.base(block + 1, 0);
        layer.keys.reach(end);
        layer.values.reach(end);
    }

    /// Copies one block to another, between two steps.
    #[allow(unsafe_code)]
    pub(crate) fn copy_block(&mut self, from: u32, to: u32) {
        self.reach(from.max(to));
        if from == to {
            return;
        }
        let layer = self.alone();
        let (from, to) = (layer.base(from, 0), layer.base(to, 0));
        let len = layer.heads * layer.block();
        for memory in [&layer.keys, &layer.values] {
            // Safety: two different blocks of memory with a single handle, which is held exclusively.
            let (from, to) = unsafe { (memory.read(from..from + len), memory.write(to..to + len)) };
            to.copy_from_slice(from);
        }
    }

    fn alone(&mut self) -> &mut LayerMemory {
        match Arc::get_mut(&mut self.memory) {
            Some(layer) => layer,
            None => unreachable!("shared handles end with their step"),
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
        // Safety: the handle is borrowed for `'a`, so nothing writes through it, and the caller of `share` keeps other
        // handles from writing the block.
        unsafe {
            (
                self.layer.keys.read(range.clone()),
                self.layer.values.read(range),
            )
        }
    }

    /// `scores = q Kᵀ` at consecutive positions from `start`; those beyond the text's end are undefined.
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

/// `outⱼ += Σₚ aₚ bₚⱼ`, in order, so that several calls give the bits of one.
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

//! The operations of a decoder, each with its derivative, that a kernel set provides.
//!
//! Operations take packed, ragged rows: arrays are `[N, width]` for the N tokens of all rows in order, without padding. They
//! know no model, layer order or sampling. Invariant: every kernel set computes the same function and the same derivative, up
//! to rounding.

use std::ops::Range;
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use self::gradients::Gradients;
use crate::error::PolicyError;
use crate::layout::{Attention, Block, HeadNorms, Linear};

pub(crate) mod candle;
pub(crate) mod fused;
pub(crate) mod gradients;
pub(crate) mod matmul;
pub(crate) mod simd;
pub(crate) mod threads;

/// Implementation of the operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelSet {
    /// Own kernels over slices of f32, for the CPU: several times faster there than `candle`.
    #[default]
    Fused,
    /// Composite operations of candle, on any device.
    Candle,
    /// The fused kernels over matrices rounded to eight bits, for machines with slow or little memory. They generate and
    /// score, in a numeric class of their own, and do not train.
    Int8,
}

/// A row of a batch: consecutive tokens of one text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    /// Index of its first token in the packed batch.
    pub(crate) start: usize,
    /// Tokens of the row in the batch.
    pub(crate) len: usize,
    /// Position of its first token in its text. The earlier tokens lie in the cache or in the packed batch.
    pub(crate) position: usize,
    /// Index of the earlier tokens in the packed batch; unused with a cache.
    pub(crate) earlier: usize,
    /// Index of its table in the cache; unused without a cache.
    pub(crate) slot: usize,
}

impl Row {
    /// Earlier tokens of its text in the packed batch, without a cache.
    pub(crate) fn earlier(&self) -> Range<usize> {
        self.earlier..self.earlier + self.position
    }

    /// Tokens of the row in the packed batch.
    pub(crate) fn own(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// Index in the packed batch of a position of its text, without a cache.
    pub(crate) fn place(&self, position: usize) -> usize {
        match position.checked_sub(self.position) {
            Some(own) => self.start + own,
            None => self.earlier + position,
        }
    }
}

/// Positions of a block of a cache: enough to fill a vector with neighbouring keys, few enough that the last block of a text,
/// half empty on average, wastes little.
pub(crate) const BLOCK: usize = 32;

/// Keys and values of earlier positions, in blocks, and the tables of the rows of the next pass.
#[derive(Debug)]
pub(crate) struct Paged<L> {
    pub(crate) layers: Vec<L>,
    /// For each slot, the blocks of its text in order: position p lies in block `p / BLOCK` at `p % BLOCK`.
    pub(crate) tables: Vec<Vec<u32>>,
}

/// Packed tokens and their rows.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) rows: Rc<[Row]>,
}

/// A text without a cache, and the number of first tokens that it may share with its neighbours.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Text<'a> {
    pub(crate) tokens: &'a [u32],
    /// Below the number of tokens, since shared positions give no results.
    pub(crate) shareable: usize,
}

impl<'a> Text<'a> {
    /// A text that shares nothing.
    #[cfg(test)]
    pub(crate) fn whole(tokens: &'a [u32]) -> Self {
        Self {
            tokens,
            shareable: 0,
        }
    }

    /// The shareable tokens.
    fn prefix(self) -> &'a [u32] {
        &self.tokens[..self.shareable]
    }

    /// Whether both have the same shareable tokens.
    pub(crate) fn shares_with(self, other: Self) -> bool {
        self.shareable > 0 && self.prefix() == other.prefix()
    }
}

impl Batch {
    /// Packs texts. The shared prefix of neighbours is packed once, before them: the rollouts of a group share their prompt,
    /// which is often longer than the answers.
    ///
    /// Returns the batch and the last row of each text.
    pub(crate) fn packed<'a>(texts: impl IntoIterator<Item = Text<'a>>) -> (Self, Vec<Row>) {
        let texts: Vec<Text<'a>> = texts.into_iter().collect();
        let (mut tokens, mut rows) = (Vec::new(), Vec::<Row>::new());
        let mut ends = Vec::with_capacity(texts.len());
        let mut row = |part: &[u32], position: usize, earlier: usize| {
            let row = Row {
                start: tokens.len(),
                len: part.len(),
                position,
                earlier,
                slot: rows.len(),
            };
            tokens.extend_from_slice(part);
            rows.push(row);
            row
        };
        for neighbours in texts.chunk_by(|one, next| one.shares_with(*next)) {
            let (shared, earlier) = match neighbours {
                [first, _, ..] => (first.shareable, row(first.prefix(), 0, 0).start),
                _ => (0, 0),
            };
            for text in neighbours {
                ends.push(row(&text.tokens[shared..], shared, earlier));
            }
        }
        let rows = rows.into();
        (Self { tokens, rows }, ends)
    }
}

/// Log-probabilities of chosen tokens.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Selected {
    /// Log-probability of each target, in nats.
    pub(crate) logprobs: Vec<f32>,
    /// Entropy of each distribution, in nats; without a gradient.
    pub(crate) entropies: Vec<f32>,
}

/// The operations of a decoder. Kernels made for training record the inputs of the derivative.
///
/// N is the number of packed tokens, H and KV the query and key heads, D the width of a head, V the vocabulary.
pub(crate) trait Kernels {
    /// Activations `[N, width]`.
    type Array: Clone;
    /// Keys and values of one layer.
    type Layer;

    /// Room for `blocks` blocks of [`BLOCK`] positions in every layer.
    fn cache(&self, blocks: usize) -> Result<Paged<Self::Layer>, PolicyError>;

    /// Copies one block to another, in every layer.
    fn copy_block(
        &self,
        cache: &mut Paged<Self::Layer>,
        from: u32,
        to: u32,
    ) -> Result<(), PolicyError>;

    /// Rows `tokens` of `table` `[V, width]`, times the family's scale if it has one: `[N, width]`.
    fn embed(&mut self, table: &Block, tokens: &[u32]) -> Result<Self::Array, PolicyError>;

    /// `y = x / √(mean(x²) + eps) · (offset + w)`, `x` `[N, width]`, `w` `[width]`, `offset` the family's 0 or 1.
    fn norm(&mut self, x: &Self::Array, weight: &Block) -> Result<Self::Array, PolicyError>;

    /// `residual + norm(x)`, `residual` `[N, width]`, which is consumed.
    fn norm_onto(
        &mut self,
        residual: Self::Array,
        x: &Self::Array,
        weight: &Block,
    ) -> Result<Self::Array, PolicyError>;

    /// The norm of every head of q and of k by itself; v is unchanged. `qkv` `[N, (H + 2 KV)·D]`, consumed.
    fn head_norms(
        &mut self,
        qkv: Self::Array,
        norms: &HeadNorms,
    ) -> Result<Self::Array, PolicyError>;

    /// `y = x Wᵀ + b`, `x` `[N, in]`: `[N, out]`.
    fn linear(&mut self, x: &Self::Array, linear: &Linear) -> Result<Self::Array, PolicyError>;

    /// `residual + x Wᵀ`, `residual` `[N, out]`, which is consumed.
    fn linear_onto(
        &mut self,
        residual: Self::Array,
        x: &Self::Array,
        linear: &Linear,
    ) -> Result<Self::Array, PolicyError>;

    /// Rotary embedding of q and k, then causal grouped attention of every row over its text up to each position. With a
    /// cache, new keys and values are written to it.
    ///
    /// * `qkv` — `[N, (H + 2 KV)·D]`, q first, consumed
    /// * `attention` — rotary embedding, window and scaling of the scores
    ///
    /// Returns `[N, H·D]`.
    fn attention(
        &mut self,
        qkv: Self::Array,
        attention: &Attention,
        rows: &Rc<[Row]>,
        cache: Option<&mut Paged<Self::Layer>>,
    ) -> Result<Self::Array, PolicyError>;

    /// `f(g)·u` with the family's activation f, `gate_up` `[N, 2·F]` with g first: `[N, F]`.
    fn gated(&mut self, gate_up: Self::Array) -> Result<Self::Array, PolicyError>;

    /// The rows `positions` of `x`, each at most once and in rising order: `[M, width]`.
    fn gather(
        &mut self,
        x: Self::Array,
        positions: &Rc<[usize]>,
    ) -> Result<Self::Array, PolicyError>;

    /// Logits of the rows `rows` of `hidden`, soft-capped if the configuration has a cap, into `out` `[rows, V]` f32 on the
    /// host.
    fn logits(
        &mut self,
        hidden: &Self::Array,
        head: &Block,
        rows: std::ops::Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), PolicyError>;

    /// Log-probabilities of `targets` `[M]` under `softmax(cap(hidden headᵀ) / temperature)`. The last operation of a training
    /// pass; [`Kernels::backward`] starts from it.
    fn selected(
        &mut self,
        hidden: &Self::Array,
        head: &Block,
        targets: Vec<u32>,
        temperature: f32,
    ) -> Result<Selected, PolicyError>;

    /// Derivative of `Σ coefficients · logprobs` by every parameter; the recorded pass is consumed.
    fn backward(&mut self, coefficients: &[f32]) -> Result<Gradients, PolicyError>;
}

//! What a decoder is made of: the operations, each with its derivative, that a kernel set must provide.
//!
//! An operation takes packed, ragged rows: arrays are `[N, width]`, N being the tokens of all rows one after another, so
//! that no padding is computed. Operations know no model, layer order or sampling. Invariant: every kernel set computes
//! the same function and the same derivative, up to rounding.

use std::rc::Rc;

use serde::{Deserialize, Serialize};

use crate::gradient::Gradients;
use crate::layout::{Attention, Block, HeadNorms, Linear};
use crate::policy::PolicyError;

pub(crate) mod candle;
pub(crate) mod fused;

/// Which implementation of the operations runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelSet {
    /// Own kernels over slices of f32, CPU only: several times faster there.
    #[default]
    Fused,
    /// Composite operations of candle, on any device.
    Candle,
    /// The fused kernels over matrices rounded to eight bits: for machines that read memory slowly or have little of it.
    /// They generate and score, in a numeric class of their own, and do not train.
    Int8,
}

/// One row of a batch: consecutive tokens of one text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    /// First token in the packed batch.
    pub(crate) start: usize,
    /// Tokens of this row in the batch.
    pub(crate) len: usize,
    /// Position of its first token in its text: how many tokens the cache already holds.
    pub(crate) position: usize,
    /// Its place among the tables of the cache; of no meaning without a cache.
    pub(crate) slot: usize,
}

/// Positions of one block of a cache: enough that a vector's worth of keys lies side by side, few enough that the last
/// block of a text, half empty on average, wastes little.
pub(crate) const BLOCK: usize = 32;

/// Keys and values of earlier positions, in blocks, and where the rows of the next pass find theirs.
#[derive(Debug)]
pub(crate) struct Paged<L> {
    pub(crate) layers: Vec<L>,
    /// For each slot, the blocks of its text in order: position p lies in block `p / BLOCK` at `p % BLOCK`.
    pub(crate) tables: Vec<Vec<u32>>,
}

/// Packed tokens and where each row lies in them.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) rows: Rc<[Row]>,
}

impl Batch {
    /// Packs whole texts, each from its first position.
    pub(crate) fn packed<'a>(texts: impl Iterator<Item = &'a [u32]>) -> Self {
        let (mut tokens, mut rows) = (Vec::new(), Vec::new());
        for (slot, text) in texts.enumerate() {
            rows.push(Row {
                start: tokens.len(),
                len: text.len(),
                position: 0,
                slot,
            });
            tokens.extend_from_slice(text);
        }
        Self {
            tokens,
            rows: rows.into(),
        }
    }
}

/// What the head says of chosen tokens.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Selected {
    /// Log-probability of each target, in nats.
    pub(crate) logprobs: Vec<f32>,
    /// Entropy of each distribution, in nats; it carries no gradient.
    pub(crate) entropies: Vec<f32>,
}

/// The operations of a decoder. An implementation records what the derivative needs if it was made for training.
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

    /// Rows `tokens` of `table` `[V, width]`, multiplied with the family's scale if it has one: `[N, width]`.
    fn embed(&mut self, table: &Block, tokens: &[u32]) -> Result<Self::Array, PolicyError>;

    /// `y = x / √(mean(x²) + eps) · (offset + w)`, `x` `[N, width]`, `w` `[width]`, `offset` the family's 0 or 1.
    fn norm(&mut self, x: &Self::Array, weight: &Block) -> Result<Self::Array, PolicyError>;

    /// `residual + norm(x)`, `residual` `[N, width]`, which is used up.
    fn norm_onto(
        &mut self,
        residual: Self::Array,
        x: &Self::Array,
        weight: &Block,
    ) -> Result<Self::Array, PolicyError>;

    /// The norm of every head of q and of k by itself; v stays. `qkv` `[N, (H + 2 KV)·D]`, used up.
    fn head_norms(
        &mut self,
        qkv: Self::Array,
        norms: &HeadNorms,
    ) -> Result<Self::Array, PolicyError>;

    /// `y = x Wᵀ + b`, `x` `[N, in]`: `[N, out]`.
    fn linear(&mut self, x: &Self::Array, linear: &Linear) -> Result<Self::Array, PolicyError>;

    /// `residual + x Wᵀ`, `residual` `[N, out]`, which is used up.
    fn linear_onto(
        &mut self,
        residual: Self::Array,
        x: &Self::Array,
        linear: &Linear,
    ) -> Result<Self::Array, PolicyError>;

    /// Rotary embedding of q and k, then causal grouped attention of every row over its own positions and, with a
    /// cache, over those before them; new keys and values are added to the cache.
    ///
    /// * `qkv` — `[N, (H + 2 KV)·D]`, q first, used up
    /// * `attention` — which rotary embedding, how far a query sees, and what is made of the scores before the softmax
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

    /// Logits, soft-capped where the configuration says so, of the rows `first..first + count` of `hidden`, into `out` `[count, V]` f32 on the host.
    fn logits(
        &mut self,
        hidden: &Self::Array,
        head: &Block,
        rows: std::ops::Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), PolicyError>;

    /// Log-probability of `targets` `[M]` under `softmax(cap(hidden headᵀ) / temperature)`. The last operation of a training
    /// pass: [`Kernels::backward`] starts from it.
    fn selected(
        &mut self,
        hidden: &Self::Array,
        head: &Block,
        targets: Vec<u32>,
        temperature: f32,
    ) -> Result<Selected, PolicyError>;

    /// Derivative of `Σ coefficients · logprobs` by every parameter; the recorded pass is used up.
    fn backward(&mut self, coefficients: &[f32]) -> Result<Gradients, PolicyError>;
}

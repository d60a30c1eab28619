//! A model as the fused kernels take it: weights as they were published, and as each use of them wants them, made when it
//! first asks.
//!
//! Invariant: inference makes panels only and training a flat f32 vector only, so that neither pays for the other's memory.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use super::attention::Heads;
use super::elementwise::NormConstants;
use super::matmul::{Matrix, Onto};
use super::panels::{Kept, Panels, StoredRows};
use super::rotary::Rotary;
use super::team::Threads;
use crate::config::{Config, Family};
use crate::layout::{Block, Layout};
use crate::weights::{Image, Storage};

/// Bytes of a whole model in f32 up to which weights stored in bf16 are widened for inference: in the cache of a processor
/// they cost nothing to read, and only the widening counts.
const CACHED_BYTES_MAX: usize = 16 << 20;

/// A model's weights and the threads that inference shares its products among.
#[derive(Debug)]
pub(crate) struct FusedWeights {
    model: Arc<Model>,
    pub(super) threads: Threads,
}

/// Everything that does not change from pass to pass.
#[derive(Debug)]
pub(crate) struct Model {
    pub(super) layout: Arc<Layout>,
    /// Every parameter as it was published.
    image: Image,
    int8: bool,
    /// For training, whose batch is dealt to several threads already.
    pub(super) alone: Threads,
    /// Norms and biases in f32, one for each block, empty for matrices.
    vectors: Vec<Vec<f32>>,
    /// Every parameter in f32, in the order of the table; made for the first training pass, and never by inference.
    values: OnceLock<Vec<f32>>,
    /// One for each block, made when inference first multiplies with it, and never by training.
    panels: Vec<OnceLock<Panels>>,
    pub(super) heads: Heads,
    /// One for each of the configuration's rotary embeddings.
    pub(super) ropes: Vec<Rotary>,
    pub(super) family: &'static Family,
    pub(super) norms: NormConstants,
    /// Multiplies embeddings, in families that do.
    pub(super) embedding_scale: Option<f32>,
    /// Bends logits l to `cap·tanh(l/cap)`.
    pub(super) logit_cap: Option<f32>,
}

impl FusedWeights {
    /// `image` must fit `layout`; inference rounds its matrices to eight bits if `int8`.
    pub(crate) fn new(config: &Config, layout: Arc<Layout>, image: Image, int8: bool) -> Self {
        let heads = Heads {
            query: config.num_attention_heads,
            key: config.num_key_value_heads,
            dim: config.head_dim(),
        };
        let positions = config.max_position_embeddings;
        let ropes = config.ropes().into_iter();
        let ropes = ropes.map(|rope| Rotary::new(rope, heads.dim, positions));
        let family = config.architecture.family();
        let panels = layout.blocks().iter().map(|_| OnceLock::new()).collect();
        let mut model = Model {
            layout,
            image,
            int8,
            alone: Threads::one(),
            vectors: Vec::new(),
            values: OnceLock::new(),
            panels,
            heads,
            ropes: ropes.collect(),
            family,
            norms: NormConstants {
                eps: config.rms_norm_eps as f32,
                offset: family.norm_offset,
            },
            embedding_scale: config.embedding_scale().map(|scale| scale as f32),
            logit_cap: config.final_logit_softcapping.map(|cap| cap as f32),
        };
        let blocks = model.layout.blocks().iter();
        model.vectors = blocks.map(|block| model.vector(block)).collect();
        Self {
            model: Arc::new(model),
            threads: Threads::one(),
        }
    }

    /// The same weights with other threads.
    pub(crate) fn with_threads(&self, threads: &Threads) -> Self {
        Self {
            model: Arc::clone(&self.model),
            threads: threads.clone(),
        }
    }

    /// `out = x Wᵀ` or `out += x Wᵀ`, `x` `[N, in]`, as inference computes it.
    pub(super) fn product(&self, out: &mut [f32], x: &[f32], block: &Block, onto: Onto) {
        let panels = self.panels[block.index].get_or_init(|| {
            let parts = self.stored(block);
            Panels::new(&parts, block.columns, self.kept(block), &self.threads)
        });
        panels.multiply(out, x, onto, &self.threads);
    }
}

impl Deref for FusedWeights {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

impl Model {
    /// A block in f32.
    pub(super) fn block(&self, block: &Block) -> &[f32] {
        match &self.vectors[block.index][..] {
            [] => &self.values.get_or_init(|| self.image.values())[block.range()],
            vector => vector,
        }
    }

    /// A block of several rows as the matrix it is, `[out, in]`.
    pub(super) fn matrix(&self, block: &Block) -> Matrix<'_> {
        Matrix::new(self.block(block), block.rows, block.columns)
    }

    /// How inference keeps a matrix: as it was published, or widened where that is faster, or rounded where that was asked.
    fn kept(&self, block: &Block) -> Kept {
        let entries = &self.image.tensors()[block.parameters.clone()];
        let narrow = entries.iter().all(|entry| entry.storage == Storage::Bf16);
        if self.int8 {
            Kept::Int8
        } else if narrow && self.layout.len() * size_of::<f32>() > CACHED_BYTES_MAX {
            Kept::Bf16
        } else {
            Kept::F32
        }
    }

    /// Bytes of all matrices that inference reads for a token, beside the row of the embedding.
    pub(crate) fn bytes_read(&self) -> usize {
        let blocks = self.layout.multiplied();
        let bytes = blocks.map(|block| self.kept(block).bytes(block.rows, block.columns));
        bytes.sum()
    }

    /// The parameters of a block as they were published.
    pub(super) fn stored(&self, block: &Block) -> Vec<StoredRows<'_>> {
        let entries = &self.image.tensors()[block.parameters.clone()];
        let stored = entries.iter().map(|entry| StoredRows {
            bytes: &self.image.bytes()[entry.bytes.clone()],
            storage: entry.storage,
        });
        stored.collect()
    }

    /// A block of one row in f32, nothing of a matrix.
    fn vector(&self, block: &Block) -> Vec<f32> {
        if block.rows > 1 {
            return Vec::new();
        }
        let mut vector = Vec::with_capacity(block.columns);
        for (stored, parameter) in self.stored(block).iter().zip(block.parameters.clone()) {
            let mut part = vec![0.0; self.layout.parameters()[parameter].len()];
            stored.copy_row(0, &mut part);
            vector.extend(part);
        }
        vector
    }
}

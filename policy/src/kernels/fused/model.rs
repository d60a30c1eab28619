//! A model for the fused kernels: the published weights, and the forms that inference and training compute with, each made
//! at its first use.
//!
//! Invariant: inference makes panels only and training a flat f32 vector only, so neither pays for the other's memory. A
//! model made for inference alone holds every weight once.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use super::elementwise::NormConstants;
use super::heads::Heads;
use super::panels::{Kept, Panels};
use super::rotary::Rotary;
use crate::config::{Config, Family};
use crate::kernels::matmul::{Matrix, Onto};
use crate::kernels::threads::Threads;
use crate::layout::{Block, Layout};
use crate::weights::{Format, Image, StoredTensor};

/// Models up to this many bytes in f32 widen their bf16 weights for inference: reading from cache is cheap, so widening would
/// dominate.
const CACHED_BYTES_MAX: usize = 16 << 20;

/// A model's weights and the threads that inference shares its products among.
#[derive(Debug)]
pub(crate) struct FusedWeights {
    model: Arc<Model>,
    pub(super) threads: Threads,
}

/// The parts that passes share.
#[derive(Debug)]
pub(crate) struct Model {
    pub(super) layout: Arc<Layout>,
    /// The published parameters, from which panels and values are made; none for inference alone, whose panels are made at
    /// once.
    image: Option<Image>,
    /// The published embedding, if neither the image nor panels hold it.
    embedding: Vec<u8>,
    /// Published format of each parameter, in the order of the table.
    formats: Vec<Format>,
    int8: bool,
    /// A single thread, for training, whose batch is dealt to several threads before.
    pub(super) alone: Threads,
    /// Norms and biases in f32, one for each block, empty for matrices.
    vectors: Vec<Vec<f32>>,
    /// Every parameter in f32, in the order of the table; made by the first training pass.
    values: OnceLock<Vec<f32>>,
    /// One for each matrix that is multiplied, made at its first use by inference.
    panels: Vec<OnceLock<Panels>>,
    pub(super) heads: Heads,
    /// The rotary embeddings of the configuration, in its order.
    pub(super) ropes: Vec<Rotary>,
    pub(super) family: &'static Family,
    pub(super) norms: NormConstants,
    /// Factor of embeddings, in families that have one.
    pub(super) embedding_scale: Option<f32>,
    /// Cap of logits l: `cap·tanh(l/cap)`.
    pub(super) logit_cap: Option<f32>,
}

impl FusedWeights {
    /// For training and inference. `image` must fit `layout`; inference rounds its matrices to eight bits if `int8`.
    pub(crate) fn new(config: &Config, layout: Arc<Layout>, image: Image, int8: bool) -> Self {
        let mut model = Model::new(config, layout, &image.stored(), int8);
        model.image = Some(image);
        Self {
            model: Arc::new(model),
            threads: Threads::one(),
        }
    }

    /// For inference alone: every weight is kept once, in panels.
    ///
    /// * `tensors` — one for each parameter, of its size
    /// * `after_each` — called after each matrix, whose bytes are not read again
    pub(crate) fn for_inference(
        config: &Config,
        layout: Arc<Layout>,
        tensors: &[StoredTensor<'_>],
        int8: bool,
        (threads, after_each): (&Threads, &dyn Fn()),
    ) -> Self {
        let mut model = Model::new(config, layout, tensors, int8);
        let blocks = Arc::clone(&model.layout);
        for block in blocks.multiplied() {
            let parts = &tensors[block.parameters.clone()];
            let panels = Panels::new(parts, block.columns, model.kept(block), threads);
            model.panels[block.index] = panels.into();
            after_each();
        }
        if blocks.embedding != blocks.head {
            let stored = &tensors[blocks.embedding.parameters.clone()];
            model.embedding = stored.iter().flat_map(|part| part.bytes).copied().collect();
        }
        Self {
            model: Arc::new(model),
            threads: threads.clone(),
        }
    }

    /// The same weights with other threads.
    #[cfg(test)]
    pub(crate) fn with_threads(&self, threads: &Threads) -> Self {
        Self {
            model: Arc::clone(&self.model),
            threads: threads.clone(),
        }
    }

    /// Whether a training pass can run on these weights.
    pub(crate) fn trains(&self) -> bool {
        self.image.is_some() && !self.int8
    }

    fn panels(&self, block: &Block) -> &Panels {
        self.panels[block.index].get_or_init(|| {
            let parts = self.stored(block);
            Panels::new(&parts, block.columns, self.kept(block), &self.threads)
        })
    }

    /// `out = x Wᵀ` or `out += x Wᵀ`, `x` `[N, in]`, by panels.
    pub(super) fn product(&self, out: &mut [f32], x: &[f32], block: &Block, onto: Onto) {
        self.panels(block).multiply(out, x, onto, &self.threads);
    }

    /// Rows `tokens` of the embedding into `y` `[N, width]`. They come from the panels if the head is tied and no unrounded
    /// image holds it.
    pub(super) fn embed(&self, y: &mut [f32], tokens: &[u32]) {
        let (table, head) = (&self.layout.embedding, &self.layout.head);
        let rows = y.chunks_exact_mut(table.columns).zip(tokens);
        if table == head && (self.int8 || self.image.is_none()) {
            let panels = self.panels(table);
            return rows.for_each(|(y, &token)| panels.copy_row(token as usize, y));
        }
        let parts = self.stored(table);
        let stored = parts.first().copied().unwrap_or(StoredTensor {
            format: self.formats[table.parameters.start],
            bytes: &self.embedding,
        });
        rows.for_each(|(y, &token)| stored.copy_row(token as usize, y));
    }
}

impl Deref for FusedWeights {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

impl Model {
    fn new(config: &Config, layout: Arc<Layout>, tensors: &[StoredTensor<'_>], int8: bool) -> Self {
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
        let vectors = layout.blocks().iter();
        let vectors = vectors.map(|block| vector(block, &layout, tensors));
        Self {
            vectors: vectors.collect(),
            layout,
            image: None,
            embedding: Vec::new(),
            formats: tensors.iter().map(|tensor| tensor.format).collect(),
            int8,
            alone: Threads::one(),
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
        }
    }

    /// A block in f32.
    pub(super) fn block(&self, block: &Block) -> &[f32] {
        match &self.vectors[block.index][..] {
            [] => &self.values()[block.range()],
            vector => vector,
        }
    }

    /// Every parameter in f32; empty without an image, which every training pass has.
    fn values(&self) -> &[f32] {
        let values = || self.image.as_ref().map(Image::values);
        self.values.get_or_init(|| values().unwrap_or_default())
    }

    /// A block of several rows as a matrix `[out, in]`.
    pub(super) fn matrix(&self, block: &Block) -> Matrix<'_> {
        Matrix::new(self.block(block), block.rows, block.columns)
    }

    /// Form in which inference keeps a matrix: as published, widened if that is faster, or rounded for `int8`.
    fn kept(&self, block: &Block) -> Kept {
        let formats = &self.formats[block.parameters.clone()];
        let narrow = formats.iter().all(|format| *format == Format::Bf16);
        if self.int8 {
            Kept::Int8
        } else if narrow && !self.is_cached() {
            Kept::Bf16
        } else {
            Kept::F32
        }
    }

    /// Whether all weights fit into a processor's cache.
    pub(crate) fn is_cached(&self) -> bool {
        self.layout.len() * size_of::<f32>() <= CACHED_BYTES_MAX
    }

    /// Bytes of all matrices that inference reads for a token, without the row of the embedding.
    pub(crate) fn bytes_read(&self) -> usize {
        let blocks = self.layout.multiplied();
        let bytes = blocks.map(|block| self.kept(block).bytes(block.rows, block.columns));
        bytes.sum()
    }

    /// The published parameters of a block; empty without an image.
    fn stored(&self, block: &Block) -> Vec<StoredTensor<'_>> {
        let Some(image) = &self.image else {
            return Vec::new();
        };
        let entries = &image.tensors()[block.parameters.clone()];
        let stored = entries.iter().map(|entry| StoredTensor {
            bytes: &image.bytes()[entry.bytes.clone()],
            format: entry.storage.into(),
        });
        stored.collect()
    }
}

/// A block of one row in f32; empty for a matrix.
fn vector(block: &Block, layout: &Layout, tensors: &[StoredTensor<'_>]) -> Vec<f32> {
    if block.rows > 1 {
        return Vec::new();
    }
    let mut vector = Vec::with_capacity(block.columns);
    for parameter in block.parameters.clone() {
        let mut part = vec![0.0; layout.parameters()[parameter].len()];
        tensors[parameter].copy_row(0, &mut part);
        vector.extend(part);
    }
    vector
}

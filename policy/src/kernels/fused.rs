//! The `fused` kernel set: own loops and own derivatives over slices of f32, one thread, CPU.
//!
//! A pass made for training keeps a tape of what each derivative needs; one made for inference keeps nothing, and arrays
//! return to a pool as soon as they are used. Derivatives flow into one flat vector in the order of the parameter
//! table. Invariant: the same calls give the same bits on one machine, whatever else runs beside them.

use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use crate::config::{Config, Family};
use crate::gradient::Gradients;
use crate::kernels::{Kernels, Row, Selected};
use crate::layout::{Attention, Block, HeadNorms, Layout, Linear};
use crate::policy::PolicyError;

use attention::{CacheLayer, Heads, Turn};
use buffer::{Buffer, Pool};
use elementwise::NormConstants;
use head::Shaping;
use matmul::{Matrix, Onto, Panels, multiply};
use rotary::Rotary;
use tape::{Record, Tape};

mod attention;
mod buffer;
mod elementwise;
mod head;
mod matmul;
mod rotary;
mod tape;
pub(crate) mod vector;

/// Everything that does not change from pass to pass.
#[derive(Debug)]
pub(crate) struct FusedWeights {
    layout: Arc<Layout>,
    /// Every parameter, in the order of the table.
    values: Vec<f32>,
    heads: Heads,
    /// One for each of the configuration's rotary embeddings.
    ropes: Vec<Rotary>,
    family: &'static Family,
    norms: NormConstants,
    /// Multiplies embeddings, in families that do.
    embedding_scale: Option<f32>,
    /// Bends logits l to `cap·tanh(l/cap)`.
    logit_cap: Option<f32>,
    /// One for each block, made when a few rows are first multiplied with it; the large batches of a learner never ask.
    panels: Vec<OnceLock<Panels>>,
}

/// Up to this many rows are multiplied with panels. Above it, a general product's own copy of the weights is paid for, and
/// it blocks long sums for the cache.
const PANEL_ROWS_MAX: usize = 64;

impl FusedWeights {
    pub(crate) fn new(config: &Config, layout: Arc<Layout>, values: Vec<f32>) -> Self {
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
        Self {
            layout,
            values,
            heads,
            ropes: ropes.collect(),
            family,
            norms: NormConstants {
                eps: config.rms_norm_eps as f32,
                offset: family.norm_offset,
            },
            embedding_scale: config.embedding_scale().map(|scale| scale as f32),
            logit_cap: config.final_logit_softcapping.map(|cap| cap as f32),
            panels,
        }
    }

    fn block(&self, block: &Block) -> &[f32] {
        &self.values[block.range()]
    }

    /// `out = x Wᵀ` or `out += x Wᵀ`, `x` `[N, in]`.
    fn product(&self, out: &mut [f32], x: &[f32], block: &Block, onto: Onto) {
        let rows = x.len() / block.columns;
        if rows > PANEL_ROWS_MAX {
            let x = Matrix::new(x, rows, block.columns);
            return multiply(out, x, self.matrix(block).transposed(), onto);
        }
        let panels = self.panels[block.index]
            .get_or_init(|| Panels::new(self.block(block), block.rows, block.columns));
        panels.multiply(out, x, onto);
    }

    /// A block of several rows as the matrix it is, `[out, in]`.
    fn matrix(&self, block: &Block) -> Matrix<'_> {
        Matrix::new(self.block(block), block.rows, block.columns)
    }
}

/// An activation `[N, width]`.
#[derive(Debug, Clone)]
pub(crate) struct Array {
    /// Names it on the tape.
    id: usize,
    width: usize,
    data: Rc<Buffer>,
}

impl Array {
    fn rows(&self) -> usize {
        self.data.len() / self.width
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.data, self.rows(), self.width)
    }
}

/// Keys and values of every layer.
#[derive(Debug)]
pub(crate) struct Cache {
    layers: Vec<CacheLayer>,
}

/// One pass over the decoder.
#[derive(Debug)]
pub(crate) struct Fused {
    weights: Arc<FusedWeights>,
    tape: Option<Tape>,
    pool: Pool,
    arrays: usize,
}

impl Fused {
    /// Keeps nothing for a derivative.
    pub(crate) fn inference(weights: &Arc<FusedWeights>) -> Self {
        Self {
            weights: Arc::clone(weights),
            tape: None,
            pool: Pool::default(),
            arrays: 0,
        }
    }

    /// Keeps what [`Kernels::backward`] needs.
    pub(crate) fn training(weights: &Arc<FusedWeights>) -> Self {
        Self {
            tape: Some(Tape::default()),
            ..Self::inference(weights)
        }
    }

    fn array(&mut self, width: usize, data: Buffer) -> Array {
        self.arrays += 1;
        Array {
            id: self.arrays,
            width,
            data: Rc::new(data),
        }
    }

    /// The buffer itself if nobody else holds it, else a copy.
    fn owned(&self, data: Rc<Buffer>) -> Buffer {
        Rc::try_unwrap(data).unwrap_or_else(|shared| Buffer::copied(&self.pool, &shared))
    }

    fn norm_into(&self, y: &mut [f32], x: &Array, weight: &Block, onto: Onto) {
        let w = self.weights.block(weight);
        elementwise::norm_forward(y, &x.data, w, self.weights.norms, onto);
    }

    fn record(&mut self, record: impl FnOnce() -> Record) {
        if let Some(tape) = &mut self.tape {
            tape.push(record());
        }
    }
}

impl Kernels for Fused {
    type Array = Array;
    type Cache = Cache;

    fn cache(&self, slots: usize, capacity: usize) -> Result<Cache, PolicyError> {
        let heads = self.weights.heads;
        let layers = self.weights.layout.layers.iter();
        Ok(Cache {
            layers: layers
                .map(|_| CacheLayer::new(heads, slots, capacity))
                .collect(),
        })
    }

    fn copy_prefix(
        &self,
        cache: &mut Cache,
        from: usize,
        to: usize,
        len: usize,
    ) -> Result<(), PolicyError> {
        for layer in &mut cache.layers {
            layer.copy_prefix(self.weights.heads, from, to, len);
        }
        Ok(())
    }

    fn embed(&mut self, table: &Block, tokens: &[u32]) -> Result<Array, PolicyError> {
        let width = table.columns;
        let mut y = Buffer::stale(&self.pool, tokens.len() * width);
        let values = self.weights.block(table);
        for (y, &token) in y.chunks_exact_mut(width).zip(tokens) {
            y.copy_from_slice(&values[token as usize * width..][..width]);
        }
        if let Some(scale) = self.weights.embedding_scale {
            elementwise::scale(&mut y, scale);
        }
        let out = self.array(width, y);
        self.record(|| Record::Embed {
            table: table.clone(),
            tokens: tokens.to_vec(),
            out: out.id,
        });
        Ok(out)
    }

    fn norm(&mut self, x: &Array, weight: &Block) -> Result<Array, PolicyError> {
        let mut y = Buffer::stale(&self.pool, x.data.len());
        self.norm_into(&mut y, x, weight, Onto::Nothing);
        let out = self.array(x.width, y);
        self.record(|| Record::Norm {
            x: x.clone(),
            weight: weight.clone(),
            residual: None,
            out: out.id,
        });
        Ok(out)
    }

    fn norm_onto(
        &mut self,
        residual: Array,
        x: &Array,
        weight: &Block,
    ) -> Result<Array, PolicyError> {
        let mut y = self.owned(residual.data);
        self.norm_into(&mut y, x, weight, Onto::Sum);
        let out = self.array(x.width, y);
        self.record(|| Record::Norm {
            x: x.clone(),
            weight: weight.clone(),
            residual: Some(residual.id),
            out: out.id,
        });
        Ok(out)
    }

    fn head_norms(&mut self, qkv: Array, norms: &HeadNorms) -> Result<Array, PolicyError> {
        // What went in is wanted for the derivative only; otherwise the buffer serves again.
        let kept = self.tape.is_some().then(|| qkv.clone());
        let width = qkv.width;
        let mut y = self.owned(qkv.data);
        for (norm, columns) in self.weights.heads.normed(norms) {
            let w = self.weights.block(norm);
            elementwise::head_norm_forward(&mut y, width, columns, w, self.weights.norms);
        }
        let out = self.array(width, y);
        if let Some(qkv) = kept {
            self.record(|| Record::HeadNorms {
                qkv,
                norms: norms.clone(),
                out: out.id,
            });
        }
        Ok(out)
    }

    fn linear(&mut self, x: &Array, linear: &Linear) -> Result<Array, PolicyError> {
        let mut y = Buffer::stale(&self.pool, x.rows() * linear.weight.rows);
        self.weights
            .product(&mut y, &x.data, &linear.weight, Onto::Nothing);
        if let Some(bias) = &linear.bias {
            elementwise::add_bias(&mut y, self.weights.block(bias));
        }
        let out = self.array(linear.weight.rows, y);
        self.record(|| Record::Linear {
            x: x.clone(),
            linear: linear.clone(),
            residual: None,
            out: out.id,
        });
        Ok(out)
    }

    fn linear_onto(
        &mut self,
        residual: Array,
        x: &Array,
        linear: &Linear,
    ) -> Result<Array, PolicyError> {
        let mut y = self.owned(residual.data);
        self.weights
            .product(&mut y, &x.data, &linear.weight, Onto::Sum);
        if let Some(bias) = &linear.bias {
            elementwise::add_bias(&mut y, self.weights.block(bias));
        }
        let out = self.array(linear.weight.rows, y);
        self.record(|| Record::Linear {
            x: x.clone(),
            linear: linear.clone(),
            residual: Some(residual.id),
            out: out.id,
        });
        Ok(out)
    }

    fn attention(
        &mut self,
        qkv: Array,
        attention: &Attention,
        rows: &Rc<[Row]>,
        cache: Option<&mut Cache>,
    ) -> Result<Array, PolicyError> {
        let heads = self.weights.heads;
        let (input, tokens) = (qkv.id, qkv.rows());
        let mut rotated = self.owned(qkv.data);
        attention::rotate(
            &mut rotated,
            heads,
            rows,
            &self.weights.ropes[attention.rope],
            Turn::Forward,
        );
        let mut y = Buffer::stale(&self.pool, tokens * heads.query * heads.dim);
        let mut log_sums = Buffer::stale(&self.pool, tokens * heads.query);
        let cache = cache.map(|cache| &mut cache.layers[attention.layer]);
        let shape = (heads, attention);
        attention::forward((&mut y, &mut log_sums), &rotated, shape, rows, cache);
        let out = self.array(heads.query * heads.dim, y);
        self.record(|| Record::Attention {
            input,
            rotated,
            log_sums,
            attention: *attention,
            rows: Rc::clone(rows),
            out: out.clone(),
        });
        Ok(out)
    }

    fn gated(&mut self, gate_up: Array) -> Result<Array, PolicyError> {
        let width = gate_up.width / 2;
        let mut y = Buffer::stale(&self.pool, gate_up.data.len() / 2);
        let activation = self.weights.family.activation;
        elementwise::gated_forward(&mut y, &gate_up.data, width, activation);
        let out = self.array(width, y);
        self.record(|| Record::Gated {
            gate_up,
            out: out.id,
        });
        Ok(out)
    }

    fn gather(&mut self, x: Array, positions: &Rc<[usize]>) -> Result<Array, PolicyError> {
        let width = x.width;
        let mut y = Buffer::stale(&self.pool, positions.len() * width);
        for (y, &position) in y.chunks_exact_mut(width).zip(positions.iter()) {
            y.copy_from_slice(&x.data[position * width..][..width]);
        }
        let out = self.array(width, y);
        self.record(|| Record::Gather {
            input: x.id,
            rows: x.rows(),
            width,
            positions: Rc::clone(positions),
            out: out.id,
        });
        Ok(out)
    }

    fn logits(
        &mut self,
        hidden: &Array,
        head: &Block,
        rows: std::ops::Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), PolicyError> {
        let x = &hidden.data[rows.start * hidden.width..rows.end * hidden.width];
        out.resize(rows.len() * head.rows, 0.0);
        self.weights.product(out, x, head, Onto::Nothing);
        if let Some(cap) = self.weights.logit_cap {
            elementwise::soft_cap(out, cap);
        }
        Ok(())
    }

    fn selected(
        &mut self,
        hidden: &Array,
        head: &Block,
        targets: Vec<u32>,
        temperature: f32,
    ) -> Result<Selected, PolicyError> {
        let shaping = Shaping {
            cap: self.weights.logit_cap,
            temperature,
        };
        let w = self.weights.block(head);
        let selected = head::forward(&hidden.data, w, &targets, shaping);
        self.record(|| Record::Head {
            hidden: hidden.clone(),
            head: head.clone(),
            targets,
            shaping,
        });
        Ok(selected)
    }

    fn backward(&mut self, coefficients: &[f32]) -> Result<Gradients, PolicyError> {
        let tape = self.tape.take().unwrap_or_default();
        Ok(tape.backward(&self.weights, &self.pool, coefficients))
    }
}

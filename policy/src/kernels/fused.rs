//! The `fused` kernel set: own loops and own derivatives over slices of f32, CPU.
//!
//! A training pass records the inputs of each derivative on a tape; an inference pass records nothing, and its arrays return
//! to a pool after their last use. Derivatives go into one flat vector in the order of the parameter table. Invariant: the
//! same calls give the same bits on one machine, on any number of threads.

use std::rc::Rc;
use std::sync::Arc;

use crate::error::PolicyError;
use crate::kernels::gradients::Gradients;
use crate::kernels::matmul::{Matrix, Onto, multiply};
use crate::kernels::threads::Threads;
use crate::kernels::{Kernels, Paged, Row, Selected};
use crate::layout::{Attention, Block, HeadNorms, Linear};

pub(crate) use array::Array;
use attention::Turn;
use buffer::Buffer;
pub(crate) use buffer::Pool;
pub(crate) use cache::CacheLayer;
use head::Shaping;
use tape::{Record, Tape};

pub(crate) use model::FusedWeights;

mod array;
mod attention;
mod buffer;
mod cache;
mod elementwise;
mod head;
mod heads;
mod memory;
mod model;
mod panels;
mod rotary;
mod tape;

/// Fewest elements of a norm worth handing to another thread: some microseconds.
const ELEMENTS: usize = 1 << 14;

/// The same for an activation with its exponential.
const EXPONENTIALS: usize = 1 << 12;

/// Rows of `width` that hold `elements` elements, at least one.
fn rows_of(width: usize, elements: usize) -> usize {
    (elements / width.max(1)).max(1)
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
    /// A pass without a derivative.
    pub(crate) fn inference(weights: &Arc<FusedWeights>) -> Self {
        Self {
            weights: Arc::clone(weights),
            tape: None,
            pool: Pool::default(),
            arrays: 0,
        }
    }

    /// A pass without a derivative, whose arrays come from a pool that outlives it.
    pub(crate) fn inference_with(weights: &Arc<FusedWeights>, pool: &Pool) -> Self {
        Self {
            pool: Rc::clone(pool),
            ..Self::inference(weights)
        }
    }

    /// A pass that [`Kernels::backward`] can follow.
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

    /// The buffer itself if it has no other holder, else a copy.
    fn owned(&self, data: Rc<Buffer>) -> Buffer {
        Rc::try_unwrap(data).unwrap_or_else(|shared| Buffer::copied(&self.pool, &shared))
    }

    /// Inference shares its work among threads; a training batch is dealt to threads before.
    fn threads(&self) -> &Threads {
        match self.tape {
            None => &self.weights.threads,
            Some(_) => &self.weights.alone,
        }
    }

    fn norm_into(&self, y: &mut [f32], x: &Array, weight: &Block, onto: Onto) {
        let (w, norms) = (self.weights.block(weight), self.weights.norms);
        let (width, x) = (x.width, &x.data[..]);
        let rows = rows_of(width, ELEMENTS);
        self.threads().share_rows(y, width, rows, |first, y| {
            let x = &x[first * width..][..y.len()];
            elementwise::norm_forward(y, x, w, norms, onto);
        });
    }

    /// `out = x Wᵀ` or `out += x Wᵀ`. Training reads W from the flat vector, as its derivative does, on one thread, since its
    /// batch is dealt to several before.
    fn product(&self, out: &mut [f32], x: &[f32], block: &Block, onto: Onto) {
        if self.tape.is_none() {
            return self.weights.product(out, x, block, onto);
        }
        let x = Matrix::new(x, x.len() / block.columns, block.columns);
        multiply(out, x, self.weights.matrix(block).transposed(), onto);
    }

    fn record(&mut self, record: impl FnOnce() -> Record) {
        if let Some(tape) = &mut self.tape {
            tape.push(record());
        }
    }
}

impl Kernels for Fused {
    type Array = Array;
    type Layer = CacheLayer;

    fn cache(&self, blocks: usize) -> Result<Paged<CacheLayer>, PolicyError> {
        let heads = self.weights.heads;
        let layers = self.weights.layout.layers.iter();
        Ok(Paged {
            layers: layers.map(|_| CacheLayer::new(heads, blocks)).collect(),
            tables: Vec::new(),
        })
    }

    fn copy_block(
        &self,
        cache: &mut Paged<CacheLayer>,
        from: u32,
        to: u32,
    ) -> Result<(), PolicyError> {
        for layer in &mut cache.layers {
            layer.copy_block(from, to);
        }
        Ok(())
    }

    fn embed(&mut self, table: &Block, tokens: &[u32]) -> Result<Array, PolicyError> {
        let width = table.columns;
        let mut y = Buffer::stale(&self.pool, tokens.len() * width);
        self.weights.embed(&mut y, tokens);
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
        // Only the derivative needs the input; without it the buffer is reused.
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
        self.product(&mut y, &x.data, &linear.weight, Onto::Nothing);
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
        self.product(&mut y, &x.data, &linear.weight, Onto::Sum);
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
        cache: Option<&mut Paged<CacheLayer>>,
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
        let cache = cache.map(|cache| {
            let layer = &mut cache.layers[attention.layer];
            (layer, cache.tables.as_slice())
        });
        let shape = (heads, attention);
        let threads = self.threads();
        attention::forward(
            (&mut y, &mut log_sums),
            &rotated,
            shape,
            rows,
            cache,
            threads,
        );
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
        let (input, rows) = (&gate_up.data[..], rows_of(width, EXPONENTIALS));
        self.threads().share_rows(&mut y, width, rows, |first, y| {
            let input = &input[2 * first * width..][..2 * y.len()];
            elementwise::gated_forward(y, input, width, activation);
        });
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
        self.product(out, x, head, Onto::Nothing);
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

//! The `candle` kernel set: composite, differentiable operations of candle, on any device and in any of its float types.
//!
//! Uses only operations that candle differentiates. Its fused norm, softmax and rotary embedding end the graph without an
//! error: a model built from them appears to train, but only its embedding changes. Ragged rows are padded for attention
//! only.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor, Var};

use crate::config::{Activation, Config, Rope};
use crate::error::PolicyError;
use crate::kernels::gradients::Gradients;
use crate::kernels::{BLOCK, Kernels, Paged, Row, Selected};
use crate::layout::{Attention, Block, HeadNorms, Layout, Linear};

/// Parameters on a device, one variable per block.
#[derive(Debug)]
pub(crate) struct CandleWeights {
    config: Config,
    layout: Arc<Layout>,
    device: Device,
    dtype: DType,
    blocks: Vec<Var>,
    ropes: Vec<Rotary>,
}

/// A rotary embedding.
#[derive(Debug)]
struct Rotary {
    /// `[1, D/2]` f32, radians per position.
    frequencies: Tensor,
    /// Multiplies cosines and sines.
    factor: f64,
}

impl CandleWeights {
    /// * `values` — every parameter, flat, in the order of the table
    /// * `dtype` — type of all computations: f32, or f64 for finite differences
    pub(crate) fn new(
        config: &Config,
        layout: Arc<Layout>,
        values: &[f32],
        device: &Device,
        dtype: DType,
    ) -> Result<Self, PolicyError> {
        let mut blocks = Vec::with_capacity(layout.blocks().len());
        for block in layout.blocks() {
            let shape = (block.rows, block.columns);
            let tensor = Tensor::from_slice(&values[block.range()], shape, device)?;
            let tensor = if block.rows == 1 {
                tensor.squeeze(0)?
            } else {
                tensor
            };
            blocks.push(Var::from_tensor(&tensor.to_dtype(dtype)?)?);
        }
        let rotary = |rope: &Rope| -> Result<Rotary, PolicyError> {
            let frequencies = rope.frequencies(config.head_dim());
            let shape = (1, frequencies.len());
            Ok(Rotary {
                frequencies: Tensor::from_vec(frequencies, shape, device)?,
                factor: f64::from(rope.attention_factor()),
            })
        };
        let ropes: Result<Vec<_>, _> = config.ropes().into_iter().map(rotary).collect();
        Ok(Self {
            config: config.clone(),
            layout,
            device: device.clone(),
            dtype,
            blocks,
            ropes: ropes?,
        })
    }

    #[cfg(test)]
    pub(crate) fn variable(&self, block: usize) -> &Var {
        &self.blocks[block]
    }
}

/// Keys and values of one layer, each `[blocks·BLOCK, KV·D]`.
pub(crate) type CacheLayer = (Tensor, Tensor);

/// Row of the cache that holds a position of a text.
fn cached_at(table: &[u32], position: usize) -> usize {
    table[position / BLOCK] as usize * BLOCK + position % BLOCK
}

/// One pass over the decoder.
#[derive(Debug)]
pub(crate) struct Candle {
    weights: Arc<CandleWeights>,
    training: bool,
    /// Output of the head, from which the derivative starts.
    pub(crate) logprobs: Option<Tensor>,
}

impl Candle {
    /// Keeps no graph.
    pub(crate) fn inference(weights: &Arc<CandleWeights>) -> Self {
        Self {
            weights: Arc::clone(weights),
            training: false,
            logprobs: None,
        }
    }

    /// Keeps the graph that [`Kernels::backward`] walks.
    pub(crate) fn training(weights: &Arc<CandleWeights>) -> Self {
        Self {
            training: true,
            ..Self::inference(weights)
        }
    }

    fn block(&self, block: &Block) -> Tensor {
        let tensor = self.weights.blocks[block.index].as_tensor();
        // Inference detaches; otherwise the cache would keep the graphs of all earlier steps.
        if self.training {
            tensor.clone()
        } else {
            tensor.detach()
        }
    }

    fn indices(&self, indices: impl Iterator<Item = usize>) -> Result<Tensor, PolicyError> {
        let indices: Vec<u32> = indices.map(|index| index as u32).collect();
        let len = indices.len();
        Ok(Tensor::from_vec(indices, len, &self.weights.device)?)
    }

    /// Cosines and sines of the position of every token of `rows`, each `[N, 1, D/2]`.
    ///
    /// Angles are computed in f32 for every `dtype`, since checkpoints were trained with these roundings.
    fn angles(&self, rows: &[Row], rope: usize) -> Result<(Tensor, Tensor), PolicyError> {
        let rotary = &self.weights.ropes[rope];
        let positions: Vec<f32> = rows
            .iter()
            .flat_map(|row| (row.position..row.position + row.len).map(|p| p as f32))
            .collect();
        let shape = (positions.len(), 1);
        let positions = Tensor::from_vec(positions, shape, &self.weights.device)?;
        let angles = positions.broadcast_mul(&rotary.frequencies)?.unsqueeze(1)?;
        let typed = |table: Tensor| (table * rotary.factor)?.to_dtype(self.weights.dtype);
        Ok((typed(angles.cos()?)?, typed(angles.sin()?)?))
    }

    /// `x / √(mean(x²) + eps) · (offset + w)` over the last dimension.
    fn normed(&self, x: &Tensor, weight: &Block) -> Result<Tensor, PolicyError> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let root = (mean + self.weights.config.rms_norm_eps)?.sqrt()?;
        let offset = self.weights.config.architecture.family().norm_offset;
        let weight = (self.block(weight) + f64::from(offset))?;
        Ok(x.broadcast_div(&root)?.broadcast_mul(&weight)?)
    }

    /// `cap·tanh(x/cap)`, or x without a cap.
    fn capped(x: Tensor, cap: Option<f64>) -> Result<Tensor, PolicyError> {
        match cap {
            None => Ok(x),
            Some(cap) => Ok(((x / cap)?.tanh()? * cap)?),
        }
    }

    /// Rotates `[N, heads, D]` by `cos`, `sin` `[N, 1, D/2]`.
    fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, PolicyError> {
        let half = x.dim(2)? / 2;
        let (left, right) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let turned_left = (left.broadcast_mul(cos)? - right.broadcast_mul(sin)?)?;
        let turned_right = (right.broadcast_mul(cos)? + left.broadcast_mul(sin)?)?;
        Ok(Tensor::cat(&[turned_left, turned_right], 2)?)
    }
}

/// Indices that pad ragged rows to a rectangle and back: B rows, T tokens of the longest row, L positions of the longest text.
struct Padding {
    rows: usize,
    queries: usize,
    keys: usize,
    /// `[B·T]` into the packed tokens.
    query_index: Tensor,
    /// `[B·L]` into the packed tokens, or into the cache.
    key_index: Tensor,
    /// `[N]` into the padded queries.
    back_index: Tensor,
    /// `[B, 1, 1, T, L]`, 0 where a query sees a key and −∞ elsewhere.
    mask: Tensor,
}

impl Padding {
    fn new(
        kernels: &Candle,
        rows: &[Row],
        attention: &Attention,
        tables: Option<&[Vec<u32>]>,
    ) -> Result<Self, PolicyError> {
        let queries = rows.iter().map(|row| row.len).max().unwrap_or(0);
        let keys = rows
            .iter()
            .map(|row| row.position + row.len)
            .max()
            .unwrap_or(0);
        // Padding repeats a row's first token; its results are masked or not gathered.
        let query_index = rows
            .iter()
            .flat_map(|row| (0..queries).map(|i| row.start + if i < row.len { i } else { 0 }));
        let key_index = rows.iter().flat_map(|row| {
            (0..keys).map(move |i| {
                let i = if i < row.position + row.len { i } else { 0 };
                match tables {
                    None => row.place(i),
                    Some(tables) => cached_at(&tables[row.slot], i),
                }
            })
        });
        let back_index = rows
            .iter()
            .enumerate()
            .flat_map(|(b, row)| (0..row.len).map(move |i| b * queries + i));
        let mask: Vec<f32> = rows
            .iter()
            .flat_map(|row| {
                (0..queries).flat_map(move |i| {
                    let last = row.position + i.min(row.len - 1);
                    let visible = attention.first_visible(last)..=last;
                    let weight = |seen| if seen { 0.0 } else { f32::NEG_INFINITY };
                    (0..keys).map(move |j| weight(visible.contains(&j)))
                })
            })
            .collect();
        let shape = (rows.len(), 1, 1, queries, keys);
        let mask = Tensor::from_vec(mask, shape, &kernels.weights.device)?;
        Ok(Self {
            rows: rows.len(),
            queries,
            keys,
            query_index: kernels.indices(query_index)?,
            key_index: kernels.indices(key_index)?,
            back_index: kernels.indices(back_index)?,
            mask: mask.to_dtype(kernels.weights.dtype)?,
        })
    }
}

impl Kernels for Candle {
    type Array = Tensor;
    type Layer = CacheLayer;

    fn cache(&self, blocks: usize) -> Result<Paged<CacheLayer>, PolicyError> {
        let shape = (blocks * BLOCK, self.weights.config.kv_width());
        let zeros = || Tensor::zeros(shape, self.weights.dtype, &self.weights.device);
        let layers = self.weights.layout.layers.iter();
        let layers: Result<_, candle_core::Error> =
            layers.map(|_| Ok((zeros()?, zeros()?))).collect();
        Ok(Paged {
            layers: layers?,
            tables: Vec::new(),
        })
    }

    fn copy_block(
        &self,
        cache: &mut Paged<CacheLayer>,
        from: u32,
        to: u32,
    ) -> Result<(), PolicyError> {
        for (keys, values) in &cache.layers {
            for tensor in [keys, values] {
                let block = tensor.narrow(0, from as usize * BLOCK, BLOCK)?.copy()?;
                tensor.slice_set(&block, 0, to as usize * BLOCK)?;
            }
        }
        Ok(())
    }

    fn embed(&mut self, table: &Block, tokens: &[u32]) -> Result<Tensor, PolicyError> {
        let tokens = Tensor::from_slice(tokens, tokens.len(), &self.weights.device)?;
        let rows = self.block(table).index_select(&tokens, 0)?;
        match self.weights.config.embedding_scale() {
            None => Ok(rows),
            Some(scale) => Ok((rows * scale)?),
        }
    }

    fn norm(&mut self, x: &Tensor, weight: &Block) -> Result<Tensor, PolicyError> {
        self.normed(x, weight)
    }

    fn norm_onto(
        &mut self,
        residual: Tensor,
        x: &Tensor,
        weight: &Block,
    ) -> Result<Tensor, PolicyError> {
        Ok((residual + self.normed(x, weight)?)?)
    }

    fn head_norms(&mut self, qkv: Tensor, norms: &HeadNorms) -> Result<Tensor, PolicyError> {
        let config = &self.weights.config;
        let (n, width) = qkv.dims2()?;
        let dim = config.head_dim();
        let (query, key) = (config.num_attention_heads * dim, config.kv_width());
        let normed = |start: usize, len: usize, norm: &Block| -> Result<Tensor, PolicyError> {
            let heads = qkv.narrow(1, start, len)?.reshape((n, len / dim, dim))?;
            Ok(self.normed(&heads, norm)?.reshape((n, len))?)
        };
        let parts = [
            normed(0, query, &norms.query)?,
            normed(query, key, &norms.key)?,
            qkv.narrow(1, query + key, width - query - key)?,
        ];
        Ok(Tensor::cat(&parts, 1)?)
    }

    fn linear(&mut self, x: &Tensor, linear: &Linear) -> Result<Tensor, PolicyError> {
        let y = x.matmul(&self.block(&linear.weight).t()?)?;
        match &linear.bias {
            Some(bias) => Ok(y.broadcast_add(&self.block(bias))?),
            None => Ok(y),
        }
    }

    fn linear_onto(
        &mut self,
        residual: Tensor,
        x: &Tensor,
        linear: &Linear,
    ) -> Result<Tensor, PolicyError> {
        Ok((residual + self.linear(x, linear)?)?)
    }

    fn attention(
        &mut self,
        qkv: Tensor,
        attention: &Attention,
        rows: &Rc<[Row]>,
        cache: Option<&mut Paged<CacheLayer>>,
    ) -> Result<Tensor, PolicyError> {
        let config = &self.weights.config;
        let (heads, kv, dim) = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim(),
        );
        let (n, _) = qkv.dims2()?;
        let (cos, sin) = self.angles(rows, attention.rope)?;
        let part = |start: usize, count: usize| -> Result<Tensor, PolicyError> {
            Ok(qkv
                .narrow(1, start * dim, count * dim)?
                .reshape((n, count, dim))?)
        };
        let q = Self::rotate(&part(0, heads)?, &cos, &sin)?.reshape((n, heads * dim))?;
        let k = Self::rotate(&part(heads, kv)?, &cos, &sin)?.reshape((n, kv * dim))?;
        let v = part(heads + kv, kv)?.reshape((n, kv * dim))?.contiguous()?;
        let tables = cache.as_ref().map(|cache| cache.tables.as_slice());
        let padding = Padding::new(self, rows, attention, tables)?;
        let (keys, values) = match cache {
            None => (k, v),
            Some(cache) => {
                let (keys, values) = &cache.layers[attention.layer];
                for row in rows.iter() {
                    let (mut done, table) = (0, &cache.tables[row.slot]);
                    while done < row.len {
                        let position = row.position + done;
                        let count = (BLOCK - position % BLOCK).min(row.len - done);
                        let at = cached_at(table, position);
                        let part = |source: &Tensor| {
                            source.narrow(0, row.start + done, count)?.contiguous()
                        };
                        keys.slice_set(&part(&k)?, 0, at)?;
                        values.slice_set(&part(&v)?, 0, at)?;
                        done += count;
                    }
                }
                (keys.clone(), values.clone())
            }
        };
        let (b, t, l) = (padding.rows, padding.queries, padding.keys);
        let group = heads / kv;
        // [B, KV, group·T, D] against [B, KV, D, L]: the heads of a group share their keys without copies.
        let q = q
            .index_select(&padding.query_index, 0)?
            .reshape((b, t, kv, group, dim))?;
        let q = q
            .permute((0, 2, 3, 1, 4))?
            .contiguous()?
            .reshape((b, kv, group * t, dim))?;
        let padded = |source: &Tensor| -> Result<Tensor, PolicyError> {
            let source = source
                .index_select(&padding.key_index, 0)?
                .reshape((b, l, kv, dim))?;
            Ok(source.transpose(1, 2)?.contiguous()?)
        };
        let (keys, values) = (padded(&keys)?, padded(&values)?);
        let scores = q.matmul(&keys.transpose(2, 3)?.contiguous()?)?;
        let scores = Self::capped((scores * attention.scale)?, attention.softcap)?;
        let scores = scores.reshape((b, kv, group, t, l))?;
        let scores = scores.broadcast_add(&padding.mask)?;
        let weights = softmax(&scores)?;
        let out = weights.reshape((b, kv, group * t, l))?.matmul(&values)?;
        let out = out
            .reshape((b, kv, group, t, dim))?
            .permute((0, 3, 1, 2, 4))?
            .contiguous()?;
        Ok(out
            .reshape((b * t, heads * dim))?
            .index_select(&padding.back_index, 0)?)
    }

    fn gated(&mut self, gate_up: Tensor) -> Result<Tensor, PolicyError> {
        let width = gate_up.dim(1)? / 2;
        let gate = gate_up.narrow(1, 0, width)?.contiguous()?;
        let up = gate_up.narrow(1, width, width)?.contiguous()?;
        let activated = match self.weights.config.architecture.family().activation {
            Activation::Silu => gate.silu()?,
            Activation::GeluTanh => gelu_tanh(&gate)?,
        };
        Ok((activated * up)?)
    }

    fn gather(&mut self, x: Tensor, positions: &Rc<[usize]>) -> Result<Tensor, PolicyError> {
        Ok(x.index_select(&self.indices(positions.iter().copied())?, 0)?)
    }

    fn logits(
        &mut self,
        hidden: &Tensor,
        head: &Block,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), PolicyError> {
        let hidden = hidden.narrow(0, rows.start, rows.len())?;
        let logits = hidden.matmul(&self.block(head).t()?)?;
        let logits = Self::capped(logits, self.weights.config.final_logit_softcapping)?;
        *out = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(())
    }

    fn selected(
        &mut self,
        hidden: &Tensor,
        head: &Block,
        targets: Vec<u32>,
        temperature: f32,
    ) -> Result<Selected, PolicyError> {
        let count = targets.len();
        let targets = Tensor::from_vec(targets, (count, 1), &self.weights.device)?;
        let logits = hidden.matmul(&self.block(head).t()?)?;
        let logits = Self::capped(logits, self.weights.config.final_logit_softcapping)?;
        let logits = (logits / f64::from(temperature))?;
        let all = log_softmax(&logits)?;
        let logprobs = all.gather(&targets, 1)?.squeeze(1)?;
        let all = all.detach();
        let entropies = (all.exp()? * all)?.sum(D::Minus1)?.neg()?;
        let host = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_vec1();
        let selected = Selected {
            logprobs: host(&logprobs)?,
            entropies: host(&entropies)?,
        };
        self.logprobs = Some(logprobs);
        Ok(selected)
    }

    fn backward(&mut self, coefficients: &[f32]) -> Result<Gradients, PolicyError> {
        let layout = &self.weights.layout;
        let mut gradients = Gradients::zeros(layout);
        let Some(logprobs) = self.logprobs.take() else {
            return Ok(gradients);
        };
        let coefficients =
            Tensor::from_slice(coefficients, coefficients.len(), &self.weights.device)?;
        let loss = (logprobs * coefficients.to_dtype(self.weights.dtype)?)?.sum_all()?;
        let store = loss.backward()?;
        for (block, variable) in layout.blocks().iter().zip(&self.weights.blocks) {
            // A block that the graph does not reach stays unmarked, and the optimizer refuses it.
            if let Some(gradient) = store.get(variable) {
                let values: Vec<f32> = gradient.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                gradients.block_mut(block).copy_from_slice(&values);
            }
        }
        Ok(gradients)
    }
}

/// `eᶻ / Σ eᶻ` with `z = x − max x`, over the last dimension.
fn softmax(x: &Tensor) -> Result<Tensor, candle_core::Error> {
    let weights = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)
}

/// `z − ln Σ eᶻ` with `z = x − max x`, over the last dimension.
fn log_softmax(x: &Tensor) -> Result<Tensor, candle_core::Error> {
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// `x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`, from operations with exact derivatives: the derivative of candle's own has
/// constants of six digits.
fn gelu_tanh(x: &Tensor) -> Result<Tensor, PolicyError> {
    let inner = ((x.sqr()? * 0.044_715)? + 1.0)?;
    let inner = ((x * inner)? * (2.0 / std::f64::consts::PI).sqrt())?;
    Ok(((x * 0.5)? * (inner.tanh()? + 1.0)?)?)
}

//! The `candle` kernel set: composite, differentiable operations of candle, on any device and in any of its float types.
//!
//! Only operations that candle differentiates are used: its own fused norm, softmax and rotary embedding end the graph
//! without an error, and a model built from them seems to train while all but the embedding stands still. Ragged rows
//! are padded for attention only, and gathered again.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor, Var};

use crate::config::Config;
use crate::gradient::Gradients;
use crate::kernels::{Kernels, Row, Selected};
use crate::layout::{Block, Layout, Linear};
use crate::policy::PolicyError;

/// Parameters on a device, one variable per block.
#[derive(Debug)]
pub(crate) struct CandleWeights {
    config: Config,
    layout: Arc<Layout>,
    device: Device,
    dtype: DType,
    blocks: Vec<Var>,
    /// `[positions, D/2]`
    cos: Tensor,
    sin: Tensor,
}

impl CandleWeights {
    /// * `values` — every parameter, flat, in the order of the table
    /// * `dtype` — what is computed with: f32, or f64 where finite differences are taken
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
        let half = config.head_dim() / 2;
        let positions = config.max_position_embeddings;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| (1.0 / config.rope_theta.powf(i as f64 / half as f64)) as f32)
            .collect();
        let angles: Vec<f32> = (0..positions)
            .flat_map(|p| frequencies.iter().map(move |f| p as f32 * f))
            .collect();
        let angles = Tensor::from_vec(angles, (positions, half), device)?;
        let (cos, sin) = (
            angles.cos()?.to_dtype(dtype)?,
            angles.sin()?.to_dtype(dtype)?,
        );
        Ok(Self {
            config: config.clone(),
            layout,
            device: device.clone(),
            dtype,
            blocks,
            cos,
            sin,
        })
    }

    #[cfg(test)]
    pub(crate) fn variable(&self, block: usize) -> &Var {
        &self.blocks[block]
    }
}

/// Keys and values of every layer, each `[slots·capacity, KV·D]`.
#[derive(Debug)]
pub(crate) struct Cache {
    layers: Vec<(Tensor, Tensor)>,
    capacity: usize,
}

/// One pass over the decoder.
#[derive(Debug)]
pub(crate) struct Candle {
    weights: Arc<CandleWeights>,
    training: bool,
    /// Output of the head, where the derivative starts.
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
        // Inference detaches, or the cache would hold the graph of every step before.
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

    /// Rotates `[N, heads, D]` by `cos`, `sin` `[N, 1, D/2]`.
    fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, PolicyError> {
        let half = x.dim(2)? / 2;
        let (left, right) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let turned_left = (left.broadcast_mul(cos)? - right.broadcast_mul(sin)?)?;
        let turned_right = (right.broadcast_mul(cos)? + left.broadcast_mul(sin)?)?;
        Ok(Tensor::cat(&[turned_left, turned_right], 2)?)
    }
}

/// Indices that pad ragged rows to a rectangle and back; B rows, T the longest, L the longest with its cache.
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
    fn new(kernels: &Candle, rows: &[Row], capacity: Option<usize>) -> Result<Self, PolicyError> {
        let queries = rows.iter().map(|row| row.len).max().unwrap_or(0);
        let keys = rows
            .iter()
            .map(|row| row.position + row.len)
            .max()
            .unwrap_or(0);
        // Padding points at a row's first token, which exists; what it yields is masked or never gathered.
        let query_index = rows
            .iter()
            .flat_map(|row| (0..queries).map(|i| row.start + if i < row.len { i } else { 0 }));
        let key_index = rows.iter().flat_map(|row| {
            let first = capacity.map_or(row.start, |capacity| row.slot * capacity);
            (0..keys).map(move |i| first + if i < row.position + row.len { i } else { 0 })
        });
        let back_index = rows
            .iter()
            .enumerate()
            .flat_map(|(b, row)| (0..row.len).map(move |i| b * queries + i));
        let mask: Vec<f32> = rows
            .iter()
            .flat_map(|row| {
                (0..queries).flat_map(move |i| {
                    let visible = (row.position + i + 1).min(row.position + row.len);
                    (0..keys).map(move |j| if j < visible { 0.0 } else { f32::NEG_INFINITY })
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
    type Cache = Cache;

    fn cache(&self, slots: usize, capacity: usize) -> Result<Cache, PolicyError> {
        let shape = (slots * capacity, self.weights.config.kv_width());
        let zeros = || Tensor::zeros(shape, self.weights.dtype, &self.weights.device);
        let layers = self.weights.layout.layers.iter();
        let layers: Result<_, candle_core::Error> =
            layers.map(|_| Ok((zeros()?, zeros()?))).collect();
        Ok(Cache {
            layers: layers?,
            capacity,
        })
    }

    fn copy_prefix(
        &self,
        cache: &mut Cache,
        from: usize,
        to: usize,
        len: usize,
    ) -> Result<(), PolicyError> {
        for (keys, values) in &cache.layers {
            for tensor in [keys, values] {
                let prefix = tensor.narrow(0, from * cache.capacity, len)?.copy()?;
                tensor.slice_set(&prefix, 0, to * cache.capacity)?;
            }
        }
        Ok(())
    }

    fn embed(&mut self, table: &Block, tokens: &[u32]) -> Result<Tensor, PolicyError> {
        let tokens = Tensor::from_slice(tokens, tokens.len(), &self.weights.device)?;
        Ok(self.block(table).index_select(&tokens, 0)?)
    }

    fn norm(&mut self, x: &Tensor, weight: &Block) -> Result<Tensor, PolicyError> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let root = (mean + self.weights.config.rms_norm_eps)?.sqrt()?;
        Ok(x.broadcast_div(&root)?.broadcast_mul(&self.block(weight))?)
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
        layer: usize,
        rows: &Rc<[Row]>,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor, PolicyError> {
        let config = &self.weights.config;
        let (heads, kv, dim) = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim(),
        );
        let (n, _) = qkv.dims2()?;
        let positions = self.indices(
            rows.iter()
                .flat_map(|row| row.position..row.position + row.len),
        )?;
        let cos = self.weights.cos.index_select(&positions, 0)?.unsqueeze(1)?;
        let sin = self.weights.sin.index_select(&positions, 0)?.unsqueeze(1)?;
        let part = |start: usize, count: usize| -> Result<Tensor, PolicyError> {
            Ok(qkv
                .narrow(1, start * dim, count * dim)?
                .reshape((n, count, dim))?)
        };
        let q = Self::rotate(&part(0, heads)?, &cos, &sin)?.reshape((n, heads * dim))?;
        let k = Self::rotate(&part(heads, kv)?, &cos, &sin)?.reshape((n, kv * dim))?;
        let v = part(heads + kv, kv)?.reshape((n, kv * dim))?.contiguous()?;
        let padding = Padding::new(self, rows, cache.as_ref().map(|cache| cache.capacity))?;
        let (keys, values) = match cache {
            None => (k, v),
            Some(cache) => {
                let (keys, values) = &cache.layers[layer];
                for row in rows.iter() {
                    let at = row.slot * cache.capacity + row.position;
                    keys.slice_set(&k.narrow(0, row.start, row.len)?.contiguous()?, 0, at)?;
                    values.slice_set(&v.narrow(0, row.start, row.len)?.contiguous()?, 0, at)?;
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
        let scores = (scores * (1.0 / (dim as f64).sqrt()))?.reshape((b, kv, group, t, l))?;
        let scores = scores.broadcast_add(&padding.mask)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
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
        Ok((gate.silu()? * up)?)
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
        let logits = (hidden.matmul(&self.block(head).t()?)? / f64::from(temperature))?;
        let all = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
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
            // A block that the graph does not reach stays unwritten, which the optimizer refuses.
            if let Some(gradient) = store.get(variable) {
                let values: Vec<f32> = gradient.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                gradients.block_mut(block).copy_from_slice(&values);
            }
        }
        Ok(gradients)
    }
}

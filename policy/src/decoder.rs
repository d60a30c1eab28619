//! The decoder, once: layers in order over the operations of a kernel set. Generation, scoring and training run this.
//!
//! Knows no sampling and no loss. Invariant: the hidden state at a position depends only on the tokens of its own text up
//! to that position.

use std::ops::Range;
use std::rc::Rc;

use crate::error::PolicyError;
use crate::kernels::{Batch, Kernels, Paged};
use crate::layout::{Block, Layout, Linear};

/// Hidden states after the last norm, `[M, hidden]`, at `wanted` `[M]` (indices into the packed batch, rising).
///
/// With a cache, the rows continue the texts whose blocks their tables name.
pub(crate) fn hidden<K: Kernels>(
    kernels: &mut K,
    layout: &Layout,
    batch: &Batch,
    wanted: &Rc<[usize]>,
    cache: Option<&mut Paged<K::Layer>>,
) -> Result<K::Array, PolicyError> {
    let x = kernels.embed(&layout.embedding, &batch.tokens)?;
    let all = Span {
        layers: 0..layout.layers.len(),
        batch,
        wanted,
    };
    let x = layers(kernels, layout, &all, x, cache)?;
    kernels.norm(&x, &layout.norm)
}

/// A range of layers and the batch that runs through them.
pub(crate) struct Span<'a> {
    pub(crate) layers: Range<usize>,
    pub(crate) batch: &'a Batch,
    /// Positions of the last layer's result, rising.
    pub(crate) wanted: &'a Rc<[usize]>,
}

/// The residual stream `x` `[N, hidden]` after a range of layers: `[N, hidden]`, or `[M, hidden]` after the last layer.
///
/// Consecutive ranges give the same result as one range over all layers, so a model can be split over machines. After the
/// last layer's attention only the wanted positions are computed: the others need keys and values alone.
pub(crate) fn layers<K: Kernels>(
    kernels: &mut K,
    layout: &Layout,
    span: &Span<'_>,
    mut x: K::Array,
    mut cache: Option<&mut Paged<K::Layer>>,
) -> Result<K::Array, PolicyError> {
    let last = layout.layers.len() - 1;
    let all = span.wanted.len() == span.batch.tokens.len();
    for (index, layer) in span.layers.clone().zip(&layout.layers[span.layers.clone()]) {
        let normed = kernels.norm(&x, &layer.input_norm)?;
        let mut qkv = kernels.linear(&normed, &layer.qkv)?;
        drop(normed);
        if let Some(norms) = &layer.head_norms {
            qkv = kernels.head_norms(qkv, norms)?;
        }
        let cache = cache.as_deref_mut();
        let mut attended = kernels.attention(qkv, &layer.attention, &span.batch.rows, cache)?;
        if index == last && !all {
            attended = kernels.gather(attended, span.wanted)?;
            x = kernels.gather(x, span.wanted)?;
        }
        x = join(
            kernels,
            x,
            &attended,
            &layer.output,
            layer.output_norm.as_ref(),
        )?;
        drop(attended);
        let normed = kernels.norm(&x, &layer.mlp_norm)?;
        let gate_up = kernels.linear(&normed, &layer.gate_up)?;
        drop(normed);
        let activated = kernels.gated(gate_up)?;
        x = join(
            kernels,
            x,
            &activated,
            &layer.down,
            layer.down_norm.as_ref(),
        )?;
    }
    Ok(x)
}

/// Adds a branch to the residual stream, through its last product and the family's norm, if any.
fn join<K: Kernels>(
    kernels: &mut K,
    residual: K::Array,
    branch: &K::Array,
    linear: &Linear,
    norm: Option<&Block>,
) -> Result<K::Array, PolicyError> {
    match norm {
        None => kernels.linear_onto(residual, branch, linear),
        Some(norm) => {
            let branch = kernels.linear(branch, linear)?;
            kernels.norm_onto(residual, &branch, norm)
        }
    }
}

#[cfg(test)]
mod parity;
#[cfg(test)]
mod tests;

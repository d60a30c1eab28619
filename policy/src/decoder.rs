//! The decoder, once: layers in order over the operations of a kernel set. Generation, scoring and training run this.
//!
//! Knows no sampling and no loss. Invariant: the hidden state at a position depends only on the tokens of its own row up
//! to that position.

use std::rc::Rc;

use crate::kernels::{Batch, Kernels};
use crate::layout::Layout;
use crate::policy::PolicyError;

/// Hidden states after the last norm, `[M, hidden]`, at `wanted` `[M]` (indices into the packed batch, rising).
///
/// With a cache, the rows continue the texts in their slots. Everything after the last layer's attention is computed
/// at the wanted positions only: a prompt's positions need no more than keys and values there.
pub(crate) fn hidden<K: Kernels>(
    kernels: &mut K,
    layout: &Layout,
    batch: &Batch,
    wanted: &Rc<[usize]>,
    mut cache: Option<&mut K::Cache>,
) -> Result<K::Array, PolicyError> {
    let mut x = kernels.embed(&layout.embedding, &batch.tokens)?;
    let last = layout.layers.len() - 1;
    let all = wanted.len() == batch.tokens.len();
    for (index, layer) in layout.layers.iter().enumerate() {
        let normed = kernels.norm(&x, &layer.input_norm)?;
        let qkv = kernels.linear(&normed, &layer.qkv)?;
        drop(normed);
        let mut attended = kernels.attention(qkv, index, &batch.rows, cache.as_deref_mut())?;
        if index == last && !all {
            attended = kernels.gather(attended, wanted)?;
            x = kernels.gather(x, wanted)?;
        }
        x = kernels.linear_onto(x, &attended, &layer.output)?;
        drop(attended);
        let normed = kernels.norm(&x, &layer.mlp_norm)?;
        let gate_up = kernels.linear(&normed, &layer.gate_up)?;
        drop(normed);
        let activated = kernels.gated(gate_up)?;
        x = kernels.linear_onto(x, &activated, &layer.down)?;
    }
    kernels.norm(&x, &layout.norm)
}

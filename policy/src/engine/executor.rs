//! Runs a plan: the kernels of all weights in use, over one memory of blocks.
//!
//! Knows no requests: the caller draws tokens from the logits. Invariant: each row is computed with its own weights alone.

use std::rc::Rc;

use super::draws::Drawn;
use super::plan::{Feed, Plan, Sequence, WeightsId};
use crate::decoder;
use crate::error::PolicyError;
use crate::kernels::{Batch, Kernels, Paged, Row};
use crate::layout::Layout;
use crate::policy::Policy;

pub(super) mod candle;
pub(super) mod fused;

/// Elements of logits held at once; a step over more rows runs the head several times.
const LOGITS_MAX: usize = 1 << 22;

/// A request's draw.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outcome {
    pub(super) sequence: Sequence,
    /// Version of the weights that gave the logits.
    pub(super) version: u64,
    /// None if the logits are not a distribution.
    pub(super) drawn: Option<Drawn>,
}

/// Draws from the logits `[feeds, V]` of some feeds, in the order of the feeds.
pub(super) type Draws<'a> = dyn Fn(&[&Feed], &[f32]) -> Vec<Outcome> + Sync + 'a;

/// Runs plans, whatever the kernels.
pub(super) trait Executor {
    /// Adds weights under this id.
    fn adopt(&mut self, weights_id: WeightsId, policy: &Policy);

    /// Drops the weights of this id.
    fn forget(&mut self, weights_id: WeightsId);

    /// Runs one forward pass for each of the plan's weights. Returns the draws in the order of the feeds.
    fn run(&mut self, plan: &Plan, draws: &Draws<'_>) -> Result<Vec<Outcome>, PolicyError>;
}

/// The feeds of each of the weights; no slice is empty.
fn by_weights(plan: &Plan) -> impl Iterator<Item = &[Feed]> {
    plan.feeds
        .chunk_by(|one, other| one.weights_id == other.weights_id)
}

/// Runs one forward pass over rows of the same weights, and draws from it.
fn run_rows<K: Kernels>(
    kernels: &mut K,
    layout: &Layout,
    (cache, logits): (&mut Paged<K::Layer>, &mut Vec<f32>),
    feeds: &[Feed],
    draws: &Draws<'_>,
) -> Result<Vec<Outcome>, PolicyError> {
    let batch = pack(feeds, &mut cache.tables);
    let last = |row: &Row| row.start + row.len - 1;
    let drawing: Vec<usize> = (0..feeds.len())
        .filter(|index| !feeds[*index].draws.is_empty())
        .collect();
    // A step that only reads needs no logits, but kernels take at least one row.
    let wanted: Rc<[usize]> = match drawing.is_empty() {
        true => [last(&batch.rows[0])].into(),
        false => drawing
            .iter()
            .map(|index| last(&batch.rows[*index]))
            .collect(),
    };
    let hidden = decoder::hidden(kernels, layout, &batch, &wanted, Some(cache))?;
    let vocab = layout.head.rows;
    let rows_at_once = (LOGITS_MAX / vocab).max(1);
    let mut drawn = Vec::with_capacity(drawing.len());
    for first in (0..drawing.len()).step_by(rows_at_once) {
        let range = first..(first + rows_at_once).min(drawing.len());
        kernels.logits(&hidden, &layout.head, range.clone(), logits)?;
        let drawing: Vec<&Feed> = drawing[range].iter().map(|index| &feeds[*index]).collect();
        drawn.extend(draws(&drawing, logits));
    }
    Ok(drawn)
}

/// Packs feeds into one batch. Their tables replace those of the step before.
fn pack(feeds: &[Feed], tables: &mut Vec<Vec<u32>>) -> Batch {
    let (mut tokens, mut rows) = (Vec::new(), Vec::with_capacity(feeds.len()));
    tables.resize_with(feeds.len().max(tables.len()), Vec::new);
    for (slot, (feed, table)) in feeds.iter().zip(tables.iter_mut()).enumerate() {
        rows.push(Row {
            start: tokens.len(),
            len: feed.tokens.len(),
            position: feed.position,
            earlier: 0,
            slot,
        });
        tokens.extend_from_slice(&feed.tokens);
        table.clone_from(&feed.table);
    }
    Batch {
        tokens,
        rows: rows.into(),
    }
}

//! What runs a plan: the kernels of every epoch in use over one memory of blocks.
//!
//! Knows no requests and draws nothing. Invariant: one epoch's rows are computed with that epoch's weights alone.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use super::scheduler::{Epoch, Feed, Plan};
use crate::decoder;
use crate::kernels::candle::Candle;
use crate::kernels::fused::Fused;
use crate::kernels::{Batch, Kernels, Paged, Row};
use crate::layout::Layout;
use crate::policy::{Policy, PolicyError, Prepared};

/// Elements of logits held at once; a step over more rows asks the head several times.
const LOGITS_MAX: usize = 1 << 22;

/// Takes the logits `[feeds, V]` that the draws of some feeds are made from.
pub(super) type OnLogits<'a> = dyn FnMut(&[&Feed], &[f32]) -> Result<(), PolicyError> + 'a;

/// Runs plans, whatever the kernels.
pub(super) trait Machine {
    /// Takes weights on as an epoch.
    fn adopt(&mut self, epoch: Epoch, policy: &Policy);

    /// Lets an epoch's weights go.
    fn forget(&mut self, epoch: Epoch);

    /// One forward pass for every epoch of the plan; hands on the logits of every feed that is drawn from.
    fn run(&mut self, plan: &Plan, on_logits: &mut OnLogits<'_>) -> Result<(), PolicyError>;
}

/// A machine for a policy's kernels, with memory of so many blocks.
pub(super) fn machine(policy: &Policy, blocks: usize) -> Result<Box<dyn Machine>, PolicyError> {
    let layout = Arc::clone(policy.layout());
    Ok(match policy.prepared() {
        Prepared::Fused(weights) => Box::new(Over {
            cache: Fused::inference(weights).cache(blocks)?,
            kernels: BTreeMap::new(),
            prepare: |policy: &Policy| match policy.prepared() {
                Prepared::Fused(weights) => Some(Fused::inference(weights)),
                Prepared::Candle(_) => None,
            },
            layout,
            logits: Vec::new(),
        }),
        Prepared::Candle(weights) => Box::new(Over {
            cache: Candle::inference(weights).cache(blocks)?,
            kernels: BTreeMap::new(),
            prepare: |policy: &Policy| match policy.prepared() {
                Prepared::Candle(weights) => Some(Candle::inference(weights)),
                Prepared::Fused(_) => None,
            },
            layout,
            logits: Vec::new(),
        }),
    })
}

struct Over<K: Kernels> {
    cache: Paged<K::Layer>,
    kernels: BTreeMap<Epoch, K>,
    prepare: fn(&Policy) -> Option<K>,
    layout: Arc<Layout>,
    logits: Vec<f32>,
}

impl<K: Kernels> Machine for Over<K> {
    fn adopt(&mut self, epoch: Epoch, policy: &Policy) {
        if let Some(kernels) = (self.prepare)(policy) {
            self.kernels.insert(epoch, kernels);
        }
    }

    fn forget(&mut self, epoch: Epoch) {
        self.kernels.remove(&epoch);
    }

    fn run(&mut self, plan: &Plan, on_logits: &mut OnLogits<'_>) -> Result<(), PolicyError> {
        let Self {
            cache,
            kernels,
            layout,
            logits,
            ..
        } = self;
        if let Some(any) = kernels.values().next() {
            for &(from, to) in &plan.copies {
                any.copy_block(cache, from, to)?;
            }
        }
        for feeds in plan.feeds.chunk_by(|one, other| one.epoch == other.epoch) {
            let Some(kernels) = feeds.first().and_then(|feed| kernels.get_mut(&feed.epoch)) else {
                continue; // no epoch is planned before its weights are adopted
            };
            run_epoch(kernels, cache, layout, logits, feeds, on_logits)?;
        }
        Ok(())
    }
}

fn run_epoch<K: Kernels>(
    kernels: &mut K,
    cache: &mut Paged<K::Layer>,
    layout: &Layout,
    logits: &mut Vec<f32>,
    feeds: &[Feed],
    on_logits: &mut OnLogits<'_>,
) -> Result<(), PolicyError> {
    let batch = pack(feeds, &mut cache.tables);
    let last = |row: &Row| row.start + row.len - 1;
    let drawing: Vec<usize> = (0..feeds.len())
        .filter(|index| !feeds[*index].draws.is_empty())
        .collect();
    // A step that only reads needs no logits, but no kernel takes no rows.
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
    for first in (0..drawing.len()).step_by(rows_at_once) {
        let range = first..(first + rows_at_once).min(drawing.len());
        kernels.logits(&hidden, &layout.head, range.clone(), logits)?;
        let drawing: Vec<&Feed> = drawing[range].iter().map(|index| &feeds[*index]).collect();
        on_logits(&drawing, logits)?;
    }
    Ok(())
}

/// Feeds as one batch; their tables take the place of those of the step before.
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

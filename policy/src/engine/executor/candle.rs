//! Plans on the `candle` kernels: one forward pass over all rows of the same weights.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Draws, Executor, Outcome, by_weights, run_rows};
use crate::engine::plan::{Plan, WeightsId};
use crate::error::PolicyError;
use crate::kernels::candle::{CacheLayer, Candle, CandleWeights};
use crate::kernels::{Kernels, Paged};
use crate::layout::Layout;
use crate::policy::{Policy, Prepared};

/// The `candle` kernels of all weights, over one cache.
pub(crate) struct CandleExecutor {
    cache: Paged<CacheLayer>,
    kernels: BTreeMap<WeightsId, Candle>,
    layout: Arc<Layout>,
    logits: Vec<f32>,
}

impl CandleExecutor {
    pub(crate) fn new(
        policy: &Policy,
        weights: &Arc<CandleWeights>,
        blocks: usize,
    ) -> Result<Self, PolicyError> {
        Ok(Self {
            cache: Candle::inference(weights).cache(blocks)?,
            kernels: BTreeMap::new(),
            layout: Arc::clone(policy.layout()),
            logits: Vec::new(),
        })
    }
}

impl Executor for CandleExecutor {
    fn adopt(&mut self, weights_id: WeightsId, policy: &Policy) {
        if let Prepared::Candle(weights) = policy.prepared() {
            self.kernels.insert(weights_id, Candle::inference(weights));
        }
    }

    fn forget(&mut self, weights_id: WeightsId) {
        self.kernels.remove(&weights_id);
    }

    fn run(&mut self, plan: &Plan, draws: &Draws<'_>) -> Result<Vec<Outcome>, PolicyError> {
        if let Some(any) = self.kernels.values().next() {
            for &(from, to) in &plan.copies {
                any.copy_block(&mut self.cache, from, to)?;
            }
        }
        let mut drawn = Vec::new();
        for feeds in by_weights(plan) {
            let Some(kernels) = self.kernels.get_mut(&feeds[0].weights_id) else {
                continue; // a plan names adopted weights only
            };
            let memory = (&mut self.cache, &mut self.logits);
            drawn.extend(run_rows(kernels, &self.layout, memory, feeds, draws)?);
        }
        Ok(drawn)
    }
}

//! Plans on the `fused` kernels. Rows of a small model are dealt to the threads: each thread computes its rows from the
//! embedding to the drawn tokens. For a large model all threads share every product.
//!
//! A step of a small model is some tens of operations of a few microseconds each; a barrier after each would cost as much
//! again, and its weights fit into every core's cache. A large model's weights are read once for all rows. Invariant: rows
//! dealt to different threads use no block that one of them writes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::{Draws, Executor, Outcome, by_weights, run_rows};
use crate::engine::plan::{Feed, Plan, WeightsId};
use crate::error::PolicyError;
use crate::kernels::fused::{CacheLayer, Fused, FusedWeights, Pool};
use crate::kernels::threads::Threads;
use crate::kernels::{BLOCK, Kernels, Paged};
use crate::layout::Layout;
use crate::policy::{Policy, Prepared};

/// Fewest tokens of a part; fewer do not pay for reading the weights.
const TOKENS_MIN: usize = 2;

/// Tokens above which a part is cut again, so that a thread that finishes early takes another part.
const TOKENS_ENOUGH: usize = 32;

/// The `fused` kernels of all weights, over one cache.
pub(crate) struct FusedExecutor {
    layers: Vec<CacheLayer>,
    weights: BTreeMap<WeightsId, Arc<FusedWeights>>,
    layout: Arc<Layout>,
    threads: Threads,
    writers: Writers,
}

/// Buffers that a thread keeps between steps.
#[derive(Default)]
struct Scratch {
    pool: Pool,
    tables: Vec<Vec<u32>>,
    logits: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl FusedExecutor {
    pub(crate) fn new(
        policy: &Policy,
        weights: &Arc<FusedWeights>,
        blocks: usize,
    ) -> Result<Self, PolicyError> {
        Ok(Self {
            layers: Fused::inference(weights).cache(blocks)?.layers,
            weights: BTreeMap::new(),
            layout: Arc::clone(policy.layout()),
            threads: policy.threads().clone(),
            writers: Writers::default(),
        })
    }

    /// Computes some rows on the calling thread.
    ///
    /// # Safety
    /// No thread may meanwhile write a block that `feeds` use, or use a block that `feeds` write.
    #[allow(unsafe_code)]
    unsafe fn part(
        &self,
        weights: &Arc<FusedWeights>,
        feeds: &[Feed],
        draws: &Draws<'_>,
    ) -> Result<Vec<Outcome>, PolicyError> {
        SCRATCH.with_borrow_mut(|scratch| {
            // Safety: the caller keeps the blocks of different threads apart; the handles end with this call.
            let layers = self.layers.iter().map(|layer| unsafe { layer.share() });
            let mut cache = Paged {
                layers: layers.collect(),
                tables: std::mem::take(&mut scratch.tables),
            };
            let mut kernels = Fused::inference_with(weights, &scratch.pool);
            let memory = (&mut cache, &mut scratch.logits);
            let drawn = run_rows(&mut kernels, &self.layout, memory, feeds, draws);
            scratch.tables = cache.tables;
            drawn
        })
    }
}

impl Executor for FusedExecutor {
    fn adopt(&mut self, weights_id: WeightsId, policy: &Policy) {
        if let Prepared::Fused(weights) = policy.prepared() {
            self.weights.insert(weights_id, Arc::clone(weights));
        }
    }

    fn forget(&mut self, weights_id: WeightsId) {
        self.weights.remove(&weights_id);
    }

    #[allow(unsafe_code)]
    fn run(&mut self, plan: &Plan, draws: &Draws<'_>) -> Result<Vec<Outcome>, PolicyError> {
        let written = plan.feeds.iter().flat_map(written);
        for layer in &mut self.layers {
            for &(from, to) in &plan.copies {
                layer.copy_block(from, to);
            }
            if let Some(&newest) = written.clone().max() {
                layer.reach(newest);
            }
        }
        let mut drawn = Vec::new();
        for feeds in by_weights(plan) {
            let Some(weights) = self.weights.get(&feeds[0].weights_id) else {
                continue; // a plan names adopted weights only
            };
            let parts = match weights.is_cached() {
                true => self.writers.deal(feeds, self.threads.count().get()),
                false => std::iter::once(0..feeds.len()).collect(),
            };
            let mut outcomes: Vec<_> = parts.iter().map(|_| Ok(Vec::new())).collect();
            self.threads
                .share_rows(&mut outcomes, 1, 1, |first, outcomes| {
                    for (outcome, part) in outcomes.iter_mut().zip(&parts[first..]) {
                        // Safety: `Writers::deal` gives no part a block that another part writes.
                        *outcome = unsafe { self.part(weights, &feeds[part.clone()], draws) };
                    }
                });
            for outcome in outcomes {
                drawn.extend(outcome?);
            }
        }
        Ok(drawn)
    }
}

/// The part of a step that writes each block.
#[derive(Debug, Default)]
struct Writers {
    /// For each block, the number of the part that writes it, counted from 1; 0 if no part does.
    parts: Vec<u32>,
}

impl Writers {
    /// Cuts feeds into consecutive parts of about equal tokens for `threads` threads. Returns a single part if a part would
    /// use a block that another part writes.
    fn deal(&mut self, feeds: &[Feed], threads: usize) -> Vec<Range<usize>> {
        let parts = cut(feeds, threads);
        if parts.len() > 1 && !self.apart(feeds, &parts) {
            return std::iter::once(0..feeds.len()).collect();
        }
        parts
    }

    /// Whether no part uses a block that another part writes.
    fn apart(&mut self, feeds: &[Feed], parts: &[Range<usize>]) -> bool {
        let each = || {
            (1..)
                .zip(parts)
                .flat_map(|(part, range)| feeds[range.clone()].iter().map(move |feed| (part, feed)))
        };
        for (part, feed) in each() {
            for &block in written(feed) {
                let block = block as usize;
                if self.parts.len() <= block {
                    self.parts.resize(block + 1, 0);
                }
                self.parts[block] = part;
            }
        }
        let writer = |block: &u32| self.parts.get(*block as usize).copied().unwrap_or(0);
        let apart = each().all(|(part, feed)| {
            let own = written(feed).iter().all(|block| writer(block) == part);
            own && feed
                .table
                .iter()
                .all(|block| [0, part].contains(&writer(block)))
        });
        for block in feeds.iter().flat_map(written) {
            self.parts[*block as usize] = 0;
        }
        apart
    }
}

/// The blocks that a feed's tokens are written to.
fn written(feed: &Feed) -> &[u32] {
    &feed.table[feed.position / BLOCK..=(feed.position + feed.tokens.len() - 1) / BLOCK]
}

/// Cuts feeds into consecutive parts of about equal tokens.
fn cut(feeds: &[Feed], threads: usize) -> Vec<Range<usize>> {
    let all: usize = feeds.iter().map(|feed| feed.tokens.len()).sum();
    let enough = all / TOKENS_ENOUGH / threads * threads;
    let count = match threads {
        1 => 1,
        _ => enough.max(threads).min(all / TOKENS_MIN).max(1),
    };
    let (mut parts, mut start, mut tokens) = (Vec::with_capacity(count), 0, 0);
    for (index, feed) in feeds.iter().enumerate() {
        tokens += feed.tokens.len();
        // The parts so far and this one hold their share of the tokens.
        if tokens * count >= all * (parts.len() + 1) {
            parts.push(start..index + 1);
            start = index + 1;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    /// A row of `tokens` from `position` on, in the blocks of `table`.
    fn feed(position: usize, tokens: usize, table: &[u32]) -> Feed {
        Feed {
            weights_id: 0,
            position,
            tokens: vec![1; tokens],
            table: table.to_vec(),
            draws: Vec::new(),
        }
    }

    #[test]
    fn parts_hold_every_row_once_and_about_as_many_tokens() {
        for (rows, threads, expected) in [(1, 2, 1), (3, 2, 1), (8, 2, 2), (8, 3, 3), (256, 2, 8)] {
            let feeds: Vec<Feed> = (0..rows).map(|row| feed(3, 1, &[row])).collect();
            let parts = Writers::default().deal(&feeds, threads);
            assert_eq!(parts.len(), expected, "{rows} rows, {threads} threads");
            let all: Vec<usize> = parts.iter().cloned().flatten().collect();
            assert_eq!(all, (0..rows as usize).collect::<Vec<_>>());
            let lens: Vec<usize> = parts.iter().map(Range::len).collect();
            assert!(
                lens.iter().max().unwrap() - lens.iter().min().unwrap() <= 1,
                "{lens:?}"
            );
        }
        let long = [feed(0, 60, &[0, 1]), feed(2, 1, &[2]), feed(2, 1, &[3])];
        assert_eq!(Writers::default().deal(&long, 2), [0..1, 1..3]);
    }

    #[test]
    fn rows_are_dealt_to_several_parts_only_if_no_part_uses_a_block_that_another_writes() {
        let mut writers = Writers::default();
        let block = BLOCK;
        let sharing = |own: u32| feed(block + 1, 2, &[7, own]);
        // All rows read block 7, and each writes a block of its own.
        let fine = [sharing(1), sharing(2), sharing(3), sharing(4)];
        assert_eq!(writers.deal(&fine, 2).len(), 2);
        // The first row still writes the block that the others read.
        let reads = [feed(block - 2, 2, &[7]), sharing(2), sharing(3), sharing(4)];
        let whole: Vec<Range<usize>> = std::iter::once(0..4).collect();
        assert_eq!(writers.deal(&reads, 2), whole);
        // Two rows write the same block.
        let writes = [sharing(1), sharing(2), sharing(3), sharing(1)];
        assert_eq!(writers.deal(&writes, 2), whole);
        assert_eq!(writers.deal(&fine, 2).len(), 2, "each deal starts afresh");
    }

    #[test]
    fn any_number_of_threads_draws_the_same() {
        use crate::engine::{EngineConfig, GenerationRequest, generate};
        use crate::kernels::KernelSet;
        use crate::sampling::Sampling;
        use crate::testing::{policy, tiny};

        let config = tiny();
        let requests: Vec<GenerationRequest> = (0..40)
            .map(|row: u32| {
                let prompt: Vec<u32> = (0..1 + row % 5).map(|at| (row / 4 + at) % 7).collect();
                let sampling = Sampling::Prescribed {
                    seed: [5; 32],
                    rollout: row,
                    temperature: 1.0,
                };
                GenerationRequest::new(prompt.into(), 3 + row as usize % 9, [].into(), sampling)
            })
            .collect();
        let policy = policy(&config, 3, KernelSet::Fused);
        let answers = [1, 2, 3, 5].map(|count| {
            let threads = Threads::new(NonZeroUsize::new(count).unwrap());
            let engine = EngineConfig::default();
            generate(&policy.with_threads(&threads), &engine, requests.clone()).unwrap()
        });
        for other in &answers[1..] {
            assert_eq!(&answers[0], other);
        }
    }
}

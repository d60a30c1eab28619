//! One training pass: log-probabilities of the targets, a loss that the caller defines, and the derivative of every
//! parameter.
//!
//! The loss sees one row at a time and returns its derivative by each log-probability, so any objective that is a sum over
//! rows (REINFORCE, PPO, cross-entropy) needs one forward pass and no code here. Invariant: the result depends on the
//! rows and the number of shards, never on how many threads the machine runs.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::rc::Rc;

use crate::decoder;
use crate::error::PolicyError;
use crate::kernels::candle::Candle;
use crate::kernels::fused::Fused;
use crate::kernels::gradients::Gradients;
use crate::kernels::{Batch, KernelSet, Kernels, Text};
use crate::policy::{Policy, Prepared, check_temperature};

/// A text to train on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainRow {
    /// The whole text: prompt, answers and what lies between them.
    pub tokens: Vec<u32>,
    /// Indices of the trained tokens, in rising ranges. Index 0 is not allowed: no token predicts it.
    pub targets: Vec<Range<usize>>,
}

impl TrainRow {
    /// Number of trained tokens.
    pub fn target_count(&self) -> usize {
        self.targets.iter().map(Range::len).sum()
    }

    /// The tokens that the decoder reads: all before the last target. Those before the predictor of the first target may be
    /// shared.
    fn text(&self) -> Text<'_> {
        let mut targets = self.targets.iter().filter(|range| !range.is_empty());
        let first = targets.clone().next().map_or(1, |range| range.start);
        let end = targets.next_back().map_or(1, |range| range.end);
        Text {
            tokens: &self.tokens[..end - 1],
            shareable: first - 1,
        }
    }
}

/// Result of a training pass.
#[derive(Debug, Clone)]
pub struct Pass {
    /// Derivative of the loss by every parameter.
    pub gradients: Gradients,
    /// For each row, the log-probability of each target, in nats.
    pub logprobs: Vec<Vec<f32>>,
    /// For each row, the entropy of the distribution at each target, in nats.
    pub entropies: Vec<Vec<f32>>,
    /// Tokens of all texts up to their last targets; shared tokens count for every text.
    pub tokens: usize,
}

/// Derivative of the loss by each log-probability of one row: (row, log-probabilities) -> derivatives, one for each.
pub type Coefficients<'a> = dyn Fn(usize, &[f32]) -> Vec<f32> + Sync + 'a;

/// Runs the forward pass over all rows, `coefficients` for each row with targets, and the backward pass.
///
/// Neighbours that begin with the same tokens, as the rollouts of a group do, are read as one tree: their prefix is computed
/// once, forward and backward. These families are dealt to exactly `shards` threads, the longest first, each to the shard
/// with the fewest tokens so far. The gradients of the shards are added in order.
///
/// # Errors
/// If the decoder cannot read a row, no row has a target, or `coefficients` returns a wrong number of derivatives or one that
/// is not finite.
pub fn gradients(
    policy: &Policy,
    rows: &[TrainRow],
    temperature: f32,
    shards: NonZeroUsize,
    coefficients: &Coefficients<'_>,
) -> Result<Pass, PolicyError> {
    if policy.kernels() == KernelSet::Int8 {
        return Err(PolicyError::Int8Trains);
    }
    if let Prepared::Fused(weights) = policy.prepared()
        && !weights.trains()
    {
        return Err(PolicyError::InferenceTrains);
    }
    check_temperature(temperature)?;
    for (index, row) in rows.iter().enumerate() {
        check_train_row(policy, index, row)?;
    }
    if rows.iter().all(|row| row.target_count() == 0) {
        return Err(PolicyError::NoTargets { rows: rows.len() });
    }
    let dealt = deal(rows, shards);
    let work = |members: &[usize]| {
        let shard = Shard {
            policy,
            rows,
            members,
            temperature,
            coefficients,
        };
        match policy.prepared() {
            Prepared::Fused(weights) => shard.pass(Fused::training(weights)),
            Prepared::Candle(weights) => shard.pass(Candle::training(weights)),
        }
    };
    let passes = std::thread::scope(|scope| {
        let (first, others) = dealt.split_first().unwrap_or((const { &Vec::new() }, &[]));
        let spawned: Vec<_> = others
            .iter()
            .map(|members| scope.spawn(|| work(members)))
            .collect();
        // The calling thread takes the first shard.
        let mut passes = vec![work(first)];
        for thread in spawned {
            passes.push(
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            );
        }
        passes.into_iter().collect::<Result<Vec<_>, _>>()
    })?;
    let mut pass = Pass {
        gradients: Gradients::zeros(policy.layout()),
        logprobs: vec![Vec::new(); rows.len()],
        entropies: vec![Vec::new(); rows.len()],
        tokens: 0,
    };
    for (index, (part, members)) in passes.into_iter().zip(&dealt).enumerate() {
        if index == 0 {
            pass.gradients = part.gradients;
        } else {
            pass.gradients.add(&part.gradients);
        }
        pass.tokens += part.tokens;
        for ((&row, logprobs), entropies) in members.iter().zip(part.logprobs).zip(part.entropies) {
            pass.logprobs[row] = logprobs;
            pass.entropies[row] = entropies;
        }
    }
    Ok(pass)
}

fn check_train_row(policy: &Policy, row: usize, train: &TrainRow) -> Result<(), PolicyError> {
    policy.check_row(row, &train.tokens, train.tokens.len())?;
    let (mut free_from, len) = (1, train.tokens.len());
    for &Range { start, end } in &train.targets {
        if start < free_from || end < start || end > len {
            return Err(PolicyError::Targets {
                row,
                start,
                end,
                len,
            });
        }
        free_from = end;
    }
    Ok(())
}

/// Rows of each shard, in rising order. Rows without targets are left out.
fn deal(rows: &[TrainRow], shards: NonZeroUsize) -> Vec<Vec<usize>> {
    let trained: Vec<usize> = (0..rows.len())
        .filter(|&row| rows[row].target_count() > 0)
        .collect();
    let mut families: Vec<(usize, &[usize])> = trained
        .chunk_by(|&one, &next| rows[one].text().shares_with(rows[next].text()))
        .map(|family| (tokens_read(rows, family), family))
        .collect();
    families.sort_by_key(|(tokens, _)| std::cmp::Reverse(*tokens));
    let mut dealt = vec![(0, Vec::new()); shards.get()];
    for (read, family) in families {
        if let Some((tokens, members)) = dealt.iter_mut().min_by_key(|(tokens, _)| *tokens) {
            *tokens += read;
            members.extend_from_slice(family);
        }
    }
    let sorted = |(_, mut members): (usize, Vec<usize>)| {
        members.sort_unstable();
        members
    };
    dealt.into_iter().map(sorted).collect()
}

/// Tokens that the decoder reads for rows with a shared prefix.
fn tokens_read(rows: &[TrainRow], family: &[usize]) -> usize {
    let texts = family.iter().map(|&row| rows[row].text());
    let shared = texts.clone().next().map_or(0, |text| text.shareable);
    shared + texts.map(|text| text.tokens.len() - shared).sum::<usize>()
}

/// The rows of one thread.
struct Shard<'a> {
    policy: &'a Policy,
    rows: &'a [TrainRow],
    members: &'a [usize],
    temperature: f32,
    coefficients: &'a Coefficients<'a>,
}

impl Shard<'_> {
    /// Returns logprobs and entropies in the order of the members.
    fn pass<K: Kernels>(&self, mut kernels: K) -> Result<Pass, PolicyError> {
        let layout = self.policy.layout();
        let (mut logprobs, mut entropies) = (Vec::new(), Vec::new());
        if self.members.is_empty() {
            let gradients = Gradients::zeros(layout);
            return Ok(Pass {
                gradients,
                logprobs,
                entropies,
                tokens: 0,
            });
        }
        let members = self.members.iter().map(|&row| &self.rows[row]);
        let (batch, ends) = Batch::packed(members.clone().map(TrainRow::text));
        let (mut wanted, mut targets) = (Vec::new(), Vec::new());
        for (row, end) in members.clone().zip(&ends) {
            for target in row.targets.iter().cloned().flatten() {
                wanted.push(end.place(target - 1));
                targets.push(row.tokens[target]);
            }
        }
        let wanted: Rc<[usize]> = wanted.into();
        let hidden = decoder::hidden(&mut kernels, layout, &batch, &wanted, None)?;
        let selected = kernels.selected(&hidden, &layout.head, targets, self.temperature)?;
        let mut slopes = Vec::with_capacity(selected.logprobs.len());
        let mut start = 0;
        for &row in self.members {
            let range = start..start + self.rows[row].target_count();
            start = range.end;
            let found = &selected.logprobs[range.clone()];
            if found.iter().any(|logprob| !logprob.is_finite()) {
                return Err(PolicyError::NotFinite { row });
            }
            slopes.extend(self.slopes(row, found)?);
            logprobs.push(found.to_vec());
            entropies.push(selected.entropies[range].to_vec());
        }
        let gradients = kernels.backward(&slopes)?;
        Ok(Pass {
            gradients,
            logprobs,
            entropies,
            tokens: members.map(|row| row.text().tokens.len()).sum(),
        })
    }

    fn slopes(&self, row: usize, logprobs: &[f32]) -> Result<Vec<f32>, PolicyError> {
        let slopes = (self.coefficients)(row, logprobs);
        let found = slopes.iter().filter(|slope| slope.is_finite()).count();
        if found != logprobs.len() || found != slopes.len() {
            return Err(PolicyError::Coefficients {
                row,
                expected: logprobs.len(),
                found,
            });
        }
        Ok(slopes)
    }
}

#[cfg(test)]
mod tests;

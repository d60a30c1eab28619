//! Prescribed sampling: a seed that the worker did not choose decides every token.
//!
//! Token t of rollout g is the first whose cumulative probability exceeds u(g, t), over ids in order, after dividing by the
//! temperature and nothing else. Knows no model: logits in, tokens and probabilities out. Invariant: worker and critic
//! run this same code, so honest answers differ no more than their logits.

use crate::kernels::simd::{LANES, exp_f64, largest, vectorised};

/// Tokens per block of the cumulative sum, which is scanned in two levels so that large vocabularies stay cheap.
const BLOCK: usize = 64;

/// Rule by which tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// The likeliest token, the lowest id among equals; log-probabilities are recorded at temperature 1.
    Greedy,
    /// The token prescribed by the seed.
    Prescribed {
        /// Seed of the lease.
        seed: [u8; 32],
        /// Index of the rollout in its group, g.
        rollout: u32,
        /// Divides the logits.
        temperature: f32,
    },
}

/// u(g, t): the top 53 bits of `BLAKE3("swarm-sample-v1\0" ‖ seed ‖ u32le g ‖ u64le t)`, over 2⁵³; so 0 ≤ u < 1.
pub fn uniform(seed: &[u8; 32], rollout: u32, position: u64) -> f64 {
    let mut message = [0; 60];
    message[..16].copy_from_slice(b"swarm-sample-v1\0");
    message[16..48].copy_from_slice(seed);
    message[48..52].copy_from_slice(&rollout.to_le_bytes());
    message[52..].copy_from_slice(&position.to_le_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&blake3::hash(&message).as_bytes()[..8]);
    (u64::from_le_bytes(first) >> 11) as f64 / (1u64 << 53) as f64
}

/// The distribution over the next token, in f64; allocated once and loaded for every position.
#[derive(Debug, Clone, Default)]
pub struct Distribution {
    /// `(logit − max) / T`
    exponents: Vec<f64>,
    /// `exp` of each exponent.
    weights: Vec<f64>,
    /// Sum of all weights before each block, and at the end of all.
    before: Vec<f64>,
    log_total: f64,
}

impl Distribution {
    /// Loads `softmax(logits / temperature)`; `logits` `[V]`. False if the logits give none (NaN, +∞, or nothing but −∞); the
    /// distribution must not be used then.
    #[must_use]
    pub fn load(&mut self, logits: &[f32], temperature: f32) -> bool {
        self.exponents.resize(logits.len(), 0.0);
        self.weights.resize(logits.len(), 0.0);
        weigh(&mut self.exponents, &mut self.weights, logits, temperature);
        self.before.clear();
        let mut total = 0.0;
        self.before.push(total);
        for block in self.weights.chunks(BLOCK) {
            total += block_sum(block);
            self.before.push(total);
        }
        self.log_total = total.ln();
        // The largest weight is 1, so any sum below it comes from NaN or from no finite logit.
        total >= 1.0 && total.is_finite()
    }

    /// First token whose cumulative probability exceeds `u`; if rounding leaves none, the last token of positive probability.
    pub fn draw(&self, u: f64) -> u32 {
        let goal = u * self.total();
        let block = self.before[1..].partition_point(|&through| through <= goal);
        if let Some(weights) = self.weights.chunks(BLOCK).nth(block) {
            let mut through = self.before[block];
            for (id, &weight) in weights.iter().enumerate() {
                through += weight;
                if goal < through {
                    return (block * BLOCK + id) as u32;
                }
            }
        }
        // Rounding left none: take the last possible token of this block, or of all.
        let end = ((block + 1) * BLOCK).min(self.weights.len());
        let last = self.weights[..end].iter().rposition(|&weight| weight > 0.0);
        last.unwrap_or(0) as u32
    }

    /// Likeliest token, the lowest id among equals.
    pub(crate) fn likeliest(&self) -> u32 {
        // The largest logit has exponent 0 exactly.
        self.exponents
            .iter()
            .position(|&exponent| exponent == 0.0)
            .unwrap_or(0) as u32
    }

    /// Log-probability of a token, in nats.
    pub fn logprob(&self, token: u32) -> f32 {
        (self.exponents[token as usize] - self.log_total) as f32
    }

    /// Cumulative probability below a token and through it: `u` prescribes the token when it lies between the two.
    pub fn interval(&self, token: u32) -> (f64, f64) {
        let token = token as usize;
        let block = token / BLOCK;
        let before: f64 = self.weights[block * BLOCK..token].iter().sum();
        let below = self.before[block] + before;
        (
            below / self.total(),
            (below + self.weights[token]) / self.total(),
        )
    }

    fn total(&self) -> f64 {
        self.before.last().copied().unwrap_or(0.0)
    }
}

vectorised! {
fn weigh(exponents: &mut [f64], weights: &mut [f64], logits: &[f32], temperature: f32) {
    let (max, inverse) = (f64::from(largest(logits)), 1.0 / f64::from(temperature));
    for ((exponent, weight), &logit) in exponents.iter_mut().zip(weights.iter_mut()).zip(logits) {
        *exponent = (f64::from(logit) - max) * inverse;
        *weight = exp_f64(*exponent);
    }
}
}

#[inline]
fn block_sum(block: &[f64]) -> f64 {
    let (chunks, rest) = block.as_chunks::<LANES>();
    let mut partial = [0.0; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            partial[lane] += chunk[lane];
        }
    }
    partial.iter().chain(rest).sum()
}

#[cfg(test)]
mod tests;

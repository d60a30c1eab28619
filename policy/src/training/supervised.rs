//! Cross-entropy on the target tokens, for the cold start: the same training pass with constant coefficients.

use std::num::NonZeroUsize;

use crate::error::PolicyError;
use crate::policy::Policy;
use crate::training::pass::{Pass, TrainRow, gradients};

/// A supervised training pass and its loss.
#[derive(Debug, Clone)]
pub struct Supervised {
    /// Mean negative log-probability of the targets, in nats.
    pub loss: f32,
    /// Gradients of that mean, and the log-probabilities.
    pub pass: Pass,
}

/// Loss `−1/n Σ log p` over all n targets at temperature 1, and its gradients.
///
/// # Errors
/// As [`gradients`].
pub fn supervised(
    policy: &Policy,
    rows: &[TrainRow],
    shards: NonZeroUsize,
) -> Result<Supervised, PolicyError> {
    let targets: usize = rows.iter().map(TrainRow::target_count).sum();
    let slope = -1.0 / targets.max(1) as f32;
    let pass = gradients(policy, rows, 1.0, shards, &|_, logprobs| {
        vec![slope; logprobs.len()]
    })?;
    let sum: f64 = pass.logprobs.iter().flatten().copied().map(f64::from).sum();
    Ok(Supervised {
        loss: (-sum / targets.max(1) as f64) as f32,
        pass,
    })
}

//! The model as the trainer sees it: a step makes one version from another. The trainer knows weights only as bytes, so a
//! simulation replaces the model and nothing else.

use std::ops::Range;
use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;

use muster_protocol::id::PolicyVersion;
use muster_protocol::message::lease::NumericClass;

/// A rollout to train on.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainRollout {
    /// Prompt and completion, with the tokens of an environment between turns.
    pub tokens: Vec<u32>,
    /// Ranges of `tokens` that the policy drew.
    pub targets: Vec<Range<usize>>,
    /// ln μ of the targets, in nats, as the worker recorded them.
    pub rollout_logprobs: Vec<f32>,
    pub advantage: f32,
    /// The version that drew it.
    pub version: PolicyVersion,
    /// The arithmetic that drew it.
    pub class: NumericClass,
    /// Whether a critic's forward pass confirmed `rollout_logprobs`. If not, the stepper recomputes them.
    pub audited: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct StepInput {
    /// The version that the step makes.
    pub step: PolicyVersion,
    /// Groups of rollouts, in training order.
    pub groups: Vec<Vec<TrainRollout>>,
    /// The sampling temperature, which divides the logits.
    pub temperature: f32,
}

/// The measurements of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepStats {
    /// Mean loss over the updates.
    pub loss: f64,
    /// Mean entropy of the distributions that the trained tokens were drawn from, in nats.
    pub entropy: f64,
    /// k3 estimate between recorded and computed log-probs over the first update, before the weights change.
    pub mismatch_kl: f64,
    /// Share of tokens masked or clipped.
    pub clip_fraction: f64,
    /// Norm of the gradients before clipping, mean over the updates.
    pub gradient_norm: f64,
    pub learning_rate: f64,
    /// Number of optimizer updates.
    pub updates: u64,
    /// Tokens that the decoder read, all updates together.
    pub tokens: u64,
    /// Share of the parameters whose published bits changed.
    pub changed_fraction: f64,
    /// Rollouts whose log-probs were recomputed, since no critic had checked them.
    pub recomputed: u64,
}

#[derive(Debug, Clone)]
pub struct StepOutput {
    /// The new version's weights as published.
    pub image: Bytes,
    pub stats: StepStats,
}

/// Why a step failed. Every such error stops the trainer: a run must not go on with weights of unknown state.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StepError(pub String);

/// A model in training.
#[async_trait]
pub trait Stepper: Send {
    /// The newest version's weights as published.
    fn image(&self) -> Bytes;

    /// Takes one step.
    async fn step(&mut self, input: StepInput) -> Result<StepOutput, StepError>;

    /// Writes the full state, on which the next step depends, whole or not at all.
    async fn save(&mut self, path: &Path) -> Result<(), StepError>;

    /// Loads the full state of `version` from `path`. `images` are the published weights of earlier versions, by which
    /// the log-probs of unaudited groups are recomputed.
    async fn restore(
        &mut self,
        path: &Path,
        version: PolicyVersion,
        images: Vec<(PolicyVersion, Bytes)>,
    ) -> Result<(), StepError>;
}

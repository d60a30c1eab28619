//! What the trainer needs of a model: a step from one version to the next. The trainer knows weights only as bytes, so
//! that a simulation can put a table in the model's place and nothing else.

use std::ops::Range;
use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;

use muster_protocol::id::PolicyVersion;
use muster_protocol::message::lease::NumericClass;

/// A rollout to train on.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainRollout {
    /// Prompt, answer, and whatever came between.
    pub tokens: Vec<u32>,
    /// Which of them the policy drew.
    pub targets: Vec<Range<usize>>,
    /// ln μ of those, as the worker recorded them.
    pub rollout_logprobs: Vec<f32>,
    /// The rollout's advantage.
    pub advantage: f32,
    /// The version that drew it.
    pub version: PolicyVersion,
    /// The arithmetic that drew it.
    pub class: NumericClass,
    /// Whether a forward pass of a critic confirmed `rollout_logprobs`; if not, the stepper recomputes them.
    pub audited: bool,
}

/// One step's input.
#[derive(Debug, Clone, PartialEq)]
pub struct StepInput {
    /// The version that the step makes.
    pub step: PolicyVersion,
    /// Groups of rollouts, in training order.
    pub groups: Vec<Vec<TrainRollout>>,
    /// What the logits were divided by.
    pub temperature: f32,
}

/// What a step measured.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepStats {
    /// Mean loss over the updates.
    pub loss: f64,
    /// Mean entropy of the distributions that the trained tokens were drawn from, in nats.
    pub entropy: f64,
    /// k3 estimate between recorded and computed log-probs, over the first update (before the weights moved).
    pub mismatch_kl: f64,
    /// Share of tokens masked or clipped.
    pub clip_fraction: f64,
    /// Norm of the gradients before clipping, mean over the updates.
    pub gradient_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Optimizer updates.
    pub updates: u64,
    /// Tokens that the decoder read, all updates together.
    pub tokens: u64,
    /// Share of the parameters whose published bits changed.
    pub changed_fraction: f64,
    /// Rollouts whose log-probs were recomputed because no critic had.
    pub recomputed: u64,
}

/// What a step made.
#[derive(Debug, Clone)]
pub struct StepOutput {
    /// The new version's weights as published.
    pub image: Bytes,
    /// What was measured.
    pub stats: StepStats,
}

/// Why a step failed. All of these stop the trainer: a run does not go on with weights that nobody can vouch for.
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

    /// Writes everything that the next step depends on, whole or not at all.
    async fn save(&mut self, path: &Path) -> Result<(), StepError>;

    /// Goes back to what was saved at `path`, when the run stood at `version`, with the published weights of earlier
    /// versions by which unaudited groups are recomputed.
    async fn restore(
        &mut self,
        path: &Path,
        version: PolicyVersion,
        images: Vec<(PolicyVersion, Bytes)>,
    ) -> Result<(), StepError>;
}

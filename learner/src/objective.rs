//! What a trained token costs, and how that cost changes with the token's log-probability.
//!
//! π is the probability that the policy being trained gives to a token, μ the one that the policy that sampled it gave,
//! A the advantage of its rollout, N the number of tokens trained in this update over the whole batch, r = π/μ. Each
//! objective is a sum of L over tokens; the gradient pass needs dL/d ln π of each and nothing else, so nothing here
//! knows about tensors or weights. Where we differ from the papers:
//!
//! 1. One normaliser: L is divided by N, the count of *all* trained tokens of the update, masked and clipped ones
//!    included (DAPO, arXiv:2503.14476; GRPO averages within each rollout first, which favours short right answers and
//!    long wrong ones).
//! 2. The ratio is always to the μ recorded when the token was sampled (PPO has the same policy on both sides of its
//!    first update). No third, "old" policy is run (AReaL's decoupled objective, GRPO's reference of the last step).
//! 3. No KL term to a frozen reference policy (GRPO, PPO for language) and no bonus for entropy.
//! 4. ln r is cut to ±[`LOG_RATIO_MAX`]; beyond it r is constant, so that a μ that no honest sampler reports cannot
//!    move the weights by its size.
//!
//! Invariant: all outputs are finite, and the derivative is that of the loss.

mod dppo;
mod ppo_clip;
mod reinforce;

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

pub use dppo::Dppo;
pub use ppo_clip::PpoClip;
pub use reinforce::Reinforce;

/// Where |ln r| is cut: r between 4.5e-5 and 22,026, three powers of ten outside the ratios that any mask in use lets
/// through (0.125 to 8).
pub(crate) const LOG_RATIO_MAX: f64 = 10.0;

/// Why an objective gives no numbers.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ObjectiveError {
    /// A setting outside its limits.
    #[error("objective `{objective}`: `{key}` is {value}, must be {rule}")]
    Setting {
        /// The objective's `type`.
        objective: &'static str,
        key: &'static str,
        value: f64,
        /// The range of the key, in words.
        rule: &'static str,
    },
    /// Two lists that belong together differ in length.
    #[error("{learner_logprobs} learner log-probs for {rollout_logprobs} rollout log-probs")]
    Lengths {
        learner_logprobs: usize,
        rollout_logprobs: usize,
    },
    /// An input that is not finite would reach every weight of the policy.
    #[error("{what} at position {position} is {value}, not a finite number")]
    NotFinite {
        what: &'static str,
        /// Token of the rollout, from 0; 0 for the advantage.
        position: usize,
        value: f32,
    },
}

/// Which objective is trained, with its settings. Each type's defaults are its published setting.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ObjectiveConfig {
    /// Masks by the change of probability.
    Dppo(Dppo),
    /// Clips by the ratio.
    PpoClip(PpoClip),
    /// Weighs by the ratio, capped.
    Reinforce(Reinforce),
}

impl Default for ObjectiveConfig {
    /// `dppo`: the ratio of a rare token is noise, its change of probability is not, and an asynchronous run has many.
    fn default() -> Self {
        Self::Dppo(Dppo::default())
    }
}

/// The trained tokens of one rollout.
#[derive(Debug, Clone, Copy)]
pub struct RolloutTokens<'a> {
    /// `[T]` ln π, in nats, at the temperature the tokens were sampled with.
    pub learner_logprobs: &'a [f32],
    /// `[T]` ln μ, in nats, at the same temperature.
    pub rollout_logprobs: &'a [f32],
    /// A, the same for every token of a rollout.
    pub advantage: f32,
}

/// What an objective says about one rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// `[T]` L of each token, already divided by N: the sum over the update's rollouts is its loss.
    pub losses: Vec<f64>,
    /// `[T]` dL/d ln π of each token: the coefficients of the gradient pass.
    pub derivatives: Vec<f32>,
    /// `[T]` whether the token was masked, clipped or capped.
    pub clipped: Vec<bool>,
    /// Sums over the tokens.
    pub stats: ObjectiveStats,
}

/// Sums over trained tokens; rollouts are added in a fixed order, so that equal runs report equal numbers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ObjectiveStats {
    pub tokens: u64,
    /// Sum of the tokens' losses L.
    pub loss: f64,
    /// Number of tokens masked, clipped or capped.
    pub clipped: u64,
    /// Σ ((r − 1) − ln r).
    pub mismatch_kl_sum: f64,
}

impl ObjectiveStats {
    /// Adds another rollout's sums.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.loss += other.loss;
        self.clipped += other.clipped;
        self.mismatch_kl_sum += other.mismatch_kl_sum;
    }

    /// Share of the tokens that were masked, clipped or capped; 0 when there were none.
    pub fn clip_fraction(&self) -> f64 {
        self.clipped as f64 / self.tokens.max(1) as f64
    }

    /// k3 = mean((r − 1) − ln r), an estimate of KL(μ ‖ π) in nats that is never negative (Schulman, "Approximating KL
    /// divergence", 2020); 0 when there were no tokens.
    pub fn mismatch_kl(&self) -> f64 {
        self.mismatch_kl_sum / self.tokens.max(1) as f64
    }
}

impl ObjectiveConfig {
    /// Checks what parsing cannot.
    ///
    /// # Errors
    /// Names the first setting outside its limits.
    pub fn validate(&self) -> Result<(), ObjectiveError> {
        match self {
            Self::Dppo(dppo) => dppo.validate(),
            Self::PpoClip(ppo_clip) => ppo_clip.validate(),
            Self::Reinforce(reinforce) => reinforce.validate(),
        }
    }

    /// Loss and derivative of each trained token of a rollout.
    ///
    /// * `trained_tokens` — N, counted over the whole update, not over this rollout
    ///
    /// # Errors
    /// When the lists differ in length or an input is not finite.
    pub fn evaluate(
        &self,
        rollout: &RolloutTokens<'_>,
        trained_tokens: NonZeroU64,
    ) -> Result<Evaluation, ObjectiveError> {
        rollout.validate()?;
        let n = trained_tokens.get() as f64;
        let len = rollout.learner_logprobs.len();
        let mut evaluation = Evaluation {
            losses: Vec::with_capacity(len),
            derivatives: Vec::with_capacity(len),
            clipped: Vec::with_capacity(len),
            stats: ObjectiveStats {
                tokens: len as u64,
                ..ObjectiveStats::default()
            },
        };
        for (&learner_logprob, &rollout_logprob) in rollout
            .learner_logprobs
            .iter()
            .zip(rollout.rollout_logprobs)
        {
            let token = Token {
                learner_logprob: f64::from(learner_logprob),
                rollout_logprob: f64::from(rollout_logprob),
                advantage: f64::from(rollout.advantage),
            };
            let cost = self.cost(&token);
            evaluation.losses.push(cost.loss / n);
            evaluation.derivatives.push((cost.derivative / n) as f32);
            evaluation.clipped.push(cost.clipped);
            evaluation.stats.loss += cost.loss / n;
            evaluation.stats.clipped += u64::from(cost.clipped);
            evaluation.stats.mismatch_kl_sum += token.k3();
        }
        debug_assert!(
            evaluation.stats.loss.is_finite() && evaluation.stats.mismatch_kl_sum.is_finite(),
            "all outputs of an objective are finite"
        );
        Ok(evaluation)
    }

    fn cost(&self, token: &Token) -> Cost {
        match self {
            Self::Dppo(dppo) => dppo.cost(token),
            Self::PpoClip(ppo_clip) => ppo_clip.cost(token),
            Self::Reinforce(reinforce) => reinforce.cost(token),
        }
    }
}

impl RolloutTokens<'_> {
    fn validate(&self) -> Result<(), ObjectiveError> {
        if self.learner_logprobs.len() != self.rollout_logprobs.len() {
            return Err(ObjectiveError::Lengths {
                learner_logprobs: self.learner_logprobs.len(),
                rollout_logprobs: self.rollout_logprobs.len(),
            });
        }
        all_finite("the learner log-prob", self.learner_logprobs)?;
        all_finite("the rollout log-prob", self.rollout_logprobs)?;
        all_finite("the advantage", &[self.advantage])
    }
}

fn all_finite(what: &'static str, values: &[f32]) -> Result<(), ObjectiveError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(position) => Err(ObjectiveError::NotFinite {
            what,
            position,
            value: values[position],
        }),
        None => Ok(()),
    }
}

/// One trained token, in f64: the terms are differences of nearly equal numbers.
#[derive(Debug, Clone, Copy)]
struct Token {
    learner_logprob: f64,
    rollout_logprob: f64,
    advantage: f64,
}

/// What a token costs before the division by N.
#[derive(Debug, Clone, Copy)]
struct Cost {
    loss: f64,
    /// dL/d ln π.
    derivative: f64,
    clipped: bool,
}

impl Token {
    /// ln r as it is.
    fn log_ratio_uncut(&self) -> f64 {
        self.learner_logprob - self.rollout_logprob
    }

    /// ln r, cut to ±[`LOG_RATIO_MAX`].
    fn log_ratio(&self) -> f64 {
        self.log_ratio_uncut().clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    }

    /// Whether ln r was cut, so that r no longer depends on π.
    fn is_cut(&self) -> bool {
        self.log_ratio_uncut().abs() > LOG_RATIO_MAX
    }

    /// r = π/μ.
    fn importance_ratio(&self) -> f64 {
        self.log_ratio().exp()
    }

    /// dr/d ln π: r itself, or 0 where ln r was cut.
    fn importance_ratio_slope(&self) -> f64 {
        if self.is_cut() {
            0.0
        } else {
            self.importance_ratio()
        }
    }

    /// π − μ. Rounding may lift a log-prob a little above 0, which must not make a probability above 1.
    fn probability_change(&self) -> f64 {
        self.learner_logprob.min(0.0).exp() - self.rollout_logprob.min(0.0).exp()
    }

    /// (r − 1) − ln r, without the cancellation that r − 1 would suffer near r = 1.
    fn k3(&self) -> f64 {
        self.log_ratio().exp_m1() - self.log_ratio()
    }
}

/// A setting that must be a number between two bounds, both included.
fn within(
    objective: &'static str,
    key: &'static str,
    value: f64,
    (low, high, rule): (f64, f64, &'static str),
) -> Result<(), ObjectiveError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(ObjectiveError::Setting {
        objective,
        key,
        value,
        rule,
    })
}

#[cfg(test)]
mod tests;

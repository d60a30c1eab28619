//! REINFORCE with a capped importance weight, as PipelineRL has it (arXiv:2509.19128). Every token keeps a gradient:
//! the cap bounds how much a token counts, it does not silence it.

use serde::{Deserialize, Serialize};

use super::{Cost, ObjectiveError, Token, within};

/// ```text
/// w         = clip(r, 0, 1 + clip_high)           a constant: no gradient passes through it
/// L         = 1/N Σ −w · A · ln π
/// dL/d ln π = 1/N · −w · A
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reinforce {
    /// The cap on w is 1 + this. PipelineRL's 0.02 makes a token that became likelier count hardly more than once.
    pub clip_high: f64,
}

impl Default for Reinforce {
    fn default() -> Self {
        Self { clip_high: 0.02 }
    }
}

impl Reinforce {
    pub(super) fn validate(&self) -> Result<(), ObjectiveError> {
        within(
            "reinforce",
            "clip_high",
            self.clip_high,
            (0.0, 1e3, "from 0 to 1000"),
        )
    }

    pub(super) fn cost(&self, token: &Token) -> Cost {
        let ratio = token.importance_ratio();
        let weight = ratio.min(1.0 + self.clip_high);
        Cost {
            loss: -weight * token.advantage * token.learner_logprob,
            derivative: -weight * token.advantage,
            clipped: ratio > weight || token.is_cut(),
        }
    }
}

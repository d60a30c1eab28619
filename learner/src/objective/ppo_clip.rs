//! PPO's clipped surrogate (arXiv:1707.06347) with DAPO's wider upper bound and mean over tokens (arXiv:2503.14476).
//! With `std_normalised` advantages and `clip_high = 0.2` it is GRPO's surrogate, save for the normaliser.

use serde::{Deserialize, Serialize};

use super::{Cost, ObjectiveError, Token, within};

/// ```text
/// L         = 1/N Σ max(−r · A, −clip(r, 1 − clip_low, 1 + clip_high) · A)
/// dL/d ln π = 1/N · −A · r, or 0 where the clipped side is the larger
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PpoClip {
    /// A token with A < 0 is left alone once r is below 1 − this.
    pub clip_low: f64,
    /// A token with A > 0 is left alone once r is above 1 + this. DAPO raised it from 0.2 so that rare tokens can grow.
    pub clip_high: f64,
}

impl Default for PpoClip {
    fn default() -> Self {
        Self {
            clip_low: 0.2,
            clip_high: 0.28,
        }
    }
}

impl PpoClip {
    pub(super) fn validate(&self) -> Result<(), ObjectiveError> {
        within(
            "ppo_clip",
            "clip_low",
            self.clip_low,
            (0.0, 1.0, "from 0 to 1"),
        )?;
        within(
            "ppo_clip",
            "clip_high",
            self.clip_high,
            (0.0, 1e3, "from 0 to 1000"),
        )
    }

    pub(super) fn cost(&self, token: &Token) -> Cost {
        let ratio = token.importance_ratio();
        let plain = -ratio * token.advantage;
        let bounded = -ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * token.advantage;
        if bounded > plain {
            return Cost {
                loss: bounded,
                derivative: 0.0,
                clipped: true,
            };
        }
        Cost {
            loss: plain,
            derivative: -token.importance_ratio_slope() * token.advantage,
            clipped: token.is_cut(),
        }
    }
}

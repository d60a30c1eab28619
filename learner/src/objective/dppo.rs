//! DPPO with the binary total-variation mask (arXiv:2602.04879) and Kimi's squared log-ratio (arXiv:2501.12599), as
//! prime-rl trains today.
//!
//! PPO's clip looks at the ratio, which for a rare token jumps by a factor at the least mismatch and for a likely one
//! hardly moves while the policy changes a lot. The mask looks at the change of probability instead.

use serde::{Deserialize, Serialize};

use super::{Cost, LOG_RATIO_MAX, ObjectiveError, Token, within};

/// ```text
/// masked = (A > 0 and π − μ > mask_high) or (A ≤ 0 and π − μ < −mask_low)
/// L      = 1/N Σ [ −(1 − masked) · advantage_tau · A · r  +  kl_tau · (ln r)² ]
/// dL/d ln π = 1/N [ −(1 − masked) · advantage_tau · A · r  +  2 · kl_tau · ln r ]
/// ```
///
/// The mask is a constant: no gradient passes through it. A masked token keeps the second term, which pulls it back.
/// The paper masks only where r already moved the way that A pushes it; with both thresholds above zero that is implied.
/// Beyond the cut of ln r, (ln r)² goes on as a straight line, so that the pull back stays and stays bounded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dppo {
    /// How far the probability of a token with A ≤ 0 may fall; prime-rl went from 0.2 to 0.1 and back.
    pub mask_low: f64,
    /// How far the probability of a token with A > 0 may rise.
    pub mask_high: f64,
    /// Weight of the first term.
    pub advantage_tau: f64,
    /// Weight of (ln r)².
    pub kl_tau: f64,
}

impl Default for Dppo {
    fn default() -> Self {
        Self {
            mask_low: 0.2,
            mask_high: 0.2,
            advantage_tau: 1.0,
            kl_tau: 1e-3,
        }
    }
}

impl Dppo {
    pub(super) fn validate(&self) -> Result<(), ObjectiveError> {
        let share = (0.0, 1.0, "a change of probability, from 0 to 1");
        within("dppo", "mask_low", self.mask_low, share)?;
        within("dppo", "mask_high", self.mask_high, share)?;
        let weight = (0.0, 1e3, "a weight from 0 to 1000");
        within("dppo", "advantage_tau", self.advantage_tau, weight)?;
        within("dppo", "kl_tau", self.kl_tau, weight)
    }

    pub(super) fn cost(&self, token: &Token) -> Cost {
        let change = token.probability_change();
        let masked = if token.advantage > 0.0 {
            change > self.mask_high
        } else {
            change < -self.mask_low
        };
        let kept = if masked {
            0.0
        } else {
            self.advantage_tau * token.advantage
        };
        let excess = (token.log_ratio_uncut().abs() - LOG_RATIO_MAX).max(0.0);
        let log_ratio_squared = token.log_ratio().powi(2) + 2.0 * LOG_RATIO_MAX * excess;
        Cost {
            loss: -kept * token.importance_ratio() + self.kl_tau * log_ratio_squared,
            derivative: -kept * token.importance_ratio_slope()
                + 2.0 * self.kl_tau * token.log_ratio(),
            clipped: masked || token.is_cut(),
        }
    }
}

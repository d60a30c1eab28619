//! Group-relative advantages: how much better each rollout of a group is than its group (GRPO, arXiv:2402.03300).
//! Knows nothing about tokens: rewards in, advantages out. Invariant: the advantages of a group sum to zero.

use serde::{Deserialize, Serialize};

/// Why a group has no advantages.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AdvantageError {
    /// Equal rewards say nothing about which answer was better. The group is dropped with the fate `no_signal`.
    #[error("all {group_size} rewards are equal, so every advantage is zero")]
    NoSignal { group_size: usize },
    /// A reward that is not a number of ordinary size would reach every weight of the policy.
    #[error("the reward of rollout {rollout} is {reward}, outside ±{max:e}", max = REWARD_ABS_MAX)]
    Reward {
        /// Its number in the group, from 0.
        rollout: usize,
        reward: f32,
    },
}

/// Largest |reward|: far above any range that a reward function declares, far below where differences overflow f32.
pub(crate) const REWARD_ABS_MAX: f32 = 1e30;

/// How rewards become advantages. R are the G rewards of a group, mean = 1/G Σ R.
///
/// Variants without settings are written `MeanOnly {}`, since serde ignores unknown keys beside a bare variant.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum AdvantageConfig {
    /// A = R − mean (Dr. GRPO, arXiv:2503.20783). The standard deviation is not divided out, since that gives more
    /// weight to prompts that are too easy or too hard.
    MeanOnly {},
    /// A = (R − mean) / (std + ε), std = √(1/G Σ (R − mean)²) (GRPO, arXiv:2402.03300). The deviation is the
    /// population's (ddof 0); PyTorch's `std` is the sample's, which makes advantages smaller by √((G−1)/G).
    StdNormalised {
        /// ε, in units of reward: keeps a group whose rewards hardly differ from being blown up. GRPO's code has 1e-4.
        #[serde(default = "default_epsilon")]
        epsilon: f64,
    },
    /// A = R − mean of the others = G/(G−1) · (R − mean) (RLOO, arXiv:2402.14740): unbiased, unlike `mean_only`,
    /// whose baseline holds the rollout's own reward.
    LeaveOneOut {},
}

/// Why an advantage configuration is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("advantage: `epsilon` is {epsilon}, must be a number from 0 to 1; leave it out for 1e-4")]
pub struct AdvantageConfigError {
    pub epsilon: f64,
}

fn default_epsilon() -> f64 {
    1e-4
}

impl Default for AdvantageConfig {
    /// `mean_only`, the partner of the default objective.
    fn default() -> Self {
        Self::MeanOnly {}
    }
}

impl AdvantageConfig {
    /// Checks what parsing cannot.
    ///
    /// # Errors
    /// When ε is negative, not a number, or above 1.
    pub fn validate(&self) -> Result<(), AdvantageConfigError> {
        match *self {
            Self::StdNormalised { epsilon } if !(0.0..=1.0).contains(&epsilon) => {
                Err(AdvantageConfigError { epsilon })
            }
            Self::StdNormalised { .. } | Self::MeanOnly {} | Self::LeaveOneOut {} => Ok(()),
        }
    }

    /// The advantage of each rollout of a group.
    ///
    /// * `rewards` — `[G]`, in the order of the group's rollouts
    ///
    /// Returns `[G]`, computed in f64.
    ///
    /// # Errors
    /// When all rewards are equal (a group of one included), or one is not finite or absurdly large.
    pub(crate) fn advantages(&self, rewards: &[f32]) -> Result<Vec<f32>, AdvantageError> {
        let group_size = rewards.len();
        for (rollout, &reward) in rewards.iter().enumerate() {
            if !reward.is_finite() || reward.abs() > REWARD_ABS_MAX {
                return Err(AdvantageError::Reward { rollout, reward });
            }
        }
        if rewards.windows(2).all(|pair| pair[0] == pair[1]) {
            return Err(AdvantageError::NoSignal { group_size });
        }
        let mean = rewards.iter().map(|&r| f64::from(r)).sum::<f64>() / group_size as f64;
        let centred = rewards.iter().map(|&r| f64::from(r) - mean);
        let scale = match *self {
            Self::MeanOnly {} => 1.0,
            Self::StdNormalised { epsilon } => {
                let variance = centred.clone().map(|c| c * c).sum::<f64>() / group_size as f64;
                1.0 / (variance.sqrt() + epsilon)
            }
            Self::LeaveOneOut {} => group_size as f64 / (group_size - 1) as f64,
        };
        let advantages: Vec<f32> = centred.map(|c| (c * scale) as f32).collect();
        debug_assert!(
            sums_to_zero(&advantages),
            "the advantages of a group sum to zero"
        );
        Ok(advantages)
    }
}

/// Up to the rounding of f32.
fn sums_to_zero(advantages: &[f32]) -> bool {
    let sum: f64 = advantages.iter().map(|&a| f64::from(a)).sum();
    let size: f64 = advantages.iter().map(|&a| f64::from(a.abs())).sum();
    let rounding = advantages.len() as f64 * f64::from(f32::MIN_POSITIVE);
    sum.abs() <= 1e-5 * size + rounding
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [AdvantageConfig; 3] = [
        AdvantageConfig::MeanOnly {},
        AdvantageConfig::StdNormalised { epsilon: 1e-4 },
        AdvantageConfig::LeaveOneOut {},
    ];

    fn assert_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-6, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn one_right_answer_of_four_by_hand() {
        // mean 1/4, population variance (3·1/16 + 9/16)/4 = 3/16, std 0.4330127.
        let rewards = [1.0, 0.0, 0.0, 0.0];
        let by = |config: AdvantageConfig| config.advantages(&rewards).unwrap();
        assert_close(&by(ALL[0]), &[0.75, -0.25, -0.25, -0.25]);
        let (high, low) = (0.75 / 0.433_112_7, -0.25 / 0.433_112_7);
        assert_close(&by(ALL[1]), &[high, low, low, low]);
        assert_close(&by(ALL[2]), &[1.0, -1.0 / 3.0, -1.0 / 3.0, -1.0 / 3.0]);
    }

    #[test]
    fn equal_rewards_carry_no_signal() {
        for config in ALL {
            for rewards in [&[][..], &[1.0], &[0.5; 8], &[0.0, -0.0]] {
                let group_size = rewards.len();
                let refused = config.advantages(rewards);
                assert_eq!(refused, Err(AdvantageError::NoSignal { group_size }));
            }
        }
    }

    #[test]
    fn a_reward_that_is_not_an_ordinary_number_is_refused_by_its_place() {
        for reward in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            let refused = ALL[0].advantages(&[0.0, reward]).unwrap_err();
            assert!(
                matches!(refused, AdvantageError::Reward { rollout: 1, .. }),
                "{refused}"
            );
        }
    }

    #[test]
    fn the_configuration_is_tagged_and_refuses_what_it_does_not_know() {
        let parse = serde_json::from_str::<AdvantageConfig>;
        assert_eq!(parse(r#"{"type": "std_normalised"}"#).unwrap(), ALL[1]);
        assert_eq!(parse(r#"{"type": "mean_only"}"#).unwrap(), ALL[0]);
        assert_eq!(parse(r#"{"type": "leave_one_out"}"#).unwrap(), ALL[2]);
        assert!(parse(r#"{"type": "mean_only", "epsilon": 1e-4}"#).is_err());
        assert!(parse(r#"{"type": "std_normalised", "eps": 1e-4}"#).is_err());
        for epsilon in [-1e-4, 2.0, f64::NAN] {
            assert!(
                AdvantageConfig::StdNormalised { epsilon }
                    .validate()
                    .is_err()
            );
        }
    }

    proptest! {
        #[test]
        fn the_advantages_of_a_group_sum_to_zero(
            rewards in prop::collection::vec(-1e3f32..1e3, 2..64),
            which in 0usize..3,
        ) {
            prop_assume!(rewards.iter().any(|&r| r != rewards[0]));
            let advantages = ALL[which].advantages(&rewards).unwrap();
            let sum: f64 = advantages.iter().map(|&a| f64::from(a)).sum();
            let size: f64 = advantages.iter().map(|&a| f64::from(a.abs())).sum();
            prop_assert!(sum.abs() <= 1e-6 * size, "{sum} of {size}");
            prop_assert!(size > 0.0);
        }
    }
}

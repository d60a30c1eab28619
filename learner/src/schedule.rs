//! The learning rate at each step. Pure: a step and the run's length in, a rate out, so that a run that resumes goes on
//! with the rate it would have had.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// Learning-rate schedule. With w = `warmup_steps`, step s of S (from 0):
///
/// ```text
/// s < w         lr · (s + 1)/w                        the first step already moves
/// otherwise     p = (s − w)/(S − 1 − w), at most 1    so that the last step has the final rate
///   constant    lr
///   linear      lr · (1 − p · (1 − final_fraction))
///   cosine      lr · (final_fraction + (1 − final_fraction) · (1 + cos πp)/2)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ScheduleConfig {
    /// The same rate throughout.
    Constant(Constant),
    /// Down along a straight line: what ended the oscillation of a constant rate on short runs.
    Linear(Decay),
    /// Down along half a cosine (arXiv:1608.03983, one period, no restart).
    Cosine(Decay),
}

/// The same rate throughout, after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Constant {
    /// The rate. 1e-6 suits post-training of a model of a billion parameters; a tiny one takes a hundred times that.
    pub lr: f64,
    /// Steps over which it is reached.
    pub warmup_steps: u64,
}

/// A rate that falls until the run's last step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Decay {
    /// The highest rate.
    pub lr: f64,
    /// Steps over which it is reached: AdamW's second moment is unreliable in its first few updates.
    pub warmup_steps: u64,
    /// What is left of `lr` at the last step.
    pub final_fraction: f64,
}

/// Why a schedule is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("schedule: `{key}` is {value}, must be {rule}")]
pub struct ScheduleError {
    pub key: &'static str,
    pub value: f64,
    /// The range of the key, in words.
    pub rule: &'static str,
}

impl Default for Constant {
    fn default() -> Self {
        Self {
            lr: 1e-6,
            warmup_steps: 0,
        }
    }
}

impl Default for Decay {
    fn default() -> Self {
        Self {
            lr: 1e-6,
            warmup_steps: 10,
            final_fraction: 0.05,
        }
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self::Constant(Constant::default())
    }
}

impl ScheduleConfig {
    /// Checks what parsing cannot. A rate of 0 is allowed: it is the control run that must learn nothing.
    ///
    /// # Errors
    /// Names the first setting outside its limits.
    pub fn validate(&self) -> Result<(), ScheduleError> {
        let (lr, final_fraction) = match *self {
            Self::Constant(Constant { lr, .. }) => (lr, 1.0),
            Self::Linear(decay) | Self::Cosine(decay) => (decay.lr, decay.final_fraction),
        };
        if !(0.0..=1.0).contains(&lr) {
            return Err(ScheduleError {
                key: "lr",
                value: lr,
                rule: "a rate from 0 to 1",
            });
        }
        if !(0.0..=1.0).contains(&final_fraction) {
            let (key, rule) = ("final_fraction", "a share from 0 to 1");
            return Err(ScheduleError {
                key,
                value: final_fraction,
                rule,
            });
        }
        Ok(())
    }

    /// The rate of step `step` (from 0) of a run of `total` steps; steps after the last keep its rate.
    pub fn lr(&self, step: u64, total: u64) -> f64 {
        match *self {
            Self::Constant(Constant { lr, warmup_steps }) => lr * warmup(step, warmup_steps),
            Self::Linear(decay) => {
                let p = progress(step, total, decay.warmup_steps);
                let fraction = 1.0 - p * (1.0 - decay.final_fraction);
                decay.lr * warmup(step, decay.warmup_steps) * fraction
            }
            Self::Cosine(decay) => {
                let p = progress(step, total, decay.warmup_steps);
                let fallen = (1.0 - decay.final_fraction) * (1.0 + (PI * p).cos()) / 2.0;
                decay.lr * warmup(step, decay.warmup_steps) * (decay.final_fraction + fallen)
            }
        }
    }
}

/// Share of the rate during warm-up, 1 after it.
fn warmup(step: u64, warmup_steps: u64) -> f64 {
    if step >= warmup_steps {
        return 1.0;
    }
    (step + 1) as f64 / warmup_steps as f64
}

/// How much of the way down is done: 0 during warm-up, 1 at the last step and after it.
fn progress(step: u64, total: u64, warmup_steps: u64) -> f64 {
    let done = step.saturating_sub(warmup_steps) as f64;
    let last = total.saturating_sub(1).saturating_sub(warmup_steps).max(1) as f64;
    (done / last).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DECAY: Decay = Decay {
        lr: 2e-4,
        warmup_steps: 10,
        final_fraction: 0.05,
    };

    #[track_caller]
    fn assert_rate(schedule: ScheduleConfig, step: u64, expected: f64) {
        let found = schedule.lr(step, 111);
        assert!(
            (found - expected).abs() < 1e-12,
            "{found} at step {step}, not {expected}"
        );
    }

    #[test]
    fn warm_up_rises_to_the_rate_and_the_last_step_has_the_final_fraction() {
        for schedule in [ScheduleConfig::Linear(DECAY), ScheduleConfig::Cosine(DECAY)] {
            assert_rate(schedule, 0, 2e-5);
            assert_rate(schedule, 4, 1e-4);
            assert_rate(schedule, 9, 2e-4);
            assert_rate(schedule, 10, 2e-4);
            assert_rate(schedule, 60, 1.05e-4); // half-way: the mean of 2e-4 and 1e-5, for the cosine too
            assert_rate(schedule, 110, 1e-5);
            assert_rate(schedule, 10_000, 1e-5);
        }
        // A quarter of the way: cos(π/4) = 0.70710678, so 1e-5 + 1.9e-4 · 0.85355339.
        assert_rate(ScheduleConfig::Cosine(DECAY), 35, 1.721_751_441e-4);
        assert_rate(ScheduleConfig::Linear(DECAY), 35, 1.525e-4);
    }

    #[test]
    fn a_constant_rate_stays() {
        let constant = ScheduleConfig::Constant(Constant {
            lr: 1e-4,
            warmup_steps: 2,
        });
        assert_rate(constant, 0, 5e-5);
        assert_rate(constant, 1, 1e-4);
        assert_rate(constant, 10_000, 1e-4);
    }

    #[test]
    fn a_schedule_is_tagged_and_refuses_what_it_does_not_know() {
        let parse = serde_json::from_str::<ScheduleConfig>;
        let linear = parse(r#"{"type": "linear", "lr": 2e-4}"#).unwrap();
        assert_eq!(linear, ScheduleConfig::Linear(DECAY));
        assert!(parse(r#"{"type": "constant", "final_fraction": 0.1}"#).is_err());
        assert!(parse(r#"{"type": "linear", "warmup": 3}"#).is_err());
        for lr in [-1e-4, 1.5, f64::NAN] {
            let refused = ScheduleConfig::Constant(Constant {
                lr,
                warmup_steps: 0,
            })
            .validate();
            assert_eq!(refused.unwrap_err().key, "lr");
        }
        let all_left = Decay {
            final_fraction: 1.1,
            ..DECAY
        };
        assert!(ScheduleConfig::Cosine(all_left).validate().is_err());
        ScheduleConfig::Constant(Constant {
            lr: 0.0,
            warmup_steps: 0,
        })
        .validate()
        .unwrap();
    }

    proptest! {
        #[test]
        fn no_step_of_any_run_leaves_the_range(
            (step, total, warmup_steps) in (0u64..=u64::MAX, 0u64..=u64::MAX, 0u64..=u64::MAX),
            final_fraction in 0.0f64..=1.0,
        ) {
            let decay = Decay { lr: 1e-3, warmup_steps, final_fraction };
            for schedule in [ScheduleConfig::Linear(decay), ScheduleConfig::Cosine(decay)] {
                let rate = schedule.lr(step, total);
                prop_assert!((0.0..=1e-3 * (1.0 + 1e-12)).contains(&rate), "{rate}");
            }
        }
    }
}

//! Warm-up: supervised training of a new policy on demonstrations until it is accurate enough for RL to start.
//!
//! Knows no task and no rewards: token sequences come in, and the caller measures accuracy.

use std::error::Error;
use std::num::{NonZeroU64, NonZeroUsize};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use muster_policy::{
    AdamW, Config, Device, Image, KernelSet, Master, OptimizerError, Policy, PolicyError, Storage,
    TrainRow, WeightsError, supervised,
};

/// Shards of a gradient, fixed so that the result does not depend on the machine's cores.
const SHARDS: NonZeroUsize = NonZeroUsize::new(2).unwrap();
/// Second decay of the optimizer: supervision's gradients change slowly enough for a longer memory than RL's.
const BETA2: f32 = 0.95;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WarmupConfig {
    /// Seed of the first weights and of the draws of demonstrations.
    pub seed: u64,
    /// Demonstrations per update, drawn with replacement.
    pub batch: NonZeroUsize,
    /// Learning rate after its rise.
    pub learning_rate: f32,
    /// Updates over which the learning rate rises linearly.
    pub rise_updates: u64,
    pub updates_max: u64,
    /// Updates between two measurements of the accuracy.
    pub check_every: NonZeroU64,
    /// Accuracy at which training stops, from 0 to 1.
    pub stop_accuracy: f64,
}

/// A measurement of the accuracy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WarmupCheck {
    /// Updates taken.
    pub updates: u64,
    /// Loss of the newest update, in nats per token.
    pub loss: f32,
    pub accuracy: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum WarmupError {
    #[error("there are no demonstrations to warm up on")]
    NoDemonstrations,
    #[error(
        "warm-up did not reach accuracy {stop_accuracy} on the development split in {updates_max} updates: raise \
         `warmup.updates_max` or lower `warmup.stop_accuracy`"
    )]
    NotReached {
        stop_accuracy: f64,
        updates_max: u64,
    },
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The caller could not measure the accuracy.
    #[error("the accuracy was not measured")]
    Accuracy(#[source] Box<dyn Error + Send + Sync>),
}

/// Trains a policy of shape `model` on `demonstrations` and returns its weights in f32.
///
/// `accuracy` measures a policy, from 0 to 1; `on_check` receives every measurement.
///
/// # Errors
/// There are no demonstrations, `config.stop_accuracy` is not reached, or training or `accuracy` fails.
pub fn warm_up(
    config: &WarmupConfig,
    model: &Config,
    demonstrations: &[TrainRow],
    mut accuracy: impl FnMut(&Policy) -> Result<f64, Box<dyn Error + Send + Sync>>,
    mut on_check: impl FnMut(WarmupCheck),
) -> Result<Image, WarmupError> {
    if demonstrations.is_empty() {
        return Err(WarmupError::NoDemonstrations);
    }
    let mut random = StdRng::seed_from_u64(config.seed);
    let mut master = Master::init(model, config.seed)?;
    let policy_of =
        |image: &Image| Policy::from_image(model, image, KernelSet::Fused, &Device::Cpu);
    let mut policy = policy_of(&master.image(Storage::F32)?)?;
    for updates in 1..=config.updates_max {
        let draw = |_| demonstrations[random.random_range(0..demonstrations.len())].clone();
        let batch: Vec<TrainRow> = (0..config.batch.get()).map(draw).collect();
        let found = supervised(&policy, &batch, SHARDS)?;
        master.step(&found.pass.gradients, &optimizer(config, updates))?;
        let image = master.image(Storage::F32)?;
        policy = policy_of(&image)?;
        if updates % config.check_every.get() != 0 {
            continue;
        }
        let accuracy = accuracy(&policy).map_err(WarmupError::Accuracy)?;
        debug_assert!((0.0..=1.0).contains(&accuracy), "an accuracy is a share");
        on_check(WarmupCheck {
            updates,
            loss: found.loss,
            accuracy,
        });
        if accuracy >= config.stop_accuracy {
            return Ok(image);
        }
    }
    Err(WarmupError::NotReached {
        stop_accuracy: config.stop_accuracy,
        updates_max: config.updates_max,
    })
}

fn optimizer(config: &WarmupConfig, update: u64) -> AdamW {
    let rise = (update as f32 / config.rise_updates.max(1) as f32).min(1.0);
    AdamW {
        learning_rate: config.learning_rate * rise,
        beta2: BETA2,
        ..AdamW::default()
    }
}

#[cfg(test)]
mod tests {
    use muster_policy::Architecture;

    use super::*;

    fn model() -> Config {
        Config {
            vocab_size: 8,
            hidden_size: 16,
            intermediate_size: 32,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            max_position_embeddings: 16,
            tie_word_embeddings: true,
            ..Architecture::Qwen2.defaults()
        }
    }

    fn config() -> WarmupConfig {
        WarmupConfig {
            seed: 3,
            batch: NonZeroUsize::new(4).unwrap(),
            learning_rate: 1e-2,
            rise_updates: 1,
            updates_max: 6,
            check_every: NonZeroU64::new(2).unwrap(),
            stop_accuracy: 0.5,
        }
    }

    fn demonstrations() -> Vec<TrainRow> {
        let targets = std::iter::once(1..4).collect();
        vec![TrainRow {
            tokens: vec![1, 2, 3, 4],
            targets,
        }]
    }

    #[test]
    fn training_stops_at_the_first_check_that_is_accurate_enough() {
        let (mut checks, mut accuracies) = (Vec::new(), [0.1, 0.6].into_iter());
        let measure = |_: &Policy| Ok(accuracies.next().unwrap());
        let on_check = |check: WarmupCheck| checks.push(check);
        warm_up(&config(), &model(), &demonstrations(), measure, on_check).unwrap();
        assert_eq!(checks.iter().map(|c| c.updates).collect::<Vec<_>>(), [2, 4]);
        assert!(checks[1].loss < checks[0].loss, "{checks:?}");
    }

    #[test]
    fn an_accuracy_that_is_never_reached_is_an_error() {
        let never = |_: &Policy| Ok(0.0);
        let failed = warm_up(&config(), &model(), &demonstrations(), never, |_| {});
        assert!(matches!(
            failed,
            Err(WarmupError::NotReached { updates_max: 6, .. })
        ));
        let failed = warm_up(&config(), &model(), &[], never, |_| {});
        assert!(matches!(failed, Err(WarmupError::NoDemonstrations)));
    }
}

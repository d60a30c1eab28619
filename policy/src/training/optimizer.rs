//! AdamW (arXiv:1711.05101) on a float32 master copy of the weights.
//!
//! The master is the only place where float32 weights live on between steps; what is computed with is the published
//! image. Invariants: a step changes everything or nothing; a parameter that no finite derivative reached is an error
//! and never stands still in silence; a state saved, loaded and stepped equals one that was only stepped, bit for bit.

use std::path::Path;
use std::sync::Arc;

use rand::SeedableRng;
use rand::distr::Distribution;
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use serde::{Deserialize, Serialize};

use crate::config::{Config, ModelConfigError};
use crate::disk::DiskError;
use crate::kernels::gradients::Gradients;
use crate::kernels::simd::vectorised;
use crate::layout::{Layout, Parameter};
use crate::weights::{Image, Storage, WeightsError};

mod state;

/// Standard deviation of a fresh embedding: tied to the head, it also sets the scale of the first logits.
const EMBEDDING_STD: f32 = 0.05;

/// A fresh matrix has this over the root of its inputs as standard deviation: a little below the variance-preserving 1,
/// since the residual stream adds up.
const MATRIX_GAIN: f32 = 0.7;

/// Settings of one update.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    /// Step size. A schedule changes it from update to update.
    pub learning_rate: f32,
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of their squares.
    pub beta2: f32,
    /// Added to the root of that mean.
    pub epsilon: f32,
    /// Decoupled decay of matrices, per unit of learning rate; norms and biases are left alone.
    pub weight_decay: f32,
    /// Largest norm of all gradients together; longer ones are scaled down to it.
    pub gradient_norm_max: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        // The second decay is short, as is usual for reinforcement learning: gradients change quickly.
        Self {
            learning_rate: 2e-4,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.0,
            gradient_norm_max: 1.0,
        }
    }
}

/// Why an update was refused or a state not restored.
#[derive(Debug, thiserror::Error)]
pub enum OptimizerError {
    /// No derivative reached a parameter.
    #[error(
        "no gradient reached parameter `{parameter}`; the pass that made the gradients must include it"
    )]
    Missing {
        /// Its name.
        parameter: String,
    },
    /// A derivative is NaN or infinite.
    #[error(
        "the gradient of parameter `{parameter}` is not finite at element {element}; drop the batch or lower the learning rate"
    )]
    NotFinite {
        /// Its name.
        parameter: String,
        /// First bad element.
        element: usize,
    },
    /// Gradients of another model.
    #[error(
        "gradients of {found} values were given to a master of {expected}; they belong to another config.json"
    )]
    OtherModel {
        /// Elements of the master.
        expected: usize,
        /// Elements of the gradients.
        found: usize,
    },
    /// A setting outside its range.
    #[error("optimizer setting {key} = {value} must be {expected}")]
    Setting {
        /// Name of the field.
        key: &'static str,
        /// Its value.
        value: f32,
        /// What would be accepted.
        expected: &'static str,
    },
    /// The state file is damaged or not one.
    #[error("optimizer state {path} is damaged ({reason}); go back to an earlier checkpoint")]
    Damaged {
        /// Which file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The configuration is not one that runs.
    #[error(transparent)]
    Config(#[from] ModelConfigError),
    /// The weights are not those of the configuration, or not finite.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The disk refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What one update did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f32,
    /// Updates taken so far, this one included.
    pub updates: u64,
}

/// Float32 weights and the optimizer's memory of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Master {
    config: Config,
    layout: Arc<Layout>,
    values: Vec<f32>,
    /// Decaying mean of gradients.
    first: Vec<f32>,
    /// Decaying mean of their squares.
    second: Vec<f32>,
    updates: u64,
}

impl Master {
    /// Fresh weights, the same for the same seed: embedding N(0, 0.05²), other matrices N(0, 0.49/inputs), biases 0,
    /// norms such that they multiply with 1.
    ///
    /// # Errors
    /// When the configuration is not valid.
    pub fn init(config: &Config, seed: u64) -> Result<Self, OptimizerError> {
        config.validate()?;
        let layout = Arc::new(Layout::new(config));
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut values = Vec::with_capacity(layout.len());
        for parameter in layout.parameters() {
            match initial(parameter, config.architecture.family().norm_offset) {
                Initial::Constant(value) => values.resize(values.len() + parameter.len(), value),
                Initial::Normal(std) => values.extend((0..parameter.len()).map(|_| {
                    let normal: f32 = StandardNormal.sample(&mut generator);
                    normal * std
                })),
            }
        }
        Ok(Self::fresh(config, layout, values))
    }

    /// Published weights, with an empty memory.
    ///
    /// # Errors
    /// When the image does not belong to the configuration.
    pub fn from_image(config: &Config, image: &Image) -> Result<Self, OptimizerError> {
        config.validate()?;
        let layout = Arc::new(Layout::new(config));
        image.check_fits(&layout)?;
        Ok(Self::fresh(config, layout, image.values()))
    }

    fn fresh(config: &Config, layout: Arc<Layout>, values: Vec<f32>) -> Self {
        let zeros = vec![0.0; values.len()];
        let (first, second) = (zeros.clone(), zeros);
        Self {
            config: config.clone(),
            layout,
            values,
            first,
            second,
            updates: 0,
        }
    }

    /// The shape of the decoder.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The parameter table.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Every weight, flat, in the order of the parameter table.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Updates taken so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The weights as they are published.
    ///
    /// # Errors
    /// When a weight is not finite.
    pub fn image(&self, storage: Storage) -> Result<Image, WeightsError> {
        Image::from_values(&self.layout, &self.values, storage)
    }

    /// One update. With g clipped to the largest norm and t updates so far:
    /// `m = β₁m + (1−β₁)g`, `v = β₂v + (1−β₂)g²`, `w −= lr·(m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε) + decay·w)`.
    ///
    /// # Errors
    /// When a gradient is missing or not finite, or a setting is out of range; nothing has changed then.
    pub fn step(
        &mut self,
        gradients: &Gradients,
        settings: &AdamW,
    ) -> Result<Update, OptimizerError> {
        settings.validate()?;
        let gradient_norm = self.checked_norm(gradients)?;
        let scale = if gradient_norm > settings.gradient_norm_max {
            settings.gradient_norm_max / gradient_norm
        } else {
            1.0
        };
        self.updates += 1;
        let corrected = |beta: f32| {
            let power = i32::try_from(self.updates).unwrap_or(i32::MAX);
            (1.0 - f64::from(beta).powi(power)) as f32
        };
        let (correction1, correction2) = (corrected(settings.beta1), corrected(settings.beta2));
        for parameter in self.layout.parameters() {
            let range = parameter.range();
            let decay = if parameter.is_matrix() {
                settings.weight_decay
            } else {
                0.0
            };
            adam(
                &mut self.values[range.clone()],
                &mut self.first[range.clone()],
                &mut self.second[range.clone()],
                &gradients.values()[range],
                Factors {
                    settings: *settings,
                    scale,
                    decay,
                    correction1,
                    correction2,
                },
            );
        }
        Ok(Update {
            gradient_norm,
            updates: self.updates,
        })
    }

    fn checked_norm(&self, gradients: &Gradients) -> Result<f32, OptimizerError> {
        if **gradients.layout() != *self.layout {
            return Err(OptimizerError::OtherModel {
                expected: self.values.len(),
                found: gradients.values().len(),
            });
        }
        let mut sum = 0.0;
        for (parameter, values) in gradients.iter() {
            let name = || parameter.name.clone();
            let values = values.ok_or_else(|| OptimizerError::Missing { parameter: name() })?;
            let squares = sum_of_squares(values);
            if !squares.is_finite() {
                let element = values
                    .iter()
                    .position(|value| !value.is_finite())
                    .unwrap_or(0);
                return Err(OptimizerError::NotFinite {
                    parameter: name(),
                    element,
                });
            }
            sum += squares;
        }
        Ok(sum.sqrt() as f32)
    }

    /// Writes weights, memory and update count to one file, whole or not at all.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&self, path: &Path) -> Result<(), OptimizerError> {
        state::save(self, path)
    }

    /// Reads what [`Master::save`] wrote.
    ///
    /// # Errors
    /// When the file is missing, truncated or damaged.
    pub fn load(path: &Path) -> Result<Self, OptimizerError> {
        state::load(path)
    }
}

impl AdamW {
    /// Checks that every setting lies in its range.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn validate(&self) -> Result<(), OptimizerError> {
        let finite = f32::MIN_POSITIVE..f32::INFINITY;
        let decay = (0.0..1.0, "at least 0 and below 1");
        let positive = (finite, "finite and above 0");
        let not_negative = (0.0..f32::INFINITY, "finite and at least 0");
        for (key, value, (range, expected)) in [
            ("learning_rate", self.learning_rate, not_negative.clone()),
            ("beta1", self.beta1, decay.clone()),
            ("beta2", self.beta2, decay),
            ("epsilon", self.epsilon, positive.clone()),
            ("weight_decay", self.weight_decay, not_negative),
            ("gradient_norm_max", self.gradient_norm_max, positive),
        ] {
            if !range.contains(&value) {
                return Err(OptimizerError::Setting {
                    key,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }
}

/// How a fresh parameter starts.
enum Initial {
    Constant(f32),
    Normal(f32),
}

fn initial(parameter: &Parameter, norm_offset: f32) -> Initial {
    match parameter.shape[..] {
        [_, _] if parameter.name.ends_with("embed_tokens.weight") => Initial::Normal(EMBEDDING_STD),
        [_, inputs] => Initial::Normal(MATRIX_GAIN / (inputs as f32).sqrt()),
        _ if parameter.name.ends_with(".bias") => Initial::Constant(0.0),
        _ => Initial::Constant(1.0 - norm_offset),
    }
}

/// What one update multiplies with.
#[derive(Clone, Copy)]
struct Factors {
    settings: AdamW,
    scale: f32,
    decay: f32,
    correction1: f32,
    correction2: f32,
}

vectorised! {
fn adam(values: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32], factors: Factors) {
    let Factors { settings, scale, decay, correction1, correction2 } = factors;
    let AdamW { learning_rate, beta1, beta2, epsilon, .. } = settings;
    for (((w, m), v), g) in values.iter_mut().zip(first).zip(second).zip(gradient) {
        let g = g * scale;
        *m = beta1 * *m + (1.0 - beta1) * g;
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        let direction = (*m / correction1) / ((*v / correction2).sqrt() + epsilon);
        *w -= learning_rate * (direction + decay * *w);
    }
}
}

vectorised! {
fn sum_of_squares(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<8>();
    let mut partial = [0.0; 8];
    for chunk in chunks {
        for lane in 0..8 {
            partial[lane] += f64::from(chunk[lane]) * f64::from(chunk[lane]);
        }
    }
    let rest: f64 = rest.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    partial.iter().sum::<f64>() + rest
}
}

#[cfg(test)]
mod tests;

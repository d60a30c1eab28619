//! AdamW (arXiv:1711.05101) on a float32 master copy of the weights.
//!
//! The master alone keeps float32 weights between steps; forward passes use the published image. Invariants: a step changes
//! everything or nothing; a parameter without a finite derivative is an error; saving and loading the state changes no bit of
//! later steps.

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

/// Standard deviation of a fresh embedding. A tied head makes it the scale of the first logits as well.
const EMBEDDING_STD: f32 = 0.05;

/// Standard deviation of a fresh matrix, times the square root of its inputs: a little below 1, which preserves variance,
/// since the residual stream adds up.
const MATRIX_GAIN: f32 = 0.7;

/// Settings of an update.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    /// Step size; a schedule may change it between updates.
    pub learning_rate: f32,
    /// Decay of the mean of gradients, in [0, 1).
    pub beta1: f32,
    /// Decay of the mean of squared gradients, in [0, 1).
    pub beta2: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
    /// Decoupled decay of matrices, per unit of learning rate; norms and biases do not decay.
    pub weight_decay: f32,
    /// Largest norm of all gradients together; larger gradients are scaled down to it.
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

/// Why an update was refused or a state could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum OptimizerError {
    /// No derivative reached a parameter.
    #[error(
        "no gradient reached parameter `{parameter}`; the pass that made the gradients must include it"
    )]
    Missing { parameter: String },
    /// A derivative is NaN or infinite.
    #[error(
        "the gradient of parameter `{parameter}` is not finite at element {element}; drop the batch or lower the learning rate"
    )]
    NotFinite {
        parameter: String,
        /// Index of the first such element.
        element: usize,
    },
    /// Gradients of another model.
    #[error(
        "gradients of {found} values were given to a master of {expected}; they belong to another config.json"
    )]
    OtherModel { expected: usize, found: usize },
    /// A setting outside its range.
    #[error("optimizer setting {key} = {value} must be {expected}")]
    Setting {
        key: &'static str,
        value: f32,
        /// The accepted range, in words.
        expected: &'static str,
    },
    /// The state file is damaged, or is another file.
    #[error("optimizer state {path} is damaged ({reason}); go back to an earlier checkpoint")]
    Damaged { path: String, reason: String },
    /// The configuration cannot run.
    #[error(transparent)]
    Config(#[from] ModelConfigError),
    /// The weights do not belong to the configuration, or are not finite.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A file could not be read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Result of an update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f32,
    /// Updates so far, including this one.
    pub updates: u64,
}

/// Float32 weights and the moments of their gradients.
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
    /// Fresh weights, determined by the seed: embedding N(0, 0.05²), other matrices N(0, 0.49/inputs), biases 0, and norms
    /// that multiply by 1.
    ///
    /// # Errors
    /// If the configuration is not valid.
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

    /// Published weights, with moments of zero.
    ///
    /// # Errors
    /// If the image does not belong to the configuration.
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

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The weights in their published form.
    ///
    /// # Errors
    /// If a weight is not finite.
    pub fn image(&self, storage: Storage) -> Result<Image, WeightsError> {
        Image::from_values(&self.layout, &self.values, storage)
    }

    /// Applies one update. With g clipped to the largest norm and t updates so far:
    /// `m = β₁m + (1−β₁)g`, `v = β₂v + (1−β₂)g²`, `w −= lr·(m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε) + decay·w)`.
    ///
    /// # Errors
    /// If a gradient is missing or not finite, or a setting is out of range. Nothing changes then.
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
}

impl AdamW {
    /// Checks that every setting lies in its range.
    ///
    /// # Errors
    /// Names the first setting out of range.
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

/// Initial value of a parameter.
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

/// Factors of one update.
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

//! Rotary embedding: the angle by which each pair of a head rotates per position, and how published models scale those
//! angles to contexts longer than they were trained on.
//!
//! Frequencies are computed in f32 with the same operations as in Hugging Face transformers: at position 100,000, a
//! difference in the last bit of a frequency is a hundredth of a radian. Invariant: angles depend on the position alone,
//! never on the length of the text.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::bounds::{POSITIONS_MAX, check_number, check_size};
use super::error::ModelConfigError;

/// Larger bases would overflow f32 when scaled; published ones go up to about 10⁷.
const THETA_MAX: f64 = 1e15;

/// Largest scaling factor: published models have up to 64.
const FACTOR_MAX: f64 = 1e6;

/// Rotary embedding of one kind of layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the angles, ≥ 1.
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How angles are scaled. Names and fields are those of `rope_scaling` in `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Angles are not scaled.
    Default,
    /// Every frequency divided by the factor.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// The base grows with texts longer than `max_position_embeddings`. This crate refuses such texts; for shorter ones it
    /// equals [`RopeScaling::Default`].
    Dynamic {
        /// At least 1.
        factor: f64,
    },
    /// Low frequencies are divided by the factor, high ones kept, those between interpolated (Llama 3.1).
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings` over this are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings` over this are high frequencies.
        high_freq_factor: f64,
        /// Positions of the original training.
        original_max_position_embeddings: usize,
    },
    /// Like Llama 3.1, with a linear ramp over the pairs and a factor on the attention (YaRN, arXiv:2309.00071).
    Yarn {
        /// At least 1.
        factor: f64,
        /// Positions of the original training.
        original_max_position_embeddings: usize,
        /// Multiplies cosines and sines; by default `0.1·ln(factor) + 1`.
        #[serde(skip_serializing_if = "Option::is_none")]
        attention_factor: Option<f64>,
        /// A pair with more rotations within the original context is kept; 32 by default.
        #[serde(skip_serializing_if = "Option::is_none")]
        beta_fast: Option<f64>,
        /// A pair with fewer rotations is divided by the factor; 1 by default.
        #[serde(skip_serializing_if = "Option::is_none")]
        beta_slow: Option<f64>,
        /// Together with `mscale_all_dim`, an alternative to `attention_factor`.
        #[serde(skip_serializing_if = "Option::is_none")]
        mscale: Option<f64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        mscale_all_dim: Option<f64>,
        /// Whether the ends of the ramp are rounded to whole pairs; true by default.
        #[serde(skip_serializing_if = "Option::is_none")]
        truncate: Option<bool>,
    },
}

impl RopeScaling {
    /// Values of `rope_type`, for error messages.
    pub(super) const SUPPORTED: &'static str = "default, linear, dynamic, llama3 or yarn";
}

impl Rope {
    pub fn plain(theta: f64) -> Self {
        Self {
            theta,
            scaling: RopeScaling::Default,
        }
    }

    pub(super) fn validate(&self) -> Result<(), ModelConfigError> {
        check_number(
            "rope_theta",
            self.theta,
            1.0..=THETA_MAX,
            "between 1 and 1e15",
        )?;
        let factor =
            |value| check_number("rope factor", value, 1.0..=FACTOR_MAX, "between 1 and 1e6");
        match self.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor: by } | RopeScaling::Dynamic { factor: by } => factor(by),
            RopeScaling::Llama3 {
                factor: by,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => {
                factor(by)?;
                check_size("original_max_position_embeddings", original, POSITIONS_MAX)?;
                check_number("low_freq_factor", low, 1e-3..=1e6, "between 0.001 and 1e6")?;
                check_number(
                    "high_freq_factor",
                    high,
                    1e-3..=1e6,
                    "between 0.001 and 1e6",
                )?;
                if high <= low {
                    return Err(ModelConfigError::Number {
                        key: "high_freq_factor",
                        value: high,
                        expected: "above low_freq_factor",
                    });
                }
                Ok(())
            }
            RopeScaling::Yarn { .. } => self.validate_yarn(),
        }
    }

    fn validate_yarn(&self) -> Result<(), ModelConfigError> {
        let RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            attention_factor,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            ..
        } = self.scaling
        else {
            return Ok(());
        };
        check_number("rope factor", factor, 1.0..=FACTOR_MAX, "between 1 and 1e6")?;
        check_size("original_max_position_embeddings", original, POSITIONS_MAX)?;
        // The ramp divides by the logarithm of the base.
        check_number(
            "rope_theta",
            self.theta,
            1.1..=THETA_MAX,
            "between 1.1 and 1e15 with yarn",
        )?;
        for (key, value) in [
            ("attention_factor", attention_factor),
            ("beta_fast", beta_fast.filter(|&beta| beta != 0.0)),
            ("beta_slow", beta_slow.filter(|&beta| beta != 0.0)),
        ] {
            if let Some(value) = value {
                check_number(key, value, 1e-3..=1e6, "between 0.001 and 1e6")?;
            }
        }
        for (key, value) in [("mscale", mscale), ("mscale_all_dim", mscale_all_dim)] {
            if let Some(value) = value {
                check_number(key, value, 0.0..=1e6, "between 0 and 1e6")?;
            }
        }
        Ok(())
    }

    /// Radians per position of each pair of a head of width `dim`: `[dim/2]`.
    pub(crate) fn frequencies(&self, dim: usize) -> Vec<f32> {
        let powers = (0..dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            self.theta.powf(f64::from(exponent)) as f32
        });
        match self.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => {
                powers.map(|power| 1.0 / power).collect()
            }
            RopeScaling::Linear { factor } => {
                powers.map(|power| (1.0 / power) / factor as f32).collect()
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let original = original_max_position_embeddings as f64;
                powers
                    .map(|power| {
                        llama3(
                            1.0 / power,
                            factor,
                            low_freq_factor,
                            high_freq_factor,
                            original,
                        )
                    })
                    .collect()
            }
            RopeScaling::Yarn { factor, .. } => {
                let (low, high) = self.yarn_ramp(dim);
                powers
                    .enumerate()
                    .map(|(pair, power)| {
                        let ramp = ((pair as f32 - low) / (high - low)).clamp(0.0, 1.0);
                        let (kept, divided) = (1.0 / power, 1.0 / (factor as f32 * power));
                        let keep = 1.0 - ramp;
                        divided * (1.0 - keep) + kept * keep
                    })
                    .collect()
            }
        }
    }

    /// First and last pair of the ramp between kept and divided frequencies: a pair rotates `beta` times within the original
    /// context at `dim·ln(original / (beta·2π)) / (2·ln theta)`.
    fn yarn_ramp(&self, dim: usize) -> (f32, f32) {
        let RopeScaling::Yarn {
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } = self.scaling
        else {
            return (0.0, 1.0);
        };
        let given =
            |beta: Option<f64>, default| beta.filter(|&beta| beta != 0.0).unwrap_or(default);
        let pair = |turns: f64| {
            let original = original_max_position_embeddings as f64;
            dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (pair(given(beta_fast, 32.0)), pair(given(beta_slow, 1.0)));
        if truncate.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        (low as f32, high as f32)
    }

    /// Factor of cosines and sines.
    pub(crate) fn attention_factor(&self) -> f32 {
        let RopeScaling::Yarn {
            factor,
            attention_factor,
            mscale,
            mscale_all_dim,
            ..
        } = self.scaling
        else {
            return 1.0;
        };
        let scale = |mscale: f64| 0.1 * mscale * factor.ln() + 1.0;
        let inferred = match (mscale, mscale_all_dim) {
            (Some(own), Some(all)) if own != 0.0 && all != 0.0 => scale(own) / scale(all),
            _ => scale(1.0),
        };
        attention_factor.unwrap_or(inferred) as f32
    }
}

/// One frequency by Llama 3.1's rule; `low` and `high` are its `low_freq_factor` and `high_freq_factor`.
fn llama3(frequency: f32, factor: f64, low: f64, high: f64, original: f64) -> f32 {
    let wavelength = (2.0 * PI) as f32 / frequency;
    if wavelength < (original / high) as f32 {
        return frequency;
    }
    if wavelength > (original / low) as f32 {
        return frequency / factor as f32;
    }
    let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
}

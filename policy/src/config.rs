//! What a policy is, as Hugging Face's `config.json` says it.
//!
//! Knows names and sizes only, never weights. Invariant: a [`Config`] that was read or validated describes a decoder
//! that this crate runs, with sizes that cannot overflow.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use family::Architecture;
pub(crate) use family::{Activation, Family};
pub use rope::{Rope, RopeScaling};

mod family;
mod names;
mod reading;
mod rope;
mod writing;

/// Largest width, head count or layer count accepted: far above any open model, and small enough for products of a few
/// of them to stay within 64 bits.
const SIZE_MAX: usize = 1 << 20;

/// Largest vocabulary accepted: sixteen times the largest in use.
const VOCAB_MAX: usize = 1 << 22;

/// Largest number of positions accepted: twice the longest context of an open model.
const POSITIONS_MAX: usize = 1 << 21;

/// Layers accepted: the deepest open decoders have about 130.
pub(crate) const LAYERS_MAX: usize = 1 << 10;

/// Special tokens accepted that end an answer: published files have up to five.
const STOPS_MAX: usize = 1 << 10;

/// Why a `config.json` cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or a key is missing or has the wrong type.
    #[error("config.json cannot be read: {0}; use the file that came with the model")]
    Unreadable(String),
    /// A family that this crate does not run.
    #[error(
        "config.json has model_type `{model_type}`, but the architectures that run are: {runs}"
    )]
    Architecture {
        /// What the file says.
        model_type: String,
        /// What would be accepted.
        runs: &'static str,
    },
    /// A size outside its bounds.
    #[error("config.json has {key} = {value}, but it must lie between 1 and {max}")]
    Size {
        /// Key in the file.
        key: &'static str,
        /// Value in the file.
        value: usize,
        /// Largest value accepted.
        max: usize,
    },
    /// Two sizes that do not fit each other.
    #[error("config.json has {key} = {value}, which must be divisible by {by_key} = {by}")]
    Indivisible {
        /// Key of the dividend.
        key: &'static str,
        /// Its value.
        value: usize,
        /// Key of the divisor.
        by_key: &'static str,
        /// Its value.
        by: usize,
    },
    /// Two sizes that must be the same.
    #[error("config.json has {key} = {value}, but {other_key} = {other}; they must be equal")]
    Mismatch {
        /// Key of the first.
        key: &'static str,
        /// Its value.
        value: usize,
        /// Key of the second.
        other_key: &'static str,
        /// Its value.
        other: usize,
    },
    /// A number outside its range.
    #[error("config.json has {key} = {value}, but it must be {expected}")]
    Number {
        /// Key in the file.
        key: &'static str,
        /// Value in the file.
        value: f64,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A feature of the family that this crate does not run.
    #[error("config.json has {key} = {value}, which does not run here; accepted is {accepted}")]
    Unsupported {
        /// Key in the file.
        key: &'static str,
        /// Value in the file.
        value: String,
        /// What would be accepted.
        accepted: &'static str,
    },
}

/// Shape of a decoder and its special tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The family, which fixes the layers and their order.
    pub architecture: Architecture,
    /// Rows of the embedding, V.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads, H.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head, where it is not `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// Positions that the model was made for: the longest prompt and completion together.
    pub max_position_embeddings: usize,
    /// Rotary embedding, of layers that see everything if those with a window have one of their own.
    pub rope: Rope,
    /// Rotary embedding of layers with a window, in families that tell them apart.
    pub local_rope: Option<Rope>,
    /// What each layer sees; empty where all see everything.
    pub layer_types: Vec<LayerType>,
    /// Positions that a layer with a window sees, a token's own included.
    pub sliding_window: Option<usize>,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Biases on q, k, v and the attention's output. Qwen2 has those on q, k and v whatever this says.
    pub attention_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// Scores are divided by its root instead of the root of the head's width (Gemma).
    pub query_pre_attn_scalar: Option<f64>,
    /// Scores s become `cap·tanh(s/cap)`.
    pub attn_logit_softcapping: Option<f64>,
    /// Logits l become `cap·tanh(l/cap)`.
    pub final_logit_softcapping: Option<f64>,
    /// Whether the head is the embedding, transposed.
    pub tie_word_embeddings: bool,
    /// Token that opens a text, if the family has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Token that fills batches in other software; never read here, since rows are ragged.
    pub pad_token_id: Option<u32>,
    /// Keys of the file that say nothing to this crate, written out again as they were.
    pub unknown: Map<String, Value>,
}

/// What a layer's attention sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerType {
    /// Every position up to its own.
    Full,
    /// The last `sliding_window` of them.
    Sliding,
}

impl LayerType {
    /// Every `period`-th of `layers` sees everything, the others have a window.
    pub fn every(period: usize, layers: usize) -> Vec<Self> {
        let kind = |layer: usize| {
            if (layer + 1).is_multiple_of(period) {
                Self::Full
            } else {
                Self::Sliding
            }
        };
        (0..layers).map(kind).collect()
    }

    fn name(self) -> &'static str {
        match self {
            Self::Full => "full_attention",
            Self::Sliding => "sliding_attention",
        }
    }

    fn named(name: &str) -> Result<Self, ConfigError> {
        [Self::Full, Self::Sliding]
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| ConfigError::Unsupported {
                key: "layer_types",
                value: name.chars().take(80).collect(),
                accepted: "full_attention or sliding_attention",
            })
    }
}

/// One id or several: Hugging Face writes both.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(untagged)]
pub(crate) enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    pub(crate) fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }

    pub(crate) fn from_slice(ids: &[u32]) -> Option<Self> {
        match ids {
            [] => None,
            [id] => Some(Self::One(*id)),
            many => Some(Self::Many(many.to_vec())),
        }
    }
}

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// When the text is not such a file, or describes a decoder that does not run here.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config = reading::read(text)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every rule between the fields.
    ///
    /// # Errors
    /// Names the first field that breaks one.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (key, value, max) in [
            ("vocab_size", self.vocab_size, VOCAB_MAX),
            ("hidden_size", self.hidden_size, SIZE_MAX),
            ("intermediate_size", self.intermediate_size, SIZE_MAX),
            ("num_hidden_layers", self.num_hidden_layers, LAYERS_MAX),
            ("num_attention_heads", self.num_attention_heads, SIZE_MAX),
            ("num_key_value_heads", self.num_key_value_heads, SIZE_MAX),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                POSITIONS_MAX,
            ),
        ] {
            if value == 0 || value > max {
                return Err(ConfigError::Size { key, value, max });
            }
        }
        self.validate_heads()?;
        self.validate_layers()?;
        self.rope.validate()?;
        self.local_rope.as_ref().map_or(Ok(()), Rope::validate)?;
        self.validate_numbers()?;
        self.validate_ids()
    }

    fn validate_ids(&self) -> Result<(), ConfigError> {
        if self.eos_token_ids.len() > STOPS_MAX {
            return Err(ConfigError::Size {
                key: "length of eos_token_id",
                value: self.eos_token_ids.len(),
                max: STOPS_MAX,
            });
        }
        let ids = self
            .bos_token_id
            .iter()
            .chain(&self.eos_token_ids)
            .chain(&self.pad_token_id);
        for &id in ids {
            if id as usize >= self.vocab_size {
                return Err(ConfigError::Size {
                    key: "a special token id",
                    value: id as usize,
                    max: self.vocab_size - 1,
                });
            }
        }
        Ok(())
    }

    fn validate_heads(&self) -> Result<(), ConfigError> {
        if self.head_dim.is_none() {
            let by = self.num_attention_heads;
            divisible("hidden_size", self.hidden_size, "num_attention_heads", by)?;
        }
        let (heads, head_dim) = (self.num_attention_heads, self.head_dim());
        for (key, value) in [
            ("head_dim", head_dim),
            (
                "num_attention_heads · head_dim",
                heads.saturating_mul(head_dim),
            ),
        ] {
            if value == 0 || value > SIZE_MAX {
                return Err(ConfigError::Size {
                    key,
                    value,
                    max: SIZE_MAX,
                });
            }
        }
        let by = self.num_key_value_heads;
        divisible("num_attention_heads", heads, "num_key_value_heads", by)?;
        // Rotary embedding turns pairs.
        divisible("head_dim", head_dim, "2", 2)
    }

    fn validate_layers(&self) -> Result<(), ConfigError> {
        if !self.layer_types.is_empty() && self.layer_types.len() != self.num_hidden_layers {
            return Err(ConfigError::Mismatch {
                key: "length of layer_types",
                value: self.layer_types.len(),
                other_key: "num_hidden_layers",
                other: self.num_hidden_layers,
            });
        }
        let window = self.sliding_window.unwrap_or(0);
        if self.layer_types.contains(&LayerType::Sliding) && !(1..=POSITIONS_MAX).contains(&window)
        {
            return Err(ConfigError::Size {
                key: "sliding_window",
                value: window,
                max: POSITIONS_MAX,
            });
        }
        Ok(())
    }

    fn validate_numbers(&self) -> Result<(), ConfigError> {
        let eps = (
            Some(self.rms_norm_eps),
            1e-30..=0.1,
            "above 0 and at most 0.1",
        );
        let scalar = (
            self.query_pre_attn_scalar,
            1e-6..=1e9,
            "between 1e-6 and 1e9",
        );
        let cap = |cap| (cap, 1e-3..=1e6, "between 0.001 and 1e6");
        for (key, (value, range, expected)) in [
            ("rms_norm_eps", eps),
            ("query_pre_attn_scalar", scalar),
            ("attn_logit_softcapping", cap(self.attn_logit_softcapping)),
            ("final_logit_softcapping", cap(self.final_logit_softcapping)),
        ] {
            if let Some(value) = value
                && !range.contains(&value)
            {
                return Err(ConfigError::Number {
                    key,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }

    /// Width of one head, D.
    pub fn head_dim(&self) -> usize {
        self.head_dim
            .unwrap_or_else(|| self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Width of all keys (or all values) of one position.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim()
    }

    /// Positions that a layer sees, a token's own included; none where it sees everything.
    pub(crate) fn window(&self, layer: usize) -> Option<usize> {
        match self.layer_types.get(layer) {
            Some(LayerType::Sliding) => self.sliding_window,
            Some(LayerType::Full) | None => None,
        }
    }

    /// Rotary embeddings that the layers use: the first of layers that see everything, the last of those with a window.
    pub(crate) fn ropes(&self) -> Vec<&Rope> {
        std::iter::once(&self.rope)
            .chain(&self.local_rope)
            .collect()
    }

    /// What a score is multiplied with.
    pub(crate) fn attention_scale(&self) -> f64 {
        let scalar = self.query_pre_attn_scalar;
        1.0 / scalar.unwrap_or_else(|| self.head_dim() as f64).sqrt()
    }

    /// What an embedding is multiplied with. Transformers rounds it to the type of the weights; here they are float32.
    pub(crate) fn embedding_scale(&self) -> Option<f64> {
        let scales = self.architecture.family().scales_embeddings;
        scales.then(|| f64::from((self.hidden_size as f64).sqrt() as f32))
    }

    /// The text of a `config.json` that this crate and Hugging Face transformers load.
    ///
    /// `dtype` is the name transformers uses for the storage of the weights beside it (`bfloat16`, `float32`).
    pub fn to_json(&self, dtype: &str) -> String {
        writing::text(self, dtype)
    }
}

fn divisible(
    key: &'static str,
    value: usize,
    by_key: &'static str,
    by: usize,
) -> Result<(), ConfigError> {
    if value.is_multiple_of(by) {
        return Ok(());
    }
    Err(ConfigError::Indivisible {
        key,
        value,
        by_key,
        by,
    })
}

#[cfg(test)]
mod tests;

//! What a policy is, as Hugging Face's `config.json` says it.
//!
//! Knows names and sizes only, never weights. Invariant: a [`Config`] that was read or validated describes a decoder
//! that this crate runs, with sizes that cannot overflow.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Largest width, head count or layer count accepted: far above any open model, and small enough for products of a few
/// of them to stay within 64 bits.
const SIZE_MAX: usize = 1 << 20;

/// Largest vocabulary accepted: sixteen times the largest in use.
const VOCAB_MAX: usize = 1 << 22;

/// Largest number of positions accepted: the rotary table has one row for each.
const POSITIONS_MAX: usize = 1 << 21;

/// Elements of the rotary table accepted, 1 GiB of them: sixteen times what a context of 128 Ki needs.
const ROTARY_MAX: usize = 1 << 28;

/// Layers accepted: the deepest open decoders have about 130.
const LAYERS_MAX: usize = 1 << 10;

/// A family of decoders that this crate runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Qwen2 and Qwen2.5: RMS norm, rotary embedding, grouped attention with biases on q, k and v, gated MLP.
    Qwen2,
}

impl Architecture {
    /// Names as they stand in `model_type`, for error messages.
    const RUNS: &'static str = "qwen2";

    fn named(model_type: &str) -> Result<Self, ConfigError> {
        match model_type {
            "qwen2" => Ok(Self::Qwen2),
            other => Err(ConfigError::Architecture {
                model_type: other.to_owned(),
                runs: Self::RUNS,
            }),
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qwen2 => formatter.write_str("qwen2"),
        }
    }
}

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
    /// Positions for which rotary angles exist: the longest prompt and completion together.
    pub max_position_embeddings: usize,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Whether the head is the embedding, transposed.
    pub tie_word_embeddings: bool,
    /// Token that opens a text, if the family has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Token that fills batches in other software; never read here, since rows are ragged.
    pub pad_token_id: Option<u32>,
}

/// `config.json` as it stands on disk; unknown keys are other software's and are ignored.
#[derive(Deserialize)]
struct Raw {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    rope_parameters: Option<RopeParameters>,
    rope_scaling: Option<Value>,
    rms_norm_eps: f64,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<TokenIds>,
    pad_token_id: Option<u32>,
}

/// Where transformers 5 keeps the rotary base.
#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
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
        // The family is looked at first: a file of another family lacks keys, and saying which would mislead.
        let value: Value = serde_json::from_str(text)
            .map_err(|error| ConfigError::Unreadable(error.to_string()))?;
        let model_type = value
            .get("model_type")
            .and_then(Value::as_str)
            .unwrap_or("(none)");
        let architecture = Architecture::named(model_type)?;
        let raw: Raw = serde_json::from_value(value)
            .map_err(|error| ConfigError::Unreadable(error.to_string()))?;
        raw.refuse_unsupported()?;
        let rope_theta = raw
            .rope_theta
            .or_else(|| {
                raw.rope_parameters
                    .as_ref()
                    .and_then(|rope| rope.rope_theta)
            })
            .unwrap_or(10_000.0);
        let config = Self {
            architecture,
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            max_position_embeddings: raw.max_position_embeddings,
            rope_theta,
            rms_norm_eps: raw.rms_norm_eps,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            bos_token_id: raw.bos_token_id,
            eos_token_ids: raw.eos_token_id.map(TokenIds::into_vec).unwrap_or_default(),
            pad_token_id: raw.pad_token_id,
        };
        config.validate()?;
        if let Some(head_dim) = raw.head_dim
            && head_dim != config.head_dim()
        {
            return Err(ConfigError::Unsupported {
                key: "head_dim",
                value: head_dim.to_string(),
                accepted: "hidden_size / num_attention_heads",
            });
        }
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
        let positions_max = ROTARY_MAX / self.head_dim();
        if self.max_position_embeddings > positions_max {
            return Err(ConfigError::Size {
                key: "max_position_embeddings",
                value: self.max_position_embeddings,
                max: positions_max,
            });
        }
        if !(self.rope_theta.is_finite() && self.rope_theta >= 1.0) {
            return Err(ConfigError::Number {
                key: "rope_theta",
                value: self.rope_theta,
                expected: "a finite number of at least 1",
            });
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps <= 0.1) {
            return Err(ConfigError::Number {
                key: "rms_norm_eps",
                value: self.rms_norm_eps,
                expected: "above 0 and at most 0.1",
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
        for (key, value, by_key, by) in [
            (
                "hidden_size",
                self.hidden_size,
                "num_attention_heads",
                self.num_attention_heads,
            ),
            (
                "num_attention_heads",
                self.num_attention_heads,
                "num_key_value_heads",
                self.num_key_value_heads,
            ),
            // Rotary embedding turns pairs.
            ("hidden_size / num_attention_heads", self.head_dim(), "2", 2),
        ] {
            if value % by != 0 {
                return Err(ConfigError::Indivisible {
                    key,
                    value,
                    by_key,
                    by,
                });
            }
        }
        Ok(())
    }

    /// Width of one head, D.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Width of all keys (or all values) of one position.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim()
    }

    /// The text of a `config.json` that this crate and Hugging Face transformers load.
    ///
    /// `dtype` is the name transformers uses for the storage of the weights beside it (`bfloat16`, `float32`).
    pub fn to_json(&self, dtype: &str) -> String {
        let mut value = json!({
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": self.architecture.to_string(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "max_position_embeddings": self.max_position_embeddings,
            // Both places: transformers 4 reads the first, 5 the second.
            "rope_theta": self.rope_theta,
            "rope_parameters": { "rope_theta": self.rope_theta, "rope_type": "default" },
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_sliding_window": false,
            "torch_dtype": dtype,
        });
        if let Value::Object(fields) = &mut value {
            let ids = [
                ("bos_token_id", self.bos_token_id.map(TokenIds::One)),
                ("eos_token_id", TokenIds::from_slice(&self.eos_token_ids)),
                ("pad_token_id", self.pad_token_id.map(TokenIds::One)),
            ];
            for (key, id) in ids {
                fields.insert(key.to_owned(), id.map_or(Value::Null, |id| json!(id)));
            }
        }
        format!("{value:#}\n")
    }
}

impl Raw {
    fn refuse_unsupported(&self) -> Result<(), ConfigError> {
        let refuse = |key, value: String, accepted| {
            Err(ConfigError::Unsupported {
                key,
                value,
                accepted,
            })
        };
        if let Some(act) = self.hidden_act.as_deref().filter(|&act| act != "silu") {
            return refuse("hidden_act", act.to_owned(), "silu");
        }
        if self.use_sliding_window == Some(true) {
            return refuse("use_sliding_window", "true".to_owned(), "false");
        }
        if let Some(scaling) = self
            .rope_scaling
            .as_ref()
            .filter(|scaling| !is_default_rope(scaling))
        {
            return refuse("rope_scaling", scaling.to_string(), "null");
        }
        let rope_type = self
            .rope_parameters
            .as_ref()
            .and_then(|rope| rope.rope_type.as_deref());
        if let Some(kind) = rope_type.filter(|&kind| kind != "default") {
            return refuse("rope_parameters.rope_type", kind.to_owned(), "default");
        }
        let layer_types = self.layer_types.iter().flatten();
        for kind in layer_types {
            if kind != "full_attention" {
                return refuse("layer_types", kind.clone(), "full_attention in every layer");
            }
        }
        Ok(())
    }
}

fn is_default_rope(scaling: &Value) -> bool {
    scaling.is_null()
        || ["rope_type", "type"]
            .iter()
            .any(|key| scaling.get(key).and_then(Value::as_str) == Some("default"))
}

#[cfg(test)]
mod tests;

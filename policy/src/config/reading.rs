//! Reads a `config.json` into a [`Config`]: which keys are read, their defaults, and which keys are refused because they
//! change what the model computes.
//!
//! Bounds are checked afterwards by [`Config::validate`]. Invariant: a key that changes what the decoder computes is read or
//! refused by name; all others are kept unchanged.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::bounds::{LAYERS_MAX, check_size};
use super::error::ModelConfigError;
use super::family::Architecture;
use super::layers::LayerType;
use super::rope::{Rope, RopeScaling};
use super::shape::{Config, TokenIds};
use super::writing;

/// Keys that are read, or follow from others, and that [`writing::keys`] may leave out; they are not kept as unknown.
const READ: [&str; 12] = [
    "architectures",
    "attn_logit_softcapping",
    "dtype",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "layer_types",
    "mlp_bias",
    "original_max_position_embeddings",
    "rope_scaling",
    "torch_dtype",
];

/// Keys of models that compute more than their family does, and the supported value. They may be absent, null, false, zero
/// or empty.
const REFUSED: [(&str, &str); 10] = [
    ("auto_map", "no code of its own"),
    ("attention_chunk_size", "null"),
    ("compression_config", "null"),
    ("logit_scale", "null"),
    ("no_rope_layers", "null"),
    ("num_experts", "null"),
    ("num_local_experts", "null"),
    ("quantization_config", "null: weights in f32, f16 or bf16"),
    ("use_bidirectional_attention", "false"),
    ("use_mrope", "false"),
];

#[derive(Deserialize)]
struct Raw {
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    original_max_position_embeddings: Option<usize>,
    rope_theta: Option<f64>,
    rope_local_base_freq: Option<f64>,
    rope_parameters: Option<Map<String, Value>>,
    rope_scaling: Option<Map<String, Value>>,
    partial_rotary_factor: Option<f64>,
    rope_interleaved: Option<bool>,
    rms_norm_eps: Option<f64>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    use_sliding_window: Option<bool>,
    /// Absent means the default window, null means no window.
    #[serde(default = "window_default")]
    sliding_window: Option<usize>,
    sliding_window_pattern: Option<usize>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    query_pre_attn_scalar: Option<f64>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<TokenIds>,
    pad_token_id: Option<u32>,
}

/// Transformers' default in every family with sliding windows.
fn window_default() -> Option<usize> {
    Some(4096)
}

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// When the text is unreadable, or describes a decoder that this crate does not run.
    pub fn parse(text: &str) -> Result<Self, ModelConfigError> {
        let config = read(text)?;
        config.validate()?;
        Ok(config)
    }
}

/// Reads the text of a `config.json` without checking bounds.
fn read(text: &str) -> Result<Config, ModelConfigError> {
    let unreadable = |error: serde_json::Error| ModelConfigError::Unreadable(error.to_string());
    let file: Map<String, Value> = serde_json::from_str(text).map_err(unreadable)?;
    let (architecture, keys) = text_decoder(file)?;
    refuse_extensions(&keys)?;
    let raw: Raw = serde_json::from_value(Value::Object(keys.clone())).map_err(unreadable)?;
    raw.refuse_unsupported(architecture)?;
    let mut config = raw.config(architecture)?;
    let written = writing::keys(&config, "");
    config.unknown = keys
        .into_iter()
        .filter(|(key, _)| !READ.contains(&key.as_str()) && !written.contains_key(key))
        .collect();
    Ok(config)
}

/// The family and its keys. A multimodal model has them in `text_config`, except special tokens and tying.
fn text_decoder(
    mut file: Map<String, Value>,
) -> Result<(Architecture, Map<String, Value>), ModelConfigError> {
    let text_of = |keys: &Map<String, Value>, key: &str| {
        keys.get(key).and_then(Value::as_str).map(str::to_owned)
    };
    // The family comes first: a file of another family may lack keys, and an error about those would mislead.
    let model_type = text_of(&file, "model_type").unwrap_or_else(|| "(none)".to_owned());
    if model_type != "gemma3" {
        let architecture = Architecture::from_model_type(&model_type)?;
        refuse_class(&file, architecture.family().class)?;
        return Ok((architecture, file));
    }
    refuse_class(&file, "Gemma3ForConditionalGeneration")?;
    let Some(Value::Object(mut keys)) = file.remove("text_config") else {
        return Err(ModelConfigError::Unreadable(
            "text_config is missing".to_owned(),
        ));
    };
    let inner = text_of(&keys, "model_type").unwrap_or_else(|| "gemma3_text".to_owned());
    let architecture = Architecture::from_model_type(&inner)?;
    for key in [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
    ] {
        if let Some(value) = file.remove(key).filter(|value| !value.is_null()) {
            keys.insert(key.to_owned(), value);
        }
    }
    Ok((architecture, keys))
}

/// Other classes have other weights: a classifier has no head over the vocabulary.
fn refuse_class(file: &Map<String, Value>, class: &'static str) -> Result<(), ModelConfigError> {
    let classes = file.get("architectures").and_then(Value::as_array);
    let named = classes.into_iter().flatten().filter_map(Value::as_str);
    match named.into_iter().find(|&name| name != class) {
        None => Ok(()),
        Some(other) => Err(ModelConfigError::Unsupported {
            key: "architectures",
            value: other.to_owned(),
            supported: class,
        }),
    }
}

fn refuse_extensions(keys: &Map<String, Value>) -> Result<(), ModelConfigError> {
    for (key, accepted) in REFUSED {
        let absent = match keys.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Number(number)) => number.as_f64() == Some(0.0),
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(fields)) => fields.is_empty(),
            Some(_) => false,
        };
        if !absent {
            return Err(ModelConfigError::Unsupported {
                key,
                value: brief(&keys[key]),
                supported: accepted,
            });
        }
    }
    Ok(())
}

/// The start of a value, for a one-line message.
fn brief(value: &Value) -> String {
    const CHARACTERS: usize = 80;
    let text = value.to_string();
    if text.chars().count() <= CHARACTERS {
        return text;
    }
    text.chars().take(CHARACTERS).chain("…".chars()).collect()
}

impl Raw {
    fn refuse_unsupported(&self, architecture: Architecture) -> Result<(), ModelConfigError> {
        let family = architecture.family();
        let refuse = |key, value: String, accepted| {
            Err(ModelConfigError::Unsupported {
                key,
                value,
                supported: accepted,
            })
        };
        for (key, activation) in [
            ("hidden_act", &self.hidden_act),
            ("hidden_activation", &self.hidden_activation),
        ] {
            if let Some(activation) = activation
                && key == family.activation_key
                && activation != family.activation_name
            {
                return refuse(key, activation.clone(), family.activation_name);
            }
        }
        if let Some(part) = self.partial_rotary_factor.filter(|&part| part != 1.0) {
            return refuse("partial_rotary_factor", part.to_string(), "1");
        }
        if self.rope_interleaved == Some(true) {
            return refuse("rope_interleaved", "true".to_owned(), "false");
        }
        Ok(())
    }

    fn config(self, architecture: Architecture) -> Result<Config, ModelConfigError> {
        let defaults = architecture.defaults();
        let num_hidden_layers = self.num_hidden_layers.unwrap_or(defaults.num_hidden_layers);
        let heads = self
            .num_attention_heads
            .unwrap_or(defaults.num_attention_heads);
        // Without the key, a family that groups heads by default keeps its number of groups; others do not group.
        let grouped = defaults.num_key_value_heads != defaults.num_attention_heads;
        let key_heads = if grouped {
            defaults.num_key_value_heads
        } else {
            heads
        };
        let max_position_embeddings = self
            .max_position_embeddings
            .unwrap_or(defaults.max_position_embeddings);
        let (rope, local_rope) = self.ropes(&defaults, max_position_embeddings)?;
        let layer_types = self.layer_types(&defaults, architecture, num_hidden_layers)?;
        let slides = layer_types.contains(&LayerType::Sliding);
        Ok(Config {
            architecture,
            vocab_size: self.vocab_size.unwrap_or(defaults.vocab_size),
            hidden_size: self.hidden_size.unwrap_or(defaults.hidden_size),
            intermediate_size: self.intermediate_size.unwrap_or(defaults.intermediate_size),
            num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(key_heads),
            head_dim: self.head_dim.or(defaults.head_dim),
            max_position_embeddings,
            rope,
            local_rope,
            sliding_window: self.sliding_window.filter(|_| slides),
            layer_types,
            rms_norm_eps: self.rms_norm_eps.unwrap_or(defaults.rms_norm_eps),
            attention_bias: self.attention_bias.unwrap_or(false),
            mlp_bias: self.mlp_bias.unwrap_or(false),
            query_pre_attn_scalar: defaults
                .query_pre_attn_scalar
                .map(|scalar| self.query_pre_attn_scalar.unwrap_or(scalar)),
            attn_logit_softcapping: self.attn_logit_softcapping,
            final_logit_softcapping: self.final_logit_softcapping,
            tie_word_embeddings: self
                .tie_word_embeddings
                .unwrap_or(defaults.tie_word_embeddings),
            bos_token_id: self.bos_token_id,
            eos_token_ids: self
                .eos_token_id
                .map(TokenIds::into_vec)
                .unwrap_or_default(),
            pad_token_id: self.pad_token_id,
            unknown: Map::new(),
        })
    }

    /// Rotary embeddings of layers with full attention and with sliding windows.
    ///
    /// Files of transformers 4 have `rope_theta` and `rope_scaling`. Files of transformers 5 have `rope_parameters` with the
    /// same keys, which Gemma splits by layer type. If both exist, transformers prefers `rope_scaling`, and an inner
    /// `rope_theta` over an outer one.
    fn ropes(
        &self,
        defaults: &Config,
        positions: usize,
    ) -> Result<(Rope, Option<Rope>), ModelConfigError> {
        let empty = Map::new();
        let parameters = self.rope_parameters.as_ref().unwrap_or(&empty);
        let scaling = self.rope_scaling.as_ref().filter(|keys| !keys.is_empty());
        let outer = OuterKeys {
            theta: self.rope_theta.unwrap_or(defaults.rope.theta),
            positions: self.original_max_position_embeddings,
            positions_default: positions,
        };
        let Some(local) = &defaults.local_rope else {
            return Ok((read_rope(scaling.unwrap_or(parameters), &outer)?, None));
        };
        let of = |kind: &str| match parameters.get(kind) {
            Some(Value::Object(keys)) => keys.clone(),
            _ => Map::new(),
        };
        let mut full = of(LayerType::Full.name());
        full.extend(
            scaling
                .into_iter()
                .flatten()
                .map(|(key, value)| (key.clone(), value.clone())),
        );
        let local = OuterKeys {
            theta: self.rope_local_base_freq.unwrap_or(local.theta),
            ..outer
        };
        let sliding = read_rope(&of(LayerType::Sliding.name()), &local)?;
        Ok((read_rope(&full, &outer)?, Some(sliding)))
    }

    fn layer_types(
        &self,
        defaults: &Config,
        architecture: Architecture,
        layers: usize,
    ) -> Result<Vec<LayerType>, ModelConfigError> {
        // Checked before a list of that size is made.
        check_size("num_hidden_layers", layers, LAYERS_MAX)?;
        let by_depth = architecture.family().windows_by_depth;
        let slides = match architecture {
            _ if by_depth => self.use_sliding_window == Some(true) && self.sliding_window.is_some(),
            _ => defaults.sliding_window.is_some(),
        };
        if let Some(names) = &self.layer_types {
            let types: Vec<_> = names
                .iter()
                .map(|name| LayerType::from_name(name))
                .collect::<Result<_, _>>()?;
            if types.contains(&LayerType::Sliding) && !slides {
                return Err(ModelConfigError::Unsupported {
                    key: "layer_types",
                    value: LayerType::Sliding.name().to_owned(),
                    supported: "full_attention in every layer, unless the family and use_sliding_window allow a window",
                });
            }
            return Ok(types);
        }
        if !slides {
            return Ok(Vec::new());
        }
        if by_depth {
            // 28 is transformers' default.
            let first = self.max_window_layers.unwrap_or(28);
            let layer_type = |layer| {
                if layer >= first {
                    LayerType::Sliding
                } else {
                    LayerType::Full
                }
            };
            return Ok((0..layers).map(layer_type).collect());
        }
        let period = self.sliding_window_pattern.unwrap_or(6);
        check_size("sliding_window_pattern", period, LAYERS_MAX)?;
        Ok(LayerType::every(period, layers))
    }
}

/// Values outside the keys of a rotary embedding.
#[derive(Clone, Copy)]
struct OuterKeys {
    theta: f64,
    /// Positions of the original training. They take precedence over the inner key.
    positions: Option<usize>,
    /// For files without that key.
    positions_default: usize,
}

fn read_rope(keys: &Map<String, Value>, outer: &OuterKeys) -> Result<Rope, ModelConfigError> {
    let unreadable = |error: serde_json::Error| {
        ModelConfigError::Unreadable(format!("the keys of its rotary embedding: {error}"))
    };
    let kind = ["rope_type", "type"]
        .iter()
        .find_map(|key| keys.get(*key)?.as_str());
    let kind = kind.unwrap_or("default");
    let partial = keys
        .get("partial_rotary_factor")
        .filter(|part| part.as_f64() != Some(1.0));
    if let Some(part) = partial.filter(|part| !part.is_null()) {
        return Err(ModelConfigError::Unsupported {
            key: "partial_rotary_factor",
            value: brief(part),
            supported: "1",
        });
    }
    let mut keys = keys.clone();
    keys.insert("rope_type".to_owned(), kind.into());
    if matches!(kind, "llama3" | "yarn") {
        let key = "original_max_position_embeddings";
        if let Some(positions) = outer.positions {
            keys.insert(key.to_owned(), positions.into());
        } else if keys.get(key).is_none_or(Value::is_null) {
            keys.insert(key.to_owned(), outer.positions_default.into());
        }
        let original = keys[key].as_f64().unwrap_or(0.0);
        if kind == "yarn" && keys.get("factor").is_none_or(Value::is_null) && original > 0.0 {
            keys.insert(
                "factor".to_owned(),
                (outer.positions_default as f64 / original).into(),
            );
        }
    }
    let theta = match keys.get("rope_theta").filter(|theta| !theta.is_null()) {
        None => outer.theta,
        Some(theta) => theta.as_f64().unwrap_or(f64::NAN),
    };
    if !["default", "linear", "dynamic", "llama3", "yarn"].contains(&kind) {
        return Err(ModelConfigError::Unsupported {
            key: "rope_type",
            value: kind.chars().take(80).collect(),
            supported: RopeScaling::SUPPORTED,
        });
    }
    let scaling = serde_json::from_value(Value::Object(keys)).map_err(unreadable)?;
    Ok(Rope { theta, scaling })
}

//! A [`Config`] as a `config.json` that this crate and Hugging Face transformers load. Unknown keys of the original file are
//! kept.

use serde_json::{Map, Value, json};

use super::layers::LayerType;
use super::rope::{Rope, RopeScaling};
use super::shape::{Config, TokenIds};

impl Config {
    /// The text of a `config.json` that this crate and Hugging Face transformers load.
    ///
    /// `dtype` is transformers' name for the storage of the weights beside it (`bfloat16`, `float32`).
    pub fn to_json(&self, dtype: &str) -> String {
        let mut fields = self.unknown.clone();
        fields.extend(keys(self, dtype));
        format!("{:#}\n", Value::Object(fields))
    }
}

/// All keys that describe the configuration.
pub(super) fn keys(config: &Config, dtype: &str) -> Map<String, Value> {
    let family = config.architecture.family();
    let mut keys = object(json!({
        "architectures": [family.class],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
    }));
    let mut put = |key: &str, value: Value| keys.insert(key.to_owned(), value);
    put(family.activation_key, family.activation_name.into());
    if let Some(head_dim) = config.head_dim {
        put("head_dim", head_dim.into());
    }
    if !family.always_biased {
        put("attention_bias", config.attention_bias.into());
    }
    if config.mlp_bias {
        put("mlp_bias", true.into());
    }
    let ids = [
        ("bos_token_id", config.bos_token_id.map(TokenIds::One)),
        ("eos_token_id", TokenIds::from_slice(&config.eos_token_ids)),
        ("pad_token_id", config.pad_token_id.map(TokenIds::One)),
    ];
    for (key, id) in ids {
        put(key, id.map_or(Value::Null, |id| json!(id)));
    }
    keys.extend(rope_keys(config));
    keys.extend(window_keys(config));
    keys.extend(gemma_keys(config));
    keys
}

/// Transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 reads `rope_parameters`.
fn rope_keys(config: &Config) -> Map<String, Value> {
    let mut keys = Map::new();
    keys.insert("rope_theta".to_owned(), config.rope.theta.into());
    if config.rope.scaling != RopeScaling::Default {
        let scaling = scaling_keys(&config.rope);
        keys.insert("rope_scaling".to_owned(), Value::Object(scaling));
    }
    let with_theta = |rope: &Rope| {
        let mut keys = scaling_keys(rope);
        keys.insert("rope_theta".to_owned(), rope.theta.into());
        keys
    };
    let parameters = match &config.local_rope {
        None => json!(with_theta(&config.rope)),
        Some(local) => {
            keys.insert("rope_local_base_freq".to_owned(), local.theta.into());
            json!({
                LayerType::Full.name(): with_theta(&config.rope),
                LayerType::Sliding.name(): with_theta(local),
            })
        }
    };
    keys.insert("rope_parameters".to_owned(), parameters);
    keys
}

fn scaling_keys(rope: &Rope) -> Map<String, Value> {
    object(json!(rope.scaling))
}

fn window_keys(config: &Config) -> Map<String, Value> {
    let mut keys = Map::new();
    let slides = config.layer_types.contains(&LayerType::Sliding);
    if config.architecture.family().windows_by_depth {
        keys.insert("use_sliding_window".to_owned(), slides.into());
    }
    if !config.layer_types.is_empty() {
        let names: Vec<&str> = config.layer_types.iter().map(|kind| kind.name()).collect();
        keys.insert("layer_types".to_owned(), names.into());
    }
    if let Some(window) = config.sliding_window {
        keys.insert("sliding_window".to_owned(), window.into());
    }
    keys
}

fn gemma_keys(config: &Config) -> Map<String, Value> {
    let mut keys = Map::new();
    if let Some(scalar) = config.query_pre_attn_scalar {
        // Transformers accepts integers only.
        let whole = (scalar.fract() == 0.0).then_some(scalar as u64);
        keys.insert(
            "query_pre_attn_scalar".to_owned(),
            whole.map_or_else(|| scalar.into(), Value::from),
        );
        for (key, cap) in [
            ("attn_logit_softcapping", config.attn_logit_softcapping),
            ("final_logit_softcapping", config.final_logit_softcapping),
        ] {
            keys.insert(key.to_owned(), cap.map_or(Value::Null, Value::from));
        }
    }
    keys
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

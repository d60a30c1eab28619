//! The shape of a decoder and its special tokens.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::bounds::{
    EOS_IDS_MAX, LAYERS_MAX, POSITIONS_MAX, SIZE_MAX, VOCAB_MAX, check_divisible, check_number,
    check_size,
};
use super::error::ModelConfigError;
use super::family::Architecture;
use super::layers::LayerType;
use super::rope::Rope;

/// Shape of a decoder and its special tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub architecture: Architecture,
    /// Rows of the embedding, V.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    /// Query heads, H.
    pub num_attention_heads: usize,
    /// Key and value heads; a divisor of the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head, if it is not `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// Most tokens of a prompt and its completion together.
    pub max_position_embeddings: usize,
    /// Rotary embedding of all layers, or of those with full attention if `local_rope` is set.
    pub rope: Rope,
    /// Rotary embedding of layers with a sliding window, in families where it differs.
    pub local_rope: Option<Rope>,
    /// Of each layer; empty if all have full attention.
    pub layer_types: Vec<LayerType>,
    /// Positions that a sliding layer attends to, including the token's own.
    pub sliding_window: Option<usize>,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Biases on q, k, v and the attention's output. Qwen2 always has those on q, k and v.
    pub attention_bias: bool,
    pub mlp_bias: bool,
    /// Attention scores are divided by its square root instead of that of the head's width (Gemma).
    pub query_pre_attn_scalar: Option<f64>,
    /// Attention scores s become `cap·tanh(s/cap)`.
    pub attn_logit_softcapping: Option<f64>,
    /// Logits l become `cap·tanh(l/cap)`.
    pub final_logit_softcapping: Option<f64>,
    /// Whether the head is the transposed embedding.
    pub tie_word_embeddings: bool,
    /// Token that opens a text, if the family has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Token that pads batches in other software; unused here, because rows are ragged.
    pub pad_token_id: Option<u32>,
    /// Keys of the file that this crate does not read, written back unchanged.
    pub unknown: Map<String, Value>,
}

/// One id or several; Hugging Face writes both.
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
    /// Checks every rule between the fields.
    ///
    /// # Errors
    /// Names the first key that breaks one.
    pub fn validate(&self) -> Result<(), ModelConfigError> {
        check_size("vocab_size", self.vocab_size, VOCAB_MAX)?;
        check_size("hidden_size", self.hidden_size, SIZE_MAX)?;
        check_size("intermediate_size", self.intermediate_size, SIZE_MAX)?;
        check_size("num_hidden_layers", self.num_hidden_layers, LAYERS_MAX)?;
        check_size("num_attention_heads", self.num_attention_heads, SIZE_MAX)?;
        check_size("num_key_value_heads", self.num_key_value_heads, SIZE_MAX)?;
        let positions = self.max_position_embeddings;
        check_size("max_position_embeddings", positions, POSITIONS_MAX)?;
        self.validate_heads()?;
        self.validate_layers()?;
        self.rope.validate()?;
        self.local_rope.as_ref().map_or(Ok(()), Rope::validate)?;
        self.validate_numbers()?;
        self.validate_ids()
    }

    fn validate_heads(&self) -> Result<(), ModelConfigError> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if self.head_dim.is_none() {
            check_divisible("hidden_size", hidden, "num_attention_heads", heads)?;
        }
        let head_dim = self.head_dim();
        check_size("head_dim", head_dim, SIZE_MAX)?;
        let width = heads.saturating_mul(head_dim);
        check_size("num_attention_heads · head_dim", width, SIZE_MAX)?;
        let key_heads = self.num_key_value_heads;
        check_divisible(
            "num_attention_heads",
            heads,
            "num_key_value_heads",
            key_heads,
        )?;
        // The rotary embedding rotates pairs.
        check_divisible("head_dim", head_dim, "2", 2)
    }

    fn validate_layers(&self) -> Result<(), ModelConfigError> {
        if !self.layer_types.is_empty() && self.layer_types.len() != self.num_hidden_layers {
            return Err(ModelConfigError::Mismatch {
                key: "length of layer_types",
                value: self.layer_types.len(),
                other_key: "num_hidden_layers",
                other: self.num_hidden_layers,
            });
        }
        if self.layer_types.contains(&LayerType::Sliding) {
            let window = self.sliding_window.unwrap_or(0);
            check_size("sliding_window", window, POSITIONS_MAX)?;
        }
        Ok(())
    }

    fn validate_numbers(&self) -> Result<(), ModelConfigError> {
        let eps = self.rms_norm_eps;
        check_number("rms_norm_eps", eps, 1e-30..=0.1, "above 0 and at most 0.1")?;
        if let Some(scalar) = self.query_pre_attn_scalar {
            let range = 1e-6..=1e9;
            check_number(
                "query_pre_attn_scalar",
                scalar,
                range,
                "between 1e-6 and 1e9",
            )?;
        }
        for (key, cap) in [
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ] {
            if let Some(cap) = cap {
                check_number(key, cap, 1e-3..=1e6, "between 0.001 and 1e6")?;
            }
        }
        Ok(())
    }

    fn validate_ids(&self) -> Result<(), ModelConfigError> {
        let eos = self.eos_token_ids.len();
        if eos > 0 {
            check_size("length of eos_token_id", eos, EOS_IDS_MAX)?;
        }
        let ids = self
            .bos_token_id
            .iter()
            .chain(&self.eos_token_ids)
            .chain(&self.pad_token_id);
        for &id in ids {
            if id as usize >= self.vocab_size {
                return Err(ModelConfigError::TokenId {
                    id,
                    vocab_size: self.vocab_size,
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

    /// Width of all keys, or of all values, of one position.
    pub(crate) fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim()
    }

    /// Positions that a layer attends to, including the token's own; `None` for full attention.
    pub(crate) fn window(&self, layer: usize) -> Option<usize> {
        match self.layer_types.get(layer) {
            Some(LayerType::Sliding) => self.sliding_window,
            Some(LayerType::Full) | None => None,
        }
    }

    /// Rotary embeddings of the layers: the first is for full attention, the last for sliding windows.
    pub(crate) fn ropes(&self) -> Vec<&Rope> {
        std::iter::once(&self.rope)
            .chain(&self.local_rope)
            .collect()
    }

    /// Factor of an attention score.
    pub(crate) fn attention_scale(&self) -> f64 {
        let scalar = self.query_pre_attn_scalar;
        1.0 / scalar.unwrap_or_else(|| self.head_dim() as f64).sqrt()
    }

    /// Factor of an embedding. Transformers rounds it to the type of the weights; here it stays float32.
    pub(crate) fn embedding_scale(&self) -> Option<f64> {
        let scales = self.architecture.family().scales_embeddings;
        scales.then(|| f64::from((self.hidden_size as f64).sqrt() as f32))
    }
}

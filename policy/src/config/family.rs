//! Families of decoders: what is the same in every model of a family, and what a file that leaves a key out means by it.
//!
//! Knows no weights and no kernels. Invariant: nothing else in the crate asks which family it runs; the differences between
//! families are the values of one [`Family`] and of the configuration's fields.

use std::fmt;

use super::{Config, ConfigError, LayerType, Rope};

/// A family of decoders that this crate runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 3 and what follows its form (SmolLM2): RMS norm, rotary embedding, grouped attention, gated MLP.
    Llama,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: norms on q and k, heads of their own width.
    Qwen3,
    /// Gemma 3, the text decoder: norms on both sides of each branch, layers with a sliding window.
    Gemma3,
}

/// Function between gate and product in the gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x·σ(x)`
    Silu,
    /// `x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`
    GeluTanh,
}

/// What the models of a family share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Family {
    /// Name in `model_type`.
    pub(crate) model_type: &'static str,
    /// Name in `architectures`.
    pub(crate) class: &'static str,
    /// Key and name of the activation in the file.
    pub(crate) activation_key: &'static str,
    pub(crate) activation_name: &'static str,
    pub(crate) activation: Activation,
    /// Biases on q, k and v whatever the file says.
    pub(crate) always_biased: bool,
    /// Norms on each head of q and k.
    pub(crate) head_norms: bool,
    /// Norms on what a branch adds to the residual stream, and not only on what it reads.
    pub(crate) branch_norms: bool,
    /// Added to the weight of every norm.
    pub(crate) norm_offset: f32,
    /// Whether embeddings are multiplied by √width.
    pub(crate) scales_embeddings: bool,
    /// Rotary base of layers with a sliding window, where those have an embedding of their own.
    pub(crate) local_theta: Option<f64>,
    /// Whether models of images and text hold this decoder, under names of their own.
    pub(crate) within_images: bool,
    /// Whether the keys of Qwen say which layers have a sliding window.
    pub(crate) windows_by_depth: bool,
}

const LLAMA: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    activation_key: "hidden_act",
    activation_name: "silu",
    activation: Activation::Silu,
    always_biased: false,
    head_norms: false,
    branch_norms: false,
    norm_offset: 0.0,
    scales_embeddings: false,
    local_theta: None,
    within_images: false,
    windows_by_depth: false,
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    always_biased: true,
    windows_by_depth: true,
    ..LLAMA
};

const QWEN3: Family = Family {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    head_norms: true,
    windows_by_depth: true,
    ..LLAMA
};

const GEMMA3: Family = Family {
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    activation_key: "hidden_activation",
    activation_name: "gelu_pytorch_tanh",
    activation: Activation::GeluTanh,
    always_biased: false,
    head_norms: true,
    branch_norms: true,
    norm_offset: 1.0,
    scales_embeddings: true,
    local_theta: Some(10_000.0),
    within_images: true,
    windows_by_depth: false,
};

impl Architecture {
    /// Names as they stand in `model_type`, for error messages.
    pub(super) const RUNS: &'static str = "llama, qwen2, qwen3, gemma3_text, gemma3 (its text)";

    /// The family that a `model_type` names.
    pub(super) fn named(model_type: &str) -> Result<Self, ConfigError> {
        [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Gemma3]
            .into_iter()
            .find(|architecture| architecture.family().model_type == model_type)
            .ok_or_else(|| ConfigError::Architecture {
                model_type: model_type.to_owned(),
                runs: Self::RUNS,
            })
    }

    /// What its models share.
    pub(crate) fn family(self) -> &'static Family {
        match self {
            Self::Llama => &LLAMA,
            Self::Qwen2 => &QWEN2,
            Self::Qwen3 => &QWEN3,
            Self::Gemma3 => &GEMMA3,
        }
    }

    /// The sizes that transformers gives to keys that a file of this family leaves out; published files of Gemma 3 leave
    /// most of them out. No special tokens: those of another model would be wrong in silence.
    pub fn defaults(self) -> Config {
        let llama = Config {
            architecture: self,
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: None,
            max_position_embeddings: 2048,
            rope: Rope::plain(10_000.0),
            local_rope: None,
            layer_types: Vec::new(),
            sliding_window: None,
            rms_norm_eps: 1e-6,
            attention_bias: false,
            mlp_bias: false,
            query_pre_attn_scalar: None,
            attn_logit_softcapping: None,
            final_logit_softcapping: None,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
            unknown: serde_json::Map::new(),
        };
        let qwen = Config {
            vocab_size: 151_936,
            intermediate_size: 22_016,
            max_position_embeddings: 32_768,
            ..llama.clone()
        };
        match self {
            Self::Llama => llama,
            Self::Qwen2 => qwen,
            Self::Qwen3 => Config {
                head_dim: Some(128),
                ..qwen
            },
            Self::Gemma3 => Config {
                vocab_size: 262_208,
                hidden_size: 2304,
                intermediate_size: 9216,
                num_hidden_layers: 26,
                num_attention_heads: 8,
                num_key_value_heads: 4,
                head_dim: Some(256),
                max_position_embeddings: 131_072,
                rope: Rope::plain(1_000_000.0),
                local_rope: self.family().local_theta.map(Rope::plain),
                layer_types: LayerType::every(6, 26),
                sliding_window: Some(4096),
                query_pre_attn_scalar: Some(256.0),
                tie_word_embeddings: true,
                ..llama
            },
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.family().model_type)
    }
}

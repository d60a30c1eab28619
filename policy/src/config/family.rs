//! Families of decoders: the properties that all models of a family share.
//!
//! Knows no weights and no kernels. Invariant: kernels and decoder never ask for the family; all differences between families
//! are values of a [`Family`] and of the configuration's fields.

use std::fmt;

use super::error::ModelConfigError;

/// A family of decoders that this crate runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 3 and models of the same form (SmolLM2): RMS norm, rotary embedding, grouped attention, gated MLP.
    Llama,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: norms on q and k, heads of their own width.
    Qwen3,
    /// Gemma 3, the text decoder: norms on both sides of each branch, layers with a sliding window.
    Gemma3,
}

/// Activation function of the gate in the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x·σ(x)`
    Silu,
    /// `x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`
    GeluTanh,
}

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
    /// Biases on q, k and v even if the file sets none.
    pub(crate) always_biased: bool,
    /// Norms on each head of q and k.
    pub(crate) head_norms: bool,
    /// Norms on the output of each branch as well as on its input.
    pub(crate) branch_norms: bool,
    /// Added to the weight of every norm.
    pub(crate) norm_offset: f32,
    /// Whether embeddings are multiplied by √hidden_size.
    pub(crate) scales_embeddings: bool,
    /// Rotary base of layers with a sliding window, if it differs.
    pub(crate) local_theta: Option<f64>,
    /// Whether multimodal models contain this decoder, under other tensor names.
    pub(crate) in_multimodal: bool,
    /// Whether Qwen's keys select the layers with a sliding window.
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
    in_multimodal: false,
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
    in_multimodal: true,
    windows_by_depth: false,
};

impl Architecture {
    /// Values of `model_type`, for error messages.
    pub(super) const SUPPORTED: &'static str =
        "llama, qwen2, qwen3, gemma3_text, gemma3 (text only)";

    pub(super) fn from_model_type(model_type: &str) -> Result<Self, ModelConfigError> {
        [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Gemma3]
            .into_iter()
            .find(|architecture| architecture.family().model_type == model_type)
            .ok_or_else(|| ModelConfigError::Architecture {
                model_type: model_type.to_owned(),
                supported: Self::SUPPORTED,
            })
    }

    pub(crate) fn family(self) -> &'static Family {
        match self {
            Self::Llama => &LLAMA,
            Self::Qwen2 => &QWEN2,
            Self::Qwen3 => &QWEN3,
            Self::Gemma3 => &GEMMA3,
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.family().model_type)
    }
}

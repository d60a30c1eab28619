//! A GGUF file's metadata as the configuration that Hugging Face would have published, and the file's tensor names.
//!
//! Reads no weights but the rotary factors, which determine the scaling of Llama 3.1. Invariant: metadata that the
//! configuration cannot express is refused by key, never dropped.

use super::error::GgufError;
use super::reader::{Container, Entry};
use crate::config::{Architecture, Config, LAYERS_MAX, LayerType, Rope, RopeScaling};

/// Rotary factors: the configuration expresses them, so they are not a parameter.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Rotary scaling of Llama 3.1, 3.2 and 3.3 except its factor. GGUF stores only the resulting factors.
const LLAMA3_LOW_FREQ_FACTOR: f64 = 1.0;
const LLAMA3_HIGH_FREQ_FACTOR: f64 = 4.0;
const LLAMA3_ORIGINAL_POSITIONS: usize = 8192;

/// In Gemma 3, every sixth layer has full attention.
const GEMMA3_PERIOD: usize = 6;

/// Layers of Gemma 3 27B, the one size that scales scores by its width divided by its heads.
const GEMMA3_27B_LAYERS: usize = 62;

/// Architectures that can be imported, by their names in GGUF.
const SUPPORTED: [(&str, Architecture); 4] = [
    ("llama", Architecture::Llama),
    ("qwen2", Architecture::Qwen2),
    ("qwen3", Architecture::Qwen3),
    ("gemma3", Architecture::Gemma3),
];

/// Keys below the architecture that are read, or that follow from others.
const KEYS: [&str; 17] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "final_logit_softcapping",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.factor",
    "rope.scaling.type",
    "vocab_size",
];

/// The metadata of one model.
pub(super) struct Description<'a> {
    container: &'a Container<'a>,
    prefix: &'static str,
    architecture: Architecture,
}

impl<'a> Description<'a> {
    pub(super) fn new(container: &'a Container<'a>) -> Result<Self, GgufError> {
        let found = container.text("general.architecture")?.unwrap_or("(none)");
        let known = SUPPORTED.iter().find(|(name, _)| *name == found);
        let &(prefix, architecture) = known.ok_or_else(|| GgufError::Architecture {
            found: found.chars().take(80).collect(),
            supported: SUPPORTED.map(|(name, _)| name).join(", "),
        })?;
        let description = Self {
            container,
            prefix,
            architecture,
        };
        description.refuse_unknown()?;
        Ok(description)
    }

    /// Refuses keys that change what the model computes and that the configuration cannot express, such as expert counts.
    fn refuse_unknown(&self) -> Result<(), GgufError> {
        for key in self.container.keys() {
            let Some(own) = key
                .strip_prefix(self.prefix)
                .and_then(|key| key.strip_prefix('.'))
            else {
                continue;
            };
            let is_off = matches!(
                self.container.entry(key),
                Some(
                    Entry::Unsigned(0) | Entry::Signed(0) | Entry::Flag(false) | Entry::Float(0.0)
                )
            );
            if !is_off && !KEYS.contains(&own) {
                return Err(GgufError::Unsupported {
                    key: key.to_owned(),
                });
            }
        }
        Ok(())
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn size(&self, name: &str) -> Result<usize, GgufError> {
        let key = self.key(name);
        let size = self.container.unsigned(&key)?;
        size.and_then(|size| usize::try_from(size).ok())
            .ok_or_else(|| GgufError::metadata(&key, "a whole number of at least 0"))
    }

    fn size_or(&self, name: &str, default: usize) -> Result<usize, GgufError> {
        if self.container.entry(&self.key(name)).is_none() {
            return Ok(default);
        }
        self.size(name)
    }

    /// The configuration without special tokens, which the vocabulary defines.
    pub(super) fn config(&self) -> Result<Config, GgufError> {
        let rows = self.container.tensors.get("token_embd.weight");
        let vocab_size = rows.and_then(|tensor| tensor.shape.first().copied());
        let heads = self.size("attention.head_count")?;
        let hidden = self.size("embedding_length")?;
        let layers = self.size("block_count")?;
        let head_dim = self.size_or("attention.key_length", hidden / heads.max(1))?;
        for name in ["attention.value_length", "rope.dimension_count"] {
            if self.size_or(name, head_dim)? != head_dim {
                return Err(GgufError::Unsupported {
                    key: self.key(name),
                });
            }
        }
        let eps_key = self.key("attention.layer_norm_rms_epsilon");
        let eps = self.container.float(&eps_key)?;
        let mut config = Config {
            vocab_size: vocab_size.ok_or(GgufError::Missing {
                tensor: "token_embd.weight".to_owned(),
            })?,
            hidden_size: hidden,
            intermediate_size: self.size("feed_forward_length")?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: self.size_or("attention.head_count_kv", heads)?,
            head_dim: (heads.checked_mul(head_dim) != Some(hidden)
                || self.architecture == Architecture::Qwen3)
                .then_some(head_dim),
            max_position_embeddings: self.size("context_length")?,
            rms_norm_eps: eps.ok_or_else(|| GgufError::metadata(&eps_key, "a number"))?,
            final_logit_softcapping: self.container.float(&self.key("final_logit_softcapping"))?,
            attention_bias: self.architecture != Architecture::Qwen2
                && self.container.tensors.contains_key("blk.0.attn_q.bias"),
            tie_word_embeddings: !self.container.tensors.contains_key("output.weight"),
            ..self.architecture.defaults()
        };
        config.rope = self.rope(head_dim, config.rope.theta)?;
        if self.architecture == Architecture::Gemma3 {
            self.complete_gemma(&mut config, head_dim)?;
        }
        config.validate()?;
        Ok(config)
    }

    /// Sets what llama.cpp leaves out of its metadata of Gemma 3.
    fn complete_gemma(&self, config: &mut Config, head_dim: usize) -> Result<(), GgufError> {
        let layers = config.num_hidden_layers;
        // Validation refuses the count afterwards; until then it must not size a list.
        if layers > LAYERS_MAX {
            return Ok(());
        }
        let local = self.container.float(&self.key("rope.freq_base_swa"))?;
        if let (Some(theta), Some(rope)) = (local, &mut config.local_rope) {
            rope.theta = theta;
        }
        config.layer_types = LayerType::every(GEMMA3_PERIOD, layers);
        config.sliding_window = Some(self.size("attention.sliding_window")?);
        let scalar = if layers == GEMMA3_27B_LAYERS {
            config.hidden_size / config.num_attention_heads.max(1)
        } else {
            head_dim
        };
        config.query_pre_attn_scalar = Some(scalar as f64);
        config.head_dim = Some(head_dim);
        Ok(())
    }

    fn rope(&self, head_dim: usize, default: f64) -> Result<Rope, GgufError> {
        let theta = self.container.float(&self.key("rope.freq_base"))?;
        let theta = theta.unwrap_or(default);
        let key = self.key("rope.scaling.type");
        let factor = self.container.float(&self.key("rope.scaling.factor"))?;
        let scaling = match (self.container.text(&key)?.unwrap_or("none"), factor) {
            ("none", _) | (_, None | Some(1.0)) => RopeScaling::Default,
            ("linear", Some(factor)) => RopeScaling::Linear { factor },
            _ => return Err(GgufError::Unsupported { key }),
        };
        let rope = Rope { theta, scaling };
        match self.container.tensors.get(ROPE_FACTORS) {
            None => Ok(rope),
            Some(tensor)
                if rope.scaling == RopeScaling::Default && tensor.shape == [head_dim / 2] =>
            {
                let factors = tensor.block.widen(tensor.bytes, head_dim / 2)?;
                llama3(&rope, head_dim, &factors)
            }
            Some(_) => Err(GgufError::Unsupported {
                key: ROPE_FACTORS.to_owned(),
            }),
        }
    }

    /// Name in the file of a parameter of the table, such as `blk.0.attn_q.weight`.
    pub(super) fn tensor_name(&self, parameter: &str) -> Option<String> {
        let (stem, kind) = parameter.rsplit_once('.')?;
        let gemma = self.architecture == Architecture::Gemma3;
        let name = match stem {
            "model.embed_tokens" => "token_embd".to_owned(),
            "model.norm" => "output_norm".to_owned(),
            "lm_head" => "output".to_owned(),
            layer => {
                let (number, part) = layer.strip_prefix("model.layers.")?.split_once('.')?;
                let part = match part {
                    "input_layernorm" => "attn_norm",
                    "self_attn.q_proj" => "attn_q",
                    "self_attn.k_proj" => "attn_k",
                    "self_attn.v_proj" => "attn_v",
                    "self_attn.o_proj" => "attn_output",
                    "self_attn.q_norm" => "attn_q_norm",
                    "self_attn.k_norm" => "attn_k_norm",
                    "mlp.gate_proj" => "ffn_gate",
                    "mlp.up_proj" => "ffn_up",
                    "mlp.down_proj" => "ffn_down",
                    "post_attention_layernorm" if gemma => "post_attention_norm",
                    "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
                    "post_feedforward_layernorm" => "post_ffw_norm",
                    _ => return None,
                };
                format!("blk.{number}.{part}")
            }
        };
        Some(format!("{name}.{kind}"))
    }

    /// llama.cpp adds this to every weight of a parameter: Gemma's norms multiply by one plus the weight.
    pub(super) fn norm_offset(&self, parameter: &str) -> f32 {
        if parameter.ends_with("norm.weight") {
            self.architecture.family().norm_offset
        } else {
            0.0
        }
    }

    /// Number of heads of a parameter whose rows llama.cpp interleaves: its rotary embedding pairs neighbours, that of
    /// Hugging Face pairs the halves of a head.
    pub(super) fn interleaved_heads(&self, parameter: &str, config: &Config) -> Option<usize> {
        if self.architecture != Architecture::Llama {
            return None;
        }
        if parameter.contains(".self_attn.q_proj.") {
            Some(config.num_attention_heads)
        } else if parameter.contains(".self_attn.k_proj.") {
            Some(config.num_key_value_heads)
        } else {
            None
        }
    }
}

/// Row of the file that holds row `row` of a parameter with interleaved heads of width `dim`: within a head, row
/// `h·D/2 + i` is stored as row `2·i + h`.
pub(super) fn interleaved_row(row: usize, dim: usize) -> usize {
    let (head, within) = (row / dim, row % dim);
    let (half, pair) = (within / (dim / 2), within % (dim / 2));
    head * dim + 2 * pair + half
}

/// The scaling that gives these factors.
fn llama3(rope: &Rope, head_dim: usize, factors: &[f32]) -> Result<Rope, GgufError> {
    let largest = factors.iter().copied().fold(1.0f32, f32::max);
    let scaled = Rope {
        theta: rope.theta,
        scaling: RopeScaling::Llama3 {
            factor: f64::from(largest),
            low_freq_factor: LLAMA3_LOW_FREQ_FACTOR,
            high_freq_factor: LLAMA3_HIGH_FREQ_FACTOR,
            original_max_position_embeddings: LLAMA3_ORIGINAL_POSITIONS,
        },
    };
    let (plain, stretched) = (rope.frequencies(head_dim), scaled.frequencies(head_dim));
    let alike = plain
        .iter()
        .zip(&stretched)
        .zip(factors)
        .all(|((plain, stretched), factor)| {
            (plain / stretched - factor).abs() <= 1e-4 * factor.abs()
        });
    if alike {
        return Ok(scaled);
    }
    Err(GgufError::Unsupported {
        key: ROPE_FACTORS.to_owned(),
    })
}

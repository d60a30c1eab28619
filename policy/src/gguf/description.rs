//! A GGUF file's metadata as the configuration that Hugging Face would have published, and its names of tensors.
//!
//! Knows no numbers of the weights but the rotary factors, from which the scaling of Llama 3.1 is read back. Invariant:
//! what the metadata says and the configuration cannot is refused by key, never dropped.

use super::GgufError;
use super::reader::{Container, Entry};
use crate::config::{Architecture, Config, LayerType, Rope, RopeScaling};

/// Tensors that hold what the configuration says.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// What Llama 3.1, 3.2 and 3.3 publish beside the factor of their rotary scaling; GGUF keeps only its effect.
const LLAMA3: (f64, f64, usize) = (1.0, 4.0, 8192);

/// The pattern of Gemma 3: every sixth layer sees everything.
const GEMMA3_PERIOD: usize = 6;

/// Layers of the one Gemma 3 (27B) whose scores are scaled by its width over its heads.
const GEMMA3_27B_LAYERS: usize = 62;

/// Architectures that are read, by their names in GGUF.
const READ: [(&str, Architecture); 4] = [
    ("llama", Architecture::Llama),
    ("qwen2", Architecture::Qwen2),
    ("qwen3", Architecture::Qwen3),
    ("gemma3", Architecture::Gemma3),
];

/// Keys below the architecture that are read, or say what follows from others.
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
        let known = READ.iter().find(|(name, _)| *name == found);
        let &(prefix, architecture) = known.ok_or_else(|| GgufError::Architecture {
            found: found.chars().take(80).collect(),
            read: READ.map(|(name, _)| name).join(", "),
        })?;
        let description = Self {
            container,
            prefix,
            architecture,
        };
        description.refuse_unknown()?;
        Ok(description)
    }

    /// Keys that would change the function and have no place in the configuration, such as counts of experts.
    fn refuse_unknown(&self) -> Result<(), GgufError> {
        for key in self.container.keys() {
            let Some(own) = key
                .strip_prefix(self.prefix)
                .and_then(|key| key.strip_prefix('.'))
            else {
                continue;
            };
            let idle = matches!(
                self.container.entry(key),
                Some(Entry::Unsigned(0) | Entry::Signed(0) | Entry::Flag(false))
            );
            let idle = idle || matches!(self.container.entry(key), Some(Entry::Float(0.0)));
            if !idle && !KEYS.contains(&own) {
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
            .ok_or(GgufError::Metadata {
                key,
                expected: "a whole number of at least 0",
            })
    }

    fn size_or(&self, name: &str, default: usize) -> Result<usize, GgufError> {
        if self.container.entry(&self.key(name)).is_none() {
            return Ok(default);
        }
        self.size(name)
    }

    /// The configuration; special tokens are the tokenizer's to say.
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
        let eps = self
            .container
            .float(&self.key("attention.layer_norm_rms_epsilon"))?;
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
            rms_norm_eps: eps.ok_or_else(|| GgufError::Metadata {
                key: self.key("attention.layer_norm_rms_epsilon"),
                expected: "a number",
            })?,
            final_logit_softcapping: self.container.float(&self.key("final_logit_softcapping"))?,
            attention_bias: self.architecture != Architecture::Qwen2
                && self.container.tensors.contains_key("blk.0.attn_q.bias"),
            tie_word_embeddings: !self.container.tensors.contains_key("output.weight"),
            ..self.architecture.defaults()
        };
        config.rope = self.rope(head_dim, config.rope.theta)?;
        if self.architecture == Architecture::Gemma3 {
            self.describe_gemma(&mut config, head_dim)?;
        }
        config.validate()?;
        Ok(config)
    }

    /// What llama.cpp's description of Gemma 3 leaves to the program.
    fn describe_gemma(&self, config: &mut Config, head_dim: usize) -> Result<(), GgufError> {
        let layers = config.num_hidden_layers;
        // A count of layers that is none would otherwise be a list of that length.
        if layers > 1 << 10 {
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

    /// Added to every weight of a parameter when it was converted: Gemma's norms multiply by one plus the weight.
    pub(super) fn added(&self, parameter: &str) -> f32 {
        let is_norm = parameter.ends_with("norm.weight");
        if is_norm {
            self.architecture.family().norm_offset
        } else {
            0.0
        }
    }

    /// Heads whose rows were put in another order when a parameter was converted: llama.cpp turns neighbours where
    /// Hugging Face turns halves.
    pub(super) fn turned_heads(&self, parameter: &str, config: &Config) -> Option<usize> {
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

/// Row of the file that holds row `row` of a parameter whose `heads` heads of width `dim` were turned: within a head, row
/// `h·D/2 + i` was written as row `2·i + h`.
pub(super) fn turned(row: usize, dim: usize) -> usize {
    let (head, within) = (row / dim, row % dim);
    let (half, pair) = (within / (dim / 2), within % (dim / 2));
    head * dim + 2 * pair + half
}

/// The scaling whose effect the factors are.
fn llama3(rope: &Rope, head_dim: usize, factors: &[f32]) -> Result<Rope, GgufError> {
    let (low_freq_factor, high_freq_factor, original) = LLAMA3;
    let largest = factors.iter().copied().fold(1.0f32, f32::max);
    let scaled = Rope {
        theta: rope.theta,
        scaling: RopeScaling::Llama3 {
            factor: f64::from(largest),
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original,
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

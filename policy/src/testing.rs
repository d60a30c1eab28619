//! Small policies for this crate's tests.

use std::sync::Arc;

use candle_core::Device;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::config::{Architecture, Config, LayerType, Rope, RopeScaling};
use crate::kernels::KernelSet;
use crate::layout::Layout;
use crate::policy::Policy;
use crate::training::optimizer::Master;
use crate::weights::{Image, Storage};

/// Two layers, grouped heads, sizes that are not multiples of a SIMD vector.
pub(crate) fn tiny() -> Config {
    Config {
        rope: Rope::plain(10_000.0),
        tie_word_embeddings: true,
        ..small(Architecture::Qwen2)
    }
}

/// Like [`tiny`], with a separate head.
pub(crate) fn untied() -> Config {
    Config {
        tie_word_embeddings: false,
        ..tiny()
    }
}

/// Angles scaled from 16 positions, and every bias of the family.
pub(crate) fn llama() -> Config {
    Config {
        rope: Rope {
            theta: 500.0,
            scaling: RopeScaling::Llama3 {
                factor: 4.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 16,
            },
        },
        attention_bias: true,
        mlp_bias: true,
        ..small(Architecture::Llama)
    }
}

/// Heads wider than `hidden_size / heads`, and a sliding layer.
pub(crate) fn qwen3() -> Config {
    Config {
        head_dim: Some(10),
        layer_types: vec![LayerType::Full, LayerType::Sliding],
        sliding_window: Some(6),
        attention_bias: true,
        ..small(Architecture::Qwen3)
    }
}

/// Full and sliding layers, and caps low enough to matter.
pub(crate) fn gemma3() -> Config {
    Config {
        num_hidden_layers: 3,
        num_key_value_heads: 1,
        head_dim: Some(12),
        rope: Rope {
            theta: 1000.0,
            scaling: RopeScaling::Linear { factor: 2.0 },
        },
        layer_types: LayerType::every(2, 3),
        sliding_window: Some(5),
        query_pre_attn_scalar: Some(9.0),
        attn_logit_softcapping: Some(3.0),
        final_logit_softcapping: Some(5.0),
        tie_word_embeddings: true,
        ..small(Architecture::Gemma3)
    }
}

/// One configuration of each form.
pub(crate) fn families() -> Vec<Config> {
    vec![tiny(), untied(), llama(), qwen3(), gemma3()]
}

fn small(architecture: Architecture) -> Config {
    Config {
        vocab_size: 37,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 64,
        eos_token_ids: vec![1],
        ..architecture.defaults()
    }
}

/// Weights with biases and norms away from 0 and 1, and logits far enough apart to matter.
pub(crate) fn image(config: &Config, seed: u64) -> Image {
    let master = Master::init(config, seed).unwrap();
    let mut values = master.values().to_vec();
    let mut generator = ChaCha8Rng::seed_from_u64(seed ^ 0xABCD);
    for parameter in master.layout().parameters() {
        for value in &mut values[parameter.range()] {
            if parameter.is_matrix() {
                *value *= match config.architecture {
                    // Gemma scales embeddings itself.
                    Architecture::Gemma3 if parameter.name.contains("embed") => 4.0,
                    _ if parameter.name.contains("embed") => 8.0,
                    _ => 1.4,
                };
            } else {
                *value += generator.random_range(-0.3..0.3);
            }
        }
    }
    Image::from_values(&Layout::new(config), &values, Storage::F32).unwrap()
}

pub(crate) fn policy(config: &Config, seed: u64, kernels: KernelSet) -> Policy {
    Policy::from_image(config, &image(config, seed), kernels, &Device::Cpu).unwrap()
}

pub(crate) const BOTH: [KernelSet; 2] = [KernelSet::Fused, KernelSet::Candle];

/// Random tokens, one text per length.
pub(crate) fn texts(config: &Config, seed: u64, lengths: &[usize]) -> Vec<Arc<[u32]>> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let vocab = config.vocab_size as u32;
    lengths
        .iter()
        .map(|&len| (0..len).map(|_| generator.random_range(0..vocab)).collect())
        .collect()
}

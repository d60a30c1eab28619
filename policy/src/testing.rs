//! Small policies for this crate's tests.

use std::sync::Arc;

use candle_core::Device;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::config::{Architecture, Config};
use crate::kernels::KernelSet;
use crate::layout::Layout;
use crate::optimizer::Master;
use crate::policy::Policy;
use crate::weights::{Image, Storage};

/// Two layers, grouped heads, sizes that are no multiples of a vector.
pub(crate) fn tiny() -> Config {
    Config {
        architecture: Architecture::Qwen2,
        vocab_size: 37,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 64,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_ids: vec![1],
        pad_token_id: None,
    }
}

/// The same with a head of its own.
pub(crate) fn untied() -> Config {
    Config {
        tie_word_embeddings: false,
        ..tiny()
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
                *value *= if parameter.name.contains("embed") {
                    8.0
                } else {
                    1.4
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

/// Texts of random tokens and of the given lengths.
pub(crate) fn texts(config: &Config, seed: u64, lengths: &[usize]) -> Vec<Arc<[u32]>> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let vocab = config.vocab_size as u32;
    lengths
        .iter()
        .map(|&len| (0..len).map(|_| generator.random_range(0..vocab)).collect())
        .collect()
}

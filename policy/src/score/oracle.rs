//! Logits of an independent implementation of each family, candle-transformers, on the same weights.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{gemma3, llama, qwen2, qwen3};

use crate::config::{Architecture, Config, RopeScaling};
use crate::testing::image;

/// Logits `[T, V]` of the policy that `testing::image` makes from the seed.
pub(super) fn logits(config: &Config, seed: u64, tokens: &[u32]) -> Vec<Vec<f32>> {
    let weights = tensors(config, seed);
    let builder = || VarBuilder::from_tensors(weights.clone(), DType::F32, &Device::Cpu);
    // All but Qwen2's give the last position's logits only.
    let prefixes = (1..=tokens.len()).map(|end| {
        let prefix = &tokens[..end];
        Tensor::from_slice(prefix, (1, prefix.len()), &Device::Cpu).unwrap()
    });
    let row = |logits: Tensor| logits.flatten_all().unwrap().to_vec1().unwrap();
    match config.architecture {
        Architecture::Qwen2 => {
            let mut model = qwen2::Model::new(&qwen2_config(config), builder()).unwrap();
            let input = Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu).unwrap();
            let hidden = model.forward(&input, 0, None).unwrap().squeeze(0).unwrap();
            let head = match config.tie_word_embeddings {
                true => &weights["model.embed_tokens.weight"],
                false => &weights["lm_head.weight"],
            };
            hidden
                .matmul(&head.t().unwrap())
                .unwrap()
                .to_vec2()
                .unwrap()
        }
        Architecture::Llama => {
            let other = llama_config(config);
            let model = llama::Llama::load(builder(), &other).unwrap();
            let cache = llama::Cache::new(false, DType::F32, &other, &Device::Cpu).unwrap();
            prefixes
                .map(|prefix| row(model.forward(&prefix, 0, &mut cache.clone()).unwrap()))
                .collect()
        }
        Architecture::Qwen3 => {
            let mut model = qwen3::ModelForCausalLM::new(&qwen3_config(config), builder()).unwrap();
            let mut last = |prefix| {
                model.clear_kv_cache();
                row(model.forward(&prefix, 0).unwrap())
            };
            prefixes.map(&mut last).collect()
        }
        Architecture::Gemma3 => {
            let mut model = gemma3::Model::new(false, &gemma3_config(config), builder()).unwrap();
            let mut last = |prefix| {
                model.clear_kv_cache();
                row(model.forward(&prefix, 0).unwrap())
            };
            prefixes.map(&mut last).collect()
        }
    }
}

fn tensors(config: &Config, seed: u64) -> HashMap<String, Tensor> {
    let (values, layout) = (image(config, seed).values(), crate::Layout::new(config));
    let named = layout.parameters().iter().map(|parameter| {
        let values = &values[parameter.range()];
        let tensor = Tensor::from_slice(values, parameter.shape.clone(), &Device::Cpu).unwrap();
        (parameter.name.clone(), tensor)
    });
    named.collect()
}

fn qwen2_config(config: &Config) -> qwen2::Config {
    qwen2::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        max_position_embeddings: config.max_position_embeddings,
        sliding_window: config.max_position_embeddings,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: config.tie_word_embeddings,
        rope_theta: config.rope.theta,
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

fn llama_config(config: &Config) -> llama::Config {
    let rope_scaling = match config.rope.scaling {
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => Some(llama::Llama3RopeConfig {
            factor: factor as f32,
            low_freq_factor: low_freq_factor as f32,
            high_freq_factor: high_freq_factor as f32,
            original_max_position_embeddings,
            rope_type: llama::Llama3RopeType::Llama3,
        }),
        _ => None,
    };
    llama::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        use_flash_attn: false,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope.theta as f32,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling,
        max_position_embeddings: config.max_position_embeddings,
        tie_word_embeddings: config.tie_word_embeddings,
    }
}

fn qwen3_config(config: &Config) -> qwen3::Config {
    qwen3::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        head_dim: config.head_dim(),
        attention_bias: config.attention_bias,
        num_key_value_heads: config.num_key_value_heads,
        max_position_embeddings: config.max_position_embeddings,
        sliding_window: None,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: config.tie_word_embeddings,
        rope_theta: config.rope.theta,
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

/// Its window is one position wider than transformers', and it divides scores by the root of the head's width whatever the
/// file says: to be asked where neither matters.
fn gemma3_config(config: &Config) -> gemma3::Config {
    gemma3::Config {
        attention_bias: config.attention_bias,
        head_dim: config.head_dim(),
        hidden_activation: Activation::GeluPytorchTanh,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_attention_heads: config.num_attention_heads,
        num_hidden_layers: config.num_hidden_layers,
        num_key_value_heads: config.num_key_value_heads,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope.theta,
        rope_local_base_freq: config
            .local_rope
            .as_ref()
            .map_or(10_000.0, |rope| rope.theta),
        vocab_size: config.vocab_size,
        final_logit_softcapping: config.final_logit_softcapping,
        attn_logit_softcapping: config.attn_logit_softcapping,
        query_pre_attn_scalar: config.head_dim(),
        sliding_window: config
            .sliding_window
            .unwrap_or(config.max_position_embeddings),
        sliding_window_pattern: 2,
        max_position_embeddings: config.max_position_embeddings,
    }
}

//! Defaults for keys that a `config.json` leaves out.

use serde_json::Map;

use super::family::Architecture;
use super::layers::LayerType;
use super::rope::Rope;
use super::shape::Config;

impl Architecture {
    /// The values of transformers for keys that a file of this family leaves out; published files of Gemma 3 leave out most.
    /// Special tokens stay unset, because those of another model would be silently wrong.
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
            unknown: Map::new(),
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

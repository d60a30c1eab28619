//! Models for `muster-bench policy`: a known shape with seeded random weights, written as a Hugging Face folder so that other
//! engines can load the same bytes.
//!
//! Speed depends on the number of weights, not on their values. The tokenizer's vocabulary is full, since reading it is a part of
//! a cold start.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::{Map, Value, json};

use muster_policy::{Config, Master, ModelFolder, Storage, Tokenizer};

/// Seed of the random weights, the same on all machines.
const SEED: u64 = 1;

/// Bytes that a byte-level vocabulary writes as themselves.
const PRINTABLE: std::ops::RangeInclusive<u8> = b'!'..=b'~';

/// A model's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Shape {
    /// The quickstart's: 0.3 million parameters
    Quickstart,
    /// SmolLM2-135M's
    #[value(name = "135m")]
    Smol135m,
}

/// Type of the stored weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Stored {
    /// bfloat16
    Bf16,
    /// float32
    F32,
}

impl Shape {
    fn name(self) -> &'static str {
        match self {
            Self::Quickstart => "quickstart",
            Self::Smol135m => "135m",
        }
    }

    /// Default tokens of a prompt and of an answer.
    pub(super) fn lengths(self) -> (usize, usize) {
        match self {
            Self::Quickstart => (8, 12),
            Self::Smol135m => (64, 32),
        }
    }

    /// The folder of this shape's model below `root`.
    pub(super) fn folder(self, stored: Stored, root: &Path) -> PathBuf {
        let storage = match stored {
            Stored::Bf16 => "bf16",
            Stored::F32 => "f32",
        };
        root.join(format!("{}-{storage}", self.name()))
    }

    fn config(self) -> Value {
        match self {
            Self::Quickstart => json!({
                "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 32,
                "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                "rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
                "hidden_act": "silu", "eos_token_id": 1, "pad_token_id": 0,
            }),
            Self::Smol135m => json!({
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49_152,
                "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
                "rope_theta": 100_000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
                "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
            }),
        }
    }

    pub(super) fn write(self, stored: Stored, folder: &Path) -> Result<()> {
        let config = Config::parse(&self.config().to_string())?;
        let storage = match stored {
            Stored::Bf16 => Storage::Bf16,
            Stored::F32 => Storage::F32,
        };
        let master = Master::init(&config, SEED)?;
        let settings = json!({"eos_token": "!", "pad_token": "!"}).to_string();
        let tokenizer =
            Tokenizer::parse(&vocabulary(config.vocab_size).to_string(), Some(&settings))?;
        tokenizer.check(&config)?;
        let model = ModelFolder {
            image: master.image(storage)?,
            config,
            tokenizer,
        };
        model
            .write(folder)
            .with_context(|| format!("{} cannot be written", folder.display()))
    }
}

/// A byte-level tokenizer of `size` tokens: printable characters, then pairs and triples of them.
fn vocabulary(size: usize) -> Value {
    let characters = || PRINTABLE.map(|byte| char::from(byte).to_string());
    let pairs = characters().flat_map(|a| characters().map(move |b| (a.clone(), b)));
    let triples = pairs
        .clone()
        .flat_map(|(a, b)| characters().map(move |c| (format!("{a}{b}"), c)));
    let singles = characters().take(size);
    let merges: Vec<(String, String)> = pairs
        .chain(triples)
        .take(size.saturating_sub(PRINTABLE.len()))
        .collect();
    let merged = merges.iter().map(|(a, b)| format!("{a}{b}"));
    let vocabulary: Map<String, Value> = singles
        .chain(merged)
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": merges,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_is_written_as_a_folder_that_reads_back() {
        let root = tempfile::tempdir().unwrap();
        let folder = Shape::Quickstart.folder(Stored::Bf16, root.path());
        Shape::Quickstart.write(Stored::Bf16, &folder).unwrap();
        let model = ModelFolder::read(&folder).unwrap();
        assert_eq!(model.config.vocab_size, 32);
        assert_eq!(model.tokenizer.encode("$$!").unwrap(), [3, 3, 0]);
    }

    #[test]
    fn the_larger_shape_has_the_parameters_that_its_name_says() {
        let config = Config::parse(&Shape::Smol135m.config().to_string()).unwrap();
        assert_eq!(muster_policy::Layout::new(&config).len(), 134_515_008);
        let tokenizer = Tokenizer::parse(&vocabulary(49_152).to_string(), None).unwrap();
        tokenizer.check(&config).unwrap();
        assert_eq!(tokenizer.encode("!!!").unwrap().len(), 1);
    }
}

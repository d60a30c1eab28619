//! A model as a Hugging Face folder: the form in which users bring models, checkpoints are saved, and transformers loads
//! both.
//!
//! Invariant: the configuration, weights and tokenizer of a folder that was read fit together.

use std::path::Path;

use candle_core::Device;
use serde::Deserialize;
use serde_json::json;

use crate::config::{Config, ModelConfigError, TokenIds};
use crate::disk::{CONFIG_BYTES_MAX, DiskError, create_folder, read_file, write_atomically};
use crate::error::PolicyError;
use crate::kernels::KernelSet;
use crate::kernels::threads::Threads;
use crate::policy::{Policy, read_config, read_model};
use crate::text::{CHAT_FILE, Tokenizer, TokenizerError};
use crate::weights::Image;

/// Why a model folder was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(
        "generation_config.json cannot be read: {0}; remove it, or use the file that came with the model"
    )]
    Generation(String),
    /// Its special tokens, in place of those of `config.json`, make the configuration invalid.
    #[error("generation_config.json has special tokens that do not fit the model: {0}")]
    StopTokens(ModelConfigError),
}

/// A whole model in memory.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    pub config: Config,
    pub image: Image,
    pub tokenizer: Tokenizer,
}

/// The keys read from `generation_config.json`. Temperature, top-k and top-p are ignored: they come from the run or the
/// command alone.
#[derive(Deserialize)]
struct Generation {
    eos_token_id: Option<TokenIds>,
    pad_token_id: Option<u32>,
}

/// A model prepared for inference; its weights are in memory only in the form that inference reads.
#[derive(Debug)]
pub struct RunningModel {
    pub policy: Policy,
    pub tokenizer: Tokenizer,
}

impl RunningModel {
    /// Reads a folder like [`ModelFolder::read`], but its weights like [`Policy::load`].
    ///
    /// # Errors
    /// Names the first file that is missing, damaged or does not fit the others.
    pub fn read(
        folder: &Path,
        kernels: KernelSet,
        device: &Device,
        threads: &Threads,
    ) -> Result<Self, FolderError> {
        let mut config = read_config(folder)?;
        let tokenizer = read_tokenizer(folder, &mut config)?;
        let policy = Policy::load_as(&config, folder, kernels, device, threads)?;
        Ok(Self { policy, tokenizer })
    }
}

impl ModelFolder {
    /// Reads a folder. The tokens that end an answer come from `generation_config.json`, else from `config.json`, else from
    /// the tokenizer.
    ///
    /// # Errors
    /// Names the first file that is missing, damaged or does not fit the others.
    pub fn read(folder: &Path) -> Result<Self, FolderError> {
        let (mut config, image) = read_model(folder)?;
        let tokenizer = read_tokenizer(folder, &mut config)?;
        Ok(Self {
            config,
            image,
            tokenizer,
        })
    }

    /// Reads a folder's configuration and tokenizer, and no weights.
    ///
    /// # Errors
    /// Names the first file that is missing, damaged or does not fit the other.
    pub fn read_text(folder: &Path) -> Result<(Config, Tokenizer), FolderError> {
        let mut config = read_config(folder)?;
        let tokenizer = read_tokenizer(folder, &mut config)?;
        Ok((config, tokenizer))
    }

    /// Writes the folder. Each file is written whole or not at all, and the weights come last, so that a folder with weights
    /// is complete.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, folder: &Path) -> Result<(), FolderError> {
        create_folder(folder)?;
        let generation = json!({
            "eos_token_id": TokenIds::from_slice(&self.config.eos_token_ids),
            "pad_token_id": self.config.pad_token_id,
            "bos_token_id": self.config.bos_token_id,
        });
        let config = self.config.to_json(self.image.storage().torch_name());
        let generation = format!("{generation:#}\n");
        // Always a file of its own, which transformers prefers over `tokenizer_config.json`.
        let chat = self.tokenizer.chat();
        let chat = chat.map(|source| (CHAT_FILE, source.as_bytes()));
        for (name, bytes) in [
            ("config.json", config.as_bytes()),
            ("generation_config.json", generation.as_bytes()),
            ("tokenizer.json", self.tokenizer.json().as_bytes()),
            (
                "tokenizer_config.json",
                self.tokenizer.settings().as_bytes(),
            ),
        ]
        .into_iter()
        .chain(chat)
        .chain([("model.safetensors", self.image.bytes())])
        {
            write_atomically(&folder.join(name), |file| file.write_all(bytes))?;
        }
        Ok(())
    }
}

/// Reads the tokenizer, and sets in `config` the tokens that end an answer.
fn read_tokenizer(folder: &Path, config: &mut Config) -> Result<Tokenizer, FolderError> {
    let tokenizer = Tokenizer::load(folder)?;
    tokenizer.check(config)?;
    match read_file(&folder.join("generation_config.json"), CONFIG_BYTES_MAX, "") {
        // Optional: older folders have these ids in config.json.
        Err(DiskError::Missing { .. }) => {}
        Err(error) => return Err(error.into()),
        Ok(text) => {
            let generation: Generation = serde_json::from_slice(&text)
                .map_err(|error| FolderError::Generation(error.to_string()))?;
            if let Some(ids) = generation.eos_token_id {
                config.eos_token_ids = ids.into_vec();
            }
            config.pad_token_id = generation.pad_token_id.or(config.pad_token_id);
            config.validate().map_err(FolderError::StopTokens)?;
        }
    }
    if config.eos_token_ids.is_empty() {
        config.eos_token_ids.extend(tokenizer.eos());
    }
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{image, tiny, untied};

    fn model(config: Config) -> ModelFolder {
        let tokenizer = Tokenizer::characters("0123456789+=.").unwrap();
        ModelFolder {
            image: image(&config, 1),
            tokenizer,
            config,
        }
    }

    #[test]
    fn a_folder_reads_back_as_it_was_written() {
        for config in [tiny(), untied()] {
            let (folder, written) = (tempfile::tempdir().unwrap(), model(config));
            let path = folder.path().join("new/model");
            written.write(&path).unwrap();
            let read = ModelFolder::read(&path).unwrap();
            assert_eq!(read.config, written.config);
            assert_eq!(read.image.bytes(), written.image.bytes());
            assert_eq!(
                read.tokenizer.encode("1+2=").unwrap(),
                written.tokenizer.encode("1+2=").unwrap()
            );
            let running =
                RunningModel::read(&path, KernelSet::Fused, &Device::Cpu, &Threads::one()).unwrap();
            assert_eq!(running.policy.config(), &written.config);
        }
    }

    #[test]
    fn each_missing_file_is_named() {
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            let folder = tempfile::tempdir().unwrap();
            model(tiny()).write(folder.path()).unwrap();
            std::fs::remove_file(folder.path().join(name)).unwrap();
            let error = ModelFolder::read(folder.path()).unwrap_err().to_string();
            assert!(error.contains(&format!("{name} is missing")), "{error}");
        }
    }

    #[test]
    fn configuration_and_tokenizer_are_read_without_weights() {
        let folder = tempfile::tempdir().unwrap();
        model(tiny()).write(folder.path()).unwrap();
        std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        let (config, tokenizer) = ModelFolder::read_text(folder.path()).unwrap();
        assert_eq!(config, tiny());
        assert!(tokenizer.encode("1+2=").is_ok());
    }

    #[test]
    fn files_of_different_models_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        model(tiny()).write(folder.path()).unwrap();
        let large = Config {
            vocab_size: 38,
            ..tiny()
        };
        std::fs::write(folder.path().join("config.json"), large.to_json("float32")).unwrap();
        let error = ModelFolder::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("model.embed_tokens.weight"), "{error}");
        let wide: String = ('\u{4E00}'..).take(36).collect();
        let mut mixed = model(tiny());
        mixed.tokenizer = Tokenizer::characters(&wide).unwrap();
        mixed.write(folder.path()).unwrap();
        let error = ModelFolder::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("vocab_size"), "{error}");
    }

    #[test]
    fn stop_tokens_come_from_the_first_file_that_has_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        model(tiny()).write(path).unwrap();
        let stops = || ModelFolder::read(path).map(|model| model.config.eos_token_ids);
        std::fs::write(
            path.join("generation_config.json"),
            r#"{"eos_token_id": [4, 5]}"#,
        )
        .unwrap();
        assert_eq!(stops().unwrap(), [4, 5]);
        std::fs::write(
            path.join("generation_config.json"),
            r#"{"eos_token_id": 99}"#,
        )
        .unwrap();
        assert!(
            stops()
                .unwrap_err()
                .to_string()
                .contains("generation_config.json")
        );
        std::fs::write(path.join("generation_config.json"), "{").unwrap();
        assert!(
            stops()
                .unwrap_err()
                .to_string()
                .contains("generation_config.json")
        );
        std::fs::remove_file(path.join("generation_config.json")).unwrap();
        let silent = Config {
            eos_token_ids: vec![],
            ..tiny()
        };
        std::fs::write(path.join("config.json"), silent.to_json("float32")).unwrap();
        assert_eq!(stops().unwrap(), [1]);
    }
}

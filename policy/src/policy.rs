//! A policy at one version: its shape and its weights, prepared for one kernel set and device, cheap to share.
//!
//! Invariant: a [`Policy`] computes with exactly the values of the image it was made from.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};

use crate::config::Config;
use crate::disk::{CONFIG_BYTES_MAX, read_file};
use crate::error::PolicyError;
use crate::kernels::KernelSet;
use crate::kernels::candle::CandleWeights;
use crate::kernels::fused::FusedWeights;
use crate::kernels::threads::Threads;
use crate::layout::Layout;
use crate::weights::{Image, WeightFiles, find_parameters};

/// A policy ready to generate, score and train.
#[derive(Debug, Clone)]
pub struct Policy {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    layout: Arc<Layout>,
    weights: Prepared,
    kernels: KernelSet,
    /// Threads of inference.
    threads: Threads,
    device: Device,
}

/// Least cost of a token at any position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCost {
    /// Bytes of weights read, once for all rows that decode together.
    pub weight_bytes: usize,
    /// Products with the weights.
    pub multiply_adds: usize,
}

/// Weights in the form of a kernel set.
#[derive(Debug)]
pub(crate) enum Prepared {
    Fused(Arc<FusedWeights>),
    Candle(Arc<CandleWeights>),
}

impl Policy {
    /// Prepares the weights of a Hugging Face folder for inference alone; these threads read them together. The files are
    /// mapped: every byte is copied once, into its final form, and pages that were read are returned to the system.
    ///
    /// # Errors
    /// If a file is missing or damaged, or describes a model that does not run here.
    pub fn load(
        folder: &Path,
        kernels: KernelSet,
        device: &Device,
        threads: &Threads,
    ) -> Result<Self, PolicyError> {
        let config = read_config(folder)?;
        Self::load_as(&config, folder, kernels, device, threads)
    }

    /// [`Policy::load`] with a configuration that was read before.
    pub(crate) fn load_as(
        config: &Config,
        folder: &Path,
        kernels: KernelSet,
        device: &Device,
        threads: &Threads,
    ) -> Result<Self, PolicyError> {
        let files = WeightFiles::open(folder)?;
        let free_pages = || files.free_pages();
        Self::inferring(
            config,
            &files.bytes(),
            (kernels, device),
            threads,
            &free_pages,
        )
    }

    /// Prepares the bytes of a safetensors file for inference alone, on these threads. Keeps no reference to `weights`.
    ///
    /// # Errors
    /// If they are not the weights of the configuration, or the device fails.
    pub fn for_inference(
        config: &Config,
        weights: &[u8],
        kernels: KernelSet,
        device: &Device,
        threads: &Threads,
    ) -> Result<Self, PolicyError> {
        Self::inferring(config, &[weights], (kernels, device), threads, &|| {})
    }

    /// * `after_each` — called when the bytes of `files` read so far are not needed for now
    fn inferring(
        config: &Config,
        files: &[&[u8]],
        (kernels, device): (KernelSet, &Device),
        threads: &Threads,
        after_each: &dyn Fn(),
    ) -> Result<Self, PolicyError> {
        config.validate()?;
        let layout = Arc::new(Layout::new(config));
        let weights = match kernels {
            KernelSet::Fused | KernelSet::Int8 if !device.is_cpu() => {
                return Err(PolicyError::FusedNeedsCpu);
            }
            KernelSet::Fused | KernelSet::Int8 => {
                let tensors = find_parameters(config, &layout, files)?;
                after_each();
                Prepared::Fused(Arc::new(FusedWeights::for_inference(
                    config,
                    Arc::clone(&layout),
                    &tensors,
                    kernels == KernelSet::Int8,
                    (threads, after_each),
                )))
            }
            KernelSet::Candle => {
                let image = Image::from_files(config, files)?;
                return Self::from_image(config, &image, kernels, device);
            }
        };
        Ok(Self {
            shared: Arc::new(Shared {
                config: config.clone(),
                layout,
                weights,
                kernels,
                threads: threads.clone(),
                device: device.clone(),
            }),
        })
    }

    /// Prepares published weights for training and inference.
    ///
    /// # Errors
    /// If the image does not belong to the configuration, or the device fails.
    pub fn from_image(
        config: &Config,
        image: &Image,
        kernels: KernelSet,
        device: &Device,
    ) -> Result<Self, PolicyError> {
        config.validate()?;
        let layout = Arc::new(Layout::new(config));
        image.check_fits(&layout)?;
        let weights = match kernels {
            KernelSet::Fused | KernelSet::Int8 if !device.is_cpu() => {
                return Err(PolicyError::FusedNeedsCpu);
            }
            KernelSet::Fused | KernelSet::Int8 => Prepared::Fused(Arc::new(FusedWeights::new(
                config,
                Arc::clone(&layout),
                image.clone(),
                kernels == KernelSet::Int8,
            ))),
            KernelSet::Candle => Prepared::Candle(Arc::new(CandleWeights::new(
                config,
                Arc::clone(&layout),
                &image.values(),
                device,
                DType::F32,
            )?)),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                config: config.clone(),
                layout,
                weights,
                kernels,
                threads: Threads::one(),
                device: device.clone(),
            }),
        })
    }

    /// The same policy with inference on these threads; a new policy has one. Their number changes no bit of the results. A
    /// training pass starts threads of its own, and the `candle` kernels use those of candle.
    #[cfg(test)]
    pub(crate) fn with_threads(&self, threads: &Threads) -> Self {
        let weights = match &self.shared.weights {
            Prepared::Fused(weights) => Prepared::Fused(Arc::new(weights.with_threads(threads))),
            Prepared::Candle(weights) => Prepared::Candle(Arc::clone(weights)),
        };
        Self {
            shared: Arc::new(Shared {
                config: self.shared.config.clone(),
                layout: Arc::clone(&self.shared.layout),
                weights,
                kernels: self.shared.kernels,
                threads: threads.clone(),
                device: self.shared.device.clone(),
            }),
        }
    }

    /// The shape of the decoder.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// The parameter table.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.shared.layout
    }

    pub fn kernels(&self) -> KernelSet {
        self.shared.kernels
    }

    pub(crate) fn device(&self) -> &Device {
        &self.shared.device
    }

    /// Threads of inference.
    pub(crate) fn threads(&self) -> &Threads {
        &self.shared.threads
    }

    /// Least cost of a token.
    pub fn token_cost(&self) -> TokenCost {
        let matrices = self.layout().multiplied();
        let multiply_adds: usize = matrices.map(|block| block.rows * block.columns).sum();
        TokenCost {
            weight_bytes: match self.prepared() {
                Prepared::Fused(weights) => weights.bytes_read(),
                Prepared::Candle(_) => multiply_adds * size_of::<f32>(),
            },
            multiply_adds,
        }
    }

    pub(crate) fn prepared(&self) -> &Prepared {
        &self.shared.weights
    }

    /// Refuses a row with an unknown token or too many positions.
    pub(crate) fn check_row(
        &self,
        row: usize,
        tokens: &[u32],
        positions: usize,
    ) -> Result<(), PolicyError> {
        let vocab_size = self.config().vocab_size;
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(PolicyError::Token {
                row,
                token,
                vocab_size,
            });
        }
        let positions_max = self.config().max_position_embeddings;
        if positions > positions_max {
            return Err(PolicyError::TooLong {
                row,
                positions,
                positions_max,
            });
        }
        Ok(())
    }
}

/// Refuses a temperature outside 0.01 to 100.
pub(crate) fn check_temperature(temperature: f32) -> Result<(), PolicyError> {
    // The bounds keep divided logits within f32 and the distribution distinct from greedy decoding.
    if (0.01..=100.0).contains(&temperature) {
        Ok(())
    } else {
        Err(PolicyError::Temperature(temperature))
    }
}

/// Reads `config.json` of a folder.
pub(crate) fn read_config(folder: &Path) -> Result<Config, PolicyError> {
    let hint = "a model folder holds config.json, model.safetensors and tokenizer.json";
    let text = read_file(&folder.join("config.json"), CONFIG_BYTES_MAX, hint)?;
    Ok(Config::parse(&String::from_utf8_lossy(&text))?)
}

/// Reads `config.json` and the weights of a folder. The files are mapped, and every byte is copied once: into the image.
pub(crate) fn read_model(folder: &Path) -> Result<(Config, Image), PolicyError> {
    let config = read_config(folder)?;
    let files = WeightFiles::open(folder)?;
    let image = Image::from_files(&config, &files.bytes())?;
    Ok((config, image))
}

#[cfg(test)]
mod tests;

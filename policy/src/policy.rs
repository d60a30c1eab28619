//! A policy at one version: its shape and its weights, prepared for one kernel set and device, cheap to share.
//!
//! Invariant: what a [`Policy`] computes with are exactly the values of the image it was made from.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};

use crate::config::{Config, ConfigError};
use crate::disk::{DiskError, read_file};
use crate::kernels::KernelSet;
use crate::kernels::candle::CandleWeights;
use crate::kernels::fused::{FusedWeights, Threads};
use crate::layout::Layout;
use crate::weights::{Image, Shards, WeightsError, checked};

/// Largest `config.json` read: the longest in use have a few KiB.
pub(crate) const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Largest weight file read, 1 TiB: a bound against following a device file for ever, not a limit on models.
pub(crate) const WEIGHTS_BYTES_MAX: u64 = 1 << 40;

/// Why a policy could not be loaded or could not answer.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The configuration is not one that runs.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights do not belong to the configuration, or are damaged.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A file was not read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The tensor library refused.
    #[error("the tensor library failed: {0}; check the device's free memory")]
    Tensor(#[from] candle_core::Error),
    /// The fused kernels run on the CPU.
    #[error(
        "kernels `fused` and `int8` run on the cpu only; set kernels to `candle` for this device"
    )]
    FusedNeedsCpu,
    /// Rounded weights are no place to take a derivative at.
    #[error("kernels `int8` do not train; set kernels to `fused`")]
    Int8Trains,
    /// The weights are kept as inference wants them, and nothing else of them.
    #[error("this policy was prepared for inference alone; prepare it from an image to train it")]
    InferenceTrains,
    /// A row without tokens, or without a token before its first target.
    #[error("row {row} has no token before the one to predict; give it a prompt")]
    Empty {
        /// Place among the rows or requests.
        row: usize,
    },
    /// A row that outgrows the rotary table.
    #[error(
        "row {row} takes {positions} positions, but config.json has max_position_embeddings = {positions_max}; shorten the prompt or the answer"
    )]
    TooLong {
        /// Place among the rows or requests.
        row: usize,
        /// Prompt and answer together.
        positions: usize,
        /// Most that the configuration allows.
        positions_max: usize,
    },
    /// A token that the embedding lacks.
    #[error(
        "row {row} holds token {token}, but the vocabulary has {vocab_size}; use the tokenizer that belongs to the model"
    )]
    Token {
        /// Place among the rows or requests.
        row: usize,
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// Targets outside the row, out of order or overlapping.
    #[error(
        "row {row} has targets {start}..{end}, but they must rise without overlap within 1..{len}"
    )]
    Targets {
        /// Place among the rows.
        row: usize,
        /// First target of the range at fault.
        start: usize,
        /// One past its last.
        end: usize,
        /// Tokens of the row.
        len: usize,
    },
    /// No row has a target, so there is nothing to differentiate.
    #[error("none of the {rows} rows has a target, so there is no gradient; drop the batch")]
    NoTargets {
        /// Rows given.
        rows: usize,
    },
    /// A temperature outside its range.
    #[error("temperature {0} does not lie between 0.01 and 100; use greedy decoding for 0")]
    Temperature(f32),
    /// The loss returned a wrong number of derivatives, or one that is not finite.
    #[error("the loss gave row {row} {found} finite derivatives for its {expected} targets")]
    Coefficients {
        /// Place among the rows.
        row: usize,
        /// Targets of the row.
        expected: usize,
        /// Finite derivatives returned.
        found: usize,
    },
    /// A request whose keys and values exceed all there is.
    #[error(
        "request {row} may need {needed_bytes} bytes of keys and values, the engine's budget is {budget_bytes}; raise kv_bytes, or shorten the prompt or the answer"
    )]
    NeverFits {
        /// Place among the requests.
        row: usize,
        /// For its prompt and longest answer.
        needed_bytes: u64,
        /// Of the engine.
        budget_bytes: u64,
    },
    /// A budget below the least that anything takes.
    #[error(
        "the budget for keys and values is {budget_bytes} bytes, a single block takes {block_bytes}; raise kv_bytes or free memory"
    )]
    NoKvMemory {
        /// Of the engine.
        budget_bytes: u64,
        /// In all layers.
        block_bytes: u64,
    },
    /// New weights that are not of the model in use.
    #[error(
        "version {version} is of another shape or kernel set than the model in use; start a new engine for it"
    )]
    OtherShape {
        /// As it was named.
        version: u64,
    },
    /// The policy has diverged.
    #[error("the policy's logits for row {row} are not finite; go back to an earlier version")]
    NotFinite {
        /// Place among the rows or requests.
        row: usize,
    },
}

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
    /// What inference computes on.
    threads: Threads,
    device: Device,
}

/// What a token costs at least, whatever its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCost {
    /// Bytes of weights that are read, once for all rows that decode together.
    pub weight_bytes: usize,
    /// Multiplications with additions.
    pub multiply_adds: usize,
}

/// Weights as a kernel set wants them.
#[derive(Debug)]
pub(crate) enum Prepared {
    Fused(Arc<FusedWeights>),
    Candle(Arc<CandleWeights>),
}

impl Policy {
    /// Prepares the weights of a Hugging Face folder for inference alone, on these threads, which read them together. The
    /// files are mapped: every byte is copied once, into the form in which it is used, and what was read is given back.
    ///
    /// # Errors
    /// When a file is missing, damaged or describes what does not run here.
    pub fn load(
        folder: &Path,
        kernels: KernelSet,
        device: &Device,
        threads: &Threads,
    ) -> Result<Self, PolicyError> {
        let config = read_config(folder)?;
        Self::load_as(&config, folder, kernels, device, threads)
    }

    /// The same with a configuration that was read already.
    pub(crate) fn load_as(
        config: &Config,
        folder: &Path,
        kernels: KernelSet,
        device: &Device,
        threads: &Threads,
    ) -> Result<Self, PolicyError> {
        let shards = Shards::open(folder)?;
        let give_back = || shards.give_back();
        Self::inferring(
            config,
            &shards.bytes(),
            (kernels, device),
            threads,
            &give_back,
        )
    }

    /// Prepares the bytes of a safetensors file for inference alone, on these threads; nothing of `weights` is held on to.
    ///
    /// # Errors
    /// When they are not the weights of the configuration, or the device refuses.
    pub fn for_inference(
        config: &Config,
        weights: &[u8],
        kernels: KernelSet,
        device: &Device,
        threads: &Threads,
    ) -> Result<Self, PolicyError> {
        Self::inferring(config, &[weights], (kernels, device), threads, &|| {})
    }

    /// * `after_each` — called whenever bytes of `files` are not needed any more, for the time being
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
                let tensors = checked(config, &layout, files)?;
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
                let image = Image::gather(config, files)?;
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
    /// When the image does not belong to the configuration, or the device refuses.
    pub fn from_image(
        config: &Config,
        image: &Image,
        kernels: KernelSet,
        device: &Device,
    ) -> Result<Self, PolicyError> {
        config.validate()?;
        let layout = Arc::new(Layout::new(config));
        image.fits(&layout)?;
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

    /// The same policy, its inference on these threads; a new policy has one. The results are the same bits whatever their
    /// number. A training pass has threads of its own, and the `candle` kernels those of candle.
    #[must_use]
    pub fn with_threads(&self, threads: &Threads) -> Self {
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

    /// Which operations it runs.
    pub fn kernels(&self) -> KernelSet {
        self.shared.kernels
    }

    /// Where it computes.
    pub(crate) fn device(&self) -> &Device {
        &self.shared.device
    }

    /// The threads of its inference.
    pub(crate) fn threads(&self) -> &Threads {
        &self.shared.threads
    }

    /// What a token costs.
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

    /// Refuses a row whose tokens or length the decoder has no rows for.
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

/// Refuses a temperature that no distribution can be taken at.
pub(crate) fn check_temperature(temperature: f32) -> Result<(), PolicyError> {
    // The bounds keep logits divided by it within the range of f32 and the distribution apart from greedy.
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
    let shards = Shards::open(folder)?;
    let image = Image::gather(&config, &shards.bytes())?;
    Ok((config, image))
}

#[cfg(test)]
mod tests;

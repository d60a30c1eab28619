//! The policy: one description of the decoder, run over one of two kernel sets, and everything that is done with it:
//! prescribed generation, teacher-forced scoring, the training pass, the optimizer, weights and tokens.
//!
//! It knows nothing of processes, networks, rewards or losses: tokens and weights in, tokens, log-probabilities and
//! gradients out. Rollout, critique and learner use the same forward pass, so what one of them records the others can
//! check.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)
)]

mod config;
mod decoder;
mod device;
mod disk;
mod engine;
mod error;
mod folder;
mod gguf;
mod kernels;
mod layout;
mod policy;
mod roofline;
mod sampling;
mod score;
mod text;
mod training;
mod weights;

#[cfg(test)]
mod testing;

pub use candle_core::Device;

pub use config::{Architecture, Config, LayerType, ModelConfigError, Rope, RopeScaling};
pub use device::{DeviceError, device};
pub use disk::{DiskError, read_file, write_atomically};
pub use engine::{
    Answered, Completion, Engine, EngineConfig, Finish, GenerationRequest, GroupId, ScheduleStats,
    Span, StopAt, StopStrings, WeightsRule, generate,
};
pub use error::PolicyError;
pub use folder::{FolderError, ModelFolder, RunningModel};
pub use gguf::{GgufError, GgufImport, import_gguf};
pub use kernels::KernelSet;
pub use kernels::gradients::Gradients;
pub use kernels::threads::Threads;
pub use layout::{Layout, Parameter};
pub use policy::{Policy, TokenCost};
pub use roofline::Roofline;
pub use sampling::{Distribution, Sampling, uniform};
pub use score::{ScoreRow, TokenScore, logprobs, score};
pub use text::{
    AlphabetError, ChatError, ChatRole, ChatTemplate, Message, Rendering, TokenBytes, Tokenizer,
    TokenizerError, character_tokenizer,
};
pub use training::optimizer::{AdamW, Master, OptimizerError, Update};
pub use training::pass::{Coefficients, Pass, TrainRow, gradients};
pub use training::supervised::{Supervised, supervised};
pub use weights::{Image, ImageBytes, Storage, TensorEntry, WeightsError, weight_file_names};

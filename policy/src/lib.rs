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
mod folder;
mod gguf;
mod gradient;
mod kernels;
mod layout;
mod optimizer;
mod policy;
mod sampling;
mod score;
mod supervised;
mod text;
mod weights;
mod yardstick;

#[cfg(test)]
mod testing;

pub use candle_core::Device;

pub use config::{Architecture, Config, ConfigError, LayerType, Rope, RopeScaling};
pub use device::{DeviceError, device};
pub use disk::{DiskError, read_file, write_atomically};
pub use engine::{
    Answered, Completion, Engine, EngineConfig, Finish, GenerationRequest, GroupId, ScheduleStats,
    Span, StopAt, StopStrings, WeightsRule, generate,
};
pub use folder::{FolderError, ModelFolder, RunningModel};
pub use gguf::{GgufError, GgufImport, import_gguf};
pub use gradient::{Coefficients, Gradients, Pass, TrainRow, gradients};
pub use kernels::KernelSet;
pub use kernels::fused::Threads;
pub use layout::{Layout, Parameter};
pub use optimizer::{AdamW, Master, OptimizerError, Update};
pub use policy::{Policy, PolicyError, TokenCost};
pub use sampling::{Distribution, Sampling, uniform};
pub use score::{ScoreRow, TokenScore, logprobs, score};
pub use supervised::{Supervised, supervised};
pub use text::{
    ChatError, ChatTemplate, Message, Rendering, Speaker, TokenBytes, Tokenizer, TokenizerError,
    character_tokenizer,
};
pub use weights::{Image, ImageBytes, Storage, TensorEntry, WeightsError, shard_names};
pub use yardstick::Yardstick;

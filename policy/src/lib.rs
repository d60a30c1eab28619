//! The policy: one description of the decoder, run over one of two kernel sets, and everything that is done with it:
//! prescribed generation, teacher-forced scoring, the training pass, the optimizer, weights and tokens.
//!
//! It knows nothing of processes, networks, rewards or losses: tokens and weights in, tokens, log-probabilities and
//! gradients out. Rollout, critique and learner use the same forward pass, so what one of them records the others can
//! check.
//!
//! # The decoder
//!
//! `decoder` is the one description of a model: layers in order over the trait of `kernels`. Families differ in values only.
//! `config` holds what a family shares (activation, norms) and what one model sets; `layout` makes of both the table of
//! parameters and each layer's attention. Only `config` names families. Ranges of layers, one after another, give bit for
//! bit what all layers give at once.
//!
//! # Generation
//!
//! `engine` lives as long as its worker: groups of requests arrive at any time, each step feeds one token of every row that
//! decodes and a bounded number of prompt tokens, and groups leave as they finish.
//!
//! * Keys and values lie in blocks of 32 positions, counted by reference, within a budget. `engine::scheduler` decides which
//!   row feeds what; it is pure. A group shares the blocks of its prompt. When blocks run out, unused prefixes are dropped,
//!   then the youngest row gives its blocks back; the oldest row advances with every step.
//! * Keys and values belong to one version. After a swap, running groups end under their own version (`drain`) or continue
//!   under the new one from their next token (`in_flight`), and record which version drew which tokens.
//! * A rollout ends at a stop token, a stop string or the longest length. `engine::stops` looks for stop strings in the
//!   answer's bytes, by a rule that every critic repeats from the tokens alone.
//!
//! What is drawn depends on the request and its versions, never on budget, neighbours or the moment of submission, up to
//! rounding.
//!
//! # Numbers that are the same everywhere
//!
//! * Sampling is prescribed: temperature only. A top-k or top-p mask would make honest tokens impossible under another
//!   machine's rounding.
//! * A gradient is summed over a configured number of shards in a fixed order; the number of threads never enters it.
//! * Threads of a large model share each product; of a small one, each thread computes rows of its own. Each element is one
//!   sum in a fixed order, so answers and scores are the same bits on any number of threads.
//! * Inference reads weights from panels, in which every weight is in memory once; bf16 stays bf16 in models larger than a
//!   cache and is widened in registers, which changes no bit.
//! * Kernels `int8` round every matrix to eight bits with a scale for each 64 inputs, by a rule that leaves nothing to
//!   choose. They are a numeric class of their own, `int8-cpu`, and do not train.
//! * Storage (bf16 or f32) and compute (f32) are two words. The published image is the policy; the master is only the
//!   optimizer's.
//! * Seeds are derived from their purpose (run, ticket, rollout), never drawn from a global generator.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

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

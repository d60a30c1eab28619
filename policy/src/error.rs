//! Why a policy could not be loaded, or could not answer.

use crate::config::ModelConfigError;
use crate::disk::DiskError;
use crate::weights::WeightsError;

/// Why a policy could not be loaded or could not answer.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The configuration is not one that runs.
    #[error(transparent)]
    Config(#[from] ModelConfigError),
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

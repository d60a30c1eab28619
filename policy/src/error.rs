//! Why a policy could not be loaded, or could not answer.

use crate::config::ModelConfigError;
use crate::disk::DiskError;
use crate::weights::WeightsError;

/// Why a policy could not be loaded or could not answer.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The configuration cannot run.
    #[error(transparent)]
    Config(#[from] ModelConfigError),
    /// The weights do not belong to the configuration, or are damaged.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A file could not be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The tensor library failed.
    #[error("the tensor library failed: {0}; check the device's free memory")]
    Tensor(#[from] candle_core::Error),
    /// The fused kernels run on the CPU.
    #[error(
        "kernels `fused` and `int8` run on the cpu only; set kernels to `candle` for this device"
    )]
    FusedNeedsCpu,
    /// Rounded weights have no useful derivative.
    #[error("kernels `int8` do not train; set kernels to `fused`")]
    Int8Trains,
    /// The weights are kept in the form of inference alone.
    #[error("this policy was prepared for inference alone; prepare it from an image to train it")]
    InferenceTrains,
    /// A row without tokens, or without a token before its first target.
    #[error("row {row} has no token before the one to predict; give it a prompt")]
    Empty {
        /// Index among the rows or requests.
        row: usize,
    },
    /// A row with more positions than the configuration allows.
    #[error(
        "row {row} takes {positions} positions, but config.json has max_position_embeddings = {positions_max}; shorten the prompt or the answer"
    )]
    TooLong {
        /// Index among the rows or requests.
        row: usize,
        /// Of prompt and answer together.
        positions: usize,
        /// Limit of the configuration.
        positions_max: usize,
    },
    /// A token outside the vocabulary.
    #[error(
        "row {row} holds token {token}, but the vocabulary has {vocab_size}; use the tokenizer that belongs to the model"
    )]
    Token {
        /// Index among the rows or requests.
        row: usize,
        /// Id of the token.
        token: u32,
        /// Tokens of the vocabulary.
        vocab_size: usize,
    },
    /// Targets outside the row, out of order or overlapping.
    #[error(
        "row {row} has targets {start}..{end}, but they must rise without overlap within 1..{len}"
    )]
    Targets {
        /// Index among the rows.
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
        /// Rows of the batch.
        rows: usize,
    },
    /// A temperature outside its range.
    #[error("temperature {0} does not lie between 0.01 and 100; use greedy decoding for 0")]
    Temperature(f32),
    /// The loss returned a wrong number of derivatives, or one that is not finite.
    #[error("the loss gave row {row} {found} finite derivatives for its {expected} targets")]
    Coefficients {
        /// Index among the rows.
        row: usize,
        /// Targets of the row.
        expected: usize,
        /// Finite derivatives returned.
        found: usize,
    },
    /// A request whose keys and values exceed the budget.
    #[error(
        "request {row} may need {needed_bytes} bytes of keys and values, the engine's budget is {budget_bytes}; raise kv_bytes, or shorten the prompt or the answer"
    )]
    NeverFits {
        /// Index among the requests.
        row: usize,
        /// Bytes for the prompt and the longest answer.
        needed_bytes: u64,
        /// Bytes that the engine reserved.
        budget_bytes: u64,
    },
    /// A budget smaller than one block.
    #[error(
        "the budget for keys and values is {budget_bytes} bytes, a single block takes {block_bytes}; raise kv_bytes or free memory"
    )]
    NoKvMemory {
        /// Bytes that the engine reserved.
        budget_bytes: u64,
        /// Bytes of a block in all layers.
        block_bytes: u64,
    },
    /// New weights of another model than the one in use.
    #[error(
        "version {version} is of another shape or kernel set than the model in use; start a new engine for it"
    )]
    OtherShape {
        /// Version of the new weights.
        version: u64,
    },
    /// Logits are not finite: the policy has diverged.
    #[error("the policy's logits for row {row} are not finite; go back to an earlier version")]
    NotFinite {
        /// Index among the rows or requests.
        row: usize,
    },
}

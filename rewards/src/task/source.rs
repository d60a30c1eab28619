//! The contract of one type of task: prompts with their gold answers out of a configuration.

use std::path::Path;

use super::split::{Partition, Split};
use crate::json_lines::JsonlError;
use crate::tagged::ConfigError;

/// One prompt with its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// At most [`GOLD_BYTES_MAX`](muster_protocol::limits::GOLD_BYTES_MAX) bytes.
    pub prompt: String,
    /// The answer that a reward compares with; it never travels to a worker. As long as a prompt at most.
    pub gold: String,
    /// A whole answer for the supervised warm-up.
    pub demonstration: Option<String>,
}

/// The items of a task before they are split.
pub(crate) struct SourceItems {
    /// No prompt twice.
    pub(crate) items: Vec<Item>,
    /// Lines that were merged into an earlier one with the same prompt and gold answer.
    pub(crate) duplicates: usize,
    /// Characters that a tokenizer must know even if no item has them.
    pub(crate) alphabet: &'static str,
}

/// The configuration of one type of task.
pub(crate) trait TaskSource {
    /// Checks the values.
    ///
    /// # Errors
    /// [`ConfigError::BadValue`] without a section for a value outside its limits.
    fn validate(&self) -> Result<(), ConfigError>;

    fn partition(&self) -> Partition;

    /// Makes or reads the items. A relative path starts at `base`.
    ///
    /// # Errors
    /// A file that cannot be read, or a bad line.
    fn items(&self, base: &Path) -> Result<SourceItems, TaskError>;
}

/// Why a task cannot be opened.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TaskError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Line(#[from] JsonlError),
    #[error(
        "the task file {file} cannot be opened ({reason}): set `file` in [task] to a JSONL file"
    )]
    Unopenable { file: String, reason: String },
    #[error("the task file {file} has no prompt: write one JSON object on each line")]
    Empty { file: String },
    #[error(
        "{file}:{line} repeats the prompt of line {first_line} with another gold answer: keep one of them"
    )]
    Conflict {
        file: String,
        line: u64,
        first_line: u64,
    },
    /// A split whose share is above 0 came out empty.
    #[error(
        "none of the task's {prompts} prompts falls into the {split} split: add prompts, or change {keys}"
    )]
    EmptySplit {
        split: Split,
        /// Of the whole task.
        prompts: usize,
        /// The keys of `[task]` that set the split's share.
        keys: &'static str,
    },
}

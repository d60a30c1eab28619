//! What the engine knows of the run.

use muster_policy::Tokenizer;

/// The run's rules for every answer.
#[derive(Debug, Clone)]
pub struct Task {
    /// Longest answer in tokens.
    pub tokens_max: u32,
    /// Finds stop strings.
    pub tokenizer: Tokenizer,
}

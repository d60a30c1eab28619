//! One step of the engine: which tokens are fed, where their keys and values lie, and which requests draw from them.

use super::blocks::BlockId;

/// A request's place in the order of submission: lower is older.
pub(crate) type Sequence = u64;

/// Which weights a row runs under: a counter of the engine's, higher is newer.
pub(crate) type WeightsId = u64;

/// Consecutive tokens of one text, to be fed in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Feed {
    pub(crate) weights_id: WeightsId,
    /// Position of the first token: the blocks hold everything before it.
    pub(crate) position: usize,
    pub(crate) tokens: Vec<u32>,
    /// Blocks of the text in order.
    pub(crate) table: Vec<BlockId>,
    /// Requests that draw their next token from the logits after the last token; none while more is to be read.
    pub(crate) draws: Vec<Sequence>,
}

/// One step.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Blocks to copy, from and to, one after another and before anything is fed.
    pub(crate) copies: Vec<(BlockId, BlockId)>,
    /// By weights_id, then by age.
    pub(crate) feeds: Vec<Feed>,
}

/// What a schedule has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScheduleStats {
    /// Steps planned.
    pub steps: u64,
    /// Rows that fed, drew from or waited for a text, summed over all steps.
    pub busy_slots: u64,
    /// Tokens of prompts and of answers that were fed, other than the one that was drawn last.
    pub read_tokens: u64,
    /// Tokens fed by rows that decode.
    pub decoded_tokens: u64,
    /// Rows that gave their blocks back before they were done.
    pub preemptions: u64,
    /// Prompts whose keys and values were there already, whole or in part.
    pub prefix_hits: u64,
    /// Most blocks held at once.
    pub blocks_peak: u64,
}

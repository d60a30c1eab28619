//! One step of the engine: which tokens are fed, where their keys and values lie, and which requests draw from them.

use super::blocks::BlockId;

/// A request's place in the order of submission: lower is older.
pub(crate) type Sequence = u64;

/// Names the weights that a row runs under. The engine counts them: higher is newer.
pub(crate) type WeightsId = u64;

/// Consecutive tokens of one text that one step feeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Feed {
    pub(crate) weights_id: WeightsId,
    /// Position of the first token: the blocks hold everything before it.
    pub(crate) position: usize,
    pub(crate) tokens: Vec<u32>,
    /// Blocks of the text in order.
    pub(crate) table: Vec<BlockId>,
    /// Requests that draw their next token from the logits after the last token; empty until the whole text is read.
    pub(crate) draws: Vec<Sequence>,
}

/// The work of one step.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Blocks to copy, (from, to), in order, before any token is fed.
    pub(crate) copies: Vec<(BlockId, BlockId)>,
    /// Ordered by weights, then by age.
    pub(crate) feeds: Vec<Feed>,
}

/// Counters of a scheduler.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScheduleStats {
    pub steps: u64,
    /// Rows that held a slot, summed over all steps.
    pub busy_slots: u64,
    /// Tokens fed to read prompts and to read answers again; tokens drawn in the step before do not count.
    pub read_tokens: u64,
    /// Tokens fed by rows that decode.
    pub decoded_tokens: u64,
    /// Rows that lost their blocks before they were done.
    pub preemptions: u64,
    /// Prompts whose keys and values were cached, whole or in part.
    pub prefix_hits: u64,
    /// Most blocks held at once.
    pub blocks_peak: u64,
}

//! Where dispatch gets its prompts. Dispatch imports no tasks: the command that starts it passes a source.

use muster_protocol::id::TicketId;

/// A prompt to be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Its place in the training split.
    pub item: u64,
    pub tokens: Vec<u32>,
}

/// What a critic compares with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The prompt as text.
    pub prompt: String,
    /// The gold answer.
    pub gold: String,
}

/// A run's training prompts. Pure: the same ticket always gets the same prompt.
pub trait PromptSource: Send + Sync {
    /// The prompt of a ticket.
    fn prompt(&self, ticket: TicketId) -> Prompt;

    /// What the answer to an item is compared with; `None` when there is no such item.
    fn reference(&self, item: u64) -> Option<Reference>;
}

//! The run's training prompts for dispatch: the task's items as tokens, in an order that the run's seed determines.

use anyhow::{Context, Result, bail};

use muster_dispatch::prompts::{Prompt, PromptSource, Reference};
use muster_policy::{Message, Rendering, Tokenizer, TokenizerError};
use muster_protocol::id::TicketId;
use muster_rewards::{Split, Task};

use crate::config::RunConfig;

/// The form of a prompt for the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptForm {
    /// The prompt's text alone.
    Plain,
    /// A user's message in the model's chat template.
    Chat,
}

impl PromptForm {
    pub fn of(config: &RunConfig) -> Self {
        if config.model.chat {
            Self::Chat
        } else {
            Self::Plain
        }
    }

    /// Tokens of a prompt in this form.
    ///
    /// # Errors
    /// A character has no token, or the model has no chat template.
    pub fn encode(self, tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>, TokenizerError> {
        match self {
            Self::Plain => tokenizer.encode_prompt(prompt),
            Self::Chat => tokenizer.encode_chat(&[Message::user(prompt)], Rendering::PROMPT),
        }
    }
}

/// The training split of a task, tokenised.
pub struct TaskPrompts {
    task: Task,
    tokens: Vec<Vec<u32>>,
    seed: u64,
}

impl TaskPrompts {
    /// Tokenises every training prompt, so that a prompt that does not fit fails before the run starts.
    ///
    /// # Errors
    /// A prompt has no tokens in this vocabulary, or leaves no room for an answer.
    pub fn new(
        task: Task,
        tokenizer: &Tokenizer,
        form: PromptForm,
        seed: u64,
        prompt_max: usize,
    ) -> Result<Self> {
        let mut tokens = Vec::with_capacity(task.len(Split::Train));
        for item in task.items(Split::Train) {
            let encoded = form.encode(tokenizer, &item.prompt).with_context(|| {
                format!("the task's prompt {:?} cannot be used", shown(&item.prompt))
            })?;
            if encoded.is_empty() || encoded.len() > prompt_max {
                bail!(
                    "the task's prompt {:?} has {} tokens, the model has room for 1 to {prompt_max}",
                    shown(&item.prompt),
                    encoded.len()
                );
            }
            tokens.push(encoded);
        }
        if tokens.is_empty() {
            bail!("the task has no training prompt");
        }
        Ok(Self { task, tokens, seed })
    }

    /// The item of the n-th ticket: every item once per epoch, each epoch in another order.
    fn item(&self, number: u64) -> u64 {
        let count = self.tokens.len() as u64;
        let (epoch, place) = (number / count, number % count);
        let key = blake3_u64(self.seed, epoch);
        // A step coprime to the count visits every item once.
        let mut step = (key % count) | 1;
        while gcd(step, count) != 1 {
            step += 2;
        }
        let start = blake3_u64(key, epoch) % count;
        ((u128::from(place) * u128::from(step) + u128::from(start)) % u128::from(count)) as u64
    }
}

impl PromptSource for TaskPrompts {
    fn prompt(&self, ticket: TicketId) -> Prompt {
        let item = self.item(ticket.0.saturating_sub(1));
        Prompt {
            item,
            tokens: self.tokens[item as usize].clone(),
        }
    }

    fn reference(&self, item: u64) -> Option<Reference> {
        let item = self.task.item(Split::Train, usize::try_from(item).ok()?)?;
        Some(Reference {
            prompt: item.prompt.clone(),
            gold: item.gold.clone(),
        })
    }
}

fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}

fn blake3_u64(seed: u64, salt: u64) -> u64 {
    let mut bytes = [0u8; 16];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..].copy_from_slice(&salt.to_le_bytes());
    let hash = muster_protocol::id::ContentHash::of(&bytes);
    u64::from_le_bytes([
        hash.0[0], hash.0[1], hash.0[2], hash.0[3], hash.0[4], hash.0[5], hash.0[6], hash.0[7],
    ])
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_rewards::TaskConfig;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn a_chat_prompt_is_what_the_template_makes_of_the_task_s() {
        let json = muster_policy::character_tokenizer("12=?").unwrap();
        let template = "?{{ messages[0].content }}?{{ messages | length }}".to_owned();
        let tokenizer = Tokenizer::with_chat(&json, None, Some(template)).unwrap();
        let encoded = |form: PromptForm| form.encode(&tokenizer, "2=").unwrap();
        assert_eq!(encoded(PromptForm::Plain), tokenizer.encode("2=").unwrap());
        assert_eq!(
            encoded(PromptForm::Chat),
            tokenizer.encode("?2=?1").unwrap()
        );
    }

    #[test]
    fn every_item_is_asked_once_per_epoch_and_epochs_differ() {
        let task = Task::open(&TaskConfig::default(), Path::new(".")).unwrap();
        let alphabet: String = task.alphabet().collect();
        let tokenizer = Tokenizer::characters(&alphabet).unwrap();
        let prompts = TaskPrompts::new(task, &tokenizer, PromptForm::Plain, 7, 100).unwrap();
        let count = prompts.tokens.len() as u64;
        let first: Vec<u64> = (0..count).map(|n| prompts.item(n)).collect();
        let second: Vec<u64> = (count..2 * count).map(|n| prompts.item(n)).collect();
        assert_eq!(first.iter().collect::<BTreeSet<_>>().len() as u64, count);
        assert_eq!(second.iter().collect::<BTreeSet<_>>().len() as u64, count);
        assert_ne!(first, second);
    }
}

//! The task of a simulated run: prompts, reward and descriptor.

use std::collections::BTreeMap;

use muster_dispatch::prompts::{Prompt, PromptSource, Reference};
use muster_protocol::id::{ContentHash, PolicyVersion, TicketId};
use muster_protocol::message::descriptor::{Descriptor, Thresholds};
use muster_protocol::message::lease::NumericClass;
use muster_protocol::message::ticket::SamplingRules;
use muster_rewards::RewardConfig;

use crate::members::members;
use crate::table::{STOP, TOKENS_MAX, VOCABULARY};

pub const GROUP_SIZE: u32 = 4;
pub const BATCH_GROUPS: u64 = 8;
pub const ASYNC_LEVEL: u64 = 2;
pub const LEASE_MS: u64 = 10_000;

/// 500 prompts of three tokens.
pub struct Prompts;

impl PromptSource for Prompts {
    fn prompt(&self, ticket: TicketId) -> Prompt {
        let item = ticket.0 % 500;
        let digit = |place: u64| (item / place % 8) as u32 + 1;
        Prompt {
            item,
            tokens: vec![digit(1), digit(8), digit(64)],
        }
    }

    fn reference(&self, item: u64) -> Option<Reference> {
        Some(Reference {
            prompt: item.to_string(),
            gold: "1".to_owned(),
        })
    }
}

/// About half of the answers begin with a rewarded letter, so that most groups have a signal.
const REWARD: &str = r#"
[task]
type = "running_sums"

[[reward]]
type = "regex"
pattern = "^[b-h]"
"#;

pub fn descriptor() -> Descriptor {
    let hash = |text: &str| ContentHash::of(text.as_bytes());
    Descriptor {
        architecture: hash("a table"),
        tokenizer: hash("letters"),
        chat_template: None,
        task: hash("a few hundred prompts"),
        rewards: RewardConfig::from_toml(REWARD)
            .unwrap()
            .canonical_json()
            .unwrap(),
        sampling: SamplingRules {
            temperature: 1.0,
            tokens_max: TOKENS_MAX,
            stop_ids: vec![STOP],
            stop_strings: Vec::new(),
        },
        group_size: GROUP_SIZE,
        async_level: ASYNC_LEVEL,
        same_class: Thresholds::SAME_CLASS,
        cross_class: Thresholds::CROSS_CLASS,
        vocabulary: VOCABULARY,
        classes: vec![NumericClass::F32Cpu],
        learner: members().trainer.identity.peer_id(),
        dispatch: members().dispatch.identity.peer_id(),
        from_step: PolicyVersion(0),
        labels: BTreeMap::new(),
    }
}

//! A task: prompts with their gold answers, in three splits. A hash of a prompt's text decides its split, and another hash
//! its place in the split's order, so that adding prompts moves no other. Knows nothing about rewards or tokens.
//!
//! A new type of task is a file in `task/` with a configuration that implements [`TaskSource`], its `mod` line and its
//! line in [`TaskConfig`].
//!
//! Invariant: every prompt is in exactly one split, once.

mod jsonl;
mod running_sums;
mod source;
mod split;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Deserializer};
use toml::Table;

use crate::tagged::{self, ConfigError, tagged_enum};
use source::{SourceItems, TaskSource};
use split::Partition;

pub use jsonl::JsonlConfig;
pub use running_sums::RunningSumsConfig;
pub use source::{Item, TaskError};
pub use split::Split;

tagged_enum! {
    /// `[task]`; TOML's `type` names the variant.
    pub enum TaskConfig: TaskSource {
        /// Procedural: add up numbers and write every running total.
        "running_sums" => RunningSums(RunningSumsConfig),
        /// Prompts and gold answers from a file.
        "jsonl" => Jsonl(JsonlConfig),
    }
}

impl Default for TaskConfig {
    fn default() -> Self {
        Self::RunningSums(RunningSumsConfig::default())
    }
}

impl<'de> Deserialize<'de> for TaskConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let table = Table::deserialize(deserializer)?;
        Self::from_table(table).map_err(serde::de::Error::custom)
    }
}

impl TaskConfig {
    /// Reads the `[task]` table.
    ///
    /// # Errors
    /// An unknown type or key, a value of the wrong type or outside its limits.
    pub(crate) fn from_table(mut table: Table) -> Result<Self, ConfigError> {
        let kind = tagged::take_type(&mut table, "task", Self::TYPES)?;
        let section = format!("task {}", kind.name);
        let config = (kind.read)(table, &section, &[])?;
        let validated = config.config().validate();
        validated.map_err(|error| error.in_section(&section))?;
        Ok(config)
    }
}

/// An opened task: all its items, by split, in their fixed order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    splits: BTreeMap<Split, Vec<Item>>,
    alphabet: BTreeSet<char>,
    duplicates: usize,
}

impl Task {
    /// Makes or reads the task's items. A relative `file` starts at `base`, the configuration's folder.
    ///
    /// # Errors
    /// A value outside its limits, a file that cannot be read, a bad line, an empty split.
    pub fn open(config: &TaskConfig, base: &Path) -> Result<Self, TaskError> {
        let source = config.config();
        // A configuration made in code was not validated when it was read.
        let validated = source.validate();
        validated.map_err(|error| error.in_section("task"))?;
        Self::from_items(source.items(base)?, source.partition())
    }

    /// The number of prompts in a split.
    pub fn len(&self, split: Split) -> usize {
        self.items(split).len()
    }

    /// Whether a split has no prompt, which only a split of share 0 can.
    pub fn is_empty(&self, split: Split) -> bool {
        self.items(split).is_empty()
    }

    /// The item at a place in the split's order, or none past its end.
    pub fn item(&self, split: Split, index: usize) -> Option<&Item> {
        self.items(split).get(index)
    }

    /// All items of a split, in its order.
    pub fn items(&self, split: Split) -> &[Item] {
        self.splits.get(&split).map_or(&[], Vec::as_slice)
    }

    /// Every character of prompts, gold answers and demonstrations: a character tokenizer must know them.
    pub fn alphabet(&self) -> impl Iterator<Item = char> + '_ {
        self.alphabet.iter().copied()
    }

    /// Lines of the file that repeated an earlier prompt with the same gold answer and were merged into it.
    pub fn duplicates(&self) -> usize {
        self.duplicates
    }

    /// Hash of every prompt, gold answer and demonstration in order. The run's descriptor names it beside the
    /// configuration, since a file may change while its name does not.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("muster task items v1");
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        // Destructured without `..`: a new field does not compile until its place in the digest is decided.
        let Self {
            splits: _, // through `items`
            // Derived from the items, or about the file and not the task.
            alphabet: _,
            duplicates: _,
        } = self;
        for split in Split::ALL {
            field(split.to_string().as_bytes());
            for item in self.items(split) {
                let Item {
                    prompt,
                    gold,
                    demonstration,
                } = item;
                field(prompt.as_bytes());
                field(gold.as_bytes());
                field(demonstration.as_deref().unwrap_or("").as_bytes());
            }
        }
        *hasher.finalize().as_bytes()
    }

    /// Sorts items into their splits.
    fn from_items(source: SourceItems, partition: Partition) -> Result<Self, TaskError> {
        let prompts = source.items.len();
        let mut task = Self {
            splits: BTreeMap::new(),
            alphabet: source.alphabet.chars().collect(),
            duplicates: source.duplicates,
        };
        for item in source.items {
            let answer = item.demonstration.as_deref().unwrap_or(&item.gold);
            for text in [&item.prompt, &item.gold, answer] {
                task.alphabet.extend(text.chars());
            }
            let split = partition.split(&item.prompt);
            task.splits.entry(split).or_default().push(item);
        }
        for split in Split::ALL {
            let (share, keys) = partition.share(split);
            if share > 0.0 && task.is_empty(split) {
                return Err(TaskError::EmptySplit {
                    split,
                    prompts,
                    keys,
                });
            }
        }
        for items in task.splits.values_mut() {
            // By prompt first, then stably by hash: a tie of two hashes must not leave the order to the file.
            items.sort_by(|left, right| left.prompt.cmp(&right.prompt));
            debug_assert!(
                items.windows(2).all(|pair| pair[0].prompt < pair[1].prompt),
                "a prompt is in one split, once"
            );
            items.sort_by_cached_key(|item| partition.order(&item.prompt));
        }
        Ok(task)
    }
}

#[cfg(test)]
mod tests;

//! A task: prompts with their gold answers, in three splits that never share a prompt. Which split a prompt is in follows
//! from a hash of its own text, so that adding prompts never moves one from training into the held-out set, and the
//! order within a split is the order of another such hash. Knows nothing about rewards or tokens.
//!
//! Invariant: every prompt stands in exactly one split, once.

pub mod jsonl;
pub mod running_sums;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};
use toml::Table;

use crate::jsonl::JsonlError;
use crate::tagged::{self, ConfigError};

pub use jsonl::JsonlConfig;
pub use running_sums::RunningSumsConfig;

const TYPES: &[&str] = &["running_sums", "jsonl"];

/// What a prompt may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Warm-up and RL.
    Train,
    /// Decisions made along the way, such as when to stop the warm-up.
    Development,
    /// The accuracy that is reported; nothing is ever decided on it.
    HeldOut,
}

impl Split {
    /// All splits.
    pub const ALL: [Self; 3] = [Self::Train, Self::Development, Self::HeldOut];
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::Development => "development",
            Self::HeldOut => "held-out",
        })
    }
}

/// One prompt with what is known about its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// What the policy is asked.
    pub prompt: String,
    /// The answer a reward compares with; it never travels to a worker.
    pub gold: String,
    /// A whole answer written out, for the supervised warm-up; absent when the task has none.
    pub demonstration: Option<String>,
}

/// The shares of the prompts kept from training, and the seed of every choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Partition {
    pub(crate) held_out_fraction: f64,
    pub(crate) development_fraction: f64,
    pub(crate) seed: u64,
}

impl Partition {
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        for (key, value) in [
            ("held_out_fraction", self.held_out_fraction),
            ("dev_fraction", self.development_fraction),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Err(ConfigError::bad_value(
                    key,
                    value,
                    "but a share must be at least 0 and below 1",
                ));
            }
        }
        let kept_back = self.held_out_fraction + self.development_fraction;
        if kept_back >= 1.0 {
            return Err(ConfigError::bad_value(
                "held_out_fraction",
                self.held_out_fraction,
                format!(
                    "which with dev_fraction {} leaves nothing to train on: lower one of them",
                    self.development_fraction
                ),
            ));
        }
        Ok(())
    }

    /// The split of a prompt, from its text alone. Runs of white space count as one space: two prompts that differ in
    /// nothing else must not face each other across the held-out border.
    fn split(&self, prompt: &str) -> Split {
        let words: Vec<&str> = prompt.split_whitespace().collect();
        let draw = hash_u64(
            "muster task split v1",
            self.seed,
            words.join(" ").as_bytes(),
        );
        let held_out_below = threshold(self.held_out_fraction);
        let development_below = threshold(self.held_out_fraction + self.development_fraction);
        if draw < held_out_below {
            Split::HeldOut
        } else if draw < development_below {
            Split::Development
        } else {
            Split::Train
        }
    }
}

/// `share` of the range of a u64.
fn threshold(share: f64) -> u64 {
    // 2^64 is exact in f64 and the cast saturates, so that this is the same number on every machine.
    (share * 18_446_744_073_709_551_616.0) as u64
}

fn hash_u64(context: &'static str, seed: u64, bytes: &[u8]) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(&seed.to_le_bytes());
    hasher.update(bytes);
    let mut first = [0; 8];
    hasher.finalize_xof().fill(&mut first);
    u64::from_le_bytes(first)
}

/// Which task, tagged by `type`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TaskConfig {
    /// Procedural: add up numbers, writing every running total.
    RunningSums(RunningSumsConfig),
    /// A user's own prompts and gold answers.
    Jsonl(JsonlConfig),
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
    pub fn from_table(mut table: Table) -> Result<Self, ConfigError> {
        let config = match tagged::take_type(&mut table, "task", TYPES)? {
            "jsonl" => Self::Jsonl(tagged::read(table, "task jsonl", &[])?),
            _ => Self::RunningSums(tagged::read(table, "task running_sums", &[])?),
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks what single values and types cannot: called by [`TaskConfig::from_table`], and for a value made in code by
    /// [`Task::open`].
    ///
    /// # Errors
    /// A value outside its limits, with the limits.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match self {
            Self::RunningSums(config) => config
                .validate()
                .map_err(|error| error.in_section("task running_sums")),
            Self::Jsonl(config) => config
                .validate()
                .map_err(|error| error.in_section("task jsonl")),
        }
    }
}

/// Why a task cannot be opened.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TaskError {
    /// The configuration itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// One line of the file.
    #[error(transparent)]
    Line(#[from] JsonlError),
    /// The file is not there or not readable.
    #[error(
        "the task file {file} cannot be opened ({reason}): set `file` in [task] to a JSONL file"
    )]
    Unopenable {
        /// The file's name.
        file: String,
        /// What the system said.
        reason: String,
    },
    /// Nothing in it.
    #[error("the task file {file} holds no prompt: write one JSON object a line")]
    Empty {
        /// The file's name.
        file: String,
    },
    /// One prompt with two truths.
    #[error(
        "{file}:{line} repeats the prompt of line {first_line} with another gold answer: keep one of them"
    )]
    Conflict {
        /// The file's name.
        file: String,
        /// The second line, from 1.
        line: u64,
        /// The first line, from 1.
        first_line: u64,
    },
    /// A split that was asked for came out empty.
    #[error(
        "none of the task's {prompts} prompts falls into the {split} split: add prompts, or change {keys}"
    )]
    EmptySplit {
        /// The split.
        split: Split,
        /// All prompts of the task.
        prompts: usize,
        /// The keys that decide it.
        keys: &'static str,
    },
}

/// An opened task: all its items, by split, in their fixed order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    splits: BTreeMap<Split, Vec<Item>>,
    alphabet: BTreeSet<char>,
    answer_chars_max: usize,
    duplicates: usize,
}

impl Task {
    /// Makes or reads the task's items; a relative `file` is looked for in `base`, the configuration's own folder.
    ///
    /// # Errors
    /// A configuration outside its limits, a file that cannot be read or holds a bad line, an empty split.
    pub fn open(config: &TaskConfig, base: &Path) -> Result<Self, TaskError> {
        config.validate()?;
        match config {
            TaskConfig::RunningSums(config) => {
                let mut task = Self::from_items(config.items(), config.partition())?;
                task.alphabet.extend(running_sums::ALPHABET.chars());
                Ok(task)
            }
            TaskConfig::Jsonl(config) => {
                let read = config.read(base)?;
                let mut task = Self::from_items(read.items, config.partition())?;
                task.duplicates = read.duplicates;
                Ok(task)
            }
        }
    }

    /// How many prompts a split holds.
    pub fn len(&self, split: Split) -> usize {
        self.items(split).len()
    }

    /// Whether a split holds no prompt; only one whose share is 0 can.
    pub fn is_empty(&self, split: Split) -> bool {
        self.items(split).is_empty()
    }

    /// The item at a place of the split's fixed order, or nothing past its end.
    pub fn item(&self, split: Split, index: usize) -> Option<&Item> {
        self.items(split).get(index)
    }

    /// All items of a split, in its fixed order.
    pub fn items(&self, split: Split) -> &[Item] {
        self.splits.get(&split).map_or(&[], Vec::as_slice)
    }

    /// Every character that prompts, gold answers and demonstrations use: what a character tokenizer must know.
    pub fn alphabet(&self) -> impl Iterator<Item = char> + '_ {
        self.alphabet.iter().copied()
    }

    /// Characters of the longest demonstration, or of the longest gold answer where there is none: an answer needs at
    /// least that much room, and one more token to say that it ends.
    pub fn max_answer_chars(&self) -> usize {
        self.answer_chars_max
    }

    /// Lines that repeated an earlier prompt with the same gold answer; they were merged into it.
    pub fn duplicates(&self) -> usize {
        self.duplicates
    }

    /// Hash of every prompt, gold answer and demonstration in order: the run's descriptor names it beside the
    /// configuration's, since a file may change while its name does not.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("muster task items v1");
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for split in Split::ALL {
            field(split.to_string().as_bytes());
            for item in self.items(split) {
                field(item.prompt.as_bytes());
                field(item.gold.as_bytes());
                field(item.demonstration.as_deref().unwrap_or("").as_bytes());
            }
        }
        *hasher.finalize().as_bytes()
    }

    /// Sorts distinct items into their splits.
    fn from_items(items: Vec<Item>, partition: Partition) -> Result<Self, TaskError> {
        let prompts = items.len();
        let mut alphabet = BTreeSet::new();
        let mut answer_chars_max = 0;
        let mut splits: BTreeMap<Split, Vec<(u64, Item)>> = BTreeMap::new();
        for item in items {
            let answer = item.demonstration.as_deref().unwrap_or(&item.gold);
            answer_chars_max = answer_chars_max.max(answer.chars().count());
            alphabet.extend(item.prompt.chars());
            alphabet.extend(item.gold.chars());
            alphabet.extend(answer.chars());
            let place = hash_u64(
                "muster task order v1",
                partition.seed,
                item.prompt.as_bytes(),
            );
            let split = partition.split(&item.prompt);
            splits.entry(split).or_default().push((place, item));
        }
        for (split, share) in [
            (Split::Train, 1.0),
            (Split::Development, partition.development_fraction),
            (Split::HeldOut, partition.held_out_fraction),
        ] {
            if share > 0.0 && !splits.contains_key(&split) {
                return Err(TaskError::EmptySplit {
                    split,
                    prompts,
                    keys: match split {
                        Split::Train => "`held_out_fraction` or `dev_fraction`",
                        Split::Development => "`dev_fraction` (0 does without it) or `seed`",
                        Split::HeldOut => "`held_out_fraction` or `seed`",
                    },
                });
            }
        }
        Ok(Self {
            splits: splits
                .into_iter()
                .map(|(split, placed)| (split, in_order(placed)))
                .collect(),
            alphabet,
            answer_chars_max,
            duplicates: 0,
        })
    }
}

/// Items by place; the prompt breaks a tie of two 64-bit hashes, so that the order never depends on the file's.
fn in_order(mut placed: Vec<(u64, Item)>) -> Vec<Item> {
    placed.sort_by(|(a, left), (b, right)| (a, &left.prompt).cmp(&(b, &right.prompt)));
    placed.into_iter().map(|(_, item)| item).collect()
}

#[cfg(test)]
mod tests;

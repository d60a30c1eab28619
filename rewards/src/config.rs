//! The task and the reward of a run as TOML: one `[task]` and a list of `[[reward]]`, alone in a REWARD.toml or embedded in
//! a run's configuration. Invariant: two configurations with one meaning have one canonical JSON, however they are written.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::reward::{Component, GoldError, Reward};
use crate::tagged::{ConfigError, one_sentence, quoted, shortened};
use crate::task::{Split, Task, TaskConfig, TaskError};

/// Largest configuration file: a thousand times the size of one written by hand.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// `[task]` and `[[reward]]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    pub task: TaskConfig,
    pub reward: Reward,
}

/// An opened task, and a reward that can score every item of it.
#[derive(Debug)]
pub struct Prepared {
    pub task: Task,
    pub reward: Reward,
}

/// Why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RewardsError {
    #[error("{file} cannot be read ({reason}): give the path of a TOML file with [task] and [[reward]]", file = file.display())]
    Unreadable { file: PathBuf, reason: String },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Task(#[from] TaskError),
    /// The reward cannot compare with the gold answer of this prompt, the first of its kind.
    #[error("prompt `{prompt}`: {reason}")]
    Gold { prompt: String, reason: GoldError },
}

impl RewardConfig {
    /// Reads a REWARD.toml.
    ///
    /// # Errors
    /// The file cannot be read, or [`RewardConfig::from_toml`] refuses its text.
    pub fn load(path: &Path) -> Result<Self, RewardsError> {
        let unreadable = |reason: String| RewardsError::Unreadable {
            file: path.to_owned(),
            reason,
        };
        let size = std::fs::metadata(path)
            .map_err(|error| unreadable(error.to_string()))?
            .len();
        if size > CONFIG_BYTES_MAX {
            return Err(unreadable(format!(
                "{size} bytes, limit {CONFIG_BYTES_MAX}"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
        Ok(Self::from_toml(&text)?)
    }

    /// Reads `[task]` and `[[reward]]`; refuses other sections.
    ///
    /// # Errors
    /// The first mistake, with the section, the key and the way out.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let mut sections: Table = text.parse().map_err(|error: toml::de::Error| {
            let offset = error.span().map_or(0, |span| span.start);
            let before = text.get(..offset).unwrap_or(text);
            ConfigError::Syntax {
                line: before.matches('\n').count() + 1,
                reason: one_sentence(&error),
            }
        })?;
        let task = match sections.remove("task") {
            Some(Value::Table(table)) => TaskConfig::from_table(table)?,
            Some(_) => return Err(mistyped("task", "write it as a table, [task]")),
            None => {
                return Err(ConfigError::MissingSection {
                    section: "[task]",
                    example: "type = \"running_sums\"",
                });
            }
        };
        let tables = match sections.remove("reward") {
            None => Vec::new(),
            Some(Value::Array(tables)) => tables,
            Some(_) => {
                return Err(mistyped(
                    "reward",
                    "it is a list: write [[reward]] with two brackets",
                ));
            }
        };
        let components = tables.into_iter().map(|table| match table {
            Value::Table(table) => Component::from_table(table),
            _ => Err(mistyped("reward", "write each as a table, [[reward]]")),
        });
        let components = components.collect::<Result<_, _>>()?;
        if let Some(key) = sections.keys().next() {
            return Err(ConfigError::UnknownKey {
                section: "the reward configuration".to_owned(),
                key: shortened(key),
                hint: String::new(),
                known: quoted(["task", "reward"]),
            });
        }
        let reward = Reward::of(components)?;
        Ok(Self { task, reward })
    }

    /// Opens the task and checks its gold answers against the reward. A relative `file` of the task starts at `base`, the
    /// configuration's folder.
    ///
    /// # Errors
    /// The task cannot be opened, or a reward function cannot compare with a gold answer.
    pub fn prepare(self, base: &Path) -> Result<Prepared, RewardsError> {
        let (task, reward) = (Task::open(&self.task, base)?, self.reward);
        for item in Split::ALL.iter().flat_map(|split| task.items(*split)) {
            reward
                .check_gold(&item.gold)
                .map_err(|reason| RewardsError::Gold {
                    prompt: shortened(&item.prompt),
                    reason,
                })?;
        }
        Ok(Prepared { task, reward })
    }

    /// JSON with every default written out and keys sorted: the form in which a run's descriptor carries the reward.
    ///
    /// # Errors
    /// [`ConfigError::Mistyped`] for a number that JSON does not have; a configuration that was read has none.
    pub fn canonical_json(&self) -> Result<String, ConfigError> {
        let mut value = serde_json::to_value(self).map_err(|error| ConfigError::Mistyped {
            section: "the configuration".to_owned(),
            reason: error.to_string(),
        })?;
        // A feature of serde_json that another crate may turn on keeps keys in insertion order.
        value.sort_all_objects();
        Ok(value.to_string())
    }
}

fn mistyped(key: &'static str, way_out: &str) -> ConfigError {
    ConfigError::Mistyped {
        section: "the reward configuration".to_owned(),
        reason: format!("`{key}` has the wrong form: {way_out}"),
    }
}

#[cfg(test)]
mod tests;

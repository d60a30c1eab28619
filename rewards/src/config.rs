//! The task and the reward of a run as they stand in TOML: one `[task]` and a list of `[[reward]]`. Alone they are a
//! REWARD.toml; a run's configuration embeds the same two keys. Invariant: two configurations that mean the same have
//! one digest, however they were written.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use toml::Table;

use crate::reward::{GoldError, Reward, RewardEntry};
use crate::tagged::{ConfigError, one_sentence, quoted};
use crate::task::{Split, Task, TaskConfig, TaskError};

/// Largest configuration file read: a thousand times what a person writes.
pub const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// `[task]` and `[[reward]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    /// What is asked.
    pub task: TaskConfig,
    /// What an answer is worth; the total is the weighted sum.
    pub reward: Vec<RewardEntry>,
}

/// An opened task and a compiled reward that can judge every item of it.
#[derive(Debug)]
pub struct Prepared {
    /// The items.
    pub task: Task,
    /// The functions.
    pub reward: Reward,
}

/// Why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RewardsError {
    /// The file is not there or not readable.
    #[error("{file} cannot be read ({reason}): give the path of a TOML file with [task] and [[reward]]", file = file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The configuration itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The task's items.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// Task and reward do not fit each other.
    #[error("prompt `{prompt}`: {reason}")]
    Gold {
        /// The first prompt whose gold answer does not fit.
        prompt: String,
        /// Why.
        reason: GoldError,
    },
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

    /// Reads `[task]` and `[[reward]]`; other sections are refused.
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
            Some(toml::Value::Table(table)) => TaskConfig::from_table(table)?,
            Some(_) => return Err(mistyped("task", "write it as a table, [task]")),
            None => {
                return Err(ConfigError::MissingSection {
                    section: "[task]",
                    example: "type = \"running_sums\"",
                });
            }
        };
        let mut reward = Vec::new();
        match sections.remove("reward") {
            None => {}
            Some(toml::Value::Array(entries)) => {
                for entry in entries {
                    let toml::Value::Table(table) = entry else {
                        return Err(mistyped("reward", "write each as a table, [[reward]]"));
                    };
                    reward.push(RewardEntry::from_table(table)?);
                }
            }
            Some(_) => {
                return Err(mistyped(
                    "reward",
                    "it is a list: write [[reward]] with two brackets",
                ));
            }
        }
        if let Some(key) = sections.keys().next() {
            return Err(ConfigError::UnknownKey {
                section: "the reward configuration".to_owned(),
                key: crate::tagged::shortened(key),
                hint: String::new(),
                known: quoted(&["task", "reward"]),
            });
        }
        Reward::compile(&reward)?;
        Ok(Self { task, reward })
    }

    /// Opens the task and compiles the reward; a relative file is looked for in `base`, the configuration's folder.
    ///
    /// # Errors
    /// Anything wrong with either, or a gold answer that a reward function cannot compare with.
    pub fn prepare(&self, base: &Path) -> Result<Prepared, RewardsError> {
        let reward = Reward::compile(&self.reward)?;
        let task = Task::open(&self.task, base)?;
        for item in Split::ALL.iter().flat_map(|split| task.items(*split)) {
            reward
                .check_gold(&item.gold)
                .map_err(|reason| RewardsError::Gold {
                    prompt: crate::tagged::shortened(&item.prompt),
                    reason,
                })?;
        }
        Ok(Prepared { task, reward })
    }

    /// JSON with every default written out and keys sorted.
    ///
    /// # Errors
    /// None for a configuration that was read; one made in code may hold a number that JSON does not have.
    pub fn canonical_json(&self) -> Result<String, ConfigError> {
        let unwritable = |error: serde_json::Error| ConfigError::Mistyped {
            section: "the configuration".to_owned(),
            reason: error.to_string(),
        };
        let value = serde_json::to_value(self).map_err(unwritable)?;
        let mut text = String::new();
        write_sorted(&value, &mut text).map_err(unwritable)?;
        Ok(text)
    }

    /// BLAKE3 of the canonical JSON: what a run's descriptor names. It covers the configuration, not the content of the
    /// task's file; that is [`Task::digest`].
    ///
    /// # Errors
    /// As [`RewardConfig::canonical_json`].
    pub fn digest(&self) -> Result<[u8; 32], ConfigError> {
        let json = self.canonical_json()?;
        Ok(blake3::derive_key(
            "muster reward configuration v1",
            json.as_bytes(),
        ))
    }
}

fn mistyped(key: &'static str, way_out: &str) -> ConfigError {
    ConfigError::Mistyped {
        section: "the reward configuration".to_owned(),
        reason: format!("`{key}` has the wrong form: {way_out}"),
    }
}

/// Whether serde_json sorts keys is a feature that another crate of the build may switch; a digest must not follow it.
fn write_sorted(value: &Value, text: &mut String) -> Result<(), serde_json::Error> {
    match value {
        Value::Object(fields) => {
            let mut sorted: Vec<(&String, &Value)> = fields.iter().collect();
            sorted.sort_by_key(|(key, _)| *key);
            text.push('{');
            for (index, (key, field)) in sorted.into_iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                text.push_str(&serde_json::to_string(key)?);
                text.push(':');
                write_sorted(field, text)?;
            }
            text.push('}');
        }
        Value::Array(entries) => {
            text.push('[');
            for (index, entry) in entries.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write_sorted(entry, text)?;
            }
            text.push(']');
        }
        plain => text.push_str(&serde_json::to_string(plain)?),
    }
    Ok(())
}

#[cfg(test)]
mod tests;

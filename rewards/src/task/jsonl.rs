//! A user's own task: a JSONL file with a prompt and a gold answer on each line; other columns are ignored. A prompt that
//! occurs twice with one gold answer is merged and counted; with two gold answers the file is refused, since no reward
//! could be right.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};

use muster_protocol::limits::GOLD_BYTES_MAX;

use super::source::{Item, SourceItems, TaskError, TaskSource};
use super::split::Partition;
use crate::json_lines::{JsonLine, JsonlReader};
use crate::tagged::ConfigError;

/// `type = "jsonl"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JsonlConfig {
    /// A relative path starts at the configuration's folder.
    pub file: String,
    /// Column that holds the prompt.
    #[serde(default = "default_prompt")]
    pub prompt: String,
    /// Column that holds the gold answer: a string, a number or a truth value.
    #[serde(default = "default_gold")]
    pub gold: String,
    /// Column that holds a whole answer for the supervised warm-up; without it the task has no demonstrations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub demonstration: Option<String>,
    /// Share of the prompts in the held-out split.
    #[serde(default = "default_held_out_fraction")]
    pub held_out_fraction: f64,
    /// Share of the prompts in the development split; 0 leaves the split out.
    #[serde(default = "default_dev_fraction")]
    pub dev_fraction: f64,
    /// Seed of the splits and of the order.
    #[serde(default)]
    pub seed: u64,
}

fn default_prompt() -> String {
    "prompt".to_owned()
}

fn default_gold() -> String {
    "gold".to_owned()
}

fn default_held_out_fraction() -> f64 {
    0.1
}

fn default_dev_fraction() -> f64 {
    0.05
}

impl TaskSource for JsonlConfig {
    fn partition(&self) -> Partition {
        Partition {
            held_out_fraction: self.held_out_fraction,
            development_fraction: self.dev_fraction,
            seed: self.seed,
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        if self.file.is_empty() {
            return Err(ConfigError::bad_value(
                "file",
                "empty",
                "but it must name a JSONL file",
            ));
        }
        if self.prompt == self.gold {
            return Err(ConfigError::bad_value(
                "gold",
                format!("`{}`", self.gold),
                "which is also the prompt's column: name another column",
            ));
        }
        self.partition().validate()
    }

    fn items(&self, base: &Path) -> Result<SourceItems, TaskError> {
        let unopenable = |reason: std::io::Error| TaskError::Unopenable {
            file: self.file.clone(),
            reason: reason.to_string(),
        };
        let file = File::open(base.join(&self.file)).map_err(unopenable)?;
        self.read_lines(BufReader::new(file))
    }
}

impl JsonlConfig {
    fn read_lines(&self, reader: impl BufRead) -> Result<SourceItems, TaskError> {
        let mut items: Vec<Item> = Vec::new();
        let mut first_seen: BTreeMap<String, (u64, usize)> = BTreeMap::new();
        let mut duplicates = 0;
        for row in JsonlReader::new(reader, &self.file) {
            let row = row?;
            let item = self.item(&row)?;
            match first_seen.get(&item.prompt) {
                None => {
                    first_seen.insert(item.prompt.clone(), (row.line, items.len()));
                    items.push(item);
                }
                Some((_, index)) if items.get(*index).is_some_and(|it| it.gold == item.gold) => {
                    duplicates += 1;
                }
                Some((first_line, _)) => {
                    return Err(TaskError::Conflict {
                        file: row.file,
                        line: row.line,
                        first_line: *first_line,
                    });
                }
            }
        }
        if items.is_empty() {
            return Err(TaskError::Empty {
                file: self.file.clone(),
            });
        }
        Ok(SourceItems {
            items,
            duplicates,
            alphabet: "",
        })
    }

    fn item(&self, row: &JsonLine) -> Result<Item, TaskError> {
        let prompt = row.text(
            &self.prompt,
            "set `prompt` in [task] to the column that holds the prompt",
        )?;
        let gold = row.text_or_number(
            &self.gold,
            "set `gold` in [task] to the column that holds the gold answer",
        )?;
        let empty = |column: &str, way_out| row.bad(column, "empty", way_out);
        if prompt.trim().is_empty() {
            return Err(empty(&self.prompt, "write a prompt or drop the line").into());
        }
        // An empty gold answer would pay for an empty completion.
        if gold.trim().is_empty() {
            return Err(empty(&self.gold, "write the answer or drop the line").into());
        }
        // A longer text would not fit the message that takes it to a critic, and the run would stand still.
        row.at_most(&self.prompt, prompt, GOLD_BYTES_MAX)?;
        row.at_most(&self.gold, &gold, GOLD_BYTES_MAX)?;
        let demonstration = match &self.demonstration {
            None => None,
            Some(column) => {
                let text = row.text(
                    column,
                    "set `demonstration` in [task] to the column that holds a whole answer, or remove it",
                )?;
                Some(text.to_owned())
            }
        };
        Ok(Item {
            prompt: prompt.to_owned(),
            gold,
            demonstration,
        })
    }
}

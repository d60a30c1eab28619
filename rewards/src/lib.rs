//! CRITIQUE: tasks, rewards and the critic. A task gives prompts with gold answers in three splits that share no prompt; a
//! reward turns a text into a finite number of a declared range; the critic scores groups and checks that their author
//! drew them as ordered.
//!
//! All modules except [`critic`] are pure: text in, numbers out, the same bits on every machine. They know nothing about
//! tokens, weights or the network.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod check;
mod config;
pub mod critic;
mod function;
mod functions;
mod json_lines;
mod reward;
mod score;
mod tagged;
mod task;

pub use check::{CheckReport, Hack, Probe, check};
pub use config::{Prepared, RewardConfig, RewardsError};
pub use function::{Answer, Range};
pub use json_lines::JsonlError;
pub use reward::{ComponentScore, GoldError, Reward, Score};
pub use score::{ScoreError, ScoreLines, ScoreSummary, ScoredLine};
pub use tagged::ConfigError;
pub use task::{Item, JsonlConfig, RunningSumsConfig, Split, Task, TaskConfig, TaskError};

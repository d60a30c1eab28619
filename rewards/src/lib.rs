//! CRITIQUE: what is asked, what is right, and what an answer is worth. Tasks hand out prompts in three splits that never
//! share one; reward functions turn a text into a finite number in a declared range; a configuration composes them, can
//! explain itself and is tried against cheap hacks before anybody trains on it.
//!
//! All modules but [`critic`] are pure: text in, numbers out, the same bits on every machine. They know nothing about
//! tokens, weights or the network; the critic brings these together.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)
)]

pub mod check;
pub mod config;
pub mod critic;
pub mod function;
pub mod jsonl;
pub mod reward;
pub mod score;
pub mod tagged;
pub mod task;

pub use check::{CheckReport, Hack, Probe, check};
pub use config::{Prepared, RewardConfig, RewardsError};
pub use reward::{Answer, ComponentScore, GoldError, Range, Reward, RewardEntry, Score};
pub use score::{ScoreError, ScoreLines, ScoreSummary, ScoredLine};
pub use tagged::ConfigError;
pub use task::{Item, Split, Task, TaskConfig, TaskError};

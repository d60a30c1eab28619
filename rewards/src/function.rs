//! One reward function: a text and a gold answer in, a value of its own declared range out. The files below hold one
//! function each; `extract` and `number` say how an answer is read. Knows nothing about weights or other functions.

pub mod exact_match;
pub mod extract;
pub mod format;
pub mod length;
pub mod number;
pub mod numeric_match;
pub mod regex;

use serde::Serialize;
use toml::Table;

use crate::reward::{Answer, Range};
use crate::tagged::{self, ConfigError};

pub use exact_match::ExactMatchConfig;
pub use extract::Extract;
pub use format::FormatConfig;
pub use length::LengthConfig;
pub use numeric_match::NumericMatchConfig;
pub use regex::RegexConfig;

/// A gold answer this function cannot compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UnfitGold {
    pub(crate) found: &'static str,
    pub(crate) way_out: &'static str,
}

/// A compiled function.
pub(crate) trait Function: std::fmt::Debug + Send + Sync {
    /// The interval its values never leave.
    fn range(&self) -> Range {
        Range::UNIT
    }

    /// The value of an answer; the gold answer is looked at first, whatever the text.
    fn value(&self, answer: &Answer<'_>, gold: &str) -> Result<f64, UnfitGold>;

    /// What it pays for, as half a sentence.
    fn explain(&self) -> String;

    /// `text` put where this function reads the answer from: how one would write it honestly, and how a cheap hack would.
    fn dress(&self, _text: &str) -> Option<String> {
        None
    }

    /// Whether it reads [`Answer::tokens`].
    fn counts_tokens(&self) -> bool {
        false
    }
}

/// Which function, tagged by `type`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FunctionConfig {
    /// The answer is the gold answer, character by character.
    ExactMatch(ExactMatchConfig),
    /// A number of the answer is the gold number, within a tolerance.
    NumericMatch(NumericMatchConfig),
    /// The answer matches a pattern, and what it captures is the gold answer.
    Regex(RegexConfig),
    /// The answer has the required tags in order.
    Format(FormatConfig),
    /// The answer is neither too short nor too long.
    Length(LengthConfig),
}

impl FunctionConfig {
    /// All types, as they are written in TOML.
    pub const TYPES: &'static [&'static str] =
        &["exact_match", "numeric_match", "regex", "format", "length"];

    /// Reads the keys of one type; `shared_keys` are named as known too when one is refused.
    pub(crate) fn from_table(
        kind: &str,
        table: Table,
        section: &str,
        shared_keys: &[&'static str],
    ) -> Result<Self, ConfigError> {
        Ok(match kind {
            "exact_match" => Self::ExactMatch(tagged::read(table, section, shared_keys)?),
            "numeric_match" => Self::NumericMatch(tagged::read(table, section, shared_keys)?),
            "regex" => Self::Regex(tagged::read(table, section, shared_keys)?),
            "format" => Self::Format(tagged::read(table, section, shared_keys)?),
            _ => Self::Length(tagged::read(table, section, shared_keys)?),
        })
    }

    pub(crate) fn compile(&self) -> Result<Box<dyn Function>, ConfigError> {
        Ok(match self {
            Self::ExactMatch(config) => Box::new(config.clone().checked()?),
            Self::NumericMatch(config) => Box::new(config.clone().checked()?),
            Self::Regex(config) => Box::new(config.compile()?),
            Self::Format(config) => Box::new(config.compile()?),
            Self::Length(config) => Box::new(config.clone().checked()?),
        })
    }
}

/// 1 for right, 0 for wrong.
pub(crate) fn right(is_right: bool) -> f64 {
    if is_right { 1.0 } else { 0.0 }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::reward::{Reward, RewardEntry};

    /// A finished answer's value; one token for each character.
    pub(crate) fn value_of(function: &dyn Function, text: &str, gold: &str) -> f64 {
        let answer = Answer {
            prompt: "what?",
            text,
            finished: true,
            tokens: text.chars().count(),
        };
        function
            .value(&answer, gold)
            .expect("a gold answer that fits")
    }

    /// What a reward of one entry says about a gold answer.
    pub(crate) fn refusal_of_gold(entry: &str, gold: &str) -> String {
        let entry = RewardEntry::from_table(entry.parse().unwrap()).unwrap();
        let reward = Reward::compile(&[entry]).unwrap();
        reward.check_gold(gold).unwrap_err().to_string()
    }
}

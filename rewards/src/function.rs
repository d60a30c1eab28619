//! The contract of one reward function: an answer and its gold answer in, a value of a declared range out. The functions
//! themselves are in [`crate::functions`]. Knows nothing about weights or about other functions.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::tagged::ConfigError;

/// One answer to a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer<'a> {
    pub prompt: &'a str,
    /// The completion as text, without the prompt and without end markers.
    pub text: &'a str,
    /// Whether the policy ended the answer by itself; false when it ran out of tokens.
    pub finished: bool,
    /// Length of the completion in tokens.
    pub tokens: usize,
}

/// A closed interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Range {
    pub min: f64,
    pub max: f64,
}

impl Range {
    /// The range of functions that answer right (1) or wrong (0).
    pub(crate) const UNIT: Self = Self { min: 0.0, max: 1.0 };

    /// Whether `value` lies in the interval; NaN does not.
    pub fn contains(&self, value: f64) -> bool {
        value >= self.min && value <= self.max
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Six places hide rounding errors such as 0.1 + 0.2 = 0.30000000000000004.
        let rounded = |value: f64| (value * 1e6).round() / 1e6;
        write!(f, "{} to {}", rounded(self.min), rounded(self.max))
    }
}

/// Why a function cannot compare with a gold answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UnfitGold {
    /// What the gold answer is, such as "no number".
    pub(crate) found: &'static str,
    pub(crate) way_out: &'static str,
}

/// A compiled function.
pub(crate) trait Function: fmt::Debug + Send + Sync {
    /// The interval that every value lies in.
    fn range(&self) -> Range {
        Range::UNIT
    }

    /// The value of an answer. Checks the gold answer before it looks at the text, so that [`UnfitGold`] does not depend
    /// on the text.
    fn value(&self, answer: &Answer<'_>, gold: &str) -> Result<f64, UnfitGold>;

    /// What the function pays for, as a clause that begins with a verb.
    fn explain(&self) -> String;

    /// `text` put where this function looks for the answer, for example between tags; none if the function reads the
    /// whole text. `rewards check` writes honest answers and hacks with it.
    fn dress(&self, _text: &str) -> Option<String> {
        None
    }

    /// Whether the value depends on [`Answer::tokens`].
    fn counts_tokens(&self) -> bool {
        false
    }
}

/// The configuration of one function.
pub(crate) trait Compile {
    /// Checks the values and compiles the function.
    ///
    /// # Errors
    /// [`ConfigError::BadValue`] without a section for a value outside its limits.
    fn compile(&self) -> Result<Arc<dyn Function>, ConfigError>;
}

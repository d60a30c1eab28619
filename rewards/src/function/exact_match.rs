//! `exact_match`: 1 if the answer is the gold answer character by character, white space at the ends left out. No
//! Unicode normalisation: its tables change with the standard library, and two machines must agree on a reward.

use serde::{Deserialize, Serialize};

use super::{Extract, Function, UnfitGold, right};
use crate::reward::Answer;
use crate::tagged::ConfigError;

/// How letters are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Case {
    /// `A` is not `a`.
    #[default]
    Sensitive,
    /// `A` is `a`, for the letters of ASCII.
    Insensitive,
}

/// `type = "exact_match"`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExactMatchConfig {
    /// Where the answer stands in the text.
    pub extract: Extract,
    /// What the text must end with; it is no part of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub terminator: Option<String>,
    /// How letters are compared.
    pub case: Case,
}

impl ExactMatchConfig {
    pub(super) fn checked(self) -> Result<Self, ConfigError> {
        self.extract.validate(self.terminator.as_deref())?;
        Ok(self)
    }
}

impl Function for ExactMatchConfig {
    fn value(&self, answer: &Answer<'_>, gold: &str) -> Result<f64, UnfitGold> {
        let gold = gold.trim();
        let read = self.extract.read(self.terminator.as_deref(), answer.text);
        Ok(right(read.is_some_and(|read| match self.case {
            Case::Sensitive => read == gold,
            Case::Insensitive => read.eq_ignore_ascii_case(gold),
        })))
    }

    fn explain(&self) -> String {
        let case = match self.case {
            Case::Sensitive => "",
            Case::Insensitive => ", upper and lower case alike",
        };
        format!(
            "pays 1 if {} is the gold answer, character by character{case}",
            self.extract.explain(self.terminator.as_deref())
        )
    }

    fn dress(&self, text: &str) -> Option<String> {
        Some(self.extract.write(self.terminator.as_deref(), text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::function::tests::value_of;

    #[test]
    fn the_answer_must_be_the_gold_answer_to_the_character() {
        let exact = ExactMatchConfig::default();
        assert_eq!(value_of(&exact, "Paris", "Paris"), 1.0);
        assert_eq!(value_of(&exact, " Paris\n", "Paris "), 1.0);
        assert_eq!(value_of(&exact, "paris", "Paris"), 0.0);
        assert_eq!(value_of(&exact, "Paris.", "Paris"), 0.0);
        assert_eq!(value_of(&exact, "Paris Paris", "Paris"), 0.0);
        assert_eq!(value_of(&exact, "", "Paris"), 0.0);
        // é as one character and as two.
        assert_eq!(value_of(&exact, "caf\u{e9}", "cafe\u{301}"), 0.0);
    }

    #[test]
    fn case_and_place_can_be_chosen() {
        let exact = ExactMatchConfig {
            extract: Extract::InsideTag("answer".to_owned()),
            case: Case::Insensitive,
            ..Default::default()
        };
        assert_eq!(value_of(&exact, "hm <answer>YES</answer>", "yes"), 1.0);
        assert_eq!(value_of(&exact, "yes", "yes"), 0.0);
    }
}

//! `exact_match`: 1 if the answer equals the gold answer character by character; white space at both ends is ignored. There
//! is no Unicode normalisation: its tables change with the standard library, and two machines must agree on a reward.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::extract::Extract;
use crate::function::{Answer, Compile, Function, UnfitGold};
use crate::tagged::ConfigError;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Case {
    #[default]
    Sensitive,
    /// Ignores the case of ASCII letters only.
    Insensitive,
}

/// `type = "exact_match"`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ExactMatchConfig {
    /// Where the answer is in the text.
    extract: Extract,
    /// Text that must end the completion; it is not part of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    terminator: Option<String>,
    case: Case,
}

impl Compile for ExactMatchConfig {
    fn compile(&self) -> Result<Arc<dyn Function>, ConfigError> {
        self.extract.validate(self.terminator.as_deref())?;
        Ok(Arc::new(self.clone()))
    }
}

impl Function for ExactMatchConfig {
    fn value(&self, answer: &Answer<'_>, gold: &str) -> Result<f64, UnfitGold> {
        let gold = gold.trim();
        let read = self.extract.read(self.terminator.as_deref(), answer.text);
        let is_right = read.is_some_and(|read| match self.case {
            Case::Sensitive => read == gold,
            Case::Insensitive => read.eq_ignore_ascii_case(gold),
        });
        Ok(is_right.into())
    }

    fn explain(&self) -> String {
        let case = match self.case {
            Case::Sensitive => "",
            Case::Insensitive => ", ignoring upper and lower case",
        };
        format!(
            "pays 1 if {} equals the gold answer, character by character{case}",
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
    use crate::functions::tests::value_of;

    #[test]
    fn every_character_of_the_answer_must_match() {
        let exact = ExactMatchConfig::default();
        assert_eq!(value_of(&exact, "Paris", "Paris"), 1.0);
        assert_eq!(value_of(&exact, " Paris\n", "Paris "), 1.0);
        assert_eq!(value_of(&exact, "paris", "Paris"), 0.0);
        assert_eq!(value_of(&exact, "Paris.", "Paris"), 0.0);
        assert_eq!(value_of(&exact, "Paris Paris", "Paris"), 0.0);
        assert_eq!(value_of(&exact, "", "Paris"), 0.0);
        // é as one code point and as two.
        assert_eq!(value_of(&exact, "caf\u{e9}", "cafe\u{301}"), 0.0);
    }

    #[test]
    fn letter_case_can_be_ignored_and_the_answer_read_from_a_tag() {
        let exact = ExactMatchConfig {
            extract: Extract::InsideTag("answer".to_owned()),
            case: Case::Insensitive,
            ..Default::default()
        };
        assert_eq!(value_of(&exact, "hm <answer>YES</answer>", "yes"), 1.0);
        assert_eq!(value_of(&exact, "yes", "yes"), 0.0);
    }
}

//! `numeric_match`: 1 if a number of the answer is the gold number within a tolerance. Without a tolerance the decimals are
//! compared exactly, beyond what f64 can hold.

use serde::{Deserialize, Serialize};

use super::number::{Number, numbers_of};
use super::{Extract, Function, UnfitGold, right};
use crate::reward::Answer;
use crate::tagged::ConfigError;

/// Which number of the extracted answer counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Which {
    /// The last one, as in prose that ends with the result.
    #[default]
    Last,
    /// The first one.
    First,
    /// The answer must be a number and nothing else.
    Whole,
}

/// `type = "numeric_match"`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NumericMatchConfig {
    /// Where the answer stands in the text.
    pub extract: Extract,
    /// What the text must end with; it is no part of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub terminator: Option<String>,
    /// Which number of the answer counts.
    pub number: Which,
    /// Largest |answer − gold| that is right.
    pub absolute_tolerance: f64,
    /// Largest |answer − gold| that is right, as a share of |gold|; the larger of the two tolerances counts.
    pub relative_tolerance: f64,
}

impl NumericMatchConfig {
    pub(super) fn checked(self) -> Result<Self, ConfigError> {
        self.extract.validate(self.terminator.as_deref())?;
        if !(self.absolute_tolerance >= 0.0 && self.absolute_tolerance.is_finite()) {
            return Err(ConfigError::bad_value(
                "absolute_tolerance",
                self.absolute_tolerance,
                "but a tolerance must be a number of at least 0",
            ));
        }
        // At 1, zero is within the tolerance of every gold answer.
        if !(0.0..1.0).contains(&self.relative_tolerance) {
            return Err(ConfigError::bad_value(
                "relative_tolerance",
                self.relative_tolerance,
                "but it must be at least 0 and below 1, since at 1 the answer 0 would always be right",
            ));
        }
        Ok(self)
    }

    fn is_right(&self, number: &Number, gold: &Number) -> bool {
        if number.is(gold) {
            return true;
        }
        let tolerance = self
            .absolute_tolerance
            .max(self.relative_tolerance * gold.value.abs());
        tolerance > 0.0 && (number.value - gold.value).abs() <= tolerance
    }
}

impl Function for NumericMatchConfig {
    fn value(&self, answer: &Answer<'_>, gold: &str) -> Result<f64, UnfitGold> {
        let gold = Number::parse(gold.trim()).ok_or(UnfitGold {
            found: "no number",
            way_out: "write gold answers as plain numbers (26, -0.5, 1e3), or use exact_match",
        })?;
        let read = self.extract.read(self.terminator.as_deref(), answer.text);
        let number = read.and_then(|read| match self.number {
            Which::Last => numbers_of(read).next_back(),
            Which::First => numbers_of(read).next(),
            Which::Whole => Number::parse(read),
        });
        Ok(right(
            number.is_some_and(|number| self.is_right(&number, &gold)),
        ))
    }

    fn explain(&self) -> String {
        let which = match self.number {
            Which::Last => "the last number of ",
            Which::First => "the first number of ",
            Which::Whole => "",
        };
        let tolerance = match (self.absolute_tolerance, self.relative_tolerance) {
            (0.0, 0.0) => "is exactly the gold number".to_owned(),
            (absolute, 0.0) => format!("is within {absolute} of the gold number"),
            (0.0, relative) => format!("is within {} % of the gold number", relative * 100.0),
            (absolute, relative) => format!(
                "is within {absolute} or {} % of the gold number",
                relative * 100.0
            ),
        };
        format!(
            "pays 1 if {which}{} {tolerance}",
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
    use crate::function::tests::{refusal_of_gold, value_of};

    fn running_sums() -> NumericMatchConfig {
        NumericMatchConfig {
            extract: Extract::AfterLast(",".to_owned()),
            terminator: Some(".".to_owned()),
            number: Which::Whole,
            ..Default::default()
        }
    }

    #[test]
    fn the_number_after_the_last_comma_must_be_the_sum_and_the_text_must_end_with_a_dot() {
        let sums = running_sums();
        assert_eq!(value_of(&sums, "17,24,26.", "26"), 1.0);
        assert_eq!(value_of(&sums, "1,2,26.", "26"), 1.0);
        assert_eq!(value_of(&sums, "17,24,26.0.", "26"), 1.0);
        for wrong in [
            "17,24,26",
            "17,24,27.",
            "17,24,026.",
            "17,24,26..",
            "26.",
            "17,26,24.",
            "17,24,26.x",
            "17,24,2 6.",
            "17,24,nan.",
            "17,24,1e999.",
            "",
            ".",
            ",.",
            "17,24,２６.",
            "17,24,−26.",
            "17,24,+26.",
        ] {
            assert_eq!(value_of(&sums, wrong, "26"), 0.0, "{wrong}");
        }
        assert_eq!(
            value_of(&sums, &format!("{}26.", ",".repeat(100_000)), "26"),
            1.0
        );
    }

    #[test]
    fn the_last_or_first_number_of_a_text_can_be_read() {
        let last = NumericMatchConfig::default();
        let first = NumericMatchConfig {
            number: Which::First,
            ..Default::default()
        };
        let text = "first 17, then 24, so the answer is 26.";
        assert_eq!(
            (value_of(&last, text, "26"), value_of(&last, text, "17")),
            (1.0, 0.0)
        );
        assert_eq!(
            (value_of(&first, text, "26"), value_of(&first, text, "17")),
            (0.0, 1.0)
        );
    }

    #[test]
    fn the_larger_of_both_tolerances_counts() {
        let near = NumericMatchConfig {
            absolute_tolerance: 0.5,
            relative_tolerance: 0.01,
            ..Default::default()
        };
        assert_eq!(value_of(&near, "1.5", "1"), 1.0);
        assert_eq!(value_of(&near, "1.6", "1"), 0.0);
        assert_eq!(value_of(&near, "1009", "1000"), 1.0);
        assert_eq!(value_of(&near, "1011", "1000"), 0.0);
        assert_eq!(value_of(&near, "-1e308", "1e308"), 0.0);
    }

    #[test]
    fn without_a_tolerance_integers_beyond_f64_are_told_apart() {
        let exact = NumericMatchConfig::default();
        assert_eq!(
            value_of(&exact, "9007199254740993", "9007199254740993"),
            1.0
        );
        assert_eq!(
            value_of(&exact, "9007199254740992", "9007199254740993"),
            0.0
        );
    }

    #[test]
    fn a_gold_answer_that_is_no_number_is_refused_and_not_scored() {
        insta::assert_snapshot!(
            refusal_of_gold(r#"type = "numeric_match""#, "Paris"),
            @"the gold answer `Paris` is no number, so reward numeric_match cannot compare with it: write gold answers as plain numbers (26, -0.5, 1e3), or use exact_match"
        );
    }
}

//! `numeric_match`: 1 if a number in the answer equals the gold number within a tolerance. Without a tolerance the decimals
//! are compared exactly, beyond the precision of f64.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::extract::Extract;
use super::number::{Number, numbers_of};
use crate::function::{Answer, Compile, Function, UnfitGold};
use crate::tagged::ConfigError;

/// The number of the extracted answer that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum NumberChoice {
    /// Fits prose that ends with the result.
    #[default]
    Last,
    First,
    /// The answer must be one number and nothing else.
    Whole,
}

/// `type = "numeric_match"`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NumericMatchConfig {
    /// Where the answer is in the text.
    extract: Extract,
    /// Text that must end the completion; it is not part of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    terminator: Option<String>,
    number: NumberChoice,
    /// Largest |answer − gold| that is right.
    absolute_tolerance: f64,
    /// Largest |answer − gold| that is right, as a share of |gold|; the larger of the two tolerances counts.
    relative_tolerance: f64,
}

impl Compile for NumericMatchConfig {
    fn compile(&self) -> Result<Arc<dyn Function>, ConfigError> {
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
        Ok(Arc::new(self.clone()))
    }
}

impl NumericMatchConfig {
    fn is_right(&self, number: &Number, gold: &Number) -> bool {
        if number.equals(gold) {
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
            found: "not a number",
            way_out: "write gold answers as plain numbers (26, -0.5, 1e3), or use exact_match",
        })?;
        let read = self.extract.read(self.terminator.as_deref(), answer.text);
        let number = read.and_then(|read| match self.number {
            NumberChoice::Last => numbers_of(read).next_back(),
            NumberChoice::First => numbers_of(read).next(),
            NumberChoice::Whole => Number::parse(read),
        });
        let is_right = number.is_some_and(|number| self.is_right(&number, &gold));
        Ok(is_right.into())
    }

    fn explain(&self) -> String {
        let which = match self.number {
            NumberChoice::Last => "the last number of ",
            NumberChoice::First => "the first number of ",
            NumberChoice::Whole => "",
        };
        let tolerance = match (self.absolute_tolerance, self.relative_tolerance) {
            (0.0, 0.0) => "equals the gold number exactly".to_owned(),
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
    use crate::functions::tests::value_of;

    fn running_sums() -> NumericMatchConfig {
        NumericMatchConfig {
            extract: Extract::AfterLast(",".to_owned()),
            terminator: Some(".".to_owned()),
            number: NumberChoice::Whole,
            ..Default::default()
        }
    }

    #[test]
    fn a_running_sum_needs_the_right_last_number_and_the_final_dot() {
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
    fn the_last_or_the_first_number_of_a_text_can_be_chosen() {
        let last = NumericMatchConfig::default();
        let first = NumericMatchConfig {
            number: NumberChoice::First,
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
    fn without_a_tolerance_integers_beyond_f64_are_compared_exactly() {
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
    fn a_gold_answer_that_is_not_a_number_is_refused() {
        let function = NumericMatchConfig::default().compile().unwrap();
        let answer = Answer {
            prompt: "",
            text: "",
            finished: true,
            tokens: 0,
        };
        let refused = function.value(&answer, "Paris");
        assert_eq!(refused.map_err(|unfit| unfit.found), Err("not a number"));
    }
}

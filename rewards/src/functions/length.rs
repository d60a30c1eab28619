//! `length`: 0 inside the allowed lengths, falling linearly to −1 outside them. It is a penalty and never a bonus: filler
//! text would earn a bonus for length alone.

use std::num::NonZeroU32;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::function::{Answer, Compile, Function, Range, UnfitGold};
use crate::tagged::ConfigError;

/// Penalty-free margin before the penalty is full, in units: steep enough to matter in a group of answers of a few hundred
/// tokens.
const RAMP_DEFAULT: NonZeroU32 = NonZeroU32::new(100).unwrap();

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    /// Of the policy's tokenizer.
    #[default]
    Tokens,
    /// Unicode scalar values.
    Chars,
}

/// `type = "length"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LengthConfig {
    #[serde(default)]
    unit: Unit,
    /// The only length without a penalty; instead of `min` and `max`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target: Option<u32>,
    /// Shortest length without a penalty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min: Option<u32>,
    /// Longest length without a penalty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max: Option<u32>,
    /// Distance from the allowed lengths at which the penalty is full.
    #[serde(default = "default_ramp")]
    ramp: NonZeroU32,
}

fn default_ramp() -> NonZeroU32 {
    RAMP_DEFAULT
}

impl Compile for LengthConfig {
    fn compile(&self) -> Result<Arc<dyn Function>, ConfigError> {
        match (self.target, self.min, self.max) {
            (None, None, None) => Err(ConfigError::bad_value(
                "target",
                "absent",
                "and so are `min` and `max`: give one of them",
            )),
            (Some(target), min, max) if min.is_some() || max.is_some() => {
                Err(ConfigError::bad_value(
                    "target",
                    target,
                    "but `min` or `max` is given too: keep either the target or the bounds",
                ))
            }
            (None, Some(min), Some(max)) if min > max => Err(ConfigError::bad_value(
                "min",
                min,
                format!("but it must not be above `max` ({max})"),
            )),
            _ => Ok(Arc::new(self.clone())),
        }
    }
}

impl LengthConfig {
    /// Shortest and longest length without a penalty.
    fn bounds(&self) -> (u64, u64) {
        let shortest = self.target.or(self.min).unwrap_or(0);
        let longest = self.target.or(self.max).map_or(u64::MAX, u64::from);
        (u64::from(shortest), longest)
    }

    fn unit_name(&self) -> &'static str {
        match self.unit {
            Unit::Tokens => "tokens",
            Unit::Chars => "characters",
        }
    }
}

impl Function for LengthConfig {
    fn range(&self) -> Range {
        Range {
            min: -1.0,
            max: 0.0,
        }
    }

    fn value(&self, answer: &Answer<'_>, _: &str) -> Result<f64, UnfitGold> {
        let length = match self.unit {
            Unit::Tokens => answer.tokens,
            Unit::Chars => answer.text.chars().count(),
        } as u64;
        let (shortest, longest) = self.bounds();
        let outside = shortest
            .saturating_sub(length)
            .max(length.saturating_sub(longest));
        let ramp = u64::from(self.ramp.get());
        // Both numbers are below 2^32, so the conversions are exact. `0.0 -` instead of `-` avoids printing −0.
        Ok(0.0 - outside.min(ramp) as f64 / ramp as f64)
    }

    fn explain(&self) -> String {
        let unit = self.unit_name();
        let allowed = match (self.target, self.min, self.max) {
            (Some(target), _, _) => format!("other than {target} {unit}"),
            (None, Some(min), Some(max)) => format!("outside {min} to {max} {unit}"),
            (None, Some(min), None) => format!("below {min} {unit}"),
            (None, None, max) => format!("above {} {unit}", max.unwrap_or(u32::MAX)),
        };
        format!(
            "takes up to 1 from a text {allowed}, in full at a distance of {} {unit}",
            self.ramp
        )
    }

    fn counts_tokens(&self) -> bool {
        self.unit == Unit::Tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::functions::tests::{refusal, value_of};

    fn config(text: &str) -> LengthConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn the_penalty_grows_linearly_outside_the_bounds() {
        let length = config("unit = 'chars'\nmin = 2\nmax = 4\nramp = 4");
        for (text, expected) in [
            ("", -0.5),
            ("a", -0.25),
            ("ab", 0.0),
            ("abcd", 0.0),
            ("abcde", -0.25),
            ("abcdefghij", -1.0),
            ("éééé", 0.0),
        ] {
            assert_eq!(value_of(&length, text, "x"), expected, "{text}");
        }
        assert_eq!(value_of(&length, &"a".repeat(1_000_000), "x"), -1.0);
        assert!(value_of(&length, "ab", "x").is_sign_positive());
    }

    #[test]
    fn tokens_are_counted_if_the_unit_is_tokens() {
        let length = config("target = 10\nramp = 10");
        let value = |tokens| {
            let answer = Answer {
                prompt: "",
                text: "",
                finished: true,
                tokens,
            };
            length.value(&answer, "x").unwrap()
        };
        assert_eq!((value(10), value(5), value(usize::MAX)), (0.0, -0.5, -1.0));
    }

    #[test]
    fn bounds_that_contradict_each_other_are_refused() {
        let refusal = |text| refusal(&config(text));
        insta::assert_snapshot!(
            refusal(""),
            @"reward x: `target` is absent, and so are `min` and `max`: give one of them"
        );
        insta::assert_snapshot!(
            refusal("target = 5\nmax = 9"),
            @"reward x: `target` is 5, but `min` or `max` is given too: keep either the target or the bounds"
        );
        insta::assert_snapshot!(
            refusal("min = 9\nmax = 5"),
            @"reward x: `min` is 9, but it must not be above `max` (5)"
        );
    }
}

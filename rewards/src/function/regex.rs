//! `regex`: 1 if the pattern matches and, where a capture is named, if the first match captured the gold answer. The engine
//! runs in time linear in the text and the compiled pattern is bounded, so that neither a pattern nor an answer can make
//! a critic hang. Only the leftmost match is looked at: trying all of them would be quadratic.

use ::regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use super::{Function, UnfitGold, right};
use crate::reward::Answer;
use crate::tagged::{ConfigError, shortened};

/// Longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 4096;

/// Largest compiled pattern, and cache of its automaton, in bytes: `(a{1000}){1000}` must not take a gigabyte.
const COMPILED_BYTES_MAX: usize = 1 << 20;

/// Deepest nesting of groups.
const NESTING_MAX: u32 = 64;

/// `type = "regex"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegexConfig {
    /// The pattern, in the syntax of the crate `regex`; `^…$` asks for the whole text.
    pub pattern: String,
    /// Number of the group that must have captured the gold answer; without it a match is enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture: Option<usize>,
}

impl RegexConfig {
    pub(super) fn compile(&self) -> Result<RegexMatch, ConfigError> {
        if self.pattern.is_empty() || self.pattern.len() > PATTERN_BYTES_MAX {
            return Err(ConfigError::bad_value(
                "pattern",
                format!("{} bytes long", self.pattern.len()),
                format!("but it must be from 1 to {PATTERN_BYTES_MAX} bytes"),
            ));
        }
        let regex = RegexBuilder::new(&self.pattern)
            .size_limit(COMPILED_BYTES_MAX)
            .dfa_size_limit(COMPILED_BYTES_MAX)
            .nest_limit(NESTING_MAX)
            .build()
            .map_err(|error| {
                ConfigError::bad_value(
                    "pattern",
                    format!("`{}`", shortened(&self.pattern)),
                    format!("which is refused ({}): {}", reason(&error), way_out(&error)),
                )
            })?;
        if let Some(capture) = self.capture
            && capture >= regex.captures_len()
        {
            return Err(ConfigError::bad_value(
                "capture",
                capture,
                format!(
                    "but the pattern has {} groups: put ( ) around the part to compare, or give a smaller number",
                    regex.captures_len() - 1
                ),
            ));
        }
        Ok(RegexMatch {
            regex,
            capture: self.capture,
        })
    }
}

/// The last line of what `regex` says; the lines above it draw the pattern.
fn reason(error: &::regex::Error) -> String {
    match error {
        ::regex::Error::CompiledTooBig(bytes) => format!("compiled it exceeds {bytes} bytes"),
        other => {
            let shown = other.to_string();
            let last = shown.lines().last().unwrap_or_default();
            shortened(last.trim_start_matches("error: "))
        }
    }
}

fn way_out(error: &::regex::Error) -> &'static str {
    match error {
        ::regex::Error::CompiledTooBig(_) => "use smaller repetition counts",
        _ => "correct it; look-around and back-references are not supported",
    }
}

/// A compiled pattern.
#[derive(Debug)]
pub(super) struct RegexMatch {
    regex: Regex,
    capture: Option<usize>,
}

impl Function for RegexMatch {
    fn value(&self, answer: &Answer<'_>, gold: &str) -> Result<f64, UnfitGold> {
        let Some(group) = self.capture else {
            return Ok(right(self.regex.is_match(answer.text)));
        };
        let captured = self
            .regex
            .captures(answer.text)
            .and_then(|captures| captures.get(group));
        Ok(right(
            captured.is_some_and(|found| found.as_str().trim() == gold.trim()),
        ))
    }

    fn explain(&self) -> String {
        let pattern = shortened(self.regex.as_str());
        match self.capture {
            None => format!("pays 1 if the text matches `{pattern}`, whatever the gold answer is"),
            Some(group) => format!(
                "pays 1 if group {group} of the first match of `{pattern}` is the gold answer"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::function::tests::value_of;

    fn compiled(pattern: &str, capture: Option<usize>) -> Result<RegexMatch, ConfigError> {
        RegexConfig {
            pattern: pattern.to_owned(),
            capture,
        }
        .compile()
    }

    #[test]
    fn a_capture_is_compared_with_the_gold_answer() {
        let boxed = compiled(r"\\boxed\{([^{}]*)\}\s*$", Some(1)).unwrap();
        assert_eq!(value_of(&boxed, r"so \boxed{ 26 }", "26"), 1.0);
        assert_eq!(value_of(&boxed, r"so \boxed{27}", "26"), 0.0);
        assert_eq!(value_of(&boxed, "26", "26"), 0.0);
        let optional = compiled("a(b)?", Some(1)).unwrap();
        assert_eq!(value_of(&optional, "a", "b"), 0.0);
    }

    #[test]
    fn without_a_capture_a_match_is_enough() {
        let word = compiled(r"^\w+$", None).unwrap();
        assert_eq!(value_of(&word, "größe", "x"), 1.0);
        assert_eq!(value_of(&word, "two words", "x"), 0.0);
        let capitals = compiled(r"(?i)^\p{Lu}+$", None).unwrap();
        assert_eq!(value_of(&capitals, "größe", "x"), 1.0);
    }

    #[test]
    fn a_pattern_that_backtracks_elsewhere_is_linear_here() {
        let nested = compiled("^(a+)+$", None).unwrap();
        let text = format!("{}b", "a".repeat(100_000));
        assert_eq!(value_of(&nested, &text, "x"), 0.0);
    }

    #[test]
    fn a_bad_pattern_is_refused_in_one_sentence() {
        let refusal = |pattern: &str, capture| {
            compiled(pattern, capture)
                .unwrap_err()
                .in_section("reward regex")
                .to_string()
        };
        insta::assert_snapshot!(
            refusal("(26", None),
            @"reward regex: `pattern` is `(26`, which is refused (unclosed group): correct it; look-around and back-references are not supported"
        );
        insta::assert_snapshot!(
            refusal("(?=26)", None),
            @"reward regex: `pattern` is `(?=26)`, which is refused (look-around, including look-ahead and look-behind, is not su…): correct it; look-around and back-references are not supported"
        );
        insta::assert_snapshot!(
            refusal("(a{1000}){1000}", None),
            @"reward regex: `pattern` is `(a{1000}){1000}`, which is refused (compiled it exceeds 1048576 bytes): use smaller repetition counts"
        );
        insta::assert_snapshot!(
            refusal("", None),
            @"reward regex: `pattern` is 0 bytes long, but it must be from 1 to 4096 bytes"
        );
        insta::assert_snapshot!(
            refusal("(a)", Some(2)),
            @"reward regex: `capture` is 2, but the pattern has 1 groups: put ( ) around the part to compare, or give a smaller number"
        );
        assert!(refusal(&"(".repeat(4096), None).contains("refused"));
    }
}

//! `regex`: 1 if the pattern matches and, with `capture`, if the group of the first match equals the gold answer. The engine
//! runs in time linear in the text and the compiled pattern is bounded, so that neither a pattern nor an answer can make
//! a critic hang. Only the leftmost match counts: trying all matches would take quadratic time.

use std::sync::Arc;

use ::regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use crate::function::{Answer, Compile, Function, UnfitGold};
use crate::tagged::{ConfigError, shortened};

/// Longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 4096;

/// Largest compiled pattern, and largest cache of its automaton, in bytes: `(a{1000}){1000}` must not take a gigabyte.
const COMPILED_BYTES_MAX: usize = 1 << 20;

/// Deepest nesting of groups.
const NESTING_MAX: u32 = 64;

/// `type = "regex"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RegexConfig {
    /// In the syntax of the crate `regex`; `^…$` matches the whole text.
    pattern: String,
    /// Number of the group that must capture the gold answer; without it a match is enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    capture: Option<usize>,
}

impl Compile for RegexConfig {
    fn compile(&self) -> Result<Arc<dyn Function>, ConfigError> {
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
        Ok(Arc::new(RegexMatch {
            regex,
            capture: self.capture,
        }))
    }
}

/// The last line of the error of `regex`; the lines above it draw the pattern.
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

#[derive(Debug)]
struct RegexMatch {
    regex: Regex,
    capture: Option<usize>,
}

impl Function for RegexMatch {
    fn value(&self, answer: &Answer<'_>, gold: &str) -> Result<f64, UnfitGold> {
        let Some(group) = self.capture else {
            return Ok(self.regex.is_match(answer.text).into());
        };
        let captured = self
            .regex
            .captures(answer.text)
            .and_then(|captures| captures.get(group));
        let is_right = captured.is_some_and(|found| found.as_str().trim() == gold.trim());
        Ok(is_right.into())
    }

    fn explain(&self) -> String {
        let pattern = shortened(self.regex.as_str());
        match self.capture {
            None => format!("pays 1 if the text matches `{pattern}`, whatever the gold answer is"),
            Some(group) => format!(
                "pays 1 if group {group} of the first match of `{pattern}` equals the gold answer"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::functions::tests::{refusal, value_of};

    fn config(pattern: &str, capture: Option<usize>) -> RegexConfig {
        RegexConfig {
            pattern: pattern.to_owned(),
            capture,
        }
    }

    #[test]
    fn a_capture_is_compared_with_the_gold_answer() {
        let boxed = config(r"\\boxed\{([^{}]*)\}\s*$", Some(1));
        assert_eq!(value_of(&boxed, r"so \boxed{ 26 }", "26"), 1.0);
        assert_eq!(value_of(&boxed, r"so \boxed{27}", "26"), 0.0);
        assert_eq!(value_of(&boxed, "26", "26"), 0.0);
        let optional = config("a(b)?", Some(1));
        assert_eq!(value_of(&optional, "a", "b"), 0.0);
    }

    #[test]
    fn without_a_capture_a_match_is_enough() {
        let word = config(r"^\w+$", None);
        assert_eq!(value_of(&word, "größe", "x"), 1.0);
        assert_eq!(value_of(&word, "two words", "x"), 0.0);
        let capitals = config(r"(?i)^\p{Lu}+$", None);
        assert_eq!(value_of(&capitals, "größe", "x"), 1.0);
    }

    #[test]
    fn nested_repetition_takes_linear_time() {
        let nested = config("^(a+)+$", None);
        let text = format!("{}b", "a".repeat(100_000));
        assert_eq!(value_of(&nested, &text, "x"), 0.0);
    }

    #[test]
    fn a_bad_pattern_is_refused_in_one_sentence() {
        let refusal = |pattern: &str, capture| refusal(&config(pattern, capture));
        insta::assert_snapshot!(
            refusal("(26", None),
            @"reward x: `pattern` is `(26`, which is refused (unclosed group): correct it; look-around and back-references are not supported"
        );
        insta::assert_snapshot!(
            refusal("(?=26)", None),
            @"reward x: `pattern` is `(?=26)`, which is refused (look-around, including look-ahead and look-behind, is not su…): correct it; look-around and back-references are not supported"
        );
        insta::assert_snapshot!(
            refusal("(a{1000}){1000}", None),
            @"reward x: `pattern` is `(a{1000}){1000}`, which is refused (compiled it exceeds 1048576 bytes): use smaller repetition counts"
        );
        insta::assert_snapshot!(
            refusal("", None),
            @"reward x: `pattern` is 0 bytes long, but it must be from 1 to 4096 bytes"
        );
        insta::assert_snapshot!(
            refusal("(a)", Some(2)),
            @"reward x: `capture` is 2, but the pattern has 1 groups: put ( ) around the part to compare, or give a smaller number"
        );
        assert!(refusal(&"(".repeat(4096), None).contains("refused"));
    }
}

//! The reward functions: one file each, listed once in [`FunctionConfig`]. `extract` and `number` say how an answer is
//! read.
//!
//! A new function is a file here with a configuration that implements [`Compile`], its `mod` line and its line in the
//! list; parsing, error messages and `muster rewards check` follow from the list.

mod exact_match;
mod extract;
mod format;
mod length;
pub(crate) mod number;
mod numeric_match;
mod regex;

use crate::function::Compile;
use crate::tagged::tagged_enum;

tagged_enum! {
    /// The configuration of one function; TOML's `type` names the variant.
    pub(crate) enum FunctionConfig: Compile {
        "exact_match" => ExactMatch(exact_match::ExactMatchConfig),
        "numeric_match" => NumericMatch(numeric_match::NumericMatchConfig),
        "regex" => Regex(regex::RegexConfig),
        "format" => Format(format::FormatConfig),
        "length" => Length(length::LengthConfig),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::function::{Answer, Function};
    use crate::tagged::quoted;

    /// The list of types as errors show it, so that no test repeats it.
    pub(crate) fn known_types() -> String {
        quoted(FunctionConfig::TYPES.iter().map(|kind| kind.name))
    }

    /// A finished answer's value; each character counts as one token.
    pub(crate) fn value_of(config: &dyn Compile, text: &str, gold: &str) -> f64 {
        value_by(&*config.compile().unwrap(), text, gold)
    }

    pub(crate) fn value_by(function: &dyn Function, text: &str, gold: &str) -> f64 {
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

    /// Why a configuration is refused, said of the section "reward x".
    pub(crate) fn refusal(config: &dyn Compile) -> String {
        let refused = config.compile().unwrap_err();
        refused.in_section("reward x").to_string()
    }

    #[test]
    fn every_type_has_its_own_name() {
        let mut names: Vec<&str> = FunctionConfig::TYPES.iter().map(|kind| kind.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FunctionConfig::TYPES.len());
    }
}

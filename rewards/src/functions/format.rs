//! `format`: 1 if the answer has the required tags in order, each opened and closed once and not empty, else 0. There is no
//! partial credit: paying for each tag would reward a policy that writes only tags.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::extract::{inside_tag, validate_tag};
use crate::function::{Answer, Compile, Function, UnfitGold};
use crate::tagged::ConfigError;

const TAGS_MAX: usize = 16;

/// The text that is allowed outside the tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outside {
    /// White space only.
    #[default]
    Nothing,
    Anything,
}

/// `type = "format"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FormatConfig {
    /// Names of the tags in order, such as `["think", "answer"]`.
    tags: Vec<String>,
    #[serde(default)]
    outside: Outside,
}

impl Compile for FormatConfig {
    fn compile(&self) -> Result<Arc<dyn Function>, ConfigError> {
        if self.tags.is_empty() || self.tags.len() > TAGS_MAX {
            return Err(ConfigError::bad_value(
                "tags",
                format!("a list of {}", self.tags.len()),
                format!("but it must name 1 to {TAGS_MAX} tags, such as [\"think\", \"answer\"]"),
            ));
        }
        for (index, tag) in self.tags.iter().enumerate() {
            validate_tag("tags", tag)?;
            if self.tags.iter().take(index).any(|earlier| earlier == tag) {
                return Err(ConfigError::bad_value(
                    "tags",
                    format!("a list with `{tag}` twice"),
                    "but every tag is allowed once: remove one of them",
                ));
            }
        }
        Ok(Arc::new(self.clone()))
    }
}

impl FormatConfig {
    fn is_kept(&self, text: &str) -> bool {
        let allowed = |between: &str| match self.outside {
            Outside::Nothing => between.trim().is_empty(),
            Outside::Anything => true,
        };
        // Uniqueness is checked on the whole text: the rest after one tag does not show a second copy before it.
        if !self.tags.iter().all(|tag| inside_tag(text, tag).is_some()) {
            return false;
        }
        let mut rest = text;
        for tag in &self.tags {
            match inside_tag(rest, tag) {
                Some(cut) if allowed(cut.before) && !cut.inside.trim().is_empty() => {
                    rest = cut.after;
                }
                _ => return false,
            }
        }
        allowed(rest)
    }
}

impl Function for FormatConfig {
    fn value(&self, answer: &Answer<'_>, _: &str) -> Result<f64, UnfitGold> {
        Ok(self.is_kept(answer.text).into())
    }

    fn explain(&self) -> String {
        let tags: Vec<String> = self
            .tags
            .iter()
            .map(|tag| format!("<{tag}>…</{tag}>"))
            .collect();
        let outside = match self.outside {
            Outside::Nothing => "with nothing outside them",
            Outside::Anything => "with any text outside them",
        };
        format!(
            "pays 1 if the text has {} in this order, each once and not empty, {outside}",
            tags.join(" ")
        )
    }

    fn dress(&self, text: &str) -> Option<String> {
        let dressed: Vec<String> = self
            .tags
            .iter()
            .map(|tag| format!("<{tag}>{text}</{tag}>"))
            .collect();
        Some(dressed.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::functions::tests::{refusal, value_of};

    fn think_answer(outside: Outside) -> FormatConfig {
        FormatConfig {
            tags: vec!["think".to_owned(), "answer".to_owned()],
            outside,
        }
    }

    #[test]
    fn every_tag_must_occur_once_in_order_and_not_be_empty() {
        let format = think_answer(Outside::Nothing);
        assert_eq!(
            value_of(&format, "<think>hm</think>\n<answer>26</answer>\n", "x"),
            1.0
        );
        for broken in [
            "",
            "26",
            "<think>hm</think>",
            "<answer>26</answer><think>hm</think>",
            "<think></think><answer>26</answer>",
            "<think> \n</think><answer>26</answer>",
            "<think>hm<answer>26</answer></think>",
            "<think>hm</think><answer>26",
            "<think>hm</think><answer>26</answer><answer>27</answer>",
            "<answer>1</answer><think>hm</think><answer>26</answer>",
            "<think>hm</think> so <answer>26</answer>",
            "<think>hm</think><answer>26</answer> done",
        ] {
            assert_eq!(value_of(&format, broken, "x"), 0.0, "{broken}");
        }
    }

    #[test]
    fn text_outside_the_tags_can_be_allowed() {
        let format = think_answer(Outside::Anything);
        assert_eq!(
            value_of(&format, "a <think>hm</think> b <answer>26</answer> c", "x"),
            1.0
        );
    }

    #[test]
    fn bad_tags_are_refused() {
        let refusal = |tags: &[&str]| {
            refusal(&FormatConfig {
                tags: tags.iter().map(ToString::to_string).collect(),
                outside: Outside::Nothing,
            })
        };
        insta::assert_snapshot!(
            refusal(&[]),
            @r#"reward x: `tags` is a list of 0, but it must name 1 to 16 tags, such as ["think", "answer"]"#
        );
        insta::assert_snapshot!(
            refusal(&["think", "think"]),
            @"reward x: `tags` is a list with `think` twice, but every tag is allowed once: remove one of them"
        );
        insta::assert_snapshot!(
            refusal(&["</think>"]),
            @"reward x: `tags` is the tag `</think>`, but a tag is 1 to 64 letters, digits, - and _, written without < and >"
        );
    }
}

//! Where the answer is in a completion: the whole text, the part after the last separator, or the inside of a tag; and the
//! terminator that must end the text. A text that hedges (two answers in tags, no terminator) has no answer, since a
//! policy could exploit any guess at its meaning. White space around the answer and at the end of the text is ignored.

use serde::{Deserialize, Serialize};

use crate::tagged::{ConfigError, shortened};

/// Longest separator, terminator or tag name, in bytes.
const MARK_BYTES_MAX: usize = 64;

/// `extract = "whole"`, `extract = { after_last = "," }` or `extract = { inside_tag = "answer" }`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Extract {
    #[default]
    Whole,
    /// The text after the last occurrence of this separator; a text without one has no answer.
    AfterLast(String),
    /// The text between `<tag>` and `</tag>`, each of which must occur exactly once.
    InsideTag(String),
}

impl Extract {
    pub(crate) fn validate(&self, terminator: Option<&str>) -> Result<(), ConfigError> {
        match self {
            Self::Whole => {}
            Self::AfterLast(separator) => validate_mark("extract", separator)?,
            Self::InsideTag(tag) => validate_tag("extract", tag)?,
        }
        terminator.map_or(Ok(()), |mark| validate_mark("terminator", mark))
    }

    /// The answer in `text`, trimmed, or none if the text has no answer.
    pub(crate) fn read<'a>(&self, terminator: Option<&str>, text: &'a str) -> Option<&'a str> {
        let text = text.trim_end();
        let body = match terminator {
            Some(mark) => text.strip_suffix(mark)?,
            None => text,
        };
        let answer = match self {
            Self::Whole => body,
            Self::AfterLast(separator) => body.rsplit_once(separator.as_str())?.1,
            Self::InsideTag(tag) => inside_tag(body, tag)?.inside,
        };
        Some(answer.trim())
    }

    /// A text from which [`Extract::read`] reads `answer`.
    pub(crate) fn write(&self, terminator: Option<&str>, answer: &str) -> String {
        let end = terminator.unwrap_or("");
        match self {
            Self::Whole => format!("{answer}{end}"),
            Self::AfterLast(separator) => format!("{separator}{answer}{end}"),
            Self::InsideTag(tag) => format!("<{tag}>{answer}</{tag}>{end}"),
        }
    }

    /// A noun phrase for the answer, such as "the whole text", and the terminator.
    pub(crate) fn explain(&self, terminator: Option<&str>) -> String {
        let part = match self {
            Self::Whole => "the whole text".to_owned(),
            Self::AfterLast(separator) => format!("the text after the last `{separator}`"),
            Self::InsideTag(tag) => format!("the text inside the only <{tag}>…</{tag}>"),
        };
        match terminator {
            Some(mark) => format!("{part} (the text must end with `{mark}`)"),
            None => part,
        }
    }
}

/// A text split at its only `<tag>…</tag>`.
pub(crate) struct Tagged<'a> {
    pub(crate) before: &'a str,
    pub(crate) inside: &'a str,
    pub(crate) after: &'a str,
}

/// None unless `<tag>` and `</tag>` both occur, in this order, and only once.
pub(crate) fn inside_tag<'a>(text: &'a str, tag: &str) -> Option<Tagged<'a>> {
    let open = format!("<{tag}>");
    let close = format!("</{tag}>");
    let (before, rest) = text.split_once(&open)?;
    let (inside, after) = rest.split_once(&close)?;
    let again = before.contains(&close)
        || inside.contains(&open)
        || after.contains(&open)
        || after.contains(&close);
    (!again).then_some(Tagged {
        before,
        inside,
        after,
    })
}

/// Requires a plain word: a `<` in the name would let two tags overlap.
pub(crate) fn validate_tag(key: &'static str, tag: &str) -> Result<(), ConfigError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if tag.is_empty() || tag.len() > MARK_BYTES_MAX || !tag.chars().all(plain) {
        return Err(ConfigError::bad_value(
            key,
            format!("the tag `{}`", shortened(tag)),
            format!(
                "but a tag is 1 to {MARK_BYTES_MAX} letters, digits, - and _, written without < and >"
            ),
        ));
    }
    Ok(())
}

fn validate_mark(key: &'static str, mark: &str) -> Result<(), ConfigError> {
    if mark.is_empty() || mark.len() > MARK_BYTES_MAX || mark.trim() != mark {
        return Err(ConfigError::bad_value(
            key,
            format!("`{}`", shortened(mark)),
            format!("but it must be 1 to {MARK_BYTES_MAX} bytes without white space at its ends"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_separator_counts_and_a_text_without_one_gives_no_answer() {
        let extract = Extract::AfterLast(",".to_owned());
        let read = |text| extract.read(Some("."), text);
        assert_eq!(read("17,24,26."), Some("26"));
        assert_eq!(read("17,24, 26 .\n"), Some("26"));
        assert_eq!(read(",,,,26."), Some("26"));
        assert_eq!(read("17,24,."), Some(""));
        assert_eq!(read("26."), None);
        assert_eq!(read("17,24,26"), None);
        assert_eq!(read(""), None);
        assert_eq!(read("17,24,26。"), None);
    }

    #[test]
    fn a_tag_that_occurs_twice_or_never_closes_gives_no_answer() {
        let extract = Extract::InsideTag("answer".to_owned());
        let read = |text| extract.read(None, text);
        assert_eq!(read("so <answer> 26 </answer> it is"), Some("26"));
        for hedge in [
            "<answer>26</answer><answer>27</answer>",
            "<answer><answer>26</answer>",
            "</answer><answer>26</answer>",
            "<answer>26</answer></answer>",
            "<answer>26",
            "</answer>26<answer>",
            "<ANSWER>26</ANSWER>",
        ] {
            assert_eq!(read(hedge), None, "{hedge}");
        }
    }

    #[test]
    fn a_written_answer_is_read_back() {
        for extract in [
            Extract::Whole,
            Extract::AfterLast("####".to_owned()),
            Extract::InsideTag("answer".to_owned()),
        ] {
            for terminator in [None, Some(".")] {
                let text = extract.write(terminator, "3.5");
                assert_eq!(extract.read(terminator, &text), Some("3.5"), "{extract:?}");
            }
        }
    }

    #[test]
    fn separators_terminators_and_tags_that_cannot_match_are_refused() {
        let refusal = |extract: Extract, terminator| {
            extract
                .validate(terminator)
                .unwrap_err()
                .in_section("reward x")
                .to_string()
        };
        insta::assert_snapshot!(
            refusal(Extract::AfterLast(String::new()), None),
            @"reward x: `extract` is ``, but it must be 1 to 64 bytes without white space at its ends"
        );
        insta::assert_snapshot!(
            refusal(Extract::Whole, Some(".\n")),
            @"reward x: `terminator` is `. `, but it must be 1 to 64 bytes without white space at its ends"
        );
        insta::assert_snapshot!(
            refusal(Extract::InsideTag("<answer>".to_owned()), None),
            @"reward x: `extract` is the tag `<answer>`, but a tag is 1 to 64 letters, digits, - and _, written without < and >"
        );
    }
}

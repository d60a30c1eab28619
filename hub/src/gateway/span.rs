//! Which bytes a `Range` header asks for (RFC 9110 §14). Pure. Several ranges at once are answered with the whole, as a
//! server may; so is what cannot be read.

use std::ops::Range;

/// What is to be sent of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Span {
    /// All of it.
    Whole,
    /// These bytes.
    Part(Range<u64>),
    /// Nothing: the bytes asked for lie beyond its end.
    Beyond,
}

impl Span {
    /// What `range`, the header's value, asks for of a file of so many bytes.
    pub(super) fn asked(range: Option<&str>, bytes: u64) -> Self {
        let Some(asked) = range.and_then(|range| range.strip_prefix("bytes=")) else {
            return Self::Whole;
        };
        let Some((first, last)) = asked.trim().split_once('-') else {
            return Self::Whole;
        };
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first > last => Self::Whole,
            (Some(first), _) if first >= bytes && (last.is_empty() || number(last).is_some()) => {
                Self::Beyond
            }
            (Some(first), Some(last)) => Self::Part(first..last.saturating_add(1).min(bytes)),
            (Some(first), None) if last.is_empty() => Self::Part(first..bytes),
            (None, Some(0)) if first.is_empty() => Self::Beyond,
            (None, Some(_)) if first.is_empty() && bytes == 0 => Self::Beyond,
            (None, Some(last)) if first.is_empty() => Self::Part(bytes.saturating_sub(last)..bytes),
            _ => Self::Whole,
        }
    }
}

/// Digits alone: `parse` would take a sign as well.
fn number(text: &str) -> Option<u64> {
    let is_number = text.chars().all(|c| c.is_ascii_digit());
    text.parse().ok().filter(|_| is_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_to_the_file() {
        for (asked, expected) in [
            ("bytes=0-0", Span::Part(0..1)),
            ("bytes=2-5", Span::Part(2..6)),
            ("bytes=2-", Span::Part(2..10)),
            ("bytes=-3", Span::Part(7..10)),
            ("bytes=-30", Span::Part(0..10)),
            ("bytes=9-99", Span::Part(9..10)),
            ("bytes=0-18446744073709551615", Span::Part(0..10)),
            ("bytes=10-", Span::Beyond),
            ("bytes=10-12", Span::Beyond),
            ("bytes=-0", Span::Beyond),
        ] {
            assert_eq!(Span::asked(Some(asked), 10), expected, "{asked}");
        }
        assert_eq!(Span::asked(Some("bytes=0-0"), 0), Span::Beyond);
        assert_eq!(Span::asked(Some("bytes=-1"), 0), Span::Beyond);
    }

    #[test]
    fn what_is_no_single_range_is_answered_with_the_whole() {
        assert_eq!(Span::asked(None, 10), Span::Whole);
        for asked in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=5-2",
            "bytes=0-1,3-4",
            "lines=0-1",
            "bytes=a-b",
            "bytes=+1-2",
            "bytes=1--2",
            "bytes=99999999999999999999-",
        ] {
            assert_eq!(Span::asked(Some(asked), 10), Span::Whole, "{asked}");
        }
    }
}

//! The bytes that a `Range` header names (RFC 9110 §14). Pure. A header with several ranges or with errors is ignored, as the RFC
//! permits, so that the response has the whole file.

use std::ops::Range;

/// The part of a file to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Span {
    Whole,
    Part(Range<u64>),
    /// The range begins after the end of the file.
    Beyond,
}

impl Span {
    /// The part that `range`, the header's value, names of a file of `size` bytes.
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

/// Reads digits alone: `parse` would accept a sign.
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

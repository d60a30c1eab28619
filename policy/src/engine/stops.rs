//! Stop strings: texts that end an answer, found in its bytes across the borders of tokens.
//!
//! Worker and critic run this same code. The rule: an answer ends with the first token that completes one of the strings.
//! If a token completes several, the one that ends first counts, then the lowest index.

use std::sync::Arc;

use crate::text::TokenBytes;

/// Texts that end an answer, cheap to share.
#[derive(Debug, Clone)]
pub struct StopStrings {
    strings: Arc<[Vec<u8>]>,
    longest: usize,
    bytes: Arc<TokenBytes>,
}

/// The end of an answer by a stop string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopAt {
    /// Index of the answer's last token.
    pub token: usize,
    /// Index of the string.
    pub string: usize,
}

impl StopStrings {
    /// Strings to look for; an empty string never matches.
    pub fn new(strings: &[String], bytes: Arc<TokenBytes>) -> Self {
        let strings: Arc<[Vec<u8>]> = strings
            .iter()
            .map(|string| string.as_bytes().to_vec())
            .collect();
        Self {
            longest: strings.iter().map(Vec::len).max().unwrap_or(0),
            strings,
            bytes,
        }
    }

    /// The first stop in a finished answer.
    pub fn first(&self, tokens: &[u32]) -> Option<StopAt> {
        let mut watch = StopWatch::default();
        tokens.iter().enumerate().find_map(|(token, id)| {
            let string = watch.push(self, *id)?;
            Some(StopAt { token, string })
        })
    }
}

/// The last bytes of a growing answer, as many as an incomplete string can have.
#[derive(Debug, Default)]
pub(crate) struct StopWatch {
    tail: Vec<u8>,
}

impl StopWatch {
    /// Appends a token. Returns the index of the string that it completes, if any.
    pub(crate) fn push(&mut self, stops: &StopStrings, token: u32) -> Option<usize> {
        self.tail.extend_from_slice(stops.bytes.of(token));
        let ends = stops
            .strings
            .iter()
            .enumerate()
            .filter_map(|(index, string)| {
                let windows = if string.is_empty() {
                    return None;
                } else {
                    self.tail.windows(string.len())
                };
                let at = windows.into_iter().position(|window| window == string)?;
                Some((at + string.len(), index))
            });
        let found = ends.min();
        let kept = stops.longest.saturating_sub(1);
        let excess = self.tail.len().saturating_sub(kept);
        self.tail.drain(..excess);
        found.map(|(_, index)| index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Tokenizer;

    fn first(strings: &[&str], text: &str) -> Option<StopAt> {
        let tokenizer = Tokenizer::characters("abcdé\n ").unwrap();
        let bytes = Arc::new(TokenBytes::new(&tokenizer));
        let strings: Vec<String> = strings.iter().map(|s| (*s).to_owned()).collect();
        let stops = StopStrings::new(&strings, bytes);
        stops.first(&tokenizer.encode(text).unwrap())
    }

    fn at(token: usize, string: usize) -> Option<StopAt> {
        Some(StopAt { token, string })
    }

    #[test]
    fn a_string_is_found_across_tokens_at_its_last_one() {
        assert_eq!(first(&["bc"], "abcd"), at(2, 0));
        assert_eq!(first(&["aab"], "aaab"), at(3, 0));
        assert_eq!(first(&["é\n\n"], "aé\n\nb"), at(3, 0));
        assert_eq!(first(&["bd", ""], "abcd"), None);
        assert_eq!(first(&[], "abcd"), None);
    }

    #[test]
    fn the_string_that_is_complete_first_gives_its_name() {
        assert_eq!(first(&["bcd", "c"], "abcd"), at(2, 1));
        assert_eq!(first(&["bc", "c"], "abcd"), at(2, 0));
        assert_eq!(first(&["c", "bc"], "abcd"), at(2, 0));
    }
}

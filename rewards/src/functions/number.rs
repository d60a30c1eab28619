//! Numbers in an answer, in JSON's grammar only: "nan", "1e999", "٣" and "007" are not numbers. The decimal digits are kept
//! beside the f64, since two different integers beyond 2^53 may share one f64.

/// Longest number read; the digits of the largest f64 are 309.
const NUMBER_BYTES_MAX: usize = 512;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Number {
    /// The nearest f64; finite.
    pub(crate) value: f64,
    negative: bool,
    /// Significant digits without zeros at either end; empty for zero.
    digits: String,
    /// Power of ten of the last digit.
    exponent: i64,
}

impl Number {
    /// Parses the whole of `text`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if text.len() > NUMBER_BYTES_MAX {
            return None;
        }
        let (negative, unsigned) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (mantissa, power) = match unsigned.split_once(['e', 'E']) {
            Some((mantissa, power)) => (mantissa, signed_integer(power)?),
            None => (unsigned, 0),
        };
        let (whole, fraction) = match mantissa.split_once('.') {
            Some((whole, fraction)) if is_digits(fraction) => (whole, fraction),
            Some(_) => return None,
            None => (mantissa, ""),
        };
        if !is_digits(whole) || (whole.len() > 1 && whole.starts_with('0')) {
            return None;
        }
        let value: f64 = text.parse().ok()?;
        if !value.is_finite() {
            return None;
        }
        let all = format!("{whole}{fraction}");
        let without_tail = all.trim_end_matches('0');
        let tail = (all.len() - without_tail.len()) as i64;
        let digits = without_tail.trim_start_matches('0').to_owned();
        let is_zero = digits.is_empty();
        Some(Self {
            value,
            negative: negative && !is_zero,
            exponent: if is_zero {
                0
            } else {
                power - fraction.len() as i64 + tail
            },
            digits,
        })
    }

    /// Whether both are the same decimal number, to the last digit.
    pub(crate) fn equals(&self, other: &Self) -> bool {
        self.negative == other.negative
            && self.exponent == other.exponent
            && self.digits == other.digits
    }
}

/// The numbers of a text, in order. A word counts if the whole word is a number; a full stop at its end is ignored. "x=26."
/// gives 26; "3-2", "v2" and "2026-01-02" give none. A comma separates words, so "17,24,26" gives three.
pub(crate) fn numbers_of(text: &str) -> impl DoubleEndedIterator<Item = Number> + '_ {
    text.split(|c: char| !in_word(c))
        .filter_map(|word| Number::parse(word.trim_end_matches('.')))
}

/// A typographic minus (U+2212) is part of its word, so the word is not a number: "−26" must not pass for 26.
fn in_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-' | '_' | '\u{2212}')
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// An exponent. With more than six digits the number would be infinite or zero.
fn signed_integer(text: &str) -> Option<i64> {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !is_digits(unsigned) || unsigned.len() > 6 {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_in_json_s_grammar_are_parsed() {
        for text in [
            "0", "-0", "26", "-26", "0.5", "1.50", "1e3", "1E+3", "2.5e-3",
        ] {
            assert!(Number::parse(text).is_some(), "{text}");
        }
        let too_long = "9".repeat(NUMBER_BYTES_MAX + 1);
        for text in [
            "",
            "-",
            ".",
            "+5",
            "007",
            "-01",
            ".5",
            "5.",
            "1e",
            "1e+",
            "1e999",
            "-1e999",
            "nan",
            "NaN",
            "inf",
            "-inf",
            "infinity",
            "0x10",
            "1_000",
            "1,000",
            "２６",
            "٣",
            "−26",
            " 26",
            "26 ",
            "1e1e1",
            "1.2.3",
            "--1",
            "1e99999999999999999999",
            &too_long,
        ] {
            assert!(Number::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn equal_decimals_are_equal_and_unequal_ones_are_not() {
        let same = |a: &str, b: &str| Number::parse(a).unwrap().equals(&Number::parse(b).unwrap());
        assert!(same("26", "26.000"));
        assert!(same("2600", "2.6e3"));
        assert!(same("0", "-0.0"));
        assert!(same("0", "0e5"));
        assert!(same("0.001", "1e-3"));
        assert!(!same("26", "-26"));
        assert!(!same("26", "260"));
        // Both round to one f64.
        assert!(!same("9007199254740993", "9007199254740992"));
        assert!(!same("0", "1e-999"));
    }

    #[test]
    fn only_whole_words_are_numbers() {
        let values =
            |text: &str| -> Vec<f64> { numbers_of(text).map(|number| number.value).collect() };
        assert_eq!(values("17,24,26."), [17.0, 24.0, 26.0]);
        assert_eq!(values("x = -2.5; so $26 (or 3%)"), [-2.5, 26.0, 3.0]);
        assert_eq!(values("7+5=12"), [12.0]);
        assert_eq!(values("v2 3-2 2026-01-02 007 −26 1e999 nan"), [0.0; 0]);
        assert_eq!(values(&",".repeat(100_000)), [0.0; 0]);
        assert_eq!(values(""), [0.0; 0]);
    }
}

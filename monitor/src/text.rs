//! Formats numbers, times and foreign text for a terminal or a page. Knows nothing about runs. Invariant: text from
//! [`printable`] cannot move the cursor or reverse the direction of a line.

/// Steps of a sparkline, from low to high.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Three significant digits, with k, M, G for thousands and an exponent for the very small and very large.
pub fn short(value: f64) -> String {
    let size = value.abs();
    let digits = |scaled: f64, unit: &str| {
        let decimals = match scaled.abs() {
            s if s >= 99.95 => 0,
            s if s >= 9.995 => 1,
            _ => 2,
        };
        format!("{scaled:.decimals$}{unit}")
    };
    if value == 0.0 {
        "0".to_owned()
    } else if !(1e-3..1e15).contains(&size) {
        format!("{value:.1e}")
    } else if size >= 999.5e6 {
        digits(value / 1e9, "G")
    } else if size >= 999.5e3 {
        digits(value / 1e6, "M")
    } else if size >= 999.5 {
        digits(value / 1e3, "k")
    } else if size >= 0.9995 {
        digits(value, "")
    } else if size >= 0.09995 {
        format!("{value:.3}")
    } else {
        format!("{value:.4}")
    }
}

/// A count with separated thousands: `1,184`.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut apart = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            apart.push(',');
        }
        apart.push(digit);
    }
    apart
}

/// A share as `54.3 %`.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// `0:21`, `12:03` or `1:02:03`.
pub fn duration(seconds: f64) -> String {
    // Beyond a thousand years it is no estimate any more; the cast saturates.
    let whole = seconds.max(0.0).round() as u64;
    let (hours, minutes, rest) = (whole / 3600, whole / 60 % 60, whole % 60);
    if hours > 0 {
        return format!("{hours}:{minutes:02}:{rest:02}");
    }
    format!("{minutes}:{rest:02}")
}

/// `3 steps`, `1 step`.
pub fn plural(number: u64, noun: &str) -> String {
    let ending = if number == 1 { "" } else { "s" };
    format!("{} {noun}{ending}", count(number))
}

/// A sparkline of at most `width` characters, each the mean of an equal part of `values`.
pub fn sparkline(values: &[f64], width: usize) -> String {
    let columns = width.min(values.len());
    let means: Vec<f64> = (0..columns)
        .map(|column| {
            let (from, to) = (
                column * values.len() / columns,
                (column + 1) * values.len() / columns,
            );
            values[from..to].iter().sum::<f64>() / (to - from) as f64
        })
        .collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let top = (BARS.len() - 1) as f64;
    let bar = |mean: &f64| {
        let level = if high > low {
            (mean - low) / (high - low) * top
        } else {
            top / 2.0
        };
        BARS[(level.round() as usize).min(BARS.len() - 1)]
    };
    means.iter().map(bar).collect()
}

/// Foreign text on one line of at most `chars_max` characters. Control characters and marks that reverse or hide text become
/// `�`, since they could drive the terminal or change what a line seems to say; a line break becomes a space.
pub fn printable(words: &str, chars_max: usize) -> String {
    let shown = |c: char| match c {
        '\n' | '\r' | '\t' => ' ',
        '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}' => '�',
        _ if c.is_control() => '�',
        _ => c,
    };
    let mut line: String = words.chars().take(chars_max).map(shown).collect();
    if words.chars().nth(chars_max).is_some() {
        line.pop();
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_at_any_size() {
        let shown = [
            0.0, 0.7124, 0.07124, 7.0, 71.24, 712.4, 999.7, 12_345.0, 3.2e6, 4.56e9, 3.21e-7,
        ]
        .map(short);
        let expected = [
            "0", "0.712", "0.0712", "7.00", "71.2", "712", "1.00k", "12.3k", "3.20M", "4.56G",
            "3.2e-7",
        ];
        assert_eq!(shown, expected);
        assert_eq!(short(-0.25), "-0.250");
        assert_eq!(short(f64::INFINITY), "inf");
    }

    #[test]
    fn counts_shares_and_times_read_naturally() {
        assert_eq!(
            [0, 999, 1_184, 1_234_567].map(count),
            ["0", "999", "1,184", "1,234,567"]
        );
        assert_eq!(percent(0.5431), "54.3 %");
        assert_eq!(
            [0.4, 21.0, 723.0, 3_723.0].map(duration),
            ["0:00", "0:21", "12:03", "1:02:03"]
        );
        assert_eq!(duration(f64::NAN), "0:00");
        assert_eq!(
            [plural(1, "step"), plural(0, "step")],
            ["1 step", "0 steps"]
        );
    }

    #[test]
    fn a_sparkline_goes_from_low_to_high_within_its_width() {
        assert_eq!(sparkline(&[0.0, 0.5, 1.0], 10), "▁▅█");
        assert_eq!(sparkline(&[0.0, 0.0, 1.0, 1.0], 2), "▁█");
        assert_eq!(sparkline(&[0.3, 0.3], 10), "▅▅");
        assert_eq!(sparkline(&[], 10), "");
    }

    #[test]
    fn words_of_others_cannot_drive_the_terminal_or_turn_the_line() {
        assert_eq!(printable("a\x1b[2Jb\u{202e}c\nd", 80), "a�[2Jb�c d");
        assert_eq!(printable("abcdef", 4), "abc…");
        assert_eq!(printable("abcd", 4), "abcd");
    }
}

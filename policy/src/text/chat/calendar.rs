//! Dates in UTC in the format of Python's `strftime`, for templates that write today's date.
//!
//! Written by hand because no date library is in the build, and each would take longer to compile than all of this saves.
//! Reads no clock. Days are counted as in Howard Hinnant's `civil_from_days`.

use minijinja::{Error, ErrorKind};

const SECONDS_PER_DAY: i64 = 86_400;

/// Last second of the year 9999, the last year of Python's dates.
const SECONDS_MAX: i64 = 253_402_300_799;

const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A date and a time of day in UTC.
struct DateTime {
    year: i64,
    /// From 0.
    month: usize,
    /// From 1.
    day: i64,
    /// Day of the week from Sunday, 0.
    weekday: usize,
    /// Day of the year from 1.
    yearday: i64,
    /// Second of the day.
    second: i64,
}

impl DateTime {
    fn from_unix(seconds: i64) -> Self {
        let seconds = seconds.clamp(0, SECONDS_MAX);
        let days = seconds / SECONDS_PER_DAY;
        // Years are counted from March, so that the leap day is the last day of its year.
        let shifted = days + 719_468;
        let era = shifted / 146_097;
        let day_of_era = shifted % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let march_day = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * march_day + 2) / 153;
        let day = march_day - (153 * march_month + 2) / 5 + 1;
        let month = (march_month + 2) % 12;
        let year = era * 400 + year_of_era + i64::from(month < 2);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let yearday = if month < 2 {
            march_day - 305
        } else {
            march_day + 60 + i64::from(leap)
        };
        Self {
            year,
            month: usize::try_from(month).unwrap_or_default(),
            day,
            weekday: usize::try_from((days + 4) % 7).unwrap_or_default(),
            yearday,
            second: seconds % SECONDS_PER_DAY,
        }
    }
}

/// Fills in the directives of `format`; `seconds` are counted from 1970.
///
/// # Errors
/// When a directive is not known.
pub(super) fn strftime(format: &str, seconds: i64) -> Result<String, Error> {
    let time = DateTime::from_unix(seconds);
    let mut text = String::with_capacity(format.len() + 16);
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let directive = rest.next().unwrap_or('%');
        text.push_str(&filled(directive, &time)?);
    }
    Ok(text)
}

fn filled(directive: char, at: &DateTime) -> Result<String, Error> {
    let (hour, minute, second) = (at.second / 3_600, at.second / 60 % 60, at.second % 60);
    let (day, month) = (DAYS[at.weekday], MONTHS[at.month]);
    let number = at.month + 1;
    Ok(match directive {
        'a' => day[..3].to_owned(),
        'A' => day.to_owned(),
        'b' | 'h' => month[..3].to_owned(),
        'B' => month.to_owned(),
        'd' => format!("{:02}", at.day),
        'D' | 'x' => format!("{number:02}/{:02}/{:02}", at.day, at.year % 100),
        'e' => format!("{:2}", at.day),
        'F' => format!("{}-{number:02}-{:02}", at.year, at.day),
        'H' => format!("{hour:02}"),
        'I' => format!("{:02}", (hour + 11) % 12 + 1),
        'j' => format!("{:03}", at.yearday),
        'm' => format!("{number:02}"),
        'M' => format!("{minute:02}"),
        'n' => "\n".to_owned(),
        'p' => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
        'S' => format!("{second:02}"),
        'T' | 'X' => format!("{hour:02}:{minute:02}:{second:02}"),
        'w' => at.weekday.to_string(),
        'y' => format!("{:02}", at.year % 100),
        'Y' => at.year.to_string(),
        'Z' => "UTC".to_owned(),
        'z' => "+0000".to_owned(),
        '%' => "%".to_owned(),
        other => {
            let problem = format!("strftime_now does not support the directive %{other}");
            return Err(Error::new(ErrorKind::InvalidOperation, problem));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_gregorian_calendar() {
        let all = "%a %A %b %B %d %D %e %F %H %I %j %m %M %p %S %T %w %y %Y %%";
        for (seconds, expected) in [
            (
                0,
                "Thu Thursday Jan January 01 01/01/70  1 1970-01-01 00 12 001 01 00 AM 00 00:00:00 4 70 1970 %",
            ),
            // The leap day of a year that is divisible by 100.
            (
                951_827_696,
                "Tue Tuesday Feb February 29 02/29/00 29 2000-02-29 12 12 060 02 34 PM 56 12:34:56 2 00 2000 %",
            ),
            (
                1_735_689_599,
                "Tue Tuesday Dec December 31 12/31/24 31 2024-12-31 23 11 366 12 59 PM 59 23:59:59 2 24 2024 %",
            ),
            (
                1_740_787_200,
                "Sat Saturday Mar March 01 03/01/25  1 2025-03-01 00 12 060 03 00 AM 00 00:00:00 6 25 2025 %",
            ),
        ] {
            assert_eq!(strftime(all, seconds).unwrap(), expected);
        }
    }

    #[test]
    fn an_unknown_directive_is_named_and_no_second_overflows() {
        let error = strftime("%Q", 0).unwrap_err().to_string();
        assert!(error.contains("%Q"), "{error}");
        assert_eq!(strftime("%Y%", i64::MAX).unwrap(), "9999%");
        assert_eq!(strftime("%F", i64::MIN).unwrap(), "1970-01-01");
    }
}

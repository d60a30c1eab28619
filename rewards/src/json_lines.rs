//! Lines of an untrusted JSONL file: each line is bounded before it is read and must be one JSON object in UTF-8; every
//! error names the file and the line. Knows nothing about the meaning of the columns.

use std::io::{BufRead, Read};

use serde_json::{Map, Value};

use crate::tagged::shortened;

/// Longest line, in bytes: a prompt of 128k tokens is about 0.5 MB, so a longer line is another kind of file.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Most lines: a task's items are held in memory.
const LINES_MAX: u64 = 2_000_000;

/// Integers from here on lose digits as a JSON number (2^53).
const EXACT_INTEGER_MAX: f64 = 9_007_199_254_740_992.0;

/// Why a line is refused. Lines count from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonlError {
    #[error("{file}:{line} cannot be read ({reason}): give a readable file")]
    Unreadable {
        file: String,
        line: u64,
        reason: String,
    },
    #[error(
        "{file}:{line} is longer than {LINE_BYTES_MAX} bytes: put one JSON object on each line, or shorten it"
    )]
    LineTooLong { file: String, line: u64 },
    #[error("{file} has more than {LINES_MAX} lines: split it")]
    TooManyLines { file: String },
    #[error("{file}:{line} is not UTF-8: save the file as UTF-8 (is it compressed?)")]
    NotUtf8 { file: String, line: u64 },
    #[error(
        "{file}:{line} is not one JSON object ({reason}): write it as {{\"prompt\": \"…\", \"gold\": \"…\"}}"
    )]
    NotAnObject {
        file: String,
        line: u64,
        reason: String,
    },
    #[error("{file}:{line} has no column `{column}`, it has {found}: {way_out}")]
    MissingColumn {
        file: String,
        line: u64,
        column: String,
        /// The columns of the line.
        found: String,
        way_out: String,
    },
    /// A column is empty or has the wrong type.
    #[error("{file}:{line}: column `{column}` is {found}: {way_out}")]
    BadColumn {
        file: String,
        line: u64,
        column: String,
        found: &'static str,
        way_out: &'static str,
    },
    #[error(
        "{file}:{line}: column `{column}` is {bytes} bytes long, the limit is {bytes_max}: shorten it or drop the line"
    )]
    ColumnTooLong {
        file: String,
        line: u64,
        column: String,
        bytes: usize,
        bytes_max: usize,
    },
}

/// Iterates over the lines of one file as JSON objects. Skips blank lines; the first error ends the iteration.
#[derive(Debug)]
pub(crate) struct JsonlReader<R> {
    reader: R,
    file: String,
    line: u64,
    ended: bool,
}

impl<R: BufRead> JsonlReader<R> {
    /// `file` is the name of `reader` in errors.
    pub(crate) fn new(reader: R, file: impl Into<String>) -> Self {
        Self {
            reader,
            file: file.into(),
            line: 0,
            ended: false,
        }
    }

    fn next_object(&mut self) -> Result<Option<JsonLine>, JsonlError> {
        loop {
            self.line += 1;
            let Some(bytes) = self.next_bytes()? else {
                return Ok(None);
            };
            let (file, line) = (self.file.clone(), self.line);
            if line > LINES_MAX {
                return Err(JsonlError::TooManyLines { file });
            }
            let text = match std::str::from_utf8(&bytes) {
                Ok(text) => text.trim_start_matches('\u{feff}').trim(),
                Err(_) => return Err(JsonlError::NotUtf8 { file, line }),
            };
            if text.is_empty() {
                continue;
            }
            return match serde_json::from_str::<Value>(text) {
                Ok(Value::Object(columns)) => Ok(Some(JsonLine {
                    file,
                    line,
                    columns,
                })),
                Ok(other) => Err(JsonlError::NotAnObject {
                    file,
                    line,
                    reason: format!("it is {}", kind(&other)),
                }),
                Err(error) => Err(JsonlError::NotAnObject {
                    file,
                    line,
                    reason: json_reason(&error),
                }),
            };
        }
    }

    /// The bytes of one line without its line feed, or none at the end of the file. Reads at most one byte beyond the bound.
    fn next_bytes(&mut self) -> Result<Option<Vec<u8>>, JsonlError> {
        let mut bytes = Vec::new();
        let limit = LINE_BYTES_MAX as u64 + 1;
        let read = (&mut self.reader)
            .take(limit)
            .read_until(b'\n', &mut bytes)
            .map_err(|error| JsonlError::Unreadable {
                file: self.file.clone(),
                line: self.line,
                reason: error.to_string(),
            })?;
        if read == 0 {
            return Ok(None);
        }
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        } else if bytes.len() > LINE_BYTES_MAX {
            return Err(JsonlError::LineTooLong {
                file: self.file.clone(),
                line: self.line,
            });
        }
        Ok(Some(bytes))
    }
}

impl<R: BufRead> Iterator for JsonlReader<R> {
    type Item = Result<JsonLine, JsonlError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let row = self.next_object().transpose();
        self.ended = !matches!(row, Some(Ok(_)));
        row
    }
}

/// One line: a JSON object with its place in the file.
#[derive(Debug, Clone)]
pub(crate) struct JsonLine {
    pub(crate) file: String,
    /// Line number, from 1.
    pub(crate) line: u64,
    columns: Map<String, Value>,
}

impl JsonLine {
    /// Whether the column exists and is not null.
    pub(crate) fn has(&self, column: &str) -> bool {
        self.columns
            .get(column)
            .is_some_and(|value| !value.is_null())
    }

    /// The column's text.
    ///
    /// # Errors
    /// The column is missing (the error ends with `way_out`) or not a string.
    pub(crate) fn text(&self, column: &str, way_out: &str) -> Result<&str, JsonlError> {
        match self.value(column, way_out)? {
            Value::String(text) => Ok(text),
            other => Err(self.bad(column, kind(other), "write it as a string")),
        }
    }

    /// The column's text; a number or a boolean as JSON writes it.
    ///
    /// # Errors
    /// The column is missing, a list, an object, or a number too large for an exact JSON number.
    pub(crate) fn text_or_number(&self, column: &str, way_out: &str) -> Result<String, JsonlError> {
        match self.value(column, way_out)? {
            Value::String(text) => Ok(text.clone()),
            Value::Bool(truth) => Ok(truth.to_string()),
            // The parser has rounded such a number already, and its rounded digits would be the gold answer.
            Value::Number(number)
                if number.is_f64()
                    && number
                        .as_f64()
                        .is_none_or(|value| value.abs() >= EXACT_INTEGER_MAX) =>
            {
                Err(self.bad(
                    column,
                    "a number too large to be exact",
                    "write it as a string",
                ))
            }
            Value::Number(number) => Ok(number.to_string()),
            other => Err(self.bad(column, kind(other), "write it as a string or a number")),
        }
    }

    /// A count, or none if the column is missing or null.
    ///
    /// # Errors
    /// The column is not a whole number of at least 0.
    pub(crate) fn count(&self, column: &str) -> Result<Option<usize>, JsonlError> {
        match self.columns.get(column) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value
                .as_u64()
                .and_then(|count| usize::try_from(count).ok())
                .map(Some)
                .ok_or_else(|| {
                    self.bad(
                        column,
                        kind(value),
                        "write it as a whole number of at least 0",
                    )
                }),
        }
    }

    /// A boolean, or none if the column is missing or null.
    ///
    /// # Errors
    /// The column is neither true nor false.
    pub(crate) fn truth(&self, column: &str) -> Result<Option<bool>, JsonlError> {
        match self.columns.get(column) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(truth)) => Ok(Some(*truth)),
            Some(other) => Err(self.bad(column, kind(other), "write it as true or false")),
        }
    }

    /// An error about one column of this line.
    pub(crate) fn bad(
        &self,
        column: &str,
        found: &'static str,
        way_out: &'static str,
    ) -> JsonlError {
        JsonlError::BadColumn {
            file: self.file.clone(),
            line: self.line,
            column: shortened(column),
            found,
            way_out,
        }
    }

    /// Checks the length of a column's text.
    pub(crate) fn at_most(
        &self,
        column: &str,
        text: &str,
        bytes_max: usize,
    ) -> Result<(), JsonlError> {
        if text.len() <= bytes_max {
            return Ok(());
        }
        Err(JsonlError::ColumnTooLong {
            file: self.file.clone(),
            line: self.line,
            column: shortened(column),
            bytes: text.len(),
            bytes_max,
        })
    }

    fn value(&self, column: &str, way_out: &str) -> Result<&Value, JsonlError> {
        self.columns
            .get(column)
            .ok_or_else(|| JsonlError::MissingColumn {
                file: self.file.clone(),
                line: self.line,
                column: shortened(column),
                found: self.column_names(),
                way_out: way_out.to_owned(),
            })
    }

    fn column_names(&self) -> String {
        const SHOWN_MAX: usize = 8;
        if self.columns.is_empty() {
            return "none".to_owned();
        }
        let mut names: Vec<String> = self
            .columns
            .keys()
            .take(SHOWN_MAX)
            .map(|name| format!("`{}`", shortened(name)))
            .collect();
        names.sort();
        if self.columns.len() > SHOWN_MAX {
            names.push("…".to_owned());
        }
        names.join(", ")
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// serde_json's reason without its line number, which is always 1.
fn json_reason(error: &serde_json::Error) -> String {
    let shown = error.to_string();
    let reason = shown.split(" at line ").next().unwrap_or_default();
    format!("{reason} at character {}", error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(bytes: &[u8]) -> String {
        JsonlReader::new(bytes, "task.jsonl")
            .find_map(Result::err)
            .expect("a refusal")
            .to_string()
    }

    #[test]
    fn blank_lines_and_a_byte_order_mark_are_skipped() {
        let text = "\u{feff}{\"a\": 1}\r\n\n  \n{\"a\": 2}";
        let lines: Vec<u64> = JsonlReader::new(text.as_bytes(), "f")
            .map(|row| row.unwrap().line)
            .collect();
        assert_eq!(lines, [1, 4]);
    }

    #[test]
    fn the_error_for_a_bad_line_names_its_number() {
        insta::assert_snapshot!(
            refusal(b"{\"a\": 1}\n{\"a\": }\n"),
            @r#"task.jsonl:2 is not one JSON object (expected value at character 7): write it as {"prompt": "…", "gold": "…"}"#
        );
        insta::assert_snapshot!(
            refusal(b"[1, 2]"),
            @r#"task.jsonl:1 is not one JSON object (it is a list): write it as {"prompt": "…", "gold": "…"}"#
        );
        insta::assert_snapshot!(
            refusal(b"{\"a\": 1}\n\xff\xfe\n"),
            @"task.jsonl:2 is not UTF-8: save the file as UTF-8 (is it compressed?)"
        );
    }

    #[test]
    fn a_line_over_the_bound_is_refused_before_it_is_read_whole() {
        let mut file = vec![b'x'; LINE_BYTES_MAX + 1];
        insta::assert_snapshot!(
            refusal(&file),
            @"task.jsonl:1 is longer than 1048576 bytes: put one JSON object on each line, or shorten it"
        );
        file.truncate(LINE_BYTES_MAX);
        assert!(refusal(&file).contains("not one JSON object"));
    }

    #[test]
    fn deep_nesting_is_refused_and_does_not_overflow_the_stack() {
        let deep = format!("{{\"a\": {}", "[".repeat(100_000));
        assert!(refusal(deep.as_bytes()).contains("recursion limit"));
    }

    #[test]
    fn the_error_for_a_missing_or_mistyped_column_names_it() {
        let file = br#"{"question": "1+1=", "gold": 12345678901234567890123, "tokens": -1, "finished": "yes"}"#;
        let row = JsonlReader::new(&file[..], "task.jsonl")
            .next()
            .unwrap()
            .unwrap();
        insta::assert_snapshot!(
            row.text("prompt", "set `prompt` to the column that holds it").unwrap_err(),
            @"task.jsonl:1 has no column `prompt`, it has `finished`, `gold`, `question`, `tokens`: set `prompt` to the column that holds it"
        );
        insta::assert_snapshot!(
            row.text("gold", "").unwrap_err(),
            @"task.jsonl:1: column `gold` is a number: write it as a string"
        );
        insta::assert_snapshot!(
            row.text_or_number("gold", "").unwrap_err(),
            @"task.jsonl:1: column `gold` is a number too large to be exact: write it as a string"
        );
        insta::assert_snapshot!(
            row.count("tokens").unwrap_err(),
            @"task.jsonl:1: column `tokens` is a number: write it as a whole number of at least 0"
        );
        insta::assert_snapshot!(
            row.truth("finished").unwrap_err(),
            @"task.jsonl:1: column `finished` is a string: write it as true or false"
        );
    }
}

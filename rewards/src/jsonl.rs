//! Lines of a JSONL file that anybody may have written: each is bounded before it is read, must be UTF-8 and one JSON
//! object, and every complaint names file and line. Knows nothing about what the columns mean.

use std::io::{BufRead, Read};

use serde_json::{Map, Value};

use crate::tagged::shortened;

/// Longest line taken. A prompt of a 128k-token context is about 0.5 MB; a longer line is another kind of file.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// Most lines taken: a task's items are held in memory.
pub const LINES_MAX: u64 = 2_000_000;

/// Integers beyond this lose digits as a JSON number.
const EXACT_INTEGER_MAX: f64 = 9_007_199_254_740_992.0;

/// Why a line is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonlError {
    /// The disk or pipe failed.
    #[error("{file}:{line} cannot be read ({reason}): give a readable file")]
    Unreadable {
        /// The file's name.
        file: String,
        /// Line, from 1.
        line: u64,
        /// What the system said.
        reason: String,
    },
    /// A line longer than [`LINE_BYTES_MAX`].
    #[error(
        "{file}:{line} is longer than {LINE_BYTES_MAX} bytes: put one JSON object on each line, or shorten it"
    )]
    LineTooLong {
        /// The file's name.
        file: String,
        /// Line, from 1.
        line: u64,
    },
    /// More lines than [`LINES_MAX`].
    #[error("{file} has more than {LINES_MAX} lines: split it")]
    TooManyLines {
        /// The file's name.
        file: String,
    },
    /// Bytes that are no text.
    #[error("{file}:{line} is not UTF-8: save the file as UTF-8 (is it compressed?)")]
    NotUtf8 {
        /// The file's name.
        file: String,
        /// Line, from 1.
        line: u64,
    },
    /// Text that is no JSON object.
    #[error(
        "{file}:{line} is not one JSON object ({reason}): write it as {{\"prompt\": \"…\", \"gold\": \"…\"}}"
    )]
    NotAnObject {
        /// The file's name.
        file: String,
        /// Line, from 1.
        line: u64,
        /// What the parser found.
        reason: String,
    },
    /// A column that is needed and not there.
    #[error("{file}:{line} has no column `{column}`, it has {found}: {way_out}")]
    MissingColumn {
        /// The file's name.
        file: String,
        /// Line, from 1.
        line: u64,
        /// The column.
        column: String,
        /// The columns there are.
        found: String,
        /// What to change.
        way_out: String,
    },
    /// A column of the wrong type, or one that is empty.
    #[error("{file}:{line}: column `{column}` is {found}: {way_out}")]
    BadColumn {
        /// The file's name.
        file: String,
        /// Line, from 1.
        line: u64,
        /// The column.
        column: String,
        /// What it is.
        found: &'static str,
        /// What to change.
        way_out: &'static str,
    },
}

/// The lines of one file, as JSON objects. Blank lines are passed over; the first error ends the iteration.
#[derive(Debug)]
pub struct JsonLines<R> {
    reader: R,
    file: String,
    line: u64,
    ended: bool,
}

impl<R: BufRead> JsonLines<R> {
    /// Reads `reader`, calling it `file` in errors.
    pub fn new(reader: R, file: impl Into<String>) -> Self {
        Self {
            reader,
            file: file.into(),
            line: 0,
            ended: false,
        }
    }

    fn next_row(&mut self) -> Result<Option<Row>, JsonlError> {
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
                Ok(Value::Object(columns)) => Ok(Some(Row {
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

    /// One line's bytes, or nothing at the end of the file. Never reads more than the bound.
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

impl<R: BufRead> Iterator for JsonLines<R> {
    type Item = Result<Row, JsonlError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let row = self.next_row().transpose();
        self.ended = !matches!(row, Some(Ok(_)));
        row
    }
}

/// One line: a JSON object and where it stood.
#[derive(Debug, Clone)]
pub struct Row {
    /// The file's name.
    pub file: String,
    /// Line, from 1.
    pub line: u64,
    columns: Map<String, Value>,
}

impl Row {
    /// Whether the column is there and not null.
    pub fn has(&self, column: &str) -> bool {
        self.columns
            .get(column)
            .is_some_and(|value| !value.is_null())
    }

    /// The column's text.
    ///
    /// # Errors
    /// The column is missing (`way_out` ends the sentence) or no string.
    pub fn text(&self, column: &str, way_out: &str) -> Result<&str, JsonlError> {
        match self.value(column, way_out)? {
            Value::String(text) => Ok(text),
            other => Err(self.bad(column, kind(other), "write it as a string")),
        }
    }

    /// The column's text; a number or a truth value is taken as it is written in JSON.
    ///
    /// # Errors
    /// The column is missing, is a list or an object, or a number that JSON cannot hold exactly.
    pub fn text_or_number(&self, column: &str, way_out: &str) -> Result<String, JsonlError> {
        match self.value(column, way_out)? {
            Value::String(text) => Ok(text.clone()),
            Value::Bool(truth) => Ok(truth.to_string()),
            // Past 2^53 the parser has rounded already, and the rounded digits would be the gold answer.
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

    /// A count, or nothing when the column is not there.
    ///
    /// # Errors
    /// The column is there and no whole number.
    pub fn count(&self, column: &str) -> Result<Option<usize>, JsonlError> {
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

    /// A truth value, or nothing when the column is not there.
    ///
    /// # Errors
    /// The column is there and neither true nor false.
    pub fn truth(&self, column: &str) -> Result<Option<bool>, JsonlError> {
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
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// serde_json's reason with the column alone: its line is always 1, since it sees one line.
fn json_reason(error: &serde_json::Error) -> String {
    let shown = error.to_string();
    let reason = shown.split(" at line ").next().unwrap_or_default();
    format!("{reason} at character {}", error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(bytes: &[u8]) -> String {
        JsonLines::new(bytes, "task.jsonl")
            .find_map(Result::err)
            .expect("a refusal")
            .to_string()
    }

    #[test]
    fn blank_lines_and_a_byte_order_mark_are_passed_over() {
        let text = "\u{feff}{\"a\": 1}\r\n\n  \n{\"a\": 2}";
        let lines: Vec<u64> = JsonLines::new(text.as_bytes(), "f")
            .map(|row| row.unwrap().line)
            .collect();
        assert_eq!(lines, [1, 4]);
    }

    #[test]
    fn a_bad_line_is_named_with_its_number() {
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
    fn a_line_over_the_bound_is_refused_without_being_held() {
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
    fn a_column_that_is_missing_or_mistyped_is_named() {
        let file = br#"{"question": "1+1=", "gold": 12345678901234567890123, "tokens": -1, "finished": "yes"}"#;
        let row = JsonLines::new(&file[..], "task.jsonl")
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

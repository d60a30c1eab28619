//! Values of a template in the format of Python's `json.dumps`: `", "` and `": "` between parts, floats as in `repr`, and
//! only the escapes that JSON requires. Jinja's own `tojson` escapes for HTML, which would change prompts.

use std::fmt::Write as _;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Deepest nesting written: a template could nest values without end.
const DEPTH_MAX: usize = 100;

/// Widest indentation written: a template could ask for gigabytes of spaces.
const INDENT_MAX: usize = 64;

/// The options of `json.dumps` that templates use.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct JsonStyle {
    /// Spaces per level; absent, everything is on one line.
    pub(super) indent: Option<usize>,
    /// Whether characters beyond ASCII are escaped.
    pub(super) ascii: bool,
    /// Whether keys are sorted.
    pub(super) sorted: bool,
}

/// `value` as JSON text.
///
/// # Errors
/// When a value has no JSON form, or is nested too deep.
pub(super) fn python_json(value: &Value, style: JsonStyle) -> Result<String, Error> {
    let mut writer = Writer {
        text: String::new(),
        style: JsonStyle {
            indent: style.indent.map(|width| width.min(INDENT_MAX)),
            ..style
        },
    };
    writer.value(value, 0)?;
    Ok(writer.text)
}

fn refused(problem: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}

struct Writer {
    text: String,
    style: JsonStyle,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(refused(format!(
                "tojson supports at most {DEPTH_MAX} levels of nesting"
            )));
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self
                .text
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value)?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => self.map(value, depth)?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.nested('[', ']', &items, depth, |writer, item| {
                    writer.value(item, depth + 1)
                })?;
            }
            other => {
                return Err(refused(format!(
                    "tojson cannot write a value of kind {other}"
                )));
            }
        }
        Ok(())
    }

    fn number(&mut self, value: &Value) -> Result<(), Error> {
        if value.is_integer() {
            self.text.push_str(&value.to_string());
            return Ok(());
        }
        let number = f64::try_from(value.clone())?;
        // Rust and Python switch to exponents at the same magnitudes, but write 1e16 and 1e+16.
        let shown = format!("{number:?}");
        let text = match shown.split_once('e') {
            _ if number.is_nan() => "NaN".to_owned(),
            _ if number.is_infinite() => shown.replace("inf", "Infinity"),
            None => shown,
            Some((mantissa, exponent)) => {
                let sign = if exponent.starts_with('-') { '-' } else { '+' };
                let digits = exponent.trim_start_matches('-');
                format!("{mantissa}e{sign}{digits:0>2}")
            }
        };
        self.text.push_str(&text);
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut pairs = Vec::new();
        for key in value.try_iter()? {
            let name = match key.kind() {
                ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                ValueKind::None => "null".to_owned(),
                ValueKind::Bool => key.to_string().to_lowercase(),
                ValueKind::Number => key.to_string(),
                other => {
                    return Err(refused(format!(
                        "tojson cannot write a key of kind {other}"
                    )));
                }
            };
            pairs.push((name, value.get_item(&key)?));
        }
        if self.style.sorted {
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.nested('{', '}', &pairs, depth, |writer, (name, item)| {
            writer.string(name);
            writer.text.push_str(": ");
            writer.value(item, depth + 1)
        })
    }

    fn nested<T>(
        &mut self,
        open: char,
        close: char,
        items: &[T],
        depth: usize,
        mut write: impl FnMut(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        for (place, item) in items.iter().enumerate() {
            if place > 0 {
                // Python omits the space before a line break.
                let between = if self.style.indent.is_some() {
                    ","
                } else {
                    ", "
                };
                self.text.push_str(between);
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(width) = self.style.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', width * depth));
        }
    }

    fn string(&mut self, string: &str) {
        self.text.push('"');
        for character in string.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                c if c < ' ' || (self.style.ascii && !c.is_ascii()) => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        // Writing to a string cannot fail.
                        write!(self.text, "\\u{unit:04x}").ok();
                    }
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }
}

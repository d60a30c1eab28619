//! Chat templates: a conversation as the text that a model was tuned on, as transformers renders it.
//!
//! A template is a Jinja program that comes with the model, so it is run as transformers runs it (trimmed blocks, Python's
//! string methods, `raise_exception`, `tojson` as `json.dumps` writes) and with bounds on its steps. Knows no tokens.
//! Invariant: the text depends on the template, the messages and the time that is given, never on a clock read here.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, StringInput, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;
use serde_json::Value as Json;

use calendar::strftime;
use python_json::{JsonStyle, python_json};

mod calendar;
mod python_json;

/// Largest template read: the longest in use have about 30 KB.
pub(crate) const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

/// Steps a template may take: a conversation of thousands of messages needs about a million.
const STEPS_MAX: u64 = 20_000_000;

/// The name under which errors speak of a template.
const NAME: &str = "chat template";

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker {
    /// What the model is told beforehand.
    System,
    /// Who asks.
    User,
    /// The model.
    Assistant,
}

impl Speaker {
    fn role(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Who speaks.
    pub speaker: Speaker,
    /// What is said.
    pub content: &'a str,
}

impl<'a> Message<'a> {
    /// What a user asks.
    pub fn user(content: &'a str) -> Self {
        let speaker = Speaker::User;
        Self { speaker, content }
    }
}

/// How a conversation is rendered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rendering {
    /// Whether the text ends where the model begins to answer (`add_generation_prompt`).
    pub answer_next: bool,
    /// Seconds since 1970 that a template may ask for (`strftime_now`, in UTC). Without them a template falls back to
    /// the date written in it, so that a prompt is the same on every machine and on every day.
    pub unix_seconds: Option<i64>,
}

impl Rendering {
    /// A prompt: the model answers next, and no clock enters.
    pub const PROMPT: Self = Self {
        answer_next: true,
        unix_seconds: None,
    };
}

/// Why there is no chat prompt.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ChatError {
    /// The model has none.
    #[error(
        "the model has no chat template: use one tuned for conversation, or leave the prompt as it is"
    )]
    Missing,
    /// Not a template.
    #[error("the chat template cannot be read: {0}; use the file that came with the model")]
    Unreadable(String),
    /// The template refused the conversation, or failed on it.
    #[error(
        "the chat template refuses the conversation: {0}; send what this model's format allows"
    )]
    Refused(String),
}

/// A chat template, ready to render.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bytes: usize,
    special: Vec<(String, String)>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ChatTemplate({} bytes)", self.bytes)
    }
}

impl ChatTemplate {
    /// Reads a template; `settings` is `tokenizer_config.json`, which names the special tokens that a template may write.
    ///
    /// # Errors
    /// When the text is not a template.
    pub fn new(source: &str, settings: &Json) -> Result<Self, ChatError> {
        if source.len() as u64 > TEMPLATE_BYTES_MAX {
            return Err(ChatError::Unreadable(format!(
                "it has {} bytes, above the limit of {TEMPLATE_BYTES_MAX}",
                source.len()
            )));
        }
        let unreadable = |error: Error| ChatError::Unreadable(told(&error));
        let mut environment = environment().map_err(unreadable)?;
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(unreadable)?;
        Ok(Self {
            environment,
            bytes: source.len(),
            special: special_tokens(settings),
        })
    }

    /// The template that `tokenizer_config.json` holds: its only one, or the one called `default`.
    pub(crate) fn of_settings(settings: &Json) -> Option<String> {
        let value = settings.get("chat_template")?;
        if let Some(text) = value.as_str() {
            return Some(text.to_owned());
        }
        let named = value.as_array()?.iter();
        let default = named
            .filter(|entry| entry.get("name").and_then(Json::as_str) == Some("default"))
            .find_map(|entry| entry.get("template"));
        default.and_then(Json::as_str).map(str::to_owned)
    }

    /// The text of a conversation, special tokens written out.
    ///
    /// # Errors
    /// When the template refuses the conversation, or does not end.
    pub fn render(
        &self,
        messages: &[Message<'_>],
        rendering: Rendering,
    ) -> Result<String, ChatError> {
        let turn = |message: &Message<'_>| {
            Value::from_pairs([
                ("role", Value::from(message.speaker.role())),
                ("content", Value::from(message.content)),
            ])
        };
        let mut context: Vec<(String, Value)> = self
            .special
            .iter()
            .map(|(key, token)| (key.clone(), Value::from(token.as_str())))
            .collect();
        let mut set = |key: &str, value: Value| context.push((key.to_owned(), value));
        set("messages", messages.iter().map(turn).collect());
        set("add_generation_prompt", Value::from(rendering.answer_next));
        set("tools", Value::from(()));
        set("documents", Value::from(()));
        if let Some(seconds) = rendering.unix_seconds {
            let now = move |format: StringInput<'_>| strftime(format.as_str(), seconds);
            set("strftime_now", Value::from_function(now));
        }
        let failed = |error: Error| ChatError::Refused(told(&error));
        let template = self.environment.get_template(NAME).map_err(failed)?;
        template.render(Value::from_pairs(context)).map_err(failed)
    }
}

/// Jinja as transformers sets it up for chat templates.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.build()?);
    environment.set_fuel(Some(STEPS_MAX));
    environment.set_unknown_method_callback(method);
    environment.add_filter("trim", trim);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    Ok(environment)
}

fn raise_exception(message: StringInput<'_>) -> Result<Value, Error> {
    let message = message.as_str().to_owned();
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let style = JsonStyle {
        indent: options.get("indent")?,
        ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    python_json(value, style).map(Value::from)
}

fn trim(value: StringInput<'_>, characters: Option<&str>) -> Value {
    Value::from(stripped(value.as_str(), characters, (true, true)))
}

/// Python's methods on strings, lists and dictionaries.
///
/// Those that strip are done here: Python counts the separators U+001C to U+001F as white space, Rust does not.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let ends = match (value.kind(), name) {
        (ValueKind::String, "strip") => (true, true),
        (ValueKind::String, "lstrip") => (true, false),
        (ValueKind::String, "rstrip") => (false, true),
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    };
    let (Rest(args),): (Rest<Value>,) = minijinja::value::from_args(args)?;
    let characters = args.first().and_then(Value::as_str);
    let text = value.as_str().unwrap_or_default();
    Ok(Value::from(stripped(text, characters, ends)))
}

/// A text without what stands at its ends: the characters given, or Python's white space.
fn stripped<'a>(text: &'a str, characters: Option<&str>, ends: (bool, bool)) -> &'a str {
    let goes = |c: char| match characters {
        Some(characters) => characters.contains(c),
        None => c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c),
    };
    let (start, end) = ends;
    let text = if start {
        text.trim_start_matches(goes)
    } else {
        text
    };
    if end {
        text.trim_end_matches(goes)
    } else {
        text
    }
}

/// `bos_token` and its like, as far as the settings name them.
fn special_tokens(settings: &Json) -> Vec<(String, String)> {
    let Some(settings) = settings.as_object() else {
        return Vec::new();
    };
    let named = settings.iter().filter(|(key, _)| key.ends_with("_token"));
    let text = |value: &Json| {
        let content = value.as_str().or_else(|| value.get("content")?.as_str());
        content.map(str::to_owned)
    };
    named
        .filter_map(|(key, value)| Some((key.clone(), text(value)?)))
        .collect()
}

/// An error of the template as one line, with the line of the template where it came up.
fn told(error: &Error) -> String {
    let reason = match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("{reason} (line {line})"),
        None => reason,
    }
}

#[cfg(test)]
mod tests;

//! Chat templates: a conversation as text in the format that a model was tuned on, equal to the text of transformers.
//!
//! A template is a Jinja program that comes with the model. It runs as in transformers (trimmed blocks, Python's string
//! methods, `raise_exception`, `tojson` in the format of `json.dumps`), with a bound on its steps. Knows no tokens. Invariant:
//! the text depends only on the template, the messages and the given time; no clock is read.

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

/// Largest template read: the longest published ones have about 30 KB.
pub(crate) const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

/// Most steps of a template: a conversation of thousands of messages needs about a million.
const STEPS_MAX: u64 = 20_000_000;

/// The template's name in errors.
const NAME: &str = "chat template";

/// The role of a message's author.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatRole {
    System,
    User,
    Assistant,
}

impl ChatRole {
    fn name(self) -> &'static str {
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
    pub role: ChatRole,
    pub content: &'a str,
}

impl<'a> Message<'a> {
    pub fn user(content: &'a str) -> Self {
        let role = ChatRole::User;
        Self { role, content }
    }
}

/// How a conversation is rendered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rendering {
    /// Whether the text ends with the opening of the model's answer.
    pub add_generation_prompt: bool,
    /// Seconds since 1970, which a template reads with `strftime_now` (in UTC). If they are absent, a template falls back to
    /// the date written in it, so that a prompt is the same on every machine and day.
    pub unix_seconds: Option<i64>,
}

impl Rendering {
    /// A prompt that the model answers next, the same on every day.
    pub const PROMPT: Self = Self {
        add_generation_prompt: true,
        unix_seconds: None,
    };
}

/// Why a conversation was not rendered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ChatError {
    #[error("the model has no chat template; use a model tuned for chat, or send a plain prompt")]
    Missing,
    #[error("the chat template cannot be read: {0}; use the file that came with the model")]
    Unreadable(String),
    /// The template raised an exception, failed, or took too many steps.
    #[error(
        "the chat template refused the conversation: {0}; send messages that the model's format allows"
    )]
    Refused(String),
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bytes: usize,
    /// `bos_token` and the like, with their text.
    special: Vec<(String, String)>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ChatTemplate({} bytes)", self.bytes)
    }
}

impl ChatTemplate {
    /// Compiles a template. `settings` is `tokenizer_config.json`, which names the special tokens that a template may write.
    ///
    /// # Errors
    /// When the text is not a template.
    pub fn new(source: &str, settings: &Json) -> Result<Self, ChatError> {
        if source.len() as u64 > TEMPLATE_BYTES_MAX {
            return Err(ChatError::Unreadable(format!(
                "it has {} bytes, but at most {TEMPLATE_BYTES_MAX} are read",
                source.len()
            )));
        }
        let unreadable = |error: Error| ChatError::Unreadable(one_line(&error));
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

    /// The template in `tokenizer_config.json`: its only one, or the one called `default`.
    pub(crate) fn in_settings(settings: &Json) -> Option<String> {
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

    /// The text of a conversation, including special tokens.
    ///
    /// # Errors
    /// When the template refuses the conversation, or takes too many steps.
    pub fn render(
        &self,
        messages: &[Message<'_>],
        rendering: Rendering,
    ) -> Result<String, ChatError> {
        let turn = |message: &Message<'_>| {
            Value::from_pairs([
                ("role", Value::from(message.role.name())),
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
        set(
            "add_generation_prompt",
            Value::from(rendering.add_generation_prompt),
        );
        set("tools", Value::from(()));
        set("documents", Value::from(()));
        if let Some(seconds) = rendering.unix_seconds {
            let now = move |format: StringInput<'_>| strftime(format.as_str(), seconds);
            set("strftime_now", Value::from_function(now));
        }
        let failed = |error: Error| ChatError::Refused(one_line(&error));
        let template = self.environment.get_template(NAME).map_err(failed)?;
        template.render(Value::from_pairs(context)).map_err(failed)
    }
}

/// Jinja as in transformers.
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
    Value::from(stripped(value.as_str(), characters, Ends::Both))
}

/// Python's methods on strings, lists and dictionaries.
///
/// Stripping is done here: Python counts the separators U+001C to U+001F as white space, Rust does not.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let ends = match (value.kind(), name) {
        (ValueKind::String, "strip") => Ends::Both,
        (ValueKind::String, "lstrip") => Ends::Start,
        (ValueKind::String, "rstrip") => Ends::End,
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    };
    let (Rest(args),): (Rest<Value>,) = minijinja::value::from_args(args)?;
    let characters = args.first().and_then(Value::as_str);
    let text = value.as_str().unwrap_or_default();
    Ok(Value::from(stripped(text, characters, ends)))
}

/// The ends of a text to strip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    Start,
    End,
    Both,
}

/// Strips the given characters, or Python's white space, from the ends of a text.
fn stripped<'a>(text: &'a str, characters: Option<&str>, ends: Ends) -> &'a str {
    let goes = |c: char| match characters {
        Some(characters) => characters.contains(c),
        None => c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c),
    };
    match ends {
        Ends::Start => text.trim_start_matches(goes),
        Ends::End => text.trim_end_matches(goes),
        Ends::Both => text.trim_matches(goes),
    }
}

/// The special tokens that the settings name: `bos_token` and the like.
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

/// An error of the template in one line, with the line number in the template.
fn one_line(error: &Error) -> String {
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

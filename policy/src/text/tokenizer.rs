//! Text to tokens and back, by the `tokenizer.json` of a model.
//!
//! Invariant: a tokenizer that was checked against a configuration yields no id beyond the embedding.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::characters::{AlphabetError, EOS, PAD, character_settings, character_tokenizer};
use super::chat::{ChatError, ChatTemplate, Message, Rendering, TEMPLATE_BYTES_MAX};
use crate::config::Config;
use crate::disk::{DiskError, read_file};

/// Largest tokenizer read: the longest published ones have about 35 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// The file of a chat template, outside `tokenizer_config.json`.
pub(crate) const CHAT_FILE: &str = "chat_template.jinja";

/// Names of the token that ends an answer, tried in order when `tokenizer_config.json` names none.
const EOS_NAMES: [&str; 6] = [
    EOS,
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "<|eot_id|>",
    "<end_of_turn>",
];

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("{file} cannot be read: {reason}; use the file that came with the model")]
    Unreadable { file: &'static str, reason: String },
    /// `token` has the highest id.
    #[error(
        "tokenizer.json has token `{token}` with id {id}, but config.json has vocab_size = {vocab_size}; use both files of the same model"
    )]
    Vocabulary {
        token: String,
        id: u32,
        vocab_size: usize,
    },
    /// `text` is the start of the text.
    #[error(
        "text `{text}` cannot be encoded: {reason}; use only characters of the model's vocabulary"
    )]
    Encode { text: String, reason: String },
    #[error(
        "tokens cannot be decoded to text: {0}; use the tokenizer.json that came with the model"
    )]
    Decode(String),
    #[error(transparent)]
    Chat(#[from] ChatError),
    #[error(transparent)]
    Alphabet(#[from] AlphabetError),
}

/// A tokenizer, cheap to share.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    tokenizer: tokenizers::Tokenizer,
    json: String,
    settings: String,
    /// Token with the highest id, and the id.
    highest: (String, u32),
    eos: Option<u32>,
    pad: Option<u32>,
    /// The template's text and the template. A model with an unreadable template can still be used without chat.
    chat: Option<(String, Result<ChatTemplate, ChatError>)>,
}

impl Tokenizer {
    /// Loads `tokenizer.json` from a model's folder, with `tokenizer_config.json` and `chat_template.jinja` if they exist. As
    /// in transformers, the latter wins over a template in `tokenizer_config.json`.
    ///
    /// # Errors
    /// When the file is missing or is not a tokenizer.
    pub fn load(folder: &Path) -> Result<Self, TokenizerError> {
        let hint =
            "copy it from the model that the weights came from, or write one with `muster warmup`";
        let json = read_file(&folder.join("tokenizer.json"), TOKENIZER_BYTES_MAX, hint)?;
        // Encoding needs tokenizer.json only.
        let optional =
            |name: &str, bytes_max: u64| match read_file(&folder.join(name), bytes_max, hint) {
                Ok(text) => Ok(Some(String::from_utf8_lossy(&text).into_owned())),
                Err(DiskError::Missing { .. }) => Ok(None),
                Err(error) => Err(error),
            };
        let settings = optional("tokenizer_config.json", TOKENIZER_BYTES_MAX)?;
        let chat = optional(CHAT_FILE, TEMPLATE_BYTES_MAX)?;
        Self::with_chat(&String::from_utf8_lossy(&json), settings.as_deref(), chat)
    }

    /// Reads the text of a `tokenizer.json` and of a `tokenizer_config.json`.
    ///
    /// # Errors
    /// When one of them is unreadable.
    pub fn parse(json: &str, settings: Option<&str>) -> Result<Self, TokenizerError> {
        Self::with_chat(json, settings, None)
    }

    /// Like [`Tokenizer::parse`], with the text of a `chat_template.jinja`.
    ///
    /// # Errors
    /// As [`Tokenizer::parse`]. An error of the template is reported by [`Tokenizer::chat_template`].
    pub fn with_chat(
        json: &str,
        settings: Option<&str>,
        chat: Option<String>,
    ) -> Result<Self, TokenizerError> {
        let unreadable = |file, reason: String| TokenizerError::Unreadable { file, reason };
        // Not `from_bytes`: it is generic, so this crate would compile the whole of tokenizers' deserialisation again.
        let tokenizer = json
            .parse::<tokenizers::Tokenizer>()
            .map_err(|error| unreadable("tokenizer.json", error.to_string()))?;
        let vocabulary = tokenizer.get_vocab(true);
        let highest = vocabulary
            .into_iter()
            .max_by_key(|(_, id)| *id)
            .ok_or_else(|| unreadable("tokenizer.json", "its vocabulary is empty".to_owned()))?;
        let settings: Value = match settings {
            None => Value::Null,
            Some(text) => serde_json::from_str(text)
                .map_err(|error| unreadable("tokenizer_config.json", error.to_string()))?,
        };
        let id_named =
            |key: &str| special(&settings, key).and_then(|name| tokenizer.token_to_id(name));
        let known = || {
            EOS_NAMES
                .iter()
                .find_map(|name| tokenizer.token_to_id(name))
        };
        let eos = id_named("eos_token").or_else(known);
        let pad = id_named("pad_token").or_else(|| tokenizer.token_to_id(PAD));
        let chat = chat
            .or_else(|| ChatTemplate::in_settings(&settings))
            .map(|source| {
                let template = ChatTemplate::new(&source, &settings);
                (source, template)
            });
        let settings = if settings.is_null() {
            json!({ "tokenizer_class": "PreTrainedTokenizerFast" })
        } else {
            settings
        };
        let (json, settings) = (json.to_owned(), format!("{settings:#}\n"));
        let shared = Shared {
            tokenizer,
            json,
            settings,
            highest,
            eos,
            pad,
            chat,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// A tokenizer with one token per character, for models trained from scratch. Ids: `<pad>` 0, `<eos>` 1, then the
    /// characters in the order given.
    ///
    /// # Errors
    /// When the alphabet is empty or names a character twice.
    pub fn characters(alphabet: &str) -> Result<Self, TokenizerError> {
        Self::parse(&character_tokenizer(alphabet)?, Some(&character_settings()))
    }

    /// Refuses a configuration whose embedding lacks one of the ids.
    ///
    /// # Errors
    /// Names the token with the highest id.
    pub fn check(&self, config: &Config) -> Result<(), TokenizerError> {
        let (token, id) = &self.shared.highest;
        if (*id as usize) < config.vocab_size {
            return Ok(());
        }
        let vocab_size = config.vocab_size;
        Err(TokenizerError::Vocabulary {
            token: token.clone(),
            id: *id,
            vocab_size,
        })
    }

    /// Tokens of a text as it is, without anything the tokenizer would put around a whole document.
    ///
    /// # Errors
    /// When a character has no token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, false)
    }

    /// Tokens of a prompt, after the tokens that open a document (most families have none).
    ///
    /// # Errors
    /// When a character has no token.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, true)
    }

    /// Tokens of a conversation in the form of the model's chat template. The template itself writes the tokens that open a
    /// document.
    ///
    /// # Errors
    /// When the model has no chat template, or the template refuses the conversation.
    pub fn encode_chat(
        &self,
        messages: &[Message<'_>],
        rendering: Rendering,
    ) -> Result<Vec<u32>, TokenizerError> {
        let text = self.chat_template()?.render(messages, rendering)?;
        self.encode(&text)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoded = self.shared.tokenizer.encode(text, special);
        let encoded = encoded.map_err(|error| TokenizerError::Encode {
            text: text.chars().take(60).collect(),
            reason: error.to_string(),
        })?;
        Ok(encoded.get_ids().to_vec())
    }

    /// Text of tokens, without special tokens.
    ///
    /// An id without a token (an embedding may have more rows than the vocabulary) becomes U+FFFD, so that an answer cannot
    /// hide it.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        let unknown = |token: &u32| self.shared.tokenizer.id_to_token(*token).is_none();
        let parts: Result<Vec<String>, _> = tokens
            .split(unknown)
            .map(|known| self.shared.tokenizer.decode(known, true))
            .collect();
        Ok(parts
            .map_err(|error| TokenizerError::Decode(error.to_string()))?
            .join("\u{FFFD}"))
    }

    /// The token that ends an answer, if the tokenizer has one.
    pub fn eos(&self) -> Option<u32> {
        self.shared.eos
    }

    /// The token that pads batches in other software, if the tokenizer has one.
    pub fn pad(&self) -> Option<u32> {
        self.shared.pad
    }

    /// The id of a token by its name in the vocabulary, or by its text if that is a single token.
    pub fn id(&self, token: &str) -> Option<u32> {
        let named = self.shared.tokenizer.token_to_id(token);
        named.or_else(|| match self.encode(token).ok()?.as_slice() {
            [id] => Some(*id),
            _ => None,
        })
    }

    /// Rows that an embedding needs to hold every id.
    pub fn vocab_size(&self) -> usize {
        self.shared.highest.1 as usize + 1
    }

    /// The model's chat template.
    ///
    /// # Errors
    /// When the model has none, or an unreadable one.
    pub fn chat_template(&self) -> Result<&ChatTemplate, ChatError> {
        match &self.shared.chat {
            None => Err(ChatError::Missing),
            Some((_, Ok(template))) => Ok(template),
            Some((_, Err(error))) => Err(error.clone()),
        }
    }

    /// The text of the model's chat template, if it has one.
    pub fn chat(&self) -> Option<&str> {
        self.shared.chat.as_ref().map(|(source, _)| source.as_str())
    }

    /// The text of `tokenizer.json`.
    pub fn json(&self) -> &str {
        &self.shared.json
    }

    /// The text of `tokenizer_config.json`.
    pub fn settings(&self) -> &str {
        &self.shared.settings
    }
}

/// A special token of `tokenizer_config.json`, written as a string or as an object with its content.
fn special<'a>(settings: &'a Value, key: &str) -> Option<&'a str> {
    let value = settings.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

#[cfg(test)]
mod tests;

//! Text to tokens and back, as the `tokenizer.json` beside a model says, and a small character tokenizer for models trained
//! from scratch.
//!
//! Invariant: a tokenizer that was checked against a configuration yields no id that the embedding lacks.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::config::Config;
use crate::disk::{DiskError, read_file};

/// Largest tokenizer read: the longest in use have about 35 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// The token that fills batches in other software, in a character tokenizer.
const PAD: &str = "<pad>";

/// The token that ends an answer, in a character tokenizer.
const EOS: &str = "<eos>";

/// Names under which the end of a text goes where no `tokenizer_config.json` names it.
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
    /// A file was not read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Not a tokenizer.
    #[error("{file} cannot be read: {reason}; use the file that came with the model")]
    Unreadable {
        /// Which file.
        file: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Ids beyond the embedding.
    #[error(
        "tokenizer.json has token `{token}` with id {id}, but config.json has vocab_size = {vocab_size}; use the pair that belongs together"
    )]
    Vocabulary {
        /// The token with the highest id.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// Text with a character that has no token.
    #[error("text `{text}` has no tokens in this vocabulary: {reason}")]
    Encode {
        /// Start of the text.
        text: String,
        /// What the tokenizer said.
        reason: String,
    },
    /// Tokens that are no text.
    #[error("tokens cannot be turned into text: {0}")]
    Decode(String),
    /// An alphabet that makes no tokenizer.
    #[error("the alphabet {problem}; list each character once")]
    Alphabet {
        /// What is wrong with it.
        problem: String,
    },
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
}

impl Tokenizer {
    /// Loads `tokenizer.json`, and `tokenizer_config.json` if there is one, from a model's folder.
    ///
    /// # Errors
    /// When the file is missing or is not a tokenizer.
    pub fn load(folder: &Path) -> Result<Self, TokenizerError> {
        let hint =
            "copy it from the model that the weights came from, or write one with `muster warmup`";
        let json = read_file(&folder.join("tokenizer.json"), TOKENIZER_BYTES_MAX, hint)?;
        let settings = match read_file(
            &folder.join("tokenizer_config.json"),
            TOKENIZER_BYTES_MAX,
            hint,
        ) {
            Ok(settings) => Some(String::from_utf8_lossy(&settings).into_owned()),
            // Optional: everything needed to encode is in tokenizer.json.
            Err(DiskError::Missing { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        Self::parse(&String::from_utf8_lossy(&json), settings.as_deref())
    }

    /// Reads the text of a `tokenizer.json` and of a `tokenizer_config.json`.
    ///
    /// # Errors
    /// When one of them is not what it should be.
    pub fn parse(json: &str, settings: Option<&str>) -> Result<Self, TokenizerError> {
        let unreadable = |file, reason: String| TokenizerError::Unreadable { file, reason };
        let tokenizer = tokenizers::Tokenizer::from_bytes(json)
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

    /// Tokens of a prompt, with what the tokenizer puts at the start of a document (most families: nothing).
    ///
    /// # Errors
    /// When a character has no token.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, true)
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
    /// An id that has no token (an embedding may have more rows than the vocabulary) shows as U+FFFD, so that nothing can
    /// be hidden in an answer.
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

    /// The token that fills batches in other software, if the tokenizer has one.
    pub fn pad(&self) -> Option<u32> {
        self.shared.pad
    }

    /// The id of a token by its name in the vocabulary, or by its text where that is one token.
    pub fn id(&self, token: &str) -> Option<u32> {
        let named = self.shared.tokenizer.token_to_id(token);
        named.or_else(|| match self.encode(token).ok()?.as_slice() {
            [id] => Some(*id),
            _ => None,
        })
    }

    /// Smallest embedding that has a row for every id.
    pub fn vocab_size(&self) -> usize {
        self.shared.highest.1 as usize + 1
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

/// A special token in `tokenizer_config.json`: a string, or an object with its content.
fn special<'a>(settings: &'a Value, key: &str) -> Option<&'a str> {
    let value = settings.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// The text of a `tokenizer.json` with one token per character of `alphabet`, which Hugging Face `tokenizers` and
/// transformers load as well. A character outside the alphabet is an error when encoding, and not dropped.
///
/// Characters are named as byte-level vocabularies name them (a space is `Ġ`): transformers 5 rebuilds the tokenizer of
/// every Qwen2 model as a byte-level one and takes over no more than the vocabulary. So it reads an alphabet of ASCII
/// characters as it is meant; of others it drops the characters, where transformers 4 and this crate do not.
///
/// # Errors
/// When the alphabet is empty or names a character twice.
pub fn character_tokenizer(alphabet: &str) -> Result<String, TokenizerError> {
    if alphabet.is_empty() {
        return Err(TokenizerError::Alphabet {
            problem: "is empty".to_owned(),
        });
    }
    let mut vocabulary = serde_json::Map::new();
    let names = [PAD.to_owned(), EOS.to_owned()].into_iter();
    for (id, name) in names.chain(alphabet.chars().map(byte_level)).enumerate() {
        if vocabulary.insert(name.clone(), json!(id)).is_some() {
            return Err(TokenizerError::Alphabet {
                problem: format!("names `{name}` twice"),
            });
        }
    }
    let added = [PAD, EOS].iter().enumerate().map(|(id, name)| {
        json!({
            "id": id, "content": name, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    });
    let byte_level_step = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    let file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        // A dot would leave out line breaks.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": "[\\s\\S]" }, "behavior": "Isolated", "invert": false },
                byte_level_step,
            ],
        },
        "post_processor": null,
        // Joins tokens as they are; without a decoder, spaces would be put between them.
        "decoder": byte_level_step,
        // The unknown token is not in the vocabulary, which makes an unknown character an error.
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" },
    });
    Ok(format!("{file:#}\n"))
}

/// A character's name in a byte-level vocabulary: each of its bytes as a visible character. Those of Latin-1 that are
/// visible stand for themselves, the others for the code points from U+0100 on, in order.
fn byte_level(character: char) -> String {
    let is_visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let shown = |byte: u8| {
        if is_visible(byte) {
            return char::from(byte);
        }
        let hidden_before = (0..byte).filter(|earlier| !is_visible(*earlier)).count();
        let code = 0x100 + u32::try_from(hidden_before).unwrap_or_default();
        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
    };
    let mut bytes = [0; 4];
    character
        .encode_utf8(&mut bytes)
        .bytes()
        .map(shown)
        .collect()
}

fn character_settings() -> String {
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        // Without one, transformers 5 adds a token of its own. No text is ever read as it.
        "unk_token": PAD,
        "clean_up_tokenization_spaces": false,
    });
    format!("{settings:#}\n")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::tiny;

    const ALPHABET: &str = "0123456789+-=., \nabc";

    proptest! {
        #[test]
        fn text_survives_encoding_and_decoding(text in "[0-9+=., \nabc-]{0,60}") {
            let tokenizer = Tokenizer::characters(ALPHABET).unwrap();
            let tokens = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(tokens.len(), text.chars().count());
            prop_assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
        }
    }

    #[test]
    fn special_tokens_have_fixed_ids_and_no_text() {
        let tokenizer = Tokenizer::characters(ALPHABET).unwrap();
        assert_eq!((tokenizer.pad(), tokenizer.eos()), (Some(0), Some(1)));
        assert_eq!(tokenizer.vocab_size(), 2 + ALPHABET.chars().count());
        assert_eq!(
            tokenizer.encode("1<eos>").unwrap(),
            [tokenizer.id("1").unwrap(), 1]
        );
        assert_eq!(
            tokenizer
                .decode(&[tokenizer.id("1").unwrap(), 1, 0])
                .unwrap(),
            "1"
        );
        assert_eq!(
            tokenizer.encode_prompt("1=").unwrap(),
            tokenizer.encode("1=").unwrap()
        );
    }

    #[test]
    fn characters_are_named_as_byte_level_vocabularies_name_them() {
        let named: Vec<String> = " \nA~é中".chars().map(byte_level).collect();
        assert_eq!(named, ["Ġ", "Ċ", "A", "~", "Ã©", "ä¸Ń"]);
        let tokenizer = Tokenizer::characters(" \né中").unwrap();
        assert_eq!(tokenizer.encode("中 \né").unwrap(), [5, 2, 3, 4]);
        assert_eq!(tokenizer.decode(&[5, 2, 3, 4]).unwrap(), "中 \né");
        assert_eq!((tokenizer.id(" "), tokenizer.id("Ġ")), (Some(2), Some(2)));
        assert_eq!(tokenizer.id("é中"), None);
    }

    #[test]
    fn an_id_without_a_token_is_not_hidden() {
        let tokenizer = Tokenizer::characters("12").unwrap();
        assert_eq!(tokenizer.decode(&[2, 9, 3]).unwrap(), "1\u{FFFD}2");
    }

    #[test]
    fn a_character_outside_the_alphabet_is_an_error() {
        let error = Tokenizer::characters("12")
            .unwrap()
            .encode("1z")
            .unwrap_err()
            .to_string();
        assert!(error.contains("1z"), "{error}");
    }

    #[test]
    fn an_alphabet_must_name_each_character_once() {
        for alphabet in ["", "121"] {
            assert!(matches!(
                character_tokenizer(alphabet),
                Err(TokenizerError::Alphabet { .. })
            ));
        }
    }

    #[test]
    fn a_vocabulary_beyond_the_embedding_is_refused() {
        let config = tiny();
        Tokenizer::characters(ALPHABET)
            .unwrap()
            .check(&config)
            .unwrap();
        let wide: String = ('\u{4E00}'..).take(36).collect();
        let error = Tokenizer::characters(&wide)
            .unwrap()
            .check(&config)
            .unwrap_err()
            .to_string();
        assert!(error.contains("37"), "{error}");
    }

    #[test]
    fn what_is_written_reads_back_with_its_special_tokens() {
        let tokenizer = Tokenizer::characters(ALPHABET).unwrap();
        let again = Tokenizer::parse(tokenizer.json(), Some(tokenizer.settings())).unwrap();
        assert_eq!((again.eos(), again.pad()), (Some(1), Some(0)));
        let object = r#"{"eos_token": {"content": "a"}}"#;
        let other = Tokenizer::parse(tokenizer.json(), Some(object)).unwrap();
        assert_eq!(other.eos(), tokenizer.id("a"));
        let bare = Tokenizer::parse(tokenizer.json(), None).unwrap();
        assert_eq!(bare.eos(), Some(1));
    }

    #[test]
    fn what_is_no_tokenizer_is_refused_by_file() {
        let error = Tokenizer::parse("{}", None).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        let json = character_tokenizer("1").unwrap();
        let error = Tokenizer::parse(&json, Some("[")).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json"), "{error}");
        let empty = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(empty.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json is missing"), "{error}");
    }
}

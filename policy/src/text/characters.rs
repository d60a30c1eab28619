//! A tokenizer with one token per character, for models trained from scratch.
//!
//! Writes the same `tokenizer.json` for the same alphabet. Knows no model.

use serde_json::json;

use super::TokenizerError;

/// The token that fills batches in other software, in a character tokenizer.
pub(super) const PAD: &str = "<pad>";

/// The token that ends an answer, in a character tokenizer.
pub(super) const EOS: &str = "<eos>";

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
pub(super) fn byte_level(character: char) -> String {
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

pub(super) fn character_settings() -> String {
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

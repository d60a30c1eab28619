//! A tokenizer with one token per character, for models trained from scratch.
//!
//! Invariant: equal alphabets give equal bytes of `tokenizer.json`.

use serde_json::json;

use super::byte_level::char_of;

/// Pads batches in other software; this crate never pads.
pub(super) const PAD: &str = "<pad>";

/// Ends an answer.
pub(super) const EOS: &str = "<eos>";

/// Why an alphabet makes no tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AlphabetError {
    #[error("the alphabet is empty; list each character once")]
    Empty,
    #[error("the alphabet lists `{character}` twice; list each character once")]
    Duplicate { character: char },
}

/// The text of a `tokenizer.json` with one token per character of `alphabet`, which Hugging Face `tokenizers` and
/// transformers load as well. Encoding a character outside the alphabet is an error.
///
/// Characters are spelled as in byte-level vocabularies, because transformers 5 rebuilds the tokenizer of every Qwen2 model
/// as a byte-level one from the vocabulary alone. That works for ASCII; transformers 5 drops other characters, transformers
/// 4 and this crate do not.
///
/// # Errors
/// When the alphabet is empty or lists a character twice.
pub fn character_tokenizer(alphabet: &str) -> Result<String, AlphabetError> {
    if alphabet.is_empty() {
        return Err(AlphabetError::Empty);
    }
    let mut vocabulary = serde_json::Map::new();
    for (id, special) in [PAD, EOS].into_iter().enumerate() {
        vocabulary.insert(special.to_owned(), json!(id));
    }
    for character in alphabet.chars() {
        let id = vocabulary.len();
        if vocabulary.insert(spelled(character), json!(id)).is_some() {
            return Err(AlphabetError::Duplicate { character });
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
        // A dot would not match line breaks.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": "[\\s\\S]" }, "behavior": "Isolated", "invert": false },
                byte_level_step,
            ],
        },
        "post_processor": null,
        // Without a decoder, the library joins tokens with spaces.
        "decoder": byte_level_step,
        // The unknown token is not in the vocabulary, which makes an unknown character an error.
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" },
    });
    Ok(format!("{file:#}\n"))
}

/// A character's name in a byte-level vocabulary.
pub(super) fn spelled(character: char) -> String {
    let mut bytes = [0; 4];
    let bytes = character.encode_utf8(&mut bytes).bytes();
    bytes.map(char_of).collect()
}

/// The text of the `tokenizer_config.json` beside it.
pub(super) fn character_settings() -> String {
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        // Without this key, transformers 5 adds a token of its own. No text is encoded as it.
        "unk_token": PAD,
        "clean_up_tokenization_spaces": false,
    });
    format!("{settings:#}\n")
}
